"""Base class of `Filter` and `OnlineFilter`: smoothing, conversion and summary of a result."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpyro_diffusion_da.inference.compilation import HoldsCompiled
from numpyro_diffusion_da.results import smoothing
from numpyro_diffusion_da.results.result import FilterResult

if TYPE_CHECKING:
    import xarray


class HasFilterResult(HoldsCompiled, abc.ABC):
    """Base class of objects with a `FilterResult`, which they smooth, convert and summarize.

    Attributes:
        time: default of the argument `time` of conversions; likewise `dims` and `coords`.
    """

    time: Any = None
    dims: Mapping[str, Sequence[str]] | None = None
    coords: Mapping[str, Any] | None = None

    @property
    @abc.abstractmethod
    def result(self) -> FilterResult:
        """Result as numpy arrays: ``result.posterior[site]`` has the shape (chain, draw, time, ...).

        Raises:
            RuntimeError: there is no result yet.
        """

    def smoothed(self, lag: int | None = None) -> FilterResult:
        """Result smoothed by the lines of its particles: states given later observations too.

        The functions are `results.trajectories` and `results.fixed_lag`. A filter that moves or localizes its ancestors
        has no genealogy, and smooths with its own lag only: `FAAPF(model, taper=taper, lag=5)`, then `smoothed(5)`.

        Args:
            lag: number of later steps whose observations are used, 0 or more (`fixed_lag`); None for all observations,
                so that draws are whole trajectories (`trajectories`).

        Returns:
            Smoothed result with arrays of the same shapes.

        Raises:
            RuntimeError: there is no result yet.
            ValueError: `lag` is negative; or the result has no genealogy (the filter is an ensemble Kalman filter, or
                moves or localizes ancestors), and the filter was not given this lag.
        """
        return smoothing.trajectories(self.result) if lag is None else smoothing.fixed_lag(self.result, lag)

    def _stored_tree(self) -> xarray.DataTree | None:
        """Tree of the result as it is stored, with its own labels; None if it is in memory only."""
        return None

    def _labels(self, **given: Any) -> dict[str, Any]:
        """Labels for a conversion: those given, else those of this object."""
        return {name: getattr(self, name) if value is None else value for name, value in given.items()}

    def _at_lag(self, lag: int | None) -> FilterResult:
        """Result of the filter for a lag of 0, and the smoothed one for any other lag."""
        return self.result if lag == 0 else self.smoothed(lag)

    def to_datatree(
        self,
        *,
        lag: int | None = 0,
        time: Any = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Any] | None = None,
    ) -> xarray.DataTree:
        """Result as an `xarray.DataTree`, made by `results.to_datatree`.

        If the run has a directory, and none of these arguments is given, the tree is opened from the directory, and its
        arrays are read when they are used.

        Args:
            lag: number of later steps whose observations each draw has seen: 0 for the filter, more for fixed-lag
                smoothing, None for whole trajectories given all observations (see `smoothed`).
            time: coordinate of the time axis, one value per step; by default that of this filter, else 0, 1, ...
            dims: names of a site's axes after time: ``{"y": ["station"]}``; by default those of this filter.
            coords: coordinates of dimensions: ``{"station": ["Oslo", "Bergen"]}``; by default those of this filter.

        Raises:
            RuntimeError: there is no result yet.
            ValueError: `time`, `dims` or `coords` do not fit the result, or the result cannot be smoothed with this
                lag (see `smoothed`).
        """
        from numpyro_diffusion_da.results import convert

        if lag == 0 and time is None and dims is None and coords is None:
            stored = self._stored_tree()
            if stored is not None:
                return stored
        return convert.to_datatree(self._at_lag(lag), **self._labels(time=time, dims=dims, coords=coords))

    def to_arviz(
        self,
        *,
        lag: int | None = 0,
        time: Any = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Any] | None = None,
    ) -> Any:
        """Result in the form that the installed ArviZ takes, made by `results.to_arviz`.

        `results.to_arviz` explains what ArviZ's diagnostics mean for particles.

        Args:
            lag: number of later steps whose observations each draw has seen: 0 for the filter, more for fixed-lag
                smoothing, None for whole trajectories given all observations (see `smoothed`).
            time: coordinate of the time axis, one value per step; by default that of this filter, else 0, 1, ...
            dims: names of a site's axes after time: ``{"y": ["station"]}``; by default those of this filter.
            coords: coordinates of dimensions: ``{"station": ["Oslo", "Bergen"]}``; by default those of this filter.

        Raises:
            RuntimeError: there is no result yet.
            ValueError: `time`, `dims` or `coords` do not fit the result, or the result cannot be smoothed with this
                lag (see `smoothed`).
        """
        from numpyro_diffusion_da.results import convert

        return convert.to_arviz(self._at_lag(lag), **self._labels(time=time, dims=dims, coords=coords))

    def print_summary(self) -> None:
        """Print a summary of the result: weights, evidence, cost, and the state at the last time.

        `results.summary_table` makes the tables.

        Raises:
            RuntimeError: there is no result yet.
        """
        from rich.console import Console

        from numpyro_diffusion_da.results.summary import summary_table

        Console().print(summary_table(self.result))
