"""Profiles: a window for each head, found by `corm_jax.runs.calibrate`, for CORM: ``corm:profile=FILE``.

``corm:profile=smollm2-135m`` comes with the package (`PACKAGED`).
"""

import reprlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from corm_jax.errors import CormError
from corm_jax.files import STRICT, read_json, write_json
from corm_jax.policies.corm import Corm
from corm_jax.policies.protect import Protect, protect
from corm_jax.showing.brief import between, line, table
from corm_jax.showing.labelled import Variable, dataset

if TYPE_CHECKING:
    import xarray

Format = Literal["corm-jax profile 1"]
FORMAT: Format = "corm-jax profile 1"

PACKAGED = Path(__file__).parent / "profiles"
"""Profiles that have a name and no need for a file."""

EVERYTHING = 2**30
"""A window longer than any text: the head keeps every key."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """CORM's choices for each head of one model.

    Attributes:
      model: its name.
      window: w of each key-value head of each layer, ``[layers][kv_heads]``; None keeps every key. Rows of layers with
        a sliding window have no effect.
      recent: r, likewise.
      multiple: m, likewise.
      sinks: first tokens that stay, in all heads.
      group: as in `corm_jax.Corm`.
      made: how it was made, and what it was chosen by.

    Raises:
      CormError: for a number that cannot be, or tables of different shapes.
    """

    __pydantic_config__: ClassVar = STRICT

    model: str
    window: list[list[int | None]]
    recent: list[list[int]]
    multiple: list[list[int]]
    sinks: int
    group: Literal["any", "mean"]
    made: dict[str, Any]

    def __post_init__(self):
        tables = {"window": self.window, "recent": self.recent, "multiple": self.multiple}
        heads = {name: [len(layer) for layer in table] for name, table in tables.items()}
        for name, shape in heads.items():
            if shape != heads["window"] or len(set(shape)) != 1 or not shape[0]:
                raise CormError(f"{name}: must have a number for as many heads in every layer as window, not {shape}")
        for name, layers in tables.items():
            for layer, row in enumerate(layers):
                for head, number in enumerate(row):
                    if not (name == "window" and number is None) and not 1 <= (number or 0) <= EVERYTHING:
                        null = ", or null for all keys" if name == "window" else ""
                        must = f"must be from 1 to {EVERYTHING}{null}, not {reprlib.repr(number)}"
                        raise CormError(f"{name}.{layer}.{head}: {must}")
        if not 0 <= self.sinks <= EVERYTHING:
            raise CormError(f"sinks: must be from 0 to {EVERYTHING}, not {reprlib.repr(self.sinks)}")

    def __repr__(self) -> str:
        return line("Profile", repr(self.model), **self._summary)

    def _repr_html_(self) -> str:
        return table("Profile", {"model": self.model} | self._summary)

    @property
    def _summary(self) -> dict[str, Any]:
        windows = [window for layer in self.window for window in layer]
        shape = {"layers": len(self.window), "kv_heads": len(self.window[0])}
        shown = between([window for window in windows if window is not None] or [EVERYTHING])
        return shape | {"window": shown, "whole_heads": windows.count(None)}

    def to_xarray(self) -> "xarray.Dataset":
        """The same with names: axes ``layer`` and ``kv_head``. Needs ``pip install 'corm-jax[xarray]'``.

        A head that keeps everything has an infinite window. ``live`` and ``again`` are what calibration measured.

        >>> found = Profile.load("smollm2-135m").to_xarray()
        >>> int(np.isinf(found.window).sum()), found.sizes["layer"]
        (6, 30)
        """
        window = np.array([[np.inf if w is None else w for w in layer] for layer in self.window])
        texts = {
            "window": (window, "w: queries whose verdict counts", "queries"),
            "recent": (self.recent, "r: newest keys that are never evicted", "keys"),
            "multiple": (self.multiple, "m: how many times 1/t of the attention makes a key important", "1"),
            "live": (self.made.get("live_by_head"), "share of the keys that was live at the end of a text", "1"),
            "again": (self.made.get("again_by_head"), "loss of a second reading without the head", "nats a token"),
        }
        variables = {name: Variable("layer kv_head", *rest) for name, rest in texts.items()}
        return dataset(variables, attrs={"model": self.model, "sinks": self.sinks, "group": self.group})

    def policy(self) -> Protect:
        """CORM with these windows."""
        window = np.array([[EVERYTHING if w is None else w for w in layer] for layer in self.window], np.int32)
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
        packaged = PACKAGED / f"{name}.json"
        path = packaged if packaged in PACKAGED.glob("*.json") else Path(name)
        found = read_json(path, _Stored, "profile", "make one with corm calibrate")
        return cls(**{field.name: getattr(found, field.name) for field in fields(cls)})

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


@dataclass(frozen=True, kw_only=True)
class _Stored(Profile):
    """As in a file."""

    format: Format
