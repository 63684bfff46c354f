"""Isotropic noise on the sphere, seen on a latitude-longitude grid: the noise that GenCast is trained with.

Equal power at every total wavenumber l = 0 .. n-1, n = half the number of longitudes: between points an angle t apart

    C(t) = 1/n sum_l P_l(cos t),    C(0) = 1.

On the sphere it is as white as the grid can hold; as a matrix over grid points it is far from the identity: its rank is
n^2 out of about 2 n^2 points, and all points of a pole row are one number. In real spherical harmonics C = A A^T, where
A takes coefficients (a, b) of zonal wavenumber m and total wavenumber l to latitude p and longitude q,

    (A (a, b))(p, q) = sum_m Re( exp(i m q) sum_l F_m(p, l) (a_ml + i b_ml) ).

F_m are the associated Legendre functions, normalized such that the sum of F^2 over m and l is 1 at every latitude. A
product with A is one small matrix product for each m and one FFT along longitude.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from numpyro_diffusion_da.diffusion.noise import Noise, standard_normal


class SphericalNoise(Noise):
    """Noise of unit variance, isotropic on the sphere, independent for every channel.

    For latents of shape (latitude, longitude) or (latitude, longitude, channels), on a regular grid that holds both
    poles: latitudes ascend from -90 to 90 degrees, longitudes go once around from 0.

    Args:
        num_latitudes: points from pole to pole, for example 181.
        num_longitudes: points around, 2 (num_latitudes - 1), for example 360.

    Raises:
        ValueError: numbers that are not those of such a grid.
    """

    factor: Float[Array, "zonal_wavenumber latitude total_wavenumber"]

    def __init__(self, num_latitudes: int, num_longitudes: int) -> None:
        if num_latitudes < 2 or num_longitudes != 2 * (num_latitudes - 1):
            raise ValueError(
                f"SphericalNoise got {num_latitudes} latitudes and {num_longitudes} longitudes, expected "
                "num_longitudes = 2 (num_latitudes - 1), a regular grid with both poles; regrid, or write a Noise."
            )
        latitudes = np.linspace(-0.5 * np.pi, 0.5 * np.pi, num_latitudes)
        self.factor = jnp.asarray(legendre_functions(latitudes, num_longitudes // 2), jnp.float32)

    @classmethod
    def from_coordinates(cls, latitudes: ArrayLike, longitudes: ArrayLike) -> SphericalNoise:
        """The noise on the grid of these coordinates.

        Args:
            latitudes: in degrees, shape (num_latitudes,).
            longitudes: in degrees, shape (num_longitudes,).

        Raises:
            ValueError: not a regular grid with both poles, latitudes ascending and longitudes from 0.
        """
        for name, values, expected in (
            ("latitudes", np.asarray(latitudes), lambda size: np.linspace(-90.0, 90.0, size)),
            ("longitudes", np.asarray(longitudes), lambda size: np.arange(size) * 360.0 / size),
        ):
            if values.ndim != 1 or len(values) < 2:
                raise ValueError(f"{name} have shape {values.shape}, expected a list of 2 or more in degrees.")
            regular = expected(len(values))
            if not np.allclose(values, regular, rtol=0.0, atol=1e-3):
                raise ValueError(
                    f"{name} go from {values[0]:g} to {values[-1]:g}, expected {len(values)} at equal distances from "
                    f"{regular[0]:g} to {regular[-1]:g} degrees; reorder or regrid the state."
                )
        return cls(len(np.asarray(latitudes)), len(np.asarray(longitudes)))

    @property
    def num_latitudes(self) -> int:
        """Points from pole to pole."""
        return self.factor.shape[1]

    @property
    def num_longitudes(self) -> int:
        """Points around."""
        return 2 * self.factor.shape[0]

    @property
    def rank(self) -> int:
        """Rank of C for one channel, the square of half the number of longitudes."""
        return self.factor.shape[0] ** 2

    def sample(
        self, rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> Float[Array, "latitude longitude *channels"]:
        """One draw e = A xi, xi white.

        Args:
            rng_key: a key.
            shape: (latitude, longitude) or (latitude, longitude, channels).
            dtype: of the draw.

        Raises:
            ValueError: a shape that does not lead with this grid.
        """
        self._check(shape)
        n = len(self.factor)
        white = standard_normal(rng_key, (n, n, *shape[2:]), jnp.promote_types(dtype, jnp.float32))
        # As many numbers as the rank, each used once: on and above the diagonal (l >= m) for the real parts, below it
        # for the imaginary ones of m > 0. The rest of the two squares meets a zero: of F, or of sine at m = 0.
        below = jnp.roll(jnp.swapaxes(white, 0, 1), 1, axis=0)
        coefficients = jnp.stack([white, below]).reshape(2, n, n, -1)
        return self._synthesis(coefficients).reshape(shape).astype(dtype)

    def covariance_product(
        self, v: Float[Array, "latitude longitude *channels"]
    ) -> Float[Array, "latitude longitude *channels"]:
        """A (A^T v).

        Raises:
            ValueError: a shape that does not lead with this grid.
        """
        self._check(v.shape)
        wide = v.astype(jnp.promote_types(v.dtype, jnp.float32)).reshape(*v.shape[:2], -1)
        return self._synthesis(self._analysis(wide)).reshape(v.shape).astype(v.dtype)

    def _synthesis(self, coefficients: Float[Array, "2 n n channels"]) -> Float[Array, "latitude longitude channels"]:
        """A, on (real or imaginary part, zonal wavenumber, total wavenumber, channels)."""
        dtype = coefficients.dtype
        # TensorFloat-32, some accelerators' default for a float32 product, would leave three digits of C.
        waves = jnp.einsum(
            "mjl,pmlc->pjmc", self.factor.astype(dtype), coefficients, precision=jax.lax.Precision.HIGHEST
        )
        # irfft divides by the number of longitudes and adds the conjugate of all but m = 0, whose sine is no function.
        weights = np.full((2, 1, len(self.factor), 1), len(self.factor))
        weights[:, 0, 0, 0] = self.num_longitudes, 0
        waves = waves * jnp.asarray(weights, dtype)
        return jnp.fft.irfft(jax.lax.complex(waves[0], waves[1]), self.num_longitudes, axis=1)

    def _analysis(self, field: Float[Array, "latitude longitude channels"]) -> Float[Array, "2 n n channels"]:
        """A^T."""
        # Without the last wave, of two points: the noise has none of it.
        waves = jnp.fft.rfft(field, axis=1)[:, :-1]
        parts = jnp.stack([waves.real, waves.imag])
        return jnp.einsum("mjl,pjmc->pmlc", self.factor.astype(field.dtype), parts, precision=jax.lax.Precision.HIGHEST)

    def _check(self, shape: tuple[int, ...]) -> None:
        grid = (self.num_latitudes, self.num_longitudes)
        if tuple(shape[:2]) != grid:
            raise ValueError(
                f"the latent has shape {tuple(shape)}, expected {(*grid, 'channels')} or {grid}; "
                "put latitude and longitude first, or build a SphericalNoise for its grid."
            )


def legendre_functions(
    latitude: Float[np.ndarray, " latitude"], wavenumbers: int
) -> Float[np.ndarray, "wavenumbers latitude wavenumbers"]:
    """F_m(p, l) of the module's formula at latitudes in radians; zero for l < m.

    By the three-term recurrence in l from the diagonal l = m, stable in double precision: with half a degree between
    latitudes the sum of squares is 1 to 1e-12.
    """
    # cos(pi / 2) is 6e-17 in floating point: a pole would not be one point.
    pole = np.abs(latitude) > 0.5 * np.pi - 1e-9
    sine, cosine = np.sin(latitude), np.where(pole, 0.0, np.cos(latitude))
    functions = np.zeros((wavenumbers, len(latitude), wavenumbers))
    diagonal = np.ones(len(latitude))
    for m in range(wavenumbers):
        if m > 0:
            # Not 1/2 at m = 1, because every m > 0 is two functions, cosine and sine, and m = 0 is one.
            diagonal = diagonal * cosine * np.sqrt(1.0 if m == 1 else (2 * m - 1) / (2 * m))
        functions[m, :, m] = diagonal
        for degree in range(m + 1, wavenumbers):
            before = functions[m, :, degree - 2] * np.sqrt((degree - 1) ** 2 - m**2) if degree > m + 1 else 0.0
            functions[m, :, degree] = (2 * degree - 1) * sine * functions[m, :, degree - 1] - before
            functions[m, :, degree] /= np.sqrt(degree**2 - m**2)
    return functions / np.sqrt(wavenumbers)
