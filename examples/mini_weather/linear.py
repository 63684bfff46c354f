"""Linear forecast and covariances in closed form, with one matrix for each zonal wavenumber.

The system is the same at every longitude. Coefficients of different wavenumbers are therefore uncorrelated. The system
is also symmetric under reflection at the equator. Symmetric and antisymmetric coefficients are therefore uncorrelated.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from numpyro_diffusion_da.priors import GaussianDenoiser, SphericalHarmonics, ZonalOperator


def complex_waves(coefficients: np.ndarray, m: int) -> np.ndarray:
    """Complex coefficients a_m - i b_m of wavenumber m, shape (samples, degrees * channels)."""
    return (coefficients[:, 0, m] - 1j * coefficients[:, 1, m]).reshape(len(coefficients), -1)


def parities(harmonics: SphericalHarmonics, m: int) -> list[np.ndarray]:
    """Indices of the symmetric and of the antisymmetric coefficients of wavenumber m, for reflection at the equator."""
    exists = harmonics.mask[0, m].reshape(-1) > 0
    sign = harmonics.reflection[m].reshape(-1)
    return [np.flatnonzero(exists & (sign == s)) for s in (1.0, -1.0)]


def linear_forecasts(
    before: np.ndarray, after: np.ndarray, harmonics: SphericalHarmonics, ridges: Sequence[float]
) -> list[ZonalOperator]:
    """Fit linear forecasts, after = P before, by ridge regression.

    Args:
        before: coefficients of states, shape (samples, 2, m, l, channels).
        after: coefficients of the states one step later, of the same shape.
        harmonics: harmonics of the states.
        ridges: ridge parameters, relative to the mean variance of the coefficients in the normal equations.

    Returns:
        One operator P for each ridge parameter.
    """
    size = harmonics.degrees * harmonics.num_channels
    matrices = np.zeros((len(ridges), harmonics.degrees, size, size), np.complex64)
    for m in range(harmonics.degrees):
        x, y = complex_waves(before, m), complex_waves(after, m)
        for index in parities(harmonics, m):
            p, q = x[:, index], y[:, index]
            gram, moments = p.conj().T @ p, p.conj().T @ q
            for matrix, ridge in zip(matrices, ridges, strict=True):
                found = np.linalg.solve(gram + ridge * np.mean(np.diag(gram).real) * np.eye(len(index)), moments).T
                matrix[m][np.ix_(index, index)] = found.real if m == 0 else found
    return [ZonalOperator(jnp.asarray(matrix.real), jnp.asarray(matrix.imag)) for matrix in matrices]


def gaussian(samples: np.ndarray, harmonics: SphericalHarmonics, rank: int, shrinkage: float) -> GaussianDenoiser:
    """Estimate the covariance of coefficients by its leading eigenvectors, as the denoiser of a Gaussian.

    Args:
        samples: coefficients of unit noise, shape (samples, 2, m, l, channels).
        harmonics: harmonics of the coefficients.
        rank: number of eigenvectors for each wavenumber.
        shrinkage: weight of the diagonal in its mixture with the sample covariance.
    """
    size = harmonics.degrees * harmonics.num_channels
    vectors = np.zeros((harmonics.degrees, rank, size), np.complex64)
    values = np.zeros((harmonics.degrees, rank), np.float32)
    for m in range(harmonics.degrees):
        x = complex_waves(samples, m)
        found: list[tuple[float, np.ndarray]] = []
        for index in parities(harmonics, m):
            p = x[:, index]
            covariance = p.T @ p.conj() / (len(p) * (1.0 if m == 0 else 2.0))
            covariance = (1.0 - shrinkage) * covariance + shrinkage * np.diag(np.diag(covariance))
            eigenvalues, eigenvectors = np.linalg.eigh(covariance.real if m == 0 else covariance)
            for value, vector in zip(eigenvalues, eigenvectors.T, strict=True):
                whole = np.zeros(size, np.complex128)
                whole[index] = vector
                found.append((max(float(value), 0.0), whole))
        found.sort(key=lambda pair: -pair[0])
        for i, (value, vector) in enumerate(found[:rank]):
            values[m, i], vectors[m, i] = value, vector.conj()
    return GaussianDenoiser(ZonalOperator(jnp.asarray(vectors.real), jnp.asarray(vectors.imag)), jnp.asarray(values))
