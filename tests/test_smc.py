"""The kernels alone, on a linear-Gaussian model written by hand: nothing here is a program or a diffusion."""

from __future__ import annotations

import functools
import inspect

import blackjax.smc.resampling as resampling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from monte_carlo import assert_mean

from numpyro_diffusion_da.smc import (
    ForecastMultiplicative,
    PerturbedObservations,
    SquareRoot,
    base,
    bootstrap,
    enkf,
    fa_apf,
    guided_pf,
    init,
    map_particles,
    num_particles,
    particle_keys,
)

# x' = A x + N(0, Q), y = x'_0 + N(0, R), in two dimensions.
A = np.array([[0.9, 0.3], [-0.3, 0.9]])
Q = np.array([[0.3, 0.1], [0.1, 0.2]])
H = np.array([[1.0, 0.0]])
R = 0.2
S = float(Q[0, 0] + R)
GAIN = Q[:, 0] / S
ROOT = np.linalg.cholesky(Q)
ROOT_CONDITIONAL = np.linalg.cholesky(Q - np.outer(GAIN, Q[0]))
OBSERVATIONS = np.array([0.3, -0.8, 1.4, 0.9, np.nan, -0.2, 0.1], np.float32)


def seen(y):
    return ~jnp.isnan(y)


def log_normal(error, variance):
    return -0.5 * (error**2 / variance + jnp.log(2 * jnp.pi * variance))


def log_predictive(x, y):
    """log p(y | c), with the forecast as its record."""
    forecast = A @ x
    return jnp.where(seen(y), log_normal(jnp.nan_to_num(y) - forecast[0], S), 0.0), forecast


def optimal_draw(key, x, y):
    """p(x' | c, y)."""
    forecast, white = A @ x, jax.random.normal(key, (2,))
    moved = forecast + GAIN * (jnp.nan_to_num(y) - forecast[0]) + ROOT_CONDITIONAL @ white
    return jnp.where(seen(y), moved, forecast + ROOT @ white), {"white": white}


def free_draw(key, x, y):
    return A @ x + ROOT @ jax.random.normal(key, (2,)), ()


def weighted_draw(key, x, y):
    """A draw from N(forecast, Q) moved half of the way to p(x' | c, y), and its weight p(y | x') p(x' | c) / q(x')."""
    forecast, white = A @ x, jax.random.normal(key, (2,))
    shift = jnp.where(seen(y), 0.5 * GAIN * (jnp.nan_to_num(y) - forecast[0]), 0.0)
    moved = forecast + shift + ROOT @ white
    from_forecast = jnp.linalg.solve(ROOT, moved - forecast)
    ratio = 0.5 * jnp.vdot(white, white) - 0.5 * jnp.vdot(from_forecast, from_forecast)
    return moved, jnp.where(seen(y), log_likelihood(moved, (), y) + ratio, 0.0), {"white": white}


def log_likelihood(x, record, y):
    return jnp.where(seen(y), log_normal(jnp.nan_to_num(y) - x[0], R), 0.0)


def whitened_residual(x, particle, y):
    return jnp.where(seen(y), (jnp.nan_to_num(y) - x[:1]) / np.sqrt(R), 0.0)


def keep(key, x, particle, y, record):
    return x, record


def start(n: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n, 2))


