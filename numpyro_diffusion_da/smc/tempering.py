"""Tempering: how weights that would leave a few particles are made to leave more.

Both kinds have an alpha in (0, 1], the largest at which the effective sample size reaches its target. They differ in
what they raise to its power:

- `WeightTempering` the weight, p(y | c)^alpha;
- `LikelihoodTempering` the likelihood inside it, int p(y | x')^alpha p(x' | c) dx'. With Gaussian errors this is
  N(y; h(m), R / alpha + H V H^T), up to a factor that all particles share where they share R: the errors of the
  observations are tempered, and the spread V of the transition is what it is.

With V = 0, the published filter's Dirac weights, the two are one (Savary et al. 2026, arXiv 2605.20028, Sec. 3). As
alpha -> 0 the weights become equal with both. Weights before tempering, and the evidence, are those at alpha = 1.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_diffusion_da.smc.base import Resampling, largest_alpha, relative_to_highest, resampled, select


class TemperableLogWeight(NamedTuple):
    """log of int p(y | x)^alpha N(x; m, V) dx for any alpha, p(y | x) = N(y; h(x), R) with h linearized at m.

    It is log N(y; h(m), R / alpha + H V H^T) and a term of R and alpha alone. In whitened coordinates that are
    independent, those of the eigenvectors of H V H^T, it is a sum of one term each, which needs no more than these:

    Attributes:
        log_normalizers: the terms of -1/2 log det(2 pi R), shape (m,); of all together, so that only their sum counts,
            unless the coordinates are the observations.
        squared_residuals: of R^{-1/2} (y - h(m)) in these coordinates, shape (m,); 0 where missing.
        variances: of R^{-1/2} H V H^T R^{-1/2} in these coordinates, shape (m,), at least 0.
    """

    log_normalizers: Float[Array, "... m"]
    squared_residuals: Float[Array, "... m"]
    variances: Float[Array, "... m"]

    def terms(self, alpha: Float[Array, ""] | float) -> Float[Array, "... m"]:
        """What is summed, at this alpha."""
        widened = 1.0 + alpha * self.variances
        quadratic = alpha * self.squared_residuals / widened
        return alpha * self.log_normalizers - 0.5 * (quadratic + jnp.log(widened))


class Tempering(eqx.Module):
    """What alpha does to the weights."""

    needs_likelihood_tempering: ClassVar[bool]
    """Whether it asks for an `TemperableLogWeight` of each particle, and not for log p(y | c)."""

    @abc.abstractmethod
    def select(
        self,
        rng_key: PRNGKeyArray,
        predictive: Any,
        reach: Float[Array, " m"] | None,
        resampling_fn: Resampling | None,
        target_ess: float,
    ) -> tuple[Float[Array, " n"], Int[Array, " n"], Float[Array, ""]]:
        """Weigh, temper and resample.

        Args:
            rng_key: of the resampling.
            predictive: log p(y | c_i), shape (N,), or log p(y_j | c_i), shape (N, m), where `reach` is given; or an
                `TemperableLogWeight` whose arrays have the shape (N, m). -inf where particle i cannot be selected.
            reach: factors of the terms log p(y_j | c_i) in the weight, from 0 to 1; None for whole particles.
            resampling_fn: from `blackjax.smc.resampling`; systematic by default.
            target_ess: fraction of N that tempering aims at; 0 for none.

        Returns:
            (log-weights before tempering, ancestors, alpha). Equal weights keep every particle in its place.
        """


class WeightTempering(Tempering):
    """Selection by w^alpha. The default."""

    needs_likelihood_tempering: ClassVar[bool] = False

    def select(
        self,
        rng_key: PRNGKeyArray,
        predictive: Any,
        reach: Float[Array, " m"] | None,
        resampling_fn: Resampling | None,
        target_ess: float,
    ) -> tuple[Float[Array, " n"], Int[Array, " n"], Float[Array, ""]]:
        """From log p(y | c_i), or log p(y_j | c_i)."""
        log_weights = predictive if reach is None else _total(predictive, reach)
        return log_weights, *select(rng_key, log_weights, resampling_fn, target_ess)


class LikelihoodTempering(Tempering):
    """Selection by weights with R / alpha in place of R, for Gaussian observations.

    No network pass more than the weights take. Where V is not small against R, alpha has to be lower than that of
    `WeightTempering` for the same effective sample size: only R grows, and directions in which V is large keep their say
    longest.
    """

    needs_likelihood_tempering: ClassVar[bool] = True

    def select(
        self,
        rng_key: PRNGKeyArray,
        predictive: TemperableLogWeight,
        reach: Float[Array, " m"] | None,
        resampling_fn: Resampling | None,
        target_ess: float,
    ) -> tuple[Float[Array, " n"], Int[Array, " n"], Float[Array, ""]]:
        """From what the weights are at any alpha."""
        log_weights = _total(predictive.terms(1.0), reach)
        finite = jnp.isfinite(log_weights)
        log_weights = jnp.where(finite, log_weights, -jnp.inf)

        def log_weights_at(alpha: Array) -> Array:
            return relative_to_highest(jnp.where(finite, _total(predictive.terms(alpha), reach), -jnp.inf))

        def largest(of_particles: Array) -> Array:
            return jnp.maximum(jnp.max(jnp.where(finite, of_particles, -jnp.inf)), 0.0)

        normalizers = _total(predictive.log_normalizers, reach)
        some = normalizers[jnp.argmax(finite)]
        # log(1 + alpha v) + alpha r^2 / (1 + alpha v) is at most alpha (v + r^2).
        rest = _total(0.5 * (predictive.variances + predictive.squared_residuals), reach)
        spread = largest(normalizers - some) + largest(some - normalizers) + largest(rest)
        alpha = largest_alpha(log_weights_at, finite, spread, target_ess)
        return log_weights, resampled(rng_key, log_weights, log_weights_at(alpha), resampling_fn), alpha


def _total(terms: Float[Array, "n m"], reach: Float[Array, " m"] | None) -> Float[Array, " n"]:
    """The sum over observations, by as much as each reaches."""
    if reach is None:
        return jnp.sum(terms, axis=1)
    # 0 times -inf would be NaN: what is out of reach must not count.
    return jnp.sum(jnp.where(reach[None] > 0, reach[None] * terms, 0.0), axis=1)
