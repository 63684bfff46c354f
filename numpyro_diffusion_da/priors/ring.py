r"""Emulator of a system on a ring of sites: a conditional diffusion model small enough for filtering on a CPU.

The next state is $x' = m(x) + S z$. A mean network runs once per step, in `condition`, and gives the conditional mean
$m(x)$ and features of each site. The latent $z$ is the residual, scaled to unit mean square. A small residual network
$F$ runs at every noise level $s$ and corrects the denoiser of $N(0, I)$:

$$
\begin{aligned}
D(z_s, s; x) &= c_{skip} z_s + c_{out} \sqrt{c_{skip}} \, F(c_{in} z_s, s; x), \\
c_{skip} &= \frac{1}{1 + s^2}, \quad c_{out} = \frac{s}{\sqrt{1 + s^2}}, \quad c_{in} = \frac{1}{\sqrt{1 + s^2}}, \\
F(z, s; x) &= W^T [a(s; x) \tanh(W z + b(s; x))],
\end{aligned}
$$

where $W$ is a convolution on the ring. The coefficients are those of EDM (Karras et al. 2022, arXiv 2206.00364,
table 1) with $\sigma_{data} = 1$. Guidance and weights use the Jacobian $J = dD/dz_s$ as well as $D$. Three choices
serve them:

- $F$ is the gradient of a scalar function of $z$, because both of its convolutions share $W$. $J$ is therefore
  symmetric, as it must be for $s^2 J$ to be a covariance.
- The factor $\sqrt{c_{skip}}$, which EDM does not have, makes the correction of $D$ fall off as $1 / s$, so that
  $s^2 J$ stays bounded. At the highest level $s^2 J$ is used as the covariance of $z$, and an error of the network
  would otherwise be multiplied by $s^2$.
- Convolutions are written as shifts and matrix products, because XLA on CPU is slow at the derivative of its own
  convolution inside a loop.

Both networks are equivariant under translation and local. They run on a ring of any number of sites.
"""

from __future__ import annotations

from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.arguments import require, require_count, require_noise_range
from numpyro_diffusion_da.checksums import named_arrays
from numpyro_diffusion_da.diffusion.noise import Noise, WhiteNoise
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.priors.residual_emulator import (
    EmulatorConditioning,
    NoiseLevelTerms,
    ResidualEmulator,
    gradient_layer,
    init_level_layer,
    level_layer,
    of_kind,
    read_emulator,
    require_finite,
    save_emulator,
)
from numpyro_diffusion_da.priors.stored import part

if TYPE_CHECKING:
    import numpyro.distributions as dist

WIDTH = 5
"""Number of sites under every convolution: the site itself and two on either side."""


def neighborhoods(values: Float[Array, "sites channels"]) -> Float[Array, "sites width_channels"]:
    """Values of each site and of its neighbors, from two sites before to two sites after, side by side.

    Args:
        values: values of each site, shape (sites, channels).

    Returns:
        Shape (sites, `WIDTH` * channels).
    """
    sites, reach = len(values), WIDTH // 2
    around = jnp.concatenate([values[sites - reach :], values, values[:reach]])
    return jnp.concatenate([around[i : i + sites] for i in range(WIDTH)], axis=1)


