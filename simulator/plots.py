"""The simulator's pictures: what a policy keeps, for how long, and what that costs.

Each draws on the axes, or the figure, that it is given, and returns it; see `corm_jax.showing.drawing`. ``layers`` are
the numbers that the layers have in the trace, by default from 0.

>>> from corm_jax import Corm
>>> from matplotlib.figure import Figure
>>> from simulator.replay import replay
>>> from simulator.synthetic import noise
>>> axes = Figure().subplots()
>>> live(replay(noise(layers=2, steps=16), Corm(window=4, recent=2)), axes=axes) is axes
True
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from corm_jax.errors import CormError
from corm_jax.showing.drawing import BLUE, FLAME, GREY, PURPLE, RED, SHADES, axes_of, drawable, figure_of, styles, title
from simulator.oracle import Bounds
from simulator.replay import FOREVER, Replay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

FATES = {
    "live at the end": BLUE,
    "evicted": "#c3c8ce",
    "evicted and regretted": FLAME,
    "lost for lack of a slot": PURPLE,
}
"""What becomes of a key: its fate, and the colour of each."""

LIVE, EVICTED, REGRETTED, LOST = range(len(FATES))

SHOWN = 60
"""Tokens in a survival map."""

LONGEST = 18
"""Characters of a token's label."""


def live(
    replay: Replay, layers: Sequence[int] | None = None, heading: str | None = None, *, axes: "Axes | None" = None
) -> "Axes":
    """Live keys over time: one line a layer, the mean over its heads."""
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import MaxNLocator

    axes, layers = axes_of(axes, 8, 5), _layers(replay, layers)
    seen = np.arange(1, replay.steps + 1)
    curves = [np.stack([seen, layer.mean(0)], axis=-1) for layer in replay.live]
    lines = LineCollection(curves, array=layers, cmap=SHADES, linewidth=1.1, alpha=0.9)
    lines.set_clim(min(layers), max(max(layers), min(layers) + 1))
    axes.add_collection(lines)
    axes.plot([0, replay.steps], [0, replay.steps], "--", color=GREY, linewidth=1.2, label="full cache")
    axes.set(xlabel="tokens read", ylabel="live keys of a head, mean over heads")
    axes.set(xlim=(0, replay.steps), ylim=(0, 1.02 * replay.steps))
    axes.legend(loc="upper left", frameon=False)
    axes.figure.colorbar(lines, ax=axes, label="layer", ticks=layers if len(layers) <= 8 else MaxNLocator(integer=True))
    title(axes, 8, "How many keys each layer keeps", _of(replay, heading))
    return axes


def kept(
    replay: Replay, layers: Sequence[int] | None = None, heading: str | None = None, *, axes: "Axes | None" = None
) -> "Axes":
    """The share of the keys that each head keeps at the end: a heat map of heads and layers."""
    share, layers = replay.live[..., -1] / replay.steps, _layers(replay, layers)
    width = max(6.5, 2.2 + 0.28 * len(layers))
    axes = axes_of(axes, width, 1.6 + 0.4 * share.shape[1])
    _heat_map(axes, share.T, range(share.shape[1]), layers, "live keys (%)", limits=(0, 100), digits=0)
    axes.set(xlabel="layer", ylabel="key-value head")
    title(axes, width, "Share of the keys that each head keeps at the end", _of(replay, heading))
    return axes


def fates(replay: Replay, layer: int, head: int) -> np.ndarray:
    """What becomes of each key of a head: int ``[keys]``, an index into `FATES`."""
    until, lost, regretted = (x[layer, head] for x in (replay.until, replay.lost, replay.regretted))
    return np.select([until == FOREVER, lost, regretted], [LIVE, LOST, REGRETTED], EVICTED)


def busiest(fate: np.ndarray, shown: int = SHOWN) -> int:
    """The first of those ``shown`` consecutive tokens whose fates differ most: they have the largest entropy."""
    size = min(shown, len(fate))
    each = np.pad(np.cumsum(fate == np.arange(len(FATES))[:, None], axis=1), ((0, 0), (1, 0)))
    share = (each[:, size:] - each[:, :-size]) / size
    return int((share * np.log(np.maximum(share, 1e-9))).sum(0).argmin())


