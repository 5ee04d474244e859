"""The command line: ``corm compare``, ``corm generate``, ``corm record``, ``corm policies``."""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from corm_jax import console, inputs, plots, recording
from corm_jax.cache import check_prompt, prompt_of, slots_for, usage
from corm_jax.errors import CormError
from corm_jax.evaluation import cli as evaluation
from corm_jax.evaluation.texts import read_texts
from corm_jax.files import check_writable, make_directory, write_json
from corm_jax.fitting import PASSES, fitted
from corm_jax.generation import stream
from corm_jax.model import Config
from corm_jax.perplexity import Reading, read
from corm_jax.plan import Plan
from corm_jax.policies import COMBINATORS, POLICIES, keys_of, lacks_window, on_budget, parse
from corm_jax.types import Capacity

try:
    import click
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"corm: {error.name} is not installed: pip install 'corm-jax[cli]'")

MIB = 2**20
DEFAULT_POLICIES = ("full", "corm:window=256,recent=256", "corm:window=64,recent=64")
STORED = ("float32", "float16", "bfloat16")


def main() -> NoReturn:
    """Runs the command line."""
    console.run(corm, "corm")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def corm():
    """Read and generate text through evicting key-value caches."""


_cache_options = console.options(
    click.option(
        "--capacity", metavar="SLOTS", help="slots a key-value head, or a plan  [default: all that could be needed]"
    ),
    click.option(
        "--layout",
        type=click.Choice(["rectangular", "pooled"]),
        default="rectangular",
        show_default=True,
        help="each head its own slots, or a pool for each layer",
    ),
    click.option("--chunk", type=int, default=1, show_default=True, help="tokens between evictions; 1 is exact"),
    click.option(
        "--overflow",
        type=click.Choice(["evict", "error"]),
        default="evict",
        show_default=True,
        help="without a free slot: the policy's lowest rank goes, or stop",
    ),
)
_text_options = console.options(
    click.option(
        "--text", type=click.Path(path_type=Path), help="a UTF-8 file  [default: Python's language reference]"
    ),
    click.option("--tokens", type=int, default=2048, show_default=True, help="how many to read"),
)


@corm.command()
@console.model_options
@_cache_options
@_text_options
@click.option("--policy", "specs", multiple=True, metavar="SPEC", help="name:key=value,...; repeat to compare")
@click.option("--budget", metavar="KEYS", help="hold all but full to so many keys a head, or to a share such as 0.25")
@click.option(
    "--prompt", type=int, help="how many of the tokens are the prompt, for policies that wait for its end; not scored"
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="write the result here")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="draw it into this PNG file")
def compare(model, dtype, capacity, layout, chunk, overflow, text, tokens, specs, budget, prompt, json_file, plot_file):
    """Read a text through each policy's cache: what forgetting costs, what it saves.

    Every token is predicted from what the cache still holds (teacher forcing). A SPEC is a name from `corm policies`
    with options, as in corm:window=64,recent=32. On a --budget, corm without a window gets the one with which it ends
    the text with as many keys, searched in passes of their own; with a window it is capped.
    """
    if tokens < 2:
        raise CormError(f"--tokens must be at least 2, not {tokens}: the first predicts, the second is predicted")
    specs = specs or DEFAULT_POLICIES
    keys = keys_of(budget, tokens) if budget else None
    sizes = Sizes.of(capacity, layout, chunk, specs, tokens)
    for spec in specs:
        policy = parse(on_budget(spec, keys) if keys and not lacks_window(spec) else spec)
        check_prompt(
            policy, slots_for(policy, sizes.of_spec(spec), tokens, chunk), prompt_of(policy, prompt, tokens - 1)
        )
    if json_file:
        check_writable(json_file)
    if plot_file:
        plots.check_picture(plot_file)
    words, name = inputs.text_from(text)
    network, tokenizer = inputs.load(model, dtype)
    sizes.check(model, network.config)
    inputs.check_profiles(specs, model, network)
    ids = inputs.encode(network, tokenizer, words, name, tokens)
    result = {
        "model": model,
        "text": name,
        "tokens": tokens,
        "prompt": prompt,
        "dtype": dtype,
        "device": _device(),
        "chunk": chunk,
        "layout": layout,
        "budget": keys,
        "rows": [],
    }
    if keys is None and capacity is None:
        console.note_budgets(specs)
    options = {"pooled": sizes.pooled, "chunk": chunk, "prompt": prompt, "overflow": overflow}
    for spec in dict.fromkeys(specs):
        held = "none"
        if keys:
            with console.progress_bar() as progress:
                task = progress.add_task(f"{spec}: window", total=PASSES, visible=lacks_window(spec))
                advance = partial(progress.update, task)
                spec, held = fitted(
                    spec, network, ids, keys, chunk=chunk, progress=lambda done, to=advance: to(completed=done)
                )
        reading = _read(spec, network, parse(spec), ids, capacity=sizes.of_spec(spec), **options)
        result["rows"].append(_row(spec, reading, prompt or 1, result["rows"]) | {"budget": held})
    result["peak_memory_bytes"] = _peak_memory()
    _print_table(result)
    if json_file:
        write_json(json_file, result)
    if plot_file:
        plots.compare(result, plot_file)


