"""How many small matrices are factorized at a time."""

from __future__ import annotations

import sys

import jax

MOST_SHARED_OUT = 100_000
"""Number of operations of a batch of factorizations up to which jaxlib keeps it on one thread, with a margin of 2."""


def most_at_a_time(size: int, columns: int) -> int:
    """Largest number of matrices that are to be factorized, or solved with, in one batch.

    On a CPU, LAPACK's routines share out a large batch over the threads and wait for them. Two of them at the same time
    can wait forever, so batches stay so small that none is shared out.

    Args:
        size: number of rows of a matrix.
        columns: number of columns that each is applied to.
    """
    if jax.default_backend() != "cpu":
        return sys.maxsize
    return max(1, MOST_SHARED_OUT // (size * size * max(size, columns)))
