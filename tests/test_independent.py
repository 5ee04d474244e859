"""Heads that are independent keep alone what they keep together, and on devices of their own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from corm_jax import POLICIES, CacheSpec, begin_prompt, budget, make_cache, parse, read, step
from corm_jax.policies import keeps_everything
from tests.drive import HEAD_DIM, KV_HEADS, TOKENS, normal

SPECS = {
    "full": "full",
    "corm": "corm:window=4,recent=2,multiple=2",
    "adaptive_corm": "adaptive_corm:window=3,recent=2,multiple=2,patience=2,trial=4",
    "window": "window:size=6",
    "scissorhands": "scissorhands:budget=6,window=5,recent=2",
    "snapkv": "snapkv:budget=6,window=3,kernel=3",
    "pyramidkv": "pyramidkv:budget=6,window=3,kernel=3",
    "adakv": "adakv:budget=6,window=3,kernel=3",
}
SPECS |= {name: f"{name}:budget=6" for name in POLICIES if keeps_everything(name)} | {"h2o": "h2o:recent=2,budget=6"}


def kept(policy, q, k, v, stores=None):
    cache = begin_prompt(make_cache(policy, CacheSpec(k.shape[1], TOKENS, HEAD_DIM, stores=stores)), 12)
    for at in range(0, TOKENS, TOKENS // 2):
        cache = step(policy, cache, *(x[at : at + TOKENS // 2] for x in (q, k, v)), TOKENS // 2)[1]
    return jnp.sort(cache.position, -1)


@pytest.mark.parametrize("name", POLICIES)
def test_heads_alone_keep_what_they_keep_together(name):
    """A policy that is declared independent is; one that is declared not to be, is not in one of several texts."""
    policy, run = parse(SPECS[name]), jax.jit(kept)
    differ = False
    for seed in range(6):
        q, k, v = (jnp.asarray(x) for x in normal(seed))
        q = q * (1 + jnp.arange(KV_HEADS, dtype=jnp.float32)[:, None, None])
        together = run(policy, q, k, v)
        alone = [run(policy, *(x[:, head : head + 1] for x in (q, k, v)))[0] for head in range(KV_HEADS)]
        differ |= not np.array_equal(together, np.stack(alone))
    assert differ != policy.traits.independent


@pytest.mark.parametrize("name", [name for name in POLICIES if parse(SPECS[name]).traits.independent])
def test_heads_on_devices_of_their_own(name):
    """The step under `jax.shard_map` over heads, which checks what varies from device to device; here on one."""
    policy, mesh = parse(SPECS[name]), Mesh(np.array(jax.devices()[:1]), ("heads",))
    by_head = PartitionSpec(None, "heads")
    sharded = jax.shard_map(partial(kept, policy), mesh=mesh, in_specs=(by_head,) * 3, out_specs=PartitionSpec("heads"))
    columns = [jnp.asarray(x) for x in normal(1)]
    np.testing.assert_array_equal(jax.jit(sharded)(*columns), jax.jit(kept)(policy, *columns))


def test_a_budget_of_its_own_for_each_layer():
    assert not budget(parse("adakv:budget=6,window=3"), 9).traits.independent


@pytest.mark.parametrize("name", ["streaming_llm", "corm"])
def test_many_queries_and_slots_on_devices_of_their_own(name):
    """Loops over blocks of slots and of queries, under `jax.shard_map`, in a cache that is made there."""
    policy, mesh = parse(SPECS[name]), Mesh(np.array(jax.devices()[:1]), ("heads",))

    def run(q, k, v):
        cache = make_cache(policy, CacheSpec(k.shape[1], 600, HEAD_DIM))
        chunk, cache = step(policy, cache, q, k, v, TOKENS)
        block, *_ = read(policy, cache, q, k, v, TOKENS, chunk=1)
        return chunk, block

    by_head = PartitionSpec(None, "heads")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(by_head,) * 3, out_specs=by_head)
    columns = [jnp.asarray(x) for x in normal(1)]
    for one, other in zip(jax.jit(sharded)(*columns), jax.jit(run)(*columns), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