@corm.command()
@console.model_options
@_cache_options
@click.option("--prompt", help="the prompt's text")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="a UTF-8 file that holds it")
@click.option("--chat", is_flag=True, help="wrap it as a user's turn of a conversation")
@click.option("--policy", "spec", default=DEFAULT_POLICIES[1], show_default=True, metavar="SPEC")
@click.option("--max-new-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="draw from this much of the mass")
@click.option("--seed", type=int, default=0, show_default=True)
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
    words = inputs.read_text(prompt_file) if prompt is None else prompt
    if not words:
        raise CormError("the prompt is empty")
    sizes = Sizes.of(capacity, layout, chunk, [spec], None)
    slots_for(policy, sizes.of_spec(spec), 1, chunk)
    network, tokenizer = inputs.load(model, dtype)
    sizes.check(model, network.config)
    inputs.check_profiles([spec], model, network)
    ids = tokenizer.encode(tokenizer.chat(words) if chat else words)
    inputs.note_context(network, len(ids) + max_new_tokens)
    if capacity is None:
        console.note_budgets([spec])
    pieces = tokenizer.stream()
    for new in stream(
        network,
        policy,
        [ids],
        max_new_tokens=max_new_tokens,
        capacity=sizes.of_spec(spec),
        pooled=sizes.pooled,
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
    print(
        f"\n[cache: {float(final.live.mean()):.1f} of {int(final.seen[0])} keys live a head, "
        f"{final.bytes_live / MIB:.2f} MiB live, {final.bytes_allocated / MIB:.2f} MiB allocated, "
        f"{final.bytes_full / MIB:.2f} MiB full, overflow {int(final.overflow.sum())}]"
    )


@corm.command()
@console.model_options
@_text_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="the directory to make")
@click.option("--store", type=click.Choice(STORED), default="float32", show_default=True, help="round the values to it")
def record(model, dtype, text, tokens, out, store):
    """Record what every layer attends to with the full cache: a trace, to replay policies on.

    A trace holds the queries, keys and values of each layer. If the recording is interrupted, the same command goes on
    after the last layer that was complete.
    """
    from simulator.storage import Writer  # the one place where the two packages meet
    from simulator.trace import Meta

    if tokens < 1:
        raise CormError(f"--tokens must be at least 1, not {tokens}")
    if os.path.lexists(out):
        raise CormError(f"{out} exists already: choose another name or delete it")
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


@corm.command()
@console.model_options
@click.option(
    "--text",
    "paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="a UTF-8 file or a directory; repeatable",
)
@click.option("--tokens", type=int, default=4096, show_default=True, help="how many to read of each")
@click.option("--target-live", "target", type=float, required=True, help="the share of the keys that is to stay")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="the profile, for corm:profile=FILE")
@click.option("--seed", type=int, default=0, show_default=True, help="of what the model draws to find what is lost")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="keep here what was measured of each text, to go on after a kill, or with another target",
)
def calibrate(model, dtype, paths, tokens, target, out, seed, work):
    """Find a window for each head: what is lost on texts, and where they are read again, against the keys that stay."""
    from simulator import calibrate as calibration

    if not 0 < target <= 1:
        raise CormError(f"--target-live must be in (0, 1], not {target}")
    check_writable(out)
    if work:
        make_directory(work)
    texts = read_texts(paths, [])
    network, tokenizer = inputs.load(model, dtype)
    ids = {name: inputs.encode(network, tokenizer, words.decode(), name, tokens) for name, words in texts.items()}
    layers = network.config.layers
    with console.progress_bar() as progress:
        bars = {name: progress.add_task(name, total=layers + calibration.NODES + 1) for name in ids}
        found = calibration.calibrate(
            network, model, ids, target, seed=seed, work=work, progress=lambda name: progress.advance(bars[name])
        )
    found.save(out)
    whole = sum(window is None for layer in found.window for window in layer)
    print(f"{out}: {found.made['live']:.3f} live, {whole} heads whole. To use it: --policy corm:profile={out}")


