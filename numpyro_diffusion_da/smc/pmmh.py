"""Particle-marginal Metropolis-Hastings (Andrieu, Doucet & Holenstein 2010), as a BlackJAX kernel.

A random walk over parameters theta whose target is p(theta) p^(y | theta), p^ the estimate of a particle filter. The
estimate of the current point is part of the state and is never made again. The chain is then an exact
Metropolis-Hastings chain on theta and the filter's random numbers u, with proposal q(theta' | theta) p(u' | theta') and
target p(theta) p^(y | theta, u) p(u | theta) / p(y); where p^ is unbiased, the target's marginal is p(theta | y).

The kernel asks two functions of a model:

- ``log_prior_fn(parameters) -> log p(theta)``, in the space of the walk, transforms included
- ``log_evidence_fn(rng_key, parameters) -> (log p^(y | theta), record)``

`blackjax.mcmc.random_walk` does the rest. Steps are N(0, F F^T); in warm-up F follows the chain's own covariance S as
F F^T = 2.38^2 / d S (Haario, Saksman & Tamminen 2001; Roberts & Rosenthal 2001), see `adapt`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

LogPrior = Callable[[Float[Array, " d"]], Float[Array, ""]]
LogEvidence = Callable[[PRNGKeyArray, Float[Array, " d"]], tuple[Float[Array, ""], PyTree]]

OPTIMAL_SCALE = 2.38
# Steps of no length at all are accepted with probability 2 Phi(-s / sqrt 2), s the standard deviation of log p^: 0.23
# at s = 1.7. A target above that would shrink the steps to nothing.
TARGET_ACCEPTANCE = 0.1


class Position(NamedTuple):
    """A point of the extended space, theta and what the filter made of it.

    Attributes:
        parameters: theta, unconstrained, shape (d,).
        log_prior: log p(theta).
        log_evidence: the estimate log p^(y | theta) that belongs to this point for as long as the chain stays there.
        record: what `log_evidence_fn` gave with it.
    """

    parameters: Float[Array, " d"]
    log_prior: Float[Array, ""]
    log_evidence: Float[Array, ""]
    record: PyTree


def _evaluate(
    rng_key: PRNGKeyArray, parameters: Float[Array, " d"], log_prior_fn: LogPrior, log_evidence_fn: LogEvidence
) -> Position:
    return Position(parameters, log_prior_fn(parameters), *log_evidence_fn(rng_key, parameters))


def _log_density(position: Position) -> Float[Array, ""]:
    total = position.log_prior + position.log_evidence
    return jnp.where(jnp.isnan(total), -jnp.inf, total)


def init(
    rng_key: PRNGKeyArray, parameters: Float[Array, " d"], log_prior_fn: LogPrior, log_evidence_fn: LogEvidence
) -> Any:
    """A chain's first state, a `blackjax.mcmc.random_walk.RWState` of a `Position`: one run of the filter."""
    return at(_evaluate(rng_key, parameters, log_prior_fn, log_evidence_fn))


def at(position: Position) -> Any:
    """The state of a chain at a position that has been evaluated already."""
    from blackjax.mcmc.random_walk import RWState

    return RWState(position, _log_density(position))


def build_kernel(log_prior_fn: LogPrior, log_evidence_fn: LogEvidence) -> Callable[..., tuple[Any, Any]]:
    """Build the kernel.

    Args:
        log_prior_fn: see the module.
        log_evidence_fn: see the module.

    Returns:
        kernel(rng_key, state, factor) -> (`RWState`, `RWInfo`), factor being F, shape (d, d). One run of the filter.
    """
    from blackjax.mcmc.random_walk import build_rmh

    step = build_rmh()

    def kernel(rng_key: PRNGKeyArray, state: Any, factor: Float[Array, "d d"]) -> tuple[Any, Any]:
        def propose(rng_key: PRNGKeyArray, position: Position) -> Position:
            walk_key, evidence_key = jax.random.split(rng_key)
            white = jax.random.normal(walk_key, position.parameters.shape, position.parameters.dtype)
            return _evaluate(evidence_key, position.parameters + factor @ white, log_prior_fn, log_evidence_fn)

        return step(rng_key, state, _log_density, propose)

    return kernel


