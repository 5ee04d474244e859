"""The suite itself is tested: deliberately broken policies and caches, each caught by the invariant that it breaks."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from corm_jax import (
    H2O,
    TOVA,
    AdaKV,
    AdaptiveCorm,
    Corm,
    Full,
    L2Norm,
    Protect,
    Scissorhands,
    SnapKV,
    budget,
    make_cache,
    policy,
    protect,
    step,
)
from corm_jax.core import attention, cache, storing
from corm_jax.core.arrays import EMPTY
from corm_jax.core.types import CacheSpec
from corm_jax.core.wrapper import Wrapper
from corm_jax.policies.corm import NEVER
from simulator import reference, specification
from simulator.invariants import InvariantError
from simulator.testing import CHECKS, Implementation, check_policy

pytestmark = pytest.mark.nightly


@policy
class OneRecentTooFew(Corm):
    def retain(self, state, slots):
        return Corm.retain(replace(self, recent=self.recent - 1), state, slots)


@policy
class StrictlyMore(Corm):
    def observe(self, state, observation, slots):
        n = observation.seen.astype(jnp.float32)
        important = (observation.weights * n / observation.total > 1).any(0)
        return jnp.maximum(state, jnp.where(important, observation.seen, NEVER).max(0))


@policy
class OnceIsEnough(Corm):
    def observe(self, state, observation, slots):
        return Corm.observe(replace(self, multiple=1), state, observation, slots)


@policy
class EvictsOneStepEarly(Corm):
    def retain(self, state, slots):
        minor = (state <= slots.seen - self.window + 1) & (slots.seen >= self.window)
        return slots.live & (~minor | slots.newest(self.recent))


@policy
class EvictsOneStepLate(Corm):
    def retain(self, state, slots):
        minor = (state < slots.seen - self.window) & (slots.seen >= self.window)
        return slots.live & (~minor | slots.newest(self.recent))


@policy
class Impatient(Corm):
    def retain(self, state, slots):
        return Corm.retain(replace(self, eager=True), state, slots)


@policy
class CountsTheLiveAsTheClock(Corm):
    def observe(self, state, observation, slots):
        live = slots.broadcast(slots.sum_per_head(slots.live))
        return Corm.observe(
            self, state, observation._replace(seen=jnp.broadcast_to(live, observation.visible.shape)), slots
        )


@policy
class OneClockForTheChunk(Corm):
    def observe(self, state, observation, slots):
        return Corm.observe(
            self, state, observation._replace(seen=jnp.broadcast_to(slots.seen, observation.seen.shape)), slots
        )


@policy
class AllForAny(Corm):
    def observe(self, state, observation, slots):
        n = observation.seen.astype(jnp.float32)
        important = (observation.weights * n / observation.total >= 1).all(0)
        return jnp.maximum(state, jnp.where(important, observation.seen, NEVER).max(0))


@policy
class OnlyTheFirstQueryHead(Corm):
    def observe(self, state, observation, slots):
        first = observation._replace(weights=observation.weights[:1], total=observation.total[:1])
        return Corm.observe(self, state, first, slots)


@policy
class HeadsVoteTogether(Corm):
    def observe(self, state, observation, slots):
        state = Corm.observe(self, state, observation, slots)
        return jnp.broadcast_to(state.max(0), state.shape)


@policy
class ForgetsWhatWasAskedBefore(Corm):
    def observe(self, state, observation, slots):
        return Corm.observe(self, jnp.full_like(state, NEVER), observation, slots)


@policy
class NewestBySlot(Corm):
    def retain(self, state, slots):
        index = jnp.arange(slots.position.shape[-1])
        minor = (state <= slots.seen - self.window) & (slots.seen >= self.window)
        return slots.live & (~minor | (index >= slots.seen - self.recent))


@policy
class RankForgetsTheNewest(Corm):
    def score(self, state, slots):
        return state


@policy
class NewestGoesFirstOfEquals(Corm):
    def score(self, state, slots):
        return jnp.where(slots.newest(self.recent), NEVER * 0 + 2**30, jnp.maximum(state, -1) * 64 - slots.position)


@policy
class HalfAsWideWhenEven(Corm):
    def retain(self, state, slots):
        window = jnp.where(self.window % 2 == 0, self.window // 2, self.window)
        return Corm.retain(replace(self, window=window), state, slots)


@policy
class StateTurnsIntoFloats(Corm):
    def observe(self, state, observation, slots):
        return Corm.observe(self, state, observation, slots).astype(jnp.float32)

    def retain(self, state, slots):
        return Corm.retain(self, state.astype(jnp.int32), slots)


@policy
class FirstQueryOfTheChunk(Corm):
    def observe(self, state, observation, slots):
        first = observation.seen == observation.seen[:1]
        return Corm.observe(self, state, observation._replace(weights=jnp.where(first, observation.weights, 0)), slots)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TakenForAnother(Corm):
    """JAX's own registration: structures of such classes compare equal."""

    threshold: str = field(default="position", metadata={"static": True})
    group: str = field(default="any", metadata={"static": True})


