"""One transition by a diffusion prior."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.diffusion.denoiser import Denoiser, GuidanceState, NetworkPasses, PriorDenoiser
from numpyro_diffusion_da.diffusion.guidance import Guidance, ObservingDenoiser
from numpyro_diffusion_da.diffusion.memory import backward_bytes
from numpyro_diffusion_da.diffusion.path_weights import weighted_path
from numpyro_diffusion_da.diffusion.prior import Conditioning, DiffusionPrior
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.observation.likelihood import (
    Likelihood,
    probe_signs,
)
from numpyro_diffusion_da.transition.base import DrawRecord, Dynamics, Moments


class DiffusionDynamics(Dynamics):
    """The transition of a diffusion prior.

    Mean and covariance come from the largest noise level, where z_s says nothing about z: D -> E[z | c] (Savary et al.
    2026, arXiv 2605.20028, Theorem A.1), and, one order on, s^2 J C -> Cov[z | c].

    Args:
        prior: the diffusion prior.
        conditioning: what `prior.condition` gave.
        sampler: how to draw.
    """

    prior: DiffusionPrior
    conditioning: Conditioning
    sampler: Sampler

    def _to_state(self, z: Float[Array, ...]) -> Float[Array, ...]:
        return self.prior.location(self.conditioning) + self.prior.scale(self.conditioning) * z

    def moments(self, noise_level: float | None = None) -> Moments:
        """The mean a + S D(0, s) and products with S s^2 C J^T S: one forward pass, and one vjp a product."""
        prior, conditioning = self.prior, self.conditioning
        location, scale = prior.location(conditioning), prior.scale(conditioning)
        level = jnp.asarray(prior.noise_range[1] if noise_level is None else noise_level, location.dtype)
        # z_s = 0 is the center of N(0, s^2 C): D's dependence on z_s, of order 1/s, then cancels to first order.
        denoised, pull = jax.vjp(lambda z: prior.denoise(z, level, conditioning), jnp.zeros_like(location))

        def covariance_product(v: Array) -> Array:
            return scale * level**2 * prior.noise.covariance_product(pull(scale * v)[0])

        passes = NetworkPasses.of(forward=1 + prior.conditioning_passes)
        return Moments(location + scale * denoised, covariance_product, passes, NetworkPasses.of(vjp=1))

    def tangents(self) -> Float[Array, "k ..."]:
        """S e with random signs e; no network pass."""
        location = self.prior.location(self.conditioning)
        spread = jnp.broadcast_to(self.prior.scale(self.conditioning), location.shape)
        return spread[None] * probe_signs(location.shape, location.dtype)

    def _start(self, rng_key: PRNGKeyArray) -> Array:
        prior = self.prior
        location = prior.location(self.conditioning)
        return self.sampler.initial(rng_key, prior.noise, prior.noise_range, location.shape, location.dtype)

    def _record(self, guidance_state: GuidanceState) -> DrawRecord:
        passes = guidance_state.passes.plus(NetworkPasses.of(forward=self.prior.conditioning_passes))
        return DrawRecord(passes, guidance_state.solver_residual)

    def _run(self, rng_key: PRNGKeyArray, denoiser: Denoiser) -> tuple[Array, DrawRecord]:
        start_key, loop_key = jax.random.split(rng_key)
        noise, noise_range = self.prior.noise, self.prior.noise_range
        z, guidance_state = self.sampler(loop_key, denoiser, noise, noise_range, self._start(start_key))
        return self._to_state(z), self._record(guidance_state)

    def draw(self, rng_key: PRNGKeyArray) -> tuple[Float[Array, ...], DrawRecord]:
        """Reverse diffusion with the prior's denoiser."""
        return self._run(rng_key, PriorDenoiser(self.prior, self.conditioning))

    def conditional_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """Reverse diffusion with the guided denoiser."""
        return self._run(rng_key, guidance(PriorDenoiser(self.prior, self.conditioning), likelihood))

    def weighted_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], Float[Array, ""], DrawRecord]:
        """Path weights (`path`): for the law that the sampler gives, at its number of levels.

        Raises:
            ValueError: the sampler is not stochastic at every step.
            TypeError: the guidance's denoiser is not an `ObservingDenoiser`.
        """
        denoiser = guidance(PriorDenoiser(self.prior, self.conditioning), likelihood)
        if not isinstance(denoiser, ObservingDenoiser):
            raise TypeError(
                f"path weights need a guidance that says what it has seen, and {type(guidance).__name__} gives a "
                f"{type(denoiser).__name__}, which is no ObservingDenoiser; use ndda.MMPS()."
            )
        start_key, loop_key = jax.random.split(rng_key)
        noise, noise_range = self.prior.noise, self.prior.noise_range
        z, log_ratio, guidance_state = weighted_path(
            loop_key, self.sampler, denoiser, noise, noise_range, self._start(start_key)
        )
        x = self._to_state(z)
        return x, likelihood.log_prob(x) + log_ratio, self._record(guidance_state)

    def working_bytes(self) -> int:
        """About what one `conditional_draw` needs: what the network's backward pass keeps, and some ten latents."""
        location = self.prior.location(self.conditioning)
        level = jnp.ones((), location.dtype)
        at = jax.ShapeDtypeStruct(location.shape, location.dtype)
        kept = backward_bytes(lambda z: self.prior.denoise(z, level, self.conditioning), at)
        return kept + 10 * location.size * location.dtype.itemsize
