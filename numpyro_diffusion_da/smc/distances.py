"""Distances between positions, for localization: on a ring, in a straight line, on a sphere, with height.

Positions are numpy arrays, or JAX arrays if places move: then they are known only inside the compiled step. All
functions take both, and compute with the array module of what they get.

The distances of this module place positions in a Euclidean space (`Distance.embedded`). Near positions are then found
without a comparison of all pairs.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_diffusion_da.arguments import number, require

Numbers = np.ndarray | Array
"""Array of numpy, or of JAX where it is known only inside a compiled function."""


def array_module(*arrays: Any) -> Any:
    """Array module of a computation: `jax.numpy` if any of the arrays is one of JAX, else `numpy`."""
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


class Distance(eqx.Module):
    """Distance between two positions. A position is one number or a row of coordinates.

    Another distance is a subclass that implements `__call__` and `check`. It may be written with numpy alone if no
    places move; for places that move (see `Taper`) it has to take JAX arrays too. All pairs of positions are then
    compared, which takes long for many of them. To avoid this, implement `embedded`, `prepared` and `between` too.
    """

    @abc.abstractmethod
    def __call__(self, a: Float[Numbers, "n k"], b: Float[Numbers, "m k"]) -> Float[Numbers, "n m"]:
        """Distances between all positions `a` and all positions `b`."""

    @abc.abstractmethod
    def check(self, coordinates: int) -> str | None:
        """Description of a valid position, for an error message; None if the number of coordinates is valid.

        Args:
            coordinates: number of coordinates of a position.
        """

    def embedded(self, positions: Float[Numbers, "n k"]) -> Float[Numbers, "n q"] | None:
        """Coordinates in a Euclidean space where no two positions are further apart than by this distance.

        All positions within a distance are found among those within the same straight line of these coordinates.

        Returns:
            The coordinates, shape (n, q); None if there are none, so that all pairs have to be compared.
        """
        return None

    def prepared(self, positions: Float[Numbers, "n k"]) -> Float[Numbers, "n r"]:
        """Numbers from which `between` computes distances; by default the positions."""
        return positions

    def between(self, a: Float[Numbers, "... r"], b: Float[Numbers, "... r"]) -> Float[Numbers, ...]:
        """Distances between pairs of prepared positions, whose leading axes broadcast.

        They equal those of `__call__` to the last digit. Only distances with `embedded` coordinates need it.

        Raises:
            NotImplementedError: the distance does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} has embedded coordinates and no `between`; define it too.")

    def outside(self, positions: Float[np.ndarray, "n k"]) -> np.ndarray:
        """Mask of positions that do not exist, shape (n,); by default all finite positions exist."""
        return np.zeros(len(positions), bool)

    def on_grid(self, grid: Mapping[str, np.ndarray]) -> Float[np.ndarray, "n k"]:
        """Positions of the points of a grid. By default their coordinates are all dimensions, in the grid's order.

        Args:
            grid: coordinate of every point for each dimension, by the dimension's name, each of shape (n,).
        """
        return np.stack(list(grid.values()), axis=-1)


class Ring(Distance):
    """Distance along a circle. A position is one number, and positions that differ by `length` are the same.

    Args:
        length: circumference, in the unit of the positions: 40 for 40 sites at 0, 1, ..., 39.

    Raises:
        TypeError: `length` is not a number.
        ValueError: `length` is not positive and finite.
    """

    length: float = eqx.field(
        static=True,
        converter=number("Ring", "length", "give its circumference in the unit of the positions.", above=0),
    )

    def __call__(self, a: Float[Numbers, "n k"], b: Float[Numbers, "m k"]) -> Float[Numbers, "n m"]:
        """Distances along the shorter arc, in the unit of the positions."""
        return self.between(a[:, None], b[None])

    def between(self, a: Float[Numbers, "... 1"], b: Float[Numbers, "... 1"]) -> Float[Numbers, ...]:
        """Distances along the shorter arc between pairs of positions."""
        xp = array_module(a, b)
        apart = xp.abs(a[..., 0] - b[..., 0]) % self.length
        return xp.minimum(apart, self.length - apart)

    def embedded(self, positions: Float[Numbers, "n 1"]) -> Float[Numbers, "n 2"]:
        """Positions on a circle in the plane; a chord is no longer than its arc."""
        xp = array_module(positions)
        angle = (2.0 * np.pi / self.length) * positions[:, 0]
        return self.length / (2.0 * np.pi) * xp.stack([xp.cos(angle), xp.sin(angle)], axis=-1)

    def check(self, coordinates: int) -> str | None:
        """Return "one number", or None if a position has one coordinate."""
        return None if coordinates == 1 else "one number"


