"""The benchmark programs, run small; and, slowly, the numbers they are there to show."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import typer

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


def run_program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A benchmark as a user would run it; an unoptimised compilation, because nothing here runs long."""
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "COLUMNS": "160"},
        check=False,
    )


def load(name: str):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_linear_gaussian_runs(tmp_path):
    out = tmp_path / "table.json"
    tiny = ("--seeds", "1", "--steps", "5", "--particles", "32", "--dims", "4")
    names = ("exact weights", "ensemble Kalman")
    chosen = [part for name in names for part in ("--filters", name)]
    done = run_program("linear_gaussian.py", *tiny, *chosen, "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["d"], row["qs"], row["rs"], row["filter"]) for row in rows] == [(4, 0.5, 0.5, name) for name in names]
    for row in rows:
        assert row["passes"] == 0.0  # a transition in closed form
        assert row["mean error SE"] is None
        assert 0.0 < row["mean error"] < 2.0
        assert 0.2 < row["variance ratio"] < 4.0
        assert row["filter"] in done.stdout
    assert (rows[0]["log evidence"] is None, rows[1]["log evidence"] is None) == (False, True)


def test_linear_gaussian_through_a_diffusion(tmp_path):
    out = tmp_path / "table.json"
    tiny = ("--seeds", "2", "--steps", "3", "--spin-up", "0", "--particles", "32", "--dims", "4", "--diffusion")
    done = run_program("linear_gaussian.py", *tiny, "--filters", "Dirac", "--out", str(out))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["passes"] == 1 + 16 * (1 + 2)  # the weight, then 16 levels of one forward pass and two products
    assert math.isfinite(row["mean error SE"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"filters": ["magic"]}, "no filter called magic"),
        ({"dims": [7]}, "no setting of dimension"),
        ({"steps": 5, "spin_up": 5}, "leaves none of 5"),
    ],
)
def test_linear_gaussian_refuses(arguments, sentence):
    given = {"filters": None, "dims": None, "seeds": 1, "steps": 40, "spin_up": 10, "particles": 8, "diffusion": False}
    with pytest.raises(typer.BadParameter, match=sentence):
        load("linear_gaussian").main(None, **{**given, **arguments})


def test_ring64_help():
    done = run_program("ring64.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


@pytest.mark.slow
def test_ring64_runs(tmp_path):
    out = tmp_path / "tables.json"
    done = run_program("ring64.py", "--points", "16", "--paths", "4", "--reference-levels", "8", "--out", str(out))
    assert done.returncode == 0, done.stderr
    tables = json.loads(out.read_text())
    assert tables["settings"]["points"] == 16
    assert all(row["sampler"][:10] in done.stdout for row in tables["samplers"])
    assert all(0.0 < row["error"] < 0.5 for row in tables["samplers"] + tables["solves"])


@pytest.mark.slow
def test_ring64_is_the_yardstick():
    """Both tables as published, to the last digit printed, or to the draw of the observations in the second."""
    ring64 = load("ring64")
    with jax.enable_x64(True):
        ring = ring64.Ring(64)
        samplers, solves = ring64.sampler_rows(ring), ring64.solve_rows(ring, 256, 400)
    errors = [round(row["error"], 3) for row in samplers]
    assert [errors[0], *errors[2:6], errors[7]] == [0.052, 0.026, 0.047, 0.052, 0.056, 0.088]
    assert [row["guided evaluations"] for row in samplers] == [94, 94, 32, 20, 20, 23, 23, 32, 16]
    published = [0.048, 0.199, 0.135, 0.062, 0.049, 0.051, 0.048, 0.079, 0.036]
    np.testing.assert_allclose([row["error"] for row in solves[:9]], published, atol=0.004)
    assert solves[9]["passes"] == 48  # the library's default
    assert solves[9]["error"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "name", "variance_ratio"),
    [
        (0, "Dirac", 0.88),
        (0, "exact weights", 1.00),
        (2, "exact weights", 0.96),
        (2, "Dirac", 0.72),
        (2, "Dirac + inflation", 1.02),
    ],
)
def test_linear_gaussian_is_the_yardstick(setting, name, variance_ratio):
    """Variance ratios of the published table, within the standard errors of both and the last digit printed."""
    benchmark = load("linear_gaussian")
    row = benchmark.run(
        benchmark.SETTINGS[setting], name, diffusion=False, seeds=8, steps=40, spin_up=10, particles=256
    )
    assert abs(row["variance ratio"] - variance_ratio) < 3 * math.sqrt(2) * row["variance ratio SE"] + 0.005
