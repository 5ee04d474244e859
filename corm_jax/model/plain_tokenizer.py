"""A tokenizer from another package, of which only the methods ``encode`` and ``decode`` are needed."""

from collections.abc import Iterator
from typing import Any

from corm_jax.errors import CormError
from corm_jax.model.tokenizer import Tokenizer


class PlainTokenizer(Tokenizer):
    """A tokenizer for the commands, made from any object that has two methods.

    Args:
      inner: has ``encode(text) -> ids``, without ids before or after those of the text, and ``decode(ids) -> text``. It
        may have the attributes ``begin``, the ids that stand before a text, and ``end``, the ids after which generation
        stops; and a method ``chat(text) -> ids`` for a user's turn.

    >>> class Letters:
    ...     def encode(self, text):
    ...         return list(text.encode())
    ...     def decode(self, ids):
    ...         return bytes(ids).decode(errors="replace")
    >>> tokenizer = PlainTokenizer(Letters())
    >>> list(tokenizer.stream().push(tokenizer.encode("né")))       # a letter of two bytes comes out whole
    ['n', 'é']
    """

    def __init__(self, inner: Any):
        self.inner = inner
        self.begin, self.close = [int(one) for one in getattr(inner, "begin", ())], []
        self.end = tuple(int(one) for one in getattr(inner, "end", ()))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The token ids of a text, with `begin` before them if ``special`` is true."""
        try:
            ids = [int(one) for one in self.inner.encode(text)]
        except TypeError as error:
            kind = type(self.inner).__name__
            raise CormError(f"encode of the tokenizer (a {kind}) must return whole numbers: {error}") from None
        return [*self.begin, *ids] if special else ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        return self.inner.decode(ids)

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token alone."""
        return [self.inner.decode([one]) for one in ids]

    def stream(self) -> "_Stream":  # pyright: ignore
        """A decoder for ids that come one by one."""
        return _Stream(self.inner)

    def chat(self, text: str) -> list[int]:
        """The token ids of a user's turn.

        Raises:
          CormError: if the tokenizer has no method ``chat``.
        """
        if not hasattr(self.inner, "chat"):
            raise CormError(f"the tokenizer (a {type(self.inner).__name__}) has no method chat: leave --chat out")
        return [int(one) for one in self.inner.chat(text)]


class _Stream:
    def __init__(self, inner: Any):
        self._inner, self._ids, self._said = inner, [], ""

    def push(self, ids: list[int]) -> Iterator[str]:
        """The pieces of text that the ids complete."""
        for token in ids:
            self._ids.append(token)
            text = self._inner.decode(self._ids)
            if text.startswith(self._said) and text != self._said and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(self._said) :]
                self._said = text
