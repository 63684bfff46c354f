"""Positions of wanted values along the axes of a dataset: grid points, times and levels.

The functions take plain arrays. `datasets` applies them to the axes of an `xarray.Dataset`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from numpyro_diffusion_da.spelling import spelled

SAME_POINT = 1e-3
"""Largest distance, in degrees, at which two grid points count as the same.

Coordinates at fractions of a degree differ by about 1e-5 if one of them is float32.
"""


def check_axis(values: Any, name: str, whose: str = "") -> Float[np.ndarray, " n"]:
    """Check the latitudes or the longitudes of a grid.

    Args:
        values: the values, in degrees.
        name: "latitude" or "longitude".
        whose: words before the name in messages, with a space at the end.

    Returns:
        The values in double precision.

    Raises:
        ValueError: they are not one axis of finite numbers, are out of range, not in order, or repeat a value.
    """
    try:
        axis = np.asarray(values, float)
    except (TypeError, ValueError):
        axis = np.full(np.shape(values), np.nan)
    least, most = (-90.0, 90.0) if name == "latitude" else (-360.0, 720.0)
    rule = f"give {name}s in degrees, finite, from {least:g} to {most:g}, in order and each once"
    if axis.ndim != 1 or axis.size == 0:
        raise ValueError(f"the {whose}{name}s have shape {axis.shape}; {rule}.")
    wrong = ~(np.isfinite(axis) & (axis >= least - SAME_POINT) & (axis <= most + SAME_POINT))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        got = np.asarray(values, dtype=object).reshape(-1)[at]
        raise ValueError(f"the {whose}{name}s have the value {got} at position {at}; {rule}.")
    steps = np.diff(axis)
    if name == "longitude":
        # One jump back to the start of the circle is allowed.
        steps = np.diff(np.unwrap(axis, period=360.0))
        if abs(steps.sum()) > 360.0 + SAME_POINT:
            raise ValueError(
                f"the {whose}longitudes cover {abs(steps.sum()):g} degrees, more than once around; {rule}."
            )
    if not (np.all(steps > 0) or np.all(steps < 0)):
        at = int(np.flatnonzero(np.sign(steps) != np.sign(np.median(steps)))[0]) if np.any(steps) else 0
        raise ValueError(f"the {whose}{name}s go from {axis[at]:g} to {axis[at + 1]:g} at position {at}; {rule}.")
    return axis


class AxisWeights(NamedTuple):
    """Weights of linear interpolation from the points of an axis to target points.

    Attributes:
        lower: position on the axis of the point below each target.
        upper: position on the axis of the point above each target.
        weight: weight of the upper point; 0 where the target is the lower point.
    """

    lower: np.ndarray
    upper: np.ndarray
    weight: np.ndarray

    @property
    def needed(self) -> np.ndarray:
        """Positions on the axis that the interpolation uses, ascending."""
        return np.unique(np.concatenate([self.lower, self.upper]))

    def apply(self, values: np.ndarray, axis: int) -> np.ndarray:
        """Interpolate to the target points.

        Args:
            values: values at the positions `needed` of one axis.
            axis: that axis, counted from the end (-1 for the last).
        """
        lower = np.take(values, np.searchsorted(self.needed, self.lower), axis)
        if not self.weight.any():
            return lower
        upper = np.take(values, np.searchsorted(self.needed, self.upper), axis)
        weight = self.weight.astype(values.dtype).reshape(-1, *(1,) * (-axis - 1))
        # On a point of the dataset the value is that point's, even where the neighboring value is NaN.
        return np.where(weight == 0, lower, (1 - weight) * lower + weight * upper)


def locate(source: np.ndarray, name: str, target: np.ndarray, interpolate: bool) -> AxisWeights:
    """Find the interpolation weights of target points on an axis of a dataset.

    Args:
        source: points of the dataset's axis, degrees.
        name: name of the axis. "longitude" is periodic.
        target: wanted points, degrees.
        interpolate: whether a target may lie between two points of the dataset.

    Returns:
        Weights of each target.

    Raises:
        ValueError: a target is not a point of the dataset, and `interpolate` is False or the target lies outside.
    """
    periodic = name == "longitude"
    source, target = check_axis(source, name, "dataset's "), np.asarray(target, float)
    apart = np.abs(source[:, None] - target)
    if periodic:
        apart = np.abs((apart + 180.0) % 360.0 - 180.0)
    nearest = apart.argmin(0)
    # Written this way round, the comparison does not pass by a NaN.
    off = ~(apart.min(0) <= SAME_POINT)
    if not off.any():
        return AxisWeights(nearest, nearest, np.zeros(target.size))
    between = (
        f"the dataset's {name} is {_span(source)}, but the state's is {_span(target)}, "
        f"and {int(off.sum())} of these points are not in the dataset"
    )
    if not interpolate:
        how = spelled("interpolate", True)
        raise ValueError(f"{between}; give a dataset that has them{how and f', or interpolate bilinearly with {how}'}.")
    order = np.argsort(np.mod(source, 360.0) if periodic else source)
    ascending = source[order]
    if periodic:
        ascending, target = np.mod(ascending, 360.0), np.mod(target, 360.0)
    after = np.searchsorted(ascending, target, side="right")
    lower, upper = (after - 1) % source.size, after % source.size
    gap, beyond = ascending[upper] - ascending[lower], target - ascending[lower]
    if periodic:
        gap, beyond = gap % 360.0, beyond % 360.0
    # On a regional grid, the gap from the last longitude back to the first is too wide to interpolate across.
    usual = np.median(np.diff(ascending)) if source.size > 1 else 0.0
    if (off & ((gap <= 0) | (gap > 1.5 * usual if periodic else False))).any():
        raise ValueError(f"{between}, and some lie outside; nothing is extrapolated: give a dataset that covers them.")
    weight = np.where(off, beyond / np.where(off, gap, 1.0), 0.0)
    return AxisWeights(np.where(off, order[lower], nearest), np.where(off, order[upper], nearest), weight)


def positions(has: np.ndarray, wanted: np.ndarray, needed: str, what: str, do: str) -> np.ndarray:
    """Find the positions of wanted values in an array.

    Args:
        has: the available values.
        wanted: the wanted values.
        needed: how the message begins, for instance "'temperature' is needed at".
        what: name of one value in the message, for instance "level".
        do: what the message advises.

    Returns:
        Index into `has` of each wanted value.

    Raises:
        ValueError: a wanted value is missing or occurs more than once.
    """
    missing = wanted[~np.isin(wanted, has)]
    if missing.size:
        many = f" and {missing.size - 1} more" if missing.size > 1 else ""
        raise ValueError(f"{needed} {what} {_word(missing[0])}{many}, but the dataset has {what}s {words(has)}; {do}.")
    order = np.argsort(has, kind="stable")
    at = np.searchsorted(has, wanted, sorter=order)
    twice = np.searchsorted(has, wanted, side="right", sorter=order) - at > 1
    if twice.any():
        raise ValueError(f"the dataset has {what} {_word(wanted[twice][0])} more than once; keep one of them.")
    return order[at]


def as_slice(at: np.ndarray) -> slice | np.ndarray:
    """Convert positions to a slice if they are equally spaced, because archives load a slice in one piece."""
    steps = np.unique(np.diff(at))
    if at.size == 0 or steps.size > 1 or (steps.size == 1 and steps[0] <= 0):
        return at
    return slice(int(at[0]), int(at[-1]) + 1, int(steps[0]) if steps.size else 1)


def _word(value: Any) -> str:
    return str(value.astype("datetime64[m]")) if isinstance(value, np.datetime64) else f"{value:g}"


def words(values: np.ndarray) -> str:
    """Text that lists up to eight values. Of more values it says the first, the last and their number."""
    values = np.asarray(values)
    if values.size <= 8:
        return ", ".join(_word(v) for v in values) or "none"
    return f"{_word(values[0])} ... {_word(values[-1])} ({values.size})"


def _span(values: np.ndarray) -> str:
    step = f" by {abs(values[1] - values[0]):g}" if values.size > 1 else ""
    return f"{values[0]:g} to {values[-1]:g}{step} ({values.size} points)"
