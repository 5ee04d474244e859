"""The simulator's command line, in one process, on small synthetic traces."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from corm_jax import Corm, parse
from corm_jax.traces.trace import Trace
from simulator import cli, plots, synthetic
from simulator.oracle import bounds
from simulator.replay import FOREVER, replay, sweep
from simulator.verify import Finding

SPEC = "corm:window=12,recent=4"
PIECES = ["the", " $x$ and $", "\n", "\t\t", "猫", "$$", "_a^", "\u202e", "\U0001f600", "", "extraordinarily", "\\frac"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Four layers of 96 tokens, 4 query heads on 2 key-value heads, whose text no mathtext would survive."""
    made = synthetic.topics(layers=4, steps=96, kv_heads=2, group=2, head_dim=8, length=16)
    q, k, v = (np.stack(arrays) for arrays in zip(*(made.layer(i) for i in range(4)), strict=True))
    path = tmp_path_factory.mktemp("traces") / "topics"
    pieces = [PIECES[i % len(PIECES)] for i in range(96)]
    Trace.from_qkv(q, k, v, scale=made.meta.scale, model="to$pi$cs [b]\n猫", pieces=pieces).save(path)
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """An attention trace of one layer without text."""
    probs = np.tril(np.random.default_rng(0).random((1, 2, 40, 40)) ** 6)
    path = tmp_path_factory.mktemp("traces") / "rows"
    Trace.from_attention(probs / probs.sum(-1, keepdims=True), kv_heads=1).save(path)
    return path


@pytest.fixture
def simulator(run_main):
    return lambda *arguments: run_main(cli.main, "simulator", *arguments)


@pytest.fixture
def verify(monkeypatch):
    """Stands in for `simulator.verify.verify`; notes what it was called with."""
    calls, findings = [], [Finding("a [b] holds", True, "in [0, 1]"), Finding("another", True, "")]

    def stand_in(trace, policy, *, chunk=1, capacity=None, prompt=None, progress=lambda done: None):
        progress(1)
        calls.append((trace, policy, chunk, capacity, prompt))
        return findings

    monkeypatch.setattr(cli, "verify", stand_in)
    return calls, findings


def image(path):
    """The pixels of a picture, of which some must be drawn."""
    import matplotlib.image

    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(path)
    assert 0.01 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9  # part of it is not white
    return pixels


def test_replay(simulator, trace, tmp_path):
    report = tmp_path / "report.json"
    code, out, _ = simulator("replay", trace, "--policy", "full", "--policy", SPEC, "--json", report)
    assert code == 0
    assert "to$pi$cs [b] 猫, 96 tokens, 4 layers" in out
    result = json.loads(report.read_text())
    about = {name: result[name] for name in ("trace", "model", "kind", "tokens", "layers", "q_heads", "kv_heads")}
    assert about == {
        "trace": str(trace), "model": "to$pi$cs [b]\n猫", "kind": "qkv", "tokens": 96, "layers": [0, 1, 2, 3],
        "q_heads": 4, "kv_heads": 2,
    }  # fmt: skip
    assert (result["fidelity"], result["capacity"], result["chunk"]) == ("renormalized", None, 1)
    full, row = result["rows"]
    expected = replay(Trace.open(trace), Corm(window=12, recent=4))
    kept = expected.live / np.arange(1, 97)
    evicted = expected.until != FOREVER
    numbers = {
        "kept_final": kept[..., -1].mean(),
        "kept_mean": kept.mean(),
        "kept_min": kept[..., -1].min(),
        "kept_max": kept[..., -1].max(),
        "mass": expected.mass.mean(),
        "error": expected.error.mean(),
        "regretted": (evicted & expected.regretted).sum() / evicted.sum(),
        "lifetime": expected.lifetime.mean(),
    }
    assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
    assert 0 < row["regretted"] < 1
    assert row["seconds"] > 0
    heads = row["per_head"]
    assert np.shape(heads["mass"]) == np.shape(heads["error"]) == (4, 4)
    assert heads["evicted"] == evicted.sum(-1).tolist()
    assert heads["regretted"] == expected.regretted.sum(-1).tolist()
    assert heads["overflow"] == np.zeros((4, 2)).tolist()
    np.testing.assert_allclose(heads["lifetime"], expected.lifetime.mean(-1))
    np.testing.assert_allclose(heads["kept_final"], kept[..., -1])
    np.testing.assert_allclose(heads["error"], expected.error.mean(-1), rtol=1e-5)
    lines = out.splitlines()
    cells = lines[lines.index(SPEC) + 1].split()  # at 80 columns a row's text stands above its numbers
    assert cells[:4] == [f"{row[name]:.3f}" for name in ("kept_final", "kept_mean", "kept_min", "kept_max")]
    assert cells[4:7] == [f"{row[name]:.4f}" for name in ("mass", "error", "regretted")]
    assert (full["kept_final"], full["regretted"], full["per_head"]["evicted"]) == (1, None, [[0, 0]] * 4)


