"""Quality control of a table before a filter sees it. Each check gives a flag to the rows that it sets aside.

Checks run in the order in which `ObservationTable.on` gets them, each on the rows that are still used. The check
against a filter's own forecast is `GrossErrorCheck`, and observations with heavy-tailed errors are for `Huber`.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import hashlib
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import ArrayLike, Bool

from numpyro_diffusion_da.arguments import (
    real_array,
    require,
    require_count,
    require_flag,
    require_fraction,
    require_number,
    shown,
)
from numpyro_diffusion_da.fields.grids import Grid
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.fields.units import conversion
from numpyro_diffusion_da.observation.tables.flags import Flag
from numpyro_diffusion_da.observation.tables.geometry import EARTH_RADIUS, Horizontal
from numpyro_diffusion_da.observation.tables.names import Target
from numpyro_diffusion_da.spelling import spelled

if TYPE_CHECKING:
    import pandas

LIMITS: dict[str, tuple[float, float, str]] = {
    "relative_humidity": (0.0, 1.2, "1"),
    "specific_humidity": (0.0, 0.05, "kg kg-1"),
    "wind_speed": (0.0, 150.0, "m s-1"),
    "10m_wind_speed": (0.0, 100.0, "m s-1"),
    "wind_direction": (0.0, 360.0, "degree"),
    "10m_wind_direction": (0.0, 360.0, "degree"),
    "dewpoint_temperature": (150.0, 315.0, "K"),
    "temperature": (150.0, 345.0, "K"),
    "2m_temperature": (180.0, 335.0, "K"),
    "2m_dewpoint_temperature": (150.0, 315.0, "K"),
    "sea_surface_temperature": (268.0, 313.0, "K"),
    "mean_sea_level_pressure": (85000.0, 110000.0, "Pa"),
    "surface_pressure": (40000.0, 110000.0, "Pa"),
    **dict.fromkeys(("u_component_of_wind", "v_component_of_wind"), (-150.0, 150.0, "m s-1")),
    **dict.fromkeys(("10m_u_component_of_wind", "10m_v_component_of_wind"), (-100.0, 100.0, "m s-1")),
}
"""Smallest and largest value that a quantity can have on the Earth, and their unit."""


def limits_of(name: str, unit: str) -> tuple[float, float]:
    """Smallest and largest value that a quantity can have on the Earth; infinite where none is known.

    Args:
        name: name of the variable or quantity.
        unit: unit of the limits.
    """
    if name not in LIMITS:
        return -np.inf, np.inf
    low, high, own = LIMITS[name]
    how = conversion(own, unit)
    return (-np.inf, np.inf) if how is None else (how.factor * low + how.offset, how.factor * high + how.offset)


@dataclasses.dataclass(frozen=True)
class Context:
    """Knowledge of the model that a check may use beside the rows.

    Attributes:
        layout: layout of the state.
        times: times of the filter's steps.
        interpolate: function of (rows, field of the shape of a state) that gives the field at rows that observe a
            variable, and NaN at rows of derived quantities.
        targets: what each name of the column `name` is.
        correlated: whether rows with the same `group` have correlated errors.
    """

    layout: Layout
    times: np.ndarray
    interpolate: Callable[[pandas.DataFrame, np.ndarray], np.ndarray]
    targets: Mapping[str, Target]
    correlated: bool = False

    def offset(self, rows: pandas.DataFrame) -> np.ndarray:
        """Distance of each row's time from the time of its step, timedelta64, not negative."""
        return np.abs(rows["time"].to_numpy() - self.times[rows["cycle"].to_numpy()])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Flags of rows that a check found, and rows that it adds.

    Attributes:
        flags: flag of each row, `Flag.USED` for those that it lets pass.
        added: new rows to use, with the columns of the others; None if there are none.
        joined: for each row, the position in `added` of the row that it became a part of, or -1; None if none did.
    """

    flags: np.ndarray
    added: pandas.DataFrame | None = None
    joined: np.ndarray | None = None


class QualityCheck(abc.ABC):
    """Check of rows. A subclass gives a flag to the rows that it sets aside.

    Attributes:
        flag: flag of the rows that `rejects` marks.
    """

    flag: Flag = Flag.BAD_QUALITY

    @abc.abstractmethod
    def rejects(self, rows: pandas.DataFrame, context: Context) -> Bool[np.ndarray, " row"]:
        """Which rows to set aside.

        Args:
            rows: rows that are still used, with the columns of the table and `name` (of the layout or the derived
                quantity), `value` and `error_used` (in its unit), `unit`, `pres` (Pa), and `cycle`, the number of the
                step.
            context: layout, times and interpolation.
        """

    def remarks(self, rows: pandas.DataFrame) -> list[str]:
        """Sentences about the table for its user, such as what the check asks for and the table does not have.

        Args:
            rows: all rows of the table, with their flags after all checks.
        """
        return []

    def apply(self, rows: pandas.DataFrame, context: Context) -> Outcome:
        """Flags of rows, and rows that the check adds.

        Args:
            rows: rows that are still used.
            context: layout, times and interpolation.
        """
        wrong = np.asarray(self.rejects(rows, context), bool)
        # An array of objects, because one of texts would cut off longer flags.
        return Outcome(np.array([str(self.flag if bad else Flag.USED) for bad in wrong], object))


def _names(value: Any, owner: str, name: str) -> tuple[str, ...]:
    """Several texts, given as a sequence or as one. Whole numbers, as stations may have, become texts."""
    whole = numbers.Integral
    given = (value,) if isinstance(value, str) else value
    right = isinstance(given, Sequence) and all(
        isinstance(one, (str, whole)) and not isinstance(one, bool) for one in given
    )
    if not right:
        raise TypeError(f'{owner} got {name}={shown(value)}; give texts or whole numbers, as in {name}=("A12", 6260).')
    return tuple(map(str, given))


def _unknown_names(owner: str, names: Sequence[str | int], rows: pandas.DataFrame, columns: Sequence[str]) -> list[str]:
    """Sentences about names that none of some columns has, each with the nearest name that occurs.

    Args:
        owner: what names them, for the sentence.
        names: the names.
        rows: all rows of a table.
        columns: columns in which a name may occur.
    """
    has = {str(value) for column in columns if column in rows for value in rows[column].dropna().unique()}
    found = []
    for name in map(str, names):
        if name not in has:
            # 1234 may be 01234, and "ship7" SHIP7.
            same = [one for one in has if one.lower().lstrip("0") == name.lower().lstrip("0")]
            near = same or difflib.get_close_matches(name, sorted(has), n=1, cutoff=0.75)
            found.append(f"{owner} names {name!r}, but no row has it{f'; is it {near[0]!r}?' if near else '.'}")
    return found


def _of(rows: pandas.DataFrame, name: str, wanted: tuple[str, ...]) -> np.ndarray:
    """Whether a column has one of some texts; everywhere if none are wanted."""
    if not wanted:
        return np.ones(len(rows), bool)
    return rows[name].isin(wanted).to_numpy() if name in rows else np.zeros(len(rows), bool)


@dataclasses.dataclass(frozen=True)
class Blacklist(QualityCheck):
    """Rows that are known to be bad. A row is on the list if it has one of the values of every argument given.

    Args:
        stations: names in the column `station`; a whole number is the text that spells it.
        types: names in the column `type`.
        variables: names of variables or derived quantities, as the layout or the table has them.

    Raises:
        TypeError: an argument holds no texts.
        ValueError: nothing is given.
    """

    stations: Sequence[str | int] = ()
    types: Sequence[str] = ()
    variables: Sequence[str] = ()
    flag = Flag.BLACKLISTED

    def __post_init__(self) -> None:
        for name in ("stations", "types", "variables"):
            object.__setattr__(self, name, _names(getattr(self, name), "Blacklist", name))
        if not self.stations and not self.types and not self.variables:
            raise ValueError('Blacklist got nothing; name stations, types or variables, as in stations=("A12",).')

    def rejects(self, rows: pandas.DataFrame, context: Context) -> Bool[np.ndarray, " row"]:
        """Rows with one of the stations, one of the types and one of the variables, of those that are given."""
        of_station = _of(rows, "station", tuple(map(str, self.stations))) & _of(rows, "type", tuple(self.types))
        variables = tuple(self.variables)
        return of_station & (_of(rows, "name", variables) | _of(rows, "variable", variables))

    def remarks(self, rows: pandas.DataFrame) -> list[str]:
        """Names that no row has, or that no row has together."""
        owner = spelled("Blacklist", python="Blacklist")
        found = _unknown_names(owner, self.stations, rows, ("station",))
        found += _unknown_names(owner, self.types, rows, ("type",))
        found += _unknown_names(owner, self.variables, rows, ("name", "variable"))
        if found or not len(rows) or self.rejects(rows, None).any():  # type: ignore[arg-type]
            return found
        return [f"{owner} sets nothing aside: no row has one of its names in each of the columns that it names."]


@dataclasses.dataclass(frozen=True)
class QualityColumn(QualityCheck):
    """The table's own marks of quality: rows whose mark is not an accepted one are set aside.

    Args:
        accepted: marks of good rows, numbers or texts. A number equals the text that spells it.
        column: name of the column with the marks.

    Raises:
        TypeError: `accepted` is not a sequence, or `column` no text.
        ValueError: `accepted` is empty; when used, the table has no such column.
    """

    accepted: Sequence[Any]
    column: str = "quality"

    def __post_init__(self) -> None:
        if isinstance(self.accepted, (str, bytes)) or not isinstance(self.accepted, Sequence):
            raise TypeError(f"QualityColumn got accepted={shown(self.accepted)}; give the good marks, as in (0, 1).")
        if not self.accepted:
            raise ValueError("QualityColumn got no accepted marks; give one or more, as in (0, 1).")
        require(self.column, str, self, "column", '"quality"')

    def rejects(self, rows: pandas.DataFrame, context: Context) -> Bool[np.ndarray, " row"]:
        """Rows whose mark is another one, or missing."""
        if self.column not in rows:
            raise ValueError(
                f"the table has no column {self.column!r} for {spelled('accepted', python='QualityColumn')}; it has "
                f"{', '.join(map(str, rows.columns[:12]))}."
            )
        good = {_mark(mark) for mark in self.accepted}
        return np.array([_mark(mark) not in good for mark in rows[self.column].to_numpy(object)], bool)


def _mark(value: Any) -> str:
    """Mark of quality as a text; 1, 1.0 and "1" are the same."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value).strip()
    return f"{number:g}"


