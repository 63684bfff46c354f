"""Records of a filter's steps: what a step leaves behind, how it is checked, and the result that records make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.program.structure import Structure
from numpyro_diffusion_da.results.result import PER_PARTICLE, FilterResult
from numpyro_diffusion_da.smc.base import Info


class Keep(NamedTuple):
    """What a run keeps of its particles.

    Attributes:
        sites: names of the latent and deterministic sites that are kept; None for all.
        observed: whether a predictive draw and the log-likelihood of each observation are kept.
        forecasts: whether the one-step forecast that each particle came from is kept.
    """

    sites: tuple[str, ...] | None
    observed: bool
    forecasts: bool

    def of(self, sites: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
        """The kept part of the sites' values, by group and site.

        Raises:
            ValueError: a name that is not a latent or deterministic site.
        """
        if not self.observed:
            sites = {**sites, "posterior_predictive": {}, "log_likelihood": {}}
        if self.sites is None:
            return sites
        if unknown := set(self.sites) - set(sites["posterior"]):
            known = sorted(sites["posterior"])
            raise ValueError(f"keep names {sorted(unknown)}, but the latent and deterministic sites are {known}.")
        return {**sites, "posterior": {name: sites["posterior"][name] for name in self.sites}}


def record_step(
    algorithm: FilterAlgorithm,
    program: StateSpaceModel,
    keep: Keep,
    info: Info,
    particles: PyTree,
    inputs: TimeInputs,
) -> dict[str, Any]:
    """The record of one step, as nested dictionaries of arrays.

    Args:
        algorithm: the filter.
        program: the program at the arguments of the run.
        keep: what is kept of the particles.
        info: diagnostics of the step.
        particles: the particles before the step, leading axis N.
        inputs: the scan's inputs of the step.

    Raises:
        ValueError: forecasts are to be kept and the filter computes none, or an unknown site is.
    """
    first = jax.tree.map(lambda x: x[0], particles)
    return {
        **({"forecast": _forecast(algorithm, program, info)} if keep.forecasts else {}),
        "sites": keep.of(info.proposal.sites),
        "stats": {
            "log_weights": info.log_weights,
            "ancestors": info.ancestors,
            "ess": info.ess,
            "tempering": info.tempering,
            "log_evidence_increment": info.log_evidence_increment,
            "distinct_ancestors": info.distinct_ancestors,
            "log_weight_std": info.log_weight_std,
            "solver_residual": info.proposal.draw.solver_residual,
        },
        "passes": algorithm.passes(info)._asdict(),
        "observations": program.observations(first, inputs),
        **({} if info.check == () else {"rejected": info.check.rejected}),
        "nonfinite_weights": info.nonfinite_weights,
        "nonfinite_particles": info.nonfinite_particles,
    }


def _forecast(algorithm: FilterAlgorithm, program: StateSpaceModel, info: Info) -> Array:
    forecast = getattr(info.weighing, "forecast", None)
    if forecast is None:
        raise ValueError(
            f"{algorithm} computes no one-step forecasts; leave keep_forecasts out, "
            "or use FAAPF with Dirac or Moment weights."
        )
    return algorithm.parents(program, info.ancestors, forecast)


def check_record(record: dict[str, Any], step: int, num_particles: int) -> None:
    """Refuse a step whose observations are wrong, or whose particles all are.

    Raises:
        ValueError: an observation error that is not positive, an infinite observation, or an observed value that is
            compared with NaN; the sentence names the site and the step.
        FloatingPointError: every weight or every particle is non-finite.
    """
    for name, site in record["observations"].items():
        if site["bad_error"]:
            raise ValueError(
                f"the observation error of site '{name}' at step {step} is not positive and finite; "
                "give a standard deviation above zero (mark a missing value by NaN in the observation)."
            )
        if np.any(np.isinf(site["value"])):
            raise ValueError(f"site '{name}' has an infinite observation at step {step}; mark missing values with NaN.")
    for what, count in (("weights", record["nonfinite_weights"]), ("particles", record["nonfinite_particles"])):
        if count < num_particles:
            continue
        for name, site in record["observations"].items():
            if site["undefined"]:
                raise ValueError(
                    f"site '{name}' at step {step} compares {site['undefined']} observed values with NaN: the state "
                    "has no value there (sea surface temperature over land, for example); mark those observations "
                    "missing with NaN, or leave them out."
                )
        raise FloatingPointError(
            f"all {num_particles} {what} are non-finite at step {step}; check the observations and their errors at "
            "that step, and the guidance (fewer solver products, a larger observation error)."
        )


def collect(
    structure: Structure, attributes: dict[str, Any], chains: Sequence[Sequence[dict[str, Any]]]
) -> FilterResult:
    """The result of a run.

    Args:
        structure: the program's structure.
        attributes: the result's attributes.
        chains: for each chain the records of its steps, as numpy.
    """
    stacked = [jax.tree.map(lambda *v: np.stack(v), *steps) for steps in chains]
    records = jax.tree.map(lambda *v: np.stack(v), *stacked)  # (chain, time, ...)

    def by_draw(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x, 1, 2)

    groups = jax.tree.map(by_draw, records["sites"])
    observations = jax.tree.map(lambda x: x[0], records["observations"])
    has_state = structure.latent_name in groups["posterior"]
    diffusion = structure.diffusion
    return FilterResult(
        posterior=groups["posterior"],
        posterior_predictive=groups.get("posterior_predictive", {}),
        log_likelihood=groups.get("log_likelihood", {}),
        observed_data={n: np.where(s["observed"], s["value"], np.nan) for n, s in observations.items()},
        observed_mask={n: s["observed"] for n, s in observations.items()},
        observed_error={n: s["error"] for n, s in observations.items()},
        forecast=by_draw(records["forecast"]) if "forecast" in records else None,
        sample_stats={n: by_draw(x) if n in PER_PARTICLE else x for n, x in records["stats"].items()},
        network_passes=records["passes"],
        latent_name=structure.latent_name if has_state else next(iter(groups["posterior"])),
        layout=diffusion.prior.layout if diffusion is not None and has_state else None,
        attributes=attributes,
        rejected=records.get("rejected", {}),
    )
