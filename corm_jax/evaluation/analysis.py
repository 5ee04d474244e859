"""The observations on which CORM is based (arXiv 2404.15949, section 3), measured on a model and a text.

Per layer, from queries and keys as attention uses them (rotated) with the full cache. Key i is important to query t if
alpha_t[i] >= 1/t for any query head of its group.

- *Attention is sparse*: the share of keys below 1/t.
- *Neighbouring queries are alike*: their cosine similarity by distance; and how well random projections estimate it
  (Charikar 2002): with b signs of random directions, of which m agree, cos(pi (1 - m / b)).
- *Recent queries predict importance*: the share of the keys important to query t that one of the w queries before t
  found important, or that are not older than w.
- *Keys that are kept*: the share of the keys that CORM has not evicted at the end, by w and r, if evictions changed
  no attention.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.core.arrays import broadcasts, iota
from corm_jax.errors import CormError
from corm_jax.model.decoder import Decoder, windows_of
from corm_jax.runs.forms import Written, written
from corm_jax.runs.recording import record

DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WINDOWS = (64, 128, 256, 512)
RECENTS = (16, 32, 64)
BITS = (16, 64, 256)
MEASURED = ("sparsity", "similarity", "coverage", "kept", "lsh_error")
ROWS = 128
"""Queries that are analysed at a time."""

FIRST = 64
"""Earlier queries are not counted, since they see few keys."""

SHORTEST = 2 * FIRST
"""The fewest tokens of a text."""


def analyse(
    model: Decoder, tokens: Sequence[int], progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Measures for each layer, as nested lists of which the first axis is the layers. Local layers are left out.

    Returns:
      ``sparsity [layers, heads]``; ``similarity [layers, distances]``; ``coverage [layers, windows]``;
      ``kept [layers, windows, recents]``; ``lsh_error [layers, bits]``; and the values along the axes: the numbers of
      the ``layers``, ``distances``, ``windows``, ``recents`` and ``bits``.

    Raises:
      CormError: for a text of less than 128 tokens, or a model without global layers.
    """
    if len(tokens) < SHORTEST:
        raise CormError(f"a text of {len(tokens)} tokens is too short: give at least {SHORTEST}")
    form = written(model, len(tokens))
    layers = [layer for layer, window in enumerate(windows_of(model.config)) if window is None]
    if not layers:
        raise CormError("all layers of this model are local: only attention to all earlier keys is analysed")
    found: dict[str, list] = {name: [] for name in MEASURED}
    for layer, one in enumerate(record(model, tokens, progress=progress)):
        if layer not in layers:
            continue
        sparsity, coverage, kept = _importance(one.q, one.k, form)
        similarity, errors = _similarity(one.q)
        for name, value in zip(found, (sparsity, similarity, coverage, kept, errors), strict=True):
            found[name].append(np.asarray(value, np.float64).tolist())
    distances = [distance for distance in DISTANCES if distance < len(tokens)]
    axes = {"layers": layers, "distances": distances, "windows": WINDOWS, "recents": RECENTS, "bits": BITS}
    return found | {name: list(values) for name, values in axes.items()}


def mean(every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of the measures of several texts."""
    return every[0] | {name: np.mean([found[name] for found in every], axis=0).tolist() for name in MEASURED}


def _importance(q: np.ndarray, k: np.ndarray, form: Written):
    """Sparsity by head; coverage by w; the share kept by w and r."""
    length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    slopes = np.asarray(form.slopes or [0.0] * heads, np.float32).reshape(kv_heads, -1)
    softcap = None if form.softcap is None else np.float32(form.softcap)
    grouped = np.zeros((-(-length // ROWS) * ROWS, kv_heads, heads // kv_heads, head_dim), np.float32)
    grouped[:length] = q.reshape(length, kv_heads, -1, head_dim)
    last = jnp.full((kv_heads, length), -(2**30), jnp.int32)
    evicted = jnp.zeros((len(WINDOWS), len(RECENTS), kv_heads, length), bool)
    state, sparse, covered, important = (last, evicted), np.zeros(heads), np.zeros(len(WINDOWS)), 0.0
    for start in range(0, length, ROWS):
        state, (below, hits, total) = _rows(state, grouped[start : start + ROWS], k, np.int32(start), slopes, softcap)
        sparse += np.asarray(below).reshape(-1)
        covered += np.asarray(hits)
        important += float(total)
    queries = length - FIRST
    return sparse / queries, covered / important, 1 - np.asarray(state[1]).mean((2, 3))


@jax.jit
@broadcasts
def _rows(state, q, k, start, slopes, softcap):
    """A block of queries against all keys: the state after them, and their contributions to the sums."""
    last, evicted = state
    length = k.shape[0]
    t, position = start + 1 + iota(ROWS)[:, None, None], 1 + iota(length)  # [rows, head, key]
    seen, real, scored = position <= t, t <= length, (t > FIRST) & (t <= length)
    logits = jnp.einsum("thgd,chd->thgc", q, k, precision="highest") * q.shape[-1] ** -0.5
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits - slopes[:, :, None] * (t - position)[:, :, None].astype(jnp.float32)
    alpha = jax.nn.softmax(jnp.where(seen[:, :, None], logits, -jnp.inf), axis=-1)
    least = 1 / t[..., None].astype(jnp.float32)
    below = ((alpha < least) & seen[:, :, None]).sum(-1, dtype=jnp.float32) / t.astype(jnp.float32)
    important = (alpha >= least).any(2) & seen & real
    latest = jax.lax.cummax(jnp.where(important, t, last), axis=0)
    before = jnp.concatenate([last[None], latest[:-1]])
    counts, hits = important & scored, []
    for window in WINDOWS:
        hits.append((counts & ((before >= t - window) | (position > t - window))).sum())
    for w, window in enumerate(WINDOWS):
        for r, recent in enumerate(RECENTS):
            evicts = (latest <= t - window) & (position <= t - recent) & (t >= window) & real
            evicted = evicted.at[w, r].set(evicted[w, r] | evicts.any(0))
    return (latest[-1], evicted), (jnp.where(scored, below, 0).sum(0), jnp.stack(hits), counts.sum())


def _similarity(q: np.ndarray):
    """Mean cosine of queries by distance, over heads; and the mean error of its estimate by the number of signs."""
    unit = q / np.maximum(np.linalg.norm(q, axis=-1, keepdims=True), 1e-9)
    distances = [distance for distance in DISTANCES if distance < len(q)]
    exact = [(unit[distance:] * unit[:-distance]).sum(-1) for distance in distances]
    errors = []
    for bits in BITS:
        directions = np.random.default_rng(0).normal(size=(q.shape[-1], bits)).astype(np.float32)
        signs = unit @ directions > 0
        guess = [np.cos(np.pi * (signs[d:] != signs[:-d]).mean(-1)) for d in distances]
        errors.append(np.mean([np.abs(g - e).mean() for g, e in zip(guess, exact, strict=True)]))
    return [one.mean() for one in exact], errors
