"""Tokenizers: from text to token ids and back.

`corm_jax.model.directory_tokenizer` makes a tokenizer from ``tokenizer.json``, `corm_jax.model.gguf_tokenizer` from the
vocabulary inside a GGUF file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corm_jax.errors import CheckpointError, CormError
from corm_jax.model.chat import NO_TEMPLATE, ChatTemplate


@contextmanager
def damage(path: Path, what: str) -> Iterator[None]:
    """Turns errors of the library tokenizers into a `CheckpointError` that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None
    except BaseException as error:  # a panic in Rust is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{path}: the {what} is damaged: {' '.join(str(error).split())}") from None


class Tokenizer:
    """A tokenizer, with the ids that end a text.

    Attributes:
      inner: the `tokenizers.Tokenizer`.
      end: ids after which generation stops.
      template: the chat template.
      size: the vocabulary of the model; ids must be below it.
      begin: the ids that the tokenizer puts before a text, such as the id of ``<s>``; often none.
      close: the ids that it puts after a text; nearly always none.
    """

    def __init__(
        self,
        inner: Any,
        end: tuple[int, ...],
        template: ChatTemplate = NO_TEMPLATE,
        size: int | None = None,
    ):
        self.inner, self.end, self.template, self.size = inner, end, template, size
        inner.no_truncation()
        inner.no_padding()
        self.begin, self.close = _around(inner.post_processor)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
          special: whether `begin` and `close` are put around them, as the model expects of a whole text.

        Raises:
          CormError: for a text that is not Unicode or cannot be encoded, or ids outside the vocabulary of the model.
        """
        try:
            ids = self.inner.encode(text, add_special_tokens=special).ids
        except TypeError:
            raise CormError(f"{text!r:.60} is not Unicode text") from None
        except Exception as error:  # such as an unknown character, if there is no token for unknown ones
            raise CormError(f"the text {text!r:.60} cannot be encoded: {error}") from None
        if self.size is not None and ids and max(ids) >= self.size:
            token = self.inner.id_to_token(max(ids))
            raise CormError(
                f"the text has the token {token!r}, whose id {max(ids)} is beyond the vocabulary of {self.size:,}"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.inner.decode(ids, skip_special_tokens=True)

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token alone, also of special tokens. Incomplete characters become U+FFFD."""
        # Each is decoded after another token, since decoders may remove a space at the beginning of a text.
        before = self.inner.encode("a", add_special_tokens=False).ids
        texts = self.inner.decode_batch([before, *([*before, token] for token in ids)], skip_special_tokens=False)
        return [text.removeprefix(texts[0]) for text in texts[1:]]

    def stream(self) -> "Stream":
        """A decoder for ids that come one by one."""
        return Stream(self.inner)

    def chat(self, text: str) -> list[int]:
        """The token ids of a user's turn, and of the beginning of an answer, by the checkpoint's chat template.

        As with ``apply_chat_template`` of transformers, the template writes the special tokens; `begin` and `close` are
        not added. The names of special tokens in the user's text are special tokens, too.

        Raises:
          CormError: if the checkpoint has no chat template, or if the template fails.
        """
        return self.encode(self.template.render(text), special=False)


def _around(post_processor: Any) -> tuple[list[int], list[int]]:
    """The ids that a post-processor puts before and after a text."""
    from tokenizers import Tokenizer, models

    # A post-processor holds the ids that it adds. So a text of one token shows them, whatever the vocabulary is.
    one = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if post_processor is not None:
        one.post_processor = post_processor
    found = one.encode("a")
    if found.special_tokens_mask.count(0) != 1:
        raise CormError(
            f"post_processor must give the text once, with other tokens around it, but is {post_processor!s:.200}"
        )
    middle = found.special_tokens_mask.index(0)
    return found.ids[:middle], found.ids[middle + 1 :]


class Stream:
    """A decoder for ids that come one by one: it returns text as soon as its characters are complete."""

    def __init__(self, inner: Any):
        from tokenizers.decoders import DecodeStream

        self._inner, self._stream = inner, DecodeStream(skip_special_tokens=True)

    def push(self, ids: list[int]) -> Iterator[str]:
        """The pieces of text that the ids complete."""
        for token in ids:
            if piece := self._stream.step(self._inner, token):
                yield piece
