"""Windows of time around the steps of a filter."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from numpyro_diffusion_da.arguments import shown
from numpyro_diffusion_da.fields.times import check_increasing, utc_times
from numpyro_diffusion_da.spelling import spelled


def _advice() -> str:
    """Advice on the window to give, with two examples."""
    one, pair = (spelled("window", value) for value in ("3h", ("3h", "0h")))
    return f"give a width such as {one}, or a pair of the parts before and after each time, such as {pair}"


def step_times(times: Any) -> np.ndarray:
    """Times of a filter's steps in UTC, datetime64[us].

    Raises:
        ValueError: they are not dates, or do not increase.
    """
    found = utc_times(np.asarray(times)[None] if np.ndim(times) == 0 and not isinstance(times, str) else times)
    if not len(found):
        raise ValueError("times are empty; give the time of each step.")
    check_increasing(found, "times")
    return found.astype("datetime64[us]")


def windows(window: Any, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parts of each window before and after its time, timedelta64.

    Args:
        window: width, pair of the two parts, or None for windows that fill the time between steps.
        times: times of the steps.

    Raises:
        TypeError: `window` is of another kind.
        ValueError: it is not positive, or None with one time.
    """
    if window is None:
        if len(times) == 1:
            raise ValueError(f"with one time a window is needed; {_advice()}.")
        half = np.diff(times) / 2
        return np.append(half[:1], half), np.append(half, half[-1:])
    pair = window if isinstance(window, (tuple, list)) and len(window) == 2 else None
    before, after = (_length(part) for part in pair) if pair is not None else (_length(window) / 2,) * 2
    if before < np.timedelta64(0, "us") or after < np.timedelta64(0, "us") or before + after == np.timedelta64(0, "us"):
        raise ValueError(f"got window={shown(window)}, which has no length; {_advice()}.")
    return np.repeat(before, len(times)), np.repeat(after, len(times))


def _length(value: Any) -> np.timedelta64:
    import pandas

    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, np.timedelta64)
    try:
        if is_number or value is None:
            raise TypeError
        found = pandas.Timedelta(value)
    except (ValueError, TypeError, OverflowError):
        raise TypeError(f"got window={shown(value)}; {_advice()}.") from None
    if found is pandas.NaT:
        raise TypeError(f"got window={shown(value)}; {_advice()}.")
    return found.to_timedelta64().astype("timedelta64[us]")


def cycles(at: np.ndarray, times: np.ndarray, before: np.ndarray, after: np.ndarray) -> Int[np.ndarray, " row"]:
    """Step that each time belongs to, -1 for none; windows include their end and not their beginning.

    Args:
        at: times of observations, datetime64; NaT belongs to no step.
        times: times of the steps, increasing.
        before: part of each window before its time.
        after: part of each window after its time.
    """
    known = ~np.isnat(at)
    at = np.where(known, at.astype(times.dtype), times[0])
    later = np.searchsorted(times, at, side="right")
    earlier, later = later - 1, np.minimum(later, len(times) - 1)
    since, until = at - times[np.maximum(earlier, 0)], times[later] - at
    zero = np.timedelta64(0, "us")
    in_earlier = (earlier >= 0) & (since <= after[np.maximum(earlier, 0)])
    in_later = (until > zero) & (until < before[later])
    nearer = in_later & (~in_earlier | (until < since))
    return np.where(known & nearer, later, np.where(known & in_earlier, earlier, -1))
