import numpy as np
import pytest
import xarray as xr
from monte_carlo import assert_mean

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diagnostics import area_weights


@pytest.mark.parametrize("n", [2, 3, 16, 17])
def test_power_sums_to_the_variance(n):
    x = np.random.default_rng(n).normal(5.0, 2.0, (4, n))
    power = ndda.diagnostics.power_spectrum(x)
    assert power.shape == (4, n // 2)
    assert power.sum(-1) == pytest.approx(x.var(-1))


@pytest.mark.parametrize("n", [12, 13])
def test_each_wave_is_found_at_its_wavenumber(n):
    j = np.arange(n)
    x = 7 + 3 * np.cos(2 * np.pi * 2 * j / n + 0.4) + 0.5 * np.sin(2 * np.pi * 5 * j / n)
    expected = np.zeros(6)
    expected[[1, 4]] = 9 / 2, 0.25 / 2
    assert ndda.diagnostics.power_spectrum(x) == pytest.approx(expected, abs=1e-12)
    assert ndda.diagnostics.power_spectrum(x[:, None], axis=0)[:, 0] == pytest.approx(expected, abs=1e-12)


def test_the_shortest_wave_has_all_its_variance():
    x = np.array([1.0, -1.0] * 4)
    assert ndda.diagnostics.power_spectrum(x) == pytest.approx([0, 0, 0, 1], abs=1e-12)
    assert ndda.diagnostics.roughness(x) == pytest.approx(2.0)


def test_white_noise_is_flat():
    n, rings = 16, 4000
    x = np.random.default_rng(0).normal(size=(rings, n))
    each = ndda.diagnostics.power_spectrum(x)
    power = ndda.diagnostics.power_spectrum(x, average=0)
    assert power == pytest.approx(each.mean(0))
    expected = np.full(n // 2, 2 / n)
    expected[-1] = 1 / n
    assert_mean(each, expected)


def test_roughness_is_the_mean_of_the_spectrum():
    rng = np.random.default_rng(0)
    for n in (15, 16):
        x = rng.normal(size=(3, n)).cumsum(-1)
        power = ndda.diagnostics.power_spectrum(x)
        waves = 1 - np.cos(2 * np.pi * np.arange(1, n // 2 + 1) / n)
        assert ndda.diagnostics.roughness(x) == pytest.approx((power * waves).sum(-1) / power.sum(-1))
        assert ndda.diagnostics.roughness(x, average=None) == pytest.approx((power * waves).sum() / power.sum())
    wave = np.sin(2 * np.pi * 3 * np.arange(20) / 20)
    assert ndda.diagnostics.roughness(wave) == pytest.approx(1 - np.cos(2 * np.pi * 3 / 20))
    assert np.isnan(ndda.diagnostics.roughness(np.ones(5)))


def test_roughness_of_white_noise_and_of_seams():
    n, rings = 32, 4000
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(rings, n))
    steps, variance = ((np.roll(noise, -1, -1) - noise) ** 2).mean(-1) / 2, noise.var(-1)
    se = np.std(steps - n / (n - 1) * variance) / np.sqrt(rings)
    assert abs(ndda.diagnostics.roughness(noise, average=0) - n / (n - 1)) < 4 * se
    # Smooth members, put together from pieces of four points, each of another member. Half the mean square of a seam's
    # difference is Var x instead of Var x (1 - r), r the correlation of neighbors; one difference in four is a seam's.
    angle = 2 * np.pi * np.arange(n) / n
    members = np.cos(2 * angle + rng.uniform(0, 2 * np.pi, (rings, 1)))
    pieces = np.concatenate([members[rng.permutation(rings)][:, i : i + 4] for i in range(0, n, 4)], axis=-1)
    smooth = 1 - np.cos(2 * angle[1])
    assert ndda.diagnostics.roughness(members, average=0) == pytest.approx(smooth)
    steps = ((np.roll(pieces, -1, -1) - pieces) ** 2).mean(-1) / 2
    rough = ndda.diagnostics.roughness(pieces, average=0)
    expected, se = 0.5 * (0.75 * smooth + 0.25), steps.std() / np.sqrt(rings)
    assert abs(rough * pieces.var(-1).mean() - expected) < 4 * se
    assert rough > 3 * smooth


def test_fields_by_name_are_averaged_with_weights():
    rng = np.random.default_rng(0)
    latitude = np.array([-60.0, -20.0, 20.0, 60.0])
    x = rng.normal(size=(3, 4, 10)) * np.array([1.0, 2.0, 3.0, 4.0])[:, None]
    named = xr.DataArray(x, dims=("draw", "latitude", "longitude"), coords={"latitude": latitude, "draw": range(3)})
    weights = area_weights(latitude)
    power = ndda.diagnostics.power_spectrum(
        named.transpose("longitude", "draw", "latitude"),
        axis="longitude",
        average="latitude",
        weights=area_weights(named.latitude),
    )
    assert power.dims == ("wavenumber", "draw")
    assert power.wavenumber.values.tolist() == [1, 2, 3, 4, 5]
    numbers = ndda.diagnostics.power_spectrum(x, average=1, weights=weights)
    assert power.transpose("draw", "wavenumber").values == pytest.approx(numbers)
    assert numbers.sum(-1) == pytest.approx((x.var(-1) * weights).sum(1) / weights.sum())
    rough = ndda.diagnostics.roughness(
        named, axis="longitude", average=["draw", "latitude"], weights=area_weights(named.latitude)
    )
    assert float(rough) == pytest.approx(ndda.diagnostics.roughness(x, average=(0, 1), weights=weights))
    steps = ((np.roll(x, -1, -1) - x) ** 2).mean(-1)
    assert float(rough) == pytest.approx((steps * weights).sum() / (2 * x.var(-1) * weights).sum())


def test_a_nan_makes_its_ring_nan():
    x = np.random.default_rng(0).normal(size=(2, 8))
    x[0, 3] = np.nan
    assert np.isnan(ndda.diagnostics.power_spectrum(x)).tolist() == [[True] * 4, [False] * 4]
    assert np.isnan(ndda.diagnostics.roughness(x)).tolist() == [True, False]
    assert np.isnan(ndda.diagnostics.power_spectrum(x, average=0)).all()


def test_rings_that_do_not_fit_are_refused():
    x = np.zeros((3, 4))
    named = xr.DataArray(x, dims=("latitude", "longitude"), coords={"latitude": [0.0, 1.0, 2.0]})
    for function in (ndda.diagnostics.power_spectrum, ndda.diagnostics.roughness):
        with pytest.raises(ValueError, match="axis of the ring"):
            function(x, average=1)
        with pytest.raises(ValueError, match=r"axis \[2\] is not among those of the field"):
            function(x, axis=2)
        with pytest.raises(ValueError, match=r"axis \['lon'\]"):
            function(named, axis="lon")
        with pytest.raises(ValueError, match="2 points or more"):
            function(x[:, :1])
        with pytest.raises(TypeError, match="field and weights"):
            function(named, axis="longitude", weights=np.ones(3))
        with pytest.raises(ValueError, match=r"\['longitude'\], which are not"):
            function(named, axis="longitude", weights=xr.DataArray(np.ones(4), dims="longitude"))
        with pytest.raises(ValueError, match="other points along"):
            function(named, axis="longitude", weights=named.isel(longitude=0).assign_coords(latitude=[0.0, 1.0, 3.0]))


def test_longitudes_that_are_no_ring_are_refused():
    x, longitude = np.random.default_rng(0).normal(size=12), np.arange(12) * 30.0
    expected = ndda.diagnostics.power_spectrum(x)
    for values in (longitude, longitude[::-1], longitude - 180.0, np.roll(longitude, 5)):
        field = xr.DataArray(x, dims="longitude", coords={"longitude": values})
        np.testing.assert_array_equal(ndda.diagnostics.power_spectrum(field, axis="longitude"), expected)
    closed = np.append(longitude[:-1], 360.0)
    for values in (closed, longitude / 6.0, np.where(longitude == 30.0, np.nan, longitude)):
        field = xr.DataArray(x, dims="longitude", coords={"longitude": values})
        for function in (ndda.diagnostics.power_spectrum, ndda.diagnostics.roughness):
            with pytest.raises(ValueError, match=r"equally spaced points that go around once"):
                function(field, axis="longitude")
