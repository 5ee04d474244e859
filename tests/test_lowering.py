"""Every compiled program is lowered for a GPU and a TPU, on a machine that has neither, and its StableHLO is read.

`jax.export` traces a program and applies JAX's own lowering rules for `PLATFORMS`. What it returns is what the compiler
of the device would get. Models, caches and traces are abstract: no number is computed.

What is looked for are mistakes that a CPU does not show:

- An operation without a lowering rule for one of the platforms. The export fails.
- A custom call. `CUSTOM_CALLS` names the targets that are allowed, and is empty.
- Tensors of other types than `TYPES`, and in 16-bit programs bfloat16. 64 bits and float16 are thus forbidden, with one
  exception: JAX counts its random numbers in ui64, in functions that call `threefry2x32`. Attributes of an operation,
  such as a dimension, are no tensors and may be i64.
- A product with a float32 factor that is not stated to be in full precision. A GPU rounds such factors to TF32, and a
  TPU to bfloat16, which turns verdicts of policies.
- A loop in `corm_jax.decode` beside that over tokens, and the branch that `corm_jax.core.attention.attended` has for a
  CPU in a program for something else.
- Donated caches that are not updated in place.

From JAX 0.12 on, a cumulative sum for a GPU is a composite, ``chlo.scan``, for which the program holds a loop as well,
with an i64 counter. Loops and types of such functions, ``chlo.*.impl``, are left aside: the compiler has its own way.

Only a device can show the rest: that its compiler accepts the program, and its own way for each composite, how much
memory that takes, how fast it is, what it makes of full precision, and that results agree with a CPU's, key for key.
"""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import corm_jax as cj
from corm_jax.core.exact import planned
from corm_jax.core.form import Form
from corm_jax.core.prompt import set_prompt, whole_prompt
from corm_jax.core.step import counts_in_cache
from corm_jax.core.types import Clock
from corm_jax.evaluation import agreement, analysis, asking
from corm_jax.model.generation import _prefill_block
from corm_jax.runs import calibrate, perplexity, recording, worth
from corm_jax.traces.meta import QKV, Rows
from simulator import oracle
from simulator.replay import _compiled, _compiled_grid

PLATFORMS = "cuda", "tpu"
CUSTOM_CALLS: frozenset[str] = frozenset()
TYPES = frozenset({"f32", "i32", "ui32", "i1"})

VOCAB, BATCH, BLOCK, CHUNK, CAPACITY, STEPS = 50, 2, 32, 8, 32, 5
KV_HEADS, GROUP, HEAD_DIM = 2, 2, 8

SPECS = [
    "full",
    "corm:window=8,recent=4",
    "corm:window=8,recent=4,threshold=live,group=mean,sinks=2,budget=0.5,oneshot=true",
    "adaptive_corm:window=4,recent=4,trial=8",
    "streaming_llm:budget=16",
    "streaming_llm:budget=16,positions=cache",
    "window:size=16",
    "h2o:recent=4,budget=16",
    "h2o:recent=4,attention=mean,sinks=2,budget=16,oneshot=true",
    "scissorhands:budget=16,window=8,recent=4",
    "tova:budget=16",
    "snapkv:budget=16,window=4",
    "pyramidkv:budget=16,window=4,pool=mean",
    "adakv:budget=16,window=4",
    "l2norm:budget=16",
    "random:budget=16",
]
POLICIES = {spec: cj.parse(spec) for spec in SPECS} | {"recorder": cj.Recorder(group=GROUP)}
LAYOUTS = {"rectangle": None, "pool": 1}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


FEW = "corm:window=8,recent=4", "h2o:recent=4,attention=mean,sinks=2,budget=16,oneshot=true", "adakv:budget=16,window=4"
"""Policies of which every program is lowered by default; of the others two programs are, at night."""

STRAIGHT = [("rectangle", "float32"), ("pool", "bfloat16")]
CROSSED = [("rectangle", "bfloat16"), ("pool", "float32")]
"""Every layout and every dtype. Tests take the one or the other, so that any two choices meet in some program."""


def few_first(names):
    """The names, all marked nightly but `FEW`."""
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.nightly) for name in names]


