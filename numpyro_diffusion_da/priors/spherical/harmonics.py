"""Spherical harmonics of scalars and of winds on a Gaussian grid, and noise that is isotropic in both.

With the real functions Y of degree l = 0 .. n-1 and zonal wavenumber m, of mean square 1 over the sphere,

    scalar = sum a_lm Y_lm,    wind = sum ( b_lm k x grad Y_lm + g_lm grad Y_lm ) / sqrt(l (l + 1)),

so that the mean square of a scalar is the sum of a^2, and that of the wind speed the sum of b^2 (rotational) and g^2
(divergent). A wind has no value at a pole that its components along longitude and latitude could share; its
coefficients know of no pole. On n or more Gaussian latitudes quadrature is exact, and `analysis` inverts `synthesis`.

Everything here acts on fields of shape (latitude, longitude, channels): scalars first, then the eastward and then the
northward components of the winds; on coefficients of shape (2, m, l, channels): of cos(m longitude) and of
sin(m longitude), and channels that are scalars, then rotational and then divergent parts of the winds.
"""

from __future__ import annotations

import functools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.diffusion.noise import Noise, standard_normal
from numpyro_diffusion_da.diffusion.spherical_noise import legendre_functions


class SphericalHarmonics(eqx.Module):
    """Synthesis and analysis on the Gaussian grid of 2 n or more longitudes and half as many latitudes.

    Args:
        degrees: n, so that the highest degree is n - 1.
        num_latitudes: Gaussian latitudes, from south to north; n or more.
        num_scalars: channels that are scalars.
        num_winds: winds, two channels each.

    Raises:
        ValueError: too few latitudes for exact quadrature.
    """

    degrees: int = eqx.field(static=True)
    num_latitudes: int = eqx.field(static=True)
    num_scalars: int = eqx.field(static=True)
    num_winds: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if not 2 <= self.degrees <= self.num_latitudes:
            raise ValueError(
                f"SphericalHarmonics got {self.degrees} degrees on {self.num_latitudes} latitudes; give 2 degrees or "
                "more and at least as many Gaussian latitudes."
            )

    @property
    def num_longitudes(self) -> int:
        """Twice the number of latitudes."""
        return 2 * self.num_latitudes

    @property
    def num_channels(self) -> int:
        """Scalars, and two for each wind."""
        return self.num_scalars + 2 * self.num_winds

    @property
    def coefficients_shape(self) -> tuple[int, int, int, int]:
        """(2, m, l, channels)."""
        return 2, self.degrees, self.degrees, self.num_channels

    @property
    def latitudes(self) -> Float[np.ndarray, " latitude"]:
        """In degrees, from south to north."""
        return np.rad2deg(np.arcsin(_gauss(self.num_latitudes)[0]))

    @property
    def weights(self) -> Float[np.ndarray, " latitude"]:
        """Part of the sphere that each latitude stands for; they sum to 1."""
        return _gauss(self.num_latitudes)[1]

    @property
    def mask(self) -> Float[np.ndarray, "2 m l channels"]:
        """1 where there is such a function: l >= m, a sine only for m > 0, a wind only for l > 0."""
        m, degree = np.arange(self.degrees)[:, None], np.arange(self.degrees)[None]
        plane = np.stack([degree >= m, (degree >= m) & (m > 0)])[..., None]
        wind = plane & (degree > 0)[None, ..., None]
        both = [np.repeat(plane, self.num_scalars, -1), np.repeat(wind, 2 * self.num_winds, -1)]
        return np.concatenate(both, axis=-1).astype(float)

    @property
    def reflection(self) -> Float[np.ndarray, "m l channels"]:
        """1 where a coefficient keeps its sign when the state is reflected at the equator, -1 where it changes."""
        m, degree = np.arange(self.degrees)[:, None], np.arange(self.degrees)[None]
        even = np.where((degree - m) % 2, -1.0, 1.0)[..., None]
        signs = np.repeat([1.0, -1.0, 1.0], [self.num_scalars, self.num_winds, self.num_winds])
        return even * signs[None, None]

    def synthesis(self, coefficients: Float[Array, "2 m l channels"]) -> Float[Array, "latitude longitude channels"]:
        """Fields of these coefficients."""
        scalars, winds = self.num_scalars, self.num_winds
        a, b, g = jnp.split(coefficients, [scalars, scalars + winds], axis=-1)
        return jnp.concatenate([self.scalars(a), *self.winds(b, g)], axis=-1)

    def analysis(self, fields: Float[Array, "latitude longitude channels"]) -> Float[Array, "2 m l channels"]:
        """Coefficients of these fields: their projection on the functions of degree below n."""
        scalars, winds = self.num_scalars, self.num_winds
        s, u, v = jnp.split(fields, [scalars, scalars + winds], axis=-1)
        return jnp.concatenate([self.of_scalars(s), *self.of_winds(u, v)], axis=-1)

    def synthesis_transpose(
        self, fields: Float[Array, "latitude longitude channels"]
    ) -> Float[Array, "2 m l channels"]:
        """The transpose of `synthesis` in the plain inner product of grid points: analysis without area weights."""
        weights = jnp.asarray(self.weights, fields.dtype)[:, None, None]
        return self.num_longitudes * self.analysis(fields / weights)

    def scalars(self, a: Float[Array, "2 m l c"]) -> Float[Array, "latitude longitude c"]:
        """Scalar fields."""
        return self._around(jnp.einsum("mjl,pmlc->jpmc", self._table(a, "value"), a))

    def of_scalars(self, fields: Float[Array, "latitude longitude c"]) -> Float[Array, "2 m l c"]:
        """Their coefficients."""
        return jnp.einsum("mjl,jpmc->pmlc", self._table(fields, "value"), self._waves(fields))

    def winds(
        self, b: Float[Array, "2 m l c"], g: Float[Array, "2 m l c"]
    ) -> tuple[Float[Array, "latitude longitude c"], Float[Array, "latitude longitude c"]]:
        """Eastward and northward components."""
        both = jnp.concatenate([b, g], axis=-1)
        north = jnp.einsum("mjl,pmlc->jpmc", self._table(b, "north"), both)
        east = jnp.einsum("mjl,pmlc->jpmc", self._table(b, "east"), jnp.stack([both[1], -both[0]]))
        n_b, n_g = jnp.split(north, 2, axis=-1)
        e_b, e_g = jnp.split(east, 2, axis=-1)
        fields = self._around(jnp.concatenate([e_g - n_b, e_b + n_g], axis=-1))
        u, v = jnp.split(fields, 2, axis=-1)
        return u, v

    def of_winds(
        self, u: Float[Array, "latitude longitude c"], v: Float[Array, "latitude longitude c"]
    ) -> tuple[Float[Array, "2 m l c"], Float[Array, "2 m l c"]]:
        """Rotational and divergent coefficients."""
        waves = self._waves(jnp.concatenate([u, v], axis=-1))
        north = jnp.einsum("mjl,jpmc->pmlc", self._table(u, "north"), waves)
        east = jnp.einsum("mjl,jpmc->pmlc", self._table(u, "east"), waves)
        east = jnp.stack([-east[1], east[0]])
        n_u, n_v = jnp.split(north, 2, axis=-1)
        e_u, e_v = jnp.split(east, 2, axis=-1)
        return e_v - n_u, e_u + n_v

    def degree_weights(self) -> Float[np.ndarray, " l"]:
        """sqrt(l (l + 1)): a -> g of its gradient; -b -> vorticity, -g -> divergence, on the unit sphere."""
        degree = np.arange(self.degrees)
        return np.sqrt(degree * (degree + 1.0))

    def _around(self, waves: Float[Array, "latitude 2 m c"]) -> Float[Array, "latitude longitude c"]:
        return jnp.einsum("jpmc,pmq->jqc", waves, jnp.asarray(self._trigonometric(), waves.dtype))

    def _waves(self, fields: Float[Array, "latitude longitude c"]) -> Float[Array, "latitude 2 m c"]:
        """With the weights of the quadrature."""
        weights = jnp.asarray(self.weights / self.num_longitudes, fields.dtype)[:, None, None]
        return jnp.einsum("jqc,pmq->jpmc", weights * fields, jnp.asarray(self._trigonometric(), fields.dtype))

    def _trigonometric(self) -> Float[np.ndarray, "2 m longitude"]:
        angle = np.arange(self.degrees)[:, None] * (2.0 * np.pi / self.num_longitudes) * np.arange(self.num_longitudes)
        return np.stack([np.cos(angle), np.sin(angle)])

    def _table(self, like: Array, name: str) -> Float[Array, "m latitude l"]:
        return jnp.asarray(_tables(self.degrees, self.num_latitudes)[name], like.dtype)


