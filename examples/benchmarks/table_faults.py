"""Which faults of a table of observations are caught, and what do they cost an analysis if they are not?

Stations observe surface pressure, temperature and winds at 850 hPa of the mini weather, in a table. Each fault is put
into the table, and the table is assimilated by an ensemble Kalman filter: once as it is, with no checks at all, and
once with `Bounds`, `Tracks`, `Duplicates` and `GrossErrorCheck`. There are three second runs with these checks: without
the suspect stations of the first run, without ships that do not move for two days, and with biases removed, as the
first run estimates them. A fault is caught if its row is not used; good rows that are not used are false alarms.

    python examples/benchmarks/table_faults.py --out table_faults.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas
import typer
from numpyro.contrib.control_flow import scan
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import held_suarez_demo, held_suarez_truth
from numpyro_diffusion_da.observation import Blacklist, Bounds, Duplicates, InstrumentBias, Tracks, read_table
from numpyro_diffusion_da.report import Findings

PART = 0.2
"""Error of an observation, in standard deviations of the climate."""

START = 0.5
"""Error of the first ensemble, in standard deviations of the climate."""

OBSERVED = {"sp": None, "t": 850.0, "u": 850.0, "v": 850.0}
COLUMNS = ("unchecked", "checked", "no suspects", "no still ships", "bias removed")
"""RMSE of the analysis after the spin-up, in standard deviations of the climate."""

SHARES = {"caught": ".2f", "false alarms": ".4f"}
"""Of the rows with a fault and of the others, how many are not used; with 2 and still in the second runs."""

FAULTS = ("none", "gross errors", "degC as K", "Pa as hPa", "-999", "duplicates", "biased stations", "ships")


def clean_table(rng: np.random.Generator, prior: Any, states: np.ndarray, times: np.ndarray, stations: int) -> Any:
    """Table of stations with the right errors; every tenth one is a ship that moves 3 degrees east in each step."""
    latitude = np.rad2deg(np.arcsin(rng.uniform(-0.95, 0.95, stations)))
    east = rng.uniform(0.0, 360.0, stations)
    is_ship = np.arange(stations) % 10 == 0
    scale = dict(zip(ndda.observation.channel_names(prior.layout), np.asarray(prior.state_scale), strict=True))
    names = {"sp": "surface_pressure", "t": "temperature_850"}
    names |= {c: f"{c}_component_of_wind_850" for c in "uv"}
    parts = []
    for t, time in enumerate(times):
        for name, level in OBSERVED.items():
            longitude = (east + 3.0 * t * is_ship) % 360.0
            station = [f"S{i}" for i in range(stations)]
            part = {"time": time, "lat": latitude, "lon": longitude, "variable": name, "level": level}
            part |= {
                "station": station,
                "type": np.where(is_ship, "ship", "land"),
                "ship": is_ship,
                "error": PART * scale[names[name]],
                "observation": 0.0,
            }
            parts.append(pandas.DataFrame(part))
    frame = pandas.concat(parts, ignore_index=True)
    frame["units"] = frame["variable"].map({"sp": "hPa", "t": "K"}).fillna("m s-1")
    exact = read_table(frame).on(prior.layout, times, quality=[])
    seen = exact.by_row(np.stack([exact.observe(state, t) for t, state in enumerate(states)])).to_numpy(float)
    return frame.assign(observation=seen + frame["error"] * rng.normal(size=len(frame)), bad=False)


def with_fault(rng: np.random.Generator, frame: Any, fault: str) -> Any:
    """Table with one kind of fault; the column `bad` marks its rows."""
    frame = frame.copy()
    some = rng.uniform(size=len(frame))
    name, number = frame["variable"], frame["station"].str[1:].astype(int)
    if fault == "gross errors":
        frame["bad"] = some < 0.01
        frame["observation"] += frame["bad"] * np.where(some < 0.005, -20.0, 20.0) * frame["error"]
    elif fault == "degC as K":
        frame["bad"] = (name == "t") & (number % 20 == 3)
        frame["observation"] -= 273.15 * frame["bad"]
    elif fault == "Pa as hPa":
        frame["bad"] = (name == "sp") & (number % 20 == 3)
        frame["observation"] *= np.where(frame["bad"], 100.0, 1.0)
    elif fault == "-999":
        frame["bad"] = some < 0.02
        frame.loc[frame["bad"], "observation"] = -999.0
    elif fault == "duplicates":
        again = frame[some < 0.2].assign(bad=True)
        frame = pandas.concat([frame, again, again], ignore_index=True)
    elif fault == "biased stations":
        frame["bad"] = number % 10 == 5
        frame["observation"] += 4.0 * frame["error"] * frame["bad"]
    elif fault == "ships":
        # The places of the first step at all times.
        first = frame.drop_duplicates(["station"]).set_index("station")["lon"]
        frame["bad"] = frame["ship"] & (frame["lon"] != frame["station"].map(first))
        frame["lon"] = frame["station"].map(first)
    return frame


class Runs:
    """Runs of the filter with and without checks, which share their compiled steps.

    Args:
        prior: the weather emulator.
        times: times of the steps.
        particles: number of members.
        spin_up: number of steps that are not scored.
    """

    def __init__(self, prior: Any, times: np.ndarray, particles: int, spin_up: int) -> None:
        self.prior, self.times, self.spin_up = prior, times, spin_up
        self.experiment = held_suarez_demo.WeatherExperiment(cycles=len(times), spin_up=spin_up, start_error=START)
        self.checks = [Bounds.of(prior), Tracks(), Duplicates()]
        self.sizes: Any = None
        climate = prior.climatology()
        self.operator = read_table(_nothing()).on(prior.layout, times, quality=[]).operator

        def weather(first_guess: jax.Array, xs: Any) -> None:
            x0 = numpyro.sample("x0", climate)

            def step(x: jax.Array, at: Any) -> tuple[jax.Array, None]:
                x = numpyro.sample("x", ndda.DiffusionTransition(prior, x, sampler=held_suarez_demo.SAMPLER))
                numpyro.deterministic("y_place", at["place"])
                numpyro.sample("y", dist.Normal(self.operator(x, at), at["error"]).to_event(1), obs=at["y"])
                return x, None

            scan(step, first_guess + START * (x0 - climate.mean), xs)

        taper = ndda.Taper(2500.0, ndda.GreatCircle(), {"y": "y_place"})
        plain = ndda.EnKF(weather, taper=taper, inflation=(ndda.RTPS(0.5),))
        self.filters = {
            name: ndda.Filter(algorithm, num_particles=particles, progress_bar=False)
            for name, algorithm in (("unchecked", plain), ("checked", ndda.GrossErrorCheck(plain)))
        }

    def reserve(self, table: Any) -> None:
        """Take the size of the largest table, with two copies of a fifth of the rows, so that one step is compiled."""
        if self.sizes is None:
            copies = pandas.concat([table, table[: int(0.5 * len(table))]], ignore_index=True)
            self.sizes = read_table(copies).on(self.prior.layout, self.times, quality=[]).sizes

    def scores(self, states: np.ndarray, table: Any, seed: int) -> dict[str, float]:
        """RMSE without and with checks, share of the faults that are caught, share of good rows that are not used."""
        read = read_table(table)
        rmse: dict[str, float] = {}
        unchecked = read.on(self.prior.layout, self.times, quality=[], sizes=self.sizes)
        rmse["unchecked"], _ = self._run("unchecked", unchecked, states, seed)
        checked = read.on(self.prior.layout, self.times, quality=self.checks, sizes=self.sizes)
        rmse["checked"], feedback = self._run("checked", checked, states, seed)
        bias = InstrumentBias.estimate(feedback, self.times, "station", stddev=2.0)
        again = read.on(self.prior.layout, self.times, quality=self.checks, sizes=self.sizes, bias=bias)
        rmse["bias removed"], _ = self._run("checked", again, states, seed)
        found = _caught(feedback)
        still = [*self.checks, Tracks(still=48.0)]
        for name, checks, ending in (
            ("no suspects", [*_blacklists(feedback), *self.checks], " 2"),
            ("no still ships", still, " still"),
        ):
            again = read.on(self.prior.layout, self.times, quality=checks, sizes=self.sizes)
            if again.rows["flag"].equals(checked.rows["flag"]):  # the same run
                rmse[name], second = rmse["checked"], feedback
            else:
                rmse[name], second = self._run("checked", again, states, seed)
            found |= {f"{key}{ending}": value for key, value in _caught(second).items()}
        return {**found, **rmse}

    def _run(self, name: str, placed: Any, states: np.ndarray, seed: int) -> tuple[float, Any]:
        guess_key, run_key = jax.random.split(jax.random.key(seed))
        guess = self.experiment.first_guess(guess_key, self.prior, jnp.asarray(states[0]))
        filter = self.filters[name]
        filter.run(run_key, guess, placed.xs)
        result = filter.result
        background = result.background["y"]
        rejected = result.rejected["y"].any(0) if "y" in result.rejected else None
        feedback = placed.feedback(
            rejected=rejected, background=background.mean[0], background_variance=background.variance[0]
        )
        feedback["background_spread"] = np.sqrt(feedback["background_variance"])
        error = result.posterior["x"][0].mean(0) - states[1:]
        squares = (error / np.asarray(self.prior.state_scale))[self.spin_up :] ** 2
        weights = held_suarez_demo.area_weights(self.prior)[..., None]
        mean = np.sum(squares * weights, axis=(1, 2)) / (weights.sum() * squares.shape[2])
        return float(np.sqrt(mean.mean())), feedback


def _caught(feedback: Any) -> dict[str, float]:
    """Share of the faults that are caught, and share of good rows that are not used."""
    bad, used = feedback["bad"].to_numpy(bool), (feedback["flag"] == "used").to_numpy()
    return {
        "caught": float(np.mean(~used[bad])) if bad.any() else float("nan"),
        "false alarms": float(np.mean(~used[~bad])),
    }


def _blacklists(feedback: Any) -> list[Blacklist]:
    """Suspect stations of a run, as `quality.blacklist_file` of a second run takes them."""
    suspects = Findings(feedback.drop(columns="background_variance")).suspects()
    found = []
    for variable, rows in suspects.groupby("variable", dropna=False):
        variables = (variable,) if isinstance(variable, str) else ()
        found.append(Blacklist(tuple(rows["station"]), variables=variables))
    return found


def _nothing() -> Any:
    """Table without rows."""
    columns = ("time", "lat", "lon", "variable", "observation")
    return pandas.DataFrame({name: pandas.Series(dtype=object) for name in columns})


def main(
    stations: Annotated[int, typer.Option(min=20, help="Number of stations; each observes four values.")] = 60,
    cycles: Annotated[int, typer.Option(min=2, help="Number of steps.")] = 12,
    spin_up: Annotated[int, typer.Option(min=0, help="Steps that are not scored.")] = 4,
    particles: Annotated[int, typer.Option(min=2, help="Members of the filter.")] = 32,
    truths: Annotated[int, typer.Option(min=1, max=4, help="Number of truths.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Fault to run; may be repeated; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print what each fault costs, and what is caught of it."""
    if spin_up >= cycles:
        raise typer.BadParameter(f"spin_up={spin_up} leaves nothing of {cycles} cycles; give a smaller one.")
    if unknown := sorted(set(only or ()) - set(FAULTS)):
        raise typer.BadParameter(f"no fault called {', '.join(unknown)}; give one of {', '.join(FAULTS)}.")
    prior = ndda.load_prior("held_suarez")
    times = np.datetime64("2026-01-01") + np.arange(cycles) * np.timedelta64(12, "h")
    run = Runs(prior, times, particles, spin_up)
    console, found = Console(), dict[str, list[dict[str, float]]]()
    wanted = only or list(FAULTS)
    steps = [(truth, fault) for truth in range(truths) for fault in wanted]
    rows: list[dict[str, Any]] = []
    for truth, fault in track(steps, "filtering", console=console, transient=True):
        states = held_suarez_truth.truth()[truth * cycles : (truth + 1) * cycles + 1]
        rng = np.random.default_rng(truth)
        clean = clean_table(rng, prior, states[1:], times, stations)
        run.reserve(clean)
        found.setdefault(fault, []).append(run.scores(states, with_fault(rng, clean, fault), truth))
        rows = [
            {"fault": name, **{k: v for key in each[0] for k, v in mean_and_error(key, [s[key] for s in each]).items()}}
            for name, each in found.items()
        ]
        write_json(out, {"stations": stations, "cycles": cycles, "particles": particles, "truths": truths}, rows=rows)
    title = f"{stations} stations, {cycles} steps, N = {particles}, {truths} truths"
    shares = {f"{name}{run}": form for run in ("", " 2", " still") for name, form in SHARES.items()}
    columns = {"fault": "", **shares, **dict.fromkeys(COLUMNS, ".3f")}
    print_table(console, title, rows, columns)


if __name__ == "__main__":
    typer.run(main)
