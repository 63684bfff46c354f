"""The page of a report: HTML of a table of feedback, or of the folder of a run."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from numpyro_diffusion_da.diagnostics import Feedback
from numpyro_diffusion_da.diagnostics.feedback import LEFT_OUT
from numpyro_diffusion_da.report import figures
from numpyro_diffusion_da.report.figures import Panel
from numpyro_diffusion_da.report.findings import Findings
from numpyro_diffusion_da.report.folder import (
    Increment,
    Spectrum,
    read_coast,
    read_cycles,
    read_facts,
    read_feedback,
    read_increments,
    read_spectra,
)
from numpyro_diffusion_da.report.text import number, plus_minus, probability, share

if TYPE_CHECKING:
    import pandas

MOST_PANELS = 12
"""Largest number of variables that a report draws, those with most rows; its tables have all."""

MOST_ROWS = 60
"""Largest number of rows of a table of a report."""

MOST_STATIONS = 15
"""Number of stations in the table of stations."""

MOST_TIMES = 60
"""Number of cycles from which cycles are drawn in groups."""


SUSPECTS = "suspects.csv"
"""Name of the list of suspect stations in the folder of a run."""


def write_report(folder: str | Path) -> Path:
    """Write the report of a run, one HTML file that needs no network, and the list of suspect stations.

    Args:
        folder: folder of a run. It needs `feedback.parquet`. What else it has is shown too: `cycles.csv`, `run.json`,
            spectra of `analysis.zarr` and `background.zarr`, and maps of increments where both are there. Coastlines
            are those of the land-sea mask of the prior, if its file is still there.

    Returns:
        The path of the file, `report.html` in the folder. Beside it is `suspects.csv`, see `Findings.suspects`.

    Raises:
        FileNotFoundError: the folder has no feedback.
    """
    folder = Path(folder)
    feedback = Feedback(read_feedback(folder))
    rows = feedback.rows
    text = html(
        feedback,
        cycles=read_cycles(folder),
        facts=read_facts(folder),
        spectra=read_spectra(folder),
        increments=read_increments(folder, rows["name"][rows["flag"] == "used"].value_counts().index),
        coast=read_coast(folder),
        title=folder.resolve().name,
    )
    Findings(feedback).suspects().to_csv(folder / SUSPECTS, index=False)
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def html(
    feedback: Feedback | pandas.DataFrame,
    *,
    cycles: pandas.DataFrame | None = None,
    facts: Mapping[str, Any] | None = None,
    spectra: Sequence[Spectrum] = (),
    increments: Sequence[Increment] = (),
    coast: Sequence[np.ndarray] = (),
    title: str = "Assimilation report",
    false_alarm_rate: float = 0.01,
) -> str:
    """HTML text of a report of a table of feedback.

    Args:
        feedback: a table of feedback, as `ndda.diagnostics.Feedback` takes it. Give a `Feedback` to choose its levels,
            its regions, or how many cycles are dependent.
        cycles: a row for each cycle, as in the file `cycles.csv` of a run: `time`, `ess`, `tempering`, columns
            `increment_rms_NAME`.
        facts: what to say of the run, by name.
        spectra: spectra of fields.
        increments: mean increments of fields.
        coast: coastlines for the maps, arrays of longitude and latitude in degrees, shape (point, 2).
        title: title of the page.
        false_alarm_rate: share of faultless runs that may have a finding, see `Findings`.
    """
    import jinja2

    feedback = feedback if isinstance(feedback, Feedback) else Feedback(feedback)
    source = importlib.resources.files("numpyro_diffusion_da.report").joinpath("template.html")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["math"] = _math
    findings = Findings(feedback, false_alarm_rate=false_alarm_rate)
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        title=title,
        findings=findings,
        summary=_summary(feedback, cycles),
        false_alarm_rate=share(false_alarm_rate),
        sections=[
            one for one in _sections(feedback, findings, cycles, spectra, increments, coast) if one.tables or one.panels
        ],
        facts=_flat(facts or {}),
    )


class Table(NamedTuple):
    """A table of a report: texts, the first of a row its heading. The first `words` columns are words, not numbers."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    words: int
    note: str


class Section(NamedTuple):
    """A part of a report. `text` is HTML of this module, never of a table of observations."""

    key: str
    short: str
    title: str
    text: str
    tables: list[Table]
    panels: list[Panel]
    wide: bool = False


