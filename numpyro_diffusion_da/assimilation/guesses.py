"""First guess of a run, as a NumPyro distribution of the states one step before the first analysis."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.assimilation.config import FirstGuessSettings, in_keys
from numpyro_diffusion_da.assimilation.emulator import Emulator
from numpyro_diffusion_da.fields.datasets import dataset_times, read_states

if TYPE_CHECKING:
    import xarray

MEMBERS = ("number", "realization", "member", "ensemble", "sample")
"""Names that files have for the dimension of members."""


class EnsembleGuess(dist.Distribution):
    r"""Smoothed distribution of an ensemble: draws have its mean and covariance, and none is a copy of another.

    A draw is

    $$
    \bar x + \sqrt{1 - h^2} (x_i - \bar x) + h \sum_j w_j (x_j - \bar x) / \sqrt M, \qquad w_j \sim N(0, 1),
    $$

    with a member $x_i$ chosen at random (the kernel with shrinkage of Liu & West 2001, in Doucet et al., *Sequential
    Monte Carlo Methods in Practice*, section 10.3, with the covariance of the ensemble). For h = 0 draws are members,
    and for h = 1 they are Gaussian.

    Args:
        members: states of the members, shape (member, ...).
        smoothing: share h, from 0 to 1.
    """

    support = dist.constraints.real
    pytree_data_fields = ("members",)
    pytree_aux_fields = ("smoothing",)

    def __init__(self, members: Float[Array, "member ..."], smoothing: float) -> None:
        self.members, self.smoothing = jnp.asarray(members), float(smoothing)
        super().__init__(batch_shape=(), event_shape=self.members.shape[1:])

    @property
    def mean(self) -> Float[Array, ...]:
        """Mean of the ensemble."""
        return jnp.mean(self.members, axis=0)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, ...]:
        """Draw states, shape (*sample_shape, ...).

        Args:
            key: random key.
            sample_shape: leading shape of the draws.
        """
        count = len(self.members)
        pick_key, combine_key = jax.random.split(key)
        chosen = jax.random.randint(pick_key, sample_shape, 0, count)
        weights = jax.random.normal(combine_key, (*sample_shape, count)) / np.sqrt(count)
        shrunk = np.sqrt(1.0 - self.smoothing**2)
        weights = shrunk * jax.nn.one_hot(chosen, count) + self.smoothing * weights
        mean = self.mean
        anomalies = self.members - mean[None]
        return jnp.tensordot(weights, anomalies, axes=1) + mean.reshape((1,) * len(sample_shape) + mean.shape)

    def log_prob(self, value: Float[Array, ...]) -> Float[Array, ...]:
        """Raise an error: the distribution has no density, because its draws lie in the span of the members.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("EnsembleGuess has no density; use a method that only needs samples, such as Filter.")


