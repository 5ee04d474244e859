"""The tokenizer inside a GGUF file, with the token ids that llama.cpp gives, the reference for this format.

If a field is missing, the default of llama.cpp is used, and a `CheckpointWarning` says so. An unknown field could
change token ids, so it is refused.
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from corm_jax.errors import CheckpointError, CheckpointWarning
from corm_jax.model.chat import ChatTemplate
from corm_jax.model.tokenizer import Tokenizer, damage

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The types of tokens in GGUF."""

NAMED = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
"""The names of special tokens in transformers, and those in GGUF."""

UNUSED_FIELDS = ("ggml.precompiled_charsmap", "ggml.normalizer.lowercase", "ggml.normalizer.strip_accents")
"""Fields for other kinds of tokenizers, which have no effect if they are false or empty."""


@dataclass
class Ggml:
    """The fields ``tokenizer.ggml.*``.

    ``add_sep_token`` is for pairs of texts and the ``fim`` tokens are for filling gaps, which are not used here. Of the
    tokens ``cls``, ``mask`` and so on it is only used that they are special.
    """

    __pydantic_config__: ClassVar = {"strict": True}
    model: str
    tokens: list[str]
    token_type: list[int] | None = None
    pre: str | None = None
    merges: list[str] | None = None
    scores: list[float] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None
    eom_token_id: int | None = None
    unknown_token_id: int | None = None
    seperator_token_id: int | None = None
    padding_token_id: int | None = None
    cls_token_id: int | None = None
    mask_token_id: int | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_sep_token: bool | None = None
    add_space_prefix: bool | None = None
    remove_extra_whitespaces: bool | None = None
    fim_pre_token_id: int | None = None
    fim_suf_token_id: int | None = None
    fim_mid_token_id: int | None = None
    fim_pad_token_id: int | None = None
    fim_rep_token_id: int | None = None
    fim_sep_token_id: int | None = None
    prefix_token_id: int | None = None
    suffix_token_id: int | None = None
    middle_token_id: int | None = None

    def __post_init__(self):
        count = len(self.tokens)
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(self.tokens)]  # as llama.cpp does
        if self.model not in ("gpt2", "llama"):
            raise ValueError(f"model = {self.model!r} is not supported: only 'gpt2' and 'llama' are")
        if len(set(self.tokens)) < count:
            raise ValueError(f"tokens has {Counter(self.tokens).most_common(1)[0][0]!r} twice")
        for name, value in vars(self).items():
            if name.endswith("_token_id") and value is not None and not 0 <= value < count:
                raise ValueError(f"{name} = {value} is not the id of one of the {count:,} tokens")
            if name in ("token_type", "scores") and value is not None and len(value) != count:
                raise ValueError(f"{name} has {len(value):,} entries for {count:,} tokens")
        if unknown := set(self.token_type or ()) - set(range(NORMAL, BYTE + 1)):
            raise ValueError(f"token_type has {min(unknown)}, which is not a type of token")
        if not all(map(math.isfinite, self.scores or ())):
            raise ValueError("scores must be finite")
        if self.remove_extra_whitespaces:
            raise ValueError("remove_extra_whitespaces = true is not supported")
        if self.add_space_prefix and self.model == "gpt2":
            raise ValueError("add_space_prefix = true is not supported with model = 'gpt2'")
        if self.merges and self.model == "llama":
            raise ValueError("merges are not supported with model = 'llama', which joins pieces by scores")


