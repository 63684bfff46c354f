"""Figures of the Held-Suarez demo; matplotlib is imported when a figure is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos.held_suarez_demo import (
    ENKF,
    ENKF_V,
    FREE,
    GLOBAL,
    GUIDED,
    LOCAL,
    MAIN,
    WeatherExperiment,
    WeatherResult,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    FREE: "#888888",
    GUIDED: "#56B4E9",
    GLOBAL: "#CC79A7",
    LOCAL: "#009E73",
    ENKF: "#000000",
    ENKF_V: "#0072B2",
    MAIN: "#D55E00",
}
SYMBOLS = {"temperature": "T", "u_component_of_wind": "u", "v_component_of_wind": "v", "surface_pressure": "p"}


def label(name: str) -> str:
    """Label of a channel in figures, such as "T 850 hPa" or "surface pressure"."""
    variable, _, level = name.rpartition("_")
    return f"{SYMBOLS.get(variable, variable)} {level} hPa" if level.isdigit() else name.replace("_", " ")


def units(layout: ndda.Layout) -> list[str]:
    """Unit of each channel in matplotlib's notation."""
    spelled = {"m s-1": "m s$^{-1}$"}
    return [spelled.get(v.units, v.units) for v in layout.variables for _ in range(v.num_channels)]


def days(experiment: WeatherExperiment) -> np.ndarray:
    """Time of each cycle in days since the first ensemble."""
    return (1 + np.arange(experiment.cycles)) * experiment.step_hours / 24.0


def _by_observed(result: WeatherResult) -> dict[str, np.ndarray]:
    """Masks of the observed and of the unobserved channels, by title."""
    return {"observed variables": result.observed, "unobserved variables": ~result.observed}


def figures(
    experiment: WeatherExperiment, prior: ndda.priors.SphericalEmulator, result: WeatherResult
) -> dict[str, Figure]:
    """All figures of the demo by name, for the default network.

    Args:
        experiment: settings of the experiment.
        prior: emulator, for its grid and climate.
        result: runs of the experiment, with the free ensemble and moved FA-APF among them.
    """
    observed, unobserved = "surface_pressure", "v_component_of_wind_250"
    at_place = (observed, "temperature_500", "v_component_of_wind_850", unobserved)
    return {
        "skill": skill_over_time(experiment, prior, result),
        "spread": spread_and_error(experiment, result),
        "map_observed": maps(experiment, prior, result, observed),
        "map_unobserved": maps(experiment, prior, result, unobserved),
        "station": at_station(experiment, prior, result, at_place),
        "ranks": rank_histograms(result),
    }


