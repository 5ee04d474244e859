"""How a command stops at once, with one line and the right exit code, when it is interrupted or terminated.

A signal raises `Stopped` in the main thread, so that files and progress bars are closed. There are three difficulties.
An exception that is raised inside a callback, such as JAX's at a garbage collection, is lost or turned into another
exception: a lost one is raised again. While XLA computes, Python may not run for a long time: so a thread waits for the
signal too, and ends the process after `GRACE` seconds. If the interpreter shuts down in the usual way while XLA
still compiles, the compiler's threads use devices that are already destroyed (SIGSEGV): so an interrupted process ends
by `os._exit`.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

GRACE, STEP = 2.0, 0.1
"""Seconds in which the main thread may close its files, and between checks whether an exception was lost."""

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

SHOW_CURSOR = "\x1b[?25h"

_leaving = threading.Lock()


class Stopped(BaseException):
    """The process was told by a signal to end. It is not a `KeyboardInterrupt`, which libraries catch."""


@contextmanager
def stoppable(name: str) -> Iterator[None]:
    """Ends the process if it is interrupted or terminated inside the block, with a line that starts with ``name``.

    Signals that are ignored, as under nohup, stay ignored. After the block a signal ends the process without a message,
    since only the shutdown of the interpreter is left.
    """
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    raised, lost, hook = list[int](), threading.Event(), sys.unraisablehook

    def stop(number: int, frame: object) -> NoReturn:
        if raised:  # the second signal: no time to close anything
            leave(name, number)
        raised.append(number)
        raise Stopped(number)

    def watch(pipe: int) -> None:
        with open(pipe, "rb", buffering=0) as signals:
            while byte := signals.read(1):
                end = time.monotonic() + GRACE
                while byte[0] in SIGNALS and time.monotonic() < end:
                    time.sleep(STEP)
                    if lost.is_set():
                        lost.clear()
                        raised.clear()
                        signal.pthread_kill(threading.main_thread().ident or 0, byte[0])
                if byte[0] in SIGNALS:
                    leave(name, byte[0])

    def unraisable(found: Any) -> None:
        if isinstance(found.exc_value, Stopped):
            lost.set()
        else:
            hook(found)

    read, write = os.pipe()
    os.set_blocking(write, False)
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=watch, args=(read,), daemon=True).start()
    try:
        sys.unraisablehook = unraisable
        for number in numbers:
            signal.signal(number, stop)
        yield
    except BaseException:
        if raised:
            leave(name, raised[0])
        raise
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(woken)
        sys.unraisablehook = hook
        os.close(write)


def leave(name: str, number: int) -> NoReturn:
    """Prints the reason, and ends the process without the interpreter's shutdown."""
    first = _leaving.acquire(timeout=1)
    try:
        if first:
            with suppress(Exception):
                sys.stdout.flush()
            with suppress(Exception):
                line = f"{SHOW_CURSOR}\n" if sys.stderr.isatty() else ""  # the terminal shows ^C
                print(f"{line}{name}: {SIGNALS[signal.Signals(number)]}", file=sys.stderr, flush=True)
        os._exit(128 + number)
    finally:
        if first:
            _leaving.release()
