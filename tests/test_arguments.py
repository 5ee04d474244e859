"""Arguments of `step`, the model and generation: what is meant is what happens; all else is refused in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import corm_jax as cj
from corm_jax.core.capacity import slots_for
from corm_jax.core.wrapper import Wrapper
from corm_jax.model.decoder import forward
from corm_jax.runs.perplexity import read_text
from simulator.testing import check_policy
from tests.drive import at_clock
from tests.mistakes import refused
from tests.models import tiny

MODEL = tiny()

# --- D.2: token ids

IDS = [[3, 1, 4, 1], [5, 9, 2, 6]]


@pytest.mark.parametrize(
    "prompts",
    [
        np.array(IDS),
        np.array(IDS, np.uint8),
        jnp.array(IDS),
        [np.array(row) for row in IDS],
        [jnp.array(row) for row in IDS],
        [[np.int64(token) for token in row] for row in IDS],
        [[jnp.int32(token) for token in row] for row in IDS],
        tuple(map(tuple, IDS)),
        np.array([None, *IDS], object)[1:],
    ],
    ids=lambda prompts: f"{type(prompts).__name__} of {type(prompts[0]).__name__}",
)
def test_token_ids_are_the_same_however_they_are_spelled(prompts):
    def run(prompts):
        out = cj.generate(
            MODEL, cj.Corm(window=4, recent=2), prompts, max_new_tokens=np.int64(3), capacity=np.int64(16)
        )
        return out.tokens

    assert run(prompts) == run(IDS)


def test_a_text_is_read_from_any_array():
    expected = read_text(MODEL, cj.H2O(recent=2), IDS[0], chunk=2)
    for ids in (np.array(IDS[0]), jnp.array(IDS[0]), tuple(IDS[0])):
        found = read_text(MODEL, cj.H2O(recent=2), ids, chunk=np.int32(2), capacity=np.array(8))
        np.testing.assert_array_equal(found.nll, expected.nll)
    for wrong, message in (
        (np.array(IDS), r"must be one row, not of shape \(2, 4\)"),
        ([0.5, 1], "token ids are whole numbers, not 0.5"),
        ("text", "token ids are whole numbers, not text such as 'text'"),
        ([1, 97], "token id 97 is outside the vocabulary of 97"),
    ):
        refused(message, read_text, MODEL, cj.Full(), wrong)
    for options in ({"chunk": 1.5}, {"capacity": 8.0}, {"prompt": 2.0}, {"overflow": "ignore"}, {"stores": "no"}):
        refused(next(iter(options)), read_text, MODEL, cj.Full(), IDS[0], **options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([3, 1, 4], r"several, one a row, not the ids of one text: give \[ids\]"),
        (np.array([3, 1, 4]), r"give \[ids\]"),
        (jnp.array([3, 1, 4]), r"give \[ids\]"),
        ([np.int64(3)], r"give \[ids\]"),
        ([1.5], r"give \[ids\]"),
        (3, "prompts must be a list"),
        (None, "prompts must be a list"),
        ("hello", "prompts must be a list"),
        (["hello"], "not text such as 'hello'"),
        ([["a", "b"]], "token ids are whole numbers, not 'a'"),
        ([[1.0, 2.0]], "token ids are whole numbers, not 1.0"),
        (np.ones((1, 3)), "token ids are whole numbers"),
        ([[True, False]], "token ids are whole numbers, not truth values"),
        (np.ones((1, 3), bool), "token ids are whole numbers"),
        ([[1, [2]]], "token ids of one text must be one row"),
        ([[[1, 2]]], r"one row, not of shape \(1, 2\)"),
        (np.ones((1, 1, 3), int), r"one row, not of shape \(1, 3\)"),
        ([None], "token ids must be a list or an array"),
        ([[None]], "token ids are whole numbers, not None"),
        ([{1: 2}], "token ids must be a list or an array"),
        ([], "a prompt is empty"),
        (np.zeros((0, 4), int), "a prompt is empty"),
        (np.zeros((2, 0), int), "a prompt is empty"),
        ([[1], np.array([], int)], "a prompt is empty"),
        ([[2**70]], "token ids"),
        ([[-1]], "token id -1 is outside the vocabulary"),
        ([np.array([1, 97])], "token id 97 is outside the vocabulary of 97"),
    ],
)
def test_what_are_no_token_ids(prompts, message):
    refused(message, cj.generate, MODEL, cj.Full(), prompts, max_new_tokens=2)


@pytest.mark.parametrize(
    "options",
    [{name: wrong} for name in ("max_new_tokens", "chunk", "capacity") for wrong in (0, -1, 1.5, True, "4", [0], {})]
    + [{"end": wrong} for wrong in (-1, 1.5, "a", None, [1.5], [True])]
    + [{"temperature": wrong} for wrong in (-1, "a", None, float("nan"), float("inf"), True, [1.0])]
    + [{"top_p": wrong} for wrong in (0, 1.5, float("nan"), "a", None, True)]
    + [{"seed": wrong} for wrong in (1.5, None, "a", True, 2**64)]
    + [{"overflow": wrong} for wrong in ("", None, True, "Error")]
    + [{"stores": wrong} for wrong in ("no", 0, 1.5, 3)]
    + [{"capacity": wrong} for wrong in ([8], [8, 8, 8], [8, 0], [8, 1.5])],
    ids=str,
)
def test_options_of_generation(options):
    said = refused(None, cj.stream, MODEL, cj.Full(), IDS, **{"max_new_tokens": 2} | options)
    assert next(iter(options)).removesuffix("y") in said


# --- D.4: arguments

SPEC = cj.CacheSpec(kv_heads=2, capacity=16, head_dim=8)
CORM = cj.Corm(window=4, recent=2)
QKV = {"q": jnp.ones((3, 2, 4, 8)), "k": jnp.ones((3, 2, 8)), "v": jnp.ones((3, 2, 8))}


def step(policy=CORM, cache=None, **arguments):
    cache = cj.make_cache(policy, SPEC) if cache is None else cache
    return cj.step(policy, cache, **QKV | {"count": 3} | arguments)


def cache_of(policy=CORM, batch=None, **spec):
    return cj.make_cache(policy, SPEC._replace(**spec), batch)


WRONG = {
    "a state of the same shape": (lambda: step(cj.H2O(recent=2), cache_of(cj.TOVA())), "made for TOVA, and H2O cannot"),
    "a state of another shape": (lambda: step(cj.H2O(recent=2), cache_of()), "made for Corm, and H2O cannot go on"),
    "inside wrappers": (
        lambda: step(cj.budget(cj.H2O(recent=2), 8), cache_of(cj.oneshot(cj.TOVA()))),
        r"made for TOVA, and Budget\(H2O\)",
    ),
    "a state cut short": (
        lambda: step(cache=cache_of()._replace(state=jnp.zeros((2, 15), jnp.int32))),
        r"holds a state of int32\[2, 15\], and Corm keeps int32\[2, 16\]",
    ),
    "a state of floats": (
        lambda: step(cache=cache_of()._replace(state=jnp.zeros((2, 16)))),
        r"state of float32\[2, 16\], and Corm keeps int32",
    ),
    "no state": (lambda: step(cache=cache_of()._replace(state=())), "holds a state of nothing, and Corm keeps int32"),
    "the state of one who knows nothing": (
        lambda: step(cj.AdaptiveCorm(recent=2), cache_of()._replace(made=None)), "and AdaptiveCorm keeps",
    ),
    "count beyond the chunk": (lambda: step(count=4), "count must be from 0 to 3, the tokens there are, not 4"),
    "count below 0": (lambda: step(count=-1), "count must be from 0 to 3"),
    "count a fraction": (lambda: step(count=1.5), "count must be one whole number from 0 to 3"),
    "count a truth": (lambda: step(count=True), "count must be one whole number"),
    "count several": (lambda: step(count=jnp.array([3])), "count must be one whole number"),
    "count none": (lambda: step(count=None), "count must be one whole number"),
    "too little room": (lambda: cache_of(cj.Corm()), r"capacity 16 cannot hold .* never evicts.*\(256 keys\)"),
    "too little room in a step": (lambda: step(cj.Corm(), cache_of()), r"capacity 16 cannot hold .* \(256 keys\)"),
    "too little room in a pool": (
        lambda: cache_of(cj.Corm(recent=[5, 28]), stores=1), r"capacity 16 cannot hold .* \(17 keys\)",
    ),
    "a cache of integers": (lambda: cache_of(dtype=jnp.int8), "a cache holds floating-point numbers"),
    "a cache of nothing": (lambda: cache_of(dtype=None), "a cache holds floating-point numbers"),
    "a cache of truths": (lambda: cache_of(dtype=bool), "a cache holds floating-point numbers"),
    "an unknown dtype": (lambda: cache_of(dtype="float31"), "a cache holds floating-point numbers .* 'float31'"),
    "a capacity of 0": (lambda: cache_of(capacity=0), "capacity must be a whole number from 1"),
    "half a slot": (lambda: cache_of(capacity=16.5), "capacity must be a whole number from 1"),
    "heads": (lambda: cache_of(kv_heads=True), "kv_heads must be a whole number"),
    "batch": (lambda: cache_of(batch=0), "batch must be a whole number from 1"),
    "batch of 2.0": (lambda: cache_of(batch=2.0), "batch must be a whole number from 1"),
    "stores": (lambda: cache_of(stores="yes"), "stores must be a whole number from 1 to 2147483647, not 'yes'"),
    "stores that heads cannot share": (lambda: cache_of(stores=3), "2 key-value heads cannot share 3 stores evenly"),
    "a tuple for a shape": (lambda: cj.make_cache(CORM, (2, 16, 8)), "must be a CacheSpec"),
    "a batch of queries": (
        lambda: step(q=QKV["q"][None]),
        r"q must be \[tokens, kv_heads, group, head_dim\], got the shape \(1, 3, 2, 4, 8\); for a batch, jax.vmap",
    ),
    "queries by head": (lambda: step(q=jnp.ones((3, 8, 8))), r"q must be \[tokens, kv_heads, group, head_dim\], got"),
    "keys of other heads": (
        lambda: step(k=jnp.ones((3, 4, 8))), r"k must be .* got the shape \(3, 4, 8\) for a cache of kv_heads=2",
    ),
    "keys of another size": (lambda: step(k=jnp.ones((3, 2, 4))), "k must be .* head_dim=8"),
    "values of another size": (lambda: step(v=jnp.ones((3, 2, 4))), "v must be .* head_dim=8"),
    "fewer values": (lambda: step(v=jnp.ones((2, 2, 8))), r"v must be .* got the shape \(2, 2, 8\) with queries of 3"),
    "heads before tokens": (lambda: step(k=jnp.ones((2, 3, 8))), "k must be"),
    "no tokens": (lambda: step(q=QKV["q"][:0], k=QKV["k"][:0], v=QKV["v"][:0]), "q must be"),
    "whole numbers": (lambda: step(q=jnp.ones((3, 2, 4, 8), int)), "q must hold floating-point numbers, not int32"),
    "a list": (lambda: step(k=[[1.0]]), "k must be an array .*, not a list"),
    "a batch of caches": (lambda: step(cache=cache_of(batch=3)), "the cache is one of a batch of 3.*use jax.vmap"),
    "a batch of pools": (lambda: step(cache=cache_of(batch=3, stores=1)), "a batch of 3"),
    "all layers": (lambda: step(cache=(cache_of(), cache_of())), "several layers: take each by itself"),
    "no cache": (lambda: step(cache=3), "the cache must be the LayerCache of one layer"),
    "a name": (lambda: cj.step("tova", cache_of(), **QKV, count=3), "a policy must be an object such as"),
    "a class": (lambda: cj.make_cache(cj.TOVA, SPEC), "a policy must be an object such as"),
    "three heads": (
        lambda: step(cj.Corm(window=[4, 5, 6], recent=2), cache_of()),
        r"the policy has window of shape \(3,\) for a layer of 2",
    ),
    "two layers": (
        lambda: step(cj.Corm(window=[[4, 5]], recent=2), cache_of()),
        r"the policy has window of shape \(1, 2\)",
    ),
    "frequencies": (
        lambda: step(cj.StreamingLLM(positions="cache"), encoding=cj.Rotary(np.ones(5))),
        r"frequencies must be \[pairs\], at most head_dim / 2 = 4, got the shape \(5,\)",
    ),
    "slopes": (lambda: step(encoding=cj.ALiBi(np.ones((3, 2)))), r"slopes must be \[kv_heads, group\] = \(2, 4\), got"),
    "no encoding": (lambda: step(encoding=np.ones(4)), r"encoding must be how positions enter, such as Rotary"),
    "a window of none": (lambda: step(window=0), "window must be a whole number above 0, not 0"),
    "half a window": (lambda: step(window=1.5), "window must be a whole number, not 1.5"),
    "a negative scale": (lambda: step(scale=-1), "scale must be a number above 0, not -1"),
    "a soft cap of text": (lambda: step(softcap="50"), "softcap must be a number, not '50'"),
    "an endless soft cap": (lambda: step(softcap=np.inf), "softcap must be a number above 0, not inf"),
    "a mask of numbers": (lambda: step(mask=np.ones((3, 3))), "mask must be a function of the positions"),
    "who needs something unknown": (lambda: cj.make_cache(Nosy(), SPEC), r"Nosy needs \('heads',\): needs must be"),
    "who knows moments, but not which": (
        lambda: cj.make_cache(Punctual(), SPEC), "Punctual has moments, but no `important`: define it, or",
    ),
}  # fmt: skip


@cj.policy
class Punctual(cj.TOVA):
    @property
    def traits(self):
        return super().traits._replace(moments=8)

    def moment(self, state, slots):
        return slots.position + 9


@cj.policy
class Nosy(cj.TOVA):
    @property
    def traits(self):
        return super().traits._replace(needs=("heads",))


@pytest.mark.parametrize("what", WRONG)
def test_arguments_that_cannot_be(what):
    function, message = WRONG[what]
    refused(message, function)
    refused(message, jax.jit(lambda: jnp.zeros(()) if function() else 0))  # while it is traced


SHAPES = st.sampled_from([1, 2, 3, 4, 8, 16])


@settings(max_examples=60)
@given(data=st.data())
def test_shapes_at_random(data):
    """Whatever is wrong with a shape is refused by the name of the argument, before anything is computed."""
    shapes = {name: list(x.shape) for name, x in QKV.items()}
    name = data.draw(st.sampled_from(sorted(shapes)))
    shape, how = shapes[name], data.draw(st.sampled_from(["drop", "add", "size", "swap"]))
    axis = data.draw(st.integers(0, len(shape) - 1))
    if how == "drop":
        del shape[axis]
    elif how == "add":
        shape.insert(axis, data.draw(SHAPES))
    elif how == "size":
        shape[axis] = data.draw(SHAPES)
    else:
        other = data.draw(st.integers(0, len(shape) - 1))
        shape[axis], shape[other] = shape[other], shape[axis]
    q, k, v = (tuple(shapes[each]) for each in "qkv")
    fits = len(q) == 4 and k == v == (q[0], 2, 8) and q[1::2] == (2, 8)
    arrays = {each: jax.ShapeDtypeStruct(tuple(one), jnp.float32) for each, one in shapes.items()}

    def traced():
        return jax.eval_shape(lambda x: cj.step(CORM, cache_of(), **x, count=min(3, *(len(q) and q[:1]))), arrays)

    if fits:
        assert traced()[0].shape == q
    else:
        refused("[qkv] must be .*got the shape", traced)


def test_a_traced_count_ends_at_the_tokens_there_are():
    for count, expected in ((9, 3), (3, 3), (0, 0), (-2, 0)):
        cache = jax.jit(lambda count: step(count=count)[1])(count)
        assert int(cache.clock.seen) == expected
        assert (np.asarray(cache.position) >= 0).sum() == 2 * expected
    for count in (np.int64(2), jnp.int32(2), np.array(2), 2):
        assert int(step(count=count)[1].clock.seen) == 2


def test_a_position_alone_is_everybodys():
    """Policies that remember nothing take over each other's caches."""
    _, cache = step(cj.Full())
    assert int(step(cj.StreamingLLM(), cache)[1].clock.seen) == 6


