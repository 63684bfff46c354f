"""Filter kernels in BlackJAX style, and their parts: pure functions that know neither diffusion nor NumPyro.

A kernel is a module with `init`, `build_kernel` and, where it has one, `as_top_level_api`: `fa_apf`, `guided_pf`,
`bootstrap`, `enkf`, `pmmh`, `smc2`.
"""

from numpyro_diffusion_da.smc import bootstrap, enkf, fa_apf, guided_pf, pmmh, smc2
from numpyro_diffusion_da.smc.base import (
    Info,
    Kernel,
    Resampling,
    State,
    init,
    make_info,
    map_particles,
    num_particles,
    particle_keys,
)
from numpyro_diffusion_da.smc.distances import Distance, Euclidean, GreatCircle, Ring, WithHeight
from numpyro_diffusion_da.smc.ensemble_update import EnsembleUpdate, PerturbedObservations, SquareRoot
from numpyro_diffusion_da.smc.inflation import RTPP, RTPS, ForecastMultiplicative, Inflation, Jitter, Multiplicative
from numpyro_diffusion_da.smc.local_ancestors import LocalAncestors
from numpyro_diffusion_da.smc.localization import PlacedTaper, Taper, gaspari_cohn
from numpyro_diffusion_da.smc.tempering import LikelihoodTempering, TemperableLogWeight, Tempering, WeightTempering

__all__ = [
    "RTPP",
    "RTPS",
    "Distance",
    "EnsembleUpdate",
    "Euclidean",
    "ForecastMultiplicative",
    "GreatCircle",
    "Inflation",
    "Info",
    "Jitter",
    "Kernel",
    "LikelihoodTempering",
    "LocalAncestors",
    "Multiplicative",
    "PerturbedObservations",
    "PlacedTaper",
    "Resampling",
    "Ring",
    "SquareRoot",
    "State",
    "Taper",
    "TemperableLogWeight",
    "Tempering",
    "WeightTempering",
    "WithHeight",
    "bootstrap",
    "enkf",
    "fa_apf",
    "gaspari_cohn",
    "guided_pf",
    "init",
    "make_info",
    "map_particles",
    "num_particles",
    "particle_keys",
    "pmmh",
    "smc2",
]
