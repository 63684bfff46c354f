"""Quality control of tables: what each check sets aside, that nothing is dropped, and what a filter adds."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas
import pytest
from conftest import compilations
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.fields import Layout, Variable
from numpyro_diffusion_da.observation import (
    Blacklist,
    Bounds,
    Duplicates,
    Flag,
    HeightDifference,
    InstrumentBias,
    QualityCheck,
    QualityColumn,
    Superobbing,
    Thinning,
    Tracks,
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


def test_tracks_of_ships():
    """The longest track at 75 km/h stays, whichever report is off it; without a majority, everything does."""

    def track(east, station="A", **more):
        time = np.datetime64(TIMES[0]) + np.arange(len(east)) * np.timedelta64(1, "h")
        return frame("lon", *((lon,) for lon in east), **{"station": station, "type": "SHIP", "time": time, **more})

    used, off = "used", "off track"
    steady = [179.0, 179.4, -180.2 + 360.0, 180.2, -179.4 + 360.0]  # 44 km an hour at the equator, over the date line
    for wrong in range(5):
        east = [lon + 10.0 * (i == wrong) for i, lon in enumerate(steady)]
        assert flags(track(east), Tracks()) == [off if i == wrong else used for i in range(5)]
    # Every 3 hours 5 degrees do not fit the next report, but the one after it; and a ship that goes over the pole.
    three = np.datetime64(TIMES[0]) + np.arange(6) * np.timedelta64(3, "h")
    shape = {"time": three, "lat": 90.0 - np.abs(np.linspace(-2.0, 2.0, 6)), "type": "ship"}
    over = track([0.0] * 3 + [180.0] * 3, **shape)
    for wrong in range(6):
        moved = over.assign(lat=over["lat"] - 5.0 * (over.index == wrong))
        # In another order, each report still has its own flag.
        found = place(moved[::-1].reset_index(drop=True), Tracks(), window="200h").rows["flag"]
        assert list(found)[::-1] == [off if i == wrong else used for i in range(6)]
    # Two ships of one name at the same times, of which one stops; and a report that was sent twice, once wrong.
    other = over.assign(lat=over["lat"] - 60.0)
    for count, expected in ((3, [used] * 9), (1, [used] * 6 + [off])):
        both = pandas.concat([over, other[:count]], ignore_index=True)
        assert list(place(both, Tracks(), window="200h").rows["flag"]) == expected
    assert flags(track([0.0, 50.0]), Tracks()) == [used, used]
    assert flags(track([0.0, 50.0, 100.0, 0.2]), Tracks()) == [used] * 4
    assert flags(track([0.0, 50.0, 100.0], type="land"), Tracks()) == [used] * 3
    # A ship whose position is that of the first report, and one at anchor for less than the time.
    moves = track([0.0, 0.4, 0.8, 0.8, 0.8], station="B")
    both = pandas.concat([track([3.0] * 5), moves], ignore_index=True)
    assert flags(both, Tracks(still=3.0)) == [off] * 5 + [used] * 5
    assert flags(both, Tracks()) == [used] * 10
    anchored = track([3.0] * 5).assign(time=lambda some: some["time"] + 12 * (some["time"] - some["time"][0]))
    said = place(anchored, Tracks(), window="200h").notes[-1]
    assert said == (
        "'A' should move, but gave one position for 48 hours or longer: it is at anchor, or its position is not "
        "updated; still=48.0 sets such rows aside."
    )


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
    assert apart.mean() == 0.2
    np.testing.assert_array_equal(apart[::2], apart[1::2])
    ids = placed.xs["id"]
    assert np.isnan(placed.xs["y"][np.isin(ids, rows.index[apart])]).all()
    assert np.isfinite(placed.xs["place"][ids >= 0]).all()
    longer = pandas.concat([table, table.assign(time="2026-01-01T03")], ignore_index=True)
    np.testing.assert_array_equal(place(longer, Withheld(0.2, seed=1)).rows["flag"][:n], rows["flag"])
    assert (place(table, Withheld(0.2, seed=2)).rows["flag"] != rows["flag"]).any()
    named = place(table.assign(station=None), Withheld(0.5))  # by places
    assert (named.rows["flag"] == Flag.WITHHELD).mean() == 0.5
    assert flags(table[:3], Withheld(stations=["S1"])) == ["used", "used", "withheld"]


def test_a_fraction_is_that_of_each_variable_as_nearly_as_stations_allow():
    """20 sondes of which half have wind too: two of them are withheld, one with wind, whatever the seed."""
    rows = [(f"S{i}", "t2m") for i in range(20)] + [(f"S{i}", "u10m") for i in range(10)] + [("T", "v10m")] * 3
    table = frame("station variable", *rows).assign(units=None, lat=np.arange(33.0))
    table.loc[table["variable"] != "t2m", "observation"] = 5.0
    for seed in range(5):
        found = place(table, Withheld(0.1, seed=seed)).withheld()
        assert found.loc["2m_temperature"].tolist() == [2, 20, 2, 20]
        assert found.loc["10m_u_component_of_wind"].tolist() == [1, 10, 1, 10]
        assert found.loc["10m_v_component_of_wind"].tolist() == [0, 1, 0, 3]
    both = place(table[:2], Withheld(0.01))
    assert both.withheld()["stations"].tolist() == [1]  # at least one of two
    assert "2m_temperature: 1 of 2 stations are withheld, 1 of 2 rows." in both.report()
    assert flags(table[:1], Withheld(0.9)) == ["used"]
    assert flags(table[:3], Withheld(0.99)).count("used") == 1


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
    table.loc[11, "observation"] = 230.0
    table.loc[8, "observation"] = -999.0
    placed = place(table, Bounds(), Duplicates(), Withheld(0.2, ["S11"]))

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
        threshold=5.0,
        background=background.mean[0],
        background_spread=np.sqrt(background.variance[0]),
        analysis=result.posterior["y_mean"][0].mean(0),
    )
    assert len(feedback) == n
    counts = collections.Counter(feedback["flag"])
    assert counts["far from background"] == counts["missing"] == counts["withheld, far from background"] == 1, counts
    assert feedback["flag"].iloc[11] == "withheld, far from background"
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
    with pytest.raises(ValueError, match="feedback got a threshold, but no background and background_variance"):
        placed.feedback(threshold=5.0)


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
        (lambda: flags(frame("lat", (0.0,)), QualityColumn([0])), "no column 'quality' for QualityColumn; it has so"),
        (lambda: HeightDifference("x"), "got orography='x'"),
        (lambda: flags(frame("elev", (0.0,)), HeightDifference(np.zeros((2, 2)))), r"orography of shape \(2, 2\)"),
        (lambda: Duplicates(one_report=1), "one_report=1; give True or False"),
        (lambda: Thinning(0.0), "distance=0.0; give a positive distance in km"),
        (lambda: Superobbing(1.0, correlation=2.0), "correlation=2.0; give a number from 0 to 1"),
        (lambda: Superobbing(1.0, least=1), "least=1; give 2 or more"),
        (lambda: Tracks({"ship": 0.0}), r"max_speed\['ship'\]=0.0; give a speed in km/h"),
        (lambda: Tracks(still=0), "still=0; give a positive number of hours"),
        (lambda: Withheld(), "Withheld got nothing"),
        (lambda: Withheld(1.0), "fraction=1.0; give a fraction from 0 to below 1"),
    ],
)
def test_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# --- biases, and errors that are correlated --------------------------------------------------------------------------


def feedback_of(cycles, values, background, error=1.0, variance=0.0, **more):
    columns = {"cycle": cycles, "value": values, "background": background, "background_variance": variance}
    return pandas.DataFrame({**columns, "error_used": error, "flag": "used", "name": "t2m", "station": "A", **more})


def test_bias_is_the_exact_posterior():
    """Without drift, that of a Gaussian mean; with drift, that of the random walk written as one Gaussian vector."""
    rng = np.random.default_rng(0)
    times = np.datetime64("2026-01-01") + np.arange(6) * np.timedelta64(12, "h")
    cycles = np.array([0, 0, 1, 3, 3, 3, 5])
    values, background = rng.normal(3.0, 1.0, 7), rng.normal(0.0, 0.5, 7)
    feedback = feedback_of(cycles, values, background, 2.0, 0.3)
    for drift in (0.0, 0.4):
        bias = InstrumentBias.estimate(feedback, times, stddev=1.5, drift=drift)
        seen = np.array([0, 1, 3, 5])
        prior = 3.0**2 + (2.0 * drift) ** 2 * np.minimum(seen[:, None], seen)  # of b at these steps
        mean = np.array([np.mean((values - background)[cycles == k]) for k in seen])
        noise = np.array([0.3 + 4.0 / np.sum(cycles == k) for k in seen])
        for n in range(1, 5):
            gain = np.linalg.solve(prior[:n, :n] + np.diag(noise[:n]), prior[n - 1, :n])
            assert bias.estimates["bias"][n - 1] == pytest.approx(gain @ mean[:n])
            variance = prior[n - 1, n - 1] - gain @ prior[:n, n - 1]
            assert bias.estimates["stddev"][n - 1] == pytest.approx(np.sqrt(variance))
        # In two parts, and with what was removed in between, it is the same.
        half = InstrumentBias.estimate(feedback[:3], times, stddev=1.5, drift=drift)
        rest = feedback_of(cycles[3:] - 2, values[3:] - 1.0, background[3:], 2.0, 0.3, bias_removed=1.0)
        whole = InstrumentBias.estimate(rest, times[2:], stddev=1.5, drift=drift, previous=half)
        np.testing.assert_allclose(whole.estimates["bias"], bias.estimates["bias"], rtol=1e-6)
        assert list(whole.estimates["time"]) == list(bias.estimates["time"])
    assert list(bias.latest().index) == [("A", "t2m")]


def test_bias_of_a_direction_goes_the_short_way_round():
    values, background = np.array([2.0, 358.0, 5.0]), np.array([357.0, 353.0, 0.0])  # 5 degrees each
    feedback = feedback_of([0, 0, 1], values, background, 1.0, name="wind_direction", unit="degree")
    bias = InstrumentBias.estimate(feedback, TIMES, stddev=1e4, drift=0.0)
    np.testing.assert_allclose(bias.estimates["bias"], 5.0, rtol=1e-6)


def test_bias_is_removed_as_known_before_each_step():
    table = frame("time station", *[(t, s) for t in (*TIMES, "2026-01-02T00") for s in ("A", "B")], observation=283.0)
    feedback = feedback_of([0, 1], [283.0, 284.0], 280.0, 0.01, name="2m_temperature")
    bias = InstrumentBias.estimate(feedback, TIMES, stddev=1e4, drift=10.0)
    placed = read_table(table).on(LAYOUT, [*TIMES, "2026-01-02T00"], bias=bias, window="6h")
    np.testing.assert_allclose(placed.rows["bias_removed"], [0.0, 0.0, 3.0, 0.0, 4.0, 0.0], atol=0.02)
    np.testing.assert_allclose(placed.rows["value"], 283.0 - placed.rows["bias_removed"])
    np.testing.assert_allclose(placed.rows["observation"], 283.0)
    for call, message in (
        (
            lambda: InstrumentBias.estimate(feedback.drop(columns="background"), TIMES),
            "without the column 'background'",
        ),
        (lambda: InstrumentBias.estimate(feedback, TIMES, by="type"), "without the column 'type'"),
        (lambda: InstrumentBias.estimate(feedback, TIMES, drift=-1.0), "drift=-1.0; give a number of errors"),
        (
            lambda: InstrumentBias.estimate(feedback.assign(type="x"), TIMES, "type", previous=bias),
            "the previous one has",
        ),
        (lambda: read_table(table).on(LAYOUT, TIMES, bias=3), "bias=3; give InstrumentBias.estimate"),
        (lambda: read_table(table.drop(columns="station")).on(LAYOUT, TIMES, bias=bias), "the column 'station', which"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_groups_have_correlated_errors():
    """The log-likelihood of a program is that of one multivariate normal over a group, with a gap and an empty step."""
    table = frame(
        "level variable group observation",
        *[(level, "t", "sonde 1", 260.0 + i) for i, level in enumerate((850.0, 700.0, 600.0, 500.0))],
        (850.0, "t", "sonde 2", 255.0),
        (None, "t2m", None, 281.0),
        (None, "t2m", "x", -999.0),
    ).assign(error=[1.0, 0.5, 1.5, 1.0, 2.0, 1.0, 1.0], lon=[20, 20, 20, 20, 50, 20, 0])

    def correlations(rows):
        height = np.log(rows["pres"].to_numpy())
        return np.exp(-np.abs(height[:, None] - height))

    x = jnp.asarray(np.random.default_rng(0).normal(265.0, 5.0, LAYOUT.shape), jnp.float32)
    placed = read_table(table).on(LAYOUT, TIMES, correlation=correlations)
    at = [jax.tree.map(lambda v, t=t: v[t], placed.xs) for t in range(2)]
    groups = at[0]["groups"]
    assert groups["y"].shape == (2, 8)
    np.testing.assert_array_equal(groups["place"], [[0.0, 20.0], [0.0, 50.0]])
    assert np.isfinite(at[0]["y"]).sum() == 1

    @jax.jit
    def log_likelihood(x, at):
        mean, groups = placed.operator(x, at), at["groups"]
        seen = ~jnp.isnan(groups["y"])
        of_rows = dist.MultivariateNormal(mean[groups["rows"]], covariance_matrix=groups["covariance"])
        value = jnp.where(seen, groups["y"], mean[groups["rows"]])
        return mean, of_rows.log_prob(value) + 0.5 * np.log(2 * np.pi) * (~seen).sum(-1)

    h, found = log_likelihood(x, at[0])
    rows = placed.rows[:5]
    r = (rows["value"] - placed.by_row(np.stack([h, h]))[:5]).to_numpy(float)
    for g, part in enumerate((slice(0, 4), slice(4, 5))):
        error = rows["error_used"].to_numpy(float)[part]
        covariance = error[:, None] * correlations(rows[part]) * error
        expected = r[part] @ np.linalg.solve(covariance, r[part]) + np.linalg.slogdet(2 * np.pi * covariance)[1]
        assert float(found[g]) == pytest.approx(-0.5 * expected, rel=1e-3)
    np.testing.assert_array_equal(log_likelihood(x, at[1])[1], [0.0, 0.0])
    back = placed.by_row(placed.ungroup(placed.xs["groups"]["y"]))
    np.testing.assert_allclose(back[:5], rows["value"])
    assert back[5:].isna().all()
    same = read_table(table).on(LAYOUT, TIMES, correlation=0.3).xs["groups"]["covariance"][0, 0]
    error = np.array([1.0, 0.5, 1.5, 1.0, 0, 0, 0, 0])
    padding = np.diag([0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(same, error[:, None] * np.where(np.eye(8), 1.0, 0.3) * error + padding, rtol=1e-6)
    assert "5 rows have a group; their errors count as independent" in read_table(table).on(LAYOUT, TIMES).report()
    for bad, message in (
        (1.0, "correlation=1.0; give a number from 0 to below 1"),
        ("x", "correlation='x'; give the correlation of two errors"),
        (lambda rows: np.eye(2), r"the table, row 0: the group 'sonde 1' of 4 rows got correlations of shape \(2, 2\)"),
        (lambda rows: 2.0 * np.eye(len(rows)), "row 0: .* a matrix that is not one of correlations"),
        (lambda rows: np.ones((len(rows), len(rows))), "row 0: .* eigenvalue is .*, but single precision needs more "),
        (0.99997, r"row 0: .* of 4 rows has correlations whose smallest eigenvalue is 3e-05, .* more than 4e-05 for"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            read_table(table).on(LAYOUT, TIMES, correlation=bad)
    with pytest.raises(ValueError, match="but there are no groups"):
        read_table(table).on(LAYOUT, TIMES).ungroup(np.zeros(3))


def test_groups_at_the_limit_of_their_correlation_have_a_density():
    """A Cholesky factor in single precision of a thousand rows is NaN at a tenth of the limit."""
    count = 1000
    table = frame("observation", *[(280.0 + 1e-3 * i,) for i in range(count)]).assign(group="swath", error=1.0)
    table["lon"] = np.linspace(0.0, 20.0, count)
    groups = read_table(table).on(LAYOUT, TIMES, correlation=0.98, quality=[]).xs["groups"]
    covariance, y = groups["covariance"][0, 0], groups["y"][0, 0]
    root = np.asarray(jnp.linalg.cholesky(covariance), float)[:count, :count]
    y = y[:count].astype(float) - 280.0
    exact = y @ np.linalg.solve(covariance[:count, :count].astype(float), y)
    assert np.sum(np.linalg.solve(root, y) ** 2) == pytest.approx(exact, rel=2e-3)
    with pytest.raises(ValueError, match="the group 'swath' of 1000 rows has correlations whose"):
        read_table(table).on(LAYOUT, TIMES, correlation=0.995, quality=[])


def test_means_leave_rows_with_correlated_errors_alone():
    """A mean over rows of two groups would have errors that are correlated with those of both."""
    table = frame("group observation", ("a", 280.0), ("a", 281.0), (None, 282.0), (None, 284.0)).assign(
        error=1.0, lon=[20.0, 20.1, 20.2, 20.3]
    )
    averaged = [Superobbing(500.0)]
    placed = read_table(table).on(LAYOUT, TIMES, correlation=0.5, quality=averaged)
    assert list(placed.rows["flag"]) == ["used", "used", "superobbed", "superobbed", "used"]
    assert placed.rows["value"].iloc[-1] == 283.0
    np.testing.assert_allclose(placed.xs["groups"]["covariance"][0, 0, :2, :2], [[1.0, 0.5], [0.5, 1.0]])
    assert "Superobbing averages no rows of groups, because their errors are correlated." in placed.report()
    assert list(read_table(table).on(LAYOUT, TIMES, quality=averaged).rows["flag"][:4]) == ["superobbed"] * 4


@pytest.mark.slow
def test_tables_one_after_another_compile_once():
    rng = np.random.default_rng(0)

    def table(t, n):
        return frame("lat", *[(x,) for x in rng.uniform(-80, 80, n)]).assign(
            lon=rng.uniform(0, 360, n), time=TIMES[t], observation=280.0 + rng.normal(size=n)
        )

    first = read_table(table(0, 20)).on(LAYOUT, TIMES[:1], window="6h")

    def model(xs):
        x0 = numpyro.sample("x0", dist.Normal(jnp.full(LAYOUT.shape, 280.0), 3.0).to_event(3))

        def step(x, at):
            x = numpyro.sample("x", dist.Normal(x, 1.0).to_event(3))
            numpyro.deterministic("y_place", at["place"])
            numpyro.sample("y", dist.Normal(first.operator(x, at), at["error"]).to_event(1), obs=at["y"])
            return x, None

        scan(step, x0, xs)

    grid = np.stack(np.meshgrid(NORTH, EAST, indexing="ij"), -1).reshape(-1, 2)
    taper = ndda.Taper(2000.0, ndda.GreatCircle(), {"y": "y_place"}, state=grid)
    online = ndda.OnlineFilter(ndda.EnKF(model, taper=taper), num_particles=20)
    state = online.init(jax.random.key(0), first.xs)
    state, _ = online.step(jax.random.key(1), state, first.xs)
    other = read_table(table(1, 9)).on(LAYOUT, TIMES[1:], window="6h", sizes=first.sizes)
    key = jax.random.key(2)
    with compilations() as compiled:
        state, info = online.step(key, state, other.xs)
    assert compiled == []
    background = other.by_row(np.asarray(info.background.sites["y"].mean)[None])
    assert background.notna().all()
    assert np.abs(background - 280.0).max() < 5.0
