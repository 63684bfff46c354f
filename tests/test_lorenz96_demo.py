"""The twin experiment: what the demo and the Lorenz-96 benchmark claim of the filter and its controls."""

import json

import numpy as np
import pytest
from conftest import BENCHMARKS, load_program

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_demo as twin

COMPUTES_A_LOT = True


def load(name):
    return load_program(BENCHMARKS / f"{name}.py")


@pytest.mark.slow
def test_fa_apf_on_the_emulator_beats_its_controls():
    """The first six truths of the benchmark; comparisons by more than three standard errors of the difference."""
    result = twin.run_twin(
        twin.TwinExperiment(cycles=90, spin_up=30),
        ndda.load_prior("lorenz96"),
        ndda.load_prior("lorenz96_one_pass"),
        seed=1000,
        truths=6,
    )
    assert result.mean(twin.GLOBAL, "rmse")[0] <= 1.05
    assert result.mean(twin.MAIN, "rmse")[0] <= 0.9
    for name in (twin.GLOBAL, twin.MAIN):
        assert 0.9 <= result.mean(name, "spread_skill")[0] <= 1.15
    for score in ("rmse_observed", "rmse_unobserved", "crps"):
        for name, controls in {
            twin.GLOBAL: (twin.FREE, twin.BOOTSTRAP, twin.GUIDED),
            twin.MAIN: (twin.GLOBAL,),
        }.items():
            for control in controls:
                gain = result.scores[control][score] - result.scores[name][score]
                assert gain.mean() > 3 * gain.std(ddof=1) / np.sqrt(len(gain)), (name, control, score)


@pytest.mark.slow  # tests/test_package.py holds what must not be imported
def test_import_time_benchmark(tmp_path):
    out = tmp_path / "import.json"
    load("import_time").main(repeats=1, out=out)
    assert json.loads(out.read_text())["ratio"] > 0
