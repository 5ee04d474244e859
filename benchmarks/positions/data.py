"""Texts as tokens, and the rows that the models are trained on.

What a step reads is a function of the seed and the step alone, so that a run that was killed goes on as if it had not
been. Of the rows of a step

    one half     is text,
    one quarter  is text in which a passage of 16 to 96 tokens comes again and again, 0 to 96 other tokens in between,
    one quarter  is the same with random tokens in place of text, the passage of 4 to 64 tokens.

The other half is there for induction: small models learn to look for what followed a token earlier only if their texts
reward it often. No passage that is evaluated is among them.
"""

from pathlib import Path

import click
import numpy as np
from tokenizers import Tokenizer
from tokenizers.implementations import ByteLevelBPETokenizer

from corm_jax.errors import CormError


def books(folder: Path) -> list[Path]:
    """The texts of a folder."""
    found = sorted(folder.glob("*.txt"))
    if not found:
        raise CormError(f"{folder} has no file that ends in .txt: name a directory of texts")
    return found


def tokenizer_of(path: Path, files: list[Path], vocab: int) -> Tokenizer:
    """The tokenizer in ``path``, which is made of these texts if it does not exist: byte-level BPE."""
    if not path.exists():
        made = ByteLevelBPETokenizer()
        made.train([str(file) for file in files], vocab_size=vocab, min_frequency=2, show_progress=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(str(path))
    return Tokenizer.from_file(str(path))


def corpus(tokenizer: Tokenizer, files: list[Path]) -> list[np.ndarray]:
    """The ids of each text, int32."""
    return [np.array(tokenizer.encode(file.read_text("utf-8")).ids, np.int32) for file in files]


def batch(texts: list[np.ndarray], vocab: int, seed: int, step: int, rows: int, length: int) -> np.ndarray:
    """The rows of a step: int32 ``[rows, length]``."""
    rng = np.random.default_rng((seed, step))
    sizes = np.array([len(text) - length for text in texts], np.float64)

    def text(tokens: int) -> np.ndarray:
        chosen = texts[rng.choice(len(texts), p=sizes / sizes.sum())]
        start = rng.integers(len(chosen) - tokens)
        return chosen[start : start + tokens]

    def noise(tokens: int) -> np.ndarray:
        return rng.integers(vocab, size=tokens, dtype=np.int32)

    def again(draw, least: int, most: int) -> np.ndarray:
        most = min(most, length // 3)
        passage = draw(int(rng.integers(min(least, most), most + 1)))
        parts, gap = [passage], int(rng.integers(0, 97)) * int(rng.integers(2))
        while sum(map(len, parts)) < length:
            parts += [draw(gap), passage]
        return np.concatenate(parts)[:length]

    kinds = [lambda: text(length), lambda: again(text, 16, 96), lambda: text(length), lambda: again(noise, 4, 64)]
    return np.stack([kinds[(row + step) % 4]() for row in range(rows)])


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