@corm.command()
def policies():
    """List the policies with their options."""
    table = Table(box=None, pad_edge=False)
    for column in ("policy", "option", "default", "what it does"):
        table.add_column(column)
    for name, kind in POLICIES.items():
        looks = " and ".join(kind.needs) or "positions only"
        table.add_row(name, "", "", f"{str(kind.__doc__).splitlines()[0]} Needs: {looks}.", style="bold")
        for field in dataclasses.fields(kind):
            choices = field.metadata.get("choices")
            value = " | ".join(choices) if choices else str(field.default).lower()
            table.add_row("", field.name, value, field.metadata["help"])
    table.add_row("any of them", "", "", "unless it has an option of that name itself", style="bold")
    for name, meaning in COMBINATORS.items():
        table.add_row("", name, "none", meaning)
    console.output().print(table)


for command in (evaluation.evaluate, evaluation.report, evaluation.analyse):
    corm.add_command(command)


class Sizes(NamedTuple):
    """What ``--capacity`` and ``--layout`` ask for.

    Attributes:
      capacity: slots a head, of whatever policy; or None.
      plan: for the one policy that it is for; the others get what they could need.
      pooled: the layout.
    """

    capacity: int | None
    plan: Plan | None
    pooled: bool

    @classmethod
    def of(cls, capacity: str | None, layout: str, chunk: int, specs: Sequence[str], tokens: int | None) -> "Sizes":
        """Raises for what cannot be, or is of no use to any of the policies."""
        if capacity is None or capacity.lstrip("+-").isdecimal():
            return cls(None if capacity is None else int(capacity), None, layout == "pooled")
        plan = Plan.load(Path(capacity))
        if layout != "pooled":
            raise CormError(f"the plan {capacity} is for pools: add --layout pooled")
        if not any(plan.is_for(spec) for spec in specs):
            raise CormError(f"the plan {capacity} is for --policy {plan.policy}, which is not among those asked for")
        if plan.chunk != chunk:
            raise CormError(f"the plan {capacity} is for --chunk {plan.chunk}, not {chunk}: use that, or make another")
        if tokens and tokens > plan.tokens:
            note = f"the plan was made on {plan.tokens:,} tokens: {tokens:,} may overflow"
            print(f"corm: note: {note}", file=sys.stderr)
        return cls(None, plan, pooled=True)

    def of_spec(self, spec: str) -> Capacity | None:
        """The capacity for one policy."""
        return self.plan.capacity if self.plan and self.plan.is_for(spec) else self.capacity

    def check(self, model: str, config: Config) -> None:
        """Raises if there is a plan, and it is for another model."""
        if self.plan:
            self.plan.check(model, config)


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
    with console.progress_bar() as progress:
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
    rows = result["rows"]
    table = Table(
        title=f"{result['model']} reads {result['tokens']:,} tokens of {result['text']}", title_justify="left"
    )
    table.add_column("policy")
    if result["budget"]:
        table.add_column("budget")
    for column in (
        "NLL",
        "PPL",
        "Δ NLL",
        "kept",
        "kept\nmean",
        "live\nMiB",
        "alloc.\nMiB",
        "full\nMiB",
        "over-\nflow",
        "s",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["policy"],
            *([row["budget"]] if result["budget"] else []),
            f"{row['nll']:.4f}",
            f"{row['ppl']:.2f}",
            f"{row['delta_nll']:+.4f}",
            f"{row['kept_final']:.3f}",
            f"{row['kept_mean']:.3f}",
            *(f"{row[f'kv_bytes_{kind}'] / MIB:.1f}" for kind in ("live", "allocated", "full")),
            str(row["overflow"]),
            f"{row['seconds']:.1f}",
        )
    peaks = ", ".join(f"{peak / 2**30:.2f} GiB ({where})" for where, peak in result["peak_memory_bytes"].items())
    out, scored = console.output(), result["tokens"] - (result["prompt"] or 1)
    out.print(table)
    out.print(
        f"NLL: nats a token over {scored:,} predictions; Δ against the first row. kept: live / seen, "
        f"mean over layers and heads, at the end and over time. {result['dtype']}, chunks of {result['chunk']}, "
        f"{result['device']}, peak memory {peaks}."
    )
    if result["budget"]:
        out.print(
            f"budget: {result['budget']:,} keys a head; fixed, or a cap on a policy that decides by itself, or CORM's "
            "w = r, searched so that it ends with as many."
        )
