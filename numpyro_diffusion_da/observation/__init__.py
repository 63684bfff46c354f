"""Likelihoods of one step's observations, and observing networks: stations, satellite swaths, block means."""

from numpyro_diffusion_da.observation.likelihood import (
    Coordinates,
    GaussianLikelihood,
    GaussianObservation,
    GeneralLikelihood,
    GeneralObservation,
    Likelihood,
)
from numpyro_diffusion_da.observation.linear_predictor import LinearPredictor, find_linear_predictor
from numpyro_diffusion_da.observation.networks import (
    BlockMeans,
    ObservingNetwork,
    Stations,
    Swath,
    channel,
    channel_names,
    fraction_of,
)

__all__ = [
    "BlockMeans",
    "Coordinates",
    "GaussianLikelihood",
    "GaussianObservation",
    "GeneralLikelihood",
    "GeneralObservation",
    "Likelihood",
    "LinearPredictor",
    "ObservingNetwork",
    "Stations",
    "Swath",
    "channel",
    "channel_names",
    "find_linear_predictor",
    "fraction_of",
]
