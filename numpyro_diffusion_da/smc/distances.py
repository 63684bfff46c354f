"""Distances between positions, for localization."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping

import equinox as eqx
import numpy as np
from jaxtyping import Float


class Distance(eqx.Module):
    """How far apart two positions are. A position is one number or a row of coordinates."""

    @abc.abstractmethod
    def __call__(self, a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "n m"]:
        """Distances of all positions `a` from all positions `b`."""

    @abc.abstractmethod
    def check(self, coordinates: int) -> str | None:
        """What a position must be, where this number of coordinates is not it; None where it is."""

    def on_grid(self, grid: Mapping[str, np.ndarray]) -> Float[np.ndarray, "n k"]:
        """Positions of a grid's points: by default all of its dimensions, in their order.

        Args:
            grid: the coordinate of every point by the name of its dimension, each of shape (n,).
        """
        return np.stack(list(grid.values()), axis=-1)


class Ring(Distance):
    """Along a circle: positions are single numbers, and `length` of them lead back to the beginning.

    Args:
        length: circumference, in the unit of the positions: 40 for 40 sites at 0, 1, ..., 39.

    Raises:
        ValueError: a length that is not positive.
    """

    length: float = eqx.field(static=True, converter=float)

    def __check_init__(self) -> None:
        if not 0 < self.length < math.inf:
            raise ValueError(f"Ring got length={self.length}; give its circumference, in the unit of the positions.")

    def __call__(self, a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "n m"]:
        """The shorter way round."""
        apart = np.abs(a[:, None, 0] - b[None, :, 0]) % self.length
        return np.minimum(apart, self.length - apart)

    def check(self, coordinates: int) -> str | None:
        """One number."""
        return None if coordinates == 1 else "one number"


class Euclidean(Distance):
    """In a straight line: positions have any number of coordinates, all in one unit."""

    def __call__(self, a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "n m"]:
        """The root of the sum of squares."""
        return np.sqrt(np.sum((a[:, None, :] - b[None, :, :]) ** 2, axis=-1))

    def check(self, coordinates: int) -> str | None:
        """Anything."""
        return None


class GreatCircle(Distance):
    """Along the sphere: positions are (latitude, longitude) in degrees.

    Args:
        sphere_radius: in the unit of the distances; kilometers of the Earth by default.

    Raises:
        ValueError: a radius that is not positive.
    """

    sphere_radius: float = eqx.field(static=True, default=6371.0, converter=float)

    def __check_init__(self) -> None:
        if not 0 < self.sphere_radius < math.inf:
            raise ValueError(f"GreatCircle got sphere_radius={self.sphere_radius}; give it in the unit of distances.")

    def __call__(self, a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "n m"]:
        """By the chord, which is exact for near points, where the arc cosine is not."""
        half_chord = 0.5 * Euclidean()(_on_unit_sphere(a), _on_unit_sphere(b))
        return 2.0 * self.sphere_radius * np.arcsin(np.minimum(half_chord, 1.0))

    def check(self, coordinates: int) -> str | None:
        """Two numbers."""
        return None if coordinates == 2 else "(latitude, longitude) in degrees"

    def on_grid(self, grid: Mapping[str, np.ndarray]) -> Float[np.ndarray, "n k"]:
        """The dimensions called latitude and longitude, or lat and lon.

        Raises:
            ValueError: there are none.
        """
        for names in (("latitude", "longitude"), ("lat", "lon")):
            if set(names) <= set(grid):
                return np.stack([grid[name] for name in names], axis=-1)
        raise ValueError(
            f"the layout's coordinates are {sorted(grid)}, without latitude and longitude; "
            "give the positions yourself: Taper(state=...)."
        )


def _on_unit_sphere(positions: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n 3"]:
    latitude, longitude = np.radians(positions).T
    return np.stack([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], -1)


class WithHeight(Distance):
    """On top of each other too: positions have one more coordinate, the last.

    The distance is the root of the sum of squares of the horizontal distance and of `scale` times the difference in
    height. With the logarithm of pressure as height and `GreatCircle()`, scale=1000.0 makes levels whose pressures
    have a ratio of e as far apart as 1000 km.

    Args:
        horizontal: the distance of all other coordinates.
        scale: horizontal distance that counts as much as one unit of height.

    Raises:
        ValueError: a scale that is not positive.
    """

    horizontal: Distance
    scale: float = eqx.field(static=True, converter=float)

    def __check_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(
                f"WithHeight got scale={self.scale}; give the distance that one unit of height stands for."
            )

    def __call__(self, a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "n m"]:
        """The root of the sum of squares."""
        height = self.scale * (a[:, None, -1] - b[None, :, -1])
        return np.sqrt(self.horizontal(a[:, :-1], b[:, :-1]) ** 2 + height**2)

    def check(self, coordinates: int) -> str | None:
        """One number more."""
        needed = self.horizontal.check(coordinates - 1) if coordinates > 1 else "at least one number"
        return None if needed is None else f"{needed}, then a height"
