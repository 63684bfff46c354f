"""What a diffusion prior is.

A pretrained autoregressive diffusion emulator gives p(x' | c): the next state given what it is conditioned on (one or
several past states, forcings). It diffuses a latent z, and the state is an affine map of it,

    x' = a(c) + S z,    S diagonal,    z_s = z + s e,    e ~ N(0, C),

and it is known through its denoiser D(z_s, s; c) = E[z | z_s, c]. A prior says these five things and nothing else:
how to condition, how to denoise, a and S, the noise with its covariance C, and the noise levels it can be trusted in.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from numpyro_diffusion_da.checksums import checksum
from numpyro_diffusion_da.diffusion.noise import Noise
from numpyro_diffusion_da.fields.layout import Layout

if TYPE_CHECKING:
    import numpyro.distributions as dist

Conditioning = Any
"""Whatever `DiffusionPrior.condition` makes of the previous states and the inputs: a pytree of arrays."""


class DiffusionPrior(eqx.Module):
    """A pretrained diffusion model of the next state given the previous ones.

    All methods act on one state, without a batch dimension; callers use `jax.vmap`.

    Attributes:
        noise: the noise e ~ N(0, C) of the forward process.
        noise_range: (lowest, highest) noise level at which the denoiser can be trusted.
        layout: shape, dimension names, coordinates and units of the state.
        conditioning_passes: network passes that `condition` makes by itself (0 for most priors).
    """

    noise: eqx.AbstractVar[Noise]
    noise_range: eqx.AbstractVar[tuple[float, float]]
    layout: eqx.AbstractVar[Layout]
    conditioning_passes: eqx.AbstractVar[int]

    @abc.abstractmethod
    def condition(self, state: PyTree, inputs: PyTree = None) -> Conditioning:
        """Prepare what does not change with the noise level.

        Args:
            state: the previous state, or a pytree of several past states, each of the shape of the state.
            inputs: forcings and other time-varying inputs, or None.
        """

    @abc.abstractmethod
    def denoise(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], conditioning: Conditioning
    ) -> Float[Array, ...]:
        """D(z_s, s; c) = E[z | z_s, c]: one forward pass of the network. Shape of the state in and out."""

    @abc.abstractmethod
    def location(self, conditioning: Conditioning) -> Float[Array, ...]:
        """a(c), the state that z = 0 stands for; shape of the state."""

    @abc.abstractmethod
    def scale(self, conditioning: Conditioning) -> Float[Array, ...]:
        """The diagonal of S; any shape that broadcasts to the state's."""

    def climatology(self) -> dist.Distribution:
        """A NumPyro distribution of initial states.

        Raises:
            NotImplementedError: this prior ships none; sample the initial state from your own distribution.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no climatology; give x0 a distribution of your own, "
            "for example dist.MultivariateNormal around a known state."
        )

    def provenance(self) -> dict[str, str]:
        """What a result says of the prior it came from: its class, and a SHA-256 over all its arrays."""
        return {"prior": type(self).__name__, "prior_checksum": checksum(self)}

    def check_state(self, state: PyTree) -> tuple[int, ...]:
        """The batch shape of `state`, all of whose leaves must end in the shape of the state.

        Raises:
            ValueError: a leaf with another trailing shape, or leaves with different batch shapes.
        """
        shape = self.layout.shape
        batch_shapes = set()
        for leaf in jax.tree.leaves(state):
            got = jnp.shape(leaf)
            split = len(got) - len(shape)
            if split < 0 or got[split:] != shape:
                raise ValueError(
                    f"state has shape {got}, but {type(self).__name__} describes states of shape {shape}; "
                    f"give an array of shape (..., {', '.join(map(str, shape))})."
                )
            batch_shapes.add(got[:split])
        if len(batch_shapes) != 1:
            raise ValueError(f"the states given have different batch shapes {sorted(batch_shapes)}; give them one.")
        return batch_shapes.pop()

    def only_state(self, state: PyTree, inputs: PyTree) -> Float[Array, ...]:
        """The state, for a trained prior that is conditioned on one state and nothing else.

        Raises:
            ValueError: inputs were given, or a state of another shape.
        """
        if inputs is not None:
            raise ValueError(f"{type(self).__name__} takes no inputs: the forcing it was trained with is part of it.")
        x = jnp.asarray(state)
        if x.shape != self.layout.shape:
            raise ValueError(f"state has shape {x.shape}, expected {self.layout.shape}; use jax.vmap for a batch.")
        return x
