"""Options that several commands share."""

from pathlib import Path

import click

from corm_jax.model.named import DEFAULT, MODELS
from corm_jax.terminal import console

DTYPES = ("float32", "bfloat16")

DEFAULT_POLICY = "corm:window=256,recent=256"

model_options = console.options(
    click.option(
        "--model",
        default=DEFAULT,
        show_default=True,
        help=f"{' or '.join(MODELS)}, a directory, .gguf file, hub id, or module:function of your own, which is "
        "imported and called",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="float32",
        show_default=True,
        help="of the weights, the activations and the caches",
    ),
)

text_option = click.option(
    "--text", type=click.Path(path_type=Path), help="the UTF-8 file to read  [default: Python's language reference]"
)

texts_options = console.options(
    click.option(
        "--text",
        "paths",
        type=click.Path(path_type=Path),
        multiple=True,
        help="a UTF-8 file, or a directory of .txt files; repeat for more  [default: Python's language reference]",
    ),
    click.option("--dataset", "datasets", multiple=True, metavar="NAME[:CONFIG[:SPLIT]]", help="texts from the hub"),
)
