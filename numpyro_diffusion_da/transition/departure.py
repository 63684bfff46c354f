"""Prediction of the observations by one particle, for moves of the ancestors: its log-weight and its departure.

The departure of an observation is y - E[y | c], with the expectation over the transition p(x' | c). The covariance of
the predictions comes from the transition's covariance V by products, which the weight shares if it makes them too.
Observations that are Gaussian and linear enough for `GaussianLikelihood` are whitened and linearized at the mean m of
the transition. For all others, mean and variance of the observation as functions of the state are integrated over the
one coordinate on which the observation depends (statistical linearization).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_diffusion_da.observation.likelihood import GaussianLikelihood, GeneralLikelihood, Likelihood, whiten
from numpyro_diffusion_da.observation.moment_matching import LEAST_VARIANCE
from numpyro_diffusion_da.smc.ensemble_update import TransitionSpread
from numpyro_diffusion_da.smc.kalman_move import FEW_PRODUCTS, Departure, Predicted
from numpyro_diffusion_da.smc.probing import Products
from numpyro_diffusion_da.transition.base import Dynamics, Moments
from numpyro_diffusion_da.transition.gaussian import GaussianDynamics
from numpyro_diffusion_da.transition.predictive import (
    MOST_PRODUCTS,
    ObservedSpread,
    matched_pointwise,
    observed_spread,
    temperable_pointwise,
)
from numpyro_diffusion_da.transition.weights import Moment, PredictiveWeight, WeightRecord, tangent_passes

NODES = np.linspace(-4.0, 4.0, 33)
"""Nodes of the integration over an observation's coordinate, in standard deviations."""

TANGENTS = 4
"""Largest number of directions along which an observation is followed; the one that moves it most is used."""


def predict(
    weight: PredictiveWeight,
    dynamics: Dynamics,
    likelihood: Likelihood,
    rng_key: PRNGKeyArray,
    vectors: Float[Array, "q m"] | None,
    *,
    localized: bool,
    tempered: bool,
    noise_level: float | None,
) -> tuple[Predicted, WeightRecord]:
    """Compute the log-weight of one particle, and its departure from the observations.

    Args:
        weight: estimate of log p(y | c).
        dynamics: transition p(x' | c) of the particle.
        likelihood: likelihood of the step's observations y.
        rng_key: random key of the signs of a weight's products; it should differ between particles.
        vectors: vectors of the particle's products with H V H^T, from `class_vectors`; None makes a product for each
            observation, which is exact.
        localized: whether the weight takes each observation by itself.
        tempered: whether the weight has to be known for any tempering of the observation errors.
        noise_level: noise level of a diffusion's covariance; `Moment` weights have their own.

    Returns:
        (log-weight and departure; record of the weight, with the passes of both).
    """
    moment = weight if isinstance(weight, Moment) else None
    if moment is not None:
        moments, passes = moment.spread_moments(dynamics, likelihood)
    else:
        moments = dynamics.moments(noise_level)
        passes = moments.passes.plus(tangent_passes(dynamics, likelihood))
    if vectors is None:
        observed = observed_spread(moments, dynamics.tangents(), likelihood, None, rng_key)
    else:
        # Only a weight that uses variances and an integral over coordinates need an estimate of the diagonal.
        without = 0 if isinstance(likelihood, GaussianLikelihood) else 1
        probes = without if moment is None else moment.probes
        in_order = vectors[:, jnp.argsort(_order(moments, likelihood))]
        observed = observed_spread(moments, dynamics.tangents(), likelihood, probes, rng_key, in_order)
    made = jax.tree.map(lambda n: n * observed.products, moments.passes_per_product)
    log_weight: Any
    if moment is not None and localized:
        if tempered:
            assert isinstance(likelihood, GaussianLikelihood)
            log_weight = temperable_pointwise(likelihood, moments, observed)
        else:
            log_weight = matched_pointwise(moments, likelihood, observed)
        record = WeightRecord(passes.plus(made), moments.mean)
    else:
        weigh: Callable[..., tuple[Any, WeightRecord]]
        if tempered:
            weigh = weight.temperable_pointwise if localized else weight.temperable
        else:
            weigh = weight.pointwise if localized else weight
        log_weight, own = weigh(dynamics, likelihood)
        if own.forecast is not None:
            moments = moments._replace(mean=own.forecast)
        record = WeightRecord(own.passes.plus(passes).plus(made), moments.mean)
    found = departure(moments, dynamics, likelihood, observed, vectors, moment is not None)
    return Predicted(log_weight, found), record


