"""What the filters share: state, info, tempering, guarded resampling, and mapping over particles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

Resampling = Callable[[PRNGKeyArray, Float[Array, " n"], int], Int[Array, " n"]]
"""(rng_key, normalized weights, number) -> ancestor indices, as in `blackjax.smc.resampling`."""

Kernel = Callable[[PRNGKeyArray, Any, Any], tuple[Any, Any]]
"""(rng_key, state, observation) -> (state, info)."""


class State(NamedTuple):
    """What the next step needs.

    Attributes:
        particles: equally weighted particles, a pytree with a leading axis of N.
        log_evidence: estimate of log p(y_{1:k}) so far.
    """

    particles: PyTree
    log_evidence: Float[Array, ""]


class Info(NamedTuple):
    """All else about a step. With localized ancestors, what is said of weights has a last axis of blocks.

    Attributes:
        log_weights: log-weights before tempering, shape (N,), index = the particle before resampling. A non-finite
            weight is given as -inf.
        ancestors: for each particle the index of the one it came from, shape (N,).
        ess: effective sample size of the weights before tempering.
        tempering: alpha in (0, 1]; what it does to the weights `tempering` says.
        log_evidence_increment: log mean exp(log w). An unbiased estimate of p(y_k | y_{1:k-1}) only for exact weights
            and alpha = 1.
        distinct_ancestors: number of different ancestors.
        log_weight_std: standard deviation of the finite log-weights; weights collapse near sqrt(2 log N).
        nonfinite_weights: number of particles whose log-weight was not finite.
        nonfinite_particles: number of new particles that hold a non-finite value.
        weighing: records of the weight function, leading axis N, index = the particle before resampling.
        proposal: records of the draw, leading axis N, index = the new particle.
        forecast: records of forecasts that inflation had drawn, index = the particle before resampling; () if none.
        check: record of a check of the observations before the step, of all particles together; () if none.
    """

    log_weights: Float[Array, " n"]
    ancestors: Int[Array, " n"]
    ess: Float[Array, ""]
    tempering: Float[Array, ""]
    log_evidence_increment: Float[Array, ""]
    distinct_ancestors: Int[Array, ""]
    log_weight_std: Float[Array, ""]
    nonfinite_weights: Int[Array, ""]
    nonfinite_particles: Int[Array, ""]
    weighing: PyTree
    proposal: PyTree
    forecast: PyTree = ()
    check: PyTree = ()


def init(particles: PyTree) -> State:
    """The state before the first observation, from N initial particles (leading axis N)."""
    return State(particles, jnp.zeros(()))


def num_particles(particles: PyTree) -> int:
    """Length of the leading axis.

    Raises:
        ValueError: no arrays, or arrays whose leading axes differ.
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(particles)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(f"particles have leading axes {sorted(lengths)}; give a pytree with one leading axis of N.")
    return int(lengths.pop()[0])


def particle_keys(rng_key: PRNGKeyArray, n: int) -> Key[Array, " n"]:
    """fold_in(rng_key, i) for each particle: a particle's draw does not depend on batching or on its neighbors."""
    return jax.vmap(jax.random.fold_in, (None, 0))(rng_key, jnp.arange(n))


def map_particles(fn: Callable[..., Any], batch_size: int | None = None) -> Callable[..., Any]:
    """Map a function of one particle over the leading axis of its arguments.

    Args:
        fn: a function of one particle.
        batch_size: particles mapped at a time, which bounds the memory; None maps all at once.
    """
    from blackjax.smc.base import map_kernel

    return map_kernel(fn, batch_size or 0)


