"""How positions enter attention: rotary embedding (RoFormer, arXiv 2104.09864), or a bias (ALiBi, arXiv 2108.12409).

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

    Attributes:
      theta: the base; pair j of a head turns by ``theta ** (-2 j / head_dim)`` radians a token.
      kind: ``"default"``; ``"linear"`` divides every frequency by ``factor`` (arXiv 2306.15595); ``"llama3"`` divides
        those with a wavelength above ``original_context / low_freq_factor``, keeps those below
        ``original_context / high_freq_factor``, and blends in between (Llama 3.1 reference code); ``"divisors"``
        divides each by its own of ``divisors``, which is how a GGUF file says the same.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "divisors"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    divisors: tuple[float, ...] = ()

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a token for each pair of a head: float32 ``[head_dim / 2]``."""
        base = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
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
        return base.astype(np.float32)


def rotate(
    x: Float[Array, "tokens *heads head_dim"],
    position: Int[Array, " tokens"],
    frequencies: Float[Array | np.ndarray, " pairs"],
) -> Float[Array, "tokens *heads head_dim"]:
    """Turns pair j = (x_j, x_{j + head_dim/2}) of every head by the angle ``position * frequencies[j]``.

    Angles and products are float32, since bfloat16 cannot tell neighbouring positions apart beyond 256; the result
    has the dtype of ``x``. An angle is rounded to 24 bits, so at position p it may be off by p 2^-24 radians: 0.0005 at
    8,192, where models are trained, but 1 at 2^24. Other implementations round in the same way.

    >>> x = jnp.ones((2, 4))
    >>> print(np.asarray(rotate(x, jnp.array([0, 1]), Rope().frequencies(4))).round(2))
    [[ 1.    1.    1.    1.  ]
     [-0.3   0.99  1.38  1.01]]
    """
    angle = position.astype(jnp.float32)[:, None] * frequencies[None, :]
    angle = angle.reshape(angle.shape[0], *(1,) * (x.ndim - 2), angle.shape[1])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Encoding:
    """How positions enter attention: queries and keys are rotated, a bias is added to the logits, both, or neither.

    Subclasses are pytrees and override one of the methods: `Rotary`, `ALiBi`.
    """

    def rotate(self, x: Float[Array, "tokens *heads head_dim"], position: Int[Array, " tokens"]) -> Array:
        """Queries or keys, encoded by these positions."""
        return x

    def bias(self, distance: Int[Array, "tokens *slots"], layout: Layout) -> Float[Array, "group tokens *slots"] | None:
        """The bias that is added to the logits at these distances between query and key; None for none."""
        return None

    def check(self, kv_heads: int, group: int, head_dim: int) -> None:
        """Raises unless the encoding fits heads of this shape."""


@partial(jax.tree_util.register_dataclass, data_fields=["frequencies"], meta_fields=[])
@dataclass(frozen=True)
class Rotary(Encoding):
    """Rotation by position.

    Attributes:
      frequencies: float32 ``[head_dim / 2]``, radians a token for each pair of a head; see `Rope`.
    """

    frequencies: Any  # unchecked, since JAX builds such objects of whatever it has

    def rotate(self, x, position):
        return rotate(x, position, self.frequencies)

    def check(self, kv_heads, group, head_dim):
        if np.shape(self.frequencies) != (head_dim // 2,):
            raise CormError(f"frequencies must be [head_dim / 2], got the shape {np.shape(self.frequencies)}")


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
