"""A program in cuthbert's filters, a diffusion transition in dynestyx's: against exact answers and against ours."""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings

import cuthbert
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cuthbert.gaussian import kalman
from cuthbert.smc import particle_filter
from cuthbertlib.resampling import systematic
from monte_carlo import assert_mean
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda


@pytest.fixture(autouse=True)
def their_rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


def exact_filter(program):
    exact = ndda.program.LinearGaussian(program)
    filter = kalman.build_filter(exact.initial_mean, exact.initial_factor, exact.dynamics, exact.observation)
    return jax.jit(lambda: cuthbert.filter(filter, exact.model_inputs, filter.init_prepare()))()


def numpy_kalman(small, y):
    """Means and variances (time, d), log-evidence, from the stationary distribution; NaN is missing."""
    a, q, h = small.transition, small.covariance, np.eye(len(small.transition))[::2]
    m = np.zeros(len(a))
    p = np.linalg.solve(np.eye(len(a) ** 2) - np.kron(a, a), q.ravel()).reshape(a.shape)
    means, variances, log_evidence = [], [], 0.0
    for y_t in y:
        m, p = a @ m, a @ p @ a.T + q
        seen = ~np.isnan(y_t)
        innovation = (y_t - h @ m)[seen]
        s = h[seen] @ p @ h[seen].T + small.error**2 * np.eye(seen.sum())
        gain = p @ h[seen].T @ np.linalg.inv(s)
        log_evidence -= 0.5 * innovation @ np.linalg.solve(s, innovation)
        log_evidence -= 0.5 * np.linalg.slogdet(2 * np.pi * s)[1]
        m, p = m + gain @ innovation, p - gain @ h[seen] @ p
        means.append(m)
        variances.append(np.diagonal(p))
    return np.array(means), np.array(variances), log_evidence


@pytest.mark.slow
def test_kalman_filter_of_a_diffusion_program(small):
    y = small.simulate(1, 6)[1].astype(np.float32)
    y[1, 0] = y[4] = np.nan
    states = exact_filter(ndda.program.StateSpaceModel(small.diffusion_program(), (y,)))
    means, variances, log_evidence = numpy_kalman(small, y)
    # The covariance is read off a noise level of 80: too small by at most .001 of itself.
    np.testing.assert_allclose(states.mean[1:], means, atol=2e-3)
    np.testing.assert_allclose(np.sum(states.chol_cov[1:] ** 2, -1), variances, rtol=2e-3)
    assert abs(states.log_normalizing_constant[-1] - log_evidence) < 5e-3


A = np.array([[0.9, 0.2], [-0.1, 0.8]], np.float32)
R = np.array([[0.5, 0.1], [0.1, 0.3]], np.float32)


def tracked(y, forcing):
    """What a linear-Gaussian program may contain: two sites before the scan, forcing, two kinds of observation."""
    center = numpyro.sample("center", dist.Normal(1.0, 0.5))
    offset = numpyro.sample("offset", dist.Normal(jnp.zeros(2), 2.0).to_event(1))

    def step(x, at):
        u, y_t = at
        x = numpyro.sample("x", dist.Normal(jnp.asarray(A) @ x + u, jnp.array([0.1, 0.2])).to_event(1))
        numpyro.sample("both", dist.MultivariateNormal(2 * x + 1, jnp.asarray(R)), obs=y_t["both"])
        numpyro.sample("sum", dist.Normal(x.sum(), 0.7), obs=y_t["sum"])
        return x, None

    scan(step, jnp.stack([center, center]) + offset, (forcing, y))


def test_matrices_of_a_program():
    y = {"both": jnp.array([[1.0, jnp.nan], [2.0, 3.0]]), "sum": jnp.array([4.0, jnp.nan])}
    forcing = jnp.array([[0.0, 0.0], [5.0, 6.0]])
    exact = ndda.program.LinearGaussian(ndda.program.StateSpaceModel(tracked, (y, forcing)))
    np.testing.assert_allclose(exact.initial_mean, [1, 1])
    np.testing.assert_allclose(exact.initial_factor @ exact.initial_factor.T, [[4.25, 0.25], [0.25, 4.25]], rtol=1e-6)
    second = jax.tree.map(lambda v: v[1], exact.model_inputs)
    (matrix, shift, factor), observation = jax.jit(lambda at: (exact.dynamics(at), exact.observation(at)))(second)
    np.testing.assert_allclose(matrix, A)
    np.testing.assert_allclose(shift, [5, 6])
    np.testing.assert_allclose(factor, np.diag([0.1, 0.2]))
    operator, shift, factor, value = observation
    np.testing.assert_allclose(operator, [[2, 0], [0, 2], [1, 1]])
    np.testing.assert_allclose(shift, [1, 1, 0])
    np.testing.assert_allclose(factor @ factor.T, [[0.5, 0.1, 0], [0.1, 0.3, 0], [0, 0, 0.49]], rtol=1e-6)
    np.testing.assert_array_equal(value, [2, 3, np.nan])


