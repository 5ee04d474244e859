"""The form of an attention: how positions enter it, its scale, a soft cap, a window and a mask."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from corm_jax.core.layout import Layout
from corm_jax.core.positions import Encoding
from corm_jax.core.slots import Slots


class Form(NamedTuple):
    """How a model's attention differs from ``softmax(q . k / sqrt(head_dim))`` over all earlier keys.

        logit  =  cap(scale q . k) + bias(distance),      cap(x) = softcap tanh(x / softcap)

    Attributes:
      encoding: how positions enter; None if queries and keys are encoded already.
      scale: of ``q . k``; None for ``1 / sqrt(head_dim)``.
      softcap: logits stay within plus and minus this; None for no such cap.
      window: a query sees itself and the ``window - 1`` positions before it; None for all.
      mask: a function ``(query, key) -> bool`` of two positions, arrays that broadcast: whether the query may see the
        earlier key; None for all.
    """

    encoding: Encoding | None = None
    scale: Any = None
    softcap: Any = None
    window: Any = None
    mask: Callable[[Array, Array], Array] | None = None

    @property
    def beyond(self) -> list[str]:
        """The names of the parts that a plain softmax of scaled products over all earlier keys does not have."""
        names = [name for name in ("softcap", "window", "mask") if getattr(self, name) is not None]
        biased = self.encoding is not None and type(self.encoding).bias is not Encoding.bias
        return names + [f"bias of {type(self.encoding).__name__}"] * biased

    def logits(self, layout: Layout, q: Array, k: Array, bias: Array | None = None) -> Array:
        """The logits ``[group, tokens, *slots]``, float32."""
        found = self.of(layout.logits(q, k), q.shape[-1])
        return found if bias is None else found + bias

    def of(self, products: Array, head_dim: int) -> Array:
        """Logits from products of queries and keys: scaled, then capped."""
        found = products * (head_dim**-0.5 if self.scale is None else jnp.float32(self.scale))
        if self.softcap is None:
            return found
        cap = jnp.float32(self.softcap)
        return cap * jnp.tanh(found / cap)

    def queries(self, q: Array) -> Array:
        """The queries with the scale in them: their logits are ``q . k / sqrt(head_dim)``."""
        return q if self.scale is None else q.astype(jnp.float32) * (jnp.float32(self.scale) * q.shape[-1] ** 0.5)

    def within(self, query: Int[Array, "tokens 1 1"], key: Int[Array, "*slots"]) -> Bool[Array, "tokens *slots"] | None:
        """Whether the queries at some positions may see keys at other positions; None if they may see all."""
        found = None if self.window is None else query - key < jnp.asarray(self.window, jnp.int32)
        if self.mask is not None:
            allowed = jnp.broadcast_to(self.mask(query, key), jnp.broadcast_shapes(query.shape, key.shape))
            found = allowed if found is None else found & allowed
        return found

    def encoded(self, x: Float[Array, "tokens *heads head_dim"], position: Int[Array, " tokens"]) -> Array:
        """Queries or keys, encoded by these positions."""
        return x if self.encoding is None else self.encoding.rotate(x, position)

    def bias(self, query: Int[Array, "tokens ..."], key: Int[Array, "*slots"], layout: Layout) -> Array | None:
        """The bias that is added to the logits of queries at these positions; None for none."""
        return None if self.encoding is None else self.encoding.bias(query - key, layout)

    def in_cache(
        self, q: Array, keys: Array, slots: Slots, clock: Int[Array, "tokens 1 1"]
    ) -> tuple[Array, Array, Any]:
        """Queries and keys encoded by their places among the live keys of their head, and the bias for these places."""
        before = slots.sum_per_head(slots.live & (slots.position < clock - 1))  # [tokens, kv_heads]
        heads = [self.encoded(q[:, head], before[:, head]) for head in range(q.shape[1])]
        flat = self.encoded(keys.reshape(-1, keys.shape[-1]), slots.place.reshape(-1))
        bias = self.bias(slots.broadcast(before), slots.place, slots.layout)
        return jnp.stack(heads, 1), flat.reshape(keys.shape), bias
