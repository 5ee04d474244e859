"""The simulator's command line, ``python -m simulator``: replay, sweep, bounds, check, plot, plan, soak."""

import math
import os
import reprlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from corm_jax.core.capacity import slots_for
from corm_jax.core.policy import Policy
from corm_jax.errors import CormError
from corm_jax.files import check_new, deliver, finish, write_json
from corm_jax.policies import Notation, default_spec, parse
from corm_jax.showing.drawing import saving
from corm_jax.terminal import console
from corm_jax.terminal.console import COUNT, SEED, Real, Spec, Whole, naming
from corm_jax.terminal.limits import check_matplotlib, check_memory
from corm_jax.terminal.stopping import Stopped
from corm_jax.terminal.tables import Column, print_table, show
from corm_jax.traces.trace import Trace
from simulator import oracle, planner, plots
from simulator.replay import FIDELITIES, Replay, replay, sweep
from simulator.report import print_replays, print_rows, summary
from simulator.specification import MISSING, specified
from simulator.verify import STAGES, verify

# isort: split
import click  # after the console, which says how to install it

DEFAULT = f"  [default: {default_spec(2048)}, or windows of an eighth of a shorter text]"
"""The default of ``--policy`` in the help."""

CHECKED = 512
"""Tokens that ``check`` reads by default."""

DIFFERENCES = 20
"""The most differences that ``soak`` prints."""

PICTURES = ("live", "kept", "survival", "cost")
"""What ``plot`` draws, by the names of the files."""


class Job(NamedTuple):
    """What the commands share: which part of which trace, and how to replay it.

    Attributes:
      trace: the part of the trace.
      layers: the indices of its layers in the whole trace.
      options: ``fidelity``, ``capacity``, ``chunk`` and ``prompt``.
      about: the fields of the report that say what was replayed, and how.
      json_file: where the report is written, or None.
      overwrite: whether files that exist are replaced.
      program: the name of the command line in messages.
    """

    trace: Trace
    layers: list[int]
    options: dict[str, Any]
    about: dict[str, Any]
    json_file: Path | None
    overwrite: bool
    program: str = "simulator"

    @property
    def model(self) -> str:
        """The name of the model in one line."""
        return " ".join(self.trace.meta.model.split()) or "a trace"

    @property
    def title(self) -> str:
        """The part of the trace, and the slots, in words."""
        part, local = f"{len(self.layers)} layers", len(self.trace.meta.local)
        if len(self.layers) == 1:
            part = f"layer {self.layers[0]}{', which is local' * local}"
        elif local:
            part += f", {local} of them local" + " and in no mean" * (local < len(self.layers))
        slots = f", {self.options['capacity']} slots a head" if self.options["capacity"] else ""
        return f"{self.model}, {self.trace.meta.steps:,} tokens, {part}{slots}"

    def policies(self, specs: Sequence[str]) -> dict[str, Policy]:
        """The policy of each SPEC, or of the default. Raises for one that cannot work with the options."""
        steps, options = self.trace.meta.steps, self.options
        policies = {spec: parse(spec) for spec in specs or [default_spec(steps)]}
        if options["capacity"] is None:
            console.note_budgets(specs, self.program)
        console.note_small_budgets(specs, steps, options["prompt"], self.program)
        for spec, policy in policies.items():
            with naming({"--policy": spec, "--capacity": options["capacity"]}):
                slots_for(policy, options["capacity"], steps, options["chunk"])
            console.check_prompt(spec, policy, options["prompt"], steps)
        return policies

    def replay(self, spec: str, policy: Policy, errors: bool) -> tuple[Replay, dict[str, Any]]:
        """A replay and its row in the report."""
        begin = time.perf_counter()
        with naming({"--policy": spec}), bar(spec, len(self.layers)) as progress:
            result = replay(self.trace, policy, **self.options, errors=errors, progress=progress)
        seconds = time.perf_counter() - begin
        return result, {"policy": spec, **summary(result), "seconds": seconds}

    def finish(self, results: dict[str, Any], *steps: Callable[[], object]) -> None:
        """Writes the report, if ``--json`` is given, and takes the other steps, even if it cannot be written."""
        if path := self.json_file:
            steps = (
                lambda: deliver(path, lambda place: write_json(place, self.about | results), self.overwrite),
                *steps,
            )
        finish(*steps)

    def draw(self, path: Path | None, picture: Callable[..., object], *arguments: Any) -> Callable[[], object]:
        """The step that draws a picture into a file. Without a path it does nothing."""
        return lambda: path and deliver(path, saving(picture, *arguments), self.overwrite)