class _Numbers(NamedTuple):
    """Numbers of a feedback that several parts of a report show, by name and level.

    Attributes:
        departures: O - B, and O - A of used rows in columns that end in "_a".
        consistency: (O - B)^2 / (P + R).
        variances: Desroziers' estimates.
        units: unit of each name.
    """

    departures: pandas.DataFrame
    consistency: pandas.DataFrame
    variances: pandas.DataFrame
    units: pandas.Series

    @classmethod
    def of(cls, feedback: Feedback) -> _Numbers:
        """Compute the numbers of a feedback."""
        by = ["name", "level"]
        return cls(
            _before_and_after(feedback, by),
            feedback.consistency(by),
            feedback.error_variances(by),
            feedback.rows.groupby("name")["unit"].first(),
        )


def _before_and_after(feedback: Feedback, by: Sequence[str]) -> pandas.DataFrame:
    """Table of departures from the background, beside those of used rows from the analysis (columns with "_a")."""
    of_a = feedback.departures(by, of="analysis", flags="used").add_suffix("_a")
    return feedback.departures(by).join(of_a)


def _sections(
    feedback: Feedback,
    findings: Findings,
    cycles: pandas.DataFrame | None,
    spectra: Sequence[Spectrum],
    increments: Sequence[Increment],
    coast: Sequence[np.ndarray],
) -> list[Section]:
    numbers = _Numbers.of(feedback)
    rows_of = numbers.departures["count"].groupby("name").sum()
    names = rows_of.sort_values(ascending=False, kind="stable").index[:MOST_PANELS]
    names = sorted(names)
    times = _times(feedback, cycles)
    return [
        Section("findings", "Findings", "Findings", "", [_findings(findings)] if len(findings) else [], []),
        Section("rows", "Rows", "Rows and rejections", _ROWS, _counts(feedback), []),
        Section(
            "departures",
            "Departures",
            "Departures by variable and level",
            _DEPARTURES,
            [_departures(numbers)] if len(numbers.departures) else [],
            _profiles(numbers, names),
        ),
        Section(
            "time", "Over time", "Departures over time", _TIME, [], _over_time(feedback, names, times, numbers.units)
        ),
        Section(
            "consistency",
            "Spread and errors",
            "Spread and errors",
            _CONSISTENCY,
            _groups(feedback),
            _ratios(numbers),
            True,
        ),
        Section("ranks", "Ranks", "Ranks of observations", _RANKS, [], _ranks(feedback, names)),
        Section(
            "variances",
            "R and P",
            "Which of R and P is wrong?",
            _VARIANCES,
            _variances(numbers),
            _variance_dots(numbers),
            True,
        ),
        Section("withheld", "Withheld", "Withheld observations", _WITHHELD, _withheld(feedback, numbers.units), []),
        Section("stations", "Stations", "Stations", _STATIONS, _stations(feedback), []),
        Section("maps", "Maps", "Maps", _MAPS, [], _maps(feedback, names, numbers.units, coast), True),
        Section("increments", "Increments", "Increments", _INCREMENTS, [], _increments(increments, coast), True),
        Section("filter", "Filter", "Filter", _FILTER, [], _filter(cycles, times)),
        Section("spectra", "Spectra", "Spectra", _SPECTRA, [], _spectra(spectra)),
    ]


def _findings(findings: Findings) -> Table:
    rows = [
        [
            str(one.kind),
            one.subject,
            plus_minus(one.value, one.standard_error),
            number(one.expected),
            probability(one.p_value),
            probability(one.threshold),
        ]
        for one in findings
    ]
    columns = ["finding", "rows", "value", "expected", "p-value", "has to be below"]
    return _table("Findings with their tests", columns, rows, 2)


def _counts(feedback: Feedback) -> list[Table]:
    tables = []
    several = feedback.rows["type"].nunique() > 1
    by = ["name", "type"] if several else ["name"]
    counts = feedback.counts(by)
    flags = [name for name in counts.columns if name not in ("rows", "rejected")]
    rows = [
        [*_key(key), *(f"{int(row[flag])}" for flag in flags), f"{int(row['rows'])}", share(row["rejected"])]
        for key, row in counts.iterrows()
    ]
    if rows:
        tables.append(_table("Rows by variable and flag", [*by, *flags, "all", "rejected"], rows, len(by)))
    counts = feedback.counts(["name", "level"])
    counts = counts[counts["rejected"] > 0]
    if len(counts):
        rows = [[*_key(key), f"{int(row['rows'])}", share(row["rejected"])] for key, row in counts.iterrows()]
        tables.append(_table("Rejections by level", ["name", "level (hPa)", "rows", "rejected"], rows))
    return tables