def kalman() -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and covariance after the last observation, and the log evidence."""
    mean, covariance, log_evidence = np.zeros(2), np.eye(2), 0.0
    for y in OBSERVATIONS.astype(np.float64):
        mean, covariance = A @ mean, A @ covariance @ A.T + Q
        if np.isnan(y):
            continue
        s = covariance[0, 0] + R
        log_evidence -= 0.5 * ((y - mean[0]) ** 2 / s + np.log(2 * np.pi * s))
        gain = covariance[:, 0] / s
        mean, covariance = mean + gain * (y - mean[0]), covariance - np.outer(gain, covariance[0])
    return mean, covariance, log_evidence


def ess_at(alpha, log_weights) -> float:
    """Effective sample size of w^alpha, in double precision."""
    w = np.asarray(alpha, np.float64) * np.asarray(log_weights, np.float64)
    w = np.exp(w - w.max())
    return float(w.sum() ** 2 / (w**2).sum())


def algorithms(**settings):
    """The filters as `SamplingAlgorithm`s."""
    batch_size = settings.get("batch_size")
    stochastic, square_root = (
        enkf.as_top_level_api(free_draw, whitened_residual, keep, batch_size=batch_size, update=update)
        for update in (PerturbedObservations(), SquareRoot())
    )
    return {
        "fa_apf": fa_apf.as_top_level_api(log_predictive, optimal_draw, **{"target_ess": 0.0, **settings}),
        "guided_pf": guided_pf.as_top_level_api(weighted_draw, **settings),
        "bootstrap": bootstrap.as_top_level_api(free_draw, log_likelihood, **settings),
        "enkf": stochastic,
        "square_root": square_root,
    }


def run(algorithm, key, particles, observations=OBSERVATIONS):
    """One filter over the observations: (last state, infos stacked over time)."""

    def step(state, inputs):
        t, y = inputs
        return algorithm.step(jax.random.fold_in(key, t), state, y)

    times = jnp.arange(len(observations))
    return jax.lax.scan(step, algorithm.init(particles), (times, jnp.asarray(observations)))


# --- whole filters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fa_apf", "guided_pf", "bootstrap", "enkf", "square_root"])
def test_filters_are_the_kalman_filter(name):
    """Mean and covariance over 64 independent filters, and exp(log evidence), which is unbiased."""
    algorithm, n, repeats = algorithms()[name], 500, 64

    @jax.jit
    @jax.vmap
    def many(key):
        start_key, run_key = jax.random.split(key)
        state, _ = run(algorithm, run_key, jax.random.normal(start_key, (n, 2)))
        return state.particles.mean(0), jnp.cov(state.particles.T), state.log_evidence

    means, covariances, log_evidence = jax.device_get(many(jax.random.split(jax.random.key(0), repeats)))
    mean, covariance, exact = kalman()
    for estimate, truth in ((means, mean), (covariances, covariance)):
        # Self-normalized estimates and gains have a bias of order 1/N beside the noise.
        assert_mean(estimate, truth, tolerance=2 / n * np.sqrt(np.trace(covariance)))
    assert np.all(means.std(0) < 0.2 * np.sqrt(np.diag(covariance)))
    if name in ("enkf", "square_root"):
        np.testing.assert_array_equal(log_evidence, 0.0)  # it gives none
    else:
        ratio = np.exp(log_evidence - exact)
        assert_mean(ratio, 1.0, noticed=0.3)


@functools.cache
def jitted(name: str):
    """(step, list of its traces) of the filter with tempering, compiled once for the tests that follow."""
    algorithm, traces = algorithms(target_ess=0.2)[name], []

    def step(key, state, y):
        traces.append(y)
        return algorithm.step(key, state, y)

    return jax.jit(step), traces


def assert_same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [fa_apf, guided_pf, bootstrap, enkf], ids=lambda module: module.__name__)
def test_top_level_api_has_the_arguments_of_its_kernel(module):
    api, parameters = module.as_top_level_api, inspect.signature(module.build_kernel).parameters
    assert inspect.signature(api).parameters == parameters
    assert (api.__module__, api.__name__) == (module.__name__, "as_top_level_api")
    assert api.__doc__.startswith("Build the filter as a `blackjax.base.SamplingAlgorithm`.")
    for section in ("Args:", *(f"    {name}: " for name in parameters), "Returns:", "Raises:"):
        assert f"\n{section}" in api.__doc__


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("fa_apf", (1, 7)), *(pytest.param(name, (7,), marks=pytest.mark.slow) for name in ("guided_pf", "enkf"))],
)
def test_batches_agree_and_a_step_is_traced_once(name, sizes):
    step, traces = jitted(name)
    key, state, y = jax.random.key(0), init(start(16)), jnp.asarray(1.5)
    at_once = step(key, state, y)
    for size in sizes:
        assert_same(jax.jit(algorithms(target_ess=0.2, batch_size=size)[name].step)(key, state, y), at_once)
    again, info = step(jax.random.key(1), at_once[0], jnp.asarray(0.1))
    assert len(traces) == 1
    assert type(info) is fa_apf.Info
    assert type(again) is fa_apf.State


@pytest.mark.slow
def test_jit_and_not_jit_agree():
    key, state, y = jax.random.key(0), init(start(16)), jnp.asarray(1.5)
    assert_same(algorithms(target_ess=0.2)["fa_apf"].step(key, state, y), jitted("fa_apf")[0](key, state, y))


@pytest.mark.parametrize("name", ["fa_apf", "guided_pf", "enkf"])
def test_no_observation_is_a_forecast(name):
    """Every particle in its own place, and no evidence."""
    particles = start(16)
    state, info = jitted(name)[0](jax.random.key(0), init(particles), jnp.asarray(np.nan))
    np.testing.assert_array_equal(info.ancestors, np.arange(16))
    np.testing.assert_allclose(state.log_evidence, 0.0, atol=1e-6)
    np.testing.assert_array_equal(info.tempering, 1.0)
    if name == "fa_apf":
        forecast = particles @ A.T + info.proposal["white"] @ ROOT.T
        np.testing.assert_allclose(state.particles, forecast, rtol=1e-4, atol=1e-5)


def test_info_of_fa_apf():
    """Weights and their records belong to the particles before resampling, draws to those after it."""
    particles, y = start(16), jnp.asarray(2.0)
    state, info = jitted("fa_apf")[0](jax.random.key(0), init(particles), y)
    log_weights = jax.jit(jax.vmap(lambda x: log_predictive(x, y)[0]))(particles)
    np.testing.assert_allclose(info.log_weights, log_weights, rtol=1e-5)
    np.testing.assert_allclose(info.weighing, particles @ A.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(info.ess, ess_at(1.0, log_weights), rtol=1e-4)
    np.testing.assert_allclose(info.log_weight_std, np.std(log_weights), rtol=1e-4)
    np.testing.assert_allclose(info.log_evidence_increment, np.log(np.mean(np.exp(log_weights))), rtol=1e-4)
    np.testing.assert_allclose(state.log_evidence, info.log_evidence_increment)
    assert info.distinct_ancestors == len(np.unique(info.ancestors))
    assert (int(info.nonfinite_weights), int(info.nonfinite_particles)) == (0, 0)
    forecast = particles[info.ancestors] @ A.T
    expected = forecast + np.outer(2.0 - forecast[:, 0], GAIN) + info.proposal["white"] @ ROOT_CONDITIONAL.T
    np.testing.assert_allclose(state.particles, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["fa_apf", "guided_pf"])
def test_one_particle(name):
    state, info = jitted(name)[0](jax.random.key(0), init(start(1)), jnp.asarray(1.5))
    assert (int(info.ancestors[0]), float(info.tempering)) == (0, 1.0)
    np.testing.assert_allclose(info.ess, 1.0, rtol=1e-6)
    np.testing.assert_allclose(state.log_evidence, info.log_weights[0], rtol=1e-5)
    assert state.particles.shape == (1, 2)


def test_enkf_needs_two_particles():
    for name in ("enkf", "square_root"):
        with pytest.raises(ValueError, match="one particle has no covariance"):
            algorithms()[name].step(jax.random.key(0), init(start(1)), jnp.asarray(1.5))


@pytest.mark.slow
def test_pytree_particles():
    """Particles, observations and records may be any pytrees, integers among them."""

    def weigh(particle, y):
        return log_predictive(particle["x"], y["value"])[0], ()

    def propose(key, particle, y):
        x, _ = optimal_draw(key, particle["x"], y["value"])
        return {"x": x, "age": particle["age"] + 1, "name": particle["name"]}, (x[0],)

    def likelihood(particle, record, y):
        return log_likelihood(particle["x"], record, y["value"])

    particles = {"x": start(9), "age": jnp.zeros(9, int), "name": jnp.arange(9)}
    y = {"value": jnp.asarray(1.5)}
    for algorithm in (
        fa_apf.as_top_level_api(weigh, propose, batch_size=2),
        bootstrap.as_top_level_api(propose, likelihood, batch_size=2),
    ):
        state, info = jax.jit(algorithm.step)(jax.random.key(0), algorithm.init(particles), y)
        np.testing.assert_array_equal(state.particles["age"], 1)
        np.testing.assert_array_equal(state.particles["name"], info.ancestors)
        np.testing.assert_allclose(info.proposal[0], state.particles["x"][:, 0])


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_non_finite_weights_are_never_selected():
    """Where a particle's second component is above 0, log p(y | c) is what the observation says."""

    def weigh(x, y):
        log_weight, record = log_predictive(x, y["value"])
        return jnp.where(x[1] > 0, y["bad"], log_weight), record

    # The draw leaves particles as they are: one that is not finite is counted.
    algorithm = fa_apf.as_top_level_api(weigh, lambda key, x, y: (x.at[0].set(jnp.where(x[0] > 1, jnp.nan, x[0])), ()))
    particles, step = start(20), jax.jit(algorithm.step)
    sick = np.asarray(particles[:, 1] > 0)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        state, info = step(jax.random.key(0), algorithm.init(particles), {"value": jnp.asarray(0.5), "bad": bad})
        assert info.nonfinite_weights == sick.sum()
        np.testing.assert_array_equal(info.log_weights[sick], -np.inf)
        assert not np.any(sick[np.asarray(info.ancestors)])
        healthy = np.asarray(info.log_weights)[~sick]
        np.testing.assert_allclose(info.log_weight_std, healthy.std(), rtol=1e-4)
        # A particle that cannot be weighed counts as one of weight zero.
        np.testing.assert_allclose(info.log_evidence_increment, np.log(np.exp(healthy).sum() / 20), rtol=1e-4)
        assert info.nonfinite_particles == np.isnan(state.particles[:, 0]).sum() > 0


