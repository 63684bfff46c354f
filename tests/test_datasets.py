import importlib.util
import re

import numpy as np
import pandas
import pytest
import xarray as xr

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.fields import Undefined, Variable, conversion, same_unit

LATITUDE, LONGITUDE = np.linspace(-90, 90, 7), np.arange(12) * 30.0
LEVELS = (500, 850, 1000)
TIMES = np.datetime64("2019-03-29T00", "ns") + np.arange(5) * np.timedelta64(6, "h")
UNITS = {
    "2m_temperature": "K",
    "geopotential": "m2 s-2",
    "sea_surface_temperature": "K",
    "specific_humidity": "kg kg-1",
    "temperature": "K",
    "total_precipitation_12hr": "m",
}
ATMOSPHERIC = ("geopotential", "specific_humidity", "temperature")
SST, RAIN = "sea_surface_temperature", "total_precipitation_12hr"
LAND = np.zeros((7, 12), bool)
LAND[2:5, 3:6] = True
FILL = {SST: 271.0}


def layout(levels=LEVELS, latitude=LATITUDE, longitude=LONGITUDE, land=LAND, names=tuple(UNITS)):
    variables = tuple(
        Variable(n, UNITS[n], levels if n in ATMOSPHERIC else (), Undefined(land) if n == SST else None) for n in names
    )
    return ndda.Layout(
        (len(latitude), len(longitude), sum(v.num_channels for v in variables)),
        ("latitude", "longitude", "channel"),
        (("latitude", tuple(latitude.tolist())), ("longitude", tuple(longitude.tolist()))),
        variables=variables,
    )


def era5(latitude=LATITUDE, longitude=LONGITUDE, land=LAND, levels=LEVELS, times=TIMES, seed=0):
    """Random fields in WeatherBench 2's names, with what GenCast does not read too."""
    rng = np.random.default_rng(seed)
    surface, atmosphere = ("time", "latitude", "longitude"), ("time", "level", "latitude", "longitude")
    coords = {"time": times, "level": list(levels), "latitude": latitude, "longitude": longitude}
    shapes = {dims: tuple(len(coords[d]) for d in dims) for dims in (surface, atmosphere)}
    variables = {}
    for name, units in UNITS.items():
        dims = atmosphere if name in ATMOSPHERIC else surface
        variables[name] = (dims, rng.normal(280, 5, shapes[dims]).astype(np.float32), {"units": units})
    variables[SST] = (surface, np.where(land, np.nan, variables[SST][1]).astype(np.float32), {"units": "K"})
    static = shapes[surface][1:]
    variables["geopotential_at_surface"] = (surface[1:], rng.normal(size=static), {"units": "m**2 s**-2"})
    variables["land_sea_mask"] = (surface[1:], land.astype(float))
    variables["volumetric_soil_water"] = (surface, np.full(shapes[surface], np.nan))
    return xr.Dataset(variables, coords)


def expected(dataset, at, time):
    """The state, channel by channel, in float32."""
    channels = []
    for name in UNITS:
        values = dataset[name].sel(time=time)
        stacked = values.transpose("latitude", "longitude", ...).values.reshape(*values.sizes.values())[..., None]
        if name in ATMOSPHERIC:
            stacked = values.transpose("latitude", "longitude", "level").values
        channels.append(np.where(np.isnan(stacked), 271.0, stacked))
    return np.concatenate(channels, -1).astype(np.float32)


def test_states_of_a_weatherbench_dataset():
    dataset = era5()
    states = ndda.fields.read_states(dataset, layout(), TIMES[[3, 0]], fill=FILL)
    assert states.shape == (2, 7, 12, 12)
    assert states.dtype == np.float32
    for state, time in zip(states, TIMES[[3, 0]], strict=True):
        np.testing.assert_array_equal(state, expected(dataset, None, time))
    value = np.asarray(layout().select(states[0], "temperature", 850))
    np.testing.assert_array_equal(value, dataset.temperature.sel(time=TIMES[3], level=850))
    np.testing.assert_array_equal(
        np.isnan(layout().select(states, SST)), np.broadcast_to(LAND, (2, 7, 12)), err_msg="land cannot be observed"
    )


def gencast_example(dataset):
    """In the form of the files of GenCast's package: a batch, lat and lon, times counted from the first."""
    start = dataset.time.values[0]
    moving = [name for name in dataset.data_vars if "time" in dataset[name].dims]
    example = dataset.rename(latitude="lat", longitude="lon")
    example = example.assign_coords(datetime=("time", dataset.time.values), time=dataset.time.values - start)
    example[moving] = example[moving].expand_dims("batch")
    return example.assign_coords(datetime=example.datetime.expand_dims("batch"))


def weatherbench(dataset):
    """North first, longitude before latitude, as archives of WeatherBench 2 may be."""
    return dataset.isel(latitude=slice(None, None, -1)).transpose("time", "longitude", "latitude", "level")


