"""Checkpoints as Hugging Face writes them: a directory with ``config.json``, safetensors files and a tokenizer.

Every key of ``config.json`` is used as transformers 5 uses it for a Llama, is known to have no influence on the numbers
(`HARMLESS`), or is refused by name. So is every tensor, and every safetensors file of the directory.
"""

import re
import reprlib
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from pydantic import model_validator

from corm_jax.core.positions import Rope
from corm_jax.errors import CheckpointError
from corm_jax.files import read_json
from corm_jax.model import directory_tokenizer
from corm_jax.model.llama import Config
from corm_jax.model.schema import Count, Number, Schema, missing
from corm_jax.model.source import EMBEDDING, HEAD, Source, Tensor

WAY_OUT = "only Llamas are supported (Llama 2 and 3, Vicuna, SmolLM2), in a directory as transformers saves it"

_ABOUT_THE_FILE = "_name_or_path name_or_path _commit_hash transformers_version transformers.js_config unsloth_version "
_ABOUT_THE_FILE += "unsloth_fixed is_llama_config dtype torch_dtype"  # every tensor says its own dtype

_TRAINING = "initializer_range attention_dropout hidden_dropout max_sequence_length pretraining_tp"  # unread since 5.0

_RUNNING = "use_cache return_dict use_return_dict output_attentions output_hidden_states output_scores torchscript "
_RUNNING += "return_dict_in_generate chunk_size_feed_forward attn_implementation _attn_implementation use_bfloat16 "
_RUNNING += "_attn_implementation_autoset _flash_attn_2_enabled is_decoder"

_OF_THE_TOKENIZER = "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id "
_OF_THE_TOKENIZER += "decoder_start_token_id tokenizer_class prefix"

_OF_CLASSIFIERS = "id2label label2id num_labels problem_type finetuning_task task_specific_params"

# Defaults of transformers' generate(); a call of ours says what it wants.
_OF_GENERATE = "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens do_sample "
_OF_GENERATE += "diversity_penalty early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eta_cutoff "
_OF_GENERATE += "epsilon_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id max_length "
_OF_GENERATE += "length_penalty max_new_tokens min_length no_repeat_ngram_size num_assistant_tokens num_beam_groups "
_OF_GENERATE += "num_assistant_tokens_schedule num_beams num_return_sequences remove_invalid_values suppress_tokens "
_OF_GENERATE += "repetition_penalty target_lookbehind temperature top_k top_p typical_p"

HARMLESS = frozenset(
    " ".join((_ABOUT_THE_FILE, _TRAINING, _RUNNING, _OF_THE_TOKENIZER, _OF_CLASSIFIERS, _OF_GENERATE)).split()
)
"""Keys of ``config.json`` that do not enter the forward pass of transformers' ``LlamaForCausalLM``."""


class Scaling(Schema):
    """What stands in ``rope_parameters`` (transformers 5) or ``rope_scaling`` (before)."""

    rope_type: Literal["default", "linear", "llama3"] = missing()
    type: Literal["default", "linear", "llama3"] = missing()
    rope_theta: Number = missing()
    factor: Number = missing()
    low_freq_factor: Number = missing()
    high_freq_factor: Number = missing()
    original_max_position_embeddings: Count = missing()

    only: ClassVar[dict[str, tuple]] = {"partial_rotary_factor": (1,)}

    @model_validator(mode="after")
    def _one_type(self) -> "Scaling":
        if self.rope_type and self.type and self.rope_type != self.type:
            raise ValueError(f"'rope_type' = {self.rope_type!r} and 'type' = {self.type!r} contradict each other")
        return self