def test_all_weights_non_finite():
    """Nothing can be selected: everyone stays, and the count says so. The observation is the weight."""
    particles = start(12)
    for algorithm in (
        fa_apf.as_top_level_api(lambda x, y: (y, ()), free_draw),
        bootstrap.as_top_level_api(free_draw, lambda x, record, y: y, target_ess=0.5),
    ):
        step = jax.jit(algorithm.step)
        for bad in (jnp.nan, jnp.inf, -jnp.inf):
            state, info = step(jax.random.key(0), algorithm.init(particles), bad)
            np.testing.assert_array_equal(info.ancestors, np.arange(12))
            assert (int(info.nonfinite_weights), int(info.nonfinite_particles)) == (12, 0)
            assert (float(info.ess), float(info.tempering), float(info.log_weight_std)) == (0.0, 1.0, 0.0)
            assert state.log_evidence == -np.inf
            assert not np.any(np.isnan(state.particles))


def test_diagnostics_do_not_depend_on_the_size_of_the_weights():
    """A million observations make log-weights of 1e6, whose float32 spacing is 0.06."""
    log_weights = 2.0 * jax.random.normal(jax.random.key(0), (64,))
    algorithm = fa_apf.as_top_level_api(lambda x, y: (x, ()), lambda key, x, y: (x, ()))
    step = jax.jit(algorithm.step)
    for offset in (0.0, 1e5, -1e6):
        shifted = log_weights + offset
        _, info = step(jax.random.key(0), algorithm.init(shifted), None)
        kept = np.asarray(shifted, np.float64) - offset  # what float32 kept of them
        np.testing.assert_allclose(info.ess, ess_at(1.0, kept), rtol=1e-4)
        np.testing.assert_allclose(info.log_weight_std, kept.std(), rtol=5e-2)
        rounding = 1e-6 * (1 + abs(offset))
        np.testing.assert_allclose(info.log_evidence_increment - offset, np.log(np.exp(kept).mean()), atol=rounding)


