"""The command line: ``corm compare``, ``corm generate``, ``corm record``, ``corm policies``."""

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from corm_jax.command import console, plots
from corm_jax.command.console import COUNT, SEED, Budget, Real, Spec, Whole, naming
from corm_jax.command.limits import check_reading
from corm_jax.command.tables import Column, print_table, show
from corm_jax.core.arrays import ENDLESS
from corm_jax.core.cache import check_prompt, prompt_of, slots_for, usage
from corm_jax.core.policy import Policy
from corm_jax.core.types import Capacity
from corm_jax.errors import CormError
from corm_jax.evaluation import cli as evaluation
from corm_jax.evaluation.lock import only_writer
from corm_jax.evaluation.texts import read_texts
from corm_jax.files import check_new, check_writable, deliver, finish, make_directory, write_json
from corm_jax.model.generation import stream
from corm_jax.model.llama import Config, Llama
from corm_jax.model.prompts import Text, scored_from
from corm_jax.policies import COMBINATORS, POLICIES, keys_of, lacks_window, on_budget, parse
from corm_jax.runs import inputs, recording
from corm_jax.runs.fitting import PASSES, fitted
from corm_jax.runs.perplexity import Reading, read
from corm_jax.runs.plan import Plan

# isort: split
import click  # after the console, which says how to install it

MIB = 2**20
DEFAULT_POLICIES = ("full", "corm:window=256,recent=256", "corm:window=64,recent=64")
STORED = ("float32", "float16", "bfloat16")
COLDEST = 0.001
"""The lowest temperature but for 0: logits divided by less are no float32 numbers."""


def main() -> NoReturn:
    """Runs the command line."""
    console.run(corm, "corm")


@click.group(cls=console.Group, context_settings=console.SETTINGS)
@console.version_option
def corm():
    """Read and generate text through evicting key-value caches."""


