"""Transition of the state by a diffusion prior."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.diffusion.denoiser import Denoiser, GuidanceState, NetworkPasses, PriorDenoiser
from numpyro_diffusion_da.diffusion.guidance import Guidance, ObservingDenoiser
from numpyro_diffusion_da.diffusion.linear_solve import KrylovSolve
from numpyro_diffusion_da.diffusion.memory import backward_bytes
from numpyro_diffusion_da.diffusion.path_weights import weighted_path
from numpyro_diffusion_da.diffusion.prior import Conditioning, DiffusionPrior
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.observation.likelihood import Likelihood, probe_signs
from numpyro_diffusion_da.transition.base import Centering, DrawRecord, Dynamics, Moments


class DiffusionDynamics(Dynamics):
    """Transition p(x' | c) of the state by a diffusion prior.

    Mean and covariance come from the largest noise level, where z_s contains no information about z. There D -> E[z |
    c] (Savary et al. 2026, arXiv 2605.20028, Theorem A.1) and, to the next order, s^2 J C -> Cov[z | c].

    Args:
        prior: diffusion prior.
        conditioning: return value of `prior.condition`.
        sampler: sampler of the draws.
    """

    prior: DiffusionPrior
    conditioning: Conditioning
    sampler: Sampler

    def _to_state(self, z: Float[Array, ...]) -> Float[Array, ...]:
        """Return the state a + S z of a latent z."""
        return self.prior.location(self.conditioning) + self.prior.scale(self.conditioning) * z

    def moments(self, noise_level: float | None = None) -> Moments:
        """Return the mean a + S D(0, s), and products with the covariance S s^2 C J^T S.

        It costs one forward pass, and one vjp per product.

        Args:
            noise_level: s; None takes the prior's highest level.
        """
        prior, conditioning = self.prior, self.conditioning
        location, scale = prior.location(conditioning), prior.scale(conditioning)
        level = jnp.asarray(prior.noise_range[1] if noise_level is None else noise_level, location.dtype)
        # At z_s = 0, the center of N(0, s^2 C), the dependence of D on z_s (of order 1/s) cancels to first order.
        denoised, pull = jax.vjp(lambda z: prior.denoise(z, level, conditioning), jnp.zeros_like(location))

        def covariance_product(v: Array) -> Array:
            return scale * level**2 * prior.noise.covariance_product(pull(scale * v)[0])

        passes = NetworkPasses.of(forward=1), NetworkPasses.of(vjp=1)
        return Moments(location + scale * denoised, covariance_product, *passes)

    def tangents(self) -> Float[Array, "k ..."]:
        """Return S e for random signs e, leading axis k, without a network pass."""
        location = self.prior.location(self.conditioning)
        spread = jnp.broadcast_to(self.prior.scale(self.conditioning), location.shape)
        return spread[None] * probe_signs(location.shape, location.dtype)

    def _start(self, rng_key: PRNGKeyArray) -> Array:
        """Draw the starting point of reverse diffusion, at the highest noise level."""
        prior = self.prior
        location = prior.location(self.conditioning)
        return self.sampler.initial(rng_key, prior.noise, prior.noise_range, location.shape, location.dtype)

    def random_numbers(self, rng_key: PRNGKeyArray, likelihood: Likelihood | None = None) -> Array:
        """Return the noise at the highest level, from which reverse diffusion starts."""
        return self._start(jax.random.split(rng_key)[0])

    def _run(self, rng_key: PRNGKeyArray, denoiser: Denoiser, centering: Centering | None) -> tuple[Array, DrawRecord]:
        """Draw a state by reverse diffusion with this denoiser, and return it with its record."""
        location = self.prior.location(self.conditioning)
        noise, noise_range = self.prior.noise, self.prior.noise_range
        start = None if centering is None else centering(self.random_numbers(rng_key))
        z, guidance_state = self.sampler.draw(
            rng_key, denoiser, noise, noise_range, location.shape, location.dtype, start
        )
        return self._to_state(z), _record(guidance_state)

    def draw(self, rng_key: PRNGKeyArray, centering: Centering | None = None) -> tuple[Float[Array, ...], DrawRecord]:
        """Draw x' ~ p(x' | c) by reverse diffusion with the prior's denoiser, and return it with its record."""
        return self._run(rng_key, PriorDenoiser(self.prior, self.conditioning), centering)

    def conditional_draw(
        self,
        rng_key: PRNGKeyArray,
        likelihood: Likelihood,
        guidance: Guidance,
        centering: Centering | None = None,
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """Draw x' ~ p(x' | c, y) by reverse diffusion with the guided denoiser, and return it with its record."""
        return self._run(rng_key, guidance(PriorDenoiser(self.prior, self.conditioning), likelihood), centering)

    def weighted_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], Float[Array, ""], DrawRecord]:
        """Draw a guided x' with its path weight.

        The weight is that of the distribution which the sampler draws from, at its number of levels.

        Returns:
            (x', shape of the state; log w, a scalar; record of the draw).

        Raises:
            ValueError: the sampler is not stochastic at every step.
            TypeError: the guidance's denoiser is not an `ObservingDenoiser`, or its solver does not return directions.
        """
        denoiser = guidance(PriorDenoiser(self.prior, self.conditioning), likelihood)
        if not isinstance(denoiser, ObservingDenoiser):
            raise TypeError(
                f"path weights need a guidance that returns its directions, and {type(guidance).__name__} gives a "
                f"{type(denoiser).__name__}, which is no ObservingDenoiser; use ndda.MMPS()."
            )
        start_key, loop_key = jax.random.split(rng_key)
        noise, noise_range = self.prior.noise, self.prior.noise_range
        z, log_ratio, guidance_state = weighted_path(
            loop_key, self.sampler, denoiser, noise, noise_range, self._start(start_key)
        )
        x = self._to_state(z)
        return x, likelihood.log_prob(x) + log_ratio, _record(guidance_state)

    def working_bytes(self, observations: int = 0) -> int:
        """Estimate how many bytes one `conditional_draw` needs.

        The estimate is what the network's backward pass keeps, ten latents, and what the default solver of a guidance
        keeps: for each of its products a latent and two vectors in the space of the observations.

        Args:
            observations: number of observed values m.
        """
        location = self.prior.location(self.conditioning)
        level = jnp.ones((), location.dtype)
        at = jax.ShapeDtypeStruct(location.shape, location.dtype)
        kept = backward_bytes(lambda z: self.prior.denoise(z, level, self.conditioning), at)
        products = min(KrylovSolve().max_products, observations)
        numbers = (10 + products) * location.size + 2 * products * observations
        return kept + numbers * location.dtype.itemsize


def _record(guidance_state: GuidanceState) -> DrawRecord:
    """Return the record of a draw."""
    return DrawRecord(guidance_state.passes, guidance_state.solver_residual)
