"""Checks of the machine before the work begins: whether there is enough memory, and whether there is matplotlib."""

import contextlib
import os
from importlib.util import find_spec
from pathlib import Path

import jax

from corm_jax.errors import CormError

GIB = 2**30


def memory() -> int:
    """Bytes of memory: on an accelerator those that JAX may use, otherwise those of the machine or its container."""
    if limit := (jax.devices()[0].memory_stats() or {}).get("bytes_limit"):
        return limit
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(path).read_text()))
    return min(found, default=2**63)


def check_memory(need: int, what: str, way_out: str) -> None:
    """Raises if there are fewer bytes than ``need``, the least that ``what`` takes; ``way_out`` names the way out."""
    if need > (there := memory()):
        raise CormError(f"{what} take at least {need / GIB:,.1f} GiB, there are {there / GIB:,.1f}: {way_out}")


def check_matplotlib() -> None:
    """Raises unless pictures can be drawn. Called before long work, not after it."""
    if find_spec("matplotlib") is None:
        raise CormError("matplotlib is not installed: pip install 'corm-jax[plots]'")