class FrameGuess(dist.Distribution):
    """States of an analysis, with anomalies of the climate added to the last one.

    Args:
        frames: the last state, shape (...), or the last two, shape (2, ...).
        climate: distribution of states whose anomalies are added; None for none.
        spread: factor on the anomalies.
        num_frames: number of states, 1 or 2.
    """

    support = dist.constraints.real
    pytree_data_fields = ("frames", "climate")
    pytree_aux_fields = ("spread", "num_frames")

    def __init__(
        self, frames: Float[Array, ...], climate: dist.Distribution | None, spread: float, num_frames: int
    ) -> None:
        self.frames, self.climate = jnp.asarray(frames), climate
        self.spread, self.num_frames = float(spread), num_frames
        super().__init__(batch_shape=(), event_shape=self.frames.shape)

    @property
    def mean(self) -> Float[Array, ...]:
        """The states without anomalies."""
        return self.frames

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, ...]:
        """Draw states, shape (*sample_shape, ...).

        Args:
            key: random key.
            sample_shape: leading shape of the draws.
        """
        lead = (1,) * len(sample_shape)
        center = self.frames.reshape(lead + self.frames.shape)
        center = jnp.broadcast_to(center, sample_shape + self.frames.shape)
        if self.climate is None:
            return center
        mean = self.climate.mean.reshape(lead + self.climate.event_shape)
        anomaly = self.spread * (self.climate.sample(key, sample_shape) - mean)
        return center + anomaly if self.num_frames == 1 else center.at[..., -1, :, :, :].add(anomaly)

    def log_prob(self, value: Float[Array, ...]) -> Float[Array, ...]:
        """Raise an error, because the distribution has no density.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("FrameGuess has no density; use a method that only needs samples, such as Filter.")


def first_guess(settings: FirstGuessSettings, emulator: Emulator, start: np.datetime64) -> dist.Distribution:
    """Distribution of the states before the first analysis.

    Args:
        settings: table `[first_guess]` of a configuration.
        emulator: the prior of the run.
        start: time of the first analysis.

    Returns:
        Distribution of the state one step before `start`; for a prior of two frames, of the two states before, with a
        leading axis of 2.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the prior has no climatology, or the file has not the states. The message names the file.
    """
    prior = emulator.prior
    if settings.kind == "climatology":
        if emulator.frames > 1:
            raise ValueError(
                f"first_guess.kind is 'climatology', but {type(prior).__name__} is conditioned on two states that "
                'follow each other; give kind = "frames" or "ensemble" with a file.'
            )
        try:
            return prior.climatology()
        except NotImplementedError:
            raise ValueError(
                f"first_guess.kind is 'climatology', but {type(prior).__name__} has none; give kind = \"frames\" or "
                '"ensemble" with a file.'
            ) from None
    assert settings.file is not None
    times = start - emulator.step * np.arange(emulator.frames, 0, -1)
    with open_dataset(settings.file) as dataset:
        try:
            with in_keys({"interpolate": "first_guess.interpolate", "dataset": in_python(settings.file)}):
                members = _members(dataset, emulator, times, settings)
        except ValueError as error:
            raise ValueError(f"first_guess.file '{settings.file}': {error}") from None
    if settings.kind == "ensemble":
        if members is None or len(members) < 2:
            raise ValueError(
                f"first_guess.file '{settings.file}' has no members: none of the dimensions {', '.join(MEMBERS)} has "
                'two or more; give kind = "frames".'
            )
        return EnsembleGuess(jnp.asarray(members), settings.smoothing)
    if members is None or len(members) != 1:
        raise ValueError(f"first_guess.file '{settings.file}' has several members; give kind = \"ensemble\".")
    climate = None
    if settings.spread:
        try:
            climate = prior.climatology()
        except NotImplementedError:
            raise ValueError(
                f"first_guess.spread is {settings.spread}, but {type(prior).__name__} has no climate whose anomalies "
                "could be added; leave it out."
            ) from None
    return FrameGuess(jnp.asarray(members[0]), climate, settings.spread, emulator.frames)


def open_dataset(path: pathlib.Path) -> xarray.Dataset:
    """Open a NetCDF file, or a Zarr group, as this library writes them too.

    Args:
        path: the file or folder. The group `members` of an analysis of this library is taken from its folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be opened.
    """
    import xarray

    if not path.exists():
        raise FileNotFoundError(f"there is no file '{path}'; give a NetCDF file or a Zarr group.")
    try:
        if path.is_dir():
            group = "members" if (path / "members").is_dir() else None
            return xarray.open_zarr(path, group=group, chunks=None)
        return xarray.open_dataset(path, engine="h5netcdf")
    except Exception as error:  # each engine has errors of its own
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"'{path}' cannot be opened ({why}); give NetCDF-4 or Zarr.") from None


def in_python(path: pathlib.Path) -> str:
    """Python that opens a dataset, for messages.

    Args:
        path: the file or folder.
    """
    return f"xarray.open_{'zarr' if path.is_dir() else 'dataset'}({str(path)!r})"


def _members(
    dataset: xarray.Dataset, emulator: Emulator, times: np.ndarray, settings: FirstGuessSettings
) -> np.ndarray | None:
    """States of all members at some times, shape (member, [2,] latitude, longitude, channel)."""
    names = [name for name in MEMBERS if name in dataset.dims]
    has = dataset_times(dataset)
    if missing := [time for time in times.astype("datetime64[ns]") if time not in has]:
        later = has[-1] + emulator.step if len(has) else None
        advice = "" if later is None else f", or start at {later.astype('datetime64[s]')}, one step after its last time"
        raise ValueError(
            f"it has no state at {missing[0].astype('datetime64[s]')}, which is before the first analysis; give a file "
            f"with this time{advice}."
        )
    parts = [dataset.isel({names[0]: i}) for i in range(dataset.sizes[names[0]])] if names else [dataset]

    def states(part: Any) -> np.ndarray:
        if hasattr(emulator.prior, "frames"):
            return np.asarray(emulator.prior.frames(part, times, interpolate=settings.interpolate))
        return read_states(part, emulator.prior.layout, times, interpolate=settings.interpolate)

    found = np.stack([states(part) for part in parts])
    return found if emulator.frames > 1 else found[:, 0]
