"""Twin experiment with Lorenz-96: a known truth, simulated observations of it, several filters, and their scores.

The truth is stochastic Lorenz-96. All filters but two use a diffusion emulator of it. The main filter is
FA-APF with localized, moved ancestors. Its controls are the free ensemble without observations, a bootstrap filter,
guided particles with equal weights, and the published FA-APF without localization, all on the same emulator, and an
ensemble Kalman filter with the *true* dynamics. The last filter is the main one with an emulator of one pass.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, PRNGKeyArray
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96
from numpyro_diffusion_da.demos.scores import check_spin_up, mean_and_standard_error, summarized, table_of_scores

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "passes": "passes",
    "rmse": "RMSE",
    "rmse_observed": "obs.",
    "rmse_unobserved": "unobs.",
    "spread_skill": "spread/\nskill",
    "crps": "CRPS",
    "ess": "ESS",
    "tempering": "temp.",
}
PLUS = {"passes": "conditioning"}
"""Scores that stand behind another one in its column."""

FREE, BOOTSTRAP, GUIDED, GLOBAL, MAIN, ENKF, ONE_PASS = FILTERS = (
    "free ensemble",
    "bootstrap",
    "equal weights",
    "FA-APF",
    "FA-APF, moved",
    "EnKF, true model",
    "moved, one pass",
)


@dataclasses.dataclass(frozen=True)
class TwinExperiment:
    """Settings of the Lorenz-96 twin experiment: which sites are observed, how accurately, and for how long.

    Args:
        cycles: number of filter steps.
        spin_up: number of steps at the start that are not scored.
        every: spacing of observed sites; every n-th site is observed.
        error_variance: error variance of the observations.

    Raises:
        ValueError: no cycles are left to score, or `error_variance` is not positive.
    """

    cycles: int = 60
    spin_up: int = 20
    every: int = 2
    error_variance: float = 0.1

    def __post_init__(self) -> None:
        check_spin_up(self.spin_up, self.cycles)
        if not self.error_variance > 0:
            raise ValueError(f"error_variance={self.error_variance}; give a positive variance.")

    def truth(self, rng_key: PRNGKeyArray, start: dist.Distribution) -> tuple[np.ndarray, np.ndarray]:
        """Draw a truth and its observations, after 50 steps of spin-up of the system.

        Args:
            rng_key: random key.
            start: distribution of the state before the spin-up.

        Returns:
            States, shape (cycles, sites), and observations, shape (cycles, observed sites).
        """
        start_key, run_key, error_key = jax.random.split(rng_key, 3)
        states = lorenz96.trajectory(run_key, start.sample(start_key), 50 + self.cycles)[50:]
        observed = states[:, :: self.every]
        y = observed + np.sqrt(self.error_variance) * jax.random.normal(error_key, observed.shape)
        return np.asarray(states), np.asarray(y)

    def emulator_program(self, prior: ndda.DiffusionPrior | ndda.diffusion.OnePassPrior) -> Callable[[Array], None]:
        """State-space model with a diffusion or an emulator of one pass as transition."""

        def transition(x: Array) -> dist.Distribution:
            if isinstance(prior, ndda.diffusion.OnePassPrior):
                return ndda.OnePassTransition(prior, x)
            return ndda.DiffusionTransition(prior, x, sampler=ndda.Sampler.cheap())

        def lorenz96_emulator(y: Array) -> None:
            x0 = numpyro.sample("x0", prior.climatology())

            def step(x: Array, y_t: Array) -> tuple[Array, None]:
                x = numpyro.sample("x", transition(x))
                error = np.sqrt(self.error_variance)
                numpyro.sample("y", dist.Normal(x[:: self.every], error).to_event(1), obs=y_t)
                return x, None

            scan(step, x0, y)

        return lorenz96_emulator

    def local_filter(self, model: Callable[[Array], None], sites: int, noise_level: float | None = 10.0) -> ndda.FAAPF:
        """FA-APF with localized, moved ancestors; settings are those of examples/benchmarks/local_ancestors.py."""
        taper = ndda.Taper(5.0, ndda.Ring(sites), {"y": np.arange(0, sites, self.every)}, state=np.arange(sites))
        # Errors of the emulator are nearly independent between sites, so one product with random signs is enough.
        weight = ndda.Moment(noise_level=noise_level, probes=1)
        return ndda.FAAPF(model, weight=weight, guidance=ndda.MMPS.cheap(), taper=taper)

    def true_program(self, start: dist.Distribution) -> Callable[[Array], None]:
        """State-space model with the true dynamics as transition."""

        def lorenz96_truth(y: Array) -> None:
            x0 = numpyro.sample("x0", start)

            def step(x: Array, y_t: Array) -> tuple[Array, None]:
                x = numpyro.sample("x", dist.Normal(lorenz96.flow(x), np.sqrt(lorenz96.NOISE_VARIANCE)).to_event(1))
                error = np.sqrt(self.error_variance)
                numpyro.sample("y", dist.Normal(x[:: self.every], error).to_event(1), obs=y_t)
                return x, None

            scan(step, x0, y)

        return lorenz96_truth

    def score(self, result: ndda.FilterResult, states: np.ndarray) -> dict[str, float]:
        """Scores of a run over times and sites after the spin-up.

        Args:
            result: result of a filter with the latent site "x".
            states: truth, shape (cycles, sites).

        Returns:
            Errors, spread, CRPS, network and conditioning passes per particle and step, and medians of ESS and
            tempering exponent.
        """
        particles = result.posterior["x"][0, :, self.spin_up :]
        truth = states[self.spin_up :]
        observed = np.arange(truth.shape[1]) % self.every == 0
        passes = result.mean_passes(self.spin_up)
        return {
            "rmse": ndda.diagnostics.rmse(particles, truth),
            "rmse_observed": ndda.diagnostics.rmse(particles[..., observed], truth[:, observed]),
            "rmse_unobserved": ndda.diagnostics.rmse(particles[..., ~observed], truth[:, ~observed]),
            "spread_skill": ndda.diagnostics.spread_skill(particles, truth),
            "crps": ndda.diagnostics.crps(particles, truth),
            "ess": float(np.median(result.sample_stats["ess"][0, self.spin_up :])),
            "tempering": float(np.median(result.sample_stats["tempering"][0, self.spin_up :])),
            "passes": passes.network,
            "conditioning": passes.conditioning,
        }


@dataclasses.dataclass(frozen=True)
class TwinResult:
    """Scores of all filters on all truths, and their runs on the first truth.

    Attributes:
        scores: filter -> score -> values, shape (truths,).
        rmse_by_time: filter -> RMSE of the mean over all sites, shape (truths, cycles).
        states: first truth, shape (cycles, sites).
        runs: filter -> run on the first truth.
    """

    scores: dict[str, dict[str, np.ndarray]]
    rmse_by_time: dict[str, np.ndarray]
    states: np.ndarray
    runs: dict[str, ndda.FilterResult]

    def mean(self, name: str, score: str) -> tuple[float, float]:
        """Mean of a score over truths and its standard error, which is NaN for a single truth."""
        return mean_and_standard_error(self.scores[name][score])

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and standard error over truths of each score of each filter, as Python floats."""
        kept = (*COLUMNS, *PLUS.values())
        return summarized({name: {key: scores[key] for key in kept} for name, scores in self.scores.items()})


