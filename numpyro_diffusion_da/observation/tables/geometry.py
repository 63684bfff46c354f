r"""Weights of grid points for places, levels and footprints of observations.

Between grid points, fields are linear in latitude and longitude. Between the last row of a global grid and a pole they
are linear along the meridian, on to the other side of the pole, where the components of a vector change their sign.
Between levels, fields are linear in the logarithm of pressure. Over a footprint they are averaged by area.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from numpyro_diffusion_da.fields.grids import Grid
from numpyro_diffusion_da.fields.layout import Layout, Variable

EARTH_RADIUS = 6371.0
"""Radius of the Earth in km, by which footprints and distances become angles."""

VECTORS = frozenset(f"{prefix}{c}_component_of_wind" for prefix in ("", "10m_", "100m_") for c in "uv")
"""Variables that are components of a vector."""

SAME_LEVEL = 1e-4
"""Largest difference of the logarithms of two pressures that count as the same."""

RINGS = 12
"""Largest number of rings of nodes over a footprint."""

ROWS_AT_ONCE = 4096
"""Number of rows with a footprint that are computed at a time, to bound the memory."""


class Levels(NamedTuple):
    """Levels around pressures, and which pressures are between levels.

    Attributes:
        channels: channel of the layer's two levels, shape (row, 2).
        weights: weight of each, shape (row, 2).
        above: whether the pressure is lower than that of the highest level, shape (row,).
        below: whether it is higher than that of the lowest level.
    """

    channels: Int[np.ndarray, "row 2"]
    weights: Float[np.ndarray, "row 2"]
    above: Bool[np.ndarray, " row"]
    below: Bool[np.ndarray, " row"]


class Weights(NamedTuple):
    """Weights of values of a flat state.

    Attributes:
        points: position in the flat state, shape (row, point).
        weight: weight of each value; unused points have the weight 0, shape (row, point).
    """

    points: Int[np.ndarray, "row point"]
    weight: Float[np.ndarray, "row point"]


def levels(layout: Layout, variable: Variable, pressure: Float[np.ndarray, " row"]) -> Levels:
    """Find the levels of a variable around pressures.

    Args:
        layout: layout of the state.
        variable: variable of the layout. On a single surface, its pressure does not matter.
        pressure: pressure of each row in Pa.
    """
    first = layout.channels(variable.name).start
    rows = len(pressure)
    if not variable.levels:
        none = np.zeros(rows, bool)
        return Levels(np.full((rows, 2), first), np.tile([1.0, 0.0], (rows, 1)), none, none)
    order = np.argsort(variable.levels)
    axis = np.log(100.0 * np.asarray(variable.levels, float)[order])
    at = np.log(pressure)
    above, below = at < axis[0] - SAME_LEVEL, at > axis[-1] + SAME_LEVEL
    at = np.clip(at, axis[0], axis[-1])
    lower = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, max(0, axis.size - 2))
    upper = np.minimum(lower + 1, axis.size - 1)
    gap = axis[upper] - axis[lower]
    share = np.where(gap > 0, (at - axis[lower]) / np.where(gap > 0, gap, 1.0), 0.0)
    share = np.where(share < SAME_LEVEL, 0.0, np.where(share > 1.0 - SAME_LEVEL, 1.0, share))
    channels = first + np.stack([order[lower], order[upper]], axis=-1)
    return Levels(channels, np.stack([1.0 - share, share], axis=-1), above, below)


def disc(radius: float, rings: int) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " node"], np.ndarray]:
    """Nodes and weights of a mean over a disc on the sphere.

    Args:
        radius: radius of the disc, radians.
        rings: number of rings of nodes around the center; ring k has 6 k nodes.

    Returns:
        (distance of each node from the center, its direction, both in radians; weights by area, whose sum is 1).
    """
    edges = np.append(0.0, radius * (np.arange(rings + 1) + 0.5) / (rings + 0.5))
    # The ring's nodes are at the distance at which half of its area is inside.
    cosines = np.cos(edges)
    middle = np.arccos(0.5 * (cosines[:-1] + cosines[1:]))
    middle[0] = 0.0
    counts = np.maximum(1, 6 * np.arange(rings + 1))
    area = (cosines[:-1] - cosines[1:]) / (1.0 - cosines[-1])
    angle = np.concatenate([2.0 * np.pi * (np.arange(n) + 0.5 * (k % 2)) / n for k, n in enumerate(counts)])
    return np.repeat(middle, counts), angle, np.repeat(area / counts, counts)


def around(
    places: Float[np.ndarray, "row 2"], distance: Float[np.ndarray, "row node"], angle: Float[np.ndarray, " node"]
) -> Float[np.ndarray, "row node 2"]:
    """Places at given distances and directions from others.

    Args:
        places: latitude and longitude in degrees.
        distance: distance of each node in radians.
        angle: direction of each node in radians, clockwise from north.

    Returns:
        Latitude and longitude of each node in degrees.
    """
    north, east = np.deg2rad(places[:, :1]), np.deg2rad(places[:, 1:])
    sine = np.sin(north) * np.cos(distance) + np.cos(north) * np.sin(distance) * np.cos(angle)
    along = np.arctan2(np.sin(angle) * np.sin(distance) * np.cos(north), np.cos(distance) - np.sin(north) * sine)
    return np.rad2deg(np.stack([np.arcsin(np.clip(sine, -1.0, 1.0)), east + along], axis=-1))


def distances(places: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Distances in km along great circles of points on the unit sphere from one of them."""
    chord = np.sqrt(np.maximum(2.0 - 2.0 * (places @ place), 0.0))
    return 2.0 * EARTH_RADIUS * np.arcsin(np.minimum(0.5 * chord, 1.0))


