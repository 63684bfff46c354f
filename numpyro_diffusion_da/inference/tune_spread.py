"""Tune the tempering of a filter by its innovations."""

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
    """One run of `tune_spread`: the amount of inflation, and the ratio of `consistency` that it gave."""

    amount: float
    ratio: Estimate


class SpreadTuning(NamedTuple):
    """What `tune_spread` found.

    Attributes:
        amount: the amount of inflation whose ratio is nearest to 1.
        ratio: mean (O - B)^2 over its expectation there. Amounts whose ratio differs from 1 by less than its standard
            error are alike: the spin-up is too short to tell them apart.
        within_tolerance: whether that ratio is within the tolerance; False where the runs were used up before.
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
    """The amount of inflation at which innovations are as large as expected, from a spin-up that is replayed.

    Bisection on the amount, one run over the spin-up at each, all with the same random numbers and compiled once, until
    the ratio of `consistency` is 1. The background is a draw of each observation from each particle that has not seen
    it, for any likelihood; the ratio is over all observations, each in the unit of its own predictive spread. Beside
    its own cost a run makes one unguided draw more of each particle and step.

    That ratio sees the sum of forecast spread and observation error only: if the error is given too small, the spread
    found is too large. It is the *forecast's* spread that is made right; an analysis that makes up for an error that
    the transition leaves out has to be spread wider than its own error.

    Args:
        make_filter: the filter with a given amount of inflation, as ``lambda alpha: ndda.FAAPF(model,
            inflation=(ndda.RTPS(alpha),))``. The amount is traced: give it to a `Inflation`, or as `tempering`
            or `rtps` to `EnKF`. More of it must mean a wider forecast.
        rng_key: from `jax.random.key`.
        *args: the program's arguments for the spin-up: ``y[:60]``, say, of the observations.
        between: the amounts searched, least and most.
        num_particles: that of the filter: it is part of what makes a spread too small.
        discard: steps at the start that do not count.
        tolerance: how near to 1 the ratio must be.
        max_runs: runs at most, 2 or more.
        batch_size: particles moved at a time, see `Filter`.
        block: consecutive times whose values are taken to be dependent in the standard error, see `departures`.

    Raises:
        ValueError: a ratio of 1 that is not between the two amounts (the sentence says both ratios); nothing observed;
            settings that do not fit; a program or filter that is refused.
        FloatingPointError: see `Filter.run`.
    """
    least, most = between
    if not least < most or not tolerance > 0 or max_runs < 2:
        raise ValueError(
            f"tune_spread got between={between}, tolerance={tolerance}, max_runs={max_runs}; give two amounts in "
            "rising order, a positive tolerance and 2 or more runs."
        )
    make_filter(most)  # an amount that is not allowed is refused here, by name
    first = make_filter(least)
    program = StateSpaceModel(first.model, args)
    program.check(first.needs_gaussian, first.needs_gaussian_errors)
    if not 0 <= discard < program.structure.length:
        raise ValueError(
            f"discard={discard}; the spin-up has {program.structure.length} steps: give fewer, and 0 or more."
        )
    runner = Filter(
        _OfAmount(make_filter, first), num_particles=num_particles, batch_size=batch_size, progress_bar=False
    )
    trail: list[SpreadTrial] = []

    def error_at(amount: float) -> float:
        """How far the ratio is from 1."""
        runner.run(rng_key, jnp.asarray(amount, float), *args)
        trail.append(SpreadTrial(amount, _ratio(runner.result, discard, block)))
        return trail[-1].ratio.value - 1.0

    def found() -> SpreadTuning:
        best = min(trail, key=lambda trial: abs(trial.ratio.value - 1.0))
        return SpreadTuning(*best, bool(abs(best.ratio.value - 1.0) <= tolerance), tuple(trail))

    at_least = error_at(least)
    if abs(at_least) <= tolerance:
        return found()
    at_most = error_at(most)
    if abs(at_most) > tolerance and not at_most < 0.0 < at_least:
        advice = "the filter is not too sure of itself: look at the observation error and the transition's noise"
        if min(at_least, at_most) > 0.0:
            advice = "allow more inflation, or look for a bias, or an observation error that is given too small"
        raise ValueError(
            f"squared innovations are {1 + at_least:.3g} times what is expected at {least:g} and {1 + at_most:.3g} "
            f"times at {most:g}, so no amount between them gives 1; {advice}."
        )
    while len(trail) < max_runs and not found().within_tolerance:
        middle = 0.5 * (least + most)
        least, most = (middle, most) if error_at(middle) > 0.0 else (least, middle)
    return found()


class _OfAmount(FilterAlgorithm):
    """A filter whose amount of inflation is its program's first argument; its result holds forecasts of the observations.

    An argument and not a setting: then a run with another amount compiles nothing.
    """

    needs_gaussian: ClassVar[bool] = False  # what the filter needs is checked before

    def __init__(self, make_filter: Callable[[Any], FilterAlgorithm], first: FilterAlgorithm) -> None:
        self._make_filter = make_filter

        @functools.wraps(first.model)
        def model(amount: Any, *args: Any) -> Any:
            return first.model(*args)

        self.model = model

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> Kernel:
        """The filter's, with what it forecast of the observations in place of its particles' sites."""
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
        """None: no result of it is seen."""
        return {}


def _ratio(result: FilterResult, discard: int, block: int) -> Estimate:
    """That of `consistency`, of all observations, each in the unit of its predictive spread."""
    observations, members = [], []
    for name, values in result.observed_data.items():
        of_site = result.posterior[name][0, :, discard:]
        if name in result.rejected:  # what the filter does not use says nothing of its spread
            values = np.where(result.rejected[name][0], np.nan, values)
        spread = np.sqrt(of_site.var(0, ddof=1).mean(0))
        unit = np.where(spread > 0, spread, 1.0)
        steps = of_site.shape[1]
        observations.append((values[discard:] / unit).reshape(steps, -1))
        members.append((of_site / unit).reshape(len(of_site), steps, -1))
    joined = np.concatenate(observations, axis=-1)
    if np.all(np.isnan(joined)):
        raise ValueError(f"nothing is observed after the first {discard} steps; give observations of the spin-up.")
    return consistency(joined, np.concatenate(members, axis=-1), 0.0, axis=1, block=block).ratio
