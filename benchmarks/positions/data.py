"""Texts as bytes, and the rows that the models are trained on.

What a step reads is a function of the seed and the step alone, so that a run that was killed goes on as if it had not
been. Of the rows of a step

    one half     is text,
    one quarter  is text in which a passage comes again and again, with or without other tokens in between,
    one quarter  is the same with 64 random tokens in place of text;

in the first stage all rows are of the last kind, with nothing in between. They are there for induction: small models
learn to look for what followed a token earlier only if their texts reward it often. The passage is an eighth to a half
of the row: among shorter ones, models learn to count what was there instead. No passage that is evaluated is among
them.
"""

from pathlib import Path

import click
import numpy as np

from corm_jax.errors import CormError

NOISE = (64, 128)
"""The bytes of rows without text, from this to below that: letters, and a few signs."""


def books(folder: Path) -> list[Path]:
    """The texts of a folder."""
    found = sorted(folder.glob("*.txt"))
    if not found:
        raise CormError(f"{folder} has no file that ends in .txt: name a directory of texts")
    return found


def corpus(files: list[Path]) -> list[np.ndarray]:
    """The bytes of each text, int32: a token is a byte."""
    return [np.frombuffer(file.read_bytes(), np.uint8).astype(np.int32) for file in files]


def batch(texts: list[np.ndarray], seed: int, step: int, rows: int, length: int, only: str = "") -> np.ndarray:
    """The rows of a step: int32 ``[rows, length]``; ``only="noise"`` for the first stage."""
    rng = np.random.default_rng((seed, step))
    sizes = np.array([len(text) - length for text in texts], np.float64)

    def text(tokens: int) -> np.ndarray:
        chosen = texts[rng.choice(len(texts), p=sizes / sizes.sum())]
        start = rng.integers(len(chosen) - tokens)
        return chosen[start : start + tokens]

    def noise(tokens: int) -> np.ndarray:
        return rng.integers(*NOISE, size=tokens, dtype=np.int32)

    def again(draw) -> np.ndarray:
        passage = draw(int(rng.integers(length // 8, length // 2 + 1)))
        parts, gap = [passage], int(rng.integers(length // 4)) * int(rng.integers(2)) * (only != "noise")
        while sum(map(len, parts)) < length:
            parts += [draw(gap), passage]
        return np.concatenate(parts)[:length]

    kinds = [lambda: text(length), lambda: again(text), lambda: text(length), lambda: again(noise)]
    return np.stack([kinds[3 if only == "noise" else (row + step) % 4]() for row in range(rows)])


def starts(seed: int, step: int, rows: int, length: int, context: int, only: str = "") -> np.ndarray:
    """The position at which each row of a step begins, int32 ``[rows]``: 0 in the first stage, then anywhere."""
    most = 0 if only == "noise" else context - length
    return np.random.default_rng((seed, step, 1)).integers(most + 1, size=rows, dtype=np.int32)


def passages(texts: list[np.ndarray], length: int, each: int) -> np.ndarray:
    """``each`` passages of every text, evenly spread over it: int32 ``[texts * each, length]``."""
    found = []
    for text in texts:
        if len(text) < length:
            raise CormError(f"a text of {len(text)} tokens is too short for passages of {length}: leave it out")
        starts = np.linspace(0, len(text) - length, each + 2).astype(int)[1:-1]
        found += [text[start : start + length] for start in starts]
    return np.stack(found)


def repeats(rows: np.ndarray, passage: int) -> np.ndarray:
    """The repeat test: the last ``passage`` tokens of each row become its first ones once more."""
    return np.concatenate([rows[:, :-passage], rows[:, :passage]], axis=1)


def folder_option(*names: str, help: str):
    """An option for a directory that exists."""
    kind = click.Path(exists=True, file_okay=False, path_type=Path)
    return click.option(*names, type=kind, required=True, help=help)
