"""Tables on terminals of any width: no number is cut, no text is lost."""

import io
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from corm_jax.terminal import tables
from corm_jax.terminal.tables import Column, fold, show, table

NUMBERS = st.one_of(
    st.integers(0, 10**9).map(str),
    st.floats(-1e4, 1e4).map("{:+.4f}".format),
    st.integers(0, 10**7).map("{:,}".format),
    st.tuples(st.floats(0, 99), st.floats(0, 99), st.floats(0, 99)).map(lambda x: "{:.3f} [{:.3f}, {:.3f}]".format(*x)),
)
FIRST, SECOND = (st.text(letters + ",:=/-_", min_size=1, max_size=70) for letters in ("abcdefgé猫", "uvwxyz 💾"))


@st.composite
def tables_of_two_texts(draw):
    """Headings in capitals, texts of two alphabets, and numbers."""
    count = draw(st.integers(1, 12))
    heading = st.sampled_from(["NLL", "KEPT\nMEAN", "OVER-\nFLOW", "A RATHER LONG HEADING", "Δ"])
    columns = [Column("POLICY"), Column("TASK"), *(Column(draw(heading), number=True) for _ in range(count))]
    row = st.tuples(FIRST, SECOND, *(NUMBERS for _ in range(count)))
    return columns, draw(st.lists(row, min_size=1, max_size=4))


@given(tables_of_two_texts(), st.integers(20, 200))
def test_every_cell_is_there_whole_at_every_width(made, width):
    columns, rows = made
    lines = table(columns, rows, width)
    text = "".join(lines)
    for cells, letters in (([row[0] for row in rows], "abcdefgé猫"), ([row[1] for row in rows], "uvwxyz💾")):
        assert [c for c in text if c in letters] == [c for cell in cells for c in cell if c in letters]
    numbers = [one for line in lines for one in re.findall(r"[+-]?\[?\d[\d,.]*[\],]?", line)]
    assert numbers == [one for row in rows for cell in row[2:] for one in cell.split()]
    for line in lines:
        assert cell_len(line) <= width or re.fullmatch(r"\S+", line.strip())  # nothing but a number is wider
        assert line == line.rstrip()


@given(tables_of_two_texts())
def test_two_rows_that_differ_look_different(made):
    """As many columns as numbers and a word take are enough to tell policies apart in full."""
    columns, rows = made
    lines = table(columns, [("h2o:budget=1", "x", *rows[0][2:]), ("h2o:budget=2", "x", *rows[0][2:])], 40)
    text = re.sub(r"\s", "", "".join(lines))
    assert "budget=1" in text
    assert "budget=2" in text


def test_the_main_table_at_80_columns():
    names = "NLL", "PPL", "Δ NLL", "kept", "kept\nmean", "live\nMiB", "alloc.\nMiB", "full\nMiB", "over-\nflow", "s"
    columns = [Column("policy"), *(Column(name, number=True) for name in names)]
    numbers = ("2.5030", "12.22", "+0.0278", "0.510", "0.725", "45.9", "91.4", "90.0", "138240", "12.3")
    lines = table(columns, [("full", *numbers), ("corm:window=256,recent=256", *numbers)], 80)
    assert lines == [
        "policy",
        "                                  kept  live  alloc.  full   over-",
        "     NLL    PPL    Δ NLL   kept   mean   MiB     MiB   MiB    flow     s",
        "  ──────────────────────────────────────────────────────────────────────",
        "full",
        "  2.5030  12.22  +0.0278  0.510  0.725  45.9    91.4  90.0  138240  12.3",
        "corm:window=256,recent=256",
        "  2.5030  12.22  +0.0278  0.510  0.725  45.9    91.4  90.0  138240  12.3",
    ]


@given(st.text(max_size=80), st.integers(2, 40))
def test_folding_loses_nothing_but_blanks(text, width):
    lines = fold(text, width)
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
    assert all(cell_len(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("encoding", "printed"), [("utf-8", "Δ ─ 猫\n"), ("ascii", "d - \\u732b\n"), ("latin-1", "d - \\u732b\n")]
)
def test_encodings_that_lack_our_signs(monkeypatch, encoding, printed):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    show("Δ ─ 猫")
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == printed


def test_control_characters_do_not_reach_the_terminal(capsys):
    show("a\x1b[31mb\x07\tc\nd")
    assert capsys.readouterr().out == "a\\x1b[31mb\\x07\\tc\nd\n"


def test_a_table_without_a_terminal_has_80_columns(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    tables.print_table([Column("what"), Column("n", number=True)], [("word " * 40, "1")], title="title " * 30)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) in range(70, 81)
    monkeypatch.setenv("COLUMNS", "33")
    tables.print_table([Column("what"), Column("n", number=True)], [("word " * 40, "1")], title="title " * 30)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 33
