"""Text to token ids and back, from ``tokenizer.json`` or from the vocabulary inside a GGUF file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from corm_jax.errors import CheckpointError, CormError


class Chat(NamedTuple):
    """How a family of models writes a conversation: text before and after the user's words."""

    marker: str
    """A special token that only this family has."""
    before: str
    after: str


CHATS = (
    Chat(
        "<|im_start|>",  # SmolLM2
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    Chat(
        "<|start_header_id|>",  # Llama 3
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
)


class Tokenizer:
    """A tokenizer, with the ids that end a text.

    Attributes:
      inner: the `tokenizers.Tokenizer`.
      end: ids after which generation stops.
      begin: ids that the tokenizer puts before a text, such as that of ``<s>``; often none.
      close: ids that it puts after a text; nearly always none.
    """

    def __init__(self, inner: Any, end: tuple[int, ...]):
        self.inner, self.end = inner, end
        self.begin, self.close = _around(inner.post_processor)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          special: put `begin` before and `close` after them, as the model expects it of a whole text; not so for words
            that stand inside a text.
        """
        return self.inner.encode(text, add_special_tokens=special).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.inner.decode(ids, skip_special_tokens=True)

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token by itself, special tokens too; what is no whole character there becomes U+FFFD."""
        # Behind another token, since decoders may strip the space that a text's first one begins with.
        before = self.inner.encode("a", add_special_tokens=False).ids
        texts = self.inner.decode_batch([before, *([*before, token] for token in ids)], skip_special_tokens=False)
        return [text.removeprefix(texts[0]) for text in texts[1:]]

    def stream(self) -> "Stream":
        """Decodes ids one by one."""
        return Stream(self.inner)

    def chat(self, text: str) -> str:
        """A user's words in the form in which the model expects a conversation."""
        for form in CHATS:
            if self.inner.token_to_id(form.marker) is not None:
                return form.before + text + form.after
        raise CormError("no chat format is known for this tokenizer: write the prompt out, without --chat")

    @classmethod
    def from_file(cls, file: Path, end: list[int] | int | None) -> "Tokenizer":
        """From a ``tokenizer.json``, and the ids that end a text as a checkpoint's configuration has them."""
        import tokenizers

        if not file.exists():
            raise CheckpointError(f"{file.parent} has no {file.name}: save the checkpoint with a fast tokenizer")
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} cannot be read: {error}") from None
        return cls(inner, tuple(end) if isinstance(end, list) else () if end is None else (end,))

    @classmethod
    def from_gguf(cls, fields: dict[str, Any], path: Path) -> "Tokenizer":
        """From the ``tokenizer.ggml.*`` fields of a GGUF file: byte-level BPE, or SentencePiece as Llama 2 has it.

        Raises:
          CheckpointError: for another kind of vocabulary.
        """
        from tokenizers import processors

        ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
        kind, tokens = ggml.get("model"), ggml.get("tokens")
        if kind not in ("gpt2", "llama") or not tokens:
            raise CheckpointError(f"{path}: a tokenizer of kind {kind!r} is not supported: only 'gpt2' and 'llama' are")
        try:
            inner = _byte_level(ggml, path) if kind == "gpt2" else _sentencepiece(ggml, path)
            types = ggml.get("token_type", [])
            inner.add_special_tokens([token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL])
            begin = ggml.get("bos_token_id")
            if begin is not None and ggml.get("add_bos_token", kind == "llama" or ggml.get("pre") == "llama-bpe"):
                inner.post_processor = processors.TemplateProcessing(
                    single=f"{tokens[begin]} $A", special_tokens=[(tokens[begin], begin)]
                )
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: the vocabulary is damaged: {error}") from None
        ends = (ggml.get("eos_token_id"), ggml.get("eot_token_id"))
        return cls(inner, tuple(dict.fromkeys(end for end in ends if end is not None)))


def _around(post_processor: Any) -> tuple[list[int], list[int]]:
    """The ids that a post-processor puts before and after a text."""
    from tokenizers import Tokenizer, models

    # A post-processor has its ids within itself, so a text of one token shows them, whatever the vocabulary is.
    one = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if post_processor is not None:
        one.post_processor = post_processor
    found = one.encode("a")
    if found.special_tokens_mask.count(0) != 1:
        raise CheckpointError(f"a tokenizer that repeats the text is not supported: {post_processor}")
    middle = found.special_tokens_mask.index(0)
    return found.ids[:middle], found.ids[middle + 1 :]


CONTROL = 3  # GGUF's type of tokens such as <s>

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _byte_level(ggml: dict[str, Any], path: Path) -> Any:
    """Byte-level BPE (GPT-2, Llama 3, SmolLM2), words cut as the field ``pre`` says."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cuts = {
        "gpt-2": byte_level,
        "default": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "llama-bpe": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    pre = ggml.get("pre", "default")
    if pre not in cuts:
        raise CheckpointError(f"{path}: words cut as {pre!r} are not supported: only {', '.join(cuts)} are")
    if not ggml.get("merges"):
        raise CheckpointError(f"{path} has no tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    inner = Tokenizer(models.BPE(_vocabulary(ggml), merges, ignore_merges=pre == "llama-bpe"))
    inner.pre_tokenizer, inner.decoder = cuts[pre], decoders.ByteLevel()
    return inner


def _sentencepiece(ggml: dict[str, Any], path: Path) -> Any:
    """SentencePiece's BPE (Llama 2, Vicuna): of two pieces that join into a known one, the best score goes first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary, scores = _vocabulary(ggml), ggml.get("scores")
    if not scores:
        raise CheckpointError(f"{path} has no tokenizer.ggml.scores")
    joins = [
        (-score, index, piece[:cut], piece[cut:])
        for index, (piece, score) in enumerate(zip(ggml["tokens"], scores, strict=True))
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    unknown = ggml["tokens"][ggml.get("unknown_token_id", 0)]
    merges = [(left, right) for *_, left, right in sorted(joins)]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = [normalizers.Replace(" ", "▁")]
    strip = []
    if ggml.get("add_space_prefix", True):
        space, strip = [normalizers.Prepend("▁"), *space], [decoders.Strip(" ", 1, 0)]
    inner.normalizer = normalizers.Sequence(space)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner


def _vocabulary(ggml: dict[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(ggml["tokens"])}


class Stream:
    """Incremental decoding: text comes out as soon as it is complete."""

    def __init__(self, inner: Any):
        from tokenizers.decoders import DecodeStream

        self._inner, self._stream = inner, DecodeStream(skip_special_tokens=True)

    def push(self, ids: list[int]) -> Iterator[str]:
        """The pieces of text that the ids complete."""
        for token in ids:
            if piece := self._stream.step(self._inner, token):
                yield piece
