"""Mutation testing: small changes of the code, one at a time, each of which some test should notice.

    python benchmarks/mutation.py --mutants 200 --seed 0 --out mutation.jsonl

Draws so many mutants of the modules in `mutation.toml`, spread over modules and kinds of change, runs for each the tests
that are listed there for its module, and prints who survived. The same seed draws the same mutants, and a change of one
line moves no other mutant. Results go to a file, line by line, so that a run that was ended goes on where it was.
Mutants that no test can notice are listed in `mutation.toml` with the reason; they are neither run nor counted.

Why not mutmut 3 or cosmic-ray: mutmut skips functions that are decorated (`jax.jit`, properties, policies) and asks
which tests call a function, which the cache of `jax.jit` hides; cosmic-ray changes files in place and starts a process
for each mutant. Neither draws a sample, and neither exchanges the branches of `jnp.where`, drops a ``~``, or turns
``argmin`` into ``argmax``. Here one process imports JAX, starts no backend, and forks for each mutant; compiled programs
that a mutant does not change come from JAX's persistent cache, which the tests fill before, unmutated.
"""

import argparse
import ast
import builtins
import collections
import contextlib
import difflib
import hashlib
import importlib
import io
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
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "results", "build", "node_modules")

SYMBOLS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "|"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "argmin": "argmax", "argmax": "argmin", "minimum": "maximum",
    "maximum": "minimum", "cummax": "cummin", "cumsum": "cumprod", "zeros": "ones", "ones": "zeros", "sum": "max",
    "zeros_like": "ones_like", "ones_like": "zeros_like", "mean": "sum", "floor": "ceil", "ceil": "floor", "inf": "nan",
    "tril": "triu", "triu": "tril", "sin": "cos", "cos": "sin",
}  # fmt: skip
BOUNDS = ("clip", "minimum", "maximum", "min", "max")
CONSTRUCTORS = ("TypeVar", "field", "number", "choice", "static", "dataclass", "dataclass_transform")