def from_180(dataset):
    """Longitudes from -180 to 180."""
    return dataset.roll(longitude=6, roll_coords=True).assign_coords(longitude=np.arange(12) * 30.0 - 180.0)


def short_names(dataset):
    """As the Climate Data Store and cfgrib name things."""
    names = {"2m_temperature": "t2m", "geopotential": "z", SST: "sst", "specific_humidity": "q", "temperature": "t"}
    surface = dataset.geopotential_at_surface
    renamed = dataset.drop_vars("geopotential_at_surface").rename(
        names | {"time": "valid_time", "level": "pressure_level", "land_sea_mask": "lsm"}
    )
    assert surface.size
    return renamed.expand_dims("number")


def shuffled(dataset):
    """More levels than are needed, in another order; float64."""
    more = era5(levels=(1000, 850, 700, 500, 300), seed=5)
    more = more.drop_vars(ATMOSPHERIC).merge(dataset[list(ATMOSPHERIC)].reindex(level=[1000, 850, 700, 500, 300]))
    more.update(dataset.drop_vars(ATMOSPHERIC).drop_dims("level"))
    return more.astype(np.float64)


@pytest.mark.parametrize("form", [gencast_example, weatherbench, from_180, short_names, shuffled])
def test_other_forms_of_the_same_data_give_the_same_states(form):
    dataset = era5()
    states = ndda.fields.read_states(dataset, layout(), TIMES[:2], fill=FILL)
    np.testing.assert_array_equal(ndda.fields.read_states(form(dataset), layout(), TIMES[:2], fill=FILL), states)
    np.testing.assert_array_equal(ndda.fields.undefined_mask(form(dataset), SST, LATITUDE, LONGITUDE), LAND)
    np.testing.assert_array_equal(ndda.fields.static_field(form(dataset), "land_sea_mask", LATITUDE, LONGITUDE), LAND)
    for found, axis in zip(ndda.fields.grid(form(dataset)), (LATITUDE, LONGITUDE), strict=True):
        np.testing.assert_array_equal(found, axis)


def test_times_in_any_form():
    dataset, one = era5(), layout(names=("2m_temperature",))
    states = ndda.fields.read_states(dataset, one, TIMES[:2])
    for times in (["2019-03-29", "2019-03-29T06:00"], dataset.time[:2], dataset.indexes["time"][:2], iter(TIMES[:2])):
        np.testing.assert_array_equal(ndda.fields.read_states(dataset, one, times), states)
    frame = dataset.isel(time=0)  # a single frame keeps its time as a scalar coordinate
    np.testing.assert_array_equal(ndda.fields.read_states(frame, one, TIMES[:1]), states[:1])
    # 02:00 in Oslo, before summer time begins, is 01:00 in UTC.
    oslo = pandas.DatetimeIndex(["2019-03-29T01:00", "2019-03-29T07:00"]).tz_localize("Europe/Oslo")
    with_zone = (oslo, list(oslo), oslo.to_series(), ["2019-03-29T01:00+01:00", "2019-03-29T06:00Z"])
    for times in (*with_zone, pandas.period_range("2019-03-29T00", periods=2, freq="6h")):
        np.testing.assert_array_equal(ndda.fields.read_states(dataset, one, times), states)
    nat = [TIMES[0], np.datetime64("NaT", "ns")]
    for wrong in (
        ["yesterday"],
        "2019-03-29",
        [0, 6],
        TIMES[0],
        nat,
        [None],
        ["1066-10-14"],
        [True],
        5.0,
        ["29/03/2019"],
    ):
        with pytest.raises(ValueError, match="give a list of dates"):
            ndda.fields.read_states(dataset, one, wrong)


# --- grids ----------------------------------------------------------------------------------------------------------


def test_every_other_point_of_a_finer_grid():
    latitude, longitude = np.linspace(-90, 90, 13), np.arange(24) * 15.0
    fine = era5(latitude[::-1], longitude, np.kron(LAND, np.ones((2, 2), bool))[:13])
    states = ndda.fields.read_states(fine, layout(), TIMES[:1], fill=FILL)
    coarse = fine.isel(latitude=slice(None, None, -2), longitude=slice(None, None, 2))
    np.testing.assert_array_equal(states[0, ..., 0], coarse["2m_temperature"][0])
    temperature = layout().select(states, "temperature", 500)
    np.testing.assert_array_equal(temperature[0], coarse["temperature"].sel(level=500)[0])


def test_coordinates_rounded_to_float32():
    third = np.arange(12) / 3.0
    dataset = era5(longitude=(third - 2.0).astype(np.float32))
    states = ndda.fields.read_states(dataset, layout(longitude=np.mod(third - 2.0, 360.0)), TIMES[:1], fill=FILL)
    np.testing.assert_array_equal(states[0, ..., 0], dataset["2m_temperature"][0])


