"""The picture of a comparison: quality against memory, and where in the model the keys are kept."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from corm_jax.errors import CormError
from corm_jax.files import check_writable, whole_file

MIB = 2**20


def check_picture(path: Path) -> None:
    """Raises unless a picture can be drawn into the file: asked before long work, not after."""
    check_writable(path)
    if find_spec("matplotlib") is None:
        raise CormError("matplotlib is not installed: pip install 'corm-jax[plots]'")


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
        layers.plot(row["kept_per_layer"], marker=".", color=color, label=row["policy"])
    quality.plot([], [], "o", color="grey", label="live")
    quality.plot([], [], "o", color="grey", markerfacecolor="none", label="allocated")
    quality.set(xlabel="keys and values at the end (MiB)", ylabel="mean NLL (nats a token), lower is better")
    quality.set_title(f"Quality against memory: {result['tokens']:,} tokens")
    quality.set_xlim(left=0)
    quality.margins(y=0.15)
    layers.set(xlabel="layer", ylabel="kept at the end (live / seen)", ylim=(0, 1.05))
    layers.set_title(f"What each layer keeps: {result['model']}")
    quality.legend(loc="best", fontsize="small")
    figure.legend(loc="outside lower center", ncols=min(3, len(result["rows"])), fontsize="small", handles=layers.lines)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
