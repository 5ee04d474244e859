"""A checkpoint that was opened, whatever its format: what `corm_jax.model.checkpoint` builds a model from."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from corm_jax.model.llama import Config
from corm_jax.model.places import Place
from corm_jax.model.tokenizer import Tokenizer


class Tensor(NamedTuple):
    """A tensor of a checkpoint that was not read yet.

    Attributes:
      shape: axes in Hugging Face's order: a matrix is ``[out, in]``.
      read: returns its numbers, in a floating-point dtype.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Source(NamedTuple):
    """A checkpoint that was opened but not yet read.

    Attributes:
      name: as the user gave it.
      config: the decoder's shape.
      tensors: by their names in the file.
      tokenizer: reads the tokenizer.
      notes: what the checkpoint left open, and what was assumed.
      places: where the parameters of a decoder of some shape come from.
    """

    name: str
    config: Config
    tensors: dict[str, Tensor]
    tokenizer: Callable[[], Tokenizer]
    notes: list[str]
    places: Callable[[Config], Iterable[Place]]