class RingMeanNetwork(eqx.Module):
    """Network for the normalized increment of the conditional mean and for features of each site.

    Its residual blocks are h <- h + M (u * v), where u and v are linear in the neighborhood of h. Advection is a
    product of neighbors. A network of products learns it with fewer parameters than a network of pointwise
    nonlinearities.

    Attributes:
        encode: weights of the first convolution.
        encode_bias: bias of the first convolution.
        factors: weights of the convolutions to u and v in each block.
        factors_bias: biases of these convolutions.
        mix: matrix M of each block.
        readout: weights from the features to the increment.
    """

    encode: Float[Array, "width channels"]
    encode_bias: Float[Array, " channels"]
    factors: Float[Array, "blocks width_channels two_channels"]
    factors_bias: Float[Array, "blocks two_channels"]
    mix: Float[Array, "blocks channels channels"]
    readout: Float[Array, " channels"]

    @staticmethod
    def init(rng_key: PRNGKeyArray, channels: int, blocks: int) -> RingMeanNetwork:
        """Initialize a network with random weights, whose blocks do nothing at first because `mix` is zero.

        Args:
            rng_key: key of the random weights.
            channels: features of each site.
            blocks: number of residual blocks.
        """
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
        """Compute the normalized increment and the features of each site.

        Args:
            x: normalized state.

        Returns:
            (normalized increment from the state to the conditional mean, features of each site).
        """
        return self.decoded(self.encoded(x))

    def encoded(self, x: Float[Array, " sites"]) -> Float[Array, "sites channels"]:
        """Features of each site after the first convolution.

        Args:
            x: normalized state.
        """
        return neighborhoods(x[:, None]) @ self.encode + self.encode_bias[None]

    def decoded(
        self, h: Float[Array, "sites channels"]
    ) -> tuple[Float[Array, " sites"], Float[Array, "sites channels"]]:
        """Normalized increment and features of each site, from the features after the first convolution."""

        def block(h: Array, weights: tuple[Array, Array, Array]) -> tuple[Array, None]:
            factors, bias, mix = weights
            u, v = jnp.split(neighborhoods(h) @ factors + bias[None], 2, axis=1)
            return h + (u * v) @ mix, None

        h, _ = jax.lax.scan(block, h, (self.factors, self.factors_bias, self.mix))
        return h @ self.readout, h


