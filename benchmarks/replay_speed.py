"""How long a replay takes, compared with the model that made the trace.

    python benchmarks/replay_speed.py [--text FILE] [--json FILE]

SmolLM2 is recorded on a text (2,048 tokens, all layers). Then these are timed in one process, each as the best of three
runs without compilation:

- the prefill of these tokens in the model with the full cache, with the fastest of several chunk sizes;
- the exact recurrence of CORM with one setting on the recorded trace, with and without the errors of the outputs;
- the grid w in {64, 128, 256, 512} x r in {16, 32, 64}, as one vmap.

Only the ratios can be compared between machines. With ``--long`` the script instead replays 8,192 tokens, and prints
the peak of memory.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import jax

import corm_jax as cj
from corm_jax.command.inputs import encode, text_from
from corm_jax.files import write_json
from corm_jax.runs.recording import record
from corm_jax.traces.meta import Meta
from corm_jax.traces.storage import Writer
from corm_jax.traces.trace import Trace
from simulator.replay import replay, sweep

GRID = {"window": [64, 128, 256, 512], "recent": [16, 32, 64]}
CHUNKS = (128, 256, 512)
POLICY = cj.Corm(window=256, recent=64)


def best(run, times: int = 3) -> float:
    run()  # compiles
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def recorded(model, ids, path: Path) -> Trace:
    config = model.config
    heads = {"q_heads": config.heads, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    with Writer(path, Meta(kind="qkv", layers=config.layers, steps=len(ids), **heads)) as writer:
        for layer in record(model, ids):
            writer.write(q=layer.q, k=layer.k, v=layer.v)
    return Trace.open(path)


def prefill(model, ids, chunk: int) -> None:
    caches = cj.make_caches(model, cj.Full(), batch=1, capacity=len(ids))
    jax.block_until_ready(cj.prefill(model, cj.Full(), caches, [ids], chunk=chunk))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a UTF-8 file; default: Python's language reference")
    parser.add_argument("--tokens", type=int, default=2048, help="how many tokens to record")
    parser.add_argument("--long", action="store_true", help="only replay 8,192 tokens, and print the peak of memory")
    parser.add_argument("--json", type=Path, help="write the result into this file")
    arguments = parser.parse_args()
    words, name = text_from(arguments.text)
    model, tokenizer = cj.load()
    ids = encode(model, tokenizer, words, name, 8192 if arguments.long else arguments.tokens)
    result: dict = {"text": name, "tokens": len(ids), "device": str(jax.devices()[0].device_kind)}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        trace = recorded(model, ids, Path(folder) / "trace")
        result["record_s"] = time.perf_counter() - started
        if arguments.long:
            before = peak()
            started = time.perf_counter()
            live = replay(trace, POLICY).live
            result |= {
                "replay_s": time.perf_counter() - started,
                "kept": float(live[..., -1].mean() / len(ids)),
                "peak_GiB_before_replay": before,
                "peak_GiB": peak(),
            }
        else:
            result["prefill_s"] = min(best(lambda chunk=chunk: prefill(model, ids, chunk)) for chunk in CHUNKS)
            result["replay_s"] = best(lambda: replay(trace, POLICY))
            result["replay_without_errors_s"] = best(lambda: replay(trace, POLICY, errors=False))
            result["recorded_s"] = best(lambda: replay(trace, POLICY, errors=False, fidelity="recorded"))
            result["sweep_of_12_s"] = best(lambda: sweep(trace, cj.Corm, GRID))
            result["replay_over_prefill"] = result["replay_s"] / result["prefill_s"]
            result["sweep_over_replay"] = result["sweep_of_12_s"] / result["replay_s"]
            result["sweep_over_replay_without_errors"] = result["sweep_of_12_s"] / result["replay_without_errors_s"]
            result["peak_GiB"] = peak()
    for key, value in result.items():
        print(f"{key:34s}{value:.3f}" if isinstance(value, float) else f"{key:34s}{value}")
    if arguments.json:
        write_json(arguments.json, result)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
