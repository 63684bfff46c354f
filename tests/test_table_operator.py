"""From a table to a program: windows, names, units, interpolation on every grid, footprints, derived quantities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest

from numpyro_diffusion_da.fields import Layout, Undefined, Variable
from numpyro_diffusion_da.observation import Flag, derived, read_table

WINDS = ("u_component_of_wind", "v_component_of_wind")
LEVELS = (250, 500, 850)
VARIABLES = (
    Variable("surface_pressure", "hPa"),
    Variable("temperature", "K", LEVELS),
    Variable("specific_humidity", "g kg-1", LEVELS),
    Variable("geopotential", "m2 s-2", LEVELS),
    *(Variable(name, "m s-1", LEVELS) for name in WINDS),
)
NORTH, EAST = np.linspace(-90.0, 90.0, 73), np.arange(144) * 2.5
GAUSSIAN = np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(64)[0]))
GRIDS = {
    "from south": (NORTH, EAST),
    "from north, -180 to 180": (NORTH[::-1], np.arange(145) * 2.5 - 180.0),
    "0 to 360, shifted": (NORTH, np.arange(144) * 2.5 + 1.25),
    "Gaussian": (GAUSSIAN, EAST),
    "Gaussian from north": (GAUSSIAN[::-1], EAST - 180.0),
    "region across the date line": (NORTH[48:61], 150.0 + EAST[:25]),
    "region across 0": (NORTH[48:61][::-1], np.arange(-10, 20) * 2.5),
}
TIMES = ["2026-01-01T00", "2026-01-01T12", "2026-01-02T00"]


def layout_on(latitude, longitude, variables=VARIABLES):
    channels = sum(variable.num_channels for variable in variables)
    axes = {"latitude": latitude.tolist(), "longitude": longitude.tolist()}
    shape = (len(latitude), len(longitude), channels)
    return Layout(shape, ("latitude", "longitude", "channel"), axes, variables=variables)


def rotation(latitude, longitude):
    """East and north component of a rotation around an axis of latitude 30, longitude 40: smooth over both poles."""
    a, b = np.deg2rad(latitude), np.deg2rad(longitude)
    a0, b0 = np.deg2rad(30.0), np.deg2rad(40.0)
    u = np.sin(a0) * np.cos(a) - np.cos(a0) * np.sin(a) * np.cos(b - b0)
    return 20.0 * u, 20.0 * np.cos(a0) * np.sin(b - b0)


def truth(name, latitude, longitude, pressure):
    """Fields that are smooth on the sphere, and linear in the logarithm of pressure."""
    a, b, height = np.deg2rad(latitude), np.deg2rad(longitude), np.log(1000.0 / pressure)
    wave = np.cos(a) * np.cos(b - 1.0) + 0.5 * np.sin(a)
    if name in WINDS:
        return rotation(latitude, longitude)[WINDS.index(name)] * (1.0 + height)
    return {
        "surface_pressure": 1000.0 + 10.0 * wave,
        "temperature": 280.0 + 5.0 * wave - 30.0 * height,
        "specific_humidity": 5.0 + wave - 2.0 * height,
        "geopotential": 1000.0 * wave + 70000.0 * height,
    }[name]


def state(layout):
    latitude, longitude = (layout.coords()[name] for name in ("latitude", "longitude"))
    fields = [
        truth(variable.name, latitude[:, None], longitude, level) + np.zeros(layout.shape[:2])
        for variable in layout.variables
        for level in variable.levels or (1000.0,)
    ]
    return np.stack(fields, axis=-1).astype(np.float32)


UNITS = {"t": "K", "temperature": "K", "sp": "hPa", "q": "g/kg", "z": "m2 s-2", "r": "1", "thickness": "m"}


def rows(latitude, longitude, name, pressure=None, **more):
    """Rows of one variable, of the value 0 in the layout's unit if nothing else is said."""
    given = {"time": TIMES[0], "lat": latitude, "lon": longitude, "variable": name, "observation": 0.0, "error": 1.0}
    given["units"] = UNITS.get(name, "m s-1") if isinstance(name, str) else None
    return pandas.DataFrame(given | ({} if pressure is None else {"level": pressure}) | more)


