"""Plans: how many slots each layer needs. Made from traces by `simulator.planner`, used by the pooled layout."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from corm_jax.errors import CormError
from corm_jax.files import read_fields, write_json
from corm_jax.policies import parse

FORMAT = "corm-jax plan 1"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Pools for one policy in one model.

    Attributes:
      model: its name, as in the traces.
      policy: the SPEC.
      kv_heads, head_dim: the shape of its keys.
      chunk: tokens between evictions.
      tokens: how many each trace has; a longer text may need more.
      overflow: the share of keys that may go for want of a slot.
      capacity: slots a key-value head, on average, of each layer.
    """

    model: str
    policy: str
    kv_heads: int
    head_dim: int
    chunk: int
    tokens: int
    overflow: float
    capacity: tuple[int, ...]

    def __repr__(self) -> str:
        slots = "..".join(dict.fromkeys(map(str, (min(self.capacity), max(self.capacity)))))
        shown = {name: getattr(self, name) for name in ("model", "policy", "kv_heads", "tokens", "chunk", "overflow")}
        parts = [f"{name}={value!r}" for name, value in shown.items()]
        return f"Plan({', '.join(parts)}, layers={len(self.capacity)}, capacity={slots})"

    def save(self, path: Path) -> None:
        """Writes the plan as JSON."""
        write_json(path, {"format": FORMAT} | asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Reads a plan.

        Raises:
          CormError: for a file that is not one, or of which a number cannot be.
        """
        fields: dict[str, Any] = {"model": str, "policy": str, "overflow": (int, float), "capacity": list}
        fields |= dict.fromkeys(("kv_heads", "head_dim", "chunk", "tokens"), int)
        found = read_fields(path, "plan", FORMAT, fields, "python -m simulator plan")
        for layer, slots in enumerate(found["capacity"]):
            if not isinstance(slots, int) or slots < 1:
                raise CormError(f"the plan {path} gives layer {layer} {slots!r} slots a head: it takes at least 1")
        found["capacity"] = tuple(found["capacity"])
        return cls(**found)

    def check(self, model: str, config: Any) -> None:
        """Raises unless the plan is for this model, a name and a `corm_jax.Config`."""
        shape = len(self.capacity), self.kv_heads, self.head_dim
        if shape != (config.layers, config.kv_heads, config.head_dim):
            raise CormError(
                "the plan is for {} layers of {} key-value heads of {} numbers, the model has {} of {} of {}: "
                "plan on a trace of this model".format(*shape, config.layers, config.kv_heads, config.head_dim)
            )
        if self.model != model:
            raise CormError(f"the plan is for {self.model!r}, not {model!r}: plan on a trace of this model")

    def is_for(self, spec: str) -> bool:
        """Whether a SPEC means the policy of the plan."""
        one, other = parse(spec), parse(self.policy)
        return jax.tree.structure(one) == jax.tree.structure(other) and all(
            map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other))
        )
