"""Synthetic data of the weather models: typical statistics, a made-up atmosphere, and datasets of zeros."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from numpyro_diffusion_da.priors.weathernext.frames import UNITS
from numpyro_diffusion_da.priors.weathernext.package import FORCINGS, STATIC, is_atmospheric

if TYPE_CHECKING:
    import xarray

# Mean, standard deviation and standard deviation of 12 h differences in the units of `UNITS`, close to those of the
# atmosphere. Variables with levels have their values at 500 hPa here.
TYPICAL = {
    "100m_u_component_of_wind": (0.0, 6.9, 4.0),
    "100m_v_component_of_wind": (0.0, 6.1, 4.4),
    "10m_u_component_of_wind": (0.0, 5.5, 3.3),
    "10m_v_component_of_wind": (0.0, 4.7, 3.7),
    "2m_temperature": (278.0, 21.0, 3.6),
    "geopotential": (54000.0, 3400.0, 390.0),
    "mean_sea_level_pressure": (101000.0, 1300.0, 430.0),
    "sea_surface_temperature": (287.0, 11.0, 0.12),
    "specific_humidity": (8.5e-4, 1.1e-3, 5e-4),
    "temperature": (253.0, 13.0, 2.1),
    "total_precipitation_12hr": (1.2e-3, 3.4e-3, 3.6e-3),
    "total_precipitation_6hr": (6e-4, 2e-3, 2e-3),
    "u_component_of_wind": (6.6, 12.0, 5.4),
    "v_component_of_wind": (0.0, 9.0, 6.4),
    "vertical_velocity": (0.0, 0.15, 0.18),
    "geopotential_at_surface": (3700.0, 8400.0, 1.0),
    "land_sea_mask": (0.34, 0.46, 1.0),
    **{name: (0.0, 0.7071, 0.1) for name in FORCINGS},
}


def profile(name: str, level: int | None) -> tuple[float, float, float]:
    """(mean, standard deviation, standard deviation of 12 h differences) of a variable at a level in hPa."""
    mean, stddev, difference = TYPICAL[name]
    if level is None:
        return mean, stddev, difference
    height = -7.0 * np.log(level / 1013.0)  # in km above sea level, for a scale height of 7 km
    if name == "temperature":
        mean = 288.0 - 6.5 * height
    if name == "geopotential":
        mean = 9810.0 * height
    return mean, stddev, difference


def regular_grid(num_latitudes: int) -> tuple[np.ndarray, np.ndarray]:
    """(Latitudes with both poles, longitudes) of a regular grid in degrees, with 2 (num_latitudes - 1) longitudes."""
    columns = 2 * (num_latitudes - 1)
    return np.linspace(-90.0, 90.0, num_latitudes), np.arange(columns) * 180.0 / (num_latitudes - 1)


def zeros_dataset(
    wn: SimpleNamespace,
    names: Sequence[str],
    num_frames: int,
    num_latitudes: int,
    levels: tuple[int, ...],
    **coords: Any,
) -> Any:
    """Dataset of zeros in the form of the package, to initialize a network.

    Args:
        wn: modules of the package.
        names: names of the variables.
        num_frames: number of times.
        num_latitudes: number of latitudes of the grid.
        levels: pressure levels in hPa.
        **coords: coordinates besides those of the grid.
    """
    latitude, longitude = regular_grid(num_latitudes)
    on_grid = {"lat": latitude.astype(np.float32), "lon": longitude.astype(np.float32)}
    axes = {"batch": 1, "time": num_frames, "level": len(levels), "lat": len(latitude), "lon": len(longitude)}

    def dims(name: str) -> tuple[str, ...]:
        if name.startswith("year"):
            return ("batch", "time")
        if name.startswith("day"):
            return ("batch", "time", "lon")
        if name in STATIC:
            return ("lat", "lon")
        if is_atmospheric(wn, name):
            return ("batch", "time", "level", "lat", "lon")
        return ("batch", "time", "lat", "lon")

    values = {name: (dims(name), jnp.zeros([axes[axis] for axis in dims(name)])) for name in names}
    return wn.xarray_jax.Dataset(values, coords={**on_grid, **coords})


def synthetic_atmosphere(
    names: Sequence[str],
    time_step: np.timedelta64,
    num_latitudes: int,
    levels: tuple[int, ...],
    num_frames: int,
    start: str,
    seed: int = 0,
) -> xarray.Dataset:
    """Make smooth random fields with the names, units and axes of ERA5.

    Their changes over a step are about as large as those of the atmosphere over 12 h.

    Args:
        names: names of the variables.
        time_step: time between frames.
        num_latitudes: number of latitudes of the grid, poles included.
        levels: pressure levels in hPa.
        num_frames: number of frames.
        start: time of the first frame.
        seed: seed of the fields.

    Returns:
        Dataset with the variables, dims (time, [level], latitude, longitude), and the static fields. Sea
        surface temperature is NaN over land.
    """
    import xarray

    rng = np.random.default_rng(seed)
    latitude, longitude = regular_grid(num_latitudes)
    across, along = np.deg2rad(latitude)[:, None], np.deg2rad(longitude)[None]

    def waves(number: int) -> np.ndarray:
        """Random patterns of unit size that are smooth at the poles, shape (number, latitude, longitude)."""
        patterns = []
        for _ in range(number):
            wavenumber, turns = rng.integers(1, 5), rng.integers(0, 4)
            phases = rng.uniform(0, 2 * np.pi, 2)
            pattern = np.cos(across) ** wavenumber * np.cos(wavenumber * along + phases[0])
            patterns.append(2.0 * pattern * np.cos(turns * across + phases[1]))
        return np.array(patterns)

    land = waves(6).sum(0) > 1.0
    times = np.datetime64(start, "ns") + np.arange(num_frames) * time_step

    def series(name: str, level: int | None) -> np.ndarray:
        """Frames of a variable at a level, shape (time, latitude, longitude)."""
        mean, stddev, difference = profile(name, level)
        patterns = waves(8) / np.sqrt(8.0)
        steps = np.cumsum(rng.standard_normal((num_frames, 8)) * difference, 0)
        field = mean + np.tensordot(steps + stddev * rng.standard_normal(8), patterns, 1)
        positive = name == "specific_humidity" or name.startswith("total_precipitation")
        return np.maximum(field, 0.0) if positive else field

    has_levels = ("geopotential", "specific_humidity", "temperature", "u_component_of_wind", "v_component_of_wind")
    variables: dict[str, Any] = {}
    for name in names:
        units = UNITS[name]
        if name in (*has_levels, "vertical_velocity"):
            values = np.stack([series(name, level) for level in levels], 1)
            variables[name] = (("time", "level", "latitude", "longitude"), values.astype(np.float32), {"units": units})
            continue
        values = series(name, None)
        if name == "sea_surface_temperature":
            values = np.where(land, np.nan, np.maximum(values, 271.0))
        variables[name] = (("time", "latitude", "longitude"), values.astype(np.float32), {"units": units})
    height = np.where(land, 500.0 * (waves(4).sum(0) + 3.0), 0.0).clip(0.0)
    variables["geopotential_at_surface"] = (("latitude", "longitude"), (9.81 * height).astype(np.float32))
    variables["land_sea_mask"] = (("latitude", "longitude"), land.astype(np.float32))
    coords = {"time": times, "level": np.array(levels, np.int32), "latitude": latitude, "longitude": longitude}
    return xarray.Dataset(variables, coords=coords)
