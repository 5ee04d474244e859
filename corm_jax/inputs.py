"""What the commands read: texts and models, by the names that a user gives."""

import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import jax.numpy as jnp

from corm_jax import checkpoint
from corm_jax.console import progress_bar
from corm_jax.errors import CheckpointWarning, CormError
from corm_jax.model import Llama
from corm_jax.policies import profile_of
from corm_jax.tokenizer import Tokenizer


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
    """The first ``tokens`` token ids of a text that is called ``name`` where it is too short."""
    ids = tokenizer.encode(words)
    if len(ids) < tokens:
        raise CormError(f"the text {name!r} has {len(ids)} tokens, {tokens} were asked for: give more text or --tokens")
    note_context(network, tokens)
    return ids[:tokens]


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
    text = read_text(path)
    if not text:
        raise CormError(f"the text {str(path)!r} is empty")
    return text, str(path)


def read_text(path: Path) -> str:
    """What a UTF-8 file holds."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CormError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CormError(f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from None