def test_the_part_of_the_trace_and_how_it_is_replayed(simulator, trace, tmp_path):
    report = tmp_path / "report.json"
    common = ("replay", trace, "--policy", SPEC, "--json", report)
    options = ("--layers", "3,1", "--tokens", 64, "--capacity", 16, "--chunk", 4, "--fidelity", "recorded")
    code, out, _ = simulator(*common, *options, "--no-errors")
    assert (code, "64 tokens, 2 layers, 16 slots a head" in out, "recorded, chunks of 4;" in out) == (0, True, True)
    result = json.loads(report.read_text())
    assert (result["layers"], result["tokens"], result["capacity"]) == ([3, 1], 64, 16)
    part = Trace.open(trace).part(layers=[3, 1], steps=64)
    expected = replay(part, parse(SPEC), capacity=16, chunk=4, fidelity="recorded", errors=False)
    (row,) = result["rows"]
    assert row["overflow"] == expected.overflow.sum() > 0
    assert row["per_head"]["overflow"] == expected.overflow.tolist()
    assert row["mass"] == pytest.approx(expected.mass.mean(dtype=np.float64))
    assert (row["error"], "error" in out) == (None, False)
    assert simulator("replay", trace, "--layers", "2", "--tokens", 1)[0] == 0


def test_attention_rows(simulator, rows, tmp_path):
    code, out, _ = simulator("replay", rows, "--policy", SPEC)
    assert (code, "a trace, 40 tokens, layer 0" in out, "error" in out) == (0, True, False)
    assert simulator("plot", rows, "--policy", SPEC, "--out", tmp_path)[0] == 0
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted(cli.PICTURES)
    for file in tmp_path.iterdir():
        image(file)


def test_sweep(simulator, trace, tmp_path):
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    grids = ("--grid", "window=4,8,16", "--grid", "recent=2, 6")
    options = ("--policy", "corm:group=mean", "--capacity", 24, "--json", report, "--plot", plot)
    code, out, _ = simulator("sweep", trace, *grids, *options)
    assert code == 0
    image(plot)
    result = json.loads(report.read_text())
    assert (result["policy"], result["grid"]) == ("corm:group=mean", {"window": [4, 8, 16], "recent": [2, 6]})

    def policy(**point):
        return Corm(group="mean", **point)

    expected = sweep(Trace.open(trace), policy, result["grid"], capacity=24)
    points = [(row["window"], row["recent"]) for row in result["rows"]]
    assert points == [(4, 2), (4, 6), (8, 2), (8, 6), (16, 2), (16, 6)]
    for row, index in zip(result["rows"], np.ndindex(3, 2), strict=True):
        assert row["kept_final"] == pytest.approx(expected.live[index][..., -1].mean() / 96)
        assert row["mass"] == pytest.approx(expected.mass[index].mean(), rel=1e-5)
        assert row["overflow"] == expected.overflow[index].sum()
        assert f" {row['mass']:.4f} " in out
    boolean = ("--policy", "corm:window=8", "--grid", "eager=true,false")
    one = simulator("sweep", trace, *boolean, "--json", report, "--overwrite")
    assert "True" in one[1]
    assert (one[0], json.loads(report.read_text())["grid"]) == (0, {"eager": [True, False]})


