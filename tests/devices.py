"""What tests/test_sharding.py looks at. JAX counts its devices once, so four of them need a process of their own.

python -m tests.devices NAME...      prints JSON; a name is that of a policy, ``model`` or ``refusals``
"""

import dataclasses
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import corm_jax as cj
from benchmarks import collectives as bench
from tests.models import tiny

EXPLICIT = ("corm", "streaming_llm", "tova", "snapkv")
"""Policies that are tried in a mesh of explicit axes, too."""


def of_policy(name):
    """The rows of the benchmark's table, for a policy whose numbers differ by head where they can."""
    policy = cj.parse(bench.POLICIES[name])
    if name == "corm":
        by_head = {"window": np.array([4, 3, 5, 4]), "recent": np.array([2, 3, 2, 1])}
        policy = dataclasses.replace(policy, **by_head)  # pyright: ignore
    return [row._asdict() for row in bench.compare(policy, explicit=name in EXPLICIT)]


def model():
    """Greedy tokens of eight rows, and the caches' positions: on one device, and with two rows on each of four."""
    llama, policy = tiny(), cj.parse("h2o:recent=4,budget=12")
    prompts = [np.random.default_rng(row).integers(0, 97, 20 + row).tolist() for row in range(8)]
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    caches = cj.make_caches(llama, policy, batch=8, capacity=24)
    specs = cj.partition_specs(caches, mesh, batch="rows")
    found = []
    for placed in (caches, jax.device_put(caches, jax.tree.map(partial(NamedSharding, mesh), specs))):
        logits, after = cj.prefill(llama, policy, placed, prompts, chunk=4)
        numbers = np.int32(6), np.zeros(0, np.int32), np.float32(0), np.float32(1)
        tokens, *_, after = cj.decode(
            llama, policy, after, logits, jax.random.key(0), jnp.zeros(8, bool), *numbers, steps=6
        )
        found.append((tokens.tolist(), [np.sort(cache.position).tolist() for cache in after]))
    (tokens, held), (other, also) = found
    split = after[0].k.sharding.is_equivalent_to(NamedSharding(mesh, P("rows")), 4)
    return {"tokens": tokens == other, "held": held == also, "split": split, "distinct": len(set(map(str, tokens)))}


def refusals():
    """The errors if heads of a layer, or rows, are on several devices, for policies whose heads are not independent."""
    found = {}
    for name in ("tova", "adakv"):
        arguments = bench.inputs(cj.parse(bench.POLICIES[name]), None)
        cache = arguments[1]
        mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
        for what, column in (("heads", P(None, None, "devices")), ("batch", P("devices"))):
            specs = cj.partition_specs(cache, mesh, **{what: "devices"})
            count = P("devices") if what == "batch" else P()
            run = jax.shard_map(
                bench.batch,
                mesh=mesh,
                in_specs=(P(), specs, column, column, column, count),
                out_specs=(column, specs),
            )
            try:
                held = jax.jit(run)(*arguments)[1]
            except cj.CormError as error:
                found[name, what] = str(error)
            else:
                expected = jax.jit(bench.batch)(*arguments)[1]
                found[name, what] = "as on one device" if (held.position == expected.position).all() else "otherwise"
    return {f"{name} over {what}": said for (name, what), said in found.items()}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    commands = {"model": model, "refusals": refusals}
    print(json.dumps({name: commands.get(name, partial(of_policy, name))() for name in sys.argv[1:]}))
