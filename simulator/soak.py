"""A soak: random policies on random histories, compared with the specification decision for decision.

A decision is about one key of one head, live or new, in one step: the key is kept, evicted, or lost for lack of a slot.
The specification in NumPy makes it; the cache (`corm_jax.make_cache` and `corm_jax.step`, in a rectangle or a pool, a
batch at a time under `jax.vmap`) and `simulator.replay` have to make the same. A pool with few slots is not replayed,
since a replay has slots for each head alone; nor are pieces of several sizes.

A case depends on the seed and its index alone. `BATCH` consecutive cases share their compiled programs: one policy with
the same choices, wrappers, layout and slots, but different numbers and histories.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.core.cache import make_cache
from corm_jax.core.capacity import per_layer
from corm_jax.core.prompt import begin_prompt
from corm_jax.core.step import step
from corm_jax.core.types import CacheSpec
from corm_jax.policies import POLICIES, Budget, Oneshot, Protect, budget
from corm_jax.policies.budget import has_own_budget
from corm_jax.traces.trace import Trace
from simulator import invariants
from simulator.held import by_head
from simulator.invariants import CLOSE, InvariantError
from simulator.reference import Reading
from simulator.replay import replay
from simulator.specification import readings

BATCH = 16
TOKENS, LEAST, CHUNK = 32, 8, 3
"""The most and the fewest tokens of a history, and the most that are read at once."""

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 2, 4, 2, 4
TIGHT, ROOMY = 12, TOKENS + CHUNK
"""Slots a head: so few that keys are lost, unless the policy keeps few; and so many that no key is lost."""

RANGES = {
    "window": (1, 6), "recent": (1, 4), "multiple": (1, 3), "patience": (1, 5), "trial": (0, 8), "sinks": (0, 2),
    "seed": (0, 2**16), "size": (1, 8),
}  # fmt: skip
"""The least and the largest whole number that is drawn, by the name of the option."""


RANKERS = ("full", "streaming_llm", "h2o", "tova", "l2norm", "random")
"""Policies that evict nothing by themselves."""


class Variant(NamedTuple):
    """The part that the cases of a batch have in common.

    Attributes:
      name: the name of the policy, as in `corm_jax.POLICIES`.
      choices: its static options.
      wrapped: "", or "budget" for `Budget` around `Protect`, or "oneshot" for `Oneshot` around both. A policy that
        has its own budget gets a share for it instead of `Budget`.
      per_head: whether each number differs by head and layer.
      slots: `TIGHT` or `ROOMY`.
    """

    name: str
    choices: dict[str, Any]
    wrapped: str
    per_head: bool
    slots: int


def variants() -> list[Variant]:
    """All variants: the first of every policy, then the second, and so on."""
    of = {
        "full": [({}, ""), ({}, "budget")],
        "corm": [
            ({"threshold": "position", "group": "any"}, ""),
            ({"threshold": "live", "group": "mean"}, "budget"),
            ({"threshold": "position", "group": "mean"}, ""),
            ({"threshold": "live", "group": "any"}, "oneshot"),
        ],
        "adaptive_corm": [({}, ""), ({}, "budget")],
        "streaming_llm": [({}, "budget"), ({}, "")],
        "window": [({}, ""), ({}, "budget"), ({}, "oneshot")],
        "h2o": [({"attention": "sum"}, "budget"), ({"attention": "mean"}, ""), ({"attention": "mean"}, "oneshot")],
        "scissorhands": [({"window": 5}, ""), ({"window": 40}, "budget")],
        "tova": [({}, "budget"), ({}, "oneshot"), ({}, "")],
        "snapkv": [
            ({"kernel": 3, "pool": "max"}, ""),
            ({"kernel": 1, "pool": "max"}, "budget"),
            ({"kernel": 5, "pool": "mean"}, ""),
        ],
        "pyramidkv": [({"kernel": 1, "pool": "max"}, ""), ({"kernel": 3, "pool": "mean"}, "budget")],
        "adakv": [({"kernel": 3, "pool": "max"}, ""), ({"kernel": 1, "pool": "mean"}, "")],
        "l2norm": [({}, "budget"), ({}, "oneshot")],
        "random": [({}, "budget"), ({}, "")],
    }
    found = []
    for name in POLICIES:
        for turn, (choices, wrapped) in enumerate(of[name]):
            ranks_alone = not wrapped and name in RANKERS  # and evicts nothing where there is room
            slots = TIGHT if ranks_alone or turn % 2 == (wrapped != "budget") else ROOMY
            found.append((turn, Variant(name, choices, wrapped, turn % 2 == 1, slots)))
    return [variant for _, variant in sorted(found, key=lambda one: one[0])]


VARIANTS = variants()


class Case(NamedTuple):
    """One policy on one history of one layer.

    Attributes:
      index: the number of the case, see `case`.
      policy: the policy of a model of `LAYERS` layers.
      layer: the layer in which it is tried.
      q: float32 ``[tokens, kv_heads, group, head_dim]``.
      k, v: float32 ``[tokens, kv_heads, head_dim]``.
      counts: int ``[TOKENS]``, tokens read in each step.
      chunk: the tokens of each step, if they are the same in all steps but the last; None otherwise.
      prompt: how many of the tokens are the prompt.
      slots: slots a head.
      stores: how many sets of slots the heads share; None if each has its own.
    """

    index: int
    policy: Any
    layer: int
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    counts: np.ndarray
    chunk: int | None
    prompt: int
    slots: int
    stores: int | None

    @property
    def here(self) -> Any:
        """The policy of the layer."""
        return per_layer(self.policy, LAYERS)[self.layer]

    @property
    def capacity(self) -> int | None:
        """Slots a head if there may be too few; None otherwise."""
        return None if self.slots == ROOMY else self.slots


class Tally(NamedTuple):
    """The result of a few cases of one policy.

    Attributes:
      policy: the name of the policy.
      index: the index of the case after them.
      cases: how many were compared.
      decisions: how many decisions these are; evicted, lost: in how many of them the key was evicted or lost.
      left_out: how many cases were not compared, since rounding can change a decision in them.
      differences: one line for each case that differs from the specification.
    """

    policy: str
    index: int
    cases: int
    decisions: int
    evicted: int
    lost: int
    left_out: int
    differences: tuple[str, ...]


COUNTS = ("cases", "decisions", "evicted", "lost", "left_out")
"""The numbers in a `Tally`."""


def soak(seed: int = 0, start: int = 0, cases: int | None = None) -> Iterator[Tally]:
    """Tries case after case, without end or ``cases`` in all, and yields the result of each batch.

    >>> first = next(soak(seed=0, cases=2))
    >>> first.policy, first.index, first.cases + first.left_out, len(first.differences)
    ('full', 2, 2, 0)
    """
    end = np.inf if cases is None else start + cases
    while start < end:
        stop = int(min((start // BATCH + 1) * BATCH, end))
        yield _tally([case(seed, index) for index in range(start, stop)])
        start = stop


def case(seed: int, index: int) -> Case:
    """The case with this index. The part that its batch has in common follows from the index; the rest is drawn."""
    turn, which = divmod(index // BATCH, len(VARIANTS))
    variant, stores = VARIANTS[which], (None, 1, 2)[(turn + which) % 3]
    chunk = (1, CHUNK, None)[(turn // 3 + which) % 3]
    rng = np.random.default_rng([seed, index])
    policy, layer = _policy(variant, rng), int(rng.integers(LAYERS))
    tokens = int(rng.integers(LEAST, TOKENS, endpoint=True))
    pieces = [chunk] * TOKENS if chunk else rng.integers(0, CHUNK, TOKENS, endpoint=True).tolist()
    counts = np.diff(np.minimum(np.cumsum([0, *pieces]), tokens))
    tokens = int(counts.sum())
    shapes = (tokens, KV_HEADS, GROUP, HEAD_DIM), (tokens, KV_HEADS, HEAD_DIM)
    if rng.random() < 0.5:  # small whole numbers, so that many logits are exactly equal
        q, k = (
            rng.integers(-peak, peak + 1, shape) for peak, shape in zip((rng.integers(0, 5), 2), shapes, strict=True)
        )
    else:
        q, k = (rng.normal(size=shape) for shape in shapes)
        q *= rng.choice([0.5, 2, 6])
    if stores:  # no ties between heads: their numbers are sums in different orders
        q = q * (1 + np.arange(KV_HEADS)[:, None, None] / 16)
    q, k, v = (x.astype(np.float32) for x in (q, k, rng.normal(size=k.shape)))
    prompt = int(rng.integers(1, tokens, endpoint=True))
    return Case(index, policy, layer, q, k, v, counts, chunk, prompt, variant.slots, stores)


def _policy(variant: Variant, rng: np.random.Generator) -> Any:
    """A policy with numbers drawn at random, small enough for something to happen."""
    shape = (LAYERS, KV_HEADS) if variant.per_head else ()

    def whole(low: int, high: int) -> Any:
        drawn = rng.integers(low, high, shape, endpoint=True)
        return drawn if shape else int(drawn)

    def share(low: int) -> Any:  # by the hundredth
        return whole(low, 100) / 100

    kind = POLICIES[variant.name]
    names = kind.__dataclass_fields__.keys() - variant.choices
    numbers: dict[str, Any] = {name: whole(*RANGES[name]) for name in sorted(names & RANGES.keys())}
    if "eager" in names:
        numbers["eager"] = whole(0, 1) == 1
    if "drop" in names:
        numbers |= {"drop": share(5), "budget": numbers["recent"] + whole(1, 6)}
    if "kernel" in variant.choices:  # SnapKV and those like it
        numbers["budget"] = numbers["window"] + whole(1, 6)
    if "floor" in names:
        numbers["floor"] = share(0)
    policy = kind(**variant.choices, **numbers)
    if variant.wrapped:
        policy = Protect(policy=policy, sinks=whole(0, 2), recent=whole(0, 2))
        if has_own_budget(policy):
            policy = budget(policy, whole(100, 800) / 1000)
        else:
            absolute, none = rng.random() < 0.5, whole(0, 0)
            tokens, per_mille = (policy.traits.protected + whole(1, 6), none) if absolute else (none, whole(100, 800))
            policy = Budget(policy=policy, tokens=tokens, per_mille=per_mille)
    return Oneshot(policy=policy) if variant.wrapped == "oneshot" else policy


def summary(tallies: Sequence[Tally]) -> list[dict[str, Any]]:
    """A row for each policy, and one for all of them."""
    rows = []
    for name in (*POLICIES, "all"):
        some = [tally for tally in tallies if name in ("all", tally.policy)]
        if some:
            counts = {field: sum(getattr(tally, field) for tally in some) for field in COUNTS}
            rows.append({"policy": name, **counts, "differences": sum(len(tally.differences) for tally in some)})
    return rows


def _tally(cases: list[Case]) -> Tally:
    name = VARIANTS[cases[0].index // BATCH % len(VARIANTS)].name
    numbers, left_out, differences, cached = np.zeros(3, int), 0, [], _or_error(_cached, cases)
    for row, one in enumerate(cases):
        expected = _or_error(_specified, one)
        if isinstance(expected, list):
            if min(reading.margin for reading in expected) <= CLOSE:
                left_out += 1
                continue
            numbers += _count(one, expected)
        try:
            for account, found in (("the specification", expected), ("cache", cached)):
                if isinstance(found, Exception):
                    raise InvariantError(account, f"{type(found).__name__}: {found}") from found
            _compare("cache", one, expected, *cached[row])
            if one.chunk and not (one.stores and one.capacity):
                _compare("replay", one, expected, *_replayed(one))
        except Exception as error:
            kind = "" if isinstance(error, InvariantError) else f"replay: {type(error).__name__}: "
            what = " ".join(f"{kind}{error}".replace("layer 0, ", "").split())
            differences.append(f"case {one.index}, {one.here} of {name}, {_where(one)}: {what}")
    decisions, evicted, lost = numbers.tolist()
    following, compared = cases[-1].index + 1, len(cases) - left_out
    return Tally(name, following, compared, decisions, evicted, lost, left_out, tuple(differences))


def _or_error(function: Callable[[Any], Any], argument: Any) -> Any:
    """The result of a function, or the error that it raises, which is a finding too and does not end the soak."""
    try:
        return function(argument)
    except Exception as error:
        return error


def _specified(one: Case) -> list[Reading]:
    q, k, v = (x.astype(np.float64) for x in (one.q, one.k, one.v))
    return readings(
        one.policy, q, k, v, chunks=[int(n) for n in one.counts if n], capacity=one.capacity, stores=one.stores,
        prompt=one.prompt, layer=one.layer, layers=LAYERS,
    )  # fmt: skip


def _count(one: Case, expected: list[Reading]) -> np.ndarray:
    """Decisions, and how many of them were evictions and losses."""
    steps = one.counts[one.counts > 0]
    live = np.array([[len(keys) for keys in reading.kept] for reading in expected])
    lost = sum(reading.overflow for reading in expected)
    return np.array(
        [live[:, :-1].sum() + KV_HEADS * steps.sum(), KV_HEADS * steps.sum() - live[:, -1].sum() - lost, lost]
    )


def _compare(what: str, one: Case, expected: list[Reading], kept: np.ndarray, overflow: np.ndarray) -> None:
    """Raises unless the keys ``kept [kv_heads, steps, keys]`` and the overflow are those of the specification."""
    wanted = np.zeros_like(kept)
    for head, reading in enumerate(expected):
        for at, index in enumerate(np.cumsum(one.counts > 0) - 1):  # a step without tokens changes nothing
            wanted[head, at, list(reading.kept[index]) if index >= 0 else []] = True
    clock = np.cumsum(one.counts)
    invariants.same_decisions(what, kept[None], wanted[None], "in the specification", clock)
    for head, reading in enumerate(expected):
        if overflow[head] != reading.overflow:
            raise InvariantError(what, f"{overflow[head]} keys were lost, not {reading.overflow}", head=head)


def _cached(cases: list[Case]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The keys in the cache after each step and the overflow at the end, for each case. All cases are read at once."""
    full = [*cases, *[cases[0]] * (BATCH - len(cases))]
    policies = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(leaf) for leaf in x]), *[one.here for one in full])
    q, k, v = (np.stack([_padded(getattr(one, name)) for one in full]) for name in ("q", "k", "v"))
    counts, prompt = (np.array([getattr(one, name) for one in full], np.int32) for name in ("counts", "prompt"))
    spec = CacheSpec(KV_HEADS, full[0].slots, HEAD_DIM, stores=full[0].stores)
    position, overflow = map(np.asarray, _read(policies, q, k, v, counts, prompt, spec=spec))
    held = (position[..., None] == np.arange(TOKENS)).any(-2).swapaxes(1, 2)  # [batch, kv_heads, steps, keys]
    return [(held[row], overflow[row]) for row in range(len(cases))]


