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
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

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
from numpyro_diffusion_da.smc.columns import Index, by_place, from_places, map_columns
from numpyro_diffusion_da.smc.ensemble_update import (
    EnsembleUpdate,
    PerturbedObservations,
    TransitionSpread,
    with_transition_spread,
)
from numpyro_diffusion_da.smc.inflation import Inflation, check_inflation, forecast_factor, inflated_particles
from numpyro_diffusion_da.smc.localization import PlacedTaper
from numpyro_diffusion_da.smc.probing import class_vectors
from numpyro_diffusion_da.smc.sharding import own, together

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

    def widened(x: Array) -> Array:
        """Members widened around their mean by the factor of the forecast."""
        if len(after) == len(inflation):
            return x
        flat = map_particles(lambda x: x.reshape(-1))(x)
        _, mean = map_columns(lambda parts, _: ([], parts[0].mean(0)), [flat])
        mean = mean.reshape(x.shape[1:])
        found: Array = map_particles(lambda x: mean + factor * (x - mean))(x)
        return found

    def kernel(rng_key: PRNGKeyArray, state: State, observation: PyTree) -> tuple[State, Info]:
        n = total_particles(state.particles)
        if n < 2:
            raise ValueError("EnKF got one particle, but one particle has no covariance; give 2 or more.")
        forecast_key, error_key, advance_key = jax.random.split(rng_key, 3)

        # Forecast each member, and widen the forecast.
        forecast = map_particles(lambda key, particle: forecast_fn(key, particle, observation), batch_size)
        x, record = forecast(own(particle_keys(forecast_key, n)), state.particles)
        placed = taper(observation) if callable(taper) else taper
        leaves, form = jax.tree.flatten(state.particles)
        x = prior = widened(x)
        residual_of = map_particles(lambda x, particle: residual_fn(x, particle, observation))
        residual = together(residual_of(x, state.particles))
        # Update the columns of all members. What has the size of the observations is in one place, and nothing else.
        arrays = [x, *(leaves[i] for i in carried)]
        columns = _Columns(placed, arrays)
        spreading: PyTree = ()
        if spread_fn is None:
            of_columns, error = update.prepared(error_key, residual, placed)

            def moved(parts: list[Array], index: Index) -> tuple[list[Array], tuple[()]]:
                (values,) = parts
                increments = of_columns(_anomalies(values), index)
                return [values + increments.reshape(values.shape)], ()

            found, _ = map_columns(moved, [columns.joined(arrays)])
        else:
            of = map_particles(lambda vectors, particle: spread_fn(vectors, particle, observation), batch_size)
            # A fifth key leaves the others the same with and without the transition's covariance.
            vectors = class_vectors(jax.random.split(rng_key, 5)[4], n, residual.shape[1], placed)
            spread, spreading = of(own(vectors), state.particles)
            seen = spread._replace(
                mean=(),
                residual=_widened(together(spread.residual), factor),
                vectors=together(spread.vectors),
                state_products=(),
                products=factor**2 * together(spread.products),
            )
            with_spread, error = with_transition_spread(error_key, residual, seen, placed)

            def moved(parts: list[Array], index: Index) -> tuple[list[Array], tuple[()]]:
                values, means, products = parts
                # The products of each member are rows of their own, (N q, values).
                rows = jnp.moveaxis(products, 2, 1).reshape(-1, values[0].size)
                increments = with_spread(_anomalies(means), factor**2 * rows, index)
                return [values + increments.reshape(values.shape)], ()

            means = [widened(spread.mean), *arrays[1:]]
            joined = columns.joined(arrays), columns.joined(means), columns.products(spread)
            found, _ = map_columns(moved, [*joined])
        x, *along = columns.arrays(found[0])
        for i, leaf in zip(carried, along, strict=True):
            leaves[i] = leaf
        analyzed = jax.tree.unflatten(form, leaves)
        # The key of the inflation is a fourth one, so that the other three are the same with and without inflation.
        x = inflated_particles(after, jax.random.split(rng_key, 4)[3], x, prior)

        # Turn the analyzed states into particles.
        advance = map_particles(
            lambda key, x, particle, record: advance_fn(key, x, particle, observation, record), batch_size
        )
        particles, record = advance(own(particle_keys(advance_key, n)), x, analyzed, record)
        zeros = jnp.zeros(n, residual.dtype)
        info = make_info(zeros, jnp.arange(n), jnp.ones(()), particles, spreading, record)
        return State(particles, state.log_evidence), info._replace(solver_residual=error)

    return kernel


class _Columns:
    """Columns of the state and of what moves along with it: its places, or without a taper each value.

    Args:
        taper: localization; None for none. Its points run over the last axes of every array.
        arrays: the state and what moves along with it, each with a leading axis of members.
    """

    def __init__(self, taper: PlacedTaper | None, arrays: list[Array]) -> None:
        self._like = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays]
        size = arrays[0][0].size
        self._by_place = taper is not None
        self._places = size if taper is None else len(taper.points)
        self._width = size // self._places
        self._axis = int(self._by_place)  # axis on which values of several arrays are joined

    def _columns_of(self, x: Any) -> Array:
        """Values of an array of one member, shape (columns, values)."""
        return by_place(x, self._places, self._width) if self._by_place else x.reshape(-1, 1)

    def joined(self, arrays: list[Array]) -> Array:
        """Values of all arrays and members, joined, shape (N, columns, values)."""
        return map_particles(lambda *xs: jnp.concatenate([self._columns_of(x) for x in xs], axis=self._axis))(*arrays)

    def products(self, spread: TransitionSpread) -> Array:
        """Vectors V H^T v of the state as `joined` has it, and zero for the other arrays: (N, columns, q, values)."""
        others = [jax.eval_shape(self._columns_of, x).shape for x in self._like[1:]]

        def of_one(products: Array) -> Array:
            def with_zeros(product: Array) -> Array:
                mine = self._columns_of(product)
                zeros = [jnp.zeros(shape, mine.dtype) for shape in others]
                return jnp.concatenate([mine, *zeros], axis=self._axis)

            return jnp.moveaxis(jax.vmap(with_zeros)(products), 0, 1)

        return map_particles(of_one)(spread.state_products)

    def arrays(self, joined: Array) -> list[Array]:
        """Arrays of all members, of their joined values."""

        def of_one(values: Array) -> list[Array]:
            shapes = [jax.eval_shape(self._columns_of, x).shape for x in self._like]
            ends = np.cumsum([shape[self._axis] for shape in shapes])[:-1]
            parts = jnp.split(values, ends, axis=self._axis)
            return [
                from_places(part, like, self._width) if self._by_place else part.reshape(like.shape).astype(like.dtype)
                for part, like in zip(parts, self._like, strict=True)
            ]

        return map_particles(of_one)(joined)


def _anomalies(values: Float[Array, "n c w"]) -> Float[Array, "n d"]:
    """Anomalies of all members in some columns, flattened."""
    return (values - values.mean(0, keepdims=True)).reshape(len(values), -1)


def _widened(x: Float[Array, "n ..."], factor: Array | float) -> Float[Array, "n ..."]:
    """Members widened around their mean by a factor."""
    mean = x.mean(0, keepdims=True)
    return mean + factor * (x - mean)


as_top_level_api = top_level_api(build_kernel)
"""Build the filter as a `blackjax.base.SamplingAlgorithm`, with the arguments of `build_kernel`."""