@policy
class OwnClock(Corm):
    """Keeps time by counting its calls instead of looking at the clock it is given."""

    def init(self, spec):
        return jnp.full(spec.slots, NEVER, jnp.int32), jnp.zeros(spec.slots, jnp.int32)

    def observe(self, state, observation, slots):
        last, calls = state
        return Corm.observe(
            self, last, observation._replace(seen=calls.max() + 1 + 0 * observation.seen), slots
        ), calls + 1

    def retain(self, state, slots):
        return Corm.retain(self, state[0], slots)

    def score(self, state, slots):
        return Corm.score(self, state[0], slots)


@policy
class SeesMoreThanItSays(Corm):
    """Says that positions are enough."""

    @property
    def traits(self):
        return super().traits._replace(needs=())


@policy
class EveryLookReturns(AdaptiveCorm):
    def observe(self, state, observation, slots):
        found = self.corm.important(observation, slots)
        return AdaptiveCorm.observe(self, state, observation, slots)._replace(count=state.count + found.sum(0))


@policy
class LooksOfTheChunkAreNews(AdaptiveCorm):
    """A second look within the chunk is a return as well."""

    def observe(self, state, observation, slots):
        count = state.count
        for at in range(observation.visible.shape[0]):
            weights = jnp.zeros_like(observation.weights).at[:, at].set(observation.weights[:, at])
            alone = AdaptiveCorm.observe(self, state, observation._replace(weights=weights), slots)
            count += alone.count - state.count
        return AdaptiveCorm.observe(self, state, observation, slots)._replace(count=count)


@policy
class HeadsReturnTogether(AdaptiveCorm):
    def retain(self, state, slots):
        count = jnp.broadcast_to(slots.mean_over_heads(state.count), state.count.shape).astype(jnp.int32)
        return AdaptiveCorm.retain(self, state._replace(count=count), slots)


@policy
class OneNewestTooFew(AdaptiveCorm):
    def observe(self, state, observation, slots):
        return AdaptiveCorm.observe(replace(self, recent=self.recent - 1), state, observation, slots)


@policy
class PaysOnce(AdaptiveCorm):
    def retain(self, state, slots):
        return AdaptiveCorm.retain(replace(self, patience=1), state, slots)


@policy
class TrialEndsEarly(AdaptiveCorm):
    def retain(self, state, slots):
        return AdaptiveCorm.retain(replace(self, trial=self.trial - 1), state, slots)


@policy
class SaysFewer(Scissorhands):
    """Promises one key less than it may keep."""

    @property
    def traits(self):
        return super().traits._replace(most=self.budget - 1)


@policy
class GivesUpTheNewest(H2O):
    """Says that they stay, and ranks them like any other."""

    def score(self, state, slots):
        return state


@policy
class AddsNoSinks(Protect):
    """Keeps sinks beside what the policy inside keeps, and does not say so."""

    @property
    def traits(self):
        return super().traits._replace(most=self.policy.traits.most)


@policy
class JudgesEarlier(SnapKV):
    """One query more than there should be has a say."""

    def observe(self, state, observation, slots):
        return SnapKV.observe(replace(self, window=self.window + 1), state, observation, slots)


@policy
class NeighboursBySlot(SnapKV):
    """Pools over slots that lie side by side, whatever keys they hold."""

    def verdict(self, scores, slots):
        by_slot = jnp.broadcast_to(jnp.arange(slots.position.shape[-1]), slots.position.shape)
        return SnapKV.verdict(self, scores, replace(slots, position=jnp.where(slots.live, by_slot, EMPTY)))


@policy
class NeverStops(SnapKV):
    """Holds the tokens that are generated to the budget, too."""

    def retain(self, state, slots):
        over = slots.sum_per_head(slots.live) - self.budget
        return SnapKV.retain(self, state, slots) & ~((slots.seen > slots.prompt) & slots.lowest(slots.position, over))


@policy
class ForgetsTheFloor(AdaKV):
    """Leaves a head with what it wins."""

    def allowed(self, pooled, early):
        return AdaKV.allowed(replace(self, floor=0.0), pooled, early)


@policy
class CannotWait(SnapKV):
    """Takes the last token but one for the end of the prompt."""

    def observe(self, state, observation, slots):
        return SnapKV.observe(self, state, observation, replace(slots, prompt=slots.prompt - 1))


@policy
class NoAgeForTheNewest(H2O):
    """Divides by the key's age, of which the newest has none: 0 / 0."""

    def score(self, state, slots):
        age = (slots.seen - 1 - slots.position).astype(jnp.float32)
        return jnp.where(age == 0, 0.0, state) / age


@policy
class HardlyEver(Full):
    """Would evict, but only in texts longer than any in use."""

    def retain(self, state, slots):
        return slots.live & (slots.position < 2**19)


@policy
class AllAlike(Full):
    """Ranks all keys alike, which is no mistake: the oldest goes."""

    def score(self, state, slots):
        return jnp.zeros_like(slots.position)


def insert(policy, one, k, v, count):
    """Stores a chunk, as `corm_jax.step` does."""
    one = storing.make_room(policy, one, count, len(k))
    return storing.insert_chunk(policy, one, *storing.stored(k, v, one.k.dtype), count)


def evict(policy, one, allowed):
    keep = policy.retain(one.state, cache.slots(one)) | ~allowed
    return one._replace(position=jnp.where(keep, one.position, EMPTY))


def attend(q, k, v, visible, seen, layout):
    return attention.attend(q, k, v, visible, seen, layout)


def step_of(insert=insert, evict=evict, attend=attend, mask=None, evict_first=False):
    """`corm_jax.step` out of parts that may be broken."""

    def step(policy, one, q, k, v, count):
        position = (one.clock.seen + jnp.arange(q.shape[0]))[:, None, None]
        real = (jnp.arange(q.shape[0]) < count)[:, None, None]
        one = insert(policy, one, k, v, count)
        held = one.position[None]
        visible = (held >= 0) & (held <= position) & real
        visible = visible if mask is None else mask(held, real)
        allowed = count > 0
        if evict_first:
            one = evict(policy, one, allowed)
            visible &= (one.position >= 0)[None]
        output, observation = attend(q, one.k, one.v, visible, position.reshape(-1) + 1, one.layout)
        one = one._replace(state=policy.observe(one.state, observation, cache.slots(one)))
        return output, one if evict_first else evict(policy, one, allowed)

    return step


def position_is_the_slot(policy, one, k, v, count):
    after = insert(policy, one, k, v, count)
    index = jax.lax.broadcasted_iota(jnp.int32, after.position.shape, 1)
    return after._replace(position=jnp.where(after.position >= 0, index, EMPTY))


def state_is_not_reset(policy, one, k, v, count):
    after = insert(policy, one, k, v, count)
    return after._replace(state=one.state)


def slots_in_turn(policy, one, k, v, count):
    """The slot is the position modulo the capacity, whether it is free or not."""
    capacity = one.position.shape[1]
    new = jnp.where(jnp.arange(k.shape[0]) < count, (one.clock.seen + jnp.arange(k.shape[0])) % capacity, capacity)
    fresh = policy.init(CacheSpec(k.shape[1], capacity, k.shape[2]))
    return one._replace(
        k=one.k.at[:, new].set(k.swapaxes(0, 1), mode="drop"),
        v=one.v.at[:, new].set(v.swapaxes(0, 1), mode="drop"),
        position=one.position.at[:, new].set(one.clock.seen + jnp.arange(k.shape[0]), mode="drop"),
        state=one.state.at[:, new].set(fresh[:, : k.shape[0]], mode="drop"),
        clock=one.clock.after(count),
    )


