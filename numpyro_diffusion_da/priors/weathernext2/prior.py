"""WeatherNext 2 (Alet et al. 2025, arXiv 2506.10772) as a prior, with its own package and checkpoints.

One step is 6 h of the atmosphere. The next frame is conditioned on the last two frames, the time of year and of day,
and the surface. Frames are described in `priors.weathernext.frames`. The network makes the next frame in one pass,
x' = a + S F(e, c), from a vector of noise e with 32 numbers for the whole globe. A variable that is also an input of
the network is made as a residual. Precipitation and the fields of cyclones are no inputs and are made themselves.

The network is google-deepmind's own, see `priors.weathernext2.network`.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float

from numpyro_diffusion_da.diffusion.prior import OnePassPrior
from numpyro_diffusion_da.priors.weathernext.frames import (
    PRECISIONS,
    FrameConditioning,
    WeatherNextPrior,
    choose,
    frame_arrays,
    within_memory,
)
from numpyro_diffusion_da.priors.weathernext.package import import_weathernext, load_checkpoint, network_parameters
from numpyro_diffusion_da.priors.weathernext2.network import (
    noise_sizes,
    open_configuration,
    statistics_of,
    trace_network,
    with_attention,
)

if TYPE_CHECKING:
    import xarray

TIME_STEP = np.timedelta64(6, "h")


class WeatherNext2Prior(WeatherNextPrior, OnePassPrior):
    """WeatherNext 2 as the prior p(next frame | last two frames, forcings). Build it with `from_checkpoint`.

    In a program, the scan carries the pair of frames and takes the forcings along with the observations:

        def step(frames, at):
            y_t, forcings = at
            x = numpyro.sample("x", ndda.OnePassTransition(prior, frames, forcings))
            ...
            return (frames[1], x), None

        scan(step, frames, (y, prior.forcings(times)))

    Attributes:
        output_scale: scale S in physical units, 0 where a variable is undefined.
        noise_shape: shape of the noise e, (32,) in the published models.
        generator_passes: 1.
        TIME_STEP: length of a step, 6 h.
    """

    output_scale: Float[Array, "latitude longitude channel"]
    noise_shape: tuple[int, ...] = eqx.field(static=True)
    generator_passes: int = eqx.field(static=True)

    TIME_STEP: ClassVar[np.timedelta64] = TIME_STEP
    MODEL: ClassVar[str] = "WeatherNext 2"
    TRANSITION: ClassVar[str] = "OnePassTransition"

    def generate(self, noise: Float[Array, ...], conditioning: FrameConditioning) -> Float[Array, ...]:
        """Next frame a + S F(e, c) in physical units, shape (latitude, longitude, channel), by one pass.

        Args:
            noise: e, shape `noise_shape`.
            conditioning: result of `condition` for the last two frames.

        Raises:
            ValueError: the noise has another shape than `noise_shape`.
        """
        self._check_noise(noise)
        return self.location(conditioning) + self.output_scale * self.run_network(conditioning, noise)

    def frames(
        self, dataset: xarray.Dataset, times: Any, *, interpolate: bool = False
    ) -> Float[np.ndarray, "time latitude longitude channel"]:
        """Read frames from an ERA5-like dataset at given times, with `fields.read_states`.

        A run begins with the two frames ``prior.frames(dataset, [start - 6 h, start])``. Precipitation and the fields
        of cyclones are not inputs of WeatherNext 2. Precipitation may be missing in the dataset and is then 0. The
        fields of cyclones are not read and are their means.

        Args:
            dataset: dataset with the variables of the layout.
            times: times of the frames, 6 h apart. Dates with a time zone are converted to UTC.
            interpolate: whether to interpolate to the grid of the prior.

        Returns:
            Frames in physical units.

        Raises:
            ValueError: times are not 6 h apart; a variable, level or time is missing in the dataset; a unit or the grid
                differs; or the mean of a channel is far from its mean in the training data. The message names it.
        """
        return self.read_frames(dataset, times, interpolate, without_precipitation=True)

    def backward_bytes(self) -> int:
        """Estimate the bytes that the backward pass of one network pass keeps in memory, for one particle."""
        return self.network_bytes(self.generate, self.noise_shape)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str],
        surface: xarray.Dataset | str | os.PathLike[str],
        attention: str | None = None,
        precision: str = "float32",
        resolution: float | None = None,
        memory_budget: float | None = None,
    ) -> WeatherNext2Prior:
        """Open one checkpoint of WeatherNext 2 or of WeatherNext Cyclones, from `weathernext` v0.3.0.

        A published model is an ensemble of four checkpoints. Each is a prior of its own.

        Args:
            checkpoint: path of the published ``.npz`` file.
            config: "WeatherNext2", "WeatherNextCyclones" or "WeatherNextCyclones_Mini", the configuration that the
                name of the file begins with, or the path of a configuration of this form. It contains the statistics.
            surface: dataset, or path of a dataset, with the fields that do not change: geopotential_at_surface,
                land_sea_mask, and sea_surface_temperature, which is NaN over land. Any ERA5 file with these variables
                works.
            attention: "mha" (dense) or "triblockdiag_mha" (blocks). Both give the same result. None chooses dense
                attention for meshes up to size 4, and blocks for larger meshes. The package's attention for TPUs has no
                forward derivative, which guided draws need.
            precision: precision of matrix products: "float32", "tensorfloat32" (tensor cores of NVIDIA GPUs) or
                "bfloat16" (the whole network with its parameters).
            resolution: resolution of the checkpoint's grid in degrees, 1.0 or 0.25; None for the grid of `surface`.
            memory_budget: bytes that the backward pass of one network pass may keep. If it needs more, activations are
                computed again. None for half of the device's memory.

        Raises:
            ImportError: the package is missing, or the installed xarray is newer than the package allows. The message
                says what to install.
            FileNotFoundError: the checkpoint or the configuration does not exist.
            ValueError: the attention or precision is unknown, a file is damaged, the checkpoint does not belong to the
                configuration, or the sea surface temperature of `surface` has values over land or none over sea.
        """
        choose("attention", attention, (None, "mha", "triblockdiag_mha"))
        choose("precision", precision, PRECISIONS)
        wn = import_weathernext("WeatherNext 2")
        loaded = load_checkpoint(wn, checkpoint, wn.fgn.CheckPoint, "WeatherNext 2")
        opened = open_configuration(wn, config)
        statistics = statistics_of(opened)
        sources = dict.fromkeys(statistics, f"the configuration '{os.fspath(config)}'")
        made = frame_arrays(wn, opened.task, statistics, sources, surface, resolution)
        predictor_kwargs = with_attention(opened, attention)
        parameters = network_parameters(loaded.params, precision)
        names = os.fspath(checkpoint), os.fspath(config)
        layout = made.fields["layout"]
        prior = cls(
            network=trace_network(wn, opened, predictor_kwargs, parameters, layout, precision, TIME_STEP, names),
            output_scale=made.scale,
            noise_shape=(sum(math.prod(sizes) for _, sizes in noise_sizes(opened).values()),),
            generator_passes=1,
            rematerialize=False,
            description=str(loaded.description),
            conditioning_passes=0,
            **made.fields,
        )
        return within_memory(prior, memory_budget)
