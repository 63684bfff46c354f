"""Table of observations in long form, one row a value, with columns of known names, types and units."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import is_number, require, shown
from numpyro_diffusion_da.fields.plausibility import FILL_VALUES, LARGEST
from numpyro_diffusion_da.fields.units import conversion, same_unit
from numpyro_diffusion_da.observation.tables.files import RawTable, read_raw
from numpyro_diffusion_da.spelling import spelled

if TYPE_CHECKING:
    import pandas

    from numpyro_diffusion_da.fields.layout import Layout
    from numpyro_diffusion_da.observation.tables.bias import InstrumentBias
    from numpyro_diffusion_da.observation.tables.checks import QualityCheck
    from numpyro_diffusion_da.observation.tables.placed import PlacedObservations
    from numpyro_diffusion_da.observation.tables.quantities import DerivedQuantity

NEEDED = ("time", "lat", "lon", "variable", "observation")
NUMBERS = ("lat", "lon", "observation", "pres", "level", "error", "footprint", "elev", "layer_top")
TEXTS = ("variable", "units", "station", "type", "group")
SPELLINGS = {
    "time": ("valid_time", "datetime"),
    "lat": ("latitude",),
    "lon": ("longitude",),
    "station": ("station_id",),
}
"""Other names of columns, which mean the same wherever they occur."""
UNITS = {"pres": "Pa", "level": "hPa", "elev": "m", "footprint": "km", "layer_top": "hPa"}
"""Unit of each column that has one of its own."""
RESERVED = ("source", "row")
HIGHEST_LEVEL = 1200.0
"""Largest value of the column `level` in hPa; a larger one is in another unit."""


@dataclasses.dataclass(frozen=True, eq=False)
class ObservationTable:
    """Table of observations in long form, one row a value. `read_table` makes it.

    Attributes:
        frame: the rows. Its index is the number of the row in this object, from 0, by which all results are attached to
            rows; it does not change when rows are set aside. Columns: `source` and `row` (file and row as a person sees
            it), `time` (UTC), `lat`, `lon` (degrees), `variable`, `observation` and `units` as given, `pres` (Pa), and
            what else the source has. NaN and NaT are missing.
        notes: what reading changed, one sentence each.
        variables: names of variables by the names that the table has; None for one that is left out.
        units: unit of the rows of a variable that have none of their own.
    """

    frame: pandas.DataFrame
    notes: tuple[str, ...] = ()
    variables: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    units: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        kinds = self.frame["variable"].nunique()
        sources = ", ".join(map(str, self.frame["source"].unique()[:3]))
        return f"ObservationTable({len(self)} rows of {kinds} variables from {sources or 'nowhere'})"

    def where(self, index: Any) -> str:
        """Text that names the source and the row of one row.

        Args:
            index: its index in `frame`.
        """
        return where(self.frame, index)

    def on(
        self,
        layout: Layout,
        times: Any,
        *,
        window: Any = None,
        errors: float | Mapping[Any, float] | None = None,
        quality: Sequence[QualityCheck] | None = None,
        quantities: Sequence[DerivedQuantity] = (),
        instrument: str | Sequence[str] | None = None,
        bias: InstrumentBias | None = None,
        correlation: float | Callable[[pandas.DataFrame], Any] | None = None,
        sizes: Mapping[str, tuple[int, int]] | None = None,
    ) -> PlacedObservations:
        """Place the observations on a model's grid and times, for a NumPyro program.

        Each row gets exactly one `Flag`. Rows that are not used are set aside with their reason, and none is dropped.

        Args:
            layout: layout of the model's state, with the dimensions (latitude, longitude, channel) and variables.
            times: times of the filter's steps, increasing. Dates with a time zone are converted to UTC.
            window: width of the window around each time, such as "3h": a row belongs to the nearest time that is no
                further than half of it. A pair ("3h", "0h") gives the parts before and after a time. By default,
                windows fill the time between steps; with one time it is needed.
            errors: standard deviation of the error of rows without one of their own, in the unit of the layout or of
                the derived quantity: one number, or by the name of a variable ("temperature"), of a channel
                ("temperature_850"), or by a pair (type, name) for rows of one `type`. The most special one counts.
            quality: checks in the order in which they run; by default only `Duplicates()`. `Bounds`, `Thinning` and
                the others are in this folder.
            quantities: derived quantities of your own, beside wind speed and direction, relative humidity, dew point,
                geopotential height and thickness.
            instrument: name of the column, or of several, that says what shares a bias; see
                `PlacedObservations.instruments`.
            bias: biases to remove from the values, as far as they were known before each step.
            correlation: correlation of the errors of two rows with the same `group` at one step, 0 to below 1; or a
                function from the rows of a group to their matrix of correlations. Their values are then in
                ``xs["groups"]`` and not in ``xs["y"]``. Without it, errors are independent.
            sizes: least sizes of the parts of the operator, `PlacedObservations.sizes` of another table, so that
                nothing compiles anew for this one.

        Returns:
            Arrays for the scan, the operator, and all rows with their flags.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: the layout has no grid or no variables, the times are not in order, a row has an unknown
                variable, a unit that cannot be converted, or no error. The message names the file and the row.
        """
        from numpyro_diffusion_da.observation.tables.options import Options
        from numpyro_diffusion_da.observation.tables.placing import place

        options = Options(window, errors, quality, quantities, instrument, bias, correlation, sizes)
        return place(self, layout, times, options)


def where(frame: pandas.DataFrame, index: Any) -> str:
    """Text that names the source and the row of one row of a frame.

    Args:
        frame: rows with the columns `source` and `row`.
        index: index of the row.
    """
    return f"{frame.at[index, 'source']}, row {frame.at[index, 'row']}"


def read_table(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    variables: Mapping[str, str | None] | None = None,
    units: Mapping[str, str] | None = None,
    missing_codes: Iterable[float] = FILL_VALUES,
) -> ObservationTable:
    """Read a table of observations in long form, one row a value.

    Columns are `time` (ISO 8601, with a zone or in UTC), `lat`, `lon` (degrees, -180 to 180 or 0 to 360), `variable`
    and `observation`; for observations in the free atmosphere `pres` (Pa) or `level` (hPa). Optional ones are `units`,
    `error` (standard deviation, in the unit of the row), `station`, `type`, `footprint` (diameter, km), `elev` (height
    of the station, m), `layer_top` (hPa, for a thickness), `group` (rows with correlated errors) and `quality`. Further
    columns are kept as they are. Names of variables and units are checked against a layout by `ObservationTable.on`.

    Args:
        source: path of a file: CSV (.csv, .tsv, .txt; also with semicolons), Parquet (.parquet) or NetCDF-4 (.nc, with
            the one dimension `obs`); a `pandas.DataFrame`; an `xarray.Dataset`; or a list of these, joined in order.
        columns: names of columns in the source -> names above, where they differ.
        variables: names in the column `variable` -> names that the layout or a derived quantity has; None for a
            variable that is not to be used. Other names may be those of the layout, ECMWF's short names or CF standard
            names.
        units: unit of a variable whose rows have none, by the name that the table has. Rows without either are in the
            layout's unit.
        missing_codes: numbers that mean a missing value. Numbers above 1e15 and infinite ones always do.

    Returns:
        The table, with a note of everything that reading changed.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a column is missing, or a value is not what its column holds. The message names file and row.
        FileNotFoundError: there is no such file.
        ImportError: Parquet needs pyarrow, which is not installed.
    """
    import pandas

    for name, value in (("columns", columns), ("variables", variables), ("units", units)):
        require(value, (Mapping, type(None)), "read_table", name, '{"TEMP": "2m_temperature"}')
        for key, to in (value or {}).items():
            if not isinstance(key, str) or not (isinstance(to, str) or (to is None and name == "variables")):
                raise TypeError(f"read_table got {name} with {shown(key)}: {shown(to)}; give names as text.")
    if isinstance(missing_codes, (str, bytes)) or not isinstance(missing_codes, Iterable):
        raise TypeError(f"read_table got missing_codes={shown(missing_codes)}; give numbers, as in (-999.0, -9999.0).")
    codes = tuple(missing_codes)
    if wrong := [code for code in codes if not is_number(code)]:
        raise TypeError(f"read_table got missing_codes with {shown(wrong[0])}; give numbers, as in (-999.0, -9999.0).")
    sources = source if isinstance(source, (list, tuple)) else [source]
    if not sources:
        raise ValueError("read_table got an empty list; give one source or more.")
    parts, notes = [], []
    for one in sources:
        raw = read_raw(one)
        frame, said = _checked(raw, dict(columns or {}), np.array([float(code) for code in codes]))
        parts.append(frame)
        notes += said
    joined = pandas.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
    joined.index.name = "id"
    has = set(joined["variable"])
    for name, given in (("variables", variables), ("units", units)):
        notes += [f"{name} has {key!r}, but no row has this variable." for key in given or {} if key not in has]
    return ObservationTable(joined, tuple(notes), dict(variables or {}), dict(units or {}))


def _checked(raw: RawTable, columns: dict[str, str], codes: np.ndarray) -> tuple[pandas.DataFrame, list[str]]:
    """Frame with columns of known names and types, and notes about what was changed."""
    import pandas

    frame = _renamed(raw, columns)
    units = {columns.get(name, name): unit for name, unit in raw.units.items()}
    notes: list[str] = []
    found: dict[str, Any] = {"source": np.full(len(frame), raw.source, object), "row": raw.rows}
    found["time"] = _times(frame["time"], raw)
    for name in frame.columns:
        if name == "time":
            continue
        if name in NUMBERS:
            values = _numbers(frame[name], name, raw)
            values, said = _without_codes(values, name, raw, codes)
            notes += said
            if name in UNITS and name in units:
                values, said = _in_unit(values, name, units[name], raw)
                notes += said
            found[name] = values
        elif name in TEXTS:
            found[name] = _texts(frame[name], name, raw)
        elif name in RESERVED:
            found[f"{name}_given"] = frame[name]
        else:
            found[name] = frame[name]
    if "units" not in found:
        found["units"] = pandas.Series([units.get("observation")] * len(frame), dtype=object)
    _check_places(found, raw)
    if "error" in found:
        _refuse(found["error"] <= 0, found["error"], "error", "a positive standard deviation", raw)
    if "footprint" in found:
        _refuse(found["footprint"] < 0, found["footprint"], "footprint", "a diameter in km", raw)
    found["pres"] = _pressures(found, raw)
    if "layer_top" in found:
        _refuse(found["layer_top"] <= 0, found["layer_top"], "layer_top", "a pressure in hPa", raw)
        found["layer_top"] = 100.0 * found["layer_top"]  # in Pa, as `pres`
    return pandas.DataFrame(found), notes


def read_texts(path: str | os.PathLike[str], names: Sequence[str]) -> tuple[pandas.DataFrame, RawTable]:
    """Some columns of texts of a file that is no table of observations, such as a list of stations.

    Args:
        path: CSV, Parquet or NetCDF file, as `read_table` takes it.
        names: columns of `TEXTS`; a file may have some of them, and further ones.

    Returns:
        (columns that the file has, with None where a value is missing; the file as it is, for the numbers of its rows).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read. The message names the file.
    """
    import pandas

    raw = read_raw(os.fspath(path))
    found = {}
    for own in names:
        spellings = (own, *SPELLINGS.get(own, ()))
        for name in raw.frame.columns:
            if name.lower() in spellings and own not in found:
                found[own] = _texts(raw.frame[name], own, raw)
    return pandas.DataFrame(found, index=raw.frame.index), raw


def _renamed(raw: RawTable, columns: dict[str, str]) -> pandas.DataFrame:
    """Frame with the names that this module knows."""
    has = list(raw.frame.columns)
    if unknown := [name for name in columns if name not in has]:
        raise ValueError(
            f"{raw.source} has no column {unknown[0]!r}, which {spelled('read_table.columns')} names; it has "
            f"{_list(has)}."
        )
    names = {name: columns.get(name, name) for name in has}
    for own in dict.fromkeys((*NEEDED, *NUMBERS, *TEXTS)):
        if own in names.values():
            continue
        spellings = (own, *SPELLINGS.get(own, ()))
        meant = [name for name in has if name not in columns and name.lower() in spellings]
        if len(meant) > 1:
            raise ValueError(
                f"{raw.source} has {' and '.join(map(repr, meant))} for '{own}'; say which, "
                f"{spelled('read_table.columns', {meant[0]: own})}."
            )
        names |= dict.fromkeys(meant, own)
    new = list(names.values())
    if twice := sorted({name for name in new if new.count(name) > 1}):
        raise ValueError(
            f"{raw.source} has two columns for {twice[0]!r}; name one of them otherwise with "
            f"{spelled('read_table.columns')}."
        )
    if missing := [name for name in NEEDED if name not in new]:
        raise ValueError(
            f"{raw.source} has no column {missing[0]!r}; it has {_list(has)}. Name it: "
            f"{spelled('read_table.columns', {'your name': missing[0]})}."
        )
    return raw.frame.set_axis(new, axis=1)


def _list(names: Sequence[str]) -> str:
    text = ", ".join(names[:12]) or "no columns"
    return f"{text} and {len(names) - 12} more" if len(names) > 12 else text


def _refuse(wrong: np.ndarray, values: Any, name: str, expected: str, raw: RawTable) -> None:
    """Raise an error that names the first wrong row of a column."""
    if not np.any(wrong):
        return
    at = int(np.flatnonzero(wrong)[0])
    value = np.asarray(values, dtype=object)[at]
    others = f" ({int(np.sum(wrong))} rows are such)" if np.sum(wrong) > 1 else ""
    got = f"{value:g}" if isinstance(value, float) else shown(value)
    raise ValueError(f"{raw.source}, row {raw.rows[at]}: {name} is {got}; give {expected}{others}.")


def _numbers(column: pandas.Series, name: str, raw: RawTable) -> np.ndarray:
    """Column of numbers in double precision, NaN where missing."""
    import pandas

    kind = column.dtype
    if pandas.api.types.is_numeric_dtype(kind) and not pandas.api.types.is_bool_dtype(kind):
        if not pandas.api.types.is_complex_dtype(kind):
            return column.to_numpy(np.float64, na_value=np.nan)
        raise ValueError(f"{raw.source}: {name} holds complex numbers; give real ones.")
    texts = column.astype(object)
    # True and False are numbers to pandas, and an empty text is missing.
    values = pandas.to_numeric(texts, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    given = texts.notna() & (texts.map(lambda value: not isinstance(value, str) or bool(value.strip())))
    words = texts.map(lambda value: isinstance(value, str) and value.strip().lower() == "nan")
    logical = texts.map(lambda value: isinstance(value, (bool, np.bool_)))
    wrong = (np.isnan(values) & given.to_numpy(bool) & ~words.to_numpy(bool)) | logical.to_numpy(bool)
    _refuse(wrong, texts, name, "a number, or nothing where it is missing", raw)
    return values


def _without_codes(values: np.ndarray, name: str, raw: RawTable, codes: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Numbers with NaN for codes of missing values, and a note about each code."""
    notes = []
    with np.errstate(invalid="ignore"):
        large = np.abs(values) > LARGEST
        # In single precision, because files of that precision have -9999.9 as -9999.900390625.
        known = np.where(large | np.isnan(values), 0.0, values).astype(np.float32)
        coded = np.isin(known, np.clip(codes, -LARGEST, LARGEST).astype(np.float32)) & ~np.isnan(values)
    for code in np.unique(values[coded | large]):
        count = int(np.sum(values == code))
        notes.append(f"{raw.source}: {count} of {len(values)} values of {name} are {code:g}, which means missing.")
    return np.where(coded | large, np.nan, values), notes


