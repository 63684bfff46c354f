"""Findings about a run, in words: what its feedback says of spread, errors, instruments and rejections."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import require_number
from numpyro_diffusion_da.diagnostics import REJECTIONS, Feedback
from numpyro_diffusion_da.report.text import listed, plus_minus, share

if TYPE_CHECKING:
    import pandas

LEAST_CYCLES = 8
"""Smallest number of cycles from which calibration is judged."""

WRONG_RATIO = 1.25
"""A mean of (O - B)^2 / (P + R) within a factor of this of 1 is no finding: the spread is then right to 12 %."""

WRONG_BIAS = 0.25
"""A mean departure below this share of the root of P + R is no finding."""

WRONG_STATION = 0.5
"""A mean departure of one station below this share of the root of P + R is no finding."""

NOISY_STATION = 2.0
"""Factor by which the ratio of a station is above 1, and above that of the other stations, to be a finding."""

SUSPECT = 0.05
"""p-value below which the mean departure of a variable is suspect, at a station that has a finding."""

MANY_REJECTIONS = 0.02
"""Share of rejections that is no finding: tables of real observations have some gross errors."""


class FindingKind(enum.StrEnum):
    """Kind of a finding. The values are the words of a report.

    Attributes:
        TOO_SURE: observations are farther from the background than its spread and their errors say.
        TOO_WIDE: they are nearer.
        ERROR_TOO_SMALL: the errors given to observations of a group are too small.
        ERROR_TOO_LARGE: they are too large.
        SPREAD_TOO_SMALL: the spread of the background is too small for a group.
        SPREAD_TOO_LARGE: it is too large.
        SUM_TOO_SMALL: one of the two is too small, and the feedback does not tell which.
        SUM_TOO_LARGE: one of the two is too large.
        BIAS: departures of a group have a mean: a bias of the model or of all its instruments.
        STATION_BIAS: a station is biased, others that observe the same are not.
        STATION_NOISE: a station's departures are far larger than those of others.
        REJECTIONS: checks rejected many rows of a group.
        ANALYSIS_TOO_SURE: withheld observations are farther from the analysis than its spread says.
        ANALYSIS_TOO_WIDE: they are nearer.
        RANKS: mean and size of departures are right, but not their distribution.
    """

    TOO_SURE = "too sure"
    TOO_WIDE = "spread too large"
    ERROR_TOO_SMALL = "R too small"
    ERROR_TOO_LARGE = "R too large"
    SPREAD_TOO_SMALL = "P too small"
    SPREAD_TOO_LARGE = "P too large"
    SUM_TOO_SMALL = "P or R too small"
    SUM_TOO_LARGE = "P or R too large"
    BIAS = "biased"
    STATION_BIAS = "biased station"
    STATION_NOISE = "noisy station"
    REJECTIONS = "many rejections"
    ANALYSIS_TOO_SURE = "analysis too sure"
    ANALYSIS_TOO_WIDE = "analysis's spread too large"
    RANKS = "ranks not flat"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding, with its test.

    Attributes:
        kind: what is wrong.
        group: the rows it is about, by column: ``{"name": "temperature", "level": 850.0}``; empty for all rows.
        subject: these rows in words.
        text: the finding in words, with its numbers.
        value: the statistic: a ratio, a normalized mean, a share, or chi-square.
        standard_error: its standard error over cycles; NaN for a share and for chi-square.
        expected: its value without a fault.
        p_value: probability of a value as far away without a fault.
        threshold: the p-value that it had to be below, after the correction for the number of groups.
    """

    kind: FindingKind
    group: Mapping[str, Any]
    subject: str
    text: str
    value: float
    standard_error: float
    expected: float
    p_value: float
    threshold: float


