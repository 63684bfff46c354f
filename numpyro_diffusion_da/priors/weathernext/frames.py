"""Frames and forcings that the weather models of google-deepmind's package `weathernext` have in common.

A frame is an array (latitude, longitude, channel) in physical units. Its channels are the variables sorted by name,
each sorted by level, in the order of the package. A model is conditioned on the last two frames, the time of year and
of day, and the surface. It makes the normalized residual of a variable that is also an input, x' = last frame + S z,
where S is the standard deviation of differences over a step. It makes other variables themselves, x' = mean + S z,
where S is their standard deviation.

Sea surface temperature has no value over land. There, frames contain the minimum of the variable, which the package
also fills in before normalization, and S = 0. Such values never change and have no effect on guidance and weights.
`Layout.select` returns NaN for them.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from numpyro_diffusion_da.diffusion.memory import backward_bytes, device_memory
from numpyro_diffusion_da.diffusion.prior import EmulatorPrior
from numpyro_diffusion_da.fields.datasets import grid, read_states, static_field, undefined_mask
from numpyro_diffusion_da.fields.layout import Layout, Undefined, Variable
from numpyro_diffusion_da.fields.plausibility import check_against_statistics
from numpyro_diffusion_da.fields.times import check_spacing, utc_times
from numpyro_diffusion_da.priors.weathernext.package import FORCINGS, STATIC, TracedNetwork, is_atmospheric
from numpyro_diffusion_da.priors.weathernext.statistics import channel_statistics
from numpyro_diffusion_da.spelling import spelled

if TYPE_CHECKING:
    import xarray

SEA_SURFACE_TEMPERATURE = "sea_surface_temperature"
DAYS_PER_YEAR = 365.24219
PRECISIONS = ("float32", "tensorfloat32", "bfloat16")
UNITS = {
    "100m_u_component_of_wind": "m s-1",
    "100m_v_component_of_wind": "m s-1",
    "10m_u_component_of_wind": "m s-1",
    "10m_v_component_of_wind": "m s-1",
    "2m_temperature": "K",
    "geopotential": "m2 s-2",
    "mean_sea_level_pressure": "Pa",
    "sea_surface_temperature": "K",
    "specific_humidity": "kg kg-1",
    "temperature": "K",
    "total_precipitation_12hr": "m",
    "total_precipitation_6hr": "m",
    "u_component_of_wind": "m s-1",
    "v_component_of_wind": "m s-1",
    "vertical_velocity": "Pa s-1",
}


class Forcings(NamedTuple):
    """Time of day and of year at the two input frames and at the target frame, for one step or for several steps.

    Attributes:
        day: cosine and sine of the local time of day, shape (3, longitude, 2), with a leading time axis for several
            steps.
        year: cosine and sine of the time of year, shape (3, 2), with a leading time axis for several steps.
    """

    day: Float[Array, "*time 3 longitude 2"]
    year: Float[Array, "*time 3 2"]


class FrameConditioning(NamedTuple):
    """Quantities of one step that do not depend on the noise.

    Attributes:
        frame: last frame in physical units, shape (latitude, longitude, channel).
        inputs: normalized values of both frames for the variables that are inputs of the network, shape
            (2, latitude, longitude, inputs).
        forcings: normalized forcings of the step.
    """

    frame: Float[Array, "latitude longitude channel"]
    inputs: Float[Array, "2 latitude longitude inputs"]
    forcings: Forcings


class WeatherNextPrior(EmulatorPrior):
    """Abstract prior from a weather model of the package: p(next frame | last two frames, forcings).

    Attributes:
        network: traced network of the package.
        statics: normalized fields that do not change, geopotential at the surface and land-sea mask.
        mean: mean of each channel, for the inputs of the network.
        stddev: standard deviation of each channel, for the inputs of the network.
        offset: location a without the last frame, in physical units: 0 for residuals, the mean of a variable that is no
            input, and the fill value where a variable is undefined.
        keep: factor of the last frame in the location a, 1 for residuals and 0 elsewhere.
        forcing_mean: mean of each forcing, in the order of `FORCINGS`.
        forcing_stddev: standard deviation of each forcing.
        input_channels: channels of the variables that are inputs of the network.
        layout: layout of a frame.
        rematerialize: whether the backward pass computes activations again to save memory.
        description: description of the checkpoint.
        conditioning_passes: 0, because `condition` runs no network.
        TIME_STEP: length of a step.
        MODEL: name of the model.
        TRANSITION: name of its transition in a program.
    """

    network: TracedNetwork
    statics: Float[Array, "latitude longitude 2"]
    mean: Float[Array, " channel"]
    stddev: Float[Array, " channel"]
    offset: Float[Array, "latitude longitude channel"]
    keep: Float[Array, "latitude longitude channel"]
    forcing_mean: Float[Array, " 4"]
    forcing_stddev: Float[Array, " 4"]
    input_channels: tuple[int, ...] = eqx.field(static=True)
    layout: Layout = eqx.field(static=True)
    rematerialize: bool = eqx.field(static=True)
    description: str = eqx.field(static=True)
    conditioning_passes: int = eqx.field(static=True)

    TIME_STEP: ClassVar[np.timedelta64]
    MODEL: ClassVar[str]
    TRANSITION: ClassVar[str]

    @classmethod
    def hours(cls) -> int:
        """Return the length of a step in hours."""
        return int(cls.TIME_STEP / np.timedelta64(1, "h"))

    def condition(self, state: PyTree, inputs: Forcings | None = None) -> FrameConditioning:
        """Normalize the frames and the forcings of one step.

        Args:
            state: pair (frame one step before the last, last frame) in physical units, each of shape
                (latitude, longitude, channel).
            inputs: forcings of one step, a slice of the result of `forcings`.

        Raises:
            ValueError: `state` is not a pair of frames, or `inputs` is None.
        """
        frames = jax.tree.leaves(state)
        if len(frames) != 2:
            raise ValueError(
                f"{self.MODEL} is conditioned on two frames, got {len(frames)}; give {self.TRANSITION} the pair "
                f"(frame {self.hours()} h before the last, last frame) and let the scan carry (frames[1], x)."
            )
        if inputs is None:
            raise ValueError(
                f"{self.MODEL} needs the forcings of its step, got None; scan over prior.forcings(times) along with "
                f"the observations, and pass each slice on, as in {self.TRANSITION}(prior, frames, forcings)."
            )
        channels = np.asarray(self.input_channels)
        normalized = (jnp.stack(frames) - self.mean[None, None, None]) / self.stddev[None, None, None]
        of_day, of_year = slice(0, 2), slice(2, 4)
        forcings = Forcings(
            (inputs.day - self.forcing_mean[None, None, of_day]) / self.forcing_stddev[None, None, of_day],
            (inputs.year - self.forcing_mean[None, of_year]) / self.forcing_stddev[None, of_year],
        )
        return FrameConditioning(frames[1], normalized[..., channels], forcings)

    def location(self, conditioning: FrameConditioning) -> Float[Array, ...]:
        """Location a in physical units, shape (latitude, longitude, channel).

        This is the last frame, the mean of a variable that is no input, and the fill value where a variable is
        undefined.
        """
        return self.offset + self.keep * conditioning.frame

    def run_network(self, conditioning: FrameConditioning, *args: Float[Array, ...]) -> Float[Array, ...]:
        """Output of the network in float32, shape (latitude, longitude, channel).

        Args:
            conditioning: result of `condition` for the last two frames.
            *args: further arguments of the network.
        """
        given = (conditioning.inputs, self.statics, conditioning.forcings.day, conditioning.forcings.year, *args)
        given = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), given)

        def network(*args: Array) -> Array:  # jax.checkpoint hashes its argument, and a module is not hashable
            return self.network(*args)

        if self.rematerialize:
            # Keep products of activations with weights, and compute everything else again in the backward pass.
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            network = jax.checkpoint(network, policy=policy)
        return network(*given)

    def provenance(self) -> dict[str, str]:
        """Class of the prior, checksum of its arrays and description of the checkpoint, for the record of a result."""
        return {**super().provenance(), "checkpoint": self.description}

    # --- forcings and frames for a program ----------------------------------------------------------------------

    def forcings(self, times: Any) -> Forcings:
        """Compute the forcings of the steps that lead to given times.

        Args:
            times: target times, one step apart, shape (steps,). Dates with a time zone are converted to UTC.

        Returns:
            Time of day and of year at two steps and one step before each target time and at the target time, with a
            leading axis of steps.

        Raises:
            ValueError: `times` are not dates along one axis, or are not one step apart. The message says which spacing
                was found.
        """
        if np.ndim(times) != 1:
            raise ValueError(f"times has shape {np.shape(times)}; give one target time per step, shape (steps,).")
        target = utc_times(times).astype("datetime64[s]")
        check_spacing(target, self.TIME_STEP, f"{type(self).__name__}.forcings")
        longitude = self.layout.coords()["longitude"]
        step = self.TIME_STEP.astype("timedelta64[s]").astype(int)
        seconds = target[:, None].astype(np.int64) + np.array([-2, -1, 0]) * step
        # Precision and order of operations are those of the package: phases in float64, rounded, then sines.
        of_day = np.mod(seconds % 86400 / 86400.0, 1.0)[..., None] + np.deg2rad(longitude) / (2 * np.pi)
        day = np.mod(of_day, 1.0).astype(np.float32) * np.float32(2 * np.pi)
        year = np.mod(seconds / 86400.0 / DAYS_PER_YEAR, 1.0).astype(np.float32) * np.float32(2 * np.pi)
        phases = (np.stack([np.cos(phase), np.sin(phase)], -1) for phase in (day, year))
        return Forcings(*map(jnp.asarray, phases))

    def read_frames(
        self, dataset: xarray.Dataset, times: Any, interpolate: bool, **options: Any
    ) -> Float[np.ndarray, "time latitude longitude channel"]:
        """Read frames with `fields.read_states`, and check their times and their means.

        Variables of the layout that are no inputs of the network and that ERA5 does not have are set to their means.

        Args:
            dataset: dataset with the variables of the layout.
            times: times of the frames, one step apart. Dates with a time zone are converted to UTC.
            interpolate: whether to interpolate to the grid of the prior.
            **options: further arguments of `fields.read_states`.
        """
        wanted = utc_times(times)
        check_spacing(wanted, self.TIME_STEP, f"{type(self).__name__}.frames")
        inputs = set(self.input_channels)
        channels = [self.layout.channels(v.name) for v in self.layout.variables]
        read = [c.start in inputs or v.name in UNITS for v, c in zip(self.layout.variables, channels, strict=True)]
        variables = tuple(v for v, r in zip(self.layout.variables, read, strict=True) if r)
        is_read = np.repeat(read, [v.num_channels for v in self.layout.variables])
        rows, columns = self.layout.shape[:2]
        part = dataclasses.replace(self.layout, shape=(rows, columns, int(is_read.sum())), variables=variables)
        values = read_states(dataset, part, wanted, fill=self.fill_values(), interpolate=interpolate, **options)
        mean, stddev = np.asarray(self.mean), np.asarray(self.stddev)
        check_against_statistics(values, part, mean[is_read], stddev[is_read], self.MODEL)
        frames = np.broadcast_to(mean, (len(wanted), *self.layout.shape)).copy()
        frames[..., is_read] = values
        return frames

    def climate_statistics(self) -> tuple[Float[np.ndarray, " channel"], Float[np.ndarray, " channel"]]:
        """Mean and standard deviation of each channel in training, in the units of the layout."""
        return np.asarray(self.mean, float), np.asarray(self.stddev, float)

    def fill_values(self) -> dict[str, float]:
        """Fill value of each variable that is undefined somewhere, in its unit, by the name of the variable."""
        values = {}
        for variable in self.layout.variables:
            if variable.undefined is not None:
                row, column = np.argwhere(variable.undefined.mask())[0]
                values[variable.name] = float(self.offset[row, column, self.layout.channels(variable.name).start])
        return values

    def network_bytes(self, run: Callable[[Array, FrameConditioning], Array], shape: tuple[int, ...]) -> int:
        """Estimate the bytes that the backward pass of one network pass keeps in memory.

        Args:
            run: function (array, conditioning) -> frame that runs the network once.
            shape: shape of the array.
        """
        frame = jnp.zeros(self.layout.shape, jnp.float32)
        forcings = jax.tree.map(lambda v: v[0], self.forcings(["2000-01-01"]))
        conditioning = self.condition((frame, frame), forcings)
        return backward_bytes(lambda x: run(x, conditioning), jax.ShapeDtypeStruct(shape, jnp.float32))


class FrameArrays(NamedTuple):
    """Layout and normalization constants of a prior, made by `frame_arrays`.

    Attributes:
        fields: the fields of `WeatherNextPrior` from `statics` to `layout`, by name.
        scale: scale S in physical units, shape (latitude, longitude, channel), 0 where a variable is undefined.
    """

    fields: dict[str, Any]
    scale: Float[Array, "latitude longitude channel"]


def frame_arrays(
    wn: SimpleNamespace,
    task: Any,
    statistics: Mapping[str, xarray.Dataset],
    sources: Mapping[str, str],
    surface: Any,
    resolution: float | None,
) -> FrameArrays:
    """Make the layout and the normalization constants of a model.

    Args:
        wn: modules of the package.
        task: task configuration of the model.
        statistics: datasets by kind: "mean", "stddev", "diffs_stddev" and "min".
        sources: where each kind of statistic was read, for messages.
        surface: dataset, or path of a dataset, with the fields that do not change.
        resolution: resolution of the grid in degrees; None for the grid of `surface`.

    Raises:
        ValueError: the grid, the statistics or the surface are not those of the model.
    """
    dataset = _open(surface)
    latitude, longitude = grid(dataset) if resolution is None else _regular_grid(resolution)
    undefined = undefined_mask(dataset, SEA_SURFACE_TEMPERATURE, latitude, longitude)
    layout = frame_layout(wn, task, latitude, longitude, undefined)
    channels = channel_statistics(layout, statistics, task.input_variables, sources)
    of_mean, of_stddev = statistics["mean"], statistics["stddev"]
    statics = np.stack(
        [
            (static_field(dataset, name, latitude, longitude) - float(of_mean[name])) / float(of_stddev[name])
            for name in STATIC
        ],
        -1,
    )
    defined = np.ones(layout.shape, np.float32)
    fill = np.zeros(layout.shape, np.float32)
    for variable in layout.variables:
        if variable.undefined is not None:
            mask = variable.undefined.mask()
            defined[mask, layout.channels(variable.name)] = 0.0
            fill[mask, layout.channels(variable.name)] = float(statistics["min"][variable.name])
    is_input = channels.is_input.astype(np.float32)
    made = {
        "statics": jnp.asarray(statics, jnp.float32),
        "mean": jnp.asarray(channels.mean),
        "stddev": jnp.asarray(channels.stddev),
        "offset": jnp.asarray(fill + defined * (1.0 - is_input) * channels.mean),
        "keep": jnp.asarray(defined * is_input),
        "forcing_mean": jnp.asarray([float(of_mean[n]) for n in FORCINGS], jnp.float32),
        "forcing_stddev": jnp.asarray([float(of_stddev[n]) for n in FORCINGS], jnp.float32),
        "input_channels": tuple(int(i) for i in np.flatnonzero(channels.is_input)),
        "layout": layout,
    }
    return FrameArrays(made, jnp.asarray(defined * channels.scale))


def within_memory(prior: Any, memory_budget: float | None) -> Any:
    """Prior that computes activations again if one backward pass would need more memory than a budget.

    Args:
        prior: prior with the method `backward_bytes`.
        memory_budget: number of bytes; None for half of the device's memory.
    """
    budget = 0.5 * device_memory() if memory_budget is None else memory_budget
    return prior if prior.backward_bytes() <= budget else dataclasses.replace(prior, rematerialize=True)


def choose(name: str, got: Any, known: tuple[Any, ...]) -> None:
    """Check that an option has one of its known values.

    Raises:
        ValueError: the value is unknown.
    """
    if got not in known:
        raise ValueError(f"from_checkpoint got {name}={got!r}; give one of {', '.join(map(repr, known))}.")


def _open(surface: Any) -> xarray.Dataset:
    """Dataset from a dataset or from the path of a file."""
    import xarray

    return surface if isinstance(surface, xarray.Dataset) else xarray.open_dataset(surface, engine="h5netcdf")


def _regular_grid(resolution: float) -> tuple[np.ndarray, np.ndarray]:
    """Regular grid in degrees: (latitudes with both poles, longitudes from 0).

    Raises:
        ValueError: the resolution does not divide 180 degrees.
    """
    if isinstance(resolution, bool) or not isinstance(resolution, numbers.Real) or not 0.0 < resolution <= 90.0:
        raise ValueError(
            f"{spelled('prior.resolution', resolution)}; give the resolution of the checkpoint in degrees, 1.0 or 0.25."
        )
    rows = round(180.0 / resolution)
    if rows < 2 or abs(rows * resolution - 180.0) > 1e-6:
        raise ValueError(
            f"{spelled('prior.resolution', resolution)} does not divide 180 degrees; give the resolution of the "
            "checkpoint, 1.0 or 0.25."
        )
    return np.linspace(-90.0, 90.0, rows + 1), np.arange(2 * rows) * 180.0 / rows


def frame_layout(
    wn: SimpleNamespace, task: Any, latitude: np.ndarray, longitude: np.ndarray, undefined: np.ndarray
) -> Layout:
    """Layout of a frame: the target variables of a task sorted by name, each sorted by level.

    Args:
        wn: modules of the package.
        task: task configuration of the checkpoint.
        latitude: latitudes in degrees.
        longitude: longitudes in degrees.
        undefined: mask of the points without sea surface temperature, shape (latitude, longitude).
    """
    variables = tuple(
        Variable(
            name,
            UNITS.get(name, "1"),
            tuple(int(level) for level in task.pressure_levels) if is_atmospheric(wn, name) else (),
            Undefined(undefined) if name == SEA_SURFACE_TEMPERATURE and undefined.any() else None,
        )
        for name in sorted(task.target_variables)
    )
    return Layout(
        (len(latitude), len(longitude), sum(v.num_channels for v in variables)),
        ("latitude", "longitude", "channel"),
        (("latitude", tuple(map(float, latitude))), ("longitude", tuple(map(float, longitude)))),
        variables=variables,
    )
