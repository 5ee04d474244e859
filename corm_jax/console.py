"""What command lines share: tables, progress bars, errors in one line, and the options that choose a model."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from corm_jax.errors import CormError
from corm_jax.policies import keeps_everything

try:
    import click
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
except ModuleNotFoundError as error:
    sys.exit(f"corm: {error.name} is not installed: pip install 'corm-jax[cli]'")


DTYPES = ("float32", "bfloat16")


def options(*several: Callable) -> Callable:
    """Options that go together, as one decorator."""

    def decorate(command):
        for option in reversed(several):
            command = option(command)
        return command

    return decorate


model_options = options(
    click.option("--model", default="smollm2-135m", show_default=True, help="name, directory, .gguf or hub id"),
    click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True),
)


def run(command: click.Group, name: str) -> NoReturn:
    """Runs a command line. What the user can put right ends in one line that starts with ``name``, and exit code 2."""
    try:
        sys.exit(command(standalone_mode=False))
    except (CormError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def note_budgets(specs: Sequence[str], program: str = "corm") -> None:
    """Says so on standard error if some of the policies only rank keys and have no budget: nothing is evicted."""
    if found := [spec for spec in dict.fromkeys(specs) if keeps_everything(spec)]:
        have, example = "has" if len(found) == 1 else "have", found[0] + (":" if ":" not in found[0] else ",")
        print(
            f"{program}: note: {', '.join(found)} {have} no budget, so that every key stays: add one, as in "
            f"{example}budget=512 or {example}budget=0.25",
            file=sys.stderr,
        )


def output() -> Console:
    """Where tables are printed: wide, unless a terminal says otherwise."""
    return Console(width=None if sys.stdout.isatty() else 160)


def progress_bar() -> Progress:
    """A bar on standard error that goes when it is done; none where nobody watches."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
