"""The conformance suite on our own policies."""

import numpy as np
from hypothesis import strategies as st

from corm_jax import Corm, Full
from simulator.strategies import hyperparameters
from simulator.testing import parametrize_checks


def corms(**given):
    return hyperparameters(Corm, window=st.integers(1, 20), **given).map(lambda options: Corm(**options))


@parametrize_checks(
    Full(),
    corms(threshold="position", group="any"),
    corms(threshold="live", group="mean"),
    Corm(window=np.array([3, 6], np.int32), recent=np.array([2, 1], np.int32)),
)
def test_policies(check):
    check()
