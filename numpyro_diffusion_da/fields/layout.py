"""Labels of a state array: names of its dimensions, coordinates, units, and the variables of a gridded state."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_diffusion_da.arguments import require, require_number, shown
from numpyro_diffusion_da.fields.interpolation import check_axis

SPHERE = {"latitude": "latitude", "longitude": "longitude", "lat": "latitude", "lon": "longitude"}
"""Kind of axis by the name of a dimension, for dimensions in degrees."""


class Undefined(eqx.Module):
    """Hashable mask of the points where a variable has no value, such as sea surface temperature over land.

    Args:
        mask: True where the variable has no value, of the shape of one state without its last axis.

    Attributes:
        shape: shape of the mask.
        packed: values of the mask as packed bits.

    Raises:
        ValueError: the mask holds other values than True and False, or 1 and 0.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    packed: bytes = eqx.field(static=True)

    def __init__(self, mask: np.ndarray) -> None:
        given = np.asarray(mask)
        if given.dtype != bool and (given.dtype.kind not in "iuf" or not np.isin(given, (0, 1)).all()):
            raise ValueError(
                f"Undefined got a mask of type {given.dtype} with values other than 0 and 1; give True where the "
                "variable has no value, as in Undefined(np.isnan(values))."
            )
        mask = given.astype(bool)
        self.shape, self.packed = mask.shape, np.packbits(mask).tobytes()

    def mask(self) -> Bool[np.ndarray, ...]:
        """Boolean mask, True where the variable has no value."""
        count = math.prod(self.shape)
        return np.unpackbits(np.frombuffer(self.packed, np.uint8), count=count).reshape(self.shape).astype(bool)


def _levels(levels: Any) -> tuple[int, ...]:
    """Pressure levels as a tuple, with whole numbers as integers."""
    advice = "in hPa, as in (500, 850)"
    if isinstance(levels, (str, bytes)) or not isinstance(levels, (Sequence, np.ndarray)) or np.ndim(levels) == 0:
        raise TypeError(f"Variable got levels={shown(levels)}; give a tuple of pressure levels {advice}.")
    found = [
        require_number(level, "Variable", f"levels[{i}]", f"give positive pressure levels {advice}.", above=0)
        for i, level in enumerate(levels)
    ]
    return tuple(int(level) if level == int(level) else level for level in found)  # type: ignore[misc]


def _mask(undefined: Any) -> Any:
    """Undefined points from a mask; other values as they are."""
    return Undefined(np.asarray(undefined)) if isinstance(undefined, (np.ndarray, jnp.ndarray)) else undefined


class Variable(eqx.Module):
    """Variable of a gridded state: its name, unit, pressure levels and undefined points.

    Args:
        name: name of the variable, for example "temperature".
        units: unit of the values, "1" if they are dimensionless.
        levels: pressure levels in hPa, one channel each. Empty for a variable on a single surface, with one channel.
        undefined: points where the variable has no value, as `Undefined` or as its mask; None if it has a value
            everywhere.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a level is not a positive number, or is given twice.
    """

    name: str = eqx.field(static=True)
    units: str = eqx.field(static=True, default="1")
    levels: tuple[int, ...] = eqx.field(static=True, default=(), converter=_levels)
    undefined: Undefined | None = eqx.field(static=True, default=None, converter=_mask)

    def __check_init__(self) -> None:
        require(self.name, str, self, "name", '"temperature"')
        require(self.units, str, self, "units", '"K"')
        if self.undefined is not None:
            require(self.undefined, Undefined, self, "undefined", "Undefined(mask)")
        if not self.name:
            raise ValueError("Variable got an empty name; give one, such as 'temperature'.")
        if len(set(self.levels)) != len(self.levels):
            raise ValueError(f"Variable got levels={self.levels}; give each level once.")

    @property
    def num_channels(self) -> int:
        """Number of channels of the variable: one per level, or one for a surface variable."""
        return max(1, len(self.levels))


def _plain(value: Any) -> Any:
    """Convert a numpy scalar to a Python value, because static fields of a module must not be arrays."""
    return value.item() if isinstance(value, np.generic) and value.dtype.kind not in "mM" else value


def _shape(shape: Any) -> tuple[int, ...]:
    """Shape as a tuple of integers."""
    if not isinstance(shape, Sequence) or isinstance(shape, (str, bytes)):
        raise TypeError(f"Layout got shape={shown(shape)}; give one positive whole number for each axis, as in (40,).")
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"Layout got shape={shown(shape)}; give one positive whole number for each axis.")
    return tuple(int(size) for size in shape)


def _dims(dims: Any) -> tuple[str, ...]:
    """Names of axes as a tuple."""
    if isinstance(dims, str) or not isinstance(dims, Sequence) or not all(isinstance(name, str) for name in dims):
        raise TypeError(f'Layout got dims={shown(dims)}; give a tuple of names, as in ("site",).')
    return tuple(dims)


