"""Weights: how well a particle's one-step forecast predicts the next observation, log p^(y | c).

Each is a value that a filter takes. Equal is the control that tells whether weights help at all; Dirac is the
published one; Moment adds the spread of the transition, and is exact for a Gaussian transition and a linear h.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.observation.likelihood import GaussianLikelihood, Likelihood
from numpyro_diffusion_da.smc.tempering import TemperableLogWeight
from numpyro_diffusion_da.transition.base import Dynamics, Moments
from numpyro_diffusion_da.transition.predictive import matched, matched_pointwise, temperable, temperable_pointwise


class WeightRecord(NamedTuple):
    """What came with a weight.

    Attributes:
        passes: network passes made.
        forecast: the one-step forecast E[x' | c] where the weight computed it, else None.
    """

    passes: NetworkPasses
    forecast: Float[Array, ...] | None


class PredictiveWeight(eqx.Module):
    """An estimate of log p(y | c) for one particle."""

    @abc.abstractmethod
    def __call__(self, step: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, ""], WeightRecord]:
        """log p^(y | c) and its record."""

    def pointwise(self, step: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, " m"], WeightRecord]:
        """log p^(y_j | c) of each observation by itself, site by site, and the record: for localized ancestors.

        Raises:
            TypeError: the weight does not say it.
        """
        raise TypeError(
            f"{type(self).__name__} weights do not say how well each observation was predicted by itself, and local "
            "ancestors need that; use ndda.Dirac() or ndda.Moment(), or leave the taper out."
        )

    def temperable(self, step: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """The same at any tempering of the observation errors, and the record: for `LikelihoodTempering`.

        Raises:
            TypeError: the weight does not say it, or the likelihood is not Gaussian.
        """
        raise TypeError(self._cannot_temper())

    def temperable_pointwise(self, step: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """The same for each observation by itself, as `pointwise`.

        Raises:
            TypeError: as `temperable`.
        """
        raise TypeError(self._cannot_temper())

    def _cannot_temper(self) -> str:
        return (
            f"{type(self).__name__} weights do not say what they are with tempered observation errors; "
            "use tempering=ndda.smc.WeightTempering(), or ndda.Dirac() or ndda.Moment() weights."
        )

    def bias_reasons(self, closed_form: bool, linear: bool) -> list[str]:
        """Why it is not exact; empty where it is.

        Args:
            closed_form: the transition is Gaussian, not a diffusion.
            linear: the mean of the observations is affine in the state and their error does not depend on it.
        """
        return [f"{type(self).__name__} weights are not known to be exact"]


class Equal(PredictiveWeight):
    """log w = 0: guided particles, no selection. No network pass."""

    def bias_reasons(self, closed_form: bool, linear: bool) -> list[str]:
        """Never exact."""
        return ["Equal weights leave out the observations"]

    def __call__(self, step: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, ""], WeightRecord]:
        """Zero."""
        return jnp.zeros(()), WeightRecord(NetworkPasses.of(), None)

    def pointwise(self, step: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, " m"], WeightRecord]:
        """Zeros."""
        observations = jax.eval_shape(likelihood.pointwise, jax.eval_shape(lambda: step.moments().mean))
        return jnp.zeros(observations.shape, observations.dtype), WeightRecord(NetworkPasses.of(), None)

    def temperable(self, step: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """Zeros: there is nothing to temper."""
        return self.temperable_pointwise(step, likelihood)

    def temperable_pointwise(self, step: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """Zeros: there is nothing to temper."""
        zeros, record = self.pointwise(step, likelihood)
        return TemperableLogWeight(zeros, zeros, zeros), record


class Dirac(PredictiveWeight):
    """log p(y | m) with m = E[x' | c]: p(x' | c) taken as a point (Savary et al. 2026, arXiv 2605.20028, Sec. 3).

    With Gaussian errors log N(y; h(m), R); for any other likelihood its log_prob there.

    One network pass. Too peaked where the one-step spread is not small against the observation error.
    """

    def bias_reasons(self, closed_form: bool, linear: bool) -> list[str]:
        """Never exact."""
        return ["Dirac weights leave out the spread of the transition"]

    def __call__(self, step: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, ""], WeightRecord]:
        """The likelihood of the forecast mean."""
        moments = step.moments()
        return likelihood.log_prob(moments.mean), WeightRecord(moments.passes, moments.mean)

    def pointwise(self, step: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, " m"], WeightRecord]:
        """The terms of that."""
        moments = step.moments()
        return likelihood.pointwise(moments.mean), WeightRecord(moments.passes, moments.mean)

    def temperable(self, step: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """alpha log p(y | m): with no spread of the transition there is nothing else to it."""
        return self.temperable_pointwise(step, likelihood)

    def temperable_pointwise(self, step: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """The terms of that."""
        moments = step.moments()
        gaussian = _gaussian(likelihood)
        residual, normalizers = gaussian.residual(moments.mean), gaussian.log_normalizers(moments.mean)
        curve = TemperableLogWeight(normalizers, residual**2, jnp.zeros_like(residual))
        return curve, WeightRecord(moments.passes, moments.mean)


class Moment(PredictiveWeight):
    """log of int p(y | x') N(x'; m, V) dx', V = Cov[x' | c]; with Gaussian errors log N(y; h(m), R + H V H^T).

    Exact for a Gaussian transition, a linear h and Gaussian errors. Other likelihoods are integrated by expectation
    propagation over the observations: by quadrature where they look at independent coordinates of the state.

    One network pass, and one more for each observation.

    Args:
        noise_level: where V is read off the denoiser's Jacobian. None is the prior's highest level, right for exact
            denoisers; a learned Jacobian is multiplied by that level, errors included, so give some ten times the
            spread of the latent (10.0 for a latent of unit variance, which makes V 1 % too small).
        probes: for localized ancestors, which take each observation by itself and so need the diagonal of H V H^T only:
            estimate it by this many products with random signs, whatever the number of observations. None for one
            product an observation. Its error is of the size of what lies beside the diagonal: one probe is enough for
            a transition whose errors are nearly independent from place to place.

    Raises:
        ValueError: a noise level that is not positive, or probes below 1; probes without localized ancestors.
    """

    noise_level: float | None = eqx.field(static=True, default=None)
    probes: int | None = eqx.field(static=True, default=None)

    def bias_reasons(self, closed_form: bool, linear: bool) -> list[str]:
        """None for a Gaussian transition and a linear h."""
        transition = [] if closed_form else ["Moment weights are exact for Gaussian transitions only"]
        observation = [] if linear else ["Moment weights are exact for observations linear in the state only"]
        return transition + observation

    def __check_init__(self) -> None:
        if self.noise_level is not None and not self.noise_level > 0:
            raise ValueError(f"Moment got noise_level={self.noise_level}; give a positive one, or None.")
        if self.probes is not None and self.probes < 1:
            raise ValueError(f"Moment got probes={self.probes}; give 1 or more, or None.")

    def __call__(self, step: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, ""], WeightRecord]:
        """The likelihood of the forecast mean under forecast and observation error together."""
        self._check_whole()
        moments, passes = self._moments(step)
        local, log_weight = matched(moments, step.tangents(), likelihood)
        observations = jax.eval_shape(local.residual, moments.mean).shape[0]
        return log_weight, _record(moments, passes, observations)

    def pointwise(self, step: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, " m"], WeightRecord]:
        """Each observation under its own forecast and observation error."""
        moments, passes = self._moments(step)
        logs = matched_pointwise(moments, step.tangents(), likelihood, self.probes)
        return logs, _record(moments, passes, len(logs) if self.probes is None else self.probes)

    def temperable(self, step: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """log N(y; h(m), R / alpha + H V H^T), up to what all share whose R is the same; no pass more."""
        self._check_whole()
        moments, passes = self._moments(step)
        curve = temperable(moments, _gaussian(likelihood))
        return curve, _record(moments, passes, len(curve.variances))

    def temperable_pointwise(self, step: Dynamics, likelihood: Likelihood) -> tuple[TemperableLogWeight, WeightRecord]:
        """The same for each observation by itself."""
        moments, passes = self._moments(step)
        curve = temperable_pointwise(moments, _gaussian(likelihood), self.probes)
        return curve, _record(moments, passes, len(curve.variances) if self.probes is None else self.probes)

    def _check_whole(self) -> None:
        if self.probes is not None:
            raise ValueError(
                f"Moment(probes={self.probes}) estimates the variance of each observation by itself, and a weight of "
                "whole particles needs their covariance; leave probes out, or give the filter a taper."
            )

    def _moments(self, step: Dynamics) -> tuple[Moments, NetworkPasses]:
        """Mean and covariance, and the passes they cost. The mean always from the highest level, exact there."""
        moments = step.moments()
        if self.noise_level is None:
            return moments, moments.passes
        spread = step.moments(self.noise_level)
        return spread._replace(mean=moments.mean), moments.passes.plus(spread.passes)


def _record(moments: Moments, passes: NetworkPasses, products: int) -> WeightRecord:
    """The record of a weight that made this many products with V."""
    made = jax.tree.map(lambda n: n * products, moments.passes_per_product)
    return WeightRecord(passes.plus(made), moments.mean)


def _gaussian(likelihood: Likelihood) -> GaussianLikelihood:
    if not isinstance(likelihood, GaussianLikelihood):
        raise TypeError(
            f"observation errors of a {type(likelihood).__name__} cannot be tempered: not all of it is Gaussian; "
            "use tempering=ndda.smc.WeightTempering()."
        )
    return likelihood