TWO = [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        (lambda: cj.make_caches(MODEL, CORM, batch=3, capacity=8), "are of a batch of 3, and there are 2 rows to read"),
        (
            lambda: cj.Caches.of(list(cj.make_caches(MODEL, CORM, batch=2, capacity=8))[:1]),
            "caches for 1 layers, and the model has 2",
        ),
        (lambda: cj.make_caches(MODEL, cj.TOVA(), batch=2, capacity=8), "was made for TOVA, and Corm cannot go on"),
        (
            lambda: cj.make_caches(tiny(kv_heads=1), CORM, batch=2, capacity=8),
            "of layer 0 is for 1 key-value heads of 8",
        ),
        (lambda: cj.Caches.of([cache_of()] * 2), "the caches are of one sequence, and there are 2 rows to read"),
        (
            lambda: cj.make_caches(MODEL, CORM, batch=2, capacity=8)[0],
            "are Caches, as make_caches returns them, not LayerCache",
        ),
        (lambda: None, "are Caches, as make_caches returns them, not NoneType"),
        (lambda: [cache_of(batch=2)] * 2, "are Caches, as make_caches returns them, not list"),
    ],
)
def test_caches_of_another(caches, message):
    refused(message, cj.prefill, MODEL, CORM, caches(), TWO)
    refused(message, forward, MODEL, CORM, caches(), jnp.array(TWO), jnp.array([3, 3]), chunk=1)
    rest = np.zeros((2, 97), np.float32), jax.random.key(0), np.zeros(2, bool), np.int32(3)
    rest += np.zeros(0, np.int32), np.float32(0), np.float32(1)
    refused(message, cj.decode, MODEL, CORM, caches(), *rest, steps=2)


