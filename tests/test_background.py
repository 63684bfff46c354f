"""Background of a filter: exact where it can be, the same numbers everywhere, and a filter that is lost says so."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import LinearGaussian
from numpyro.contrib.control_flow import scan
from rich.console import Console

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.filters import background as of_step
from numpyro_diffusion_da.results import Background, summary_table

KEY = jax.random.key(0)
SMALL = LinearGaussian.make(0, 4)
H = np.array([[1.0, 0.0, 0.0, 0.0], [0.5, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
LOST, FAR = "observations are farther from the forecast", "predictive standard deviations from its forecast"


def closed_form(y, start=None):
    """The linear-Gaussian model in closed form, with sums of its values observed, from a known start or N(0, I)."""
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(4), 1.0).to_event(1)) if start is None else start

    def step(x, y_t):
        mean = jnp.asarray(SMALL.transition, x.dtype) @ x
        x = numpyro.sample("x", dist.MultivariateNormal(mean, jnp.asarray(SMALL.covariance, x.dtype)))
        numpyro.sample("y", dist.Normal(jnp.asarray(H, x.dtype) @ x, SMALL.error).to_event(1), obs=y_t)
        return x, None

    scan(step, x0, y)


def run(algorithm, *args, n=64, **settings):
    filter = ndda.Filter(algorithm, num_particles=n, progress_bar=False, **settings)
    filter.run(KEY, *args)
    return filter


def kalman(y, start, covariance, h):
    """Mean and variance of the prediction of each observation, (time, site)."""
    means, variances = [], []
    for y_t in y:
        start = SMALL.transition @ start
        covariance = SMALL.transition @ covariance @ SMALL.transition.T + SMALL.covariance
        means.append(h @ start)
        variances.append(np.diag(h @ covariance @ h.T))
        seen = h[~np.isnan(y_t)]
        gain = covariance @ seen.T @ np.linalg.inv(seen @ covariance @ seen.T + SMALL.error**2 * np.eye(len(seen)))
        start = start + gain @ (y_t[~np.isnan(y_t)] - seen @ start)
        covariance = covariance - gain @ seen @ covariance
    return np.array(means), np.array(variances)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ndda.FAAPF, ndda.GuidedPF])
def test_from_one_known_state_the_background_is_exact(kind):
    """All particles have one forecast mean, so all of the variance is that of the transition: no sampling error."""
    start, y = np.array([1.0, -2.0, 0.5, 3.0], np.float32), np.array([[0.2, np.nan, 1.0]], np.float32)
    result = run(kind(closed_form), y, start, n=5).result
    mean, variance = kalman(y, start, np.zeros((4, 4)), H)
    background = result.background["y"]
    np.testing.assert_allclose(background.mean[0], mean, rtol=1e-5)
    np.testing.assert_allclose(background.variance[0], variance, rtol=1e-5)
    np.testing.assert_allclose(background.error_variance, SMALL.error**2, rtol=1e-6)
    np.testing.assert_allclose(background.expected[0], variance + SMALL.error**2, rtol=1e-5)
    np.testing.assert_array_equal(background.members, 5)
    np.testing.assert_allclose(result.departure("y")[0], y - mean, rtol=1e-4)  # NaN where missing
    assert all(np.all(count == 0) for count in result.network_passes.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ndda.EnKF, ndda.Bootstrap])
def test_an_ensemble_that_saw_nothing_is_its_own_background(kind):
    """Without observations the analysis is the forecast, inflated as the update would take it."""
    inflated = {"inflation": (ndda.ForecastMultiplicative(1.5),)} if kind is ndda.EnKF else {}
    n, result = 20, run(kind(closed_form, **inflated), np.full((2, 3), np.nan, np.float32), n=20).result
    seen = np.moveaxis(result.posterior["x"][0].astype(float), 0, 1) @ H.T  # (time, member, site)
    background = result.background["y"]
    np.testing.assert_allclose(background.mean[0], seen.mean(1), atol=1e-5)
    np.testing.assert_allclose(background.variance[0], (n + 1) / n * seen.var(1, ddof=1), rtol=1e-4)
    assert np.isnan(result.departure("y")).all()
    console = Console(width=150)
    with console.capture() as printed:
        console.print(summary_table(result))
    assert "equal, because nothing was observed" in printed.get()
    assert "(O - B)^2" not in printed.get()


FILTERS = {
    "FAAPF": lambda p: ndda.FAAPF(p, target_ess=0.0),
    "Moment": lambda p: ndda.FAAPF(p, target_ess=0.0, weight=ndda.Moment()),
    "GuidedPF": ndda.GuidedPF,
    "Bootstrap": ndda.Bootstrap,
    "EnKF": ndda.EnKF,
    "check": lambda p: ndda.GrossErrorCheck(ndda.FAAPF(p, target_ess=0.0), 100.0, members=2000),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "diffusion"),
    [("FAAPF", True), ("Moment", False), ("GuidedPF", True), ("Bootstrap", False), ("EnKF", True), ("check", False)],
)
def test_the_background_is_that_of_kalman(name, diffusion):
    """Within sampling error: of 2000 particles, or of the 64 and 16 at which a diffusion makes passes for it."""
    prior = ndda.GaussianPrior(SMALL.transition, SMALL.covariance)
    climatology = prior.climatology()
    start, covariance = np.zeros(4), np.eye(4)
    program, h, columns = closed_form, H, 3
    if diffusion:
        start, covariance = np.asarray(climatology.mean), np.asarray(climatology.covariance_matrix, float)
        program, h, columns = SMALL.diffusion_program(), np.eye(4)[::2], 2
    y = np.random.default_rng(1).normal(size=(3, columns)).astype(np.float32)
    y[1, 0] = np.nan
    background = run(FILTERS[name](program), y, n=2000).result.background["y"]
    mean, variance = kalman(y, start, covariance, h)
    few = 64 if name == "GuidedPF" and diffusion else 400  # as resampled particles are worth
    assert np.all(np.abs(background.mean[0] - mean) < 4 * np.sqrt(variance / few))
    np.testing.assert_allclose(background.variance[0], variance, rtol=4 * np.sqrt(2 / few))
    np.testing.assert_allclose(background.error_variance, SMALL.error**2, rtol=1e-5)


@pytest.mark.slow
def test_passes_for_the_background_are_few_and_counted():
    """32 passes a step at 16 of 64 particles with `FAAPF`; means at all 64 where weights compute none."""
    _, y = SMALL.simulate(0, 1)
    program = SMALL.diffusion_program()
    for algorithm, forward, vjp in (
        (ndda.FAAPF(program), 17 + 16 / 64, 32 + 16 / 64),
        (ndda.FAAPF(program, weight=ndda.Equal()), 16 + 1 + 16 / 64, 32 + 16 / 64),
        (ndda.Bootstrap(program), 16, 0),
        (ndda.EnKF(program), 16, 0),
    ):
        passes = run(algorithm, y.astype(np.float32)).result.network_passes
        assert {name: float(count[0, 0]) for name, count in passes.items()} == {
            "forward": forward,
            "jvp": 0,
            "vjp": vjp,
            "conditioning": 0,
        }


@pytest.mark.slow
def test_other_likelihoods_and_sites_without_moments():
    """Counts have the mean and the variance of their rates; an infinite variance and a factor are left out."""

    def model(y, z):
        def step(x, now):
            x = numpyro.sample("x", dist.Normal(0.5 * x, 0.2))
            numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=now[0])
            numpyro.sample("z", dist.StudentT(1.0, x, 1.0), obs=now[1])
            numpyro.factor("f", -(x**2))
            return x, None

        scan(step, jnp.zeros(()), (y, z))

    data = np.array([1]), np.array([0.5], np.float32)
    found = run(ndda.Bootstrap(model), *data, n=4000)
    assert set(found.result.background) == {"y", "z"}
    program = ndda.program.StateSpaceModel(model, data)
    inputs = jax.tree.map(lambda x: x[0], program.time_inputs())
    linearized = of_step.background_of_transition(program, KEY, jnp.zeros(4), inputs).sites["y"]
    lognormal = np.exp(0.2**2 / 2), (np.exp(0.2**2) - 1) * np.exp(0.2**2)
    for site, (rate, variance) in ((found.result.background["y"], lognormal), (linearized, (1.0, 0.2**2))):
        np.testing.assert_allclose(site.mean, np.full_like(site.mean, rate), rtol=0.02)
        np.testing.assert_allclose(site.error_variance, np.full_like(site.mean, rate), rtol=0.02)
        np.testing.assert_allclose(site.variance, np.full_like(site.mean, variance), rtol=0.1)
    console = Console(width=150)
    with console.capture() as printed:
        console.print(summary_table(found.result))
    assert "(P + R) of y" in printed.get()
    assert "(P + R) of z" not in printed.get()  # its variance is infinite


def of_ratio(ratio, steps, **changes):
    """Result of a site of ten values, with departures of this size relative to what the filter expects."""
    rng = np.random.default_rng(0)
    shape = (1, steps, 10)
    background = Background(rng.normal(size=shape), np.full(shape, 0.75), np.full(shape, 0.25), np.full((1, steps), 9))
    observed = background.mean[0] + np.sqrt(ratio) * rng.normal(size=shape[1:])
    empty = {field.name: {} for field in dataclasses.fields(ndda.FilterResult)}
    return ndda.FilterResult(**{**empty, "observed_data": {"y": observed}, "background": {"y": background}})


def test_functions_of_a_result_are_those_of_arrays():
    result = of_ratio(1.0, 40)
    result.observed_data["y"][3, 2] = np.nan
    result.rejected["y"] = np.zeros((1, 40, 10), bool)
    result.rejected["y"][0, 7] = True
    usable = np.where(result.rejected["y"][0], np.nan, result.observed_data["y"])[5:]
    (mean,) = result.background["y"].mean
    for pooled, axis in ((True, 1), (False, ())):
        found = ndda.diagnostics.background_departures(result, discard=5, block=3, pooled=pooled)["y"]
        expected = ndda.diagnostics.departures(usable, mean[None, 5:], axis=axis, block=3)
        np.testing.assert_allclose(found.mean, expected.mean)
        np.testing.assert_array_equal(found.count, expected.count)
    found = ndda.diagnostics.background_consistency(result, discard=5, block=3)["y"]
    departure = usable - mean[5:]
    assert found.ratio.value == pytest.approx(np.nanmean(departure**2))  # P + R is 1
    assert found.chi_square == pytest.approx(np.nansum(departure**2))
    assert found.count == 34 * 10  # of 40 steps five are discarded and one is rejected
    excess = np.nansum(departure**2 - found.ratio.value * ~np.isnan(departure), axis=1)
    sums = np.add.reduceat(excess, np.arange(0, 35, 3))
    assert found.ratio.standard_error == pytest.approx(np.sqrt(12 / 11 * np.sum(sums**2)) / found.count)
    with pytest.raises(ValueError, match="discard=40; the run has 40 steps"):
        ndda.diagnostics.background_consistency(result, discard=40)


@pytest.fixture(scope="module")
def online():
    """Filter of four values in closed form, compiled once."""
    return ndda.Filter(ndda.EnKF(closed_form), num_particles=64, progress_bar=False)


def observations(steps=60, error=SMALL.error):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=4), []
    for _ in range(steps):
        x = SMALL.transition @ x + np.linalg.cholesky(SMALL.covariance) @ rng.normal(size=4)
        y.append(H @ x + error * rng.normal(size=3))
    return np.array(y, np.float32)


def sentences(filter, y):
    """What a run warns of, and what its summary prints."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filter.run(KEY, y)
    console = Console(width=300)
    with console.capture() as printed:
        console.print(summary_table(filter.result))
    return [str(warning.message) for warning in caught], printed.get()


