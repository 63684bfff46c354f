import numpy as np
import pytest
import xarray as xr
from monte_carlo import assert_mean
from scipy import stats

import numpyro_diffusion_da as ndda


def ensembles(seed, members, points, spread=1.0):
    """Members and truth from one distribution at each point, calibrated where `spread` is 1."""
    rng = np.random.default_rng(seed)
    center, scale = rng.normal(size=points), rng.uniform(0.5, 2.0, points)
    ensemble = center + spread * scale * rng.normal(size=(members, points))
    return ensemble, center + scale * rng.normal(size=points)


def gaussian_crps(mean, sd, y):
    z = (y - mean) / sd
    return sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))


def test_rmse_takes_the_mean_of_squares_first():
    ensemble = np.array([[[1.0, 2.0], [3.0, 0.0]], [[3.0, 2.0], [5.0, 4.0]]])  # mean [[2, 2], [4, 2]]
    truth = np.array([[1.0, 2.0], [1.0, 0.0]])  # errors [[1, 0], [3, 2]]
    assert ndda.diagnostics.rmse(ensemble, truth) == pytest.approx(np.sqrt(14 / 4))
    assert ndda.diagnostics.rmse(ensemble, truth, axis=1) == pytest.approx(np.sqrt([1 / 2, 13 / 2]))
    assert ndda.diagnostics.rmse(ensemble, truth, axis=-1, weights=[3.0, 1.0]) == pytest.approx(
        np.sqrt([3 / 4, 31 / 4])
    )
    assert ndda.diagnostics.rmse(ensemble, truth, weights=[[3.0], [1.0]]) == pytest.approx(np.sqrt((3 * 1 + 13) / 8))
    assert ndda.diagnostics.rmse(np.moveaxis(ensemble, 0, 2), truth, member=2) == pytest.approx(np.sqrt(14 / 4))
    assert ndda.diagnostics.rmse(ensemble, truth, axis=()) == pytest.approx(np.array([[1.0, 0.0], [3.0, 2.0]]))


@pytest.mark.parametrize("members", [2, 5, 50])
def test_spread_of_a_calibrated_ensemble_is_its_skill(members):
    points = 20_000
    ensemble, truth = ensembles(members, members, points)
    ratio = ndda.diagnostics.spread_skill(ensemble, truth)
    squares = (ensemble.mean(0) - truth) ** 2
    variance = (members + 1) / members * ensemble.var(0, ddof=1)
    # Standard error of a ratio of means; half of it for its root.
    error = 0.5 * np.std(variance - squares) / squares.mean() / np.sqrt(points)
    assert abs(ratio - 1) < 4 * error
    assert ratio == pytest.approx(ndda.diagnostics.spread(ensemble) / ndda.diagnostics.rmse(ensemble, truth))
    if members <= 5:  # without the finite-ensemble factor the same ensemble would look overconfident
        assert abs(ratio * np.sqrt(members / (members + 1)) - 1) > 8 * error


@pytest.mark.slow
@pytest.mark.parametrize("members", [2, 5, 50])
def test_crps_of_a_gaussian_ensemble_has_its_closed_form_for_any_size(members):
    points = 20_000
    rng = np.random.default_rng(members)
    mean, sd, y = rng.normal(size=points), rng.uniform(0.5, 2.0, points), rng.normal(size=points)
    scores = ndda.diagnostics.crps(mean + sd * rng.normal(size=(members, points)), y, axis=())
    difference = scores - gaussian_crps(mean, sd, y)
    assert_mean(difference, 0.0)


def test_crps_is_the_fair_estimate():
    x, y = np.array([0.0, 1.0, 4.0]), 2.0
    pairs = np.abs(x[:, None] - x).sum() / (2 * 3 * 2)
    assert ndda.diagnostics.crps(x, y) == pytest.approx(np.abs(x - y).mean() - pairs)


def test_crps_of_large_values_keeps_its_digits():
    x = np.float32([500_000.0, 500_010.0, 500_020.0])
    assert ndda.diagnostics.crps(x, np.float32(500_010.0)) == pytest.approx(
        ndda.diagnostics.crps(x - np.float32(5e5), np.float32(10.0)), rel=1e-9
    )


