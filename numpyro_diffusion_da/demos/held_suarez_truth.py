"""True states for the Held-Suarez demo: part of a run of a dry circulation model forced as in Held & Suarez (1994).

The package contains a part of a run on which the emulator was not trained. It is stored as 16-bit integers with an
offset and a scale for each channel. The channels are those of the state of the emulator, and the time step is
`STEP_HOURS`.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
from jaxtyping import Float

import numpyro_diffusion_da as ndda

STEP_HOURS = 12.0
"""Length of one step of the emulator, in hours."""


def unpacked(stored: Mapping[str, np.ndarray]) -> Float[np.ndarray, "*leading channel"]:
    """Unpack fields stored as integers: packed * scale + offset, in the unit of each channel.

    Args:
        stored: arrays "packed", integers whose last axis is the channel, and "scale" and "offset", one number for each
            channel.

    Raises:
        ValueError: one of these arrays is missing, or "scale" or "offset" does not have one number for each channel.
    """
    if missing := {"packed", "scale", "offset"} - set(stored):
        raise ValueError(f"the packed fields lack {sorted(missing)}; they have {sorted(stored)}: give all three.")
    packed, scale, offset = (np.asarray(stored[name]) for name in ("packed", "scale", "offset"))
    if packed.ndim < 1 or not scale.shape == offset.shape == packed.shape[-1:]:
        raise ValueError(
            f"packed fields of shape {packed.shape} have scales of shape {scale.shape} and offsets of shape "
            f"{offset.shape}; expected one number for each channel, the last axis."
        )
    return packed.astype(np.float32) * scale.astype(np.float32) + offset.astype(np.float32)


def truth(folder: Path | Traversable | None = None) -> Float[np.ndarray, "time latitude longitude channel"]:
    """Consecutive states of the true system, one every `STEP_HOURS` hours.

    Args:
        folder: folder of the file held_suarez_truth.npz; by default that of the package.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the file is damaged, or does not contain packed fields with four axes.
    """
    folder = importlib.resources.files("numpyro_diffusion_da").joinpath("data") if folder is None else folder
    file = folder.joinpath("held_suarez_truth.npz")
    states = unpacked(
        ndda.priors.read_arrays(file, "install the package again, or run the scripts of examples/mini_weather")
    )
    if states.ndim != 4:
        raise ValueError(f"the truth has shape {states.shape}; expected (time, latitude, longitude, channel).")
    return states