@dataclasses.dataclass(frozen=True, eq=False)
class Bounds(QualityCheck):
    """Values that are impossible, or far from the climate.

    Impossible are values beyond `LIMITS`. Far are values of a variable more than `factor` standard deviations from the
    mean of the climate, both interpolated to the place of the row; derived quantities have limits only.

    Args:
        mean: mean of the climate in the units of the layout, of the shape of a state or broadcast to it, as (channel,)
            and (latitude, 1, channel) are; None for limits only.
        stddev: standard deviation of the climate in the same form.
        factor: largest distance from the mean, in standard deviations. Weather has heavier tails than a Gaussian.
        limits: (smallest, largest) value by the name of a variable or quantity, in the unit of the layout or quantity,
            in place of those of `LIMITS`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: only one of mean and standard deviation is given, they are not finite, or limits are not a pair.
    """

    mean: ArrayLike | None = None
    stddev: ArrayLike | None = None
    factor: float = 8.0
    limits: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    flag = Flag.OUT_OF_BOUNDS

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.stddev is None):
            raise ValueError("Bounds got one of mean and stddev; give both, or neither.")
        for name in ("mean", "stddev"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, real_array(getattr(self, name), self, name, "states.mean(0)"))
        advice = "give a positive number of standard deviations."
        object.__setattr__(self, "factor", require_number(self.factor, self, "factor", advice, above=0.0))
        require(self.limits, Mapping, self, "limits", '{"temperature": (180.0, 340.0)}')
        for name, pair in self.limits.items():
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise ValueError(f"Bounds got limits[{name!r}]={shown(pair)}; give (smallest, largest).")
            low, high = (require_number(end, self, f"limits[{name!r}]", "give two numbers.") for end in pair)
            if not low < high:
                raise ValueError(f"Bounds got limits[{name!r}]={shown(pair)}; give (smallest, largest).")

    @classmethod
    def of(cls, prior: Any, factor: float = 8.0, limits: Mapping[str, tuple[float, float]] | None = None) -> Bounds:
        """Bounds from the statistics that a prior has of its training data.

        Args:
            prior: prior with the method `climate_statistics`, such as `load_prior("held_suarez")` or GenCast.
            factor: largest distance from the mean, in standard deviations.
            limits: limits in place of those of `LIMITS`.

        Raises:
            TypeError: the prior has no statistics.
        """
        if not callable(getattr(prior, "climate_statistics", None)):
            raise TypeError(
                f"Bounds.of got {shown(prior)}, which has no climate_statistics(); give Bounds.from_states(states)."
            )
        mean, stddev = prior.climate_statistics()
        return cls(mean, stddev, factor, dict(limits or {}))

    @classmethod
    def from_states(
        cls, states: ArrayLike, factor: float = 8.0, limits: Mapping[str, tuple[float, float]] | None = None
    ) -> Bounds:
        """Bounds from states, such as draws of a climatology or years of a reanalysis.

        Mean and standard deviation are those of each latitude, over all longitudes and states.

        Args:
            states: states in the units of the layout, (state, latitude, longitude, channel).
            factor: largest distance from the mean, in standard deviations.
            limits: limits in place of those of `LIMITS`.
        """
        values = np.asarray(states, float)
        if values.ndim != 4:
            raise ValueError(
                f"Bounds.from_states got an array of shape {values.shape}; give (state, latitude, longitude, channel)."
            )
        axes = (0, 2)
        return cls(values.mean(axes)[:, None], values.std(axes)[:, None], factor, dict(limits or {}))

    def rejects(self, rows: pandas.DataFrame, context: Context) -> Bool[np.ndarray, " row"]:
        """Rows beyond the limits of their quantity, or far from the climate."""
        value, names = rows["value"].to_numpy(float), rows["name"].to_numpy(object)
        wrong = np.zeros(len(rows), bool)
        for name in np.unique(names.astype(str)):
            low, high = self.limits.get(name) or limits_of(name, context.targets[name].units)
            wrong |= (names == name) & ((value < low) | (value > high))
        if self.mean is None or self.stddev is None:
            return wrong
        shape = context.layout.shape
        fields = []
        for what in ("mean", "stddev"):
            try:
                fields.append(np.broadcast_to(np.asarray(getattr(self, what)), shape))
            except ValueError:
                got = np.shape(getattr(self, what))
                raise ValueError(f"Bounds got {what} of shape {got}; give one that broadcasts to {shape}.") from None
        mean, stddev = (context.interpolate(rows, field) for field in fields)
        # A derived quantity has no mean, which is NaN, and no comparison with it is true.
        return wrong | (np.abs(value - mean) > self.factor * stddev)


