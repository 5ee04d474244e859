"""The simulator's pictures: what a policy keeps, for how long, and what that costs.

``layers`` are always the numbers that the layers have in the trace. Files are written by `corm_jax.files.deliver`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from simulator.oracle import Bounds
from simulator.replay import FOREVER, Replay

FATES = {
    "live at the end": "#0072b2",
    "evicted": "#b5bcc4",
    "evicted and regretted": "#d55e00",
    "lost for want of a slot": "#3d1f4f",
}
"""What becomes of a key, and its colour."""

LIVE, EVICTED, REGRETTED, LOST = range(len(FATES))

SHOWN = 60
"""Tokens in a survival map."""

LONGEST = 18
"""Characters of a token's label."""


def live(replay: Replay, layers: Sequence[int], title: str, path: Path) -> None:
    """Live keys over time: one line a layer, the mean over its heads."""
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import MaxNLocator

    seen = np.arange(1, replay.steps + 1)
    with _picture(path, 8, 5) as figure:
        axes = figure.subplots()
        curves = [np.stack([seen, layer.mean(0)], axis=-1) for layer in replay.live]
        lines = LineCollection(curves, array=layers, cmap="viridis", linewidth=1.1, alpha=0.9)
        lines.set_clim(min(layers), max(max(layers), min(layers) + 1))
        axes.add_collection(lines)
        axes.plot([0, replay.steps], [0, replay.steps], "--", color="0.45", linewidth=1, label="full cache")
        axes.set(xlabel="tokens read", ylabel="live keys (mean over heads)")
        axes.set(xlim=(0, replay.steps), ylim=(0, 1.02 * replay.steps))
        axes.legend(loc="upper left", frameon=False)
        figure.colorbar(lines, label="layer", ticks=layers if len(layers) <= 8 else MaxNLocator(integer=True))
        _title(figure, title)


def kept(replay: Replay, layers: Sequence[int], title: str, path: Path) -> None:
    """The share of the keys that each head keeps at the end: a heat map of heads and layers."""
    share = replay.live[..., -1] / replay.steps
    with _picture(path, max(5.5, 2.2 + 0.33 * len(layers)), 1.9 + 0.33 * share.shape[1]) as figure:
        axes = figure.subplots()
        _heat_map(axes, share.T, range(share.shape[1]), layers, "kept at the end (%)", limits=(0, 100), digits=0)
        axes.set(xlabel="layer", ylabel="key-value head")
        _title(figure, title)


def fates(replay: Replay, layer: int, head: int) -> np.ndarray:
    """What becomes of each key of a head: int ``[keys]``, an index into `FATES`."""
    until, lost, regretted = (x[layer, head] for x in (replay.until, replay.lost, replay.regretted))
    return np.select([until == FOREVER, lost, regretted], [LIVE, LOST, REGRETTED], EVICTED)


def busiest(fate: np.ndarray) -> int:
    """Where the `SHOWN` consecutive tokens begin whose fates are the most mixed: those of the largest entropy."""
    size = min(SHOWN, len(fate))
    each = np.pad(np.cumsum(fate == np.arange(len(FATES))[:, None], axis=1), ((0, 0), (1, 0)))
    share = (each[:, size:] - each[:, :-size]) / size
    return int((share * np.log(np.maximum(share, 1e-9))).sum(0).argmin())


def survival(replay: Replay, layer: int, head: int, start: int, pieces: Sequence[str], title: str, path: Path) -> None:
    """One bar a token, from its arrival to its eviction, the colour by its fate.

    Args:
      layer, head: indices into the replay.
      start: the first token shown, of `SHOWN`.
      pieces: the text of each token of the trace.
    """
    shown = np.arange(start, min(start + SHOWN, replay.steps))
    fate = fates(replay, layer, head)[shown]
    colors = list(FATES.values())
    with _picture(path, 9, 1.7 + 0.155 * len(shown)) as figure:
        axes = figure.subplots()
        axes.barh(
            np.arange(len(shown)),
            replay.lifetime[layer, head, shown],
            left=shown,
            height=0.8,
            color=[colors[index] for index in fate],
        )
        axes.set_yticks(
            np.arange(len(shown)),
            [label(piece) for piece in pieces[start : start + SHOWN]],
            parse_math=False,
            fontsize=8,
        )
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(len(shown) - 0.4, -0.6), xlim=(start, replay.steps), xlabel="tokens read")
        axes.spines[["top", "right", "left"]].set_visible(False)
        handles: list[Any] = []
        for index, (name, color) in enumerate(FATES.items()):
            if count := int((fate == index).sum()):
                handles.append(axes.bar(0, 0, color=color, label=f"{name} ({count})"))
        again = np.flatnonzero(fate == REGRETTED)
        if len(again):
            wanted = replay.needed[layer, head, shown[again]]
            marks = {"color": colors[REGRETTED], "markersize": 6, "label": "last time it was wanted"}
            handles += axes.plot(wanted, again, "|", **marks)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small", frameon=False)
        _title(figure, title)


