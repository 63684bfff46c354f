"""Filters of a NumPyro program; each builds its kernel from the transition and the likelihood of the program."""

from numpyro_diffusion_da.filters.base import FilterAlgorithm, Proposal
from numpyro_diffusion_da.filters.bootstrap import Bootstrap
from numpyro_diffusion_da.filters.enkf import EnKF
from numpyro_diffusion_da.filters.fa_apf import FAAPF
from numpyro_diffusion_da.filters.gross_error_check import GrossErrorCheck
from numpyro_diffusion_da.filters.guided_pf import PATH_SAMPLER, GuidedPF

__all__ = [
    "FAAPF",
    "PATH_SAMPLER",
    "Bootstrap",
    "EnKF",
    "FilterAlgorithm",
    "GrossErrorCheck",
    "GuidedPF",
    "Proposal",
]
