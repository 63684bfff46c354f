"""Figures. Matplotlib is imported only when one is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.results import smoothing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from numpyro_diffusion_da.results.result import FilterResult

# Okabe & Ito's palette, readable without color vision.
PALETTE = ("#D55E00", "#777777", "#0072B2", "#009E73", "#E69F00", "#000000")


def median_over_blocks(values: np.ndarray) -> np.ndarray:
    """A statistic of one chain over time: the median over blocks of localized ancestors, shape (time,)."""
    return values if values.ndim == 1 else np.median(values, axis=1)


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
        scores: run -> field -> "rmse" and "spread", one value a step. Each run has a color, the first the strongest.
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
        for (run, fields), color in zip(scores.items(), PALETTE, strict=False):
            axes.plot(days, fields[field]["rmse"], color=color, lw=2, label=f"{run}: error of the mean")
            axes.plot(days, fields[field]["spread"], color=color, ls="--", label=f"{run}: spread")
        axes.set(title=field, ylabel=unit, ylim=0)
    count, *rest = panels[len(units) :]
    count.plot(days, median_over_blocks(stats["distinct_ancestors"][0]), color="k", label="distinct ancestors")
    count.plot(
        days, median_over_blocks(stats["ess"][0]), color="k", ls=":", label="ESS of the weights, before tempering"
    )
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
    for (name, (north, east)), color in zip((places or {}).items(), ("k", *PALETTE), strict=False):
        size = min(5.0, 120 / np.sqrt(len(north) + 1))
        axes.plot(east, north, ".", color=color, ms=size, mew=0, label=f"{name} ({len(north)})")
    axes.set_title("observed at", fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower right", ncols=3, frameon=False, fontsize=9, markerscale=1.5)
    for axes in panels.flat:
        axes.set(aspect="equal", xticks=range(0, 360, 60), yticks=range(-90, 91, 45))
    figure.supxlabel("degrees east", fontsize=10)
    figure.supylabel("degrees north", fontsize=10)
    return figure


def predictive_at_point(
    analysis: FilterResult,
    forecast: FilterResult,
    site: str,
    index: tuple[int, ...] = (),
    *,
    step: int,
    time: Sequence[Any] | np.ndarray | None = None,
    units: str = "",
    title: str = "",
) -> Figure:
    """What is predicted of one observed value, before and after it is seen; over time, and at one time in full.

    Both are draws of the observation, its error included, all chains together: p(y_k | y_{1:k-1}) of the forecast at
    `step`, its first, and p(y_rep | y_{1:k}) of the analysis, which has seen the value itself. The forecast is judged
    by where the value falls in it; the analysis has to contain it.

    Args:
        analysis: of the filter.
        forecast: of the same filter with the observations from `step` on left out (NaN), and the same key.
        site: an observed site.
        index: of the value in it; () for a scalar site.
        step: the first step that the forecast does not see.
        time: one value a step; steps by default.
        units: of the value.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    time = np.arange(len(analysis.observed_data[site])) if time is None else np.asarray(time)
    point: tuple[Any, ...] = (..., *index)
    observed = analysis.observed_data[site][point]
    draws = {
        name: result.posterior_predictive[site][point].reshape(-1, len(time))
        for name, result in (("analysis", analysis), ("forecast", forecast))
    }
    colors = {"analysis": PALETTE[0], "forecast": PALETTE[2]}
    since = {"analysis": slice(None), "forecast": slice(step, None)}
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    over_time, at_time = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1.2])
    bins = np.histogram_bin_edges(np.concatenate([values[:, step] for values in draws.values()]), 40)
    for name, values in draws.items():
        low, middle, high = np.quantile(values[:, since[name]], [0.05, 0.5, 0.95], axis=0)
        over_time.fill_between(time[since[name]], low, high, color=colors[name], alpha=0.25, lw=0)
        over_time.plot(time[since[name]], middle, color=colors[name], label=f"{name}, median and 90 %")
        at_time.hist(values[:, step], bins, density=True, orientation="horizontal", color=colors[name], alpha=0.5)
    unseen = np.isnan(forecast.observed_data[site][point])
    over_time.plot(time[~unseen], observed[~unseen], "k.", ms=6, label="observations")
    over_time.plot(time[unseen], observed[unseen], "ko", ms=4, mfc="w", label="not seen by the forecast")
    over_time.axvline(time[step], color="k", lw=0.7, ls=":")
    if not np.isnan(observed[step]):
        at_time.axhline(observed[step], color="k")
    label = f"{site}[{', '.join(map(str, index))}]" if index else site
    over_time.set(xlabel="time", ylabel=f"{label} ({units})" if units else label, xlim=(time[0], time[-1]))
    at_time.set(title=f"at time {time[step]}", xlabel="density")
    at_time.title.set_fontsize(10)
    over_time.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    over_time.plot(time[step], observed[step], "ko", ms=10, mfc="none")
    low, high = over_time.get_ylim()
    over_time.set_ylim(low, high + 0.2 * (high - low))  # room for the legends
    return figure