def observed(layout, frame, **options):
    """(placed observations, operator's values at the rows that are used, in the order of the frame)."""
    placed = read_table(frame).on(layout, TIMES, quality=[], **options)
    found = np.full(placed.xs["y"].shape, np.nan)
    found[0] = placed.observe(state(layout), 0)  # all rows are of the first time
    return placed, placed.by_row(found).to_numpy(float)


@pytest.mark.parametrize("grid", GRIDS)
def test_interpolation_on_every_grid(grid):
    """Against the fields themselves, with a date line, poles, and pressures between levels."""
    layout = layout_on(*GRIDS[grid])
    rng = np.random.default_rng(0)
    latitude = np.rad2deg(np.arcsin(rng.uniform(-1, 1, 200)))
    longitude = rng.uniform(-180.0, 360.0, 200)
    latitude[:6], longitude[:6] = [90.0, -90.0, 89.3, -89.8, 45.0, 45.0], [0.0, 12.0, -170.0, 359.99, 180.0, -180.0]
    if "region" in grid:
        west = GRIDS[grid][1][0]
        latitude, longitude = rng.uniform(30.0, 60.0, 200), west + rng.uniform(0.0, 60.0, 200)
        longitude = np.where(longitude > 180.0, longitude - 360.0, longitude)
    pressure = np.exp(rng.uniform(np.log(250.0), np.log(850.0), 200))
    frames = [rows(latitude, longitude, name, pressure, error=100.0) for name in ("t", "u", "v", "z")]
    frames.append(rows(latitude, longitude, "sp", error=100.0))
    placed, found = observed(layout, pandas.concat(frames, ignore_index=True))
    assert (placed.rows["flag"] == Flag.USED).all()
    names = ("temperature", *WINDS, "geopotential", "surface_pressure")
    # A field of one wave around the globe bends by 1/8 (2.5 degrees)^2 = 2.4e-4 of its size between two points.
    for name, values, size in zip(names, found.reshape(5, 200), (5, 40, 40, 1000, 10), strict=True):
        expected = truth(name, latitude, longitude, pressure)
        np.testing.assert_allclose(values, expected, atol=8e-4 * size, rtol=1e-6)
    np.testing.assert_allclose(placed.xs["place"][0, :200][:, 0], latitude, atol=1e-5)


def test_a_place_on_a_grid_point_takes_that_point():
    layout = layout_on(NORTH[::-1], EAST)
    x = state(layout)
    frame = rows([NORTH[20], 90.0], [EAST[7], EAST[3]], "temperature", [500, 850])
    placed, found = observed(layout, frame)
    at = placed.xs["parts"]["variables"]
    assert (at["weight"][0, :2] > 0).sum() == 2
    np.testing.assert_array_equal(found, [x[73 - 21, 7, 2], x[0, 3, 3]])


def test_the_adjoint_is_the_adjoint():
    """<H' dx, dy> = <dx, H'^T dy> for the derivative H', with footprints and derived quantities."""
    layout = layout_on(NORTH[::6], EAST[::6])
    rng = np.random.default_rng(1)
    names = {"t": "K", "u": "m s-1", "wind_speed": "m s-1", "wind_direction": "degree", "r": "1", "thickness": "m"}
    frames = [
        rows(rng.uniform(-90, 90, 8), rng.uniform(-180, 360, 8), name, 600.0, layer_top=300.0, units=unit)
        for name, unit in names.items()
    ]
    frame = pandas.concat(frames, ignore_index=True)
    frame.loc[::3, "footprint"] = 500.0
    placed = read_table(frame).on(layout, TIMES, quality=[])
    at = jax.tree.map(lambda values: values[0], placed.xs)
    x = jnp.asarray(state(layout))
    dx = jnp.asarray(rng.normal(size=x.shape), np.float32)
    dy = jnp.asarray(rng.normal(size=placed.xs["y"].shape[1]), np.float32)

    @jax.jit
    def both(x, dx, dy):
        push = jax.jvp(lambda v: placed.operator(v, at), (x,), (dx,))[1]
        return push, jax.vjp(lambda v: placed.operator(v, at), x)[1](dy)[0]

    push, pull = both(x, dx, dy)
    assert jnp.isfinite(pull).all()
    np.testing.assert_allclose(jnp.vdot(push, dy), jnp.vdot(dx, pull), rtol=1e-4)