def exact_up_to(closed_form: bool, most_products: int) -> int:
    """Number of observed values up to which each particle makes a product for each of them.

    Args:
        closed_form: whether the transition is Gaussian in closed form, so that products take no network passes.
        most_products: this number for a diffusion.
    """
    return MOST_PRODUCTS if closed_form else most_products


def transition_spread(
    dynamics: Dynamics,
    likelihood: GaussianLikelihood,
    vectors: Float[Array, "q m"],
    noise_level: float | None,
    most_products: int = FEW_PRODUCTS,
) -> tuple[TransitionSpread, WeightRecord]:
    """Mean and covariance of one transition, as an ensemble Kalman filter uses them.

    Args:
        dynamics: transition p(x' | c) of the particle.
        likelihood: Gaussian likelihood of the step's observations.
        vectors: vectors to multiply V by where there are too many observations for a product with each.
        noise_level: noise level of a diffusion's covariance; None takes the highest.
        most_products: number of observations up to which a diffusion makes a product for each.

    Returns:
        (mean and products with the covariance; record with the network passes).
    """
    moments = dynamics.moments()
    spread, passes = moments, moments.passes
    if noise_level is not None:
        spread = dynamics.moments(noise_level)
        passes = passes.plus(spread.passes)
    residual, push = jax.linearize(likelihood.residual, moments.mean)
    transposed = jax.linear_transpose(push, moments.mean)
    m = len(residual)
    if m <= exact_up_to(isinstance(dynamics, GaussianDynamics), most_products):
        vectors = jnp.eye(m, dtype=residual.dtype)
    vectors = vectors.astype(residual.dtype)

    def product(v: Array) -> tuple[Array, Array]:
        state = spread.covariance_product(-transposed(v)[0])  # H = -dr/dx
        return state, -push(state)

    states, products = jax.vmap(product)(vectors)
    made = jax.tree.map(lambda count: count * len(vectors), spread.passes_per_product)
    record = WeightRecord(passes.plus(made), moments.mean)
    return TransitionSpread(moments.mean, residual, vectors, states, products), record


def departure(
    moments: Moments,
    dynamics: Dynamics,
    likelihood: Likelihood,
    observed: ObservedSpread,
    vectors: Float[Array, "q m"] | None,
    in_weight: bool,
) -> Departure:
    """Departure of the observations from the prediction of one particle, in the program's order of sites.

    Args:
        moments: mean and covariance of the transition.
        dynamics: the transition.
        likelihood: likelihood of the observations.
        observed: spread of the observations around the mean.
        vectors: vectors of the products in `observed`, in the program's order of sites; None if it has H V H^T.
        in_weight: whether the weight takes the spread into account.
    """
    if isinstance(likelihood, GaussianLikelihood):
        residual = likelihood.residual(moments.mean)
        one = jnp.ones_like(residual)
        spread = observed.spread if vectors is None else Products(vectors, observed.spread, one)
        return Departure(residual, one, observed.variances if in_weight else jnp.zeros_like(residual), spread)
    assert isinstance(likelihood, GeneralLikelihood)
    own = [whiten(site)[0] for site in likelihood.gaussian(moments.mean)]
    known = sum(len(r) for r in own)
    residual, error, slope = _expected(moments, dynamics, likelihood, observed.variances[known:])
    order = _order(moments, likelihood)
    residual = jnp.concatenate([*own, residual])[order]
    error = jnp.concatenate([jnp.ones(known, residual.dtype), error])[order]
    slope = jnp.concatenate([jnp.ones(known, residual.dtype), slope])[order]
    of_weight = slope**2 * observed.variances[order] if in_weight else jnp.zeros_like(residual)
    if vectors is None:
        spread = slope[:, None] * observed.spread[order][:, order] * slope[None, :]
    else:
        spread = Products(vectors, observed.spread[:, order], slope)
    return Departure(residual, error, of_weight, spread)


