"""The twin experiment: what the demo writes, and what it and the Lorenz-96 benchmark claim of the filter."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import xarray
from conftest import BENCHMARKS, load_program
from typer.testing import CliRunner

from numpyro_diffusion_da import commands
from numpyro_diffusion_da.demos import lorenz96_demo as twin

SIZES = {"truths": 3, "cycles": 90, "spin_up": 30, "particles": 256, "seed": 1000}


def load(name):
    return load_program(BENCHMARKS / f"{name}.py")


def run_demo(folder):
    """Run `ndda demo` on the first truths of the benchmark: what it printed, its folder, and its run."""
    run_twin, runs = twin.run_twin, []

    def recorded(experiment, *priors, **settings):
        runs.append((experiment, settings, run_twin(experiment, *priors, **settings)))
        return runs[0][2]

    sizes = [word for name, n in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(n))]
    # Without optimizations the run computes some ten times as long, which is more than they cost in compiling.
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(twin, "run_twin", recorded)
            done = CliRunner().invoke(commands.app, ["demo", "--out", str(folder), *sizes], catch_exceptions=False)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert done.exit_code == 0
    ((experiment, settings, result),) = runs
    del settings["on_step"]
    return SimpleNamespace(printed=done.output, folder=folder, run=(experiment, settings), result=result)


@pytest.mark.slow
def test_the_demo_its_benchmark_and_what_they_claim(monkeypatch, tmp_path):
    """One test, because the run takes minutes, and the workers of a suite share no fixtures."""
    demo = run_demo(tmp_path / "new")
    writes_table_figure_and_files(demo)
    benchmark_writes_the_scores_of_the_same_run(demo, monkeypatch, tmp_path)
    fa_apf_on_the_emulator_beats_its_controls(demo)


def writes_table_figure_and_files(demo):
    assert twin.MAIN in demo.printed
    assert twin.ENKF in demo.printed
    scores = json.loads((demo.folder / "demo.json").read_text())["scores"]
    assert set(scores[twin.FREE]) == {*twin.COLUMNS, "conditioning"}
    # Weight: 1; draw: 16 forward + 32 vjp; background: 1 forward + 1 vjp of 16 particles. One conditioning serves all.
    assert scores[twin.GLOBAL]["passes"]["mean"] == pytest.approx(1 + 16 + 32 + 2 * 16 / 256)
    assert scores[twin.GLOBAL]["conditioning"]["mean"] == 1
    # Its weight: 2, for mean and variance each at a level of its own. Then 1 vjp for a product with random signs, and
    # ceil(20 / 256) = 1 for products that share the covariance: one for each of 20 observations, by 256 particles.
    # Moved ancestors are conditioned anew.
    assert scores[twin.MAIN]["passes"]["mean"] == pytest.approx(2 + 1 + 1 + 16 + 32 + 2 * 16 / 256)
    assert scores[twin.MAIN]["conditioning"]["mean"] == 2
    assert (demo.folder / "demo.png").stat().st_size > 10_000
    with xarray.open_datatree(demo.folder / "demo.nc", engine="h5netcdf") as tree:
        assert dict(tree["posterior/x"].sizes) == {"chain": 1, "draw": 256, "time": 90, "site": 40}
        assert tree["constant_data/x_true"].dims == ("time", "site")
        assert tree["observed_data/y"].dims == ("time", "observed_site")


def benchmark_writes_the_scores_of_the_same_run(demo, monkeypatch, tmp_path):
    """It makes the run of the demo, which is not made anew."""

    def recorded(experiment, *priors, on_step, **settings):
        assert (experiment, settings) == demo.run
        return demo.result

    monkeypatch.setattr(twin, "run_twin", recorded)
    load("lorenz96_twin").main(**SIZES, out=tmp_path / "twin.json")
    scores = json.loads((demo.folder / "demo.json").read_text())["scores"]
    assert json.loads((tmp_path / "twin.json").read_text())["scores"] == scores


def fa_apf_on_the_emulator_beats_its_controls(demo):
    """Comparisons by more than three standard errors of the difference."""
    result = demo.result
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
    # With an emulator of one pass the same filter is as good, with less than half of the passes.
    assert result.mean(twin.ONE_PASS, "rmse")[0] <= 1.05 * result.mean(twin.MAIN, "rmse")[0]
    assert result.mean(twin.ONE_PASS, "passes")[0] < 0.5 * result.mean(twin.MAIN, "passes")[0]


@pytest.mark.slow  # tests/test_package.py holds what must not be imported
def test_import_time_benchmark(tmp_path):
    out = tmp_path / "import.json"
    load("import_time").main(repeats=1, out=out)
    assert json.loads(out.read_text())["ratio"] > 0
