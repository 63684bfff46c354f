"""One observation at a time gives what the whole series gives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import compilations
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda

KEY = jax.random.key(5)


def loop(filter, y, state, run_key, start=0):
    infos = []
    for t in range(start, len(y)):
        state, info = filter.step(jax.random.fold_in(run_key, t), state, y[t][None])
        infos.append(info)
    return state, infos


@pytest.fixture(scope="module")
def series(small):
    """(program, observations)"""
    return small.diffusion_program(), small.simulate(3, 4)[1].astype(np.float32)


@pytest.fixture(scope="module")
def online_filters(series):
    """Online filter of the program by each algorithm, made once."""
    return functools.cache(lambda algorithm: ndda.OnlineFilter(algorithm(series[0]), num_particles=6, keep_steps=10))


# test_background compares an ensemble Kalman filter online with a stored run.
@pytest.mark.parametrize("algorithm", [ndda.FAAPF, pytest.param(ndda.EnKF, marks=pytest.mark.slow)])
def test_online_is_the_whole_run_and_steps_after_the_first_compile_nothing(series, online_filters, algorithm):
    model, y = series
    whole = ndda.Filter(algorithm(model), num_particles=6, progress_bar=False)
    whole.run(KEY, y)
    init_key, run_key = jax.random.split(jax.random.fold_in(KEY, 0))
    online = online_filters(algorithm)
    state, first = loop(online, y[:1], online.init(init_key, y[:1]), run_key)
    keys = [jax.random.fold_in(run_key, t) for t in range(4)]
    infos = [*first]
    with compilations() as compiled:
        for t in range(1, 4):
            state, info = online.step(keys[t], state, y[t][None])
            infos.append(info)
    assert not compiled
    x = np.stack([info.proposal.sites["posterior"]["x"] for info in infos], 1)
    np.testing.assert_allclose(x, whole.result.posterior["x"][0], atol=1e-5)
    ess = [float(info.ess) for info in infos]
    np.testing.assert_allclose(ess, whole.result.sample_stats["ess"][0], rtol=1e-4)
    np.testing.assert_allclose(
        state.log_evidence, whole.result.sample_stats["log_evidence_increment"][0].sum(), rtol=1e-4
    )
    # What it keeps is the result of the whole run.
    kept, tree = online.result, online.to_datatree()
    assert tree.attrs["num_particles"] == 6
    for group in ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data"):
        ours, theirs = getattr(kept, group), getattr(whole.result, group)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_kept_on_disk_after_two_steps_and_taken_up_by_another_filter(series, online_filters, tmp_path):
    model, y = series
    online, other = online_filters(ndda.FAAPF), ndda.OnlineFilter(ndda.FAAPF(model), num_particles=6)
    first = online.init(KEY, y[:1])
    _, whole = loop(online, y, first, KEY)
    state, _ = loop(online, y[:2], first, KEY)
    np.savez(tmp_path / "state.npz", *jax.tree.leaves(state))
    with np.load(tmp_path / "state.npz") as file:
        state = jax.tree.unflatten(jax.tree.structure(state), [jax.numpy.asarray(file[n]) for n in file.files])
    _, infos = loop(other, y, state, KEY, start=2)
    last = [found[-1].proposal.sites["posterior"]["x"] for found in (whole, infos)]
    np.testing.assert_array_equal(*last)


def walk(y, error=0.5):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(x, error).expand(y_t.shape), obs=y_t)
        return x, None

    scan(step, jnp.zeros(()), y)


@pytest.mark.slow
def test_steps_are_kept_when_asked_and_new_shapes_warn(capsys, recwarn):
    y = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    none = ndda.OnlineFilter(ndda.Bootstrap(walk), num_particles=3)
    with pytest.raises(RuntimeError, match=r"keeps no steps; make it with ndda.OnlineFilter\(..., keep_steps=100\)"):
        none.result  # noqa: B018
    online = ndda.OnlineFilter(ndda.Bootstrap(walk), num_particles=3, keep_steps=3)
    first = online.init(KEY, y[:1])
    with pytest.raises(RuntimeError, match="no step since init"):
        online.to_datatree()
    state, infos = loop(online, y[:2], first, KEY)
    online.step(KEY, state, np.full_like(y[:1], np.nan))  # a forecast beside the line of analyses
    assert online.result.posterior["x"].shape == (1, 3, 3)
    state, _ = online.step(KEY, state, y[2:3])
    np.testing.assert_array_equal(online.result.observed_data["y"], y[:3])
    np.testing.assert_array_equal(online.result.posterior["x"][0, :, 1], infos[1].proposal.sites["posterior"]["x"])
    state, _ = online.step(KEY, jax.tree.map(jnp.array, state), y[3:4])  # read from a file, so to speak
    np.testing.assert_array_equal(online.result.observed_data["y"], y[1:4])
    assert online.to_datatree(lag=1).posterior["x"].shape == (1, 3, 3)
    online.print_summary()
    assert "Bootstrap" in capsys.readouterr().out
    jax.eval_shape(lambda s: online.step(KEY, s, y[:1])[0], state)
    np.testing.assert_array_equal(online.result.observed_data["y"], y[1:4])

    assert not [w for w in recwarn if "compiles the step again" in str(w.message)]
    words = r"argument 'y' is an array of shape \(1, 1\) \(float32\), and in the first step .*\(1, 2\).* with NaN"
    with pytest.warns(UserWarning, match=words) as warned:
        loop(online, y[:2, :1], state, KEY)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    with pytest.raises(ValueError, match=r"site 'y' has shape \(1,\) in the last step and \(2,\) in an earlier one"):
        online.result  # noqa: B018


def test_wrong_use_is_refused(small):
    y = small.simulate(3, 4)[1].astype(np.float32)
    online = ndda.OnlineFilter(ndda.FAAPF(small.diffusion_program()), num_particles=6)
    with pytest.raises(ValueError, match="scans over 4 times"):
        online.init(KEY, y)
    state = online.init(KEY, y[:1])
    with pytest.raises(ValueError, match="scans over 2 times"):
        online.step(KEY, state, y[:2])
    seven = ndda.OnlineFilter(ndda.FAAPF(small.diffusion_program()), num_particles=7)
    with pytest.raises(ValueError, match=r"'particles.*' is an array of shape \(6, .*and 7 particles .*shape \(7, "):
        seven.step(KEY, state, y[:1])
    of_another_program = ndda.OnlineFilter(ndda.Bootstrap(walk), num_particles=6)
    with pytest.raises(ValueError, match=r"'particles.*' is an array of shape .*it is an array of shape \(6,\); give"):
        of_another_program.step(KEY, state, y[:1])
    with pytest.raises(ValueError, match="num_particles=0"):
        ndda.OnlineFilter(ndda.FAAPF(small.diffusion_program()), num_particles=0)