def each(pairs, names=FEW):
    """A test of policies, for some pairs of a layout and a dtype."""

    def marked(function):
        function = pytest.mark.parametrize(("layout", "dtype"), pairs)(function)
        return pytest.mark.parametrize("name", few_first(names))(function)

    return marked


def lowered(jitted, *arguments, platforms=PLATFORMS, **static) -> str:
    """The program of these arguments, as StableHLO."""
    return export.export(jitted, platforms=platforms)(*arguments, **static).mlir_module()


def custom_calls(program: str) -> set[str]:
    """The targets of custom calls."""
    found = re.findall(r"custom_call @([^\s(]+)|call_target_name = \"([^\"]*)\"", program)
    assert len(found) == program.count("stablehlo.custom_call")
    return {one or other for one, other in found}


def functions(program: str) -> list[str]:
    """The functions of a program, without those that spell out a composite."""
    _, *found = re.split(r"func\.func (?:public |private )?(?=@)", program)
    spelt = re.findall(r"\bdecomposition = (@[\w.\"]+)", program)
    return [one for one in found if not one.startswith("@chlo.") or one.partition("(")[0] not in spelt]


def types(program: str) -> set[str]:
    """What tensors hold, those aside in which JAX counts random numbers."""
    found = set()
    for function in functions(program):
        tensors = re.findall(r"tensor<(?:\d+x)*([^<>]+)>", re.sub(r"<\{.*?\}>", "", function))
        found |= set(tensors) - ({"ui64"} if "call @threefry2x32" in function else set())
    return found


def products(program: str) -> list[str]:
    """All products of matrices."""
    return re.findall(r"stablehlo\.(?:dot|dot_general|convolution)\b.*", program)


def rounded(program: str) -> list[str]:
    """The products with a float32 factor that a device may round."""
    exact = "precision = [HIGHEST, HIGHEST]"
    factors = ((one, re.search(r": \((.*?)\) ->", one)) for one in products(program))
    return [one for one, found in factors if (found is None or "f32>" in found[1]) and exact not in one]


CONSTANT = r"(?P<name>%\w+) = stablehlo\.constant dense<(?P<value>-?\d+)> : tensor<i32>"
LOOP = r"stablehlo\.while\b.*\n\s*cond \{\n(?P<condition>(?:.*\n)*?)\s*\} do \{"
COUNTED = r"\s*%\d+ = stablehlo\.compare\s+LT, %iterArg\w*, (%\w+),.*\n\s*stablehlo\.return %\d+ : .*\n"


def turns(program: str) -> list[int | None]:
    """How often each loop turns. None for one whose number of turns hangs on data."""
    found: list[int | None] = []
    for function in functions(program):
        constants: dict[str, int] = {}  # a name may come again: the last before a loop is the one in its scope
        for one in re.finditer(f"{CONSTANT}|{LOOP}", function):
            if one["name"]:
                constants[one["name"]] = int(one["value"])
            else:
                bound = re.fullmatch(COUNTED, one["condition"])
                found.append(constants.get(bound[1]) if bound else None)
    assert len(found) == sum(function.count("stablehlo.while") for function in functions(program))
    return found


def check(program: str, more: frozenset[str] = frozenset(), least: int = 1) -> None:
    """Raises if a program has other calls or types than allowed, or fewer than ``least`` products."""
    assert custom_calls(program) <= CUSTOM_CALLS
    assert types(program) <= TYPES | more
    assert len(products(program)) >= least
    assert not rounded(program)


def check_model(program: str, caches: cj.Caches, dtype: str) -> None:
    """Raises for what must not be in a program in which a model reads through donated caches."""
    check(program, frozenset({"bf16"} if dtype == "bfloat16" else ()), least=10)  # 7 of a layer, attention's 2, logits
    assert program.count("tf.aliasing_output") == len(jax.tree.leaves(caches))


def array(*shape, dtype=jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@cache
def abstract_model(dtype=jnp.float32, tied=True):
    config = cj.Config(
        vocab=VOCAB,
        dim=32,
        hidden=48,
        layers=2,
        heads=KV_HEADS * GROUP,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        tied=tied,
    )
    return jax.eval_shape(lambda: cj.Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))


