"""The exact recurrence, a block of queries at once: what one token after the other decides, without a loop over tokens.

What a query sees depends on earlier queries only. So the evictions of the recurrence are the one fixed point of

    guess when each key is evicted; attend under that guess, all queries of the block at once; derive the evictions

and each pass settles at least one more query for good. The last pass only confirms. Where a policy knows beforehand at
which moment of the block a key can be evicted (`corm_jax.core.types.Traits`), a pass asks whether somebody found the
key important by then, and the exponentials are computed once. Any other policy is led through the block's attention
query by query: its own `observe` and `retain`, which are cheap beside it.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from corm_jax.core.arrays import EMPTY, anywhere, varying
from corm_jax.core.observation import Observation, observed
from corm_jax.core.options import concrete
from corm_jax.core.slots import Slots
from corm_jax.core.types import State, by_slot

FOREVER = np.iinfo(np.int32).max
"""The last query of a key that is not evicted. So none is evicted by the very last token of the clock."""


FAR = 20.0
"""A logit that exceeds that of the query's own key by more leaves the latter no weight: exp(-FAR) is 2e-9."""

NEXT_TO_0 = 1e-30
"""The total of a query that sees nothing."""

SHORT = 16
"""Queries that are read at once where windows are short."""


class Block(NamedTuple):
    """Queries of a layer, and all keys that any of them can see.

    Attributes:
      slots: these keys; ``seen`` is the clock after the block. The block's own keys are among them.
      clock: int32 ``[tokens, 1, 1]``, that of each query.
      visible: bool ``[tokens, *slots]``, what each would see if nothing were evicted; nothing, where it is no query.
      softmax: of a mask such as ``visible``: weights ``[group, tokens, *slots]`` and their totals, see
        `corm_jax.core.attention.softmax`. None where the policy does not look at attention.
      logits: float32 ``[group, tokens, *slots]``, if ``softmax`` is their softmax; with ``every``, -infinity beyond it.
      keys, values: ``[*slots, head_dim]``, or None.
      queries: ``[tokens, kv_heads, group, head_dim]``, or None.
      within: bool ``[tokens, *slots]``, what each may see at all, live or not; None for everything.
      every: bool ``[tokens, *slots]``, what each would see if nothing had ever been evicted, for those who want to know
        the attention to that, too; None for nobody.
      own: float32 ``[group, tokens, kv_heads]``, with ``every``: the logit of each query's own key.
      outputs: whether somebody wants the weights of the attention: that is one array more of this size.
    """

    slots: Slots
    clock: Int[Array, "tokens 1 1"]
    visible: Bool[Array, "tokens *slots"]
    softmax: Any
    logits: Any
    keys: Float[Array, "*slots head_dim"] | None
    values: Float[Array, "*slots head_dim"] | None = None
    queries: Float[Array, "tokens kv_heads group head_dim"] | None = None
    within: Bool[Array, "tokens *slots"] | None = None
    every: Bool[Array, "tokens *slots"] | None = None
    own: Float[Array, "group tokens kv_heads"] | None = None
    outputs: bool = True

    def attended(self, visible: Array) -> Array:
        """Those of some keys that the queries may see at all."""
        return visible if self.within is None else visible & self.within

    def observation(self, weights: Array, total: Array, visible: Array) -> Observation:
        """What a policy gets to see."""
        held = self.keys, self.values, self.queries
        return observed(self.slots.layout, weights, total, visible, self.clock, *held)


class Settled(NamedTuple):
    """What came of a block.

    Attributes:
      until: int32 ``[*slots]``, the clock of the last query that could attend to the key; `FOREVER` if it stays.
      lost: bool ``[*slots]``, whether it was evicted for want of a slot.
      state: the policy's state after the block.
      weights, total: of the block's attention, as its ``softmax`` returns them; None where no policy looks at it, and
        weights where nobody wants them.
      passes: int32 scalar, how often the block attended.
      every: weights and total of the attention to ``every`` of the block, and the share of it that falls on what each
        query could attend to; None if nobody asked.
    """

    until: Int[Array, "*slots"]
    lost: Bool[Array, "*slots"]
    state: State
    weights: Array | None
    total: Array | None
    passes: Int[Array, ""]
    every: tuple[Array, Array, Array] | None = None


class Room(NamedTuple):
    """How many keys each store holds at most, and how many heads share it."""

    slots: Int[Array, ""] | int
    heads: int = 1


