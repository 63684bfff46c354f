r"""Predictive likelihood of the next observation, from the moments of one transition.

The transition is approximated by N(m, V), and the observations by their whitened residual r with H = -dr/dx, so
that R = I. The predictive likelihood is then $\int p(y \mid x) \, N(x; m, V) \, dx$, for all observations together or
for each observation by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.observation.likelihood import (
    Coordinates,
    GaussianLikelihood,
    GeneralLikelihood,
    Likelihood,
    whiten,
)
from numpyro_diffusion_da.observation.moment_matching import (
    LEAST_VARIANCE,
    PropagationResult,
    PseudoObservations,
    expectation_propagation,
    tilted_moments,
)
from numpyro_diffusion_da.smc.tempering import TemperableLogWeight
from numpyro_diffusion_da.transition.base import Moments

Adjoint = Callable[[Float[Array, " m"]], Array]
"""Function v -> H^T v, from whitened observation space to the shape of the state."""


def observed_covariance(
    moments: Moments, likelihood: GaussianLikelihood
) -> tuple[Float[Array, " m"], Float[Array, "m m"], Adjoint]:
    """Return the whitened residual at the mean, the covariance I + H V H^T of the observations, and the map v -> H^T v.

    It makes one covariance product for each observation.

    Args:
        moments: m and V.
        likelihood: Gaussian likelihood of the observations.

    Returns:
        (residual r, shape (m,); covariance, shape (m, m); the map from shape (m,) to the shape of the state).
    """
    residual, row, pull = _observed_product(moments, likelihood)
    return residual, jax.vmap(row)(jnp.eye(len(residual), dtype=residual.dtype)), pull


def _observed_product(
    moments: Moments, likelihood: GaussianLikelihood
) -> tuple[Float[Array, " m"], Callable[[Float[Array, " m"]], Float[Array, " m"]], Adjoint]:
    """Return the residual r at the mean, v -> (I + H V H^T) v, and v -> H^T v."""
    residual, push = jax.linearize(likelihood.residual, moments.mean)
    transposed = jax.linear_transpose(push, moments.mean)

    def pull(v: Array) -> Array:
        return -transposed(v)[0]  # H = -dr/dx

    def row(v: Array) -> Array:
        return v - push(moments.covariance_product(pull(v)))

    return residual, row, pull


MOST_PRODUCTS = 256
"""Number of observed values up to which `observed_variances` is exact, by one covariance product for each."""


def observed_variances(
    moments: Moments, observe: Callable[[Float[Array, ...]], dict[str, Array]], rng_key: PRNGKeyArray, exact: bool
) -> tuple[dict[str, Array], int]:
    """Return the diagonal of H V H^T in the unit of the observations, with H = d observe / dx at m.

    Args:
        moments: m and V.
        observe: function from a state to the mean of each observed site, by name.
        rng_key: random key of the signs v of one product, which estimates the diagonal by v (H V H^T v), without bias.
        exact: whether to make one product for each observed value instead, without error. Above `MOST_PRODUCTS` values
            there is one product with signs in any case.

    Returns:
        (variances of each site, in the shape of its value; number of covariance products made).
    """
    flat, restore = ravel_pytree(observe(moments.mean))
    _, push = jax.linearize(lambda x: ravel_pytree(observe(x))[0], moments.mean)
    transposed = jax.linear_transpose(push, moments.mean)

    def product(v: Array) -> Array:
        return push(moments.covariance_product(transposed(v)[0]))

    if exact and len(flat) <= MOST_PRODUCTS:
        found = jax.vmap(lambda v: jnp.vdot(v, product(v)))(jnp.eye(len(flat), dtype=flat.dtype))
        return restore(found), len(flat)
    signs = jax.random.rademacher(rng_key, flat.shape, flat.dtype)
    return restore(signs * product(signs)), 1


class ObservedSpread(NamedTuple):
    """Observations around the mean of one transition, in the order: Gaussian ones first, then the n others.

    Gaussian observations are whitened, and the others are replaced by their coordinates.

    Attributes:
        residual: whitened residual at the mean, shape (m,); 0 for coordinates.
        spread: H V H^T, shape (m, m), or its products with given vectors, shape (q, m); None if neither is asked for.
        variances: its diagonal, or the estimate of it, shape (m,); at least 0, and 0 if no estimate is asked for.
        coordinates: coordinates of the observations that are not Gaussian; None if all are.
        products: number of covariance products made.
    """

    residual: Float[Array, " m"]
    spread: Any
    variances: Float[Array, " m"]
    coordinates: Coordinates | None
    products: int


def observed_spread(
    moments: Moments,
    tangents: Float[Array, "k ..."],
    likelihood: Likelihood,
    probes: int | None,
    rng_key: PRNGKeyArray,
    vectors: Float[Array, "q m"] | None = None,
) -> ObservedSpread:
    """Compute the spread of the observations around the mean of one transition.

    Args:
        moments: m and V.
        tangents: directions in which the state may vary, from `Dynamics.tangents`.
        likelihood: likelihood of all observations.
        probes: number of products with random signs that estimate the diagonal of H V H^T (Bekas, Kokiopoulou & Saad
            2007, Appl. Numer. Math. 57, 1214); None makes one product for each observation, without error.
        rng_key: random key of the signs.
        vectors: vectors to multiply H V H^T by besides, in the order of `ObservedSpread`; None for none.
    """
    coordinates, local = None, likelihood
    if not isinstance(likelihood, GaussianLikelihood):
        assert isinstance(likelihood, GeneralLikelihood)
        coordinates = likelihood.coordinates(moments.mean, tangents)
        n = len(coordinates.observed)
        unit = PseudoObservations(jnp.zeros(n, moments.mean.dtype), jnp.ones(n, moments.mean.dtype))
        local = likelihood.with_pseudo(coordinates, unit)
    assert isinstance(local, GaussianLikelihood)
    residual, row, _ = _observed_product(moments, local)
    m = len(residual)

    def spread_products(rows: Array) -> Array:
        return jax.vmap(row)(rows) - rows

    if probes is None:
        spread = spread_products(jnp.eye(m, dtype=residual.dtype))
        return ObservedSpread(residual, spread, jnp.maximum(spread.diagonal(), 0.0), coordinates, m)
    variances, found, made = jnp.zeros_like(residual), None, probes
    if probes:
        signs = jax.random.rademacher(rng_key, (probes, m), residual.dtype)
        variances = jnp.maximum(jnp.mean(spread_products(signs) * signs, axis=0), 0.0)
    if vectors is not None:
        found, made = spread_products(vectors.astype(residual.dtype)), made + len(vectors)
    return ObservedSpread(residual, found, variances, coordinates, made)


def matched_pointwise(moments: Moments, likelihood: Likelihood, observed: ObservedSpread) -> Float[Array, " m"]:
    """Return the log of int p(y_j | x) N(x; m, V) dx for each observation by itself, site by site; 0 where missing.

    Args:
        moments: m and V.
        likelihood: likelihood of all observations.
        observed: spread of the observations.

    Returns:
        Log predictive likelihoods, shape (m,).
    """

    # Turn log N(r; 0, 1) into log N(r; 0, 1 + variance).
    def widened(logs: Array, residual: Array, variance: Array) -> Array:
        return logs + 0.5 * residual**2 * variance / (1.0 + variance) - 0.5 * jnp.log1p(variance)

    if isinstance(likelihood, GaussianLikelihood):
        return widened(likelihood.pointwise(moments.mean), observed.residual, observed.variances)
    assert isinstance(likelihood, GeneralLikelihood)
    coordinates, variance = observed.coordinates, observed.variances
    assert coordinates is not None
    # Observations that are not Gaussian: integrate over their coordinate by quadrature.
    spread = jnp.maximum(variance[-len(coordinates.observed) :], LEAST_VARIANCE)
    tilted = tilted_moments(coordinates.log_prob, jnp.zeros_like(spread), spread)
    general = jnp.split(tilted.log_normalizer, np.cumsum(coordinates.sizes)[:-1])
    gaussian, start = [], 0
    for r, normalizer in map(whiten, likelihood.gaussian(moments.mean)):
        gaussian.append(widened(normalizer - 0.5 * r**2, r, variance[start : start + len(r)]))
        start += len(r)
    return likelihood.in_order(moments.mean, [*gaussian, *general])


def temperable_pointwise(
    likelihood: GaussianLikelihood, moments: Moments, observed: ObservedSpread
) -> TemperableLogWeight:
    """Return the log of int p(y_j | x)^alpha N(x; m, V) dx for any alpha, for each observation by itself.

    Args:
        likelihood: Gaussian likelihood of all observations.
        moments: m and V.
        observed: spread of the observations.
    """
    return TemperableLogWeight(likelihood.log_normalizers(moments.mean), observed.residual**2, observed.variances)


def temperable(moments: Moments, likelihood: GaussianLikelihood) -> TemperableLogWeight:
    """Return the log of int p(y | x)^alpha N(x; m, V) dx for any alpha, as terms along the eigenvectors of H V H^T.

    It makes one covariance product for each observation.

    Args:
        moments: m and V.
        likelihood: Gaussian likelihood of all observations.
    """
    residual, covariance, _ = observed_covariance(moments, likelihood)
    values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.T))
    along = (vectors.T @ residual) ** 2
    return TemperableLogWeight(likelihood.log_normalizers(moments.mean), along, jnp.maximum(values - 1.0, 0.0))


def matched(
    moments: Moments, tangents: Float[Array, "k ..."], likelihood: Likelihood
) -> tuple[GaussianLikelihood, Float[Array, ""]]:
    """Return a Gaussian likelihood with the same effect on N(m, V), and the log of int p(y | x) N(x; m, V) dx.

    A Gaussian likelihood is returned unchanged, and linearized at m for the integral. Any other likelihood is replaced
    by expectation propagation over the coordinates of the observations. It makes one covariance product for each
    observation.

    Args:
        moments: m and V.
        tangents: directions in which the state may vary, from `Dynamics.tangents`.
        likelihood: likelihood of all observations.

    Returns:
        (Gaussian likelihood; log predictive likelihood, a scalar).
    """
    if isinstance(likelihood, GaussianLikelihood):
        residual, covariance, _ = observed_covariance(moments, likelihood)
        values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.T))
        values = jnp.maximum(values, 1.0)  # at least R, the identity here, because a learned V may not be positive
        exponent = jnp.sum(jnp.log(values)) + jnp.sum((vectors.T @ residual) ** 2 / values)
        return likelihood, likelihood.log_normalizer(moments.mean) - 0.5 * exponent
    assert isinstance(likelihood, GeneralLikelihood)
    found = _by_coordinates(moments, tangents, likelihood)
    log_evidence = found.evidence.log_evidence + likelihood.gaussian_log_normalizer(moments.mean)
    return found.local, log_evidence


class _ByCoordinates(NamedTuple):
    """Result of expectation propagation over the observations, in the order: Gaussian ones first, then the n others.

    Attributes:
        coordinates: coordinates of the n observations that are not Gaussian.
        local: Gaussian likelihood with the same effect.
        evidence: result of the propagation over all m observations.
        between: covariance H V H^T of all coordinates before they are observed, shape (m, m).
        pull: map v -> H^T v over all observations.
    """

    coordinates: Coordinates
    local: GaussianLikelihood
    evidence: PropagationResult
    between: Float[Array, "m m"]
    pull: Adjoint


def _by_coordinates(moments: Moments, tangents: Float[Array, "k ..."], likelihood: GeneralLikelihood) -> _ByCoordinates:
    """Replace observations that are not Gaussian by expectation propagation over the coordinates of all."""
    coordinates = likelihood.coordinates(moments.mean, tangents)
    n = len(coordinates.observed)
    unit = PseudoObservations(jnp.zeros(n, moments.mean.dtype), jnp.ones(n, moments.mean.dtype))
    residual, covariance, pull = observed_covariance(moments, likelihood.with_pseudo(coordinates, unit))
    known = residual[:-n]

    # A Gaussian observation has h(x) - h(m) over its error as coordinate, and a unit Gaussian as likelihood.
    def log_prob(t: Array) -> Array:
        return jnp.concatenate([-0.5 * (known - t[:-n]) ** 2, coordinates.log_prob(t[-n:])])

    values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.T))
    between = (vectors * jnp.maximum(values - 1.0, 0.0)[None]) @ vectors.T
    seen = jnp.concatenate([jnp.ones(len(known), bool), coordinates.observed])
    evidence = expectation_propagation(log_prob, between, seen)
    pseudo = PseudoObservations(evidence.pseudo.value[-n:], evidence.pseudo.scale[-n:])
    return _ByCoordinates(coordinates, likelihood.with_pseudo(coordinates, pseudo), evidence, between, pull)
