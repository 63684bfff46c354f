"""The scripts of examples/mini_weather on a made-up system, linear with Gaussian noise: what they find is known."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from numpyro_diffusion_da.demos import held_suarez_truth as held_suarez
from numpyro_diffusion_da.priors import read_spherical_emulator

pytestmark = pytest.mark.slow


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "mini_weather"))
    yield lambda name: importlib.import_module(name)
    for name in ("damping", "data", "linear", "packing", "train", "validate", "package"):
        sys.modules.pop(name, None)


def made_up_shards(folder, scripts, splits, times):
    """Every coefficient an autoregression of its own, x' = 0.8 x + 0.6 e: 0.6 of persistence's error is the least."""
    data, packing = scripts("data"), scripts("packing")
    h = data.harmonics(32)
    rng = np.random.default_rng(0)
    wind = [f"{v}_{level}" for v in ("u", "v") for level in data.WIND_LEVELS]
    channels = ["surface_pressure", *(f"temperature_{level}" for level in data.TEMPERATURE_LEVELS), *wind]
    described = {"channels": channels, "model": {"name": "made up"}}
    (folder / "data.json").write_text(json.dumps(described))
    fall_off = (0.5 ** np.arange(h.degrees))[None, None, :, None]
    for split, runs in splits.items():
        x = rng.normal(size=(runs, *h.coefficients_shape))
        states = []
        for _ in range(times):
            x = 0.8 * x + 0.6 * rng.normal(size=x.shape)
            states.append(np.stack([np.asarray(h.synthesis((v * fall_off * h.mask).astype(np.float32))) for v in x]))
        with (folder / f"{split}_000.npz").open("wb") as file:
            np.savez(file, **packing.packed(1000.0 + np.stack(states, axis=1)))


def test_from_data_to_the_package(tmp_path, scripts):
    raw, trained, out = (tmp_path / name for name in ("data", "emulator", "package"))
    for folder in (raw, out):
        folder.mkdir()
    made_up_shards(raw, scripts, {"train": 12, "validation": 2, "test": 2}, 25)
    small = {"stages": 1, "hidden": 2, "steps": 2, "batch": 2, "rounds": 2, "members": 3, "days": 2}
    scripts("train").main(raw, trained, rank=40, **small)
    emulator = read_spherical_emulator(trained, "held_suarez")
    assert emulator.layout.shape == (32, 64, 9)
    # Degrees and channels are mixed by the regression where there are few samples: near the least error, not at it.
    errors = np.array(emulator.card["linear_forecast_error_relative_to_persistence"])
    np.testing.assert_allclose(errors, 0.6 / np.sqrt(2 * (1 - 0.8)), rtol=0.35)
    factors = np.asarray(emulator.mean_network.damping)
    assert len(np.load(trained / "damping_2.npy")) == 2
    assert np.all((factors > 0.899) & (factors < 1.101))  # in half precision
    assert np.any(factors != 1.0)
    scripts("validate").main(raw, trained, states=2, members=4, forecasts=2, forecast_days=1, runs=2, days=2, levels=6)
    found = json.loads((trained / "validation.json").read_text())
    assert found["finite"]
    assert all(0.0 < value < 5.0 for value in found["one_step"]["forecast_spread_over_error"])
    scripts("package").main(raw, trained, out, states=5)
    states = held_suarez.truth(out)
    assert states.shape == (5, 32, 64, 9)
    assert np.abs(states.mean() - 1000.0) < 1.0
    assert "validation" in read_spherical_emulator(out, "held_suarez").card


def test_damping_gives_free_runs_the_variance_of_the_climate(scripts, tmp_path):
    # The truth is x' = 0.9 x + e. A forecast that multiplies by 0.95 makes twice its variance; 0.9 / 0.95 mends it.
    rng = np.random.default_rng(0)
    errors = rng.normal(size=(500, 2, 3, 4, 2))
    mask = np.repeat(np.triu(np.ones((3, 4)))[..., None], 2, axis=-1)
    errors = mask * (errors - errors.mean(0))
    starts = errors[:200] / np.sqrt(1 - 0.9**2)
    damping = scripts("damping")
    factors = damping.calibrated(
        lambda g, y: 0.95 * g * y,
        starts,
        errors,
        damping.variance(errors) / (1 - 0.9**2),
        path=tmp_path / "damping.npy",
        rounds=12,
        days=40,
        seed=0,
    )
    np.testing.assert_allclose(factors[mask > 0], 0.9 / 0.95, atol=0.02)
    np.testing.assert_array_equal(factors[mask == 0], 1.0)
