"""Training-free Bayesian filtering with diffusion emulators, in NumPyro.

Write a state-space model as an ordinary NumPyro program, put a pretrained diffusion emulator in it as the transition,
filter observations with a fully adapted auxiliary particle filter, and read the result with ArviZ and xarray.
"""

from numpyro_diffusion_da import smc
from numpyro_diffusion_da.diagnostics import innovations, spectra, verification
from numpyro_diffusion_da.diffusion.density import ExactTrace, Hutchinson, ProbabilityFlow
from numpyro_diffusion_da.diffusion.guidance import MMPS, Guidance
from numpyro_diffusion_da.diffusion.guidance_baselines import DPS, JFPS, TMPD, PiGDM
from numpyro_diffusion_da.diffusion.guidance_piecewise import Piecewise, Unguided
from numpyro_diffusion_da.diffusion.linear_solve import DirectSolve, KrylovSolve, LinearSolver
from numpyro_diffusion_da.diffusion.noise import FactorNoise, Noise, WhiteNoise
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.diffusion.sampler import Churn, LangevinCorrector, Sampler
from numpyro_diffusion_da.diffusion.schedule import KarrasSchedule, Schedule
from numpyro_diffusion_da.diffusion.spherical_noise import SphericalNoise
from numpyro_diffusion_da.diffusion.steps import (
    DDIM,
    AdamsBashforth,
    DPMSolverPP2M,
    DPMSolverPP2S,
    Heun,
    SDEDPMSolverPP2M,
    Step,
    StochasticStep,
)
from numpyro_diffusion_da.fields.layout import Layout, Variable
from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.filters.bootstrap import Bootstrap
from numpyro_diffusion_da.filters.enkf import EnKF
from numpyro_diffusion_da.filters.fa_apf import FAAPF
from numpyro_diffusion_da.filters.gross_error_check import GrossErrorCheck
from numpyro_diffusion_da.filters.guided_pf import GuidedPF
from numpyro_diffusion_da.inference.filter import Filter
from numpyro_diffusion_da.inference.online_filter import OnlineFilter
from numpyro_diffusion_da.inference.pmmh import PMMH
from numpyro_diffusion_da.inference.smc2 import SMC2
from numpyro_diffusion_da.observation.likelihood import GaussianLikelihood, GaussianObservation
from numpyro_diffusion_da.priors import parametrization as parametrization
from numpyro_diffusion_da.priors.gaussian import GaussianPrior
from numpyro_diffusion_da.priors.gencast.prior import GenCastPrior
from numpyro_diffusion_da.priors.network import DenoiserPrior
from numpyro_diffusion_da.priors.ring import RingEmulator
from numpyro_diffusion_da.priors.shipped import load_prior
from numpyro_diffusion_da.priors.spherical.emulator import SphericalEmulator
from numpyro_diffusion_da.program import feynman_kac
from numpyro_diffusion_da.program.distribution import ConditionedTransition, DiffusionTransition
from numpyro_diffusion_da.program.huber import Huber
from numpyro_diffusion_da.program.linear_gaussian import LinearGaussian
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.results import convert, smoothing
from numpyro_diffusion_da.results.result import FilterResult, ParameterResult
from numpyro_diffusion_da.smc.distances import Distance, Euclidean, GreatCircle, Ring, WithHeight
from numpyro_diffusion_da.smc.ensemble_update import EnsembleUpdate, PerturbedObservations, SquareRoot
from numpyro_diffusion_da.smc.inflation import RTPP, RTPS, Inflation, Jitter, Multiplicative
from numpyro_diffusion_da.smc.localization import Taper
from numpyro_diffusion_da.smc.tempering import LikelihoodTempering, Tempering, WeightTempering
from numpyro_diffusion_da.transition.weights import Dirac, Equal, Moment, PredictiveWeight

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "DPS",
    "FAAPF",
    "JFPS",
    "MMPS",
    "PMMH",
    "RTPP",
    "RTPS",
    "SMC2",
    "TMPD",
    "AdamsBashforth",
    "Bootstrap",
    "Churn",
    "ConditionedTransition",
    "DPMSolverPP2M",
    "DPMSolverPP2S",
    "DenoiserPrior",
    "DiffusionPrior",
    "DiffusionTransition",
    "Dirac",
    "DirectSolve",
    "Distance",
    "EnKF",
    "EnsembleUpdate",
    "Equal",
    "Euclidean",
    "ExactTrace",
    "FactorNoise",
    "Filter",
    "FilterAlgorithm",
    "FilterResult",
    "GaussianLikelihood",
    "GaussianObservation",
    "GaussianPrior",
    "GenCastPrior",
    "GreatCircle",
    "GrossErrorCheck",
    "Guidance",
    "GuidedPF",
    "Heun",
    "Huber",
    "Hutchinson",
    "Inflation",
    "Jitter",
    "KarrasSchedule",
    "KrylovSolve",
    "LangevinCorrector",
    "Layout",
    "LikelihoodTempering",
    "LinearGaussian",
    "LinearSolver",
    "Moment",
    "Multiplicative",
    "Noise",
    "OnlineFilter",
    "ParameterResult",
    "PerturbedObservations",
    "PiGDM",
    "Piecewise",
    "PredictiveWeight",
    "ProbabilityFlow",
    "Ring",
    "RingEmulator",
    "SDEDPMSolverPP2M",
    "Sampler",
    "Schedule",
    "SphericalEmulator",
    "SphericalNoise",
    "SquareRoot",
    "StateSpaceModel",
    "Step",
    "StochasticStep",
    "Taper",
    "Tempering",
    "Unguided",
    "Variable",
    "WeightTempering",
    "WhiteNoise",
    "WithHeight",
    "convert",
    "feynman_kac",
    "innovations",
    "load_prior",
    "parametrization",
    "smc",
    "smoothing",
    "spectra",
    "verification",
]