def test_rank_histogram_is_flat_for_a_calibrated_ensemble():
    members, points = 9, 20_000
    counts = ndda.diagnostics.rank_histogram(*ensembles(0, members, points))
    assert counts.shape == (members + 1,)
    assert counts.sum() == pytest.approx(points)
    expected = points / (members + 1)
    assert np.sum((counts - expected) ** 2 / expected) < stats.chi2.ppf(1 - 1e-4, members)
    # Too little spread piles up in the outer ranks.
    narrow = ndda.diagnostics.rank_histogram(*ensembles(0, members, points, spread=0.5))
    assert min(narrow[0], narrow[-1]) > 1.5 * expected


def test_rank_histogram_shares_out_ties():
    assert ndda.diagnostics.rank_histogram(np.zeros((3, 8)), np.zeros(8)) == pytest.approx([2.0, 2.0, 2.0, 2.0])
    assert ndda.diagnostics.rank_histogram(np.array([[0.0], [1.0], [1.0], [2.0]]), np.ones(1)) == pytest.approx(
        [0, 1 / 3, 1 / 3, 1 / 3, 0]
    )


def test_missing_truth_is_left_out_and_a_failed_member_is_seen():
    ensemble, truth = ensembles(1, 4, 10)
    truth[3] = np.nan
    kept = np.arange(10) != 3
    for score in (ndda.diagnostics.rmse, ndda.diagnostics.spread_skill, ndda.diagnostics.crps):
        assert score(ensemble, truth) == pytest.approx(score(ensemble[:, kept], truth[kept]))
        assert np.isnan(score(ensemble, truth, axis=())[3])
    assert ndda.diagnostics.rank_histogram(ensemble, truth).sum() == pytest.approx(9)
    ensemble[:, 3] = np.nan  # no member has the point either: land in a sea surface temperature
    assert ndda.diagnostics.rmse(ensemble, truth) == pytest.approx(
        ndda.diagnostics.rmse(ensemble[:, kept], truth[kept])
    )
    assert ndda.diagnostics.spread(ensemble) == pytest.approx(ndda.diagnostics.spread(ensemble[:, kept]))
    ensemble[2, 5] = np.nan
    for value in (
        ndda.diagnostics.rmse(ensemble, truth),
        ndda.diagnostics.spread(ensemble),
        ndda.diagnostics.spread_skill(ensemble, truth),
        ndda.diagnostics.crps(ensemble, truth),
    ):
        assert np.isnan(value)
    with pytest.raises(ValueError, match="NaN members"):
        ndda.diagnostics.rank_histogram(ensemble, truth)
    assert np.isnan(ndda.diagnostics.rmse(ensemble, np.full(10, np.nan)))


def test_named_arrays_give_the_same_by_name():
    rng = np.random.default_rng(0)
    ensemble, truth = rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(2, 3, 4))
    latitude = np.array([-30.0, 0.0, 60.0])
    coords = {"latitude": latitude, "time": [0, 6], "draw": range(5)}
    named = xr.DataArray(ensemble, dims=("time", "draw", "latitude", "longitude"), coords=coords)
    named_truth = xr.DataArray(truth, dims=("time", "latitude", "longitude"), coords={"latitude": latitude})
    weights = ndda.diagnostics.area_weights(named.latitude)
    assert isinstance(weights, xr.DataArray)
    shuffled = named_truth.transpose("longitude", "time", "latitude")
    for score in (ndda.diagnostics.rmse, ndda.diagnostics.spread_skill, ndda.diagnostics.crps):
        got = score(named, shuffled, member="draw", axis=["latitude", "longitude"], weights=weights)
        assert got.dims == ("time",)
        column = weights.values[:, None]
        assert got.values == pytest.approx(score(ensemble, truth, member=1, axis=(1, 2), weights=column))
    assert float(ndda.diagnostics.spread(named, member="draw")) == pytest.approx(
        ndda.diagnostics.spread(ensemble, member=1)
    )
    counts = ndda.diagnostics.rank_histogram(named, shuffled, member="draw")
    assert counts == pytest.approx(ndda.diagnostics.rank_histogram(ensemble, truth, member=1))
    pooled = named.rename(time="chain").stack(sample=("chain", "draw"))
    assert ndda.diagnostics.spread(pooled, member="sample", axis=()).dims == ("latitude", "longitude")


