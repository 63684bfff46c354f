"""Ensemble Kalman filter: a linear update with the ensemble's own covariances, without weights.

It is the standard filter of the field, for comparison. The kernel needs three functions of a model:

- ``forecast_fn(rng_key, particle, observation) -> (x, record)``: a draw of the next state,
- ``residual_fn(x, particle, observation) -> R^{-1/2} (y - h(x))``, zero where missing,
- ``advance_fn(rng_key, x, particle, observation, record) -> (particle, record)``: the particle of an analyzed state x.

A particle may hold arrays besides x that the analysis has to change too: a parameter, or an earlier state that the next
forecast starts from. The update moves those that `carried` names by their own regression on the observations, as it
moves x.

An `EnsembleUpdate` gives the increment of each member: with perturbed observations or by a square root, with a taper
or without. Inflation widens the forecast before the update (`ForecastMultiplicative`) or the analysis after it (all
others).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.smc.base import (
    Info,
    Kernel,
    State,
    init,
    make_info,
    map_particles,
    particle_keys,
    top_level_api,
    total_particles,
)
from numpyro_diffusion_da.smc.ensemble_update import (
    EnsembleUpdate,
    PerturbedObservations,
    TransitionSpread,
    with_transition_spread,
)
from numpyro_diffusion_da.smc.inflation import Inflation, check_inflation, forecast_factor, inflated
from numpyro_diffusion_da.smc.localization import PlacedTaper
from numpyro_diffusion_da.smc.probing import class_vectors
from numpyro_diffusion_da.smc.sharding import own, whole

__all__ = ["Info", "State", "as_top_level_api", "build_kernel", "init"]


def build_kernel(
    forecast_fn: Callable[[PRNGKeyArray, PyTree, PyTree], tuple[Any, PyTree]],
    residual_fn: Callable[[Any, PyTree, PyTree], Any],
    advance_fn: Callable[[PRNGKeyArray, Any, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    update: EnsembleUpdate = PerturbedObservations(),
    taper: PlacedTaper | Callable[[PyTree], PlacedTaper] | None = None,
    inflation: Sequence[Inflation] = (),
    batch_size: int | None = None,
    carried: Sequence[int] = (),
    spread_fn: Callable[[Array, PyTree, PyTree], tuple[TransitionSpread, PyTree]] | None = None,
) -> Kernel:
    """Build the kernel of the ensemble Kalman filter.

    Args:
        forecast_fn: (rng_key, particle, observation) -> (x, record), a draw of the next state.
        residual_fn: (x, particle, observation) -> R^{-1/2} (y - h(x)), zero where missing.
        advance_fn: (rng_key, x, particle, observation, record) -> (particle, record), the particle of an analyzed x.
        update: update of the ensemble, `PerturbedObservations()` or `SquareRoot()`.
        taper: localization at the positions of the model's values; a function (observation) -> `PlacedTaper` if
            observations move from step to step; None for no localization.
        inflation: sequence of inflations. `ForecastMultiplicative` acts on the forecast before the update, all others
            act on the analysis, in their order.
        batch_size: number of particles mapped at a time, which bounds the memory; None maps all at once.
        carried: indices of the arrays of a particle, in the order of its leaves, that the update moves along with x.
            With a taper, their last axes must be those of x. Inflation acts on x only.
        spread_fn: (vectors, particle, observation) -> (`TransitionSpread`, record), for one particle. With it, the
            covariance of the transition is taken from it and not sampled, and `update` is not used (see
            `ensemble_update.with_transition_spread`); None samples it.

    Returns:
        kernel(rng_key, state, observation) -> (State, Info), pure and jit-able.

    Raises:
        TypeError: `inflation` is not a sequence of `Inflation`.
        ValueError: the kernel gets fewer than two particles, or `update` and `taper` do not fit together.
    """
    check_inflation(inflation, "EnKF", paired=True)
    factor = forecast_factor(inflation)
    after = [member for member in inflation if not member.acts_on_forecast]

    def kernel(rng_key: PRNGKeyArray, state: State, observation: PyTree) -> tuple[State, Info]:
        n = total_particles(state.particles)
        if n < 2:
            raise ValueError("EnKF got one particle, but one particle has no covariance; give 2 or more.")
        forecast_key, error_key, advance_key = jax.random.split(rng_key, 3)

        # Forecast each member, and widen the forecast.
        forecast = map_particles(lambda key, particle: forecast_fn(key, particle, observation), batch_size)
        x, record = forecast(own(particle_keys(forecast_key, n)), state.particles)
        x = whole(x)
        mean = x.mean(0, keepdims=True)
        x = mean + factor * (x - mean)
        # Update all members together.
        residual = whole(jax.vmap(lambda x, particle: residual_fn(x, particle, observation))(own(x), state.particles))
        prior = x
        placed = taper(observation) if callable(taper) else taper
        leaves, form = jax.tree.flatten(state.particles)
        moving = [x, *(whole(leaves[i]) for i in carried)]
        spreading: PyTree = ()
        if spread_fn is None:
            moved, error = _moved(
                lambda anomalies: update.solve(error_key, anomalies, residual, placed), moving, moving, placed
            )
        else:
            of = map_particles(lambda vectors, particle: spread_fn(vectors, particle, observation), batch_size)
            # A fifth key leaves the others the same with and without the transition's covariance.
            vectors = class_vectors(jax.random.split(rng_key, 5)[4], n, residual.shape[1], placed)
            spread, spreading = of(own(vectors), state.particles)
            spread = _widened(whole(spread), factor)
            none = [jnp.zeros((n * spread.vectors.shape[1], *a.shape[1:]), a.dtype) for a in moving[1:]]
            products = spread.state_products.reshape(-1, *x.shape[1:])
            columns = _columns([products, *none], placed).reshape(n, -1, sum(a[0].size for a in moving))
            spread = spread._replace(state_products=columns)
            moved, error = _moved(
                lambda anomalies: with_transition_spread(error_key, anomalies, residual, spread, placed),
                moving,
                [spread.mean, *moving[1:]],
                placed,
            )
        x = moved[0]
        for i, leaf in zip(carried, moved[1:], strict=True):
            leaves[i] = own(leaf)
        analyzed = jax.tree.unflatten(form, leaves)
        # The key of the inflation is a fourth one, so that the other three are the same with and without inflation.
        x = own(inflated(after, jax.random.split(rng_key, 4)[3], x, prior))

        # Turn the analyzed states into particles.
        advance = map_particles(
            lambda key, x, particle, record: advance_fn(key, x, particle, observation, record), batch_size
        )
        particles, record = advance(own(particle_keys(advance_key, n)), x, analyzed, record)
        zeros = jnp.zeros(n, residual.dtype)
        info = make_info(zeros, jnp.arange(n), jnp.ones(()), particles, spreading, record)
        return State(particles, state.log_evidence), info._replace(solver_residual=error)

    return kernel


def _columns(arrays: list[Array], taper: PlacedTaper | None) -> Array:
    """Join arrays with a leading axis of N to one of shape (N, values), place by place if there is a taper.

    Args:
        arrays: the state and what moves along with it.
        taper: localization; None for none. Its points run over the last axes of every array.
    """
    n, places = len(arrays[0]), 1 if taper is None else len(taper.points)
    size = arrays[0][0].size
    parts = []
    for array in arrays:
        values = array.reshape(n, -1)
        if taper is not None:  # an array of several states has them side by side at each point
            values = jnp.moveaxis(values.reshape(n, -1, places, size // places), 1, 2)
        parts.append(values.reshape(n, places, -1))
    return jnp.concatenate(parts, axis=2).reshape(n, -1)


def _moved(
    increments_of: Callable[[Array], tuple[Array, Array]],
    arrays: list[Array],
    around: list[Array],
    taper: PlacedTaper | None,
) -> tuple[list[Array], Array]:
    """Move several arrays of an ensemble by one update.

    Args:
        increments_of: function from anomalies to increments, both of shape (N, values), and the residual of the solve.
        arrays: the state and what moves along with it, each with a leading axis of N.
        around: arrays of the same shapes whose anomalies the update takes.
        taper: localization; None for none. Its points run over the last axes of every array.

    Returns:
        (the moved arrays, relative residual of the linear solve).
    """
    n, places = len(arrays[0]), 1 if taper is None else len(taper.points)
    size = arrays[0].size // n
    increments, error = increments_of(_columns([x - x.mean(0, keepdims=True) for x in around], taper))
    ends = np.cumsum([x.size // n // places for x in arrays])[:-1]
    moved = []
    for array, part in zip(arrays, jnp.split(increments.reshape(n, places, -1), ends, axis=2), strict=True):
        if taper is not None:
            part = jnp.moveaxis(part.reshape(n, places, -1, size // places), 2, 1)
        moved.append(array + part.reshape(array.shape).astype(array.dtype))
    return moved, error


def _widened(spread: TransitionSpread, factor: Array | float) -> TransitionSpread:
    """Spread of an ensemble whose forecast is widened by a factor around its mean."""
    mean, residual = spread.mean.mean(0, keepdims=True), spread.residual.mean(0, keepdims=True)
    return spread._replace(
        mean=mean + factor * (spread.mean - mean),
        residual=residual + factor * (spread.residual - residual),
        state_products=factor**2 * spread.state_products,
        products=factor**2 * spread.products,
    )


as_top_level_api = top_level_api(build_kernel)
"""Build the filter as a `blackjax.base.SamplingAlgorithm`, with the arguments of `build_kernel`."""
