"""SMC^2: the kernel where the filter is exact, and a program."""

from __future__ import annotations

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import compilations
from monte_carlo import assert_mean
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.smc import smc2

KEY = jax.random.key(0)
SEEN = np.array([0.5, 1.4, 0.2, 1.9, 1.1, 0.7], np.float32)


@jax.jit
def conjugate(keys):
    """theta ~ N(0, 2^2), y_k ~ N(theta, 1); the "filter" is exact, and counts what it has seen."""
    seen = jnp.asarray(SEEN)

    def log_likelihood(theta, t):
        return -0.5 * (seen[t] - theta[0]) ** 2 - 0.5 * jnp.log(2 * jnp.pi)

    def restart(key, theta, number):
        logs = jnp.where(jnp.arange(len(SEEN)) < number, jax.vmap(lambda t: log_likelihood(theta, t))(jnp.arange(6)), 0)
        return jnp.sum(logs), number

    kernel = smc2.build_kernel(
        lambda theta: -0.5 * theta[0] ** 2 / 4.0,
        lambda key, theta, count, t: (count + 1, log_likelihood(theta, t)),
        restart,
        num_moves=2,
        target_ess=0.5,
    )

    def run(key):
        theta = 2.0 * jax.random.normal(jax.random.fold_in(key, 99), (128, 1))
        zeros = jnp.zeros(128)
        state = smc2.init(theta, jnp.zeros(128, int), -0.5 * theta[:, 0] ** 2 / 4.0, zeros)
        return jax.lax.scan(lambda s, t: kernel(jax.random.fold_in(key, t), s, t), state, jnp.arange(6))

    return jax.vmap(run)(keys)


def test_conjugate_posterior_at_every_time():
    state, info = jax.device_get(conjugate(jax.random.split(KEY, 64)))
    assert info.moved.any()
    assert not info.moved.all()
    assert np.all(np.isnan(info.acceptance_rate) == ~info.moved)
    np.testing.assert_array_equal(state.positions.record, len(SEEN))
    # The evidence is exp(sum of increments), unbiased; the means of the draws have a bias of order 1/M.
    k = np.arange(1, 7)
    variance = 1.0 / (1 / 4.0 + k)
    mean = variance * np.cumsum(SEEN, dtype=float)
    means = info.draws[..., 0].mean(2, dtype=float)
    assert_mean(means, mean, tolerance=2 / 128)
    spread = info.draws[..., 0].var(2, dtype=float)
    assert_mean(spread / variance, 1.0, tolerance=0.05)
    covariance = np.eye(6) + 4.0
    exact = -0.5 * SEEN @ np.linalg.solve(covariance, SEEN) - 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    ratio = np.exp(state.log_evidence.astype(float) - exact)
    assert_mean(ratio, 1.0)
    np.testing.assert_allclose(info.log_evidence_increment.sum(1), state.log_evidence, rtol=1e-4)


def model(y, gauge=None):
    sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    numpyro.sample("gauge", dist.Normal(sigma, 0.3), obs=gauge)

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.5 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, sigma), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


@pytest.fixture(scope="module")
def inference():
    found = ndda.SMC2(
        ndda.Bootstrap(model), num_particles=12, num_parameter_particles=40, num_moves=1, progress_bar=False
    )
    found.run(KEY, SEEN, gauge=np.float32(1.0))
    return found


@pytest.mark.slow
def test_a_program_over_time(inference, capsys):
    tree = inference.to_datatree()
    assert tree["posterior"]["sigma"].dims == ("chain", "draw")
    assert tree["posterior_over_time"]["sigma"].dims == ("chain", "draw", "time")
    np.testing.assert_array_equal(tree["posterior_over_time"]["sigma"][:, :, -1], tree["posterior"]["sigma"])
    stats = tree["sample_stats"]
    assert stats["ess"].dims == ("chain", "time")
    assert np.all(stats["filter_steps"] >= 40)
    assert list(az.summary(inference.to_arviz()).index) == ["sigma"]
    inference.print_summary()
    text = capsys.readouterr().out
    for words in ("SMC2 with Bootstrap", "log-evidence", "sigma"):
        assert words in text


@pytest.mark.slow
def test_steps_after_the_first_compile_nothing(inference):
    with compilations() as compiled:
        inference.run(jax.random.key(1), SEEN + 0.5, gauge=np.float32(0.7))
    assert not compiled


def test_wrong_use_is_refused():
    numbers = {"num_particles": 4, "num_parameter_particles": 8, "progress_bar": False}
    with pytest.raises(ValueError, match="num_moves=0"):
        ndda.SMC2(ndda.Bootstrap(model), **numbers, num_moves=0)
    with pytest.raises(ValueError, match=r"target_ess=1\.5"):
        ndda.SMC2(ndda.Bootstrap(model), **numbers, target_ess=1.5)
    with pytest.raises(ValueError, match="estimates no evidence"):
        ndda.SMC2(ndda.EnKF(model), **numbers).run(KEY, SEEN, gauge=1.0)
