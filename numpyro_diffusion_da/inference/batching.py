"""Number of particles that a run moves at a time, given by `batch_size` or chosen by memory and speed."""

from __future__ import annotations

import numbers
from typing import Any

from jax.sharding import Mesh

from numpyro_diffusion_da.arguments import shown
from numpyro_diffusion_da.diffusion.memory import device_cores, device_memory
from numpyro_diffusion_da.program.state_space import StateSpaceModel

FAST_ON_A_CORE = 64
"""Particles of an emulator that one core of a CPU moves at a time: many more no longer fit into its cache."""

BATCH_ADVICE = "give a whole number of 1 or more, or None for as many particles as memory allows."
"""Advice in the messages about a wrong batch size."""


def check_batch_size(batch_size: Any, owner: str) -> None:
    """Check that a batch size is None or a whole number of 1 or more.

    Args:
        batch_size: argument of the user.
        owner: name of the class or method that got it, for the message.

    Raises:
        TypeError: `batch_size` is neither None nor a whole number.
        ValueError: `batch_size` is below 1.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral)):
        raise TypeError(f"{owner} got batch_size={shown(batch_size)}; {BATCH_ADVICE}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"{owner} got batch_size={batch_size}; {BATCH_ADVICE}")


def batch_in_memory(batch_size: int | None, number: int, bytes_each: int) -> int | None:
    """Number of items (particles, densities) to compute at a time.

    Args:
        batch_size: argument of the user; None for as many as fit into half of the device's memory.
        number: number of items in total.
        bytes_each: working memory of one item, in bytes.

    Returns:
        Number of items at a time, 1 or more; None if all of them can be computed at once.
    """
    fits = batch_size if batch_size is not None else int(0.5 * device_memory() // max(bytes_each, 1))
    return None if fits >= number else max(fits, 1)


def particles_at_a_time(
    batch_size: int | None, number: int, program: StateSpaceModel, mesh: Mesh | None = None
) -> int | None:
    """Number of particles of a program to move at a time.

    Args:
        batch_size: argument of the user; None for as many as fit into half of the device's memory, and on a CPU for
            about as many as its cores move fastest.
        number: number of particles in total.
        program: state-space model of the program, which estimates the working memory of one particle.
        mesh: devices that share the particles; None for one device.

    Returns:
        Number of particles at a time on each device, 1 or more; None if all of them can move at once.
    """
    number = number if mesh is None else number // mesh.size
    if batch_size is not None:
        return batch_in_memory(batch_size, number, 1)
    bytes_each = program.working_bytes()
    fits = batch_in_memory(None, number, bytes_each)
    fast = fast_batch(number) if bytes_each else None
    return min((size for size in (fits, fast) if size is not None), default=None)


def fast_batch(number: int) -> int | None:
    """Number of particles of an emulator that a CPU moves at a time because that is faster than all at once.

    It divides the number of particles, because a rest would be compiled once more.

    Args:
        number: number of particles in total.

    Returns:
        Number of particles at a time; None for all at once: on an accelerator, for few particles, and if no number near
        `FAST_ON_A_CORE` for each core is a divisor.
    """
    cores = device_cores()
    if cores is None:
        return None
    most = FAST_ON_A_CORE * cores
    divisors = (size for size in range(most, most // 2, -1) if number % size == 0)
    return next(divisors, None) if number > most else None


def split_batch(batch: int | None, num_particles: int) -> tuple[int | None, int | None]:
    """Divide a batch among several filters that run at the same time.

    Args:
        batch: number of particles moved at a time, over all filters; None for all.
        num_particles: number of particles of one filter on one device.

    Returns:
        (number of filters at a time, number of particles of a filter at a time), each None for all.
    """
    if batch is None:
        return None, None
    return max(batch // num_particles, 1), batch if batch < num_particles else None
