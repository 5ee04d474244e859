"""How fast a prompt is read: full cache, and chunks of CORM in pools, against transformers on the same weights.

    python benchmarks/prefill_speed.py --text FILE [--plan PLAN] [--tokens 2048 8192] [--no-transformers] [--json FILE]

The full cache reads in chunks of 256, CORM in those of the plan, in its pools; without a plan, of 64, in pools of 0.35
of the full cache. Times without compilation, all in one process; then 16 tokens are decoded, at batch 1. transformers
(torch, CPU) does the same with its own cache and as many threads, float32.
"""

import argparse
import resource
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

import corm_jax as cj
from corm_jax.files import write_json
from corm_jax.generation import STRETCH
from corm_jax.inputs import encode, text_from
from corm_jax.plan import Plan

MIB = 2**20


def ours(model, policy, ids, **how):
    """Seconds to read and to decode a token, after a run that compiles; and the caches."""
    chunk = how.pop("chunk")
    for prompt in (ids[:512], ids):
        caches = model.make_caches(policy, batch=1, **how)
        started = time.perf_counter()
        logits, caches = jax.block_until_ready(cj.prefill(model, policy, caches, [prompt], chunk=chunk))
        seconds, steps = time.perf_counter() - started, []
        for _ in range(3):
            numbers = np.int32(STRETCH), np.zeros(0, np.int32), np.float32(0), np.float32(1)
            started = time.perf_counter()
            _, logits, _, caches = cj.decode(
                model, policy, caches, logits, jax.random.key(0), np.zeros(1, bool), *numbers, steps=STRETCH
            )
            jax.block_until_ready(caches)
            steps.append((time.perf_counter() - started) / STRETCH)
    return seconds, min(steps), cj.usage(caches)


def theirs(ids):
    """The same of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from corm_jax import smollm2

    path = smollm2.model_file()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        for prompt in (ids[:512], ids):
            started = time.perf_counter()
            out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            seconds, steps = time.perf_counter() - started, []
            for _ in range(3):
                started = time.perf_counter()
                for _ in range(STRETCH):
                    token = out.logits[:, -1:].argmax(-1)
                    out = model(token, past_key_values=out.past_key_values, use_cache=True)
                steps.append((time.perf_counter() - started) / STRETCH)
    return seconds, min(steps), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = cj.load()
    words, name = text_from(arguments.text)
    plan = Plan.load(arguments.plan) if arguments.plan else None
    spec = plan.policy if plan else "corm:window=256,recent=256,group=mean"
    rows = []
    print("| tokens | cache | prefill s | faster | decode ms | faster | live MiB | allocated MiB | overflow |")
    print("|---|---|---|---|---|---|---|---|---|")
    for tokens in arguments.tokens:
        ids = encode(model, tokenizer, words, name, tokens)
        room = 3 * STRETCH
        if plan and tokens == plan.tokens:
            pools = {"chunk": plan.chunk, "capacity": plan.capacity, "pooled": True}
        else:
            pools = {"chunk": 64, "capacity": int(0.35 * tokens) + 64 + room, "pooled": True}
        contenders = {
            "full": partial(ours, model, cj.Full(), ids, chunk=256, capacity=tokens + room),
            f"{spec}, pooled": partial(ours, model, cj.parse(spec), ids, **pools),
        }
        if not arguments.no_transformers:
            contenders["transformers"] = partial(theirs, ids)
        first = None
        for cache, run in contenders.items():
            prefill, decode, usage = run()
            first = first or (prefill, decode)
            row = {"tokens": tokens, "cache": cache, "prefill": prefill, "decode": decode}
            bytes_ = (usage.bytes_live, usage.bytes_allocated, int(usage.overflow.sum())) if usage else None
            rows.append(row | {"live_allocated_overflow": bytes_})
            print(
                f"| {tokens:,} | {cache} | {prefill:.1f} | {first[0] / prefill:.2f} | {1e3 * decode:.1f} "
                f"| {first[1] / decode:.2f} | "
                + (f"{bytes_[0] / MIB:.1f} | {bytes_[1] / MIB:.1f} | {bytes_[2]} |" if bytes_ else "- | - | - |"),
                flush=True,
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\npeak memory of the process: {peak / 2**30:.2f} GiB")
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "peak": peak})


if __name__ == "__main__":
    main()
