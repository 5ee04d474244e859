"""``corm report``: the results of several runs of ``corm eval`` on one page."""

from pathlib import Path

import click

from corm_jax.evaluation.report import report as write_report
from corm_jax.terminal import console
from corm_jax.terminal.console import Spec
from corm_jax.terminal.limits import check_matplotlib
from corm_jax.terminal.tables import show


@click.command("report", cls=console.Command)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="report.md",
    show_default=True,
    help="the Markdown page to write; its figures are written beside it",
)
@console.overwrite_option
@click.option(
    "--against",
    type=Spec(),
    metavar="SPEC",
    default="full",
    show_default=True,
    help="the policy with which the others are compared",
)
def report(folders, out, overwrite, against):
    """Put the results of several runs of corm eval on one Markdown page, with figures.

    FOLDERS are the directories that corm eval wrote (--out).
    """
    check_matplotlib()
    write_report(folders, out, against, overwrite)
    show(str(out))
