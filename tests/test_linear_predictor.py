"""Observations taken apart into a link of a linear predictor, and what filters gain from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import stats

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.observation import GeneralLikelihood, find_linear_predictor
from numpyro_diffusion_da.program import pointwise_log_likelihood, predicted_observation
from numpyro_diffusion_da.transition import DiffusionDynamics, GaussianDynamics

MAP = jnp.asarray(np.random.default_rng(0).normal(size=(5, 10)), jnp.float32)
Y = 0.3 * jnp.arange(5.0) + 0.1
X = jax.random.normal(jax.random.key(0), (10,))
# name: (distribution at x, observed values, predictor at x up to a shift and a factor, is it one component each)
SPLIT = {
    "modulus": (lambda x: dist.Normal(jnp.abs(x[::2]), 0.3), Y, lambda x: x[::2], True),
    "chosen afterwards": (lambda x: dist.Normal(jnp.abs(x)[::2], 0.3), Y, lambda x: x[::2], True),
    "square of a multiple": (lambda x: dist.Normal((2 * x[:5] - 1) ** 2, 0.3).to_event(1), Y, lambda x: x[:5], True),
    "polynomial": (lambda x: dist.Normal((x[5:] - 1) * (x[5:] + 2), 0.3), Y, lambda x: x[5:], True),
    "mean and error": (lambda x: dist.Normal(x[:5], jnp.exp(x[:5])), Y, lambda x: x[:5], True),
    "heavy tails": (lambda x: dist.StudentT(3.0, x[:5], 0.3), Y, lambda x: x[:5], True),
    "counts of a functional": (lambda x: dist.Poisson(jnp.exp(MAP @ x)), jnp.ones(5), lambda x: MAP @ x, False),
    "above a threshold": (
        lambda x: dist.Normal(jnp.maximum(x.reshape(5, 2).mean(1), 0.0), 0.3), Y, lambda x: x[::2] + x[1::2], False,
    ),
    "censored": (
        lambda x: dist.RightCensoredDistribution(dist.Normal(x[:5], 0.3), jnp.array([1, 0, 1, 0, 1])),
        Y, lambda x: x[:5], True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLIT)
def test_link_and_predictor(name):
    fn, y, expected, separate = SPLIT[name]
    parts = find_linear_predictor(lambda x: pointwise_log_likelihood(fn(x), y), (10,))
    assert parts is not None
    for key in range(2):
        x = jax.random.normal(jax.random.key(key), (10,))
        np.testing.assert_allclose(parts.link(parts.predictor(x)), pointwise_log_likelihood(fn(x), y), rtol=1e-5)
    # Affine in what was expected: equal slopes along a direction, element by element, up to a factor.
    v = jax.random.normal(jax.random.key(5), (10,))
    ratio = (parts.predictor(X + v) - parts.predictor(X)) / (expected(X + v) - expected(X))
    np.testing.assert_allclose(ratio, jnp.full(5, ratio[0]), rtol=1e-3)
    assert (parts.components is not None) == separate
    if separate:
        at = jnp.arange(10.0)
        np.testing.assert_array_equal(parts.components, expected(at))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: dist.Normal(jnp.hypot(x[:5], x[5:]), 0.3),
        lambda x: dist.Normal(x[:5] * x[5:], 0.3),
        lambda x: dist.Normal(x[:5], jnp.exp(x[5:])),
        lambda x: dist.Normal(jnp.abs(x)[jnp.array([0, 0, 1, 2, 3])], 0.3),
        lambda x: dist.Normal(jax.lax.fori_loop(0, 2, lambda i, v: v**2, x[:5]), 0.3),
        lambda x: dist.Normal(jnp.sum(x**2) * jnp.ones(5), 0.3),
    ],
)
def test_other_functions_have_none(fn):
    assert find_linear_predictor(lambda x: pointwise_log_likelihood(fn(x), Y), (10,)) is None


def moduli(y: jax.Array, error: float) -> GeneralLikelihood:
    """|x| of every component."""

    def site(x):
        return dist.Normal(jnp.abs(x), error)

    parts = find_linear_predictor(lambda x: pointwise_log_likelihood(site(x), y), y.shape)

    def observe(x):
        return [predicted_observation(site(x), y, parts.predictor(x), parts.link, parts.components)]

    return GeneralLikelihood(observe)


def exact_cdf(x: np.ndarray, mean: float, spread: float, y: float, error: float) -> np.ndarray:
    """Of p(x | y) for y = |x| + N(0, error^2), by quadrature."""
    grid = np.linspace(-8, 8, 20001)
    density = stats.norm.pdf(grid, mean, spread) * stats.norm.pdf(y, np.abs(grid), error)
    return np.interp(x, grid, np.cumsum(density) / density.sum())


MEANS, MODULI = np.array([0.2, -0.3, 2.0, 0.0], np.float32), jnp.array([1.0, 0.5, 1.5, 2.0])


def largest_distance(draws: np.ndarray) -> float:
    """Kolmogorov's, over the components, to the exact posteriors."""
    n = len(draws)
    found = []
    for i in range(4):
        exact = exact_cdf(np.sort(draws[:, i]), MEANS[i], 1.0, float(MODULI[i]), 0.3)
        found.append(np.abs(exact - (np.arange(n) + 0.5) / n).max())
    return max(found)


