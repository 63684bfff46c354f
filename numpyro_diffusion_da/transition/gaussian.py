"""One Gaussian transition, in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.guidance import Guidance
from numpyro_diffusion_da.diffusion.linear_solve import projected_solve
from numpyro_diffusion_da.observation.likelihood import (
    GaussianLikelihood,
    GeneralLikelihood,
    Likelihood,
    probe_signs,
)
from numpyro_diffusion_da.observation.moment_matching import (
    LEAST_VARIANCE,
    tilted_quantiles,
)
from numpyro_diffusion_da.transition.base import DrawRecord, Dynamics, Moments
from numpyro_diffusion_da.transition.predictive import (
    _by_coordinates,
    _ByCoordinates,
    matched,
    observed_covariance,
)


class GaussianDynamics(Dynamics):
    """N(mean, F F^T): exact for a linear h, linearized at the mean for any other (as an extended Kalman filter).

    Args:
        mean: shape of the state.
        factor: standard deviations, shape of the state, or F, shape (size, size), over the flattened state.
    """

    mean: Float[Array, ...]
    factor: Float[Array, ...]

    def _apply(self, white: Array, transpose: bool = False) -> Array:
        if self.factor.shape == self.mean.shape:
            return self.factor * white
        factor = self.factor.T if transpose else self.factor
        return (factor @ white.reshape(-1)).reshape(self.mean.shape)

    def moments(self, noise_level: float | None = None) -> Moments:
        """The mean and products with F F^T; no network passes."""

        def covariance_product(v: Array) -> Array:
            return self._apply(self._apply(v, transpose=True))

        return Moments(self.mean, covariance_product, NetworkPasses.of(), NetworkPasses.of())

    def tangents(self) -> Float[Array, "k ..."]:
        """F e with random signs e."""
        return jax.vmap(self._apply)(probe_signs(self.mean.shape, self.mean.dtype))

    def draw(self, rng_key: PRNGKeyArray) -> tuple[Float[Array, ...], DrawRecord]:
        """Mean + F xi."""
        white = jax.random.normal(rng_key, self.mean.shape, self.mean.dtype)
        record = DrawRecord(NetworkPasses.of(), jnp.zeros((), self.mean.dtype))
        return self.mean + self._apply(white), record

    def conditional_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """A draw of the prior moved by the gain of its own perturbed innovation (Matheron's rule).

        Observations that are not Gaussian are first those that expectation propagation puts in their place. Then each
        coordinate is moved to where its own tilted density has the same quantile (a Gaussian copula): exact where
        coordinates are independent, two modes included, and then made at once.
        """
        if not isinstance(likelihood, GeneralLikelihood):
            return self._matheron(rng_key, matched(self.moments(), self.tangents(), likelihood)[0])[:2]
        if self.factor.shape == self.mean.shape and likelihood.are_separate(self.mean):
            x, record = self.draw(rng_key)
            return x + self._towards_separate(x, likelihood), record
        found = _by_coordinates(self.moments(), self.tangents(), likelihood)
        x, record, _ = self._matheron(rng_key, found.local)
        return x + self._towards_tilted(x, found), record

    def _towards_separate(self, x: Float[Array, ...], likelihood: GeneralLikelihood) -> Float[Array, ...]:
        """What moves independent coordinates of an unguided draw to their posterior quantiles."""
        coordinates = likelihood.coordinates(self.mean, self.tangents())
        _, push = jax.linearize(coordinates, self.mean)
        transposed = jax.linear_transpose(push, self.mean)

        def covariance_product(v: Array) -> Array:
            return self.moments().covariance_product(transposed(v)[0])

        # The covariance of the coordinates is diagonal: its product with ones is the diagonal.
        variance = jnp.maximum(push(covariance_product(jnp.ones(coordinates.observed.shape, x.dtype))), LEAST_VARIANCE)
        t = coordinates(x)
        levels = jax.scipy.stats.norm.cdf(t / jnp.sqrt(variance))
        moved = tilted_quantiles(coordinates.log_prob, jnp.zeros_like(t), variance, levels)
        return covariance_product(jnp.where(coordinates.observed, moved - t, 0.0) / variance)

    def _towards_tilted(self, x: Float[Array, ...], found: _ByCoordinates) -> Float[Array, ...]:
        """What moves the coordinates of a draw to their tilted quantiles, and the state along with them."""
        coordinates, n = found.coordinates, len(found.coordinates.observed)
        t = coordinates(x)
        (mean, variance), (center, without) = (
            (a[-n:], b[-n:]) for a, b in (found.evidence.marginal, found.evidence.cavity)
        )
        levels = jax.scipy.stats.norm.cdf((t - mean) / jnp.sqrt(variance))
        moved = tilted_quantiles(coordinates.log_prob, center, without, levels)
        shift = jnp.where(coordinates.observed, moved - t, 0.0)
        # The regression of the state on the coordinates, given the Gaussian observations.
        known = found.between[:-n, :-n] + jnp.eye(len(found.between) - n, dtype=t.dtype)
        gain = jnp.linalg.solve(known, found.between[:-n, -n:])
        within = found.between[-n:, -n:] - found.between[-n:, :-n] @ gain
        within = within + 1e-6 * jnp.maximum(jnp.mean(jnp.diagonal(within)), LEAST_VARIANCE) * jnp.eye(n, dtype=t.dtype)
        weights = jnp.linalg.solve(within, shift)
        return self.moments().covariance_product(found.pull(jnp.concatenate([-gain @ weights, weights])))

    def weighted_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], Float[Array, ""], DrawRecord]:
        """The conditional draw, q. By Bayes' rule p(x) / q(x) = N(r; 0, I + H V H^T) / N(r - H (x - mean); 0, I).

        log w is log p(y | c), whatever x is, where y is Gaussian and linear in x.
        """
        local, _ = matched(self.moments(), self.tangents(), likelihood)
        x, record, ratio = self._matheron(rng_key, local)
        return x, likelihood.log_prob(x) + ratio, record

    def _matheron(
        self, rng_key: PRNGKeyArray, likelihood: GaussianLikelihood
    ) -> tuple[Array, DrawRecord, Float[Array, ""]]:
        """(x, its record, log p(x | c) - log q(x)) of the conditional draw."""
        draw_key, error_key = jax.random.split(rng_key)
        x, record = self.draw(draw_key)
        residual, covariance, pull = observed_covariance(self.moments(), likelihood)
        error = jax.random.normal(error_key, residual.shape, residual.dtype)
        innovation = residual - (jax.jvp(likelihood.residual, (self.mean,), (self.mean - x,))[1] + error)
        gain = projected_solve(covariance, innovation)
        left = innovation + error - (covariance @ gain - gain)  # the residual at the moved x, linearized at the mean
        values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.T))
        values = jnp.maximum(values, 1.0)  # as in the solve
        ratio = -0.5 * jnp.sum((vectors.T @ residual) ** 2 / values) - 0.5 * jnp.sum(jnp.log(values))
        moved = x + self.moments().covariance_product(pull(gain))
        return moved, record, ratio + 0.5 * jnp.vdot(left, left)
