"""Golden decisions: what every policy keeps of every synthetic trace, as a table that is committed.

The table says how many keys of each head are live at the end, and has a hash of all decisions on the way. The
specification in NumPy and the replay in JAX both have to come to it, so that a change which moves both is seen as well.
Where a policy is meant to change, print the table anew and say why in the commit:

    python -m tests.test_golden > tests/golden.txt
"""

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from corm_jax import parse
from corm_jax.traces.trace import Trace
from simulator.replay import replay
from simulator.specification import readings
from simulator.synthetic import PATTERNS

TABLE = Path(__file__).parent / "golden.txt"
STEPS, PROMPT = 40, 28
CLOSE = 1e-4
"""No decision is nearer to a tie than this, relatively: float32 numbers come to the same as float64."""

SEED = 6
SMALL = {"local": {"window": 4.0}, "periodic": {"period": 10.0}, "topics": {"length": 10}}
"""Patterns for so short a text."""

SPECS = [
    "full:budget=16",
    "corm:window=8,recent=4",
    "corm:window=8,recent=4,threshold=live,group=mean",
    "adaptive_corm:window=6,recent=4,multiple=2,trial=8",
    "streaming_llm:sinks=4,budget=16",
    "window:size=16",
    "h2o:recent=6,budget=16",
    "h2o:recent=6,budget=0.4,attention=mean",
    "scissorhands:budget=16,window=12,recent=4",
    "tova:budget=16",
    "snapkv:budget=16,window=6,kernel=3",
    "pyramidkv:budget=16,window=6,kernel=3",
    "adakv:budget=16,window=6,kernel=3",
    "l2norm:budget=16",
    "random:budget=16",
]


@cache
def trace():
    """A layer for each pattern, so that one program reads them all: features that a pattern lacks are zeros."""
    made = [
        pattern(layers=1, steps=STEPS, group=2, head_dim=8, seed=SEED, **SMALL.get(name, {}))
        for name, pattern in PATTERNS.items()
    ]
    size = max(one.meta.head_dim for one in made)
    scales = [one.meta.scale for one in made]
    layers = [one.layer(0) for one in made]

    def wide(x, factor=1.0):
        return factor * np.pad(x, ((0, 0), (0, 0), (0, size - x.shape[-1])))

    q = np.stack([wide(layer.q, scale / scales[0]) for layer, scale in zip(layers, scales, strict=True)])
    k, v = (np.stack([wide(getattr(layer, name)) for layer in layers]) for name in "kv")
    return Trace.from_qkv(q, k, v, scale=scales[0])


def specified(spec):
    """Whether each key was live after each step, ``[pattern, kv_heads, steps, keys]``, and how far a tie was."""
    kept, margins = [], []
    for index in range(len(PATTERNS)):
        layer = trace().layer(index)
        factor = trace().meta.scale * layer.q.shape[-1] ** 0.5  # the specification scales by head_dim
        q = factor * layer.q.reshape(STEPS, layer.k.shape[1], -1, layer.q.shape[-1]).astype(np.float64)
        heads = readings(
            parse(spec), q, layer.k.astype(np.float64), layer.v, prompt=PROMPT, layer=index, layers=len(PATTERNS)
        )
        kept.append([[np.isin(np.arange(STEPS), list(keys)) for keys in head.kept] for head in heads])
        margins.append(min(head.margin for head in heads))
    return np.array(kept), margins


def rows(spec, kept):
    """The lines of a policy."""
    for name, history in zip(PATTERNS, kept, strict=True):
        live = " ".join(f"{count:2}" for count in history[:, -1].sum(-1))
        digest = hashlib.sha256(np.packbits(history).tobytes()).hexdigest()[:16]
        yield f"{spec:52} {name:14} {live}  {digest}"


@pytest.mark.parametrize("spec", SPECS)
def test_decisions_are_those_of_the_table(spec):
    wanted = [line for line in TABLE.read_text().splitlines() if line.split(" ")[0] == spec]
    kept, margins = specified(spec)
    assert min(margins) > CLOSE
    assert [*rows(spec, kept)] == wanted
    found = replay(trace(), parse(spec), prompt=PROMPT, errors=False).history()
    assert [*rows(spec, found)] == wanted


def test_the_table_has_every_policy():
    from corm_jax import POLICIES

    assert {spec.partition(":")[0] for spec in SPECS} == POLICIES.keys()
    lines = TABLE.read_text().splitlines()
    assert len(lines) == len(SPECS) * len(PATTERNS)
    assert {line.split()[1] for line in lines} == PATTERNS.keys()


if __name__ == "__main__":
    for one in SPECS:
        print(*rows(one, specified(one)[0]), sep="\n")
