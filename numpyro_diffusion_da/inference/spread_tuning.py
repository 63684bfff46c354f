"""Tuning of the inflation of a filter by its innovations."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from numpyro_diffusion_da.arguments import is_number, require_count, require_key, require_number, shown
from numpyro_diffusion_da.diagnostics.innovations import Estimate
from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.filters.background import Screen
from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.inference.batching import check_batch_size
from numpyro_diffusion_da.inference.filter import Filter
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.results.advice import LOST_WORDS
from numpyro_diffusion_da.results.background import ratio_over_time, usable_squares
from numpyro_diffusion_da.results.result import FilterResult
from numpyro_diffusion_da.smc.base import Info, Kernel
from numpyro_diffusion_da.smc.localization import Taper


class SpreadTrial(NamedTuple):
    """One run of `tune_spread`.

    Attributes:
        amount: amount of inflation of the run.
        ratio: mean (O - B)^2 divided by the mean of its expectation, as in `diagnostics.consistency`.
    """

    amount: float
    ratio: Estimate


class SpreadTuning(NamedTuple):
    """Result of `tune_spread`.

    Attributes:
        amount: amount of inflation whose ratio is nearest to 1.
        ratio: mean (O - B)^2 divided by the mean of its expectation, at this amount. If it differs from 1 by less than
            its standard error, the spin-up is too short to distinguish the amount from a better one.
        within_tolerance: whether the ratio is within the tolerance; False if `max_runs` was reached before.
        trail: all runs, in their order.
    """

    amount: float
    ratio: Estimate
    within_tolerance: bool
    trail: tuple[SpreadTrial, ...]


def tune_spread(
    make_filter: Callable[[Any], FilterAlgorithm],
    rng_key: PRNGKeyArray,
    *args: Any,
    between: tuple[float, float],
    num_particles: int,
    discard: int = 0,
    tolerance: float = 0.05,
    max_runs: int = 12,
    batch_size: int | None = None,
    block: int = 1,
) -> SpreadTuning:
    """Find the amount of inflation at which innovations are as large as expected, by runs over a spin-up.

    The search is a bisection on the amount, until the ratio of squared innovations to their expectation
    (`diagnostics.consistency`) is 1. Each amount takes one run of the filter over the spin-up. All runs use the same
    random numbers, and the filter is compiled once. The background is that of the result (`FilterResult.background`),
    so a run costs no more than the filter. Any observed site counts whose distribution defines a mean and a variance.
    The ratio is over all observations, each divided by its own predictive spread.

    The ratio depends on the sum of forecast spread and observation error only. If the given observation error is too
    small, the amount found is therefore too large. The search corrects the spread of the *forecast*: if the transition
    leaves out a source of error, the analysis becomes wider than its own error, to make up for it.

    Args:
        make_filter: function from an amount of inflation to the filter, such as ``lambda alpha: ndda.FAAPF(model,
            inflation=(ndda.RTPS(alpha),))``. The amount is a JAX tracer, so pass it to a member of `inflation=` only. A
            larger amount must make the forecast wider.
        rng_key: random key, from `jax.random.key`.
        *args: arguments of the program for the spin-up, such as the first observations ``y[:60]``.
        between: smallest and largest amount of the search.
        num_particles: number of particles N. Use that of the later runs, because the best amount depends on it.
        discard: number of steps at the start that the ratio leaves out.
        tolerance: largest accepted distance of the ratio from 1.
        max_runs: largest number of runs, 2 or more.
        batch_size: number of particles moved at a time, which bounds the memory; None for as many as fit into half of
            the device's memory, and on a CPU for no more than its cores move fastest.
        block: number of consecutive times that the standard error of the ratio treats as dependent.

    Returns:
        Best amount, its ratio, and all runs.

    Raises:
        ValueError: a ratio of 1 is not between the ratios of the two amounts (the message gives both), nothing is
            observed after the discarded steps, a setting is out of range, or the filter cannot run the program.
        TypeError: `num_particles` or `batch_size` is not a whole number.
        FloatingPointError: all weights or all particles of a step are non-finite; the message names the step.
    """
    if not isinstance(between, Sequence) or len(between) != 2 or not all(map(is_number, between)):
        raise TypeError(f"tune_spread got between={shown(between)}; give two amounts, as in (0.0, 1.0).")
    least, most = map(float, between)
    if not -math.inf < least < most < math.inf:
        raise ValueError(f"tune_spread got between={between}; give two amounts in increasing order.")
    tolerance = require_number(tolerance, "tune_spread", "tolerance", "give a positive number.", above=0.0)
    require_count(max_runs, "tune_spread", "max_runs", 2)
    require_count(num_particles, "tune_spread", "num_particles")
    require_count(discard, "tune_spread", "discard", 0)
    require_count(block, "tune_spread", "block")
    check_batch_size(batch_size, "tune_spread")
    require_key(rng_key, "tune_spread")
    make_filter(most)  # raises here if the amount is not allowed, before it becomes a tracer
    first = make_filter(least)
    program = StateSpaceModel(first.model, args)
    program.check(first.needs_gaussian, first.needs_gaussian_errors)
    if not 0 <= discard < program.structure.length:
        raise ValueError(
            f"tune_spread got discard={discard}; the spin-up has {program.structure.length} steps: give a number from "
            "0 to below that."
        )
    runner = Filter(
        _OfAmount(make_filter, first),
        num_particles=num_particles,
        batch_size=batch_size,
        progress_bar=False,
        keep_observed=False,
    )
    trail: list[SpreadTrial] = []

    def error_at(amount: float) -> float:
        """Run the filter with this amount, and return its ratio minus 1."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=LOST_WORDS)  # runs with too small an amount are expected
            runner.run(rng_key, jnp.asarray(amount, float), *args)
        trail.append(SpreadTrial(amount, _ratio(runner.result, discard, block)))
        return trail[-1].ratio.value - 1.0

    def found() -> SpreadTuning:
        """Make the result from the runs so far."""
        best = min(trail, key=lambda trial: abs(trial.ratio.value - 1.0))
        return SpreadTuning(*best, bool(abs(best.ratio.value - 1.0) <= tolerance), tuple(trail))

    at_least = error_at(least)
    if abs(at_least) <= tolerance:
        return found()
    at_most = error_at(most)
    if abs(at_most) > tolerance and not at_most < 0.0 < at_least:
        advice = (
            "the ensemble is already wide enough at the smallest amount; check whether the observation error or the "
            "noise of the transition is too large"
        )
        if min(at_least, at_most) > 0.0:
            advice = "allow more inflation, or check for a bias or an observation error that is too small"
        raise ValueError(
            f"squared innovations are {1 + at_least:.3g} times what is expected at {least:g} and {1 + at_most:.3g} "
            f"times at {most:g}, so no amount between them gives 1; {advice}."
        )
    while len(trail) < max_runs and not found().within_tolerance:
        middle = 0.5 * (least + most)
        least, most = (middle, most) if error_at(middle) > 0.0 else (least, middle)
    return found()


