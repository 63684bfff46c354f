"""Denoisers that a sampler runs, and the count of network passes they make.

A `Denoiser` maps (z_s, noise level, guidance state) to (E[z | z_s], guidance state). Guidance wraps one denoiser into
another, so every sampler runs a guided denoiser unchanged. A denoiser passes the guidance state on from one noise level
to the next. It holds the count of network passes, the last solution of a linear system (a warm start for the next
solve) and the largest residual so far.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from numpyro_diffusion_da.diffusion.prior import Conditioning, DiffusionPrior


class NetworkPasses(NamedTuple):
    """Count of passes through the networks of an emulator, a measure of cost that does not depend on the machine.

    One vjp or jvp of the network that runs at every noise level (or makes the state in one pass) costs about as much as
    one forward pass of it. The conditioning network is another one, and its pass may cost many of these.

    Attributes:
        forward: evaluations of the network.
        jvp: Jacobian-vector products of the network, in forward mode.
        vjp: vector-Jacobian products of the network, in reverse mode.
        conditioning: passes of the network that `EmulatorPrior.condition` runs.
    """

    forward: Int[Array, ""]
    jvp: Int[Array, ""]
    vjp: Int[Array, ""]
    conditioning: Int[Array, ""]

    @staticmethod
    def of(forward: int = 0, jvp: int = 0, vjp: int = 0, conditioning: int = 0) -> NetworkPasses:
        """Return the count with these numbers of passes, given as Python integers."""
        return NetworkPasses(*map(jnp.asarray, (forward, jvp, vjp, conditioning)))

    def plus(self, other: NetworkPasses) -> NetworkPasses:
        """Return the sum of this count and another; `+` on a NamedTuple would concatenate them."""
        return jax.tree.map(jnp.add, self, other)

    def total(self) -> Int[Array, ""]:
        """Return the number of passes of all kinds together, without those of the conditioning network."""
        return self.forward + self.jvp + self.vjp


class GuidanceState(NamedTuple):
    """State that a denoiser passes on from one noise level to the next.

    Attributes:
        passes: network passes made so far.
        warm_start: what the guidance itself carries, for MMPS the last whitened solution; () if it carries nothing.
        solver_residual: largest relative residual of the guidance's linear solves so far; 0 if there were none.
    """

    passes: NetworkPasses
    warm_start: PyTree
    solver_residual: Float[Array, ""]

    def plus(self, passes: NetworkPasses) -> GuidanceState:
        """Return this guidance state with more network passes counted."""
        return self._replace(passes=self.passes.plus(passes))


class Denoiser(eqx.Module):
    """Abstract denoiser, which computes E[z | z_s] for a prior or a posterior of the latent z."""

    @abc.abstractmethod
    def init(self) -> GuidanceState:
        """Return the guidance state before the first noise level."""

    @abc.abstractmethod
    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """Denoise a latent at one noise level.

        Args:
            z_s: noised latent.
            noise_level: s, a positive scalar.
            guidance_state: guidance state after the noise level before.

        Returns:
            (E[z | z_s], of the shape of `z_s`; guidance state for the next noise level).
        """


class PriorDenoiser(Denoiser):
    """Denoiser of a prior with a given conditioning; one call costs one forward pass.

    Args:
        prior: diffusion prior.
        conditioning: return value of `prior.condition`.
    """

    prior: DiffusionPrior
    conditioning: Conditioning

    def init(self) -> GuidanceState:
        """Return a guidance state with no passes and no warm start."""
        return GuidanceState(NetworkPasses.of(), (), jnp.zeros(()))

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """Return D(z_s, s; c), of the shape of `z_s`, and the guidance state with one more forward pass."""
        denoised = self.prior.denoise(z_s, noise_level, self.conditioning)
        return denoised, guidance_state.plus(NetworkPasses.of(forward=1))

    def with_pullback(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""]
    ) -> tuple[Float[Array, ...], Callable[[Float[Array, ...]], Float[Array, ...]]]:
        """Denoise, and also return the product with the transposed Jacobian J = dD/dz_s.

        D costs one forward pass, and each product one vjp. The caller counts them.

        Args:
            z_s: noised latent.
            noise_level: s, a positive scalar.

        Returns:
            (D(z_s, s; c); the function w -> J^T w). D, w and J^T w have the shape of `z_s`.
        """
        denoised, pull = jax.vjp(lambda z: self.prior.denoise(z, noise_level, self.conditioning), z_s)
        return denoised, lambda w: pull(w)[0]
