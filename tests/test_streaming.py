"""Particles in files: the same particles as in memory, and no more memory than a few batches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from conftest import OF_PROCESSES
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.inference import Kept, row_files

KEY = jax.random.key(5)
PARTICLES = 40


def model(y):
    """A pair as carry: a state of 80 bytes, which is in files, and a number, which is in memory."""

    def step(carry, y_t):
        x, count = carry
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
        numpyro.deterministic("largest", x.max())
        numpyro.sample("y", dist.Normal(x[::2], 0.4).to_event(1), obs=y_t)
        return (x, count + 1), None

    scan(step, (numpyro.sample("x0", dist.Normal(jnp.zeros(20), 1.0).to_event(1)), 0), y)


Y = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
Y[2, :3] = np.nan


def make(algorithm, directory, streamed=True, **settings):
    arguments = {"num_particles": PARTICLES, "num_chains": 2, "batch_size": 16, "progress_bar": False, **settings}
    return ndda.Filter(algorithm, directory=directory, stream_particles=streamed, **arguments)


def assert_same_trees(a, b):
    """Numbers may differ in their rounding: sums over particles do, and a compiler may fuse a batch otherwise."""
    assert a.groups == b.groups
    for group in a.groups:
        for name, values in a[group].data_vars.items():
            rounded = values.dtype.kind == "f"
            same = np.testing.assert_allclose if rounded else np.testing.assert_array_equal
            same(values.values, b[group][name].values, **({"rtol": 1e-4, "atol": 1e-5} if rounded else {}))
        assert {n: list(v.values) for n, v in a[group].coords.items()} == {
            n: list(v.values) for n, v in b[group].coords.items()
        }
    assert {**a.attrs, "batch_size": 0} == {**b.attrs, "batch_size": 0}


def compare(algorithm, tmp_path, **settings):
    streamed = make(algorithm, tmp_path / "streamed", **settings)
    streamed.run(KEY, Y)
    whole = make(algorithm, tmp_path / "whole", streamed=False, **settings)
    whole.run(KEY, Y)
    assert_same_trees(streamed.to_datatree(), whole.to_datatree())
    return streamed, whole


@pytest.mark.slow
def test_streamed_particles_are_those_in_memory(tmp_path):
    """Also the checksums of the lines: the run in memory goes on from the streamed one, and the other way round."""
    keep = {"x": Kept(mean=True, std=True, mantissa_bits=12), "largest": Kept()}
    streamed, whole = compare(ndda.Bootstrap(model), tmp_path, keep=keep)
    longer = np.concatenate([Y, Y[::-1]])
    for filter, directory in ((streamed, "whole"), (whole, "streamed")):
        filter.directory = tmp_path / directory
        filter.run(KEY, longer)
    assert_same_trees(streamed.to_datatree(), whole.to_datatree())
    assert streamed.result.posterior["x"].shape == (2, PARTICLES, 8, 20)


TAPER = ndda.Taper(3.0, ndda.Ring(20), {"y": np.arange(0, 20, 2)}, state=np.arange(20))
WIDER = (ndda.ForecastMultiplicative(1.05), ndda.RTPS(0.3), ndda.smc.Jitter(0.1), ndda.smc.RTPP(0.1))
ALGORITHMS = {
    "guided": lambda: ndda.GuidedPF(model),
    "moment": lambda: ndda.FAAPF(model),
    "tempered": lambda: ndda.FAAPF(model, weight=ndda.Dirac(), target_ess=0.5),
    "checked guided": lambda: ndda.GrossErrorCheck(ndda.FAAPF(model), 2.0, members=8),
    "carried weights": lambda: ndda.Bootstrap(model, resample_below=0.5),
    "blocks": lambda: ndda.FAAPF(model, taper=TAPER, move=False, inflation=[ndda.RTPS(0.3)]),
    "moved blocks": lambda: ndda.FAAPF(model, taper=TAPER),
    "moved": lambda: ndda.FAAPF(model, move=True, lag=2),
    "EnKF": lambda: ndda.EnKF(model, lag=2),
    "LETKF": lambda: ndda.EnKF(model, update=ndda.smc.SquareRoot(), taper=TAPER, inflation=WIDER),
    "EnKF with V": lambda: ndda.EnKF(model, transition_covariance=True, inflation=WIDER[:1]),
    "EnKF with V and taper": lambda: ndda.EnKF(model, transition_covariance=True, taper=TAPER),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_all_filters_stream(name, tmp_path, monkeypatch):
    """Batches of 16 of 40 particles, and of 8 of 20 places: neither divides the whole."""
    monkeypatch.setattr("numpyro_diffusion_da.smc.rows.LEAST_OF_COLUMNS", 1)
    settings = {"keep_forecasts": True} if name in ("moment", "tempered") else {}
    if name == "carried weights":
        settings = {"keep": {"x": Kept(quantiles=(0.1, 0.5)), "largest": Kept(quantiles=(0.1, 0.5))}}
    streamed, whole = compare(ALGORITHMS[name](), tmp_path, num_chains=1, **settings)
    if streamed.algorithm.lag:
        np.testing.assert_allclose(streamed.result.lagged, whole.result.lagged, atol=1e-5)


@pytest.mark.slow
def test_an_emulator_streams(small, tmp_path):
    prior = ndda.load_prior("lorenz96")

    def emulated(y):
        def step(x, y_t):
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x, sampler=ndda.Sampler.cheap()))
            numpyro.sample("y", dist.Normal(x[::2], 0.5).to_event(1), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x0", prior.climatology()), y)

    y = np.random.default_rng(0).normal(size=(2, 20)).astype(np.float32)
    results = []
    for streamed in (True, False):
        filter = make(ndda.FAAPF(emulated), tmp_path / str(streamed), streamed, num_particles=12, num_chains=1)
        filter.batch_size = 5
        filter.run(KEY, y)
        results.append(filter.result)
    a, b = results
    np.testing.assert_allclose(a.posterior["x"], b.posterior["x"], atol=2e-3)
    np.testing.assert_array_equal(a.sample_stats["ancestors"], b.sample_stats["ancestors"])


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[2])
import test_streaming as test
test.run_of_one_by_one(sys.argv[1])
"""


