"""Whether decisions hold on this device, and how fast it is: one command for a GPU or a TPU, in five minutes.

    python benchmarks/accelerator.py [--seconds 300] [--out FILE] [--tiny]

Needs the core packages and hypothesis, no weights and no network. It prints as it goes, and keeps what it has found in
a file named after the device, rewritten after each row.

1. *Decisions*: random policies on random histories, the cache and the replay on this device against the specification
   in NumPy, each policy at least once (`simulator.soak`); the same again for what is left of the time.
2. *Decode*: SmolLM2's shape with random weights, bfloat16, batches 1, 8 and 32 after 8,192 and 32,768 tokens, and eight
   layers in the shape of Llama 2 7B at batch 8: the full cache, and CORM (w = r = 256, group=mean) in pools of 0.27.
   `nominal` and `measured` are shares of a roofline: the time that weights and cache, read once, take at the bandwidth
   that the maker states, and at the one with which the device reads 2 GiB here, over the time measured.
3. *Prefill*: 8,192 tokens of SmolLM2's shape: full cache, CORM in chunks of 256, CORM exactly.
4. *Replay*: one layer of 8,192 tokens of that shape under CORM, exactly.
5. *torch*, if it is installed and sees the card: its attention alone, in the shapes of 2 and 3, for comparison.

A part that no time is left for is named as left out. Times are without compilation, the median of several runs. With
`--tiny` shapes are small enough for a CPU: a rehearsal, of whose times nothing follows.
"""

import argparse
import dataclasses
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of the memory, too

import jax
import jax.numpy as jnp
import numpy as np
from decode_speed import CORM, LLAMA, Contender, race, read_bandwidth
from flax import nnx

import corm_jax as cj
from corm_jax.files import write_json
from corm_jax.model.generation import STRETCH, Blocks, _prefill_block
from corm_jax.traces.trace import Trace
from simulator.replay import replay
from simulator.soak import BATCH, soak

SMOLLM2 = cj.Config(
    vocab=49152, dim=576, hidden=1536, layers=30, heads=9, kv_heads=3, head_dim=64, tied=True, context=2**17
)
NOMINAL = {"H100 PCIe": 2000, "H100 NVL": 3900, "H100": 3350, "H200": 4800, "GH200": 4000, "B200": 8000, "A100": 2039}
NOMINAL |= {"L40": 864, "L4": 300, "T4": 320, "V100": 900, "A10": 600, "RTX 4090": 1008, "TPU v4": 1228}
NOMINAL |= {"TPU v5 lite": 819, "TPU v5p": 2765, "TPU v5": 2765, "TPU v6 lite": 1640}
"""GB/s that makers state, by a part of the device's name; the first that fits, of the longest."""

POOL = 0.27
TURNS = 5


@dataclasses.dataclass
class Report:
    """What was found, in a file that is written anew after each row."""

    path: Path
    ends: float
    found: dict[str, Any]

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def part(self, title: str, *columns: str) -> None:
        """Begins a table."""
        self.found[title] = []
        print(f"\n## {title} ({self.left():.0f} s left)\n")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def row(self, title: str, **cells: Any) -> None:
        """Prints a row, and keeps it."""
        self.found[title].append(cells)
        print(f"| {' | '.join(map(shown, cells.values()))} |", flush=True)
        write_json(self.path, self.found)

    def enough(self, seconds: float, what: str) -> bool:
        """Whether so much time is left; if not, what is left out is said."""
        if self.left() >= seconds:
            return True
        print(f"\nleft out, with {max(self.left(), 0):.0f} s left: {what}", flush=True)
        self.found.setdefault("left out", []).append(what)
        write_json(self.path, self.found)
        return False


def shown(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def facts() -> dict[str, Any]:
    """Of the device and of what runs on it."""
    device = jax.devices()[0]
    fitting = sorted((name for name in NOMINAL if name.lower() in device.device_kind.lower()), key=len)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "corm_jax": cj.__version__,
        "nominal GB/s": NOMINAL[fitting[-1]] if fitting else None,
        "measured GB/s": read_bandwidth() / 1e9,
    }


