"""Gaussian transition of the state, in closed form."""

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
from numpyro_diffusion_da.observation.moment_matching import LEAST_VARIANCE, tilted_quantiles
from numpyro_diffusion_da.transition.base import Centering, DrawRecord, Dynamics, Moments, centered
from numpyro_diffusion_da.transition.predictive import (
    _by_coordinates,
    _ByCoordinates,
    matched,
    observed_covariance,
)


class GaussianDynamics(Dynamics):
    """Gaussian transition p(x' | c) = N(mean, F F^T), in closed form.

    It is exact for a linear h. Any other h is linearized at the mean, as in an extended Kalman filter.

    Args:
        mean: mean of x', shape of the state.
        factor: standard deviations, shape of the state; or F, shape (size, size), over the flattened state.
    """

    mean: Float[Array, ...]
    factor: Float[Array, ...]

    def _apply(self, white: Array, transpose: bool = False) -> Array:
        """Return F white, or F^T white with `transpose`, of the shape of the state."""
        if self.factor.shape == self.mean.shape:
            return self.factor * white
        factor = self.factor.T if transpose else self.factor
        return (factor @ white.reshape(-1)).reshape(self.mean.shape)

    def moments(self, noise_level: float | None = None) -> Moments:
        """Return the mean and products with F F^T, without network passes; `noise_level` is ignored."""

        def covariance_product(v: Array) -> Array:
            return self._apply(self._apply(v, transpose=True))

        return Moments(self.mean, covariance_product, NetworkPasses.of(), NetworkPasses.of())

    def tangents(self) -> Float[Array, "k ..."]:
        """Return F e for random signs e, leading axis k."""
        return jax.vmap(self._apply)(probe_signs(self.mean.shape, self.mean.dtype))

    def random_numbers(self, rng_key: PRNGKeyArray, likelihood: Likelihood | None = None) -> tuple[Array, ...]:
        """Return the white noise of the state, and that of the perturbed observations if the draw has them."""
        if likelihood is None or self.is_separate(likelihood):
            return (self._white(rng_key),)
        draw_key, error_key = jax.random.split(rng_key)
        m = jax.eval_shape(likelihood.pointwise, self.mean).shape
        return self._white(draw_key), jax.random.normal(error_key, m, self.mean.dtype)

    def _white(self, rng_key: PRNGKeyArray) -> Array:
        """Return white noise of the shape of the state."""
        return jax.random.normal(rng_key, self.mean.shape, self.mean.dtype)

    def is_separate(self, likelihood: Likelihood) -> bool:
        """Return whether each observation depends on one component of the state, and components are independent."""
        if not isinstance(likelihood, GeneralLikelihood) or self.factor.shape != self.mean.shape:
            return False
        return likelihood.are_separate(self.mean)

    def draw(self, rng_key: PRNGKeyArray, centering: Centering | None = None) -> tuple[Float[Array, ...], DrawRecord]:
        """Draw x' = mean + F xi with white xi, and return it with its record."""
        (white,) = centered(self.random_numbers(rng_key), centering)
        return self._moved_by(white)

    def _moved_by(self, white: Array) -> tuple[Float[Array, ...], DrawRecord]:
        """Return mean + F xi for white xi, and the record of a draw."""
        record = DrawRecord(NetworkPasses.of(), jnp.zeros((), self.mean.dtype))
        return self.mean + self._apply(white), record

    def conditional_draw(
        self,
        rng_key: PRNGKeyArray,
        likelihood: Likelihood,
        guidance: Guidance,
        centering: Centering | None = None,
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """Draw x' ~ p(x' | c, y), by moving an unguided draw towards the observations.

        Gaussian observations move it by the gain times its own perturbed innovation (Matheron's rule). Observations
        that are not Gaussian are first replaced by the Gaussian ones of expectation propagation. Then each of their
        coordinates moves to the value where its own tilted density has the same quantile (a Gaussian copula). For
        independent coordinates this is exact, also with two modes, and takes one move.

        Returns:
            (x', shape of the state; record of the draw).
        """
        numbers = centered(self.random_numbers(rng_key, likelihood), centering)
        if not isinstance(likelihood, GeneralLikelihood):
            return self._matheron(numbers, matched(self.moments(), self.tangents(), likelihood)[0])[:2]
        if self.is_separate(likelihood):
            x, record = self._moved_by(numbers[0])
            return x + self._towards_separate(x, likelihood), record
        found = _by_coordinates(self.moments(), self.tangents(), likelihood)
        x, record, _ = self._matheron(numbers, found.local)
        return x + self._towards_tilted(x, found), record

    def _towards_separate(self, x: Float[Array, ...], likelihood: GeneralLikelihood) -> Float[Array, ...]:
        """Return the move of an unguided draw x that takes independent coordinates to their posterior quantiles."""
        # H of the coordinates, and its transpose.
        coordinates = likelihood.coordinates(self.mean, self.tangents())
        _, push = jax.linearize(coordinates, self.mean)
        transposed = jax.linear_transpose(push, self.mean)

        def covariance_product(v: Array) -> Array:
            return self.moments().covariance_product(transposed(v)[0])

        # The covariance of independent coordinates is diagonal, so its product with ones is the diagonal.
        variance = jnp.maximum(push(covariance_product(jnp.ones(coordinates.observed.shape, x.dtype))), LEAST_VARIANCE)
        # Move each coordinate to the same quantile of its posterior, and the state by regression on the coordinates.
        t = coordinates(x)
        levels = jax.scipy.stats.norm.cdf(t / jnp.sqrt(variance))
        moved = tilted_quantiles(coordinates.log_prob, jnp.zeros_like(t), variance, levels)
        return covariance_product(jnp.where(coordinates.observed, moved - t, 0.0) / variance)

    def _towards_tilted(self, x: Float[Array, ...], found: _ByCoordinates) -> Float[Array, ...]:
        """Return the move of a draw x that takes the coordinates to their tilted quantiles.

        The state moves along with them, by its regression on the coordinates.
        """
        coordinates, n = found.coordinates, len(found.coordinates.observed)
        # The draw's coordinates, their marginals in the draw, and their cavities (without their own observation).
        t = coordinates(x)
        (mean, variance), (center, without) = (
            (a[-n:], b[-n:]) for a, b in (found.evidence.marginal, found.evidence.cavity)
        )
        # Move each coordinate to the same quantile of its tilted density, which is cavity times likelihood.
        levels = jax.scipy.stats.norm.cdf((t - mean) / jnp.sqrt(variance))
        moved = tilted_quantiles(coordinates.log_prob, center, without, levels)
        shift = jnp.where(coordinates.observed, moved - t, 0.0)
        # Covariance of the coordinates given the Gaussian observations, made safe to invert.
        known = found.between[:-n, :-n] + jnp.eye(len(found.between) - n, dtype=t.dtype)
        gain = jnp.linalg.solve(known, found.between[:-n, -n:])
        within = found.between[-n:, -n:] - found.between[-n:, :-n] @ gain
        within = within + 1e-6 * jnp.maximum(jnp.mean(jnp.diagonal(within)), LEAST_VARIANCE) * jnp.eye(n, dtype=t.dtype)
        # Move the state by its regression on the coordinates, given the Gaussian observations.
        weights = jnp.linalg.solve(within, shift)
        return self.moments().covariance_product(found.pull(jnp.concatenate([-gain @ weights, weights])))

    def weighted_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], Float[Array, ""], DrawRecord]:
        """Draw x' from the Gaussian q of Matheron's rule, and return it with its log-weight.

        Observations that are not Gaussian are replaced for q by the Gaussian ones of expectation propagation. By Bayes'
        rule p(x) / q(x) = N(r; 0, I + H V H^T) / N(r - H (x - mean); 0, I), where r is the whitened residual at the
        mean, H = -dr/dx and V = F F^T. If y is Gaussian and linear in x, log w is log p(y | c) for every x.

        Returns:
            (x', shape of the state; log w, a scalar; record of the draw).
        """
        local, _ = matched(self.moments(), self.tangents(), likelihood)
        x, record, ratio = self._matheron(self.random_numbers(rng_key, local), local)
        return x, likelihood.log_prob(x) + ratio, record

    def _matheron(
        self, numbers: tuple[Array, ...], likelihood: GaussianLikelihood
    ) -> tuple[Array, DrawRecord, Float[Array, ""]]:
        """Draw x from the posterior q for Gaussian observations, by Matheron's rule.

        Args:
            numbers: white noise of the state, and that of the perturbed observations.
            likelihood: Gaussian likelihood of the observations.

        Returns:
            (x; its record; log p(x | c) - log q(x)).
        """
        # Unguided draw, and its innovation with a perturbed observation.
        white, error = numbers
        x, record = self._moved_by(white)
        residual, covariance, pull = observed_covariance(self.moments(), likelihood)
        innovation = residual - (jax.jvp(likelihood.residual, (self.mean,), (self.mean - x,))[1] + error)
        # Weights of the columns of V H^T that move the draw.
        gain = projected_solve(covariance, innovation)
        # Residual left at the moved x, linearized at the mean, for the ratio of densities in `weighted_draw`.
        left = innovation + error - (covariance @ gain - gain)
        values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.T))
        values = jnp.maximum(values, 1.0)  # only rounding can make them smaller
        ratio = -0.5 * jnp.sum((vectors.T @ residual) ** 2 / values) - 0.5 * jnp.sum(jnp.log(values))
        moved = x + self.moments().covariance_product(pull(gain))
        return moved, record, ratio + 0.5 * jnp.vdot(left, left)
