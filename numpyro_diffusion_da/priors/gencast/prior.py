"""GenCast (Price et al. 2023, arXiv 2312.15796) as a prior, with its own package and checkpoints.

One step is 12 h of the atmosphere. The next frame is conditioned on the last two frames, the time of year and of day,
and the surface. A frame is an array (latitude, longitude, channel). Its channels are the variables sorted by name, each
sorted by level, in the order of the package. The latent z depends on the variable:

- A variable that is also an input of the network is diffused as a normalized residual, x' = a + S z, where a is the
  last frame and S the standard deviation of 12 h differences.
- Precipitation is not an input of the network and is diffused itself, x' = a + S z, where a is its mean and S its
  standard deviation.

Sea surface temperature has no value over land. There, frames contain the minimum of the variable, which the package
also fills in before normalization, and S = 0. Such values never change and have no effect on guidance and weights.
`Layout.select` returns NaN for them.

The network is google-deepmind's own, see `priors.gencast.package`. The normalization is in `priors.gencast.statistics`.
"""

from __future__ import annotations

import dataclasses
import numbers
import os
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from numpyro_diffusion_da.checksums import DAMAGE
from numpyro_diffusion_da.diffusion.memory import backward_bytes, device_memory
from numpyro_diffusion_da.diffusion.noise import Noise
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.diffusion.spherical_noise import SphericalNoise
from numpyro_diffusion_da.fields.datasets import grid, read_states, static_field, undefined_mask
from numpyro_diffusion_da.fields.layout import Layout, Undefined, Variable
from numpyro_diffusion_da.fields.plausibility import check_against_statistics
from numpyro_diffusion_da.fields.times import check_spacing, utc_times
from numpyro_diffusion_da.priors.gencast.package import (
    FORCINGS,
    STATIC,
    TracedNetwork,
    import_weathernext,
    is_atmospheric,
    noise_range,
    trace_network,
    with_attention,
)
from numpyro_diffusion_da.priors.gencast.statistics import channel_statistics, read_gencast_statistics

if TYPE_CHECKING:
    import xarray

