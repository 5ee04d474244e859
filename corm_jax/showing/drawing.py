"""How pictures look: their colours and marks, their letters, and on what they are drawn.

A function that draws takes the `matplotlib.axes.Axes` to draw on, or a figure if it has several panels, and returns it.
Without one it makes its own with pyplot, which notebooks show. `saving` draws on one that pyplot never sees.
"""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from corm_jax.errors import CormError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

BLUE, RED, ORANGE, PURPLE, BROWN = "#3f90da", "#bd1f01", "#ffa90e", "#832db6", "#a96b59"
FLAME, KHAKI, SKY, INK, GREY = "#e76300", "#b9ac70", "#92dadd", "#1f2430", "#717581"
STONE = "#94a4a2"
"""Colours that nearly everybody tells apart (Petroff, arXiv 2107.02270). Grey is the full cache's, against which
others are held, and that of legends which are not about one policy."""

SHADES = "viridis"
"""From little, dark, to much, bright, in maps: even in grey, and to all eyes."""

COLORS, MARKERS = (BLUE, RED, ORANGE, PURPLE, BROWN, FLAME, KHAKI, SKY, INK, STONE), "os^DvPX*"

_unseen: ContextVar[bool] = ContextVar("unseen", default=False)


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a mark for each name, so that nothing is told by colour alone. ``full`` is grey.

    >>> {name: style["marker"] for name, style in styles(["full", "corm", "h2o"]).items()}
    {'full': 'o', 'corm': 's', 'h2o': '^'}
    """
    found: dict[str, dict[str, Any]] = {}
    colored = 0
    for index, name in enumerate(dict.fromkeys(names)):
        color = GREY if name == "full" else COLORS[colored % len(COLORS)]
        found[name] = {"color": color, "marker": MARKERS[index % len(MARKERS)]}
        colored += name != "full"
    return found


def axes_of(axes: "Axes | None", width: float, height: float) -> "Axes":
    """The axes to draw on: those given, or new ones of so many inches."""
    return _new(width, height).subplots() if axes is None else axes


def figure_of(figure: "Figure | SubFigure | None", width: float, height: float) -> "Figure | SubFigure":
    """The figure to draw on: the one given, or a new one of so many inches."""
    return _new(width, height) if figure is None else figure


def _new(width: float, height: float) -> "Figure":
    options: dict[str, Any] = {"figsize": (width, height), "layout": "constrained"}
    try:
        if _unseen.get():
            from matplotlib.figure import Figure

            return Figure(**options)
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise CormError("matplotlib is not installed: pip install 'corm-jax[plots]'") from None
    return pyplot.figure(**options)


def saving(draw: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[Path], None]:
    """What draws on a new figure and writes it to a PNG file, given its path: see `corm_jax.files.deliver`."""

    def write(path: Path) -> None:
        token = _unseen.set(True)
        try:
            drawn = draw(*arguments, **options)
        finally:
            _unseen.reset(token)
        drawn.figure.savefig(path, format="png", dpi=150)

    return write


def drawable(text: str) -> str:
    r"""Text as it is: what the font lacks, and what is no character to see, as escapes; dollars begin no mathematics.

    >>> drawable("the 猫\n"), drawable("$5")
    ('the \\u732b\\n', '\\$5')
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties())).get_charmap()
    seen = "".join(c if c.isprintable() and ord(c) in glyphs else c.encode("unicode_escape").decode() for c in text)
    return seen.replace("$", r"\$")


def title(on: Any, width: float, *parts: str) -> None:
    """Writes a title over axes or a figure: what is shown, and of what, in as many lines as ``width`` inches need."""
    words = "\n".join(fill(drawable(part), int(10 * width)) for part in parts if part)
    on.suptitle(words) if hasattr(on, "suptitle") else on.set_title(words)
