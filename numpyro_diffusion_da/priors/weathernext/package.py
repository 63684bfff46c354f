"""Adapter to google-deepmind's package `weathernext`, which contains the networks of GenCast and of WeatherNext 2.

This is the only module that imports `weathernext`. It imports the package when a checkpoint is opened.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from numpyro_diffusion_da.checksums import DAMAGE
from numpyro_diffusion_da.fields.layout import Layout

INSTALL = (
    "{model}'s package `weathernext` (v0.3.0, google-deepmind/weathernext) is not installed. It is not on PyPI: the "
    "packages graphcast, gencast and xarray-jax there are unrelated. Install it as docs/gencast.md describes: "
    "pip install 'numpyro-diffusion-da[gencast]', then weathernext and xarray_jax from their repositories."
)
SHARED = {
    "casting": "weathernext.utils.casting",
    "checkpoint": "weathernext.utils.checkpoint",
    "variables": "weathernext.utils.variables",
    "xarray_jax": "xarray_jax",
    "haiku": "haiku",
}
MODULES = {
    "GenCast": {
        "gencast": "weathernext.weathernext1_gen.gencast",
        "denoiser": "weathernext.weathernext1_gen.denoiser",
    },
    "WeatherNext 2": {
        "fgn": "weathernext.weathernext2.fgn",
        "configurations": "weathernext.utils.fiddle_config_io",
    },
}
STATIC = ("geopotential_at_surface", "land_sea_mask")
FORCINGS = ("day_progress_cos", "day_progress_sin", "year_progress_cos", "year_progress_sin")


def import_weathernext(model: str = "GenCast") -> SimpleNamespace:
    """Import the modules of google-deepmind's package for one of its models.

    Args:
        model: "GenCast" or "WeatherNext 2".

    Returns:
        Namespace with the modules `casting`, `checkpoint`, `variables`, `xarray_jax` and `haiku`, for GenCast also
        `gencast` and `denoiser`, and for WeatherNext 2 `fgn` and `configurations`.

    Raises:
        ImportError: the package is not installed, or its import fails. The message says what to install.
    """
    install = INSTALL.format(model=model)
    if importlib.util.find_spec("weathernext") is None:
        old = importlib.util.find_spec("graphcast")
        found = "" if old is None else f" The installed package `graphcast` ({old.origin}) cannot be used: "
        why = (
            "" if old is None else "the version that contains GenCast needs jax <= 0.8.1, the one on PyPI is unrelated."
        )
        raise ImportError(install + found + why)
    try:
        with package_settings():
            return SimpleNamespace(
                **{name: importlib.import_module(path) for name, path in {**SHARED, **MODULES[model]}.items()}
            )
    except ImportError as error:
        raise ImportError(f"{install} (weathernext is installed, but its import failed: {error})") from error


@contextlib.contextmanager
def package_settings() -> Iterator[None]:
    """Context in which the package runs without errors and warnings that are not of interest here.

    The package promotes ranks, uses deprecated functions of jax, modifies sparse matrices in a way that scipy warns
    about, and logs a warning for each variable without a coordinate or a statistic.
    """
    logger = logging.getLogger("absl")
    quiet = _Below(logging.ERROR)
    logger.addFilter(quiet)
    try:
        with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="Changing the sparsity structure")
            yield
    finally:
        logger.removeFilter(quiet)


class _Below(logging.Filter):
    """Filter that drops records below a level, such as logging.ERROR; the argument is this level."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is kept."""
        return record.levelno >= self.level


def is_atmospheric(wn: SimpleNamespace, name: str) -> bool:
    """Whether a variable has pressure levels in the package, whose modules are `wn`."""
    return name in wn.variables.ALL_ATMOSPHERIC_VARS


def load_checkpoint(wn: SimpleNamespace, path: str | os.PathLike[str], kind: Any, model: str) -> Any:
    """Load a checkpoint of the package.

    Args:
        wn: modules of the package.
        path: path of the ``.npz`` file.
        kind: class of the checkpoint in the package.
        model: name of the model, for the message.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read as such a checkpoint. The message names it.
    """
    with open(path, "rb") as file:
        try:
            return wn.checkpoint.load(file, kind)
        except DAMAGE as error:
            raise ValueError(
                f"the file '{os.fspath(path)}' cannot be read as a checkpoint of {model} "
                f"({type(error).__name__}: {error}); download it again."
            ) from error


def network_parameters(parameters: PyTree, precision: str) -> PyTree:
    """Parameters of a checkpoint as arrays, in bfloat16 for the precision "bfloat16"."""
    arrays = jax.tree.map(jnp.asarray, parameters)
    return jax.tree.map(lambda p: p.astype(jnp.bfloat16), arrays) if precision == "bfloat16" else arrays


