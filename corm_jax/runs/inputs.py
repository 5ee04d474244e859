"""What the commands read: texts and models, by the names that a user gives."""

import codecs
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import jax.numpy as jnp

from corm_jax.command.console import progress_bar
from corm_jax.errors import CheckpointWarning, CormError
from corm_jax.model import checkpoint
from corm_jax.model.llama import Llama
from corm_jax.model.prompts import Text
from corm_jax.model.tokenizer import Tokenizer
from corm_jax.policies import profile_of

LARGEST = 2**28
"""Bytes of a text file: about 70 million tokens."""


def load(model: str, dtype: str) -> tuple[Llama, Tokenizer]:
    """`checkpoint.load` with a bar."""

    def bar(parameters):
        with progress_bar() as progress:
            yield from progress.track(parameters, description=f"loading {model}")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", CheckpointWarning)
            warnings.showwarning = lambda message, *_: print(f"corm: note: {message}", file=sys.stderr)
            return checkpoint.load(model, jnp.dtype(dtype), bar)
    except ModuleNotFoundError as error:
        raise CormError(f"{error.name} is not installed: pip install 'corm-jax[cli]'") from None


def check_profiles(specs: Sequence[str], model: str, network: Llama) -> None:
    """Raises if a SPEC has a profile, and it is for another model."""
    for spec in specs:
        if profile := profile_of(spec):
            profile.check(model, network.config)


def reference_text() -> str:
    """Python's own language reference, the text that every Python ships."""
    return "\n\n".join(topics[topic] for topic in sorted(topics))


def encode(network: Llama, tokenizer: Tokenizer, words: str, name: str, tokens: int) -> list[int]:
    """The first ``tokens`` token ids of a text that is called ``name``, with what the tokenizer puts first.

    Raises:
      CormError: as `corm_jax.model.prompts.Text.part`.
    """
    ids = Text(tokenizer, words, f"the text {name!r}").part(tokens)
    note_context(network, tokens)
    return ids


def note_context(network: Llama, tokens: int) -> None:
    """Says so if the model was not trained on as many tokens."""
    if tokens > network.config.context:
        print(
            f"corm: note: {tokens:,} tokens go beyond the {network.config.context:,} that the model was trained on",
            file=sys.stderr,
        )


def text_from(path: Path | None) -> tuple[str, str]:
    """A text to read, by default `reference_text`, and its name."""
    if path is None:
        return reference_text(), f"pydoc_data.topics {platform.python_version()}"
    return read_text(path), str(path)


def read_text(path: Path) -> str:
    """The text in a file: its bytes as UTF-8, without a byte order mark at the beginning. Newlines stay as they are.

    Raises:
      CormError: for a file that cannot be read, is empty or too large, or holds something else than text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # a ValueError for a name that cannot be one
        raise CormError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > LARGEST:
        raise CormError(f"{str(path)!r} has more than {LARGEST // 2**20} MiB: give a part of it")
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        where = len(content) - len(error.object) + error.start
        raise CormError(
            f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {where}: convert it to UTF-8"
        ) from None
    if not text:
        raise CormError(f"{str(path)!r} is empty: give some text")
    if "\0" in text:
        where = content.index(b"\0")
        raise CormError(f"{str(path)!r} is not UTF-8 text: it has a NUL at byte {where}: convert it to UTF-8")
    return text