# --- tempering --------------------------------------------------------------------------------------------------------


tempered = jax.jit(base.tempering_exponent, static_argnums=1)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 10.0, 1e3, 1e6])
@pytest.mark.parametrize("target", [0.05, 0.2, 0.9])
def test_tempering_hits_its_target(spread, target):
    n = 256
    for seed in range(3):
        log_weights = spread * jax.random.normal(jax.random.key(seed), (n,)) - 100 * spread
        alpha = tempered(log_weights, target)
        assert 0.0 < alpha <= 1.0
        if ess_at(1.0, log_weights) >= target * n:
            assert alpha == 1.0
        else:
            np.testing.assert_allclose(ess_at(alpha, log_weights), target * n, rtol=2e-3)


def test_tempering_is_monotone():
    """A higher target never means less tempering, and wider weights never less either."""
    log_weights = 20.0 * jax.random.normal(jax.random.key(0), (256,))
    by_target = np.array([tempered(log_weights, target) for target in (0.0, 0.05, 0.2, 0.9)])
    assert by_target[0] == 1.0
    assert np.all(np.diff(by_target) < 0)
    by_spread = np.array([tempered(factor * log_weights, 0.2) for factor in (0.01, 0.1, 1.0, 10.0, 1e4)])
    assert np.all(np.diff(by_spread) <= 0)
    # alpha log w is what counts: beyond 1 the product stays.
    np.testing.assert_allclose(by_spread[3] * 10.0, by_spread[2], rtol=1e-2)