class Euclidean(Distance):
    """Distance in a straight line. A position has any number of coordinates, all in one unit."""

    def __call__(self, a: Float[Numbers, "n k"], b: Float[Numbers, "m k"]) -> Float[Numbers, "n m"]:
        """Distances in a straight line, in the unit of the positions."""
        return self.between(a[:, None], b[None])

    def between(self, a: Float[Numbers, "... k"], b: Float[Numbers, "... k"]) -> Float[Numbers, ...]:
        """Distances in a straight line between pairs of positions."""
        return _straight(a, b)

    def embedded(self, positions: Float[Numbers, "n k"]) -> Float[Numbers, "n k"]:
        """Return the positions themselves."""
        return positions

    def check(self, coordinates: int) -> str | None:
        """Return None, because any number of coordinates is valid."""
        return None


class GreatCircle(Distance):
    """Distance along the surface of a sphere. A position is (latitude, longitude) in degrees.

    Args:
        sphere_radius: radius of the sphere, in the unit of the distances; by default the Earth's in kilometers.

    Raises:
        TypeError: `sphere_radius` is not a number.
        ValueError: `sphere_radius` is not positive and finite.
    """

    sphere_radius: float = eqx.field(
        static=True,
        default=6371.0,
        converter=number("GreatCircle", "sphere_radius", "give a positive radius in the unit of distances.", above=0),
    )

    def __call__(self, a: Float[Numbers, "n k"], b: Float[Numbers, "m k"]) -> Float[Numbers, "n m"]:
        """Great-circle distances, in the unit of the sphere's radius.

        They are computed from the chord, which is accurate for near points, where the arc cosine is not.
        """
        return self.between(self.prepared(a)[:, None], self.prepared(b)[None])

    def prepared(self, positions: Float[Numbers, "n 2"]) -> Float[Numbers, "n 3"]:
        """Positions on the unit sphere, in three dimensions."""
        return _on_unit_sphere(positions)

    def between(self, a: Float[Numbers, "... 3"], b: Float[Numbers, "... 3"]) -> Float[Numbers, ...]:
        """Great-circle distances between pairs of positions on the unit sphere."""
        half_chord = 0.5 * _straight(a, b)
        xp = array_module(half_chord)
        return 2.0 * self.sphere_radius * xp.arcsin(xp.minimum(half_chord, 1.0))

    def embedded(self, positions: Float[Numbers, "n 2"]) -> Float[Numbers, "n 3"]:
        """Positions on a sphere in three dimensions; a chord is no longer than its arc."""
        return self.sphere_radius * _on_unit_sphere(positions)

    def check(self, coordinates: int) -> str | None:
        """Return "(latitude, longitude) in degrees", or None if a position has two coordinates."""
        return None if coordinates == 2 else "(latitude, longitude) in degrees"

    def outside(self, positions: Float[np.ndarray, "n k"]) -> np.ndarray:
        """Mask of positions beyond the poles, such as (longitude, latitude) in the wrong order, shape (n,)."""
        return np.abs(positions[:, 0]) > 90.0 + 1e-3

    def on_grid(self, grid: Mapping[str, np.ndarray]) -> Float[np.ndarray, "n k"]:
        """Positions of the points of a grid, from its dimensions latitude and longitude, or lat and lon.

        Raises:
            ValueError: the grid has no such dimensions.
        """
        for names in (("latitude", "longitude"), ("lat", "lon")):
            if set(names) <= set(grid):
                return np.stack([grid[name] for name in names], axis=-1)
        raise ValueError(
            f"the layout's coordinates are {sorted(grid)}, without latitude and longitude; "
            "give the positions of the state: Taper(state=...)."
        )


