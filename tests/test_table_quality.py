"""Quality control of tables: what each check sets aside, that nothing is dropped, and what a filter adds."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas
import pytest
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.fields import Layout, Variable
from numpyro_diffusion_da.observation import (
    Blacklist,
    Bounds,
    Duplicates,
    Flag,
    HeightDifference,
    QualityCheck,
    QualityColumn,
    Superobbing,
    Thinning,
    Withheld,
    read_table,
)

NORTH, EAST = np.linspace(-80.0, 80.0, 9), np.arange(12) * 30.0
VARIABLES = (
    Variable("2m_temperature", "K"),
    Variable("temperature", "K", (500, 850)),
    *(Variable(f"10m_{c}_component_of_wind", "m s-1") for c in "uv"),
)
AXES = {"latitude": NORTH.tolist(), "longitude": EAST.tolist()}
LAYOUT = Layout((9, 12, 5), ("latitude", "longitude", "channel"), AXES, variables=VARIABLES)
TIMES = ["2026-01-01T00", "2026-01-01T12"]


def frame(columns, *rows, **same):
    found = pandas.DataFrame(rows, columns=columns.split())
    defaults = {"time": TIMES[0], "lat": 0.0, "lon": 0.0, "variable": "t2m", "observation": 280.0, "error": 1.0}
    more = {name: value for name, value in {**defaults, "units": "K", **same}.items() if name not in found}
    return found.assign(**more)


def place(table, *checks, **options):
    placed = read_table(table).on(LAYOUT, TIMES, quality=checks, **options)
    # Whatever the checks are, each row of the table is there once, with one flag.
    assert list(placed.rows.index[: len(table)]) == list(range(len(table)))
    assert placed.rows["flag"].isin(list(map(str, Flag))).all()
    kept = placed.rows.index[placed.rows["flag"].isin([Flag.USED, Flag.WITHHELD])]
    assert sorted(placed.xs["id"][placed.xs["id"] >= 0]) == list(kept)
    assert np.isfinite(placed.xs["y"]).sum() == (placed.rows["flag"] == Flag.USED).sum()
    return placed


def flags(table, *checks, **options):
    return list(place(table, *checks, **options).rows["flag"])


def test_bounds():
    """Impossible values, and values far from the climate at their place."""
    climate = np.random.default_rng(0).normal(size=(40, *LAYOUT.shape)) * 4.0 + 250.0
    climate += 0.5 * NORTH[:, None, None]
    table = frame(
        "variable level observation lat",
        ("t2m", None, 250.0, 0.0),
        ("t2m", None, 100.0, 0.0),
        ("t2m", None, 300.0, 0.0),
        ("t2m", None, 300.0, 75.0),
        ("t", 700.0, 220.0, 0.0),
        ("t", 700.0, 180.0, 0.0),
    )
    used, bad = "used", "out of bounds"
    assert flags(table, Bounds()) == [used, bad, used, used, used, used]
    assert flags(table, Bounds.from_states(climate)) == [used, bad, bad, used, used, bad]
    assert flags(table, Bounds.from_states(climate, 14.0)) == [used, bad, used, used, used, bad]
    assert flags(table, Bounds(limits={"temperature": (200.0, 210.0)})) == [used, bad, used, used, bad, bad]
    wind = frame("variable observation", ("10m_wind_speed", -1.0), ("10m_wind_speed", 3.0)).assign(units="m s-1")
    assert flags(wind, Bounds.from_states(climate)) == [bad, used]
    prior = ndda.load_prior("held_suarez")
    mean, stddev = prior.climate_statistics()
    one = frame("variable observation units", ("sp", 1000.0, "hPa"), ("sp", 100.0, "hPa"), ("sp", 950.0, "hPa"))
    found = read_table(one).on(prior.layout, TIMES, quality=[Bounds.of(prior, factor=6.0)])
    assert list(found.rows["flag"]) == [used, bad, bad if abs(950.0 - mean[16, 0, 0]) > 6.0 * stddev[0] else used]


def test_lists_and_marks():
    table = frame(
        "station type variable quality",
        ("A", "ship", "t2m", 0),
        ("B", "ship", "t2m", 1),
        ("B", "buoy", "t2m", 2),
        (None, None, "u10", None),
    )
    table["units"] = ["K", "K", "K", "m s-1"]
    used, listed, bad = "used", "blacklisted", "bad quality"
    assert flags(table, Blacklist(stations="B")) == [used, listed, listed, used]
    assert flags(table, Blacklist(["A", "B"], types=["ship"])) == [listed, listed, used, used]
    assert flags(table, Blacklist(variables=["10m_u_component_of_wind"])) == [used, used, used, listed]
    assert flags(table, QualityColumn((0, "1"))) == [used, used, bad, bad]
    assert flags(table, Blacklist("A"), QualityColumn([2])) == [listed, bad, used, bad]


def test_heights():
    orography = np.zeros((9, 12))
    orography[4, 0] = 1000.0  # latitude 0, longitude 0
    table = frame(
        "elev lon variable level", (900.0, 0.0, "t2m", None), (900.0, 15.0, "t2m", None), (None, 0.0, "t2m", None),
        (10.0, 0.0, "t2m", None), (10.0, 0.0, "t", 850.0),
    )  # fmt: skip
    used, bad = "used", "height difference"
    assert flags(table, HeightDifference(orography)) == [used, bad, used, bad, used]
    assert flags(table, HeightDifference(orography, limit=500.0)) == [used, used, used, bad, used]
    assert flags(table.drop(columns="elev"), HeightDifference(orography)) == [used] * 5


def test_duplicates():
    """Exact ones wherever they come from; of a station's reports the nearest in time; a moving ship keeps all."""
    table = frame(
        "time lat lon station observation",
        ("2026-01-01T00", 10.0, -20.0, "A", 280.0),
        ("2026-01-01T01+01:00", 10.0, 340.0, "B", 280.0),
        ("2026-01-01T02", 10.0, -20.0, "A", 281.0),
        ("2026-01-01T12", 10.0, -20.0, "A", 281.0),
        ("2026-01-01T11", 50.0, 0.0, "C", 270.0),
        ("2026-01-01T12:30", 50.0, 0.0, "C", 271.0),
        ("2026-01-01T00", 0.0, 0.0, "S", 290.0),
        ("2026-01-01T01", 0.0, 0.5, "S", 290.0),
        ("2026-01-01T02", 50.0, 0.0, None, 270.0),
        ("2026-01-01T01", 50.0, 0.0, None, 270.0),
    )
    used, again, report = "used", "duplicate", "repeated report"
    assert flags(table, Duplicates()) == [used, again, report, used, report, used, used, used, used, used]
    assert flags(table, Duplicates(one_report=False)) == [used, again, *[used] * 8]


