"""Caches on four virtual devices: over heads and over the batch they decide as on one, and keys stay where they are."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from benchmarks import collectives as bench
from corm_jax import (
    H2O,
    POLICIES,
    TOVA,
    AdaptiveCorm,
    Caches,
    CacheSpec,
    Corm,
    CormError,
    OfHead,
    SnapKV,
    make_cache,
    parse,
)
from corm_jax import partition_specs as specs_of
from tests.devices import EXPLICIT

ROOT = Path(__file__).parent.parent
TRIED = ["corm", "tova", "snapkv"]
"""Policies that differ in what they ask of a layer; `benchmarks/collectives.py` compares all of them."""


def devices(name):
    """What a process with four devices finds."""
    command = [sys.executable, "-m", "tests.devices", name]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)[name]


def test_all_policies_are_compared():
    assert set(bench.POLICIES) == set(POLICIES) > set(TRIED)


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow if one == "corm" else pytest.mark.nightly) for one in TRIED]
)
def test_devices_decide_as_one_and_move_no_keys(name):
    rows = devices(name)
    assert len(rows) == 3 + (name in EXPLICIT)
    for row in rows:
        assert row["same"], row
        assert row["difference"] < 1e-5, row
    if parse(bench.POLICIES[name]).traits.independent:
        heads = [row for row in rows if row["devices"].startswith("heads, shard_map")]
        assert [row["layout"] for row in heads] == ["rectangle", "2 pools"]
        assert not any(row["collectives"] for row in heads)
    # Rows share whether any has something to do, which `corm_jax.core.arrays.anywhere` asks: one bit, or two at once.
    shared = {what for row in rows if row["devices"].startswith("rows") for what in row["collectives"]}
    assert "all-reduce pred[]" in shared
    assert shared <= {"all-reduce pred[]", "all-reduce (pred[], pred[])"}


@pytest.mark.slow
def test_a_model_over_the_batch():
    assert devices("model") == {"tokens": True, "held": True, "split": True, "distinct": 8}


@pytest.mark.slow
def test_heads_that_are_not_independent_are_refused_apart():
    found = devices("refusals")
    for name in ("tova", "adakv"):
        message = "looks at all 4 key-value heads of a layer, and here are 1 of them"
        assert message in found[f"{name} over heads"]
        assert found[f"{name} over batch"] == "as on one device"


def cache_of(policy, kv_heads=8, stores=None, **batch):
    return make_cache(policy, CacheSpec(kv_heads, 256, 4, stores=stores), **batch)


MESH = AbstractMesh((4, 2), ("x", "y"))
P = PartitionSpec


@pytest.mark.parametrize("policy", [Corm(), H2O(), SnapKV(), AdaptiveCorm(), parse("scissorhands:budget=32"), TOVA()])
@pytest.mark.parametrize("batch", [None, 6])
@pytest.mark.parametrize("stores", [None, 4])
def test_specs_name_an_axis_of_the_right_size(policy, batch, stores):
    cache = cache_of(policy, stores=stores, batch=batch)
    specs = specs_of(cache, MESH, heads="x", batch=batch and "y")
    assert jax.tree.structure(specs) == jax.tree.structure(cache)
    for x, spec in zip(jax.tree.leaves(cache), jax.tree.leaves(specs), strict=True):
        assert not batch or (spec[0] == "y" and x.shape[0] == batch)
        split = [size for size, name in zip(x.shape, spec, strict=False) if name == "x"]
        assert split in ([8], [stores or 8]) if x.ndim > (batch is not None) else not split


def test_specs_of_a_cache_its_parts_of_heads_and_its_layers():
    pool = cache_of(Corm(), stores=4)
    specs = specs_of(pool._replace(state=(OfHead(pool.overflow), pool.position)), MESH, heads=("x",))
    assert specs.state[0].value == specs.overflow == specs.position == specs.layout.whose == P(("x",))
    assert specs.clock.seen == P()
    caches = Caches.of([cache_of(H2O(), batch=2)] * 2)
    both = specs_of(caches, MESH, heads="x", batch="y")
    assert both[1].state == both.layers[0].k == P("y", "x")
    assert both.clock.seen == P("y")
    stacked = specs_of(cache_of(TOVA(), batch=3), MESH, heads="x")
    assert (stacked.k, stacked.overflow, stacked.twin) == (P(None, "x"), P(None, "x"), P(None, None, "x"))


def test_specs_of_the_numbers_of_a_policy():
    policy = Corm(window=[1, 2, 3, 4], recent=[[1, 2, 3, 4]] * 3)
    specs = specs_of(policy, MESH, heads="x")
    assert (specs.window, specs.recent, specs.multiple) == (P("x"), P(None, "x"), P())
    assert specs_of(policy, MESH).window == P()


@pytest.mark.parametrize(
    ("tree", "axes", "message"),
    [
        (cache_of(H2O(), 6), {"heads": "x"}, "the mesh axis 'x' of 4 devices does not divide 6 key-value heads: take"),
        (cache_of(H2O(), stores=1), {"heads": "x"}, "does not divide 1 stores, shared by 8 .*: make .* with stores=4"),
        (cache_of(H2O(), 6, 3), {"heads": "x"}, "does not divide 3 stores, shared by 6 .*: take fewer devices"),
        (cache_of(H2O(), batch=6), {"batch": "x"}, "the mesh axis 'x' of 4 devices does not divide 6 rows: add rows"),
        (cache_of(H2O(), batch=4), {"batch": ("x", "y")}, "of 8 devices does not divide 4 rows"),
        (cache_of(H2O()), {"batch": "x"}, "a cache of one sequence has no rows for the mesh axis 'x': make one with"),
        (cache_of(H2O()), {"heads": "z"}, r"the mesh has the axes \('x', 'y'\), and none of them is 'z'"),
        (Corm(window=[1, 2, 3]), {"heads": "x"}, "does not divide 3 key-value heads"),
        ([cache_of(H2O())], {"heads": "x"}, "partition_specs takes a LayerCache, the Caches of a model, or a policy"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(tree, axes, message):
    with pytest.raises(CormError, match=message):
        specs_of(tree, MESH, **axes)
