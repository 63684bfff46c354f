"""Diagnostics in observation space: observations O against what a filter forecast, B, and what it made of them, A.

O is compared with an ensemble of h(x): the background, whose members are drawn before the observation of that time is
seen, and the analysis, drawn after. With P = Var[h(x) | y_1, ..., y_k-1] and R the variance of the observation's error,
a filter that is right has, in the linear-Gaussian case,

    E (O - B)^2 = P + R,        E (O - A)(O - B) = R,        E (A - B)(O - B) = P,

and its innovations O - B at different times are independent (Desroziers, Berre, Chapnik & Poli 2005, Q. J. R. Meteorol.
Soc. 131, 3385). Where these do not hold in the mean over time, P or R is not what the filter takes it to be. No truth
is needed.

All take numpy arrays, with axes by position, or `xarray.DataArray`, with axes by name, and answer in kind. A NaN
observation is left out; a NaN member where there is an observation makes the answer NaN.

**The background is not in a filter's result.** Its particles have all seen the observation: those of the group
`posterior_predictive`, and the forecasts of `keep_forecasts` too, which are of the ancestors that the observation
selected. A background comes from an `OnlineFilter` that is given NaN in place of the observation; docs/verification.md
has the loop. `tune_spread` makes its own, by one unguided draw more of each particle.

**Members with and without the error.** h(x) itself is best (a `numpyro.deterministic` site of the program, say). Draws
of `posterior_predictive`, which have the error in them, do as well: in `consistency` with error=0.0, and elsewhere at
the price of R / M in the mean of M members.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from numpyro_diffusion_da.diagnostics.labeling import Axis, EnsembleCase, is_labeled

if TYPE_CHECKING:
    import xarray


class Estimate(NamedTuple):
    """A mean over time, by site.

    Attributes:
        value: the mean.
        standard_error: its standard error, from blocks of consecutive times taken to be independent; NaN where there
            are fewer than two.
    """

    value: Any
    standard_error: Any


class Departures(NamedTuple):
    """O - B or O - A over time, see `departures`.

    Attributes:
        mean: in the unit of the observation; 0 without a bias.
        rms: root mean square, in that unit.
        count: number of observations.
    """

    mean: Estimate
    rms: Any
    count: Any


class Consistency(NamedTuple):
    """Innovations against the variance expected of them, see `consistency`.

    Attributes:
        ratio: mean (O - B)^2 over the mean of its expectation: 1 if that is right, above 1 if B or O is given as more
            accurate than it is.
        chi_square: sum of (O - B)^2 over its expectation.
        p_value: probability of a larger one, from chi-square with `count` degrees of freedom.
        count: number of observations.
    """

    ratio: Estimate
    chi_square: Any
    p_value: Any
    count: Any


class ErrorVariances(NamedTuple):
    """What innovations say of the variances, see `error_variances`.

    Attributes:
        observation: mean (O - A)(O - B), an estimate of R, in the squared unit of the observation.
        background: mean (A - B)(O - B), an estimate of P, in that unit.
        count: number of observations.
    """

    observation: Estimate
    background: Estimate
    count: Any


def departures(
    observations: Any, members: Any, *, member: int | str = 0, time: int | str = 0, axis: Axis = (), block: int = 1
) -> Departures:
    """Mean and RMS of observation minus ensemble mean, by site over time.

    Args:
        observations: observed values, NaN where missing.
        members: of the background (O - B) or of the analysis (O - A), in the place of the observations; one axis more.
        member: the members' axis: position in `members` for numpy, name for xarray.
        time: the axis of time: position in the observations for numpy, name for xarray.
        axis: further axes of the observations that are averaged over. Values of one time are taken to be dependent.
        block: consecutive times whose values are taken to be dependent in the standard errors: 1 for the innovations of
            a filter that is right, which are white; several where they are not, or for O - A.

    Raises:
        ValueError: shapes, axes or a block that do not fit.
        TypeError: numpy arrays mixed with xarray's.
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
    """Whether innovations are as large as background spread and observation error say: (O - B)^2 against P + R.

    The expectation of (O - B)^2 is (M + 1) / M times the unbiased variance of M members, plus R. A ratio of 1 says that
    the sum is right, not each part: see `error_variances`. The ratio has a standard error near sqrt(2 / count).

    The p-value is that of independent Gaussian values: right for one site over time (innovations are white) and some
    hundred members; with fewer, the estimated variance makes chi-square larger, by (M - 1) / (M - 3) in the mean if
    error=0. Sites of one time are correlated: where `axis` puts them together the p-value is too small or too
    large, and the ratio with its standard error is what to look at.

    Args:
        observations: see `departures`.
        background: members drawn before the observation of their time is seen; at least two.
        error: standard deviation of the observation's error, as a number or for each observation. 0.0 where the members
            have the error in them, as those of `posterior_predictive`.
        member: see `departures`.
        time: see `departures`.
        axis: see `departures`.
        block: see `departures`.

    Raises:
        ValueError: see `departures`; fewer than two members.
        TypeError: see `departures`.
    """
    import scipy.stats

    over = _OverTime(observations, background, member, time, axis, block)
    expected = over.case.variance() + over.beside(error, "error") ** 2
    squares = over.departure() ** 2
    size = over.mean(expected)
    ratio = over.mean(squares) / size
    # The ratio of two means, to first order in their errors.
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
    """Estimates of the error variance R and the background variance P = H B H^T from the filter's own output.

    R from (O - A)(O - B), P from (A - B)(O - B), A and B being the means of the members (Desroziers et al. 2005). Their
    sum is the mean of (O - B)^2, whatever the filter.

    Only that sum is measured; how it is shared out is the filter's own doing. A filter that observes one value,
    believes in R' and P', and has innovations of variance V, gives R' V / (R' + P') and P' V / (R' + P'), whatever the
    truth in the ratio R' / P': R and P if that is R / P. If P' is right and R' is not, the first lies between R' and R,
    on the right side but not all the way (Waller, Dance & Nichols 2016, Q. J. R. Meteorol. Soc. 142, 418). The mean
    departure is not taken off: a bias adds its square.

    They are exact for Gaussian variables, linear h and exact means. Of M members, with draws of B and A that are
    independent of each other, the estimate of P is too large by P / M, and by R / M more if the error is in them; with
    an A computed from that B (an ensemble Kalman filter's), both are off by order 1 / M.

    Args:
        observations: see `departures`.
        background: members drawn before the observation of their time is seen.
        analysis: members drawn after; their number may be another.
        member: see `departures`.
        time: see `departures`.
        axis: see `departures`.
        block: see `departures`.

    Raises:
        ValueError: see `departures`.
        TypeError: see `departures`.
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
    """Observations with members in their place, and means over time with standard errors."""

    def __init__(
        self, observations: Any, members: Any, member: int | str, time: int | str, axis: Axis, block: int
    ) -> None:
        self.case = EnsembleCase(members, observations, member, None)
        (self.time,) = self.case.axes(time)
        self.others = [name for name in self.case.axes(axis) if name != self.time]
        steps = self.case.truth.sizes[self.time]
        if not 1 <= block <= steps:
            raise ValueError(f"block={block}; give a number of steps from 1 to the {steps} that there are.")
        self.starts = np.arange(0, steps, block)
        self.count = self.case.valid.sum([self.time, *self.others])

    def departure(self) -> xarray.DataArray:
        """O minus the mean of the members."""
        return self.case.truth - self.case.members.mean("member", skipna=False)

    def beside(self, values: Any, name: str) -> xarray.DataArray:
        """`values` at each observation, given as a number or in the kind of the observations."""
        import xarray

        truth = self.case.truth
        if np.ndim(values) == 0:
            return xarray.full_like(truth, float(values))
        if is_labeled(values) != self.case.labeled:
            raise TypeError(f"observations and {name}: give both as numpy arrays or both as xarray.DataArray.")
        if self.case.labeled:
            xarray.align(truth, values, join="exact")
            return values.astype(float).broadcast_like(truth)
        return truth.copy(data=np.broadcast_to(np.asarray(values, float), truth.shape))

    def mean(self, values: xarray.DataArray) -> xarray.DataArray:
        """Over time and the further axes, of what is observed."""
        total = values.where(self.case.valid, 0.0).sum([self.time, *self.others], skipna=False)
        return total / self.count.where(self.count > 0)

    def standard_error(self, residual: xarray.DataArray) -> xarray.DataArray:
        """That of the mean of something with this residual, all values of a block of times being dependent."""
        valid = self.case.valid
        sums = self._by_block(residual.where(valid, 0.0).sum(self.others, skipna=False))
        blocks = np.sum(self._by_block(valid.sum(self.others)) > 0, axis=0)
        factor = np.divide(blocks, blocks - 1, out=np.full(blocks.shape, np.nan), where=blocks > 1)
        count = self.count.where(self.count > 0)
        return count.copy(data=np.sqrt(factor * np.sum(sums**2, axis=0))) / count

    def _by_block(self, values: xarray.DataArray) -> np.ndarray:
        return np.add.reduceat(values.transpose(self.time, *self.count.dims).values, self.starts, axis=0)

    def estimate(self, values: xarray.DataArray) -> Estimate:
        """Mean of the values with its standard error."""
        mean = self.mean(values)
        return Estimate(self.answer(mean), self.answer(self.standard_error(values - mean)))

    def answer(self, values: xarray.DataArray) -> Any:
        """In the kind of the members."""
        return self.case.answer(values)