def _in_unit(values: np.ndarray, name: str, unit: str, raw: RawTable) -> tuple[np.ndarray, list[str]]:
    """Values of a column in the unit that it has here, from the unit that its attributes state."""
    own = UNITS[name]
    if same_unit(unit, own):
        return values, []
    found = conversion(unit, own)
    if found is None:
        raise ValueError(f"{raw.source}: {name} is in '{unit}', which is no unit like '{own}'; convert the values.")
    return found.factor * values + found.offset, [f"{raw.source}: {name} was converted from {unit} to {own}."]


def _texts(column: pandas.Series, name: str, raw: RawTable) -> np.ndarray:
    """Column of texts, None where missing. Whole numbers lose a trailing .0, which a missing value beside them adds."""
    import pandas

    values = column.astype(object).to_numpy()
    missing = np.asarray(pandas.isna(column), bool)

    def text(value: Any) -> str:
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        return re.sub(r"^(\d+)\.0$", r"\1", str(value).strip())

    return np.array([None if no else (text(value) or None) for value, no in zip(values, missing, strict=True)], object)


def _times(column: pandas.Series, raw: RawTable) -> pandas.Series:
    """Column of times in UTC, NaT where missing."""
    import pandas

    expected = "a date such as 2019-03-29T12:00Z, with a time zone or in UTC"
    kind = column.dtype
    if pandas.api.types.is_numeric_dtype(kind) and len(column) and not column.isna().all():
        _refuse(column.notna().to_numpy(), column, "time", expected, raw)
    if isinstance(kind, pandas.DatetimeTZDtype):
        return column.dt.tz_convert("UTC").dt.tz_localize(None).astype("datetime64[us]")
    if pandas.api.types.is_datetime64_dtype(kind):
        return column.astype("datetime64[us]")
    values = column.astype(object)
    try:
        texts = values.map(lambda value: value.strip() if isinstance(value, str) else value)
        odd = texts.map(lambda value: isinstance(value, (int, float, complex)) and value == value)
        _refuse(odd.to_numpy(bool), values, "time", expected, raw)
        given = texts.notna() & (texts != "")
        found = pandas.to_datetime(texts.where(given, None), utc=True, format="ISO8601", errors="coerce")
    except (TypeError, OverflowError, AttributeError) as error:
        raise ValueError(
            f"{raw.source}: the times cannot be read ({str(error).splitlines()[0]}); give {expected}."
        ) from None
    _refuse((found.isna() & given).to_numpy(bool), values, "time", expected, raw)
    return found.dt.tz_localize(None).astype("datetime64[us]")