def program_with(transition=None, mean=None, start=None, carried=None):
    """x' = x + noise, y = x + noise, with one part replaced by a function."""

    def model(y):
        first = dist.Normal(jnp.zeros(2), 1.0).to_event(1) if start is None else start
        x0 = numpyro.sample("x0", first)

        def step(x, y_t):
            before = jnp.reshape(x["frame"] if isinstance(x, dict) else x, (2,))
            default = dist.Normal(before, 0.5).to_event(1)
            x = numpyro.sample("x", default if transition is None else transition(before))
            numpyro.sample("y", dist.Normal(x if mean is None else mean(x, before), 0.3).to_event(1), obs=y_t)
            return (x if carried is None else carried(x)), None

        scan(step, x0 if carried is None else carried(x0), y)

    return ndda.program.StateSpaceModel(model, (jnp.zeros((2, 2)),))


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({"transition": lambda x: dist.Normal(jnp.tanh(x), 0.5).to_event(1)}, "the mean of site 'x' is not that of a"),
        ({"transition": lambda x: dist.Normal(x, jnp.exp(x)).to_event(1)}, "the covariance of site 'x'"),
        ({"mean": lambda x, before: x - before}, "the mean of the observed sites"),
        ({"carried": lambda x: 2 * x}, "the next carry of the scan, which must be the value of site 'x'"),
        ({"carried": lambda x: {"frame": x}}, "carries PyTreeDef"),
        ({"start": dist.LogNormal(jnp.zeros(2), 1.0).to_event(1)}, "site 'x0' has the distribution Independent"),
    ],
)
def test_what_is_not_linear_and_gaussian_is_refused(part, sentence):
    with pytest.raises(ValueError, match=sentence):
        ndda.program.LinearGaussian(program_with(**part))


def evidence_and_means(parts, key, n, runs):
    """Of cuthbert's particle filter: log-evidence, shape (run,), and weighted means, shape (run, time, d)."""
    functions = (parts.init_sample, parts.propagate_sample, parts.log_potential)
    filter = particle_filter.build_filter(*functions, n, systematic.resampling)

    @jax.jit
    def run(key):
        init_key, run_key = jax.random.split(key)
        states = cuthbert.filter(filter, parts.model_inputs, filter.init_prepare(key=init_key), key=run_key)
        weights = jax.nn.softmax(states.log_weights[1:], axis=-1)
        return states.log_normalizing_constant[-1], jnp.einsum("tn,tnd->td", weights, states.particles.x[1:])

    return map(np.stack, zip(*[run(k) for k in jax.random.split(key, runs)], strict=True))


