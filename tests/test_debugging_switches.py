"""JAX's debugging switches: what NumPyro's own `Predictive` passes, filters pass, with the same numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda

KEY = jax.random.key(1)
SLOWER = (ndda.FAAPF, ndda.EnKF)
Y = np.array([[0.3, np.nan], [np.nan, np.nan], [0.1, -0.2]], np.float32)


def model(y):
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
        numpyro.deterministic("height", jnp.array([1.0, jnp.nan]))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y_t)
        return x, None

    scan(step, x0, y)


def run(algorithm):
    filter_ = ndda.Filter(algorithm(model), num_particles=4, progress_bar=False)
    filter_.run(KEY, Y)
    return filter_.result.posterior["x"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [ndda.Bootstrap, *SLOWER])
def test_a_filter_runs_under_all_switches(algorithm):
    plain = run(algorithm)
    with jax.debug_nans(True), jax.checking_leaks(), jax.debug_key_reuse(True), jax.numpy_rank_promotion("raise"):
        np.testing.assert_allclose(run(algorithm), plain, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["jax_disable_jit", "jax_enable_checks", "jax_enable_x64"])
def test_a_filter_runs_uncompiled_checked_and_in_double_precision(switch):
    plain = run(ndda.FAAPF)
    try:
        jax.config.update(switch, True)
        x = run(ndda.FAAPF)
    finally:
        jax.config.update(switch, False)
    if switch == "jax_enable_x64":  # other random numbers
        assert x.dtype == np.float64
        assert np.isfinite(x).all()
    else:
        np.testing.assert_allclose(x, plain, atol=1e-5)