def in_other_order(order):
    """Equal ranks are told apart by something else than age."""

    @policy
    class Reordered(Wrapper):
        def score(self, state, slots):
            rank = jnp.clip(self.policy.score(state, slots), EMPTY, 2**20)
            return rank * 64 + order(slots.position)

    return lambda one, *arguments: insert(Reordered(policy=one), *arguments)


newest_of_equals = in_other_order(lambda position: -position)
by_slot_of_equals = in_other_order(lambda position: jax.lax.broadcasted_iota(jnp.int32, position.shape, 1))


def overflow_is_silent(policy, one, k, v, count):
    return insert(policy, one, k, v, count)._replace(overflow=one.overflow)


def padding_is_stored(policy, one, k, v, count):
    after = insert(policy, one, k, v, jnp.where(count > 0, k.shape[0], 0))
    return after._replace(clock=one.clock.after(count))


def clock_moves_by_the_chunk(policy, one, k, v, count):
    after = insert(policy, one, k, v, count)
    return after._replace(clock=one.clock.after(k.shape[0]))


def values_are_exchanged(policy, one, k, v, count):
    return insert(policy, one, k, v[:, ::-1], count)


@jax.custom_batching.custom_vmap
def leak(x):
    return x


@leak.def_vmap
def _(axis_size, in_batched, x):
    return jnp.broadcast_to(x[:1], x.shape), True


def state_of_the_first_row(policy, one, k, v, count):
    after = insert(policy, one, k, v, count)
    return after._replace(state=leak(after.state))


def evicted_come_back(policy, one, allowed):
    """Eviction hides a position as a negative number; every third step it is found again."""
    found = jnp.where((one.position < EMPTY) & (one.clock.seen % 3 == 0), -2 - one.position, one.position)
    one = one._replace(position=found)
    after = evict(policy, one, allowed)
    return after._replace(position=jnp.where((after.position < 0) & (found >= 0), -2 - found, after.position))


def empty_values_count(q, k, v, visible, seen, layout):
    output, observation = attend(q, k, v, visible, seen, layout)
    return output + 1e-20 * v.sum(), observation


def other_heads_are_seen(q, k, v, visible, seen, layout):
    output, observation = attend(q, k, v, visible, seen, layout)
    return output, observation._replace(weights=observation.weights[:, :, ::-1])


def otherwise_when_compiled(q, k, v, visible, seen, layout):
    output, observation = attend(q, k, v, visible, seen, layout)
    return (output * 1.01 if isinstance(q, jax.core.Tracer) else output), observation


def grows(policy, one, q, k, v, count):
    output, one = step(policy, one, q, k, v, count)
    wider = cache.make_cache(policy, CacheSpec(k.shape[1], 1, k.shape[2]))._replace(
        clock=one.clock, overflow=one.overflow
    )

    def join(x, y):
        return x if x.shape == y.shape else jnp.concatenate([x, y], axis=1)

    return output, jax.tree.map(join, one, wider)


def one_head_owns_all(policy, one, q, k, v, count):
    output, one = step(policy, one, q, k, v, count)
    return output, one._replace(layout=jax.tree.map(jnp.zeros_like, one.layout))


def overflow_in_floats(policy, one, q, k, v, count):
    output, one = step(policy, one, q, k, v, count)
    return output, one._replace(overflow=one.overflow.astype(jnp.float32))


def wider(policy, spec, **batch):
    return make_cache(policy, spec._replace(capacity=spec.capacity + 2), **batch)


def cache_of(**parts):
    return Implementation(make_cache, step_of(**parts))


SOUND = Implementation(make_cache, step_of())