def survival(
    replay: Replay,
    layer: int,
    head: int,
    start: int = 0,
    pieces: Sequence[str] | None = None,
    heading: str | None = None,
    *,
    shown: int = SHOWN,
    axes: "Axes | None" = None,
) -> "Axes":
    """A bar for each token, from the time at which it is read to its eviction, coloured by its fate.

    Args:
      layer, head: indices into the replay.
      start: the first token shown.
      pieces: the text of each token; by default from the trace, or, if it holds no text, the positions.
      shown: how many tokens.
    """
    tokens = np.arange(start, min(start + shown, replay.steps))
    about = replay.about
    pieces = pieces or (about and about.pieces) or tuple(map(str, range(replay.steps)))
    fate, colors = fates(replay, layer, head)[tokens], list(FATES.values())
    axes = axes_of(axes, 9, 1.9 + 0.155 * len(tokens))
    axes.barh(
        np.arange(len(tokens)),
        replay.lifetime[layer, head, tokens],
        left=tokens,
        height=0.8,
        color=[colors[index] for index in fate],
    )
    axes.set_yticks(np.arange(len(tokens)), [label(pieces[int(token)]) for token in tokens], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(tokens) - 0.4, -0.6), xlim=(start, replay.steps), xlabel="tokens read")
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles: list[Any] = []
    for index, (name, color) in enumerate(FATES.items()):
        if count := int((fate == index).sum()):
            handles.append(axes.bar(0, 0, color=color, label=f"{name} ({count})"))
    again = np.flatnonzero(fate == REGRETTED)
    if len(again):
        wanted = replay.needed[layer, head, tokens[again]]
        marks = {"color": colors[REGRETTED], "markersize": 6, "label": "last query that needed it"}
        handles += axes.plot(wanted, again, "|", **marks)
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small", frameon=False)
    if heading is None and about:
        heading = f"{about.policy} on {about.model or 'a trace'}: layer {layer}, head {head}"
    title(axes, 9, "When the key of each token is evicted", _of(replay, heading))
    return axes


