r"""Isotropic noise on the sphere, on a latitude-longitude grid, as GenCast is trained with.

The noise has equal power at every total wavenumber l = 0 .. n-1, where n is half the number of longitudes. Its
covariance between two points an angle t apart is

$$
C(t) = \frac 1n \sum_l P_l(\cos t), \qquad C(0) = 1 .
$$

On the sphere it is as white as the grid can represent. As a matrix over grid points it is far from the identity: its
rank is n^2 for about 2 n^2 points, and all points of a pole row have the same value. In real spherical harmonics
C = A A^T, where A maps coefficients (a, b) of zonal wavenumber m and total wavenumber l to latitude p and longitude q:

$$
(A (a, b))(p, q) = \sum_m \operatorname{Re} \left( e^{i m q} \sum_l F_m(p, l) (a_{ml} + i b_{ml}) \right) .
$$

The F_m are associated Legendre functions, normalized so that the sum of F^2 over m and l is 1 at every latitude. A
product with A takes one small matrix product for each m, and one FFT along longitude.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from numpyro_diffusion_da.arguments import require_count
from numpyro_diffusion_da.diffusion.noise import Noise, standard_normal


class SphericalNoise(Noise):
    r"""Noise of unit variance that is isotropic on the sphere and independent for every channel.

    Its covariance between two points an angle t apart is $C(t) = \frac 1n \sum_{l < n} P_l(\cos t)$, with n half the
    number of longitudes. Latents have the shape (latitude, longitude) or (latitude, longitude, channels). The grid is
    regular and contains both poles: latitudes ascend from -90 to 90 degrees, and longitudes go once around from 0.

    Args:
        num_latitudes: number of points from pole to pole, for example 181.
        num_longitudes: number of points around a circle of latitude, 2 (num_latitudes - 1), for example 360.

    Raises:
        ValueError: the numbers do not belong to such a grid.
    """

    factor: Float[Array, "zonal_wavenumber latitude total_wavenumber"]

    def __init__(self, num_latitudes: int, num_longitudes: int) -> None:
        require_count(num_latitudes, self, "num_latitudes", 2)
        require_count(num_longitudes, self, "num_longitudes", 2)
        if num_longitudes != 2 * (num_latitudes - 1):
            raise ValueError(
                f"SphericalNoise got {num_latitudes} latitudes and {num_longitudes} longitudes, expected "
                "num_longitudes = 2 (num_latitudes - 1), a regular grid with both poles; regrid the state, or write a "
                "Noise for its grid."
            )
        latitudes = np.linspace(-0.5 * np.pi, 0.5 * np.pi, num_latitudes)
        self.factor = jnp.asarray(legendre_functions(latitudes, num_longitudes // 2), jnp.float32)

    @classmethod
    def from_coordinates(cls, latitudes: ArrayLike, longitudes: ArrayLike) -> SphericalNoise:
        """Build the noise on the grid with these coordinates.

        Args:
            latitudes: latitudes in degrees, shape (num_latitudes,).
            longitudes: longitudes in degrees, shape (num_longitudes,).

        Raises:
            ValueError: the grid is not regular with both poles, latitudes ascending and longitudes from 0.
        """
        for name, values, expected in (
            ("latitudes", np.asarray(latitudes), lambda size: np.linspace(-90.0, 90.0, size)),
            ("longitudes", np.asarray(longitudes), lambda size: np.arange(size) * 360.0 / size),
        ):
            if values.ndim != 1 or len(values) < 2:
                raise ValueError(
                    f"{name} have shape {values.shape}, expected a list of 2 or more in degrees; "
                    "give a one-dimensional array."
                )
            regular = expected(len(values))
            if not np.allclose(values, regular, rtol=0.0, atol=1e-3):
                raise ValueError(
                    f"{name} go from {values[0]:g} to {values[-1]:g}, expected {len(values)} values equally spaced "
                    f"from {regular[0]:g} to {regular[-1]:g} degrees; reorder or regrid the state."
                )
        return cls(len(np.asarray(latitudes)), len(np.asarray(longitudes)))

    @property
    def num_latitudes(self) -> int:
        """Number of latitudes of the grid, both poles included."""
        return self.factor.shape[1]

    @property
    def num_longitudes(self) -> int:
        """Number of longitudes of the grid."""
        return 2 * self.factor.shape[0]

    @property
    def rank(self) -> int:
        """Rank of C for one channel, the square of half the number of longitudes."""
        return self.factor.shape[0] ** 2

    def sample(
        self, rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> Float[Array, "latitude longitude *channels"]:
        """Draw e = A xi with white xi, which has the covariance C = A A^T.

        Args:
            rng_key: random key.
            shape: (latitude, longitude) or (latitude, longitude, channels).
            dtype: dtype of the draw.

        Raises:
            ValueError: the shape does not begin with this grid.
        """
        white = standard_normal(rng_key, self.white_shape(shape), jnp.promote_types(dtype, jnp.float32))
        return self.colored(white, shape).astype(dtype)

    def white_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return (n, n) or (n, n, channels), with n half the number of longitudes.

        Args:
            shape: (latitude, longitude) or (latitude, longitude, channels).

        Raises:
            ValueError: the shape does not begin with this grid.
        """
        self._check(shape)
        return (len(self.factor), len(self.factor), *shape[2:])

    def colored(
        self, white: Float[Array, "n n *channels"], shape: tuple[int, ...]
    ) -> Float[Array, "latitude longitude *channels"]:
        """Return the noise field e = A w that white coefficients w make.

        Args:
            white: w, shape `white_shape(shape)`.
            shape: (latitude, longitude) or (latitude, longitude, channels).
        """
        n = len(self.factor)
        # The rank of C is n^2, and each of the n^2 numbers is used once: those on and above the diagonal (l >= m) as
        # real parts, those below it as imaginary parts of m > 0. The other entries are multiplied by zeros: those of F
        # for l < m, or those of the sine at m = 0.
        below = jnp.roll(jnp.swapaxes(white, 0, 1), 1, axis=0)
        coefficients = jnp.stack([white, below]).reshape(2, n, n, -1)
        return self._synthesis(coefficients).reshape(shape)

    def covariance_product(
        self, v: Float[Array, "latitude longitude *channels"]
    ) -> Float[Array, "latitude longitude *channels"]:
        """Return C v = A (A^T v), for a `v` of the latent's shape.

        Raises:
            ValueError: the shape does not begin with this grid.
        """
        self._check(v.shape)
        wide = v.astype(jnp.promote_types(v.dtype, jnp.float32)).reshape(*v.shape[:2], -1)
        return self._synthesis(self._analysis(wide)).reshape(v.shape).astype(v.dtype)

    def _synthesis(self, coefficients: Float[Array, "2 n n channels"]) -> Float[Array, "latitude longitude channels"]:
        """Apply A to coefficients, as float32 or wider.

        Args:
            coefficients: coefficients by real or imaginary part, zonal wavenumber, total wavenumber and channel.
        """
        dtype = coefficients.dtype
        # Some accelerators multiply float32 numbers in TensorFloat-32 by default, which keeps only three digits of C.
        waves = jnp.einsum(
            "mjl,pmlc->pjmc", self.factor.astype(dtype), coefficients, precision=jax.lax.Precision.HIGHEST
        )
        # irfft divides by the number of longitudes, and adds the conjugate for m > 0. For m = 0 the sine is zero.
        weights = np.full((2, 1, len(self.factor), 1), len(self.factor))
        weights[:, 0, 0, 0] = self.num_longitudes, 0
        waves = waves * jnp.asarray(weights, dtype)
        return jnp.fft.irfft(jax.lax.complex(waves[0], waves[1]), self.num_longitudes, axis=1)

    def _analysis(self, field: Float[Array, "latitude longitude channels"]) -> Float[Array, "2 n n channels"]:
        """Apply A^T to a field, the transpose of `_synthesis`."""
        # Leave out the last zonal wave, of two points per period: the noise has no power there.
        waves = jnp.fft.rfft(field, axis=1)[:, :-1]
        parts = jnp.stack([waves.real, waves.imag])
        return jnp.einsum("mjl,pjmc->pmlc", self.factor.astype(field.dtype), parts, precision=jax.lax.Precision.HIGHEST)

    def _check(self, shape: tuple[int, ...]) -> None:
        """Check that the shape of a latent begins with this grid."""
        grid = (self.num_latitudes, self.num_longitudes)
        if tuple(shape[:2]) != grid:
            raise ValueError(
                f"the latent has shape {tuple(shape)}, expected {(*grid, 'channels')} or {grid}; "
                "put latitude and longitude first, or build a SphericalNoise for its grid."
            )