def test_thinning():
    """What stays is apart, and everything else is near something that stays."""
    rng = np.random.default_rng(3)
    n = 400
    table = frame("lat", *[(x,) for x in np.rad2deg(np.arcsin(rng.uniform(-1, 1, n)))]).assign(
        lon=rng.uniform(0, 360, n), error=rng.uniform(1, 2, n), type=np.where(np.arange(n) < 300, "sat", "ship")
    )
    for distance in (500.0, 1500.0):
        found = place(table, Thinning(distance, types=["sat"])).rows
        assert (found["flag"][300:] == Flag.USED).all()
        some = found[:300]
        a, b = np.deg2rad(some["lat"].to_numpy()), np.deg2rad(some["lon"].to_numpy())
        unit = np.stack([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)], -1)
        apart = 6371.0 * np.arccos(np.clip(unit @ unit.T, -1, 1)) + 1e5 * np.eye(300)
        stays = (some["flag"] == Flag.USED).to_numpy()
        assert apart[np.ix_(stays, stays)].min() > distance
        near = apart[np.ix_(~stays, stays)] < distance
        assert near.any(1).all()
        # Those that set a row aside have a smaller error, for one of them.
        error = some["error"].to_numpy()
        assert np.all(np.where(near, error[stays][None], 9.0).min(1) < error[~stays])
    both = frame("variable level", ("t", 850.0), ("t", 830.0), ("t", 600.0), ("t2m", None))
    assert flags(both, Thinning(100.0)) == ["used", "thinned", "used", "used"]