def test_footprints_are_means_by_area():
    """The mean of a harmonic of degree l over a cap is its value times a known factor; for degree 1 (1 + cos a) / 2."""
    latitude, longitude = np.array([0.0, 50.0, -89.0, 60.0]), np.array([179.5, 0.2, 30.0, -100.0])
    diameter = np.array([2000.0, 300.0, 4000.0, 0.0])
    layout = layout_on(NORTH, EAST)
    _, found = observed(layout, rows(latitude, longitude, "sp", footprint=diameter))
    factor = 0.5 * (1.0 + np.cos(0.5 * diameter / 6371.0))
    expected = 1000.0 + factor * (truth("surface_pressure", latitude, longitude, 1000.0) - 1000.0)
    np.testing.assert_allclose(found, expected, atol=0.01)
    # Outside the region if a part of the footprint is.
    region = layout_on(*GRIDS["region across 0"])
    placed, _ = observed(region, rows([32.0, 32.0], [0.0, 0.0], "sp", footprint=[300.0, 900.0]))
    assert list(placed.rows["flag"]) == [Flag.USED, Flag.OUTSIDE_GRID]


def test_derived_quantities():
    """Against formulas in double precision; a direction is compared the short way round."""
    layout = layout_on(NORTH, EAST)
    latitude, longitude, pressure = np.array([10.0, -45.0]), np.array([20.0, 190.0]), np.array([700.0, 400.0])
    u, v = (truth(name, latitude, longitude, pressure) for name in WINDS)
    t = truth("temperature", latitude, longitude, pressure)
    q = 1e-3 * truth("specific_humidity", latitude, longitude, pressure)
    vapor = q * 100.0 * pressure / (0.621981 + 0.378019 * q)
    dewpoint = _dewpoint(vapor)
    layer = [truth("geopotential", latitude, longitude, p) / 9.80665 for p in (pressure, np.array([300.0, 300.0]))]
    cases = {
        "wind_speed": np.hypot(u, v),
        "wind_from_direction": np.rad2deg(np.arctan2(-u, -v)) % 360.0,
        "relative_humidity": vapor / _saturated(t),
        "dewpoint_temperature": dewpoint,
        "geopotential_height": layer[0],
        "thickness": layer[1] - layer[0],
    }
    units = {"relative_humidity": "%", "wind_from_direction": "degrees", "dewpoint_temperature": "K"}
    frames = [
        rows(latitude, longitude, name, pressure, layer_top=300.0, observation=1.0).assign(
            units=units.get(name, "m s-1" if "wind" in name else "m")
        )
        for name in cases
    ]
    _, found = observed(layout, pandas.concat(frames, ignore_index=True))
    for (name, expected), values in zip(cases.items(), found.reshape(-1, 2), strict=True):
        if name == "wind_from_direction":
            assert np.all(np.abs(values - 1.0) <= 180.0)
            values = values % 360.0
        np.testing.assert_allclose(values, expected, rtol=2e-4)
    # No derivative is NaN in a calm.
    placed, _ = observed(layout, rows(latitude, longitude, "wind_direction", pressure, units="degree"))
    at = jax.tree.map(lambda array: array[0], placed.xs)
    assert jnp.isfinite(jax.grad(lambda x: placed.operator(x, at).sum())(jnp.zeros(layout.shape))).all()


