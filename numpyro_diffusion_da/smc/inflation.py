r"""Inflation of an ensemble whose spread is too small: of the analysis before the next forecast, or of the forecast.

With few members, with a model without errors of its own, or after a selection by many observations, the spread of an
analysis is smaller than its error. Let $s_a$ and $s_b$ be the standard deviations of the analysis and of its forecast
ensemble in one component of the state, and let $x_a'$ and $x_b'$ be the anomalies of a member from the mean.

- `RTPS`, relaxation to prior spread (Whitaker & Hamill 2012, Mon. Weather Rev. 140, 3078), multiplies the anomalies of
  each component by one factor, so that its spread becomes $s_a + \alpha (s_b - s_a)$.
- `RTPP`, relaxation to prior perturbations (Zhang, Snyder & Sun 2004, Mon. Weather Rev. 132, 1238), replaces the
  anomalies of each member by $(1 - \alpha) x_a' + \alpha x_b'$.
- `Multiplicative` multiplies all anomalies of the analysis by one factor.
- `ForecastMultiplicative` multiplies all anomalies of the forecast by one factor, before the update (Anderson &
  Anderson 1999).
- `Jitter` adds noise (the roughening of Gordon, Salmond & Smith 1993).

None of them moves the mean. A filter takes a sequence of inflations and applies them in this order. A member that holds
a value that is not finite is left out of means and spreads.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.arguments import broadcasts, is_number, real_array, require_number, shown
from numpyro_diffusion_da.smc.base import map_particles, particle_keys
from numpyro_diffusion_da.smc.columns import Index, are_columns_divided, map_columns
from numpyro_diffusion_da.smc.rows import are_rows_apart, sum_rows
from numpyro_diffusion_da.smc.sharding import own, whole

Inflate = Callable[[PRNGKeyArray, Float[Array, "n ..."], Any], Float[Array, "n ..."]]
"""Function (rng_key, analysis, forecast) -> inflated members, such as an `Inflation`."""


def is_traced(value: Any) -> bool:
    """Whether a value is traced by JAX, such as the amount that `tune_spread` searches for, and cannot be checked."""
    return isinstance(value, jax.core.Tracer)


def _amount(owner: str, name: str, advice: str, **limits: Any) -> Callable[[Any], Any]:
    """Make the converter of a field that holds one number, which may be traced.

    Args:
        owner: name of the class.
        name: name of the field.
        advice: what to give, for the message.
        **limits: range of the number.
    """

    def converter(value: Any) -> Any:
        if is_traced(value):
            if jnp.ndim(value):
                raise ValueError(f"{owner} got {name} of shape {jnp.shape(value)}; {advice}")
            return value
        return require_number(value, owner, name, advice, **limits)

    return converter


def _noise_scale(value: Any) -> Any:
    """Scale of `Jitter`, a number or an array of numbers.

    Raises:
        TypeError: the scale is neither.
        ValueError: a value is negative or not finite, or there is none.
    """
    advice = "give 0.0 (none) or more, in the unit of the state."
    if is_traced(value):
        return value
    if is_number(value) or np.ndim(value) == 0:
        return require_number(value, "Jitter", "scale", advice, least=0.0)
    scale = real_array(value, "Jitter", "scale", "0.1")
    if scale.size == 0 or (scale < 0.0).any():
        raise ValueError(f"Jitter got scale={shown(value)}; {advice}")
    return scale


class Inflation(eqx.Module):
    """Inflation of an ensemble: widens the spread of its members around their mean."""

    needs_forecast: ClassVar[bool] = False
    """Whether the inflation uses the forecast ensemble. A filter that has none draws one for it."""
    pairs_members: ClassVar[bool] = False
    """Whether the inflation assumes that member i of the analysis was made from member i of the forecast."""
    acts_on_forecast: ClassVar[bool] = False
    """Whether the inflation widens the forecast before the update instead of the analysis after it."""
    by_component: ClassVar[bool] = False
    """Whether the inflation of a component of the state depends on this component alone, and on no random number.

    On a mesh each device then inflates a part of the state. Otherwise it inflates all of it, of all particles.
    """

    @abc.abstractmethod
    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """Inflate the members of an ensemble.

        Args:
            rng_key: random key of the step.
            analysis: members of the analysis, equally weighted.
            forecast: members of the forecast; None if the inflation does not need them.

        Returns:
            The inflated members.
        """


class RTPS(Inflation):
    """Relaxation to prior spread: in each component the spread s_a becomes s_a + alpha (s_b - s_a).

    Here s_a and s_b are the standard deviations of the analysis and of the forecast (Whitaker & Hamill 2012). A
    component in which all members agree stays as it is, because it has no anomaly to multiply.

    Args:
        alpha: amount, from 0 (the spread of the analysis) to 1 (the spread of the forecast).

    Raises:
        TypeError: `alpha` is not a number.
        ValueError: `alpha` is outside [0, 1].
    """

    needs_forecast: ClassVar[bool] = True
    by_component: ClassVar[bool] = True

    alpha: float | Float[Array, ""] = eqx.field(
        converter=_amount("RTPS", "alpha", "give 0.0 (none) to 1.0 (the forecast's whole spread).", least=0.0, most=1.0)
    )

    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """Multiply the anomalies of each component by the factor that gives the relaxed spread."""
        mean, anomalies = _split(analysis)
        spread, prior = _spread(anomalies), _spread(_split(_given(self, forecast))[1])
        known = spread > 0.0
        factor = jnp.where(known, 1.0 + self.alpha * (prior / jnp.where(known, spread, 1.0) - 1.0), 1.0)
        return mean + factor * anomalies


class RTPP(Inflation):
    """Relaxation to prior perturbations: the anomaly x_a' of each member becomes (1 - alpha) x_a' + alpha x_b'.

    Here x_a' and x_b' are the member's anomalies in the analysis and in the forecast (Zhang, Snyder & Sun 2004). The
    inflation is for filters that make each member of the analysis from the same member of the forecast, such as the
    ensemble Kalman filter. A mixture of unrelated members would lose variance: the fraction 2 alpha (1 - alpha) where
    nothing is observed.

    Args:
        alpha: amount, from 0 (anomalies of the analysis) to 1 (anomalies of the forecast).

    Raises:
        TypeError: `alpha` is not a number.
        ValueError: `alpha` is outside [0, 1].
    """

    needs_forecast: ClassVar[bool] = True
    pairs_members: ClassVar[bool] = True
    by_component: ClassVar[bool] = True

    alpha: float | Float[Array, ""] = eqx.field(
        converter=_amount(
            "RTPP", "alpha", "give 0.0 (none) to 1.0 (the forecast's whole anomalies).", least=0.0, most=1.0
        )
    )

    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """Mix the anomalies of analysis and forecast around the mean of the analysis."""
        mean, anomalies = _split(analysis)
        _, prior = _split(_given(self, forecast))
        return mean + (1.0 - self.alpha) * anomalies + self.alpha * prior


class Multiplicative(Inflation):
    """Multiply the anomalies of the analysis by a factor.

    Args:
        factor: factor of the anomalies, 1 for no inflation.

    Raises:
        TypeError: `factor` is not a number.
        ValueError: `factor` is below 1 or infinite.
    """

    by_component: ClassVar[bool] = True

    factor: float | Float[Array, ""] = eqx.field(
        converter=_amount("Multiplicative", "factor", "give 1.0 (none) or more.", least=1.0)
    )

    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """Multiply the anomalies of the members by the factor."""
        mean, anomalies = _split(analysis)
        return mean + self.factor * anomalies


class ForecastMultiplicative(Inflation):
    """Multiply the anomalies of the forecast by a factor, before the update (Anderson & Anderson 1999).

    It is for a filter that updates an ensemble of forecasts, such as `EnKF`.

    Args:
        factor: factor of the anomalies, 1 for no inflation.

    Raises:
        TypeError: `factor` is not a number.
        ValueError: `factor` is below 1 or infinite.
    """

    acts_on_forecast: ClassVar[bool] = True
    by_component: ClassVar[bool] = True

    factor: float | Float[Array, ""] = eqx.field(
        converter=_amount("ForecastMultiplicative", "factor", "give 1.0 (none) or more.", least=1.0)
    )

    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """Multiply the anomalies of the given members, here those of the forecast, by the factor."""
        return Multiplicative(self.factor)(rng_key, analysis, forecast)


class Jitter(Inflation):
    """Add Gaussian noise that is independent between members and between components.

    The scale of the noise is absolute, in the unit of the state, so that it widens an ensemble even if its spread has
    collapsed. `Multiplicative` and `RTPS` scale a spread that is still there. The noise is centered over the members:
    it does not move the mean, and adds scale^2 to the unbiased variance of the members. A single member stays as it is.
    The noise is not smooth in space.

    Args:
        scale: standard deviation of the noise in the unit of the state. A number, or an array that broadcasts to one
            state, for instance with one value for each variable.

    Raises:
        TypeError: `scale` holds no real numbers.
        ValueError: `scale` is negative or, when called, does not broadcast to one state.
    """

    scale: float | Float[Array, ...] | np.ndarray = eqx.field(converter=_noise_scale)

    def __call__(
        self, rng_key: PRNGKeyArray, analysis: Float[Array, "n ..."], forecast: Float[Array, "n ..."] | None
    ) -> Float[Array, "n ..."]:
        """Add centered noise to the members; the forecast is not used."""
        n, shape = len(analysis), analysis.shape[1:]
        draw = map_particles(lambda key: jax.random.normal(key, shape, analysis.dtype))
        noise = draw(particle_keys(rng_key, n))
        scale = jnp.asarray(self.scale, analysis.dtype)
        if not broadcasts(scale.shape, shape):
            raise ValueError(
                f"Jitter got scale of shape {scale.shape}, but a state has shape {shape}; give one number, or an array "
                "that broadcasts to one state."
            )
        mean, scale = sum_rows(noise) / n, jnp.broadcast_to(scale, shape)
        widened: Array = map_particles(lambda x, noise: x + scale * (noise - mean))(analysis, noise)
        return widened


def inflated(
    inflations: Sequence[Inflate],
    rng_key: PRNGKeyArray,
    analysis: Float[Array, "n ..."],
    forecast: Float[Array, "n ..."] | None,
) -> Float[Array, "n ..."]:
    """Apply a sequence of inflations to an analysis, each to the result of the one before, with the same forecast.

    Args:
        inflations: the inflations, in order.
        rng_key: random key of the step.
        analysis: members of the analysis, equally weighted.
        forecast: members of the forecast; None if no inflation needs them.

    Returns:
        The inflated members.
    """
    for i, inflation in enumerate(inflations):
        analysis = inflation(jax.random.fold_in(rng_key, i), analysis, forecast)
    return analysis


def inflated_particles(
    inflations: Sequence[Inflation],
    rng_key: PRNGKeyArray,
    analysis: Float[Array, "n ..."],
    forecast: Float[Array, "n ..."] | None,
) -> Float[Array, "n ..."]:
    """Apply a sequence of inflations to particles that may be divided over the devices of a mesh.

    Args:
        inflations: the inflations, in order.
        rng_key: random key of the step.
        analysis: this device's particles of the analysis, equally weighted.
        forecast: this device's particles of the forecast; None if no inflation needs them.

    Returns:
        This device's inflated particles.
    """
    if not are_columns_divided() or not inflations:
        return inflated(inflations, rng_key, analysis, forecast)
    if all(inflation.by_component for inflation in inflations):
        return _inflated_columns(inflations, rng_key, analysis, forecast)
    if are_rows_apart():  # each by itself, because some may need whole rows
        each = [functools.partial(_inflated_columns, [one]) if one.by_component else one for one in inflations]
        return inflated(each, rng_key, analysis, forecast)
    return own(inflated(inflations, rng_key, *whole((analysis, forecast))))


def _inflated_columns(
    inflations: Sequence[Inflation],
    rng_key: PRNGKeyArray,
    analysis: Float[Array, "n ..."],
    forecast: Float[Array, "n ..."] | None,
) -> Float[Array, "n ..."]:
    """Apply inflations that are by component to columns of the state; the arguments are those of `inflated`."""

    def columns(x: Array) -> Array:
        # A particle counts in the mean if all of its components are finite, wherever they are.
        return map_particles(lambda x: jnp.where(jnp.all(jnp.isfinite(x)), x.reshape(-1), jnp.nan))(x)

    given = [columns(analysis)]
    if forecast is not None and need_forecast(inflations):
        given.append(columns(forecast))

    def of_columns(parts: list[Array], index: Index) -> tuple[list[Array], tuple[()]]:
        return [inflated(inflations, rng_key, parts[0], parts[1] if len(parts) > 1 else None)], ()

    found, _ = map_columns(of_columns, given)
    shape = analysis.shape[1:]
    restored: Array = map_particles(lambda x: x.reshape(shape))(found[0])
    return restored


def forecast_factor(inflations: Sequence[Inflation]) -> float | Float[Array, ""]:
    """Product of the factors on the anomalies of the forecast; 1.0 if no inflation acts on the forecast."""
    factor: Any = 1.0
    for inflation in inflations:
        if isinstance(inflation, ForecastMultiplicative):
            factor = factor * inflation.factor
    return factor


def need_forecast(inflations: Sequence[Inflation]) -> bool:
    """Whether any of the inflations uses the forecast ensemble."""
    return any(inflation.needs_forecast for inflation in inflations)


def check_inflation(inflations: Any, owner: str, paired: bool) -> None:
    """Check that an argument is a sequence of inflations that a filter can apply.

    Args:
        inflations: the argument.
        owner: name of the filter, for the message.
        paired: whether member i of the filter's analysis is made from member i of its forecast.

    Raises:
        TypeError: the argument is not a sequence of inflations.
        ValueError: an inflation pairs members or acts on the forecast, and the filter updates no forecast members.
    """
    if isinstance(inflations, Inflation):
        raise TypeError(f"{owner} got inflation={inflations}; expected a sequence: write inflation=({inflations},).")
    if not isinstance(inflations, Sequence) or isinstance(inflations, str):
        raise TypeError(
            f"{owner} got inflation={shown(inflations)}; expected a sequence: write inflation=(ndda.RTPS(0.3),) for "
            "any filter, or (ndda.ForecastMultiplicative(1.05), ndda.RTPS(0.3)) for an EnKF."
        )
    for inflation in inflations:
        if not isinstance(inflation, Inflation):
            raise TypeError(
                f"{owner} got {shown(inflation)} in the sequence `inflation`; give instances of ndda.RTPS, "
                "ndda.smc.RTPP, ndda.Multiplicative, ndda.ForecastMultiplicative or ndda.smc.Jitter."
            )
        if inflation.pairs_members and not paired:
            raise ValueError(
                f"{owner} got inflation={inflation}, which mixes each member with its own forecast, but resampled "
                "particles have none; use ndda.RTPS, which needs only the spread of the forecast."
            )
        if inflation.acts_on_forecast and not paired:
            raise ValueError(
                f"{owner} got inflation={inflation}, which widens the forecast before an ensemble update, and {owner} "
                "makes none; use ndda.Multiplicative, which widens the analysis."
            )


def _given(inflation: Inflation, forecast: Array | None) -> Array:
    if forecast is None:
        raise ValueError(f"{inflation} needs members of the forecast, but got None; give the forecast.")
    return forecast


def _split(x: Float[Array, "n ..."]) -> tuple[Array, Array]:
    """Mean and anomalies of an ensemble, without the members that are not finite.

    Returns:
        (mean over the members, with a leading axis of 1; anomalies of all members).
    """
    finite = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)), keepdims=True)
    mean = jnp.mean(x, axis=0, keepdims=True, where=finite)
    # The mean is corrected once: its rounding error is small against the mean, but not against inflated anomalies.
    mean = mean + jnp.mean(x - mean, axis=0, keepdims=True, where=finite)
    first = x[jnp.argmax(finite.reshape(-1))][None]
    one_value = jnp.all((x == first) | ~finite, axis=0, keepdims=True)
    return mean, jnp.where(one_value & finite, 0.0, x - mean)


def _spread(anomalies: Float[Array, "n ..."]) -> Array:
    """Standard deviation of finite anomalies over the members, with a leading axis of 1."""
    finite = jnp.all(jnp.isfinite(anomalies), axis=tuple(range(1, anomalies.ndim)), keepdims=True)
    return jnp.sqrt(jnp.mean(anomalies**2, axis=0, keepdims=True, where=finite))
