"""Kernels whose particles are sharded over the devices of a mesh; see the module `smc.sharding`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.smc.base import Info, Kernel, State, map_particles
from numpyro_diffusion_da.smc.sharding import AXIS, Traffic, collective_bytes, take_ancestors, traffic_of

SHARES: Any = PartitionSpec(AXIS)
SAME: Any = PartitionSpec()
"""Rows of an array divided over the devices, and an array that is the same on all of them."""

STATE = State(particles=SHARES, log_evidence=SAME, log_weights=SAME, past=SHARES)
"""Where the parts of a state are."""

INFO = Info(**{name: SHARES if name in ("weighing", "proposal", "forecast") else SAME for name in Info._fields})
"""Where the parts of the diagnostics are: records of particles are where these particles are."""


def check_mesh(mesh: Any, owner: str, number: int, what: str = "num_particles") -> Mesh | None:
    """Mesh of devices with one axis "particles", as the kernels use it; None if the argument is None.

    Args:
        mesh: argument of the user.
        owner: name of the class that got it, for the message.
        number: number of particles that the devices divide.
        what: name of the argument with this number.

    Raises:
        TypeError: the argument is no mesh.
        ValueError: the mesh has other axes, or the number is no multiple of the number of devices.
    """
    if mesh is None:
        return None
    require(mesh, Mesh, owner, "mesh", 'jax.make_mesh((jax.device_count(),), ("particles",))')
    if mesh.axis_names != (AXIS,):
        raise ValueError(
            f"{owner} got a mesh with the axes {mesh.axis_names}; expected one axis, '{AXIS}': write "
            f'mesh=jax.make_mesh(({mesh.size},), ("{AXIS}",)).'
        )
    if number % mesh.size:
        raise ValueError(
            f"{owner} got {what}={number} and a mesh of {mesh.size} devices, which cannot share them equally; give "
            f"{what}={-(-number // mesh.size) * mesh.size}, or another multiple of {mesh.size}."
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,))


def per_device(fn: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Run a function on each device of a mesh.

    Args:
        fn: function of a device's rows, and of arrays that are the same on all devices.
        mesh: mesh of devices.
        in_specs: `SHARES` or `SAME` for each argument, or for parts of it.
        out_specs: the same for what the function returns.
    """
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def on_mesh(kernel: Kernel, mesh: Mesh | None) -> Kernel:
    """Kernel whose particles are sharded over the devices of a mesh.

    Args:
        kernel: kernel of a filter that uses the functions of `smc.sharding`, as all of this package do.
        mesh: mesh of devices; None returns the kernel itself.

    Returns:
        Kernel of the same arguments, pure and jit-able, whose `Info` has the `Traffic` of the step.
    """
    if mesh is None:
        return kernel

    def step(rng_key: PRNGKeyArray, state: State, observation: PyTree) -> tuple[State, Info]:
        traced, shapes = jax.make_jaxpr(kernel, return_shape=True)(rng_key, state, observation)
        # What no output depends on is left out first, as the compiler would do.
        jaxpr, consts, inputs = partial_eval.dce_jaxpr_consts(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
        used = [value for value, is_used in zip(traced.consts, consts, strict=True) if is_used]
        given = jax.tree.leaves((rng_key, state, observation))
        flat = jax.core.eval_jaxpr(jaxpr, used, *[x for x, is_used in zip(given, inputs, strict=True) if is_used])
        new, info = jax.tree.unflatten(jax.tree.structure(shapes), flat)
        moved, gathered = (jnp.asarray(size) for size in collective_bytes(jaxpr, mesh.size))
        made = Traffic(jnp.zeros(()), jnp.zeros(())) if info.traffic == () else info.traffic
        return new, info._replace(traffic=made.plus(Traffic(moved, jnp.zeros(()), gathered)))

    return per_device(step, mesh, (SAME, STATE, SAME), (STATE, INFO))


def started_on_mesh(start: Callable[[PRNGKeyArray], State], mesh: Mesh | None) -> Callable[[PRNGKeyArray], State]:
    """Function that draws the state before the first observation, where its particles are.

    Args:
        start: function from a random key to the state of a filter, which draws each device's own particles.
        mesh: mesh of devices; None returns the function itself.
    """
    return start if mesh is None else per_device(start, mesh, (SAME,), STATE)


# --- rows that are filters --------------------------------------------------------------------------------------------

FILTERS = "filters"
"""Name of the axis over which whole filters are divided. It is not `AXIS`, so a filter there is as without a mesh."""


def map_filters(fn: Callable[..., Any], mesh: Mesh | None, batch_size: int | None = None) -> Callable[..., Any]:
    """Map a function that runs a filter over the leading axis of its arguments, whose rows are divided over devices.

    Args:
        fn: function of one row. Each call runs on one device.
        mesh: devices that share the rows; None for one device. If they cannot share them equally, the last row fills up
            the last shares.
        batch_size: number of rows mapped at a time on each device, which bounds the memory; None maps all at once.

    Returns:
        Function of the same arguments, each with a leading axis of rows. What it returns is where its row is.
    """
    mapped = map_particles(fn, batch_size)
    if mesh is None:
        return mapped
    rows = PartitionSpec(FILTERS)
    devices = Mesh(mesh.devices, (FILTERS,), axis_types=(AxisType.Auto,))
    of_device = per_device(mapped, devices, rows, rows)

    def over_rows(*args: Any) -> Any:
        n = len(jax.tree.leaves(args)[0])
        missing = -n % devices.size
        if not missing:
            return of_device(*args)
        filled = np.minimum(np.arange(n + missing), n - 1)
        found = of_device(*jax.tree.map(lambda x: x[filled], args))
        return jax.tree.map(lambda x: x[:n], found)

    return over_rows


def on_all_devices(values: PyTree, mesh: Mesh | None) -> PyTree:
    """Arrays that are whole on each device, so that sums over them have one order.

    Args:
        values: arrays, which may be divided.
        mesh: mesh of devices; None returns the arrays.
    """
    return values if mesh is None else jax.lax.with_sharding_constraint(values, NamedSharding(mesh, SAME))


def gathered_bytes(values: PyTree, mesh: Mesh) -> float:
    """Bytes that `on_all_devices` moves of divided arrays, summed over the devices."""
    return float((mesh.size - 1) * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(values)))


def take_filters(filters: PyTree, ancestors: Int[Array, " m"], mesh: Mesh | None) -> tuple[PyTree, PyTree]:
    """Ancestor of each new filter, whose arrays move to its device as one.

    Args:
        filters: filters, with a leading axis of m.
        ancestors: index of each new filter's ancestor.
        mesh: devices that share the filters equally; None for one device.

    Returns:
        (new filters, `Traffic` of their moves; () without a mesh).
    """

    def take(filters: PyTree, ancestors: Int[Array, " m"]) -> tuple[PyTree, PyTree]:
        return take_ancestors(filters, ancestors), traffic_of(filters, ancestors)

    if mesh is None:
        return take(filters, ancestors)
    taken, traffic = per_device(take, mesh, (SHARES, SAME), (SHARES, SAME))(filters, ancestors)
    return taken, Traffic(jnp.zeros(()), jnp.zeros(())) if traffic == () else traffic
