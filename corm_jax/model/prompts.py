"""Prompts: token ids that begin as the model expects a text to begin.

A model was trained on texts that begin with what its tokenizer puts there: ``<s>`` for Llama 2, ``<|begin_of_text|>``
for Llama 3, nothing for SmolLM2. A part of a text that is read by itself begins so too, and so does a prompt that is
put together from pieces: with these ids, once. They count as tokens of the prompt, and are never predicted. What a
tokenizer puts after a text is left out, since what is read here is predicted or continued: it has no end.

The token ids of texts are made here and nowhere else.
"""

from corm_jax.errors import CormError
from corm_jax.model.tokenizer import Tokenizer


class Text:
    """A text as token ids, to be read whole or in parts.

    Args:
      name: what the text is called in errors.

    Attributes:
      begin: the ids that the tokenizer puts before a text; often none.
      ids: those of the text alone. A text that begins with the tokenizer's words for `begin` does not have them twice.
    """

    def __init__(self, tokenizer: Tokenizer, words: str, name: str):
        self.name, self.begin = name, list(tokenizer.begin)
        ids, first = tokenizer.encode(words, special=False), len(self.begin)
        self.ids = ids[first:] if first and ids[:first] == self.begin else ids

    def __len__(self) -> int:
        """How many tokens the whole text has, with `begin`."""
        return len(self.begin) + len(self.ids)

    @property
    def whole(self) -> list[int]:
        """The whole text as a prompt.

        Raises:
          CormError: for an empty text.
        """
        if not self.ids:
            raise CormError(f"{self.name} has no tokens: give some words")
        return self.begin + self.ids

    def part(self, tokens: int, start: int = 0) -> list[int]:
        """A prompt of exactly ``tokens`` ids: `begin`, then the text from its token ``start`` on.

        Raises:
          CormError: for fewer tokens than `begin` and one more, or a text that is too short.
        """
        own = self._own(tokens)
        if len(self.ids) < start + own:
            begin = f", with the {len(self.begin)} that the tokenizer puts first" if self.begin else ""
            raise CormError(
                f"{self.name} has {len(self):,} tokens{begin}; {start + tokens:,} were asked for: give more text, or "
                "ask for fewer tokens"
            )
        return self.begin + self.ids[start : start + own]

    def starts(self, tokens: int) -> range:
        """Where the `part` of so many ids begin that cut the whole text, one after the other; the rest is left over."""
        own = self._own(tokens)
        return range(0, len(self.ids) - own + 1, own)

    def _own(self, tokens: int) -> int:
        """How many tokens of a part are the text's own."""
        if tokens <= len(self.begin):
            begin = f": the tokenizer puts {len(self.begin)} before a text" if self.begin else ""
            raise CormError(f"ask for at least {len(self.begin) + 1} tokens of {self.name}, not {tokens}{begin}")
        return tokens - len(self.begin)


def scored_from(tokenizer: Tokenizer, prompt: int | None) -> int:
    """The first token of a text that is scored: what the tokenizer puts there is not predicted, nor is a prompt."""
    return max(prompt or 1, len(tokenizer.begin))


def inside(tokenizer: Tokenizer, words: str) -> list[int]:
    """Token ids of words inside a text: without `Text.begin`, and without the space that Llama 2 puts before a text.

    Raises:
      CormError: for a tokenizer whose ids of a word hang on what stands before it.
    """
    first, later = (tokenizer.encode(text, special=False) for text in ("0", "\n0"))
    if later[len(later) - len(first) :] == first:
        return tokenizer.encode(words, special=False)
    for before in "\n0.":  # that is encoded as before, and what follows it is not at the beginning
        alone, both = (tokenizer.encode(text, special=False) for text in (before, before + words))
        if both[: len(alone)] == alone:
            return both[len(alone) :]
    raise CormError(f"this tokenizer does not say which tokens {words[:40]!r} has inside a text: use another model")
