"""How many particles move at a time: what `batch_size=None` means to a run."""

from __future__ import annotations

import numbers
from typing import Any

from numpyro_diffusion_da.arguments import shown
from numpyro_diffusion_da.diffusion.memory import device_memory
from numpyro_diffusion_da.program.state_space import StateSpaceModel

BATCH_ADVICE = "give a whole number of 1 or more, or None for as many particles as memory allows."


def check_batch_size(batch_size: Any) -> None:
    """Refuse a batch size that is neither None nor a positive number.

    Raises:
        TypeError: not a whole number.
        ValueError: a number below 1.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral)):
        raise TypeError(f"got batch_size={shown(batch_size)}; {BATCH_ADVICE}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"got batch_size={batch_size}; {BATCH_ADVICE}")


def batch_in_memory(batch_size: int | None, number: int, bytes_each: int) -> int | None:
    """The number of particles to move at a time, or None where all of them can move at once.

    Args:
        batch_size: as the user gave it; None for as many as half of the device's memory takes.
        number: particles that there are.
        bytes_each: working memory of one particle.
    """
    fits = batch_size if batch_size is not None else int(0.5 * device_memory() // max(bytes_each, 1))
    return None if fits >= number else max(fits, 1)


def particles_at_a_time(batch_size: int | None, number: int, program: StateSpaceModel) -> int | None:
    """The number of particles of a program to move at a time, or None where all of them can move at once."""
    if batch_size is not None:
        return batch_in_memory(batch_size, number, 1)
    return batch_in_memory(None, number, program.working_bytes())


def split_batch(batch: int | None, num_particles: int) -> tuple[int | None, int | None]:
    """Divide a batch among filters that run side by side.

    Args:
        batch: particles moved at a time, of all filters together; None for all.
        num_particles: particles of one filter.

    Returns:
        (filters at a time, particles of a filter at a time), each None for all.
    """
    if batch is None:
        return None, None
    return max(batch // num_particles, 1), batch if batch < num_particles else None
