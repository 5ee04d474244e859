"""Plans: how many slots each layer needs. Made from traces by `simulator.planner`, used by the pooled layout."""

import reprlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import numpy as np

from corm_jax.errors import CormError
from corm_jax.files import STRICT, read_json, write_json
from corm_jax.policies import Notation, parse
from corm_jax.showing.brief import between, line, table
from corm_jax.showing.labelled import Variable, dataset

if TYPE_CHECKING:
    import xarray

Format = Literal["corm-jax plan 1"]
FORMAT: Format = "corm-jax plan 1"
MOST = 2**31 - 1
"""Slots and tokens are int32."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Pools for one policy in one model.

    Attributes:
      model: its name, as in the traces.
      policy: the SPEC.
      kv_heads, head_dim: the shape of its keys.
      chunk: tokens between evictions.
      tokens: how many each trace has; a longer text may need more.
      overflow: the share of keys that may go for lack of a slot.
      capacity: slots a key-value head, on average, of each layer; the numbers of layers with a sliding window have no
        effect.

    Raises:
      CormError: for a number that cannot be, or a SPEC that does not parse.
    """

    __pydantic_config__: ClassVar = STRICT

    model: str
    policy: str
    kv_heads: int
    head_dim: int
    chunk: int
    tokens: int
    overflow: float
    capacity: tuple[int, ...]

    def __repr__(self) -> str:
        return line("Plan", **{name: repr(value) for name, value in self._about.items()}, **self._sizes)

    def _repr_html_(self) -> str:
        return table("Plan", self._about | self._sizes)

    @property
    def _about(self) -> dict[str, Any]:
        names = ("model", "policy", "kv_heads", "tokens", "chunk", "overflow")
        return {name: getattr(self, name) for name in names}

    @property
    def _sizes(self) -> dict[str, Any]:
        return {"layers": len(self.capacity), "capacity": between(self.capacity)}

    def to_xarray(self) -> "xarray.Dataset":
        """The capacity of each ``layer``, and what it was planned for. Needs ``pip install 'corm-jax[xarray]'``."""
        capacity = Variable("layer", self.capacity, "slots a key-value head, on average", "slots")
        attrs = {name: value for name, value in asdict(self).items() if name not in ("capacity", "format")}
        return dataset({"capacity": capacity}, attrs=attrs)

    def __post_init__(self):
        numbers = {name: getattr(self, name) for name in ("kv_heads", "head_dim", "chunk", "tokens")}
        numbers |= {f"capacity, slots a head of layer {layer}": slots for layer, slots in enumerate(self.capacity)}
        for name, number in numbers.items():
            if not 1 <= number <= MOST:
                raise CormError(f"{name}: must be from 1 to {MOST}, not {reprlib.repr(number)}")
        if not self.capacity:
            raise CormError("capacity: must have a number for each layer, and has none")
        if not 0 <= self.overflow < 1:
            raise CormError(f"overflow: must be a share of the keys in [0, 1), not {self.overflow}")
        try:
            if Notation.read(self.policy).ours:  # no file has a user's module imported
                parse(self.policy)
        except CormError as error:
            raise CormError(f"policy: {error}") from None

    def save(self, path: Path) -> None:
        """Writes the plan as JSON."""
        write_json(path, {"format": FORMAT} | asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Reads a plan.

        Raises:
          CormError: for a file that is not one, or of which a field cannot be.
        """
        found = read_json(path, _Stored, "plan", "make one with python -m simulator plan")
        return cls(**{field.name: getattr(found, field.name) for field in fields(cls)})

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
        if Notation.read(spec).name != Notation.read(self.policy).name:
            return False
        one, other = parse(spec), parse(self.policy)
        return jax.tree.structure(one) == jax.tree.structure(other) and all(
            map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other))
        )


@dataclass(frozen=True, kw_only=True)
class _Stored(Plan):
    """As in a file."""

    format: Format
