r"""Tempering of importance weights, which keeps a few particles from getting all of the weight.

Both kinds of tempering use an exponent $\alpha \in (0, 1]$: the largest at which the effective sample size reaches its
target. They differ in what they raise to this power.

- `WeightTempering` raises the weight: $p(y | c)^\alpha$.
- `LikelihoodTempering` raises the likelihood inside the weight: $\int p(y | x')^\alpha \, p(x' | c) \, dx'$. With
  Gaussian errors this is $\mathcal N(y; h(m), R / \alpha + H V H^T)$, up to a factor that is the same for all particles
  with the same $R$. It tempers the errors $R$ of the observations and leaves the spread $V$ of the transition as it is.

For $V = 0$, which gives the `Dirac` weights of the published filter, both are the same (Savary et al. 2026, arXiv
2605.20028, Sec. 3). As $\alpha \to 0$ the weights become equal with both. The weights before tempering and the evidence
are those at $\alpha = 1$.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_diffusion_da.smc.base import Resampling, largest_alpha, relative_to_highest, resampled, select


class TemperableLogWeight(NamedTuple):
    r"""Log-weight with a tempered likelihood, for any tempering exponent alpha.

    It is the logarithm of $\int p(y | x)^\alpha \, \mathcal N(x; m, V) \, dx$ for the likelihood
    $p(y | x) = \mathcal N(y; h(x), R)$ with $h$ linearized at $m$. This is the Gaussian log-density
    $\log \mathcal N(y; h(m), R / \alpha + H V H^T)$ plus a term of $R$ and $\alpha$ alone. In independent whitened
    coordinates (those of the eigenvectors of the whitened $H V H^T$) it is a sum with one term for each coordinate.

    Attributes:
        log_normalizers: terms of -1/2 log det(2 pi R), shape (m,). Only their sum has a meaning, unless the coordinates
            are the observations themselves.
        squared_residuals: squares of R^{-1/2} (y - h(m)) in these coordinates, shape (m,); 0 where missing.
        variances: variances R^{-1/2} H V H^T R^{-1/2} in these coordinates, shape (m,), at least 0.
    """

    log_normalizers: Float[Array, "... m"]
    squared_residuals: Float[Array, "... m"]
    variances: Float[Array, "... m"]

    def terms(self, alpha: Float[Array, ""] | float) -> Float[Array, "... m"]:
        """Terms of the log-weight at a tempering exponent alpha, one for each coordinate."""
        widened = 1.0 + alpha * self.variances
        quadratic = alpha * self.squared_residuals / widened
        return alpha * self.log_normalizers - 0.5 * (quadratic + jnp.log(widened))


class Tempering(eqx.Module):
    """Kind of tempering: what the tempering exponent alpha acts on, and how alpha is found."""

    needs_likelihood_tempering: ClassVar[bool]
    """Whether the tempering needs a `TemperableLogWeight` of each particle instead of log p(y | c)."""

    @abc.abstractmethod
    def select(
        self,
        rng_key: PRNGKeyArray,
        predictive: Any,
        taper: Float[Array, " m"] | None,
        resampling_fn: Resampling | None,
        target_ess: float,
    ) -> tuple[Float[Array, " n"], Int[Array, " n"], Float[Array, ""]]:
        """Weigh, temper and resample.

        Args:
            rng_key: random key of the resampling.
            predictive: log p(y | c_i), shape (N,), or with a taper log p(y_j | c_i), shape (N, m). If the tempering
                needs it, a `TemperableLogWeight` with arrays of shape (N, m). -inf where particle i cannot be selected.
            taper: factor of each observation's term log p(y_j | c_i) in the weight, from 0 to 1; None selects whole
                particles by all observations.
            resampling_fn: resampling function from `blackjax.smc.resampling`; None for systematic resampling.
            target_ess: effective sample size that tempering aims at, as a fraction of N; 0 for no tempering.

        Returns:
            (log-weights before tempering, ancestors, tempering exponent alpha). If all weights are equal, every
            particle is its own ancestor.
        """


class WeightTempering(Tempering):
    """Tempering of the weights: selection by w^alpha. This is the default."""

    needs_likelihood_tempering: ClassVar[bool] = False

    def select(
        self,
        rng_key: PRNGKeyArray,
        predictive: Any,
        taper: Float[Array, " m"] | None,
        resampling_fn: Resampling | None,
        target_ess: float,
    ) -> tuple[Float[Array, " n"], Int[Array, " n"], Float[Array, ""]]:
        """Weigh, temper and resample from log p(y | c_i), or with a taper from log p(y_j | c_i)."""
        log_weights = predictive if taper is None else _total(predictive, taper)
        return log_weights, *select(rng_key, log_weights, resampling_fn, target_ess)


class LikelihoodTempering(Tempering):
    """Tempering of the likelihood: selection by weights with R / alpha in place of R, for Gaussian observations.

    It needs no network passes beyond those of the weights. If the spread V of the transition is not small against R,
    alpha must be lower than with `WeightTempering` for the same effective sample size: only R grows, and observations
    of directions in which V is large keep their influence longest.
    """

    needs_likelihood_tempering: ClassVar[bool] = True

    def select(
        self,
        rng_key: PRNGKeyArray,
        predictive: TemperableLogWeight,
        taper: Float[Array, " m"] | None,
        resampling_fn: Resampling | None,
        target_ess: float,
    ) -> tuple[Float[Array, " n"], Int[Array, " n"], Float[Array, ""]]:
        """Weigh, temper and resample from log-weights that are known at any alpha."""
        log_weights = _total(predictive.terms(1.0), taper)
        finite = jnp.isfinite(log_weights)
        log_weights = jnp.where(finite, log_weights, -jnp.inf)

        def log_weights_at(alpha: Array) -> Array:
            return relative_to_highest(jnp.where(finite, _total(predictive.terms(alpha), taper), -jnp.inf))

        def largest(of_particles: Array) -> Array:
            return jnp.maximum(jnp.max(jnp.where(finite, of_particles, -jnp.inf)), 0.0)

        normalizers = _total(predictive.log_normalizers, taper)
        some = normalizers[jnp.argmax(finite)]
        # log(1 + alpha v) + alpha r^2 / (1 + alpha v) is at most alpha (v + r^2).
        rest = _total(0.5 * (predictive.variances + predictive.squared_residuals), taper)
        spread = largest(normalizers - some) + largest(some - normalizers) + largest(rest)
        alpha = largest_alpha(log_weights_at, finite, spread, target_ess)
        return log_weights, resampled(rng_key, log_weights, log_weights_at(alpha), resampling_fn), alpha


def _total(terms: Float[Array, "n m"], taper: Float[Array, " m"] | None) -> Float[Array, " n"]:
    """Sum of the terms over observations, each multiplied by its taper if there is one."""
    if taper is None:
        return jnp.sum(terms, axis=1)
    # A term with a taper of 0 may be -inf, and 0 times -inf is NaN.
    return jnp.sum(jnp.where(taper[None] > 0, taper[None] * terms, 0.0), axis=1)
