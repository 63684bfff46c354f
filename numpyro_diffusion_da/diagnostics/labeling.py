"""Common treatment of numpy and xarray arguments: axes by position or by name, results of the same kind.

Diagnostics convert their arguments to `xarray.DataArray`s, compute by name, and convert the result back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray

Axis = int | str | Sequence[int | str] | None
"""Axes of the truth, which has no axis of members: positions for numpy, names for xarray, None for all axes."""


def position(axis: int | str) -> int:
    """Check that `axis` is a position, as an axis of a numpy array must be, and return it.

    Raises:
        ValueError: `axis` is a name.
    """
    if isinstance(axis, str):
        raise ValueError(f"'{axis}' is the name of an axis, but axes of numpy arrays have no names; give an integer.")
    return axis


def is_labeled(value: Any) -> bool:
    """Whether `value` is an `xarray.DataArray`."""
    import xarray

    return isinstance(value, xarray.DataArray)


def named(values: Any) -> xarray.DataArray:
    """Convert to a `DataArray` in double precision; the axes of a numpy array get the names axis_0, axis_1, ..."""
    import xarray

    if is_labeled(values):
        return values.astype(float)
    values = np.asarray(values, float)
    return xarray.DataArray(values, dims=[f"axis_{i}" for i in range(values.ndim)])


def axis_names(axis: Axis, dims: Sequence[str], labeled: bool, whose: str = "the truth") -> list[str]:
    """Names of the axes `axis` among `dims`.

    Args:
        axis: axes by name if the array is labeled, otherwise by position; None for all axes.
        dims: names of all axes.
        labeled: whether the caller's array is an `xarray.DataArray`.
        whose: name of the array in the error message.

    Raises:
        ValueError: an axis is not among `dims`.
    """
    if axis is None:
        return list(dims)
    axes = [axis] if isinstance(axis, (int, str)) else list(axis)
    known: dict[int | str, str] = {name: name for name in dims}
    if not labeled:
        known = {i: name for k, name in enumerate(dims) for i in (k, k - len(dims))}
    if wrong := [i for i in axes if i not in known]:
        raise ValueError(f"axis {wrong} is not among those of {whose}: {list(known)}.")
    return [known[i] for i in axes]


def answer(score: xarray.DataArray, labeled: bool) -> Any:
    """Convert a score to the kind of the caller's arrays: `DataArray`, numpy array, or a number if no axis is left."""
    if labeled:
        return score
    return score.item() if score.ndim == 0 else score.values


class EnsembleCase:
    """Ensemble, truth and weights of a score as aligned `DataArray`s in double precision.

    The axes of numpy arrays are named by their position in the truth: axis_0, axis_1, ... The axis of the members is
    always named "member".

    Args:
        ensemble: members; the axes of the truth and one axis of members.
        truth: values that the members are scored against, NaN where missing. None to use the ensemble alone.
        member: axis of the members: its position in `ensemble` for numpy, its name for xarray.
        weights: weights of means over the axes of the truth; None for equal weights.

    Raises:
        ValueError: axes or shapes do not fit.
        TypeError: numpy arrays and xarray arrays are mixed.
    """

    def __init__(self, ensemble: Any, truth: Any, member: int | str, weights: Any) -> None:
        import xarray

        self.labeled = is_labeled(ensemble)
        for name, other in (("truth", truth), ("weights", weights)):
            if other is not None and is_labeled(other) != self.labeled:
                raise TypeError(f"ensemble and {name}: give both as numpy arrays or both as xarray.DataArray.")
        if self.labeled:
            if member not in ensemble.dims:
                raise ValueError(f"member={member!r} is not a dimension of the ensemble, which has {ensemble.dims}.")
            # Coordinates along the axis of members are not needed, and could clash with its new name.
            numbers = [name for name, coordinate in ensemble.coords.items() if member in coordinate.dims]
            self.members = ensemble.drop_vars(numbers).rename({member: "member"}).astype(float)
        else:
            values = np.moveaxis(np.asarray(ensemble, float), position(member), 0)
            names = [f"axis_{i}" for i in range(values.ndim - 1)]
            self.members = xarray.DataArray(values, dims=["member", *names])
        dims = [str(name) for name in self.members.dims if name != "member"]
        if truth is None:
            # Where all members are NaN the field is undefined, such as sea surface temperature on land.
            self.truth = self.members.isel(member=0)
            self.valid = self.members.notnull().any("member")
        else:
            self.truth = truth.astype(float) if self.labeled else self._given(truth, dims)
            self.valid = self.truth.notnull()
        sizes = {name: self.members.sizes[name] for name in dims}
        if dict(self.truth.sizes) != sizes:
            raise ValueError(f"the members have the axes {sizes}, but the truth has {dict(self.truth.sizes)}.")
        if weights is None:
            self.weights = xarray.ones_like(self.truth)
        elif self.labeled:
            self.weights = weights.astype(float)
        else:
            self.weights = self._given(np.broadcast_to(np.asarray(weights, float), self.truth.shape), dims)
        # Without join="exact" xarray would silently keep only the points in common.
        aligned = xarray.align(self.members, self.truth, self.valid, self.weights, join="exact")
        self.members, self.truth, self.valid, self.weights = aligned
        self.members, self.truth = self.members.transpose("member", *dims), self.truth.transpose(*dims)
        self.valid = self.valid.transpose(*dims)

    def _given(self, values: Any, dims: list[str]) -> xarray.DataArray:
        """Give a numpy array the names of the truth's axes."""
        import xarray

        values = np.asarray(values, float)
        if values.ndim != len(dims):
            raise ValueError(f"the members have {len(dims)} axes each, but the truth has {values.ndim}.")
        return xarray.DataArray(values, dims=dims)

    def require_two_members(self) -> None:
        """Raise if the ensemble has fewer than two members and so no spread.

        Raises:
            ValueError: there are fewer than two members.
        """
        if self.members.sizes["member"] < 2:
            raise ValueError(f"this score needs at least two members; got {self.members.sizes['member']}.")

    def squared_error(self) -> xarray.DataArray:
        """Squared error of the ensemble mean at each point."""
        return (self.members.mean("member", skipna=False) - self.truth) ** 2

    def variance(self) -> xarray.DataArray:
        """Unbiased variance of the members at each point, times (M + 1) / M.

        Raises:
            ValueError: there are fewer than two members.
        """
        self.require_two_members()
        m = self.members.sizes["member"]
        return (m + 1) / m * self.members.var("member", ddof=1, skipna=False)

    def mean(self, values: xarray.DataArray, axis: Axis) -> xarray.DataArray:
        """Weighted mean of `values` over `axis` at points that are not missing; NaN where all are missing."""
        dims = self.axes(axis)
        weights = self.weights.where(self.valid, 0.0)
        total = (values.where(self.valid, 0.0) * weights).sum(dims, skipna=False)
        weight = weights.sum(dims)
        return total / weight.where(weight > 0)

    def axes(self, axis: Axis) -> list[str]:
        """Names of the axes `axis` of the truth; None for all axes."""
        return axis_names(axis, [str(name) for name in self.truth.dims], self.labeled)

    def answer(self, score: xarray.DataArray) -> Any:
        """Convert a score to the kind of array that the ensemble was given as."""
        return answer(score, self.labeled)