def test_another_grid_is_refused_unless_interpolated():
    target = layout(latitude=np.linspace(-90, 90, 13), longitude=np.arange(24) * 15.0, names=("2m_temperature",))
    with pytest.raises(
        ValueError, match=r"latitude is -90 to 90 by 30 \(7 points\), but the state's is .* by 15 .* 6 of"
    ):
        ndda.fields.read_states(era5(), target, TIMES[:1])
    shifted = layout(longitude=LONGITUDE + 1.0, names=("2m_temperature",))
    with pytest.raises(ValueError, match=r"longitude is 0 to 330.* 12 of these .* interpolate=True"):
        ndda.fields.read_states(era5(), shifted, TIMES[:1])


@pytest.mark.parametrize("form", [weatherbench, from_180, gencast_example])
def test_interpolation_is_bilinear_and_goes_round(form):
    dataset = era5()
    lat, lon = np.linspace(-90, 90, 13), np.arange(24) * 15.0
    states = ndda.fields.read_states(
        form(dataset), layout(latitude=lat, longitude=lon, names=("temperature",)), TIMES[:2], interpolate=True
    )
    closed = xr.concat([dataset, dataset.isel(longitude=[0]).assign_coords(longitude=[360.0])], "longitude")
    # xarray's own interpolation, on the grid closed at 360 degrees.
    reference = closed.temperature.isel(time=slice(2)).interp(latitude=lat, longitude=lon)
    np.testing.assert_allclose(states, reference.transpose("time", "latitude", "longitude", "level"), rtol=1e-5)
    np.testing.assert_array_equal(states[:, ::2, ::2, 0], dataset.temperature[:2, 0])


def test_interpolation_next_to_nan():
    lat, lon = np.linspace(-90, 90, 13), np.arange(24) * 15.0
    mask = ndda.fields.undefined_mask(era5(), SST, lat, lon, interpolate=True)
    np.testing.assert_array_equal(mask[::2, ::2], LAND)  # points of the dataset keep their value
    assert mask[3, 6]  # half way between sea and land
    assert not mask[2, 6]
    target = layout(latitude=lat, longitude=lon, land=mask, names=(SST,))
    states = ndda.fields.read_states(era5(), target, TIMES[:1], fill=FILL, interpolate=True)
    assert (states[0, mask] == 271.0).all()


def test_nothing_is_extrapolated():
    inner = era5().isel(latitude=slice(1, -1))
    with pytest.raises(ValueError, match=r"latitude .* lie outside; nothing is extrapolated"):
        ndda.fields.read_states(inner, layout(names=("2m_temperature",)), TIMES[:1], interpolate=True)
    part = era5().isel(longitude=slice(0, 6))
    with pytest.raises(ValueError, match=r"longitude .* lie outside"):
        ndda.fields.read_states(part, layout(names=("2m_temperature",)), TIMES[:1], interpolate=True)
    single = era5().isel(longitude=[0])
    with pytest.raises(ValueError, match=r"longitude .* lie outside"):
        ndda.fields.read_states(single, layout(names=("2m_temperature",)), TIMES[:1], interpolate=True)


# --- what is refused ------------------------------------------------------------------------------------------------


def without(name):
    return lambda d: d.drop_vars(name)


