"""Several prompts in one text, such as the turns of a conversation: each is judged by its own last queries."""

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from corm_jax import generate, parse, prefill, usage
from tests.drive import CHUNK, TOKENS, in_cache, in_numpy, normal
from tests.heads import chunks_of
from tests.models import tiny

POLICIES = [
    "snapkv:budget=5,window=2,kernel=3",
    "snapkv:budget=6,window=4,kernel=1,pool=mean",
    "snapkv:budget=7,window=3,kernel=5,sinks=2,recent=1",
    "adakv:budget=5,window=3,kernel=3,floor=0.5",
    "h2o:recent=2,budget=4,oneshot=true,sinks=1",
]
HOW = [(1, TOKENS, None), (CHUNK, 8, None), (CHUNK, 8, 1)]


@st.composite
def turns(draw):
    """The tokens of each prompt, and of what is generated after it: at most TOKENS in all."""
    sizes, left = [], TOKENS
    while left and len(sizes) < 4:
        prompt = draw(st.integers(1, min(left, 9)))
        generated = draw(st.integers(0, min(left - prompt, 4)))
        sizes.append((prompt, generated))
        left -= prompt + generated
    return sizes


@pytest.mark.parametrize("spec", POLICIES)
@settings(max_examples=30)
@example(seed=0, sizes=[(8, 2), (2, 1), (1, 1), (3, 2)], how=HOW[0])
@given(seed=st.integers(0, 2**16), sizes=turns(), how=st.sampled_from(HOW))
def test_several_prompts(spec, seed, sizes, how):
    """Prompts of any lengths, with generated tokens between them: the keys of the specification."""
    chunk, capacity, stores = how
    counts, prompts, clock = [], {}, 0
    for prompt, generated in sizes:
        prompts[clock] = clock + prompt
        counts += chunks_of(prompt, chunk) + [1] * generated
        clock += prompt + generated
    policy, columns = parse(spec), tuple(x[:clock] for x in normal(seed))
    how = {"capacity": capacity, "stores": stores, "prompts": prompts}
    expected = in_numpy(policy, *columns, counts, **how)
    assume(min(reading.margin for reading in expected) > 1e-4)
    padded = (np.concatenate([x, np.full((TOKENS - clock, *x.shape[1:]), 7, np.float32)]) for x in columns)
    _, held, last = in_cache(policy, *padded, counts + [0] * (TOKENS - len(counts)), **how)
    assert [one[: len(counts)] for one in held] == [reading.kept for reading in expected]
    assert last.overflow.tolist() == [reading.overflow for reading in expected]


def test_a_second_prompt_by_hand():
    """Room for one key beside a window of one. The first prompt asks for token 1, the second, one token long, for 3.

    With the scores of the first prompt token 1 would stay.
    """
    keys = 9 * np.eye(6, dtype=np.float32)
    q = np.zeros((6, 1, 1, 6), np.float32)
    q[2, 0, 0], q[5, 0, 0] = keys[1], keys[3]
    counts, prompts = [1] * 6, {0: 3, 5: 6}
    k = keys[:, None]
    policy = parse("snapkv:budget=2,window=1,kernel=1")
    survivors = [{0}, {0, 1}, {1, 2}, {1, 2, 3}, {1, 2, 3, 4}, {3, 5}]
    assert in_numpy(policy, q, k, k, counts, prompts=prompts)[0].kept == survivors
    assert in_cache(policy, q, k, k, counts, prompts=prompts)[1][0] == survivors


def test_prefill_tells_each_prompt():
    """Through the model: after a second prompt of two tokens a head holds the budget again, and the window."""
    model, policy = tiny(), parse("snapkv:budget=8,window=4,kernel=3")
    caches = generate(model, policy, [[5] * 30], max_new_tokens=7, capacity=40).caches
    assert usage(caches).live.max() == 8 + 7
    _, caches = prefill(model, policy, caches, [[1, 2]])
    assert (usage(caches).live == 8).all()
