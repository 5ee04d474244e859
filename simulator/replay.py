"""Replay: any policy over a recorded trace, and what its evictions cost.

A trace holds what a model attended to with a full cache. A replay reads it token by token (or chunk by chunk) with the
same policy objects as the model's own cache, under `jax.lax.scan`, one layer at a time. There are no slots to manage:
key i has slot i, and of an evicted key only the clock of its eviction is stored. So a replay is also a second,
independent implementation of what `corm_jax.core.cache` should do.

There are three fidelities, from the cheapest to the most faithful:

- ``recorded``: the attention as it was recorded. Evicted keys get none; the others keep their probabilities.
- ``renormalized``: the softmax over the keys that are left. Exact for each layer by itself. In a model, evictions also
  change the queries of later layers; this effect is left out.
- ``live``: the model itself with the policy in its cache (`corm_jax.runs.perplexity`). This is not a replay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.core.arrays import ENDLESS
from corm_jax.core.capacity import slots_for
from corm_jax.core.exact import FOREVER, planned
from corm_jax.core.options import at_least, is_share, numbers_in
from corm_jax.core.policy import Policy
from corm_jax.core.prompt import prompt_of
from corm_jax.core.step import counts_in_cache
from corm_jax.core.wrapper import in_short, name_of
from corm_jax.errors import CormError
from corm_jax.showing.brief import between, leaves, line, table
from corm_jax.showing.labelled import Variable, dataset
from corm_jax.traces.meta import QKV, Rows
from corm_jax.traces.trace import Trace
from simulator.forms import form_of, policies_of
from simulator.recurrence import replay_layer

if TYPE_CHECKING:
    import xarray

FIDELITIES = ("renormalized", "recorded")

STEPS_PER_BLOCK = 64
"""Queries whose logits are computed at once, rounded up to a multiple of the chunk. Does not change results."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class About:
    """What was replayed, and how. It is static: in a pytree of replays it is not a leaf.

    Attributes:
      policy: its short form.
      model: the model that made the trace.
      fidelity, capacity, chunk, prompt: as in `replay`.
      pieces: the text of each token, if the trace holds it.
      local: which layers have a window, and hold what it shows, whatever the policy.
      grid: for a sweep, the values of each hyperparameter, in the order of the axes.
    """

    policy: str
    model: str
    fidelity: str
    capacity: int | None
    chunk: int
    prompt: int | None
    pieces: tuple[str, ...] | None = field(default=None, repr=False, compare=False)
    local: tuple[int, ...] = ()
    grid: dict[str, list[Any]] = field(default_factory=dict, compare=False)


