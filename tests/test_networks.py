"""Networks of observations: what they see of fields that are known everywhere."""

import jax
import numpy as np
import pytest

from numpyro_diffusion_da.fields import Layout, Undefined, Variable
from numpyro_diffusion_da.observation import BlockMeans, Stations, Swath, channel, channel_names, fraction_of

LATITUDE, LONGITUDE = np.linspace(-78.75, 78.75, 8), np.arange(16) * 22.5
LAYOUT = Layout(
    (8, 16, 3),
    ("latitude", "longitude", "channel"),
    (("latitude", tuple(LATITUDE)), ("longitude", tuple(LONGITUDE))),
    variables=(Variable("surface_pressure", "hPa"), Variable("temperature", "K", (500, 850))),
)
ERRORS = {"temperature_850": 0.5, "surface_pressure": 2.0}


def fields(surface_pressure, temperature_850):
    x = np.zeros((8, 16, 3), np.float32)
    x[..., 0], x[..., 2] = surface_pressure, temperature_850
    return x


def test_stations_interpolate_around_the_globe():
    """Exact for a field linear in latitude, and for one of longitude that is linear across 0 degrees too."""
    network = Stations(ERRORS, count=200, seed=1)
    latitude, longitude = network.places(LAYOUT).T
    tent = np.minimum(LONGITUDE, 360.0 - LONGITUDE)
    y = np.asarray(network.observe(fields(tent[None], LATITUDE[:, None]), LAYOUT))
    np.testing.assert_allclose(y[:, 0], np.clip(latitude, LATITUDE[0], LATITUDE[-1]), atol=1e-4)
    np.testing.assert_allclose(y[:, 1], np.minimum(longitude, 360.0 - longitude), atol=1e-3)


def on_grid(latitude, longitude, undefined=None):
    variable = Variable("t", "K", undefined=None if undefined is None else Undefined(undefined))
    axes = (("latitude", tuple(latitude)), ("longitude", tuple(longitude)))
    return Layout((len(latitude), len(longitude), 1), ("latitude", "longitude", "channel"), axes, variables=(variable,))


def smooth(latitude, longitude):
    """A field of some 10 K, the same point by point whatever the convention of the longitude."""
    a, b = np.deg2rad(latitude), np.deg2rad(longitude)
    return 280.0 + 10.0 * np.sin(a) + 5.0 * np.cos(a) * np.cos(b) + 2.0 * np.cos(a) * np.sin(b)


NORTH, EAST = np.linspace(-90.0, 90.0, 37), np.arange(72) * 5.0
WORLD = [(0.0, 0.0), (90.0, 10.0), (-90.0, -170.0), (51.2, -0.1), (51.2, 359.9), (12.3, 179.9), (12.3, -179.9)]
EUROPE = [(30.0, 0.0), (60.0, 60.0), (47.3, 0.1), (31.0, 58.7)]
GRIDS = {
    "from south": (NORTH, EAST, WORLD),
    "from north": (NORTH[::-1], EAST, WORLD),
    "-180 to 175": (NORTH, EAST - 180.0, WORLD),
    "-180 to 180": (NORTH[::-1], np.arange(73) * 5.0 - 180.0, WORLD),
    "0 to 360": (NORTH, np.arange(73) * 5.0, WORLD),
    "360 to 0": (NORTH, np.arange(73)[::-1] * 5.0, WORLD),
    "from 180 through 0": (NORTH, np.roll(EAST, 36), WORLD),
    "shifted": (NORTH, EAST + 2.5, WORLD),
    "without poles": (NORTH[:-1] + 2.5, EAST, WORLD[3:]),
    "30-60N 0-60E": (NORTH[24:31], EAST[:13], EUROPE),
    "60-30N 0-60E": (NORTH[24:31][::-1], EAST[:13], EUROPE),
    "across 0": (NORTH[24:31], np.roll(EAST, 6)[:18], [(45.0, -29.9), (45.0, 330.1), (45.0, -2.0), (45.0, 54.9)]),
    "across the date line": (NORTH[24:31], 150.0 + EAST[:13], [(45.0, 179.0), (45.0, -179.0), (45.0, 209.9)]),
}


