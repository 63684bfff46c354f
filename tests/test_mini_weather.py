"""The scripts of the mini weather, run small on made-up data: training goes on where it stopped, and all reads."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from numpyro_diffusion_da.priors.spherical_emulator import read_spherical_emulator
from numpyro_diffusion_da.priors.stored import pack, read_stored

ROOT = Path(__file__).parents[1] / "examples" / "mini_weather"


@pytest.fixture
def scripts(monkeypatch):
    pytest.importorskip("optax")
    monkeypatch.syspath_prepend(str(ROOT))
    modules = [importlib.import_module(name) for name in ("data", "train", "validate", "package")]
    monkeypatch.setattr(modules[0], "DEGREES", 6)
    yield modules
    for name in ("data", "linear", "train", "validate", "package"):
        sys.modules.pop(name, None)


def made_up(folder, data, rng):
    """Autoregressive noise in the harmonics of a grid of 8 x 16."""
    h = data.harmonics(8)
    synthesis = jax.jit(jax.vmap(h.synthesis))
    names = ["surface_pressure", *(f"{v}_{level}" for v in ("temperature", "u", "v") for level in data.LEVELS)]
    description = {"channels": names, "model": {"made_up": True}}
    (folder / "data.json").write_text(json.dumps(description))
    for split in ("train", "validation", "test"):
        y, states = np.zeros(h.coefficients_shape, np.float32), []
        for _ in range(40):
            y = 0.9 * y + 0.4 * rng.standard_normal(y.shape).astype(np.float32)
            states.append(y)
        fields = 100.0 + np.asarray(synthesis(np.stack(states)))
        np.savez(folder / f"{split}_000.npz", **pack(fields[None]))


@pytest.mark.slow
def test_scripts_run_small(scripts, tmp_path):
    data, train, validate, package = scripts
    made_up(tmp_path, data, np.random.default_rng(0))
    out = tmp_path / "emulator"
    small = {"stages": 1, "hidden": 4, "correction": 4, "batch": 2, "rank": 20, "save_every": 1}
    with jax.numpy_rank_promotion("allow"):
        train.main(tmp_path, out, steps=2, residual_steps=2, **small)
        whole, _ = read_stored(out, train.NAME, "train.py")
        # The learning rate's schedule is that of all steps, so only a stop by the clock can be gone on with.
        for kept in out.glob("*.pickle"):
            kept.unlink()
        train.main(tmp_path, out, steps=2, residual_steps=2, minutes=0.0, **small)
        train.main(tmp_path, out, steps=2, residual_steps=2, **small)
        again, _ = read_stored(out, train.NAME, "train.py")
        validate.main(tmp_path, out, states=4, members=4, runs=2, days=2, levels=4)
        package.main(tmp_path, out, tmp_path / "packaged", states=3)
    for name, values in whole.items():
        if name.startswith("mean_network"):
            np.testing.assert_array_equal(values, again[name], err_msg=name)
    prior = read_spherical_emulator(tmp_path / "packaged", train.NAME)
    assert prior.card["validation"]["finite"]
    assert prior.layout.shape == (8, 16, 10)
