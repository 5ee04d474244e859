"""How much a replay differs from the model itself: `recorded` and `renormalized` against `live`, on SmolLM2.

    python benchmarks/replay_fidelity.py [--text FILE] [--tokens 2048] [--json FILE]

``live`` means that the model reads the text with a policy in its cache, token by token. The same text is also recorded
with the full cache, and the policy is replayed on the trace. For each fidelity the table has these columns, over all
layers and key-value heads:

- kept: live keys / tokens at the end, the mean over heads; kept there: the same in the model;
- count gap: |live keys in the replay - live keys in the model| / live keys in the model, the mean over heads and steps;
- by head: the correlation over heads between live keys at the end in the replay and in the model;
- same keys: the Jaccard similarity of the sets of keys that are live at the end, the mean over heads (and the
  smallest);
- other fate: the share of all keys that are live at the end in one of the two only.

The last rows compare replays of the trace stored in 16 bits with a replay of the trace in float32.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import corm_jax as cj
from corm_jax.command.inputs import encode, text_from
from corm_jax.files import write_json
from corm_jax.runs.perplexity import read_text
from corm_jax.runs.recording import record
from corm_jax.traces.trace import Trace
from simulator.recurrence import FOREVER
from simulator.replay import FIDELITIES, replay

POLICIES = ("corm:window=256,recent=256", "corm:window=256,recent=256,group=mean", "corm:window=64,recent=64")


def live(model, policy, ids) -> tuple[np.ndarray, np.ndarray]:
    """In the model: live keys ``[layers, kv_heads, steps]``, and which they are at the end, bool ``[..., keys]``."""
    counts = read_text(model, policy, ids).live.transpose(0, 2, 1)
    caches = cj.make_caches(model, policy, batch=1, capacity=len(ids))
    _, caches = cj.prefill(model, policy, caches, [ids], chunk=1)
    position = np.stack([np.asarray(cache.position[0]) for cache in caches])
    kept = np.zeros((*counts.shape[:2], len(ids)), bool)
    layer, head, slot = np.nonzero(position >= 0)
    kept[layer, head, position[layer, head, slot]] = True
    return counts, kept


def gap(counts, kept, true_counts, true_kept) -> dict[str, float]:
    """How much a replay differs from the model."""
    same = (kept & true_kept).sum(-1) / (kept | true_kept).sum(-1)
    ends = counts[..., -1].ravel(), true_counts[..., -1].ravel()
    return {
        "kept": float(kept.mean()),
        "kept_live": float(true_kept.mean()),
        "count_gap": float((np.abs(counts - true_counts) / true_counts).mean()),
        "by_head": float(np.corrcoef(*ends)[0, 1]),
        "same_keys": float(same.mean()),
        "same_keys_least": float(same.min()),
        "other_fate": float((kept ^ true_kept).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a UTF-8 file; default: Python's language reference")
    parser.add_argument("--tokens", type=int, default=2048, help="how many tokens to read")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    arguments = parser.parse_args()
    words, name = text_from(arguments.text)
    model, tokenizer = cj.load()
    ids = encode(model, tokenizer, words, name, arguments.tokens)
    layers = list(record(model, ids))
    trace = Trace.from_qkv(*(np.stack([getattr(layer, part) for layer in layers]) for part in "qkv"))
    rows = []
    for spec in POLICIES:
        policy = cj.parse(spec)
        true = live(model, policy, ids)
        for fidelity in FIDELITIES:
            result = replay(trace, policy, fidelity=fidelity, errors=False)
            found = gap(result.live, result.until == FOREVER, *true)
            rows.append({"policy": spec, "replay": fidelity, "against": "live", **found})
    narrow = POLICIES[-1]
    exact = replay(trace, cj.parse(narrow), errors=False)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float16", "bfloat16"):
            trace.save(f"{folder}/{dtype}", dtype)
            rounded = replay(Trace.open(f"{folder}/{dtype}"), cj.parse(narrow), errors=False)
            found = gap(rounded.live, rounded.until == FOREVER, exact.live, exact.until == FOREVER)
            rows.append({"policy": narrow, "replay": dtype, "against": "float32", **found})
    print(f"SmolLM2-135M, {len(ids):,} tokens of {name}")
    print("| policy | replay | against | kept | kept there | count gap | by head | same keys (least) | other fate |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| `{row['policy']}` | {row['replay']} | {row['against']} | {row['kept']:.3f} | {row['kept_live']:.3f} "
            f"| {row['count_gap']:.2%} | {row['by_head']:.4f} | {row['same_keys']:.3f} ({row['same_keys_least']:.3f}) "
            f"| {row['other_fate']:.2%} |"
        )
    if arguments.json:
        write_json(arguments.json, {"text": name, "tokens": len(ids), "rows": rows})


if __name__ == "__main__":
    main()