def score_table(result: TwinResult) -> Table:
    """Table of scores with one row per filter, mean ± standard error over truths."""
    title = f"mean over {len(result.scores[MAIN]['rmse'])} truths ± standard error"
    plain = {"passes": 0, "ess": 0, "tempering": 3}
    return table_of_scores(title, result.summary(), COLUMNS, MAIN, decimals=2, plain=plain, plus=PLUS)


def run_twin(
    experiment: TwinExperiment,
    prior: ndda.DiffusionPrior,
    one_pass: ndda.diffusion.OnePassPrior,
    *,
    seed: int = 0,
    truths: int = 3,
    num_particles: int = 256,
    on_step: Callable[[str], None] = lambda name: None,
) -> TwinResult:
    """Run all filters on all truths.

    Args:
        experiment: settings of the experiment.
        prior: diffusion emulator.
        one_pass: emulator of one pass.
        seed: seed of truths and filters.
        truths: number of different truths.
        num_particles: number of particles, or members, of each filter.
        on_step: function that is called with the name of a filter before each of its runs.

    Raises:
        ValueError: `truths` is below 1.
    """
    if truths < 1:
        raise ValueError(f"truths={truths}; give 1 or more.")
    program, climate = experiment.emulator_program(prior), prior.climatology()

    def make(algorithm: ndda.filters.FilterAlgorithm) -> ndda.Filter:
        return ndda.Filter(algorithm, num_particles=num_particles, progress_bar=False)

    blind = make(ndda.Bootstrap(program))
    filters = {
        FREE: blind,  # gets no observations, so that all weights are equal and it forecasts
        BOOTSTRAP: blind,
        GUIDED: make(ndda.FAAPF(program, weight=ndda.Equal(), guidance=ndda.MMPS.cheap())),
        GLOBAL: make(ndda.FAAPF(program, guidance=ndda.MMPS.cheap())),
        MAIN: make(experiment.local_filter(program, prior.layout.shape[0])),
        ENKF: make(ndda.EnKF(experiment.true_program(climate))),
        ONE_PASS: make(experiment.local_filter(experiment.emulator_program(one_pass), one_pass.layout.shape[0], None)),
    }
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in filters}
    by_time: dict[str, list[np.ndarray]] = {name: [] for name in filters}
    runs: dict[str, ndda.FilterResult] = {}
    for number in range(truths):
        truth_key, filter_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        states, y = experiment.truth(truth_key, climate)
        if number == 0:
            first_states = states
        for i, (name, filter) in enumerate(filters.items()):
            on_step(name)
            with warnings.catch_warnings():
                # The table has columns for what these warn of: tempering, and spread against error.
                warnings.filterwarnings("ignore", message="weights are tempered")
                warnings.filterwarnings("ignore", message="observations are farther from the forecast")
                filter.run(jax.random.fold_in(filter_key, i), np.full_like(y, np.nan) if name == FREE else y)
            scores[name].append(experiment.score(filter.result, states))
            by_time[name].append(ndda.diagnostics.rmse(filter.result.posterior["x"][0], states, axis=1))
            if number == 0:
                runs[name] = filter.result
    return TwinResult(
        {name: {key: np.array([s[key] for s in rows]) for key in rows[0]} for name, rows in scores.items()},
        {name: np.array(rows) for name, rows in by_time.items()},
        first_states,
        runs,
    )
