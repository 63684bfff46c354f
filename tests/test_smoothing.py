"""Smoothing from the genealogy: by hand, along real lines, and against the Rauch-Tung-Striebel smoother."""

from __future__ import annotations

import functools

import cuthbert
import cuthbert.gaussian.kalman
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.linalg
from conftest import LinearGaussian
from monte_carlo import assert_mean, excess
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda

STEPS = 12


def by_hand() -> ndda.FilterResult:
    """Four particles, four steps, two chains: the second selects nothing. x holds 10 (time) + draw."""
    parents = np.array([[0, 1, 2, 3], [0, 0, 1, 3], [1, 1, 2, 3], [3, 2, 2, 1]])  # of each step, among the one before
    ancestors = np.stack([parents.T, np.tile(np.arange(4)[:, None], 4)])
    x = np.tile(10.0 * np.arange(4) + np.arange(4)[:, None], (2, 1, 1))
    y = np.zeros((4, 1))
    return ndda.FilterResult(
        posterior={"x": x[..., None] * np.ones(3), "norm": x},
        posterior_predictive={"y": x[..., None] + 100},
        log_likelihood={"y": -x},
        observed_data={"y": y},
        observed_mask={"y": np.ones_like(y, bool)},
        observed_error={"y": np.ones_like(y)},
        forecast=x[..., None] * np.ones(3) + 200,
        sample_stats={
            "ancestors": ancestors,
            "log_weights": x + 300,
            "solver_residual": x + 400,
            "ess": np.full((2, 4), 3.0),
        },
        network_passes={"forward": np.ones((2, 4))},
        latent_name="x",
        layout=None,
        attributes={"algorithm": "FAAPF", "num_particles": 4},
    )


# Rows are draws, columns times. Of the last particles 3, 2, 2, 1 are the parents at time 2; 3, 2, 2, 1 have 3, 2, 2, 1
# at time 1, whose own are 3, 1, 1, 0.
LINES = {
    0: [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]],
    1: [[0, 1, 3, 0], [0, 1, 2, 1], [1, 2, 2, 2], [3, 3, 1, 3]],
    2: [[0, 3, 3, 0], [0, 2, 2, 1], [1, 2, 2, 2], [3, 1, 1, 3]],
    3: [[3, 3, 3, 0], [1, 2, 2, 1], [1, 2, 2, 2], [0, 1, 1, 3]],
}


@pytest.mark.parametrize("lag", [0, 1, 2, 3, 50, None])
def test_a_small_genealogy(lag):
    result = by_hand()
    smoothed = ndda.results.trajectories(result) if lag is None else ndda.results.fixed_lag(result, lag)
    lines = np.array(LINES[3 if lag is None else min(lag, 3)])
    x = 10 * np.arange(4) + lines
    np.testing.assert_array_equal(smoothed.sample_stats["filter_draw"][0], lines)
    np.testing.assert_array_equal(smoothed.sample_stats["filter_draw"][1], LINES[0])
    for values, expected in (
        (smoothed.posterior["norm"], x),
        (smoothed.posterior["x"][..., 2], x),
        (smoothed.posterior_predictive["y"][..., 0], x + 100),
        (smoothed.log_likelihood["y"], -x),
        (smoothed.forecast[..., 1], x + 200),
        (smoothed.sample_stats["solver_residual"], x + 400),
    ):
        np.testing.assert_array_equal(values[0], expected)
    # What is about the filter stays, and what would be wrong goes.
    np.testing.assert_array_equal(smoothed.sample_stats["log_weights"], result.sample_stats["log_weights"])
    assert smoothed.sample_stats["ess"] is result.sample_stats["ess"]
    assert "ancestors" not in smoothed.sample_stats
    counts = [[len(set(lines[:, k])) for k in range(4)], [4] * 4]
    assert smoothed.sample_stats["distinct_lines"].tolist() == counts
    assert ndda.results.distinct_ancestors_at(result, lag).tolist() == counts
    assert result.posterior["x"][0, 0, :, 0].tolist() == [0, 10, 20, 30]  # the filter's is as it was