THOROUGH = {"examples": 300, "shrink": False}
TWO = {"window": 4, "recent": 2}
SABOTAGES = {  # what is broken: the check that finds it, and the invariant that it names
    OneRecentTooFew(**TWO): ("histories", "newest_live"),
    StrictlyMore(**TWO): ("corm_rule", "important_keys_are_kept"),
    OnceIsEnough(**TWO, multiple=3): ("corm_rule", "unimportant_keys_are_evicted"),
    EvictsOneStepEarly(**TWO): ("corm_rule", "important_keys_are_kept"),
    EvictsOneStepLate(**TWO): ("corm_rule", "unimportant_keys_are_evicted"),
    Impatient(window=9, recent=1): ("corm_rule", "none_early"),
    CountsTheLiveAsTheClock(**TWO): ("specification", "specification"),
    OneClockForTheChunk(**TWO): ("specification", "specification"),
    AllForAny(**TWO): ("corm_rule", "important_keys_are_kept"),
    OnlyTheFirstQueryHead(**TWO): ("head_order", "head_order"),
    HeadsVoteTogether(**TWO): ("corm_rule", "unimportant_keys_are_evicted"),
    ForgetsWhatWasAskedBefore(**TWO): ("corm_rule", "important_keys_are_kept"),
    NewestBySlot(**TWO): ("slot_order", "slot_order"),
    RankForgetsTheNewest(window=9, recent=5): ("histories", "newest_live"),
    NewestGoesFirstOfEquals(**TWO): ("specification", "specification"),
    HalfAsWideWhenEven(window=5, recent=1): ("monotone", "monotone"),
    StateTurnsIntoFloats(**TWO): ("construction", "construction"),
    OwnClock(**TWO): ("padding", "padding"),
    FirstQueryOfTheChunk(**TWO): ("chunks", "chunks"),
    TakenForAnother(**TWO): ("construction", "construction"),
    NoAgeForTheNewest(recent=0): ("ranks", "ranks"),
    HardlyEver(): ("evicts_something", "evicts_something"),
    SeesMoreThanItSays(**TWO): ("needs", "needs"),
    SaysFewer(budget=6, window=4, recent=2): ("histories", "at_most"),
    budget(GivesUpTheNewest(recent=2), 5): ("histories", "newest_live"),
    protect(budget(GivesUpTheNewest(recent=2), 5), sinks=1): ("histories", "newest_live"),
    AddsNoSinks(policy=budget(L2Norm(), 5), sinks=2): ("histories", "at_most"),
    "position = slot": (cache_of(insert=position_is_the_slot), "keys_in_their_slots", "keys_in_their_slots"),
    "reused slots keep their state": (cache_of(insert=state_is_not_reset), "empty_slots", "empty_slots"),
    "slots are taken in turn": (cache_of(insert=slots_in_turn), "enough_is_enough", "enough_is_enough"),
    "the newest of equals goes first": (cache_of(insert=newest_of_equals), "specification", "specification"),
    "equals go by slot": (cache_of(insert=by_slot_of_equals), "slot_order", "slot_order"),
    "overflow in floats": (Implementation(make_cache, overflow_in_floats), "shapes", "shapes"),
    "overflow is silent": (cache_of(insert=overflow_is_silent), "overflow_is_counted", "overflow_is_counted"),
    "padding is stored": (cache_of(insert=padding_is_stored), "histories", "no_key_before_its_time"),
    "clock moves by the chunk": (cache_of(insert=clock_moves_by_the_chunk), "padding", "padding"),
    "values are exchanged": (cache_of(insert=values_are_exchanged), "keys_in_their_slots", "keys_in_their_slots"),
    "a row leaks": (cache_of(insert=state_of_the_first_row), "batch_rows", "batch_rows"),
    "evicted keys come back": (cache_of(evict=evicted_come_back), "histories", "none_returns"),
    "evicts before it attends": (cache_of(evict_first=True), "specification", "specification"),
    "chunks are not causal": (
        cache_of(mask=lambda held, real: (held >= 0) & real), "specification", "specification",
    ),
    "chunks are not causal (2)": (
        cache_of(mask=lambda held, real: (held >= 0) & real), "chunks", "chunks",
    ),
    "more slots than asked": (Implementation(wider, step), "histories", "within_capacity"),
    "empty slots count": (cache_of(attend=empty_values_count), "empty_slots", "empty_slots"),
    "heads see each other": (cache_of(attend=other_heads_are_seen), "replays_alike", "replays_alike"),
    "otherwise when compiled": (cache_of(attend=otherwise_when_compiled), "jit_eager_vmap", "jit_eager_vmap"),
    "a pool of one head": (Implementation(make_cache, one_head_owns_all), "layouts", "layouts"),
    "shapes that grow": (Implementation(make_cache, grows), "one_compile", "one_compile"),
}  # fmt: skip


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda key: key if isinstance(key, str) else type(key).__name__)
def test_sabotage_is_caught(sabotage):
    *implementation, check, invariant = SABOTAGES[sabotage]
    policy = Corm(**TWO) if implementation else sabotage
    with pytest.raises(InvariantError) as caught:
        check_policy(
            policy,
            reference.corm_messages,
            implementation=(implementation or [SOUND])[0],
            only=check,
            **THOROUGH,
        )
    assert caught.value.invariant == invariant


