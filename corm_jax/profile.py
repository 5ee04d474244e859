"""Profiles: a window for each head, found by `simulator.calibrate`, for CORM: ``corm:profile=FILE``.

``corm:profile=smollm2-135m`` comes with the package (`PACKAGED`).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from corm_jax.errors import CormError
from corm_jax.files import read_fields, write_json
from corm_jax.policies.corm import Corm
from corm_jax.policies.protect import Protect, protect

FORMAT = "corm-jax profile 1"

PACKAGED = Path(__file__).parent / "profiles"
"""Profiles that have a name and no need for a file."""

WHOLE = 2**30
"""A window longer than any text: the head keeps every key."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """CORM's choices for each head of one model.

    Attributes:
      model: its name.
      window: w of each key-value head of each layer, ``[layers][kv_heads]``; None keeps every key.
      recent: r, likewise.
      multiple: m, likewise.
      sinks: first tokens that stay, in all heads.
      group: as in `corm_jax.Corm`.
      made: how it was made, and what it was chosen by.
    """

    model: str
    window: list[list[int | None]]
    recent: list[list[int]]
    multiple: list[list[int]]
    sinks: int
    group: str
    made: dict[str, Any]

    def policy(self) -> Protect:
        """CORM with these windows."""
        window = np.array([[WHOLE if w is None else w for w in layer] for layer in self.window], np.int32)
        recent, multiple = np.array(self.recent, np.int32), np.array(self.multiple, np.int32)
        fields: dict[str, Any] = {"window": window, "recent": recent, "multiple": multiple, "group": self.group}
        return protect(Corm(**fields), sinks=self.sinks)

    def save(self, path: Path) -> None:
        """Writes the profile as JSON."""
        write_json(path, {"format": FORMAT} | asdict(self))

    @classmethod
    def load(cls, name: str) -> "Profile":
        """Reads a profile that comes with the package, or else from the file of that name.

        Raises:
          CormError: for a file that is not one, or of which a number cannot be.
        """
        fields = {"model": str, "window": list, "recent": list, "multiple": list}
        fields |= {"sinks": int, "group": str, "made": dict}
        packaged = PACKAGED / f"{name}.json"
        path = packaged if packaged.parent == PACKAGED and packaged.is_file() else Path(name)
        found = read_fields(path, "profile", FORMAT, fields, "corm calibrate")
        tables = [found[field] for field in ("window", "recent", "multiple")]
        shapes = [[len(layer) if isinstance(layer, list) else 0 for layer in table] for table in tables]
        if any(shape != shapes[0] for shape in shapes) or len(set(shapes[0])) != 1 or not shapes[0][0]:
            raise CormError(
                f"the profile {name} does not have w, r and m for as many heads in every layer: make a new one"
            )
        for layer, rows in enumerate(zip(*tables, strict=True)):
            for head, (window, recent, multiple) in enumerate(zip(*rows, strict=True)):
                if not (window is None or _whole(window)) or not _whole(recent) or not _whole(multiple):
                    raise CormError(
                        f"the profile {name} gives head {head} of layer {layer} w = {window!r}, r = {recent!r} and "
                        f"m = {multiple!r}: all are whole numbers from 1 up, or w is null for all keys"
                    )
        groups = ("any", "mean")
        if found["group"] not in groups:
            raise CormError(f"the profile {name} says group = {found['group']!r}: it must be {' or '.join(groups)}")
        return cls(**found)

    def check(self, model: str, config: Any) -> None:
        """Raises unless the profile is for this model, a name and a `corm_jax.Config`."""
        shape = len(self.window), len(self.window[0])
        if shape != (config.layers, config.kv_heads):
            raise CormError(
                f"the profile is for {shape[0]} layers of {shape[1]} key-value heads, the model has {config.layers} of "
                f"{config.kv_heads}: calibrate this model with corm calibrate"
            )
        if self.model != model:
            raise CormError(f"the profile is for {self.model!r}, not {model!r}: calibrate with corm calibrate")


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= WHOLE
