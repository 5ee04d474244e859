"""Compares the keys that our policies keep with those that NVIDIA's kvpress keeps, on SmolLM2 and the same prompt.

    pip install -e ".[test]" "kvpress==0.5.5"; python benchmarks/parity_kvpress.py [--text FILE] [--tokens 256]

kvpress 0.5.5 needs transformers below 5.3, so install it into an environment of its own. Both sides attend to the whole
prompt and evict once, at its end, so all layers can be compared. The keys that kvpress kept are read from the cache
that it returns: each key is searched, bit for bit, in a prefill without eviction. AdaKVPress evicts nothing: it masks
keys, and returns their positions.

The exit code is 1 if the definitions agree but a head keeps other keys, unless the scores that kvpress gives to the
exchanged keys differ by less than a relative 1e-4. With n tokens, a budget of B keys, a window of w, and L layers:

- Budgets. kvpress keeps ``int(n (1 - compression_ratio))`` keys a head. The ratio is set to 1 - (B + 1/2) / n here,
  which is B keys whatever the rounding. PyramidKVPress rounds to the nearest number; for it the ratio is 1 - B / n.
- StreamingLLM. Both keep the same keys: the first 4 and the newest B - 4.
- L2Norm and KnormPress. Both keep the same keys. In layer 0 the keys of equal tokens have equal norms, so that rounding
  may decide between them.
- TOVA. Both have the same scores: the attention of the last query, averaged over all query heads of the layer. But
  TOVAPress gives the last token the maximum + 1, so that it is kept (our ``recent=1``); in ours it may be evicted.
- SnapKV. Both keep the same keys with ``pool=mean``, the only pooling of SnapKVPress. Its defaults are w = 64, kernel
  5.
- AdaKV. Take the heads x (B - w) best keys of a layer that are older than the window; c_h of them are in head h. Ours
  keeps w + b_h keys of head h, where b_h = round((1 - floor) c_h + floor (B - w)), as in the paper. AdaKVPress keeps
  the ``int(alpha B)`` best keys of each head, among which it counts the window, and then the best keys of the layer. As
  long as alpha B <= w, this protects no other key: b_h = c_h. So both are the same with floor = alpha = 0; otherwise
  the heads with equally many keys are the same.
- PyramidKV. Ours keeps w + b_l keys in layer l, where b_l falls from 2 b - b // 20 to b // 20, with b = B - w.
  PyramidKVPress keeps ``round(high - l (high - low) / (L - 1))`` keys, among which it counts the window: low = B / 20,
  high = 2 B - low. (It moves both towards B if high > n - w; all layers get B if low < w.) Layers with equally many
  keys are the same.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from kvpress import AdaKVPress, KnormPress, PyramidKVPress, SnapKVPress, StreamingLLMPress, TOVAPress
from transformers import AutoModelForCausalLM, DynamicCache

import corm_jax as cj
from corm_jax.command.inputs import encode, text_from
from corm_jax.model import checkpoint, named

WINDOW, KERNEL, NEAR = 8, 5, 1e-4
PYRAMID_WINDOW = 3  # PyramidKVPress has a pyramid only if this is at most a 20th of the budget


def prefill(model, ids) -> list[torch.Tensor]:
    """The keys in the cache of transformers after a prompt, for each layer: ``[kv_heads, tokens, head_dim]``."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
    return [layer.keys[0] for layer in cache.layers]


def run_press(model, press, ids, full) -> tuple[np.ndarray, np.ndarray]:
    """Which keys a press kept of the ``full`` ones, and how it scored them: ``[layer, kv_heads, token]``."""
    scorer, heard = getattr(press, "press", press), []

    def record(*arguments):
        heard.append(type(scorer).score(scorer, *arguments))
        return heard[-1].clone()  # AdaKVPress writes into it

    scorer.score = record
    with press(model):
        pruned = prefill(model, ids)
    scores = torch.cat(heard).numpy()
    kept = np.ones(scores.shape, bool)
    for layer, (some, every) in enumerate(zip(pruned, full, strict=True)):
        if isinstance(press, AdaKVPress):
            _, head, position = model.model.layers[layer].self_attn.masked_key_indices
            kept[layer, head, position] = False
        else:
            same = (some[:, :, None] == every[:, None]).all(-1)
            assert (same.sum(-1) == 1).all(), "a key that kvpress returned is not exactly one of the keys of the prompt"
            kept[layer] = same.any(1)
    return kept, scores