def in_units(name, units):
    return lambda d: d.assign({name: d[name].assign_attrs(units=units)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("temperature"), r"no variable 'temperature' or 't'; it has 2m_temperature, .* Rename or add it"),
        (
            lambda d: d.sel(level=[500, 1000]),
            "'geopotential' is needed at level 850, but .* levels 500, 1000; give all",
        ),
        (lambda d: d.isel(time=slice(1, 3)), "'2m_temperature' is needed at time 2019-03-29T00:00, but"),
        (lambda d: d.isel(time=[0, 0, 1]), "time 2019-03-29T00:00 more than once"),
        (lambda d: d.rename(level="plev"), r"'geopotential' has the dimensions \(time: 5, plev: 3.*select one"),
        (lambda d: d.rename(latitude="y"), r"dimensions .* expected one of latitude, lat with values; rename or add"),
        (lambda d: d.drop_vars("latitude"), r"dimensions .* expected one of latitude, lat with values; rename or add"),
        (lambda d: d.expand_dims(number=2), r"\(number: 2, .* select one, as in dataset.isel\(number=0\)"),
        (lambda d: d.assign(temperature=d.temperature[0].drop_vars("time")), "'temperature' has .* add time"),
        (lambda d: d.assign_coords(time=np.arange(5)), "time is of type int64, expected datetime64"),
        (lambda d: d.drop_vars("time"), "no coordinate time"),
        (in_units("2m_temperature", "degC"), "'2m_temperature' is in 'degC', .* 2m_temperature in 'K'; convert"),
        (in_units("geopotential", "m"), "'geopotential' is in 'm'"),
        (in_units("specific_humidity", "g kg-1"), "'specific_humidity' is in 'g kg-1'"),
        (in_units(RAIN, "mm"), "'total_precipitation_12hr' is in 'mm'"),
        (lambda d: d.assign({"2m_temperature": d["2m_temperature"].where(d.level[0] < 0)}), "at 84 of 84 values"),
        (lambda d: d.assign({RAIN: d[RAIN].where(~LAND)}), r"'total_precipitation_12hr' is NaN .* at 9 of 84"),
        (
            lambda d: d.assign({SST: d[SST].where(d.latitude < 0)}),
            r"'sea_surface_temperature' .* 42 of 84 values, outside",
        ),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ndda.fields.read_states(change(era5()), layout(), TIMES[:1], fill=FILL)


def point(name, value, at=(0, 0)):
    """Change one value of a variable at every time and level."""

    def change(d):
        values = d[name].values.copy()
        values[(..., *at)] = value
        return d.assign({name: d[name].copy(data=values)})

    return change


def axis(name, *values):
    """Replace the first values of a coordinate."""
    return lambda d: d.assign_coords({name: np.concatenate([values, d[name].values[len(values) :]])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (axis("latitude", np.nan), "dataset's latitudes have the value nan at position 0; give latitudes in degrees"),
        (axis("longitude", 0.0, np.inf), "dataset's longitudes have the value inf at position 1"),
        (axis("latitude", -95.0), "dataset's latitudes have the value -95.0"),
        (axis("latitude", -90.0, -90.0), "dataset's latitudes go from -90 to -90 at position 0"),
        (lambda d: d.assign({"2m_temperature": d["2m_temperature"] - 273.15}), "median is .*, which looks like 'degC'"),
        (lambda d: d.assign(temperature=1.8 * (d.temperature - 273.15) + 32), "looks like 'degF'"),
        (lambda d: d.assign(geopotential=0 * d.geopotential + heights(d)), "looks like 'm'"),
        (point("2m_temperature", 0.0), "'2m_temperature' has 0 K at 1 of 84 values"),
        (point(SST, 0.0), "'sea_surface_temperature' has 0 K at 1 of 84 values"),
        *[
            (point("specific_humidity", value), re.escape(f"has the value {value:g} at 3 of 252 points"))
            for value in (9.96921e36, -9999.0, -32767.0, 1e20, -999.0)
        ],
        (lambda d: d.assign(temperature=d.temperature.assign_attrs(scale_factor=0.1)), "'temperature' is packed: its"),
        (
            lambda d: d.assign(temperature=d.temperature.assign_attrs(_FillValue=d.temperature.values[0, 0, 0, 0])),
            "fill",
        ),
        (lambda d: d.assign(temperature=d.temperature.astype(str)), "'temperature' is of type <U"),
        (lambda d: d.temperature, r"dataset=a DataArray; .* write dataset=xarray.open_dataset\(path\)"),
        (lambda d: "era5.nc", "dataset='era5.nc'; expected a Dataset"),
    ],
)
def test_values_that_cannot_be_right_are_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ndda.fields.read_states(change(era5()), layout(), TIMES[:1], fill=FILL)


def heights(dataset):
    return xr.DataArray([5600.0, 1450.0, 110.0], {"level": dataset.level.values}, "level")


def test_anomalies_and_cold_places_are_accepted():
    one = layout(names=("2m_temperature",))
    for values in (era5()["2m_temperature"] - 280.0, 0.2 * (era5()["2m_temperature"] - 280.0) + 190.0):
        states = ndda.fields.read_states(era5().assign({"2m_temperature": values}), one, TIMES)
        np.testing.assert_allclose(states[..., 0], values, rtol=1e-6)


@pytest.mark.parametrize("fill", [{SST: np.nan}, {SST: "cold"}, {SST: [1.0, 2.0]}, {"sst": 271.0}, 271.0])
def test_fill_is_a_number_for_a_variable(fill):
    with pytest.raises((ValueError, TypeError), match=r"one finite number|no variable 'sst'|write fill="):
        ndda.fields.read_states(era5(), layout(), TIMES[:1], fill=fill)


def test_masks_are_compared_with_the_land():
    sea = era5()[SST]
    filled = {"filled": sea.fillna(271.0), "NaN": sea.where(False), "inverse": sea.fillna(271.0).where(LAND)}
    for name, message in (
        ("filled", "has values at 100% of the points over land"),
        ("NaN", "is NaN at all 84 points"),
        ("inverse", "has values at 100% of the points over land"),
    ):
        with pytest.raises(ValueError, match=message):
            ndda.fields.undefined_mask(era5().assign({SST: filled[name]}), SST, LATITUDE, LONGITUDE)
    alone = era5().assign({SST: filled["filled"]}).drop_vars("land_sea_mask")
    with pytest.raises(ValueError, match="has a value at every point of the globe, but there is land"):
        ndda.fields.undefined_mask(alone, SST, LATITUDE, LONGITUDE)
    assert not ndda.fields.undefined_mask(alone, SST, LATITUDE[1:3], LONGITUDE[:3]).any()  # a region may be all sea
    percent = era5().assign(land_sea_mask=100.0 * era5().land_sea_mask)
    with pytest.raises(ValueError, match="'land_sea_mask' has values from 0 to 100, expected 0"):
        ndda.fields.undefined_mask(percent, SST, LATITUDE, LONGITUDE)


def test_values_far_from_the_statistics_of_a_prior():
    names = ("2m_temperature", SST, "temperature")
    grid, dataset = layout(names=names), era5()
    mean, sd = np.array([278.0, 287.0, 250.0, 280.0, 288.0]), np.array([21.0, 11.0, 12.0, 15.0, 17.0])

    def check(states):
        ndda.fields.plausibility.check_against_statistics(states, grid, mean, sd, "GenCast")

    states = ndda.fields.read_states(dataset, grid, TIMES, fill={SST: 0.0})
    check(states)  # fill values do not count
    for at, message in ((0, "'2m_temperature' has the mean"), (3, "'temperature' at 850 hPa has the mean")):
        with pytest.raises(ValueError, match=message):
            check(states - 273.15 * (np.arange(5) == at))
    with pytest.raises(ValueError, match="with a standard deviation of 21 K in the training data of GenCast"):
        check(np.where(np.arange(5) == 0, np.nan, states))


def advised(call):
    """The code that a message advises, after 'dataset = '."""
    with pytest.raises(ValueError, match=r"dataset = \S") as caught:
        call()
    return str(caught.value).split("dataset = ")[1].rstrip(".")


def preliminary(dataset):
    """The last times are preliminary; final values are NaN there, and preliminary ones before."""
    final = dataset.time < TIMES[3]
    moving = [name for name in dataset.data_vars if "time" in dataset[name].dims]
    both = xr.concat([dataset[moving].where(final), dataset[moving].where(~final)], "expver")
    return both.assign_coords(expver=["0001", "0005"]).merge(dataset.drop_vars(moving))


def forecasts(dataset):
    """Two starts, two steps of each, as cfgrib opens them."""
    first = dataset.isel(time=slice(0, 4))
    steps = np.arange(2) * np.timedelta64(6, "h")
    parts = [first.isel(time=[i, i + 2]).assign_coords(time=TIMES[[0, 2]]) for i in (0, 1)]
    moving = [name for name in dataset.data_vars if "time" in dataset[name].dims]
    both = xr.concat([part[moving] for part in parts], xr.DataArray(steps, dims="step", name="step"))
    return both.assign_coords(valid_time=both.time + both.step)


@pytest.mark.parametrize(
    ("form", "times"),
    [
        (preliminary, TIMES),
        (forecasts, TIMES[:4]),
        (lambda d: forecasts(d).drop_vars("valid_time"), TIMES[:4]),
        (lambda d: forecasts(d).isel(time=0), TIMES[:2]),
        (lambda d: forecasts(d).isel(time=0).drop_vars("valid_time"), TIMES[:2]),
        (lambda d: forecasts(d).isel(step=1), TIMES[[1, 3]]),
    ],
)
def test_advice_on_versions_and_forecasts_works(form, times):
    dataset = form(era5())
    names = layout(names=("2m_temperature", "temperature"))
    expected = ndda.fields.read_states(era5(), names, times)
    code = advised(lambda: ndda.fields.read_states(dataset, names, times))
    np.testing.assert_array_equal(
        ndda.fields.read_states(eval(code, {"dataset": dataset}), names, times), expected, err_msg=code
    )


def test_advice_on_fill_values_works():
    dataset = point(SST, -9999.0, at=(3, 4))(era5())
    with pytest.raises(ValueError, match="looks like a fill value") as caught:
        ndda.fields.undefined_mask(dataset, SST, LATITUDE, LONGITUDE)
    exec(str(caught.value).split("NaN: ")[1].rstrip("."), {"dataset": dataset})
    np.testing.assert_array_equal(ndda.fields.undefined_mask(dataset, SST, LATITUDE, LONGITUDE), LAND)


def test_a_batch_of_several_is_refused():
    example = gencast_example(era5())
    two = example.isel(batch=[0, 0])
    with pytest.raises(ValueError, match=r"\(batch: 2, .* select one, as in dataset.isel\(batch=0\)"):
        ndda.fields.read_states(two, layout(), TIMES[:1], fill=FILL)
    one = ndda.fields.read_states(two.isel(batch=0), layout(), TIMES[:1], fill=FILL)
    np.testing.assert_array_equal(one, ndda.fields.read_states(era5(), layout(), TIMES[:1], fill=FILL))


def test_a_filling_value_is_asked_for():
    with pytest.raises(ValueError, match=r"'sea_surface_temperature' has points without a value, and fill has \[\]"):
        ndda.fields.read_states(era5(), layout(), TIMES[:1])
    # A dataset may know a value (of a lake) where the layout has none: the state holds what it holds elsewhere there.
    lakes = era5(land=np.zeros_like(LAND))
    states = ndda.fields.read_states(lakes, layout(), TIMES[:1], fill=FILL)
    assert (states[0, LAND][:, layout().channels(SST)] == 271.0).all()


def test_a_layout_that_is_no_grid_is_refused():
    with pytest.raises(ValueError, match=r"expected \(latitude, longitude, channel\)"):
        ndda.fields.read_states(era5(), ndda.Layout((3,), ("component",)), TIMES[:1])
    coordinates = layout().coordinates
    with pytest.raises(ValueError, match="no variables"):
        ndda.fields.read_states(era5(), ndda.Layout((7, 12, 1), layout().dims, coordinates), TIMES[:1])


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("m**2 s**-2", "m2 s-2", True),
        ("m^2/s^2", "m2 s-2", True),
        ("m2/s2", "m2 s-2", True),
        ("J kg**-1", "m2 s-2", True),
        ("m s**-1", "m/s", True),
        ("Pa/s", "Pa s-1", True),
        ("Kelvin", "K", True),
        ("kg kg**-1", "1", True),
        ("kg/kg", "kg kg-1", True),
        ("(0 - 1)", "1", True),
        ("m of water equivalent", "m", True),
        ("kg m-1 s-2", "Pa", True),
        ("hPa", "mbar", True),
        ("millibars", "hPa", True),
        ("MB", "hPa", True),
        ("HPA", "hPa", True),
        ("hpa", "hPa", True),
        ("k", "K", True),
        ("M/S", "m/s", True),
        ("DegC", "degC", True),
        ("MG", "mg", True),
        ("Mg", "mg", False),
        ("gpm", "m", True),
        ("geopotential metres", "gpm", True),
        ("degC", "celsius", True),
        ("°C", "degrees_Celsius", True),
        ("deg C", "degC", True),
        ("K", "degrees_kelvin", True),
        ("metres per second", "m s**-1", True),
        ("m.s-1", "m/s", True),
        ("m s⁻¹", "m s^(-1)", True),
        ("m²/s²", "m**2 s**-2", True),
        ("Pa s**-1", "pascal/second", True),
        ("kg kg-1", "dimensionless", True),
        ("hPa", "Pa", False),
        ("celsius", "kelvin", False),
        ("mbar", "Pa", False),
        ("knots", "m s-1", False),
        ("mm/day", "mm/h", False),
        ("gpm", "m2 s-2", False),
        ("percent", "1", False),
        ("mm", "Mm", False),
        ("g kg-1", "kg kg-1", False),
        ("degC", "K", False),
        ("mm", "m", False),
        ("m", "m2 s-2", False),
        ("%", "1", False),
        ("km/h", "m s-1", False),
    ],
)
def test_units(a, b, same):
    assert same_unit(a, b) is same


