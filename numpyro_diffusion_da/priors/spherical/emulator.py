"""A learned prior of weather on the sphere that ships: a diffusion emulator small enough for filtering on a CPU.

The next state is x' = mu(c) + S z, on a Gaussian grid. One pass of a large network a step, in `condition`, gives the
conditional mean mu and features of the flow; S is one number for each channel, the rms of what mu leaves. The latent z
is noised isotropically on the sphere, scalars and winds alike (`HarmonicNoise`), and in the coefficients of that noise

    D(z_s, s; c) = Q (Q + s^2)^-1 z_s + c_out c_in F(c_in z_s, s; c),
    c_in = 1 / sqrt(1 + s^2),    c_out = s c_in,

where Q is the covariance of z over all of training, the same at every longitude: the first term is the exact denoiser
of a Gaussian, with the spectra, the balance of wind and mass and the vertical structure of forecast errors, and F, the
only network that every level runs, has to learn no more than how today's flow departs from it. Against EDM's
preconditioning (arXiv 2206.00364) the number sigma_data is replaced by the operator Q.
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
from jaxtyping import Array, Float, PyTree

from numpyro_diffusion_da.checksums import named_arrays
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.fields.layout import Layout, Variable
from numpyro_diffusion_da.priors.spherical.harmonics import HarmonicNoise, SphericalHarmonics
from numpyro_diffusion_da.priors.spherical.networks import (
    GaussianDenoiser,
    SphericalMeanNetwork,
    SphericalNoiseLevelTerms,
    SphericalResidualNetwork,
    ZonalOperator,
)
from numpyro_diffusion_da.priors.stored import part, read_stored, write_stored

if TYPE_CHECKING:
    import numpyro.distributions as dist


class SphericalConditioning(NamedTuple):
    """What one step of the emulator needs of the previous state.

    Attributes:
        mean: mu(c), shape of the state.
        terms: the features' part of F.
    """

    mean: Float[Array, "latitude longitude channel"]
    terms: SphericalNoiseLevelTerms


class SphericalEmulator(DiffusionPrior):
    """A trained emulator on the sphere; see the module for its form, `load_prior` to get one.

    Attributes:
        mean_network: previous state -> conditional mean and features, once a step.
        gaussian: the denoiser of N(0, Q).
        residual_network: F, at every noise level.
        state_mean: mean of each channel along a latitude in training; `state_scale` the standard deviation of a channel
            around it.
        latent_scale: S, rms of the next state minus the conditional mean, for each channel.
        climate: covariance of the normalized states themselves, of which only the vectors and values are used.
        card_text: the data card, as JSON; `card` is the same as a dictionary.
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

    @property
    def card(self) -> dict[str, Any]:
        """How this emulator was trained and what it was measured to do."""
        return json.loads(self.card_text)

    def condition(self, state: PyTree, inputs: PyTree = None) -> SphericalConditioning:
        """The conditional mean and the features: one pass of the mean network.

        Args:
            state: the previous state, shape (latitude, longitude, channel), in the units of the layout.
            inputs: None.

        Raises:
            ValueError: inputs were given, which this prior has none of, or a state of another shape.
        """
        x = self.only_state(state, inputs)
        mean, features = self.mean_network(self.coefficients(x), self.noise.harmonics)
        return SphericalConditioning(self.fields(mean), self.residual_network.terms(features))

    def coefficients(self, x: Float[Array, "latitude longitude channel"]) -> Float[Array, "2 m l channel"]:
        """Harmonic coefficients of the normalized state."""
        anomaly = (x - self.state_mean[:, None]) / self.state_scale[None, None]
        return self.noise.harmonics.analysis(anomaly)

    def fields(self, y: Float[Array, "2 m l channel"]) -> Float[Array, "latitude longitude channel"]:
        """The state of these coefficients."""
        return self.state_mean[:, None] + self.state_scale[None, None] * self.noise.harmonics.synthesis(y)

    def denoise(
        self,
        z_s: Float[Array, "latitude longitude channel"],
        noise_level: Float[Array, ""],
        conditioning: SphericalConditioning,
    ) -> Float[Array, "latitude longitude channel"]:
        """D(z_s, s; c): one pass of the small network F."""
        coefficients = self.denoise_coefficients(self.noise.analysis(z_s), noise_level, conditioning.terms)
        return self.noise.synthesis(coefficients)

    def denoise_coefficients(
        self, z_s: Float[Array, "2 m l channel"], noise_level: Float[Array, ""], terms: SphericalNoiseLevelTerms
    ) -> Float[Array, "2 m l channel"]:
        """D in coefficients of the noise."""
        c_in = jax.lax.rsqrt(1.0 + noise_level**2)
        correction = self.residual_network(c_in * z_s, noise_level, terms, self.noise)
        return self.gaussian(z_s, noise_level) + noise_level * c_in**2 * correction

    def location(self, conditioning: SphericalConditioning) -> Float[Array, "latitude longitude channel"]:
        """mu(c), the conditional mean."""
        return conditioning.mean

    def scale(self, conditioning: SphericalConditioning) -> Float[Array, "latitude longitude channel"]:
        """The rms of what the mean leaves, a number for each channel."""
        return jnp.broadcast_to(self.latent_scale[None, None], self.layout.shape)

    def with_errors_times(self, factor: float) -> SphericalEmulator:
        """The same conditional mean, and an error of `factor` times the size: x' = mu(c) + factor S z.

        Errors of an emulator are correlated from one step to the next, and draws are not: an ensemble that is right
        after one step is too narrow after ten. A filter, which lives on forecasts of many steps, is told the truth by a
        larger error of each (tempering of the model error's covariance, by factor^2).

        Raises:
            ValueError: a factor that is not positive.
        """
        if not factor > 0:
            raise ValueError(f"factor={factor}; give a positive number, 1.0 for the error of one step.")
        return eqx.tree_at(lambda emulator: emulator.latent_scale, self, factor * self.latent_scale)

    def climatology(self) -> dist.Distribution:
        """The Gaussian with the mean and the covariance of a long run of the true system, equal at every longitude."""
        from numpyro_diffusion_da.priors.spherical.climatology import ZonalClimatology

        return ZonalClimatology(self.state_mean, self.state_scale, self.climate, self.noise)


