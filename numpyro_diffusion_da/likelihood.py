"""The likelihood of one step's observations, whitened.

Observations y = h(x) + N(0, R), of one or several sites, some of them missing, become one vector of unit-variance
residuals r(x) = R^{-1/2} (y - h(x)), zero where missing. In these coordinates R is the identity, every covariance
R + H V H^T becomes I + (R^{-1/2} H) V (R^{-1/2} H)^T, and a missing observation is a row of zeros: nothing else in the
library has to know about units, correlated errors or gaps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Bool, Float

LOG_TWO_PI = 1.8378770664093453


class GaussianObservation(NamedTuple):
    """One observed site at a given state: mean, error and value, flattened.

    Attributes:
        mean: h(x), shape (m,), in the observation's unit.
        scale: standard deviations of the error, shape (m,), or a lower Cholesky factor of R, shape (m, m).
        value: y, shape (m,), in the observation's unit.
        observed: False where the value is missing, shape (m,).
    """

    mean: Float[Array, " m"]
    scale: Float[Array, " m"] | Float[Array, "m m"]
    value: Float[Array, " m"]
    observed: Bool[Array, " m"]


def whiten(observation: GaussianObservation) -> tuple[Float[Array, " m"], Float[Array, ""]]:
    """(R^{-1/2} (y - h) with zeros where missing, -1/2 log det(2 pi R) over what is observed)."""
    observed = observation.observed
    # A missing value may be NaN: it must be replaced before any arithmetic, or its gradient is NaN too.
    residual = jnp.where(observed, jnp.where(observed, observation.value, 0.0) - observation.mean, 0.0)
    count = jnp.sum(observed)
    if observation.scale.ndim == 1:
        scale = jnp.where(observed, observation.scale, 1.0)
        return residual / scale, -jnp.sum(jnp.log(scale)) - 0.5 * count * LOG_TWO_PI
    covariance = observation.scale @ observation.scale.T
    # Unit rows and columns in place of the missing ones: the Cholesky factor then is that of the observed block.
    both = observed[:, None] & observed[None, :]
    factor = jnp.linalg.cholesky(jnp.where(both, covariance, jnp.eye(len(residual), dtype=residual.dtype)))
    whitened = jsl.solve_triangular(factor, residual, lower=True)
    return whitened, -jnp.sum(jnp.log(jnp.diagonal(factor))) - 0.5 * count * LOG_TWO_PI


class GaussianLikelihood(NamedTuple):
    """log p(y | x) for Gaussian errors and any differentiable h.

    Attributes:
        observe: x -> the observed sites at x. The error may depend on x; its derivative is ignored.
    """

    observe: Callable[[Float[Array, ...]], list[GaussianObservation]]

    def residual(self, x: Float[Array, ...]) -> Float[Array, " m"]:
        """r(x) = R^{-1/2} (y - h(x)) of all sites, one after the other."""
        sites = [site._replace(scale=jax.lax.stop_gradient(site.scale)) for site in self.observe(x)]
        return jnp.concatenate([whiten(site)[0] for site in sites])

    def log_normalizer(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """-1/2 log det(2 pi R) over the observed values, R at x."""
        return jnp.sum(jnp.stack([whiten(site)[1] for site in self.observe(x)]))

    def log_prob(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """log N(y; h(x), R)."""
        residual = self.residual(x)
        return self.log_normalizer(x) - 0.5 * jnp.vdot(residual, residual)
