"""Packing of fields to 16-bit integers, with an offset and a scale for each channel (the last axis).

The largest error is 1/130000 of the range of a channel.
"""

from __future__ import annotations

import numpy as np


def packed(values: np.ndarray) -> dict[str, np.ndarray]:
    """Pack fields into arrays to store, which `numpyro_diffusion_da.demos.held_suarez_truth.unpacked` unpacks.

    Args:
        values: fields, shape (..., channel).

    Returns:
        "packed", the integers of the shape of the fields; "offset" and "scale" of each channel, shape (channel,).
    """
    low, high = (f(values, axis=tuple(range(values.ndim - 1))) for f in (np.min, np.max))
    offset, scale = 0.5 * (low + high), np.maximum(high - low, 1e-6) / 65000.0
    return {
        "packed": np.rint((values - offset) / scale).astype(np.int16),
        "offset": offset.astype(np.float32),
        "scale": scale.astype(np.float32),
    }