def test_superobbing():
    """Means of values, places and directions; their errors; each row names the mean that it became a part of."""
    table = frame(
        "lat lon observation error",
        (1.0, 359.5, 280.0, 1.0),
        (1.2, 0.5, 282.0, 1.0),
        (1.4, 359.7, 284.0, 2.0),
        (60.0, 100.0, 270.0, 1.0),
    )
    shifted = place(table.assign(lon=(table["lon"] + 20.0) % 360.0), Superobbing(2000.0, correlation=0.5)).rows
    assert list(shifted["flag"]) == [*["superobbed"] * 3, "used", "used"]
    assert list(shifted["superob"]) == [4, 4, 4, -1, -1]
    mean = shifted.loc[4]
    assert (mean["source"], mean["row"], mean["value"], mean["superobbed_rows"]) == ("superob", 1, 282.0, 3)
    assert mean["error_used"] == pytest.approx(np.sqrt((1 + 1 + 4) / 3 * (1 + 2 * 0.5) / 3))
    assert (mean["lat"], mean["lon"]) == (pytest.approx(1.2, abs=1e-3), pytest.approx(19.9, abs=1e-3))
    wind = frame("observation lon", (350.0, 1.0), (20.0, 2.0), variable="wind_from_direction", units="degree")
    found = place(wind, Superobbing(1000.0)).rows
    assert found["value"].iloc[2] == pytest.approx(5.0)
    assert flags(wind, Superobbing(1000.0, least=3)) == ["used", "used"]


def test_withheld():
    """Whole stations, the same ones in a longer table; their value is kept from the filter, their place is not."""
    n = 300
    table = frame("station", *[(f"S{i // 2}",) for i in range(n)]).assign(
        lat=np.arange(n) % 80, lon=np.arange(n) * 1.0, time=np.where(np.arange(n) % 2, *TIMES)
    )
    placed = place(table, Withheld(0.2, seed=1))
    rows = placed.rows
    apart = (rows["flag"] == Flag.WITHHELD).to_numpy()
    assert 0.1 < apart.mean() < 0.3
    np.testing.assert_array_equal(apart[::2], apart[1::2])
    ids = placed.xs["id"]
    assert np.isnan(placed.xs["y"][np.isin(ids, rows.index[apart])]).all()
    assert np.isfinite(placed.xs["place"][ids >= 0]).all()
    longer = pandas.concat([table, table.assign(time="2026-01-01T03")], ignore_index=True)
    np.testing.assert_array_equal(place(longer, Withheld(0.2, seed=1)).rows["flag"][:n], rows["flag"])
    assert (place(table, Withheld(0.2, seed=2)).rows["flag"] != rows["flag"]).any()
    named = place(table.assign(station=None), Withheld(0.5))  # by places
    assert 0.3 < (named.rows["flag"] == Flag.WITHHELD).mean() < 0.7
    assert flags(table[:3], Withheld(stations=["S1"])) == ["used", "used", "withheld"]


def test_a_check_of_ones_own():
    class NotAtNight(QualityCheck):
        def rejects(self, rows, context):
            return rows["time"].dt.hour.to_numpy() < 6

    table = frame("time", (TIMES[0],), (TIMES[1],))
    assert flags(table, NotAtNight()) == ["bad quality", "used"]