def test_tempering_with_impossible_particles():
    """They count for nothing: what can be asked of the ESS is the number of the others."""
    n = 256
    log_weights = 30.0 * jax.random.normal(jax.random.key(0), (n,))
    dead = jnp.arange(n) % 4 != 0
    alpha = tempered(jnp.where(dead, -jnp.inf, log_weights), 0.05)
    np.testing.assert_allclose(ess_at(alpha, log_weights[~dead]), 0.05 * n, rtol=2e-3)
    alpha = tempered(jnp.where(dead, -jnp.inf, log_weights), 0.9)  # 64 left: 230 cannot be had
    assert 0.0 < alpha < 1e-2
    np.testing.assert_allclose(ess_at(alpha, log_weights[~dead]), 64, rtol=2e-3)
    for only_one in (jnp.where(jnp.arange(n) == 3, 5.0, -jnp.inf), jnp.full(n, -jnp.inf), jnp.full(n, 7.0)):
        assert tempered(only_one, 0.2) == 1.0


@pytest.mark.parametrize("target", [-0.1, 1.0, 50.0])
def test_target_is_a_fraction(target):
    sentence = "give a fraction of the particles from 0"
    with pytest.raises(ValueError, match=sentence):
        fa_apf.build_kernel(log_predictive, optimal_draw, target_ess=target)
    with pytest.raises(ValueError, match=sentence):
        bootstrap.build_kernel(free_draw, log_likelihood, target_ess=target)


def test_enkf_inflation():
    y, particles = jnp.asarray(np.nan), start(64)  # unobserved, only the inflation acts
    kernel = jax.jit(enkf.build_kernel(free_draw, whitened_residual, keep, inflation=(ForecastMultiplicative(1.5),)))
    inflated, info = kernel(jax.random.key(0), init(particles), y)
    plain, _ = jax.jit(jax.vmap(free_draw, (0, 0, None)))(
        particle_keys(jax.random.split(jax.random.key(0), 3)[0], 64), particles, y
    )
    mean = plain.mean(0, keepdims=True)
    np.testing.assert_allclose(inflated.particles - mean, 1.5 * (plain - mean), atol=1e-5)
    np.testing.assert_array_equal(info.ancestors, np.arange(64))


@pytest.mark.slow
def test_enkf_in_ensemble_space_is_the_same():
    """With more observations than members the gain is solved the other way round."""
    n, m = 6, 20
    matrix = np.random.default_rng(0).normal(size=(m, 2))

    def residual(x, particle, y):
        return y[: len(matrix)] - matrix @ x

    def fewer(x, particle, y):
        # The same information in two numbers: matrix^T matrix = L L^T, whitened by L.
        return jnp.linalg.solve(factor, matrix.T @ (y - matrix @ x))

    factor = np.linalg.cholesky(matrix.T @ matrix)
    y = jnp.asarray(np.random.default_rng(1).normal(size=m), jnp.float32)
    means = [
        jax.jit(enkf.build_kernel(free_draw, fn, keep))(jax.random.key(0), init(start(n)), y)[0].particles.mean(0)
        for fn in (residual, fewer)
    ]
    # Perturbations are centered, so the mean does not depend on them: it must agree to rounding.
    np.testing.assert_allclose(means[0], means[1], rtol=1e-3, atol=1e-4)


# --- resampling -------------------------------------------------------------------------------------------------------

RESAMPLING = [resampling.systematic, resampling.stratified, resampling.multinomial, resampling.residual]


