"""What a machine can hold, asked before anything of that size is allocated."""

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from corm_jax.core.cache import per_layer_capacity
from corm_jax.core.policy import Policy
from corm_jax.core.types import Capacity
from corm_jax.errors import CormError

if TYPE_CHECKING:  # the simulator does without the model
    from corm_jax.model.llama import Llama

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


def check_reading(
    model: "Llama", policy: Policy, capacity: Capacity, chunk: int, *, stores: int | None = None, fewer: str
) -> None:
    """Raises if caches of so many slots, or chunks of so many tokens, cannot fit into memory.

    Args:
      capacity, stores, policy: as for `Llama.make_caches`, for one sequence.
      chunk: tokens between evictions: each takes its logits over the vocabulary, and its attention to all slots.
      fewer: what to do if there are too many slots.

    Raises:
      CormError: names the bytes.
    """
    config = model.config
    # Bytes are all that matters here: with one token to read, no policy protects more than there are slots.
    make = partial(model.make_caches, policy, batch=1, capacity=capacity, stores=stores, tokens=1)
    caches = jax.eval_shape(make)
    slots = max(per_layer_capacity(capacity, config.layers))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in (*jax.tree.leaves(caches), *jax.tree.leaves(model)))
    check_memory(size, f"the model and caches of {slots:,} slots a head", fewer)
    need = 4 * chunk * (config.vocab + config.heads * slots)
    check_memory(size + need, f"chunks of {chunk:,} tokens", "choose a smaller --chunk")