@pytest.mark.parametrize("name", GRIDS)
def test_stations_are_right_on_every_grid(name):
    latitude, longitude, places = GRIDS[name]
    layout = on_grid(latitude, longitude)
    x = smooth(latitude[:, None], longitude)[..., None].astype(np.float32)
    for network in (Stations({"t": 1.0}, places=places), Stations({"t": 1.0}, count=300)):
        y = np.asarray(network.observe(x, layout))[:, 0]
        at = network.places(layout)
        inside = np.abs(at[:, 0]) <= np.abs(latitude).max()  # beyond the last row, a station has the values of the row
        np.testing.assert_allclose(y[inside], smooth(*at[inside].T), atol=0.03)
    np.testing.assert_array_equal(Stations({"t": 1.0}, places=places).places(layout), places)
    # Other networks observe each point once.
    swath = Swath({"t": 1.0}, width=360.0, thinning=1)
    np.testing.assert_allclose(swath.observe(x, layout)[:, 0], smooth(*swath.places(layout).T), rtol=1e-6)
    assert len(np.unique(np.round(np.mod(swath.places(layout), 360.0), 6), axis=0)) == len(swath.places(layout))


def test_stations_outside_a_region_are_refused():
    layout = on_grid(NORTH[24:31], EAST[:13])
    x = np.zeros(layout.shape, np.float32)
    named = Stations({"t": 1.0}, places={"Oslo": (59.9, 10.8), "Quito": (-0.2, -78.5)})
    with pytest.raises(ValueError, match=r"place 'Quito' at latitude -0.2, longitude -78.5 outside .* \(1 of 2 places"):
        named.observe(x, layout)
    for place in ((60.1, 10.0), (29.0, 10.0), (45.0, 60.5), (45.0, -0.5), (45.0, 359.0), (90.0, 0.0)):
        with pytest.raises(ValueError, match=r"number 1 at latitude .* latitudes 30 to 60 and longitudes 0 to 60;"):
            Stations({"t": 1.0}, places=[(45.0, 10.0), place]).observe(x, layout)


def test_block_means_across_the_end_of_the_longitudes():
    layout = on_grid(NORTH[24:30], np.roll(EAST, 1)[:18])
    assert BlockMeans({"t": 1.0}, size=3).places(layout)[0, 1] == pytest.approx(360.0)
    closed = on_grid(NORTH[:36], np.arange(73) * 5.0)  # 360 repeats 0 and does not count
    x = np.concatenate([np.ones((36, 72, 1)), np.full((36, 1, 1), np.nan)], 1).astype(np.float32)
    np.testing.assert_allclose(BlockMeans({"t": 1.0}, size=4).observe(x, closed), 1.0, rtol=1e-6)


def test_points_without_a_value_are_not_observed():
    land = np.zeros((37, 72), bool)
    land[20:25, 10:20] = True
    layout = on_grid(NORTH, EAST, land)
    x = smooth(NORTH[:, None], EAST)[..., None].astype(np.float32)
    x[land] = 254.0
    on_land, by_the_coast = (20.0, 75.0), (9.0, 75.0)
    for network in (
        Stations({"t": 1.0}, count=500),
        Stations({"t": 1.0}, places=[(0.0, 0.0), on_land]),
        Stations({"t": 1.0}, places=[(0.0, 0.0), by_the_coast]),
        Swath({"t": 1.0}),
    ):
        with pytest.raises(ValueError, match=r"observes 't' where it has no value: at \d+ of \d+ places, the first at"):
            network.observe(x, layout)
    flat = on_grid(NORTH[:36], EAST, land[:36])
    with pytest.raises(ValueError, match="BlockMeans observes 't' where it has no value"):
        BlockMeans({"t": 1.0}).observe(x[:36], flat)
    at_sea = Stations({"t": 1.0}, places=[(0.0, 0.0), (5.0, 75.0)])  # the second is on the last row of sea
    y = jax.jit(lambda v: at_sea.observe(v, layout))(x)
    np.testing.assert_allclose(y[:, 0], smooth(*at_sea.given.T), atol=0.03)
    with pytest.raises(ValueError, match=r"'t' has points without a value, .* layout.select\(x, name\)"):
        channel(layout, "t")


def test_stations_are_as_dense_everywhere():
    latitude, longitude = Stations(ERRORS, count=4000).places(LAYOUT).T
    for values in (0.5 + 0.5 * np.sin(np.deg2rad(latitude)), longitude / 360.0):
        counts, _ = np.histogram(values, 10, (0.0, 1.0))
        assert np.sum((counts - 400.0) ** 2 / 400.0) < 27.9  # chi-square with 9 degrees of freedom, 0.999