def test_what_else_the_model_refuses():
    caches = cj.make_caches(MODEL, CORM, batch=2, capacity=8)
    for count, tokens, message in (
        ([3, 4], TWO, "count must be from 0 to 3"),
        ([3], TWO, "count must be 2 whole numbers, one a row"),
        (3, TWO, "count must be 2 whole numbers, one a row"),
        ([3.0, 3.0], TWO, "count must be 2 whole numbers"),
        ([3, 3], np.ones((2, 3), np.float32), "tokens must be whole numbers .* got float32"),
        ([3, 3], TWO[0], r"tokens must be whole numbers \[batch, tokens\], got int32 of the shape \(3,\)"),
    ):
        refused(message, forward, MODEL, CORM, caches, jnp.array(tokens), jnp.array(count), chunk=1)
    for policy in ("tova", cj.TOVA, ["tova", "tova"], None):
        refused("a policy must be an object such as", cj.make_caches, MODEL, policy, batch=1, capacity=8)
    for capacity in (0, 1.5, "8", None, [8], [8, 0], True):
        refused("capacit", cj.make_caches, MODEL, CORM, batch=1, capacity=capacity)
    for capacity in (np.int64(8), [8, np.int64(8)], np.array([8, 8]), jnp.array([8, 8]), jnp.int32(8)):
        assert cj.make_caches(MODEL, CORM, batch=1, capacity=capacity)[1].k.shape == (1, 2, 8, 8)


