"""The conformance suite: what every eviction policy, and every cache, has to satisfy.

    from simulator.testing import parametrize_checks

    @parametrize_checks(MyPolicy(budget=5))
    def test_my_policy(check):
        check()

Each check (see `simulator.checks`) has a name and draws histories with Hypothesis. What fails raises an
`InvariantError` that says which invariant broke, in which head, at which clock, for which key, after shrinking to a
history that can be read. Policies are tried on sequences of `strategies.TOKENS` tokens: give them numbers small enough
for something to happen.

`check_kept` (see `simulator.kept`) is for caches and prompt compressors of any framework: NumPy in, NumPy out. All of
this needs the extra ``checks`` alone: Hypothesis and pytest.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException, NoSuchExample, Unsatisfiable

from corm_jax.core.arrays import broadcasts
from corm_jax.core.policy import Policy
from corm_jax.policies import Corm
from simulator.checks import CHECKS, CORM, ENOUGH, evicts_something, specification
from simulator.construction import check_construction
from simulator.invariants import InvariantError
from simulator.kept import Tried, check_kept
from simulator.reference import corm_messages
from simulator.specification import Reference, specified
from simulator.subject import Implementation, Subject
from simulator.untried import untried

CORM_JAX = Implementation()
"""The cache of `corm_jax`."""

EVERY = 5.0
"""The fewest seconds between two lines of progress."""


@broadcasts
def check_policy(
    policy: Policy | st.SearchStrategy,
    reference: Reference | None = None,
    *,
    implementation: Implementation = CORM_JAX,
    examples: int = 30,
    only: str | None = None,
    shrink: bool = True,
) -> None:
    """Runs every check on a policy that has something to say about it.

    If that takes long, lines on standard error say now and then how many checks are done.

    Args:
      policy: the policy, or a Hypothesis strategy of policies.
      reference: its specification in NumPy, see `Reference`. The policies of `corm_jax` have theirs.
      implementation: the cache to try it in.
      examples: histories for each check.
      only: the name of one check to run.
      shrink: whether to look for a history that can be read when one fails. That takes longer than finding the first.

    Raises:
      InvariantError: if one fails.
      ValueError: if there is no check of that name.

    >>> from corm_jax import Full
    >>> check_policy(Full(), examples=3, only="slot_order")
    """
    checks = [check for check in CHECKS if only in (None, check.__name__)]
    if not checks:
        raise ValueError(f"no check is called {only!r}: there are {', '.join(check.__name__ for check in CHECKS)}")
    check_construction(_one_of(policy))
    for check in _with_progress([check for check in checks if _applies(check, policy, reference)]):
        _run(check, policy, reference, implementation, examples, shrink)


def _with_progress(checks: Sequence[Any]) -> Iterator[Any]:
    """The checks one by one, with a line of progress before some of them, at least `EVERY` seconds after the last."""
    begin = last = time.monotonic()
    for done, check in enumerate(checks):
        if (now := time.monotonic()) - last >= EVERY:
            progress = f"{done} of {len(checks)} checks done in {now - begin:.0f} s, the next is {check.__name__}"
            print(f"check_policy: {progress}", file=sys.stderr, flush=True)
            last = now
        yield check


def _applies(check, policy, reference: Reference | None) -> bool:
    """Whether a check says anything: CORM's rules are for CORM, a specification has to be there."""
    policy = _one_of(policy)
    if check in CORM:
        return type(policy) is Corm or reference is corm_messages
    return check is not specification or reference is not None or specified(policy)


def _one_of(policy: Policy | st.SearchStrategy) -> Policy:
    """The policy, or the simplest of a strategy."""
    return _simplest(policy) if isinstance(policy, st.SearchStrategy) else policy


@cache
def _simplest(policies: st.SearchStrategy) -> Policy:
    """Sought once: Hypothesis makes hundreds of policies on the way, and every check asks."""
    return find(policies, lambda _: True)


def parametrize_checks(
    *policies: Policy | st.SearchStrategy, reference: Reference | None = None, **options: Any
) -> pytest.MarkDecorator:
    """Parametrizes a test by policy and check: it gets ``check``, to be called. Arguments as for `check_policy`."""
    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(
                partial(check_policy, policy, reference, only=check.__name__, **options),
                id=f"{'' if isinstance(policy, st.SearchStrategy) else type(policy).__name__}{index}-{check.__name__}",
            )
            for index, policy in enumerate(policies)
            for check in CHECKS
            if _applies(check, policy, reference)
        ],
    )


def _run(check, policy, reference, implementation, examples: int, shrink: bool) -> None:
    if check is evicts_something and isinstance(policy, st.SearchStrategy):  # one of them is enough

        def tried(one: Policy) -> bool:
            return untried(Subject(one, implementation, reference)) is None

        try:
            policy = find(policy, tried, settings=settings(max_examples=examples, derandomize=True, database=None))
        except NoSuchExample:
            policy = _one_of(policy)

    @settings(
        max_examples=min(ENOUGH.get(check, examples), examples),
        phases=[Phase.explicit, Phase.generate] + [Phase.shrink] * (shrink and ENOUGH.get(check) != 1),
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(policy=policy if isinstance(policy, st.SearchStrategy) else st.just(policy), data=st.data())
    def run(policy, data):
        try:
            check(Subject(policy, implementation, reference), data)
        except (InvariantError, HypothesisException):
            raise
        except Exception as error:
            what = " ".join(str(error).split())
            raise InvariantError(
                check.__name__, f"{type(policy).__name__} raises {type(error).__name__}: {what}"
            ) from error

    try:
        run()
    except Unsatisfiable:
        what = "no history could be tried: in all that were drawn a decision hangs on rounding"
        raise InvariantError(check.__name__, what) from None


__all__ = ["CHECKS", "Implementation", "InvariantError", "Tried", "check_kept", "check_policy", "parametrize_checks"]
