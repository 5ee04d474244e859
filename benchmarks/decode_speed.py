"""How fast a token is decoded: full cache, rectangles and pools, with the policy at work and without.

    python benchmarks/decode_speed.py [--batch 1 8] [--context 2048 8192] [--pool 0.27] [--dtype float32] [--json FILE]

SmolLM2's weights; keys and values at random, since only shapes matter for time. `--pool` is the share of the full cache
that a plan allocates (`python -m simulator plan` prints it), `--rectangle` what one size for all heads takes, that of
the worst head. "off" is plain masked attention over as many slots; "on" is CORM with w = r = 256 and group=mean.

Configurations take turns, 16 tokens at a time, in one process; the time is the median over the rounds, and ratios are
those of times in the same rounds. `roofline` is the time that the weights and the cache, read once, take at the
bandwidth with which this machine reads 512 MiB (a matrix times a vector), over the time measured.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import corm_jax as cj
from corm_jax.files import write_json
from corm_jax.generation import STRETCH

CORM = cj.Corm(window=256, recent=256, group="mean")
MIB, DIGITS = 2**20, {"ms": 1, "faster": 2, "roofline": 2}


class Contender(NamedTuple):
    """A configuration, its caches between two turns, and the times of its turns so far."""

    layout: str
    policy: Any
    caches: Any
    slots: int
    seconds: list[float]


def filled(model, policy, batch: int, slots: int, context: int, room: int, pooled: bool):
    """Caches that hold all the keys they can, but for room to decode, in no particular order."""
    rng, config = np.random.default_rng(0), model.config
    keys = np.full((config.kv_heads, slots), -1, np.int32)
    keys[:, : slots - room] = np.arange(context - (slots - room), context)
    heads, order = np.repeat(np.arange(config.kv_heads, dtype=np.int32), slots), rng.permutation(keys.size)
    caches = []
    for cache in model.make_caches(policy, batch=batch, capacity=slots, pooled=pooled):
        k, v = (jnp.asarray(rng.normal(size=x.shape[1:]).astype("f"), x.dtype) for x in (cache.k, cache.v))
        position = jnp.asarray(keys.reshape(-1)[order] if pooled else keys)
        cache = cache._replace(
            k=jnp.tile(k, (batch, *(1,) * k.ndim)),
            v=jnp.tile(v, (batch, *(1,) * v.ndim)),
            position=jnp.tile(position, (batch, *(1,) * position.ndim)),
            state=jax.tree.map(lambda leaf: jnp.full_like(leaf, context), cache.state),  # all just asked for
            seen=jnp.full(batch, context, jnp.int32),
            head=jnp.tile(jnp.asarray(heads[order]), (batch, 1)) if pooled else None,
        )
        caches.append(cache)
    return tuple(caches)


def turn(model, contender: Contender) -> tuple[float, Any]:
    """Decodes a stretch; returns the seconds and the caches."""
    batch = contender.caches[0].seen.shape[0]
    logits, done = jnp.zeros((batch, model.config.vocab)), jnp.zeros(batch, bool)
    numbers = np.int32(STRETCH), np.zeros(0, np.int32), np.float32(0), np.float32(1)
    started = time.perf_counter()
    *_, caches = cj.decode(
        model, contender.policy, contender.caches, logits, jax.random.key(0), done, *numbers, steps=STRETCH
    )
    jax.block_until_ready(caches)
    return time.perf_counter() - started, caches


def read_bandwidth() -> float:
    """Bytes a second of a matrix that no cache holds, times a vector."""
    matrix, vector = jnp.ones((512 * MIB // 4 // 1024, 1024)), jnp.ones(1024)
    times, seconds = jax.jit(lambda x, y: x @ y), []
    for _ in range(6):
        started = time.perf_counter()
        jax.block_until_ready(times(matrix, vector))
        seconds.append(time.perf_counter() - started)
    return matrix.nbytes / min(seconds)


def measure(model, batch: int, context: int, shares: dict[str, float], rounds: int, bandwidth: float):
    """Rows of the table, for one batch and context."""
    room = STRETCH * (rounds + 1)
    contenders = [
        Contender(layout, policy, filled(model, policy, batch, slots, context, room, layout == "pooled"), slots, [])
        for layout, share in shares.items()
        for slots in [int(share * context) + room]
        for policy in ((cj.Full(),) if layout == "full" else (cj.Full(), CORM))
    ]
    for index in range(rounds + 1):
        for place, contender in enumerate(contenders):
            seconds, caches = turn(model, contender)
            contenders[place] = contender._replace(caches=caches)
            if index:  # the first compiles
                contender.seconds.append(seconds)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    full = np.array(contenders[0].seconds)
    for contender in contenders:
        seconds = np.array(contender.seconds)
        keys = sum(cache.k.nbytes + cache.v.nbytes for cache in contender.caches)
        yield {
            "batch": batch,
            "context": context,
            "layout": contender.layout,
            "policy": "on" if contender.policy is CORM else "off",
            "slots": contender.slots,
            "ms": float(1e3 * np.median(seconds) / STRETCH),
            "faster": float(np.median(full / seconds)),
            "allocated": cj.usage(contender.caches).bytes_allocated,
            "roofline": float((weights + keys) / bandwidth / (np.median(seconds) / STRETCH)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--context", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--pool", type=float, default=0.27)
    parser.add_argument("--rectangle", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, _ = cj.load(dtype=jnp.dtype(arguments.dtype))
    bandwidth = read_bandwidth()
    device = jax.devices()[0]
    print(f"{device.device_kind}, {arguments.dtype}; it reads {bandwidth / 1e9:.1f} GB/s\n")
    print("| batch | context | layout | policy | slots a head | allocated MiB | ms a token | faster | roofline |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows, shares = [], {"full": 1.0, "rectangular": arguments.rectangle, "pooled": arguments.pool}
    for batch in arguments.batch:
        for context in arguments.context:
            for row in measure(model, batch, context, shares, arguments.rounds, bandwidth):
                rows.append(row)
                cells = [f"{batch}", f"{context:,}", row["layout"], row["policy"], f"{row['slots']:,}"]
                cells += [f"{row['allocated'] / MIB:,.1f}", *(f"{row[x]:.{n}f}" for x, n in DIGITS.items())]
                print(f"| {' | '.join(cells)} |", flush=True)
    if arguments.json:
        write_json(arguments.json, {"device": device.device_kind, "dtype": arguments.dtype, "rows": rows})


if __name__ == "__main__":
    main()
