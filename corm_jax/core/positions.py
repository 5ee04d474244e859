"""How positions enter attention: rotary embedding (RoFormer, arXiv 2104.09864), a bias (ALiBi, arXiv 2108.12409), both.

Both take the true position of a token, never the slot or the number of keys kept: after eviction the relative distances
are still those of the text, unless the policy counts ``positions`` within the cache (`corm_jax.core.policy.Traits`).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from corm_jax.core.layout import Layout
from corm_jax.errors import CormError


class Rope(NamedTuple):
    """The frequencies of a rotary embedding. Fields as in a checkpoint's ``rope_scaling``.

    Without scaling, pair j of a head turns by ``theta ** (-2 j / dim)`` radians a token, ``dim`` the numbers of a head
    that are rotated.

    Attributes:
      theta: the base.
      kind: how a model was made to read more than it was first trained on.
        ``"default"``: not at all.
        ``"linear"`` divides every frequency by ``factor`` (arXiv 2306.15595).
        ``"dynamic"`` raises the base at positions p from ``original_context`` L on, so that the lowest frequency is
        divided by ``s = factor (p + 1) / L - (factor - 1)`` and the highest stays: ``theta s ** (dim / (dim - 2))``.
        ``"yarn"`` divides by ``factor`` what turns less than ``beta_slow`` times in ``original_context`` positions,
        keeps what turns more than ``beta_fast`` times, and blends in between by pair (arXiv 2309.00071, section 3.2).
        ``"llama3"`` divides the frequencies with a wavelength above ``original_context / low_freq_factor``, keeps those
        below ``original_context / high_freq_factor``, and blends in between (Llama 3.1 reference code).
        ``"divisors"`` divides each by its own of ``divisors``, as a GGUF file says it, and LongRoPE (arXiv 2402.13753).
      longer: for LongRoPE: the ``divisors`` with which texts of more than ``original_context`` tokens have to be read,
        from their first token on; see `beyond`.
      truncated: for ``"yarn"``: whether the pairs at which blending begins and ends are rounded to whole pairs.
      amplitude: rotated queries and keys are multiplied by this (YaRN, LongRoPE).
      rotated: the share of a head that is rotated, its first numbers (GPT-NeoX: 0.25); the rest has no position.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3", "divisors"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    divisors: tuple[float, ...] = ()
    longer: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncated: bool = True
    amplitude: float = 1.0
    rotated: float = 1.0

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a token for each pair that is rotated: float32 ``[pairs]``. Dynamic: before ``original_context``."""
        dim = self.dim(head_dim)
        base = self.theta ** -(np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
        if self.kind == "linear":
            base = base / self.factor
        if self.kind == "divisors":
            base = base / np.asarray(self.divisors, np.float32)
        if self.kind == "llama3":
            # 0 for long wavelengths, which are divided by the factor; 1 for short ones, which stay
            turns = self.original_context * base / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = np.clip(kept, 0.0, 1.0)
            base = (1 - kept) * base / self.factor + kept * base
        if self.kind == "yarn":
            # the pairs, as real numbers, that turn beta_fast and beta_slow times
            turning = [self.original_context / (2 * math.pi * turns) for turns in (self.beta_fast, self.beta_slow)]
            first, last = (dim * math.log(one) / (2 * math.log(self.theta)) for one in turning)
            if self.truncated:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dim - 1)
            divided = (np.arange(dim // 2, dtype=np.float32) - first) / ((last - first) or 0.001)
            divided = np.clip(divided, 0.0, 1.0)
            base = divided * base / self.factor + (1 - divided) * base
        return base.astype(np.float32)

    def dim(self, head_dim: int) -> int:
        """How many numbers of a head are rotated."""
        return int(head_dim * self.rotated)

    def beyond(self) -> "Rope":
        """LongRoPE for texts that are longer than ``original_context``."""
        return self._replace(divisors=self.longer, longer=())

    def encoding(self, head_dim: int) -> "Rotary | Dynamic":
        """How positions enter heads of this size."""
        if self.kind == "dynamic":
            return Dynamic(self, self.dim(head_dim))
        return Rotary(self.frequencies(head_dim), self.amplitude)


def rotate(
    x: Float[Array, "tokens *heads head_dim"],
    position: Int[Array, " tokens"],
    frequencies: Float[Array | np.ndarray, "*tokens pairs"],
    amplitude: Float[Array, ""] | float = 1.0,
) -> Float[Array, "tokens *heads head_dim"]:
    """Turns pair j = (x_j, x_{j + pairs}) of every head by the angle ``position * frequencies[j]``.

    With fewer than head_dim / 2 frequencies, the first 2 * pairs numbers of a head are turned, and the rest stays. What
    is turned is multiplied by ``amplitude``. Frequencies may differ from token to token.

    Angles and products are float32, since bfloat16 cannot tell neighbouring positions apart beyond 256; the result
    has the dtype of ``x``. An angle is rounded to 24 bits, so at position p it may be off by p 2^-24 radians: 0.0005 at
    8,192, where models are trained, but 1 at 2^24. Other implementations round in the same way.

    >>> x = jnp.ones((2, 4))
    >>> print(np.asarray(rotate(x, jnp.array([0, 1]), Rope().frequencies(4))).round(2))
    [[ 1.    1.    1.    1.  ]
     [-0.3   0.99  1.38  1.01]]
    """
    pairs = frequencies.shape[-1]
    angle = position.astype(jnp.float32)[:, None] * frequencies
    angle = angle.reshape(angle.shape[0], *(1,) * (x.ndim - 2), pairs)
    cos, sin = jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude
    first, second, rest = jnp.split(x.astype(jnp.float32), [pairs, 2 * pairs], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


class Encoding:
    """How positions enter attention: queries and keys are rotated, a bias is added to the logits, both, or neither.

    Subclasses are pytrees and override one of the methods or both: `Rotary`, `ALiBi`, `Hybrid`.
    """

    def rotate(self, x: Float[Array, "tokens *heads head_dim"], position: Int[Array, " tokens"]) -> Array:
        """Queries or keys, encoded by these positions."""
        return x

    def bias(self, distance: Int[Array, "tokens *slots"], layout: Layout) -> Float[Array, "group tokens *slots"] | None:
        """The bias that is added to the logits at these distances between query and key; None for none."""
        return None

    def check(self, kv_heads: int, group: int, head_dim: int) -> None:
        """Raises unless the encoding fits heads of this shape."""


@partial(jax.tree_util.register_dataclass, data_fields=["frequencies", "amplitude"], meta_fields=[])
@dataclass(frozen=True)
class Rotary(Encoding):
    """Rotation by position.

    Attributes:
      frequencies: float32 ``[pairs]``, radians a token for each pair of a head; see `Rope`. Fewer than head_dim / 2
        pairs leave the last numbers of a head as they are.
      amplitude: what is rotated is multiplied by this number.
    """

    frequencies: Any  # unchecked, since JAX builds such objects of whatever it has
    amplitude: Any = 1.0

    def rotate(self, x, position):
        return rotate(x, position, self.frequencies, self.amplitude)

    def check(self, kv_heads, group, head_dim):
        shape = np.shape(self.frequencies)
        if len(shape) != 1 or not 0 < shape[0] <= head_dim // 2:
            raise CormError(
                f"frequencies must be [pairs], at most head_dim / 2 = {head_dim // 2}, got the shape {shape}"
            )


@jax.tree_util.register_static
@dataclass(frozen=True)
class Dynamic(Encoding):
    """Rotation by frequencies that depend on the position: NTK-aware scaling, see `Rope`.

    A token at position p is rotated as if the text ended with it. So it does not matter in which chunks a text is read;
    other implementations rotate all tokens of a chunk as its last.

    Attributes:
      rope: of the kind ``"dynamic"``.
      dim: how many numbers of a head are rotated.
    """

    rope: Rope
    dim: int

    def rotate(self, x, position):
        factor, dim = self.rope.factor, self.dim
        length = jnp.maximum(position.astype(jnp.float32) + 1, self.rope.original_context)
        stretch = factor * length / self.rope.original_context - (factor - 1)
        base = self.rope.theta * stretch ** (dim / (dim - 2))
        share = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        return rotate(x, position, base[:, None] ** -share, self.rope.amplitude)

    def check(self, kv_heads, group, head_dim):
        if not 2 < self.dim <= head_dim:
            raise CormError(f"dim must be more than 2 and at most head_dim = {head_dim}, got {self.dim}")


@partial(jax.tree_util.register_dataclass, data_fields=["slopes"], meta_fields=[])
@dataclass(frozen=True)
class ALiBi(Encoding):
    """A penalty that grows with the distance: the bias of query i for key j is ``-slope (i - j)``, head by head.

    Attributes:
      slopes: float32 ``[kv_heads, group]``, one for each query head.

    >>> ALiBi.of(kv_heads=2, group=2).slopes.tolist()
    [[0.25, 0.0625], [0.015625, 0.00390625]]
    """

    slopes: Any  # unchecked, since JAX builds such objects of whatever it has

    @classmethod
    def of(cls, kv_heads: int, group: int = 1) -> "ALiBi":
        """The slopes of the paper, section 3: of n heads, n a power of 2, the i-th (from 1) has ``2^(-8 i / n)``.

        For another number, those of the next lower power of 2, and after them every second one of twice as many.
        """
        heads = kv_heads * group
        lower = 2 ** int(math.log2(heads))
        powers = [2 ** (-8 * i / lower) for i in range(1, lower + 1)]
        powers += [2 ** (-4 * i / lower) for i in range(1, 2 * lower, 2)][: heads - lower]
        return cls(np.asarray(powers, np.float32).reshape(kv_heads, group))

    def bias(self, distance, layout):
        slope = layout.broadcast(jnp.asarray(self.slopes, jnp.float32).T)  # [group, stores, slots or 1]
        return -slope[:, None] * distance.astype(jnp.float32)

    def check(self, kv_heads, group, head_dim):
        if np.shape(self.slopes) != (kv_heads, group):
            raise CormError(
                f"slopes must be [kv_heads, group] = {(kv_heads, group)}, got the shape {np.shape(self.slopes)}"
            )


@partial(jax.tree_util.register_dataclass, data_fields=["rotary", "alibi"], meta_fields=[])
@dataclass(frozen=True)
class Hybrid(Encoding):
    """Rotation by position and a penalty that grows with the distance, both in every head."""

    rotary: Rotary | Dynamic
    alibi: ALiBi

    def rotate(self, x, position):
        return self.rotary.rotate(x, position)

    def bias(self, distance, layout):
        return self.alibi.bias(distance, layout)

    def check(self, kv_heads, group, head_dim):
        self.rotary.check(kv_heads, group, head_dim)
        self.alibi.check(kv_heads, group, head_dim)
