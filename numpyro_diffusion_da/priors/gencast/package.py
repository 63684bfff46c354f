"""Adapter to google-deepmind's package `weathernext`, which contains the network of GenCast.

This is the only module that imports `weathernext`. It imports the package when a checkpoint is opened, and traces the
denoiser once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from numpyro_diffusion_da.fields.layout import Layout

INSTALL = (
    "GenCast's package `weathernext` (v0.3.0, google-deepmind/weathernext) is not installed. It is not on PyPI: the "
    "packages graphcast, gencast and xarray-jax there are unrelated. Install it as docs/gencast.md describes: "
    "pip install 'numpyro-diffusion-da[gencast]', then weathernext and xarray_jax from their repositories."
)
STATIC = ("geopotential_at_surface", "land_sea_mask")
FORCINGS = ("day_progress_cos", "day_progress_sin", "year_progress_cos", "year_progress_sin")


def import_weathernext() -> SimpleNamespace:
    """Import the modules of GenCast's package.

    Returns:
        Namespace with the modules `gencast`, `denoiser`, `casting`, `checkpoint`, `variables`, `xarray_jax` and
        `haiku`.

    Raises:
        ImportError: the package is not installed, or its import fails. The message says what to install.
    """
    if importlib.util.find_spec("weathernext") is None:
        old = importlib.util.find_spec("graphcast")
        found = "" if old is None else f" The installed package `graphcast` ({old.origin}) cannot be used: "
        why = (
            "" if old is None else "the version that contains GenCast needs jax <= 0.8.1, the one on PyPI is unrelated."
        )
        raise ImportError(INSTALL + found + why)
    modules = {
        "gencast": "weathernext.weathernext1_gen.gencast",
        "denoiser": "weathernext.weathernext1_gen.denoiser",
        "casting": "weathernext.utils.casting",
        "checkpoint": "weathernext.utils.checkpoint",
        "variables": "weathernext.utils.variables",
        "xarray_jax": "xarray_jax",
        "haiku": "haiku",
    }
    try:
        with package_settings():
            return SimpleNamespace(**{name: importlib.import_module(path) for name, path in modules.items()})
    except ImportError as error:
        raise ImportError(f"{INSTALL} (weathernext is installed, but its import failed: {error})") from error


@contextlib.contextmanager
def package_settings() -> Iterator[None]:
    """Context in which the package runs without errors and warnings that are not of interest here.

    The package promotes ranks, uses deprecated functions of jax, and modifies sparse matrices in a way that scipy warns
    about.
    """
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="Changing the sparsity structure")
        yield


def is_atmospheric(name: str) -> bool:
    """Whether a variable has pressure levels in GenCast's package."""
    return name in import_weathernext().variables.ALL_ATMOSPHERIC_VARS


def with_attention(architecture: Any, attention: str | None) -> Any:
    """Copy of an architecture with another kind of attention.

    The attention `splash_mha` of the published checkpoints needs a TPU.

    Args:
        architecture: architecture of a checkpoint.
        attention: kind of attention; None for one that runs on the default device.
    """
    if attention is None:
        if jax.default_backend() == "tpu":
            attention = "splash_mha"
        else:
            attention = "mha" if architecture.mesh_size <= 4 else "triblockdiag_mha"
    mask = "lazy" if attention == "splash_mha" else "full"
    transformer = dataclasses.replace(architecture.sparse_transformer_config, attention_type=attention, mask_type=mask)
    return dataclasses.replace(architecture, sparse_transformer_config=transformer)


def noise_range(opened: Any) -> tuple[float, float]:
    """(lowest, highest) noise level of the published sampler, within the range of the training."""
    trained = opened.noise_config
    lowest = max(trained.training_min_noise_level, opened.sampler_config.min_noise_level)
    return float(lowest), float(min(trained.training_max_noise_level, opened.sampler_config.max_noise_level))


class _Program:
    """Holder of the static part of a traced function; it compares and hashes by identity."""

    def __init__(self, static: Any) -> None:
        self.static = static


class TracedNetwork(eqx.Module):
    """GenCast's denoiser as a program that was traced once, at given shapes.

    The package builds its graphs in numpy each time it is traced, which takes 11 s at 1 degree. The library traces it
    once and calls the traced program from then on.

    Args:
        traced: traced function of the parameters and the arguments.
        parameters: parameters of the network.

    Attributes:
        parameters: parameters of the network.
        graph: arrays of the traced function, such as the mesh.
        program: static part of the traced function.
    """

    parameters: PyTree
    graph: PyTree
    program: _Program = eqx.field(static=True)

    def __init__(self, traced: Any, parameters: PyTree) -> None:
        self.parameters = parameters
        graph, static = eqx.partition(traced, eqx.is_array)
        self.graph = jax.tree.map(jnp.asarray, graph)
        self.program = _Program(static)

    def __call__(self, *args: Array) -> Array:
        """Denoiser D(z_s, s; c) for the arguments (inputs, statics, day, year, z_s, noise level)."""
        return eqx.combine(self.graph, self.program.static)(self.parameters, *args)


