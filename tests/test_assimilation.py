"""From a configuration and a table to analyses on disk: `ndda.assimilation` and the commands of `ndda`."""

import inspect
import json
import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas
import pytest
import xarray
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da import commands
from numpyro_diffusion_da.assimilation import (
    Emulator,
    RunConfig,
    assimilate,
    assimilation_program,
    bias_of,
    first_guess,
    forecast,
    prepare,
    run_prepared,
    verify,
)
from numpyro_diffusion_da.fields import Layout, Variable
from numpyro_diffusion_da.spelling import spelled, spelled_observation, spelled_step

MEAN = np.array([280.0, 1000.0], np.float32)
LAYOUT = Layout(
    (4, 6, 2),
    ("latitude", "longitude", "channel"),
    {"latitude": np.linspace(-75, 75, 4), "longitude": np.arange(0, 360, 60.0)},
    variables=(Variable("2m_temperature", "K"), Variable("surface_pressure", "hPa")),
)
TABLES = {
    "prior": {"name": "held_suarez"},
    "times": {"start": "2026-01-01T00", "end": "2026-01-02T12"},
    "observations": {"files": "a.csv"},
}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"filter": {"particels": 3}}, r"\[filter\] has no key 'particels'; the nearest known one is 'particles'\."),
        ({"fliter": {}}, "has no table 'fliter'; the nearest known one is 'filter'"),
        ({"output": {"particles": 3}}, r"\[output\] has no key 'particles'; it belongs to \[filter\]"),
        ({"filter": {"particles": 3.5}}, r"filter.particles is 3.5; it should be a whole number \("),
        ({"filter": {"particles": True}}, "filter.particles is True; it should be a whole number"),
        ({"filter": {"particles": 1}}, "filter.particles is 1; it should be 2 or more"),
        ({"filter": 3}, "filter is 3; it should be a table"),
        ({"filter": {"method": "enfk"}}, "filter.method is 'enfk'; it should be 'fa_apf', 'enkf', 'guided_pf' or"),
        ({"times": {"start": "now", "end": "2026-01-02"}}, "times.start: it should be a time such as .* not 'now'"),
        ({"times": {"start": "2026-01-02", "end": "2026-01-01"}}, "end = .* is before start = .*; give them in order"),
        ({"times": {"start": "2026-01-02"}}, r"times.end is missing; add it \(time of the last analysis\)"),
        ({"quality": {"withheld": 2}}, "quality.withheld is 2; it should be less than 1 or a list"),
        ({"quality": {"blacklist": {"kinds": ["a"]}}}, "quality.blacklist.kinds is 'kinds'; it should be 'stations'"),
        ({"quality": {"blacklist": {"types": []}}}, "quality.blacklist: it names no stations, types or variables"),
        ({"errors": {"t": -1}}, "errors.t is -1; it should be more than 0"),
        ({"prior": {"gencast": "a.npz"}}, "prior: gencast needs stats too; add it"),
        ({"first_guess": {"kind": "ensemble"}}, 'first_guess: kind = "ensemble" needs file'),
        ({"observations": {"files": []}}, "observations.files: it is empty; name one file or more"),
        ({"observations": {"files": ["a"], "window": "x"}}, 'observations.window: it should be a width such as "6h"'),
        ({"observations": {"files": ["a"], "window": ["0h", "0h"]}}, "observations.window: it should be a width such"),
        (
            {"observations": {"files": ["a"], "window": ["1h"] * 3}},
            "window is .*; it should be a text or a list of 2 at",
        ),
        (
            {"prior": {"name": "held_suarez", "stats": "a"}},
            "prior: stats is not used with name, only with gencast; lea",
        ),
        ({"prior": {"precision": "bfloat16"}}, "prior: precision is not used without a checkpoint, only with gencast "),
        (
            {"first_guess": {"spread": 0.5}},
            'spread is not used with kind = "climatology", only with "frames"; leave it',
        ),
        (
            {"filter": {"method": "enkf", "guidance": "cheap"}},
            'filter: guidance is not used with method = "enkf", only with "fa_apf" or "guided_pf"; leave it out',
        ),
        ({"filter": {"method": "bootstrap", "taper_km": 2500.0}}, 'taper_km is not used with method = "bootstrap", o'),
        (
            {"filter": {"method": "enkf", "likelihood": "huber"}},
            'filter: likelihood = "huber" has errors that are not Gaussian, which method = "enkf" needs; give likelih',
        ),
        ({"filter": {"huber_threshold": 2}}, 'threshold is not used with likelihood = "normal", only with "huber"; l'),
        ({"quality": {"bounds": False, "bounds_factor": 9}}, "bounds_factor is not used with bounds = false; leave"),
        ({"observations": {"files": "a", "bias_by": ["type"]}}, "bias_by is not used without bias_from; leave it out"),
    ],
)
def test_a_wrong_configuration_is_refused_by_its_key(tables, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**{**TABLES, **tables})


