"""Rotary position embedding (RoFormer, arXiv 2104.09864), with the scalings that LLaMA checkpoints use.

Rotation takes the true position of a token, never the slot or the number of keys kept: after eviction the relative
distances are still those of the text.
"""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


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
            # 0 where the wavelength is so long that it is stretched whole, 1 where so short that it stays
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
