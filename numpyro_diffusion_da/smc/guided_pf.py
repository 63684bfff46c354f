r"""Guided particle filter (Doucet, Godsill & Andrieu 2000): move, weigh, resample.

Each particle moves by a draw $q(x' | c, y)$ that may depend on the observation, and gets the weight

$$w = \frac{p(y | x') \, p(x' | c)}{q(x' | c, y)},$$

or any estimate with the mean $p(y | c)$ that is made together with the draw. Without tempering, the product over steps
of the mean weights is an unbiased estimate of the evidence. The kernel needs one function of a model:

- ``propose_fn(rng_key, particle, observation) -> (particle, log w, record)``.

State and info are those of `fa_apf`. The log-weights belong to the moved particles before resampling, and
``info.proposal`` to the particles after resampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from numpyro_diffusion_da.smc.base import (
    Info,
    Kernel,
    Resampling,
    State,
    check_resample_below,
    check_target_ess,
    finite_leaves,
    init,
    make_info,
    map_particles,
    particle_keys,
    select,
    top_level_api,
    total_particles,
)
from numpyro_diffusion_da.smc.sharding import added, own, take_ancestors, traffic_of, whole

__all__ = ["Info", "State", "as_top_level_api", "build_kernel", "init"]

Propose = Callable[[PRNGKeyArray, PyTree, PyTree], tuple[PyTree, Any, PyTree]]
"""Weighted draw (rng_key, particle, observation) -> (new particle, log w, record), for one particle."""


def build_kernel(
    propose_fn: Propose,
    resampling_fn: Resampling | None = None,
    target_ess: float = 0.0,
    batch_size: int | None = None,
    resample_below: float = 1.0,
) -> Kernel:
    """Build the kernel of the guided particle filter.

    Args:
        propose_fn: (rng_key, particle, observation) -> (new particle, log w, record), for one particle.
        resampling_fn: resampling function from `blackjax.smc.resampling`; None for systematic resampling.
        target_ess: effective sample size that tempering aims at, as a fraction of N. The default 0 means no tempering,
            which keeps the estimate of the evidence unbiased.
        batch_size: number of particles mapped at a time, which bounds the memory; None maps all at once.
        resample_below: fraction of N, from 0 to 1. Particles are resampled if their effective sample size is below it,
            and keep their weights for the next step if it is not. Start from ``init(particles, resample_below)``. The
            default 1 resamples at every step.

    Returns:
        kernel(rng_key, state, observation) -> (State, Info), pure and jit-able. The records in `Info` are equally
        weighted also if the particles of the state are not: they are then those of resampled particles.

    Raises:
        ValueError: `target_ess` is outside [0, 1), `resample_below` is outside [0, 1], or weights are to be tempered
            and carried on.
    """
    target_ess = check_target_ess(target_ess, "guided_pf.build_kernel")
    resample_below = check_resample_below(resample_below, target_ess, "guided_pf.build_kernel")

    def kernel(rng_key: PRNGKeyArray, state: State, observation: PyTree) -> tuple[State, Info]:
        n = total_particles(state.particles)
        resampling_key, proposal_key = jax.random.split(rng_key)
        propose = map_particles(lambda key, particle: propose_fn(key, particle, observation), batch_size)
        moved, log_weights, record = propose(own(particle_keys(proposal_key, n)), state.particles)
        log_weights = whole(log_weights)
        log_weights = jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf)
        if resample_below < 1.0:
            log_weights = log_weights + state.log_weights
        ancestors, alpha = select(resampling_key, log_weights, resampling_fn, target_ess)
        if resample_below == 1.0:
            traffic = traffic_of((moved, record), ancestors)
            particles, record = take_ancestors((moved, record), ancestors)
            info = make_info(log_weights, ancestors, alpha, particles, (), record, traffic=traffic)
            return State(particles, state.log_evidence + info.log_evidence_increment), info
        # The records are those of resampled particles in any case, and so is the number that are not finite.
        traffic = traffic_of(record, ancestors)
        record = take_ancestors(record, ancestors)
        info = make_info(log_weights, ancestors, alpha, moved, (), record)
        finite = whole(map_particles(finite_leaves)(moved))
        resample = info.ess < resample_below * n
        chosen = jnp.where(resample, ancestors, jnp.arange(n))
        traffic = added(traffic, traffic_of(moved, chosen))
        particles = take_ancestors(moved, chosen)
        carried = jnp.where(resample, 0.0, log_weights - info.log_evidence_increment)
        new = State(particles, state.log_evidence + info.log_evidence_increment, carried)
        lost = jnp.sum(~finite[ancestors])
        return new, info._replace(resampled=resample, nonfinite_particles=lost, traffic=traffic)

    return kernel


as_top_level_api = top_level_api(build_kernel)
"""Build the filter as a `blackjax.base.SamplingAlgorithm`, with the arguments of `build_kernel`."""