def from_gguf(metadata: dict[str, Any], path: Path, embeddings: int | None = None) -> Tokenizer:
    """The tokenizer in the fields ``tokenizer.*`` of a GGUF file: byte-level BPE, or BPE of SentencePiece (Llama 2).

    Ids are those of llama.cpp when it parses special tokens in a text. A text ends with the tokens ``eos``, ``eot``
    and ``eom``; if one of them is Llama 3's ``<|eot_id|>``, also with its ``<|eom_id|>`` and ``<|end_of_text|>``.

    Args:
      metadata: the file's fields by name.
      path: the file, for errors.
      embeddings: the number of tokens that have an embedding in the model.

    Raises:
      CheckpointError: for a vocabulary that is damaged or of another kind, or an unknown field.

    Warns:
      CheckpointWarning: if a field is missing; it says what is assumed.
    """
    said = {key.removeprefix("tokenizer."): value for key, value in metadata.items() if key.startswith("tokenizer.")}
    templates = {
        name: said.pop(key) for key, name in ((key, _template_name(key)) for key in list(said)) if name is not None
    }
    said.pop("chat_templates", None)  # a list of the names of the templates
    ggml = _checked(said, path)
    if embeddings is not None and embeddings != len(ggml.tokens):
        raise CheckpointError(f"{path} has {len(ggml.tokens):,} tokens, but embeddings for {embeddings:,}")
    notes = list(_assume(ggml, path))
    with damage(path, "vocabulary"):
        inner = _byte_level(ggml) if ggml.model == "gpt2" else _sentencepiece(ggml)
        _add_tokens(inner, ggml)
        _add_begin_and_end(inner, ggml)
    ids = {f"{name}_token": getattr(ggml, f"{field}_token_id") for name, field in NAMED.items()}
    tokens = {name: ggml.tokens[token] for name, token in ids.items() if token is not None}
    for note in notes:
        warnings.warn(note, CheckpointWarning, stacklevel=2)
    return Tokenizer(inner, _ends(ggml), ChatTemplate(templates, tokens, str(path)))


def _template_name(key: str) -> str | None:
    if key == "chat_template":
        return "default"
    return key.removeprefix("chat_template.") if key.startswith("chat_template.") else None


def _checked(said: dict[str, Any], path: Path) -> Ggml:
    from pydantic import TypeAdapter, ValidationError

    known = {f"ggml.{field.name}" for field in fields(Ggml)}
    for key, value in said.items():
        if key not in known and (value or key not in UNUSED_FIELDS):
            raise CheckpointError(
                f"{path}: the field 'tokenizer.{key}' may change token ids and is not supported: "
                "use the model's Hugging Face directory"
            )
    ggml = {key.removeprefix("ggml."): value for key, value in said.items() if key in known}
    try:
        return TypeAdapter(Ggml).validate_json(json.dumps(ggml, default=lambda _: {}))
    except ValidationError as found:
        first = found.errors(include_url=False)[0]
        if first["type"] == "value_error":
            reason = first["msg"].removeprefix("Value error, ")
            raise CheckpointError(f"{path}: tokenizer.ggml.{reason}") from None
        name = str(first["loc"][0])
        value = "missing" if first["type"] == "missing" else f"{ggml[name]!r:.60}: {first['msg']}"
        raise CheckpointError(f"{path}: tokenizer.ggml.{name} is {value}") from None


def _assume(ggml: Ggml, path: Path) -> Iterator[str]:
    """Fills in the fields that the file leaves out, as llama.cpp does, and yields notes about them."""
    missing = {}
    if ggml.model == "llama":
        missing = {
            "add_bos_token": True,
            "add_space_prefix": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        }
    else:
        ggml.pre = ggml.pre or None
        missing = {"pre": "default", "add_bos_token": ggml.pre in IGNORE_MERGES}
    missing = {name: value for name, value in missing.items() if getattr(ggml, name) is None}
    for name, value in missing.items():
        if name.endswith("_id") and value >= len(ggml.tokens):
            raise CheckpointError(f"{path} does not say tokenizer.ggml.{name}")
        setattr(ggml, name, value)
    if ggml.token_type is None:
        missing["token_type"] = "normal for all tokens"
        ggml.token_type = [NORMAL] * len(ggml.tokens)
    if not _ends(ggml):
        yield (
            f"{path} does not say which token ends a text (tokenizer.ggml.eos_token_id): generation goes on until it "
            "has made the number of tokens asked for"
        )
    if missing:
        assumed = ", ".join(f"{name} = {str(value).lower()}" for name, value in missing.items())
        yield f"{path} leaves out fields of its tokenizer. As in llama.cpp, these values are assumed: {assumed}"


