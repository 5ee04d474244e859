"""From a name to a model: Hugging Face directories, hub ids, GGUF files, and the default ``smollm2-135m``.

Every source is turned into the same three things: a `Config`, a set of tensors, a tokenizer. One function builds the
model from those. Only safetensors and GGUF are read: formats that can carry code (pickled ``.bin`` files) are not.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from corm_jax.errors import CheckpointError, CheckpointWarning, CormError
from corm_jax.model.llama import Config, Llama
from corm_jax.model.source import EMBEDDING, HEAD, Source
from corm_jax.model.tokenizer import Tokenizer

DEFAULT = "smollm2-135m"


def load(
    name: str = DEFAULT, dtype: Any = jnp.float32, progress: Callable[[list], Iterable] = iter
) -> tuple[Llama, Tokenizer]:
    """A model with its tokenizer.

    What a checkpoint leaves open, and what is assumed then, is said in a `CheckpointWarning`.

    Args:
      name: ``"smollm2-135m"``, a directory with ``config.json`` and safetensors, a ``.gguf`` file, or a hub id such as
        ``"meta-llama/Llama-3.2-1B"``.
      dtype: of parameters, activations and caches: float32, bfloat16 or float16.
      progress: wraps the list of parameters while they are read, to show a bar.

    Raises:
      CheckpointError: for a checkpoint that is missing, damaged or not supported.
    """
    dtype = _dtype(dtype)
    source = open_source(name)
    for note in source.notes:
        warnings.warn(note, CheckpointWarning, stacklevel=2)
    tokenizer = source.tokenizer()  # before the weights, which take much longer
    return build(source, dtype, progress), tokenizer


def open_source(name: str) -> Source:
    """Finds out what kind of checkpoint a name means, and opens it."""
    from corm_jax.model import gguf, huggingface, smollm2  # which need packages that the decoder does without

    if name == DEFAULT:
        return gguf.open_gguf(smollm2.model_file(), name)
    try:
        path = Path(name).expanduser()
        is_file, is_directory, exists = path.is_file(), path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home directory that nobody has
        raise CheckpointError(f"model {name[:80]!r} is no path: {error}") from None
    if is_file and path.suffix == ".gguf":
        return gguf.open_gguf(path, name)
    if is_directory:
        return huggingface.open_directory(path, name)
    if exists or path.suffix in (".gguf", ".bin", ".pt", ".safetensors"):
        why = "is not a GGUF file or a checkpoint's directory" if exists else "does not exist"
        raise CheckpointError(f"model {name!r} {why}")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return huggingface.open_directory(huggingface.from_hub(name), name)
    raise CheckpointError(
        f"unknown model {name!r}: give {DEFAULT!r}, a directory, a .gguf file, or a hub id like 'owner/name'"
    )


def build(source: Source, dtype: Any = jnp.float32, progress: Callable[[list], Iterable] = iter) -> Llama:
    """The model of an opened checkpoint, every tensor checked for name, shape and finite values.

    Names and shapes are checked before anything is allocated or traced.

    Raises:
      CheckpointError: for a tensor that is missing, has another shape or no place, or holds NaN or infinity.
      CormError: for a dtype in which the decoder does not compute.
    """
    dtype = _dtype(dtype)
    names = _check(source)
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(source.config, dtype=dtype, rngs=nnx.Rngs(0))))
    parameters = dict(nnx.to_flat_state(state))
    for path in progress(list(parameters)):
        value = source.tensors[names[path]].read()
        value = value.T if path[-1] == "kernel" else value
        with np.errstate(over="ignore"):
            value = value.astype(dtype)
        if not np.isfinite(value).all():
            raise CheckpointError(
                f"{source.name}: {names[path]!r} contains NaN or infinity, or a number beyond {dtype}"
            )
        parameters[path] = parameters[path].replace(jnp.asarray(value))
    return nnx.merge(graph, nnx.from_flat_state(parameters))


def _dtype(dtype: Any) -> np.dtype:
    supported = [np.dtype(one) for one in (jnp.float32, jnp.bfloat16, jnp.float16)]
    try:
        return supported[supported.index(np.dtype(dtype))]
    except (TypeError, ValueError):
        raise CormError(f"a model's dtype is float32, bfloat16 or float16, not {dtype!r}") from None


def _check(source: Source) -> dict[tuple, str]:
    """The name of each parameter's tensor, all of which are there with the right shape, and no others."""
    config, tensors = source.config, source.tensors
    # A file of n tensors cannot hold more than n layers, however many the config says.
    bounded = replace(config, layers=min(config.layers, len(tensors) + 1))
    places = {source.spelling(name): (path, shape) for path, name, shape in _places(bounded)}
    if unknown := tensors.keys() - places.keys():
        raise CheckpointError(f"{source.name}: tensor {min(unknown)!r} has no place in a llama decoder")
    for name, (_, shape) in places.items():
        if name not in tensors:
            why = " and the config does not say 'tie_word_embeddings'" if name == HEAD else ""
            raise CheckpointError(f"{source.name}: tensor {name!r} is missing{why}")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{source.name}: tensor {name!r} has shape {tensors[name].shape}, "
                f"where {shape} is expected from the configuration"
            )
    with np.errstate(all="ignore"):
        if not np.isfinite(config.rope.frequencies(config.head_dim)).all():
            raise CheckpointError(f"{source.name}: {config.rope} has frequencies that are not finite")
    return {path: name for name, (path, _) in places.items()}


def _places(config: Config) -> Iterator[tuple[tuple, str, tuple[int, ...]]]:
    """Each parameter of the decoder: its path, and its tensor's name and shape as Hugging Face has them."""
    dim, hidden = config.dim, config.hidden
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = {
        ("attention_norm", "scale"): ("input_layernorm", (dim,)),
        ("attention", "q", "kernel"): ("self_attn.q_proj", (queries, dim)),
        ("attention", "k", "kernel"): ("self_attn.k_proj", (keys, dim)),
        ("attention", "v", "kernel"): ("self_attn.v_proj", (keys, dim)),
        ("attention", "out", "kernel"): ("self_attn.o_proj", (dim, queries)),
        ("feed_forward_norm", "scale"): ("post_attention_layernorm", (dim,)),
        ("feed_forward", "gate", "kernel"): ("mlp.gate_proj", (hidden, dim)),
        ("feed_forward", "up", "kernel"): ("mlp.up_proj", (hidden, dim)),
        ("feed_forward", "down", "kernel"): ("mlp.down_proj", (dim, hidden)),
    }
    yield ("embedding", "embedding"), EMBEDDING, (config.vocab, dim)
    yield ("norm", "scale"), "model.norm.weight", (dim,)
    if not config.tied:
        yield ("head", "kernel"), HEAD, (config.vocab, dim)
    for index in range(config.layers):
        for path, (name, shape) in layer.items():
            yield ("layers", index, *path), f"model.layers.{index}.{name}.weight", shape