@pytest.mark.slow
def test_a_run_says_when_it_is_lost_and_names_an_impossible_value(online):
    y = observations()
    right, printed = sentences(online, y)
    assert right == []
    assert "(O - B)^2 / (P + R) of y" in printed
    assert LOST not in printed
    ratio = ndda.diagnostics.background_consistency(online.result)["y"].ratio
    assert f"{ratio.value:.3g} +- " in printed
    assert abs(ratio.value - 1) < 4 * ratio.standard_error

    # Observations of other times: the filter trusts them, and they are far from its forecasts.
    (lost,), printed = sentences(online, 3.0 * np.random.default_rng(0).permutation(y))
    assert lost.startswith(LOST)
    assert "at site 'y'" in lost
    assert LOST in printed

    for value, step, column, repeats in ((-999.0, 30, 1, 1), (-999.0, 0, 2, 20), (1e6, 5, 0, 1)):
        marked = y.copy()
        marked[step :: len(y) // repeats, column] = value
        found, printed = sentences(online, marked)
        assert f"observation {value:.6g} of site 'y[{column}]' at step {step} is " in found[0]
        assert FAR in found[0]
        assert ("observations have this value" in found[0]) == (repeats > 1)
        assert "ndda.GrossErrorCheck" in printed

    filled = y.copy()
    filled[5, 0] = 9.96921e36  # the update overflows
    with pytest.raises(FloatingPointError, match=r"step 5, where observation 9.96921e\+36 of site 'y\[0\]' is"):
        online.run(KEY, filled)

    tight, printed = sentences(online, 0.1 * y)
    assert tight == []
    assert "far closer to the forecast" in printed


def lorenz96(y, taper_to=None):
    """Stochastic Lorenz-96 of 40 sites, every fourth observed with an error of 1."""

    def flow(x):
        def slope(x):
            return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + 8.0

        def substep(x, _):
            k1 = slope(x)
            k2 = slope(x + 0.025 * k1)
            k3 = slope(x + 0.025 * k2)
            return x + 0.05 / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + 0.05 * k3)), None

        return jax.lax.scan(substep, x, None, length=2)[0]

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(flow(x), 0.2).to_event(1))
        numpyro.sample("y", dist.Normal(x[::4], 1.0).to_event(1), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.full(40, 2.3), 3.6).to_event(1)), y)


