"""Holds an implementation of an eviction rule, in any framework, to the rule in NumPy: which keys does each head keep.

    from simulator.kept import check_kept

    check_kept(my_cache, "tova:budget=4", generated=(0, 6))

The implementation is a function that takes NumPy arrays and returns one: a few lines around a cache of PyTorch, a press
of kvpress, a kernel. This file needs NumPy and Hypothesis; JAX only where the rule is a SPEC or a policy.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, Unsatisfiable
from hypothesis.extra.numpy import arrays

from simulator import rules
from simulator.invariants import InvariantError
from simulator.reading import read_layer

Keeps = Callable[[np.ndarray, np.ndarray, np.ndarray, int], Any]
"""What says which keys are kept, see `check_kept`."""

NAME = "check_kept"


class Tried(NamedTuple):
    """What `check_kept` compared.

    Attributes:
      cases: how many histories.
      decisions: keys of heads, live or just arrived, each judged once in every step of these; evicted: how many of
        these the rule evicted.
      close: further histories that were left out, since a decision of the rule hangs on rounding.
      tied: further ones that were left out, since keys of equal score compete: with ``ties="any"``.
    """

    cases: int
    decisions: int
    evicted: int
    close: int
    tied: int


class Case(NamedTuple):
    """A history of one layer: ``q [tokens, kv_heads, group, head_dim]``, ``k, v [tokens, kv_heads, head_dim]``."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    prompt: int


