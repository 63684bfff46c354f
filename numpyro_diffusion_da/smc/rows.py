"""Rows of arrays, one for each particle, which a run may hold on disk and load some at a time.

A kernel touches the arrays of all particles in five ways: it maps a function over their rows, it takes rows by their
indices, it sums over rows, it maps a function over some columns of all rows (`smc/columns.py`), and it computes with
arrays that have a few numbers for each row, such as weights and predicted observations. The functions of this module
are the first four. They compute at once, as one would write it. Inside `rows_apart` they are recorded as they are, as
equations of the trace (`map_rows_p`, `take_rows_p`, `sum_rows_p`, `map_columns_p`). A run whose particles do not fit
into memory traces its step this way, and makes the maps in batches of rows or of columns that it reads and writes
(`inference/streaming.py`). So there is one kernel for both, and it knows nothing of files.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import mlir, partial_eval
from jaxtyping import Array, Int, PyTree

_APART: contextvars.ContextVar[int] = contextvars.ContextVar("number of rows of a batch", default=0)


@contextlib.contextmanager
def rows_apart(batch: int) -> Iterator[None]:
    """Context in which functions are traced whose operations on rows stay equations of their own.

    Args:
        batch: number of rows that are in memory at a time; of columns, as many are as hold the same number of values,
            or `LEAST_OF_COLUMNS`.
    """
    token = _APART.set(batch)
    try:
        yield
    finally:
        _APART.reset(token)


def are_rows_apart() -> bool:
    """Whether operations on rows are recorded, so that their rows may be on disk."""
    return _APART.get() > 0


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

whole_rows_p = core.Primitive("whole_rows")
"""Array of all rows that is to be in memory as a whole, whatever its size."""


def whole_rows(values: PyTree) -> PyTree:
    """Arrays that are to be in memory as a whole, although each row has many numbers: predicted observations.

    Args:
        values: arrays with a leading axis of rows.
    """
    return jax.tree.map(whole_rows_p.bind, values) if are_rows_apart() else values


whole_rows_p.def_abstract_eval(lambda x: x)
whole_rows_p.def_impl(lambda x: x)
mlir.register_lowering(whole_rows_p, lambda _, x: [x])

# --- columns ----------------------------------------------------------------------------------------------------------

LEAST_OF_COLUMNS = 2**23
"""Number of bytes of columns that may be in memory in any case: 8 MB. Narrow columns are slow to read from a file."""

map_columns_p = core.Primitive("map_columns")
"""Map of a function of some columns of all rows. Operands: what all columns share, then arrays of shape (rows, columns,
...). Parameters: `jaxpr` of (shared, indices of `size` columns, these columns) -> (new columns, what each column has),
`shared`, `columns`, their number, and `rows`, the number of outputs that have rows: the others have columns only."""
map_columns_p.multiple_results = True


def map_columns_apart(
    fn: Callable[[list[Array], Array], tuple[list[Array], PyTree]], arrays: list[Array]
) -> tuple[list[Array], PyTree]:
    """Map a function over the columns of arrays, some at a time, as one equation; for use inside `rows_apart`.

    Args:
        fn: function (some columns of all rows of each array, their indices) -> (new columns of all rows, what each of
            these columns has, with a leading axis of columns).
        arrays: arrays of shape (rows, columns, ...).

    Returns:
        (arrays of new columns, shape (rows, columns, ...); what the columns have, leading axis of columns).
    """
    n, columns = arrays[0].shape[:2]
    of_column = sum(x.size // columns * x.dtype.itemsize for x in arrays)
    size = max(1, min(columns, max(_APART.get() * columns // n, LEAST_OF_COLUMNS // max(of_column, 1))))
    some = [jax.ShapeDtypeStruct((len(x), size, *x.shape[2:]), x.dtype) for x in arrays]
    index = jax.ShapeDtypeStruct((size,), np.int32)
    traced, shapes = jax.make_jaxpr(lambda index, *some: fn(list(some), index), return_shape=True)(index, *some)
    found = map_columns_p.bind(
        *traced.consts,
        *arrays,
        jaxpr=traced.jaxpr,
        shared=len(traced.consts),
        columns=columns,
        rows=len(jax.tree.leaves(shapes[0])),
    )
    return cast(tuple[list[Array], PyTree], jax.tree.unflatten(jax.tree.structure(shapes), found))


@map_columns_p.def_abstract_eval
def _shapes_of_columns(*operands: Any, jaxpr: Any, shared: int, columns: int, rows: int) -> list[Any]:
    found = []
    for i, v in enumerate(jaxpr.outvars):
        lead = (v.aval.shape[0], columns) if i < rows else (columns,)
        shape = (*lead, *v.aval.shape[len(lead) :])
        found.append(v.aval.update(shape=shape, weak_type=False))
    return found


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
