"""Replay: any policy over a recorded trace, and what its evictions cost.

A trace holds what a model attended to with a full cache. Replaying goes through it token by token (or chunk by chunk)
with the same policy objects as the model's own cache, under `jax.lax.scan`, one layer at a time. There are no slots to
manage: key i has slot i, and a key that goes only gets a date. So this is also an independent account of what
`corm_jax.core.cache` should do.

Three fidelities, from the cheapest to the truth:

- ``recorded``: attention as recorded; evicted keys drop out, the others keep their probabilities.
- ``renormalized``: softmax over the survivors, recomputed from q and k. Exact for the layer as such; what evictions
  change in the queries of later layers is left out.
- ``live``: the model itself with the policy in its cache (`corm_jax.runs.perplexity`), which is no replay.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.core.capacity import per_layer, slots_for
from corm_jax.core.exact import FOREVER, planned
from corm_jax.core.options import at_least, is_share, numbers_in
from corm_jax.core.policy import Policy
from corm_jax.core.prompt import prompt_of
from corm_jax.core.step import counts_in_cache
from corm_jax.core.wrapper import name_of
from corm_jax.errors import CormError
from corm_jax.traces.meta import QKV, Rows
from corm_jax.traces.trace import Trace
from simulator.recurrence import replay_layer

FIDELITIES = ("renormalized", "recorded")

STEPS_PER_BLOCK = 64
"""Queries whose logits are computed at once, rounded up to a multiple of the chunk. Does not change results."""


class Replay(NamedTuple):
    """What a policy did with a trace. A sweep has the axes of its grid in front.

    ``until`` and ``lost`` say it all; the properties are other views of them. Clocks count from 1. Its short form shows
    the share of the keys that are live at the end, means of the mass and the error, and the overflow: of a sweep, the
    range over the grid.

    Attributes:
      until: int32 ``[layers, kv_heads, keys]``, the clock of the last query that could attend to the key; `FOREVER` if
        it is live at the end.
      lost: bool ``[layers, kv_heads, keys]``, whether the key went for want of a slot.
      mass: float32 ``[layers, q_heads, steps]``, the share of the full cache's attention that fell on keys still there.
      error: float32 ``[layers, q_heads, steps]``, ``|o - o_full| / |o_full|`` of the attention outputs, or None where
        the trace has no values or nobody asked.
      needed: int32 ``[layers, kv_heads, keys]``, the clock of the last query that, with the full cache, found the key
        important (alpha >= 1/t for a query head of its group); 0 for never.
      kept: bool ``[layers, kv_heads, steps, keys]``, which keys are live after each step, if ``keep_history``.
    """

    until: np.ndarray
    lost: np.ndarray
    mass: np.ndarray
    error: np.ndarray | None
    needed: np.ndarray
    kept: np.ndarray | None = None

    def __repr__(self) -> str:
        if not all(isinstance(x, np.ndarray) and x.ndim > 2 for x in self[:3]):  # shapes, say, or numbers being traced
            return f"Replay{tuple.__repr__(self)}"
        each = (-3, -2, -1)
        shares = {"kept": (self.until == FOREVER).mean(each), "mass": self.mass.mean(each, dtype=np.float64)}
        shares |= {} if self.error is None else {"error": self.error.mean(each, dtype=np.float64)}
        *grid, layers, kv_heads, steps = self.until.shape
        parts = [f"grid={tuple(grid)}"] * bool(grid) + [f"layers={layers}, kv_heads={kv_heads}, steps={steps}"]
        parts += [f"{name}={_range(share, '.3f')}" for name, share in shares.items()]
        return f"Replay({', '.join(parts)}, overflow={_range(self.overflow.sum((-2, -1)), 'd')})"

    @property
    def steps(self) -> int:
        """Tokens in the trace."""
        return self.until.shape[-1]

    @property
    def gone(self) -> np.ndarray:
        """int32, as ``until``: the clock after whose step the key is first missing."""
        return np.where(self.until == FOREVER, FOREVER, self.until + self.lost)

    @property
    def live(self) -> np.ndarray:
        """int32 ``[layers, kv_heads, steps]``, live keys after each step."""
        return np.arange(1, self.steps + 1, dtype=np.int32) - _cumulative(self.gone)

    @property
    def attended(self) -> np.ndarray:
        """int32 ``[layers, kv_heads, steps]``, keys that the query of each step could attend to, its own included."""
        return np.arange(1, self.steps + 1, dtype=np.int32) - _cumulative(np.minimum(self.until, FOREVER - 1) + 1)

    @property
    def lifetime(self) -> np.ndarray:
        """int32, as ``until``: how many queries could attend to the key."""
        return np.minimum(self.until, self.steps) - np.arange(self.steps, dtype=np.int32)

    @property
    def regretted(self) -> np.ndarray:
        """bool, as ``until``: evicted, and a later query would have found the key important."""
        return self.needed > self.until

    @property
    def overflow(self) -> np.ndarray:
        """int32 ``[layers, kv_heads]``, keys that went for want of a slot."""
        return self.lost.sum(-1, dtype=np.int32)

    def history(self) -> np.ndarray:
        """Bool ``[layers, kv_heads, steps, keys]``: whether key i is live after each step (see `kept`)."""
        clock = np.arange(1, self.steps + 1, dtype=np.int32)[:, None]
        arrived = np.arange(self.steps, dtype=np.int32) < clock
        return arrived & (clock < self.gone[..., None, :])


def replay(
    trace: Trace,
    policy: Policy | Sequence[Policy],
    *,
    fidelity: str = "renormalized",
    capacity: int | None = None,
    chunk: int = 1,
    prompt: int | None = None,
    errors: bool = True,
    keep_history: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Replay:
    """Replays a policy over a trace.

    Args:
      trace: what to replay.
      policy: one for all layers, or one for each.
      fidelity: ``"renormalized"`` or ``"recorded"``, see above.
      capacity: slots a key-value head; without one, nothing overflows.
      chunk: tokens between evictions; 1 is the exact recurrence.
      prompt: how many of the tokens are the prompt, for policies that wait for its end: they evict after the chunk in
        which it lies.
      errors: measure the outputs' errors too, where the trace holds values. Takes about half as much time again.
      keep_history: fill in ``kept``: layers x kv_heads x steps^2 bytes.
      progress: called with the number of layers done.

    Raises:
      CormError: for an unknown fidelity, or a capacity, chunk or prompt that cannot work.
      TraceError: when a layer of the trace cannot be read.

    >>> import numpy as np
    >>> from corm_jax import Corm
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.normal(size=(1, 8, heads, 4)) for heads in (2, 1, 1))      # one layer, 8 steps
    >>> result = replay(Trace.from_qkv(q, k, v), Corm(window=3, recent=2))
    >>> result
    Replay(layers=1, kv_heads=1, steps=8, kept=0.875, mass=0.986, error=0.033, overflow=0)
    >>> result.live[0, 0]
    array([1, 2, 3, 4, 5, 6, 6, 7], dtype=int32)
    >>> int(result.regretted.sum())
    1
    """
    given = [policy] if isinstance(policy, Policy | str | type) else policy
    chunk, prompt = _checked(trace, given, fidelity, capacity, chunk, prompt)
    policies = per_layer(policy, trace.meta.layers)
    result = _run(trace, policies, _compiled, fidelity, capacity, chunk, prompt, errors, progress)
    return result._replace(kept=result.history()) if keep_history else result


def sweep(
    trace: Trace,
    policy_factory: Callable[..., Policy],
    grid: Mapping[str, Sequence[Any]],
    *,
    fidelity: str = "renormalized",
    capacity: int | None = None,
    chunk: int = 1,
    prompt: int | None = None,
    errors: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Replay:
    """Replays a whole grid of hyperparameters at once: one `jax.vmap` over the policies.

    Args:
      policy_factory: makes a policy from one value of each hyperparameter, given by name.
      grid: for each hyperparameter its values. Those that are static in the policy cannot be swept together.

    Other arguments as for `replay`. In the result each array has the axes of the grid in front, in its order.

    >>> from corm_jax import Corm
    >>> from simulator.synthetic import noise
    >>> grid = {"window": [2, 4, 8], "recent": [1, 2]}
    >>> result = sweep(noise(layers=1, steps=16), Corm, grid)
    >>> result
    Replay(grid=(3, 2), layers=1, kv_heads=2, steps=16, kept=0.531..0.844, mass=0.675..0.944, overflow=0)
    >>> result.live[..., -1].shape                                  # [window, recent, layers, kv_heads]
    (3, 2, 1, 2)
    """
    for name, values in grid.items():
        if np.isscalar(values) or not len(values):
            raise CormError(f"the grid has {name}={values!r}: give a list of at least one value for each name")
    if not grid:
        raise CormError("the grid is empty: give at least one name with its values")
    points = [policy_factory(**dict(zip(grid, point, strict=True))) for point in product(*grid.values())]
    structures = {jax.tree.structure(point) for point in points}
    if len(structures) > 1:
        raise CormError(
            f"the grid over {', '.join(grid)} varies a choice that is static in the policy: sweep each value by itself"
        )
    if any(len({is_share(one) for one in leaves}) > 1 for leaves in zip(*map(jax.tree.leaves, points), strict=True)):
        raise CormError(f"the grid over {', '.join(grid)} mixes whole numbers and shares: sweep each kind by itself")
    chunk, prompt = _checked(trace, points, fidelity, capacity, chunk, prompt)
    layers = list(zip(*(per_layer(point, trace.meta.layers) for point in points), strict=True))
    # A number that is the same at all points gets no axis for them: what hangs on it alone is computed once.
    leaves = [zip(*map(jax.tree.leaves, layer), strict=True) for layer in layers]
    differ = [
        any(not np.array_equal(x, one[0]) for one in of_layers for x in one) for of_layers in zip(*leaves, strict=True)
    ]
    policies = [jax.tree.map(lambda *numbers: jnp.stack(jnp.broadcast_arrays(*numbers)), *layer) for layer in layers]
    compiled = partial(_compiled_grid, points=len(points), differ=tuple(differ))
    result = _run(trace, policies, compiled, fidelity, capacity, chunk, prompt, errors, progress)
    shape = tuple(len(values) for values in grid.values())

    def arrange(x):  # [layers, points, ...] -> [*grid, layers, ...]
        x = np.moveaxis(x, 1, 0)
        return x.reshape(*shape, *x.shape[1:])

    return jax.tree.map(arrange, result)


def _checked(
    trace, policies: Sequence[Any], fidelity: str, capacity: int | None, chunk: int, prompt: int | None
) -> tuple[int, int]:
    """Raises for arguments that cannot work. Returns the chunk, no longer than the trace, and where the prompt ends."""
    if not isinstance(trace, Trace):
        raise CormError(f"{trace!r} is not a Trace: read one with Trace.open(path)")
    if fidelity not in FIDELITIES:
        raise CormError(
            f"fidelity must be {' or '.join(map(repr, FIDELITIES))}, not {fidelity!r} (live is the model itself)"
        )
    at_least(1, chunk=chunk, **({} if capacity is None else {"capacity": capacity}))
    for policy in policies:
        if isinstance(policy, type) or not isinstance(policy, Policy):
            raise CormError(
                f"{policy!r} is not a policy: give an object such as Corm(window=64), or corm_jax.parse(spec)"
            )
        if counts_in_cache(policy):
            raise CormError(
                f"a trace holds keys that are rotated already: replay {policy!r} with positions='original', under "
                "which the same keys stay"
            )
        if policy.traits.merges:
            raise CormError(f"{name_of(policy)} merges keys, and a trace holds them as they were: read it in a cache")
        for name, leaf in numbers_in(policy).items():
            layers, kv_heads = trace.meta.layers, trace.meta.kv_heads
            if np.shape(leaf) not in ((), (kv_heads,), (layers, kv_heads)):
                raise CormError(
                    f"{type(policy).__name__}.{name} has the shape {np.shape(leaf)}: give a number, or one for each "
                    f"of the {kv_heads} key-value heads, or for each of them in {layers} layers"
                )
    chunk = min(int(chunk), trace.meta.steps)
    slots_for(policies, capacity, trace.meta.steps, chunk)
    return chunk, prompt_of(policies, prompt, trace.meta.steps)


def _run(trace, policies, compiled, fidelity, capacity, chunk, prompt, errors, progress) -> Replay:
    meta = trace.meta

    def by_step(x):  # [..., padded, kv_heads, group] -> [..., q_heads, steps]
        return np.moveaxis(x.reshape(*x.shape[:-2], -1), -2, -1)[..., : meta.steps]

    layers = []
    for index, policy in enumerate(policies):
        block, moments = planned(policy) if chunk == 1 else (-(-STEPS_PER_BLOCK // chunk) * chunk, None)
        padding = -meta.steps % block
        layer = _padded(trace.layer(index), meta.kv_heads, padding)
        until, lost, needed, mass, error = jax.tree.map(
            np.asarray,
            compiled(
                policy,
                layer,
                jnp.float32(meta.scale or 1),
                jnp.int32(meta.steps),
                None if capacity is None else jnp.int32(capacity),
                jnp.int32(prompt),
                chunk=chunk,
                block=block,
                moments=moments,
                fidelity=fidelity,
                errors=errors and isinstance(layer, QKV),
            ),
        )
        until, lost, needed = (x[..., : meta.steps] for x in (until, lost, needed))
        layers.append((until, lost, needed, by_step(mass), None if error is None else by_step(error)))
        progress(index + 1)
    until, lost, needed, mass, error = jax.tree.map(lambda *x: np.stack(x), *layers)
    return Replay(until, lost, mass, error, needed)


def _padded(layer: QKV | Rows, kv_heads: int, padding: int) -> QKV | Rows:
    """Splits query heads into ``kv_heads group``, and pads the steps: ``q [steps, kv_heads, group, head_dim]``."""
    if isinstance(layer, Rows):
        rows = layer.probs.reshape(kv_heads, -1, *layer.probs.shape[1:])
        return Rows(np.pad(rows, ((0, 0), (0, 0), (0, padding), (0, padding))))
    q = layer.q.reshape(layer.q.shape[0], kv_heads, -1, layer.q.shape[-1])
    return QKV(*(np.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))) for x in (q, layer.k, layer.v)))


_STATIC = ("chunk", "block", "moments", "fidelity", "errors")
_compiled = jax.jit(replay_layer, static_argnames=_STATIC)


@partial(jax.jit, static_argnames=(*_STATIC, "points", "differ"))
def _compiled_grid(policies, layer, scale, steps, capacity, prompt, *, points, differ, **static):
    """``differ`` says which numbers of the policies, in the order of the pytree, are not the same at all points."""
    numbers, structure = jax.tree.flatten(policies)
    numbers = [number if differs else number[0] for number, differs in zip(numbers, differ, strict=True)]
    axes = [0 if differs else None for differs in differ]

    def one(numbers):
        return replay_layer(structure.unflatten(numbers), layer, scale, steps, capacity, prompt, **static)

    return jax.vmap(one, in_axes=(axes,), axis_size=points)(numbers)


def _range(values: np.ndarray, how: str) -> str:
    """One number, or the least and the largest of a grid, if they differ."""
    low, high = (format(value, how) for value in (np.min(values), np.max(values)))
    return low if low == high else f"{low}..{high}"


def _cumulative(clock: np.ndarray) -> np.ndarray:
    """How many entries of the last axis are at most 1, 2, ..., n."""
    steps = clock.shape[-1]
    rows = clock.reshape(-1, steps)
    counts = np.stack([np.bincount(row[row <= steps], minlength=steps + 1)[1:] for row in rows])
    return counts.cumsum(-1, dtype=np.int32).reshape(clock.shape)
