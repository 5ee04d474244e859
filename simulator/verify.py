"""Proof on a real trace: the replay, the cache and the specification in NumPy agree, and the invariants hold."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.core.arrays import ENDLESS, iota
from corm_jax.core.attention import PLAIN
from corm_jax.core.cache import make_cache
from corm_jax.core.options import map_numbers
from corm_jax.core.policy import Policy
from corm_jax.core.prompt import begin_prompt
from corm_jax.core.step import step
from corm_jax.core.types import CacheSpec
from corm_jax.errors import CormError
from corm_jax.policies import Corm, Window
from corm_jax.traces.arrays import TraceError
from corm_jax.traces.meta import QKV, Meta
from corm_jax.traces.trace import Trace
from simulator import invariants
from simulator.forms import form_of, global_layers, in_numpy, policies_of
from simulator.invariants import InvariantError
from simulator.replay import Replay, replay
from simulator.specification import Reference, readings, specified

CLOSE = 2e-5
"""The largest error of alpha n in float32. If alpha n is nearer to the threshold, either verdict is accepted."""


STAGES = 3
"""How many times each layer is read: by the replay, by the cache, and by the specification."""


class Finding(NamedTuple):
    """One claim, whether it holds on the trace, and the details."""

    name: str
    held: bool
    detail: str


def verify(
    trace: Trace,
    policy: Policy,
    *,
    reference: Reference | None = None,
    chunk: int = 1,
    capacity: int | None = None,
    prompt: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Finding]:
    """Replays a policy over a ``qkv`` trace and checks the result, layer by layer.

    - ``specification``: after every chunk each head keeps the same keys as the policy's specification in NumPy loops:
      ours, or the ``reference`` that is given, if any.
    - ``cache``: so does `corm_jax.step`, the cache that models use, fed with the same queries, keys and values.
    - the invariants of `simulator.invariants` that apply to the policy, for the keys in the cache.

    The specification takes seconds for a head of 512 steps, and its time grows with the square of the steps: cut a long
    trace. ``progress`` is called with the number of layers done, up to `STAGES` times the layers of the trace.

    >>> from simulator.synthetic import sinks
    >>> [(finding.name, finding.held) for finding in verify(sinks(layers=1, steps=32), Corm(window=4, recent=2))]
    [('specification', True), ('cache', True), ('none_returns', True), ('newest_live', True), ('none_early', True),
     ('important_keys_are_kept', True), ('unimportant_keys_are_evicted', True), ('monotone', True)]

    Raises:
      TraceError: for an ``attention`` trace, whose queries and keys are unknown.
      CormError: as `replay`.
    """
    if trace.meta.kind != "qkv":
        raise TraceError("an attention trace holds no queries and keys: the cache and the specification need them")
    if not isinstance(policy, Policy):
        raise CormError(f"{policy!r} is not a policy: verify one at a time, on layers that it is meant for")
    result = replay(trace, policy, chunk=chunk, capacity=capacity, prompt=prompt, errors=False, progress=progress)
    layers = trace.meta.layers
    chunk, prompt = min(chunk, trace.meta.steps), prompt or ENDLESS
    ends = np.minimum(np.arange(chunk, trace.meta.steps + chunk, chunk), trace.meta.steps)
    replayed = result.history()[:, :, ends - 1]
    cached = _cached(trace, policy, ends, chunk, capacity, prompt, partial(_after, progress, layers))
    findings = []
    if reference or specified(policy):
        how = {"chunks": np.diff(ends, prepend=0).tolist(), "capacity": capacity, "prompt": prompt}
        stage = partial(_after, progress, 2 * layers)
        findings.append(_specification(trace, policy, result, replayed, ends, how, reference, stage))
    claims = _claims(trace, policy, result, cached, ends, chunk, capacity)
    for name, claim in [("cache", partial(_alike, cached, replayed, ends)), *claims]:
        try:
            claim()
            layers, heads, steps, _ = cached.shape
            findings.append(Finding(name, True, f"{layers} layers, {heads} heads, {steps} steps"))
        except InvariantError as error:
            findings.append(Finding(name, False, str(error)))
    return findings


def _after(progress: Callable[[int], None], before: int, done: int) -> None:
    progress(before + done)


def _alike(cached, replayed, ends) -> None:
    invariants.same_decisions("cache", cached, replayed, "in the replay", ends)


def _specification(trace, policy, result: Replay, kept, ends, how, reference, progress) -> Finding:
    margin, heads = np.inf, 0
    for index in range(trace.meta.layers):
        q, k, v = (x.astype(np.float64) for x in _heads(trace, index))
        local = index in trace.meta.local
        own: dict[str, Any] = how | ({"capacity": None} if local else {"reference": reference})
        one, place = _rule(trace.meta, policy, index)
        layer = readings(one, q, k, v, **own, **place, form=in_numpy(trace.meta, index))
        for head, expected in enumerate(layer):
            margin, heads = min(margin, expected.margin), heads + 1
            differs = [i for i, keys in enumerate(expected.kept) if keys != set(np.flatnonzero(kept[index, head, i]))]
            if differs or expected.overflow != result.overflow[index, head]:
                where = f"layer {index}, head {head}, clock {ends[differs[0]] if differs else ends[-1]}"
                what = "other keys than in NumPy" if differs else "another overflow than in NumPy"
                return Finding("specification", False, f"{where}: {what} (closest comparison {expected.margin:.0e})")
        progress(index + 1)
    return Finding(
        "specification", True, f"{heads} heads x {len(ends)} steps: the same keys; closest comparison {margin:.0e}"
    )


def _rule(meta: Meta, policy: Policy, index: int) -> tuple[Policy, dict[str, Any]]:
    """The policy of a layer for the specification, and which of the layers with that policy it is, of how many."""
    if index in meta.local:
        return Window(size=meta.windows[index]), {}  # pyright: ignore
    layers = global_layers(meta)
    own = map_numbers(lambda x: x[index] if np.ndim(x) == 2 else x, policy)
    return own, {"layer": layers.index(index), "layers": len(layers)}


def _heads(trace: Trace, index: int) -> QKV:
    """A layer with queries by head, ``[steps, kv_heads, group, head_dim]``, for a scale of ``head_dim ** -0.5``."""
    meta, layer = trace.meta, cast(QKV, trace.layer(index))
    q = layer.q * np.float32((meta.scale or 1) * (meta.head_dim or 1) ** 0.5)
    return QKV(q.reshape(meta.steps, meta.kv_heads, -1, meta.head_dim or 1), layer.k, layer.v)


def _cached(trace, policy, ends, chunk, capacity, prompt, progress) -> np.ndarray:
    """The keys in the cache after each chunk: bool ``[layers, kv_heads, chunks, keys]``."""
    meta = trace.meta
    held = np.zeros((meta.layers, meta.kv_heads, len(ends), meta.steps), bool)
    for index, one in enumerate(policies_of(meta, policy)):
        padding = [(0, -meta.steps % chunk)]
        q, k, v = (np.pad(x, padding + [(0, 0)] * (x.ndim - 1)) for x in _heads(trace, index))
        slots = _slots(meta, index, chunk, capacity)
        form = form_of(meta, index)._replace(scale=None)
        _, position, _ = drive(one, q, k, v, meta.steps, prompt, form, capacity=slots, chunk=chunk)
        position = np.asarray(position)
        at, head, slot = np.nonzero(position >= 0)
        held[index, head, at, position[at, head, slot]] = True
        progress(index + 1)
    return held


def _slots(meta: Meta, index: int, chunk: int, capacity: int | None) -> int:
    """A local layer has no more slots than its window and a chunk need."""
    if index in meta.local:
        return min(meta.windows[index] - 1, meta.steps) + chunk  # pyright: ignore
    return capacity or meta.steps + chunk


@partial(jax.jit, static_argnames=("capacity", "chunk"))
def drive(policy, q, k, v, count, prompt=ENDLESS, form=PLAIN, *, capacity, chunk):
    """Reads one layer through the cache, chunk by chunk.

    Args:
      q: ``[padded, kv_heads, group, head_dim]``; k, v: ``[padded, kv_heads, head_dim]``. ``chunk`` divides ``padded``.
      count: how many tokens are real.
      prompt: how many are the prompt.
      form: that of the attention.

    Returns:
      Outputs, as ``q``; positions ``[chunks, kv_heads, capacity]`` after each chunk; the final cache.
    """
    cache = make_cache(policy, CacheSpec(k.shape[1], capacity, k.shape[2]), tokens=len(q))
    cache = begin_prompt(cache, prompt)
    more = {"scale": form.scale, "softcap": form.softcap, "window": form.window}

    def body(cache, xs):
        q, k, v, start = xs
        here = jnp.clip(count - start, 0, chunk)
        output, cache = step(policy, cache, q, k, v, here, form.encoding, **more)
        return cache, (output, cache.position)

    cut = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (q, k, v))
    last, (outputs, position) = jax.lax.scan(body, cache, (*cut, chunk * iota(len(q) // chunk)))
    return outputs.reshape(q.shape), position, last


def _claims(trace, policy: Any, result: Replay, kept, ends, chunk, capacity):
    yield "none_returns", lambda: invariants.none_returns(kept, ends)
    layers = global_layers(trace.meta)
    kept = kept[layers]
    if capacity is not None:
        yield "within_capacity", lambda: invariants.within_capacity(kept, capacity, ends)
    if type(policy) is not Corm or not layers:
        return
    corm = cast(Corm, map_numbers(lambda x: np.asarray(x)[layers] if np.ndim(x) == 2 else x, policy))
    yield "newest_live", lambda: invariants.newest_live(kept, corm.recent, ends)
    if capacity is None:
        if not np.any(corm.eager):
            yield "none_early", lambda: invariants.none_early(kept, corm.window, ends)
        loose, strict = (_importance(trace, policy, result, slack) for slack in (CLOSE, -CLOSE))
        yield "important_keys_are_kept", lambda: invariants.important_keys_are_kept(kept, strict, corm.window, ends)
        if not np.any(corm.eager):
            yield (
                "unimportant_keys_are_evicted",
                lambda: invariants.unimportant_keys_are_evicted(kept, loose, corm.window, corm.recent, ends),
            )
    if not np.any(corm.eager) and corm.threshold == "position" and capacity is None:
        yield "monotone", lambda: _monotone(trace, policy, ends, chunk)


def _importance(trace, policy, result: Replay, slack: float) -> np.ndarray:
    """As `simulator.invariants.importance`, of the global layers."""
    meta, layers = trace.meta, []
    clock = np.arange(1, meta.steps + 1)[:, None]
    slopes = None if meta.slopes is None else np.reshape(meta.slopes, (meta.kv_heads, meta.group))
    form = {"scale": meta.scale, "softcap": meta.softcap, "slopes": slopes}
    for index in global_layers(meta):
        layer = trace.layer(index)
        attended = (np.arange(meta.steps) < clock) & (result.until[index][:, None] >= clock)
        q = layer.q.reshape(meta.steps, meta.kv_heads, -1, meta.head_dim)
        corm = policies_of(meta, policy)[index]
        choices = {name: getattr(corm, name) for name in ("multiple", "group", "threshold")}
        layers.append(invariants.importance(q, layer.k, attended, slack=slack, **form, **choices))
    return np.stack(layers)


def _monotone(trace, policy, ends, chunk) -> None:
    larger = dataclasses.replace(policy, window=2 * policy.window, recent=2 * policy.recent)
    kept = [replay(trace, each, fidelity="recorded", chunk=chunk, errors=False).history() for each in (policy, larger)]
    small, large = (one[:, :, ends - 1] for one in kept)
    invariants.subset(small, large, "with w and r twice as large", ends)
