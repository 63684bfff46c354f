"""What a name in a table means on a layout: a variable, a channel, or a quantity that is derived from variables."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence

from numpyro_diffusion_da.fields.datasets import SHORT_NAMES, STANDARD_NAMES
from numpyro_diffusion_da.fields.layout import Layout, Variable
from numpyro_diffusion_da.observation.tables.quantities import DERIVED, DerivedQuantity

OTHER_NAMES = {
    # earth2studio's, where they differ from ECMWF's.
    "10m_u_component_of_wind": ("u10m",),
    "10m_v_component_of_wind": ("v10m",),
    "2m_dewpoint_temperature": ("d2m",),
    "2m_temperature": ("t2m",),
    "total_precipitation_6hr": ("tp06",),
    "total_precipitation_12hr": ("tp12",),
    "total_column_water_vapour": ("tcwv",),
    "skin_temperature": ("skt",),
    "total_cloud_cover": ("tcc",),
    "snow_depth": ("sd",),
    "100m_u_component_of_wind": ("100u", "u100m"),
    "100m_v_component_of_wind": ("100v", "v100m"),
}
AMBIGUOUS = ("u100", "v100")
"""Winds at 100 m in ERA5's files, and at 100 hPa in others: never read as either."""


def _aliases(name: str) -> set[str]:
    """Names that tables use for a variable of a given long name."""
    standard = STANDARD_NAMES.get(name)
    return {name, *SHORT_NAMES.get(name, ()), *OTHER_NAMES.get(name, ()), *((standard,) if standard else ())}


KNOWN = {long: _aliases(long) for long in (*SHORT_NAMES, *STANDARD_NAMES, *OTHER_NAMES)}
"""All names of the variables that this library knows, by the long name."""
ON_LEVELS = ("geopotential", "specific_humidity", "temperature", *(f"{c}_component_of_wind" for c in "uv"))


@dataclasses.dataclass(frozen=True)
class Target:
    """Variable or derived quantity that the rows of one name observe.

    Attributes:
        name: name of the variable or quantity, in results.
        units: unit of the values.
        has_level: whether a row needs a pressure.
        variable: the observed variable of the layout; None for a derived quantity.
        quantity: the derived quantity; None for a variable.
        level: pressure in hPa that the name itself states, as "temperature_850" does; None otherwise.
    """

    name: str
    units: str
    has_level: bool
    variable: Variable | None = None
    quantity: DerivedQuantity | None = None
    level: float | None = None

    @property
    def part(self) -> str:
        """Name of the part of the operator that computes it."""
        return LINEAR if self.quantity is None else self.quantity.name


LINEAR = "variables"
"""Part of an operator whose observations are interpolated values of variables."""


class Names:
    """Names of a layout's variables and of the derived quantities that can be computed from them.

    Args:
        layout: layout of the state.
        quantities: derived quantities of the user's.

    Raises:
        ValueError: a quantity of the user's needs a variable that the layout lacks, or has the name of another one.
    """

    def __init__(self, layout: Layout, quantities: Sequence[DerivedQuantity] = ()) -> None:
        self.layout = layout
        has = {variable.name for variable in layout.variables}
        self.targets: list[tuple[set[str], Target]] = []
        for variable in layout.variables:
            target = Target(variable.name, variable.units, bool(variable.levels), variable)
            self.targets.append((_aliases(variable.name), target))
        for quantity in quantities:
            if missing := [name for name in quantity.variables() if name not in has]:
                raise ValueError(
                    f"the quantity '{quantity.name}' needs the variable '{missing[0]}', but the layout has "
                    f"{', '.join(map(repr, sorted(has)))}; give a quantity of these."
                )
        own = {quantity.name for quantity in quantities}
        for name in sorted(own):
            if name in has or name == LINEAR or [quantity.name for quantity in quantities].count(name) > 1:
                raise ValueError(f"the quantity '{name}' has a name that is taken; give it one of its own.")
        self.quantities = {
            quantity.name: quantity
            for quantity in (*quantities, *(q for q in DERIVED if q.name not in own))
            if quantity.name not in has and set(quantity.variables()) <= has
        }
        for quantity in self.quantities.values():
            levels = quantity.has_layer() or any(
                isinstance(at, str) and (at == "pressure" or bool(layout.variable(at).levels)) for at in quantity.inputs
            )
            target = Target(quantity.name, quantity.units, levels, quantity=quantity)
            self.targets.append(({quantity.name, *quantity.aliases}, target))

    def find(self, name: str, has_level: bool) -> Target | None:
        """Target that a name means for rows with or without a pressure.

        Returns:
            The target; None if the name is known and the layout has nothing of it.

        Raises:
            KeyError: the name is not known. The message is the nearest known name, or empty.
        """
        found = self._named(name, has_level) or self._named(name.lower(), has_level)
        if found is not None:
            return found
        if name.lower() in self._all():
            return None
        for own in (name, name.lower()):
            if self._stem(own) is not None:
                return self._with_level(own)
        near = difflib.get_close_matches(name, sorted(self._here() | self._all()), n=1, cutoff=0.6)
        raise KeyError(near[0] if near else "")

    def _named(self, name: str, has_level: bool) -> Target | None:
        found = [target for names, target in self.targets if name in names]
        exact = [target for target in found if target.name == name]
        if exact and not self._is_shared(name):
            return exact[0]
        if not self._is_shared(name):
            return found[0] if found else None
        # The CF conventions have one name for the value near the ground and on levels: the pressure decides.
        fitting = [target for target in found if target.has_level == has_level]
        if fitting:
            return fitting[0]
        # Rows without a pressure are not taken for a value on a level, they lack it; nor the other way round.
        return found[0] if found and not has_level else None

    def _is_shared(self, name: str) -> bool:
        shared = sum(name in names for names in KNOWN.values()) > 1
        return shared or sum(name in {q.name, *q.aliases} for q in DERIVED) > 1

    def _stem(self, name: str) -> tuple[str, float] | None:
        """Long name and level of a name like "t850" or "temperature_850"; None for another name."""
        match = re.fullmatch(r"(.*?[a-z])_?(\d{1,4})", name)
        if match is None or name in AMBIGUOUS:
            return None
        here = {level for variable in self.layout.variables for level in variable.levels}
        if int(match[2]) < 100 and int(match[2]) not in here:
            return None  # "t2" is rarely the temperature at 2 hPa
        for long in ON_LEVELS:
            if match[1] in {long, *SHORT_NAMES[long]}:
                return long, float(match[2])
        for variable in self.layout.variables:
            if variable.levels and match[1] == variable.name:
                return variable.name, float(match[2])
        return None

    def _with_level(self, name: str) -> Target | None:
        stem = self._stem(name)
        for variable in self.layout.variables:
            if stem is not None and variable.name == stem[0] and variable.levels:
                return Target(variable.name, variable.units, True, variable, None, stem[1])
        return None

    def _all(self) -> set[str]:
        """Every name that the library knows."""
        names = {alias for aliases in KNOWN.values() for alias in aliases}
        return names | {alias for q in DERIVED for alias in (q.name, *q.aliases)}

    def _here(self) -> set[str]:
        return {name for names, _ in self.targets for name in names}

    def words(self) -> str:
        """Text with the names of what the layout and the derived quantities have."""
        return ", ".join(repr(target.name) for _, target in self.targets)
