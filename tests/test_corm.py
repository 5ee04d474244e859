"""CORM in JAX against the specification, decision for decision."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from corm_jax.policies import Corm, Full
from simulator import reference, rules
from simulator.reading import read_head
from simulator.verify import drive
from tests.heads import TOKENS, chunks_of, corm_last, heads, live_sets, options, padded

CLOSE = 1e-4  # comparisons this near to a tie, and not exact ties, hang on float32 rounding


def agree(reading, outputs, position, overflow, tokens):
    assert [live_sets(p) for p in position[: len(reading.kept)]] == reading.kept
    assert int(overflow) == reading.overflow
    np.testing.assert_allclose(outputs[:tokens], reading.outputs, atol=2e-5)


@settings(max_examples=60)
@given(head=heads(), options=options(), chunk=st.sampled_from([1, 2, 5]), capacity=st.sampled_from([TOKENS, 9, 6]))
def test_same_keys_survive_as_in_the_specification(head, options, chunk, capacity):
    tokens = head[0].shape[0]
    expected = reference.corm_messages(*head, **options, chunks=chunks_of(tokens, chunk), capacity=capacity)
    assume(expected.margin > CLOSE)
    q, k, v = (padded(x, chunk) for x in head)
    outputs, position, last = drive(
        Corm(**options), q[:, None], k[:, None], v[:, None], tokens, capacity=capacity, chunk=chunk
    )
    agree(expected, outputs[:, 0], np.asarray(position)[:, 0], last.overflow[0], tokens)


@given(head=heads(), chunk=st.sampled_from([1, 2, 5]), capacity=st.sampled_from([TOKENS, 6]))
def test_full_keeps_all_and_then_the_newest(head, chunk, capacity):
    tokens = head[0].shape[0]
    expected = read_head(rules.Rule(), *head, chunks=chunks_of(tokens, chunk), capacity=capacity)
    q, k, v = (padded(x, chunk) for x in head)
    outputs, position, last = drive(Full(), q[:, None], k[:, None], v[:, None], tokens, capacity=capacity, chunk=chunk)
    agree(expected, outputs[:, 0], np.asarray(position)[:, 0], last.overflow[0], tokens)


@given(pair=st.tuples(heads(group=2), heads(group=2)), options=options())
def test_heads_do_not_meet_and_each_has_its_own_window(pair, options):
    tokens = min(head[0].shape[0] for head in pair)
    pair = [tuple(x[:tokens] for x in head) for head in pair]
    windows, recents = np.array([options["window"], 3], np.int32), np.array([options["recent"], 2], np.int32)
    multiples = np.array([options["multiple"], 2], np.int32)
    policy = Corm(**{**options, "window": windows, "recent": recents, "multiple": multiples})
    q, k, v = (np.stack([padded(head[i], 1) for head in pair], axis=1) for i in range(3))
    outputs, position, last = drive(policy, q, k, v, tokens, capacity=9, chunk=1)
    for h, head in enumerate(pair):
        own = {**options, "window": int(windows[h]), "recent": int(recents[h]), "multiple": int(multiples[h])}
        expected = corm_last(*head, **own, capacity=9)
        assume(expected.margin > CLOSE)
        agree(expected, outputs[:, h], np.asarray(position)[:, h], last.overflow[h], tokens)
