"""Window: only the newest keys stay, as many as a layer with sliding-window attention can see.

A query of such a layer (Mistral 7B, arXiv 2310.06825, section 2; the local layers of Gemma 2 and 3) sees itself and the
s - 1 positions before it. So of the keys that t tokens have left, those at positions (from 0) above t - s are seen by
the next query, and no other key by any later one: to evict the others changes no output.

    evict every i with  position[i] <= t - s

These are s - 1 keys, and one slot more is enough for reading token by token. There is no choice in it, so that these
layers have this policy whatever that of the others: see `of_layers`. In a layer with global attention it is the window
without sinks that StreamingLLM (arXiv 2309.17453) compares itself with.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from corm_jax.core.arrays import ENDLESS
from corm_jax.core.capacity import per_layer
from corm_jax.core.options import combined, number, policy
from corm_jax.core.policy import Policy, Traits
from corm_jax.core.slots import PerHead, Slots
from corm_jax.errors import CormError

PROTECTED = jnp.iinfo(jnp.int32).max


@policy
class Window(Policy):
    """Keep the keys that the next query sees through a sliding window; evict all older ones.

    Args:
      size: s, how many positions a query sees, its own included: the newest s - 1 keys stay. A number, or one for each
        head.

    >>> Window(size=512).traits.most
    511
    """

    size: PerHead = number(512, "s: positions that a query sees, its own included; the newest s - 1 stay", least=1)

    @property
    def traits(self) -> Traits:
        held = self.size - 1
        most = combined("maximum", held, 1)
        return Traits(protected=self.size, recent=held, most=most, needs=(), moments=ENDLESS)

    def moment(self, state: tuple[()], slots: Slots) -> Int[Array, "*slots"]:
        """The clock at which the key is evicted: position + s."""
        size = slots.broadcast(self.size)
        return jnp.minimum(slots.position, ENDLESS - size) + size

    def retain(self, state: tuple[()], slots: Slots) -> Bool[Array, "*slots"]:
        return slots.live & (slots.position > slots.seen - slots.broadcast(self.size))

    def score(self, state: tuple[()], slots: Slots) -> Int[Array, "*slots"]:
        return jnp.where(slots.newest(self.size), PROTECTED, slots.position)  # the newest query sees these


def of_layers(policy: Policy | Sequence[Policy], layers: int, windows: Sequence[int | None] = ()) -> tuple[Policy, ...]:
    """The policy of each layer of a model, some of whose layers may be local.

    A layer with a window holds what its window shows, `Window`, whatever the policy. The policy is that of the other
    layers: `Policy.for_layer` counts these alone. Numbers ``[layers, kv_heads]``, and policies in a list, have one for
    every layer; those of local layers have no effect.

    Args:
      policy: one for all layers, or one for each.
      layers: how many layers there are.
      windows: for each layer its window, None if it has none. Empty: no layer has one.

    Raises:
      CormError: for another number of windows, policies, or rows of hyperparameters, than there are layers.

    >>> from corm_jax.policies.corm import Corm
    >>> [type(one).__name__ for one in of_layers(Corm(), 3, windows=(512, 512, None))]
    ['Window', 'Window', 'Corm']
    """
    if not windows:
        return per_layer(policy, layers)
    if len(windows) != layers:
        raise CormError(f"{len(windows)} windows for {layers} layers: give one for each, None where there is none")
    others = iter(per_layer(policy, layers, [layer for layer in range(layers) if windows[layer] is None]))
    return tuple(next(others) if size is None else Window(size=size) for size in windows)
