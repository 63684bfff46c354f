"""The example programs, run small: that they run, and that they show what they say."""

from __future__ import annotations

import importlib.util
import sys

import jax
import pytest
from conftest import EXAMPLES, load_program


def program(name):
    return load_program(EXAMPLES / f"{name}.py").main


def whole(capsys):
    """What was printed, which no console of 80 columns has cut."""
    printed = capsys.readouterr().out
    assert "…" not in printed, printed
    return printed


@pytest.mark.slow
def test_linear_gaussian(capsys):
    with jax.numpy_rank_promotion("allow"):  # cuthbert's
        program("linear_gaussian")(particles=16, steps=3, dimension=2, seed=0)
    printed = whole(capsys)
    assert all(name in printed for name in ("FA-APF, exact", "bootstrap", "ensemble", "evidence"))


@pytest.mark.slow
def test_three_priors(capsys):
    program("three_priors")(particles=4, steps=3, fitted=100, seed=0)
    printed = whole(capsys)
    assert all(name in printed for name in ("emulator", "autoregression", "true equations"))


@pytest.mark.slow
def test_poisson_counts(capsys):
    program("poisson_counts")(particles=4, steps=3, seed=0)
    printed = whole(capsys)
    assert all(name in printed for name in ("free ensemble", "bootstrap", "equal weights", "FA-APF"))


@pytest.mark.slow
def test_online_loop_goes_on_where_it_was(tmp_path, capsys):
    small = {"particles": 4, "steps": 3, "seed": 0}
    for path, stop in (("stopped", 2), ("stopped", None), ("never", None)):
        program("online_loop")(out=tmp_path / f"{path}.npz", stop=stop, **small)
    printed = whole(capsys).splitlines()
    assert sum(line.startswith("resuming after step 2") for line in printed) == 1
    stopped, resumed, never = (line for line in printed if line.startswith("particles"))
    assert stopped != resumed == never


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(sys.version_info < (3, 12), reason="dynestyx needs Python 3.12 or newer")
@pytest.mark.skipif(importlib.util.find_spec("dynestyx") is None, reason="dynestyx is not installed")
def test_dynestyx_filter(capsys):
    with jax.numpy_rank_promotion("allow"):
        program("dynestyx_filter")(particles=4, steps=3, seed=0)
    printed = whole(capsys)
    assert all(name in printed for name in ("bootstrap", "ensemble Kalman", "FA-APF"))


@pytest.mark.slow
def test_latent_emulator(capsys):
    pytest.importorskip("optax")
    scores = program("latent_emulator")(steps=400, states=1500, cycles=20, particles=32, seed=0)
    assert "FA-APF, moved" in whole(capsys)
    assert scores["FA-APF, moved"]["RMSE"] < 0.5 * scores["free ensemble"]["RMSE"]
