"""NaN and infinities affect only their row, their head, and the queries that see them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from corm_jax import CacheSpec, Policy, budget, generate, make_cache, parse, step
from corm_jax.core import attention
from corm_jax.core.layout import Apart, Paged, Shared
from corm_jax.core.slots import Slots
from corm_jax.policies import policy
from corm_jax.traces.trace import Trace
from simulator.replay import replay
from tests.drive import CHUNK, KV_HEADS, TOKENS, in_cache, in_numpy, normal
from tests.heads import chunks_of, slots_of
from tests.models import tiny

ALONE = [  # what one head holds is no matter to another
    "full",
    "corm:window=4,recent=2,multiple=2",
    "adaptive_corm:window=3,recent=2,multiple=2,patience=2,trial=4",
    "streaming_llm:sinks=2,budget=6",
    "h2o:recent=2,attention=mean,budget=6",
    "scissorhands:budget=6,window=5,recent=2",
    "l2norm:budget=6",
    "random:budget=6",
    "snapkv:budget=6,window=3,kernel=3",
    "window:size=6",
]
COUPLED = ["tova:budget=6", "adakv:budget=6,window=2,kernel=3"]
HOW = [(1, TOKENS, None), (CHUNK, 9, None), (1, TOKENS, 1), (CHUNK, TOKENS, 1)]
LOWEST, OF_LAYER = jax.jit(Slots.lowest), jax.jit(Slots.lowest_of_layer)


FEW = ALONE[1], ALONE[4], ALONE[8], *COUPLED


@pytest.mark.parametrize(
    "spec", [spec if spec in FEW else pytest.param(spec, marks=pytest.mark.slow) for spec in ALONE + COUPLED]
)
@settings(max_examples=25)
@example(0, [("k", 0, 4, np.nan)], HOW[0])
@example(0, [("v", 0, 4, np.inf)], HOW[2])
@example(0, [("v", 1, 4, np.nan), ("k", 1, 9, np.inf)], HOW[3])
@given(
    seed=st.integers(0, 2**16),
    poison=st.lists(
        st.tuples(
            st.sampled_from("kqv"),
            st.integers(0, KV_HEADS - 1),
            st.integers(0, TOKENS - 1),
            st.sampled_from([np.nan, np.inf, -np.inf]),
        ),
        min_size=1,
        max_size=3,
    ),
    how=st.sampled_from(HOW),
)
def test_a_head_keeps_it_to_itself(spec, seed, poison, how):
    """NaN and infinities in queries, keys and values: decisions and outputs of the specification, which knows them.

    And where heads know nothing of each other, those that are sound do what they did without; in a rectangle to the
    last bit, in a pool but for the order of slots, in which they are summed.
    """
    chunk, capacity, stores = how
    policy_, clean, counts = parse(spec), normal(seed), chunks_of(TOKENS, chunk)
    q, k, v = (x.copy() for x in clean)
    for name, head, token, number in poison:
        {"q": q, "k": k, "v": v}[name][token, head, ..., 1] = number
    options = {"stores": stores, "capacity": capacity, "prompts": {0: 12}}
    expected = in_numpy(policy_, q, k, v, counts, **options)
    assume(min(reading.margin for reading in expected) > 1e-4)
    outputs, held, last = in_cache(policy_, q, k, v, counts, **options)
    assert held == [reading.kept for reading in expected]
    assert last.overflow.tolist() == [reading.overflow for reading in expected]
    np.testing.assert_allclose(outputs.swapaxes(0, 1), [reading.outputs for reading in expected], atol=2e-5)
    assert jnp.isfinite(last.v).all()
    before, kept, _ = in_cache(policy_, *clean, counts, **options)
    sound = [head for head in range(KV_HEADS) if head not in [where for _, where, _, _ in poison]]
    for head in sound:
        assert np.isfinite(outputs[:, head]).all()
        if spec in ALONE:
            assert held[head] == kept[head]
            np.testing.assert_allclose(outputs[:, head], before[:, head], rtol=0, atol=1e-5 if stores else 0)


RANKS = st.sampled_from([np.nan, np.inf, -np.inf, -1.0, 0.0, 1.0])


@given(
    rank=st.lists(st.lists(RANKS, min_size=15, max_size=15), min_size=2, max_size=2),
    empty=st.sets(st.integers(0, 29), max_size=20),
    counts=st.tuples(st.integers(0, 15), st.integers(0, 15)),
)
def test_the_lowest_of_any_numbers(rank, empty, counts):
    """NaN is as low as -infinity, among equals the oldest comes first, and no head loses more than it is asked for."""
    position = np.stack([np.random.default_rng(head).permutation(15) for head in range(2)]).astype(np.int32)
    position[np.isin(np.arange(30).reshape(2, 15), list(empty))] = -1
    rank = np.array(rank, np.float32)
    total = np.where(np.isnan(rank), -np.inf, rank)
    every = sorted((total[h, i], position[h, i], h, i) for h, i in np.argwhere(position >= 0))
    order = np.random.default_rng(0).permutation(30)
    owner = np.repeat([0, 1], 15)[order]
    for slots, ranks, place in (
        (slots_of(position), rank, np.arange(30)),
        (slots_of(position.flat[order], owner), rank.flat[order][None], order),
    ):
        found = np.zeros(30, bool)
        found[place] = np.asarray(LOWEST(slots, jnp.asarray(ranks), jnp.array(counts))).reshape(-1)
        for head, count in enumerate(counts):
            expected = [i for _, _, h, i in every if h == head][:count]
            assert set(np.flatnonzero(found.reshape(2, 15)[head])) == set(expected)
        of_layer = OF_LAYER(slots, jnp.asarray(ranks), sum(counts)).tolist()
        heads = [h for _, _, h, _ in every[: sum(counts)]]
        assert of_layer == [heads.count(0), heads.count(1)]


@policy
class Spoilt(Policy):
    """The key at one position is worth NaN."""

    at: int = 2

    def score(self, state, slots):
        return jnp.where(slots.position == self.at, jnp.nan, slots.position.astype(jnp.float32))


def test_one_rank_that_is_no_number_costs_one_key():
    q, k, v = normal(0)
    _, held, _ = in_cache(budget(Spoilt(), 4), q, k, v, [1] * TOKENS)
    assert held[0][:7] == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 3, 4}, {1, 3, 4, 5}, {3, 4, 5, 6}]
    assert all(len(keys) == 4 for keys in held[0][4:])


@pytest.mark.parametrize("stores", [None, 1])
def test_a_row_of_a_batch_keeps_it_to_itself(stores):
    """Every number of row 0 is NaN: row 1 is the same to the last bit, also in a loop that row 0 prolongs."""
    policy_ = parse("h2o:recent=2,budget=5")
    caches = make_cache(policy_, CacheSpec(2, 8, 4, stores=stores), batch=2)
    run = jax.jit(jax.vmap(partial(step, policy_)))
    other, spoilt = caches, caches
    for token in range(10):
        q, k, v = (jnp.asarray(np.stack([x[token : token + 1]] * 2)) for x in normal(1))
        count = jnp.ones(2, jnp.int32)
        clean, other = run(other, q, k, v, count)
        output, spoilt = run(spoilt, *(x.at[0].set(jnp.nan) for x in (q, k, v)), count)
        assert jnp.isnan(output[0]).all()
        np.testing.assert_array_equal(output[1], clean[1])
    for one, two in zip(jax.tree.leaves(spoilt), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one[1], two[1])
    assert (spoilt.position[0] >= 0).sum() == 10


def test_a_prompt_of_a_batch_keeps_it_to_itself():
    """Through the model: an embedding that is not a number, in one prompt of two."""
    model = tiny(tied=False)
    prompts, options = [[3, 50, 4, 9, 5], [1, 2, 3, 4, 5, 6, 7]], {"max_new_tokens": 8, "capacity": 20, "chunk": 4}
    for stores in (None, 1):
        clean = generate(model, parse("tova:budget=4"), prompts, stores=stores, **options).tokens
        embedding = model.embedding.embedding[...]
        model.embedding.embedding[...] = embedding.at[50].set(jnp.nan)
        spoilt = generate(model, parse("tova:budget=4"), prompts, stores=stores, **options).tokens
        model.embedding.embedding[...] = embedding
        assert spoilt[1] == clean[1]
        assert spoilt[0] != clean[0]


@pytest.mark.parametrize(
    ("layout", "watched"), [("apart", True), ("apart", False), ("shared", True), ("paged", True), ("paged", False)]
)
def test_what_a_query_does_not_see_does_not_reach_it(layout, watched, monkeypatch):
    """Invisible keys may hold anything, in slots that are empty, of another head, or ahead in the chunk."""
    monkeypatch.setattr(attention, "KEYS_PER_BLOCK", 16)
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(10, 2, 3, 8)), rng.normal(size=(2, 40, 8)), rng.normal(size=(2, 40, 8))
    visible = rng.random((10, 2, 40)) < 0.3
    visible[:, :, ::4] = False
    whose = Apart()
    if layout == "shared":
        whose = Shared(jnp.repeat(jnp.arange(2), 40)[None], 2)
        k, v, visible = k.reshape(1, 80, 8), v.reshape(1, 80, 8), visible.reshape(10, 1, 80)
    if layout == "paged":
        whose = Paged(jnp.array([0, 0, 1, 1]), 2)
        k, v, visible = k.reshape(4, 20, 8), v.reshape(4, 20, 8), visible.reshape(10, 4, 20)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))

    @jax.jit
    def run(q, k, v, visible):
        if not watched:
            return attention.attended(whose, q, k, v, visible, visible.any(0)), None
        return attention.attend(q, k, v, visible, jnp.arange(1, 11), whose)

    clean, _ = run(q, k, v, jnp.asarray(visible))
    for rubbish in (np.nan, np.inf, 1e38):
        for query in range(10):  # its own view of what is rubbish
            spoilt = jnp.where(visible[query][..., None], k, rubbish)
            output, observation = run(q, spoilt, v, jnp.asarray(visible))
            np.testing.assert_array_equal(output[query], clean[query])
            assert not watched or jnp.isfinite(observation.probability).all()


def test_a_replay_whose_logits_overflow():
    """Products beyond float32 are infinite: such a query attends to nothing, and the budget holds."""
    q, k, v = normal(3)
    q, k = q.copy(), k.copy()
    q[5], k[:, 0] = 3e38, np.abs(k[:, 0]) + 2
    trace = Trace.from_qkv(q.reshape(1, TOKENS, -1, q.shape[-1]), k[None], v[None])
    with np.errstate(invalid="ignore"):
        result = replay(trace, parse("h2o:recent=2,budget=6"), errors=False)
    assert result.live[0, :, 5:].tolist() == [[6] * (TOKENS - 5)] * KV_HEADS