def test_swath_sees_a_band_that_moves():
    network = Swath(ERRORS, width=90.0, advance=45.0, thinning=2)
    reports = network.reports(8, LAYOUT)
    longitude = network.places(LAYOUT)[:, 1]
    assert sorted(set(longitude[reports[0]])) == [0.0, 45.0, 315.0]
    assert sorted(set(longitude[reports[3]])) == [90.0, 135.0, 180.0]
    assert reports.any(0).all()
    y = network.observe(fields(LONGITUDE[None], LATITUDE[:, None]), LAYOUT)
    np.testing.assert_allclose(y, network.places(LAYOUT), rtol=1e-6)


def test_block_means_are_by_area():
    network = BlockMeans(ERRORS, size=4)
    y = np.asarray(network.observe(fields(LONGITUDE[None], LATITUDE[:, None]), LAYOUT))
    assert y.shape == (8, 2)
    np.testing.assert_allclose(y, network.places(LAYOUT), rtol=1e-5)
    weights = np.cos(np.deg2rad(LATITUDE[:4]))
    np.testing.assert_allclose(y[0], [np.sum(weights * LATITUDE[:4]) / weights.sum(), LONGITUDE[:4].mean()], rtol=1e-5)


def test_errors_are_those_of_the_channels():
    assert channel_names(LAYOUT) == ["surface_pressure", "temperature_500", "temperature_850"]
    errors = fraction_of([4.0, 1.0, 3.0], list(ERRORS), LAYOUT, 0.2)
    assert errors == pytest.approx({"temperature_850": 0.6, "surface_pressure": 0.8})
    np.testing.assert_allclose(Stations(errors).error(), [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Stations({"temperature_250": 1.0}).channels(LAYOUT), "no channel 'temperature_250'; it has surface_p"),
        (lambda: channel(Layout((3,), ("i",)), "t"), "its layout has no variables"),
        (lambda: Swath({"surface_pressure": 0.0}), "positive standard deviation"),
        (lambda: Stations({"surface_pressure": np.nan}), "positive standard deviation"),
        (lambda: Stations({"surface_pressure": "1"}), r"got errors\['surface_pressure'\]='1'; give one number"),
        (lambda: Stations({"surface_pressure": [1.0, 2.0]}), "give one number for the name"),
        (lambda: Stations(["surface_pressure"]), "write errors="),
        (lambda: BlockMeans({}), "one channel or more"),
        (lambda: Stations(ERRORS, count=0), "count=0"),
        (lambda: Stations(ERRORS, count=2.5), "count=2.5"),
        (lambda: Stations(ERRORS, seed="a"), "seed='a'"),
        (lambda: Stations(ERRORS, count=3, places=[(0.0, 0.0)]), "count=3 and 1 places"),
        (lambda: Stations(ERRORS, places=[(0.0, np.nan)]), r"place number 0 at \(0, nan\); give \(latitude, long"),
        (lambda: Stations(ERRORS, places={"a": (0.0, 0.0), "b": (120.0, 45.0)}), r"place 'b' at \(120, 45\)"),
        (lambda: Stations(ERRORS, places=[("Oslo", 10.8)]), "not pairs of numbers"),
        (lambda: Stations(ERRORS, places=(59.9, 10.8)), r"places of shape \(2,\)"),
        (lambda: Stations(ERRORS, places=np.zeros((0, 2))), "one place or more"),
        (lambda: Swath(ERRORS, width=0), "width=0"),
        (lambda: Swath(ERRORS, width="60"), "width='60'"),
        (lambda: Swath(ERRORS, advance=np.inf), "advance=inf"),
        (lambda: Swath(ERRORS, thinning=1.5), "thinning=1.5"),
        (lambda: BlockMeans(ERRORS, size=2.0), "size=2.0"),
        (lambda: BlockMeans(ERRORS, size=5).places(LAYOUT), "5 x 5 points do not fill"),
        (lambda: Stations(ERRORS).places(Layout((3,), ("site",))), r"expected \(latitude, longitude, channel\)"),
        (lambda: Stations(ERRORS).observe(np.zeros((2, 8, 16, 3)), LAYOUT), r"state of shape \(2, 8, 16, 3\), but"),
        (lambda: fraction_of([1.0], list(ERRORS), LAYOUT, 0.2), r"scales of shape \(1,\), but the state has 3"),
        (lambda: fraction_of([4.0, 1.0, 3.0], "surface_pressure", LAYOUT, 0.2), "give a list of names"),
    ],
)
def test_wrong_networks(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
