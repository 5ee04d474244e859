"""Invariants of eviction histories, each with a name.

A history is ``kept``, bool ``[layers, kv_heads, steps, keys]``: whether key i (from 0) is live after each step, which
is what `simulator.replay` returns and what `simulator.testing` reads out of a cache. ``clock``, int ``[steps]``, is the
number of tokens seen after each step: 1, 2, 3, ... unless given, or the ends of the chunks if there are chunks.

An invariant that does not hold raises an `InvariantError`, which names the layer, the head, the clock and the key.

>>> kept = np.tril(np.ones((4, 4), bool))[None, None]       # the full cache
>>> newest_live(kept, recent=2)
>>> kept[0, 0, 3, 2] = False                                # key 2 is evicted at the last step
>>> newest_live(kept, recent=2)
Traceback (most recent call last):
    ...
simulator.invariants.InvariantError: newest_live: layer 0, head 0, clock 4, key 2: is evicted, but among the newest 2
"""

from typing import Any

import numpy as np

CLOSE = 1e-4
"""A comparison that is nearer than this to a tie, but not an exact tie, may be decided by rounding: it is left out."""


class InvariantError(AssertionError):
    """An invariant does not hold.

    Attributes:
      invariant: its name.
      layer, head, clock, key: the place; None for those that the invariant is not about.
    """

    def __init__(self, invariant: str, what: str, **where: int):
        place = ", ".join(f"{name} {value}" for name, value in where.items())
        super().__init__(f"{invariant}: {place}{': ' if place else ''}{what}")
        self.invariant = invariant
        self.layer, self.head, self.clock, self.key = (where.get(name) for name in ("layer", "head", "clock", "key"))


def no_key_before_its_time(kept: np.ndarray, clock: np.ndarray | None = None) -> None:
    """No key is live before it was read."""
    key, clock = _axes(kept, clock)
    _refuse("no_key_before_its_time", kept & (key >= clock), clock, "is live, but not read yet")


def none_returns(kept: np.ndarray, clock: np.ndarray | None = None) -> None:
    """A key that was evicted is never live again."""
    key, clock = _axes(kept, clock)
    gone = np.logical_or.accumulate(~kept & (key < clock), axis=-2)
    _refuse("none_returns", kept & gone, clock, "is live again after it was evicted")


def newest_live(kept: np.ndarray, recent, clock: np.ndarray | None = None) -> None:
    """The newest ``recent`` keys (a number, ``[kv_heads]``, or ``[layers, kv_heads]``) are live."""
    key, clock = _axes(kept, clock)
    newest = (key < clock) & (key >= clock - _per_head(recent))
    _refuse("newest_live", ~kept & newest, clock, f"is evicted, but among the newest {recent}")


def none_early(kept: np.ndarray, window, clock: np.ndarray | None = None) -> None:
    """Nothing is evicted before ``window`` queries (a number, ``[kv_heads]``, or ``[layers, kv_heads]``) were seen."""
    key, clock = _axes(kept, clock)
    bad = ~kept & (key < clock) & (clock < _per_head(window))
    _refuse("none_early", bad, clock, f"is evicted before {window} queries were seen")


def within_capacity(kept: np.ndarray, capacity: int, clock: np.ndarray | None = None) -> None:
    """No head holds more than ``capacity`` keys."""
    _, clock = _axes(kept, clock)
    live = kept.sum(-1)
    if (live > capacity).any():
        layer, head, step = _first(live > capacity)
        raise InvariantError(
            "within_capacity",
            f"{live[layer, head, step]} keys are live in {capacity} slots",
            layer=layer, head=head, clock=int(clock[step, 0]),
        )  # fmt: skip


def at_most(kept: np.ndarray, most, clock: np.ndarray | None = None) -> None:
    """No head holds more than ``most`` keys: a number, ``[kv_heads]``, ``[layers, kv_heads]``, or None for no bound."""
    if most is None:
        return
    _, clock = _axes(kept, clock)
    live = kept.sum(-1)
    over = live > np.asarray(most)[..., None]
    if over.any():
        layer, head, step = _first(over)
        what = f"{live[layer, head, step]} keys are live, but the policy declares at most {most}"
        raise InvariantError("at_most", what, layer=layer, head=head, clock=int(clock[step, 0]))


def within_pool(kept: np.ndarray, slots: int, clock: np.ndarray | None = None) -> None:
    """The heads of a layer hold at most ``slots`` keys together."""
    _, clock = _axes(kept, clock)
    live = kept.sum((-3, -1))
    if (live > slots).any():
        layer, step = _first(live > slots)
        what = f"{live[layer, step]} keys are live in a pool of {slots} slots"
        raise InvariantError("within_pool", what, layer=layer, clock=int(clock[step, 0]))


def important_keys_are_kept(kept: np.ndarray, important: np.ndarray, window, clock: np.ndarray | None = None) -> None:
    """CORM: a key that one of the last ``window`` queries found important is not evicted.

    Args:
      important: bool ``[layers, kv_heads, queries, keys]``, as `importance` returns it.
    """
    key, clock = _axes(kept, clock)
    bad = _evicted(kept, key, clock) & _found_important(important, clock, window)
    _refuse(
        "important_keys_are_kept", bad, clock, f"is evicted, but one of the last {window} queries found it important"
    )


