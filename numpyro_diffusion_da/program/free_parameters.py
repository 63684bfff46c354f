"""The unconstrained parameters of a NumPyro distribution: log rates, logits, locations, one row an element.

A filter asks how an observation's distribution changes with the state. Its parameters say it, and unconstrained ones
(NumPyro's own bijections: the logarithm of a positive one, the logit of a probability) can be moved freely. A
distribution is taken apart and put together again by the arguments of its constructor, which NumPyro keeps as
attributes; distributions inside it (a mixture's components, what is censored or truncated) likewise.
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

LEAST = 1e-30
"""How far a parameter is kept from a bound at zero, where its logarithm has no derivative."""
INSIDE = 1e-7
"""The same for other bounds."""


def free_parameters(name: str, fn: dist.Distribution, shape: tuple[int, ...]) -> tuple[Float[Array, "m p"], Rebuild]:
    """The p unconstrained parameters of each of m elements, and the distribution that other values of them make.

    Integers, counts and what NumPyro has no bijection for stay as they are.

    Args:
        name: of the site, for messages.
        fn: a distribution of scalar events, without wrappers that expand or mask it.
        shape: of its values; m is their number.

    Raises:
        ValueError: an argument of the constructor is not kept as an attribute, or no parameter can be moved.
    """
    columns: list[Array] = []
    made = _take_apart(name, fn, shape, 0, columns)
    if not columns:
        raise ValueError(
            f"site '{name}' has the likelihood {type(fn).__name__}, of whose parameters none is continuous; "
            "ndda.Bootstrap(model) takes any likelihood with a log_prob."
        )
    ends = np.cumsum([column.shape[1] for column in columns])

    def rebuild(parameters: Array) -> dist.Distribution:
        return made(iter(jnp.split(parameters, ends[:-1], axis=1)))

    return jnp.concatenate(columns, axis=1), rebuild


def _take_apart(
    name: str, fn: dist.Distribution, shape: tuple[int, ...], extra: int, columns: list[Array]
) -> Callable[[Any], dist.Distribution]:
    """Append the parameters of `fn` to `columns`; returns what makes it again from an iterator of such columns.

    Args:
        name: of the site.
        fn: the distribution.
        shape: of the elements.
        extra: trailing axes of its batch shape that belong to one element (a mixture's components).
        columns: each (m, number of parameters).
    """
    makers: dict[str, Callable[[Any], Any]] = {}
    for argument in inspect.signature(type(fn).__init__).parameters:
        if argument in ("self", "validate_args"):
            continue
        if not hasattr(fn, argument):
            raise ValueError(
                f"site '{name}' has the likelihood {type(fn).__name__}, which does not keep its constructor's argument "
                f"'{argument}' as an attribute, so that its parameters cannot be found; keep it, or use "
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
    return lambda at: [part(at) for part in parts]


def _parameter(
    constraint: Any, value: Any, shape: tuple[int, ...], extra: int, columns: list[Array]
) -> Callable[[Any], Any]:
    """As `_take_apart` for one argument."""
    free = isinstance(value, (float, np.ndarray, jax.Array)) and jnp.issubdtype(jnp.result_type(value), jnp.inexact)
    constraint = constraints.real if constraint is None else constraint
    if not free or constraint.is_discrete:
        return lambda at: value
    try:
        bijection = biject_to(constraint)
    except NotImplementedError:
        return lambda at: value
    value = jnp.asarray(value)
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
    """The value, off the bounds of its constraint: at a rate of zero the derivative of its logarithm would be NaN."""
    lower, upper = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    if lower is not None:
        value = jnp.maximum(value, lower + (LEAST if upper is None else INSIDE))
    if upper is not None:
        value = jnp.minimum(value, upper - INSIDE)
    return value
