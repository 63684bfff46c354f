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
        left = bytes_of(np.ascontiguousarray(rows, self.dtype))
        opened = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            offset = start * self.row_bytes
            while left:
                written = os.pwrite(opened, left, offset)
                left, offset = left[written:], offset + written
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
                offset = int(wanted[first]) * self.row_bytes
                while part:
                    count = os.preadv(opened, [part], offset)
                    if count == 0:
                        raise ValueError(f"{os.fspath(self.path)!r} is shorter than it should be.")
                    part, offset = part[count:], offset + count
        finally:
            os.close(opened)
        return found if np.array_equal(place, np.arange(len(wanted))) else found[place]

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

    def whole(self) -> np.ndarray:
        """Read all rows into memory."""
        n = self.file.n if self.indices is None else len(self.indices)
        return self.read(np.arange(n))