def save_spherical_emulator(emulator: SphericalEmulator, card: dict[str, Any], folder: Path, name: str) -> None:
    """Write NAME.npz (arrays in half precision where they are matrices) and NAME.json (the card) into `folder`."""
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
        "noise_range": list(emulator.noise_range),
    }
    write_stored(arrays, {**card, **described}, folder, name)


def read_spherical_emulator(folder: Path | Traversable, name: str) -> SphericalEmulator:
    """Read what `save_spherical_emulator` wrote.

    Raises:
        FileNotFoundError: the folder has no such files.
        ValueError: the arrays are not those that the card describes.
    """
    stored, card_text = read_stored(folder, name, "the scripts of examples/mini_weather")
    card = json.loads(card_text)
    arrays = {key: jnp.asarray(value, jnp.float32) for key, value in stored.items()}
    harmonics = SphericalHarmonics(**card["harmonics"])

    def gaussian(prefix: str) -> GaussianDenoiser:
        return GaussianDenoiser(ZonalOperator(**part(arrays, f"{prefix}.vectors.")), arrays[f"{prefix}.values"])

    propagator = ZonalOperator(**part(arrays, "mean_network.propagator."))
    weights = {key: value for key, value in part(arrays, "mean_network.").items() if "." not in key}
    variables = tuple(Variable(v["name"], v["units"], tuple(v["levels"])) for v in card["variables"])
    return SphericalEmulator(
        mean_network=SphericalMeanNetwork(propagator=propagator, **weights),
        gaussian=gaussian("gaussian"),
        residual_network=SphericalResidualNetwork(**part(arrays, "residual_network.")),
        climate=gaussian("climate"),
        noise=HarmonicNoise(harmonics),
        layout=spherical_layout(harmonics, variables),
        noise_range=(float(card["noise_range"][0]), float(card["noise_range"][1])),
        checksum=card["sha256"],
        card_text=card_text,
        **{key: arrays[key] for key in ("state_mean", "state_scale", "latent_scale")},
    )


def spherical_layout(harmonics: SphericalHarmonics, variables: tuple[Variable, ...]) -> Layout:
    """The Gaussian grid of the harmonics, with these variables as channels."""
    longitudes = 360.0 / harmonics.num_longitudes * np.arange(harmonics.num_longitudes)
    return Layout(
        (harmonics.num_latitudes, harmonics.num_longitudes, harmonics.num_channels),
        ("latitude", "longitude", "channel"),
        (("latitude", tuple(harmonics.latitudes.tolist())), ("longitude", tuple(longitudes.tolist()))),
        variables=variables,
    )