def assert_exact(log_ratio, error):
    """Of independent filters: a particle filter's evidence is unbiased, and its means are exact but for order 1 / N."""
    # .02 and .05: the reverse diffusion has 16 levels.
    assert_mean(np.exp(log_ratio), 1.0, tolerance=0.02, noticed=1.0)
    assert_mean(error, 0.0, tolerance=0.05, noticed=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bootstrap", pytest.param("guided", marks=pytest.mark.slow)])
def test_particle_filters_of_cuthbert(small, kind):
    y = small.simulate(3, 4)[1].astype(np.float32)
    y[2, 1] = np.nan
    program = ndda.program.StateSpaceModel(small.diffusion_program(), (y,))
    exact_means, exact_variances, exact_evidence = numpy_kalman(small, y)
    if kind == "bootstrap":
        parts = ndda.program.feynman_kac.bootstrap(program)
    else:
        parts = ndda.program.feynman_kac.guided(program, weight=ndda.Moment())
    log_evidence, means = evidence_and_means(parts, jax.random.key(0), 256, 48)
    assert_exact(log_evidence - exact_evidence, (means - exact_means) / np.sqrt(exact_variances))


def test_first_particles_have_no_state_yet(small):
    y = small.simulate(3, 2)[1].astype(np.float32)
    parts = ndda.program.feynman_kac.bootstrap(ndda.program.StateSpaceModel(small.diffusion_program(), (y,)))
    first = parts.init_sample(jax.random.key(0))
    assert first.carry.shape == (4,)
    assert np.isnan(first.x).all()
    np.testing.assert_array_equal(parts.model_inputs.step, [0, 1])
    np.testing.assert_array_equal(parts.model_inputs.xs, y)


# --- dynestyx --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dsx():
    if sys.version_info < (3, 12):
        pytest.skip("dynestyx needs Python 3.12 or newer")
    if importlib.util.find_spec("dynestyx") is None:
        pytest.skip("dynestyx is not installed")
    with warnings.catch_warnings():  # its dependencies use parts of JAX that are being retired
        warnings.simplefilter("ignore", DeprecationWarning)
        import dynestyx
    return dynestyx


def dynamics(dsx, small, transition):
    return dsx.DynamicalModel(
        initial_condition=ndda.GaussianPrior(small.transition, small.covariance).climatology(),
        state_evolution=lambda x, u, t_now, t_next: transition(x),
        observation_model=lambda x, u, t: dist.Normal(x[::2], small.error).to_event(1),
    )


@pytest.mark.slow
def test_dynestyx_simulates_a_diffusion_transition(dsx, small):
    prior = ndda.GaussianPrior(small.transition, small.covariance)
    paths = dsx.simulate(
        dynamics(dsx, small, lambda x: ndda.DiffusionTransition(prior, x)),
        rng_key=jax.random.key(0),
        predict_times=jnp.arange(3.0),
        n_simulations=2000,
    )
    x = np.asarray(paths.states)
    steps = (x[:, 1:] - x[:, :-1] @ small.transition.T).reshape(-1, 4)
    spread = np.sqrt(np.diag(small.covariance) / len(steps))
    assert np.all(np.abs(steps.mean(0)) < 5 * spread)
    np.testing.assert_allclose(np.cov(steps, rowvar=False), small.covariance, atol=5 * 0.25 * math.sqrt(2 / len(steps)))


def test_dynestyx_filters_a_diffusion_transition(dsx, small):
    """Its bootstrap filter and ours on the same model and data: log-evidence and means agree with the exact ones."""
    from dynestyx.inference.configs.filter import PFConfig

    y = small.simulate(3, 4)[1].astype(np.float32)
    exact_means, exact_variances, exact_evidence = numpy_kalman(small, y)
    prior, runs, n = ndda.GaussianPrior(small.transition, small.covariance), 48, 256
    # The first observation is of the initial state there, after a transition here: stationary, they are the same.
    model = dynamics(dsx, small, lambda x: ndda.DiffusionTransition(prior, x))

    @jax.jit
    def theirs(key):
        filter = dsx.Filter(filter_config=PFConfig(n_particles=n, crn_seed=key))
        with numpyro.handlers.seed(rng_seed=0), filter:
            dsx.sample("x", model, obs_times=jnp.arange(4.0), obs_values=jnp.asarray(y))
        states = filter.filtered_states
        weights = jax.nn.softmax(states.log_weights, axis=-1)
        return filter.marginal_loglik, jnp.einsum("tn,tnd->td", weights, states.particles)

    results = [theirs(key) for key in jax.random.split(jax.random.key(0), runs)]
    ours = ndda.Filter(ndda.Bootstrap(small.diffusion_program()), num_particles=n, num_chains=runs, progress_bar=False)
    ours.run(jax.random.key(1), y)
    stats = ours.result.sample_stats
    # A posterior draw comes after resampling; the weighted mean before it is what dynestyx gives.
    pairs = {
        "theirs": (np.stack([r[0] for r in results]), np.stack([r[1] for r in results])),
        "ours": (stats["log_evidence_increment"].sum(1), ours.result.posterior["x"].mean(1)),
    }
    for log_evidence, means in pairs.values():
        assert_exact(log_evidence - exact_evidence, (means - exact_means) / np.sqrt(exact_variances))


@pytest.mark.slow
def test_dynestyx_scores_paths_where_there_is_a_density(dsx, small):
    prior = ndda.GaussianPrior(small.transition, small.covariance)
    x, y = small.simulate(0, 4)
    path = {
        "state_path_params": jnp.asarray(x, jnp.float32),
        "state_path_param_times": jnp.arange(4.0),
        "obs_times": jnp.arange(4.0),
        "obs_values": jnp.asarray(y, jnp.float32),
    }
    with pytest.raises(NotImplementedError, match="a DiffusionTransition has no density"):
        dsx.log_prob(dynamics(dsx, small, lambda x: ndda.DiffusionTransition(prior, x)), **path)
    flow = ndda.diffusion.ProbabilityFlow()
    diffusion = dynamics(dsx, small, lambda x: ndda.DiffusionTransition(prior, x, density=flow))
    gaussian = dynamics(dsx, small, lambda x: dist.MultivariateNormal(prior.condition(x), prior.covariance))
    assert abs(dsx.log_prob(diffusion, **path) - dsx.log_prob(gaussian, **path)) < 0.01