def run_ours(model, policy, ids) -> np.ndarray:
    """Which keys our policy kept, ``[layer, kv_heads, token]``."""
    caches = cj.make_caches(model, policy, batch=1, capacity=len(ids))
    _, caches = cj.prefill(model, policy, caches, [ids], chunk=64)
    position = np.stack([np.asarray(cache.position[0]) for cache in caches])
    return (position[..., None] == np.arange(len(ids))).any(-2)


def widest_gap(ours, theirs, scores) -> float:
    """The largest relative difference between the scores of exchanged keys; infinite if rows keep different numbers."""
    gaps = [0.0 if (ours.sum(-1) == theirs.sum(-1)).all() else np.inf]
    for row, swapped in zip(scores, ours != theirs, strict=True):
        if swapped.any():
            gaps.append(np.ptp(row[swapped]) / np.abs(row[swapped]).max())
    return float(max(gaps))


@click.command()
@click.option("--text", type=click.Path(path_type=Path), help="a UTF-8 file  [default: Python's language reference]")
@click.option("--tokens", default=256, show_default=True, type=click.IntRange(min=128), help="tokens of the prompt")
def main(text, tokens):
    """Compare the keys that our policies keep with those that NVIDIA's kvpress keeps, as a table."""
    model, tokenizer = checkpoint.load()
    ids = encode(model, tokenizer, *text_from(text), tokens)
    path = named.model_file()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    full = prefill(theirs, ids)

    ratio = {budget: 1 - (budget + 0.5) / len(ids) for budget in (16, 64)}
    snap: dict[str, Any] = {"compression_ratio": ratio[64], "window_size": WINDOW, "kernel_size": KERNEL}
    pyramid = PyramidKVPress(1 - 64 / len(ids), window_size=PYRAMID_WINDOW, kernel_size=KERNEL)
    window = f"budget=64,kernel={KERNEL},pool=mean,window="
    cases = (  # ours, theirs, whether their definitions agree
        ("streaming_llm:budget=64,sinks=4,oneshot=true", StreamingLLMPress(ratio[64], n_sink=4), True),
        ("l2norm:budget=64,oneshot=true", KnormPress(ratio[64]), True),
        ("tova:budget=16,oneshot=true", TOVAPress(ratio[16]), False),
        ("tova:budget=16,recent=1,oneshot=true", TOVAPress(ratio[16]), True),
        (f"snapkv:{window}{WINDOW}", SnapKVPress(**snap), True),
        (f"adakv:{window}{WINDOW},floor=0", AdaKVPress(SnapKVPress(**snap), alpha_safeguard=0.0), True),
        (f"adakv:{window}{WINDOW},floor=0.2", AdaKVPress(SnapKVPress(**snap), alpha_safeguard=0.2), False),
        (f"snapkv:{window}{WINDOW}", AdaKVPress(SnapKVPress(**snap), alpha_safeguard=0.2), "their number of keys"),
        (f"pyramidkv:{window}{PYRAMID_WINDOW}", pyramid, False),
        (f"snapkv:{window}{PYRAMID_WINDOW}", pyramid, "their number of keys"),
    )
    print("| ours | kvpress | heads | must be equal | are equal | keys | ours alone | theirs alone | widest gap | |")
    print(f"|{'---|' * 10}")
    failed = False
    for spec, press, agree in cases:
        kept, scores = run_press(theirs, press, ids, full)
        policy = cj.parse(spec)
        if isinstance(agree, str):
            policy = [dataclasses.replace(policy, budget=row.astype(np.int32)) for row in kept.sum(-1)]
            spec = spec.replace("budget=64", f"budget=({agree})")
        mine = run_ours(model, policy, ids)
        alike = (mine == kept).all(-1)
        must = np.ones_like(alike)
        if not agree:  # only heads that keep as many keys, and keep or evict the last token alike
            must = (mine.sum(-1) == kept.sum(-1)) & (mine[..., -1] == kept[..., -1])
        rows = [x[must] for x in (mine, kept, scores)]
        if agree is True and isinstance(press, AdaKVPress):  # the heads of a layer compete
            rows = [x.reshape(len(x), -1) for x in (mine, kept, scores)]
        gap = widest_gap(*rows)
        failed |= gap > NEAR
        verdict = "DIFFERS" if gap > NEAR else "equal" if alike.all() else "near ties" if agree else "other definition"
        name = repr(press).replace(f"compression_ratio={press.compression_ratio}", "...")
        counts = [alike.size, must.sum(), alike.sum(), mine.sum(), (mine & ~kept).sum(), (kept & ~mine).sum()]
        print(f"| `{spec}` | `{name}` | {' | '.join(f'{n:,}' for n in counts)} | {gap:.0e} | {verdict} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
