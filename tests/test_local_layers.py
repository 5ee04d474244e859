"""Layers with a sliding window beside global ones: outputs against dense attention, slots, keys, bytes, and errors."""

import json
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import corm_jax as cj
from corm_jax import Corm, CormError, Full, Window, generate, make_caches, parse, prefill, usage
from corm_jax.adapters.functions import Functions
from corm_jax.command.cli import main
from corm_jax.core.capacity import capacities
from corm_jax.core.wrapper import name_of
from corm_jax.evaluation import agreement
from corm_jax.evaluation.asking import answer, answer_nll, ask
from corm_jax.model.decoder import check_decoder, forward, policies_of, windows_of
from corm_jax.model.generation import decode
from corm_jax.policies.plan import Plan
from corm_jax.runs import calibrate, fitting
from corm_jax.runs.perplexity import read_text
from tests import decoders
from tests.drive import FUSED
from tests.models import tiny


def local(windows):
    """A model with these windows."""
    return tiny(layers=len(windows), windows=windows)


WINDOWS = (4, None, 9, None)
MODEL = local(WINDOWS)
GLOBAL, LOCAL = np.array([1, 3]), np.array([0, 2])
LENGTHS = (24, 3)  # beyond both windows, and within both
IDS = np.random.default_rng(0).integers(1, 97, (2, 24)).astype(np.int32)
RUN = jax.jit(forward, static_argnames="chunk")


def dense(ids):
    """Logits ``[tokens, vocab]`` of a text, each layer at once, by a mask over all pairs of positions."""
    position = np.arange(len(ids), dtype=np.int32)
    behind = position[:, None] - position
    x = MODEL.embed(jnp.asarray([ids]), jnp.asarray([position]))
    for layer, size in zip(MODEL.layers, WINDOWS, strict=True):

        def attend(q, k, v, encoding, window=None, size=size):
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


@pytest.mark.parametrize(
    ("step", "chunk", "stores"), [(1, 1, None), (24, 1, 1), (8, 1, None), (8, 1, 1), (12, 3, 1), (12, 12, None)]
)
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


def test_every_layer_keeps_what_its_specification_says():
    """Global layers what the policy keeps there, local ones their window: `tests.decoders`."""
    assert (decoders.IDS == IDS).all()
    decoders.check(MODEL, np.stack([dense(row) for row in IDS]))


@pytest.mark.parametrize(
    ("how", "slots"),
    [
        ({"capacity": 5}, [4, 5, 9, 5]),
        ({"capacity": 50, "chunk": 7, "stores": 1}, [10, 50, 15, 50]),
        ({"capacity": [1, 30, 99, 20]}, [4, 30, 9, 20]),
        ({"capacity": 30, "tokens": 6}, [4, 30, 6, 30]),
        ({"capacity": 30, "tokens": 6, "chunk": 8}, [8, 30, 8, 30]),
        ({"capacity": 30, "tokens": 14, "chunk": 8}, [11, 30, 14, 30]),
    ],
)
def test_slots(how, slots):
    for policy in (Full(), Corm(window=2, recent=2)):
        caches = make_caches(MODEL, policy, batch=1, **how)
        assert capacities(caches) == slots
        assert [cache.made.policy for cache in caches] == ["Window", name_of(policy)] * 2


@pytest.mark.parametrize(
    ("spec", "chunk", "most"), [("h2o:recent=2,budget=8", 1, 8), ("snapkv:window=2,budget=7", 3, 24 + 5)]
)
def test_what_is_asked_for_concerns_global_layers(spec, chunk, most):
    """Budgets, whole prompts and capacities have no effect on local layers."""
    for capacity, slots in ((None, min(most + chunk, 29)), ([1, 40, 1, 40], 40)):
        how = {"max_new_tokens": 5, "chunk": chunk, "capacity": capacity}
        out = generate(MODEL, parse(spec), [row.tolist() for row in IDS], **how)
        held = usage(out.caches)
        assert capacities(out.caches) == [4 - 1 + chunk, slots, 9 - 1 + chunk, slots]
        assert held.live[LOCAL].max((1, 2)).tolist() == [3, 8]
        assert held.live[GLOBAL].max() <= most
        assert int(held.overflow.sum()) == 0


def test_a_policy_for_each_layer():
    table = np.array([[1, 1], [5, 6], [1, 1], [7, 8]])
    several = [parse("snapkv:budget=2,window=1"), Corm(window=5), Full(), Corm(window=7)]
    for policy in (Corm(window=table), several):
        found = policies_of(MODEL, policy)
        assert [found[0], found[2]] == [Window(size=4), Window(size=9)]
        assert [np.max(found[layer].window) for layer in GLOBAL] in ([5, 7], [6, 8])
    out = generate(MODEL, several, [[1, 2, 3]], max_new_tokens=2)
    assert capacities(out.caches) == [4, 5, 5, 5]
    pyramid = parse("pyramidkv:budget=50,window=10")
    two = [int(one.beside(jnp.int32(100))) for one in policies_of(local((3, None, 3, None)), pyramid)[1::2]]
    assert sum(two) == 2 * 40


