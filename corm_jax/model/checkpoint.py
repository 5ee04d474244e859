"""From a name to a model: Hugging Face directories, hub ids, GGUF files, and two models that are known by name.

Every source is turned into the same three things: a `Config`, a set of tensors, a tokenizer. One function builds the
model from those. Only safetensors and GGUF are read: formats that can carry code (pickled ``.bin`` files) are not.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from corm_jax.errors import CheckpointError, CheckpointWarning, CormError
from corm_jax.model.named import DEFAULT, MODELS, model_file
from corm_jax.model.places import Place
from corm_jax.model.source import Source
from corm_jax.model.tokenizer import Tokenizer
from corm_jax.model.transformer import Transformer


def load(
    name: str = DEFAULT,
    dtype: Any = jnp.float32,
    progress: Callable[[list], Iterable] = iter,
    *,
    context: int | None = None,
) -> tuple[Transformer, Tokenizer]:
    """A model with its tokenizer.

    What a checkpoint leaves open, and what is assumed then, is said in a `CheckpointWarning`.

    Args:
      name: ``"smollm2-135m"`` or ``"gemma-3-270m"``, a directory with ``config.json`` and safetensors, a ``.gguf``
        file, or a hub id such as ``"meta-llama/Llama-3.2-1B"``.
      dtype: of parameters, activations and caches: float32, bfloat16 or float16.
      progress: wraps the list of parameters while they are read, to show a bar.
      context: how many tokens will be read at most. It matters only to LongRoPE (Phi-3), which reads every token
        otherwise if the text is longer than the model's original context; by default it is not.

    Raises:
      CheckpointError: for a checkpoint that is missing, damaged or not supported.
    """
    dtype = _dtype(dtype)
    source = open_source(name, context)
    for note in source.notes:
        warnings.warn(note, CheckpointWarning, stacklevel=2)
    tokenizer = source.tokenizer()  # before the weights, which take much longer
    return build(source, dtype, progress), tokenizer


def open_source(name: str, context: int | None = None) -> Source:
    """Finds out what kind of checkpoint a name means, and opens it."""
    from corm_jax.model import gguf, huggingface  # which need packages that the decoder does without

    if name in MODELS:
        return gguf.open_gguf(model_file(name), name, context)
    try:
        path = Path(name).expanduser()
        is_file, is_directory, exists = path.is_file(), path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home directory that nobody has
        raise CheckpointError(f"model {name[:80]!r} is no path: {error}") from None
    if is_file and path.suffix == ".gguf":
        return gguf.open_gguf(path, name, context)
    if is_directory:
        return huggingface.open_directory(path, name, context)
    if exists or path.suffix in (".gguf", ".bin", ".pt", ".safetensors"):
        why = "is not a GGUF file or a checkpoint's directory" if exists else "does not exist"
        raise CheckpointError(f"model {name!r} {why}")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return huggingface.open_directory(huggingface.from_hub(name), name, context)
    known = ", ".join(map(repr, MODELS))
    raise CheckpointError(
        f"unknown model {name!r}: give {known}, a directory, a .gguf file, or a hub id like 'owner/name'"
    )


def build(source: Source, dtype: Any = jnp.float32, progress: Callable[[list], Iterable] = iter) -> Transformer:
    """The model of an opened checkpoint, every tensor checked for name, shape and finite values.

    Names and shapes are checked before anything is allocated or traced.

    Raises:
      CheckpointError: for a tensor that is missing, has another shape or no place, or holds NaN or infinity.
      CormError: for a dtype in which the decoder does not compute.
    """
    dtype = _dtype(dtype)
    places = _check(source)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(source.config, dtype=dtype, rngs=nnx.Rngs(0))))
    parameters = dict(nnx.to_flat_state(state))
    for path in progress(list(parameters)):
        place, parameter = places[path], parameters[path]
        value = place.take(source.tensors[place.name].read())
        with np.errstate(over="ignore"):
            value = value.astype(parameter.get_value().dtype)
        if not np.isfinite(value).all():
            raise CheckpointError(
                f"{source.name}: {place.name!r} contains NaN or infinity, or a number beyond {value.dtype}"
            )
        parameters[path] = parameter.replace(jnp.asarray(value))
    return nnx.merge(graph, nnx.from_flat_state(parameters))


def _dtype(dtype: Any) -> np.dtype:
    supported = [np.dtype(one) for one in (jnp.float32, jnp.bfloat16, jnp.float16)]
    try:
        return supported[supported.index(np.dtype(dtype))]
    except (TypeError, ValueError):
        raise CormError(f"a model's dtype is float32, bfloat16 or float16, not {dtype!r}") from None


def _check(source: Source) -> dict[tuple, Place]:
    """Where each parameter comes from: all tensors are there with the right shape, and no others."""
    config, tensors = source.config, source.tensors
    # A file of n tensors cannot hold more than n layers, however many the config says.
    layers = min(config.layers, len(tensors) + 1)
    places = list(source.places(replace(config, layers=layers, windows=config.windows[:layers])))
    if unknown := tensors.keys() - {place.name for place in places}:
        raise CheckpointError(f"{source.name}: tensor {min(unknown)!r} has no place in the decoder")
    for path, name, shape, _ in places:
        if name not in tensors:
            why = " and the config does not say 'tie_word_embeddings'" if path[0] == "head" else ""
            raise CheckpointError(f"{source.name}: tensor {name!r} is missing{why}")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{source.name}: tensor {name!r} has shape {tensors[name].shape}, "
                f"where {shape} is expected from the configuration"
            )
    for rope in (config.rope, config.local_rope):
        with np.errstate(all="ignore"):
            if rope is not None and not np.isfinite(rope.frequencies(config.head_dim)).all():
                raise CheckpointError(f"{source.name}: {rope} has frequencies that are not finite")
    return {place.path: place for place in places}
