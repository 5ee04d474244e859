"""All policies at equal memory, on SmolLM2: how well they predict a text, and how close they stay to the full cache.

    python benchmarks/policy_table.py --text FILE... [--tokens 2048] [--budget 0.1 0.25 0.5] [--policy SPEC...]

The first half of a text is the prompt; what follows is scored, by teacher forcing. A budget is a share of the prompt:
so many keys a head stay. CORM decides by itself how many: once its w = r is searched so that it ends the text with as
many, twice it is capped. SnapKV, PyramidKV and Ada-KV evict at the prompt's end and never again, so their caches grow
afterwards, which `kept` shows: the live share of all keys at the end. `random` is the control.

Against the full cache's prediction p of each token: KL(p || q) in nats, and how often the likeliest token is the same.
Intervals: 95%, from 2,000 bootstrap resamples of blocks of 64 tokens, since neighbouring tokens are not independent.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import corm_jax as cj
from corm_jax.cache import expect, slots_for
from corm_jax.files import write_json
from corm_jax.fitting import fitted
from corm_jax.generation import Blocks
from corm_jax.inputs import encode, text_from
from corm_jax.policies import keys_of

SPECS = (
    "corm",
    "corm:window=256,recent=32",
    "corm:window=256,recent=32,sinks=4",
    "streaming_llm",
    "streaming_llm:positions=cache",
    "h2o",
    "h2o:score=mean",
    "scissorhands",
    "tova",
    "l2norm",
    "random",
    "snapkv",
    "pyramidkv",
    "adakv",
)


@partial(jax.jit, static_argnames="chunk", donate_argnames="caches")
def _score(model, policy, caches, tokens, targets, count, log_p, *, chunk):
    """A block through the caches: NLL, KL to ``log_p``, whether the likeliest is the same; and its own ln p."""
    x, caches, _ = model(policy, caches, tokens, count, chunk=chunk)
    log_q = jax.nn.log_softmax(model.logits(x)[0])
    nll = -jnp.take_along_axis(log_q, targets[0][:, None], axis=-1)[:, 0]
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return caches, (nll, kl, log_p.argmax(-1) == log_q.argmax(-1)), log_q


def measure(model, policy, ids, prompt: int, chunk: int, reference=None):
    """Of each token after the prompt: ``nll``, ``kl``, ``same``; ``kept`` at the end; and ln p of all blocks."""
    blocks = Blocks.cut([ids], model.config.vocab, chunk)
    size = blocks.tokens.shape[-1]
    targets = np.roll(blocks.tokens.reshape(-1), -1).reshape(-1, 1, size)
    caches = model.make_caches(policy, batch=1, capacity=slots_for(policy, None, len(ids), chunk))
    caches = expect(caches, np.array([prompt], np.int32))
    rows, predicted = [], []
    for index, count in enumerate(blocks.count):
        known = np.zeros((size, model.config.vocab), np.float32) if reference is None else reference[index]
        block = blocks.tokens[:, index]
        caches, row, log_q = _score(model, policy, caches, block, targets[index], count, known, chunk=chunk)
        rows.append(jax.tree.map(np.asarray, row))
        if reference is None:
            predicted.append(np.asarray(log_q))
    nll, kl, same = (np.concatenate(column)[prompt - 1 : len(ids) - 1] for column in zip(*rows, strict=True))
    kept = np.asarray(cj.usage(caches).live).mean() / len(ids)
    return {"nll": nll, "kl": kl, "same": same, "kept": float(kept)}, predicted


def interval(values: np.ndarray, block: int = 64) -> tuple[float, float, float]:
    """The mean and its 95% interval."""
    parts = np.array_split(values.astype(np.float64), max(len(values) // block, 1))
    sums, sizes = np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])
    draws = np.random.default_rng(0).integers(len(parts), size=(2000, len(parts)))
    means = sums[draws].sum(-1) / sizes[draws].sum(-1)
    return float(values.mean(dtype=np.float64)), *map(float, np.quantile(means, [0.025, 0.975]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 files")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--budget", nargs="+", default=["0.1", "0.25", "0.5"])
    parser.add_argument("--policy", nargs="+", default=SPECS)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = cj.load()
    chunk, rows = arguments.chunk, []
    prompt = arguments.tokens // 2 // chunk * chunk
    for path in arguments.text:
        words, name = text_from(path)
        ids = encode(model, tokenizer, words, name, arguments.tokens)
        full, log_p = measure(model, cj.Full(), ids, prompt, chunk)
        print(f"\nSmolLM2-135M, tokens {prompt:,} to {len(ids):,} of {Path(name).name}: ", end="")
        print(f"NLL with the full cache {full['nll'].mean(dtype=np.float64):.4f}\n")
        print("| budget | policy | kept | NLL - full [95%] | KL [95%] | same likeliest token [95%] |")
        print("|---|---|---|---|---|---|")
        for budget in arguments.budget:
            keys = keys_of(budget, prompt)
            for spec in (fitted(each, model, ids, keys, chunk=chunk)[0] for each in arguments.policy):
                found, _ = measure(model, cj.parse(spec), ids, prompt, chunk, log_p)
                row = {"text": Path(name).name, "tokens": len(ids), "prompt": prompt, "budget": budget, "policy": spec}
                row |= {"kept": found["kept"], "full_nll": float(full["nll"].mean(dtype=np.float64))}
                row |= {"delta_nll": interval(found["nll"] - full["nll"])}
                row |= {"kl": interval(found["kl"]), "same": interval(found["same"])}
                rows.append(row)
                delta, kl, same = row["delta_nll"], row["kl"], row["same"]
                print(
                    f"| {budget} | `{spec}` | {row['kept']:.3f} | {delta[0]:+.4f} [{delta[1]:+.4f}, {delta[2]:+.4f}] "
                    f"| {kl[0]:.4f} [{kl[1]:.4f}, {kl[2]:.4f}] | {same[0]:.3f} [{same[1]:.3f}, {same[2]:.3f}] |",
                    flush=True,
                )
        if arguments.json:
            write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