SEA_SURFACE_TEMPERATURE = "sea_surface_temperature"
TIME_STEP = np.timedelta64(12, "h")
DAYS_PER_YEAR = 365.24219
UNITS = {
    "10m_u_component_of_wind": "m s-1",
    "10m_v_component_of_wind": "m s-1",
    "2m_temperature": "K",
    "geopotential": "m2 s-2",
    "mean_sea_level_pressure": "Pa",
    "sea_surface_temperature": "K",
    "specific_humidity": "kg kg-1",
    "temperature": "K",
    "total_precipitation_12hr": "m",
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


class GenCastConditioning(NamedTuple):
    """Quantities of one step of GenCast that do not depend on the noise level.

    Attributes:
        frame: last frame in physical units, shape (latitude, longitude, channel).
        inputs: normalized values of both frames for the variables that are inputs of the network, shape
            (2, latitude, longitude, inputs).
        forcings: normalized forcings of the step.
    """

    frame: Float[Array, "latitude longitude channel"]
    inputs: Float[Array, "2 latitude longitude inputs"]
    forcings: Forcings


class GenCastPrior(DiffusionPrior):
    """GenCast as the prior p(next frame | last two frames, forcings). Build it with `from_checkpoint`.

    In a program, the scan carries the pair of frames and takes the forcings along with the observations:

        def step(frames, at):
            y_t, forcings = at
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, frames, forcings))
            ...
            return (frames[1], x), None

        scan(step, frames, (y, prior.forcings(times)))

    Attributes:
        network: traced denoiser of the package.
        noise: noise of the diffusion.
        statics: normalized fields that do not change, geopotential at the surface and land-sea mask.
        mean: mean of each channel, for the inputs of the network.
        stddev: standard deviation of each channel, for the inputs of the network.
        offset: location a without the last frame, in physical units: 0 for residuals, the mean of precipitation, and
            the fill value where a variable is undefined.
        keep: factor of the last frame in the location a, 1 for residuals and 0 elsewhere.
        latent_scale: scale S in physical units, 0 where a variable is undefined.
        forcing_mean: mean of each forcing, in the order of `FORCINGS`.
        forcing_stddev: standard deviation of each forcing.
        input_channels: channels of the variables that are inputs of the network.
        layout: layout of a frame.
        noise_range: (lowest, highest) noise level.
        rematerialize: whether the backward pass computes activations again to save memory.
        description: description of the checkpoint.
        conditioning_passes: 0, because `condition` runs no network.
        TIME_STEP: length of a step, 12 h.
    """

    network: TracedNetwork
    noise: Noise
    statics: Float[Array, "latitude longitude 2"]
    mean: Float[Array, " channel"]
    stddev: Float[Array, " channel"]
    offset: Float[Array, "latitude longitude channel"]
    keep: Float[Array, "latitude longitude channel"]
    latent_scale: Float[Array, "latitude longitude channel"]
    forcing_mean: Float[Array, " 4"]
    forcing_stddev: Float[Array, " 4"]
    input_channels: tuple[int, ...] = eqx.field(static=True)
    layout: Layout = eqx.field(static=True)
    noise_range: tuple[float, float] = eqx.field(static=True)
    rematerialize: bool = eqx.field(static=True)
    description: str = eqx.field(static=True)
    conditioning_passes: int = eqx.field(static=True)

    TIME_STEP: ClassVar[np.timedelta64] = TIME_STEP

    # --- methods of a prior -------------------------------------------------------------------------------------

    def condition(self, state: PyTree, inputs: Forcings | None = None) -> GenCastConditioning:
        """Normalize the frames and the forcings of one step.

        Args:
            state: pair (frame 12 h before the last, last frame) in physical units, each of shape
                (latitude, longitude, channel).
            inputs: forcings of one step, a slice of the result of `forcings`.

        Raises:
            ValueError: `state` is not a pair of frames, or `inputs` is None.
        """
        frames = jax.tree.leaves(state)
        if len(frames) != 2:
            raise ValueError(
                f"GenCast is conditioned on two frames, got {len(frames)}; give DiffusionTransition the pair "
                "(frame 12 h before the last, last frame) and let the scan carry (frames[1], x)."
            )
        if inputs is None:
            raise ValueError(
                "GenCast needs the forcings of its step, got None; scan over prior.forcings(times) along with the "
                "observations, and pass each slice on, as in DiffusionTransition(prior, frames, forcings)."
            )
        channels = np.asarray(self.input_channels)
        normalized = (jnp.stack(frames) - self.mean[None, None, None]) / self.stddev[None, None, None]
        of_day, of_year = slice(0, 2), slice(2, 4)
        forcings = Forcings(
            (inputs.day - self.forcing_mean[None, None, of_day]) / self.forcing_stddev[None, None, of_day],
            (inputs.year - self.forcing_mean[None, of_year]) / self.forcing_stddev[None, of_year],
        )
        return GenCastConditioning(frames[1], normalized[..., channels], forcings)

    def denoise(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], conditioning: GenCastConditioning
    ) -> Float[Array, ...]:
        """Denoiser D(z_s, s; c) = E[z | z_s, c], by one pass of the package's network with its preconditioning.

        Args:
            z_s: noised latent, shape (latitude, longitude, channel).
            noise_level: noise level s > 0.
            conditioning: result of `condition` for the last two frames.

        Returns:
            Denoised latent, shape (latitude, longitude, channel).
        """
        given = (conditioning.inputs, self.statics, conditioning.forcings.day, conditioning.forcings.year)
        given = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), given)

        def network(*args: Array) -> Array:  # jax.checkpoint hashes its argument, and a module is not hashable
            return self.network(*args)

        if self.rematerialize:
            # Keep products of activations with weights, and compute everything else again in the backward pass.
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            network = jax.checkpoint(network, policy=policy)
        return network(*given, z_s.astype(jnp.float32), jnp.asarray(noise_level, jnp.float32)).astype(z_s.dtype)

    def location(self, conditioning: GenCastConditioning) -> Float[Array, ...]:
        """Location a in physical units, shape (latitude, longitude, channel).

        This is the last frame, the mean for precipitation, and the fill value where a variable is undefined.
        """
        return self.offset + self.keep * conditioning.frame

    def scale(self, conditioning: GenCastConditioning) -> Float[Array, ...]:
        """Scale S in physical units, shape (latitude, longitude, channel).

        This is the standard deviation of 12 h differences, of precipitation itself for precipitation, and 0 where a
        variable is undefined.
        """
        return self.latent_scale

    def provenance(self) -> dict[str, str]:
        """Class of the prior, checksum of its arrays and description of the checkpoint, for the record of a result."""
        return {**super().provenance(), "checkpoint": self.description}

    # --- forcings and frames for a program ----------------------------------------------------------------------

    def forcings(self, times: Any) -> Forcings:
        """Compute the forcings of the steps that lead to given times.

        Args:
            times: target times, 12 h apart, shape (steps,). Dates with a time zone are converted to UTC.

        Returns:
            Time of day and of year at 24 h and 12 h before each target time and at the target time, with a leading axis
            of steps.

        Raises:
            ValueError: `times` are not dates along one axis, or are not 12 h apart. The message says which spacing was
                found.
        """
        if np.ndim(times) != 1:
            raise ValueError(f"times has shape {np.shape(times)}; give one target time per step, shape (steps,).")
        target = utc_times(times).astype("datetime64[s]")
        check_spacing(target, TIME_STEP, "GenCastPrior.forcings")
        longitude = self.layout.coords()["longitude"]
        seconds = target[:, None].astype(np.int64) + np.array([-2, -1, 0]) * TIME_STEP.astype("timedelta64[s]").astype(
            int
        )
        # Precision and order of operations are those of the package: phases in float64, rounded, then sines.
        of_day = np.mod(seconds % 86400 / 86400.0, 1.0)[..., None] + np.deg2rad(longitude) / (2 * np.pi)
        day = np.mod(of_day, 1.0).astype(np.float32) * np.float32(2 * np.pi)
        year = np.mod(seconds / 86400.0 / DAYS_PER_YEAR, 1.0).astype(np.float32) * np.float32(2 * np.pi)
        phases = (np.stack([np.cos(phase), np.sin(phase)], -1) for phase in (day, year))
        return Forcings(*map(jnp.asarray, phases))

    def frames(
        self, dataset: xarray.Dataset, times: Any, *, interpolate: bool = False
    ) -> Float[np.ndarray, "time latitude longitude channel"]:
        """Read frames from an ERA5-like dataset at given times, with `fields.read_states`.

        A run begins with the two frames ``prior.frames(dataset, [start - 12 h, start])``. Precipitation is not an input
        of GenCast. It may be missing in the dataset and is then 0.

        Args:
            dataset: dataset with the variables of the layout.
            times: times of the frames, 12 h apart. Dates with a time zone are converted to UTC.
            interpolate: whether to interpolate to the grid of the prior.

        Returns:
            Frames in physical units.

        Raises:
            ValueError: times are not 12 h apart; a variable, level or time is missing in the dataset; a unit or the
                grid differs; or the mean of a channel is far from its mean in the training data. The message names it.
        """
        wanted = utc_times(times)
        check_spacing(wanted, TIME_STEP, "GenCastPrior.frames")
        frames = read_states(
            dataset,
            self.layout,
            wanted,
            fill=self.fill_values(),
            interpolate=interpolate,
            without_precipitation=True,
        )
        check_against_statistics(frames, self.layout, np.asarray(self.mean), np.asarray(self.stddev), "GenCast")
        return frames

    def fill_values(self) -> dict[str, float]:
        """Fill value of each variable that is undefined somewhere, in its unit, by the name of the variable."""
        values = {}
        for variable in self.layout.variables:
            if variable.undefined is not None:
                row, column = np.argwhere(variable.undefined.mask())[0]
                values[variable.name] = float(self.offset[row, column, self.layout.channels(variable.name).start])
        return values

    def backward_bytes(self) -> int:
        """Estimate the bytes that the backward pass of one network pass keeps in memory, for one particle."""
        frame = jnp.zeros(self.layout.shape, jnp.float32)
        forcings = jax.tree.map(lambda v: v[0], self.forcings(["2000-01-01"]))
        conditioning = self.condition((frame, frame), forcings)
        at = jax.ShapeDtypeStruct(self.layout.shape, jnp.float32)
        return backward_bytes(lambda z: self.denoise(z, jnp.ones(()), conditioning), at)

    # --- opening a checkpoint -----------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        stats: str | os.PathLike[str],
        surface: xarray.Dataset | str | os.PathLike[str],
        attention: str | None = None,
        precision: str = "float32",
        resolution: float | None = None,
        noise: Noise | None = None,
        memory_budget: float | None = None,
    ) -> GenCastPrior:
        """Open a checkpoint of GenCast from `weathernext` v0.3.0 or `graphcast` v0.2.

        Args:
            checkpoint: path of the published ``.npz`` file.
            stats: directory of the published statistics: mean, standard deviation, standard deviation of differences,
                and minimum by level.
            surface: dataset, or path of a dataset, with the fields that do not change: geopotential_at_surface,
                land_sea_mask, and sea_surface_temperature, which is NaN over land. Any ERA5 file with these variables
                works.
            attention: "mha" (dense), "triblockdiag_mha" or "splash_mha" (TPU only). The first two run on any device and
                give the same result. None chooses splash attention on a TPU. On other devices it chooses dense
                attention for meshes up to size 4, and block-diagonal attention for larger meshes, where dense attention
                is slower.
            precision: precision of matrix products: "float32", "tensorfloat32" (tensor cores of NVIDIA GPUs) or
                "bfloat16" (the whole network with its parameters; preconditioning stays in float32).
            resolution: resolution of the checkpoint's grid in degrees, 1.0 or 0.25; None for the grid of `surface`.
            noise: noise of the diffusion; None for the noise of GenCast's training, isotropic on the sphere.
            memory_budget: bytes that the backward pass of one network pass may keep. If it needs more, activations are
                computed again, with about 10 % more work and a fifth of the memory. None for half of the device's
                memory.

        Raises:
            ImportError: the package is missing. The message says how to install it.
            FileNotFoundError: the checkpoint or a statistics file does not exist.
            ValueError: the attention or precision is unknown, the grid is not one of GenCast, a file is damaged, or the
                sea surface temperature of `surface` has values over land or none over sea.
        """
        _choose("attention", attention, (None, "mha", "triblockdiag_mha", "splash_mha"))
        _choose("precision", precision, ("float32", "tensorfloat32", "bfloat16"))
        wn = import_weathernext()
        with open(checkpoint, "rb") as file:
            try:
                opened = wn.checkpoint.load(file, wn.gencast.CheckPoint)
            except DAMAGE as error:
                raise ValueError(
                    f"the file '{os.fspath(checkpoint)}' cannot be read as a checkpoint of GenCast "
                    f"({type(error).__name__}: {error}); download it again."
                ) from error
        architecture = with_attention(opened.denoiser_architecture_config, attention)
        task = opened.task_config
        statistics = read_gencast_statistics(stats)
        dataset = _open(surface)
        latitude, longitude = grid(dataset) if resolution is None else _regular_grid(resolution)
        undefined = undefined_mask(dataset, SEA_SURFACE_TEMPERATURE, latitude, longitude)
        layout = gencast_layout(task, latitude, longitude, undefined)
        channels = channel_statistics(layout, statistics, task.input_variables)
        statics = np.stack(
            [
                (static_field(dataset, name, latitude, longitude) - float(statistics["mean"][name]))
                / float(statistics["stddev"][name])
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
        parameters = jax.tree.map(jnp.asarray, opened.params)
        if precision == "bfloat16":
            parameters = jax.tree.map(lambda p: p.astype(jnp.bfloat16), parameters)
        prior = cls(
            network=trace_network(wn, opened, architecture, parameters, layout, precision),
            noise=SphericalNoise.from_coordinates(latitude, longitude) if noise is None else noise,
            statics=jnp.asarray(statics, jnp.float32),
            mean=jnp.asarray(channels.mean),
            stddev=jnp.asarray(channels.stddev),
            offset=jnp.asarray(fill + defined * (1.0 - is_input) * channels.mean),
            keep=jnp.asarray(defined * is_input),
            latent_scale=jnp.asarray(defined * channels.scale),
            forcing_mean=jnp.asarray([float(statistics["mean"][n]) for n in FORCINGS], jnp.float32),
            forcing_stddev=jnp.asarray([float(statistics["stddev"][n]) for n in FORCINGS], jnp.float32),
            input_channels=tuple(int(i) for i in np.flatnonzero(channels.is_input)),
            layout=layout,
            noise_range=noise_range(opened),
            rematerialize=False,
            description=str(opened.description),
            conditioning_passes=0,
        )
        budget = 0.5 * device_memory() if memory_budget is None else memory_budget
        if prior.backward_bytes() <= budget:
            return prior
        return dataclasses.replace(prior, rematerialize=True)


def _choose(name: str, got: Any, known: tuple[Any, ...]) -> None:
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
        raise ValueError(f"resolution={resolution!r}; give the resolution of the checkpoint in degrees, 1.0 or 0.25.")
    rows = round(180.0 / resolution)
    if rows < 2 or abs(rows * resolution - 180.0) > 1e-6:
        raise ValueError(
            f"resolution={resolution} does not divide 180 degrees; give the resolution of the checkpoint, 1.0 or 0.25."
        )
    return np.linspace(-90.0, 90.0, rows + 1), np.arange(2 * rows) * 180.0 / rows


def gencast_layout(task: Any, latitude: np.ndarray, longitude: np.ndarray, undefined: np.ndarray) -> Layout:
    """Layout of a frame: the target variables of a task sorted by name, each sorted by level.

    Args:
        task: task configuration of the checkpoint.
        latitude: latitudes in degrees.
        longitude: longitudes in degrees.
        undefined: mask of the points without sea surface temperature, shape (latitude, longitude).
    """
    variables = tuple(
        Variable(
            name,
            UNITS.get(name, "1"),
            tuple(int(level) for level in task.pressure_levels) if is_atmospheric(name) else (),
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