def test_one_step_and_one_particle():
    result = by_hand()
    one = {"ancestors": np.zeros((1, 1, 1), np.int32)}
    few = {"posterior": {"x": np.ones((1, 1, 1))}, "posterior_predictive": {}, "log_likelihood": {}, "forecast": None}
    fields = {**{name: getattr(result, name) for name in result.__dataclass_fields__}, **few, "sample_stats": one}
    smoothed = ndda.results.trajectories(ndda.FilterResult(**fields))
    assert smoothed.posterior["x"].tolist() == [[[1.0]]]
    assert smoothed.sample_stats["distinct_lines"].tolist() == [[1]]
    assert smoothed.forecast is None


def test_what_is_refused():
    result = by_hand()
    with pytest.raises(ValueError, match="lag=-1; give 0 or more"):
        ndda.results.fixed_lag(result, -1)
    with pytest.raises(TypeError):
        ndda.results.fixed_lag(result, 1.5)
    for call in (ndda.results.trajectories, ndda.results.distinct_ancestors_at, lambda r: ndda.results.fixed_lag(r, 2)):
        with pytest.raises(ValueError, match="already smoothed; give the result of the filter"):
            call(ndda.results.trajectories(result))
        result.attributes["algorithm"] = "EnKF"
        with pytest.raises(ValueError, match=r"EnKF selects no particles, .* smooth a result of FAAPF or Bootstrap"):
            call(result)
        result.attributes["algorithm"] = "FAAPF"


# --- lines of real filters --------------------------------------------------------------------------------------------


def program_with_increments(y):
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5).to_event(1))
        numpyro.deterministic("increment", x - x_prev)
        numpyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=y_t)
        return x, None

    scan(step, x0, y)


