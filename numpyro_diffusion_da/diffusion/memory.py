"""What a backward pass holds in memory, and what the device has: how many particles can move at a time."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
from jaxtyping import Array


def backward_bytes(fn: Callable[[Array], Array], at: jax.ShapeDtypeStruct) -> int:
    """Bytes that the backward pass of `fn` keeps of the forward pass; nothing is computed.

    What `fn` closes over (parameters, conditioning) is there anyway, and is not counted.
    """
    jaxpr = jax.make_jaxpr(lambda x: jax.tree.leaves(jax.vjp(fn, x)[1]))(at).jaxpr
    there = {*jaxpr.constvars, *jaxpr.invars}
    made = {v for v in jaxpr.outvars if not hasattr(v, "val") and v not in there}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in made)


def device_memory() -> int:
    """Bytes that JAX may use of its device; the machine's memory where the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
