"""The ensemble Kalman filter: no weights, a linear update with the ensemble's own covariances.

The baseline of the trade. The kernel asks of a model

- ``forecast_fn(rng_key, particle, observation) -> (x, record)``: a draw of the next state,
- ``residual_fn(x, particle, observation) -> R^{-1/2} (y - h(x))``, zero where missing,
- ``advance_fn(rng_key, x, particle, observation, record) -> (particle, record)``: the particle once x is analysed,

and of an `EnsembleUpdate` what is added to each member: with perturbed observations or by a square root, with a taper
or without. The spread is repaired before it (`inflation`) or after it (`rtps`, `spread_repair`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from numpyro_diffusion_da.smc.base import (
    Info,
    Kernel,
    State,
    init,
    make_info,
    map_particles,
    num_particles,
    particle_keys,
)
from numpyro_diffusion_da.smc.ensemble_update import EnsembleUpdate, PerturbedObservations
from numpyro_diffusion_da.smc.inflation import RTPS, SpreadRepair, check_repairs, is_traced, repaired
from numpyro_diffusion_da.smc.localization import PlacedTaper

__all__ = ["Info", "State", "build_kernel", "init"]


def build_kernel(
    forecast_fn: Callable[[PRNGKeyArray, PyTree, PyTree], tuple[Any, PyTree]],
    residual_fn: Callable[[Any, PyTree, PyTree], Any],
    advance_fn: Callable[[PRNGKeyArray, Any, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    inflation: float = 1.0,
    batch_size: int = 0,
    update: EnsembleUpdate | None = None,
    taper: PlacedTaper | None = None,
    rtps: float = 0.0,
    spread_repair: Sequence[SpreadRepair] = (),
) -> Kernel:
    """Build the kernel.

    Args:
        forecast_fn: see the module.
        residual_fn: see the module.
        advance_fn: see the module.
        inflation: factor on the forecast anomalies before the update, at least 1.
        batch_size: particles mapped at a time; 0 for all at once.
        update: `PerturbedObservations()` by default, or `SquareRoot()`.
        taper: localisation at the places of the model's values; None for none.
        rtps: relaxation to prior spread, `RTPS(rtps)` before any other `spread_repair`; 0 for none.
        spread_repair: what is done to the analysis, in this order.

    Raises:
        TypeError: what is no sequence of repairs.
        ValueError: inflation below 1, or rtps outside [0, 1]; from the kernel, fewer than two particles.
    """
    check_spread_repair(inflation, rtps)
    check_repairs(spread_repair, "EnKF", paired=True)
    repairs = (*((RTPS(rtps),) if is_traced(rtps) or rtps else ()), *spread_repair)
    add = PerturbedObservations() if update is None else update

    def kernel(rng_key: PRNGKeyArray, state: State, observation: PyTree) -> tuple[State, Info]:
        n = num_particles(state.particles)
        if n < 2:
            raise ValueError("EnKF got one particle, and one particle has no covariance; give 2 or more.")
        forecast_key, error_key, advance_key = jax.random.split(rng_key, 3)

        forecast = map_particles(lambda key, particle: forecast_fn(key, particle, observation), batch_size)
        x, record = forecast(particle_keys(forecast_key, n), state.particles)
        mean = x.mean(0, keepdims=True)
        x = mean + inflation * (x - mean)
        residual = jax.vmap(lambda x, particle: residual_fn(x, particle, observation))(x, state.particles)
        prior = x
        x = x + add(error_key, (x - mean).reshape(n, -1), residual, taper).reshape(x.shape)
        # A fourth key beside the three, which are the same with and without repair.
        x = repaired(repairs, jax.random.split(rng_key, 4)[3], x, prior)

        advance = map_particles(
            lambda key, x, particle, record: advance_fn(key, x, particle, observation, record), batch_size
        )
        particles, record = advance(particle_keys(advance_key, n), x, state.particles, record)
        zeros = jnp.zeros(n, residual.dtype)
        info = make_info(zeros, jnp.arange(n), jnp.ones(()), particles, (), record)
        return State(particles, state.log_evidence), info

    return kernel


def check_spread_repair(inflation: float, rtps: float) -> None:
    """Refuse settings that would shrink the ensemble.

    Raises:
        ValueError: inflation below 1, or rtps outside [0, 1].
    """
    if not (is_traced(inflation) or inflation >= 1.0):
        raise ValueError(f"EnKF got inflation={inflation}; give 1.0 (none) or more.")
    if not (is_traced(rtps) or 0.0 <= rtps <= 1.0):
        raise ValueError(f"EnKF got rtps={rtps}; give 0.0 (none) to 1.0 (the forecast's whole spread).")
