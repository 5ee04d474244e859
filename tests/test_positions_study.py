"""The study of positions, on models and texts so small that it takes a minute: nothing here is a result."""

import doctest
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import corm_jax as cj
from corm_jax.model.decoder import forward, make_caches

pytest.importorskip("orbax.checkpoint")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import positions_study  # noqa: E402
from positions import data, measure, rule, train, tune  # noqa: E402
from positions.models import KINDS, build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # orbax and what it uses warn of one another
SIZE = {"vocab": 256, "dim": 32, "hidden": 32, "layers": 2, "heads": 4, "context": 224}
RECIPE = train.Recipe(stages=((3, 2, 32, "noise"), (3, 2, 48, "")))


@pytest.fixture(autouse=True)
def as_optax_is_written():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    words = ["".join(rng.choice([*"abcdefgh"], size=rng.integers(2, 7))) for _ in range(60)]
    for index in range(2):
        (folder / f"{index}.txt").write_text(" ".join(rng.choice(words, size=900)))
    return folder


@pytest.fixture(scope="module")
def ids(texts):
    return data.corpus(data.books(texts))


def trained(folder, ids, stop=None):
    def progress(step):
        if step == stop:
            raise KeyboardInterrupt

    folder.mkdir(exist_ok=True)
    how = {"compute": "float32", "watch": lambda model: {}, "progress": progress, "every": 2}
    return train.train(folder, "hybrid", SIZE, 1, RECIPE, ids, **how)


def test_examples():
    assert doctest.testmod(rule).failed == 0


@pytest.mark.parametrize("kind", KINDS)
def test_trained_as_it_is_read(kind, ids):
    """The attention of training is that of a cache which keeps everything, in values and in gradients."""
    model, tokens = build(kind, SIZE, 0), jnp.asarray(np.stack([ids[0][:40], ids[1][:40]]))
    caches = make_caches(model, cj.Full(), batch=2, capacity=40)
    x, _, _ = jax.jit(forward, static_argnames="chunk")(model, cj.Full(), caches, tokens, jnp.full(2, 40), chunk=40)
    np.testing.assert_allclose(jax.jit(train.logits_of)(model, tokens), model.logits(x), atol=2e-5)
    one = jax.jit(jax.grad(lambda model: train.nll(train.logits_of(model, tokens), tokens).mean()))(model)
    other = jax.jit(jax.grad(lambda model: tune.loss(model, cj.Full(), tokens, 20)))(model)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, ids):
    whole = trained(tmp_path / "whole", ids)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", ids, stop=5)
    with pytest.raises(cj.CormError, match="step 4 of 6: train it to its end first"):
        train.load(tmp_path / "killed", "hybrid", SIZE, RECIPE)
    resumed = trained(tmp_path / "killed", ids)
    again = train.load(tmp_path / "killed", "hybrid", SIZE, RECIPE)
    for one, two, three in zip(*map(jax.tree.leaves, (whole, resumed, again)), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_rows(ids):
    """The same for the same step, in the vocabulary, and half of them with a passage that returns."""
    rows = data.batch(ids, 3, 7, 8, 128)
    np.testing.assert_array_equal(rows, data.batch(ids, 3, 7, 8, 128))
    assert rows.shape == (8, 128)
    assert not np.array_equal(rows, data.batch(ids, 3, 8, 8, 128))
    assert rows.min() >= 0
    assert rows.max() < SIZE["vocab"]

    def returns(row):
        first = row[:4]
        return any(np.array_equal(row[at : at + 4], first) for at in range(4, 125))

    assert sum(map(returns, rows)) >= 4
    noise = data.batch(ids, 3, 7, 8, 64, "noise")
    assert noise.min() >= data.NOISE[0]
    assert noise.max() < data.NOISE[1]
    held = data.passages(ids, 224, 2)
    again = data.repeats(held, 96)
    np.testing.assert_array_equal(again[:, -96:], held[:, :96])


def test_needed_in_loops():
    """The least w for which 95% of what is important is covered, by trying all."""
    rng = np.random.default_rng(0)
    logits = np.where(np.tri(150, dtype=bool), 3 * rng.normal(size=(150, 150)), -np.inf)
    alpha = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    def share(window):
        covered = []
        for t in range(rule.FIRST, 150):
            for key in range(t + 1):
                if alpha[t, key] * (t + 1) >= 1:
                    recent = any(alpha[s, key] * (s + 1) >= 1 for s in range(max(t - window, key), t))
                    covered.append(recent or t - key <= window)
        return np.mean(covered)

    window = rule.needed(alpha)
    assert share(window) >= rule.SHARE > share(window - 1)


@pytest.mark.nightly
def test_from_texts_to_a_report(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(positions_study, "SIZE", SIZE)

    def run(*arguments):
        positions_study.main([str(one) for one in arguments], standalone_mode=False)
        return capsys.readouterr().out

    study, held = tmp_path / "study", ("--held", texts)
    kinds = ("rotary", "alibi")
    stages = ("--stage", 3, 2, 32, "noise", "--stage", 3, 2, 48, "", "--every", 3, "--seed", 0)
    printed = run("train", texts, *held, "--out", study, *stages, *(one for kind in kinds for one in ("--kind", kind)))
    assert printed.count("again") == len(kinds)
    with pytest.raises(cj.CormError, match=r"choose another --out"):
        run("train", texts, *held, "--out", study, "--stage", 9, 2, 32, "")
    run("measure", texts, "--study", study, "--each", 1)
    assert run("measure", texts, "--study", study, "--each", 1) == ""  # all is done
    run("tune", texts, *held, "--study", study, "--kind", "rotary", "--each", 1, "--steps", 2)
    run("collect", "--study", study, "--out", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["measures"]) == len(kinds)
    assert len(results["tuned"]) == 1
    for one in results["measures"]:
        for row in one["repeat"] + one["text"]:
            for window in measure.WINDOWS:
                kept = row[f"corm {window}"]["kept"]
                assert row[f"h2o {window}"]["kept"] == pytest.approx(kept, abs=0.5 / SIZE["context"] + 1e-4)
    printed = run("report", tmp_path / "results.json", "--figures", tmp_path / "figures")
    assert len([*(tmp_path / "figures").glob("positions-*.png")]) == 4
    for kind in kinds:
        assert f"| {kind} |" in printed
    with pytest.raises(cj.CormError, match="is no study"):
        run("measure", texts, "--study", texts)