def test_bytes_of_local_and_global_layers():
    out = generate(MODEL, parse("h2o:recent=2,budget=8"), [row.tolist() for row in IDS], max_new_tokens=2)
    held, key = usage(out.caches), 2 * 8 * 4  # k and v, head_dim, float32
    slots = {layer: 2 * 2 * size for layer, size in zip(LOCAL, (4, 9), strict=True)}  # rows, heads
    allocated = sum(n * (key + 4) + 2 * 2 * 4 for n in slots.values())  # position; overflow
    assert held.windows == WINDOWS
    assert held.local == (2 * 2 * (3 + 8) * key, 2 * 2 * (4 + 9) * key, allocated)
    assert held.of_global.live == 2 * 2 * 2 * 8 * key
    assert held.of_global.full == 2 * 2 * 2 * 26 * key
    assert sum(held.of_global) + sum(held.local) == held.bytes_live + held.bytes_full + held.bytes_allocated
    assert held.bytes_allocated == sum(leaf.nbytes for leaf in jax.tree.leaves(out.caches))
    assert held.kept == 8 / 26
    for word in ("live_keys=8, ", "local_live=0.00 MiB"):
        assert word in repr(held)
    assert "policy=Budget" in repr(out.caches) or "policy=H2O" in repr(out.caches)
    everything = usage(make_caches(tiny(), Full(), batch=1, capacity=4))
    assert (everything.local, everything.windows, everything.of_global) == (None, (None, None), everything.all)
    short = usage(generate(MODEL, Full(), [[1, 2]], max_new_tokens=1).caches)
    assert short.local.live == short.local.full == 2 * 2 * 3 * key


def test_a_text_is_read_and_a_window_is_searched():
    ids = np.random.default_rng(1).integers(1, 97, 60).tolist()
    full = read_text(MODEL, Full(), ids)
    expected = dense(np.array(ids, np.int32))
    of_next = jax.nn.log_softmax(expected[:-1])[np.arange(59), ids[1:]]
    np.testing.assert_allclose(full.nll, -of_next, atol=1e-4)
    assert full.kept.tolist() == [1] * 60
    assert full.kept_per_layer.tolist() == [3 / 60, 1, 8 / 60, 1]
    found = fitting.fit_window(MODEL, ids, 30, Corm())
    reading = read_text(MODEL, Corm(window=found, recent=found), ids)
    assert reading.kept[-1] == reading.live[GLOBAL, -1].mean() / 60 == pytest.approx(reading.usage.kept)
    assert abs(reading.kept[-1] - 0.5) < 0.1
    agreed = agreement.measure(MODEL, Full(), ids, 40, 4)
    assert np.abs(agreed.kl).max() < 1e-5
    asked = ask(MODEL, Full(), ids, 70, 4)
    assert answer(MODEL, Full(), asked, 9, ())[0] == generate(MODEL, Full(), [ids], max_new_tokens=9).tokens[0]
    assert answer_nll(MODEL, Full(), ask(MODEL, Full(), ids[:40], 70, 4), ids[40:], 4) == pytest.approx(
        full.nll[39:].mean(), abs=1e-5
    )


def test_one_compile_and_caches_that_are_updated_in_place():
    policy, before = parse("h2o:recent=2,budget=8"), decode._cache_size()
    for length in (20, 24, 29):
        first = make_caches(MODEL, policy, batch=1, capacity=16)
        out = generate(MODEL, policy, [IDS[0].tolist()[:length] + [5] * (length - 24)], max_new_tokens=20, capacity=16)
        assert capacities(out.caches) == [4, 16, 9, 16]
    assert decode._cache_size() == before + 1
    _, after = prefill(MODEL, policy, first, [[1, 2, 3]])
    assert all(leaf.is_deleted() for one in first.layers for leaf in jax.tree.leaves(one))
    arguments = (np.zeros((1, 97), np.float32), jax.random.key(0), np.zeros(1, bool), np.int32(3))
    options = (np.zeros(0, np.int32), np.float32(0), np.float32(1))
    compiled = decode.lower(MODEL, policy, after, *arguments, *options, steps=4).compile(FUSED).as_text()
    for slots in (4, 9, 16):
        assert f"f32[1,2,{slots},8]" in compiled
        assert not re.search(rf"f32\[1,2,{slots},8\]\S* copy\(", compiled)


def test_a_model_without_global_layers():
    model = local((4, 6))
    reading = read_text(model, parse("h2o:recent=2,budget=2"), IDS[0])
    assert reading.kept[-1] == (3 + 5) / 2 / 24 == pytest.approx(reading.usage.kept)
    assert reading.usage.of_global.live == 0
    with pytest.raises(CormError, match="the model has local layers only, in which CORM has no window"):
        fitting.fit_window(model, IDS[0], 8, Corm())
    with pytest.raises(CormError, match="the model has local layers only, which hold what their windows show"):
        calibrate.calibrate(model, "m", {"a": IDS[0].tolist() * 20}, 0.5)


SHAPE = {"vocab": 97, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}


