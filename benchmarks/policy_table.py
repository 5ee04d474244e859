"""All policies at equal memory, on SmolLM2: how well they predict a text, and how close they stay to the full cache.

    python benchmarks/policy_table.py --text FILE... [--tokens 2048] [--budget 0.1 0.25 0.5] [--json FILE]

Every policy reads the text token by token (exact recurrence, teacher forcing) with at most so many keys a head. CORM
(w = 256, r = 64) is held to that by a cap, and may keep less. `random` is the control. Against the full cache's
prediction p of each token: KL(p || q) in nats, and how often the likeliest token is the same. Intervals: 95%, from
2,000 bootstrap resamples of blocks of 64 tokens, since neighbouring tokens are not independent.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import corm_jax as cj
from corm_jax.cache import slots_for
from corm_jax.files import write_json
from corm_jax.generation import Blocks
from corm_jax.inputs import encode, text_from
from corm_jax.policies import keys_of, on_budget

SPECS = (
    "corm:window=256,recent=64",
    "corm:window=256,recent=64,sinks=4",
    "streaming_llm",
    "h2o",
    "h2o:score=mean",
    "scissorhands",
    "tova",
    "tova:sinks=4,recent=32",
    "l2norm",
    "random",
)


@partial(jax.jit, donate_argnames=("caches", "reference"))
def _compare(model, policy, caches, reference, tokens, targets, count):
    """A block through the policy's caches and the full ones: NLL of both, KL, whether the likeliest is the same."""
    x, caches, _ = model(policy, caches, tokens, count, chunk=1)
    log_q = jax.nn.log_softmax(model.logits(x)[0])
    x, reference, _ = model(cj.Full(), reference, tokens, count, chunk=tokens.shape[1])
    log_p = jax.nn.log_softmax(model.logits(x)[0])
    pick = partial(jnp.take_along_axis, indices=targets[0][:, None], axis=-1)
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    same = log_p.argmax(-1) == log_q.argmax(-1)
    return caches, reference, (-pick(log_q)[:, 0], -pick(log_p)[:, 0], kl, same)


def measure(model, policy, ids) -> dict[str, np.ndarray]:
    """Per token: ``nll``, ``full`` (the full cache's), ``kl``, ``same``; and ``kept`` at the end."""
    blocks = Blocks.cut([ids], model.config.vocab, 1)
    size = blocks.tokens.shape[-1]
    targets = np.roll(blocks.tokens.reshape(-1), -1).reshape(-1, 1, size)
    caches = model.make_caches(policy, batch=1, capacity=slots_for(policy, None, len(ids), 1))
    reference = model.make_caches(cj.Full(), batch=1, capacity=blocks.tokens.size)
    rows = []
    for index, count in enumerate(blocks.count):
        caches, reference, row = _compare(
            model, policy, caches, reference, blocks.tokens[:, index], targets[index], count
        )
        rows.append(jax.tree.map(np.asarray, row))
    nll, full, kl, same = (np.concatenate(column)[: len(ids) - 1] for column in zip(*rows, strict=True))
    used = cj.usage(caches)
    return {"nll": nll, "full": full, "kl": kl, "same": same, "kept": np.asarray(used.live).mean() / len(ids)}


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
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = cj.load()
    texts = [text_from(path) for path in arguments.text]
    rows = []
    for words, name in texts:
        ids = encode(model, tokenizer, words, name, arguments.tokens)
        print(f"\nSmolLM2-135M, {len(ids):,} tokens of {Path(name).name}\n")
        print("| budget | policy | kept | NLL - full [95%] | KL [95%] | same likeliest token |")
        print("|---|---|---|---|---|---|")
        for budget in arguments.budget:
            for spec in dict.fromkeys(on_budget(one, keys_of(budget, len(ids))) for one in arguments.policy):
                found = measure(model, cj.parse(spec), ids)
                row = {"text": Path(name).name, "tokens": len(ids), "budget": budget, "policy": spec}
                row |= {"kept": float(found["kept"]), "full_nll": float(found["full"].mean(dtype=np.float64))}
                row |= {"delta_nll": interval(found["nll"] - found["full"])}
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