class Findings(Sequence[Finding]):
    r"""Findings about a run from its table of feedback, the gravest one first.

    **False alarms.** If nothing is wrong, there is a finding in no more than about the share `false_alarm_rate` of
    runs. It is divided equally among the seven families of tests: all rows together, groups of rows, biases, stations,
    rejections, withheld rows, and ranks. Within a family, the p-values of the groups are corrected by Holm's procedure
    (1979, Scand. J. Stat. 6, 65), which holds for groups that depend on each other in any way. The p-values are those
    of `ndda.diagnostics.Feedback`, from the scatter between cycles.

    **Effects.** With enough rows, every filter differs from a perfect one. A difference that is significant is a
    finding only if it is large enough to matter: the constants `WRONG_RATIO`, `WRONG_BIAS`, `WRONG_STATION`,
    `NOISY_STATION` and `MANY_REJECTIONS` of `ndda.report`.

    The families: the mean of $(O - B)^2 / (P + R)$ of all rows; the same by name, level and type, where Desroziers'
    estimates tell which of P and R is to blame, if they differ by more than their sampling error; the mean of O - B by
    name, level and type; the mean of each station (against 0, and against the median of stations that observe the same,
    the larger of both p-values; its standard error is at least the usual one of these stations) and its ratio; the
    share of rejections by name and type, and by station (a binomial test against `MANY_REJECTIONS`, far above the share
    that a check rejects of right observations); the mean of $(O - A)^2 / (P_A + R)$ of withheld rows by name; and the
    flatness of the ranks of all rows.

    Args:
        feedback: a `ndda.diagnostics.Feedback`, or a frame for one.
        false_alarm_rate: share of faultless runs with a finding, above 0 and below 1.

    Attributes:
        sentence: the first line of a report.
        judged: whether there are enough cycles to judge, `LEAST_CYCLES`.
        calibrated: whether the run was judged and has no finding.
        tests: number of tests made.

    Raises:
        ValueError: `false_alarm_rate` is out of range.
    """

    def __init__(self, feedback: Feedback | pandas.DataFrame, *, false_alarm_rate: float = 0.01) -> None:
        advice = "give the share of faultless runs that may have a finding, as 0.01."
        rate = require_number(false_alarm_rate, "Findings", "false_alarm_rate", advice, above=0.0, below=1.0)
        self.feedback = feedback if isinstance(feedback, Feedback) else Feedback(feedback)
        rows = self.feedback.rows
        here = rows["flag"].isin(("used", "withheld")) & np.isfinite(rows["normalized"])
        self.cycles = int(rows["cycle"][here].nunique())
        self.judged = self.cycles >= LEAST_CYCLES
        self.tests = 0
        self._station_biases: dict[tuple[str, str], float] = {}
        self._alpha = rate / 7
        found = list(self._rejections())
        self._rest = self.feedback
        if self.judged:
            stations = list(self._stations())
            # Other tests are of the rows that a faulty station does not explain.
            faulty = {(one.group["name"], one.group["station"]) for one in stations}
            if faulty:
                pairs = zip(rows["name"], rows["station"], strict=True)
                self._rest = self.feedback.where([pair not in faulty for pair in pairs])
            sizes, groups = list(self._sizes()), list(self._biases())
            # A few faulty groups do not make the whole faulty; if most are, their fault is that of the whole.
            if 0 < 2 * len(sizes) <= self._groups:
                named = [one.group for one in sizes]
                self._rest = self._rest.where(~np.logical_or.reduce([_is_of(self._rest.rows, one) for one in named]))
            overall, groups = list(self._overall()), [*sizes, *groups]
            ranks = [] if overall or groups else list(self._ranks())
            found = [*overall, *groups, *self._withheld(), *stations, *found, *ranks]
        self._found = tuple(found)
        self.calibrated = self.judged and not found
        self.sentence = self._sentence(int(here.sum()))

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: Any) -> Any:
        return self._found[index]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._found)

    def __repr__(self) -> str:
        return f"Findings: {self.sentence}"

    def table(self) -> pandas.DataFrame:
        """The findings, one row each, with the columns of `Finding`."""
        import pandas

        columns = [field.name for field in dataclasses.fields(Finding)]
        return pandas.DataFrame([[getattr(one, name) for name in columns] for one in self], columns=columns)

    def suspects(self) -> pandas.DataFrame:
        """Stations with a finding of their own: biased, noisy, or with many rejections.

        The background follows a biased station, which hides a part of its biases. So where a station has a finding, its
        other variables are suspect at a p-value of `SUSPECT`, without a correction for the number of tests. If half of
        its variables or more are suspect, and at least two, the whole station is.

        Returns:
            A row for each station and variable, the gravest first, with the columns `station`, `variable` (missing for
            a whole station) and `why`. As a CSV file it is a list for the key `quality.blacklist_file` of `ndda
            assimilate`.
        """
        import pandas

        found: dict[str, dict[str | None, str]] = {}
        for one in self:
            if "station" in one.group:
                found.setdefault(one.group["station"], {}).setdefault(one.group["name"], one.text)
        rows = self.feedback.rows
        observed = rows[rows["station"].isin(list(found))].groupby("station")["name"].unique()
        for station, why in found.items():
            for name in observed[station]:
                p_value = self._station_biases.get((name, station), 1.0)
                if name not in why and p_value < SUSPECT:
                    why[name] = f"O - B of {name} has a mean with a p-value of {p_value:.1g}, and the station a finding"
            if 2 <= len(why) >= 0.5 * len(observed[station]):
                words = f"{len(why)} of its {len(observed[station])} variables are suspect; {next(iter(why.values()))}"
                found[station] = {None: words}
        table = [(station, name, text) for station, why in found.items() for name, text in why.items()]
        return pandas.DataFrame(table, columns=["station", "variable", "why"])

    def _sentence(self, count: int) -> str:
        if not count:
            rows = self.feedback.rows
            if not len(rows):
                return "Nothing to judge: the table has no rows."
            flags = rows["flag"].value_counts()
            most = ", ".join(f"{n} are {flag}" for flag, n in flags.head(3).items())
            what = "a background with its spread and an error"
            return f"Nothing to judge: no row that is used has {what}. Of {len(rows)} rows, {most}."
        table = self._rest.consistency(())
        if not len(table):
            return f"Too few rows to judge calibration. {_capital(self._others())}."
        ratio = f"(O - B)^2 / (P + R) = {plus_minus(table['ratio'].iloc[0], table['ratio_se'].iloc[0])}"
        of = f"{count} observations in {self.cycles} {'cycle' if self.cycles == 1 else 'cycles'}"
        others = self._others()
        if not self.judged:
            start = f"Too few cycles to judge calibration ({self.cycles}, at least {LEAST_CYCLES}): {ratio}, {of}"
        elif self.calibrated:
            return f"Calibrated: {of} agree with background spread and observation errors, {ratio}."
        elif self[0].kind in (FindingKind.TOO_SURE, FindingKind.TOO_WIDE):
            start = self[0].text
        else:
            return f"Calibrated as a whole ({ratio}, {of}), but: {others}."
        return f"{start}. {_capital(others)}." if others else f"{start}."

    def _others(self) -> str:
        """All findings but those about all rows, the subjects of each kind together."""
        subjects: dict[FindingKind, list[str]] = {}
        for one in self:
            if one.kind in _PHRASES:
                subjects.setdefault(one.kind, []).append(one.subject)
        return "; ".join(f"{_PHRASES[kind]} {listed(names)}".strip() for kind, names in subjects.items())

    def _overall(self) -> Iterator[Finding]:
        table = self._rest.consistency(())
        for _, row, threshold in self._significant(table, "p_value", _is_wrong(table)):
            sure = row["ratio"] > 1
            start = (
                "Too sure: observations are farther from" if sure else "Spread too large: observations are nearer to"
            )
            value = plus_minus(row["ratio"], row["ratio_se"])
            text = f"{start} the background than its spread and their errors say, (O - B)^2 / (P + R) = {value}"
            kind = FindingKind.TOO_SURE if sure else FindingKind.TOO_WIDE
            yield Finding(kind, {}, "all rows", text, row["ratio"], row["ratio_se"], 1.0, row["p_value"], threshold)

    def _sizes(self) -> Iterator[Finding]:
        names = ["observation_ratio", "background_ratio", "difference", "difference_se"]
        table = self._long_enough(self._rest.consistency(_BY)).join(self._rest.error_variances(_BY)[names])
        self._groups = len(table)
        for key, row, threshold in self._significant(table, "p_value", _is_wrong(table)):
            group = dict(zip(_BY, key, strict=True))
            kind, subject = _KINDS[_blamed(row), row["ratio"] > 1], self._named(group)
            text = f"{kind} for {subject}: (O - B)^2 / (P + R) = {plus_minus(row['ratio'], row['ratio_se'])}"
            yield Finding(kind, group, subject, text, row["ratio"], row["ratio_se"], 1.0, row["p_value"], threshold)

    def _biases(self) -> Iterator[Finding]:
        normalized = self._rest.consistency(_BY)[["bias"]]
        table = self._long_enough(self._rest.departures(_BY)).join(normalized)
        units = self.feedback.rows.groupby("name")["unit"].first()
        for key, row, threshold in self._significant(table, "mean_p", table["bias"].abs() > WRONG_BIAS):
            group = dict(zip(_BY, key, strict=True))
            subject, value = self._named(group), plus_minus(row["mean"], row["mean_se"])
            text = f"O - B of {subject} is biased: {value} {units[key[0]]}".rstrip()
            yield Finding(
                FindingKind.BIAS, group, subject, text, row["mean"], row["mean_se"], 0.0, row["mean_p"], threshold
            )

    def _stations(self) -> Iterator[Finding]:
        import pandas
        from scipy.stats import t

        table = self.feedback.stations()
        # Of two stations, none can be told from the other: what they share is a finding about their variable.
        table = self._long_enough(
            table[table["count"].gt(0).groupby(table.index.get_level_values(0)).transform("sum") > 2]
        )
        off = np.minimum(table["bias"].abs(), (table["bias"] - table["others"]).abs())
        se, freedom = _pooled(table)
        with np.errstate(divide="ignore", invalid="ignore"):
            p_bias = 2.0 * t.sf((off / se).to_numpy(float), freedom.to_numpy(float))
        self._station_biases = dict(zip(table.index, p_bias.tolist(), strict=True))
        usual = table.groupby("name")["ratio"].transform("median").clip(lower=1.0)
        # A bias is no noise.
        noisy = table["ratio"] - table["bias"] ** 2 > NOISY_STATION * usual
        p_noise = table["p_value"].where(table["ratio"] > 1.0, 1.0)
        tests = [
            table.assign(p=p_bias, large=off > WRONG_STATION, kind=FindingKind.STATION_BIAS),
            table.assign(p=p_noise, large=noisy, kind=FindingKind.STATION_NOISE),
        ]
        both = pandas.concat(tests)
        for (name, station), row, threshold in self._significant(both, "p", both["large"]):
            if row["kind"] == FindingKind.STATION_BIAS:
                numbers = (row["mean"], row["mean_se"], 0.0)
                value = f"{plus_minus(row['mean'], row['mean_se'])} {row['unit']}".rstrip()
                text = f"station {station} is biased: O - B of {name} is {value}, that of others is not"
            else:
                numbers = (row["ratio"], row["ratio_se"], 1.0)
                value = plus_minus(row["ratio"], row["ratio_se"])
                text = f"station {station} is noisy: (O - B)^2 / (P + R) of {name} is {value}"
            group, subject = {"name": name, "station": station}, f"{station} ({name})"
            yield Finding(row["kind"], group, subject, text, *numbers, row["p"], threshold)

    def _rejections(self) -> Iterator[Finding]:
        import pandas
        from scipy.stats import binom

        types = _rejected(self.feedback.counts(["name", "type"]), "type")
        stations = _rejected(self.feedback.counts(["name", "station"]), "station")
        stations = stations[stations.index.get_level_values("value") != ""]
        usual = types.groupby("name")[["rejected", "checked"]].sum()
        usual = (usual["rejected"] / usual["checked"]).rename("usual")
        # A station stands out from its variable, whose rejections are a finding by themselves.
        table = pandas.concat([types.assign(usual=0.0), stations.join(usual, on="name")])
        table["usual"] = table["usual"].clip(lower=MANY_REJECTIONS)
        table["share"] = table["rejected"] / table["checked"]
        table["p"] = binom.sf(table["rejected"] - 1, table["checked"], table["usual"])
        for (name, column, value), row, threshold in self._significant(table, "p", table["share"] > table["usual"]):
            group = {"name": name, column: value}
            subject = f"{name} of station {value}" if column == "station" else self._named(group)
            rows = f"{row['rejected']:.0f} of {row['checked']:.0f} rows, most of them {row['reason']}"
            text = f"{share(row['share'])} of {subject} are rejected: {rows}"
            yield Finding(
                FindingKind.REJECTIONS,
                group,
                subject,
                text,
                row["share"],
                float("nan"),
                row["usual"],
                row["p"],
                threshold,
            )

    def _withheld(self) -> Iterator[Finding]:
        table = self._long_enough(self._rest.scores())
        wrong = (table["analysis_ratio"] > WRONG_RATIO) | (table["analysis_ratio"] < 1.0 / WRONG_RATIO)
        for key, row, threshold in self._significant(table, "analysis_ratio_p", wrong):
            sure = row["analysis_ratio"] > 1
            kind = FindingKind.ANALYSIS_TOO_SURE if sure else FindingKind.ANALYSIS_TOO_WIDE
            value = plus_minus(row["analysis_ratio"], row["analysis_ratio_se"])
            text = f"{kind} for {key}: (O - A)^2 / (P + R) of withheld rows is {value}"
            numbers = (row["analysis_ratio"], row["analysis_ratio_se"], 1.0, row["analysis_ratio_p"])
            yield Finding(kind, {"name": key}, str(key), text, *numbers, threshold)

    def _ranks(self) -> Iterator[Finding]:
        table = self._rest.pit_flatness(())
        for _, row, threshold in self._significant(table, "p_value", np.ones(len(table), bool)):
            text = f"ranks of observations are not flat: chi-square is {row['chi_square']:.0f}, and 9 is expected"
            numbers = (row["chi_square"], float("nan"), 9.0, row["p_value"])
            yield Finding(FindingKind.RANKS, {}, "", text, *numbers, threshold)

    def _long_enough(self, table: pandas.DataFrame) -> pandas.DataFrame:
        """Groups that were observed in enough cycles."""
        return table[table["cycles"] >= LEAST_CYCLES]

    def _significant(
        self, table: pandas.DataFrame, p_value: str, large: Any
    ) -> Iterator[tuple[Any, pandas.Series, float]]:
        """Groups whose p-value passes Holm's procedure and whose effect is large, with the threshold of each."""
        p = table[p_value].to_numpy(float)
        large = np.asarray(large, bool)
        order = np.argsort(np.where(np.isnan(p), np.inf, p), kind="stable")
        tests = int(np.sum(~np.isnan(p)))
        self.tests += tests
        for rank, i in enumerate(order[:tests]):
            threshold = self._alpha / (tests - rank)
            if p[i] > threshold:
                return
            if large[i]:
                yield table.index[i], table.iloc[i], threshold

    def _named(self, group: Mapping[str, Any]) -> str:
        """A group in words: its type only if the name has several."""
        rows = self.feedback.rows
        text = str(group["name"])
        if np.isfinite(group.get("level", np.nan)):
            text += f" at {group['level']:g} hPa"
        kinds = rows.loc[rows["name"] == group["name"], "type"].nunique()
        return f"{text} ({group['type']})" if group.get("type") and kinds > 1 else text


