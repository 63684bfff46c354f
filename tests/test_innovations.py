"""Against a Kalman filter, whose innovations have known variances, whether its R is right or wrong."""

import numpy as np
import pytest
import scipy.linalg
import xarray as xr
from scipy import stats

import numpyro_diffusion_da as ndda

A = np.array([[0.9, 0.2, 0.0], [-0.2, 0.8, 0.1], [0.0, 0.1, 0.7]])
Q = np.diag([0.5, 0.3, 0.4])
H = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
R = np.diag([0.6, 0.2])
STEPS = 4000


def kalman(believed, seed=0, steps=STEPS):
    """Observations, means of background and analysis there, and the steady filter's P' and innovation covariance V.

    The filter believes in the error covariance `believed`; the truth has R. It runs with its steady gain.
    """
    p = scipy.linalg.solve_discrete_are(A.T, H.T, Q, believed)
    gain = p @ H.T @ np.linalg.inv(H @ p @ H.T + believed)
    # What the error of its forecast really is: e' = A (I - K H) e + noise of the model - A K noise of the observation.
    closed = A @ (np.eye(3) - gain @ H)
    real = scipy.linalg.solve_discrete_lyapunov(closed, Q + A @ gain @ R @ gain.T @ A.T)
    rng = np.random.default_rng(seed)
    error = np.linalg.cholesky(real) @ rng.normal(size=3)
    x, background = error, np.zeros(3)
    o, b, a = np.empty((3, steps, 2))
    for t in range(steps):
        o[t] = H @ x + np.sqrt(np.diag(R)) * rng.normal(size=2)
        analysis = background + gain @ (o[t] - H @ background)
        b[t], a[t] = H @ background, H @ analysis
        x, background = A @ x + np.sqrt(np.diag(Q)) * rng.normal(size=3), A @ analysis
    believed_p, v = H @ p @ H.T, H @ real @ H.T + R
    share = believed @ np.linalg.inv(believed_p + believed)
    return o, b, a, believed_p, v, np.diag(share @ v)


def ensemble(mean, covariance, members=200, seed=1):
    """Members with exactly this mean and these unbiased variances, shape (member, time, site)."""
    z = np.random.default_rng(seed).normal(size=(members, 1, mean.shape[1]))
    z = (z - z.mean(0)) / z.std(0, ddof=1)
    return mean + np.sqrt(np.diag(covariance)) * z


def within(estimate, expected, errors=4):
    value, se = np.asarray(estimate.value), np.asarray(estimate.standard_error)
    assert np.all(se > 0)
    return np.all(np.abs(value - expected) < errors * se)


def test_a_right_filter_gives_r_and_p():
    o, b, a, p, v, _ = kalman(R)
    assert v == pytest.approx(p + R)
    found = ndda.diagnostics.error_variances(o, b[None], a[None])
    assert within(found.observation, np.diag(R))
    assert within(found.background, np.diag(p))
    assert np.all(found.observation.standard_error < 0.05 * np.diag(R))
    assert found.count.tolist() == [STEPS, STEPS]
    squares = ((o - b) ** 2).mean(0)
    assert found.observation.value + found.background.value == pytest.approx(squares)
    # (O - A)(O - B) is white and made of Gaussians: known, too, is how far an estimate strays.
    residual = R @ np.linalg.inv(v) @ R  # the variance of O - A
    expected = np.sqrt((np.diag(residual) * np.diag(v) + np.diag(R) ** 2) / STEPS)
    assert found.observation.standard_error == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_wrong_r_is_seen_in_its_direction(factor):
    o, b, a, p, v, expected = kalman(factor * R)
    found = ndda.diagnostics.error_variances(o, b[None], a[None], block=20)
    assert within(found.observation, expected)
    assert within(found.background, np.diag(v) - expected)
    # Between what the filter believed and the truth, and far from both.
    between = np.sort([factor * np.diag(R), np.diag(R)], axis=0)
    value, se = found.observation
    assert np.all(value - between[0] > 4 * se)
    assert np.all(between[1] - value > 4 * se)
    ratio = ndda.diagnostics.consistency(o, ensemble(b, p), np.sqrt(factor * np.diag(R)), block=20)
    assert within(ratio.ratio, np.diag(v) / np.diag(p + factor * R))
    assert np.all((ratio.ratio.value - 1) / ratio.ratio.standard_error * (1 if factor < 1 else -1) > 4)