def test_a_configuration_from_a_file(tmp_path):
    """Paths are relative to the file, and the text of a configuration reads as the same one."""
    path = tmp_path / "run.toml"
    path.write_text(
        '[times]\nstart = 2026-01-01T01:00:00+01:00\nend = 2026-01-02\n[observations]\nfiles = ["b\\"c.csv"]\n'
    )
    config = RunConfig.read(path)
    assert config.times.start == "2026-01-01T00:00:00"
    assert config.observations.files == (tmp_path / 'b"c.csv',)
    assert config.output.folder == tmp_path / "run"
    path.write_text(config.to_toml())
    assert RunConfig.read(path) == config
    path.write_text("[times")
    with pytest.raises(ValueError, match=r"run.toml: it is not TOML \(.*\); texts need quotation"):
        RunConfig.read(path)
    path.write_text("[filter]\nparticels = 3\n")
    with pytest.raises(ValueError, match=r"run.toml: \[filter\] has no key 'particels'"):
        RunConfig.read(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*; give the path of a configuration"):
        RunConfig.read(tmp_path / "none.toml")


def prior_of(frames=1):
    """Relaxation to a mean, with independent errors; conditioned on one state or on two."""

    def forecast(state):
        mean = jnp.broadcast_to(MEAN, LAYOUT.shape)
        return mean + 0.9 * ((state if frames == 1 else state[1]) - mean)

    climate = dist.Normal(jnp.broadcast_to(MEAN, LAYOUT.shape), jnp.full(LAYOUT.shape, 4.0)).to_event(3)
    scale = np.array([1.0, 2.0], np.float32)
    if frames == 1:
        return ndda.priors.DeterministicPrior(forecast, layout=LAYOUT, scale=scale, climatology=climate)

    class Pairs(ndda.priors.DeterministicPrior):
        """A prior with forcings, as those of the weather models."""

        TIME_STEP = np.timedelta64(6, "h")

        def forcings(self, times):
            return jnp.arange(1.0 * len(times))

    return Pairs(forecast, layout=LAYOUT, scale=scale, condition=lambda pair, inputs: (pair[0] + 0.0 * inputs, pair[1]))


def table_of(steps=3):
    """Twelve stations with both variables at each step, two gross errors, and one row that is off all windows."""
    rng = np.random.default_rng(0)
    place = pandas.DataFrame({"lat": rng.uniform(-70, 70, 12), "lon": rng.uniform(0, 360, 12)})
    parts = [
        place.assign(
            time=pandas.Timestamp("2026-01-01") + pandas.Timedelta(hours=6 * t),
            station=[f"S{i}" for i in range(12)],
            variable=name,
            observation=mean + rng.normal(size=12),
            group=[f"G{i % 4}" if name == "sp" else None for i in range(12)],
        )
        for t in range(steps)
        for name, mean in (("t2m", 280.0), ("sp", 1000.0))
    ]
    table = pandas.concat(parts, ignore_index=True)
    table.loc[[14, 15], "observation"] = 1100.0
    table.loc[1, "time"] = pandas.Timestamp("2026-02-01")
    return table


def configuration(tmp_path, **tables):
    table_of().to_csv(tmp_path / "a.csv", index=False)
    return RunConfig(
        times={"start": "2026-01-01T00", "end": "2026-01-01T12", "step": "6h"},
        **{
            "observations": {"files": tmp_path / "a.csv", "window": "2h"},
            "errors": {"2m_temperature": 1.0, "surface_pressure": 1.0},
            "quality": {"withheld": ["S3", "S4"], "bounds": False},
            "filter": {"method": "enkf", "particles": 6, "taper_km": 3000},
            "output": {"folder": tmp_path / "run", "members": 4},
            **tables,
        },
    )


def test_check_places_every_row_and_writes_nothing(tmp_path):
    report = prepare(configuration(tmp_path), prior=prior_of()).report()
    assert report.startswith("59 of 72 rows are used at 3 times, 0 of them without any.")
    assert "surface_pressure: 2 of 12 stations are withheld, 6 of 36 rows." in report
    assert "3 steps of 6 h, from 2026-01-01T00:00:00 to 2026-01-01T12:00:00, with 6 particles." in report
    # A forecast of one pass is its conditioning.
    assert "About 0 network passes per particle and step, and 1 of the conditioning network: 18 in all." in report
    assert not (tmp_path / "run").exists()


def correlated(tmp_path, **tables):
    observations = {"files": tmp_path / "a.csv", "window": "2h", "correlation": 0.5}
    return configuration(tmp_path, **{"observations": observations, **tables})


def test_groups_have_correlated_errors(tmp_path):
    """The key `correlation` makes one event of each group, with a covariance of half the variance."""
    run = prepare(correlated(tmp_path), prior=prior_of())
    assert "30 rows in 12 groups have errors with the correlation 0.5." in run.report()
    config = correlated(tmp_path)
    table_of().assign(group="G").to_csv(tmp_path / "a.csv", index=False)
    said = prepare(config, prior=prior_of()).report()
    assert "rows are used at 3 times, 0 of them without any." in said
    # The whole group has one place for the taper.
    assert "row 2: rows of the group 'G' are up to" in said
    assert (
        "(3 groups are so wide), but the filter takes all of a group to be there, and filter.taper_km is 3000;" in said
    )
    program = assimilation_program(run.emulator, run.placed.operator, run.first_guess, run.config.filter)
    trace = numpyro.handlers.trace(numpyro.handlers.seed(program, 0)).get_trace(run.inputs)
    at = {name: trace[name]["fn"].base_dist for name in ("y", "y_groups")}
    seen, rows = np.asarray(at["y"].loc), run.inputs["groups"]["rows"]
    np.testing.assert_allclose(at["y_groups"].loc, np.take_along_axis(seen[:, None], rows, axis=2), rtol=1e-6)
    # Rows with one group of station S0, S4, S8, of which S4 is withheld.
    np.testing.assert_allclose(at["y_groups"].covariance_matrix[0, 0, :3, :3], [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    assert dict(run.algorithm.algorithm.taper.observations) == {"y": "y_place", "y_groups": "y_groups_place"}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"observations": {"files": "a.csv", "correlation": 0.5}, "filter": {"likelihood": "huber"}},
            "observations.correlation is 0.5, but filter.likelihood = 'huber' has independent errors",
        ),
        ({"prior": {"name": "held_suarez"}}, "prepare got a prior, and prior.name names one too; leave one of them"),
        ({"quality": {"bounds_factor": 9}}, "bounds_factor is 9, but DeterministicPrior has no statistics of its clim"),
        ({"filter": {"guidance": "cheap"}}, "filter.guidance is 'cheap', but DeterministicPrior draws in one pass"),
        ({"output": {"members": 7}}, "output.members is 7, but the filter has 6 particles; give as many or fewer"),
        ({"filter": {"sampler": "fast"}}, "filter.sampler is 'fast', but DeterministicPrior draws in one pass"),
        (
            {"filter": {"error_factor": 1.3}},
            "filter.error_factor is 1.3, but DeterministicPrior has no with_errors_times",
        ),
        ({"first_guess": {"kind": "frames", "file": "none.nc"}}, r"there is no file 'none.nc'; give a NetCDF file or"),
        ({"errors": {"sp": 1.0}}, r"a.csv, row 2: '2m_temperature' has no error"),
        ({"errors": {"t3m": 1.0}}, "errors names 't3m', which is not known, or is it 't2m'"),
        ({"quality": {"height_difference": 100}}, "quality.height_difference needs .*; give prior.surface"),
    ],
)
def test_what_does_not_fit_the_prior_is_refused(tmp_path, tables, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(configuration(tmp_path, **tables), prior=prior_of())


def test_stations_that_are_numbers(tmp_path):
    """A whole number names the station with this text, whatever the file makes of it, and what is not there is said."""
    quality = {"withheld": [3, "4"], "blacklist": {"stations": [5, 77]}, "bounds": False}
    for name, ids in (("a.csv", range(12)), ("b.csv", np.arange(12.0)), ("c.parquet", range(12))):
        table = table_of().assign(station=lambda some, ids=ids: np.resize(np.array(ids), len(some)))
        given = {"files": tmp_path / name, "window": "2h"}
        config = configuration(tmp_path, quality=quality, observations=given)
        getattr(table, "to_csv" if name.endswith("csv") else "to_parquet")(tmp_path / name, index=False)
        run = prepare(RunConfig(**tomllib.loads(config.to_toml())), prior=prior_of())
        flag = run.placed.rows.groupby("station")["flag"].agg(set)
        assert (flag["3"], flag["4"], flag["5"]) == ({"withheld"}, {"withheld"}, {"blacklisted"})
        assert "the blacklist of [quality] names '77', but no row has it." in run.report()
    table.assign(station="0" + table["station"].astype(str)).to_csv(tmp_path / "a.csv", index=False)
    config = configuration(tmp_path, quality=quality, errors={"t2m": 1, "sp": 1, "ship/sp": 2})
    table.assign(station="0" + table["station"].astype(str)).to_csv(tmp_path / "a.csv", index=False)
    report = prepare(config, prior=prior_of()).report()
    assert "quality.withheld names '3', but no row has it; is it '03'?" in report
    assert "no row takes its error from errors['ship/sp']." in report


def test_a_blacklist_in_a_file(tmp_path):
    """A row of the file sets aside what has all of its values; a report writes such a file."""
    path = tmp_path / "suspects.csv"
    quality = {"blacklist_file": path, "bounds": False}
    path.write_text("station,variable,why\nS1,2m_temperature,biased\n S2,,\n,surface_pressure,all\n")
    rows = prepare(configuration(tmp_path, quality=quality), prior=prior_of()).placed.rows
    listed = (rows["station"] == "S2") | (rows["name"] == "surface_pressure") | (rows["station"] == "S1")
    assert (rows["flag"][rows["cycle"] >= 0] == "blacklisted").equals(listed[rows["cycle"] >= 0])
    # Separators and formats are those of tables of observations.
    for listing, name in (("# bad\nStation_ID;variable\nS1;\n", "list.csv"), (None, "list.parquet")):
        other = tmp_path / name
        if listing is None:
            pandas.DataFrame({"station": ["S1"], "type": [None]}).to_parquet(other)
        else:
            other.write_text(listing)
        of_other = prepare(configuration(tmp_path, quality={**quality, "blacklist_file": other}), prior=prior_of())
        assert set(of_other.placed.rows["station"][of_other.placed.rows["flag"] == "blacklisted"]) == {"S1"}
    for text, message in (
        ("station,type,why\nS1,a,\n,,b\n", "suspects.csv, row 3: it names no station, type or variable; take it out"),
        ("name\nS1\n", "suspects.csv' has the columns name; give one or more of station, type and variable"),
        ("", "quality.blacklist_file: suspects.csv is empty"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            prepare(configuration(tmp_path, quality=quality), prior=prior_of())
    path.write_text("station,variable,why\n")  # a run without suspects
    assert "blacklisted" not in set(
        prepare(configuration(tmp_path, quality=quality), prior=prior_of()).placed.rows["flag"]
    )


@pytest.mark.parametrize(
    ("change", "tables", "message"),
    [
        ({"lat": "north"}, {}, 'no column \'lat\'.* Name it: observations.columns = {"your name" = "lat"}.'),
        ({}, {"columns": {"a": "lat"}}, "no column 'a', which observations.columns names"),
        ({"lat": "LAT", "group": "latitude"}, {}, "has 'LAT' and 'latitude' for .*columns = {LAT = .lat.}"),
        ({}, {"correlation": 0.5, "columns": {"group": "g"}}, 'is: observations.columns = {"your name" = "group"}'),
        (
            {"name": "t3m"},
            {},
            r"observations.variables = {t3m = ...}, of .* with observations.variables = {t3m = fals",
        ),
        ({"value": 2.0}, {}, r"give a column units, or observations.units = {t2m = ...}\."),
        (
            {},
            {"window": None},
            r"such as observations.window = .3h., .*, such as observations.window = \[.3h., .0h.\]",
        ),
        ({}, {"errors": {}}, r"'2m_temperature' has no error .* or errors = {2m_temperature = ...} in K"),
        ({}, {"accepted": [1]}, "the table has no column 'quality' for quality.accepted; it has"),
    ],
)
def test_messages_name_keys_where_a_configuration_gives_the_arguments(tmp_path, change, tables, message):
    """The same errors name the arguments `columns=` and others where a program reads the table."""
    rest = {name: tables.pop(name) for name in ("errors",) if name in tables}
    rest |= {"quality": {"accepted": tables.pop("accepted")}} if "accepted" in tables else {}
    given = {"files": tmp_path / "a.csv", "window": "2h"} | tables
    config = configuration(tmp_path, observations={k: v for k, v in given.items() if v}, **rest)
    if given["window"] is None:
        one = {"start": "2026-01-01T00", "end": "2026-01-01T00", "step": "6h"}
        config = config.model_copy(update={"times": RunConfig(**{**TABLES, "times": one}).times})
    table = table_of().rename(columns=change)
    if "name" in change:
        table["variable"] = change["name"]
    table["observation"] = change.get("value", table["observation"])
    table.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(ValueError, match=message):
        prepare(config, prior=prior_of())


def test_times(tmp_path):
    prior = prior_of()
    for times, message in (
        ({"start": "2026-01-01T00", "end": "2026-01-01T09", "step": "6h"}, "last step before it is at 2026-01-01T06"),
        (
            {"start": "2026-01-01T00", "end": "2026-01-01T12"},
            "times.step is missing, and DeterministicPrior states none",
        ),
        ({"start": "1900-01-01", "end": "2026-01-01", "step": "1h"}, "steps; give 100000 at most"),
    ):
        config = configuration(tmp_path).model_copy(update={"times": RunConfig(**{**TABLES, "times": times}).times})
        with pytest.raises(ValueError, match=message):
            prepare(config, prior=prior)


def states_of(members, times):
    """Dataset of states that count members and times."""
    values = (
        MEAN + np.arange(members)[:, None, None, None, None] + 10.0 * np.arange(len(times))[None, :, None, None, None]
    )
    values = np.broadcast_to(values, (members, len(times), *LAYOUT.shape))
    return ndda.fields.to_dataset(values, LAYOUT, {"number": np.arange(members), "time": times})


def guess_of(tmp_path, prior, **settings):
    config = configuration(tmp_path, first_guess={"file": tmp_path / "b.nc", **settings})
    return first_guess(config.first_guess, Emulator.of(config, prior), np.datetime64("2026-01-01T00:00:00"))


def test_first_guesses_that_a_file_does_not_have(tmp_path):
    prior, path = prior_of(), tmp_path / "b.nc"
    states_of(5, ["2025-12-31T12", "2025-12-31T18"]).to_netcdf(path, engine="h5netcdf")
    mean = guess_of(tmp_path, prior, kind="ensemble").mean  # members count from 0 to 4, times by 10
    np.testing.assert_allclose(mean, np.broadcast_to(MEAN + 12.0, LAYOUT.shape))
    with pytest.raises(ValueError, match=r"b.nc' has several members; give kind = \"ensemble\""):
        guess_of(tmp_path, prior, kind="frames")
    states_of(1, ["2026-01-01T00"]).isel(number=0).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match=r"no state at 2025-12-31T18:00:00.* or start at 2026-01-01T06:00:00"):
        guess_of(tmp_path, prior, kind="frames")


def test_advice_on_forecasts_in_a_file_is_a_program_that_mends_it(tmp_path, monkeypatch):
    """Files with an axis of steps, or of versions, become ones that are read by what the message says."""
    prior, path = prior_of(), tmp_path / "b.nc"
    monkeypatch.chdir(tmp_path)
    whole = states_of(5, ["2025-12-31T12", "2025-12-31T18"])
    steps = whole.assign_coords(time=np.array([0, 6], "m8[h]")).rename(time="step")
    steps = steps.assign_coords(time=np.datetime64("2025-12-31T12", "ns"))
    final = whole.time < np.datetime64("2025-12-31T18")
    versions = xarray.concat([whole.where(final), whole.where(~final)], "expver").assign_coords(expver=["1", "5"])
    expected = np.broadcast_to(MEAN + 12.0, LAYOUT.shape)
    for dataset in (steps, versions):
        dataset.to_netcdf(path, engine="h5netcdf")
        with pytest.raises(ValueError, match="by Python, and give that one: import xarray; dataset = ") as caught:
            guess_of(tmp_path, prior, kind="ensemble")
        exec(str(caught.value).split("give that one: ")[1].removesuffix("."), {})
        (tmp_path / "changed.nc").replace(path)
        np.testing.assert_allclose(guess_of(tmp_path, prior, kind="ensemble").mean, expected)


def test_messages_of_a_run_name_rows_and_times(tmp_path, monkeypatch):
    """A program has sites and steps; a user of a configuration has rows, and times of the analyses."""
    run = prepare(correlated(tmp_path), prior=prior_of())
    ids, groups, said = run.placed.xs["id"], run.placed.xs["groups"], []

    def failing(*_):
        own = next(m for m, row in enumerate(ids[1]) if row == 26)  # without a group
        group, k = np.argwhere((ids[1][groups["rows"][1]] == 38) & np.isfinite(groups["y"][1]))[0]
        said.extend((spelled_observation("y", 1, (own,)), spelled_observation("y_groups", 1, (group, k))))
        raise FloatingPointError(spelled_step(1))

    monkeypatch.setattr(ndda.Filter, "run", failing)
    with pytest.raises(FloatingPointError, match="2026-01-01T06:00:00"):
        run_prepared(run)

    def lost(*_):
        raise FloatingPointError(f"no draw of site 'x', given site 'y', is finite; use {spelled('inflation')}")

    monkeypatch.setattr(ndda.Filter, "run", lost)
    for method, key in (("enkf", "filter.inflation"), ("bootstrap", "filter.error_factor")):
        config = configuration(tmp_path, filter={"method": method}, output={"folder": tmp_path / method})
        with pytest.raises(FloatingPointError, match=f"^no draw of the state, given the table, is finite; use {key}$"):
            run_prepared(prepare(config, prior=prior_of()))
    assert said == [
        "a.csv, row 28 ('2m_temperature' of station 'S2')",
        "a.csv, row 40 ('surface_pressure' of station 'S2')",
    ]
    assert spelled_observation("y", 1, (3,)) == "site 'y[3]'"
    assert spelled_step(1) == "step 1"


@pytest.mark.slow
def test_draws_of_first_guesses(tmp_path):
    """Draws have an ensemble's mean and covariance; frames have anomalies of the climate added."""
    prior, path = prior_of(), tmp_path / "b.nc"
    states_of(5, ["2025-12-31T12", "2025-12-31T18"]).to_netcdf(path, engine="h5netcdf")
    for smoothing in (0.0, 0.5, 1.0):
        ensemble = guess_of(tmp_path, prior, kind="ensemble", smoothing=smoothing)
        draws = ensemble.sample(jax.random.key(0), (4000,))[:, 0, 0, 0] - MEAN[0] - 10.0
        np.testing.assert_allclose(draws.mean(), 2.0, atol=0.1)  # members 0 to 4 have the mean 2 and the variance 2
        np.testing.assert_allclose(draws.var(), 2.0, atol=0.15)
        assert (np.unique(np.round(draws, 3)).size == 5) == (smoothing == 0.0)
    states_of(1, ["2025-12-31T12", "2025-12-31T18"]).isel(number=0).to_netcdf(path, engine="h5netcdf")
    frames = guess_of(tmp_path, prior, kind="frames", spread=0.5)
    draws = np.asarray(jax.vmap(frames.sample)(jax.random.split(jax.random.key(0), 200)))
    np.testing.assert_allclose(draws.mean((0, 1, 2)), MEAN + 10.0, atol=0.1)
    np.testing.assert_allclose(draws.std((0, 1, 2)), 2.0, rtol=0.05)
    pairs = guess_of(tmp_path, prior_of(2), kind="frames").sample(jax.random.key(0))
    both = np.broadcast_to(MEAN + 10.0 * np.arange(2)[:, None, None, None], (2, *LAYOUT.shape))
    np.testing.assert_array_equal(pairs, both)
    with pytest.raises(ValueError, match=r"b.nc' has no members: none of the dimensions number, realization"):
        guess_of(tmp_path, prior, kind="ensemble")


def test_biases_of_an_earlier_run_are_removed(tmp_path):
    """Station S5 is 2 too high in a first run: most of it is known at the last step, nothing at the first."""
    config, prior = configuration(tmp_path), prior_of()
    rows = prepare(config, prior=prior).placed.rows
    off = np.where(rows["station"] == "S5", 2.0, 0.0)
    rows = rows.assign(background=rows["value"] - off, background_spread=0.1)
    first = tmp_path / "first"
    first.mkdir()
    with pytest.raises(ValueError, match="first' holds no finished run; give the folder of one"):
        bias_of(first, ("station",))
    times = ["2026-01-01T00", "2026-01-01T06", "2026-01-01T12"]
    (first / "run.json").write_text(json.dumps({"times": times, "prior_checksum": "a", "members": 4}))
    rows.to_parquet(first / "feedback.parquet")
    with pytest.raises(ValueError, match=r"bias_by names 'satellite', but the rows of .*first' have no such column"):
        bias_of(first, ("satellite",))
    given = {"files": tmp_path / "a.csv", "window": "2h", "bias_from": first}
    second = prepare(configuration(tmp_path, observations=given), prior=prior).placed.rows
    removed = second[second["station"] == "S5"].groupby("cycle")["bias_removed"].mean()
    assert removed[0] == 0.0
    assert 0.8 < removed[1] < removed[2] < 2.0
    assert (second.loc[second["station"] == "S6", "bias_removed"].abs() < 0.1).all()


@pytest.mark.slow
def test_a_run_from_a_table_to_a_forecast(tmp_path):
    """Analyses, feedback, cycles, forecast and scores of a small run, against their definitions."""
    config, prior = correlated(tmp_path, output={"folder": tmp_path / "run", "background": True}), prior_of()
    run = assimilate(config, prior=prior, progress_bar=False)
    members, mean, spread = (run.analysis(group).load() for group in ("members", "mean", "spread"))
    for name in ("2m_temperature", "surface_pressure"):
        assert members[name].dims == ("time", "number", "latitude", "longitude")
        np.testing.assert_allclose(members[name].mean("number"), mean[name], rtol=1e-6)
        np.testing.assert_allclose(members[name].std("number", ddof=1), spread[name], rtol=1e-3)
    assert members["number"].attrs["standard_name"] == "realization"
    assert members["2m_temperature"].attrs["standard_name"] == "air_temperature"

    feedback = run.feedback()
    assert len(feedback) == 72
    assert feedback["flag"].value_counts().to_dict() == {
        "used": 58,
        "withheld": 11,
        "withheld, far from background": 1,
        "off window": 1,
        "far from background": 1,
    }
    compared = feedback[feedback["cycle"] >= 0]
    assert compared[["background", "background_spread", "analysis", "analysis_crps"]].notna().all(axis=None)
    assert feedback.loc[1, ["background", "analysis"]].isna().all()
    used = feedback[feedback["flag"] == "used"]
    assert np.mean((used["value"] - used["analysis"]) ** 2) < np.mean((used["value"] - used["background"]) ** 2)
    cycles = pandas.read_csv(run.folder / "cycles.csv")
    assert cycles[["used", "rejected", "withheld", "withheld_rejected"]].sum().tolist() == [58, 1, 11, 1]
    increment = mean.isel(time=2) - xarray.open_zarr(run.folder / "background.zarr", group="mean").isel(time=1)
    area = ndda.diagnostics.area_weights(increment["latitude"])
    expected = np.sqrt((increment["2m_temperature"] ** 2).weighted(area).mean())
    np.testing.assert_allclose(cycles["increment_rms_2m_temperature"][2], expected, rtol=1e-4)

    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assimilate(config, prior=prior)  # has finished
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    changed = correlated(tmp_path, output={"folder": tmp_path / "run", "background": True, "seed": 1})
    with pytest.raises(ValueError, match=r"holds a run with output.seed = 0, but now it is 1; give another folder"):
        assimilate(changed, prior=prior)

    # What the message advises mends a damaged file: the steps are in the store, and outputs are written anew.
    (run.folder / "feedback.parquet").write_text("")
    with pytest.raises(ValueError, match=r"feedback.parquet' is damaged .*; remove '.*run.json' and run ndda"):
        assimilate(config, prior=prior)
    (run.folder / "run.json").unlink()
    pandas.testing.assert_frame_equal(assimilate(config, prior=prior, progress_bar=False).feedback(), feedback)

    forecast(run.folder, steps=2, prior=prior)
    made = xarray.open_zarr(run.folder / "forecast.zarr").load()
    assert made["surface_pressure"].dims == ("time", "prediction_timedelta", "number", "latitude", "longitude")
    assert made.sizes == {"time": 1, "prediction_timedelta": 2, "number": 6, "latitude": 4, "longitude": 6}
    assert made["time"].values == members["time"].values[-1]
    np.testing.assert_array_equal(made["prediction_timedelta"] / np.timedelta64(1, "h"), [6, 12])
    one = made["surface_pressure"].isel(time=0, prediction_timedelta=0) - MEAN[1]
    of_members = one - 0.9 * (members["surface_pressure"].isel(time=-1) - MEAN[1])
    np.testing.assert_allclose(of_members.std(), 2.0, rtol=0.15)
    assert abs(of_members.mean()) < 0.5

    later = made.mean("number").isel(time=0, drop=True).rename(prediction_timedelta="time")
    later = later.assign_coords(time=made["time"].values + later["time"].values).isel(time=slice(1))
    xarray.concat([mean, later], "time").to_netcdf(tmp_path / "truth.nc", engine="h5netcdf")
    scores = verify(run.folder, against=tmp_path / "truth.nc", prior=prior)
    of_forecast = scores[scores["what"] == "forecast"]
    assert of_forecast["lead_hours"].tolist() == [6.0, 6.0]
    assert (of_forecast["rmse"] < 1e-3).all()
    of_truth = scores[(scores["against"] == "truth") & (scores["what"] == "analysis")].set_index("variable")
    assert (of_truth["rmse"] < 1e-4).all()
    expected = np.sqrt(7 / 6 * (spread["2m_temperature"] ** 2).weighted(area).mean())
    np.testing.assert_allclose(of_truth.loc["2m_temperature", "spread"], expected, rtol=1e-4)
    rows = scores[(scores["what"] == "analysis") & (scores["against"] == "withheld rows")].set_index("variable")
    own = feedback[(feedback["flag"] == "withheld") & (feedback["name"] == "surface_pressure")]
    np.testing.assert_allclose(
        rows.loc["surface_pressure", "rmse"], np.sqrt(np.mean((own["value"] - own["analysis"]) ** 2))
    )
    assert rows["left_out"].to_dict() == {"2m_temperature": 0, "surface_pressure": 1}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_pairs_of_states(tmp_path, monkeypatch):
    """A prior of two states; a run that ends before its outputs makes the same ones when it is started again."""
    path, prior = tmp_path / "b.nc", prior_of(2)
    states_of(6, ["2025-12-31T12", "2025-12-31T18"]).to_netcdf(path, engine="h5netcdf")
    guess = {"kind": "ensemble", "file": path}

    def run(name):
        output = {"folder": tmp_path / name, "background": True}
        times = {"start": "2026-01-01T00", "end": "2026-01-01T12"}
        config = configuration(tmp_path, first_guess=guess, output=output)
        return config.model_copy(update={"times": RunConfig(**{**TABLES, "times": times}).times})

    whole = assimilate(run("whole"), prior=prior, progress_bar=False)
    with monkeypatch.context() as broken:
        broken.setattr("numpyro_diffusion_da.assimilation.run.write_outputs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            assimilate(run("parts"), prior=prior, progress_bar=False)
    with pytest.raises(ValueError, match=r"has not finished; run ndda assimilate .*run.toml again"):
        forecast(tmp_path / "parts", steps=1, prior=prior)
    parts = assimilate(run("parts"), prior=prior, progress_bar=False)
    xarray.testing.assert_identical(whole.analysis().load(), parts.analysis().load())
    pandas.testing.assert_frame_equal(whole.feedback(), parts.feedback())
    forecast(tmp_path / "parts", until="2026-01-01T18", prior=prior)
    assert xarray.open_zarr(tmp_path / "parts" / "forecast.zarr").sizes["number"] == 6


def test_commands_say_errors_in_a_sentence(tmp_path):
    def output(*arguments):
        result = CliRunner().invoke(commands.app, [*map(str, arguments)], env={"COLUMNS": "300"})
        assert result.exit_code == 2, result.output
        return result.output

    assert "Error: there is no file" in output("assimilate", tmp_path / "run.toml")
    for command in ("forecast", "verify", "report"):
        assert f"Error: '{tmp_path}' holds no run" in output(command, tmp_path)
    (tmp_path / "run.toml").write_text("[filter]\nparticels = 3\n")
    assert "the nearest known one is 'particles'" in output("assimilate", tmp_path / "run.toml", "--check")
    assert "has not finished" in output("forecast", tmp_path)
    # A check refuses the folder that a run would refuse, after what it says of the rows.
    config = configuration(tmp_path, prior={"name": "held_suarez"}, output={"folder": tmp_path / "a.csv"})
    config = config.model_copy(update={"times": RunConfig(**TABLES).times})
    (tmp_path / "run.toml").write_text(config.to_toml())
    found = output("assimilate", tmp_path / "run.toml", "--check")
    assert "20 of 72 rows are used" in found  # surface pressure at two times, without two stations
    assert f"Error: output.folder '{tmp_path / 'a.csv'}' is no folder" in found
    # Errors of the operating system have a number in Python's words.
    config = config.model_copy(update={"output": RunConfig(**TABLES, output={"folder": tmp_path / ("a" * 300)}).output})
    (tmp_path / "run.toml").write_text(config.to_toml())
    found = output("assimilate", tmp_path / "run.toml")
    assert "(File name too long)" in found
    assert "Errno" not in found


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(28, "No space left", "a.zarr"),
            "'a.zarr' cannot be used (No space left); see that there is room, and",
        ),
        (OSError(28, "the step could not be written; make room"), "Error: the step could not be written; make room.\n"),
        (MemoryError("Unable to allocate 9 GiB"), "the memory does not suffice (Unable to allocate 9 GiB); take fewer"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            "the memory does not suffice (Out of memory allocating 9 bytes); take fewer particles, or a smaller batch",
        ),
    ],
)
def test_errors_of_the_machine_are_said_in_a_sentence(monkeypatch, error, said):
    def failing(*_):
        raise error

    monkeypatch.setattr(RunConfig, "read", failing)
    result = CliRunner().invoke(commands.app, ["assimilate", "run.toml"], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "run.json",
            "",
            r"run.json' is damaged \(Expecting value.*\); remove '.*run.json' and run ndda assim",
        ),
        ("run.json", "[1]", "run.json' is damaged"),
        ("run.json", "{}", "it has not the facts of a run"),
        ("run.toml", "[times", "run.toml: it is not TOML"),
        (
            "feedback.parquet",
            "abc",
            "feedback.parquet' is damaged .* writes the outputs anew from store.zarr",
        ),
        ("feedback.parquet", None, "feedback.parquet' is missing; remove"),
        ("cycles.csv", "a,b\n1,2\n", "cycles.csv' is damaged"),
        ("analysis.zarr/members/zarr.json", "{}", r"analysis.zarr' is damaged \(it has no group mean\)"),
        ("store.zarr/sample_stats/zarr.json", "{", "store.zarr' is damaged .* make the run again in another folder"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content, message):
    (tmp_path / "run.toml").write_text(RunConfig(**TABLES).to_toml())
    facts = {"times": ["2026-01-01T00:00:00"], "prior_checksum": "a", "members": 2}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    pandas.DataFrame({"flag": ["used"]}).to_parquet(tmp_path / "feedback.parquet")
    (tmp_path / "cycles.csv").write_text("time,used\n2026-01-01,1\n")
    run = ndda.assimilation.Run.open(tmp_path)
    assert run.facts["members"] == 2
    with pytest.raises(ValueError, match=r"analysis.zarr' is missing; remove"):
        run.analysis()
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        ndda.assimilation.Run.open(tmp_path)


