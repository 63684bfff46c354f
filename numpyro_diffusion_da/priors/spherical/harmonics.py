r"""Spherical harmonics of scalars and of winds on a Gaussian grid, and noise that is isotropic in both.

Let $Y_{lm}$ be the real spherical harmonics of degree $l = 0, \dots, n - 1$ and zonal wavenumber $m$, normalized to a
mean square of 1 over the sphere. Then

$$
\begin{aligned}
\mathrm{scalar} &= \sum a_{lm} Y_{lm}, \\
\mathrm{wind} &= \sum \left(b_{lm} \, k \times \nabla Y_{lm} + g_{lm} \nabla Y_{lm}\right) / \sqrt{l (l + 1)}.
\end{aligned}
$$

The mean square of a scalar is the sum of $a^2$. The mean square of the wind speed is the sum of $b^2$ (rotational part)
and $g^2$ (divergent part). The components of a wind along longitude and latitude are not defined at a pole, but its
coefficients are. With n or more Gaussian latitudes the quadrature is exact, and `analysis` inverts `synthesis`.

Fields have the shape (latitude, longitude, channels). Their channels are the scalars, then the eastward components and
then the northward components of the winds. Coefficients have the shape (2, m, l, channels). Their first axis is
cos(m longitude) and sin(m longitude). Their channels are the scalars, then the rotational parts and then the divergent
parts of the winds.
"""

from __future__ import annotations

import functools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.diffusion.noise import Noise, standard_normal
from numpyro_diffusion_da.diffusion.spherical_noise import legendre_functions


