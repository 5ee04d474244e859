"""The recurrence over one recorded layer, under `jax.lax.scan`, as `simulator.replay` runs it.

Logits are computed for a block of queries at a time, as one matrix product, and `corm_jax.core.exact` derives what is
evicted in it; for a policy that evicts after chunks, the chunks are scanned. Key i has slot i and is never moved.
``until`` is the clock of the last query before the key is evicted.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from corm_jax.core.arrays import EMPTY, broadcasts, iota, narrow, over_group
from corm_jax.core.attention import output, softmax
from corm_jax.core.exact import FOREVER, Block, Room, settle
from corm_jax.core.layout import Apart
from corm_jax.core.observation import last, observed
from corm_jax.core.slots import Slots
from corm_jax.core.types import CacheSpec, by_slot
from corm_jax.traces.meta import QKV, Rows

SEGMENTS = 6
"""The number of parts of a trace. Each is read over the keys up to its own end, which skips most masked logits."""


@broadcasts
def replay_layer(policy, layer, form, steps, capacity, prompt, *, chunk, block, moments, fidelity, errors):
    """Replays a policy over one layer.

    Args:
      policy: its numbers may be traced.
      layer: ``QKV(q [padded, kv_heads, group, head_dim], k, v [padded, kv_heads, head_dim])``, or
        ``Rows(probs [kv_heads, group, padded, padded])``.
      form: that of the attention, a `corm_jax.core.form.Form`.
      steps: how many of the padded steps are real.
      capacity: slots a head, or None.
      prompt: how many of the steps are the prompt.
      chunk, block, moments, fidelity, errors: static, see `simulator.replay`; ``block`` divides ``padded``, and
        ``moments`` is as in `corm_jax.core.exact.settle`.

    Returns:
      ``until, lost, needed [kv_heads, padded]``, ``mass, error [padded, kv_heads, group]``, as in
      `simulator.replay.Replay`; ``error`` is None unless ``errors`` is true.
    """
    policy = narrow(policy)
    if isinstance(layer, QKV):
        padded, kv_heads, head_dim = layer.k.shape
    else:
        padded, kv_heads, head_dim = layer.probs.shape[-1], layer.probs.shape[0], 1
    blocks = padded // block
    ends = sorted({-(-blocks * part // SEGMENTS) for part in range(1, SEGMENTS + 1)})
    carry: Any = None
    measured, begin = [], 0
    for end in ends:
        extent = end * block
        spec = CacheSpec(kv_heads, extent, head_dim)
        fresh = (
            policy.init(spec),
            jnp.full(spec.slots, FOREVER, jnp.int32),
            jnp.zeros(spec.slots, bool),
            jnp.zeros(spec.slots, jnp.int32),
        )
        if begin:
            fresh = jax.tree.map(lambda new, old: new.at[..., : old.shape[-1]].set(old), fresh, carry)
        body = partial(
            _block,
            policy,
            _first_keys(layer, extent),
            form,
            steps,
            capacity,
            prompt,
            chunk,
            block,
            moments,
            fidelity,
            errors,
        )
        carry, out = jax.lax.scan(body, fresh, (begin + iota(end - begin)) * block)
        measured.append(out)
        begin = end
    _, until, lost, needed = carry
    mass, error = jax.tree.map(lambda *parts: jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in parts]), *measured)
    return until, lost, needed, mass, error


def _first_keys(layer: QKV | Rows, extent: int) -> QKV | Rows:
    if isinstance(layer, Rows):
        return Rows(layer.probs[..., :extent])
    return QKV(layer.q, layer.k[:extent], layer.v[:extent])


def _block(policy, layer, form, steps, capacity, prompt, chunk, block, moments, fidelity, errors, carry, start):
    """A block of queries: logits and the full cache's attention for all at once, then the policy's evictions."""
    state, until, lost, needed = carry
    kv_heads, keys = until.shape
    layout, clock, key = Apart(), (start + 1 + iota(block))[:, None, None], iota(keys)
    logits = _logits(layout, layer, form, clock, key, start, block)
    causal = jnp.broadcast_to((key < clock) & (clock <= steps), (block, kv_heads, keys))
    within = form.within(clock - 1, key[None])
    reach = causal if within is None else causal & within  # what each query of the full cache sees
    renormalized, watched = fidelity == "renormalized", "attention" in policy.traits.needs
    shared = renormalized and watched and chunk == 1  # the exponentials, for the full cache and for the policy's
    logits = jnp.where(reach, logits, -jnp.inf) if shared else logits
    found: Any = None
    share: Any = None
    full: Any = None if shared else softmax(layout, logits, reach)  # weights and their total

    def only(visible):
        """The probabilities of the full cache, without those that are not visible."""
        return jnp.where(visible, full[0], 0.0), full[1]

    attend = partial(softmax, layout, logits) if renormalized else only
    vectors = jnp.asarray(layer.k).swapaxes(0, 1) if isinstance(layer, QKV) else None
    if chunk == 1:
        seen = jnp.minimum(start + block, steps)
        live = (until == FOREVER) & (key < seen)
        slots = Slots(jnp.where(live, key, EMPTY), seen, prompt, layout)
        fresh = by_slot(lambda part: part[..., :1, :1], policy.init(CacheSpec(kv_heads, keys, 1)))
        every = own = None
        if shared:  # the same for all policies
            every, newest = reach, jax.lax.dynamic_slice_in_dim(logits, start, block, 3)
            own = layout.most(jnp.where((iota(block)[:, None] == iota(block))[:, None], newest, -jnp.inf))
        attention = attend if watched else None, logits if shared else None
        extra = {"within": within, "every": every, "own": own, "outputs": errors}
        one = Block(slots, clock, live & causal, *attention, vectors, **extra)
        found = settle(policy, state, fresh, one, None if capacity is None else Room(capacity), moments)
        state, until, lost = found.state, jnp.where(live, found.until, until), lost | found.lost
        full, share = (found.every[:2], found.every[2]) if shared else (full, None)
    else:

        def attended(visible, begin):
            rows, weights, total = (jax.lax.dynamic_slice_in_dim(x, begin, chunk, 1) for x in (logits, *full))
            visible = visible & jax.lax.dynamic_slice_in_dim(reach, begin, chunk, 0)
            return softmax(layout, rows, visible) if renormalized else (jnp.where(visible, weights, 0.0), total)

        step = partial(_chunk, policy, layout, steps, capacity, prompt, chunk, start, attended, vectors)
        (state, until, lost), _ = jax.lax.scan(step, (state, until, lost), chunk * iota(block // chunk))
    rest = reach & (clock <= until)
    mass = share if shared else layout.sum_per_head(only(rest)[0]) / full[1]
    important = over_group(jnp.logical_or, full[0] >= layout.broadcast(full[1]) / clock.astype(jnp.float32)) & reach
    needed = jnp.maximum(needed, last(important, clock, 0))
    error = None
    if errors:
        v = jnp.asarray(layer.v).swapaxes(0, 1)
        reference = output(layout, full[0], full[1], v)
        norm = jnp.linalg.norm(reference, axis=-1)
        kept = (found.weights, found.total) if shared else attend(rest)
        error = jnp.linalg.norm(output(layout, *kept, v) - reference, axis=-1) / jnp.where(norm == 0, 1, norm)
    return (state, until, lost, needed), (mass.transpose(1, 2, 0), error)


def _chunk(policy, layout, steps, capacity, prompt, chunk, start, attend, keys, carry, begin):
    """A chunk of queries, after which the policy evicts."""
    state, until, lost = carry
    key = iota(until.shape[-1])
    before, seen = jnp.minimum(start + begin, steps), jnp.minimum(start + begin + chunk, steps)

    def view(live, arrived):
        return Slots(jnp.where(live, key, EMPTY), seen, prompt, layout, arrived=arrived)

    if capacity is not None:
        slots = view((until == FOREVER) & (key < before), None)
        over = slots.sum_per_head(slots.live) + (seen - before) - capacity
        out = slots.lowest(policy.score(state, slots), over, chunk)
        until, lost = jnp.where(out, before, until), lost | out
    live = (until == FOREVER) & (key < seen)
    slots, now = view(live, chunk), (start + begin + 1 + iota(chunk))[:, None, None]
    visible = live & (key < now) & (now <= steps)
    state = policy.observe(state, observed(layout, *attend(visible, begin), visible, now, keys), slots)
    until = jnp.where(live & ~policy.retain(state, slots) & (seen > before), seen, until)
    return (state, until, lost), None


def _logits(layout, layer: QKV | Rows, form, clock, key, start, block):
    """``[group, block, kv_heads, keys]``."""
    if isinstance(layer, Rows):  # softmax(ln p) = p
        return jnp.log(jax.lax.dynamic_slice_in_dim(layer.probs, start, block, 2)).transpose(1, 2, 0, 3)
    q = jax.lax.dynamic_slice_in_dim(layer.q, start, block)
    bias = form.bias(clock - 1, key[None], layout)
    return form._replace(scale=1.0).logits(layout, form.scale * q, jnp.asarray(layer.k).swapaxes(0, 1), bias)
