"""Emulators of one pass, x' = f(c, e) with e ~ N(0, I): guided draws, weights and filters against exact answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from monte_carlo import assert_mean
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import DirectSolve, KrylovSolve
from numpyro_diffusion_da.observation import GaussianLikelihood, GaussianObservation
from numpyro_diffusion_da.transition import GaussianDynamics, OnePassDynamics

D, K = 6, 4
RNG = np.random.default_rng(0)
A = jnp.asarray(0.9 * np.linalg.qr(RNG.normal(size=(D, D)))[0], jnp.float32)
FACTOR = jnp.asarray(RNG.normal(size=(D, K)), jnp.float32)
ERROR = jnp.asarray([0.5, 0.8, 1.2])
Y = jnp.asarray([1.0, -0.5, 2.0])


def linear_prior(factor=FACTOR) -> ndda.NoiseConditionedPrior:
    """Emulator x' = A x + F e of rank 4 in 6 dimensions."""
    return ndda.NoiseConditionedPrior(
        lambda p, e, x: p["A"] @ x + p["F"] @ e,
        noise_shape=factor.shape[1],
        layout=D,
        parameters={"A": A, "F": factor},
        climatology=dist.Normal(jnp.zeros(D), 1.0).to_event(1),
    )


def linear_dynamics(iterations: int = 1) -> OnePassDynamics:
    prior = linear_prior()
    return OnePassDynamics(prior, prior.condition(jnp.ones(D)), iterations)


def likelihood(h=lambda x: x[::2], error=ERROR, y=Y) -> GaussianLikelihood:
    return GaussianLikelihood(lambda x: [GaussianObservation(h(x), error, y, jnp.ones(len(y), bool))])


def kalman():
    """Mean and covariance of x' given y, and log p(y), for the linear emulator from a state of ones."""
    m, v = np.asarray(A @ jnp.ones(D), float), np.asarray(FACTOR @ FACTOR.T, float)
    h, r = np.eye(D)[::2], np.diag(np.asarray(ERROR, float) ** 2)
    s = h @ v @ h.T + r
    gain = v @ h.T @ np.linalg.inv(s)
    off = np.asarray(Y, float) - h @ m
    evidence = -0.5 * off @ np.linalg.solve(s, off) - 0.5 * np.linalg.slogdet(2 * np.pi * s)[1]
    return m + gain @ off, v - gain @ h @ v, evidence


def draws(number, fn):
    return jax.jit(jax.vmap(fn))(jax.random.split(jax.random.key(1), number))


def of_several_seeds(number, fn, seeds=3):
    """Results of `fn` for each seed, which is compiled once."""
    run = jax.jit(jax.vmap(fn))
    return [run(jax.random.split(jax.random.key(seed), number)) for seed in range(seeds)]


def assert_posterior(x):
    """Check mean and covariance of draws against Kalman's, within five standard errors."""
    mean, covariance, _ = kalman()
    spread = np.sqrt(np.diagonal(covariance))
    np.testing.assert_allclose(np.mean(x, 0) / spread, mean / spread, atol=5 / len(x) ** 0.5)
    size = spread[:, None] * spread[None]
    np.testing.assert_allclose(np.cov(np.asarray(x).T) / size, covariance / size, atol=5 * (2 / len(x)) ** 0.5)


@pytest.mark.parametrize("iterations", [1, 2])
def test_guided_draws_of_a_linear_emulator_have_the_posterior(iterations):
    dynamics = linear_dynamics(iterations)
    guidance = ndda.MMPS(DirectSolve())
    found = of_several_seeds(10_000, lambda key: dynamics.conditional_draw(key, likelihood(), guidance))
    for x, _ in found:
        assert_posterior(x)
    # A forward pass, and a vjp and a jvp for each of three products, each time; the slope once; the state.
    counts = {name: int(n[0]) for name, n in found[0][1].passes._asdict().items()}
    products = {"jvp": 3 * iterations + iterations - 1, "vjp": 3 * iterations}
    assert counts == {"forward": iterations + 1, **products, "conditioning": 0}


