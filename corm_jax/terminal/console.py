"""Shared by both command lines: how they run and end, the types of options, and progress on standard error."""

import errno
import functools
import os
import reprlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import jax

from corm_jax.core.policy import Policy
from corm_jax.core.prompt import prompt_of
from corm_jax.errors import CormError
from corm_jax.files import reason
from corm_jax.policies import Notation, keeps_everything, keys_of, parse, too_small
from corm_jax.terminal import compiled
from corm_jax.terminal.stopping import stoppable

try:
    import click
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
except ModuleNotFoundError as error:
    sys.exit(f"corm: {error.name} is not installed: pip install 'corm-jax[cli]'")

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""The settings of all commands."""


class Command(click.Command):
    """A command that prints its help if it has required parameters and is called without any."""

    def __init__(self, *arguments: Any, **options: Any):
        required = any(parameter.required for parameter in options.get("params") or [])
        super().__init__(*arguments, no_args_is_help=required, **options)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


class Whole(click.ParamType):
    """A whole number from ``least`` to ``most``, such as a number of tokens; by default up to the last position."""

    name = "integer"

    def __init__(self, least: int, most: int = 2**31 - 1):
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """As for all types of click."""
        with suppress(ValueError):
            if self.least <= (number := int(value)) <= self.most:
                return number
        self.fail(f"{reprlib.repr(value)} is not a whole number from {self.least} to {self.most}", param, ctx)


class Real(click.ParamType):
    """A number from ``least`` to ``most``, both included."""

    name = "float"

    def __init__(self, least: int | float, most: int | float):
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As for all types of click."""
        with suppress(ValueError):
            if self.least <= (number := float(value)) <= self.most:
                return number
        self.fail(f"{reprlib.repr(value)} is not a number from {self.least:g} to {self.most:g}", param, ctx)


class Spec(click.ParamType):
    """A policy, as `corm_jax.parse` reads it. The option's value is the text."""

    name = "spec"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As for all types of click."""
        try:
            parse(value)
        except CormError as error:
            self.fail(str(error), param, ctx)
        return value


class Budget(click.ParamType):
    """A number or a share of keys, as `corm_jax.policies.keys_of` reads it. The option's value is the text."""

    name = "keys"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As for all types of click."""
        try:
            if len(value) > 40:
                raise CormError(f"a budget must be a number of keys or a share of them, not {reprlib.repr(value)}")
            keys_of(value, 1)
        except CormError as error:
            self.fail(str(error), param, ctx)
        return value


COUNT, SEED = Whole(1), Whole(0)


def options(*several: Callable) -> Callable:
    """Several options as one decorator."""

    def decorate(command):
        for option in reversed(several):
            command = option(command)
        return command

    return decorate


overwrite_option = click.option("--overwrite", is_flag=True, help="replace files that exist; otherwise they are kept")


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        print(f"corm-jax {version('corm-jax')}")
        ctx.exit()


version_option = click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show it and exit."
)


@contextmanager
def naming(given: Mapping[str, Any]) -> Iterator[None]:
    """Errors in the block begin with the options that they are about. ``given``: the value of each; None if not set.

    >>> with naming({"--policy": "full", "--capacity": 3, "--prompt": None}):
    ...     raise CormError("capacity 3 cannot hold a chunk (4 keys): raise the capacity")
    Traceback (most recent call last):
    corm_jax.errors.CormError: --policy full, --capacity: capacity 3 cannot hold a chunk (4 keys): raise the capacity
    """
    try:
        yield
    except CormError as error:
        about = [
            option if str(value) in str(error) else f"{option} {value}"
            for option, value in given.items()
            if value is not None
        ]
        raise type(error)(f"{', '.join(about)}: {error}") from None


def check_prompt(spec: str, policy: Policy, prompt: int | None, tokens: int) -> None:
    """Raises unless ``--prompt`` is valid for the policy of a SPEC and a text of this many tokens."""
    try:
        prompt_of(policy, prompt, tokens)
    except CormError as error:
        if prompt is not None:
            raise CormError(f"--policy {spec}, --prompt {prompt}: {error}") from None
        raise CormError(
            f"--policy {spec} waits for the end of the prompt: say how many of the tokens are the prompt with --prompt"
        ) from None


def run(command: click.Group, name: str, program: str | None = None) -> NoReturn:
    """Runs a command line.

    An error that the user can correct ends in one line that starts with ``name``, and exit code 2; Ctrl-C ends in one
    line, and exit code 130. A pipe that is closed early (``| head``) causes no message.

    Args:
      program: the command as the user types it, if that is not ``name``.
    """
    _open_streams()
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append("")  # for policies of the user's own; last, so that it hides no module that is installed
    with stoppable(name):
        compiled.keep()
        sys.exit(_code(command, name, program or name))


def _code(command: click.Group, name: str, program: str) -> int:
    try:
        code = _invoke(command, program)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CormError(f"cannot write to standard output: {reason(error)}") from None
        return code
    except click.ClickException as error:
        return _complain(name, error.format_message())
    except CormError as error:
        _close(sys.stdout)
        return _complain(name, str(error))
    except (click.Abort, KeyboardInterrupt):
        _complain(name, "interrupted")
        return 130
    except BrokenPipeError:
        _close(sys.stdout)
        return 141
    except OSError as error:
        _close(sys.stdout)
        where = error.filename or ("standard output" if error.errno in (errno.ENOSPC, errno.EIO) else "")
        return _complain(name, f"{where and f'cannot use {where}: '}{reason(error)}")
    except MemoryError as error:
        return _complain(name, f"out of memory: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _complain(name, f"out of memory: {error}: ask for fewer tokens, or a smaller --chunk or --capacity")


def note_budgets(specs: Sequence[str], program: str = "corm") -> None:
    """Prints a note on standard error if policies only score keys and have no budget, so that nothing is evicted."""
    if found := [spec for spec in dict.fromkeys(specs) if keeps_everything(spec)]:
        have, example = "has" if len(found) == 1 else "have", Notation.read(found[0])
        print(
            f"{program}: note: {', '.join(found)} {have} no budget, so that every key stays: add one, as in "
            f"{example.having(budget=512)} or {example.having(budget=0.25)}",
            file=sys.stderr,
        )


def note_small_budgets(specs: Sequence[str], tokens: int, prompt: int | None = None, program: str = "corm") -> None:
    """Prints a note on standard error for each SPEC whose budget is a share that is less than the policy protects.

    Args:
      specs: the policies.
      tokens: the tokens that are read in all.
      prompt: how many of them are the prompt, if that is known.
      program: the name with which the note begins.
    """
    for spec in dict.fromkeys(specs):
        if found := too_small(parse(spec), tokens, prompt):
            given = ", ".join(f"{name}={value}" for name, value in found.options.items())
            lower = f"lower {' or '.join(found.options)}, " if found.options else ""
            kept = "no key is evicted" if found.protected >= found.tokens else f"{found.protected:,} keys stay"
            print(
                f"{program}: note: {spec}: the budget is {found.keys:,} keys of a head after {found.tokens:,} tokens, "
                f"but {found.protected:,} are never evicted{given and f' ({given})'}, so that {kept}: "
                f"{lower}raise the budget, or read more tokens",
                file=sys.stderr,
            )


def _invoke(command: click.Group, program: str) -> int:
    """Click's `main` without its handling of Ctrl-C and closed pipes."""
    try:
        with command.make_context(program, sys.argv[1:]) as context:
            return command.invoke(context) or 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except getattr(click.exceptions, "NoArgsIsHelpError", ()) as error:  # as it is formatted, not in one line
        print(error.format_message())
        return 2