def keys():
    """Rows of the table of keys, from the classes that read them."""
    for table, field in RunConfig.model_fields.items():
        for key, one in getattr(field.annotation, "model_fields", {}).items():
            default = "needed" if one.is_required() else ""
            if one.default not in (None, (), {}) and not one.is_required():
                plain = str(one.default) if isinstance(one.default, Path) else one.default
                default = f"`{json.dumps(plain)}`"
            yield " ".join(f"| `{table}.{key}` | {default} | {one.description} |".split())


def test_the_page_has_every_key():
    page = (Path(__file__).parent.parent / "docs" / "assimilate.md").read_text()
    rows = [line for line in page.split("## All keys")[1].splitlines() if line.startswith("| `")]
    assert [row for row in rows if "errors.NAME" not in row] == list(keys())
    for text in re.findall(r"```toml\n(.*?)```", page, re.DOTALL):
        RunConfig(**{**TABLES, **tomllib.loads(text)})


KEYS = {
    table: list(getattr(field.annotation, "model_fields", {"t2m": None, "a/b": None}))
    for table, field in RunConfig.model_fields.items()
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        ["2026-01-01", "2026-01-01T06", "6h", "12 h", "enkf", "frames", "a.csv", "t2m", "/", ".", "\0", "1e9d"]
    ),
    st.dates(),
    st.datetimes(),
    st.lists(st.sampled_from(["a", "6h", "a.csv", 1, -2.5, True]), max_size=3),
    st.dictionaries(st.sampled_from(["a", "stations", "t2m"]), st.sampled_from(["b", "K", 1, ["x"]]), max_size=2),
)
TABLE_OF = {
    table: st.dictionaries(st.sampled_from([*keys, "a", ""]), VALUES, max_size=3) for table, keys in KEYS.items()
}
ANY_TABLES = st.fixed_dictionaries({}, optional={**{t: s | VALUES for t, s in TABLE_OF.items()}, "fliter": VALUES})


