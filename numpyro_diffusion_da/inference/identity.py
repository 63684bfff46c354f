"""Identity of a run by its computation: the traced step, its constants, and the arguments that it depends on.

Two runs are the same if the same functions are computed with the same numbers. A function is identified by the text of
its jaxpr, without what no output depends on. So a changed constant in the program, another law of the initial state,
another parameter of a likelihood or a prior, or another resampling function is noticed, wherever it is.

A new version of JAX or NumPyro may trace the same program to other operations; then the versions are named first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
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
