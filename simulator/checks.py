"""The checks of the conformance suite, each under a name. `simulator.testing` runs them.

A check gets a `Subject` and draws the histories on which it is tried. If an invariant does not hold, it raises an
`InvariantError` that names the invariant and the place. Some invariants are those of `simulator.invariants`; others
compare two ways to read the same history, and are named after the check.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from corm_jax.core import cache as cache_lib
from corm_jax.core.arrays import EMPTY
from corm_jax.core.options import map_numbers
from corm_jax.core.types import LayerCache, by_slot
from corm_jax.core.wrapper import Wrapper
from corm_jax.policies import policy
from simulator import invariants
from simulator.construction import check_construction
from simulator.held import by_head
from simulator.invariants import CLOSE, InvariantError
from simulator.replay import replay
from simulator.specification import readings, specified
from simulator.strategies import CHUNK, GARBAGE, KV_HEADS, TOKENS, Case
from simulator.subject import Subject
from simulator.untried import untried

CHECKS: list[Callable[[Subject, st.DataObject], None]] = []
"""All checks, the most basic ones first."""

ENOUGH: dict[Callable[[Subject, st.DataObject], None], int] = {}
"""The number of histories of a check, if more would not make it stronger."""

CORM: list[Callable[[Subject, st.DataObject], None]] = []
"""The checks that hold for CORM only."""


def _check(function):
    CHECKS.append(function)
    return function


def _check_enough(examples: int):
    def check(function):
        ENOUGH[function] = examples
        return _check(function)

    return check


def _check_corm(function):
    CORM.append(function)
    return _check(function)


@_check_enough(3)
def construction(subject: Subject, data: st.DataObject) -> None:
    """The policy is built as `corm_jax.core.policy.Policy` demands, see `simulator.construction`."""
    check_construction(subject.policy)


@_check_enough(1)
def shapes(subject: Subject, data: st.DataObject) -> None:
    """A step keeps the shapes and dtypes of the cache, and those of the state in it."""
    case, before = subject.draw(data), subject.cache(subject.few)
    arguments = (jnp.asarray(x[:CHUNK]) for x in (case.q, case.k, case.v))
    after = jax.eval_shape(subject.implementation.step, subject.policy, before, *arguments, jnp.int32(CHUNK))[1]
    if _avals(before) != _avals(after):
        raise InvariantError("shapes", f"a step turns the cache from {_avals(before)} into {_avals(after)}")


@_check_enough(1)
def evicts_something(subject: Subject, data: st.DataObject) -> None:
    """In some history a key is evicted: by `retain` if that can evict at all, otherwise by `score`."""
    if reason := untried(subject):
        raise InvariantError("evicts_something", reason)


@_check_enough(10)
def ranks(subject: Subject, data: st.DataObject) -> None:
    """The score of a live key is a number: NaN cannot be ordered."""
    case = subject.draw(data)
    for capacity in (None, subject.few):
        cache = subject.read(case, capacity).cache
        bad = np.asarray(
            by_head(cache._replace(position=jnp.where(_unranked(subject.policy, cache), cache.position, EMPTY)))
        )
        for head, slot in np.argwhere(bad >= 0):
            where = {"layer": 0, "head": int(head), "clock": case.tokens, "key": int(bad[head, slot])}
            raise InvariantError("ranks", "has a score of NaN: `score` must give a number for every live key", **where)


@jax.jit
def _unranked(policy, cache):
    """Which live slots have a score of NaN, now or when the next token is read."""
    view = cache_lib.slots(cache)
    rank = [policy.score(cache.state, dataclasses.replace(view, seen=view.seen + more)) for more in (0, 1)]
    return view.live & (jnp.isnan(rank[0]) | jnp.isnan(rank[1]))


@_check
def keys_in_their_slots(subject: Subject, data: st.DataObject) -> None:
    """A slot with position p holds the key and the value of token p, and no other slot of its head has position p."""
    case = subject.draw(data)
    for capacity in (None, subject.few):
        cache = subject.read(case, capacity).cache
        position = np.asarray(by_head(cache))
        for head, slot in np.argwhere(position >= 0):
            key = int(position[head, slot])
            where = {"layer": 0, "head": int(head), "clock": case.tokens, "key": key}
            if (position[head] == key).sum() > 1:
                raise InvariantError("keys_in_their_slots", "is in two slots", **where)
            where_ = head // (KV_HEADS // cache.position.shape[0]), slot
            for name, values in (("k", case.k), ("v", case.v)):
                if not np.array_equal(getattr(cache, name)[where_], values[key, head]):
                    raise InvariantError("keys_in_their_slots", f"slot {slot} holds another {name}", **where)


@_check
def histories(subject: Subject, data: st.DataObject) -> None:
    """No key is live before it was read, no evicted key returns, and there are never more keys than slots.

    The declarations of the policy (`corm_jax.core.policy.Traits`) are checked as well: the newest ``recent`` keys are
    live, and at most ``most`` keys.
    """
    case, traits = subject.draw(data), subject.policy.traits
    for capacity in (None, subject.few):
        kept = subject.read(case, capacity).kept
        invariants.no_key_before_its_time(kept, case.clock)
        invariants.none_returns(kept, case.clock)
        invariants.newest_live(kept, traits.recent, case.clock)
        invariants.at_most(kept, traits.most, case.clock)
        if subject.shares:
            invariants.within_pool(kept, KV_HEADS * (capacity or TOKENS + CHUNK), case.clock)
        else:
            invariants.within_capacity(kept, capacity or TOKENS + CHUNK, case.clock)


@_check_corm
def corm_rule(subject: Subject, data: st.DataObject) -> None:
    """CORM: no key is evicted early, and later exactly the unimportant keys are evicted."""
    policy, case = subject.policy, subject.draw(data)
    kept = subject.read(case).kept
    n = case.tokens
    attended = _attended(kept[0], case)[..., :n, :n]
    choices = {name: getattr(policy, name) for name in ("multiple", "group", "threshold")} | {"scale": TOKENS**-0.5}
    judge = partial(invariants.importance, case.q[:n], case.k[:n], attended, **choices)
    shown, clock = kept[..., :n], case.clock
    if not np.any(policy.eager):
        invariants.none_early(shown, policy.window, clock)
        invariants.unimportant_keys_are_evicted(shown, judge(slack=CLOSE)[None], policy.window, policy.recent, clock)
    invariants.important_keys_are_kept(shown, judge(slack=-CLOSE)[None], policy.window, clock)


@_check
def specification(subject: Subject, data: st.DataObject) -> None:
    """The same keys survive as in the specification, with the same outputs and overflow."""
    policy, case = subject.policy, subject.draw(data)
    pieces, n = [int(count) for count in case.counts if count], case.tokens
    steps = case.counts > 0
    for capacity in (None, subject.few):
        history = subject.read(case, capacity)
        outputs = np.concatenate([out[:count] for out, count in zip(history.outputs, case.counts, strict=True)])
        expected = readings(
            policy, case.q[:n], case.k[:n], case.v[:n],
            chunks=pieces, capacity=capacity, stores=subject.implementation.stores,
            prompt=case.prompt, reference=subject.reference,
        )  # fmt: skip
        assume(min(reading.margin for reading in expected) > CLOSE)
        kept = np.zeros((1, KV_HEADS, len(pieces), TOKENS + CHUNK), bool)
        for head, reading in enumerate(expected):
            for row, keys in zip(kept[0, head], reading.kept, strict=True):
                row[list(keys)] = True
        what = "in the specification"
        invariants.same_decisions("specification", history.kept[:, :, steps], kept, what, case.clock[steps])
        for head, reading in enumerate(expected):
            _same_number("specification", "overflow", int(history.overflow[-1, head]), reading.overflow)
            _close("specification", outputs[:, head], reading.outputs, "the specification's")


@_check
def overflow_is_counted(subject: Subject, data: st.DataObject) -> None:
    """While eviction is postponed, each missing key was evicted for lack of a slot, and was counted."""
    case = subject.draw(data)
    for capacity in (None, subject.few):
        history = subject.hoard(case, capacity)
        live = history.kept[0].sum(-1)
        for head, step_ in np.argwhere(case.clock - live != np.asarray(history.overflow).T):
            missing, counted = int(case.clock[step_] - live[head, step_]), int(history.overflow[step_, head])
            raise InvariantError(
                "overflow_is_counted", f"{missing} keys are missing, {counted} were counted",
                layer=0, head=int(head), clock=int(case.clock[step_]),
            )  # fmt: skip


@_check
def enough_is_enough(subject: Subject, data: st.DataObject) -> None:
    """A sufficient capacity does not change results, although slots are reused."""
    case = subject.draw(data)
    free = subject.read(case)
    live = free.kept[0].sum(-1).max(0)
    if (np.concatenate([[0], live[:-1]]) + case.counts).max() > subject.few:
        return
    capped = subject.read(case, subject.few)
    invariants.same_decisions("enough_is_enough", capped.kept, free.kept, "with more slots", case.clock)
    _close("enough_is_enough", capped.outputs, free.outputs, "with more slots")
    _same_number("enough_is_enough", "overflow", int(capped.overflow.sum()), 0)


@_check
def chunks(subject: Subject, data: st.DataObject) -> None:
    """While nothing is evicted, outputs and state do not depend on the pieces in which a text is read."""
    case = subject.draw(data)
    ones = dataclasses.replace(case, counts=np.where(np.arange(TOKENS) < case.tokens, 1, 0).astype(np.int32))
    pieces, single = (subject.hoard(each) for each in (case, ones))
    rows = [np.concatenate([out[:count] for out, count in zip(history.outputs, each.counts, strict=True)])
            for history, each in ((pieces, case), (single, ones))]  # fmt: skip
    _close("chunks", rows[0], rows[1], "token by token")
    for one, other in zip(_key_by_key(pieces.cache), _key_by_key(single.cache), strict=True):
        difference = np.abs(one - other)
        if not (difference <= 1e-4).all():
            raise InvariantError("chunks", f"the state differs by {difference.max():.3g} from token by token")


@_check
def padding(subject: Subject, data: st.DataObject) -> None:
    """Padding of a chunk does not change results, and neither do steps without tokens."""
    case = subject.draw(data)
    order = np.argsort(case.counts == 0, kind="stable")  # empty steps last
    other = dataclasses.replace(case, counts=case.counts[order])
    one = subject.read(case, subject.few)
    for name, x in (("zeros", 0.0), ("large numbers", 1e6)):
        q, k, v = (
            np.where(np.arange(TOKENS + CHUNK) < case.tokens, y.T, x).T.astype(np.float32)
            for y in (case.q, case.k, case.v)
        )
        two = subject.go_on(subject.cache(subject.few, case.prompt), q, k, v, other.counts)
        steps, what = other.counts > 0, f"when {name} pad it"
        kept = one.kept[:, :, order[steps]]
        invariants.same_decisions("padding", kept, two.kept[:, :, steps], what, other.clock[steps])
        _close("padding", np.asarray(one.outputs)[order], two.outputs, what)


@_check
def batch_rows(subject: Subject, data: st.DataObject) -> None:
    """Rows of a batch do not influence each other: results are the same together, alone, and in any order."""
    pair = subject.draw(data), subject.draw(data)
    for rows in (pair, pair[::-1]):
        together = subject.read_batch(rows, subject.few)
        for row, case in enumerate(rows):
            alone, part = subject.read(case, subject.few), jax.tree.map(lambda x, row=row: x[row], together)
            what = f"alone (row {row})"
            invariants.same_decisions("batch_rows", part.kept, alone.kept, what, case.clock)
            _close("batch_rows", part.outputs, alone.outputs, what)


@_check
def head_order(subject: Subject, data: st.DataObject) -> None:
    """Exchanging key-value heads exchanges their histories; the order of query heads in a group has no effect.

    A hyperparameter of shape ``[kv_heads]`` is taken to be one number for each head. Pools do not overflow here, since
    of two keys with equal scores that of the first head is evicted first.
    """
    case = subject.draw(data)
    capacity = None if subject.shares else subject.few
    one = subject.read(case, capacity)
    other = subject._replace(policy=map_numbers(lambda x: x[::-1] if np.shape(x) == (KV_HEADS,) else x, subject.policy))
    q, k, v = (x[:, ::-1] for x in (case.q[:, :, ::-1], case.k, case.v))
    two = other.go_on(other.cache(capacity, case.prompt), q, k, v, case.counts)
    invariants.same_decisions("head_order", one.kept, two.kept[:, ::-1], "in another order of heads", case.clock)
    _close("head_order", one.outputs, two.outputs[:, :, ::-1, ::-1], "in another order of heads")


@_check
def layouts(subject: Subject, data: st.DataObject) -> None:
    """Results do not depend on whether the heads of a layer share their slots, as long as these suffice."""
    case = subject.draw(data)
    # Layouts sum in different orders, so no decision may be a tie or depend on rounding otherwise.
    noise = np.random.default_rng(0).normal(size=case.logits.shape).astype(np.float32)
    case = dataclasses.replace(case, logits=case.logits + noise / 16)
    _assume_decided(subject, case, None)
    rectangle, pool = (
        subject._replace(implementation=subject.implementation._replace(stores=stores)).read(case)
        for stores in (None, 1)
    )
    invariants.same_decisions("layouts", pool.kept, rectangle.kept, "in a rectangle", case.clock)
    _close("layouts", pool.outputs, rectangle.outputs, "those of a rectangle")


@_check
def slot_order(subject: Subject, data: st.DataObject) -> None:
    """Results do not depend on the slots of the keys: they are the same after a shuffle."""
    _continues("slot_order", subject, data, _shuffled, "before the slots were shuffled")


@_check
def empty_slots(subject: Subject, data: st.DataObject) -> None:
    """Results do not depend on the contents of an empty slot: its key, its value, its head, or its state."""
    _continues("empty_slots", subject, data, _littered, "before the empty slots were littered")


@_check_enough(2)  # without a compiler loops are slow
def jit_eager_vmap(subject: Subject, data: st.DataObject) -> None:
    """One step gives the same results compiled, uncompiled and vectorized."""
    case = subject.draw(data, counts=[1] * TOKENS)
    cache = subject.read(dataclasses.replace(case, counts=np.where(np.arange(TOKENS) < 10, 1, 0)), subject.few).cache
    arguments = cache, *(jnp.asarray(x[10:11]) for x in (case.q, case.k, case.v)), jnp.int32(1)
    step, policy = subject.implementation.step, subject.policy
    compiled = _step(policy, *arguments, step=step)
    both = _step_twice(policy, *jax.tree.map(lambda x: jnp.stack([x, x]), arguments), step=step)
    for name, (output, after) in (
        ("eager", step(policy, *arguments)),
        ("vmap", jax.tree.map(lambda x: x[1], both)),
    ):
        if not np.array_equal(after.position, compiled[1].position):
            raise InvariantError("jit_eager_vmap", f"{name} keeps {after.position}, jit {compiled[1].position}")
        _close("jit_eager_vmap", output, compiled[0], "with jit")


@_check_enough(1)
def one_compile(subject: Subject, data: st.DataObject) -> None:
    """Other numbers, positions and counts need no new compilation: tracing does not depend on values."""
    case, traced = subject.draw(data, counts=[1] * TOKENS), []

    @jax.jit
    def run(policy, cache, *arguments):
        traced.append(True)
        return subject.implementation.step(policy, cache, *arguments)

    policy, cache = jax.tree.map(jnp.asarray, subject.policy), subject.cache(subject.few)
    for start, count in ((0, 2), (2, 3), (5, 0)):
        q, k, v = (jnp.asarray(x[start : start + CHUNK]) for x in (case.q, case.k, case.v))
        _, cache = run(policy, cache, q, k, v, jnp.int32(count))
    if len(traced) > 1:
        raise InvariantError("one_compile", f"three steps of one shape took {len(traced)} compilations")


@policy
class Blind(Wrapper):
    """A policy that observes NaN in place of everything that it declares not to need."""

    def observe(self, state, observation, slots):
        unknown = {"attention": ("weights", "total"), "keys": ("keys",), "values": ("values",), "queries": ("queries",)}
        hidden = [name for need, names in unknown.items() if need not in self.traits.needs for name in names]
        given = {name: getattr(observation, name) for name in hidden if getattr(observation, name) is not None}
        blank = {name: jnp.full_like(value, jnp.nan) for name, value in given.items()}
        return self.policy.observe(state, observation._replace(**blank), slots)


@_check
def needs(subject: Subject, data: st.DataObject) -> None:
    """Observations that a policy declares not to need, of attention, keys, values or queries, do not change results."""
    case = subject.draw(data)
    blind = subject._replace(policy=Blind(policy=subject.policy))
    one, other = (each.read(case, subject.few) for each in (subject, blind))
    invariants.same_decisions(
        "needs", other.kept, one.kept, f"seeing more than {blind.policy.traits.needs}", case.clock
    )


@_check
def replays_alike(subject: Subject, data: st.DataObject) -> None:
    """The cache and `simulator.replay`, which has no slots, make the same decisions, with the same overflow.

    A replay has a capacity for each head, but not for a pool.
    """
    chunk, capacity = data.draw(st.sampled_from([(1, None), (CHUNK, subject.few)]))
    capacity = None if subject.shares else capacity
    case = subject.draw(data, counts=[min(chunk, max(TOKENS - chunk * i, 0)) for i in range(TOKENS)])
    steps = case.counts > 0
    _assume_decided(subject, case, capacity)  # they sum in different orders
    history = subject.read(case, capacity)
    options = {"capacity": capacity, "chunk": chunk, "prompt": case.prompt}
    other = replay(case.trace(), subject.policy, **options, errors=False)
    kept, replayed = history.kept[:, :, steps, :TOKENS], other.history()[:, :, case.clock[steps] - 1]
    invariants.same_decisions("replays_alike", kept, replayed, "in the replay", case.clock[steps])
    invariants.within_capacity(replayed, capacity or TOKENS, case.clock[steps])
    for head in range(KV_HEADS):
        _same_number("replays_alike", "overflow", int(history.overflow[-1, head]), int(other.overflow[0, head]))


@_check_corm
def monotone(subject: Subject, data: st.DataObject) -> None:
    """CORM: with attention as recorded, a larger w or r keeps all keys that a smaller one keeps."""
    policy, case = subject.policy, subject.draw(data, counts=[1] * TOKENS)
    if np.any(policy.eager) or policy.threshold == "live":
        return  # eager: a larger window may be filled later; live: the threshold depends on what is kept
    more = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    larger = dataclasses.replace(policy, window=policy.window + more[0], recent=policy.recent + more[1])
    kept = [replay(case.trace(), each, fidelity="recorded", errors=False).history() for each in (policy, larger)]
    invariants.subset(kept[0], kept[1], f"with w and r larger by {more}")


def _assume_decided(subject: Subject, case: Case, capacity: int | None) -> None:
    """Leaves out a case in which rounding can change a decision, if there is a specification to tell."""
    if specified(subject.policy):
        pieces, n = [int(count) for count in case.counts if count], case.tokens
        head = case.q[:n], case.k[:n], case.v[:n]
        expected = readings(subject.policy, *head, chunks=pieces, capacity=capacity, prompt=case.prompt)
        assume(min(reading.margin for reading in expected) > CLOSE)


@partial(jax.jit, static_argnames="step")
def _step(policy, cache, *arguments, step):
    return step(policy, cache, *arguments)


@partial(jax.jit, static_argnames="step")
def _step_twice(policy, *arguments, step):
    return jax.vmap(partial(step, policy))(*arguments)


def _continues(name, subject, data, change, what) -> None:
    case = subject.draw(data, counts=[1] * TOKENS)
    half, seed = TOKENS // 2, data.draw(st.integers(0, 99))
    cache = subject.read(dataclasses.replace(case, counts=np.where(np.arange(TOKENS) < half, 1, 0)), subject.few).cache
    rest = [
        np.concatenate([x[half:TOKENS], np.full_like(x[: half + CHUNK], GARBAGE)]) for x in (case.q, case.k, case.v)
    ]
    counts = np.where(np.arange(TOKENS) < half, 1, 0).astype(np.int32)
    one, two = (subject.go_on(start, *rest, counts) for start in (cache, change(cache, np.random.default_rng(seed))))
    clock = half + counts.cumsum()
    invariants.same_decisions(name, two.kept, one.kept, what, clock)
    _close(name, two.outputs, one.outputs, what)
    _same_number(name, "overflow", int(two.overflow[-1].sum()), int(one.overflow[-1].sum()))


def _shuffled(cache: LayerCache, rng) -> LayerCache:
    size = cache.position.shape[-1]
    order = rng.permutation(size)
    twin = cache.twin
    if twin is not None:
        there = np.append(order.argsort(), size)  # the new index of each slot; the last entry is for no slot
        store, slot = np.divmod(np.asarray(twin), size)
        twin = jnp.asarray(
            np.where(store < len(cache.position), store * size + there[slot], twin)[..., order], jnp.int32
        )
    return cache._replace(
        twin=twin,
        k=cache.k[..., order, :], v=cache.v[..., order, :], position=cache.position[..., order],
        state=by_slot(lambda x: x[..., order], cache.state),
        layout=jax.tree.map(lambda x: x[..., order], cache.layout),
    )  # fmt: skip


def _littered(cache: LayerCache, rng) -> LayerCache:
    empty = cache.position < 0

    def litter(leaf):
        if leaf.dtype == bool:
            return leaf ^ empty
        numbers = rng.integers(0, 2 * TOKENS, leaf.shape)
        rubbish = np.where(numbers % 2, numbers, np.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) else numbers
        return jnp.where(empty, jnp.asarray(rubbish, leaf.dtype), leaf)

    k, v = (jnp.where(empty[..., None], rubbish, x) for rubbish, x in ((jnp.nan, cache.k), (1e30, cache.v)))
    layout = jax.tree.map(lambda head: jnp.where(empty, KV_HEADS - 1 - head, head), cache.layout)
    return cache._replace(k=k, v=v, state=by_slot(litter, cache.state), layout=layout)


def _attended(kept: np.ndarray, case: Case) -> np.ndarray:
    """Which keys each query of an uncapped history attended to: ``[kv_heads, queries, keys]``."""
    before = np.concatenate([np.zeros_like(kept[:, :1]), kept[:, :-1]], axis=1)
    query, key = np.arange(case.tokens)[:, None], np.arange(kept.shape[-1])
    of_step = np.searchsorted(case.clock, query[:, 0], side="right")
    start = (case.clock - case.counts)[of_step][:, None]
    return before[:, of_step] | ((key >= start) & (key <= query))


def _key_by_key(cache: LayerCache) -> list[np.ndarray]:
    """The state of live keys, head by head and in the order of the text: ``[..., keys]``, and of heads, float64."""
    position, head = (np.asarray(x).reshape(-1) for x in (cache.position, cache_lib.slots(cache).head))
    order = np.lexsort((position, head))
    order = order[position[order] >= 0]
    ordered = by_slot(lambda x: np.asarray(x).reshape(*x.shape[:-2], -1)[..., order], cache.state)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(ordered)]


def _avals(tree) -> list[str]:
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree)]


def _close(name: str, output, expected, what: str) -> None:
    difference = np.abs(np.asarray(output, np.float64) - np.asarray(expected, np.float64))
    if not (difference <= 1e-4).all():
        raise InvariantError(name, f"an attention output differs by {np.nanmax(difference):.3g} from {what}")


def _same_number(name: str, of: str, value: int, expected: int) -> None:
    if value != expected:
        raise InvariantError(name, f"{of} is {value}, not {expected}")
