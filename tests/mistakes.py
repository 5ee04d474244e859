"""The errors that users' mistakes cause."""

import jaxtyping
import pytest

from corm_jax import CormError


def refused(pattern, function, *arguments, **options):
    """Calls a function that has to raise `CormError`, in one line, and returns what it says."""
    jaxtyping.config.update("jaxtyping_disable", True)  # as users run it: the tests' own type checks would come first
    try:
        with pytest.raises(CormError, match=pattern) as caught:
            function(*arguments, **options)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)
