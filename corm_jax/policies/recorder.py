"""A recorder: a full cache that also holds the query of each token. For any model that calls `corm_jax.step`.

A model records a trace by reading a text under this policy: nothing in it has to change.

    caches = ...                                  # of the model, for Recorder(group=query heads per key-value head)
    ... = model(Recorder(group=3), caches, ...)   # in steps of any number of tokens
    layers = [recorded(cache) for cache in caches]
    trace = Trace.from_qkv(*(list(x) for x in zip(*layers)))
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from corm_jax.core.observation import Observation
from corm_jax.core.options import choice, policy, static
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import Slots
from corm_jax.core.types import CacheSpec, LayerCache
from corm_jax.errors import CormError


@policy
class Recorder(Policy):
    """Keep every key, and note the query of its token beside it.

    A soft cap, a window, a mask and a bias are not in queries, keys and values. Attention of such a form is refused
    unless the caller writes it beside them, as ``softcap``, ``slopes`` and ``windows`` of
    `corm_jax.traces.trace.Trace.from_qkv`. A trace has no place for a mask.

    Args:
      group: query heads per key-value head; static, since the state has room for them.
      form: ``"plain"`` refuses any other attention than ``softmax(scale * q . k)`` over all earlier keys; under
        ``"beside"`` the caller writes the form.
    """

    group: int = static(1, "query heads per key-value head", least=1, most=2**16)
    form: str = choice("plain", "beside", help="refuse attention of another form | the caller writes it")

    @property
    def traits(self) -> Traits:
        return Traits(needs=("queries",), plain=self.form == "plain")

    def init(self, spec: CacheSpec) -> Float[Array, "group head_dim *slots"]:
        return jnp.zeros((self.group, spec.head_dim, *spec.slots), jnp.float32)

    def observe(
        self, state: Float[Array, "group head_dim *slots"], observation: Observation, slots: Slots
    ) -> Float[Array, "group head_dim *slots"]:
        queries: Array = observation.queries  # pyright: ignore
        if queries.shape[2] != self.group:
            group = queries.shape[2]
            raise CormError(f"a key-value head has {group} query heads here: read under Recorder(group={group})")
        at = slots.position - (observation.seen[0] - 1)  # which query of the chunk is that of the slot's token
        own = queries[jnp.clip(at, 0, len(queries) - 1), slots.head].astype(jnp.float32)  # [*slots, group, head_dim]
        return jnp.where((at >= 0) & slots.live, jnp.moveaxis(own, (-2, -1), (0, 1)), state)

    def score(self, state: Float[Array, "group head_dim *slots"], slots: Slots) -> Int[Array, "*slots"]:
        return slots.position


class Recorded(NamedTuple):
    """What a layer attended to, by position, float32.

    Attributes:
      q: ``[tokens, q_heads, head_dim]``, as they met the keys. Query heads ``h * group`` to ``h * group + group - 1``
        share key-value head ``h``.
      k, v: ``[tokens, kv_heads, head_dim]``.
    """

    q: Float[np.ndarray, "tokens q_heads head_dim"]
    k: Float[np.ndarray, "tokens kv_heads head_dim"]
    v: Float[np.ndarray, "tokens kv_heads head_dim"]


def recorded(cache: LayerCache) -> Recorded:
    """What the cache of a layer has recorded, of one sequence or of a batch of one row.

    Raises:
      CormError: for a cache of another policy or of several rows, or one that has lost keys for lack of a slot.

    >>> from corm_jax.core.cache import make_cache
    >>> from corm_jax.core.step import step
    >>> cache = make_cache(Recorder(group=2), CacheSpec(kv_heads=1, capacity=4, head_dim=8))
    >>> q, k = jnp.ones((3, 1, 2, 8)), jnp.ones((3, 1, 8))
    >>> [x.shape for x in recorded(step(Recorder(group=2), cache, q, k, k, 3)[1])]
    [(3, 2, 8), (3, 1, 8), (3, 1, 8)]
    """
    if cache.made and cache.made.policy != Recorder.__name__:
        raise CormError(f"the cache was made for {cache.made.policy}: read the text under a Recorder")
    if cache.overflow.ndim > 1:
        if len(cache.overflow) > 1:
            raise CormError(
                f"the cache has {len(cache.overflow)} rows: take one, jax.tree.map(lambda x: x[row], cache)"
            )
        cache = jax.tree.map(lambda x: x[0], cache)
    if lost := int(cache.overflow.sum()):
        raise CormError(f"the cache lost {lost} keys for lack of a slot: give it one for each token")
    position, state = np.asarray(cache.position), np.asarray(cache.state)
    head = np.asarray(cache.layout.heads(*position.shape)).reshape(-1)
    order = np.lexsort((position.reshape(-1), head))
    order = order[position.reshape(-1)[order] >= 0].reshape(len(cache.overflow), -1)  # [kv_heads, tokens]
    k, v = (np.asarray(x, np.float32).reshape(position.size, -1)[order] for x in (cache.k, cache.v))
    q = state.reshape(*state.shape[:2], -1)[..., order].transpose(3, 2, 0, 1)  # [tokens, kv_heads, group, head_dim]
    return Recorded(q.reshape(order.shape[1], -1, q.shape[-1]), k.swapaxes(0, 1), v.swapaxes(0, 1))
