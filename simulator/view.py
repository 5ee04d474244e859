"""``corm view``: what policies keep of a trace, as a page for a browser."""

from pathlib import Path

from corm_jax.errors import CormError
from corm_jax.files import check_new, deliver
from corm_jax.terminal import console
from corm_jax.terminal.console import COUNT
from corm_jax.terminal.tables import mib, show
from corm_jax.traces.trace import Trace
from simulator import viewer
from simulator.cli import Job, bar, fidelity_option, layers_of, policies_option, replay_options

# isort: split
import click  # after the console, which says how to install it


@click.command("view", cls=console.Command)
@click.argument("path", metavar="TRACE", type=click.Path(path_type=Path))
@policies_option
@click.option(
    "--out", type=click.Path(path_type=Path), default="view.html", show_default=True, help="the HTML file to write"
)
@console.overwrite_option
@click.option("--tokens", type=COUNT, help=f"how many tokens to show  [default: at most {viewer.TOKENS:,}]")
@click.option("--layers", metavar="N,N,...", help=f"layers to show, from 0  [default: up to {viewer.HEADS:,} heads]")
@replay_options
@fidelity_option
def view(path, specs, out, overwrite, tokens, layers, fidelity, **how):
    """Make a page that shows which tokens of a TRACE each policy keeps, and when it evicts the others.

    The page is one file that a browser opens from the disk, without a network. TRACE is a directory that corm record
    made. With two --policy options, the page shows the two policies side by side.
    """
    if len(specs := list(dict.fromkeys(specs))) > 2:
        raise CormError(f"--policy is given {len(specs)} times, and a page shows at most two policies: leave some out")
    check_new({"--out": out}, overwrite)
    trace = Trace.open(path)
    chosen = layers_of(layers)
    with console.naming({"--layers": layers, "--tokens": tokens}):
        shown = viewer.part(trace, chosen, tokens)
    options = {"fidelity": fidelity, **how}
    job = Job(shown.trace, shown.layers, options, {}, None, overwrite, program="corm")
    replays = {spec: job.replay(spec, policy, errors=False)[0] for spec, policy in job.policies(specs).items()}
    with bar("strongest queries", len(shown.layers)) as progress:
        found = viewer.strongest(shown.trace, progress)
    content = viewer.page(shown, replays, found, options).encode()
    deliver(out, lambda place: place.write_bytes(content), overwrite)
    for sentence in shown.left_out:
        show(sentence)
    show(f"{out}: {job.title}, {mib(len(content))} MiB. Open it in a browser.")
