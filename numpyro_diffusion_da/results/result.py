"""The arrays of a filter run, before they are given names."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from numpyro_diffusion_da.fields.layout import Layout

PER_PARTICLE = frozenset({"log_weights", "ancestors", "solver_residual", "filter_draw"})
"""Statistics of a step that have a value for each particle."""

OF_WEIGHTS = frozenset({"log_weights", "ancestors", "ess", "tempering", "distinct_ancestors", "log_weight_std"})
"""Statistics of a step that have a value for each block, where ancestors are local."""


@dataclasses.dataclass(frozen=True)
class FilterResult:
    """The arrays of a run, as numpy; `convert.to_datatree` gives them names.

    Attributes:
        posterior: latent and deterministic sites, each (chain, draw, time, ...); draws are equally weighted.
        posterior_predictive: a draw of each observed site, (chain, draw, time, ...).
        log_likelihood: of each observed site, (chain, draw, time, ...); 0 where missing or rejected.
        observed_data: observed values, (time, ...), NaN where missing.
        observed_mask: False where missing, (time, ...).
        observed_error: standard deviation of each observation's error, (time, ...); NaN where it has none.
        forecast: the one-step forecast E[x' | c] that each particle came from, (chain, draw, time, ...), or None where
            it was not kept.
        sample_stats: (chain, time) or, for per-particle quantities, (chain, draw, time); with localized ancestors, what
            is said of weights has a last axis of blocks.
        network_passes: forward, jvp and vjp passes per particle and step, each (chain, time).
        latent_name: which posterior variable is the state; the first of them where the state was not kept.
        layout: the state's layout, or None where the transition has none.
        attributes: what is needed to run it again.
        rejected: True where a gross-error check left an observation out, by observed site that was checked,
            (chain, time, ...).
    """

    posterior: dict[str, np.ndarray]
    posterior_predictive: dict[str, np.ndarray]
    log_likelihood: dict[str, np.ndarray]
    observed_data: dict[str, np.ndarray]
    observed_mask: dict[str, np.ndarray]
    observed_error: dict[str, np.ndarray]
    forecast: np.ndarray | None
    sample_stats: dict[str, np.ndarray]
    network_passes: dict[str, np.ndarray]
    latent_name: str
    layout: Layout | None
    attributes: dict[str, Any]
    rejected: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether ancestors are local: what is said of weights then has a last axis of blocks."""
        return "log_weights" in self.sample_stats and self.sample_stats["log_weights"].ndim > 3


@dataclasses.dataclass(frozen=True)
class ParameterResult:
    """Draws of a program's global parameters, as numpy; `convert.parameters_to_datatree` gives them names.

    Attributes:
        posterior: the parameters, each (chain, draw, ...); draws are equally weighted.
        sample_stats: (chain, draw) of a chain, or (chain, time) of a filter over parameters.
        over_time: the parameters given y_1, ..., y_k, each (chain, draw, time, ...); empty for a chain.
        attributes: what is needed to run it again, and what was found about the evidence.
    """

    posterior: dict[str, np.ndarray]
    sample_stats: dict[str, np.ndarray]
    over_time: dict[str, np.ndarray]
    attributes: dict[str, Any]
