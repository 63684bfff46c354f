"""Normalization statistics of the package's models, for the channels of a frame."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from numpyro_diffusion_da.fields.layout import Layout, Variable
from numpyro_diffusion_da.spelling import spelled

if TYPE_CHECKING:
    import xarray

STATISTICS = {
    # kind of statistic -> name of its file in the published directory, and another name that is in use
    "mean": ("mean_by_level.nc", "mean_x.nc"),
    "stddev": ("stddev_by_level.nc", "std_x.nc"),
    "diffs_stddev": ("diffs_stddev_by_level.nc", "std_z.nc"),
    "min": ("min_by_level.nc", "min_x.nc"),
}


class Statistics(NamedTuple):
    """Normalization constants of the channels of a frame, in the units of the variables, float32.

    Attributes:
        mean: mean of each channel, shape (channel,).
        stddev: standard deviation of each channel, shape (channel,).
        scale: scale of the latent, shape (channel,): the standard deviation of differences over a step, or `stddev` for
            a variable that is not an input.
        is_input: True for channels of variables that are inputs of the network, and whose residual is predicted; False
            for variables that are predicted themselves. Shape (channel,).
    """

    mean: np.ndarray
    stddev: np.ndarray
    scale: np.ndarray
    is_input: np.ndarray


def read_gencast_statistics(directory: str | os.PathLike[str]) -> dict[str, xarray.Dataset]:
    """Read the four normalization datasets published with GenCast.

    Args:
        directory: directory of the files.

    Returns:
        Datasets by the kind of statistic: "mean", "stddev", "diffs_stddev" and "min".

    Raises:
        FileNotFoundError: one of the files is not in the directory.
        ValueError: one of the files is damaged. The message names it.
    """
    import xarray

    found = {}
    for what, names in STATISTICS.items():
        paths = [os.path.join(directory, name) for name in names]
        existing = [path for path in paths if os.path.exists(path)]
        if not existing:
            raise FileNotFoundError(
                f"there is no {names[0]} in {os.fspath(directory)!r}; give {spelled('prior.stats')} the "
                "directory of the published statistics."
            )
        try:
            found[what] = xarray.load_dataset(existing[0], engine="h5netcdf")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the file '{existing[0]}' of {spelled('prior.stats')} cannot be read as netCDF "
                f"({str(error).splitlines()[0]}); download the published statistics again."
            ) from None
    return found


def channel_statistics(
    layout: Layout,
    statistics: Mapping[str, xarray.Dataset],
    input_variables: tuple[str, ...],
    sources: Mapping[str, str],
) -> Statistics:
    """Select the normalization constants of every channel.

    Args:
        layout: layout of a frame.
        statistics: datasets by kind, "mean", "stddev", "diffs_stddev" and "min".
        input_variables: names of the variables that are inputs of the network.
        sources: where each kind of statistic was read, for messages.

    Raises:
        ValueError: a variable or a level is missing in the statistics, or a number is not finite or not positive.
    """

    def of(what: str, variable: Variable) -> np.ndarray:
        """One statistic of a variable, with one value per channel."""
        dataset = statistics[what]
        if variable.name not in dataset:
            raise ValueError(
                f"the statistics in {sources[what]} have no variable '{variable.name}'; give the statistics "
                "published with the checkpoint."
            )
        values = dataset[variable.name]
        has = np.asarray(values.coords["level"].values).tolist() if "level" in values.coords else []
        if lacking := [level for level in variable.levels if level not in has]:
            raise ValueError(
                f"the statistics of '{variable.name}' in {sources[what]} lack the levels {lacking} hPa; they "
                f"have {has}: give the statistics published with the checkpoint."
            )
        found = np.atleast_1d(values.sel(level=list(variable.levels)).values if variable.levels else values.values)
        if not np.isfinite(found).all() or (what != "mean" and what != "min" and not (found > 0).all()):
            raise ValueError(
                f"the statistics of '{variable.name}' in {sources[what]} are {found.tolist()}; expected finite "
                "numbers, and positive standard deviations: give the statistics published with the checkpoint."
            )
        return found

    def stacked(parts: list[np.ndarray]) -> np.ndarray:
        """Values of all channels in single precision."""
        return np.concatenate(parts).astype(np.float32)

    inputs = [variable.name in input_variables for variable in layout.variables]
    return Statistics(
        mean=stacked([of("mean", v) for v in layout.variables]),
        stddev=stacked([of("stddev", v) for v in layout.variables]),
        scale=stacked(
            [of("diffs_stddev" if i else "stddev", v) for v, i in zip(layout.variables, inputs, strict=True)]
        ),
        is_input=np.repeat(inputs, [v.num_channels for v in layout.variables]),
    )