def _is_wrong(table: pandas.DataFrame) -> Any:
    """Whether the ratio of a group matters. A bias is a finding of its own, and adds its square to a ratio."""
    return (table["ratio"] - table["bias"] ** 2 > WRONG_RATIO) | (table["ratio"] < 1.0 / WRONG_RATIO)


def _pooled(table: pandas.DataFrame) -> tuple[pandas.Series, pandas.Series]:
    """Standard error of the bias of each station, at least the usual one, and its degrees of freedom.

    The usual one is the median over the stations of a variable, which many cycles stand behind. A station whose own is
    more than 1.5 times as large is another kind of station, and is judged by its own cycles alone.
    """
    each = table["bias_se"] * np.sqrt(table["cycles"])
    usual = each.groupby(table.index.get_level_values("name")).transform("median") / np.sqrt(table["cycles"])
    own = table["cycles"] - 1.0
    freedom = own.where(
        table["bias_se"] > 1.5 * usual, own.groupby(own.index.get_level_values("name")).transform("sum")
    )
    return np.maximum(table["bias_se"], usual), freedom


def _is_of(rows: pandas.DataFrame, group: Mapping[str, Any]) -> np.ndarray:
    """Rows of a group; a level may be missing."""
    same_level = (rows["level"] == group["level"]) | (rows["level"].isna() & np.isnan(group["level"]))
    return (same_level & (rows["name"] == group["name"]) & (rows["type"] == group["type"])).to_numpy()


