"""Rows of arrays, one for each particle, which a run may hold on disk and load some at a time.

A kernel touches the arrays of all particles in four ways: it maps a function over their rows, it takes rows by their
indices, it sums over rows, and it computes with arrays that have a few numbers for each row, such as weights. The
functions of this module are the first three. They compute at once, as one would write it. Inside `rows_apart` they are
recorded as they are, as equations of the trace (`map_rows_p`, `take_rows_p`, `sum_rows_p`). A run whose particles do
not fit into memory traces its step this way, and makes the maps in batches of rows that it reads and writes
(`inference/streaming.py`). So there is one kernel for both, and it knows nothing of files.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import mlir, partial_eval
from jaxtyping import Array, Int, PyTree

_APART: contextvars.ContextVar[bool] = contextvars.ContextVar("rows are apart", default=False)


@contextlib.contextmanager
def rows_apart() -> Iterator[None]:
    """Context in which functions are traced whose operations on rows stay equations of their own."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def are_rows_apart() -> bool:
    """Whether operations on rows are recorded, so that their rows may be on disk."""
    return _APART.get()


# --- maps -------------------------------------------------------------------------------------------------------------

map_rows_p = core.Primitive("map_rows")
"""Map of a function of one row. Operands: what all rows share, then arrays with a leading axis of rows. Parameters:
`jaxpr` of the function, whose constants are what is shared, `shared`, their number, and `n`, the number of rows."""
map_rows_p.multiple_results = True


def map_rows(fn: Callable[..., Any], *args: PyTree) -> PyTree:
    """Map a function of one row over the leading axis of its arguments, as one equation.

    Args:
        fn: function of one row of each argument.
        *args: pytrees of arrays with a leading axis of rows.
    """
    leaves, form = jax.tree.flatten(args)
    one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in map(_array, leaves)]
    traced, shapes = jax.make_jaxpr(lambda *row: fn(*jax.tree.unflatten(form, row)), return_shape=True)(*one)
    found = map_rows_p.bind(
        *traced.consts, *leaves, jaxpr=traced.jaxpr, shared=len(traced.consts), n=int(jnp.shape(leaves[0])[0])
    )
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def mapped(jaxpr: Any, shared: list[Any], rows: list[Any], n: int) -> list[Array]:
    """Compute the equation of `map_rows`.

    Args:
        jaxpr: function of one row, whose constants are what rows share.
        shared: what the rows share.
        rows: arrays with a leading axis of n rows.
        n: number of rows.
    """

    def one(_: Any, *row: Any) -> list[Any]:
        return jax.core.eval_jaxpr(jaxpr, shared, *row)

    return jax.vmap(one)(np.arange(n), *rows)  # the indices are there for a function of no rows


@map_rows_p.def_abstract_eval
def _shapes_of_map(*operands: Any, jaxpr: Any, shared: int, n: int) -> list[Any]:
    return [v.aval.update(shape=(n, *v.aval.shape), weak_type=False) for v in jaxpr.outvars]


@map_rows_p.def_impl
def _map_now(*operands: Any, jaxpr: Any, shared: int, n: int) -> list[Array]:
    return mapped(jaxpr, list(operands[:shared]), list(operands[shared:]), n)


def _without_unused(used: list[bool], *rest: Any) -> tuple[list[bool], Any]:
    """Leave out what no used output of a map depends on, as `partial_eval.dce_jaxpr` asks.

    Args:
        used: whether each output is used.
        *rest: the equation, and before it, from JAX 0.12 on, which inputs are alive.
    """
    eqn = rest[-1]
    if not any(used):
        return [False] * len(eqn.invars), None
    jaxpr, consts, rows = partial_eval.dce_jaxpr_consts(eqn.params["jaxpr"], used)
    kept = [*consts, *rows]
    return kept, eqn.replace(
        invars=[v for v, is_used in zip(eqn.invars, kept, strict=True) if is_used],
        outvars=[v for v, is_used in zip(eqn.outvars, used, strict=True) if is_used],
        params={**eqn.params, "jaxpr": jaxpr, "shared": sum(consts)},
    )


partial_eval.dce_rules[map_rows_p] = _without_unused
mlir.register_lowering(map_rows_p, mlir.lower_fun(_map_now, multiple_results=True))

# --- rows by their indices, and sums ----------------------------------------------------------------------------------

take_rows_p = core.Primitive("take_rows")
"""Rows of an array by their indices."""


def take_rows(values: PyTree, indices: Int[Array, " m"] | Int[np.ndarray, " m"]) -> PyTree:
    """Take rows of arrays by their indices.

    Args:
        values: arrays with a leading axis of rows.
        indices: index of each row that is taken.
    """
    if not are_rows_apart():
        return jax.tree.map(lambda x: x[indices], values)
    at = jnp.asarray(indices)
    return jax.tree.map(lambda x: take_rows_p.bind(jnp.asarray(x), at), values)


@take_rows_p.def_abstract_eval
def _shape_of_take(x: Any, indices: Any) -> Any:
    return x.update(shape=(*indices.shape, *x.shape[1:]), weak_type=False)


def _take_now(x: Any, indices: Any) -> Array:
    return x[indices]


take_rows_p.def_impl(_take_now)
mlir.register_lowering(take_rows_p, mlir.lower_fun(_take_now, multiple_results=False))

sum_rows_p = core.Primitive("sum_rows")
"""Sum of an array over its rows."""


def sum_rows(values: Array) -> Array:
    """Sum an array over its leading axis; where rows are on disk, batch by batch, so that its rounding differs.

    Args:
        values: array with a leading axis of rows; truth values are counted.
    """
    return sum_rows_p.bind(values) if are_rows_apart() else jnp.sum(values, axis=0)


@sum_rows_p.def_abstract_eval
def _shape_of_sum(x: Any) -> Any:
    dtype = jax.eval_shape(lambda x: jnp.sum(x, axis=0), jax.ShapeDtypeStruct(x.shape, x.dtype)).dtype
    return x.update(shape=x.shape[1:], dtype=dtype, weak_type=False)


def _sum_now(x: Any) -> Array:
    return jnp.sum(x, axis=0)


sum_rows_p.def_impl(_sum_now)
mlir.register_lowering(sum_rows_p, mlir.lower_fun(_sum_now, multiple_results=False))

# --- random keys as numbers -------------------------------------------------------------------------------------------


def _array(x: Any) -> Any:
    """Array of a leaf, which may be a number."""
    return x if hasattr(x, "dtype") else jnp.asarray(x)


def is_key(x: Any) -> bool:
    """Whether an array holds random keys."""
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def plain(x: Array) -> Array:
    """Array of plain numbers, of an array that may hold random keys."""
    return jax.random.key_data(x) if is_key(x) else x


def like(x: Any, numbers: Array) -> Array:
    """Array of the kind of x, from plain numbers."""
    return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(x)) if is_key(x) else numbers
