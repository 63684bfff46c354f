"""Backward simulation: whole trajectories given all observations, from the filter's particles and a density.

The genealogy of a filter keeps only the links that it made (see `smoothing`). Where the transition has a density, every
particle of a time may be linked to every one of the next: given x_{k+1}, and c_k^i what the program carries on from
particle i of time k,

    P(x_k = x_k^i | x_{k+1}, y_{1:T}) = w_i / sum_j w_j,        w_i = p(x_{k+1} | c_k^i) p(y_{k+1} | x_{k+1}, c_k^i),

the particles being equally weighted (Godsill, Doucet & West 2004, J. Am. Stat. Assoc. 99, eq. 7 and algorithm 1). A
trajectory starts from a particle of the last time and goes back by draws from these weights; trajectories are
independent given the particles, and lines that have met may part again. The second factor is there only where what is
observed depends on c_k beside x_{k+1}.

A result holds the latent site and not the carries. They are made again, by the program, from the latent site's values;
that is right where a carry depends on nothing before, and refused where it does (a carry of two frames, say).

M trajectories over N particles take N M densities a step: the price, in network passes, is in the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.sites import check_density, log_density, pointwise_log_likelihood
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.results import smoothing
from numpyro_diffusion_da.results.result import FilterResult
from numpyro_diffusion_da.smc.base import map_particles, particle_keys, relative_to_highest


class Selection(NamedTuple):
    """One step back, for M trajectories.

    Attributes:
        chosen: which particle each trajectory comes from, shape (M,).
        ess: effective sample size of the weights it was chosen by, shape (M,).
        usable: whether any of the weights was positive and finite, shape (M,).
        sites: `StateSpaceModel.record` of the later time, along the trajectories; leading axis M.
        passes: network passes of the densities of one trajectory.
    """

    chosen: Int[Array, " m"]
    ess: Float[Array, " m"]
    usable: Bool[Array, " m"]
    sites: dict[str, dict[str, Array]]
    passes: NetworkPasses


def select(
    program: StateSpaceModel,
    rng_key: PRNGKeyArray,
    x: Float[Array, "n ..."],
    later: Float[Array, "m ..."],
    inputs: TimeInputs,
    later_inputs: TimeInputs,
    batch_size: int | None,
) -> Selection:
    """Choose the particle that each trajectory comes from.

    Args:
        program: at the arguments of the run.
        rng_key: one a step.
        x: the latent site's particles at time k.
        later: the trajectories' values of it at time k + 1.
        inputs: of time k.
        later_inputs: of time k + 1.
        batch_size: densities at a time; None for all N M at once.
    """
    choice_key, record_key = jax.random.split(rng_key)
    before = program.initial(jax.random.key(0))  # any carry: the next one does not depend on it
    carries = jax.vmap(lambda value: program.advance(value, before, inputs))(x)

    def log_weight(pair: Int[Array, ""]) -> tuple[Array, NetworkPasses]:
        value, carry = later[pair // len(x)], jax.tree.map(lambda c: c[pair % len(x)], carries)
        sites = program.sites(carry, later_inputs, value)
        log_prob, passes = log_density(
            program.structure.latent_name, sites.latent[program.structure.latent_name], value
        )
        if program.structure.observations_remember:
            log_prob += sum(jnp.sum(pointwise_log_likelihood(*site)) for site in sites.observed.values())
        return log_prob, passes

    log_weights, passes = map_particles(log_weight, batch_size)(jnp.arange(len(later) * len(x)))
    log_weights = jax.vmap(relative_to_highest)(log_weights.reshape(len(later), len(x)))
    keys = particle_keys(choice_key, len(later))
    chosen = jax.vmap(jax.random.categorical)(keys, log_weights)
    sites = map_particles(
        lambda key, value, i: program.record(key, value, jax.tree.map(lambda c: c[i], carries), later_inputs),
        batch_size,
    )(particle_keys(record_key, len(later)), later, chosen)
    usable = jnp.any(jnp.isfinite(log_weights), axis=1)
    ess = 1.0 / jnp.sum(jax.nn.softmax(log_weights) ** 2, axis=1)
    return Selection(chosen, ess, usable, sites, jax.tree.map(lambda n: n[0] * len(x), passes))


def check(program: StateSpaceModel, result: FilterResult, num_draws: int) -> None:
    """Refuse what cannot be simulated back, before anything is compiled.

    Raises:
        ValueError: one sentence that says what to do.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws={num_draws}; give 1 or more.")
    name = program.structure.latent_name
    if name not in result.posterior:
        raise ValueError(
            f"backward simulation needs the particles of '{name}', which this run did not keep; "
            "name it in keep=[...], or leave keep out."
        )
    program.look(lambda sites: check_density(name, sites.latent[name]))
    if program.structure.carry_remembers:
        raise ValueError(
            f"the carry of '{program.structure.name}' depends on the carry before it and not on '{name}' alone (two frames, or a "
            "function of both), so particles of different lines cannot be linked; smooth this program along its "
            "genealogy, Filter.smoothed(lag)."
        )


