"""The two networks of an emulator on the sphere: the conditional mean, and the correction of its denoiser.

Both are built of what the equations of motion are built of: linear operators that are the same at every longitude, and
products of fields at a point. Scalars are multiplied by scalars, winds and gradients enter as complex numbers
(eastward + i northward) and only in combinations that do not depend on how the axes lie at a point: p conj(q), s w. So
there is nothing special about the poles, and a state turned around the axis has a turned forecast.
"""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.priors.spherical.harmonics import HarmonicNoise, SphericalHarmonics


class ZonalOperator(eqx.Module):
    """A linear operator that commutes with rotation around the axis: one complex matrix for each zonal wavenumber m.

    Acts on x_m = a_m - i b_m, with a_m and b_m what belongs to the cosine and to the sine, given as a pair.

    Attributes:
        real: real parts, shape (m, out, in); `imaginary` likewise.
    """

    real: Float[Array, "m out in"]
    imaginary: Float[Array, "m out in"]

    def __call__(self, x: Float[Array, "2 m in"]) -> Float[Array, "2 m out"]:
        """The product."""
        real = jnp.einsum("moi,pmi->pmo", self.real, x)
        imaginary = jnp.einsum("moi,pmi->pmo", self.imaginary, x)
        # (R + i I)(a - i b) = (R a + I b) - i (R b - I a)
        return real + jnp.stack([imaginary[1], -imaginary[0]])

    def adjoint(self) -> ZonalOperator:
        """The conjugate transpose of every matrix."""
        return ZonalOperator(jnp.swapaxes(self.real, 1, 2), -jnp.swapaxes(self.imaginary, 1, 2))

    def on_coefficients(self, x: Float[Array, "2 m l channels"]) -> Float[Array, "2 m l channels"]:
        """The product of a square operator over all degrees and channels."""
        return self(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


LIMIT = 3.0
"""Of what enters a product, in standard deviations: with 8, free runs of a trained network gained energy for ever."""


def bounded(x: Float[Array, ...]) -> Float[Array, ...]:
    """The values, bent so that they stay within `LIMIT`: products of what no training state had cannot run away."""
    return LIMIT * jnp.tanh(x / LIMIT)


class Winds(NamedTuple):
    """Vectors at grid points: components of shape (latitude, longitude, channels)."""

    east: Float[Array, "latitude longitude channels"]
    north: Float[Array, "latitude longitude channels"]

    def mixed(self, real: Float[Array, "channels out"], turned: Float[Array, "channels out"]) -> Winds:
        """Product with the complex matrix real + i turned."""
        return Winds(
            self.east @ real - self.north @ turned,
            self.north @ real + self.east @ turned,
        )

    def bounded(self) -> Winds:
        """Bent so that their length stays within `LIMIT`."""
        factor = jax.lax.rsqrt(1.0 + (self.east**2 + self.north**2) / LIMIT**2)
        return Winds(factor * self.east, factor * self.north)


class SphericalMeanNetwork(eqx.Module):
    """Coefficients of the normalized state -> those of its conditional mean, and features of every grid point.

    The forecast of a linear model, P y, and `stages` corrections N_k, products of fields at a point in the course of
    the step. N_k sees the state at the fraction t_k = (k + 1/2) / stages of the step, taken from the straight line
    between y and P y with the corrections so far, and the rest of the step carries it to the end as (1 - t_k) P + t_k:

        y' = G (P y + sum_k ((1 - t_k) P + t_k) N_k(y_k))

    G has one factor for each coefficient, near 1, with which free runs keep the climate's variance. With no stage it is
    the linear forecast, whose features are those of the state before.

    Attributes:
        propagator: P.
        first: scalars -> one factor of the scalar products; `second` the other; with the speed products they are mixed
            into scalar increments by `scalars_out`.
        vectors: vectors -> factors p, q (complex matrices, real and imaginary parts) of p conj(q).
        weights: scalars -> factor s of s w; `carried` vectors -> w; `vectors_out` mixes them into wind increments.
        by_degree: what is mixed of the increments for every degree.
        damping: G.
    """

    propagator: ZonalOperator
    first: Float[Array, "stages scalars hidden"]
    second: Float[Array, "stages scalars hidden"]
    vectors: Float[Array, "stages 4 vectors hidden"]
    scalars_out: Float[Array, "stages three_hidden out"]
    weights: Float[Array, "stages scalars hidden"]
    carried: Float[Array, "stages 2 vectors hidden"]
    vectors_out: Float[Array, "stages 2 hidden winds"]
    by_degree: Float[Array, "stages l spectral_in spectral_out"]
    damping: Float[Array, "m l channels"]

    @staticmethod
    def init(
        rng_key: PRNGKeyArray, harmonics: SphericalHarmonics, propagator: ZonalOperator, stages: int, hidden: int
    ) -> SphericalMeanNetwork:
        """Random factors; zero where they are mixed, so that training starts from the linear forecast."""
        scalars, vectors = num_features(harmonics)
        extra = harmonics.num_winds
        keys = jax.random.split(rng_key, 7)
        shapes = {
            "first": (stages, scalars, hidden),
            "second": (stages, scalars, hidden),
            "vectors": (stages, 4, vectors, hidden),
            "weights": (stages, scalars, hidden),
            "carried": (stages, 2, vectors, hidden),
        }
        factors = {
            name: jax.random.normal(key, shape) / shape[-2] ** 0.5
            for key, (name, shape) in zip(keys, shapes.items(), strict=False)
        }
        channels = harmonics.num_channels
        eye = np.zeros((stages, harmonics.degrees, channels + extra, channels))
        eye[..., np.arange(channels), np.arange(channels)] = 1.0
        return SphericalMeanNetwork(
            propagator=propagator,
            scalars_out=jnp.zeros((stages, 3 * hidden, harmonics.num_scalars + extra)),
            vectors_out=jnp.zeros((stages, 2, hidden, harmonics.num_winds)),
            by_degree=jnp.asarray(eye, jnp.float32),
            damping=jnp.ones(harmonics.coefficients_shape[1:]),
            **factors,
        )

    def __call__(
        self, y: Float[Array, "2 m l channels"], harmonics: SphericalHarmonics
    ) -> tuple[Float[Array, "2 m l channels"], Float[Array, "latitude longitude scalars"]]:
        """(coefficients of the mean, features)."""
        stages, damping = len(self.first), self.damping[None]
        forecast = self.propagator.on_coefficients(y)
        if not stages:
            return damping * forecast, features(y, harmonics)[0]
        early, late = jnp.zeros_like(y), jnp.zeros_like(y)
        staged = eqx.tree_at(lambda n: (n.propagator, n.damping), self, (None, None))
        for k in range(stages):
            t = (k + 0.5) / stages
            stage = jax.tree.map(lambda x, k=k: x[k], staged)
            s, w = features(y + t * (forecast - y) + early + late, harmonics)
            increment = stage.increment(s, w, harmonics)
            early, late = early + (1.0 - t) * increment, late + t * increment
        return damping * (forecast + self.propagator.on_coefficients(early) + late), s

    def increment(
        self, s: Float[Array, "latitude longitude scalars"], w: Winds, harmonics: SphericalHarmonics
    ) -> Float[Array, "2 m l channels"]:
        """N of one stage, whose weights have no axis of stages."""
        p, q = w.mixed(self.vectors[0], self.vectors[1]), w.mixed(self.vectors[2], self.vectors[3])
        products = [
            (s @ self.first) * (s @ self.second),
            p.east * q.east + p.north * q.north,
            p.north * q.east - p.east * q.north,
        ]
        scalars = jnp.concatenate(products, axis=-1) @ self.scalars_out
        factor = s @ self.weights
        carried = w.mixed(self.carried[0], self.carried[1])
        carried = Winds(factor * carried.east, factor * carried.north)
        winds = carried.mixed(self.vectors_out[0], self.vectors_out[1])
        # The scalars beyond the state's own are potentials, kinetic energy for one: `by_degree` takes their gradients.
        a, potentials = jnp.split(harmonics.of_scalars(scalars), [harmonics.num_scalars], axis=-1)
        spectral = jnp.concatenate([a, *harmonics.of_winds(*winds), potentials], axis=-1)
        # A potential has a mean, the wind that it drives does not.
        exists = jnp.asarray(harmonics.mask, spectral.dtype)
        return exists * jnp.einsum("pmli,lio->pmlo", spectral, self.by_degree)


def num_features(harmonics: SphericalHarmonics) -> tuple[int, int]:
    """Scalars and vectors at a grid point that the networks see."""
    return harmonics.num_scalars + 2 * harmonics.num_winds + 3, harmonics.num_winds + harmonics.num_scalars


def features(
    y: Float[Array, "2 m l channels"], harmonics: SphericalHarmonics
) -> tuple[Float[Array, "latitude longitude scalars"], Winds]:
    """What a state has at every grid point.

    Scalars: its own, vorticity and divergence of its winds, and sin(latitude), its square and 1. Vectors: its winds,
    and the gradients of its scalars. Derivatives are divided by n / 4, so that all are of order 1.
    """
    scalars, winds = harmonics.num_scalars, harmonics.num_winds
    a, b, g = jnp.split(y, [scalars, scalars + winds], axis=-1)
    degree = jnp.asarray(harmonics.degree_weights() * (4.0 / harmonics.degrees), y.dtype)[None, None, :, None]
    fields = harmonics.scalars(jnp.concatenate([a, -degree * b, -degree * g], axis=-1))
    rotational = jnp.concatenate([b, jnp.zeros_like(a)], axis=-1)
    w = Winds(*harmonics.winds(rotational, jnp.concatenate([g, degree * a], axis=-1)))
    sine = jnp.sin(jnp.deg2rad(jnp.asarray(harmonics.latitudes, y.dtype)))
    places = jnp.stack([sine, sine**2, jnp.ones_like(sine)], axis=-1)[:, None]
    places = jnp.broadcast_to(places, (*fields.shape[:2], 3))
    return jnp.concatenate([bounded(fields), places], axis=-1), w.bounded()


class GaussianDenoiser(eqx.Module):
    """E[z | z + s e] for a Gaussian z whose covariance is the same at every longitude, in coefficients of the noise.

    V diag(lambda / (lambda + s^2)) V^H for each m: what is outside the span of V has no variance.

    Attributes:
        vectors: V^H.
        values: lambda, the variance along each against that of unit noise, shape (m, rank).
    """

    vectors: ZonalOperator
    values: Float[Array, "m rank"]

    def __call__(
        self, z_s: Float[Array, "2 m l channels"], noise_level: Float[Array, ""]
    ) -> Float[Array, "2 m l channels"]:
        """The denoised coefficients."""
        gain = (self.values / (self.values + noise_level**2))[None]
        along = self.vectors(z_s.reshape(*z_s.shape[:2], -1))
        return self.vectors.adjoint()(gain * along).reshape(z_s.shape)


class SphericalNoiseLevelTerms(NamedTuple):
    """What the correction takes from the features, once a step."""

    shift: Float[Array, "latitude longitude hidden"]
    amplitude: Float[Array, "latitude longitude hidden"]
    wind_amplitude: Float[Array, "latitude longitude hidden"]


class SphericalResidualNetwork(eqx.Module):
    """F, run at every noise level: how today's flow departs from the Gaussian denoiser.

    The gradient of a scalar function of the latent's coefficients, as in `priors.emulator`: with the latent filtered to
    `BANDS` ranges of scale, and B, S, W the filter, the synthesis and the matrix over bands and channels,

        F = B S^T W^T [a tanh(W S B z + b)]    and for winds    B S^T W^T [a W S B z / sqrt(1 + |W S B z|^2)],

    with S^T taken with the area of a grid point, so J C is symmetric, as it must be for s^2 J C to be a covariance.

    Attributes:
        scalar_taps: W of scalars, shape (bands * scalars, hidden); `wind_taps` that of winds.
        shift: features -> b; `amplitude` features -> a of both kinds.
        level_scale: hidden units of the noise level are tanh(level_scale log s + level_bias).
        level_terms: what they add to b and a.
    """

    scalar_taps: Float[Array, "band_scalars hidden"]
    wind_taps: Float[Array, "band_winds hidden"]
    shift: Float[Array, "scalars hidden"]
    amplitude: Float[Array, "scalars two_hidden"]
    level_scale: Float[Array, " level_hidden"]
    level_bias: Float[Array, " level_hidden"]
    level_terms: Float[Array, "level_hidden three_hidden"]

    @staticmethod
    def init(
        rng_key: PRNGKeyArray, harmonics: SphericalHarmonics, hidden: int, level_hidden: int = 8
    ) -> SphericalResidualNetwork:
        """Random W and b; a = 0, so that training starts from the Gaussian denoiser."""
        scalar_key, wind_key, shift_key, level_key = jax.random.split(rng_key, 4)
        scalars, winds = BANDS * harmonics.num_scalars, BANDS * harmonics.num_winds
        seen, _ = num_features(harmonics)
        return SphericalResidualNetwork(
            scalar_taps=jax.random.normal(scalar_key, (scalars, hidden)) / scalars**0.5,
            wind_taps=jax.random.normal(wind_key, (winds, hidden)) / winds**0.5,
            shift=0.3 * jax.random.normal(shift_key, (seen, hidden)) / seen**0.5,
            amplitude=jnp.zeros((seen, 2 * hidden)),
            level_scale=0.5 * jax.random.normal(level_key, (level_hidden,)),
            level_bias=jnp.linspace(-2.0, 2.0, level_hidden),
            level_terms=jnp.zeros((level_hidden, 3 * hidden)),
        )

    def terms(self, features: Float[Array, "latitude longitude scalars"]) -> SphericalNoiseLevelTerms:
        """The features' part of b and a."""
        amplitude, wind_amplitude = jnp.split(features @ self.amplitude, 2, axis=-1)
        return SphericalNoiseLevelTerms(features @ self.shift, amplitude, wind_amplitude)

    def __call__(
        self,
        z: Float[Array, "2 m l channels"],
        noise_level: Float[Array, ""],
        terms: SphericalNoiseLevelTerms,
        noise: HarmonicNoise,
    ) -> Float[Array, "2 m l channels"]:
        """F(z, s), z in coefficients of unit noise and already scaled by c_in; 0 without hidden units."""
        if not self.scalar_taps.shape[1]:
            return jnp.zeros_like(z)
        h = noise.harmonics
        level = jnp.tanh(self.level_scale * jnp.log(noise_level) + self.level_bias) @ self.level_terms
        shift, amplitude, wind_amplitude = jnp.split(level[None, None], 3, axis=-1)
        filters = jnp.asarray(bands(h.degrees)[:, None, None, :, None] * noise.amplitude()[None, None, None], z.dtype)
        scalars, winds = h.num_scalars, h.num_winds

        a, b, g = jnp.split(filters * z[None], [scalars, scalars + winds], axis=-1)
        u, v = h.winds(_beside(b), _beside(g))
        hidden = jnp.tanh(h.scalars(_beside(a)) @ self.scalar_taps + terms.shift + shift)
        back = ((terms.amplitude + amplitude) * hidden) @ self.scalar_taps.T
        u, v = u @ self.wind_taps, v @ self.wind_taps
        factor = (terms.wind_amplitude + wind_amplitude) * jax.lax.rsqrt(1.0 + u**2 + v**2)
        b, g = h.of_winds((factor * u) @ self.wind_taps.T, (factor * v) @ self.wind_taps.T)
        parts = [_apart(h.of_scalars(back), scalars), _apart(b, winds), _apart(g, winds)]
        # n^2 undoes the size of the filters, which hold the noise's amplitude on both sides.
        return h.degrees * jnp.sum(filters * jnp.concatenate(parts, axis=-1), axis=0)


BANDS = 3
"""Ranges of scale that F tells apart."""


def bands(degrees: int) -> Float[np.ndarray, "bands l"]:
    """Weights of each degree in each band: smooth, octaves apart, their squares sum to 1."""
    octave = np.log2(np.maximum(np.arange(degrees), 1.0))
    centers = np.log2(degrees) - 0.75 - 1.25 * np.arange(BANDS)[::-1]
    weights = np.exp(-0.5 * ((octave[None] - centers[:, None]) / 0.6) ** 2)
    return weights / np.sqrt(np.sum(weights**2, axis=0, keepdims=True))


def _beside(x: Float[Array, "bands 2 m l c"]) -> Float[Array, "2 m l bands_c"]:
    return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:4], -1)


def _apart(x: Float[Array, "2 m l bands_c"], channels: int) -> Float[Array, "bands 2 m l c"]:
    return jnp.moveaxis(x.reshape(*x.shape[:3], BANDS, channels), -2, 0)
