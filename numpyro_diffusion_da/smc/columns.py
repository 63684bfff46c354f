"""Columns of the states of all particles: places, blocks or single values, some of which are changed together.

A regression over the ensemble changes each column of the state by itself, in all particles, given the predicted
observations. So its columns may be divided: over the devices of a mesh, each of which has all particles of its columns
then, or into batches that are read from files and written. Without either, all columns are changed at once. The
function that changes them is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from numpyro_diffusion_da.smc.rows import are_rows_apart, map_columns_apart
from numpyro_diffusion_da.smc.sharding import from_parts, num_devices, own, to_parts, whole

Index = Int[Array, " c"] | Int[np.ndarray, " c"]
"""Indices of some columns: a numpy array if they are all columns, in their order."""


def are_columns_divided() -> bool:
    """Whether `map_columns` gives its function some columns at a time."""
    return are_rows_apart() or num_devices() > 1


def map_columns(
    fn: Callable[[list[Array], Index], tuple[list[Array], PyTree]], arrays: list[Array]
) -> tuple[list[Array], PyTree]:
    """Map a function over the columns of arrays, some or all at a time.

    Args:
        fn: function (some columns of all particles of each array, their indices) -> (new columns of all particles, what
            each of these columns has, with a leading axis of columns).
        arrays: arrays of shape (n, columns, ...), of all particles or of those of this device.

    Returns:
        (arrays of new columns, of the same particles, shape (n, columns, ...); what the columns have, on each device,
        with a leading axis of columns).
    """
    if are_rows_apart():
        return map_columns_apart(fn, arrays)
    columns = arrays[0].shape[1]
    index: Any = np.arange(columns) if num_devices() == 1 else own(jnp.arange(columns))
    found, of_columns = fn([to_parts(x) for x in arrays], index)
    return [from_parts(x, columns) for x in found], whole(of_columns, columns)


def at_columns(values: Any, index: Index | None) -> Any:
    """Values of some columns.

    Args:
        values: array with a leading axis of columns.
        index: indices of the columns, as `map_columns` gives them; None for all.
    """
    return values if index is None or isinstance(index, np.ndarray) else jnp.asarray(values)[index]


def by_place(array: Array, places: int, width: int) -> Array:
    """Values of an array of one particle by place, shape (places, values).

    Args:
        array: one state or several, with the places before the values at each place: shape (..., places, width),
            flattened in any way.
        places: number of places.
        width: number of values of one state at a place.
    """
    return jnp.moveaxis(array.reshape(-1, places, width), 0, 1).reshape(places, -1)


def from_places(values: Array, like: Any, width: int) -> Array:
    """Array of one particle of its values by place.

    Args:
        values: values by place, shape (places, values).
        like: array of the shape and dtype of the result.
        width: number of values of one state at a place.
    """
    return jnp.moveaxis(values.reshape(len(values), -1, width), 1, 0).reshape(like.shape).astype(like.dtype)
