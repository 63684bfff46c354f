"""Data of generate.py, as coefficients for training and as fields for validation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffusion_da.demos import held_suarez_truth
from numpyro_diffusion_da.fields import Layout, Variable
from numpyro_diffusion_da.priors import HarmonicNoise, SphericalHarmonics, spherical_layout

TEMPERATURE_LEVELS = (500, 850)
"""Pressure levels in hPa of temperature in the emulator's state.

Temperature at 250 hPa is left out. Slow disturbances of the layer above dominate it, and the state does not contain
that layer.
"""
WIND_LEVELS = (250, 500, 850)
"""Pressure levels in hPa of the winds in the emulator's state."""
VARIABLES = (
    Variable("surface_pressure", "hPa"),
    Variable("temperature", "K", TEMPERATURE_LEVELS),
    Variable("u_component_of_wind", "m s-1", WIND_LEVELS),
    Variable("v_component_of_wind", "m s-1", WIND_LEVELS),
)
DEGREES = 22
"""Number of degrees of the state's harmonics, which is that of the model's scalars.

The model's winds have one degree more. It is left out because it contains little energy: a linear forecast has four
times as much energy there as the truth, and an analysis also has more than the truth.
"""


class Statistics(NamedTuple):
    """Quantities that convert states to coefficients.

    Attributes:
        noise: noise of the emulator, which contains the harmonics.
        layout: layout of a state.
        state_mean: mean along each latitude in the units of the layout, shape (latitude, channel).
        state_scale: standard deviation of each channel around this mean, shape (channel,).
    """

    noise: HarmonicNoise
    layout: Layout
    state_mean: np.ndarray
    state_scale: np.ndarray


def harmonics(num_latitudes: int) -> SphericalHarmonics:
    """Harmonics of the emulator's state on a grid with a given number of latitudes."""
    num_scalars, num_winds = 1 + len(TEMPERATURE_LEVELS), len(WIND_LEVELS)
    return SphericalHarmonics(DEGREES, num_latitudes, num_scalars=num_scalars, num_winds=num_winds)


def shards(folder: Path, split: str, limit: int | None = None) -> Iterator[np.ndarray]:
    """Read the fields of a split, shard by shard in the order of time.

    Args:
        folder: folder that generate.py wrote.
        split: name of the split.
        limit: largest number of shards; None for all.

    Yields:
        Fields of one shard in the units of the layout, shape (runs, times, latitude, longitude, channel).

    Raises:
        FileNotFoundError: the folder has no shards of the split.
    """
    description = json.loads((folder / "data.json").read_text())
    stored = description["channels"]
    # generate.py calls the components of the wind u and v.
    names = [f"{v.name.removesuffix('_component_of_wind')}_{level}" for v in VARIABLES for level in v.levels]
    index = [stored.index(name) for name in ("surface_pressure", *names)]
    paths = sorted(folder.glob(f"{split}_*.npz"))[:limit]
    if not paths:
        raise FileNotFoundError(f"{folder} has no shards of split '{split}'; run generate.py --out {folder} first.")
    for path in paths:
        with np.load(path) as shard:
            yield held_suarez_truth.unpacked({key: shard[key][..., index] for key in ("packed", "scale", "offset")})


def statistics(folder: Path, limit: int | None = None) -> Statistics:
    """Compute the statistics of the training runs, with one mean for both hemispheres and one scale for each wind."""
    count, total, squares = 0, 0.0, 0.0
    for values in shards(folder, "train", limit):
        count += values.shape[0] * values.shape[1]
        total = total + values.astype(np.float64).mean(axis=3).sum(axis=(0, 1))
        squares = squares + (values.astype(np.float64) ** 2).mean(axis=3).sum(axis=(0, 1))
    mean, square = total / count, squares / count
    h = harmonics(mean.shape[0])
    sign = np.repeat([1.0, -1.0], [h.num_scalars + h.num_winds, h.num_winds])
    symmetric = 0.5 * (mean + sign * mean[::-1])
    variance = h.weights @ (square - 2.0 * symmetric * mean + symmetric**2)
    scalars, u, v = np.split(variance, [h.num_scalars, h.num_scalars + h.num_winds])
    wind = 0.5 * (u + v)
    scale = np.sqrt(np.concatenate([scalars, wind, wind]))
    layout = spherical_layout(h, VARIABLES)
    return Statistics(HarmonicNoise(h), layout, symmetric.astype(np.float32), scale.astype(np.float32))


def trajectories(folder: Path, split: str, known: Statistics, limit: int | None = None) -> np.ndarray:
    """Read the states of a split as coefficients of normalized states, shape (runs, times, 2, m, l, channel)."""

    @eqx.filter_jit
    def coefficients(fields: jax.Array) -> jax.Array:
        anomaly = (fields - known.state_mean[None, :, None]) / known.state_scale[None, None, None]
        return jax.lax.map(known.noise.harmonics.analysis, anomaly)

    parts = []
    for values in shards(folder, split, limit):
        flat = values.reshape(-1, *values.shape[2:])
        parts.append(
            np.asarray(coefficients(jnp.asarray(flat))).reshape(
                *values.shape[:2], *known.noise.harmonics.coefficients_shape
            )
        )
    return np.concatenate(parts, axis=1)
