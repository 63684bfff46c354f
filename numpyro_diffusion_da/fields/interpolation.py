"""Where wanted values lie along an axis that has others: grid points, and times and levels.

Of numbers alone: what the axes belong to is for `gridded_data`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

SAME_POINT = 1e-3
"""Degrees within which two grid points are one: float32 coordinates of fractions of a degree differ by 1e-5."""


class AxisWeights(NamedTuple):
    """Where target points lie along an axis of a dataset: between two of its points, or (weight 0) on one."""

    lower: np.ndarray
    upper: np.ndarray
    weight: np.ndarray  # of upper

    @property
    def needed(self) -> np.ndarray:
        """Positions in the dataset that are used, ascending."""
        return np.unique(np.concatenate([self.lower, self.upper]))

    def apply(self, values: np.ndarray, axis: int) -> np.ndarray:
        """From values at `needed` to values at the target points."""
        lower = np.take(values, np.searchsorted(self.needed, self.lower), axis)
        if not self.weight.any():
            return lower
        upper = np.take(values, np.searchsorted(self.needed, self.upper), axis)
        weight = self.weight.astype(values.dtype).reshape(-1, *(1,) * (-axis - 1))
        # A point of the dataset keeps its value whatever its neighbor is, NaN included.
        return np.where(weight == 0, lower, (1 - weight) * lower + weight * upper)


def locate(source: np.ndarray, name: str, target: np.ndarray, interpolate: bool) -> AxisWeights:
    """Where target points are along an axis of a dataset, degrees; "longitude" goes round the globe.

    Raises:
        ValueError: one is not among the dataset's points, and may not be (or cannot be) interpolated.
    """
    periodic = name == "longitude"
    apart = np.abs(source[:, None] - target)
    if periodic:
        apart = np.abs((apart + 180.0) % 360.0 - 180.0)
    nearest = apart.argmin(0)
    off = apart.min(0) > SAME_POINT
    if not off.any():
        return AxisWeights(nearest, nearest, np.zeros(target.size))
    between = (
        f"the dataset's {name} is {_span(source)}, but the state's is {_span(target)}, "
        f"and {int(off.sum())} of these are not among them"
    )
    if not interpolate:
        raise ValueError(f"{between}; give a dataset that has them, or interpolate bilinearly by interpolate=True.")
    order = np.argsort(np.mod(source, 360.0) if periodic else source)
    ascending = source[order]
    if periodic:
        ascending, target = np.mod(ascending, 360.0), np.mod(target, 360.0)
    after = np.searchsorted(ascending, target, side="right")
    lower, upper = (after - 1) % source.size, after % source.size
    gap, beyond = ascending[upper] - ascending[lower], target - ascending[lower]
    if periodic:
        gap, beyond = gap % 360.0, beyond % 360.0
    # The gap from the last point back to the first is one of the grid's only where it goes round the globe.
    usual = np.median(np.diff(ascending)) if source.size > 1 else 0.0
    if (off & ((gap <= 0) | (gap > 1.5 * usual if periodic else False))).any():
        raise ValueError(f"{between} and some lie outside; nothing is extrapolated: give a dataset that covers them.")
    weight = np.where(off, beyond / np.where(off, gap, 1.0), 0.0)
    return AxisWeights(np.where(off, order[lower], nearest), np.where(off, order[upper], nearest), weight)


def positions(has: np.ndarray, wanted: np.ndarray, needed: str, what: str, do: str) -> np.ndarray:
    """Positions of wanted values.

    Raises:
        ValueError: one is missing, or there more than once.
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
    """Positions as a slice where they are regular: archives load slices in one piece."""
    steps = np.unique(np.diff(at))
    if at.size == 0 or steps.size > 1 or (steps.size == 1 and steps[0] <= 0):
        return at
    return slice(int(at[0]), int(at[-1]) + 1, int(steps[0]) if steps.size else 1)


def _word(value: Any) -> str:
    return str(value.astype("datetime64[m]")) if isinstance(value, np.datetime64) else f"{value:g}"


def words(values: np.ndarray) -> str:
    """A few values, or the ends of many."""
    values = np.asarray(values)
    if values.size <= 8:
        return ", ".join(_word(v) for v in values) or "none"
    return f"{_word(values[0])} ... {_word(values[-1])} ({values.size})"


def _span(values: np.ndarray) -> str:
    step = f" by {abs(values[1] - values[0]):g}" if values.size > 1 else ""
    return f"{values[0]:g} to {values[-1]:g}{step} ({values.size} points)"