def abstract_caches(model, policy, stores, length, capacity=CAPACITY):
    """Caches before they read ``length`` tokens, with the static fields that `corm_jax.prefill` would set."""
    made = jax.eval_shape(lambda: cj.make_caches(model, policy, batch=BATCH, capacity=capacity, stores=stores))
    tokens = np.full(BATCH, length, np.int32)
    caches = set_prompt(policy, replace(made, clock=Clock(0 * tokens, 0 * tokens)), tokens, tokens, chunk=1)
    return jax.eval_shape(lambda: caches)


def prefill(model, policy, caches, chunk, **options) -> str:
    count, tokens = array(BATCH, dtype=jnp.int32), array(BATCH, BLOCK, dtype=jnp.int32)
    return lowered(_prefill_block, model, policy, caches, array(BATCH, VOCAB), tokens, count, chunk=chunk, **options)


def decode(model, policy, caches) -> str:
    drawing = array(BATCH, VOCAB), jax.eval_shape(lambda: jax.random.key(0)), array(BATCH, dtype=bool)
    numbers = array(dtype=jnp.int32), array(1, dtype=jnp.int32), array(), array()
    return lowered(cj.decode, model, policy, caches, *drawing, *numbers, steps=STEPS)


def one_of_each(name, layout, dtype):
    """A policy, an abstract model, and how many tokens a prompt has: more than there are slots where that may be."""
    policy = POLICIES[name]
    roomy = layout == "rectangle" or whole_prompt(policy)
    return policy, abstract_model(DTYPES[dtype], tied=layout == "rectangle"), CAPACITY if roomy else 2 * CAPACITY


def test_all_policies_are_here():
    assert {name.partition(":")[0] for name in POLICIES} == {*cj.POLICIES, "recorder"}


@each(CROSSED, POLICIES)
def test_prefill_token_by_token(name, layout, dtype):
    policy, model, length = one_of_each(name, layout, dtype)
    caches = abstract_caches(model, policy, LAYOUTS[layout], length)
    check_model(prefill(model, policy, caches, chunk=1), caches, dtype)


@each(STRAIGHT)
def test_prefill_in_chunks(name, layout, dtype):
    policy, model, length = one_of_each(name, layout, dtype)
    caches = abstract_caches(model, policy, LAYOUTS[layout], length)
    check_model(prefill(model, policy, caches, CHUNK), caches, dtype)


@each(STRAIGHT, POLICIES)
def test_decode(name, layout, dtype):
    """One loop is over the tokens. Loops of a single turn do not count: every compiler of XLA removes them."""
    policy, model, length = one_of_each(name, layout, dtype)
    caches = jax.eval_shape(cj.end_prompt, abstract_caches(model, policy, LAYOUTS[layout], length))
    program = decode(model, policy, caches)
    check_model(program, caches, dtype)
    assert [turn for turn in turns(program) if turn != 1] == [STEPS]