def as_top_level_api(log_prior_fn: LogPrior, log_evidence_fn: LogEvidence, factor: Float[Array, "d d"]) -> Any:
    """The chain as a `blackjax.base.SamplingAlgorithm`: ``init(parameters, rng_key)``, ``step(rng_key, state)``."""
    from blackjax.base import SamplingAlgorithm

    kernel = build_kernel(log_prior_fn, log_evidence_fn)
    return SamplingAlgorithm(
        lambda parameters, rng_key: init(rng_key, parameters, log_prior_fn, log_evidence_fn),
        lambda rng_key, state: kernel(rng_key, state, factor),
    )


# --- warm-up ----------------------------------------------------------------------------------------------------------


class Adaptation(NamedTuple):
    """The proposal, and what it is learned from.

    Attributes:
        covariance: S, what the walk takes for the covariance of the target.
        log_scale: logarithm of a factor on the steps, while S is not yet known.
        moments: Welford's, of this window.
        moves: steps accepted in this window: a chain that stands still learns nothing of its target.
        steps: warm-up steps made.
    """

    covariance: Float[Array, "d d"]
    log_scale: Float[Array, ""]
    moments: Any
    moves: Float[Array, ""]
    steps: Float[Array, ""]


def _welford() -> tuple[Any, Any, Any]:
    from blackjax.adaptation.mass_matrix import welford_algorithm

    return welford_algorithm(is_diagonal_matrix=False)


def start_adaptation(covariance: Float[Array, "d d"]) -> Adaptation:
    """From a first guess of the target's covariance: the prior's, say."""
    moments = jax.tree.map(jnp.asarray, _welford()[0](len(covariance)))
    zero = jnp.zeros(())
    return Adaptation(covariance, zero, moments._replace(sample_size=zero), zero, zero)


def proposal_factor(adaptation: Adaptation) -> Float[Array, "d d"]:
    """F, lower triangular: F F^T = exp(2 log_scale) 2.38^2 / d S."""
    d = len(adaptation.covariance)
    scale = jnp.exp(adaptation.log_scale) * OPTIMAL_SCALE / math.sqrt(d)
    return scale * jnp.linalg.cholesky(adaptation.covariance)


def window_ends(num_warmup: int) -> Bool[np.ndarray, " w"]:
    """At which warm-up steps a window ends: each is twice as long as the one before, the last half of the warm-up."""
    ends = np.zeros(num_warmup, bool)
    end = num_warmup
    while end >= 10:
        ends[end - 1] = True
        end //= 2
    return ends


def adapt(
    adaptation: Adaptation, parameters: Float[Array, " d"], info: Any, window_ends_here: Bool[Array, ""]
) -> Adaptation:
    """One warm-up step of the proposal.

    Within a window the size of the steps is moved towards an acceptance of 0.1 by Robbins & Monro; at its end S is the
    covariance of the window's draws, shrunk a little to the S before, and the size is again that of 2.38^2 / d.

    Args:
        adaptation: so far.
        parameters: theta after the step.
        info: `RWInfo` of the step.
        window_ends_here: see `window_ends`.
    """
    _, update, final = _welford()
    moments, steps = update(adaptation.moments, parameters), adaptation.steps + 1
    moves = adaptation.moves + info.is_accepted
    log_scale = adaptation.log_scale + (info.acceptance_rate - TARGET_ACCEPTANCE) * steps**-0.5
    learned, _, _ = final(moments)
    # As much weight as five moves for the S before, at the size of step that was being used.
    before = jnp.exp(2 * log_scale) * adaptation.covariance
    covariance = (moves * learned + 5.0 * before) / (moves + 5.0)
    next_window = start_adaptation(covariance)._replace(steps=steps)
    same_window = Adaptation(adaptation.covariance, log_scale, moments, moves, steps)
    return jax.tree.map(lambda new, same: jnp.where(window_ends_here, new, same), next_window, same_window)
