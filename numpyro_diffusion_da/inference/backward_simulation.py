r"""Backward simulation: draws of whole trajectories given all observations, from particles and a transition density.

The genealogy of a filter contains only the links between particles that the filter made (`results.trajectories`). If
the transition has a density, each particle of one time can be linked to each particle of the next. Let $c_k^i$ be the
carry of the program after particle i of time k. The particles are equally weighted, so for a given $x_{k+1}$

$$
P(x_k = x_k^i \mid x_{k+1}, y_{1:T}) = \frac{w_i}{\sum_j w_j}, \qquad
w_i = p(x_{k+1} \mid c_k^i) \, p(y_{k+1} \mid x_{k+1}, c_k^i)
$$

(Godsill, Doucet & West 2004, J. Am. Stat. Assoc. 99, eq. 7 and algorithm 1). A trajectory starts from a particle of the
last time and goes backward by draws from these weights. Given the particles and where they start, trajectories are
independent, and two that have met can part again. The second factor of w is needed only if the observations depend on
$c_k$ in addition to $x_{k+1}$.

A result contains the latent site but not the carries. The program recomputes the carries from the values of the latent
site. This is correct if a carry does not depend on the carry before it. Other programs are refused, for example one
that carries two frames.

M trajectories over N particles take N M densities per step. The result contains the network passes that they cost.
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
    """Result of one backward step for M trajectories.

    Attributes:
        chosen: index of the particle that each trajectory comes from, shape (M,).
        ess: effective sample size of the weights from which it was drawn, shape (M,).
        usable: whether any of these weights was positive and finite, shape (M,).
        sites: values of the sites at the later time along the trajectories, by group and site, with a leading axis of
            M; see `StateSpaceModel.record`.
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
    """Choose the particle of time k that each trajectory comes from.

    Args:
        program: state-space model at the arguments of the run.
        rng_key: random key of the step.
        x: particles of the latent site at time k, shape (N, *state).
        later: values of the latent site on the trajectories at time k + 1, shape (M, *state).
        inputs: inputs of time k.
        later_inputs: inputs of time k + 1.
        batch_size: number of densities computed at a time; None for all N M at once.
    """
    choice_key, record_key = jax.random.split(rng_key)
    # Any carry will do here: `check` has made sure that the next carry does not depend on it.
    before = program.initial(jax.random.key(0))
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

    # Weigh all N M pairs of a trajectory and a particle.
    log_weights, passes = map_particles(log_weight, batch_size)(jnp.arange(len(later) * len(x)))
    log_weights = jax.vmap(relative_to_highest)(log_weights.reshape(len(later), len(x)))
    # Draw a particle for each trajectory, and recompute the sites of the later time from its carry.
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
    """Check that a run allows backward simulation, before anything is compiled.

    Args:
        program: state-space model at the arguments of the run.
        result: result of the filter.
        num_draws: number of trajectories of each chain.

    Raises:
        ValueError: `num_draws` is below 1, the run did not keep the latent site, the transition has no density, or the
            carry depends on more than the latent site.
    """
    if num_draws < 1:
        raise ValueError(f"backward simulation got num_draws={num_draws}; give 1 or more.")
    name = program.structure.latent_name
    if name not in result.posterior:
        raise ValueError(
            f"backward simulation needs the particles of '{name}', which this run did not keep; "
            "add the name to keep=[...], or leave keep out."
        )
    program.look(lambda sites: check_density(name, sites.latent[name]))
    if program.structure.carry_remembers:
        raise ValueError(
            f"the carry of '{program.structure.name}' depends on the carry before it and not on '{name}' alone (two "
            "frames, for example), so particles of different lines cannot be linked; smooth this program by its "
            "genealogy, with Filter.smoothed(lag)."
        )


def bytes_of_density(program: StateSpaceModel, size: int) -> int:
    """Estimate the working memory of one transition density, in bytes; `size` is the number of values of the state."""
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
    """Draw trajectories backward from the last time, in each chain.

    Args:
        rng_key: random key; chains and steps fold their indices into it.
        result: result of the filter.
        inputs: function from the index of a step to its inputs.
        step: function (rng_key, x, later, inputs, later_inputs) -> `Selection`, with the arguments of `select`.
        num_draws: number of trajectories M of each chain.
        kept: function that selects the recorded sites which the result keeps.

    Returns:
        Smoothed result with M draws in place of the N particles. `sample_stats` has no `log_weights`, but also
        `backward_ess`, shape (chain, draw, time), and `backward_passes_*`, each (chain, time).

    Raises:
        FloatingPointError: no particle of a step can have led to a trajectory; the message names the step.
    """
    particles = result.posterior[result.latent_name]
    chains, n, steps = particles.shape[:3]
    lines = np.empty((chains, num_draws, steps), np.int32)
    ess = np.full(lines.shape, n, np.float32)
    passes = {name: np.zeros((chains, steps)) for name in NetworkPasses._fields}
    recorded: list[list[PyTree]] = []
    for chain in range(chains):
        chain_key = jax.random.fold_in(rng_key, chain)
        # Particles of the last time are equally likely. They are drawn without replacement, while there are enough.
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
                    f"{np.sum(~selection.usable)} of {num_draws} trajectories; give the transition a spread as large "
                    f"as the distance between particles, or use more than {n} particles."
                )
            lines[chain, :, k], ess[chain, :, k] = selection.chosen, selection.ess
            for name, count in selection.passes._asdict().items():
                passes[name][chain, k] = count
            records.append(kept(selection.sites))
        recorded.append(records[::-1])
    moved = smoothing.along(result, lines, {"smoothing": "backward simulation"})
    # Sites of a time may depend on the state before, which has changed on a trajectory, so recorded values replace
    # them. At the first time the state before is that of the filter.
    groups = ("posterior", "posterior_predictive", "log_likelihood")
    for group in groups if steps > 1 else ():
        for name, values in getattr(moved, group).items():
            for chain, records in enumerate(recorded):
                values[chain, :, 1:] = np.stack([record[group][name] for record in records], axis=1)
    own = ("log_weights",)  # has an axis of N particles, whereas the result has M trajectories
    stats: dict[str, Any] = {name: values for name, values in moved.sample_stats.items() if name not in own}
    stats |= {"backward_ess": ess, **{f"backward_passes_{name}": count for name, count in passes.items()}}
    return dataclasses.replace(moved, sample_stats=stats)
