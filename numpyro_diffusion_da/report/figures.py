"""Figures of a report as SVG texts that take the colors of the page around them."""

from __future__ import annotations

import io
import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.report.text import number, probability

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GRAY = "#3b82c4", "#c8711f", "#1f9d73", "#868b93"
"""Colors with a contrast above 3 on a white and on a dark page, told apart without full color vision."""

_INK = "#010203"
"""Stands for the color of the page's text, and is replaced by it in the SVG."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": _INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK
    ),
}


Coast = Sequence[np.ndarray]
"""Coastlines: arrays of longitude and latitude in degrees, shape (point, 2)."""


class Panel:
    """One figure of a report: the SVG text, what it shows in words, and its caption.

    Attributes:
        svg: the SVG element.
        alt: description for those who do not see it.
        caption: text below it.
    """

    def __init__(self, svg: str, alt: str, caption: str = "") -> None:
        self.svg, self.caption = svg, caption
        self.alt = f"{alt} {caption}".strip()


def _draw(draw: Any, alt: str, caption: str = "", size: tuple[float, float] = (4.6, 2.9)) -> Panel:
    """Make a figure by a function of its axes."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        return Panel(_svg(figure), alt, caption)


def _svg(figure: Figure) -> str:
    """SVG element of a figure, with ids of its own and the page's text color."""
    # Sizes are the same when it is drawn again.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    prefix = f"f{zlib.crc32(text.encode()):08x}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}', text)
    text = text.replace("url(#", f"url(#{prefix}")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace(_INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def over_time(times: Sequence[Any], table: pandas.DataFrame, name: str, unit: str) -> Panel:
    """Mean and RMS of O - B, and RMS of O - A, over time, with the RMS that is expected of O - B.

    Args:
        times: time of each row of the table.
        table: columns `mean`, `mean_se`, `rms`, `expected_rms` and, where there is an analysis, `rms_a`.
        name: name of the variable.
        unit: its unit.
    """

    def draw(axes: Any) -> None:
        mark = "." if len(table) > 1 else "o"
        axes.axhline(0, color=_INK, lw=0.6)
        axes.plot(
            times,
            table["expected_rms"],
            color=GRAY,
            ls="--",
            marker="" if len(table) > 1 else "_",
            label="expected RMS O - B",
        )
        axes.plot(times, table["rms"], color=BLUE, marker=mark, ms=4, label="RMS O - B")
        axes.plot(times, table["rms_a"], color=ORANGE, marker=mark, ms=4, label="RMS O - A")
        axes.plot(times, table["mean"], color=GREEN, marker="" if len(table) > 1 else "x", label="mean O - B")
        if table["mean_se"].notna().any():
            low, high = table["mean"] - table["mean_se"], table["mean"] + table["mean_se"]
            axes.fill_between(times, low, high, color=GREEN, alpha=0.25, lw=0)
        axes.set(title=name, ylabel=unit or "value")
        _time_axis(axes, times)
        _legend(axes)

    found, expected = (number(float(np.sqrt((table[c] ** 2).mean()))) for c in ("rms", "expected_rms"))
    return _draw(draw, f"{name} over time: RMS of O - B {found} {unit}, expected {expected} {unit}.", size=(4.6, 3.3))


def profile(table: pandas.DataFrame, name: str, unit: str) -> Panel:
    """Mean and RMS of O - B and O - A by level, with standard errors.

    Args:
        table: index of levels in hPa; columns `mean`, `mean_se`, `rms`, `rms_se`, `expected_rms`, and the first four
            with `_a` for the analysis.
        name: name of the variable.
        unit: its unit.
    """

    def draw(axes: Any) -> None:
        level = table.index.to_numpy(float)
        axes.axvline(0, color=_INK, lw=0.6)
        axes.plot(table["expected_rms"], level, color=GRAY, ls="--", label="expected RMS O - B")
        series = [("rms", BLUE, "-", "RMS O - B"), ("rms_a", ORANGE, "-", "RMS O - A")]
        series += [("mean", BLUE, ":", "mean O - B"), ("mean_a", ORANGE, ":", "mean O - A")]
        for column, color, style, label in series:
            error = table[column.replace("rms", "rms_se").replace("mean", "mean_se")].fillna(0.0)
            axes.errorbar(
                table[column], level, xerr=error, color=color, ls=style, marker=".", ms=5, elinewidth=1, label=label
            )
        axes.set_yscale("log")
        axes.set_yticks(level, [f"{one:g}" for one in level])
        axes.minorticks_off()
        axes.invert_yaxis()
        axes.set(title=name, ylabel="hPa", xlabel=unit or "value")
        _legend(axes)

    top, low = table["rms"].idxmax(), table["rms"].idxmin()
    ends = [f"{number(table.loc[k, 'rms'])} {unit} at {k:g} hPa" for k in (low, top)]
    alt = f"{name} by level: the RMS of O - B is from {ends[0]} to {ends[1]}; the table has the numbers."
    return _draw(draw, alt, size=(4.6, 3.6))


def dots(
    labels: Sequence[str], series: Sequence[tuple[str, str, Any, Any]], expected: float, label: str, alt: str
) -> Panel:
    """Ratios of groups with twice their standard errors, one group a line, on a logarithmic axis.

    Args:
        labels: name of each group, from top to bottom.
        series: name, color, values and standard errors of each series.
        expected: value without a fault.
        label: label of the axis.
        alt: description of the figure.
    """

    def draw(axes: Any) -> None:
        import matplotlib.ticker as ticker

        at = np.arange(len(labels), dtype=float)
        axes.axvline(expected, color=_INK, lw=1)
        axes.axvspan(expected / 1.25, expected * 1.25, color=GRAY, alpha=0.15, lw=0)
        for i, (name, color, values, errors) in enumerate(series):
            y = at + 0.24 * (i - (len(series) - 1) / 2)
            values, errors = np.asarray(values, float), 2.0 * np.nan_to_num(np.asarray(errors, float))
            there = values > 0
            low = np.minimum(errors, 0.9 * np.where(there, values, 0.0))
            axes.errorbar(
                values[there],
                y[there],
                xerr=(low[there], errors[there]),
                color=color,
                ls="",
                marker="o",
                ms=4,
                elinewidth=1.2,
                label=name,
            )
        axes.set_xscale("log")
        ends = axes.get_xlim()
        axes.set_xlim(min(ends[0], expected / 2), max(ends[1], expected * 2))
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_yticks(at, [_short(one, 26) for one in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        if len(series) > 1:
            _legend(axes)

    return _draw(draw, alt, size=(5.2, 0.9 + 0.25 * len(labels) + (0.3 if len(series) > 1 else 0.0)))


def ranks(counts: Any, name: str, p_value: float) -> Panel:
    """Histogram of ranks, relative to a flat one, with the band that holds 95 % of bins of independent rows."""
    counts = np.asarray(counts, float)
    height = counts / counts.mean()

    def draw(axes: Any) -> None:
        bins = len(counts)
        axes.bar((np.arange(bins) + 0.5) / bins, height, width=0.92 / bins, color=BLUE, alpha=0.75)
        margin = 1.96 * np.sqrt((1.0 - 1.0 / bins) / counts.mean())
        for edge in (1.0 - margin, 1.0 + margin):
            axes.axhline(edge, color=_INK, lw=0.8, ls="--")
        axes.axhline(1.0, color=_INK, lw=1)
        axes.set(
            title=f"{name} (p: {probability(p_value)})", xlabel="rank of the observation", ylabel="share / flat share"
        )
        axes.set(xlim=(0, 1), ylim=(0, max(1.6, 1.05 * height.max())))

    shape = (
        "U-shaped" if height[[0, -1]].mean() > 1.25 else "a hump" if height[[0, -1]].mean() < 0.75 else "nearly flat"
    )
    ends = f"first bin {height[0]:.2f}, last bin {height[-1]:.2f} of a flat share"
    return _draw(
        draw, f"Histogram of ranks of {name}: {shape}; {ends}; p-value {probability(p_value)}.", size=(4.2, 2.7)
    )


def box_map(
    table: pandas.DataFrame,
    column: str,
    title: str,
    unit: str,
    clear: np.ndarray | None = None,
    coast: Coast = (),
) -> Panel:
    """Boxes on a map, colored by a column.

    Args:
        table: a row for each box: columns `south`, `north`, `west`, `east` and the column to show.
        column: the column.
        title: title of the map.
        unit: unit of the column.
        clear: for values of both signs, True where a value differs from 0; others are gray. None for values from 0 on.
        coast: coastlines.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb
    from matplotlib.patches import Rectangle

    values = table[column].to_numpy(float)
    largest = float(np.quantile(np.abs(values), 0.95)) or float(np.abs(values).max())
    largest = _nice(largest) if largest > 0 else 1.0
    blue, orange, gray = to_rgb(BLUE), to_rgb(ORANGE), to_rgb(GRAY)
    if clear is None:
        edges = largest * np.array([0.0, 0.05, 0.25, 0.5, 0.75, 1.0])
        colors = [(*gray, 0.22), *((*orange, alpha) for alpha in (0.35, 0.55, 0.8, 1.0))]
        shown = values
    else:
        edges = largest * np.array([-1.0, -0.6, -0.2, 0.2, 0.6, 1.0])
        colors = [(*blue, 1.0), (*blue, 0.5), (*gray, 0.22), (*orange, 0.5), (*orange, 1.0)]
        shown = np.where(clear, values, 0.0)
    norm, colormap = BoundaryNorm(edges, len(colors)), ListedColormap(colors)

    def draw(axes: Any) -> None:
        boxes = [
            Rectangle((one.west, one.south), one.east - one.west, one.north - one.south) for one in table.itertuples()
        ]
        color = colormap(norm(np.clip(shown, edges[0], 0.999 * edges[-1])))
        axes.add_collection(PatchCollection(boxes, facecolors=color, edgecolors=_INK, linewidths=0.15))
        west, east = float(table["west"].min()), float(table["east"].max())
        south, north = float(table["south"].min()), float(table["north"].max())
        if (east - west) > 180 or (north - south) > 90:
            west, east, south, north = -180.0, 180.0, -90.0, 90.0
        _map_axes(axes, title, (south, north, west, east), coast)
        _color_bar(axes, norm, colormap, unit, "max" if clear is None else "both")

    at = int(np.argmax(np.abs(shown)))
    corner = f"{table['south'].iloc[at]:g} degrees north, {table['west'].iloc[at]:g} degrees east"
    place = f"the largest is {number(shown[at])} {unit} in the box whose southwestern corner is at {corner}"
    return _draw(draw, f"Map of {title}: {len(table)} boxes; {place}.", size=(4.9, 3.5))


def _map_axes(axes: Any, title: str, ends: tuple[float, float, float, float], coast: Coast) -> None:
    """Labels of meridians and parallels, coastlines and frame of a map between south, north, west and east."""
    import matplotlib.ticker as ticker
    from matplotlib.collections import LineCollection

    south, north, west, east = ends
    for axis, first, last, signs in ((axes.xaxis, west, east, "EW"), (axes.yaxis, south, north, "NS")):
        if last - first > 90.0:
            axis.set_major_locator(ticker.MultipleLocator(60.0 if last - first > 180.0 else 30.0))
        else:
            axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _, signs=signs: _degrees(value, *signs)))
    if coast:
        # A region may cross the date line, and begin at 0 or at -180 degrees.
        copies = [np.add(line, (turn, 0.0)) for line in coast for turn in (-360.0, 0.0, 360.0)]
        copies = [line for line in copies if line[:, 0].max() > west and line[:, 0].min() < east]
        axes.add_collection(LineCollection(copies, colors=_INK, linewidths=0.5, alpha=0.8))
    axes.set(title=title, xlim=(west, east), ylim=(south, north))
    axes.grid(alpha=0.3)
    axes.set_aspect(1.0 / np.cos(np.deg2rad(min(abs(south + north) / 2.0, 75.0))))
    for spine in axes.spines.values():
        spine.set_visible(True)


def _degrees(value: float, positive: str, negative: str) -> str:
    """Meridian or parallel in words, as 60°W."""
    value = (value + 180.0) % 360.0 - 180.0 if positive == "E" and abs(value) > 180.0 else value
    letter = "" if value in (0.0, 180.0, -180.0) else positive if value > 0 else negative
    return f"{abs(value):g}°{letter}"


def _color_bar(axes: Any, norm: Any, colormap: Any, unit: str, extend: str) -> None:
    """Horizontal color bar of a map, with the edges of its colors."""
    from matplotlib.cm import ScalarMappable

    bar = axes.figure.colorbar(
        ScalarMappable(norm, colormap),
        ax=axes,
        orientation="horizontal",
        aspect=40,
        pad=0.04,
        shrink=0.8,
        extend=extend,
        ticks=norm.boundaries,
        drawedges=False,
    )
    bar.set_ticklabels([f"{edge:.3g}" for edge in norm.boundaries])
    bar.set_label(unit or "value")
    bar.outline.set_linewidth(0.4)


def field_map(
    values: np.ndarray,
    latitude: np.ndarray,
    longitude: np.ndarray,
    title: str,
    unit: str,
    caption: str = "",
    coast: Coast = (),
) -> Panel:
    """Field of both signs on a map, as an image.

    Args:
        values: the field, shape (latitude, longitude); NaN where it is undefined.
        latitude: latitudes in degrees, in order.
        longitude: longitudes in degrees, in order.
        title: title of the map.
        unit: unit of the field.
        caption: text below the map.
        coast: coastlines.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb

    longitude, order = _unwrapped(np.asarray(longitude, float))
    values = np.asarray(values, float)[:, order]
    size = np.abs(values[np.isfinite(values)])
    largest = _nice(float(np.quantile(size, 0.98))) if size.size and size.max() > 0 else 1.0
    edges = largest * np.array([-1.0, -0.7, -0.4, -0.1, 0.1, 0.4, 0.7, 1.0])
    colors = [(*to_rgb(BLUE), alpha) for alpha in (1.0, 0.65, 0.3)]
    colors += [(*to_rgb(GRAY), 0.08), *((*to_rgb(ORANGE), alpha) for alpha in (0.3, 0.65, 1.0))]
    norm, colormap = BoundaryNorm(edges, len(colors)), ListedColormap(colors)

    def draw(axes: Any) -> None:
        shown = np.clip(values, edges[0], 0.999 * edges[-1])
        axes.pcolormesh(longitude, latitude, shown, norm=norm, cmap=colormap, shading="nearest", rasterized=True)
        ends = [float(end) for axis in (latitude, longitude) for end in (np.min(axis), np.max(axis))]
        half = [abs(axis[1] - axis[0]) / 2.0 if len(axis) > 1 else 1.0 for axis in (latitude, longitude)]
        south, north = max(ends[0] - half[0], -90.0), min(ends[1] + half[0], 90.0)
        _map_axes(axes, title, (south, north, ends[2] - half[1], ends[3] + half[1]), coast)
        _color_bar(axes, norm, colormap, unit, "both")

    alt = f"Map of {title}: undefined everywhere."
    if size.size:
        i, j = np.unravel_index(np.nanargmax(np.abs(values)), values.shape)
        place = f"{_degrees(float(latitude[i]), *'NS')} {_degrees(float(longitude[j]), *'EW')}"
        alt = f"Map of {title}: the largest is {number(values[i, j])} {unit} at {place}."
    return _draw(draw, alt, caption, size=(4.9, 3.5))


def _unwrapped(longitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes from west to east without a jump, and the order of them: from -180 to 180 if they go around."""
    step = np.median(np.diff(np.sort(longitude % 360.0))) if len(longitude) > 1 else 360.0
    if len(longitude) * step > 359.0:
        found = (longitude + 180.0) % 360.0 - 180.0
    else:
        found = np.rad2deg(np.unwrap(np.deg2rad(longitude)))
    order = np.argsort(found)
    return found[order], order


def lines(
    times: Sequence[Any], series: Sequence[tuple[str, Any]], title: str, label: str, *, log: bool = False
) -> Panel:
    """Several series over time, each with its own color and dashes."""

    def draw(axes: Any) -> None:
        styles = itertools.product(("-", "--", ":"), (BLUE, ORANGE, GREEN, GRAY))
        for (name, values), (style, color) in zip(series, styles, strict=False):
            axes.plot(times, values, color=color, ls=style, marker="." if len(times) < 60 else "", ms=4, label=name)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set(title=title, ylabel=label)
        _time_axis(axes, times)
        if len(series) > 1:
            _legend(axes)

    ends = "; ".join(
        f"{name} from {number(float(v[0]))} to {number(float(v[-1]))}"
        for name, v in ((n, np.asarray(v)) for n, v in series)
    )
    return _draw(draw, f"{title} over time: {ends}.", size=(4.6, 3.2))


def spectra(series: Mapping[str, Any], title: str, unit: str) -> Panel:
    """Power by zonal wavenumber of several fields, on logarithmic axes."""

    def draw(axes: Any) -> None:
        styles = ((BLUE, "--"), (ORANGE, "-"), (GREEN, ":"))
        for (name, power), (color, style) in zip(series.items(), styles, strict=False):
            axes.plot(np.arange(1, len(power) + 1), power, color=color, ls=style, label=name)
        top = max(float(np.max(power)) for power in series.values())
        axes.set_xscale("log")
        axes.set_yscale("log")
        if top > 0:
            axes.set_ylim(1e-7 * top, 3.0 * top)
        for axis in (axes.xaxis, axes.yaxis):
            # The default labels of a logarithmic axis are TeX, which is off because names may hold a dollar.
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.set(title=title, xlabel="zonal wavenumber", ylabel=f"power ({unit})²" if unit else "power")
        _legend(axes)

    return _draw(draw, f"Spectra of {title} for {', '.join(series)} by zonal wavenumber.", size=(4.6, 3.2))


def _nice(value: float) -> float:
    """The next number of 1, 2, 2.5, 5 or 10 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * power >= value * (1 - 1e-9)))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _legend(axes: Any) -> None:
    """Legend below the axes, where it hides nothing."""
    axes.figure.legend(loc="outside lower center", ncols=2)


def _time_axis(axes: Any, times: Sequence[Any]) -> None:
    """Few, short labels of times, or of numbers of cycles."""
    if len(times) and isinstance(times[0], np.datetime64):
        import matplotlib.dates as dates

        locator = dates.AutoDateLocator(minticks=3, maxticks=6)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    else:
        axes.set_xlabel("cycle")
        axes.xaxis.get_major_locator().set_params(integer=True)