def test_the_weight_of_a_linear_emulator_is_the_evidence():
    """For each single draw: DirectSolve, and Moment, with fewer numbers of noise than the state has components."""
    *_, evidence = kalman()
    dynamics = linear_dynamics()
    guidance = ndda.MMPS(DirectSolve())
    for x, log_weight, _ in of_several_seeds(10_000, lambda key: dynamics.weighted_draw(key, likelihood(), guidance)):
        np.testing.assert_allclose(log_weight, evidence, atol=2e-4)
        assert_posterior(x)
    moment, record = ndda.Moment()(dynamics, likelihood())
    np.testing.assert_allclose(moment, evidence, atol=1e-4)
    assert (int(record.passes.forward), int(record.passes.jvp), int(record.passes.vjp)) == (1, 3, 3)


def test_moments_are_those_of_the_gaussian_in_closed_form():
    ours = linear_dynamics().moments()
    square = jnp.zeros((D, D)).at[:, :K].set(FACTOR)
    theirs = GaussianDynamics(A @ jnp.ones(D), square).moments()
    v = jnp.arange(1.0, D + 1)
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-6)
    np.testing.assert_allclose(ours.covariance_product(v), theirs.covariance_product(v), rtol=1e-5)


def test_few_products_leave_the_evidence_unbiased():
    """One product sees one direction of three: the weights vary, and their mean is p(y) all the same."""
    mean, _, evidence = kalman()
    guidance = ndda.MMPS(KrylovSolve(products=1))
    x, log_weight, _ = draws(40_000, lambda k: linear_dynamics().weighted_draw(k, likelihood(), guidance))
    weight = np.exp(np.asarray(log_weight, float) - evidence)
    assert np.std(weight) > 0.1
    assert_mean(weight, 1.0)
    np.testing.assert_allclose(np.average(x, axis=0, weights=weight), mean, atol=0.08)


def bent(e, x):
    """Emulator that is not linear in its two numbers of noise."""
    return jnp.stack([x[0] + jnp.tanh(e[0]) + 0.3 * e[1] ** 2, e[1] + 0.2 * e[0] * e[1], jnp.exp(0.3 * e[0]), e[0]])


def by_quadrature(log_likelihood):
    """Log-evidence and posterior mean of x' for the bent emulator from a state of zeros, on a grid of the noise."""
    axis = jnp.linspace(-7.0, 7.0, 701)
    e = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    x = jax.vmap(lambda e: bent(e, jnp.zeros(4)))(e)
    logs = np.asarray(jax.vmap(log_likelihood)(x) - 0.5 * jnp.sum(e**2, 1) - jnp.log(2 * jnp.pi), float)
    density = np.exp(logs - logs.max())
    cell = float(axis[1] - axis[0]) ** 2
    return np.log(density.sum() * cell) + logs.max(), np.average(x, axis=0, weights=density)


@pytest.mark.parametrize(
    "solver", [DirectSolve(), *(pytest.param(KrylovSolve(products=k), marks=pytest.mark.slow) for k in (None, 1))]
)
@pytest.mark.parametrize("observed", [slice(0, 1), slice(0, 4)])  # fewer and more than numbers of noise
def test_weighted_draws_of_a_nonlinear_emulator_are_unbiased(solver, observed):
    prior = ndda.NoiseConditionedPrior(bent, noise_shape=2, layout=4)
    y = jnp.asarray([0.5, -1.0, 1.2, 0.4])[observed]
    near = likelihood(lambda x: x[observed], jnp.full(len(y), 0.6), y)
    dynamics = OnePassDynamics(prior, prior.condition(jnp.zeros(4)))
    x, log_weight, _ = draws(40_000, lambda k: dynamics.weighted_draw(k, near, ndda.MMPS(solver)))
    evidence, mean = by_quadrature(near.log_prob)
    weight = np.exp(np.asarray(log_weight, float) - evidence)
    assert_mean(weight, 1.0)
    assert_mean(weight[:, None] * (np.asarray(x) - mean), 0.0)


