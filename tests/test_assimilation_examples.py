"""The worked examples of `examples/assimilation`: the faults of their tables, and the commands from table to report."""

import importlib.util
import json

import numpy as np
import pandas
import pytest
import xarray
from conftest import EXAMPLES, load_program
from typer.testing import CliRunner

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.commands import app
from numpyro_diffusion_da.observation import Bounds, Duplicates, read_table

FOLDER = EXAMPLES / "assimilation"


def example(name, **options):
    load_program(FOLDER / f"{name}.py").main(**options)


def run(*arguments):
    """Output of a command of `ndda` that succeeds."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    return done.output


def configuration(name, folder, **changes):
    """Configuration of an example in another folder, with other values."""
    text = (FOLDER / name / "run.toml").read_text()
    for before, after in changes.values():
        assert before in text
        text = text.replace(before, after)
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_the_table_of_ten_minutes_has_the_faults_that_it_names(tmp_path):
    example("stations", out=tmp_path, cycles=6, land=8, sondes=8, ships=2, aircraft=3)
    prior = ndda.load_prior("held_suarez")
    times = np.datetime64("2026-01-01T00") + np.arange(6) * np.timedelta64(12, "h")
    table = read_table(str(tmp_path / "stations.csv"))
    rows = table.on(prior.layout, times, window="3h", quality=[Bounds.of(prior), Duplicates()]).rows

    def flags(station, variable=None):
        some = rows[(rows["station"] == station) & (variable is None or rows["variable"] == variable)]
        return set(some["flag"]), some

    assert flags("L001")[0] == {"out of bounds"}
    assert flags("L002")[0] == {"missing", "used"}
    assert flags("R003", "t")[0] == {"out of bounds"}
    assert flags("R003", "u")[0] == flags("R001", "t")[0] == flags("R004")[0] == {"used"}
    for station in ("L004", "R005"):
        assert (flags(station)[1]["flag"] == "duplicate").mean() == 0.5
    assert (flags("L005")[1]["flag"] == "repeated report").mean() == 0.5
    ship = flags("SHIP1")[1]
    assert (ship["flag"] == "missing").sum() == 1
    assert np.ptp(ship["lon"].dropna()) > 2
    assert set(rows["cycle"][rows["lon"].between(0.0, 90.0)]) == {0, 1, 2, 3}
    # The others are of the truth: bilinear interpolation, and the drift of one thermometer.
    with xarray.open_dataset(tmp_path / "truth.nc", engine="h5netcdf") as truth:
        wrapped = truth.pad(longitude=1, mode="wrap").assign_coords(
            longitude=np.concatenate([truth.longitude[-1:] - 360, truth.longitude, truth.longitude[:1] + 360])
        )
        good = rows[(rows["flag"] == "used") & rows["variable"].isin(["sp", "t"])]
        for name, some in good.groupby("name"):
            at = {"time": times[some["cycle"]], "latitude": some["lat"], "longitude": some["lon"] % 360}
            field = wrapped[name]
            if name == "temperature":
                at["level"] = some["pres"] / 100.0
            exact = field.interp({key: xarray.DataArray(np.asarray(value), dims="row") for key, value in at.items()})
            days = (times[some["cycle"]] - times[0]) / np.timedelta64(24, "h")
            drift = 1.5 * days * ((some["station"] == "R004") & (name == "temperature"))
            departure = (some["value"] - exact.to_numpy() - drift) / some["error_used"]
            assert np.sqrt(np.mean(departure**2)) == pytest.approx(1.0, abs=4 / np.sqrt(2 * len(some)))


@pytest.mark.slow
def test_ten_minutes_from_a_table_to_a_report(tmp_path):
    example("stations", out=tmp_path, cycles=3, land=12, sondes=8, ships=2, aircraft=3)
    small = {"end": ('end = "2026-01-04T12"', 'end = "2026-01-02T00"')}
    small["filter"] = ("[output]", '[filter]\nmethod = "enkf"\nparticles = 4\n\n[output]')
    path = configuration("ten_minutes", tmp_path, **small)
    check = run("assimilate", path, "--check")
    assert "bounds" in check  # the heading of a column
    assert not (tmp_path / "run").exists()
    run("assimilate", path)
    scores = run("verify", tmp_path / "run", "--against", tmp_path / "truth.nc")
    # Each score is a line of its own that fits a console.
    known = pandas.read_csv(tmp_path / "run" / "verification.csv")
    rows = [line for line in scores.splitlines() if line.split()[:1] and line.split()[0] in set(known["variable"])]
    assert len(rows) == len(known) > 0
    assert max(map(len, rows)) <= 80
    run("report", tmp_path / "run")
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    feedback = pandas.read_parquet(tmp_path / "run" / "feedback.parquet")
    assert len(feedback) == len(pandas.read_csv(tmp_path / "stations.csv"))
    assert (feedback["flag"][feedback["station"] == "L001"] == "out of bounds").all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this run was interrupted")
def test_a_month_with_gaps_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Six times, of which the last three and another one have no rows; the process is stopped before the fourth."""
    example("stations", out=tmp_path, cycles=6, land=12, sondes=8, ships=2, aircraft=3, gaps=0.2)
    small = {"end": ('end = "2026-01-30T12"', 'end = "2026-01-03T12"')}
    small["filter"] = ('method = "enkf"', 'method = "enkf"\nparticles = 4')
    path = configuration("month", tmp_path, **small)
    monkeypatch.setattr("numpyro_diffusion_da.inference.chunks.LONGEST", 1)
    store = "numpyro_diffusion_da.inference.storage.RunStore.save"
    save, saved = ndda.inference.storage.RunStore.save, []

    def stopped(store, chain, first, *rest):
        saved.append(first)
        if len(saved) == 4:
            raise KeyboardInterrupt
        save(store, chain, first, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(store, stopped)
        done = CliRunner().invoke(app, ["assimilate", str(path)])
    assert done.exit_code == 130
    assert "The same command goes on" in done.output
    run("assimilate", path)
    cycles = pandas.read_csv(tmp_path / "run" / "cycles.csv")
    assert len(cycles) == 6
    assert (cycles["used"] == 0).sum() >= 3
    assert cycles["used"][0] > 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["particles"] == 4
    with xarray.open_zarr(tmp_path / "run" / "analysis.zarr", group="mean", chunks=None) as mean:
        # Cycles without rows are forecasts, and are written as the others: none is left at the fill value.
        assert np.isfinite(mean["surface_pressure"]).all()
        assert mean.sizes["time"] == 6


@pytest.mark.gencast
@pytest.mark.skipif(
    importlib.util.find_spec("weathernext") is None,
    reason="google-deepmind's weathernext is not installed (it is not on PyPI; see the README)",
)
def test_gencast_from_a_table(tmp_path):
    example("gencast_stations", out=tmp_path, steps=2, stations=20)
    small = {"end": ("2019-03-31T00", "2019-03-30T12"), "filter": ("particles = 8", "particles = 2")}
    run("assimilate", configuration("gencast", tmp_path, **small))
    feedback = pandas.read_parquet(tmp_path / "run" / "feedback.parquet")
    assert set(feedback["cycle"]) == {0, 1}
    # The weights are random, so no value is known; each row that is used has its background.
    assert np.isfinite(feedback["background"][feedback["flag"] == "used"]).all()
