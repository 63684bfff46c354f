"""Scores against a truth, diagnostics against observations, spectra and figures."""

from numpyro_diffusion_da.diagnostics.feedback import PRESSURE_LEVELS, REGIONS, REJECTIONS, Feedback
from numpyro_diffusion_da.diagnostics.innovations import (
    Consistency,
    Departures,
    ErrorVariances,
    Estimate,
    background_consistency,
    background_departures,
    consistency,
    departures,
    error_variances,
)
from numpyro_diffusion_da.diagnostics.plots import (
    PALETTE,
    genealogy,
    map_figure,
    median_over_blocks,
    non_gaussianity_figure,
    pit_over_time,
    predictive_at_point,
    skill_figure,
)
from numpyro_diffusion_da.diagnostics.spectra import power_spectrum, roughness
from numpyro_diffusion_da.diagnostics.verification import (
    Flatness,
    area_weights,
    crps,
    energy_score,
    flatness,
    rank_histogram,
    rmse,
    spread,
    spread_skill,
)
from numpyro_diffusion_da.fields.departures import departure

__all__ = [
    "PALETTE",
    "PRESSURE_LEVELS",
    "REGIONS",
    "REJECTIONS",
    "Consistency",
    "Departures",
    "ErrorVariances",
    "Estimate",
    "Feedback",
    "Flatness",
    "area_weights",
    "background_consistency",
    "background_departures",
    "consistency",
    "crps",
    "departure",
    "departures",
    "energy_score",
    "error_variances",
    "flatness",
    "genealogy",
    "map_figure",
    "median_over_blocks",
    "non_gaussianity_figure",
    "pit_over_time",
    "power_spectrum",
    "predictive_at_point",
    "rank_histogram",
    "rmse",
    "roughness",
    "skill_figure",
    "spread",
    "spread_skill",
]
