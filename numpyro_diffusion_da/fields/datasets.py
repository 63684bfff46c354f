"""Gridded reanalysis (ERA5 and what looks like it) as an `xarray.Dataset` <-> states as one array.

A state is (latitude, longitude, channel), its `Layout` names the variables of the channels. `read_states` fills states
from a dataset: files of GenCast's package (batch, time, lat, lon, level), WeatherBench 2 (time, level, latitude,
longitude in any order), or ECMWF's short names. `to_dataset` is the way back, with the names that WeatherBench expects.

Nothing is converted silently: another unit, grid or level than the layout's is refused. Only what is needed is loaded,
so a dataset may be a lazily opened archive of decades.

xarray is imported where it is used: it takes longer to load than the rest of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from numpyro_diffusion_da.fields.interpolation import as_slice, locate, positions, words
from numpyro_diffusion_da.fields.units import same_unit

if TYPE_CHECKING:
    import xarray

    from numpyro_diffusion_da.fields.layout import Layout, Variable

SPELLINGS_OF_DIMENSIONS = {
    "time": ("valid_time",),
    "level": ("isobaricInhPa", "pressure_level"),
    "latitude": ("lat",),
    "longitude": ("lon",),
}
SHORT_NAMES = {
    "10m_u_component_of_wind": ("u10", "10u"),
    "10m_v_component_of_wind": ("v10", "10v"),
    "2m_temperature": ("t2m", "2t"),
    "geopotential": ("z",),
    "geopotential_at_surface": ("z",),  # told apart by its dimensions
    "land_sea_mask": ("lsm",),
    "mean_sea_level_pressure": ("msl",),
    "sea_surface_temperature": ("sst",),
    "specific_humidity": ("q",),
    "temperature": ("t",),
    "total_precipitation": ("tp",),
    "u_component_of_wind": ("u",),
    "v_component_of_wind": ("v",),
    "vertical_velocity": ("w",),
}
PRECIPITATION = "total_precipitation_12hr"
# Sums over shorter intervals that end at the named time; ERA5's own total_precipitation is that of one hour.
PARTS_OF_PRECIPITATION = (("total_precipitation_6hr", 6), ("total_precipitation", 1))

STANDARD_NAMES = {
    # CF conventions
    "10m_u_component_of_wind": "eastward_wind",
    "10m_v_component_of_wind": "northward_wind",
    "2m_temperature": "air_temperature",
    "geopotential": "geopotential",
    "mean_sea_level_pressure": "air_pressure_at_mean_sea_level",
    "sea_surface_temperature": "sea_surface_temperature",
    "specific_humidity": "specific_humidity",
    "temperature": "air_temperature",
    "total_precipitation_12hr": "lwe_thickness_of_precipitation_amount",
    "u_component_of_wind": "eastward_wind",
    "v_component_of_wind": "northward_wind",
    "vertical_velocity": "lagrangian_tendency_of_air_pressure",
}
AXIS_ATTRIBUTES = {
    "time": {"standard_name": "time", "long_name": "time"},
    "number": {"standard_name": "realization", "long_name": "ensemble member", "units": "1"},
    "realization": {"standard_name": "realization", "long_name": "ensemble member", "units": "1"},
    "level": {"standard_name": "air_pressure", "long_name": "pressure level", "units": "hPa", "positive": "down"},
    "latitude": {"standard_name": "latitude", "long_name": "latitude", "units": "degrees_north"},
    "longitude": {"standard_name": "longitude", "long_name": "longitude", "units": "degrees_east"},
}


def read_states(
    dataset: xarray.Dataset,
    layout: Layout,
    times: Any,
    *,
    fill: Mapping[str, float] | None = None,
    interpolate: bool = False,
    without_precipitation: bool = False,
) -> Float[np.ndarray, "time latitude longitude channel"]:
    """States at given times.

    Names: the long names of ERA5, or ECMWF's short ones (t2m or 2t, z, msl, ...); latitude in either order, longitude
    from 0 or from -180. The grid of the layout must be the dataset's, or a subset of its points (1 degree out of 0.25).
    12 h precipitation is summed from two 6 h values or twelve hourly ones where it is not there itself.

    Args:
        dataset: fields in the units of the layout; a variable without the attribute `units` is taken to be.
        layout: of the state, dimensions (latitude, longitude, channel), with variables.
        times: UTC, anything numpy takes as datetime64; shape (time,).
        fill: value for each variable with `undefined` points, in its unit: what a state holds where there is none.
        interpolate: bilinear where a point is not among the dataset's. A value next to a NaN is NaN.
        without_precipitation: total_precipitation_12hr is 0 where the dataset has none. For initial frames: it is no
            input of GenCast.

    Returns:
        float32, shape (time, *layout.shape), without NaN.

    Raises:
        ValueError: a variable, level or time is missing, or in another unit; another grid; an axis too many; NaN where
            the layout expects a value; no `fill` for a variable that needs one.
    """
    latitude, longitude = _grid_of(layout)
    fill = dict(fill or {})
    source = _Source(dataset, latitude, longitude, interpolate)
    wanted = _datetimes(times)
    states = np.empty((len(wanted), *layout.shape), np.float32)
    for variable in layout.variables:
        if variable.name == PRECIPITATION:
            values = _precipitation(source, variable, wanted, without_precipitation)
        else:
            values = source.read(variable.name, variable.units, wanted, variable.levels)
        states[..., layout.channels(variable.name)] = np.moveaxis(_complete(values, variable, fill, source), 1, -1)
    return states


def to_dataset(states: Any, layout: Layout, axes: Mapping[str, Any]) -> xarray.Dataset:
    """States as a dataset, one variable for every field, as WeatherBench 2 and WeatherBench-X name and order them.

    Variables have dimensions (the leading axes, level where they have levels, latitude, longitude), CF attributes, and
    NaN where they are undefined; they are float32, here and in files. A level that a variable lacks is NaN.

    Args:
        states: shape (leading axes, *layout.shape).
        layout: of the state, with variables.
        axes: name -> values of each leading axis, in their order: ``{"time": times}`` for an analysis,
            ``{"number": range(50), "time": times}`` for an ensemble of particles.

    Raises:
        ValueError: shape, axes and layout do not fit.
    """
    import xarray

    latitude, longitude = _grid_of(layout)
    states = np.asarray(states, np.float32)
    lead = states.shape[: states.ndim - len(layout.shape)]
    if states.shape[len(lead) :] != layout.shape or len(lead) != len(axes):
        raise ValueError(
            f"got states of shape {states.shape} with the leading axes {list(axes)}; "
            f"expected one name for each axis before {layout.shape}."
        )
    for (name, values), size in zip(axes.items(), lead, strict=True):
        if name in ("level", "latitude", "longitude"):
            raise ValueError(f"'{name}' is an axis of the state itself; give the leading axis another name.")
        if len(values) != size:
            raise ValueError(f"'{name}' has {len(values)} values, but the axis has {size}; give one each.")
    levels = sorted({level for variable in layout.variables for level in variable.levels})
    coordinates: dict[str, Any] = {name: np.asarray(values) for name, values in axes.items()}
    if "time" in axes:
        coordinates["time"] = _datetimes(axes["time"])
    coordinates |= {"level": np.asarray(levels)} if levels else {}
    coordinates |= {"latitude": latitude, "longitude": longitude}
    parts = layout.split(states)
    variables: dict[str, xarray.Variable] = {}
    for variable in layout.variables:
        dims, values, _ = parts[variable.name]
        if variable.levels:
            at = [variable.levels.index(level) if level in variable.levels else -1 for level in levels]
            values = np.take(values, at, axis=len(lead))
            values[(slice(None),) * len(lead) + (np.asarray(at) < 0,)] = np.nan
        encoding = {"dtype": "float32"}
        variables[variable.name] = xarray.Variable((*axes, *dims), values, attributes(variable), encoding)
    return xarray.Dataset(
        variables,
        {name: (name, values, AXIS_ATTRIBUTES.get(name, {})) for name, values in coordinates.items()},
        {"Conventions": "CF-1.11"},
    )


def attributes(variable: Variable) -> dict[str, str]:
    """CF attributes of a variable."""
    names = {"long_name": variable.name.replace("_", " "), "units": variable.units}
    if standard := STANDARD_NAMES.get(variable.name):
        names["standard_name"] = standard
    return names


def grid(dataset: xarray.Dataset) -> tuple[Float[np.ndarray, " latitude"], Float[np.ndarray, " longitude"]]:
    """Latitudes from south to north and longitudes from 0 to 360, in degrees, of a dataset in any order.

    Raises:
        ValueError: it has no latitude and longitude.
    """
    dataset = _renamed(dataset)
    latitude, longitude = (_axis_values(dataset, name) for name in ("latitude", "longitude"))
    return np.sort(latitude), np.sort(np.mod(longitude, 360.0))


def dataset_times(dataset: xarray.Dataset) -> np.ndarray:
    """UTC of a dataset's time axis: of the coordinate `datetime` where `time` is relative, as in GenCast's files.

    Returns:
        datetime64, shape (time,).

    Raises:
        ValueError: no times, times that are not dates, or those of several batches.
    """
    coords = dataset.coords
    name = "datetime" if "datetime" in coords else "time"
    if name not in coords:
        raise ValueError("the dataset has no coordinate time; add one, of type datetime64 and in UTC.")
    values = np.asarray(coords[name].values)
    if values.dtype.kind != "M":
        raise ValueError(f"the dataset's {name} is of type {values.dtype}, expected datetime64; decode it first.")
    if values.size != dataset.sizes.get("time", 1):
        raise ValueError(
            f"the dataset's {name} has shape {values.shape}, expected one value for each of the "
            f"{dataset.sizes.get('time', 1)} times; select one of the batch, as in dataset.isel(batch=0)."
        )
    return values.reshape(-1).astype("datetime64[ns]")


def undefined_mask(
    dataset: xarray.Dataset, name: str, latitude: Any, longitude: Any, *, interpolate: bool = False
) -> Bool[np.ndarray, "latitude longitude"]:
    """Where a variable has no value, such as sea surface temperature over land: for `layout.Undefined`.

    Args:
        dataset: see `read_states`. Of a variable with times the first is taken: the mask does not change.
        name: a variable on a single surface.
        latitude: degrees north, shape (latitude,).
        longitude: degrees east, shape (longitude,).
        interpolate: see `read_states`; must be the same there.

    Raises:
        ValueError: no such variable, an axis too many, or another grid.
    """
    return np.isnan(_Source(dataset, latitude, longitude, interpolate).read_static(name))


def static_field(
    dataset: xarray.Dataset, name: str, latitude: Any, longitude: Any, *, interpolate: bool = False
) -> Float[np.ndarray, "latitude longitude"]:
    """A field that does not change in time, such as geopotential_at_surface (m2 s-2) or land_sea_mask.

    Arguments as `undefined_mask`.

    Returns:
        float32, shape (latitude, longitude), without NaN.

    Raises:
        ValueError: no such variable, another unit, an axis too many, another grid, or NaN.
    """
    values = _Source(dataset, latitude, longitude, interpolate).read_static(name)
    if bad := int(np.sum(~np.isfinite(values))):
        raise ValueError(f"'{name}' is NaN or infinite at {bad} of {values.size} points; give a complete field.")
    return values


# --- one dataset on one grid ----------------------------------------------------------------------------------------


class _Source:
    """A dataset under the names used here, and where the points of a grid are in it."""

    def __init__(self, dataset: xarray.Dataset, latitude: Any, longitude: Any, interpolate: bool) -> None:
        self.dataset = _renamed(dataset)
        self.latitude, self.longitude = np.asarray(latitude, float), np.asarray(longitude, float)
        self.points = {
            name: locate(_axis_values(self.dataset, name), name, target, interpolate)
            for name, target in (("latitude", self.latitude), ("longitude", self.longitude))
        }

    def find(self, name: str) -> str | None:
        """The dataset's own name of a variable."""
        candidates = (name, *SHORT_NAMES.get(name, ()))
        return next((c for c in candidates if c in self.dataset.data_vars), None)

    def read(
        self, name: str, units: str, times: np.ndarray, levels: tuple[int, ...] = ()
    ) -> Float[np.ndarray, "time levels latitude longitude"]:
        """Values at times and levels (an axis of length 1 for a surface variable)."""
        array = self._array(name, units, ("time", "level") if levels else ("time",))
        array = array.isel(time=as_slice(self._times_at(name, times)))
        if levels:
            array = array.isel(level=as_slice(self._levels_at(name, array, levels)))
        values = self._on_grid(array)
        return values if levels else values[:, None]

    def read_static(self, name: str) -> Float[np.ndarray, "latitude longitude"]:
        """Values of a surface variable, at the first time where it has times."""
        own = self.find(name)
        with_time = own is not None and "time" in self.dataset[own].dims
        units = {"geopotential_at_surface": "m2 s-2", "land_sea_mask": "1"}.get(name)
        array = self._array(name, units, ("time",) if with_time else ())
        return self._on_grid(array.isel(time=0) if with_time else array)

    def has_times(self, times: np.ndarray) -> bool:
        """Whether all of the times are there."""
        return bool(np.isin(times, dataset_times(self.dataset)).all())

    def where(self, bad: np.ndarray) -> str:
        """The first point of a mask (..., latitude, longitude), in words."""
        at = np.argwhere(bad)[0]
        return f"the first at latitude {self.latitude[at[-2]]:g}, longitude {self.longitude[at[-1]]:g}"

    def _array(self, name: str, units: str | None, leading: tuple[str, ...]) -> xarray.DataArray:
        """A variable, with axes (leading, latitude, longitude), in the given unit."""
        own = self.find(name)
        if own is None:
            tried = " or ".join(f"'{c}'" for c in (name, *SHORT_NAMES.get(name, ())))
            has = ", ".join(map(str, self.dataset.data_vars)) or "nothing"
            raise ValueError(f"the dataset has no variable {tried}; it has {has}. Rename or add it.")
        array = self.dataset[own]
        axes = (*leading, "latitude", "longitude")
        for axis in leading:
            if axis not in array.dims and axis in array.coords and array.coords[axis].ndim == 0:
                array = array.expand_dims(axis)
        missing = [axis for axis in axes if axis not in array.dims]
        extra = [axis for axis in array.dims if axis not in axes and array.sizes[axis] != 1]
        if missing or extra:
            sizes = ", ".join(f"{axis}: {size}" for axis, size in array.sizes.items())
            do = f"select one, as in dataset.isel({extra[0]}=0)" if extra else f"add {', '.join(missing)}"
            raise ValueError(f"'{own}' has the dimensions ({sizes}), expected ({', '.join(axes)}); {do}.")
        array = array.squeeze([axis for axis in array.dims if axis not in axes], drop=True).transpose(*axes)
        got = array.attrs.get("units")
        if units is not None and got is not None and not same_unit(str(got), units):
            raise ValueError(
                f"'{own}' is in '{got}', but the state holds {name} in '{units}'; convert the values and the attribute "
                "`units` first."
            )
        return array

    def _times_at(self, name: str, times: np.ndarray) -> np.ndarray:
        return positions(
            dataset_times(self.dataset), times, f"'{name}' is needed at", "time", "give a dataset with all times"
        )

    def _levels_at(self, name: str, array: xarray.DataArray, levels: tuple[int, ...]) -> np.ndarray:
        has = _axis_values(array, "level")
        return positions(has, np.asarray(levels, float), f"'{name}' is needed at", "level", "give all levels, in hPa")

    def _on_grid(self, array: xarray.DataArray) -> np.ndarray:
        """Load what is needed, float32."""
        array = array.isel({axis: as_slice(points.needed) for axis, points in self.points.items()})
        values = np.asarray(array.values, np.float32)
        for axis, position in (("latitude", -2), ("longitude", -1)):
            values = self.points[axis].apply(values, position)
        return values


