"""Denoiser of GenCast, from google-deepmind's package `weathernext`."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.priors.weathernext.package import PackageArrays, TracedNetwork, trace


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


def trace_network(
    wn: SimpleNamespace, opened: Any, architecture: Any, parameters: PyTree, layout: Layout, precision: str
) -> TracedNetwork:
    """Trace the denoiser of the package once, at the shapes of a layout.

    Its arguments are (inputs, statics, day, year, z_s, noise level), and it returns D(z_s, s; c).

    Args:
        wn: modules of the package, from `import_weathernext`.
        opened: checkpoint, as the package reads it.
        architecture: architecture of the denoiser.
        parameters: parameters of the network.
        layout: layout of a frame.
        precision: precision of matrix products: "float32", "tensorfloat32" or "bfloat16".
    """
    xarray_jax = wn.xarray_jax
    task = opened.task_config
    arrays = PackageArrays(layout)
    compute = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    targets = [v.name for v in layout.variables]
    inputs_names = [name for name in targets if name in task.input_variables]

    @wn.haiku.transform
    def denoiser(inputs: Array, statics: Array, day: Array, year: Array, z_s: Array, level: Array) -> Array:
        model = wn.gencast.GenCast(
            task, architecture, opened.sampler_config, opened.noise_config, opened.noise_encoder_config
        )
        inputs, statics, day, year = (v.astype(compute) for v in (inputs, statics, day, year))
        known = {
            **arrays.fields(inputs, inputs_names),
            **arrays.progress(day[:2], year[:2]),
            **arrays.surface(statics),
        }
        scaled = (z_s * model._c_in(level)).astype(compute)
        output = model._denoiser(
            inputs=xarray_jax.Dataset(known, coords=arrays.coords),
            noisy_targets=xarray_jax.Dataset(arrays.fields(scaled[None], targets), coords=arrays.coords),
            noise_levels=xarray_jax.DataArray(level[None].astype(compute), dims=("batch",)),
            forcings=xarray_jax.Dataset(arrays.progress(day[2:], year[2:]), coords=arrays.coords),
        )
        raw = arrays.stacked(wn, output)
        return raw.astype(jnp.float32) * model._c_out(level) + z_s * model._c_skip(level)

    def program(parameters: PyTree, *args: Array) -> Array:
        return denoiser.apply(parameters, None, *args)

    num_inputs = sum(layout.variable(name).num_channels for name in inputs_names)
    return trace(program, parameters, [*arrays.shapes(num_inputs), layout.shape, ()], precision)