@dataclasses.dataclass(frozen=True, eq=False)
class HeightDifference(QualityCheck):
    """Stations that are much higher or lower than the model's surface. Rows on a pressure level have no height.

    Args:
        orography: height of the model's surface in m, shape (latitude, longitude): geopotential at the surface over
            9.80665 m s-2.
        limit: largest difference in m.

    Raises:
        ValueError: the heights are not finite, or do not have the shape of the grid; or the limit is not positive.
    """

    orography: ArrayLike
    limit: float = 300.0
    flag = Flag.HEIGHT_DIFFERENCE

    def __post_init__(self) -> None:
        object.__setattr__(self, "orography", real_array(self.orography, self, "orography", "z_surface / 9.80665"))
        limit = require_number(self.limit, self, "limit", "give a positive height in m.", above=0.0)
        object.__setattr__(self, "limit", limit)

    def rejects(self, rows: pandas.DataFrame, context: Context) -> Bool[np.ndarray, " row"]:
        """Rows of stations whose `elev` differs too much."""
        if "elev" not in rows:
            return np.zeros(len(rows), bool)
        heights = np.asarray(self.orography)
        if heights.shape != context.layout.shape[:2]:
            raise ValueError(
                f"HeightDifference got orography of shape {heights.shape}; the grid has {context.layout.shape[:2]}."
            )
        found = Horizontal(Grid.of(context.layout)).weights(
            rows[["lat", "lon"]].to_numpy(float), np.full(len(rows), np.nan), False
        )
        surface = np.sum(found.weight * heights.reshape(-1)[found.points], axis=1)
        apart = np.abs(rows["elev"].to_numpy(float) - surface) > self.limit
        return apart & np.isnan(rows["pres"].to_numpy(float))

    def remarks(self, rows: pandas.DataFrame) -> list[str]:
        """A table without heights."""
        if not len(rows) or ("elev" in rows and rows["elev"].notna().any()):
            return []
        owner = spelled("height_difference", python="HeightDifference")
        return [f"{owner} checks nothing, because the table has no column elev with the heights of stations."]