def _blamed(row: pandas.Series) -> str:
    """Which of P and R Desroziers' estimates blame: the one that is farther off, if they differ beyond chance."""
    from scipy.stats import t

    difference, se = row["difference"], row["difference_se"]
    # Where observations have no neighbors, both ratios are the same but for rounding.
    if not abs(difference) > 0.1 * abs(row["observation_ratio"] + row["background_ratio"]) / 2.0:
        return "sum"
    if not se > 0 or 2.0 * t.sf(abs(difference) / se, row["cycles"] - 1) > 0.01:
        return "sum"
    return "observation" if (difference > 0) == (row["ratio"] > 1) else "background"


def _rejected(counts: pandas.DataFrame, column: str) -> pandas.DataFrame:
    """Rejected and checked rows of each name and `value` of a column, and the flag that most of them have."""
    import pandas

    rejections = [flag for flag in counts.columns if flag in REJECTIONS]
    kept = [flag for flag in counts.columns if flag in ("used", "withheld")]
    table = pandas.DataFrame({"rejected": counts[rejections].sum(axis=1).astype(float)}, index=counts.index)
    table["checked"] = table["rejected"] + counts[kept].sum(axis=1).astype(float)
    table["reason"] = counts[rejections].idxmax(axis=1) if rejections and len(counts) else ""
    names, values = (counts.index.get_level_values(i) for i in (0, 1))
    table.index = pandas.MultiIndex.from_arrays(
        [names, [column] * len(names), values], names=["name", "column", "value"]
    )
    return table[table["checked"] > 0]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


_BY = ["name", "level", "type"]

_KINDS = {
    ("observation", True): FindingKind.ERROR_TOO_SMALL,
    ("observation", False): FindingKind.ERROR_TOO_LARGE,
    ("background", True): FindingKind.SPREAD_TOO_SMALL,
    ("background", False): FindingKind.SPREAD_TOO_LARGE,
    ("sum", True): FindingKind.SUM_TOO_SMALL,
    ("sum", False): FindingKind.SUM_TOO_LARGE,
}

# What stands before the subjects of findings of a kind in the first line.
_PHRASES = {
    **{kind: f"{kind} for" for kind in _KINDS.values()},
    FindingKind.BIAS: "bias of",
    FindingKind.ANALYSIS_TOO_SURE: "analysis too sure for",
    FindingKind.ANALYSIS_TOO_WIDE: "analysis's spread too large for",
    FindingKind.STATION_BIAS: "biased station",
    FindingKind.STATION_NOISE: "noisy station",
    FindingKind.REJECTIONS: "many rejections of",
    FindingKind.RANKS: "ranks not flat",
}
