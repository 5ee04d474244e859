"""Recordings of what layers attend to, against the model itself and against a layer in NumPy; recordings cut short."""

import contextlib
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from corm_jax import CormError, Full, prefill
from corm_jax.model import generation
from corm_jax.model.decoder import make_caches
from corm_jax.runs import recording
from corm_jax.runs.recording import record, resume
from corm_jax.traces.meta import Meta
from corm_jax.traces.storage import Writer
from corm_jax.traces.trace import Trace
from tests.models import tiny

TOKENS = np.random.default_rng(1).integers(0, 97, 300).tolist()  # a whole block and a part of one


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_keys_and_values_are_those_in_the_caches(kv_heads):
    network = tiny(kv_heads=kv_heads, layers=3)
    caches = make_caches(network, Full(), batch=1, capacity=320)
    _, caches = prefill(network, Full(), caches, [TOKENS], chunk=10)
    layers = list(record(network, TOKENS))
    assert [one.layer for one in layers] == [0, 1, 2]
    for one, cache in zip(layers, caches, strict=True):
        assert all(array.dtype == np.float32 for array in one[1:])
        for head, position in enumerate(np.asarray(cache.position[0])):
            slots = np.argsort(position)[-len(TOKENS) :]  # free slots, at -1, come first
            for recorded, held in ((one.k, cache.k), (one.v, cache.v)):
                np.testing.assert_allclose(recorded[:, head], held[0, head, slots], atol=2e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_layer_in_numpy_attends_to_the_same(kv_heads):
    """Projections, rotation, and query head j attending through key-value head j // group, in float64."""
    network = tiny(kv_heads=kv_heads)
    weight = {path: np.asarray(leaf, np.float64) for path, leaf in paths(network)}
    x = weight["embedding.embedding"][TOKENS]
    for one in record(network, TOKENS):

        def linear(name, x, layer=one.layer):
            return x @ weight[f"layers.{layer}.{name}.kernel"]

        def norm(name, x, layer=one.layer):
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight[f"layers.{layer}.{name}.scale"]

        inner = norm("attention_norm", x)
        q, k = (turned(linear(f"attention.{name}", inner).reshape(len(TOKENS), -1, 8)) for name in "qk")
        np.testing.assert_allclose(one.q, q, atol=2e-4)
        np.testing.assert_allclose(one.k, k, atol=2e-4)
        recorded = [array.astype(np.float64) for array in one[1:4]]
        x = x + linear("attention.out", attention(*recorded).reshape(len(TOKENS), -1))
        inner = norm("feed_forward_norm", x)
        gate = linear("feed_forward.gate", inner)
        x = x + linear("feed_forward.down", gate / (1 + np.exp(-gate)) * linear("feed_forward.up", inner))
        np.testing.assert_allclose(one.x, x, atol=2e-4)
        x = one.x.astype(np.float64)


def paths(network):
    for path, leaf in jax.tree_util.tree_leaves_with_path(network):
        names = (str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
        yield ".".join(name for name in names if name not in ("", "value")), leaf


def turned(x):
    angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(4) / 4)
    first, second = x[..., :4], x[..., 4:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
    )


def attention(q, k, v):
    output = np.empty_like(q)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        logits = q[:, head] @ k[:, shared].T * q.shape[-1] ** -0.5
        logits[np.triu_indices(len(q), 1)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        output[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, shared]
    return output


@pytest.mark.parametrize("block", [16, 100, 300])
def test_the_block_size_does_not_matter(monkeypatch, block):
    expected = list(record(tiny(), TOKENS))
    monkeypatch.setattr(generation, "TOKENS_PER_BLOCK", block)
    for one, other in zip(record(tiny(), TOKENS), expected, strict=True):
        for name, got, wanted in zip(one._fields, one, other, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-3, err_msg=name)  # q is sharpened: up to 30


def test_all_layers_share_one_program(monkeypatch):
    monkeypatch.setattr(generation, "TOKENS_PER_BLOCK", 24)
    before = recording._layer._cache_size()
    done = []
    assert len(list(record(tiny(layers=3), TOKENS[:100], progress=done.append))) == 3
    assert recording._layer._cache_size() == before + 1
    ends = [24, 48, 72, 96, 100]
    assert done == [0, *ends, *(100 + end for end in ends), *(200 + end for end in ends)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_going_on_from_hidden_states_is_exact(dtype):
    network, done = tiny(layers=3, dtype=dtype), []
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms rely on it in bfloat16
        layers = list(record(network, TOKENS[:20]))
        (last,) = record(network, TOKENS[:20], x=layers[1].x, first=2, progress=done.append)
    assert done == [40, 60]
    for got, wanted in zip(last, layers[2], strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert list(record(network, TOKENS[:20], x=layers[2].x, first=3)) == []


def test_one_token():
    (one, _) = record(tiny(), [5])
    assert one.q.shape == (1, 4, 8)
    assert one.x.shape == (1, 32)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "is empty"),
        ([3, 97], {}, "token id 97 is outside the vocabulary of 97"),
        ([3, 4], {"first": 1}, r"x, which enters layer 1, must have the shape \(2, 32\), not None"),
        ([3, 4], {"x": np.zeros((3, 32), np.float32)}, r"must have the shape \(2, 32\), not \(3, 32\)"),
    ],
)
def test_mistakes_are_named(tokens, options, message):
    with pytest.raises(CormError, match=message):
        next(record(tiny(), tokens, **options))


# Recordings on disk


def save(path):
    network, tokens = tiny(layers=3), TOKENS[:40]
    shape = {"layers": 3, "steps": len(tokens), "q_heads": 4, "kv_heads": 2, "head_dim": 8}
    with Writer(path, Meta(kind="qkv", **shape)) as writer:
        for one in resume(network, tokens, writer.folder / "hidden.safetensors", writer.done):
            writer.write(q=one.q, k=one.k, v=one.v)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", range(12))
def test_a_recording_killed_anywhere_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, number, after):
    """Killed just before or after the nth rename or removal of a file: nothing else changes what a later run finds."""
    save(tmp_path / "whole")
    left, dead = iter(range(number)), []

    def deadly(change):
        def changed(self, *arguments, **options):
            if dead or ((change.__name__ != "unlink" or self.suffix != ".part") and next(left, None) is None):
                if after and not dead:
                    change(self, *arguments, **options)
                dead.append(self)
                raise KilledError
            return change(self, *arguments, **options)

        return changed

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink"):
            patch.setattr(Path, name, deadly(getattr(Path, name)))
        with contextlib.suppress(KilledError):
            save(tmp_path / "cut")
    assert bool(dead) == (number < 11)  # twice meta.json; three layers and hidden states; the rename; two removals
    if not (tmp_path / "cut").exists():
        save(tmp_path / "cut")
        assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert Trace.open(tmp_path / "cut").meta == Trace.open(tmp_path / "whole").meta
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "cut"}