def trace_network(
    wn: SimpleNamespace, opened: Any, architecture: Any, parameters: PyTree, layout: Layout, precision: str
) -> TracedNetwork:
    """Trace the denoiser of the package once, at the shapes of a layout.

    Args:
        wn: modules of the package, from `import_weathernext`.
        opened: checkpoint, as the package reads it.
        architecture: architecture of the denoiser.
        parameters: parameters of the network.
        layout: layout of a frame.
        precision: precision of matrix products: "float32", "tensorfloat32" or "bfloat16".
    """
    xarray_jax, haiku = wn.xarray_jax, wn.haiku
    task = opened.task_config
    coordinates = layout.coords()
    # The batch axis has no coordinate, because vmap does not work with one.
    coords = {"lat": coordinates["latitude"].astype(np.float32), "lon": coordinates["longitude"].astype(np.float32)}
    compute = jnp.bfloat16 if precision == "bfloat16" else jnp.float32

    def fields(values: Array, names: list[str]) -> dict[str, Any]:
        """Named variables of an array (time, latitude, longitude, channel), with channels in the order of the names."""
        out: dict[str, Any] = {}
        start = 0
        for name in names:
            variable = layout.variable(name)
            part = values[..., start : start + variable.num_channels]
            start += variable.num_channels
            if variable.levels:
                out[name] = (("batch", "time", "level", "lat", "lon"), jnp.moveaxis(part, -1, 1)[None])
            else:
                out[name] = (("batch", "time", "lat", "lon"), part[None, ..., 0])
        return out

    def progress(day: Array, year: Array) -> dict[str, Any]:
        """Variables of the forcings of frames, named in the order of `FORCINGS`."""
        return {
            FORCINGS[0]: (("batch", "time", "lon"), day[None, ..., 0]),
            FORCINGS[1]: (("batch", "time", "lon"), day[None, ..., 1]),
            FORCINGS[2]: (("batch", "time"), year[None, ..., 0]),
            FORCINGS[3]: (("batch", "time"), year[None, ..., 1]),
        }

    targets = [v.name for v in layout.variables]
    inputs_names = [name for name in targets if name in task.input_variables]

    @haiku.transform
    def denoiser(inputs: Array, statics: Array, day: Array, year: Array, z_s: Array, level: Array) -> Array:
        model = wn.gencast.GenCast(
            task, architecture, opened.sampler_config, opened.noise_config, opened.noise_encoder_config
        )
        inputs, statics, day, year = (v.astype(compute) for v in (inputs, statics, day, year))
        surface = {name: (("lat", "lon"), statics[..., i]) for i, name in enumerate(STATIC)}
        known = {**fields(inputs, inputs_names), **progress(day[:2], year[:2]), **surface}
        scaled = (z_s * model._c_in(level)).astype(compute)
        noisy = xarray_jax.Dataset(fields(scaled[None], targets), coords=coords)
        levels = xarray_jax.DataArray(level[None].astype(compute), dims=("batch",))
        output = model._denoiser(
            inputs=xarray_jax.Dataset(known, coords=coords),
            noisy_targets=noisy,
            noise_levels=levels,
            forcings=xarray_jax.Dataset(progress(day[2:], year[2:]), coords=coords),
        )
        raw = jnp.concatenate(
            [
                jnp.moveaxis(values[0, 0], 0, -1) if layout.variable(name).levels else values[0, 0][..., None]
                for name in targets
                for values in [xarray_jax.unwrap_data(output[name].transpose(*noisy[name].dims))]
            ],
            -1,
        )
        return raw.astype(jnp.float32) * model._c_out(level) + z_s * model._c_skip(level)

    def program(parameters: PyTree, *args: Array) -> Array:
        return denoiser.apply(parameters, None, *args)

    rows, columns = layout.shape[:2]
    num_inputs = sum(layout.variable(name).num_channels for name in inputs_names)
    shapes = [(2, rows, columns, num_inputs), (rows, columns, 2), (3, columns, 2), (3, 2), layout.shape, ()]
    matmul = {"float32": "highest", "tensorfloat32": "tensorfloat32", "bfloat16": "default"}[precision]
    with package_settings(), jax.default_matmul_precision(matmul):
        traced = eqx.filter_closure_convert(
            program, parameters, *[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        )
    return TracedNetwork(traced, parameters)
