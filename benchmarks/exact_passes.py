"""How often a block of the exact recurrence attends until its evictions are settled.

    python benchmarks/exact_passes.py --text FILE [FILE ...] [--tokens 2048] [--layers 0 10 20 29] [--json FILE]

Records SmolLM2 on each text, reads the recorded layers through CORM's cache in blocks of several sizes
(`corm_jax.core.exact`), and prints, over all layers and blocks in which anything was evicted before their end, how many
passes it took on average and at most. The last pass of each only confirms; blocks without such an eviction take one.
Which keys are kept does not hang on the size of the block: the last column counts heads that keep others at the end
than with the smallest block, which only rounding could bring about.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import corm_jax as cj
from corm_jax.command.inputs import encode, text_from
from corm_jax.core.step import read
from corm_jax.files import write_json
from corm_jax.runs.recording import record

SETTINGS = [(64, 64), (64, 16), (128, 16), (256, 64), (256, 256)]
BLOCKS = [16, 32, 64, 128, 256]


@partial(jax.jit, static_argnames="block")
def passes(policy, q, k, v, *, block):
    """Passes of each block, and the positions that are kept at the end, head by head."""
    cache = cj.make_cache(policy, cj.CacheSpec(k.shape[1], len(k), k.shape[2]))
    cache = cache._replace(made=replace(cache.made, block=block, moments=True, roomy=True))
    _, cache, live, found = read(policy, cache, q, k, v, len(k), chunk=1)
    return found, jnp.sort(cache.position, -1), live


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model, tokenizer = cj.load()
    rows = []
    print("| text | w | r | block | passes, mean | at most | blocks of one pass | kept | heads that differ |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path in given.text:
        words, name = text_from(path)
        ids = encode(model, tokenizer, words, name, given.tokens)
        layers = []
        for one in record(model, ids):
            if not given.layers or one.layer in given.layers:
                q = one.q.reshape(len(ids), model.config.kv_heads, -1, model.config.head_dim)
                layers.append((q, one.k, one.v))
        for window, recent in SETTINGS:
            held = None
            for block in [size for size in BLOCKS if size <= window]:
                policy = cj.Corm(window=window, recent=recent)
                found = [passes(policy, *layer, block=block) for layer in layers]
                counts = np.concatenate([np.asarray(one[0]) for one in found])
                now = [np.asarray(one[1]) for one in found]
                held = held or now
                differ = sum(int((a != b).any(-1).sum()) for a, b in zip(held, now, strict=True))
                several = counts[counts > 1]
                kept = float(np.mean([one[2][-1] for one in found]) / len(ids))
                row = {"text": path.name, "w": window, "r": recent, "block": block, "kept": kept, "differ": differ}
                row |= {"mean": float(several.mean()), "most": int(counts.max()), "one": float((counts == 1).mean())}
                rows.append(row)
                print(f"| {path.name} | {window} | {recent} | {block} | {row['mean']:.2f} | {row['most']} | "
                      f"{row['one']:.3f} | {kept:.3f} | {differ} |", flush=True)  # fmt: skip
    if given.json:
        write_json(given.json, {"tokens": given.tokens, "rows": rows})


if __name__ == "__main__":
    main()
