"""What a trained model attends to, and what becomes of it when keys are evicted. All of it on texts of others.

Of each text: how alike queries are by distance, before and after positions have entered; how sparse attention is; and
whether recent queries tell what the next ones find important (`corm_jax.evaluation.analysis`). Of each text, and of the
repeat test made of it: the NLL through the cache of CORM for each window w, of H2O and of a window, which hold as many
keys as CORM holds at the end of that text, on average over heads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import corm_jax as cj
from corm_jax.evaluation.analysis import DISTANCES, analyse
from corm_jax.runs.perplexity import read_text
from positions import data, rule, train

WINDOWS, RECENT = (64, 128, 256), 16
PASSAGE, SKIPPED = 96, 8
"""Tokens that are repeated, and how many of them are not counted, since the model cannot know yet that they are."""


def measure(
    model: cj.Transformer, texts: np.ndarray, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """All measures of a model, with the texts as the first axis of each."""
    found: dict[str, list] = {"attention": [], "text": [], "repeat": [], "rule": []}
    for index, (text, again) in enumerate(zip(texts, data.repeats(texts, PASSAGE), strict=True)):
        measured = analyse(model, text.tolist())
        names = ("sparsity", "coverage", "similarity")
        plain = cosines(unrotated(model, jnp.asarray(text)[None]))
        found["attention"].append({name: measured[name] for name in names} | {"plain": plain})
        found["rule"].append(rule.of_text(model, text.tolist()))
        found["text"].append(evicted(model, text, "text"))
        found["repeat"].append(evicted(model, again, "repeat"))
        progress(index + 1)
    return found


Row = dict[str, float]
COUNTED = {"text": slice(None), "repeat": slice(SKIPPED - PASSAGE, None)}
"""The tokens of each test whose NLL is counted."""


def read(model: cj.Transformer, policy: cj.Policy, text: np.ndarray, test: str) -> Row:
    """The mean NLL of the counted tokens, and the share of the keys that are live at the end."""
    reading = read_text(model, policy, text.tolist(), capacity=len(text))
    return {"nll": float(reading.nll[COUNTED[test]].mean()), "kept": float(reading.kept[-1])}


def corm(window: int) -> cj.Policy:
    """CORM as it is measured here."""
    return cj.Corm(window=window, recent=RECENT)


def evicted(model: cj.Transformer, text: np.ndarray, test: str) -> dict[str, Row]:
    """What `read` says of each policy."""
    results = {"full": read(model, cj.Full(), text, test)}
    for window in WINDOWS:
        results[f"corm {window}"] = read(model, corm(window), text, test)
        keys = max(round(results[f"corm {window}"]["kept"] * len(text)), 2)
        others = {"h2o": f"h2o:budget={keys},recent={keys // 2}", "window": f"window:size={keys}"}
        results |= {f"{name} {window}": read(model, cj.parse(spec), text, test) for name, spec in others.items()}
    return results


@jax.jit
def unrotated(model: cj.Transformer, tokens: jax.Array) -> list[jax.Array]:
    """The queries of each layer before positions have entered, ``[tokens, heads, head_dim]``."""
    found = []

    def attend(q, k, v, encoding=None):
        found.append(q[0])
        return train.dense(q, k, v, encoding)

    train.logits_of(model, tokens, attend=attend)
    return found


def cosines(queries: list[jax.Array]) -> list[list[float]]:
    """The mean cosine of queries by distance, ``[layers, distances]``."""
    unit = [np.asarray(q) / np.linalg.norm(q, axis=-1, keepdims=True) for q in queries]
    return [[float((u[d:] * u[:-d]).sum(-1).mean()) for d in DISTANCES if d < len(u)] for u in unit]


dense_nll = jax.jit(lambda model, tokens: train.nll(train.logits_of(model, tokens), tokens))


def watch(texts: np.ndarray, model: cj.Transformer) -> dict[str, float]:
    """How well a model in training predicts other texts, a passage at their beginning, and the same passage again."""
    nll = np.asarray(dense_nll(model, data.repeats(texts, PASSAGE)))
    return {
        "text": float(nll[:, : -PASSAGE - 1].mean()),
        "first": float(nll[:, SKIPPED : PASSAGE - 1].mean()),
        "again": float(nll[:, SKIPPED - PASSAGE :].mean()),
    }