@dataclass(frozen=True)
class Mutant:
    """One change: of ``module``, inside the function ``where``, lines that were ``line`` and become ``becomes``."""

    module: str
    where: str
    operator: str
    line: str
    becomes: str
    nth: int  # of those that are alike so far
    start: int
    end: int
    text: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies the change, wherever in the module the function stands."""
        return self.module, self.where, self.line, self.becomes

    @property
    def id(self) -> str:
        """A short name."""
        return hashlib.sha256(repr((*self.key, self.nth)).encode()).hexdigest()[:8]

    def applied(self, source: str) -> str:
        """The module's text with the change."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()

    def diff(self, source: str) -> str:
        """The change as a unified diff."""
        lines = difflib.unified_diff(
            source.splitlines(),
            self.applied(source).splitlines(),
            self.module,
            f"{self.module} {self.id}",
            "",
            "",
            2,
            "",
        )
        return "\n".join(lines)


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its text.

    Left out is what is not executed, or only described: docstrings, annotations, strings, what `raise` raises.
    """
    data, tree = source.encode(), ast.parse(source)
    starts = [0, *(match.end() for match in re.finditer(rb"\n", data))]
    code = bytearray(data)  # without comments: where operators are looked for
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            begin = starts[token.start[0] - 1] + len(token.line[: token.start[1]].encode())
            code[begin : begin + len(token.string.encode())] = b" " * len(token.string.encode())

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.AST) -> str:
        begin, end = span(node)
        inner = data[begin:end].decode()
        return (
            inner
            if isinstance(node, ast.Name | ast.Constant | ast.Call | ast.Attribute | ast.Subscript)
            else f"({inner})"
        )

    def between(first: int, end: int, symbol: str, last: bool = False) -> tuple[int, int]:
        pattern = re.escape(symbol).replace(r"\ ", r"\s+")
        pattern = rf"\b{pattern}\b" if symbol[0].isalpha() else pattern
        match = [*re.finditer(pattern.encode(), bytes(code[first:end]))][-1 if last else 0]
        return first + match.start(), first + match.end()

    found: list[Mutant] = []
    seen: collections.Counter = collections.Counter()

    def add(where: str, operator: str, begin: int, end: int, replacement: str) -> None:
        first, last = data.rfind(b"\n", 0, begin) + 1, data.find(b"\n", end)
        old = data[first:last].decode()
        new = (data[first:begin] + replacement.encode() + data[end:last]).decode()
        old, new = (" ".join(x.split()) for x in (old, new))
        if old != new:
            nth = seen[where, old, new]
            seen[where, old, new] += 1
            found.append(Mutant(module, where, operator, old, new, nth, begin, end, replacement))

    for node, where, last in _executed(tree):
        for operator, (begin, end), replacement in _changes(node, last, span, text, between):
            add(where, operator, begin, end, replacement)
    return sorted(found, key=lambda one: one.start)


def _executed(tree: ast.Module) -> Iterator[tuple[ast.AST, str, bool]]:
    """Every node that may matter, with the name of what it stands in, and whether it is the last of a function."""

    def visit(node: ast.AST, where: str, last: bool):
        yield node, where, last
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = f"{where}.{node.name}" if where else node.name
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "ctx", "bases"):
                continue
            for child in value if isinstance(value, list) else [value]:
                whole = isinstance(node, ast.UnaryOp) and isinstance(child, ast.Constant)  # -1 is one number
                if isinstance(child, ast.AST) and not whole and not _inert(child):
                    yield from visit(child, where, isinstance(node, ast.FunctionDef) and child is node.body[-1])

    yield from visit(tree, "", False)


def _inert(node: ast.AST) -> bool:
    """Whether nothing in it is to be changed."""
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    if isinstance(node, ast.AnnAssign):
        return "TypeAlias" in ast.dump(node.annotation)
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Call):
        return _name(node.func) in ("isinstance", "TypeVar")
    return isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom)


def _name(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _changes(node, last, span, text, between) -> Iterator[tuple[str, tuple[int, int], str]]:
    """The changes of one node: the kind, what is replaced, by what."""
    match node:
        case ast.Compare():
            sides = [node.left, *node.comparators]
            for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
                old, new = SYMBOLS[type(operator)]
                yield "compare", between(span(left)[1], span(right)[0], old), new
        case ast.BinOp() if type(node.op) in SYMBOLS:
            old, new = SYMBOLS[type(node.op)]
            logical = isinstance(node.op, ast.BitAnd | ast.BitOr)
            yield "logic" if logical else "arithmetic", between(span(node.left)[1], span(node.right)[0], old), new
            if logical:
                yield "operand", span(node), text(node.left)
                yield "operand", span(node), text(node.right)
        case ast.BoolOp():
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield (
                    "logic",
                    between(span(left)[1], span(right)[0], SYMBOLS[type(node.op)][0]),
                    SYMBOLS[type(node.op)][1],
                )
            for one in node.values:
                others = [text(other) for other in node.values if other is not one]
                yield "operand", span(node), f"({f' {SYMBOLS[type(node.op)][0]} '.join(others)})"
        case ast.AugAssign() if type(node.op) in SYMBOLS:
            old, new = SYMBOLS[type(node.op)]
            yield "arithmetic", between(span(node.target)[1], span(node.value)[0], f"{old}="), f"{new}="
            yield "statement", span(node), "pass"
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
            yield from (("constant", span(node), f"({changed})") for changed in (1 - number, -1 - number))
        case ast.UnaryOp() if not isinstance(node.op, ast.UAdd):
            yield "negation", span(node), text(node.operand)
        case ast.Constant(value=bool(value)):
            yield "constant", span(node), str(not value)
        case ast.Constant(value=int(value)):
            yield from (("constant", span(node), str(changed)) for changed in (value + 1, value - 1))
        case ast.Constant(value=float(value)):
            yield "constant", span(node), repr(2 * value) if value else "1.0"
        case ast.Attribute(attr=name) if name in NAMES:
            end = span(node)[1]
            yield "name", (end - len(name), end), NAMES[name]
        case ast.Name(id=name) if name in NAMES and name in vars(builtins):
            yield "name", span(node), NAMES[name]
        case ast.Return() if not last:
            yield "return", span(node), "pass"
        case ast.Expr(value=ast.Call()):
            yield "statement", span(node), "pass"
        case ast.If() | ast.IfExp() if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            yield "condition", span(node.test), f"(not {text(node.test)})"
        case ast.Slice():
            for bound in filter(None, (node.lower, node.upper)):
                if not isinstance(bound, ast.Constant | ast.UnaryOp):
                    yield "bound", span(bound), f"{text(bound)} + 1"
        case ast.Call():
            yield from _changes_of_call(node, span, text, between)


def _changes_of_call(node: ast.Call, span, text, between) -> Iterator[tuple[str, tuple[int, int], str]]:
    name = _name(node.func)
    plain = [one for one in node.args if not isinstance(one, ast.Starred)]
    if name == "where" and len(plain) == 3:
        first, second = (span(one) for one in plain[1:])
        yield "branches", (first[0], second[1]), f"{text(plain[2])}, {text(plain[1])}"
    if name in BOUNDS and len(plain) == len(node.args) >= 2:
        for one in plain if name != "clip" else plain[:1]:
            yield "bound", span(node), text(one)
    if name in ("range", "arange") and plain and not isinstance(plain[-1], ast.Constant):
        yield from (("range", span(plain[-1]), f"{text(plain[-1])} {change}") for change in ("+ 1", "- 1"))
    if name and not name[0].isupper() and name not in CONSTRUCTORS:
        for keyword in filter(lambda keyword: keyword.arg, node.keywords):
            begin, end = span(keyword)
            later = [span(other)[0] for other in node.keywords if span(other)[0] > end]
            if node.args or node.keywords[0] is not keyword:
                yield "keyword", (between(span(node.func)[1], begin, ",", last=True)[0], end), ""
            elif later:
                yield "keyword", (begin, later[0]), ""


def drawn(every: list[Mutant], seed: int) -> list[Mutant]:
    """All mutants in the order in which they are drawn: spread over modules and operators, else by chance.

    A group (module, operator) of n mutants comes in turn about as often as the root of n says.
    """
    groups = collections.defaultdict(list)
    for one in every:
        groups[one.module, one.operator].append(one)

    def chance(one: Mutant) -> float:
        return int(hashlib.sha256(f"{seed} {one.id}".encode()).hexdigest()[:12], 16) / 16**12

    turn = {
        one: (rank + chance(one)) / len(group) ** 0.5
        for group in groups.values()
        for rank, one in enumerate(sorted(group, key=chance))
    }
    return sorted(every, key=turn.__getitem__)


class Campaign:
    """The tree, its modules and their tests, and the results so far."""

    def __init__(self, root: Path, table: Path, out: Path):
        self.root, self.out = root, out
        settings = tomllib.loads(table.read_text())
        self.preload = settings.get("preload", [])
        self.suites = {module: one["tests"] for one in settings["suite"] for module in one["modules"]}
        self.sources = {module: (root / module).read_text() for module in self.suites}
        self.every = [one for module, source in self.sources.items() for one in mutants(module, source)]
        listed = settings.get("equivalent", [])
        self.equivalent = {tuple(one[x] for x in ("module", "where", "line", "becomes")): one["why"] for one in listed}
        self.stale = sorted(self.equivalent.keys() - {one.key for one in self.every})
        self.results: dict[str, dict] = {}
        if out.exists():
            for line in out.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line, if the run was killed while writing
                    self.results |= {(one := json.loads(line))["id"]: one}
            if (tree := self.results.pop("tree", None)) != self._tree():
                raise SystemExit(
                    f"{out} holds results of another tree or table ({tree}): remove it, or give another --out"
                )
        else:
            self._keep(self._tree())

    def run(self, number: int, seed: int, workers: int, only: list[str]) -> list[Mutant]:
        """Tries mutants until so many that are not equivalent have been tried. Returns those and the equivalent ones."""
        order = [one for one in drawn(self.every, seed) if not only or one.module in only]
        tried = [one for one in order if one.key not in self.equivalent][:number]
        todo = [one for one in tried if one.id not in self.results]
        equivalent = [one for one in order[: order.index(tried[-1]) + 1] if one.key in self.equivalent] if tried else []
        print(
            f"{len(self.every)} mutants, {len(tried)} drawn, {len(todo)} to try; {len(equivalent)} equivalent",
            flush=True,
        )
        for name in self.preload if todo else []:
            importlib.import_module(name)
        suites = list(dict.fromkeys(tuple(self.suites[one.module]) for one in todo))
        with tempfile.TemporaryDirectory() as folder:
            unmutated = [suite for suite in suites if _suite_id(suite) not in self.results]
            for suite, outcome in self._attempts([*unmutated], 1, Path(folder)):  # one at a time: they fill JAX's cache
                if outcome["outcome"] != "survived":
                    raise SystemExit(f"without a mutant {outcome['by'] or suite} fails:\n{outcome['log']}")
                self._keep({"id": _suite_id(suite), "seconds": outcome["seconds"]})
                print(f"unmutated: {outcome['seconds']:4.0f} s  {'; '.join(suite)}", flush=True)
            began = time.monotonic()
            for done, (one, outcome) in enumerate(self._attempts(todo, workers, Path(folder)), 1):
                del outcome["log"]
                self._keep(asdict(one) | {"id": one.id} | outcome)
                left = (time.monotonic() - began) / done * (len(todo) - done) / 60
                print(
                    f"{done}/{len(todo)} {outcome['outcome']:8} {outcome['seconds']:4.0f} s, {left:.0f} min left  "
                    f"{one.id} {one.module} {one.operator}: {one.becomes}  {outcome['by']}",
                    flush=True,
                )
        return [*tried, *equivalent]

    def report(self, tried: list[Mutant]) -> float:
        """Prints the score by module, and a diff for each survivor. Returns the score."""
        rows = collections.defaultdict(collections.Counter)
        for one in tried:
            outcome = "equivalent" if one.key in self.equivalent else self.results[one.id]["outcome"]
            rows[one.module][outcome] += 1
            rows["all"][outcome] += 1
            if outcome == "survived":
                print(f"\nsurvived: {one.id}\n{one.diff(self.sources[one.module])}")
        print(f"\n{'module':36} killed timeout survived equivalent  score")
        for module, counts in sorted(rows.items(), key=lambda row: (row[0] == "all", row[0])):
            killed = counts["killed"] + counts["timeout"]
            score = killed / max(killed + counts["survived"], 1)
            columns = [counts[name] for name in ("killed", "timeout", "survived", "equivalent")]
            print(f"{module:36} {columns[0]:6} {columns[1]:7} {columns[2]:8} {columns[3]:10} {score:6.1%}")
        for key in self.stale:
            print(f"listed as equivalent, but no mutant any more: {' | '.join(key)}")
        return score

    def _attempts(self, todo: list, workers: int, folder: Path) -> Iterator[tuple]:
        """Runs the tests of each mutant (of a suite: unmutated) in a forked process of its own, ``workers`` at a time."""
        free, running = [folder / str(index) for index in range(workers)], {}
        for copy in free:
            if not copy.exists():
                shutil.copytree(self.root, copy, ignore=IGNORED)
        todo = todo[::-1]
        try:
            while todo or running:
                while todo and free:
                    what, copy = todo.pop(), free.pop()
                    suite = self.suites[what.module] if isinstance(what, Mutant) else what
                    limit = 3600.0
                    if isinstance(what, Mutant):
                        limit = 60 + 4 * self.results[_suite_id(tuple(suite))]["seconds"]
                        (copy / what.module).write_text(what.applied(self.sources[what.module]))
                        os.utime(copy / what.module, (len(todo), len(todo)))  # a time of its own, for Python's cache
                    running[_fork(copy, suite, limit, fills=limit == 3600.0)] = what, copy, time.monotonic(), limit
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                for one, (_, _, start, limit) in running.items():
                    if time.monotonic() - start > 5 * limit:  # waits for something, since it does not use its time
                        os.killpg(one, signal.SIGKILL)
                if not pid:
                    time.sleep(0.02)
                    continue
                what, copy, *_ = running.pop(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # what it may have started
                if isinstance(what, Mutant):
                    shutil.copy2(self.root / what.module, copy / what.module)
                free.append(copy)
                log = copy.with_suffix(".log").read_text(errors="replace")
                blamed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
                ended = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
                outcome = "timeout" if ended else "killed" if status else "survived"
                yield what, {
                    "outcome": outcome, "by": blamed[0] if blamed else "", "log": log[-4000:],
                    "seconds": round(usage.ru_utime + usage.ru_stime, 1),
                }  # fmt: skip
        finally:
            for pid in running:
                os.killpg(pid, signal.SIGKILL)

    def _keep(self, result: dict) -> None:
        self.results[result["id"]] = result
        with self.out.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def _tree(self) -> dict:
        files = (path.relative_to(self.root) for path in self.root.rglob("*.py"))
        files = sorted(path for path in files if not str(path).startswith((".", "benchmarks")))
        content = repr([(str(path), (self.root / path).read_text()) for path in files]) + repr(self.suites)
        return {"id": "tree", "hash": hashlib.sha256(content.encode()).hexdigest()[:16]}


def _suite_id(suite: tuple[str, ...]) -> str:
    return hashlib.sha256(repr(suite).encode()).hexdigest()[:8]


def _fork(copy: Path, suite: list[str], limit: float, fills: bool) -> int:
    """Runs a suite in a copy of the tree, its stages in turn until one fails. Returns the process."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        log = os.open(copy.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        if not fills and "jax" in sys.modules:  # only read: a process that is ended leaves half a file
            sys.modules["jax"].config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        import hypothesis.internal.conjecture.engine as engine
        import pytest

        engine.MAX_SHRINKS = 0  # the first example that fails is enough
        always = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        for stage in suite:
            if code := pytest.main([*always, *shlex.split(stage)]):
                sys.stdout.flush()
                os._exit(int(code))
        os._exit(0)
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(1)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=200, help="how many to try, equivalent ones not counted")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other mutants")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--only", nargs="*", default=[], metavar="MODULE", help="these modules alone")
    parser.add_argument("--out", type=Path, default=Path("mutation.jsonl"), help="where results are kept")
    parser.add_argument(
        "--table", type=Path, default=Path(__file__).with_suffix(".toml"), help="the tests of each module"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree that is copied")
    parser.add_argument("--show", metavar="ID", help="print the diff of one mutant, and do nothing else")
    given = parser.parse_args()
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