def _ends(ggml: Ggml) -> tuple[int, ...]:
    ends = [ggml.eos_token_id, ggml.eot_token_id, ggml.eom_token_id]
    # In Llama 3 Instruct three tokens end a text. Its Hugging Face directory lists them. GGUF files name only
    # <|eot_id|>, and llama.cpp finds the others by their text.
    if any(end is not None and ggml.tokens[end] == "<|eot_id|>" for end in ends):
        ends += [ggml.tokens.index(name) for name in ("<|eom_id|>", "<|end_of_text|>") if name in ggml.tokens]
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def _add_tokens(inner: Any, ggml: Ggml) -> None:
    """Adds the tokens that are found in a text as a whole, before the text is split into words."""
    from tokenizers import AddedToken

    named = {getattr(ggml, f"{name}_token_id") for name in NAMED.values()} | set(_ends(ggml))
    whole = []
    for index, (token, kind) in enumerate(zip(ggml.tokens, ggml.token_type or (), strict=True)):
        special = kind in (CONTROL, UNKNOWN) or index in named
        if special or kind == USER_DEFINED:
            whole.append(AddedToken(token, special=special, normalized=False))
    inner.add_tokens(whole)


def _add_begin_and_end(inner: Any, ggml: Ggml) -> None:
    """Adds the tokens that are put before and after every text."""
    from tokenizers import processors

    before = ["bos_token_id"] if ggml.add_bos_token else []
    after = ["eos_token_id"] if ggml.add_eos_token else []
    special: list[Any] = []
    for name in (*before, *after):
        token = getattr(ggml, name)
        if token is None:
            raise ValueError(
                f"tokenizer.ggml.{name} is missing, but add_{name.removesuffix('_id')} asks for this token"
            )
        special.append({"id": name, "ids": [token], "tokens": [ggml.tokens[token]]})
    if special:
        inner.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=special)


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORDS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2_WORDS,),
    "smollm": (r"\p{N}", GPT2_WORDS),
    "llama-bpe": (LLAMA3_WORDS,),
    "llama-v3": (LLAMA3_WORDS,),
    "llama3": (LLAMA3_WORDS,),
}
"""How a text is split into words, by the value of the field ``pre``: with one pattern after the other."""

IGNORE_MERGES = ("llama-bpe", "llama-v3", "llama3")
"""The values of ``pre`` for Llama 3: a word that is a token is not split further, and a text begins with a token."""


def _byte_level(ggml: Ggml) -> Any:
    """Byte-level BPE (GPT-2, Llama 3, SmolLM2)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if ggml.pre not in WORDS:
        raise ValueError(
            f"tokenizer.ggml.pre = {ggml.pre!r} is not supported, only {', '.join(WORDS)}: "
            "use the model's Hugging Face directory"
        )
    if not ggml.merges:
        raise ValueError("tokenizer.ggml.merges is missing")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in dict.fromkeys(ggml.merges))]
    inner = Tokenizer(models.BPE(_vocabulary(ggml), merges, ignore_merges=ggml.pre in IGNORE_MERGES))
    cuts = [pre_tokenizers.Split(Regex(words), "isolated") for words in WORDS[ggml.pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence([*cuts, byte_level]), decoders.ByteLevel()
    return inner


def _sentencepiece(ggml: Ggml) -> Any:
    """The BPE of SentencePiece (Llama 2, Vicuna): the two pieces whose union has the highest score are joined first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = _vocabulary(ggml)
    if not ggml.scores:
        raise ValueError("tokenizer.ggml.scores is missing")
    joins, taken = [], {}
    for index, (piece, score, kind) in enumerate(zip(ggml.tokens, ggml.scores, ggml.token_type or (), strict=True)):
        cuts = [cut for cut in range(1, len(piece)) if piece[:cut] in vocabulary and piece[cut:] in vocabulary]
        if kind == NORMAL and cuts:
            if score in taken:
                raise ValueError(
                    f"tokenizer.ggml.scores gives {taken[score]!r} and {piece!r} the same score: which of them is "
                    "joined first is unknown: use the model's Hugging Face directory"
                )
            taken[score] = piece
            joins += [(-score, index, piece[:cut], piece[cut:]) for cut in cuts]
        elif kind == UNUSED and (cuts or len(piece) == 1):
            raise ValueError(f"the token {piece!r} has the type unused, but it could occur in a text")
    merges = [(left, right) for *_, left, right in sorted(joins)]
    unknown = ggml.tokens[ggml.unknown_token_id or 0]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = [normalizers.Replace(" ", "▁")]
    strip = []
    if ggml.add_space_prefix:
        space, strip = [normalizers.Prepend("▁"), *space], [decoders.Strip(" ", 1, 0)]
    inner.normalizer = normalizers.Sequence(space)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner


def _vocabulary(ggml: Ggml) -> dict[str, int]:
    return {token: index for index, token in enumerate(ggml.tokens)}
