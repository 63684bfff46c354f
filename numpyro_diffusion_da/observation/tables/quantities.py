r"""Quantities that are computed from several values of a state at one place: wind speed, humidity, thickness.

A `DerivedQuantity` is a function of values that are interpolated to the place of an observation. The decorator
`derived` makes one of a function:

```python
@ndda.observation.derived("virtual_temperature", ("temperature", "specific_humidity"), "K")
def virtual_temperature(temperature, humidity):
    return temperature * (1.0 + 0.608 * humidity)
```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_diffusion_da.arguments import is_number, require, require_number, shown

GRAVITY = 9.80665
"""Standard acceleration of gravity, m s-2, by which geopotential becomes geopotential height."""

PRESSURE = "pressure"
"""Input of a derived quantity that is no variable: the pressure of the row's level, in Pa."""

LAYER_TOP = "layer_top"
"""Column of a table with the pressure of the top of a layer, in Pa; `pres` or `level` is its bottom then."""

EXAMPLE = '@derived("wind_speed", ("u_component_of_wind", "v_component_of_wind"), "m s-1")'


@dataclasses.dataclass(frozen=True)
class DerivedQuantity:
    """Observed quantity that is a function of several values of the state at the place of an observation.

    Args:
        function: function of one array for each input, all of shape (row,). It returns the quantity, shape (row,).
        name: name of the quantity, as tables have it in the column `variable`.
        inputs: each is the name of a variable of the layout, at the level of the row; a pair (name, level in hPa); a
            pair (name, "layer_top") for the top of the row's layer; or "pressure", the pressure of the row's level in
            Pa. Values come in the units of the layout.
        units: unit of the quantity.
        aliases: other names of the quantity, such as its CF standard name.
        input_units: unit that the function needs each variable in, by its name. Values are converted from the layout's
            unit.
        period: length of the circle for a direction, 360.0 for degrees: the difference from an observation is then
            taken the short way round. None for other quantities.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: there are no inputs, or an input is none of the above.
    """

    function: Callable[..., Float[Array, " row"]]
    name: str
    inputs: tuple[str | tuple[str, str | float], ...]
    units: str
    aliases: tuple[str, ...] = ()
    input_units: Mapping[str, str] = dataclasses.field(default_factory=dict)
    period: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"derived got the function {shown(self.function)}; write {EXAMPLE} above a function.")
        for name in ("name", "units"):
            require(getattr(self, name), str, "derived", name, '"m s-1"' if name == "units" else '"wind_speed"')
        given = self.inputs
        if isinstance(given, (str, bytes)) or not isinstance(given, Sequence) or not given:
            raise ValueError(f"derived got inputs={shown(given)}; give one name or more: write {EXAMPLE}.")
        for at in given:
            if not isinstance(at, str) and not _is_pair(at):
                raise ValueError(
                    f"derived got the input {shown(at)}; give the name of a variable, or a pair of it and a level in "
                    'hPa or "layer_top".'
                )
        object.__setattr__(self, "inputs", tuple(given))
        if self.period is not None:
            advice = "give the length of the circle, 360.0."
            object.__setattr__(self, "period", require_number(self.period, "derived", "period", advice, above=0.0))

    def variables(self) -> list[str]:
        """Names of the variables that the quantity is computed from."""
        return [at if isinstance(at, str) else at[0] for at in self.inputs if at != PRESSURE]

    def has_layer(self) -> bool:
        """Whether the quantity needs the top of a layer."""
        return any(isinstance(at, tuple) and at[1] == LAYER_TOP for at in self.inputs)

    def near(self, values: Float[Array, " row"], observed: Float[Array, " row"]) -> Float[Array, " row"]:
        """Values on a circle in the turn that is nearest to the observed ones; other values as they are."""
        if self.period is None:
            return values
        return observed + (values - observed + 0.5 * self.period) % self.period - 0.5 * self.period


def _is_pair(at: Any) -> bool:
    """Whether an input is a pair of a variable and a level."""
    if not isinstance(at, tuple) or len(at) != 2 or not isinstance(at[0], str):
        return False
    return at[1] == LAYER_TOP if isinstance(at[1], str) else is_number(at[1]) and float(at[1]) > 0


def derived(
    name: str,
    inputs: Sequence[str | tuple[str, str | float]],
    units: str,
    *,
    aliases: Sequence[str] = (),
    input_units: Mapping[str, str] | None = None,
    period: float | None = None,
) -> Callable[[Callable[..., Float[Array, " row"]]], DerivedQuantity]:
    """Decorator that makes an observed quantity of a function, see `DerivedQuantity` for the arguments.

    Nothing is registered: pass the quantity on, ``table.on(layout, times, quantities=(virtual_temperature,))``.
    """

    def decorate(function: Callable[..., Float[Array, " row"]]) -> DerivedQuantity:
        inputs_ = tuple(inputs) if isinstance(inputs, Sequence) and not isinstance(inputs, str) else inputs
        return DerivedQuantity(function, name, inputs_, units, tuple(aliases), dict(input_units or {}), period)  # type: ignore[arg-type]

    return decorate


