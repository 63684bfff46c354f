"""Tables and JSON files of the benchmarks; the scripts in this folder import it as their neighbor.

The rows of a table are dictionaries from column to value. The standard error of a column has the key "{column} SE".
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.commands import output_folder


def mean_and_error(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """Part of a row: the mean of `values` as `name`, and its standard error as "{name} SE".

    The mean is None without values, the standard error with fewer than two values. NaN counts as no value at all.
    """
    values = np.asarray(values, float)
    known = len(values) > 0 and not np.isnan(values).any()
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if known and len(values) > 1 else None
    return {name: float(values.mean()) if known else None, f"{name} SE": error}


def print_table(
    console: Console,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] | None = None,
    *,
    default: str = ".3f",
    group: str | None = None,
    without_error: Collection[str] = (),
) -> None:
    """Print rows as a table, with standard errors where the rows have them.

    Args:
        console: console to print to.
        title: title of the table.
        rows: dictionaries from column to value. None is printed as "-".
        columns: format of the numbers of each column to show, "" for the default; None to show all columns.
        default: default format of numbers that are not integers.
        group: column whose value is left blank where it repeats that of the row above.
        without_error: columns to show without standard errors.
    """
    if columns is None:
        columns = {name: "" for name in rows[0] if not name.endswith(" SE")}
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for name in columns:
        text = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(name, justify="left" if text else "right", no_wrap=True)
    above: Mapping[str, Any] = {}
    for row in rows:
        cells = {}
        for name, form in columns.items():
            error = None if name in without_error else row.get(f"{name} SE")
            cells[name] = _cell(row.get(name), error, form, default)
        if group is not None and above.get(group) == row[group]:
            cells[group] = ""
        table.add_row(*cells.values())
        above = row
    # A console narrower than the table would cut off its columns.
    width = console.width
    console.width = max(width, Measurement.get(console, console.options.update(max_width=1000), table).maximum)
    console.print(table)
    console.width = width


def _cell(value: Any, error: float | None, form: str, default: str) -> str:
    """Format a value, with its standard error if there is one."""
    if value is None:
        return "-"
    if isinstance(value, str) or (isinstance(value, int) and not form):
        return str(value)
    form = form or default
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def json_file(path: Path | None) -> Path | None:
    """Check, before anything is computed, that a file can be written; the callback of an option."""
    if path is not None:
        if path.is_dir():
            raise typer.BadParameter(f"'{path}' is a folder; give a file, such as {path / 'scores.json'}.")
        output_folder(path.parent)
    return path


def write_json(path: Path | None, settings: Mapping[str, Any], **contents: Any) -> None:
    """Write settings, results and the version of the package to a JSON file; do nothing if `path` is None."""
    if path is not None:
        found = {"version": ndda.__version__, "settings": settings, **contents}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