def skill_over_time(
    experiment: WeatherExperiment, prior: ndda.priors.SphericalEmulator, result: WeatherResult
) -> Figure:
    """Figure of the area-weighted error of each filter over time, in standard deviations of the climate.

    Each channel has a panel; observed channels are on the left, unobserved channels on the right.
    """
    from matplotlib.figure import Figure

    names, time = ndda.observation.channel_names(prior.layout), days(experiment)
    groups = _by_observed(result)
    columns = [max(1, (int(chosen.sum()) + 1) // 2) for chosen in groups.values()]
    figure = Figure(figsize=(3.0 * sum(columns) + 0.4, 6.4), layout="constrained")
    parts = np.asarray(figure.subfigures(1, 2, width_ratios=columns, wspace=0.03))
    top = 1.03 * max(1.0, *(float(np.mean([run.rmse for run in runs], axis=0).max()) for runs in result.runs.values()))
    for part, width, (title, chosen) in zip(parts, columns, groups.items(), strict=True):
        part.suptitle(title, fontsize=12, fontweight="bold")
        panels = part.subplots(2, width, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[int(chosen.sum()) :]:
            axes.axis("off")
        for axes, c in zip(panels.flat, np.flatnonzero(chosen), strict=False):
            axes.axhline(1.0, color="#bbbbbb", lw=0.8, ls=":")
            for name in result.runs:
                axes.plot(time, result.by_time(name, "rmse", np.array([c])).mean(0), **_line(name))
            axes.set_title(label(names[c]), fontsize=10)
            axes.set(xlim=(0, time[-1]), ylim=(0, top))
            axes.locator_params(axis="x", nbins=4, steps=[1, 2, 5, 10])
            _plain(axes)
        for axes in panels[-1]:
            axes.set_xlabel("days")
        panels[0, 0].set_ylabel("RMSE (s.d. of the climate)")
        panels[1, 0].set_ylabel("RMSE (s.d. of the climate)")
    handles, labels = parts[0].axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def spread_and_error(experiment: WeatherExperiment, result: WeatherResult) -> Figure:
    """Figure of error and spread of each filter over time; observed channels above, unobserved channels below."""
    from matplotlib.figure import Figure

    time, groups = days(experiment), _by_observed(result)
    figure = Figure(figsize=(2.7 * len(result.runs) + 0.6, 5.2), layout="constrained")
    panels = figure.subplots(2, len(result.runs), sharex=True, sharey=True, squeeze=False)
    for row, (title, chosen) in zip(panels, groups.items(), strict=True):
        for axes, name in zip(row, result.runs, strict=True):
            error, spread = (result.by_time(name, key, chosen).mean(0) for key in ("rmse", "spread_by_time"))
            axes.fill_between(time, error, spread, color=COLORS[name], alpha=0.15, lw=0)
            axes.plot(time, error, color=COLORS[name], lw=2.2, label="error of the mean")
            axes.plot(time, spread, color=COLORS[name], lw=1.6, ls=(0, (4, 2)), label="spread")
            axes.set(xlim=(0, time[-1]), ylim=0)
            _plain(axes)
        row[0].set_ylabel(f"{title}\n(s.d. of the climate)")
    for axes, name in zip(panels[0], result.runs, strict=True):
        axes.set_title(name, fontsize=11)
    for axes in panels[-1]:
        axes.set_xlabel("days")
    panels[0, 0].legend(fontsize=9, frameon=False)
    return figure


def maps(
    experiment: WeatherExperiment,
    prior: ndda.priors.SphericalEmulator,
    result: WeatherResult,
    name: str,
    at_days: Sequence[float] = (3, 7, 15),
) -> Figure:
    """Figure of global maps of one channel: truth, ensemble means and their errors.

    The maps show anomalies from the zonal mean of the climate.

    Args:
        experiment: settings of the experiment.
        prior: emulator, for its grid and climate.
        result: runs with the free ensemble and moved FA-APF among them; the first truth is shown.
        name: name of the channel, such as "temperature_850", see `ndda.observation.channel`.
        at_days: times in days, one row each; the nearest cycle is shown.

    Raises:
        ValueError: the state has no such channel.
    """
    from matplotlib.figure import Figure

    c, time = ndda.observation.channel(prior.layout, name), days(experiment)
    climate = np.asarray(prior.state_mean)[:, None, c]
    truth = result.states[0][..., c] - climate
    analysis, forecast = (result.runs[run][0].mean[..., c] - climate for run in (MAIN, FREE))
    steps = [int(np.abs(time - day).argmin()) for day in at_days]
    limit = _round_number(float(np.quantile(np.abs(truth[steps]), 0.985)))
    columns = {
        "truth": truth, f"{MAIN}, mean": analysis, f"{FREE}, mean": forecast,
        f"{MAIN}: error": analysis - truth, f"{FREE}: error": forecast - truth,
    }  # fmt: skip
    figure = Figure(figsize=(17.5, 1.95 * len(steps) + 1.4), layout="constrained")
    state = "observed at the dots" if result.observed[c] else "not observed"
    note = "black contours on the means: strong anomalies of the truth"
    figure.suptitle(f"{label(name)}, {state}: anomaly from the zonal-mean climate ({note})", fontsize=13)
    panels = figure.subplots(len(steps), 5, subplot_kw={"projection": "mollweide"}, squeeze=False)
    places = next(iter(experiment.observing(prior).values())).places(prior.layout)
    # An odd number of colors makes anomalies near zero white.
    levels = limit * np.linspace(-1.0, 1.0, 18)
    images = {}
    for i, (row, step) in enumerate(zip(panels, steps, strict=True)):
        for k, (axes, (title, field)) in enumerate(zip(row, columns.items(), strict=True)):
            colors = "RdBu_r" if k < 3 else "PuOr_r"
            x, y, values = _around_the_globe(prior.layout, field[step])
            images[k] = axes.contourf(x, y, values, levels, cmap=colors, extend="both")
            if k in (1, 2):
                _, _, true_values = _around_the_globe(prior.layout, truth[step])
                axes.contour(x, y, true_values, levels[[4, 13]], colors="k", linewidths=0.6, linestyles="solid")
            if k == 0 and result.observed[c]:
                longitude = (places[:, 1] + 180.0) % 360.0 - 180.0
                axes.plot(np.radians(longitude), np.radians(places[:, 0]), ".", color="k", ms=2.2, mew=0)
            _globe(axes)
            if i == 0:
                axes.set_title(title, fontsize=12)
        row[0].text(-0.04, 0.5, f"day {time[step]:g}", transform=row[0].transAxes, rotation=90, va="center", ha="right")
    spelled = units(prior.layout)[c]
    for first, last, what in ((0, 3, "anomaly"), (3, 5, "error of the mean")):
        bar = figure.colorbar(
            images[first],
            ax=panels[:, first:last],
            location="bottom",
            shrink=0.6 if first == 0 else 0.9,
            aspect=45,
            pad=0.03,
            ticks=limit * np.linspace(-1.0, 1.0, 5),
            format="{x:g}",
        )
        bar.set_label(f"{what} ({spelled})")
    return figure


def _round_number(value: float) -> float:
    """Number nearest in ratio to `value` among 1, 2, 4, 6 and 8 times powers of ten, whose quarters are short."""
    candidates = np.outer(10.0 ** np.arange(-6, 7), [1.0, 2.0, 4.0, 6.0, 8.0]).reshape(-1)
    return float(candidates[np.abs(np.log(candidates / value)).argmin()])


def at_station(
    experiment: WeatherExperiment,
    prior: ndda.priors.SphericalEmulator,
    result: WeatherResult,
    names: Sequence[str],
    *,
    latitude: float = 45.0,
) -> Figure:
    """Figure of the free ensemble and of moved FA-APF at one station over time, with truth and observations.

    Args:
        experiment: settings of the experiment.
        prior: emulator.
        result: runs with the free ensemble and moved FA-APF among them; the first truth is shown.
        names: names of the channels, one panel each.
        latitude: latitude in degrees north; the nearest station of the first network is shown.

    Raises:
        ValueError: the state has no such channel.
    """
    import jax
    from matplotlib.figure import Figure

    site, network = next(iter(experiment.observing(prior).items()))
    places, time = network.places(prior.layout), days(experiment)
    k = int(np.abs(places[:, 0] - latitude).argmin())
    truth = np.asarray(jax.vmap(lambda x: network.at_places(x, prior.layout))(result.states[0]))[:, k]
    spelled, seen = units(prior.layout), network.channels(prior.layout)
    rows = (len(names) + 1) // 2
    figure = Figure(figsize=(12.5, 2.9 * rows + 0.8), layout="constrained")
    north, east = places[k]
    side = "N" if north >= 0 else "S"
    figure.suptitle(f"station at {abs(north):.0f}°{side} {east:.0f}°E", fontsize=12, fontweight="bold")
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        c = ndda.observation.channel(prior.layout, name)
        for run in (FREE, MAIN):
            members = result.runs[run][0].at_stations[:, :, k, c]
            low, lower, middle, upper, high = np.quantile(members, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
            axes.fill_between(
                time, low, high, color=COLORS[run], alpha=0.22, lw=0, label=f"{run}, 50 and 90 % intervals"
            )
            axes.fill_between(time, lower, upper, color=COLORS[run], alpha=0.35, lw=0)
            axes.plot(time, middle, color=COLORS[run], lw=1.3)
        axes.plot(time, truth[:, c], color="k", lw=1.6, label="truth")
        if c in seen:
            j = seen.index(c)
            bars: dict[str, Any] = {"fmt": "o", "ms": 3.5, "color": "#0072B2", "elinewidth": 1.0}
            y = result.observations[site][:, k, j]
            axes.errorbar(time, y, network.error()[j], label="observations ± error", zorder=3, **bars)
        axes.set_title(label(name) + ("" if result.observed[c] else ", not observed"), fontsize=10)
        axes.set(ylabel=spelled[c], xlim=(0, time[-1] + 0.25))
        _plain(axes)
    for axes in panels.flat[len(names) :]:
        axes.axis("off")
    for axes in panels[-1]:
        axes.set_xlabel("days")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def rank_histograms(result: WeatherResult, *, bars: int = 13) -> Figure:
    """Figure of rank histograms of the truth after the spin-up; they are flat for a calibrated ensemble.

    Args:
        result: runs of the experiment.
        bars: number of bars into which neighboring ranks are combined.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 * len(result.runs) + 0.5, 4.4), layout="constrained")
    panels = figure.subplots(2, len(result.runs), sharex=True, sharey="row", squeeze=False)
    for row, (title, chosen) in zip(panels, _by_observed(result).items(), strict=True):
        for axes, name in zip(row, result.runs, strict=True):
            edges, density = result.rank_frequencies(name, chosen, bars)
            axes.bar(edges[:-1], density, np.diff(edges), align="edge", color=COLORS[name], alpha=0.75, edgecolor="w")
            axes.axhline(1.0, color="k", lw=0.8, ls="--")
            axes.set(xlim=(0, 1), xticks=(0, 0.5, 1))
            _plain(axes)
        row[0].set_ylabel(f"{title}\nrelative frequency")
        row[0].set_ylim(0, min(6.0, row[0].get_ylim()[1]))
    for axes, name in zip(panels[0], result.runs, strict=True):
        axes.set_title(name, fontsize=11)
    for axes in panels[-1]:
        axes.set_xlabel("rank of the truth / largest rank")
    return figure


def _line(name: str) -> dict[str, Any]:
    """Line style of a filter."""
    return {
        "color": COLORS[name],
        "lw": 2.4 if name == MAIN else 1.5,
        "label": name,
        "zorder": 3 if name == MAIN else 2,
    }


def _plain(axes: Axes) -> None:
    """Remove the upper and right frame and add a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.5)


def _globe(axes: Axes) -> None:
    """Draw a grid of meridians and parallels without labels."""
    axes.set(xticks=np.radians(np.arange(-120, 121, 60)), yticks=np.radians([-60, -30, 0, 30, 60]))
    axes.set(xticklabels=[], yticklabels=[])
    axes.grid(color="k", alpha=0.2, lw=0.4)


def _around_the_globe(layout: ndda.Layout, field: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Extend a field to both poles and around the globe: (longitude, latitude, values), angles in radians."""
    coordinates, around = layout.coords(), field.shape[1]
    half = around // 2
    values = np.concatenate([field[:, half:], field[:, : half + 1]], axis=1)
    longitude = np.radians(np.append(coordinates["longitude"][half:] - 360.0, coordinates["longitude"][: half + 1]))
    poles = [np.full(around + 1, field[row].mean()) for row in (0, -1)]
    latitude = np.radians(np.concatenate([[-90.0], coordinates["latitude"], [90.0]]))
    return longitude, latitude, np.concatenate([poles[0][None], values, poles[1][None]])