def test_a_filter_completes_the_record():
    """Background and analysis come back to their rows, and a gross error gets the flag of the background check."""
    rng = np.random.default_rng(5)
    n = 40
    table = frame("lat", *[(x,) for x in rng.uniform(-70, 70, n)]).assign(
        lon=rng.uniform(0, 360, n), observation=280.0 + rng.normal(size=n), time=np.where(np.arange(n) % 2, *TIMES),
        station=[f"S{i}" for i in range(n)],
    )  # fmt: skip
    table.loc[5, "observation"] = 330.0
    table.loc[8, "observation"] = -999.0
    placed = place(table, Bounds(), Duplicates(), Withheld(0.2))

    def model(xs):
        x0 = numpyro.sample("x0", dist.Normal(jnp.full(LAYOUT.shape, 280.0), 3.0).to_event(3))

        def step(x, at):
            x = numpyro.sample("x", dist.Normal(x, 1.0).to_event(3))
            mean = numpyro.deterministic("y_mean", placed.operator(x, at))
            numpyro.sample("y", dist.Normal(mean, at["error"]).to_event(1), obs=at["y"])
            return x, None

        scan(step, x0, xs)

    filter = ndda.Filter(ndda.GrossErrorCheck(ndda.EnKF(model)), num_particles=200)
    filter.run(jax.random.key(0), placed.xs)
    result = filter.result
    background = result.background["y"]
    feedback = placed.feedback(
        rejected=result.rejected["y"].any(0),
        background=background.mean[0],
        background_spread=np.sqrt(background.variance[0]),
        analysis=result.posterior["y_mean"][0].mean(0),
    )
    assert len(feedback) == n
    counts = collections.Counter(feedback["flag"])
    assert counts["far from background"] == counts["missing"] == 1, counts
    assert feedback["flag"].iloc[5] == "far from background"
    assert feedback.loc[feedback["flag"] == "missing", "background"].isna().all()
    used = feedback[feedback["flag"] == "used"]
    departures = [(used["value"] - used[name]).std() for name in ("background", "analysis")]
    assert departures[1] < 0.8 * departures[0]
    # Withheld rows have a background and an analysis too, from the others.
    apart = feedback[feedback["flag"] == "withheld"]
    assert len(apart) > 2
    assert apart[["background", "analysis"]].notna().all(axis=None)
    again = np.stack([placed.observe(result.posterior["x"][0, :, t], t).mean(0) for t in range(2)])
    np.testing.assert_allclose(placed.by_row(again)[apart.index], apart["analysis"], rtol=1e-5)
    with pytest.raises(ValueError, match="feedback got a column 'value', which the table has"):
        placed.feedback(value=placed.xs["y"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Bounds(mean=[1.0]), "got one of mean and stddev"),
        (lambda: Bounds(factor=0.0), "factor=0.0; give a positive number"),
        (lambda: Bounds(limits={"t": (2.0, 1.0)}), r"limits\['t'\]=\(2.0, 1.0\); give \(smallest, largest\)"),
        (lambda: Bounds.of(3), r"Bounds.of got 3, which has no climate_statistics\(\)"),
        (lambda: Bounds.from_states(np.zeros(3)), r"shape \(3,\); give \(state, latitude, longitude, channel\)"),
        (lambda: flags(frame("lat", (0.0,)), Bounds(np.zeros(7), np.ones(7))), r"mean of shape \(7,\); give one that"),
        (lambda: Blacklist(), "Blacklist got nothing"),
        (lambda: Blacklist(stations=3), "stations=3; give texts"),
        (lambda: QualityColumn("01"), "accepted='01'; give the good marks"),
        (lambda: QualityColumn([]), "got no accepted marks"),
        (lambda: flags(frame("lat", (0.0,)), QualityColumn([0])), "column='quality', which the table does not have"),
        (lambda: HeightDifference("x"), "got orography='x'"),
        (lambda: flags(frame("elev", (0.0,)), HeightDifference(np.zeros((2, 2)))), r"orography of shape \(2, 2\)"),
        (lambda: Duplicates(one_report=1), "one_report=1; give True or False"),
        (lambda: Thinning(0.0), "distance=0.0; give a positive distance in km"),
        (lambda: Superobbing(1.0, correlation=2.0), "correlation=2.0; give a number from 0 to 1"),
        (lambda: Superobbing(1.0, least=1), "least=1; give 2 or more"),
        (lambda: Withheld(), "Withheld got nothing"),
        (lambda: Withheld(1.0), "fraction=1.0; give a fraction from 0 to below 1"),
    ],
)
def test_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
