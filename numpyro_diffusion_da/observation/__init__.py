"""Likelihoods of one step's observations, observing networks (stations, swaths, means), tables of observations."""

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
from numpyro_diffusion_da.observation.tables.bias import InstrumentBias
from numpyro_diffusion_da.observation.tables.checks import (
    Blacklist,
    Bounds,
    Duplicates,
    HeightDifference,
    QualityCheck,
    QualityColumn,
    Superobbing,
    Thinning,
    Withheld,
)
from numpyro_diffusion_da.observation.tables.flags import Flag
from numpyro_diffusion_da.observation.tables.operator import ObservationOperator
from numpyro_diffusion_da.observation.tables.placed import PlacedObservations
from numpyro_diffusion_da.observation.tables.quantities import DERIVED, DerivedQuantity, derived
from numpyro_diffusion_da.observation.tables.table import ObservationTable, read_table
from numpyro_diffusion_da.observation.tables.tracks import Tracks

__all__ = [
    "DERIVED",
    "Blacklist",
    "BlockMeans",
    "Bounds",
    "Coordinates",
    "DerivedQuantity",
    "Duplicates",
    "Flag",
    "GaussianLikelihood",
    "GaussianObservation",
    "GeneralLikelihood",
    "GeneralObservation",
    "HeightDifference",
    "InstrumentBias",
    "Likelihood",
    "LinearPredictor",
    "ObservationOperator",
    "ObservationTable",
    "ObservingNetwork",
    "PlacedObservations",
    "QualityCheck",
    "QualityColumn",
    "Stations",
    "Superobbing",
    "Swath",
    "Thinning",
    "Tracks",
    "Withheld",
    "channel",
    "channel_names",
    "derived",
    "find_linear_predictor",
    "fraction_of",
    "read_table",
]