def _order(moments: Moments, likelihood: Likelihood) -> Int[Array, " m"]:
    """Index in `ObservedSpread` of each observation of the program."""
    if isinstance(likelihood, GaussianLikelihood):
        return jnp.arange(len(likelihood.residual(moments.mean)))
    assert isinstance(likelihood, GeneralLikelihood)
    gaussian = [len(whiten(site)[0]) for site in likelihood.gaussian(moments.mean)]
    general = [len(site.observed) for site in likelihood.general(moments.mean)]
    ends = np.cumsum([*gaussian, *general])
    return likelihood.in_order(moments.mean, jnp.split(jnp.arange(ends[-1]), ends[:-1]))


def _expected(
    moments: Moments, dynamics: Dynamics, likelihood: GeneralLikelihood, variances: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"]]:
    """Residual, error variance and slope of each observation that is not Gaussian, integrated over its coordinate.

    Args:
        moments: mean and covariance of the transition.
        dynamics: the transition.
        likelihood: likelihood of the observations.
        variances: variance of each observation's coordinate.

    Returns:
        (y - E[y | c], 0 where missing; variance of y that is not explained by a linear function of the coordinate;
        slope of that function). An observation whose distribution has no mean or no variance has a residual of 0 and a
        variance that is not finite, and one that does not depend on the state has a slope of 0.
    """
    mean = moments.mean
    tangents = dynamics.tangents()
    coordinates = likelihood.coordinates(mean, tangents)
    directions = tangents[:TANGENTS]
    _, push = jax.linearize(coordinates, mean)
    along = jax.vmap(push)(directions)  # (k, n)
    best = jnp.argmax(jnp.abs(along), axis=0)
    unit = jnp.take_along_axis(along, best[None], axis=0)[0]
    safe = jnp.where(unit != 0.0, unit, 1.0)
    variance = jnp.maximum(variances, LEAST_VARIANCE)
    # Nodes reach as far as the widest of the coordinates.
    reach = jnp.max(jnp.where(coordinates.observed & (unit != 0.0), jnp.sqrt(variance) / jnp.abs(safe), 0.0))
    nodes = jnp.asarray(NODES, mean.dtype) * jnp.maximum(reach, 1e-6)

    def at(node: Array, direction: Array) -> tuple[Array, Array]:
        sites = likelihood.general(mean + node * direction)
        unknown = [(jnp.zeros(len(s.observed)), jnp.full(len(s.observed), jnp.inf)) for s in sites]
        found = [u if s.moments is None else s.moments[1:] for s, u in zip(sites, unknown, strict=True)]
        means, errors = zip(*found, strict=True)
        return jnp.concatenate(means), jnp.concatenate(errors)

    means, errors = jax.vmap(jax.vmap(at, (None, 0)), (0, None))(nodes, directions)  # (nodes, k, n)
    means, errors = (jnp.take_along_axis(x, best[None, None], axis=1)[:, 0] for x in (means, errors))
    t = nodes[:, None] * unit[None]
    weights = jax.nn.softmax(-0.5 * t**2 / variance[None], axis=0)
    expected = jnp.sum(weights * means, axis=0)
    second = jnp.sum(weights * t**2, axis=0)
    slope = jnp.sum(weights * means * t, axis=0) / jnp.where(second > 0, second, 1.0)
    unexplained = jnp.sum(weights * (means - expected[None] - slope[None] * t) ** 2, axis=0)
    error = jnp.sum(weights * errors, axis=0) + unexplained
    sites = likelihood.general(mean)
    value = jnp.concatenate([jnp.zeros(len(s.observed)) if s.moments is None else s.moments[0] for s in sites])
    observed = jnp.concatenate([s.observed for s in sites])
    error = jnp.where(observed, error, 1.0)
    residual = jnp.where(observed & jnp.isfinite(error), value - expected, 0.0)
    return residual, error, jnp.where(unit != 0.0, slope, 0.0)