class LlamaConfig(Schema):
    """A Llama's ``config.json``. Field by field what transformers' ``LlamaConfig`` means by it."""

    model_type: Literal["llama"]
    architectures: list[Literal["LlamaForCausalLM"]] | None = None
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: Literal["silu", "swish"] = missing("silu")
    max_position_embeddings: Count = missing(2048)
    rms_norm_eps: Number = missing(1e-6)
    tie_word_embeddings: bool = missing(False)
    rope_theta: Number = missing()
    rope_scaling: Scaling | None = None
    rope_parameters: Scaling | None = None
    original_max_position_embeddings: Count = missing()

    only: ClassVar[dict[str, tuple]] = {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_interleaved": (False,),
        "partial_rotary_factor": (1,),
        "use_sliding_window": (False,),
        "is_causal": (True,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_encoder_decoder": (False,),
    }

    @classmethod
    def harmless(cls, key: str) -> bool:
        """Whether a key cannot change what the model computes."""
        return key in HARMLESS

    @model_validator(mode="after")
    def _shape(self) -> "LlamaConfig":
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % kv_heads:
            raise ValueError(f"'num_attention_heads' = {heads} is no multiple of 'num_key_value_heads' = {kv_heads}")
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(f"'hidden_size' = {self.hidden_size} is no multiple of 'num_attention_heads' = {heads}")
        if self.width % 2:
            raise ValueError(
                "'head_dim' (or else 'hidden_size' / 'num_attention_heads') = "
                f"{self.width} is odd: rotary positions turn pairs"
            )
        _ = self.rope
        return self

    @property
    def width(self) -> int:
        """Numbers in the key of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> Rope:
        """The frequencies, from whichever of three places has them; where two differ, that is an error."""
        spellings = {
            key: self._rope(key, value)
            for key in ("rope_parameters", "rope_scaling")
            if (value := getattr(self, key)) is not None and value.model_fields_set
        }
        if len(set(spellings.values())) > 1:
            raise ValueError(
                "'rope_parameters' and 'rope_scaling' contradict each other: "
                + " and ".join(str(getattr(self, key).model_dump(exclude_unset=True)) for key in spellings)
            )
        return next(iter(spellings.values()), None) or self._rope("rope_parameters", Scaling())

    def _rope(self, where: str, scaling: Scaling) -> Rope:
        def either(key: str) -> Any:
            inside, outside = getattr(scaling, key), getattr(self, key)
            if inside is not None and outside is not None and inside != outside:
                raise ValueError(f"'{where}.{key}' = {inside} and {key!r} = {outside} contradict each other")
            return outside if inside is None else inside

        kind = scaling.rope_type or scaling.type or "default"
        found = {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": either("original_max_position_embeddings"),
        }
        needed = {"default": [], "linear": ["factor"], "llama3": list(found)}[kind]
        for key, value in found.items():
            if value is None and key in needed:
                raise ValueError(f"{where!r} has no {key!r}, which rope type {kind!r} needs")
            if value is not None and key not in needed:
                raise ValueError(f"{key!r} = {value} has no meaning for rope type {kind!r}")
        if kind == "llama3" and found["low_freq_factor"] >= found["high_freq_factor"]:
            raise ValueError(
                f"'{where}.low_freq_factor' = {scaling.low_freq_factor} is not below "
                f"'high_freq_factor' = {scaling.high_freq_factor}"
            )
        names = {key: key for key in found} | {"original_max_position_embeddings": "original_context"}
        theta = either("rope_theta")
        return Rope(
            theta=Rope().theta if theta is None else theta, kind=kind, **{names[key]: found[key] for key in needed}
        )

    def config(self) -> Config:
        """The decoder's shape."""
        return Config(
            vocab=self.vocab_size,
            dim=self.hidden_size,
            hidden=self.intermediate_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.width,
            norm_eps=self.rms_norm_eps,
            rope=self.rope,
            tied=self.tie_word_embeddings,
            context=self.max_position_embeddings,
        )

    def assumed(self) -> dict[str, Any]:
        """Numbers that the file does not say, with the values that transformers takes instead."""
        numbers = {key: getattr(self, key) for key in ("rms_norm_eps", "max_position_embeddings")}
        said = self.model_fields_set.union(
            *(part.model_fields_set for part in (self.rope_scaling, self.rope_parameters) if part)
        )
        return {key: value for key, value in {**numbers, "rope_theta": self.rope.theta}.items() if key not in said}


class Index(Schema):
    """``model.safetensors.index.json``: which file holds which tensor."""

    weight_map: dict[str, str]

    @classmethod
    def harmless(cls, key: str) -> bool:
        """Whether a key cannot change what the model computes."""
        return key == "metadata"


def read_config(path: Path) -> LlamaConfig:
    """A ``config.json``.

    Raises:
      CheckpointError: if it is not a Llama's, or says something that the decoder does not do.
    """
    return read_json(path, LlamaConfig, "config", WAY_OUT, CheckpointError)


def open_directory(path: Path, name: str) -> Source:
    """Opens a directory as Hugging Face writes it.

    Raises:
      CheckpointError: for a file that is missing, damaged or not used, or a config that the decoder cannot follow.
    """
    found = read_config(path / "config.json")
    config = found.config()
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path} has an adapter_config.json, and adapters are not read: merge the adapter into the weights"
        )
    notes = [
        f"{path / 'config.json'} has no {key}: {value} is assumed, as transformers does"
        for key, value in found.assumed().items()
    ]
    tensors = _open_tensors(path)
    for key in [key for key in tensors if key.endswith("rotary_emb.inv_freq")]:
        _check_frequencies(path, key, tensors.pop(key), config)
    if config.tied and HEAD in tensors:
        config, note = _untie(path, config, tensors)
        notes += note
    return Source(name, config, tensors, lambda: directory_tokenizer.from_directory(path), notes)


