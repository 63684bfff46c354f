"""Analysis updates of an ensemble: what `enkf` does with a forecast and its residuals.

In whitened residuals R = I. With anomalies X (N, d) of the members and Y (N, m) of what they predict, the ensemble's
covariances are X^T Y / (N - 1) and Y^T Y / (N - 1), and the Kalman gain is K = X^T Y (Y^T Y + (N - 1) I)^{-1}. An
update returns what is added to each member; a taper rho enters each update in its own way.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_diffusion_da.smc.base import particle_keys
from numpyro_diffusion_da.smc.localization import PlacedTaper

PointUpdate = Callable[[Float[Array, "n c"], Float[Array, "n k"], Float[Array, " k"], Int[Array, " k"]], Array]
"""(anomalies at a point, what is predicted near it, the taper, which observations) -> what is added, shape (n, c)."""

LARGEST_BLOCK = 2**24
"""Numbers held at a time while points of the state are updated one beside the other: 64 MB."""


class EnsembleUpdate(eqx.Module):
    """How the members of a forecast become those of the analysis."""

    @abc.abstractmethod
    def __call__(
        self,
        rng_key: PRNGKeyArray,
        anomalies: Float[Array, "n d"],
        residual: Float[Array, "n m"],
        taper: PlacedTaper | None = None,
    ) -> Float[Array, "n d"]:
        """What is added to each member.

        Args:
            rng_key: of the step.
            anomalies: members less their mean, flattened.
            residual: R^{-1/2} (y - h(x)) of each member, zero where missing.
            taper: localization at the places of these values; None for none.
        """


class PerturbedObservations(EnsembleUpdate):
    """The stochastic update (Burgers, van Leeuwen & Evensen 1998): each member sees its own perturbed observations.

    The perturbations are centered, so that the mean's update is that of the Kalman gain. Its taper multiplies the
    covariances (Houtekamer & Mitchell 2001), K = (rho o X^T Y) (rho o Y^T Y + (N - 1) I)^{-1}. That solves a system of
    all observations, m^2 numbers; without a taper the smaller of m and N.
    """

    def __call__(
        self,
        rng_key: PRNGKeyArray,
        anomalies: Float[Array, "n d"],
        residual: Float[Array, "n m"],
        taper: PlacedTaper | None = None,
    ) -> Float[Array, "n d"]:
        """K (r_i + e_i)."""
        n, m = residual.shape
        observed = jnp.any(residual != 0.0, axis=0)  # a missing value has a zero residual in every member
        errors = jax.vmap(lambda key: jax.random.normal(key, (m,), residual.dtype))(particle_keys(rng_key, n))
        errors = errors - errors.mean(0, keepdims=True)
        innovation = jnp.where(observed[None], residual + errors, 0.0)
        predicted = residual.mean(0, keepdims=True) - residual
        if taper is not None:
            covariance = taper.between_observations().astype(residual.dtype) * (predicted.T @ predicted)
            solved = jnp.linalg.solve(covariance + (n - 1) * jnp.eye(m), innovation.T)

            def at_point(x: Array, nearby: Array, weights: Array, which: Array) -> Array:
                return solved[which].T @ (weights[:, None] * (nearby.T @ x))

            return _at_each_point(at_point, anomalies, predicted, taper)
        if m <= n:
            weights = jnp.linalg.solve(predicted.T @ predicted + (n - 1) * jnp.eye(m), innovation.T).T @ predicted.T
        else:
            gram = predicted @ predicted.T + (n - 1) * jnp.eye(n)
            weights = jnp.linalg.solve(gram, predicted @ innovation.T).T
        return weights @ anomalies


class SquareRoot(EnsembleUpdate):
    """The deterministic update by the symmetric square root: ETKF, and with a taper LETKF.

    Mean and covariance become exactly those of a Kalman update with the ensemble's covariances (Bishop, Etherton &
    Majumdar 2001). The symmetric root T = (I + Y Y^T / (N - 1))^{-1/2} on the anomalies (Hunt, Kostelich & Szunyogh
    2007, eq. 24) keeps their mean and moves the members least.

    Its taper is that of Hunt et al. too: each point of the state is updated by itself, with the observations near it,
    whose error variances are divided by rho. The solves are as large as a neighborhood or as N, whichever is smaller,
    one for each point.
    """

    def __call__(
        self,
        rng_key: PRNGKeyArray,
        anomalies: Float[Array, "n d"],
        residual: Float[Array, "n m"],
        taper: PlacedTaper | None = None,
    ) -> Float[Array, "n d"]:
        """The mean's update and (T - I) X; the key is not used."""
        innovation = residual.mean(0)
        predicted = innovation[None] - residual
        if taper is None:
            return _square_root_increments(anomalies, predicted, innovation)

        def at_point(x: Array, nearby: Array, weights: Array, which: Array) -> Array:
            root = jnp.sqrt(weights)
            return _square_root_increments(x, nearby * root[None], innovation[which] * root)

        return _at_each_point(at_point, anomalies, predicted, taper)


def _square_root_increments(
    anomalies: Float[Array, "n d"], predicted: Float[Array, "n m"], innovation: Float[Array, " m"]
) -> Float[Array, "n d"]:
    """X^T's columns moved by the mean's gain and by T - I, from eigenvalues l of Y Y^T / (N - 1) or of Y^T Y / (N - 1).

    T - I has the eigenvalues (1 + l)^{-1/2} - 1 = -l / (1 + l + (1 + l)^{1/2}), which loses no digits at small l and
    needs no inverse of it.
    """
    n, m = predicted.shape
    root = (n - 1) ** 0.5
    scaled = predicted / root
    if m <= n:
        values, vectors = jnp.linalg.eigh(scaled.T @ scaled)
        values = jnp.maximum(values, 0.0)
        left = scaled @ vectors
        projected = left.T @ anomalies / root
        mean = (innovation @ vectors) / (1.0 + values)
        moved = root * left / (1.0 + values + jnp.sqrt(1.0 + values))[None]
    else:
        values, vectors = jnp.linalg.eigh(scaled @ scaled.T)
        values = jnp.maximum(values, 0.0)
        projected = vectors.T @ anomalies
        mean = (innovation @ scaled.T @ vectors) / (root * (1.0 + values))
        moved = vectors * (values / (1.0 + values + jnp.sqrt(1.0 + values)))[None]
    return (mean[None] - moved) @ projected


def _at_each_point(
    update: PointUpdate, anomalies: Float[Array, "n d"], predicted: Float[Array, "n m"], taper: PlacedTaper
) -> Float[Array, "n d"]:
    """`update` of the values at each point with what is observed near it; as many points at a time as memory takes."""
    which, weights = taper.neighborhoods()
    (points, k), n = which.shape, len(anomalies)
    x = jnp.moveaxis(anomalies.reshape(n, points, -1), 1, 0)

    def at_point(inputs: tuple[Array, Array, Array]) -> Array:
        x, which, weights = inputs
        return update(x, predicted[:, which], weights, which)

    batch = LARGEST_BLOCK // (n * (2 * k + x.shape[2]) + min(n, k) ** 2)
    inputs = (x, jnp.asarray(which), jnp.asarray(weights, anomalies.dtype))
    moved = jax.lax.map(at_point, inputs, batch_size=min(max(batch, 1), points))
    return jnp.moveaxis(moved, 0, 1).reshape(n, -1)
