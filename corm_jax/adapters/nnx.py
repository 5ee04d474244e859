"""Flax NNX modules that attend with ``flax.nnx.MultiHeadAttention``: layers of a decoder as they are."""

from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax.tree_util import Partial


def layer(module: nnx.Module, **options: Any) -> Partial:
    """A layer for `corm_jax.adapters.Functions`: a module whose attention reads through an evicting cache.

    The module is called with hidden states ``[batch, tokens, dim]``, and returns hidden states. Inside of it,
    ``MultiHeadAttention`` computes its projections as usual, and `corm_jax.model.decoder.Attend` takes the place
    of its attention function. Attention is causal whatever mask the module makes. This class has no grouped queries,
    so ``kv_heads`` is ``heads``.

    Args:
      module: with one such attention. It stays as it is.
      options: further arguments of its call, such as ``deterministic=True``; hashable.

    >>> import jax.numpy as jnp
    >>> import corm_jax as cj
    >>> class Block(nnx.Module):
    ...     def __init__(self, dim, heads, rngs):
    ...         self.norm = nnx.LayerNorm(dim, rngs=rngs)
    ...         self.attention = nnx.MultiHeadAttention(heads, dim, decode=False, rngs=rngs)
    ...         self.dense = nnx.Linear(dim, dim, rngs=rngs)
    ...     def __call__(self, x):
    ...         x = x + self.attention(self.norm(x), is_causal=True)
    ...         return x + nnx.gelu(self.dense(x))
    >>> table = nnx.Embed(50, 32, rngs=nnx.Rngs(0))
    >>> model = cj.adapters.Functions(
    ...     config=cj.Shape(vocab=50, layers=2, heads=4, kv_heads=4, head_dim=8),
    ...     embed=Partial(lambda table, tokens, position: table(tokens), table),
    ...     layers=tuple(layer(Block(32, 4, nnx.Rngs(seed))) for seed in range(2)),
    ...     logits=Partial(lambda table, x: table.attend(x), table),
    ... )
    >>> len(cj.generate(model, cj.Corm(window=4, recent=2), [[1, 2, 3]], max_new_tokens=5).tokens[0])
    5
    """
    return Partial(_Layer(tuple(options.items())), module)


@dataclass(frozen=True)
class _Layer:
    options: tuple[tuple[str, Any], ...]

    def __call__(self, module, x, position, attend):
        module = nnx.clone(module)
        for _, one in nnx.iter_modules(module):
            if isinstance(one, nnx.MultiHeadAttention):
                one.decode = False
                one.attention_fn = lambda query, key, value, **_: attend(query, key, value)
        return module(x, **dict(self.options))
