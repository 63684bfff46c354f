"""Priors: an exact Gaussian one, the trained ones that ship, any network of yours, GenCast, and WeatherNext 2."""

from numpyro_diffusion_da.priors import parametrization
from numpyro_diffusion_da.priors.deterministic import DeterministicPrior
from numpyro_diffusion_da.priors.gaussian import GaussianPrior
from numpyro_diffusion_da.priors.gencast.prior import GenCastPrior
from numpyro_diffusion_da.priors.gencast.synthetic import SyntheticFiles, write_synthetic_gencast
from numpyro_diffusion_da.priors.interpolant import Interpolant, InterpolantPrior
from numpyro_diffusion_da.priors.network import DenoiserPrior, NetworkConditioning, NetworkPrior
from numpyro_diffusion_da.priors.noise_conditioned import NoiseConditionedPrior
from numpyro_diffusion_da.priors.residual_emulator import ResidualEmulator
from numpyro_diffusion_da.priors.ring import (
    RingEmulator,
    RingMeanNetwork,
    RingResidualNetwork,
    read_ring_emulator,
    save_ring_emulator,
)
from numpyro_diffusion_da.priors.ring_one_pass import (
    RingNoiseNetwork,
    RingOnePassEmulator,
    read_ring_one_pass,
    save_ring_one_pass,
)
from numpyro_diffusion_da.priors.shipped import SHIPPED, load_prior
from numpyro_diffusion_da.priors.spherical.emulator import (
    SphericalEmulator,
    read_spherical_emulator,
    save_spherical_emulator,
    spherical_layout,
)
from numpyro_diffusion_da.priors.spherical.harmonics import HarmonicNoise, SphericalHarmonics
from numpyro_diffusion_da.priors.spherical.networks import (
    GaussianDenoiser,
    SphericalMeanNetwork,
    SphericalResidualNetwork,
    ZonalOperator,
)
from numpyro_diffusion_da.priors.stored import read_arrays, read_stored, write_stored
from numpyro_diffusion_da.priors.torch_network import TorchNetwork
from numpyro_diffusion_da.priors.weathernext.frames import Forcings
from numpyro_diffusion_da.priors.weathernext.package import (
    forward_differentiable,
    import_weathernext,
    package_settings,
)
from numpyro_diffusion_da.priors.weathernext.statistics import read_gencast_statistics
from numpyro_diffusion_da.priors.weathernext2.prior import WeatherNext2Prior
from numpyro_diffusion_da.priors.weathernext2.synthetic import SyntheticWeatherNext2, write_synthetic_weathernext2

__all__ = [
    "SHIPPED",
    "DenoiserPrior",
    "DeterministicPrior",
    "Forcings",
    "GaussianDenoiser",
    "GaussianPrior",
    "GenCastPrior",
    "HarmonicNoise",
    "Interpolant",
    "InterpolantPrior",
    "NetworkConditioning",
    "NetworkPrior",
    "NoiseConditionedPrior",
    "ResidualEmulator",
    "RingEmulator",
    "RingMeanNetwork",
    "RingNoiseNetwork",
    "RingOnePassEmulator",
    "RingResidualNetwork",
    "SphericalEmulator",
    "SphericalHarmonics",
    "SphericalMeanNetwork",
    "SphericalResidualNetwork",
    "SyntheticFiles",
    "SyntheticWeatherNext2",
    "TorchNetwork",
    "WeatherNext2Prior",
    "ZonalOperator",
    "forward_differentiable",
    "import_weathernext",
    "load_prior",
    "package_settings",
    "parametrization",
    "read_arrays",
    "read_gencast_statistics",
    "read_ring_emulator",
    "read_ring_one_pass",
    "read_spherical_emulator",
    "read_stored",
    "save_ring_emulator",
    "save_ring_one_pass",
    "save_spherical_emulator",
    "spherical_layout",
    "write_stored",
    "write_synthetic_gencast",
    "write_synthetic_weathernext2",
]
