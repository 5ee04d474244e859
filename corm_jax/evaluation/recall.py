"""Tasks about a fact that was read long before. They are made here, in any length, from a seed and a text.

- ``passkey``: a number among copies of four dull sentences (Mohtashami and Jaggi, arXiv 2305.16300).
- ``needle``: a number of a city in the middle of real text, at a given depth (Kamradt's needle in a haystack).
- ``pairs``: the value of one of many random keys (Liu et al., arXiv 2307.03172).
- ``multikey``: one of many needles of the same form (RULER, arXiv 2404.06654), the others spread over the text.
- ``repeat``: a passage, other text, then the passage again, of which the second reading is scored. It needs no skill
  at answering, since there is no question.

A prompt begins once with the tokens that the tokenizer puts before a text. It has about ``length`` tokens, these
included: exactly as many for ``needle`` and ``multikey``, and for ``repeat`` together with the answer.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from corm_jax.errors import CormError
from corm_jax.model.prompts import Text, inside
from corm_jax.model.tokenizer import Tokenizer

DULL = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Quebec", "Havana", "Perth", "Cairo", "Riga", "Dakar", "Seoul")

SHORTEST = 256
LARGEST = 2**26
"""The most tokens of all prompts together: half a gigabyte of numbers."""


class Task(NamedTuple):
    """A prompt that ends where the answer begins.

    Attributes:
      id: unique in a run.
      prompt, gold: token ids.
      others: answers that would be right for another question about the same prompt.
    """

    id: str
    task: str
    length: int
    depth: float
    prompt: list[int]
    gold: list[int]
    others: list[list[int]]


class Hidden(NamedTuple):
    """Token ids inside a text: the context that hides the answer, the question, its answer, and other answers."""

    context: list[int]
    question: list[int]
    gold: list[int]
    others: list[list[int]]


class Haystack:
    """The text in which answers are hidden, cut at the ends of tokens.

    Attributes:
      begin: the ids with which a prompt begins.
    """

    def __init__(self, tokenizer: Tokenizer, words: str):
        self.tokenizer, text = tokenizer, Text(tokenizer, words, "the text")
        self.begin, self.ids = text.begin, text.ids

    def cut(self, tokens: int, rng: np.random.Generator) -> list[int]:
        """A random stretch of this many tokens.

        Raises:
          CormError: for a text that is too short, or fewer than one token.
        """
        if tokens < 1:
            raise CormError("the hidden words take more tokens than the prompt may have: ask for longer prompts")
        if len(self.ids) < tokens:
            raise CormError(f"the text has {len(self.ids):,} tokens, a prompt takes {tokens:,}: give more text")
        start = int(rng.integers(len(self.ids) - tokens + 1))
        return self.ids[start : start + tokens]

    def first(self, words: str) -> list[int]:
        """Ids of words at the beginning of a text, without `begin`."""
        return Text(self.tokenizer, words, "the text").ids

    def inside(self, words: str) -> list[int]:
        """Ids of words inside a text."""
        return inside(self.tokenizer, words)


def _passkey(hay: Haystack, length: int, depth: float, rng: np.random.Generator) -> Hidden:
    key = str(rng.integers(10_000, 100_000))
    start = hay.first("There is important information hidden inside irrelevant text. Find and memorize it.\n")
    fact = hay.inside(f"The pass key is {key}. Remember it. {key} is the pass key.\n")
    question = hay.inside("What is the pass key? The pass key is")
    dull = hay.inside(DULL)
    copies = max((length - len(start) - len(fact) - len(question)) // len(dull), 1)
    before = round(depth * copies)
    context = start + before * dull + fact + (copies - before) * dull
    return Hidden(context, question, hay.inside(f" {key}"), [])


def _needle(hay: Haystack, length: int, depth: float, rng) -> Hidden:
    return _needles(hay, length, depth, rng, 1)


def _multikey(hay: Haystack, length: int, depth: float, rng) -> Hidden:
    return _needles(hay, length, depth, rng, 8)


def _needles(hay, length, depth, rng, count):
    cities = rng.permutation(CITIES)[:count].tolist()
    numbers = rng.choice(np.arange(1_000_000, 10_000_000), count, replace=False).tolist()
    facts = [
        hay.inside(f"\nThe special number of {city} is {number}.\n")
        for city, number in zip(cities, numbers, strict=True)
    ]
    question = hay.inside(f"\nWhat is the special number of {cities[0]}? The special number of {cities[0]} is")
    text = hay.cut(length - sum(map(len, facts)) - len(question), rng)
    places = [round(depth * len(text)), *rng.integers(len(text) + 1, size=count - 1).tolist()]
    for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
        text = text[:place] + fact + text[place:]
    gold, *others = (hay.inside(f" {number}") for number in numbers)
    return Hidden(text, question, gold, others)


def _pairs(hay: Haystack, length: int, depth: float, rng) -> Hidden:
    pairs = [(str(uuid.UUID(bytes=rng.bytes(16))), str(uuid.UUID(bytes=rng.bytes(16)))) for _ in range(length // 40)]
    sizes = np.cumsum([len(hay.inside(f'"{key}": "{value}"\n')) for key, value in pairs])
    count = max(int(np.searchsorted(sizes, length - sizes[0])), 2)  # the question takes as many tokens as a pair
    keys, values = zip(*pairs[:count], strict=True)
    wanted = min(round(depth * (count - 1)), count - 1)
    data = "".join(f'"{key}": "{value}"\n' for key, value in zip(keys, values, strict=True))
    context = hay.first(f"Extract the value of the key from the data below.\n\n{data}")
    others = [hay.inside(value) for index, value in enumerate(values) if index != wanted]
    return Hidden(context, hay.inside(f'\n"{keys[wanted]}": "'), hay.inside(values[wanted]), others[:7])


def _repeat(hay: Haystack, length: int, depth: float, rng) -> Hidden:
    passage, text = length // 4, hay.cut(length - length // 4, rng)
    return Hidden(text, text[:1], text[1:passage], [])


TASKS: dict[str, Callable[..., Hidden]] = {
    "passkey": _passkey,
    "needle": _needle,
    "pairs": _pairs,
    "multikey": _multikey,
    "repeat": _repeat,
}
"""Each function makes a prompt of about ``length`` tokens, with the answer at a depth from 0 to 1."""


def check(names: Sequence[str], lengths: Sequence[int], depths: Sequence[float], examples: int, seed: int) -> None:
    """Raises unless such tasks can be made.

    Raises:
      CormError: for an unknown task, a length below `SHORTEST`, a depth outside [0, 1], a negative seed, or more than
        `LARGEST` tokens in all.
    """
    for name in names:
        if name not in TASKS:
            raise CormError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    for length in lengths:
        if length < SHORTEST:
            raise CormError(f"a prompt of {length} tokens is too short to hide anything in: take at least {SHORTEST}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise CormError(f"depth must be in [0, 1], from the beginning to the end, not {depth}")
    if seed < 0:
        raise CormError(f"the seed must be at least 0, not {seed}")
    total = sum(lengths) * len(names) * len(depths) * examples
    if total > LARGEST:
        raise CormError(f"prompts of {total:,} tokens in all are too many: ask for shorter or fewer, up to {LARGEST:,}")


def tasks(
    hay: Haystack,
    names: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    examples: int,
    seed: int,
    blind: bool = False,
) -> Iterator[Task]:
    """The examples of each task at each length and depth. An example depends on its id and the seed alone.

    Args:
      blind: leave out the text that holds the answer, which measures what a model guesses.

    Raises:
      CormError: as `check`, and for a text or a length that is too short.
    """
    check(names, lengths, depths, examples, seed)
    for name in dict.fromkeys(names):
        for length in dict.fromkeys(lengths):
            for depth in dict.fromkeys(depths if name != "repeat" else depths[:1]):
                for index in range(examples):
                    rng = np.random.default_rng([seed, list(TASKS).index(name), length, round(1000 * depth), index])
                    hidden = TASKS[name](hay, length - len(hay.begin), depth, rng)
                    prompt = hay.begin + ([] if blind else hidden.context) + hidden.question
                    identity = f"{name}/{length}/{depth}/{index}"
                    yield Task(identity, name, length, depth, prompt, hidden.gold, hidden.others)
