"""Names for the axes of a state: dimension names, coordinates, units, and the variables of a gridded state."""

from __future__ import annotations

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class Undefined(eqx.Module):
    """Where a variable has no value (sea surface temperature over land), hashable as a layout must be.

    Args:
        mask: True where there is no value, shape of the axes before the channels.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    packed: bytes = eqx.field(static=True)

    def __init__(self, mask: np.ndarray) -> None:
        mask = np.asarray(mask, dtype=bool)
        self.shape, self.packed = mask.shape, np.packbits(mask).tobytes()

    def mask(self) -> Bool[np.ndarray, ...]:
        """True where there is no value."""
        count = math.prod(self.shape)
        return np.unpackbits(np.frombuffer(self.packed, np.uint8), count=count).reshape(self.shape).astype(bool)


class Variable(eqx.Module):
    """One variable of a gridded state: its name, unit, levels, and where it has no value.

    Args:
        name: for example "temperature".
        units: unit of the values, "1" where dimensionless.
        levels: pressure levels in hPa, one channel each; empty for a variable on a single surface, one channel.
        undefined: where it has no value, or None.
    """

    name: str = eqx.field(static=True)
    units: str = eqx.field(static=True, default="1")
    levels: tuple[int, ...] = eqx.field(static=True, default=())
    undefined: Undefined | None = eqx.field(static=True, default=None)

    @property
    def num_channels(self) -> int:
        """Channels that the variable takes."""
        return max(1, len(self.levels))


def _plain(value: float | str | np.generic) -> float | str:
    """A Python value: what is static must be hashable and no array."""
    return value.item() if isinstance(value, np.generic) else value


class Layout(eqx.Module):
    """What the axes of a state array mean.

    The last axis may hold variables, each of one channel or one a level: see `select` and `split`.

    Args:
        shape: shape of one state.
        dims: a name for each axis.
        coordinates: (dimension name, values) pairs; a dimension without one is numbered.
        units: unit of the state's values, "1" where dimensionless; variables have their own.
        variables: what the channels of the last axis are, in order; empty where the state is a single quantity.

    Raises:
        ValueError: not one name an axis, a coordinate whose name or length does not fit, or variables whose channels
            are not those of the last axis.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    dims: tuple[str, ...] = eqx.field(static=True)
    coordinates: tuple[tuple[str, tuple[float | str, ...]], ...] = eqx.field(
        static=True, default=(), converter=lambda pairs: tuple((name, tuple(map(_plain, v))) for name, v in pairs)
    )
    units: str = eqx.field(static=True, default="1")
    variables: tuple[Variable, ...] = eqx.field(static=True, default=())

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
        channels = sum(v.num_channels for v in self.variables)
        if self.variables and channels != self.shape[-1]:
            raise ValueError(f"the variables take {channels} channels, but the last axis of {self.shape} is another.")

    @property
    def size(self) -> int:
        """Number of values in one state."""
        return math.prod(self.shape)

    def coords(self) -> dict[str, np.ndarray]:
        """Coordinates as xarray takes them."""
        return {name: np.asarray(values) for name, values in self.coordinates}

    def level_dims(self) -> dict[str, str]:
        """The name of each variable's axis of levels: "level", one of its own where its levels are not the first's."""
        with_levels = [variable for variable in self.variables if variable.levels]
        return {v.name: "level" if v.levels == with_levels[0].levels else f"{v.name}_level" for v in with_levels}

    def level_coords(self) -> dict[str, np.ndarray]:
        """Levels in hPa by the names of `level_dims`."""
        return {dim: np.asarray(self.variable(name).levels) for name, dim in self.level_dims().items()}

    def variable(self, name: str) -> Variable:
        """The variable of that name.

        Raises:
            ValueError: there is none.
        """
        for candidate in self.variables:
            if candidate.name == name:
                return candidate
        known = ", ".join(f"'{v.name}'" for v in self.variables) or "none: the state is a single quantity"
        raise ValueError(f"the state has no variable '{name}'; it has {known}.")

    def channels(self, name: str) -> slice:
        """The channels of a variable, one a level.

        Raises:
            ValueError: there is no such variable.
        """
        variable = self.variable(name)
        start = sum(v.num_channels for v in self.variables[: self.variables.index(variable)])
        return slice(start, start + variable.num_channels)

    def select(self, x: Float[Array, ...], name: str, level: int | None = None) -> Float[Array, ...]:
        """A variable of a state, at one level or at all; NaN where it has no value, so that it cannot be observed.

        Args:
            x: states, shape (..., *shape).
            name: a variable.
            level: a pressure level in hPa; None takes all of them (or the only one of a surface variable).

        Returns:
            Shape (..., *shape[:-1]), with a trailing axis of levels where a variable has levels and none is chosen.

        Raises:
            ValueError: no such variable or level, or a level for a surface variable.
        """
        variable, channels = self.variable(name), self.channels(name)
        if jnp.shape(x)[-len(self.shape) :] != self.shape:
            raise ValueError(f"got an array of shape {jnp.shape(x)}, expected states of shape (..., {self.shape}).")
        if level is None:
            values = x[..., channels] if variable.levels else x[..., channels.start]
        elif level not in variable.levels:
            has = f"the levels {variable.levels} hPa" if variable.levels else "no levels"
            raise ValueError(f"'{name}' has {has}, not {level!r}; leave level out or give one of them.")
        else:
            values = x[..., channels.start + variable.levels.index(level)]
        if variable.undefined is None:
            return values
        mask = variable.undefined.mask()
        if level is None and variable.levels:
            mask = mask[..., None]
        return jnp.where(jnp.broadcast_to(mask, values.shape), jnp.nan, values)

    def split(self, x: np.ndarray) -> dict[str, tuple[tuple[str, ...], np.ndarray, str]]:
        """A state, cut into its variables for xarray.

        Args:
            x: states as numpy, shape (..., *shape).

        Returns:
            name -> (names of the trailing axes, values, units); levels come before the other axes, and values are NaN
            where there are none. A state without variables gives nothing.
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
        """As `split`, the axes of levels named as `level_dims` has it, so that all fit into one dataset."""
        own = self.level_dims()
        return {
            name: (tuple(own[name] if dim == "level" else dim for dim in dims), values, units)
            for name, (dims, values, units) in self.split(x).items()
        }
