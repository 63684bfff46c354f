"""Synthetic GenCast files for dry runs, tests and timings: a random checkpoint, statistics and a made-up atmosphere.

The files have the form of the published ones: checkpoint, statistics and ERA5-like data. A program that runs on them
also runs on the published files. The network has no skill: random weights do not make a denoiser, and its Jacobian is
neither symmetric nor positive.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffusion_da.priors.gencast.prior import TIME_STEP
from numpyro_diffusion_da.priors.weathernext.package import (
    FORCINGS,
    STATIC,
    draw_parameters,
    import_weathernext,
    package_settings,
)
from numpyro_diffusion_da.priors.weathernext.statistics import STATISTICS
from numpyro_diffusion_da.priors.weathernext.synthetic import profile, synthetic_atmosphere, zeros_dataset


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
    data = synthetic_atmosphere(
        sorted(task.target_variables), TIME_STEP, num_latitudes, levels, num_frames, start, seed
    )
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

    def zeros(names: Any, frames: int) -> Any:
        return zeros_dataset(wn, names, frames, num_latitudes, task.pressure_levels)

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
    return draw_parameters(shapes, seed)


def _write_statistics(directory: pathlib.Path, targets: Any, atmospheric: Any, levels: tuple[int, ...]) -> None:
    """Write the four statistics files for target variables, static fields and forcings."""
    import xarray

    for i, what in enumerate(("mean", "stddev", "diffs_stddev", "min")):
        values: dict[str, Any] = {}
        for name in (*targets, *STATIC, *FORCINGS):
            on = list(levels) if name in atmospheric else [None]
            profiles = np.array([profile(name, level) for level in on])
            of_what = profiles[:, i] if i < 3 else profiles[:, 0] - 3.0 * profiles[:, 1]
            values[name] = (("level",), of_what) if name in atmospheric else ((), of_what[0])
        dataset = xarray.Dataset(values, coords={"level": np.array(levels, np.int32)})
        dataset.to_netcdf(directory / STATISTICS[what][0], engine="h5netcdf")