@functools.cache
def _tables(degrees: int, num_latitudes: int) -> dict[str, np.ndarray]:
    """Legendre functions, each of shape (m, latitude, l).

    "value" is Y, "north" dY/dlatitude / sqrt(l (l + 1)), "east" m Y / (cos(latitude) sqrt(l (l + 1))).
    """
    sine, _ = _gauss(num_latitudes)
    m, degree = np.arange(degrees + 1)[:, None], np.arange(degrees + 1)[None]
    # One degree more than asked, for the derivative of the last.
    norm = np.sqrt((degrees + 1) * (2.0 * degree + 1.0))
    value = legendre_functions(np.arcsin(sine), degrees + 1) * norm[:, None]
    cosine = np.sqrt(1.0 - sine**2)[None, :, None]
    ratio = np.sqrt(np.maximum(degree**2 - m**2, 0) / np.abs(4.0 * degree**2 - 1.0))
    north = np.zeros_like(value)
    north[..., 1:] += ((degree + 1) * ratio)[:, None, 1:] * value[..., :-1]
    north[..., :-1] -= (degree[:, :-1] * ratio[:, 1:])[:, None] * value[..., 1:]
    scale = cosine * np.sqrt(np.maximum(degree * (degree + 1.0), 1.0))[:, None]
    tables = {"value": value, "north": north / scale, "east": m[..., None] * value / scale}
    return {name: table[:degrees, :, :degrees] for name, table in tables.items()}


