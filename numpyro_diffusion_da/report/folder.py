"""Files of a run's folder, as a report reads them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from numpyro_diffusion_da.diagnostics import area_weights, power_spectrum

if TYPE_CHECKING:
    import pandas
    import xarray

LINES_OF_COAST = 120
"""Latitudes of a land-sea mask from which coastlines are drawn; a finer one is averaged."""


def read_feedback(folder: Path) -> pandas.DataFrame:
    """The table of feedback of a run.

    Raises:
        FileNotFoundError: the folder has none.
    """
    import pandas

    path = folder / "feedback.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no feedback.parquet; give the folder of a run of ndda assimilate.")
    return pandas.read_parquet(path)


def read_cycles(folder: Path) -> pandas.DataFrame | None:
    """The table of cycles of a run, None if there is none."""
    import pandas

    path = folder / "cycles.csv"
    return pandas.read_csv(path, parse_dates=["time"]) if path.is_file() else None


def read_facts(folder: Path) -> dict[str, Any]:
    """Read the facts that a run has written about itself; empty if there are none."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_spectra(folder: Path, *, times: int = 8, members: int = 8) -> list[Spectrum]:
    """Spectra along circles of latitude of the fields that a run wrote, averaged over times, members and area.

    Args:
        folder: folder of the run; without `analysis.zarr` there are none.
        times: number of the last times to read.
        members: number of the first members to read.

    Returns:
        One for each variable on a global grid, at the level nearest to 500 hPa.
    """
    import xarray

    fields = {}
    for name, store in (("background", "background.zarr"), ("analysis", "analysis.zarr")):
        if (folder / store).is_dir():
            fields[f"{name} members"] = xarray.open_zarr(
                folder / store, group="members", chunks=None, consolidated=False
            )
            if name == "analysis":
                fields["analysis mean"] = xarray.open_zarr(
                    folder / store, group="mean", chunks=None, consolidated=False
                )
    if "analysis members" not in fields:
        return []
    found = []
    for name, variable in fields["analysis members"].data_vars.items():
        if not {"latitude", "longitude", "time"} <= set(variable.dims):
            continue
        power = {}
        level = float("nan")
        for kind, dataset in fields.items():
            if name not in dataset:
                continue
            field = dataset[name].isel(time=slice(-times, None))
            if "level" in field.dims:
                field = field.sel(level=500, method="nearest")
                level = float(field["level"])
            if "number" in field.dims:
                field = field.isel(number=slice(members))
            one = _power(field.load())
            if one is not None:
                power[kind] = one
        if power:
            found.append(Spectrum(str(name), level, str(variable.attrs.get("units", "")), power))
    return found


class Increment(NamedTuple):
    """Mean increment of a variable, analysis minus background, over cycles.

    Attributes:
        name: the variable.
        level: its level in hPa; NaN for none.
        unit: its unit.
        field: mean over the cycles, shape (latitude, longitude).
        rms: root of the mean square over cycles and area.
        latitude: latitudes in degrees.
        longitude: longitudes in degrees.
        cycles: number of cycles.
    """

    name: str
    level: float
    unit: str
    field: np.ndarray
    rms: float
    latitude: np.ndarray
    longitude: np.ndarray
    cycles: int