def check_kept(
    function: Keeps,
    rule: Any,
    *,
    prompt: tuple[int, int] = (1, 12),
    generated: tuple[int, int] = (0, 0),
    kv_heads: Sequence[int] = (1, 2),
    group: Sequence[int] = (1, 2),
    head_dim: Sequence[int] = (4,),
    ties: str = "oldest",
    close: float = 1e-4,
    examples: int = 100,
    shrink: bool = True,
) -> Tried:
    """Searches for a history after which a function keeps other keys than a rule does, and shrinks it.

    A history is one layer of one sequence. Its prompt is read at once, and keys are evicted when all of its queries
    were answered; then one token at a time is read, and keys are evicted after each. Query t attends to the keys that
    were kept, and to those of its own chunk up to itself, by ``softmax(q . k / sqrt(head_dim))``. Queries and keys are
    taken as they are: rotated, if the model rotates.

    The function is called as ``function(queries, keys, values, prompt)``:

    - ``queries``: float32 ``[tokens, kv_heads, group, head_dim]``; the query heads of a group share a key-value head;
    - ``keys, values``: float32 ``[tokens, kv_heads, head_dim]``. Numbers are multiples of 1/4 from -3 to 3, which are
      exact in bfloat16 as well;
    - ``prompt``: how many of the tokens are the prompt; the others are generated.

    It returns which keys each head keeps, bool, of NumPy or anything that `numpy.asarray` takes: after the prompt and
    after every generated token, ``[1 + generated, kv_heads, tokens]``; or at the end alone, ``[kv_heads, tokens]``. The
    arrays are its own: it may write into them.

    Args:
      function: the implementation.
      rule: what it is held to. A SPEC or a policy, whose specification is looked up (`simulator.specification`); an
        object of a class of `simulator.rules`, of which every head gets a copy; or a function in NumPy of your own,
        called and returning as above, which is taken at its word: it has no scores, so that neither close calls nor
        ties are left out.
      prompt, generated: the fewest and the most tokens of each. Leave ``generated`` out for what compresses prompts and
        no more.
      kv_heads, group, head_dim: the sizes to try.
      ties: which of several keys with equal scores is evicted first. ``"oldest"``, as in our rules; or ``"any"``, which
        leaves out the histories in which that matters.
      close: the rule computes in float64. Where it compares numbers that differ, but by a smaller share than this,
        rounding may decide otherwise, and the history is left out. Raise it to 0.02 for bfloat16.
      examples: histories to compare.
      shrink: whether to look for the smallest history when one differs. That takes longer than finding the first.

    Returns:
      What was compared, and how much was left out.

    Raises:
      InvariantError: (an `AssertionError`) for the smallest history that was found on which the two differ: which head,
        at which clock (tokens read), which key; the rule's scores there; and code that shows it again. Also if the
        function raises, returns something else, or answers one history in two ways; and if there was nothing to
        compare: the rule evicted nothing, or every history was left out.

    >>> def newest(queries, keys, values, prompt):
    ...     tokens, heads, _ = keys.shape
    ...     kept = [np.arange(tokens) >= seen - 4 for seen in range(prompt, tokens + 1)]
    ...     read = [np.arange(tokens) < seen for seen in range(prompt, tokens + 1)]
    ...     return np.stack([kept] * heads, 1) & np.stack([read] * heads, 1)
    >>> check_kept(newest, "streaming_llm:sinks=0,budget=4", generated=(0, 5), examples=20).cases
    20
    >>> check_kept(newest, "streaming_llm:sinks=1,budget=4", prompt=(1, 5))
    Traceback (most recent call last):
        ...
    simulator.invariants.InvariantError: check_kept: head 0, clock 5, key 0: is evicted by newest, but kept by the ...
    """
    if ties not in ("oldest", "any"):
        raise ValueError(f"ties must be 'oldest' or 'any', not {ties!r}")
    count = dict.fromkeys(Tried._fields, 0)

    @settings(
        max_examples=examples,
        phases=[Phase.generate] + [Phase.shrink] * shrink,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(case=_cases(prompt, generated, kv_heads, group, head_dim))
    def run(case):
        expected, margin, tied = _judged(rule, case)
        count["close"] += margin <= close
        count["tied"] += bool(margin > close and tied and ties == "any")
        assume(margin > close and not (tied and ties == "any"))
        _compare(function, rule, case, expected)
        arrived = expected.shape[1] * len(case.k)
        count["cases"] += 1
        count["decisions"] += int(expected[:-1].sum()) + arrived
        count["evicted"] += arrived - int(expected[-1].sum())

    try:
        run()
    except Unsatisfiable:
        what = f"nothing was compared: of all histories {count['close']} hang on rounding, {count['tied']} on ties"
        raise InvariantError(NAME, what) from None
    except Flaky as error:
        raise InvariantError(NAME, f"{_name(function)} does not answer the same history in the same way") from error
    except InvariantError as error:
        error.__notes__ = []  # Hypothesis's account of the case, which the message has already
        raise
    if not count["evicted"]:
        what = (
            f"the rule evicts no key in any of {count['cases']} histories: give it a smaller budget, or longer prompts"
        )
        raise InvariantError(NAME, what)
    return Tried(**count)


def kept_by(rule: Any, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, prompt: int) -> np.ndarray:
    """What a rule keeps: bool ``[1 + generated, kv_heads, tokens]``. Arguments as in `check_kept`.

    >>> ones = np.ones((4, 1, 2))
    >>> kept_by("streaming_llm:sinks=1,budget=2", ones[:, :, None], ones, ones, prompt=3).astype(int)
    array([[[1, 0, 1, 0]],
           [[1, 0, 0, 1]]])
    """
    return _judged(rule, Case(queries, keys, values, prompt))[0]


@st.composite
def _cases(draw, prompt, generated, kv_heads, group, head_dim) -> Case:
    first = draw(st.integers(*prompt))
    tokens = first + draw(st.integers(*generated))
    heads, size, each = (draw(st.sampled_from(list(sizes))) for sizes in (kv_heads, group, head_dim))
    levels, steps = draw(st.sampled_from([(1, 1), (12, 4)]))  # few numbers, of which many are equal; or many

    def numbers(*shape: int) -> np.ndarray:
        drawn = draw(arrays(np.int8, shape, elements=st.integers(-levels, levels), fill=st.nothing()))
        return (drawn / steps).astype(np.float32)

    return Case(numbers(tokens, heads, size, each), numbers(tokens, heads, each), numbers(tokens, heads, each), first)


def _judged(rule: Any, case: Case) -> tuple[np.ndarray, float, bool]:
    """What a rule keeps, its closest call, and whether it chose among equals."""
    if not _specifies(rule):
        return _answer(rule, case, every=True), math.inf, False
    each = _fresh(rule, case.k.shape[1])
    kept = _read(each, case)
    return kept, min(one.margin for one in each), any(one.tied for one in each)


def _specifies(rule: Any) -> bool:
    """Whether this is a rule, or has one; otherwise it is a function."""
    if isinstance(rule, type):
        raise TypeError(f"{rule.__name__} is a class: give an object of it, or a function")
    return isinstance(rule, rules.Rule) or not callable(rule)


def _fresh(rule: Any, heads: int) -> list[rules.Rule]:
    """A rule for each head, which has seen nothing yet."""
    if isinstance(rule, rules.Rule):
        return [copy.deepcopy(rule) for _ in range(heads)]
    from corm_jax.policies import parse
    from simulator.specification import rule_of

    policy = parse(rule) if isinstance(rule, str) else rule
    return [rule_of(policy, head) for head in range(heads)]


def _read(each: list[rules.Rule], case: Case) -> np.ndarray:
    """Bool ``[1 + generated, kv_heads, tokens]``."""
    tokens = len(case.k)
    chunks = [case.prompt] + [1] * (tokens - case.prompt)
    q, k, v = (x.astype(np.float64) for x in case[:3])
    readings = read_layer(each, q, k, v, chunks=chunks, prompt=case.prompt)
    kept = np.zeros((len(chunks), len(each), tokens), bool)
    for head, reading in enumerate(readings):
        for step, keys in enumerate(reading.kept):
            kept[step, head, list(keys)] = True
    return kept


def _answer(function: Keeps, case: Case, every: bool = False) -> np.ndarray:
    """What a function keeps: bool ``[steps, kv_heads, tokens]``, of ``every`` step, or else of the last alone."""
    tokens, heads, _ = case.k.shape
    try:
        kept = np.asarray(function(case.q.copy(), case.k.copy(), case.v.copy(), case.prompt))
    except Exception as error:
        what = f"{_name(function)} raises {type(error).__name__}: {' '.join(str(error).split())}"
        raise InvariantError(NAME, f"{what}\n{_again(function, case)}") from error
    steps = 1 + tokens - case.prompt
    shapes = [(steps, heads, tokens)] + [(heads, tokens)] * (not every or steps == 1)
    if kept.dtype != bool or kept.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        what = (
            f"{_name(function)} must return an array of bool of the shape {wanted}, not of {kept.dtype}, {kept.shape}"
        )
        raise InvariantError(NAME, f"{what}\n{_again(function, case)}")
    return kept if kept.ndim == 3 else kept[None]


def _compare(function: Keeps, rule: Any, case: Case, expected: np.ndarray) -> None:
    """Raises at the first step, head and key that differ."""
    kept = _answer(function, case)
    differs = kept != expected[-len(kept) :]
    if not differs.any():
        return
    step, head, key = map(int, np.argwhere(differs)[0])
    clock, alike = len(case.k) - len(kept) + 1 + step, kept[step, head] == expected[step - len(kept), head]
    mine, its = (np.flatnonzero(one).tolist() for one in (expected[step - len(kept), head], kept[step, head]))
    name, is_kept = _name(function), bool(kept[step, head, key])
    what = f"is {'kept' if is_kept else 'evicted'} by {name}, but {'evicted' if is_kept else 'kept'} by the rule"
    lines = [what, f"the rule, {described(rule)}, keeps {mine}, {name} keeps {its}"]
    if _specifies(rule):
        lines += [f"the rule's scores at clock {clock}, of which the lowest is evicted first:"]
        for i, (exempt, score) in _scores(rule, case, clock, head).items():
            verdict = "kept" if expected[step - len(kept), head, i] else "evicted"
            score_ = "evicted last" if exempt else f"score {score:.6g}"
            lines += [f"    key {i}: {score_}, {verdict}{'' if alike[i] else f'; not by {name}'}"]
    raise InvariantError(NAME, "\n".join([*lines, _again(function, case)]), head=head, clock=clock, key=key)


def _scores(rule: Any, case: Case, clock: int, head: int) -> dict[int, tuple[bool, float]]:
    """Of the keys among which a head chooses at some clock: whether each is evicted last, and its score."""
    each, found = _fresh(rule, case.k.shape[1]), {}
    mine, keeps = each[head], each[head].keeps

    def watched(live: list[int], t: int) -> list[int]:
        if t == clock:
            found.update({i: (mine.exempt(i, t), mine.order(i, t)) for i in live})
        return keeps(live, t)

    mine.keeps = watched
    _read(each, case._replace(q=case.q[:clock], k=case.k[:clock], v=case.v[:clock]))
    return found


def _again(function: Keeps, case: Case) -> str:
    """Code that calls the function on a case."""
    name, module = _name(function), getattr(function, "__module__", None)
    found = name.isidentifier() and module not in (None, "__main__", "builtins")
    lines = ["import numpy as np", *([f"from {module} import {name}"] if found else [])]
    for argument, x in zip(("queries", "keys", "values"), (case.q, case.k, case.v), strict=True):
        plain = f"np.array({_listed(x)}, np.float32)" if x.any() else f"np.zeros({x.shape}, np.float32)"
        lines.append(f"{argument} = {plain}")
    call = f"print({name}(queries, keys, values, {case.prompt}))"
    return "\n    ".join(["to see it again:", *lines, call])


def _listed(x: np.ndarray) -> str:
    return f"[{', '.join(map(_listed, x))}]" if x.ndim else f"{x:g}"


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def described(rule: Any) -> str:
    """A rule by its class and its numbers."""
    if not isinstance(rule, rules.Rule):
        return repr(rule) if isinstance(rule, str) or not callable(rule) else _name(rule)
    own = vars(rule)
    parts = [described(value) for value in own.values() if isinstance(value, rules.Rule)]
    shown = [name for name, value in own.items() if isinstance(value, int | float | str) and name != "waits"]
    return f"{type(rule).__name__}({', '.join([*parts, *(f'{name}={own[name]}' for name in shown)])})"