@pytest.mark.slow
def test_guided_draws_of_a_nonlinear_emulator_come_near_the_posterior():
    """Without weights they are not exact; two linearizations are closer than one."""
    prior = ndda.NoiseConditionedPrior(bent, noise_shape=2, layout=4)
    near = likelihood(lambda x: x, jnp.full(4, 0.6), jnp.asarray([0.5, -1.0, 1.2, 0.4]))
    _, mean = by_quadrature(near.log_prob)
    off = {}
    for iterations in (1, 3):
        dynamics = OnePassDynamics(prior, prior.condition(jnp.zeros(4)), iterations)
        x, _ = draws(20_000, lambda k, d=dynamics: d.conditional_draw(k, near, ndda.MMPS()))
        off[iterations] = float(np.max(np.abs(np.mean(x, 0) - mean)))
    assert off[3] < 0.08
    assert off[3] < off[1]


def program(transition, observe):
    """State-space model of the linear emulator, with a transition and an observed site of the caller's."""

    def model(y):
        x0 = numpyro.sample("x0", linear_prior().climatology())

        def step(x, y_t):
            x = numpyro.sample("x", transition(x))
            numpyro.sample("y", observe(x), obs=y_t)
            return x, None

        scan(step, x0, y)

    return model


def normal(x):
    return dist.Normal(x[::2], 0.5).to_event(1)


def kalman_filter(transition, noise, y, error):
    """Log-evidence, and the mean at each time, of x' = A x + N(0, Q) from N(0, I), with every second value observed."""
    h, mean, covariance, evidence, means = np.eye(D)[::2], np.zeros(D), np.eye(D), 0.0, []
    for y_t in y:
        mean, covariance = transition @ mean, transition @ covariance @ transition.T + noise
        s, off = h @ covariance @ h.T + error**2 * np.eye(len(h)), y_t - h @ mean
        evidence += -0.5 * off @ np.linalg.solve(s, off) - 0.5 * np.linalg.slogdet(2 * np.pi * s)[1]
        gain = covariance @ h.T @ np.linalg.inv(s)
        mean, covariance = mean + gain @ off, covariance - gain @ h @ covariance
        means.append(mean)
    return evidence, np.array(means)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GuidedPF", pytest.param("FAAPF", marks=pytest.mark.slow)])
def test_filters_of_a_one_pass_emulator_agree_with_kalman(kind):
    # A generator of its own: the result must not depend on the tests that ran before.
    bent = np.random.default_rng(5).normal(size=(D, D))
    prior = linear_prior(jnp.asarray(0.5 * np.eye(D) + 0.1 * bent, jnp.float32))
    factor = np.asarray(prior.parameters["F"], float)
    y = np.asarray(np.random.default_rng(1).normal(size=(4, 3)), np.float32)
    model = program(lambda x: ndda.OnePassTransition(prior, x, iterations=1), normal)
    algorithm = ndda.GuidedPF(model) if kind == "GuidedPF" else ndda.FAAPF(model, weight=ndda.Moment(), target_ess=0.0)
    run = ndda.Filter(algorithm, num_particles=2000, progress_bar=False)
    evidence, means = kalman_filter(np.asarray(A, float), factor @ factor.T, y, 0.5)
    found = []
    for seed in range(3):
        run.run(jax.random.key(seed), y)
        tree = run.to_datatree()
        assert abs(float(tree["sample_stats/log_evidence_increment"].sum()) - evidence) < 0.25
        found.append(tree["posterior/x"].mean("draw").values[0])
    # An ESS of 340 in the second step gives single means a standard error of 0.04, and their mean over seeds 0.025.
    np.testing.assert_allclose(np.mean(found, axis=0), means, atol=0.12)


