"""GenCast (Price et al. 2023, arXiv 2312.15796) as a prior, with its own package and checkpoints.

One step is 12 h of the atmosphere. The next frame is conditioned on the last two frames, the time of year and of day,
and the surface. Frames are described in `priors.weathernext.frames`. The latent z depends on the variable:

- A variable that is also an input of the network is diffused as a normalized residual, x' = a + S z, where a is the
  last frame and S the standard deviation of 12 h differences.
- Precipitation is not an input of the network and is diffused itself, x' = a + S z, where a is its mean and S its
  standard deviation.

The network is google-deepmind's own, see `priors.gencast.network`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_diffusion_da.diffusion.noise import Noise
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.diffusion.spherical_noise import SphericalNoise
from numpyro_diffusion_da.priors.gencast.network import noise_range, trace_network, with_attention
from numpyro_diffusion_da.priors.weathernext.frames import (
    PRECISIONS,
    FrameConditioning,
    WeatherNextPrior,
    choose,
    frame_arrays,
    within_memory,
)
from numpyro_diffusion_da.priors.weathernext.package import import_weathernext, load_checkpoint, network_parameters
from numpyro_diffusion_da.priors.weathernext.statistics import STATISTICS, read_gencast_statistics

if TYPE_CHECKING:
    import xarray

TIME_STEP = np.timedelta64(12, "h")


class GenCastPrior(WeatherNextPrior, DiffusionPrior):
    """GenCast as the prior p(next frame | last two frames, forcings). Build it with `from_checkpoint`.

    In a program, the scan carries the pair of frames and takes the forcings along with the observations:

        def step(frames, at):
            y_t, forcings = at
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, frames, forcings))
            ...
            return (frames[1], x), None

        scan(step, frames, (y, prior.forcings(times)))

    Attributes:
        noise: noise of the diffusion.
        latent_scale: scale S in physical units, 0 where a variable is undefined.
        noise_range: (lowest, highest) noise level.
        TIME_STEP: length of a step, 12 h.
    """

    noise: Noise
    latent_scale: Float[Array, "latitude longitude channel"]
    noise_range: tuple[float, float] = eqx.field(static=True)

    TIME_STEP: ClassVar[np.timedelta64] = TIME_STEP
    MODEL: ClassVar[str] = "GenCast"
    TRANSITION: ClassVar[str] = "DiffusionTransition"

    # --- methods of a prior -------------------------------------------------------------------------------------

    def denoise(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], conditioning: FrameConditioning
    ) -> Float[Array, ...]:
        """Denoiser D(z_s, s; c) = E[z | z_s, c], by one pass of the package's network with its preconditioning.

        Args:
            z_s: noised latent, shape (latitude, longitude, channel).
            noise_level: noise level s > 0.
            conditioning: result of `condition` for the last two frames.

        Returns:
            Denoised latent, shape (latitude, longitude, channel).
        """
        return self.run_network(conditioning, z_s, noise_level).astype(z_s.dtype)

    def scale(self, conditioning: FrameConditioning) -> Float[Array, ...]:
        """Scale S in physical units, shape (latitude, longitude, channel).

        This is the standard deviation of 12 h differences, of precipitation itself for precipitation, and 0 where a
        variable is undefined.
        """
        return self.latent_scale

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
        return self.read_frames(dataset, times, interpolate, without_precipitation=True)

    def backward_bytes(self) -> int:
        """Estimate the bytes that the backward pass of one network pass keeps in memory, for one particle."""
        return self.network_bytes(lambda z, c: self.denoise(z, jnp.ones(()), c), self.layout.shape)

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
        choose("attention", attention, (None, "mha", "triblockdiag_mha", "splash_mha"))
        choose("precision", precision, PRECISIONS)
        wn = import_weathernext()
        opened = load_checkpoint(wn, checkpoint, wn.gencast.CheckPoint, "GenCast")
        architecture = with_attention(opened.denoiser_architecture_config, attention)
        sources = {kind: names[0] for kind, names in STATISTICS.items()}
        made = frame_arrays(wn, opened.task_config, read_gencast_statistics(stats), sources, surface, resolution)
        layout = made.fields["layout"]
        coordinates = layout.coords()
        isotropic = SphericalNoise.from_coordinates(coordinates["latitude"], coordinates["longitude"])
        parameters = network_parameters(opened.params, precision)
        prior = cls(
            network=trace_network(wn, opened, architecture, parameters, layout, precision),
            noise=isotropic if noise is None else noise,
            latent_scale=made.scale,
            noise_range=noise_range(opened),
            rematerialize=False,
            description=str(opened.description),
            conditioning_passes=0,
            **made.fields,
        )
        return within_memory(prior, memory_budget)
