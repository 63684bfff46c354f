"""Figures. Matplotlib is imported only when one is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.twin import BOOTSTRAP, ENKF, FREE, GUIDED, MAIN, TwinExperiment, TwinResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's palette, readable without colour vision.
PALETTE = ("#D55E00", "#777777", "#0072B2", "#009E73", "#E69F00", "#000000")
COLOURS = {FREE: "#999999", BOOTSTRAP: "#E69F00", GUIDED: "#56B4E9", MAIN: "#D55E00", ENKF: "#000000"}


def twin_figure(experiment: TwinExperiment, result: TwinResult) -> Figure:
    """Truth, observations and analysis in space and time; error over time; an unobserved site; ESS and inflation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    rows = figure.add_gridspec(2, 1, height_ratios=[1.1, 1.6])
    upper, lower = figure.add_subfigure(rows[0]), figure.add_subfigure(rows[1])
    mean = {name: run.posterior["x"][0].mean(0) for name, run in result.runs.items()}
    observations = np.full_like(result.states, np.nan)
    observations[:, :: experiment.every] = result.runs[MAIN].observed_data["y"]
    fields = {
        "truth": result.states,
        "observations": observations,
        f"{MAIN}, mean": mean[MAIN],
        f"{FREE}, mean": mean[FREE],
    }
    limit = float(np.abs(result.states).max())
    panels = upper.subplots(1, 4, sharey=True)
    for axes, (title, field) in zip(panels, fields.items(), strict=True):
        image = axes.imshow(field, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_facecolor("#dddddd")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("site")
    panels[0].set_ylabel("cycle")
    upper.colorbar(image, ax=panels, label="x", pad=0.01)

    grid = lower.add_gridspec(2, 2, height_ratios=[1, 0.7])
    axes = lower.add_subplot(grid[0, 0])
    for name, errors in result.rmse_by_time.items():
        axes.plot(errors.mean(0), color=COLOURS[name], label=name, lw=2.2 if name == MAIN else 1.3)
        if len(errors) > 1:
            error = errors.std(0, ddof=1) / np.sqrt(len(errors))
            axes.fill_between(
                np.arange(errors.shape[1]),
                errors.mean(0) - error,
                errors.mean(0) + error,
                color=COLOURS[name],
                alpha=0.2,
                lw=0,
            )
    axes.axvline(experiment.spin_up, color="k", lw=0.7, ls=":")
    axes.set_ylim(0)
    axes.set_xlabel("cycle (scored to the right of the dotted line)")
    axes.set_ylabel("RMSE")
    axes.set_title(f"error of the ensemble mean, all sites, mean of {len(errors)} truths", fontsize=10)
    axes.legend(fontsize=8, ncols=2, frameon=False)

    axes = lower.add_subplot(grid[0, 1])
    site = 1  # not observed: every `experiment.every`-th is, from 0
    for name in (FREE, MAIN):
        low, high = np.quantile(result.runs[name].posterior["x"][0, :, :, site], [0.05, 0.95], axis=0)
        axes.fill_between(np.arange(len(low)), low, high, color=COLOURS[name], alpha=0.35, lw=0, label=f"{name}, 90 %")
    axes.plot(mean[MAIN][:, site], color=COLOURS[MAIN], lw=1.2)
    axes.plot(result.states[:, site], color="k", lw=1.2, label="truth")
    axes.set_xlabel("cycle")
    axes.set_ylabel("x")
    axes.set_title(f"site {site}, which is not observed", fontsize=10)
    axes.legend(fontsize=8, ncols=3, frameon=False, loc="upper left")

    stats = result.runs[MAIN].sample_stats
    axes = lower.add_subplot(grid[1, 0])
    axes.plot(stats["distinct_ancestors"][0], color=COLOURS[MAIN], label="distinct ancestors, after inflation")
    axes.plot(stats["ess"][0], color=COLOURS[MAIN], ls=":", label="ESS of the weights, before it")
    axes.set_yscale("log")
    axes.set_ylim(0.9, 1.1 * len(stats["log_weights"][0]))
    axes.set_xlabel("cycle")
    axes.set_title(f"{MAIN}: how many particles count", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes = lower.add_subplot(grid[1, 1])
    axes.plot(stats["inflation"][0], color=COLOURS[MAIN])
    axes.set_yscale("log")
    axes.set_xlabel("cycle")
    axes.set_ylabel("alpha")
    axes.set_title(f"{MAIN}: inflation (1 = none)", fontsize=10)
    return figure


def skill_figure(
    days: Sequence[float] | np.ndarray,
    scores: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    units: Mapping[str, str],
    stats: Mapping[str, np.ndarray],
    title: str = "",
) -> Figure:
    """Error and spread of fields over time, of several runs; and how many particles of the first count.

    Args:
        days: time of each step, shape (time,).
        scores: run -> field -> "rmse" and "spread", one value a step. Each run has a colour, the first the strongest.
        units: field -> its unit. One panel each.
        stats: `FilterResult.sample_stats` of the first run, of which the first chain is shown.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    rows = (len(units) + 4) // 3
    figure = Figure(figsize=(13, 3 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(rows, 3, squeeze=False).reshape(-1)
    for axes, (field, unit) in zip(panels, units.items(), strict=False):
        for (run, fields), colour in zip(scores.items(), PALETTE, strict=False):
            axes.plot(days, fields[field]["rmse"], color=colour, lw=2, label=f"{run}: error of the mean")
            axes.plot(days, fields[field]["spread"], color=colour, ls="--", label=f"{run}: spread")
        axes.set(title=field, ylabel=unit, ylim=0)
    count, *rest = panels[len(units) :]
    count.plot(days, stats["distinct_ancestors"][0], color="k", label="distinct ancestors")
    count.plot(days, stats["ess"][0], color="k", ls=":", label="ESS of the weights, before inflation")
    count.set_yscale("log", base=2)
    count.yaxis.set_major_formatter("{x:.0f}")
    count.set(title=f"{next(iter(scores))}: particles that count", ylim=(0.9, 1.1 * len(stats["log_weights"][0])))
    for axes in panels[: len(units) + 1]:
        axes.set(xlabel="days", xlim=(0, days[-1]))
    for axes in rest:
        axes.axis("off")
    lines = [*panels[0].get_lines(), *count.get_lines()]
    rest[-1].legend(lines, [line.get_label() for line in lines], loc="center", frameon=False)
    return figure


def map_figure(
    truth: np.ndarray,
    mean: np.ndarray,
    *,
    latitude: np.ndarray,
    longitude: np.ndarray,
    units: str,
    land: np.ndarray | None = None,
    places: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    title: str = "",
) -> Figure:
    """Maps of a true field, of the particles' mean, of its error, and of where it was observed.

    Args:
        truth: shape (latitude, longitude).
        mean: shape (latitude, longitude).
        latitude: degrees north.
        longitude: degrees east.
        units: of the field.
        land: land-sea mask, 1 on land, shape (latitude, longitude), for coastlines.
        places: kind of instrument -> latitudes and longitudes, each (point,).
        title: of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.3), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    low, high = np.nanquantile(truth, [0.01, 0.99])
    limit = np.nanquantile(np.abs(mean - truth), 0.99)
    same: dict[str, Any] = {"cmap": "viridis", "vmin": low, "vmax": high}
    signed: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    shown = {"truth": (truth, same), "mean": (mean, same), "error of the mean": (mean - truth, signed)}
    for axes, (name, (values, style)) in zip(panels.flat, shown.items(), strict=False):
        image = axes.pcolormesh(longitude, latitude, values, rasterized=True, **style)
        figure.colorbar(image, ax=axes, pad=0.01, extend="both", label=units)
        if land is not None and land.min() < 0.5 < land.max():
            axes.contour(longitude, latitude, land, [0.5], colors="k", linewidths=0.5)
        axes.set_title(name, fontsize=10)
    axes = panels[1, 1]
    if land is not None:
        axes.pcolormesh(longitude, latitude, land, cmap="Greys", vmin=0.0, vmax=4.0, rasterized=True)
    for (name, (north, east)), colour in zip((places or {}).items(), ("k", *PALETTE), strict=False):
        size = min(5.0, 120 / np.sqrt(len(north) + 1))
        axes.plot(east, north, ".", color=colour, ms=size, mew=0, label=f"{name} ({len(north)})")
    axes.set_title("observed at", fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower right", ncols=3, frameon=False, fontsize=9, markerscale=1.5)
    for axes in panels.flat:
        axes.set(aspect="equal", xticks=range(0, 360, 60), yticks=range(-90, 91, 45))
    figure.supxlabel("degrees east", fontsize=10)
    figure.supylabel("degrees north", fontsize=10)
    return figure
