"""Flax linen modules that attend with ``flax.linen.MultiHeadDotProductAttention``: layers of a decoder as they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import linen
from jax.tree_util import Partial


def layer(module: linen.Module, variables: Mapping[str, Any], **options: Any) -> Partial:
    """A layer for `corm_jax.adapters.Functions`: a module whose attention reads through an evicting cache.

    The module is called with hidden states ``[batch, tokens, dim]``, and returns hidden states. Inside of it,
    ``MultiHeadDotProductAttention`` computes its projections as usual, and `corm_jax.model.decoder.Attend` replaces
    its attention function. Attention is causal whatever mask the module makes. This class has no grouped queries, so
    ``kv_heads`` is ``heads``.

    Args:
      module: with one such attention.
      variables: of the module, as its ``init`` returns them.
      options: further arguments of its call, such as ``deterministic=True``; hashable.

    >>> import jax, jax.numpy as jnp
    >>> import corm_jax as cj
    >>> class Block(linen.Module):
    ...     @linen.compact
    ...     def __call__(self, x):
    ...         mask = linen.make_causal_mask(x[..., 0])
    ...         x = x + linen.MultiHeadDotProductAttention(num_heads=4)(linen.LayerNorm()(x), mask=mask)
    ...         return x + linen.Dense(x.shape[-1])(linen.gelu(linen.Dense(64)(linen.LayerNorm()(x))))
    >>> table = linen.Embed(num_embeddings=50, features=32)
    >>> embedding = table.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    >>> inits = [Block().init(jax.random.key(seed), jnp.zeros((1, 1, 32))) for seed in range(2)]
    >>> model = cj.adapters.Functions(
    ...     config=cj.Shape(vocab=50, layers=2, heads=4, kv_heads=4, head_dim=8),
    ...     embed=Partial(lambda embedding, tokens, position: table.apply(embedding, tokens), embedding),
    ...     layers=tuple(layer(Block(), variables) for variables in inits),
    ...     logits=Partial(lambda embedding, x: table.apply(embedding, x, method="attend"), embedding),
    ... )
    >>> len(cj.generate(model, cj.Corm(window=4, recent=2), [[1, 2, 3]], max_new_tokens=5).tokens[0])
    5
    """
    return Partial(_Layer(module, tuple(options.items())), variables)


@dataclass(frozen=True)
class _Layer:
    """A module without variables. Equal modules share a compiled program."""

    module: linen.Module
    options: tuple[tuple[str, Any], ...]

    def __call__(self, variables, x, position, attend):
        def intercept(proceed, args, options, context):
            if isinstance(context.module, linen.MultiHeadDotProductAttention):
                object.__setattr__(context.module, "attention_fn", lambda query, key, value: attend(query, key, value))
            return proceed(*args, **options)

        with linen.intercept_methods(intercept):
            return self.module.apply(variables, x, **dict(self.options))
