"""Latitude-longitude grids: checks of their axes, and interpolation to places on the sphere.

This module alone decides which conventions a grid may have. Latitudes may go north or south. Longitudes may begin
anywhere, may be given from 0 to 360 or from -180 to 180, and may repeat the first meridian at the end. A grid may cover
a region only. Values are never extrapolated beyond a region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from numpyro_diffusion_da.fields.interpolation import SAME_POINT, check_axis
from numpyro_diffusion_da.fields.layout import Layout


class Corners(NamedTuple):
    """Grid points around places, and the weights of linear interpolation between them.

    Attributes:
        rows: row of each grid point, shape (place, 4).
        columns: column of each grid point, shape (place, 4).
        weights: weight of each grid point, shape (place, 4). The weights of a place sum to 1.
    """

    rows: Int[np.ndarray, "place 4"]
    columns: Int[np.ndarray, "place 4"]
    weights: Float[np.ndarray, "place 4"]


class CornersOverPoles(NamedTuple):
    """Grid points around places, also between the last row and a pole, where two of the points lie beyond the pole.

    Attributes:
        rows: row of each grid point, shape (place, 4).
        columns: column of each grid point, shape (place, 4).
        weights: weight of each grid point for a scalar, shape (place, 4). The weights of a place sum to 1.
        beyond: whether a grid point lies beyond the pole, shape (place, 4). East and north point the other way there,
            so that the components of a vector have the opposite sign.
    """

    rows: Int[np.ndarray, "place 4"]
    columns: Int[np.ndarray, "place 4"]
    weights: Float[np.ndarray, "place 4"]
    beyond: Bool[np.ndarray, "place 4"]


class Grid:
    """Latitude-longitude grid of a layout, with its axes checked.

    Args:
        latitude: latitudes in degrees north, in either order, shape (rows,).
        longitude: longitudes in degrees east, shape (columns,).

    Attributes:
        latitude: latitudes in double precision.
        longitude: longitudes in double precision.
        columns: number of different meridians, one less than the longitudes if the last repeats the first.
        goes_around: whether the longitudes cover the circle.

    Raises:
        ValueError: an axis is not a list of finite numbers, repeats a value, is not in order, or is out of range.
    """

    def __init__(self, latitude: Any, longitude: Any) -> None:
        self.latitude = check_axis(latitude, "latitude")
        self.longitude = check_axis(longitude, "longitude")
        total = abs(float(np.diff(np.unwrap(self.longitude, period=360.0)).sum()))
        self.columns = self.longitude.size - (abs(total - 360.0) < SAME_POINT)
        east = np.mod(self.longitude[: self.columns], 360.0)
        circle = np.sort(east)
        gaps = np.diff(circle, append=circle[:1] + 360.0)
        # The gap from the last meridian of a region back to its first is wider than the others.
        widest = int(np.argmax(gaps))
        self.goes_around = self.columns > 1 and bool(gaps[widest] <= 1.5 * np.median(np.delete(gaps, widest)))
        self._west = float(circle[0 if self.goes_around else (widest + 1) % self.columns])
        self._width = 360.0 if self.goes_around else 360.0 - float(gaps[widest])
        # Meridians from west to east as distances from the western end, and their columns.
        apart = np.mod(east - self._west, 360.0)
        self._column = np.argsort(apart)
        self._apart = apart[self._column]
        self._row = np.argsort(self.latitude)
        self._north = self.latitude[self._row]
        self._limits = [float(self._north[0]), float(self._north[-1])]
        if self.goes_around:
            self._column = np.append(self._column, self._column[0])
            self._apart = np.append(self._apart, self._apart[0] + 360.0)
            # The caps between the last rows of a global grid and the poles belong to it.
            spacing = float(np.diff(self._north).max()) if self._north.size > 1 else 0.0
            ends = zip(self._limits, (-90.0, 90.0), strict=True)
            self._limits = [end if abs(end - last) <= spacing + SAME_POINT else last for last, end in ends]

    @classmethod
    def of(cls, layout: Layout) -> Grid:
        """Grid of a layout with the dimensions (latitude, longitude, channel).

        Raises:
            ValueError: the layout has other dimensions, has no coordinates of latitude and longitude, or they are
                wrong.
        """
        coords = layout.coords()
        if layout.dims[:-1] != ("latitude", "longitude") or not {"latitude", "longitude"} <= set(coords):
            raise ValueError(
                f"the layout has the dimensions {layout.dims} with coordinates for {sorted(coords)}; "
                "expected (latitude, longitude, channel), with coordinates of latitude and longitude in degrees."
            )
        return cls(coords["latitude"], coords["longitude"])

    def draw(self, rng: np.random.Generator, count: int) -> Float[np.ndarray, "place 2"]:
        """Draw places uniformly over the area that the grid covers.

        Args:
            rng: random generator.
            count: number of places.

        Returns:
            Latitude and longitude of each place, in degrees.
        """
        south, north = np.sin(np.deg2rad(self._limits))
        latitude = np.rad2deg(np.arcsin(rng.uniform(south, north, count)))
        return np.stack([latitude, self._west + rng.uniform(0.0, self._width, count)], axis=-1)

    def corners(
        self, places: Float[np.ndarray, "place 2"], names: Sequence[str] | None = None, owner: str = "the grid"
    ) -> Corners:
        """Find the grid points around places, for linear interpolation in latitude and longitude.

        Between the last row of a global grid and the pole, places have the values of that row.

        Args:
            places: latitude and longitude of each place, in degrees; longitudes in any convention.
            names: name of each place for messages; None for their numbers.
            owner: what got the places, for messages.

        Raises:
            ValueError: a place lies outside the grid. The message names the first such place.
        """
        latitude, longitude = np.asarray(places, float).T
        self._refuse(~self.covers(places), latitude, longitude, names, owner)
        south, up = _between(self._north, np.clip(latitude, self._north[0], self._north[-1]))
        west, along = _between(self._apart, np.maximum(self._eastward(longitude), 0.0))
        # On an axis of one point, the next point is the same one, with the weight 0.
        north, east = np.minimum(south + 1, self._north.size - 1), np.minimum(west + 1, self._apart.size - 1)
        parts = [
            (self._row[row], self._column[column], share * part)
            for row, share in ((south, 1.0 - up), (north, up))
            for column, part in ((west, 1.0 - along), (east, along))
        ]
        return Corners(*(np.stack(values, axis=-1) for values in zip(*parts, strict=True)))

    def covers(self, places: Float[np.ndarray, "place 2"]) -> Bool[np.ndarray, " place"]:
        """Whether each place lies on the grid: in its region, or between the last row of a global grid and a pole.

        Args:
            places: latitude and longitude of each place, in degrees; longitudes in any convention.
        """
        latitude, longitude = np.asarray(places, float).T
        inside = (latitude >= self._limits[0] - SAME_POINT) & (latitude <= self._limits[1] + SAME_POINT)
        return inside & (self._eastward(longitude) <= self._apart[-1] + SAME_POINT)

    def corners_over_poles(self, places: Float[np.ndarray, "place 2"]) -> CornersOverPoles:
        """Find the grid points around places, for linear interpolation that goes on over the poles.

        Between the last row of a global grid and the pole, values are interpolated along the meridian, to the same row
        on the other side of the pole.

        Args:
            places: latitude and longitude of each place, in degrees; longitudes in any convention.

        Raises:
            ValueError: a place lies outside the grid.
        """
        latitude, longitude = np.asarray(places, float).T
        near = self.corners(places)
        last = np.where(latitude > 0, self._north[-1], self._north[0])
        gap = 90.0 - np.abs(last)
        past = self.goes_around & (np.abs(latitude) > np.abs(last)) & (gap > SAME_POINT)
        if not past.any():
            return CornersOverPoles(*near, np.zeros(near.rows.shape, bool))
        far = self.corners(np.stack([last, longitude + 180.0], axis=-1))
        # The share of the row beyond the pole: 0 on the near row, 1/2 at the pole.
        share = np.where(past, 0.5 - 0.5 * (90.0 - np.abs(latitude)) / np.where(past, gap, 1.0), 0.0)
        merged = []
        for here, there in zip(near, far, strict=True):
            # In the last row, two of the four points have no weight. Two points beyond the pole take their place.
            ends = [_of_last_row(corners, here if corners is near else there) for corners in (near, far)]
            merged.append(np.where(past[:, None], np.concatenate(ends, axis=1), here))
        rows, columns, weights = merged
        shares = np.stack([1.0 - share, 1.0 - share, share, share], axis=-1)
        weights = np.where(past[:, None], weights * shares, weights)
        beyond = past[:, None] & np.array([False, False, True, True])
        return CornersOverPoles(rows, columns, weights, beyond)

    def _eastward(self, longitude: np.ndarray) -> np.ndarray:
        """Distance of longitudes from the western end of the grid, in degrees."""
        apart = np.mod(longitude - self._west, 360.0)
        # A rounding error west of the end of a region is on it.
        return np.where(apart > 360.0 - SAME_POINT, apart - 360.0, apart)

    def _refuse(
        self, bad: np.ndarray, latitude: np.ndarray, longitude: np.ndarray, names: Sequence[str] | None, owner: str
    ) -> None:
        if not bad.any():
            return
        first = int(np.flatnonzero(bad)[0])
        name = f"number {first}" if names is None else f"'{names[first]}'"
        raise ValueError(
            f"{owner} has the place {name} at latitude {latitude[first]:g}, longitude {longitude[first]:g} outside the "
            f"grid ({int(bad.sum())} of {bad.size} places), which has latitudes {self.latitude.min():g} to "
            f"{self.latitude.max():g} and longitudes {self._west:g} to {self._west + self._width:g}; leave out places "
            "beyond it, because nothing is extrapolated."
        )


def _of_last_row(corners: Corners, values: np.ndarray) -> np.ndarray:
    """Values of the two points, west and east, of the row on which places of the last row lie, shape (place, 2)."""
    upper = corners.weights[:, 2:].sum(axis=1) > 0.5
    return np.where(upper[:, None], values[:, 2:], values[:, :2])


def _between(axis: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(position of the point of an ascending axis below each value, weight of the next point)."""
    if axis.size == 1:
        return np.zeros(values.shape, int), np.zeros(values.shape)
    below = np.clip(np.searchsorted(axis, values, side="right") - 1, 0, axis.size - 2)
    weight = (values - axis[below]) / (axis[below + 1] - axis[below])
    near = SAME_POINT / (axis[below + 1] - axis[below])
    # A value on a grid point takes nothing from the next one.
    return below, np.where(weight <= near, 0.0, np.where(weight >= 1.0 - near, 1.0, weight))


