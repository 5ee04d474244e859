"""Calibration: a window for each head of a model, chosen by what is lost and how many keys are kept.

Heads need different numbers of keys. A choice c is one of CORM's (w, r, m), with which a key is important at
alpha >= m/t. For each choice c and key-value head h, the texts give three numbers:

    live[c, h]     the share of the keys that are live when the text ends,
    blurred[c, h]  the KL divergence of the prediction from that of the full cache, nats a token, to second order:
                   mean over queries t of  (s[t, h] . (o_live[t] - o_all[t]))^2 / 2
    again[c, h]    the NLL that is lost when the beginning of the text is read again, nats a token, to first order:
                   sum over the queries t of this second reading of  G[t, h] . (o_live[t] - o_all[t])

Here o_live and o_all are the head's outputs over the live keys and over all keys, s are their scores, and G is their
worth (`corm_jax.runs.worth`). The third number is there because texts hardly depend on what was read long ago. G is
measured on a shorter text with the second reading sooner after the first, since the worth of an output hardly depends
on how long ago its keys were read. All three are computed from the queries, keys and values of the full cache; as in a
cache, CORM decides by the attention over the keys that it kept. With a price p of a key,

    choice[h]  =  argmin over c of  blurred[c, h] + RETURNS max(again[c, h], 0) + p live[c, h]

where p is the lowest price at which the mean of live is at most the target. (Each choice on the lower convex hull is
the best one at some price. So at this size no exchange of keys between heads lowers the loss.) Few heads carry recall,
as RazorAttention (arXiv 2407.15891) and DuoAttention (arXiv 2410.10819) found; they get all of their keys, or wide
windows.

A layer with a sliding window holds what the window shows. So only the heads of global layers are measured, and live and
the target are theirs.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from corm_jax.core.arrays import broadcasts, iota
from corm_jax.errors import CormError
from corm_jax.files import check_writable, whole_file
from corm_jax.model.decoder import Decoder, windows_of
from corm_jax.policies.corm import NEVER
from corm_jax.policies.profile import Profile
from corm_jax.runs.recording import Recorded, record
from corm_jax.runs.worth import scores, worth

WINDOWS, RECENTS, MULTIPLES, SINKS, GROUP = range(4, 11), (32, 128, 512, 1024), range(7), 4, "mean"
CHOICES = [(2**w, r, 2**m) for w, r, m in product(WINDOWS, RECENTS, MULTIPLES) if (w + m) % 2 == 0] + [(None, 1, 1)]
"""The choices (w, r, m): w and m are powers of two, and every other pair of them is used. The last keeps all keys."""

CHUNK = 32
"""Tokens between two evictions."""

RETURNS = 0.003
"""The weight of a nat that the second reading loses, against a nat that the first reading loses."""

AGAIN, NODES = 256, 4
"""How many tokens are read again, and at how many values of g their worth is measured."""

SHORTEST = 256
"""The fewest tokens of a text."""

SEGMENTS = 4
"""The parts in which a text is read. The queries of a part are multiplied with the keys up to its end only."""


class Cost(NamedTuple):
    """What each choice keeps and loses in each head of the global layers: the numbers at the top of this file."""

    live: Float[np.ndarray, "choices *layers kv_heads"]
    blurred: Float[np.ndarray, "choices *layers kv_heads"]
    again: Float[np.ndarray, "choices *layers kv_heads"]

    @property
    def loss(self) -> Float[np.ndarray, "choices *layers kv_heads"]:
        """The loss of each choice, to which the price of its keys is added: blurred + RETURNS max(again, 0)."""
        return self.blurred + RETURNS * np.maximum(self.again, 0)


def chosen(
    values: Float[np.ndarray, "choices *heads"], choice: Int[np.ndarray, "*heads"]
) -> Float[np.ndarray, "*heads"]:
    """The value of each head at the choice that it has."""
    return np.take_along_axis(values, choice[None], axis=0)[0]


def calibrate(
    model: Decoder,
    name: str,
    texts: Mapping[str, Sequence[int]],
    target: float,
    *,
    begin: int = 0,
    seed: int = 0,
    work: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Profile:
    """The profile of a model with which a share of ``target`` of the keys is live when the texts end.

    Args:
      name: the name of the model.
      texts: the token ids of each text by its name, all texts of one length.
      target: in (0, 1].
      begin: how many ids at the beginning of each text the tokenizer put there. They are not read again.
      seed: of the tokens that are drawn from predictions, for `corm_jax.runs.worth.scores`.
      work: a directory for the measurements of each text, from which a later call goes on.
      progress: called with the name of a text, `NODES` + 1 times and then once for each layer.

    Raises:
      CormError: for a target outside (0, 1] or below what every choice keeps, and for texts that are too short.
    """
    if not 0 < target <= 1:
        raise CormError(f"the share of keys that stay must be in (0, 1], not {target}")
    windows = windows_of(model.config)
    if None not in windows:
        raise CormError("the model has local layers only, which hold what their windows show: nothing to calibrate")
    cost = mean(costs(model, texts, begin=begin, seed=seed, work=work, progress=progress))
    choice = choose(cost.live, cost.loss, target)
    made = {"target_live": target, "texts": {text: len(ids) for text, ids in texts.items()}, "seed": seed}
    return profile(name, choice, cost, made, windows)


def profile(
    name: str,
    choice: Int[np.ndarray, "layers kv_heads"],
    cost: Cost,
    made: dict[str, Any],
    windows: Sequence[int | None] = (),
) -> Profile:
    """The profile with these choices for the global layers, which also holds what they keep and lose.

    Args:
      windows: of the layers of the model. A local layer gets a row that keeps everything; it has no effect.
    """
    windows = windows or (None,) * len(choice)
    live, blurred = (chosen(x, choice) for x in (cost.live, cost.blurred))
    made |= {"live": float(live.mean()), "blurred": float(blurred.sum())}
    everything = (choice, len(CHOICES) - 1), (live, 1), (cost.again[0], 0)
    choice, live, again = (_beside_local(rows, windows, value) for rows, value in everything)
    of_window, recents, multiples = ([[CHOICES[o][i] for o in layer] for layer in choice.tolist()] for i in range(3))
    rounded = [[[round(value, 4) for value in layer] for layer in x.tolist()] for x in (live, again)]
    made |= dict(zip(("live_by_head", "again_by_head"), rounded, strict=True))
    numbers: dict[str, Any] = {"window": of_window, "recent": recents, "multiple": multiples}
    return Profile(model=name, **numbers, sinks=SINKS, group=GROUP, made=made)


def _beside_local(rows: np.ndarray, windows: Sequence[int | None], value: int) -> np.ndarray:
    """Rows for all layers, from those of the global layers and one value for local ones."""
    found = np.full((len(windows), rows.shape[1]), value, rows.dtype)
    found[[window is None for window in windows]] = rows
    return found


def costs(
    model: Decoder,
    texts: Mapping[str, Sequence[int]],
    *,
    begin: int = 0,
    seed: int = 0,
    again: int = AGAIN,
    work: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Cost]:
    """What each choice keeps and loses on each text, as arrays ``[choices, global layers, kv_heads]``: see `calibrate`.

    Args:
      begin: as in `calibrate`.
      again: how many tokens are read again; but at most a quarter of the text.
    """
    if not texts or min(map(len, texts.values())) < SHORTEST:
        raise CormError(
            f"calibration needs texts of at least {SHORTEST} tokens: give longer texts, or read more tokens of each"
        )
    if not 0 <= seed < 2**32:
        raise CormError(f"the seed must be from 0 to {2**32 - 1}, not {seed}")
    found = []
    for text, ids in texts.items():
        second = ids[begin : begin + min(again, len(ids) // 4)]
        file = work / f"{_digest(model, ids, seed, second)}.safetensors" if work else None
        if file:
            check_writable(file)
        cost = _load(file, model)
        if cost is None:
            cost = _costs(model, ids, seed, second, partial(progress, text))
            if not all(np.isfinite(values).all() for values in cost):
                raise CormError(
                    f"what was measured on {text!r} is NaN or infinite: are the weights sound in this dtype?"
                )
            if file:
                _save(file, cost)
        found.append(cost)
    return found


def mean(several: Sequence[Cost]) -> Cost:
    """The mean of the costs over texts."""
    return jax.tree.map(lambda *each: np.mean(each, axis=0), *several)


def _costs(model: Decoder, ids: Sequence[int], seed: int, second: Sequence[int], progress: Callable[[], None]) -> Cost:
    again = len(second)
    worths = worth(model, [*ids[: 3 * again], *second], 3 * again, NODES, progress=progress)
    drawn = scores(model, ids, seed)
    progress()
    found, each = [], zip(windows_of(model.config), record(model, [*ids, *second]), drawn, worths, strict=True)
    for window, one, score, worth_ in each:
        if window is None:
            found.append(measure(one, score, worth_[-again:]))
        progress()
    return Cost(*(np.stack(layers, axis=1) for layers in zip(*found, strict=True)))


def measure(
    one: Recorded,
    score: Float[np.ndarray, "tokens kv_heads group head_dim"],
    worth: Float[np.ndarray, "again kv_heads group head_dim"],
) -> Cost:
    """What each choice keeps and loses in a layer, on a text of ``tokens``, the first ``again`` of which come twice."""
    window, recent, multiple = (np.array(x) for x in zip(*CHOICES[:-1], strict=True))
    window, recent, multiple = window.astype(np.int32), recent.astype(np.int32), multiple.astype(np.float32)
    kv_heads, head_dim = one.k.shape[1:]
    q, gradient = one.q.reshape(len(one.q), kv_heads, -1, head_dim), np.concatenate([score, worth])
    padding = -len(q) % CHUNK
    q, k, v, gradient = (np.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))) for x in (q, one.k, one.v, gradient))
    found = _measure(window, recent, multiple, q, k, v, gradient, np.int32(len(score)), np.int32(len(one.q)))
    whole = np.array([1, 0, 0], np.float32)[:, None, None].repeat(kv_heads, 2)
    return Cost(*np.concatenate([np.stack(found), whole], axis=1))


@jax.jit
@broadcasts
def _measure(window, recent, multiple, q, k, v, gradient, tokens, end):
    """All choices at once. No key is moved: each choice has the ``last`` of every key, and whether it is evicted."""
    kv_heads, group, head_dim = q.shape[1:]
    w, r, m = (x[:, None, None] for x in (window, recent, multiple))

    def step(k, v, carry, chunk):
        key = iota(len(k))
        last, gone, live, blurred, again = carry
        q, gradient, clock = chunk
        logits = jnp.einsum("qhgd,khd->hgqk", q, k, precision="highest") * head_dim**-0.5
        alpha = jax.nn.softmax(jnp.where(key < clock[:, None], logits, -jnp.inf))
        alpha = jnp.where(clock[:, None] <= end, alpha, 0.0)
        stays = (~gone).astype(jnp.float32)
        share = jnp.maximum(jnp.einsum("hgqk,ohk->ohgq", alpha, stays, precision="highest"), 1e-30)
        gain = alpha * jnp.einsum("qhgd,khd->hgqk", gradient, v, precision="highest")
        rest = jnp.einsum("hgqk,ohk->ohgq", gain, stays, precision="highest") / share
        change = (rest - gain.sum(-1)).sum(2)
        blurred += jnp.where(clock <= tokens, change**2 / 2, 0.0).sum(-1)
        again += jnp.where((clock > tokens) & (clock <= end), change, 0.0).sum(-1)
        scale = clock.astype(jnp.float32) / share / group

        # One query after the other, so that the last one that found a key important counts.
        def record_importance(i, last):
            ratio = sum(alpha[:, member, i] * scale[:, :, member, i, None] for member in range(group))
            return jnp.where(ratio >= m, clock[i], last)

        last = jax.lax.fori_loop(0, CHUNK, record_importance, last)
        seen = jnp.minimum(clock[-1], end)
        gone |= (last <= seen - w) & (key < seen - r) & (key >= SINKS) & (seen >= w)
        live = jnp.where(clock[0] <= tokens, (~gone & (key < tokens)).sum(-1, dtype=jnp.int32), live)
        return (last, gone, live, blurred, again), None

    shape, sums = (len(window), kv_heads), jnp.zeros((len(window), kv_heads), jnp.float32)
    carry = jnp.zeros((*shape, 0), jnp.int32), jnp.zeros((*shape, 0), bool), sums.astype(jnp.int32), sums, sums
    parts = tuple(x.reshape(-1, CHUNK, *x.shape[1:]) for x in (q, gradient, 1 + iota(len(q))))
    for part in np.array_split(np.arange(len(q) // CHUNK), SEGMENTS):
        if part.size:
            extent = (part[-1] + 1) * CHUNK
            new = [(0, 0), (0, 0), (0, extent - carry[0].shape[-1])]
            last, gone = jnp.pad(carry[0], new, constant_values=NEVER), jnp.pad(carry[1], new)
            chunks = (x[part[0] : part[-1] + 1] for x in parts)
            carry, _ = jax.lax.scan(partial(step, k[:extent], v[:extent]), (last, gone, *carry[2:]), tuple(chunks))
    _, _, live, blurred, again = carry
    return live.astype(jnp.float32) / tokens.astype(jnp.float32), blurred / tokens.astype(jnp.float32), again


def choose(
    live: Float[np.ndarray, "choices layers kv_heads"],
    cost: Float[np.ndarray, "choices layers kv_heads"],
    target: float,
) -> Int[np.ndarray, "layers kv_heads"]:
    """The choice of each head, at the lowest price of a key at which a share of at most ``target`` stays.

    Raises:
      CormError: if even the choices that keep the fewest keys keep more than the target.
    """

    def at(price: float):
        choice = (cost + price * live).argmin(0)
        return choice, chosen(live, choice).mean()

    least = live.min(0).mean()
    if least > target:
        raise CormError(
            f"no choice keeps as little as {target:g} of the keys: the least on these texts is {least:.3f}, "
            "since sinks and recent keys always stay; choose a higher target, or calibrate on longer texts"
        )
    low, high = 1e-9, 1e6
    for _ in range(80):
        price = (low * high) ** 0.5
        low, high = (low, price) if at(price)[1] <= target else (price, high)
    return at(high)[0]


def _digest(model: Decoder, ids: Sequence[int], seed: int, second: Sequence[int]) -> str:
    """The name of the file with the costs of a text: a checksum of all that they depend on."""
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(model):
        weights.update(np.asarray(leaf).tobytes())
    said = [weights.hexdigest(), list(ids), list(second), seed, CHOICES, SINKS, CHUNK, NODES]
    said += [windows_of(model.config)] * any(windows_of(model.config))
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _save(file: Path, cost: Cost) -> None:
    """Writes costs into a file. Several processes may do so in one directory, since equal names mean equal content."""
    try:
        with whole_file(file) as temporary:
            save_file(cost._asdict(), temporary)
    except (OSError, SafetensorError) as error:
        raise CormError(f"cannot write {file}: {error}: make room, or choose another --work") from None


def _load(file: Path | None, model: Decoder) -> Cost | None:
    """The costs in a file; None if there is no file.

    Raises:
      CormError: if the file holds anything else.
    """
    if file is None or not file.exists():
        return None
    shape = len(CHOICES), windows_of(model.config).count(None), model.config.kv_heads
    try:
        cost = Cost(**load_file(file))
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CormError(f"{file} does not hold the measurements of a text: delete it ({reason})") from None
    for name, values in cost._asdict().items():
        if values.shape != shape or values.dtype != np.float32 or not np.isfinite(values).all():
            raise CormError(f"{file} does not hold the measurements of a text: delete it ({name} is not as expected)")
    return cost