@dataclasses.dataclass(frozen=True)
class Duplicates(QualityCheck):
    """Rows that occur twice, and several reports of a station in one window.

    A duplicate has time, place, level, quantity and value of an earlier row. Of several reports of one station at one
    place and level, the one nearest to the time of the step is used. Reports of a ship that moves are at other places.

    Args:
        one_report: whether a station at one place has one report in each window.

    Raises:
        TypeError: `one_report` is neither True nor False.
    """

    one_report: bool = True
    flag = Flag.DUPLICATE

    def __post_init__(self) -> None:
        require_flag(self.one_report, self, "one_report")

    def rejects(self, rows: pandas.DataFrame, context: Context) -> Bool[np.ndarray, " row"]:
        """Rows that repeat an earlier one exactly."""
        keys = self._places(rows).assign(time=rows["time"].to_numpy(), value=rows["value"].to_numpy(np.float32))
        return keys.duplicated().to_numpy()

    def _places(self, rows: pandas.DataFrame) -> pandas.DataFrame:
        """Quantity, level and place of rows, in which two rows at one place agree."""
        import pandas

        layer = rows["layer_top"].to_numpy(float) if "layer_top" in rows else np.zeros(len(rows))
        return pandas.DataFrame(
            {
                "name": rows["name"].to_numpy(object),
                "pres": rows["pres"].round(0).fillna(-1.0).to_numpy(),
                "layer_top": np.nan_to_num(np.round(layer), nan=-1.0),
                # 360.00 is 0.00
                "lat": np.round(100.0 * rows["lat"].to_numpy(float)).astype(int),
                "lon": np.round(100.0 * rows["lon"].to_numpy(float)).astype(int) % 36000,
            }
        )

    def apply(self, rows: pandas.DataFrame, context: Context) -> Outcome:
        """Flags of duplicates, then of repeated reports among the others."""
        found = super().apply(rows, context)
        if not self.one_report or "station" not in rows:
            return found
        keys = self._places(rows).assign(station=rows["station"].to_numpy(object), cycle=rows["cycle"].to_numpy())
        at = np.flatnonzero((found.flags == Flag.USED) & rows["station"].notna().to_numpy())
        nearest = at[np.lexsort((at, context.offset(rows)[at]))]
        repeated = nearest[keys.iloc[nearest].duplicated().to_numpy()]
        found.flags[repeated] = str(Flag.REPEATED_REPORT)
        return found


