"""A learned prior that ships: a small conditional denoiser on a ring, made for filtering on a CPU.

The next state is x' = m(x) + S z. A network run once a step, in `condition`, gives the conditional mean m(x) and
features of each site; the latent z is what is left, scaled to unit mean square. The network that every noise level runs
is a small correction to the denoiser of N(0, I):

    D(z_s, s; x) = c_skip z_s + c_out sqrt(c_skip) F(c_in z_s, s; x),
    c_skip = 1 / (1 + s^2),  c_out = s / sqrt(1 + s^2),  c_in = 1 / sqrt(1 + s^2)        (EDM, arXiv 2206.00364)
    F = W^T [a(s; x) tanh(W c_in z_s + b(s; x))],    W a convolution on the ring.

Three choices serve guidance and weights, which use the Jacobian J = dD/dz_s and not only D:

- F is the gradient of a scalar function of z_s (its two convolutions share W), so J is symmetric by construction, as it
  must be for s^2 J to be a covariance;
- the factor sqrt(c_skip), not in EDM, lets F fade as 1/s: s^2 J stays bounded at the highest level, where it is read as
  the covariance of z and a network's error would be multiplied by s^2;
- convolutions are shifts and matrix products, because XLA on CPU is slow at the derivative of its own convolution
  inside a loop.

Both networks are translation equivariant: they run on a ring of any number of sites.
"""

from __future__ import annotations

import json
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.checksums import named_arrays
from numpyro_diffusion_da.diffusion.noise import Noise, WhiteNoise
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.priors.stored import part, read_stored, write_stored

if TYPE_CHECKING:
    import numpyro.distributions as dist

WIDTH = 5
"""Sites under every convolution: two on either side."""


def neighborhoods(values: Float[Array, "sites channels"]) -> Float[Array, "sites width_channels"]:
    """Every site's values and its neighbors', from two sites before to two after."""
    sites, reach = len(values), WIDTH // 2
    around = jnp.concatenate([values[sites - reach :], values, values[:reach]])
    return jnp.concatenate([around[i : i + sites] for i in range(WIDTH)], axis=1)


class RingMeanNetwork(eqx.Module):
    """Normalized state -> normalized increment of the conditional mean, and features of each site.

    Residual blocks h <- h + M (u * v), with u and v linear in the neighborhood of h: advection is a product of
    neighbors, and a network of products learns it with fewer parameters than one of pointwise non-linearities.

    Attributes:
        encode: first convolution; `encode_bias` its bias.
        factors: the convolutions of u and v, one pair a block; `factors_bias` their biases.
        mix: M of each block.
        readout: features -> increment.
    """

    encode: Float[Array, "width channels"]
    encode_bias: Float[Array, " channels"]
    factors: Float[Array, "blocks width_channels two_channels"]
    factors_bias: Float[Array, "blocks two_channels"]
    mix: Float[Array, "blocks channels channels"]
    readout: Float[Array, " channels"]

    @staticmethod
    def init(rng_key: PRNGKeyArray, channels: int, blocks: int) -> RingMeanNetwork:
        """Random weights; zero in `mix` and `readout`, so that training starts from persistence."""
        encode_key, factors_key, readout_key = jax.random.split(rng_key, 3)
        shape = (blocks, WIDTH * channels, 2 * channels)
        return RingMeanNetwork(
            encode=jax.random.normal(encode_key, (WIDTH, channels)) / WIDTH**0.5,
            encode_bias=jnp.zeros((channels,)),
            factors=jax.random.normal(factors_key, shape) / shape[1] ** 0.5,
            factors_bias=jnp.zeros((blocks, 2 * channels)),
            mix=jnp.zeros((blocks, channels, channels)),
            readout=0.1 * jax.random.normal(readout_key, (channels,)),
        )

    def __call__(self, x: Float[Array, " sites"]) -> tuple[Float[Array, " sites"], Float[Array, "sites channels"]]:
        """(increment, features)."""
        h = neighborhoods(x[:, None]) @ self.encode + self.encode_bias[None]

        def block(h: Array, weights: tuple[Array, Array, Array]) -> tuple[Array, None]:
            factors, bias, mix = weights
            u, v = jnp.split(neighborhoods(h) @ factors + bias[None], 2, axis=1)
            return h + (u * v) @ mix, None

        h, _ = jax.lax.scan(block, h, (self.factors, self.factors_bias, self.mix))
        return h @ self.readout, h


