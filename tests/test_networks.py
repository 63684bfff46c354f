"""Networks of observations: what they see of fields that are known everywhere."""

import numpy as np
import pytest

from numpyro_diffusion_da.fields import Layout, Variable
from numpyro_diffusion_da.observation import BlockMeans, Stations, Swath, channel_names, fraction_of

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


def test_wrong_networks():
    with pytest.raises(ValueError, match=r"no channel 'temperature_250'; it has surface_pressure, temperature_500"):
        Stations({"temperature_250": 1.0}).channels(LAYOUT)
    with pytest.raises(ValueError, match="positive standard deviation"):
        Swath({"surface_pressure": 0.0})
    with pytest.raises(ValueError, match="one channel or more"):
        BlockMeans({})
    with pytest.raises(ValueError, match="count=0"):
        Stations(ERRORS, count=0)
    with pytest.raises(ValueError, match="width=0"):
        Swath(ERRORS, width=0)
    with pytest.raises(ValueError, match="5 x 5 points do not fill"):
        BlockMeans(ERRORS, size=5).places(LAYOUT)
