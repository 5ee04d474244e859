"""How long it takes to read a prompt, and in how much memory: the full cache, CORM in pools, transformers, kvpress.

    python benchmarks/prefill_speed.py --text FILE [--plan PLAN | --pool 0.35] [--tokens 2048 8192] [--ours-only]

The full cache reads in chunks of 256 tokens. CORM reads in the chunks and the pools of the plan, which may be too small
if the text is longer than the plan's. If the text is shorter, or without a plan, CORM reads in chunks of 256 tokens,
and `--pool` is the size of its pools as a share of the full cache. Then 48 tokens are decoded with a batch of 1.
transformers (torch, on the CPU) does the same with its own cache, in float32, with as many threads. If NVIDIA's kvpress
is installed, transformers does it once more with a prompt that kvpress (SnapKV) has compressed to as many keys as CORM
keeps.

Times are without compilation. Each row is measured in a process of its own, one after the other, so that the peak of
memory is that of the row.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np

import corm_jax as cj
from corm_jax.command.inputs import encode, text_from
from corm_jax.files import write_json
from corm_jax.model.generation import STRETCH
from corm_jax.policies.plan import Plan

GIB, MIB, TURNS = 2**30, 2**20, 3


def ours(spec: str, ids, chunk: int, capacity, pooled: bool) -> dict:
    """Reads a prompt and decodes, after a run that compiles."""
    model, _ = cj.load()
    policy = cj.parse(spec)
    for prompt in (ids[:512], ids):
        caches = cj.make_caches(model, policy, batch=1, capacity=capacity, stores=1 if pooled else None)
        started = time.perf_counter()
        logits, caches = jax.block_until_ready(cj.prefill(model, policy, caches, [prompt], chunk=chunk))
        seconds, steps = time.perf_counter() - started, []
        for _ in range(TURNS):
            numbers = np.int32(STRETCH), np.zeros(0, np.int32), np.float32(0), np.float32(1)
            started = time.perf_counter()
            _, logits, _, caches = cj.decode(
                model, policy, caches, logits, jax.random.key(0), np.zeros(1, bool), *numbers, steps=STRETCH
            )
            jax.block_until_ready(caches)
            steps.append((time.perf_counter() - started) / STRETCH)
    usage = cj.usage(caches)
    size = {"live": usage.bytes_live, "allocated": usage.bytes_allocated, "overflow": int(usage.overflow.sum())}
    return {"prefill": seconds, "decode": min(steps), "peak": peak()} | size


def theirs(ids, kept: float | None) -> dict:
    """The same in transformers. With kvpress, the share ``kept`` of the keys of the prompt is kept."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from corm_jax.model import named

    def press():
        if kept is None:
            return nullcontext()
        from kvpress import SnapKVPress

        return SnapKVPress(compression_ratio=1 - kept)(model)

    path = named.model_file()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        for prompt in (ids[:512], ids):
            cache = DynamicCache()
            started = time.perf_counter()
            with press():
                out = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
            seconds, steps, position = time.perf_counter() - started, [], len(prompt)
            for _ in range(TURNS):
                started = time.perf_counter()
                for _ in range(STRETCH):
                    token = out.logits[:, -1:].argmax(-1)
                    out = model(token, past_key_values=cache, position_ids=torch.tensor([[position]]))
                    position += 1
                steps.append((time.perf_counter() - started) / STRETCH)
    size = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    return {"prefill": seconds, "decode": min(steps), "peak": peak(), "live": size, "allocated": size, "overflow": 0}


def peak() -> int:
    """The peak of this process's memory, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(run, *arguments) -> dict:
    """Runs a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file")
    parser.add_argument("--plan", type=Path, help="a plan whose chunks, pools and policy are measured")
    parser.add_argument("--pool", type=float, default=0.35, help="without a plan: slots, as a share of the full cache")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192], help="lengths of the prompt")
    parser.add_argument("--ours-only", action="store_true", help="leave out transformers and kvpress")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    arguments = parser.parse_args()
    model, tokenizer = cj.load()
    words, name = text_from(arguments.text)
    texts = {tokens: encode(model, tokenizer, words, name, tokens) for tokens in arguments.tokens}
    config = model.config
    del model
    plan = Plan.load(arguments.plan) if arguments.plan else None
    spec = plan.policy if plan else "corm:window=256,recent=256,group=mean"
    rows = []
    print(
        "| tokens | cache | prefill s | faster | decode ms | faster | live MiB | allocated MiB | overflow | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")

    def row(tokens, cache, found):
        first = next((one for one in rows if one["tokens"] == tokens), found)
        rows.append({"tokens": tokens, "cache": cache} | found)
        faster = [first[x] / found[x] for x in ("prefill", "decode")]
        print(
            f"| {tokens:,} | {cache} | {found['prefill']:.1f} | {faster[0]:.2f} | {1e3 * found['decode']:.1f} "
            f"| {faster[1]:.2f} | {found['live'] / MIB:.1f} | {found['allocated'] / MIB:.1f} | {found['overflow']:,} "
            f"| {found['peak'] / GIB:.2f} |",
            flush=True,
        )
        return found

    for tokens, ids in texts.items():
        room = TURNS * STRETCH
        pools = (
            (plan.chunk, plan.capacity)
            if plan and tokens >= plan.tokens
            else (256, int(arguments.pool * tokens) + 256 + room)
        )
        row(tokens, "full", alone(ours, "full", ids, 256, tokens + room, False))
        corm = row(tokens, f"{spec}, pooled", alone(ours, spec, ids, *pools, True))
        if arguments.ours_only:
            continue
        row(tokens, "transformers", alone(theirs, ids, None))
        if find_spec("kvpress"):
            kept = corm["live"] / (2 * 4 * config.layers * config.kv_heads * config.head_dim * tokens)
            row(tokens, f"transformers, kvpress SnapKV, {kept:.2f} kept", alone(theirs, ids, kept))
    if arguments.json:
        write_json(arguments.json, {"rows": rows})


if __name__ == "__main__":
    main()
