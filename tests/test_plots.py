from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_smoothing import LINES, by_hand

import numpyro_diffusion_da as ndda


@pytest.mark.parametrize("fields", [1, 2, 4, 5])
def test_skill_figure_has_a_panel_for_each_field(fields):
    days = np.arange(1, 7) / 2
    units = {f"field {i}": "K" for i in range(fields)}
    scores = {run: {name: {"rmse": days, "spread": 0.9 * days} for name in units} for run in ("analysis", "forecast")}
    stats = {
        "distinct_ancestors": np.full((1, 6), 20),
        "ess": np.full((1, 6), 3.0),
        "log_weights": np.zeros((1, 32, 6)),
    }
    figure = ndda.diagnostics.skill_figure(days, scores, units, stats, "title")
    figure.draw_without_rendering()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[: fields + 1] == [*units, "analysis: effective particles"]
    assert [line.get_label() for line in figure.axes[0].get_lines()] == [
        f"{run}: {what}" for run in ("analysis", "forecast") for what in ("error of the mean", "spread")
    ]
    np.testing.assert_array_equal(figure.axes[0].get_lines()[1].get_ydata(), 0.9 * days)
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_legend() is not None]
    assert len(legend.get_texts()) == 6


@pytest.mark.parametrize("blocks", [(), (3,)])
def test_non_gaussianity_figure_shows_d_by_block_and_the_shares(blocks):
    result = by_hand()
    with pytest.raises(ValueError, match="moves no ancestors"):
        ndda.diagnostics.non_gaussianity_figure(result)
    d = np.full((1, 4, *blocks), 10.0)
    stats = {"non_gaussianity": d, "selection_share": np.full((1, 4), 0.9), "moved_share": d / 40}
    result = dataclasses.replace(result, sample_stats=stats)
    figure = ndda.diagnostics.non_gaussianity_figure(result, "title")
    figure.draw_without_rendering()
    upper, lower = figure.axes[:2]
    if blocks:
        np.testing.assert_allclose(upper.get_images()[0].get_array(), np.ones((3, 4)))
    else:
        np.testing.assert_allclose(upper.get_lines()[-1].get_ydata(), 10.0)
    shares = [line.get_ydata() for line in lower.get_lines()]
    np.testing.assert_allclose(shares, [[0.9] * 4, [0.25] * 4])


@pytest.mark.parametrize("dressed", [False, True])
def test_map_figure_shows_truth_mean_and_error_on_their_scales(dressed):
    latitude, longitude = np.linspace(-90, 90, 7), np.arange(12) * 30.0
    truth = np.add.outer(latitude, longitude)
    truth[0] = np.nan
    land = np.tile(longitude < 90.0, (7, 1)).astype(float)
    places = {"station": (latitude[1:4], longitude[:3])}
    more = {"land": land, "places": places} if dressed else {}
    figure = ndda.diagnostics.map_figure(
        truth, truth + 1.0, latitude=latitude, longitude=longitude, units="K", title="t", **more
    )
    figure.draw_without_rendering()
    meshes = [axes.collections[0] for axes in figure.axes[:3]]
    np.testing.assert_allclose(meshes[2].get_array()[1:], 1.0)
    assert meshes[0].get_clim() == meshes[1].get_clim()
    assert meshes[2].get_clim() == pytest.approx((-1.0, 1.0))
    observed = figure.axes[3]
    assert [line.get_label() for line in observed.get_lines()] == (["station (3)"] if dressed else [])


@pytest.mark.parametrize("dates", [False, True])
def test_genealogy_draws_each_link_once(dates):
    result = by_hand()
    result.sample_stats["distinct_ancestors"] = np.full((2, 4), 3)
    time = np.arange("2020-01-01", "2020-01-05", dtype="datetime64[D]") if dates else None
    figure = ndda.diagnostics.genealogy(result, (1,), paths=ndda.results.fixed_lag(result, 1), lags=(1, 2), time=time)
    figure.draw_without_rendering()
    count, lines, paths = figure.axes
    links = [len(collection.get_segments()) for collection in lines.collections]
    whole = np.array(LINES[3])
    assert links == [len({tuple(link) for link in whole[:, k : k + 2]}) for k in range(3)]
    start, end = lines.collections[0].get_segments()[0]
    assert (start[1], end[1]) == (0.0, 11.0)  # of draw 3, particle 0 at the first time and 1 at the second
    counts = {line.get_label(): list(line.get_ydata()) for line in count.get_lines()}
    assert counts["genealogy of the last particles"] == [len(set(whole[:, k])) for k in range(4)]
    assert list(counts) == [
        "distinct ancestors of one step", "fixed lag 1", "fixed lag 2",
        "genealogy of the last particles", "backward simulation",
    ]  # fmt: skip
    assert paths.get_title() == "backward simulation"


def test_predictive_at_point_shows_what_the_forecast_has_not_seen():
    result = by_hand()
    result.observed_data["y"][2] = np.nan
    unseen = np.where(np.arange(4)[:, None] < 1, result.observed_data["y"], np.nan)
    forecast = dataclasses.replace(result, observed_data={"y": unseen})
    figure = ndda.diagnostics.predictive_at_point(result, forecast, "y", (0,), step=1, units="K")
    figure.draw_without_rendering()
    over_time, at_time = figure.axes
    lines = {line.get_label(): line for line in over_time.get_lines()}
    assert len(lines["forecast, median and 90 % interval"].get_xdata()) == 3
    np.testing.assert_allclose(lines["analysis, median and 90 % interval"].get_ydata(), 101.5 + 10 * np.arange(4))
    assert lines["observations"].get_xdata().tolist() == [0]
    assert lines["not seen by the forecast"].get_xdata()[[0, -1]].tolist() == [1, 3]
    assert over_time.get_ylabel() == "y[0] (K)"
    assert len(at_time.get_lines()) == 1


def test_pit_over_time_counts_and_marks_quartiles():
    pit, time = np.linspace(0.005, 0.995, 100), np.repeat(np.arange(10), 10)
    figure = ndda.diagnostics.pit_over_time(pit, time, bins=5, windows=2)
    figure.draw_without_rendering()
    whole, by_time = figure.axes
    assert [bar.get_height() for bar in whole.patches[:5]] == [20] * 5
    (first, second) = by_time.collections
    np.testing.assert_allclose([s[0, 1] for s in first.get_segments()], np.quantile(pit[:50], [0.25, 0.5, 0.75]))
    assert second.get_segments()[0][:, 0].tolist() == [5, 9]
