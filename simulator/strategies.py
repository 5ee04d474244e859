"""Hypothesis strategies for policies and histories. Failures shrink to cases that can be read.

A case is given by the logits of each query: 0 for all keys but a few. Keys are unit vectors, one for each position, so
that a query is its row of logits and the output of attention is the attention itself.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from corm_jax.traces.trace import Trace

TOKENS = 16
"""Every case is padded to this many tokens, so that one compile serves all."""

CHUNK = 3
"""The most tokens that a case reads in one step."""

KV_HEADS = GROUP = 2
GARBAGE = 7.0


@dataclass(frozen=True, eq=False)
class Case:
    """A history of one layer of one sequence: the logits, and the pieces in which it is read.

    Attributes:
      logits: float32 ``[kv_heads, group, queries, keys]``, of all `TOKENS`.
      counts: int32 ``[steps]``, tokens read in each step, 0 to `CHUNK`; their sum is the length of the sequence.
      prompt: how many of the tokens are the prompt.
    """

    logits: np.ndarray
    counts: np.ndarray
    prompt: int

    @property
    def tokens(self) -> int:
        """How many tokens are read."""
        return int(self.counts.sum())

    @property
    def clock(self) -> np.ndarray:
        """Int ``[steps]``, tokens seen after each step."""
        return self.counts.cumsum()

    @property
    def q(self) -> np.ndarray:
        """Float32 ``[tokens, kv_heads, group, head_dim]``, padded with garbage by `CHUNK`; ``head_dim`` is `TOKENS`."""
        heads = 2.0 ** np.arange(KV_HEADS)[:, None, None, None]
        q = (self.logits * TOKENS**0.5 / heads).transpose(2, 0, 1, 3)
        return self._padded(q)

    @property
    def k(self) -> np.ndarray:
        """Float32 ``[tokens, kv_heads, head_dim]``, likewise: key i of head h is ``2^h`` at i."""
        return self._padded(np.eye(TOKENS)[:, None] * 2.0 ** np.arange(KV_HEADS)[:, None])

    @property
    def v(self) -> np.ndarray:
        """Float32 ``[tokens, kv_heads, head_dim]``, likewise: value i of head h is ``h + 1`` at i."""
        return self._padded(np.eye(TOKENS)[:, None] * (1.0 + np.arange(KV_HEADS)[:, None]))

    def _padded(self, x: np.ndarray) -> np.ndarray:
        padded = np.full((TOKENS + CHUNK, *x.shape[1:]), GARBAGE, np.float32)
        padded[: self.tokens] = x[: self.tokens]
        return padded

    def trace(self) -> Trace:
        """The case as a trace of one layer."""
        q, k, v = (x[: self.tokens][None] for x in (self.q, self.k, self.v))
        return Trace.from_qkv(q.reshape(1, self.tokens, -1, TOKENS), k, v)

    def _repr_pretty_(self, printer, cycle) -> None:  # how Hypothesis prints
        printer.text(repr(self))

    def __repr__(self) -> str:
        selfish = bool((self.logits[..., range(TOKENS), range(TOKENS)] == 6).all())
        looks = ["every query attends to its own key (logit 6)"] * selfish + [
            f"head {h}.{g}: query {t} looks at key {i} (logit {self.logits[h, g, t, i]:g})"
            for h, g, t, i in np.argwhere(self.logits)
            if i < t + (not selfish) and t < self.tokens
        ]
        prompt = f", {self.prompt} of them the prompt" if self.prompt < self.tokens else ""
        reads = f"reads {[int(n) for n in self.counts if n]} tokens{prompt}"
        return f"Case({reads}; " + "; ".join(looks or ["all look alike"]) + ")"


@st.composite
def cases(draw: st.DrawFn, *, counts: Sequence[int] | None = None) -> Case:
    """Cases, simple ones first: few logits that are not 0, then many at random.

    Args:
      counts: the pieces in which all cases are read; drawn if not given.
    """
    shape = (KV_HEADS, GROUP, TOKENS, TOKENS)
    share = draw(st.sampled_from([0, 0, 0.1, 0.3, 1.0]))  # the share of random logits; such cases are hard to read
    selfish = draw(st.sampled_from([True, False]))  # if not, queries with logits of 0 find all keys important
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    logits = rng.integers(1, 6, shape, endpoint=True) * (rng.random(shape) < share) * 1.0
    logits = (np.maximum(logits, 6 * np.eye(TOKENS)) if selfish else logits).astype(np.float32)
    place = st.tuples(*(st.integers(0, size - 1) for size in shape))
    for where, level in draw(st.lists(st.tuples(place, st.integers(1, 6)), max_size=40)):
        logits[where] = level
    pieces = np.asarray(draw(_counts()) if counts is None else counts, np.int32)
    return Case(logits, pieces, prompt=max(int(pieces.sum()) - draw(st.integers(0, TOKENS)), 1))


def typical(seed: int, chunk: int = 1) -> Case:
    """A case of `TOKENS` tokens that is not simple: logits at random places, read in pieces of one size."""
    rng = np.random.default_rng(seed)
    shape = (KV_HEADS, GROUP, TOKENS, TOKENS)
    logits = rng.integers(1, 6, shape, endpoint=True) * (rng.random(shape) < 0.3) * 1.0
    logits = np.maximum(logits, 6 * np.eye(TOKENS)) if seed % 2 else logits
    counts = np.minimum(chunk, np.maximum(TOKENS - chunk * np.arange(TOKENS), 0))
    return Case(logits.astype(np.float32), counts.astype(np.int32), prompt=int(rng.integers(TOKENS // 2, TOKENS)))


@st.composite
def _counts(draw: st.DrawFn) -> list[int]:
    if draw(st.booleans()):
        counts = draw(st.lists(st.integers(0, CHUNK), min_size=TOKENS, max_size=TOKENS))
    else:
        counts = [1] * draw(st.integers(1, TOKENS))
    total, fitting = 0, []
    for count in counts:
        fitting.append(min(count, TOKENS - total))
        total += fitting[-1]
    if not total:
        fitting[0] = 1
    return fitting + [0] * (TOKENS - len(fitting))


def traces(*, kind: str = "qkv", max_layers: int = 2) -> st.SearchStrategy[Trace]:
    """Traces of either kind, of up to ``max_layers`` layers and `TOKENS` steps.

    >>> from hypothesis import find
    >>> find(traces(kind="attention"), lambda trace: True).meta.steps
    1
    """

    def build(layers: list[Case]) -> Trace:
        tokens = min(case.tokens for case in layers)
        if kind == "qkv":
            q, k, v = (np.stack([getattr(case, name)[:tokens] for case in layers]) for name in "qkv")
            return Trace.from_qkv(q.reshape(len(layers), tokens, -1, TOKENS), k, v)
        logits = np.stack([case.logits[..., :tokens, :tokens] for case in layers])
        rows = np.tril(np.exp(logits))
        rows /= rows.sum(-1, keepdims=True)
        return Trace.from_attention(rows.reshape(len(layers), -1, tokens, tokens), kv_heads=KV_HEADS)

    return st.lists(cases(), min_size=1, max_size=max_layers).map(build)


def hyperparameters(kind: type, *, per_head: bool = False, **given: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Values for the fields of a policy's dataclass, small enough that keys are evicted within `TOKENS` tokens.

    The type of a default decides: whole numbers are drawn from 1 to 5, other numbers from 0.1 to 0.9, truth values from
    both, choices from those of `corm_jax.core.options.choice`. A value or strategy that is ``given`` is used instead.
    With ``per_head``, a field that is not static is an array with a number for each head, ``[KV_HEADS]``.

    Raises:
      ValueError: for a name that is no field, or a field without a default.

    >>> from corm_jax import Corm
    >>> from hypothesis import find
    >>> find(hyperparameters(Corm, recent=2), lambda options: options["window"] > 2)
    {'window': 3, 'recent': 2, 'multiple': 1, 'threshold': 'position', 'group': 'any', 'eager': False}
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(given.keys() - fields):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}: it has {', '.join(fields)}")

    def values(field: dataclasses.Field) -> st.SearchStrategy:
        if field.name in given:
            value = given[field.name]
            return value if isinstance(value, st.SearchStrategy) else st.just(value)
        if choices := field.metadata.get("choices"):
            return st.sampled_from(choices)
        numbers = {bool: st.booleans(), int: st.integers(1, 5), float: st.floats(0.1, 0.9)}.get(type(field.default))
        if numbers is None:
            raise ValueError(f"{kind.__name__}.{field.name} has no default of a known type: give {field.name}=...")
        if per_head and not field.metadata.get("static"):
            return st.tuples(*[numbers] * KV_HEADS).map(np.array)
        return numbers

    return st.fixed_dictionaries({name: values(field) for name, field in fields.items()})
