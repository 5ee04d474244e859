"""Checks on a GPU or a TPU, in five minutes, that the same keys are evicted as specified, and measures the speed.

    python benchmarks/accelerator.py [--seconds 300] [--out FILE] [--tiny]

It needs the core packages and hypothesis, but no weights and no network. Results are printed at once, and written into
a file that is named after the device; the file is written anew after each row.

1. *Decisions*: random policies on random histories. The cache and the replay on this device are compared with the
   specification in NumPy (`simulator.soak`), for each policy at least once, and then again as long as there is time.
2. *Decode*: SmolLM2's shape with random weights, bfloat16, batches of 1, 8 and 32 after 8,192 and 32,768 tokens, and
   eight layers in the shape of Llama 2 7B with a batch of 8. The full cache is compared with CORM (w = r = 256,
   group=mean) in pools that have 0.27 of its slots. `nominal` and `measured` are shares of a roofline: the time that it
   takes to read the weights and the cache once, divided by the measured time. The bandwidth for `nominal` is the one
   that the maker states; for `measured` it is the one with which the device reads 2 GiB in this run.
3. *Prefill*: 8,192 tokens in SmolLM2's shape, with the full cache, CORM in chunks of 256, and CORM exactly.
4. *Replay*: CORM exactly, on one layer of 8,192 tokens in the same shape.
5. *torch*, if it is installed and can use the device: only its attention, in the shapes of 2 and 3, for comparison.

If too little time is left for a part, the part is listed as left out. Times are medians of several runs, without
compilation. With `--tiny` all shapes are small enough for a CPU, to try the script; such times mean nothing.
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

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory for torch

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
"""The bandwidth in GB/s that makers state, by a part of the device's name. The longest part that fits counts."""

POOL = 0.27
TURNS = 5


@dataclasses.dataclass
class Report:
    """The results, and the file that they are written into, anew after each row."""

    path: Path
    ends: float
    found: dict[str, Any]

    def left(self) -> float:
        """The seconds that are left."""
        return self.ends - time.monotonic()

    def part(self, title: str, *columns: str) -> None:
        """Prints the heading of a table."""
        self.found[title] = []
        print(f"\n## {title} ({self.left():.0f} s left)\n")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def row(self, title: str, **cells: Any) -> None:
        """Prints a row, and writes it into the file."""
        self.found[title].append(cells)
        print(f"| {' | '.join(map(shown, cells.values()))} |", flush=True)
        write_json(self.path, self.found)

    def enough(self, seconds: float, what: str) -> bool:
        """Whether this much time is left. If not, prints and stores that a part is left out."""
        if self.left() >= seconds:
            return True
        print(f"\nleft out, with {max(self.left(), 0):.0f} s left: {what}", flush=True)
        self.found.setdefault("left out", []).append(what)
        write_json(self.path, self.found)
        return False


def shown(value: Any) -> str:
    """The text of a cell."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def facts() -> dict[str, Any]:
    """The device, the versions, and the bandwidths."""
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
    """Compares each policy at least once, and more often if there is time. Whether all decisions are the same."""
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
    print(f"\n{same:,} decisions of {len(names)} policies are {verdict} specified", flush=True)
    return sound


def random_model(config: cj.Config) -> cj.Transformer:
    """A model of this shape with random weights, made on the device."""
    return jax.jit(lambda: cj.Transformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))()


def decode(report: Report, name: str, model: cj.Transformer, batches, contexts) -> None:
    """Decodes token by token, with the full cache and with CORM in pools in turn."""
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
    """The nominal and the measured bandwidth, in GB/s."""
    return {key: report.found["facts"][f"{key} GB/s"] for key in ("nominal", "measured")}


def timed(run: Callable[[], Any], times: int = TURNS) -> float:
    """The median time of several runs in seconds, after a run that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(times):
        started = time.monotonic()
        jax.block_until_ready(run())
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


def prefill(report: Report, model: cj.Transformer, tokens: int) -> None:
    """Reads a prompt block by block. Results stay on the device in between."""
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
            caches = jax.tree.map(jnp.copy, start)  # the first block donates them
            logits = jnp.zeros((1, model.config.vocab), jnp.float32)
            for index, count in enumerate(cut.count):
                logits, caches = _prefill_block(model, policy, caches, logits, cut.tokens[:, index], count, chunk=chunk)
            return logits

        seconds = timed(run, 3)
        first = first or seconds
        report.row(title, cache=name, chunk=chunk, seconds=seconds, rate=tokens / seconds, faster=first / seconds)


def replays(report: Report, config: cj.Config, tokens: int) -> None:
    """Replays one layer of random queries, keys and values."""
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
    """Measures torch's attention of one layer in a process of its own, without projections and without a cache."""
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
    parser.add_argument("--seconds", type=float, default=300, help="seconds after which the script ends")
    parser.add_argument("--out", type=Path, help="file for the results; default: accelerator_DEVICE.json")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script on a CPU")
    arguments = parser.parse_args()
    ends = time.monotonic() + arguments.seconds
    found = facts()
    name = re.sub(r"\W+", "_", found["device"].lower()).strip("_")
    report = Report(arguments.out or Path(f"accelerator_{name}.json"), ends, {"facts": found, "tiny": arguments.tiny})
    for key, value in found.items():
        print(f"{key:14s} {value:,.0f}" if isinstance(value, float) else f"{key:14s} {value}", flush=True)
    if found["platform"] == "cpu" and not arguments.tiny:
        sys.exit("this machine has no accelerator: with --tiny the script can be tried on a CPU")
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
    print(f"\nresults are in {report.path}", flush=True)
    sys.exit(None if sound else "on this device other keys are evicted than specified")


if __name__ == "__main__":
    main()