# --- D.5: the end of the prompt

WAITING = {
    cj.SnapKV(budget=4, window=2, kernel=3): [4, 8, 4, 5],
    cj.AdaKV(budget=4, window=2): [4, 8, 4, 5],
    cj.oneshot(cj.budget(cj.TOVA(), 5)): [4, 8, 5, 5],
    cj.protect(cj.budget(cj.oneshot(cj.L2Norm()), 5), recent=3): [4, 8, None, None],
}


@pytest.mark.parametrize("policy", WAITING, ids=repr)
def test_who_waits_for_the_prompts_end_is_told_it(policy):
    @jax.jit
    def read(cache, key, tokens):
        x = jax.random.normal(jax.random.key(key), (4, 2, 8))
        return cj.step(policy, cache, x[:, :, None], x, x, tokens)[1]

    message = r"waits for the end of the prompt.* cache = corm_jax.begin_prompt\(cache, tokens\)"
    refused(message, step, policy, cache_of(policy))
    refused(message, read, cache_of(policy), 0, 3)
    cache, live = cj.begin_prompt(cache_of(policy), 10), []
    for key, tokens in enumerate((4, 4, 2, 1)):
        cache = read(cache, key, tokens)
        live.append(float((cache.position >= 0).sum() / 2))
    expected = WAITING[policy]
    assert live[:2] == expected[:2]
    assert live[2:] == expected[2:] if expected[3] else live[2] <= 8
    assert int(cj.begin_prompt(cache, np.int64(6)).clock.prompt) == 17
    assert cj.begin_prompt(cache_of(policy, batch=2), [3, 4]).clock.prompt.tolist() == [3, 4]
    assert int(jax.jit(cj.begin_prompt)(cache_of(policy), 7).clock.prompt) == 7


