"""Observations far from the forecast are left out: those that should be, no others, and the result says which."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import compilations
from numpyro.contrib.control_flow import scan
from rich.console import Console

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.results import summary_table

A = 0.95 * np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0].astype(np.float32)
ERROR = 0.5


def model(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(jnp.asarray(A) @ x, 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x, ERROR).to_event(1), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(4), 1.0).to_event(1)), y)


def twin(steps=20):
    """(observations, where they are grossly wrong); one of them is missing."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=4), []
    for _ in range(steps):
        x = A @ x + 0.5 * rng.normal(size=4)
        y.append(x + ERROR * rng.normal(size=4))
    y = np.array(y, np.float32)
    wrong = np.zeros(y.shape, bool)
    wrong[[3, 3, 9, 15], [0, 2, 1, 3]] = True
    y[wrong] += 12.0 * np.where(rng.random(4) < 0.5, -1.0, 1.0)
    y[5, 1] = np.nan
    return y, wrong


FILTERS = {
    "FAAPF": lambda model: ndda.FAAPF(model),
    "EnKF": lambda model: ndda.EnKF(model, inflation=(ndda.ForecastMultiplicative(1.02),)),
    "GuidedPF": lambda model: ndda.GuidedPF(model),
    "Bootstrap": lambda model: ndda.Bootstrap(model),
}


def particle_filter(algorithm, n=64, **settings):
    return ndda.Filter(algorithm, num_particles=n, progress_bar=False, **settings)


def run(algorithm, y, **settings):
    filter = particle_filter(algorithm, **settings)
    filter.run(jax.random.key(0), y)
    return filter


@pytest.fixture(scope="module")
def checked():
    """Compiled once for several tests."""
    return particle_filter(ndda.GrossErrorCheck(ndda.Bootstrap(model), members=32))


def assert_equal(one, other):
    """Two results up to rounding, because the steps are compiled differently."""
    for group in ("posterior", "posterior_predictive", "log_likelihood"):
        for key, values in getattr(one, group).items():
            np.testing.assert_allclose(
                getattr(other, group)[key], values, rtol=1e-3, atol=1e-4, err_msg=f"{group} {key}"
            )
    for key, values in one.sample_stats.items():
        np.testing.assert_allclose(other.sample_stats[key], values, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_exactly_what_is_planted_is_left_out(name):
    """What is left of the run is that of observations that were missing there from the start, to the last bit."""
    y, wrong = twin()
    plain, checked = particle_filter(FILTERS[name](model)), particle_filter(ndda.GrossErrorCheck(FILTERS[name](model)))
    for given, expected in ((y, wrong), (np.where(wrong, np.nan, y), np.zeros_like(wrong))):
        checked.run(jax.random.key(0), given)
        np.testing.assert_array_equal(checked.result.rejected["y"][0], expected)
        np.testing.assert_array_equal(checked.result.observed_data["y"], given)
        plain.run(jax.random.key(0), np.where(wrong, np.nan, y))
        assert_equal(plain.result, checked.result)
    assert plain.result.rejected == {}


@pytest.mark.slow
def test_a_huge_threshold_changes_nothing():
    y, _ = twin()
    plain, checked = (run(a, y).result for a in (ndda.EnKF(model), ndda.GrossErrorCheck(ndda.EnKF(model), 1e6)))
    assert not checked.rejected["y"].any()
    assert_equal(plain, checked)


@pytest.mark.slow
def test_the_expected_departure_is_that_of_kalman():
    """First step: y - 0 has the variance A P0 A^T + Q + R, and rejection begins at k of its roots."""
    scale = np.sqrt(np.diag(A @ A.T) + 0.25 + ERROR**2)
    check = particle_filter(ndda.GrossErrorCheck(ndda.Bootstrap(model), threshold={"y": 3.0}, members=20_000), 20_000)
    for factor in (0.97, 1.03):
        y = (3.0 * factor * scale * np.array([1.0, 0.0, 0.0, 0.0])).astype(np.float32)
        check.run(jax.random.key(0), y[None])
        assert check.result.rejected["y"][0, 0].tolist() == [factor > 1.0, False, False, False]


def test_what_the_result_says(checked):
    y, wrong = twin()
    checked.run(jax.random.key(0), y)
    tree = checked.to_datatree(dims={"y": ["station"]})
    rejected = tree["sample_stats"]["y_rejected"]
    assert rejected.dims == ("chain", "time", "station")
    assert rejected.values.sum() == wrong.sum()
    # The check compares the numbers that the result holds.
    background = checked.result.background["y"]
    with np.errstate(invalid="ignore"):
        far = np.abs(checked.result.departure("y")) > 5.0 * np.sqrt(background.expected)
    np.testing.assert_array_equal(rejected.values, far)
    np.testing.assert_array_equal(background.members, 64)  # the draws of the filter are the forecasts
    assert tree.attrs["algorithm"] == "Bootstrap"
    assert tree.attrs["gross_error_threshold"] == 5.0
    assert tree.attrs["gross_error_members"] == 32
    listed = checked.to_arviz()
    assert listed["log_likelihood"]["y"].sizes["y_observed"] == y.size - wrong.sum() - 1
    console = Console(width=150)
    with console.capture() as printed:
        console.print(summary_table(checked.result))
    assert "rejected as gross errors" in printed.get()
    assert f"{wrong.sum() / (y.size - 1):.2%} of the checked" in printed.get()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "forward", "members"), [(ndda.Bootstrap, 16, 16), (ndda.FAAPF, 1 + 16 + 16 / 4, 4)])
def test_passes_of_the_check_are_counted(small, kind, forward, members):
    """A draw has 16 levels. `FAAPF` draws four forecasts for the check, `Bootstrap` has its own."""
    _, y = small.simulate(0, 2)
    program = small.diffusion_program()
    result = run(ndda.GrossErrorCheck(kind(program), members=4), y, n=16).result
    np.testing.assert_allclose(result.network_passes["forward"], forward)
    np.testing.assert_array_equal(result.background["y"].members, members)


@pytest.mark.slow
def test_thresholds_by_site_and_counts():
    """A site that is not named is not checked; counts are, though they are integers."""

    def two(y, z):
        def step(x, now):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=now[0])
            numpyro.sample("z", dist.Poisson(jnp.exp(x)), obs=now[1])
            return x, None

        scan(step, jnp.zeros(()), (y, z))

    y, z = np.array([0.1, 9.0, 0.2], np.float32), np.array([1, 2, 90])
    filter = particle_filter(ndda.GrossErrorCheck(ndda.Bootstrap(two), {"z": 4.0}))
    filter.run(jax.random.key(0), y, z)
    assert filter.result.rejected.keys() == {"z"}
    assert filter.result.rejected["z"].tolist() == [[False, False, True]]


def test_another_run_compiles_nothing_and_most_rejected_warns(checked):
    y, _ = twin()
    checked.run(jax.random.key(0), y)
    with compilations() as compiled, pytest.warns(UserWarning, match="rejected 100% of the observations"):
        checked.run(jax.random.key(0), np.full_like(y, 1e3))
    assert compiled == []


@pytest.mark.slow
def test_resumed_and_online(tmp_path):
    y, wrong = twin()
    check = ndda.GrossErrorCheck(ndda.Bootstrap(model))
    whole = run(check, y, n=32, directory=tmp_path).result
    again = run(check, y, n=32, directory=tmp_path).result
    np.testing.assert_array_equal(again.rejected["y"], whole.rejected["y"])
    online = ndda.OnlineFilter(check, num_particles=32)
    state = online.init(jax.random.key(0), y[:1])
    for t in range(4):
        state, info = online.step(jax.random.fold_in(jax.random.key(1), t), state, y[t : t + 1])
    np.testing.assert_array_equal(info.check.rejected["y"], wrong[3])


def test_what_does_not_fit_is_refused():
    faapf = ndda.FAAPF(model)
    for wrong, error, match in (
        (lambda: ndda.GrossErrorCheck(model), TypeError, "GrossErrorCheck got the function model"),
        (lambda: ndda.GrossErrorCheck(ndda.GrossErrorCheck(faapf)), TypeError, "without a check"),
        (lambda: ndda.GrossErrorCheck(faapf, threshold=0.0), ValueError, "threshold=0.0"),
        (lambda: ndda.GrossErrorCheck(faapf, members=1), ValueError, "members=1"),
        (lambda: run(ndda.GrossErrorCheck(faapf, {"z": 3.0}), twin()[0]), ValueError, r"\['z'\]"),
        (lambda: run(ndda.GrossErrorCheck(faapf), twin()[0], n=1), ValueError, "one particle"),
    ):
        with pytest.raises(error, match=match):
            wrong()
