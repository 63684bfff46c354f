"""Huber's distribution: its density, moments, draws; and filters on observations that have it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import integrate, stats

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.program import StateSpaceModel


def unnormalized(y, loc, scale, k):
    r = abs(y - loc) / scale
    return np.exp(-0.5 * r**2 if r <= k else -k * r + 0.5 * k**2)


@pytest.mark.slow
@pytest.mark.parametrize("k", [0.5, 1.5, 4.0])
def test_density_moments_and_distribution_by_quadrature(k):
    loc, scale = 1.0, 2.0
    fn = ndda.Huber(loc, scale, k)
    kinks = (loc - k * scale, loc + k * scale)

    def integral(of, upper):
        return integrate.quad(of, -200.0, upper, points=[p for p in (*kinks, loc) if p < upper], limit=200)[0]

    total = integral(lambda y: unnormalized(y, loc, scale, k), 200.0)
    y = np.array([-9.0, -2.0, 0.3, 1.0, 2.5, 4.0, 12.0])
    expected = [np.log(unnormalized(v, loc, scale, k) / total) for v in y]
    np.testing.assert_allclose(fn.log_prob(jnp.asarray(y)), expected, rtol=1e-5)
    second = integral(lambda y: (y - loc) ** 2 * unnormalized(y, loc, scale, k), 200.0)
    np.testing.assert_allclose(fn.variance, second / total, rtol=1e-5)
    assert fn.mean == loc
    below = [integral(lambda y: unnormalized(y, loc, scale, k), v) / total for v in y]
    np.testing.assert_allclose(fn.cdf(jnp.asarray(y)), below, rtol=1e-4)
    levels = jnp.array([1e-6, 0.02, 0.3, 0.5, 0.8, 0.999])
    np.testing.assert_allclose(fn.cdf(fn.icdf(levels)), levels, rtol=1e-5)


def test_a_large_threshold_is_a_gaussian():
    y = jnp.linspace(-4.0, 4.0, 9)
    np.testing.assert_allclose(ndda.Huber(0.5, 0.7, 8.0).log_prob(y), dist.Normal(0.5, 0.7).log_prob(y), rtol=1e-5)


@pytest.mark.slow
def test_draws():
    fn = ndda.Huber(1.0, 2.0, 0.8)
    draws = np.asarray(jax.jit(lambda key: fn.sample(key, (4000,)))(jax.random.key(0)))
    assert stats.kstest(draws, lambda y: np.asarray(fn.cdf(jnp.asarray(y)))).pvalue > 0.01
    vector = ndda.Huber(jnp.zeros(3), jnp.ones(3), jnp.full(3, 1.5)).to_event(1)
    assert (vector.event_shape, vector.batch_shape, vector.sample(jax.random.key(0)).shape) == ((3,), (), (3,))


@pytest.mark.slow
def test_draws_are_reparametrized():
    """In the tails and in the core: the derivative in the scale is (y - loc) / scale."""

    @jax.jit
    def sample(scale, threshold):
        fn = ndda.Huber(jnp.ones(50), jnp.full(50, scale), jnp.full(50, threshold))
        return fn.sample(jax.random.key(1))

    in_scale, in_threshold = jax.jacobian(sample, argnums=(0, 1))(2.0, 0.8)
    np.testing.assert_allclose(in_scale, (sample(2.0, 0.8) - 1.0) / 2.0, rtol=1e-4)
    by_difference = (sample(2.0, 0.81) - sample(2.0, 0.79)) / 0.02
    np.testing.assert_allclose(in_threshold, by_difference, rtol=0.02, atol=0.03)


Q, ERROR = 0.6, 0.3
Y = np.array([0.4, 0.8, 5.0, 0.2, np.nan, -0.5], np.float32)


def model(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, Q**0.5).to_event(1))
        numpyro.sample("y", ndda.Huber(x, ERROR, 1.5).to_event(1), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(1), 1.0).to_event(1)), y)


def exact():
    """(means, standard deviations, log p(y)) of the filter of `model`, on a grid."""
    grid = np.linspace(-9.0, 9.0, 1801)
    moved = stats.norm.pdf(grid[:, None], 0.9 * grid[None], Q**0.5)
    moved /= moved.sum(0)
    density = stats.norm.pdf(grid)
    density /= density.sum()
    means, spreads, evidence = [], [], 0.0
    for y in Y:
        density = moved @ density
        if not np.isnan(y):
            density = density * np.exp(np.asarray(ndda.Huber(grid, ERROR, 1.5).log_prob(y), float))
        evidence += np.log(density.sum())
        density = density / density.sum()
        means.append(density @ grid)
        spreads.append(np.sqrt(density @ (grid - means[-1]) ** 2))
    return np.array(means), np.array(spreads), evidence


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FAAPF", "GuidedPF", "Bootstrap"])
def test_filters_against_a_grid(name):
    """With a gross error and a missing value among six; Moment weights of one observation are exact."""
    n = 8000 if name == "Bootstrap" else 1000
    algorithm = {
        "FAAPF": lambda: ndda.FAAPF(model, target_ess=0.0),
        "GuidedPF": lambda: ndda.GuidedPF(model),
        "Bootstrap": lambda: ndda.Bootstrap(model),
    }[name]()
    filter = ndda.Filter(algorithm, num_particles=n, progress_bar=False)
    filter.run(jax.random.key(0), Y[:, None])
    means, spreads, evidence = exact()
    x = filter.result.posterior["x"][0, :, :, 0].astype(float)
    # Selection and the move each add about one draw's error; a bootstrap filter's is that of its effective sample.
    error = np.sqrt(2.0 / np.minimum(n, filter.result.sample_stats["ess"][0].reshape(len(Y))))
    assert np.all(np.abs(x.mean(0) - means) < 4.0 * spreads * error)
    assert np.all(np.abs(x.std(0) / spreads - 1.0) < 4.0 * error)
    assert abs(filter.result.sample_stats["log_evidence_increment"].sum() - evidence) < 0.25


@pytest.mark.slow
def test_a_program_finds_its_linear_predictor():
    """So that quadrature runs along x itself, and a draw in closed form is exact."""
    program = StateSpaceModel(model, (Y[:, None],))
    inputs = jax.tree.map(lambda v: v[0], program.time_inputs())
    likelihood = program.likelihood(jnp.zeros(1), inputs)
    assert program.structure.general_names == {"y"}
    assert likelihood.are_separate(jnp.zeros(1))
    np.testing.assert_allclose(likelihood.log_prob(jnp.ones(1)), ndda.Huber(1.0, ERROR, 1.5).log_prob(Y[0]), rtol=1e-5)
