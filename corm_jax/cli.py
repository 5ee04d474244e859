"""The command line: ``corm compare``, ``corm generate``, ``corm policies``."""

import contextlib
import dataclasses
import json
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax import checkpoint, plots
from corm_jax.cache import usage
from corm_jax.errors import CormError
from corm_jax.files import check_writable, whole_file
from corm_jax.generation import slots_for, stream
from corm_jax.perplexity import Reading, read
from corm_jax.policies import POLICIES, parse

try:
    import click
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"corm: {error.name} is not installed: pip install 'corm-jax[cli]'")

MIB = 2**20
DEFAULT_POLICIES = ("full", "corm:window=256,recent=256", "corm:window=64,recent=64")
DTYPES = ("float32", "bfloat16")


def main() -> NoReturn:
    """Runs the command line. What the user can put right ends in one line and exit code 2."""
    try:
        sys.exit(corm(standalone_mode=False))
    except (CormError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        print(f"corm: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        print("corm: interrupted", file=sys.stderr)
        sys.exit(130)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def corm():
    """Read and generate text through evicting key-value caches."""


def _model_options(command):
    for option in reversed(
        [
            click.option("--model", default="smollm2-135m", show_default=True, help="name, directory, .gguf or hub id"),
            click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True),
            click.option("--capacity", type=int, help="slots a key-value head  [default: all that could be needed]"),
            click.option(
                "--chunk", type=int, default=1, show_default=True, help="tokens between evictions; 1 is exact"
            ),
            click.option(
                "--overflow",
                type=click.Choice(["evict", "error"]),
                default="evict",
                show_default=True,
                help="without a free slot: the policy's lowest rank goes, or stop",
            ),
        ]
    ):
        command = option(command)
    return command


@corm.command()
@_model_options
@click.option("--text", type=click.Path(path_type=Path), help="a UTF-8 file  [default: Python's language reference]")
@click.option("--tokens", type=int, default=2048, show_default=True, help="how many to read")
@click.option("--policy", "specs", multiple=True, metavar="SPEC", help="name:key=value,...; repeat to compare")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="write the result here")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="draw it into this PNG file")
def compare(model, dtype, capacity, chunk, overflow, text, tokens, specs, json_file, plot_file):
    """Read a text through each policy's cache: what forgetting costs, what it saves.

    Every token is predicted from what the cache still holds (teacher forcing). A SPEC is a name from `corm policies`
    with options, as in corm:window=64,recent=32.
    """
    if tokens < 2:
        raise CormError(f"--tokens must be at least 2, not {tokens}: the first predicts, the second is predicted")
    policies = {spec: parse(spec) for spec in specs or DEFAULT_POLICIES}
    for policy in policies.values():
        slots_for(policy, capacity, tokens, chunk)
    _check_output(json_file, plot=False)
    _check_output(plot_file, plot=True)
    words, name = _text(text)
    network, tokenizer = _load(model, dtype)
    ids = tokenizer.encode(words)
    if len(ids) < tokens:
        raise CormError(f"the text {name!r} has {len(ids)} tokens, {tokens} were asked for: give more text or --tokens")
    _note_context(network, tokens)
    result = {
        "model": model,
        "text": name,
        "tokens": tokens,
        "dtype": dtype,
        "device": _device(),
        "chunk": chunk,
        "rows": [],
    }
    for spec, policy in policies.items():
        reading = _read(spec, network, policy, ids[:tokens], capacity=capacity, chunk=chunk, overflow=overflow)
        result["rows"].append(_row(spec, reading, result["rows"]))
    result["peak_memory_bytes"] = _peak_memory()
    _print_table(result)
    if json_file:
        with whole_file(json_file) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if plot_file:
        plots.compare(result, plot_file)


