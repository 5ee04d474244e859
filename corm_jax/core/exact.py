"""The exact recurrence, a block of queries at once: the decisions of one token after the other, without that loop.

What a query sees depends on earlier queries only. So the evictions of the recurrence are the one fixed point of

    guess when each key is evicted; attend under that guess, all queries of the block at once; derive the evictions

and each pass makes at least one more query final. The last pass only confirms. If a policy knows in advance the clock
at which a key can be evicted (``moments`` of `corm_jax.core.policy.Traits`), a pass only checks whether some query
found the key important by then, and the exponentials are computed once. For any other policy, `observe` and `retain`
are called query by query with the block's attention, which is cheap compared with the attention itself.
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
"""The last query of a key that is not evicted. So the very last token of the clock evicts nothing."""


FAR = 20.0
"""If a logit exceeds that of the query's own key by more than this, the own key has no weight: exp(-FAR) is 2e-9."""

NEXT_TO_0 = 1e-30
"""The total of a query that sees nothing."""

SHORT = 16
"""Queries that are read at once where windows are short."""


class Block(NamedTuple):
    """Queries of a layer, and all keys that any of them can see.

    Attributes:
      slots: these keys; ``seen`` is the clock after the block. The block's own keys are among them.
      clock: int32 ``[tokens, 1, 1]``, that of each query.
      visible: bool ``[tokens, *slots]``, which each query would see if nothing were evicted; none for padding.
      softmax: of a mask such as ``visible``: weights ``[group, tokens, *slots]`` and their totals, see
        `corm_jax.core.attention.softmax`. None if the policy does not need attention.
      logits: float32 ``[group, tokens, *slots]``, if ``softmax`` is their softmax; -infinity outside ``every``.
      keys, values: ``[*slots, head_dim]``, or None.
      queries: ``[tokens, kv_heads, group, head_dim]``, or None.
      within: bool ``[tokens, *slots]``, the slots that each query may see by the form of the attention, live or not;
        None for all.
      every: bool ``[tokens, *slots]``, which each query would see if nothing had ever been evicted: then the attention
        of the full cache is computed as well. None if that is not wanted.
      own: float32 ``[group, tokens, kv_heads]``, with ``every``: the logit of each query's own key.
      outputs: whether the weights of the attention are returned, which takes one more array of this size.
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
        """Those of the visible slots that the queries may see by the form of the attention."""
        return visible if self.within is None else visible & self.within

    def observation(self, weights: Array, total: Array, visible: Array) -> Observation:
        """The observation of the policy."""
        held = self.keys, self.values, self.queries
        return observed(self.slots.layout, weights, total, visible, self.clock, *held)


class Settled(NamedTuple):
    """The result of a block.

    Attributes:
      until: int32 ``[*slots]``, the clock of the last query that could attend to the key; `FOREVER` if it stays.
      lost: bool ``[*slots]``, whether it was evicted for lack of a slot.
      state: the policy's state after the block.
      weights, total: of the block's attention, as its ``softmax`` returns them; None if the policy does not need
        attention, and weights are None without ``outputs`` of the block.
      passes: int32 scalar, the number of attention passes.
      every: weights and total of the attention to ``every`` of the block, and the share of it that falls on the keys
        which each query could still attend to; None without ``every``.
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
      fresh: the state of a new key, broadcastable.
      block: the queries and keys.
      room: how many keys can be stored; None if there are slots for all.
      moments: whether the block is no longer than the policy's ``moments``, so that it is known in advance when each
        key can be evicted; None if that is known only at run time.
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
    """How many queries to read at once under a policy whose numbers are known, and ``moments`` of `settle`."""
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
    """Whether there was always a free slot for the new keys."""
    slots = block.slots
    seen = block.visible & (block.clock <= found.until)
    needed = slots.layout.merged(room.heads).sum_per_head(seen.astype(jnp.int32))
    return (needed <= room.slots).all()


def _by_moments(policy, state, block) -> tuple[Settled, Bool[Array, ""]]:
    """The evictions if each key is evicted at its moment or not at all, and whether all exponentials were finite."""
    slots, t, visible = block.slots, block.clock, block.visible
    when = jnp.where(slots.live, jnp.maximum(policy.moment(state, slots), t[0]), FOREVER)
    due = slots.live & (when <= slots.seen)
    lost, every = jnp.zeros_like(due), None
    if block.softmax is None:
        until = jnp.where(due, when, FOREVER)
        return Settled(until, lost, state, None, None, jnp.int32(1)), jnp.asarray(True)
    judges = visible.any((1, 2))[:, None, None]  # not padding, whose clock may be past the end
    if block.logits is not None:
        powers, least, every = _powers(block, when)

    def attention(evicted):
        """Weights, their total, and the slots that are seen if these keys are evicted, each at its moment."""
        last = jnp.where(evicted, when, FOREVER)
        seen = visible & (t <= last)
        if block.logits is None:
            return *block.softmax(block.attended(seen)), seen
        # min(power, infinity or 0): a CPU sums this twice as fast as a selection. Powers are 0 for slots that the
        # queries cannot reach; with ``every``, they are not 0 for keys that are no longer live.
        weights = jnp.minimum(powers, jnp.where(t <= jnp.where(slots.live, last, 0), jnp.inf, 0.0))
        return weights, jnp.maximum(slots.layout.sum_per_head(weights), NEXT_TO_0), seen

    def verdict(weights, total, seen):
        """Which keys each query found important, and which keys are evicted in consequence."""
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

    The largest logit that is certainly seen is subtracted first: then equal logits have weights of 1, as in any other
    softmax, and no total is 0. If a logit is not finite, or if that of a key which may be evicted is much larger than
    the others, the total is not finite or below the least total, and the block is read query by query instead.

    With ``every`` the logit of each query's own key is subtracted instead, which does not depend on the policy, so that
    a grid of policies shares the exponentials. The own key is always seen, and if all logits that are seen are equal,
    their weights are 1. Where the largest logit is larger by more than `FAR`, that one is subtracted, and the least
    total is 1: its key has to be seen.
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
    """Calls the policy query by query with given attention. Returns ``until``, ``lost`` and the state."""
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