def _check_distance(value: Any, owner: Any, name: str = "distance") -> float:
    return require_number(value, owner, name, "give a positive distance in km.", above=0.0)


@dataclasses.dataclass(frozen=True)
class Thinning(QualityCheck):
    """Rows that are close to another row of the same quantity, step and type.

    Rows are taken in the order of their distance from the time of the step, then of their error; each sets the others
    within `distance` aside. What remains is at least as far apart as that.

    Args:
        distance: smallest distance of two rows, km.
        height_scale: distance in km that counts as much as a factor of e in pressure.
        types: types to thin, in the column `type`; all rows by default.

    Raises:
        TypeError: `types` holds no texts.
        ValueError: a distance is not positive.
    """

    distance: float
    height_scale: float = 2000.0
    types: Sequence[str] = ()
    flag = Flag.THINNED

    def __post_init__(self) -> None:
        for name in ("distance", "height_scale"):
            object.__setattr__(self, name, _check_distance(getattr(self, name), self, name))
        object.__setattr__(self, "types", _names(self.types, "Thinning", "types"))

    def rejects(self, rows: pandas.DataFrame, context: Context) -> Bool[np.ndarray, " row"]:
        """Rows that are closer than the distance to a row that stays."""
        from scipy.spatial import cKDTree

        points = _positions(rows, self.height_scale)
        offset = context.offset(rows).astype(np.int64)
        error = rows["error_used"].to_numpy(float)
        mine = _of(rows, "type", tuple(self.types))
        wrong = np.zeros(len(rows), bool)
        # The straight line to a place at this distance along the great circle.
        reach = 2.0 * EARTH_RADIUS * np.sin(min(0.5 * self.distance / EARTH_RADIUS, 0.5 * np.pi))
        for at in _groups(rows, mine):
            order = at[np.lexsort((at, error[at], offset[at]))]
            tree = cKDTree(points[order])
            for i, row in enumerate(order):
                if not wrong[row]:
                    near = np.asarray(tree.query_ball_point(points[row], reach * (1.0 - 1e-9)))
                    wrong[order[near[near > i]]] = True
        return wrong

    def remarks(self, rows: pandas.DataFrame) -> list[str]:
        """Types that no row has."""
        return _unknown_names("Thinning", self.types, rows, ("type",))


