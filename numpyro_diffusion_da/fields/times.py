"""Time axes: conversion of dates to UTC, and checks of order and spacing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from numpyro_diffusion_da.arguments import shown


def utc_times(times: Any, what: str = "times") -> np.ndarray:
    """Convert dates to datetime64 in UTC.

    Args:
        times: one-dimensional list, index, iterator or array of dates: datetime64, ISO 8601 strings, `datetime`,
            pandas. Dates with a time zone are converted, dates without one are in UTC already.
        what: name of the argument in messages.

    Returns:
        Times, datetime64[ns], shape (time,).

    Raises:
        ValueError: the values are not dates along one axis, one of them is missing (NaT), or one cannot be represented.
    """
    import pandas

    advice = "give a list of dates, such as ['2019-03-29T12']"
    if isinstance(times, Iterator):
        times = list(times)
    if isinstance(times, pandas.PeriodIndex):
        times = times.to_timestamp()
    aware = isinstance(getattr(times, "dtype", None), pandas.DatetimeTZDtype)
    try:
        values = np.asarray(times) if not aware else np.asarray(times, dtype=object)
    except ValueError:  # lists of different lengths
        raise ValueError(f"{what} got {shown(times)}; {advice}.") from None
    if values.ndim != 1 or values.dtype.kind not in "MOU":
        raise ValueError(f"{what} have shape {values.shape} and type {values.dtype}; {advice}.")
    if values.dtype.kind == "O" and any(isinstance(value, (int, float)) for value in values.tolist()):
        raise ValueError(f"{what} hold numbers; {advice}.")
    try:
        if values.dtype.kind == "M":
            found = values.astype("datetime64[ns]")
            if not np.array_equal(found.astype(values.dtype), values):
                raise ValueError("a date is too far from 1970 for nanoseconds")
        else:
            index = pandas.to_datetime(list(values), utc=True, format="ISO8601")
            found = index.tz_localize(None).as_unit("ns").to_numpy()
    except (ValueError, TypeError, OverflowError) as error:
        if "NaT" not in str(values):
            raise ValueError(f"{what} cannot be read as dates ({str(error).splitlines()[0]}); {advice}.") from None
        found = np.array(["NaT"], "datetime64[ns]")
    if np.isnat(found).any():
        raise ValueError(f"{what} hold a missing date (NaT); {advice}.")
    return found


def check_increasing(times: np.ndarray, what: str) -> None:
    """Check that times increase strictly.

    Args:
        times: times as datetime64, timedelta64 or numbers, shape (time,).
        what: name of the axis in messages.

    Raises:
        ValueError: a time is missing, repeated, or before the time in front of it.
    """
    values = np.asarray(times)
    if values.dtype.kind in "fmM" and not np.isfinite(values).all():
        raise ValueError(f"{what} has a missing value at position {np.flatnonzero(~np.isfinite(values))[0]}.")
    try:
        bad = ~np.asarray(values[1:] > values[:-1], bool)
    except TypeError:
        raise ValueError(f"{what} has values without an order; give dates, numbers or time differences.") from None
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        now, then = _word(values[at]), _word(values[at + 1])
        how = "repeats" if values[at] == values[at + 1] else "goes back from"
        raise ValueError(
            f"{what} {how} {now}{'' if how == 'repeats' else f' to {then}'} at positions {at} and {at + 1}; give "
            "each time once, in increasing order."
        )


def time_axis(times: Any, size: int) -> Any:
    """Check the coordinate of a time axis, and convert dates to UTC.

    Args:
        times: one value for each step: dates of any kind, numbers, time differences, or labels that are no dates.
        size: number of steps.

    Returns:
        The values as an array; with attributes, as an `xarray.Variable`, if `times` has attributes.

    Raises:
        ValueError: there is not one value for each step, a value is missing, or values do not increase.
    """
    import pandas
    import xarray

    attributes = dict(times.attrs) if isinstance(times, (xarray.DataArray, xarray.Variable)) else None
    if isinstance(times, Iterator):
        times = list(times)
    if isinstance(times, (str, bytes)) or not hasattr(times, "__len__") or np.ndim(times) != 1:
        raise ValueError(f"time is {shown(times)}; give one value for each of the {size} steps.")
    if len(times) != size:
        raise ValueError(f"time has {len(times)} values, but the filter made {size} steps; give one per step.")
    aware = isinstance(getattr(times, "dtype", None), pandas.DatetimeTZDtype)
    values = np.asarray(times, dtype=object) if aware else np.asarray(times)
    if values.dtype.kind == "M" or isinstance(times, pandas.PeriodIndex):
        values = utc_times(times, "time")
    elif values.dtype.kind in "OU":
        try:
            values = utc_times(times, "time")
        except ValueError:
            if values.dtype.kind == "O" and any(value is None or value is pandas.NaT for value in values.tolist()):
                raise
    is_masked = isinstance(times, np.ma.MaskedArray) and np.ma.getmaskarray(times).any()
    if values.dtype.kind not in "MiufmUO" or is_masked:
        what = "masked values" if is_masked else f"values of type {values.dtype}"
        raise ValueError(f"time has {what}; give dates, numbers, time differences or labels.")
    if values.dtype.kind == "U":
        # Labels have no order, so that only a repeated one is wrong.
        labels, counts = np.unique(values, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"time repeats '{labels[counts > 1][0]}'; give each time once.")
    else:
        check_increasing(values, "time")
    return values if not attributes else xarray.Variable("time", values, attributes)


def check_spacing(times: np.ndarray, step: np.timedelta64, what: str) -> None:
    """Check that times follow each other at one spacing.

    Args:
        times: times as datetime64, shape (time,).
        step: expected spacing.
        what: name of the times in messages.

    Raises:
        ValueError: two times have another spacing. The message says which spacing was found.
    """
    steps = np.diff(times)
    bad = steps != step
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{what} need times {hours(step)} apart, but {_word(times[at])} is followed by {_word(times[at + 1])}, "
            f"{hours(steps[at])} later; give consecutive times, {hours(step)} apart."
        )


def hours(step: np.timedelta64) -> str:
    """Text of a time difference in hours, such as "12 h".

    Args:
        step: the time difference.
    """
    return f"{step / np.timedelta64(1, 'h'):g} h"


def _word(value: Any) -> str:
    return str(value.astype("datetime64[m]")) if isinstance(value, np.datetime64) else f"{value}"
