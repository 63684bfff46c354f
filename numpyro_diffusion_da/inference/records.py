"""Records of the steps of a filter run: how they are made and checked, and how they form a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.filters.placement import place_taper
from numpyro_diffusion_da.inference.failures import count_failures, far_observation, why
from numpyro_diffusion_da.inference.keeping import Keep
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.program.structure import Structure
from numpyro_diffusion_da.results.result import PER_PARTICLE, Background, FilterResult
from numpyro_diffusion_da.smc.base import Info, map_particles
from numpyro_diffusion_da.smc.sharding import first
from numpyro_diffusion_da.spelling import spelled_step

MOST_OF_BLOCKS = 2**20
"""Largest number of particles times blocks up to which a record holds weights and ancestors of blocks: 8 MB a step."""


def record_step(
    algorithm: FilterAlgorithm,
    program: StateSpaceModel,
    keep: Keep,
    info: Info,
    particles: PyTree,
    new: PyTree,
    inputs: TimeInputs,
) -> dict[str, Any]:
    """Make the record of one step.

    Args:
        algorithm: filter of the program.
        program: state-space model at the arguments of the run.
        keep: parts of the particles to keep.
        info: diagnostics of the step.
        particles: carries of the particles before the step, a pytree with a leading axis of N.
        new: carries of the particles after the step.
        inputs: inputs of the step.

    Returns:
        Nested dictionaries of arrays: `sites`, `reduced` (see `Keep`), `stats`, `passes` and `observations`, the
        numbers of non-finite weights and particles, `failures` (see `count_failures`), `metadata` if there are such
        sites, `unplaced` if places of observations move (see `unplaced_observations`), `forecast` if it is kept,
        `background` if the filter records it, `rejected` if the observations were checked, and `lagged` if the filter
        has a lag of L: the states L steps before on the lines of the new particles.

    Raises:
        ValueError: `keep` asks for forecasts and the filter computes none, `keep` names an unknown site, or the filter
            has a lag and `keep` leaves out the state.
    """
    line, name = info.proposal.line, program.structure.latent_name
    if algorithm.lag and keep.sites is not None and name not in keep.sites:
        raise ValueError(
            f"keep names {sorted(keep.sites)}, but the filter smooths '{name}' with lag={algorithm.lag}; add the name "
            "to keep, or leave lag out of the filter."
        )
    one = first(particles)
    unplaced = unplaced_observations(algorithm, program, one, inputs)
    return {
        **({"forecast": _forecast(algorithm, program, info)} if keep.forecasts else {}),
        "sites": keep.of(info.proposal.sites),
        "reduced": keep.reduced(info.proposal.sites["posterior"]),
        **({"metadata": program.metadata(inputs)} if program.structure.metadata_names else {}),
        "stats": {
            **_of_each_particle(info),
            "ess": info.ess,
            "tempering": info.tempering,
            "log_evidence_increment": info.log_evidence_increment,
            "distinct_ancestors": info.distinct_ancestors,
            "log_weight_std": info.log_weight_std,
            "solver_residual": _solver_residual(info),
            **({} if info.move == () else info.move._asdict()),
            **({} if isinstance(info.resampled, tuple) else {"resampled": info.resampled}),
            **({} if info.traffic == () else {f"bytes_{n}": x for n, x in info.traffic._asdict().items()}),
        },
        "passes": algorithm.passes(info)._asdict(),
        "observations": program.observations(one, inputs),
        **({"unplaced": unplaced} if unplaced else {}),
        **({} if info.check == () else {"rejected": info.check.rejected}),
        **_background(info),
        **({} if isinstance(line, tuple) else {"lagged": map_particles(lambda of_one: of_one[0])(line)}),
        "nonfinite_weights": info.nonfinite_weights,
        "nonfinite_particles": info.nonfinite_particles,
        "failures": count_failures(program.structure, info, particles, new),
    }


def _of_each_particle(info: Info) -> dict[str, Array]:
    """Weights and ancestors of the particles; nothing if they are those of too many blocks."""
    if info.ancestors.ndim > 1 and info.ancestors.size > MOST_OF_BLOCKS:
        return {}
    return {"log_weights": info.log_weights, "ancestors": info.ancestors}


def _solver_residual(info: Info) -> Array:
    """Largest relative residual of the linear solves of each particle: those of its draw, and of a common update."""
    of_draws: Array = info.proposal.draw.solver_residual
    return of_draws if isinstance(info.solver_residual, tuple) else jnp.maximum(of_draws, info.solver_residual)


def _background(info: Info) -> dict[str, Any]:
    """Background of the observed sites as nested dictionaries; empty if the filter records none."""
    sites = {} if info.background == () else info.background.sites
    return {"background": {name: site._asdict() for name, site in sites.items()}} if sites else {}


def unplaced_observations(
    algorithm: FilterAlgorithm, program: StateSpaceModel, carry: PyTree, inputs: TimeInputs
) -> dict[str, Int[Array, ""]]:
    """Number of observed values whose place is not finite, for each observed site whose places move.

    Args:
        algorithm: filter of the program.
        program: state-space model at the arguments of the run.
        carry: carry that the body takes.
        inputs: inputs of the step.
    """
    taper = algorithm.moving_taper()
    if taper is None:
        return {}
    placed, counts, start = jnp.asarray(place_taper(taper, program, inputs).placed()), {}, 0
    for name, site in program.observations(carry, inputs).items():
        observed = site["observed"].reshape(-1)
        if name in taper.moving:
            counts[name] = jnp.sum(observed & ~placed[start : start + len(observed)])
        start += len(observed)
    return counts


def check_places(unplaced: Mapping[str, Any], sources: Mapping[str, str], step: int | None) -> None:
    """Check that every observed value has a finite place.

    Args:
        unplaced: number of observed values without one, by observed site; see `unplaced_observations`.
        sources: name of the deterministic site that holds the places, by observed site.
        step: index of the step, for messages; None if it is not known.

    Raises:
        ValueError: an observed value has no finite place. The message names the site and the step.
    """
    for name, count in unplaced.items():
        if count:
            at = "" if step is None else f" at step {step}"
            raise ValueError(
                f"site '{name}' has {count} observed {'value' if count == 1 else 'values'}{at} whose place in the site "
                f"'{sources[name]}' is not finite; give a finite place, or mark what is missing by NaN in the "
                "observation."
            )


def check_metadata_names(structure: Structure) -> None:
    """Check that no site of `Structure.metadata_names` has a name that a `DataTree` gives to something else.

    Args:
        structure: structure of the program.

    Raises:
        ValueError: a site has the name of the errors or the missing values of an observed site.
    """
    for name in structure.observed_names:
        for taken, what in ((f"{name}_error", "standard deviations of the errors"), (f"{name}_missing", "mask")):
            if taken in structure.metadata_names:
                raise ValueError(
                    f"the deterministic site '{taken}' has the name under which results hold the {what} of '{name}'; "
                    "leave the site out, because results have these values without it, or give it another name."
                )


def _forecast(algorithm: FilterAlgorithm, program: StateSpaceModel, info: Info) -> Array:
    """One-step forecast from which each particle was drawn, with a leading axis of N.

    Raises:
        ValueError: the filter computes no forecasts.
    """
    forecast = getattr(info.weighing, "forecast", None)
    if forecast is None:
        raise ValueError(
            f"{algorithm} computes no one-step forecasts; leave keep_forecasts out, "
            "or use FAAPF with Dirac or Moment weights."
        )
    return algorithm.parents(program, info.ancestors, forecast)


def check_records(
    records: dict[str, Any], first: int, num_particles: int, guided: bool, sources: Mapping[str, str] = {}
) -> None:
    """Check the records of consecutive steps; see `check_record`, which is called where something may be wrong.

    Args:
        records: records of the steps, as numpy arrays with a leading axis of time.
        first: index of the first step, for messages.
        num_particles: number of particles N.
        guided: whether the filter draws from a diffusion by guidance.
        sources: name of the deterministic site that holds the places, for each observed site whose places move.
    """
    bad = (records["nonfinite_weights"] >= num_particles) | (records["nonfinite_particles"] >= num_particles)
    for site in records["observations"].values():
        infinite = np.isinf(site["value"]) if site["value"].dtype.kind == "f" else np.zeros(site["value"].shape, bool)
        bad = bad | site["bad_error"] | infinite.reshape(len(bad), -1).any(axis=1)
    for count in records.get("unplaced", {}).values():
        bad = bad | (count > 0)
    for i in np.flatnonzero(bad):
        check_record(at_step(records, int(i)), first + int(i), num_particles, guided, sources)


def at_step(records: PyTree, i: int) -> PyTree:
    """Record of one step, from records with a leading axis of time."""
    return jax.tree.map(lambda x: x[i], records)


def head(records: PyTree, count: int) -> PyTree:
    """First records, from records with a leading axis of time."""
    return jax.tree.map(lambda x: x[:count], records)


def join(records: Sequence[PyTree]) -> PyTree:
    """Join records of consecutive steps along their leading axis of time."""
    return records[0] if len(records) == 1 else jax.tree.map(lambda *parts: np.concatenate(parts), *records)


def check_record(
    record: dict[str, Any], step: int, num_particles: int, guided: bool, sources: Mapping[str, str] = {}
) -> None:
    """Check that the observations of a step are valid, and that not all of its weights or particles are non-finite.

    Args:
        record: record of the step, as numpy arrays.
        step: index of the step, for messages.
        num_particles: number of particles N.
        guided: whether the filter draws from a diffusion by guidance.
        sources: name of the deterministic site that holds the places, for each observed site whose places move.

    Raises:
        ValueError: an observation error is not positive and finite, an observation is infinite, an observed value has
            no finite place, or all weights or particles are non-finite because the state has no value where it is
            observed. The message names the site and the step.
        FloatingPointError: all weights or all particles are non-finite for another reason, which the message gives.
    """
    for name, site in record["observations"].items():
        if site["bad_error"]:
            raise ValueError(
                f"the observation error of site '{name}' at {spelled_step(step)} is not positive and finite; "
                "give a standard deviation above zero (mark a missing value by NaN in the observation)."
            )
        if np.any(np.isinf(site["value"])):
            raise ValueError(
                f"site '{name}' has an infinite observation at {spelled_step(step)}; mark missing values by NaN."
            )
    check_places(record.get("unplaced", {}), sources, step)
    for what, count in (("weights", record["nonfinite_weights"]), ("particles", record["nonfinite_particles"])):
        if count < num_particles:
            continue
        for name, site in record["observations"].items():
            if site["undefined"]:
                raise ValueError(
                    f"site '{name}' at {spelled_step(step)} compares {site['undefined']} observed values with NaN: the "
                    "state has no value there (sea surface temperature over land, for example); mark these "
                    "observations as missing by NaN, or leave them out."
                )
        if (far := far_observation(record, step)) is not None:
            words = far.words(with_step=False)
            raise FloatingPointError(
                f"all {num_particles} {what} are non-finite at {spelled_step(step)}, where {words}"
            )
        raise FloatingPointError(why(record["failures"], what, step, num_particles, guided))


def attributes_of(algorithm: FilterAlgorithm, program: StateSpaceModel, num_particles: int) -> dict[str, Any]:
    """Attributes of a result that say how it was made, apart from random keys.

    Args:
        algorithm: filter of the program.
        program: state-space model at the arguments of the run.
        num_particles: number of particles N.
    """
    emulator = program.structure.emulator
    return {
        "model": program.structure.name,
        "num_particles": num_particles,
        **({} if emulator is None else emulator.provenance()),
        **algorithm.settings(program),
        "evidence_bias_reasons": "; ".join(algorithm.weight_bias_reasons(program)),
    }


def collect(
    structure: Structure, attributes: dict[str, Any], chains: Sequence[dict[str, Any]], past: Sequence[Any] = ()
) -> FilterResult:
    """Make the result of a run from the records of its steps.

    Args:
        structure: structure of the program.
        attributes: attributes of the result.
        chains: records of the steps of each chain, as numpy arrays with a leading axis of time.
        past: `State.past` after the last step of each chain, if the filter has a lag; without it nothing is smoothed.
    """
    # One chain, the usual case, is not copied.
    records = jax.tree.map(lambda *v: v[0][None] if len(v) == 1 else np.stack(v), *chains)  # (chain, time, ...)

    def by_draw(x: np.ndarray) -> np.ndarray:
        """Move the axis of particles before that of time: (chain, time, draw, ...) -> (chain, draw, time, ...)."""
        return np.moveaxis(x, 1, 2)

    groups = jax.tree.map(by_draw, records["sites"])
    observations = jax.tree.map(lambda x: x[0], records["observations"])
    has_state = structure.latent_name in groups["posterior"]
    emulator = structure.emulator
    return FilterResult(
        posterior=groups["posterior"],
        posterior_predictive=groups.get("posterior_predictive", {}),
        log_likelihood=groups.get("log_likelihood", {}),
        observed_data={
            n: _observed_data(s["value"], s["observed"], structure.observed[n].is_discrete)
            for n, s in observations.items()
        },
        observed_mask={n: s["observed"] for n, s in observations.items()},
        observed_error={n: s["error"] for n, s in observations.items()},
        forecast=by_draw(records["forecast"]) if "forecast" in records else None,
        sample_stats={n: by_draw(x) if n in PER_PARTICLE else x for n, x in records["stats"].items()},
        network_passes=records["passes"],
        reduced=records.get("reduced", {}),
        latent_name=structure.latent_name if has_state or not groups["posterior"] else next(iter(groups["posterior"])),
        layout=emulator.layout if emulator is not None and (has_state or not groups["posterior"]) else None,
        attributes=attributes,
        rejected=records.get("rejected", {}),
        background={n: Background(**parts) for n, parts in records.get("background", {}).items()},
        metadata={n: x[0] for n, x in records.get("metadata", {}).items()},
        lagged=with_later_states(by_draw(records["lagged"]), past) if "lagged" in records and past else None,
    )


def with_later_states(left: np.ndarray, past: Sequence[Any]) -> np.ndarray:
    """States given the observations up to L steps later, (chain, draw, time, ...).

    Args:
        left: states L steps before each time, (chain, draw, time, ...). The first L of them are before the first time.
        past: the last L states after the last time, (draw, L, ...), for each chain.
    """
    return np.concatenate([left, np.stack(past)], axis=2)[:, :, -left.shape[2] :]


def _observed_data(value: np.ndarray, observed: np.ndarray, is_discrete: bool) -> np.ndarray:
    """Observed values of a site with NaN where missing; whole numbers if it is discrete and none is missing."""
    if is_discrete and observed.all():
        return value if value.dtype.kind in "iu" else value.astype(np.int32)
    return np.where(observed, value, np.nan)
