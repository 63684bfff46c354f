"""Files of a run's folder, as a report reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from numpyro_diffusion_da.diagnostics import area_weights, power_spectrum

if TYPE_CHECKING:
    import pandas
    import xarray


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