def run_of_one_by_one(directory):
    """Run with each particle moved by itself, so that a step takes a while."""
    make(ndda.Bootstrap(model), directory, num_particles=16, num_chains=1, batch_size=1).run(KEY, np.tile(Y, (2, 1)))


@pytest.mark.slow
def test_a_run_that_is_killed_inside_a_step_goes_on(tmp_path):
    directory = tmp_path / "killed.zarr"
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(directory), os.path.dirname(__file__)]
    chain = directory / ".run/chain0"
    for made in (2, 5):  # killed while the file of the next particles grows
        with subprocess.Popen(command, env={**os.environ, **OF_PROCESSES}) as process:
            while not ((chain / f"state-{made:08d}.npz").exists() and list(chain.glob("next.part/rows-1-*"))):
                assert process.poll() is None
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert list(chain.glob("next.part/rows-1-*"))
    run_of_one_by_one(directory)
    run_of_one_by_one(tmp_path / "whole.zarr")
    found, whole = xarray.open_datatree(directory), xarray.open_datatree(tmp_path / "whole.zarr")
    for group, node in whole.children.items():
        for name, values in node.data_vars.items():
            np.testing.assert_array_equal(found[group][name].values, values.values)


@pytest.mark.slow
def test_damaged_rows_are_named_and_the_step_is_made_again(tmp_path):
    filter = make(ndda.Bootstrap(model), tmp_path / "run", num_chains=1)
    filter.run(KEY, Y)
    before = filter.result.posterior["x"]
    longer = make(ndda.Bootstrap(model), tmp_path / "run", num_chains=1)
    (rows,) = (tmp_path / "run/.run/chain0/rows-00000004").iterdir()
    flipped = bytearray(rows.read_bytes())
    flipped[100] ^= 1
    rows.write_bytes(flipped)
    with pytest.warns(UserWarning, match="rows-00000004.*damaged.*goes on from an earlier state"):
        longer.run(KEY, np.concatenate([Y, Y[:1]]))
    np.testing.assert_array_equal(longer.result.posterior["x"][:, :, :4], before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"directory": None}, "no directory"), ({"mesh": jax.make_mesh((1,), ("particles",))}, "a mesh")],
)
def test_streaming_that_has_no_place_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(ndda.Bootstrap(model), **{"directory": tmp_path, **settings})


def test_row_files_read_rows_in_any_order(tmp_path):
    rows = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    file = row_files.RowFile(tmp_path / "rows", 9, (3,), rows.dtype)
    for start in (3, 0, 6):
        file.write(start, rows[start : start + 3])
    for indices in (np.arange(9), np.array([8, 1, 1, 2, 5]), np.array([4])):
        np.testing.assert_array_equal(file.read(indices), rows[indices])
        np.testing.assert_array_equal(file.read_columns(1, 3, indices), rows[indices, 1:])
    by_columns = row_files.RowFile(tmp_path / "columns", 9, (3,), rows.dtype)
    for first, stop in ((1, 3), (0, 1)):
        by_columns.write_columns(first, rows[:, first:stop])
    assert by_columns.checksum() == file.checksum()


@pytest.mark.slow
def test_particles_that_do_not_fit_are_streamed_by_themselves(monkeypatch, tmp_path):
    monkeypatch.setattr("numpyro_diffusion_da.inference.streamed_run.host_memory", lambda: 1000)
    monkeypatch.setattr("numpyro_diffusion_da.inference.stored_run.host_memory", lambda: 1000)
    keep = {"x": Kept(mean=True, std=True)}
    filter = make(ndda.Bootstrap(model), tmp_path / "run", None, num_chains=1, keep=keep)
    filter.run(KEY, Y[:2])
    assert list((tmp_path / "run/.run/chain0").glob("rows-00000002/*"))
    tree = filter.to_datatree()
    x, stats = tree["posterior/x"].values, tree["sample_stats"]
    np.testing.assert_allclose(tree["posterior_mean/x"], x.mean(1), atol=1e-5)
    np.testing.assert_allclose(tree["posterior_std/x"], x.std(1, ddof=1), atol=1e-5)
    squares = (Y[:2] - x[..., ::2]) ** 2
    np.testing.assert_allclose(tree["log_likelihood/y"], -squares / 0.32 - np.log(0.4 * np.sqrt(2 * np.pi)), atol=1e-4)
    for t in range(2):
        assert len(np.unique(x[0, :, t], axis=0)) == stats["distinct_ancestors"][0, t]
    with pytest.raises(MemoryError, match="do not fit into memory; use to_datatree"):
        _ = filter.result
