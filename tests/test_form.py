"""Forms of attention: scale, soft cap, window, mask, rotation and bias, each decision as in the specification."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from corm_jax import ALiBi, CacheSpec, Rope, Rotary, make_cache, parse, step
from corm_jax.core.step import read
from simulator.held import by_head
from simulator.reading import Form
from tests.drive import GROUP, HEAD_DIM, KV_HEADS, TOKENS, in_cache, in_numpy, normal
from tests.heads import chunks_of

CLOSE = 1e-4
FREQUENCIES, SLOPES = Rope(theta=50.0).frequencies(HEAD_DIM), ALiBi.of(KV_HEADS, GROUP).slopes


def odd(query, key):
    """Every other position, and one's own."""
    return ((query - key) % 2 == 1) | (query == key)


FORMS = {
    "scale": ({"scale": 0.9}, {"scale": 0.9}),
    "soft cap": ({"softcap": 1.5}, {"softcap": 1.5}),
    "window": ({"window": 5}, {"window": 5}),
    "mask": ({"mask": odd}, {"mask": odd}),
    "rotary": ({"encoding": Rotary(FREQUENCIES)}, {"frequencies": FREQUENCIES}),
    "alibi": ({"encoding": ALiBi(SLOPES)}, {"slopes": SLOPES}),
    "all": (
        {"encoding": ALiBi(SLOPES), "scale": 0.7, "softcap": 2.0, "window": 7, "mask": odd},
        {"slopes": SLOPES, "scale": 0.7, "softcap": 2.0, "window": 7, "mask": odd},
    ),
}
STEPS = {name: partial(step, **given) for name, (given, _) in FORMS.items()}
SPECS = [
    "corm:window=4,recent=2,multiple=2",
    "corm:window=5,recent=2,group=mean,threshold=live",
    "h2o:recent=2,budget=6",
    "tova:budget=5",
    "scissorhands:budget=6,window=5,recent=2",
    "snapkv:budget=6,window=3,kernel=3",
    "full",
]


@pytest.mark.parametrize(("form", "spec"), [*((form, SPECS[0]) for form in FORMS), *(("all", spec) for spec in SPECS)])
@pytest.mark.parametrize(("chunk", "stores"), [(1, 1), (3, None)])
def test_forms_are_those_of_the_specification(form, spec, chunk, stores):
    policy, columns, counts = parse(spec), normal(len(spec) + len(form)), chunks_of(TOKENS, chunk)
    how = {"stores": stores, "prompts": {0: 15}}
    outputs, held, _ = in_cache(policy, *columns, counts, step=STEPS[form], **how)
    expected = in_numpy(policy, *columns, counts, form=Form(**FORMS[form][1]), **how)
    assert min(reading.margin for reading in expected) > CLOSE
    for head, reading in enumerate(expected):
        assert held[head] == reading.kept
        np.testing.assert_allclose(outputs[:, head], reading.outputs, atol=2e-5)


@partial(jax.jit, static_argnames=("form", "capacity", "stores"))
def exactly(policy, *columns, form, capacity, stores):
    cache = make_cache(policy, CacheSpec(KV_HEADS, capacity, HEAD_DIM, stores=stores))
    outputs, cache, live, _ = read(policy, cache, *columns, jnp.int32(TOKENS), chunk=1, **FORMS[form][0])
    return outputs, by_head(cache), live, cache.overflow


@pytest.mark.parametrize(
    ("form", "spec"),
    [
        *(pytest.param(form, SPECS[0], marks=[pytest.mark.slow] * (form not in ("rotary", "all"))) for form in FORMS),
        ("all", SPECS[2]),
    ],
)
@settings(max_examples=16)
@given(seed=st.integers(0, 2**16), tight=st.booleans())
def test_a_block_is_as_token_by_token_in_any_form(form, spec, seed, tight):
    policy, columns = parse(spec), normal(seed)
    capacity, stores = (7, 1) if tight else (TOKENS, None)
    expected = in_numpy(policy, *columns, [1] * TOKENS, capacity=capacity, stores=stores, form=Form(**FORMS[form][1]))
    assume(min(reading.margin for reading in expected) > CLOSE)
    outputs, position, live, overflow = exactly(policy, *columns, form=form, capacity=capacity, stores=stores)
    for head, reading in enumerate(expected):
        assert {int(p) for p in position[head] if p >= 0} == reading.kept[-1]
        assert live[:, head].tolist() == [len(keys) for keys in reading.kept]
        assert int(overflow[head]) == reading.overflow
        np.testing.assert_allclose(outputs[:, head], reading.outputs, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 4])
def test_alibi_by_places_in_the_cache(chunk):
    policy, columns = parse("streaming_llm:sinks=2,budget=7,positions=cache"), normal(chunk)
    counts = chunks_of(TOKENS, chunk)
    cache = make_cache(policy, CacheSpec(KV_HEADS, 7 + chunk, HEAD_DIM))
    output, *_ = jax.jit(partial(read, policy, chunk=chunk))(cache, *columns, TOKENS, ALiBi(SLOPES))
    expected = in_numpy(policy, *columns, counts, form=Form(slopes=SLOPES, in_cache=True))
    for head, reading in enumerate(expected):
        np.testing.assert_allclose(output[:, head], reading.outputs, atol=2e-5)


def test_slopes_are_those_of_the_paper():
    """Of 8 heads 1/2, 1/4, ...; of 12 these, and every second one of 16: as the authors' code has them."""
    assert ALiBi.of(8).slopes[:, 0].tolist() == [2.0**-i for i in range(1, 9)]
    more = [2.0 ** (-0.5 * i) for i in (1, 3, 5, 7)]
    np.testing.assert_allclose(ALiBi.of(4, 3).slopes.reshape(-1), [2.0**-i for i in range(1, 9)] + more, rtol=1e-6)


def test_windows_of_layers_in_one_program():
    """A window may be traced: layers with and without one share a program, as in a scan over layers."""
    policy, (q, k, v) = parse("full"), map(jnp.asarray, normal(3))
    cache = make_cache(policy, CacheSpec(KV_HEADS, TOKENS, HEAD_DIM))
    run = jax.jit(lambda window: step(policy, cache, q, k, v, TOKENS, window=window)[0])
    np.testing.assert_allclose(run(4), step(policy, cache, q, k, v, TOKENS, window=4)[0], atol=1e-6)
    np.testing.assert_allclose(run(2**31 - 1), step(policy, cache, q, k, v, TOKENS)[0], atol=1e-6)
    assert run._cache_size() == 1
