"""A window for each head of a model: the attention that each choice loses, against the keys that it keeps.

Heads differ in what they need. For each key-value head h and each choice o of CORM's (w, r), a replay of calibration
texts with the full cache's queries and keys gives

    live[o, h]  the share of the keys that are live at the end,
    lost[o, h]  the share of the full cache's attention that falls on keys that are gone, mean over queries.

Texts do not show what a head would need one day. Few heads look for what followed the last time that a token came up,
and these carry recall (induction heads; RazorAttention, arXiv 2407.15891, and DuoAttention, arXiv 2410.10819, keep
such heads whole). A probe finds them: random tokens, then the same again; ``probe[h]`` is the attention of a token's
second occurrence to the token after its first, which any window loses once it is over. With the price p of a key,

    choice[h]  =  argmin over o of  lost[o, h] + probe[h] (if o is a window) + p live[o, h]

and p is the lowest price at which the mean of live is at most the target (every choice on the lower convex hull is one
for some price, so that no other exchange of keys between heads gains at that size).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from corm_jax.errors import CormError
from corm_jax.model import Llama
from corm_jax.policies import Corm, Protect, protect
from corm_jax.profile import Profile
from corm_jax.recording import Recorded, record
from simulator.replay import sweep
from simulator.trace import Trace

WINDOWS, RECENTS, SINKS, GROUP = (16, 32, 64, 128, 256, 512), (32, 128, 256), 4, "mean"
CHOICES = [*product(WINDOWS, RECENTS), (None, 1)]
"""(w, r); the last keeps everything."""

CHUNK = 32
"""Tokens between evictions in replays."""

PROBE, SEEDS = 384, 3
"""Random tokens before they are repeated, and how many such texts."""

SHORTEST = 256


def calibrate(
    model: Llama,
    name: str,
    texts: Mapping[str, Sequence[int]],
    target: float,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> Profile:
    """The profile of a model at which a share of ``target`` of the texts' keys is live at their end.

    Args:
      name: what the model is called.
      texts: token ids by name, of one length.
      target: in (0, 1].
      seed: of the random tokens.
      progress: called with the name of what is read, or ``"probe"``, after each of its layers.

    Raises:
      CormError: for a target outside (0, 1], one that no choice is as small as, or texts too short.
    """
    if not 0 < target <= 1:
        raise CormError(f"the share of keys that stay must be in (0, 1], not {target}")
    if not texts or min(map(len, texts.values())) < SHORTEST:
        raise CormError(f"calibration takes texts of at least {SHORTEST} tokens: give more text, or more of each")

    def by_layer(of, text, ids):
        for one in record(model, ids):
            yield of(one)
            progress(text)

    rng = np.random.default_rng(seed)
    halves = [rng.integers(model.config.vocab, size=PROBE).tolist() for _ in range(SEEDS)]
    probe = np.mean([list(by_layer(induction, "probe", half + half)) for half in halves], axis=0)
    found = [np.stack(list(by_layer(measure, text, ids)), axis=2) for text, ids in texts.items()]
    live, lost = np.mean(found, axis=0)
    choice = choose(live, lost + np.where([[[w is None]] for w, _ in CHOICES], 0, probe), target)
    windows, recents = ([[CHOICES[o][i] for o in layer] for layer in choice.tolist()] for i in (0, 1))
    share = np.take_along_axis(live, choice[None], axis=0)[0]
    made: dict[str, Any] = {
        "target_live": target,
        "live": float(share.mean()),
        "texts": {text: len(ids) for text, ids in texts.items()},
        "seed": seed,
        "probe": probe.round(4).tolist(),
        "live_by_head": share.round(4).tolist(),
    }
    return Profile(model=name, window=windows, recent=recents, sinks=SINKS, group=GROUP, made=made)


def induction(one: Recorded) -> Float[np.ndarray, " kv_heads"]:
    """A layer's attention, on a text that says everything twice, to what followed the first time.

    Mean over the second half; of a group's query heads the one that looks most.
    """
    length, kv_heads, head_dim = one.k.shape
    half = length // 2
    q = one.q[half : length - 1].reshape(half - 1, kv_heads, -1, head_dim)
    logits = np.einsum("thgd,khd->hgtk", q, one.k) * head_dim**-0.5
    clock = np.arange(half, length - 1)[:, None]
    logits = np.where(np.arange(length) <= clock, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights[..., np.arange(half - 1), np.arange(1, half)].mean(-1).max(-1)


def measure(one: Recorded) -> Float[np.ndarray, "2 choices kv_heads"]:
    """What a layer keeps, and which share of its attention it loses, by choice and head."""
    trace = Trace.from_qkv(one.q[None], one.k[None], one.v[None])
    grid = {"window": list(WINDOWS), "recent": list(RECENTS)}
    result = sweep(trace, _corm, grid, chunk=CHUNK)
    kv_heads = one.k.shape[1]
    live = result.live[..., 0, :, -1].reshape(-1, kv_heads) / result.steps
    lost = 1 - result.mass[..., 0, :, :].mean(-1).reshape(len(live), kv_heads, -1).mean(-1)
    return np.stack([np.vstack([live, np.ones(kv_heads)]), np.vstack([lost, np.zeros(kv_heads)])])


def choose(
    live: Float[np.ndarray, "choices layers kv_heads"],
    cost: Float[np.ndarray, "choices layers kv_heads"],
    target: float,
) -> Int[np.ndarray, "layers kv_heads"]:
    """Which choice each head gets at the lowest price of a key at which a mean of ``target`` stays.

    Raises:
      CormError: for a target below what the cheapest choices keep.
    """

    def at(price: float):
        choice = (cost + price * live).argmin(0)
        return choice, np.take_along_axis(live, choice[None], axis=0).mean()

    least = live.min(0).mean()
    if least > target:
        raise CormError(
            f"no choice keeps as little as {target:g} of the keys: sinks and recent keys alone take {least:.3f} of "
            "such texts; ask for more, or calibrate on longer texts"
        )
    low, high = 1e-9, 1e6
    for _ in range(80):
        price = (low * high) ** 0.5
        low, high = (low, price) if at(price)[1] <= target else (price, high)
    return at(high)[0]


def _corm(window: int, recent: int) -> Protect:
    fields: dict[str, Any] = {"window": window, "recent": recent, "group": GROUP}
    return protect(Corm(**fields), sinks=SINKS)