def _coordinates(pairs: Any) -> tuple[tuple[str, tuple[float | str, ...]], ...]:
    """Coordinates as pairs (name, values), with plain values.

    Raises:
        TypeError: the coordinates are not such pairs.
        ValueError: a value is NaN, infinite, or neither a number nor a string.
    """
    try:
        given = [(name, values) for name, values in (pairs.items() if isinstance(pairs, Mapping) else pairs)]
        if any(isinstance(values, str) or not isinstance(name, str) for name, values in given):
            raise TypeError
        found = [(name, tuple(map(_plain, values))) for name, values in given]
    except (TypeError, ValueError):
        raise TypeError(
            f"Layout got coordinates={shown(pairs)}; give pairs (name of a dimension, its values), as in "
            '(("site", (0.0, 1.0, 2.0)),).'
        ) from None
    for name, values in found:
        for at, value in enumerate(values):
            if not isinstance(value, str) and not (isinstance(value, numbers.Real) and math.isfinite(value)):
                raise ValueError(
                    f"coordinate '{name}' of a layout has the value {shown(value)} at position {at}; give finite "
                    "numbers or strings."
                )
    return tuple(found)


class Layout(eqx.Module):
    """Meaning of the axes of a state array: their names, coordinates, units and variables.

    The last axis may hold several variables, with one channel or with one channel per level: see `select` and `split`.

    Args:
        shape: shape of one state.
        dims: name of each axis.
        coordinates: pairs (name of a dimension, its values), or a mapping. A dimension without coordinates is numbered.
            Latitudes and longitudes are in degrees, in order.
        units: unit of the state's values, "1" if they are dimensionless. Variables have units of their own.
        variables: variables of the channels of the last axis, in order. Empty if the state is a single quantity.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the number of names is not the number of axes, or a name occurs twice; a coordinate has an unknown
            name, a wrong length, or values that are not finite; latitudes or longitudes are out of range or not in
            order; the channels of the variables do not add up to the last axis; or undefined points do not fit the
            other axes.
    """

    shape: tuple[int, ...] = eqx.field(static=True, converter=_shape)
    dims: tuple[str, ...] = eqx.field(static=True, converter=_dims)
    coordinates: tuple[tuple[str, tuple[float | str, ...]], ...] = eqx.field(
        static=True, default=(), converter=_coordinates
    )
    units: str = eqx.field(static=True, default="1")
    variables: tuple[Variable, ...] = eqx.field(static=True, default=())

    def __check_init__(self) -> None:
        if len(self.dims) != len(self.shape):
            raise ValueError(
                f"Layout got {len(self.dims)} names {self.dims} for the shape {self.shape}; give one name for each "
                "axis."
            )
        require(self.units, str, self, "units", '"K"')
        names = [name for name, _ in self.coordinates]
        for what, given in (("dims", self.dims), ("coordinates of", names)):
            if twice := sorted({name for name in given if list(given).count(name) > 1}):
                raise ValueError(f"Layout got {what} {', '.join(map(repr, given))}; give {twice[0]!r} once.")
        for name, values in self.coordinates:
            if name not in self.dims:
                raise ValueError(
                    f"Layout got a coordinate '{name}', but its dimensions are {self.dims}; name one of these."
                )
            length = self.shape[self.dims.index(name)]
            if len(values) != length:
                raise ValueError(
                    f"coordinate '{name}' has {len(values)} values, but the axis has {length} points; give one value "
                    "for each."
                )
            if name in SPHERE:
                check_axis(values, SPHERE[name], "layout's ")
        require(self.variables, tuple, self, "variables", '(Variable("temperature", "K"),)')
        for variable in self.variables:
            require(variable, Variable, self, "variables", '(Variable("temperature", "K"),)')
            if [v.name for v in self.variables].count(variable.name) > 1:
                raise ValueError(f"Layout got the variable '{variable.name}' twice; give one with all its levels.")
            if variable.undefined is not None and variable.undefined.shape != self.shape[:-1]:
                raise ValueError(
                    f"the undefined points of '{variable.name}' have the shape {variable.undefined.shape}, but the "
                    f"state has {self.shape[:-1]} before its last axis; give a mask of that shape."
                )
        channels = sum(v.num_channels for v in self.variables)
        if self.variables and channels != self.shape[-1]:
            raise ValueError(
                f"the variables take {channels} channels, but the last axis of the shape {self.shape} has "
                f"{self.shape[-1]}; give the variables of all channels."
            )

    @property
    def size(self) -> int:
        """Number of values in one state."""
        return math.prod(self.shape)

    def coords(self) -> dict[str, np.ndarray]:
        """Coordinates by the name of their dimension, as arrays."""
        return {name: np.asarray(values) for name, values in self.coordinates}

    def level_dims(self) -> dict[str, str]:
        """Name of the level axis of each variable that has levels.

        The name is "level" for all variables with the same levels as the first of them, and "<variable>_level" for the
        others.
        """
        with_levels = [variable for variable in self.variables if variable.levels]
        return {v.name: "level" if v.levels == with_levels[0].levels else f"{v.name}_level" for v in with_levels}

    def level_coords(self) -> dict[str, np.ndarray]:
        """Pressure levels in hPa by the name of the level axis, as `level_dims` names it."""
        return {dim: np.asarray(self.variable(name).levels) for name, dim in self.level_dims().items()}

    def variable(self, name: str) -> Variable:
        """Variable with a given name.

        Raises:
            ValueError: the state has no such variable.
        """
        for candidate in self.variables:
            if candidate.name == name:
                return candidate
        known = ", ".join(f"'{v.name}'" for v in self.variables) or "none: the state is a single quantity"
        raise ValueError(f"the state has no variable '{name}'; it has {known}.")

    def channels(self, name: str) -> slice:
        """Slice of the last axis with the channels of a variable, one per level.

        Raises:
            ValueError: the state has no such variable.
        """
        variable = self.variable(name)
        start = sum(v.num_channels for v in self.variables[: self.variables.index(variable)])
        return slice(start, start + variable.num_channels)

    def select(self, x: Float[Array, ...], name: str, level: int | None = None) -> Float[Array, ...]:
        """Select a variable of states, at one pressure level or at all of them.

        Values are NaN at undefined points, so that an observation there is refused.

        Args:
            x: states, shape (..., *shape).
            name: name of the variable.
            level: pressure level in hPa; None for all levels, or for a surface variable.

        Returns:
            Values in the variable's unit, shape (..., *shape[:-1]). A trailing axis of levels is added if the variable
            has levels and `level` is None.

        Raises:
            ValueError: `x` has another shape, the variable or level does not exist, or a surface variable got a level.
        """
        variable, channels = self.variable(name), self.channels(name)
        if jnp.shape(x)[-len(self.shape) :] != self.shape:
            raise ValueError(
                f"Layout.select got an array of shape {jnp.shape(x)}, expected states of shape "
                f"(..., {', '.join(map(str, self.shape))})."
            )
        if level is None:
            values = x[..., channels] if variable.levels else x[..., channels.start]
        elif level not in variable.levels:
            has = f"the levels {variable.levels} hPa" if variable.levels else "no levels"
            do = "give one of them or leave level out" if variable.levels else "leave level out"
            raise ValueError(f"'{name}' has {has}, but got level={level!r}; {do}.")
        else:
            values = x[..., channels.start + variable.levels.index(level)]
        if variable.undefined is None:
            return values
        mask = variable.undefined.mask()
        if level is None and variable.levels:
            mask = mask[..., None]
        return jnp.where(jnp.broadcast_to(mask, values.shape), jnp.nan, values)

    def split(self, x: np.ndarray) -> dict[str, tuple[tuple[str, ...], np.ndarray, str]]:
        """Split states into their variables, in the form that xarray takes.

        Args:
            x: states as numpy, shape (..., *shape).

        Returns:
            For each variable, by its name: (names of the trailing axes, values, units). The level axis comes before the
            other trailing axes, and values are NaN at undefined points. Empty if the state has no variables.
        """
        parts = {}
        inner = len(self.shape) - 1
        for variable in self.variables:
            values = np.asarray(x[..., self.channels(variable.name)])
            if variable.undefined is not None:
                values = np.where(variable.undefined.mask()[..., None], np.nan, values)
            if variable.levels:
                parts[variable.name] = (("level", *self.dims[:-1]), np.moveaxis(values, -1, -1 - inner), variable.units)
            else:
                parts[variable.name] = (self.dims[:-1], values[..., 0], variable.units)
        return parts

    def split_by_levels(self, x: np.ndarray) -> dict[str, tuple[tuple[str, ...], np.ndarray, str]]:
        """Split states into their variables, with level axes named by `level_dims` so that all fit into one dataset.

        Args:
            x: states as numpy, shape (..., *shape).

        Returns:
            For each variable, by its name: (names of the trailing axes, values, units), otherwise as from `split`.
        """
        own = self.level_dims()
        return {
            name: (tuple(own[name] if dim == "level" else dim for dim in dims), values, units)
            for name, (dims, values, units) in self.split(x).items()
        }

    def join(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """Join variables to states; the inverse of `split` and `split_by_levels`, apart from undefined points.

        Args:
            parts: values of each variable by its name, with the leading axes of the states, and the level axis before
                the other trailing axes.

        Returns:
            States, shape (..., *shape); NaN at undefined points.
        """
        inner = len(self.shape) - 1
        channels = []
        for variable in self.variables:
            values = np.asarray(parts[variable.name])
            channels.append(np.moveaxis(values, -1 - inner, -1) if variable.levels else values[..., None])
        return np.concatenate(channels, axis=-1)
