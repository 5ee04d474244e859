"""Counts what devices send to each other when a layer is split over them: the collectives of the compiled programs.

    python benchmarks/collectives.py [--policy SPEC ...]

There are four virtual devices on the CPU. A batch of eight rows reads a prompt in chunks, then a block by the exact
recurrence, then single tokens. The program is compiled for one device and for several. Heads are split by
`jax.shard_map`, or by `jax.jit` if the heads of the policy are not independent. The batch is split by `jax.jit`, and,
in a mesh of explicit axes, by `jax.sharding.auto_axes`. The column `same` says whether the same keys are evicted as on
one device, and the largest difference between outputs.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import corm_jax as cj

POLICIES = {
    "full": "full",
    "corm": "corm:window=4,recent=2,multiple=2",
    "adaptive_corm": "adaptive_corm:window=3,recent=2,multiple=2,patience=2,trial=4",
    "streaming_llm": "streaming_llm:budget=6,positions=cache",
    "window": "window:size=6",
    "h2o": "h2o:recent=2,budget=6",
    "scissorhands": "scissorhands:budget=6,window=5,recent=2",
    "tova": "tova:budget=6",
    "snapkv": "snapkv:budget=6,window=3,kernel=3",
    "pyramidkv": "pyramidkv:budget=6,window=3,kernel=3",
    "adakv": "adakv:budget=6,window=3,kernel=3",
    "l2norm": "l2norm:budget=6",
    "random": "random:budget=6",
}
DEVICES, ROWS, KV_HEADS, GROUP, HEAD_DIM, CAPACITY = 4, 8, 4, 2, 4, 16
CHUNK, CHUNKS, BLOCK, SINGLE = 6, 2, 6, 3
TOKENS = CHUNK * CHUNKS + BLOCK + SINGLE
ENCODING = cj.Rotary(cj.Rope().frequencies(HEAD_DIM))
MOVED = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"


class Row(NamedTuple):
    """A program for several devices, compared with the program for one."""

    layout: str
    devices: str
    same: bool
    difference: float
    collectives: dict[str, int]


def sequence(policy: cj.Policy, cache: cj.LayerCache, q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array):
    """One row: ``count`` tokens of a prompt in chunks, a block of the exact recurrence, and single tokens."""
    begin, end = CHUNK * CHUNKS, CHUNK * CHUNKS + BLOCK
    read = partial(cj.read, encoding=ENCODING)
    prompt, cache, *_ = read(policy, cache, q[:begin], k[:begin], v[:begin], count, chunk=CHUNK)
    block, cache, *_ = read(policy, cache, q[begin:end], k[begin:end], v[begin:end], BLOCK, chunk=1)

    def one(cache, qkv):
        output, cache = cj.step(policy, cache, *(x[None] for x in qkv), 1, ENCODING)
        return cache, output[0]

    cache, single = jax.lax.scan(one, cache, (q[end:], k[end:], v[end:]))
    return jnp.concatenate([prompt, block, single]), cache


batch = jax.vmap(sequence, in_axes=(None, 0, 0, 0, 0, 0))


def inputs(policy: cj.Policy, stores: int | None) -> tuple[Any, ...]:
    """The arguments of `batch`: rows of different texts and lengths."""
    rng = np.random.default_rng(0)
    shapes = (ROWS, TOKENS, KV_HEADS, GROUP, HEAD_DIM), *((ROWS, TOKENS, KV_HEADS, HEAD_DIM),) * 2
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    q = q * (1 + jnp.arange(KV_HEADS, dtype=jnp.float32)[:, None, None])
    count = CHUNK * CHUNKS - jnp.arange(ROWS, dtype=jnp.int32) % 3
    cache = cj.make_cache(policy, cj.CacheSpec(KV_HEADS, CAPACITY, HEAD_DIM, stores=stores), batch=ROWS)
    return policy, cj.begin_prompt(cache, count + BLOCK), q, k, v, count


def over_heads(arguments: tuple[Any, ...], devices: int) -> tuple[Callable, Any, tuple[Any, ...]]:
    """A function for several devices, its mesh, and the specs of its arguments: each device has some heads."""
    policy, cache, *_ = arguments
    mesh = jax.make_mesh((devices,), ("heads",), axis_types=(AxisType.Auto,))
    of_policy, of_cache = (cj.partition_specs(x, mesh, heads="heads") for x in (policy, cache))
    columns = P(None, None, "heads")
    specs = of_policy, of_cache, columns, columns, columns, P()
    if policy.traits.independent:
        return jax.shard_map(batch, mesh=mesh, in_specs=specs, out_specs=(columns, of_cache)), mesh, specs
    return _placed((columns, of_cache), mesh), mesh, specs


def over_rows(arguments: tuple[Any, ...], explicit: bool = False) -> tuple[Callable, Any, tuple[Any, ...]]:
    """The same for the batch: each device has some rows."""
    policy, cache, *_ = arguments
    mesh = jax.make_mesh((DEVICES,), ("rows",), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,))
    of_cache, rows = cj.partition_specs(cache, mesh, batch="rows"), P("rows")
    specs = cj.partition_specs(policy, mesh), of_cache, rows, rows, rows, rows
    if explicit:
        return jax.sharding.auto_axes(batch, out_sharding=(rows, of_cache)), mesh, specs
    return _placed((rows, of_cache), mesh), mesh, specs


def _placed(specs: Any, mesh: Any) -> Callable:
    return jax.jit(batch, out_shardings=jax.tree.map(partial(NamedSharding, mesh), specs))


def collectives(program: str) -> dict[str, int]:
    """The collectives of a program, with the shapes of the arrays that they move, and how often each occurs."""
    found = re.findall(rf"= (\(.*?\)|\S+) ({MOVED})(?:-start)?\(", program)
    return dict(Counter(f"{what} {re.sub(r'{[^}]*}', '', shape)}" for shape, what in found))


def compare(policy: cj.Policy, explicit: bool = True, **options: Any) -> Iterator[Row]:
    """The rows of a policy. ``explicit``: also the one with explicit axes. The options are those of the compiler."""
    for layout, stores in (("rectangle", None), ("2 pools", 2)):
        arguments = inputs(policy, stores)
        output, cache = jax.jit(batch).lower(*arguments).compile(options)(*arguments)
        how = "shard_map" if policy.traits.independent else "jit"
        ways = {f"heads, {how}, {stores or DEVICES}": over_heads(arguments, stores or DEVICES)}
        if stores is None:
            ways |= {"rows, jit, 4": over_rows(arguments)}
            ways |= {"rows, auto_axes, 4": over_rows(arguments, explicit=True)} if explicit else {}
        for devices, (function, mesh, specs) in ways.items():
            with jax.set_mesh(mesh):
                placed = jax.device_put(arguments, jax.tree.map(partial(NamedSharding, mesh), specs))
                program = jax.jit(function).lower(*placed).compile(options)
                other, held = program(*placed)
            same = all(np.array_equal(*pair) for pair in zip(*map(_decided, (cache, held)), strict=True))
            difference = float(np.abs(np.asarray(output) - np.asarray(other)).max())
            yield Row(layout, devices, same, difference, collectives(program.as_text() or ""))


def _decided(cache: cj.LayerCache) -> tuple[Any, ...]:
    return cache.position, cache.overflow, *jax.tree.leaves(cache.layout)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--policy", nargs="*", default=[*POLICIES.values()], metavar="SPEC", help="default: all")
    parser.add_argument("--full", action="store_true", help="list the shape of every collective")
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    print("| policy | layout | split, by, devices | same | collectives |")
    print("|---|---|---|---|---|")
    for spec in given.policy:
        for row in compare(cj.parse(spec)):
            moved = ", ".join(f"{count} x {what}" for what, count in row.collectives.items()) or "none"
            same = f"{'yes' if row.same else 'no'}, {row.difference:.0e}"
            if len(moved) > 120 and not given.full:
                kinds = Counter(what.split()[0] for what in row.collectives for _ in range(row.collectives[what]))
                moved = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
            print(f"| `{spec}` | {row.layout} | {row.devices} | {same} | {moved} |", flush=True)


if __name__ == "__main__":
    main()
