"""Inflation: what is done to an analysis whose spread has become too small, before it is forecast from.

An ensemble of few members, a model without errors of its own, or a selection by many observations leave an analysis
that is too sure. With s_a and s_b the standard deviations, in each component of the state, of the analysis and of the
forecast ensemble that it was made from, and an apostrophe for what a member differs from its mean by,

- `RTPS`, relaxation to prior spread (Whitaker & Hamill 2012, Mon. Weather Rev. 140, 3078):
  s_a becomes s_a + alpha (s_b - s_a), each component's anomalies being multiplied by one factor;
- `RTPP`, relaxation to prior perturbations (Zhang, Snyder & Sun 2004, Mon. Weather Rev. 132, 1238):
  x_a' becomes (1 - alpha) x_a' + alpha x_b', member by member;
- `Multiplicative`: x_a' becomes factor x_a' (Anderson & Anderson 1999, there of the forecast);
- `Jitter`: noise is added (roughening: Gordon, Salmond & Smith 1993).

None moves the mean. Each is a value; a filter takes a sequence of them and applies them in its order. Members that hold
a value that is not finite count for nothing, and stay as they are.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.smc.base import particle_keys


class Inflation(eqx.Module):
    """How the members of an analysis are spread out."""

    needs_forecast: ClassVar[bool] = False
    """Whether it looks at the forecast; a filter that has none at hand draws one then."""
    pairs_members: ClassVar[bool] = False
    """Whether it takes member i of analysis and forecast to belong together."""
    acts_on_forecast: ClassVar[bool] = False
    """Whether it widens the forecast before the update, and not the analysis after it."""

    @abc.abstractmethod
    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """The inflated members.

        Args:
            rng_key: of the step.
            analysis: members of the analysis, equally weighted.
            forecast: members of the forecast; None is enough for a inflation that does not need it.
        """


class RTPS(Inflation):
    """Relaxation to prior spread: s_a becomes s_a + alpha (s_b - s_a) in each component, see the module.

    A component in which no member differs stays as it is: there is no anomaly to multiply.

    Args:
        alpha: from 0, the analysis' own spread, to 1, the forecast's.

    Raises:
        ValueError: alpha outside [0, 1].
    """

    needs_forecast: ClassVar[bool] = True

    alpha: float | Float[Array, ""]

    def __check_init__(self) -> None:
        _check("RTPS", "alpha", self.alpha, 0.0, 1.0, "0.0 (none) to 1.0 (the forecast's whole spread)")

    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """One factor a component."""
        mean, anomalies = _split(analysis)
        spread, prior = _spread(anomalies), _spread(_split(_given(self, forecast))[1])
        known = spread > 0.0
        factor = jnp.where(known, 1.0 + self.alpha * (prior / jnp.where(known, spread, 1.0) - 1.0), 1.0)
        return mean + factor * anomalies


class RTPP(Inflation):
    """Relaxation to prior perturbations: x_a' becomes (1 - alpha) x_a' + alpha x_b', see the module.

    For a filter whose members keep their places, such as the ensemble Kalman filter. Between members that do not belong
    together the mixture would *lose* variance: 2 alpha (1 - alpha) of it where nothing is observed.

    Args:
        alpha: from 0, the analysis, to 1, the forecast around the analysis' mean.

    Raises:
        ValueError: alpha outside [0, 1].
    """

    needs_forecast: ClassVar[bool] = True
    pairs_members: ClassVar[bool] = True

    alpha: float | Float[Array, ""]

    def __check_init__(self) -> None:
        _check("RTPP", "alpha", self.alpha, 0.0, 1.0, "0.0 (none) to 1.0 (the forecast's whole anomalies)")

    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """A mixture of two anomalies."""
        mean, anomalies = _split(analysis)
        _, prior = _split(_given(self, forecast))
        return mean + (1.0 - self.alpha) * anomalies + self.alpha * prior


class Multiplicative(Inflation):
    """The analysis' anomalies times a factor.

    Args:
        factor: 1 for none; more spreads the members out.

    Raises:
        ValueError: a factor below 1.
    """

    factor: float | Float[Array, ""]

    def __check_init__(self) -> None:
        _check("Multiplicative", "factor", self.factor, 1.0, np.inf, "1.0 (none) or more")

    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """One factor for all."""
        mean, anomalies = _split(analysis)
        return mean + self.factor * anomalies


class ForecastMultiplicative(Inflation):
    """Multiply the anomalies of the forecast by a factor, before the update (Anderson & Anderson 1999).

    For filters that update an ensemble of forecasts: `EnKF`.

    Args:
        factor: 1 for none; more spreads the members out.

    Raises:
        ValueError: a factor below 1.
    """

    acts_on_forecast: ClassVar[bool] = True

    factor: float | Float[Array, ""]

    def __check_init__(self) -> None:
        _check("ForecastMultiplicative", "factor", self.factor, 1.0, np.inf, "1.0 (none) or more")

    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """Multiply the anomalies of the members by the factor."""
        return Multiplicative(self.factor)(rng_key, analysis, forecast)


class Jitter(Inflation):
    """Gaussian noise of a given size, independent from member to member and from component to component.

    Its size is in the unit of the state and not relative to the spread: a multiple of a spread that has collapsed is
    nothing, and to spread out what still has a spread is what `Multiplicative` and `RTPS` are for. The noise is centered
    over members, so that the mean stays; scale^2 is what it adds to the members' unbiased variance. One member alone
    stays where it is. It knows nothing of how smooth a field is.

    Args:
        scale: standard deviation, in the unit of the state: a number, or an array that broadcasts to one state, for a
            state of several variables.

    Raises:
        ValueError: a negative scale; when called, a scale that does not broadcast to a state.
    """

    scale: float | Float[Array, ...] | np.ndarray

    def __check_init__(self) -> None:
        _check("Jitter", "scale", self.scale, 0.0, np.inf, "0.0 (none) or more, in the unit of the state")

    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """With the noise added."""
        n, shape = len(analysis), analysis.shape[1:]
        draw = jax.vmap(lambda key: jax.random.normal(key, shape, analysis.dtype))
        noise = draw(particle_keys(rng_key, n))
        scale = jnp.broadcast_to(jnp.asarray(self.scale, analysis.dtype), shape)
        return analysis + scale[None] * (noise - noise.mean(0, keepdims=True))


def inflated(
    inflations: Sequence[Inflation],
    rng_key: PRNGKeyArray,
    analysis: Float[Array, "n ..."],
    forecast: Float[Array, "n ..."] | None,
) -> Float[Array, "n ..."]:
    """The members after one inflation after the other; each sees what the last one left, and the same forecast."""
    for i, inflation in enumerate(inflations):
        analysis = inflation(jax.random.fold_in(rng_key, i), analysis, forecast)
    return analysis


def forecast_factor(inflations: Sequence[Inflation]) -> float | Float[Array, ""]:
    """Product of the factors on the forecast's anomalies; 1.0 where none acts on the forecast."""
    factor: Any = 1.0
    for inflation in inflations:
        if isinstance(inflation, ForecastMultiplicative):
            factor = factor * inflation.factor
    return factor