class Replay(NamedTuple):
    """Which keys a policy kept in a trace, and for how long. A sweep has the axes of its grid in front.

    ``until`` and ``lost`` determine every eviction; the properties are computed from them, and `to_xarray` gives names
    to the axes. Clocks count from 1. The short form shows the policy, the share of the keys that are live at the end,
    the means of mass and error, and the overflow, without local layers; for a sweep, the range of each over the
    grid.

    Attributes:
      until: int32 ``[layers, kv_heads, keys]``, the clock of the last query that could attend to the key; `FOREVER` if
        it is live at the end.
      lost: bool ``[layers, kv_heads, keys]``, whether the key was evicted for lack of a slot.
      mass: float32 ``[layers, q_heads, steps]``, the share of the full cache's attention that falls on keys that are
        still held.
      error: float32 ``[layers, q_heads, steps]``, ``|o - o_full| / |o_full|`` of the attention outputs; None if the
        trace holds no values, or with ``errors=False``.
      needed: int32 ``[layers, kv_heads, keys]``, the clock of the last query that, with the full cache, found the key
        important (alpha >= 1/t for a query head of its group); 0 if no query did.
      kept: bool ``[layers, kv_heads, steps, keys]``, which keys are live after each step; None without
        ``keep_history``.
      about: what was replayed, and how.
    """

    until: np.ndarray
    lost: np.ndarray
    mass: np.ndarray
    error: np.ndarray | None
    needed: np.ndarray
    kept: np.ndarray | None = None
    about: About | None = None

    def __repr__(self) -> str:
        if not self._whole:
            return leaves("Replay", self[:6])
        *grid, layers, kv_heads, steps = self.until.shape
        policy = [self.about.policy] if self.about else []
        shape = {"grid": tuple(grid) or None, "layers": layers, "kv_heads": kv_heads, "steps": steps}
        return line("Replay", *policy, **shape, **self._summary)

    def _repr_html_(self) -> str | None:
        if not self._whole:
            return None
        *grid, layers, kv_heads, steps = self.until.shape
        about = self.about
        names = list(about.grid) if about else []
        rows = {
            "policy": about and about.policy,
            "grid": ", ".join(f"{size} values of {name}" for name, size in zip(names, grid, strict=True)) or None,
            "model": (about and about.model) or None,
            "shape": f"{layers} layers, {kv_heads} key-value heads, {steps:,} tokens",
            "local layers": (about and ", ".join(map(str, about.local))) or None,
            "replayed": about and f"{about.fidelity}, chunks of {about.chunk}",
        }
        means = {
            "kept": "keys live at the end, share",
            "mass": "attention that fell on live keys, share",
            "error": "relative error of the outputs",
            "overflow": "keys evicted for lack of a slot",
        }
        return table("Replay", rows | {means[name]: value for name, value in self._summary.items()})

    @property
    def _whole(self) -> bool:
        """Whether the fields are arrays of numbers, and not, for example, shapes or traced arrays."""
        return all(isinstance(x, np.ndarray) and x.ndim > 2 for x in self[:3])

    @property
    def _summary(self) -> dict[str, str | None]:
        """Means over global layers, heads and steps; for a sweep, the range of each over the grid."""
        each, own = (-3, -2, -1), self.without_local()
        error = None if own.error is None else between(own.error.mean(each, dtype=np.float64), ".3f")
        return {
            "kept": between((own.until == FOREVER).mean(each), ".3f"),
            "mass": between(own.mass.mean(each, dtype=np.float64), ".3f"),
            "error": error,
            "overflow": between(own.overflow.sum((-2, -1)), "d"),
        }

    @property
    def global_layers(self) -> list[int]:
        """The layers on which the policy has decided: those that are not local, or all if all are local."""
        layers, local = range(self.until.shape[-3]), self.about.local if self.about else ()
        return [layer for layer in layers if layer not in local] or [*layers]

    def without_local(self) -> "Replay":
        """The same of the global layers alone."""
        if not (self.about and self.about.local):
            return self
        own, about = self.global_layers, replace(self.about, local=())
        until, lost, mass, error, needed = (None if x is None else x.take(own, axis=-3) for x in self[:5])
        kept = None if self.kept is None else self.kept.take(own, axis=-4)
        return Replay(until, lost, mass, error, needed, kept, about)  # pyright: ignore

    def to_xarray(self) -> "xarray.Dataset":
        """The replay as a dataset with named axes: ``layer``, ``kv_head``, ``q_head``, ``step`` and ``token``.

        ``step`` is the clock of a query, from 1, and ``token`` the position of a key, from 0: the query at step t is
        that of token t - 1. A sweep has the axes of its grid in front, with their values. If the trace holds its text,
        the coordinate ``piece`` is the text of each token. Needs ``pip install 'corm-jax[xarray]'``.

        >>> from corm_jax import Corm
        >>> from simulator.synthetic import noise
        >>> found = sweep(noise(layers=2, steps=16), Corm, {"window": [2, 4, 8]}).to_xarray()
        >>> found.live.sel(window=4, step=16).dims
        ('layer', 'kv_head')
        >>> found.attrs["policy"]
        'Corm'
        """
        about = self.about
        q_heads, kv_heads = self.mass.shape[-2], self.until.shape[-2]
        keys, queries = "layer kv_head token", "layer q_head step"
        variables = {
            "live": Variable("layer kv_head step", self.live, "live keys after the query", "keys"),
            "mass": Variable(queries, self.mass, "share of the full cache's attention that fell on live keys"),
            "error": Variable(queries, self.error, "relative error of the attention output"),
            "until": Variable(keys, self.until, "last query that could attend to the key", "queries"),
            "lifetime": Variable(keys, self.lifetime, "queries that could attend to the key", "queries"),
            "needed": Variable(keys, self.needed, "last query to which the key is important", "queries"),
            "regretted": Variable(keys, self.regretted, "evicted, and important to a later query"),
            "lost": Variable(keys, self.lost, "evicted for lack of a slot"),
            "kept": Variable("layer kv_head step token", self.kept, "live after the query"),
        }
        coords = {
            "step": np.arange(1, self.steps + 1),
            "kv_head_of": ("q_head", np.arange(q_heads) * kv_heads // q_heads),
        }
        attrs: dict[str, Any] = {"live_until": int(FOREVER)}
        if about:
            coords |= {"piece": ("token", list(about.pieces))} if about.pieces else {}
            names = ("policy", "model", "fidelity", "capacity", "chunk", "prompt")
            attrs |= {name: getattr(about, name) for name in names}
        return dataset(variables, coords=coords, attrs=attrs, grid=about.grid if about else None)

    def point(self, *index: int) -> "Replay":
        """One point of a sweep, by its index on each axis of the grid."""
        if self.about is None or len(index) != len(self.about.grid):
            names = ", ".join(self.about.grid) if self.about else ""
            raise CormError(f"a point of this sweep takes an index on each axis of its grid ({names}), not {index}")
        values = [choices[place] for choices, place in zip(self.about.grid.values(), index, strict=True)]
        named = ", ".join(f"{name}={value}" for name, value in zip(self.about.grid, values, strict=True))
        about = replace(self.about, policy=f"{self.about.policy}({named})", grid={})
        fields = zip(self._fields[:6], self[:6], strict=True)
        return self._replace(about=about, **{name: x[index] for name, x in fields if x is not None})

    @property
    def steps(self) -> int:
        """Tokens in the trace."""
        return self.until.shape[-1]

    @property
    def gone(self) -> np.ndarray:
        """int32, as ``until``: the clock of the step after which the key is not live any more, or `FOREVER`."""
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
        """bool, as ``until``: whether the key was evicted although a later query would have found it important."""
        return self.needed > self.until

    @property
    def overflow(self) -> np.ndarray:
        """int32 ``[layers, kv_heads]``, keys that were evicted for lack of a slot."""
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
      policy: one for all layers, or one for each. Layers with a window hold what it shows, whatever the policy, and
        have as many slots as they need: `corm_jax.of_layers`.
      fidelity: ``"renormalized"`` or ``"recorded"``, see `simulator.replay`.
      capacity: slots of each key-value head; None for as many as are needed.
      chunk: tokens between evictions; 1 is the exact recurrence.
      prompt: how many of the tokens are the prompt, for policies that wait for its end: they evict after the chunk in
        which it ends. None if that is unknown.
      errors: whether to measure the errors of the outputs, too, if the trace holds values. The replay then takes about
        one and a half times as long.
      keep_history: whether to fill in ``kept``, which takes layers x kv_heads x steps^2 bytes.
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
    Replay(Corm(window=3, recent=2), layers=1, kv_heads=1, steps=8, kept=0.875, mass=0.986, error=0.033, overflow=0)
    >>> result.live[0, 0]
    array([1, 2, 3, 4, 5, 6, 6, 7], dtype=int32)
    >>> int(result.regretted.sum())
    1
    """
    given = [policy] if isinstance(policy, Policy | str | type) else policy
    chunk, prompt = _checked(trace, given, fidelity, capacity, chunk, prompt)
    policies = policies_of(trace.meta, policy)
    result = _run(trace, policies, _compiled, fidelity, capacity, chunk, prompt, errors, progress)
    about = _about(trace, in_short(policy), fidelity, capacity, chunk, prompt, {})
    return result._replace(about=about, kept=result.history() if keep_history else None)


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
      grid: the values of each hyperparameter. One that is static in the policy can only have a single value.

    The other arguments are those of `replay`. In the result each array has the axes of the grid in front, in the order
    of ``grid``; `Replay.to_xarray` names them, and `Replay.point` is the replay of one point.

    >>> from corm_jax import Corm
    >>> from simulator.synthetic import noise
    >>> grid = {"window": [2, 4, 8], "recent": [1, 2]}
    >>> result = sweep(noise(layers=1, steps=16), Corm, grid)
    >>> result
    Replay(Corm, grid=(3, 2), layers=1, kv_heads=2, steps=16, kept=0.531..0.844, mass=0.675..0.944, overflow=0)
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
    layers = list(zip(*(policies_of(trace.meta, point) for point in points), strict=True))
    # A number that is the same at all points is not mapped over: what depends on it alone is computed once.
    differ: dict[Any, np.ndarray] = {}  # for each kind of layer: they share a program
    for layer in layers:
        leaves = zip(*map(jax.tree.leaves, layer), strict=True)
        found = np.array([any(not np.array_equal(x, one[0]) for x in one) for one in leaves], bool)
        kind = jax.tree.structure(layer[0])
        differ[kind] = differ.get(kind, found) | found
    policies = [jax.tree.map(lambda *numbers: jnp.stack(jnp.broadcast_arrays(*numbers)), *layer) for layer in layers]

    def compiled(policy, *arguments, **options):
        axes = tuple(differ[jax.tree.structure(policy)].tolist())
        return _compiled_grid(policy, *arguments, points=len(points), differ=axes, **options)

    result = _run(trace, policies, compiled, fidelity, capacity, chunk, prompt, errors, progress)
    shape = tuple(len(values) for values in grid.values())

    def arrange(x):  # [layers, points, ...] -> [*grid, layers, ...]
        x = np.moveaxis(x, 1, 0)
        return x.reshape(*shape, *x.shape[1:])

    name, values = name_of(points[0]), {name: list(values) for name, values in grid.items()}
    about = _about(trace, name, fidelity, capacity, chunk, prompt, values)
    return jax.tree.map(arrange, result)._replace(about=about)


def _checked(
    trace, policies: Sequence[Any], fidelity: str, capacity: int | None, chunk: int, prompt: int | None
) -> tuple[int, int]:
    """Raises for arguments that cannot work. Returns the chunk, at most the whole trace, and the end of the prompt."""
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
            raise CormError(
                f"{name_of(policy)} merges keys, and a trace holds the keys unmerged: use the policy in a cache instead"
            )
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


def _about(trace, policy, fidelity, capacity, chunk, prompt, grid) -> About:
    ends = None if prompt == ENDLESS else prompt
    return About(policy, trace.meta.model, fidelity, capacity, chunk, ends, trace.meta.pieces, trace.meta.local, grid)


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
                form_of(meta, index),
                jnp.int32(meta.steps),
                None if capacity is None or index in meta.local else jnp.int32(capacity),
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
def _compiled_grid(policies, layer, form, steps, capacity, prompt, *, points, differ, **static):
    """Replays a layer at all points. ``differ``: for each leaf of the policies, whether it differs between points."""
    numbers, structure = jax.tree.flatten(policies)
    numbers = [number if differs else number[0] for number, differs in zip(numbers, differ, strict=True)]
    axes = [0 if differs else None for differs in differ]

    def one(numbers):
        return replay_layer(structure.unflatten(numbers), layer, form, steps, capacity, prompt, **static)

    return jax.vmap(one, in_axes=(axes,), axis_size=points)(numbers)


def _cumulative(clock: np.ndarray) -> np.ndarray:
    """How many entries of the last axis are at most 1, 2, ..., n."""
    steps = clock.shape[-1]
    rows = clock.reshape(-1, steps)
    counts = np.stack([np.bincount(row[row <= steps], minlength=steps + 1)[1:] for row in rows])
    return counts.cumsum(-1, dtype=np.int32).reshape(clock.shape)
