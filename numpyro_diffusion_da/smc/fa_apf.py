"""The fully adapted auxiliary particle filter (Pitt & Shephard 1999; with tempering, Savary et al. 2026).

Given equally weighted particles c_i and a new observation y:

1. log w_i = log p(y | c_i), exact or estimated
2. the largest alpha <= 1 at which the tempered weights' ESS is at its target; `WeightTempering` takes w^alpha (`tempering`)
3. ancestors ~ the tempered weights
4. the new particle ~ p(x' | c_ancestor, y), the optimal proposal
5. the new particles are equally weighted.

With `LocalAncestors` steps 1 to 3 are made for each block of the state by itself, from log p(y_j | c_i) of each
observation j, and step 4 starts from states glued together from the blocks' ancestors (`local_ancestors`).

The kernel asks two functions of a model and knows nothing else about it:

- ``log_predictive_fn(particle, observation) -> (log p(y | c), record)``; with `LocalAncestors` a vector, log p(y_j | c)
  of each observation; with `LikelihoodTempering` an `TemperableLogWeight`
- ``propose_fn(rng_key, particle, observation) -> (particle, record)``

With `inflation` the new states are inflated together before they become particles. Then `propose_fn` returns the
state x in place of the particle, and the kernel asks two more, which are those of `enkf`:

- ``advance_fn(rng_key, x, particle, observation, record) -> (particle, record)``: the new particle, x being its state;
- ``forecast_fn(rng_key, particle, observation) -> (x, record)``: a draw of p(x' | c), for a inflation that looks at the
  forecast. The forecast ensemble is one such draw from each particle before selection: equally weighted draws of
  p(x' | y_1, ..., y_k-1), whose spread is that of the means E[x' | c_i] and of the transition together. The draws have
  the keys of `propose_fn`: a draw whose guidance has nothing to do is then the forecast itself.

A record is any pytree (``()`` for none); records come back in `Info`, stacked over particles.
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
    Resampling,
    State,
    check_target_ess,
    init,
    make_info,
    map_particles,
    num_particles,
    particle_keys,
)
from numpyro_diffusion_da.smc.inflation import Inflation, check_inflation, inflated, need_forecast
from numpyro_diffusion_da.smc.local_ancestors import LocalAncestors
from numpyro_diffusion_da.smc.tempering import Tempering, WeightTempering

__all__ = ["Info", "State", "as_top_level_api", "build_kernel", "init"]

Draw = Callable[[PRNGKeyArray, PyTree, PyTree], tuple[PyTree, PyTree]]
"""(rng_key, particle, observation) -> (new particle or state, record), for one particle."""

Advance = Callable[[PRNGKeyArray, Any, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
"""(rng_key, x, particle, observation, record) -> (new particle, record), for one particle."""


def build_kernel(
    log_predictive_fn: Callable[[PyTree, PyTree], tuple[Any, PyTree]],
    propose_fn: Draw,
    resampling_fn: Resampling | None = None,
    target_ess: float = 0.2,
    batch_size: int | None = None,
    local: LocalAncestors | None = None,
    inflation: Sequence[Inflation] = (),
    advance_fn: Advance | None = None,
    forecast_fn: Draw | None = None,
    tempering: Tempering = WeightTempering(),
) -> Kernel:
    """Build the kernel.

    Args:
        log_predictive_fn: (particle, observation) -> (log p(y | c), record), for one particle.
        propose_fn: (rng_key, particle, observation) -> (new particle, record), for one particle.
        resampling_fn: from `blackjax.smc.resampling`; systematic by default.
        target_ess: effective sample size that tempering aims at, as a fraction of N; 0 for none.
        batch_size: particles mapped at a time, which bounds the memory; None maps all at once.
        local: localized ancestors; None for one selection of whole particles. Then `Info` has one set of weights and
            ancestors for each block, and no evidence is estimated.
        inflation: what is done to the new states, in this order; then `propose_fn` returns states.
        advance_fn: see the module; needed with `inflation`.
        forecast_fn: see the module; needed with a inflation that looks at the forecast.
        tempering: what alpha does to the weights.

    Returns:
        kernel(rng_key, state, observation) -> (State, Info), pure and jit-able.

    Raises:
        TypeError: what is no sequence of inflations.
        ValueError: target_ess outside [0, 1); a inflation that pairs members; one without the functions that it needs.
    """
    check_target_ess(target_ess)
    check_inflation(inflation, "FAAPF", paired=False)
    look_ahead = need_forecast(inflation)
    if inflation and (advance_fn is None or (look_ahead and forecast_fn is None)):
        missing = "advance_fn" if advance_fn is None else "forecast_fn"
        raise ValueError(f"inflation={tuple(inflation)} needs {missing}, and fa_apf.build_kernel got none.")

    def kernel(rng_key: PRNGKeyArray, state: State, observation: PyTree) -> tuple[State, Info]:
        n = num_particles(state.particles)
        resampling_key, proposal_key = jax.random.split(rng_key)
        weigh = map_particles(lambda particle: log_predictive_fn(particle, observation), batch_size)
        predictive, weighing = weigh(state.particles)
        predictive = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, -jnp.inf), predictive)
        if local is None:
            chosen = tempering.select(resampling_key, predictive, None, resampling_fn, target_ess)
            log_weights, ancestors, alpha = chosen
            parents = jax.tree.map(lambda x: x[ancestors], state.particles)
        else:
            chosen = local.select(resampling_key, predictive, resampling_fn, target_ess, tempering)
            log_weights, ancestors, alpha = chosen
            parents = local.glue(state.particles, ancestors)
        propose = map_particles(lambda key, particle: propose_fn(key, particle, observation), batch_size)
        keys = particle_keys(proposal_key, n)
        particles, proposal = propose(keys, parents)
        forecast, forecasting = None, ()
        if look_ahead:
            assert forecast_fn is not None
            look = map_particles(lambda key, particle: forecast_fn(key, particle, observation), batch_size)
            forecast, forecasting = look(keys, state.particles)
        if inflation:
            assert advance_fn is not None
            # A third key beside the two, which are the same with and without inflation.
            x = inflated(inflation, jax.random.split(rng_key, 3)[2], particles, forecast)
            advance = map_particles(
                lambda key, x, particle, record: advance_fn(key, x, particle, observation, record), batch_size
            )
            particles, proposal = advance(keys, x, parents, proposal)
        info = make_info(log_weights, ancestors, alpha, particles, weighing, proposal, forecasting)
        return State(particles, state.log_evidence + info.log_evidence_increment), info

    return kernel


def as_top_level_api(
    log_predictive_fn: Callable[[PyTree, PyTree], tuple[Any, PyTree]],
    propose_fn: Draw,
    resampling_fn: Resampling | None = None,
    target_ess: float = 0.2,
    batch_size: int | None = None,
    local: LocalAncestors | None = None,
    inflation: Sequence[Inflation] = (),
    advance_fn: Advance | None = None,
    forecast_fn: Draw | None = None,
    tempering: Tempering = WeightTempering(),
) -> Any:
    """The filter as a `blackjax.base.SamplingAlgorithm`: ``init(particles)``, ``step(rng_key, state, observation)``.

    Arguments as `build_kernel`.
    """
    from blackjax.base import SamplingAlgorithm

    kernel = build_kernel(
        log_predictive_fn,
        propose_fn,
        resampling_fn,
        target_ess,
        batch_size,
        local,
        inflation,
        advance_fn,
        forecast_fn,
        tempering,
    )
    return SamplingAlgorithm(init, kernel)
