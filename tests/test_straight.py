"""The compiled decode step is a straight line: what it launches a layer is counted, so that loops cannot creep back."""

import importlib.util
from pathlib import Path

import pytest

from tests.drive import FUSED

SPEC = importlib.util.spec_from_file_location("launches", Path(__file__).parents[1] / "benchmarks" / "launches.py")
launches = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launches)

# Instructions of two layers and of what is around them, rectangle and pool; some more than there are.
MOST = {
    "full": (150, 170),
    "corm:window=256,recent=256,group=mean,sinks=4": (155, 175),
    "h2o:recent=256,budget=512,oneshot=true": (170, 195),
    "tova:budget=512": (190, 215),
    "scissorhands:budget=512": (415, 515),
    "streaming_llm:budget=512": (165, 190),
    "streaming_llm:budget=512,positions=cache": (200, 225),
}
SAMPLING = {"while": 1, "sort": 1, "conditional": 1}
"""Where a token is drawn: the branch for temperatures above 0, and what it does."""


FEW = "full", "corm:window=256,recent=256,group=mean,sinks=4", "scissorhands:budget=512"


@pytest.mark.parametrize("stores", [None, 1])
@pytest.mark.parametrize("spec", [spec if spec in FEW else pytest.param(spec, marks=pytest.mark.slow) for spec in MOST])
def test_a_token_is_a_straight_line(spec, stores):
    count = launches.launches(launches.compiled(spec, stores, layers=2, capacity=640, **FUSED))
    assert {kind: count[kind] for kind in SAMPLING} == SAMPLING
    assert count.total() <= MOST[spec][stores is not None]


def test_what_is_counted():
    """A loop over tokens with a product, a branch and a loop inside; names launch nothing."""
    program = """HloModule jit_decode
%inner (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  ROOT %a = f32[] add(%p, %p)
}
%body (t: (f32[])) -> (f32[]) {
  %t = (f32[]) parameter(0)
  %x = f32[] get-tuple-element(%t), index=0
  %y = f32[] fusion(%x), kind=kLoop, calls=%inner
  %w = (f32[]) while(%t), condition=%cond, body=%inner
  ROOT %r = (f32[]) tuple(%y)
}
ENTRY %main (t: (f32[])) -> (f32[]) {
  %t = (f32[]) parameter(0)
  ROOT %w = (f32[]) while(%t), condition=%cond, body=%body
}
"""
    assert launches.launches(program) == {"fusion": 1, "while": 1, "add": 1}
