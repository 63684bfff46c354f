"""The emulator that ships: what its card claims, on rings of any size, and the script that trains it."""

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96
from numpyro_diffusion_da.observation import GaussianLikelihood, GaussianObservation
from numpyro_diffusion_da.priors import (
    load_prior,
    read_ring_emulator,
    read_spherical_emulator,
    save_ring_emulator,
)
from numpyro_diffusion_da.priors import ring as emulators
from numpyro_diffusion_da.transition import DiffusionDynamics

KEY = jax.random.key(0)
ROOT = Path(__file__).parents[1]
DATA = Path(emulators.__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def prior():
    return load_prior("lorenz96")


@pytest.fixture(scope="module")
def states():
    """States of the true system after a spin-up, shape (64, 40)."""
    start = lorenz96.FORCING + jax.random.normal(KEY, (64, 40))
    return jax.lax.fori_loop(0, 100, lambda i, x: lorenz96.draw(jax.random.fold_in(KEY, i), x), start)


def rms(x):
    return float(jnp.sqrt(jnp.mean(x**2)))


def relative_mean_error(prior, x):
    """Of the conditional mean of each state, against persistence."""
    mean = jax.jit(jax.vmap(lambda x: prior.location(prior.condition(x))))(x)
    true = jax.jit(lorenz96.flow)(x)
    return np.sqrt(np.mean(np.square(mean - true), axis=1)) / rms(true - x)


def test_tendency_and_flow_of_the_true_system():
    x = jax.random.normal(KEY, (3, 7)) + 2.0
    by_hand = np.array([[(r[(i + 1) % 7] - r[i - 2]) * r[i - 1] - r[i] + 8.0 for i in range(7)] for r in np.asarray(x)])
    np.testing.assert_allclose(lorenz96.tendency(x), by_hand, rtol=1e-5, atol=1e-5)
    at_rest = jnp.full((5,), lorenz96.FORCING)
    np.testing.assert_allclose(lorenz96.flow(at_rest), at_rest, rtol=1e-6)


def test_loads_with_its_card(prior):
    assert prior.checksum == prior.card["sha256"]
    assert prior.layout.shape == (40,)
    assert prior.card["system"]["noise_variance"] == lorenz96.NOISE_VARIANCE
    assert prior.card["system"]["forcing"] == lorenz96.FORCING
    assert sum(file.stat().st_size for file in DATA.glob("lorenz96.*")) < 1e6
    json.dumps(prior.card, allow_nan=False)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"no prior named 'lorenz63' ships.*'lorenz96'"):
        load_prior("lorenz63")


def test_arrays_that_are_not_the_card_s_are_refused(tmp_path):
    shutil.copy(DATA / "lorenz96.json", tmp_path)
    with np.load(DATA / "lorenz96.npz") as stored:
        arrays = dict(stored)
    arrays["mean_network.readout"] = arrays["mean_network.readout"] + np.float32(1e-3)
    np.savez(tmp_path / "lorenz96.npz", **arrays)
    with pytest.raises(ValueError, match="checksum"):
        read_ring_emulator(tmp_path, "lorenz96", 40)


CARD, ARRAYS = ((DATA / f"lorenz96.{ending}").read_bytes() for ending in ("json", "npz"))


