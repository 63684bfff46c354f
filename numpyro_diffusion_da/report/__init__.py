"""HTML report of a run, and its findings in words."""

from numpyro_diffusion_da.report.findings import (
    LEAST_CYCLES,
    MANY_REJECTIONS,
    NOISY_STATION,
    WRONG_BIAS,
    WRONG_RATIO,
    WRONG_STATION,
    Finding,
    FindingKind,
    Findings,
)
from numpyro_diffusion_da.report.folder import Increment, Spectrum, read_coast, read_increments, read_spectra
from numpyro_diffusion_da.report.page import html, write_report

__all__ = [
    "LEAST_CYCLES",
    "MANY_REJECTIONS",
    "NOISY_STATION",
    "WRONG_BIAS",
    "WRONG_RATIO",
    "WRONG_STATION",
    "Finding",
    "FindingKind",
    "Findings",
    "Increment",
    "Spectrum",
    "html",
    "read_coast",
    "read_increments",
    "read_spectra",
    "write_report",
]