def cut_short(path, monkeypatch):
    """Leaves a recording with two layers and their hidden states."""

    def stop(network, tokens, **options):
        yield from itertools.islice(record(network, tokens, **options), 2)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(recording, "record", stop)
        with pytest.raises(KilledError):
            save(path)
    return path.parent / f".{path.name}.part"


def tensors(**changes):
    def spoil(part):
        file = part / "hidden.safetensors"
        save_file({**load_file(file), **changes}, file)

    return spoil


def content(name, spoiled):
    return lambda part: (part / name).write_bytes(spoiled((part / name).read_bytes()))


@pytest.mark.parametrize(
    ("spoil", "first"),
    [
        (lambda part: None, 2),
        (lambda part: tensors(layers=np.array(1), x=next(record(tiny(layers=3), TOKENS[:40])).x)(part), 1),
        (lambda part: (part / "hidden.safetensors").unlink(), 0),
        (content("hidden.safetensors", lambda old: b""), 0),
        (content("hidden.safetensors", lambda old: old[:-1]), 0),
        (tensors(x=np.zeros((39, 32), np.float32)), 0),
        (tensors(x=np.zeros((40, 32), np.float16)), 0),
        (tensors(layers=np.zeros(2, np.int64)), 0),
        (tensors(layers=np.array(-1)), 0),
        (lambda part: save_file({"x": np.zeros((40, 32), np.float32)}, part / "hidden.safetensors"), 0),
        (lambda part: (part / "layer-001.safetensors").unlink(), 0),
        (content("layer-000.safetensors", lambda old: old[:-1]), 0),
    ],
)
def test_hidden_states_are_used_only_if_they_fit(tmp_path, monkeypatch, spoil, first):
    save(tmp_path / "whole")
    spoil(cut_short(tmp_path / "cut", monkeypatch))
    began = []

    def spy(*arguments, first, **options):
        began.append(first)
        return record(*arguments, first=first, **options)

    monkeypatch.setattr(recording, "record", spy)
    save(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert began == [first]


def test_hidden_states_that_cannot_be_saved(tmp_path):
    layers = resume(tiny(), TOKENS[:5], tmp_path / "missing" / "hidden.safetensors", 0)
    next(layers)
    with pytest.raises(CormError, match=r"cannot write .*hidden\.safetensors"):
        next(layers)