def _complain(name: str, message: str) -> int:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _open_streams() -> None:
    """Output to closed streams is discarded, and characters that the encoding of a stream lacks are escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the number, so that no other file gets it
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _close(stream: Any) -> None:
    """Flushes a stream. If that fails, the rest is discarded, so that the interpreter does not try again."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


FIRST, EVERY = 5.0, 10.0
"""Without a terminal: seconds until the first line of progress, and the least between two lines."""


def progress_bar() -> Progress:
    """Progress on standard error: a bar that disappears when it is done; without a terminal, a line now and then."""
    console = Console(stderr=True)
    bar = console.is_terminal and not console.is_dumb_terminal
    _listen()
    return (Progress if bar else _Lines)(
        _Description("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not bar,
    )


class _Description(TextColumn):
    def render(self, task: Task):
        """The description of the task, and whether XLA is compiling."""
        text = super().render(task)
        return text.append(", compiling") if _compiling() and not task.finished else text


class _Lines(Progress):
    """Progress without a terminal: few lines, and none if the work is short."""

    def start(self) -> None:
        """Starts printing."""
        self._done = threading.Event()
        threading.Thread(target=self._print, daemon=True).start()

    def stop(self) -> None:
        """Stops printing."""
        self._done.set()

    def _print(self) -> None:
        begin, wait = time.monotonic(), FIRST
        while not self._done.wait(wait):
            seconds = time.monotonic() - begin
            wait = max(EVERY, seconds / 10)
            tasks = [task for task in self.tasks if task.visible and not task.finished]
            for task in sorted(tasks, key=lambda task: task.completed == 0)[:1]:
                at = f"{task.completed:,.0f} of {task.total or 0:,.0f}"
                compiling = ", compiling" if _compiling() else ""
                with suppress(OSError):
                    print(f"{task.description}: {at}, {seconds:.0f} s{compiling}", file=sys.stderr, flush=True)


_begun: list[float] = []
"""The time at which XLA began to compile; empty if it does not compile."""


def _compiling() -> bool:
    return any(time.monotonic() - begun > 0.5 for begun in _begun)


@functools.cache
def _listen() -> None:
    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("/jaxpr_to_mlir_module_duration"):
            _begun[:] = [time.monotonic()]
        elif event.endswith("/backend_compile_duration"):
            _begun.clear()

    jax.monitoring.register_event_duration_secs_listener(listen)