def cost(replay: Replay, layers: Sequence[int], title: str, path: Path) -> None:
    """What evictions cost each layer: retained mass and, where there is one, the outputs' error."""
    panels = {"retained attention mass": replay.mass, "relative error of the output": replay.error}
    panels = {name: values.mean(-1) for name, values in panels.items() if values is not None}
    place = np.arange(len(layers))
    with _picture(path, 5.5 * len(panels), 4.4) as figure:
        for axes, (name, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            axes.vlines(place, values.min(1), values.max(1), alpha=0.3, linewidth=5, label="range of the query heads")
            axes.plot(place, values.mean(1), marker="o", markersize=4, label="their mean")
            axes.set(xlabel="layer", ylabel=f"{name} (mean over queries)")
            axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
            _layer_ticks(axes, layers)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small", frameon=False)
        _title(figure, title)


def sweep(grid: Mapping[str, Sequence[Any]], panels: Mapping[str, np.ndarray], title: str, path: Path) -> None:
    """A heat map for each of the ``panels``, shares over a grid of two hyperparameters."""
    (down, rows), (across, columns) = grid.items()
    width, height = max(3.6, 1.8 + 0.75 * len(columns)), 1.8 + 0.5 * len(rows)
    with _picture(path, width * len(panels), height) as figure:
        for axes, (name, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            _heat_map(axes, values, rows, columns, f"{name} (%)", digits=1)
            axes.set(xlabel=across, ylabel=down)
        _title(figure, title)


def regret(found: Mapping[str, Bounds], layers: Sequence[int], title: str, path: Path) -> None:
    """What each policy loses beyond what so few keys had to lose: over time and by layer."""
    with _picture(path, 12, 4.6) as figure:
        over_time, by_layer = figure.subplots(1, 2)
        place, width = np.arange(len(layers)), 0.8 / len(found)
        for index, (spec, one) in enumerate(found.items()):
            curve = one.regret.mean((0, 1))
            size = max(1, len(curve) // 32)
            smooth = np.convolve(curve, np.full(size, 1 / size), "valid")
            color = f"C{index}"
            over_time.plot(np.arange(len(smooth)) + 1 + (size - 1) / 2, smooth, color=color, linewidth=1.4)
            offset = (index - (len(found) - 1) / 2) * width
            by_layer.bar(place + offset, one.regret.mean((1, 2)), width, color=color, label=spec)
        over_time.set(xlabel="tokens read", ylabel=f"regret (attention mass, mean of {size} queries)")
        over_time.set(xlim=(0, len(curve)), ylim=(0, None))
        by_layer.set(xlabel="layer", ylabel="regret (attention mass, mean over queries)")
        _layer_ticks(by_layer, layers)
        figure.legend(loc="outside lower center", ncols=min(3, len(found)), fontsize="small", frameon=False)
        _title(figure, title)


def label(piece: str) -> str:
    r"""A token as a label: with visible blanks, and not too long.

    >>> label(" the"), label("\n\t$x$"), label("incomprehensibilities")
    ('␣the', '\\n\\t$x$', 'incomprehensibili…')
    """
    shown = drawable(piece[: LONGEST + 1].replace(" ", "␣"))
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def drawable(text: str) -> str:
    r"""Text with what the font lacks, and what is no character to see, as escapes.

    >>> drawable("the 猫\n")
    'the \\u732b\\n'
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if c.isprintable() and ord(c) in glyphs else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def _picture(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches that is written to a PNG file once it is drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    figure.savefig(path, format="png", dpi=150)


def _title(figure, title: str) -> None:
    figure.suptitle(drawable(title), parse_math=False, fontsize="medium")


def _layer_ticks(axes, layers: Sequence[int]) -> None:
    every = -(-len(layers) // 16)
    axes.set_xticks(range(0, len(layers), every), layers[::every])


def _heat_map(axes, values, rows, columns, label: str, *, digits: int, limits=None) -> None:
    """Shares as colours and, where there is room, as numbers of percent."""
    values = 100 * np.asarray(values)
    low, high = limits or (values.min(), values.max())
    if high - low < 1e-3:
        low, high = 0, 100
    image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.figure.colorbar(image, ax=axes, label=label, pad=0.02)
    if values.size <= 400:
        for (row, column), value in np.ndenumerate(values):
            color = "black" if value > low + 0.6 * (high - low) else "white"
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=8, color=color)