def test_area_weights_follow_the_cells():
    regular = np.arange(-89.5, 90.0, 1.0)  # no cell at a pole: in proportion to the cosine
    cosine = np.cos(np.deg2rad(regular))
    assert ndda.diagnostics.area_weights(regular) == pytest.approx(cosine / cosine.mean())
    poles = np.linspace(90.0, -90.0, 181)  # half a cell at each pole
    weights = ndda.diagnostics.area_weights(poles)
    assert weights.mean() == pytest.approx(1.0)
    half = 1 - np.sin(np.deg2rad(89.5))
    assert weights[[0, -1]] == pytest.approx(np.full(2, half / 2 * 181))  # all cells together have 2
    assert ndda.diagnostics.area_weights(poles[::-1]) == pytest.approx(weights[::-1])
    region = ndda.diagnostics.area_weights(np.array([40.0, 50.0, 60.0]))  # cells 35-45, 45-55, 55-65
    areas = np.diff(np.sin(np.deg2rad([35, 45, 55, 65])))
    assert region == pytest.approx(areas / areas.mean())
    gaussian = np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(32)[0]))  # outermost cells reach the poles
    quadrature = np.polynomial.legendre.leggauss(32)[1]
    assert ndda.diagnostics.area_weights(gaussian) == pytest.approx(quadrature / quadrature.mean(), rel=0.08)
    assert ndda.diagnostics.area_weights(np.array([12.0])) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("latitude", "message"),
    [
        ([[0.0]], "one axis"),
        ([], "one axis"),
        ([0.0, 95.0], "-90 to 90"),
        ([0.0, np.nan], "-90"),
        ([0, 2, 1], "only increase or only decrease"),
    ],
)
def test_area_weights_refuse(latitude, message):
    with pytest.raises(ValueError, match=message):
        ndda.diagnostics.area_weights(np.array(latitude, float))


def test_arrays_that_do_not_fit_are_refused():
    ensemble, truth = np.zeros((3, 4)), np.zeros(4)
    named = xr.DataArray(ensemble, dims=("draw", "x"), coords={"x": range(4)})
    with pytest.raises(ValueError, match=r"members have 1 axes each, but the truth has 2"):
        ndda.diagnostics.rmse(ensemble, np.zeros((4, 4)))
    with pytest.raises(ValueError, match="'axis_0': 4"):
        ndda.diagnostics.rmse(ensemble, np.zeros(5))
    with pytest.raises(ValueError, match=r"axis \[1\]"):
        ndda.diagnostics.rmse(ensemble, truth, axis=1)
    with pytest.raises(ValueError, match="name of an axis"):
        ndda.diagnostics.rmse(ensemble, truth, member="draw")
    with pytest.raises(ValueError, match="member=0 is not a dimension"):
        ndda.diagnostics.rmse(named, named[0])
    with pytest.raises(ValueError, match=r"axis \['y'\]"):
        ndda.diagnostics.rmse(named, named[0], member="draw", axis="y")
    with pytest.raises(TypeError, match="ensemble and truth"):
        ndda.diagnostics.rmse(named, truth, member="draw")
    with pytest.raises(TypeError, match="ensemble and weights"):
        ndda.diagnostics.spread(named, member="draw", weights=truth)
    with pytest.raises(ValueError, match="other points along"):
        ndda.diagnostics.rmse(named, named[0].assign_coords(x=range(1, 5)), member="draw")
    for score in (ndda.diagnostics.spread_skill, ndda.diagnostics.crps):
        with pytest.raises(ValueError, match="two members"):
            score(ensemble[:1], truth)
    with pytest.raises(ValueError, match="two members"):
        ndda.diagnostics.spread(ensemble[:1])


def test_energy_score_of_one_element_is_the_crps():
    ensemble, truth = ensembles(2, 6, 40)
    one = ndda.diagnostics.energy_score(ensemble[..., None], truth[:, None], vector=1, axis=())
    assert one == pytest.approx(ndda.diagnostics.crps(ensemble, truth, axis=()))
    assert ndda.diagnostics.energy_score(ensemble[..., None], truth[:, None], vector=-1) == pytest.approx(
        ndda.diagnostics.crps(ensemble, truth)
    )


