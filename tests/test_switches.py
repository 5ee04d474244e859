"""JAX's switches change nothing: 64 bits, ranks and dtypes that must not be promoted, NaN and infinity as errors.

And what a GPU would do if it were not told: see `test_float32_is_multiplied_in_full`.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import (
    TOVA,
    CacheSpec,
    Corm,
    Full,
    Rotary,
    attend,
    begin_prompt,
    generate,
    make_cache,
    parse,
    protect,
    step,
)
from corm_jax import budget as on_budget
from corm_jax.core.form import Form
from corm_jax.core.step import read
from corm_jax.model.decoder import forward, make_caches
from corm_jax.model.generation import decode
from corm_jax.runs import calibrate, perplexity, worth
from corm_jax.traces.meta import QKV
from simulator import oracle
from simulator.recurrence import replay_layer
from simulator.replay import replay, sweep
from simulator.synthetic import noise
from simulator.testing import check_policy
from tests.drive import TOKENS, in_cache, normal
from tests.heads import chunks_of
from tests.models import tiny

SPECS = [
    "full",
    "corm:window=4,recent=2,multiple=2",
    "corm:window=4,recent=2,group=mean,threshold=live,budget=0.5",
    "adaptive_corm:window=3,recent=2,multiple=2,patience=2,trial=4",
    "streaming_llm:sinks=2,budget=6",
    "window:size=6",
    "h2o:recent=2,attention=mean,budget=6",
    "scissorhands:budget=6,window=40,recent=2",
    "tova:budget=5,oneshot=true,sinks=1,recent=1",
    "l2norm:budget=5",
    "random:budget=5",
    "snapkv:budget=6,window=3,kernel=3,pool=mean",
    "adakv:budget=6,window=3,kernel=3",
]
UNEQUAL = on_budget(protect(TOVA(), sinks=np.array([0, 2])), 5)  # int64 for NumPy, not for JAX
POLICIES = [*map(parse, SPECS), UNEQUAL]
SWITCHES = {
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_DEBUG_NANS": "1",
    "JAX_DEBUG_INFS": "1",
}


def decisions():
    """What is decided in all kinds of ways, as JSON has it."""
    found, model, trace = {}, tiny(), noise(layers=1, steps=40)
    prompts, columns = [[3, 50, 4, 9, 5], list(range(1, 12))], normal(0)
    for index, policy in enumerate(POLICIES):
        chunk, stores = [(1, None), (3, 1), (3, None), (1, 1)][index % 4]
        held = in_cache(policy, *columns, chunks_of(TOKENS, chunk), stores=stores, prompts={0: 12})[1]
        found[f"step {index}"] = [[sorted(keys) for keys in head] for head in held]
        if index % 4 == 1:
            found[f"replay {index}"] = replay(trace, policy, chunk=2, prompt=20, capacity=30).until.tolist()
    for spec, stores, options in (
        (SPECS[1], None, {}),
        (SPECS[-1], 1, {"temperature": 1.0, "top_p": 0.9, "seed": 3}),
    ):
        options |= {"max_new_tokens": 4, "capacity": 24, "chunk": 4, "stores": stores, "end": [96]}
        found[f"generate {stores}"] = generate(model, parse(spec), prompts, **options).tokens
    grid = {"window": [2, 4], "recent": [1, 3]}
    found["sweep"] = sweep(trace, Corm, grid).until.tolist()
    found["oracle"] = oracle.bounds(trace, replay(trace, Corm(window=4, recent=2))).most.round(3).tolist()
    reading = perplexity.read_text(model, parse("h2o:recent=2,budget=6"), list(range(40)), chunk=4)
    found["read"] = reading.live.tolist()
    return json.loads(json.dumps(found))


def without_jit():
    """Steps that are not compiled, so that JAX looks at every number on the way."""
    for policy, tokens, stores in ((UNEQUAL, 1, None), (Full(), 12, None), (parse(SPECS[-2]), 2, 1)):
        cache = begin_prompt(make_cache(policy, CacheSpec(2, 600, 4, stores=stores)), 9)
        for start in range(0, 12, tokens):
            q, k, v = (jnp.asarray(x[start : start + tokens]) for x in normal(0))
            _, cache = step(policy, cache, q, k, v, jnp.int32(tokens))


def main():
    without_jit()
    for check in ("specification", "replays_alike", "needs"):
        check_policy(Corm(window=4, recent=2), examples=2, only=check)
    print(json.dumps(decisions()))


@pytest.mark.slow
def test_switches_change_no_decision():
    """In a process in which all of them are thrown at once."""
    code = "from tests.test_switches import main; main()"
    environment = os.environ | SWITCHES | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == decisions()


def wide(jaxpr):
    """The 64-bit numbers that a program computes, but for Python's, which turn into what they meet."""
    found = []
    for equation in jaxpr.eqns:
        avals = [variable.aval for variable in equation.outvars]
        strong = [one for one in avals if not getattr(one, "weak_type", False)]
        found += [f"{equation.primitive}: {one}" for one in strong if re.search("(int|float)64", str(one.dtype))]
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            found += wide(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize(
    "policy",
    [*POLICIES[1:3], *(pytest.param(one, marks=pytest.mark.slow) for one in (POLICIES[0], *POLICIES[3:-1])), UNEQUAL],
    ids=[*SPECS[1:3], SPECS[0], *SPECS[3:], "unequal"],
)
def test_no_number_has_64_bits(policy):
    """Under JAX_ENABLE_X64 a step is the same program: none of its numbers is wider."""
    with jax.enable_x64(True):
        for stores in (None, 1):
            for tokens, count in ((1, 1), (1, np.int64(1)), (12, jnp.asarray(12))):
                q = np.zeros((tokens, 2, 3, 8), np.float32)
                cache = begin_prompt(make_cache(policy, CacheSpec(2, 24, 8, stores=stores)), 12)
                program = jax.make_jaxpr(step)(policy, cache, q, q[:, :, 0], q[:, :, 0], count)
                assert not wide(program.jaxpr)
            for made in (cache.made, replace(cache.made, roomy=True)):
                cache = cache._replace(made=made)
                program = jax.make_jaxpr(partial(read, chunk=1))(policy, cache, q, q[:, :, 0], q[:, :, 0], np.int64(9))
                assert not wide(program.jaxpr)
        layer = QKV(np.zeros((16, 2, 1, 4), np.float32), *np.zeros((2, 16, 2, 4), np.float32))
        for chunk in (1, 2):
            how = {"chunk": chunk, "block": 8, "moments": None, "fidelity": "renormalized", "errors": True}
            if not np.any(policy.traits.moments):
                how["moments"] = False
            numbers = Form(scale=jnp.float32(1)), jnp.int32(16), jnp.int32(12), jnp.int32(9)
            assert not wide(jax.make_jaxpr(partial(replay_layer, **how))(policy, layer, *numbers).jaxpr)


def test_no_number_of_a_model_has_64_bits():
    model, policy = tiny(), parse("tova:budget=5")
    with jax.enable_x64(True):
        caches = make_caches(model, policy, batch=2, capacity=9)
        numbers = np.int32(9), np.zeros(1, np.int32), np.float32(0), np.float32(1)
        arguments = jnp.zeros((2, 97), jnp.float32), jax.random.key(0), jnp.zeros(2, bool)
        program = jax.make_jaxpr(partial(decode, steps=3))(model, policy, caches, *arguments, *numbers)
        drawn = [one for one in wide(program.jaxpr) if not one.startswith(("argmax: int64", "jit: int64"))]
        assert not drawn  # but for the token that jax.random.categorical draws


def products(function, *arguments):
    """The products of a program for an NVIDIA GPU: what is multiplied, and how precisely."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    lines = re.findall(r"stablehlo\.dot_general.*", text)
    return [("f32" in re.search(r": \((.*)\) ->", line)[1], "[HIGHEST, HIGHEST]" in line) for line in lines]


def in_layers():
    q, k = jnp.zeros((12, 2, 3, 8)), jnp.zeros((12, 2, 8))
    for stores in (None, 1):
        for tokens in (1, 12):
            for spec in ("full", "corm", "streaming_llm:positions=cache"):
                policy = parse(spec)
                cache = make_cache(policy, CacheSpec(2, 600, 8, stores=stores))
                arguments = q[:tokens], k[:tokens], k[:tokens], jnp.int32(tokens), Rotary(np.ones(4, np.float32))
                yield partial(step, policy), cache, *arguments


def in_models():
    for tied in (False, True):
        model, policy = tiny(tied=tied), Corm()
        caches = make_caches(model, policy, batch=1, capacity=600)

        def run(model, caches, policy=policy):
            x, _, _ = forward(
                model, policy, caches, jnp.zeros((1, 12), jnp.int32), jnp.full(1, 12, jnp.int32), chunk=12
            )
            return model.logits(x)

        yield run, model, caches
        yield jax.grad(lambda model, caches, run=run: run(model, caches).sum()), model, caches


def elsewhere():
    layer = QKV(np.zeros((16, 2, 1, 4), np.float32), *np.zeros((2, 16, 2, 4), np.float32))
    for chunk, moments in ((2, None), (1, None), (1, False)):
        how = {"chunk": chunk, "block": 8, "moments": moments, "fidelity": "renormalized", "errors": True}
        yield partial(replay_layer, Corm(), **how), layer, Form(scale=jnp.float32(1)), jnp.int32(16), None, jnp.int32(9)
    yield oracle._attention, jnp.zeros((16, 2, 4)), jnp.zeros((16, 4)), jnp.zeros(2), Form(scale=jnp.float32(1))
    model = tiny()
    yield worth.mixed, model.layers[0], jnp.zeros((1, 8, 32)), jnp.zeros((8, 2, 2, 8)), jnp.float32(1)
    one = jnp.ones(2, jnp.int32), jnp.ones(2, jnp.int32), jnp.ones(2)
    size = calibrate.CHUNK
    columns = jnp.zeros((size, 2, 2, 8)), jnp.zeros((size, 2, 8)), jnp.zeros((size, 2, 8)), jnp.zeros((size, 2, 2, 8))
    yield calibrate._measure, *one, *columns, jnp.int32(9), jnp.int32(9)


@pytest.mark.parametrize("programs", [in_layers, in_models, elsewhere])
def test_float32_is_multiplied_in_full(programs):
    """By default a GPU rounds float32 factors to TF32. Every product here sets a precision that forbids it."""
    for program in programs():
        found = products(*program)
        assert found
        assert all(full for float32, full in found if float32)


def test_16_bits_are_multiplied_as_they_are():
    """Products of 16-bit numbers are exact: nothing is converted to float32 before, and no precision is asked for."""
    q, k = jnp.zeros((1, 2, 3, 8), jnp.bfloat16), jnp.zeros((2, 600, 8), jnp.bfloat16)
    assert products(attend, q, k, k, jnp.zeros((1, 2, 600), bool), jnp.ones(1, jnp.int32)) == [(False, False)] * 2


@pytest.mark.parametrize(
    ("dtype", "activations", "stores"),
    [
        (jnp.float16, jnp.float16, None),
        (jnp.float16, jnp.float32, 1),
        (jnp.float16, jnp.bfloat16, None),
        (jnp.bfloat16, jnp.bfloat16, 1),
        (jnp.bfloat16, jnp.float32, None),
    ],
)
def test_caches_of_16_bits(dtype, activations, stores):
    """Keys and values are rounded when they are stored; the rest is attention over what is stored, in float32."""
    policy, columns = parse("h2o:recent=2,budget=6"), [jnp.asarray(x, activations) for x in normal(0)]
    stored = [columns[0], *(x.astype(dtype) for x in columns[1:])]
    cache = make_cache(policy, CacheSpec(2, 9, 4, dtype, stores))
    wide_cache = make_cache(policy, CacheSpec(2, 9, 4, jnp.float32, stores))
    run = jax.jit(step)
    for token in range(TOKENS):
        some = [x[token : token + 1] for x in columns]
        output, cache = run(policy, cache, *some, jnp.int32(1))
        exact = [x[token : token + 1].astype(jnp.float32) for x in stored]
        expected, wide_cache = run(policy, wide_cache, *exact, jnp.int32(1))
        assert output.dtype == activations
        np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.03)
        np.testing.assert_array_equal(cache.position, wide_cache.position)
    assert cache.k.dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_models_of_16_bits(dtype):
    model, prompt = tiny(dtype=dtype, layers=1), list(range(1, 20))
    stores = 1 if dtype == jnp.float16 else None
    result = generate(model, parse("snapkv:budget=12,window=4"), [prompt], max_new_tokens=4, chunk=16, stores=stores)
    assert result.caches[0].k.dtype == dtype
    assert len(result.tokens[0]) == 4
    assert int((result.caches[0].position >= 0).sum()) == 2 * (12 + 4)


def test_a_value_beyond_float16_is_infinite_for_those_who_see_it():
    """70,000 does not fit: its key is NaN, its slot holds 0, and the other head never hears of it."""
    cache = make_cache(Full(), CacheSpec(2, 4, 4, jnp.float16))
    q, k = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 4))
    output, cache = step(Full(), cache, q, k, k.at[0, 0].set(7e4), jnp.int32(1))
    assert jnp.isnan(output[0, 0]).all()
    assert output[0, 1, 0].tolist() == [1, 1, 1, 1]
    assert cache.v[:, 0].tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
