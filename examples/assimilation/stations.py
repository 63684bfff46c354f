"""Make a table of observations of a known truth, with the faults of real tables, to assimilate in ten minutes.

The truth is a part of a run of a dry circulation model on which the shipped weather emulator was not trained. Land
stations observe its surface pressure, sondes temperature and wind at three levels, aircraft the wind near 300 hPa, and
ships surface pressure on their way. Into the table go what tables have in them:

- two stations have their rows twice, and one also sends a second report an hour later;
- one land station gives hPa and says Pa, and another one gives -999 for a missing value;
- two sondes give degC and say so; a third one gives degC and says K;
- ships move, and one of them reports no position in one row;
- the thermometer of one sonde drifts by 1.5 K a day;
- all stations between 0 and 90 degrees east are silent for a day.

    python stations.py --out ten_minutes               # writes stations.csv and truth.nc
    ndda assimilate ten_minutes/run.toml --check       # what becomes of each row, and what the run costs
    ndda assimilate ten_minutes/run.toml
    ndda verify ten_minutes/run --against ten_minutes/truth.nc
    ndda report ten_minutes/run                        # writes report.html

With `--gaps`, at that share of the times no station reports, and for four times on end. A month is

    python stations.py --out month --cycles 60 --gaps 0.2 --land 30 --sondes 12 --aircraft 4
    ndda assimilate month/run.toml                     # stop it with Ctrl-C, and start it again: it goes on

What to expect: `--check` counts the rows that are set aside, by reason: duplicates and repeated reports, out of bounds
(Pa, and degC called K), and missing. The filter rejects no others. It uses the drifting sonde, which the report then
lists among the most conspicuous stations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas
import typer
from rich.console import Console

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import held_suarez_truth
from numpyro_diffusion_da.observation import read_table

STEP = np.timedelta64(12, "h")
START = np.datetime64("2026-01-01T00")
ERRORS = {"sp": 1.0, "t": 1.0, "u": 2.0, "v": 2.0}
"""Standard deviation of the errors, in hPa, K and m s-1."""
UNITS = {"sp": "hPa", "t": "K", "u": "m s-1", "v": "m s-1"}
SONDE = [("t", 850), ("t", 500), *((wind, level) for level in (850, 500, 250) for wind in "uv")]
"""What a sonde observes."""
SHIP_SPEED = 2.5
"""Degrees eastward in one step."""


def places(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes and longitudes, uniform in area between 75 degrees south and north."""
    return np.rad2deg(np.arcsin(rng.uniform(-0.966, 0.966, count))), rng.uniform(-180.0, 180.0, count)


def network(rng: np.random.Generator, times: np.ndarray, land: int, sondes: int, ships: int, aircraft: int):
    """Rows of all stations at all times, without values."""
    fixed = [(f"L{i:03}", "land", [("sp", None)]) for i in range(land)]
    fixed += [(f"R{i:03}", "sonde", SONDE) for i in range(sondes)]
    fixed += [(f"SHIP{i}", "ship", [("sp", None)]) for i in range(ships)]
    north, east = places(rng, len(fixed))
    rows = []
    for k, time in enumerate(times):
        for (station, kind, observed), lat, lon in zip(fixed, north, east, strict=True):
            moved = SHIP_SPEED * k if kind == "ship" else 0.0
            for variable, level in observed:
                rows.append((k, time, lat, (lon + moved + 180.0) % 360.0 - 180.0, variable, level, station, kind))
        for i, (lat, lon) in enumerate(zip(*places(rng, aircraft), strict=True)):
            for variable in "uv":
                rows.append((k, time, lat, lon, variable, int(rng.integers(280, 320)), f"A{i:03}", "aircraft"))
    columns = ["cycle", "time", "lat", "lon", "variable", "level", "station", "type"]
    frame = pandas.DataFrame(rows, columns=columns)
    frame["lat"], frame["lon"] = frame["lat"].round(2), frame["lon"].round(2)
    return frame.assign(units=frame["variable"].map(UNITS), error=frame["variable"].map(ERRORS))


