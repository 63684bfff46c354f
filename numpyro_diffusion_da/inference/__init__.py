"""Runs of a filter over time, and inference of global parameters from its evidence."""

from numpyro_diffusion_da.inference.compilation import Compiled
from numpyro_diffusion_da.inference.compile_cache import cache_compiled
from numpyro_diffusion_da.inference.filter import Filter
from numpyro_diffusion_da.inference.keeping import Kept
from numpyro_diffusion_da.inference.online_filter import OnlineFilter
from numpyro_diffusion_da.inference.pmmh import PMMH
from numpyro_diffusion_da.inference.smc2 import SMC2
from numpyro_diffusion_da.inference.spread_tuning import SpreadTrial, SpreadTuning, tune_spread
from numpyro_diffusion_da.inference.watching import RunProgress

__all__ = [
    "PMMH",
    "SMC2",
    "Compiled",
    "Filter",
    "Kept",
    "OnlineFilter",
    "RunProgress",
    "SpreadTrial",
    "SpreadTuning",
    "cache_compiled",
    "tune_spread",
]