def history(
    replay: Replay,
    layer: int = 0,
    head: int = 0,
    start: int = 0,
    heading: str | None = None,
    *,
    attention: np.ndarray | None = None,
    shown: int = SHOWN,
    axes: "Axes | None" = None,
) -> "Axes":
    """Which keys of a head are live after each query: a row for each query, a column for each token.

    Args:
      layer, head: indices into the replay.
      start: the first token shown.
      attention: ``[steps, keys]``, what each query attends to with the full cache, see `simulator.oracle.attention`.
        Where it is at least 1/t, the key is important to the query: its cell gets a dot, or a cross if the key had been
        evicted before.
      shown: how many tokens.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    stop = min(start + shown, replay.steps)
    tokens, clock = np.arange(start, stop), np.arange(start + 1, stop + 1)[:, None]
    gone, until = (x[layer, head, tokens] for x in (replay.gone, replay.until))
    state = np.where(tokens >= clock, 0, np.where(clock < gone, 1, 2))
    side = max(5.0, 0.17 * len(tokens) + 2.4)
    axes = axes_of(axes, side + 0.6, side)
    colors = ("white", "#b2d3f0", "#dadde1")
    axes.imshow(state, cmap=ListedColormap(list(colors)), vmin=0, vmax=2, aspect="equal")
    axes.set_xticks(np.arange(len(tokens) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(tokens) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    handles: list[Any] = [Patch(color=colors[1], label="live after the query")]
    handles += [Patch(color=colors[2], label="evicted")] * bool((state == 2).any())
    if attention is not None:
        important = (attention[start:stop, start:stop] >= 1 / clock) & (tokens < clock)
        size = 220 / len(tokens)
        for mark, color, name, where in (
            ("o", BLUE, "important to the query", important & (clock <= until)),
            ("X", RED, "important, but evicted before", important & (clock > until)),
        ):
            if where.any():
                rows, columns = np.nonzero(where)
                handles.append(axes.scatter(columns, rows, s=size, marker=mark, color=color, label=name))
    pieces = (replay.about and replay.about.pieces) or tuple(map(str, range(replay.steps)))
    names = [label(pieces[token]) for token in tokens]
    small = 9 if len(tokens) <= 30 else 7
    axes.set_xticks(range(len(tokens)), names, rotation=90, fontsize=small)
    axes.set_yticks(range(len(tokens)), [f"{name}  {t}" for name, t in zip(names, clock[:, 0], strict=True)])
    axes.tick_params(axis="y", labelsize=small)
    axes.set(xlabel="key", ylabel="query, and its clock t")
    axes.spines[:].set_visible(False)
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    if heading is None and (about := replay.about):
        heading = f"{about.policy}, layer {layer}, head {head}"
    title(axes, side, "Which keys are live after each query", heading or "")
    return axes


def cost(
    replay: Replay,
    layers: Sequence[int] | None = None,
    heading: str | None = None,
    *,
    figure: "Figure | SubFigure | None" = None,
) -> "Figure | SubFigure":
    """What evictions cost each layer: the mass and, if it was measured, the error of the outputs."""
    panels = {
        "attention on live keys, share of the full cache's": replay.mass,
        "relative error of the attention output": replay.error,
    }
    panels = {name: values.mean(-1) for name, values in panels.items() if values is not None}
    layers = _layers(replay, layers)
    place, width = np.arange(len(layers)), 5.5 * len(panels)
    figure = figure_of(figure, width, 4.4)
    for axes, (name, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.vlines(
            place, values.min(1), values.max(1), alpha=0.3, linewidth=5, color=BLUE, label="range of the query heads"
        )
        axes.plot(place, values.mean(1), marker="o", markersize=4, color=BLUE, label="their mean")
        axes.set(xlabel="layer", ylabel=name)
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
        _layer_ticks(axes, layers)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    title(figure, width, "What evictions cost each layer, mean over queries", _of(replay, heading))
    return figure


def sweep(
    grid: Mapping[str, Sequence[Any]],
    panels: Mapping[str, np.ndarray],
    heading: str = "",
    *,
    figure: "Figure | SubFigure | None" = None,
) -> "Figure | SubFigure":
    """A heat map for each of the ``panels``, shares over a grid of two hyperparameters.

    Raises:
      CormError: for a grid of another number of hyperparameters.
    """
    if len(grid) != 2:
        raise CormError(f"a heat map shows a grid of two hyperparameters, not of {len(grid)}: {', '.join(grid)}")
    (down, rows), (across, columns) = grid.items()
    width = max(4.2, 1.8 + 0.75 * len(columns)) * len(panels)
    figure = figure_of(figure, width, 2.0 + 0.5 * len(rows))
    for axes, (name, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _heat_map(axes, values, rows, columns, "%", digits=1)
        axes.set(xlabel=across, ylabel=down)
        axes.set_title(drawable(name), fontsize="medium")
    title(figure, width, "A policy over a grid of its hyperparameters", heading)
    return figure


def regret(
    found: Mapping[str, Bounds],
    layers: Sequence[int] | None = None,
    heading: str = "",
    *,
    figure: "Figure | SubFigure | None" = None,
) -> "Figure | SubFigure":
    """Regret over time and by layer: how much more mass the best choice of as many keys would keep."""
    figure = figure_of(figure, 12, 4.8)
    over_time, by_layer = figure.subplots(1, 2)
    layers = range(len(next(iter(found.values())).policy)) if layers is None else layers
    place, width = np.arange(len(layers)), 0.8 / len(found)
    hatches = ("", "//", "..", "xx", "\\\\", "oo")
    for index, (spec, style) in enumerate(styles(found).items()):
        curve, color = found[spec].regret.mean((0, 1)), style["color"]
        size = max(1, len(curve) // 32)
        smooth = np.convolve(curve, np.full(size, 1 / size), "valid")
        dashes = ("-", "--", "-.", ":")[index % 4]
        over_time.plot(np.arange(len(smooth)) + 1 + (size - 1) / 2, smooth, dashes, color=color, linewidth=1.6)
        offset = (index - (len(found) - 1) / 2) * width
        values, hatch = found[spec].regret.mean((1, 2)), hatches[index % len(hatches)]
        by_layer.bar(
            place + offset, values, width, color=color, hatch=hatch, edgecolor="white", lw=0, label=drawable(spec)
        )
    over_time.set(xlabel="tokens read", ylabel="regret, share of attention")
    over_time.set_title(f"over time, mean of {size} queries", fontsize="medium")
    over_time.set(xlim=(0, len(curve)), ylim=(0, None))
    by_layer.set(xlabel="layer", ylabel="regret, share of attention")
    by_layer.set_title("by layer, mean over queries", fontsize="medium")
    _layer_ticks(by_layer, layers)
    figure.legend(loc="outside lower center", ncols=min(3, len(found)), fontsize="small", frameon=False)
    title(figure, 12, "Regret: how much more attention the best choice of as many keys would keep", heading)
    return figure


def label(piece: str) -> str:
    r"""The text of a token as a label: spaces are made visible, and a long text is cut.

    >>> label(" the"), label("\n\tx"), label("incomprehensibilities")
    ('␣the', '\\n\\tx', 'incomprehensibili…')
    """
    words = piece.replace(" ", "␣")
    shown = drawable(words if len(words) <= LONGEST else words[: LONGEST - 1] + "…")
    return shown if len(shown) <= 2 * LONGEST else f"{shown[: 2 * LONGEST - 1]}…"


def _layers(replay: Replay, layers: Sequence[int] | None) -> Sequence[int]:
    return range(len(replay.until)) if layers is None else layers


def _of(replay: Replay, heading: str | None) -> str:
    """The second line of a title: the heading that is given, or else what was replayed."""
    if heading is None and (about := replay.about):
        return f"{about.policy} on {about.model or 'a trace'}, {replay.steps:,} tokens"
    return heading or ""


def _layer_ticks(axes, layers: Sequence[int]) -> None:
    every = -(-len(layers) // 16)
    axes.set_xticks(range(0, len(layers), every), layers[::every])


def _heat_map(axes, values, rows, columns, label: str, *, digits: int, limits=None) -> None:
    """Shares as colours and, where there is room, also as percentages."""
    values = 100 * np.asarray(values)
    low, high = limits or (values.min(), values.max())
    if high - low < 1e-3:
        low, high = 0, 100
    image = axes.imshow(values, cmap=SHADES, vmin=low, vmax=high, aspect="auto")
    axes.set_yticks(range(len(rows)), [drawable(str(row)) for row in rows])
    axes.set_xticks(range(len(columns)), [drawable(str(column)) for column in columns])
    axes.figure.colorbar(image, ax=axes, label=label, pad=0.02)
    if values.size <= 400:
        for (row, column), value in np.ndenumerate(values):
            color = "black" if value > low + 0.6 * (high - low) else "white"
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=8, color=color)