@corm.command()
@_model_options
@click.option("--prompt", help="the prompt's text")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="a UTF-8 file that holds it")
@click.option("--chat", is_flag=True, help="wrap it as a user's turn of a conversation")
@click.option("--policy", "spec", default=DEFAULT_POLICIES[1], show_default=True, metavar="SPEC")
@click.option("--oneshot", is_flag=True, help="read the whole prompt before the first eviction")
@click.option("--max-new-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="draw from this much of the mass")
@click.option("--seed", type=int, default=0, show_default=True)
def generate(
    model,
    dtype,
    capacity,
    chunk,
    overflow,
    prompt,
    prompt_file,
    chat,
    spec,
    oneshot,
    max_new_tokens,
    temperature,
    top_p,
    seed,
):
    """Continue a prompt through an evicting cache; the last line says how full the cache is."""
    policy = parse(spec)
    if (prompt is None) == (prompt_file is None):
        raise CormError("give a prompt, either with --prompt or with --prompt-file")
    words = _read_text(prompt_file) if prompt is None else prompt
    if not words:
        raise CormError("the prompt is empty")
    network, tokenizer = _load(model, dtype)
    ids = tokenizer.encode(tokenizer.chat(words) if chat else words)
    _note_context(network, len(ids) + max_new_tokens)
    pieces = tokenizer.stream()
    for new in stream(
        network,
        policy,
        [ids],
        max_new_tokens=max_new_tokens,
        capacity=capacity,
        chunk=chunk,
        oneshot=oneshot,
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
def policies():
    """List the policies with their options."""
    table = Table(box=None, pad_edge=False)
    for column in ("policy", "option", "default", "what it does"):
        table.add_column(column)
    for name, kind in POLICIES.items():
        table.add_row(name, "", "", str(kind.__doc__).splitlines()[0], style="bold")
        for field in dataclasses.fields(kind):
            choices = field.metadata.get("choices")
            value = " | ".join(choices) if choices else str(field.default).lower()
            table.add_row("", field.name, value, field.metadata["help"])
    _console().print(table)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _load(model: str, dtype: str):
    def bar(parameters):
        with _progress() as progress:
            yield from progress.track(parameters, description=f"loading {model}")

    try:
        return checkpoint.load(model, jnp.dtype(dtype), bar)
    except ModuleNotFoundError as error:
        raise CormError(f"{error.name} is not installed: pip install 'corm-jax[cli]'") from None


def reference_text() -> str:
    """Python's own language reference, the text that every Python ships."""
    return "\n\n".join(topics[topic] for topic in sorted(topics))


def _note_context(network: Any, tokens: int) -> None:
    if tokens > network.config.context:
        print(
            f"corm: note: {tokens:,} tokens go beyond the {network.config.context:,} that the model was trained on",
            file=sys.stderr,
        )


def _text(path: Path | None) -> tuple[str, str]:
    if path is None:
        return reference_text(), f"pydoc_data.topics {platform.python_version()}"
    text = _read_text(path)
    if not text:
        raise CormError(f"the text {str(path)!r} is empty")
    return text, str(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CormError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CormError(f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _check_output(path: Path | None, plot: bool) -> None:
    if path is None:
        return
    check_writable(path)
    if plot and find_spec("matplotlib") is None:
        raise CormError("matplotlib is not installed: pip install 'corm-jax[plots]'")


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
    with _progress() as progress:
        task = progress.add_task(spec, total=len(arguments[-1]))
        return read(*arguments, **options, progress=lambda done: progress.update(task, completed=done))


def _row(spec: str, reading: Reading, rows: list[dict[str, Any]]) -> dict[str, Any]:
    nll = float(reading.nll.mean(dtype=np.float64))
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
    console = _console()
    console.print(table)
    console.print(
        f"NLL: nats a token over {result['tokens'] - 1:,} predictions; Δ against the first row. kept: live / seen, "
        f"mean over layers and heads, at the end and over time. {result['dtype']}, chunks of {result['chunk']}, "
        f"{result['device']}, peak memory {peaks}."
    )