def _precipitation(
    source: _Source, variable: Variable, times: np.ndarray, without: bool
) -> Float[np.ndarray, "time 1 latitude longitude"]:
    """12 h precipitation: as it is, summed, or 0 where it may be."""
    shape = (len(times), 1, len(source.latitude), len(source.longitude))
    tried = [f"'{variable.name}' at {words(times)}"]
    if source.find(variable.name) is not None and (not without or source.has_times(times)):
        values = source.read(variable.name, variable.units, times)
        return np.where(np.isnan(values), np.float32(0.0), values) if without else values
    for name, hours in PARTS_OF_PRECIPITATION:
        offsets = np.arange(hours - 12, 1, hours) * np.timedelta64(1, "h")
        ends = times[:, None] + offsets
        if source.find(name) is not None and source.has_times(ends):
            values = source.read(name, variable.units, ends.reshape(-1)).reshape(*ends.shape, *shape[2:])
            total = values.sum(1, keepdims=True)
            return np.where(np.isnan(total), np.float32(0.0), total) if without else total
        tried.append(f"the {len(offsets)} values of '{name}' that end at each time")
    if without:
        return np.zeros(shape, np.float32)
    raise ValueError(
        f"the dataset has neither {', nor '.join(tried)}; add one of them, or, for initial frames, "
        "read with without_precipitation=True."
    )


