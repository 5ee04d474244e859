"""Text to token ids and back, from ``tokenizer.json`` or from the vocabulary inside a GGUF file."""

import json
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
    """

    def __init__(self, inner: Any, end: tuple[int, ...]):
        self.inner, self.end = inner, end

    def encode(self, text: str) -> list[int]:
        """Token ids, with a beginning-of-text token where the model was trained with one."""
        return self.inner.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.inner.decode(ids, skip_special_tokens=True)

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
    def from_directory(cls, path: Path, config: dict[str, Any]) -> "Tokenizer":
        """From ``tokenizer.json``; the ids that end a text from ``generation_config.json`` or ``config.json``."""
        import tokenizers

        file = path / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(f"{path} has no tokenizer.json: save the checkpoint with a fast tokenizer")
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} cannot be read: {error}") from None
        generation = path / "generation_config.json"
        if generation.exists():
            config = {**config, **json.loads(generation.read_text(encoding="utf-8"))}
        end = config.get("eos_token_id")
        return cls(inner, tuple(end) if isinstance(end, list) else () if end is None else (end,))

    @classmethod
    def from_gguf(cls, fields: dict[str, Any], path: Path) -> "Tokenizer":
        """From the ``tokenizer.ggml.*`` fields of a GGUF file.

        Raises:
          CheckpointError: for a kind of vocabulary other than byte-level BPE.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors

        def field(name: str, default: Any = None) -> Any:
            return fields.get(f"tokenizer.ggml.{name}", default)

        kind, split = field("model"), field("pre", "gpt-2")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        splits = {
            "gpt-2": byte_level,
            "default": byte_level,
            "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
            "llama-bpe": pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_WORDS), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        }
        if kind != "gpt2" or split not in splits:
            raise CheckpointError(
                f"{path}: tokenizer {kind!r} ({split!r}) is not supported: only byte-level BPE is "
                f"({', '.join(splits)}); use the model's Hugging Face directory instead"
            )
        tokens, merges = field("tokens"), field("merges")
        if not tokens or not merges:
            raise CheckpointError(f"{path} has no tokenizer.ggml.tokens or no tokenizer.ggml.merges")
        inner = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: index for index, token in enumerate(tokens)},
                merges=[tuple(merge.split(" ", 1)) for merge in merges],
                ignore_merges=split == "llama-bpe",
            )
        )
        inner.pre_tokenizer = splits[split]
        inner.decoder = decoders.ByteLevel()
        control = 3
        inner.add_special_tokens(
            [token for token, kind in zip(tokens, field("token_type", []), strict=False) if kind == control]
        )
        begin = field("bos_token_id")
        if field("add_bos_token", split == "llama-bpe") and begin is not None:
            inner.post_processor = processors.TemplateProcessing(
                single=f"{tokens[begin]} $A", special_tokens=[(tokens[begin], begin)]
            )
        ends = (field("eos_token_id"), field("eot_token_id"))
        return cls(inner, tuple(dict.fromkeys(end for end in ends if end is not None)))


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


_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
