"""Identity of a run by its computation: the traced step, its constants, and the arguments that it depends on.

Two runs are the same if the same functions are computed with the same numbers. A function is identified by the text of
its jaxpr, without what no output depends on. So a changed constant in the program, another law of the initial state,
another parameter of a likelihood or a prior, or another resampling function is noticed, wherever it is.

A new version of JAX or NumPyro may trace the same program to other operations; then the versions are named first.

Inside one process two traces are compared by `same_operations`, which is faster than making the text and also sees the
functions that a callback runs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import types
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval
from jaxtyping import PyTree

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Address of a Python object in the text of a jaxpr, which differs between processes."""

LIBRARIES = ("jax", "numpyro", "numpyro-diffusion-da")
"""Libraries whose versions change what is traced."""


def versions() -> dict[str, str]:
    """Versions of the libraries that trace a program, and the precision, by name."""
    found = {f"version of {name}": version(name) for name in LIBRARIES}
    return {**found, "the precision of numbers": jax.numpy.zeros(()).dtype.name}


def computation(what: str, fn: Callable[..., Any], given: dict[str, PyTree], *others: Any) -> dict[str, str]:
    """Identity of a function of given values and other inputs.

    Args:
        what: what the function computes, for messages, such as "the step".
        fn: function of (others..., given values).
        given: values that are part of the identity if the function depends on them, by name.
        *others: other inputs, as arrays or as shapes and dtypes, which are not part of it.

    Returns:
        Checksums by name: of the operations, of each array that the function closes over, and of each given value that
        an output depends on.
    """
    traced = jax.make_jaxpr(fn)(*others, given)
    kept, used = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    leaves = jax.tree_util.tree_leaves_with_path(given)
    found = {f"the operations of {what}": _digest(ADDRESS.sub("", str(kept)).encode())}
    constants = [*traced.consts, *_inner_constants(kept)]
    for i, value in enumerate(constants):
        found[f"constant {i} of {what}, of shape {np.shape(value)},"] = _digest(_bytes(value))
    for (path, value), is_used in zip(leaves, used[len(used) - len(leaves) :], strict=True):
        if is_used:
            found[_argument(path)] = _digest(_bytes(value))
    return found


def _argument(path: Any) -> str:
    """Words for one given value, whose path begins with its name."""
    return f"argument '{path[0].key}'{jax.tree_util.keystr(path[1:])}"


def _inner_constants(jaxpr: Any) -> Iterator[Any]:
    """Arrays that the functions inside a jaxpr close over; its text does not show them."""
    for equation in jaxpr.eqns:
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, (core.ClosedJaxpr, core.Jaxpr))
        ):
            if isinstance(parameter, core.ClosedJaxpr):
                yield from parameter.consts
                yield from _inner_constants(parameter.jaxpr)
            elif isinstance(parameter, core.Jaxpr):
                yield from _inner_constants(parameter)


def _bytes(value: Any) -> bytes:
    """Type, shape and numbers of an array, or of a random key."""
    if jax.dtypes.issubdtype(getattr(value, "dtype", np.dtype(float)), jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.ascontiguousarray(np.asarray(value))
    return f"{array.dtype.str} {array.shape}\n".encode() + array.tobytes()


def _digest(content: bytes) -> str:
    """SHA-256 in hexadecimal, shortened."""
    return hashlib.sha256(content).hexdigest()[:20]


# --- two traces of one process ----------------------------------------------------------------------------------------


def same_operations(a: Any, b: Any) -> bool:
    """Whether two jaxprs compute the same from the same inputs.

    Args:
        a: jaxpr whose outputs depend on each of its equations.
        b: jaxpr of another trace in the same process.
    """
    if a is b:
        return True
    if len(a.eqns) != len(b.eqns):
        return False
    number: dict[Any, int] = {}  # of each variable of b, and of each of a: the same where it has the same role
    number_of_a: dict[Any, int] = {}

    def bind(of_a: Any, of_b: Any) -> bool:
        """Give two lists of new variables the same numbers, if they have the same shapes and dtypes."""
        if len(of_a) != len(of_b):
            return False
        for x, y in zip(of_a, of_b, strict=True):
            if x.aval != y.aval:
                return False
            number_of_a[x] = number[y] = len(number)
        return True

    def same_inputs(of_a: Any, of_b: Any) -> bool:
        """Whether two lists of variables and literals are the same values."""
        return len(of_a) == len(of_b) and all(
            _same_value(x.val, y.val) and x.aval == y.aval
            if isinstance(x, core.Literal) and isinstance(y, core.Literal)
            else type(x) is type(y) and number_of_a[x] == number[y]
            for x, y in zip(of_a, of_b, strict=True)
        )

    return (
        bind(a.constvars, b.constvars)
        and bind(a.invars, b.invars)
        and all(
            one.primitive is other.primitive
            and same_inputs(one.invars, other.invars)
            and _same_parameters(one.params, other.params)
            and bind(one.outvars, other.outvars)
            for one, other in zip(a.eqns, b.eqns, strict=True)
        )
        and same_inputs(a.outvars, b.outvars)
    )


def _same_parameters(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two equations have the same parameters.

    A function beside a jaxpr is what the jaxpr was traced from, or a rule of differentiation that has been applied. It
    is new in each trace, and is not compared.
    """
    traced = any(_jaxprs(value) for value in a.values())
    return a.keys() == b.keys() and all(
        (traced and callable(value) and not isinstance(value, (core.Jaxpr, core.ClosedJaxpr)))
        or _same_value(value, b[name])
        for name, value in a.items()
    )


def _jaxprs(value: Any) -> bool:
    """Whether a parameter of an equation is a jaxpr, or several."""
    if isinstance(value, (tuple, list)):
        return any(map(_jaxprs, value))
    return isinstance(value, (core.Jaxpr, core.ClosedJaxpr))


def _same_value(a: Any, b: Any) -> bool:
    """Whether two literals, constants, parameters of an equation, or functions are the same."""
    if a is b:
        return True
    if isinstance(a, core.ClosedJaxpr) and isinstance(b, core.ClosedJaxpr):
        return _same_value(tuple(a.consts), tuple(b.consts)) and same_operations(a.jaxpr, b.jaxpr)
    if isinstance(a, core.Jaxpr) and isinstance(b, core.Jaxpr):
        return same_operations(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same_value, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_value(value, b[name]) for name, value in a.items())
    if isinstance(a, (np.ndarray, np.generic, jax.Array, float)) or hasattr(a, "__array__"):
        return not isinstance(a, jax.core.Tracer) and not isinstance(b, jax.core.Tracer) and _bytes(a) == _bytes(b)
    if isinstance(a, types.FunctionType):
        return (
            a.__code__ is b.__code__
            and a.__globals__ is b.__globals__
            and _same_value((a.__defaults__, a.__kwdefaults__), (b.__defaults__, b.__kwdefaults__))
            and _same_value(_closure(a), _closure(b))
        )
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and a.__self__ is b.__self__
    if isinstance(a, functools.partial):
        return _same_value((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if callable(a) and dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return all(_same_value(getattr(a, name), getattr(b, name)) for name in names)
    return bool(a == b) or (not callable(a) and ADDRESS.sub("", repr(a)) == ADDRESS.sub("", repr(b)))


def _closure(fn: types.FunctionType) -> tuple[Any, ...]:
    """Values that a function closes over; an unset one is None."""
    values = []
    for cell in fn.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:
            values.append(None)
    return tuple(values)