@pytest.mark.parametrize(
    ("value", "a", "b", "expected"),
    [
        (-40.0, "degC", "degF", -40.0),
        (68.0, "°F", "K", 293.15),
        (20.0, "celsius", "K", 293.15),
        (1013.25, "mbar", "Pa", 101325.0),
        (29.92, "inHg", "hPa", 1013.2075),
        (36.0, "km/h", "m s-1", 10.0),
        (10.0, "knots", "m/s", 5.144444),
        (5.0, "g/kg", "kg kg-1", 0.005),
        (5.0, "g kg**-1", "1", 0.005),
        (55.0, "%", "1", 0.55),
        (24.0, "mm/day", "m h-1", 0.001),
        (6.5, "degC km-1", "K m-1", 0.0065),
        (180.0, "degrees", "radian", np.pi),
        (1.0, "kg m-1 s-2", "hPa", 0.01),
        (1.0, "gpm", "m2 s-2", None),
        (1.0, "K", "Pa", None),
        (1.0, "foot-lambert", "K", None),
    ],
)
def test_conversions(value, a, b, expected):
    found = conversion(a, b)
    if expected is None:
        assert found is None
        return
    assert found.factor * value + found.offset == pytest.approx(expected, rel=1e-6)
    back = conversion(b, a)
    assert back.factor * expected + back.offset == pytest.approx(value, rel=1e-6)