@pytest.mark.parametrize("elements", [3, 50])  # fewer than members, and more
def test_energy_score_is_the_mean_over_pairs(elements):
    rng = np.random.default_rng(elements)
    x, y, w = rng.normal(size=(4, 7, elements)), rng.normal(size=(4, elements)), rng.uniform(0, 2, elements)

    def norm(d):
        return np.sqrt(np.sum(w * d**2, -1))

    pairs = norm(x[:, :, None] - x[:, None]).sum((1, 2)) / (7 * 6)
    expected = norm(x - y[:, None]).mean(1) - pairs / 2
    assert ndda.diagnostics.energy_score(x, y, member=1, vector=1, axis=(), weights=w) == pytest.approx(expected)
    assert ndda.diagnostics.energy_score(x, y, member=1, vector=1, weights=w) == pytest.approx(expected.mean())
    assert ndda.diagnostics.energy_score(x + 1e6, y + 1e6, member=1, vector=1, weights=w) == pytest.approx(
        expected.mean(), rel=1e-8
    )


@pytest.mark.parametrize("members", [2, 10])
def test_energy_score_of_a_gaussian_ensemble_has_its_closed_form_for_any_size(members):
    # At y = 0 E ||X - y|| is the mean of a chi variable, and E ||X - X'|| sqrt(2) times it.
    cases, d = 4000, 3
    x = np.random.default_rng(members).normal(size=(members, cases, d))
    chi = stats.chi(d).mean()
    scores = ndda.diagnostics.energy_score(x, np.zeros((cases, d)), vector=1, axis=())
    expected = chi - np.sqrt(2) * chi / 2
    assert_mean(scores, expected)


def test_energy_score_leaves_out_what_is_missing():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3, 8)), rng.normal(size=(3, 8))
    y[0, 2], y[1] = np.nan, np.nan
    kept = np.arange(8) != 2
    first = ndda.diagnostics.energy_score(x[:, :1, kept], y[:1, kept], vector=1)
    last = ndda.diagnostics.energy_score(x[:, 2:], y[2:], vector=1)
    assert ndda.diagnostics.energy_score(x, y, vector=1) == pytest.approx((first + last) / 2)
    assert np.isnan(ndda.diagnostics.energy_score(x, y, vector=1, axis=())[1])
    x[2, 0, 4] = np.nan
    assert np.isnan(ndda.diagnostics.energy_score(x, y, vector=1, axis=())[0])
    assert np.isnan(ndda.diagnostics.energy_score(x, y, vector=1))
    with pytest.raises(ValueError, match="make up the vector"):
        ndda.diagnostics.energy_score(x, y, vector=1, axis=(0, 1))
    with pytest.raises(ValueError, match="take crps"):
        ndda.diagnostics.energy_score(x, y, vector=())
    with pytest.raises(ValueError, match="two members"):
        ndda.diagnostics.energy_score(x[:1], y, vector=1)


def test_energy_score_by_name():
    rng = np.random.default_rng(0)
    ensemble, truth = rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(2, 3, 4))
    named = xr.DataArray(ensemble, dims=("time", "draw", "latitude", "longitude"))
    named_truth = xr.DataArray(truth, dims=("time", "latitude", "longitude")).transpose("longitude", "time", "latitude")
    weights = np.array([0.5, 1.5, 1.0])
    got = ndda.diagnostics.energy_score(
        named,
        named_truth,
        member="draw",
        vector=["longitude", "latitude"],
        axis=(),
        weights=xr.DataArray(weights, dims="latitude"),
    )
    assert got.dims == ("time",)
    numbers = ndda.diagnostics.energy_score(ensemble, truth, member=1, vector=(1, 2), axis=(), weights=weights[:, None])
    assert got.values == pytest.approx(numbers)


