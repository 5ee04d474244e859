"""Tables for terminals of any width, in which nothing is cut off.

In a wide terminal, a table has one line for each row. In a narrower one, text is folded after commas and colons. In a
still narrower one, the text of a row is printed above its numbers; and in the narrowest, every number has its own line.
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
"""The space between columns."""

WORD = 24
"""A text column is at least as wide as its longest word, up to this many cells. Longer words are broken."""

PLAIN = {"─": "-", "Δ": "d"}
"""Replacements of characters in tables, for encodings that lack them."""

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
    """Prints a table that fits the terminal, or 80 columns if there is no terminal.

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
    """Prints text. Characters of `PLAIN` that the encoding lacks are replaced, and control characters are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for sign, letters in PLAIN.items():
        try:
            sign.encode(encoding)
        except UnicodeEncodeError:
            text = text.replace(sign, letters)
    print(CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


def mib(size: int) -> str:
    """Bytes in MiB, with one decimal, or, if that is less than 1, with three significant digits.

    >>> mib(94371840), mib(12288), mib(0)
    ('90.0', '0.0117', '0')
    """
    number = size / 2**20
    return f"{number:.1f}" if number >= 1 else f"{number:.3g}"


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
    """Lines with the text of each row, folded if needed, beside its numbers. Empty if that is too wide."""
    headings = [column.heading for column in columns]
    cells = [[*heading.split("\n"), *(row[i] for row in rows)] for i, heading in enumerate(headings)]
    natural = [max(map(cell_len, each)) for each in cells]
    words = [max((cell_len(piece.rstrip()) for cell in each for piece in _pieces(cell)), default=0) for each in cells]
    sizes = [n if column.number else min(w, WORD) for column, n, w in zip(columns, natural, words, strict=True)]
    left = width - sum(sizes) - len(GAP) * (len(sizes) - 1)
    if left < 0:
        return []
    wants = sorted((n - size, i) for i, (n, size) in enumerate(zip(natural, sizes, strict=True)))
    for rank, (want, i) in enumerate(wants):  # columns that need the least come first and leave the rest to the others
        given = min(want, left // (len(wants) - rank))
        sizes[i], left = sizes[i] + given, left - given

    def lines(row: Sequence[str]) -> list[str]:
        folded = [[y for x in cell.split("\n") for y in fold(x, size)] for cell, size in zip(row, sizes, strict=True)]
        height = max(map(len, folded))
        if row is headings:  # aligned to the rule below them
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
    """Lines with the text of each row above its numbers. Empty if the numbers alone are too wide."""

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
    """Lines with one cell each, row by row. Each cell but the first of a row follows the heading of its column."""
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
    """The pieces between which a line may end: after blanks and separators, but not inside a number such as 1,024."""
    return [piece for piece in re.split(r"(?<=[,:;/|])(?=[^\s\d,:;/|])|(?<=\s)(?=\S)", text) if piece]