def edited(**changes):
    return json.dumps(json.loads(CARD) | changes).encode()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"npz": b""}, r"the file '.*lorenz96.npz' is damaged .*; install the package again, or run"),
        ({"npz": ARRAYS[:-100]}, "lorenz96.npz' is damaged"),
        ({"npz": ARRAYS[: len(ARRAYS) // 2]}, "lorenz96.npz' is damaged"),
        ({"npz": ARRAYS[:5000] + bytes(200) + ARRAYS[5200:]}, "lorenz96.npz' is damaged"),
        ({"npz": b"text"}, "lorenz96.npz' is damaged"),
        ({"npz": CARD}, "lorenz96.npz' is damaged"),
        ({"npz": None}, "there is no lorenz96.npz in"),
        ({"json": None}, "there is no lorenz96.json in"),
        ({"json": b""}, r"data card '.*lorenz96.json' is damaged .*; install"),
        ({"json": CARD[:-20]}, "lorenz96.json' is damaged"),
        ({"json": b"\xff\xfe"}, "lorenz96.json' is damaged"),
        ({"json": b"{}"}, "lorenz96.json' is damaged"),
        ({"json": b"[1, 2]"}, "lorenz96.json' is damaged"),
        ({"json": edited(latent_scale=0.7)}, "one of them is damaged or was edited"),
        ({"json": edited(noise_range=[0.1, 80.0])}, "one of them is damaged or was edited"),
        ({"json": edited(note="mine")}, "one of them is damaged or was edited"),
        ({"json": (DATA / "held_suarez.json").read_bytes()}, "belong to different priors"),
    ],
)
def test_files_that_are_damaged_or_edited_are_refused(files, message, tmp_path):
    for ending, content in ({"json": CARD, "npz": ARRAYS} | files).items():
        if content is not None:
            (tmp_path / f"lorenz96.{ending}").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_ring_emulator(tmp_path, "lorenz96", 40)


def test_files_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"files 'held_suarez' in .* are not those of a ring emulator"):
        read_ring_emulator(DATA, "held_suarez", 40)
    with pytest.raises(ValueError, match=r"files 'lorenz96' in .* are not those of a spherical emulator"):
        read_spherical_emulator(DATA, "lorenz96")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_scale": jnp.array(jnp.nan)}, "latent_scale with non-finite values"),
        ({"latent_scale": jnp.array(0.0)}, "latent_scale=0.0; give positive numbers"),
        ({"noise_range": (0.0, 80.0)}, r"noise_range=\(0.0, 80.0\)"),
        ({"climatology_covariance": jnp.full(21, jnp.inf)}, "climatology_covariance with non-finite values, 21 of 21"),
    ],
)
def test_numbers_that_an_emulator_cannot_have_are_refused(prior, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(prior, **changes)


def test_the_checksum_of_a_prior_covers_what_changes_its_numbers(prior):
    one = prior.provenance()["prior_checksum"]
    assert load_prior("lorenz96").provenance()["prior_checksum"] == one
    others = [
        dataclasses.replace(prior, latent_scale=1.1 * prior.latent_scale),
        dataclasses.replace(prior, noise_range=(0.05, 80.0)),
        load_prior("lorenz96", num_sites=41),
    ]
    assert len({one, *(other.provenance()["prior_checksum"] for other in others)}) == 4


def test_rings_that_are_too_small_and_wrong_states_are_refused(prior):
    with pytest.raises(ValueError, match="load_prior got num_sites=4; give 5 or more"):
        load_prior("lorenz96", num_sites=4)
    with pytest.raises(ValueError, match=r"layout of shape \(4,\), but its networks need one axis of 5 sites or more"):
        dataclasses.replace(prior, layout=ndda.Layout((4,), ("site",)))
    with pytest.raises(ValueError, match="expected \\(40,\\)"):
        prior.condition(jnp.zeros(39))
    with pytest.raises(ValueError, match="takes no inputs"):
        prior.condition(jnp.zeros(40), jnp.zeros(1))


def test_arguments_of_the_wrong_kind_are_refused(prior, tmp_path):
    with pytest.raises(TypeError, match='load_prior got name=96; expected a str: write name="lorenz96"'):
        load_prior(96)
    with pytest.raises(TypeError, match=r"load_prior got num_sites=40\.0; give a whole number of 5 or more"):
        load_prior("lorenz96", num_sites=40.0)
    with pytest.raises(TypeError, match=r"read_ring_emulator got num_sites=40\.0; give a whole number of 5 or more"):
        read_ring_emulator(tmp_path, "lorenz96", 40.0)
    with pytest.raises(TypeError, match=r"got folder='.*'; expected a Path or Traversable: write folder=Path\("):
        read_ring_emulator(str(DATA), "lorenz96", 40)
    with pytest.raises(TypeError, match=r"got folder='out'; expected a Path: write folder=Path\("):
        save_ring_emulator(prior, {}, "out", "lorenz96")
    with pytest.raises(TypeError, match=r"save_ring_emulator got emulator=.*; expected a RingEmulator"):
        save_ring_emulator({"mean_network": prior.mean_network}, {}, tmp_path, "lorenz96")
    with pytest.raises(
        TypeError, match=r"RingEmulator got layout=\(40,\); expected a Layout: write layout=ndda.Layout"
    ):
        dataclasses.replace(prior, layout=(40,))
    with pytest.raises(TypeError, match=r"RingEmulator got mean_network=.*; expected a RingMeanNetwork"):
        dataclasses.replace(prior, mean_network=prior.residual_network)
    with pytest.raises(TypeError, match="the class RingResidualNetwork, without parentheses"):
        dataclasses.replace(prior, residual_network=emulators.RingResidualNetwork)


def test_conditional_mean_is_as_good_as_the_card_claims(prior, states):
    error = relative_mean_error(prior, states)
    # The median is compared because rare large states make the mean square of 64 states a poor estimate.
    claim = prior.card["one_step"]["mean_error_of_a_state_relative_to_persistence"]["quantile_0.5"]
    assert np.median(error) < 1.25 * claim
    assert prior.card["one_step"]["mean_error_relative_to_persistence"] < 0.01
    assert rms(error) < 0.02


def test_rings_of_another_size():
    prior = load_prior("lorenz96", num_sites=60)
    x = jax.vmap(prior.climatology().sample)(jax.random.split(KEY, 32))
    assert rms(relative_mean_error(prior, x)) < 0.02


def test_equivariant_under_translation(prior, states):
    z_s, s = 2.0 * jax.random.normal(KEY, (40,)), jnp.asarray(1.5)

    @jax.jit
    def denoised(shift):
        conditioning = prior.condition(jnp.roll(states[0], shift))
        return prior.location(conditioning), prior.denoise(jnp.roll(z_s, shift), s, conditioning)

    for here, there in zip(denoised(0), denoised(7), strict=True):
        np.testing.assert_allclose(jnp.roll(here, 7), there, atol=1e-5)


def test_draws_have_the_spread_of_the_true_system(prior, states):
    n, x = 1000, states[0]
    # 64 levels: with the default 16 the sampler, not the network, makes the spread some 3 % too large.
    step = DiffusionDynamics(prior, eqx.filter_jit(prior.condition)(x), ndda.Sampler(schedule=ndda.KarrasSchedule(64)))
    draws = jax.jit(jax.vmap(lambda k: step.draw(k)[0]))(jax.random.split(KEY, n))
    deviation = np.asarray(draws - lorenz96.flow(x)[None], dtype=np.float64)
    variance = lorenz96.NOISE_VARIANCE
    # Bias allowed: 1 % in the variance (the card's Jacobians), the card's worst mean error at a site.
    assert abs(np.mean(deviation**2) / variance - 1.0) < 0.01 + 4 * np.sqrt(2.0 / deviation.size)
    assert np.all(np.abs(deviation.mean(0)) < 0.05 + 4 * np.sqrt(variance / n))
    neighbors = np.mean(deviation * np.roll(deviation, 1, axis=1))
    assert abs(neighbors) / variance < 0.01 + 4 / np.sqrt(deviation.size)


@pytest.mark.parametrize("level", [0.05, 1.0, 40.0])
def test_jacobian_is_a_covariance(prior, states, level):
    conditioning = eqx.filter_jit(prior.condition)(states[1])
    z_s = (1.0 + level) * jax.random.normal(KEY, (40,))
    jacobian = jax.jit(jax.jacrev(lambda z: prior.denoise(z, jnp.asarray(level), conditioning)))(z_s)
    j = np.asarray(jacobian, dtype=np.float64)
    assert np.abs(j - j.T).max() < 1e-5 * np.abs(j).max()
    assert np.linalg.eigvalsh(0.5 * (j + j.T)).min() > 0
    np.testing.assert_allclose(np.diag(j) * level**2, level**2 / (1 + level**2), rtol=0.03)


def test_guided_draw_is_near_the_exact_posterior(prior, states):
    """Every second site observed: the true system's posterior is Gaussian and known, site by site."""
    error, n = 0.1**0.5, 500
    y = lorenz96.draw(jax.random.key(1), states[2])[::2]

    def observe(x):
        return [GaussianObservation(x[::2], jnp.full((20,), error), y, jnp.ones((20,), bool))]

    step = DiffusionDynamics(
        prior, eqx.filter_jit(prior.condition)(states[2]), ndda.Sampler(schedule=ndda.KarrasSchedule(32))
    )
    one = jax.jit(jax.vmap(lambda k: step.conditional_draw(k, GaussianLikelihood(observe), ndda.MMPS())[0]))
    draws = np.asarray(one(jax.random.split(KEY, n)), dtype=np.float64)
    forecast = np.asarray(lorenz96.flow(states[2]))
    gain = lorenz96.NOISE_VARIANCE / (lorenz96.NOISE_VARIANCE + error**2)
    mean, variance = forecast.copy(), np.full(40, lorenz96.NOISE_VARIANCE)
    mean[::2] += gain * (np.asarray(y) - forecast[::2])
    variance[::2] *= 1.0 - gain
    # The highest noise level is finite (40): a draw begins around the prior's mean, not the posterior's.
    bias = 0.05 + 0.05 * np.abs(mean - forecast)
    assert np.all(np.abs(draws.mean(0) - mean) < bias + 4 * np.sqrt(variance / n))
    ratio = np.mean(draws.var(axis=0, ddof=1) / variance)
    assert abs(ratio - 1.0) < 0.06 + 4 * np.sqrt(2.0 / draws.size)


@pytest.mark.parametrize("sites", [8, 60])
def test_climatology(sites):
    prior = load_prior("lorenz96", num_sites=sites)
    climatology = prior.climatology()
    assert climatology.event_shape == (sites,)
    with jax.numpy_rank_promotion("allow"):  # NumPyro's, not ours
        assert climatology.sample(KEY, (3,)).shape == (3, sites)
    covariance = np.asarray(climatology.covariance_matrix)
    assert np.linalg.eigvalsh(covariance).min() > 0
    expected = float(prior.climatology_covariance[0])
    np.testing.assert_allclose(np.diag(covariance), expected, rtol=0.1)
    np.testing.assert_allclose(np.diag(covariance), covariance[0, 0], rtol=1e-4)


@pytest.mark.slow
def test_training_script_runs_small(tmp_path, monkeypatch):
    pytest.importorskip("optax")
    small = {"steps": 20, "rings": 8, "run-steps": 4, "batch": 8, "check-states": 32, "check-members": 4}
    small |= {"climate-rings": 2, "climate-steps": 20}
    arguments = [text for key, value in small.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train_lorenz96.py", "--out", str(tmp_path), *arguments])
    with jax.numpy_rank_promotion("allow"), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / "train_lorenz96.py"), run_name="__main__")
    assert ended.value.code == 0
    prior = read_ring_emulator(tmp_path, "lorenz96", 40)
    assert prior.card["training"]["optimizer_steps"]["mean_network"] == 20
    assert prior.card["one_step"]["mean_error_relative_to_persistence"] < 1.0