def check_places(places: Any, owner: str) -> tuple[Float[np.ndarray, "place 2"], tuple[str, ...] | None]:
    """Check places given as pairs (latitude, longitude) in degrees.

    Args:
        places: list of pairs, array of shape (place, 2), or mapping from the name of a place to its pair.
        owner: what got the places, for messages.

    Returns:
        (places as an array, their names or None).

    Raises:
        ValueError: the places are not pairs of finite numbers, or a pair is out of range. The message names the first.
    """
    rule = "give (latitude, longitude) in degrees for each place, latitudes from -90 to 90, longitudes from -180 to 360"
    names = tuple(map(str, places)) if isinstance(places, Mapping) else None
    try:
        found = np.asarray(list(places.values()) if isinstance(places, Mapping) else places, float)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{owner} got places that are not pairs of numbers; {rule}.") from None
    if found.ndim != 2 or found.shape[1] != 2 or len(found) == 0:
        raise ValueError(f"{owner} got places of shape {found.shape}; {rule}, one place or more.")
    low, high = np.array([-90.0, -180.0]), np.array([90.0, 360.0])
    wrong = ~((found >= low) & (found <= high)).all(axis=1)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        name = f"number {at}" if names is None else f"'{names[at]}'"
        latitude, longitude = found[at].tolist()
        raise ValueError(f"{owner} got the place {name} at ({latitude:g}, {longitude:g}); {rule}.")
    return found, names
