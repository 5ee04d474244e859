"""Which part of a policy the histories of the conformance suite do not test, since no key is evicted in them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.core.arrays import ENDLESS
from corm_jax.core.layout import Apart
from corm_jax.core.slots import Slots
from corm_jax.core.types import CacheSpec
from simulator.strategies import CHUNK, KV_HEADS, TOKENS, typical
from simulator.subject import Subject


def untried(subject: Subject) -> str | None:
    """The part of a policy that the histories of the suite do not test, and the way out; None if there is none."""
    histories = [case for seed in range(6) for case in (typical(seed, chunk=1), typical(seed, chunk=CHUNK))]
    if any(not subject.read(case).kept[0, :, -1, : case.tokens].all() for case in histories):
        return None
    numbers = {
        jax.tree_util.keystr(path).lstrip("."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(subject.policy)
    }
    large = [f"{name}={leaf}" for name, leaf in numbers.items() if np.max(leaf) >= TOKENS]
    way_out = f"give numbers below {TOKENS}" + f", the tokens of a history, for {', '.join(large)}" * bool(large)
    name = type(subject.policy).__name__
    if can_evict(subject.policy):
        return f"`retain` of {name} can evict keys, but does in none of {len(histories)} histories: {way_out}"
    if any(subject.read(case, subject.few).overflow[-1].any() for case in histories):
        return None
    return f"{name} evicts no key in any of {len(histories)} histories, with {subject.few} slots or more: {way_out}"


def can_evict(policy: Any, capacity: int = 4096) -> bool:
    """Whether `retain` evicts a live key in one of many random states, late in a long text."""
    spec, rng = CacheSpec(KV_HEADS, capacity, TOKENS), np.random.default_rng(0)
    state, seen = jax.eval_shape(lambda: policy.init(spec)), 2**20
    prompts = [1, seen // 2, seen, ENDLESS] * 2

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):  # some whole numbers are clocks
            numbers, clocks = rng.integers(-seen, seen, leaf.shape), rng.choice(prompts, leaf.shape)
            return jnp.asarray(np.where(rng.random(leaf.shape) < 0.5, numbers, clocks).astype(leaf.dtype))
        return jnp.asarray(rng.normal(size=leaf.shape) * 10.0 ** rng.integers(-3, 4), leaf.dtype)

    position = jnp.asarray(np.stack([rng.choice(seen, capacity, replace=False) for _ in range(KV_HEADS)]), jnp.int32)
    retain = jax.jit(lambda state, prompt: policy.retain(state, Slots(position, jnp.int32(seen), prompt, Apart())))
    return any(not retain(jax.tree.map(draw, state), jnp.int32(prompt)).all() for prompt in prompts)
