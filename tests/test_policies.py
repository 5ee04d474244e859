"""The policies of the field: the conformance suite, and sets of survivors worked by hand."""

from corm_jax import parse
from simulator.testing import parametrize_checks

SPECS = [
    "full:budget=5",
    "streaming_llm:sinks=2,budget=6",
    "h2o:recent=2,budget=5",
    "h2o:recent=2,score=mean,budget=0.4",
    "scissorhands:budget=6,window=5,recent=2",
    "tova:budget=5",
    "tova:budget=6,sinks=1,recent=2",
    "l2norm:budget=5",
    "random:budget=5",
    "corm:window=4,recent=2,budget=4,sinks=1",
]


@parametrize_checks(*map(parse, SPECS))
def test_conformance(check):
    check()
