"""Conversion between gridded reanalysis datasets (ERA5 and similar) and states as one array.

A state has the axes (latitude, longitude, channel), and its `Layout` names the variables of the channels. `read_states`
reads states from an `xarray.Dataset`: files of the GenCast package (batch, time, lat, lon, level), of WeatherBench 2
(time, level, latitude, longitude in any order), or with ECMWF's short names. `to_dataset` converts states back, with
the names that WeatherBench expects.

No unit, grid or level is converted silently: a dataset that differs from the layout is refused. Only the values that
are needed are loaded, so the dataset may be a lazily opened archive of decades.

Functions import xarray when they need it, because xarray takes longer to load than the rest of the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from numpyro_diffusion_da.arguments import real_values, require, require_flag, shown, values_along_axis
from numpyro_diffusion_da.fields.grids import Grid
from numpyro_diffusion_da.fields.interpolation import SAME_POINT, as_slice, check_axis, locate, positions, words
from numpyro_diffusion_da.fields.layout import Layout, Variable
from numpyro_diffusion_da.fields.plausibility import check_decoded, check_fill_values, check_plausible, check_surface
from numpyro_diffusion_da.fields.times import check_increasing, utc_times
from numpyro_diffusion_da.fields.units import same_unit
from numpyro_diffusion_da.spelling import spelled

if TYPE_CHECKING:
    import xarray

SPELLINGS_OF_DIMENSIONS = {
    "time": ("valid_time",),
    "level": ("isobaricInhPa", "pressure_level"),
    "latitude": ("lat",),
    "longitude": ("lon",),
}
SHORT_NAMES = {
    "10m_u_component_of_wind": ("u10", "10u"),
    "10m_v_component_of_wind": ("v10", "10v"),
    "2m_dewpoint_temperature": ("d2m", "2d"),
    "2m_temperature": ("t2m", "2t"),
    "geopotential": ("z",),
    "geopotential_at_surface": ("z",),  # the same short name as geopotential, but without levels
    "land_sea_mask": ("lsm",),
    "mean_sea_level_pressure": ("msl",),
    "sea_surface_temperature": ("sst",),
    "specific_humidity": ("q",),
    "surface_pressure": ("sp",),
    "temperature": ("t",),
    "total_precipitation": ("tp",),
    "u_component_of_wind": ("u",),
    "v_component_of_wind": ("v",),
    "vertical_velocity": ("w",),
}
"""Short names of ERA5-like variables, as files have them, by the full name that a layout uses."""
PRECIPITATION = {"total_precipitation_12hr": 12, "total_precipitation_6hr": 6}
"""Hours that a sum of precipitation covers, by its name."""
# Sums over shorter intervals, in hours, that end at the given time. ERA5's total_precipitation covers one hour.
PARTS_OF_PRECIPITATION = (("total_precipitation_6hr", 6), ("total_precipitation", 1))

STANDARD_NAMES = {
    # of the CF conventions
    "10m_u_component_of_wind": "eastward_wind",
    "10m_v_component_of_wind": "northward_wind",
    "2m_dewpoint_temperature": "dew_point_temperature",
    "2m_temperature": "air_temperature",
    "geopotential": "geopotential",
    "mean_sea_level_pressure": "air_pressure_at_mean_sea_level",
    "sea_surface_temperature": "sea_surface_temperature",
    "specific_humidity": "specific_humidity",
    "surface_pressure": "surface_air_pressure",
    "temperature": "air_temperature",
    "total_precipitation_12hr": "lwe_thickness_of_precipitation_amount",
    "total_precipitation_6hr": "lwe_thickness_of_precipitation_amount",
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
    """Read the states at given times from a gridded dataset.

    Variables may have the long names of ERA5 or the short names of ECMWF (t2m or 2t, z, msl, ...). Latitudes may be in
    either order, and longitudes may start at 0 or at -180. Without `interpolate`, the grid of the layout must be the
    dataset's grid or a subset of its points (1 degree out of 0.25). If the dataset lacks 12-hour precipitation, it is
    summed from two 6-hour values or twelve hourly values, and 6-hour precipitation from six hourly values.

    Args:
        dataset: fields in the units of the layout. A variable without the attribute `units` is assumed to be in the
            layout's unit.
        layout: layout of the state, with the dimensions (latitude, longitude, channel) and with variables.
        times: dates in any order, shape (time,). Dates with a time zone are converted to UTC.
        fill: value that states hold at undefined points, by the name of the variable and in its unit. Every variable
            with `undefined` points needs one.
        interpolate: interpolate bilinearly to points that the dataset lacks. A value next to a NaN becomes NaN.
        without_precipitation: set 12-hour or 6-hour precipitation to 0 where the dataset has none. This is meant for
            initial frames: GenCast and WeatherNext 2 do not take precipitation as an input.

    Returns:
        States, float32, shape (time, *layout.shape), without NaN.

    Raises:
        TypeError: `dataset` or `layout` is of the wrong kind.
        ValueError: a variable, level or time is missing; a unit or the grid differs; a variable has an extra axis or is
            not decoded; a value is NaN where the layout expects one, is a usual fill value, or looks like another unit;
            `fill` lacks a variable; or `times` are not dates.
    """
    latitude, longitude = _grid_of(layout)
    fill = _checked_fill(fill, layout)
    require_flag(without_precipitation, "read_states", "without_precipitation")
    source = _Source(dataset, latitude, longitude, interpolate)
    wanted = utc_times(times)
    states = np.empty((len(wanted), *layout.shape), np.float32)
    for variable in layout.variables:
        if variable.name in PRECIPITATION:
            values = _precipitation(source, variable, wanted, without_precipitation)
        else:
            values = source.read(variable.name, variable.units, wanted, variable.levels)
        check_plausible(values, variable)
        states[..., layout.channels(variable.name)] = np.moveaxis(_complete(values, variable, fill, source), 1, -1)
    return states


def _checked_fill(fill: Mapping[str, float] | None, layout: Layout) -> dict[str, float]:
    """Fill values by the name of the variable, after a check.

    Raises:
        TypeError: `fill` is not a mapping.
        ValueError: a name is not that of a variable, or a value is not a finite number.
    """
    require(fill, (Mapping, type(None)), "read_states", "fill", '{"sea_surface_temperature": 271.0}')
    found = dict(fill or {})
    for name, value in found.items():
        layout.variable(name)
        if np.ndim(value) or np.asarray(value).dtype.kind not in "fiu" or not np.isfinite(value):
            raise ValueError(f"fill of '{name}' is {shown(value)}; give one finite number in the variable's unit.")
    return found


def to_dataset(states: Any, layout: Layout, axes: Mapping[str, Any]) -> xarray.Dataset:
    """Convert states to a dataset with one variable per field, as named and ordered by WeatherBench 2 and -X.

    Each variable has the dimensions (leading axes, level if it has levels, latitude, longitude), CF attributes, and NaN
    at its undefined points and at levels that only other variables have. Values are float32, in memory and in files.

    Args:
        states: states, shape (leading axes, *layout.shape).
        layout: layout of the state, with the dimensions (latitude, longitude, channel) and with variables.
        axes: values of each leading axis by its name, in the order of the axes: ``{"time": times}`` for an analysis,
            ``{"number": range(50), "time": times}`` for an ensemble of particles. Times increase, and are converted to
            UTC if they have a time zone.

    Returns:
        The dataset, with the coordinates of the leading axes, level (hPa), latitude and longitude (degrees).

    Raises:
        ValueError: the shape of `states`, `axes` and `layout` do not fit together, or times do not increase.
    """
    import xarray

    latitude, longitude = _grid_of(layout)
    states = real_values(states, "the array of states").astype(np.float32)
    require(axes, Mapping, "to_dataset", "axes", '{"time": times}')
    if unnamed := [name for name in axes if not isinstance(name, str) or not name]:
        raise TypeError(
            f"to_dataset got axes with the name {shown(unnamed[0])}; give text, as in axes={{'time': times}}."
        )
    axes = {name: values_along_axis(values, f"the axis '{name}' of to_dataset") for name, values in axes.items()}
    lead = states.shape[: states.ndim - len(layout.shape)]
    if states.shape[len(lead) :] != layout.shape or len(lead) != len(axes):
        raise ValueError(
            f"to_dataset got states of shape {states.shape} with the leading axes {list(axes)}; "
            f"expected one name for each axis before {layout.shape}: write axes={{name: values, ...}}."
        )
    for (name, values), size in zip(axes.items(), lead, strict=True):
        if name in ("level", "latitude", "longitude"):
            raise ValueError(f"'{name}' is an axis of the state itself; give the leading axis another name.")
        if name in {variable.name for variable in layout.variables}:
            raise ValueError(f"'{name}' is a variable of the layout; give the leading axis another name.")
        if len(values) != size:
            raise ValueError(f"'{name}' has {len(values)} values, but the axis has {size}; give one value for each.")
    levels = sorted({level for variable in layout.variables for level in variable.levels})
    coordinates: dict[str, Any] = {name: np.asarray(values) for name, values in axes.items()}
    if "time" in axes:
        coordinates["time"] = utc_times(axes["time"])
        check_increasing(coordinates["time"], "the axis time")
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
    """CF attributes of a variable: its long name, unit and, where there is one, standard name."""
    names = {"long_name": variable.name.replace("_", " "), "units": variable.units}
    if standard := STANDARD_NAMES.get(variable.name):
        names["standard_name"] = standard
    return names


def grid(dataset: xarray.Dataset) -> tuple[Float[np.ndarray, " latitude"], Float[np.ndarray, " longitude"]]:
    """Latitudes and longitudes of a dataset in ascending order, in degrees.

    Args:
        dataset: a dataset with latitude and longitude in any order.

    Returns:
        (latitudes from south to north, longitudes from 0 to 360, each once), of shapes (latitude,) and (longitude,).

    Raises:
        ValueError: the dataset has no latitude or no longitude, or their values are not finite degrees in order.
    """
    import xarray

    require(dataset, (xarray.Dataset, xarray.DataArray), "grid", "dataset", "xarray.open_dataset(path)")
    dataset = _renamed(dataset)
    latitude, longitude = (
        check_axis(_axis_values(dataset, name), name, "dataset's ") for name in ("latitude", "longitude")
    )
    around = np.mod(longitude, 360.0)
    # Longitudes a rounding error west of 0, and a meridian that repeats the first one.
    around = np.sort(np.where(360.0 - around < SAME_POINT, around - 360.0, around))
    return np.sort(latitude), around[np.diff(around, prepend=-np.inf) > SAME_POINT]


def dataset_times(dataset: xarray.Dataset) -> np.ndarray:
    """Times of a dataset, in UTC.

    They are read from the coordinate `datetime` if there is one, because `time` is then relative, as in GenCast's
    files, and from `time` otherwise, or `valid_time` if there is no `time`.

    Args:
        dataset: a dataset with one time axis.

    Returns:
        Times, datetime64, shape (time,).

    Raises:
        ValueError: the dataset has no times, its times are not dates, or it has the times of several batches.
    """
    import xarray

    require(dataset, (xarray.Dataset, xarray.DataArray), "dataset_times", "dataset", "xarray.open_dataset(path)")
    dataset = _renamed(dataset)
    coords = dataset.coords
    name = "datetime" if "datetime" in coords else "time"
    if name not in coords:
        raise ValueError("the dataset has no coordinate time; add one of type datetime64, in UTC.")
    values = np.asarray(coords[name].values)
    _refuse_lead_times(dataset)
    if dataset.sizes.get("step", 1) > 1 and {"time", "step"} <= set(coords):
        raise ValueError(f"the dataset has an axis step; {_advice_on_steps(dataset)}.")
    if values.dtype.kind != "M":
        raise ValueError(
            f"the dataset's {name} is of type {values.dtype}, expected datetime64; decode the times first."
        )
    if values.size != dataset.sizes.get("time", 1):
        raise ValueError(
            f"the dataset's {name} has shape {values.shape}, expected one value for each of the "
            f"{dataset.sizes.get('time', 1)} times; select one batch"
            f"{_changed('dataset.isel(batch=0)', ', as in ')}."
        )
    found = values.reshape(-1).astype("datetime64[ns]")
    if np.isnat(found).any():
        raise ValueError(
            f"the dataset's {name} has a missing date (NaT); drop it"
            + _changed(f"dataset.dropna('{name}')", ", as in ")
            + "."
        )
    return found


def _refuse_lead_times(dataset: xarray.Dataset) -> None:
    """Refuse forecasts whose `time` is the time of their start, and not the time that they are valid at.

    Raises:
        ValueError: `valid_time` differs from `time`.
    """
    coords = dataset.coords
    if not {"time", "valid_time"} <= set(coords) or coords["valid_time"].dims != coords["time"].dims:
        return
    if not np.array_equal(coords["valid_time"].values, coords["time"].values):
        do = "dataset.swap_dims(time='valid_time').drop_vars('time')"
        if not coords["time"].dims:
            do = "dataset.drop_vars('time')"
        raise ValueError(
            "the dataset's time is when its forecasts start, which differs from valid_time; keep the latter"
            f"{_changed(do)}."
        )


def undefined_mask(
    dataset: xarray.Dataset, name: str, latitude: Any, longitude: Any, *, interpolate: bool = False
) -> Bool[np.ndarray, "latitude longitude"]:
    """Mask of the points where a variable has no value, such as sea surface temperature over land.

    The mask is the argument of `Undefined`.

    Args:
        dataset: a gridded dataset, as for `read_states`. For a variable with times the mask is that of the first time.
        name: name of a variable on a single surface.
        latitude: latitudes of the grid, degrees north, shape (latitude,).
        longitude: longitudes of the grid, degrees east, shape (longitude,).
        interpolate: interpolate bilinearly to points that the dataset lacks. Give `read_states` the same value.

    Returns:
        True where the variable has no value, shape (latitude, longitude).

    Raises:
        ValueError: the variable is missing, is not decoded or has an extra axis; the grid differs; or the mask cannot
            be right: no value anywhere, or a sea surface temperature that has values over land or none over sea.
    """
    source = _Source(dataset, latitude, longitude, interpolate)
    undefined = np.isnan(source.read_static(name))
    has_land = source.find("land_sea_mask") is not None
    check_surface(undefined, name, source.read_static("land_sea_mask") if has_land else None, Grid(latitude, longitude))
    return undefined


def static_field(
    dataset: xarray.Dataset, name: str, latitude: Any, longitude: Any, *, interpolate: bool = False
) -> Float[np.ndarray, "latitude longitude"]:
    """Read a field that does not change in time, such as geopotential_at_surface (m2 s-2) or land_sea_mask (1).

    Args:
        dataset: a gridded dataset, as for `read_states`. For a variable with times the first time is read.
        name: name of a variable on a single surface.
        latitude: latitudes of the grid, degrees north, shape (latitude,).
        longitude: longitudes of the grid, degrees east, shape (longitude,).
        interpolate: interpolate bilinearly to points that the dataset lacks.

    Returns:
        The field, float32, shape (latitude, longitude), without NaN.

    Raises:
        ValueError: the variable is missing or has an extra axis, its unit or the grid differs, or a value is NaN.
    """
    values = _Source(dataset, latitude, longitude, interpolate).read_static(name)
    if bad := int(np.sum(~np.isfinite(values))):
        raise ValueError(f"'{name}' is NaN or infinite at {bad} of {values.size} points; give a complete field.")
    return values


def _points(values: Any, name: str) -> Float[np.ndarray, " n"]:
    """Latitudes or longitudes of a grid, after a check.

    Raises:
        TypeError: they are no numbers.
        ValueError: they are not finite, or not one or more along one axis.
    """
    points = real_values(values, f"the {name} of the grid")
    if points.ndim != 1 or not points.size or not np.isfinite(points).all():
        raise ValueError(
            f"the {name} of the grid has the shape {points.shape} and {int(np.sum(~np.isfinite(points)))} non-finite "
            "values; give degrees along one axis, one or more."
        )
    return points


# --- one dataset on one grid ----------------------------------------------------------------------------------------


class _Source:
    """A dataset with standard names of its dimensions, and the positions of a grid's points in it."""

    def __init__(self, dataset: xarray.Dataset, latitude: Any, longitude: Any, interpolate: bool) -> None:
        import xarray

        require(dataset, xarray.Dataset, "read_states", "dataset", "xarray.open_dataset(path)")
        self.dataset = _renamed(dataset)
        self.latitude, self.longitude = _points(latitude, "latitude"), _points(longitude, "longitude")
        require_flag(interpolate, "read_states", "interpolate")
        self.points = {
            name: locate(_axis_values(self.dataset, name), name, target, interpolate)
            for name, target in (("latitude", self.latitude), ("longitude", self.longitude))
        }

    def find(self, name: str) -> str | None:
        """Name that the dataset gives to a variable; None if it lacks the variable."""
        candidates = (name, *SHORT_NAMES.get(name, ()))
        return next((c for c in candidates if c in self.dataset.data_vars), None)

    def read(
        self, name: str, units: str, times: np.ndarray, levels: tuple[int, ...] = ()
    ) -> Float[np.ndarray, "time levels latitude longitude"]:
        """Values of a variable at times and levels; a surface variable has a level axis of length 1."""
        array = self._array(name, units, ("time", "level") if levels else ("time",))
        array = array.isel(time=as_slice(self._times_at(name, times)))
        if levels:
            array = array.isel(level=as_slice(self._levels_at(name, array, levels)))
        values = self._on_grid(array)
        return values if levels else values[:, None]

    def read_static(self, name: str) -> Float[np.ndarray, "latitude longitude"]:
        """Values of a surface variable, at the first time if it has times."""
        require(name, str, "the dataset", "name", '"land_sea_mask"')
        own = self.find(name)
        if own is not None and self.dataset[own].sizes.get("time", 1) == 0:
            raise ValueError(f"'{own}' has no times; give a dataset with one time or more.")
        with_time = own is not None and "time" in self.dataset[own].dims
        units = {"geopotential_at_surface": "m2 s-2", "land_sea_mask": "1"}.get(name)
        array = self._array(name, units, ("time",) if with_time else ())
        return self._on_grid(array.isel(time=0) if with_time else array)

    def has_times(self, times: np.ndarray) -> bool:
        """Whether the dataset has all of the given times."""
        return bool(np.isin(times, dataset_times(self.dataset)).all())

    def where(self, bad: np.ndarray) -> str:
        """Text that says where the first True of a mask (..., latitude, longitude) is."""
        at = np.argwhere(bad)[0]
        return f"the first at latitude {self.latitude[at[-2]]:g}, longitude {self.longitude[at[-1]]:g}"

    def _array(self, name: str, units: str | None, leading: tuple[str, ...]) -> xarray.DataArray:
        """Array of a variable with the axes (*leading, latitude, longitude); refused if its unit is another."""
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
            raise ValueError(
                f"'{own}' has the dimensions ({sizes}), expected ({', '.join(axes)}); "
                f"{_advice_on_axes(self.dataset, array, missing, extra)}."
            )
        check_decoded(array, own)
        array = array.squeeze([axis for axis in array.dims if axis not in axes], drop=True).transpose(*axes)
        got = array.attrs.get("units")
        if units is not None and got is not None and not same_unit(str(got), units):
            raise ValueError(
                f"'{own}' is in '{got}', but the state holds {name} in '{units}'; convert the values and change the "
                "attribute `units`."
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
        """Load the values of an array that the grid needs and bring them to the grid, float32."""
        array = array.isel({axis: as_slice(points.needed) for axis, points in self.points.items()})
        values = np.asarray(array.values, np.float32)
        check_fill_values(values, str(array.name), array.attrs)
        for axis, position in (("latitude", -2), ("longitude", -1)):
            values = self.points[axis].apply(values, position)
        return values


def _precipitation(
    source: _Source, variable: Variable, times: np.ndarray, without: bool
) -> Float[np.ndarray, "time 1 latitude longitude"]:
    """Precipitation of 12 or 6 hours: read, summed over shorter ones, or 0 if the dataset may be without it."""
    shape = (len(times), 1, len(source.latitude), len(source.longitude))
    tried = [f"'{variable.name}' at {words(times)}"]
    if source.find(variable.name) is not None and (not without or source.has_times(times)):
        values = source.read(variable.name, variable.units, times)
        return np.where(np.isnan(values), np.float32(0.0), values) if without else values
    whole = PRECIPITATION[variable.name]
    for name, hours in PARTS_OF_PRECIPITATION:
        if hours == whole:
            continue
        offsets = np.arange(hours - whole, 1, hours) * np.timedelta64(1, "h")
        ends = times[:, None] + offsets
        if source.find(name) is not None and source.has_times(ends):
            values = source.read(name, variable.units, ends.reshape(-1)).reshape(*ends.shape, *shape[2:])
            total = values.sum(1, keepdims=True)
            return np.where(np.isnan(total), np.float32(0.0), total) if without else total
        tried.append(f"the {len(offsets)} values of '{name}' that end at each time")
    if without:
        return np.zeros(shape, np.float32)
    how = spelled("without_precipitation", True)
    raise ValueError(
        f"the dataset has neither {', nor '.join(tried)}; add one of them"
        f"{how and f', or read initial frames with {how}'}."
    )


def _complete(values: np.ndarray, variable: Variable, fill: dict[str, float], source: _Source) -> np.ndarray:
    """Fill the undefined points of values (time, levels, latitude, longitude); refuse other missing values."""
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
            f"({source.where(bad)}), but a state needs a value everywhere; complete the field, or take the layout's "
            "`undefined` from this dataset with undefined_mask."
        )
    return values


