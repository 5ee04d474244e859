"""Runs policies over examples, row by row into `Records`, on whatever budget they are held to."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax.core.policy import Policy
from corm_jax.core.types import Usage
from corm_jax.evaluation.records import Records
from corm_jax.model.decoder import Decoder
from corm_jax.policies import keys_of, lacks_window, parse
from corm_jax.runs.fitting import fitted


@runtime_checkable
class Example(Protocol):
    """What every task has."""

    @property
    def id(self) -> str:
        """Unique in a run."""
        ...

    @property
    def task(self) -> str:
        """What kind of example it is; rows are compared within one."""
        ...

    @property
    def prompt(self) -> list[int]:
        """Token ids of what is read first."""
        ...


@dataclasses.dataclass
class Suite:
    """Policies on a budget.

    Attributes:
      budget: as in `keys_of`, of the prompt; None leaves the policies as they are.
      chunk: tokens between evictions.
    """

    model: Decoder
    specs: Sequence[str]
    budget: str | None
    chunk: int
    windows: dict[str, str] = dataclasses.field(default_factory=dict)

    def of(self, spec: str, prompt: Sequence[int], first: Sequence[int]) -> str:
        """A SPEC on the budget of a prompt. CORM without a window gets the one that fits the ``first`` prompt."""
        if self.budget is None:
            return spec
        if spec in self.windows:
            return self.windows[spec]
        # Nothing but the first prompt decides about a window, so that it is the same wherever a run goes on.
        tokens = len(first if lacks_window(spec) else prompt)
        keys = min(keys_of(self.budget, tokens), tokens)
        found, how = fitted(spec, self.model, first, keys, chunk=self.chunk)
        if how == "searched":
            self.windows[spec] = found
        return found

    def run(
        self,
        records: Records,
        examples: Sequence[Example],
        score: Callable[[Policy, Any, Policy], dict[str, Any]],
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Scores every example with every policy that is not in the records yet, example by example.

        Args:
          score: of a policy and an example; the third argument is the same policy on the budget of the longest prompt,
            after which caches are sized, so that all prompts share a compiled program.
        """
        longest = max((example.prompt for example in examples), key=len)
        for index, example in enumerate(examples):
            for place, spec in enumerate(self.specs):
                if (spec, example.id) not in records:
                    ran = self.of(spec, example.prompt, examples[0].prompt)
                    largest = parse(self.of(spec, longest, examples[0].prompt))
                    found = score(parse(ran), example, largest)
                    records.add({"policy": spec, "example": example.id, "task": example.task, "ran": ran} | found)
                progress(index * len(self.specs) + place + 1)


def memory(usage: Usage) -> dict[str, Any]:
    """The columns of a row that say how full the caches are."""
    return {
        "kept": float(np.asarray(usage.live).mean() / np.asarray(usage.seen).mean()),
        "live_bytes": usage.bytes_live,
        "allocated_bytes": usage.bytes_allocated,
        "full_bytes": usage.bytes_full,
        "overflow": int(usage.overflow.sum()),
    }


def surroundings(model: Decoder, data: Mapping[str, str | bytes]) -> dict[str, Any]:
    """What else decides about a result: versions, the device, the weights, and checksums of the data."""
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(model):
        if jnp.issubdtype(leaf.dtype, jnp.number):  # no states of random numbers
            weights.update(np.asarray(leaf.reshape(-1)[:64]).tobytes())
    return {
        "versions": {name: version(name) for name in ("corm-jax", "jax", "jaxlib", "flax", "numpy")},
        "device": jax.devices()[0].device_kind,
        "weights": weights.hexdigest()[:16],
        "data": {name: checksum(content) for name, content in data.items()},
    }


def checksum(*parts: str | bytes) -> str:
    """Of texts or bytes, one after the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8") if isinstance(part, str) else part)
    return found.hexdigest()[:16]
