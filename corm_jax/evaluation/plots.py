"""Pictures: quality against memory, and where in the model the keys are kept. To be written by `files.deliver`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corm_jax.policies import Notation

MIB = 2**20


def compare(result: dict[str, Any], path: Path) -> None:
    """Draws the result of ``corm compare`` into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    quality, layers = figure.subplots(1, 2)
    for index, row in enumerate(result["rows"]):
        color = f"C{index}"
        live, allocated = row["kv_bytes_live"] / MIB, row["kv_bytes_allocated"] / MIB
        quality.plot([live, allocated], [row["nll"]] * 2, color=color, linewidth=1, linestyle=":")
        quality.plot(allocated, row["nll"], "o", color=color, markerfacecolor="none")
        quality.plot(live, row["nll"], "o", color=color)
        layers.plot(row["kept_per_layer"], marker=".", color=color, label=_plain(row["policy"]))
    quality.plot([], [], "o", color="grey", label="live")
    quality.plot([], [], "o", color="grey", markerfacecolor="none", label="allocated")
    quality.set(xlabel="keys and values at the end (MiB)", ylabel="mean NLL (nats a token), lower is better")
    quality.set_title(f"Quality against memory: {result['tokens']:,} tokens")
    quality.set_xlim(left=0)
    quality.margins(y=0.15)
    layers.set(xlabel="layer", ylabel="kept at the end (live / seen)", ylim=(0, 1.05))
    layers.set_title(_plain(f"What each layer keeps: {result['model']}"))
    quality.legend(loc="best", fontsize="small")
    figure.legend(loc="outside lower center", ncols=min(3, len(result["rows"])), fontsize="small", handles=layers.lines)
    figure.savefig(path, format="png", dpi=150)


def frontier(lines: Sequence[Any], path: Path, against: str = "full") -> None:
    """Draws quality against memory, a panel for each task, into a PNG file: `corm_jax.evaluation.summary.Line`.

    Quality is the difference from another policy, where there is one: its interval is the narrower.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(line.task for line in lines))
    colors = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(_rule(line) for line in lines))}
    columns = min(3, len(tasks))
    height = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.2 * columns, 0.8 + 3.4 * height), layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    for panel, task in zip(panels, tasks, strict=False):
        for line in (line for line in lines if line.task == task):
            measure, found = line.first, line.against or line.measures[line.first]
            color = colors[_rule(line)]
            below, above = (max(x, 0.0) for x in (found.mean - found.low, found.high - found.mean))
            error = [[below], [above]] if below + above < float("inf") else None
            panel.errorbar(line.live / line.full, found.mean, error, fmt="o", color=color, linewidth=1)
            panel.plot(line.allocated / line.full, found.mean, "o", color=color, markerfacecolor="none")
            name = f"{measure} - {against}" if line.against else measure
            panel.set(xlabel="of the full cache's bytes", ylabel=_plain(name), title=_plain(task))
        panel.set_xlim(0, 1.05 * max(panel.get_xlim()[1], 1))
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    handles = [figure.axes[0].plot([], [], "o", color=color, label=name)[0] for name, color in colors.items()]
    handles.append(figure.axes[0].plot([], [], "o", color="grey", markerfacecolor="none", label="allocated")[0])
    figure.legend(loc="outside lower center", ncols=min(5, len(handles)), fontsize="small", handles=handles)
    figure.savefig(path, format="png", dpi=120)


def analysis(found: dict[str, Any], path: Path) -> None:
    """Draws what `corm_jax.evaluation.analysis.analyse` found into a PNG file."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    sparsity, similarity, coverage, kept = figure.subplots(2, 2).flat
    image = sparsity.imshow(np.array(found["sparsity"]).T, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=sparsity)
    sparsity.set(xlabel="layer", ylabel="query head", title="Attention is sparse: share of keys below 1/t")
    for panel, name, axis in ((similarity, "similarity", "distances"), (coverage, "coverage", "windows")):
        values = np.array(found[name])
        panel.fill_between(found[axis], values.min(0), values.max(0), alpha=0.2, label="least and most of a layer")
        panel.plot(found[axis], values.mean(0), marker=".", label="mean over layers")
        panel.legend(fontsize="small")
    similarity.set(xlabel="distance of queries", ylabel="cosine", title="Neighbouring queries are alike")
    coverage.set(
        xlabel="w", ylabel="share of a query's important keys", ylim=(0, 1.02), title="The last w queries knew them"
    )
    shares = np.array(found["kept"])
    for index, recent in enumerate(found["recents"]):
        kept.plot(found["windows"], shares[:, :, index].mean(0), marker=".", label=f"r = {recent}")
    kept.set(xlabel="w", ylabel="kept at the end", ylim=(0, 1.02), title="What CORM would keep")
    kept.legend(fontsize="small")
    for panel, axis in ((similarity, "distances"), (coverage, "windows"), (kept, "windows")):
        panel.set_xscale("log", base=2)
        panel.set_xticks(found[axis], labels=map(str, found[axis]))
    figure.savefig(path, format="png", dpi=120)


def _plain(text: str) -> str:
    """A name as it is, where matplotlib would read dollars as mathematics."""
    return text.replace("$", r"\$")


def _rule(line: Any) -> str:
    return Notation.read(line.policy).name
