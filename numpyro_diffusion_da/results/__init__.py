"""Results of a run: arrays, labeled forms for xarray and ArviZ, smoothing by genealogy, and printed summaries."""

from numpyro_diffusion_da.results.convert import parameters_to_arviz, parameters_to_datatree, to_arviz, to_datatree
from numpyro_diffusion_da.results.result import Background, FilterResult, MeanPasses, ParameterResult
from numpyro_diffusion_da.results.smoothing import distinct_ancestors_at, fixed_lag, trajectories
from numpyro_diffusion_da.results.summary import evidence_bias_reasons, parameter_summary_table, summary_table

__all__ = [
    "Background",
    "FilterResult",
    "MeanPasses",
    "ParameterResult",
    "distinct_ancestors_at",
    "evidence_bias_reasons",
    "fixed_lag",
    "parameter_summary_table",
    "parameters_to_arviz",
    "parameters_to_datatree",
    "summary_table",
    "to_arviz",
    "to_datatree",
    "trajectories",
]
