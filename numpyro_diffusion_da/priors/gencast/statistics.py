"""The normalization statistics published with GenCast, by channel of a frame."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from numpyro_diffusion_da.fields.layout import Layout, Variable

if TYPE_CHECKING:
    import xarray

STATISTICS = {
    # what it is -> the names of the file in the published directory, and in this field's habit
    "mean": ("mean_by_level.nc", "mean_x.nc"),
    "stddev": ("stddev_by_level.nc", "std_x.nc"),
    "diffs_stddev": ("diffs_stddev_by_level.nc", "std_z.nc"),
    "min": ("min_by_level.nc", "min_x.nc"),
}


class Statistics(NamedTuple):
    """Normalization by channel of a frame, float32.

    Attributes:
        mean: shape (channel,), in the variable's unit.
        stddev: shape (channel,).
        scale: standard deviation of the latent in the variable's unit: of 12 h differences, or `stddev` where the
            variable is no input; shape (channel,).
        is_input: False for a variable that is predicted as itself.
    """

    mean: np.ndarray
    stddev: np.ndarray
    scale: np.ndarray
    is_input: np.ndarray


def read_gencast_statistics(directory: str | os.PathLike[str]) -> dict[str, xarray.Dataset]:
    """The four normalization datasets, by what they are (see `STATISTICS`).

    Raises:
        FileNotFoundError: one of them is not in the directory.
    """
    import xarray

    found = {}
    for what, names in STATISTICS.items():
        paths = [os.path.join(directory, name) for name in names]
        existing = [path for path in paths if os.path.exists(path)]
        if not existing:
            raise FileNotFoundError(
                f"no {names[0]} in {os.fspath(directory)!r}; give stats= the directory of the published statistics."
            )
        found[what] = xarray.load_dataset(existing[0], engine="h5netcdf")
    return found


def channel_statistics(
    layout: Layout, statistics: dict[str, xarray.Dataset], input_variables: tuple[str, ...]
) -> Statistics:
    """Normalization constants of every channel.

    Raises:
        ValueError: the statistics lack a variable.
    """

    def of(what: str, variable: Variable) -> np.ndarray:
        dataset = statistics[what]
        if variable.name not in dataset:
            raise ValueError(f"the statistics ({STATISTICS[what][0]}) have no '{variable.name}'; give those published.")
        values = dataset[variable.name]
        return np.atleast_1d(values.sel(level=list(variable.levels)).values if variable.levels else values.values)

    def stacked(parts: list[np.ndarray]) -> np.ndarray:
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
