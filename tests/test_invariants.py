"""Each invariant holds of a sound history, and says where an unsound one breaks it."""

import numpy as np
import pytest

from simulator import invariants
from simulator.invariants import InvariantError


def full(layers=2, heads=2, steps=6):
    return np.broadcast_to(np.tril(np.ones((steps, steps), bool)), (layers, heads, steps, steps)).copy()


def without(*places):
    """The full history of two layers with some (layer, head, clock, key) taken out, or put in."""
    kept = full()
    for layer, head, clock, key in places:
        kept[layer, head, clock - 1, key] ^= True
    return kept


IMPORTANT = full()  # every query finds every key important
NOTHING = np.zeros_like(IMPORTANT)

BROKEN = {
    "no_key_before_its_time": (invariants.no_key_before_its_time, [without((1, 0, 3, 4))], (1, 0, 3, 4)),
    "none_returns": (invariants.none_returns, [without((0, 1, 4, 2))], (0, 1, 5, 2)),
    "newest_live": (invariants.newest_live, [without((1, 1, 6, 4)), 2], (1, 1, 6, 4)),
    "none_early": (invariants.none_early, [without((1, 1, 2, 0), (0, 0, 6, 0)), 3], (1, 1, 2, 0)),
    "within_capacity": (invariants.within_capacity, [full(), 5], (0, 0, 6, None)),
    "important_keys_are_kept": (
        invariants.important_keys_are_kept,
        [without((0, 1, 6, 2)), IMPORTANT, 2],
        (0, 1, 6, 2),
    ),
    "unimportant_keys_are_evicted": (invariants.unimportant_keys_are_evicted, [full(), NOTHING, 3, 2], (0, 0, 3, 0)),
    "monotone": (lambda kept, of: invariants.subset(kept, of, "there"), [full(), without((1, 0, 5, 1))], (1, 0, 5, 1)),
    "alike": (
        lambda kept, of: invariants.same_decisions("alike", kept, of, "there"),
        [without((0, 0, 5, 1)), full()],
        (0, 0, 5, 1),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_says_where(name):
    claim, arguments, where = BROKEN[name]
    with pytest.raises(InvariantError, match=f"^{name}: layer {where[0]}, head {where[1]}, clock {where[2]}") as caught:
        claim(*arguments)
    error = caught.value
    assert (error.invariant, error.layer, error.head, error.clock, error.key) == (name, *where)


def test_what_is_sound_passes():
    kept = full()
    invariants.no_key_before_its_time(kept)
    invariants.none_returns(kept)
    invariants.newest_live(kept, 6)
    invariants.none_early(kept, 6)
    invariants.within_capacity(kept, 6)
    invariants.important_keys_are_kept(kept, NOTHING, 3)
    invariants.unimportant_keys_are_evicted(kept, IMPORTANT, 3, 1)
    invariants.subset(without((0, 0, 5, 1)), kept, "there")
    invariants.same_decisions("alike", kept, kept, "there")


def test_the_earliest_break_is_named():
    with pytest.raises(InvariantError, match="layer 1, head 0, clock 2, key 0"):
        invariants.newest_live(without((0, 0, 5, 3), (1, 0, 2, 0)), 6)


def test_numbers_may_differ_by_head():
    kept = without((0, 1, 4, 0))  # head 1 of layer 0 lets key 0 go after clock 4
    invariants.newest_live(kept, np.array([6, 3]))
    invariants.none_early(kept[:, :, :4], np.array([6, 4]))
    with pytest.raises(InvariantError, match="layer 0, head 1, clock 4, key 0"):
        invariants.newest_live(kept, np.array([3, 6]))
    important = NOTHING.copy()
    important[:, :, 2, 0] = True  # asked for at clock 3
    invariants.important_keys_are_kept(kept[:, :, :4], important[:, :, :4], np.array([2, 1]))
    with pytest.raises(InvariantError, match="layer 0, head 1, clock 4, key 0"):
        invariants.important_keys_are_kept(kept, important, np.array([1, 2]))


def test_steps_may_be_chunks():
    """Rows after clocks 2, 4 and 6: key 1 was read and went within the same chunk."""
    clock = np.array([2, 4, 6])
    kept = full()[:, :, clock - 1]
    invariants.unimportant_keys_are_evicted(kept, IMPORTANT, 2, 1, clock)
    kept[0, 0, 0, 1] = False
    with pytest.raises(InvariantError, match="layer 0, head 0, clock 2, key 1"):
        invariants.important_keys_are_kept(kept, IMPORTANT, 2, clock)


def test_importance_by_hand():
    """Query 3 of three: logits 0, ln 2, 0, so a quarter, a half, a quarter; only the half reaches a third."""
    k = np.eye(3)[:, None]
    q = np.zeros((3, 1, 2, 3))
    q[2, 0, 0] = [0, np.log(2), 0]
    attended = np.tril(np.ones((3, 3), bool))[None]
    choices = {"scale": 1.0, "multiple": 1, "threshold": "position"}
    mean = invariants.importance(q, k, attended, group="mean", **choices)
    assert mean[0].tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]  # 0.29, 0.42, 0.29
    both = invariants.importance(q, k, attended, group="any", **choices)
    assert both[0, 2].tolist() == [1, 1, 1]  # to the second head all look alike: exact ties
    without_0 = attended.copy()
    without_0[0, 2, 0] = False
    position = invariants.importance(q, k, without_0, group="mean", **choices)
    live = invariants.importance(q, k, without_0, group="mean", scale=1.0, multiple=1, threshold="live")
    assert position[0, 2].tolist() == [0, 1, 1]  # 0.58 and 0.42 against a third
    assert live[0, 2].tolist() == [0, 1, 0]  # against a half
    twice = invariants.importance(q, k, attended, group="any", **(choices | {"multiple": np.array([2])}))
    assert twice[0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0]]  # a half against two thirds
