"""Findings about a run, in words: what its feedback says of spread, errors, instruments and rejections."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import require_number
from numpyro_diffusion_da.diagnostics import REJECTIONS, Feedback

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
    ANALYSIS_TOO_WIDE = "spread of the analysis too large"
    RANKS = "ranks not flat"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding, with its test.

    Attributes:
        kind: what is wrong.
        group: the rows it is about, by column: ``{"name": "temperature", "level": 850.0}``; empty for all rows.
        text: the finding in words, with its numbers.
        value: the statistic: a ratio, a normalized mean, a share, or chi-square.
        standard_error: its standard error over cycles; NaN for a share and for chi-square.
        expected: its value without a fault.
        p_value: probability of a value as far away without a fault.
        threshold: the p-value that it had to be below, after the correction for the number of groups.
    """

    kind: FindingKind
    group: Mapping[str, Any]
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
    the larger of both p-values) and its ratio; the share of rejections by name and type, and by station (a binomial
    test against `MANY_REJECTIONS`, far above the share that a check rejects of right observations); the mean of
    $(O - A)^2 / (P_A + R)$ of withheld rows by name; and the flatness of the ranks of all rows.

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
        self._alpha = rate / 7
        found = list(self._rejections())
        if self.judged:
            overall = list(self._overall())
            groups = [*self._sizes(), *self._biases()]
            ranks = [] if overall or groups else list(self._ranks())
            found = [*overall, *self._withheld(), *groups, *self._stations(), *found, *ranks]
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

    def _sentence(self, count: int) -> str:
        if not count:
            rows = self.feedback.rows
            if not len(rows):
                return "Nothing to judge: the table has no rows."
            flags = rows["flag"].value_counts()
            most = ", ".join(f"{n} {flag}" for flag, n in flags.head(3).items())
            return f"Nothing to judge: no row has a background. Of {len(rows)} rows are {most}."
        overall = self.feedback.consistency(()).iloc[0]
        of = f"{count} observations in {self.cycles} cycles"
        ratio = f"(O - B)^2 / (P + R) = {_pm(overall['ratio'], overall['ratio_se'])}"
        others = [one.text for one in self if one.kind not in (FindingKind.TOO_SURE, FindingKind.TOO_WIDE)]
        if not self.judged:
            start = f"Too few cycles to judge calibration ({self.cycles}, at least {LEAST_CYCLES}): {ratio}, {of}"
        elif self.calibrated:
            return f"Calibrated: {of} agree with background spread and observation errors, {ratio}."
        elif len(others) < len(self):
            start = self[0].text
        else:
            start = f"Calibrated as a whole ({ratio}, {of})"
            return f"{start}, but: {_listed(others)}."
        return f"{start}. {_capital(_listed(others))}." if others else f"{start}."

    def _overall(self) -> Iterator[Finding]:
        table = self.feedback.consistency(())
        for _, row, threshold in self._significant(table, "p_value", _is_wrong(table["ratio"])):
            sure = row["ratio"] > 1
            words = (
                "Too sure: observations are farther from" if sure else "Spread too large: observations are nearer to"
            )
            text = (
                f"{words} the background than its spread and their errors say, (O - B)^2 / (P + R) = "
                f"{_pm(row['ratio'], row['ratio_se'])}"
            )
            kind = FindingKind.TOO_SURE if sure else FindingKind.TOO_WIDE
            yield Finding(kind, {}, text, row["ratio"], row["ratio_se"], 1.0, row["p_value"], threshold)

    def _sizes(self) -> Iterator[Finding]:
        by = ["name", "level", "type"]
        table = self._long_enough(self.feedback.consistency(by))
        variances = self.feedback.error_variances(by)
        for key, row, threshold in self._significant(table, "p_value", _is_wrong(table["ratio"])):
            large = row["ratio"] > 1
            blamed = _blamed(variances.loc[key], large) if key in variances.index else "sum"
            kinds = {
                ("observation", True): FindingKind.ERROR_TOO_SMALL,
                ("observation", False): FindingKind.ERROR_TOO_LARGE,
                ("background", True): FindingKind.SPREAD_TOO_SMALL,
                ("background", False): FindingKind.SPREAD_TOO_LARGE,
                ("sum", True): FindingKind.SUM_TOO_SMALL,
                ("sum", False): FindingKind.SUM_TOO_LARGE,
            }
            kind, group = kinds[blamed, large], dict(zip(by, key, strict=True))
            text = f"{kind} for {self._named(group)}: (O - B)^2 / (P + R) = {_pm(row['ratio'], row['ratio_se'])}"
            yield Finding(kind, group, text, row["ratio"], row["ratio_se"], 1.0, row["p_value"], threshold)

    def _biases(self) -> Iterator[Finding]:
        by = ["name", "level", "type"]
        table = self._long_enough(self.feedback.departures(by))
        table = table.join(self.feedback.consistency(by)[["bias"]])
        units = self.feedback.rows.groupby("name")["unit"].first()
        for key, row, threshold in self._significant(table, "mean_p", table["bias"].abs() > WRONG_BIAS):
            group = dict(zip(by, key, strict=True))
            text = (
                f"O - B of {self._named(group)} is biased: {_pm(row['mean'], row['mean_se'])} {units[key[0]]}".rstrip()
            )
            yield Finding(FindingKind.BIAS, group, text, row["mean"], row["mean_se"], 0.0, row["mean_p"], threshold)

    def _stations(self) -> Iterator[Finding]:
        from scipy.stats import t

        table = self._long_enough(self.feedback.stations())
        others = table["others"].where(table.groupby("name")["bias"].transform("size") > 2, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            of_bias = np.minimum(table["bias"].abs(), (table["bias"] - others).abs())
            p_bias = 2.0 * t.sf((of_bias / table["bias_se"]).to_numpy(float), table["cycles"].to_numpy(float) - 1)
        by = ["name", "station"]
        keys = self.feedback.where(self.feedback.rows["station"] != "").consistency(by)["p_value"]
        usual = table.groupby("name")["ratio"].transform("median").clip(lower=1.0)
        noisy = table["ratio"] > NOISY_STATION * usual
        p_noise = keys.reindex(table.index).where(table["ratio"] > 1.0, 1.0).to_numpy()
        import pandas

        both = pandas.concat(
            [
                table.assign(p=p_bias, large=of_bias > WRONG_STATION, what="bias"),
                table.assign(p=p_noise, large=noisy, what="noise"),
            ]
        ).set_index("what", append=True)
        for key, row, threshold in self._significant(both, "p", both["large"]):
            group = {"name": key[0], "station": key[1]}
            if key[2] == "bias":
                value = _pm(row["mean"], row["mean_se"])
                text = f"station {key[1]} is biased: O - B of {key[0]} is {value} {row['unit']}".rstrip()
                kind, numbers = FindingKind.STATION_BIAS, (row["mean"], row["mean_se"], 0.0)
            else:
                value = _pm(row["ratio"], row["ratio_se"])
                text = f"station {key[1]} is noisy: (O - B)^2 / (P + R) of {key[0]} is {value}"
                kind, numbers = FindingKind.STATION_NOISE, (row["ratio"], row["ratio_se"], 1.0)
            yield Finding(kind, group, text, *numbers, row["p"], threshold)

    def _rejections(self) -> Iterator[Finding]:
        import pandas
        from scipy.stats import binom

        tables = []
        for by in (["name", "type"], ["name", "station"]):
            counts = self.feedback.counts(by)
            if "station" in by and len(counts):
                counts = counts[counts.index.get_level_values("station") != ""]
            if not len(counts):
                continue
            share = counts["rejected"].fillna(0.0)
            flags = [flag for flag in counts.columns if flag in ("used", "withheld") or flag in REJECTIONS]
            checked = counts[flags].sum(axis=1)
            rejected = (share * checked).round()
            p = binom.sf(rejected.to_numpy() - 1, checked.to_numpy(), MANY_REJECTIONS)
            reasons = counts[[flag for flag in flags if flag in REJECTIONS]]
            table = pandas.DataFrame({"share": share, "p": p, "rejected": rejected, "checked": checked})
            table["reason"] = reasons.idxmax(axis=1) if reasons.shape[1] else ""
            table.index = pandas.MultiIndex.from_tuples([(by[1], *key) for key in table.index])
            tables.append(table)
        if not tables:
            return
        table = pandas.concat(tables)
        named = set()
        for key, row, threshold in self._significant(table, "p", table["share"] > MANY_REJECTIONS):
            column, name, value = key
            # A station that is named does not need its type named again, nor the other way round.
            group = {"name": name, column: value}
            label = f"station {value} ({name})" if column == "station" else self._named(group)
            text = f"{row['share']:.0%} of {label} rejected ({row['rejected']:.0f} rows, most {row['reason']})"
            if column == "type":
                named.add(name)
            elif name in named and row["share"] < 0.5:
                continue
            yield Finding(
                FindingKind.REJECTIONS, group, text, row["share"], float("nan"), MANY_REJECTIONS, row["p"], threshold
            )

    def _withheld(self) -> Iterator[Finding]:
        table = self._long_enough(self.feedback.scores())
        for key, row, threshold in self._significant(table, "analysis_ratio_p", _is_wrong(table["analysis_ratio"])):
            sure = row["analysis_ratio"] > 1
            words = "too sure" if sure else "too wide"
            value = _pm(row["analysis_ratio"], row["analysis_ratio_se"])
            text = f"the analysis of {key} is {words} at withheld observations: (O - A)^2 / (P + R) = {value}"
            kind = FindingKind.ANALYSIS_TOO_SURE if sure else FindingKind.ANALYSIS_TOO_WIDE
            numbers = (row["analysis_ratio"], row["analysis_ratio_se"], 1.0, row["analysis_ratio_p"])
            yield Finding(kind, {"name": key}, text, *numbers, threshold)

    def _ranks(self) -> Iterator[Finding]:
        table = self.feedback.pit_flatness(())
        for _, row, threshold in self._significant(table, "p_value", np.ones(len(table), bool)):
            text = f"ranks of observations are not flat: χ² = {row['chi_square']:.0f} for 9 degrees of freedom"
            yield Finding(FindingKind.RANKS, {}, text, row["chi_square"], float("nan"), 9.0, row["p_value"], threshold)

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


def _is_wrong(ratio: Any) -> Any:
    return (ratio > WRONG_RATIO) | (ratio < 1.0 / WRONG_RATIO)


def _blamed(row: pandas.Series, large: bool) -> str:
    """Which of P and R Desroziers' estimates blame: the one that is farther off, if they differ beyond chance."""
    from scipy.stats import t

    difference, se = row["difference"], row["difference_se"]
    if not se > 0 or 2.0 * t.sf(abs(difference) / se, row["cycles"] - 1) > 0.01:
        return "sum"
    return "observation" if (difference > 0) == large else "background"


def _pm(value: float, error: float) -> str:
    """A number with its standard error, in as many digits as the error allows."""
    if not np.isfinite(error) or error <= 0:
        return f"{value:.3g}"
    digits = int(np.clip(1 - np.floor(np.log10(error)), 0, 6))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _listed(texts: Sequence[str], most: int = 4) -> str:
    more = len(texts) - most
    return "; ".join(texts[:most]) + (f"; and {more} more" if more > 0 else "")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
