"""Weights that are carried from step to step: resampling only where the effective sample size is low."""

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

A, Q, R, P0 = 0.9, 0.5, 1.0, 1.0
Y = np.array([0.5, 1.5, np.nan, -0.3, 0.8, 2.0], np.float32)
CHAINS, N = 64, 100


def walk(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(A * x, Q**0.5))
        numpyro.sample("y", dist.Normal(x, R**0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, P0**0.5)), y)


def kalman():
    """Log-evidence, and mean and variance of x at each time."""
    m, p, total, found = 0.0, P0, 0.0, []
    for y in Y:
        m, p = A * m, A * A * p + Q
        if not np.isnan(y):
            s = p + R
            total += -0.5 * (np.log(2 * np.pi * s) + (y - m) ** 2 / s)
            m, p = m + p / s * (y - m), p - p * p / s
        found.append((m, p))
    return total, *np.array(found).T


def run(algorithm, **settings):
    filter_ = ndda.Filter(algorithm, num_particles=N, num_chains=CHAINS, progress_bar=False, **settings)
    filter_.run(jax.random.key(0), Y)
    return filter_


@pytest.mark.parametrize("kind", [ndda.Bootstrap, pytest.param(ndda.GuidedPF, marks=pytest.mark.slow)])
def test_evidence_and_moments_are_those_of_the_kalman_filter(kind, capsys):
    """Unbiased evidence, and draws and backgrounds that take the carried weights into account."""
    filter_ = run(kind(walk, resample_below=0.6))
    result, (evidence, mean, variance) = filter_.result, kalman()
    resampled = result.sample_stats["resampled"]
    assert 0.1 < resampled.mean() < 0.9
    ratio = np.exp(result.sample_stats["log_evidence_increment"].astype(float).sum(1) - evidence)
    assert_mean(ratio, 1.0)
    x = result.posterior["x"].astype(float)
    for got, expected, unit in ((x.mean(1), mean, variance**0.5), (x.var(1), variance, variance)):
        assert_mean(got / unit, expected / unit, tolerance=2 / N)
    # The background at a step is the prediction from the weighted particles of the last one.
    assert_mean(result.background["y"].mean[:, 1:], A * mean[:-1], tolerance=0.02)
    filter_.print_summary()
    assert "steps with resampling" in capsys.readouterr().out
    with pytest.raises(ValueError, match="carried their weights from step to step"):
        filter_.smoothed(1)


@pytest.mark.slow
def test_online_is_the_whole_run():
    algorithm, key = ndda.Bootstrap(walk, resample_below=0.6), jax.random.key(3)
    whole = ndda.Filter(algorithm, num_particles=N, progress_bar=False)
    whole.run(key, Y)
    online = ndda.OnlineFilter(algorithm, num_particles=N)
    init_key, run_key = jax.random.split(jax.random.fold_in(key, 0))
    state, found = online.init(init_key, Y[:1]), []
    for t in range(len(Y)):
        state, info = online.step(jax.random.fold_in(run_key, t), state, Y[t][None])
        found.append(bool(info.resampled))
        np.testing.assert_allclose(jnp.mean(jnp.exp(state.log_weights)), 1.0, rtol=1e-4)
    np.testing.assert_array_equal(found, whole.result.sample_stats["resampled"][0])
    increments = whole.result.sample_stats["log_evidence_increment"]
    np.testing.assert_allclose(state.log_evidence, increments.sum(), rtol=1e-4)


@pytest.mark.parametrize("kind", [ndda.Bootstrap, ndda.GuidedPF])
def test_wrong_thresholds_are_refused(kind):
    with pytest.raises(ValueError, match=r"resample_below=1\.5; give a fraction of the particles from 0 to 1"):
        kind(walk, resample_below=1.5)
    with pytest.raises(ValueError, match=r"resample_below=0\.5 and target_ess=0\.2; carry weights on or temper them"):
        kind(walk, resample_below=0.5, target_ess=0.2)