def bytes_of_density(program: StateSpaceModel, size: int) -> int:
    """Working memory of one transition density, in bytes; `size` is the number of values of the state."""
    transition = program.structure.diffusion
    tangents = 1 if transition is None or transition.density is None else transition.density.trace.products(size)
    return max(program.working_bytes() * tangents, 256 * size)


def simulate(
    rng_key: PRNGKeyArray,
    result: FilterResult,
    inputs: Callable[[int], TimeInputs],
    step: Callable[..., Selection],
    num_draws: int,
    kept: Callable[[dict[str, dict[str, Array]]], dict[str, dict[str, Array]]],
) -> FilterResult:
    """Go back from the last time in each chain.

    Args:
        rng_key: a chain's key is fold_in(rng_key, chain), a step's fold_in of that and the step.
        result: of the filter.
        inputs: step -> its inputs.
        step: `select` with everything but its keys, values and inputs.
        num_draws: trajectories M of each chain.
        kept: which of the recorded sites the result holds.

    Raises:
        FloatingPointError: no particle of a step can have led to a trajectory (naming the step).
    """
    particles = result.posterior[result.latent_name]
    chains, n, steps = particles.shape[:3]
    lines = np.empty((chains, num_draws, steps), np.int32)
    ess = np.full(lines.shape, n, np.float32)
    passes = {name: np.zeros((chains, steps)) for name in NetworkPasses._fields}
    recorded: list[list[PyTree]] = []
    for chain in range(chains):
        chain_key = jax.random.fold_in(rng_key, chain)
        # Without replacement, as far as there are particles: each is as likely as any other, and none is drawn twice.
        order = np.asarray(jax.random.permutation(jax.random.fold_in(chain_key, steps - 1), n))
        lines[chain, :, -1] = np.resize(order, num_draws)
        records = []
        for k in range(steps - 2, -1, -1):
            later = particles[chain, lines[chain, :, k + 1], k + 1]
            key = jax.random.fold_in(chain_key, k)
            selection = jax.device_get(step(key, particles[chain, :, k], later, inputs(k), inputs(k + 1)))
            if not selection.usable.all():
                raise FloatingPointError(
                    f"no particle of step {k} has a positive density of leading to step {k + 1}, for "
                    f"{np.sum(~selection.usable)} of {num_draws} trajectories; give the transition a spread that fits "
                    f"the distance between particles, or use more of them (there are {n})."
                )
            lines[chain, :, k], ess[chain, :, k] = selection.chosen, selection.ess
            for name, count in selection.passes._asdict().items():
                passes[name][chain, k] = count
            records.append(kept(selection.sites))
        recorded.append(records[::-1])
    moved = smoothing.along(result, lines, {"smoothing": "backward simulation"})
    # What is derived at a time may depend on the state before, which is another one now; that of the first time is as
    # it was, in the filter's own line.
    groups = ("posterior", "posterior_predictive", "log_likelihood")
    for group in groups if steps > 1 else ():
        for name, values in getattr(moved, group).items():
            for chain, records in enumerate(recorded):
                values[chain, :, 1:] = np.stack([record[group][name] for record in records], axis=1)
    own = ("log_weights",)  # of N particles, where the rest is of M trajectories
    stats: dict[str, Any] = {name: values for name, values in moved.sample_stats.items() if name not in own}
    stats |= {"backward_ess": ess, **{f"backward_passes_{name}": count for name, count in passes.items()}}
    return dataclasses.replace(moved, sample_stats=stats)