class RingResidualNetwork(eqx.Module):
    """Residual network F, which runs at every noise level.

    Attributes:
        taps: weights W of the convolution from the latent to the hidden units. Its transpose maps back to the latent.
        shift: weights from the features to the shift b.
        amplitude: weights from the features to the amplitude a.
        level_scale: weights of the hidden units of the noise level, tanh(level_scale log s + level_bias).
        level_bias: biases of these hidden units.
        level_terms: weights from these hidden units to their terms of b and a.
    """

    taps: Float[Array, "width hidden"]
    shift: Float[Array, "channels hidden"]
    amplitude: Float[Array, "channels hidden"]
    level_scale: Float[Array, " level_hidden"]
    level_bias: Float[Array, " level_hidden"]
    level_terms: Float[Array, "level_hidden two_hidden"]

    @staticmethod
    def init(rng_key: PRNGKeyArray, channels: int, hidden: int, level_hidden: int = 8) -> RingResidualNetwork:
        """Initialize a network with random W and b, and a = 0: training starts from the denoiser of N(0, I).

        Args:
            rng_key: key of the random weights.
            channels: features of each site.
            hidden: number of hidden units of each site.
            level_hidden: number of hidden units of the noise level.
        """
        taps_key, shift_key, level_key = jax.random.split(rng_key, 3)
        return RingResidualNetwork(
            taps=jax.random.normal(taps_key, (WIDTH, hidden)) / WIDTH**0.5,
            shift=jax.random.normal(shift_key, (channels, hidden)) / channels**0.5,
            amplitude=jnp.zeros((channels, hidden)),
            **init_level_layer(level_key, level_hidden, 2 * hidden),
        )

    def terms(self, features: Float[Array, "sites channels"]) -> NoiseLevelTerms:
        """Terms of b and a from the features, computed once per step; arrays of shape (sites, hidden)."""
        return NoiseLevelTerms(features @ self.shift, features @ self.amplitude)

    def __call__(
        self, z: Float[Array, " sites"], noise_level: Float[Array, ""], terms: NoiseLevelTerms
    ) -> Float[Array, " sites"]:
        """Compute F for a noised latent.

        Args:
            z: noised latent, already multiplied by c_in.
            noise_level: noise level s > 0.
            terms: terms from the features, as `terms` returns them.

        Returns:
            Value of F, of the shape of the latent.
        """
        # The noise level adds the same terms at all sites.
        added = level_layer(noise_level, self.level_scale, self.level_bias, self.level_terms)
        shift, amplitude = jnp.split(added, 2)
        level = NoiseLevelTerms(shift[None], amplitude[None])
        # One layer on the neighborhood of each site, which returns one column per tap.
        back = gradient_layer(neighborhoods(z[:, None]), self.taps, terms, level)
        # The transpose of `neighborhoods` rolls the column of each tap back to the site that it came from.
        return jnp.sum(jnp.stack([jnp.roll(back[:, i], i - WIDTH // 2) for i in range(WIDTH)]), axis=0)


class RingEmulator(ResidualEmulator):
    """Trained emulator of a system on a ring of sites. `load_prior("lorenz96")` loads the one that ships.

    All values are in the unit of the system. Lorenz-96 has no unit.

    Attributes:
        mean_network: network for the conditional mean and the features, run once per step.
        residual_network: network F that corrects the denoiser, run at every noise level.
        state_mean: mean of a site in the training data.
        state_scale: standard deviation of a site in the training data.
        increment_scale: root mean square of the conditional mean minus the previous state in training.
        latent_scale: scale S, the root mean square of the next state minus the conditional mean in training.
        climatology_mean: mean of a site over a long run of the true system.
        climatology_covariance: covariance of two sites by their distance, shape (largest distance + 1,), in the squared
            unit of the system.
        layout: layout with one axis of 5 sites or more.
        noise_range: (lowest, highest) noise level of the training, relative to a latent of unit mean square.
        checksum: SHA-256 of stored arrays and card in hexadecimal; empty for an emulator that was not read from files.
        card_text: data card, as JSON text.
        noise: white noise.
        conditioning_passes: 1, for the mean network.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the layout has more than one axis or fewer than 5 sites, an array is not finite, or a scale is not
            positive.
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
        networks = "RingMeanNetwork.init(rng_key, channels=16, blocks=4)"
        require(self.mean_network, RingMeanNetwork, self, "mean_network", networks)
        networks = "RingResidualNetwork.init(rng_key, channels=16, hidden=16)"
        require(self.residual_network, RingResidualNetwork, self, "residual_network", networks)
        require(self.layout, Layout, self, "layout", 'ndda.Layout((40,), ("site",))')
        require_ring(self.layout, "RingEmulator")
        require_noise_range(self.noise_range, self)
        require_finite(self)

    def mean_and_features(self, x: Float[Array, " sites"]) -> tuple[Float[Array, " sites"], Float[Array, ...]]:
        """Conditional mean of shape (sites,) and features of shape (sites, channels), by one pass of the mean network.

        Args:
            x: previous state in the unit of the system, shape (sites,).
        """
        increment, features = self.mean_network((x - self.state_mean) / self.state_scale)
        return x + self.increment_scale * increment, features

    def denoise(
        self, z_s: Float[Array, " sites"], noise_level: Float[Array, ""], conditioning: EmulatorConditioning
    ) -> Float[Array, " sites"]:
        """Denoiser D(z_s, s; x) = E[z | z_s, x], by one pass of the residual network.

        Args:
            z_s: noised latent, shape (sites,).
            noise_level: noise level s > 0.
            conditioning: result of `condition` for the previous state.

        Returns:
            Denoised latent, shape (sites,).
        """
        c_skip = 1.0 / (1.0 + noise_level**2)
        c_in = jnp.sqrt(c_skip)
        c_out = noise_level * c_in
        return c_skip * z_s + c_out * c_in * self.residual_network(c_in * z_s, noise_level, conditioning.terms)

    def scale(self, conditioning: EmulatorConditioning) -> Float[Array, ""]:
        """Scale S of the latent in the unit of the system, the same for every site."""
        return self.latent_scale

    def climatology(self) -> dist.Distribution:
        """Gaussian distribution with the mean and the covariance of a long run of the true system.

        The ring may be larger than the ring of that run. Sites that are further apart than half of the run's ring are
        then uncorrelated.

        Returns:
            NumPyro distribution of states in the unit of the system, event shape (sites,).
        """
        return ring_climatology(self.climatology_mean, self.climatology_covariance, self.layout.size)


def require_ring(layout: Layout, owner: str) -> None:
    """Raise a ValueError if a layout is not that of a ring that the networks can run on.

    Args:
        layout: layout of the state.
        owner: class that got it, for the message.
    """
    if len(layout.shape) != 1 or layout.shape[0] < WIDTH:
        raise ValueError(
            f"{owner} got a layout of shape {layout.shape}, but its networks need one axis of {WIDTH} sites or more; "
            "give a larger ring."
        )


def ring_climatology(
    mean: Float[Array, ""], covariance: Float[Array, " distances"], sites: int
) -> dist.MultivariateNormal:
    """Gaussian distribution of the states of a ring, invariant under translation.

    Args:
        mean: mean of a site.
        covariance: covariance of two sites by their distance, shape (largest distance + 1,); 0 beyond.
        sites: number of sites.

    Returns:
        NumPyro distribution of states, event shape (sites,).
    """
    import numpyro.distributions as dist

    by_distance = np.zeros(max(sites, len(covariance)))
    by_distance[: len(covariance)] = np.asarray(covariance)
    separation = np.arange(sites)
    separation = np.minimum(separation, sites - separation)
    # The eigenvalues of a circulant covariance are the Fourier transform of its first row. Some can be negative,
    # because the row is an estimate and is cut off at the largest distance.
    spectrum = np.fft.rfft(by_distance[separation]).real
    row = np.fft.irfft(np.maximum(spectrum, 1e-4 * spectrum.max()), sites)
    factor = np.linalg.cholesky(row[(np.arange(sites)[:, None] - np.arange(sites)[None]) % sites])
    # NumPyro would check the factor by forty small programs, each compiled in the first run.
    return dist.MultivariateNormal(jnp.full((sites,), mean), scale_tril=jnp.asarray(factor), validate_args=False)


def save_ring_emulator(emulator: RingEmulator, card: dict[str, Any], folder: Path, name: str) -> None:
    """Write the arrays of a ring emulator to NAME.npz and its data card to NAME.json.

    Args:
        emulator: the emulator.
        card: data card, a dictionary that JSON can hold. The noise range and the checksum are added to it.
        folder: folder of the two files; it is made if it does not exist.
        name: name of the emulator, NAME above.

    Raises:
        TypeError: an argument is of the wrong kind.
    """
    require(emulator, RingEmulator, "save_ring_emulator", "emulator", 'ndda.load_prior("lorenz96")')
    save_emulator(emulator, named_arrays(emulator), card, folder, name)


def read_ring_emulator(folder: Path | Traversable, name: str, num_sites: int) -> RingEmulator:
    """Read a ring emulator that `save_ring_emulator` wrote.

    Args:
        folder: folder of the two files.
        name: name of the emulator.
        num_sites: number of sites of the ring, 5 or more. It may differ from the ring of the training.

    Raises:
        TypeError: an argument is of the wrong kind.
        FileNotFoundError: the folder has no such files.
        ValueError: a file is damaged or belongs to another prior, or `num_sites` is too small.
    """
    require_count(num_sites, "read_ring_emulator", "num_sites", WIDTH)
    stored = read_emulator(folder, name, "examples/train_lorenz96.py")
    arrays = {key: jnp.asarray(value) for key, value in stored.arrays.items()}
    scalars = {key: value for key, value in arrays.items() if "." not in key}
    with of_kind("ring emulator", folder, name):
        return RingEmulator(
            mean_network=RingMeanNetwork(**part(arrays, "mean_network.")),
            residual_network=RingResidualNetwork(**part(arrays, "residual_network.")),
            layout=Layout((num_sites,), ("site",), (("site", tuple(range(num_sites))),)),
            noise_range=stored.noise_range,
            checksum=stored.checksum,
            card_text=stored.card_text,
            **scalars,
        )
