"""Common treatment of numpy and xarray arguments: axes by position or by name, results of the same kind.

Diagnostics convert their arguments to `xarray.DataArray`s, compute by name, and convert the result back.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import broadcasts, real_values, shown

if TYPE_CHECKING:
    import xarray

Axis = int | str | Sequence[int | str] | None
"""Axes of the truth, which has no axis of members: positions for numpy, names for xarray, None for all axes."""


def position(axis: Any, name: str, count: int) -> int:
    """Check that `axis` is a position, as an axis of a numpy array must be, and return it.

    Args:
        axis: the argument.
        name: name of the argument.
        count: number of axes of the array.

    Raises:
        TypeError: `axis` is neither a whole number nor a name.
        ValueError: `axis` is a name, or the array has no such axis.
    """
    if isinstance(axis, str):
        raise ValueError(f"'{axis}' is the name of an axis, but axes of numpy arrays have no names; give an integer.")
    if isinstance(axis, bool) or not isinstance(axis, numbers.Integral):
        raise TypeError(f"{name}={shown(axis)} is no axis; give the position of one axis, a whole number.")
    axis = int(axis)
    if not -count <= axis < count:
        raise ValueError(f"{name}={axis} is not among the {count} axes of the array; give a position that it has.")
    return axis


def is_labeled(value: Any) -> bool:
    """Whether `value` is an `xarray.DataArray`."""
    import xarray

    return isinstance(value, xarray.DataArray)


def real(values: xarray.DataArray, what: str) -> xarray.DataArray:
    """Convert a `DataArray` to double precision.

    Args:
        values: the array.
        what: what it is, for the message.

    Raises:
        TypeError: it holds no real numbers.
    """
    return values.copy(data=real_values(values.values, what))


def named(values: Any, what: str) -> xarray.DataArray:
    """Convert to a `DataArray` in double precision; the axes of a numpy array get the names axis_0, axis_1, ...

    Args:
        values: the array.
        what: what it is, for the message.

    Raises:
        TypeError: it is no array of real numbers.
    """
    import xarray

    if is_labeled(values):
        return real(values, what)
    values = real_values(values, what)
    return xarray.DataArray(values, dims=[f"axis_{i}" for i in range(values.ndim)])


def axis_names(axis: Any, dims: Sequence[str], labeled: bool, whose: str = "the truth") -> list[str]:
    """Names of the axes `axis` among `dims`.

    Args:
        axis: axes by name if the array is labeled, otherwise by position; None for all axes.
        dims: names of all axes.
        labeled: whether the caller's array is an `xarray.DataArray`.
        whose: name of the array in the error message.

    Raises:
        TypeError: `axis` is neither a name, a position nor several of these.
        ValueError: an axis is not among `dims`, or is given twice.
    """
    if axis is None:
        return list(dims)
    axes = [axis] if isinstance(axis, (numbers.Integral, str)) else axis
    if not isinstance(axes, Iterable) or isinstance(axes, Mapping):
        raise TypeError(f"axis {shown(axis)} is neither a position nor a name; give an axis of {whose}, or several.")
    axes = list(axes)
    known: dict[Any, str] = {name: name for name in dims}
    if not labeled:
        known = {i: name for k, name in enumerate(dims) for i in (k, k - len(dims))}

    def fits(i: Any) -> bool:
        return isinstance(i, (numbers.Integral, str)) and not isinstance(i, bool) and i in known

    if wrong := [i for i in axes if not fits(i)]:
        raise ValueError(f"axis {wrong} is not among those of {whose}: {list(known)}.")
    found = [known[i] for i in axes]
    if len(set(found)) < len(found):
        raise ValueError(f"axis {shown(axis)} names an axis of {whose} twice; give each one once.")
    return found


def one_axis(axis: Any, name: str, dims: Sequence[str], labeled: bool, whose: str) -> str:
    """Name of the single axis `axis` among `dims`; arguments as those of `axis_names`.

    Args:
        axis: the argument.
        name: name of the argument.
        dims: names of all axes.
        labeled: whether the caller's array is an `xarray.DataArray`.
        whose: name of the array in the error message.

    Raises:
        TypeError: `axis` is neither a name nor a position.
        ValueError: there is no such axis, or `axis` is not one axis.
    """
    found = [] if axis is None else axis_names(axis, dims, labeled, whose)
    if len(found) != 1:
        raise ValueError(f"{name}={shown(axis)} is not one axis; give a single axis of {whose}.")
    return found[0]


def broadcast(values: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Broadcast a numpy array of real numbers to a shape.

    Args:
        values: the array.
        shape: shape of the result.
        what: what the array is, for the message.

    Raises:
        TypeError: the values are no real numbers.
        ValueError: the array does not broadcast to the shape.
    """
    array = real_values(values, what)
    if not broadcasts(array.shape, shape):
        raise ValueError(f"{what} has the shape {array.shape}, which does not broadcast to {shape}; give that shape.")
    return np.broadcast_to(array, shape)


