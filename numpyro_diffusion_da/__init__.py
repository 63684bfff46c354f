"""Bayesian filtering with pretrained diffusion emulators, in NumPyro, without training.

Write a state-space model as an ordinary NumPyro program, put a pretrained diffusion emulator in it as the transition,
filter observations through it, and read the result with ArviZ and xarray.

The names here are those of a first program. Everything else is one folder down: `ndda.diffusion.DPS`,
`ndda.diagnostics.crps`, `ndda.results.to_datatree`, `ndda.smc.fa_apf`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from numpyro_diffusion_da import diagnostics as diagnostics
from numpyro_diffusion_da import diffusion as diffusion
from numpyro_diffusion_da import fields as fields
from numpyro_diffusion_da import filters as filters
from numpyro_diffusion_da import inference as inference
from numpyro_diffusion_da import observation as observation
from numpyro_diffusion_da import priors as priors
from numpyro_diffusion_da import program as program
from numpyro_diffusion_da import report as report
from numpyro_diffusion_da import results as results
from numpyro_diffusion_da import smc as smc
from numpyro_diffusion_da import transition as transition
from numpyro_diffusion_da.diffusion import (
    MMPS,
    DiffusionPrior,
    DPMSolverPP2M,
    KarrasSchedule,
    Sampler,
    SDEDPMSolverPP2M,
)
from numpyro_diffusion_da.fields import Layout, Variable
from numpyro_diffusion_da.filters import FAAPF, Bootstrap, EnKF, GrossErrorCheck, GuidedPF
from numpyro_diffusion_da.inference import PMMH, SMC2, Filter, OnlineFilter
from numpyro_diffusion_da.priors import (
    DenoiserPrior,
    GaussianPrior,
    GenCastPrior,
    NoiseConditionedPrior,
    WeatherNext2Prior,
    load_prior,
)
from numpyro_diffusion_da.program import DiffusionTransition, Huber, OnePassTransition
from numpyro_diffusion_da.results import FilterResult
from numpyro_diffusion_da.smc import (
    RTPS,
    Euclidean,
    ForecastMultiplicative,
    GreatCircle,
    KalmanMove,
    Multiplicative,
    Ring,
    Taper,
)
from numpyro_diffusion_da.transition import Dirac, Equal, Moment

if TYPE_CHECKING:
    from numpyro_diffusion_da import assimilation as assimilation

LATER = ("assimilation",)
"""Folders that are imported when they are first used: pydantic takes long to import."""


def __getattr__(name: str) -> Any:
    """Import a folder of `LATER`."""
    if name in LATER:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = version("numpyro-diffusion-da")

__all__ = [
    "FAAPF",
    "MMPS",
    "PMMH",
    "RTPS",
    "SMC2",
    "Bootstrap",
    "DPMSolverPP2M",
    "DenoiserPrior",
    "DiffusionPrior",
    "DiffusionTransition",
    "Dirac",
    "EnKF",
    "Equal",
    "Euclidean",
    "Filter",
    "FilterResult",
    "ForecastMultiplicative",
    "GaussianPrior",
    "GenCastPrior",
    "GreatCircle",
    "GrossErrorCheck",
    "GuidedPF",
    "Huber",
    "KalmanMove",
    "KarrasSchedule",
    "Layout",
    "Moment",
    "Multiplicative",
    "NoiseConditionedPrior",
    "OnePassTransition",
    "OnlineFilter",
    "Ring",
    "SDEDPMSolverPP2M",
    "Sampler",
    "Taper",
    "Variable",
    "WeatherNext2Prior",
    "load_prior",
]