# --- names and axes --------------------------------------------------------------------------------------------------


def _renamed(dataset: xarray.Dataset) -> xarray.Dataset:
    """Dataset whose dimensions are called time, level, latitude and longitude."""
    known = {*dataset.dims, *dataset.coords}
    names = {}
    for name, others in SPELLINGS_OF_DIMENSIONS.items():
        found = [other for other in others if other in known]
        if found and name not in known:
            names[found[0]] = name
    return dataset.rename(names) if names else dataset


def _advice_on_axes(dataset: xarray.Dataset, array: xarray.DataArray, missing: list[Any], extra: list[Any]) -> str:
    """Advice on a variable that lacks axes, or has axes that a state does not have."""
    if "expver" in extra:
        # Preliminary and final data: each time has values in one of the versions, and NaN in the other.
        parts = [f"isel(expver={i}, drop=True)" for i in range(array.sizes["expver"])]
        joined = f"dataset.{parts[0]}" + "".join(f".combine_first(dataset.{part})" for part in parts[1:])
        return f"these are the preliminary and the final data, of which each time has one{_changed(joined)}"
    if "step" in extra:
        return _advice_on_steps(dataset)
    return f"select one{_changed(f'dataset.isel({extra[0]}=0)', ', as in ')}" if extra else f"add {', '.join(missing)}"


