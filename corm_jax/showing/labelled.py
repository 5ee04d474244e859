"""Results as `xarray.Dataset`: arrays whose axes have names, with coordinates, units and what they came of."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corm_jax.errors import CormError

if TYPE_CHECKING:
    import xarray


class Variable(NamedTuple):
    """An array of a data set.

    Attributes:
      dims: the names of its axes, blanks between them. Axes in front that have no name here are those of a grid.
      values: the array. None is left out.
      long_name: what it is, as plots write it.
      units: of its numbers; ``"1"`` for shares and other numbers without a unit.
    """

    dims: str
    values: Any
    long_name: str
    units: str = "1"


def dataset(
    variables: Mapping[str, Variable],
    *,
    coords: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
    grid: Mapping[str, Any] | None = None,
) -> "xarray.Dataset":
    """A data set of these variables.

    Args:
      variables: by name.
      coords: for each axis its coordinates, by default 0, 1, ...; or, by another name, a pair of an axis and values.
      attrs: what holds for all of it. None is left out.
      grid: the axes in front of all variables, with their values.

    Raises:
      CormError: if xarray is not installed.

    >>> live = Variable("layer step", np.ones((2, 3)), "live keys", "keys")
    >>> dataset({"live": live}, coords={"step": [1, 2, 3]}).sizes
    Frozen({'layer': 2, 'step': 3})
    """
    try:
        import xarray
    except ModuleNotFoundError:
        raise CormError("xarray is not installed: pip install 'corm-jax[xarray]'") from None
    front = {name: _axis(values) for name, values in (grid or {}).items()}
    made, sizes = {}, {name: len(values) for name, values in front.items()}
    for name, one in variables.items():
        if one.values is not None:
            dims, values = [*front, *one.dims.split()], np.asarray(one.values)
            made[name] = (dims, values, {"long_name": one.long_name, "units": one.units})
            sizes |= dict(zip(dims, values.shape, strict=True))
    given = {name: np.arange(size) for name, size in sizes.items()} | front | dict(coords or {})
    used = {name: value for name, value in given.items() if (value[0] if isinstance(value, tuple) else name) in sizes}
    return xarray.Dataset(made, used, {name: value for name, value in (attrs or {}).items() if value is not None})


def _axis(values: Any) -> Any:
    """The coordinates of an axis of a grid: its values, or what they look like if they are arrays themselves."""
    return [value if np.ndim(value) == 0 else f"{index}: {np.shape(value)}" for index, value in enumerate(values)]