def main() -> NoReturn:
    """Runs the command line."""
    console.run(simulator, "simulator", "python -m simulator")


@click.group(cls=console.Group, context_settings=console.SETTINGS)
@console.version_option
def simulator():
    """Replay cache policies on a TRACE, a directory that `corm record` made.

    A SPEC names a policy: a name from `corm policies` with options, as in corm:window=64,recent=32, or a class of your
    own, as in my_policies:Recent:budget=64. The module of such a class is imported, also from the current directory.
    """


def _command(name: str, sample: bool = False):
    """Makes a function a command on a trace. In place of the options that all commands share, it gets a `Job`.

    Args:
      name: the name of the command.
      sample: whether the command reads only some layers and tokens by default, and has no ``--fidelity``.
    """

    def decorate(function):
        @wraps(function)
        def run(path, layers, tokens, capacity, chunk, prompt, json_file, overwrite, fidelity=FIDELITIES[0], **own):
            check_new({"--json": json_file, "--plot": own.get("plot_file")}, overwrite)
            if own.get("plot_file"):
                check_matplotlib()
            trace, chosen = _part(path, layers, tokens, sample)
            meta = trace.meta
            options = {"fidelity": fidelity, "capacity": capacity, "chunk": chunk, "prompt": prompt}
            about = {"trace": str(path), "model": meta.model, "kind": meta.kind, "tokens": meta.steps}
            about |= {
                "layers": chosen,
                "local": [chosen[index] for index in meta.local],
                "q_heads": meta.q_heads,
                "kv_heads": meta.kv_heads,
                **options,
            }
            return function(Job(trace, chosen, options, about, json_file, overwrite), **own)

        for option in (fidelity_option, *_shared) if not sample else _shared:
            run = option(run)
        return simulator.command(name)(run)

    return decorate


