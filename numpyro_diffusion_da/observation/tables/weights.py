"""Weights of a layout's values for rows of a table, and which rows cannot be placed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from numpyro_diffusion_da.fields.grids import Grid
from numpyro_diffusion_da.fields.layout import Layout, Variable
from numpyro_diffusion_da.observation.tables.flags import Flag
from numpyro_diffusion_da.observation.tables.geometry import VECTORS, Horizontal, Weights, combine, levels
from numpyro_diffusion_da.observation.tables.names import Names, Target
from numpyro_diffusion_da.observation.tables.quantities import LAYER_TOP, PRESSURE
from numpyro_diffusion_da.observation.tables.rows import column, set_flag
from numpyro_diffusion_da.observation.tables.table import where

if TYPE_CHECKING:
    import pandas


class Placer:
    """Weights of a layout's values for rows of a table.

    Args:
        layout: layout of the state.
        names: names of what rows may observe.

    Raises:
        ValueError: the layout has no grid of latitudes and longitudes, or no variables.
    """

    def __init__(self, layout: Layout, names: Names) -> None:
        self.layout, self.names = layout, names
        self.horizontal = Horizontal(Grid.of(layout))

    def inputs(self, target: Target) -> list[tuple[Variable, str | float | None]]:
        """Variables that a target is computed from, each with "layer_top", a level in hPa or None for the row's."""
        if target.variable is not None:
            return [(target.variable, None)]
        assert target.quantity is not None
        pairs = [(at, None) if isinstance(at, str) else at for at in target.quantity.inputs if at != PRESSURE]
        return [(self.layout.variable(name), at) for name, at in pairs]

    def weights(self, target: Target, rows: pandas.DataFrame) -> tuple[list[Weights], dict[Flag, np.ndarray]]:
        """Weights of each input of a target for rows, and which rows cannot be placed.

        Args:
            target: what the rows observe.
            rows: rows whose places are on the grid.
        """
        places = rows[["lat", "lon"]].to_numpy(float)
        footprint = column(rows, "footprint")
        found: list[Weights] = []
        bad = {flag: np.zeros(len(rows), bool) for flag in (Flag.ABOVE_MODEL, Flag.BELOW_MODEL, Flag.MISSING_SURFACE)}
        for variable, at in self.inputs(target):
            pressure = rows["pres"].to_numpy(float)
            if at is not None:
                pressure = column(rows, LAYER_TOP) if at == LAYER_TOP else np.full(len(rows), 100.0 * float(at))
            vertical = levels(self.layout, variable, pressure)
            bad[Flag.ABOVE_MODEL] |= vertical.above
            bad[Flag.BELOW_MODEL] |= vertical.below
            horizontal = self.horizontal.weights(places, footprint, variable.name in VECTORS)
            if variable.undefined is not None:
                missing = variable.undefined.mask().reshape(-1)[horizontal.points]
                bad[Flag.MISSING_SURFACE] |= (missing & (horizontal.weight != 0)).any(axis=1)
            found.append(combine(self.layout, horizontal, vertical))
        return found, bad


def set_apart(rows: pandas.DataFrame, targets: dict[str, Target], placer: Placer) -> None:
    """Set rows aside that are outside the grid, above or below the model, or where it has no value."""
    used = np.flatnonzero(rows["flag"].to_numpy() == Flag.USED)
    places = rows[["lat", "lon"]].to_numpy(float)[used]
    outside = np.zeros(len(rows), bool)
    outside[used] = ~placer.horizontal.covers(places, column(rows, "footprint")[used])
    set_flag(rows, outside, Flag.OUTSIDE_GRID)
    _refuse_hpa_for_pa(rows, targets, placer)
    for name, target in targets.items():
        here = np.flatnonzero((rows["name"].to_numpy() == name) & (rows["flag"].to_numpy() == Flag.USED))
        if not here.size:
            continue
        _, bad = placer.weights(target, rows.iloc[here])
        for flag, mask in bad.items():
            every = np.zeros(len(rows), bool)
            every[here] = mask
            set_flag(rows, every, flag)


def _refuse_hpa_for_pa(rows: pandas.DataFrame, targets: dict[str, Target], placer: Placer) -> None:
    """Refuse a table whose pressures are all above the model, and between its levels if they were in hPa.

    Raises:
        ValueError: the pressures look like hPa.
    """
    levelled = [name for name, target in targets.items() if target.has_level]
    some = rows["name"].isin(levelled).to_numpy() & (rows["flag"].to_numpy() == Flag.USED)
    pressure = rows["pres"].to_numpy(float)[some]
    known = [level for variable in placer.layout.variables for level in variable.levels]
    # One level may be beyond the model by itself.
    if not known or np.unique(pressure).size < 2:
        return
    low, high = 100.0 * min(known), 100.0 * max(known)
    inside = (100.0 * pressure >= 0.99 * low) & (100.0 * pressure <= 1.01 * high)
    if np.all((pressure < low) | (pressure > high)) and inside.mean() > 0.5:
        first = rows.index[int(np.flatnonzero(some)[0])]
        raise ValueError(
            f"{where(rows, first)}: the pressure is {pressure[0]:g} Pa, and no row is between the model's levels of "
            f"{low:g} and {high:g} Pa, but most are if given in hPa; call the column level."
        )


def apply(rows: pandas.DataFrame, targets: dict[str, Target], placer: Placer, field: np.ndarray) -> np.ndarray:
    """Values of a field at rows that observe variables; NaN for rows of derived quantities."""
    found = np.full(len(rows), np.nan)
    flat = np.broadcast_to(field, placer.layout.shape).reshape(-1)
    for name, target in targets.items():
        here = np.flatnonzero(rows["name"].to_numpy() == name)
        if here.size and target.quantity is None:
            (weights,), _ = placer.weights(target, rows.iloc[here])
            found[here] = np.sum(weights.weight * flat[weights.points], axis=1)
    return found