def legendre_functions(
    latitude: Float[np.ndarray, " latitude"], wavenumbers: int
) -> Float[np.ndarray, "wavenumbers latitude wavenumbers"]:
    """Return the associated Legendre functions F_m(p, l) in the module's normalization; zero for l < m.

    They come from the three-term recurrence in l, starting at the diagonal l = m. It is stable in double precision:
    with half a degree between latitudes, the sum of squares is 1 to 1e-12.

    Args:
        latitude: latitudes p in radians, shape (latitude,).
        wavenumbers: number n of zonal and of total wavenumbers.
    """
    # cos(pi / 2) is 6e-17 in floating point, which would give the points of a pole row different values.
    pole = np.abs(latitude) > 0.5 * np.pi - 1e-9
    sine, cosine = np.sin(latitude), np.where(pole, 0.0, np.cos(latitude))
    functions = np.zeros((wavenumbers, len(latitude), wavenumbers))
    diagonal = np.ones(len(latitude))
    for m in range(wavenumbers):
        if m > 0:
            # At m = 1 the formula gives 1/2, but m = 0 has one function where m > 0 has two, cosine and sine.
            diagonal = diagonal * cosine * np.sqrt(1.0 if m == 1 else (2 * m - 1) / (2 * m))
        functions[m, :, m] = diagonal
        for degree in range(m + 1, wavenumbers):
            before = functions[m, :, degree - 2] * np.sqrt((degree - 1) ** 2 - m**2) if degree > m + 1 else 0.0
            functions[m, :, degree] = (2 * degree - 1) * sine * functions[m, :, degree - 1] - before
            functions[m, :, degree] /= np.sqrt(degree**2 - m**2)
    return functions / np.sqrt(wavenumbers)
