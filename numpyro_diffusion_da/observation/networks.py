"""Where weather is observed: stations, the swath of a satellite, means over blocks, on a latitude-longitude grid.

A network is a linear map of a state (latitude, longitude, channel) to an array (place, channel): it belongs into a
NumPyro program, as the mean of a `Normal`. What it does not observe at a time is missing there, NaN.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_diffusion_da.fields.layout import Layout


def channel(layout: Layout, name: str) -> int:
    """The channel of a variable, "temperature_850" at 850 hPa, "surface_pressure" where it has no levels.

    Raises:
        ValueError: there is none; the sentence lists those that there are.
    """
    names = channel_names(layout)
    if name not in names:
        raise ValueError(f"the state has no channel '{name}'; it has {', '.join(names)}.")
    return names.index(name)


def channel_names(layout: Layout) -> list[str]:
    """A name for each channel of the last axis, see `channel`."""
    return [
        f"{variable.name}_{level}" if variable.levels else variable.name
        for variable in layout.variables
        for level in variable.levels or (None,)
    ]


class ObservingNetwork(abc.ABC):
    """Places that observe some channels, with independent Gaussian errors.

    Attributes:
        errors: standard deviation of the error of each observed channel, by its name, in the channel's unit.
    """

    errors: dict[str, float]

    @abc.abstractmethod
    def places(self, layout: Layout) -> Float[np.ndarray, "place 2"]:
        """Latitude and longitude in degrees."""

    @abc.abstractmethod
    def at_places(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place channel"]:
        """All channels of a state, as the network sees them."""

    def reports(self, cycles: int, layout: Layout) -> Bool[np.ndarray, "time place"]:
        """Which places observe at which time; all of them always, if the network does not say otherwise."""
        return np.ones((cycles, len(self.places(layout))), bool)

    def channels(self, layout: Layout) -> list[int]:
        """The observed channels, in the order of `errors`.

        Raises:
            ValueError: see `channel`.
        """
        return [channel(layout, name) for name in self.errors]

    def observe(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place observed"]:
        """What would be observed of a state without error."""
        return self.at_places(x[..., np.array(self.channels(layout))], layout)

    def error(self) -> Float[np.ndarray, " observed"]:
        """Standard deviations of the errors."""
        return np.array(list(self.errors.values()), np.float32)


def _check_errors(network: ObservingNetwork) -> None:
    if not network.errors or not all(0 < error < np.inf for error in network.errors.values()):
        raise ValueError(
            f"{type(network).__name__} got errors={network.errors}; give a positive standard deviation for each "
            "observed channel, one channel or more."
        )


@dataclasses.dataclass(frozen=True)
class Stations(ObservingNetwork):
    """Fixed points, as many to every part of the sphere of the same area on average.

    Values between grid points are interpolated linearly in latitude and longitude; beyond the last row of the grid they
    are those of that row.

    Args:
        errors: see `ObservingNetwork`.
        count: number of stations.
        seed: of their places.

    Raises:
        ValueError: no station, or an error that is not positive.
    """

    errors: dict[str, float]
    count: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_errors(self)
        if self.count < 1:
            raise ValueError(f"Stations got count={self.count}; give 1 or more.")

    def places(self, layout: Layout) -> Float[np.ndarray, "place 2"]:
        """Uniform in the sine of the latitude and in the longitude."""
        rng = np.random.default_rng(self.seed)
        latitude = np.rad2deg(np.arcsin(rng.uniform(-1.0, 1.0, self.count)))
        return np.stack([latitude, rng.uniform(0.0, 360.0, self.count)], axis=-1)

    def at_places(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place channel"]:
        """Interpolated between the four grid points around each place."""
        latitude, longitude = self.places(layout).T
        coordinates = layout.coords()
        south, north = _between(coordinates["latitude"], latitude)
        # The first longitude once more at the end: around the world.
        west, east = _between(np.append(coordinates["longitude"], 360.0), longitude % 360.0)
        around = layout.shape[1]
        parts = [
            jnp.asarray(a * b, np.float32)[:, None] * x[i, j % around]
            for i, a in ((south.index, south.weight), (north.index, north.weight))
            for j, b in ((west.index, west.weight), (east.index, east.weight))
        ]
        return sum(parts[1:], parts[0])


@dataclasses.dataclass(frozen=True)
class _Neighbor:
    index: Int[np.ndarray, " place"]
    weight: Float[np.ndarray, " place"]


def _between(grid: np.ndarray, values: np.ndarray) -> tuple[_Neighbor, _Neighbor]:
    """The grid points below and above each value, on an ascending grid, and their weights."""
    upper = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    part = np.clip((values - grid[upper - 1]) / (grid[upper] - grid[upper - 1]), 0.0, 1.0)
    return _Neighbor(upper - 1, 1.0 - part), _Neighbor(upper, part)


@dataclasses.dataclass(frozen=True)
class Swath(ObservingNetwork):
    """A satellite that sees a band of longitudes, another one at each time: every n-th grid point of it.

    Args:
        errors: see `ObservingNetwork`.
        width: of the band, degrees of longitude.
        advance: how far the band moves from one time to the next, degrees of longitude.
        thinning: every n-th latitude and longitude.

    Raises:
        ValueError: a width outside (0, 360], thinning below 1, or an error that is not positive.
    """

    errors: dict[str, float]
    width: float = 60.0
    advance: float = 75.0
    thinning: int = 2

    def __post_init__(self) -> None:
        _check_errors(self)
        if not 0 < self.width <= 360 or self.thinning < 1:
            raise ValueError(
                f"Swath got width={self.width}, thinning={self.thinning}; give a width above 0 up to 360 degrees and "
                "take every first, second, ... grid point."
            )

    def places(self, layout: Layout) -> Float[np.ndarray, "place 2"]:
        """All thinned grid points, whether or not they are seen at a time."""
        coordinates = layout.coords()
        axes = (coordinates[name][:: self.thinning] for name in ("latitude", "longitude"))
        return np.stack([x.reshape(-1) for x in np.meshgrid(*axes, indexing="ij")], axis=-1)

    def at_places(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place channel"]:
        """The thinned grid points."""
        return x[:: self.thinning, :: self.thinning].reshape(-1, x.shape[-1])

    def reports(self, cycles: int, layout: Layout) -> Bool[np.ndarray, "time place"]:
        """Those less than half a width from the middle of the band."""
        middle = self.advance * np.arange(cycles)[:, None]
        apart = np.abs((self.places(layout)[None, :, 1] - middle + 180.0) % 360.0 - 180.0)
        return apart <= 0.5 * self.width


@dataclasses.dataclass(frozen=True)
class BlockMeans(ObservingNetwork):
    """Means over blocks of grid points, by area: what an instrument of a wide footprint sees.

    Args:
        errors: see `ObservingNetwork`.
        size: grid points of a block along each axis.

    Raises:
        ValueError: a size below 1, or an error that is not positive; when used, a grid that blocks do not fill.
    """

    errors: dict[str, float]
    size: int = 4

    def __post_init__(self) -> None:
        _check_errors(self)
        if self.size < 1:
            raise ValueError(f"BlockMeans got size={self.size}; give 1 or more.")

    def _weights(self, layout: Layout) -> Float[np.ndarray, "blocks within"]:
        """Of the latitudes of each row of blocks; sums are 1."""
        if layout.shape[0] % self.size or layout.shape[1] % self.size:
            raise ValueError(f"blocks of {self.size} x {self.size} points do not fill a grid of {layout.shape[:2]}.")
        weights = np.cos(np.deg2rad(layout.coords()["latitude"])).reshape(-1, self.size)
        return weights / weights.sum(axis=1, keepdims=True)

    def places(self, layout: Layout) -> Float[np.ndarray, "place 2"]:
        """The middles of the blocks."""
        coordinates = layout.coords()
        latitude = np.sum(self._weights(layout) * coordinates["latitude"].reshape(-1, self.size), axis=1)
        longitude = coordinates["longitude"].reshape(-1, self.size).mean(axis=1)
        return np.stack([x.reshape(-1) for x in np.meshgrid(latitude, longitude, indexing="ij")], axis=-1)

    def at_places(self, x: Float[Array, "latitude longitude channel"], layout: Layout) -> Float[Array, "place channel"]:
        """The means."""
        n, weights = self.size, jnp.asarray(self._weights(layout), x.dtype)
        blocks = x.reshape(len(weights), n, -1, n, x.shape[-1])
        return jnp.einsum("iajbc,ia->ijc", blocks, weights / n).reshape(-1, x.shape[-1])


def fraction_of(
    scales: Sequence[float] | np.ndarray, names: Sequence[str], layout: Layout, part: float
) -> dict[str, float]:
    """Errors that are a part of each channel's scale, by name: for `ObservingNetwork.errors`.

    Args:
        scales: of all channels of the state, for instance standard deviations of the climate, in their units.
        names: the channels that are observed.
        layout: of the state.
        part: 0.2 for a fifth.

    Raises:
        ValueError: see `channel`.
    """
    return {name: part * float(scales[channel(layout, name)]) for name in names}
