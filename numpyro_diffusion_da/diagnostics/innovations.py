r"""Diagnostics in observation space: observation O against background B and analysis A. No truth is needed.

B and A are ensembles of h(x), the state as it is observed. The members of the background are drawn before the filter
sees the observation of their time, the members of the analysis after it. O - B is the innovation, O - A the residual.
Let P = Var[h(x) | y_1, ..., y_k-1] be the background variance and R the error variance of the observation. If the
filter is right, its means satisfy, in the linear-Gaussian case,

$$
E\,(O - B)^2 = P + R, \qquad E\,(O - A)(O - B) = R, \qquad E\,(A - B)(O - B) = P,
$$

and its innovations at different times are independent (Desroziers, Berre, Chapnik & Poli 2005, Q. J. R. Meteorol. Soc.
131, 3385). If the means over time differ from these, then P or R is not what the filter takes it to be.

All functions take either numpy arrays, with axes by position, or `xarray.DataArray`s, with axes by name. They return
the same kind. A NaN observation is left out. A NaN member at a time with an observation makes the answer NaN.

**The background is in the result of a filter.** `background_departures` and `background_consistency` read
``result.background``, which every filter records. All particles of a result have seen the observation of their time:
those of `posterior_predictive`, and also the forecasts of `keep_forecasts`, because the observation selected the
ancestors that they start from. So `departures` and `consistency` are for backgrounds of your own, and for O - A. To get
the members of a background, as `error_variances` needs for O - B, run an `OnlineFilter` and give it NaN in place of the
observation; docs/verification.md has the loop.

**Members with or without observation error.** Members of h(x) itself are best, for example from a
`numpyro.deterministic` site of the program. Draws of `posterior_predictive`, which contain the error, also work: in
`consistency` with `error=0.0`; elsewhere they add R / M to the variance of the mean of M members.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from numpyro_diffusion_da.arguments import is_number, require, require_flag, shown
from numpyro_diffusion_da.diagnostics.labeling import (
    Axis,
    EnsembleCase,
    broadcast,
    is_labeled,
    one_axis,
    real,
    require_same_labels,
)
from numpyro_diffusion_da.results.result import FilterResult

if TYPE_CHECKING:
    import xarray


class Estimate(NamedTuple):
    """Mean over time with its standard error, for each site.

    Attributes:
        value: mean over time.
        standard_error: standard error of the mean, from blocks of consecutive times that are assumed independent; NaN
            with fewer than two blocks.
    """

    value: Any
    standard_error: Any


class Departures(NamedTuple):
    """Statistics of O - B or O - A over time, returned by `departures`.

    Attributes:
        mean: mean departure, in the unit of the observation; 0 without a bias.
        rms: root mean square departure, in the unit of the observation.
        count: number of observations.
    """

    mean: Estimate
    rms: Any
    count: Any


class Consistency(NamedTuple):
    """Comparison of innovations with their expected variance, returned by `consistency`.

    Attributes:
        ratio: mean of (O - B)^2 divided by the mean of its expectation. It is 1 if the expectation is right, and above
            1 if the filter takes B or O to be more accurate than it is.
        chi_square: sum over observations of (O - B)^2 divided by its expectation.
        p_value: probability of a larger `chi_square`, from the chi-square distribution with `count` degrees of freedom.
        count: number of observations.
    """

    ratio: Estimate
    chi_square: Any
    p_value: Any
    count: Any


class ErrorVariances(NamedTuple):
    """Estimates of observation and background variance, returned by `error_variances`.

    Attributes:
        observation: mean of (O - A)(O - B), an estimate of R, in the squared unit of the observation.
        background: mean of (A - B)(O - B), an estimate of P, in the squared unit of the observation.
        count: number of observations.
    """

    observation: Estimate
    background: Estimate
    count: Any


def departures(
    observations: Any, members: Any, *, member: int | str = 0, time: int | str = 0, axis: Axis = (), block: int = 1
) -> Departures:
    """Mean and RMS over time of observation minus ensemble mean, for each site.

    Args:
        observations: observed values, NaN where missing.
        members: ensemble of the background (for O - B) or of the analysis (for O - A); the axes of the observations and
            one axis of members.
        member: axis of the members: its position in `members` for numpy, its name for xarray.
        time: axis of time: its position in the observations for numpy, its name for xarray.
        axis: further axes of the observations to average over. Standard errors allow for dependence between the values
            of one time.
        block: number of consecutive times that the standard errors treat as dependent. Use 1 for the innovations of a
            filter that is right, because they are white; use more for other innovations, and for O - A.

    Returns:
        Mean, RMS and count, without the axes averaged over.

    Raises:
        ValueError: shapes or axes do not fit, or `block` is not between 1 and the number of times.
        TypeError: numpy arrays and xarray arrays are mixed.
    """
    over = _OverTime(observations, members, member, time, axis, block)
    departure = over.departure()
    return Departures(
        over.estimate(departure), over.answer(over.mean(departure**2) ** 0.5), over.answer(over.count.astype(int))
    )


def consistency(
    observations: Any,
    background: Any,
    error: Any,
    *,
    member: int | str = 0,
    time: int | str = 0,
    axis: Axis = (),
    block: int = 1,
) -> Consistency:
    """Compare squared innovations (O - B)^2 with background variance plus observation error variance, P + R.

    The expectation of (O - B)^2 is (M + 1) / M times the unbiased variance of M members, plus R. A ratio of 1 says that
    the sum P + R is right, not that each part is (see `error_variances`). The standard error of the ratio is near
    sqrt(2 / count).

    The p-value assumes independent Gaussian values. That holds for one site over time, because innovations are white,
    with some hundred members. With fewer members, the estimated variance increases chi-square, in the mean by
    (M - 1) / (M - 3) if `error` is 0. Sites at one time are correlated: if `axis` combines them, the p-value is too
    small or too large. Then look at the ratio and its standard error.

    Args:
        observations: observed values, NaN where missing.
        background: members drawn before the filter saw the observation of their time; at least two; the axes of the
            observations and one axis of members.
        error: standard deviation of the observation error, one number or one for each observation, in the unit of the
            observation. Use 0.0 if the members contain the error, as those of `posterior_predictive` do.
        member: axis of the members, as in `departures`.
        time: axis of time, as in `departures`.
        axis: further axes of the observations to average over, as in `departures`.
        block: number of consecutive times that the standard error treats as dependent, as in `departures`.

    Returns:
        Ratio, chi-square, p-value and count, without the axes averaged over.

    Raises:
        ValueError: there are fewer than two members, shapes or axes do not fit, or `block` is out of range.
        TypeError: numpy arrays and xarray arrays are mixed.
    """
    over = _OverTime(observations, background, member, time, axis, block)
    return _consistency(over, over.case.variance() + over.broadcast(error, "error") ** 2)


def background_departures(
    result: FilterResult, *, discard: int = 0, block: int = 1, pooled: bool = True
) -> dict[str, Departures]:
    """Mean and RMS over time of the departures O - B of a filter run, for each observed site.

    Observations that a gross-error check rejected are left out.

    Args:
        result: result of a run, `Filter.result`.
        discard: number of steps at the start to leave out.
        block: number of consecutive times that the standard errors treat as dependent, as in `departures`.
        pooled: whether to average over the values of a site; False for one answer for each value. Chains are always
            averaged over. Standard errors allow for dependence between the values and chains of one time.

    Returns:
        Mean, RMS and count for each site in ``result.background``.

    Raises:
        ValueError: `discard` or `block` is out of range.
    """
    return {
        name: departures(*arrays[:2], axis=axis, block=block)
        for name, (*arrays, axis) in _by_site(result, discard, pooled).items()
    }


def background_consistency(
    result: FilterResult, *, discard: int = 0, block: int = 1, pooled: bool = True
) -> dict[str, Consistency]:
    """Compare squared departures (O - B)^2 of a filter run with their expectation P + R, for each observed site.

    `consistency` explains the answer. The expectation is that of ``result.background``. Observations that a gross-error
    check rejected are left out.

    Args:
        result: result of a run, `Filter.result`.
        discard: number of steps at the start to leave out.
        block: number of consecutive times that the standard error treats as dependent, as in `departures`.
        pooled: whether to average over the values of a site, as in `background_departures`.

    Returns:
        Ratio, chi-square, p-value and count for each site in ``result.background``.

    Raises:
        ValueError: `discard` or `block` is out of range.
    """
    found = {}
    for name, (observed, mean, expected, axis) in _by_site(result, discard, pooled).items():
        over = _OverTime(observed, mean, 0, 0, axis, block)
        found[name] = _consistency(over, over.broadcast(expected, "background"))
    return found


def _by_site(
    result: FilterResult, discard: int, pooled: bool
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]]:
    """Arrays of each site with a background, time first: observed, mean of one member, expected, axes to pool."""
    require(result, FilterResult, "background_departures and background_consistency", "result", "filter.result")
    require_flag(pooled, "background_departures and background_consistency", "pooled")
    found: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]] = {}
    for name, background in result.background.items():
        observed = np.broadcast_to(result.observed_data[name].astype(float)[None], background.mean.shape)
        if name in result.rejected:
            observed = np.where(result.rejected[name], np.nan, observed)
        steps = observed.shape[1]
        if isinstance(discard, bool) or not isinstance(discard, numbers.Integral) or not 0 <= int(discard) < steps:
            raise ValueError(
                f"discard={shown(discard)}; the run has {steps} steps: give a number from 0 to below that."
            )
        arrays = [np.moveaxis(x, 1, 0)[discard:] for x in (observed, background.mean, background.expected)]
        axis = tuple(range(1, observed.ndim)) if pooled else (1,)
        found[name] = (arrays[0], arrays[1][None], arrays[2], axis)
    return found


def _consistency(over: _OverTime, expected: xarray.DataArray) -> Consistency:
    """Compare squared departures with their expectation at each point."""
    import scipy.stats

    squares = over.departure() ** 2
    size = over.mean(expected)
    ratio = over.mean(squares) / size
    # The error of a ratio of two means, to first order in the errors of the means.
    error_of_ratio = over.standard_error((squares - ratio * expected) / size)
    chi_square = over.mean(squares / expected) * over.count
    p_value = chi_square.copy(data=scipy.stats.chi2.sf(chi_square.values, over.count.values))
    return Consistency(
        Estimate(over.answer(ratio), over.answer(error_of_ratio)),
        over.answer(chi_square),
        over.answer(p_value),
        over.answer(over.count.astype(int)),
    )


def error_variances(
    observations: Any,
    background: Any,
    analysis: Any,
    *,
    member: int | str = 0,
    time: int | str = 0,
    axis: Axis = (),
    block: int = 1,
) -> ErrorVariances:
    """Estimate the error variance R and the background variance P = H B H^T from the output of a filter.

    The mean of (O - A)(O - B) estimates R and the mean of (A - B)(O - B) estimates P, where A and B are ensemble means
    (Desroziers et al. 2005). The two always sum to the mean of (O - B)^2.

    The observations determine only this sum. The filter's own assumptions split it: a filter that observes one value,
    assumes variances R' and P', and has innovations of variance V yields R' V / (R' + P') and P' V / (R' + P'). These
    are R and P only if R' / P' = R / P. If P' is right and R' is wrong, the estimate of R lies between R' and R: it
    moves in the right direction, but not all the way (Waller, Dance & Nichols 2016, Q. J. R. Meteorol. Soc. 142, 418).
    The mean departure is not subtracted, so a bias adds its square.

    The estimates are exact for Gaussian variables, linear h and exact means. With M members, and draws of B and A that
    are independent of each other, the estimate of P is too large by P / M, and by R / M more if the members contain
    the error. If A is computed from B, as in an ensemble Kalman filter, both estimates are off by order 1 / M.

    Args:
        observations: observed values, NaN where missing.
        background: members drawn before the filter saw the observation of their time.
        analysis: members drawn after it; their number may differ from that of the background.
        member: axis of the members in both ensembles, as in `departures`.
        time: axis of time, as in `departures`.
        axis: further axes of the observations to average over, as in `departures`.
        block: number of consecutive times that the standard errors treat as dependent, as in `departures`.

    Returns:
        Both variances with standard errors, and the count, without the axes averaged over.

    Raises:
        ValueError: shapes or axes do not fit, or `block` is out of range.
        TypeError: numpy arrays and xarray arrays are mixed.
    """
    over = _OverTime(observations, background, member, time, axis, block)
    innovation = over.departure()
    residual = _OverTime(observations, analysis, member, time, axis, block).departure()
    return ErrorVariances(
        over.estimate(residual * innovation),
        over.estimate((innovation - residual) * innovation),
        over.answer(over.count.astype(int)),
    )


class _OverTime:
    """Observations with an ensemble, and means over time with standard errors."""

    def __init__(
        self, observations: Any, members: Any, member: int | str, time: int | str, axis: Axis, block: int
    ) -> None:
        self.case = EnsembleCase(members, observations, member, None, whose="observations")
        dims = [str(name) for name in self.case.truth.dims]
        self.time = one_axis(time, "time", dims, self.case.labeled, "the observations")
        self.others = [name for name in self.case.axes(axis) if name != self.time]
        steps = self.case.truth.sizes[self.time]
        if isinstance(block, bool) or not isinstance(block, numbers.Integral) or not 1 <= int(block) <= steps:
            raise ValueError(f"block={shown(block)}; give a number of consecutive times, from 1 to {steps}.")
        self.starts: np.ndarray = np.arange(0, steps, block)
        self.count: xarray.DataArray = self.case.valid.sum([self.time, *self.others])

    def departure(self) -> xarray.DataArray:
        """Observation minus ensemble mean."""
        return self.case.truth - self.case.members.mean("member", skipna=False)

    def broadcast(self, values: Any, name: str) -> xarray.DataArray:
        """Broadcast `values`, one number or an array of the same kind, to the axes of the observations."""
        import xarray

        truth = self.case.truth
        if is_number(values):
            return xarray.full_like(truth, float(values))
        if is_labeled(values) != self.case.labeled:
            raise TypeError(f"observations and {name}: give both as numpy arrays or both as xarray.DataArray.")
        if self.case.labeled:
            if extra := sorted(str(axis) for axis in set(values.dims) - set(truth.dims)):
                raise ValueError(f"{name} has axes {extra}, which are not among those of the observations.")
            values = real(values, f"the {name}")
            require_same_labels(observations=truth, **{name: values})
            return values.broadcast_like(truth)
        return truth.copy(data=broadcast(values, truth.shape, f"the {name}"))

    def mean(self, values: xarray.DataArray) -> xarray.DataArray:
        """Mean of `values` over time and the further axes, at observed points; NaN where nothing is observed."""
        total = values.where(self.case.valid, 0.0).sum([self.time, *self.others], skipna=False)
        return total / self.count.where(self.count > 0)

    def standard_error(self, residual: xarray.DataArray) -> xarray.DataArray:
        """Standard error of a mean whose terms deviate from it by `residual`; terms of one block may be dependent."""
        valid = self.case.valid
        sums = self._by_block(residual.where(valid, 0.0).sum(self.others, skipna=False))
        blocks = np.sum(self._by_block(valid.sum(self.others)) > 0, axis=0)
        factor = np.divide(blocks, blocks - 1, out=np.full(blocks.shape, np.nan), where=blocks > 1)
        count = self.count.where(self.count > 0)
        return count.copy(data=np.sqrt(factor * np.sum(sums**2, axis=0))) / count

    def _by_block(self, values: xarray.DataArray) -> np.ndarray:
        """Sums of `values` over each block of times, shape (block, ...)."""
        return np.add.reduceat(values.transpose(self.time, *self.count.dims).values, self.starts, axis=0)

    def estimate(self, values: xarray.DataArray) -> Estimate:
        """Mean of `values` over time and the further axes, with its standard error."""
        mean = self.mean(values)
        return Estimate(self.answer(mean), self.answer(self.standard_error(values - mean)))

    def answer(self, values: xarray.DataArray) -> Any:
        """Convert `values` to the kind of array that the members were given as."""
        return self.case.answer(values)
