"""Threads of the linear algebra inside a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def lapack_on_one_thread() -> Iterator[None]:
    """Context in which the solves and decompositions of compiled functions run on one thread each.

    On a CPU, JAX calls SciPy's LAPACK for them. Its threads wait for cores that the threads of XLA hold, and the other
    way round: a step with many small solves, such as one that moves its ancestors, took five times as long. XLA runs
    independent parts of a step side by side anyway. The limit is lifted at the end.
    """
    import scipy.linalg  # noqa: F401  # its library must be loaded to be limited
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield
