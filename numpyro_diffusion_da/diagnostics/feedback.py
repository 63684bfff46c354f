r"""Diagnostics of a table of feedback: one row for each observation, with background and analysis there.

`Feedback` takes the frame that `ndda.observation.PlacedObservations.feedback` or an assimilation run gives, and has a
method for each table of diagnostics. All of them take `by`, the columns to group rows by: columns of the frame, one's
own among them, and `level` and `region`, which are computed from the place of a row.

**Symbols.** O is the observation, B the mean of its forecast before the filter saw it, A its mean in the analysis. P is
the variance of the forecast of the observation, without the error of the observation, and R the variance of that error.
A calibrated filter has $E[O - B] = 0$ and $E[(O - B)^2] = P + R$.

**Standard errors are over cycles.** Departures of one cycle share the errors of one background, so a million rows of
one cycle are not a million samples. Rows of a cycle may depend on each other in any way. Cycles are taken to be
independent, which is true of O - B for a calibrated filter; for others, `block` cycles that follow each other count as
one. A group with rows in fewer than two blocks has no standard error (NaN).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from numpyro_diffusion_da.arguments import require, require_count, require_number, shown
from numpyro_diffusion_da.fields.departures import departure

if TYPE_CHECKING:
    import pandas

By = str | Sequence[str]

PRESSURE_LEVELS = (1000, 925, 850, 700, 500, 400, 300, 250, 200, 150, 100, 70, 50, 30, 20, 10, 7, 5, 3, 2, 1)
"""Standard pressure levels in hPa. A row belongs to the nearest one, in the logarithm of pressure."""

REGIONS = {
    "northern extratropics": (20.0, 90.0, -180.0, 180.0),
    "tropics": (-20.0, 20.0, -180.0, 180.0),
    "southern extratropics": (-90.0, -20.0, -180.0, 180.0),
}
"""Regions by name: south, north, west and east, in degrees."""

LEFT_OUT = "withheld, far from background"
"""Flag of withheld rows that are left out of scores."""

REJECTIONS = ("bad quality", "out of bounds", "off track", "height difference", "far from background", LEFT_OUT)
"""Flags of rows that a check of their quality rejected."""

_CENTRAL_HALF = 0.6744897501960817
"""Normalized departures of a calibrated filter are below this with a probability of one half."""

_FIRST_FLAGS = ("used", "withheld", "far from background", LEFT_OUT)
_NUMBERS = ("value", "error_used", "background", "background_spread", "analysis", "analysis_spread", "pres")
_SCORES = ("background_pit", "background_crps", "analysis_crps")


def _ratio_p_value(groups: _Groups, normalized: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean square of normalized departures with its standard error, share in the central half, and p-value of 1.

    The docstring of `Feedback.consistency` says how.
    """
    from scipy.stats import t

    ratio, se, _ = groups.mean(normalized**2)
    central, central_se, _ = groups.mean((np.abs(normalized) < _CENTRAL_HALF).astype(float))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = np.where(np.isnan(se), np.nan, np.fmin(2.0 * (ratio / se) ** 2, groups.count))
        variance = 2.0 / (9.0 * freedom)
        p = 2.0 * t.sf(np.abs(np.cbrt(ratio) - (1.0 - variance)) / np.sqrt(variance), groups.blocks - 1)
        too_central = (central - 0.5) / np.fmax(central_se, 0.5 / np.sqrt(groups.count))
        of_central = np.fmin(2.0 * t.sf(too_central, groups.blocks - 1), 1.0)
    return ratio, se, central, np.where(ratio < 1.0, np.maximum(p, of_central), p)


