"""Observations on the grid and the times of a model: arrays for a scan, the operator, and the record of all rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from numpyro_diffusion_da.arguments import real_values, require_number
from numpyro_diffusion_da.fields.departures import departure
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.observation.tables.checks import station_keys
from numpyro_diffusion_da.observation.tables.flags import Flag
from numpyro_diffusion_da.observation.tables.operator import ObservationOperator
from numpyro_diffusion_da.observation.tables.table import where
from numpyro_diffusion_da.observation.tables.text import columns_of

if TYPE_CHECKING:
    import pandas


@functools.partial(jax.jit, static_argnums=0)
def _observe(operator: ObservationOperator, states: jax.Array, at: dict[str, Any]) -> jax.Array:
    """Observations of several states at one step, compiled once for an operator and sizes."""
    return jax.vmap(lambda x: operator(x, at))(states)


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedObservations:
    """Observations of a table on the grid and the times of a model. `ObservationTable.on` makes it.

    A program takes `xs` through its scan and `operator` in its body:

        numpyro.sample("y", dist.Normal(placed.operator(x, at), at["error"]).to_event(1), obs=at["y"])

    Attributes:
        layout: layout of the state.
        times: time of each step, datetime64.
        rows: all rows of the table and those that checks added, each with its `flag`. Its index is that of the table.
            Further columns: `cycle` (number of the step, -1 for none), `name` (of the variable or quantity), `value`
            and `error_used` in `unit`, and, after `Superobbing`, `superob` (index of the mean that a row is a part of).
        xs: arrays with the axes (time, row): `y` (NaN where padded or withheld), `error`, `place` (latitude and
            longitude in degrees, a further axis of 2; NaN where padded), `pressure` (Pa; NaN for the surface), `id`
            (index in `rows`; -1 where padded), `instrument` (number in `instruments`, if they were asked for), and
            `parts`, which the operator reads. With correlated errors, `groups` has the rows of each `group`:
            `rows` (their positions along `y`), `y` (NaN in ``xs["y"]`` then), `covariance` and `place`.
        operator: observation operator, `operator(x, at)`.
        sizes: number of rows and of points of each part of the operator, with padding.
        instruments: name of each instrument, as a tuple with one text for each column of `instrument`.
        notes: what was changed: missing codes, units.
    """

    layout: Layout
    times: np.ndarray
    rows: pandas.DataFrame
    xs: dict[str, Any]
    operator: ObservationOperator
    sizes: dict[str, tuple[int, int]]
    instruments: list[tuple[str, ...]]
    notes: tuple[str, ...]

    def counts(self) -> pandas.DataFrame:
        """Number of rows by name (rows) and flag (columns, those that occur)."""
        import pandas

        names = self.rows["name"].where(self.rows["name"].notna(), self.rows["variable"])
        found = pandas.crosstab(names.fillna("(no variable)"), self.rows["flag"])
        found = found[[flag for flag in map(str, Flag) if flag in found.columns]]
        return found.rename_axis(index="name", columns="flag")

    def withheld(self) -> pandas.DataFrame:
        """Number of withheld stations and rows by name, beside those that are withheld or used.

        Rows without a station are known by their place.

        Returns:
            A row for each name with rows that are used or withheld. Columns: `stations` and `rows` (withheld),
            `of_stations` and `of_rows` (withheld or used).
        """
        import pandas

        apart = (self.rows["flag"] == Flag.WITHHELD).to_numpy()
        kept = apart | (self.rows["flag"] == Flag.USED).to_numpy()
        some = self.rows[kept]
        counted = pandas.DataFrame({"name": some["name"], "station": station_keys(some), "apart": apart[kept]})
        of_name, withheld = counted.groupby("name"), counted[counted["apart"]].groupby("name")
        found = {
            "stations": withheld["station"].nunique(),
            "of_stations": of_name["station"].nunique(),
            "rows": withheld.size(),
            "of_rows": of_name.size(),
        }
        return pandas.DataFrame(found).fillna(0).astype(int)

    def report(self) -> str:
        """Text with the number of rows by name and flag, what is withheld, and the notes."""
        used, times = self.rows["flag"] == Flag.USED, len(self.times)
        empty = times - self.rows.loc[used, "cycle"].nunique()
        when = f"{times} time{'s' * (times != 1)}"
        lines = [f"{used.sum()} of {len(self.rows)} rows are used at {when}, {empty} of them without any."]
        if len(self.rows):
            lines.append(columns_of(self.counts()))
        if (self.rows["flag"] == Flag.WITHHELD).any():
            lines += [
                f"{name}: {row.stations} of {row.of_stations} stations are withheld, {row.rows} of {row.of_rows} rows."
                for name, row in self.withheld().iterrows()
            ]
        off = self.rows["flag"] == Flag.OFF_WINDOW
        if off.any() and not (self.rows["cycle"] >= 0).any():
            first, last = (str(time)[:16].replace(" ", "T") for time in self.rows.loc[off, "time"].agg(["min", "max"]))
            lines.append(f"All rows are off the windows: their times are from {first} to {last} UTC.")
        return "\n".join([*lines, *self.notes])

    def observe(self, states: Any, step: int) -> jax.Array:
        """Observations of several states at one step, without error.

        Args:
            states: states, such as the members of an analysis, shape (..., latitude, longitude, channel).
            step: number of the step.

        Returns:
            Observations, shape (..., row), in the order of ``xs["y"]``.
        """
        at = jax.tree.map(lambda values: values[step], self.xs)
        flat = jax.numpy.reshape(jax.numpy.asarray(states), (-1, *self.layout.shape))
        found = _observe(self.operator, flat, at)
        return found.reshape(*np.shape(states)[: -len(self.layout.shape)], -1)

    def where(self, step: int, position: int) -> str:
        """Text that names file and row of an observation, with its variable and station.

        Args:
            step: number of the step.
            position: position along ``xs["y"]``.
        """
        index = self.xs["id"][step, position]
        row = self.rows.loc[index]
        parts = list(self.rows.index[self.rows["superob"] == index]) if "superob" in self.rows else []
        what = where(self.rows, index)
        if parts:
            what = f"the mean of {len(parts)} rows, the first of them {where(self.rows, parts[0])}"
        station = f" of station '{row['station']}'" if isinstance(row.get("station"), str) else ""
        return f"{what} ('{row['name']}'{station})"

    def by_row(self, values: Any) -> pandas.Series:
        """Values of the axes (time, row) as a column: one value for each row of `rows`, missing where it has none.

        Args:
            values: array of the shape of ``xs["y"]``, such as the background of a filter at each observation.

        Raises:
            ValueError: the array has another shape.
        """
        import pandas

        ids = self.xs["id"]
        array = np.asarray(values)
        if array.shape != ids.shape:
            raise ValueError(
                f"by_row got an array of shape {array.shape}; give one value for each of the {ids.shape} of xs['y']."
            )
        here = ids >= 0
        return pandas.Series(array[here], index=ids[here]).reindex(self.rows.index)

    def ungroup(self, values: Any) -> np.ndarray:
        """Values of the groups' rows at their positions along ``xs["y"]``, NaN (or False) elsewhere.

        Args:
            values: array of the shape of ``xs["groups"]["y"]``, such as the rejections of its site.

        Raises:
            ValueError: there are no groups, or the array has another shape.
        """
        groups = self.xs.get("groups")
        array = np.asarray(values)
        if groups is None or array.shape != groups["y"].shape:
            has = "no groups" if groups is None else f"groups of the shape {groups['y'].shape}"
            raise ValueError(f"ungroup got an array of shape {array.shape}, but there are {has}.")
        found = np.zeros(self.xs["y"].shape, bool) if array.dtype == bool else np.full(self.xs["y"].shape, np.nan)
        step, group, row = np.nonzero(np.isfinite(groups["y"]))
        found[step, groups["rows"][step, group, row]] = array[step, group, row]
        return found

    def feedback(self, *, rejected: Any = None, threshold: float | None = None, **columns: Any) -> pandas.DataFrame:
        """Rows with columns of a filter's run, and with the flags that its gross-error check adds.

        Args:
            rejected: True where a gross-error check rejected an observation, shape of ``xs["y"]``, as
                ``result.rejected["y"].any(0)``. Such rows have the flag `Flag.FAR_FROM_BACKGROUND`.
            threshold: that of the check, for withheld rows, which the filter does not see: those that are further from
                the background, in expected standard deviations, have the flag `Flag.WITHHELD_FAR`. It needs the columns
                `background` and `background_variance` or `background_spread`. None for no check.
            **columns: arrays of the shape of ``xs["y"]`` by the name of their column: `background`,
                `background_variance`, `analysis`.

        Returns:
            `rows` with these columns, one row for each row of the table.

        Raises:
            ValueError: an array has another shape, a column exists, or the threshold has no background or is not
                positive.
        """
        frame = self.rows.copy()
        for name, values in columns.items():
            if name in frame:
                raise ValueError(f"feedback got a column '{name}', which the table has; give it another name.")
            frame[name] = self.by_row(real_values(values, f"the column '{name}'"))
        if rejected is not None:
            far = self.by_row(np.asarray(rejected, bool)).fillna(False).to_numpy(bool)
            frame.loc[far & (frame["flag"] == Flag.USED).to_numpy(), "flag"] = str(Flag.FAR_FROM_BACKGROUND)
        if threshold is not None:
            frame.loc[self._far(frame, threshold) & (frame["flag"] == Flag.WITHHELD).to_numpy(), "flag"] = str(
                Flag.WITHHELD_FAR
            )
        return frame

    def _far(self, frame: pandas.DataFrame, threshold: float) -> np.ndarray:
        """Rows further from their background than a number of expected standard deviations."""
        advice = "give a positive number of standard deviations, or None."
        factor = require_number(threshold, "feedback", "threshold", advice, above=0.0)
        if "background" not in frame or not {"background_variance", "background_spread"} & set(frame):
            raise ValueError("feedback got a threshold, but no background and background_variance; give them too.")
        has_variance = "background_variance" in frame
        variance = frame["background_variance"] if has_variance else frame["background_spread"] ** 2
        expected = np.sqrt(variance.to_numpy(float) + frame["error_used"].to_numpy(float) ** 2)
        o_b = departure(frame["value"].to_numpy(float), frame["background"].to_numpy(float), frame["unit"])
        return np.abs(o_b) > factor * expected
