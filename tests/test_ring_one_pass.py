"""The one-pass emulator that ships: what its card claims, on rings of any size, and the script that trains it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96
from numpyro_diffusion_da.observation import GaussianLikelihood, GaussianObservation
from numpyro_diffusion_da.priors import read_ring_one_pass
from numpyro_diffusion_da.transition import OnePassDynamics

KEY = jax.random.key(0)
ROOT = Path(__file__).parents[1]
SPREAD = lorenz96.NOISE_VARIANCE**0.5


@pytest.fixture(scope="module")
def prior():
    return ndda.load_prior("lorenz96_one_pass")


@pytest.fixture(scope="module")
def states():
    """States of the true system after a spin-up, shape (32, 40)."""
    start = lorenz96.FORCING + jax.random.normal(KEY, (32, 40))
    return jax.lax.fori_loop(0, 100, lambda i, x: lorenz96.draw(jax.random.fold_in(KEY, i), x), start)


def test_loads_with_its_card(prior):
    assert prior.checksum == prior.card["sha256"]
    assert prior.noise_shape == prior.layout.shape == (40,)
    assert prior.card["system"] == ndda.load_prior("lorenz96").card["system"]
    json.dumps(prior.card, allow_nan=False)


def test_draws_have_the_mean_and_the_spread_of_the_true_system(prior, states):
    noise = jax.random.normal(KEY, (256, *states.shape))
    drawn = np.asarray(jax.jit(jax.vmap(jax.vmap(prior.generate), (0, None)))(noise, states))
    off = drawn.mean(0) - np.asarray(lorenz96.flow(states))
    claimed = prior.card["one_step"]["mean_error_relative_to_noise"]
    # The mean over 256 members has a sampling error of a sixteenth of the noise.
    assert np.sqrt(np.mean(off**2)) / SPREAD < (claimed**2 + 1 / 256) ** 0.5 * 1.15
    assert abs(np.sqrt(drawn.var(0, ddof=1).mean()) / SPREAD - 1) < 0.04


def test_equivariant_under_translation_and_on_other_rings(prior, states):
    noise = jax.random.normal(KEY, (40,))
    shifted = prior.generate(jnp.roll(noise, 7), jnp.roll(states[0], 7))
    np.testing.assert_allclose(shifted, jnp.roll(prior.generate(noise, states[0]), 7), atol=1e-5)
    # Two copies of a ring side by side are a ring of 80 sites, and sites do not see the ring's length.
    wide = ndda.load_prior("lorenz96_one_pass", num_sites=80)
    both = wide.generate(jnp.tile(noise, 2), jnp.tile(states[0], 2))
    np.testing.assert_allclose(both, jnp.tile(prior.generate(noise, states[0]), 2), atol=1e-5)
    with pytest.raises(ValueError, match="num_sites"):
        ndda.load_prior("lorenz96_one_pass", num_sites=4)
    with pytest.raises(ValueError, match="has shape"):
        prior.condition(jnp.zeros(39))


@pytest.mark.slow
def test_guided_draws_are_near_the_exact_posterior(prior, states):
    """The truth's transition is N(flow(x), 0.5 I): observed sites move towards the observation, others stay."""
    x, error = states[0], 0.3
    y = lorenz96.flow(x)[::2] + 0.5
    likelihood = GaussianLikelihood(lambda x: [GaussianObservation(x[::2], jnp.full(20, error), y, jnp.ones(20, bool))])
    dynamics = OnePassDynamics(prior, prior.condition(x))
    keys = jax.random.split(KEY, 512)
    draw = jax.jit(jax.vmap(lambda key: dynamics.conditional_draw(key, likelihood, ndda.MMPS())[0]))
    drawn, flow = np.asarray(draw(keys)), np.asarray(lorenz96.flow(x))
    gain = lorenz96.NOISE_VARIANCE / (lorenz96.NOISE_VARIANCE + error**2)
    moved = (drawn.mean(0) - flow) / SPREAD
    np.testing.assert_allclose(moved[::2], 0.5 * gain / SPREAD, atol=0.2)
    np.testing.assert_allclose(moved[1::2], 0.0, atol=0.25)
    spread = drawn.std(0)
    np.testing.assert_allclose(np.mean(spread[::2]), (gain * error**2) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(np.mean(spread[1::2]), SPREAD, rtol=0.06)


@pytest.mark.slow
def test_training_script_runs_small(tmp_path, monkeypatch):
    pytest.importorskip("optax")
    small = {"steps": 20, "rings": 8, "run-steps": 4, "batch": 8, "check-states": 32, "check-members": 4}
    small |= {"climate-rings": 2, "climate-steps": 20}
    arguments = [text for key, value in small.items() for text in (f"--{key}", str(value))]
    script = ROOT / "examples" / "train_lorenz96_one_pass.py"
    monkeypatch.setattr(sys, "argv", [script.name, "--out", str(tmp_path), *arguments])
    monkeypatch.syspath_prepend(str(script.parent))
    with jax.numpy_rank_promotion("allow"), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    found = read_ring_one_pass(tmp_path, "lorenz96_one_pass", 40)
    assert found.card["training"]["optimizer_steps"] == 20
    assert found.card["one_step"]["mean_error_relative_to_persistence"] < 0.3
