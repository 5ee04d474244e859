"""Texts to be scored: files, directories of files, or a data set of the Hugging Face hub; and stretches of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from corm_jax import inputs
from corm_jax.errors import CormError
from corm_jax.evaluation.suite import contents
from corm_jax.tokenizer import Tokenizer

CHARACTERS = 2**21
"""What is taken of a data set of the hub: no more than that are loaded."""


class Document(NamedTuple):
    """A stretch of a text; ``prompt`` is all of it."""

    id: str
    task: str
    prompt: list[int]


def stretches(tokenizer: Tokenizer, texts: dict[str, bytes], tokens: int, limit: int | None) -> list[Document]:
    """Each text cut into stretches of so many tokens, the first ``limit`` of each; what is left over is left out.

    Raises:
      CormError: for a text that is shorter, or stretches of a single token.
    """
    if tokens < 2:
        raise CormError(f"--tokens must be at least 2, not {tokens}: the first predicts, the second is predicted")
    found = []
    for name, content in texts.items():
        ids = tokenizer.encode(content.decode("utf-8"))
        starts = range(0, len(ids) - tokens + 1, tokens)
        if not starts:
            raise CormError(f"the text {name!r} has {len(ids):,} tokens, --tokens asks for {tokens:,}")
        found += [Document(f"{name}/{start}", name, ids[start : start + tokens]) for start in list(starts)[:limit]]
    return found


def read_texts(paths: Sequence[Path], datasets: Sequence[str]) -> dict[str, bytes]:
    """UTF-8 by name: files, the ``.txt`` files of directories, and data sets; Python's reference if there are none.

    Raises:
      CormError: for a file that cannot be read, a directory without texts, or two texts of the same name.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    if paths and not files:
        raise CormError(f"there is no .txt file in {paths[0]}")
    for file in files:
        inputs.read_text(file)
    found = contents(files) | {name: from_hub(name) for name in datasets}
    return found or {"pydoc_data.topics": inputs.reference_text().encode()}


def from_hub(name: str) -> bytes:
    """The ``text`` of a data set's rows, one after the other, up to `CHARACTERS`.

    Args:
      name: ``owner/name[:configuration[:split]]``, or a directory; of the split ``test`` if nobody says.

    Raises:
      CormError: for a data set that cannot be loaded, or has no column ``text``.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise CormError("--dataset needs the package datasets: pip install datasets") from None
    place, configuration, split = [*name.split(":"), "", ""][:3]
    parts, size = [], 0
    try:
        for row in load_dataset(place, configuration or None, split=split or "test", streaming=True):
            if not isinstance(row.get("text"), str):
                raise CormError(f"the data set {name!r} has no column 'text', but {', '.join(row)}")
            parts.append(row["text"] if row["text"].endswith("\n") else row["text"] + "\n")
            size += len(parts[-1])
            if size >= CHARACTERS:
                break
    except (OSError, ValueError) as error:
        raise CormError(f"cannot load the data set {name!r}: {error}") from None
    return "".join(parts)[:CHARACTERS].encode("utf-8")
