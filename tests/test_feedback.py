"""Tables of departures from the rows of a run, against loops, other functions, and twins with known errors."""

import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.stats

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diagnostics import Feedback


def frame(seed=0, cycles=6, rows=40):
    """Rows of two names, at random cycles and places, some of them rejected or withheld."""
    rng = np.random.default_rng(seed)
    flags = ["used", "used", "used", "withheld", "far from background", "duplicate"]
    background = rng.normal(280.0, 5.0, rows)
    found = pd.DataFrame(
        {
            "name": rng.choice(["temperature", "dew"], rows),
            "unit": "K",
            "flag": rng.choice(flags, rows),
            "cycle": rng.integers(0, cycles, rows),
            "pres": rng.choice([85000.0, 49000.0, np.nan], rows),
            "lat": rng.uniform(-90, 90, rows),
            "lon": rng.uniform(-180, 360, rows),
            "station": rng.choice(["A", "B", None], rows),
            "instrument": rng.choice([7, 9], rows),
            "value": background + rng.normal(0, 1.5, rows),
            "error_used": rng.uniform(0.5, 1.5, rows),
            "background": background,
            "background_spread": rng.uniform(0.5, 1.5, rows),
        }
    )
    found["analysis"] = 0.5 * (found["value"] + found["background"])
    found["analysis_spread"] = 0.5
    return found


def loop(groups, value, over=None):
    """Mean of each group and its standard error, from the sums of each cycle."""
    found = {}
    for key, rows in groups:
        d, below = value(rows), np.ones(len(rows)) if over is None else over(rows)
        mean = sum(d) / sum(below)
        sums = [sum((d - mean * below)[(rows["cycle"] == c).to_numpy()]) for c in set(rows["cycle"])]
        c = len(sums)
        error = np.sqrt(c / (c - 1) * sum(s**2 for s in sums)) / sum(below) if c > 1 else np.nan
        found[key] = (mean, error)
    return found


def o_b(rows):
    return (rows["value"] - rows["background"]).to_numpy()


def o_a(rows):
    return (rows["value"] - rows["analysis"]).to_numpy()


def expected(rows):
    return (rows["background_spread"] ** 2 + rows["error_used"] ** 2).to_numpy()


def assert_pairs(table, columns, wanted):
    assert list(table.index) == sorted(wanted)
    np.testing.assert_allclose(table[list(columns)].to_numpy(float), [wanted[key] for key in table.index])


def test_means_and_standard_errors_are_those_of_a_loop_over_cycles():
    rows = frame()
    feedback = Feedback(rows)
    kept = rows[rows["flag"].isin(["used", "withheld"])]
    by = ["name", "instrument"]
    table = feedback.departures("instrument")
    assert_pairs(table, ("mean", "mean_se"), loop(kept.groupby(by), o_b))
    np.testing.assert_allclose(
        table["rms"] ** 2, [v for v, _ in loop(kept.groupby(by), lambda r: o_b(r) ** 2).values()]
    )
    ratio = loop(kept.groupby("instrument"), lambda r: o_b(r) ** 2 / expected(r))
    assert_pairs(feedback.consistency("instrument"), ("ratio", "ratio_se"), ratio)
    used = rows[rows["flag"] == "used"].groupby("name")
    variances = feedback.error_variances()
    assert_pairs(variances, ("observation", "observation_se"), loop(used, lambda r: o_a(r) * o_b(r)))
    assert_pairs(variances, ("background", "background_se"), loop(used, lambda r: (o_b(r) - o_a(r)) * o_b(r)))
    given = {"observation": lambda r: r["error_used"] ** 2, "background": lambda r: r["background_spread"] ** 2}
    product = {"observation": lambda r: o_a(r) * o_b(r), "background": lambda r: (o_b(r) - o_a(r)) * o_b(r)}
    for one in given:
        wanted = loop(used, product[one], lambda r, one=one: given[one](r).to_numpy())
        assert_pairs(variances, (f"{one}_ratio", f"{one}_ratio_se"), wanted)


def test_they_are_those_of_the_functions_of_arrays():
    rng = np.random.default_rng(1)
    steps, sites = 12, 5
    y, background, analysis = rng.normal(size=(3, steps, sites))
    rows = pd.DataFrame(
        {
            "name": "x", "flag": "used", "cycle": np.repeat(np.arange(steps), sites), "value": y.ravel(),
            "background": background.ravel(), "analysis": analysis.ravel(), "background_spread": 0.8, "error_used": 0.6,
        }
    )  # fmt: skip
    for block in (1, 3):
        feedback = Feedback(rows, block=block)
        wanted = ndda.diagnostics.departures(y, background[None], axis=1, block=block)
        found = feedback.departures().loc["x"]
        np.testing.assert_allclose(found[["mean", "mean_se", "rms"]].astype(float), [*wanted.mean, wanted.rms])
        wanted = ndda.diagnostics.error_variances(y, background[None], analysis[None], axis=1, block=block)
        found = feedback.error_variances().loc["x"]
        np.testing.assert_allclose(found[["observation", "observation_se"]].astype(float), wanted.observation)


