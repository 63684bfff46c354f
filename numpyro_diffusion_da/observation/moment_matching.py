r"""Gaussian approximation of any likelihood, by moment matching along one coordinate per observation.

A non-Gaussian observation depends on the state through one coordinate $t$ (`likelihood.Coordinates`), which has a
Gaussian distribution before the observation. `tilted_moments` integrates the likelihood against this Gaussian on a
grid. The pseudo observation $\mathcal N(v; t, s^2)$ of value $v$ and scale $s$ that has the same effect on the mean and
variance of $t$ then replaces the likelihood in all linear computations.

The score of the evidence is exact for one observation, and for several that depend on independent coordinates. If the
coordinates are correlated and their covariance is known, expectation propagation makes the pseudo observations
consistent with each other (Minka 2001; Rasmussen & Williams 2006, Algorithm 3.5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

ElementwiseLogProb = Callable[[Float[Array, " m"]], Float[Array, " m"]]
"""Function from t, shape (m,), to log p(y_i | t_i) of each observation, shape (m,)."""

NODES = 65
ROUNDS = 5
RESOLVED = 0.25  # smallest ratio of the half-widths of two grids at which the second needs no further refinement
REACH = 6.0  # half-width of the first grid, in standard deviations
LEAST_VARIANCE = 1e-10  # variance of a coordinate
LEAST_PRECISION = 1e-3  # precision of a pseudo observation, relative to the precision of its coordinate


class TiltedMoments(NamedTuple):
    """Moments of the tilted densities p(y_i | t) N(t; center_i, variance_i), each of shape (m,).

    Attributes:
        log_normalizer: logarithm of the density's integral over t.
        mean: mean of the normalized density.
        variance: variance of the normalized density.
    """

    log_normalizer: Float[Array, " m"]
    mean: Float[Array, " m"]
    variance: Float[Array, " m"]


def tilted_moments(
    log_prob: ElementwiseLogProb, center: Float[Array, " m"], variance: Float[Array, " m"]
) -> TiltedMoments:
    """Moments of the tilted densities p(y_i | t) N(t; center_i, variance_i), by quadrature.

    The grid is refined around the density that it finds until it resolves the narrower of the two factors.

    Args:
        log_prob: elementwise log-likelihoods; NaN counts as a likelihood of zero.
        center: means of the Gaussians.
        variance: variances of the Gaussians, positive.
    """
    return _tilted(log_prob, center, variance)[0]


def tilted_quantiles(
    log_prob: ElementwiseLogProb, center: Float[Array, " m"], variance: Float[Array, " m"], levels: Float[Array, " m"]
) -> Float[Array, " m"]:
    """Quantiles of the tilted densities p(y_i | t) N(t; center_i, variance_i), by quadrature.

    Args:
        log_prob: elementwise log-likelihoods; NaN counts as a likelihood of zero.
        center: means of the Gaussians.
        variance: variances of the Gaussians, positive.
        levels: values of the distribution functions, from 0 to 1.
    """
    _, nodes, weights = _tilted(log_prob, center, variance)
    # The density is taken to be constant on the interval around each node.
    below = jnp.cumsum(weights, axis=1)
    at = jnp.clip(jnp.sum(below < levels[:, None], axis=1), 0, NODES - 1)[:, None]
    share, until = jnp.take_along_axis(weights, at, axis=1)[:, 0], jnp.take_along_axis(below, at, axis=1)[:, 0]
    inside = jnp.where(share > 0, 0.5 - (until - levels) / jnp.where(share > 0, share, 1.0), 0.0)
    return jnp.take_along_axis(nodes, at, axis=1)[:, 0] + jnp.clip(inside, -0.5, 0.5) * (nodes[:, 1] - nodes[:, 0])


def _tilted(
    log_prob: ElementwiseLogProb, center: Float[Array, " m"], variance: Float[Array, " m"]
) -> tuple[TiltedMoments, Float[Array, "m k"], Float[Array, "m k"]]:
    """Moments of the tilted densities, and the nodes and weights of the last grid, each of shape (m, k)."""
    spread = jnp.sqrt(variance)
    steps = jnp.linspace(-1.0, 1.0, NODES, dtype=center.dtype)

    # Nodes are the last axis, which is the longest: with one short array per particle, sums over it are the fastest.
    def on_grid(middle: Array, half: Array) -> tuple[TiltedMoments, Array, Array]:
        t = middle[:, None] + half[:, None] * steps[None]
        logs = jax.vmap(log_prob, in_axes=1, out_axes=1)(t)
        exponent = -0.5 * ((t - center[:, None]) / spread[:, None]) ** 2
        logs = jax.lax.optimization_barrier(jnp.where(jnp.isnan(logs), -jnp.inf, logs) + exponent)
        possible = jnp.isfinite(jnp.max(logs, axis=1))
        # Without the barriers, each sum below would evaluate the likelihood again.
        logs = jax.lax.optimization_barrier(jnp.where(possible[:, None], logs, exponent))
        largest = jax.lax.stop_gradient(jnp.max(logs, axis=1))
        density = jax.lax.optimization_barrier(jnp.exp(logs - largest[:, None]))
        total = jnp.sum(density, axis=1)
        weights = density / total[:, None]
        mean = jnp.sum(weights * t, axis=1)
        second = jnp.sum(weights * (t - mean[:, None]) ** 2, axis=1)
        spacing = 2.0 * half / (NODES - 1)
        log_normalizer = largest + jnp.log(total * spacing / spread) - 0.5 * jnp.log(2.0 * jnp.pi)
        return TiltedMoments(jnp.where(possible, log_normalizer, -jnp.inf), mean, second), t, weights

    def refine(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        round_, middle, half, done = carry
        moments = jax.lax.stop_gradient(on_grid(middle, half)[0])
        # If the mean is near the edge, the mass may lie beyond it: recenter the grid and widen it.
        inside = jnp.abs(moments.mean - middle) < 0.8 * half
        narrower = jnp.clip(REACH * jnp.sqrt(moments.variance), 4.0 * half / (NODES - 1), half)
        new = moments.mean, jnp.where(inside, narrower, 2.0 * half)
        # The next grid is the last one if the density was resolved well enough to place it.
        resolved = (inside & (narrower >= RESOLVED * half)) | ~jnp.isfinite(moments.mean)
        return round_ + 1, jnp.where(done, middle, new[0]), jnp.where(done, half, new[1]), done | resolved

    # Where the nodes lie does not change the integral, so the search for them has no gradient. A loop without gradients
    # may end early, which saves most evaluations of the likelihood.
    first = jnp.zeros((), int), center, REACH * spread, jnp.zeros(center.shape, bool)
    start = jax.lax.stop_gradient(first)
    grid = jax.lax.while_loop(lambda carry: (carry[0] < ROUNDS - 1) & ~jnp.all(carry[3]), refine, start)
    return on_grid(grid[1], grid[2])


class PseudoObservations(NamedTuple):
    """Gaussian observations N(value; t, scale^2) of coordinates t.

    Attributes:
        value: observed values, shape (m,).
        scale: standard deviations of the errors, shape (m,).
    """

    value: Float[Array, " m"]
    scale: Float[Array, " m"]


def pseudo_observations(
    tilted: TiltedMoments, center: Float[Array, " m"], variance: Float[Array, " m"]
) -> PseudoObservations:
    """Pseudo observations that take the Gaussians N(center, variance) to the tilted means and variances.

    A likelihood can increase the variance of its coordinate (an outlier under heavy tails, two modes), and a Gaussian
    observation cannot. The precision is then held at `LEAST_PRECISION`, and only the mean is matched.
    """
    precision = jnp.maximum(1.0 / tilted.variance - 1.0 / variance, LEAST_PRECISION / variance)
    score = (tilted.mean - center) / variance
    return PseudoObservations(center + score * (1.0 / precision + variance), precision**-0.5)


class PropagationResult(NamedTuple):
    """Result of expectation propagation.

    Attributes:
        log_evidence: logarithm of the integral of all likelihoods against the Gaussian.
        pseudo: final pseudo observations. Those of missing observations, whose scale would be infinite, have the value
            0 and the scale 1.
        cavity: mean and variance of each coordinate given all pseudo observations but its own.
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
    r"""Approximate the evidence of all likelihoods by expectation propagation, exact for Gaussian likelihoods.

    The evidence is $\int \prod_i p(y_i | t_i) \, \mathcal N(t; 0, B) \, dt$, with $B$ the coordinates' covariance.

    Args:
        log_prob: elementwise log-likelihoods; 0 where missing.
        covariance: covariance of the coordinates before the observations. Their mean is 0.
        observed: False where a likelihood is missing.
        rounds: number of updates, each of all pseudo observations in parallel.
        damping: weight of the new pseudo observations in an update; the old ones have the rest.

    Returns:
        The log-evidence, the pseudo observations, and the moments of each coordinate.
    """
    m = len(observed)
    # A coordinate without variance contributes a constant likelihood and needs no pseudo observation.
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
    # Rasmussen & Williams (2006), eq. 3.65, written with pseudo precisions 1/s, which may be zero.
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
