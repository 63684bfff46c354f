"""Predictive weights, log p^(y | c): how well a particle's one-step forecast predicts the next observation.

A weight is a value that a filter takes. `Equal` is the control that shows whether weights help at all. `Dirac` is the
published one. `Moment` adds the spread of the transition, and is exact for a Gaussian transition and a linear h.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_diffusion_da.arguments import count, number
from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.observation.likelihood import GaussianLikelihood, Likelihood
from numpyro_diffusion_da.smc.tempering import TemperableLogWeight
from numpyro_diffusion_da.transition.base import Dynamics, Moments
from numpyro_diffusion_da.transition.gaussian import GaussianDynamics
from numpyro_diffusion_da.transition.predictive import (
    ObservedSpread,
    matched,
    matched_pointwise,
    observed_spread,
    temperable,
    temperable_pointwise,
)


class WeightRecord(NamedTuple):
    """Cost of a weight, and the forecast it computed.

    Attributes:
        passes: network passes made.
        forecast: one-step forecast E[x' | c], shape of the state, if the weight computed it; otherwise None.
    """

    passes: NetworkPasses
    forecast: Float[Array, ...] | None


class PredictiveWeight(eqx.Module):
    """Abstract estimate of the predictive likelihood log p(y | c) for one particle."""

    @abc.abstractmethod
    def __call__(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, ""], WeightRecord]:
        """Estimate log p(y | c).

        Args:
            dynamics: dynamics p(x' | c) of the particle.
            likelihood: likelihood of the step's observations y.

        Returns:
            (log p^(y | c), a scalar; record of the weight).
        """

    def pointwise(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, " m"], WeightRecord]:
        """Estimate log p(y_j | c) of each observation by itself, for localized resampling.

        Args:
            dynamics: dynamics p(x' | c) of the particle.
            likelihood: likelihood of the step's observations y.

        Returns:
            (log p^(y_j | c) site by site, shape (m,), 0 where missing; record of the weight).

        Raises:
            TypeError: this kind of weight does not define it.
        """
        raise TypeError(
            f"{type(self).__name__} has no per-observation weights, which localized resampling (taper=) requires; "
            "use weight=ndda.Dirac() or weight=ndda.Moment(), or leave the taper out."
        )

    def temperable(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """Estimate log p(y | c) for any tempering of the observation errors, for `LikelihoodTempering`.

        Args:
            dynamics: dynamics p(x' | c) of the particle.
            likelihood: likelihood of the step's observations y.

        Returns:
            (log-weight as a function of alpha; record of the weight).

        Raises:
            TypeError: this kind of weight does not define it, or the likelihood is not Gaussian.
        """
        raise TypeError(self._cannot_temper())

    def temperable_pointwise(
        self, dynamics: Dynamics, likelihood: Likelihood
    ) -> tuple[TemperableLogWeight, WeightRecord]:
        """Estimate log p(y_j | c) of each observation by itself, for any tempering of the observation errors.

        `LikelihoodTempering` with localized resampling needs it.

        Args:
            dynamics: dynamics p(x' | c) of the particle.
            likelihood: likelihood of the step's observations y.

        Returns:
            (log-weights as functions of alpha, one term for each observation; record of the weight).

        Raises:
            TypeError: this kind of weight does not define it, or the likelihood is not Gaussian.
        """
        raise TypeError(self._cannot_temper())

    def _cannot_temper(self) -> str:
        """Return the message for a weight that does not define tempered observation errors."""
        return (
            f"{type(self).__name__} weights are not defined for tempered observation errors; "
            "use tempering=ndda.smc.WeightTempering(), or weight=ndda.Dirac() or weight=ndda.Moment()."
        )

    def bias_reasons(self, closed_form: bool, linear: bool) -> list[str]:
        """Return the reasons why the weight is biased, as clauses for a warning; empty if it is exact.

        Args:
            closed_form: whether the transition is Gaussian, and not a diffusion.
            linear: whether the mean of the observations is affine in the state and their error does not depend on the
                state.
        """
        return [f"{type(self).__name__} weights are not known to be exact"]


class Equal(PredictiveWeight):
    """Equal weights, log w = 0: particles are guided but not selected; no network pass."""

    def bias_reasons(self, closed_form: bool, linear: bool) -> list[str]:
        """Return the reason why equal weights are biased; they always are."""
        return ["Equal weights leave out the observations"]

    def __call__(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, ""], WeightRecord]:
        """Return log w = 0 and an empty record."""
        return jnp.zeros(()), WeightRecord(NetworkPasses.of(), None)

    def pointwise(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, " m"], WeightRecord]:
        """Return a log-weight of 0 for each observation, shape (m,), and an empty record."""
        observations = jax.eval_shape(likelihood.pointwise, jax.eval_shape(lambda: dynamics.moments().mean))
        return jnp.zeros(observations.shape, observations.dtype), WeightRecord(NetworkPasses.of(), None)

    def temperable(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """Return log-weights of 0 for every alpha, and an empty record."""
        return self.temperable_pointwise(dynamics, likelihood)

    def temperable_pointwise(
        self, dynamics: Dynamics, likelihood: Likelihood
    ) -> tuple[TemperableLogWeight, WeightRecord]:
        """Return log-weights of 0 for every alpha and observation, and an empty record."""
        zeros, record = self.pointwise(dynamics, likelihood)
        return TemperableLogWeight(zeros, zeros, zeros), record


class Dirac(PredictiveWeight):
    """Weight log p(y | m) at the forecast mean m = E[x' | c] (Savary et al. 2026, arXiv 2605.20028, Sec. 3).

    It approximates p(x' | c) by a point. With Gaussian errors it is log N(y; h(m), R); for any other likelihood it is
    the log-density at m. It costs one network pass. It is too peaked unless the one-step spread is small against the
    observation error.
    """

    def bias_reasons(self, closed_form: bool, linear: bool) -> list[str]:
        """Return the reason why Dirac weights are biased; they always are."""
        return ["Dirac weights leave out the spread of the transition"]

    def __call__(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, ""], WeightRecord]:
        """Return log p(y | m) at the forecast mean m, and the record with m."""
        moments = dynamics.moments()
        return likelihood.log_prob(moments.mean), WeightRecord(moments.passes, moments.mean)

    def pointwise(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, " m"], WeightRecord]:
        """Return log p(y_j | m) of each observation at the forecast mean m, shape (m,), and the record with m."""
        moments = dynamics.moments()
        return likelihood.pointwise(moments.mean), WeightRecord(moments.passes, moments.mean)

    def temperable(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """Return alpha log p(y | m) as a function of alpha, and the record with m.

        There is no other term, because the spread of the transition is left out.

        Raises:
            TypeError: the likelihood is not Gaussian.
        """
        return self.temperable_pointwise(dynamics, likelihood)

    def temperable_pointwise(
        self, dynamics: Dynamics, likelihood: Likelihood
    ) -> tuple[TemperableLogWeight, WeightRecord]:
        """Return alpha log p(y_j | m) of each observation as a function of alpha, and the record with m.

        Raises:
            TypeError: the likelihood is not Gaussian.
        """
        moments = dynamics.moments()
        gaussian = _gaussian(likelihood)
        residual, normalizers = gaussian.residual(moments.mean), gaussian.log_normalizers(moments.mean)
        curve = TemperableLogWeight(normalizers, residual**2, jnp.zeros_like(residual))
        return curve, WeightRecord(moments.passes, moments.mean)


class Moment(PredictiveWeight):
    r"""Weight from the mean m and covariance V of the transition, the log of int p(y | x') N(x'; m, V) dx'.

    With Gaussian errors it is

    $$
    \log N(y;\, h(m),\, R + H V H^T), \qquad m = E[x' \mid c], \quad V = \operatorname{Cov}[x' \mid c], \quad
    H = \frac{dh}{dx} .
    $$

    It is exact for a Gaussian transition, a linear h and Gaussian errors. Other likelihoods are integrated by
    expectation propagation over the observations, which is quadrature if they depend on independent coordinates of the
    state. It costs one network pass, and one more for each observation.

    Args:
        noise_level: noise level at which V is computed from the denoiser's Jacobian. None takes the prior's highest
            level, which is right for exact denoisers. V is the Jacobian times the square of the level, so the errors of
            a learned Jacobian are multiplied too. For a learned denoiser give about ten times the spread of the
            latent (10.0 for a latent of unit variance, which makes V 1 % too small).
        probes: number of products with random signs that estimate the diagonal of H V H^T, whatever the number of
            observations. Only localized resampling allows it, because it takes each observation by itself. None makes
            one product for each observation, without error. The error of the estimate has the size of the entries off
            the diagonal; one probe is enough if the errors of the transition are nearly independent from place to
            place.

    Raises:
        ValueError: `noise_level` is not positive, or `probes` is less than 1; when used, `probes` without localized
            resampling.
    """

    noise_level: float | None = eqx.field(
        static=True,
        default=None,
        converter=number("Moment", "noise_level", "give a positive number, or None.", optional=True, above=0),
    )
    probes: int | None = eqx.field(static=True, default=None, converter=count("Moment", "probes", optional=True))

    def bias_reasons(self, closed_form: bool, linear: bool) -> list[str]:
        """Return the reasons why moment weights are biased; none for a Gaussian transition and a linear h."""
        transition = [] if closed_form else ["Moment weights are exact for Gaussian transitions only"]
        observation = [] if linear else ["Moment weights are exact for observations linear in the state only"]
        return transition + observation

    def __call__(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, ""], WeightRecord]:
        """Return the log-likelihood of the forecast mean under forecast and observation error together, and the record.

        Raises:
            ValueError: `probes` is given, which estimates no covariance between observations.
        """
        self._check_whole()
        if isinstance(dynamics, GaussianDynamics) and dynamics.is_separate(likelihood):
            # Independent components are integrated each by itself, without expectation propagation.
            logs, record = self.pointwise(dynamics, likelihood)
            return jnp.sum(logs), record
        moments, passes = self.spread_moments(dynamics, likelihood)
        local, log_weight = matched(moments, dynamics.tangents(), likelihood)
        observations = jax.eval_shape(local.residual, moments.mean).shape[0]
        return log_weight, _record(moments, passes, observations)

    def pointwise(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, " m"], WeightRecord]:
        """Return the log-likelihood of each observation by itself, shape (m,), and the record.

        The variance of an observation is the sum of its forecast variance (H V H^T)_jj and its observation error R_jj.
        """
        moments, passes = self.spread_moments(dynamics, likelihood)
        observed = self._observed(moments, dynamics, likelihood)
        return matched_pointwise(moments, likelihood, observed), _record(moments, passes, observed.products)

    def temperable(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """Return log N(y; h(m), R / alpha + H V H^T) as a function of alpha, and the record.

        It leaves out a term that all particles with the same R share. It costs no more network passes than the weight
        itself.

        Raises:
            ValueError: `probes` is given, which estimates no covariance between observations.
            TypeError: the likelihood is not Gaussian.
        """
        self._check_whole()
        moments, passes = self.spread_moments(dynamics, likelihood)
        curve = temperable(moments, _gaussian(likelihood))
        return curve, _record(moments, passes, len(curve.variances))

    def temperable_pointwise(
        self, dynamics: Dynamics, likelihood: Likelihood
    ) -> tuple[TemperableLogWeight, WeightRecord]:
        """Return the tempered log-likelihood of each observation as a function of alpha, and the record.

        It is log N(y_j; h_j(m), R_j / alpha + (H V H^T)_jj), up to a term that all particles with the same R share.

        Raises:
            TypeError: the likelihood is not Gaussian.
        """
        moments, passes = self.spread_moments(dynamics, likelihood)
        observed = self._observed(moments, dynamics, _gaussian(likelihood))
        curve = temperable_pointwise(_gaussian(likelihood), moments, observed)
        return curve, _record(moments, passes, observed.products)

    def _observed(self, moments: Moments, dynamics: Dynamics, likelihood: Likelihood) -> ObservedSpread:
        """Return the spread of the observations, with the same random signs for all particles."""
        return observed_spread(moments, dynamics.tangents(), likelihood, self.probes, jax.random.key(0))

    def _check_whole(self) -> None:
        """Raise a ValueError if `probes` is given, because a weight of whole particles needs the full covariance."""
        if self.probes is not None:
            raise ValueError(
                f"Moment(probes={self.probes}) estimates only the variance of each observation, and weights without "
                "localization need the full covariance; leave probes out, or give the filter a taper."
            )

    def spread_moments(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[Moments, NetworkPasses]:
        """Return the mean and covariance of the transition, and the network passes they cost.

        The mean always comes from the highest level, where it is exact. The passes include those of
        `Dynamics.tangents`, which a likelihood that is not Gaussian needs.
        """
        moments = dynamics.moments()
        passes = moments.passes.plus(tangent_passes(dynamics, likelihood))
        if self.noise_level is None:
            return moments, passes
        spread = dynamics.moments(self.noise_level)
        return spread._replace(mean=moments.mean), passes.plus(spread.passes)


def _record(moments: Moments, passes: NetworkPasses, products: int) -> WeightRecord:
    """Return the record of a weight that made this many products with V."""
    made = jax.tree.map(lambda n: n * products, moments.passes_per_product)
    return WeightRecord(passes.plus(made), moments.mean)


def tangent_passes(dynamics: Dynamics, likelihood: Likelihood) -> NetworkPasses:
    """Return the network passes of `Dynamics.tangents`, which only a likelihood that is not Gaussian uses."""
    return NetworkPasses.of() if isinstance(likelihood, GaussianLikelihood) else dynamics.tangent_passes()


def _gaussian(likelihood: Likelihood) -> GaussianLikelihood:
    """Return the likelihood unchanged if it is Gaussian.

    Raises:
        TypeError: it is not Gaussian, so its observation errors cannot be tempered.
    """
    if not isinstance(likelihood, GaussianLikelihood):
        raise TypeError(
            f"observation errors of a {type(likelihood).__name__} cannot be tempered, because not all of its "
            "observations are Gaussian; use tempering=ndda.smc.WeightTempering()."
        )
    return likelihood
