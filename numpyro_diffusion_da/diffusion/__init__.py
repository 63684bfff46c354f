"""Diffusion priors, their noise and denoisers, samplers, guidance, linear solvers, path weights and densities."""

from numpyro_diffusion_da.diffusion.denoiser import Denoiser, GuidanceState, NetworkPasses, PriorDenoiser
from numpyro_diffusion_da.diffusion.density import ExactTrace, Hutchinson, ProbabilityFlow, Trace
from numpyro_diffusion_da.diffusion.guidance import MMPS, Guidance, GuidanceDirections, ObservingDenoiser
from numpyro_diffusion_da.diffusion.guidance_baselines import DPS, JFPS, TMPD, PiGDM
from numpyro_diffusion_da.diffusion.guidance_piecewise import Piecewise, Unguided
from numpyro_diffusion_da.diffusion.linear_solve import (
    Directions,
    DirectSolve,
    KrylovSolve,
    LinearSolver,
    Product,
    RowSumSolve,
    Solution,
    relative_residual,
)
from numpyro_diffusion_da.diffusion.noise import FactorNoise, Noise, WhiteNoise
from numpyro_diffusion_da.diffusion.prior import Conditioning, DiffusionPrior, EmulatorPrior, OnePassPrior
from numpyro_diffusion_da.diffusion.sampler import Churn, LangevinCorrector, Sampler
from numpyro_diffusion_da.diffusion.schedule import GeometricSchedule, KarrasSchedule, Schedule
from numpyro_diffusion_da.diffusion.spherical_noise import SphericalNoise
from numpyro_diffusion_da.diffusion.steps import (
    DDIM,
    AdamsBashforth,
    DPMSolverPP2M,
    DPMSolverPP2S,
    Heun,
    SDEDPMSolverPP2M,
    Step,
    StepInputs,
    StochasticStep,
    UniPC,
)

__all__ = [
    "DDIM",
    "DPS",
    "JFPS",
    "MMPS",
    "TMPD",
    "AdamsBashforth",
    "Churn",
    "Conditioning",
    "DPMSolverPP2M",
    "DPMSolverPP2S",
    "Denoiser",
    "DiffusionPrior",
    "DirectSolve",
    "Directions",
    "EmulatorPrior",
    "ExactTrace",
    "FactorNoise",
    "GeometricSchedule",
    "Guidance",
    "GuidanceDirections",
    "GuidanceState",
    "Heun",
    "Hutchinson",
    "KarrasSchedule",
    "KrylovSolve",
    "LangevinCorrector",
    "LinearSolver",
    "NetworkPasses",
    "Noise",
    "ObservingDenoiser",
    "OnePassPrior",
    "PiGDM",
    "Piecewise",
    "PriorDenoiser",
    "ProbabilityFlow",
    "Product",
    "RowSumSolve",
    "SDEDPMSolverPP2M",
    "Sampler",
    "Schedule",
    "Solution",
    "SphericalNoise",
    "Step",
    "StepInputs",
    "StochasticStep",
    "Trace",
    "Unguided",
    "UniPC",
    "WhiteNoise",
    "relative_residual",
]