def _speed(u: Float[Array, " row"], v: Float[Array, " row"]) -> Float[Array, " row"]:
    """Wind speed (u^2 + v^2)^(1/2), whose derivative in a calm is 0."""
    square = u**2 + v**2
    calm = square == 0.0
    return jnp.where(calm, 0.0, jnp.sqrt(jnp.where(calm, 1.0, square)))


def _direction(u: Float[Array, " row"], v: Float[Array, " row"]) -> Float[Array, " row"]:
    """Direction that the wind blows from, degrees clockwise from north, 0 to 360; 0 in a calm."""
    calm = (u == 0.0) & (v == 0.0)
    return jnp.rad2deg(jnp.where(calm, 0.0, jnp.arctan2(-jnp.where(calm, 1.0, u), -v))) % 360.0


WIND = ("u_component_of_wind", "v_component_of_wind")
WIND_10M = ("10m_u_component_of_wind", "10m_v_component_of_wind")
METERS_PER_SECOND = dict.fromkeys((*WIND, *WIND_10M), "m s-1")
WIND_SPEED = DerivedQuantity(_speed, "wind_speed", WIND, "m s-1", ("ws",), METERS_PER_SECOND)
WIND_DIRECTION = DerivedQuantity(
    _direction, "wind_direction", WIND, "degree", ("wind_from_direction", "wd"), METERS_PER_SECOND, 360.0
)
WIND_SPEED_10M = DerivedQuantity(
    _speed, "10m_wind_speed", WIND_10M, "m s-1", ("wind_speed", "si10", "10si", "ws10m"), METERS_PER_SECOND
)
WIND_DIRECTION_10M = DerivedQuantity(
    _direction,
    "10m_wind_direction",
    WIND_10M,
    "degree",
    ("wind_direction", "wind_from_direction", "wd10m"),
    METERS_PER_SECOND,
    360.0,
)

# Saturation over water as in the IFS: documentation of Cy47r3, part IV, equation 7.5, after Buck (1981).
E_0, T_0, A_3, A_4 = 611.21, 273.16, 17.502, 32.19
RATIO = 0.621981
"""Ratio of the gas constants of dry air and water vapor."""


def _vapor_pressure(humidity: Float[Array, " row"], pressure: Float[Array, " row"]) -> Float[Array, " row"]:
    """Partial pressure of water vapor, Pa, from specific humidity and pressure in Pa."""
    return humidity * pressure / (RATIO + (1.0 - RATIO) * humidity)


@derived(
    "relative_humidity",
    ("temperature", "specific_humidity", PRESSURE),
    "1",
    aliases=("r", "rh"),
    input_units={"temperature": "K", "specific_humidity": "kg kg-1"},
)
def RELATIVE_HUMIDITY(  # noqa: N802 - a constant, as its neighbors
    temperature: Float[Array, " row"], humidity: Float[Array, " row"], pressure: Float[Array, " row"]
) -> Float[Array, " row"]:
    """Relative humidity over water, as a fraction."""
    saturated = E_0 * jnp.exp(A_3 * (temperature - T_0) / (temperature - A_4))
    return _vapor_pressure(humidity, pressure) / saturated


@derived(
    "dewpoint_temperature",
    ("specific_humidity", PRESSURE),
    "K",
    aliases=("dew_point_temperature", "dewpoint"),
    input_units={"specific_humidity": "kg kg-1"},
)
def DEWPOINT_TEMPERATURE(  # noqa: N802
    humidity: Float[Array, " row"], pressure: Float[Array, " row"]
) -> Float[Array, " row"]:
    """Dew point over water, K. Humidities below 1e-8, which an emulator may have, count as that."""
    logarithm = jnp.log(_vapor_pressure(jnp.maximum(humidity, 1e-8), pressure) / E_0)
    return (A_3 * T_0 - A_4 * logarithm) / (A_3 - logarithm)


@derived("geopotential_height", ("geopotential",), "m", aliases=("gh", "zg"), input_units={"geopotential": "m2 s-2"})
def GEOPOTENTIAL_HEIGHT(geopotential: Float[Array, " row"]) -> Float[Array, " row"]:  # noqa: N802
    """Geopotential height, m."""
    return geopotential / GRAVITY


@derived(
    "thickness",
    ("geopotential", ("geopotential", LAYER_TOP)),
    "m",
    aliases=("atmosphere_layer_thickness_expressed_as_geopotential_height",),
    input_units={"geopotential": "m2 s-2"},
)
def THICKNESS(bottom: Float[Array, " row"], top: Float[Array, " row"]) -> Float[Array, " row"]:  # noqa: N802
    """Thickness of a layer in geopotential height, m."""
    return (top - bottom) / GRAVITY


DERIVED = (
    WIND_SPEED,
    WIND_DIRECTION,
    WIND_SPEED_10M,
    WIND_DIRECTION_10M,
    RELATIVE_HUMIDITY,
    DEWPOINT_TEMPERATURE,
    GEOPOTENTIAL_HEIGHT,
    THICKNESS,
)
"""Derived quantities that every table knows, where the layout has their variables."""
