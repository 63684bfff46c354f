"""The bootstrap particle filter (Gordon, Salmond & Smith 1993): move, weigh, resample.

The control that shows what guidance buys. The kernel asks of a model

- ``propose_fn(rng_key, particle, observation) -> (particle, record)``, a draw that does not look at the observation,
- ``log_likelihood_fn(particle, record, observation) -> log p(y | x)`` of the new particle.

State and info are those of `fa_apf`; the log-weights belong to the moved particles, before resampling, and
``info.proposal`` to the particles after it.
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
    check_target_ess,
    init,
    make_info,
    map_particles,
    num_particles,
    particle_keys,
    select,
)

__all__ = ["Info", "State", "as_top_level_api", "build_kernel", "init"]


def build_kernel(
    propose_fn: Callable[[PRNGKeyArray, PyTree, PyTree], tuple[PyTree, PyTree]],
    log_likelihood_fn: Callable[[PyTree, PyTree, PyTree], Any],
    resampling_fn: Resampling | None = None,
    target_ess: float = 0.0,
    batch_size: int = 0,
) -> Kernel:
    """Build the kernel; arguments as `fa_apf.build_kernel`, without inflation by default.

    Raises:
        ValueError: target_ess outside [0, 1).
    """
    from blackjax.smc.resampling import systematic

    check_target_ess(target_ess)
    resample = systematic if resampling_fn is None else resampling_fn

    def kernel(rng_key: PRNGKeyArray, state: State, observation: PyTree) -> tuple[State, Info]:
        n = num_particles(state.particles)
        resampling_key, proposal_key = jax.random.split(rng_key)

        def move(key: PRNGKeyArray, particle: PyTree) -> Any:
            moved, record = propose_fn(key, particle, observation)
            return moved, record, log_likelihood_fn(moved, record, observation)

        moved, record, log_weights = map_particles(move, batch_size)(particle_keys(proposal_key, n), state.particles)
        log_weights = jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf)
        ancestors, alpha = select(resampling_key, log_weights, resample, target_ess)
        particles, record = jax.tree.map(lambda x: x[ancestors], (moved, record))
        info = make_info(log_weights, ancestors, alpha, particles, (), record)
        return State(particles, state.log_evidence + info.log_evidence_increment), info

    return kernel


def as_top_level_api(
    propose_fn: Callable[[PRNGKeyArray, PyTree, PyTree], tuple[PyTree, PyTree]],
    log_likelihood_fn: Callable[[PyTree, PyTree, PyTree], Any],
    resampling_fn: Resampling | None = None,
    target_ess: float = 0.0,
    batch_size: int = 0,
) -> Any:
    """The filter as a `blackjax.base.SamplingAlgorithm`; arguments as `build_kernel`."""
    from blackjax.base import SamplingAlgorithm

    kernel = build_kernel(propose_fn, log_likelihood_fn, resampling_fn, target_ess, batch_size)
    return SamplingAlgorithm(init, kernel)
