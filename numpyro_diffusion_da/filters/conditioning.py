"""Conditioning of all particles of a step, computed once and held beside them.

A filter needs the conditioning c of a particle several times in a step: to weigh it, to draw from it, for the
background and for forecasts. Where whole particles are selected, that of a new particle is its ancestor's, so the
kernels of `smc` select it with the ancestors like any other array of a particle. Glued and moved ancestors are states
that no particle had, and are conditioned anew.

The conditioning of an emulator may be a network of its own, of many times the cost of a pass of the other one. Where it
is none (`conditioning_passes` of the prior is 0) nothing is held: it is cheaper to compute again than to keep. The
particles of a filter are the same to rounding either way.
"""

from __future__ import annotations

from typing import TypeVar

import jax
from jaxtyping import PyTree

from numpyro_diffusion_da.diffusion.memory import device_memory
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.base import map_particles, num_particles
from numpyro_diffusion_da.smc.rows import are_rows_apart
from numpyro_diffusion_da.transition.base import DrawRecord
from numpyro_diffusion_da.transition.weights import WeightRecord

Record = TypeVar("Record", WeightRecord, DrawRecord)

SHARE_OF_MEMORY = 0.25
"""Largest share of the device's memory for the conditioning of all particles, before and after selection. The particles
that move at a time get half of the memory (`inference/batching.py`)."""


def held_conditioning(
    program: StateSpaceModel, particles: PyTree, inputs: TimeInputs, batch_size: int | None = None
) -> PyTree | None:
    """Conditioning of every particle, leading axis N; None where each use computes it anew.

    It is None if the transition is not that of an emulator, if its conditioning runs no network, or if the conditioning
    of all particles takes more than `SHARE_OF_MEMORY` and is not streamed with the particles.

    Args:
        program: state-space model at given arguments of the program.
        particles: carries before the step, leading axis N.
        inputs: inputs of the time.
        batch_size: number of particles used at a time; None for all at once.
    """
    leaves = conditioning_leaves(program)
    bytes_each = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    fits = are_rows_apart() or 2 * num_particles(particles) * bytes_each <= SHARE_OF_MEMORY * device_memory()
    if not leaves or not fits:
        return None
    return map_particles(lambda carry: program.conditioning(carry, inputs), batch_size)(particles)


def conditioning_leaves(program: StateSpaceModel) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays of one particle's conditioning; empty if it runs no network.

    Args:
        program: state-space model at given arguments of the program.
    """
    emulator = program.structure.emulator
    if emulator is None or emulator.conditioning_passes == 0:
        return []
    return jax.tree.leaves(program.conditioning_shape())


def with_conditioning(record: Record, program: StateSpaceModel) -> Record:
    """Record of a weight or of a draw that also counts the passes of the particle's conditioning.

    Args:
        record: record of a weight or of a draw.
        program: state-space model at given arguments of the program.
    """
    return record._replace(passes=record.passes.plus(program.conditioning_passes))
