"""Gaussians with the effect of any likelihood: moment matching along one coordinate an observation.

An observation whose distribution is not Gaussian looks at the state through one coordinate t (`likelihood` says which),
Gaussian before it is seen. `tilted_moments` integrates its likelihood against that Gaussian on a grid; the pseudo
observation N(value; t, scale^2) with the same effect on mean and variance stands for it in everything that is linear.
For one observation, or several that look at independent coordinates, the score of the evidence is then exact. Where
coordinates are correlated and their covariance is known, expectation propagation makes the pseudo observations agree
(Minka 2001; Rasmussen & Williams 2006, Algorithm 3.5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

ElementwiseLogProb = Callable[[Float[Array, " m"]], Float[Array, " m"]]
"""t -> log p(y_i | t_i) of each observation."""

NODES = 65
ROUNDS = 5
REACH = 6.0  # half-width of the first grid, in standard deviations
LEAST_VARIANCE = 1e-10  # of a coordinate
LEAST_PRECISION = 1e-3  # of a pseudo observation, relative to that of its coordinate


class TiltedMoments(NamedTuple):
    """Moments of p(y_i | t) N(t; centre_i, variance_i), each of shape (m,).

    Attributes:
        log_normalizer: log of its integral over t.
        mean: of the normalized density.
        variance: of the normalized density.
    """

    log_normalizer: Float[Array, " m"]
    mean: Float[Array, " m"]
    variance: Float[Array, " m"]


def tilted_moments(
    log_prob: ElementwiseLogProb, center: Float[Array, " m"], variance: Float[Array, " m"]
) -> TiltedMoments:
    """Quadrature on a grid that is refined around what it found, until it resolves the narrower of the two factors.

    Args:
        log_prob: elementwise log-likelihoods; NaN counts as impossible.
        center: mean of the Gaussian.
        variance: of the Gaussian, positive.
    """
    return _tilted(log_prob, center, variance)[0]


def tilted_quantiles(
    log_prob: ElementwiseLogProb, center: Float[Array, " m"], variance: Float[Array, " m"], levels: Float[Array, " m"]
) -> Float[Array, " m"]:
    """Where the distribution functions of the tilted densities reach the levels, from 0 to 1; see `tilted_moments`."""
    _, nodes, weights = _tilted(log_prob, center, variance)
    # Each node stands for the interval around it, on which its density is constant.
    below = jnp.cumsum(weights, axis=0)
    at = jnp.clip(jnp.sum(below < levels[None], axis=0), 0, NODES - 1)[None]
    share, until = jnp.take_along_axis(weights, at, axis=0)[0], jnp.take_along_axis(below, at, axis=0)[0]
    inside = jnp.where(share > 0, 0.5 - (until - levels) / jnp.where(share > 0, share, 1.0), 0.0)
    return jnp.take_along_axis(nodes, at, axis=0)[0] + jnp.clip(inside, -0.5, 0.5) * (nodes[1] - nodes[0])


def _tilted(
    log_prob: ElementwiseLogProb, center: Float[Array, " m"], variance: Float[Array, " m"]
) -> tuple[TiltedMoments, Float[Array, "k m"], Float[Array, "k m"]]:
    """The moments, and the last grid with the weights of its nodes."""
    spread = jnp.sqrt(variance)
    steps = jnp.linspace(-1.0, 1.0, NODES, dtype=center.dtype)

    def on_grid(middle: Array, half: Array) -> tuple[TiltedMoments, Array, Array, Array]:
        t = middle[None] + half[None] * steps[:, None]
        logs = jax.vmap(log_prob)(t)
        exponent = -0.5 * ((t - center[None]) / spread[None]) ** 2
        logs = jnp.where(jnp.isnan(logs), -jnp.inf, logs) + exponent
        possible = jnp.isfinite(jnp.max(logs, axis=0))
        logs = jnp.where(possible[None], logs, exponent)
        total = jax.nn.logsumexp(logs, axis=0)
        weights = jnp.exp(logs - total[None])
        mean = jnp.sum(weights * t, axis=0)
        second = jnp.sum(weights * (t - mean[None]) ** 2, axis=0)
        spacing = 2.0 * half / (NODES - 1)
        log_normalizer = total + jnp.log(spacing / spread) - 0.5 * jnp.log(2.0 * jnp.pi)
        return TiltedMoments(jnp.where(possible, log_normalizer, -jnp.inf), mean, second), spacing, t, weights

    def refine(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        moments, spacing = on_grid(*carry)[:2]
        _, half = carry
        # A mean near the edge: the mass may lie beyond it, so move, and look further.
        inside = jnp.abs(moments.mean - carry[0]) < 0.8 * half
        narrower = jnp.clip(REACH * jnp.sqrt(moments.variance), 2.0 * spacing, half)
        return moments.mean, jnp.where(inside, narrower, 2.0 * half)

    grid = jax.lax.fori_loop(0, ROUNDS - 1, refine, (center, REACH * spread))
    found, _, nodes, weights = on_grid(*grid)
    return found, nodes, weights


class PseudoObservations(NamedTuple):
    """Gaussian observations of coordinates: N(value; t, scale^2), shape (m,) each."""

    value: Float[Array, " m"]
    scale: Float[Array, " m"]


def pseudo_observations(
    tilted: TiltedMoments, center: Float[Array, " m"], variance: Float[Array, " m"]
) -> PseudoObservations:
    """What takes N(center, variance) to the tilted mean and, where it is the smaller, variance.

    A likelihood may widen its coordinate (an outlier under heavy tails, two modes); no Gaussian observation does, so
    its precision is held above `LEAST_PRECISION`, with the mean still matched.
    """
    precision = jnp.maximum(1.0 / tilted.variance - 1.0 / variance, LEAST_PRECISION / variance)
    score = (tilted.mean - center) / variance
    return PseudoObservations(center + score * (1.0 / precision + variance), precision**-0.5)


class PropagationResult(NamedTuple):
    """What expectation propagation gives.

    Attributes:
        log_evidence: log of the integral of all likelihoods against the Gaussian.
        pseudo: the pseudo observations at the end, missing ones with an infinite scale replaced by value 0, scale 1.
        cavity: mean and variance of each coordinate given all observations but its own.
        marginal: mean and variance of each coordinate given all pseudo observations.
    """

    log_evidence: Float[Array, ""]
    pseudo: PseudoObservations
    cavity: tuple[Float[Array, " m"], Float[Array, " m"]]
    marginal: tuple[Float[Array, " m"], Float[Array, " m"]]


def expectation_propagation(
    log_prob: ElementwiseLogProb,
    covariance: Float[Array, "m m"],
    observed: Bool[Array, " m"],
    rounds: int = 10,
    damping: float = 0.7,
) -> PropagationResult:
    """Approximates int prod_i p(y_i | t_i) N(t; 0, covariance) dt; exact for Gaussian likelihoods.

    Args:
        log_prob: elementwise log-likelihoods; 0 where missing.
        covariance: of the coordinates, before they are observed; their mean is 0.
        observed: False where a likelihood is missing.
        rounds: parallel updates of all pseudo observations.
        damping: weight of an update against what was there.
    """
    m = len(observed)
    # A coordinate that does not vary has a likelihood, and nothing to learn.
    observed = observed & (jnp.diagonal(covariance) > LEAST_VARIANCE)
    own = jnp.maximum(jnp.diagonal(covariance), LEAST_VARIANCE)
    fixed = jnp.sum(jnp.where(observed, 0.0, log_prob(jnp.zeros(m, own.dtype))))

    def joint(precision: Array, shift: Array) -> tuple[Array, Array, Array]:
        """Mean and variances of N(0, covariance) times the pseudo observations, and log det(I + T^1/2 B T^1/2)."""
        root = jnp.sqrt(precision)
        inner = jnp.eye(m, dtype=own.dtype) + root[:, None] * covariance * root[None]
        factor = jnp.linalg.cholesky(inner)
        half = jax.scipy.linalg.solve_triangular(factor, root[:, None] * covariance, lower=True)
        posterior = covariance - half.T @ half
        return posterior @ shift, jnp.diagonal(posterior), 2.0 * jnp.sum(jnp.log(jnp.diagonal(factor)))

    def cavity(precision: Array, shift: Array) -> tuple[Array, Array]:
        mean, variance, _ = joint(precision, shift)
        without = jnp.maximum(1.0 / jnp.maximum(variance, LEAST_VARIANCE) - precision, 1e-3 / own)
        return (mean / jnp.maximum(variance, LEAST_VARIANCE) - shift) / without, 1.0 / without

    def update(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        precision, shift = carry
        center, variance = cavity(precision, shift)
        pseudo = pseudo_observations(tilted_moments(log_prob, center, variance), center, variance)
        new = jnp.where(observed, pseudo.scale**-2, 0.0)
        keep = 1.0 - damping
        return keep * precision + damping * new, keep * shift + damping * new * jnp.where(observed, pseudo.value, 0.0)

    zero = jnp.zeros(m, own.dtype)
    precision, shift = jax.lax.fori_loop(0, rounds, update, (zero, zero))
    center, variance = cavity(precision, shift)
    tilted = tilted_moments(log_prob, center, variance)
    mean, within, log_determinant = joint(precision, shift)
    # Rasmussen & Williams (3.65), with 1/s = the pseudo precision, which may be zero.
    sites = tilted.log_normalizer + 0.5 * jnp.log1p(precision * variance)
    sites = sites + 0.5 * (precision * center**2 - 2.0 * center * shift - variance * shift**2) / (
        1.0 + precision * variance
    )
    sites = jnp.sum(jnp.where(observed, sites, 0.0))
    log_evidence = fixed + sites - 0.5 * log_determinant + 0.5 * jnp.vdot(mean, shift)
    some = precision > 0
    safe = jnp.where(some, precision, 1.0)
    stand_ins = PseudoObservations(jnp.where(some, shift / safe, 0.0), safe**-0.5)
    return PropagationResult(log_evidence, stand_ins, (center, variance), (mean, jnp.maximum(within, LEAST_VARIANCE)))