def require_same_labels(**arrays: xarray.DataArray) -> None:
    """Raise an error if labeled arrays differ in their coordinates or sizes along an axis that they share.

    xarray by itself would keep only the points in common.

    Args:
        **arrays: arrays by what they are called in the message.

    Raises:
        ValueError: they differ; the message names the axis.
    """
    import xarray

    (first, of_first), *others = arrays.items()
    for name, of_other in others:
        for axis in of_first.dims:
            if axis not in of_other.dims:
                continue
            pair = [a.indexes.get(axis) for a in (of_first, of_other)]
            same = of_first.sizes[axis] == of_other.sizes[axis]
            if same and pair[0] is not None and pair[1] is not None:
                same = pair[0].equals(pair[1])
            if not same:
                raise ValueError(
                    f"the {first} and the {name} have other points along '{axis}'; select the points in common, or "
                    "correct the coordinate."
                )
    xarray.align(*arrays.values(), join="exact")


def check_weights(weights: np.ndarray) -> None:
    """Check that weights of a mean are finite and not negative.

    Raises:
        ValueError: one is negative, NaN or infinite.
    """
    if not np.all((weights >= 0) & np.isfinite(weights)):
        raise ValueError("the weights hold negative or non-finite numbers; give weights of 0 or more.")


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
        whose: what the truth is called in messages.
        alone: whether the truth may be None.

    Raises:
        ValueError: axes, shapes or coordinates do not fit, a weight is negative or not finite, or there are no members.
        TypeError: numpy arrays and xarray arrays are mixed, or an argument is no array of real numbers.
    """

    def __init__(
        self, ensemble: Any, truth: Any, member: int | str, weights: Any, *, whose: str = "truth", alone: bool = False
    ) -> None:
        import xarray

        self.labeled = is_labeled(ensemble)
        self.whose = f"the {whose}"
        if truth is None and not alone:
            raise TypeError(f"{self.whose} is None; give an array of real numbers, with NaN for what is missing.")
        for name, other in ((whose, truth), ("weights", weights)):
            if other is not None and is_labeled(other) != self.labeled:
                raise TypeError(f"ensemble and {name}: give both as numpy arrays or both as xarray.DataArray.")
        if self.labeled:
            if not isinstance(member, str) or member not in ensemble.dims:
                raise ValueError(f"member={member!r} is not a dimension of the ensemble, which has {ensemble.dims}.")
            # Coordinates along the axis of members are not needed, and could clash with its new name.
            extra = [name for name, coordinate in ensemble.coords.items() if member in coordinate.dims]
            self.members = real(ensemble.drop_vars(extra).rename({member: "member"}), "the ensemble")
        else:
            values = real_values(ensemble, "the ensemble")
            values = np.moveaxis(values, position(member, "member", values.ndim), 0)
            names = [f"axis_{i}" for i in range(values.ndim - 1)]
            self.members = xarray.DataArray(values, dims=["member", *names])
        if self.members.sizes["member"] < 1:
            raise ValueError("the ensemble has no members; give one or more.")
        dims = [str(name) for name in self.members.dims if name != "member"]
        if truth is None:
            # Where all members are NaN the field is undefined, such as sea surface temperature on land.
            self.truth = self.members.isel(member=0)
            self.valid = self.members.notnull().any("member")
        else:
            self.truth = real(truth, self.whose) if self.labeled else self._given(truth, dims)
            self.valid = self.truth.notnull()
        sizes = {name: self.members.sizes[name] for name in dims}
        if dict(self.truth.sizes) != sizes:
            raise ValueError(f"the members have the axes {sizes}, but {self.whose} has {dict(self.truth.sizes)}.")
        if weights is None:
            self.weights = xarray.ones_like(self.truth)
        elif self.labeled:
            self.weights = real(weights, "the array of weights")
            if extra := sorted(str(name) for name in set(weights.dims) - set(dims)):
                raise ValueError(f"weights have axes {extra}, which are not among those of {self.whose}, {dims}.")
        else:
            self.weights = self.truth.copy(data=broadcast(weights, self.truth.shape, "the array of weights"))
        check_weights(self.weights.values)
        require_same_labels(ensemble=self.members, **{whose: self.truth}, weights=self.weights)
        self.members, self.truth = self.members.transpose("member", *dims), self.truth.transpose(*dims)
        self.valid = self.valid.transpose(*dims)

    def _given(self, values: Any, dims: list[str]) -> xarray.DataArray:
        """Give a numpy array the names of the truth's axes."""
        import xarray

        values = real_values(values, self.whose)
        if values.ndim != len(dims):
            raise ValueError(f"the members have {len(dims)} axes each, but {self.whose} has {values.ndim}.")
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
        return axis_names(axis, [str(name) for name in self.truth.dims], self.labeled, self.whose)

    def answer(self, score: xarray.DataArray) -> Any:
        """Convert a score to the kind of array that the ensemble was given as."""
        return answer(score, self.labeled)
