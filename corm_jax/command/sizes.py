"""The options about caches, ``--capacity`` and ``--layout`` among them, and whether memory holds what they ask for."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax

from corm_jax.core.arrays import ENDLESS
from corm_jax.core.capacity import per_layer_capacity, slots_for
from corm_jax.core.policy import Policy
from corm_jax.core.types import Capacity
from corm_jax.errors import CormError
from corm_jax.model.decoder import Decoder, make_caches
from corm_jax.policies.plan import Plan
from corm_jax.terminal import console
from corm_jax.terminal.console import COUNT, Whole, naming
from corm_jax.terminal.limits import check_memory


class Slots(Whole):
    """What ``--capacity`` takes: a number, or the file of a plan."""

    name = "slots"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As for all types of click."""
        if isinstance(value, str) and not value.lstrip("+-").isdecimal():
            if os.path.lexists(value):
                return Path(value)
            self.fail(f"{value!r} is neither a number of slots nor the file of a plan", param, ctx)
        return super().convert(value, param, ctx)


cache_options = console.options(
    click.option(
        "--capacity",
        type=Slots(1),
        metavar="SLOTS",
        help="slots a key-value head, or a plan  [default: all that could be needed]",
    ),
    click.option(
        "--layout",
        type=click.Choice(["rectangular", "pooled"]),
        default="rectangular",
        show_default=True,
        help="each head its own slots, or a pool for each layer",
    ),
    click.option("--chunk", type=COUNT, default=1, show_default=True, help="tokens between evictions; 1 is exact"),
    click.option(
        "--overflow",
        type=click.Choice(["evict", "error"]),
        default="evict",
        show_default=True,
        help="without a free slot: the key that the policy scores lowest is evicted, or stop",
    ),
)


class Sizes(NamedTuple):
    """What ``--capacity`` and ``--layout`` ask for.

    Attributes:
      capacity: slots a head, of whatever policy; or None.
      plan: for the one policy that it is for; the others get what they could need.
      stores: 1 for pools, None for rectangles.
    """

    capacity: int | None
    plan: Plan | None
    stores: int | None

    @classmethod
    def of(
        cls, capacity: int | Path | None, layout: str, chunk: int, specs: Sequence[str], tokens: int | None
    ) -> "Sizes":
        """Raises for what cannot be, or is of no use to any of the policies."""
        if not isinstance(capacity, Path):
            return cls(capacity, None, 1 if layout == "pooled" else None)
        with naming({"--capacity": capacity}):
            plan = Plan.load(capacity)
        if layout != "pooled":
            raise CormError(f"the plan {capacity} is for pools: add --layout pooled")
        if not any(plan.is_for(spec) for spec in specs):
            raise CormError(f"the plan {capacity} is for --policy {plan.policy}, which is not among those asked for")
        if plan.chunk != chunk:
            raise CormError(f"the plan {capacity} is for --chunk {plan.chunk}, not {chunk}: use that, or make another")
        if tokens and tokens > plan.tokens:
            note = f"the plan was made on {plan.tokens:,} tokens: {tokens:,} may overflow"
            print(f"corm: note: {note}", file=sys.stderr)
        return cls(None, plan, stores=1)

    def of_spec(self, spec: str) -> Capacity | None:
        """The capacity for one policy."""
        return self.plan.capacity if self.plan and self.plan.is_for(spec) else self.capacity

    def check(self, model: str, config: Any) -> None:
        """Raises if there is a plan, and it is for another model."""
        if self.plan:
            self.plan.check(model, config)

    def check_memory(self, network: Decoder, spec: str, policy: Policy, tokens: int, chunk: int, option: str) -> None:
        """Raises unless the caches for so many tokens, which ``option`` says, can fit into memory."""
        if tokens > ENDLESS:
            raise CormError(f"{tokens:,} tokens are beyond {ENDLESS:,}, where the clock ends: lower {option}")
        capacity = slots_for(policy, self.of_spec(spec), tokens, chunk)
        fewer = f"lower {option}" if self.of_spec(spec) is None else "lower --capacity"
        with naming({"--policy": spec, "--capacity": self.capacity}):
            check_reading(network, policy, capacity, chunk, stores=self.stores, fewer=fewer)


def check_reading(
    model: Decoder, policy: Policy, capacity: Capacity, chunk: int, *, stores: int | None = None, fewer: str
) -> None:
    """Raises if caches of so many slots, or chunks of so many tokens, cannot fit into memory.

    Args:
      capacity, stores, policy: as for `corm_jax.make_caches`, for one sequence.
      chunk: tokens between evictions: each takes its logits over the vocabulary, and its attention to all slots.
      fewer: what to do if there are too many slots.

    Raises:
      CormError: names the bytes.
    """
    config = model.config
    # Bytes are all that matters here: with one token to read, no policy protects more than there are slots.
    make = partial(make_caches, model, policy, batch=1, capacity=capacity, stores=stores, tokens=1)
    caches = jax.eval_shape(make)
    slots = max(per_layer_capacity(capacity, config.layers))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in (*jax.tree.leaves(caches), *jax.tree.leaves(model)))
    check_memory(size, f"the model and caches of {slots:,} slots a head", fewer)
    need = 4 * chunk * (config.vocab + config.heads * slots)
    check_memory(size + need, f"chunks of {chunk:,} tokens", "choose a smaller --chunk")
