"""How many passes over a block the exact recurrence needs until its evictions are final.

    python benchmarks/exact_passes.py --text FILE [FILE ...] [--tokens 2048] [--layers 0 10 20 29] [--json FILE]

SmolLM2 reads each text, and its layers are recorded. CORM's cache then reads the recorded layers in blocks of several
sizes (`corm_jax.core.exact`). The table has the mean and the largest number of passes, over all layers and all blocks
in which a key was evicted before the end of the block. The last pass of a block changes nothing: it confirms the
result. A block without such an eviction takes one pass. Which keys are kept does not depend on the size of the block.
The last column counts the heads that keep other keys at the end than with the smallest block; only rounding could cause
that.
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
    """The passes of each block, the positions that each head keeps at the end, and the numbers of live keys."""
    cache = cj.make_cache(policy, cj.CacheSpec(k.shape[1], len(k), k.shape[2]))
    cache = cache._replace(made=replace(cache.made, block=block, moments=True, roomy=True))
    _, cache, live, found = read(policy, cache, q, k, v, len(k), chunk=1)
    return found, jnp.sort(cache.position, -1), live


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 files")
    parser.add_argument("--tokens", type=int, default=2048, help="how many tokens to read")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to read, from 0; default: all")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    given = parser.parse_args()
    model, tokenizer = cj.load()
    rows = []
    print("| text | w | r | block | passes, mean | passes, most | blocks of one pass | kept | heads that differ |")
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