def decisions(report: Report, until: float) -> bool:
    """Every policy at least once, and more as long as there is time. Whether all were those of the specification."""
    title = "decisions"
    report.part(title, "policy", "cases", "decisions", "evicted", "lost", "left out", "differences", "seconds")
    first, sound, started = len(cj.POLICIES) * BATCH, True, time.monotonic()
    for tally in soak(seed=0):
        now = time.monotonic()
        counts = {name: getattr(tally, name) for name in ("cases", "decisions", "evicted", "lost", "left_out")}
        report.row(title, policy=tally.policy, **counts, differences=len(tally.differences), seconds=now - started)
        started, sound = now, sound and not tally.differences
        for line in tally.differences[:3]:
            print(f"DIFFERENT: {line}", flush=True)
        if (tally.index >= first and report.left() < until) or report.left() < until / 2:
            break
    names = {row["policy"] for row in report.found[title]}
    if missing := sorted(cj.POLICIES.keys() - names):
        report.enough(np.inf, f"decisions of {', '.join(missing)}")
    same, verdict = sum(row["decisions"] for row in report.found[title]), "as" if sound else "NOT AS"
    print(f"\n{same:,} decisions of {len(names)} policies: {verdict} specified", flush=True)
    return sound


def random_model(config: cj.Config) -> cj.Llama:
    """Weights of this shape, made on the device."""
    return jax.jit(lambda: cj.Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))()


def decode(report: Report, name: str, model: cj.Llama, batches, contexts) -> None:
    """A token at a time, the full cache and CORM in pools, taking turns."""
    title = f"decode, {name}"
    report.part(title, "batch", "context", "cache", "ms a token", "times as fast", "nominal", "measured", "cache MiB")
    room, layers = STRETCH * (TURNS + 1), model.config.layers
    for batch, context in [(batch, context) for context in contexts for batch in batches]:
        if not report.enough(30, f"{title}, batch {batch} after {context:,} tokens"):
            continue
        pair = [
            Contender(batch, context, "full", cj.Full(), (context + room,) * layers),
            Contender(batch, context, "pooled", CORM, (int(POOL * context) + room,) * layers),
        ]
        try:
            with ThreadPoolExecutor() as threads:
                programs = dict(zip(pair, threads.map(lambda one: one.lower(model).compile(), pair), strict=True))
            times = race(model, programs, TURNS)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            report.enough(np.inf, f"{title}, batch {batch} after {context:,} tokens, which does not fit into memory")
            continue
        full = np.median(times[pair[0]][0])
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        for one in pair:
            seconds, allocated = times[one]
            shapes = jax.eval_shape(partial(one.make_caches, model))
            moved = weights + sum(x.size * x.dtype.itemsize for cache in shapes for x in (cache.k, cache.v))
            token = float(np.median(seconds)) / STRETCH
            shares = {key: rate and moved / (rate * 1e9) / token for key, rate in rates(report).items()}
            row = {"cache": one.layout, "ms": 1e3 * token, "faster": float(full / np.median(seconds)), **shares}
            report.row(title, batch=batch, context=context, **row, allocated=allocated / 2**20)


def rates(report: Report) -> dict[str, float | None]:
    """Bandwidths, GB/s."""
    return {key: report.found["facts"][f"{key} GB/s"] for key in ("nominal", "measured")}


def timed(run: Callable[[], Any], times: int = TURNS) -> float:
    """Seconds, the median of several, after one that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(times):
        started = time.monotonic()
        jax.block_until_ready(run())
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


def prefill(report: Report, model: cj.Llama, tokens: int) -> None:
    """A prompt, without the way back to the host after each block."""
    title = f"prefill of {tokens:,} tokens"
    report.part(title, "cache", "chunk", "seconds", "tokens a second", "times as fast")
    ids = np.random.default_rng(0).integers(model.config.vocab, size=tokens).tolist()
    blocks, first = {chunk: Blocks.cut([ids], model.config.vocab, chunk) for chunk in (1, 256)}, None
    for name, policy, chunk in (("full", cj.Full(), 256), ("CORM", CORM, 256), ("CORM, exact", CORM, 1)):
        if not report.enough(40, f"{title}, {name}"):
            continue
        start = cj.make_caches(model, policy, batch=1, capacity=tokens)
        start = cj.end_prompt(start) if policy.traits.whole_prompt else cj.begin_prompt(start, tokens)
        cut = blocks[chunk]

        def run(policy=policy, chunk=chunk, cut=cut, start=start):
            caches = jax.tree.map(jnp.copy, start)  # given up by the first block
            logits = jnp.zeros((1, model.config.vocab), jnp.float32)
            for index, count in enumerate(cut.count):
                logits, caches = _prefill_block(model, policy, caches, logits, cut.tokens[:, index], count, chunk=chunk)
            return logits

        seconds = timed(run, 3)
        first = first or seconds
        report.row(title, cache=name, chunk=chunk, seconds=seconds, rate=tokens / seconds, faster=first / seconds)


def replays(report: Report, config: cj.Config, tokens: int) -> None:
    """One layer at random."""
    title = f"replay of {tokens:,} tokens, one layer"
    if not report.enough(40, title):
        return
    report.part(title, "fidelity", "seconds")
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(1, tokens, heads, config.head_dim)).astype(np.float32)
        for heads in (config.heads, config.kv_heads, config.kv_heads)
    )
    trace = Trace.from_qkv(q, k, v)
    for fidelity in ("renormalized", "recorded"):
        seconds = timed(lambda fidelity=fidelity: replay(trace, CORM, fidelity=fidelity, errors=False).until, 2)
        report.row(title, fidelity=fidelity, seconds=seconds)


TORCH = """
import sys, time, torch
from torch.nn.functional import scaled_dot_product_attention as attention
tokens, heads, kv_heads, head_dim = map(int, sys.argv[1:])
def timed(q, k, v, causal):
    seconds = []
    for turn in range(6):
        torch.cuda.synchronize(); started = time.monotonic()
        for _ in range(30):
            attention(q, k, v, is_causal=causal)
        torch.cuda.synchronize(); seconds.append((time.monotonic() - started) / 30)
    return sorted(seconds[1:])[2]
