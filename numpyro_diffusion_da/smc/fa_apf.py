r"""Fully adapted auxiliary particle filter (Pitt & Shephard 1999; with tempering, Savary et al. 2026).

One step takes equally weighted particles $c_i$ and a new observation $y$:

1. Weigh: $\log w_i = \log p(y | c_i)$, exact or estimated.
2. Temper: find the largest $\alpha \le 1$ at which the tempered weights reach the target of the effective sample size.
   `WeightTempering` uses the weights $w_i^\alpha$; the module `tempering` describes the alternative.
3. Select: draw ancestors by the tempered weights.
4. Move: draw each new particle from $p(x' | c_\mathrm{ancestor}, y)$, the optimal proposal.
5. The new particles are equally weighted.

With `LocalAncestors`, each block of the state goes through steps 1 to 3 on its own, with the log-likelihood
$\log p(y_j | c_i)$ of each observation $j$. Step 4 then starts from states that are glued together from the ancestors
of the blocks (see the module `local_ancestors`).

The kernel needs two functions of a model:

- ``log_predictive_fn(particle, observation) -> (log p(y | c), record)``. With `LocalAncestors` its first result is a
  vector, log p(y_j | c) of each observation; with `LikelihoodTempering` it is a `TemperableLogWeight`.
- ``propose_fn(rng_key, particle, observation) -> (particle, record)``.

With `inflation`, the new states are inflated together before they become particles. Then `propose_fn` returns the state
x in place of the particle, and the kernel needs two more functions, which are those of `enkf`:

- ``advance_fn(rng_key, x, particle, observation, record) -> (particle, record)``: the new particle with the state x.
- ``forecast_fn(rng_key, particle, observation) -> (x, record)``: a draw of p(x' | c), for an inflation that uses the
  forecast. The forecast ensemble has one such draw from each particle before selection. These are equally weighted
  draws of $p(x' | y_1, \dots, y_{k-1})$, with the spread of the means E[x' | c_i] and of the transition together. They
  use the keys of `propose_fn`, so that a draw without any guidance equals the forecast.

A record is any pytree (``()`` for none). `Info` returns the records stacked over particles.
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
    particle_keys,
    top_level_api,
    total_particles,
)
from numpyro_diffusion_da.smc.inflation import Inflation, check_inflation, inflated_particles, need_forecast
from numpyro_diffusion_da.smc.kalman_move import PlacedMove, Predicted
from numpyro_diffusion_da.smc.local_ancestors import LocalAncestors
from numpyro_diffusion_da.smc.sharding import own, take_ancestors, together, traffic_of
from numpyro_diffusion_da.smc.tempering import Tempering, WeightTempering

__all__ = ["Info", "State", "as_top_level_api", "build_kernel", "init"]

Draw = Callable[[PRNGKeyArray, PyTree, PyTree], tuple[PyTree, PyTree]]
"""Draw (rng_key, particle, observation) -> (new particle or state, record), for one particle."""

Advance = Callable[[PRNGKeyArray, Any, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
"""Function (rng_key, x, particle, observation, record) -> (new particle with the state x, record)."""


def build_kernel(
    log_predictive_fn: Callable[[PyTree, PyTree], tuple[Any, PyTree]],
    propose_fn: Draw,
    resampling_fn: Resampling | None = None,
    target_ess: float = 0.2,
    batch_size: int | None = None,
    local: LocalAncestors | Callable[[PyTree], LocalAncestors] | None = None,
    inflation: Sequence[Inflation] = (),
    advance_fn: Advance | None = None,
    forecast_fn: Draw | None = None,
    tempering: Tempering = WeightTempering(),
    move: PlacedMove | Callable[[PyTree], PlacedMove] | None = None,
) -> Kernel:
    """Build the kernel of the fully adapted auxiliary particle filter.

    Args:
        log_predictive_fn: (particle, observation) -> (log p(y | c), record), for one particle.
        propose_fn: (rng_key, particle, observation) -> (new particle, record), for one particle. With `inflation` it
            returns the new state in place of the particle.
        resampling_fn: resampling function from `blackjax.smc.resampling`; None for systematic resampling.
        target_ess: effective sample size that tempering aims at, as a fraction of N; 0 for no tempering.
        batch_size: number of particles mapped at a time, which bounds the memory; None maps all at once.
        local: localized resampling; a function (observation) -> `LocalAncestors`, with the same blocks at every step,
            if observations move from step to step; None selects whole particles. With it, `Info` has one set of weights
            and ancestors for each block, and no evidence is estimated.
        inflation: inflations of the new states, applied in this order.
        advance_fn: (rng_key, x, particle, observation, record) -> (new particle, record), for one particle. Needed with
            `inflation`.
        forecast_fn: (rng_key, particle, observation) -> (x, record), a draw of p(x' | c). Needed with an inflation that
            uses the forecast.
        tempering: kind of tempering, `WeightTempering()` or `LikelihoodTempering()`.
        move: move of the selected ancestors; a function (observation) -> `PlacedMove` if observations move from step to
            step; None moves no ancestors. With it, `log_predictive_fn` returns (`Predicted`, record), and the blocks of
            the move take the place of `local`.

    Returns:
        kernel(rng_key, state, observation) -> (State, Info), pure and jit-able.

    Raises:
        TypeError: `inflation` is not a sequence of inflations.
        ValueError: `target_ess` is outside [0, 1), or an inflation pairs members or lacks a function that it needs.
    """
    target_ess = check_target_ess(target_ess, "fa_apf.build_kernel")
    check_inflation(inflation, "FAAPF", paired=False)
    look_ahead = need_forecast(inflation)
    if inflation and (advance_fn is None or (look_ahead and forecast_fn is None)):
        missing = "advance_fn" if advance_fn is None else "forecast_fn"
        raise ValueError(f"inflation={tuple(inflation)} needs {missing}, but fa_apf.build_kernel got none.")

    def kernel(rng_key: PRNGKeyArray, state: State, observation: PyTree) -> tuple[State, Info]:
        n = total_particles(state.particles)
        resampling_key, proposal_key = jax.random.split(rng_key)
        # Weigh every particle.
        weigh = map_particles(lambda particle: log_predictive_fn(particle, observation), batch_size)
        predictive, weighing = weigh(state.particles)
        predictive = together(predictive)
        departure: Any = None
        if move is not None:
            predictive, departure = predictive
        predictive = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, -jnp.inf), predictive)
        # Temper and select, and move what is selected.
        here = local(observation) if callable(local) else local
        moving: PyTree = ()
        traffic: PyTree = ()
        if move is not None:
            moves = move(observation) if callable(move) else move
            # The key of the move is a fourth one, so that the others are the same with and without a move.
            move_keys = resampling_key, jax.random.split(rng_key, 4)[3]
            log_weights, ancestors, alpha, parents, moving = moves.select_and_move(
                move_keys, Predicted(predictive, departure), state.particles, resampling_fn, target_ess, tempering
            )
            traffic = moves.traffic(state.particles, ancestors)
        elif here is None:
            chosen = tempering.select(resampling_key, predictive, None, resampling_fn, target_ess)
            log_weights, ancestors, alpha = chosen
            parents = take_ancestors(state.particles, ancestors)
            traffic = traffic_of(state.particles, ancestors)
        else:
            chosen = here.select(resampling_key, predictive, resampling_fn, target_ess, tempering)
            log_weights, ancestors, alpha = chosen
            parents = here.glue(state.particles, ancestors)
            traffic = here.traffic(state.particles, ancestors)
        # Move from the selected particles.
        propose = map_particles(lambda key, particle: propose_fn(key, particle, observation), batch_size)
        keys = own(particle_keys(proposal_key, n))
        particles, proposal = propose(keys, parents)
        # Inflate the new states, and turn them into particles.
        forecast, forecasting = None, ()
        if look_ahead:
            assert forecast_fn is not None
            look = map_particles(lambda key, particle: forecast_fn(key, particle, observation), batch_size)
            forecast, forecasting = look(keys, state.particles)
        if inflation:
            assert advance_fn is not None
            # The key of the inflation is a third one, so that the other two are the same with and without inflation.
            x = inflated_particles(inflation, jax.random.split(rng_key, 3)[2], particles, forecast)
            advance = map_particles(
                lambda key, x, particle, record: advance_fn(key, x, particle, observation, record), batch_size
            )
            particles, proposal = advance(keys, x, parents, proposal)
        info = make_info(log_weights, ancestors, alpha, particles, weighing, proposal, forecasting, traffic)
        info = info._replace(move=moving)
        return State(particles, state.log_evidence + info.log_evidence_increment), info

    return kernel


as_top_level_api = top_level_api(build_kernel)
"""Build the filter as a `blackjax.base.SamplingAlgorithm`, with the arguments of `build_kernel`."""
