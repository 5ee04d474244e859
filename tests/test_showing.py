"""How results show themselves: in one line, with names for their axes, and as pictures on axes of one's own."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import corm_jax as cj
from corm_jax.core.wrapper import in_short
from corm_jax.errors import CormError
from corm_jax.evaluation import plots as pictures
from corm_jax.evaluation.intervals import Interval
from corm_jax.evaluation.summary import Line
from corm_jax.policies.plan import Plan
from corm_jax.policies.profile import Profile
from corm_jax.runs.perplexity import Reading
from corm_jax.showing.brief import numbers
from corm_jax.showing.drawing import saving, styles
from simulator import plots, synthetic
from simulator.oracle import attention, bounds
from simulator.replay import Replay, replay, sweep

CORM = cj.Corm(window=4, recent=2)
GRID = {"window": [2, 4, 8], "recent": [1, 2]}


@pytest.fixture(scope="module")
def trace():
    return synthetic.topics(layers=2, steps=48, kv_heads=2, group=2, length=8)


@pytest.fixture(scope="module")
def result(trace):
    return replay(trace, CORM, keep_history=True)


@pytest.fixture(scope="module")
def swept(trace):
    return sweep(trace, cj.Corm, GRID)


def caches(batch=2, stores=1):
    spec = cj.CacheSpec(kv_heads=2, capacity=8, head_dim=4, stores=stores)
    made = cj.Caches.of([cj.make_cache(CORM, spec, batch), cj.make_cache(CORM, spec, batch)])
    return jax.tree.map(lambda x: x, made)


def reading():
    usage = cj.usage(caches(1))
    return Reading(np.ones(7, np.float32), np.ones((2, 8, 2), np.int32), np.arange(1, 9), usage, 1.0, 0.1)


PLAN = Plan(
    model="m", policy="corm", kv_heads=2, head_dim=4, chunk=1, tokens=9, overflow=0.0, capacity=tuple(range(5, 95))
)


def test_short_forms_are_short(trace, result, swept):
    config = cj.Config(vocab=99, dim=32, hidden=64, layers=9, heads=4, kv_heads=2, head_dim=8)
    shown = {
        "Trace(": trace,
        "Replay(Corm(window=4, recent=2), layers=2, kv_heads=2, steps=48, kept=": result,
        "Replay(Corm, grid=(3, 2), layers=2, ": swept,
        "Bounds(layers=2, kv_heads=2, steps=48, policy=": bounds(trace, result),
        "Caches(layers=2, policy=Corm, batch=2, kv_heads=2, slots=8, stores=1, ": caches(),
        "LayerCache(policy=Corm, batch=2, ": caches()[1],
        "LayerCache(policy=Corm, kv_heads=2, slots=8, stores=2, head_dim=4, dtype=float32, seen=0, live=0.0, ": (
            cj.make_cache(CORM, cj.CacheSpec(2, 8, 4))
        ),
        "Usage(layers=2, batch=2, ": cj.usage(caches()),
        "Reading(tokens=8, nll=1.0000, kept=0.125, ": reading(),
        "Generation(tokens=0..2 new, caches=Caches(": cj.Generation([[1, 2], []], caches()),
        "Plan(": PLAN,
        "Profile('smollm2-135m', layers=30, kv_heads=3, window=16..1024, whole_heads=6)": Profile.load("smollm2-135m"),
        "Transformer(vocab=99, layers=9, ": cj.Transformer(config, rngs=nnx.Rngs(0)),
    }
    for begins, one in shown.items():
        assert repr(one).startswith(begins)
        assert str(one) == repr(one)
        assert len(repr(one)) < 260
        assert "array" not in repr(one)
        html = getattr(one, "_repr_html_", lambda: "<table>")()
        assert html is None or html.startswith("<table>")


def test_live_keys_are_counted():
    live = jnp.arange(32).reshape(2, 1, 16) % 5 - 2  # positions; below 0 is empty
    cache = caches()[0]._replace(position=live)
    assert f"live={(np.asarray(live) >= 0).sum() / 4:.1f}, overflow=0" in repr(cache)


def test_what_holds_no_numbers_shows_shapes(result):
    made, seen = caches(), []

    def program(caches, until):
        seen.extend([repr(caches), repr(caches[0]), repr(result._replace(until=until)), caches._repr_html_()])
        return caches.layers[0].position

    jax.jit(program)(made, result.until)
    shapes = jax.eval_shape(lambda: made)
    seen += [repr(shapes), repr(shapes[1])]
    for text in seen:
        assert "live=" not in text
        assert "Tracer" not in text
        assert len(text) < 700
    assert "int32[2, 2, 48]" in seen[2]
    for leaf in (lambda x: None, np.shape, lambda x: "P(None)"):  # as trees of specifications have them
        assert repr(jax.tree.map(leaf, made)).startswith("Caches(")
        assert repr(jax.tree.map(leaf, made)[0]).startswith("LayerCache(")
        assert repr(jax.tree.map(leaf, cj.usage(made))).startswith("Usage(")
    assert repr(cj.Generation(None, None)) == "Generation(None, None)"  # pyright: ignore


def test_caches_that_were_given_up_still_show_themselves():
    made = caches()
    jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else x, made)
    assert repr(made).endswith("dtype=float32)")
    assert numbers(made.layers[0].k) is None


def test_policies_in_short():
    assert in_short(cj.budget(cj.protect(cj.H2O(recent=8), sinks=4), 64)) == (
        "Budget(Protect(H2O(recent=8), sinks=4), tokens=64)"
    )
    assert in_short([CORM, CORM]) == in_short(CORM) == "Corm(window=4, recent=2)"
    assert in_short([CORM, cj.Full()]) == "2 policies, Corm(window=4, recent=2) first"
    assert in_short(cj.Corm(window=np.array([3, 5]))) == "Corm(window=3..5 [2])"


def test_a_replay_with_names(trace, result):
    found = result.to_xarray()
    assert dict(found.sizes) == {"layer": 2, "kv_head": 2, "step": 48, "q_head": 4, "token": 48}
    assert found.step.values.tolist() == list(range(1, 49))
    assert found.kv_head_of.values.tolist() == [0, 0, 1, 1]
    assert found.attrs["policy"] == "Corm(window=4, recent=2)"
    assert found.attrs["model"] == trace.meta.model
    assert "prompt" not in found.attrs
    for name in ("live", "mass", "error", "until", "lifetime", "needed", "regretted", "lost", "kept"):
        np.testing.assert_array_equal(found[name], getattr(result, name))
        assert found[name].attrs["units"]
        assert found[name].attrs["long_name"]
    alive = found.kept.sel(step=20, layer=1, kv_head=0)
    assert set(alive.token.values[alive]) == set(np.flatnonzero(result.history()[1, 0, 19]))
    assert "error" not in replay(trace, CORM, errors=False).to_xarray()


def test_a_sweep_has_its_grid_for_coordinates(trace, swept):
    found = swept.to_xarray()
    assert found.live.dims[:2] == ("window", "recent")
    alone = replay(trace, CORM, errors=False)
    point = swept.point(1, 1)
    for name in ("until", "lost", "needed"):
        np.testing.assert_array_equal(getattr(point, name), getattr(alone, name))
        np.testing.assert_array_equal(found[name].sel(window=4, recent=2), getattr(alone, name))
    assert point.about.policy == "Corm(window=4, recent=2)"
    assert isinstance(point, Replay)
    for wrong in ((1,), (0, 0, 0)):
        with pytest.raises(CormError, match=r"each axis of its grid \(window, recent\)"):
            swept.point(*wrong)
    arrays = sweep(trace, cj.Corm, {"window": [np.array([2, 4]), np.array([8, 8])]}).to_xarray()
    assert arrays.window.values.tolist() == ["0: (2,)", "1: (2,)"]


def test_other_results_with_names(trace, result):
    found = bounds(trace, result).to_xarray()
    np.testing.assert_array_equal(found.regret, found.most - found.policy)
    assert found.attrs["policy"] == "Corm(window=4, recent=2)"
    assert reading().to_xarray().live.sel(seen=8).dims == ("layer", "kv_head")
    assert reading().to_xarray().token.values[0] == 1  # the first token is predicted by nothing
    assert PLAN.to_xarray().capacity.values.tolist() == list(PLAN.capacity)
    assert PLAN.to_xarray().attrs["tokens"] == 9


def test_without_xarray_the_extra_is_named(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(CormError, match=r"xarray is not installed: pip install 'corm-jax\[xarray\]'"):
        result.to_xarray()


def test_every_name_looks_different():
    looks = styles(["full", *map(str, range(60))])
    assert looks["full"]["color"] not in {style["color"] for name, style in looks.items() if name != "full"}
    assert len({style["color"] for style in list(looks.values())[:11]}) == 11
    pairs = [tuple(style.values()) for style in looks.values()]
    assert len(set(pairs[:20])) == 20
    assert styles(["a", "a", "b"]).keys() == {"a", "b"}


def rows(*specs):
    """What ``corm compare`` reports of each policy."""
    size = {"kv_bytes_live": 900 * 2**10, "kv_bytes_allocated": 907 * 2**10, "kept_per_layer": [0.5, 1.0]}
    return [{"policy": spec, "nll": 2.0 + index, **size} for index, spec in enumerate(specs)]


def line(task, policy, live=50.0):
    interval = Interval(0.2, 0.1, 0.3)
    return Line(task, policy, 2, 0.5, live, 102.0, 100.0, {"nll": interval}, interval)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_marks_of_a_comparison_are_on_the_picture(count):
    axes = pictures.quality(rows("full", "corm", "h2o")[:count], axes=Figure(layout="constrained").subplots())
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    points = np.concatenate([np.transpose(one.get_data()) for one in axes.lines if len(one.get_xdata())])
    assert len(points) == 4 * count
    assert (points > [left + 0.03 * (right - left), low + 0.03 * (high - low)]).all()
    assert (points < [right - 0.03 * (right - left), high - 0.03 * (high - low)]).all()


def test_no_two_policies_of_a_frontier_share_a_colour():
    specs = ["full", "corm", "corm:window=256,recent=32,sinks=4", "h2o", "snapkv"]
    lines = [line(task, spec, live) for task in ("a", "b") for spec in specs for live in (10.0, 30.0)]
    figure = pictures.frontier(lines, heading="corm eval agreement", figure=Figure(layout="constrained"))
    (legend,) = figure.legends
    colors = {
        text.get_text(): to_hex(one.get_color())
        for text, one in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert len({colors[spec] for spec in specs}) == len(specs)
    assert figure.get_suptitle().endswith("corm eval agreement")
    assert {axes.get_ylabel() for axes in figure.axes[:2]} == {"NLL (nats a token),\nabove full"}


def test_pictures_take_axes_and_return_them(trace, result, swept):
    analysis = {"sparsity": np.ones((2, 4)) / 2, "similarity": np.ones((2, 3)), "coverage": np.ones((2, 2))}
    analysis |= {
        "kept": np.ones((2, 2, 3)),
        "layers": [0, 1],
        "distances": [1, 2, 4],
        "windows": [64, 128],
        "recents": [1, 2, 3],
    }
    found = swept.to_xarray()
    panels = {"kept": found.live.isel(step=-1).mean(["layer", "kv_head"]) / 48}
    on_axes = [
        partial(plots.live, result),
        partial(plots.kept, result),
        partial(plots.survival, result, 0, 1, shown=12),
        partial(plots.history, result, 0, 1, attention=next(attention(trace, 0)), shown=12),
        partial(pictures.quality, rows("full", "corm")),
        partial(pictures.by_layer, rows("full", "corm")),
    ]
    on_figures = [
        partial(plots.cost, result),
        partial(plots.sweep, GRID, panels),
        partial(plots.regret, {"a": bounds(trace, result)}),
        partial(pictures.compare, {"rows": rows("full"), "model": "$m$", "tokens": 9}),
        partial(pictures.analysis, analysis),
        partial(pictures.heads, {"live": np.ones((5, 2))}),
    ]
    for draw in on_axes:
        left, right = Figure(figsize=(12, 5), layout="constrained").subplots(1, 2)
        assert draw(axes=left) is left
        assert left.get_title()
        assert left.get_xlabel()
        assert not right.has_data()
    for draw in on_figures:
        figure = Figure(figsize=(12, 9), layout="constrained")
        upper, lower = figure.subfigures(2, 1)
        assert draw(figure=upper) is upper
        assert upper.axes
        assert not lower.axes
    assert not pyplot.get_fignums()
    with pytest.raises(CormError, match="a grid of two hyperparameters, not of 1: window"):
        plots.sweep({"window": [1]}, panels)


def test_without_axes_notebooks_show_a_picture_and_commands_do_not(result, tmp_path):
    path = tmp_path / "a.png"
    saving(plots.live, result)(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not pyplot.get_fignums()
    with pyplot.rc_context({"backend": "agg"}):
        axes = plots.live(result)
        assert [axes.figure] == list(map(pyplot.figure, pyplot.get_fignums()))
        pyplot.close(axes.figure)
