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


@pytest.mark.parametrize("algorithm", [ndda.FAAPF, ndda.Bootstrap, ndda.EnKF])
def test_online_is_the_whole_run(small, tmp_path, algorithm):
    y = small.simulate(3, 4)[1].astype(np.float32)
    model = small.diffusion_program()
    whole = ndda.ParticleFilter(algorithm(model), num_particles=6, progress_bar=False)
    whole.run(KEY, y)
    init_key, run_key = jax.random.split(jax.random.fold_in(KEY, 0))
    online = ndda.OnlineFilter(algorithm(model), num_particles=6)
    first = online.init(init_key, y[:1])
    state, infos = loop(online, y, first, run_key)
    x = np.stack([info.proposal.sites["posterior"]["x"] for info in infos], 1)
    np.testing.assert_allclose(x, whole.result.posterior["x"][0], atol=1e-5)
    ess = [float(info.ess) for info in infos]
    np.testing.assert_allclose(ess, whole.result.sample_stats["ess"][0], rtol=1e-4)
    np.testing.assert_allclose(
        state.log_evidence, whole.result.sample_stats["log_evidence_increment"][0].sum(), rtol=1e-4
    )

    # Kept on disk after two steps, taken up by another filter.
    state, _ = loop(online, y[:2], first, run_key)
    np.savez(tmp_path / "state.npz", *jax.tree.leaves(state))
    with np.load(tmp_path / "state.npz") as file:
        state = jax.tree.unflatten(jax.tree.structure(state), [jax.numpy.asarray(file[n]) for n in file.files])
    _, infos = loop(ndda.OnlineFilter(algorithm(model), num_particles=6), y, state, run_key, start=2)
    np.testing.assert_array_equal(infos[-1].proposal.sites["posterior"]["x"], x[:, -1])


def test_steps_after_the_first_compile_nothing(small):
    y = small.simulate(3, 4)[1].astype(np.float32)
    online = ndda.OnlineFilter(ndda.FAAPF(small.diffusion_program()), num_particles=6)
    keys = [jax.random.fold_in(KEY, t) for t in range(4)]
    state, _ = online.step(keys[0], online.init(KEY, y[:1]), y[:1])
    with compilations() as compiled:
        for t in range(1, 4):
            state, _ = online.step(keys[t], state, y[t][None])
    assert not compiled


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
