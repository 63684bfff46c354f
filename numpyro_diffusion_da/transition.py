"""One step of the state, p(x' | c): its mean and covariance, a draw, and a draw given an observation.

The filters ask these four things of any transition. `DiffusionStep` answers from a diffusion prior, `GaussianStep` in
closed form.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.denoiser import Denoiser, NetworkPasses, PriorDenoiser
from numpyro_diffusion_da.footprint import backward_bytes
from numpyro_diffusion_da.guidance import Guidance
from numpyro_diffusion_da.likelihood import GaussianLikelihood
from numpyro_diffusion_da.linear_solve import projected_solve
from numpyro_diffusion_da.prior import Conditioning, DiffusionPrior
from numpyro_diffusion_da.sampler import Sampler


class DrawRecord(NamedTuple):
    """What a draw cost and how far it can be trusted.

    Attributes:
        passes: network passes made.
        solver_residual: largest relative residual of the guidance's linear solves; 0 where none was made.
    """

    passes: NetworkPasses
    solver_residual: Float[Array, ""]


class Moments(NamedTuple):
    """Mean and covariance of p(x' | c), the covariance as an operator.

    Attributes:
        mean: E[x' | c], shape of the state.
        covariance_product: v -> Cov[x' | c] v, state-shaped in and out.
        passes: network passes made so far.
        passes_per_product: network passes of one covariance product.
    """

    mean: Float[Array, ...]
    covariance_product: Callable[[Float[Array, ...]], Float[Array, ...]]
    passes: NetworkPasses
    passes_per_product: NetworkPasses


class OneStep(eqx.Module):
    """p(x' | c) for one given c."""

    @abc.abstractmethod
    def moments(self, noise_level: float | None = None) -> Moments:
        """Mean and covariance of x'.

        Args:
            noise_level: where a diffusion's covariance is read off; None is its highest. Closed forms do not need it.
        """

    @abc.abstractmethod
    def draw(self, rng_key: PRNGKeyArray) -> tuple[Float[Array, ...], DrawRecord]:
        """A draw x' ~ p(x' | c)."""

    @abc.abstractmethod
    def conditional_draw(
        self, rng_key: PRNGKeyArray, likelihood: GaussianLikelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """A draw x' ~ p(x' | c, y), the optimal proposal. Closed forms do not need the guidance."""


class DiffusionStep(OneStep):
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
        # z_s = 0 is the centre of N(0, s^2 C): D's dependence on z_s, of order 1/s, then cancels to first order.
        denoised, pull = jax.vjp(lambda z: prior.denoise(z, level, conditioning), jnp.zeros_like(location))

        def covariance_product(v: Array) -> Array:
            return scale * level**2 * prior.noise.covariance_product(pull(scale * v)[0])

        passes = NetworkPasses.of(forward=1 + prior.conditioning_passes)
        return Moments(location + scale * denoised, covariance_product, passes, NetworkPasses.of(vjp=1))

    def _run(self, rng_key: PRNGKeyArray, denoiser: Denoiser) -> tuple[Array, DrawRecord]:
        prior = self.prior
        location = prior.location(self.conditioning)
        start_key, loop_key = jax.random.split(rng_key)
        start = self.sampler.initial(start_key, prior.noise, prior.noise_range, location.shape, location.dtype)
        z, memory = self.sampler(loop_key, denoiser, prior.noise, prior.noise_range, start)
        passes = memory.passes.plus(NetworkPasses.of(forward=prior.conditioning_passes))
        return self._to_state(z), DrawRecord(passes, memory.solver_residual)

    def draw(self, rng_key: PRNGKeyArray) -> tuple[Float[Array, ...], DrawRecord]:
        """Reverse diffusion with the prior's denoiser."""
        return self._run(rng_key, PriorDenoiser(self.prior, self.conditioning))

    def conditional_draw(
        self, rng_key: PRNGKeyArray, likelihood: GaussianLikelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """Reverse diffusion with the guided denoiser."""
        return self._run(rng_key, guidance(PriorDenoiser(self.prior, self.conditioning), likelihood))

    def working_bytes(self) -> int:
        """About what one `conditional_draw` needs: what the network's backward pass keeps, and some ten latents."""
        location = self.prior.location(self.conditioning)
        level = jnp.ones((), location.dtype)
        at = jax.ShapeDtypeStruct(location.shape, location.dtype)
        kept = backward_bytes(lambda z: self.prior.denoise(z, level, self.conditioning), at)
        return kept + 10 * location.size * location.dtype.itemsize


class GaussianStep(OneStep):
    """N(mean, F F^T): exact for a linear h, linearised at the mean for any other (as an extended Kalman filter).

    Args:
        mean: shape of the state.
        factor: standard deviations, shape of the state, or F, shape (size, size), over the flattened state.
    """

    mean: Float[Array, ...]
    factor: Float[Array, ...]

    def _apply(self, white: Array, transpose: bool = False) -> Array:
        if self.factor.shape == self.mean.shape:
            return self.factor * white
        factor = self.factor.T if transpose else self.factor
        return (factor @ white.reshape(-1)).reshape(self.mean.shape)

    def moments(self, noise_level: float | None = None) -> Moments:
        """The mean and products with F F^T; no network passes."""

        def covariance_product(v: Array) -> Array:
            return self._apply(self._apply(v, transpose=True))

        return Moments(self.mean, covariance_product, NetworkPasses.of(), NetworkPasses.of())

    def draw(self, rng_key: PRNGKeyArray) -> tuple[Float[Array, ...], DrawRecord]:
        """Mean + F xi."""
        white = jax.random.normal(rng_key, self.mean.shape, self.mean.dtype)
        record = DrawRecord(NetworkPasses.of(), jnp.zeros((), self.mean.dtype))
        return self.mean + self._apply(white), record

    def conditional_draw(
        self, rng_key: PRNGKeyArray, likelihood: GaussianLikelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """A draw of the prior moved by the gain of its own perturbed innovation (Matheron's rule)."""
        draw_key, error_key = jax.random.split(rng_key)
        x, record = self.draw(draw_key)
        residual, covariance, pull = observed_covariance(self.moments(), likelihood)
        error = jax.random.normal(error_key, residual.shape, residual.dtype)
        innovation = residual - (jax.jvp(likelihood.residual, (self.mean,), (self.mean - x,))[1] + error)
        return x + self.moments().covariance_product(pull(projected_solve(covariance, innovation))), record


def observed_covariance(
    moments: Moments, likelihood: GaussianLikelihood
) -> tuple[Float[Array, " m"], Float[Array, "m m"], Callable[[Float[Array, " m"]], Float[Array, ...]]]:
    """The whitened residual r at the mean, I + H V H^T there, and the map v -> H^T v. One product an observation."""
    residual, push = jax.linearize(likelihood.residual, moments.mean)
    transposed = jax.linear_transpose(push, moments.mean)

    def pull(v: Array) -> Array:
        return -transposed(v)[0]  # H = -dr/dx

    def row(v: Array) -> Array:
        return v - push(moments.covariance_product(pull(v)))

    return residual, jax.vmap(row)(jnp.eye(len(residual), dtype=residual.dtype)), pull
