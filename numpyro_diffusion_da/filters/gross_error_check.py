r"""Background check of a filter: observations too far from the forecast are rejected, as at weather centers.

Before an observation y is used, it is compared with its background, the forecasts of it from M particles $x'_i$ that
have not seen it. The background is that of the module `filters/background.py`, which a result holds. It is rejected if

$$
\Bigl| y - \operatorname*{mean}_i E[y \mid x'_i] \Bigr| > k s, \qquad
s^2 = \frac{M + 1}{M} \operatorname*{var}_i E[y \mid x'_i] + \operatorname*{mean}_i \operatorname{Var}[y \mid x'_i],
$$

where k is the threshold (Lorenc & Hammon 1988, Q. J. R. Meteorol. Soc. 114, 515; Andersson & Jarvinen 1999, Q. J. R.
Meteorol. Soc. 125, 697). A rejected observation is missing at that step, and the result shows which ones were rejected.

The check relies on the spread of the forecast. If a filter is overconfident in a wrong forecast, the check rejects the
observations that would correct it, and more of them at each step. Therefore a run warns if many observations are
rejected, and the default threshold is large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray

from numpyro_diffusion_da.arguments import numbers_by_name, require_count
from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.filters.background import Screen, SiteBackground
from numpyro_diffusion_da.filters.base import FilterAlgorithm, check_algorithm
from numpyro_diffusion_da.program.scan import ObservedSite, TimeInputs
from numpyro_diffusion_da.program.sites import mean_and_variance, site_mask
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.base import Info, Kernel, State, total_particles
from numpyro_diffusion_da.smc.localization import Taper


@dataclasses.dataclass(frozen=True, eq=False)
class GrossErrorCheck(FilterAlgorithm):
    r"""Filter that rejects observations too far from its forecast: ``GrossErrorCheck(FAAPF(model))``.

    It wraps another filter. An observation y is rejected if $|y - \bar y| > k s$, where $\bar y$ is its forecast, the
    mean over M particles. The expected variance s^2 of the departure is (M + 1) / M times the variance of these
    forecasts plus the variance of the observation error (Lorenc & Hammon 1988, Q. J. R. Meteorol. Soc. 114, 515).

    `Bootstrap` and `EnKF` draw their forecasts without the observations, so the check costs nothing and uses all
    particles. `FAAPF` and `GuidedPF` draw the forecasts of M particles for the comparison. This costs M / N of an
    unguided draw of all N particles, and is included in the network passes. If nothing is rejected, all draws are those
    of the filter without the check. The numbers of the comparison are in ``result.background``.

    Rejected observations are marked in ``result.rejected``, in `sample_stats` as ``{site}_rejected``, in the printed
    summary, and for an `OnlineFilter` in ``info.check.rejected``. A run warns if more than a third of its observations
    were rejected. Then the ensemble has lost the truth or the given errors are much too small, and with the check the
    filter does not recover.

    Args:
        algorithm: filter to wrap.
        threshold: k, in expected standard deviations of the departure. One number applies to all observed sites, apart
            from each `numpyro.factor`, which has no values; a mapping from names to numbers checks these sites only.
            For Gaussian variables, a well calibrated filter rejects 6 of 10 million good observations at 5.0, and 3 of
            1000 at 3.0.
        members: largest number of particles that `FAAPF` and `GuidedPF` draw for the check, spread evenly over all; 2
            or more. With 64, the standard deviation of the departure is known to within 9 %.

    Raises:
        TypeError: `algorithm` is not a filter, or has a check already; or `members` is not a whole number.
        ValueError: a threshold is not positive, or `members` is below 2; when used, a threshold names a site that is
            not observed, a checked site has no mean and variance, or the filter has one particle.
    """

    algorithm: FilterAlgorithm
    threshold: float | Mapping[str, float] = 5.0
    members: int = 64

    def __post_init__(self) -> None:
        check_algorithm(self.algorithm, "GrossErrorCheck", "threshold=5.0")
        if isinstance(self.algorithm, GrossErrorCheck):
            raise TypeError("GrossErrorCheck got a GrossErrorCheck; give a filter without a check.")
        advice = "give a positive number of standard deviations, or one for each site by name."
        threshold = numbers_by_name(self.threshold, "GrossErrorCheck", "threshold", advice)
        object.__setattr__(self, "threshold", threshold)
        require_count(self.members, "GrossErrorCheck", "members", least=2)
        for name in (
            "model",
            "can_be_sharded",
            "needs_gaussian",
            "needs_gaussian_errors",
            "moves_carry",
            "target_ess",
            "resample_below",
            "sampler",
            "lag",
        ):
            object.__setattr__(self, name, getattr(self.algorithm, name))

    def has_evidence(self) -> bool:
        """Whether the wrapped filter estimates the evidence."""
        return self.algorithm.has_evidence()

    def weight_bias_reasons(self, program: StateSpaceModel) -> list[str]:
        """Reasons why the weights are not exact: those of the wrapped filter, and the rejected observations."""
        return [*self.algorithm.weight_bias_reasons(program), "observations far from the forecast are left out"]

    def parents(self, program: StateSpaceModel, ancestors: Array, values: Array) -> Array:
        """Select the value of each new particle's ancestor, as the wrapped filter does."""
        return self.algorithm.parents(program, ancestors, values)

    def moving_taper(self) -> Taper | None:
        """Taper of the wrapped filter if places of observations move; None otherwise."""
        return self.algorithm.moving_taper()

    def passes(self, info: Info) -> NetworkPasses:
        """Network passes of one step of the wrapped filter and of the check, per particle."""
        return self.algorithm.passes(info)

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Settings of the wrapped filter and of the check as plain values, for the attributes of a result."""
        by_site = isinstance(self.threshold, Mapping)
        return {
            **self.algorithm.settings(program),
            "gross_error_threshold": str(dict(self.threshold)) if by_site else self.threshold,  # type: ignore[dict-item, arg-type]
            "gross_error_members": self.members,
        }

    def _thresholds(self, program: StateSpaceModel) -> dict[str, float]:
        """Threshold of each checked site, by name.

        Raises:
            ValueError: a threshold names a site that is not observed.
        """
        if not isinstance(self.threshold, Mapping):
            # A numpyro.factor observes nothing: its value has no elements.
            names = [name for name, site in program.structure.observed.items() if 0 not in site.shape]
            return dict.fromkeys(names, self.threshold)
        if unknown := sorted(set(self.threshold) - set(program.structure.observed_names)):
            raise ValueError(
                f"GrossErrorCheck got thresholds for {unknown}, but the observed sites are "
                f"{sorted(program.structure.observed_names)}; give names of these."
            )
        return dict(self.threshold)

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None, screen: Screen | None = None) -> Kernel:
        """Build the kernel of the wrapped filter, for which rejected observations are missing.

        `FilterAlgorithm.kernel` explains arguments and return value; there is no other `screen` than this one.

        Raises:
            ValueError: a threshold names a site that is not observed; when the kernel runs, a checked site has no mean
                and variance, or there is one particle.
        """
        thresholds = self._thresholds(program)

        def reject(
            background: Mapping[str, SiteBackground], sites: Mapping[str, ObservedSite]
        ) -> dict[str, Bool[Array, ...]]:
            for name in thresholds:
                if name not in background:
                    mean_and_variance(name, sites[name].fn)  # raises with the reason
            return {name: _too_far(sites[name], background[name], k) for name, k in thresholds.items()}

        step = self.algorithm.kernel(program, batch_size, Screen(reject, self.members))

        def kernel(rng_key: PRNGKeyArray, state: State, inputs: TimeInputs) -> tuple[State, Info]:
            if total_particles(state.particles) < 2:
                raise ValueError("GrossErrorCheck got one particle, which has no spread; give num_particles=2 or more.")
            return step(rng_key, state, inputs)

        return kernel


def _too_far(site: ObservedSite, background: SiteBackground, threshold: float) -> Bool[Array, ...]:
    """Whether each value of a site is too far from its background; False where nothing is observed.

    Args:
        site: observed site.
        background: background of the site.
        threshold: k, in standard deviations.
    """
    departure = jnp.abs(site.value - background.mean)
    expected = background.variance + background.error_variance
    return (departure > threshold * jnp.sqrt(expected)) & site_mask(site.fn)
