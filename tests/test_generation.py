"""Prefill, decode and generation: ragged batches, one compile, one-shot prompts, errors."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corm_jax import CacheOverflowError, Corm, CormError, Full, decode, generate, oneshot, parse, prefill, stream, usage
from corm_jax.core.capacity import slots_for
from corm_jax.model.decoder import forward, make_caches
from corm_jax.model.generation import sample
from tests.drive import FUSED
from tests.heads import live_sets
from tests.models import tiny

MODEL = tiny()
prompts_of_length = st.lists(st.integers(1, 300), min_size=2, max_size=3).map(
    lambda lengths: [np.random.default_rng(n).integers(0, 97, n).tolist() for n in lengths]
)


def read(policy, prompts, capacity=320, **options):
    caches = make_caches(MODEL, policy, batch=len(prompts), capacity=capacity)
    return prefill(MODEL, policy, caches, prompts, **options)


def kept(caches, row):
    return [[live_sets(head) for head in np.asarray(layer.position[row])] for layer in caches]


@settings(max_examples=8)
@given(prompts=prompts_of_length, chunk=st.sampled_from([1, 8]), window=st.integers(1, 40), capacity=st.just(48))
def test_each_row_of_a_ragged_batch_is_as_if_alone(prompts, chunk, window, capacity):
    policy = Corm(window=window, recent=4)
    prompts = [*prompts, [5]][:3]
    logits, caches = read(policy, prompts, capacity, chunk=chunk)
    for row, prompt in enumerate(prompts):
        alone, own = read(policy, [prompt], capacity, chunk=chunk)
        np.testing.assert_allclose(logits[row], alone[0], atol=2e-5)
        assert kept(caches, row) == kept(own, 0)
        assert [layer.overflow[row].tolist() for layer in caches] == [layer.overflow[0].tolist() for layer in own]
        assert int(caches.clock.seen[row]) == len(prompt)


def test_a_window_beyond_the_sequence_is_the_full_cache():
    prompt = [np.random.default_rng(0).integers(0, 97, 300).tolist()]
    full, _ = read(Full(), prompt)
    for chunk in (1, 64):
        corm, caches = read(Corm(window=2**31 - 1, recent=1), prompt, chunk=chunk)
        np.testing.assert_allclose(corm, full, atol=2e-5)
        assert (usage(caches).live == 300).all()


@pytest.mark.parametrize("length", [40, 300])
def test_one_shot_is_one_chunk_of_the_whole_prompt(length):
    """Read in blocks with eviction put off, a prompt keeps what a single chunk of its length keeps."""
    policy, prompt = Corm(window=9, recent=3), [np.random.default_rng(1).integers(0, 97, length).tolist()]
    logits, caches = read(oneshot(policy), prompt)
    whole_logits, whole = read(policy, prompt, chunk=length)
    assert kept(caches, 0) == kept(whole, 0)
    assert int(usage(caches).live.sum()) < length * 4
    np.testing.assert_allclose(logits, whole_logits, atol=2e-5)
    full, _ = read(Full(), prompt)
    np.testing.assert_allclose(logits, full, atol=2e-5)  # nothing was missing while it read


def test_a_later_prompt_is_judged_anew():
    policy = parse("snapkv:budget=20,window=4")
    first, second = (np.random.default_rng(seed).integers(0, 97, 90).tolist() for seed in (0, 1))
    _, caches = read(policy, [first])
    assert (usage(caches).live == 20).all()
    _, caches = prefill(MODEL, policy, caches, [second])
    assert (usage(caches).live == 20).all()
    assert all(set(range(176, 180)) <= head for layer in kept(caches, 0) for head in layer)


def test_one_compile_whatever_the_prompt():
    compiled = []

    def listener(name, _, **about):
        if "backend_compile" in name:
            compiled.append(about)

    jax.monitoring.register_event_duration_secs_listener(listener)
    model = tiny(seed=1, vocab=89)

    def run(policy, length, **options):
        del compiled[:]
        prompt = np.random.default_rng(length).integers(0, 89, length).tolist()
        generate(model, policy, [prompt], max_new_tokens=40, capacity=350, **options)
        return [about["fun_name"] for about in compiled]

    first = run(Corm(window=20, recent=4), 5)
    assert first.count("jit(_prefill_block)") == 1
    assert first.count("jit(decode)") == 1
    assert run(Corm(window=50, recent=2), 300, temperature=0.7, top_p=0.5, end=[], seed=3) == []


def test_decoding_goes_on_where_the_prompt_ended():
    """Greedy tokens are those of reading prompt and continuation at once, and the caches hold the same keys."""
    policy, prompt = Corm(window=6, recent=3), [1, 2, 3, 4, 5, 6, 7]
    generated = generate(MODEL, policy, [prompt], max_new_tokens=21, capacity=64)
    tokens = generated.tokens[0]
    assert len(tokens) == 21
    for cut in (0, 1, 20):
        logits, _ = read(policy, [prompt + tokens[:cut]], 64)
        assert int(logits[0].argmax()) == tokens[cut]
    _, caches = read(policy, [prompt + tokens], 64)
    assert kept(caches, 0) == kept(generated.caches, 0)


def test_a_prompt_is_read_in_the_chunks_asked_for():
    """A chunk of 30 tokens needs room for all of them beside what is live; single tokens fit."""
    policy, prompt = Corm(window=4, recent=2), [np.random.default_rng(5).integers(0, 97, 60).tolist()]
    lost = {
        chunk: int(
            usage(generate(MODEL, policy, prompt, max_new_tokens=1, capacity=32, chunk=chunk).caches).overflow.sum()
        )
        for chunk in (1, 30)
    }
    assert lost[1] == 0 < lost[30]


def test_rows_stop_at_their_own_end():
    prompts = [[3, 1, 4], [1, 5]]
    free = generate(MODEL, Full(), prompts, max_new_tokens=20)
    end = free.tokens[0][2]
    stopped = generate(MODEL, Full(), prompts, max_new_tokens=20, end=[end])
    for row in range(2):
        expected = free.tokens[row]
        expected = expected[: expected.index(end)] if end in expected else expected
        assert stopped.tokens[row] == expected
    assert int(stopped.caches.clock.seen[0]) == len(prompts[0]) + len(stopped.tokens[0]) + 1  # the end itself was read
    pieces = list(stream(MODEL, Full(), prompts[:1], max_new_tokens=20))
    assert [len(piece.tokens[0]) for piece in pieces] == [16, 4]


def test_sampling():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    draw = jax.vmap(lambda key, p: sample(logits, key, jnp.float32(1), p)[0], in_axes=(0, None))
    keys = jax.random.split(jax.random.key(0), 2000)
    share = np.bincount(draw(keys, jnp.float32(1.0)), minlength=4) / 2000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.04)
    share = np.bincount(draw(keys, jnp.float32(0.6)), minlength=4) / 2000
    np.testing.assert_allclose(share, [0.625, 0.375, 0, 0], atol=0.04)
    assert set(np.asarray(draw(keys, jnp.float32(0.1)))) == {0}
    assert int(sample(logits, keys[0], jnp.float32(0), jnp.float32(1))[0]) == 0


def test_caches_are_updated_in_place():
    policy = Corm(window=4, recent=2)
    before = make_caches(MODEL, policy, batch=1, capacity=64)
    _, after = prefill(MODEL, policy, before, [[1, 2, 3]])
    assert all(
        leaf.is_deleted()
        for one in before
        for leaf in jax.tree.leaves(one._replace(clock=replace(one.clock, prompt=None)))
    )
    arguments = (np.zeros((1, 97), np.float32), jax.random.key(0), np.zeros(1, bool), np.int32(3))
    options = (np.zeros(0, np.int32), np.float32(0), np.float32(1))
    compiled = decode.lower(MODEL, policy, after, *arguments, *options, steps=4).compile(FUSED).as_text()
    assert " scatter(" in compiled
    assert not re.search(r"f32\[1,2,64,8\]\S* copy\(", compiled)  # no copy of keys or values


def test_a_policy_for_each_layer():
    policies = (Full(), Corm(window=4, recent=2))
    _, caches = read(policies, [list(range(30))])
    live = np.asarray(usage(caches).live)
    assert (live[0] == 30).all()
    assert (live[1] < 30).all()
    with pytest.raises(CormError, match="3 policies for 2 layers"):
        make_caches(MODEL, (Full(),) * 3, batch=1, capacity=8)


@pytest.mark.parametrize(
    ("spec", "chunk", "slots"), [("h2o:recent=4,budget=12", 5, 17), ("h2o:recent=4,budget=0.5", 1, 30)]
)
def test_a_budget_of_keys_is_all_that_is_allocated(spec, chunk, slots):
    prompt = np.random.default_rng(0).integers(0, 97, 20).tolist()
    small = generate(MODEL, parse(spec), [prompt], max_new_tokens=10, chunk=chunk)
    large = generate(MODEL, parse(spec), [prompt], max_new_tokens=10, chunk=chunk, capacity=40)
    assert small.caches[0].position.shape[-1] == slots
    assert small.tokens == large.tokens
    assert int(usage(small.caches).overflow.sum()) == 0


def test_usage_counts_bytes():
    _, caches = read(Corm(window=4, recent=2), [list(range(30)), [1, 2]], capacity=40)
    used = usage(caches)
    per_key = 2 * 8 * 4  # k and v, head_dim 8, float32
    assert used.bytes_live == int(used.live.sum()) * per_key
    assert used.bytes_full == 2 * 2 * 32 * per_key  # layers, heads, 30 + 2 tokens
    slots = 2 * 2 * 2 * 40  # layers, rows, heads, capacity
    held = slots * (per_key + 4 + 4) + 2 * 2 * 2 * 4  # position, last; overflow
    assert used.bytes_allocated == held + 2 * (4 + 4)  # seen, prompt
    assert used.seen.tolist() == [30, 2]


def test_bfloat16_models_have_bfloat16_caches():
    model = tiny(dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # Flax's RMSNorm mixes in its float32 statistics
        generated = generate(model, Corm(window=4, recent=2), [[1, 2, 3]], max_new_tokens=4)
    assert generated.caches[0].k.dtype == jnp.bfloat16
    assert len(generated.tokens[0]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1, 97]]}, "token id 97 is outside the vocabulary of 97"),
        ({"prompts": [[1], [-1]]}, "token id -1 is outside the vocabulary"),
        ({"prompts": [[1], []]}, "a prompt is empty"),
        ({"prompts": []}, "a prompt is empty"),
        ({"chunk": 0}, "chunk must be a whole number from 1 to 2147483647, not 0"),
        (
            {"capacity": 4},
            r"capacity 4 cannot hold the keys that the policy never evicts, such as its recent ones \(5 keys\)",
        ),
        ({"capacity": 8, "chunk": 16}, r"capacity 8 cannot hold a chunk \(16 keys\)"),
        (
            {"policy": oneshot(Corm(window=9, recent=5)), "capacity": 8},
            r"capacity 8 cannot hold the whole prompt, which the policy keeps until it has been read \(9 keys\)",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 to 2147483647, not 0"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"overflow": "ignore"}, "overflow must be evict or error, not 'ignore'"),
    ],
)
def test_bad_input(options, message):
    options = {"prompts": [list(range(9))], "max_new_tokens": 3, **options}
    with pytest.raises(CormError, match=message):
        generate(MODEL, options.pop("policy", Corm(window=9, recent=5)), options.pop("prompts"), **options)


def test_a_block_is_whole_chunks():
    caches = make_caches(MODEL, Full(), batch=1, capacity=8)
    with pytest.raises(CormError, match="chunk 2 does not divide a block of 3 tokens"):
        forward(MODEL, Full(), caches, jnp.array([[1, 2, 3]]), jnp.array([3]), chunk=2)
    with pytest.raises(CormError, match="5 new keys do not fit into 4 slots"):
        forward(
            MODEL,
            Full(),
            make_caches(MODEL, Full(), batch=1, capacity=4),
            jnp.zeros((1, 5), int),
            jnp.array([5]),
            chunk=5,
        )
    with pytest.raises(CormError, match="capacity must be a whole number from 1 to 2147483647, not 0"):
        make_caches(MODEL, Full(), batch=1, capacity=0)


def test_overflow_is_counted_or_an_error():
    policy, prompt = Corm(window=100, recent=2), [list(range(30))]
    _, caches = read(policy, prompt, capacity=10)
    assert (usage(caches).overflow == 20).all()
    with pytest.raises(CacheOverflowError, match="layer 0 ran out of its 10 slots a head"):
        read(policy, prompt, capacity=10, overflow="error")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lru", "unknown policy 'lru': choose from full, corm"),
        ("corm:size=3", "unknown option 'size=3' in 'corm:size=3': corm has window=..., recent=..."),
        ("corm:window", "unknown option 'window'"),
        ("full:window=3", "unknown option 'window=3' in 'full:window=3': full has budget=..., sinks=..., recent=..."),
        ("corm:window=3,window=4", "option 'window' is given twice"),
        ("corm:window=x", "window must be a whole number from 1 to 2147483647, not 'x'"),
        ("corm:window=0", "window must be a whole number from 1 to 2147483647, not 0"),
        ("corm:recent=-1", "recent must be a whole number from 1"),
        ("corm:window=3000000000", "window must be a whole number from 1"),
        ("corm:group=max", "group must be any or mean, not 'max'"),
        ("corm:eager=2", "eager must be true or false, not 2"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(CormError) as caught:
        parse(spec)
    assert message in str(caught.value)


def test_good_specs():
    assert parse("full") == Full()
    assert parse(" corm: window=3, eager=true,threshold=live ") == Corm(window=3, eager=True, threshold="live")
    with pytest.raises(CormError, match="window must be a whole number"):
        Corm(window=2.5)


def test_one_window_for_each_layer_and_head():
    """As with a policy for each layer."""
    window, recent = np.array([[3, 40], [9, 1]]), np.array([[2, 1], [1, 5]])
    each = [Corm(window=w, recent=r) for w, r in zip(window, recent, strict=True)]
    options = {"max_new_tokens": 8, "chunk": 4, "capacity": 70}
    one, other = (
        generate(MODEL, policy, [list(range(50))], **options) for policy in (Corm(window=window, recent=recent), each)
    )
    assert one.tokens == other.tokens
    np.testing.assert_array_equal(usage(one.caches).live, usage(other.caches).live)
    assert len(np.unique(usage(one.caches).live)) > 2
    with pytest.raises(CormError, match="for 1 layers of 2 heads, not for 2 layers"):
        generate(MODEL, Corm(window=window[:1]), [[1]], max_new_tokens=1)
    with pytest.raises(CormError, match=r"shape \(1,\) for a layer of 2 key-value heads"):
        generate(MODEL, Corm(window=window[:, :1]), [[1]], max_new_tokens=1)


def test_each_layer_needs_slots_for_its_own_recent_keys():
    policy = Corm(window=np.array([[1, 2], [3, 4]]), recent=np.array([[1, 9], [1, 2]]))
    assert slots_for(policy, (9, 2), 20, 1) == (9, 2)
    for capacity, message in (
        ((9, 1), r"capacity 1 of layer 1 .* \(2 keys\)"),
        ((8, 2), r"capacity 8 of layer 0 .* \(9 keys\)"),
        (8, r"capacity 8 cannot hold .* \(9 keys\)"),
    ):
        with pytest.raises(CormError, match=message):
            slots_for(policy, capacity, 20, 1)


def test_every_step_draws_with_a_key_of_its_own():
    """So hot that all tokens are about equally likely: neither do the steps of a stretch agree, nor two stretches."""
    options = {"max_new_tokens": 32, "temperature": 1e4}
    by_default, first, other = (
        generate(MODEL, Full(), [[1, 2, 3]], **options, **seed).tokens[0] for seed in ({}, {"seed": 0}, {"seed": 4})
    )
    for tokens in (first, other):
        assert tokens[:16] != tokens[16:]
        assert len(set(tokens[:16])) > 8
        assert len(tokens) == 32
    assert by_default == first != other
    assert 0 in other  # a token like any other


def test_rows_that_stand_still_keep_their_logits():
    """Row 0 is done, and row 1 draws three tokens: what row 0 would draw next, and its caches, stay as they are."""
    logits, caches = read(Full(), [[1, 2, 3], [4, 5]], capacity=16)
    before, positions = np.asarray(logits), [np.asarray(one.position) for one in caches]
    numbers = np.int32(3), np.zeros(0, np.int32), np.float32(0), np.float32(1)
    tokens, after, done, caches = decode(
        MODEL, Full(), caches, logits, jax.random.key(0), jnp.array([True, False]), *numbers, steps=4
    )
    np.testing.assert_array_equal(after[0], before[0])
    assert (np.asarray(after[1]) != before[1]).any()
    assert tokens[0].tolist() == [-1] * 4
    assert [int(token) >= 0 for token in tokens[1]] == [True, True, True, False]
    assert done.tolist() == [True, False]
    for one, position in zip(caches, positions, strict=True):
        np.testing.assert_array_equal(one.position[0], position[0])
        assert one.clock.seen.tolist() == [3, 5]


def test_a_mistake_costs_no_cache():
    """Mistakes are reported before the caches are donated."""
    caches = make_caches(MODEL, Full(), batch=1, capacity=8)
    for prompt, options in (([1], {"overflow": "ignore"}), ([97], {}), ([], {}), ([1], {"chunk": 0})):
        with pytest.raises(CormError):
            prefill(MODEL, Full(), caches, [prompt], **options)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(caches))