def settle(
    policy: Any, state: State, fresh: State, block: Block, room: Room | None = None, moments: bool | None = None
) -> Settled:
    """The evictions of a block, as if it were read token by token.

    Args:
      policy, state: the rule, and its state ``[..., *slots]`` before the block.
      fresh: the state of a key that has just arrived, broadcastable.
      block: the queries and keys.
      room: how many keys fit; None if there is room for all.
      moments: whether every key's moment is known, that is, the block is no longer than the policy's ``moments``; None
        if that shows only when it runs.
    """
    by_query = partial(_by_query, policy, state, fresh, block, room)
    if moments is False:
        return by_query()
    found, sound = _by_moments(policy, state, block)
    if room is not None:
        sound &= _fits(block, found, room)
    if moments is None:
        queries = block.visible.any((1, 2)).sum(dtype=jnp.int32)
        sound &= (jnp.asarray(policy.traits.moments) >= queries).all()
    if block.softmax is None and room is None and moments:
        return found
    return jax.lax.cond(anywhere(~sound), by_query, lambda: found)


def planned(policy: Any) -> tuple[int, bool | None]:
    """How many queries to read at once under a policy whose numbers are known, and whether their moments are, too."""
    about = policy.traits
    if not concrete(about.moments):
        return about.block, None
    least = int(np.min(about.moments))
    block = about.block if least >= about.block or not np.max(about.moments) else min(SHORT, about.block)
    return block, least >= block


def alive(block: Block, until: Int[Array, "*slots"], lost: Bool[Array, "*slots"]) -> Int[Array, "tokens kv_heads"]:
    """How many keys of a head are live after each query."""
    there = (until == FOREVER) | (block.clock < until + lost.astype(jnp.int32))
    live = (block.slots.position >= 0) & (block.slots.position < block.clock) & there
    return block.slots.sum_per_head(live)


def _fits(block: Block, found: Settled, room: Room) -> Bool[Array, ""]:
    """Whether there was always a slot for the newcomers."""
    slots = block.slots
    seen = block.visible & (block.clock <= found.until)
    needed = slots.layout.merged(room.heads).sum_per_head(seen.astype(jnp.int32))
    return (needed <= room.slots).all()


def _by_moments(policy, state, block) -> tuple[Settled, Bool[Array, ""]]:
    """What is evicted if every key is at its moment or not at all; and whether exponentials were numbers."""
    slots, t, visible = block.slots, block.clock, block.visible
    when = jnp.where(slots.live, jnp.maximum(policy.moment(state, slots), t[0]), FOREVER)
    due = slots.live & (when <= slots.seen)
    lost, every = jnp.zeros_like(due), None
    if block.softmax is None:
        until = jnp.where(due, when, FOREVER)
        return Settled(until, lost, state, None, None, jnp.int32(1)), jnp.asarray(True)
    judges = visible.any((1, 2))[:, None, None]  # not what pads the block, whose clock may be past the end
    if block.logits is not None:
        powers, least, every = _powers(block, when)

    def attention(evicted):
        """Weights, their total, and what is seen if these keys are evicted, each at its moment."""
        last = jnp.where(evicted, when, FOREVER)
        seen = visible & (t <= last)
        if block.logits is None:
            return *block.softmax(block.attended(seen)), seen
        # The least of a power and infinity, or 0, which a CPU adds up twice as fast as what is selected. Powers are 0
        # beyond what the queries reach; with ``every``, of keys that are not live they are not.
        weights = jnp.minimum(powers, jnp.where(t <= jnp.where(slots.live, last, 0), jnp.inf, 0.0))
        return weights, jnp.maximum(slots.layout.sum_per_head(weights), NEXT_TO_0), seen

    def verdict(weights, total, seen):
        """Which keys each query found important, and which are evicted then."""
        found = policy.important(block.observation(weights, total, seen), slots)
        return found, due & ~(found & judges & (t <= when)).any(0)

    def body(carry):
        evicted, total, *_, passes = carry
        weights, _, seen = attention(evicted)
        found, now = verdict(weights, total, seen)
        changed = anywhere((now != evicted).any())
        return now, jax.lax.cond(changed, lambda: attention(now)[1], lambda: total), found, changed, passes + 1

    guess = lost if every is None else verdict(*every, block.every)[1]
    total = first = attention(guess)[1]
    start = guess, total, visible, *varying((jnp.asarray(True), jnp.int32(0)), slots.position)
    evicted, total, found, _, passes = jax.lax.while_loop(lambda carry: carry[3], body, start)
    sound = jnp.asarray(True)
    if block.logits is not None:
        sound = (((total >= least) & jnp.isfinite(first)) | ~judges[..., 0]).all()
    weights = attention(evicted)[0] if block.outputs else None
    every = every and (*every, total / every[1])
    until = jnp.where(evicted, when, FOREVER)
    return Settled(until, lost, policy.noted(state, found, t), weights, total, passes, every), sound