@pytest.mark.slow
def test_a_lost_filter_of_lorenz96_warns_and_a_right_one_does_not():
    unseen = np.full((150, 10), np.nan, np.float32)
    truth = numpyro.infer.Predictive(lorenz96, num_samples=1)(jax.random.key(3), unseen)["x"][0]
    y = np.asarray(truth[:, ::4] + np.random.default_rng(0).normal(size=(150, 10)), np.float32)
    taper = ndda.Taper(4.0, ndda.Ring(40), {"y": np.arange(0, 40, 4)}, state=np.arange(40))
    lost = ndda.Filter(ndda.EnKF(lorenz96), num_particles=64, progress_bar=False)
    (said,), _ = sentences(lost, y)
    assert said.startswith(LOST)
    right = ndda.Filter(
        ndda.EnKF(lorenz96, taper=taper, inflation=(ndda.RTPS(0.1),)), num_particles=64, progress_bar=False
    )
    assert sentences(right, y)[0] == []
    ratios = [ndda.diagnostics.background_consistency(f.result, discard=20, block=5)["y"].ratio for f in (lost, right)]
    assert ratios[0].value - 2 * ratios[0].standard_error > 1.5
    assert 0.6 < ratios[1].value < 1.25


@pytest.mark.slow
def test_results_online_and_stored_have_the_same_background(online, tmp_path):
    y = observations(3)
    stored = {"algorithm": ndda.EnKF(closed_form), "num_particles": 8, "progress_bar": False, "directory": tmp_path}
    for _ in range(2):  # computed, then read
        filter = ndda.Filter(**stored)
        filter.run(KEY, y)
        tree = filter.to_datatree(dims={"y": ["station"]})["sample_stats"]
        background = filter.result.background["y"]
        for name, values in (
            ("y_background", background.mean),
            ("y_background_variance", background.variance),
            ("y_departure", y - background.mean),
        ):
            assert tree[name].dims == ("chain", "time", "station")
            assert tree[name].attrs["long_name"]
            np.testing.assert_array_equal(tree[name], values)
    one = ndda.OnlineFilter(ndda.EnKF(closed_form), num_particles=8)
    init_key, run_key = jax.random.split(jax.random.fold_in(KEY, 0))
    _, info = one.step(jax.random.fold_in(run_key, 0), one.init(init_key, y[:1]), y[:1])
    np.testing.assert_allclose(info.background.sites["y"].mean, background.mean[0, 0], rtol=1e-5)
    np.testing.assert_allclose(info.background.sites["y"].variance, background.variance[0, 0], rtol=1e-4)
