"""``corm calibrate``: makes a profile of a model, which has a window for each of its heads."""

from pathlib import Path

import click

from corm_jax.command import inputs
from corm_jax.command.options import model_options
from corm_jax.evaluation.texts import read_texts
from corm_jax.files import check_new, check_writable, deliver, make_directory
from corm_jax.model.decoder import windows_of
from corm_jax.runs import calibrate as calibration
from corm_jax.terminal import console
from corm_jax.terminal.console import COUNT, SEED, Real, naming
from corm_jax.terminal.tables import show


@click.command(cls=console.Command)
@model_options
@click.option(
    "--text",
    "paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="a UTF-8 file, or a directory of .txt files; repeat for more  [default: Python's language reference]",
)
@click.option("--tokens", type=COUNT, default=4096, show_default=True, help="tokens of each text to read")
@click.option("--target-live", "target", type=Real(1e-6, 1), required=True, help="the share of the keys that stays")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="the profile to write, for corm:profile=FILE"
)
@console.overwrite_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="of the tokens that are drawn from predictions")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="a directory for the measurements of each text, to go on after an interruption or with another target",
)
def calibrate(model, dtype, paths, tokens, target, out, overwrite, seed, work):
    """Find a window for each head, so that a given share of the keys stays and predictions lose as little as possible.

    The loss is measured while texts are read, and while the beginning of each is read a second time.
    """
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
    of_global = [row for row, window in zip(found.window, windows_of(network.config), strict=True) if window is None]
    whole = sum(window is None for row in of_global for window in row)
    kept = f"{found.made['live']:.3f} of the keys stay, {whole} heads keep all of theirs"
    show(f"{out}: {kept}. To use it: --policy corm:profile={out}")