def on_sphere(rows: pandas.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cartesian coordinates of the places of rows on the unit sphere.

    Args:
        rows: rows with `lat` and `lon` in degrees.
    """
    north, east = np.deg2rad(rows["lat"].to_numpy(float)), np.deg2rad(rows["lon"].to_numpy(float))
    return np.cos(north) * np.cos(east), np.cos(north) * np.sin(east), np.sin(north)


def _positions(rows: pandas.DataFrame, height_scale: float) -> np.ndarray:
    """Positions in km, on the sphere and with the logarithm of pressure as a fourth coordinate."""
    sphere = on_sphere(rows)
    height = height_scale * np.nan_to_num(np.log(rows["pres"].to_numpy(float) / 1e5))
    return np.stack([*(EARTH_RADIUS * part for part in sphere), height], axis=-1)


def _groups(rows: pandas.DataFrame, mine: np.ndarray) -> list[np.ndarray]:
    """Positions of rows of the same step, quantity and type, of those marked."""
    import pandas

    types = rows["type"].fillna("").to_numpy(object) if "type" in rows else np.full(len(rows), "", object)
    keys = pandas.DataFrame({"cycle": rows["cycle"].to_numpy(), "name": rows["name"].to_numpy(object), "type": types})
    at = np.flatnonzero(mine)
    return [at[found] for found in keys.iloc[at].groupby(["cycle", "name", "type"], sort=True).indices.values()]


@dataclasses.dataclass(frozen=True)
class Superobbing(QualityCheck):
    r"""Means over the rows of one cell, in place of these rows.

    Cells are about `distance` wide in both directions. A mean over n rows of errors $s$ with the correlation $r$ has
    the error $s \sqrt{(1 + (n - 1) r) / n}$. It is a row of its own, at the mean place and time, from the source
    "superob"; the column `superob` of the others names it. If rows of a group have correlated errors
    (``table.on(correlation=...)``), they stay as they are.

    Args:
        distance: size of a cell, km.
        correlation: correlation of the errors of two rows of a cell, 0 to 1.
        least: least number of rows of a mean; rows of cells with fewer stay as they are.
        types: types to average, in the column `type`; all rows by default.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the distance is not positive, the correlation is outside [0, 1], or `least` is below 2.
    """

    distance: float
    correlation: float = 0.0
    least: int = 2
    types: Sequence[str] = ()
    flag = Flag.SUPEROBBED

    def __post_init__(self) -> None:
        object.__setattr__(self, "distance", _check_distance(self.distance, self))
        advice = "give a number from 0 to 1."
        found = require_number(self.correlation, self, "correlation", advice, least=0.0, most=1.0)
        object.__setattr__(self, "correlation", found)
        require_count(self.least, self, "least", 2)
        object.__setattr__(self, "types", _names(self.types, "Superobbing", "types"))

    def rejects(self, rows: pandas.DataFrame, context: Context) -> Bool[np.ndarray, " row"]:
        """Rows that became a part of a mean."""
        return self.apply(rows, context).flags == Flag.SUPEROBBED

    def apply(self, rows: pandas.DataFrame, context: Context) -> Outcome:
        """Flags of the rows that are averaged, and the means."""
        import pandas

        flags = np.full(len(rows), str(Flag.USED), object)
        joined = np.full(len(rows), -1)
        cell = self._cells(rows)
        added: list[dict[str, Any]] = []
        mine = _of(rows, "type", tuple(self.types))
        if context.correlated and "group" in rows:
            mine &= rows["group"].isna().to_numpy()
        for group in _groups(rows, mine):
            _, inverse = np.unique(cell[group], axis=0, return_inverse=True)
            order = np.argsort(inverse.reshape(-1), kind="stable")
            ends = np.cumsum(np.bincount(inverse.reshape(-1)))[:-1]
            for at in np.split(group[order], ends):
                if len(at) >= self.least:
                    flags[at], joined[at] = str(Flag.SUPEROBBED), len(added)
                    added.append(self._mean(rows.iloc[at], context, len(added) + 1))
        return Outcome(flags, pandas.DataFrame(added) if added else None, joined if added else None)

    def remarks(self, rows: pandas.DataFrame) -> list[str]:
        """Types that no row has."""
        return _unknown_names("Superobbing", self.types, rows, ("type",))

    def _cells(self, rows: pandas.DataFrame) -> np.ndarray:
        """Cell of each row: band of latitude, sector of longitude, layer, shape (row, 4)."""
        size = np.rad2deg(self.distance / EARTH_RADIUS)
        bands = max(1, round(180.0 / size))
        band = np.minimum((rows["lat"].to_numpy(float) + 90.0) * bands / 180.0, bands - 1).astype(int)
        middle = np.deg2rad((band + 0.5) * 180.0 / bands - 90.0)
        sectors = np.maximum(1, np.round(360.0 * np.cos(middle) / size))
        sector = (rows["lon"].to_numpy(float) % 360.0 * sectors / 360.0).astype(int)
        layers = [rows["pres"].to_numpy(float)]
        layers += [rows["layer_top"].to_numpy(float)] if "layer_top" in rows else []
        # Rows of one cell are at the same pressure, to two percent.
        number = [np.round(50.0 * np.nan_to_num(np.log(pressure), nan=0.0)).astype(int) for pressure in layers]
        return np.stack([band, sector, *number], axis=-1)

    def _mean(self, rows: pandas.DataFrame, context: Context, number: int) -> dict[str, Any]:
        """Row with the mean of rows of one cell, quantity and step."""
        first = rows.iloc[0]
        x, y, z = (coordinate.mean() for coordinate in on_sphere(rows))
        value = rows["value"].to_numpy(float)
        quantity = context.targets[first["name"]].quantity
        if quantity is not None and quantity.period is not None:
            turn = 2.0 * np.pi / quantity.period
            mean = np.arctan2(np.sin(turn * value).mean(), np.cos(turn * value).mean()) / turn % quantity.period
        else:
            mean = value.mean()
        n = len(rows)
        error = np.sqrt(np.mean(rows["error_used"].to_numpy(float) ** 2) * (1.0 + (n - 1) * self.correlation) / n)
        own = {
            "source": "superob",
            "row": number,
            "time": rows["time"].mean(),
            "lat": float(np.rad2deg(np.arctan2(z, np.hypot(x, y)))),
            "lon": float(np.rad2deg(np.arctan2(y, x)) % 360.0),
            "observation": float(mean),
            "value": float(mean),
            "variable": first["name"],
            "units": first["unit"],
            "error_used": float(error),
            "pres": float(np.exp(np.mean(np.log(rows["pres"].to_numpy(float))))),
        }
        same = {
            name: first[name] for name in ("name", "unit", "cycle", "type", "layer_top", "footprint") if name in rows
        }
        return {**same, **own, "flag": str(Flag.USED), "superobbed_rows": n}


@dataclasses.dataclass(frozen=True)
class Withheld(QualityCheck):
    """Rows that are compared with the analysis and not assimilated, for an honest verification.

    A station is withheld as a whole, at all times, because its next report says almost the same. Rows without a station
    are known by their place. Give this check last: a duplicate of a withheld row would tell the filter its value.

    The number of stations withheld is the nearest one to the fraction of those that report, at least one if there are
    two or more, and never all. Stations that report the same variables share them in proportion, and what remains is
    shared so that each variable comes as near to the fraction as it can. Among equals, a number that depends on the
    name of the station and the seed decides, so further reports of the same stations and variables change nothing.
    Other stations may change the choice: name the stations where tables arrive one by one.

    Args:
        fraction: fraction of the stations that is withheld, 0 to below 1.
        stations: names of stations that are withheld beside them; a whole number is the text that spells it.
        seed: seed of the choice.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the fraction is outside [0, 1), or nothing is withheld.
    """

    fraction: float = 0.0
    stations: Sequence[str | int] = ()
    seed: int = 0
    flag = Flag.WITHHELD

    def __post_init__(self) -> None:
        fraction = require_fraction(self.fraction, self, "fraction", "give a fraction from 0 to below 1.")
        object.__setattr__(self, "fraction", fraction)
        object.__setattr__(self, "stations", _names(self.stations, "Withheld", "stations"))
        require_count(self.seed, self, "seed", 0)
        if not self.fraction and not self.stations:
            raise ValueError("Withheld got nothing; give a fraction such as 0.1, or stations.")

    def rejects(self, rows: pandas.DataFrame, context: Context) -> Bool[np.ndarray, " row"]:
        """Rows of the chosen stations."""
        import pandas

        keys, of_row = np.unique(station_keys(rows), return_inverse=True)
        station = rows["station"].to_numpy(object) if "station" in rows else np.full(len(rows), None, object)
        named = np.array([name in self.stations for name in station], bool)
        # What each station reports; those that are withheld by name are no part of the choice.
        name_of_row, names = pandas.factorize(rows["name"].to_numpy(object))
        reports = np.zeros((len(keys), len(names)), bool)
        reports[of_row[~named], name_of_row[~named]] = True
        others = np.flatnonzero(reports.any(axis=1))
        chosen = np.zeros(len(keys), bool)
        chosen[others] = self._choice(reports[others], np.array([self._draw(key) for key in keys[others]]))
        return chosen[of_row] | named

    def remarks(self, rows: pandas.DataFrame) -> list[str]:
        """Stations of which no row is withheld, and a fraction that withholds none."""
        owner = spelled("Withheld", python="Withheld")
        found = _unknown_names(owner, self.stations, rows, ("station",))
        apart = rows[rows["flag"] == Flag.WITHHELD]
        here, of = (set(some["station"].dropna()) if "station" in some else set() for some in (apart, rows))
        found += [
            f"{owner} names {name!r}, but withholds no row of it, because none is used."
            for name in self.stations
            if name in of and name not in here
        ]
        if self.fraction and apart.empty:
            found.append(f"{owner} withholds nothing: fewer than two stations have rows to use.")
        return found

    def _choice(self, reports: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Stations that the fraction withholds, as a mask.

        Args:
            reports: whether a station reports a variable, shape (station, variable).
            draws: number of each station that decides among equals; the smallest ones are withheld.
        """
        chosen = np.zeros(len(reports), bool)
        if not self.fraction or len(reports) < 2:
            return chosen
        wanted = min(max(1, round(self.fraction * len(reports))), len(reports) - 1)
        kinds, kind = np.unique(reports, axis=0, return_inverse=True)
        kind = kind.reshape(-1)
        order = np.lexsort((draws, kind))
        size = np.bincount(kind, minlength=len(kinds))
        rank = np.empty(len(reports), int)
        rank[order] = np.arange(len(reports)) - np.repeat(np.cumsum(size) - size, size)
        # Each kind of station gives a whole number of its share, and some give one more.
        share = np.floor(self.fraction * size).astype(int)
        target = self.fraction * reports.sum(axis=0)
        first = draws[order[np.cumsum(size) - size]]
        full = np.zeros(len(kinds), bool)
        for _ in range(wanted - int(share.sum())):
            off = ((share @ kinds + kinds - target) ** 2 / target).sum(axis=1)
            best = np.lexsort((first, np.round(off, 9), full))[0]
            share[best] += 1
            full[best] = True
        return rank < share[kind]

    def _draw(self, key: str) -> float:
        """Number from 0 to 1 that depends on the key and the seed only."""
        digest = hashlib.blake2b(f"{self.seed} {key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2.0**64


def station_keys(rows: pandas.DataFrame) -> np.ndarray:
    """Text that tells each row's station from others; rows without a station are known by their place.

    Args:
        rows: rows with `lat`, `lon` and perhaps `station`.
    """
    station = rows["station"].to_numpy(object) if "station" in rows else np.full(len(rows), None, object)
    places = zip(rows["lat"].to_numpy(float), rows["lon"].to_numpy(float) % 360.0, strict=True)
    keys = [
        f"station {name}" if isinstance(name, str) else f"place {lat:.2f} {lon:.2f}"
        for name, (lat, lon) in zip(station, places, strict=True)
    ]
    return np.array(keys, object).astype(str)
