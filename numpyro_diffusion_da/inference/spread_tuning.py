"""Tuning of the inflation of a filter by its innovations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from numpyro_diffusion_da.diagnostics.innovations import (
    Estimate,
    consistency,
)
from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.inference.filter import Filter
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.results.result import FilterResult
from numpyro_diffusion_da.smc.base import Info, Kernel, State


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
    random numbers, and the filter is compiled once. The background is a draw of each observation from each particle
    before the filter sees the observation, so any likelihood is possible. The ratio is over all observations, each
    divided by its own predictive spread. In addition to the cost of the filter, a run makes one unguided draw per
    particle and step.

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
            the device's memory.
        block: number of consecutive times that the standard error of the ratio treats as dependent.

    Returns:
        Best amount, its ratio, and all runs.

    Raises:
        ValueError: a ratio of 1 is not between the ratios of the two amounts (the message gives both), nothing is
            observed after the discarded steps, a setting is out of range, or the filter cannot run the program.
        TypeError: `num_particles` or `batch_size` is not a whole number.
        FloatingPointError: all weights or all particles of a step are non-finite; the message names the step.
    """
    least, most = between
    if not least < most or not tolerance > 0 or max_runs < 2:
        raise ValueError(
            f"tune_spread got between={between}, tolerance={tolerance}, max_runs={max_runs}; give two amounts in "
            "increasing order, a positive tolerance, and 2 or more runs."
        )
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
        _OfAmount(make_filter, first), num_particles=num_particles, batch_size=batch_size, progress_bar=False
    )
    trail: list[SpreadTrial] = []

    def error_at(amount: float) -> float:
        """Run the filter with this amount, and return its ratio minus 1."""
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
    """Filter whose amount of inflation is the first argument of its program, and which records forecasts.

    The amount is an argument and not a setting, so a run with another amount does not compile again. In the result, the
    group `posterior` contains draws of the observations from the forecast in place of the sites of the particles.

    Args:
        make_filter: function from an amount of inflation to the filter.
        first: a filter that it makes, whose program is used.
    """

    needs_gaussian: ClassVar[bool] = False  # `tune_spread` has checked the program already

    def __init__(self, make_filter: Callable[[Any], FilterAlgorithm], first: FilterAlgorithm) -> None:
        self._make_filter = make_filter

        @functools.wraps(first.model)
        def model(amount: Any, *args: Any) -> Any:
            return first.model(*args)

        self.model = model

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> Kernel:
        """Build the kernel of the filter, with draws of the observations in place of the sites of the particles."""
        algorithm = self._make_filter(program.args[0])
        step, background = algorithm.kernel(program, batch_size), algorithm.background(program, batch_size)

        def kernel(rng_key: PRNGKeyArray, state: State, inputs: TimeInputs) -> tuple[State, Info]:
            step_key, background_key = jax.random.split(rng_key)
            new, info = step(step_key, state, inputs)
            forecasts = background(background_key, state.particles, inputs)["posterior_predictive"]
            sites = {"posterior": forecasts, "posterior_predictive": {}, "log_likelihood": {}}
            return new, info._replace(proposal=info.proposal._replace(sites=sites))

        return kernel

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
        ValueError: nothing is observed in the remaining steps.
    """
    observations, members = [], []
    for name, values in result.observed_data.items():
        of_site = result.posterior[name][0, :, discard:]
        if name in result.rejected:  # the spread of the filter cannot fit observations that it does not use
            values = np.where(result.rejected[name][0], np.nan, values)
        spread = np.sqrt(of_site.var(0, ddof=1).mean(0))
        unit = np.where(spread > 0, spread, 1.0)
        steps = of_site.shape[1]
        observations.append((values[discard:] / unit).reshape(steps, -1))
        members.append((of_site / unit).reshape(len(of_site), steps, -1))
    joined = np.concatenate(observations, axis=-1)
    if np.all(np.isnan(joined)):
        raise ValueError(
            f"nothing is observed after the first {discard} steps; give a spin-up with observations, or discard fewer."
        )
    return consistency(joined, np.concatenate(members, axis=-1), 0.0, axis=1, block=block).ratio
