"""Transitions p(x' | c) of the state, and weights from the predictive likelihood of the observations."""

from numpyro_diffusion_da.transition.base import DrawRecord, Dynamics, Moments
from numpyro_diffusion_da.transition.diffusion import DiffusionDynamics
from numpyro_diffusion_da.transition.gaussian import GaussianDynamics
from numpyro_diffusion_da.transition.one_pass import OnePassDynamics
from numpyro_diffusion_da.transition.weights import Dirac, Equal, Moment, PredictiveWeight, WeightRecord

__all__ = [
    "DiffusionDynamics",
    "Dirac",
    "DrawRecord",
    "Dynamics",
    "Equal",
    "GaussianDynamics",
    "Moment",
    "Moments",
    "OnePassDynamics",
    "PredictiveWeight",
    "WeightRecord",
]
