r"""Interfaces of pretrained emulators: what all have in common, and a diffusion prior.

A pretrained autoregressive diffusion emulator gives p(x' | c), the distribution of the next state given a conditioning
c (one or several past states, and forcings). It diffuses a latent z, and the state is an affine map of z:

$$
x' = a(c) + S z, \quad S \text{ diagonal}, \qquad z_s = z + s e, \quad e \sim N(0, C) .
$$

The emulator is known through its denoiser D(z_s, s; c) = E[z | z_s, c]. A prior defines five things and nothing else:
the conditioning, the denoiser, the map (a and S), the noise with its covariance C, and the noise levels at which the
denoiser can be trusted.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from numpyro_diffusion_da.checksums import arrays_checksum, named_arrays
from numpyro_diffusion_da.diffusion.noise import Noise
from numpyro_diffusion_da.fields.layout import Layout

if TYPE_CHECKING:
    import numpyro.distributions as dist

Conditioning = Any
"""Return value of `EmulatorPrior.condition`: a pytree of arrays that depends on the previous states and inputs."""


class EmulatorPrior(eqx.Module):
    """Abstract pretrained emulator: a distribution p(x' | c) of the next state, given previous states and inputs.

    `DiffusionPrior` and `OnePassPrior` are the two kinds. All methods act on one state, without a batch dimension;
    callers use `jax.vmap`.

    Attributes:
        layout: shape, dimension names, coordinates and units of the state.
        conditioning_passes: passes of a network that `condition` makes; 0 if it runs none. Where it makes some, filters
            keep its value for each particle instead of computing it again.
    """

    layout: eqx.AbstractVar[Layout]
    conditioning_passes: eqx.AbstractVar[int]

    @abc.abstractmethod
    def condition(self, state: PyTree, inputs: PyTree = None) -> Conditioning:
        """Compute everything that does not change with the noise of a draw.

        Args:
            state: previous state, or a pytree of several past states, each of the shape of the state.
            inputs: forcings and other time-varying inputs, or None.

        Returns:
            A pytree of arrays, which the other methods take as `conditioning`.
        """

    def climatology(self) -> dist.Distribution:
        """Return a NumPyro distribution of initial states.

        Raises:
            NotImplementedError: this prior has none; sample the initial state from your own distribution.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no climatology; give x0 a distribution of your own, "
            "for example dist.MultivariateNormal around a known state."
        )

    def static_values(self) -> dict[str, np.ndarray]:
        """Return the values besides arrays that the checksum of `provenance` covers, by name; here the layout."""
        return {"layout": np.asarray(str(self.layout))}

    def provenance(self) -> dict[str, str]:
        """Return what a result records of its prior: the class name, and a SHA-256 checksum.

        The checksum covers all arrays and `static_values`.
        """
        named = {f"static {name}": value for name, value in self.static_values().items()}
        return {"prior": type(self).__name__, "prior_checksum": arrays_checksum({**named_arrays(self), **named})}

    def check_state(self, state: PyTree) -> tuple[int, ...]:
        """Return the batch shape of a state, after checking that every leaf ends in the shape of the state.

        Args:
            state: array, or pytree of arrays, of shape (batch..., state...).

        Raises:
            ValueError: a leaf has another trailing shape, or the leaves have different batch shapes.
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
            raise ValueError(
                f"the states given have different batch shapes {sorted(batch_shapes)}; give all states the same one."
            )
        return batch_shapes.pop()

    def only_state(self, state: PyTree, inputs: PyTree) -> Float[Array, ...]:
        """Return the state as an array, for a prior that is conditioned on one state and on no inputs.

        Args:
            state: previous state, of exactly the shape of the state.
            inputs: must be None.

        Raises:
            ValueError: inputs were given, or the state has another shape.
        """
        if inputs is not None:
            raise ValueError(
                f"{type(self).__name__} takes no inputs, because it contains the forcing it was trained with; "
                "leave inputs out."
            )
        x = jnp.asarray(state)
        if x.shape != self.layout.shape:
            raise ValueError(f"state has shape {x.shape}, expected {self.layout.shape}; use jax.vmap for a batch.")
        return x


class DiffusionPrior(EmulatorPrior):
    r"""Abstract pretrained diffusion model of the next state given the previous ones.

    The state is $x' = a(c) + S z$ with a diagonal S, and the denoiser returns $D(z_s, s; c) = E[z \mid z_s, c]$ for the
    noised latent $z_s = z + s e$, $e \sim N(0, C)$.

    All methods act on one state, without a batch dimension; callers use `jax.vmap`.

    Attributes:
        noise: noise e ~ N(0, C) of the forward process.
        noise_range: (lowest, highest) noise level at which the denoiser can be trusted.
        layout: shape, dimension names, coordinates and units of the state.
        conditioning_passes: passes of a network that `condition` makes; 0 if it runs none. Where it makes some, filters
            keep its value for each particle instead of computing it again.
    """

    noise: eqx.AbstractVar[Noise]
    noise_range: eqx.AbstractVar[tuple[float, float]]

    @abc.abstractmethod
    def denoise(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], conditioning: Conditioning
    ) -> Float[Array, ...]:
        """Return D(z_s, s; c) = E[z | z_s, c], by one forward pass of the network.

        Args:
            z_s: noised latent, shape of the state.
            noise_level: s, a positive scalar.
            conditioning: return value of `condition`.

        Returns:
            The denoised latent, shape of the state.
        """

    @abc.abstractmethod
    def location(self, conditioning: Conditioning) -> Float[Array, ...]:
        """Return a(c), the state at z = 0, shape of the state, in the units of the state."""

    @abc.abstractmethod
    def scale(self, conditioning: Conditioning) -> Float[Array, ...]:
        """Return the diagonal of S, of any shape that broadcasts to the state's, in the units of the state."""

    def spreads(self) -> tuple[float, float] | None:
        """Return (smallest, largest) standard deviation of the modes of z given c, in units of the noise N(0, C).

        A sampler resolves modes that are neither narrower than twice its lowest noise level nor wider than a fifteenth
        of its highest. By default None: the covariance of a network's z is not known.
        """
        return None

    def static_values(self) -> dict[str, np.ndarray]:
        """Return the values besides arrays that the checksum covers, by name: the noise range and the layout."""
        return {"noise_range": np.asarray(self.noise_range), **super().static_values()}


