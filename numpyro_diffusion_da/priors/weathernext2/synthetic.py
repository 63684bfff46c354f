"""Synthetic files of WeatherNext 2 for dry runs and tests: a random checkpoint, its configuration, an atmosphere.

The files have the form of the published ones. A program that runs on them also runs on the published files. The network
has no skill, because its weights are random.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

import jax

from numpyro_diffusion_da.priors.weathernext.frames import UNITS
from numpyro_diffusion_da.priors.weathernext.package import (
    draw_parameters,
    import_weathernext,
    package_settings,
)
from numpyro_diffusion_da.priors.weathernext.synthetic import synthetic_atmosphere, zeros_dataset
from numpyro_diffusion_da.priors.weathernext2.network import check_xarray, coordinates
from numpyro_diffusion_da.priors.weathernext2.prior import TIME_STEP


class SyntheticWeatherNext2(NamedTuple):
    """Paths of the files that `write_synthetic_weathernext2` wrote.

    Attributes:
        checkpoint: checkpoint, for `WeatherNext2Prior.from_checkpoint`.
        config: its configuration, with the published statistics.
        data: ERA5-like dataset in netCDF, with the static fields.
    """

    checkpoint: pathlib.Path
    config: pathlib.Path
    data: pathlib.Path


def write_synthetic_weathernext2(
    directory: str | os.PathLike[str],
    *,
    num_latitudes: int = 13,
    levels: tuple[int, ...] = (500, 850),
    noise_size: int = 32,
    mesh_size: int = 1,
    latent_size: int = 16,
    num_layers: int = 1,
    num_heads: int = 2,
    attention_hops: int = 4,
    num_frames: int = 8,
    start: str = "2019-03-28T18",
    seed: int = 0,
) -> SyntheticWeatherNext2:
    """Write a checkpoint with random weights, its configuration, and a dataset of a made-up atmosphere.

    The configuration is the published one of WeatherNext 2, with a smaller network and fewer levels.

    Args:
        directory: directory of the files; it is made if it does not exist.
        num_latitudes: number of latitudes of the grid, poles included. The grid has 2 (num_latitudes - 1) longitudes.
        levels: pressure levels in hPa, some of the published ones.
        noise_size: number of elements of the noise; 32 in the published models.
        mesh_size: number of refinements of the icosahedron; 6 in the published model, 5 in the published mini model.
        latent_size: width of the network; 768 in the published model, 512 in the mini model.
        num_layers: number of transformer blocks; 24 in the published model, 16 in the mini model.
        num_heads: number of attention heads; 6 in the published model, 4 in the mini model.
        attention_hops: number of mesh edges across which a node attends; 32 in the published model, 16 in the mini one.
        num_frames: number of frames of data, 6 h apart.
        start: time of the first frame.
        seed: seed of weights and data.

    Raises:
        ImportError: the package is missing, or the installed xarray is newer than it allows.
    """
    wn = import_weathernext("WeatherNext 2")
    check_xarray()
    path = pathlib.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    text = _configuration(wn, levels, noise_size, mesh_size, latent_size, num_layers, num_heads, attention_hops)
    (path / "config.json").write_text(text)
    opened = wn.configurations.get_fiddle_config(text)
    names = sorted(name for name in opened.task.target_variables if name in UNITS)
    data = synthetic_atmosphere(names, TIME_STEP, num_latitudes, levels, num_frames, start, seed)
    data.to_netcdf(path / "data.nc", engine="h5netcdf")

    @wn.haiku.transform
    def run() -> None:
        task = opened.task

        def zeros(names: Any, frames: int) -> Any:
            return zeros_dataset(wn, names, frames, num_latitudes, levels, **coordinates(task, frames, TIME_STEP))

        predictor = opened.predictor_constructor(**opened.predictor_kwargs)
        predictor(
            zeros(task.input_variables, 2),
            targets_template=zeros(task.target_variables, 1),
            forcings=zeros(task.forcing_variables, 1),
        )

    with package_settings():
        shapes = jax.eval_shape(run.init, jax.random.key(0))
        checkpoint = wn.fgn.CheckPoint(
            params=draw_parameters(shapes, seed), description="random weights, no skill", license="Apache-2.0"
        )
        with open(path / "checkpoint.npz", "wb") as file:
            wn.checkpoint.dump(file, checkpoint)
    return SyntheticWeatherNext2(path / "checkpoint.npz", path / "config.json", path / "data.nc")


def _configuration(
    wn: Any,
    levels: tuple[int, ...],
    noise_size: int,
    mesh_size: int,
    latent_size: int,
    num_layers: int,
    num_heads: int,
    attention_hops: int,
) -> str:
    """Text of the published configuration of WeatherNext 2 with other sizes; see `write_synthetic_weathernext2`."""
    from fiddle.experimental import serialization

    wn.configurations.register_xarray_traverser()
    published = wn.configurations.get_fiddle_config_path_by_name("weathernext2/configs/WeatherNext2")
    config = serialization.load_json(pathlib.Path(published).read_text())
    config.task.pressure_levels = tuple(levels)
    config.predictor_kwargs["noise_generator_kwargs"]["noise_var_dict"]["noise"]["non_batch_shape"] = (
        ("noise_channels", noise_size),
    )
    network = config.predictor_kwargs["noisy_function_kwargs"]
    network["mesh_num_splits"] = mesh_size
    to_mesh, to_grid = network["points_to_mesh_model_ctor"], network["mesh_to_grid_model_ctor"]
    network["output_dense_kwargs"]["hidden_size"] = latent_size
    for dense in (network["latent_dense_kwargs"], to_mesh.dense_kwargs, to_grid.dense_kwargs):
        dense.update(hidden_size=latent_size, output_size=latent_size)
    for dense in (to_mesh.edge_encoder_dense_kwargs, to_grid.edge_encoder_dense_kwargs):
        dense.update(hidden_size=max(latent_size // 2, 1), output_size=max(latent_size // 2, 1))
    network["mesh_model_ctor"].transformer_kwargs.update(
        attention_type="mha",
        mask_type="full",
        attention_k_hop=attention_hops,
        d_model=latent_size,
        ffw_hidden=4 * latent_size,
        num_layers=num_layers,
        num_heads=num_heads,
    )
    return serialization.dump_json(config)
