"""Tables for terminals of any width: nothing in them is ever cut off.

Where there is room, a table has one line a row. In a narrower terminal its text folds, after commas and colons; in a
narrower one yet, the text of a row stands above its numbers; and at last every number has a line of its own.
"""

import re
import shutil
import sys
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

try:
    from rich.cells import cell_len
except ModuleNotFoundError as error:
    sys.exit(f"corm: {error.name} is not installed: pip install 'corm-jax[cli]'")

GAP = "  "
"""Between columns."""

WORD = 24
"""A text column is as wide as its longest word at least, up to so many cells. Longer words are broken."""

PLAIN = {"─": "-", "Δ": "d"}
"""Our own signs, for encodings that lack them."""

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Column(NamedTuple):
    """A column's heading, which may have several lines, and whether it holds numbers."""

    heading: str
    number: bool = False

    @property
    def name(self) -> str:
        r"""The heading in one line.

        >>> Column("over-\nflow").name
        'overflow'
        """
        return self.heading.replace("-\n", "").replace("\n", " ")


def print_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], *, title: str = "", notes: Sequence[str] = ()
) -> None:
    """Prints a table as wide as the terminal, or as 80 columns where there is none.

    Args:
      rows: the cells, row by row.
      title: a line above.
      notes: paragraphs below.
    """
    width = shutil.get_terminal_size().columns
    lines = [*fold(title, width), *table(columns, rows, width)]
    for note in notes:
        lines += fold(note, width)
    show("\n".join(lines))


def show(text: str) -> None:
    """Prints text: signs that the output's encoding lacks in plain letters, control characters as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for sign, letters in PLAIN.items():
        try:
            sign.encode(encoding)
        except UnicodeEncodeError:
            text = text.replace(sign, letters)
    print(CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    r"""The lines of a table, none of them wider than ``width`` cells unless a single number is.

    >>> columns = [Column("policy"), Column("NLL", number=True), Column("kept", number=True)]
    >>> rows = [("full", "2.4751", "1.000"), ("corm:window=64,recent=64", "2.5586", "0.188")]
    >>> for width in (40, 31, 20):
    ...     print(*table(columns, rows, width), sep="\n", end="\n\n")
    policy                       NLL   kept
    ───────────────────────────────────────
    full                      2.4751  1.000
    corm:window=64,recent=64  2.5586  0.188
    <BLANKLINE>
    policy               NLL   kept
    ───────────────────────────────
    full              2.4751  1.000
    corm:window=64,   2.5586  0.188
    recent=64
    <BLANKLINE>
    policy
         NLL   kept
      ─────────────
    full
      2.4751  1.000
    corm:window=64,
    recent=64
      2.5586  0.188
    <BLANKLINE>
    """
    rows = [[cell.replace("\n", " ") for cell in row] for row in rows]
    return _beside(columns, rows, width) or _above(columns, rows, width) or _below(columns, rows, width)


def _beside(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """A line for each row, or as many as its text folds into. Nothing if that is too wide."""
    headings = [column.heading for column in columns]
    cells = [[*heading.split("\n"), *(row[i] for row in rows)] for i, heading in enumerate(headings)]
    natural = [max(map(cell_len, each)) for each in cells]
    words = [max((cell_len(piece.rstrip()) for cell in each for piece in _pieces(cell)), default=0) for each in cells]
    sizes = [n if column.number else min(w, WORD) for column, n, w in zip(columns, natural, words, strict=True)]
    left = width - sum(sizes) - len(GAP) * (len(sizes) - 1)
    if left < 0:
        return []
    wants = sorted((n - size, i) for i, (n, size) in enumerate(zip(natural, sizes, strict=True)))
    for rank, (want, i) in enumerate(wants):  # those that want least come first, and leave the rest to the others
        given = min(want, left // (len(wants) - rank))
        sizes[i], left = sizes[i] + given, left - given

    def lines(row: Sequence[str]) -> list[str]:
        folded = [[y for x in cell.split("\n") for y in fold(x, size)] for cell, size in zip(row, sizes, strict=True)]
        height = max(map(len, folded))
        if row is headings:  # they stand on the rule
            folded = [[""] * (height - len(cell)) + cell for cell in folded]
        found = []
        for line in zip_longest(*folded, fillvalue=""):
            blank = [" " * (size - cell_len(cell)) for cell, size in zip(line, sizes, strict=True)]
            padded = [b + c if column.number else c + b for column, c, b in zip(columns, line, blank, strict=True)]
            found.append(GAP.join(padded).rstrip())
        return found

    rule = "─" * (sum(sizes) + len(GAP) * (len(sizes) - 1))
    return [*lines(headings), rule, *(line for row in rows for line in lines(row))]


def _above(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The text of each row above its numbers. Nothing if the numbers alone are too wide."""

    def text(cells: Sequence[str]) -> list[str]:
        shown = [cell for column, cell in zip(columns, cells, strict=True) if cell and not column.number]
        return fold(GAP.join(shown), width)

    numbers = [i for i, column in enumerate(columns) if column.number]
    below = [[row[i] for i in numbers] for row in rows]
    if not numbers or not (lines := _beside([columns[i] for i in numbers], below, width - len(GAP))):
        return []
    head = len(lines) - len(rows)
    found = [*text([column.name for column in columns]), *(GAP + line for line in lines[:head])]
    for row, line in zip(rows, lines[head:], strict=True):
        found += [*text(row), GAP + line]
    return found


def _below(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The cells of each row one below the other, all but the first with the heading of its column."""
    size, found = max((cell_len(column.name) for column in columns[1:]), default=0), []
    for first, *cells in rows:
        found += fold(first, width)
        for column, cell in zip(columns[1:], cells, strict=True):
            if not cell.strip():
                continue
            line = f"{GAP}{column.name}{' ' * (size - cell_len(column.name))}{GAP}{cell.rstrip()}"
            if cell_len(line) <= width:
                found.append(line)
            else:
                parts = cell.split() if column.number else fold(cell, width)
                found += [*fold(column.name, width), *parts]
    return found


def fold(text: str, width: int) -> list[str]:
    """Text in lines of at most ``width`` cells, broken at blanks and after separators, and inside longer words.

    >>> fold("corm:window=64,recent=1,024", 16)
    ['corm:window=64,', 'recent=1,024']
    """
    found, line = [], ""
    for piece in _pieces(text):
        if line and cell_len(line + piece.rstrip()) > width:
            found.append(line.rstrip())
            line = ""
        line += piece
        while cell_len(line.rstrip()) > width:
            size = max([i for i in range(1, len(line)) if cell_len(line[:i]) <= width], default=1)
            found.append(line[:size])
            line = line[size:]
    return [*found, line.rstrip()] if line.strip() else found


def _pieces(text: str) -> list[str]:
    """Where lines may end: after blanks and separators, but not inside a number such as 1,024."""
    return [piece for piece in re.split(r"(?<=[,:;/|])(?=[^\s\d,:;/|])|(?<=\s)(?=\S)", text) if piece]