class Slots(Whole):
    """What ``--capacity`` takes: a number, or the file of a plan."""

    name = "slots"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As for all types of click."""
        if isinstance(value, str) and not value.lstrip("+-").isdecimal():
            if os.path.lexists(value):
                return Path(value)
            self.fail(f"{value!r} is neither a number of slots nor the file of a plan", param, ctx)
        return super().convert(value, param, ctx)


_cache_options = console.options(
    click.option(
        "--capacity",
        type=Slots(1),
        metavar="SLOTS",
        help="slots a key-value head, or a plan  [default: all that could be needed]",
    ),
    click.option(
        "--layout",
        type=click.Choice(["rectangular", "pooled"]),
        default="rectangular",
        show_default=True,
        help="each head its own slots, or a pool for each layer",
    ),
    click.option("--chunk", type=COUNT, default=1, show_default=True, help="tokens between evictions; 1 is exact"),
    click.option(
        "--overflow",
        type=click.Choice(["evict", "error"]),
        default="evict",
        show_default=True,
        help="without a free slot: the key that the policy scores lowest is evicted, or stop",
    ),
)
_text_option = click.option(
    "--text", type=click.Path(path_type=Path), help="a UTF-8 file  [default: Python's language reference]"
)


@corm.command()
@console.model_options
@_cache_options
@_text_option
@click.option("--tokens", type=Whole(2), default=2048, show_default=True, help="how many to read")
@click.option(
    "--policy", "specs", type=Spec(), multiple=True, metavar="SPEC", help="name:key=value,...; repeat to compare"
)
@click.option(
    "--budget",
    type=Budget(),
    metavar="KEYS",
    help="hold all but full to so many keys a head, or to a share such as 0.25",
)
@click.option(
    "--prompt", type=COUNT, help="how many of the tokens are the prompt, for policies that wait for its end; not scored"
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="write the result here")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="draw it into this PNG file")
@console.overwrite_option
def compare(
    model,
    dtype,
    capacity,
    layout,
    chunk,
    overflow,
    text,
    tokens,
    specs,
    budget,
    prompt,
    json_file,
    plot_file,
    overwrite,
):
    """Read a text through each policy's cache: what forgetting costs, what it saves.

    Every token is predicted from what the cache still holds (teacher forcing). A SPEC is a name from `corm policies`
    with options, as in corm:window=64,recent=32. On a --budget, corm without a window gets the one with which it ends
    the text with as many keys, searched in passes of their own; with a window it is capped.
    """
    specs = list(dict.fromkeys(specs or DEFAULT_POLICIES))
    keys = None if budget is None else keys_of(budget, tokens)
    sizes = Sizes.of(capacity, layout, chunk, specs, tokens)
    if chunk > tokens:
        raise CormError(f"--chunk {chunk} is more than --tokens {tokens}: choose at most as many")
    searched = [spec for spec in specs if keys and lacks_window(spec)]
    if searched and keys and keys > tokens:
        raise CormError(f"--budget {budget} is more than --tokens {tokens}: {searched[0]} keeps at most all of them")
    policies = {}
    for spec in specs:
        with naming({"--policy": spec, "--budget": budget}):
            policies[spec] = parse(on_budget(spec, keys) if keys and spec not in searched else spec)
        console.check_prompt(spec, policies[spec], prompt, tokens - 1)
        with naming({"--policy": spec, "--capacity": capacity}):
            slots = slots_for(policies[spec], sizes.of_spec(spec), tokens, chunk)
            check_prompt(policies[spec], slots, prompt_of(policies[spec], prompt, tokens - 1))
    check_new({"--json": json_file, "--plot": plot_file}, overwrite)
    if plot_file:
        plots.check_matplotlib()
    words, name = inputs.text_from(text)
    network, tokenizer = inputs.load(model, dtype)
    sizes.check(model, network.config)
    inputs.check_profiles(specs, model, network)
    for spec, policy in policies.items():
        sizes.check_memory(network, spec, policy, tokens, chunk, "--tokens")
    ids = inputs.encode(network, tokenizer, words, name, tokens)
    first = scored_from(tokenizer, prompt)
    result = {
        "model": model,
        "text": name,
        "tokens": tokens,
        "prompt": prompt,
        "scored": tokens - first,
        "dtype": dtype,
        "device": _device(),
        "chunk": chunk,
        "layout": layout,
        "budget": keys,
        "rows": [],
    }
    if keys is None and capacity is None:
        console.note_budgets(specs)
    options = {"stores": sizes.stores, "chunk": chunk, "prompt": prompt, "overflow": overflow}
    for spec in specs:
        held = "none"
        if keys:
            with console.progress_bar() as progress:
                task = progress.add_task(f"{spec}: window", total=PASSES, visible=lacks_window(spec))
                advance = partial(progress.update, task)
                spec, held = fitted(
                    spec, network, ids, keys, chunk=chunk, progress=lambda done, to=advance: to(completed=done)
                )
        reading = _read(spec, network, parse(spec), ids, capacity=sizes.of_spec(spec), **options)
        result["rows"].append(_row(spec, reading, first, result["rows"]) | {"budget": held})
    result["peak_memory_bytes"] = _peak_memory()
    steps = [partial(_print_table, result)]
    if plot_file:
        steps.insert(0, partial(deliver, plot_file, partial(plots.compare, result), overwrite))
    if json_file:
        steps.insert(0, partial(deliver, json_file, lambda path: write_json(path, result), overwrite))
    finish(*steps)


@corm.command()
@console.model_options
@_cache_options
@click.option("--prompt", help="the prompt's text")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="a UTF-8 file that holds it")
@click.option("--chat", is_flag=True, help="wrap it as a user's turn of a conversation")
@click.option("--policy", "spec", type=Spec(), default=DEFAULT_POLICIES[1], show_default=True, metavar="SPEC")
@click.option("--max-new-tokens", type=COUNT, default=128, show_default=True)
@click.option("--temperature", type=Real(0, 1e6), default=0.0, show_default=True, help="0 takes the likeliest token")
@click.option("--top-p", type=Real(1e-6, 1), default=1.0, show_default=True, help="draw from this much of the mass")
@click.option("--seed", type=SEED, default=0, show_default=True)
def generate(
    model,
    dtype,
    capacity,
    layout,
    chunk,
    overflow,
    prompt,
    prompt_file,
    chat,
    spec,
    max_new_tokens,
    temperature,
    top_p,
    seed,
):
    """Continue a prompt through an evicting cache; the last line says how full the cache is."""
    policy = parse(spec)
    if (prompt is None) == (prompt_file is None):
        raise CormError("give a prompt, either with --prompt or with --prompt-file")
    if 0 < temperature < COLDEST:
        raise CormError(
            f"--temperature must be 0 or at least {COLDEST}, not {temperature}: 0 takes the likeliest token"
        )
    words = inputs.read_text(prompt_file) if prompt is None else prompt
    if not words:
        raise CormError("the prompt is empty")
    sizes = Sizes.of(capacity, layout, chunk, [spec], None)
    about = {"--policy": spec, "--capacity": capacity}
    with naming(about):
        slots_for(policy, sizes.of_spec(spec), 1, chunk)
    network, tokenizer = inputs.load(model, dtype)
    sizes.check(model, network.config)
    inputs.check_profiles([spec], model, network)
    ids = tokenizer.chat(words) if chat else Text(tokenizer, words, "the prompt").whole
    chunk = min(chunk, max(len(ids), 1))  # more would be the same, and take more memory
    sizes.check_memory(network, spec, policy, len(ids) + max_new_tokens, chunk, "--max-new-tokens")
    inputs.note_context(network, len(ids) + max_new_tokens)
    if capacity is None:
        console.note_budgets([spec])
    pieces, final = tokenizer.stream(), None
    with naming(about):
        for new in stream(
            network,
            policy,
            [ids],
            max_new_tokens=max_new_tokens,
            capacity=sizes.of_spec(spec),
            stores=sizes.stores,
            chunk=chunk,
            overflow=overflow,
            end=tokenizer.end,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        ):
            for piece in pieces.push(new.tokens[0]):
                print(piece, end="", flush=True)
            final = usage(new.caches)  # before the next stretch takes the caches over
    if final:
        print(
            f"\n[cache: {float(final.live.mean()):.1f} of {int(final.seen[0])} keys live a head, "
            f"{final.bytes_live / MIB:.2f} MiB live, {final.bytes_allocated / MIB:.2f} MiB allocated, "
            f"{final.bytes_full / MIB:.2f} MiB full, overflow {int(final.overflow.sum())}]"
        )


@corm.command()
@console.model_options
@_text_option
@click.option("--tokens", type=COUNT, default=2048, show_default=True, help="how many to read")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="the directory to make")
@click.option("--store", type=click.Choice(STORED), default="float32", show_default=True, help="round the values to it")
def record(model, dtype, text, tokens, out, store):
    """Record what every layer attends to with the full cache: a trace, to replay policies on.

    A trace holds the queries, keys and values of each layer. If the recording is interrupted, the same command goes on
    after the last layer that was complete.
    """
    from simulator.storage import Writer  # the one place where the two packages meet
    from simulator.trace import Meta

    if os.path.lexists(out):
        raise CormError(f"--out {out} exists already: choose another name or delete it")
    with naming({"--out": out}):
        check_writable(out)
    words, name = inputs.text_from(text)
    network, tokenizer = inputs.load(model, dtype)
    ids = inputs.encode(network, tokenizer, words, name, tokens)
    config = network.config
    meta = Meta(
        kind="qkv",
        layers=config.layers,
        steps=tokens,
        q_heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        # What differs must not go on from the other.
        model=model if dtype == console.DTYPES[0] else f"{model} ({dtype})",
        dtype=store,
        tokens=tuple(ids),
        pieces=tuple(tokenizer.pieces(ids)),
    )
    lock = out.with_name(f".{out.name}.lock")
    with only_writer(lock, str(out), "choose another --out"):
        _check_room(out, config, tokens, store)
        with Writer(out, meta) as writer, console.progress_bar() as progress:
            if writer.done:
                print(f"corm: note: {writer.done} of {config.layers} layers are there already", file=sys.stderr)
            task = progress.add_task(f"{config.layers} layers", total=config.layers * tokens)
            state = writer.folder / "hidden.safetensors"
            layers = recording.resume(
                network, ids, state, writer.done, progress=lambda done: progress.update(task, completed=done)
            )
            for one in layers:
                writer.write(q=one.q, k=one.k, v=one.v)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {config.layers} layers of {tokens:,} tokens, {size / MIB:.1f} MiB. To replay a policy on it:")
    print(f"python -m simulator replay {shlex.quote(str(out))} --policy {DEFAULT_POLICIES[1]}")


def _check_room(out: Path, config: Config, tokens: int, store: str) -> None:
    """Raises unless the disk has room for a trace, less what is there of it already."""
    size = 2 if store != "float32" else 4
    numbers = config.layers * config.head_dim * (config.heads + 2 * config.kv_heads)
    need = tokens * (size * numbers + 2 * 4 * config.dim)  # the hidden states are there twice while they are replaced
    part = out.with_name(f".{out.name}.part")
    there = sum(file.stat().st_size for file in part.iterdir()) if part.is_dir() else 0
    free = shutil.disk_usage(out.parent).free + there
    if need > free:
        raise CormError(
            f"--out {out} takes {need / MIB:,.0f} MiB, {free / MIB:,.0f} are free: make room, or lower --tokens"
        )


@corm.command()
@console.model_options
@click.option(
    "--text",
    "paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="a UTF-8 file or a directory; repeatable",
)
@click.option("--tokens", type=COUNT, default=4096, show_default=True, help="how many to read of each")
@click.option(
    "--target-live", "target", type=Real(1e-6, 1), required=True, help="the share of the keys that is to stay"
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="the profile, for corm:profile=FILE")
@console.overwrite_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="of what the model draws to find what is lost")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="keep here what was measured of each text, to go on after a kill, or with another target",
)
def calibrate(model, dtype, paths, tokens, target, out, overwrite, seed, work):
    """Find a window for each head: what is lost on texts, and where they are read again, against the keys that stay."""
    from simulator import calibrate as calibration

    check_new({"--out": out}, overwrite)
    if work:
        with naming({"--work": work}):
            make_directory(work)
            check_writable(work / "measured")
    texts = read_texts(paths, [])
    network, tokenizer = inputs.load(model, dtype)
    ids = {name: inputs.encode(network, tokenizer, words, name, tokens) for name, words in texts.items()}
    layers = network.config.layers
    with console.progress_bar() as progress:
        bars = {name: progress.add_task(name, total=layers + calibration.NODES + 1) for name in ids}
        found = calibration.calibrate(
            network,
            model,
            ids,
            target,
            begin=len(tokenizer.begin),
            seed=seed,
            work=work,
            progress=lambda name: progress.advance(bars[name]),
        )
    deliver(out, found.save, overwrite)
    whole = sum(window is None for layer in found.window for window in layer)
    show(f"{out}: {found.made['live']:.3f} live, {whole} heads whole. To use it: --policy corm:profile={out}")


@corm.command()
def policies():
    """List the policies with their options."""
    rows = []
    for name, kind in POLICIES.items():
        looks = " and ".join(kind.needs) or "positions only"
        rows.append((name, "", "", f"{str(kind.__doc__).splitlines()[0]} Needs: {looks}."))
        for field in dataclasses.fields(kind):
            choices = field.metadata.get("choices")
            value = " | ".join(choices) if choices else str(field.default).lower()
            rows.append(("", field.name, value, field.metadata["help"]))
    rows.append(("any of them", "", "", "unless it has an option of that name itself"))
    rows += [("", name, "none", meaning) for name, meaning in COMBINATORS.items()]
    print_table([Column(name) for name in ("policy", "option", "default", "what it does")], rows)


for command in (evaluation.evaluate, evaluation.report, evaluation.analyse):
    corm.add_command(command)


class Sizes(NamedTuple):
    """What ``--capacity`` and ``--layout`` ask for.

    Attributes:
      capacity: slots a head, of whatever policy; or None.
      plan: for the one policy that it is for; the others get what they could need.
      stores: 1 for pools, None for rectangles.
    """

    capacity: int | None
    plan: Plan | None
    stores: int | None

    @classmethod
    def of(
        cls, capacity: int | Path | None, layout: str, chunk: int, specs: Sequence[str], tokens: int | None
    ) -> "Sizes":
        """Raises for what cannot be, or is of no use to any of the policies."""
        if not isinstance(capacity, Path):
            return cls(capacity, None, 1 if layout == "pooled" else None)
        with naming({"--capacity": capacity}):
            plan = Plan.load(capacity)
        if layout != "pooled":
            raise CormError(f"the plan {capacity} is for pools: add --layout pooled")
        if not any(plan.is_for(spec) for spec in specs):
            raise CormError(f"the plan {capacity} is for --policy {plan.policy}, which is not among those asked for")
        if plan.chunk != chunk:
            raise CormError(f"the plan {capacity} is for --chunk {plan.chunk}, not {chunk}: use that, or make another")
        if tokens and tokens > plan.tokens:
            note = f"the plan was made on {plan.tokens:,} tokens: {tokens:,} may overflow"
            print(f"corm: note: {note}", file=sys.stderr)
        return cls(None, plan, stores=1)

    def of_spec(self, spec: str) -> Capacity | None:
        """The capacity for one policy."""
        return self.plan.capacity if self.plan and self.plan.is_for(spec) else self.capacity

    def check(self, model: str, config: Config) -> None:
        """Raises if there is a plan, and it is for another model."""
        if self.plan:
            self.plan.check(model, config)

    def check_memory(self, network: Llama, spec: str, policy: Policy, tokens: int, chunk: int, option: str) -> None:
        """Raises unless the caches for so many tokens, which ``option`` says, can fit into memory."""
        if tokens > ENDLESS:
            raise CormError(f"{tokens:,} tokens are beyond {ENDLESS:,}, where the clock ends: lower {option}")
        capacity = slots_for(policy, self.of_spec(spec), tokens, chunk)
        fewer = f"lower {option}" if self.of_spec(spec) is None else "lower --capacity"
        with naming({"--policy": spec, "--capacity": self.capacity}):
            check_reading(network, policy, capacity, chunk, stores=self.stores, fewer=fewer)


def _device() -> str:
    device = jax.devices()[0]
    return f"{device.platform}: {device.device_kind}"


def _peak_memory() -> dict[str, int]:
    """Peak bytes: of the process, where the system says, and of the accelerator, where there is one."""
    peaks = {}
    with contextlib.suppress(ModuleNotFoundError):  # not on Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks["process"] = peak if sys.platform == "darwin" else peak * 1024
    if statistics := jax.devices()[0].memory_stats():
        peaks["device"] = statistics["peak_bytes_in_use"]
    return peaks


def _read(spec: str, *arguments, **options) -> Reading:
    with naming({"--policy": spec}), console.progress_bar() as progress:
        task = progress.add_task(spec, total=len(arguments[-1]))
        return read(*arguments, **options, progress=lambda done: progress.update(task, completed=done))


def _row(spec: str, reading: Reading, scored_from: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    nll = float(reading.nll[scored_from - 1 :].mean(dtype=np.float64))
    return {
        "policy": spec,
        "nll": nll,
        "ppl": float(np.exp(nll)),
        "delta_nll": nll - (rows[0]["nll"] if rows else nll),
        "kept_final": float(reading.kept[-1]),
        "kept_mean": float(reading.kept.mean()),
        "kv_bytes_full": reading.usage.bytes_full,
        "kv_bytes_live": reading.usage.bytes_live,
        "kv_bytes_allocated": reading.usage.bytes_allocated,
        "overflow": int(reading.usage.overflow.sum()),
        "seconds": reading.seconds,
        "kept_per_layer": reading.kept_per_layer.tolist(),
    }


def _print_table(result: dict[str, Any]) -> None:
    budget = result["budget"]
    columns = [Column("policy"), *([Column("budget")] if budget else [])]
    headings = "NLL", "PPL", "Δ NLL", "kept", "kept\nmean", "live\nMiB", "alloc.\nMiB", "full\nMiB", "over-\nflow", "s"
    columns += [Column(heading, number=True) for heading in headings]
    rows = [
        (
            row["policy"],
            *([row["budget"]] if budget else []),
            f"{row['nll']:.4f}",
            f"{row['ppl']:.2f}",
            f"{row['delta_nll']:+.4f}",
            f"{row['kept_final']:.3f}",
            f"{row['kept_mean']:.3f}",
            *(f"{row[f'kv_bytes_{kind}'] / MIB:.1f}" for kind in ("live", "allocated", "full")),
            str(row["overflow"]),
            f"{row['seconds']:.1f}",
        )
        for row in result["rows"]
    ]
    peaks = ", ".join(f"{peak / 2**30:.2f} GiB ({where})" for where, peak in result["peak_memory_bytes"].items())
    notes = [
        f"NLL: nats a token over {result['scored']:,} predictions; Δ against the first row. kept: live / seen, "
        f"mean over layers and heads, at the end and over time. {result['dtype']}, chunks of {result['chunk']}, "
        f"{result['device']}, peak memory {peaks}."
    ]
    if budget:
        notes.append(
            f"budget: {budget:,} keys a head; fixed, or a cap on a policy that decides by itself, or CORM's "
            "w = r, searched so that it ends with as many."
        )
    print_table(
        columns, rows, title=f"{result['model']} reads {result['tokens']:,} tokens of {result['text']}", notes=notes
    )