class _OfAmount(FilterAlgorithm):
    """Filter whose amount of inflation is the first argument of its program.

    The amount is an argument and not a setting, so a run with another amount does not compile again.

    Args:
        make_filter: function from an amount of inflation to the filter.
        first: a filter that it makes, whose program is used.
    """

    needs_gaussian: ClassVar[bool] = False  # `tune_spread` has checked the program already

    def __init__(self, make_filter: Callable[[Any], FilterAlgorithm], first: FilterAlgorithm) -> None:
        self._make_filter, self._first = make_filter, first
        self.lag, self.target_ess, self.resample_below = first.lag, first.target_ess, first.resample_below

        @functools.wraps(first.model)
        def model(amount: Any, *args: Any) -> Any:
            return first.model(*args)

        self.model = model

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None, screen: Screen | None = None) -> Kernel:
        """Build the kernel of the filter with the amount that the program got."""
        return self._make_filter(program.args[0]).kernel(program, batch_size, screen)

    def passes(self, info: Info) -> NetworkPasses:
        """Network passes of one step of the filter, per particle."""
        return self._first.passes(info)

    def moving_taper(self) -> Taper | None:
        """Taper of the filter if places of observations move; None otherwise."""
        return self._first.moving_taper()

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Empty settings, because users do not see the result of this filter."""
        return {}


def _ratio(result: FilterResult, discard: int, block: int) -> Estimate:
    """Ratio of squared innovations to their expectation, over all observations, each divided by its predictive spread.

    Args:
        result: result of a run of `_OfAmount`.
        discard: number of steps at the start to leave out.
        block: number of consecutive times that the standard error treats as dependent.

    Raises:
        ValueError: nothing is observed in the remaining steps, or no site has a background.
    """
    if not result.background:
        raise ValueError(
            "no observed site has a distribution with a mean and a variance, so departures have no expectation; tune "
            "the amount by an observation that has them."
        )
    squares, expected = [], []
    for name in result.background:
        # The spread of the filter cannot fit observations that it does not use, so rejected ones are left out.
        pair = [x[0, discard:] for x in usable_squares(result, name)]
        pair = [x.reshape(len(x), -1) for x in pair]
        total, count = np.nansum(pair[1], axis=0), np.isfinite(pair[1]).sum(0)
        unit = np.where(total > 0, total / np.maximum(count, 1), 1.0)
        squares.append(pair[0] / unit)
        expected.append(pair[1] / unit)
    every, every_expected = (np.concatenate(x, axis=-1) for x in (squares, expected))
    if np.all(np.isnan(every)):
        raise ValueError(
            f"nothing is observed after the first {discard} steps; give a spin-up with observations, or discard fewer."
        )
    return Estimate(*ratio_over_time(every, every_expected, block)[:2])