def _gauss(num_latitudes: int) -> tuple[np.ndarray, np.ndarray]:
    """(sines of the latitudes, weights that sum to 1)."""
    sine, weights = np.polynomial.legendre.leggauss(num_latitudes)
    return sine, 0.5 * weights


class HarmonicNoise(Noise):
    """Noise of unit variance in every channel, isotropic on the sphere for scalars and for winds.

    Equal power at every degree, as `SphericalNoise` has it for scalars; a wind's is shared by its two kinds. Its rank
    is n^2 for a scalar and 2 (n^2 - 1) for a wind.

    Args:
        harmonics: the grid, the channels and n.
    """

    harmonics: SphericalHarmonics

    def amplitude(self) -> Float[np.ndarray, "l channels"]:
        """Standard deviation of a coefficient."""
        h = self.harmonics
        degree = np.arange(h.degrees)[:, None]
        terms = np.repeat([h.degrees, h.degrees - 1], [h.num_scalars, 2 * h.num_winds])
        return 1.0 / np.sqrt(terms[None] * (2.0 * degree + 1.0))

    def sample(
        self, rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> Float[Array, "latitude longitude channels"]:
        """One draw.

        Raises:
            ValueError: another shape than the grid's.
        """
        self._check(shape)
        return self.synthesis(standard_normal(rng_key, self.harmonics.coefficients_shape, dtype))

    def covariance_product(
        self, v: Float[Array, "latitude longitude channels"]
    ) -> Float[Array, "latitude longitude channels"]:
        """A (A^T v), with A the `synthesis` of this noise.

        Raises:
            ValueError: another shape than the grid's.
        """
        self._check(v.shape)
        return self.synthesis(
            jnp.asarray(self.amplitude(), v.dtype)[None, None] * self.harmonics.synthesis_transpose(v)
        )

    def synthesis(self, white: Float[Array, "2 m l channels"]) -> Float[Array, "latitude longitude channels"]:
        """A: coefficients of unit variance -> fields."""
        return self.harmonics.synthesis(jnp.asarray(self.amplitude(), white.dtype)[None, None] * white)

    def analysis(self, fields: Float[Array, "latitude longitude channels"]) -> Float[Array, "2 m l channels"]:
        """The inverse of `synthesis` on what it can reach."""
        return self.harmonics.analysis(fields) / jnp.asarray(self.amplitude(), fields.dtype)[None, None]

    def _check(self, shape: tuple[int, ...]) -> None:
        h = self.harmonics
        expected = (h.num_latitudes, h.num_longitudes, h.num_channels)
        if tuple(shape) != expected:
            raise ValueError(f"the latent has shape {tuple(shape)}, expected {expected}, the grid of the harmonics.")
