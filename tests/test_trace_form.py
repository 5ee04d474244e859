"""Traces of attention with slopes, a soft cap and windows: replay, cache, specification and model decide alike."""

import json
from functools import cache, partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from corm_jax import (
    ALiBi,
    CacheSpec,
    Config,
    Corm,
    CormError,
    Rope,
    Shape,
    Transformer,
    begin_prompt,
    make_cache,
    of_layers,
    parse,
)
from corm_jax.adapters.functions import Functions
from corm_jax.core.positions import Encoding
from corm_jax.model.decoder import through
from corm_jax.runs.forms import written
from corm_jax.runs.recording import record
from corm_jax.traces.meta import Meta
from corm_jax.traces.storage import Writer
from corm_jax.traces.trace import Trace
from simulator import cli, oracle
from simulator.replay import replay, sweep
from simulator.verify import verify
from tests.heads import live_sets

LAYERS, STEPS, KV_HEADS, GROUP, HEAD_DIM = 3, 30, 2, 2, 8
SLOPES = (0.5, 0.25, 0.125, 0.0625)
FORMS = {
    "alibi": {"slopes": SLOPES},
    "local": {"windows": (7, None, 12), "scale": 0.5},
    "all": {"slopes": SLOPES, "windows": (None, 7, None), "softcap": 5.0, "scale": 0.5},
}
SPECS = [
    "corm:window=6,recent=2,threshold=live",
    "h2o:recent=2,budget=9",
    "tova:budget=9",
    "streaming_llm:sinks=2,budget=9",
    "snapkv:budget=9,window=4,kernel=3",
    "pyramidkv:budget=9,window=4,kernel=3",
]


def made(form, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(LAYERS, STEPS, heads, HEAD_DIM)) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    return Trace.from_qkv(2 * q, k, v, **FORMS[form])


def attention_of(trace, index):
    """In NumPy, ``[q_heads, steps, keys]``."""
    meta, (q, k, _) = trace.meta, (x.astype(np.float64) for x in trace.layer(index))
    distance = np.arange(meta.steps)[:, None] - np.arange(meta.steps)
    logits = meta.scale * np.einsum("qhd,khd->hqk", q, k.repeat(meta.group, axis=1))
    logits = logits if meta.softcap is None else meta.softcap * np.tanh(logits / meta.softcap)
    logits = logits - np.reshape(meta.slopes or np.zeros(meta.q_heads), (-1, 1, 1)) * distance
    window = (meta.windows or [None] * meta.layers)[index] or meta.steps
    weights = np.where((distance >= 0) & (distance < window), np.exp(logits), 0)
    return weights / weights.sum(-1, keepdims=True)


CASES = [(form, SPECS[0], chunk) for form in FORMS for chunk in (1, 4)] + [("all", spec, 1) for spec in SPECS[1:]]
CASES += [pytest.param(form, spec, 4, marks=pytest.mark.nightly) for form in FORMS for spec in SPECS[1:]]


@pytest.mark.parametrize(("form", "spec", "chunk"), CASES)
def test_replay_cache_and_specification_agree(form, spec, chunk, tmp_path):
    policy, options = parse(spec), {"chunk": chunk, "prompt": 20 if "kv" in spec else None}
    made(form).save(tmp_path / "trace")
    trace = Trace.open(tmp_path / "trace")
    assert [finding for finding in verify(trace, policy, **options) if not finding.held] == []
    found = replay(trace, policy, **options)
    assert (found.live[..., -1] < STEPS).any()
    for layer in trace.meta.local:
        assert (
            found.live[layer] == np.minimum(np.arange(1, STEPS + 1), trace.meta.windows[layer] - 1)
        ).all() or chunk > 1
        np.testing.assert_allclose(found.mass[layer], 1, atol=1e-6)
        np.testing.assert_allclose(found.error[layer], 0, atol=1e-5)
    wide = [layer for layer in range(LAYERS) if layer not in trace.meta.local]
    alone = replay(trace.part(layers=wide), policy, **options)
    np.testing.assert_array_equal(found.until[wide], alone.until)