def unimportant_keys_are_evicted(
    kept: np.ndarray, important: np.ndarray, window, recent, clock: np.ndarray | None = None
) -> None:
    """CORM: from clock ``window`` on, a key that none of the last ``window`` queries found important is evicted.

    The newest ``recent`` keys are exempt. Arguments as for `important_keys_are_kept`.
    """
    key, clock = _axes(kept, clock)
    old = (key < clock - _per_head(recent)) & (clock >= _per_head(window))
    bad = kept & old & ~_found_important(important, clock, window)
    _refuse(
        "unimportant_keys_are_evicted", bad, clock, f"is live, but none of the last {window} queries found it important"
    )


def subset(kept: np.ndarray, of: np.ndarray, what: str, clock: np.ndarray | None = None) -> None:
    """Every key in ``kept`` is also in ``of``, which has, for example, a larger window."""
    _, clock = _axes(kept, clock)
    _refuse("monotone", kept & ~of, clock, f"is kept, but not {what}")


def same_decisions(name: str, kept: np.ndarray, other: np.ndarray, what: str, clock: np.ndarray | None = None) -> None:
    """Two histories are equal, key for key. ``name`` is the invariant, ``what`` describes the other history."""
    _, clock = _axes(kept, clock)
    _refuse(name, kept & ~other, clock, f"is live, but not {what}")
    _refuse(name, ~kept & other, clock, f"is evicted, but not {what}")


def importance(
    q: np.ndarray,
    k: np.ndarray,
    attended: np.ndarray,
    *,
    scale: float,
    multiple: Any,
    group: str,
    threshold: str,
    slack: float = 0.0,
    softcap: float | None = None,
    slopes: Any = None,
) -> np.ndarray:
    """Which keys each query found important, from scratch in float64: bool ``[kv_heads, queries, keys]``.

    Args:
      q: ``[queries, kv_heads, group, head_dim]``; k: ``[keys, kv_heads, head_dim]``.
      attended: bool ``[kv_heads, queries, keys]``, which keys the query could attend to.
      multiple: as in `corm_jax.Corm`, a number or ``[kv_heads]``.
      group, threshold: likewise.
      softcap, slopes: as in `corm_jax.traces.meta.Meta`, the latter ``[kv_heads, group]``.
      slack: the share of the threshold by which alpha may miss it; if negative, by which alpha must exceed it. Exact
        ties (all logits are equal) count as important in either case.
    """
    logits = scale * np.einsum("qhgd,khd->ghqk", q, k, dtype=np.float64)
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    if slopes is not None:
        distance = np.arange(len(q))[:, None] - np.arange(len(k))
        logits -= np.asarray(slopes, np.float64).T[..., None, None] * distance
    logits = np.where(attended, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    alpha = weights / weights.sum(-1, keepdims=True)
    clock = np.arange(1, len(q) + 1)[:, None]
    n = clock if threshold == "position" else attended.sum(-1, keepdims=True)
    ratio = alpha * n if group == "any" else (alpha * n).mean(0, keepdims=True)
    least = np.asarray(multiple)[..., None, None]
    return ((ratio >= least * (1 - slack)) | (np.abs(ratio - least) < 1e-12)).any(0) & attended


def _evicted(kept, key, clock):
    before = np.concatenate([np.zeros_like(kept[..., :1, :]), kept[..., :-1, :]], axis=-2)
    start = np.concatenate([[0], clock[:-1, 0]])[:, None]
    return (before | ((key >= start) & (key < clock))) & ~kept


def _found_important(important, clock, window):
    """Bool ``[layers, kv_heads, steps, keys]``: whether one of the last ``window`` queries found the key important."""
    counts = np.concatenate([np.zeros_like(important[..., :1, :], int), important.cumsum(-2)], axis=-2)
    layers, heads = np.ogrid[: important.shape[0], : important.shape[1]]
    ends = clock[:, 0]
    starts = np.maximum(ends - np.broadcast_to(np.asarray(window)[..., None], (layers.size, heads.size, 1)), 0)
    return counts[..., ends, :] > counts[layers[..., None], heads[..., None], starts]


def _axes(kept: np.ndarray, clock: np.ndarray | None):
    clock = np.arange(1, kept.shape[-2] + 1) if clock is None else np.asarray(clock)
    return np.arange(kept.shape[-1]), clock[:, None]


def _per_head(number):
    number = np.asarray(number)
    return number[..., None, None] if number.ndim else number


def _first(bad: np.ndarray) -> tuple[int, ...]:
    """The index of the first True, in the order of steps (axis 2) before layers and heads."""
    where = np.argwhere(bad)
    return tuple(int(index) for index in min(where.tolist(), key=lambda index: (index[2], *index)))


def _refuse(name: str, bad: np.ndarray, clock: np.ndarray, what: str) -> None:
    if bad.any():
        layer, head, step, key = _first(bad)
        raise InvariantError(name, what, layer=layer, head=head, clock=int(clock[step, 0]), key=key)
