r"""Particle-marginal Metropolis-Hastings (Andrieu, Doucet & Holenstein 2010), as a BlackJAX kernel.

A random walk over parameters $\theta$ has the target $p(\theta) \, \hat p(y | \theta)$, where $\hat p$ is the estimate
of a particle filter. The estimate at the current point is part of the chain's state and is not made again. The chain is
then an exact Metropolis-Hastings chain on $\theta$ and the filter's random numbers $u$, with the proposal
$q(\theta' | \theta) \, p(u' | \theta')$ and the target $p(\theta) \, \hat p(y | \theta, u) \, p(u | \theta) / p(y)$. If
$\hat p$ is unbiased, the marginal of this target is $p(\theta | y)$.

The kernel needs two functions of a model:

- ``log_prior_fn(parameters) -> log p(theta)``, in the space of the walk, with the Jacobians of transforms,
- ``log_evidence_fn(rng_key, parameters) -> (log p^(y | theta), record)``.

`blackjax.mcmc.random_walk` makes the steps, which are $\mathcal N(0, F F^T)$. In warm-up $F$ follows the covariance $S$
of the chain, $F F^T = 2.38^2 / d \; S$ (Haario, Saksman & Tamminen 2001; Roberts & Rosenthal 2001); see `adapt`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.smc.base import load_blackjax

LogPrior = Callable[[Float[Array, " d"]], Float[Array, ""]]
LogEvidence = Callable[[PRNGKeyArray, Float[Array, " d"]], tuple[Float[Array, ""], PyTree]]

OPTIMAL_SCALE = 2.38
# Steps of length zero are accepted with the probability 2 Phi(-s / sqrt 2), with s the standard deviation of log p^.
# This is 0.23 at s = 1.7. A target above it would shrink the steps to zero.
TARGET_ACCEPTANCE = 0.1


class Position(NamedTuple):
    """Point of the chain: the parameters and the estimates that the filter made for them.

    Attributes:
        parameters: unconstrained parameters theta, shape (d,).
        log_prior: log p(theta).
        log_evidence: estimate log p^(y | theta), kept for as long as the chain stays at this point.
        record: record that `log_evidence_fn` returned with the estimate.
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
    """First state of a chain, a `blackjax.mcmc.random_walk.RWState` of a `Position`. The filter runs once.

    Args:
        rng_key: random key of the filter.
        parameters: unconstrained parameters at which the chain starts.
        log_prior_fn: parameters -> log p(theta), in the space of the walk.
        log_evidence_fn: (rng_key, parameters) -> (log p^(y | theta), record).
    """
    return at(_evaluate(rng_key, parameters, log_prior_fn, log_evidence_fn))


def at(position: Position) -> Any:
    """State of a chain at a position that has been evaluated, a `blackjax.mcmc.random_walk.RWState`."""
    load_blackjax()
    from blackjax.mcmc.random_walk import RWState

    return RWState(position, _log_density(position))


def build_kernel(log_prior_fn: LogPrior, log_evidence_fn: LogEvidence) -> Callable[..., tuple[Any, Any]]:
    """Build the kernel of particle-marginal Metropolis-Hastings.

    Args:
        log_prior_fn: parameters -> log p(theta), in the space of the walk.
        log_evidence_fn: (rng_key, parameters) -> (log p^(y | theta), record).

    Returns:
        kernel(rng_key, state, factor) -> (`RWState`, `RWInfo`). The factor F, shape (d, d), gives the covariance F F^T
        of the steps. Each step runs the filter once.
    """
    load_blackjax()
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
    """Build the chain as a `blackjax.base.SamplingAlgorithm`: ``init(parameters, rng_key)``, ``step(rng_key, state)``.

    Args:
        log_prior_fn: parameters -> log p(theta), in the space of the walk.
        log_evidence_fn: (rng_key, parameters) -> (log p^(y | theta), record).
        factor: F, where F F^T is the covariance of the steps.
    """
    load_blackjax()
    from blackjax.base import SamplingAlgorithm

    kernel = build_kernel(log_prior_fn, log_evidence_fn)
    return SamplingAlgorithm(
        lambda parameters, rng_key: init(rng_key, parameters, log_prior_fn, log_evidence_fn),
        lambda rng_key, state: kernel(rng_key, state, factor),
    )


