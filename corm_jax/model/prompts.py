"""Prompts: token ids that begin as the model expects a text to begin.

A model was trained on texts that begin with the ids that its tokenizer puts there: ``<s>`` for Llama 2,
``<|begin_of_text|>`` for Llama 3, none for SmolLM2. Each prompt begins with these ids once, also if it is a part of a
text or is made of several pieces. They count as tokens of the prompt, and their prediction is not scored. Ids that a
tokenizer puts after a text are left out, since the texts here are predicted or continued.

All commands make the token ids of texts here.
"""

from corm_jax.errors import CormError
from corm_jax.model.tokenizer import Tokenizer


class Text:
    """A text as token ids, for prompts from all or parts of it.

    Args:
      tokenizer: makes the ids.
      words: the text.
      name: the name of the text in errors.

    Attributes:
      begin: the ids that the tokenizer puts before a text; often none.
      ids: the ids of the text itself. If the text itself begins with `begin`, these ids are left out here.
    """

    def __init__(self, tokenizer: Tokenizer, words: str, name: str):
        self.name, self.begin = name, list(tokenizer.begin)
        ids, first = tokenizer.encode(words, special=False), len(self.begin)
        self.ids = ids[first:] if first and ids[:first] == self.begin else ids

    def __len__(self) -> int:
        """The number of tokens of the whole text, with `begin`."""
        return len(self.begin) + len(self.ids)

    @property
    def whole(self) -> list[int]:
        """The whole text as a prompt, with `begin`.

        Raises:
          CormError: for an empty text.
        """
        if not self.ids:
            raise CormError(f"{self.name} has no tokens: give some words")
        return self.begin + self.ids

    def part(self, tokens: int, start: int = 0) -> list[int]:
        """A prompt of exactly ``tokens`` ids: `begin`, then the text from its token ``start`` on.

        Raises:
          CormError: if ``tokens`` leaves no token for the text after `begin`, or if the text is too short.
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
        """The ``start`` of each `part` of this many ids, if the text is cut into them; a shorter rest is left out."""
        own = self._own(tokens)
        return range(0, len(self.ids) - own + 1, own)

    def _own(self, tokens: int) -> int:
        """How many tokens of a part are not `begin`, but of the text."""
        if tokens <= len(self.begin):
            begin = f": the tokenizer puts {len(self.begin)} before a text" if self.begin else ""
            raise CormError(f"ask for at least {len(self.begin) + 1} tokens of {self.name}, not {tokens}{begin}")
        return tokens - len(self.begin)


def scored_from(tokenizer: Tokenizer, prompt: int | None) -> int:
    """The index of the first token that is scored: after the prompt, and after what the tokenizer puts first."""
    return max(prompt or 1, len(tokenizer.begin))


def inside(tokenizer: Tokenizer, words: str) -> list[int]:
    """The token ids of words inside a text, without `Text.begin` and without the space that Llama 2 puts first.

    Raises:
      CormError: for a tokenizer that encodes the words differently after each text that is tried.
    """
    first, later = (tokenizer.encode(text, special=False) for text in ("0", "\n0"))
    if later[len(later) - len(first) :] == first:
        return tokenizer.encode(words, special=False)
    for before in "\n0.":  # if this text has the same ids with the words after it, the other ids are those of the words
        alone, both = (tokenizer.encode(text, special=False) for text in (before, before + words))
        if both[: len(alone)] == alone:
            return both[len(alone) :]
    raise CormError(
        f"the token ids of {words[:40]!r} inside a text cannot be found with this tokenizer: use another model"
    )
