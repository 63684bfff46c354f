"""Devices that share the particles of a run, and what a process gets from them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.smc.mesh import check_mesh


def usable_mesh(
    mesh: Any, owner: str, algorithm: FilterAlgorithm, number: int, directory: Any = None, what: str = "num_particles"
) -> Mesh | None:
    """Mesh for the particles of a filter; None if the argument is None.

    Args:
        mesh: argument of the user.
        owner: name of the class that got it, for the messages.
        algorithm: filter whose particles are shared.
        number: number of particles that the devices share.
        directory: directory of the run, if it has one.
        what: name of the argument with this number.

    Raises:
        TypeError: the argument is no mesh.
        ValueError: the mesh has other axes than "particles", its devices cannot share the particles equally, the filter
            cannot be sharded, or several processes would write to one directory.
    """
    checked = check_mesh(mesh, owner, number, what)
    if checked is None:
        return None
    if not algorithm.can_be_sharded:
        raise ValueError(
            f"{owner} got a mesh and the filter {type(algorithm).__name__}, whose kernel does not take its particles "
            "sharded; write it with the functions of smc.sharding and set `can_be_sharded`, or leave the mesh out."
        )
    if directory is not None and _spans_processes(checked):
        raise ValueError(
            f"{owner} got a directory and a mesh over several processes, which would all write to it; leave the "
            "directory out, or give a mesh of the devices of one process, jax.local_devices()."
        )
    return checked


def _spans_processes(mesh: Mesh) -> bool:
    """Whether the devices of a mesh belong to more than one process."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def agreed(number: int, mesh: Mesh | None) -> int:
    """Number of the first process, for a number that each process finds by itself, such as one by its clock.

    All processes of a mesh must make the same calls, or they would wait for each other.

    Args:
        number: number of this process.
        mesh: devices of the run; None for one device.
    """
    if mesh is None or not _spans_processes(mesh):
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.asarray(number, np.int32)))


def to_host(values: PyTree) -> PyTree:
    """Arrays as numpy arrays, whole on each process; those of other processes are gathered.

    Args:
        values: arrays, in any number of places.
    """

    def local(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(local, values))