def test_bounds(simulator, trace, tmp_path):
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    common = ("bounds", trace, "--layers", "1,2", "--tokens", 48, "--exact", "--json", report, "--plot", plot)
    code, out, _ = simulator(*common, "--policy", SPEC, "--policy", "corm:window=6,recent=2")
    assert code == 0
    image(plot)
    part = Trace.open(trace).part(layers=[1, 2], steps=48)
    for row in json.loads(report.read_text())["rows"]:
        found = bounds(part, replay(part, parse(row["policy"])))
        for name, values in {"mass": found.policy, "greedy": found.greedy, "most": found.most}.items():
            assert row[name] == pytest.approx(values.mean(), rel=1e-5)
            np.testing.assert_allclose(row["per_head"][name], values.mean(-1), rtol=1e-5)
            assert f" {row[name]:.4f} " in out
        assert row["regret"] == pytest.approx(row["most"] - row["mass"], abs=1e-6)
        for head in np.ndindex(2, 2):
            mass, greedy, exact, most = (
                row["per_head"][name][head[0]][head[1]] for name in ("mass", "greedy", "exact", "most")
            )
            assert max(mass, greedy) <= exact + 1e-6 <= most + 2e-6


def test_check(simulator, trace, verify, tmp_path):
    report = tmp_path / "report.json"
    calls, findings = verify
    code, out, _ = simulator(
        "check", trace, "--policy", SPEC, "--chunk", 3, "--capacity", 20, "--prompt", 90, "--json", report
    )
    assert code == 0
    ((part, *options),) = calls
    assert (part.meta.layers, part.meta.steps, options) == (3, 96, [Corm(window=12, recent=4), 3, 20, 90])
    np.testing.assert_array_equal(part.layer(1).q, Trace.open(trace).layer(2).q)
    result = json.loads(report.read_text())
    assert (result["layers"], result["rows"]) == ([0, 2, 3], [finding._asdict() for finding in findings])
    for text in ("a [b] holds", "in [0, 1]", "yes", "96 tokens, 3 layers"):
        assert text in out
    findings.append(Finding("the last one", False, "head 3 differs"))
    options = ("--overwrite", "--json", report, "--tokens", 30, "--layers", 1)
    code, out, err = simulator("check", trace, "--policy", SPEC, *options)
    assert (code, "NO" in out, "head 3 differs" in out, err.strip()) == (1, True, True, "")
    assert (calls[1][0].meta.steps, json.loads(report.read_text())["layers"]) == (30, [1])
    assert json.loads(report.read_text())["rows"][-1]["held"] is False


def test_check_proves(simulator, trace, rows):
    code, out, _ = simulator("check", trace, "--policy", SPEC, "--tokens", 20, "--layers", 1)
    assert (code, "specification" in out, "NO" in out) == (0, True, False)
    code, _, err = simulator("check", rows)
    assert (code, "an attention trace holds no queries and keys" in err) == (2, True)


def test_plot(simulator, trace, tmp_path):
    report = tmp_path / "report.json"
    common = ("plot", trace, "--policy", SPEC, "--json", report)
    code, out, _ = simulator(*common, "--out", tmp_path / "a")
    assert code == 0
    files = [tmp_path / f"a-{name}.png" for name in cli.PICTURES]
    assert out.splitlines()[-4:] == [str(file) for file in files]
    sizes = [image(file).shape for file in files]
    assert all(height > 250 and width > 700 for height, width, _ in sizes)
    result = replay(Trace.open(trace), parse(SPEC))
    place = json.loads(report.read_text())["survival"]
    share = np.sort(result.live[..., -1].ravel())
    assert result.live[place["layer"], place["head"], -1] == share[4]  # of 8
    common = (*common, "--overwrite")
    code, _, _ = simulator(*common, "--out", f"{tmp_path}/", "--layer", 3, "--layers", "1,3", "--head", 0, "--from", 90)
    assert (code, json.loads(report.read_text())["survival"]) == (0, {"layer": 3, "head": 0, "from": 90})
    for name in cli.PICTURES:
        image(tmp_path / f"{name}.png")
    assert simulator(*common, "--out", tmp_path / "b", "--tokens", 1, "--layers", 0, "--capacity", 20)[0] == 0


