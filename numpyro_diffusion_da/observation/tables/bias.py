r"""Biases of instruments, estimated over time from the departures of a filter.

Each instrument has one bias $b$ for each quantity. It is a random walk, and the mean departure $d_k$ of its $n$ rows at
step $k$ observes it:

$$
b_k = b_{k-1} + q_k, \qquad d_k = b_k + e_k, \qquad \operatorname{var} q_k = q^2, \qquad
\operatorname{var} e_k = P_k + R_k / n .
$$

$R_k$ is the mean error variance and $P_k$ the mean variance of the background at these rows. $P_k$ is not divided by n,
because errors of the background at the rows of one instrument are alike. A Kalman filter for one number solves this
(compare Dee 2005, Q. J. R. Meteorol. Soc. 131, 3323). Departures hold the bias of the model too: an instrument whose
neighbors observe the same is told apart from it, a region with one instrument is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import require, require_number, shown
from numpyro_diffusion_da.fields.departures import departure
from numpyro_diffusion_da.observation.tables.flags import Flag
from numpyro_diffusion_da.observation.tables.windows import step_times
from numpyro_diffusion_da.spelling import spelled

if TYPE_CHECKING:
    import pandas

NEEDED = ("cycle", "flag", "name", "value", "error_used", "background")


@dataclasses.dataclass(frozen=True, eq=False)
class InstrumentBias:
    """Biases of instruments over time. `estimate` makes it, and `ObservationTable.on` removes it.

    Attributes:
        by: columns of the table that tell instruments apart.
        estimates: one row for each instrument, quantity (`name`) and step with observations: its `time`, its `bias` and
            `stddev` in the unit of the quantity, and `count`, the number of rows.
        drift: standard deviation of the change of a bias over one step, in errors of the observations.
    """

    by: tuple[str, ...]
    estimates: pandas.DataFrame
    drift: float

    @classmethod
    def estimate(
        cls,
        feedback: pandas.DataFrame,
        times: Any,
        by: str | Sequence[str] = "station",
        *,
        stddev: float = 1.0,
        drift: float = 0.05,
        previous: InstrumentBias | None = None,
    ) -> InstrumentBias:
        """Estimate biases from the departures of one run.

        Args:
            feedback: rows of `PlacedObservations.feedback` with the columns `background` and, if the spread of the
                background is to count, `background_variance`. Rows with the flag "used" count. What has been removed
                already (`bias_removed`) is a part of the estimate.
            times: times of the steps.
            by: columns that tell instruments apart.
            stddev: standard deviation of biases before anything is observed, in errors of the observations.
            drift: standard deviation of the change of a bias over one step, in errors of the observations; 0 for
                biases that do not change.
            previous: estimates of an earlier table, which go on.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: a column is missing, or a number is out of range.
        """
        import pandas

        require(feedback, pandas.DataFrame, "InstrumentBias.estimate", "feedback", "placed.feedback(background=...)")
        columns = (by,) if isinstance(by, str) else tuple(by)
        if missing := [name for name in (*NEEDED, *columns) if name not in feedback]:
            raise ValueError(
                f"InstrumentBias.estimate got rows without the column {missing[0]!r}; give placed.feedback(background="
                "...), and columns of the table as by."
            )
        if previous is not None:
            require(previous, InstrumentBias, "InstrumentBias.estimate", "previous", "the result of estimate")
            if previous.by != columns:
                raise ValueError(f"InstrumentBias.estimate got by={columns}, but the previous one has {previous.by}.")
        numbers = {
            name: require_number(value, "InstrumentBias.estimate", name, "give a number of errors.", least=0.0)
            for name, value in (("stddev", stddev), ("drift", drift))
        }
        at = step_times(times)
        used = feedback[(feedback["flag"] == Flag.USED) & feedback["background"].notna()]
        removed = used["bias_removed"].fillna(0.0) if "bias_removed" in used else 0.0
        variance = used["background_variance"].fillna(0.0) if "background_variance" in used else 0.0
        departures = departure(used["value"] + removed, used["background"], used.get("unit"))
        used = used.assign(_departure=departures, _variance=variance)
        found = [] if previous is None else previous.estimates.to_dict("records")
        for key, part in used.groupby([*columns, "name"], sort=True):
            start = None if previous is None else previous._last(key)
            found += _over_time(part, dict(zip((*columns, "name"), key, strict=True)), at, numbers, start)
        names = [*columns, "name", "time", "bias", "stddev", "count"]
        return cls(columns, pandas.DataFrame(found, columns=names), numbers["drift"])

    def _last(self, key: tuple[Any, ...]) -> tuple[float, float] | None:
        """Bias and standard deviation of one instrument after the last step; None if it is not known."""
        mine = self.estimates
        for name, value in zip((*self.by, "name"), key, strict=True):
            mine = mine[mine[name] == value]
        return None if mine.empty else (float(mine["bias"].iloc[-1]), float(mine["stddev"].iloc[-1]))

    def latest(self) -> pandas.DataFrame:
        """Last estimate of each instrument and quantity."""
        return self.estimates.groupby([*self.by, "name"], sort=True).last()

    def of(self, rows: pandas.DataFrame, times: np.ndarray) -> np.ndarray:
        """Bias of each row, from the last step before its own; 0 where nothing is known.

        Args:
            rows: rows with the columns `by`, `name` and `cycle`.
            times: times of the steps.

        Raises:
            ValueError: the rows lack a column.
        """
        if missing := [name for name in self.by if name not in rows]:
            raise ValueError(
                f"a bias is known by the column {missing[0]!r}, which the table does not have; add it, or say which "
                f"column it is: {spelled('read_table.columns', {'your name': missing[0]})}."
            )
        found = np.zeros(len(rows))
        keys = [*self.by, "name"]
        known = {key: part for key, part in self.estimates.groupby(keys, sort=False)}
        placed = np.flatnonzero(rows["cycle"].to_numpy() >= 0)
        for key, which in rows.iloc[placed].groupby(keys, sort=False).indices.items():
            if key not in known:
                continue
            at = placed[which]
            moments = known[key]["time"].to_numpy().astype(times.dtype)
            before = np.searchsorted(moments, times[rows["cycle"].to_numpy()[at]], side="left") - 1
            found[at] = np.where(before >= 0, known[key]["bias"].to_numpy()[np.maximum(before, 0)], 0.0)
        return found


def _over_time(
    part: pandas.DataFrame,
    names: dict[str, Any],
    times: np.ndarray,
    numbers: dict[str, float],
    start: tuple[float, float] | None,
) -> list[dict[str, Any]]:
    """Estimates of one instrument and quantity after each step that observes it."""
    error = float(np.sqrt(np.mean(part["error_used"].to_numpy(float) ** 2)))
    bias, variance = (0.0, (numbers["stddev"] * error) ** 2) if start is None else (start[0], start[1] ** 2)
    last = None if start is None else -1
    found = []
    for cycle, here in part.groupby("cycle", sort=True):
        k = int(cycle)
        variance += 0.0 if last is None else (k - last) * (numbers["drift"] * error) ** 2
        last = k
        n = len(here)
        noise = here["_variance"].mean() + np.mean(here["error_used"].to_numpy(float) ** 2) / n
        gain = variance / (variance + noise)
        bias += gain * (here["_departure"].mean() - bias)
        variance *= 1.0 - gain
        found.append({**names, "time": times[k], "bias": bias, "stddev": float(np.sqrt(variance)), "count": n})
    return found


def check_bias(bias: Any) -> None:
    """Refuse a bias that is none.

    Raises:
        TypeError: it is not an `InstrumentBias`.
    """
    if bias is not None and not isinstance(bias, InstrumentBias):
        raise TypeError(f"ObservationTable.on got bias={shown(bias)}; give InstrumentBias.estimate(...).")
