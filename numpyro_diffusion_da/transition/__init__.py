"""Transitions p(x' | c) of the state, in closed form or by diffusion, and weights from the predictive likelihood."""

from numpyro_diffusion_da.transition.base import DrawRecord, Dynamics, Moments
from numpyro_diffusion_da.transition.diffusion import DiffusionDynamics
from numpyro_diffusion_da.transition.gaussian import GaussianDynamics
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
    "PredictiveWeight",
    "WeightRecord",
]
