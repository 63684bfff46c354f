"""Rows whose errors are correlated: the column `group` of a table, as events of a multivariate normal distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import is_number, require_number, shown
from numpyro_diffusion_da.observation.tables.checks import on_sphere
from numpyro_diffusion_da.observation.tables.flags import Flag
from numpyro_diffusion_da.observation.tables.geometry import distances
from numpyro_diffusion_da.observation.tables.table import where
from numpyro_diffusion_da.spelling import spelled

if TYPE_CHECKING:
    import pandas

SMALLEST_EIGENVALUE = 1e-5
"""Smallest eigenvalue of a correlation matrix, over its number of rows, for a Cholesky factor in single precision.

The log-density is then right to 0.2 %. With a tenth of it and 50 rows or more, the factor is NaN.
"""


def check_correlation(correlation: Any) -> None:
    """Refuse a correlation that is neither a number from 0 to below 1 nor a function.

    Raises:
        TypeError: it is of another kind.
        ValueError: the number is out of range.
    """
    if correlation is None or callable(correlation):
        return
    if not is_number(correlation):
        raise TypeError(
            f"ObservationTable.on got correlation={shown(correlation)}; give the correlation of two errors of a group, "
            "from 0 to below 1, or a function from the rows of a group to their matrix of correlations."
        )
    require_number(
        correlation, "ObservationTable.on", "correlation", "give a number from 0 to below 1.", least=0.0, below=1.0
    )


def grouped(rows: pandas.DataFrame) -> np.ndarray:
    """Rows that are used and belong to a group of their step, as a mask, shape (row,).

    Args:
        rows: rows with their flags.
    """
    if "group" not in rows:
        return np.zeros(len(rows), bool)
    return (rows["group"].notna() & (rows["flag"] == Flag.USED)).to_numpy()


def groups_of(
    rows: pandas.DataFrame,
    correlation: float | Callable[[pandas.DataFrame], Any],
    xs: dict[str, Any],
    padded: Callable[[int], int],
) -> dict[str, np.ndarray]:
    """Arrays of the groups of each step, and removal of their values from ``xs["y"]``.

    Args:
        rows: rows with their flags.
        correlation: correlation of two errors of a group, or a function from the rows of a group to their matrix.
        xs: arrays of the steps; the values of grouped rows become NaN in `y`.
        padded: function from a number to a size with padding.

    Returns:
        `rows` (positions along ``xs["y"]``, 0 where padded), `y` (NaN where padded), `covariance`, of the shapes
        (time, group, row), the last with a further axis; and `place`, the mean place of each group, (time, group, 2).

    Raises:
        ValueError: the rows have no column `group`, or a matrix of correlations is none. The message names the file and
            the row.
    """
    if "group" not in rows:
        raise ValueError(
            "a correlation of errors was given, but the table has no column group; leave the correlation out, or say "
            f"which column it is: {spelled('read_table.columns', {'your name': 'group'})}."
        )
    some = rows[grouped(rows)]
    found = [(int(key[0]), part) for key, part in some.groupby(["cycle", "group"], sort=True)]
    steps = len(xs["y"])
    counts = np.bincount([cycle for cycle, _ in found], minlength=steps) if found else np.zeros(steps, int)
    # At least one group, so that a step without any has the same arrays.
    size = max(1, int(counts.max(initial=0)))
    size = size if size < 4 else padded(size)
    width = padded(max((len(part) for _, part in found), default=1))
    positions = np.zeros((steps, size, width), np.int32)
    y = np.full((steps, size, width), np.nan, np.float32)
    covariance = np.broadcast_to(np.eye(width, dtype=np.float32), (steps, size, width, width)).copy()
    place = np.full((steps, size, 2), np.nan, np.float32)
    at = np.zeros(steps, int)
    slot = {
        (t, int(row)): int(m)
        for t, ids in enumerate(xs["id"])
        for m, row in zip(np.flatnonzero(ids >= 0), ids[ids >= 0], strict=True)
    }
    for cycle, part in found:
        g, n = at[cycle], len(part)
        at[cycle] += 1
        slots = [slot[cycle, int(row)] for row in part.index]
        error = part["error_used"].to_numpy(float)
        positions[cycle, g, :n], y[cycle, g, :n] = slots, part["value"].to_numpy(float)
        covariance[cycle, g, :n, :n] = error[:, None] * _correlations(part, correlation) * error
        place[cycle, g] = _middle(part)
        xs["y"][cycle, slots] = np.nan
    return {"rows": positions, "y": y, "covariance": covariance, "place": place}


def _middle(part: pandas.DataFrame) -> tuple[float, float]:
    """Mean latitude and longitude of the rows of a group, degrees."""
    east = np.deg2rad(part["lon"].to_numpy(float))
    return float(part["lat"].mean()), float(np.rad2deg(np.arctan2(np.sin(east).mean(), np.cos(east).mean())) % 360.0)


def extent(part: pandas.DataFrame) -> float:
    """Largest distance of the rows of a group from its place, km.

    Args:
        part: rows of the group.
    """
    import pandas

    middle = pandas.DataFrame([_middle(part)], columns=["lat", "lon"])
    places, place = (np.stack(on_sphere(rows), axis=-1) for rows in (part, middle))
    return float(distances(places, place[0]).max())


def _correlations(part: pandas.DataFrame, correlation: Any) -> np.ndarray:
    """Matrix of correlations of the errors of one group."""
    n, first = len(part), part.index[0]
    what = f"{where(part, first)}: the group '{part.at[first, 'group']}' of {n} rows"
    if is_number(correlation):
        matrix, least = np.where(np.eye(n, dtype=bool), 1.0, float(correlation)), 1.0 - float(correlation) * (n > 1)
    else:
        matrix = np.asarray(correlation(part), float)
        if matrix.shape != (n, n):
            raise ValueError(f"{what} got correlations of shape {matrix.shape}; give a matrix of shape {(n, n)}.")
        if not (np.allclose(matrix, matrix.T, atol=1e-6) and np.allclose(np.diag(matrix), 1.0, atol=1e-6)):
            raise ValueError(
                f"{what} got a matrix that is not one of correlations; give a symmetric one with ones on its diagonal."
            )
        least = float(np.linalg.eigvalsh(matrix).min())
    needed = SMALLEST_EIGENVALUE * n
    if not least > needed:
        raise ValueError(
            f"{what} has correlations whose smallest eigenvalue is {least:.2g}, but single precision needs more than "
            f"{needed:.2g} for so many rows; give weaker correlations, or smaller groups."
        )
    return matrix