def _advice_on_steps(dataset: xarray.Dataset) -> str:
    """Advice on forecasts with an axis of steps."""
    first = "" if "valid_time" in dataset.coords else ".assign_coords(valid_time=dataset.time + dataset.step)"
    if "time" not in dataset.dims:
        return "step is the time since the start of a forecast; name its times" + _changed(
            f"dataset{first}.swap_dims(step='valid_time').drop_vars('time')"
        )
    return "step is the time since the start of a forecast; join start and step to one axis of times" + _changed(
        f"dataset{first}.stack(at=('time', 'step')).drop_vars(['at', 'time', 'step']).swap_dims(at='valid_time')"
    )


def _changed(dataset: str, before: str = ": dataset = ") -> str:
    """Advice to change a dataset; a user who has no program writes another file.

    Args:
        dataset: the changed dataset, in Python.
        before: what stands before it if a program has the dataset.
    """
    opened = spelled("dataset", python="")
    if not opened:
        return before + dataset
    return (
        f"; write another file by Python, and give that one: import xarray; dataset = {opened}; "
        f"dataset = {dataset}; dataset.to_netcdf('changed.nc')"
    )


def _axis_values(data: xarray.Dataset | xarray.DataArray, name: str) -> np.ndarray:
    if name not in data.coords or name not in data.dims:
        spellings = ", ".join((name, *SPELLINGS_OF_DIMENSIONS[name]))
        raise ValueError(
            f"the dataset has the dimensions {tuple(data.dims)}, expected one of {spellings} with values; "
            "rename or add it."
        )
    values = np.asarray(data.coords[name].values)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"the dataset's {name} is of type {values.dtype}, expected numbers; convert it.")
    return values.astype(float)


def _grid_of(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    require(layout, Layout, "read_states and to_dataset", "layout", 'ndda.load_prior("held_suarez").layout')
    grid = Grid.of(layout)
    if not layout.variables:
        raise ValueError(
            "the layout has no variables; name those of its channels: Layout(..., variables=(Variable(...), ...))."
        )
    return grid.latitude, grid.longitude