def test_directions_go_the_shorter_way_round():
    found = ndda.diagnostics.departure([350.0, 10.0, 90.0, 270.0, 5.0], [10.0, 350.0, 270.0, 90.0, 5.0], "degree")
    np.testing.assert_allclose(found, [-20.0, 20.0, 180.0, 180.0, 0.0])
    np.testing.assert_allclose(ndda.diagnostics.departure([350.0], [10.0], "m"), [340.0])


def test_counts_levels_and_regions():
    rows = frame(rows=200)
    feedback = Feedback(rows)
    counts = feedback.counts()
    for flag in set(rows["flag"]):
        assert counts.loc["dew", flag] == ((rows["name"] == "dew") & (rows["flag"] == flag)).sum()
    rejected, kept = counts["far from background"], counts["used"] + counts["withheld"]
    np.testing.assert_allclose(counts["rejected"], rejected / (rejected + kept))
    assert set(feedback.rows["level"].dropna()) == {850.0, 500.0}
    tropics = rows["lat"].abs() < 20.0
    assert (feedback.rows["region"] == "tropics").sum() == tropics.sum()
    pacific = Feedback(rows, regions={"pacific": (-90.0, 90.0, 170.0, -100.0)}).rows["region"] == "pacific"
    np.testing.assert_array_equal(pacific, (rows["lon"] % 360 >= 170) & (rows["lon"] % 360 <= 260))


def test_boxes_hold_their_rows_and_have_nearly_one_area():
    feedback = Feedback(frame(rows=2000).assign(flag="used"))
    boxes = feedback.boxes((), degrees=10.0).reset_index()
    assert boxes["rows"].sum() == 2000
    area = (np.sin(np.deg2rad(boxes["north"])) - np.sin(np.deg2rad(boxes["south"]))) * (boxes["east"] - boxes["west"])
    assert area.max() / area.min() < 1.2
    lat, lon = feedback.rows["lat"].to_numpy(), (feedback.rows["lon"].to_numpy() + 180) % 360 - 180
    for box in boxes.itertuples():
        inside = (lat >= box.south) & (lat < box.north) & (lon >= box.west) & (lon < box.east)
        assert inside.sum() == box.rows
        np.testing.assert_allclose(box.bias, feedback.rows["normalized"][inside].mean())


def test_scores_of_withheld_rows():
    rows = frame(rows=60)
    held = rows[(rows["flag"] == "withheld") & (rows["name"] == "dew")]
    found = Feedback(rows).scores().loc["dew"]
    variance = held["analysis_spread"] ** 2 + held["error_used"] ** 2
    np.testing.assert_allclose(found["analysis_rmse"], np.sqrt(np.mean(o_a(held) ** 2)))
    np.testing.assert_allclose(found["analysis_spread_skill"], np.sqrt(variance.mean()) / found["analysis_rmse"])

    def crps(y, mean, spread):
        below = scipy.integrate.quad(lambda x: scipy.stats.norm.cdf(x, mean, spread) ** 2, mean - 15 * spread, y)[0]
        above = scipy.integrate.quad(lambda x: scipy.stats.norm.sf(x, mean, spread) ** 2, y, mean + 15 * spread)[0]
        return below + above

    wanted = [crps(*one) for one in zip(held["value"], held["analysis"], np.sqrt(variance), strict=True)]
    np.testing.assert_allclose(found["analysis_crps"], np.mean(wanted), rtol=1e-6)
    of_members = Feedback(rows.assign(analysis_crps=np.arange(60.0))).scores().loc["dew", "analysis_crps"]
    np.testing.assert_allclose(of_members, held.index.to_numpy().mean())