class Horizontal:
    """Weights of the points of a grid for places and their footprints.

    Args:
        grid: the grid.

    Attributes:
        grid: the grid.
        spacing: largest distance of two rows of the grid, radians.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        steps = np.abs(np.diff(grid.latitude)) if grid.latitude.size > 1 else np.array([10.0])
        self.spacing = float(np.deg2rad(steps.max()))

    def covers(self, places: Float[np.ndarray, "row 2"], footprint: Float[np.ndarray, " row"]) -> np.ndarray:
        """Whether each place and the edge of its footprint is on the grid, shape (row,).

        Args:
            places: latitude and longitude in degrees.
            footprint: diameter in km; NaN or 0 for a point.
        """
        inside = self.grid.covers(places)
        wide = inside & (footprint > 0)
        if wide.any():
            radius = 0.5 * footprint[wide] / EARTH_RADIUS
            edge = around(places[wide], radius[:, None] * np.ones(24), 2.0 * np.pi * np.arange(24) / 24)
            inside[wide] = self.grid.covers(edge.reshape(-1, 2)).reshape(-1, 24).all(axis=1)
        return inside

    def weights(
        self, places: Float[np.ndarray, "row 2"], footprint: Float[np.ndarray, " row"], is_vector: bool
    ) -> Weights:
        """Weights of grid points, numbered along the rows of the grid.

        Args:
            places: latitude and longitude in degrees, all on the grid.
            footprint: diameter in km; NaN or 0 for a point.
            is_vector: whether the values are components of a vector.
        """
        wide = footprint > 0
        index, weight = self._points(places, is_vector)
        if not wide.any():
            return Weights(index, weight)
        radius = 0.5 * footprint / EARTH_RADIUS
        rings = np.clip(np.ceil(2.0 * radius / self.spacing), 2, RINGS)
        found = [(np.flatnonzero(~wide), index[~wide], weight[~wide])]
        for count in np.unique(rings[wide]):
            rows = np.flatnonzero(wide & (rings == count))
            for some in np.array_split(rows, max(1, -(-len(rows) // ROWS_AT_ONCE))):
                found.append((some, *self._means(places[some], radius[some], int(count), is_vector)))
        width = max(part[1].shape[1] for part in found)
        index, weight = np.zeros((len(places), width), int), np.zeros((len(places), width))
        for rows, which, share in found:
            index[rows, : which.shape[1]], weight[rows, : which.shape[1]] = which, share
        return Weights(index, weight)

    def _points(self, places: np.ndarray, is_vector: bool) -> tuple[np.ndarray, np.ndarray]:
        corners = self.grid.corners_over_poles(places)
        index = corners.rows * self.grid.longitude.size + corners.columns
        return index, np.where(corners.beyond & is_vector, -corners.weights, corners.weights)

    def _means(
        self, places: np.ndarray, radius: np.ndarray, rings: int, is_vector: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weights of a mean over discs of the same number of nodes; each grid point occurs once in a row."""
        distance, angle, share = disc(1e-3, rings)
        # The nodes of a disc are at the same fractions of its radius, to the precision of the Earth's curvature.
        nodes = around(places, radius[:, None] * (distance / 1e-3), angle).reshape(-1, 2)
        index, weight = self._points(nodes, is_vector)
        index, weight = (
            values.reshape(len(places), -1) for values in (index, weight * np.tile(share, len(places))[:, None])
        )
        order = np.argsort(index, axis=1, kind="stable")
        index, weight = (np.take_along_axis(values, order, axis=1) for values in (index, weight))
        number = np.cumsum(np.diff(index, axis=1, prepend=index[:, :1]) != 0, axis=1)
        width = int(number.max()) + 1
        merged, total = np.zeros((len(places), width), int), np.zeros((len(places), width))
        rows = np.broadcast_to(np.arange(len(places))[:, None], index.shape)
        merged[rows, number] = index
        np.add.at(total, (rows, number), weight)
        return merged, total


def combine(layout: Layout, horizontal: Weights, vertical: Levels) -> Weights:
    """Weights of values of a flat state from those of grid points and of levels.

    Args:
        layout: layout of the state.
        horizontal: weights of grid points.
        vertical: channels and their weights.
    """
    channels = layout.shape[-1]
    two = bool((vertical.weights[:, 1] > 0).any())
    parts = range(2 if two else 1)
    index = [horizontal.points * channels + vertical.channels[:, k : k + 1] for k in parts]
    weight = [horizontal.weight * vertical.weights[:, k : k + 1] for k in parts]
    return Weights(np.concatenate(index, axis=1), np.concatenate(weight, axis=1))