@pytest.mark.slow
def test_counts_of_a_one_pass_emulator():
    """Observations that are not Gaussian: particles move, and stay finite; the record says how they were drawn."""
    prior = linear_prior()
    counts = program(
        lambda x: ndda.OnePassTransition(prior, x), lambda x: dist.Poisson(jnp.exp(0.5 * x[::2])).to_event(1)
    )
    y = np.asarray([[0, 2, 5], [1, 0, 3]], np.float32)
    run = ndda.Filter(ndda.FAAPF(counts, weight=ndda.Moment()), num_particles=500, progress_bar=False)
    run.run(jax.random.key(0), y)
    # A filter in closed form, of the same rank: the covariance gets a little noise, because it must be invertible.
    covariance = FACTOR @ FACTOR.T + 1e-4 * jnp.eye(D)
    closed = program(
        lambda x: dist.MultivariateNormal(A @ x, covariance), lambda x: dist.Poisson(jnp.exp(0.5 * x[::2])).to_event(1)
    )
    other = ndda.Filter(ndda.Bootstrap(closed), num_particles=20_000, progress_bar=False)
    other.run(jax.random.key(1), y)
    ours, theirs = (f.to_datatree()["posterior/x"].isel(time=-1) for f in (run, other))
    np.testing.assert_allclose(ours.mean("draw"), theirs.mean("draw"), atol=0.25)
    np.testing.assert_allclose(ours.std("draw"), theirs.std("draw"), atol=0.25)
    assert run.to_datatree().attrs["sampler"] == "one pass, linearized 2 times"
    assert run.to_datatree().attrs["prior"] == "NoiseConditionedPrior"


def test_what_a_one_pass_emulator_refuses():
    prior, x = linear_prior(), jnp.zeros(D)
    gaussian = ndda.GaussianPrior(0.5 * np.eye(D), np.eye(D))
    with pytest.raises(TypeError, match=r"has no denoiser; give it to ndda\.OnePassTransition"):
        ndda.DiffusionTransition(prior, x)
    with pytest.raises(TypeError, match=r"is a diffusion; give it to ndda\.DiffusionTransition"):
        ndda.OnePassTransition(gaussian, x)
    with pytest.raises(ValueError, match="iterations"):
        ndda.OnePassTransition(prior, x, iterations=0)
    with pytest.raises(NotImplementedError, match="has no density"):
        ndda.OnePassTransition(prior, x).log_prob(x)
    with pytest.raises(ValueError, match=r"expected \(4,\)"):
        prior.generate(jnp.zeros(5), prior.condition(x))
    with pytest.raises(TypeError, match="noise_shape=-1"):
        ndda.NoiseConditionedPrior(bent, noise_shape=-1, layout=4)
    with pytest.raises(TypeError, match=r"use ndda\.MMPS"):
        linear_dynamics().conditional_draw(jax.random.key(0), likelihood(), ndda.diffusion.DPS())
    wrong = ndda.NoiseConditionedPrior(lambda e, x: e, noise_shape=3, layout=4)
    with pytest.raises(ValueError, match=r"shape \(3,\) for a noise of shape \(3,\), expected the shape \(4,\)"):
        wrong.generate(jnp.zeros(3), wrong.condition(jnp.zeros(4)))


def test_a_one_pass_transition_is_a_numpyro_distribution():
    prior = linear_prior()
    states = jnp.stack([jnp.zeros(D), jnp.ones(D)])
    transition = ndda.OnePassTransition(prior, states)
    assert transition.batch_shape == (2,)
    np.testing.assert_allclose(transition.mean, states @ A.T, atol=1e-6)
    x = transition.sample(jax.random.key(0), (20_000,))
    assert x.shape == (20_000, 2, D)
    np.testing.assert_allclose(np.cov(np.asarray(x[:, 1]).T), FACTOR @ FACTOR.T, atol=0.2)
