"""All policies at equal memory, on SmolLM2: how well they predict a text, and how close they stay to the full cache.

    python benchmarks/policy_table.py --text FILE... [--tokens 2048] [--budget 0.1 0.25 0.5] [--policy SPEC...]

The first half of a text is the prompt; the second half is predicted token by token (teacher forcing). A budget is a
number of keys a head, given as a share of the prompt. CORM has no budget by itself. The table has it in two forms: with
a window w = r with which it keeps as many keys at the end of the text, found by a search; and with a fixed window and
the budget as a limit. SnapKV, PyramidKV and Ada-KV evict once, at the end of the prompt, so their caches grow
afterwards. The column `kept` shows this: it is the live share of all keys at the end. `random` is the control.

With p the full cache's prediction of a token, and q the policy's: KL(p || q) in nats, and how often both have the same
likeliest token. Intervals are 95% intervals, from 2,000 bootstrap resamples of blocks of 64 tokens, since neighbouring
tokens are not independent.
"""

import argparse
from pathlib import Path

import numpy as np

import corm_jax as cj
from corm_jax.command.inputs import encode, text_from
from corm_jax.evaluation.agreement import measure
from corm_jax.evaluation.intervals import Interval, bootstrap
from corm_jax.files import write_json
from corm_jax.policies import keys_of
from corm_jax.runs.fitting import fitted

SPECS = (
    "corm",
    "corm:window=256,recent=32",
    "corm:window=256,recent=32,sinks=4",
    "streaming_llm",
    "streaming_llm:positions=cache",
    "h2o",
    "h2o:attention=mean",
    "scissorhands",
    "tova",
    "l2norm",
    "random",
    "snapkv",
    "pyramidkv",
    "adakv",
)


def by_blocks(values: np.ndarray, block: int = 64) -> Interval:
    """The mean and its 95% interval, from resampled blocks."""
    return bootstrap([part.mean() for part in np.array_split(values.astype(np.float64), max(len(values) // block, 1))])


def shown(interval: Interval, digits: str) -> str:
    """An interval as text, with numbers in this format."""
    mean, low, high = (format(value, digits) for value in interval)
    return f"{mean} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 files")
    parser.add_argument("--tokens", type=int, default=2048, help="how many tokens of each text to read")
    parser.add_argument("--budget", nargs="+", default=["0.1", "0.25", "0.5"], help="shares of the prompt")
    parser.add_argument("--policy", nargs="+", default=SPECS, metavar="SPEC", help="default: all of the table")
    parser.add_argument("--chunk", type=int, default=8, help="tokens between evictions")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    arguments = parser.parse_args()
    model, tokenizer = cj.load()
    chunk, rows = arguments.chunk, []
    prompt = arguments.tokens // 2 // chunk * chunk
    for path in arguments.text:
        words, name = text_from(path)
        ids = encode(model, tokenizer, words, name, arguments.tokens)
        full = measure(model, cj.Full(), ids, prompt, chunk).nll.mean(dtype=np.float64)
        print(f"\nSmolLM2-135M, tokens {prompt:,} to {len(ids):,} of {Path(name).name}: ", end="")
        print(f"NLL with the full cache {full:.4f}\n")
        print("| budget | policy | kept | NLL - full [95%] | KL [95%] | same likeliest token [95%] |")
        print("|---|---|---|---|---|---|")
        for budget in arguments.budget:
            keys = keys_of(budget, prompt)
            for spec in (fitted(each, model, ids, keys, chunk=chunk)[0] for each in arguments.policy):
                found = measure(model, cj.parse(spec), ids, prompt, chunk)
                row = {"text": Path(name).name, "tokens": len(ids), "prompt": prompt, "budget": budget, "policy": spec}
                row |= {"kept": float(np.asarray(found.usage.live).mean() / len(ids)), "full_nll": full}
                measures = found.nll - found.full_nll, found.kl, found.same
                delta, kl, same = (by_blocks(values) for values in measures)
                rows.append(row | {"delta_nll": delta, "kl": kl, "same": same})
                cells = shown(delta, "+.4f"), shown(kl, ".4f"), shown(same, ".3f")
                print(f"| {budget} | `{spec}` | {row['kept']:.3f} | {' | '.join(cells)} |", flush=True)
        if arguments.json:
            write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
