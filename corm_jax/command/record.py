"""``corm record``: records as a trace what every layer of a model attends to."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import click

from corm_jax.command import inputs
from corm_jax.command.options import DTYPES, model_options, text_option
from corm_jax.errors import CormError
from corm_jax.evaluation.lock import only_writer
from corm_jax.files import check_writable
from corm_jax.model.decoder import Decoder, hidden
from corm_jax.policies import default_spec
from corm_jax.runs import recording
from corm_jax.runs.forms import written
from corm_jax.terminal import console
from corm_jax.terminal.console import COUNT, naming
from corm_jax.terminal.tables import mib
from corm_jax.traces.meta import Meta
from corm_jax.traces.storage import Writer

MIB = 2**20
STORED = ("float32", "float16", "bfloat16")


@click.command(cls=console.Command)
@model_options
@text_option
@click.option("--tokens", type=COUNT, default=2048, show_default=True, help="tokens of the text to read")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="the directory to write")
@click.option(
    "--store",
    type=click.Choice(STORED),
    default="float32",
    show_default=True,
    help="the dtype of the numbers in the trace",
)
def record(model, dtype, text, tokens, out, store):
    """Record what every layer attends to with the full cache: a trace, to replay policies on.

    A trace holds the queries, keys and values of each layer. If the recording is interrupted, the same command goes on
    after the last layer that was complete.
    """
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
        **written(network, tokens)._asdict(),
        # With the dtype, so that a recording does not go on after layers of another dtype.
        model=model if dtype == DTYPES[0] else f"{model} ({dtype})",
        dtype=store,
        tokens=tuple(ids),
        pieces=tuple(tokenizer.pieces(ids)),
    )
    lock = out.with_name(f".{out.name}.lock")
    with only_writer(lock, str(out), "choose another --out"):
        _check_room(out, network, tokens, store)
        with Writer(out, meta) as writer, console.progress_bar() as progress:
            if writer.done:
                print(f"corm: note: {writer.done} of {config.layers} layers were recorded before", file=sys.stderr)
            task = progress.add_task(f"{config.layers} layers", total=config.layers * tokens)
            state = writer.folder / "hidden.safetensors"
            layers = recording.resume(
                network, ids, state, writer.done, progress=lambda done: progress.update(task, completed=done)
            )
            for one in layers:
                writer.write(q=one.q, k=one.k, v=one.v)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(
        f"{out}: {config.layers} layers of {tokens:,} tokens, {mib(size)} MiB. To replay a policy on it, or to see it:"
    )
    for command in ("python -m simulator replay", "corm view"):
        print(f"{command} {shlex.quote(str(out))} --policy {default_spec(tokens)}")


def _check_room(out: Path, network: Decoder, tokens: int, store: str) -> None:
    """Raises unless the disk has room for those layers of a trace that are not recorded yet."""
    config, dim = network.config, hidden(network).shape[-1]
    size = 2 if store != "float32" else 4
    numbers = config.layers * config.head_dim * (config.heads + 2 * config.kv_heads)
    # While the file of hidden states is replaced, there are two of them.
    need = tokens * (size * numbers + 2 * 4 * dim)
    part = out.with_name(f".{out.name}.part")
    there = sum(file.stat().st_size for file in part.iterdir()) if part.is_dir() else 0
    free = shutil.disk_usage(out.parent).free + there
    if need > free:
        raise CormError(
            f"--out {out} takes {need / MIB:,.0f} MiB, but {free / MIB:,.0f} MiB are free: make room, or lower --tokens"
        )
