"""The adapter to earth2studio's data assimilation protocol, without the package."""

from collections import OrderedDict
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas
import pytest
import xarray
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.assimilation import Earth2StudioAssimilation
from numpyro_diffusion_da.fields import Layout, Variable

NORTH, EAST = (60.0, 0.0, -60.0), (0.0, 90.0, 180.0, 270.0)
LAYOUT = Layout(
    (3, 4, 3),
    ("latitude", "longitude", "channel"),
    {"latitude": NORTH, "longitude": EAST},
    variables=(Variable("surface_pressure", "hPa"), Variable("temperature", "K", (500, 850))),
)
MEAN = np.broadcast_to(np.array([1000.0, 260.0, 280.0], np.float32), LAYOUT.shape)
MEMORY, NOISE, ERROR = 0.9, 1.0, 0.5
START = np.datetime64("2026-01-01T00", "ns")
HOUR = np.timedelta64(1, "h")


def climate():
    stddev = NOISE / np.sqrt(1 - MEMORY**2)
    return dist.Normal(jnp.asarray(MEAN), stddev).to_event(3)


PRIOR = ndda.DenoiserPrior(
    lambda z, s, x: z / (1 + s**2),
    layout=LAYOUT,
    location=lambda x: MEAN + MEMORY * (x - MEAN),
    scale=NOISE,
    noise_range=(0.02, 80.0),
    climatology=climate(),
)


def autoregression(operator):
    """The same process as that of the prior, as a program that compiles in no time."""

    def model(xs):
        def step(x, at):
            x = numpyro.sample("x", dist.Normal(MEAN + MEMORY * (x - MEAN), NOISE).to_event(3))
            numpyro.sample("y", dist.Normal(operator(x, at), at["error"]).to_event(1), obs=at["y"])
            return x, None

        scan(step, numpyro.sample("x0", climate()), xs)

    return model


def make(**changes):
    given = {"num_particles": 400, "step": "12h", "errors": ERROR, "program": autoregression, "reserve": 8}
    return Earth2StudioAssimilation(PRIOR, ndda.EnKF, **(given | changes))


@pytest.fixture(scope="module")
def model():
    """One for most tests, because it is compiled once."""
    return make(outputs=("mean", "spread", "members", "feedback"), variables={"pres": "surface_pressure"})


def frame(time, values, hours=0.0, **attrs):
    """Rows of (variable, latitude, longitude, value) as a source of earth2studio gives them."""
    rows = pandas.DataFrame(values, columns=["variable", "lat", "lon", "observation"])
    rows = rows.astype({"lat": np.float32, "lon": np.float32, "observation": np.float32})
    rows.insert(0, "time", time + int(60 * hours) * np.timedelta64(1, "m"))
    rows.attrs = {"request_time": np.atleast_1d(time), "request_lead_time": np.array([0 * HOUR])} | attrs
    return rows


SEEN = [("sp", 60.0, 90.0, 100_300.0), ("t850", 0.0, 180.0, 282.0), ("t500", -60.0, 270.0, 257.0)]


@runtime_checkable
class AssimilationModel(Protocol):
    """Methods that earth2studio's workflows call, in their order there."""

    def __call__(self, *args): ...
    def create_generator(self, *args): ...
    def init_coords(self): ...
    def input_coords(self): ...
    def output_coords(self, input_coords, *args, **kwargs): ...
    def to(self, device): ...


def test_it_has_what_workflows_read():
    model = make(outputs=("mean", "members", "spread", "feedback"), columns=("pres", "station"))
    assert isinstance(model, AssimilationModel)
    assert model.init_coords() is None
    assert model.to("cuda:0") is model
    (columns,) = model.input_coords()
    assert isinstance(columns, OrderedDict)
    assert list(columns) == ["time", "lat", "lon", "pres", "station", "observation", "variable"]
    assert [columns[name].dtype.str for name in ("time", "lat", "observation", "pres")] == ["<M8[ns]", *["<f4"] * 3]
    assert list(columns["variable"]) == ["sp", "t"]  # a column of pressures has the levels
    assert list(make().input_coords()[0]["variable"]) == ["sp", "t500", "t850"]
    times = np.array([START, START + 12 * HOUR])
    found = model.output_coords(model.input_coords(), request_time=times, request_lead_time=np.array([0 * HOUR]))
    assert all(isinstance(one, OrderedDict) for one in found)
    assert [list(one)[:5] for one in found[:2]] == [
        ["time", "variable", "lat", "lon"],
        ["ensemble", "time", "variable", "lat", "lon"],
    ]
    assert list(found[0]["variable"]) == ["sp", "t500", "t850"]
    np.testing.assert_array_equal(found[0]["time"], times)
    np.testing.assert_array_equal(found[0]["lat"], NORTH)
    assert np.isnat(model.output_coords(model.input_coords())[0]["time"]).all()


def kalman(values):
    """Mean and standard deviation after each step of the process at one place; None is a step without a value."""
    mean, variance, found = 0.0, NOISE**2 / (1 - MEMORY**2), []
    for value in values:
        mean, variance = MEMORY * mean, MEMORY**2 * variance + NOISE**2
        if value is not None:
            gain = variance / (variance + ERROR**2)
            mean, variance = mean + gain * (value - mean), (1 - gain) * variance
        found.append((mean, np.sqrt(variance)))
    return found


