"""Memory that a backward pass keeps, and what the device has, to choose how many particles run at a time."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
from jaxtyping import Array


def backward_bytes(fn: Callable[[Array], Array], at: jax.ShapeDtypeStruct) -> int:
    """Return how many bytes of the forward pass the backward pass of a function keeps; nothing is computed.

    Arrays that the function closes over, such as parameters and conditioning, are in memory anyway and are not counted.

    Args:
        fn: function of one array.
        at: shape and dtype of its argument.
    """
    jaxpr = jax.make_jaxpr(lambda x: jax.tree.leaves(jax.vjp(fn, x)[1]))(at).jaxpr
    there = {*jaxpr.constvars, *jaxpr.invars}
    made = {v for v in jaxpr.outvars if not hasattr(v, "val") and v not in there}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in made)


def device_memory() -> int:
    """Return how many bytes JAX may use of its device, or the machine's memory if the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return host_memory()


def host_memory() -> int:
    """Return how many bytes of memory the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_cores() -> int | None:
    """Return how many cores a device of JAX has if it is a part of the CPU; None for an accelerator."""
    if jax.default_backend() != "cpu":
        return None
    # The cores that this process may use, where the system says so.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // jax.local_device_count(), 1)