class SphericalHarmonics(eqx.Module):
    """Synthesis and analysis of fields on a Gaussian grid with twice as many longitudes as latitudes.

    Args:
        degrees: number n of degrees, 0 to n - 1.
        num_latitudes: number of Gaussian latitudes, from south to north; n or more.
        num_scalars: number of scalars, one channel each.
        num_winds: number of winds, two channels each.

    Raises:
        ValueError: fewer than 2 degrees, or too few latitudes for exact quadrature.
    """

    degrees: int = eqx.field(static=True)
    num_latitudes: int = eqx.field(static=True)
    num_scalars: int = eqx.field(static=True)
    num_winds: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if not 2 <= self.degrees <= self.num_latitudes:
            raise ValueError(
                f"SphericalHarmonics got {self.degrees} degrees on {self.num_latitudes} latitudes; give 2 or more "
                "degrees and at least as many Gaussian latitudes."
            )

    @property
    def num_longitudes(self) -> int:
        """Number of longitudes, twice the number of latitudes."""
        return 2 * self.num_latitudes

    @property
    def num_channels(self) -> int:
        """Number of channels: one for each scalar and two for each wind."""
        return self.num_scalars + 2 * self.num_winds

    @property
    def coefficients_shape(self) -> tuple[int, int, int, int]:
        """Shape of the coefficients, (2, m, l, channels)."""
        return 2, self.degrees, self.degrees, self.num_channels

    @property
    def latitudes(self) -> Float[np.ndarray, " latitude"]:
        """Gaussian latitudes in degrees, from south to north."""
        return np.rad2deg(np.arcsin(_gauss(self.num_latitudes)[0]))

    @property
    def weights(self) -> Float[np.ndarray, " latitude"]:
        """Share of the sphere's area that each latitude represents; the shares sum to 1."""
        return _gauss(self.num_latitudes)[1]

    @property
    def mask(self) -> Float[np.ndarray, "2 m l channels"]:
        """Mask of the coefficients, 1 where the harmonic exists and 0 elsewhere.

        A harmonic exists if l >= m, for a sine if also m > 0, and for a wind if also l > 0.
        """
        m, degree = np.arange(self.degrees)[:, None], np.arange(self.degrees)[None]
        plane = np.stack([degree >= m, (degree >= m) & (m > 0)])[..., None]
        wind = plane & (degree > 0)[None, ..., None]
        both = [np.repeat(plane, self.num_scalars, -1), np.repeat(wind, 2 * self.num_winds, -1)]
        return np.concatenate(both, axis=-1).astype(float)

    @property
    def reflection(self) -> Float[np.ndarray, "m l channels"]:
        """Sign of each coefficient under reflection of the state at the equator: 1 if unchanged, -1 if reversed."""
        m, degree = np.arange(self.degrees)[:, None], np.arange(self.degrees)[None]
        even = np.where((degree - m) % 2, -1.0, 1.0)[..., None]
        signs = np.repeat([1.0, -1.0, 1.0], [self.num_scalars, self.num_winds, self.num_winds])
        return even * signs[None, None]

    def synthesis(self, coefficients: Float[Array, "2 m l channels"]) -> Float[Array, "latitude longitude channels"]:
        """Compute the fields of given coefficients."""
        scalars, winds = self.num_scalars, self.num_winds
        a, b, g = jnp.split(coefficients, [scalars, scalars + winds], axis=-1)
        return jnp.concatenate([self.scalars(a), *self.winds(b, g)], axis=-1)

    def analysis(self, fields: Float[Array, "latitude longitude channels"]) -> Float[Array, "2 m l channels"]:
        """Compute the coefficients of given fields, which projects the fields on the degrees below n."""
        scalars, winds = self.num_scalars, self.num_winds
        s, u, v = jnp.split(fields, [scalars, scalars + winds], axis=-1)
        return jnp.concatenate([self.of_scalars(s), *self.of_winds(u, v)], axis=-1)

    def synthesis_transpose(
        self, fields: Float[Array, "latitude longitude channels"]
    ) -> Float[Array, "2 m l channels"]:
        """Apply the transpose of `synthesis` for the unweighted inner product over grid points.

        This is `analysis` without its area weights.
        """
        weights = jnp.asarray(self.weights, fields.dtype)[:, None, None]
        return self.num_longitudes * self.analysis(fields / weights)

    def scalars(self, a: Float[Array, "2 m l c"]) -> Float[Array, "latitude longitude c"]:
        """Compute scalar fields from their coefficients a."""
        return self._around(jnp.einsum("mjl,pmlc->jpmc", self._table(a, "value"), a))

    def of_scalars(self, fields: Float[Array, "latitude longitude c"]) -> Float[Array, "2 m l c"]:
        """Compute the coefficients a of scalar fields."""
        return jnp.einsum("mjl,jpmc->pmlc", self._table(fields, "value"), self._waves(fields))

    def winds(
        self, b: Float[Array, "2 m l c"], g: Float[Array, "2 m l c"]
    ) -> tuple[Float[Array, "latitude longitude c"], Float[Array, "latitude longitude c"]]:
        """Compute (eastward, northward) components of winds from rotational and divergent coefficients b and g."""
        # Sum over degrees, for both parts together: `north` is the derivative along latitude, `east` along longitude,
        # which turns a cosine into minus a sine.
        both = jnp.concatenate([b, g], axis=-1)
        north = jnp.einsum("mjl,pmlc->jpmc", self._table(b, "north"), both)
        east = jnp.einsum("mjl,pmlc->jpmc", self._table(b, "east"), jnp.stack([both[1], -both[0]]))
        n_b, n_g = jnp.split(north, 2, axis=-1)
        e_b, e_g = jnp.split(east, 2, axis=-1)
        # Sum over zonal wavenumbers. The rotational wind is the gradient turned by a right angle.
        fields = self._around(jnp.concatenate([e_g - n_b, e_b + n_g], axis=-1))
        u, v = jnp.split(fields, 2, axis=-1)
        return u, v

    def of_winds(
        self, u: Float[Array, "latitude longitude c"], v: Float[Array, "latitude longitude c"]
    ) -> tuple[Float[Array, "2 m l c"], Float[Array, "2 m l c"]]:
        """Compute (rotational, divergent) coefficients b and g from the components of winds."""
        waves = self._waves(jnp.concatenate([u, v], axis=-1))
        north = jnp.einsum("mjl,jpmc->pmlc", self._table(u, "north"), waves)
        east = jnp.einsum("mjl,jpmc->pmlc", self._table(u, "east"), waves)
        east = jnp.stack([-east[1], east[0]])
        n_u, n_v = jnp.split(north, 2, axis=-1)
        e_u, e_v = jnp.split(east, 2, axis=-1)
        return e_v - n_u, e_u + n_v

    def degree_weights(self) -> Float[np.ndarray, " l"]:
        """Factor sqrt(l (l + 1)) of each degree, for derivatives on the unit sphere.

        It maps a to the divergent coefficients g of the gradient, -b to the coefficients of the vorticity, and -g to
        the coefficients of the divergence.
        """
        degree = np.arange(self.degrees)
        return np.sqrt(degree * (degree + 1.0))

    def _around(self, waves: Float[Array, "latitude 2 m c"]) -> Float[Array, "latitude longitude c"]:
        """Sum of the zonal waves of each latitude."""
        return jnp.einsum("jpmc,pmq->jqc", waves, jnp.asarray(self._trigonometric(), waves.dtype))

    def _waves(self, fields: Float[Array, "latitude longitude c"]) -> Float[Array, "latitude 2 m c"]:
        """Zonal waves of each latitude, multiplied by the weights of the quadrature."""
        weights = jnp.asarray(self.weights / self.num_longitudes, fields.dtype)[:, None, None]
        return jnp.einsum("jqc,pmq->jpmc", weights * fields, jnp.asarray(self._trigonometric(), fields.dtype))

    def _trigonometric(self) -> Float[np.ndarray, "2 m longitude"]:
        """Values of cos(m longitude) and sin(m longitude)."""
        angle = np.arange(self.degrees)[:, None] * (2.0 * np.pi / self.num_longitudes) * np.arange(self.num_longitudes)
        return np.stack([np.cos(angle), np.sin(angle)])

    def _table(self, like: Array, name: str) -> Float[Array, "m latitude l"]:
        """One of the tables of Legendre functions, in the precision of an array."""
        return jnp.asarray(_tables(self.degrees, self.num_latitudes)[name], like.dtype)


@functools.cache
def _tables(degrees: int, num_latitudes: int) -> dict[str, np.ndarray]:
    """Tables of Legendre functions by name, each of shape (m, latitude, l).

    "value" is Y, "north" is dY/dlatitude / sqrt(l (l + 1)), and "east" is m Y / (cos(latitude) sqrt(l (l + 1))).
    """
    sine, _ = _gauss(num_latitudes)
    m, degree = np.arange(degrees + 1)[:, None], np.arange(degrees + 1)[None]
    # The derivative of the last degree needs one degree more.
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
    """Gaussian quadrature: (sines of the latitudes, weights that sum to 1)."""
    sine, weights = np.polynomial.legendre.leggauss(num_latitudes)
    return sine, 0.5 * weights


class HarmonicNoise(Noise):
    """Noise of unit variance in every channel, isotropic on the sphere for scalars and for winds.

    Every degree has the same power, as in `SphericalNoise` for scalars. A wind has the same power in its rotational and
    divergent parts. The rank of the covariance is n^2 for a scalar and 2 (n^2 - 1) for a wind.

    Args:
        harmonics: harmonics, which define the grid, the channels and the number of degrees n.

    Raises:
        TypeError: `harmonics` is not a `SphericalHarmonics`.
    """

    harmonics: SphericalHarmonics

    def __check_init__(self) -> None:
        example = "SphericalHarmonics(22, 32, num_scalars=3, num_winds=3)"
        require(self.harmonics, SphericalHarmonics, self, "harmonics", example)

    def amplitude(self) -> Float[np.ndarray, "l channels"]:
        """Standard deviation of a coefficient of each degree and channel."""
        h = self.harmonics
        degree = np.arange(h.degrees)[:, None]
        terms = np.repeat([h.degrees, h.degrees - 1], [h.num_scalars, 2 * h.num_winds])
        return 1.0 / np.sqrt(terms[None] * (2.0 * degree + 1.0))

    def sample(
        self, rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> Float[Array, "latitude longitude channels"]:
        """Draw one noise field e ~ N(0, C).

        Args:
            rng_key: key of the draw.
            shape: shape (latitude, longitude, channels) of the grid.
            dtype: floating type of the field.

        Raises:
            ValueError: the shape is not that of the grid.
        """
        return self.colored(standard_normal(rng_key, self.white_shape(shape), dtype), shape)

    def white_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the coefficients.

        Args:
            shape: shape (latitude, longitude, channels) of the grid.

        Raises:
            ValueError: the shape is not that of the grid.
        """
        self._check(shape)
        return self.harmonics.coefficients_shape

    def colored(
        self, white: Float[Array, "2 m l channels"], shape: tuple[int, ...]
    ) -> Float[Array, "latitude longitude channels"]:
        """Return `synthesis(white)`."""
        return self.synthesis(white)

    def covariance_product(
        self, v: Float[Array, "latitude longitude channels"]
    ) -> Float[Array, "latitude longitude channels"]:
        """Product C v = A A^T v with the covariance, where A is the `synthesis` of this noise.

        Raises:
            ValueError: the shape of `v` is not that of the grid.
        """
        self._check(v.shape)
        return self.synthesis(
            jnp.asarray(self.amplitude(), v.dtype)[None, None] * self.harmonics.synthesis_transpose(v)
        )

    def synthesis(self, white: Float[Array, "2 m l channels"]) -> Float[Array, "latitude longitude channels"]:
        """Compute the fields of coefficients of unit variance; this is the linear operator A with C = A A^T."""
        return self.harmonics.synthesis(jnp.asarray(self.amplitude(), white.dtype)[None, None] * white)

    def analysis(self, fields: Float[Array, "latitude longitude channels"]) -> Float[Array, "2 m l channels"]:
        """Compute the coefficients of unit variance of given fields; this inverts `synthesis` on its range."""
        return self.harmonics.analysis(fields) / jnp.asarray(self.amplitude(), fields.dtype)[None, None]

    def _check(self, shape: tuple[int, ...]) -> None:
        """Check that a shape is that of the grid.

        Raises:
            ValueError: it has another shape.
        """
        h = self.harmonics
        expected = (h.num_latitudes, h.num_longitudes, h.num_channels)
        if tuple(shape) != expected:
            raise ValueError(
                f"HarmonicNoise got a latent of shape {tuple(shape)}, expected {expected}; give a field on the grid of "
                "the harmonics."
            )
