"""Traces: the attention of a model while it reads one text, layer by layer, in memory or on disk.

Axis names: ``layers``; ``steps``, the queries and keys in order; ``q_heads``; ``kv_heads``, where query heads
``h * group`` to ``h * group + group - 1`` share key-value head ``h``; ``head_dim``.

>>> import tempfile
>>> rng = np.random.default_rng(0)
>>> q, k, v = (rng.normal(size=(2, 5, heads, 8)) for heads in (4, 2, 2))
>>> with tempfile.TemporaryDirectory() as folder:
...     Trace.from_qkv(q, k, v, model="noise").save(f"{folder}/noise", dtype="bfloat16")
...     trace = Trace.open(f"{folder}/noise")
...     print(trace.meta.model, trace.meta.group, trace.layer(1).k.shape, trace.part(steps=3).layer(0).q.shape)
noise 2 (5, 2, 8) (3, 4, 8)
"""

import dataclasses
import os
import reprlib
from collections.abc import Callable, Sequence

import numpy as np

from corm_jax.showing.brief import line, table
from corm_jax.traces.arrays import DTYPES, TraceError, by_layer, require
from corm_jax.traces.meta import QKV, Meta, Rows, layer_of, whole_number
from corm_jax.traces.storage import Writer, reader


class Trace:
    """The attention of a model while it reads one text. Each call of `layer` reads that layer from its source.

    Made by `from_qkv`, `from_attention`, `open` and `part`. Its arrays are read-only.
    """

    def __init__(self, meta: Meta, read: Callable[[int], QKV | Rows]):
        self.meta, self._read = meta, read

    def __repr__(self) -> str:
        return line("Trace", **{name: reprlib.repr(value) for name, value in self._summary.items()})

    def _repr_html_(self) -> str:
        return table("Trace", self._summary)

    @property
    def _summary(self) -> dict[str, object]:
        names = ("kind", "model", "layers", "steps", "q_heads", "kv_heads", "head_dim", "softcap", "slopes", "local")
        shown = {name: getattr(self.meta, name) for name in names}
        return {name: value for name, value in shown.items() if value not in (None, "", ())}

    def layer(self, index: int) -> QKV | Rows:
        """Layer ``index``, counted from 0, in float32: a `QKV` or a `Rows`, depending on the kind of the trace.

        Raises:
          TraceError: for an index out of range; for a file that is damaged or does not match ``meta``.
        """
        return self._read(whole_number("layer", index, 0, self.meta.layers - 1))

    @classmethod
    def from_qkv(
        cls,
        q,
        k,
        v,
        *,
        heads_first=None,
        scale=None,
        softcap=None,
        slopes=None,
        windows=None,
        model="",
        tokens=None,
        pieces=None,
    ) -> "Trace":
        """A trace of arrays in memory, copied only if they are not contiguous float32 arrays of NumPy.

        Arrays may be NumPy's, JAX's or torch's, on any device, of any float dtype. Each is one array for all layers, or
        a list or tuple of one array a layer, which may have a batch axis of 1 in front. For a whole model of
        `transformers` see `simulator.huggingface.record`.

        Args:
          q: ``[layers, steps, q_heads, head_dim]``, rotated.
          k, v: ``[layers, steps, kv_heads, head_dim]``.
          heads_first: True if the heads come before the steps, as in torch's and transformers'
            ``[1, heads, steps, head_dim]``. Required if there is a batch axis, since both orders are in use.
          scale, softcap, slopes, windows, model, tokens, pieces: see `Meta`.

        Raises:
          TraceError: for shapes that do not fit each other, other dtypes, batches of several texts, NaN and infinity.
        """
        given, arrays = {"q": q, "k": k, "v": v}, {}
        for name, value in given.items():
            layers, batched = by_layer(name, value, 3)
            if batched and heads_first is None:
                raise TraceError(
                    f"{name} has a batch axis, {layers[0][None].shape}: say heads_first=True if that is "
                    "[1, heads, steps, head_dim], as in transformers, or heads_first=False if steps come before heads"
                )
            arrays[name] = [layer.swapaxes(0, 1) for layer in layers] if heads_first else layers
        steps, q_heads, head_dim = arrays["q"][0].shape
        axes = {"layers": len(arrays["q"]), "steps": steps, "q_heads": q_heads, "head_dim": head_dim}
        hint = f"of {steps} steps, as q's (heads_first=True if heads come before steps)"
        require(len(arrays["k"][0]) == steps, "k's shape", hint, arrays["k"][0].shape)
        axes["kv_heads"] = arrays["k"][0].shape[1]
        form = {"scale": scale, "softcap": softcap, "slopes": slopes, "windows": windows}
        meta = Meta(kind="qkv", model=model, tokens=tokens, pieces=pieces, **form, **axes)
        return cls(meta, _layers(meta, **arrays).__getitem__)

    @classmethod
    def from_attention(cls, probs, *, kv_heads=None, windows=None, model="", tokens=None, pieces=None) -> "Trace":
        """A trace of attention rows in memory, copied only if they are not contiguous float32 arrays of NumPy.

        Args:
          probs: ``[layers, q_heads, steps, steps]``, see `Rows`; or a list or tuple of one array a layer, which may
            have a batch axis of 1 in front, as in transformers' ``output.attentions``. NumPy's, JAX's or torch's, on
            any device, of any float dtype. A 16-bit dtype becomes ``meta.dtype``, since the error of a row's
            sum depends on it.
          kv_heads: by default ``q_heads``.
          windows, model, tokens, pieces: see `Meta`.

        Raises:
          TraceError: for another shape or dtype, batches of several texts, NaN, infinity, and rows that are not
            causal probabilities, or not 0 outside of a layer's window.

        >>> rows = np.tril(np.ones((1, 2, 3, 3))) / np.arange(1, 4)[:, None]        # a batch of 1, 2 heads, 3 steps
        >>> Trace.from_attention((rows, rows), kv_heads=1)
        Trace(kind='attention', layers=2, steps=3, q_heads=2, kv_heads=1)
        """
        none = probs is None or (isinstance(probs, list | tuple) and (not probs or any(one is None for one in probs)))
        if none:
            raise TraceError(
                "the model returned no attentions: load it with attn_implementation='eager', and call it with "
                "output_attentions=True"
            )
        layers, _ = by_layer("probs", probs, 3)
        heads, steps, _ = layers[0].shape
        kinds = sorted({layer.dtype.name for layer in layers})
        require(len(kinds) == 1, "probs's dtype", "the same in all layers", " and ".join(kinds))
        axes = {"layers": len(layers), "steps": steps, "q_heads": heads}
        axes["kv_heads"] = heads if kv_heads is None else kv_heads
        dtype = kinds[0] if kinds[0] in DTYPES else "float32"
        meta = Meta(kind="attention", dtype=dtype, windows=windows, model=model, tokens=tokens, pieces=pieces, **axes)
        return cls(meta, _layers(meta, probs=layers).__getitem__)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Trace":
        """The trace in a directory: reads ``meta.json``, and checks that the file of each layer is complete.

        Raises:
          TraceError: for anything but a complete trace.
        """
        return cls(*reader(path))

    def part(self, *, layers: Sequence[int] | None = None, steps: int | None = None) -> "Trace":
        """A view of some layers, in the given order, and of the first steps. `layer` reads from the same source.

        Raises:
          TraceError: for layers or steps that the trace does not have, or for no layers or steps.
        """
        old = self.meta
        numbers = range(old.layers) if layers is None else layers
        chosen = [whole_number("layer", i, 0, old.layers - 1) for i in numbers]
        stop = old.steps if steps is None else whole_number("steps", steps, 1, old.steps)
        cut = {name: getattr(old, name) and getattr(old, name)[:stop] for name in ("tokens", "pieces", "positions")}

        def read(index: int) -> QKV | Rows:
            layer = self._read(chosen[index])
            if isinstance(layer, Rows):
                return Rows(layer.probs[:, :stop, :stop])
            return QKV(*(array[:stop] for array in layer))

        windows = old.windows and tuple(old.windows[layer] for layer in chosen)
        return Trace(dataclasses.replace(old, layers=len(chosen), steps=stop, windows=windows, **cut), read)

    def save(self, path: str | os.PathLike, dtype: str | None = None) -> None:
        """Writes the trace to a new directory, its values rounded to ``dtype``, by default ``meta.dtype``.

        Raises:
          TraceError: as `corm_jax.traces.storage.Writer`.
        """
        # Never resumed: an incomplete trace with the same meta may hold other values.
        meta = self.meta if dtype is None else dataclasses.replace(self.meta, dtype=dtype)
        with Writer(path, meta, resume=False) as writer:
            for index in range(self.meta.layers):
                writer.write(**self.layer(index)._asdict())


def _layers(meta: Meta, **arrays: list[np.ndarray]) -> list[QKV | Rows]:
    for name, layers in arrays.items():
        require(len(layers) == meta.layers, f"{name}'s layers", str(meta.layers), len(layers))
    each = [dict(zip(arrays, layer, strict=True)) for layer in zip(*arrays.values(), strict=True)]
    return [layer_of(f"layer {index}", index, meta, layer) for index, layer in enumerate(each)]
