"""The true system of the weather emulator: a dry general circulation model with Held & Suarez's (1994) forcing.

A slice of a run that the emulator was not trained on ships with it, as 16-bit integers with an offset and a scale for
each channel; the channels are those of the emulator's state, and a step is `STEP_HOURS`.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
from jaxtyping import Float

STEP_HOURS = 12.0
"""Length of one step of the emulator."""


def unpacked(stored: Mapping[str, np.ndarray]) -> Float[np.ndarray, "*leading channel"]:
    """The fields packed * scale + offset, in the channels' units.

    Args:
        stored: "packed", integers whose last axis is the channel; "scale" and "offset" of each channel.

    Raises:
        ValueError: one of these is missing, or has not one number a channel.
    """
    if missing := {"packed", "scale", "offset"} - set(stored):
        raise ValueError(f"the packed fields lack {sorted(missing)}; they have {sorted(stored)}.")
    packed, scale, offset = (np.asarray(stored[name]) for name in ("packed", "scale", "offset"))
    if packed.ndim < 1 or not scale.shape == offset.shape == packed.shape[-1:]:
        raise ValueError(
            f"packed fields of shape {packed.shape} have scales of shape {scale.shape} and offsets of shape "
            f"{offset.shape}; expected one number for each channel, the last axis."
        )
    return packed.astype(np.float32) * scale.astype(np.float32) + offset.astype(np.float32)


def truth(folder: Path | Traversable | None = None) -> Float[np.ndarray, "time latitude longitude channel"]:
    """Consecutive states of the true system, one every `STEP_HOURS`.

    Args:
        folder: that holds held_suarez_truth.npz; by default the one that ships.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not packed fields of four axes.
    """
    folder = importlib.resources.files("numpyro_diffusion_da").joinpath("data") if folder is None else folder
    with folder.joinpath("held_suarez_truth.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
        states = unpacked(dict(stored))
    if states.ndim != 4:
        raise ValueError(f"the truth has the shape {states.shape}, expected (time, latitude, longitude, channel).")
    return states
