"""Unconstrained parameters of a NumPyro distribution: log rates, logits, locations, one row per element.

A filter needs to know how the distribution of an observation changes with the state. The distribution's parameters
express this. In unconstrained form they can take any real value: NumPyro's bijections give the logarithm of a positive
parameter, or the logit of a probability.

A distribution is split into the arguments of its constructor, which NumPyro keeps as attributes, and built again from
new values of them. Distributions inside it are split in the same way: the components of a mixture, or the base of a
censored or truncated distribution.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import biject_to, constraints

Rebuild = Callable[[Float[Array, "m p"]], dist.Distribution]
"""Function from unconstrained parameters, shape (m, p), to the distribution with these parameters."""

LEAST = 1e-30
"""Distance kept from the lower bound of a parameter without upper bound, where its logarithm has no derivative."""
INSIDE = 1e-7
"""Distance kept from the bounds of a parameter that has an upper bound."""


def free_parameters(name: str, fn: dist.Distribution, shape: tuple[int, ...]) -> tuple[Float[Array, "m p"], Rebuild]:
    """Find the p unconstrained parameters of each of m elements, and a function that rebuilds the distribution.

    Integers, counts, and parameters for which NumPyro has no bijection are constants.

    Args:
        name: name of the site, for messages.
        fn: distribution of scalar events, without wrappers that expand or mask it.
        shape: shape of the values; m is their number.

    Returns:
        (unconstrained parameters, shape (m, p); function from such parameters to the distribution).

    Raises:
        ValueError: the distribution does not keep an argument of its constructor as an attribute, or none of its
            parameters is continuous.
    """
    columns: list[Array] = []
    made = _take_apart(name, fn, shape, 0, columns)
    if not columns:
        raise ValueError(
            f"site '{name}' has the likelihood {type(fn).__name__}, which has no continuous parameter; "
            "use ndda.Bootstrap(model), which takes any likelihood with a log_prob."
        )
    ends = np.cumsum([column.shape[1] for column in columns])

    def rebuild(parameters: Array) -> dist.Distribution:
        return made(iter(jnp.split(parameters, ends[:-1], axis=1)))

    return jnp.concatenate(columns, axis=1), rebuild


def _take_apart(
    name: str, fn: dist.Distribution, shape: tuple[int, ...], extra: int, columns: list[Array]
) -> Callable[[Any], dist.Distribution]:
    """Append the parameters of a distribution to `columns`, and return the function that rebuilds it.

    Args:
        name: name of the site, for messages.
        fn: distribution.
        shape: shape of the elements.
        extra: number of trailing batch axes that belong to one element, such as the axis of a mixture's components.
        columns: list that gets one array (m, number of values) for each free argument.

    Returns:
        Function from an iterator over arrays like those in `columns` to the distribution.

    Raises:
        ValueError: the distribution does not keep an argument of its constructor as an attribute.
    """
    makers: dict[str, Callable[[Any], Any]] = {}
    for argument in inspect.signature(type(fn).__init__).parameters:
        if argument in ("self", "validate_args"):
            continue
        if not hasattr(fn, argument):
            raise ValueError(
                f"site '{name}' has the likelihood {type(fn).__name__}, which does not keep the argument '{argument}' "
                "of its constructor as an attribute, so its parameters cannot be found; set the attribute, or use "
                "ndda.Bootstrap(model)."
            )
        value = getattr(fn, argument)
        if isinstance(value, dist.Distribution):
            components = isinstance(fn, dist.MixtureSameFamily) and argument == "component_distribution"
            makers[argument] = _take_apart(name, value, shape, extra + components, columns)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, dist.Distribution) for v in value):
            makers[argument] = _each([_take_apart(name, v, shape, extra, columns) for v in value])
        else:
            makers[argument] = _parameter(fn.arg_constraints.get(argument), value, shape, extra, columns)

    def made(at: Any) -> dist.Distribution:
        return type(fn)(**{argument: make(at) for argument, make in makers.items()})

    return made


def _each(parts: list[Callable[[Any], dist.Distribution]]) -> Callable[[Any], list[dist.Distribution]]:
    """Combine functions that each rebuild one distribution into one that rebuilds the list of them, in this order."""
    return lambda at: [part(at) for part in parts]


def _parameter(
    constraint: Any, value: Any, shape: tuple[int, ...], extra: int, columns: list[Array]
) -> Callable[[Any], Any]:
    """Append one argument's unconstrained values to `columns`, and return the function that rebuilds the argument.

    Args:
        constraint: NumPyro's constraint of the argument; None for none.
        value: value of the argument.
        shape: shape of the elements.
        extra: number of trailing batch axes that belong to one element.
        columns: list that gets an array (m, number of values) if the argument is continuous.

    Returns:
        Function from an iterator over arrays like those in `columns` to the argument.
    """
    free = isinstance(value, (float, np.ndarray, jax.Array)) and jnp.issubdtype(jnp.result_type(value), jnp.inexact)
    constraint = constraints.real if constraint is None else constraint
    if not free or constraint.is_discrete:
        return lambda at: value
    try:
        bijection = biject_to(constraint)
    except NotImplementedError:
        return lambda at: value
    value = jnp.asarray(value)
    # The value broadcasts to the elements' axes, followed by the axes that belong to one element.
    own = extra + constraint.event_dim
    batch = (1,) * max(0, len(shape) + own - value.ndim) + value.shape
    full = jnp.broadcast_to(value.reshape(batch), (*shape, *batch[len(shape) :]))
    unconstrained = bijection.inv(_inside(constraint, full))
    own_shape = unconstrained.shape[len(shape) :]
    columns.append(unconstrained.reshape(-1, int(np.prod(own_shape))))

    def make(at: Any) -> Array:
        return bijection(next(at).reshape(*shape, *own_shape))

    return make


def _inside(constraint: Any, value: Array) -> Array:
    """Move a value off the bounds of its constraint, where the derivative of the bijection would be NaN."""
    lower, upper = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    if lower is not None:
        value = jnp.maximum(value, lower + (LEAST if upper is None else INSIDE))
    if upper is not None:
        value = jnp.minimum(value, upper - INSIDE)
    return value
