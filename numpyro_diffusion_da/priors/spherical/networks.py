"""Networks of the emulator on the sphere: the conditional mean, and the correction of the denoiser.

Both networks consist of linear operators that are the same at every longitude, and of products of fields at a point.
The equations of motion have the same form. Scalars are multiplied by scalars. Winds and gradients are complex numbers
(eastward + i northward). They enter only in combinations that do not depend on the orientation of the axes at a point:
p conj(q) and s w, for vectors p, q and w and a scalar s. The poles are therefore points like any other, and a state
that is rotated around the axis has a rotated forecast.
"""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.priors.residual_emulator import (
    NoiseLevelTerms,
    gradient_layer,
    init_level_layer,
    level_layer,
)
from numpyro_diffusion_da.priors.spherical.harmonics import HarmonicNoise, SphericalHarmonics


class ZonalOperator(eqx.Module):
    """Linear operator that commutes with rotation around the axis: one complex matrix for each zonal wavenumber m.

    It acts on x_m = a_m - i b_m, where a_m are coefficients of cosines and b_m coefficients of sines. Both are given
    and returned as a pair of real arrays.

    Attributes:
        real: real parts of the matrices, shape (m, out, in).
        imaginary: imaginary parts of the matrices, shape (m, out, in).
    """

    real: Float[Array, "m out in"]
    imaginary: Float[Array, "m out in"]

    def __call__(self, x: Float[Array, "2 m in"]) -> Float[Array, "2 m out"]:
        """Apply the operator to coefficients, as a pair (cosines, sines)."""
        real = jnp.einsum("moi,pmi->pmo", self.real, x)
        imaginary = jnp.einsum("moi,pmi->pmo", self.imaginary, x)
        # (R + i I)(a - i b) = (R a + I b) - i (R b - I a)
        return real + jnp.stack([imaginary[1], -imaginary[0]])

    def adjoint(self) -> ZonalOperator:
        """Adjoint operator, with the conjugate transpose of every matrix."""
        return ZonalOperator(jnp.swapaxes(self.real, 1, 2), -jnp.swapaxes(self.imaginary, 1, 2))

    def on_coefficients(self, x: Float[Array, "2 m l channels"]) -> Float[Array, "2 m l channels"]:
        """Apply an operator whose input and output are all degrees and channels."""
        return self(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


LIMIT = 3.0
"""Bound on the factors of products, in standard deviations.

With a bound of 8, free runs of a trained network gained energy without limit.
"""


def bounded(x: Float[Array, ...]) -> Float[Array, ...]:
    """Limit values smoothly to the range from -`LIMIT` to `LIMIT`, so that products cannot grow without bound."""
    return LIMIT * jnp.tanh(x / LIMIT)


class Winds(NamedTuple):
    """Vectors at grid points.

    Attributes:
        east: eastward components, shape (latitude, longitude, channels).
        north: northward components, shape (latitude, longitude, channels).
    """

    east: Float[Array, "latitude longitude channels"]
    north: Float[Array, "latitude longitude channels"]

    def mixed(self, real: Float[Array, "channels out"], turned: Float[Array, "channels out"]) -> Winds:
        """Multiply by the complex matrix `real` + i `turned`, which mixes channels and rotates vectors."""
        return Winds(
            self.east @ real - self.north @ turned,
            self.north @ real + self.east @ turned,
        )

    def bounded(self) -> Winds:
        """Limit the length of the vectors smoothly to `LIMIT`."""
        factor = jax.lax.rsqrt(1.0 + (self.east**2 + self.north**2) / LIMIT**2)
        return Winds(factor * self.east, factor * self.north)


class SphericalMeanNetwork(eqx.Module):
    r"""Network for the coefficients of the conditional mean and for features of every grid point.

    All coefficients are those of normalized states. The network adds corrections to the forecast $P y$ of a linear
    model. Each of the stages $k = 0, 1, \dots$ computes a correction $N_k$ from products of fields at a point:

    $$y' = G \left(P y + \sum_k \left((1 - t_k) P + t_k\right) N_k(y_k)\right).$$

    $N_k$ takes the state $y_k$ at the fraction $t_k = (k + 1/2) / \mathrm{stages}$ of the step: the point on the
    straight line from $y$ to $P y$, plus the corrections so far. The operator $(1 - t_k) P + t_k$ propagates the
    correction through the rest of the step. $G$ has one factor near 1 for each coefficient, which makes free runs keep
    the variance of the climate. Without stages the network is the linear forecast, damped by $G$, and its features are
    those of the previous state.

    Attributes:
        propagator: linear model P.
        first: weights from the scalars to the first factors of the products of scalars.
        second: weights from the scalars to the second factors of these products.
        vectors: weights from the vectors to the factors p and q of the products p conj(q): the real and imaginary parts
            of two complex matrices.
        scalars_out: weights from all scalar products to increments of scalars.
        weights: weights from the scalars to the factors s of the products s w.
        carried: weights from the vectors to the factors w: the real and the imaginary part of a complex matrix.
        vectors_out: weights from the products s w to increments of winds: the real and the imaginary part of a complex
            matrix.
        by_degree: weights that mix the channels of the increments for every degree.
        damping: factors G.
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
        """Initialize a network with random factors and zero output weights: training starts from the linear forecast.

        Args:
            rng_key: key of the random weights.
            harmonics: harmonics of the state.
            propagator: linear model P.
            stages: number of stages.
            hidden: number of products of each kind at a grid point.
        """
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
        """Compute the coefficients of the conditional mean, and the features of each grid point.

        Args:
            y: coefficients of the normalized previous state.
            harmonics: harmonics of the state.

        Returns:
            (coefficients of the normalized conditional mean, features of each grid point).
        """
        stages, damping = len(self.first), self.damping[None]
        forecast = self.propagator.on_coefficients(y)
        if not stages:
            return damping * forecast, features(y, harmonics)[0]
        # Sums over the corrections so far: (1 - t_k) N_k, which is still to be propagated, and t_k N_k, which is not.
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
        """Correction N of one stage, for a network whose weights have no stage axis.

        Args:
            s: scalars at each grid point.
            w: vectors at each grid point.
            harmonics: harmonics of the state.

        Returns:
            Coefficients of the correction.
        """
        # Scalar products: products of two scalars, and the real and the imaginary part of p conj(q).
        p, q = w.mixed(self.vectors[0], self.vectors[1]), w.mixed(self.vectors[2], self.vectors[3])
        products = [
            (s @ self.first) * (s @ self.second),
            p.east * q.east + p.north * q.north,
            p.north * q.east - p.east * q.north,
        ]
        scalars = jnp.concatenate(products, axis=-1) @ self.scalars_out
        # Vector products: a scalar times a vector.
        factor = s @ self.weights
        carried = w.mixed(self.carried[0], self.carried[1])
        carried = Winds(factor * carried.east, factor * carried.north)
        winds = carried.mixed(self.vectors_out[0], self.vectors_out[1])
        # The scalars beyond those of the state are potentials, such as kinetic energy. `by_degree` turns them into
        # winds, their gradients.
        a, potentials = jnp.split(harmonics.of_scalars(scalars), [harmonics.num_scalars], axis=-1)
        spectral = jnp.concatenate([a, *harmonics.of_winds(*winds), potentials], axis=-1)
        # The mask removes the coefficient of degree 0 of a wind, which the mean of a potential would otherwise enter.
        exists = jnp.asarray(harmonics.mask, spectral.dtype)
        return exists * jnp.einsum("pmli,lio->pmlo", spectral, self.by_degree)


def num_features(harmonics: SphericalHarmonics) -> tuple[int, int]:
    """Number of (scalars, vectors) at each grid point that `features` returns."""
    return harmonics.num_scalars + 2 * harmonics.num_winds + 3, harmonics.num_winds + harmonics.num_scalars


def features(
    y: Float[Array, "2 m l channels"], harmonics: SphericalHarmonics
) -> tuple[Float[Array, "latitude longitude scalars"], Winds]:
    """Compute the scalars and vectors at every grid point that the networks take.

    The scalars are those of the state, the vorticity and the divergence of its winds, sin(latitude), its square, and 1.
    The vectors are the winds of the state and the gradients of its scalars. Derivatives are divided by n / 4, so that
    all values are of order 1.

    Args:
        y: coefficients of the normalized state.
        harmonics: harmonics of the state, with n degrees.

    Returns:
        (scalars, vectors), limited to `LIMIT` except for the functions of latitude.
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
    r"""Exact denoiser of a Gaussian latent whose covariance is the same at every longitude.

    It acts on coefficients of the noise. For each zonal wavenumber, with eigenvectors $V$ of the covariance,

    $$E[z | z_s] = V \mathrm{diag}(\lambda / (\lambda + s^2)) V^H z_s.$$

    The latent has no variance outside the span of $V$.

    Attributes:
        vectors: operator V^H, the conjugate transpose of the eigenvectors.
        values: eigenvalues lambda, the variance along each eigenvector for unit noise, shape (m, rank).
    """

    vectors: ZonalOperator
    values: Float[Array, "m rank"]

    def __call__(
        self, z_s: Float[Array, "2 m l channels"], noise_level: Float[Array, ""]
    ) -> Float[Array, "2 m l channels"]:
        """Denoise the coefficients of a noised latent.

        Args:
            z_s: coefficients of the noised latent.
            noise_level: noise level s > 0.

        Returns:
            Coefficients of E[z | z_s].
        """
        gain = (self.values / (self.values + noise_level**2))[None]
        along = self.vectors(z_s.reshape(*z_s.shape[:2], -1))
        return self.vectors.adjoint()(gain * along).reshape(z_s.shape)


class SphericalNoiseLevelTerms(NamedTuple):
    """Terms of the shift and of the amplitudes of the hidden units of `SphericalResidualNetwork`.

    Attributes:
        scalars: terms of the shift b and the amplitude a for scalars.
        wind_amplitude: term of the amplitude a for winds, shape (latitude, longitude, hidden).
    """

    scalars: NoiseLevelTerms
    wind_amplitude: Float[Array, "latitude longitude hidden"]


class SphericalResidualNetwork(eqx.Module):
    r"""Residual network F, which runs at every noise level and adds the effect of the flow to the Gaussian denoiser.

    F is the gradient of a scalar function of the latent's coefficients, as in `priors.residual_emulator`. Let $B$ be
    the filter to `BANDS` ranges of scale, $S$ the synthesis, and $W$ the weights over bands and channels. Then for
    scalars and for winds

    $$
    \begin{aligned}
    F &= B S^T W^T [a \tanh(W S B z + b)], \\
    F &= B S^T W^T [a W S B z / \sqrt{1 + |W S B z|^2}].
    \end{aligned}
    $$

    $S^T$ is weighted by the area of grid points, so that $J C$ is symmetric, which it must be for $s^2 J C$ to be a
    covariance.

    Attributes:
        scalar_taps: weights W of scalars, shape (bands * scalars, hidden).
        wind_taps: weights W of winds, shape (bands * winds, hidden).
        shift: weights from the features to the shift b.
        amplitude: weights from the features to the amplitudes a of scalars and of winds.
        level_scale: weights of the hidden units of the noise level, tanh(level_scale log s + level_bias).
        level_bias: biases of these hidden units.
        level_terms: weights from these hidden units to their terms of b and of both a.
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
        """Initialize a network with random W and b, and a = 0: training starts from the Gaussian denoiser.

        Args:
            rng_key: key of the random weights.
            harmonics: harmonics of the state.
            hidden: number of hidden units of each kind at a grid point; 0 for a network that is always 0.
            level_hidden: number of hidden units of the noise level.
        """
        scalar_key, wind_key, shift_key, level_key = jax.random.split(rng_key, 4)
        scalars, winds = BANDS * harmonics.num_scalars, BANDS * harmonics.num_winds
        seen, _ = num_features(harmonics)
        return SphericalResidualNetwork(
            scalar_taps=jax.random.normal(scalar_key, (scalars, hidden)) / scalars**0.5,
            wind_taps=jax.random.normal(wind_key, (winds, hidden)) / winds**0.5,
            shift=0.3 * jax.random.normal(shift_key, (seen, hidden)) / seen**0.5,
            amplitude=jnp.zeros((seen, 2 * hidden)),
            **init_level_layer(level_key, level_hidden, 3 * hidden),
        )

    def terms(self, features: Float[Array, "latitude longitude scalars"]) -> SphericalNoiseLevelTerms:
        """Terms of b and a from the features, computed once per step."""
        amplitude, wind_amplitude = jnp.split(features @ self.amplitude, 2, axis=-1)
        return SphericalNoiseLevelTerms(NoiseLevelTerms(features @ self.shift, amplitude), wind_amplitude)

    def __call__(
        self,
        z: Float[Array, "2 m l channels"],
        noise_level: Float[Array, ""],
        terms: SphericalNoiseLevelTerms,
        noise: HarmonicNoise,
    ) -> Float[Array, "2 m l channels"]:
        """Compute F for a noised latent.

        Args:
            z: noised latent in coefficients of unit noise, already multiplied by c_in.
            noise_level: noise level s > 0.
            terms: terms from the features, as `terms` returns them.
            noise: noise of the diffusion.

        Returns:
            Value of F in coefficients of unit noise; 0 if the network has no hidden units.
        """
        if not self.scalar_taps.shape[1]:
            return jnp.zeros_like(z)
        h = noise.harmonics
        # The noise level adds the same terms at all grid points.
        added = level_layer(noise_level, self.level_scale, self.level_bias, self.level_terms)
        shift, amplitude, wind_amplitude = jnp.split(added[None, None], 3, axis=-1)
        level = NoiseLevelTerms(shift, amplitude)
        filters = jnp.asarray(bands(h.degrees)[:, None, None, :, None] * noise.amplitude()[None, None, None], z.dtype)
        scalars, winds = h.num_scalars, h.num_winds

        # Filter the latent to bands, and synthesize the bands on the grid.
        a, b, g = jnp.split(filters * z[None], [scalars, scalars + winds], axis=-1)
        u, v = h.winds(_beside(b), _beside(g))
        back = gradient_layer(h.scalars(_beside(a)), self.scalar_taps, terms.scalars, level)
        # The layer of winds depends on their length only, so that it commutes with rotations.
        u, v = u @ self.wind_taps, v @ self.wind_taps
        factor = (terms.wind_amplitude + wind_amplitude) * jax.lax.rsqrt(1.0 + u**2 + v**2)
        # Transpose of the synthesis and of the filter.
        b, g = h.of_winds((factor * u) @ self.wind_taps.T, (factor * v) @ self.wind_taps.T)
        parts = [_apart(h.of_scalars(back), scalars), _apart(b, winds), _apart(g, winds)]
        # The factor n compensates the size of the filters, which contain the amplitude of the noise on both sides.
        return h.degrees * jnp.sum(filters * jnp.concatenate(parts, axis=-1), axis=0)


BANDS = 3
"""Number of ranges of scale to which F filters the latent."""


def bands(degrees: int) -> Float[np.ndarray, "bands l"]:
    """Weights of each degree in each band: smooth functions about an octave apart, whose squares sum to 1."""
    octave = np.log2(np.maximum(np.arange(degrees), 1.0))
    centers = np.log2(degrees) - 0.75 - 1.25 * np.arange(BANDS)[::-1]
    weights = np.exp(-0.5 * ((octave[None] - centers[:, None]) / 0.6) ** 2)
    return weights / np.sqrt(np.sum(weights**2, axis=0, keepdims=True))


def _beside(x: Float[Array, "bands 2 m l c"]) -> Float[Array, "2 m l bands_c"]:
    """Move the band axis into the channels."""
    return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:4], -1)


def _apart(x: Float[Array, "2 m l bands_c"], channels: int) -> Float[Array, "bands 2 m l c"]:
    """Move the bands out of the channels, which inverts `_beside`."""
    return jnp.moveaxis(x.reshape(*x.shape[:3], BANDS, channels), -2, 0)
