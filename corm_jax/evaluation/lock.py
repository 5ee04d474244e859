"""One writer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from corm_jax.errors import CormError


@contextmanager
def only_writer(lock: Path, what: str, way_out: str) -> Iterator[None]:
    """Holds a lock while a block runs. The operating system gives it back when a process ends, even when it is killed.

    Args:
      lock: a file of its own for the lock; it is removed at the end, and one that a kill left behind does not matter.
      what: what is written, for the error.
      way_out: what else the user can do.

    Raises:
      CormError: if another process holds the lock, or there can be none.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise CormError(f"another process writes to {what}: wait until it has ended, or {way_out}") from None
    except (OSError, NotImplementedError) as error:
        raise CormError(f"cannot lock {lock}: {getattr(error, 'strerror', None) or error}: {way_out}") from None
    try:
        yield
    finally:
        with suppress(OSError):  # an open file cannot be removed on Windows
            lock.unlink()  # before it is released: a process that has opened it sees that it is gone
        held.release()
