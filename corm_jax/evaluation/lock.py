"""A lock that allows one writer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from corm_jax.errors import CormError


@contextmanager
def only_writer(lock: Path, what: str, way_out: str) -> Iterator[None]:
    """Holds a lock while a block runs. The operating system releases it when the process ends, even if it is killed.

    Args:
      lock: a file that is only for the lock. It is removed at the end; a file that is left by a kill does no harm.
      what: what is written, for the error.
      way_out: what else the user can do, for the error.

    Raises:
      CormError: if another process holds the lock, or no lock can be made.
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
            lock.unlink()  # before the release: a process that has opened it sees that it was removed
        held.release()