class PackageArrays:
    """Conversion between arrays of this library and named variables of the package, with a batch axis of one.

    Args:
        layout: layout of a frame. Its variables are sorted by name, each by level.

    Attributes:
        layout: layout of a frame.
        coords: latitude and longitude in the names of the package.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        on_grid = layout.coords()
        # The batch axis has no coordinate, because vmap does not work with one.
        self.coords = {"lat": on_grid["latitude"].astype(np.float32), "lon": on_grid["longitude"].astype(np.float32)}

    def fields(self, values: Array, names: Sequence[str]) -> dict[str, Any]:
        """Named variables of an array (time, latitude, longitude, channel), with channels in the order of the names."""
        out: dict[str, Any] = {}
        start = 0
        for name in names:
            variable = self.layout.variable(name)
            part = values[..., start : start + variable.num_channels]
            start += variable.num_channels
            if variable.levels:
                out[name] = (("batch", "time", "level", "lat", "lon"), jnp.moveaxis(part, -1, 1)[None])
            else:
                out[name] = (("batch", "time", "lat", "lon"), part[None, ..., 0])
        return out

    def progress(self, day: Array, year: Array) -> dict[str, Any]:
        """Variables of the forcings of frames, named in the order of `FORCINGS`."""
        return {
            FORCINGS[0]: (("batch", "time", "lon"), day[None, ..., 0]),
            FORCINGS[1]: (("batch", "time", "lon"), day[None, ..., 1]),
            FORCINGS[2]: (("batch", "time"), year[None, ..., 0]),
            FORCINGS[3]: (("batch", "time"), year[None, ..., 1]),
        }

    def surface(self, statics: Array) -> dict[str, Any]:
        """Variables of the fields that do not change, named in the order of `STATIC`."""
        return {name: (("lat", "lon"), statics[..., i]) for i, name in enumerate(STATIC)}

    def stacked(self, wn: SimpleNamespace, output: Any) -> Array:
        """Array (latitude, longitude, channel) of a dataset of the package with one time."""
        parts = []
        for variable in self.layout.variables:
            dims = ("batch", "time", *(("level",) if variable.levels else ()), "lat", "lon")
            values = wn.xarray_jax.unwrap_data(output[variable.name].transpose(*dims))[0, 0]
            parts.append(jnp.moveaxis(values, 0, -1) if variable.levels else values[..., None])
        return jnp.concatenate(parts, -1)

    def shapes(self, num_inputs: int) -> list[tuple[int, ...]]:
        """Shapes of the network's arguments (inputs, statics, day, year) for a number of channels of the inputs."""
        rows, columns = self.layout.shape[:2]
        return [(2, rows, columns, num_inputs), (rows, columns, len(STATIC)), (3, columns, 2), (3, 2)]


class _Program:
    """Holder of the static part of a traced function; it compares and hashes by identity."""

    def __init__(self, static: Any) -> None:
        self.static = static


class TracedNetwork(eqx.Module):
    """Network of the package as a program that was traced once, at given shapes.

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
        """Output of the network for its arguments."""
        return eqx.combine(self.graph, self.program.static)(self.parameters, *args)


def trace(
    program: Callable[..., Array],
    parameters: PyTree,
    shapes: Sequence[tuple[int, ...]],
    precision: str,
    *,
    forward: bool = False,
) -> TracedNetwork:
    """Trace a network of the package once.

    Args:
        program: function of the parameters and of float32 arrays.
        parameters: parameters of the network.
        shapes: shapes of the arrays.
        precision: precision of matrix products: "float32", "tensorfloat32" or "bfloat16".
        forward: whether the traced network has forward derivatives even where the package defines backward passes.
    """
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    matmul = {"float32": "highest", "tensorfloat32": "tensorfloat32", "bfloat16": "default"}[precision]
    with package_settings(), jax.default_matmul_precision(matmul):
        if forward:
            program = forward_differentiable(program, parameters, *arguments)
        traced = eqx.filter_closure_convert(program, parameters, *arguments)
    return TracedNetwork(traced, parameters)


def forward_differentiable(function: Callable[..., Array], *args: PyTree) -> Callable[..., Array]:
    """Same function, with derivatives of its operations in place of the backward passes that it defines itself.

    The package defines the backward passes of sums and gathers over the edges of its graphs for machines of several
    devices (`jax.custom_vjp`). JAX refuses forward derivatives of such functions, which guided draws of an emulator of
    one pass need. The function is traced, and each part with such a rule is replaced by its operations. So are parts
    that are compiled or rematerialized by themselves.

    Args:
        function: function of pytrees of arrays that returns one array.
        *args: arguments at whose shapes the function is traced.
    """
    closed = jax.make_jaxpr(function)(*args)
    return lambda *values: _inlined(closed.jaxpr, closed.consts, jax.tree.leaves(values))[0]


INLINED = {"custom_vjp_call": "call_jaxpr", "jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}
"""Operations that are replaced by what they contain, and the parameter in which they hold it."""


def _inlined(jaxpr: Any, constants: Sequence[Array], args: Sequence[Array]) -> list[Array]:
    """Evaluate a traced program, with the operations of `INLINED` replaced by what they contain."""
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))

    def value(of: Any) -> Any:
        return of.val if hasattr(of, "val") else known[of]

    for equation in jaxpr.eqns:
        inputs = [value(of) for of in equation.invars]
        if equation.primitive.name in INLINED:
            inner = equation.params[INLINED[equation.primitive.name]]
            inner, held = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            outputs = _inlined(inner, held, inputs)
        else:
            bound = equation.primitive.get_bind_params(equation.params)
            functions, parameters = bound if isinstance(bound, tuple) else ((), bound)  # a tuple before JAX 0.10
            outputs = equation.primitive.bind(*functions, *inputs, **parameters)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        known.update(zip(equation.outvars, outputs, strict=True))
    return [value(of) for of in jaxpr.outvars]


def draw_parameters(shapes: PyTree, seed: int) -> PyTree:
    """Random parameters of given shapes, normal, with a variance that preserves the size of the activations."""
    rng = np.random.default_rng(seed)

    def draw(shape: Any) -> np.ndarray:
        fan_in = shape.shape[0] if len(shape.shape) > 1 else 100.0
        return (rng.standard_normal(shape.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(draw, shapes)
