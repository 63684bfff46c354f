"""Climatology of an emulator on the sphere, as a NumPyro distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.diffusion.noise import standard_normal
from numpyro_diffusion_da.priors.spherical.harmonics import HarmonicNoise
from numpyro_diffusion_da.priors.spherical.networks import GaussianDenoiser


class ZonalClimatology(dist.Distribution):
    """Distribution of Gaussian fields whose mean and covariance are the same at every longitude.

    A sample is `state_mean` + `state_scale` * fields, in the units of the state. The fields are synthesized from
    coefficients of the noise with the given covariance.

    Args:
        state_mean: mean along each latitude in the units of the state, shape (latitude, channel).
        state_scale: scale of each channel in the units of the state, shape (channel,).
        covariance: covariance of the coefficients, as eigenvectors and eigenvalues.
        noise: noise that defines the coefficients.
    """

    support = dist.constraints.independent(dist.constraints.real, 3)
    pytree_data_fields = ("state_mean", "state_scale", "covariance", "noise")

    def __init__(
        self,
        state_mean: Float[Array, "latitude channel"],
        state_scale: Float[Array, " channel"],
        covariance: GaussianDenoiser,
        noise: HarmonicNoise,
    ) -> None:
        self.state_mean, self.state_scale, self.covariance, self.noise = state_mean, state_scale, covariance, noise
        harmonics = noise.harmonics
        shape = (harmonics.num_latitudes, harmonics.num_longitudes, harmonics.num_channels)
        super().__init__(batch_shape=(), event_shape=shape)

    @property
    def mean(self) -> Float[Array, "latitude longitude channel"]:
        """Mean of the distribution in the units of the state, shape (latitude, longitude, channel)."""
        return jnp.broadcast_to(self.state_mean[:, None], self.event_shape)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, ...]:
        """Draw samples in the units of the state, shape (*sample_shape, latitude, longitude, channel)."""
        count = 1
        for size in sample_shape:
            count *= size

        def one(key: PRNGKeyArray) -> Array:
            values = self.covariance.values
            white = standard_normal(key, (2, *values.shape), values.dtype) * jnp.sqrt(values)[None]
            y = self.covariance.vectors.adjoint()(white)
            fields = self.noise.synthesis(y.reshape(self.noise.harmonics.coefficients_shape))
            return self.state_mean[:, None] + self.state_scale[None, None] * fields

        draws = jax.vmap(one)(jax.random.split(key, count))
        return draws.reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Float[Array, ...]) -> Float[Array, ...]:
        """Raise an error, because the covariance is singular on the grid and the distribution has no density there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "ZonalClimatology has no density on the grid, because its covariance is singular; use a method that only "
            "needs samples, such as ndda.Filter."
        )