def test_a_prompt_that_cannot_be():
    cache = cache_of()
    for wrong in (0, -1, 1.5, True, "3", None, [], jnp.float32(3), [0, 3], 2**31):
        refused("prompt", cj.begin_prompt, cache, wrong)
    refused("for a cache of one sequence: give one number", cj.begin_prompt, cache, [1, 2])
    refused(r"the shape \(3,\) for a cache of 2 rows", cj.begin_prompt, cache_of(batch=2), [1, 2, 3])
    refused("takes a LayerCache, or the Caches of a model, not tuple", cj.begin_prompt, (cache,), 3)
    assert int(cj.begin_prompt(at_clock(cache, seen=jnp.int32(5)), 2**31 - 1).clock.prompt) == 2**31 - 1


def test_a_model_that_was_not_told_the_prompt():
    policy = cj.SnapKV(budget=4, window=2)
    caches = cj.make_caches(MODEL, policy, batch=1, capacity=16)
    refused("SnapKV waits for the end", forward, MODEL, policy, caches, jnp.array([[1, 2, 3]]), jnp.array([3]), chunk=1)
    told = cj.begin_prompt(caches, 3)
    _, after, _ = forward(MODEL, policy, told, jnp.array([[1, 2, 3, 4, 5, 6]]), jnp.array([6]), chunk=3)
    assert (np.asarray(cj.usage(after).live) == 6).all()
    told = cj.begin_prompt(caches, 6)
    _, after, _ = forward(MODEL, policy, told, jnp.array([[1, 2, 3, 4, 5, 6]]), jnp.array([6]), chunk=3)
    assert (np.asarray(cj.usage(after).live) == 4).all()