@pytest.mark.parametrize("form", FORMS)
def test_mass_and_error_are_those_of_the_form(form):
    trace = made(form)
    found, bounds = replay(trace, Corm(window=4, recent=2), keep_history=True), []
    for index in range(LAYERS):
        alpha = attention_of(trace, index)
        seen = np.arange(1, STEPS + 1)[:, None] <= found.until[index][:, None]
        rest = np.where(seen.repeat(GROUP, 0), alpha, 0)
        np.testing.assert_allclose(found.mass[index], rest.sum(-1), atol=1e-5)
        v = trace.layer(index).v.repeat(GROUP, axis=1)
        full, kept = (np.einsum("hqk,khd->hqd", x, v) for x in (alpha, rest / rest.sum(-1, keepdims=True)))
        error = np.linalg.norm(kept - full, axis=-1) / np.linalg.norm(full, axis=-1)
        np.testing.assert_allclose(found.error[index], error, atol=1e-4)
        bounds.append(alpha.reshape(KV_HEADS, GROUP, STEPS, STEPS).mean(1))
        np.testing.assert_allclose([*oracle.attention(trace, index)], bounds[-1], atol=1e-5)
    np.testing.assert_allclose(
        oracle.bounds(trace, found).most[0, 0],
        oracle.most(bounds[0][0].astype(np.float32), found.attended[0, 0]),
        atol=1e-5,
    )


def test_a_trace_of_rows_is_replayed_alike():
    trace = made("all")
    windows = trace.meta.windows
    rows = Trace.from_attention(
        [attention_of(trace, index) for index in range(LAYERS)], kv_heads=KV_HEADS, windows=windows
    )
    for policy in (Corm(window=6, recent=2), parse("h2o:recent=2,budget=9")):
        one, other = (replay(each, policy, errors=False) for each in (trace, rows))
        np.testing.assert_array_equal(one.until, other.until)
        np.testing.assert_allclose(one.mass, other.mass, atol=1e-5)


def test_a_sweep_leaves_local_layers_alone():
    trace = made("local")
    grid = sweep(trace, Corm, {"window": [3, 9], "recent": [2]})
    for place, window in enumerate((3, 9)):
        np.testing.assert_array_equal(grid.until[place, 0], replay(trace, Corm(window=window, recent=2)).until)


def test_a_capacity_is_that_of_global_layers():
    trace = made("local")
    found = replay(trace, Corm(window=9, recent=2), capacity=5)
    assert not found.overflow[list(trace.meta.local)].any()
    assert found.overflow[1].all()
    assert [finding for finding in verify(trace, Corm(window=9, recent=2), capacity=5) if not finding.held] == []


# Models with ALiBi, and with local layers beside global ones.

TOKENS, PIECE, PROMPT = 24, 8, 16
IDS = np.random.default_rng(3).integers(0, 97, TOKENS).tolist()
SHAPE = {"vocab": 97, "dim": 32, "hidden": 48, "heads": 4, "kv_heads": 2, "head_dim": 8, "context": 64}
MODELS = {
    "alibi": Config(**SHAPE, layers=2, rope=None, alibi=True),
    "local": Config(
        **SHAPE,
        layers=4,
        windows=(7, None, 9, None),
        local_rope=Rope(theta=100.0),
        alibi=True,
        attention_softcap=5.0,
        attention_scale=0.5,
    ),
}


@cache
def model(name):
    """Weights at random; queries are so large that keys differ."""
    made_ = Transformer(MODELS[name], rngs=nnx.Rngs(1))
    for layer in made_.layers:
        layer.attention.q.kernel[...] *= 12
    return made_


def read_in_pieces(network, policy, chunk):
    """What enters each layer, and the keys that each head of each layer holds after each piece of the text."""
    config = network.config
    policies = of_layers(policy, config.layers, config.windows)
    spec = CacheSpec(config.kv_heads, TOKENS, config.head_dim)
    caches = [begin_prompt(make_cache(one, spec, 1, tokens=TOKENS), PROMPT) for one in policies]
    entering, held = [[] for _ in policies], []
    for start in range(0, TOKENS, PIECE):
        x = network.embed(jnp.asarray([IDS[start : start + PIECE]]), jnp.arange(start, start + PIECE)[None])
        for index, (layer, policy_) in enumerate(zip(network.layers, policies, strict=True)):
            entering[index].append(np.asarray(x[0]))
            x, caches[index], *_ = through(layer, x, caches[index], policy_, jnp.array([PIECE]), chunk=chunk)
        held.append([[live_sets(head) for head in np.asarray(one.position[0])] for one in caches])
    return [np.concatenate(x) for x in entering], held


