"""One observation at a time gives what the whole series gives."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from conftest import compilations

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


@pytest.mark.parametrize("algorithm", [ndda.FAAPF, ndda.Bootstrap, ndda.EnKF])
def test_online_is_the_whole_run_and_steps_after_the_first_compile_nothing(series, algorithm):
    model, y = series
    whole = ndda.Filter(algorithm(model), num_particles=6, progress_bar=False)
    whole.run(KEY, y)
    init_key, run_key = jax.random.split(jax.random.fold_in(KEY, 0))
    online = ndda.OnlineFilter(algorithm(model), num_particles=6)
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


def test_kept_on_disk_after_two_steps_and_taken_up_by_another_filter(series, tmp_path):
    model, y = series
    online, other = (ndda.OnlineFilter(ndda.FAAPF(model), num_particles=6) for _ in range(2))
    first = online.init(KEY, y[:1])
    _, whole = loop(online, y, first, KEY)
    state, _ = loop(online, y[:2], first, KEY)
    np.savez(tmp_path / "state.npz", *jax.tree.leaves(state))
    with np.load(tmp_path / "state.npz") as file:
        state = jax.tree.unflatten(jax.tree.structure(state), [jax.numpy.asarray(file[n]) for n in file.files])
    _, infos = loop(other, y, state, KEY, start=2)
    last = [found[-1].proposal.sites["posterior"]["x"] for found in (whole, infos)]
    np.testing.assert_array_equal(*last)


def test_wrong_use_is_refused(small):
    y = small.simulate(3, 4)[1].astype(np.float32)
    online = ndda.OnlineFilter(ndda.FAAPF(small.diffusion_program()), num_particles=6)
    with pytest.raises(ValueError, match="scans over 4 times"):
        online.init(KEY, y)
    state = online.init(KEY, y[:1])
    with pytest.raises(ValueError, match="scans over 2 times"):
        online.step(KEY, state, y[:2])
    with pytest.raises(ValueError, match="num_particles=0"):
        ndda.OnlineFilter(ndda.FAAPF(small.diffusion_program()), num_particles=0)
