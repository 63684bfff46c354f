"""Checks of values that a file states wrongly: fill values, packed integers, wrong units, wrong masks.

Labels of files are often wrong: somebody subtracted 273.15 and left the unit K, or filled the sea surface temperature
over land. Each check refuses only what cannot be right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from numpyro_diffusion_da.fields.units import same_unit

if TYPE_CHECKING:
    import xarray

    from numpyro_diffusion_da.fields.grids import Grid
    from numpyro_diffusion_da.fields.layout import Layout, Variable

FILL_VALUES = (-9999.0, -999.0, -99999.0, -32767.0, -32768.0, 9999.0, 99999.0, 999999.0)
"""Numbers that files have in place of missing values. A field does not hold exactly these otherwise."""
LARGEST = 1e15
"""Larger numbers are fill values, such as 9.96921e36 (netCDF) and 1e20 (CMOR)."""

SEA_SURFACE_TEMPERATURE = "sea_surface_temperature"
TEMPERATURES = ("2m_temperature", "temperature", SEA_SURFACE_TEMPERATURE, "skin_temperature", "2m_dewpoint_temperature")
PRESSURES = ("mean_sea_level_pressure", "surface_pressure")

FAR = 6.0
"""Largest distance of the mean of a channel from the mean of the training, in standard deviations."""


def check_decoded(array: xarray.DataArray, name: str) -> None:
    """Check that a variable was decoded: its attributes do not state a scale or a fill value.

    Args:
        array: the variable.
        name: its name in the dataset.

    Raises:
        ValueError: the variable is packed, or its attributes state a fill value that xarray has not replaced.
    """
    attributes = sorted({"scale_factor", "add_offset", "_FillValue", "missing_value"} & set(array.attrs))
    packed = {"scale_factor", "add_offset"} & set(attributes)
    if packed or (attributes and array.dtype.kind in "iu"):
        raise ValueError(
            f"'{name}' is packed: its attributes have {', '.join(attributes)}; unpack it: "
            "dataset = xarray.decode_cf(dataset)."
        )
    if array.dtype.kind not in "fiub":
        raise ValueError(f"'{name}' is of type {array.dtype}, expected numbers; give another variable or convert it.")


def check_fill_values(values: np.ndarray, name: str, attributes: Any = None) -> None:
    """Check that values do not contain a usual fill value.

    Args:
        values: values of a variable, of any shape.
        name: name of the variable.
        attributes: attributes of the variable, which may state its fill value.

    Raises:
        ValueError: there is a fill value. The message names it.
    """
    stated = [attributes[key] for key in ("_FillValue", "missing_value") if key in (attributes or {})]
    usual = np.array([*FILL_VALUES, *stated], np.float32)
    bad = np.isin(values, usual) | (np.isfinite(values) & (np.abs(values) > LARGEST))
    if bad.any():
        value = float(values[bad][0])
        near = max(1e-3, 1e-5 * abs(value))
        raise ValueError(
            f"'{name}' has the value {value:g} at {int(bad.sum())} of {bad.size} points, which looks like a fill "
            f"value; replace it by NaN: dataset['{name}'] = dataset['{name}'].where(abs(dataset['{name}'] - "
            f"{value:g}) > {near:g})."
        )


def check_plausible(values: Float[np.ndarray, "time level latitude longitude"], variable: Variable) -> None:
    """Check that the values of a well-known variable do not look like another unit than the stated one.

    Args:
        values: values of the variable in the unit of the layout, NaN where missing.
        variable: the variable of the layout.

    Raises:
        ValueError: the median over the grid is where that of another unit lies, or a temperature is impossible. The
            message names the variable.
    """
    known = values[np.isfinite(values)]
    if known.size == 0:
        return
    median, other = float(np.median(known)), None
    if variable.name in TEMPERATURES and same_unit(variable.units, "K"):
        least = 250.0 if variable.name == SEA_SURFACE_TEMPERATURE else 130.0
        # Anomalies, which have this unit too, have a median near 0 and vary less than temperatures.
        if -120.0 < median < 130.0 and (abs(median) > 1.5 or known.std() > 8.0):
            other = "degC" if median < 40.0 else "degF"
        elif median > least and (known.min() < least or known.max() > 400.0):
            wrong = known[(known < least) | (known > 400.0)]
            raise ValueError(
                f"'{variable.name}' has {wrong[0]:g} K at {wrong.size} of {values.size} values, which is no such "
                "temperature on the Earth; replace missing values by NaN."
            )
    elif variable.name in PRESSURES and same_unit(variable.units, "Pa") and 300.0 < median < 1200.0:
        other = "hPa"
    elif variable.name in PRESSURES and same_unit(variable.units, "hPa") and 30000.0 < median < 120000.0:
        other = "Pa"
    elif variable.name == "geopotential" and same_unit(variable.units, "m2 s-2"):
        for k, level in enumerate(variable.levels):
            at_level = values[:, k][np.isfinite(values[:, k])]
            # Near the ground, and above the tropopause, the height of a level does not tell the units apart so well.
            if 250 <= level <= 850 and at_level.size:
                height = 44330.8 * (1.0 - (level / 1013.25) ** 0.190263)  # of the standard atmosphere, in m
                other = "m" if 0.8 < np.median(at_level) / height < 1.25 else other
    if other is not None:
        raise ValueError(
            f"'{variable.name}' should be in '{variable.units}', but its median is {median:.4g}, which looks like "
            f"'{other}'; convert the values, and check the attribute `units`."
        )


def check_surface(
    undefined: Bool[np.ndarray, "latitude longitude"],
    name: str,
    land: Float[np.ndarray, "latitude longitude"] | None,
    grid: Grid,
) -> None:
    """Check the mask of a variable without values at some points against the land-sea mask.

    Args:
        undefined: True where the variable has no value.
        name: name of the variable.
        land: land-sea mask, 1 over land; None if it is not known.
        grid: grid of the mask.

    Raises:
        ValueError: the variable has no value anywhere; or it is a sea surface temperature, and it has values over most
            of the land, or no values over most of the sea.
    """
    if undefined.all():
        raise ValueError(f"'{name}' is NaN at all {undefined.size} points; give a dataset with its values.")
    if name != SEA_SURFACE_TEMPERATURE:
        return
    advice = "give the variable as ERA5 has it, with values over sea and NaN over land"
    if land is None:
        whole = grid.goes_around and np.ptp(grid.latitude) > 150.0
        if whole and not undefined.any():
            raise ValueError(f"'{name}' has a value at every point of the globe, but there is land; {advice}.")
        return
    if land.min() < -0.01 or land.max() > 1.01 or not np.isfinite(land).all():
        raise ValueError(
            f"'land_sea_mask' has values from {land.min():g} to {land.max():g}, expected 0 (sea) to 1 (land); convert "
            "it."
        )
    for what, points, wrong in (("land", land > 0.9, ~undefined), ("sea", land < 0.1, undefined)):
        share = float(wrong[points].mean()) if points.any() else 0.0
        if share > 0.5:
            has = "values" if what == "land" else "no values"
            raise ValueError(f"'{name}' has {has} at {share:.0%} of the points over {what}; {advice}.")


def check_against_statistics(
    states: Float[np.ndarray, "time latitude longitude channel"],
    layout: Layout,
    mean: Float[np.ndarray, " channel"],
    stddev: Float[np.ndarray, " channel"],
    owner: str,
) -> None:
    """Check states against the statistics of a prior's training data.

    Args:
        states: states in the units of the layout.
        layout: layout of the states, with variables.
        mean: mean of each channel in training.
        stddev: standard deviation of each channel in training.
        owner: name of what the states are for, in messages.

    Raises:
        ValueError: the mean of a channel over the grid is further than `FAR` standard deviations from its mean in
            training. The message names the variable, the level and both means.
    """
    defined = np.ones(layout.shape, bool)
    names = []
    for variable in layout.variables:
        names += [(variable.name, variable.units, f" at {level} hPa") for level in variable.levels]
        names += [] if variable.levels else [(variable.name, variable.units, "")]
        if variable.undefined is not None:
            defined[..., layout.channels(variable.name)] = ~variable.undefined.mask()[..., None]
    found = np.asarray(np.mean(states, axis=(0, 1, 2), where=defined[None], dtype=np.float64))
    for (name, units, level), got, expected, sd in zip(names, found.tolist(), mean, stddev, strict=True):
        if not abs(got - expected) <= FAR * sd:
            raise ValueError(
                f"'{name}'{level} has the mean {got:.4g}, but {expected:.4g} with a standard deviation of {sd:.3g} "
                f"{units} in the training data of {owner}; check its unit and its missing values."
            )