def test_a_right_filter_is_consistent():
    o, b, _, p, _, _ = kalman(R)
    found = ndda.diagnostics.consistency(o, ensemble(b, p), np.sqrt(np.diag(R)))
    assert within(found.ratio, 1.0)
    assert found.ratio.standard_error == pytest.approx(np.full(2, np.sqrt(2 / STEPS)), rel=0.15)
    assert found.chi_square == pytest.approx(found.ratio.value * STEPS)  # the same variance at all times
    assert found.p_value == pytest.approx(stats.chi2.sf(found.chi_square, STEPS))
    assert np.all((found.p_value > 1e-3) & (found.p_value < 1 - 1e-3))
    with_error = ndda.diagnostics.consistency(o, ensemble(b, p + R), 0.0)
    assert with_error.ratio.value == pytest.approx(found.ratio.value, rel=0.01)  # the factor (M + 1) / M is on R too
    assert np.all(ndda.diagnostics.consistency(o, ensemble(b, p), 0.5 * np.sqrt(np.diag(R))).p_value < 1e-6)
    # The error for each observation.
    each = ndda.diagnostics.consistency(o, ensemble(b, p), np.broadcast_to(np.sqrt(np.diag(R)), o.shape))
    assert each.chi_square == pytest.approx(found.chi_square)


@pytest.mark.parametrize("members", [2, 6])
def test_few_members_are_accounted_for(members):
    rng = np.random.default_rng(members)
    p, r, steps = 1.5, 0.7, 40_000
    mean = rng.normal(size=steps)
    truth = mean + np.sqrt(p) * rng.normal(size=steps)
    o = truth + np.sqrt(r) * rng.normal(size=steps)
    gain = p / (p + r)
    b = mean + np.sqrt(p) * rng.normal(size=(members, steps))
    a = mean + gain * (o - mean) + np.sqrt((1 - gain) * p) * rng.normal(size=(members, steps))
    error = np.sqrt(r) * rng.normal(size=b.shape)
    assert within(ndda.diagnostics.consistency(o, b, np.sqrt(r)).ratio, 1.0)
    assert within(ndda.diagnostics.consistency(o, b + error, 0.0).ratio, 1.0)
    found = ndda.diagnostics.error_variances(o, b, a)
    assert within(found.observation, r)
    assert within(found.background, p + p / members)
    found = ndda.diagnostics.error_variances(o, b + error, a + np.sqrt(r) * rng.normal(size=a.shape))
    assert within(found.observation, r)
    assert within(found.background, p + (p + r) / members)


def test_departures_are_means_over_time():
    o = np.array([[1.0, 2.0], [3.0, np.nan], [2.0, 6.0]])
    members = np.array([[0.0, 1.0], [1.0, 5.0], [1.0, 1.0]]) + np.array([-1.0, 1.0])[:, None, None]
    found = ndda.diagnostics.departures(o, members)  # O - B: 1, 2, 1 and 1, -, 5
    assert found.mean.value == pytest.approx([4 / 3, 3])
    assert found.mean.standard_error == pytest.approx([np.std([1, 2, 1], ddof=1) / np.sqrt(3), 4 / 2])
    assert found.rms == pytest.approx(np.sqrt([2, 13]))
    assert found.count.tolist() == [3, 2]
    # Both sites together: the values of one time are dependent, and what is independent are its sums.
    pooled = ndda.diagnostics.departures(o, members, axis=1)
    assert pooled.mean.value == pytest.approx(2.0)
    deviations = np.array([1 + 1 - 2 * 2, 2 - 2, 1 + 5 - 2 * 2])
    assert pooled.mean.standard_error == pytest.approx(np.sqrt(3 / 2 * np.sum(deviations**2)) / 5)
    assert pooled.count == 5
    assert np.isnan(ndda.diagnostics.departures(o, members, block=3).mean.standard_error).all()
    nothing = ndda.diagnostics.departures(np.full((3, 2), np.nan), members)
    assert np.isnan(nothing.mean.value).all()
    assert nothing.count.tolist() == [0, 0]
    members[1, 0, 0] = np.nan  # a failed forecast is seen
    found = ndda.diagnostics.departures(o, members)
    assert np.isnan([found.mean.value, found.mean.standard_error, found.rms])[:, 0].all()
    assert not np.isnan(found.mean.value[1])


