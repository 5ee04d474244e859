"""The specification against itself and against a case worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import reference, rules
from simulator.reading import read_head
from tests.heads import corm_last, heads, options, partitions


@given(head=heads(), options=options(), data=st.data())
def test_one_number_a_key_says_what_the_message_matrix_says(head, options, data):
    tokens = head[0].shape[0]
    chunks = data.draw(partitions(tokens))
    capacity = data.draw(st.none() | st.integers(max(*chunks, options["recent"]), tokens + options["recent"]))
    messages = reference.corm_messages(*head, **options, chunks=chunks, capacity=capacity)
    last = read_head(rules.Corm(**options), *head, chunks=chunks, capacity=capacity)
    assert messages.kept == last.kept
    assert messages.overflow == last.overflow
    np.testing.assert_allclose(messages.outputs, last.outputs, atol=1e-12)


def test_overflow_can_be_an_error():
    q, k, v = np.ones((4, 1, 2)), np.ones((4, 2)), np.ones((4, 2))
    with pytest.raises(reference.OverflowedError, match="3 live keys and 1 new ones exceed 3 slots"):
        reference.corm_messages(q, k, v, window=9, recent=1, capacity=3, overflow="error")
    assert reference.corm_messages(q, k, v, window=9, recent=1, capacity=4, overflow="error").overflow == 0


@pytest.mark.parametrize("rule", [reference.corm_messages, corm_last])
def test_a_hand_worked_overflow(rule):
    # Query 3 looks at key 1 alone, query 4 at key 0 alone: at the next arrival key 2 was never important after its own
    # step. Slots: 4. Clock 5 must free one: last = {0: 4, 1: 3, 2: never, 3: never}; oldest of the never goes.
    eye = 20.0 * np.eye(5)
    q = np.stack([eye[0], eye[1], eye[1], eye[0], eye[4]])[:, None]
    reading = rule(q, eye, eye, window=100, recent=1, capacity=4)
    assert reading.kept[-1] == {0, 1, 3, 4}
    assert reading.overflow == 1


@pytest.mark.parametrize(
    "rule",
    [
        rules.Corm(window=2, recent=1, group="mean"),
        rules.Scissorhands(budget=8, window=4, recent=1, drop=0.5),
    ],
)
def test_a_mean_that_ties_in_exact_arithmetic_alone_is_close(rule):
    """Two queries of a group give p and 1 - p to each of two keys: the mean is 1/2, but hardly in float32."""
    q = np.array([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    k = np.array([[-0.5, 0.0], [1.5, 0.0]])
    assert read_head(rule, q, k, k).margin == 0
