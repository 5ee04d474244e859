"""Arrays of NumPy, JAX and torch, whole or as a tuple over layers, converted to float arrays of NumPy.

>>> layers, _ = by_layer("probs", tuple(np.ones((1, 6, 9, 9)) for _ in range(2)), 3)      # as transformers has them
>>> [layer.shape for layer in layers]
[(6, 9, 9), (6, 9, 9)]
"""

import reprlib
from typing import Any

import ml_dtypes
import numpy as np

from corm_jax.errors import CormError

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class TraceError(CormError):
    """A trace that cannot be read, made or written: the message names the file, the field and the expected value."""


def require(good: bool, name: str, expected: str, value: Any) -> None:
    """Raises a `TraceError` unless ``good``."""
    if not good:
        raise TraceError(f"{name} must be {expected}, not {reprlib.repr(value)}")


def floats(name: str, value: Any) -> np.ndarray:
    """A value as a float array of NumPy, copied only if its library requires that. Torch tensors may be on any device.

    Raises:
      TraceError: if the value is not an array, or its dtype is not a float of 16 bits or more.
    """
    try:
        array = _of_torch(value) if hasattr(value, "detach") else np.asarray(value)
    except Exception as error:  # each library raises its own errors, such as for sparse or traced arrays
        raise TraceError(f"{name} is no array: {' '.join(str(error).split())[:200]}") from None
    if array.dtype == object:
        raise TraceError(f"{name} must be an array of floats, not {_kind(value)}")
    require(array.dtype.kind == "f" or array.dtype.name in DTYPES, f"{name}'s dtype", "a float", array.dtype.name)
    return array


def by_layer(name: str, value: Any, axes: int) -> tuple[list[np.ndarray], bool]:
    """The layers of an array ``[layers, ...]``, or of a list or tuple of one array a layer.

    Args:
      name: the name of the value in error messages.
      value: the layers; each may have a batch axis of size 1 in front.
      axes: the number of axes of a layer, without the batch axis.

    Returns:
      An array without batch axis for each layer, and whether there was a batch axis.

    Raises:
      TraceError: if a layer is not an array, for another number of axes, no layers, or a batch of several texts.
    """
    if isinstance(value, list | tuple):
        for index, layer in enumerate(value):
            if isinstance(layer, list | tuple) and any(hasattr(part, "shape") for part in layer):
                raise TraceError(
                    f"layer {index} of {name} is itself a {type(layer).__name__} of arrays, as transformers' "
                    "generate() returns them, token by token: call the model once on the whole text"
                )
        layers = [floats(f"layer {index} of {name}", layer) for index, layer in enumerate(value)]
    else:
        whole = floats(name, value)
        require(whole.ndim in (axes + 1, axes + 2), f"{name}'s shape", f"of {axes + 1} axes", whole.shape)
        layers = list(whole)
    if not layers:
        raise TraceError(f"{name} has no layers: give at least one")
    for index, layer in enumerate(layers):
        where = f"layer {index} of {name}"
        require(layer.ndim in (axes, axes + 1), f"{where}: the shape", f"of {axes} axes", layer.shape)
        if layer.ndim > axes and len(layer) != 1:
            raise TraceError(
                f"{where} holds a batch of {len(layer)} texts, a trace holds one: give layer[row : row + 1] of each"
            )
    batched = [layer.ndim > axes for layer in layers]
    return [layer[0] if batch else layer for layer, batch in zip(layers, batched, strict=True)], any(batched)


def _of_torch(tensor: Any) -> np.ndarray:
    """Converts without importing torch. NumPy itself has no bfloat16; the conversion by way of float32 is exact."""
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