@pytest.mark.parametrize(
    "resampling_fn",
    [*RESAMPLING[:3], pytest.param(RESAMPLING[3], marks=pytest.mark.slow)],
    ids=lambda fn: fn.__name__,
)
def test_zero_weight_is_never_selected(resampling_fn):
    """In float32, many keys, with the last particle and whole stretches impossible."""
    n, keys = 1000, jax.random.split(jax.random.key(0), 500)
    choose = jax.jit(jax.vmap(lambda key, weights: base.guarded(resampling_fn)(key, weights, n), (0, None)))
    raw = jnp.abs(jax.random.normal(jax.random.key(1), (n,), jnp.float32)) ** 4
    index = jnp.arange(n)
    for alive in (index < n - 1, index < n // 2, index > n // 2, (index % 7 == 3) & (index < 900), index == 0):
        weights = jnp.where(alive, raw + 1e-6, 0.0)
        weights = weights / weights.sum()
        assert bool(jnp.all(weights[choose(keys, weights)] > 0))


def test_guard_takes_the_nearest_possible_particle():
    """Whatever a resampling returns: the last one before it that has weight, else the first one after it."""
    weights = jnp.array([0.0, 0.0, 0.4, 0.0, 0.6, 0.0, 0.0])
    for chosen, expected in {0: 2, 1: 2, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 4}.items():
        resample = base.guarded(lambda key, w, n, chosen=chosen: jnp.full(n, chosen))
        np.testing.assert_array_equal(resample(jax.random.key(0), weights, 3), expected)


@pytest.mark.parametrize("resampling_fn", RESAMPLING, ids=lambda fn: fn.__name__)
def test_guarded_resampling_is_unbiased(resampling_fn):
    """Mean counts are n w within their standard error."""
    n, repeats = 20, 4000
    weights = jax.nn.softmax(2.0 * jax.random.normal(jax.random.key(0), (n,)))
    keys = jax.random.split(jax.random.key(1), repeats)
    count = jax.jit(jax.vmap(lambda key: jnp.bincount(base.guarded(resampling_fn)(key, weights, n), length=n)))
    assert_mean(count(keys), n * np.asarray(weights), tolerance=1e-3)


def test_select():
    n, key = 50, jax.random.key(0)
    choose = jax.jit(base.select, static_argnums=(2, 3))
    ancestors, alpha = choose(key, jnp.full(n, -3.0), resampling.systematic, 0.5)
    np.testing.assert_array_equal(ancestors, np.arange(n))  # equal weights: nobody moves
    assert alpha == 1.0
    log_weights = 50.0 * jax.random.normal(key, (n,))
    untempered, alpha = choose(key, log_weights, resampling.systematic, 0.0)
    tempered, smaller = choose(key, log_weights, resampling.systematic, 0.5)
    assert alpha == 1.0
    assert smaller < 1.0
    assert len(np.unique(untempered)) < len(np.unique(tempered))


# --- particles --------------------------------------------------------------------------------------------------------


def test_number_of_particles():
    assert num_particles({"a": jnp.zeros((3, 2)), "b": jnp.zeros(3)}) == 3
    for particles in ({"a": jnp.zeros(3), "b": jnp.zeros(4)}, jnp.zeros(()), {}):
        with pytest.raises(ValueError, match="one leading axis of N"):
            num_particles(particles)


def test_particle_keys_do_not_depend_on_the_number():
    """A particle's draw does not change when others are added."""
    few, many = (jax.random.key_data(particle_keys(jax.random.key(0), n)) for n in (3, 8))
    np.testing.assert_array_equal(few, many[:3])
    assert len(np.unique(many, axis=0)) == 8


def test_map_particles():
    x = jnp.arange(10.0)
    for size in (0, 1, 3, 10, 100):
        np.testing.assert_array_equal(map_particles(lambda a, b: a * b, size)(x, x), x**2)


def test_map_particles_in_batches_takes_arrays_without_elements():
    """The conditioning of the weather emulator has one; JAX alone cannot divide it."""
    key, x, nothing = jax.random.split(jax.random.key(0), 7), jnp.arange(7.0), jnp.zeros((7, 2, 0))

    def of_one(given):
        key, x, nothing = given
        return {"sum": x + nothing.sum() + jax.random.normal(key), "key": key, "nothing": nothing.T, "flag": x > 2}

    whole = map_particles(of_one)((key, x, nothing))
    for size in (2, 3, 7):
        parts = map_particles(of_one, size)((key, x, nothing))
        assert jax.tree.map(jax.typeof, parts) == jax.tree.map(jax.typeof, whole)
        np.testing.assert_array_equal(parts["sum"], whole["sum"])
        np.testing.assert_array_equal(parts["flag"], whole["flag"])
