"""Figures of filter results; matplotlib is imported when a figure is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.results import smoothing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from numpyro_diffusion_da.results.result import FilterResult

PALETTE = ("#D55E00", "#777777", "#0072B2", "#009E73", "#E69F00", "#000000")
"""Colors of Okabe & Ito, distinguishable without full color vision."""


def median_over_blocks(values: np.ndarray) -> np.ndarray:
    """Median over blocks of a statistic of one chain: (time,) or (time, block) -> (time,).

    Statistics of weights have a trailing axis of blocks with localized resampling; others are returned as they are.
    """
    return values if values.ndim == 1 else np.median(values, axis=1)


def skill_figure(
    days: Sequence[float] | np.ndarray,
    scores: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    units: Mapping[str, str],
    stats: Mapping[str, np.ndarray],
    title: str = "",
) -> Figure:
    """Figure of error and spread over time for several runs, and of the effective particles of the first run.

    Each field has a panel. A last panel shows distinct ancestors and effective sample size (ESS) of the first run.

    Args:
        days: time of each step in days, shape (time,).
        scores: run -> field -> "rmse" and "spread", each with one value per step. Each run has its own color.
        units: field -> unit of the field, one entry per panel.
        stats: `FilterResult.sample_stats` of the first run; its first chain is shown.
        title: title of the figure.

    Returns:
        The figure.
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
    # The weights of many blocks are not kept.
    particles = len(stats["log_weights" if "log_weights" in stats else "solver_residual"][0])
    count.set(title=f"{next(iter(scores))}: effective particles", ylim=(0.9, 1.1 * particles))
    for axes in panels[: len(units) + 1]:
        axes.set(xlabel="days", xlim=(0, days[-1]))
    for axes in rest:
        axes.axis("off")
    lines = [*panels[0].get_lines(), *count.get_lines()]
    rest[-1].legend(lines, [line.get_label() for line in lines], loc="center", frameon=False)
    return figure


