"""earth2studio's names and units of variables, beside those of layouts."""

from __future__ import annotations

import dataclasses
import re

from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.fields.units import conversion

NAMES = {
    "100m_u_component_of_wind": ("u100m", "m s-1"),
    "100m_v_component_of_wind": ("v100m", "m s-1"),
    "10m_u_component_of_wind": ("u10m", "m s-1"),
    "10m_v_component_of_wind": ("v10m", "m s-1"),
    "10m_wind_speed": ("ws10m", "m s-1"),
    "2m_dewpoint_temperature": ("d2m", "K"),
    "2m_temperature": ("t2m", "K"),
    "mean_sea_level_pressure": ("msl", "Pa"),
    "sea_surface_temperature": ("sst", "K"),
    "skin_temperature": ("skt", "K"),
    "surface_pressure": ("sp", "Pa"),
    "total_cloud_cover": ("tcc", "1"),
    "total_column_water_vapour": ("tcwv", "kg m-2"),
    "total_precipitation_12hr": ("tp12", "m"),
    "total_precipitation_6hr": ("tp06", "m"),
}
"""earth2studio's name and unit of a variable at the surface, by the long name."""

NAMES_ON_LEVELS = {
    "geopotential": ("z", "m2 s-2"),
    "relative_humidity": ("r", "%"),
    "specific_humidity": ("q", "kg kg-1"),
    "temperature": ("t", "K"),
    "u_component_of_wind": ("u", "m s-1"),
    "v_component_of_wind": ("v", "m s-1"),
    "vertical_velocity": ("w", "Pa s-1"),
}
"""The same for variables on pressure levels; earth2studio appends the level in hPa: "t850"."""


@dataclasses.dataclass(frozen=True)
class Channel:
    """Channel of a state under earth2studio's name and in its unit.

    Attributes:
        variable: name of the variable in the layout.
        name: its name in earth2studio, as "t850".
        factor: factor from the layout's unit to that of earth2studio.
        offset: offset in earth2studio's unit.
    """

    variable: str
    name: str
    factor: float
    offset: float


def channels(layout: Layout) -> list[Channel]:
    """Channels of a layout under earth2studio's names; a variable that earth2studio does not have keeps its own name.

    Args:
        layout: layout of the state.

    Raises:
        ValueError: the layout has no variables, or one of them has a unit that does not become earth2studio's.
    """
    if not layout.variables:
        raise ValueError("the layout has no variables; name those of its channels: Layout(..., variables=(...)).")
    found = []
    for variable in layout.variables:
        name, unit = (NAMES_ON_LEVELS if variable.levels else NAMES).get(variable.name, (variable.name, variable.units))
        how = conversion(variable.units, unit)
        if how is None:
            raise ValueError(
                f"the layout has '{variable.name}' in '{variable.units}', which does not become earth2studio's "
                f"'{unit}'; correct the layout."
            )
        joint = "" if variable.name in NAMES_ON_LEVELS else "_"
        names = [f"{name}{joint}{level}" for level in variable.levels] or [name]
        found += [Channel(variable.name, each, *how) for each in names]
    return found


def unit_of(name: str) -> str | None:
    """Unit in which earth2studio has a variable; None for a name that is not known.

    Args:
        name: earth2studio's name of the variable, as "t850" or "sp".
    """
    if name == "pres":
        return "Pa"
    units = {short: unit for short, unit in (*NAMES.values(), *NAMES_ON_LEVELS.values())}
    stem = re.fullmatch(r"([a-z]+?)\d{2,4}", name)
    return units.get(name) or (units.get(stem[1]) if stem else None)
