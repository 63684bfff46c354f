"""The ensemble Kalman filter: no weights, a linear update with the ensemble's own covariances.

The baseline of the trade. The kernel asks of a model

- ``forecast_fn(rng_key, particle, observation) -> (x, record)``: a draw of the next state,
- ``residual_fn(x, particle, observation) -> R^{-1/2} (y - h(x))``, zero where missing,
- ``advance_fn(rng_key, x, particle, observation, record) -> (particle, record)``: the particle once x is analysed,

and of an `EnsembleUpdate` what is added to each member: with perturbed observations or by a square root, with a taper
or without. The spread is repaired before it (`inflation`) or after it (`rtps`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

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
        rtps: relaxation to prior spread, see `relaxed`; 0 for none.

    Raises:
        ValueError: inflation below 1, or rtps outside [0, 1]; from the kernel, fewer than two particles.
    """
    check_spread_repair(inflation, rtps)
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
        prior = (x - mean).reshape(n, -1)
        x = x + add(error_key, prior, residual, taper).reshape(x.shape)
        if rtps:
            x = relaxed(x, jnp.std(prior, axis=0).reshape(x.shape[1:]), rtps)

        advance = map_particles(
            lambda key, x, particle, record: advance_fn(key, x, particle, observation, record), batch_size
        )
        particles, record = advance(particle_keys(advance_key, n), x, state.particles, record)
        zeros = jnp.zeros(n, residual.dtype)
        info = make_info(zeros, jnp.arange(n), jnp.ones(()), particles, (), record)
        return State(particles, state.log_evidence), info

    return kernel


def relaxed(x: Float[Array, "n ..."], prior_spread: Float[Array, ...], rtps: float) -> Float[Array, "n ..."]:
    """Relaxation to prior spread (Whitaker & Hamill 2012): s_a becomes s_a + rtps (s_b - s_a) in each component.

    Args:
        x: members of the analysis.
        prior_spread: standard deviations s_b of the forecast.
        rtps: from 0, the analysis' own spread s_a, to 1, the forecast's.
    """
    mean, spread = x.mean(0, keepdims=True), jnp.std(x, axis=0)
    known = spread > 0.0
    factor = jnp.where(known, 1.0 + rtps * (prior_spread / jnp.where(known, spread, 1.0) - 1.0), 1.0)
    return mean + factor[None] * (x - mean)


def check_spread_repair(inflation: float, rtps: float) -> None:
    """Refuse settings that would shrink the ensemble.

    Raises:
        ValueError: inflation below 1, or rtps outside [0, 1].
    """
    if not inflation >= 1.0:
        raise ValueError(f"EnKF got inflation={inflation}; give 1.0 (none) or more.")
    if not 0.0 <= rtps <= 1.0:
        raise ValueError(f"EnKF got rtps={rtps}; give 0.0 (none) to 1.0 (the forecast's whole spread).")
