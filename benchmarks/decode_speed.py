"""How long it takes to decode a token: with the full cache, in rectangles and in pools, with and without a policy.

    python benchmarks/decode_speed.py [--batch 1 8] [--context 2048 8192] [--pool 0.27 | --plan FILE] [--dtype float32]
        [--json FILE]

The model is SmolLM2, or, with `--model llama-2-7b`, random weights for `--layers` layers in the shape of Llama 2 7B.
Keys and values are random, since the time depends on shapes only. `--pool` is the share of the full cache that a plan
allocates (`python -m simulator plan` prints it). `--rectangle` is the share if all heads have as many slots as the
head that keeps most. In the column `policy`, "off" is plain masked attention over the same slots, and "on" is CORM with
w = r = 256 and group=mean. With `--plan` the pools are those of the plan, layer by layer, and "on" is its policy;
`--context` should then be the number of tokens that the plan was made for.

All programs are compiled first. Then the configurations take turns in one process, 16 tokens at a time. The time is the
median over the rounds; ratios are those of times in the same round. With `--apart` one configuration ends before the
next begins, for caches that do not fit into memory together; a configuration that does not fit by itself gets no time.
`roofline` is the time that it takes to read the weights and the cache once, divided by the measured time. The
bandwidth is the one with which this machine reads 2 GiB (a matrix times a vector).
"""

import argparse
import dataclasses
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import corm_jax as cj
from corm_jax.core.layout import Shared
from corm_jax.files import write_json
from corm_jax.model.generation import STRETCH
from corm_jax.policies.plan import Plan

CORM = cj.Corm(window=256, recent=256, group="mean")
LLAMA = cj.Config(vocab=32000, dim=4096, hidden=11008, layers=32, heads=32, kv_heads=32, head_dim=128)
MIB, DIGITS = 2**20, {"allocated": 1, "ms": 2, "faster": 2, "roofline": 2}


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """A configuration. ``slots`` are the slots a head in each layer."""

    batch: int
    context: int
    layout: str
    policy: Any
    slots: tuple[int, ...]

    @property
    def stores(self) -> int | None:
        """How many sets of slots a layer has; None for one set a head."""
        return 1 if self.layout == "pooled" else None

    def make_caches(self, model):
        made = cj.make_caches(model, self.policy, batch=self.batch, capacity=self.slots, stores=self.stores)
        return cj.end_prompt(cj.begin_prompt(made, 1))

    def arguments(self, model, caches):
        logits, done = jnp.zeros((self.batch, model.config.vocab)), jnp.zeros(self.batch, bool)
        numbers = np.int32(STRETCH), np.zeros(0, np.int32), np.float32(0), np.float32(1)
        return model, self.policy, caches, logits, jax.random.key(0), done, *numbers

    def lower(self, model):
        caches = jax.eval_shape(partial(self.make_caches, model))
        return cj.decode.lower(*self.arguments(model, caches), steps=STRETCH)

    def filled(self, model, room: int):
        """Caches that are full except for the slots of new tokens. The keys are in a random order."""
        rng, kv_heads = np.random.default_rng(0), model.config.kv_heads
        caches = []
        for layer, (slots, cache) in enumerate(zip(self.slots, self.make_caches(model), strict=True)):
            keys, full = np.full((kv_heads, slots), -1, np.int32), slots - room
            keys[:, :full] = np.arange(self.context - full, self.context)
            heads, order = np.repeat(np.arange(kv_heads, dtype=np.int32), slots), rng.permutation(keys.size)
            k, v = (jax.random.normal(jax.random.key(2 * layer + n), cache.k.shape, cache.k.dtype) for n in (0, 1))
            position = jnp.asarray(keys.reshape(-1)[order][None] if self.stores else keys)
            whose = jnp.tile(jnp.asarray(heads[order])[None], (self.batch, 1, 1))
            cache = cache._replace(
                k=k,
                v=v,
                position=jnp.tile(position, (self.batch, *(1,) * position.ndim)),
                state=jax.tree.map(
                    lambda leaf: jnp.full_like(leaf, self.context), cache.state
                ),  # every key was just found important
                clock=dataclasses.replace(cache.clock, seen=jnp.full(self.batch, self.context, jnp.int32)),
                layout=cache.layout if self.stores is None else Shared(whose, kv_heads),
            )
            caches.append(cache)
        return cj.Caches.of(caches)


def race(model, programs: dict[Contender, Any], rounds: int) -> dict[Contender, tuple[np.ndarray, int]]:
    """The seconds of each turn, and the allocated bytes."""
    caches = {one: one.filled(model, STRETCH * (rounds + 1)) for one in programs}
    seconds = {one: [] for one in programs}
    for index in range(rounds + 1):
        for one, program in programs.items():
            arguments = one.arguments(model, caches[one])
            started = time.perf_counter()
            caches[one] = jax.block_until_ready(program(*arguments)[-1])
            if index:  # the first warms up
                seconds[one].append(time.perf_counter() - started)
    return {one: (np.array(seconds[one]), cj.usage(caches[one]).bytes_allocated) for one in programs}


