"""Results of runs as plain numpy arrays; `convert` adds names, coordinates and units."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from numpyro_diffusion_da.fields.layout import Layout

PER_PARTICLE = frozenset({"log_weights", "ancestors", "solver_residual", "filter_draw"})
"""Statistics of a step with one value for each particle."""

OF_WEIGHTS = frozenset(
    {
        *{"log_weights", "ancestors", "ess", "tempering", "distinct_ancestors", "log_weight_std"},
        *{"non_gaussianity", "moved_share"},
    }
)
"""Statistics of a step with one value for each block if resampling is localized."""


class Background(NamedTuple):
    """Prediction of one observed site before its observations were used, in the unit of the observation.

    If the filter is right, the squared departure (O - B)^2 of the observation O has the mean P + R. The module
    `diagnostics.innovations` compares them. Arrays are (chain, time, ...), with the axes of the site's value last.

    Attributes:
        mean: B, the mean of the predicted observation over the particles.
        variance: P, the variance of the prediction without the observation error. It includes the sampling error of B.
        error_variance: R, the variance of the observation error, a mean over the particles.
        members: number of particles that B is a mean over, (chain, time).
    """

    mean: np.ndarray
    variance: np.ndarray
    error_variance: np.ndarray
    members: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        """Expected squared departure P + R of each value, (chain, time, ...)."""
        return self.variance + self.error_variance


class MeanPasses(NamedTuple):
    """Mean number of network passes per particle and step.

    Attributes:
        network: forward, jvp and vjp passes of the network that a draw runs, together.
        conditioning: passes of the network that computes the conditioning of the previous states.
    """

    network: float
    conditioning: float


@dataclasses.dataclass(frozen=True)
class FilterResult:
    """Result of a filter run as numpy arrays; `to_datatree` gives them names.

    Attributes:
        posterior: particles of latent and deterministic sites, each (chain, draw, time, ...); equally weighted. Empty
            if the run kept reductions only.
        posterior_predictive: one draw of each observed site per particle, error included, (chain, draw, time, ...).
        log_likelihood: log p(y | x) of each observed site, (chain, draw, time, ...); 0 where missing or rejected.
        observed_data: observed values of each observed site, (time, ...), NaN where missing.
        observed_mask: mask of each observed site, False where missing, (time, ...).
        observed_error: standard deviation of the observation error of each observed site, (time, ...); NaN if the
            distribution of the observation has none.
        forecast: one-step forecast mean E[x' | c] of each particle's ancestor c, (chain, draw, time, ...), or None if
            forecasts were not kept.
        sample_stats: diagnostics of each step, (chain, time), or (chain, draw, time) if they have one value per
            particle. With localized resampling, weight diagnostics have a trailing block axis. Then `log_weights` and
            `ancestors` are left out if they have more than 2^20 values a step, particles times blocks.
        network_passes: number of forward, jvp and vjp passes of the network per particle and step, and of passes of the
            conditioning network (`conditioning`), each (chain, time).
        latent_name: name of the state in `posterior`; the first site of `posterior` if the state was not kept.
        layout: layout of the state, or None if the transition has none.
        attributes: settings that are needed to repeat the run.
        rejected: True where a gross-error check rejected an observation, for each checked site, (chain, time, ...).
        background: prediction of each observed site before its observations were used, by name. Sites whose
            distribution defines no mean and variance are left out.
        metadata: values of the deterministic sites that are the same for all particles, (time, ...): those that depend
            on the inputs of the scan and on arguments of the program only, such as places or numbers of stations.
        lagged: states on the lines of the particles `lag` steps later, which the filter has selected and moved with
            them, (chain, draw, time, ...); None for a filter without a lag. `results.fixed_lag` makes a result of them.
        reduced: reductions of the particles that the run kept, by kind (`mean`, `std`, `quantile`) and site, (chain,
            time, ...); quantiles have their axis after time.
    """

    posterior: dict[str, np.ndarray]
    posterior_predictive: dict[str, np.ndarray]
    log_likelihood: dict[str, np.ndarray]
    observed_data: dict[str, np.ndarray]
    observed_mask: dict[str, np.ndarray]
    observed_error: dict[str, np.ndarray]
    forecast: np.ndarray | None
    sample_stats: dict[str, np.ndarray]
    network_passes: dict[str, np.ndarray]
    latent_name: str
    layout: Layout | None
    attributes: dict[str, Any]
    rejected: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    metadata: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    background: dict[str, Background] = dataclasses.field(default_factory=dict)
    lagged: np.ndarray | None = None
    reduced: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def quantiles(self) -> tuple[float, ...]:
        """Quantiles of `reduced`."""
        return tuple(self.attributes.get("quantiles", ()))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of chains, draws and steps."""
        if self.posterior:
            chains, draws, steps = next(iter(self.posterior.values())).shape[:3]
            return chains, draws, steps
        chains, steps = self.sample_stats["ess"].shape[:2]
        return chains, int(self.attributes["num_particles"]), steps

    def departure(self, site: str) -> np.ndarray:
        """Departure O - B of each value of a site, (chain, time, ...); NaN where missing.

        Args:
            site: name of an observed site in `background`.
        """
        return self.observed_data[site][None] - self.background[site].mean

    def mean_passes(self, spin_up: int = 0) -> MeanPasses:
        """Network passes per particle and step, averaged over chains and steps.

        Args:
            spin_up: number of steps at the start that are left out.
        """
        mean = {name: float(values[:, spin_up:].mean()) for name, values in self.network_passes.items()}
        conditioning = mean.pop("conditioning", 0.0)
        return MeanPasses(sum(mean.values()), conditioning)

    @property
    def is_local(self) -> bool:
        """Whether resampling is localized; weight diagnostics then have a trailing block axis."""
        return "ess" in self.sample_stats and self.sample_stats["ess"].ndim > 2


@dataclasses.dataclass(frozen=True)
class ParameterResult:
    """Draws of the global parameters of a program as numpy arrays; `parameters_to_datatree` gives them names.

    Attributes:
        posterior: draws of each parameter given all observations, (chain, draw, ...); equally weighted.
        sample_stats: diagnostics, (chain, draw) for `PMMH` and (chain, time) for `SMC2`.
        over_time: draws of each parameter given y_1, ..., y_k, (chain, draw, time, ...); empty for `PMMH`.
        attributes: settings that are needed to repeat the run, and diagnostics of the evidence.
    """

    posterior: dict[str, np.ndarray]
    sample_stats: dict[str, np.ndarray]
    over_time: dict[str, np.ndarray]
    attributes: dict[str, Any]
