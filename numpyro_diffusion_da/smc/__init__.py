"""Filter kernels in the style of BlackJAX, and their parts: pure functions that know neither diffusion nor NumPyro.

Each kernel is a module with `init` and `build_kernel`: `fa_apf`, `guided_pf`, `bootstrap`, `enkf`, `pmmh`, `smc2`. All
but `smc2` also have `as_top_level_api`, which returns a `blackjax.base.SamplingAlgorithm`.
"""

from numpyro_diffusion_da.smc import bootstrap, enkf, fa_apf, guided_pf, pmmh, sharding, smc2
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
    top_level_api,
)
from numpyro_diffusion_da.smc.correlations import Boxcar, Correlation, GaspariCohn, gaspari_cohn
from numpyro_diffusion_da.smc.distances import Distance, Euclidean, GreatCircle, Ring, WithHeight
from numpyro_diffusion_da.smc.ensemble_update import EnsembleUpdate, PerturbedObservations, SquareRoot
from numpyro_diffusion_da.smc.inflation import RTPP, RTPS, ForecastMultiplicative, Inflation, Jitter, Multiplicative
from numpyro_diffusion_da.smc.kalman_move import Departure, KalmanMove, MoveRecord, PlacedMove, Predicted
from numpyro_diffusion_da.smc.local_ancestors import LocalAncestors
from numpyro_diffusion_da.smc.localization import PlacedTaper, Taper
from numpyro_diffusion_da.smc.mesh import on_mesh
from numpyro_diffusion_da.smc.probing import Products
from numpyro_diffusion_da.smc.sharding import Traffic
from numpyro_diffusion_da.smc.tempering import LikelihoodTempering, TemperableLogWeight, Tempering, WeightTempering

__all__ = [
    "RTPP",
    "RTPS",
    "Boxcar",
    "Correlation",
    "Departure",
    "Distance",
    "EnsembleUpdate",
    "Euclidean",
    "ForecastMultiplicative",
    "GaspariCohn",
    "GreatCircle",
    "Inflation",
    "Info",
    "Jitter",
    "KalmanMove",
    "Kernel",
    "LikelihoodTempering",
    "LocalAncestors",
    "MoveRecord",
    "Multiplicative",
    "PerturbedObservations",
    "PlacedMove",
    "PlacedTaper",
    "Predicted",
    "Products",
    "Resampling",
    "Ring",
    "SquareRoot",
    "State",
    "Taper",
    "TemperableLogWeight",
    "Tempering",
    "Traffic",
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
    "on_mesh",
    "particle_keys",
    "pmmh",
    "sharding",
    "smc2",
    "top_level_api",
]
