"""Checks of the conformance suite for many policies: which of them the default run leaves to the slow one."""

import pytest

COSTLY = "batch_rows", "jit_eager_vmap", "layouts", "overflow_is_counted", "replays_alike"
"""Those that compile most. By default CORM alone passes them, in test_testing.py."""


def quick(checks):
    """What `parametrize_checks` gives, with the costly ones marked slow."""
    names, cases = checks.args
    marked = [
        pytest.param(*one.values, id=one.id, marks=pytest.mark.slow if str(one.id).endswith(COSTLY) else ())
        for one in cases
    ]
    return pytest.mark.parametrize(names, marked)