def relative_to_highest(log_weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """The log-weights less the highest of them, -inf where not finite.

    Many observations make log-weights of 1e5 and more, and what is computed of them (2 log w, alpha log w) loses in
    float32 the differences between them, which are all that selection looks at.
    """
    finite = jnp.isfinite(log_weights)
    highest = jnp.max(jnp.where(finite, log_weights, -jnp.inf))
    return jnp.where(finite, log_weights - jnp.where(jnp.isfinite(highest), highest, 0.0), -jnp.inf)


def tempering_exponent(log_weights: Float[Array, " n"], target_ess: float) -> Float[Array, ""]:
    """The largest alpha in (0, 1] with ESS(alpha log w) >= target_ess N, by bisection on log alpha.

    Log-weights of Dirac type are linear in 1/R, so this is the tempering R -> R / alpha of the published filter
    (Savary et al. 2026, Sec. 3) at no further cost.

    Args:
        log_weights: shape (N,); -inf for particles that cannot be selected.
        target_ess: fraction of N; 0 means no tempering.
    """
    finite = jnp.isfinite(log_weights)
    shifted = relative_to_highest(log_weights)
    spread = -jnp.min(jnp.where(finite, shifted, 0.0))
    return largest_alpha(lambda alpha: alpha * shifted, finite, spread, target_ess)


def largest_alpha(
    log_weights_at: Callable[[Float[Array, ""]], Float[Array, " n"]],
    finite: Bool[Array, " n"],
    spread: Float[Array, ""],
    target_ess: float,
) -> Float[Array, ""]:
    """An alpha in (0, 1] at which the ESS is target_ess N, by bisection on log alpha: 1 where it is more there.

    Where the ESS is not monotone there may be several: one of them is found.

    Args:
        log_weights_at: alpha -> log-weights, shape (N,), whose highest is not far from 0.
        finite: which of the particles can be selected.
        spread: a bound, log-weights at alpha differ by no more than alpha times that.
        target_ess: fraction of N; 0 means no tempering.
    """
    from blackjax.smc.ess import log_ess
    from blackjax.smc.solver import dichotomy

    if target_ess == 0.0:
        return jnp.ones((), spread.dtype)
    # As alpha -> 0 the ESS tends to the number of finite weights: it cannot be asked for more.
    target = jnp.minimum(target_ess * len(finite), 0.999 * jnp.maximum(jnp.sum(finite), 1))

    def excess(log_alpha: Array) -> Array:
        return log_ess(jnp.where(finite, log_weights_at(jnp.exp(log_alpha)), -jnp.inf)) - jnp.log(target)

    # The end that the bisection returns always had an ESS of the target or more, as alpha at this one has.
    lowest = jnp.log(1e-3 / (1e-3 + spread))
    alpha = jnp.exp(dichotomy(excess, lowest, jnp.zeros_like(lowest)))
    return jnp.where(jnp.isfinite(alpha), alpha, 1.0)


def guarded(resampling_fn: Resampling | None) -> Resampling:
    """The same resampling (None: systematic), never selecting a particle of zero weight.

    In float32 a cumulative sum may end below 1, and a search in it past the last particle that has any weight.
    """
    from blackjax.smc.resampling import systematic

    draw = systematic if resampling_fn is None else resampling_fn

    def resample(rng_key: PRNGKeyArray, weights: Array, number: int) -> Array:
        chosen = draw(rng_key, weights, number)
        positive = weights > 0
        last_positive = jax.lax.cummax(jnp.where(positive, jnp.arange(len(weights)), -1))
        before = last_positive[chosen]
        return jnp.where(before >= 0, before, jnp.argmax(positive))

    return resample


def select(
    rng_key: PRNGKeyArray, log_weights: Float[Array, " n"], resampling_fn: Resampling | None, target_ess: float
) -> tuple[Int[Array, " n"], Float[Array, ""]]:
    """Temper, then resample; returns (ancestors, alpha). Equal weights keep every particle in its place."""
    alpha = tempering_exponent(log_weights, target_ess)
    return resampled(rng_key, log_weights, alpha * relative_to_highest(log_weights), resampling_fn), alpha


def resampled(
    rng_key: PRNGKeyArray,
    log_weights: Float[Array, " n"],
    tempered: Float[Array, " n"],
    resampling_fn: Resampling | None,
) -> Int[Array, " n"]:
    """Ancestors by the tempered log-weights; each in its place where those before are equal, or none finite."""
    n = len(log_weights)
    usable = jnp.any(jnp.isfinite(log_weights))
    weights = jax.nn.softmax(jnp.where(usable, tempered, 0.0))
    chosen = guarded(resampling_fn)(rng_key, weights, n)
    equal = jnp.all(log_weights == log_weights[0])
    return jnp.where(equal | ~usable, jnp.arange(n), chosen)


def finite_leaves(particle: PyTree) -> Bool[Array, ""]:
    """Whether every floating value of one particle is finite."""
    leaves = [x for x in jax.tree.leaves(particle) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])) if leaves else jnp.asarray(True)


def make_info(
    log_weights: Float[Array, " n"] | Float[Array, "n b"],
    ancestors: Int[Array, " n"] | Int[Array, "n b"],
    tempering: Float[Array, ""] | Float[Array, " b"],
    particles: PyTree,
    weighing: PyTree,
    proposal: PyTree,
    forecast: PyTree = (),
) -> Info:
    """Diagnostics of a step from its log-weights (non-finite ones as -inf), ancestors and new particles.

    Weights of blocks, with a last axis, make no estimate of the evidence: its increment is 0.
    """
    local = log_weights.ndim > 1
    per_block = jax.vmap(_weight_diagnostics, in_axes=1, out_axes=0) if local else _weight_diagnostics
    ess, increment, distinct, spread, nonfinite = per_block(log_weights, ancestors)
    return Info(
        log_weights=log_weights,
        ancestors=ancestors,
        ess=ess,
        tempering=tempering,
        log_evidence_increment=jnp.zeros(()) if local else increment,
        distinct_ancestors=distinct,
        log_weight_std=spread,
        nonfinite_weights=jnp.max(nonfinite) if local else nonfinite,
        nonfinite_particles=jnp.sum(~jax.vmap(finite_leaves)(particles)),
        weighing=weighing,
        proposal=proposal,
        forecast=forecast,
    )


def _weight_diagnostics(
    log_weights: Float[Array, " n"], ancestors: Int[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""], Int[Array, ""], Float[Array, ""], Int[Array, ""]]:
    """(ESS, log mean weight, distinct ancestors, spread of the finite log-weights, number of non-finite ones)."""
    from blackjax.smc.ess import ess

    n = len(log_weights)
    finite = jnp.isfinite(log_weights)
    usable = jnp.any(finite)
    count = jnp.maximum(jnp.sum(finite), 1)
    mean = jnp.sum(jnp.where(finite, log_weights, 0.0)) / count
    variance = jnp.sum(jnp.where(finite, (log_weights - mean) ** 2, 0.0)) / count
    return (
        jnp.where(usable, ess(jnp.where(usable, relative_to_highest(log_weights), 0.0)), 0.0),
        jax.nn.logsumexp(log_weights) - jnp.log(n),
        jnp.sum(jnp.bincount(ancestors, length=n) > 0),
        jnp.sqrt(variance),
        n - jnp.sum(finite),
    )


def check_target_ess(target_ess: float) -> None:
    """Refuse a target that is not a fraction.

    Raises:
        ValueError: outside [0, 1).
    """
    if not 0.0 <= target_ess < 1.0:
        raise ValueError(
            f"target_ess={target_ess}: give a fraction of the particles from 0 (no tempering) to below 1; "
            "the published filter's 50 of 256 is 0.2."
        )
