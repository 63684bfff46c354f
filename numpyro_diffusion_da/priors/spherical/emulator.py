r"""Emulator of weather on the sphere: a conditional diffusion model small enough for filtering on a CPU.

The next state on a Gaussian grid is $x' = \mu(x) + S z$. A large mean network runs once per step, in `condition`, and
gives the conditional mean $\mu(x)$ and features of the flow. $S$ has one number for each channel, the root mean square
of the next state minus the conditional mean. The noise of the latent $z$ is isotropic on the sphere, for scalars and
for winds (`HarmonicNoise`). In the coefficients of that noise, the denoiser at the noise level $s$ is

$$
\begin{aligned}
D(z_s, s; x) &= Q (Q + s^2)^{-1} z_s + c_{out} c_{in} F(c_{in} z_s, s; x), \\
c_{in} &= 1 / \sqrt{1 + s^2}, \quad c_{out} = s \, c_{in},
\end{aligned}
$$

where $Q$ is the covariance of $z$ over all training data, the same at every longitude. The first term is the exact
denoiser of a Gaussian. It contains the spectra, the balance of wind and mass, and the vertical structure of forecast
errors. The residual network $F$ is the only network that runs at every noise level. It learns the dependence on the
flow. The form differs from the preconditioning of EDM (Karras et al. 2022, arXiv 2206.00364) in one point: the operator
$Q$ replaces the number $\sigma_{data}^2$.
"""

from __future__ import annotations

import dataclasses
import math
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_diffusion_da.arguments import require, require_noise_range
from numpyro_diffusion_da.checksums import named_arrays
from numpyro_diffusion_da.fields.layout import Layout, Variable
from numpyro_diffusion_da.priors.residual_emulator import (
    EmulatorConditioning,
    ResidualEmulator,
    of_kind,
    read_emulator,
    require_finite,
    save_emulator,
)
from numpyro_diffusion_da.priors.spherical.harmonics import HarmonicNoise, SphericalHarmonics
from numpyro_diffusion_da.priors.spherical.networks import (
    GaussianDenoiser,
    SphericalMeanNetwork,
    SphericalNoiseLevelTerms,
    SphericalResidualNetwork,
    ZonalOperator,
)
from numpyro_diffusion_da.priors.stored import part

if TYPE_CHECKING:
    import numpyro.distributions as dist


class SphericalEmulator(ResidualEmulator):
    """Trained emulator of weather on the sphere. `load_prior("held_suarez")` loads the one that ships.

    Attributes:
        mean_network: network for the conditional mean and the features, run once per step.
        gaussian: exact denoiser of N(0, Q).
        residual_network: network F that corrects the denoiser, run at every noise level.
        state_mean: mean of each channel along each latitude in the training data, in the units of the layout.
        state_scale: standard deviation of each channel around this mean, in the units of the layout.
        latent_scale: scale S, the root mean square of the next state minus the conditional mean for each channel, in
            the units of the layout.
        climate: covariance of the normalized states, of which only the eigenvectors and eigenvalues are used.
        noise: noise that is isotropic on the sphere.
        layout: layout of a Gaussian grid with the variables as channels, as `spherical_layout` makes it.
        noise_range: (lowest, highest) noise level of the training, relative to a latent of unit mean square.
        checksum: SHA-256 of stored arrays and card in hexadecimal; empty for an emulator that is not as it was read.
        card_text: data card, as JSON text.
        conditioning_passes: 1, for the mean network.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the layout is not that of the harmonics, an array is not finite, or a scale is not positive.
    """

    mean_network: SphericalMeanNetwork
    gaussian: GaussianDenoiser
    residual_network: SphericalResidualNetwork
    state_mean: Float[Array, "latitude channel"]
    state_scale: Float[Array, " channel"]
    latent_scale: Float[Array, " channel"]
    climate: GaussianDenoiser
    noise: HarmonicNoise
    layout: Layout = eqx.field(static=True)
    noise_range: tuple[float, float] = eqx.field(static=True)
    checksum: str = eqx.field(static=True, default="")
    card_text: str = eqx.field(static=True, default="{}")
    conditioning_passes: int = eqx.field(static=True, default=1, init=False)

    def __check_init__(self) -> None:
        require(self.noise, HarmonicNoise, self, "noise", "HarmonicNoise(harmonics)")
        require(self.layout, Layout, self, "layout", "spherical_layout(harmonics, variables)")
        init = ".init(rng_key, harmonics, ...)"
        require(self.mean_network, SphericalMeanNetwork, self, "mean_network", f"SphericalMeanNetwork{init}")
        init = ".init(rng_key, harmonics, hidden=24)"
        require(
            self.residual_network, SphericalResidualNetwork, self, "residual_network", f"SphericalResidualNetwork{init}"
        )
        for name in ("gaussian", "climate"):
            require(getattr(self, name), GaussianDenoiser, self, name, "GaussianDenoiser(vectors, values)")
        require_noise_range(self.noise_range, self)
        require_finite(self)
        expected = spherical_layout(self.noise.harmonics, self.layout.variables)
        places, given = expected.coords(), self.layout.coords()
        if self.layout.shape != expected.shape or not all(
            name in given and np.allclose(given[name], places[name], rtol=0.0, atol=1e-3) for name in places
        ):
            raise ValueError(
                f"SphericalEmulator got a layout of shape {self.layout.shape} whose grid is not that of its harmonics, "
                "with latitudes from south to north and longitudes from 0; give spherical_layout(harmonics, variables)."
            )

    def mean_and_features(
        self, x: Float[Array, "latitude longitude channel"]
    ) -> tuple[Float[Array, "latitude longitude channel"], Float[Array, ...]]:
        """Conditional mean in the units of the layout and features of each grid point, by one pass of the mean network.

        Args:
            x: previous state in the units of the layout.
        """
        mean, features = self.mean_network(self.coefficients(x), self.noise.harmonics)
        return self.fields(mean), features

    def coefficients(self, x: Float[Array, "latitude longitude channel"]) -> Float[Array, "2 m l channel"]:
        """Compute the harmonic coefficients of the normalized state, from a state in the units of the layout."""
        anomaly = (x - self.state_mean[:, None]) / self.state_scale[None, None]
        return self.noise.harmonics.analysis(anomaly)

    def fields(self, y: Float[Array, "2 m l channel"]) -> Float[Array, "latitude longitude channel"]:
        """Compute the state in the units of the layout, from harmonic coefficients of the normalized state."""
        return self.state_mean[:, None] + self.state_scale[None, None] * self.noise.harmonics.synthesis(y)

    def denoise(
        self,
        z_s: Float[Array, "latitude longitude channel"],
        noise_level: Float[Array, ""],
        conditioning: EmulatorConditioning,
    ) -> Float[Array, "latitude longitude channel"]:
        """Denoiser D(z_s, s; x) = E[z | z_s, x], by one pass of the residual network.

        Args:
            z_s: noised latent on the grid.
            noise_level: noise level s > 0.
            conditioning: result of `condition` for the previous state.

        Returns:
            Denoised latent on the grid.
        """
        coefficients = self.denoise_coefficients(self.noise.analysis(z_s), noise_level, conditioning.terms)
        return self.noise.synthesis(coefficients)

    def denoise_coefficients(
        self, z_s: Float[Array, "2 m l channel"], noise_level: Float[Array, ""], terms: SphericalNoiseLevelTerms
    ) -> Float[Array, "2 m l channel"]:
        """Denoiser D in coefficients of the noise.

        Args:
            z_s: coefficients of the noised latent.
            noise_level: noise level s > 0.
            terms: terms of the residual network from the features of the previous state.

        Returns:
            Coefficients of the denoised latent.
        """
        c_in = jax.lax.rsqrt(1.0 + noise_level**2)
        correction = self.residual_network(c_in * z_s, noise_level, terms, self.noise)
        return self.gaussian(z_s, noise_level) + noise_level * c_in**2 * correction

    def scale(self, conditioning: EmulatorConditioning) -> Float[Array, "latitude longitude channel"]:
        """Scale S of the latent in the units of the layout, the same at all points of a channel."""
        return jnp.broadcast_to(self.latent_scale[None, None], self.layout.shape)

    def with_errors_times(self, factor: float) -> SphericalEmulator:
        """Emulator with the same conditional mean and with larger or smaller errors: x' = mu(x) + factor S z.

        The errors of the emulator are correlated from one step to the next, but its draws are independent. An ensemble
        with the right spread after one step is therefore too narrow after ten steps. A filter depends on forecasts over
        many steps, for which larger errors of each step give the right spread. The covariance of the model error is
        multiplied by factor^2.

        Args:
            factor: positive factor; 1 is the error of one step.

        Raises:
            ValueError: `factor` is not positive.
        """
        if not 0 < factor < math.inf:
            raise ValueError(
                f"with_errors_times got factor={factor}; give a positive number, 1.0 for the errors of one step."
            )
        # The checksum is that of the stored emulator, which has other errors.
        return dataclasses.replace(self, latent_scale=factor * self.latent_scale, checksum="")

    def climate_statistics(self) -> tuple[Float[np.ndarray, "latitude 1 channel"], Float[np.ndarray, " channel"]]:
        """Mean and standard deviation of the training data in the units of the layout, to broadcast against states."""
        return np.asarray(self.state_mean, float)[:, None], np.asarray(self.state_scale, float)

    def climatology(self) -> dist.Distribution:
        """Gaussian distribution with the mean and the covariance of the training data, the same at every longitude.

        Returns:
            NumPyro distribution of states in the units of the layout, event shape (latitude, longitude, channel).
        """
        from numpyro_diffusion_da.priors.spherical.climatology import ZonalClimatology

        return ZonalClimatology(self.state_mean, self.state_scale, self.climate, self.noise)