def test_flatness_is_pearsons_test_and_its_parts():
    counts = np.array([12.0, 7.0, 9.0, 14.0, 18.0])
    found = ndda.diagnostics.flatness(counts)
    assert (found.chi_square, found.p_value) == pytest.approx(tuple(stats.chisquare(counts)))
    # The orthogonal polynomials of five points.
    x = (counts - 12) / np.sqrt(12)
    assert found.bias == pytest.approx(np.array([-2, -1, 0, 1, 2]) @ x / np.sqrt(10))
    assert found.dispersion == pytest.approx(np.array([2, -1, -2, -1, 2]) @ x / np.sqrt(14))
    cubic, quartic = np.array([-1, 2, 0, -2, 1]) / np.sqrt(10), np.array([1, -4, 6, -4, 1]) / np.sqrt(70)
    assert found.rest == pytest.approx((cubic @ x) ** 2 + (quartic @ x) ** 2)
    assert found.bias_p_value == pytest.approx(stats.chi2.sf(found.bias**2, 1))
    assert found.dispersion_p_value == pytest.approx(stats.chi2.sf(found.dispersion**2, 1))
    assert found.rest_p_value == pytest.approx(stats.chi2.sf(found.rest, 2))


def test_flatness_sees_nothing_but_the_slope_or_the_u():
    ranks = np.arange(11) - 5.0
    slope = ndda.diagnostics.flatness(100 + 4 * ranks)
    assert slope.bias**2 == pytest.approx(slope.chi_square)
    assert slope.dispersion == pytest.approx(0, abs=1e-9)
    assert slope.rest == pytest.approx(0, abs=1e-9)
    u = ndda.diagnostics.flatness(100 + ranks**2)
    assert u.dispersion**2 == pytest.approx(u.chi_square)
    assert u.bias == pytest.approx(0, abs=1e-9)
    assert ndda.diagnostics.flatness(200 - ranks**2).dispersion < 0


def test_flatness_of_calibrated_ensembles_has_uniform_p_values():
    rng = np.random.default_rng(0)
    found = [ndda.diagnostics.flatness(rng.multinomial(400, np.full(10, 0.1))) for _ in range(400)]
    for name in ("p_value", "bias_p_value", "dispersion_p_value", "rest_p_value"):
        assert stats.kstest([getattr(one, name) for one in found], "uniform").pvalue > 1e-3
    assert np.corrcoef([one.bias for one in found], [one.dispersion for one in found])[0, 1] < 4 / np.sqrt(400)


def test_flatness_says_what_is_wrong_with_an_ensemble():
    ensemble, truth = ensembles(0, 9, 2000)
    assert ndda.diagnostics.flatness(ndda.diagnostics.rank_histogram(ensemble, truth)).p_value > 1e-3
    narrow = ndda.diagnostics.flatness(ndda.diagnostics.rank_histogram(*ensembles(0, 9, 2000, spread=0.6)))
    wide = ndda.diagnostics.flatness(ndda.diagnostics.rank_histogram(*ensembles(0, 9, 2000, spread=1.6)))
    low, high = (
        ndda.diagnostics.flatness(ndda.diagnostics.rank_histogram(ensemble + shift, truth)) for shift in (-0.4, 0.4)
    )
    assert narrow.dispersion > 4
    assert wide.dispersion < -4
    assert low.bias > 4
    assert high.bias < -4
    for one in (narrow, wide):
        assert abs(one.bias) < 4
    for one in (low, high):
        assert abs(one.dispersion) < 4


def test_flatness_of_copies_stands_for_the_independent_points():
    ensemble, truth = ensembles(3, 9, 200)
    counts = ndda.diagnostics.rank_histogram(ensemble, truth)
    assert ndda.diagnostics.flatness(10 * counts, effective=200) == pytest.approx(ndda.diagnostics.flatness(counts))
    assert ndda.diagnostics.flatness([3.0, 5.0, 4.0]).rest == pytest.approx(0, abs=1e-12)
    assert np.isnan(ndda.diagnostics.flatness([3.0, 5.0, 4.0]).rest_p_value)
    for wrong in ([1.0, 2.0], [0.0, 0.0, 0.0], [1.0, -1.0, 3.0], [1.0, np.nan, 3.0], [[1.0, 2.0, 3.0]]):
        with pytest.raises(ValueError, match="three ranks"):
            ndda.diagnostics.flatness(wrong)
    with pytest.raises(ValueError, match="effective=201"):
        ndda.diagnostics.flatness(counts, effective=201)
