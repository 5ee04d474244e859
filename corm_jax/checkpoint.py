"""From a name to a model: Hugging Face directories, hub ids, GGUF files, and the default ``smollm2-135m``.

Every source is turned into the same three things, in Hugging Face's spelling: a ``config.json`` dictionary, a set of
named tensors, a tokenizer. One function builds the model from those. Only safetensors and GGUF are read: formats that
can carry code (pickled ``.bin`` files) are not.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from corm_jax import directory_tokenizer
from corm_jax.errors import CheckpointError
from corm_jax.model import Config, Llama
from corm_jax.positions import Rope
from corm_jax.tokenizer import Tokenizer

DEFAULT = "smollm2-135m"


class Source(NamedTuple):
    """A checkpoint that was opened but not yet read, in Hugging Face's spelling."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Callable[[], np.ndarray]]
    tokenizer: Callable[[], Tokenizer]


def load(
    name: str = DEFAULT, dtype: Any = jnp.float32, progress: Callable[[list], Iterable] = iter
) -> tuple[Llama, Tokenizer]:
    """A model with its tokenizer.

    Args:
      name: ``"smollm2-135m"``, a directory with ``config.json`` and safetensors, a ``.gguf`` file, or a hub id such as
        ``"meta-llama/Llama-3.2-1B"``.
      dtype: of parameters, activations and caches: float32 or bfloat16.
      progress: wraps the list of parameters while they are read, to show a bar.

    Raises:
      CheckpointError: for a checkpoint that is missing, damaged or not supported.
    """
    source = open_source(name)
    tokenizer = source.tokenizer()  # refused before the weights are read, if it must be
    return build(source, dtype, progress), tokenizer


def open_source(name: str) -> Source:
    """Finds out what kind of checkpoint a name means, and opens it."""
    from corm_jax import gguf, smollm2

    path = Path(name).expanduser()
    if name == DEFAULT:
        return gguf.open_gguf(smollm2.model_file(), name)
    if path.is_file() and path.suffix == ".gguf":
        return gguf.open_gguf(path, name)
    if path.is_dir():
        return open_directory(path, name)
    if path.exists() or path.suffix in (".gguf", ".bin", ".pt", ".safetensors"):
        why = "is not a GGUF file or a checkpoint's directory" if path.exists() else "does not exist"
        raise CheckpointError(f"model {name!r} {why}")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return open_directory(_from_hub(name), name)
    raise CheckpointError(
        f"unknown model {name!r}: give {DEFAULT!r}, a directory, a .gguf file, or a hub id like 'owner/name'"
    )


def open_directory(path: Path, name: str) -> Source:
    """A directory as Hugging Face writes it: ``config.json``, one or more safetensors files, ``tokenizer.json``."""
    from safetensors import SafetensorError, safe_open

    config = _read_json(path / "config.json")
    index = path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index} has no 'weight_map' of tensor names to file names")
        files = sorted(set(weight_map.values()))
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is not a file name in its own directory")
        if not (path / file).is_file():
            raise CheckpointError(f"{path} lacks {file}: only safetensors are read; download or convert the weights")
        try:
            opened = safe_open(path / file, framework="numpy")
        except SafetensorError as error:
            raise CheckpointError(f"{path / file} is damaged or not a safetensors file: {error}") from None
        tensors |= {key: lambda opened=opened, key=key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return Source(name, config, tensors, lambda: Tokenizer.from_directory(path))


def config_from(source: dict[str, Any]) -> Config:
    """The `Config` of a ``config.json`` dictionary.

    Raises:
      CheckpointError: if it is not LLaMA's architecture, asks for a feature that the decoder lacks, or has no
        usable value for a field.
    """
    kind = source.get("model_type")
    if kind != "llama":
        raise CheckpointError(
            f"architecture {kind!r} is not supported: only 'llama' is (Llama 2 and 3, Vicuna, SmolLM2)"
        )
    for key, supported in _REQUIRED.items():
        if source.get(key, supported) != supported:
            raise CheckpointError(f"config.json has {key}={source[key]!r}: only {supported!r} is supported")

    def positive(key: str, default: Any = None, kind: type = int) -> Any:
        value = source.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < math.inf:
            what = "whole number" if kind is int else "number"
            raise CheckpointError(f"config.json needs a positive {what} for {key!r}, not {value!r}")
        return value

    heads, dim = positive("num_attention_heads"), positive("hidden_size")
    config = Config(
        vocab=positive("vocab_size"),
        dim=dim,
        hidden=positive("intermediate_size"),
        layers=positive("num_hidden_layers"),
        heads=heads,
        kv_heads=positive("num_key_value_heads", heads),
        head_dim=positive("head_dim", dim // heads),
        norm_eps=positive("rms_norm_eps", 1e-6, float),
        rope=Rope.from_config(source),
        tied=bool(source.get("tie_word_embeddings", False)),
        context=positive("max_position_embeddings", 2048),
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise CheckpointError(
            f"config.json has {config.heads} heads, {config.kv_heads} key-value heads and head_dim {config.head_dim}: "
            "heads must be a multiple of key-value heads, and head_dim even"
        )
    return config


_REQUIRED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}


def build(source: Source, dtype: Any = jnp.float32, progress: Callable[[list], Iterable] = iter) -> Llama:
    """The model of an opened checkpoint, every tensor checked for name, shape and finite values."""
    config = config_from(source.config)
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0))))
    parameters = dict(nnx.to_flat_state(state))
    names = {path: _tensor_name(path) for path in parameters}
    unknown = [name for name in source.tensors.keys() - set(names.values()) if not _ignorable(name, config)]
    if unknown:
        raise CheckpointError(f"{source.name}: tensor {min(unknown)!r} has no place in a llama decoder")
    for path in progress(list(parameters)):
        name, expected = names[path], parameters[path]
        if name not in source.tensors:
            raise CheckpointError(f"{source.name}: tensor {name!r} is missing")
        value = source.tensors[name]()
        value = value.T if path[-1] == "kernel" else value
        if value.shape != expected.shape:
            raise CheckpointError(f"{source.name}: {name!r} has shape {value.shape[::-1]}, not {expected.shape[::-1]}")
        if not np.isfinite(value).all():
            raise CheckpointError(f"{source.name}: {name!r} contains NaN or infinity")
        parameters[path] = expected.replace(jnp.asarray(value, dtype))
    return nnx.merge(graph, nnx.from_flat_state(parameters))


_NAMES = {
    ("embed", "embedding"): "model.embed_tokens",
    ("norm", "scale"): "model.norm",
    ("head", "kernel"): "lm_head",
    ("attention_norm", "scale"): "input_layernorm",
    ("attention", "q", "kernel"): "self_attn.q_proj",
    ("attention", "k", "kernel"): "self_attn.k_proj",
    ("attention", "v", "kernel"): "self_attn.v_proj",
    ("attention", "out", "kernel"): "self_attn.o_proj",
    ("feed_forward_norm", "scale"): "post_attention_layernorm",
    ("feed_forward", "gate", "kernel"): "mlp.gate_proj",
    ("feed_forward", "up", "kernel"): "mlp.up_proj",
    ("feed_forward", "down", "kernel"): "mlp.down_proj",
}


def _tensor_name(path: tuple) -> str:
    if path[0] == "layers":
        return f"model.layers.{path[1]}.{_NAMES[path[2:]]}.weight"
    return f"{_NAMES[path]}.weight"


def _ignorable(name: str, config: Config) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = [*directory_tokenizer.FILES, "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"model {name!r} is no local path and could not be had from the hub: {reason}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: not a checkpoint's directory") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content