@pytest.mark.parametrize("algorithm", [ndda.FAAPF, ndda.Bootstrap])
def test_draws_are_the_lines_that_the_filter_moved_along(algorithm):
    """An increment is that from the parent: it tells whose child a particle is, without asking the ancestors."""
    y = np.random.default_rng(0).normal(size=(6, 2))
    particle_filter = ndda.Filter(
        algorithm(program_with_increments), num_particles=32, num_chains=2, progress_bar=False
    )
    particle_filter.run(jax.random.key(0), jnp.asarray(y))
    paths = particle_filter.smoothed()
    x, increment = paths.posterior["x"], paths.posterior["increment"]
    np.testing.assert_allclose(np.diff(x, axis=2), increment[:, :, 1:], atol=1e-6)
    filtered = particle_filter.result.posterior
    assert np.abs(np.diff(filtered["x"], axis=2) - filtered["increment"][:, :, 1:]).max() > 0.1
    log_likelihood = -0.5 * ((y - x) / 0.3) ** 2 - np.log(0.3 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(paths.log_likelihood["y"], log_likelihood, rtol=1e-4, atol=1e-5)
    counts = paths.sample_stats["distinct_lines"]
    assert np.all(np.diff(counts, axis=1) >= 0)  # lines only meet on the way back
    assert np.all(counts[:, -1] <= 32)
    assert np.all(counts[:, 0] < 32)


@pytest.mark.slow  # test_ensemble_smoother.py has the sentence of other lags
def test_an_ensemble_kalman_filter_has_no_genealogy():
    particle_filter = ndda.Filter(ndda.EnKF(program_with_increments), num_particles=8, progress_bar=False)
    particle_filter.run(jax.random.key(0), jnp.zeros((2, 2)))
    for call in (particle_filter.smoothed, lambda: particle_filter.to_datatree(lag=3)):
        with pytest.raises(ValueError, match="EnKF selects no particles"):
            call()


def test_what_was_kept_is_smoothed():
    particle_filter = ndda.Filter(
        ndda.Bootstrap(program_with_increments),
        num_particles=16,
        keep=["increment"],
        keep_observed=False,
        progress_bar=False,
    )
    particle_filter.run(jax.random.key(0), jnp.ones((5, 2)))
    tree = particle_filter.to_datatree(lag=None)
    lines = tree["sample_stats/filter_draw"].values
    expected = np.take_along_axis(particle_filter.result.posterior["increment"], lines[..., None], axis=1)
    np.testing.assert_array_equal(tree["posterior/increment"], expected)
    assert "log_likelihood" not in tree.children


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_smoothed_result_has_its_names():
    result = by_hand()
    paths, lagged = (
        ndda.results.to_datatree(r) for r in (ndda.results.trajectories(result), ndda.results.fixed_lag(result, 2))
    )
    assert (paths.attrs["smoothing"], lagged.attrs["smoothing"]) == ("genealogy", "fixed lag")
    assert "smoothing_lag" not in paths.attrs
    assert lagged["posterior"].attrs["smoothing_lag"] == 2
    for tree, words in ((paths, "given all observations"), (lagged, "smoothing_lag steps later")):
        assert words in tree["posterior"].attrs["description"]
        assert tree["posterior/x"].dims[:3] == tree["prior/x"].dims[:3] == ("chain", "draw", "time")
        assert tree["sample_stats/filter_draw"].dims == ("chain", "draw", "time")
        assert tree["sample_stats/distinct_lines"].dims == ("chain", "time")
        assert tree["sample_stats/distinct_lines"].attrs["description"]
    assert "smoothing" not in ndda.results.to_datatree(result).attrs
    assert ndda.results.to_arviz(ndda.results.trajectories(result)).attrs["smoothing"] == "genealogy"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")  # few particles
def test_a_filter_gives_its_smoothed_tree():
    import arviz as az

    filtered(0)
    particle_filter = PARTICLE_FILTER
    tree = particle_filter.to_datatree(lag=3, dims={"y": ["station"]})
    np.testing.assert_array_equal(tree["posterior/x"], particle_filter.smoothed(3).posterior["x"])
    assert tree.attrs["smoothing_lag"] == 3
    assert np.shares_memory(particle_filter.to_datatree()["posterior/x"].values, particle_filter.result.posterior["x"])
    data = particle_filter.to_arviz(lag=None)
    assert data.attrs["smoothing"] == "genealogy"
    assert np.isfinite(az.rhat(data, var_names=["x"], method="identity")["x"].values[-1]).all()
    assert az.loo(data).n_data_points == 2 * STEPS


# --- the exact smoother -----------------------------------------------------------------------------------------------


def program(y, a, initial_factor, factor):
    x0 = numpyro.sample("x0", dist.MultivariateNormal(jnp.zeros(len(factor)), scale_tril=initial_factor))

    def step(x, y_t):
        x = numpyro.sample("x", dist.MultivariateNormal(a @ x, scale_tril=factor))
        numpyro.sample("y", dist.Normal(x[::2], 0.5).to_event(1), obs=y_t)
        return x, None

    scan(step, x0, y)


PARTICLE_FILTER = ndda.Filter(
    ndda.FAAPF(program, weight=ndda.Moment(), target_ess=0.0), num_particles=512, num_chains=24, progress_bar=False
)


def factors(model: LinearGaussian) -> tuple[np.ndarray, np.ndarray]:
    initial = scipy.linalg.solve_discrete_lyapunov(model.transition, model.covariance)
    return np.linalg.cholesky(initial), np.linalg.cholesky(model.covariance)


@functools.cache
def filtered(seed: int) -> tuple[ndda.FilterResult, LinearGaussian, np.ndarray]:
    """(result of 24 independent filters, model, observations); one compile for all seeds."""
    model = LinearGaussian.make(seed, 4)
    _, y = model.simulate(100 + seed, STEPS)
    PARTICLE_FILTER.run(jax.random.key(seed), *map(jnp.asarray, (y, model.transition, *factors(model))))
    return PARTICLE_FILTER.result, model, y


def rauch_tung_striebel(model: LinearGaussian, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cuthbert's: means (time, d) and variances (time, d) of p(x_k | y_{1:T})."""
    d = len(model.transition)
    initial, factor = factors(model)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        a, h = jnp.asarray(model.transition), jnp.eye(d)[::2]
        error = model.error * jnp.eye(len(h))
        kalman = cuthbert.gaussian.kalman

        def dynamics(_):
            return a, jnp.zeros(d), jnp.asarray(factor)

        def observation(y_t):
            return h, jnp.zeros(len(h)), error, y_t

        forward = kalman.build_filter(jnp.zeros(d), jnp.asarray(initial), dynamics, observation)
        states = cuthbert.filter(forward, jnp.asarray(y), forward.init_prepare())
        smoothed = cuthbert.smoother(kalman.build_smoother(dynamics), states)
        factors_ = np.asarray(smoothed.chol_cov)[1:]
        return np.asarray(smoothed.mean)[1:], np.sum(factors_**2, -1)


def exact(model: LinearGaussian, y: np.ndarray, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """Means (time, d) and covariances (time, d, d) of p(x_k | y_{1:k+lag}), from the joint Gaussian of all states.

    With all observations it is what the Rauch-Tung-Striebel smoother computes recursively.
    """
    steps, d = len(y), len(model.transition)
    initial = scipy.linalg.solve_discrete_lyapunov(model.transition, model.covariance)
    links = np.eye(steps * d) - np.kron(np.eye(steps, k=-1), model.transition)
    noise = np.kron(np.eye(steps), np.linalg.inv(model.covariance))
    noise[:d, :d] = np.linalg.inv(model.transition @ initial @ model.transition.T + model.covariance)
    prior, look = links.T @ noise @ links, np.eye(d)[::2]
    means, covariances = [], []
    for k in range(steps):
        seen = np.arange(steps) <= k + lag
        covariance = np.linalg.inv(prior + np.kron(np.diag(seen), look.T @ look) / model.error**2)
        mean = covariance @ ((y * seen[:, None]) @ look).reshape(-1) / model.error**2
        at = slice(k * d, (k + 1) * d)
        means.append(mean[at])
        covariances.append(covariance[at, at])
    return np.array(means), np.array(covariances)


def assert_smoother(paths: ndda.FilterResult, mean: np.ndarray, variance: np.ndarray, noticed: float = 0.5) -> None:
    """Mean and second moment over independent filters, whose errors know of the coalescence, are the exact ones."""
    departure = (paths.posterior["x"].astype(float) - mean) / np.sqrt(variance)  # (chain, draw, time, d)
    assert_mean(departure.mean(1), 0.0, noticed=noticed)
    assert_mean((departure**2).mean(1), 1.0, noticed=2 * noticed)


def error_in_sd(result: ndda.FilterResult, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """RMS over steps and components of the means' error, each chain's."""
    return np.sqrt(np.mean((result.posterior["x"].mean(1) - mean) ** 2 / variance, axis=(1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_trajectories_are_the_exact_smoother(seed):
    """Mean and second moment within standard errors over independent filters, which know of the coalescence."""
    result, model, y = filtered(seed)
    mean, variance = rauch_tung_striebel(model, y)
    paths = ndda.results.trajectories(result)
    assert_smoother(paths, mean, variance)
    # The filter's own particles are another law, and the test can tell.
    assert excess(result.posterior["x"].mean(1), mean) > 2
    # Copies are no draws: the error is that of the number of lines, not of particles.
    lines = paths.sample_stats["distinct_lines"]
    assert lines[:, 0].max() < 128
    expected = np.sqrt(np.mean(1 / lines))
    assert expected < error_in_sd(paths, mean, variance).mean() < 3 * expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_lag_comes_nearer_to_the_smoother(seed):
    result, model, y = filtered(seed)
    mean, covariance = exact(model, y, STEPS)
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    errors = [error_in_sd(ndda.results.fixed_lag(result, lag), mean, variance) for lag in (0, 1, 3)]
    for nearer, farther in zip(errors[1:], errors, strict=False):
        gain = farther - nearer
        assert gain.mean() > 5 * gain.std(ddof=1) / np.sqrt(len(gain))