def non_gaussianity_figure(result: FilterResult, title: str = "") -> Figure:
    """Figure of where and when an ensemble is not Gaussian, from a filter that moves its ancestors.

    The upper panel shows the statistic D by block of the state and time, or by time if there are no blocks: about 1 or
    less if the ensemble is Gaussian (`smc.kalman_move`). The lower panel shows which share of its power selection uses,
    and how much of the observations is left to the move.

    Args:
        result: result of `FAAPF` with a `move`; its first chain is shown.
        title: title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: the result is not one of a filter that moves its ancestors.
    """
    from matplotlib.figure import Figure

    stats = result.sample_stats
    if "non_gaussianity" not in stats:
        raise ValueError(
            "non_gaussianity_figure got a result of a filter that moves no ancestors; run "
            "ndda.FAAPF(model, move=ndda.KalmanMove())."
        )
    d, share, moved = (stats[name][0] for name in ("non_gaussianity", "selection_share", "moved_share"))
    steps = np.arange(1, len(d) + 1)
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1.0])
    if d.ndim == 2:
        # Colors change at 1, and a factor of 10 on either side is shown.
        shown = np.log10(np.clip(d.T, 0.1, 10.0))
        image = upper.imshow(
            shown, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-1.0, vmax=1.0,
            extent=(0.5, len(d) + 0.5, -0.5, d.shape[1] - 0.5), interpolation="nearest",
        )  # fmt: skip
        bar = figure.colorbar(image, ax=upper, pad=0.01, label="D", ticks=[-1.0, 0.0, 1.0])
        bar.set_ticklabels(["0.1 or less", "1", "10 or more"])
        upper.set(ylabel="block of the state", title="non-Gaussianity D (white: 1; blue: Gaussian)")
    else:
        upper.axhline(1.0, color="k", lw=0.8)
        upper.semilogy(steps, np.maximum(d, 0.01), color=PALETTE[0])
        upper.set(ylabel="D", title="non-Gaussianity D (1 or less: Gaussian)")
    lower.plot(steps, share, color=PALETTE[2], label="selection's share of its power, lambda")
    lower.plot(steps, moved.reshape(len(moved), -1).mean(1), color=PALETTE[3], label="observations used by the move")
    lower.set(xlabel="step", ylabel="share", ylim=(-0.03, 1.03), xlim=(0.5, len(d) + 0.5))
    figure.legend(*lower.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
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
    """Figure of four maps: a true field, the ensemble mean, the error of the mean, and the observed places.

    Args:
        truth: true field, shape (latitude, longitude).
        mean: ensemble mean, shape (latitude, longitude).
        latitude: latitudes in degrees north, shape (latitude,).
        longitude: longitudes in degrees east, shape (longitude,).
        units: unit of the field.
        land: land-sea mask, 1 on land, shape (latitude, longitude); adds coastlines.
        places: kind of instrument -> latitudes and longitudes in degrees, each of shape (point,).
        title: title of the figure.

    Returns:
        The figure.
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
    """Figure of the predictive distributions of one observed value: over time, and as histograms at one time.

    Both distributions consist of draws of the observation, error included, from all chains. At `step` the forecast is
    p(y_k | y_{1:k-1}), and the analysis, which has seen the value, is p(y_rep | y_{1:k}). The rank of the value in the
    forecast tests the forecast. The analysis should contain the value.

    Args:
        analysis: result of the filter.
        forecast: result of the same filter with the same key, and with NaN for all observations from `step` on.
        site: name of an observed site.
        index: index of the value in the site; () for a scalar site.
        step: index of the first step whose observation the forecast has not seen.
        time: time of each step; 0, 1, ... by default.
        units: unit of the value.
        title: title of the figure.

    Returns:
        The figure.
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
        over_time.plot(time[since[name]], middle, color=colors[name], label=f"{name}, median and 90 % interval")
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
    over_time.set_ylim(low, high + 0.2 * (high - low))  # space for the legends
    return figure


def pit_over_time(pit: np.ndarray, time: np.ndarray, *, bins: int = 10, windows: int = 6, title: str = "") -> Figure:
    """Figure of probability integral transforms (PIT) of observations: a histogram, and their values over time.

    The PIT is uniform if predictions are calibrated. Values accumulate at both ends if predictions are too narrow, in
    the middle if they are too wide, and at one end if they are biased. The right panel marks median and quartiles of
    each window of time; they should lie on the gray lines.

    Args:
        pit: PIT of each observation, between 0 and 1, shape (observation,).
        time: time of each observation, as numbers or dates, shape (observation,).
        bins: number of bins of the histogram.
        windows: number of windows of time.
        title: title of the figure.

    Returns:
        The figure.
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
    band = {"color": "#dddddd", "lw": 0, "zorder": 0, "label": "95 % interval of a bar if uniform"}
    whole.axhspan(expected - margin, expected + margin, **band)
    whole.set(
        xlabel="PIT",
        ylabel="number of observations",
        xlim=(0, 1),
        ylim=(0, 1.25 * max(counts.max(), expected + margin)),
    )
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
    """Figure of the genealogy of the last particles, and of the number of distinct particles on it over time.

    Args:
        result: result of a particle filter.
        index: index of the value of the state to show; () for a scalar state.
        paths: trajectories of `Filter.backward_simulation`, shown in a second panel.
        chain: index of the chain to show.
        lags: fixed lags for which to show the number of distinct particles.
        time: time of each step; 0, 1, ... by default.
        title: title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: the result has no genealogy: it comes from an ensemble Kalman filter or from localized resampling,
            or is already smoothed.
    """
    from matplotlib.figure import Figure

    smoothing.distinct_ancestors_at(result)  # raises where there is no genealogy
    lines = {"genealogy of the last particles": smoothing.trajectories(result)}
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
        count.plot(time, smoothing.distinct_ancestors_at(result, lag)[chain], color=color, label=f"fixed lag {lag}")
    panels = upper.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    for axes, (name, of_lines), color in zip(panels, lines.items(), (PALETTE[0], PALETTE[2]), strict=False):
        _links(axes, time, particles, of_lines.sample_stats["filter_draw"][chain], color)
        axes.set(title=name, xlabel="time", xlim=(time[0], time[-1]))
        axes.title.set_fontsize(10)
        count.plot(time, of_lines.sample_stats["distinct_lines"][chain], color=color, label=name)
    panels[0].set_ylabel(f"{result.latent_name}[{', '.join(map(str, index))}]" if index else result.latent_name)
    count.set(xlabel="time", ylabel="distinct particles", yscale="log", xlim=(time[0], time[-1]))
    count.set_ylim(0.9, 1.2 * len(particles))
    count.legend(fontsize=8, frameon=False, ncols=2)
    return figure


def _links(axes: Axes, time: np.ndarray, particles: np.ndarray, lines: np.ndarray, color: str) -> None:
    """Draw particles (draw, time) as dots and the links between them on lines (line, time), each link once."""
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