def measure(model, programs: dict[Contender, Any], rounds: int, apart: bool, bandwidth: float):
    """The rows of the table for one batch and context."""
    times = {}
    for group in [{one: program} for one, program in programs.items()] if apart else [programs]:
        try:
            times |= race(model, group, rounds)
        except jax.errors.JaxRuntimeError as error:
            if not apart or "RESOURCE_EXHAUSTED" not in str(error):
                raise
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    first = next((times[one][0] for one in times if one.layout == "full"), None)
    for one in programs:
        row = {x: getattr(one, x) for x in ("batch", "context", "layout")} | dict.fromkeys(DIGITS)
        row |= {"slots": round(np.mean(one.slots)), "policy": "off" if isinstance(one.policy, cj.Full) else "on"}
        if one in times:
            seconds, allocated = times[one]
            shapes = jax.eval_shape(partial(one.make_caches, model))
            moved = weights + sum(x.size * x.dtype.itemsize for cache in shapes for x in (cache.k, cache.v))
            row |= {"ms": float(1e3 * np.median(seconds) / STRETCH), "allocated": allocated / MIB}
            row["faster"] = None if first is None else float(np.median(first / seconds))
            row["roofline"] = float(moved / bandwidth / (np.median(seconds) / STRETCH))
        yield row


def read_bandwidth() -> float:
    """Bytes a second, from a product of a vector with a matrix that is too large for any processor cache."""
    matrix, vector = jnp.ones((2**19, 1024)), jnp.ones(1024)
    times, seconds = jax.jit(lambda x, y: x @ y), []
    for _ in range(6):
        started = time.perf_counter()
        jax.block_until_ready(times(matrix, vector))
        seconds.append(time.perf_counter() - started)
    return matrix.nbytes / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["smollm2-135m", "llama-2-7b"], default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=32, help="layers of llama-2-7b, with random weights")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sequences at a time")
    parser.add_argument("--context", nargs="+", type=int, default=[2048, 8192], help="tokens before the first step")
    parser.add_argument("--layouts", nargs="+", default=["full", "rectangular", "pooled"])
    parser.add_argument("--pool", type=float, default=0.27, help="slots of a pool, as a share of the full cache")
    parser.add_argument("--plan", type=Path, help="a plan whose pools and policy are measured")
    parser.add_argument(
        "--rectangle", type=float, default=0.9, help="slots of a rectangle, as a share of the full cache"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each configuration")
    parser.add_argument("--apart", action="store_true", help="one configuration after the other, not in turns")
    parser.add_argument("--dtype", default="float32", help="of weights and caches")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    arguments = parser.parse_args()
    dtype, name = jnp.dtype(arguments.dtype), arguments.model
    if name == "llama-2-7b":
        model = cj.Transformer(dataclasses.replace(LLAMA, layers=arguments.layers), dtype=dtype, rngs=nnx.Rngs(0))
        name = f"{name}, {arguments.layers} random layers"
    else:
        model, _ = cj.load(dtype=dtype)
    shares = {"full": 1.0, "rectangular": arguments.rectangle, "pooled": arguments.pool}
    room, contenders = STRETCH * (arguments.rounds + 1), []
    plan = arguments.plan and Plan.load(arguments.plan)
    corm = cj.parse(plan.policy) if plan else CORM
    for batch, context, layout in product(arguments.batch, arguments.context, arguments.layouts):
        slots = (int(shares[layout] * context) + room,) * model.config.layers
        if plan and layout == "pooled":
            slots = tuple(slots + room for slots in plan.capacity)
        policies = [cj.Full()] if layout == "full" else [cj.Full(), corm]
        contenders += [Contender(batch, context, layout, policy, slots) for policy in policies]
    lowered = [one.lower(model) for one in contenders]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        programs = dict(zip(contenders, threads.map(lambda one: one.compile(), lowered), strict=True))
    device, bandwidth = jax.devices()[0].device_kind, read_bandwidth()
    print(f"{name} on {device}, {dtype}; memory is read at {bandwidth / 1e9:,.1f} GB/s\n")
    print("| batch | context | layout | policy | slots a head | allocated MiB | ms a token | faster | roofline |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for batch, context in product(arguments.batch, arguments.context):
        group = {one: program for one, program in programs.items() if (one.batch, one.context) == (batch, context)}
        for row in measure(model, group, arguments.rounds, arguments.apart, bandwidth):
            rows.append(row)
            cells = [f"{batch}", f"{context:,}", row["layout"], row["policy"], f"{row['slots']:,}"]
            cells += ["-" if row[x] is None else f"{row[x]:,.{n}f}" for x, n in DIGITS.items()]
            print(f"| {' | '.join(cells)} |", flush=True)
        if arguments.json:
            write_json(
                arguments.json, {"model": name, "device": device, "dtype": f"{dtype}", "read": bandwidth, "rows": rows}
            )


if __name__ == "__main__":
    main()
