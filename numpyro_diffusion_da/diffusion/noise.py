"""The noise of a diffusion: e ~ N(0, C), with C a linear operator.

A latent z is noised as z_s = z + s e. Most emulators use white noise, C = I; some do not (noise drawn isotropically on
the sphere is correlated on a latitude-longitude grid, and singular). Tweedie's formulas then carry C:

    grad log p(z_s) = C^+ (D(z_s, s) - z_s) / s^2,        Cov[z | z_s] = s^2 J C,    J = dD/dz_s.

Everything that guides, weighs or samples asks the prior's `Noise` for C, and never assumes the identity.
"""

from __future__ import annotations

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray


class Noise(eqx.Module):
    """Zero-mean Gaussian noise in the latent space, known by a draw and by products with its covariance C."""

    @abc.abstractmethod
    def sample(self, rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, ...]:
        """One draw e ~ N(0, C) of the latent's shape."""

    @abc.abstractmethod
    def covariance_product(self, v: Float[Array, ...]) -> Float[Array, ...]:
        """C v, for a `v` of the latent's shape."""

    def precision_product(self, v: Float[Array, ...]) -> tuple[Float[Array, ...], Float[Array, ""]]:
        """(C^-1 v, log det C), for a `v` of the latent's shape.

        Raises:
            NotImplementedError: this noise gives no inverse of C; where C is singular there is none.
        """
        raise NotImplementedError(
            f"{type(self).__name__} gives no inverse of its covariance C, and a density needs one "
            "(a singular C has none): filter with samples instead, which need only C."
        )


class WhiteNoise(Noise):
    """C = I: independent unit noise in every component."""

    def sample(self, rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, ...]:
        """One draw e ~ N(0, I)."""
        return standard_normal(rng_key, shape, dtype)

    def covariance_product(self, v: Float[Array, ...]) -> Float[Array, ...]:
        """`v` itself."""
        return v

    def precision_product(self, v: Float[Array, ...]) -> tuple[Float[Array, ...], Float[Array, ""]]:
        """`v` itself, and 0."""
        return v, jnp.zeros((), v.dtype)


def standard_normal(rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, ...]:
    """Independent standard normal numbers, those of `jax.random.normal`.

    Drawn in one row: with four axes XLA can take twenty seconds to compile the draw for a CPU.
    """
    return jax.random.normal(rng_key, (math.prod(shape),), dtype).reshape(shape)


class FactorNoise(Noise):
    """C = L L^T for a dense factor L, over the flattened latent. L may have fewer columns than rows (a singular C).

    Args:
        factor: L, shape (size of the latent, rank).
    """

    factor: Float[Array, "size rank"]

    def sample(self, rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, ...]:
        """One draw e = L xi, xi white."""
        white = jax.random.normal(rng_key, (self.factor.shape[1],), dtype)
        return (self.factor.astype(dtype) @ white).reshape(shape)

    def covariance_product(self, v: Float[Array, ...]) -> Float[Array, ...]:
        """L (L^T v)."""
        factor = self.factor.astype(v.dtype)
        return (factor @ (factor.T @ v.reshape(-1))).reshape(v.shape)

    def precision_product(self, v: Float[Array, ...]) -> tuple[Float[Array, ...], Float[Array, ""]]:
        """L^-T (L^-1 v) and 2 log |det L|, for a square L.

        Raises:
            NotImplementedError: L is not square; with fewer columns than rows C is singular.
        """
        size, rank = self.factor.shape
        if rank != size:
            return super().precision_product(v)
        factor = self.factor.astype(v.dtype)
        white = jnp.linalg.solve(factor, v.reshape(-1))
        return jnp.linalg.solve(factor.T, white).reshape(v.shape), 2.0 * jnp.linalg.slogdet(factor)[1]


def positive_semidefinite(matrix: np.ndarray, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Check a covariance and give its non-negligible eigenpairs.

    Returns:
        (eigenvalues of shape (rank,), eigenvectors of shape (size, rank)), in float64, eigenvalues positive.

    Raises:
        ValueError: not square of the given size, not symmetric, or with a clearly negative eigenvalue.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape != (size, size):
        raise ValueError(f"{name} has shape {matrix.shape}, expected {(size, size)}: give a full matrix.")
    if not np.all(np.isfinite(matrix)):
        raise ValueError(f"{name} holds non-finite values; a covariance must be finite.")
    scale = float(np.abs(matrix).max(initial=0.0))
    if not np.allclose(matrix, matrix.T, atol=1e-6 * scale, rtol=0.0):
        raise ValueError(f"{name} is not symmetric; give a covariance (symmetric positive semi-definite).")
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    if values.min(initial=0.0) < -1e-6 * scale:
        raise ValueError(f"{name} has the negative eigenvalue {values.min():.3g}; a covariance has none.")
    # float32 covariances carry eigenvalues of rounding size where they should be zero.
    keep = values > 1e-7 * scale
    return values[keep], vectors[:, keep]
