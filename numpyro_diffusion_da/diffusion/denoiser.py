"""The denoiser that a sampler runs, and the count of what it costs.

A `Denoiser` maps (z_s, noise level, guidance_state) to (E[z | z_s], guidance_state). Guidance wraps one denoiser into another, so every
sampler works on a guided denoiser unchanged. The guidance_state is what a denoiser carries from one noise level to the next:
the count of network passes, the last solution of a linear system (a warm start for the next), the worst residual.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from numpyro_diffusion_da.diffusion.prior import Conditioning, DiffusionPrior


class NetworkPasses(NamedTuple):
    """Passes through the network: the cost that holds on any machine. One vjp or jvp costs about one forward."""

    forward: Int[Array, ""]
    jvp: Int[Array, ""]
    vjp: Int[Array, ""]

    @staticmethod
    def of(forward: int = 0, jvp: int = 0, vjp: int = 0) -> NetworkPasses:
        """A count from Python integers."""
        return NetworkPasses(jnp.asarray(forward), jnp.asarray(jvp), jnp.asarray(vjp))

    def plus(self, other: NetworkPasses) -> NetworkPasses:
        """The sum of two counts; `+` on a NamedTuple would concatenate."""
        return jax.tree.map(jnp.add, self, other)

    def total(self) -> Int[Array, ""]:
        """All passes together."""
        return self.forward + self.jvp + self.vjp


class GuidanceState(NamedTuple):
    """What a denoiser carries from one noise level to the next.

    Attributes:
        passes: network passes so far.
        warm_start: the guidance's own carry (for MMPS the last whitened solution), () where there is none.
        solver_residual: largest relative residual of the guidance's linear solves so far; 0 where none was made.
    """

    passes: NetworkPasses
    warm_start: PyTree
    solver_residual: Float[Array, ""]


class Denoiser(eqx.Module):
    """E[z | z_s] under some distribution of z, prior or posterior."""

    @abc.abstractmethod
    def init(self) -> GuidanceState:
        """The guidance_state before the first noise level."""

    @abc.abstractmethod
    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """Denoise `z_s` at `noise_level` (a positive scalar)."""


class PriorDenoiser(Denoiser):
    """The prior's own denoiser at a given conditioning: one forward pass a call.

    Args:
        prior: the diffusion prior.
        conditioning: what `prior.condition` gave.
    """

    prior: DiffusionPrior
    conditioning: Conditioning

    def init(self) -> GuidanceState:
        """No passes yet."""
        return GuidanceState(NetworkPasses.of(), (), jnp.zeros(()))

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """D(z_s, s; c)."""
        denoised = self.prior.denoise(z_s, noise_level, self.conditioning)
        return denoised, guidance_state._replace(passes=guidance_state.passes.plus(NetworkPasses.of(forward=1)))
