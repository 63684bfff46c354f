"""Localization: a taper on distance, and who is near whom.

An ensemble of N members estimates a covariance with an error of order 1/sqrt(N), however small the covariance is: far
away the error is all there is. A taper multiplies by a correlation that falls to zero with distance. Nothing here knows
of a filter: a `Taper` is what a user says, a `PlacedTaper` knows the position of every value of one model, and
`Neighborhoods` and `Blocks` are what a compiled step needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float, Int

from numpyro_diffusion_da.checksums import checksum
from numpyro_diffusion_da.smc.distances import Distance

LARGEST_BLOCK = 2**22
"""Distances computed at a time: 32 MB."""


def gaspari_cohn(ratio: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
    """The compactly supported correlation of Gaspari & Cohn (1999), eq. 4.10, close to a Gaussian of width 0.55 c.

    Args:
        ratio: distance over the half-width c, not negative.

    Returns:
        1 at 0, 5/24 at 1, 0 from 2 on; twice differentiable.
    """
    z = np.minimum(np.asarray(ratio, np.float64), 2.0)
    near = 1.0 + z**2 * (-5.0 / 3.0 + z * (5.0 / 8.0 + z * (0.5 - 0.25 * z)))
    far_z = np.maximum(z, 1.0)
    far = 4.0 - 5.0 * z + z**2 * (5.0 / 3.0 + z * (5.0 / 8.0 + z * (-0.5 + z / 12.0))) - 2.0 / (3.0 * far_z)
    return np.where(z <= 1.0, near, np.maximum(far, 0.0))


class Neighborhoods(NamedTuple):
    """For each of p points the observations that its taper reaches, at most k.

    Attributes:
        which: the observations, shape (p, k); rows with fewer are filled up.
        weights: their taper, shape (p, k); zero where filled up.
    """

    which: Int[np.ndarray, "p k"]
    weights: Float[np.ndarray, "p k"]


class Blocks(NamedTuple):
    """Places that are treated as one.

    Attributes:
        centers: position of each of b blocks, shape (b, k).
        of_point: the block of each place of the state, shape (p,).
    """

    centers: Float[np.ndarray, "b k"]
    of_point: Int[np.ndarray, " p"]


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedTaper:
    """A taper at the places of one model's values.

    Attributes:
        radii: half-width c of each observation's taper, shape (m,).
        distance: how far apart two positions are.
        points: positions of the state, one for each run of values at the same place, shape (p, k).
        observations: positions of the whitened residuals, in their order, shape (m, k).
    """

    radii: Float[np.ndarray, " m"]
    distance: Distance
    points: Float[np.ndarray, "p k"]
    observations: Float[np.ndarray, "m k"]

    def taper(self, at: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n m"]:
        """The correlation between positions and the observations."""
        return gaspari_cohn(self.distance(at, self.observations) / self.radii[None])

    def between_observations(self) -> Float[np.ndarray, "m m"]:
        """The correlation between the observations; of two with different radii that of the smaller."""
        radii = np.minimum(self.radii[:, None], self.radii[None, :])
        return gaspari_cohn(self.distance(self.observations, self.observations) / radii)

    def neighborhoods(self, at: Float[np.ndarray, "p k"] | None = None) -> Neighborhoods:
        """Which observations reach which position; all pairs are looked at, in blocks.

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
            # A stable sort keeps the observations of a row in their order, and the ones out of reach at its end.
            index = np.argsort(~reached, axis=1, kind="stable")[:, :width]
            found.append((index, np.take_along_axis(weights, index, axis=1)))
        width = max(index.shape[1] for index, _ in found)
        padded = [tuple(np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in pair) for pair in found]
        index, weights = (np.concatenate(parts) for parts in zip(*padded, strict=True))
        return Neighborhoods(index.astype(np.int32), weights.astype(np.float32))

    def blocks(self, radius: float) -> Blocks:
        """Blocks of places no further than `radius` from their center, which is a place too.

        Centers are added where the state is furthest from those it has (Gonzalez 1985), until none is too far: on any
        grid, of any distance. A radius of 0 makes each place a block, an infinite one the whole state.
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
    """Gaspari-Cohn localization, and where everything is: ``Taper(4.0, Ring(40), {"y": np.arange(0, 40, 2)})``.

    Positions are an array of one row of coordinates for each place, or of one number. The state has one value at each
    place, or several: they run over its leading axes, so that the points of a grid (latitude, longitude, channel) have
    all channels each. The same holds for the values of an observed site: (stations, variables), say. A
    `MultivariateNormal` site's errors are correlated, and whitening mixes the values of an event, which then must
    share one place: such a site has a place for each event.

    Args:
        radius: the half-width c of the taper, in the unit of the distance: the taper is 5/24 there, and 0 from 2 c on.
            One for all observations, or one by the name of each observed site.
        distance: `Ring`, `Euclidean`, `GreatCircle`, or `WithHeight` of one of them. On a ring and on the sphere a
            taper is a covariance only if it does not reach around: c of at most a quarter of the circle.
        observations: positions of each observed site's values, by its name.
        state: positions of the state's values; by default the coordinates of the prior's layout.

    Raises:
        ValueError: a radius that is not positive, or positions that are not finite or do not fit the distance.
        TypeError: a distance that is none.
    """

    radius: float | Mapping[str, float]
    distance: Distance
    observations: Mapping[str, ArrayLike]
    state: ArrayLike | None = None

    def __post_init__(self) -> None:
        if isinstance(self.radius, Mapping) and set(self.radius) != set(self.observations):
            raise ValueError(
                f"Taper got radii of {sorted(self.radius)} and positions of {sorted(self.observations)}; give both for "
                "the same observed sites."
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
        placed = {name: self._rows(value, f"site '{name}'") for name, value in self.observations.items()}
        object.__setattr__(self, "observations", placed)
        if self.state is not None:
            object.__setattr__(self, "state", self._rows(self.state, "the state"))

    def __repr__(self) -> str:
        """In full, as positions go into a result's attributes: their number and a checksum."""
        radius = dict(self.radius) if isinstance(self.radius, Mapping) else f"{self.radius:g}"
        parts = [f"radius={radius}", f"distance={self.distance}"]
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
            raise ValueError(f"Taper got a position of {what} that is not finite; give every value a place.")
        return rows

    def place(
        self,
        state_shape: tuple[int, ...],
        observed: Mapping[str, tuple[tuple[int, ...], int]],
        axes: Mapping[str, np.ndarray] | None = None,
    ) -> PlacedTaper:
        """The taper at the places of one model.

        Args:
            state_shape: shape of one state.
            observed: for each observed site, in the order of the residuals, the shape of its value and the number of
                values that share a correlated error (1 where errors are independent).
            axes: coordinates of the leading dimensions of the state's grid, by name, for positions of the state that
                were not given.

        Raises:
            ValueError: positions missing, in a wrong number or of a site that is not there, or correlated errors of
                values at different places; the sentence names the site.
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
                    "them, so that none has a place of its own; give Normal errors, or each event one place."
                )
            placed.append(here)
            radii.append(np.full(len(here), self._radius(name)))
        if len({x.shape[1] for x in (rows, *placed)}) != 1:
            counts = {"the state": rows.shape[1]} | {n: x.shape[1] for n, x in zip(observed, placed, strict=True)}
            raise ValueError(f"Taper got positions of {counts} coordinates; give the same coordinates to all.")
        return PlacedTaper(np.concatenate(radii), self.distance, rows, np.concatenate(placed))

    def _grid_rows(self, axes: Mapping[str, np.ndarray] | None) -> Float[np.ndarray, "n k"]:
        if not axes:
            raise ValueError(
                "Taper has no positions of the state, and its values lie on no grid that is known; "
                "give Taper(state=...), one position for each value."
            )
        mesh = np.meshgrid(*axes.values(), indexing="ij")
        grid = {name: values.reshape(-1).astype(np.float64) for name, values in zip(axes, mesh, strict=True)}
        return self._rows(self.distance.on_grid(grid), "the state (its layout's coordinates)")


def _values_at_each(positions: int, shape: tuple[int, ...], what: str) -> int:
    """How many values are at each position, if positions run over the leading axes of `shape`."""
    for axes in range(len(shape), -1, -1):
        if math.prod(shape[:axes]) == positions:
            return math.prod(shape[axes:])
    raise ValueError(
        f"Taper got {positions} positions of {what}, whose value has the shape {shape}; give {math.prod(shape)}, one "
        "for each value, or one for each place of its leading axes."
    )


def _described(positions: Any) -> str:
    return f"[{len(positions)} positions, {checksum(positions)[:12]}]"
