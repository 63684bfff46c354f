"""The page of a report: HTML of a table of feedback, or of the folder of a run."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.diagnostics import Feedback
from numpyro_diffusion_da.report import figures
from numpyro_diffusion_da.report.findings import Findings
from numpyro_diffusion_da.report.folder import read_cycles, read_facts, read_feedback

if TYPE_CHECKING:
    import pandas


def write_report(folder: str | Path) -> Path:
    """Write the report of a run, one HTML file that needs no network.

    Args:
        folder: folder of a run. It needs `feedback.parquet`; what else it has (`cycles.csv`, `run.json`) is shown.

    Returns:
        The path of the file, `report.html` in the folder.

    Raises:
        FileNotFoundError: the folder has no feedback.
    """
    folder = Path(folder)
    feedback = read_feedback(folder)
    text = html(feedback, cycles=read_cycles(folder), facts=read_facts(folder), title=folder.resolve().name)
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def html(
    feedback: Feedback | pandas.DataFrame,
    *,
    cycles: pandas.DataFrame | None = None,
    facts: Mapping[str, Any] | None = None,
    title: str = "Report",
) -> str:
    """HTML text of a report.

    Args:
        feedback: a table of feedback, as `ndda.diagnostics.Feedback` takes it.
        cycles: a row for each cycle, as in the file `cycles.csv` of a run.
        facts: what to say of the run, by name.
        title: title of the page.
    """
    import jinja2

    feedback = feedback if isinstance(feedback, Feedback) else Feedback(feedback)
    findings = Findings(feedback)
    source = importlib.resources.files("numpyro_diffusion_da.report").joinpath("template.html")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(source.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        findings=findings,
        facts=dict(facts or {}),
        counts=feedback.counts().reset_index(),
        departures=_departures(feedback),
        over_time=_over_time(feedback, cycles),
    )


def _departures(feedback: Feedback) -> pandas.DataFrame:
    by = ["name", "level"]
    of_b, of_a = feedback.departures(by), feedback.departures(by, of="analysis", flags="used")
    more = feedback.consistency(by)[["ratio", "ratio_se"]]
    return of_b.join(of_a.add_suffix("_a")).join(more).reset_index()


def _over_time(feedback: Feedback, cycles: pandas.DataFrame | None) -> list[figures.Panel]:
    times = _times(feedback, cycles)
    by = ["name", "cycle"]
    of_b, of_a = feedback.departures(by), feedback.departures(by, of="analysis", flags="used")
    units = feedback.rows.groupby("name")["unit"].first()
    panels = []
    for name in of_b.index.unique("name"):
        analysis = of_a.xs(name) if name in of_a.index.unique("name") else of_a.iloc[:0]
        panels.append(figures.over_time(times, of_b.xs(name), analysis, name, units[name]))
    return panels


def _times(feedback: Feedback, cycles: pandas.DataFrame | None) -> dict[int, Any]:
    """Time of each cycle: of the table of cycles, or the median of its rows, or its number."""
    numbers = np.unique(feedback.rows["cycle"])
    if cycles is not None and "time" in cycles:
        known = dict(enumerate(cycles["time"].to_numpy("datetime64[ns]")))
        if set(numbers) - {-1} <= set(known):
            return known
    return {int(number): int(number) for number in numbers}