def read_increments(folder: Path, names: Sequence[str] = (), *, most: int = 6) -> list[Increment]:
    """Mean increments of a run that wrote `background.zarr`, at the level nearest to 500 hPa.

    Args:
        folder: folder of the run; without `analysis.zarr` and `background.zarr` there are none.
        names: variables that come first.
        most: largest number of variables.
    """
    import xarray

    if not all((folder / store).is_dir() for store in ("analysis.zarr", "background.zarr")):
        return []
    after, before = (
        xarray.open_zarr(folder / store, group="mean", chunks=None, consolidated=False)
        for store in ("analysis.zarr", "background.zarr")
    )
    times = np.intersect1d(after["time"].values, before["time"].values)
    known = [str(name) for name in after.data_vars if name in before]
    order = [*(name for name in names if name in known), *(name for name in known if name not in names)]
    found = []
    for name in order[:most]:
        pair = [dataset[name].sel(time=times) for dataset in (after, before)]
        level = float("nan")
        if "level" in pair[0].dims:
            pair = [field.sel(level=500, method="nearest") for field in pair]
            level = float(pair[0]["level"])
        pair = [field.transpose("time", "latitude", "longitude") for field in pair]
        total, square = np.zeros(pair[0].shape[1:]), np.zeros(pair[0].shape[1:])
        for t in range(len(times)):
            one = pair[0][t].values.astype(float) - pair[1][t].values
            total, square = total + one, square + one**2
        if not len(times) or not np.isfinite(total).any():
            continue
        latitude = pair[0]["latitude"]
        weights = np.broadcast_to(area_weights(latitude).values[:, None], square.shape)
        there = np.isfinite(square)
        rms = float(np.sqrt(np.average(square[there] / len(times), weights=weights[there])))
        unit = str(pair[0].attrs.get("units", ""))
        field = total / len(times)
        found.append(Increment(name, level, unit, field, rms, latitude.values, pair[0]["longitude"].values, len(times)))
    return found


def read_coast(folder: Path) -> list[np.ndarray]:
    """Coastlines from the land-sea mask of a run's prior, the file `prior.surface` of its configuration.

    Args:
        folder: folder of the run.

    Returns:
        Lines where half of a cell is land, arrays of longitude and latitude, shape (point, 2). None of them if the
        configuration names no file, or the file is not there any more or has no mask.
    """
    import contourpy
    import xarray

    path = folder / "run.toml"
    prior = tomllib.loads(path.read_text(encoding="utf-8")).get("prior", {}) if path.is_file() else {}
    file = Path(prior.get("surface", ""))
    if "surface" not in prior or not file.exists():
        return []
    how = {"engine": "zarr", "chunks": None} if file.is_dir() else {"engine": "h5netcdf"}
    try:
        with xarray.open_dataset(file, **how) as dataset:
            name = next((name for name in ("land_sea_mask", "lsm") if name in dataset), None)
            if name is None:
                return []
            mask = dataset[name]
            mask = mask.rename(
                {old: new for old, new in (("lat", "latitude"), ("lon", "longitude")) if old in mask.dims}
            )
            mask = mask.isel({dim: 0 for dim in mask.dims if dim not in ("latitude", "longitude")})
            mask = mask.transpose("latitude", "longitude").load()
    except (OSError, ValueError):
        return []
    step = max(1, mask.sizes["latitude"] // LINES_OF_COAST)
    mask = mask.coarsen(latitude=step, longitude=step, boundary="trim").mean()
    latitude, longitude = (mask[name].values.astype(float) for name in ("latitude", "longitude"))
    order = np.argsort(longitude)
    values, longitude = mask.values[:, order], longitude[order]
    if len(longitude) * np.median(np.diff(longitude)) > 359.0:  # around the earth: no gap
        values, longitude = np.concatenate([values, values[:, :1]], 1), np.append(longitude, longitude[0] + 360.0)
    lines = contourpy.contour_generator(longitude, latitude, values).lines(0.5)
    return [np.asarray(line) for line in lines]


class Spectrum(NamedTuple):
    """Spectra of a variable by kind of field: power at the wavenumbers 1, 2, ..."""

    name: str
    level: float
    unit: str
    power: dict[str, np.ndarray]


def _power(field: xarray.DataArray) -> np.ndarray | None:
    """Power by wavenumber; None for a field that goes around no ring, or has missing values."""
    if field.sizes["longitude"] < 4 or not bool(np.isfinite(field).all()):
        return None
    others = [str(dim) for dim in field.dims if dim != "longitude"]
    try:
        power = power_spectrum(field, axis="longitude", average=others, weights=area_weights(field["latitude"]))
    except ValueError:  # the grid of a region
        return None
    return power.values
