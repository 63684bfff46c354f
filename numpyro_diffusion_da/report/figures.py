"""Figures of a report as SVG texts that take the colors of the page around them."""

from __future__ import annotations

import io
import itertools
import re
from typing import TYPE_CHECKING, Any

import numpy as np

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

_numbers = itertools.count()


class Panel:
    """One figure of a report: the SVG text, what it shows in words, and its caption.

    Attributes:
        svg: the SVG element.
        alt: description for those who do not see it.
        caption: text below it.
    """

    def __init__(self, svg: str, alt: str, caption: str = "") -> None:
        self.svg, self.alt, self.caption = svg, alt, caption


def _draw(draw: Any, alt: str, caption: str = "", size: tuple[float, float] = (4.6, 2.9)) -> Panel:
    """Make a figure by a function of its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE, "backend": matplotlib.get_backend()}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        return Panel(_svg(figure), alt, caption)


def _svg(figure: Figure) -> str:
    """SVG element of a figure, with ids of its own and the page's text color."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    prefix = f"f{next(_numbers)}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}', text)
    text = text.replace("url(#", f"url(#{prefix}")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace(_INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def over_time(times: Any, background: pandas.DataFrame, analysis: pandas.DataFrame, name: str, unit: str) -> Panel:
    """Mean and RMS of O - B and O - A by cycle, with the RMS that is expected of O - B."""

    def draw(axes: Any) -> None:
        x = [times[cycle] for cycle in background.index]
        axes.plot(x, background["expected_rms"], color=GRAY, ls="--", label="expected RMS O - B")
        axes.plot(x, background["rms"], color=BLUE, marker=".", ms=4, label="RMS O - B")
        if len(analysis):
            at = [times[cycle] for cycle in analysis.index]
            axes.plot(at, analysis["rms"], color=ORANGE, marker=".", ms=4, label="RMS O - A")
        axes.plot(x, background["mean"], color=BLUE, lw=1, ls=":", label="mean O - B")
        axes.axhline(0, color=_INK, lw=0.6)
        axes.set(title=name, ylabel=unit or "unit of the value")
        _dates(axes, x)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)

    last = (
        f"RMS of O - B {background['rms'].mean():.3g} {unit}, expected {background['expected_rms'].mean():.3g} {unit}"
    )
    return _draw(draw, f"{name} over {len(background)} cycles: {last} on average.", size=(4.6, 3.2))


def _dates(axes: Any, x: Any) -> None:
    """Few, short labels of times, or of numbers of cycles."""
    if len(x) and isinstance(x[0], np.datetime64):
        import matplotlib.dates as dates

        locator = dates.AutoDateLocator(minticks=3, maxticks=6)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    else:
        axes.set_xlabel("cycle")
        axes.xaxis.get_major_locator().set_params(integer=True)
