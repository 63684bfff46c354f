"""Synthetic GenCast files for dry runs, tests and timings: a random checkpoint, statistics and a made-up atmosphere.

The files have the form of the published ones: checkpoint, statistics and ERA5-like data. A program that runs on them
also runs on the published files. The network has no skill: random weights do not make a denoiser, and its Jacobian is
neither symmetric nor positive.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffusion_da.priors.gencast.package import FORCINGS, STATIC, import_weathernext, package_settings
from numpyro_diffusion_da.priors.gencast.prior import TIME_STEP, UNITS
from numpyro_diffusion_da.priors.gencast.statistics import STATISTICS

if TYPE_CHECKING:
    import xarray

# Mean, standard deviation and standard deviation of 12 h differences in the units of `UNITS`, close to those of the
# atmosphere. Variables with levels have their values at 500 hPa here.
TYPICAL = {
    "10m_u_component_of_wind": (0.0, 5.5, 3.3),
    "10m_v_component_of_wind": (0.0, 4.7, 3.7),
    "2m_temperature": (278.0, 21.0, 3.6),
    "geopotential": (54000.0, 3400.0, 390.0),
    "mean_sea_level_pressure": (101000.0, 1300.0, 430.0),
    "sea_surface_temperature": (287.0, 11.0, 0.12),
    "specific_humidity": (8.5e-4, 1.1e-3, 5e-4),
    "temperature": (253.0, 13.0, 2.1),
    "total_precipitation_12hr": (1.2e-3, 3.4e-3, 3.6e-3),
    "u_component_of_wind": (6.6, 12.0, 5.4),
    "v_component_of_wind": (0.0, 9.0, 6.4),
    "vertical_velocity": (0.0, 0.15, 0.18),
    "geopotential_at_surface": (3700.0, 8400.0, 1.0),
    "land_sea_mask": (0.34, 0.46, 1.0),
    **{name: (0.0, 0.7071, 0.1) for name in FORCINGS},
}


class SyntheticFiles(NamedTuple):
    """Paths of the files that `write_synthetic_gencast` wrote.

    Attributes:
        checkpoint: checkpoint, for `GenCastPrior.from_checkpoint`.
        stats: directory of the statistics.
        data: ERA5-like dataset in netCDF, with the static fields.
    """

    checkpoint: pathlib.Path
    stats: pathlib.Path
    data: pathlib.Path


def write_synthetic_gencast(
    directory: str | os.PathLike[str],
    *,
    num_latitudes: int = 13,
    levels: tuple[int, ...] = (500, 850),
    mesh_size: int = 1,
    latent_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    attention_hops: int = 4,
    num_frames: int = 8,
    start: str = "2019-03-28T18",
    seed: int = 0,
) -> SyntheticFiles:
    """Write a checkpoint with random weights, statistics, and a dataset of a made-up atmosphere.

    Args:
        directory: directory of the files; it is made if it does not exist.
        num_latitudes: number of latitudes of the grid, poles included. The grid has 2 (num_latitudes - 1) longitudes.
            181 latitudes are 1 degree apart.
        levels: pressure levels in hPa.
        mesh_size: number of refinements of the icosahedron; 4 and 5 in the published 1 degree models.
        latent_size: width of the network; 512 in the published models.
        num_layers: number of transformer blocks; 16 in the published models.
        num_heads: number of attention heads; 4 in the published models.
        attention_hops: number of mesh edges across which a node attends; 16 in the published models.
        num_frames: number of frames of data, 12 h apart.
        start: time of the first frame.
        seed: seed of weights and data.

    Raises:
        ImportError: GenCast's package is missing.
    """
    wn = import_weathernext()
    path = pathlib.Path(directory)
    (path / "stats").mkdir(parents=True, exist_ok=True)
    task = dataclasses.replace(wn.gencast.TASK, pressure_levels=tuple(levels))
    _write_statistics(path / "stats", task.target_variables, wn.variables.ALL_ATMOSPHERIC_VARS, levels)
    data = synthetic_atmosphere(num_latitudes, levels, num_frames, start, seed)
    data.to_netcdf(path / "data.nc", engine="h5netcdf")
    transformer = wn.denoiser.SparseTransformerConfig(
        attention_k_hop=attention_hops,
        attention_type="mha",
        mask_type="full",
        d_model=latent_size,
        num_layers=num_layers,
        num_heads=num_heads,
        ffw_hidden=4 * latent_size,
    )
    architecture = wn.denoiser.DenoiserArchitectureConfig(
        sparse_transformer_config=transformer, mesh_size=mesh_size, latent_size=latent_size
    )
    configs = {
        "task_config": task,
        "denoiser_architecture_config": architecture,
        "sampler_config": wn.gencast.SamplerConfig(),
        "noise_config": wn.gencast.NoiseConfig(),
        "noise_encoder_config": wn.denoiser.NoiseEncoderConfig(),
    }
    checkpoint = wn.gencast.CheckPoint(
        description="random weights, no skill",
        license="Apache-2.0",
        params=random_parameters(wn, configs, num_latitudes, seed),
        **configs,
    )
    with open(path / "checkpoint.npz", "wb") as file:
        wn.checkpoint.dump(file, checkpoint)
    return SyntheticFiles(path / "checkpoint.npz", path / "stats", path / "data.nc")


def random_parameters(wn: Any, configs: dict[str, Any], num_latitudes: int, seed: int) -> dict[str, Any]:
    """Draw random parameters in the shapes of the package.

    The package's own initialization makes every transformer block the identity and ignores the noise level. Here all
    weights are normal, with a variance that preserves the size of the activations.

    Args:
        wn: modules of the package, from `import_weathernext`.
        configs: configurations of the checkpoint, by name.
        num_latitudes: number of latitudes of the grid.
        seed: seed of the weights.
    """
    task = configs["task_config"]
    coords = {
        "lat": np.linspace(-90, 90, num_latitudes).astype(np.float32),
        "lon": (np.arange(2 * (num_latitudes - 1)) * 180.0 / (num_latitudes - 1)).astype(np.float32),
    }
    rows, columns, levels = len(coords["lat"]), len(coords["lon"]), len(task.pressure_levels)

    def zeros(names: Any, frames: int) -> Any:
        """Dataset of zeros with the given variables and number of frames."""
        axes = {"batch": 1, "time": frames, "level": levels, "lat": rows, "lon": columns}

        def dims(name: str) -> tuple[str, ...]:
            if name.startswith("year"):
                return ("batch", "time")
            if name.startswith("day"):
                return ("batch", "time", "lon")
            if name in STATIC:
                return ("lat", "lon")
            if name in wn.variables.ALL_ATMOSPHERIC_VARS:
                return ("batch", "time", "level", "lat", "lon")
            return ("batch", "time", "lat", "lon")

        values = {name: (dims(name), jnp.zeros([axes[axis] for axis in dims(name)])) for name in names}
        return wn.xarray_jax.Dataset(values, coords=coords)

    @wn.haiku.transform
    def run() -> None:
        model = wn.gencast.GenCast(**{k.replace("checkpoint_", ""): v for k, v in configs.items()})
        model._denoiser(
            inputs=zeros(task.input_variables, 2),
            noisy_targets=zeros(task.target_variables, 1),
            noise_levels=wn.xarray_jax.DataArray(jnp.ones(1), dims=("batch",)),
            forcings=zeros(task.forcing_variables, 1),
        )

    with package_settings():
        shapes = jax.eval_shape(run.init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(shape: Any) -> np.ndarray:
        fan_in = shape.shape[0] if len(shape.shape) > 1 else 100.0
        return (rng.standard_normal(shape.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(draw, shapes)


def _profile(name: str, level: int | None) -> tuple[float, float, float]:
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


def _write_statistics(directory: pathlib.Path, targets: Any, atmospheric: Any, levels: tuple[int, ...]) -> None:
    """Write the four statistics files for target variables, static fields and forcings."""
    import xarray

    for i, what in enumerate(("mean", "stddev", "diffs_stddev", "min")):
        values: dict[str, Any] = {}
        for name in (*targets, *STATIC, *FORCINGS):
            on = list(levels) if name in atmospheric else [None]
            profiles = np.array([_profile(name, level) for level in on])
            of_what = profiles[:, i] if i < 3 else profiles[:, 0] - 3.0 * profiles[:, 1]
            values[name] = (("level",), of_what) if name in atmospheric else ((), of_what[0])
        dataset = xarray.Dataset(values, coords={"level": np.array(levels, np.int32)})
        dataset.to_netcdf(directory / STATISTICS[what][0], engine="h5netcdf")


def synthetic_atmosphere(
    num_latitudes: int, levels: tuple[int, ...], num_frames: int, start: str, seed: int = 0
) -> xarray.Dataset:
    """Make smooth random fields with the names, units and axes of ERA5.

    Their changes over 12 h are about as large as in the atmosphere.

    Args:
        num_latitudes: number of latitudes of the grid, poles included.
        levels: pressure levels in hPa.
        num_frames: number of frames, 12 h apart.
        start: time of the first frame.
        seed: seed of the fields.

    Returns:
        Dataset with the variables of GenCast, dims (time, [level], latitude, longitude), and the static fields. Sea
        surface temperature is NaN over land.
    """
    import xarray

    rng = np.random.default_rng(seed)
    latitude = np.linspace(-90.0, 90.0, num_latitudes)
    longitude = np.arange(2 * (num_latitudes - 1)) * 180.0 / (num_latitudes - 1)
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
    times = np.datetime64(start, "ns") + np.arange(num_frames) * TIME_STEP

    def series(name: str, level: int | None) -> np.ndarray:
        """Frames of a variable at a level, shape (time, latitude, longitude)."""
        mean, stddev, difference = _profile(name, level)
        patterns = waves(8) / np.sqrt(8.0)
        steps = np.cumsum(rng.standard_normal((num_frames, 8)) * difference, 0)
        field = mean + np.tensordot(steps + stddev * rng.standard_normal(8), patterns, 1)
        return np.maximum(field, 0.0) if name in ("total_precipitation_12hr", "specific_humidity") else field

    has_levels = ("geopotential", "specific_humidity", "temperature", "u_component_of_wind", "v_component_of_wind")
    variables: dict[str, Any] = {}
    for name, units in UNITS.items():
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
