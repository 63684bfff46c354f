"""Everything that approximates is exact in the linear-Gaussian case: guidance, moments, weights, filters, solves."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.linalg
import scipy.stats
from conftest import LinearGaussian
from monte_carlo import assert_mean, excess
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import PriorDenoiser, linear_solve
from numpyro_diffusion_da.program import gaussian_observations
from numpyro_diffusion_da.transition import GaussianDynamics, predictive

CASES = [(seed, singular) for seed in (0, 1) for singular in (False, True)]


@dataclasses.dataclass(frozen=True)
class Problem:
    """x' ~ N(A x + b, Q), y = H x' + N(0, R); noise covariance C of the diffusion, None for the identity."""

    a: np.ndarray
    b: np.ndarray
    q: np.ndarray
    c: np.ndarray | None
    h: np.ndarray
    r: np.ndarray
    x: np.ndarray
    y: np.ndarray

    @staticmethod
    def random(seed: int, singular: bool) -> Problem:
        """A problem of 3 to 8 dimensions; with a singular C, Q has the range of C."""
        rng = np.random.default_rng(seed)
        d = int(rng.integers(3, 9))
        m = int(rng.integers(2, d + 1))
        rank = d - 1 if singular else d
        root = rng.normal(size=(d, rank)) / np.sqrt(rank)
        inner = rng.normal(size=(rank, rank))
        inner = 0.5 * (inner @ inner.T / rank + 0.2 * np.eye(rank))
        q = root @ inner @ root.T if singular else inner
        c = root @ root.T if singular else None
        errors = 0.3 * rng.normal(size=(m, m))
        r = errors @ errors.T / m + 0.05 * np.eye(m)
        a, b, h, x = rng.normal(size=(d, d)), rng.normal(size=d), rng.normal(size=(m, d)), rng.normal(size=d)
        y = rng.multivariate_normal(h @ (a @ x + b), h @ q @ h.T + r)
        return Problem(a, b, q, c, h, r, x, y)

    @property
    def mean(self) -> np.ndarray:
        return self.a @ self.x + self.b

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of p(x' | x, y); a NaN in y is a missing row of H."""
        seen = ~np.isnan(self.y)
        h, r, y = self.h[seen], self.r[np.ix_(seen, seen)], self.y[seen]
        gain = np.linalg.solve(h @ self.q @ h.T + r, h @ self.q).T
        return self.mean + gain @ (y - h @ self.mean), self.q - gain @ h @ self.q

    def log_predictive(self) -> float:
        """log p(y | x)."""
        seen = ~np.isnan(self.y)
        h, r = self.h[seen], self.r[np.ix_(seen, seen)]
        return float(scipy.stats.multivariate_normal.logpdf(self.y[seen], h @ self.mean, h @ self.q @ h.T + r))

    def prior(self) -> ndda.GaussianPrior:
        return ndda.GaussianPrior(self.a, self.q, self.b, self.c)

    def likelihood(self) -> ndda.observation.GaussianLikelihood:
        h, y = jnp.asarray(self.h), jnp.asarray(self.y)
        factor = jnp.asarray(np.linalg.cholesky(self.r))
        return ndda.observation.GaussianLikelihood(
            lambda x: [ndda.observation.GaussianObservation(h @ x, factor, y, ~jnp.isnan(y))]
        )

    def reduced(self) -> Problem:
        """The same with the missing rows taken out."""
        seen = ~np.isnan(self.y)
        return dataclasses.replace(self, h=self.h[seen], r=self.r[np.ix_(seen, seen)], y=self.y[seen])


def wasserstein(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    """Between two Gaussians, over the square root of the second's trace."""
    values, vectors = np.linalg.eigh(covariance2)
    root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariance1 @ root)
    squared = np.sum((mean1 - mean2) ** 2) + np.trace(covariance1) + np.trace(covariance2)
    squared -= 2 * np.sum(np.sqrt(np.maximum(cross, 0.0)))
    return float(np.sqrt(max(squared, 0.0) / np.trace(covariance2)))


