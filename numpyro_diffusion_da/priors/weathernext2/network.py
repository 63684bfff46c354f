"""Network of WeatherNext 2, a functional generative network, from google-deepmind's package `weathernext`.

The network has one vector of noise for the whole globe. It is an input that conditions the scales and offsets of all
normalizations. The package's predictor takes its generator of noise as an argument of its configuration. The library
gives it a generator that passes on the noise e in place of random numbers, and changes nothing else of the package.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.priors.weathernext.package import (
    FORCINGS,
    STATIC,
    PackageArrays,
    TracedNetwork,
    trace,
)
from numpyro_diffusion_da.spelling import spelled

CONFIGURATIONS = ("WeatherNext2", "WeatherNextCyclones", "WeatherNextCyclones_Mini")
NETWORK = "noisy_function_kwargs"


def open_configuration(wn: SimpleNamespace, config: str | os.PathLike[str]) -> Any:
    """Read a configuration of the package.

    Args:
        wn: modules of the package.
        config: name of a published configuration, or the path of a file of that form.

    Raises:
        FileNotFoundError: `config` is neither of both.
        ValueError: the file is not a configuration, or the model of the configuration has other inputs than expected.
    """
    name = os.fspath(config)
    if name in CONFIGURATIONS:
        opened = wn.configurations.get_fiddle_config_by_name(f"weathernext2/configs/{name}")
    elif not os.path.exists(name):
        raise FileNotFoundError(
            f"{spelled('prior.config', name)} is neither a published configuration ({', '.join(CONFIGURATIONS)}) nor a "
            "file; give the one that belongs to the checkpoint."
        )
    else:
        with open(name) as file:
            text = file.read()
        try:
            json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"the file '{name}' of {spelled('prior.config')} cannot be read as JSON ({error}); give one of the "
                "package's configurations."
            ) from None
        opened = wn.configurations.get_fiddle_config(text)
    task = opened.task
    known = {*task.target_variables, *FORCINGS, *STATIC}
    if set(task.forcing_variables) != set(FORCINGS) or not set(task.input_variables) <= known:
        raise ValueError(
            f"the configuration {name!r} has the forcings {sorted(task.forcing_variables)} and the further inputs "
            f"{sorted(set(task.input_variables) - known)}; WeatherNext2Prior knows the forcings {sorted(FORCINGS)} and "
            f"the fields {sorted(STATIC)} only."
        )
    return opened


def statistics_of(opened: Any) -> dict[str, Any]:
    """Normalization datasets of a configuration, by kind: "mean", "stddev", "diffs_stddev" and "min".

    The package leaves a variable without statistics as it is, such as the probability of a cyclone. Its mean is set to
    0 and its standard deviation to 1.
    """
    found: dict[str, Any] = {}
    names = {
        "mean_by_level": "mean",
        "stddev_by_level": "stddev",
        "diffs_stddev_by_level": "diffs_stddev",
        "fill_value": "min",
    }
    for wrapper in opened.predictor_wrappers:
        found |= {names[key]: value for key, value in wrapper["kwargs"].items() if key in names}
    for kind, neutral in (("mean", 0.0), ("stddev", 1.0)):
        lacking = set(opened.task.target_variables) - set(opened.task.input_variables) - set(found[kind])
        found[kind] = found[kind].assign(dict.fromkeys(sorted(lacking), neutral))
    return found


def noise_sizes(opened: Any) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """(Dimensions, sizes) of each noise input of a configuration, without the batch, by name."""
    given = opened.predictor_kwargs["noise_generator_kwargs"]["noise_var_dict"]
    return {
        name: (tuple(axis for axis, _ in how["non_batch_shape"]), tuple(int(n) for _, n in how["non_batch_shape"]))
        for name, how in given.items()
    }


def with_attention(opened: Any, attention: str | None) -> dict[str, Any]:
    """Arguments of a configuration's predictor, with another kind of attention.

    The attention `splash_mha` of the published configurations needs a TPU and has no forward derivative.

    Args:
        opened: configuration.
        attention: "mha" or "triblockdiag_mha"; None for dense attention on meshes up to size 4.
    """
    network = opened.predictor_kwargs[NETWORK]
    if attention is None:
        attention = "mha" if network["mesh_num_splits"] <= 4 else "triblockdiag_mha"
    made = network["mesh_model_ctor"]
    transformer = {**made.keywords["transformer_kwargs"], "attention_type": attention, "mask_type": "full"}
    changed = functools.partial(made.func, *made.args, **{**made.keywords, "transformer_kwargs": transformer})
    return {**opened.predictor_kwargs, NETWORK: {**network, "mesh_model_ctor": changed}}


def coordinates(task: Any, frames: int, time_step: np.timedelta64) -> dict[str, Any]:
    """Coordinates of the package's datasets, which are parts of the names of the parameters.

    Args:
        task: task of the configuration.
        frames: 2 for inputs, whose last time is 0; 1 for targets and forcings, one step later.
        time_step: length of a step.
    """
    times = np.array([-1, 0] if frames == 2 else [1]) * time_step.astype("timedelta64[ns]")
    return {"level": np.array(task.pressure_levels, np.int32), "time": times}


def trace_network(
    wn: SimpleNamespace,
    opened: Any,
    predictor_kwargs: Mapping[str, Any],
    parameters: PyTree,
    layout: Layout,
    precision: str,
    time_step: np.timedelta64,
    names: tuple[str, str],
) -> TracedNetwork:
    """Trace the network of the package once, at the shapes of a layout.

    Its arguments are (inputs, statics, day, year, e), and it returns its normalized output.

    Args:
        wn: modules of the package, from `import_weathernext`.
        opened: configuration.
        predictor_kwargs: arguments of the predictor, from `with_attention`.
        parameters: parameters of the network.
        layout: layout of a frame.
        precision: precision of matrix products: "float32", "tensorfloat32" or "bfloat16".
        time_step: length of a step.
        names: names of the checkpoint and of the configuration, for messages.

    Raises:
        ImportError: the installed xarray is newer than the package allows.
        ValueError: the parameters do not belong to the configuration.
    """
    xarray_jax = wn.xarray_jax
    task = opened.task
    arrays = PackageArrays(layout)
    compute = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    targets = [v.name for v in layout.variables]
    inputs_names = [name for name in targets if name in task.input_variables]
    at_inputs = {**arrays.coords, **coordinates(task, 2, time_step)}
    at_target = {**arrays.coords, **coordinates(task, 1, time_step)}

    @wn.haiku.transform
    def network(inputs: Array, statics: Array, day: Array, year: Array, noise: Array) -> Array:
        inputs, statics, day, year, noise = (v.astype(compute) for v in (inputs, statics, day, year, noise))

        def given(inputs: Any, forcings: Any, **_: Any) -> tuple[Any, Any]:
            """Generator of noise that passes on e, in the form of the package's own."""
            return _with_noise(wn, opened, inputs, forcings, noise)

        predictor = opened.predictor_constructor(**{**predictor_kwargs, "noise_generator_constructor": given})
        known = {
            **arrays.fields(inputs, inputs_names),
            **arrays.progress(day[:2], year[:2]),
            **arrays.surface(statics),
        }
        template = arrays.fields(jnp.zeros((1, *layout.shape), compute), targets)
        output = predictor(
            xarray_jax.Dataset(known, coords=at_inputs),
            targets_template=xarray_jax.Dataset(template, coords=at_target),
            forcings=xarray_jax.Dataset(arrays.progress(day[2:], year[2:]), coords=at_target),
        )
        return arrays.stacked(wn, output).astype(jnp.float32)

    def program(parameters: PyTree, *args: Array) -> Array:
        # The key is not used: the package makes initial values of parameters that it then takes from the checkpoint.
        return network.apply(parameters, jax.random.key(0), *args)

    num_inputs = sum(layout.variable(name).num_channels for name in inputs_names)
    num_noise = sum(math.prod(sizes) for _, sizes in noise_sizes(opened).values())
    shapes = [*arrays.shapes(num_inputs), (num_noise,)]
    check_xarray()
    try:
        return trace(program, parameters, shapes, precision, forward=True)
    except ValueError as error:
        raise ValueError(
            f"the parameters of '{names[0]}' do not fit the configuration '{names[1]}' "
            f"({str(error).splitlines()[0]}); give the one that belongs to the checkpoint, "
            f"{spelled('prior.config')} one of "
            f"{', '.join(map(repr, CONFIGURATIONS))}."
        ) from error


def check_xarray() -> None:
    """Check that the installed xarray makes a dataset from a dataset, as the package does in each pass of its network.

    Raises:
        ImportError: it does not. The message says which version to install.
    """
    import xarray

    try:
        xarray.Dataset(xarray.Dataset())
    except TypeError:
        raise ImportError(
            f"weathernext v0.3.0 runs WeatherNext 2 with xarray <= 2026.2.0 only, and {xarray.__version__} is "
            "installed; pip install 'xarray<=2026.2.0'."
        ) from None


def _with_noise(wn: SimpleNamespace, opened: Any, inputs: Any, forcings: Any, noise: Array) -> tuple[Any, Any]:
    """Copies of inputs and forcings with the parts of a vector of noise as their noise variables."""
    inputs, forcings = inputs.copy(), forcings.copy()
    sources = opened.predictor_kwargs["noise_generator_kwargs"]["noise_var_dict"]
    start = 0
    for name, (dims, sizes) in noise_sizes(opened).items():
        part = noise[start : start + math.prod(sizes)].reshape(1, *sizes)
        start += math.prod(sizes)
        target = inputs if sources[name]["source"] == "input" else forcings
        target[name] = wn.xarray_jax.Variable(("batch", *dims), part)
    return inputs, forcings
