"""Every command that the documentation shows can be typed: the command, its options and its policies exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from corm_jax import parse
from corm_jax.command.cli import corm
from simulator.cli import simulator

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")} - {ROOT / "CHANGELOG.md"})  # it tells of the past
BLOCK = re.compile(r"^```(?:bash|console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:corm|python -m simulator) [^`]+)`")


def commands(text):
    """The arguments of each call of `corm` or of the simulator, in blocks of shell code and in the text."""
    blocks = BLOCK.findall(text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(one.split()) for one in INLINE.findall(BLOCK.sub("", text))]
    for line in lines:
        for words in pieces(shlex.split(line.replace(";", " && "), comments=True)):
            names = [Path(word).name for word in words]
            if names[:1] == ["corm"]:
                yield corm, words[1:]
            elif names[1:3] == ["-m", "simulator"] and names[0].startswith("python"):
                yield simulator, words[3:]


def pieces(words):
    """The commands of a line."""
    if "&&" in words:
        at = words.index("&&")
        return [words[:at], *pieces(words[at + 1 :])]
    return [words]


def check(group, words):
    """Raises for a command or an option that does not exist."""
    command, names = group, []
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            break
        names, context = [*names, words[0]], click.Context(command)
        command = command.get_command(context, words[0])
        assert command, f"{' '.join(names)} does not exist"
        words = words[1:]
    try:
        given, _, _ = command.make_parser(click.Context(command)).parse_args(list(words))
    except click.NoSuchOption:
        raise
    except click.BadOptionUsage:  # the text names an option without its value
        return
    for name in ("policy", "policies", "specs"):
        specs = given.get(name) or ()
        for spec in [specs] if isinstance(specs, str) else specs:
            if not re.search(r"profile=|\bSPEC\b|[<>{]|:.*\(|\.\.\.|:[A-Z]|^[A-Z]", spec):  # of the reader
                parse(spec)


FOUND = [
    pytest.param(group, words, id=f"{path.relative_to(ROOT)}-{group.name}-{'_'.join(words)[:60]}")
    for path in PAGES
    for group, words in commands(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("group", "words"), FOUND)
def test_a_command_exists(group, words):
    if "..." not in words:
        check(group, words)


def test_what_does_not_exist_is_found():
    assert len(FOUND) > 20
    text = "```bash\npython3 -m venv .venv && .venv/bin/corm compare --budgett 3 \\\n  --policy full  # so\n```\n"
    ((group, words),) = commands(text)
    assert (group, words) == (corm, ["compare", "--budgett", "3", "--policy", "full"])
    with pytest.raises(click.NoSuchOption):
        check(group, words)
    with pytest.raises(Exception, match="unknown policy"):
        check(corm, ["compare", "--policy", "fulll"])
    with pytest.raises(AssertionError, match="confer does not exist"):
        check(corm, ["confer"])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    named = re.findall(r"(?<![\w./])((?:benchmarks|\.ci|tests)/[\w./]*\w)(?![\w*])", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []
