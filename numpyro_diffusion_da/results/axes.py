"""Names, lengths and coordinates of the axes of a result, and the checks that they fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.fields import datasets as gridded_data

if TYPE_CHECKING:
    from numpyro_diffusion_da.results.result import FilterResult

Dims = Mapping[str, Sequence[str]]
Coords = Mapping[str, Any]

PARTICLE = ("chain", "draw", "time")
CHAIN = ("chain", "time")
SHARED = {"chain", "draw", "time"}


class Axes:
    """The names, lengths and coordinates of axes, and the checks that they fit each other."""

    def __init__(self, result: FilterResult, time: Any, dims: Dims, coords: Coords) -> None:
        chains, draws, steps = result.posterior[result.latent_name].shape[:3]
        self.result = result
        self.dims = {site: tuple(names) for site, names in dims.items()}
        self.sizes: dict[str, int] = {}
        self.site_names = {*result.posterior, *result.observed_data}
        self.given = dict(coords)
        for name in SHARED & set(coords):
            instead = "give it as time=..." if name == "time" else "it numbers the filters or their particles"
            raise ValueError(f"coords cannot set '{name}': {instead}.")
        if time is not None and len(time) != steps:
            raise ValueError(f"time has {len(time)} values, but the filter made {steps} steps; give one value a step.")
        self.values: dict[str, Any] = {
            "chain": np.arange(chains),
            "draw": np.arange(draws),
            "time": np.arange(steps) if time is None else time,
        }
        layout = result.layout
        self.layout_values: dict[str, Any] = {} if layout is None else layout.coords()
        self.fields = layout
        if layout is None or not layout.variables or result.posterior[result.latent_name].shape[3:] != layout.shape:
            self.fields = None
        else:
            self.layout_values |= layout.level_coords()

    def _names(self, site: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Names of a site's own axes."""
        layout = self.result.layout
        if site in self.dims:
            names = self.dims[site]
            full = max((len(s) for s in self._site_shapes(site)), default=0)
            if len(names) != full:
                raise ValueError(f"dims names {len(names)} axes {names} of '{site}', which has {full} after time.")
            return names[: len(shape)]  # the log-likelihood of a multivariate site lacks the last ones
        if site == self.result.latent_name and layout is not None and layout.shape == shape:
            return layout.dims
        return tuple(f"{site}_dim_{i}" for i in range(len(shape)))

    def _site_shapes(self, site: str) -> list[tuple[int, ...]]:
        result = self.result
        arrays = [(result.posterior, 3), (result.posterior_predictive, 3), (result.observed_data, 1)]
        return [group[site].shape[lead:] for group, lead in arrays if site in group]

    def variable(
        self,
        site: str,
        values: np.ndarray,
        leading: tuple[str, ...],
        attributes: dict[str, str] | None = None,
        names: tuple[str, ...] | None = None,
    ) -> tuple[tuple[str, ...], np.ndarray, dict[str, str]]:
        """(dims, values, attributes) as xarray takes a variable."""
        shape = values.shape[len(leading) :]
        do = "Rename the site." if names else f"Name the axes yourself: dims={{'{site}': [...]}}."
        names = names or self._names(site, shape)
        for name, size in zip(names, shape, strict=True):
            if name in SHARED or names.count(name) > 1 or name in self.site_names:
                raise ValueError(
                    f"'{name}' cannot name an axis of '{site}': it is the name of a site or of another axis. {do}"
                )
            if self.sizes.setdefault(name, size) != size:
                raise ValueError(
                    f"dimension '{name}' has {size} values in '{site}', but {self.sizes[name]} in another site; "
                    "give the two different names in dims."
                )
            coordinate = self.given.get(name)
            if coordinate is not None and len(coordinate) != size:
                raise ValueError(f"coords gives '{name}' {len(coordinate)} values, but '{site}' has {size} along it.")
        return (*leading, *names), values, attributes or {}

    def sites(self, arrays: Mapping[str, np.ndarray], leading: tuple[str, ...]) -> dict[str, Any]:
        """All sites of a group."""
        latent, layout = self.result.latent_name, self.result.layout
        units = {} if layout is None else {latent: {"units": layout.units}}
        return {site: self.variable(site, values, leading, units.get(site)) for site, values in arrays.items()}

    def with_state(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """All sites of a group that has the state, which is cut into its fields where the layout names them."""
        latent, layout = self.result.latent_name, self.fields
        if layout is None or latent not in arrays:
            return self.sites(arrays, PARTICLE)
        if latent in self.dims:
            raise ValueError(
                f"dims names the axes of '{latent}', but its layout cuts it into the fields "
                f"{', '.join(v.name for v in layout.variables)}, whose axes have names; leave '{latent}' out."
            )
        others = {name: values for name, values in arrays.items() if name != latent}
        fields = {}
        for name, (dims, values, _) in layout.split_by_levels(arrays[latent]).items():
            if name in others or name in SHARED or name in (*layout.dims, *layout.level_coords()):
                raise ValueError(
                    f"the state '{latent}' has a field '{name}', which is the name of another site or of an axis; "
                    "rename that site, or the variable of the layout."
                )
            attributes = {**gridded_data.attributes(layout.variable(name)), "site": latent}
            fields[name] = self.variable(name, values, PARTICLE, attributes, dims)
        return {**fields, **self.sites(others, PARTICLE)}

    def coordinates(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """A coordinate for every dimension of a group: ArviZ's plots need one even where it only counts."""
        used = dict.fromkeys(name for dims, _, _ in variables.values() for name in dims)
        values = {**self.layout_values, **self.given, **self.values}
        known = {} if self.fields is None else gridded_data.AXIS_ATTRIBUTES
        return {
            name: _coordinate(name, values.get(name, np.arange(self.sizes.get(name, 0))), known.get(name, {}))
            for name in used
        }

    def check_all_used(self) -> None:
        """A name that fits nothing is a misspelt one."""
        if unknown := set(self.dims) - self.site_names:
            raise ValueError(f"dims has {sorted(unknown)}, but the sites are {sorted(self.site_names)}.")
        if unknown := set(self.given) - set(self.sizes):
            raise ValueError(f"coords has {sorted(unknown)}, but the dimensions are {sorted(self.sizes)}.")


def _coordinate(name: str, values: Any, known: Mapping[str, str]) -> tuple[str, Any, dict[Any, Any]]:
    """(dim, values, attributes), whatever the coordinates were given as; `known` where they have no attributes."""
    import xarray

    if isinstance(values, (xarray.DataArray, xarray.Variable)):
        return name, values.values, dict(values.attrs)
    return name, values, dict(known)