@each(CROSSED)
def test_look(name, layout, dtype):
    policy, dtype = POLICIES[name], DTYPES[dtype]
    spec = cj.CacheSpec(KV_HEADS, CAPACITY, HEAD_DIM, dtype, LAYOUTS[layout])
    cache = jax.eval_shape(lambda: cj.begin_prompt(cj.make_cache(policy, spec), BLOCK))
    q = array(CHUNK, KV_HEADS, GROUP, HEAD_DIM, dtype=dtype)
    k = array(CHUNK, KV_HEADS, HEAD_DIM, dtype=dtype)
    encoding = cj.Rotary(array(HEAD_DIM // 2))
    program = lowered(jax.jit(cj.look), policy, cache, q, k, k, array(dtype=jnp.int32), encoding)
    check(program, frozenset({"bf16"} if dtype == jnp.bfloat16 else ()), least=2)


@pytest.mark.parametrize(
    ("what", "fidelity", "chunk"),
    [("replay", "renormalized", 1), ("replay", "recorded", CHUNK), ("sweep", "renormalized", CHUNK)],
)
@pytest.mark.parametrize("name", few_first(name for name in SPECS if not counts_in_cache(POLICIES[name])))
def test_replay(name, what, fidelity, chunk):
    """Traces are float32. Those of attention hold no keys, at which `l2norm` looks."""
    policy = POLICIES[name]
    block, moments = planned(policy) if chunk == 1 else (4 * CHUNK, None)
    steps, rows = 2 * block, fidelity == "recorded" and not name.startswith("l2norm")
    vectors = array(steps, KV_HEADS, HEAD_DIM)
    layer = QKV(array(steps, KV_HEADS, GROUP, HEAD_DIM), vectors, vectors)
    layer = Rows(array(KV_HEADS, GROUP, steps, steps)) if rows else layer
    function, number = _compiled, array(dtype=jnp.int32)
    static = {"chunk": chunk, "block": block, "moments": moments, "fidelity": fidelity, "errors": not rows}
    if what == "sweep":
        policy = jax.tree.map(lambda leaf: array(2, dtype=jnp.asarray(leaf).dtype), policy)
        function, static = _compiled_grid, static | {"points": 2, "differ": (True,) * len(jax.tree.leaves(policy))}
    form = Form(None if rows else cj.ALiBi(array(KV_HEADS, GROUP)), array(), None if rows else array(), number)
    arguments = policy, layer, form, number, number if chunk > 1 else None, number
    check(lowered(function, *arguments, **static), least=0 if rows else 2)


def measurements():
    """Programs that measure: name, function, arguments, and what is static."""
    model, policy = abstract_model(), POLICIES["corm:window=8,recent=4"]
    caches = jax.eval_shape(lambda: cj.make_caches(model, policy, batch=1, capacity=CAPACITY))
    tokens, count = array(1, BLOCK, dtype=jnp.int32), array(1, dtype=jnp.int32)
    recorder = POLICIES["recorder"]
    spec = cj.CacheSpec(KV_HEADS, CAPACITY, HEAD_DIM)
    cache = jax.eval_shape(lambda: cj.make_cache(recorder, spec, batch=1))
    layer, x, g, number = model.layers[0], array(1, BLOCK, 32), array(), array(dtype=jnp.int32)
    change, key = array(BLOCK, KV_HEADS, GROUP, HEAD_DIM), jax.eval_shape(lambda: jax.random.key(0))
    choices = array(2, dtype=jnp.int32), array(2, dtype=jnp.int32), array(2)
    q, k = array(2 * calibrate.CHUNK, KV_HEADS, GROUP, HEAD_DIM), array(2 * calibrate.CHUNK, KV_HEADS, HEAD_DIM)
    rows, keys = array(analysis.ROWS, KV_HEADS, GROUP, HEAD_DIM), array(256, KV_HEADS, HEAD_DIM)
    held = len(analysis.WINDOWS), len(analysis.RECENTS), KV_HEADS, 256
    state = array(KV_HEADS, 256, dtype=jnp.int32), array(*held, dtype=bool)
    head = array(BLOCK, HEAD_DIM)
    reads = model, policy, caches
    return {
        "perplexity": (perplexity._score, (*reads, tokens, tokens, count), {"chunk": CHUNK}),
        "agreement": (agreement._read, (*reads, tokens, count), {"chunk": CHUNK}),
        "asking": (asking._forced, (*reads, array(1, VOCAB), tokens, count), {"chunk": CHUNK}),
        "recording": (recording._layer, (layer, recorder, cache, x, count), {}),
        "mixture": (worth.mixed, (layer, x, change, g), {}),
        "gradient": (worth._back, (layer, x, change, g, x), {}),
        "loss": (worth._loss, (model, x, array(BLOCK, dtype=jnp.int32)), {}),
        "draw": (worth._draw, (model, x, key), {}),
        "calibration": (calibrate._measure, (*choices, q, k, k, q, number, number), {}),
        "analysis": (analysis._rows, (state, rows, keys, number, array(KV_HEADS, GROUP), g), {}),
        "bounds": (
            oracle._attention,
            (array(BLOCK, GROUP, HEAD_DIM), head, array(GROUP), Form(scale=g, window=number)),
            {},
        ),
    }


@pytest.mark.parametrize("name", measurements())
def test_measurements(name):
    function, arguments, static = measurements()[name]
    check(lowered(function, *arguments, **static))


@pytest.mark.parametrize("chunk", [1, 16])
def test_attention_takes_the_branch_of_the_device(chunk):
    """Only on a CPU is it summed up block by block, in a loop that ends at the last slot that is seen."""
    model, policy = abstract_model(), POLICIES["full"]
    caches = abstract_caches(model, policy, None, BLOCK, capacity=1024)
    programs = {name: prefill(model, policy, caches, chunk, platforms=[name]) for name in (*PLATFORMS, "cpu")}
    assert {name: None in turns(program) for name, program in programs.items()} == {
        "cuda": False,
        "tpu": False,
        "cpu": True,
    }


SQUARE = array(4, 4)


@pytest.mark.parametrize("platform", [*PLATFORMS, "cpu"])
@pytest.mark.parametrize("precision", [None, "default", "high", "highest"])
def test_a_rounded_product_is_found(platform, precision):
    program = lowered(
        jax.jit(lambda x, y: jnp.sin(jnp.einsum("ij,jk->ik", x, y, precision=precision))),
        SQUARE,
        SQUARE,
        platforms=[platform],
    )
    assert len(products(program)) == 1
    assert len(rounded(program)) == (precision != "highest")


def test_one_rounded_product_among_others_is_found():
    def linear(precision):
        return nnx.Linear(4, 4, use_bias=False, precision=precision, rngs=nnx.Rngs(0))

    layers = jax.eval_shape(lambda: nnx.List([linear("highest"), linear(None), linear("highest")]))
    program = lowered(jax.jit(lambda layers, x: layers[2](layers[1](layers[0](x)))), layers, SQUARE)
    assert len(rounded(program)) == len(products(program)) / 3
    with pytest.raises(AssertionError):
        check(program)


def test_16_bit_factors_need_no_precision():
    half = array(4, 4, dtype=jnp.bfloat16)
    assert not rounded(lowered(jax.jit(jnp.dot), half, half))
    mixed = jax.jit(lambda x, y: jax.lax.dot(x, y, preferred_element_type=jnp.float32))
    assert rounded(lowered(mixed, SQUARE, half))


def test_a_custom_call_is_found():
    program = lowered(jax.jit(lambda x: jnp.linalg.qr(x).R), SQUARE, platforms=["cpu"])
    assert custom_calls(program)
    with pytest.raises(AssertionError):
        check(program, least=0)


def test_what_cannot_be_lowered_for_a_device_fails():
    with pytest.raises(NotImplementedError):
        lowered(jax.jit(lambda x: jax.lax.linalg.schur(x)), SQUARE, platforms=["tpu"])


@pytest.mark.parametrize(("dtype", "name"), [(jnp.bfloat16, "bf16"), (jnp.float16, "f16"), (jnp.int8, "i8")])
def test_other_types_are_found(dtype, name):
    assert types(lowered(jax.jit(lambda x: x.astype(dtype) + dtype(1)), SQUARE)) >= {"f32", name}


def test_64_bits_are_found():
    with jax.enable_x64(True):
        program = lowered(jax.jit(lambda x: (jnp.arange(4), x.astype("float64").sum())), SQUARE)
    assert types(program) >= {"f64", "i64"}
    with pytest.raises(AssertionError):
        check(program, least=0)


def test_64_bits_of_random_numbers_are_no_others():
    """Those that count draws are left aside, and what is drawn is not."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert types(lowered(jax.jit(lambda key: jax.random.bits(key, (4,))), key)) == {"i32", "ui32"}
    with jax.enable_x64(True):
        assert "f64" in types(lowered(jax.jit(lambda key: jax.random.normal(key, (4,), "float64")), key))


def test_turns_are_counted():
    def loops(x):
        x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x)
        x = jax.lax.scan(lambda x, _: (jnp.cos(x), None), x, length=1)[0]
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)

    assert sorted(turns(lowered(jax.jit(loops), SQUARE)), key=str) == [1, 3, None]
    upto = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x), x))
    assert turns(lowered(upto, SQUARE, array(dtype=jnp.int32))) == [None]


def test_a_cache_that_is_not_updated_in_place_is_found():
    given = jax.jit(lambda x, y: (x + y, y), donate_argnums=0)
    assert lowered(given, SQUARE, SQUARE).count("tf.aliasing_output") == 1
    with pytest.warns(UserWarning, match="donated"):
        assert not lowered(jax.jit(lambda x: x.sum(), donate_argnums=0), SQUARE).count("tf.aliasing_output")