def need_forecast(inflations: Sequence[Inflation]) -> bool:
    """Whether any of them looks at the forecast."""
    return any(inflation.needs_forecast for inflation in inflations)


def check_inflation(inflations: Any, owner: str, paired: bool) -> None:
    """Refuse what is no sequence of inflations that a filter can make.

    Args:
        inflations: what it was given.
        owner: the filter's name.
        paired: whether member i of its analysis was made from member i of its forecast.

    Raises:
        TypeError: not a sequence of inflations.
        ValueError: a inflation that pairs members, for a filter that selects.
    """
    if isinstance(inflations, Inflation):
        raise TypeError(f"{owner} got inflation={inflations}; give a sequence of inflations: ({inflations},).")
    for inflation in inflations:
        if not isinstance(inflation, Inflation):
            raise TypeError(
                f"{owner} got {inflation!r} among its inflation; give values of ndda.RTPS, ndda.smc.RTPP, "
                "ndda.Multiplicative or ndda.smc.Jitter."
            )
        if inflation.pairs_members and not paired:
            raise ValueError(
                f"{owner} got inflation={inflation}, which mixes each member with its own forecast, and particles "
                "that were selected have none; use ndda.RTPS, which needs the forecast's spread only."
            )


def is_traced(value: Any) -> bool:
    """Whether a number is not known yet, as the amount that `innovations.tune_spread` looks for."""
    return isinstance(value, jax.core.Tracer)


def _check(owner: str, name: str, value: Any, lowest: float, highest: float, instead: str) -> None:
    if is_traced(value) or np.all((np.asarray(value) >= lowest) & (np.asarray(value) <= highest)):
        return
    raise ValueError(f"{owner} got {name}={value}; give {instead}.")


def _given(inflation: Inflation, forecast: Array | None) -> Array:
    if forecast is None:
        raise ValueError(f"{inflation} needs members of the forecast, and got None.")
    return forecast


def _split(x: Float[Array, "n ..."]) -> tuple[Array, Array]:
    """(mean, anomalies) over the members that are finite, the leading axis kept."""
    finite = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)), keepdims=True)
    mean = jnp.mean(x, axis=0, keepdims=True, where=finite)
    # Twice: the rounding error of a mean is nothing beside the mean, but not beside anomalies that are multiplied.
    mean = mean + jnp.mean(x - mean, axis=0, keepdims=True, where=finite)
    first = x[jnp.argmax(finite.reshape(-1))][None]
    one_value = jnp.all((x == first) | ~finite, axis=0, keepdims=True)
    return mean, jnp.where(one_value & finite, 0.0, x - mean)


def _spread(anomalies: Float[Array, "n ..."]) -> Array:
    """Standard deviation, the leading axis kept."""
    finite = jnp.all(jnp.isfinite(anomalies), axis=tuple(range(1, anomalies.ndim)), keepdims=True)
    return jnp.sqrt(jnp.mean(anomalies**2, axis=0, keepdims=True, where=finite))
