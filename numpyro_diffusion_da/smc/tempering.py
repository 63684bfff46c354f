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

from numpyro_diffusion_da.smc.base import (
    Resampling,
    largest_alpha,
    relative_to_highest,
    resampled,
    tempering_exponent,
)


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
    def exponent(
        self, predictive: Any, taper: Float[Array, " m"] | None, target_ess: float
    ) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        """Weigh, and find the tempering exponent.

        Args:
            predictive: log p(y | c_i), shape (N,), or with a taper log p(y_j | c_i), shape (N, m). If the tempering
                needs it, a `TemperableLogWeight` with arrays of shape (N, m). -inf where particle i cannot be selected.
            taper: factor of each observation's term log p(y_j | c_i) in the weight, from 0 to 1; None selects whole
                particles by all observations.
            target_ess: effective sample size that tempering aims at, as a fraction of N; 0 for no tempering.

        Returns:
            (log-weights before tempering, tempering exponent alpha).
        """

    @abc.abstractmethod
    def tempered(
        self, predictive: Any, taper: Float[Array, " m"] | None, alpha: Float[Array, ""]
    ) -> Float[Array, " n"]:
        """Log-weights at a tempering exponent from 0 to 1, relative to the highest; -inf where not finite.

        Args:
            predictive: log-weights as for `exponent`.
            taper: factor of each observation's term, as for `exponent`.
            alpha: tempering exponent.
        """

    def resample(
        self,
        rng_key: PRNGKeyArray,
        predictive: Any,
        taper: Float[Array, " m"] | None,
        alpha: Float[Array, ""],
        resampling_fn: Resampling | None,
    ) -> Int[Array, " n"]:
        """Ancestors drawn at a tempering exponent. If all weights are equal, every particle is its own ancestor.

        Args:
            rng_key: random key of the resampling.
            predictive: log-weights as for `exponent`.
            taper: factor of each observation's term, as for `exponent`.
            alpha: tempering exponent.
            resampling_fn: resampling function from `blackjax.smc.resampling`; None for systematic resampling.
        """
        return resampled(rng_key, self.tempered(predictive, taper, alpha), resampling_fn)

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
            predictive: log-weights as for `exponent`.
            taper: factor of each observation's term, as for `exponent`.
            resampling_fn: resampling function from `blackjax.smc.resampling`; None for systematic resampling.
            target_ess: effective sample size that tempering aims at, as a fraction of N; 0 for no tempering.

        Returns:
            (log-weights before tempering, ancestors, tempering exponent alpha). If all weights are equal, every
            particle is its own ancestor.
        """
        log_weights, alpha = self.exponent(predictive, taper, target_ess)
        return log_weights, self.resample(rng_key, predictive, taper, alpha, resampling_fn), alpha


class WeightTempering(Tempering):
    """Tempering of the weights: selection by w^alpha. This is the default."""

    needs_likelihood_tempering: ClassVar[bool] = False

    def exponent(
        self, predictive: Any, taper: Float[Array, " m"] | None, target_ess: float
    ) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        """Weigh from log p(y | c_i), or with a taper from log p(y_j | c_i), and find the exponent of these weights."""
        log_weights = predictive if taper is None else _total(predictive, taper)
        return log_weights, tempering_exponent(log_weights, target_ess)

    def tempered(
        self, predictive: Any, taper: Float[Array, " m"] | None, alpha: Float[Array, ""]
    ) -> Float[Array, " n"]:
        """Log-weights times alpha, relative to the highest; -inf where not finite."""
        shifted = relative_to_highest(predictive if taper is None else _total(predictive, taper))
        return jnp.where(jnp.isfinite(shifted), alpha * shifted, -jnp.inf)


class LikelihoodTempering(Tempering):
    """Tempering of the likelihood: selection by weights with R / alpha in place of R, for Gaussian observations.

    It needs no network passes beyond those of the weights. If the spread V of the transition is not small against R,
    alpha must be lower than with `WeightTempering` for the same effective sample size: only R grows, and observations
    of directions in which V is large keep their influence longest.
    """

    needs_likelihood_tempering: ClassVar[bool] = True

    def exponent(
        self, predictive: TemperableLogWeight, taper: Float[Array, " m"] | None, target_ess: float
    ) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        """Weigh, and find the exponent, from log-weights that are known at any alpha."""
        log_weights = _total(predictive.terms(1.0), taper)
        finite = jnp.isfinite(log_weights)

        def largest(of_particles: Array) -> Array:
            return jnp.maximum(jnp.max(jnp.where(finite, of_particles, -jnp.inf)), 0.0)

        normalizers = _total(predictive.log_normalizers, taper)
        some = normalizers[jnp.argmax(finite)]
        # log(1 + alpha v) + alpha r^2 / (1 + alpha v) is at most alpha (v + r^2).
        rest = _total(0.5 * (predictive.variances + predictive.squared_residuals), taper)
        spread = largest(normalizers - some) + largest(some - normalizers) + largest(rest)
        alpha = largest_alpha(lambda alpha: self.tempered(predictive, taper, alpha), finite, spread, target_ess)
        return jnp.where(finite, log_weights, -jnp.inf), alpha

    def tempered(
        self, predictive: TemperableLogWeight, taper: Float[Array, " m"] | None, alpha: Float[Array, ""]
    ) -> Float[Array, " n"]:
        """Log-weights with R / alpha in place of R, relative to the highest; -inf where not finite."""
        finite = jnp.isfinite(_total(predictive.terms(1.0), taper))
        return relative_to_highest(jnp.where(finite, _total(predictive.terms(alpha), taper), -jnp.inf))


def _total(terms: Float[Array, "n m"], taper: Float[Array, " m"] | None) -> Float[Array, " n"]:
    """Sum of the terms over observations, each multiplied by its taper if there is one."""
    if taper is None:
        return jnp.sum(terms, axis=1)
    # A term with a taper of 0 may be -inf, and 0 times -inf is NaN.
    return jnp.sum(jnp.where(taper[None] > 0, taper[None] * terms, 0.0), axis=1)
