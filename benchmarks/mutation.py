"""Mutation testing: changes the code in small ways, one at a time. For each change, some test should fail.

    python benchmarks/mutation.py --mutants 200 --seed 0 --out mutation.jsonl

The script draws mutants of the modules in `mutation.toml`, spread over modules and kinds of change. For each it runs
the tests that are listed there for the module. A mutant is *killed* if a test fails, and *survives* otherwise; the
survivors are printed. The same seed draws the same mutants, also after other lines of a module were changed. Each
result is a line of a file. After an interruption, the same command continues. After a change of the code or the tests,
a run with the same file tries the survivors again; killed mutants count as killed. Mutants that are the same program,
so that no test can fail, are listed in `mutation.toml` with the reason; they are neither run nor counted.

Why not mutmut 3 or cosmic-ray: mutmut skips decorated functions (`jax.jit`, properties, policies) and records which
tests call a function, which the cache of `jax.jit` hides. cosmic-ray changes files in place and starts a process for
each mutant. Neither draws a sample, exchanges the branches of `jnp.where`, or removes a ``~``. Here one process imports
JAX without starting a backend, and forks for each mutant. Programs that a mutant does not change are read from JAX's
persistent compilation cache. The unmutated tests fill that cache first.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mutants import Mutant, drawn, mutants, shortened

IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "results", "build", "node_modules")


class Campaign:
    """The source tree, its modules and their tests, and the results so far."""

    def __init__(self, root: Path, table: Path, out: Path):
        self.root, self.out = root, out
        settings = tomllib.loads(table.read_text())
        self.preload, self.grace = settings["preload"], settings["grace"]
        self.stages = {
            module: [stage.format(module=module) for stage in suite["tests"]]
            for suite in settings["suite"]
            for module in suite["modules"]
        }
        self.sources = {module: (root / module).read_text() for module in self.stages}
        self.every = [one for module, source in self.sources.items() for one in mutants(module, source)]
        listed = settings.get("equivalent", [])
        self.equivalent = {tuple(one[x] for x in ("module", "where", "line", "becomes")): one["why"] for one in listed}
        self.stale = sorted(self.equivalent.keys() - {one.key for one in self.every})
        files = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
        files = (path for path in files if not str(path).startswith((".", "benchmarks")))
        self.tree = shortened([(str(path), (root / path).read_text()) for path in files])
        self.results: dict[str, dict] = {}
        text = out.read_text() if out.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # without half a line, if the run was stopped while it wrote
        if whole != text:
            out.write_text(whole)
        for one in map(json.loads, whole.splitlines()):
            if one["tree"] == self.tree or one["outcome"] in ("killed", "timeout"):
                self.results[one["id"]] = one

    def run(self, number: int, seed: int, workers: int, only: list[str]) -> list[Mutant]:
        """Tries a number of mutants that are not equivalent. Returns them, and the equivalent ones drawn among them."""
        order = [one for one in drawn(self.every, seed) if not only or one.module in only]
        tried = [one for one in order if one.key not in self.equivalent][:number]
        met = order[: order.index(tried[-1]) + 1] if tried else []
        todo = [one for one in tried if one.id not in self.results]
        print(f"{len(self.every)} mutants; {len(tried)} are drawn, besides {len(met) - len(tried)} equivalent ones; "
              f"{len(todo)} are to be tried", flush=True)  # fmt: skip
        for name in self.preload if todo else []:
            importlib.import_module(name)
        with tempfile.TemporaryDirectory() as folder:
            stages = list(dict.fromkeys(stage for one in todo for stage in self.stages[one.module]))
            unmutated = [stage for stage in stages if shortened(stage) not in self.results]
            for stage, result in self._attempts(unmutated, 1, Path(folder)):  # one at a time: they fill JAX's cache
                if result["outcome"] != "survived":
                    raise SystemExit(f"{stage} fails without any mutant:\n{result['log']}")
                self._keep(shortened(stage), result | {"stage": stage})
                print(f"unmutated: {stage}  {result['log'].strip().rpartition(chr(10))[2]}", flush=True)
            began = time.monotonic()
            for done, (one, result) in enumerate(self._attempts(todo, workers, Path(folder)), 1):
                self._keep(one.id, asdict(one) | result)
                left = (time.monotonic() - began) / done * (len(todo) - done) / 60
                print(f"{done}/{len(todo)}, {left:.0f} min left: {one.id} {result['outcome']} after "
                      f"{result['seconds']:.0f} s  {one.module} {one.operator}: {one.becomes}  {result['by']}",
                      flush=True)  # fmt: skip
        return met

    def report(self, met: list[Mutant]) -> None:
        """Prints a diff for each survivor, and the score of each module."""
        rows = collections.defaultdict(collections.Counter)
        for one in met:
            outcome = "equivalent" if one.key in self.equivalent else self.results[one.id]["outcome"]
            rows[one.module][outcome] += 1
            rows["in all"][outcome] += 1
            if outcome == "survived":
                print(f"\nsurvived: {one.id}\n{one.diff(self.sources[one.module])}")
        print(f"\n{'':36} killed timeout survived equivalent  score")
        for module, counts in sorted(rows.items(), key=lambda row: (row[0] == "in all", row[0])):
            killed = counts["killed"] + counts["timeout"]
            score = killed / max(killed + counts["survived"], 1)
            columns = [counts[name] for name in ("killed", "timeout", "survived", "equivalent")]
            print(f"{module:36} {columns[0]:6} {columns[1]:7} {columns[2]:8} {columns[3]:10} {score:6.1%}")
        for key in self.stale:
            print(f"mutation.toml lists an equivalent mutant that does not exist any more: {' | '.join(key)}")

    def _attempts(self, todo: list, workers: int, folder: Path) -> Iterator[tuple]:
        """Tries mutants, or single stages without a mutant, ``workers`` at a time. Yields each with its result."""
        free, running, todo = [folder / str(index) for index in range(workers)], {}, todo[::-1]
        for copy in free:
            if not copy.exists():
                shutil.copytree(self.root, copy, ignore=IGNORED)
        try:
            while todo or running:
                while todo and free:
                    what, copy = todo.pop(), free.pop()
                    if isinstance(what, Mutant):
                        (copy / what.module).write_text(what.applied(self.sources[what.module]))
                        os.utime(
                            copy / what.module, (len(todo), len(todo))
                        )  # a unique time, so that Python compiles the file
                    stages = self.stages[what.module] if isinstance(what, Mutant) else [what]
                    running |= self._next(what, copy, stages, 0.0)
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                for waiting in [one for one, (*_, limit) in running.items() if time.monotonic() > limit]:
                    _end(waiting)
                if not pid:
                    time.sleep(0.02)
                    continue
                _end(pid)  # and every process that it has started
                what, copy, stages, seconds, _ = running.pop(pid)
                seconds += usage.ru_utime + usage.ru_stime
                if stages and not status:
                    running |= self._next(what, copy, stages, seconds)
                    continue
                if isinstance(what, Mutant):
                    shutil.copy2(self.root / what.module, copy / what.module)
                free.append(copy)
                yield what, _result(status, copy.with_suffix(".log")) | {"seconds": round(seconds, 1)}
        finally:
            for pid in running:
                _end(pid)

    def _next(self, what: Mutant | str, copy: Path, stages: list[str], seconds: float) -> dict[int, tuple]:
        """Starts the first of the stages."""
        limit = self.grace + 3 * self.results[shortened(stages[0])]["seconds"] if isinstance(what, Mutant) else 3600
        pid = _fork(copy, stages[0], limit, unmutated=isinstance(what, str))
        return {pid: (what, copy, stages[1:], seconds, time.monotonic() + 60 + 20 * limit)}

    def _keep(self, name: str, result: dict) -> None:
        result = {"id": name, "tree": self.tree} | {key: value for key, value in result.items() if key != "log"}
        self.results[name] = result
        with self.out.open("a") as file:
            file.write(json.dumps(result) + "\n")


def _result(status: int, log: Path) -> dict:
    """The outcome of a process that has ended, and the test that failed."""
    text = log.read_text(errors="replace")
    hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    outcome = "timeout" if hung else "killed" if status else "survived"
    failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", text, re.MULTILINE)
    by = "" if outcome != "killed" else failed[0] if failed else text.strip().rpartition("\n")[2]
    return {"outcome": outcome, "by": by, "log": text[-4000:]}


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _fork(copy: Path, stage: str, seconds: float, unmutated: bool) -> int:
    """Runs a stage in a copy of the tree, for at most this many seconds of CPU time. Returns the process."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # the child does the same, since either may be first
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, resource.RLIM_INFINITY))
        log = os.open(copy.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        if (
            not unmutated and "jax" in sys.modules
        ):  # reads only: a process that is stopped while writing leaves half a program
            sys.modules["jax"].config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        import hypothesis.internal.conjecture.engine as engine
        import pytest

        engine.MAX_SHRINKS = 0  # the first failing example is enough
        options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        options += ["-m", "slow or not slow"]
        code = pytest.main([*options, *shlex.split(stage)]) % 5  # 5: there is no test, if a module has no doctest
        sys.stdout.flush()
        os._exit(code)
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(1)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    table, root = Path(__file__).with_suffix(".toml"), Path(__file__).resolve().parents[1]
    parser.add_argument("--mutants", type=int, default=200, help="mutants to try, without equivalent ones")
    parser.add_argument("--seed", type=int, default=0, help="decides which mutants are drawn")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--only", nargs="*", default=[], metavar="MODULE", help="only mutants of these modules")
    parser.add_argument("--out", type=Path, default=Path("mutation.jsonl"), help="file for the results")
    parser.add_argument("--table", type=Path, default=table, help="file with the modules and their tests")
    parser.add_argument("--root", type=Path, default=root, help="source tree, which is copied")
    parser.add_argument("--show", metavar="ID", help="only print the diff of this mutant")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left running
    programs = Path(tempfile.gettempdir(), "corm_jax_mutation_programs")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(programs))
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    campaign = Campaign(given.root.resolve(), given.table, given.out)
    if given.show:
        for one in campaign.every:
            if one.id == given.show:
                print(one.diff(campaign.sources[one.module]))
        return
    campaign.report(campaign.run(given.mutants, given.seed, given.workers, given.only))


if __name__ == "__main__":
    main()