def test_every_fate_is_told_apart():
    result = replay(synthetic.topics(layers=1, steps=96, length=16), parse(SPEC), capacity=20)
    fates = plots.fates(result, 0, 0)
    assert set(fates.tolist()) == {plots.LIVE, plots.EVICTED, plots.REGRETTED, plots.LOST}
    assert (fates == plots.LIVE).sum() == result.live[0, 0, -1]
    assert (fates == plots.LOST).sum() == result.overflow[0, 0]
    assert (fates[result.regretted[0, 0] & ~result.lost[0, 0]] == plots.REGRETTED).all()
    assert plots.busiest(np.repeat([0, 1], 100)) == 70
    assert plots.busiest(np.zeros(3, int)) == 0


WHICH_HEAD = "--layer must be one of 0, 1, 2, 3, and --head one from 0 to 1"
MISTAKES = [
    (["replay", "{trace}", "--policy", "h3o"], "unknown policy 'h3o'"),
    (["replay", "{trace}", "--policy", "corm:window=0"], "window must be a whole number from 1"),
    (["replay", "{none}"], "is no trace"),
    (["replay", "{empty}"], "is no trace"),
    (["replay", "{file}"], "is no trace"),
    (["replay", "--chunk", "2"], "Missing argument 'TRACE'"),
    (["replay", "{trace}", "--layers", "0,4"], "layer must be a whole number from 0 to 3, not 4"),
    (["replay", "{trace}", "--layers", "-1"], "--layers must be numbers from 0 with commas between them"),
    (["replay", "{trace}", "--layers", "0,,2"], "--layers must be numbers from 0 with commas between them"),
    (["replay", "{trace}", "--tokens", "0"], "'--tokens': '0' is not a whole number from 1"),
    (["replay", "{trace}", "--tokens", "97"], "steps must be a whole number from 1 to 96, not 97"),
    (["replay", "{trace}", "--capacity", "9999999999"], "'--capacity': '9999999999' is not a whole number from 1 to"),
    (["replay", "{trace}", "--chunk", "0"], "'--chunk': '0' is not a whole number from 1"),
    (["replay", "{trace}", "--fidelity", "live"], "'live' is not one of 'renormalized', 'recorded'"),
    (["replay", "{trace}", "--policy", "full", "--policy", SPEC, "--capacity", "3"], "capacity 3 cannot hold"),
    (["replay", "{trace}", "--json", "{none}/report.json"], "there is no directory"),
    (["replay", "{trace}", "--json", "{empty}"], "it is a directory"),
    (["sweep", "{trace}"], "Missing option '--grid'"),
    (["sweep", "{trace}", "--grid", "depth=1,2"], "unknown option 'depth=1'"),
    (["sweep", "{trace}", "--grid", "threshold=position,live"], "static in the policy"),
    (["sweep", "{trace}", "--grid", "window"], "--grid must be an option and its values"),
    (["sweep", "{trace}", "--grid", "window=,"], "--grid must be an option and its values"),
    (["sweep", "{trace}", "--grid", "window=4,0"], "window must be a whole number from 1"),
    (["sweep", "{trace}", "--grid", "window=4", "--grid", "window=8"], "--grid has 'window' twice"),
    (["sweep", "{trace}", "--grid", "window=4,8", "--policy", SPEC], "option 'window' is given twice"),
    (["sweep", "{trace}", "--grid", "recent=4,8", "--capacity", "5"], "capacity 5 cannot hold"),
    (["sweep", "{trace}", "--grid", "window=4", "--plot", "{none}"], "--plot draws grids of two options, not of 1"),
    (["bounds", "{trace}", "--plot", "{none}/plot.png"], "there is no directory"),
    (["bounds", "{long}", "--exact"], "--exact takes at most 300 tokens, not 301: use --tokens"),
    (["check", "{trace}", "--policy", "h3o"], "unknown policy 'h3o'"),
    (["check", "{trace}", "--fidelity", "recorded"], "No such option '--fidelity'"),
    (["plot", "{trace}"], "Missing option '--out'"),
    (["plot", "{trace}", "--out", "{none}/a"], "there is no directory"),
    (["plot", "{trace}", "--out", "{none}/"], "there is no directory"),
    (["plot", "{trace}", "--out", "{none}", "--layer", "4"], WHICH_HEAD),
    (["plot", "{trace}", "--out", "{none}", "--head", "2"], WHICH_HEAD),
    (["plot", "{trace}", "--out", "{none}", "--from", "96"], "--from must be from 0 to 95, not 96"),
    (["plot", "{trace}", "--out", "{none}", "--policy", "h3o"], "unknown policy 'h3o'"),
    (["fly"], "No such command 'fly'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_end_in_one_line_before_any_work(simulator, trace, tmp_path, monkeypatch, verify, arguments, message):
    monkeypatch.setattr("simulator.replay._compiled", lambda *_, **__: pytest.fail("a layer was replayed"))
    monkeypatch.setattr("simulator.replay._compiled_grid", lambda *_, **__: pytest.fail("a layer was replayed"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {name: tmp_path / name for name in ("empty", "none", "file", "long")}
    if "{long}" in arguments:
        synthetic.noise(layers=1, steps=301, kv_heads=1, head_dim=2).save(places["long"])
    code, _, err = simulator(*(part.format(trace=trace, **places) for part in arguments))
    assert code == 2
    (line,) = filter(None, err.splitlines())
    assert line.startswith("simulator: ")
    assert message in line
    assert not verify[0]


@pytest.mark.parametrize("command", ["bounds", "sweep", "plot"])
def test_without_matplotlib_only_pictures_fail(simulator, trace, tmp_path, monkeypatch, command):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "corm_jax.terminal.limits.find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    grid = ("--grid", "window=4,8", "--grid", "recent=2") if command == "sweep" else ()
    code, _, err = simulator(command, trace, "--out" if command == "plot" else "--plot", tmp_path / "a.png", *grid)
    assert (code, err) == (2, "simulator: matplotlib is not installed: pip install 'corm-jax[plots]'\n")
    assert not any(tmp_path.iterdir())


def test_it_needs_no_model():
    """Neither the model nor matplotlib is read in, if the package's own ``__init__`` is left out."""
    code = """
import sys, types, importlib.machinery as m
package = types.ModuleType("corm_jax")
package.__path__ = m.PathFinder.find_spec("corm_jax").submodule_search_locations
sys.modules["corm_jax"] = package
import simulator.cli
unwanted = {"corm_jax.model.transformer", "corm_jax.model.checkpoint", "flax", "matplotlib", "safetensors"}
unwanted |= {"hypothesis", "tokenizers"}
sys.exit(", ".join(sorted(unwanted & set(sys.modules))) or 0)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_it_runs_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "simulator", "fly"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (2, "simulator: No such command 'fly'.\n")


def test_a_sweep_over_budgets(simulator, trace, tmp_path):
    report = tmp_path / "report.json"
    grid = ("--grid", "budget=16,32", "--grid", "recent=4,8")
    code, _, err = simulator("sweep", trace, "--policy", "h2o", *grid, "--json", report)
    assert code == 0, err
    rows = json.loads(report.read_text())["rows"]
    assert [(row["budget"], row["recent"]) for row in rows] == [(16, 4), (16, 8), (32, 4), (32, 8)]
    assert [round(row["kept_final"] * 96) for row in rows] == [16, 16, 32, 32]
    alone = replay(Trace.open(trace), parse("h2o:recent=8,budget=16"), errors=False)
    assert rows[1]["mass"] == pytest.approx(float(alone.mass.mean()), abs=1e-6)
