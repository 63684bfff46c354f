"""Why a step of a filter has failed: what is not finite, in how many particles, and one sentence about the cause."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from numpyro_diffusion_da.program.structure import Structure
from numpyro_diffusion_da.results.background import FAR, FarValue
from numpyro_diffusion_da.smc.base import Info, finite_leaves, map_particles
from numpyro_diffusion_da.spelling import spelled_step


def count_failures(structure: Structure, info: Info, before: PyTree, after: PyTree) -> dict[str, Any]:
    """Count the particles in which each part of a step is not finite.

    Args:
        structure: structure of the program.
        info: diagnostics of the step.
        before: carries of the particles before the step, leading axis N.
        after: carries of the particles after the step, leading axis N.

    Returns:
        Numbers of particles, by part: `before` and `carry` (each array of the carry, by name), `state` (the latent
        sites), `forecast` (one-step forecast means, if the filter computes them), `zero` and `nan` (observed sites, by
        name, whose log-likelihood is -inf or NaN).
    """
    sites = info.proposal.sites
    forecast = getattr(info.weighing, "forecast", None)
    totals = {name: map_particles(jnp.sum)(v) for name, v in sites["log_likelihood"].items()}
    return {
        "before": _by_leaf(structure, before),
        "carry": _by_leaf(structure, after),
        "state": {name: _count(v) for name, v in sites["posterior"].items() if name in structure.latent_names},
        **({} if forecast is None else {"forecast": _count(forecast)}),
        "zero": {name: jnp.sum(total == -jnp.inf) for name, total in totals.items()},
        "nan": {name: jnp.sum(jnp.isnan(total)) for name, total in totals.items()},
    }


def _by_leaf(structure: Structure, carry: PyTree) -> dict[str, Array]:
    """Number of particles in which each array of real numbers of the carry is not finite, by name."""
    leaves = zip(structure.carry, jax.tree.leaves(carry), strict=True)
    return {leaf.name: _count(values) for leaf, values in leaves if leaf.is_real}


def _count(values: Array) -> Array:
    """Number of particles, along the leading axis, with a value that is not finite."""
    return jnp.sum(~map_particles(finite_leaves)(values))


def why(failures: dict[str, Any], what: str, step: int, num_particles: int, guided: bool) -> str:
    """One sentence on why all weights or particles of a step are not finite.

    Args:
        failures: result of `count_failures`, as numpy arrays.
        what: "weights" or "particles".
        step: index of the step.
        num_particles: number of particles N.
        guided: whether the filter draws from a diffusion by guidance.
    """

    def every(counts: dict[str, Any]) -> list[str]:
        return [name for name, count in counts.items() if count >= num_particles]

    beginning = f"all {num_particles} {what} are non-finite at {spelled_step(step)}"
    if broken := every(failures["before"]):
        start = "the initial state" if step == 0 else f"the carry after {spelled_step(step - 1)}"
        return (
            f"{beginning}, because {start} is not finite in any particle (carry{broken[0]}); give the program finite "
            "first values, and carry only values that are finite where an observation is missing."
        )
    if failures.get("forecast", 0) >= num_particles:
        return (
            f"{beginning}, because the transition has no finite forecast from any particle; check the parameters of "
            "the prior or transition, and the inputs of that step (NaN in a forcing, for example)."
        )
    if drawn := every(failures["state"]):
        if guided:
            return (
                f"{beginning}, because no guided draw of site '{drawn[0]}' is finite; check the observations and their "
                "errors at that step, and that the prior gives finite draws without them (as ndda.Bootstrap makes), or "
                "make the guidance more stable by fewer products of its solver or a larger observation error."
            )
        return (
            f"{beginning}, because no draw of site '{drawn[0]}' is finite; check the parameters of its transition, and "
            "the inputs of that step (NaN in a forcing, for example)."
        )
    if broken := every(failures["carry"]):
        return (
            f"{beginning}, because the body returns a carry{broken[0]} that is not finite in any particle, although "
            "the state is; carry only values that are finite where an observation is missing."
        )
    if zero := every(failures["zero"]):
        return (
            f"{beginning}, because the likelihood of site '{zero[0]}' is zero at every particle; check that its "
            "observed values are possible under its distribution (a count is a whole number, for example), and that "
            "its error is not far too small."
        )
    if undefined := every(failures["nan"]):
        return (
            f"{beginning}, because the log-likelihood of site '{undefined[0]}' is NaN at every particle; check the "
            "parameters of its distribution at that step."
        )
    return f"{beginning}; check the observations and their errors at that step."


def far_observation(record: dict[str, Any], step: int) -> FarValue | None:
    """Observation of a failed step that is impossibly far from its background.

    Args:
        record: record of the step, as numpy arrays.
        step: index of the step.

    Returns:
        The farthest observation of the first such site; None if there is none.
    """
    for name, background in record.get("background", {}).items():
        observed = np.where(record["observations"][name]["observed"], record["observations"][name]["value"], np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = np.sqrt(background["variance"] + background["error_variance"], dtype=float)
            distance = np.nan_to_num(np.abs(observed.astype(float) - background["mean"]) / expected, posinf=0.0)
        if np.max(distance, initial=0.0) > FAR:
            at = tuple(int(i) for i in np.unravel_index(np.argmax(distance), distance.shape))
            value, mean, far = (float(values[at]) for values in (observed, background["mean"], distance))
            return FarValue(name, step, at, value, mean, far, count=1)
    return None
