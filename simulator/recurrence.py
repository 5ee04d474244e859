"""The exact recurrence over one recorded layer, under `jax.lax.scan`: what `simulator.replay` runs.

Logits come a block of queries at a time, as one matrix product; only what depends on earlier evictions goes query by
query. Key i has slot i and is never moved. When it goes, ``until`` says which query was its last.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from corm_jax.types import EMPTY, CacheSpec, Observation, Slots, broadcasts, iota, narrow
from simulator.trace import QKV, Rows

FOREVER = np.iinfo(np.int32).max
"""``until`` of a key that was live at the end."""

SEGMENTS = 8
"""A trace is read in so many parts, each over the keys up to its own end, which skips most of the causal half."""


@broadcasts
def read(policy, layer, scale, steps, capacity, prompt, *, chunk, block, fidelity, errors):
    """One layer through a policy.

    Args:
      policy: its numbers may be traced.
      layer: ``QKV(q [padded, kv_heads, group, head_dim], k, v [padded, kv_heads, head_dim])``, or
        ``Rows(probs [kv_heads, group, padded, padded])``.
      scale: of the logits.
      steps: how many of the padded steps are real.
      capacity: slots a head, or None.
      prompt: how many of the steps are the prompt.
      chunk, block, fidelity, errors: static, see `simulator.replay`; ``block`` divides ``padded``.

    Returns:
      ``until, lost, needed [kv_heads, padded]``, ``mass, error [padded, kv_heads, group]``, as in
      `simulator.replay.Replay`; ``error`` is None unless asked for.
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
            _block, policy, _first_keys(layer, extent), scale, steps, capacity, prompt, chunk, block, fidelity, errors
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


def _block(policy, layer, scale, steps, capacity, prompt, chunk, block, fidelity, errors, carry, start):
    """A block of queries: logits and the full cache's attention for all at once, then the policy chunk by chunk."""
    logits = _logits(layer, scale, start, block)  # [kv_heads, group, block, keys]
    key = iota(logits.shape[-1])
    clock = start + 1 + iota(block)
    causal = (key < clock[:, None]) & (clock <= steps)[:, None]
    full = _Softmax.of(logits, causal)
    important = (full.weights * clock[:, None].astype(jnp.float32) / full.total >= 1).any(1) & causal

    keys = jnp.asarray(layer.k).swapaxes(0, 1) if isinstance(layer, QKV) else None

    def step(carry, begin):
        state, until, lost = carry
        before, seen = jnp.minimum(start + begin, steps), jnp.minimum(start + begin + chunk, steps)
        if capacity is not None:
            slots = Slots(jnp.where((until == FOREVER) & (key < before), key, EMPTY), seen, prompt)
            out = slots.lowest(policy.rank(state, slots), slots.total(slots.live) + (seen - before) - capacity)
            until, lost = jnp.where(out, before, until), lost | out
        live = (until == FOREVER) & (key < seen)
        slots = Slots(jnp.where(live, key, EMPTY), seen, prompt)
        now = start + begin + 1 + iota(chunk)[:, None, None]
        visible = live & (key < now) & (now <= steps)  # [chunk, kv_heads, keys]
        mask = visible.transpose(1, 0, 2)[:, None]
        everything, rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, chunk, 2), (full, logits))
        rest = _Softmax.of(rows, mask) if fidelity == "renormalized" else everything.only(mask)
        broken = jnp.isnan(rest.total)  # who has no softmax attended to nothing, see `corm_jax.attend`
        observation = Observation(
            weights=jnp.where(broken, 0.0, rest.weights).transpose(1, 2, 0, 3),
            total=jnp.where(broken, 1.0, rest.total).transpose(1, 2, 0, 3),
            visible=visible,
            seen=now,
            keys=keys,
        )
        state = policy.observe(state, observation, slots)
        keep = policy.retain(state, slots) | (seen == before)
        until = jnp.where(live & ~keep, seen, until)
        return (state, until, lost), rest.share_of(everything).transpose(2, 0, 1)

    state, until, lost, needed = carry
    (state, until, lost), mass = jax.lax.scan(step, (state, until, lost), chunk * iota(block // chunk))
    error = None
    if errors:
        mask = (causal & (until[:, None] >= clock[:, None]))[:, None]
        rest = _Softmax.of(logits, mask) if fidelity == "renormalized" else full.only(mask)
        reference = full.output(layer.v)
        norm = jnp.linalg.norm(reference, axis=-1)
        error = jnp.linalg.norm(rest.output(layer.v) - reference, axis=-1) / jnp.where(norm == 0, 1, norm)
        error = error.transpose(2, 0, 1)
    needed = jnp.maximum(needed, jnp.where(important, clock[:, None], 0).max(1))
    return (state, until, lost, needed), (mass.reshape(-1, *mass.shape[2:]), error)


class _Softmax(NamedTuple):
    """``exp(l - largest)`` and its total over visible keys. Queries that see nothing have weights 0 and total 1."""

    weights: Float[Array, "kv_heads group queries keys"]
    largest: Float[Array, "kv_heads group queries 1"]
    total: Float[Array, "kv_heads group queries 1"]

    @classmethod
    def of(cls, logits, visible):
        logits = jnp.where(visible, logits, -jnp.inf)
        largest = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0.0, largest))
        total = weights.sum(-1, keepdims=True)
        return cls(weights, largest, jnp.where(total == 0.0, 1.0, total))

    def only(self, visible):
        """The same probabilities, without those that are not visible."""
        return self._replace(weights=jnp.where(visible, self.weights, 0.0))

    def share_of(self, everything):
        """The share of all attention that falls on these keys: ``[kv_heads, group, queries]``."""
        scale = jnp.where(jnp.isneginf(self.largest), 0.0, jnp.exp(self.largest - everything.largest))
        return (self.weights.sum(-1, keepdims=True) * scale / everything.total)[..., 0]

    def output(self, v):
        """``[kv_heads, group, queries, head_dim]``."""
        return jnp.einsum("hgqk,khd->hgqd", self.weights, v, precision="highest") / self.total


def _logits(layer: QKV | Rows, scale, start, block):
    if isinstance(layer, Rows):  # softmax(ln p) = p
        return jnp.log(jax.lax.dynamic_slice_in_dim(layer.probs, start, block, 2))
    q = jax.lax.dynamic_slice_in_dim(layer.q, start, block)
    return scale * jnp.einsum("qhgd,khd->hgqk", q, layer.k, precision="highest")