def _straight(a: Float[Numbers, "... k"], b: Float[Numbers, "... k"]) -> Float[Numbers, ...]:
    xp = array_module(a, b)
    return xp.sqrt(xp.sum((a - b) ** 2, axis=-1))


def _on_unit_sphere(positions: Float[Numbers, "n k"]) -> Float[Numbers, "n 3"]:
    xp = array_module(positions)
    latitude, longitude = xp.radians(positions).T
    return xp.stack([xp.cos(latitude) * xp.cos(longitude), xp.cos(latitude) * xp.sin(longitude), xp.sin(latitude)], -1)


class WithHeight(Distance):
    r"""Distance that combines a horizontal distance with a difference in height, the last coordinate of a position.

    The distance is $\sqrt{d^2 + (s \, \Delta z)^2}$, with $d$ the horizontal distance, $\Delta z$ the difference in
    height and $s$ the scale. With the logarithm of pressure as height and `GreatCircle()`, scale=1000.0 puts levels
    whose pressures have a ratio of e as far apart as 1000 km.

    Args:
        horizontal: distance of all other coordinates.
        scale: horizontal distance that counts as much as one unit of height.

    Raises:
        TypeError: `scale` is not a number.
        ValueError: `scale` is not positive and finite.
    """

    horizontal: Distance
    scale: float = eqx.field(
        static=True,
        converter=number(
            "WithHeight", "scale", "give the horizontal distance that equals one unit of height.", above=0
        ),
    )

    def __check_init__(self) -> None:
        require(self.horizontal, Distance, self, "horizontal", "ndda.GreatCircle()")

    def __call__(self, a: Float[Numbers, "n k"], b: Float[Numbers, "m k"]) -> Float[Numbers, "n m"]:
        """Distances from horizontal distance and height together, in the unit of the horizontal distance."""
        height = self.scale * (a[:, None, -1] - b[None, :, -1])
        return array_module(height).sqrt(self.horizontal(a[:, :-1], b[:, :-1]) ** 2 + height**2)

    def prepared(self, positions: Float[Numbers, "n k"]) -> Float[Numbers, "n r"]:
        """Prepared horizontal positions, and height."""
        horizontal = self.horizontal.prepared(positions[:, :-1])
        return array_module(horizontal).concatenate([horizontal, positions[:, -1:]], axis=-1)

    def between(self, a: Float[Numbers, "... r"], b: Float[Numbers, "... r"]) -> Float[Numbers, ...]:
        """Distances between pairs of prepared positions."""
        height = self.scale * (a[..., -1] - b[..., -1])
        return array_module(height).sqrt(self.horizontal.between(a[..., :-1], b[..., :-1]) ** 2 + height**2)

    def embedded(self, positions: Float[Numbers, "n k"]) -> Float[Numbers, "n q"] | None:
        """Embedded horizontal positions with the scaled height; None if the horizontal distance has none."""
        horizontal = self.horizontal.embedded(positions[:, :-1])
        if horizontal is None:
            return None
        return array_module(horizontal).concatenate([horizontal, self.scale * positions[:, -1:]], axis=-1)

    def outside(self, positions: Float[np.ndarray, "n k"]) -> np.ndarray:
        """Mask of positions whose horizontal position does not exist, shape (n,)."""
        return self.horizontal.outside(positions[:, :-1])

    def check(self, coordinates: int) -> str | None:
        """Description of a horizontal position with a height; None if the number of coordinates is valid."""
        needed = self.horizontal.check(coordinates - 1) if coordinates > 1 else "at least one number"
        return None if needed is None else f"{needed}, then a height"
