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
from numpyro_diffusion_da.smc.ensemble_update import (
    EnsembleUpdate,
    PerturbedObservations,
    TransitionSpread,
    with_transition_spread,
)
from numpyro_diffusion_da.smc.inflation import Inflation, check_inflation, forecast_factor, inflated_particles
from numpyro_diffusion_da.smc.localization import PlacedTaper
from numpyro_diffusion_da.smc.probing import class_vectors
from numpyro_diffusion_da.smc.sharding import from_parts, own, to_parts, whole

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
        placed = taper(observation) if callable(taper) else taper
        leaves, form = jax.tree.flatten(state.particles)
        arrays = [x, *(leaves[i] for i in carried)]
        # Each device updates its places of the state in all members. Only what has the size of the observations is
        # gathered, and the mean.
        divided = _Divided(placed, arrays)
        parts = divided.parts()
        mean = divided.mean(parts[0])
        x = prior = arrays[0] = mean + factor * (x - mean)
        residual = whole(jax.vmap(lambda x, particle: residual_fn(x, particle, observation))(x, state.particles))
        # Update all members together.
        spreading: PyTree = ()
        if spread_fn is None:
            parts[0] = _widened(parts[0], factor)
            increments, error = update.solve(error_key, divided.anomalies(parts), residual, placed)
        else:
            of = map_particles(lambda vectors, particle: spread_fn(vectors, particle, observation), batch_size)
            # A fifth key leaves the others the same with and without the transition's covariance.
            vectors = class_vectors(jax.random.split(rng_key, 5)[4], n, residual.shape[1], placed)
            spread, spreading = of(own(vectors), state.particles)
            parts[0] = _widened(divided.part(spread.mean), factor)
            spread = spread._replace(
                residual=_widened(whole(spread.residual), factor),
                vectors=whole(spread.vectors),
                state_products=factor**2 * divided.products(spread.state_products, parts),
                products=factor**2 * whole(spread.products),
            )
            increments, error = with_transition_spread(error_key, divided.anomalies(parts), residual, spread, placed)
        x, *along = divided.moved(increments, parts)
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


class _Divided:
    """Division of the values of all members over the devices of a mesh, place by place.

    Without a taper each value is a place. Without a mesh one device has all places.

    Args:
        taper: localization; None for none. Its points run over the last axes of every array.
        arrays: the state and what moves along with it, each with a leading axis of this device's members.
    """

    def __init__(self, taper: PlacedTaper | None, arrays: list[Array]) -> None:
        self._arrays = arrays
        self._taper = taper
        self._size = arrays[0][0].size
        self._axis = 1 if taper is None else 2  # axis on which parts of several arrays are joined

    def _places(self, array: Array) -> tuple[int, int]:
        """Number of places of an array, and how many values of one state are at a place."""
        if self._taper is None:
            return array[0].size, 1
        return len(self._taper.points), self._size // len(self._taper.points)

    def part(self, array: Array) -> Array:
        """Places of this device in all members, shape (N, places, values)."""
        places, width = self._places(array)
        # An array of several states has them side by side at each place.
        values = jnp.moveaxis(array.reshape(len(array), -1, places, width), 1, 2)
        return to_parts(values.reshape(len(array), places, -1))

    def parts(self) -> list[Array]:
        """Places of this device in all members, of every array."""
        return [self.part(array) for array in self._arrays]

    def mean(self, part: Array) -> Array:
        """Mean state of the ensemble, with a leading axis of 1, on each device."""
        mean: Array = whole(part.mean(0), self._places(self._arrays[0])[0])
        return mean.reshape(1, *self._arrays[0].shape[1:])

    def anomalies(self, parts: list[Array]) -> Array:
        """Anomalies of all members at the places of this device, with those of all arrays joined, flattened."""
        joined = jnp.concatenate([part - part.mean(0, keepdims=True) for part in parts], axis=self._axis)
        return joined.reshape(len(joined), -1)

    def products(self, products: Array, parts: list[Array]) -> Array:
        """Vectors of the state of each member, of shape (n, q, *state), as `anomalies` has them: (N, q, values).

        They are zero for the arrays that move along.
        """
        n, q = products.shape[:2]
        places, width = self._places(self._arrays[0])
        values = jnp.moveaxis(products.reshape(n, q, places, width), 1, 2)
        found = to_parts(values.reshape(n, places, q * width))
        mine = jnp.moveaxis(found.reshape(*found.shape[:2], q, width), 2, 1)
        along = [jnp.zeros((len(mine), q, *part.shape[1:]), mine.dtype) for part in parts[1:]]
        return jnp.concatenate([mine, *along], axis=1 + self._axis).reshape(len(mine), q, -1)

    def moved(self, increments: Array, parts: list[Array]) -> list[Array]:
        """Arrays of this device's members, moved by increments of the shape of `anomalies`."""
        shape = (-1, 1) if self._taper is None else (parts[0].shape[1], -1)
        ends = np.cumsum([part.shape[self._axis] for part in parts])[:-1]
        moved = []
        split = jnp.split(increments.reshape(len(increments), *shape), ends, axis=self._axis)
        for array, part in zip(self._arrays, split, strict=True):
            places, width = self._places(array)
            values = from_parts(part, places).reshape(len(array), places, -1, width)
            moved.append(array + jnp.moveaxis(values, 2, 1).reshape(array.shape).astype(array.dtype))
        return moved


def _widened(x: Float[Array, "n ..."], factor: Array | float) -> Float[Array, "n ..."]:
    """Members widened around their mean by a factor."""
    mean = x.mean(0, keepdims=True)
    return mean + factor * (x - mean)


as_top_level_api = top_level_api(build_kernel)
"""Build the filter as a `blackjax.base.SamplingAlgorithm`, with the arguments of `build_kernel`."""
