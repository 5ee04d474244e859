"""How a command stops at once, with one line and the right exit code, when it is interrupted or terminated.

A signal raises `Stopped` in the main thread, so that files and progress bars are closed. That is not enough. While XLA
computes, Python may not get to run for a long time, and an exception that is raised inside a callback is lost: so a
thread waits for the signal too, and ends the process after `GRACE` seconds. And when the interpreter shuts down in its
orderly way while XLA still compiles, the compiler's threads use devices that are destroyed already (SIGSEGV): so an
interrupted process ends by `os._exit`.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

GRACE = 2.0
"""Seconds in which the main thread may close what it has open."""

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

_leaving = threading.Lock()


class Stopped(BaseException):
    """A signal asks the process to end. No `KeyboardInterrupt`, which libraries catch."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def stoppable(name: str) -> Iterator[None]:
    """Ends the process if it is interrupted or terminated inside the block, with a line that starts with ``name``.

    What is ignored, as under nohup, stays ignored. After the block signals end the process without a word: there is
    nothing left to do but the interpreter's shutdown.
    """
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(name, read), daemon=True).start()
    try:
        for number in numbers:
            signal.signal(number, _stop)
        yield
    except Stopped as stopped:
        leave(name, stopped.number)
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(woken)
        os.close(write)


def leave(name: str, number: int) -> NoReturn:
    """Says why, and ends the process without the interpreter's own shutdown."""
    first = _leaving.acquire(timeout=1)
    try:
        if first:
            with suppress(Exception):
                sys.stdout.flush()
            with suppress(Exception):
                line = "\n" if sys.stderr.isatty() else ""  # the terminal shows ^C
                print(f"{line}{name}: {SIGNALS[signal.Signals(number)]}", file=sys.stderr, flush=True)
        os._exit(128 + number)
    finally:
        if first:
            _leaving.release()


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped(number)


def _watch(name: str, read: int) -> None:
    with open(read, "rb", buffering=0) as signals:
        while byte := signals.read(1):
            if byte[0] in SIGNALS:
                time.sleep(GRACE)
                leave(name, byte[0])