def pit_over_time(pit: np.ndarray, time: np.ndarray, *, bins: int = 10, windows: int = 6, title: str = "") -> Figure:
    """Probability integral transforms of observations: their histogram, and where they fall in the course of time.

    Uniform where predictions are calibrated; at both ends where they are too narrow, in the middle where too wide, at
    one end where they are off. On the right, the middle and the quartiles of each window are marked, which belong on
    the gray lines.

    Args:
        pit: of each observation, between 0 and 1, shape (observation,).
        time: of each observation, as numbers or dates, shape (observation,).
        bins: of the histogram.
        windows: how many parts of the time are told apart.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    pit, time = np.asarray(pit, float), np.asarray(time)
    counts, edges = np.histogram(pit, bins, (0.0, 1.0))
    expected = len(pit) / bins
    margin = 1.96 * np.sqrt(expected * (1 - 1 / bins))
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    whole, by_time = figure.subplots(1, 2, width_ratios=[1, 1.8])
    whole.bar(edges[:-1], counts, 1 / bins, align="edge", color=PALETTE[2], alpha=0.8, edgecolor="w")
    whole.axhline(expected, color="k", lw=1)
    band = {"color": "#dddddd", "lw": 0, "zorder": 0, "label": "95 % of bars if uniform"}
    whole.axhspan(expected - margin, expected + margin, **band)
    whole.set(xlabel="PIT", ylabel="observations", xlim=(0, 1), ylim=(0, 1.25 * max(counts.max(), expected + margin)))
    whole.legend(fontsize=8, frameon=False, loc="upper center")
    for quarter in (0.25, 0.5, 0.75):
        by_time.axhline(quarter, color="#aaaaaa", lw=1)
    by_time.plot(time, pit, ".", color=PALETTE[2], ms=4)
    for part in np.array_split(np.unique(time), windows):
        if len(part):
            quartiles = np.quantile(pit[np.isin(time, part)], [0.25, 0.5, 0.75])
            by_time.hlines(quartiles, part[0], part[-1], color=PALETTE[0], lw=[1.2, 2.4, 1.2])
    by_time.set(xlabel="time", ylabel="PIT", ylim=(0, 1))
    return figure


def genealogy(
    result: FilterResult,
    index: tuple[int, ...] = (),
    *,
    paths: FilterResult | None = None,
    chain: int = 0,
    lags: Sequence[int] = (5,),
    time: Sequence[Any] | np.ndarray | None = None,
    title: str = "",
) -> Figure:
    """The lines of the last particles through those of earlier times, and how many different ones there are.

    Args:
        result: of a filter that selects.
        index: of the value of the state that is shown; () for a scalar.
        paths: trajectories of `Filter.backward_simulation`, shown beside the genealogy.
        chain: which filter.
        lags: fixed lags whose distinct lines are shown too.
        time: one value a step; steps by default.
        title: of the figure.

    Raises:
        ValueError: a result without a genealogy, see `smoothing`.
    """
    from matplotlib.figure import Figure

    lines = {"lines of the last particles": smoothing.trajectories(result)}
    if paths is not None:
        lines["backward simulation"] = paths
    point: tuple[Any, ...] = (..., *index)
    particles = result.posterior[result.latent_name][chain][point]
    time = np.arange(particles.shape[1]) if time is None else np.asarray(time)
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(2, 1, height_ratios=[1.5, 1])
    upper, count = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1]).subplots()
    stats = result.sample_stats
    count.plot(time, stats["distinct_ancestors"][chain], color="#999999", label="distinct ancestors of one step")
    for lag, color in zip(lags, PALETTE[3:], strict=False):
        count.plot(time, smoothing.distinct_ancestors_at(result, lag)[chain], color=color, label=f"lines of lag {lag}")
    panels = upper.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    for axes, (name, of_lines), color in zip(panels, lines.items(), (PALETTE[0], PALETTE[2]), strict=False):
        _links(axes, time, particles, of_lines.sample_stats["filter_draw"][chain], color)
        axes.set(title=name, xlabel="time", xlim=(time[0], time[-1]))
        axes.title.set_fontsize(10)
        count.plot(time, of_lines.sample_stats["distinct_lines"][chain], color=color, label=name)
    panels[0].set_ylabel(f"{result.latent_name}[{', '.join(map(str, index))}]" if index else result.latent_name)
    count.set(xlabel="time", ylabel="different particles", yscale="log", xlim=(time[0], time[-1]))
    count.set_ylim(0.9, 1.2 * len(particles))
    count.legend(fontsize=8, frameon=False, ncols=2)
    return figure


def _links(axes: Axes, time: np.ndarray, particles: np.ndarray, lines: np.ndarray, color: str) -> None:
    """Particles (draw, time) as dots, and the links of lines (line, time) between them, each drawn once."""
    from matplotlib.collections import LineCollection

    axes.plot(time, particles.T, ".", color="#aaaaaa", ms=2.5, mew=0, rasterized=True, zorder=1)
    dates = np.asarray(axes.convert_xunits(time))
    for k in range(len(time) - 1):
        links, counts = np.unique(lines[:, k : k + 2], axis=0, return_counts=True)
        ends = np.stack([particles[links[:, 0], k], particles[links[:, 1], k + 1]], axis=1)
        at = np.broadcast_to(dates[k : k + 2], ends.shape)
        widths = 0.3 + 1.7 * np.sqrt(counts / len(lines))
        axes.add_collection(
            LineCollection(np.stack([at, ends], axis=-1).tolist(), linewidths=widths, colors=color, alpha=0.7)
        )
