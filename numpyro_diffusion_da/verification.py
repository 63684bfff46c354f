"""Scores of an ensemble against the truth or observations.

All take numpy arrays, with axes by position, or `xarray.DataArray`, with axes by name, and answer in kind. M is the
number of members. Averages are weighted means over `axis`, of squares first with the root last.

A point whose truth is NaN is left out (a missing observation, land in a sea surface temperature); a NaN member where
there is a truth makes the score NaN, so that a failed forecast is seen.

Against observations, give members with the observation error added: `posterior_predictive` of a filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray

Axis = int | str | Sequence[int | str] | None
"""Axes of the truth (without that of the members): positions for numpy, names for xarray; None for all of them."""


def rmse(ensemble: Any, truth: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    """Root mean squared error of the ensemble mean, in the unit of the state.

    Args:
        ensemble: members; one axis more than the truth.
        truth: what they are scored against.
        member: the members' axis: position in `ensemble` for numpy, name for xarray.
        axis: axes of the truth that are averaged over; all by default.
        weights: of the mean, not negative, for instance `area_weights`. For numpy it broadcasts against the truth.

    Raises:
        ValueError: shapes or axes that do not fit.
        TypeError: numpy arrays mixed with xarray's.
    """
    case = _Case(ensemble, truth, member, weights)
    return case.answer(case.mean(case.squared_error(), axis) ** 0.5)


def spread(ensemble: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    """Spread of the ensemble, comparable with the RMSE of its mean: sqrt((M + 1) / M mean variance).

    The variance is the unbiased one. The factor makes up for the error of the mean of M members, so that spread / RMSE
    is 1 for a calibrated ensemble of any size (Fortin et al. 2014, J. Hydrometeorol. 15, 1708).

    Args:
        ensemble: members, at least 2. Points where all are NaN are left out.
        member: see `rmse`.
        axis: see `rmse`.
        weights: see `rmse`.

    Raises:
        ValueError: see `rmse`, and fewer than two members.
        TypeError: see `rmse`.
    """
    case = _Case(ensemble, None, member, weights)
    return case.answer(case.mean(case.variance(), axis) ** 0.5)


def spread_skill(ensemble: Any, truth: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    """Spread / RMSE over the same points: 1 calibrated, below 1 overconfident.

    Arguments and errors as `rmse`; at least two members.
    """
    case = _Case(ensemble, truth, member, weights)
    return case.answer((case.mean(case.variance(), axis) / case.mean(case.squared_error(), axis)) ** 0.5)


def crps(ensemble: Any, truth: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    """Mean continuous ranked probability score, in the unit of the state; lower is better.

    The fair estimate mean |x_i - y| - sum_ij |x_i - x_j| / (2 M (M - 1)), which does not favour larger ensembles.

    Arguments and errors as `rmse`; at least two members. ``axis=()`` gives the score of every point.
    """
    import scoringrules

    case = _Case(ensemble, truth, member, weights)
    case.require_two_members()
    members = case.members.transpose(..., "member")
    # "pwm" is the fair estimate (Zamo & Naveau 2018) by sorting: M log M operations, where "fair" makes all M^2 pairs.
    score = scoringrules.crps_ensemble(case.truth.values, members.values, estimator="pwm", backend="numpy")
    return case.answer(case.mean(case.truth.copy(data=score), axis))


def rank_histogram(ensemble: Any, truth: Any, *, member: int | str = 0) -> np.ndarray:
    """How often the truth has each rank among the members, over all points: flat for a calibrated ensemble.

    U-shaped: too little spread; a hump: too much; a slope: bias. Ties (a variable bounded at zero) are counted in equal
    parts on the ranks that they could have.

    Args:
        ensemble: see `rmse`.
        truth: see `rmse`.
        member: see `rmse`.

    Returns:
        counts, shape (M + 1,): the number of points with 0, 1, ..., M members below the truth. They sum to the number
        of points that are not missing.

    Raises:
        ValueError: see `rmse`, and a NaN member where there is a truth.
        TypeError: see `rmse`.
    """
    case = _Case(ensemble, truth, member, None)
    m = case.members.sizes["member"]
    valid = case.valid.values.reshape(-1)
    members = case.members.transpose("member", ...).values.reshape(m, -1)[:, valid]
    values = case.truth.values.reshape(-1)[valid]
    if np.isnan(members).any():
        raise ValueError("rank_histogram has NaN members where the truth is given; a NaN has no rank.")
    below = np.sum(members < values, axis=0)
    ties = np.sum(members == values, axis=0)
    share = 1.0 / (ties + 1)
    # Each point adds its share to the ranks below, ..., below + ties: as steps up and down, summed afterwards.
    steps = np.bincount(below, share, m + 2) - np.bincount(below + ties + 1, share, m + 2)
    return np.cumsum(steps)[: m + 1]


def area_weights(latitude: Any) -> Any:
    """Area of grid cells, from the sines of their edges, with mean 1.

    sin(top) - sin(bottom), the edges being halfway between cell centres. The first and last cell reach as far beyond
    their centre as the half cell inside; to the pole, where the next centre would lie beyond it.

    Args:
        latitude: cell centres, in degrees north, ascending or descending, shape (n,).

    Returns:
        Weights, shape (n,), of the same kind as `latitude`.

    Raises:
        ValueError: not one axis of at least one value, not monotonic, or outside -90 to 90.
    """
    values = np.asarray(latitude, float)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"area_weights takes the latitudes along one axis; got the shape {values.shape}.")
    if not np.all(np.abs(values) <= 90.0):
        raise ValueError("area_weights takes latitudes in degrees from -90 to 90; some lie outside or are NaN.")
    weights = np.ones(1)
    if values.size > 1:
        steps = np.diff(values)
        if not (np.all(steps > 0) or np.all(steps < 0)):
            raise ValueError("area_weights takes latitudes that only rise or only fall; these do not.")
        ends = [_outer_edge(values[0], -steps[0]), _outer_edge(values[-1], steps[-1])]
        edges = np.concatenate([ends[:1], values[:-1] + steps / 2, ends[1:]])
        weights = np.abs(np.diff(np.sin(np.deg2rad(edges))))
        weights = weights / weights.mean()
    return latitude.copy(data=weights) if _is_labelled(latitude) else weights


def _outer_edge(centre: float, step: float) -> float:
    if abs(centre + step) > 90.0:
        return float(np.copysign(90.0, step))
    return centre + step / 2


def _position(axis: int | str) -> int:
    if isinstance(axis, str):
        raise ValueError(f"'{axis}' is the name of an axis; numpy arrays have positions: give an integer.")
    return axis


def _is_labelled(value: Any) -> bool:
    import xarray

    return isinstance(value, xarray.DataArray)


class _Case:
    """Members, truth and weights as `DataArray`s in double precision, whatever they were given as.

    Axes of numpy arrays are named by their position in the truth; the members' axis is always named "member".
    """

    def __init__(self, ensemble: Any, truth: Any, member: int | str, weights: Any) -> None:
        import xarray

        self.labelled = _is_labelled(ensemble)
        for name, other in (("truth", truth), ("weights", weights)):
            if other is not None and _is_labelled(other) != self.labelled:
                raise TypeError(f"ensemble and {name}: give both as numpy arrays or both as xarray.DataArray.")
        if self.labelled:
            if member not in ensemble.dims:
                raise ValueError(f"member={member!r} is not a dimension of the ensemble, which has {ensemble.dims}.")
            # The number of a member is of no use here, and would clash with the new name of its axis.
            numbers = [name for name, coordinate in ensemble.coords.items() if member in coordinate.dims]
            self.members = ensemble.drop_vars(numbers).rename({member: "member"}).astype(float)
        else:
            values = np.moveaxis(np.asarray(ensemble, float), _position(member), 0)
            names = [f"axis_{i}" for i in range(values.ndim - 1)]
            self.members = xarray.DataArray(values, dims=["member", *names])
        dims = [str(name) for name in self.members.dims if name != "member"]
        if truth is None:
            # A point that no member has, as land in a sea surface temperature, is no point of the field.
            self.truth = self.members.isel(member=0)
            self.valid = self.members.notnull().any("member")
        else:
            self.truth = truth.astype(float) if self.labelled else self._given(truth, dims)
            self.valid = self.truth.notnull()
        sizes = {name: self.members.sizes[name] for name in dims}
        if dict(self.truth.sizes) != sizes:
            raise ValueError(f"the members have the axes {sizes}, but the truth has {dict(self.truth.sizes)}.")
        if weights is None:
            self.weights = xarray.ones_like(self.truth)
        elif self.labelled:
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
        dims = self.truth.dims if axis is None else self._axes(axis)
        weights = self.weights.where(self.valid, 0.0)
        total = (values.where(self.valid, 0.0) * weights).sum(dims, skipna=False)
        weight = weights.sum(dims)
        return total / weight.where(weight > 0)

    def _axes(self, axis: int | str | Sequence[int | str]) -> list[str]:
        axes = [axis] if isinstance(axis, (int, str)) else list(axis)
        known = {name: name for name in self.truth.dims}
        if not self.labelled:
            known = {i: name for k, name in enumerate(self.truth.dims) for i in (k, k - self.truth.ndim)}
        if wrong := [i for i in axes if i not in known]:
            raise ValueError(f"axis {wrong} is not among those of the truth: {list(known)}.")
        return [str(known[i]) for i in axes]

    def answer(self, score: xarray.DataArray) -> Any:
        """In the kind of the ensemble; a number where numpy arrays leave no axis."""
        if self.labelled:
            return score
        return score.item() if score.ndim == 0 else score.values
