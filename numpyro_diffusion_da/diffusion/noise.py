r"""Noise of a diffusion, e ~ N(0, C), with a linear operator C as its covariance.

A latent z is noised as `z_s = z + s e`. Most emulators use white noise, C = I. Some do not: noise that is isotropic on
the sphere is correlated on a latitude-longitude grid, and its C is singular. Tweedie's formulas then contain C:

$$
\nabla \log p(z_s) = C^+ \frac{D(z_s, s) - z_s}{s^2}, \qquad
\operatorname{Cov}[z \mid z_s] = s^2 J C, \qquad J = \frac{dD}{dz_s} .
$$

Everything that guides, weighs or samples takes C from the prior's `Noise`, and never assumes the identity.
"""

from __future__ import annotations

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.arguments import real_array, require


class Noise(eqx.Module):
    """Abstract zero-mean Gaussian noise in the latent space, known by draws and by products with its covariance C.

    Subclasses whose C has an inverse also define `precision_product`, which densities need. Those that make e = A w
    from white noise w define `white_shape` and `colored`, which `ndda.priors.DeterministicPrior` needs.
    """

    @abc.abstractmethod
    def sample(self, rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, ...]:
        """Draw noise e ~ N(0, C) of one latent.

        Args:
            rng_key: random key.
            shape: shape of the latent.
            dtype: dtype of the draw.
        """

    @abc.abstractmethod
    def covariance_product(self, v: Float[Array, ...]) -> Float[Array, ...]:
        """Return C v, for a `v` of the latent's shape."""

    def white_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the white noise w of e = A w.

        Args:
            shape: shape of the latent.

        Raises:
            NotImplementedError: this noise does not define A.
            ValueError: the noise cannot have this shape.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say how it is made from white noise; define white_shape and colored, or "
            "use ndda.diffusion.WhiteNoise() or ndda.diffusion.FactorNoise(factor)."
        )

    def colored(self, white: Float[Array, ...], shape: tuple[int, ...]) -> Float[Array, ...]:
        """Return e = A w, with A A^T = C.

        Args:
            white: w, shape `white_shape(shape)`.
            shape: shape of the latent.

        Raises:
            NotImplementedError: this noise does not define A.
        """
        self.white_shape(shape)
        raise NotImplementedError(f"{type(self).__name__} defines white_shape, but not colored; define both.")

    def precision_product(self, v: Float[Array, ...]) -> tuple[Float[Array, ...], Float[Array, ""]]:
        """Return (C^-1 v, log det C), for a `v` of the latent's shape.

        Raises:
            NotImplementedError: this noise does not define an inverse of C; a singular C has none.
        """
        raise NotImplementedError(
            f"{type(self).__name__} gives no inverse of its covariance C, and a density needs one (a singular C has "
            "none); filter without a density, for example with ndda.FAAPF, or define precision_product."
        )