def test_ranks_are_counted_and_tested_as_independent_rows_where_they_are():
    rng = np.random.default_rng(2)
    rows = pd.DataFrame({"name": "x", "flag": "used", "cycle": np.arange(4000) // 2, "value": 0.0})
    rows["background_pit"] = rng.uniform(size=4000)
    feedback = Feedback(rows)
    counts = feedback.pit_counts(bins=20).to_numpy()[0]
    np.testing.assert_array_equal(counts, np.histogram(rows["background_pit"], 20, (0, 1))[0])
    test = feedback.pit_flatness(bins=20).loc["all"]
    assert test["effective"] > 3900
    np.testing.assert_allclose(test["p_value"], scipy.stats.chisquare(counts).pvalue, atol=0.05)


def linear_twin(cycles, true_r, given_r, seed=0, length=3.0, sites=40):
    """Feedback of a Kalman filter's updates with a known background covariance, and R of its own."""
    rng = np.random.default_rng(seed)
    distance = np.abs((np.arange(sites)[:, None] - np.arange(sites) + sites // 2) % sites - sites // 2)
    p = np.exp(-distance / length)
    root = np.linalg.cholesky(p)
    gain = p @ np.linalg.inv(p + given_r * np.eye(sites))
    departures = rng.normal(size=(cycles, sites)) @ root.T + np.sqrt(true_r) * rng.normal(size=(cycles, sites))
    spread = np.sqrt(np.diag(p - gain @ p))
    return pd.DataFrame(
        {
            "name": "x", "flag": "used", "cycle": np.repeat(np.arange(cycles), sites), "value": departures.ravel(),
            "background": 0.0, "analysis": (departures @ gain.T).ravel(), "background_spread": 1.0,
            "analysis_spread": np.tile(spread, cycles), "error_used": np.sqrt(given_r),
        }
    )  # fmt: skip


def test_desroziers_recovers_r_and_p_of_an_optimal_filter():
    errors = []
    for seed in range(10):
        found = Feedback(linear_twin(60, 0.5, 0.5, seed)).error_variances().loc["x"]
        for name, truth in (("observation", 0.5), ("background", 1.0)):
            errors.append((found[name] - truth) / found[f"{name}_se"])
        np.testing.assert_allclose(
            found["observation"] + found["background"],
            Feedback(linear_twin(60, 0.5, 0.5, seed)).departures().loc["x", "rms"] ** 2,
        )
    assert np.max(np.abs(errors)) < 3.5
    assert 0.6 < np.std(errors) < 1.5


def test_desroziers_moves_r_towards_the_truth_and_blames_it():
    rows = linear_twin(60, 1.0, 0.25)
    found = Feedback(rows).error_variances().loc["x"]
    assert 0.25 < found["observation"] < 1.0
    assert found["difference"] > 5 * found["difference_se"]
    kinds = {one.kind for one in ndda.report.Findings(rows)}
    assert kinds == {ndda.report.FindingKind.TOO_SURE, ndda.report.FindingKind.ERROR_TOO_SMALL}


def test_refusals_say_what_to_do():
    rows = frame()
    with pytest.raises(ValueError, match=r"without the columns \['flag', 'cycle'\]"):
        Feedback(rows.drop(columns=["flag", "cycle"]))
    with pytest.raises(ValueError, match="no column \\['platform'\\]"):
        Feedback(rows).consistency("platform")
    with pytest.raises(ValueError, match="of='forecast'; give 'background' or 'analysis'"):
        Feedback(rows).departures(of="forecast")
    with pytest.raises(ValueError, match="'value' with values that are no numbers"):
        Feedback(rows.assign(value="warm"))
    with pytest.raises(TypeError, match=r"write frame=pandas.read_parquet"):
        Feedback([1, 2])


@pytest.mark.slow
def test_p_values_hold_for_rows_that_share_an_error():
    """Rejected shares at 5 % over many twins: ratio and ranks, with rows that are independent or share much."""
    rng = np.random.default_rng(3)
    cycles, per_cycle, runs = 24, 10, 400
    base = pd.DataFrame({"flag": "used", "cycle": np.repeat(np.arange(cycles), per_cycle), "background": 0.0})
    base["background_spread"], base["error_used"] = 0.8, 0.6
    for shared in (0.0, 0.5):
        z = np.sqrt(shared) * rng.normal(size=(runs, cycles, 1))
        z = z + np.sqrt(1 - shared) * rng.normal(size=(runs, cycles, per_cycle))
        many = pd.concat([base.assign(name=str(i), value=z[i].ravel()) for i in range(runs)])
        feedback = Feedback(many)
        ratio, ranks = feedback.consistency()["p_value"], feedback.pit_flatness("name")["p_value"]
        assert (ratio < 0.05).mean() < 0.07
        assert (ranks < 0.05).mean() < 0.07


@pytest.mark.slow
def test_the_crps_of_a_gaussian_is_that_of_scoringrules():
    import scoringrules

    rows = frame(rows=60).assign(flag="withheld", name="x")
    spread = np.sqrt(rows["analysis_spread"] ** 2 + rows["error_used"] ** 2)
    wanted = scoringrules.crps_normal(rows["value"].to_numpy(), rows["analysis"].to_numpy(), spread.to_numpy())
    np.testing.assert_allclose(Feedback(rows).scores().loc["x", "analysis_crps"], np.mean(wanted))
