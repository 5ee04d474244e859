"""Pictures of what the commands measure: quality against memory, and where in the model the keys are kept.

Each draws on the axes, or the figure, that it is given, and returns it; see `corm_jax.showing.drawing`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from corm_jax.showing.drawing import BLUE, GREY, SHADES, axes_of, drawable, figure_of, styles, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


MIB = 2**20

UNITS = {
    "nll": "NLL (nats a token)",
    "kl": "KL divergence (nats a token)",
    "margin": "margin of the right answer (nats a token)",
    "score": "score of the task, from 0 to 1",
    "exact": "share of the answers that are written",
    "same": "share of tokens with the same likeliest token",
}
"""What is on the axis of a measure."""


def compare(result: Mapping[str, Any], *, figure: "Figure | SubFigure | None" = None) -> "Figure | SubFigure":
    """The result of ``corm compare``: quality against memory, and what each layer keeps."""
    rows = result["rows"]
    figure = figure_of(figure, 11, 4.6)
    left, right = figure.subplots(1, 2)
    quality(rows, axes=left)
    by_layer(rows, axes=right)
    columns = min(3, len(rows))
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small", handles=right.lines, frameon=False)
    text = f" of {result['text']}" if "text" in result else ""
    title(figure, 11, f"{result['model']} reads {result['tokens']:,} tokens{text}")
    return figure


def quality(rows: Sequence[Mapping[str, Any]], *, axes: "Axes | None" = None) -> "Axes":
    """How well a text is predicted against the bytes of the cache: live as filled marks, allocated as empty ones.

    Args:
      rows: for each policy a ``policy``, ``nll``, ``kv_bytes_live`` and ``kv_bytes_allocated``, as in the report of
        ``corm compare``.
    """
    axes = axes_of(axes, 5.5, 4.4)
    most = 0.0
    for row, style in zip(rows, styles(row["policy"] for row in rows).values(), strict=True):
        live, allocated = row["kv_bytes_live"] / MIB, row["kv_bytes_allocated"] / MIB
        axes.plot([live, allocated], [row["nll"]] * 2, color=style["color"], linewidth=1, linestyle=":")
        axes.plot(allocated, row["nll"], markerfacecolor="white", linestyle="", **style)
        axes.plot(live, row["nll"], linestyle="", label=drawable(row["policy"]), **style)
        most = max(most, live, allocated)
    axes.plot([], [], "o", color=GREY, label="live")
    axes.plot([], [], "o", color=GREY, markerfacecolor="white", label="allocated")
    low, high = min(row["nll"] for row in rows), max(row["nll"] for row in rows)
    spare = max(0.15 * (high - low), 0.01)
    axes.set(xlim=(0, 1.08 * most), ylim=(low - spare, high + spare))
    axes.set(xlabel="keys and values at the end (MiB)", ylabel="NLL (nats a token), lower is better")
    axes.set_title("Quality against memory")
    axes.legend(handles=axes.lines[-2:], loc="best", fontsize="small")
    return axes


def by_layer(rows: Sequence[Mapping[str, Any]], *, axes: "Axes | None" = None) -> "Axes":
    """The share of the keys that each layer keeps: of each row ``policy`` and ``kept_per_layer``."""
    axes = axes_of(axes, 5.5, 4.4)
    for row, style in zip(rows, styles(row["policy"] for row in rows).values(), strict=True):
        axes.plot(row["kept_per_layer"], markersize=4, label=drawable(row["policy"]), **style)
    axes.set(xlabel="layer", ylabel="live keys / tokens read", ylim=(0, 1.05))
    axes.set_title("What each layer keeps at the end")
    return axes


def frontier(
    lines: Sequence[Any],
    against: str = "full",
    heading: str = "",
    *,
    figure: "Figure | SubFigure | None" = None,
) -> "Figure | SubFigure":
    """Quality against memory, a panel for each task, of `corm_jax.evaluation.summary.Line`.

    Quality is the difference from another policy, where there is one: its interval is the narrower. Each policy has a
    colour and a mark of its own, and a line through its sizes.
    """
    tasks = list(dict.fromkeys(line.task for line in lines))
    looks = styles(line.policy for line in lines)
    columns = min(3, len(tasks))
    height, width = -(-len(tasks) // columns), max(6.0, 4.4 * columns)
    figure = figure_of(figure, width, 1.4 + 3.3 * height + 0.22 * -(-len(looks) // columns))
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    for panel, task in zip(panels, tasks, strict=False):
        for policy, style in looks.items():
            points = sorted((one for one in lines if (one.task, one.policy) == (task, policy)), key=lambda x: x.live)
            if not points:
                continue
            found = [one.against or one.measures[one.first] for one in points]
            live, means = [one.live / one.full for one in points], np.array([one.mean for one in found])
            error = np.abs([[one.low, one.high] for one in found] - means[:, None]).T
            error[~np.isfinite(error)] = 0  # of one example there is no interval
            panel.errorbar(live, means, error, linewidth=1, elinewidth=0.8, markersize=5, **style)
            for one, mean in zip(points, means, strict=True):
                ring = {**style, "markersize": 5, "markerfacecolor": "white", "linestyle": "", "alpha": 0.6}
                panel.plot(one.allocated / one.full, mean, **ring)
            measure = str(UNITS.get(points[0].first, points[0].first))
            panel.set_ylabel(drawable(measure) + (f",\nabove {drawable(against)}" if points[0].against else ""))
        panel.set_title(drawable(task), fontsize="medium")
        panel.set_xlabel("cache, share of the full one's bytes")
        panel.set_xlim(0, 1.05 * max(panel.get_xlim()[1], 1))
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    first = panels[0]
    handles = [first.plot([], [], label=drawable(name), **style)[0] for name, style in looks.items()]
    handles.append(first.plot([], [], "o", color=GREY, markerfacecolor="white", label="bytes allocated")[0])
    figure.legend(
        loc="outside lower center", ncols=min(columns, len(handles)), fontsize="small", handles=handles, frameon=False
    )
    title(figure, width, "Quality against memory: live bytes filled, 95% intervals over examples", heading)
    return figure


def analysis(
    found: Mapping[str, Any], heading: str = "", *, figure: "Figure | SubFigure | None" = None
) -> "Figure | SubFigure":
    """What `corm_jax.evaluation.analysis.analyse` found."""
    figure = figure_of(figure, 11, 7.8)
    sparsity, similarity, coverage, kept = figure.subplots(2, 2).flat
    image = sparsity.imshow(np.array(found["sparsity"]).T, aspect="auto", vmax=1, cmap=SHADES)
    sparsity.figure.colorbar(image, ax=sparsity, label="share of keys with attention below 1/t")
    sparsity.set(xlabel="layer", ylabel="query head", title="Attention is sparse")
    sparsity.yaxis.get_major_locator().set_params(integer=True)
    if found["layers"] != list(range(len(found["layers"]))):  # local layers are left out
        sparsity.set_xticks(range(len(found["layers"])), labels=map(str, found["layers"]))
    for panel, name, axis in ((similarity, "similarity", "distances"), (coverage, "coverage", "windows")):
        values = np.array(found[name])
        band = {"alpha": 0.2, "color": BLUE, "label": "from the least layer to the most"}
        panel.fill_between(found[axis], values.min(0), values.max(0), **band)
        panel.plot(found[axis], values.mean(0), marker="o", markersize=4, color=BLUE, label="mean over layers")
        panel.legend(fontsize="small")
    similarity.set(xlabel="distance of two queries (tokens)", ylabel="cosine", title="Neighbouring queries are alike")
    coverage.set_ylim(top=1.0)
    coverage.set(xlabel="w (queries)", ylabel="share of a query's important keys")
    coverage.set_title("Important keys were important to one of the last w")
    shares = np.array(found["kept"])
    band = {"alpha": 0.2, "color": BLUE, "label": f"r = {found['recents'][-1]}, from the least layer to the most"}
    kept.fill_between(found["windows"], shares[..., -1].min(0), shares[..., -1].max(0), **band)
    looks = zip((7, 4, 1.5), ("#b2d3f0", BLUE, "#0b2a4a"), strict=True)  # broad to narrow: they may coincide
    for index, (recent, (width, color)) in enumerate(zip(found["recents"], looks, strict=True)):
        kept.plot(found["windows"], shares[:, :, index].mean(0), lw=width, color=color, label=f"r = {recent}, mean")
    kept.set(xlabel="w (queries)", ylabel="live keys / tokens read", ylim=(0, 1.02), title="What CORM would keep")
    kept.legend(fontsize="small", loc="upper left")
    for panel, axis in ((similarity, "distances"), (coverage, "windows"), (kept, "windows")):
        panel.set_xscale("log", base=2)
        panel.set_xticks(found[axis], labels=map(str, found[axis]))
    title(figure, 11, "What CORM rests on", heading)
    return figure


def heads(
    panels: Mapping[str, np.ndarray], heading: str = "", *, figure: "Figure | SubFigure | None" = None
) -> "Figure | SubFigure":
    """Heat maps of layers and key-value heads, one below the other: titles, with values ``[layers, kv_heads]``."""
    figure = figure_of(figure, 11, 0.8 + 1.6 * len(panels))
    rows = np.ravel(figure.subplots(len(panels), 1, sharex=True))
    for axes, (name, values) in zip(rows, panels.items(), strict=True):
        image = axes.imshow(np.asarray(values).T, aspect="auto", cmap=SHADES, vmin=0)
        axes.set(ylabel="kv head", yticks=range(np.shape(values)[1]))
        axes.set_title(drawable(name), fontsize="medium")
        axes.figure.colorbar(image, ax=axes, pad=0.01)
    axes.set_xlabel("layer")
    title(figure, 11, heading)
    return figure