class RingNoiseLevelTerms(NamedTuple):
    """What F takes from the features, once a step: shapes (sites, hidden)."""

    shift: Float[Array, "sites hidden"]
    amplitude: Float[Array, "sites hidden"]


class RingResidualNetwork(eqx.Module):
    """F, run at every noise level.

    Attributes:
        taps: W, the convolution from the latent to the hidden units and, transposed, back.
        shift: features -> b; `amplitude`: features -> a.
        level_scale: hidden units of the noise level are tanh(level_scale log s + level_bias).
        level_terms: what they add to b and a.
    """

    taps: Float[Array, "width hidden"]
    shift: Float[Array, "channels hidden"]
    amplitude: Float[Array, "channels hidden"]
    level_scale: Float[Array, " level_hidden"]
    level_bias: Float[Array, " level_hidden"]
    level_terms: Float[Array, "level_hidden two_hidden"]

    @staticmethod
    def init(rng_key: PRNGKeyArray, channels: int, hidden: int, level_hidden: int = 8) -> RingResidualNetwork:
        """Random W and b; a = 0, so that training starts from the denoiser of N(0, I)."""
        taps_key, shift_key, level_key = jax.random.split(rng_key, 3)
        return RingResidualNetwork(
            taps=jax.random.normal(taps_key, (WIDTH, hidden)) / WIDTH**0.5,
            shift=jax.random.normal(shift_key, (channels, hidden)) / channels**0.5,
            amplitude=jnp.zeros((channels, hidden)),
            level_scale=0.5 * jax.random.normal(level_key, (level_hidden,)),
            level_bias=jnp.linspace(-2.0, 2.0, level_hidden),
            level_terms=jnp.zeros((level_hidden, 2 * hidden)),
        )

    def terms(self, features: Float[Array, "sites channels"]) -> RingNoiseLevelTerms:
        """The features' part of b and a."""
        return RingNoiseLevelTerms(features @ self.shift, features @ self.amplitude)

    def __call__(
        self, z: Float[Array, " sites"], noise_level: Float[Array, ""], terms: RingNoiseLevelTerms
    ) -> Float[Array, " sites"]:
        """F(z, s), z already scaled by c_in."""
        level = jnp.tanh(self.level_scale * jnp.log(noise_level) + self.level_bias) @ self.level_terms
        shift, amplitude = jnp.split(level, 2)
        hidden = jnp.tanh(neighborhoods(z[:, None]) @ self.taps + terms.shift + shift[None])
        back = ((terms.amplitude + amplitude[None]) * hidden) @ self.taps.T
        # The transpose of `neighborhoods`: every tap's column is rolled back to the site that it came from.
        return jnp.sum(jnp.stack([jnp.roll(back[:, i], i - WIDTH // 2) for i in range(WIDTH)]), axis=0)


class RingConditioning(NamedTuple):
    """What one step of the emulator needs of the previous state.

    Attributes:
        mean: m(x), shape (sites,).
        terms: the features' part of F.
    """

    mean: Float[Array, " sites"]
    terms: RingNoiseLevelTerms


class RingEmulator(DiffusionPrior):
    """A trained emulator of a system on a ring of sites; see the module for its form, `load_prior` to get one.

    Attributes:
        mean_network: previous state -> conditional mean and features, once a step.
        residual_network: F, at every noise level.
        state_mean: mean of a site in training, the system's unit; `state_scale` its standard deviation.
        increment_scale: rms of the conditional mean minus the previous state in training, the system's unit.
        latent_scale: S, rms of the next state minus the conditional mean in training, the system's unit.
        climatology_mean: mean of a site over a long run of the true system.
        climatology_covariance: covariance of two sites by their distance, shape (largest distance + 1,), the system's
            unit squared.
        checksum: sha256 of all arrays, see `priors.stored`.
        card_text: the data card, as JSON; `card` is the same as a dictionary.
    """

    mean_network: RingMeanNetwork
    residual_network: RingResidualNetwork
    state_mean: Float[Array, ""]
    state_scale: Float[Array, ""]
    increment_scale: Float[Array, ""]
    latent_scale: Float[Array, ""]
    climatology_mean: Float[Array, ""]
    climatology_covariance: Float[Array, " distances"]
    layout: Layout = eqx.field(static=True)
    noise_range: tuple[float, float] = eqx.field(static=True)
    checksum: str = eqx.field(static=True, default="")
    card_text: str = eqx.field(static=True, default="{}")
    noise: Noise = eqx.field(default_factory=WhiteNoise, init=False)
    conditioning_passes: int = eqx.field(static=True, default=1, init=False)

    def __check_init__(self) -> None:
        if len(self.layout.shape) != 1 or self.layout.shape[0] < WIDTH:
            raise ValueError(
                f"a ring of shape {self.layout.shape}: the networks need one axis of {WIDTH} sites or more."
            )

    @property
    def card(self) -> dict[str, Any]:
        """How this emulator was trained and what it was measured to do; see docs and the training script."""
        return json.loads(self.card_text)

    def condition(self, state: PyTree, inputs: PyTree = None) -> RingConditioning:
        """The conditional mean and the features: one pass of the mean network.

        Args:
            state: the previous state, shape (sites,), in the system's unit.
            inputs: None.

        Raises:
            ValueError: inputs were given, which this prior has none of, or a state of another shape.
        """
        x = self.only_state(state, inputs)
        increment, features = self.mean_network((x - self.state_mean) / self.state_scale)
        return RingConditioning(x + self.increment_scale * increment, self.residual_network.terms(features))

    def denoise(
        self, z_s: Float[Array, " sites"], noise_level: Float[Array, ""], conditioning: RingConditioning
    ) -> Float[Array, " sites"]:
        """D(z_s, s; x): one pass of the small network F."""
        c_skip = 1.0 / (1.0 + noise_level**2)
        c_in = jnp.sqrt(c_skip)
        c_out = noise_level * c_in
        return c_skip * z_s + c_out * c_in * self.residual_network(c_in * z_s, noise_level, conditioning.terms)

    def location(self, conditioning: RingConditioning) -> Float[Array, " sites"]:
        """m(x), the conditional mean."""
        return conditioning.mean

    def scale(self, conditioning: RingConditioning) -> Float[Array, ""]:
        """The rms of what the mean leaves, the same for every site."""
        return self.latent_scale

    def climatology(self) -> dist.Distribution:
        """The Gaussian with the mean and the covariance of a long run of the true system.

        On a ring of another size than that of the run, sites further apart than half the run's ring are uncorrelated.
        """
        import numpyro.distributions as dist

        sites = self.layout.size
        by_distance = np.zeros(max(sites, len(self.climatology_covariance)))
        by_distance[: len(self.climatology_covariance)] = np.asarray(self.climatology_covariance)
        separation = np.arange(sites)
        separation = np.minimum(separation, sites - separation)
        # A circulant covariance has the Fourier transform of its row as eigenvalues; cutting the row off at a distance,
        # or estimating it, can make some negative.
        spectrum = np.fft.rfft(by_distance[separation]).real
        row = np.fft.irfft(np.maximum(spectrum, 1e-4 * spectrum.max()), sites)
        factor = np.linalg.cholesky(row[(np.arange(sites)[:, None] - np.arange(sites)[None]) % sites])
        return dist.MultivariateNormal(jnp.full((sites,), self.climatology_mean), scale_tril=jnp.asarray(factor))


def save_ring_emulator(emulator: RingEmulator, card: dict[str, Any], folder: Path, name: str) -> None:
    """Write NAME.npz (plain arrays) and NAME.json (the card, with noise range and checksum added) into `folder`."""
    write_stored(named_arrays(emulator), {**card, "noise_range": list(emulator.noise_range)}, folder, name)


def read_ring_emulator(folder: Path | Traversable, name: str, num_sites: int) -> RingEmulator:
    """Read what `save_ring_emulator` wrote, for a ring of `num_sites`.

    Raises:
        FileNotFoundError: the folder has no such files.
        ValueError: the arrays are not those that the card describes, or `num_sites` is too small.
    """
    stored, card_text = read_stored(folder, name, "examples/train_lorenz96.py")
    card = json.loads(card_text)
    arrays = {key: jnp.asarray(value) for key, value in stored.items()}
    scalars = {key: value for key, value in arrays.items() if "." not in key}
    return RingEmulator(
        mean_network=RingMeanNetwork(**part(arrays, "mean_network.")),
        residual_network=RingResidualNetwork(**part(arrays, "residual_network.")),
        layout=Layout((num_sites,), ("site",), (("site", tuple(range(num_sites))),)),
        noise_range=(float(card["noise_range"][0]), float(card["noise_range"][1])),
        checksum=card["sha256"],
        card_text=card_text,
        **scalars,
    )
