"""Texts: Python's own reference, files, directories of files, data sets of the hub; and stretches of them."""

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from corm_jax.errors import CormError
from corm_jax.model.prompts import Text
from corm_jax.model.tokenizer import Tokenizer

LARGEST = 2**28
"""The most bytes of a text file: about 70 million tokens."""

CHARACTERS = 2**21
"""The most characters of a data set of the hub. No more are loaded."""


class Document(NamedTuple):
    """A stretch of a text; ``prompt`` is all of it."""

    id: str
    task: str
    prompt: list[int]


def stretches(tokenizer: Tokenizer, texts: Mapping[str, str], tokens: int, limit: int | None) -> list[Document]:
    """Each text cut into stretches of ``tokens`` tokens, the first ``limit`` of each text; the remainder is left out.

    Each stretch is a `corm_jax.model.prompts.Text.part`: it begins with the tokens with which a text begins, and
    these count. The number in its id is that of its first token in the text.

    Raises:
      CormError: for a text that is shorter, or stretches of a single token.
    """
    if tokens < 2:
        raise CormError(f"--tokens must be at least 2, not {tokens}: the first predicts, the second is predicted")
    found = []
    for name, words in texts.items():
        text = Text(tokenizer, words, f"the text {name!r}")
        starts = text.starts(tokens) or [0]  # raises for a text that is too short
        found += [Document(f"{name}/{start}", name, text.part(tokens, start)) for start in starts[:limit]]
    return found


def read_texts(paths: Sequence[Path], datasets: Sequence[str]) -> dict[str, str]:
    """Texts by name: files, the ``.txt`` files of directories, and data sets; Python's reference if there are none.

    Raises:
      CormError: for a file that cannot be read, a directory without texts, or two texts of the same name.
    """
    found: dict[str, str] = {}
    for path in paths:
        for file in _files(path):
            _add(found, file.name, read_text(file))
    for name in datasets:
        _add(found, name, from_hub(name))
    return found or {"pydoc_data.topics": reference_text()}


def reference_text() -> str:
    """Python's own language reference, a text that is part of every Python."""
    return "\n\n".join(topics[topic] for topic in sorted(topics))


def read_text(path: Path) -> str:
    """The text in a file: its bytes as UTF-8, without a byte order mark at the beginning. Newlines stay as they are.

    Raises:
      CormError: for a file that cannot be read, is empty or too large, or holds something else than text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # a ValueError for an impossible name
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


def _files(path: Path) -> list[Path]:
    try:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    except OSError as error:  # such as a name that is too long
        raise CormError(f"cannot read {str(path)!r}: {error.strerror}") from None
    if not files:
        raise CormError(f"there is no .txt file in {str(path)!r}: name the files one by one, or another directory")
    return files


def _add(texts: dict[str, str], name: str, words: str) -> None:
    """Adds a text. Results are stored by its name, which must be printable and unique."""
    name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    if name in texts:
        raise CormError(f"two texts are called {name!r}: rename one, since results are stored by name")
    texts[name] = words


def from_hub(name: str) -> str:
    """The ``text`` of a data set's rows, one after the other, up to `CHARACTERS`.

    Args:
      name: ``owner/name[:configuration[:split]]``, or a directory; the default split is ``test``.

    Raises:
      CormError: for a data set that cannot be loaded, has no column ``text``, or nothing in it.
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
    if not "".join(parts).strip():
        raise CormError(f"the data set {name!r} has no text: give another, or another split")
    return "".join(parts)[:CHARACTERS]