def in_one_sentence(make):
    """A result, or an error of the kinds that the command says, in one sentence."""
    try:
        return make()
    except (ValueError, OSError) as error:
        message = str(error)
        assert message.endswith("."), message
        assert "\n" not in message, message
        assert "Traceback" not in message
        assert len(message) < 600, message


@given(ANY_TABLES)
@fuzz(40)
def test_any_tables_are_a_configuration_or_one_sentence(tables):
    config = in_one_sentence(lambda: RunConfig(**tables))
    valid = in_one_sentence(lambda: RunConfig(**{**TABLES, **tables}))
    for made in (config, valid):
        if made is not None:
            again = RunConfig(**tomllib.loads(made.to_toml()))
            assert again.values() == made.values()


@given(
    st.one_of(
        st.text(), st.binary().map(lambda b: b.decode("latin1")), st.sampled_from(["[" * 5000, "a = " + "9" * 5000])
    )
)
@fuzz(40)
def test_any_file_is_a_configuration_or_one_sentence(tmp_path, text):
    (tmp_path / "run.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    in_one_sentence(lambda: RunConfig.read(tmp_path / "run.toml"))


@pytest.mark.slow
@given(st.data())
@fuzz(150)
def test_any_configuration_is_prepared_or_refused_in_one_sentence(tmp_path, data):
    """Nothing is computed, and nothing is written beside the table."""
    prior = prior_of(1)
    base = configuration(tmp_path).model_dump(mode="python", exclude_unset=True)
    there = sorted(path.name for path in tmp_path.iterdir())
    for table in data.draw(st.lists(st.sampled_from(sorted(KEYS)), max_size=2)):
        base[table] = {**base.get(table, {}), **data.draw(TABLE_OF[table])}
    config = in_one_sentence(lambda: RunConfig(**base))
    if config is not None:
        in_one_sentence(lambda: prepare(config, prior=prior).report())
    assert sorted(path.name for path in tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    ("name", "key", "more"),
    [
        ("GenCastPrior", "gencast", {"stats": "stats"}),
        ("WeatherNext2Prior", "weathernext2", {"configuration": "WeatherNext2"}),
    ],
)
def test_checkpoints_are_opened_as_their_priors_ask(monkeypatch, name, key, more):
    """The arguments fit the method that opens the files; the packages of these priors need not be there."""
    method = getattr(ndda, name).from_checkpoint
    asked = []

    def opened(*arguments, **keywords):
        asked.append(inspect.signature(method).bind(*arguments, **keywords).arguments)
        return "the prior"

    monkeypatch.setattr(getattr(ndda, name), "from_checkpoint", opened)
    settings = RunConfig(**{**TABLES, "prior": {key: "a.npz", "surface": "era5.nc", "resolution": 1, **more}}).prior
    assert ndda.assimilation.open_prior(settings) == "the prior"
    expected = {"checkpoint": Path("a.npz"), "surface": Path("era5.nc"), "resolution": 1.0, "precision": "float32"}
    assert expected.items() <= asked[0].items()
    assert str(asked[0].get("stats") or asked[0].get("config")) in ("stats", "WeatherNext2")