# --- precipitation --------------------------------------------------------------------------------------------------


def rain(**variables):
    dataset = era5().drop_vars(RAIN)
    return dataset.assign({name: (("time", "latitude", "longitude"), values) for name, values in variables.items()})


def test_precipitation_is_summed():
    one = layout(names=(RAIN,))
    six = np.random.default_rng(0).uniform(size=(5, 7, 12)).astype(np.float32)
    states = ndda.fields.read_states(rain(total_precipitation_6hr=six), one, TIMES[[1, 4]])
    np.testing.assert_allclose(states[..., 0], [six[0] + six[1], six[3] + six[4]], rtol=1e-6)
    hours = TIMES[0] + np.arange(14) * np.timedelta64(1, "h")
    hourly = era5(times=hours).rename({RAIN: "tp"})
    states = ndda.fields.read_states(hourly, one, hours[[11, 13]])
    np.testing.assert_allclose(states[0, ..., 0], hourly.tp[:12].sum("time"), rtol=1e-5)
    np.testing.assert_allclose(states[1, ..., 0], hourly.tp[2:].sum("time"), rtol=1e-5)


def test_precipitation_that_is_not_there():
    one = layout(names=(RAIN,))
    six = rain(total_precipitation_6hr=np.ones((5, 7, 12)))
    for dataset in (rain(), six):  # the first time has no 6 h before it
        with pytest.raises(
            ValueError, match=r"neither 'total_precipitation_12hr' .*6hr' .* without_precipitation=True"
        ):
            ndda.fields.read_states(dataset, one, TIMES[:2])
        assert (ndda.fields.read_states(dataset, one, TIMES[:2], without_precipitation=True) == 0).all()
    assert (ndda.fields.read_states(six, one, TIMES[1:], without_precipitation=True) == 2).all()
    holes = era5().assign({RAIN: era5()[RAIN].where(~LAND)})
    states = ndda.fields.read_states(holes, one, TIMES[:1], without_precipitation=True)
    np.testing.assert_array_equal(states[0, ..., 0] == 0, LAND)