class WhiteNoise(Noise):
    """White noise, C = I: independent unit noise in every component."""

    def sample(self, rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, ...]:
        """Draw e ~ N(0, I) of the given shape and dtype."""
        return standard_normal(rng_key, shape, dtype)

    def white_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the latent."""
        return shape

    def colored(self, white: Float[Array, ...], shape: tuple[int, ...]) -> Float[Array, ...]:
        """Return `white` unchanged."""
        return white

    def covariance_product(self, v: Float[Array, ...]) -> Float[Array, ...]:
        """Return `v` unchanged, because C = I."""
        return v

    def precision_product(self, v: Float[Array, ...]) -> tuple[Float[Array, ...], Float[Array, ""]]:
        """Return `v` unchanged and log det C = 0, because C = I."""
        return v, jnp.zeros((), v.dtype)


def standard_normal(rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, ...]:
    """Draw independent standard normal numbers, the same as `jax.random.normal` draws.

    They are drawn as one row, because XLA can take twenty seconds to compile a draw with four axes for a CPU.
    """
    return jax.random.normal(rng_key, (math.prod(shape),), dtype).reshape(shape)


class FactorNoise(Noise):
    """Noise with C = L L^T for a dense factor L, over the flattened latent.

    L may have fewer columns than rows; C is then singular.

    Args:
        factor: L, shape (size of the latent, rank).

    Raises:
        TypeError: `factor` is not an array of real numbers.
        ValueError: `factor` is not such a matrix, or a value is not finite.
    """

    factor: Float[Array, "size rank"]

    def __check_init__(self) -> None:
        example = "jnp.linalg.cholesky(covariance)"
        require(self.factor, (jax.Array, np.ndarray), self, "factor", example)
        if self.factor.ndim != 2 or self.factor.shape[1] > self.factor.shape[0]:
            raise ValueError(
                f"FactorNoise got a factor of shape {self.factor.shape}; give a matrix of shape (size of the latent, "
                "rank), with no more columns than rows."
            )
        if not isinstance(self.factor, jax.core.Tracer):
            real_array(self.factor, self, "factor", example)

    def sample(self, rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, ...]:
        """Draw e = L xi with white xi, of the given shape and dtype."""
        return self.colored(jax.random.normal(rng_key, (self.factor.shape[1],), dtype), shape)

    def white_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape (rank,) of the white noise, one number for each column of the factor.

        Args:
            shape: shape of the latent.

        Raises:
            ValueError: the factor has another number of rows than the latent has values.
        """
        if math.prod(shape) != len(self.factor):
            raise ValueError(
                f"FactorNoise has a factor of shape {self.factor.shape}, and the latent has shape {shape}; give a "
                f"factor with {math.prod(shape)} rows."
            )
        return (self.factor.shape[1],)

    def colored(self, white: Float[Array, " rank"], shape: tuple[int, ...]) -> Float[Array, ...]:
        """Return L w, of the given shape."""
        return (self.factor.astype(white.dtype) @ white).reshape(shape)

    def covariance_product(self, v: Float[Array, ...]) -> Float[Array, ...]:
        """Return C v = L (L^T v), for a `v` of the latent's shape."""
        factor = self.factor.astype(v.dtype)
        return (factor @ (factor.T @ v.reshape(-1))).reshape(v.shape)

    def precision_product(self, v: Float[Array, ...]) -> tuple[Float[Array, ...], Float[Array, ""]]:
        """Return (C^-1 v, log det C) = (L^-T (L^-1 v), 2 log |det L|), for a square L.

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
    """Check a covariance matrix, and return its eigenpairs without those of negligible eigenvalue.

    Args:
        matrix: covariance, shape (size, size).
        name: name of the argument in messages.
        size: expected number of rows.

    Returns:
        (eigenvalues of shape (rank,), eigenvectors of shape (size, rank)), in float64, with positive eigenvalues.

    Raises:
        ValueError: the matrix has another shape, is not finite or not symmetric, or has a clearly negative eigenvalue.
    """
    if np.iscomplexobj(matrix):
        raise ValueError(f"{name} holds complex numbers; give a real covariance.")
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape != (size, size):
        raise ValueError(f"{name} has shape {matrix.shape}, expected {(size, size)}; give a full matrix.")
    if not np.all(np.isfinite(matrix)):
        raise ValueError(f"{name} contains non-finite values; give a finite covariance.")
    scale = float(np.abs(matrix).max(initial=0.0))
    if not np.allclose(matrix, matrix.T, atol=1e-6 * scale, rtol=0.0):
        raise ValueError(f"{name} is not symmetric; give a covariance (symmetric positive semi-definite).")
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    if values.min(initial=0.0) < -1e-6 * scale:
        raise ValueError(
            f"{name} has the negative eigenvalue {values.min():.3g}; give a positive semi-definite covariance."
        )
    # A covariance in float32 has eigenvalues of the size of rounding errors in place of zeros.
    keep = values > 1e-7 * scale
    return values[keep], vectors[:, keep]
