"""What a machine has, asked before the work: memory, before anything of that size is allocated, and matplotlib."""

import contextlib
import os
from importlib.util import find_spec
from pathlib import Path

import jax

from corm_jax.errors import CormError

GIB = 2**30


def memory() -> int:
    """Bytes of the first device: of an accelerator what JAX may use, else the machine's, or the container's, memory."""
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
    """Raises if ``need`` bytes are more than there are: the least that ``what`` takes, and ``way_out`` takes less."""
    if need > (there := memory()):
        raise CormError(f"{what} take at least {need / GIB:,.1f} GiB, there are {there / GIB:,.1f}: {way_out}")


def check_matplotlib() -> None:
    """Raises unless pictures can be drawn: asked before long work, not after."""
    if find_spec("matplotlib") is None:
        raise CormError("matplotlib is not installed: pip install 'corm-jax[plots]'")