def _part(path: Path, layers: str | None, tokens: int | None, sample: bool) -> tuple[Trace, list[int]]:
    """The part of a trace that the options name, and the indices of its layers."""
    trace = Trace.open(path)
    count, steps = trace.meta.layers, trace.meta.steps
    chosen = sorted({0, count // 2, count - 1}) if sample else list(range(count))
    chosen = layers_of(layers) or chosen
    if tokens is None and sample:
        tokens = min(steps, CHECKED)
    with naming({"--layers": layers, "--tokens": tokens}):
        return trace.part(layers=chosen, steps=tokens), chosen


def layers_of(text: str | None) -> list[int] | None:
    """The numbers in ``--layers``, or None without that option.

    Raises:
      CormError: for anything but numbers from 0.
    """
    if text is None:
        return None
    if not all(part.strip().isdecimal() and len(part) < 10 for part in text.split(",")):
        how = "numbers from 0 with commas between them, as in 0,15,29"
        raise CormError(f"--layers must be {how}, not {reprlib.repr(text)}")
    return [int(part) for part in text.split(",")]


_file = click.Path(path_type=Path)
replay_options = console.options(
    click.option("--chunk", type=COUNT, default=1, show_default=True, help="tokens between evictions"),
    click.option("--capacity", type=COUNT, help="slots of each key-value head  [default: as many as are needed]"),
    click.option("--prompt", type=COUNT, help="how many of the tokens are the prompt  [default: unknown]"),
)
_shared = (
    click.option("--json", "json_file", type=_file, help="write the result here"),
    console.overwrite_option,
    replay_options,
    click.option("--tokens", type=COUNT, help=f"how many tokens to read  [default: all; check: {CHECKED}]"),
    click.option(
        "--layers", metavar="N,N,...", help="layers to read, from 0  [default: all; check: first, middle and last]"
    ),
    click.argument("path", metavar="TRACE", type=_file),
)
fidelity_option = click.option(
    "--fidelity",
    type=click.Choice(FIDELITIES),
    default=FIDELITIES[0],
    show_default=True,
    help="attention to the live keys: made to sum to 1 again, or left as it was recorded",
)
_policy = partial(click.option, "--policy", type=Spec(), metavar="SPEC", show_default=True)
_one_policy = _policy("spec", help=f"name:option=value,...{DEFAULT}")
policies_option = _policy("specs", multiple=True, help=f"name:option=value,...; repeat to compare{DEFAULT}")
_plot_file = click.option("--plot", "plot_file", type=_file, help="draw the result into this PNG file")


@_command("replay")
@policies_option
@click.option("--no-errors", is_flag=True, help="leave out the errors of the outputs, which saves a third of the time")
def _replay(job: Job, specs, no_errors):
    """Show what each policy keeps of a trace, and what its evictions cost."""
    rows = [job.replay(spec, policy, not no_errors)[1] for spec, policy in job.policies(specs).items()]
    job.finish({"rows": rows}, lambda: print_replays(job.title, job.options, rows))


@_command("sweep")
@_policy("spec", default="corm", help="the policy, with the options that are the same at all points")
@click.option(
    "--grid", "items", required=True, multiple=True, metavar="OPTION=VALUE,...", help="repeat for more options"
)
@_plot_file
def _sweep(job: Job, spec, items, plot_file):
    """Replay a grid of a policy's options, all points at once."""
    texts = _grid(items)
    if plot_file and len(texts) != 2:
        raise CormError(f"--plot draws grids of two options, not of {len(texts)}: give two, or leave out --plot")

    def policy(**point: str) -> Policy:
        return parse(str(Notation.read(spec).having(**point)))

    grid = {name: [_plain(text) for text in values] for name, values in texts.items()}
    meta, points = job.trace.meta, math.prod(map(len, grid.values()))
    numbers = points * meta.steps * meta.layers * (2 * meta.kv_heads + meta.q_heads)
    check_memory(4 * numbers, f"--grid: the results of {points:,} points", "give fewer")
    with naming({"--policy": spec}), bar(spec, len(job.layers)) as progress:
        result = sweep(job.trace, policy, texts, **job.options, progress=progress)
    rows = []
    for index in np.ndindex(*map(len, grid.values())):
        point = {name: values[i] for (name, values), i in zip(grid.items(), index, strict=True)}
        rows.append(point | summary(result.point(*index)))
    panels = {"keys live at the end": "kept_final", "attention that fell on live keys": "mass"}
    shape = [*map(len, grid.values())]
    values = {name: np.array([row[key] for row in rows]).reshape(shape) for name, key in panels.items()}
    title, columns = f"{spec} on {job.title}", [*grid, "kept_final", "mass", "regretted", "overflow"]
    job.finish(
        {"policy": spec, "grid": grid, "rows": rows},
        job.draw(plot_file, plots.sweep, grid, values, title),
        lambda: print_rows(title, job.options, columns, rows),
    )


@_command("bounds")
@policies_option
@click.option("--exact", is_flag=True, help=f"compute the optimum, too: slow, for up to {oracle.EXACT_STEPS} tokens")
@_plot_file
def _bounds(job: Job, specs, exact, plot_file):
    """Compare policies with the most attention that any policy could have kept with as many keys."""
    if exact and job.trace.meta.steps > oracle.EXACT_STEPS:
        raise CormError(f"--exact takes at most {oracle.EXACT_STEPS} tokens, not {job.trace.meta.steps}: use --tokens")
    found, rows = {}, []
    for spec, policy in job.policies(specs).items():
        result, row = job.replay(spec, policy, errors=False)
        with bar(f"{spec}: bounds", len(job.layers)) as progress:
            found[spec] = oracle.bounds(job.trace, result, progress)
        heads = {name: getattr(found[spec], name).mean(-1) for name in ("policy", "greedy", "most", "regret")}
        heads["mass"] = heads.pop("policy")
        if exact:
            with bar(f"{spec}: optimum", len(job.layers)) as progress:
                heads["exact"] = _exact(job.trace, result, progress)
        own = result.global_layers
        means = {name: float(values[own].mean(dtype=np.float64)) for name, values in heads.items()}
        per_head = {name: values.tolist() for name, values in heads.items()}
        rows.append({"policy": spec, "kept_mean": row["kept_mean"], **means, "per_head": per_head})
    columns = ["policy", "kept_mean", "mass", "greedy", *(["exact"] if exact else []), "most", "regret"]
    job.finish(
        {"rows": rows},
        job.draw(plot_file, plots.regret, found, job.layers, job.title),
        lambda: print_rows(job.title, job.options, columns, rows),
    )


@_command("check", sample=True)
@_one_policy
def _check(job: Job, spec) -> int:
    """Check a policy on a trace: replay, cache and specification must keep the same keys. If not, exit code 1."""
    ((spec, policy),) = job.policies([spec] if spec else []).items()
    options = {name: job.options[name] for name in ("chunk", "capacity", "prompt")}
    if options["capacity"]:
        options["capacity"] = min(options["capacity"], job.trace.meta.steps)  # with as many, nothing overflows
    with naming({"--policy": spec}), bar(f"checking {spec}", STAGES * len(job.layers)) as progress:
        findings = verify(job.trace, policy, **options, progress=progress)
    rows = [{"name": finding.name, "held": finding.held, "detail": finding.detail} for finding in findings]
    if not specified(policy):
        rows.insert(0, {"name": "specification", "held": False, "detail": f"there is none: {MISSING}"})
    title = f"{spec} on {job.title}"
    job.finish({"policy": spec, "rows": rows}, lambda: print_rows(title, job.options, ["name", "held", "detail"], rows))
    return 0 if all(row["held"] for row in rows) else 1


@_command("plot")
@_one_policy
@click.option("--out", required=True, metavar="PLACE", help="a directory, or the beginning of the names of the files")
@click.option("--layer", type=Whole(0), help="layer of the survival map  [default: that of the median head]")
@click.option("--head", type=Whole(0), help="its key-value head  [default: the one that keeps a median share]")
@click.option("--from", "start", type=Whole(0), help="its first token  [default: where fates differ most]")
def _plot(job: Job, spec, out, layer, head, start):
    """Draw what a policy keeps of a trace, for how long, and what that costs."""
    place, meta = Path(out), job.trace.meta
    folder = place.is_dir() or out.endswith(("/", os.sep))
    files = {
        name: place / f"{name}.png" if folder else place.with_name(f"{place.name}-{name}.png") for name in PICTURES
    }
    check_new({f"--out, {name}:": file for name, file in files.items()}, job.overwrite)
    check_matplotlib()
    heads = [(i, h) for i in range(meta.layers) for h in range(meta.kv_heads)]
    heads = [(i, h) for i, h in heads if layer in (None, job.layers[i]) and head in (None, h)]
    if not heads:
        layers = ", ".join(map(str, job.layers))
        raise CormError(f"--layer must be one of {layers}, and --head one from 0 to {meta.kv_heads - 1}")
    if start is not None and not 0 <= start < meta.steps:
        raise CormError(f"--from must be from 0 to {meta.steps - 1}, not {start}")
    ((spec, policy),) = job.policies([spec] if spec else []).items()
    result, row = job.replay(spec, policy, errors=True)
    title = f"{spec} on {job.title}"
    index, head = sorted(heads, key=lambda where: result.live[(*where, -1)])[len(heads) // 2]
    start = plots.busiest(plots.fates(result, index, head)) if start is None else start
    pieces = meta.pieces or tuple(map(str, meta.positions or ()))
    which = f"{spec} on {job.model}: layer {job.layers[index]}, head {head}, tokens from {start:,} on"
    job.finish(
        {"rows": [row], "survival": {"layer": job.layers[index], "head": head, "from": start}},
        job.draw(files["live"], plots.live, result, job.layers, title),
        job.draw(files["kept"], plots.kept, result, job.layers, title),
        job.draw(files["survival"], plots.survival, result, index, head, start, pieces, which),
        job.draw(files["cost"], plots.cost, result, job.layers, title),
        lambda: print_replays(job.title, job.options, [row]),
        lambda: show("\n".join(map(str, files.values()))),
    )


@simulator.command("plan")
@click.argument("paths", metavar="TRACE...", nargs=-1, required=True, type=_file)
@_policy("spec", help=f"name:option=value,...{DEFAULT}")
@click.option("--chunk", type=COUNT, default=1, show_default=True, help="tokens between evictions")
@click.option("--overflow", type=Real(0, 0.999), default=0.001, show_default=True, help="share of keys without a slot")
@click.option(
    "--spare", type=Real(0, 100), default=0.05, show_default=True, help="share of slots to add, for other texts"
)
@click.option("--tokens", type=COUNT, help="how many tokens to read  [default: all]")
@click.option("--out", type=_file, required=True, help="the plan to write; --capacity reads it")
@console.overwrite_option
def _plan(paths, spec, chunk, overflow, spare, tokens, out, overwrite):
    """Size the pools of --layout pooled so that few keys of each TRACE are evicted for lack of a slot."""
    check_new({"--out": out}, overwrite)
    traces = []
    for path in paths:
        trace = Trace.open(path)
        with naming({"--tokens": tokens}):
            traces.append(trace.part(steps=tokens))
    shortest = min(trace.meta.steps for trace in traces)
    spec = spec or default_spec(shortest)
    if chunk > shortest:
        raise CormError(f"--chunk {chunk} is more than the {shortest} tokens that are read: choose at most as many")
    with naming({"--policy": spec}), bar(spec, sum(trace.meta.layers for trace in traces)) as progress:
        made = planner.plan(traces, spec, chunk=chunk, overflow=overflow, spare=spare, progress=progress)
    deliver(out, made.save, overwrite)
    slots, most = np.array(made.capacity), int(np.argmax(made.capacity))
    show(
        f"{out}: {slots.mean():.1f} slots a head for {made.tokens:,} tokens, {slots.mean() / made.tokens:.3f} of the "
        f"full cache; from {slots.min():,} in layer {int(slots.argmin())} to {slots[most]:,} in layer {most}"
    )


def _grid(items: Sequence[str]) -> dict[str, list[str]]:
    grid = {}
    for item in items:
        name, _, values = (part.strip() for part in item.partition("="))
        texts = [text.strip() for text in values.split(",") if text.strip()]
        if not name or not texts:
            raise CormError(f"--grid must be an option and its values, as in window=64,128, not {item!r}")
        if name in grid:
            raise CormError(f"--grid has {name!r} twice: give all its values at once")
        grid[name] = texts
    return grid


def _plain(text: str) -> int | float | bool | str:
    """The number or the truth value that a text spells; if there is none, the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _exact(trace: Trace, result: Replay, progress: Callable[[int], None]) -> np.ndarray:
    """The largest mass without return, the mean over the steps: ``[layers, kv_heads]``."""
    n = result.attended
    optimum = np.empty(n.shape[:2])
    for layer in range(len(optimum)):
        for head, alpha in enumerate(oracle.attention(trace, layer)):
            optimum[layer, head] = oracle.exact(alpha, n[layer, head]) / result.steps
        progress(layer + 1)
    return optimum


@contextmanager
def bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows progress on standard error. The block gets a function, and calls it with the amount that is done."""
    with console.progress_bar() as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.update(task, completed=done)


@simulator.command("soak")
@click.option(
    "--decisions", type=Real(1, math.inf), default=1e6, show_default=True, help="stop after this many decisions"
)
@click.option("--cases", type=COUNT, help="stop after this many cases instead")
@click.option("--seed", type=SEED, default=0, show_default=True, help="seed of all that is random")
@click.option("--start", type=Whole(0), default=0, show_default=True, help="number of the first case")
@click.option("--json", "json_file", type=_file, help="write the result here")
@console.overwrite_option
def _soak(decisions, cases, seed, start, json_file, overwrite) -> int:
    """Compare random policies on random histories with the specification. If a decision differs, exit code 1."""
    from simulator import soak

    check_new({"--json": json_file}, overwrite)
    tallies, seen, stopped, begin = [], Counter(), None, time.perf_counter()
    with console.progress_bar() as progress:
        task = progress.add_task("", total=cases or (decisions if np.isfinite(decisions) else None))
        try:
            for tally in soak.soak(seed, start, cases):
                tallies.append(tally)
                seen.update({"decisions": tally.decisions, "cases": tally.cases + tally.left_out})
                done = seen["decisions" if cases is None else "cases"]
                progress.update(task, completed=done, description=f"case {tally.index:,}: {tally.policy}")
                if cases is None and done >= decisions:
                    break
        except (Stopped, KeyboardInterrupt) as signal:  # the summary is printed all the same
            stopped = signal
    following, rows = tallies[-1].index if tallies else start, soak.summary(tallies)
    if rows:
        columns = [Column(" ".join(name.split("_")), number=name != "policy") for name in rows[0]]
        cells = [[value if isinstance(value, str) else f"{value:,}" for value in row.values()] for row in rows]
        title = f"seed {seed}, cases {start:,} to {following - 1:,}, {time.perf_counter() - begin:.0f} s"
        print_table(columns, cells, title=title)
    differences = [line for tally in tallies for line in tally.differences]
    for line in differences[:DIFFERENCES]:
        print(f"{line}; to repeat it: --seed {seed} --start {line.split()[1].rstrip(',')} --cases 1")
    if len(differences) > DIFFERENCES:
        print(f"and {len(differences) - DIFFERENCES:,} more")
    print(f"to go on: --seed {seed} --start {following}")
    if json_file:
        report = {"seed": seed, "start": start, "next": following, "rows": rows, "differences": differences}
        deliver(json_file, lambda path: write_json(path, report), overwrite)
    if stopped:
        raise stopped
    return 1 if differences else 0