def test_a_generator_is_a_kalman_filter_at_each_place(model):
    """Observations at one time, two times at once, a step between without any, and a step on no frame at all."""
    generator = model.create_generator()
    assert next(generator) is None
    later = START + 12 * np.array([2, 3]) * HOUR
    both = pandas.concat([frame(later[0], SEEN, -1.0), frame(later[1], SEEN[1:], 2.0)], ignore_index=True)
    both.attrs["request_time"] = later
    found = [generator.send(sent) for sent in (frame(START, SEEN), both, None)]
    mean, spread, members = (xarray.concat([one[i] for one in found], "time") for i in range(3))
    np.testing.assert_array_equal(mean.time, START + 12 * np.array([0, 2, 3, 4]) * HOUR)
    assert mean.dims == ("time", "variable", "lat", "lon")
    assert members.dims == ("ensemble", *mean.dims)
    np.testing.assert_allclose(members.weight, 1 / 400)
    np.testing.assert_allclose(members.mean("ensemble"), mean, rtol=1e-5)
    np.testing.assert_allclose(members.std("ensemble", ddof=1), spread, rtol=1e-3)
    sizes = {"sp": 100.0, "t500": 1.0, "t850": 1.0}  # Pa and K
    for name, lat, lon, value in SEEN:
        center = MEAN[0, 0, list(sizes).index(name)] * sizes[name]
        own = [(value - center) / sizes[name], None, (value - center) / sizes[name], None, None]
        own[3] = own[0] if name != "sp" else None
        for k, (expected, stddev) in enumerate(np.array(kalman(own))[[0, 2, 3, 4]]):
            at = {"variable": name, "lat": lat, "lon": lon}
            # With 400 members the gain has an error of its own, of about one part in 20.
            error = 4 * stddev / np.sqrt(400) + 0.05 * abs(expected)
            assert abs(float(mean.sel(at)[k] - center) / sizes[name] - expected) < error
            assert float(spread.sel(at)[k]) / sizes[name] == pytest.approx(stddev, rel=0.15)
    rows = found[1][3]
    assert list(rows["flag"]) == ["used"] * 5
    np.testing.assert_array_equal(rows.attrs["request_time"], later)
    assert abs(rows["background"][0] - 1000.0 - kalman([3.0, None, None])[2][0]) < 0.5
    assert np.all(np.abs(rows["analysis"] - rows["value"]) < np.abs(rows["background"] - rows["value"]))


@pytest.mark.slow
def test_a_call_is_each_analysis_by_itself(model):
    times = START + np.array([0, 24]) * HOUR
    both = pandas.concat([frame(time, SEEN) for time in times], ignore_index=True)
    both.attrs["request_time"] = times
    mean, _, _, rows = model(both, None)
    assert len(rows) == 6
    assert (rows["flag"] == "used").all()
    for k, time in enumerate(times):
        alone, *_ = model(frame(time, SEEN))
        np.testing.assert_array_equal(alone.values, mean.isel(time=[k]).values)
    assert abs(float(mean.sel(variable="sp", lat=60.0, lon=90.0)[1]) - 1e5 - 100 * kalman([3.0])[0][0]) < 50
    model.set_rng(1)
    assert np.any(model(frame(times[0], SEEN))[0].values != mean.isel(time=[0]).values)
    model.set_rng(0)


class OnAnotherDevice:
    """A frame as cudf has it, which pandas does not read."""

    def __init__(self, rows):
        self._rows, self.attrs = rows, rows.attrs

    def to_pandas(self):
        return self._rows


def test_frames_as_sources_make_them(model):
    """Frames of the device, other names and columns, values in their own units, and frames without rows."""
    rows = frame(START, [("pres", 60.0, 90.0, 100_300.0), ("t", 0.0, 180.0, 282.0), ("q", 0.0, 0.0, 1.0)])
    rows = rows.assign(pres=[np.nan, 85_000.0, 85_000.0], type=np.array([187, 120, 120], np.uint16))
    rows = rows.assign(elev=[10.0, 1500.0, 1500.0], station_elev=[10.0, 200.0, 200.0])
    *_, found = model(OnAnotherDevice(rows))
    assert list(found["flag"]) == ["used", "used", "not in model"]
    assert list(found["elev"]) == [10.0, 200.0, 200.0]
    assert found["value"][0] == pytest.approx(1003.0)
    *_, nothing = model(frame(START, []))
    assert len(nothing) == 0