# --- E.4: what wrappers pass on

INSIDE = [kind() if kind is not cj.Window else kind(size=64) for kind in cj.POLICIES.values()]
INSIDE += [cj.StreamingLLM(positions="cache"), cj.Scissorhands(budget=0.3), cj.protect(cj.H2O(recent=5), recent=2)]
INSIDE += [Wrapper(policy=cj.Scissorhands(budget=12, recent=3))]


@pytest.mark.parametrize("policy", INSIDE, ids=repr)
def test_no_wrapper_loses_what_a_policy_says_of_itself(policy):
    own = policy.traits
    protected = cj.protect(policy, sinks=4, recent=7)
    most = None if own.most is None else own.most + 11
    assert protected.traits == own._replace(protected=own.protected + 11, recent=max(own.recent, 7), most=most)
    assert cj.oneshot(policy).traits == own._replace(whole_prompt=True, most=None)
    assert Wrapper(policy=policy).traits == own
    if "budget" not in repr(policy):
        held = own.most or 300
        assert cj.Budget(policy=policy, tokens=300).traits == own._replace(most=min(held, 300), moments=0)
        assert cj.Budget(policy=policy, per_mille=300).traits == own._replace(moments=0)
        assert cj.Budget(policy=cj.budget(policy, 290), tokens=300).traits == own._replace(
            most=min(held, 290), moments=0
        )
    for wrap in (protected, cj.oneshot(policy), cj.oneshot(cj.oneshot(protected))):
        assert wrap.traits.needs == own.needs
        assert wrap.traits.positions == own.positions
        assert isinstance(wrap, cj.Policy)