class OnePassPrior(EmulatorPrior):
    r"""Abstract pretrained emulator that makes the next state from noise in one pass, $x' = f(c, e)$, $e \sim N(0, I)$.

    Networks trained by a proper score instead of a diffusion have this form: functional generative networks
    (WeatherNext 2), AIFS-CRPS, FourCastNet 3, stochastic NeuralGCM. So has a deterministic forecast with a Gaussian
    error, $f(c, e) = m(c) + L e$. Noise that is not white, such as noise on the sphere, is made from e inside f.

    All methods act on one state, without a batch dimension; callers use `jax.vmap`.

    Attributes:
        noise_shape: shape of the noise e.
        generator_passes: network passes of one call of `generate` (1 for most priors).
        layout: shape, dimension names, coordinates and units of the state.
        conditioning_passes: passes of a network that `condition` makes; 0 if it runs none. Where it makes some, filters
            keep its value for each particle instead of computing it again.
    """

    noise_shape: eqx.AbstractVar[tuple[int, ...]]
    generator_passes: eqx.AbstractVar[int]

    @abc.abstractmethod
    def generate(self, noise: Float[Array, ...], conditioning: Conditioning) -> Float[Array, ...]:
        """Return f(c, e), the next state in its units, shape of the state; differentiable in e.

        Args:
            noise: e, shape `noise_shape`; white, so independent standard normal numbers in a draw.
            conditioning: return value of `condition`.
        """

    def _check_noise(self, noise: Float[Array, ...]) -> None:
        """Raise a ValueError if a noise has another shape than `noise_shape`."""
        if jnp.shape(noise) != self.noise_shape:
            raise ValueError(
                f"the noise has shape {jnp.shape(noise)}, expected {self.noise_shape}; use jax.vmap for a batch."
            )

    def static_values(self) -> dict[str, np.ndarray]:
        """Return the values besides arrays that the checksum covers, by name: the shape of the noise and the layout."""
        return {"noise_shape": np.asarray(self.noise_shape, int), **super().static_values()}