class Feedback:
    """Rows of observations with what a filter made of them, and the diagnostics of their departures.

    Args:
        frame: one row for each observation, with the columns `flag`, `cycle` (number of the step, -1 for none), `value`
            and `name` (or `variable`). Further columns, where there are any: `unit`, `error_used`, `background`,
            `background_spread` (or `background_variance`), `analysis`, `analysis_spread`, `background_pit`,
            `background_crps`, `analysis_crps`, `pres` (Pa), `lat`, `lon`, `station`, `type`.
        levels: pressure levels in hPa for the column `level`.
        regions: south, north, west and east in degrees of each region, for the column `region`. A row belongs to the
            first region that holds it. West may be above east, across the date line.
        block: number of consecutive cycles that standard errors treat as dependent.

    Attributes:
        rows: the frame with further columns: `o_b` and `o_a` (departures in the unit of the value; directions the
            shorter way round), `expected` (P + R), `normalized` (O - B over the root of P + R), `level` (hPa, NaN for
            a row without pressure), `region`.

    Raises:
        ValueError: a column that is needed is missing, or holds no numbers.
    """

    def __init__(
        self,
        frame: pandas.DataFrame,
        *,
        levels: Sequence[float] = PRESSURE_LEVELS,
        regions: Mapping[str, tuple[float, float, float, float]] = REGIONS,
        block: int = 1,
    ) -> None:
        import pandas

        require(frame, pandas.DataFrame, "Feedback", "frame", "pandas.read_parquet('run/feedback.parquet')")
        require_count(block, "Feedback", "block")
        self.block = int(block)
        needed = [name for name in ("flag", "cycle", "value") if name not in frame]
        if "name" not in frame and "variable" not in frame:
            needed.append("name")
        if needed:
            raise ValueError(f"Feedback got a frame without the columns {needed}; give one that has them.")
        rows = frame.reset_index(drop=True)
        for name in ("name", "variable", "station", "type", "unit", "flag"):
            rows[name] = _text(rows.get(name), len(rows))
        rows["name"] = np.where(rows["name"] == "", rows["variable"], rows["name"]).astype(object)
        if "background_spread" not in rows and "background_variance" in rows:
            rows["background_spread"] = np.sqrt(_numbers(rows, "background_variance"))
        for name in (*_NUMBERS, *_SCORES, "lat", "lon"):
            rows[name] = _numbers(rows, name)
        rows["cycle"] = np.nan_to_num(_numbers(rows, "cycle"), nan=-1.0).astype(int)
        unit = rows["unit"].to_numpy(object)
        rows["o_b"] = departure(rows["value"], rows["background"], unit)
        rows["o_a"] = departure(rows["value"], rows["analysis"], unit)
        rows["expected"] = rows["background_spread"] ** 2 + rows["error_used"] ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            normalized = rows["o_b"].to_numpy() / np.sqrt(rows["expected"].to_numpy())
        rows["normalized"] = np.where(np.isfinite(normalized), normalized, np.nan)
        rows["level"] = nearest_level(rows["pres"].to_numpy() / 100.0, np.asarray(levels, float))
        rows["region"] = _region(rows["lat"].to_numpy(), rows["lon"].to_numpy(), regions)
        self.rows = rows
        self._settings: dict[str, Any] = {"levels": levels, "regions": regions, "block": block}

    def __repr__(self) -> str:
        cycles = self.rows["cycle"][self.rows["cycle"] >= 0].nunique()
        return f"Feedback({len(self.rows)} rows, {cycles} cycles)"

    def where(self, condition: Any) -> Feedback:
        """Feedback of some of the rows.

        Args:
            condition: True for the rows to keep, as in ``feedback.where(feedback.rows["type"] == "ship")``.
        """
        return self._of(self.rows[np.asarray(condition, bool)])

    def _of(self, rows: pandas.DataFrame) -> Feedback:
        """Feedback of rows that have the computed columns already."""
        new = object.__new__(Feedback)
        new.rows, new.block, new._settings = rows.reset_index(drop=True), self.block, self._settings
        return new

    def assign(self, **columns: Any) -> Feedback:
        """Feedback with further columns of the rows, to group by.

        Args:
            **columns: values of each column, one for each of `rows`.
        """
        return Feedback(self.rows.assign(**columns), **self._settings)

    def counts(self, by: By = "name") -> pandas.DataFrame:
        """Number of rows by flag.

        Args:
            by: columns to group by.

        Returns:
            A row for each group. Its columns are the flags that occur, `rows` (their sum) and `rejected`: the share of
            rows with a flag of `REJECTIONS` among those and the rows that are used or withheld; NaN if there are none.
        """
        import pandas

        keys = self._keys(by, None)
        if not len(self.rows):
            index = pandas.MultiIndex.from_arrays([[]] * len(keys), names=keys)
            return pandas.DataFrame(columns=["rows", "rejected"], dtype=float, index=index)
        totals = self.rows["flag"].value_counts()
        flags = [flag for flag in _FIRST_FLAGS if flag in totals.index]
        flags += [flag for flag in totals.index if flag not in flags]
        frame = self.rows.groupby([*keys, "flag"], dropna=False).size().unstack(fill_value=0)[flags]
        frame.columns.name = None
        rejected = frame[[flag for flag in flags if flag in REJECTIONS]].sum(axis=1)
        checked = rejected + frame[[flag for flag in flags if flag in ("used", "withheld")]].sum(axis=1)
        frame["rows"] = frame.sum(axis=1)
        frame["rejected"] = rejected / checked.where(checked > 0)
        return frame

    def departures(
        self, by: By = "name", *, of: str = "background", flags: Sequence[str] = ("used", "withheld")
    ) -> pandas.DataFrame:
        r"""Mean and root mean square (RMS) of O - B or O - A.

        Averages are in the unit of the observation, so they are made for each `name`: it is put before `by` if it is
        not in it. The standard error of the RMS is that of the mean square over twice the RMS.

        Args:
            by: columns to group by.
            of: "background" for O - B, "analysis" for O - A.
            flags: flags of the rows to take. O - A of rows that are used is smaller than that of withheld ones, because
                the analysis has seen them.

        Returns:
            A row for each group with `count`, `cycles`, `mean`, `mean_se`, `mean_p` (p-value of a mean of 0, by the
            t-distribution over blocks of cycles), `rms`, `rms_se` and, for the background, `expected_rms`, the root of
            the mean of P + R.

        Raises:
            ValueError: a column or `of` is unknown.
        """
        import scipy.stats

        if of not in ("background", "analysis"):
            raise ValueError(f"departures got of={shown(of)}; give 'background' or 'analysis'.")
        column = {"background": "o_b", "analysis": "o_a"}[of]
        groups = self._groups(by, flags, (column,), named=True)
        d = groups.rows[column].to_numpy()
        mean, mean_se, _ = groups.mean(d)
        square, square_se, _ = groups.mean(d**2)
        frame = groups.frame()
        frame["mean"], frame["mean_se"] = mean, mean_se
        with np.errstate(divide="ignore", invalid="ignore"):
            frame["mean_p"] = 2.0 * scipy.stats.t.sf(np.abs(mean / mean_se), groups.blocks - 1)
            frame["rms"], frame["rms_se"] = np.sqrt(square), square_se / (2.0 * np.sqrt(square))
        if of == "background":
            frame["expected_rms"] = np.sqrt(groups.mean(groups.rows["expected"].to_numpy()).value)
        return frame

    def consistency(self, by: By = "name", *, flags: Sequence[str] = ("used", "withheld")) -> pandas.DataFrame:
        r"""Mean of $(O - B)^2 / (P + R)$: 1 for a calibrated filter, above 1 for one that is too sure.

        The ratio has no unit, so groups may hold several names. It judges the sum of P and R, not its parts
        (Desroziers et al. 2005, equation 1; `error_variances` for the parts).

        The p-value takes the sum of squares to be a multiple of a chi-square variable with the degrees of freedom that
        its scatter over cycles says (Satterthwaite 1946), at most the number of rows: squares of correlated Gaussian
        variables are never negatively correlated. The cube root of such a variable is nearly normal (Wilson & Hilferty
        1931), and is compared with a t-distribution. A t-test of the ratio itself finds ratios below 1 ten times too
        often, because small sums of squares come with small standard errors. If all rows of a cycle share one error,
        this is still so to a part. A ratio below 1 therefore counts only if the share of departures in their central
        half, a number without this fault, is above one half too: the p-value is the larger one of both tests.

        Args:
            by: columns to group by.
            flags: flags of the rows to take. Rows that a check against the background rejected are left out, so the
                ratio of a filter that is far too sure is too small.

        Returns:
            A row for each group with `count`, `cycles`, `ratio`, `ratio_se` and `p_value`; `central`, the share of
            departures within 0.674 roots of P + R (one half if calibrated); and `bias`, the mean of O - B over the root
            of P + R, with `bias_se`.
        """
        groups = self._groups(by, flags, ("normalized",))
        z = groups.rows["normalized"].to_numpy()
        frame = groups.frame()
        frame["ratio"], frame["ratio_se"], frame["central"], frame["p_value"] = _ratio_p_value(groups, z)
        frame["bias"], frame["bias_se"], _ = groups.mean(z)
        return frame

    def error_variances(self, by: By = "name") -> pandas.DataFrame:
        r"""Desroziers' estimates of the error variances R and P in observation space, beside those that were given.

        $E[(O - A)(O - B)] = R$ and $E[(A - B)(O - B)] = P$ (Desroziers, Berre, Chapnik & Poli 2005, Q. J. R. Meteorol.
        Soc. 131, 3385, equations 3 and 2), and $E[(A - B)(O - A)]$ is the variance of the analysis (equation 4).

        They hold if the gain of the filter is near the optimal one. The sum of both is the mean of (O - B)^2 in any
        case, but the filter's own P and R divide it: for a value that is observed alone, both estimates are wrong by
        the same factor. Neighbors in the same cycle tell them apart, because errors of the background have a length
        (Waller, Dance & Nichols 2016, Q. J. R. Meteorol. Soc. 142, 418). A bias adds its square.

        Args:
            by: columns to group by; `name` is put before them if it is not among them. Only rows that are used count.

        Returns:
            A row for each group with `count`, `cycles`, `observation_given` (mean of R), `observation` (its estimate),
            `observation_se`, `background_given`, `background`, `background_se`, `analysis_given`, `analysis`,
            `analysis_se`, all in the squared unit, and `observation_ratio` and `background_ratio`, estimate over given,
            with `observation_ratio_se` and `background_ratio_se`; and `difference`, the first ratio minus the second,
            with `difference_se`, which allows for both being from the same rows.
        """
        groups = self._groups(by, ("used",), ("o_b", "o_a", "expected"), named=True)
        rows = groups.rows
        o_b, o_a = rows["o_b"].to_numpy(), rows["o_a"].to_numpy()
        estimates = {
            "observation": (o_a * o_b, "error_used"),
            "background": ((o_b - o_a) * o_b, "background_spread"),
            "analysis": ((o_b - o_a) * o_a, "analysis_spread"),
        }
        frame = groups.frame()
        ratios = {}
        for name, (products, given) in estimates.items():
            variance = rows[given].to_numpy() ** 2
            frame[f"{name}_given"] = groups.mean(variance).value
            frame[name], frame[f"{name}_se"], _ = groups.mean(products)
            ratios[name] = groups.mean(products, over=variance)
        for name in ("observation", "background"):
            frame[f"{name}_ratio"], frame[f"{name}_ratio_se"], _ = ratios[name]
        frame["difference"] = frame["observation_ratio"] - frame["background_ratio"]
        frame["difference_se"] = groups.standard_error(ratios["observation"].terms - ratios["background"].terms)
        return frame

    def pit_counts(
        self, by: By = (), *, bins: int = 10, flags: Sequence[str] = ("used", "withheld")
    ) -> pandas.DataFrame:
        """Histogram of the rank of observations within background plus error (PIT): flat if calibrated.

        The value is the column `background_pit`, or Phi(normalized departure) for rows without one: the probability
        that the forecast gives to a smaller observation. A U is a spread that is too small, a hump one that is too
        large, a slope a bias.

        Args:
            by: columns to group by; none for all rows together.
            bins: number of bins between 0 and 1.
            flags: flags of the rows to take.

        Returns:
            A row for each group, a column for each bin, named by the bin's lower edge.
        """
        import pandas

        groups, at = self._pit(by, bins, flags)
        found = np.zeros((len(groups.count), bins))
        np.add.at(found, (groups.code, at), 1.0)
        return pandas.DataFrame(found, index=groups.index, columns=np.arange(bins) / bins)

    def pit_flatness(
        self, by: By = (), *, bins: int = 10, flags: Sequence[str] = ("used", "withheld")
    ) -> pandas.DataFrame:
        r"""Test of the histograms of `pit_counts` for flatness, with rows of a cycle that depend on each other.

        Pearson's chi-square is divided by the mean design effect of the bins, and its degrees of freedom are corrected
        for the scatter of these effects (Rao & Scott 1981, J. Am. Stat. Assoc. 76, 221; Thomas & Rao 1987, 82, 630, for
        its reference, an F-distribution over cycles). A design effect is the variance of a share over cycles relative
        to that of independent rows; its mean is taken to be at least 1.

        Args:
            by: columns to group by; none for all rows together.
            bins: number of bins between 0 and 1, at least 3.
            flags: flags of the rows to take.

        Returns:
            A row for each group with `count`, `cycles`, `effective` (the number of independent rows that they are
            worth), `chi_square` (corrected; its expectation is bins - 1) and `p_value`. Further, as in `flatness`, the
            components linear and quadratic in the rank, as t-statistics: `bias` with `bias_p`, positive if the
            background is too low, and `dispersion` with `dispersion_p`, positive for a U, that is too little spread.
            NaN where rows are in fewer than two blocks of cycles.
        """
        import scipy.stats

        require_count(bins, "pit_flatness", "bins", 3)
        groups, at = self._pit(by, bins, flags)
        means = [groups.mean((at == k).astype(float)) for k in range(bins)]
        share = np.stack([mean.value for mean in means], axis=-1)
        covariance = groups.covariance(np.stack([mean.terms for mean in means], axis=-1))
        # Variances relative to those of independent rows; the shares sum to 1, which leaves bins - 1 directions.
        effects = covariance * (groups.count * bins)[:, None, None]
        mean_effect = np.maximum(np.trace(effects, axis1=1, axis2=2) / (bins - 1), 1.0)
        scatter = np.sum(effects**2, axis=(1, 2)) / ((bins - 1) * mean_effect**2)
        frame = groups.frame()
        frame["effective"] = groups.count / mean_effect
        frame["chi_square"] = frame["effective"] * bins * np.sum((share - 1.0 / bins) ** 2, axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            freedom = (bins - 1) / np.maximum(scatter, 1.0)
            ratio = frame["chi_square"] / (bins - 1)
            frame["p_value"] = scipy.stats.f.sf(ratio, freedom, freedom * (groups.blocks - 1))
            ranks = np.arange(bins) - (bins - 1) / 2
            for name, contrast in (("bias", ranks), ("dispersion", ranks**2 - np.mean(ranks**2))):
                frame[name] = (share @ contrast) / np.sqrt(covariance @ contrast @ contrast)
                frame[f"{name}_p"] = 2.0 * scipy.stats.t.sf(np.abs(frame[name]), groups.blocks - 1)
        return frame

    def scores(self, by: By = "name", *, flags: Sequence[str] = ("withheld",)) -> pandas.DataFrame:
        r"""Spread, error and CRPS of analysis and background at observations, with the observation error in both.

        The analysis has not seen withheld rows, so they verify it. The spread is the root of the mean of the ensemble's
        variance plus R, the error the root mean square of O - A (or O - B); `spread_skill`, their ratio, is 1 if
        calibrated. The CRPS is the column `analysis_crps`; rows without one get that of a Gaussian with the mean and
        the variance of the row (Gneiting, Raftery, Westveld & Goldman 2005, Mon. Weather Rev. 133, 1098, equation 5).

        Args:
            by: columns to group by; `name` is put before them if it is not among them.
            flags: flags of the rows to take.

        Returns:
            A row for each group with `count`, `cycles`, and for `analysis_` and `background_` each: `rmse`, `spread`,
            `spread_skill`, `spread_skill_se`, `ratio` (mean of the squared departure over its variance), `ratio_se`,
            `ratio_p`, `crps`, `crps_se`; and `crps_skill`, 1 - CRPS of the analysis over that of the background.
        """
        groups = self._groups(by, flags, ("o_b", "o_a", "expected"), named=True)
        rows, frame = groups.rows, groups.frame()
        error = rows["error_used"].to_numpy() ** 2
        for name, column in (("analysis", "o_a"), ("background", "o_b")):
            d = rows[column].to_numpy()
            variance = rows[f"{name}_spread"].to_numpy() ** 2 + error
            square = groups.mean(d**2).value
            spread = groups.mean(variance).value
            with np.errstate(divide="ignore", invalid="ignore"):
                frame[f"{name}_rmse"], frame[f"{name}_spread"] = np.sqrt(square), np.sqrt(spread)
                inverse, inverse_se, _ = groups.mean(d**2, over=variance)
                frame[f"{name}_spread_skill"] = 1.0 / np.sqrt(inverse)
                frame[f"{name}_spread_skill_se"] = inverse_se / (2.0 * inverse**1.5)
                z = d / np.sqrt(variance)
            frame[f"{name}_ratio"], frame[f"{name}_ratio_se"], _, frame[f"{name}_ratio_p"] = _ratio_p_value(groups, z)
            crps = rows[f"{name}_crps"].to_numpy()
            crps = np.where(np.isfinite(crps), crps, gaussian_crps(d, np.sqrt(variance)))
            frame[f"{name}_crps"], frame[f"{name}_crps_se"], _ = groups.mean(crps)
        frame["crps_skill"] = 1.0 - frame["analysis_crps"] / frame["background_crps"].where(
            frame["background_crps"] > 0
        )
        return frame

    def stations(self, *, flags: Sequence[str] = ("used", "withheld")) -> pandas.DataFrame:
        """Departures of each station, the most conspicuous first.

        Args:
            flags: flags of the rows to take.

        Returns:
            A row for each name and station with `unit`, `type`, `count`, `cycles`, `mean`, `mean_se`, `mean_p` and
            `rms` as in `departures`; `ratio`, `ratio_se`, `p_value`, `bias` and `bias_se` as in `consistency`; `others`
            (median of `bias` over the stations of this name) and `rejected`, the share of its rows that checks
            rejected. Rows are sorted by the size of `bias` - `others` over its standard error. Observations without a
            station are left out.
        """
        at_stations = self.where(self.rows["station"] != "")
        by = ["name", "station"]
        frame = at_stations.departures(by, flags=flags)[["count", "cycles", "mean", "mean_se", "mean_p", "rms"]]
        of_ratio = at_stations.consistency(by, flags=flags)
        frame = frame.join(of_ratio[["ratio", "ratio_se", "p_value", "bias", "bias_se"]])
        first = at_stations.rows.groupby(by)[["unit", "type"]].first()
        frame = first.join(frame, how="left")
        frame = frame.fillna({"count": 0, "cycles": 0}).astype({"count": int, "cycles": int})
        frame["others"] = frame.groupby("name")["bias"].transform("median")
        frame = frame.join(at_stations.counts(by)["rejected"])
        order = ((frame["bias"] - frame["others"]) / frame["bias_se"]).abs()
        order = order.fillna(0.0) + 1e-3 * frame["rejected"].fillna(0.0)
        return frame.loc[order.sort_values(ascending=False, kind="stable").index]

    def boxes(self, by: By = "name", *, degrees: float = 10.0, flags: Sequence[str] = ("used", "withheld")) -> Any:
        """Means of O - B and rejections in boxes of nearly equal area.

        Bands of latitude are `degrees` high, and each is divided into as many boxes as make them about as wide as they
        are high.

        Args:
            by: columns to group by; none for all rows together.
            degrees: height of a box in degrees, from 0.1 to 90.
            flags: flags of the rows that departures are of.

        Returns:
            A row for each group and box (`south` and `west` are the last levels of the index), with `north`, `east`,
            `rows`, `rejected` (share of its checked rows, as in `counts`), `count`, `cycles` and `bias` (mean of O - B
            over the root of P + R); and, if `name` is in `by`, `mean` and `mean_se` of O - B.
        """
        advice = "give the height of a box in degrees, from 0.1 to 90."
        degrees = require_number(degrees, "boxes", "degrees", advice, least=0.1, most=90.0)
        south, west, width = _box(self.rows["lat"].to_numpy(), self.rows["lon"].to_numpy(), degrees)
        there = np.isfinite(south)
        placed = self._of(self.rows.assign(south=south, west=west, width=width)[there])
        keys = [*placed._keys(by, None), "south", "west"]
        frame = placed.counts(keys)[["rows", "rejected"]]
        frame = frame.join(placed.consistency(keys, flags=flags)[["count", "cycles", "bias"]])
        if "name" in keys:
            frame = frame.join(placed.departures(keys, flags=flags)[["mean", "mean_se"]])
        widths = placed.rows.groupby("south")["width"].first()
        at = frame.index.get_level_values("south")
        frame["north"] = np.minimum(at + 180.0 / np.ceil(180.0 / degrees), 90.0)
        frame["east"] = frame.index.get_level_values("west") + widths.reindex(at).to_numpy()
        return frame.fillna({"count": 0, "cycles": 0}).astype({"count": int, "cycles": int})

    def _pit(self, by: By, bins: int, flags: Sequence[str]) -> tuple[_Groups, np.ndarray]:
        """Groups of the rows with a PIT, and the bin of each row."""
        import scipy.stats

        require_count(bins, "pit_counts", "bins", 2)
        pit = self.rows["background_pit"].to_numpy()
        pit = np.where(np.isfinite(pit), pit, scipy.stats.norm.cdf(self.rows["normalized"].to_numpy()))
        groups = self._of(self.rows.assign(pit=pit))._groups(by, flags, ("pit",))
        return groups, np.clip((groups.rows["pit"].to_numpy() * bins).astype(int), 0, bins - 1)

    def _keys(self, by: By, first: str | None) -> list[str]:
        """Columns to group by, after a check that they are there."""
        keys = [by] if isinstance(by, str) else list(by)
        keys = [first, *keys] if first is not None and first not in keys else keys
        if missing := [key for key in keys if key not in self.rows]:
            raise ValueError(f"by={shown(by)}: the rows have no column {missing}; they have {sorted(self.rows)}.")
        return keys

    def _groups(self, by: By, flags: Sequence[str], columns: Sequence[str], named: bool = False) -> _Groups:
        """Rows with one of `flags` and with numbers in `columns`, in groups."""
        keys = self._keys(by, "name" if named else None)
        flags = [flags] if isinstance(flags, str) else list(flags)
        here = self.rows["flag"].isin(flags).to_numpy()
        for column in columns:
            here = here & np.isfinite(self.rows[column].to_numpy())
        return _Groups(self.rows[here], keys, self.block)


class _Groups:
    """Rows in groups, and means over each group with their standard errors over blocks of cycles."""

    def __init__(self, rows: pandas.DataFrame, keys: list[str], block: int) -> None:
        import pandas

        self.rows = rows
        if keys:
            grouped = rows.groupby(keys, dropna=False, sort=True, observed=True)
            self.code = grouped.ngroup().to_numpy()
            self.index = grouped.size().index
        else:
            self.code = np.zeros(len(rows), int)
            self.index = pandas.Index(["all"] if len(rows) else [])
        n = len(self.index)
        self.count = np.bincount(self.code, minlength=n)
        cycle = rows["cycle"].to_numpy()
        self.cycles = pandas.Series(cycle).groupby(self.code).nunique().reindex(range(n), fill_value=0).to_numpy()
        # Each pair of a group and a block has a number.
        _, of_block = np.unique(cycle // block, return_inverse=True)
        pairs, self.pair = np.unique(self.code * (of_block.max(initial=0) + 1) + of_block, return_inverse=True)
        self.group_of_pair = (pairs // (of_block.max(initial=0) + 1)).astype(int)
        self.blocks = np.bincount(self.group_of_pair, minlength=n)

    def frame(self) -> pandas.DataFrame:
        """Number of rows and cycles of each group."""
        import pandas

        return pandas.DataFrame({"count": self.count, "cycles": self.cycles}, index=self.index)

    def mean(self, values: np.ndarray, over: np.ndarray | None = None) -> _Mean:
        """Mean of `values`, or its ratio to the mean of `over`, with its standard error to first order."""
        n = len(self.index)
        over = np.ones(len(values)) if over is None else over
        with np.errstate(divide="ignore", invalid="ignore"):
            below = np.bincount(self.code, over, n)
            ratio = np.bincount(self.code, values, n) / below
            terms = (values - ratio[self.code] * over) / below[self.code]
        return _Mean(ratio, self.standard_error(terms), terms)

    def standard_error(self, terms: np.ndarray) -> np.ndarray:
        """Standard error of the sum of `terms` with mean 0 over each group; NaN for fewer than two blocks."""
        sums = np.bincount(self.pair, terms, len(self.group_of_pair))
        squares = np.bincount(self.group_of_pair, sums**2, len(self.index))
        more = self.blocks > 1
        return np.sqrt(np.where(more, squares * self.blocks / np.where(more, self.blocks - 1.0, 1.0), np.nan))

    def covariance(self, terms: np.ndarray) -> np.ndarray:
        """Covariance of the sums of several columns of `terms`, shape (group, column, column), as `standard_error`."""
        columns = terms.shape[1]
        sums = np.stack([np.bincount(self.pair, one, len(self.group_of_pair)) for one in terms.T], axis=-1)
        found = np.full((len(self.index), columns, columns), np.nan)
        for i in np.flatnonzero(self.blocks > 1):
            own = sums[self.group_of_pair == i]
            found[i] = own.T @ own * (len(own) / (len(own) - 1.0))
        return found


class _Mean(NamedTuple):
    """Mean of each group, its standard error, and the deviation of each row that adds to it."""

    value: np.ndarray
    error: np.ndarray
    terms: np.ndarray


def _text(values: Any, count: int) -> np.ndarray:
    """Column of texts, empty where missing; `factorize` gives those the code -1."""
    import pandas

    if values is None:
        return np.full(count, "", object)
    code, unique = pandas.factorize(np.asarray(values, object))
    return np.array([*map(str, unique), ""], object)[code]


def _numbers(rows: pandas.DataFrame, name: str) -> np.ndarray:
    """Column of numbers, NaN if there is none."""
    if name not in rows:
        return np.full(len(rows), np.nan)
    try:
        return rows[name].astype(float).to_numpy()
    except (TypeError, ValueError):
        raise ValueError(f"Feedback got the column '{name}' with values that are no numbers.") from None


def nearest_level(pressure: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Level that is nearest to each pressure, in the logarithm of pressure; NaN where there is no pressure.

    Args:
        pressure: pressures in hPa, shape (row,).
        levels: levels in hPa, shape (level,).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.abs(np.log(pressure)[:, None] - np.log(levels))
    there = np.isfinite(pressure) & (pressure > 0)
    return np.where(there, levels[np.argmin(np.where(there[:, None], distance, 0.0), axis=1)], np.nan)


def _region(lat: np.ndarray, lon: np.ndarray, regions: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Name of the first region that holds each place, "elsewhere" if none does."""
    found = np.full(len(lat), "elsewhere", object)
    for name, (south, north, west, east) in reversed(list(regions.items())):
        across = np.mod(lon - west, 360.0) <= (360.0 if east - west >= 360.0 else np.mod(east - west, 360.0))
        found[(lat >= south) & (lat <= north) & across] = name
    return found


def _box(lat: np.ndarray, lon: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """South and west edge, and width, of the box of each place; NaN without a place."""
    bands = int(np.ceil(180.0 / degrees))
    height = 180.0 / bands
    there = np.isfinite(lat) & np.isfinite(lon)
    lat, lon = np.where(there, lat, 0.0), np.where(there, lon, 0.0)
    band = np.clip(np.floor((lat + 90.0) / height), 0, bands - 1)
    middle = np.deg2rad(-90.0 + (band + 0.5) * height)
    number = np.maximum(np.round(360.0 * np.cos(middle) / height), 1.0)
    width = 360.0 / number
    column = np.minimum(np.floor(np.mod(lon + 180.0, 360.0) / width), number - 1)
    found = (-90.0 + band * height, -180.0 + column * width, width)
    return tuple(np.where(there, values, np.nan) for values in found)  # type: ignore[return-value]


def gaussian_crps(departures: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """CRPS of a Gaussian distribution (Gneiting et al. 2005, Mon. Weather Rev. 133, 1098, equation 5).

    Args:
        departures: observation minus mean, shape (row,).
        spread: standard deviation, shape (row,).
    """
    from scipy.stats import norm

    with np.errstate(divide="ignore", invalid="ignore"):
        z = departures / spread
        # The formula itself: importing scoringrules takes several seconds.
        return spread * (z * (2.0 * norm.cdf(z) - 1.0) + 2.0 * norm.pdf(z) - 1.0 / np.sqrt(np.pi))
