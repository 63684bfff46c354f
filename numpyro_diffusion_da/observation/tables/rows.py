"""Rows of a table on a layout: what their names mean, their units, their errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import is_number, require_number
from numpyro_diffusion_da.fields.layout import Variable
from numpyro_diffusion_da.fields.plausibility import check_plausible
from numpyro_diffusion_da.fields.units import Conversion, conversion, same_unit
from numpyro_diffusion_da.observation.tables.checks import limits_of
from numpyro_diffusion_da.observation.tables.flags import Flag
from numpyro_diffusion_da.observation.tables.names import Names, Target
from numpyro_diffusion_da.observation.tables.quantities import LAYER_TOP
from numpyro_diffusion_da.observation.tables.table import where
from numpyro_diffusion_da.spelling import spelled

if TYPE_CHECKING:
    import pandas

    from numpyro_diffusion_da.observation.tables.table import ObservationTable

SMALLEST_ERROR, LARGEST_ERROR = 1e-15, 1e15
"""Range of the standard deviations of errors in the unit of the layout, whose squares single precision holds."""


def column(rows: pandas.DataFrame, name: str) -> np.ndarray:
    """Column of numbers of rows; NaN if the table has no such column.

    Args:
        rows: rows of a table.
        name: name of the column.
    """
    return rows[name].to_numpy(float) if name in rows else np.full(len(rows), np.nan)


def set_flag(rows: pandas.DataFrame, mask: np.ndarray, flag: Flag) -> None:
    """Give rows a flag that have none yet."""
    wanted = mask & (rows["flag"].to_numpy() == Flag.USED)
    rows.loc[wanted, "flag"] = str(flag)


def resolved(table: ObservationTable, names: Names) -> tuple[pandas.DataFrame, dict[str, Target], list[str]]:
    """Rows with the columns `name`, `flag` and `value`, and what each name is.

    Raises:
        ValueError: a name is unknown, or a level in a name is not the row's.
    """
    rows = table.frame.copy()
    rows["flag"] = np.full(len(rows), str(Flag.USED), object)
    missing = rows[["observation", "lat", "lon"]].isna().any(axis=1) | rows["time"].isna() | rows["variable"].isna()
    set_flag(rows, missing.to_numpy(), Flag.MISSING)
    given = rows["variable"].to_numpy(object)
    has_level = ~np.isnan(rows["pres"].to_numpy(float))
    name, key = np.full(len(rows), None, object), np.full(len(rows), -1)
    targets: dict[str, Target] = {}
    codes: dict[tuple[str, bool], int] = {}
    for i, pair in enumerate(zip(given, has_level.tolist(), strict=True)):
        if isinstance(pair[0], str):
            key[i] = codes.setdefault(pair, len(codes))
    for (own, levelled), code in codes.items():
        here = key == code
        meant = table.variables.get(own, own)
        try:
            target = None if meant is None else names.find(meant, levelled)
        except KeyError as error:
            near = f", or is it {error.args[0]!r}?" if error.args[0] else "."
            count = int(here.sum())
            raise ValueError(
                f"{table.where(rows.index[int(np.flatnonzero(here)[0])])}: the variable is '{meant}' ({count} rows), "
                f"which is not known{near} Give a name that it has here, "
                f"{spelled('read_table.variables', {own: ...})}, of {names.words()}; or leave it out with "
                f"{spelled('read_table.variables', {own: None})}."
            ) from None
        if target is None:
            set_flag(rows, here, Flag.NOT_IN_MODEL)
            continue
        name[here] = target.name
        targets.setdefault(target.name, target)
        if target.level is not None:
            _named_level(table, rows, here, own, target.level)
        if not target.has_level:
            rows.loc[here, "pres"] = np.nan
        layered = target.quantity is not None and target.quantity.has_layer()
        lacking = target.has_level & np.isnan(rows["pres"].to_numpy(float))
        if layered:
            lacking |= np.isnan(column(rows, LAYER_TOP))
        set_flag(rows, here & lacking, Flag.MISSING)
    rows["name"] = name
    return rows, targets, []


def _named_level(table: ObservationTable, rows: pandas.DataFrame, here: np.ndarray, own: str, level: float) -> None:
    """Set the pressure of rows whose name states a level."""
    pressure = rows["pres"].to_numpy(float)
    wrong = here & (np.abs(pressure - 100.0 * level) > 1.0)
    if wrong.any():
        first = rows.index[int(np.flatnonzero(wrong)[0])]
        raise ValueError(
            f"{table.where(first)}: the variable is '{own}', but its pressure is {rows.at[first, 'pres']:g} Pa; give "
            "one level."
        )
    rows.loc[here, "pres"] = 100.0 * level


def converted(table: ObservationTable, rows: pandas.DataFrame, targets: dict[str, Target]) -> list[str]:
    """Set the columns `value` and `error_given` in the units of the layout; note what was converted.

    Raises:
        ValueError: a unit cannot be converted, or values without a unit look like another unit than the layout's.
    """
    notes = []
    rows["value"], rows["error_given"] = rows["observation"].astype(float), column(rows, "error")
    rows["unit"] = np.full(len(rows), None, object)
    value, error = rows["value"].to_numpy(float, copy=True), rows["error_given"].to_numpy(float, copy=True)
    stated = rows["units"].to_numpy(object)
    own = rows["variable"].to_numpy(object)
    unit = np.array(
        [
            text if isinstance(text, str) else table.units.get(name) if isinstance(name, str) else None
            for text, name in zip(stated, own, strict=True)
        ],
        object,
    )
    for name, target in targets.items():
        here = rows["name"].to_numpy() == name
        rows.loc[here, "unit"] = target.units
        for text in sorted({u for u in unit[here] if u is not None}):
            some = here & (unit == text)
            found = Conversion(1.0, 0.0) if same_unit(text, target.units) else conversion(text, target.units)
            if found is None:
                first = rows.index[int(np.flatnonzero(some)[0])]
                raise ValueError(
                    f"{table.where(first)}: '{name}' is in '{text}' ({_rows(some)}), which does not become "
                    f"'{target.units}'; correct the unit, or the name of the variable."
                )
            value[some] = found.factor * value[some] + found.offset
            error[some] *= abs(found.factor)
            if found != (1.0, 0.0):
                verb = "was" if some.sum() == 1 else "were"
                notes.append(f"{_rows(some)} of '{name}' {verb} converted from {text} to {target.units}.")
        silent = here & (unit == None)  # noqa: E711 - an array of objects
        if silent.any():
            verbs = "has no unit and is" if silent.sum() == 1 else "have no unit and are"
            notes.append(f"{_rows(silent)} of '{name}' {verbs} taken to be in {target.units}.")
            used = silent & (rows["flag"].to_numpy() == Flag.USED)
            if used.any():
                _check_unit(table, rows, used, target)
    rows["value"], rows["error_given"] = value, error
    return notes


def _rows(some: np.ndarray) -> str:
    """Number of rows in words."""
    count = int(some.sum())
    return f"{count} row{'s' * (count != 1)}"


def _check_unit(table: ObservationTable, rows: pandas.DataFrame, some: np.ndarray, target: Target) -> None:
    """Refuse values without a unit whose median is that of another unit."""
    median = np.median(rows["observation"].to_numpy(float)[some])
    low, high = limits_of(target.name, target.units)
    try:
        check_plausible(np.full((1, 1, 1, 1), median), Variable(target.name, target.units))
        wrong = not low <= median <= high
    except ValueError:
        wrong = True
    if wrong:
        first = rows.index[int(np.flatnonzero(some)[0])]
        raise ValueError(
            f"{table.where(first)}: '{target.name}' has no unit, and the median of its {_rows(some)}, "
            f"{median:.4g}, is not in '{target.units}', as the layout has it; give a column units, or "
            f"{spelled('read_table.units', {str(rows.at[first, 'variable']): ...})}."
        )


def errors_of(rows: pandas.DataFrame, errors: float | Mapping[Any, float] | None) -> np.ndarray:
    """Standard deviation of the error of each row: its own, or the most special one of `errors`."""
    own = rows["error_given"].to_numpy(float)
    if errors is None:
        return own
    if is_number(errors):
        return np.where(np.isnan(own), float(errors), own)  # type: ignore[arg-type]
    assert isinstance(errors, Mapping)
    names = rows["name"].to_numpy(object)
    levels_ = [f"_{p / 100.0:g}" if p == p else "" for p in rows["pres"].to_numpy(float)]
    types = rows["type"].to_numpy(object) if "type" in rows else np.full(len(rows), None, object)
    found = [
        next(
            (float(errors[key]) for key in ((t, f"{n}{p}"), (t, n), f"{n}{p}", n) if key in errors),
            np.nan,
        )
        for n, p, t in zip(names, levels_, types, strict=True)
    ]
    return np.where(np.isnan(own), found, own)


def errors_in_vain(rows: pandas.DataFrame, errors: float | Mapping[Any, float] | None, names: Names) -> list[str]:
    """Sentence about errors that no row takes, because it has its own or there is no such row.

    Args:
        rows: rows with their names and errors.
        errors: errors as the user gave them.
        names: what a name means.
    """
    if not isinstance(errors, Mapping):
        return []
    known = by_known_names(errors, names)
    assert isinstance(known, Mapping)
    numbered = {key: float(i) for i, key in enumerate(known)}
    taken = errors_of(rows.assign(error_given=np.where(rows["error_given"].isna(), np.nan, -1.0)), numbered)
    here = {key for i, key in enumerate(known) if (taken == i).any()}
    unused = []
    for key in errors:
        own = key if isinstance(key, str) else key[1]
        meant = _known_names(own, names)
        if not here & {name if isinstance(key, str) else (key[0], name) for name in meant}:
            unused.append(key if isinstance(key, str) else "/".join(key))
    if not unused:
        return []
    return [f"no row takes its error from {', '.join(f'errors[{key!r}]' for key in unused)}."]


def by_known_names(errors: float | Mapping[Any, float] | None, names: Names) -> float | Mapping[Any, float] | None:
    """Errors by the names of the layout and the derived quantities: "t" is "temperature", "t850" a channel of it.

    Args:
        errors: errors as the user gave them; those by a name of the layout count before others.
        names: what a name means.

    Raises:
        ValueError: a name is not known.
    """
    if not isinstance(errors, Mapping):
        return errors
    found: dict[Any, float] = {}
    for key, error in errors.items():
        own = key if isinstance(key, str) else key[1]
        try:
            meant = _known_names(own, names)
        except KeyError as unknown:
            near = f", or is it {unknown.args[0]!r}?" if unknown.args[0] else "."
            raise ValueError(f"errors names {own!r}, which is not known{near} Give some of {names.words()}.") from None
        found |= {(name if isinstance(key, str) else (key[0], name)): error for name in meant}
    return {**found, **{key: error for key, error in errors.items() if key in found}}


def _known_names(name: str, names: Names) -> set[str]:
    """Variables, quantities or channels that a name means; none if the layout has nothing of it."""
    stem, _, level = name.rpartition("_")
    try:
        targets = [names.find(name, has_level) for has_level in (True, False)]
    except KeyError:
        if not stem or not level.replace(".", "", 1).isdigit():
            raise
        target = names.find(stem, True)
        return set() if target is None else {f"{target.name}_{float(level):g}"}
    return {
        target.name if target.level is None else f"{target.name}_{target.level:g}"
        for target in targets
        if target is not None
    }


def check_errors(errors: Any) -> None:
    """Refuse errors that are no positive numbers."""
    if errors is None:
        return
    advice = 'give a positive standard deviation, or one by name: errors={"temperature_850": 1.0}.'
    for key, value in errors.items() if isinstance(errors, Mapping) else [(None, errors)]:
        of = "errors" if key is None else f"errors[{key!r}]"
        pair = isinstance(key, tuple) and len(key) == 2 and all(isinstance(part, str) for part in key)
        if key is not None and not isinstance(key, str) and not pair:
            raise TypeError(f"ObservationTable.on got {of}; {advice}")
        require_number(value, "ObservationTable.on", of, advice, above=0.0)


def refuse_errors(rows: pandas.DataFrame) -> None:
    """Refuse rows that are used and have no error, or one whose square single precision cannot hold.

    Raises:
        ValueError: a row has no such error. The message names the first one.
    """
    compared = rows["flag"].isin([Flag.USED, Flag.WITHHELD]).to_numpy()
    error = rows["error_used"].to_numpy(float)
    for wrong in (np.isnan(error), (error < SMALLEST_ERROR) | (error > LARGEST_ERROR)):
        if not (wrong & compared).any():
            continue
        first = rows.index[int(np.flatnonzero(wrong & compared)[0])]
        name, unit, has = rows.at[first, "name"], rows.at[first, "unit"], rows.at[first, "error_used"]
        count = int((wrong & compared).sum())
        others = "" if count == 1 else f" ({count} rows)"
        advice = spelled("errors", {name: ...})
        if np.isnan(has):
            raise ValueError(
                f"{where(rows, first)}: '{name}' has no error{others}; give a column error, or {advice} in {unit}."
            )
        raise ValueError(
            f"{where(rows, first)}: the error of '{name}' is {has:g} {unit}{others}; give a standard deviation from "
            f"{SMALLEST_ERROR:g} to {LARGEST_ERROR:g}, in the column error or as {advice}."
        )
