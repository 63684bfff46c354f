"""The command `ndda`, as a user types it."""

import json
from pathlib import Path

import pytest
import xarray
from conftest import BENCHMARKS, load_program
from typer.testing import CliRunner

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import cli
from numpyro_diffusion_da.demos import lorenz96_demo as twin


@pytest.mark.slow
def test_demo_and_benchmark_write_table_figure_and_files(tmp_path, monkeypatch):
    """The benchmark makes the same run, which is not made anew."""
    runs, run_twin = [], twin.run_twin

    def recorded(*args, on_step, **settings):
        if not runs:
            runs.append((args, settings, run_twin(*args, on_step=on_step, **settings)))
        (experiment, _), before, result = runs[0]
        assert (args[0], settings) == (experiment, before)
        return result

    monkeypatch.setattr(twin, "run_twin", recorded)
    arguments = ["demo", "--out", str(tmp_path / "new"), "--truths", "2", "--cycles", "3", "--spin-up", "1"]
    result = CliRunner().invoke(cli.app, [*arguments, "--particles", "8"], catch_exceptions=False)
    assert result.exit_code == 0
    assert twin.MAIN in result.output
    assert twin.ENKF in result.output
    scores = json.loads((tmp_path / "new" / "demo.json").read_text())["scores"]
    assert set(scores[twin.FREE]) == set(twin.COLUMNS)
    # Weight: 2, of which one conditions; draw: 1 + 16 forward + 32 vjp; background of 8 particles: 2 forward + 1 vjp.
    assert scores[twin.GLOBAL]["passes"]["mean"] == 51 + 3
    # Its weight: 4, for mean and variance each at a level of its own. Then 1 vjp for a product with random signs, and
    # ceil(20 / 8) = 3 for products that share the covariance: one for each of 20 observations, made by 8 particles.
    assert scores[twin.MAIN]["passes"]["mean"] == 49 + 4 + 1 + 3 + 3
    assert (tmp_path / "new" / "demo.png").stat().st_size > 10_000
    with xarray.open_datatree(tmp_path / "new" / "demo.nc", engine="h5netcdf") as tree:
        assert dict(tree["posterior/x"].sizes) == {"chain": 1, "draw": 8, "time": 3, "site": 40}
        assert tree["constant_data/x_true"].dims == ("time", "site")
        assert tree["observed_data/y"].dims == ("time", "observed_site")
    benchmark, out = load_program(BENCHMARKS / "lorenz96_twin.py"), tmp_path / "twin.json"
    benchmark.main(truths=2, cycles=3, spin_up=1, particles=8, seed=0, out=out)
    assert json.loads(out.read_text())["scores"] == scores


def test_demo_of_an_unknown_system_is_refused(tmp_path):
    result = CliRunner().invoke(cli.app, ["demo", "jupiter", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "'jupiter' is not one of" in result.output
    assert "held_suarez" in result.output


def test_demo_refuses_what_leaves_nothing_to_score(tmp_path):
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path), "--cycles", "5", "--spin-up", "5"])
    assert result.exit_code == 2
    assert "more cycles" in result.output


@pytest.mark.parametrize("which", ["lorenz96", "held_suarez"])
def test_demo_refuses_at_once_a_folder_that_it_cannot_write_to(which, tmp_path, monkeypatch):
    def computed(*args):
        raise AssertionError("computed before the folder was checked")

    monkeypatch.setattr(cli, "_lorenz96", computed)
    monkeypatch.setattr(cli, "_held_suarez", computed)
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    outs = [tmp_path / "file", tmp_path / "file" / "below", tmp_path / "nowhere"]
    for out in (*outs, *(Path(name) for name in ("/proc/demo",) if Path("/proc").is_dir())):
        result = CliRunner().invoke(cli.app, ["demo", which, "--out", str(out)], env={"COLUMNS": "300"})
        assert result.exit_code == 2, result.output
        assert "cannot write to" in result.output
        assert "give a folder" in result.output
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["info", "--help"]])
def test_help(arguments):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_info_names_versions_and_card():
    result = CliRunner().invoke(cli.app, ["info"], catch_exceptions=False)
    assert ndda.__version__ in result.output
    assert "lorenz96" in result.output
    assert "noise_variance" in result.output


def test_wrong_experiments():
    with pytest.raises(ValueError, match="error_variance=0"):
        twin.TwinExperiment(error_variance=0.0)
    with pytest.raises(ValueError, match="truths=0"):
        twin.run_twin(twin.TwinExperiment(), ndda.load_prior("lorenz96"), truths=0)
