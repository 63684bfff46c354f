"""Observations too far from the forecast are left out, as weather centers do: the background check.

An observation y is compared, before it is used, with forecasts of it from M particles x'_i that have not seen it:

    y is rejected if |y - mean_i E[y | x'_i]| > k s,    s^2 = (M + 1) / M var_i E[y | x'_i] + mean_i Var[y | x'_i],

with k the threshold (Lorenc & Hammon 1988, Q. J. R. Meteorol. Soc. 114, 515; Andersson & Jarvinen 1999, the same, 125,
697). A rejected observation is missing at that step, and the result says which.

The forecast is taken at its word: a filter that is too sure of a wrong one rejects what would bring it back, and then
the more the longer. Hence the warning, and a threshold that is not small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import require_count
from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.filters.base import FilterAlgorithm, check_algorithm
from numpyro_diffusion_da.program.scan import ObservedSite, TimeInputs
from numpyro_diffusion_da.program.sites import mean_and_variance, site_mask
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.base import Info, Kernel, State, map_particles, num_particles


class CheckRecord(NamedTuple):
    """What came of a check.

    Attributes:
        rejected: by checked site, True where an observation was left out, at the shape of the value.
        passes: network passes made, per particle of the filter.
    """

    rejected: dict[str, Bool[Array, ...]]
    passes: NetworkPasses


@dataclasses.dataclass(frozen=True, eq=False)
class GrossErrorCheck(FilterAlgorithm):
    """Another filter, which is not given what is too far from its forecast: ``GrossErrorCheck(FAAPF(model))``.

    Each step draws the forecasts that observations are compared with anew, from `members` of the particles: M / N of
    the cost of an unguided draw of all, counted among the network passes. Otherwise the filter is what it is without,
    to the last bit where nothing is rejected.

    What was left out is in ``result.rejected``, in `sample_stats` as ``{site}_rejected``, in the printed summary, and
    of an `OnlineFilter` in ``info.check.rejected``. If more than a third of a run's observations were, the run warns:
    then the ensemble has lost the truth, or the errors are given far too small, and the check only keeps it so.

    Args:
        algorithm: the filter.
        threshold: k, in standard deviations of the departure that forecast and observation error let expect; one for
            all observed sites, or by name for those that are checked. A right filter of Gaussian variables rejects six
            of ten million good observations at 5.0, and three of a thousand at 3.0.
        members: M at most, spread evenly over the particles; 64 know the departure's standard deviation to 9 %.

    Raises:
        TypeError: what is no filter, or one that has a check.
        ValueError: a threshold that is not positive, fewer than two members. From the kernel: a site that is not
            observed, or whose distribution has no mean and variance; fewer than two particles.
    """

    algorithm: FilterAlgorithm
    threshold: float | Mapping[str, float] = 5.0
    members: int = 64

    def __post_init__(self) -> None:
        check_algorithm(self.algorithm, "GrossErrorCheck", "threshold=5.0")
        if isinstance(self.algorithm, GrossErrorCheck):
            raise TypeError("GrossErrorCheck got a GrossErrorCheck; give a filter without a check of its own.")
        thresholds = self.threshold.values() if isinstance(self.threshold, Mapping) else [self.threshold]
        if not all(k > 0.0 for k in thresholds):
            raise ValueError(
                f"GrossErrorCheck got threshold={self.threshold}; give a positive number of standard deviations."
            )
        require_count(self.members, "GrossErrorCheck", "members", least=2)
        for name in ("model", "needs_gaussian", "needs_gaussian_errors", "target_ess", "sampler"):
            object.__setattr__(self, name, getattr(self.algorithm, name))

    def has_evidence(self) -> bool:
        """As without the check."""
        return self.algorithm.has_evidence()

    def weight_bias_reasons(self, program: StateSpaceModel) -> list[str]:
        """As without, and that the filter chooses its observations."""
        return [*self.algorithm.weight_bias_reasons(program), "observations far from the forecast are left out"]

    def parents(self, program: StateSpaceModel, ancestors: Array, values: Array) -> Array:
        """As without the check."""
        return self.algorithm.parents(program, ancestors, values)

    def inflate_forecast(self, forecast: Array) -> Array:
        """Apply the inflation of the forecast that the wrapped filter uses."""
        return self.algorithm.inflate_forecast(forecast)

    def passes(self, info: Info) -> NetworkPasses:
        """Those of the filter and of the check."""
        return self.algorithm.passes(info).plus(info.check.passes)

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """The filter's, and those of the check."""
        by_site = isinstance(self.threshold, Mapping)
        return {
            **self.algorithm.settings(program),
            "gross_error_threshold": str(dict(self.threshold)) if by_site else self.threshold,  # type: ignore[dict-item, arg-type]
            "gross_error_members": self.members,
        }

    def _thresholds(self, program: StateSpaceModel) -> dict[str, float]:
        """By the sites that are checked."""
        if not isinstance(self.threshold, Mapping):
            return dict.fromkeys(program.structure.observed_names, self.threshold)
        if unknown := sorted(set(self.threshold) - set(program.structure.observed_names)):
            raise ValueError(
                f"GrossErrorCheck has thresholds of {unknown}, but the observed sites are "
                f"{sorted(program.structure.observed_names)}."
            )
        return dict(self.threshold)

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> Kernel:
        """The filter's, with what is rejected missing in the program that it is given.

        Raises:
            ValueError: see the class.
        """
        thresholds = self._thresholds(program)
        forecasts = self.algorithm.forecasts(program, batch_size)

        def kernel(rng_key: PRNGKeyArray, state: State, inputs: TimeInputs) -> tuple[State, Info]:
            n = num_particles(state.particles)
            if n < 2:
                raise ValueError("GrossErrorCheck got one particle, and one particle has no spread; give 2 or more.")
            # Neighbors are often copies of one particle: those that look are as far apart as there is room.
            some = np.arange(min(self.members, n)) * n // min(self.members, n)
            particles = jax.tree.map(lambda leaf: leaf[some], state.particles)
            # A fifth key beside those of the kernels, which are the same with and without a check.
            x, record = forecasts(jax.random.split(rng_key, 5)[4], particles, inputs)
            seen = map_particles(_moments(program, thresholds, inputs), batch_size)(x, particles)
            sites = program.sites(jax.tree.map(lambda leaf: leaf[0], particles), inputs, x[0]).observed
            rejected = {name: _too_far(sites[name], seen[name], k) for name, k in thresholds.items()}
            new, info = self.algorithm.kernel(program.without(rejected), batch_size)(rng_key, state, inputs)
            passes = jax.tree.map(lambda count: jnp.sum(count.astype(float)) / n, record.passes)
            return new, info._replace(check=CheckRecord(rejected, passes))

        return kernel


def _moments(
    program: StateSpaceModel, names: Mapping[str, Any], inputs: TimeInputs
) -> Callable[[Array, PyTree], dict[str, tuple[Array, Array]]]:
    """(x', particle) -> E[y | x'] and Var[y | x'] by site."""

    def moments(x: Array, carry: PyTree) -> dict[str, tuple[Array, Array]]:
        sites = program.sites(carry, inputs, x).observed
        return {name: mean_and_variance(name, sites[name].fn) for name in names}

    return moments


def _too_far(site: ObservedSite, forecast: tuple[Array, Array], threshold: float) -> Bool[Array, ...]:
    """The comparison of the module; False where nothing is observed. A member that is not finite does not count."""
    means, variances = forecast
    members = jnp.sum(jnp.isfinite(means), axis=0)
    means = jnp.where(jnp.isfinite(means), means, jnp.nan)
    expected = (1.0 + 1.0 / members) * jnp.nanvar(means, axis=0, ddof=1) + jnp.nanmean(variances, axis=0)
    departure = jnp.abs(site.value - jnp.nanmean(means, axis=0))
    return (departure > threshold * jnp.sqrt(expected)) & site_mask(site.fn)
