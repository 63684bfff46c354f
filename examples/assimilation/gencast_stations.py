"""Make a table of observations of a reanalysis, to assimilate with GenCast.

Without the option `--data`, it first writes a checkpoint with random weights, statistics and a made-up atmosphere into
the folder, in the form of the published files. Nothing is learned from their numbers; everything else is as with the
real ones:

    python gencast_stations.py --out gencast
    ndda assimilate gencast/run.toml --check
    ndda assimilate gencast/run.toml
    ndda report gencast/run

With the published files (docs/gencast.md) only paths change: `gencast`, `stats`, `surface` and `file` in run.toml, and

    python gencast_stations.py --out gencast --data source-era5_date-2019-03-29_res-1.0_levels-13_steps-30.nc

The made-up atmosphere begins at the date in the name of the published file. The program prints the times of the
analyses, which are `start` and `end` in run.toml: with a file that begins at another time, change them too.

Observed are temperature at 2 m, wind at 10 m and pressure at mean sea level at stations, and temperature and wind at
850 and 500 hPa by sondes. What to expect: the random weights let no forecast be trusted, so the background check
rejects rows; with the real weights it rejects few.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas
import typer
import xarray
from rich.console import Console

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.observation import read_table

GROUND = {"t2m": ("K", 1.0), "u10m": ("m s-1", 1.0), "v10m": ("m s-1", 1.0), "msl": ("Pa", 100.0)}
"""Unit and standard deviation of the error of what a station observes."""
SONDE = {"t": ("K", 1.0), "u": ("m s-1", 2.0), "v": ("m s-1", 2.0)}
LEVELS = (500, 850)
START = "2019-03-29T00"
VARIABLES = (
    ndda.Variable("2m_temperature", "K"),
    *(ndda.Variable(f"10m_{c}_component_of_wind", "m s-1") for c in "uv"),
    ndda.Variable("mean_sea_level_pressure", "Pa"),
    ndda.Variable("temperature", "K", LEVELS),
    *(ndda.Variable(f"{c}_component_of_wind", "m s-1", LEVELS) for c in "uv"),
)


def layout_of(dataset: xarray.Dataset) -> ndda.Layout:
    """Layout of the observed variables on the grid of a dataset."""
    latitude, longitude = ndda.fields.grid(dataset)
    channels = sum(variable.num_channels for variable in VARIABLES)
    axes = {"latitude": latitude.tolist(), "longitude": longitude.tolist()}
    shape = (len(latitude), len(longitude), channels)
    return ndda.Layout(shape, ("latitude", "longitude", "channel"), axes, variables=VARIABLES)


def table(rng: np.random.Generator, layout: ndda.Layout, states: np.ndarray, times: np.ndarray, count: int):
    """Rows of stations and sondes at some times, with errors."""
    parts = []
    north, east = np.rad2deg(np.arcsin(rng.uniform(-1.0, 1.0, count))), rng.uniform(0.0, 360.0, count)
    station = [f"S{i:04}" for i in range(count)]
    for time in times:
        place = {"time": time, "lat": north, "lon": east, "station": station}
        for name, (units, error) in GROUND.items():
            more = {"variable": name, "level": np.nan, "units": units, "error": error, "type": "land"}
            parts.append(pandas.DataFrame(place | more))
        for level in LEVELS:
            for name, (units, error) in SONDE.items():
                more = {"variable": name, "level": level, "units": units, "error": error, "type": "sonde"}
                parts.append(pandas.DataFrame(place | more).iloc[::4])
    frame = pandas.concat(parts, ignore_index=True)
    placed = read_table(frame.assign(observation=0.0)).on(layout, times, window="1h", quality=[])
    seen = placed.by_row(np.stack([placed.observe(state, k) for k, state in enumerate(states)]))
    noisy = seen.to_numpy(float) + frame["error"] * rng.normal(size=len(frame))
    return frame.assign(observation=noisy.round(2)).round({"lat": 3, "lon": 3})


def main(
    out: Annotated[Path, typer.Option(help="Folder of stations.csv and, without --data, of the files.")] = Path("."),
    data: Annotated[Path | None, typer.Option(help="File of a reanalysis, such as GenCast's example data.")] = None,
    steps: Annotated[int, typer.Option(help="Number of analyses after the first two frames.", min=1)] = 3,
    stations: Annotated[int, typer.Option(help="Number of stations; every fourth is a sonde, too.", min=4)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of places and errors.")] = 0,
) -> None:
    """Write the table, and the files of a random network if no data are given."""
    out.mkdir(parents=True, exist_ok=True)
    if data is None:
        data = Path(ndda.priors.write_synthetic_gencast(out, levels=LEVELS, start=START).data)
    with xarray.open_dataset(data, engine="h5netcdf") as dataset:
        layout, times = layout_of(dataset), ndda.fields.dataset_times(dataset)[2 : steps + 2]
        states = ndda.fields.read_states(dataset, layout, times)
    frame = table(np.random.default_rng(seed), layout, states, times, stations)
    frame.to_csv(out / "stations.csv", index=False)
    first, last = (np.datetime_as_string(time, "m") for time in times[[0, -1]])
    Console().print(f"Wrote {len(frame)} rows into {out / 'stations.csv'}, for analyses from {first} to {last}.")


if __name__ == "__main__":
    typer.run(main)