def test_standard_errors_need_blocks_where_values_remember():
    rng = np.random.default_rng(0)
    runs, steps, memory = 400, 600, 0.8
    noise = rng.normal(size=(steps, runs))
    o = np.empty((steps, runs))
    o[0] = noise[0] / np.sqrt(1 - memory**2)
    for t in range(1, steps):
        o[t] = memory * o[t - 1] + noise[t]
    b = np.zeros((1, steps, runs))

    def variance_of_mean(n):
        """Of n consecutive values of the process."""
        whole = (1 + memory) / (1 - memory) - 2 * memory * (1 - memory**n) / (n * (1 - memory) ** 2)
        return whole / n / (1 - memory**2)

    def ratio(values, block):
        """Standard error, as a root mean square over runs, over the spread of the means."""
        mean = ndda.diagnostics.departures(values, b, block=block).mean
        return np.sqrt(np.mean(mean.standard_error**2) / np.mean(mean.value**2))

    spread = 1 / np.sqrt(2 * runs)  # relative standard error of a root mean square
    assert ratio(noise, 1) == pytest.approx(1, abs=4 * spread)
    for block in (1, 40):
        whole, between = variance_of_mean(steps), variance_of_mean(block)
        expected = np.sqrt((between - whole) / (steps / block - 1) / whole)
        assert ratio(o, block) == pytest.approx(expected, abs=6 * spread)
    assert ratio(o, 1) < 0.4
    assert ratio(o, 40) > 0.85


def test_named_arrays_give_the_same_by_name():
    rng = np.random.default_rng(0)
    o, b, a = rng.normal(size=(6, 2)), rng.normal(size=(5, 6, 2)), rng.normal(size=(4, 6, 2))
    o[2, 1] = np.nan
    coords = {"time": range(6), "station": ["Oslo", "Bergen"]}
    named_o = xr.DataArray(o, dims=("time", "station"), coords=coords).transpose("station", "time")
    named_b, named_a = (
        xr.DataArray(x, dims=("draw", "time", "station"), coords={**coords, "draw": range(len(x))}) for x in (b, a)
    )
    by_name = {"member": "draw", "time": "time"}
    got = ndda.diagnostics.error_variances(
        named_o, named_b.transpose("station", "draw", "time"), named_a, block=2, **by_name
    )
    expected = ndda.diagnostics.error_variances(o, b, a, block=2)
    for one, other in ((got.observation, expected.observation), (got.background, expected.background)):
        assert one.value.dims == one.standard_error.dims == ("station",)
        assert one.value.station.values.tolist() == ["Oslo", "Bergen"]
        assert one.value.values == pytest.approx(other.value)
        assert one.standard_error.values == pytest.approx(other.standard_error)
    error = xr.DataArray([0.5, 2.0], dims="station", coords={"station": coords["station"]})
    found = ndda.diagnostics.consistency(named_o, named_b, error, axis="station", **by_name)
    numbers = ndda.diagnostics.consistency(o, b, np.array([0.5, 2.0]), axis=1)
    assert float(found.ratio.value) == pytest.approx(numbers.ratio.value)
    assert float(found.ratio.standard_error) == pytest.approx(numbers.ratio.standard_error)
    assert float(found.p_value) == pytest.approx(numbers.p_value)
    moved = ndda.diagnostics.departures(o.T, np.moveaxis(b, 0, 2).transpose(1, 0, 2), member=2, time=1)
    assert moved.mean.value == pytest.approx(ndda.diagnostics.departures(o, b).mean.value)


def test_what_does_not_fit_is_refused():
    o, b = np.zeros((3, 2)), np.zeros((4, 3, 2))
    with pytest.raises(ValueError, match="block=4"):
        ndda.diagnostics.departures(o, b, block=4)
    with pytest.raises(ValueError, match="block=0"):
        ndda.diagnostics.departures(o, b, block=0)
    with pytest.raises(ValueError, match="two members"):
        ndda.diagnostics.consistency(o, b[:1], 1.0)
    with pytest.raises(ValueError, match=r"axis \[2\]"):
        ndda.diagnostics.departures(o, b, time=2)
    with pytest.raises(TypeError, match="observations and error"):
        ndda.diagnostics.consistency(o, b, xr.DataArray(np.ones(2), dims="y"))
    with pytest.raises(TypeError, match="ensemble and observations"):
        ndda.diagnostics.departures(xr.DataArray(o, dims=("time", "y")), b)
    with pytest.raises(ValueError, match="'axis_1': 2"):
        ndda.diagnostics.error_variances(o, b, np.zeros((4, 3, 5)))