def _departures(numbers: _Numbers) -> Table:
    table = numbers.departures.join(numbers.consistency[["ratio", "ratio_se"]])
    rows = [
        [
            *_key(key),
            numbers.units[key[0]],
            f"{row['count']:.0f}",
            plus_minus(row["mean"], row["mean_se"]),
            plus_minus(row["rms"], row["rms_se"]),
            number(row["expected_rms"]),
            plus_minus(row["mean_a"], row["mean_se_a"]),
            plus_minus(row["rms_a"], row["rms_se_a"]),
            plus_minus(row["ratio"], row["ratio_se"]),
        ]
        for key, row in table.iterrows()
    ]
    columns = ["name", "level (hPa)", "unit", "rows", "mean O - B", "RMS O - B", "expected", "mean O - A", "RMS O - A"]
    return _table("Departures, with standard errors over cycles", [*columns, "(O - B)^2 / (P + R)"], rows)


def _profiles(numbers: _Numbers, names: Sequence[str]) -> list[Panel]:
    panels = []
    for name in names:
        one = numbers.departures.xs(name, level="name")
        one = one[np.isfinite(one.index.to_numpy(float))]
        if len(one) > 1:
            panels.append(figures.profile(one, name, numbers.units[name]))
    return panels


def _over_time(feedback: Feedback, names: Sequence[str], times: Mapping[int, Any], units: pandas.Series) -> list[Panel]:
    numbers = np.unique(feedback.rows["cycle"])
    # Many cycles are drawn in groups of consecutive ones.
    width = -(-len(numbers) // MOST_TIMES)
    first = feedback.rows["cycle"] // width * width
    table = _before_and_after(feedback.assign(period=first), ["name", "period"])
    panels = []
    for name in names:
        one = table.xs(name, level="name")
        panels.append(figures.over_time([times[int(k)] for k in one.index], one, name, units[name]))
    return panels


def _groups(feedback: Feedback) -> list[Table]:
    tables = []
    for by in ("region", "type"):
        table = feedback.consistency([by])
        if len(table) < 2:
            continue
        rows = [
            [
                key if key else "(none)",
                f"{row['count']:.0f}",
                plus_minus(row["ratio"], row["ratio_se"]),
                probability(row["p_value"]),
                share(row["central"]),
                plus_minus(row["bias"], row["bias_se"]),
            ]
            for key, row in ((key[0] if isinstance(key, tuple) else key, row) for key, row in table.iterrows())
        ]
        columns = [by, "rows", "(O - B)^2 / (P + R)", "p-value", "central half", "mean (O - B) / √(P + R)"]
        tables.append(_table(f"Departures by {by}", columns, rows))
    return tables


def _ratios(numbers: _Numbers) -> list[Panel]:
    table = numbers.consistency.iloc[:40]
    if not len(table):
        return []
    labels = [_label(key) for key in table.index]
    series = [("", figures.BLUE, table["ratio"], table["ratio_se"])]
    worst = int(np.argmax(np.abs(np.log(np.maximum(table["ratio"].to_numpy(), 1e-6)))))
    alt = f"Ratio of {len(table)} groups; farthest from 1 is {labels[worst]} with {number(table['ratio'].iloc[worst])}."
    return [figures.dots(labels, series, 1.0, "(O - B)² / (P + R), with 2 standard errors", alt)]


def _ranks(feedback: Feedback, names: Sequence[str]) -> list[Panel]:
    panels = []
    for by, wanted in (((), ["all"]), ("name", names)):
        counts, tests = feedback.pit_counts(by), feedback.pit_flatness(by)
        wanted = [] if by and len(counts) < 2 else wanted
        for name in wanted:
            if name in counts.index:
                title = "all rows" if by == () else str(name)
                panels.append(figures.ranks(counts.loc[name], title, tests.loc[name, "p_value"]))
    return panels


def _variances(numbers: _Numbers) -> list[Table]:
    rows = [
        [
            *_key(key),
            numbers.units[key[0]],
            number(np.sqrt(row["observation_given"])),
            _root(row["observation"], row["observation_se"]),
            plus_minus(row["observation_ratio"], row["observation_ratio_se"]),
            number(np.sqrt(row["background_given"])),
            _root(row["background"], row["background_se"]),
            plus_minus(row["background_ratio"], row["background_ratio_se"]),
        ]
        for key, row in numbers.variances.iterrows()
    ]
    columns = [
        "name",
        "level (hPa)",
        "unit",
        "√R given",
        "√R estimated",
        "R ratio",
        "√P given",
        "√P estimated",
        "P ratio",
    ]
    return [_table("Desroziers' estimates, with standard errors over cycles", columns, rows)] if rows else []


def _root(variance: float, error: float) -> str:
    """Standard deviation of an estimated variance, which may be negative."""
    if not variance > 0:
        return "variance below 0" if np.isfinite(variance) else number(variance)
    return plus_minus(np.sqrt(variance), error / (2.0 * np.sqrt(variance)))


def _variance_dots(numbers: _Numbers) -> list[Panel]:
    table = numbers.variances.iloc[:40]
    if not len(table):
        return []
    labels = [_label(key) for key in table.index]
    series = [
        ("R estimated / given", figures.BLUE, table["observation_ratio"], table["observation_ratio_se"]),
        ("P estimated / given", figures.ORANGE, table["background_ratio"], table["background_ratio_se"]),
    ]
    alt = f"Estimated over given variances of {len(table)} groups; the table has the numbers."
    return [figures.dots(labels, series, 1.0, "ratio, with 2 standard errors", alt)]


def _withheld(feedback: Feedback, units: pandas.Series) -> list[Table]:
    table = feedback.scores()
    # Names of which all rows are left out are there too, without scores.
    left_out = feedback.rows["name"][feedback.rows["flag"] == LEFT_OUT].value_counts()
    table = table.reindex(table.index.union(left_out.index).rename("name"))
    rows = [
        [
            str(key),
            units[key],
            f"{np.nan_to_num(row['count']):.0f}",
            f"{left_out.get(key, 0)}",
            number(row["background_rmse"]),
            number(row["analysis_rmse"]),
            number(row["analysis_spread"]),
            plus_minus(row["analysis_spread_skill"], row["analysis_spread_skill_se"]),
            plus_minus(row["background_crps"], row["background_crps_se"]),
            plus_minus(row["analysis_crps"], row["analysis_crps_se"]),
            share(row["crps_skill"]),
        ]
        for key, row in table.iterrows()
    ]
    columns = [
        "name",
        "unit",
        "rows",
        "left out",
        "RMS O - B",
        "RMS O - A",
        "spread of A and R",
        "spread / RMS",
        "CRPS of B",
    ]
    columns += ["CRPS of A", "gain in CRPS"]
    return [_table("Scores of withheld rows", columns, rows)] if rows else []


def _stations(feedback: Feedback) -> list[Table]:
    table = feedback.stations().iloc[:MOST_STATIONS]
    rows = [
        [
            station,
            name,
            row["type"],
            f"{row['count']:.0f}",
            f"{plus_minus(row['mean'], row['mean_se'])} {row['unit']}".rstrip() if row["count"] else number(np.nan),
            plus_minus(row["bias"], row["bias_se"]),
            number(row["others"]),
            plus_minus(row["ratio"], row["ratio_se"]),
            share(row["rejected"]),
        ]
        for (name, station), row in table.iterrows()
    ]
    columns = [
        "station",
        "name",
        "type",
        "rows",
        "mean O - B",
        "over √(P + R)",
        "others",
        "(O - B)^2 / (P + R)",
        "rejected",
    ]
    return [_table("The most conspicuous stations", columns, rows, 3)] if rows else []


def _maps(feedback: Feedback, names: Sequence[str], units: pandas.Series, coast: Sequence[np.ndarray]) -> list[Panel]:
    rows = feedback.rows
    lat, lon = (rows.loc[rows[c].notna(), c] for c in ("lat", "lon"))
    if not len(lat) or not len(lon):
        return []
    extent = max(float(lat.max() - lat.min()), float(lon.max() - lon.min()) / 2.0)
    degrees = 10.0 if extent > 60 else max(extent / 8.0, 0.25)
    boxes = feedback.boxes(degrees=degrees)
    panels = []
    for name in names:
        one = boxes.xs(name, level="name").reset_index()
        one = one[one["count"] > 0]
        if len(one):
            clear = (one["mean"].abs() > 2.0 * one["mean_se"].fillna(0.0)).to_numpy()
            panels.append(figures.box_map(one, "mean", f"mean O - B of {name}", units[name], clear, coast))
    of_all = feedback.boxes((), degrees=degrees).reset_index()
    of_all = of_all[of_all["rejected"].notna()].assign(rejected=lambda frame: 100.0 * frame["rejected"])
    if len(of_all) and of_all["rejected"].max() > 0:
        panels.append(figures.box_map(of_all, "rejected", "rejected rows", "%", coast=coast))
    return panels


def _increments(increments: Sequence[Increment], coast: Sequence[np.ndarray]) -> list[Panel]:
    panels = []
    for one in increments:
        name = one.name if np.isnan(one.level) else f"{one.name} at {one.level:g} hPa"
        cycles = "one cycle" if one.cycles == 1 else f"{one.cycles} cycles"
        caption = f"Mean over {cycles}; RMS over cycles and area: {number(one.rms)} {one.unit}".strip() + "."
        title = f"mean A - B of {name}"
        panels.append(figures.field_map(one.field, one.latitude, one.longitude, title, one.unit, caption, coast))
    return panels


def _filter(cycles: pandas.DataFrame | None, times: Mapping[int, Any]) -> list[Panel]:
    if cycles is None or not len(cycles):
        return []
    at = [times.get(i, i) for i in range(len(cycles))]
    panels = []
    for column, title, label in (
        ("ess", "Effective sample size", "particles"),
        ("tempering", "Tempering of the weights", "exponent"),
        ("departure_ratio", "(O - B)² / (P + R)", "ratio"),
    ):
        if column in cycles and cycles[column].notna().any():
            panels.append(figures.lines(at, [(column, cycles[column].to_numpy(float))], title, label))
    rows = [name for name in ("used", "rejected", "withheld") if name in cycles and cycles[name].notna().any()]
    if rows:
        series = [(name, cycles[name].to_numpy(float)) for name in rows]
        panels.append(figures.lines(at, series, "Rows of each cycle", "rows"))
    for column in cycles.columns:
        if column.startswith("increment_rms_") and cycles[column].notna().any():
            name = column.removeprefix("increment_rms_")
            panels.append(figures.lines(at, [(name, cycles[column].to_numpy(float))], f"Increment of {name}", "RMS"))
    return panels


def _spectra(spectra: Sequence[Spectrum]) -> list[Panel]:
    panels = []
    for one in spectra[:MOST_PANELS]:
        title = one.name if np.isnan(one.level) else f"{one.name} at {one.level:g} hPa"
        panels.append(figures.spectra(one.power, title, one.unit))
    return panels


def _times(feedback: Feedback, cycles: pandas.DataFrame | None) -> dict[int, Any]:
    """Time of each cycle: of the table of cycles, or the median of the times of its rows, or its number."""
    import pandas

    numbers = [int(one) for one in np.unique(feedback.rows["cycle"])]
    if cycles is not None and "time" in cycles:
        known = dict(enumerate(pandas.to_datetime(cycles["time"]).to_numpy("datetime64[ns]")))
        if set(numbers) - {-1} <= set(known):
            return known
    if "time" in feedback.rows and pandas.api.types.is_datetime64_any_dtype(feedback.rows["time"]):
        time = feedback.rows["time"]
        time = time.dt.tz_convert(None) if time.dt.tz is not None else time
        median = time.groupby(feedback.rows["cycle"]).median()
        if median.notna().all():
            return dict(zip(median.index.tolist(), median.to_numpy("datetime64[ns]"), strict=True))
    return {one: one for one in numbers}


def _summary(feedback: Feedback, cycles: pandas.DataFrame | None) -> list[tuple[str, str]]:
    """Pairs of a word and a number that sum a run up: rows, variables, cycles, first and last time."""
    rows = feedback.rows
    flags = rows["flag"].value_counts()
    numbers = sorted(set(rows["cycle"][rows["cycle"] >= 0]))
    found = [("rows", f"{len(rows)}"), ("used", f"{flags.get('used', 0)}"), ("withheld", f"{flags.get('withheld', 0)}")]
    found.append(("variables", f"{rows['name'].nunique()}"))
    found.append(("cycles", f"{len(numbers) if cycles is None else len(cycles)}"))
    times = _times(feedback, cycles)
    known = [times[one] for one in numbers if isinstance(times.get(one), np.datetime64)]
    if known:
        first, last = (str(np.datetime_as_string(one, "m")).replace("T", " ") for one in (min(known), max(known)))
        found.append(("from", f"{first} UTC"))
        found.append(("to", f"{last} UTC"))
    return found


def _table(caption: str, columns: Sequence[str], rows: list[list[str]], words: int = 1) -> Table:
    note = f"{len(rows) - MOST_ROWS} further rows are left out." if len(rows) > MOST_ROWS else ""
    return Table(caption, list(columns), rows[:MOST_ROWS], words, note)


def _key(key: Any) -> list[str]:
    """Texts of the key of a group."""
    keys = key if isinstance(key, tuple) else (key,)
    texts = []
    for one in keys:
        if isinstance(one, (float, np.floating)):
            texts.append("surface" if np.isnan(one) else f"{one:g}")
        else:
            texts.append(str(one) if one != "" else "(none)")
    return texts


def _label(key: Any) -> str:
    name, level = key
    return str(name) if np.isnan(level) else f"{name} {level:g}"


def _flat(facts: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested facts as pairs of texts."""
    found: list[tuple[str, str]] = []
    for name, value in facts.items():
        label = f"{before}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            found += _flat(value, f"{label}: ")
        elif isinstance(value, (list, tuple)):
            texts = [str(one) for one in value]
            found.append(
                (label, ", ".join(texts) if len(texts) < 7 else f"{texts[0]}, ..., {texts[-1]} ({len(texts)})")
            )
        elif value is not None:
            found.append((label, number(value, 6) if isinstance(value, float) else str(value)))
    return found


_GAP = "\N{NO-BREAK SPACE}"


def _math(text: str) -> str:
    """Text of a message with the signs of a formula."""
    return text.replace("^2", "²").replace(" - ", f"{_GAP}\N{MINUS SIGN}{_GAP}").replace(" + ", f"{_GAP}+{_GAP}")


_ROWS = """Each row of the table has one flag. <em>Rejected</em> is the share with the flags <em>bad quality</em>,
<em>out of bounds</em>, <em>off track</em>, <em>height difference</em> or <em>far from background</em>, also where it is
withheld, among these and the rows that are used or withheld."""

_DEPARTURES = """O is the observation, B its forecast before the filter saw it, A the analysis. <em>Expected</em> is the
root of the mean of P + R. B is compared with used and withheld rows, A with used ones, which it has seen."""

_TIME = """The dashed line is the RMS of O &minus; B that the filter expects. Where it is below the blue one, the filter
is too sure."""

_CONSISTENCY = """(O &minus; B)² / (P + R) is 1 for a calibrated filter, and above 1 if background spread or observation
error are too small. Gray is a factor of 1.25. Half of the departures belong in the <em>central half</em>."""

_RANKS = """Where observations fall within background plus error. Flat if calibrated; a U means too little spread, a
hump too much, a slope a bias. Between the dashed lines are 95 % of bins if rows are independent; the p-value
allows for dependent rows of a cycle."""

_VARIANCES = """The means of (O &minus; A)(O &minus; B) and of (A &minus; B)(O &minus; B) estimate R and P, if the gain
of the filter is near the optimal one. Their sum is measured, its division is not: where observations have no neighbors,
both ratios say the same. Believe a difference between the ratios rather than their sizes."""

_WITHHELD = """These rows were not assimilated, so they verify the analysis. Rows that the background check rejects
are <em>left out</em>: they say more of themselves than of the analysis. Spread / RMS is 1 if calibrated, below 1 if
too sure. The CRPS measures the whole distribution, lower is better. All include the error of the observation."""

_STATIONS = """Sorted by how far the mean of O &minus; B is from that of other stations with this variable, in standard
errors. <em>Others</em> is their median. Stations with a finding are in <em>suspects.csv</em>, a list for the key
quality.blacklist_file."""

_MAPS = """Boxes of nearly equal area. A mean within two standard errors of 0 is gray. Colors end at the 95th
percentile."""

_INCREMENTS = """A is the analysis and B a forecast from the analysis before, both means over the members. A mean over
cycles that is far from 0, compared with the RMS, is a bias of the model or of the observations there. Colors end at the
98th percentile."""

_FILTER = """What the filter says of its steps. An effective sample size near 1 means that a single particle holds all
weight; tempering of 1 is none."""

_SPECTRA = """Variance by the number of waves around a circle of latitude. Members of the analysis should have the power
of those of the background; less is smoothing, more is noise. A mean is smoother than its members."""
