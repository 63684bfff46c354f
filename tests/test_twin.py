"""The twin experiment: what the demo and the Lorenz-96 benchmark claim of the filter and its controls."""

import json

import numpy as np
import pytest
from conftest import BENCHMARKS, load_program

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.twin import BOOTSTRAP, FREE, GUIDED, MAIN, TwinExperiment, run_twin


def load(name):
    return load_program(BENCHMARKS / f"{name}.py")


@pytest.mark.slow
def test_fa_apf_on_the_emulator_beats_its_controls():
    """The first six truths of the benchmark; comparisons by more than three standard errors of the difference."""
    result = run_twin(TwinExperiment(cycles=120, spin_up=30), ndda.load_prior("lorenz96"), seed=1000, truths=6)
    rmse, _ = result.mean(MAIN, "rmse")
    ratio, _ = result.mean(MAIN, "spread_skill")
    assert rmse <= 1.05
    assert 0.9 <= ratio <= 1.15
    for score in ("rmse_observed", "rmse_unobserved", "crps"):
        for control in (FREE, BOOTSTRAP, GUIDED):
            gain = result.scores[control][score] - result.scores[MAIN][score]
            assert gain.mean() > 3 * gain.std(ddof=1) / np.sqrt(len(gain)), (control, score)


@pytest.mark.slow
def test_benchmark_runs_small(tmp_path):
    out = tmp_path / "twin.json"
    load("lorenz96_twin").main(truths=1, cycles=3, spin_up=1, particles=8, seed=0, out=out)
    assert json.loads(out.read_text())["scores"][MAIN]["passes"]["mean"] == 51


@pytest.mark.slow  # tests/test_package.py holds what must not be imported
def test_import_time_benchmark(tmp_path):
    out = tmp_path / "import.json"
    load("import_time").main(repeats=1, out=out)
    assert json.loads(out.read_text())["ratio"] > 0
