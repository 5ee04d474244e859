"""Clocks up to where they end, 2^31 - 1: decisions there are those of the specification, which counts in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from corm_jax import (
    H2O,
    TOVA,
    AdaKV,
    AdaptiveCorm,
    Caches,
    CacheSpec,
    Corm,
    CormError,
    Full,
    L2Norm,
    Random,
    Scissorhands,
    SnapKV,
    StreamingLLM,
    Window,
    budget,
    make_cache,
    oneshot,
    prefill,
    protect,
    step,
    usage,
)
from corm_jax.core.arrays import ENDLESS
from corm_jax.model.decoder import make_caches
from corm_jax.policies import Budget
from tests.drive import CHUNK, KV_HEADS, TOKENS, at_clock, in_cache, in_numpy, normal
from tests.heads import chunks_of
from tests.models import tiny
from tests.test_exact import SIZE, agree, in_pieces, padded, pieces_of

# Where float32 stops counting, where a thousandth of the clock, and a clock for each head, exceed int32; and the end.
STARTS = [2**24 - 5, 2**31 // 1000 - 5, 2**31 // KV_HEADS - 5, 2**31 - 1 - TOKENS - CHUNK]
HOW = [(1, 9, None), (CHUNK, 9, 1)]
POLICIES = {
    "full": lambda start: Full(),
    "share": lambda start: budget(Full(), 1.0),
    "corm": lambda start: Corm(window=4, recent=2, multiple=start // 6),
    "a window as long as the text": lambda start: Corm(window=start + 8, recent=2, multiple=start // 6, group="mean"),
    "adaptive_corm": lambda start: AdaptiveCorm(window=3, recent=2, multiple=start // 6, patience=2, trial=start + 6),
    "streaming_llm": lambda start: StreamingLLM(sinks=start + 3),
    "window": lambda start: Window(size=5),
    "a window as long as the text, of any kind": lambda start: Window(size=start + 8),
    "h2o": lambda start: budget(H2O(recent=2), 6),
    "h2o by age": lambda start: budget(H2O(recent=2, attention="mean"), 6),
    "scissorhands": lambda start: Scissorhands(budget=6, window=5, recent=2),
    "tova": lambda start: budget(TOVA(), 6),
    "l2norm": lambda start: budget(L2Norm(), 6),
    "random": lambda start: budget(Random(seed=ENDLESS), 6),
    "snapkv": lambda start: SnapKV(budget=6, window=3, kernel=3),
    "adakv": lambda start: AdaKV(budget=6, window=2, kernel=3),
    "oneshot": lambda start: oneshot(budget(TOVA(), 5)),
    "guards": lambda start: protect(budget(TOVA(), 6), sinks=start + 2, recent=1),
    "guards without end": lambda start: protect(
        Corm(window=1, recent=1, multiple=ENDLESS), sinks=1, recent=ENDLESS - 2
    ),
}


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=16)
@given(seed=st.integers(0, 2**16), start=st.sampled_from(STARTS), how=st.sampled_from(HOW))
def test_decisions_at_any_clock(name, seed, start, how):
    chunk, capacity, stores = how
    policy, columns, counts = POLICIES[name](start), normal(seed), chunks_of(TOKENS, chunk)
    options = {"capacity": capacity, "stores": stores, "start": start, "prompts": {start: start + 12}}
    expected = in_numpy(policy, *columns, counts, **options)
    assume(min(reading.margin for reading in expected) > 1e-4)
    outputs, held, last = in_cache(policy, *columns, counts, **options)
    assert held == [reading.kept for reading in expected]
    assert last.overflow.tolist() == [reading.overflow for reading in expected]
    assert int(last.clock.seen) == start + TOKENS
    np.testing.assert_allclose(outputs.swapaxes(0, 1), [reading.outputs for reading in expected], atol=2e-5)


FEW = "corm", "adaptive_corm", "h2o by age", "adakv", "guards"


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES]
)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), start=st.sampled_from([*STARTS[:-1], ENDLESS - 1 - TOKENS]), pool=st.booleans())
def test_an_exact_block_at_any_clock(name, seed, start, pool):
    """To the last token but one: what that very last one would evict stays, and nothing is read after it."""
    policy, columns, counts = POLICIES[name](start), normal(seed), pieces_of([SIZE] * 3, TOKENS)
    options = {"capacity": TOKENS, "stores": 1 if pool else None}
    expected = in_numpy(policy, *columns, [1] * TOKENS, start=start, prompts={start: start + 12}, **options)
    assume(min(reading.margin for reading in expected) > 1e-4)
    found = in_pieces(policy, *map(padded, columns), counts, 12, start, block=5 if pool else SIZE, **options)
    agree(found, expected, counts)


@jax.jit
def limit(seen, tokens, per_mille, sinks, recent):
    """What a budget comes to, and what it protects: with numbers that are traced, which nothing refuses."""
    policy = Budget(policy=protect(H2O(recent=3), sinks=sinks, recent=recent), tokens=tokens, per_mille=per_mille)
    return policy.limit(seen), policy.traits.protected


ANY = st.one_of(st.integers(0, ENDLESS), st.integers(0, 3000), st.integers(ENDLESS - 3000, ENDLESS))


@settings(max_examples=300)
@given(seen=ANY, per_mille=st.integers(0, 1000), tokens=ANY, sinks=ANY, recent=ANY)
def test_a_share_of_any_clock(seen, per_mille, tokens, sinks, recent):
    """``tokens`` and a share of the clock, at least the protected keys, and at most the largest clock."""
    found, protected = limit(*map(jnp.int32, (seen, tokens, per_mille, sinks, recent)))
    least = min(3 + sinks + recent, ENDLESS)
    assert int(protected) == least
    assert int(found) == min(max(tokens + seen * per_mille // 1000, least), ENDLESS)


def test_guards_beyond_the_end_of_the_clock_are_refused():
    assert protect(H2O(recent=3), sinks=np.array([ENDLESS - 5, 0]), recent=2).traits.protected.tolist() == [ENDLESS, 5]
    with pytest.raises(CormError, match=f"would protect {ENDLESS + 1} keys of a head: at most {ENDLESS} can be"):
        protect(H2O(recent=3), sinks=ENDLESS - 5, recent=3)


def test_the_end_of_the_clock():
    """Of five tokens three fit: the others are as padding, and no key is lost."""
    cache = at_clock(make_cache(Full(), CacheSpec(1, 8, 4)), seen=jnp.int32(ENDLESS - 3))
    q, k = jnp.ones((5, 1, 1, 4)), jnp.ones((5, 1, 4))
    output, cache = jax.jit(step)(Full(), cache, q, k, k, 5)
    assert cache.position[0].tolist() == [ENDLESS - 3, ENDLESS - 2, ENDLESS - 1, -1, -1, -1, -1, -1]
    assert int(cache.clock.seen) == ENDLESS
    assert output[:, 0, 0, 0].tolist() == [1, 1, 1, 0, 0]


def test_who_would_pass_the_end_of_the_clock_is_told():
    model, policy = tiny(), Corm(window=4, recent=2)
    caches = make_caches(model, policy, batch=2, capacity=8)
    caches = Caches.of(at_clock(one, seen=jnp.array([0, ENDLESS - 2], jnp.int32)) for one in caches)
    with pytest.raises(CormError, match="the clock of a cache ends at 2147483647 tokens, not 2147483648: go on in an"):
        prefill(model, policy, caches, [[1, 2], [1, 2, 3]])
    assert usage(caches).bytes_full == (ENDLESS - 2) * 2 * 2 * 2 * 8 * 4  # layers, heads, k and v, numbers, bytes
    rows = Caches.of(at_clock(one, seen=jnp.full(2, ENDLESS, jnp.int32)) for one in caches)
    assert usage(rows).bytes_full == 2 * ENDLESS * 2 * 2 * 2 * 8 * 4
