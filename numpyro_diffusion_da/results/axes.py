"""Names, lengths and coordinates of the axes of a result, and checks that they are consistent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import require, shown, values_along_axis
from numpyro_diffusion_da.fields import datasets as gridded_data
from numpyro_diffusion_da.fields.times import time_axis

if TYPE_CHECKING:
    from numpyro_diffusion_da.results.result import FilterResult

Dims = Mapping[str, Sequence[str]]
"""Names of the axes of each site after time."""

Coords = Mapping[str, Any]
"""Coordinate values of each dimension."""

PARTICLE = ("chain", "draw", "time")
"""Leading axes of arrays with one value per particle."""

CHAIN = ("chain", "time")
"""Leading axes of arrays with one value per chain and step."""

SHARED = {"chain", "draw", "time"}
"""Names of axes that no site may use for axes of its own."""


class Axes:
    """Names, lengths and coordinates of the axes of one result, collected while its variables are made.

    Args:
        result: result of a filter run.
        time: coordinate of the time axis, one value per step; None for 0, 1, ...
        dims: names of the axes of sites after time.
        coords: coordinate values of dimensions.

    Raises:
        TypeError: `dims` or `coords` is not a mapping from names to lists.
        ValueError: `coords` sets chain, draw or time, the length of `time` is not the number of steps, or times do not
            increase.
    """

    def __init__(self, result: FilterResult, time: Any, dims: Dims, coords: Coords) -> None:
        for name, value in (("dims", dims), ("coords", coords)):
            require(value, Mapping, "the conversion of a result", name, '{"station": ["Oslo", "Bergen"]}')
        chains, draws, steps = result.sizes
        self.result = result
        self.dims = {site: names_of_axes(site, names) for site, names in dims.items()}
        self.sizes: dict[str, int] = {}
        reduced = (name for arrays in result.reduced.values() for name in arrays)
        self.site_names = {*result.posterior, *reduced, *result.observed_data, *result.metadata}
        self.given = {name: coordinate_values(name, values) for name, values in coords.items()}
        for name in SHARED & set(coords):
            instead = "give it as time=..." if name == "time" else "it counts chains or particles; leave it out"
            raise ValueError(f"coords cannot set '{name}': {instead}.")
        self.values: dict[str, Any] = {
            "chain": np.arange(chains),
            "draw": np.arange(draws),
            "time": times(time, steps),
            "quantile": np.array(result.quantiles),
        }
        layout = result.layout
        self.layout_values: dict[str, Any] = {} if layout is None else layout.coords()
        self.fields = layout
        states = [
            (result.posterior, 3),
            *((arrays, 2) for kind, arrays in result.reduced.items() if kind != "quantile"),
        ]
        shapes = [arrays[result.latent_name].shape[n:] for arrays, n in states if result.latent_name in arrays]
        if layout is None or not layout.variables or any(shape != layout.shape for shape in shapes):
            self.fields = None
        else:
            self.layout_values |= layout.level_coords()

    def _names(self, site: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Names of the axes of a site after chain, draw and time."""
        layout = self.result.layout
        if site in self.dims:
            names = self.dims[site]
            full = max((len(s) for s in self._site_shapes(site)), default=0)
            if len(names) != full:
                raise ValueError(f"dims names {len(names)} axes {names} of '{site}', which has {full} after time.")
            # The log-likelihood of a multivariate site lacks the last axes.
            return names[: len(shape)]
        if site == self.result.latent_name and layout is not None and layout.shape == shape:
            return layout.dims
        return tuple(f"{site}_dim_{i}" for i in range(len(shape)))

    def _site_shapes(self, site: str) -> list[tuple[int, ...]]:
        """Shapes of a site after its leading axes, in each group that has the site."""
        result = self.result
        arrays = [
            *((found, 3 if kind == "quantile" else 2) for kind, found in result.reduced.items()),
            (result.posterior, 3),
            (result.posterior_predictive, 3),
            (result.observed_data, 1),
            (result.metadata, 1),
        ]
        return [group[site].shape[lead:] for group, lead in arrays if site in group]

    def variable(
        self,
        site: str,
        values: np.ndarray,
        leading: tuple[str, ...],
        attributes: dict[str, str] | None = None,
        names: tuple[str, ...] | None = None,
    ) -> tuple[tuple[str, ...], np.ndarray, dict[str, str]]:
        """Make a variable as xarray takes it: (dims, values, attributes).

        Args:
            site: name of the variable.
            values: array of the variable.
            leading: names of the leading axes.
            attributes: attributes of the variable.
            names: names of the other axes; None to take them from `dims`, the layout, or numbers.

        Raises:
            ValueError: a name of an axis is already taken, or an axis has another length elsewhere or in `coords`.
        """
        shape = values.shape[len(leading) :]
        do = "Rename the site." if names else f"Name the axes yourself: dims={{'{site}': [...]}}."
        names = names or self._names(site, shape)
        for name, size in zip(names, shape, strict=True):
            if name in SHARED or names.count(name) > 1 or name in self.site_names:
                raise ValueError(
                    f"'{name}' cannot name an axis of '{site}': it already names a site or another axis. {do}"
                )
            if self.sizes.setdefault(name, size) != size:
                raise ValueError(
                    f"dimension '{name}' has {size} values in '{site}', but {self.sizes[name]} in another site; "
                    "give these axes different names in dims."
                )
            coordinate = self.given.get(name)
            if coordinate is not None and len(coordinate) != size:
                raise ValueError(f"coords gives '{name}' {len(coordinate)} values, but '{site}' has {size} along it.")
        return (*leading, *names), values, attributes or {}

    def sites(self, arrays: Mapping[str, np.ndarray], leading: tuple[str, ...]) -> dict[str, Any]:
        """Variables of all sites of a group."""
        latent, layout = self.result.latent_name, self.result.layout
        units = {} if layout is None else {latent: {"units": layout.units}}
        return {site: self.variable(site, values, leading, units.get(site)) for site, values in arrays.items()}

    def with_state(self, arrays: Mapping[str, np.ndarray], leading: tuple[str, ...] = PARTICLE) -> dict[str, Any]:
        """Variables of all sites of a group; the state is split into fields if its layout has variables.

        Args:
            arrays: values of each site.
            leading: names of their leading axes.

        Raises:
            ValueError: `dims` names axes of the split state, or the name of a field is already taken.
        """
        latent, layout = self.result.latent_name, self.fields
        if layout is None or latent not in arrays:
            return self.sites(arrays, leading)
        if latent in self.dims:
            raise ValueError(
                f"dims names the axes of '{latent}', but its layout splits it into the fields "
                f"{', '.join(v.name for v in layout.variables)}, whose axes have names; leave '{latent}' out of dims."
            )
        others = {name: values for name, values in arrays.items() if name != latent}
        fields = {}
        for name, (dims, values, _) in layout.split_by_levels(arrays[latent]).items():
            if name in others or name in SHARED or name in (*layout.dims, *layout.level_coords()):
                raise ValueError(
                    f"the state '{latent}' has a field '{name}', which is the name of another site or of an axis; "
                    "rename the site or the variable of the layout."
                )
            attributes = {**gridded_data.attributes(layout.variable(name)), "site": latent}
            fields[name] = self.variable(name, values, leading, attributes, dims)
        return {**fields, **self.sites(others, leading)}

    def coordinates(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Coordinates of all dimensions of a group; those without values count 0, 1, ..., as ArviZ's plots require."""
        used = dict.fromkeys(name for dims, _, _ in variables.values() for name in dims)
        values = {**self.layout_values, **self.given, **self.values}
        known = {} if self.fields is None else gridded_data.AXIS_ATTRIBUTES
        return {
            name: _coordinate(name, values.get(name, np.arange(self.sizes.get(name, 0))), known.get(name, {}))
            for name in used
        }

    def check_all_used(self) -> None:
        """Check that every name in `dims` and `coords` is in use, because others are misspelled.

        Raises:
            ValueError: a name is not in use.
        """
        if unknown := set(self.dims) - self.site_names:
            raise ValueError(f"dims has {sorted(unknown)}, but the sites are {sorted(self.site_names)}.")
        if unknown := set(self.given) - set(self.sizes):
            raise ValueError(f"coords has {sorted(unknown)}, but the dimensions are {sorted(self.sizes)}.")


def times(time: Any, steps: int) -> Any:
    """Coordinate of the time axis of a result.

    Args:
        time: one value per step, or None for 0, 1, ...
        steps: number of steps.

    Raises:
        ValueError: the number of values is not the number of steps, or they do not increase.
    """
    return np.arange(steps) if time is None else time_axis(time, steps)


def names_of_axes(site: str, names: Any) -> tuple[str, ...]:
    """Names of the axes of a site, as a tuple.

    Args:
        site: name of the site.
        names: its names in `dims`.

    Raises:
        TypeError: the names are no sequence of text.
    """
    if not isinstance(names, (str, bytes, Mapping, Set)) and isinstance(names, Iterable):
        found = tuple(names) if getattr(names, "ndim", 1) == 1 else (None,)
        if all(isinstance(name, str) and name for name in found):
            return tuple(map(str, found))
    raise TypeError(f"dims gives '{site}' {shown(names)}; give a list of names, as in dims={{'{site}': ['station']}}.")


def coordinate_values(name: str, values: Any) -> Any:
    """Coordinate values of a dimension, after a check that they are values along one axis.

    Args:
        name: name of the dimension.
        values: its values in `coords`.

    Raises:
        TypeError: they are not.
    """
    return values_along_axis(values, f"the dimension '{name}' in coords")


def _coordinate(name: str, values: Any, known: Mapping[str, str]) -> tuple[str, Any, dict[Any, Any]]:
    """Make a coordinate as xarray takes it: (dim, values, attributes); `known` if `values` has no attributes."""
    import xarray

    if isinstance(values, (xarray.DataArray, xarray.Variable)):
        return name, values.values, dict(values.attrs)
    return name, values, dict(known)