def test_wrong_use_is_refused_in_one_sentence(model):
    with pytest.raises(ValueError, match=r'no frame has the attribute "request_time".*fetch_dataframe'):
        model(frame(START, SEEN, request_time=None))
    generator = model.create_generator()
    next(generator)
    with pytest.raises(ValueError, match='the first frame has no attribute "request_time"'):
        generator.send(None)
    generator = model.create_generator()
    next(generator)
    generator.send(frame(START, SEEN))
    with pytest.raises(ValueError, match=r"2026-01-01T06.* was requested, but analyses are 12 h apart and the last"):
        generator.send(frame(START + 6 * HOUR, SEEN))
    with pytest.raises(TypeError, match="got 3 in place of a frame; give a DataFrame"):
        model(frame(START, SEEN), 3)
    with pytest.raises(ValueError, match="the frames request analyses at"):
        model(frame(START, SEEN), frame(START + 12 * HOUR, SEEN))
    with pytest.raises(ValueError, match="starts from its climatology"):
        model.create_generator(xarray.DataArray(0.0))
    for wrong, words in [
        ({"step": None}, 'does not say how long its step is; give step="12h"'),
        ({"outputs": ("median",)}, r"got outputs=\('median',\); give some of"),
        ({"step": "-3h"}, "give a positive time difference"),
    ]:
        with pytest.raises(ValueError, match=words):
            make(**wrong)


RECENT, BEFORE = 0.6, 0.3
"""Memory of a process of second order: of the last state and of the one before."""


class Pairs(ndda.priors.DeterministicPrior):
    """A prior of two frames with forcings, as the weather models are."""

    TIME_STEP = np.timedelta64(12, "h")

    def forcings(self, times):
        return jnp.arange(1.0 * len(times))

    def frames(self, dataset, times):
        return ndda.fields.read_states(dataset, self.layout, times)


def of_pair(pair):
    return MEAN + RECENT * (pair[1] - MEAN) + BEFORE * (pair[0] - MEAN)


def second_order(operator):
    """The process of `Pairs`, as a program that compiles in no time."""

    def model(xs, *frames):
        def step(pair, at):
            x = numpyro.sample("x", dist.Normal(of_pair(pair), NOISE).to_event(3))
            numpyro.sample("y", dist.Normal(operator(x, at), at["error"]).to_event(1), obs=at["y"])
            return (pair[1], x), None

        scan(step, frames, xs)

    return model


def test_a_prior_of_two_frames_starts_from_what_a_source_gives():
    """Frames in Pa and K, and a Kalman filter of second order at observed and at other places."""
    prior = Pairs(of_pair, layout=LAYOUT, scale=NOISE, condition=lambda pair, inputs: (pair[0] + 0.0 * inputs, pair[1]))
    programs = []

    def own_program(program):
        programs.append(program)
        return ndda.EnKF(program)

    model = Earth2StudioAssimilation(
        prior, ndda.EnKF, num_particles=400, errors=ERROR, program=second_order, reserve=8, outputs=("mean",)
    )
    (coords,) = model.init_coords()
    np.testing.assert_array_equal(coords["lead_time"] / HOUR, [-12, 0])
    factor = np.array([100.0, 1.0, 1.0])[:, None, None]
    states = [factor * (np.moveaxis(MEAN, -1, 0) + anomaly) for anomaly in (2.0, -1.0)]
    coords = {**coords, "time": np.array([START - 12 * HOUR])}
    first = xarray.DataArray(np.array([states], np.float32), coords, tuple(coords))
    generator = model.create_generator(first)
    next(generator)
    (one,), (two,) = generator.send(frame(START, SEEN)), generator.send(None)
    np.testing.assert_array_equal([one.time.values[0], two.time.values[0]], [START, START + 12 * HOUR])
    gain = NOISE**2 / (NOISE**2 + ERROR**2)
    for (_, lat, lon, _), departure, name in zip(SEEN, (3.0, 2.0, -3.0), ("sp", "t850", "t500"), strict=True):
        size, center = (100.0, 1000.0) if name == "sp" else (1.0, 280.0 if name == "t850" else 260.0)
        of_one, of_two = ((each.sel(variable=name)[0] / size - center) for each in (one, two))
        at = {"lat": lat, "lon": lon}
        assert abs(float(of_one.sel(at)) - gain * departure) < 0.35
        assert abs(float(of_two.sel(at)) - RECENT * float(of_one.sel(at)) + BEFORE) < 0.25
    assert abs(float((two.sel(variable="t500") - 260.0).mean()) + BEFORE) < 0.25
    with pytest.raises(ValueError, match=r"Pairs starts from 2 frames; give them as the first argument"):
        model.create_generator()
    with pytest.raises(ValueError, match=r"expected 2 frames 12 h apart; fetch the lead times of init_coords\(\)"):
        model.create_generator(first.isel(lead_time=[1]))

    # The program that it makes by itself begins at these frames too.
    Earth2StudioAssimilation(prior, own_program, errors=ERROR)
    frames = [jnp.asarray(MEAN + anomaly) for anomaly in (2.0, -1.0)]
    xs = {**model._place([frame(START, SEEN)], np.array([START])).xs, "forcings": jnp.zeros(1)}
    seeded = numpyro.handlers.seed(programs[0], 0)
    trace = numpyro.handlers.trace(seeded).get_trace(xs, *frames)
    np.testing.assert_array_equal(trace["x0"]["value"], frames)
    np.testing.assert_array_equal(trace["previous"]["value"][0], frames[1])
    assert abs(float((trace["x"]["value"][0] - MEAN).mean())) < 0.6