def recorded(network, path, entering=None):
    """A trace on disk: of the full cache, or of what enters the layers of a model that has evicted keys."""
    config = network.config
    how = {"layers": config.layers, "q_heads": config.heads, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    meta = Meta(kind="qkv", steps=TOKENS, **how, **written(network, TOKENS)._asdict())
    with Writer(path, meta) as writer:
        for index in range(config.layers):
            x = None if index == 0 else (entering[index] if entering else x)
            one = next(record(network, IDS, x=x, first=index))
            writer.write(q=one.q, k=one.k, v=one.v)
            x = one.x
    return Trace.open(path)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(
    "spec",
    [
        "corm:window=5,recent=2",
        "h2o:recent=2,budget=7",
        *(
            pytest.param(spec, marks=pytest.mark.nightly)
            for spec in ("tova:budget=7", "snapkv:budget=7,window=4,kernel=3", "streaming_llm:sinks=2,budget=7")
        ),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_replay_decides_as_the_model_through_its_caches(name, spec, chunk, tmp_path):
    """The trace holds what the layers of the evicting model have attended with."""
    network, policy = model(name), parse(spec)
    entering, held = read_in_pieces(network, policy, chunk)
    trace = recorded(network, tmp_path / "trace", entering)
    kept = replay(trace, policy, chunk=chunk, prompt=PROMPT, errors=False).history()
    for piece, layers in enumerate(held):
        for index, heads in enumerate(layers):
            for head, keys in enumerate(heads):
                assert set(np.flatnonzero(kept[index, head, (piece + 1) * PIECE - 1])) == keys
    assert not kept[list(trace.meta.local) or [0], :, -1].all()
    assert [finding for finding in verify(trace, policy, chunk=chunk, prompt=PROMPT) if not finding.held] == []


def test_what_is_recorded_and_checked_by_the_command(tmp_path, run_main):
    trace = recorded(model("local"), tmp_path / "trace")
    assert (trace.meta.windows, trace.meta.softcap, trace.meta.slopes) == (
        (7, None, 9, None),
        5.0,
        (0.25, 0.0625, 2**-6, 2**-8),
    )
    code, out, _ = run_main(
        cli.main, "simulator", "check", tmp_path / "trace", "--layers", "0,1,3", "--policy", "corm:window=5,recent=2"
    )
    assert (code, "3 layers, 1 of them local and in no mean" in " ".join(out.split())) == (0, True)


def decoder(*forms, windows=()):
    """Layers that only attend, each in a form of its own."""

    def layer(x, position, attend, form):
        q, k = x.reshape(*x.shape[:2], 2, 4), x.reshape(*x.shape[:2], 2, 4)
        return attend(q, k, k, **form).reshape(x.shape)

    shape = Shape(vocab=9, layers=len(forms), heads=2, kv_heads=2, head_dim=4, windows=windows)
    layers = tuple(Partial(partial(layer, form=form)) for form in forms)
    return Functions(shape, Partial(lambda ids, position: jnp.ones((*ids.shape, 8))), layers, Partial(lambda x: x))


class Squared(Encoding):
    def bias(self, distance, layout):
        return -(distance.astype(jnp.float32) ** 2)[None]


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ([{}, {"mask": lambda query, key: key != 1}], "layer 1 attends with a mask, for which a trace has no place"),
        ([{"encoding": Squared()}], "layer 0 adds the bias of Squared, which is no slope times the distance"),
        (
            [{"softcap": 5.0}, {"softcap": 6.0}],
            "layer 1 attends with softcap=6.0, and layer 0 with 5.0: a trace has one",
        ),
        ([{"encoding": ALiBi.of(2)}, {}], "layer 1 attends with slopes=None, and layer 0 with"),
        ([{"window": 5}], "layer 0 attends with window=5, and config.windows says None there"),
    ],
)
def test_a_form_that_a_trace_cannot_state_is_refused_before_the_text_is_read(forms, message):
    with pytest.raises(CormError, match=message):
        next(record(decoder(*forms), [1, 2, 3], progress=lambda done: pytest.fail("the text is read")))


def test_reports_name_local_layers_and_count_the_others(tmp_path, run_main):
    made("local").save(tmp_path / "trace")
    found = replay(made("local"), Corm(window=4, recent=2))
    alone = replay(made("local").part(layers=[1]), Corm(window=4, recent=2))
    assert found.about.local == (0, 2)
    assert repr(found).partition("kept=")[2] == repr(alone).partition("kept=")[2]
    for command, what in (("replay", ()), ("bounds", ("--exact",)), ("sweep", ("--grid", "recent=1,2"))):
        file = tmp_path / f"{command}.json"
        policy = "corm:window=4" if command == "sweep" else "corm:window=4,recent=2"
        code, out, _ = run_main(
            *(cli.main, "simulator", command, tmp_path / "trace", "--policy", policy, *what, "--json", file)
        )
        assert (code, "3 layers, 2 of them local and in no mean" in " ".join(out.split())) == (0, True)
        report = json.loads(file.read_text())
        assert report["local"] == [0, 2]
        assert report["rows"][-1]["mass"] == pytest.approx(alone.mass.mean(), abs=1e-6)
    out = run_main(cli.main, "simulator", "replay", tmp_path / "trace", "--layers", "2")[1]
    assert "layer 2, which is local" in " ".join(out.split())