def _saturated(t):
    return 611.21 * np.exp(17.502 * (t - 273.16) / (t - 32.19))


def _dewpoint(vapor):
    """By bisection of the formula for saturation."""
    low, high = np.full(vapor.shape, 150.0), np.full(vapor.shape, 350.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (
            np.where(_saturated(middle) < vapor, middle, low),
            np.where(_saturated(middle) < vapor, high, middle),
        )
    return low


def test_a_quantity_of_ones_own():
    @derived("mean_temperature", (("temperature", 500), ("temperature", "layer_top"), "pressure"), "degC")
    def mean_temperature(a, b, pressure):
        return 0.5 * (a + b) - 273.15 + 0.0 * pressure

    layout = layout_on(NORTH, EAST)
    frame = rows([10.0], [20.0], "mean_temperature", 850.0, layer_top=300.0, observation=10.0, units="K")
    placed, found = observed(layout, frame, quantities=[mean_temperature])
    a, b = (truth("temperature", np.array([10.0]), 20.0, p) for p in (500.0, 300.0))
    np.testing.assert_allclose(found, 0.5 * (a + b) - 273.15, atol=0.01)
    assert placed.rows["value"].iloc[0] == pytest.approx(10.0 - 273.15)
    with pytest.raises(ValueError, match=r"needs the variable 'snow', but the layout has 'geopotential'"):
        read_table(frame).on(layout, TIMES, quantities=[derived("x", ("snow",), "m")(lambda snow: snow)])
    with pytest.raises(ValueError, match=r"input \('t', 'top'\); give the name of a variable, or a pair"):
        derived("x", (("t", "top"),), "m")(lambda t: t)
    with pytest.raises(TypeError, match=r"got quantities=<|got quantities=Derived|give a list, quantities="):
        read_table(frame).on(layout, TIMES, quantities=mean_temperature)


def test_reasons():
    land = np.zeros((73, 144), bool)
    land[40:50, 20:30] = True
    variables = (*VARIABLES, Variable("sea_surface_temperature", "K", undefined=Undefined(land)))
    layout = layout_on(NORTH, EAST, variables)
    table = {
        "used": (0.0, 0.0, "t", 500.0),
        "above": (0.0, 0.0, "t", 200.0),
        "below": (0.0, 0.0, "t", 925.0),
        "no level": (0.0, 0.0, "t", np.nan),
        "no place": (np.nan, 0.0, "t", 500.0),
        "on land": (20.0, 60.0, "sst", np.nan),
        "by the coast": (8.0, 60.0, "sst", np.nan),
        "at sea": (5.0, 60.0, "sst", np.nan),
        "not in model": (0.0, 0.0, "t2m", np.nan),
        "left out": (0.0, 0.0, "rain", np.nan),
    }
    frame = pandas.concat([rows([a], [b], c, d, observation=300.0) for a, b, c, d in table.values()], ignore_index=True)
    frame["units"] = "K"
    placed = read_table(frame, variables={"rain": None}).on(layout, TIMES, quality=[])
    expected = ["used", "above model", "below model", "missing", "missing", "missing surface", "missing surface"]
    assert list(placed.rows["flag"]) == [*expected, "used", "not in model", "not in model"]
    assert placed.counts().loc["temperature"].to_dict() == {
        "used": 1, "missing": 2, "not in model": 0, "above model": 1, "below model": 1, "missing surface": 0,
    }  # fmt: skip
    assert "2 of 10 rows are used at 3 times, 2 of them without any." in placed.report()


def test_names_of_variables():
    variables = (*VARIABLES, Variable("2m_temperature", "K"), *(Variable(f"10m_{name}", "m s-1") for name in WINDS))
    layout = layout_on(NORTH[::8], EAST[::8], variables)
    nan = np.nan
    cases = [
        ("air_temperature", nan, "2m_temperature", nan),
        ("air_temperature", 500.0, "temperature", 50000.0),
        ("t500", nan, "temperature", 50000.0),
        ("temperature_700", nan, "temperature", 70000.0),
        ("u10m", nan, "10m_u_component_of_wind", nan),
        ("10u", 925.0, "10m_u_component_of_wind", nan),
        ("T2M", nan, "2m_temperature", nan),
        ("wind_speed", nan, "10m_wind_speed", nan),
        ("wind_speed", 500.0, "wind_speed", 50000.0),
        ("eastward_wind", 300.0, "u_component_of_wind", 30000.0),
        ("TEMP", 300.0, "temperature", 30000.0),
    ]
    frame = pandas.concat([rows([0.0], [0.0], name, p) for name, p, _, _ in cases], ignore_index=True)
    frame["units"] = ["K" if "temp" in c[2] else "m s-1" for c in cases]
    placed = read_table(frame, variables={"TEMP": "t"}).on(layout, TIMES, quality=[])
    assert (placed.rows["flag"] == Flag.USED).all()
    assert list(placed.rows["name"]) == [case[2] for case in cases]
    np.testing.assert_array_equal(placed.rows["pres"], [case[3] for case in cases])
    # A CF name with a pressure is not the value near the ground, where the layout has nothing on levels.
    ground = layout_on(NORTH[::8], EAST[::8], (Variable("2m_temperature", "K"),))
    placed = read_table(frame[:2]).on(ground, TIMES, quality=[])
    assert list(placed.rows["flag"]) == [Flag.USED, Flag.NOT_IN_MODEL]


def test_units():
    """Converted where they are stated, and noted; where they are not, the layout's are checked against the values."""
    layout = layout_on(NORTH, EAST)
    frame = rows([0.0] * 4, [0.0] * 4, ["t", "t", "sp", "q"], [500.0, 500.0, np.nan, 500.0])
    frame["observation"], frame["units"] = [-20.0, 253.0, 100000.0, 0.002], ["degC", None, "Pa", "kg/kg"]
    placed = read_table(frame).on(layout, TIMES)
    np.testing.assert_allclose(placed.rows["value"], [253.15, 253.0, 1000.0, 2.0])
    np.testing.assert_allclose(placed.rows["error_used"], [1.0, 1.0, 0.01, 1000.0])
    assert placed.notes == (
        "1 row of 'temperature' was converted from degC to K.",
        "1 row of 'temperature' has no unit and is taken to be in K.",
        "1 row of 'surface_pressure' was converted from Pa to hPa.",
        "1 row of 'specific_humidity' was converted from kg/kg to g kg-1.",
    )
    own = read_table(frame.assign(units=None, observation=[-20.0, -19.0, 1e5, 2.0]), units={"t": "degC", "sp": "Pa"})
    np.testing.assert_allclose(own.on(layout, TIMES).rows["value"], [253.15, 254.15, 1000.0, 2.0])
    for bad, message in (
        ({"units": "m"}, r"the table, row 0: 'temperature' is in 'm' \(2 rows\), which does not become 'K'; correct"),
        ({"units": None}, r"row 0: 'temperature' has no unit, and the median of its 2 rows, 116.5, is not in 'K'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_table(frame.assign(**bad)).on(layout, TIMES)


def test_windows():
    def cycles(at, window, times=TIMES):
        frame = rows([0.0] * len(at), 0.0, "sp").assign(time=[f"2026-01-{time}" for time in at])
        placed = read_table(frame).on(layout, times, window=window, quality=[])
        assert [flag == Flag.OFF_WINDOW for flag in placed.rows["flag"]] == list(placed.rows["cycle"] < 0)
        return list(placed.rows["cycle"])

    layout = layout_on(NORTH[::8], EAST[::8])
    at = ["01T00", "01T01:30", "01T06", "01T06:01", "01T10:29", "01T10:30", "01T13:30", "01T13:31", "02T05", "02T07"]
    assert cycles(at, "3h") == [0, 0, -1, -1, -1, -1, 1, -1, -1, -1]
    assert cycles(at, None) == [0, 0, 0, 1, 1, 1, 1, 1, 2, -1]
    assert cycles(at, ("3h", "0h")) == [0, -1, -1, -1, 1, 1, -1, -1, -1, -1]
    assert cycles(at, np.timedelta64(24, "h")) == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]  # the nearest
    assert cycles(["01T00", "01T01"], "1h", ["2026-01-01"]) == [0, -1]
    for window, message in (
        ("x", "got window='x'; give a width"),
        (3, "got window=3; give a width"),
        ("0h", "has no length"),
        (("3h", "-1h"), "has no length|got window"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            cycles(at, window)
    with pytest.raises(ValueError, match="with one time a window is needed"):
        cycles(at, None, TIMES[:1])
    with pytest.raises(ValueError, match="times goes back"):
        cycles(at, "3h", TIMES[::-1])


def test_counts_fit_a_console_and_lose_nothing():
    """Every flag has a column, with a heading of several lines, in as many tables as it needs."""
    flags = [str(flag) for flag in Flag]
    frame = rows(np.zeros(len(flags)), np.arange(len(flags)) * 10.0, "sp").assign(observation=1000.0)
    placed = read_table(frame).on(layout_on(NORTH[::8], EAST[::8]), TIMES, quality=[])
    placed = dataclasses.replace(placed, rows=placed.rows.assign(flag=flags), notes=())
    _, *lines, _ = placed.report().split("\n")  # a summary, and what is withheld
    assert max(map(len, lines)) <= 80
    headings = [line for line in lines if not line.startswith("surface_pressure")]
    assert sorted(" ".join(headings).split()) == sorted(" ".join(flags).split())
    counted = [word for line in lines if line not in headings for word in line.split()[1:]]
    assert counted == ["1"] * len(flags)
    one = dataclasses.replace(placed, rows=placed.rows.assign(flag="not in model"))
    assert one.report().split("\n")[1:] == [" " * 16 + "  not in", " " * 16 + "   model", f"surface_pressure{20:8}"]


def test_errors_by_row_variable_channel_and_type():
    layout = layout_on(NORTH[::8], EAST[::8])
    frame = rows([0.0] * 5, 0.0, "t", [500.0, 500.0, 850.0, 700.0, 500.0], observation=280.0)
    frame = frame.assign(error=[0.5, np.nan, np.nan, np.nan, np.nan], type=[None, None, "a", "b", "b"], units="K")
    errors = {"temperature": 1.0, "temperature_500": 2.0, ("b", "temperature"): 3.0, ("b", "temperature_500"): 4.0}
    placed = read_table(frame).on(layout, TIMES, errors=errors, quality=[])
    np.testing.assert_array_equal(placed.rows["error_used"], [0.5, 2.0, 1.0, 3.0, 4.0])
    np.testing.assert_array_equal(placed.xs["error"][0], [0.5, 2.0, 1.0, 3.0, 4.0, 1.0, 1.0, 1.0])
    assert (read_table(frame).on(layout, TIMES, errors=7.0).rows["error_used"] == [0.5, 7, 7, 7, 7]).all()
    for errors, message in (
        (None, r"the table, row 1: 'temperature' has no error \(4 rows\); give a column error, or errors="),
        (0.0, "got errors=0.0; give a positive standard deviation"),
        ({"temperature": -1.0}, r"got errors\['temperature'\]=-1.0"),
        ({3: 1.0}, r"got errors\[3\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            read_table(frame).on(layout, TIMES, errors=errors, quality=[])
    # The square of an error, and of a departure over it, must be a number of single precision.
    frame["error"] = [0.5, 1e-30, 1e14, 1.0, 1.0]
    with pytest.raises(
        ValueError, match="the table, row 1: the error of 'temperature' is 1e-30 K; give a standard dev"
    ):
        read_table(frame).on(layout, TIMES, quality=[])


def test_sizes_and_ids():
    """Few sizes, an empty step, padding, and the same arrays for another table."""
    layout = layout_on(NORTH[::8], EAST[::8])
    frame = rows(np.zeros(13), np.arange(13) * 20.0, "sp").assign(observation=np.arange(13.0))
    frame.loc[9:, "time"] = TIMES[2]
    placed = read_table(frame).on(layout, TIMES, quality=[])
    assert placed.sizes == {"variables": (12, 8)}
    assert placed.xs["y"].shape == (3, 12)
    np.testing.assert_array_equal(np.isfinite(placed.xs["y"]).sum(1), [9, 0, 4])
    np.testing.assert_array_equal(placed.xs["id"][2], [9, 10, 11, 12, *[-1] * 8])
    assert np.isnan(placed.xs["place"][1]).all()
    back = placed.by_row(placed.xs["y"])
    np.testing.assert_array_equal(back, placed.rows["value"])
    other = read_table(frame[:2]).on(layout, TIMES, sizes={**placed.sizes, "wind_speed": (8, 8)})
    assert other.sizes == {"variables": (12, 8), "wind_speed": (8, 8)}
    empty = read_table(frame[:0]).on(layout, TIMES, sizes=placed.sizes)
    assert jax.tree.map(np.shape, empty.xs) == jax.tree.map(np.shape, placed.xs)
    assert np.isfinite(empty.operator(state(layout), jax.tree.map(lambda v: v[0], other.xs))).all()
    with pytest.raises(ValueError, match="got a size of 'snow'; the parts are variables, wind_speed"):
        read_table(frame).on(layout, TIMES, sizes={"snow": (8, 8)})
    with pytest.raises(ValueError, match=r"operator got a state of shape \(3,\), but the layout"):
        placed.operator(jnp.zeros(3), {})
    with pytest.raises(ValueError, match="operator got no parts"):
        placed.operator(state(layout), {"y": 1})
    with pytest.raises(ValueError, match=r"by_row got an array of shape \(3,\)"):
        placed.by_row(np.zeros(3))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {"variable": "tempreature"},
            {},
            r"the table, row 0: the variable is 'tempreature' \(2 rows\), .* 'temperature'",
        ),
        ({"variable": "t500", "level": 850.0}, {}, r"row 0: the variable is 't500', but its pressure is 85000 Pa"),
        (
            {"level": None, "pres": [850.0, 500.0]},
            {},
            r"row 0: the pressure is 850 Pa, and no row .* if given in hPa; call",
        ),
        (
            {"level": [85000.0, 50000.0]},
            {},
            r"row 0: level is 85000; give a pressure in hPa, up to .* \(2 rows are such\)",
        ),
        ({}, {"instrument": "platform"}, r"got instrument='platform', but the table has no column 'platform'"),
        ({}, {"quality": "Duplicates"}, "got quality='Duplicates'; give a list"),
        ({}, {"quality": [3]}, "got quality=3; expected a QualityCheck"),
    ],
)
def test_refused(change, options, message):
    frame = rows([0.0, 0.0], [0.0, 1.0], "t", [850.0, 500.0], observation=280.0, units="K")
    frame = frame.assign(**change).dropna(axis=1, how="all")
    with pytest.raises((ValueError, TypeError), match=message):
        read_table(frame).on(layout_on(NORTH[::8], EAST[::8]), TIMES, **options)


def test_layouts_without_a_grid_are_refused():
    table = read_table(rows([0.0], [0.0], "t", 500.0))
    with pytest.raises(ValueError, match="the layout has no variables"):
        table.on(Layout((3,), ("site",)), TIMES)
    with pytest.raises(TypeError, match=r"got layout=3; expected a Layout: write layout=prior.layout"):
        table.on(3, TIMES)