def test_caches_are_as_large_as_what_can_stay():
    policy = cj.Scissorhands(budget=512)
    for wrapped, most in (
        (policy, 512),
        (cj.protect(policy, sinks=4), 516),
        (cj.protect(policy, sinks=[4, 6], recent=20), 538),
        (cj.protect(cj.budget(cj.TOVA(), 300), sinks=4), 304),
        (cj.budget(cj.protect(cj.TOVA(), sinks=4), 300), 300),
        (cj.budget(cj.budget(cj.TOVA(), 300), 200), 200),
        (cj.oneshot(policy), 8192 - 16),
        (cj.Scissorhands(budget=0.5), 8192 - 16),
        (cj.budget(cj.oneshot(cj.TOVA()), 300), 8192 - 16),
    ):
        assert slots_for(wrapped, None, 8192, 16) == most + 16


@pytest.mark.parametrize(
    "policy",
    [
        cj.protect(cj.Scissorhands(budget=5, window=4, recent=1, drop=0.001), sinks=2, recent=2),
        cj.protect(cj.budget(cj.H2O(recent=2), 5), sinks=2, recent=[3, 1]),
        cj.budget(cj.protect(cj.L2Norm(), sinks=1), [4, 6]),
    ],
    ids=repr,
)
def test_what_policies_say_of_themselves_holds(policy):
    check_policy(policy, only="histories", examples=15)


# --- E.5: overflow


def test_overflow_of_an_earlier_call_is_no_error():
    patient, eager = cj.Corm(window=100, recent=2), cj.Corm(window=1, recent=1)
    caches = cj.make_caches(MODEL, patient, batch=1, capacity=20)
    _, caches = cj.prefill(MODEL, patient, caches, [list(range(30))], overflow="evict")
    assert (cj.usage(caches).overflow == 10).all()
    _, caches = cj.prefill(MODEL, eager, caches, [[1]], overflow="evict")  # makes room
    before = np.asarray(cj.usage(caches).overflow)
    _, caches = cj.prefill(MODEL, patient, caches, [[1, 2]], overflow="error")
    np.testing.assert_array_equal(cj.usage(caches).overflow, before)
    with pytest.raises(cj.CacheOverflowError, match="layer 0 ran out of its 20 slots a head"):
        cj.prefill(MODEL, patient, caches, [list(range(30))], overflow="error")


def test_usage_is_of_the_caches_of_a_model():
    one = cache_of()
    for wrong in (one, (one,), [None], (cache_of(batch=2), 3), cj.Caches.of([one])):
        refused("usage takes the Caches of a model", cj.usage, wrong)


def test_slots_for_all_tokens_are_enough_for_any_policy():
    """Of 300 keys that are protected only as many come as there are tokens."""
    spec, policy = cj.CacheSpec(2, 16, 8), cj.Corm(recent=300)
    assert cj.make_cache(policy, spec, tokens=16).position.shape == (2, 16)
    refused("capacity 16 cannot hold", cj.make_cache, policy, spec, tokens=17)


def test_logits_of_another_vocabulary():
    caches = cj.make_caches(MODEL, cj.Full(), batch=1, capacity=8)
    numbers = jnp.int32(1), jnp.zeros(0, jnp.int32), jnp.float32(0), jnp.float32(1)
    wrong = jnp.zeros((1, MODEL.config.vocab - 1))
    arguments = MODEL, cj.Full(), caches, wrong, jax.random.key(0), jnp.zeros(1, bool), *numbers
    refused("logits must have the shape", cj.decode, *arguments, steps=1)
