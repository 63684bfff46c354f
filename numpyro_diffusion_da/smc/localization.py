r"""Localization: tapers that fall to zero with distance, and the neighborhoods that follow from them.

An ensemble of $N$ members estimates a covariance with an error of order $1 / \sqrt N$, however small the covariance is.
Between distant points the estimate is therefore mostly error. A taper multiplies it by a correlation that falls to zero
with distance.

A `Taper` holds what a user chooses. A `PlacedTaper` holds the position of every value of one model. `Neighborhoods` and
`Blocks` are the arrays that a compiled step needs. This module knows no filter.

The positions of a `PlacedTaper` are numpy arrays, and everything that follows from them is a constant of the compiled
step. Positions of observations that move from step to step are JAX arrays. Then the near ones are found in the step,
and their number has a bound (`Taper.most_near`), because shapes of a compiled step are fixed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from numpyro_diffusion_da.arguments import numbers_by_name, real_array, require, require_count, shown
from numpyro_diffusion_da.checksums import checksum
from numpyro_diffusion_da.smc.columns import Index
from numpyro_diffusion_da.smc.correlations import Correlation, GaspariCohn
from numpyro_diffusion_da.smc.distances import Distance, Numbers, array_module
from numpyro_diffusion_da.smc.moving_search import check_room, near_each
from numpyro_diffusion_da.smc.neighbor_search import far_apart, pairs_within, partition

MOST_PAIRS = 2**22
"""Number of pairs of a place and an observation that moves up to which the taper is held for all pairs: 16 MB."""

MOST_NEAR = 512
"""Default room for the observations near a place, if they move and all pairs are too many."""

MOST_TIMES_MEAN = 3
"""Largest number of places of a block, over the mean number of all blocks."""

PairFunction = Callable[[Numbers, Numbers, Numbers], Numbers]
"""Function of pairs: (distances, indices of the positions, indices of the observations) -> values of the pairs."""


class Neighborhoods(NamedTuple):
    """Observations near each of p points, at most k of them per point.

    Attributes:
        which: indices of the observations near each point, shape (p, k). Rows with fewer than k are padded.
        weights: taper of these observations, shape (p, k); 0 in the padding.
    """

    which: Int[Numbers, "p k"]
    weights: Float[Numbers, "p k"]


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
        observations: positions of the whitened residuals, in their order, shape (m, k). JAX arrays may have positions
            that are not finite; their taper is 0.
        correlation: correlation as a function of the distance over c.
        most_near: room for the observations near a place if positions move; see `Taper`.
        part: indices of the places that an update of some columns has to do with (`smc.columns`); None for all.
    """

    radii: Float[np.ndarray, " m"]
    distance: Distance
    points: Float[np.ndarray, "p k"]
    observations: Float[Numbers, "m k"]
    correlation: Correlation = dataclasses.field(default_factory=GaspariCohn)
    most_near: int | None = None
    _found: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
    part: Index | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what searches have found."""
        return {**self.__dict__, "_found": {}}

    def _once(self, key: Any, search: Callable[[], Any]) -> Any:
        """Result of a search, which is made once: a filter needs it in each trace, and it takes seconds at scale.

        Tapers of one model at different steps share the results, so a key says which positions they depend on.
        """
        if key not in self._found:
            self._found[key] = search()
        return self._found[key]

    def at_places(self, index: Index) -> PlacedTaper:
        """Taper for some places of the state, in whose order an update has their values.

        Args:
            index: indices of the places, as `smc.columns.map_columns` gives them.
        """
        return dataclasses.replace(self, part=index)

    def placed(self) -> Bool[Numbers, " m"]:
        """Whether the position of each observation is finite."""
        xp = array_module(self.observations)
        return xp.all(xp.isfinite(self.observations), axis=-1)

    def taper(self, at: Float[np.ndarray, "n k"]) -> Float[Numbers, "n m"]:
        """Correlation between given positions and the observations."""
        if isinstance(self.observations, np.ndarray):
            return self.correlation(self.distance(at, self.observations) / self.radii[None])
        placed = self.placed()
        found = self._moving(at, jnp.where(placed[:, None], self.observations, 0.0), self.radii[None])
        return jnp.where(placed[None], found, 0.0)

    def between_observations(self) -> Float[Numbers, "m m"]:
        """Correlation between the observations, from the smaller of the two radii."""
        radii = np.minimum(self.radii[:, None], self.radii[None, :])
        if isinstance(self.observations, np.ndarray):
            return self.correlation(self.distance(self.observations, self.observations) / radii)
        placed = self.placed()
        rows = jnp.where(placed[:, None], self.observations, 0.0)
        return jnp.where(placed[:, None] & placed[None, :], self._moving(rows, rows, radii), 0.0)

    def _moving(self, a: Float[Numbers, "n k"], b: Float[Array, "m k"], radii: Float[np.ndarray, ...]) -> Array:
        """Correlation between positions that are known only inside a compiled function.

        Raises:
            TypeError: the distance or the correlation takes numpy arrays only.
        """
        with _jax_arrays_only(self.distance, self.correlation):
            return jnp.asarray(self.correlation(self.distance(a, b) / radii))

    def neighborhoods(self, at: Float[np.ndarray, "p k"] | None = None) -> Neighborhoods:
        """Find the observations with a positive taper at each position.

        They are found by a tree, or where the distance allows none by a comparison of all pairs, in batches that bound
        the memory. If places move, they are found in the compiled step (`moving_search`); up to `MOST_PAIRS` pairs, all
        observations are near each position, with a taper of 0 where they are too far.

        Args:
            at: positions; by default the places of the state.
        """
        which, (weights,) = self._near_in((self,), self.points if at is None else at)
        return Neighborhoods(which, weights)

    def neighborhoods_with(
        self, at: Float[np.ndarray, "p k"], other: PlacedTaper
    ) -> tuple[Int[Numbers, "p k"], Float[Numbers, "p k"], Float[Numbers, "p k"]]:
        """Observations with a positive taper at each position, and another taper of the same observations at them.

        Args:
            at: positions.
            other: another taper of the same observations, with the same distance.

        Returns:
            (indices, this taper, the other taper), each of shape (p, k).
        """
        which, (weights, others) = self._near_in((self, other), at)
        return which, weights, others

    def room(self, points: int) -> int:
        """Number of observations that moving neighborhoods have room for.

        Args:
            points: number of positions that have neighborhoods.
        """
        m = len(self.observations)
        if self.most_near is not None:
            return min(self.most_near, m)
        return m if points * m <= MOST_PAIRS else min(MOST_NEAR, m)

    def width(self) -> int:
        """Number of observations that the neighborhoods of the places of the state hold."""
        if isinstance(self.observations, np.ndarray):
            return int(self.neighborhoods().which.shape[1])
        return self.room(len(self.points))

    def _near_in(
        self, tapers: tuple[PlacedTaper, ...], at: Float[np.ndarray, "p k"]
    ) -> tuple[Int[Numbers, "p k"], list[Float[Numbers, "p k"]]]:
        """Observations with a positive taper at each position, and the values of several tapers at them."""
        functions = [_at_radii(taper) for taper in tapers]
        if isinstance(self.observations, np.ndarray):
            given: list[Any] = [array for taper in tapers for array in (taper.observations, taper.radii)]
            kept = [x for taper in tapers for x in (taper.distance, taper.correlation)]
            return self._search("near", at, functions, [at, *given], kept)
        if self.room(len(at)) >= len(self.radii):
            every = np.arange(len(self.radii), dtype=np.int32)
            return np.broadcast_to(every, (len(at), len(every))), [t.taper(at).astype(jnp.float32) for t in tapers]
        return self._search_moving(at, functions, np.ones(len(at), bool))

    def near_observations(self) -> Neighborhoods:
        """Find the observations near each observation, with the correlation between them from the smaller radius.

        These are the positive values of `between_observations`, without an array of all pairs. They are found as
        `neighborhoods` finds those near the places of the state.
        """

        def smaller(apart: Numbers, rows: Numbers, near: Numbers) -> Numbers:
            xp = array_module(near)
            radii = xp.asarray(self.radii)
            return self.correlation(apart / xp.minimum(radii[rows], radii[near]))

        if isinstance(self.observations, np.ndarray):
            given = [self.observations, self.radii]
            found = self._search("between", self.observations, [smaller], given, [self.distance, self.correlation])
        else:
            placed = jnp.asarray(self.placed())
            found = self._search_moving(jnp.where(placed[:, None], self.observations, 0.0), [smaller], placed)
        which, (weights,) = found
        return Neighborhoods(which, weights)

    def _search(
        self,
        what: str,
        at: Float[np.ndarray, "p k"],
        functions: Sequence[PairFunction],
        given: Sequence[np.ndarray],
        kept: Sequence[Any],
    ) -> tuple[Any, list[Any]]:
        """Observations where the first function of pairs is positive, and the values of all; searched once.

        Args:
            what: name of the search.
            at: positions.
            functions: functions of pairs of a position and an observation.
            given: arrays that the result depends on.
            kept: distances and correlations that it depends on.

        Returns:
            (indices, values of each function), each of shape (p, k), padded by 0.
        """

        def search() -> tuple[Any, list[Any]]:
            counts, columns = np.zeros(len(at), int), []
            values: list[list[np.ndarray]] = [[] for _ in functions]
            observations: Any = self.observations
            for rows, near, apart in pairs_within(self.distance, at, observations, 2.0 * self.radii):
                found = [np.asarray(function(apart, rows, near)) for function in functions]
                keep = found[0] > 0.0
                counts += np.bincount(rows[keep], minlength=len(at))
                columns.append(near[keep].astype(np.int32))
                for parts, value in zip(values, found, strict=True):
                    parts.append(value[keep].astype(np.float32))
            filled = np.arange(max(1, counts.max(initial=0)))[None] < counts[:, None]
            return _padded(filled, columns, np.int32), [_padded(filled, parts, np.float32) for parts in values]

        # What is kept holds the functions too, so that no later ones can have their identities.
        key = (what, checksum(list(given)), *map(id, kept))
        result: tuple[Any, list[Any]] = self._once(key, lambda: (search(), kept))[0]
        return result

    def _search_moving(
        self, at: Float[Numbers, "p k"], functions: Sequence[PairFunction], exists: Bool[Numbers, " p"]
    ) -> tuple[Any, list[Any]]:
        """Result of `_search` for observations that move, found in the compiled step.

        Args:
            at: positions, finite.
            functions: functions of pairs of a position and an observation.
            exists: False for positions that have no observations near them.
        """
        placed, room = jnp.asarray(self.placed()), self.room(len(at))
        observations = jnp.where(placed[:, None], self.observations, 0.0)
        with _jax_arrays_only(self.distance, self.correlation):
            near = near_each(self.distance, at, observations, 2.0 * self.radii, placed, room)
            rows = jnp.arange(len(at))[:, None]
            values = [jnp.asarray(function(near.distances, rows, near.which)) for function in functions]
        fine = jnp.asarray(exists)[:, None] & jnp.isfinite(near.distances)
        zero = check_room(jnp.where(exists, near.counts, 0), room)
        return near.which, [jnp.where(fine, value, 0.0).astype(jnp.float32) + zero for value in values]

    def between_some(self, which: Int[Array, " k"]) -> Float[Array, "k k"]:
        """Correlation between some of the observations, from the smaller of the two radii.

        Args:
            which: indices of the observations.
        """
        rows, radii = jnp.asarray(self.observations)[which], jnp.asarray(self.radii)[which]
        placed = jnp.all(jnp.isfinite(rows), axis=-1)
        rows = jnp.where(placed[:, None], rows, 0.0)
        found = self.correlation(self.distance(rows, rows) / jnp.minimum(radii[:, None], radii[None, :]))
        return jnp.where(placed[:, None] & placed[None, :], found, 0.0)

    def classes(self, count: int) -> Int[np.ndarray, " m"]:
        """Divide the observations into classes whose members are far from each other.

        Observations are taken in a random order that is always the same. Each joins the class whose nearest member is
        furthest from it. Places that move are not known here; then every count-th observation is in the same class.

        Args:
            count: number of classes.

        Returns:
            Class of each observation, from 0 to count - 1.
        """
        observations, m = self.observations, len(self.observations)
        if not isinstance(observations, np.ndarray) or count >= m:
            return (np.arange(m) % count).astype(np.int32)
        found: Int[np.ndarray, " m"] = self._once(
            ("classes", count, checksum(observations)), lambda: far_apart(self.distance, observations, count)
        )
        return found

    def blocks(self, radius: float) -> Blocks:
        """Partition the places of the state into blocks no larger than a radius around their centers.

        This works on any grid and with any distance; see `neighbor_search.partition`. A block with many more places
        than the others, such as one at the pole of a regular grid, becomes several with the same center.

        Args:
            radius: largest distance of a place from its center. 0 makes each place a block, infinity makes one block.
        """
        if radius == 0.0:
            return Blocks(self.points, np.arange(len(self.points), dtype=np.int32))
        chosen, of_point = self._once(
            ("blocks", radius, checksum(self.points)), lambda: partition(self.distance, self.points, radius)
        )
        return _even(Blocks(self.points[chosen], of_point))


def _at_radii(taper: PlacedTaper) -> PairFunction:
    """Function of pairs of a position and an observation that gives the taper of the observation."""

    def function(apart: Numbers, rows: Numbers, near: Numbers) -> Numbers:
        return taper.correlation(apart / array_module(near).asarray(taper.radii)[near])

    return function


def _padded(filled: Bool[np.ndarray, "p k"], parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    """Array with the values of all parts, one after another, where `filled` is True, and 0 elsewhere."""
    array = np.zeros(filled.shape, dtype)
    array[filled] = np.concatenate([np.empty(0, dtype), *parts])
    return array


@contextlib.contextmanager
def _jax_arrays_only(distance: Distance, correlation: Correlation) -> Iterator[None]:
    """Name a distance and a correlation that take numpy arrays only, where they get positions that move.

    Raises:
        TypeError: one of them takes numpy arrays only.
    """
    try:
        yield
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(
            f"{type(distance).__name__} or {type(correlation).__name__} is written for numpy arrays and "
            "cannot take places that move from step to step; write both with jax.numpy functions."
        ) from error


def _even(blocks: Blocks) -> Blocks:
    """Divide blocks of more than `MOST_TIMES_MEAN` times the mean number of places into several with the same center.

    Blocks are computed side by side, with room for the places of the largest. Those with one center have the same
    weights and ancestors, so this changes nothing about the places.
    """
    counts = np.bincount(blocks.of_point)
    most = math.ceil(MOST_TIMES_MEAN * counts.mean())
    order = np.argsort(blocks.of_point, kind="stable")
    number = np.empty(len(order), int)  # of each place in its block
    number[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    parts = -(-counts // most)
    of_point = (np.cumsum(parts) - parts)[blocks.of_point] + number // most
    return Blocks(np.repeat(blocks.centers, parts, axis=0), of_point.astype(np.int32))


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

    Places that move, for example of ships, aircraft or satellites, are passed through the inputs of the program's scan,
    and its body names them: ``numpyro.deterministic("y_place", at["place"])``. The taper gets this name in place of an
    array, ``Taper(4.0, Ring(40), {"y": "y_place"})``. The positions of a step may depend on the scan's inputs and on
    arguments of the program, but not on the state, the carry or random draws. They have the form of the array that they
    replace, at one time. A missing value may have a position of NaN. A new position compiles nothing anew.

    An array holds for all steps. A filter cannot notice that observations have moved away from the places in an array:
    it then localizes around wrong places, without a warning. Name the site of a program whose observations move.

    Others state the same taper of Gaspari and Cohn by another length. For a given taper with half-width c:

    | software | setting | value | give here |
    |---|---|---|---|
    | this library | `radius` | c; the taper is 0 from 2 c on | |
    | JEDI (SABER, UFO) | length scale, the distance where the taper is 0 | 2 c | half of it |
    | DART | `cutoff`, the half-width | c | the same |
    | DAPPER | `loc_rad` | c / 1.82 | 1.82 times it |

    Check the documentation of the version that a setting comes from, because some have several conventions.

    Args:
        radius: half-width c of the taper, in the unit of the distance. The taper is 0 from 2 c on; see the table above
            for settings of other software. One number for all observations, or one for each observed site by its name.
        distance: `Ring`, `Euclidean`, `GreatCircle`, or `WithHeight` of one of them. On a ring and on the sphere a
            taper is a covariance only if c is at most a quarter of the circle.
        observations: positions of each observed site's values, by the name of the site: an array, or the name of the
            deterministic site in the scan's body that holds the positions of each step.
        state: positions of the state's values; by default the coordinates of the prior's layout.
        correlation: taper as a function of the distance over c: `GaspariCohn()`, which is 5/24 at c, or `Boxcar()`.
        most_near: room for the observations near one place, which is needed where places move: the step holds this many
            for each place, or block. A step with more stops with an error that gives the number. None is all
            observations if there are at most 2^22 pairs of a place and an observation, and 512 otherwise.

    Raises:
        ValueError: a radius is not positive, `most_near` is below 1, a position is not finite, or positions do not fit
            the distance.
        TypeError: `distance` is not a `Distance`, or `correlation` is not a `Correlation`.
    """

    radius: float | Mapping[str, float]
    distance: Distance
    observations: Mapping[str, ArrayLike | str]
    state: ArrayLike | None = None
    correlation: Correlation = dataclasses.field(default_factory=GaspariCohn)
    most_near: int | None = None
    _made: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the placed tapers that it has made."""
        return {**self.__dict__, "_made": {}}

    def __post_init__(self) -> None:
        example = '{"y": np.arange(0, 40, 4)}'
        require(self.observations, Mapping, self, "observations", example)
        if not all(isinstance(site, str) for site in self.observations):
            raise ValueError(
                f"Taper got observations={shown(self.observations)}; give positions by the name of each observed "
                f"site: write observations={example}."
            )
        advice = "give a positive half-width, in the unit of the distance."
        object.__setattr__(self, "radius", numbers_by_name(self.radius, "Taper", "radius", advice))
        if isinstance(self.radius, Mapping) and set(self.radius) != set(self.observations):
            raise ValueError(
                f"Taper got radii of {sorted(self.radius)} and positions of {sorted(self.observations)}; give a radius "
                "and positions for every observed site."
            )
        if not isinstance(self.distance, Distance):
            raise TypeError(
                f"Taper got the distance {shown(self.distance)}; give ndda.Ring(length), ndda.Euclidean() or "
                "ndda.GreatCircle()."
            )
        require(self.correlation, Correlation, self, "correlation", "ndda.smc.GaspariCohn()")
        if self.most_near is not None:
            require_count(self.most_near, "Taper", "most_near")
        placed = {
            name: value if isinstance(value, str) else self._rows(value, f"site '{name}'", f"observations[{name!r}]")
            for name, value in self.observations.items()
        }
        object.__setattr__(self, "observations", placed)
        if self.state is not None:
            object.__setattr__(self, "state", self._rows(self.state, "the state", "state"))

    def __repr__(self) -> str:
        """Text with all settings, stored with results. Positions appear as their number and a checksum."""
        radius = dict(self.radius) if isinstance(self.radius, Mapping) else f"{self.radius:g}"
        parts = [f"radius={radius}", f"distance={self.distance}", f"correlation={self.correlation}"]
        parts += [f"{name}={_described(value)}" for name, value in self.observations.items()]
        return f"Taper({', '.join(parts)}, state={'layout' if self.state is None else _described(self.state)})"

    @property
    def moving(self) -> dict[str, str]:
        """Name of the deterministic site with the positions, for each observed site whose positions move."""
        return {name: value for name, value in self.observations.items() if isinstance(value, str)}

    def with_radius(self, radius: float | Mapping[str, float]) -> Taper:
        """Return the same taper with another half-width.

        Args:
            radius: half-width, or one for each observed site by its name.
        """
        key = ("radius", tuple(sorted(radius.items())) if isinstance(radius, Mapping) else radius)
        if key not in self._made:
            self._made[key] = dataclasses.replace(self, radius=radius)
        found: Taper = self._made[key]
        return found

    def _radius(self, site: str) -> float:
        return self.radius[site] if isinstance(self.radius, Mapping) else self.radius

    def _rows(self, values: ArrayLike, what: str, argument: str) -> Float[np.ndarray, "n k"]:
        rows = self._as_rows(real_array(values, self, argument, "np.arange(0, 40, 4)"), what)
        if (wrong := self.distance.outside(rows)).any():
            at = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"Taper got the position {rows[at].tolist()} of {what}, number {at}, which is beyond the poles; give "
                "the latitude first, from -90 to 90 degrees."
            )
        return rows

    def _as_rows(self, values: Any, what: str) -> Any:
        """Reshape positions to one row of coordinates for each; they may be tracers.

        Raises:
            ValueError: the rows have a number of coordinates that the distance cannot take.
        """
        rows = values.reshape(-1, 1) if values.ndim < 2 else values.reshape(-1, values.shape[-1])
        if (needed := self.distance.check(rows.shape[1])) is not None:
            if values.ndim == 1 and self.distance.check(len(values)) is None:
                return values.reshape(1, -1)  # one position without an axis of positions
            raise ValueError(
                f"Taper got positions of shape {np.shape(values)} for {what}; a position of "
                f"{type(self.distance).__name__} is {needed}."
            )
        return rows

    def _moved(
        self, site: str, shape: tuple[int, ...], event: int, places: Mapping[str, Numbers]
    ) -> Float[Numbers, "m k"]:
        """Positions of a site's values at one step, from the deterministic site that holds them.

        Args:
            site: name of the observed site.
            shape: shape of its value.
            event: number of consecutive values that share a correlated error.
            places: value of each deterministic site at one step, by name.

        Raises:
            ValueError: the shape of the positions does not fit, or values at different places have correlated errors.
        """
        source = self.moving[site]
        what = f"site '{site}' (from the deterministic site '{source}')"
        xp = array_module(places[source])
        rows = self._as_rows(xp.asarray(places[source], float), what)
        at_each = _values_at_each(len(rows), shape, what)
        if at_each % event:
            raise ValueError(
                f"site '{site}' has correlated errors between {event} values, but the deterministic site '{source}' "
                "gives each of them a place of its own; give one place per event, or independent Normal errors."
            )
        return xp.repeat(rows, at_each, axis=0)

    def place(
        self,
        state_shape: tuple[int, ...],
        observed: Mapping[str, tuple[tuple[int, ...], int]],
        axes: Mapping[str, np.ndarray] | None = None,
        places: Mapping[str, Numbers] | None = None,
    ) -> PlacedTaper:
        """Place the taper at the positions of one model's state and observations.

        Args:
            state_shape: shape of one state.
            observed: for each observed site, in the order of the residuals, the shape of its value and the number of
                values that share a correlated error (1 if errors are independent).
            axes: coordinates of the leading dimensions of the state's grid, by name. They are the positions of the
                state if the taper has none.
            places: positions of observations that move, at one time, by the name of the deterministic site that holds
                them (see `moving`); they may be tracers.

        Raises:
            ValueError: positions are missing, have a wrong number or belong to an unknown site, or values at different
                places have correlated errors. The message names the site.
        """
        if self.moving:
            return self._place(state_shape, observed, axes, places)
        # Placed once, a taper searches its neighborhoods once.
        coordinates = None if axes is None else tuple((name, checksum(values)) for name, values in axes.items())
        key = ("placed", tuple(state_shape), tuple(observed.items()), coordinates)
        if key not in self._made:
            self._made[key] = self._place(state_shape, observed, axes, places)
        found: PlacedTaper = self._made[key]
        return found

    def _place(
        self,
        state_shape: tuple[int, ...],
        observed: Mapping[str, tuple[tuple[int, ...], int]],
        axes: Mapping[str, np.ndarray] | None,
        places: Mapping[str, Numbers] | None,
    ) -> PlacedTaper:
        """Placed taper that `place` returns."""
        rows = self._grid_rows(axes) if self.state is None else np.asarray(self.state)
        _values_at_each(len(rows), state_shape, "the state")
        if unknown := sorted(set(self.observations) - set(observed)):
            raise ValueError(f"Taper has positions of {unknown}, but the observed sites are {sorted(observed)}.")
        placed: list[Any] = []
        radii = []
        for name, (shape, event) in observed.items():
            if name not in self.observations:
                raise ValueError(
                    f"Taper has no positions of the observed site '{name}'; give one for each of its values: "
                    f"Taper(observations={{'{name}': ...}}), shape {shape}."
                )
            if name in self.moving:
                placed.append(self._moved(name, shape, event, places or {}))
                radii.append(np.full(len(placed[-1]), self._radius(name)))
                continue
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
        observations = array_module(*placed).concatenate(placed)
        found = self._made.setdefault("found", {}) if self.moving else {}
        return PlacedTaper(
            np.concatenate(radii), self.distance, rows, observations, self.correlation, self.most_near, found
        )

    def _grid_rows(self, axes: Mapping[str, np.ndarray] | None) -> Float[np.ndarray, "n k"]:
        if not axes:
            raise ValueError(
                "Taper has no positions of the state, and the state has no grid with known coordinates; "
                "give Taper(state=...), one position for each value."
            )
        mesh = np.meshgrid(*axes.values(), indexing="ij")
        grid = {name: values.reshape(-1).astype(np.float64) for name, values in zip(axes, mesh, strict=True)}
        return self._rows(self.distance.on_grid(grid), "the state (its layout's coordinates)", "state")


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
    if isinstance(positions, str):
        return f"positions in the site '{positions}'"
    return f"[{len(positions)} positions, {checksum(positions)[:12]}]"
