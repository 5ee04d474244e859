"""The options about caches, such as ``--capacity`` and ``--layout``, and a check that the memory suffices for them."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax

from corm_jax.core.arrays import ENDLESS
from corm_jax.core.capacity import capacities, slots_for
from corm_jax.core.policy import Policy
from corm_jax.core.prompt import check_prompt
from corm_jax.core.types import Capacity
from corm_jax.errors import CormError
from corm_jax.model.decoder import Decoder, make_caches, policies_of, windows_of
from corm_jax.policies.plan import Plan
from corm_jax.terminal import console
from corm_jax.terminal.console import COUNT, Whole, naming
from corm_jax.terminal.limits import check_memory


class Slots(Whole):
    """The value of ``--capacity``: a number of slots, or the file of a plan."""

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
        help="slots of a key-value head, or the file of a plan  [default: as many as can be needed]",
    ),
    click.option(
        "--layout",
        type=click.Choice(["rectangular", "pooled"]),
        default="rectangular",
        show_default=True,
        help="each head has its own slots, or the heads of a layer share a pool of slots",
    ),
    click.option("--chunk", type=COUNT, default=1, show_default=True, help="tokens between two evictions; 1 is exact"),
    click.option(
        "--overflow",
        type=click.Choice(["evict", "error"]),
        default="evict",
        show_default=True,
        help="if no slot is free, evict the key with the lowest score, or stop with an error",
    ),
)


class Sizes(NamedTuple):
    """The sizes of caches that ``--capacity`` and ``--layout`` give.

    Attributes:
      capacity: slots of a head, the same for every policy; or None.
      plan: the slots of one policy. Every other policy gets as many slots as it can need.
      stores: 1 for pools, None if each head has its own slots.
    """

    capacity: int | None
    plan: Plan | None
    stores: int | None

    @classmethod
    def of(
        cls, capacity: int | Path | None, layout: str, chunk: int, specs: Sequence[str], tokens: int | None
    ) -> "Sizes":
        """The sizes that the options give.

        Raises:
          CormError: for a plan that cannot be read, that is for none of the policies or for another chunk, or without
            ``--layout pooled``.
        """
        if not isinstance(capacity, Path):
            return cls(capacity, None, 1 if layout == "pooled" else None)
        with naming({"--capacity": capacity}):
            plan = Plan.load(capacity)
        if layout != "pooled":
            raise CormError(f"the plan {capacity} is for pools: add --layout pooled")
        if not any(plan.is_for(spec) for spec in specs):
            raise CormError(f"the plan {capacity} is for --policy {plan.policy}, which is not among the policies given")
        if plan.chunk != chunk:
            raise CormError(
                f"the plan {capacity} is for --chunk {plan.chunk}, not {chunk}: use that chunk, or make another plan"
            )
        if tokens and tokens > plan.tokens:
            note = f"the plan was made for {plan.tokens:,} tokens: with {tokens:,}, slots may run out"
            print(f"corm: note: {note}", file=sys.stderr)
        return cls(None, plan, stores=1)

    def of_spec(self, spec: str) -> Capacity | None:
        """The capacity for one policy."""
        return self.plan.capacity if self.plan and self.plan.is_for(spec) else self.capacity

    def check(self, model: str, config: Any) -> None:
        """Raises if there is a plan that is for another model."""
        if self.plan:
            self.plan.check(model, config)

    def check_slots(self, spec: str, policy: Policy, tokens: int, chunk: int, prompt: int | None = None) -> None:
        """Raises for a capacity that is impossible, before the model is loaded.

        A plan has a number for each layer, also for local ones, where it has no effect: `check_memory` looks at it.
        """
        if not self.plan:
            with naming({"--policy": spec, "--capacity": self.capacity}):
                slots = slots_for(policy, self.of_spec(spec), tokens, chunk)
                if prompt:
                    check_prompt(policy, slots, prompt)

    def check_memory(
        self,
        network: Decoder,
        spec: str,
        policy: Policy,
        tokens: int,
        chunk: int,
        option: str,
        prompt: int | None = None,
    ) -> None:
        """Raises unless the caches for this many tokens are possible and fit into memory.

        Args:
          option: the one to lower if there are too many tokens.
        """
        if tokens > ENDLESS:
            raise CormError(f"{tokens:,} tokens are more than the {ENDLESS:,} that the clock can count: lower {option}")
        fewer = f"lower {option}" if self.of_spec(spec) is None else "lower --capacity"
        with naming({"--policy": spec, "--capacity": self.capacity}):
            capacity = slots_for(policy, self.of_spec(spec), tokens, chunk, windows_of(network.config))
            if prompt:
                check_prompt(policies_of(network, policy), capacity, prompt)
            check_reading(network, policy, capacity, tokens, chunk, stores=self.stores, fewer=fewer)


def check_reading(
    model: Decoder, policy: Policy, capacity: Capacity, tokens: int, chunk: int, *, stores: int | None, fewer: str
) -> None:
    """Raises unless caches of this capacity, and chunks of this many tokens, fit into memory.

    Args:
      policy, capacity, tokens, stores: as for `corm_jax.make_caches`, for one sequence.
      chunk: tokens between two evictions. Each takes memory for its logits and for its attention to all slots.
      fewer: the way out if there are too many slots, for the error.

    Raises:
      CormError: with the memory that is needed and the memory that there is.
    """
    config = model.config
    make = partial(make_caches, model, policy, batch=1, capacity=capacity, stores=stores, tokens=tokens, chunk=chunk)
    caches = jax.eval_shape(make)
    slots = max(capacities(caches))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in (*jax.tree.leaves(caches), *jax.tree.leaves(model)))
    check_memory(size, f"the model and caches of {slots:,} slots a head", fewer)
    need = 4 * chunk * (config.vocab + config.heads * slots)
    check_memory(size + need, f"chunks of {chunk:,} tokens", "choose a smaller --chunk")
