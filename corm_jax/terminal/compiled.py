"""Compiled programs are kept between commands: JAX's persistent compilation cache, so that a second run starts at once.

They are in ``compiled`` below `corm_jax.files.cache_folder`. Environment variables of JAX have priority:
``JAX_COMPILATION_CACHE_DIR`` names another folder, and with ``JAX_ENABLE_COMPILATION_CACHE=false`` nothing is kept.

JAX writes an entry in place and never replaces it. An entry that was cut short, by a kill or a full disk, would fail to
load in every later command. So new entries are checked, and the oldest ones removed, when the next command begins.
"""

import contextlib
import os
import platform
import time
import warnings
import zlib
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import jax

from corm_jax.files import cache_folder

SHORTEST = 0.1
"""A program is kept if it takes at least this many seconds to compile."""

LARGEST = 2**29
"""The most bytes of all kept programs together."""


def keep() -> None:
    """Keeps programs compiled from now on, unless JAX's environment variables are set or the folder cannot be used."""
    if {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"} & os.environ.keys():
        return
    try:
        folder = cache_folder() / "compiled" / _machine()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tidy(folder)
    except (OSError, RuntimeError):  # the latter if there is no home directory
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    # An entry that cannot be read or written only costs time.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def tidy(folder: Path) -> None:
    """Removes entries that were cut short, and the oldest ones until at most `LARGEST` bytes are left.

    Raises:
      OSError: if the folder cannot be written to.
    """
    mark, now = folder / "looked-through", time.time()
    since = mark.stat().st_mtime if mark.exists() else 0.0
    found = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process may have removed it
            state = path.stat()
            if state.st_mtime >= since and not is_complete(path):
                path.unlink()
            else:
                found.append((max(state.st_atime, state.st_mtime), state.st_size, path))
    size = sum(bytes_ for _, bytes_, _ in found)
    for _, bytes_, path in sorted(found):
        if size <= LARGEST:
            break
        path.unlink(missing_ok=True)
        size -= bytes_
    mark.touch()
    os.utime(mark, (now, now))


def is_complete(path: Path) -> bool:
    """Whether an entry can be unpacked."""
    content = path.read_bytes()
    try:
        if content.startswith(b"\x28\xb5\x2f\xfd"):  # Zstandard, if JAX found it
            import_module("zstandard").ZstdDecompressor().decompress(content)
        else:
            zlib.decompress(content)
    except ModuleNotFoundError:
        return True
    except Exception:  # of either library
        return False
    return True


def _machine() -> str:
    """A name for machines that run the same programs: different machines may share a home directory."""
    about = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        about += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return sha256("\n".join(about).encode()).hexdigest()[:12]
