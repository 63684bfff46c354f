"""GenCast (Price et al. 2023, arXiv 2312.15796), from its own package and checkpoints, as a prior.

One 12 h step of the atmosphere: the next frame given the last two, the time of year and of day, and the surface. A
frame is an array (latitude, longitude, channel), channels being variables sorted by name, each by level, as the package
stacks them. A variable that is also an input of the network is diffused as a normalized residual, precipitation, which
is not, as itself:

    x' = a(c) + S z,    a = last frame, S = standard deviation of 12 h differences;    a = mean, S = standard deviation.

Sea surface temperature has no value over land. Frames hold the variable's minimum there (so does the package, before it
normalises), with S = 0: what is there never moves, guides, or weighs, and `Layout.select` gives NaN.

The network is google-deepmind's own, see `gencast_package`; the normalization is in `gencast_statistics`.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from numpyro_diffusion_da.diffusion.memory import backward_bytes, device_memory
from numpyro_diffusion_da.diffusion.noise import Noise
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.diffusion.spherical_noise import SphericalNoise
from numpyro_diffusion_da.fields.datasets import grid, read_states, static_field, undefined_mask
from numpyro_diffusion_da.fields.layout import Layout, Undefined, Variable
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
    """Time of day and of year at the two input frames and at the target; of one step, or leading with time.

    Attributes:
        day: cosine and sine of the local time of day, shape (3, longitude, 2).
        year: cosine and sine of the time of year, shape (3, 2).
    """

    day: Float[Array, "*time 3 longitude 2"]
    year: Float[Array, "*time 3 2"]


class GenCastConditioning(NamedTuple):
    """What one step of GenCast is conditioned on.

    Attributes:
        frame: the last frame, in physical units, shape (latitude, longitude, channel).
        inputs: both frames, normalized, of the variables that are inputs, shape (2, latitude, longitude, inputs).
        forcings: normalized.
    """

    frame: Float[Array, "latitude longitude channel"]
    inputs: Float[Array, "2 latitude longitude inputs"]
    forcings: Forcings


class GenCastPrior(DiffusionPrior):
    """GenCast: p(next frame | last two frames, forcings). Build it by `from_checkpoint`.

    In a program the carry of the scan is the pair of frames, and the forcings come with the observations:

        def step(frames, at):
            y_t, forcings = at
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, frames, forcings))
            ...
            return (frames[1], x), None

        scan(step, frames, (y, prior.forcings(times)))
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

    # --- the prior ----------------------------------------------------------------------------------------------

    def condition(self, state: PyTree, inputs: Forcings | None = None) -> GenCastConditioning:
        """Normalise the frames.

        Args:
            state: (frame 12 h before, last frame), each (latitude, longitude, channel) in physical units.
            inputs: one step of `forcings`.

        Raises:
            ValueError: not two frames, or no forcings.
        """
        frames = jax.tree.leaves(state)
        if len(frames) != 2:
            raise ValueError(
                f"GenCast is conditioned on two frames, got {len(frames)}: give DiffusionTransition the pair "
                "(frame 12 h before, last frame) and let the scan carry (frames[1], x)."
            )
        if inputs is None:
            raise ValueError(
                "GenCast needs the time of its step: scan over prior.forcings(times) beside the observations, and "
                "pass each slice on, as in DiffusionTransition(prior, frames, forcings)."
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
        """D(z_s, s; c), by the package's network and its preconditioning; shape (latitude, longitude, channel)."""
        given = (conditioning.inputs, self.statics, conditioning.forcings.day, conditioning.forcings.year)
        given = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), given)

        def network(*args: Array) -> Array:  # a function: jax.checkpoint hashes what it is given
            return self.network(*args)

        if self.rematerialize:
            # Products of activations with weights are kept, all else is computed again in the backward pass.
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            network = jax.checkpoint(network, policy=policy)
        return network(*given, z_s.astype(jnp.float32), jnp.asarray(noise_level, jnp.float32)).astype(z_s.dtype)

    def location(self, conditioning: GenCastConditioning) -> Float[Array, ...]:
        """The last frame; the mean for precipitation; the filling value where a variable is undefined."""
        return self.offset + self.keep * conditioning.frame

    def scale(self, conditioning: GenCastConditioning) -> Float[Array, ...]:
        """Standard deviations of 12 h differences; of precipitation itself; 0 where a variable is undefined."""
        return self.latent_scale

    def provenance(self) -> dict[str, str]:
        """The checkpoint's own description beside the class and the checksum of all arrays."""
        return {**super().provenance(), "checkpoint": self.description}

    # --- what a program needs -----------------------------------------------------------------------------------

    def forcings(self, times: Any) -> Forcings:
        """Forcings of the steps that lead to the given times.

        Args:
            times: target times (UTC), anything numpy takes as datetime64, shape (steps,).

        Returns:
            Day and year progress at 24 h and 12 h before each time and at the time, leading with `steps`.

        Raises:
            ValueError: not a one-dimensional series of times.
        """
        target = np.asarray(times, dtype="datetime64[s]")
        if target.ndim != 1:
            raise ValueError(f"times have shape {target.shape}; give one target time a step, shape (steps,).")
        longitude = self.layout.coords()["longitude"]
        seconds = target[:, None].astype(np.int64) + np.array([-2, -1, 0]) * TIME_STEP.astype("timedelta64[s]").astype(
            int
        )
        # In the precision and order of the package's own preprocessing: phases in float64, rounded, then sines.
        of_day = np.mod(seconds % 86400 / 86400.0, 1.0)[..., None] + np.deg2rad(longitude) / (2 * np.pi)
        day = np.mod(of_day, 1.0).astype(np.float32) * np.float32(2 * np.pi)
        year = np.mod(seconds / 86400.0 / DAYS_PER_YEAR, 1.0).astype(np.float32) * np.float32(2 * np.pi)
        phases = (np.stack([np.cos(phase), np.sin(phase)], -1) for phase in (day, year))
        return Forcings(*map(jnp.asarray, phases))

    def frames(
        self, dataset: xarray.Dataset, times: Any, *, interpolate: bool = False
    ) -> Float[np.ndarray, "time latitude longitude channel"]:
        """Frames of an ERA5-like dataset at given times; see `gridded_data.read_states`.

        The two frames that a run begins with are ``prior.frames(dataset, [start - 12 h, start])``. Precipitation, which
        GenCast does not look at, may be missing in the dataset and is then 0.

        Raises:
            ValueError: something is not in the dataset, in another unit, or on another grid; names it.
        """
        fill = self.fill_values()
        return read_states(dataset, self.layout, times, fill=fill, interpolate=interpolate, without_precipitation=True)

    def fill_values(self) -> dict[str, float]:
        """What frames hold where a variable is undefined, in its own unit, by name."""
        values = {}
        for variable in self.layout.variables:
            if variable.undefined is not None:
                row, column = np.argwhere(variable.undefined.mask())[0]
                values[variable.name] = float(self.offset[row, column, self.layout.channels(variable.name).start])
        return values

    def backward_bytes(self) -> int:
        """Bytes that the backward pass of one network pass holds on to, for one particle."""
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
        """Open a checkpoint of GenCast, of `weathernext` v0.3.0 or of `graphcast` v0.2.

        Args:
            checkpoint: path of the published ``.npz`` file.
            stats: directory of the published statistics (mean, standard deviation, standard deviation of differences
                and minimum by level).
            surface: dataset (or path of one) with the fields that do not change: geopotential_at_surface,
                land_sea_mask, and sea_surface_temperature, NaN over land. Any ERA5 file that holds them does.
            attention: "mha" (dense), "triblockdiag_mha" (both run anywhere, and agree) or "splash_mha" (TPU only).
                None takes splash on a TPU, and elsewhere dense for meshes up to size 4 and blocks above, where dense
                attention no longer pays.
            precision: of matrix products: "float32", "tensorfloat32" (tensor cores of NVIDIA GPUs) or "bfloat16" (the
                whole network, parameters too; preconditioning stays in float32).
            resolution: of the checkpoint's grid in degrees, 1.0 or 0.25; None is that of `surface`.
            noise: of the diffusion; None is the noise GenCast was trained with, isotropic on the sphere.
            memory_budget: bytes that the backward pass of one network pass may hold. Above it activations are computed
                again (about a tenth more work at a fifth of the memory). None is half of the device's memory.

        Raises:
            ImportError: the package is missing; says how to install it.
            FileNotFoundError: no such file, or no statistics in the directory.
            ValueError: an unknown attention or precision, or a grid that GenCast cannot have.
        """
        _choose("attention", attention, (None, "mha", "triblockdiag_mha", "splash_mha"))
        _choose("precision", precision, ("float32", "tensorfloat32", "bfloat16"))
        wn = import_weathernext()
        with open(checkpoint, "rb") as file:
            opened = wn.checkpoint.load(file, wn.gencast.CheckPoint)
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
            noise=SphericalNoise(len(latitude), len(longitude)) if noise is None else noise,
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
    if got not in known:
        raise ValueError(f"{name}={got!r} is not known; give one of {', '.join(map(repr, known))}.")


def _open(surface: Any) -> xarray.Dataset:
    """A dataset, from itself or from a file."""
    import xarray

    return surface if isinstance(surface, xarray.Dataset) else xarray.open_dataset(surface, engine="h5netcdf")


def _regular_grid(resolution: float) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes with both poles and longitudes from 0, in degrees."""
    rows = round(180.0 / resolution)
    if rows < 2 or abs(rows * resolution - 180.0) > 1e-6:
        raise ValueError(f"resolution={resolution} does not divide 180 degrees; give 1.0 or 0.25, as the checkpoint.")
    return np.linspace(-90.0, 90.0, rows + 1), np.arange(2 * rows) * 180.0 / rows


def gencast_layout(task: Any, latitude: np.ndarray, longitude: np.ndarray, undefined: np.ndarray) -> Layout:
    """The layout of a frame: the task's target variables by name, each by level."""
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
