"""A window for each head of a model: what each choice loses, against the keys that it keeps.

Heads differ in what they need. For each key-value head h and each choice o of CORM's (w, r), calibration texts give

    live[o, h]   the share of the keys that are live at the end,
    lost[o, h]   the share of the attention that falls on keys that are gone, mean over queries.

Texts hardly ask for what was read long ago. So a quarter of each is read once more, after the two that follow it:

    again[o, h]  the NLL that the second reading loses, nats a token, to first order:
                 sum over queries t of  G[t, h] . (o_live[t] - o_all[t])

with o the outputs read from the live keys and from all, and G their worth (`simulator.worth`). All three come from the
full cache's queries, keys and values; CORM judges by that attention. With the price p of a key,

    choice[h]  =  argmin over o of  lost[o, h] + RETURNS max(again[o, h], 0) + p live[o, h]

and p is the lowest price at which the mean of live is at most the target (every choice on the lower convex hull is one
for some price, so that no other exchange of keys between heads gains at that size). Few heads carry recall, as
RazorAttention (arXiv 2407.15891) and DuoAttention (arXiv 2410.10819) found; these come out with all of their keys, or
with wide windows.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from corm_jax.errors import CormError
from corm_jax.model import Llama
from corm_jax.profile import Profile
from corm_jax.recording import Recorded, record
from simulator.worth import worth

WINDOWS, RECENTS, SINKS, GROUP = (16, 32, 64, 128, 256, 512), (32, 128, 256, 512), 4, "mean"
CHOICES = [*product(WINDOWS, RECENTS), (None, 1)]
"""(w, r); the last keeps everything."""

CHUNK = 32
"""Tokens between evictions."""

RETURNS = 3.0
"""What a nat of a second reading weighs, in lost attention of a head."""

QUARTER, NODES = 256, 4
"""Tokens that are read again, at most, and gradients for their worth."""

SHORTEST = 256

NEVER = np.iinfo(np.int32).min


class Cost(NamedTuple):
    """By choice and head."""

    live: Float[np.ndarray, "choices kv_heads"]
    lost: Float[np.ndarray, "choices kv_heads"]
    again: Float[np.ndarray, "choices kv_heads"]


def calibrate(
    model: Llama,
    name: str,
    texts: Mapping[str, Sequence[int]],
    target: float,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> Profile:
    """The profile of a model at which a share of ``target`` of the texts' keys is live at their end.

    Args:
      name: what the model is called.
      texts: token ids by name, of one length.
      target: in (0, 1].
      progress: called with the name of what is read: `NODES` times, and then for each layer.

    Raises:
      CormError: for a target outside (0, 1], one that no choice is as small as, or texts too short.
    """
    if not 0 < target <= 1:
        raise CormError(f"the share of keys that stay must be in (0, 1], not {target}")
    if not texts or min(map(len, texts.values())) < SHORTEST:
        raise CormError(f"calibration takes texts of at least {SHORTEST} tokens: give more text, or more of each")

    costs = []
    for text, ids in texts.items():
        quarter = min(QUARTER, len(ids) // 4)
        twice = [*ids[: 3 * quarter], *ids[:quarter]]
        gradients = worth(model, twice, 3 * quarter, NODES, progress=lambda text=text: progress(text))
        by_layer = []
        for once, second, gradient in zip(record(model, ids), record(model, twice), gradients, strict=True):
            by_layer.append(measure(once)._replace(again=measure(second, gradient).again))
            progress(text)
        costs.append(jax.tree.map(lambda *layers: np.stack(layers, axis=1), *by_layer))
    live, lost, again = jax.tree.map(lambda *each: np.mean(each, axis=0), *costs)
    choice = choose(live, lost + RETURNS * np.maximum(again, 0), target)
    windows, recents = ([[CHOICES[o][i] for o in layer] for layer in choice.tolist()] for i in (0, 1))
    live, lost = (np.take_along_axis(x, choice[None], axis=0)[0] for x in (live, lost))
    made: dict[str, Any] = {
        "target_live": target,
        "live": float(live.mean()),
        "lost": float(lost.mean()),
        "texts": {text: len(ids) for text, ids in texts.items()},
        "live_by_head": live.round(4).tolist(),
        "again_by_head": again[0].round(4).tolist(),
    }
    return Profile(model=name, window=windows, recent=recents, sinks=SINKS, group=GROUP, made=made)


def measure(one: Recorded, gradient: Float[np.ndarray, "tokens kv_heads group head_dim"] | None = None) -> Cost:
    """What a layer keeps, loses, and loses by ``gradient``, for each choice; without a gradient ``again`` is 0."""
    window, recent = np.array(CHOICES[:-1], np.int32).T
    tokens, kv_heads, head_dim = one.k.shape
    q = one.q.reshape(tokens, kv_heads, -1, head_dim)
    gradient = np.zeros_like(q) if gradient is None else gradient
    padding = -tokens % CHUNK
    q, k, v, gradient = (np.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))) for x in (q, one.k, one.v, gradient))
    found = _measure(window, recent, q, k, v, gradient, np.int32(tokens))
    whole = np.array([1, 0, 0], np.float32)[:, None, None].repeat(kv_heads, 2)
    return Cost(*np.concatenate([np.stack(found), whole], axis=1))


@jax.jit
def _measure(window, recent, q, k, v, gradient, tokens):
    """Every choice beside the others; keys that went are dates only, as in `simulator.recurrence`."""
    chunks, (kv_heads, group, head_dim) = len(q) // CHUNK, q.shape[1:]
    key, (w, r) = jnp.arange(len(q)), (x[:, None, None] for x in (window, recent))

    def step(carry, chunk):
        last, gone, lost, again = carry
        q, gradient, clock = chunk
        logits = jnp.einsum("qhgd,khd->hgqk", q, k, precision="highest") * head_dim**-0.5
        alpha = jax.nn.softmax(jnp.where(key < clock[:, None], logits, -jnp.inf))
        alpha = jnp.where(clock[:, None] <= tokens, alpha, 0.0)
        stays = (~gone).astype(jnp.float32)
        share = jnp.einsum("hgqk,ohk->ohgq", alpha, stays)
        gain = alpha * jnp.einsum("qhgd,khd->hgqk", gradient, v, precision="highest")
        rest = jnp.einsum("hgqk,ohk->ohgq", gain, stays) / jnp.maximum(share, 1e-30)
        lost += jnp.where(clock <= tokens, 1 - share, 0.0).sum((2, 3))
        again += jnp.where(clock <= tokens, rest - gain.sum(-1), 0.0).sum((2, 3))
        important = alpha.mean(1) * clock[:, None].astype(jnp.float32) >= 1
        last = jnp.maximum(last, jnp.where(important, clock[:, None], NEVER).max(1))
        seen = jnp.minimum(clock[-1], tokens)
        minor = (last <= seen - w) & (key < seen - r) & (key >= SINKS) & (seen >= w)
        return (last, gone | minor, lost, again), None

    sums = jnp.zeros((len(window), kv_heads), jnp.float32)
    start = jnp.full((kv_heads, len(q)), NEVER), jnp.zeros((len(window), kv_heads, len(q)), bool), sums, sums
    parts = (x.reshape(chunks, CHUNK, *x.shape[1:]) for x in (q, gradient, key + 1))
    (_, gone, lost, again), _ = jax.lax.scan(step, start, tuple(parts))
    live = (~gone & (key < tokens)).sum(-1).astype(jnp.float32) / tokens.astype(jnp.float32)
    return live, lost / (tokens * group).astype(jnp.float32), again


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