def _powers(block, when):
    """Exponentials of the logits, the least total under which they are sound, and with ``every`` also their total.

    They are measured from the largest logit that is seen for certain: then the weights of equal logits are 1, as in
    any other softmax, and no total is 0. Where logits are no numbers, or one that may be evicted exceeds the others by
    far, the total is no number either, or what it has to come to is not.

    With ``every`` they are measured from the logit of each query's own key, which does not depend on the policy, so
    that a grid of policies shares them. That key is always seen, and if all that are seen are equal, their weights are
    1. Where the largest logit exceeds it by far, they are measured from that, whose key has to be seen then.
    """
    layout, t, reach = block.slots.layout, block.clock, block.attended(block.visible)
    if block.every is None:
        logits = jnp.where(reach, block.logits, -jnp.inf)
        shift = layout.most(jnp.minimum(block.logits, jnp.where(reach & (t <= when), jnp.inf, -jnp.inf)))
        least = jnp.zeros_like(shift)
    else:
        logits = block.logits
        top = layout.most(logits)
        far = top - block.own > FAR
        shift, least = jnp.where(far, top, block.own), jnp.where(far, 1.0, 0.0)
    number = jnp.isfinite(shift)
    powers = jnp.exp(logits - layout.broadcast(jnp.where(number, shift, 0.0)))
    every = None if block.every is None else (powers, jnp.maximum(layout.sum_per_head(powers), NEXT_TO_0))
    return powers, jnp.where(number, least, jnp.nan), every


def _by_query(policy, state, fresh, block, room) -> Settled:
    t, end = block.clock, block.slots.seen
    until, lost = jnp.full_like(block.slots.position, FOREVER), jnp.zeros_like(block.slots.live)
    if block.softmax is None:
        group = jnp.zeros((1, *block.visible.shape), jnp.float32)
        until, lost, state = _led(policy, state, fresh, block, room, group, jnp.ones_like(group[..., :1, :1]))
        return Settled(until, lost, state, None, None, jnp.int32(1))

    def body(carry):
        until, *_, passes = carry
        weights, total = block.softmax(block.attended(block.visible & (t <= until)))
        seen = block.observation(weights, total, block.visible)
        now, lost, after = _led(policy, state, fresh, block, room, seen.weights, seen.total)
        changed = (jnp.minimum(now, end) != jnp.minimum(until, end)).any()
        return now, lost, after, weights, total, anywhere(changed), passes + 1

    shapes = jax.eval_shape(body, (until, None, None, None, None, None, varying(jnp.int32(0), until)))
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1:5])
    start = until, *varying((*empty, jnp.asarray(True), jnp.int32(0)), until)
    until, lost, after, weights, total, _, passes = jax.lax.while_loop(lambda carry: carry[-2], body, start)
    every = None
    if block.every is not None:
        every = block.softmax(block.every)
        rest = jnp.where(block.attended(block.visible & (t <= until)), every[0], 0.0)
        every = *every, block.slots.sum_per_head(rest) / every[1]
    return Settled(until, lost, after, weights if block.outputs else None, total, passes, every)


def _led(policy, state, fresh, block, room, weights, total):
    """A policy led through given attention, query by query: ``until``, ``lost`` and its state."""
    slots = block.slots
    position = slots.position

    def view(live, seen):
        return replace(slots, position=jnp.where(live, position, EMPTY), seen=seen, arrived=1)

    def body(carry, xs):
        state, until, lost = carry
        weights, total, t, real, query = xs
        if room is not None:
            before = view((until == FOREVER) & (position < t - 1), t)
            stores = replace(before, layout=slots.layout.merged(room.heads))
            short = stores.sum_per_head(stores.live) + room.heads - room.slots
            score, head = policy.score(state, before), (slots.head,) if room.heads > 1 else ()
            out = stores.lowest(score, jnp.where(real, short, 0), room.heads, *head)
            until, lost = jnp.where(out, t - 1, until), lost | out
        arrives = real & (position == t - 1)
        live = (position >= 0) & (until == FOREVER) & (position < t)
        now = view(live, t)
        query = None if query is None else query[None]
        rows = weights[:, None], total[:, None], live[None], t[None, None, None]
        seen = Observation(*rows, block.keys, block.values, query)
        after = policy.observe(by_slot(lambda held, new: jnp.where(arrives, new, held), state, fresh), seen, now)
        until = jnp.where(live & real & ~policy.retain(after, now), t, until)
        return (jax.tree.map(partial(jnp.where, real), after, state), until, lost), None

    until, lost = jnp.full_like(position, FOREVER), jnp.zeros_like(slots.live)
    real = block.visible.any((1, 2))
    xs = weights.swapaxes(0, 1), total.swapaxes(0, 1), block.clock[:, 0, 0], real, block.queries
    (state, until, lost), _ = jax.lax.scan(body, (state, until, lost), xs)
    return until, lost, state
