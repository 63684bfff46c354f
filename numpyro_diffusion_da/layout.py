"""Names for the axes of a state: dimension names, coordinates, units."""

from __future__ import annotations

import math

import equinox as eqx
import numpy as np


class Layout(eqx.Module):
    """What the axes of a state array mean.

    Args:
        shape: shape of one state.
        dims: a name for each axis.
        coordinates: (dimension name, values) pairs; a dimension without one is numbered.
        units: unit of the state's values, "1" where dimensionless.

    Raises:
        ValueError: not one name an axis, or a coordinate whose name or length does not fit.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    dims: tuple[str, ...] = eqx.field(static=True)
    coordinates: tuple[tuple[str, tuple[float | str, ...]], ...] = eqx.field(static=True, default=())
    units: str = eqx.field(static=True, default="1")

    def __check_init__(self) -> None:
        if len(self.dims) != len(self.shape):
            raise ValueError(
                f"layout has {len(self.dims)} names {self.dims} for the shape {self.shape}; give one each."
            )
        for name, values in self.coordinates:
            if name not in self.dims:
                raise ValueError(f"layout has a coordinate '{name}', but its dimensions are {self.dims}.")
            length = self.shape[self.dims.index(name)]
            if len(values) != length:
                raise ValueError(f"coordinate '{name}' has {len(values)} values, but the axis has {length}.")

    @property
    def size(self) -> int:
        """Number of values in one state."""
        return math.prod(self.shape)

    def coords(self) -> dict[str, np.ndarray]:
        """Coordinates as xarray takes them."""
        return {name: np.asarray(values) for name, values in self.coordinates}