def _complete(values: np.ndarray, variable: Variable, fill: dict[str, float], source: _Source) -> np.ndarray:
    """Values (time, levels, latitude, longitude) with undefined points filled, and none missing."""
    bad = ~np.isfinite(values)
    expected = ""
    if variable.undefined is not None:
        if variable.name not in fill:
            raise ValueError(
                f"'{variable.name}' has points without a value, and fill has {sorted(fill)}; "
                f"give the value that states hold there: fill={{'{variable.name}': ...}}."
            )
        undefined = variable.undefined.mask()
        bad &= ~undefined
        values = np.where(undefined, np.float32(fill[variable.name]), values)
        expected = ", outside the layout's undefined points"
    if bad.any():
        raise ValueError(
            f"'{variable.name}' is NaN or infinite at {int(bad.sum())} of {bad.size} values{expected} "
            f"({source.where(bad)}); a state has a value everywhere: complete the field, or take the layout's "
            "`undefined` from this dataset by undefined_mask."
        )
    return values


# --- names and axes --------------------------------------------------------------------------------------------------


def _renamed(dataset: xarray.Dataset) -> xarray.Dataset:
    """The dataset with one name for each dimension."""
    known = {*dataset.dims, *dataset.coords}
    names = {}
    for name, others in SPELLINGS_OF_DIMENSIONS.items():
        found = [other for other in others if other in known]
        if found and name not in known:
            names[found[0]] = name
    return dataset.rename(names) if names else dataset


def _axis_values(data: xarray.Dataset | xarray.DataArray, name: str) -> np.ndarray:
    if name not in data.coords or name not in data.dims:
        spellings = ", ".join((name, *SPELLINGS_OF_DIMENSIONS[name]))
        raise ValueError(f"the dataset has the dimensions {tuple(data.dims)}, expected one of {spellings}; rename it.")
    return np.asarray(data.coords[name].values, float)


def _grid_of(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    coords = layout.coords()
    if layout.dims[:-1] != ("latitude", "longitude") or not {"latitude", "longitude"} <= set(coords):
        raise ValueError(
            f"the layout has the dimensions {layout.dims} with coordinates for {sorted(coords)}; "
            "expected (latitude, longitude, channel) with latitudes and longitudes in degrees."
        )
    if not layout.variables:
        raise ValueError("the layout has no variables; name what its channels are by layout.Variable.")
    return coords["latitude"].astype(float), coords["longitude"].astype(float)


def _datetimes(times: Any) -> np.ndarray:
    values = np.asarray(list(times) if isinstance(times, Iterator) else times)
    if values.ndim != 1 or values.dtype.kind not in "MOU":
        raise ValueError(
            f"times have shape {values.shape} and type {values.dtype}; give a list of dates, as ['2019-03-29T12']."
        )
    return values.astype("datetime64[ns]")
