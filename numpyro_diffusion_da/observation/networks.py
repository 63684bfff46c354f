"""Observing networks on a latitude-longitude grid: stations, the swath of a satellite, block means.

A network maps a state (latitude, longitude, channel) to an array (place, observed quantity). In a NumPyro program this
array is the mean of a `Normal`. A place that does not report at a time has the value NaN (missing) there. The networks
here observe channels, which is linear; a subclass may observe a quantity derived from several channels.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from numpyro_diffusion_da.arguments import require, require_count, require_number, shown
from numpyro_diffusion_da.fields.grids import Grid, check_places
from numpyro_diffusion_da.fields.layout import Layout


def channel(layout: Layout, name: str) -> int:
    """Index of a channel on the last axis of a state, by its name.

    Args:
        layout: layout of the state.
        name: name of the channel: "temperature_850" for the temperature at 850 hPa, "surface_pressure" for a variable
            without levels.

    Raises:
        ValueError: the state has no such channel, or the variable of the channel has points without a value, which the
            channel does not show. The message names the channel.
    """
    index = _index(layout, name)
    if _undefined(layout, index) is not None:
        raise ValueError(
            f"'{name}' has points without a value, where its channel holds a fill value; take its values by "
            "layout.select(x, name), which are NaN there."
        )
    return index


def _index(layout: Layout, name: str) -> int:
    """Index of a channel by its name, also of one with points without a value.

    Raises:
        ValueError: the state has no such channel. The message lists its channels.
    """
    names = channel_names(layout)
    if name not in names:
        has = f"it has {', '.join(names)}" if names else "its layout has no variables"
        raise ValueError(f"the state has no channel '{name}'; {has}.")
    return names.index(name)


def _undefined(layout: Layout, index: int) -> Bool[np.ndarray, "latitude longitude"] | None:
    """Mask of the points where a channel has no value; None if it has a value everywhere."""
    variable = [variable for variable in layout.variables for _ in range(variable.num_channels)][index]
    mask = None if variable.undefined is None else variable.undefined.mask()
    return mask if mask is not None and mask.any() else None


def channel_names(layout: Layout) -> list[str]:
    """Name of each channel of the last axis, for instance "temperature_850" (hPa) or "surface_pressure"."""
    return [
        f"{variable.name}_{level}" if variable.levels else variable.name
        for variable in layout.variables
        for level in variable.levels or (None,)
    ]


class ObservingNetwork(abc.ABC):
    """Observing network: places that observe some channels of a state, with independent Gaussian errors.

    A subclass that observes a quantity derived from channels, a wind speed for instance, overrides `observe` and
    `channels`.

    Attributes:
        errors: standard deviation of the error of each observed quantity, by its name and in its unit. The name is that
            of a channel unless `channels` is overridden.
    """

    errors: dict[str, float]

    @abc.abstractmethod
    def places(self, layout: Layout) -> Float[np.ndarray, "place 2"]:
        """Latitude and longitude of each place, in degrees."""

    @abc.abstractmethod
    def at_places(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place channel"]:
        """Values of all channels of a state at each place, without error."""

    def reports(self, cycles: int, layout: Layout) -> Bool[np.ndarray, "time place"]:
        """Which places report at which time; all of them always, unless a subclass overrides this method.

        Args:
            cycles: number of times.
            layout: layout of the state.

        Returns:
            True where a place reports, shape (time, place).
        """
        return np.ones((cycles, len(self.places(layout))), bool)

    def channels(self, layout: Layout) -> list[int]:
        """Indices of the channels that the observations depend on, in the order of `errors`.

        Raises:
            ValueError: the state has no channel of a name in `errors`.
        """
        return [_index(layout, name) for name in self.errors]

    def observe(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place observed"]:
        """Observations of a state without error, in the order of `errors`: the observed channels at each place.

        Args:
            x: state, shape (latitude, longitude, channel).
            layout: layout of the state.

        Raises:
            ValueError: the state has another shape than the layout, the state has no channel of a name in `errors`, a
                place lies outside the grid, or a place depends on a point where its channel has no value.
        """
        if jnp.shape(x) != layout.shape:
            raise ValueError(
                f"{type(self).__name__}.observe got a state of shape {jnp.shape(x)}, but the layout describes "
                f"{layout.shape}; give one state, and use jax.vmap for several."
            )
        channels = self.channels(layout)
        self._refuse_undefined(layout, channels)
        return self.at_places(x[..., np.array(channels)], layout)

    def _refuse_undefined(self, layout: Layout, channels: Sequence[int]) -> None:
        """Refuse places that depend on points where a channel has no value.

        Raises:
            ValueError: there is such a place. The message names the channel and the place.
        """
        for index in channels:
            mask = _undefined(layout, index)
            if mask is None:
                continue
            # The weights of a place are not negative, so that any undefined point makes its share positive.
            with jax.ensure_compile_time_eval():
                share = np.asarray(self.at_places(jnp.asarray(mask[..., None], jnp.float32), layout))[:, 0]
            if (share > 0).any():
                at = int(np.flatnonzero(share > 0)[0])
                latitude, longitude = self.places(layout)[at]
                raise ValueError(
                    f"{type(self).__name__} observes '{channel_names(layout)[index]}' where it has no value: at "
                    f"{int((share > 0).sum())} of {share.size} places, the first at latitude {latitude:g}, longitude "
                    f"{longitude:g}; observe it elsewhere, for example with Stations(errors, places=...), or take "
                    "layout.select(x, name), which is NaN there."
                )

    def error(self) -> Float[np.ndarray, " observed"]:
        """Standard deviations of the errors of the observed quantities, in the order and units of `errors`."""
        return np.array(list(self.errors.values()), np.float32)


def _check_errors(network: ObservingNetwork) -> None:
    """Check the standard deviations of errors of a network.

    Raises:
        TypeError: they are not a dictionary of numbers by name.
        ValueError: there are none, or one is not positive and finite.
    """
    require(network.errors, Mapping, network, "errors", '{"temperature_850": 0.5}')
    advice = 'give one number for the name of each observed channel, a positive standard deviation: {"t2m": 0.5}.'
    if not network.errors:
        raise ValueError(
            f"{type(network).__name__} got errors={network.errors}, but observes one channel or more; {advice}"
        )
    for name, error in network.errors.items():
        if not isinstance(name, str):
            raise TypeError(f"{type(network).__name__} got errors={shown(network.errors)}; {advice}")
        require_number(error, network, f"errors[{name!r}]", advice, above=0.0)


class Stations(ObservingNetwork):
    """Stations at fixed places: given ones, or random ones uniformly distributed over the area of the grid.

    Values between grid points are interpolated linearly in latitude and longitude. The grid may have any orientation.
    On a global grid, a station beyond the first or last row has the values of that row. On a grid of a region, nothing
    is extrapolated.

    Args:
        errors: standard deviation of the error of each observed channel, by the channel's name and in its unit.
        count: number of random stations, 100 by default.
        seed: seed of the random places.
        places: places of the stations instead of random ones: pairs (latitude, longitude) in degrees, shape (place, 2),
            or a mapping from the name of a station to its pair. Longitudes are from 0 to 360 or from -180 to 180.

    Attributes:
        given: latitude and longitude of each station as given, in degrees; None for random places.
        names: names of the stations as given; None if they have no names.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: `count` is below 1 or given with `places`, `errors` is empty, an error is not positive, or a place
            is not a pair of degrees. The methods raise it for a station outside the grid.
    """

    def __init__(
        self,
        errors: dict[str, float],
        count: int | None = None,
        seed: int = 0,
        places: ArrayLike | Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.errors = errors
        _check_errors(self)
        if count is not None:
            require_count(count, self, "count")
        require_count(seed, self, "seed", 0)
        self.given: np.ndarray | None = None
        self.names: tuple[str, ...] | None = None
        if places is not None:
            self.given, self.names = check_places(places, "Stations")
            if count not in (None, len(self.given)):
                raise ValueError(
                    f"Stations got count={count} and {len(self.given)} places; count is for random places, leave it "
                    "out."
                )
        self.count = (100 if count is None else int(count)) if self.given is None else len(self.given)
        self.seed = seed

    def __repr__(self) -> str:
        where = f"seed={self.seed}" if self.given is None else f"places={self.given.tolist()}"
        return f"{type(self).__name__}(errors={self.errors}, count={self.count}, {where})"

    def places(self, layout: Layout) -> Float[np.ndarray, "place 2"]:
        """Latitude and longitude of each station in degrees.

        Args:
            layout: layout of the state, over whose area random stations are distributed.

        Raises:
            ValueError: the layout has no grid of latitudes and longitudes.
        """
        grid = Grid.of(layout)
        return grid.draw(np.random.default_rng(self.seed), self.count) if self.given is None else self.given.copy()

    def at_places(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place channel"]:
        """Values of all channels at each station, interpolated between the four grid points around it.

        Raises:
            ValueError: a station lies outside the grid. The message names the first one.
        """
        corners = Grid.of(layout).corners(self.places(layout), self.names, type(self).__name__)
        parts = [
            jnp.asarray(corners.weights[:, k], np.float32)[:, None] * x[corners.rows[:, k], corners.columns[:, k]]
            for k in range(corners.weights.shape[1])
        ]
        return sum(parts[1:], parts[0])


@dataclasses.dataclass(frozen=True)
class Swath(ObservingNetwork):
    """Satellite that observes grid points in a band of longitudes, which moves from one time to the next.

    Args:
        errors: standard deviation of the error of each observed channel, by the channel's name and in its unit.
        width: width of the band, degrees of longitude.
        advance: distance that the band moves from one time to the next, degrees of longitude.
        thinning: n, to observe every n-th latitude and longitude only.

    Raises:
        ValueError: `width` is outside (0, 360], `thinning` is below 1, `errors` is empty, or an error is not positive.
    """

    errors: dict[str, float]
    width: float = 60.0
    advance: float = 75.0
    thinning: int = 2

    def __post_init__(self) -> None:
        _check_errors(self)
        require_count(self.thinning, self, "thinning")
        width = require_number(self.width, self, "width", "give 0 to 360 degrees, and not 0.", above=0.0, most=360.0)
        advance = require_number(self.advance, self, "advance", "give a finite number of degrees.")
        object.__setattr__(self, "width", width)  # a frozen dataclass forbids ordinary assignment
        object.__setattr__(self, "advance", advance)

    def places(self, layout: Layout) -> Float[np.ndarray, "place 2"]:
        """Latitude and longitude in degrees of all thinned grid points, inside and outside the band."""
        grid = Grid.of(layout)
        axes = (grid.latitude[:: self.thinning], grid.longitude[: grid.columns : self.thinning])
        return np.stack([x.reshape(-1) for x in np.meshgrid(*axes, indexing="ij")], axis=-1)

    def at_places(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place channel"]:
        """Values of all channels at the thinned grid points, inside and outside the band."""
        columns = Grid.of(layout).columns
        return x[:: self.thinning, : columns : self.thinning].reshape(-1, x.shape[-1])

    def reports(self, cycles: int, layout: Layout) -> Bool[np.ndarray, "time place"]:
        """Which grid points are in the band at which time: no further than half its width from its middle.

        Args:
            cycles: number of times.
            layout: layout of the state.

        Returns:
            True where a place reports, shape (time, place).
        """
        require_count(cycles, self, "cycles")
        middle = self.advance * np.arange(cycles)[:, None]
        apart = np.abs((self.places(layout)[None, :, 1] - middle + 180.0) % 360.0 - 180.0)
        return apart <= 0.5 * self.width


@dataclasses.dataclass(frozen=True)
class BlockMeans(ObservingNetwork):
    """Area-weighted means over blocks of grid points, as an instrument with a wide footprint observes them.

    Args:
        errors: standard deviation of the error of each observed channel, by the channel's name and in its unit.
        size: number of grid points of a block along each axis.

    Raises:
        ValueError: `size` is below 1, `errors` is empty, or an error is not positive. The methods raise it for a grid
            that blocks of this size do not fill.
    """

    errors: dict[str, float]
    size: int = 4

    def __post_init__(self) -> None:
        _check_errors(self)
        require_count(self.size, self, "size")

    def _weights(self, layout: Layout) -> Float[np.ndarray, "blocks within"]:
        """Area weights of the latitudes within each row of blocks; the weights of a row sum to 1."""
        grid = Grid.of(layout)
        points = (grid.latitude.size, grid.columns)
        if points[0] % self.size or points[1] % self.size:
            raise ValueError(
                f"BlockMeans got size={self.size}, but blocks of {self.size} x {self.size} points do not fill a grid "
                f"of {points}; give a size that divides both numbers."
            )
        # The mean of an instrument is a matter of definition, and published numbers use the cosine. Scores use
        # `diagnostics.area_weights`, which equals it on regular grids without points at the poles.
        weights = np.cos(np.deg2rad(grid.latitude)).reshape(-1, self.size)
        return weights / weights.sum(axis=1, keepdims=True)

    def places(self, layout: Layout) -> Float[np.ndarray, "place 2"]:
        """Latitude and longitude of the middle of each block, in degrees."""
        grid = Grid.of(layout)
        latitude = np.sum(self._weights(layout) * grid.latitude.reshape(-1, self.size), axis=1)
        # A block may lie across the end of the longitudes, as at 350, 355, 0, 5 degrees.
        east = np.unwrap(grid.longitude[: grid.columns], period=360.0)
        longitude = east.reshape(-1, self.size).mean(axis=1)
        return np.stack([x.reshape(-1) for x in np.meshgrid(latitude, longitude, indexing="ij")], axis=-1)

    def at_places(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place channel"]:
        """Area-weighted mean of each channel over each block."""
        n, weights = self.size, jnp.asarray(self._weights(layout), x.dtype)
        # A meridian that repeats the first one counts once.
        blocks = x[:, : Grid.of(layout).columns].reshape(len(weights), n, -1, n, x.shape[-1])
        return jnp.einsum("iajbc,ia->ijc", blocks, weights / n).reshape(-1, x.shape[-1])


def fraction_of(
    scales: Sequence[float] | np.ndarray, names: Sequence[str], layout: Layout, part: float
) -> dict[str, float]:
    """Standard deviations of errors as a fraction of each channel's scale, for the argument `errors` of a network.

    Args:
        scales: scale of every channel of the state in its unit, for instance the standard deviation of the climate.
        names: names of the observed channels.
        layout: layout of the state.
        part: the fraction, 0.2 for a fifth.

    Returns:
        Standard deviation of each observed channel, by the channel's name and in its unit.

    Raises:
        ValueError: the state has no channel of a given name.
    """
    if isinstance(names, str):
        raise TypeError(f"fraction_of got names={shown(names)}; give a list of names of channels, [{shown(names)}].")
    if np.shape(scales) != layout.shape[-1:]:
        raise ValueError(
            f"fraction_of got scales of shape {np.shape(scales)}, but the state has {layout.shape[-1]} channels; give "
            "one scale for each channel."
        )
    return {name: part * float(scales[_index(layout, name)]) for name in names}
