"""``corm analyse``: measures on which properties of attention CORM relies, and how far they hold."""

from pathlib import Path

import click
import numpy as np
from rich.markup import escape

from corm_jax.command import inputs
from corm_jax.command.options import model_options, texts_options
from corm_jax.evaluation import analysis, plots
from corm_jax.evaluation.intervals import bootstrap
from corm_jax.evaluation.texts import read_texts
from corm_jax.files import check_new, deliver, finish, write_json
from corm_jax.showing.drawing import saving
from corm_jax.terminal import console
from corm_jax.terminal.console import Whole
from corm_jax.terminal.limits import check_matplotlib
from corm_jax.terminal.tables import Column, print_table


@click.command("analyse")
@model_options
@texts_options
@click.option(
    "--tokens", type=Whole(analysis.SHORTEST), default=2048, show_default=True, help="tokens of each text to read"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="analysis.json",
    show_default=True,
    help="the JSON file to write; a picture of the same name, with .png, is written beside it",
)
@console.overwrite_option
def analyse(model, dtype, paths, datasets, tokens, out, overwrite):
    """Measure the properties of attention on which CORM relies.

    They are: attention is sparse, queries that are close together are similar, and recent queries show which keys the
    next queries find important. Intervals are over texts; for one text there are none. Local layers are left out.
    """
    check_new({"--out": out}, overwrite)
    picture = out.with_suffix(".png")
    check_new({"--out": out, "the picture of --out": picture}, overwrite)
    check_matplotlib()
    texts = read_texts(paths, datasets)
    network, tokenizer = inputs.load(model, dtype)
    ids = {name: inputs.encode(network, tokenizer, words, name, tokens) for name, words in texts.items()}
    layers, every = network.config.layers, []
    with console.progress_bar() as progress:
        for name, read_ids in ids.items():
            task = progress.add_task(escape(f"{name}, {layers} layers"), total=layers * tokens)
            every.append(
                analysis.analyse(network, read_ids, lambda done, task=task: progress.update(task, completed=done))
            )
    result, rows = {"model": model, "tokens": tokens, "texts": dict(zip(ids, every, strict=True))}, []

    def row(what, name, *place):
        values = np.array([found[name] for found in every])  # [texts, layers, ...]
        values = values[(slice(None), slice(None), *place)].reshape(*values.shape[:2], -1).mean(-1)
        by_layer = values.mean(0)
        rows.append((what, str(bootstrap(values.mean(1))), f"{by_layer.min():.3f}", f"{by_layer.max():.3f}"))

    axes = every[0]
    row("keys with attention below 1/t", "sparsity")
    for index, distance in enumerate(axes["distances"]):
        row(f"cosine of queries {distance} tokens apart", "similarity", index)
    for index, window in enumerate(axes["windows"]):
        row(f"important keys that were important to one of the last {window} queries", "coverage", index)
    for index, window in enumerate(axes["windows"]):
        row(f"kept with w = {window}, r = {axes['recents'][-1]}", "kept", index, -1)
    for index, bits in enumerate(axes["bits"]):
        row(f"error of the cosine estimated from {bits} signs", "lsh_error", index)
    title, notes = f"{model} reads {tokens:,} tokens of {', '.join(ids)}", [f"{out}, {picture}"]
    if local := layers - len(axes["layers"]):
        notes.insert(0, f"{local} of {layers} layers are local, and left out.")
    headings = "mean over layers\nand texts [95%]", "lowest\nlayer", "highest\nlayer"
    finish(
        lambda: deliver(out, lambda path: write_json(path, result), overwrite),
        lambda: deliver(picture, saving(plots.analysis, analysis.mean(every), title), overwrite),
        lambda: print_table(
            [Column("what"), *(Column(heading, number=True) for heading in headings)],
            rows,
            title=title,
            notes=notes,
        ),
    )