def observe(rng: np.random.Generator, frame, layout, states: np.ndarray, times: np.ndarray):
    """Rows with the values of the truth at their places, and errors."""
    placed = read_table(frame.assign(observation=0.0)).on(layout, times, window="1h", quality=[])
    seen = placed.by_row(np.stack([placed.observe(state, k) for k, state in enumerate(states)]))
    values = seen.to_numpy(float) + frame["error"] * rng.normal(size=len(frame))
    return frame.assign(observation=values)


def with_faults(rng: np.random.Generator, frame, times: np.ndarray):
    """Rows with the faults of real tables."""
    station, variable, value = frame["station"], frame["variable"], frame["observation"].copy()
    late = rng.integers(-60, 60, len(frame)) * np.timedelta64(1, "m")
    frame["time"] = np.where(frame["type"] == "aircraft", frame["time"] + late, frame["time"])
    frame.loc[station == "L001", "units"] = "Pa"
    value[(station == "L002") & (rng.uniform(size=len(frame)) < 0.5)] = -999.0
    celsius = station.isin(["R001", "R002", "R003"]) & (variable == "t")
    value[celsius] -= 273.15
    frame.loc[celsius & (station != "R003"), "units"] = "degC"
    since = (frame["time"] - times[0]) / np.timedelta64(24, "h")
    value[(station == "R004") & (variable == "t")] += 1.5 * since
    frame["observation"] = value.round(2)
    frame.loc[frame.index[(station == "SHIP1")][1], ["lat", "lon"]] = np.nan
    again = frame[station.isin(["L004", "R005"])]
    later = frame[station == "L005"].assign(time=lambda some: some["time"] + np.timedelta64(60, "m"))
    found = pandas.concat([frame, again, later], ignore_index=True)
    found = found[~(found["lon"].between(0.0, 90.0) & found["cycle"].isin([4, 5]))]
    found = found.sort_values(["time", "station"], kind="stable")
    return found.assign(time=found["time"].dt.strftime("%Y-%m-%dT%H:%MZ"))


def silent_times(rng: np.random.Generator, cycles: int, share: float) -> np.ndarray:
    """Times at which no station reports: a share of all, and four on end in the middle."""
    silent = rng.choice(np.arange(1, cycles), int(share * cycles), replace=False)
    return np.union1d(silent, cycles // 2 + np.arange(4)) if share else silent


def main(
    out: Annotated[Path, typer.Option(help="Folder of stations.csv and truth.nc.")] = Path("."),
    cycles: Annotated[int, typer.Option(help="Number of times, 12 h apart.", min=1, max=60)] = 8,
    land: Annotated[int, typer.Option(help="Number of land stations.", min=6)] = 60,
    sondes: Annotated[int, typer.Option(help="Number of sondes.", min=6)] = 20,
    ships: Annotated[int, typer.Option(help="Number of ships.", min=2)] = 4,
    aircraft: Annotated[int, typer.Option(help="Number of reports of aircraft at each time.", min=0)] = 15,
    gaps: Annotated[float, typer.Option(help="Share of the times at which no station reports.", min=0, max=0.9)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of places and errors.")] = 0,
) -> None:
    """Write the table and the truth."""
    layout = ndda.load_prior("held_suarez").layout
    times = START + STEP * np.arange(cycles)
    states = held_suarez_truth.truth()[1 : cycles + 1]
    rng = np.random.default_rng(seed)
    frame = network(rng, times, land, sondes, ships, aircraft)
    frame = with_faults(rng, observe(rng, frame, layout, states, times), times)
    frame = frame[~frame.pop("cycle").isin(silent_times(rng, cycles, gaps))]
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "stations.csv", index=False)
    ndda.fields.to_dataset(states, layout, {"time": times}).to_netcdf(out / "truth.nc", engine="h5netcdf")
    Console().print(f"Wrote {len(frame)} rows into {out / 'stations.csv'}, and the truth into {out / 'truth.nc'}.")


if __name__ == "__main__":
    typer.run(main)
