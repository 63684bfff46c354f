r"""Localization: tapers that fall to zero with distance, and the neighborhoods that follow from them.

An ensemble of $N$ members estimates a covariance with an error of order $1 / \sqrt N$, however small the covariance is.
Between distant points the estimate is therefore mostly error. A taper multiplies it by a correlation that falls to zero
with distance.

A `Taper` holds what a user chooses. A `PlacedTaper` holds the position of every value of one model. `Neighborhoods` and
`Blocks` are the arrays that a compiled step needs. This module knows no filter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float, Int

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.checksums import checksum
from numpyro_diffusion_da.smc.correlations import Correlation, GaspariCohn
from numpyro_diffusion_da.smc.distances import Distance

LARGEST_BLOCK = 2**22
"""Largest number of distances computed at a time: 32 MB."""


class Neighborhoods(NamedTuple):
    """Observations near each of p points, at most k of them per point.

    Attributes:
        which: indices of the observations near each point, shape (p, k). Rows with fewer than k are padded.
        weights: taper of these observations, shape (p, k); 0 in the padding.
    """

    which: Int[np.ndarray, "p k"]
    weights: Float[np.ndarray, "p k"]


class Blocks(NamedTuple):
    """Partition of the places of a state into b blocks.

    Attributes:
        centers: position of the center of each block, shape (b, k).
        of_point: index of the block of each place, shape (p,).
    """

    centers: Float[np.ndarray, "b k"]
    of_point: Int[np.ndarray, " p"]


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedTaper:
    """Taper at the positions of one model's state and observations.

    Attributes:
        radii: half-width c of each observation's taper, in the unit of the distance, shape (m,).
        distance: distance between two positions.
        points: positions of the state, one for each run of values at the same place, shape (p, k).
        observations: positions of the whitened residuals, in their order, shape (m, k).
        correlation: correlation as a function of the distance over c.
    """

    radii: Float[np.ndarray, " m"]
    distance: Distance
    points: Float[np.ndarray, "p k"]
    observations: Float[np.ndarray, "m k"]
    correlation: Correlation = dataclasses.field(default_factory=GaspariCohn)

    def taper(self, at: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n m"]:
        """Correlation between given positions and the observations."""
        return self.correlation(self.distance(at, self.observations) / self.radii[None])

    def between_observations(self) -> Float[np.ndarray, "m m"]:
        """Correlation between the observations, from the smaller of the two radii."""
        radii = np.minimum(self.radii[:, None], self.radii[None, :])
        return self.correlation(self.distance(self.observations, self.observations) / radii)

    def neighborhoods(self, at: Float[np.ndarray, "p k"] | None = None) -> Neighborhoods:
        """Find the observations with a positive taper at each position.

        All pairs are compared, in batches that bound the memory.

        Args:
            at: positions; by default the places of the state.
        """
        points = self.points if at is None else at
        block = max(1, LARGEST_BLOCK // max(1, len(self.observations)))
        found = []
        for start in range(0, len(points), block):
            weights = self.taper(points[start : start + block])
            reached = weights > 0.0
            width = max(1, int(reached.sum(1).max()))
            # A stable sort keeps the order of the observations of a row and moves those of zero weight to its end.
            index = np.argsort(~reached, axis=1, kind="stable")[:, :width]
            found.append((index, np.take_along_axis(weights, index, axis=1)))
        width = max(index.shape[1] for index, _ in found)
        padded = [tuple(np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in pair) for pair in found]
        index, weights = (np.concatenate(parts) for parts in zip(*padded, strict=True))
        return Neighborhoods(index.astype(np.int32), weights.astype(np.float32))

    def blocks(self, radius: float) -> Blocks:
        """Partition the places of the state into blocks no larger than a radius around their centers.

        The place that is furthest from all centers becomes the next center (Gonzalez 1985), until every place is within
        `radius` of a center. This works on any grid and with any distance.

        Args:
            radius: largest distance of a place from its center. 0 makes each place a block, infinity makes one block.
        """
        if radius == 0.0:
            return Blocks(self.points, np.arange(len(self.points), dtype=np.int32))
        chosen = [0]
        nearest = np.zeros(len(self.points), np.int32)
        apart = self.distance(self.points, self.points[:1])[:, 0]
        while apart.max() > radius:
            chosen.append(int(apart.argmax()))
            here = self.distance(self.points, self.points[chosen[-1] :][:1])[:, 0]
            nearest = np.where(here < apart, np.int32(len(chosen) - 1), nearest)
            apart = np.minimum(apart, here)
        return Blocks(self.points[chosen], nearest)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Taper:
    """Localization settings: a half-width, a distance, and the positions of the observations and of the state.

    For example, ``Taper(4.0, Ring(40), {"y": np.arange(0, 40, 2)})`` is for a site "y" that observes every second
    one of 40 points on a ring.

    Positions are an array with one row of coordinates, or one number, for each place. A place of the state may hold one
    value or several. Places run over the leading axes of the state, so that each point of a grid (latitude, longitude,
    channel) holds all channels. The same is true of an observed site, for instance with the axes (station, variable).
    The errors of a `MultivariateNormal` site are correlated, and whitening mixes the values of an event. All values of
    such an event need the same place, so the site has one place per event.

    Args:
        radius: half-width c of the taper, in the unit of the distance. The taper is 0 from 2 c on. One number for all
            observations, or one for each observed site by its name.
        distance: `Ring`, `Euclidean`, `GreatCircle`, or `WithHeight` of one of them. On a ring and on the sphere a
            taper is a covariance only if c is at most a quarter of the circle.
        observations: positions of each observed site's values, by the name of the site.
        state: positions of the state's values; by default the coordinates of the prior's layout.
        correlation: taper as a function of the distance over c: `GaspariCohn()`, which is 5/24 at c, or `Boxcar()`.

    Raises:
        ValueError: a radius is not positive, a position is not finite, or positions do not fit the distance.
        TypeError: `distance` is not a `Distance`, or `correlation` is not a `Correlation`.
    """

    radius: float | Mapping[str, float]
    distance: Distance
    observations: Mapping[str, ArrayLike]
    state: ArrayLike | None = None
    correlation: Correlation = dataclasses.field(default_factory=GaspariCohn)

    def __post_init__(self) -> None:
        if isinstance(self.radius, Mapping) and set(self.radius) != set(self.observations):
            raise ValueError(
                f"Taper got radii of {sorted(self.radius)} and positions of {sorted(self.observations)}; give a radius "
                "and positions for every observed site."
            )
        radii = self.radius.values() if isinstance(self.radius, Mapping) else [self.radius]
        if not all(radius > 0.0 for radius in radii):
            raise ValueError(
                f"Taper got radius={self.radius}; give a positive half-width, in the unit of the distance."
            )
        if not isinstance(self.distance, Distance):
            raise TypeError(
                f"Taper got the distance {self.distance!r}; give ndda.Ring(length), ndda.Euclidean() or "
                "ndda.GreatCircle()."
            )
        require(self.correlation, Correlation, self, "correlation", "ndda.smc.GaspariCohn()")
        placed = {name: self._rows(value, f"site '{name}'") for name, value in self.observations.items()}
        object.__setattr__(self, "observations", placed)
        if self.state is not None:
            object.__setattr__(self, "state", self._rows(self.state, "the state"))

    def __repr__(self) -> str:
        """Text with all settings, stored with results. Positions appear as their number and a checksum."""
        radius = dict(self.radius) if isinstance(self.radius, Mapping) else f"{self.radius:g}"
        parts = [f"radius={radius}", f"distance={self.distance}", f"correlation={self.correlation}"]
        parts += [f"{name}={_described(value)}" for name, value in self.observations.items()]
        return f"Taper({', '.join(parts)}, state={'layout' if self.state is None else _described(self.state)})"

    def _radius(self, site: str) -> float:
        return self.radius[site] if isinstance(self.radius, Mapping) else self.radius

    def _rows(self, values: ArrayLike, what: str) -> Float[np.ndarray, "n k"]:
        rows = np.asarray(values, np.float64)
        rows = rows.reshape(-1, 1) if rows.ndim < 2 else rows.reshape(-1, rows.shape[-1])
        if (needed := self.distance.check(rows.shape[1])) is not None:
            raise ValueError(
                f"Taper got positions of shape {np.shape(values)} for {what}; a position of "
                f"{type(self.distance).__name__} is {needed}."
            )
        if not np.all(np.isfinite(rows)):
            raise ValueError(f"Taper got a position of {what} that is not finite; give finite positions.")
        return rows

    def place(
        self,
        state_shape: tuple[int, ...],
        observed: Mapping[str, tuple[tuple[int, ...], int]],
        axes: Mapping[str, np.ndarray] | None = None,
    ) -> PlacedTaper:
        """Place the taper at the positions of one model's state and observations.

        Args:
            state_shape: shape of one state.
            observed: for each observed site, in the order of the residuals, the shape of its value and the number of
                values that share a correlated error (1 if errors are independent).
            axes: coordinates of the leading dimensions of the state's grid, by name. They are the positions of the
                state if the taper has none.

        Raises:
            ValueError: positions are missing, have a wrong number or belong to an unknown site, or values at different
                places have correlated errors. The message names the site.
        """
        rows = self._grid_rows(axes) if self.state is None else np.asarray(self.state)
        _values_at_each(len(rows), state_shape, "the state")
        if unknown := sorted(set(self.observations) - set(observed)):
            raise ValueError(f"Taper has positions of {unknown}, but the observed sites are {sorted(observed)}.")
        placed, radii = [], []
        for name, (shape, event) in observed.items():
            if name not in self.observations:
                raise ValueError(
                    f"Taper has no positions of the observed site '{name}'; give one for each of its values: "
                    f"Taper(observations={{'{name}': ...}}), shape {shape}."
                )
            given = np.asarray(self.observations[name])
            at_each = _values_at_each(len(given), shape, f"site '{name}'")
            here = np.repeat(given, at_each, axis=0)
            events = here.reshape(-1, event, here.shape[1])
            if np.any(events != events[:, :1]):
                raise ValueError(
                    f"site '{name}' has correlated errors between values at different places, and whitening mixes "
                    "these values; give independent Normal errors, or one place for all values of an event."
                )
            placed.append(here)
            radii.append(np.full(len(here), self._radius(name)))
        if len({x.shape[1] for x in (rows, *placed)}) != 1:
            counts = {"the state": rows.shape[1]} | {n: x.shape[1] for n, x in zip(observed, placed, strict=True)}
            raise ValueError(f"Taper got positions of {counts} coordinates; give the same coordinates to all.")
        return PlacedTaper(np.concatenate(radii), self.distance, rows, np.concatenate(placed), self.correlation)

    def _grid_rows(self, axes: Mapping[str, np.ndarray] | None) -> Float[np.ndarray, "n k"]:
        if not axes:
            raise ValueError(
                "Taper has no positions of the state, and the state has no grid with known coordinates; "
                "give Taper(state=...), one position for each value."
            )
        mesh = np.meshgrid(*axes.values(), indexing="ij")
        grid = {name: values.reshape(-1).astype(np.float64) for name, values in zip(axes, mesh, strict=True)}
        return self._rows(self.distance.on_grid(grid), "the state (its layout's coordinates)")


def _values_at_each(positions: int, shape: tuple[int, ...], what: str) -> int:
    """Number of values at each position, given that positions run over the leading axes of `shape`.

    Raises:
        ValueError: the number of positions fits no number of leading axes.
    """
    for axes in range(len(shape), -1, -1):
        if math.prod(shape[:axes]) == positions:
            return math.prod(shape[axes:])
    raise ValueError(
        f"Taper got {positions} positions of {what}, whose value has the shape {shape}; give {math.prod(shape)}, one "
        "for each value, or one for each place along its leading axes."
    )


def _described(positions: Any) -> str:
    return f"[{len(positions)} positions, {checksum(positions)[:12]}]"
