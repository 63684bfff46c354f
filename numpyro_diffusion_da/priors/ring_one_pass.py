r"""Emulator of a system on a ring of sites that makes the next state from noise in one pass.

The next state is $x' = x + S F(x, e)$ with one number of noise $e \sim N(0, 1)$ for each site. The network F is the
network of the conditional mean of a `RingEmulator`, with the noise as a second input of its first convolution. Its
blocks multiply neighbors, so the noise may act on the state in any way. It is trained by the fair CRPS of members.
"""

from __future__ import annotations

import json
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import require, require_count
from numpyro_diffusion_da.checksums import named_arrays
from numpyro_diffusion_da.diffusion.prior import OnePassPrior
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.priors.residual_emulator import of_kind, require_finite
from numpyro_diffusion_da.priors.ring import WIDTH, RingMeanNetwork, neighborhoods, require_ring, ring_climatology
from numpyro_diffusion_da.priors.stored import part, read_stored, write_stored

if TYPE_CHECKING:
    import numpyro.distributions as dist


class RingNoiseNetwork(eqx.Module):
    """Network of a state and of noise, for the normalized increment of the next state.

    Attributes:
        body: network of the state; the noise is added to what its first convolution gives.
        taps: weights of the convolution of the noise.
    """

    body: RingMeanNetwork
    taps: Float[Array, "width channels"]

    @staticmethod
    def init(rng_key: PRNGKeyArray, body: RingMeanNetwork) -> RingNoiseNetwork:
        """Initialize a network with random weights of the noise.

        Args:
            rng_key: key of the random weights.
            body: network of the state to start from.
        """
        return RingNoiseNetwork(body, 0.1 * jax.random.normal(rng_key, body.encode.shape) / WIDTH**0.5)

    def __call__(self, noise: Float[Array, " sites"], x: Float[Array, " sites"]) -> Float[Array, " sites"]:
        """Normalized increment from the state to the next state.

        Args:
            noise: noise e.
            x: normalized state.
        """
        return self.body.decoded(self.body.encoded(x) + neighborhoods(noise[:, None]) @ self.taps)[0]


class RingOnePassEmulator(OnePassPrior):
    """Trained one-pass emulator of a system on a ring. `load_prior("lorenz96_one_pass")` loads the one that ships.

    All values are in the unit of the system. Lorenz-96 has no unit.

    Attributes:
        network: network of the state and the noise.
        state_mean: mean of a site in the training data.
        state_scale: standard deviation of a site in the training data.
        increment_scale: scale S of the increment.
        climatology_mean: mean of a site over a long run of the true system.
        climatology_covariance: covariance of two sites by their distance, shape (largest distance + 1,), in the squared
            unit of the system.
        layout: layout with one axis of 5 sites or more.
        checksum: SHA-256 of stored arrays and card in hexadecimal; empty for an emulator that was not read from files.
        card_text: data card, as JSON text.
        noise_shape: shape of the noise, that of the state.
        generator_passes: 1.
        conditioning_passes: 0.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the layout has more than one axis or fewer than 5 sites, an array is not finite, or a scale is not
            positive.
    """

    network: RingNoiseNetwork
    state_mean: Float[Array, ""]
    state_scale: Float[Array, ""]
    increment_scale: Float[Array, ""]
    climatology_mean: Float[Array, ""]
    climatology_covariance: Float[Array, " distances"]
    layout: Layout = eqx.field(static=True)
    noise_shape: tuple[int, ...] = eqx.field(static=True, init=False)
    checksum: str = eqx.field(static=True, default="")
    card_text: str = eqx.field(static=True, default="{}")
    generator_passes: int = eqx.field(static=True, default=1, init=False)
    conditioning_passes: int = eqx.field(static=True, default=0, init=False)

    def __post_init__(self) -> None:
        require(self.layout, Layout, self, "layout", 'ndda.Layout((40,), ("site",))')
        self.noise_shape = self.layout.shape

    def __check_init__(self) -> None:
        require(self.network, RingNoiseNetwork, self, "network", "RingNoiseNetwork.init(rng_key, body)")
        require_ring(self.layout, "RingOnePassEmulator")
        require_finite(self)

    @property
    def card(self) -> dict[str, Any]:
        """Data card as a dictionary: how the emulator was trained, and measurements of its skill."""
        return json.loads(self.card_text)

    def condition(self, state: PyTree, inputs: PyTree = None) -> Float[Array, " sites"]:
        """Return the previous state, in its unit; no network pass.

        Args:
            state: previous state in its unit, shape (sites,).
            inputs: None; the emulator takes no inputs.

        Raises:
            ValueError: `inputs` is not None, or the state has another shape.
        """
        return self.only_state(state, inputs)

    def generate(self, noise: Float[Array, " sites"], conditioning: Float[Array, " sites"]) -> Float[Array, " sites"]:
        """Next state in its unit, by one pass of the network.

        Args:
            noise: noise e, shape (sites,).
            conditioning: previous state in its unit, shape (sites,).
        """
        increment = self.network(noise, (conditioning - self.state_mean) / self.state_scale)
        return conditioning + self.increment_scale * increment

    def climatology(self) -> dist.Distribution:
        """Gaussian distribution with the mean and the covariance of a long run of the true system.

        Returns:
            NumPyro distribution of states in the unit of the system, event shape (sites,).
        """
        return ring_climatology(self.climatology_mean, self.climatology_covariance, self.layout.size)


def save_ring_one_pass(emulator: RingOnePassEmulator, card: dict[str, Any], folder: Path, name: str) -> None:
    """Write the arrays of a one-pass emulator to NAME.npz and its data card to NAME.json.

    Args:
        emulator: the emulator.
        card: data card, a dictionary that JSON can hold. The checksum is added to it.
        folder: folder of the two files; it is made if it does not exist.
        name: name of the emulator, NAME above.

    Raises:
        TypeError: an argument is of the wrong kind.
    """
    example = 'ndda.load_prior("lorenz96_one_pass")'
    require(emulator, RingOnePassEmulator, "save_ring_one_pass", "emulator", example)
    write_stored(named_arrays(emulator), card, folder, name)


def read_ring_one_pass(folder: Path | Traversable, name: str, num_sites: int) -> RingOnePassEmulator:
    """Read a one-pass emulator that `save_ring_one_pass` wrote.

    Args:
        folder: folder of the two files.
        name: name of the emulator.
        num_sites: number of sites of the ring, 5 or more. It may differ from the ring of the training.

    Raises:
        TypeError: an argument is of the wrong kind.
        FileNotFoundError: the folder has no such files.
        ValueError: a file is damaged or belongs to another prior, or `num_sites` is too small.
    """
    require_count(num_sites, "read_ring_one_pass", "num_sites", WIDTH)
    stored, card_text = read_stored(folder, name, "examples/train_lorenz96_one_pass.py")
    arrays = {key: jnp.asarray(value) for key, value in stored.items()}
    scalars = {key: value for key, value in arrays.items() if "." not in key}
    with of_kind("one-pass emulator of a ring", folder, name):
        network = part(arrays, "network.")
        return RingOnePassEmulator(
            network=RingNoiseNetwork(RingMeanNetwork(**part(network, "body.")), taps=network["taps"]),
            layout=Layout((num_sites,), ("site",), (("site", tuple(range(num_sites))),)),
            checksum=json.loads(card_text)["sha256"],
            card_text=card_text,
            **scalars,
        )
