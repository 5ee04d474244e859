"""A checkpoint that was opened, whatever its format: what `corm_jax.model.checkpoint` builds a model from."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from corm_jax.model.places import Place
from corm_jax.model.tokenizer import Tokenizer
from corm_jax.model.transformer import Config


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


def for_context(config: Config, context: int | None) -> tuple[Config, list[str]]:
    """LongRoPE reads long texts otherwise than short ones, from the first token on."""
    rope = config.rope
    if rope is None or not rope.longer:
        return config, []
    short = rope.original_context
    if context is not None and context > short:
        return replace(config, rope=rope.beyond()), []
    note = f"positions are LongRoPE's, read with its short factors: texts end at {short} tokens"
    note += f"; for longer ones, up to {config.context}, load the model with context={config.context}"
    return replace(config, context=min(config.context, short)), [] if context is not None else [note]