def said(model, windows):
    """The model with a config that says something else."""
    embed, logits = (Partial(function, model) for function in (cj.Transformer.embed, cj.Transformer.logits))
    return Functions(cj.Shape(**SHAPE, windows=windows), embed, tuple(model.layers), logits)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ((3,), r"config.windows has 1 windows for 2 layers: give one for each"),
        ([3, None], r"config.windows must be a tuple, of a number or None for each layer, not \[3, None\]"),
        ((3, 0), r"config.windows\[1\] must be a whole number from 1 to"),
        ((3, True), r"config.windows\[1\] must be a whole number from 1 to"),
        ((2.5, None), r"config.windows\[0\] must be a whole number from 1 to"),
    ],
)
def test_windows_that_cannot_be(windows, message):
    model = said(local((3, None)), ())._replace(config=SimpleNamespace(**SHAPE, context=512, windows=windows))
    with pytest.raises(CormError, match=message):
        check_decoder(model, "the model")


def test_a_config_may_lack_windows():
    older = SimpleNamespace(**SHAPE, context=512)
    check_decoder(tiny(), "the model")
    assert windows_of(older) == windows_of(cj.Shape(**SHAPE)) == (None, None)


def test_caches_that_are_not_for_these_windows():
    tokens, count = jnp.asarray(IDS[:1, :6]), jnp.array([6], jnp.int32)
    model = local((4, None))
    small = make_caches(model, Full(), batch=1, capacity=30)
    with pytest.raises(CormError, match="layer 0 is local and its 4 slots a head .* make the caches with chunk=3"):
        forward(model, Full(), small, tokens, count, chunk=3)
    for other in (local((3, None)), local((None, None)), local((None, 4))):
        with pytest.raises(CormError, match="was made for a window of .*: make caches for this model"):
            forward(other, Full(), small, tokens, count, chunk=1)
    for windows, found in (((9, None), 4), ((4, None), None)):
        wrong = said(local((found, None)), windows)
        caches = make_caches(wrong, Full(), batch=1, capacity=30)
        with pytest.raises(CormError, match=f"attends with window={found}, and config.windows says {windows[0]}"):
            forward(wrong, Full(), caches, tokens, count, chunk=1)


MINE = """
import numpy as np
from tests.models import tiny

class Bytes:
    end = ()
    def encode(self, text):
        return [byte % 97 for byte in text.encode()]
    def decode(self, ids):
        return " ".join(map(str, ids))

def load():
    return tiny(layers=4, windows=(4, None, 9, None)), Bytes()
"""


def test_commands_tell_local_and_global_layers_apart(tmp_path, monkeypatch, run_main):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "near", raising=False)
    (tmp_path / "near.py").write_text(MINE)
    model = ("--model", "near:load", "--chunk", 4)
    plan = {"model": "near:load", "policy": "h2o:recent=2,budget=8", "kv_heads": 2, "head_dim": 8, "chunk": 4}
    Plan(**plan, tokens=99, overflow=0.0, capacity=(1, 13, 1, 14)).save(tmp_path / "plan.json")
    pooled = ("--layout", "pooled", "--capacity", "plan.json", "--policy", "full", "--policy", plan["policy"])
    found = run_main(main, "corm", "compare", *model, "--tokens", 99, *pooled, "--json", "found.json")
    assert found[0] == 0, found
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["windows"] == [4, None, 9, None]
    full, small = result["rows"]
    key = 2 * 2 * 8 * 4  # k and v, heads, head_dim, float32
    assert full["kv_bytes_local"] == small["kv_bytes_local"]
    assert small["kv_bytes_local"] | {"allocated": 0} == {"live": 11 * key, "full": 13 * key, "allocated": 0}
    assert small["kv_bytes_global"]["live"] == 2 * 8 * key
    assert full["kv_bytes_global"]["full"] == 2 * 99 * key
    for kind in ("live", "full", "allocated"):
        assert small[f"kv_bytes_{kind}"] == small["kv_bytes_local"][kind] + small["kv_bytes_global"][kind]
    assert (full["kept_final"], small["kept_final"]) == (1, pytest.approx(8 / 99))
    assert small["kv_bytes_global"]["allocated"] < 2 * 15 * key * 1.5
    rows = [line.split() for line in found[1].splitlines()]
    assert [row for row in rows if row[:2] == ["local", "layers"]]
    assert "2 of 4 layers are local, with windows of 4, 9: " in " ".join(found[1].split())
    arguments = ("--policy", plan["policy"], "--prompt", "The cat sat on the mat", "--max-new-tokens", 4)
    code, out, err = run_main(main, "corm", "generate", *model, *arguments)
    assert (code, err) == (0, "")
    assert re.search(r"\[cache: 8\.0 of 26 keys live in a head .* MiB full, overflow 0; local layers: .* full\]", out)
    rows = ("--tokens", 64, "--limit", 1, "--policy", "full", "--policy", plan["policy"], "--out", "runs")
    assert run_main(main, "corm", "eval", "perplexity", *model, *rows)[0] == 0
    found = [json.loads(line) for line in (tmp_path / "runs" / "results.jsonl").read_text().splitlines()]
    assert [row["kept"] for row in found] == [1, 8 / 64]
