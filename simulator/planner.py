"""Sizes of pools from traces: how many slots the heads of a layer need together, so that few keys overflow."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from corm_jax.errors import CormError
from corm_jax.policies import parse
from corm_jax.policies.plan import Plan
from corm_jax.traces.trace import Trace
from simulator.forms import policies_of
from simulator.replay import Replay, replay


def plan(
    traces: Sequence[Trace],
    spec: str,
    *,
    chunk: int = 1,
    overflow: float = 0.001,
    spare: float = 0.0,
    progress: Callable[[int], None] = lambda done: None,
) -> Plan:
    """Pools that suffice on every trace, except for a share of the keys.

    Before a chunk of c tokens, the n live keys of a layer and c new keys for each of its H heads need a slot. With S
    slots, at most max(n + c H - S, 0) keys are evicted for want of one, if evictions change nothing else. A key that is
    evicted a chunk early is counted again where it would still have been live, so this bound is rather too large. The
    plan takes the smallest S for which

        sum over the chunks of max(n + c H - S, 0)  <=  overflow * keys

    in each trace, rounded up to the same number for each head.

    Args:
      traces: traces of one model.
      spec: the policy, as on the command line.
      chunk: tokens between evictions, in the replay and in use.
      overflow: the share of keys that may be evicted for lack of a slot.
      spare: the share of additional slots, since other texts need more slots in some layers.
      progress: called with the number of layers done, over all traces.

    Raises:
      CormError: for traces of different models, an impossible share, and as `simulator.replay.replay`.

    >>> from simulator.synthetic import noise
    >>> plan([noise(layers=2, steps=64)], "corm:window=8,recent=4", overflow=0.0).capacity
    (50, 48)
    """
    if not traces:
        raise CormError("there is no trace to plan on: give at least one")
    if not 0 <= overflow < 1:
        raise CormError(f"overflow must be a share of the keys in [0, 1), not {overflow}")
    if not spare >= 0:
        raise CormError(f"spare must be a share from 0 up, not {spare}")
    shapes = {(t.meta.model, t.meta.layers, t.meta.kv_heads, t.meta.head_dim, t.meta.windows) for t in traces}
    if len(shapes) > 1:
        raise CormError(f"the traces are of {len(shapes)} models: plan for each by itself")
    (model, layers, kv_heads, head_dim, _), policy = shapes.pop(), parse(spec)
    capacity = np.array([np.max(one.traits.protected) + chunk for one in policies_of(traces[0].meta, policy)])
    for index, trace in enumerate(traces):
        before = index * layers
        result = replay(
            trace, policy, chunk=chunk, errors=False, progress=lambda done, before=before: progress(before + done)
        )
        for layer, need in enumerate(wanted(result, chunk)):
            slots = smallest(need, overflow * kv_heads * result.steps)
            capacity[layer] = max(capacity[layer], -(-slots // kv_heads))
    return Plan(
        model=model.removesuffix(" (bfloat16)"),  # a suffix that recording adds; the plan is for any dtype
        policy=spec,
        kv_heads=kv_heads,
        head_dim=head_dim or 1,
        chunk=chunk,
        tokens=min(trace.meta.steps for trace in traces),
        overflow=overflow,
        capacity=tuple(math.ceil(slots * (1 + spare)) for slots in capacity.tolist()),
    )


def wanted(result: Replay, chunk: int) -> np.ndarray:
    """Int ``[layers, chunks]``: slots that a layer needs at each chunk, for its live keys and the new ones."""
    starts = np.arange(0, result.steps, chunk)
    new = np.minimum(chunk, result.steps - starts) * result.live.shape[1]
    live = result.live.sum(1)
    before = np.concatenate([np.zeros_like(live[:, :1]), live[:, starts[1:] - 1]], axis=1)
    return before + new


def smallest(need: np.ndarray, allowed: float) -> int:
    """The least S with sum max(need - S, 0) <= allowed."""
    low, high = 0, int(need.max())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if np.maximum(need - middle, 0).sum() <= allowed else (middle + 1, high)
    return low
