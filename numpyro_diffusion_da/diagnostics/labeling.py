"""Arrays by position or by name as one: numpy's and xarray's, worked on alike and answered in kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray

Axis = int | str | Sequence[int | str] | None
"""Axes of the truth (without that of the members): positions for numpy, names for xarray; None for all of them."""


def position(axis: int | str) -> int:
    """The axis of a numpy array, which has no names."""
    if isinstance(axis, str):
        raise ValueError(f"'{axis}' is the name of an axis; numpy arrays have positions: give an integer.")
    return axis


def is_labeled(value: Any) -> bool:
    """Whether it is an `xarray.DataArray`."""
    import xarray

    return isinstance(value, xarray.DataArray)


def named(values: Any) -> xarray.DataArray:
    """As a `DataArray` in double precision; the axes of a numpy array are named by their position."""
    import xarray

    if is_labeled(values):
        return values.astype(float)
    values = np.asarray(values, float)
    return xarray.DataArray(values, dims=[f"axis_{i}" for i in range(values.ndim)])


def axis_names(axis: Axis, dims: Sequence[str], labeled: bool, whose: str = "the truth") -> list[str]:
    """Names of axes among `dims`, each given by its name, or by its position where nothing is labeled.

    Raises:
        ValueError: one that is not there.
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
    """Labeled or not, as what it was made of; a number where numpy arrays leave no axis."""
    if labeled:
        return score
    return score.item() if score.ndim == 0 else score.values


class EnsembleCase:
    """Members, truth and weights as `DataArray`s in double precision, whatever they were given as.

    Axes of numpy arrays are named by their position in the truth; the members' axis is always named "member".
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
            # The number of a member is of no use here, and would clash with the new name of its axis.
            numbers = [name for name, coordinate in ensemble.coords.items() if member in coordinate.dims]
            self.members = ensemble.drop_vars(numbers).rename({member: "member"}).astype(float)
        else:
            values = np.moveaxis(np.asarray(ensemble, float), position(member), 0)
            names = [f"axis_{i}" for i in range(values.ndim - 1)]
            self.members = xarray.DataArray(values, dims=["member", *names])
        dims = [str(name) for name in self.members.dims if name != "member"]
        if truth is None:
            # A point that no member has, as land in a sea surface temperature, is no point of the field.
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
        # By default xarray would silently keep the points in common.
        aligned = xarray.align(self.members, self.truth, self.valid, self.weights, join="exact")
        self.members, self.truth, self.valid, self.weights = aligned
        self.members, self.truth = self.members.transpose("member", *dims), self.truth.transpose(*dims)
        self.valid = self.valid.transpose(*dims)

    def _given(self, values: Any, dims: list[str]) -> xarray.DataArray:
        import xarray

        values = np.asarray(values, float)
        if values.ndim != len(dims):
            raise ValueError(f"the members have {len(dims)} axes each, but the truth has {values.ndim}.")
        return xarray.DataArray(values, dims=dims)

    def require_two_members(self) -> None:
        """Refuse what has no spread."""
        if self.members.sizes["member"] < 2:
            raise ValueError("this score needs at least two members.")

    def squared_error(self) -> xarray.DataArray:
        """Of the ensemble mean."""
        return (self.members.mean("member", skipna=False) - self.truth) ** 2

    def variance(self) -> xarray.DataArray:
        """Unbiased variance of the members times (M + 1) / M."""
        self.require_two_members()
        m = self.members.sizes["member"]
        return (m + 1) / m * self.members.var("member", ddof=1, skipna=False)

    def mean(self, values: xarray.DataArray, axis: Axis) -> xarray.DataArray:
        """Weighted mean over the axes of the points that count."""
        dims = self.axes(axis)
        weights = self.weights.where(self.valid, 0.0)
        total = (values.where(self.valid, 0.0) * weights).sum(dims, skipna=False)
        weight = weights.sum(dims)
        return total / weight.where(weight > 0)

    def axes(self, axis: Axis) -> list[str]:
        """Names of axes of the truth; all of them for None."""
        return axis_names(axis, [str(name) for name in self.truth.dims], self.labeled)

    def answer(self, score: xarray.DataArray) -> Any:
        """In the kind of the ensemble."""
        return answer(score, self.labeled)