def _check_places(found: dict[str, Any], raw: RawTable) -> None:
    """Refuse latitudes and longitudes out of range."""
    _refuse(np.abs(found["lat"]) > 90.0, found["lat"], "lat", "degrees north, from -90 to 90", raw)
    wrong = (found["lon"] < -180.0) | (found["lon"] > 360.0)
    _refuse(wrong, found["lon"], "lon", "degrees east, from -180 to 360", raw)


def _pressures(found: dict[str, Any], raw: RawTable) -> np.ndarray:
    """Pressure of each row in Pa from `pres` (Pa) or `level` (hPa), NaN where neither is given."""
    count = len(found["row"])
    pressure, level = (np.asarray(found.get(name, np.full(count, np.nan))) for name in ("pres", "level"))
    _refuse(pressure <= 0, pressure, "pres", "a pressure in Pa", raw)
    advice = "a pressure in hPa, up to 1200; pres is the column of pressures in Pa"
    _refuse((level <= 0) | (level > HIGHEST_LEVEL), level, "level", advice, raw)
    both = np.abs(pressure - 100.0 * level) > 1e-3 * pressure
    if both.any():
        at = int(np.flatnonzero(both)[0])
        raise ValueError(
            f"{raw.source}, row {raw.rows[at]}: pres is {pressure[at]:g} Pa and level is {level[at]:g} hPa; give the "
            "same pressure in both, or one of them."
        )
    return np.where(np.isnan(pressure), 100.0 * level, pressure)