def random(batch, heads, length):
    return torch.randn(batch, heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
print("prefill", timed(*(random(1, heads, tokens) for _ in range(3)), True))
for batch in (1, 8, 32):
    k, v = (random(batch, kv_heads, tokens) for _ in range(2))
    print(f"decode, batch {batch}", timed(random(batch, kv_heads, heads // kv_heads), k, v, False))
"""


def torch(report: Report, config: cj.Config, tokens: int) -> None:
    """Its attention, a layer, in a process of its own: no projections, no cache to write to."""
    title = f"torch's attention, a layer, {tokens:,} tokens"
    if not report.enough(25, title):
        return
    try:
        arguments = [str(x) for x in (tokens, config.heads, config.kv_heads, config.head_dim)]
        command = [sys.executable, "-c", TORCH, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, timeout=25, check=False)
    except subprocess.TimeoutExpired:
        report.enough(np.inf, f"{title}: it took more than 25 s")
        return
    if run.returncode:
        report.enough(np.inf, f"{title}: {(run.stderr.strip().splitlines() or ['it failed'])[-1]}")
        return
    report.part(title, "what", "milliseconds")
    for line in run.stdout.splitlines():
        what, seconds = line.rsplit(" ", 1)
        report.row(title, what=what, ms=1e3 * float(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="when to end")
    parser.add_argument("--out", type=Path, help="the file of results; default: accelerator_DEVICE.json here")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a rehearsal on a CPU")
    arguments = parser.parse_args()
    ends = time.monotonic() + arguments.seconds
    found = facts()
    name = re.sub(r"\W+", "_", found["device"].lower()).strip("_")
    report = Report(arguments.out or Path(f"accelerator_{name}.json"), ends, {"facts": found, "tiny": arguments.tiny})
    for key, value in found.items():
        print(f"{key:14s} {value:,.0f}" if isinstance(value, float) else f"{key:14s} {value}", flush=True)
    if found["platform"] == "cpu" and not arguments.tiny:
        sys.exit("there is no accelerator here: --tiny rehearses on a CPU")
    config, tokens = SMOLLM2, 8192
    llama, batches, contexts = dataclasses.replace(LLAMA, layers=8), (1, 8, 32), (8192, 32768)
    if arguments.tiny:
        small = {"vocab": 256, "dim": 64, "hidden": 96, "layers": 2}
        config, llama = dataclasses.replace(SMOLLM2, **small), dataclasses.replace(LLAMA, **small, heads=4, kv_heads=4)
        tokens, batches, contexts = 1024, (1, 2), (1024,)
    sound = decisions(report, 0.6 * arguments.seconds)
    model = random_model(config)
    decode(report, "SmolLM2's shape", model, batches, contexts[:1])
    prefill(report, model, tokens)
    torch(report, config, tokens)
    decode(report, "eight layers in the shape of Llama 2 7B", random_model(llama), batches[1:2], contexts[-1:])
    replays(report, config, tokens)
    if contexts[1:]:
        decode(report, "SmolLM2's shape, longer", model, batches, contexts[1:])
    print(f"\nkept in {report.path}", flush=True)
    sys.exit(None if sound else "decisions on this device are not those of the specification")


if __name__ == "__main__":
    main()