@partial(jax.jit, static_argnames="spec")
def _read(policies, q, k, v, counts, prompt, *, spec):
    def read(policy, q, k, v, counts, prompt):
        def body(carry, count):
            cache, start = carry
            new_q, new_k, new_v = (jax.lax.dynamic_slice_in_dim(x, start, CHUNK) for x in (q, k, v))
            _, cache = step(policy, cache, new_q, new_k, new_v, count)
            return (cache, start + count), by_head(cache)

        cache = begin_prompt(make_cache(policy, spec), prompt)
        (cache, _), position = jax.lax.scan(body, (cache, jnp.int32(0)), counts)
        return position, cache.overflow

    return jax.vmap(read)(policies, q, k, v, counts, prompt)


def _replayed(one: Case) -> tuple[np.ndarray, np.ndarray]:
    q, k, v = (x.reshape(1, len(x), -1, HEAD_DIM) for x in (one.q, one.k, one.v))
    options: dict[str, Any] = {"capacity": one.capacity, "chunk": one.chunk, "prompt": one.prompt, "errors": False}
    result = replay(Trace.from_qkv(q, k, v), [one.here], **options)
    kept = np.zeros((KV_HEADS, TOKENS, TOKENS), bool)
    kept[:, :, : len(k[0])] = result.history()[0][:, np.maximum(np.cumsum(one.counts) - 1, 0)]
    return kept, result.overflow[0]


def _padded(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.full((TOKENS + CHUNK - len(x), *x.shape[1:]), 7.0, np.float32)])


def _where(one: Case) -> str:
    pieces = f"chunks of {one.chunk}" if one.chunk else f"pieces of {' '.join(str(n) for n in one.counts if n)}"
    stores = {None: "a rectangle", 1: "a pool"}.get(one.stores, f"{one.stores} pools")
    layout = f"{stores} of {one.slots} slots a head"
    return f"{len(one.k)} tokens in {pieces}, a prompt of {one.prompt}, {layout}"
