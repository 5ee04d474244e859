"""Which tensor of a checkpoint each parameter of the decoder is read from, whatever the tensors are called there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from corm_jax.model.transformer import Config

SUFFIX = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


class Place(NamedTuple):
    """Where a parameter comes from.

    Attributes:
      path: the parameter, as `flax.nnx` names it.
      name: the tensor in the file.
      shape: of the tensor.
      take: makes the parameter from the tensor.
    """

    path: tuple
    name: str
    shape: tuple[int, ...]
    take: Callable[[np.ndarray], np.ndarray]


def parameters(config: Config) -> Iterator[tuple[tuple, tuple[int, ...]]]:
    """The parameters of the decoder and their shapes; matrices are ``[in, out]``."""
    dim, hidden = config.dim, config.hidden
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    feed_forward = {"gate": (dim, hidden)} if config.gated else {}
    feed_forward |= {"up": (dim, hidden), "down": (hidden, dim)}
    attention = {"q": (dim, queries), "k": (dim, keys), "v": (dim, keys), "out": (queries, dim)}

    def norm(*path: str | int, size: int = dim, kind: str = config.norm):
        for name in ("scale", "bias") if kind == "layer" else ("scale",):
            yield (*path, name), (size,)

    def linear(*path: str | int, shape: tuple[int, int], bias: bool):
        yield (*path, "kernel"), shape
        if bias:
            yield (*path, "bias"), shape[1:]

    yield ("embedding", "embedding"), (config.vocab, dim)
    if config.learned:
        yield ("learned", "embedding"), (config.context, dim)
    if config.embedding_norm:
        yield from norm("embedding_norm")
    yield from norm("norm")
    if not config.tied:
        yield ("head", "kernel"), (dim, config.vocab)
    for index in range(config.layers):
        layer = ("layers", index)
        for name in ("attention_norm", "feed_forward_norm"):
            yield from norm(*layer, name)
        for name in ("after_attention", "after_feed_forward") if config.norm_after else ():
            yield from norm(*layer, name)
        for name, shape in attention.items():
            bias = config.out_bias if name == "out" else config.qkv_bias
            yield from linear(*layer, "attention", name, shape=shape, bias=bias)
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            yield from norm(*layer, "attention", name, size=config.head_dim, kind="rms")
        for name, shape in feed_forward.items():
            yield from linear(*layer, "feed_forward", name, shape=shape, bias=config.feed_forward_bias)


@dataclass(frozen=True)
class Names:
    """How a kind of checkpoint names its tensors, and how they differ from the decoder's parameters.

    Attributes:
      model: names of what belongs to no layer: ``embedding``, ``learned``, ``embedding_norm``, ``norm``, ``head``.
      layer: names within a layer, of ``attention_norm``, ``attention.q`` and so on.
      layers: what stands before the name within layer ``{}``.
      fused: tensors that hold several matrices, one below the other: their names, and the names of the parts.
      by_head: whether fused rows are sorted by head first: ``[heads, parts, head_dim]``.
      inputs_first: whether matrices of layers are ``[in, out]``; by default they are ``[out, in]``.
      offset: what is added to the scale of each norm.
      padding: rows of the table of learned positions before that of position 0.
    """

    model: dict[str, str]
    layer: dict[str, str]
    layers: str
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    by_head: bool = False
    inputs_first: bool = False
    offset: float = 0.0
    padding: int = 0

    def places(self, config: Config) -> Iterator[Place]:
        """Where each parameter of the decoder comes from."""
        shapes = dict(parameters(config))
        part_of = {part: (name, parts) for name, parts in self.fused.items() for part in parts}
        for path, shape in shapes.items():
            *_, kind = path
            in_layer = path[0] == "layers"
            inner = ".".join(path[2:-1] if in_layer else path[:-1])
            before = self.layers.format(path[1]) if in_layer else ""
            turned = kind == "kernel" and not (in_layer and self.inputs_first)
            if inner in part_of:
                name, parts = part_of[inner]
                siblings = [(*path[:2], *part.split("."), kind) for part in parts]
                sizes = [shapes[one][-1] for one in siblings]
                index, whole = parts.index(inner), (*shape[:-1], sum(sizes))
                heads = config.heads if self.by_head else None
                take = partial(_part, index=index, sizes=sizes, heads=heads, turned=kind == "kernel" and not turned)
            else:
                name, whole, take = (self.layer if in_layer else self.model)[inner], shape, np.asarray
            if kind == "scale" and self.offset:
                take = self._with_offset
            if inner == "learned":
                whole, take = (shape[0] + self.padding, shape[1]), self._without_padding
            stored = whole[::-1] if turned else whole
            yield Place(path, f"{before}{name}.{SUFFIX[kind]}", stored, partial(_turned, take) if turned else take)

    def _with_offset(self, scale: np.ndarray) -> np.ndarray:
        return scale.astype(np.float32) + np.float32(self.offset)

    def _without_padding(self, table: np.ndarray) -> np.ndarray:
        return table[self.padding :]


def _turned(take: Callable[[np.ndarray], np.ndarray], tensor: np.ndarray) -> np.ndarray:
    """A matrix ``[in, out]`` of one stored as ``[out, in]``."""
    return take(tensor).T


def _part(tensor: np.ndarray, *, index: int, sizes: list[int], heads: int | None, turned: bool) -> np.ndarray:
    """One of several matrices or biases that are stored together; ``turned`` if they are stored side by side."""
    rows = tensor.T if turned else tensor
    if heads is None:
        start = sum(sizes[:index])
        found = rows[start : start + sizes[index]]
    else:
        found = rows.reshape(heads, len(sizes), -1, *rows.shape[1:])[:, index].reshape(sizes[index], *rows.shape[1:])
    return found.T if turned else found
