"""Layers with a sliding window beside global ones: outputs against dense attention, slots, keys, bytes, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corm_jax import Full, generate, make_caches, usage
from corm_jax.core.capacity import capacities
from corm_jax.model.decoder import forward
from tests.models import local

WINDOWS = (4, None, 9, None)
MODEL = local(WINDOWS)
GLOBAL, LOCAL = [1, 3], [0, 2]
LENGTHS = (24, 3)  # beyond both windows, and within both
IDS = np.random.default_rng(0).integers(1, 97, (2, 24)).astype(np.int32)
RUN = jax.jit(forward, static_argnames="chunk")


def dense(ids):
    """Logits ``[tokens, vocab]`` of a text, each layer at once, by a mask over all pairs of positions."""
    position = np.arange(len(ids), dtype=np.int32)
    behind = position[:, None] - position
    x = MODEL.embed(jnp.asarray([ids]), jnp.asarray([position]))
    for layer, size in zip(MODEL.layers, WINDOWS, strict=True):

        def attend(q, k, v, encoding, window, size=size):
            assert window == size
            q, k = (np.asarray(encoding.rotate(one[0], jnp.asarray(position))) for one in (q, k))
            seen = (behind >= 0) & (behind < (size or len(ids)))
            outputs = []
            for head in range(q.shape[1]):
                mine = head // (q.shape[1] // k.shape[1])
                weights = np.exp(np.where(seen, q[:, head] @ k[:, mine].T / 8**0.5, -np.inf))
                outputs.append(weights @ np.asarray(v)[0, :, mine] / weights.sum(-1, keepdims=True))
            return jnp.asarray(np.stack(outputs, 1)[None], jnp.float32)

        x = layer(x, jnp.asarray([position]), attend)
    return np.asarray(MODEL.logits(x)[0])


EXPECTED = [dense(row[:length]) for row, length in zip(IDS, LENGTHS, strict=True)]


def pieces(step):
    """The rows of `IDS` in pieces of so many tokens, and how many tokens of each row are real."""
    for start in range(0, IDS.shape[1], step):
        yield IDS[:, start : start + step], np.clip(np.array(LENGTHS) - start, 0, step).astype(np.int32)


@pytest.mark.parametrize("stores", [None, 1])
@pytest.mark.parametrize(("step", "chunk"), [(1, 1), (24, 1), (8, 1), (12, 3), (12, 12)])
def test_logits_are_those_of_dense_attention(step, chunk, stores):
    """Token by token, exactly in one block and in several, and in chunks, shorter and longer than the windows."""
    caches = make_caches(MODEL, Full(), batch=2, capacity=24, stores=stores, chunk=chunk)
    assert capacities(caches) == [4 - 1 + chunk, 24, 9 - 1 + chunk, 24]
    found = [[], []]
    for tokens, count in pieces(step):
        x, caches, course = RUN(MODEL, Full(), caches, tokens, count, chunk=chunk)
        logits = np.asarray(MODEL.logits(x))
        for row in range(2):
            found[row].append(logits[row, : count[row]])
        for layer in LOCAL:
            assert int(course.live[layer].max()) <= WINDOWS[layer] - 1
    for row, expected in zip(found, EXPECTED, strict=True):
        np.testing.assert_allclose(np.concatenate(row), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    held = usage(caches)
    assert held.live[:, :, 0].tolist() == [[3, 3], [24, 3], [8, 3], [24, 3]]
    assert int(held.overflow.sum()) == 0
    for layer, row in np.ndindex(4, 2):
        position = np.sort(np.asarray(caches[layer].position[row]).reshape(-1))
        newest = range(max(LENGTHS[row] - (WINDOWS[layer] or 99) + 1, 0), LENGTHS[row])
        assert position[position >= 0].tolist() == sorted([*newest, *newest])


@pytest.mark.parametrize("chunk", [1, 5])
def test_what_is_generated_is_what_dense_attention_finds_likeliest(chunk):
    prompts = [IDS[0].tolist(), IDS[1, :3].tolist()]
    out = generate(MODEL, Full(), prompts, max_new_tokens=12, chunk=chunk)
    for prompt, new in zip(prompts, out.tokens, strict=True):
        whole = np.array([*prompt, *new], np.int32)
        assert dense(whole[:-1])[len(prompt) - 1 :].argmax(-1).tolist() == new
    assert capacities(out.caches) == [4 - 1 + chunk, 36, 9 - 1 + chunk, 36]
