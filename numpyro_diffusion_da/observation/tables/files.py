"""Reading of tables as they are: CSV, Parquet, NetCDF, pandas and xarray, with the number of each row.

Nothing is converted here apart from types of storage. Every function returns the columns as the file has them and the
numbers of the rows as a person sees them: in a CSV file the header is row 1 if nothing stands above it.
"""

from __future__ import annotations

import csv
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from numpyro_diffusion_da.arguments import shown

if TYPE_CHECKING:
    import pandas
    import xarray

NETCDF = (".nc", ".nc4", ".netcdf", ".h5")
PARQUET = (".parquet", ".pq")
CSV = (".csv", ".tsv", ".txt")
DIMENSION = "obs"
"""The one dimension of a table in NetCDF."""


class RawTable(NamedTuple):
    """Columns of one source, as it has them.

    Attributes:
        frame: the columns, with an index from 0.
        rows: number of each row, as a person sees it in the source.
        source: name of the source, for messages.
        units: unit of a column by its name, where the source states one.
    """

    frame: pandas.DataFrame
    rows: np.ndarray
    source: str
    units: dict[str, str]


def read_raw(source: Any) -> RawTable:
    """Read a table from a file, or take it from pandas or xarray.

    Args:
        source: path of a CSV, Parquet or NetCDF file, a `pandas.DataFrame`, or an `xarray.Dataset`.

    Raises:
        TypeError: the source is of another kind.
        ValueError: the file is not a table. The message names the file and, where there is one, the row.
        FileNotFoundError: there is no such file.
        ImportError: Parquet needs pyarrow, which is not installed.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source))
    kind = f"{type(source).__module__.split('.')[0]}.{type(source).__name__}"
    if kind == "pandas.DataFrame":
        return _from_pandas(source)
    if kind == "xarray.Dataset":
        return _from_xarray(source, "the dataset")
    raise TypeError(
        f"read_table got {shown(source)}; give the path of a CSV, Parquet or NetCDF file, a pandas.DataFrame or an "
        "xarray.Dataset."
    )


def _read_file(path: Path) -> RawTable:
    suffix = path.suffix.lower()
    if suffix not in (*CSV, *PARQUET, *NETCDF):
        raise ValueError(
            f"'{path}' is no table; give a file whose name ends in {', '.join((*CSV, *PARQUET, *NETCDF))}."
        )
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"'{path}' {what}; give the path of a table of observations.")
    if suffix in CSV:
        return _read_csv(path)
    return _read_parquet(path) if suffix in PARQUET else _read_netcdf(path)


def _read_csv(path: Path) -> RawTable:
    import pandas

    above = 0
    header = ""
    try:
        with path.open(encoding="utf-8-sig", newline=None) as lines:
            for line in lines:
                if line.strip() and not line.startswith("#"):
                    header = line.rstrip("\n")
                    break
                above += 1
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not text in UTF-8 ({error.reason}); save the table as CSV in UTF-8."
        ) from None
    if not header:
        raise ValueError(f"{path.name} is empty; give a table with a header.")
    separator = max(",;\t", key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=separator))]
    _check_names(names, f"{path.name}, row {above + 1}")
    try:
        with warnings.catch_warnings():
            # Without this, pandas drops the last fields of all rows if the first row has too many.
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            frame = pandas.read_csv(
                path,
                sep=separator,
                names=names,
                skiprows=above + 1,
                header=None,
                index_col=False,
                skip_blank_lines=False,
                dtype=str,
                encoding="utf-8-sig",
                skipinitialspace=True,
                on_bad_lines="error",
            )
    except pandas.errors.ParserWarning:
        raise ValueError(
            f"{path.name}, row {above + 2}: more fields than the header, which has {len(names)}; quote a field that "
            "holds the separator, or take one out."
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        if isinstance(error, pandas.errors.EmptyDataError):
            frame = pandas.DataFrame({name: [] for name in names}, dtype=str)
        else:
            found = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
            if found:
                raise ValueError(
                    f"{path.name}, row {found[2]}: {found[3]} fields, but the header has {len(names)}; quote a field "
                    "that holds the separator, or take one out."
                ) from None
            first = str(error).strip().split("\n")[0].rstrip(".")
            raise ValueError(f"{path.name} cannot be read as CSV ({first}); save the table as CSV in UTF-8.") from None
    rows = above + 2 + np.arange(len(frame))
    blank = frame.isna().all(axis=1).to_numpy()
    return RawTable(frame[~blank].reset_index(drop=True), rows[~blank], path.name, {})


def _check_names(names: list[str], where: str) -> None:
    """Refuse a column without a name, and two of the same name."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        what = f"the column {twice[0]!r} twice" if twice[0] else "columns without a name"
        raise ValueError(f"{where}: the header has {what}; give each column a name of its own.")


def _read_parquet(path: Path) -> RawTable:
    import pandas

    try:
        import pyarrow
    except ImportError:
        raise ImportError(f"{path.name} is a Parquet file, which needs pyarrow; pip install pyarrow.") from None
    try:
        frame = pandas.read_parquet(path, engine="pyarrow")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        first = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"{path.name} cannot be read as Parquet ({first}); write it again.") from None
    return _from_pandas(frame, path.name)


def _read_netcdf(path: Path) -> RawTable:
    import xarray

    try:
        with xarray.open_dataset(path, engine="h5netcdf") as dataset:
            loaded = dataset.load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"{path.name} cannot be read as NetCDF-4 ({first}); write it again.") from None
    return _from_xarray(loaded, path.name)


def _from_pandas(frame: pandas.DataFrame, source: str = "the table") -> RawTable:
    """Table from pandas; its rows are numbered by an index of whole numbers, and from 0 if it has another one."""
    import pandas

    if isinstance(frame.columns, pandas.MultiIndex):
        raise ValueError(f"{source} has columns of {frame.columns.nlevels} levels; give one name for each column.")
    if not isinstance(frame.index, pandas.RangeIndex) and frame.index.names != [None]:
        frame = frame.reset_index()
    names = [str(name) for name in frame.columns]
    _check_names(names, source)
    usual = pandas.api.types.is_integer_dtype(frame.index.dtype) and frame.index.is_unique
    rows = frame.index.to_numpy(np.int64) if usual else np.arange(len(frame))
    return RawTable(frame.set_axis(names, axis=1).reset_index(drop=True), rows, source, {})


def _from_xarray(dataset: xarray.Dataset, source: str) -> RawTable:
    """Table from variables and coordinates along the dimension `obs`, which number the rows from 0."""
    import pandas

    if set(dataset.dims) != {DIMENSION}:
        raise ValueError(
            f"{source} has the dimensions {tuple(map(str, dataset.dims))}; give a table with the one dimension "
            f"'{DIMENSION}', one row for each value."
        )
    columns: dict[str, Any] = {}
    units: dict[str, str] = {}
    for name, variable in dataset.variables.items():
        if not variable.dims:
            columns[str(name)] = _decoded(np.repeat(np.asarray(variable.values)[None], dataset.sizes[DIMENSION]))
        elif name != DIMENSION:
            columns[str(name)] = _decoded(variable.values)
        if isinstance(variable.attrs.get("units"), str):
            units[str(name)] = variable.attrs["units"]
    return RawTable(pandas.DataFrame(columns), np.arange(dataset.sizes[DIMENSION]), source, units)


def _decoded(values: np.ndarray) -> np.ndarray:
    """Values, with texts in bytes decoded."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "replace")
    if values.dtype.kind == "O" and any(isinstance(value, bytes) for value in values):
        return np.array([v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values], dtype=object)
    return values
