"""The shards of generate.py, as coefficients for training and as fields for validation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffusion_da.demos.held_suarez_truth import unpacked
from numpyro_diffusion_da.fields import Layout, Variable
from numpyro_diffusion_da.priors import HarmonicNoise, SphericalHarmonics, spherical_layout

TEMPERATURE_LEVELS = (500, 850)
"""Of the emulator's state, hPa. That at 250 hPa is ruled by slow disturbances of the layer above, which it has not."""
WIND_LEVELS = (250, 500, 850)
VARIABLES = (
    Variable("surface_pressure", "hPa"),
    Variable("temperature", "K", TEMPERATURE_LEVELS),
    Variable("u_component_of_wind", "m s-1", WIND_LEVELS),
    Variable("v_component_of_wind", "m s-1", WIND_LEVELS),
)
DEGREES = 22
"""Harmonics of the state: those of the model's scalars. Its winds have one degree more, with so little in it that a
linear forecast makes four times as much of it, and an analysis puts more there than the truth has."""


class Statistics(NamedTuple):
    """How states are made coefficients."""

    noise: HarmonicNoise
    layout: Layout
    state_mean: np.ndarray
    state_scale: np.ndarray


def harmonics(num_latitudes: int) -> SphericalHarmonics:
    """Of the emulator's state."""
    num_scalars, num_winds = 1 + len(TEMPERATURE_LEVELS), len(WIND_LEVELS)
    return SphericalHarmonics(DEGREES, num_latitudes, num_scalars=num_scalars, num_winds=num_winds)


def shards(folder: Path, split: str, limit: int | None = None) -> Iterator[np.ndarray]:
    """Fields of shape (runs, times, latitude, longitude, channel), in order of time."""
    description = json.loads((folder / "data.json").read_text())
    stored = description["channels"]
    # generate.py calls the components of the wind u and v.
    names = [f"{v.name.removesuffix('_component_of_wind')}_{level}" for v in VARIABLES for level in v.levels]
    index = [stored.index(name) for name in ("surface_pressure", *names)]
    paths = sorted(folder.glob(f"{split}_*.npz"))[:limit]
    if not paths:
        raise FileNotFoundError(f"{folder} has no shards of '{split}'; run generate.py --out {folder} first.")
    for path in paths:
        with np.load(path) as shard:
            yield unpacked({key: shard[key][..., index] for key in ("packed", "scale", "offset")})


def statistics(folder: Path, limit: int | None = None) -> Statistics:
    """Of the training runs; mean of both hemispheres, one scale for the two components of a wind."""
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
    """Coefficients of the normalized states, shape (runs, times, 2, m, l, channel)."""

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