def _open_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a directory, none of them read yet."""
    index = path / "model.safetensors.index.json"
    weight_map: dict[str, str] = {}
    files = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index, Index, "index", WAY_OUT, CheckpointError).weight_map
        files = sorted(set(weight_map.values()))
    for file in files:
        if not re.fullmatch(r"[\w.,=+ -]{1,200}\.safetensors", file):
            raise CheckpointError(f"{index} names {file[:80]!r}, which is no safetensors file in its own directory")
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in files and not file.name.startswith("."):
            owner = index.name if index.exists() else "a checkpoint in one file"
            raise CheckpointError(f"{path} has {file.name}, which is no part of {owner}: move it elsewhere")
    tensors: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for file in files:
        for key, tensor in _open_safetensors(path / file).items():
            if key in tensors:
                raise CheckpointError(f"{path}: tensor {key!r} is both in {owners[key]} and in {file}")
            tensors[key], owners[key] = tensor, file
    for key, file in weight_map.items():
        if owners.get(key) != file:
            raise CheckpointError(f"{index} says that tensor {key!r} is in {file}, where it is not")
    return tensors


DTYPES = ("F64", "F32", "F16", "BF16")


def _open_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise CheckpointError(
            f"{file.parent} lacks {file.name}: only safetensors are read; download or convert the weights"
        )
    try:
        opened = safe_open(file, framework="numpy")
        tensors = {}
        for key in opened.keys():  # noqa: SIM118
            part = opened.get_slice(key)
            if part.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{file}: tensor {key!r} has dtype {part.get_dtype()}: only {', '.join(DTYPES)} are supported; "
                    "take the unquantised checkpoint, or a GGUF file"
                )
            tensors[key] = Tensor(tuple(part.get_shape()), lambda key=key: opened.get_tensor(key))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from None
    return tensors


def _check_frequencies(path: Path, key: str, tensor: Tensor, config: Config) -> None:
    """Raises if frequencies that an older transformers saved are not those of the config, scaled or not."""
    rounding = {np.dtype(np.float16): 0.05, np.dtype(jnp.bfloat16): 0.01}
    stored = tensor.read()
    if stored.shape == (config.head_dim // 2,):
        for rope in (config.rope, Rope(theta=config.rope.theta)):
            expected = rope.frequencies(config.head_dim)
            if np.allclose(stored.astype(np.float32), expected, rtol=rounding.get(stored.dtype, 1e-4), atol=1e-7):
                return
    raise CheckpointError(
        f"{path}: tensor {key!r} = {reprlib.repr(stored.ravel().tolist())} contradicts config.json, where rope_theta = "
        f"{config.rope.theta} and head_dim = {config.head_dim}: correct these, or remove the tensor"
    )


def _untie(path: Path, config: Config, tensors: dict[str, Tensor]) -> tuple[Config, list[str]]:
    """What transformers does with a head in the file of a model whose config ties it to the embedding."""
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = tensors.pop(HEAD)
        return config, []
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if head.shape == embedding.shape and np.array_equal(head.read(), embedding.read()):
        del tensors[HEAD]
        return config, []
    note = f"{path}: config.json ties the head to the embedding, but {HEAD!r} differs from it: the head is used"
    return replace(config, tied=False), [note]


def from_hub(name: str) -> Path:
    """The directory of a hub id's files, downloaded unless the hub library's cache has them.

    Raises:
      CheckpointError: if they cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = [*directory_tokenizer.FILES, "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"model {name!r} is no local path and could not be had from the hub: {reason}") from None
