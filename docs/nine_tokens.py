"""Draws docs/nine-tokens.png, CORM by hand: ``python docs/nine_tokens.py``. What is evicted, the specification says."""

from pathlib import Path

import numpy as np

from simulator.reference import corm_messages

WORDS = ["The", "cat", "sat", "on", "the", "mat", "because", "it", "purred"]
ASKED = [{0}, {0, 1}, {1, 2}, {0, 2, 3}, {3}, {0, 3, 5}, {0, 6}, {0, 1, 7}, {7, 8}]
WINDOW, RECENT = 4, 2
ATTENDED, LIVE, WANTED = "#0072b2", "#cfe3f1", "#d55e00"


def kept() -> list[set[int]]:
    """The tokens that are live after each query, by the specification."""
    keys = 30 * np.eye(len(WORDS))
    queries = np.stack([keys[sorted(row)].sum(0) for row in ASKED])
    return corm_messages(queries[:, None], keys, keys, window=WINDOW, recent=RECENT).kept


def draw(path: Path) -> None:
    """Rows are queries, columns are keys."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyBboxPatch, Rectangle

    figure = plt.figure(figsize=(7.8, 6.4), dpi=190)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-2.5, 9.6), ylim=(10.35, -1.35))
    axes.axis("off")
    card = {"boxstyle": "round,pad=0,rounding_size=0.15", "facecolor": "white", "edgecolor": "none", "zorder": -1}
    axes.add_patch(FancyBboxPatch((-2.3, -1.15), 11.7, 11.3, **card))
    text = {"fontsize": 11, "color": "#1b1f24", "va": "center"}
    after = kept()
    for i, word in enumerate(WORDS):
        axes.text(i + 0.5, -0.25, word, ha="center", **text)
    axes.text(-0.2, -0.8, "query", ha="right", **text | {"color": "#57606a"})
    axes.text(0.05, -0.8, "keys", ha="left", **text | {"color": "#57606a"})
    for t, word in enumerate(WORDS):
        axes.text(-0.2, t + 0.5, f"t = {t + 1}   {word}", ha="right", **text)
        visible = (after[t - 1] if t else set()) | {t}
        for i in range(t + 1):
            wanted = i in ASKED[t]
            colour = (ATTENDED if wanted else LIVE) if i in visible else "white"
            axes.add_patch(Rectangle((i + 0.05, t + 0.05), 0.9, 0.9, facecolor=colour, edgecolor="none"))
            if wanted and i not in visible:
                axes.text(
                    i + 0.5, t + 0.5, "\N{MULTIPLICATION SIGN}", ha="center", **text | {"color": WANTED, "fontsize": 17}
                )
        for i in visible - after[t]:
            axes.plot([i + 0.05, i + 0.95], [t + 1, t + 1], color=WANTED, linewidth=4, solid_capstyle="butt", zorder=4)
    axes.add_patch(Rectangle((1, 3), 1, 4, fill=False, edgecolor=WANTED, linewidth=1.6, linestyle=(0, (3, 2))))
    notes = (
        f"After t = 7 the last w = {WINDOW} queries are 4 to 7.\n"
        "None of them attended to “cat” (dashed)\nor “the”: both are evicted.",
        "At t = 8 “it” would attend to “cat”:\ntoo late. And “sat” is evicted.",
    )
    for y, note in zip((1.0, 2.9), notes, strict=True):
        axes.text(4.3 + (y > 2) * 0.9, y, note, ha="left", linespacing=1.4, **text | {"fontsize": 10})
    for x, colour, label in (
        (-0.6, ATTENDED, "attended to"),
        (2.0, LIVE, "live, not attended to"),
        (5.9, None, "evicted"),
    ):
        if colour:
            axes.add_patch(Rectangle((x, 9.4), 0.45, 0.45, facecolor=colour, edgecolor="none"))
        else:
            axes.plot([x, x + 0.45], [9.62, 9.62], color=WANTED, linewidth=4, solid_capstyle="butt")
        axes.text(x + 0.62, 9.64, label, ha="left", **text | {"fontsize": 10})
    figure.savefig(path, transparent=True)
    plt.close(figure)


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("agg")
    draw(Path(__file__).with_name("nine-tokens.png"))
