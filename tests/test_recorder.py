"""What any model attends to, recorded by its cache: number for number what went in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import ALiBi, CacheSpec, Corm, CormError, Full, Recorder, make_cache, protect, recorded, step
from corm_jax.core.step import read
from corm_jax.traces.trace import Trace
from simulator.replay import replay
from tests.drive import GROUP, HEAD_DIM, KV_HEADS, TOKENS, normal

RECORDER = Recorder(group=GROUP)
STEP = jax.jit(step)


def spec(stores, capacity=TOKENS + 2):
    return CacheSpec(KV_HEADS, capacity, HEAD_DIM, stores=stores)


@pytest.mark.parametrize("stores", [None, 1])
@pytest.mark.parametrize("pieces", [[TOKENS], [7, 7, 6], [1] * TOKENS])
def test_what_went_in_comes_out(stores, pieces):
    columns, cache, start = normal(1), make_cache(RECORDER, spec(stores)), 0
    for size in pieces:
        padded = [jnp.asarray(np.resize(x[start : start + size], (max(pieces), *x.shape[1:]))) for x in columns]
        cache, start = STEP(RECORDER, cache, *padded, size)[1], start + size
    found = recorded(cache)
    assert found.q.shape == (TOKENS, KV_HEADS * GROUP, HEAD_DIM)
    for one, given in zip(found, columns, strict=True):
        np.testing.assert_array_equal(one.reshape(given.shape), given)
    trace = Trace.from_qkv(*([x] for x in found))
    assert replay(trace, Full()).live[0, :, -1].tolist() == [TOKENS] * KV_HEADS


@pytest.mark.parametrize("stores", [None, 1])
def test_in_exact_blocks_and_in_batches(stores):
    """A row of a batch, read in blocks of the exact recurrence, as a model of this package reads it."""
    columns = [jnp.asarray(np.stack([x, x[::-1]])) for x in normal(2)]
    cache = make_cache(RECORDER, spec(stores), batch=2)
    cache = jax.vmap(lambda *row: read(RECORDER, *row, TOKENS, chunk=1)[1])(cache, *columns)
    for row in range(2):
        found = recorded(jax.tree.map(lambda x, row=row: x[row], cache))
        for one, given in zip(found, columns, strict=True):
            np.testing.assert_array_equal(one.reshape(given[row].shape), given[row])
    with pytest.raises(CormError, match=r"the cache has 2 rows: take one, jax.tree.map"):
        recorded(cache)


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_scale_is_in_the_queries(chunk):
    """A replay of what was recorded keeps the keys that the model's own attention keeps."""
    policy, scale, columns = Corm(window=5, recent=1), 3.0, [jnp.asarray(x) for x in normal(4)]
    kept = read(policy, make_cache(policy, spec(None)), *columns, TOKENS, chunk=chunk, scale=scale)[1].position
    found = recorded(read(RECORDER, make_cache(RECORDER, spec(None)), *columns, TOKENS, chunk=chunk, scale=scale)[1])
    again = replay(Trace.from_qkv(*([x] for x in found)), policy, chunk=chunk, keep_history=True).kept[0, :, -1]
    plain = read(policy, make_cache(policy, spec(None)), *columns, TOKENS, chunk=chunk)[1].position
    for head in range(KV_HEADS):
        assert set(np.flatnonzero(again[head])) == set(np.asarray(kept[head]).tolist()) - {-1}
    assert any(set(plain[head].tolist()) != set(kept[head].tolist()) for head in range(KV_HEADS))


FORMS = {
    "softcap": {"softcap": 5.0},
    "window": {"window": 4},
    "mask": {"mask": lambda query, key: key != 1},
    "bias of ALiBi": {"encoding": ALiBi.of(KV_HEADS, GROUP)},
    "softcap and a window": {"softcap": 5.0, "window": 4},
}


@pytest.mark.parametrize("what", FORMS)
@pytest.mark.parametrize("policy", [RECORDER, protect(RECORDER, sinks=2)])
def test_what_a_trace_cannot_say_is_refused(policy, what):
    with pytest.raises(CormError, match=f"Recorder.* is for softmax.* has a {what}: take another policy"):
        step(policy, make_cache(policy, spec(None)), *map(jnp.asarray, normal(5)), TOKENS, **FORMS[what])


def test_what_cannot_be_recorded():
    q, k, v = map(jnp.asarray, normal(3))
    with pytest.raises(CormError, match=r"a key-value head has 2 query heads here: read under Recorder\(group=2\)"):
        step(Recorder(group=3), make_cache(Recorder(group=3), spec(None)), q, k, v, TOKENS)
    few = make_cache(RECORDER, spec(None, TOKENS - 1))
    for t in range(TOKENS):
        few = STEP(RECORDER, few, q[t : t + 1], k[t : t + 1], v[t : t + 1], 1)[1]
    with pytest.raises(CormError, match="the cache lost 2 keys for lack of a slot: give it one for each token"):
        recorded(few)
    with pytest.raises(CormError, match="the cache was made for Full: read the text under a Recorder"):
        recorded(make_cache(Full(), spec(None)))