def assert_moments(draws: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Mean and every entry of the covariance are those of the draws."""
    # Variance that the truth does not have would be a miss, not noise: rounding is all that is allowed there.
    tiny = 1e-4 * np.sqrt(np.trace(covariance))
    assert_mean(draws, mean, tolerance=tiny)
    assert_mean((draws - mean)[:, :, None] * (draws - mean)[:, None, :], covariance, tolerance=tiny**2)


# --- the guided draw --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "singular"), CASES)
def test_guided_flow_is_the_exact_posterior(seed, singular):
    """A deterministic sampler is an affine map of its noise, so its law is known without Monte Carlo."""
    problem = Problem.random(seed, singular)
    d, highest = len(problem.x), 1e5  # what z_s still says about z at the highest level is of order 1 / highest
    sampler = ndda.Sampler(ndda.diffusion.AdamsBashforth(4), ndda.KarrasSchedule(600, 15.0, 1e-4, highest))
    with jax.enable_x64(True):
        prior = problem.prior()
        conditioning = prior.condition(problem.x)
        denoiser = ndda.MMPS(ndda.diffusion.DirectSolve())(PriorDenoiser(prior, conditioning), problem.likelihood())

        def flow(z):
            z, memory = sampler(jax.random.key(0), denoiser, prior.noise, prior.noise_range, z)
            return prior.location(conditioning) + prior.latent_scale * z, memory.solver_residual

        factor = np.asarray(prior.noise.factor) if singular else np.eye(d)
        rank = factor.shape[1]
        white = np.concatenate([np.zeros((1, rank)), np.eye(rank), np.random.default_rng(seed).normal(size=(2, rank))])
        x, residual = jax.device_get(jax.jit(jax.vmap(flow))(jnp.asarray(highest * white @ factor.T)))
    center, columns = x[0], (x[1 : 1 + rank] - x[0]).T
    np.testing.assert_allclose(x, center + white @ columns.T, atol=1e-9)
    assert residual.max() < 1e-10
    assert wasserstein(center, columns @ columns.T, *problem.posterior()) < 2e-4


@pytest.mark.parametrize(
    ("seed", "singular", "solver"),
    [
        pytest.param(1, False, ndda.diffusion.KrylovSolve(), marks=pytest.mark.slow),
        (2, True, ndda.diffusion.DirectSolve()),
    ],
)
def test_default_sampler(seed, singular, solver):
    """16 levels, with exact solves or two products: a law within a tenth of the posterior's spread of the posterior."""
    problem = Problem.random(seed, singular)
    conditioned = ndda.DiffusionTransition(problem.prior(), problem.x).conditioned(
        problem.likelihood(), ndda.MMPS(solver)
    )
    draws = np.asarray(jax.jit(lambda key: conditioned.sample(key, (4000,)))(jax.random.key(seed)), np.float64)
    mean, covariance = draws.mean(0), np.cov(draws.T)
    assert wasserstein(mean, covariance, *problem.posterior()) < 0.1
    assert wasserstein(mean, covariance, problem.mean, problem.q) > 0.5  # it did move


def test_conditioned_transition_has_the_posterior_moments():
    problem = Problem.random(3, True)
    sampler = ndda.Sampler(ndda.diffusion.AdamsBashforth(3), ndda.KarrasSchedule(40, 7.0, 2e-3))
    transition = ndda.DiffusionTransition(problem.prior(), problem.x, sampler=sampler)
    conditioned = transition.conditioned(problem.likelihood(), ndda.MMPS(ndda.diffusion.DirectSolve()))
    draws, (record,) = jax.jit(lambda key: conditioned.sample_with_intermediates(key, (4000,)))(jax.random.key(0))
    assert_moments(np.asarray(draws, np.float64), *problem.posterior())
    assert np.all(record.passes.forward == 40)
    assert np.all(record.passes.vjp == 40 * len(problem.y))
    assert np.all(record.passes.jvp == 0)
    assert np.all(record.solver_residual < 1e-3)


@pytest.mark.parametrize("correlated", [pytest.param(False, marks=pytest.mark.slow), True])
def test_missing_observations_are_rows_that_are_not_there(correlated):
    problem = Problem.random(0, False)
    y = np.where(np.arange(len(problem.y)) % 2 == 0, np.nan, problem.y)
    r = problem.r if correlated else np.diag(np.diag(problem.r))
    problem = dataclasses.replace(problem, y=y, r=r)
    step = ndda.DiffusionTransition(problem.prior(), problem.x).dynamics()
    results = []
    for of in (problem, problem.reduced()):
        h, error, value = (jnp.asarray(v, jnp.float32) for v in (of.h, np.linalg.cholesky(of.r), of.y))

        def observe(x, h=h, error=error, value=value):
            site = dist.MultivariateNormal(h @ x, scale_tril=error)
            if not correlated:
                site = dist.Normal(h @ x, jnp.diagonal(error)).to_event(1)
            return gaussian_observations("y", site, value)

        def answers(levels, likelihood=ndda.observation.GaussianLikelihood(observe)):
            weight, _ = ndda.Moment()(step, likelihood)
            guided = ndda.MMPS()(PriorDenoiser(step.prior, step.conditioning), likelihood)
            # From level to level a draw hands on what the solver keeps.
            _, denoised = jax.lax.scan(
                lambda memory, level: guided(jnp.ones(len(problem.x)), level, memory)[::-1], guided.init(), levels
            )
            return weight, denoised

        results.append(jax.jit(answers)(jnp.array([20.0, 2.0, 0.5, 0.1])))
    for with_gaps, without in zip(*results, strict=True):
        np.testing.assert_allclose(with_gaps, without, rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(results[0][0], problem.log_predictive(), rtol=2e-3)


def test_no_observation_leaves_the_forecast():
    problem = Problem.random(0, False)
    problem = dataclasses.replace(problem, y=np.full_like(problem.y, np.nan))
    step, likelihood = ndda.DiffusionTransition(problem.prior(), problem.x).dynamics(), problem.likelihood()

    @jax.jit
    def everything(key):
        guided, _ = step.conditional_draw(key, likelihood, ndda.MMPS())
        weights = [weight(step, likelihood)[0] for weight in (ndda.Dirac(), ndda.Moment(), ndda.Equal())]
        return guided, step.draw(key)[0], weights

    guided, free, weights = everything(jax.random.key(0))
    np.testing.assert_allclose(guided, free, rtol=1e-5)
    assert weights == [0.0, 0.0, 0.0]


# --- moments and weights ----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def covariance_matrix(step, size, level=None):
    return jax.vmap(step.moments(level).covariance_product)(jnp.eye(size))


@pytest.mark.parametrize(("seed", "singular"), CASES)
def test_moments_at_the_largest_level(seed, singular):
    problem = Problem.random(seed, singular)
    transition = ndda.DiffusionTransition(problem.prior(), problem.x)
    step = transition.dynamics()
    np.testing.assert_allclose(transition.mean, problem.mean, rtol=1e-5, atol=1e-5)
    # Relative to C, a latent variance p is read as p s^2 / (p + s^2): too small by p / s^2 at most.
    c = np.eye(len(problem.x)) if problem.c is None else problem.c
    scale = float(transition.prior.latent_scale)
    largest = np.linalg.norm(np.linalg.pinv(c) @ problem.q, 2) / scale**2
    for level in (None, 20.0):
        covariance = covariance_matrix(step, len(problem.x), level)
        bound = largest / (level or 80.0) ** 2 + 1e-5
        assert np.linalg.norm(covariance - problem.q, 2) < bound * np.linalg.norm(problem.q, 2)


def test_mean_of_a_batch():
    problem = Problem.random(0, False)
    states = np.random.default_rng(0).normal(size=(3, 2, len(problem.x)))
    mean = ndda.DiffusionTransition(problem.prior(), states).mean
    np.testing.assert_allclose(mean, states @ problem.a.T + problem.b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("seed", "singular"), CASES)
def test_weights(seed, singular):
    problem = Problem.random(seed, singular)
    step, likelihood = ndda.DiffusionTransition(problem.prior(), problem.x).dynamics(), problem.likelihood()
    (moment, record), (dirac, dirac_record) = jax.jit(
        lambda step: (ndda.Moment()(step, likelihood), ndda.Dirac()(step, likelihood))
    )(step)
    np.testing.assert_allclose(moment, problem.log_predictive(), rtol=2e-3)
    assert (int(record.passes.forward), int(record.passes.vjp)) == (1, len(problem.y))
    expected = scipy.stats.multivariate_normal.logpdf(problem.y, problem.h @ problem.mean, problem.r)
    np.testing.assert_allclose(dirac, expected, rtol=1e-4)
    assert (int(dirac_record.passes.forward), int(dirac_record.passes.vjp)) == (1, 0)
    np.testing.assert_allclose(dirac_record.forecast, problem.mean, rtol=1e-5, atol=1e-5)


# --- closed-form transitions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [False, True])
def test_gaussian_step_is_exact(diagonal):
    problem = Problem.random(1, False)
    if diagonal:
        problem = dataclasses.replace(problem, q=np.diag(np.diag(problem.q)))
        factor = np.sqrt(np.diag(problem.q))
    else:
        factor = np.linalg.cholesky(problem.q)
    step, likelihood = GaussianDynamics(jnp.asarray(problem.mean), jnp.asarray(factor)), problem.likelihood()
    (draws, record), (free, _) = jax.jit(
        jax.vmap(lambda key: (step.conditional_draw(key, likelihood, ndda.MMPS()), step.draw(key)))
    )(jax.random.split(jax.random.key(0), 20_000))
    assert_moments(np.asarray(draws, np.float64), *problem.posterior())
    assert int(record.passes.total().max()) == 0
    assert_moments(np.asarray(free, np.float64), problem.mean, problem.q)
    np.testing.assert_allclose(covariance_matrix(step, len(problem.x)), problem.q, rtol=1e-5, atol=1e-6)
    weight, residual, whitened = jax.jit(
        lambda step: (
            ndda.Moment()(step, likelihood)[0],
            *predictive.observed_covariance(step.moments(), likelihood)[:2],
        )
    )(step)
    np.testing.assert_allclose(weight, problem.log_predictive(), rtol=1e-4)
    root = np.linalg.inv(np.linalg.cholesky(problem.r))
    expected = np.eye(len(problem.y)) + root @ problem.h @ problem.q @ problem.h.T @ root.T
    np.testing.assert_allclose(whitened, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(residual, root @ (problem.y - problem.h @ problem.mean), rtol=1e-4, atol=1e-4)


def test_gaussian_step_with_gaps():
    problem = Problem.random(4, False)
    problem = dataclasses.replace(problem, y=np.where(np.arange(len(problem.y)) == 0, np.nan, problem.y))
    step = GaussianDynamics(jnp.asarray(problem.mean), jnp.asarray(np.linalg.cholesky(problem.q)))
    keys = jax.random.split(jax.random.key(0), 20_000)
    likelihood = problem.likelihood()
    draws, _ = jax.jit(jax.vmap(lambda key: step.conditional_draw(key, likelihood, ndda.MMPS())))(keys)
    assert_moments(np.asarray(draws, np.float64), *problem.posterior())


# --- filters ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a filter gives with infinitely many particles: means (time, d), covariances (time, d, d), log evidence."""

    mean: np.ndarray
    covariance: np.ndarray
    log_evidence: float

    @staticmethod
    def kalman(model: LinearGaussian, y: np.ndarray) -> Limit:
        """The Kalman filter: of any filter that is exact."""
        a, q = model.transition, model.covariance
        h = np.eye(len(a))[::2]
        mean, covariance = np.zeros(len(a)), scipy.linalg.solve_discrete_lyapunov(a, q)
        means, covariances, log_evidence = [], [], 0.0
        for y_t in y:
            mean, covariance = a @ mean, a @ covariance @ a.T + q
            s = h @ covariance @ h.T + model.error**2 * np.eye(len(h))
            log_evidence += scipy.stats.multivariate_normal.logpdf(y_t, h @ mean, s)
            gain = np.linalg.solve(s, h @ covariance).T
            mean, covariance = mean + gain @ (y_t - h @ mean), covariance - gain @ h @ covariance
            means.append(mean)
            covariances.append(covariance)
        return Limit(np.array(means), np.array(covariances), float(log_evidence))

    @staticmethod
    def dirac(model: LinearGaussian, y: np.ndarray) -> Limit:
        """FA-APF with Dirac weights: ancestors weighed as if the transition had no spread, then the exact draw."""
        a, q = model.transition, model.covariance
        h = np.eye(len(a))[::2]
        r = model.error**2 * np.eye(len(h))
        gain = np.linalg.solve(h @ q @ h.T + r, h @ q).T
        kept = np.eye(len(a)) - gain @ h
        mean, covariance = np.zeros(len(a)), scipy.linalg.solve_discrete_lyapunov(a, q)
        means, covariances, log_evidence = [], [], 0.0
        for y_t in y:
            seen = h @ a
            s = seen @ covariance @ seen.T + r
            log_evidence += scipy.stats.multivariate_normal.logpdf(y_t, seen @ mean, s)
            weigh = np.linalg.solve(s, seen @ covariance).T
            mean, covariance = mean + weigh @ (y_t - seen @ mean), covariance - weigh @ seen @ covariance
            mean, covariance = kept @ a @ mean + gain @ y_t, kept @ (a @ covariance @ a.T @ kept.T + q)
            means.append(mean)
            covariances.append(covariance)
        return Limit(np.array(means), np.array(covariances), float(log_evidence))

    @property
    def variance(self) -> np.ndarray:
        """Diagonals of the covariances."""
        return np.diagonal(self.covariance, axis1=1, axis2=2)


def closed_form_program(model: LinearGaussian):
    """The program with a plain MultivariateNormal as its transition; A is an argument: seeds share a compile."""
    factor = jnp.asarray(np.linalg.cholesky(model.covariance))

    def program(y, a, initial_factor):
        x0 = numpyro.sample("x0", dist.MultivariateNormal(jnp.zeros(len(factor)), scale_tril=initial_factor))

        def step(x, y_t):
            x = numpyro.sample("x", dist.MultivariateNormal(a @ x, scale_tril=factor))
            numpyro.sample("y", dist.Normal(x[::2], model.error).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    return program


PARTICLES = 512


@functools.cache
def closed_form_filter(name: str) -> ndda.Filter:
    """One compiled filter, used for every seed."""
    program = closed_form_program(LinearGaussian.make(0, 4))
    algorithm = {
        "moment": ndda.FAAPF(program, target_ess=0.0),
        "dirac": ndda.FAAPF(program, weight=ndda.Dirac(), target_ess=0.0),
        "moment, tempered": ndda.FAAPF(program, target_ess=0.5),
    }[name]
    return ndda.Filter(algorithm, num_particles=PARTICLES, num_chains=24, progress_bar=False)


def run_closed_form(name: str, seed: int, steps: int = 12) -> tuple[LinearGaussian, np.ndarray, ndda.FilterResult]:
    """(model, observations, result of 24 independent filters)."""
    model = LinearGaussian.make(seed, 4)
    _, y = model.simulate(100 + seed, steps)
    initial = np.linalg.cholesky(scipy.linalg.solve_discrete_lyapunov(model.transition, model.covariance))
    particle_filter = closed_form_filter(name)
    particle_filter.run(jax.random.key(seed), *map(jnp.asarray, (y, model.transition, initial)))
    return model, y, particle_filter.result


def assert_limit(result: ndda.FilterResult, limit: Limit, noticed_in_evidence: float | None = None) -> None:
    """Mean over independent filters of mean, variance, and exp(log-evidence), which is unbiased as no logarithm is."""
    x = result.posterior["x"].astype(np.float64)  # (chain, draw, time, d)
    spread = np.sqrt(limit.variance)
    assert_mean(x.mean(1) / spread, limit.mean / spread, noticed=0.3)
    assert_mean(x.var(1, ddof=1) / limit.variance, 1.0, noticed=0.3)
    log_evidence = result.sample_stats["log_evidence_increment"].sum(1, dtype=np.float64)
    assert_mean(np.exp(log_evidence - limit.log_evidence), 1.0, noticed=noticed_in_evidence)


@pytest.mark.slow  # the filter through a diffusion below is fast, and so are the kernels of test_smc.py
@pytest.mark.parametrize("seed", [0, 1])
def test_moment_weights_give_the_kalman_filter(seed):
    model, y, result = run_closed_form("moment", seed)
    exact = Limit.kalman(model, y)
    assert_limit(result, exact, noticed_in_evidence=0.6)
    assert np.all(result.sample_stats["tempering"] == 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_dirac_weights_have_their_own_limit(seed):
    """Their bias is known in closed form: the filter must show it, and no more."""
    model, y, result = run_closed_form("dirac", seed)
    limit, exact = Limit.dirac(model, y), Limit.kalman(model, y)
    assert_limit(result, limit)
    assert excess(result.posterior["x"].mean(1), exact.mean) > 1.5


@pytest.mark.slow
def test_tempering_is_sensible():
    """It widens, and hardly moves the mean."""
    model, y, tempered = run_closed_form("moment, tempered", 0)
    _, _, plain = run_closed_form("moment", 0)
    exact = Limit.kalman(model, y)
    alpha, ess = tempered.sample_stats["tempering"], tempered.sample_stats["ess"]
    assert np.all((alpha > 0) & (alpha <= 1))
    np.testing.assert_array_equal(alpha == 1.0, ess >= 0.5 * PARTICLES)
    assert 0.0 < np.mean(alpha < 1.0) < 1.0

    def ratio(result):
        return np.mean(result.posterior["x"].var(1, ddof=1) / exact.variance, axis=(1, 2))

    def error(result):
        return np.sqrt(np.mean((result.posterior["x"].mean(1) - exact.mean) ** 2 / exact.variance, axis=(1, 2)))

    difference = ratio(tempered) - ratio(plain)
    assert difference.mean() > 3 * difference.std(ddof=1) / np.sqrt(len(difference))
    assert ratio(tempered).mean() < 2.0
    assert error(tempered).mean() < 1.0


def test_diffusion_filter_is_the_kalman_filter():
    """The whole way: denoiser, guidance, sampler, weights, filter."""
    model = LinearGaussian.make(0, 4)
    _, y = model.simulate(100, 6)
    sampler = ndda.Sampler(ndda.diffusion.AdamsBashforth(3), ndda.KarrasSchedule(48, 7.0, 2e-3))
    guidance = ndda.MMPS(ndda.diffusion.DirectSolve())
    algorithm = ndda.FAAPF(model.diffusion_program(), ndda.Moment(), 0.0, guidance, sampler)
    particle_filter = ndda.Filter(algorithm, num_particles=128, num_chains=40, progress_bar=False)
    particle_filter.run(jax.random.key(0), jnp.asarray(y))
    result, exact = particle_filter.result, Limit.kalman(model, y)
    assert_limit(result, exact)
    passes = {name: set(np.unique(v)) for name, v in result.network_passes.items()}
    few = 16 / 128  # of 128 particles, at which the background takes one pass of each kind
    # Weight and draw, two observations.
    assert passes == {"forward": {1 + 48 + few}, "jvp": {0}, "vjp": {2 + 2 * 48 + few}, "conditioning": {0}}


# --- linear solves ----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, b, g, rhs, warm_start=None):
    """Solve (I + B) v = rhs, with the linear g."""
    start = solver.init(len(rhs), rhs.dtype) if warm_start is None else warm_start
    return solver(lambda v: (v + b @ v, g @ v), rhs, start)


def spread_matrix(m: int, seed: int, largest: float = 100.0) -> np.ndarray:
    """A positive definite matrix with eigenvalues from 0.1 up."""
    vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(m, m)))[0]
    return vectors * np.geomspace(0.1, largest, m) @ vectors.T


def relative_residual(b: np.ndarray, rhs: np.ndarray, answer: np.ndarray) -> float:
    """As defined, in double precision."""
    return float(np.linalg.norm(rhs - answer - b @ answer) / np.linalg.norm(rhs))


M = 10
"""Unknowns of the systems below."""
G, RHS = np.random.default_rng(0).normal(size=(3, M)), np.random.default_rng(1).normal(size=M)


@pytest.mark.slow
def test_krylov_is_conjugate_gradients():
    b = spread_matrix(M, 0)
    with jax.enable_x64(True):
        for k in (1, 2, 3, M):
            solution, _ = solve(ndda.diffusion.KrylovSolve(k, warm_start=False), b, G, RHS)
            expected, _ = jax.scipy.sparse.linalg.cg(lambda v: v + b @ v, jnp.asarray(RHS), tol=0.0, maxiter=k)
            np.testing.assert_allclose(solution.answer, expected, atol=1e-6)  # its own loss of orthogonality
            np.testing.assert_allclose(solution.image, G @ np.asarray(solution.answer), atol=1e-10)
            np.testing.assert_allclose(solution.residual, relative_residual(b, RHS, solution.answer), atol=1e-10)
            assert solution.products == k
        direct, _ = solve(ndda.diffusion.DirectSolve(), b, G, RHS)
        np.testing.assert_allclose(direct.answer, np.linalg.solve(np.eye(M) + b, RHS), rtol=1e-9)
        np.testing.assert_allclose(direct.image, G @ np.asarray(direct.answer), atol=1e-10)
        assert direct.residual < 1e-10
        assert direct.products == M


def test_warm_start():
    b = spread_matrix(M, 1)
    exact, close = (np.linalg.solve(np.eye(M) + factor * b, RHS) for factor in (1.0, 1.2))
    with jax.enable_x64(True):
        cold, warm_start = solve(ndda.diffusion.KrylovSolve(2), b, G, RHS)
        np.testing.assert_array_equal(warm_start, cold.answer)
        assert cold.residual > 0.1
        assert solve(ndda.diffusion.KrylovSolve(2), b, G, RHS, exact)[0].residual < 1e-10
        # From the answer of a system close by, one more direction is worth more than two from nothing.
        assert solve(ndda.diffusion.KrylovSolve(2), b, G, RHS, close)[0].residual < 0.5 * cold.residual
        # A single product leaves no room for the old answer: the residual is the direction.
        single, _ = solve(ndda.diffusion.KrylovSolve(1), b, G, RHS, exact)
        without, _ = solve(ndda.diffusion.KrylovSolve(1, warm_start=False), b, G, RHS)
        np.testing.assert_array_equal(single.answer, without.answer)


@pytest.mark.parametrize("kind", ["indefinite", "nonsymmetric", "nearly singular"])
@pytest.mark.parametrize(
    "solver", [ndda.diffusion.KrylovSolve(3), ndda.diffusion.KrylovSolve(M), ndda.diffusion.DirectSolve()], ids=repr
)
def test_unruly_systems_stay_bounded_and_say_so(kind, solver):
    for seed in range(3):
        a = np.random.default_rng(seed).normal(size=(M, M))
        b = {
            "indefinite": 5.0 * (a + a.T),
            "nonsymmetric": spread_matrix(M, seed, 10.0) + 20.0 * (a - a.T),
            "nearly singular": -np.eye(M) + 1e-6 * (a + a.T),
        }[kind]
        solution, _ = solve(solver, *(jnp.asarray(v, jnp.float32) for v in (b, G, RHS)))
        answer = np.asarray(solution.answer, np.float64)
        # As if B were zero at most: the bound that keeps a guided draw from blowing up.
        assert np.linalg.norm(answer) <= np.linalg.norm(RHS) * (1 + 1e-4)
        residual = relative_residual(b, RHS, answer)
        assert residual > 0.1  # the inflation is not hidden
        np.testing.assert_allclose(solution.residual, residual, rtol=1e-3)
        np.testing.assert_allclose(solution.image, G @ answer, atol=1e-4)


@pytest.mark.parametrize(
    "solver", [ndda.diffusion.KrylovSolve(3), ndda.diffusion.KrylovSolve(50), ndda.diffusion.DirectSolve()], ids=repr
)
def test_solves_at_the_edges(solver):
    g, rhs = jnp.asarray(G, jnp.float32), jnp.asarray(RHS, jnp.float32)
    zero = jnp.zeros((M, M))
    solution, _ = solve(solver, zero, g, rhs)  # converged at the first product: what follows changes nothing
    np.testing.assert_allclose(solution.answer, rhs, rtol=1e-6)
    nothing, _ = solve(solver, zero, g, jnp.zeros(M))
    np.testing.assert_array_equal(nothing.answer, 0.0)
    assert nothing.residual == 0.0


def test_projected_solve_does_not_believe_eigenvalues_below_one():
    found = linear_solve.projected_solve(jnp.diag(jnp.array([-3.0, 0.5, 1.0, 4.0])), jnp.ones(4))
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 0.25])


@pytest.mark.parametrize("solver", [linear_solve.DirectSolve(), ndda.diffusion.KrylovSolve()])
def test_no_answer_is_worse_than_none(solver):
    """For products with any matrix; the image is that of the answer."""
    rng = np.random.default_rng(0)
    for scale in 10.0 ** np.arange(-1, 5):
        matrix, images = (jnp.asarray(scale * rng.normal(size=(M, M)), jnp.float32) for _ in range(2))
        rhs = jnp.asarray(rng.normal(size=M), jnp.float32)
        product = lambda v, matrix=matrix, images=images: (v + matrix @ v, images @ v)  # noqa: E731
        solution, _ = solver(product, rhs, solver.init(M, rhs.dtype))
        assert solution.residual <= 1.0 + 1e-5
        np.testing.assert_allclose(solution.image, images @ solution.answer, rtol=1e-3, atol=1e-3)
        left = np.linalg.norm(rhs - product(solution.answer)[0]) / np.linalg.norm(rhs)
        assert left <= 1.0 + 1e-3


@pytest.mark.parametrize("size", [1, 2])  # solved in closed form
def test_small_projected_solves_are_those_of_the_eigenvectors(size):
    rng = np.random.default_rng(size)
    projected = rng.normal(size=(200, size, size)) * 10 ** rng.uniform(-2, 2, (200, 1, 1))
    projected[0], projected[1] = 0.0, 3.0 * np.eye(size)
    rhs = rng.normal(size=(200, size))
    values, vectors = np.linalg.eigh(0.5 * (projected + projected.swapaxes(1, 2)))
    inverse = np.where(values >= 1.0, 1.0 / np.maximum(values, 1.0), np.clip(values, 0.0, 1.0))
    expected = np.einsum("nij,nj,nkj,nk->ni", vectors, inverse, vectors, rhs)
    found = jax.vmap(linear_solve.projected_solve)(jnp.asarray(projected), jnp.asarray(rhs))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_krylov_needs_a_product():
    with pytest.raises(ValueError, match="products=0; give 1 or more"):
        ndda.diffusion.KrylovSolve(0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"transition": "A"}, r"GaussianPrior got transition='A'; expected .*write transition=0.9 \* np.eye\(3\)"),
        ({"covariance": [[1.0], [0.0, 1.0]]}, "GaussianPrior got covariance=.*; expected a ndarray"),
        ({"offset": ndda.Layout((2,), ("site",))}, r"GaussianPrior got offset=Layout.*write offset=np.zeros\(3\)"),
        ({"noise_covariance": ndda.diffusion.WhiteNoise()}, r"noise_covariance=WhiteNoise\(\); expected a ndarray"),
        ({"noise_range": 80.0}, r"noise_range=80.0; expected a tuple: write noise_range=\(0.02, 80.0\)"),
        ({"noise_range": (0.02,)}, r"noise_range=\(0.02,\); give two levels"),
        ({"noise_range": (80.0, 0.02)}, "give two levels, 0 < lowest < highest"),
        ({"noise_range": (0.02, np.inf)}, "give two levels"),
        ({"noise_range": (np.nan, 80.0)}, "give two levels"),
        ({"noise_range": ("a", "b")}, "give two levels"),
        *[({name: 1j * np.eye(2)}, f"{name} with complex numbers") for name in ("transition", "covariance")],
        ({"offset": np.zeros(2) + 1j}, "offset with complex numbers"),
        ({"noise_covariance": np.eye(2) + 0j}, "noise_covariance with complex numbers"),
        *[
            ({name: np.diag([bad, 1.0])}, f"{name} with non-finite values, . of 4")
            for name in ("transition", "covariance", "noise_covariance")
            for bad in (np.nan, np.inf)
        ],
        ({"offset": [np.nan, 0.0]}, "offset with non-finite values, 1 of 2"),
        ({"offset": [None, 0.0]}, r"offset=\[None, 0.0\]; expected a ndarray of numbers"),
        ({"transition": np.zeros((0, 0)), "covariance": np.zeros((0, 0))}, r"transition has shape \(0, 0\)"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(change, match):
    with pytest.raises((TypeError, ValueError), match=match):
        ndda.GaussianPrior(**({"transition": np.eye(2), "covariance": np.eye(2)} | change))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ndda.diffusion.FactorNoise(jnp.full((2, 2), jnp.nan)), "factor with non-finite values"),
        (lambda: ndda.diffusion.FactorNoise(jnp.eye(2) + 0j), "factor with complex numbers"),
        (lambda: ndda.diffusion.FactorNoise(jnp.ones(2)), r"factor of shape \(2,\)"),
        (lambda: ndda.diffusion.FactorNoise("L"), "factor='L'"),
        (lambda: ndda.diffusion.SphericalNoise(3.0, 4), "num_latitudes=3.0"),
        (lambda: denoiser_prior(scale=jnp.nan), "scale with non-finite values"),
        (lambda: denoiser_prior(scale=-1.0), "negative scale"),
        (lambda: denoiser_prior(location=[jnp.inf, 0.0]), "location with non-finite values"),
        (lambda: denoiser_prior(location=1j), "location with complex numbers"),
        (lambda: denoiser_prior(noise_range=(np.nan, 80.0)), "noise_range with non-finite values"),
        (lambda: denoiser_prior(noise_range=("a", "b")), "noise_range="),
        (lambda: denoiser_prior(parameters={"w": jnp.array([0.0, jnp.nan])}), r"parameters with NaN in '\['w'\]'"),
        (lambda: denoiser_prior(conditioning_passes=0.5), "conditioning_passes=0.5"),
    ],
)
def test_numbers_that_a_prior_cannot_have_are_refused(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


def denoiser_prior(**changes):
    return ndda.DenoiserPrior(lambda *args: args[-3], layout=(2,), **({"noise_range": (0.02, 80.0)} | changes))
