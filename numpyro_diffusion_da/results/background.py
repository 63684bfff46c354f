"""Comparison of the departures O - B of a result with their expected variance P + R."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from numpyro_diffusion_da.results.result import FilterResult
from numpyro_diffusion_da.spelling import spelled, spelled_observation, spelled_step

BLOCKS = 20
"""Number of blocks of consecutive times from which the standard error of a whole run is computed, if it is long."""

FAR = 30.0
"""Distance from the background, in expected standard deviations, that no filter explains by chance."""

JUMP = 10.0
"""How many times farther than all earlier values a far value is, if it is wrong and not the filter."""


class Ratio(NamedTuple):
    """Squared departures of one site over time, divided by their expectation.

    Attributes:
        value: mean of (O - B)^2 divided by the mean of P + R, over all values and chains; NaN if nothing is observed.
        standard_error: standard error of `value`, from blocks of consecutive times; NaN with fewer than two blocks.
        margin: distance from `value` within which the expected ratio lies with a probability of 98 %.
    """

    value: float
    standard_error: float
    margin: float


def usable_squares(result: FilterResult, site: str) -> tuple[np.ndarray, np.ndarray]:
    """Squared departures of a site and their expectation; NaN where an observation is missing or was rejected.

    Args:
        result: result of a filter run.
        site: name of a site in `result.background`.

    Returns:
        ((O - B)^2, P + R), each (chain, time, ...). Both are NaN where one of them is not finite.
    """
    squares = result.departure(site).astype(float) ** 2
    expected = np.broadcast_to(result.background[site].expected.astype(float), squares.shape)
    usable = np.isfinite(squares) & np.isfinite(expected)
    if site in result.rejected:
        usable = usable & ~result.rejected[site]
    return np.where(usable, squares, np.nan), np.where(usable, expected, np.nan)


def ratio_over_time(squares: np.ndarray, expected: np.ndarray, block: int = 1) -> tuple[float, float, int]:
    """Ratio of squared departures to their expectation, with its standard error.

    Args:
        squares: squared departures, (time, ...); NaN where not usable.
        expected: their expectation, NaN at the same places.
        block: number of consecutive times that the standard error treats as dependent. Values of one time are always
            treated as dependent.

    Returns:
        (ratio of the means; its standard error, NaN with fewer than two blocks; number of blocks with observations).
    """
    by_time = [np.nansum(x.reshape(len(x), -1), axis=1) for x in (squares, expected)]
    seen = np.isfinite(squares.reshape(len(squares), -1)).any(1)
    starts = np.arange(0, len(squares), block)
    of_squares, of_expected = (np.add.reduceat(x, starts) for x in by_time)
    count = int(np.sum(np.add.reduceat(seen.astype(int), starts) > 0))
    if not of_expected.sum() > 0:
        return float("nan"), float("nan"), count
    ratio = of_squares.sum() / of_expected.sum()
    if count < 2:
        return float(ratio), float("nan"), count
    # The error of a ratio of two means, to first order in the errors of the means.
    spread = np.sqrt(count / (count - 1) * np.sum((of_squares - ratio * of_expected) ** 2)) / of_expected.sum()
    return float(ratio), float(spread), count


@dataclasses.dataclass(frozen=True)
class FarValue:
    """Observation that is much farther from its background than any before it.

    Attributes:
        site: name of the site.
        step: index of the step.
        index: index of the value in the site's value.
        value: the observation.
        background: background mean B; of the chain that is closest.
        distance: distance from B in expected standard deviations, (P + R)^(1/2).
        count: number of observations of the site with this very value.
    """

    site: str
    step: int
    index: tuple[int, ...]
    value: float
    background: float
    distance: float
    count: int

    def words(self, with_step: bool) -> str:
        """Sentence about the observation and what to do, without a capital letter at its beginning.

        Args:
            with_step: whether the sentence names the step.
        """
        of = spelled_observation(self.site, self.step, self.index)
        step = f" at {spelled_step(self.step)}" if with_step else ""
        others = f" ({self.count} observations have this value)" if self.count > 1 else ""
        missing = spelled("missing value", python="mark a missing value by NaN")
        check = spelled("gross errors", python="leave gross errors out with ndda.GrossErrorCheck(...)")
        return (
            f"observation {self.value:.6g} of {of}{step} is {self.distance:.3g} predictive standard deviations from "
            f"its forecast, {self.background:.4g}{others}; {missing}, {check}, or check the unit."
        )


def first_far_value(result: FilterResult) -> FarValue | None:
    """First observation that is `FAR` expected deviations from its background, and no others before it nearly so.

    Later values are not judged: a filter that has used such an observation is far from the next ones too.

    Args:
        result: result of a filter run.

    Returns:
        The observation, the farthest of its step; None if there is none.
    """
    found = []
    for site in result.background:
        squares, expected = usable_squares(result, site)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.where(squares > 0, np.sqrt(squares / expected), 0.0 * squares)
        chain = np.argmin(np.where(np.isnan(distance), np.inf, distance), axis=0)[None]
        nearest = np.nan_to_num(np.take_along_axis(distance, chain, axis=0)[0], nan=0.0, posinf=np.inf)
        by_time = nearest.reshape(len(nearest), -1).max(1, initial=0.0)
        if not (by_time > FAR).any():
            continue
        step = int(np.argmax(by_time > FAR))
        if by_time[step] < JUMP * by_time[:step].max(initial=1.0):
            continue
        index = tuple(int(i) for i in np.unravel_index(np.argmax(nearest[step]), nearest.shape[1:]))
        values = result.observed_data[site]
        at = (step, *index)
        background = np.take_along_axis(result.background[site].mean, chain, axis=0)[0][at]
        count = int(np.sum(values == values[at]))
        found.append(FarValue(site, step, index, float(values[at]), float(background), float(nearest[at]), count))
    return min(found, key=lambda far: (far.step, -far.distance), default=None)


def departure_ratios(result: FilterResult) -> dict[str, Ratio]:
    """Ratio of the squared departures to their expectation for each site with a background, see `departure_ratio`.

    Args:
        result: result of a filter run.
    """
    return {site: departure_ratio(result, site) for site in result.background}


def departure_ratio(result: FilterResult, site: str) -> Ratio:
    """Ratio of the squared departures of a site to their expectation, over a whole run.

    The margin uses Student's t for the number of blocks. In short runs the standard error is not taken to be smaller
    than that of one independent Gaussian value per time.

    Args:
        result: result of a filter run.
        site: name of a site in `result.background`.
    """
    import scipy.special  # scipy.stats takes a second to import

    squares, expected = (np.moveaxis(x, 1, 0) for x in usable_squares(result, site))
    steps = int(np.isfinite(squares.reshape(len(squares), -1)).any(1).sum())
    value, standard_error, blocks = ratio_over_time(squares, expected, max(1, len(squares) // BLOCKS))
    if blocks < 2:
        return Ratio(value, standard_error, float("nan"))
    least = np.sqrt(2.0 / steps)
    margin = scipy.special.stdtrit(blocks - 1, 0.99) * max(standard_error, least)
    return Ratio(value, standard_error, float(margin))
