"""Observing networks on a latitude-longitude grid: stations, the swath of a satellite, block means.

A network maps a state (latitude, longitude, channel) to an array (place, observed quantity). In a NumPyro program this
array is the mean of a `Normal`. A place that does not report at a time has the value NaN (missing) there. The networks
here observe channels, which is linear; a subclass may observe a quantity derived from several channels.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_diffusion_da.fields.interpolation import locate
from numpyro_diffusion_da.fields.layout import Layout


def channel(layout: Layout, name: str) -> int:
    """Index of a channel on the last axis of a state, by its name.

    Args:
        layout: layout of the state.
        name: name of the channel: "temperature_850" for the temperature at 850 hPa, "surface_pressure" for a variable
            without levels.

    Raises:
        ValueError: the state has no such channel. The message lists its channels.
    """
    names = channel_names(layout)
    if name not in names:
        raise ValueError(f"the state has no channel '{name}'; it has {', '.join(names)}.")
    return names.index(name)


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
        return [channel(layout, name) for name in self.errors]

    def observe(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place observed"]:
        """Observations of a state without error, in the order of `errors`: the observed channels at each place."""
        return self.at_places(x[..., np.array(self.channels(layout))], layout)

    def error(self) -> Float[np.ndarray, " observed"]:
        """Standard deviations of the errors of the observed quantities, in the order and units of `errors`."""
        return np.array(list(self.errors.values()), np.float32)


def _check_errors(network: ObservingNetwork) -> None:
    if not network.errors or not all(0 < error < np.inf for error in network.errors.values()):
        raise ValueError(
            f"{type(network).__name__} got errors={network.errors}; give a positive standard deviation for each "
            "observed channel, one channel or more."
        )


@dataclasses.dataclass(frozen=True)
class Stations(ObservingNetwork):
    """Stations at fixed random places, uniformly distributed over the area of the sphere.

    Values between grid points are interpolated linearly in latitude and longitude. A station beyond the first or last
    row of the grid has the values of that row.

    Args:
        errors: standard deviation of the error of each observed channel, by the channel's name and in its unit.
        count: number of stations.
        seed: seed of the random places.

    Raises:
        ValueError: `count` is below 1, `errors` is empty, or an error is not positive.
    """

    errors: dict[str, float]
    count: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_errors(self)
        if self.count < 1:
            raise ValueError(f"Stations got count={self.count}; give 1 or more.")

    def places(self, layout: Layout) -> Float[np.ndarray, "place 2"]:
        """Latitude and longitude of each station in degrees, drawn uniformly over the area of the sphere."""
        rng = np.random.default_rng(self.seed)
        latitude = np.rad2deg(np.arcsin(rng.uniform(-1.0, 1.0, self.count)))
        return np.stack([latitude, rng.uniform(0.0, 360.0, self.count)], axis=-1)

    def at_places(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place channel"]:
        """Values of all channels at each station, interpolated between the four grid points around it."""
        latitude, longitude = self.places(layout).T
        rows, columns = (layout.coords()[name] for name in ("latitude", "longitude"))
        # Stations beyond the first or last row are moved to that row, because `locate` does not extrapolate.
        north = locate(rows, "latitude", np.clip(latitude, rows.min(), rows.max()), interpolate=True)
        east = locate(columns, "longitude", longitude, interpolate=True)
        parts = [
            jnp.asarray(a * b, np.float32)[:, None] * x[i, j]
            for i, a in ((north.lower, 1.0 - north.weight), (north.upper, north.weight))
            for j, b in ((east.lower, 1.0 - east.weight), (east.upper, east.weight))
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
        if not 0 < self.width <= 360 or self.thinning < 1:
            raise ValueError(
                f"Swath got width={self.width}, thinning={self.thinning}; give a width above 0 and up to 360 degrees, "
                "and a thinning of 1 or more."
            )

    def places(self, layout: Layout) -> Float[np.ndarray, "place 2"]:
        """Latitude and longitude in degrees of all thinned grid points, inside and outside the band."""
        coordinates = layout.coords()
        axes = (coordinates[name][:: self.thinning] for name in ("latitude", "longitude"))
        return np.stack([x.reshape(-1) for x in np.meshgrid(*axes, indexing="ij")], axis=-1)

    def at_places(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place channel"]:
        """Values of all channels at the thinned grid points, inside and outside the band."""
        return x[:: self.thinning, :: self.thinning].reshape(-1, x.shape[-1])

    def reports(self, cycles: int, layout: Layout) -> Bool[np.ndarray, "time place"]:
        """Which grid points are in the band at which time: no further than half its width from its middle.

        Args:
            cycles: number of times.
            layout: layout of the state.

        Returns:
            True where a place reports, shape (time, place).
        """
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
        if self.size < 1:
            raise ValueError(f"BlockMeans got size={self.size}; give 1 or more.")

    def _weights(self, layout: Layout) -> Float[np.ndarray, "blocks within"]:
        """Area weights of the latitudes within each row of blocks; the weights of a row sum to 1."""
        if layout.shape[0] % self.size or layout.shape[1] % self.size:
            raise ValueError(
                f"BlockMeans got size={self.size}, but blocks of {self.size} x {self.size} points do not fill a grid "
                f"of {layout.shape[:2]}; give a size that divides both numbers."
            )
        # The mean of an instrument is a matter of definition, and published numbers use the cosine. Scores use
        # `diagnostics.area_weights`, which equals it on regular grids without points at the poles.
        weights = np.cos(np.deg2rad(layout.coords()["latitude"])).reshape(-1, self.size)
        return weights / weights.sum(axis=1, keepdims=True)

    def places(self, layout: Layout) -> Float[np.ndarray, "place 2"]:
        """Latitude and longitude of the middle of each block, in degrees."""
        coordinates = layout.coords()
        latitude = np.sum(self._weights(layout) * coordinates["latitude"].reshape(-1, self.size), axis=1)
        longitude = coordinates["longitude"].reshape(-1, self.size).mean(axis=1)
        return np.stack([x.reshape(-1) for x in np.meshgrid(latitude, longitude, indexing="ij")], axis=-1)

    def at_places(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place channel"]:
        """Area-weighted mean of each channel over each block."""
        n, weights = self.size, jnp.asarray(self._weights(layout), x.dtype)
        blocks = x.reshape(len(weights), n, -1, n, x.shape[-1])
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
    return {name: part * float(scales[channel(layout, name)]) for name in names}
