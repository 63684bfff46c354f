from __future__ import annotations

import numpy as np
import pytest

from numpyro_diffusion_da import plots


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
    figure = plots.skill_figure(days, scores, units, stats, "title")
    figure.draw_without_rendering()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[: fields + 1] == [*units, "analysis: particles that count"]
    assert [line.get_label() for line in figure.axes[0].get_lines()] == [
        f"{run}: {what}" for run in ("analysis", "forecast") for what in ("error of the mean", "spread")
    ]
    np.testing.assert_array_equal(figure.axes[0].get_lines()[1].get_ydata(), 0.9 * days)
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_legend() is not None]
    assert len(legend.get_texts()) == 6


@pytest.mark.parametrize("dressed", [False, True])
def test_map_figure_shows_truth_mean_and_error_on_their_scales(dressed):
    latitude, longitude = np.linspace(-90, 90, 7), np.arange(12) * 30.0
    truth = np.add.outer(latitude, longitude)
    truth[0] = np.nan
    land = np.tile(longitude < 90.0, (7, 1)).astype(float)
    places = {"station": (latitude[1:4], longitude[:3])}
    more = {"land": land, "places": places} if dressed else {}
    figure = plots.map_figure(truth, truth + 1.0, latitude=latitude, longitude=longitude, units="K", title="t", **more)
    figure.draw_without_rendering()
    meshes = [axes.collections[0] for axes in figure.axes[:3]]
    np.testing.assert_allclose(meshes[2].get_array()[1:], 1.0)
    assert meshes[0].get_clim() == meshes[1].get_clim()
    assert meshes[2].get_clim() == pytest.approx((-1.0, 1.0))
    observed = figure.axes[3]
    assert [line.get_label() for line in observed.get_lines()] == (["station (3)"] if dressed else [])
