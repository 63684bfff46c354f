"""Chunks of steps: several steps of a filter in one call of a compiled function.

A call from Python costs a step of a small program more time than the step itself. So a run makes its steps in chunks. A
chunk is a loop inside one compiled function. The number of its steps is an argument, and nothing is compiled anew when
it changes.

A step sees its own inputs, key and state only. The result therefore does not depend on how a run is divided.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

Step = Callable[[Int[Array, ""], Any], tuple[Any, PyTree]]
"""One step of a filter: (index of the step, state) -> (state, record)."""

LONGEST = 1024
"""Largest number of steps in a chunk."""

MOST_BYTES = 2**26
"""Largest number of bytes that the records of a chunk hold, apart from those of a single step: 64 MB."""

SECONDS = 0.5
"""Time that a chunk should take. Between chunks a run shows its progress, writes its steps and can be interrupted."""


def run_chunk(
    step: Step, state: PyTree, first: Int[Array, ""], count: Int[Array, ""], most: int
) -> tuple[PyTree, PyTree]:
    """Make several steps, inside a function that is compiled.

    Args:
        step: one step. It is traced once.
        state: state before the first of these steps, a pytree of arrays.
        first: index of the first step, shape ().
        count: number of steps, shape (); at most the leading axis of the records.
        most: largest number of steps that is ever wanted.

    Returns:
        (state after the steps; records). The leading axis of the records is the largest number of steps of a chunk, so
        that they are no larger than `MOST_BYTES`; the first `count` are filled.
    """
    state = jax.tree.map(_strong, state)
    traced, (_, record) = jax.make_jaxpr(step, return_shape=True)(first, state)
    form = jax.tree.structure(state)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(record))
    capacity = max(1, min(most, LONGEST, MOST_BYTES // max(size, 1)))

    def make(index: Array, before: list[Array]) -> tuple[list[Array], list[Array]]:
        found = jax.core.eval_jaxpr(traced.jaxpr, traced.consts, index, *before)
        return [_strong(x) for x in found[: len(before)]], found[len(before) :]

    def one(i: Array, carry: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        before, records = carry
        after, new = make(first + i, before)
        return after, [jax.lax.dynamic_update_index_in_dim(all_, x, i, 0) for all_, x in zip(records, new, strict=True)]

    leaves = jax.tree.leaves(state)
    if capacity == 1:  # large states: a buffer would hold the record a second time
        after, single = make(first, leaves)
        records = [jnp.asarray(x)[None] for x in single]
    else:
        empty = [jnp.zeros((capacity, *x.shape), x.dtype) for x in jax.tree.leaves(record)]
        after, records = jax.lax.fori_loop(0, count, one, (leaves, empty))
    return jax.tree.unflatten(form, after), jax.tree.unflatten(jax.tree.structure(record), records)


def _strong(x: Any) -> Array:
    """Array without a weak type, which a state that comes from a Python number has before its first step only."""
    x = jnp.asarray(x)
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else jax.lax.convert_element_type(x, x.dtype)


class Pace:
    """Number of steps of the next chunk, so that a chunk takes about `SECONDS`.

    The first chunk is one step, because it may be compiled and its time says nothing. The second one is short.
    """

    def __init__(self) -> None:
        self._most = 1
        self._count = 0
        self._measured: float | None = None
        self._began = 0.0
        self._is_compiled = False

    def next(self, left: int) -> int:
        """Number of steps of the next chunk, which begins now.

        Args:
            left: number of steps that are left.
        """
        count = 8.0 if self._measured is None else min(SECONDS / max(self._measured, 1e-9), 16 * self._count)
        self._count = max(1, min(int(count), left, self._most))
        self._began = time.perf_counter()
        return self._count

    def ended(self, most: int) -> float:
        """Note that the chunk has ended, and return the seconds that each of its steps took.

        Args:
            most: number of steps that a chunk can have.
        """
        seconds = (time.perf_counter() - self._began) / self._count
        if self._is_compiled:
            self._measured = seconds
        self._most, self._is_compiled = most, True
        return seconds
