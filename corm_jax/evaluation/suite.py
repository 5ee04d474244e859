"""Runs policies on examples, with a given budget, and writes the results into `Records`, row by row."""

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
    """An example of any task."""

    @property
    def id(self) -> str:
        """Unique in a run."""
        ...

    @property
    def task(self) -> str:
        """The task to which the example belongs; rows are compared within a task."""
        ...

    @property
    def prompt(self) -> list[int]:
        """The token ids that are read first."""
        ...


@dataclasses.dataclass
class Suite:
    """Policies with a budget.

    Attributes:
      budget: of the prompt, as in `keys_of`; None leaves the policies as they are.
      chunk: tokens between evictions.
    """

    model: Decoder
    specs: Sequence[str]
    budget: str | None
    chunk: int
    windows: dict[str, str] = dataclasses.field(default_factory=dict)

    def of(self, spec: str, prompt: Sequence[int], first: Sequence[int]) -> str:
        """A SPEC with the budget for a prompt. CORM without a window gets one that fits the ``first`` prompt."""
        if self.budget is None:
            return spec
        if spec in self.windows:
            return self.windows[spec]
        # A window depends on the first prompt alone, so that it is the same when a run is continued.
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
        """Scores every example with every policy, example by example, unless the result is in the records already.

        Args:
          score: scores a policy on an example. Its third argument is the same policy with the budget for the longest
            prompt, which determines the cache's capacity, so that all prompts share a compiled program.
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
    """The columns of a row that describe how full the caches are."""
    return {
        "kept": usage.kept,
        "live_bytes": usage.bytes_live,
        "allocated_bytes": usage.bytes_allocated,
        "full_bytes": usage.bytes_full,
        "overflow": int(usage.overflow.sum()),
    }


def surroundings(model: Decoder, data: Mapping[str, str | bytes]) -> dict[str, Any]:
    """Everything else that determines a result: versions, the device, and checksums of the weights and the data."""
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
    """The checksum of texts or bytes, one after the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8") if isinstance(part, str) else part)
    return found.hexdigest()[:16]
