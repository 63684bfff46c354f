"""The stochastic ensemble Kalman filter (Burgers, van Leeuwen & Evensen 1998), with perturbed observations.

The baseline of the trade: no weights, a linear update with the ensemble's own covariances. The kernel asks of a model

- ``forecast_fn(rng_key, particle, observation) -> (x, record)``: a draw of the next state,
- ``residual_fn(x, particle, observation) -> R^{-1/2} (y - h(x))``, zero where missing,
- ``advance_fn(rng_key, x, particle, observation, record) -> (particle, record)``: the particle once x is analysed.

In these residuals R = I and Cov[x, h] = -Cov[x, r]: with anomalies X, Y of N members, the gain of a perturbed
innovation r_i + e_i is X Y^T (Y Y^T + (N - 1) I)^{-1}, solved in the smaller of observation and ensemble space.
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
    State,
    init,
    make_info,
    map_particles,
    num_particles,
    particle_keys,
)

__all__ = ["Info", "State", "build_kernel", "init"]


def build_kernel(
    forecast_fn: Callable[[PRNGKeyArray, PyTree, PyTree], tuple[Any, PyTree]],
    residual_fn: Callable[[Any, PyTree, PyTree], Any],
    advance_fn: Callable[[PRNGKeyArray, Any, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    inflation: float = 1.0,
    batch_size: int = 0,
) -> Kernel:
    """Build the kernel.

    Args:
        forecast_fn: see the module.
        residual_fn: see the module.
        advance_fn: see the module.
        inflation: factor on the forecast anomalies before the update, at least 1.
        batch_size: particles mapped at a time; 0 for all at once.

    Raises:
        ValueError: inflation below 1; from the kernel, fewer than two particles.
    """
    if inflation < 1.0:
        raise ValueError(f"EnKF got inflation={inflation}; give 1.0 (none) or more.")

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
        observed = jnp.any(residual != 0.0, axis=0)  # a missing value has a zero residual in every member
        errors = jax.vmap(lambda key: jax.random.normal(key, residual.shape[1:], residual.dtype))(
            particle_keys(error_key, n)
        )
        errors = errors - errors.mean(0, keepdims=True)
        innovation = jnp.where(observed[None], residual + errors, 0.0)
        anomalies = (x - mean).reshape(n, -1)
        predicted = residual.mean(0, keepdims=True) - residual
        m = residual.shape[1]
        if m <= n:
            weights = jnp.linalg.solve(predicted.T @ predicted + (n - 1) * jnp.eye(m), innovation.T).T @ predicted.T
        else:
            gram = predicted @ predicted.T + (n - 1) * jnp.eye(n)
            weights = jnp.linalg.solve(gram, predicted @ innovation.T).T
        x = x + (weights @ anomalies).reshape(x.shape)

        advance = map_particles(
            lambda key, x, particle, record: advance_fn(key, x, particle, observation, record), batch_size
        )
        particles, record = advance(particle_keys(advance_key, n), x, state.particles, record)
        zeros = jnp.zeros(n, residual.dtype)
        info = make_info(zeros, jnp.arange(n), jnp.ones(()), particles, (), record)
        return State(particles, state.log_evidence), info

    return kernel