# --- the surface ----------------------------------------------------------------------------------------------------


def test_fields_that_do_not_change():
    dataset = era5()
    height = ndda.fields.static_field(dataset, "geopotential_at_surface", LATITUDE, LONGITUDE)
    assert height.dtype == np.float32
    np.testing.assert_array_equal(height, dataset.geopotential_at_surface.astype(np.float32))
    named_z = weatherbench(dataset)[["geopotential_at_surface"]].rename(geopotential_at_surface="z")
    with_time = named_z.expand_dims(time=TIMES)
    for other in (named_z, with_time, gencast_example(dataset)):
        np.testing.assert_array_equal(
            ndda.fields.static_field(other, "geopotential_at_surface", LATITUDE, LONGITUDE), height
        )
    np.testing.assert_array_equal(
        ndda.fields.static_field(dataset, "geopotential_at_surface", LATITUDE[::2], LONGITUDE[1::3]), height[::2, 1::3]
    )
    for change, message in (
        (in_units("geopotential_at_surface", "m"), "is in 'm', .* 'm2 s-2'"),
        (without("geopotential_at_surface"), "no variable 'geopotential_at_surface' or 'z'"),
        (lambda d: d.assign(geopotential_at_surface=d.geopotential_at_surface.where(LAND)), "at 75 of 84 points"),
    ):
        with pytest.raises(ValueError, match=message):
            ndda.fields.static_field(change(dataset), "geopotential_at_surface", LATITUDE, LONGITUDE)


def test_grid_of_a_dataset():
    latitude, longitude = ndda.fields.grid(from_180(weatherbench(era5())))
    np.testing.assert_array_equal(latitude, LATITUDE)
    np.testing.assert_array_equal(longitude, LONGITUDE)
    closed = xr.Dataset(coords={"latitude": LATITUDE[::-1], "longitude": np.arange(13) * 30.0 - 180.0})
    np.testing.assert_array_equal(ndda.fields.grid(closed)[1], LONGITUDE)  # -180 and 180 are one meridian
    region = xr.Dataset(coords={"lat": [30.0, 60.0], "lon": [-20.0, 0.0, 20.0]})
    np.testing.assert_array_equal(ndda.fields.grid(region)[1], [0.0, 20.0, 340.0])


# --- and back -------------------------------------------------------------------------------------------------------


def test_round_trip():
    states = ndda.fields.read_states(era5(), layout(), TIMES, fill=FILL)
    dataset = ndda.fields.to_dataset(states, layout(), {"time": TIMES})
    assert list(dataset.data_vars) == list(UNITS)
    assert dataset.temperature.dims == ("time", "level", "latitude", "longitude")
    assert dataset["2m_temperature"].dims == ("time", "latitude", "longitude")
    np.testing.assert_array_equal(np.isnan(dataset[SST][0]), LAND)
    xr.testing.assert_equal(dataset, era5()[list(UNITS)])
    np.testing.assert_array_equal(ndda.fields.read_states(dataset, layout(), TIMES, fill=FILL), states)
    for name in dataset.data_vars:
        assert dataset[name].dtype == np.float32
        assert dataset[name].encoding["dtype"] == "float32"
        assert {"units", "standard_name", "long_name"} <= set(dataset[name].attrs)
    assert dataset.level.attrs["units"] == "hPa"
    assert dataset.latitude.attrs["units"] == "degrees_north"


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (TIMES[[1, 0]], "axis time goes back from 2019-03-29T06:00 to 2019-03-29T00:00 at positions 0 and 1"),
        (TIMES[[1, 1]], "axis time repeats 2019-03-29T06:00"),
        ([0, 6], "give a list of dates"),
    ],
)
def test_times_of_a_dataset_increase(times, message):
    with pytest.raises(ValueError, match=message):
        ndda.fields.to_dataset(np.zeros((2, *layout().shape)), layout(), {"time": times})


