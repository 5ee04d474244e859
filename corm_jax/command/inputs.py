"""What the commands read: texts and models, by the names that a user gives."""

import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from corm_jax.command import own_model
from corm_jax.command.options import DTYPES
from corm_jax.errors import CheckpointWarning, CormError
from corm_jax.evaluation.texts import read_text, reference_text
from corm_jax.model import checkpoint
from corm_jax.model.decoder import Decoder
from corm_jax.model.prompts import Text
from corm_jax.model.tokenizer import Tokenizer
from corm_jax.policies import profile_of
from corm_jax.terminal.console import progress_bar


def load(model: str, dtype: str) -> tuple[Decoder, Tokenizer]:
    """The model and the tokenizer that ``--model`` names: a checkpoint, or what a function of the user's own returns.

    While the weights are read, a bar shows how many tensors have been read.
    """
    if own_model.is_own(model):
        if dtype != DTYPES[0]:
            raise CormError(
                f"--dtype {dtype} is for checkpoints: {model} chooses the dtype by itself, so leave --dtype out"
            )
        return own_model.load(model)

    def bar(parameters):
        with progress_bar() as progress:
            yield from progress.track(parameters, description=f"reading the weights of {model}, tensor by tensor")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", CheckpointWarning)
            warnings.showwarning = lambda message, *_: print(f"corm: note: {message}", file=sys.stderr)
            return checkpoint.load(model, jnp.dtype(dtype), bar)
    except ModuleNotFoundError as error:
        raise CormError(f"{error.name} is not installed: pip install 'corm-jax[cli]'") from None


def check_profiles(specs: Sequence[str], model: str, network: Decoder) -> None:
    """Raises if a SPEC has a profile that is for another model."""
    for spec in specs:
        if profile := profile_of(spec):
            profile.check(model, network.config)


def encode(network: Decoder, tokenizer: Tokenizer, words: str, name: str, tokens: int) -> list[int]:
    """The first ``tokens`` token ids of a text, those included that the tokenizer puts before it.

    Errors call the text ``name``.

    Raises:
      CormError: as `corm_jax.model.prompts.Text.part`.
    """
    ids = Text(tokenizer, words, f"the text {name!r}").part(tokens)
    note_context(network, tokens)
    return ids


def note_context(network: Decoder, tokens: int) -> None:
    """Prints a note on standard error if the model was trained on fewer tokens."""
    if tokens > network.config.context:
        print(
            f"corm: note: {tokens:,} tokens go beyond the {network.config.context:,} that the model was trained on",
            file=sys.stderr,
        )


def text_from(path: Path | None) -> tuple[str, str]:
    """The text in a file, or without one `reference_text`, and the name of the text."""
    if path is None:
        return reference_text(), f"pydoc_data.topics {platform.python_version()}"
    return read_text(path), str(path)
