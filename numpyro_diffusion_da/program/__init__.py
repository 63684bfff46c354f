"""NumPyro programs as state-space models: the scan, its sites, and their forms for filters of other libraries."""

from numpyro_diffusion_da.program import feynman_kac
from numpyro_diffusion_da.program.distribution import (
    ConditionedTransition,
    DiffusionTransition,
    EmulatorTransition,
    OnePassTransition,
)
from numpyro_diffusion_da.program.huber import Huber
from numpyro_diffusion_da.program.linear_gaussian import LinearGaussian
from numpyro_diffusion_da.program.parameters import GlobalParameters
from numpyro_diffusion_da.program.scan import ObservedSite, TimeInputs
from numpyro_diffusion_da.program.sites import (
    gaussian_observations,
    general_observation,
    pointwise_log_likelihood,
    predicted_observation,
)
from numpyro_diffusion_da.program.state_space import StateSpaceModel

__all__ = [
    "ConditionedTransition",
    "DiffusionTransition",
    "EmulatorTransition",
    "GlobalParameters",
    "Huber",
    "LinearGaussian",
    "ObservedSite",
    "OnePassTransition",
    "StateSpaceModel",
    "TimeInputs",
    "feynman_kac",
    "gaussian_observations",
    "general_observation",
    "pointwise_log_likelihood",
    "predicted_observation",
]