@pytest.mark.slow
def test_two_modes_in_closed_form():
    """The draw is exact: Kolmogorov's distance is that of as many draws of the posterior (1.63 / sqrt(n) at 1 %)."""
    step, likelihood = GaussianDynamics(jnp.asarray(MEANS), jnp.ones(4)), moduli(MODULI, 0.3)
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.jit(jax.vmap(lambda key: step.conditional_draw(key, likelihood, ndda.MMPS())[0]))(keys)
    assert largest_distance(np.asarray(draws)) < 1.63 / np.sqrt(4000)
    # A factor hides that components are independent: expectation propagation and the copula give the same.
    dense = GaussianDynamics(jnp.asarray(MEANS), jnp.eye(4))
    draws = jax.jit(jax.vmap(lambda key: dense.conditional_draw(key, likelihood, ndda.MMPS())[0]))(keys)
    assert largest_distance(np.asarray(draws)) < 1.63 / np.sqrt(4000) + 0.01


@pytest.mark.slow
def test_two_modes_by_diffusion():
    """Guidance finds both modes; a linearized |x| found one or none (a distance of 0.25)."""
    prior = ndda.GaussianPrior(np.eye(4), np.eye(4))
    step = DiffusionDynamics(prior, prior.condition(jnp.asarray(MEANS)), ndda.Sampler())
    likelihood = moduli(MODULI, 0.3)
    keys = jax.random.split(jax.random.key(0), 2000)
    draws = jax.jit(
        jax.vmap(lambda key: step.conditional_draw(key, likelihood, ndda.MMPS(ndda.diffusion.DirectSolve()))[0])
    )(keys)  # fmt: skip
    assert largest_distance(np.asarray(draws)) < 0.06


def test_a_program_is_taken_apart():
    def model(y):
        x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(3), 1.0).to_event(1))

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
            numpyro.sample("linear", dist.Normal(2.0 * x[:2], 0.3), obs=y_t[:2])
            numpyro.sample("modulus", dist.Normal(jnp.abs(x), 0.3).to_event(1), obs=y_t)
            numpyro.sample("product", dist.Normal(x[0] * x[1], 0.3), obs=y_t[0])
            return x, None

        scan(step, x0, y)

    program = ndda.program.StateSpaceModel(model, (jnp.ones((2, 3)),))
    assert program.structure.general_names == {"modulus"}
    assert not program.structure.observes_linearly
    carry, inputs = jnp.array([0.5, -0.2, 1.0]), jax.tree.map(lambda v: v[0], program.time_inputs())
    x = jnp.array([0.4, -1.0, 2.0])
    expected = [stats.norm.logpdf(1.0, 2.0 * x[:2], 0.3), stats.norm.logpdf(1.0, np.abs(x), 0.3)]
    expected.append([stats.norm.logpdf(1.0, x[0] * x[1], 0.3)])
    np.testing.assert_allclose(program.likelihood(carry, inputs).pointwise(x), np.concatenate(expected), rtol=1e-5)