@pytest.mark.parametrize("sabotage", [JudgesEarlier, NeighboursBySlot, NeverStops, ForgetsTheFloor, CannotWait])
def test_sabotage_of_the_prompt_is_caught(sabotage, monkeypatch):
    monkeypatch.setitem(specification.RULES, sabotage, specification.RULES[sabotage.__base__])
    with pytest.raises(InvariantError) as caught:
        check_policy(sabotage(budget=6, window=2, kernel=3), only="specification", **THOROUGH)
    assert caught.value.invariant == "specification"


@pytest.mark.parametrize(
    "sabotage",
    [EveryLookReturns, LooksOfTheChunkAreNews, HeadsReturnTogether, OneNewestTooFew, PaysOnce, TrialEndsEarly],
)
def test_sabotage_of_the_returns_is_caught(sabotage, monkeypatch):
    monkeypatch.setitem(specification.RULES, sabotage, specification.RULES[AdaptiveCorm])
    with pytest.raises(InvariantError) as caught:
        check_policy(sabotage(window=2, recent=2, multiple=1, patience=2, trial=4), only="specification", **THOROUGH)
    assert caught.value.invariant == "specification"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_is_sound_passes(check):
    """The parts out of which broken caches are made are sound as such."""
    check_policy(Corm(window=4, recent=2), implementation=SOUND, only=check.__name__)


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (Corm(window=64, recent=64), "`retain` of Corm can evict keys, but does in none of 12 histories: give "
         "numbers below 16, the tokens of a history, for window=64, recent=64\n"),
        (Corm(window=64, recent=2), "for window=64\n"),
        (budget(TOVA(), 512), "`retain` of Budget can evict keys, .* for tokens=512"),
        (SnapKV(budget=20, window=2), "for budget=20"),
        (H2O(recent=32), "H2O evicts no key in any of 12 histories, with 35 slots or more: .* for recent=32"),
        (st.builds(Corm, window=st.just(40), recent=st.just(30)), "for window=40, recent=30"),
    ],
    ids=lambda one: "" if isinstance(one, str) else type(one).__name__,
)  # fmt: skip
def test_numbers_too_large_to_be_tried_are_named(sabotage, message):
    with pytest.raises(InvariantError, match=message) as caught:
        check_policy(sabotage, examples=3)
    assert caught.value.invariant == "evicts_something"


@pytest.mark.parametrize(
    "sound", [Full(), TOVA(), budget(TOVA(), 5), st.builds(Corm, window=st.integers(1, 99), recent=st.just(2))]
)
def test_what_evicts_something_or_has_no_rule_of_its_own_passes(sound):
    check_policy(sound, only="evicts_something")


@pytest.mark.parametrize(
    "check", ["construction", "ranks", "histories", "enough_is_enough", "slot_order", "layouts", "replays_alike"]
)
def test_equal_ranks_are_no_mistake(check):
    check_policy(AllAlike(), only=check, examples=5)


def test_every_check_catches_something():
    assert {check.__name__ for check in CHECKS} == {values[-2] for values in SABOTAGES.values()}
