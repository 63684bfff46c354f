"""Files that hold an array row by row, of which some rows are read or written at a time."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np

READ_AT_A_TIME = 2**24
"""Number of bytes that are read at a time where a whole file is read: 16 MB."""


def bytes_of(values: np.ndarray) -> memoryview:
    """Bytes of an array, without a copy if it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


@dataclasses.dataclass(frozen=True)
class RowFile:
    """File with n rows of one shape and dtype, one after the other, without a header.

    Rows are read and written by `pread` and `pwrite`. A memory map would do the same, but the pages that it has touched
    count as memory of the process.

    Attributes:
        path: the file.
        n: number of rows.
        shape: shape of a row.
        dtype: dtype of a row.
    """

    path: pathlib.Path
    n: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Number of bytes of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def write(self, start: int, rows: np.ndarray) -> None:
        """Write consecutive rows.

        Args:
            start: index of the first row.
            rows: the rows.

        Raises:
            OSError: they could not be written.
        """
        opened = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            _write_at(opened, bytes_of(np.ascontiguousarray(rows, self.dtype)), start * self.row_bytes)
        finally:
            os.close(opened)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Read rows by their indices, each row once and neighbors together.

        Args:
            indices: indices of the rows, in any order and with repetitions.

        Raises:
            ValueError: the file ends before a row. The message names the file.
        """
        wanted, place = np.unique(indices, return_inverse=True)
        found = np.empty((len(wanted), *self.shape), self.dtype)
        into = bytes_of(found)
        opened = os.open(self.path, os.O_RDONLY)
        try:
            for first, stop in _runs(wanted):
                part = into[first * self.row_bytes : stop * self.row_bytes]
                self._read_at(opened, part, int(wanted[first]) * self.row_bytes)
        finally:
            os.close(opened)
        return found if np.array_equal(place, np.arange(len(wanted))) else found[place]

    def write_columns(self, first: int, columns: np.ndarray) -> None:
        """Write consecutive columns of all rows.

        Args:
            first: index of the first column, on the first axis of a row.
            columns: the columns, shape (n, columns, ...).

        Raises:
            OSError: they could not be written.
        """
        values = np.ascontiguousarray(columns, self.dtype)
        offset = first * self._column_bytes
        opened = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            for row in range(self.n):
                _write_at(opened, bytes_of(values[row]), row * self.row_bytes + offset)
        finally:
            os.close(opened)

    def read_columns(self, first: int, stop: int, indices: np.ndarray | None = None) -> np.ndarray:
        """Read consecutive columns of rows, shape (rows, columns, ...).

        Args:
            first: index of the first column, on the first axis of a row.
            stop: index after the last column.
            indices: indices of the rows; None for all rows.

        Raises:
            ValueError: the file ends before a row. The message names the file.
        """
        rows = np.arange(self.n) if indices is None else indices
        wanted, place = np.unique(rows, return_inverse=True)
        found = np.empty((len(wanted), stop - first, *self.shape[1:]), self.dtype)
        opened = os.open(self.path, os.O_RDONLY)
        try:
            for i, row in enumerate(wanted.tolist()):
                self._read_at(opened, bytes_of(found[i]), row * self.row_bytes + first * self._column_bytes)
        finally:
            os.close(opened)
        return found if np.array_equal(place, np.arange(len(wanted))) else found[place]

    @property
    def _column_bytes(self) -> int:
        """Number of bytes of a column of one row."""
        return self.row_bytes // self.shape[0]

    def _read_at(self, opened: int, into: memoryview, offset: int) -> None:
        """Fill a buffer from a place of the opened file."""
        while into:
            count = os.preadv(opened, [into], offset)
            if count == 0:
                raise ValueError(f"{os.fspath(self.path)!r} is shorter than it should be.")
            into, offset = into[count:], offset + count

    def checksum(self) -> int:
        """CRC-32 of the file."""
        found = 0
        with open(self.path, "rb") as file:
            while part := file.read(READ_AT_A_TIME):
                found = zlib.crc32(part, found)
        return found

    def sync(self) -> None:
        """Wait until the file is on the disk."""
        opened = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _write_at(opened: int, values: memoryview, offset: int) -> None:
    """Write bytes at a place of the opened file."""
    while values:
        written = os.pwrite(opened, values, offset)
        values, offset = values[written:], offset + written


def _runs(indices: np.ndarray) -> Iterator[tuple[int, int]]:
    """Places (first, stop) of runs of consecutive numbers in increasing ones."""
    if len(indices):
        ends = np.flatnonzero(np.diff(indices) != 1) + 1
        yield from zip([0, *ends.tolist()], [*ends.tolist(), len(indices)], strict=True)


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """Array of n rows that is in a file: row i is row `indices[i]` of the file.

    Attributes:
        file: the file.
        indices: index of each row in the file; None for the rows as they are.
        checksum: CRC-32 of the file.
    """

    file: RowFile
    indices: np.ndarray | None = None
    checksum: int = 0

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Read some of the rows."""
        return self.file.read(indices if self.indices is None else self.indices[indices])

    def read_columns(self, first: int, stop: int) -> np.ndarray:
        """Read consecutive columns of all rows; see `RowFile.read_columns`."""
        return self.file.read_columns(first, stop, self.indices)

    def whole(self) -> np.ndarray:
        """Read all rows into memory."""
        n = self.file.n if self.indices is None else len(self.indices)
        return self.read(np.arange(n))