def save_spherical_emulator(emulator: SphericalEmulator, card: dict[str, Any], folder: Path, name: str) -> None:
    """Write the arrays of an emulator to NAME.npz and its data card to NAME.json.

    Arrays with three or more axes are stored in half precision.

    Args:
        emulator: the emulator.
        card: data card, a dictionary that JSON can hold. Harmonics, variables, noise range and checksum are added.
        folder: folder of the two files; it is made if it does not exist.
        name: name of the emulator, NAME above.

    Raises:
        TypeError: an argument is of the wrong kind.
    """
    require(emulator, SphericalEmulator, "save_spherical_emulator", "emulator", 'ndda.load_prior("held_suarez")')
    arrays = {
        key: value.astype(np.float16) if value.ndim > 2 else value for key, value in named_arrays(emulator).items()
    }
    harmonics, layout = emulator.noise.harmonics, emulator.layout
    described = {
        "harmonics": {
            "degrees": harmonics.degrees,
            "num_latitudes": harmonics.num_latitudes,
            "num_scalars": harmonics.num_scalars,
            "num_winds": harmonics.num_winds,
        },
        "variables": [{"name": v.name, "units": v.units, "levels": list(v.levels)} for v in layout.variables],
    }
    save_emulator(emulator, arrays, {**card, **described}, folder, name)


def read_spherical_emulator(folder: Path | Traversable, name: str) -> SphericalEmulator:
    """Read an emulator that `save_spherical_emulator` wrote.

    Args:
        folder: folder of the two files.
        name: name of the emulator.

    Raises:
        TypeError: `folder` is not a path.
        FileNotFoundError: the folder has no such files.
        ValueError: a file is damaged or belongs to another prior.
    """
    stored = read_emulator(folder, name, "the scripts of examples/mini_weather")
    arrays = {key: jnp.asarray(value, jnp.float32) for key, value in stored.arrays.items()}
    with of_kind("spherical emulator", folder, name):
        harmonics = SphericalHarmonics(**stored.card["harmonics"])

        def gaussian(prefix: str) -> GaussianDenoiser:
            """Gaussian denoiser whose arrays have a prefix."""
            return GaussianDenoiser(ZonalOperator(**part(arrays, f"{prefix}.vectors.")), arrays[f"{prefix}.values"])

        propagator = ZonalOperator(**part(arrays, "mean_network.propagator."))
        weights = {key: value for key, value in part(arrays, "mean_network.").items() if "." not in key}
        variables = tuple(Variable(v["name"], v["units"], tuple(v["levels"])) for v in stored.card["variables"])
        return SphericalEmulator(
            mean_network=SphericalMeanNetwork(propagator=propagator, **weights),
            gaussian=gaussian("gaussian"),
            residual_network=SphericalResidualNetwork(**part(arrays, "residual_network.")),
            climate=gaussian("climate"),
            noise=HarmonicNoise(harmonics),
            layout=spherical_layout(harmonics, variables),
            noise_range=stored.noise_range,
            checksum=stored.checksum,
            card_text=stored.card_text,
            **{key: arrays[key] for key in ("state_mean", "state_scale", "latent_scale")},
        )


def spherical_layout(harmonics: SphericalHarmonics, variables: tuple[Variable, ...]) -> Layout:
    """Layout of the Gaussian grid of harmonics, with variables as channels.

    Args:
        harmonics: harmonics, which define the grid and the number of channels.
        variables: variables of the channels: scalars, then eastward and then northward components of winds.

    Returns:
        Layout of shape (latitude, longitude, channel), with latitudes and longitudes in degrees.

    Raises:
        ValueError: the channels of the variables are not those of the harmonics.
    """
    longitudes = 360.0 / harmonics.num_longitudes * np.arange(harmonics.num_longitudes)
    return Layout(
        (harmonics.num_latitudes, harmonics.num_longitudes, harmonics.num_channels),
        ("latitude", "longitude", "channel"),
        (("latitude", tuple(harmonics.latitudes.tolist())), ("longitude", tuple(longitudes.tolist()))),
        variables=variables,
    )
