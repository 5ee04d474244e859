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
@click.option("--out", type=click.Path(path_type=Path), default="report.md", show_default=True)
@console.overwrite_option
@click.option(
    "--against",
    type=Spec(),
    metavar="SPEC",
    default="full",
    show_default=True,
    help="the policy to take differences from",
)
def report(folders, out, overwrite, against):
    """Put the results of several runs of corm eval on one Markdown page, with figures."""
    check_matplotlib()
    write_report(folders, out, against, overwrite)
    show(str(out))
