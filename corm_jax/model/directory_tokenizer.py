"""The tokenizer of a Hugging Face directory, with the ids that ``AutoTokenizer`` of transformers 5 gives.

``tokenizer.json`` holds the whole tokenizer. The files beside it name special tokens, the chat template and the tokens
that end a text. Which of them are read, and which file is followed if two disagree, is as in transformers.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from corm_jax.errors import CheckpointError, CheckpointWarning
from corm_jax.files import read_json
from corm_jax.model.chat import ChatTemplate
from corm_jax.model.tokenizer import Tokenizer, damage

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "config.json",
)
"""The files that are read here, for a download."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The names of the special tokens that any tokenizer of transformers may have."""

UNCHANGED = ("TokenizersBackend", "PythonBackend", "PreTrainedTokenizer")
"""Classes of transformers 5 that use all of ``tokenizer.json``. Most others use only its vocabulary."""

Kind = TypeVar("Kind")

DEFAULTS = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
}
"""The special tokens of these classes, if ``tokenizer_config.json`` does not name them."""


@dataclass
class Settings:
    """``tokenizer_config.json``, without the special tokens in `NAMED`."""

    __pydantic_config__: ClassVar = {"strict": True}
    tokenizer_class: str | None = None
    auto_map: Any = None
    fast_tokenizer_files: list[str] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    split_special_tokens: bool = False
    clean_up_tokenization_spaces: bool | None = None
    chat_template: str | list[dict[str, str]] | dict[str, str] | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra_special_tokens: list[Any] | dict[str, Any] | None = None
    additional_special_tokens: list[Any] | None = None


@dataclass
class Config:
    """What ``config.json`` or ``generation_config.json`` says about tokens."""

    __pydantic_config__: ClassVar = {"strict": True}
    eos_token_id: Any = None
    vocab_size: int | None = None
    tokenizer_class: str | None = None

    def __post_init__(self):
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        if self.eos_token_id is not None and not (ends and all(type(end) is int and end >= 0 for end in ends)):
            raise ValueError(
                f"eos_token_id must be the id of a token, or a list of them, not {self.eos_token_id!r:.60}"
            )
        self.end = () if self.eos_token_id is None else tuple(dict.fromkeys(ends))