def test_particles_are_an_ensemble(tmp_path):
    states = ndda.fields.read_states(era5(), layout(), TIMES, fill=FILL)
    ensemble = states + np.arange(3, dtype=np.float32)[:, None, None, None, None]
    dataset = ndda.fields.to_dataset(ensemble, layout(), {"number": range(3), "time": TIMES})
    assert dataset.temperature.dims == ("number", "time", "level", "latitude", "longitude")
    path = tmp_path / "ensemble.nc"
    dataset.to_netcdf(path, engine="h5netcdf")
    with xr.open_dataset(path, engine="h5netcdf") as back:
        xr.testing.assert_identical(back.load(), dataset)
        assert back.temperature.dtype == np.float32
        member = ndda.fields.read_states(back.sel(number=2), layout(), TIMES[1:2], fill={SST: 273.0})
    np.testing.assert_array_equal(member[0], ensemble[2, 1])
    frame = ndda.fields.to_dataset(states[0], layout(), {})
    assert frame.temperature.dims == ("level", "latitude", "longitude")


def test_levels_of_some_variables_only():
    mixed = ndda.Layout(
        (7, 12, 3),
        layout().dims,
        layout().coordinates,
        variables=(Variable("geopotential", "m2 s-2", (850,)), Variable("temperature", "K", (500, 850))),
    )
    states = np.random.default_rng(0).normal(size=(1, 7, 12, 3)).astype(np.float32)
    dataset = ndda.fields.to_dataset(states, mixed, {"time": TIMES[:1]})
    assert dataset.level.values.tolist() == [500, 850]
    assert np.isnan(dataset.geopotential.sel(level=500)).all()
    np.testing.assert_array_equal(ndda.fields.read_states(dataset, mixed, TIMES[:1]), states)


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((5, 7, 12, 11), {"time": TIMES}, r"got states of shape \(5, 7, 12, 11\)"),
        ((2, 5, 7, 12, 12), {"time": TIMES}, "expected one name for each axis"),
        ((5, 7, 12, 12), {"time": TIMES[:2]}, "'time' has 2 values, but the axis has 5"),
        ((5, 7, 12, 12), {"level": range(5)}, "'level' is an axis of the state itself"),
        ((5, 7, 12, 12), {"time": range(5)}, "give a list of dates"),
    ],
)
def test_axes_that_do_not_fit_are_refused(shape, axes, message):
    with pytest.raises(ValueError, match=message):
        ndda.fields.to_dataset(np.zeros(shape, np.float32), layout(), axes)


# --- archives -------------------------------------------------------------------------------------------------------


def archive(tmp_path):
    path = tmp_path / "era5.zarr"
    pytest.importorskip("zarr", reason="zarr is not installed")
    dataset = weatherbench(era5(times=TIMES[0] + np.arange(40) * np.timedelta64(6, "h")))
    dataset.to_zarr(path, consolidated=False, encoding={n: {"chunks": (1, *dataset[n].shape[1:])} for n in UNITS})
    return dataset, path


def test_only_what_is_needed_is_loaded_from_an_archive(tmp_path):
    dataset, path = archive(tmp_path)
    wanted = dataset.time.values[[2, 37]]
    states = ndda.fields.read_states(dataset, layout(), wanted, fill=FILL)
    for chunk in path.glob("temperature/c/*"):  # nothing else than the two times can be read afterwards
        if chunk.name not in ("2", "37"):
            for file in [f for f in chunk.rglob("*") if f.is_file()]:
                file.write_bytes(b"damaged")
    with xr.open_zarr(path, consolidated=False, chunks=None) as opened:
        np.testing.assert_array_equal(ndda.fields.read_states(opened, layout(), wanted, fill=FILL), states)
        with pytest.raises(RuntimeError):
            opened.temperature[3].load()


@pytest.mark.skipif(importlib.util.find_spec("dask") is None, reason="dask is not installed")
def test_a_dataset_of_dask_arrays(tmp_path):
    dataset, path = archive(tmp_path)
    wanted = dataset.time.values[[2, 37]]
    with xr.open_zarr(path, consolidated=False, chunks={}) as opened:
        assert opened.temperature.chunks is not None
        states = ndda.fields.read_states(opened, layout(), wanted, fill=FILL)
    np.testing.assert_array_equal(states, ndda.fields.read_states(dataset, layout(), wanted, fill=FILL))


# --- the package of GenCast -----------------------------------------------------------------------------------------


@pytest.mark.gencast
@pytest.mark.skipif(importlib.util.find_spec("weathernext") is None, reason="weathernext is not installed")
def test_channels_are_those_of_the_package():
    from weathernext.utils import model_utils

    example = gencast_example(era5())
    frame = example[list(UNITS)].isel(time=[1]).fillna(271.0)
    stacked = model_utils.dataset_to_stacked(frame.drop_vars("datetime"))
    states = ndda.fields.read_states(example, layout(), TIMES[1:2], fill=FILL)
    np.testing.assert_array_equal(stacked.transpose("batch", "lat", "lon", "channels"), states)
