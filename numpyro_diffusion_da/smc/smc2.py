r"""SMC^2 (Chopin, Jacob & Papaspiliopoulos 2013): a particle filter over parameters, each with its own state filter.

One step takes weighted parameters $\theta_m$, each with a filter, and a new observation $y_k$:

1. Each filter assimilates the observation. Its estimate of $p(y_k | y_{1:k-1}, \theta_m)$ multiplies the weight of
   $\theta_m$.
2. If the effective sample size is below its target, the pairs of parameters and filter are resampled, and steps of
   `pmmh` move each $\theta_m$. Each such step runs a new filter from the first observation to this one. The weights are
   then equal.

The weighted mean of the estimates in step 1 estimates $p(y_k | y_{1:k-1})$, with the parameters integrated out. The
kernel needs three functions of a model:

- ``log_prior_fn(parameters) -> log p(theta)``,
- ``advance_fn(rng_key, parameters, filter, step) -> (filter, log-evidence increment)`` for the observation of time
  `step`,
- ``restart_fn(rng_key, parameters, number) -> (log-evidence, filter)`` after the first `number` observations; `number`
  is traced.

On a mesh of devices each holds M / D of the parameters' filters and runs them as without a mesh. Parameters and weights
are whole on all devices, a few numbers for each. Resampling moves whole filters, and only those that a device lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from numpyro_diffusion_da.smc import pmmh
from numpyro_diffusion_da.smc.base import (
    Resampling,
    guarded,
    load_blackjax,
    particle_keys,
    relative_to_highest,
)
from numpyro_diffusion_da.smc.mesh import gathered_bytes, map_filters, on_all_devices, take_filters
from numpyro_diffusion_da.smc.sharding import Traffic


class SMC2State(NamedTuple):
    """State of SMC^2: all that the next step needs.

    Attributes:
        positions: parameters as `pmmh.Position` with a leading axis of M. The record of each is its filter.
        log_weights: log-weights of the parameters, shape (M,), not normalized.
        log_evidence: estimate of log p(y_{1:k}), with the parameters integrated out.
    """

    positions: pmmh.Position
    log_weights: Float[Array, " m"]
    log_evidence: Float[Array, ""]


class SMC2Info(NamedTuple):
    """Diagnostics of one step of SMC^2.

    Attributes:
        ess: effective sample size of the weights of the parameters, before any move.
        log_evidence_increment: log sum_m W_m p^(y_k | y_{1:k-1}, theta_m).
        moved: whether the parameters were resampled and moved.
        acceptance_rate: acceptance rate of the moves; NaN if there were none.
        draws: equally weighted parameters, resampled if the weights are not equal, shape (M, d).
        traffic: `Traffic` between devices, if they share the filters; () if there is one device.
    """

    ess: Float[Array, ""]
    log_evidence_increment: Float[Array, ""]
    moved: Bool[Array, ""]
    acceptance_rate: Float[Array, ""]
    draws: Float[Array, "m d"]
    traffic: Traffic | tuple[()] = ()


def init(
    parameters: Float[Array, "m d"],
    filters: PyTree,
    log_prior: Float[Array, " m"],
    log_weights: Float[Array, " m"],
    mesh: Mesh | None = None,
) -> SMC2State:
    """State before the first observation.

    Args:
        parameters: draws of the parameters from the prior.
        filters: filter of each draw before the first observation, leading axis M.
        log_prior: log p(theta) of each draw.
        log_weights: zeros, or the log-likelihood of each draw for observations of the parameters outside the series.
        mesh: devices that share the filters; None for one device.
    """
    positions = _whole(pmmh.Position(parameters, log_prior, jnp.zeros(len(parameters)), filters), mesh)
    log_weights = on_all_devices(log_weights, mesh)
    return SMC2State(positions, log_weights, jax.nn.logsumexp(log_weights) - math.log(len(log_weights)))


def build_kernel(
    log_prior_fn: pmmh.LogPrior,
    advance_fn: Callable[[PRNGKeyArray, Float[Array, " d"], PyTree, Int[Array, ""]], tuple[PyTree, Float[Array, ""]]],
    restart_fn: Callable[[PRNGKeyArray, Float[Array, " d"], Int[Array, ""]], tuple[Float[Array, ""], PyTree]],
    num_moves: int,
    target_ess: float,
    batch_size: int | None = None,
    resampling_fn: Resampling | None = None,
    mesh: Mesh | None = None,
) -> Callable[[PRNGKeyArray, SMC2State, Int[Array, ""]], tuple[SMC2State, SMC2Info]]:
    """Build the kernel of SMC^2.

    Args:
        log_prior_fn: parameters -> log p(theta).
        advance_fn: (rng_key, parameters, filter, step) -> (filter, log-evidence increment), for the observation of time
            `step`.
        restart_fn: (rng_key, parameters, number) -> (log-evidence, filter), after the first `number` observations.
        num_moves: number of steps of `pmmh` after each resampling.
        target_ess: parameters are resampled and moved if the effective sample size is below this fraction of M.
        batch_size: number of parameters mapped at a time on each device, which bounds the memory; None maps all at
            once.
        resampling_fn: resampling function from `blackjax.smc.resampling`; None for systematic resampling.
        mesh: devices that share the parameters equally, each with its filter, with one axis "particles"; None for one
            device.

    Returns:
        kernel(rng_key, state, step) -> (SMC2State, SMC2Info).
    """
    load_blackjax()
    from blackjax.smc.ess import ess as effective_sample_size

    resample = guarded(resampling_fn)

    def move(
        rng_key: PRNGKeyArray, state: SMC2State, number: Int[Array, ""]
    ) -> tuple[SMC2State, Float[Array, ""], Traffic | tuple[()]]:
        m = len(state.log_weights)
        resampling_key, move_key = jax.random.split(rng_key)
        weights = jax.nn.softmax(relative_to_highest(state.log_weights))
        factor = _proposal_factor(state.positions.parameters, weights)
        ancestors = resample(resampling_key, weights, m)
        filters, traffic = take_filters(state.positions.record, ancestors, mesh)
        of_ancestors = jax.tree.map(lambda x: x[ancestors], state.positions._replace(record=()))
        chains = jax.vmap(pmmh.at)(of_ancestors._replace(record=filters))
        kernel = pmmh.build_kernel(log_prior_fn, lambda key, theta: restart_fn(key, theta, number))

        def one(key: PRNGKeyArray, chain: Any) -> tuple[Any, Float[Array, ""]]:
            def step(carry: Any, i: Int[Array, ""]) -> tuple[Any, Float[Array, ""]]:
                carry, info = kernel(jax.random.fold_in(key, i), carry, factor)
                return carry, info.acceptance_rate

            chain, rates = jax.lax.scan(step, chain, jnp.arange(num_moves))
            return chain, jnp.mean(rates)

        chains, rates = map_filters(one, mesh, batch_size)(particle_keys(move_key, m), chains)
        positions, rates = _whole(chains.position, mesh), on_all_devices(rates, mesh)
        if mesh is not None:
            gathered = gathered_bytes((positions._replace(record=()), rates), mesh)
            traffic = traffic._replace(gathered=jnp.asarray(gathered))
        return SMC2State(positions, jnp.zeros(m), state.log_evidence), jnp.mean(rates), traffic

    def kernel(rng_key: PRNGKeyArray, state: SMC2State, step: Int[Array, ""]) -> tuple[SMC2State, SMC2Info]:
        m = len(state.log_weights)
        advance_key, move_key, draw_key = jax.random.split(rng_key, 3)
        old = state.positions

        def advance(key: PRNGKeyArray, theta: Array, filter: PyTree) -> tuple[PyTree, Float[Array, ""]]:
            return advance_fn(key, theta, filter, step)

        # Let each filter assimilate the observation, and reweight the parameters.
        keys = particle_keys(advance_key, m)
        filters, increments = map_filters(advance, mesh, batch_size)(keys, old.parameters, old.record)
        increments = on_all_devices(increments, mesh)
        log_weights = state.log_weights + increments
        increment = jax.nn.logsumexp(log_weights) - jax.nn.logsumexp(state.log_weights)
        positions = pmmh.Position(old.parameters, old.log_prior, old.log_evidence + increments, filters)
        ess = effective_sample_size(relative_to_highest(log_weights))
        low = ~(ess >= target_ess * m)
        state = SMC2State(positions, log_weights, state.log_evidence + increment)
        # Resample and move the parameters if the effective sample size is low.
        unmoved = () if mesh is None else Traffic(*jnp.zeros(3))
        state, rate, traffic = jax.lax.cond(
            low, lambda s: move(move_key, s, step + 1), lambda s: (s, jnp.full((), jnp.nan), unmoved), state
        )
        if mesh is not None:
            traffic = traffic._replace(gathered=traffic.gathered + gathered_bytes(increments, mesh))
            state = SMC2State(_whole(state.positions, mesh), *on_all_devices(state[1:], mesh))
        # Draw equally weighted parameters for the output; after a move they are so already.
        chosen = resample(draw_key, jax.nn.softmax(relative_to_highest(state.log_weights)), m)
        chosen = jnp.where(low, jnp.arange(m), chosen)
        return state, SMC2Info(ess, increment, low, rate, state.positions.parameters[chosen], traffic)

    return kernel


def _whole(positions: pmmh.Position, mesh: Mesh | None) -> pmmh.Position:
    """Positions that are whole on each device of a mesh, all but their filters, which stay where they are."""
    small: pmmh.Position = on_all_devices(positions._replace(record=()), mesh)
    return small._replace(record=positions.record)


def _proposal_factor(parameters: Float[Array, "m d"], weights: Float[Array, " m"]) -> Float[Array, "d d"]:
    """Lower triangular factor F of the steps, where F F^T is 2.38^2 / d times the weighted covariance."""
    d = parameters.shape[1]
    centered = parameters - (weights @ parameters)[None]
    covariance = (weights[:, None] * centered).T @ centered + 1e-6 * jnp.eye(d)
    return pmmh.OPTIMAL_SCALE / math.sqrt(d) * jnp.linalg.cholesky(covariance)