def from_directory(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, with the ids that ``AutoTokenizer`` of transformers 5 gives.

    A text ends with a token of ``eos_token_id``, an id or a list of ids, in ``generation_config.json``, or in
    ``config.json`` if there is no such file. Truncation and padding that ``tokenizer.json`` asks for are not applied.

    Raises:
      CheckpointError: for files that are missing or damaged, that contradict each other, or that ask for something that
        is not supported.

    Warns:
      CheckpointWarning: if files disagree, or say nothing, about token ids or about the end of a text.
    """
    import tokenizers

    file = path / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(f"{path} has no {file.name}: save the checkpoint with a fast tokenizer")
    with damage(file, "tokenizer"):
        inner = tokenizers.Tokenizer.from_file(str(file))
        if getattr(inner.model, "dropout", None):
            raise ValueError(f"dropout = {inner.model.dropout} makes ids random: set it to null")
    settings, config = _settings(path / "tokenizer_config.json"), _read(path / "config.json", Config) or Config()
    said = _read(path / "tokenizer_config.json", dict) or {}
    kind = (settings.tokenizer_class or config.tokenizer_class or UNCHANGED[0]).removesuffix("Fast")
    if kind == "LlamaTokenizer" and '"ByteLevel"' in file.read_text("utf-8"):
        kind = UNCHANGED[0]  # Llama 3, whose files name the class of Llama 2; transformers treats it so, too
    with damage(path, "tokenizer"):
        same = kind in UNCHANGED or _splits_alike(inner, kind, settings, said)
        pad = {"pad_token": inner.padding["pad_token"]} if inner.padding else {}
        tokens = _add_tokens(inner, DEFAULTS.get(kind, {}) | pad | said, path)
        inner.encode_special_tokens = settings.split_special_tokens
        template = ChatTemplate(_template(path, settings), tokens, str(path))
        tokenizer = Tokenizer(inner, _end(path, config), template, config.vocab_size)
    rebuilt = None if same else kind
    for note in _notes(tokenizer, settings, rebuilt, path):
        warnings.warn(note, CheckpointWarning, stacklevel=2)
    return tokenizer


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    if not path.exists():
        return None
    return read_json(path, kind, "file", "correct it, or save the checkpoint again", CheckpointError)


def _settings(path: Path) -> Settings:
    settings = _read(path, Settings) or Settings()
    if settings.auto_map:
        raise CheckpointError(
            f"{path} asks for code of the checkpoint (auto_map), which is not run: save a fast tokenizer"
        )
    if set(settings.fast_tokenizer_files or ()) - {"tokenizer.json"}:
        raise CheckpointError(f"{path} names other files in fast_tokenizer_files: only tokenizer.json is read")
    return settings


def _end(path: Path, config: Config) -> tuple[int, ...]:
    """The tokens that end a text. As in transformers, ``generation_config.json`` has priority over ``config.json``."""
    found = _read(path / "generation_config.json", Config) or config
    if config.vocab_size is not None and found.end and max(found.end) >= config.vocab_size:
        raise ValueError(f"eos_token_id = {max(found.end)} is beyond the vocabulary of {config.vocab_size:,}")
    return found.end


def _template(path: Path, settings: Settings) -> Any:
    """The chat template, or several by name. Separate files have priority over ``tokenizer_config.json``."""
    files = {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if (path / "chat_template.jinja").exists():
        files["default"] = path / "chat_template.jinja"
    if files:
        templates: Any = {name: file.read_text("utf-8") for name, file in files.items()}
        return templates["default"] if set(templates) == {"default"} else templates
    templates = settings.chat_template
    if isinstance(templates, list):
        if not all({"name", "template"} <= set(one) for one in templates):
            raise ValueError("tokenizer_config.json has a chat_template without a name or a template")
        templates = {one["name"]: one["template"] for one in templates}
    return templates


def _add_tokens(inner: Any, said: dict[str, Any], path: Path) -> dict[str, str]:
    """Adds the tokens that files beside ``tokenizer.json`` name, in the order in which transformers adds them.

    Returns:
      The text of special tokens by name, for the chat template.
    """
    from tokenizers import AddedToken

    said = _tokens(said)
    extra = said.pop("extra_special_tokens", None)
    extra = extra or said.pop("additional_special_tokens", extra)
    own = {key: said.pop(key) for key in list(said) if key not in NAMED and isinstance(said[key], str)}
    if isinstance(extra, dict):
        own, extra = own | extra, None
    if "added_tokens_decoder" in said:
        added = {int(place): token for place, token in said.pop("added_tokens_decoder").items()}
    else:  # older files
        mapped = _tokens(_read(path / "special_tokens_map.json", dict) or {}, special=True)
        more, late = (mapped.pop(f"{name}_special_tokens", None) or [] for name in ("extra", "additional"))
        said |= mapped
        if isinstance(more, dict):
            own |= more
        elif more:
            extra = [*(extra or []), *(token for token in more if token not in (extra or []))]
        special = {str(said[key]) for key in NAMED if said.get(key)} | set(map(str, extra or []))
        extra = late if extra is None else extra
        places = _read(path / "added_tokens.json", dict) or {}
        if not all(type(index) is int for index in places.values()):
            raise ValueError("added_tokens.json must have an id for each token")
        added = {
            index: AddedToken(token, normalized=token not in special, special=token in special)
            for token, index in places.items()
        } | inner.get_added_tokens_decoder()
    listed = {token.content: token for token in added.values()}
    named = {key: listed.get(str(said[key]), said[key]) for key in NAMED if said.get(key) is not None}
    named |= {key: value for key, value in said.items() if key not in NAMED and isinstance(value, str | AddedToken)}
    named |= own
    for key, token in [*named.items(), *(("a special token", token) for token in extra or [])]:
        if not isinstance(token, str | AddedToken):
            raise ValueError(f"{key} is {token!r:.60}, which is not a token")
    whole: list[Any] = [added[index] for index in sorted(added)]
    there = {token.content for token in (*inner.get_added_tokens_decoder().values(), *whole)}
    whole += dict.fromkeys(token for token in (*named.values(), *(extra or [])) if str(token) not in there)
    whole = [AddedToken(token, special=True) if isinstance(token, str) else token for token in whole]
    for token in whole:
        token.special = token.special or token.content in map(str, named.values())
    inner.add_tokens(whole)
    for index, token in added.items():
        if inner.token_to_id(token.content) != index:
            found = inner.token_to_id(token.content)
            raise ValueError(
                f"the token {token.content!r} has the id {found} in tokenizer.json, and {index} in a file beside it"
            )
    return {key: str(token) for key, token in named.items()}


def _tokens(said: dict[str, Any], **flags: Any) -> dict[str, Any]:
    """The entries of a file that are about tokens; tokens with properties become `AddedToken`."""
    from tokenizers import AddedToken

    def convert(value: Any):
        if isinstance(value, list):
            return [convert(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "content" not in value:
            return {key: convert(one) for key, one in value.items()}
        properties: dict[str, Any] = {key: one for key, one in value.items() if key not in ("__type", "id")}
        return AddedToken(**(properties | flags))

    several = ("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder")
    return {key: convert(value) for key, value in said.items() if key in several or key.endswith("_token")}


def _notes(tokenizer: Tokenizer, settings: Settings, rebuilt: str | None, path: Path) -> Iterator[str]:
    """Notes about files that disagree with each other or with transformers, and which of them is followed."""
    if rebuilt is not None:
        yield (
            f"{path}: for the class {rebuilt!r}, transformers 5 may not use all of tokenizer.json, but build another "
            "tokenizer. Here the file is used; ids may differ where a text begins with a space, or after a special "
            "token. With the tokenizer_class 'TokenizersBackend', transformers uses the file, too"
        )
    for name, said, place, found in (
        ("add_bos_token", settings.add_bos_token, "before", tokenizer.begin),
        ("add_eos_token", settings.add_eos_token, "after", tokenizer.close),
    ):
        if said is not None and said != bool(found):
            yield (
                f"{path}: tokenizer_config.json says {name} = {str(said).lower()}, but tokenizer.json puts "
                f"{tokenizer.inner.decode(found, False) if found else 'nothing'} {place} a text: tokenizer.json is "
                "followed, as in transformers 5"
            )
    if settings.clean_up_tokenization_spaces and type(tokenizer.inner.model).__name__ != "BPE":
        yield f"{path}: clean_up_tokenization_spaces is not applied: text that is written has spaces before punctuation"
    if not tokenizer.end:
        yield (
            f"{path} does not say which token ends a text (eos_token_id in generation_config.json, or in config.json "
            "if there is no such file): generation goes on until it has made the number of tokens asked for"
        )


def _splits_alike(inner: Any, kind: str, settings: Settings, said: dict[str, Any]) -> bool:
    """Whether ``tokenizer.json`` splits a text as the class ``kind`` of transformers 5 does."""
    from tokenizers import pre_tokenizers

    if kind == "LlamaTokenizer":
        scheme = "never" if settings.add_prefix_space is False else "always" if settings.legacy else "first"
        expected = pre_tokenizers.Metaspace("▁", scheme, split=False)
    elif kind == "GPT2Tokenizer":
        expected = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.add_prefix_space))
    else:
        return False
    forms = [one and json.loads(one.__getstate__()) | {"trim_offsets": None} for one in (inner.pre_tokenizer, expected)]
    listed, there = said.get("added_tokens_decoder"), inner.get_added_tokens_decoder()
    return (
        type(inner.model).__name__ == "BPE"
        and (inner.model.byte_fallback, inner.model.fuse_unk) == 2 * (kind == "LlamaTokenizer",)
        and not inner.model.ignore_merges
        and inner.normalizer is None
        and forms[0] == forms[1]
        and (
            listed is None or all(listed.get(str(place), {}).get("special") == there[place].special for place in there)
        )
    )
