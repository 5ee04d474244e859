"""What a policy observes of the attention of a step."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from corm_jax.core.arrays import iota, over_group
from corm_jax.core.layout import Layout


class Observation(NamedTuple):
    """The attention of the newest queries over the slots, before any eviction.

    Probabilities are stored as softmax computes them, ``alpha = weights / total``. Comparisons such as alpha >= 1/n are
    then exact for ties (n equal logits give weights 1 and total n), and a policy that only compares needs no second
    pass over the exponentials. A fused attention that returns the logsumexp fits as
    ``weights = exp(logits - logsumexp), total = 1``. Queries that only pad a ragged batch have weights of 0. So have
    queries whose softmax is undefined (a logit is NaN or +infinity): probabilities are always numbers. An observation
    has no gradient.

    Attributes:
      weights: float32 ``[group, tokens, *slots]``.
      total: float32, broadcastable against ``weights``: the sum over the slots of each head.
      visible: bool ``[tokens, *slots]``, which slots the query could attend to.
      seen: int32, broadcastable against ``visible``: the clock at each query (its position + 1).
      keys, values: ``[*slots, head_dim]``, what the slots hold; None if a trace does not have them.
      queries: ``[tokens, kv_heads, group, head_dim]``, with the scale of the attention in them: their logits are
        ``q . k / sqrt(head_dim)``. None likewise.
    """

    weights: Float[Array, "group tokens *slots"]
    total: Float[Array, "group tokens *slots_or_1"]
    visible: Bool[Array, "tokens *slots"]
    seen: Int[Array, "tokens *ones"]
    keys: Float[Array, "*slots head_dim"] | None = None
    values: Float[Array, "*slots head_dim"] | None = None
    queries: Float[Array, "tokens kv_heads group head_dim"] | None = None

    @property
    def mean(self) -> Float[Array, "tokens *slots"]:
        """The mean of alpha over the query heads of a group."""
        return over_group(jnp.add, self.probability) / len(self.weights)

    @property
    def probability(self) -> Float[Array, "group tokens *slots"]:
        """alpha, the attention probabilities."""
        return self.weights / self.total


def last(found: Bool[Array, "tokens *slots"], seen: Int[Array, "tokens *ones"], never: int) -> Int[Array, "*slots"]:
    """For each slot, the clock of the last query for which ``found`` is true; ``never`` if there is none."""
    nth = iota(len(found)).astype(jnp.float32)[:, None, None]  # an integer's maximum takes a CPU twice as long
    nth = jnp.where(found, nth, -1.0).max(0)
    return jnp.where(nth >= 0, seen.reshape(-1)[0] + nth.astype(jnp.int32), never)


def observed(
    layout: Layout,
    weights: Float[Array, "group tokens *slots"],
    total: Float[Array, "group tokens kv_heads"],
    visible: Bool[Array, "tokens *slots"],
    seen: Int[Array, "tokens *ones"],
    keys: Float[Array, "*slots head_dim"] | None = None,
    values: Float[Array, "*slots head_dim"] | None = None,
    queries: Float[Array, "tokens kv_heads group head_dim"] | None = None,
) -> Observation:
    """The `Observation` of an attention. A query whose softmax is undefined (its total is NaN) gets weights of 0."""
    total = layout.broadcast(total)
    broken = jnp.isnan(total)
    weights, total = jnp.where(broken, 0.0, weights), jnp.where(broken, 1.0, total)
    return Observation(weights, total, visible, seen, keys, values, queries)