# --- warm-up ----------------------------------------------------------------------------------------------------------


class Adaptation(NamedTuple):
    """State of the warm-up, from which the proposal is made.

    Attributes:
        covariance: S, the current estimate of the target's covariance.
        log_scale: logarithm of a factor of the steps, which corrects their size while S is not yet known.
        moments: Welford's moments of the draws in this window.
        moves: number of steps accepted in this window. A chain that does not move learns nothing about its target.
        steps: number of warm-up steps so far.
    """

    covariance: Float[Array, "d d"]
    log_scale: Float[Array, ""]
    moments: Any
    moves: Float[Array, ""]
    steps: Float[Array, ""]


def _welford() -> tuple[Any, Any, Any]:
    load_blackjax()
    from blackjax.adaptation.mass_matrix import welford_algorithm

    return welford_algorithm(is_diagonal_matrix=False)


def start_adaptation(covariance: Float[Array, "d d"]) -> Adaptation:
    """Start the warm-up from a first guess of the target's covariance, for example the covariance of the prior."""
    moments = jax.tree.map(jnp.asarray, _welford()[0](len(covariance)))
    zero = jnp.zeros(())
    return Adaptation(covariance, zero, moments._replace(sample_size=zero), zero, zero)


def proposal_factor(adaptation: Adaptation) -> Float[Array, "d d"]:
    """Lower triangular factor F of the steps' covariance F F^T = exp(2 log_scale) 2.38^2 / d S."""
    d = len(adaptation.covariance)
    scale = jnp.exp(adaptation.log_scale) * OPTIMAL_SCALE / math.sqrt(d)
    return scale * jnp.linalg.cholesky(adaptation.covariance)


def window_ends(num_warmup: int) -> Bool[np.ndarray, " w"]:
    """Whether a window of the warm-up ends at each warm-up step.

    Each window is twice as long as the one before. The last one is half of the warm-up.
    """
    ends = np.zeros(num_warmup, bool)
    end = num_warmup
    while end >= 10:
        ends[end - 1] = True
        end //= 2
    return ends


def adapt(
    adaptation: Adaptation, parameters: Float[Array, " d"], info: Any, window_ends_here: Bool[Array, ""]
) -> Adaptation:
    """Adapt the proposal after one warm-up step.

    Within a window the size of the steps moves towards an acceptance rate of 0.1 (Robbins & Monro). At the end of a
    window S becomes the covariance of the window's draws, shrunk slightly towards the S before, and the size of the
    steps is reset to that of 2.38^2 / d.

    Args:
        adaptation: state of the warm-up before the step.
        parameters: parameters theta after the step.
        info: `RWInfo` of the step.
        window_ends_here: whether a window ends at this step, from `window_ends`.

    Returns:
        State of the warm-up after the step.
    """
    _, update, final = _welford()
    moments, steps = update(adaptation.moments, parameters), adaptation.steps + 1
    moves = adaptation.moves + info.is_accepted
    log_scale = adaptation.log_scale + (info.acceptance_rate - TARGET_ACCEPTANCE) * steps**-0.5
    learned, _, _ = final(moments)
    # The S before, at the size of steps in use, has the weight of five moves.
    before = jnp.exp(2 * log_scale) * adaptation.covariance
    covariance = (moves * learned + 5.0 * before) / (moves + 5.0)
    next_window = start_adaptation(covariance)._replace(steps=steps)
    same_window = Adaptation(adaptation.covariance, log_scale, moments, moves, steps)
    return jax.tree.map(lambda new, same: jnp.where(window_ends_here, new, same), next_window, same_window)
