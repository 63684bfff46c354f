"""A twin experiment: a known truth, observations made of it, several filters, and their scores.

The truth is stochastic Lorenz-96; every filter but one sees only a diffusion emulator of it. The controls say what the
result is worth: the free ensemble (no observations), guided particles without weights, a bootstrap filter on the same
emulator, and an ensemble Kalman filter that is given the *true* dynamics.
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
    "tempering": "infl.",
}
FREE, BOOTSTRAP, GUIDED, GLOBAL, MAIN, ENKF = FILTERS = (
    "free ensemble",
    "bootstrap",
    "equal weights",
    "FA-APF",
    "FA-APF, local",
    "EnKF, true model",
)


@dataclasses.dataclass(frozen=True)
class TwinExperiment:
    """What is observed of the truth, and for how long.

    Args:
        cycles: filter steps.
        spin_up: steps at the start that are not scored.
        every: every n-th site is observed.
        error_variance: of the observations.

    Raises:
        ValueError: nothing left to score, or an error variance that is not positive.
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
        """(states, observations), shapes (cycles, sites) and (cycles, observed sites), after 50 steps of spin-up."""
        start_key, run_key, error_key = jax.random.split(rng_key, 3)
        states = lorenz96.trajectory(run_key, start.sample(start_key), 50 + self.cycles)[50:]
        observed = states[:, :: self.every]
        y = observed + np.sqrt(self.error_variance) * jax.random.normal(error_key, observed.shape)
        return np.asarray(states), np.asarray(y)

    def emulator_program(self, prior: ndda.DiffusionPrior) -> Callable[[Array], None]:
        """The state-space model with a diffusion emulator."""

        def lorenz96_emulator(y: Array) -> None:
            x0 = numpyro.sample("x0", prior.climatology())

            def step(x: Array, y_t: Array) -> tuple[Array, None]:
                x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
                error = np.sqrt(self.error_variance)
                numpyro.sample("y", dist.Normal(x[:: self.every], error).to_event(1), obs=y_t)
                return x, None

            scan(step, x0, y)

        return lorenz96_emulator

    def local_filter(self, model: Callable[[Array], None], sites: int) -> ndda.FAAPF:
        """FA-APF with localized ancestors; settings as in `examples/benchmarks/local_ancestors.py`, tuned there."""
        taper = ndda.Taper(5.0, ndda.Ring(sites), {"y": np.arange(0, sites, self.every)}, state=np.arange(sites))
        # The emulator's errors are nearly independent from site to site: one product with random signs is enough.
        return ndda.FAAPF(model, weight=ndda.Moment(noise_level=10.0, probes=1), target_ess=0.1, taper=taper)

    def true_program(self, start: dist.Distribution) -> Callable[[Array], None]:
        """The state-space model with the true dynamics."""

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
        """Scores over time and sites after the spin-up; squares are averaged first, the root taken last."""
        particles = result.posterior["x"][0, :, self.spin_up :]
        truth = states[self.spin_up :]
        observed = np.arange(truth.shape[1]) % self.every == 0
        passes = sum(v[0, self.spin_up :].mean() for v in result.network_passes.values())
        return {
            "rmse": ndda.diagnostics.rmse(particles, truth),
            "rmse_observed": ndda.diagnostics.rmse(particles[..., observed], truth[:, observed]),
            "rmse_unobserved": ndda.diagnostics.rmse(particles[..., ~observed], truth[:, ~observed]),
            "spread_skill": ndda.diagnostics.spread_skill(particles, truth),
            "crps": ndda.diagnostics.crps(particles, truth),
            "ess": float(np.median(result.sample_stats["ess"][0, self.spin_up :])),
            "tempering": float(np.median(result.sample_stats["tempering"][0, self.spin_up :])),
            "passes": float(passes),
        }


@dataclasses.dataclass(frozen=True)
class TwinResult:
    """Scores of every filter on every truth, and one run to look at.

    Attributes:
        scores: by filter and score, shape (truths,).
        rmse_by_time: by filter, shape (truths, cycles).
        states: the first truth, shape (cycles, sites).
        runs: by filter, the run on the first truth.
    """

    scores: dict[str, dict[str, np.ndarray]]
    rmse_by_time: dict[str, np.ndarray]
    states: np.ndarray
    runs: dict[str, ndda.FilterResult]

    def mean(self, name: str, score: str) -> tuple[float, float]:
        """Mean over truths and its standard error (NaN for a single truth)."""
        return mean_and_standard_error(self.scores[name][score])

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and standard error by filter and score, in plain numbers."""
        return summarized({name: {key: scores[key] for key in COLUMNS} for name, scores in self.scores.items()})


def score_table(result: TwinResult) -> Table:
    """The scores as a table of one row a filter, mean ± standard error over truths."""
    title = f"mean over {len(result.scores[MAIN]['rmse'])} truths ± standard error"
    plain = {"passes": 0, "ess": 0, "tempering": 3}
    return table_of_scores(title, result.summary(), COLUMNS, MAIN, decimals=2, plain=plain)


def run_twin(
    experiment: TwinExperiment,
    prior: ndda.DiffusionPrior,
    *,
    seed: int = 0,
    truths: int = 3,
    num_particles: int = 256,
    on_step: Callable[[str], None] = lambda name: None,
) -> TwinResult:
    """Run every filter on every truth.

    Args:
        experiment: the experiment.
        prior: the diffusion emulator.
        seed: of truths and filters.
        truths: number of different truths.
        num_particles: particles, or members, of every filter.
        on_step: called with a filter's name before each of its runs.

    Raises:
        ValueError: fewer than one truth.
    """
    if truths < 1:
        raise ValueError(f"truths={truths}; give 1 or more.")
    program, climate = experiment.emulator_program(prior), prior.climatology()

    def make(algorithm: ndda.filters.FilterAlgorithm) -> ndda.Filter:
        return ndda.Filter(algorithm, num_particles=num_particles, progress_bar=False)

    blind = make(ndda.Bootstrap(program))
    filters = {
        FREE: blind,  # with nothing observed every weight is equal: a forecast
        BOOTSTRAP: blind,
        GUIDED: make(ndda.FAAPF(program, weight=ndda.Equal())),
        GLOBAL: make(ndda.FAAPF(program)),
        MAIN: make(experiment.local_filter(program, prior.layout.shape[0])),
        ENKF: make(ndda.EnKF(experiment.true_program(climate))),
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
                # What is warned of is a column of the table.
                warnings.filterwarnings("ignore", message="weights are tempered")
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
