"""A run that dies goes on, and gives what it would have given."""

from __future__ import annotations

import copy
import errno
import os
import pathlib
import pickle
import re
import shutil
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
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from typer.testing import CliRunner

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da import commands
from numpyro_diffusion_da.inference import storage

KEY = jax.random.key(3)


def program_of(small, error):
    """A program with a pair as its carry and a site whose name no file could have."""
    prior = ndda.GaussianPrior(small.transition, small.covariance)

    def model(y):
        x0 = numpyro.sample("x0", prior.climatology())

        def step(carry, y_t):
            before, x = carry
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
            numpyro.deterministic("mean:of both", (x + before).mean())
            numpyro.sample("y", dist.Normal(x[::2], error).to_event(1), obs=y_t)
            return (x, x), None

        scan(step, (x0, x0), y)

    return model


@pytest.fixture(scope="module")
def program(small):
    return program_of(small, small.error), small.simulate(2, 4)[1].astype(np.float32)


def make(model, algorithm=ndda.Bootstrap, **settings):
    arguments = {"num_particles": 8, "num_chains": 2, "progress_bar": False, **settings}
    return ndda.Filter(algorithm(model), **arguments)


@pytest.fixture(scope="module")
def whole(program):
    """The run that never dies; nothing on disk."""
    model, y = program
    filter = make(model)
    filter.run(KEY, y)
    return filter


def writing(filter, directory):
    """The same filter, compiled already, with a directory and no run yet."""
    other = copy.copy(filter)
    other.directory, other._result = directory, None
    return other


@pytest.fixture(scope="module")
def kept_run(program, whole, tmp_path_factory):
    """A directory with a run of two steps."""
    directory = tmp_path_factory.mktemp("run")
    writing(whole, directory).run(KEY, program[1][:2])
    return directory


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.posterior, b.posterior)
    jax.tree.map(np.testing.assert_array_equal, a.sample_stats, b.sample_stats)
    jax.tree.map(np.testing.assert_array_equal, a.posterior_predictive, b.posterior_predictive)
    assert a.attributes == b.attributes


class Killed(BaseException):
    """As by the machine."""


@pytest.fixture(scope="module")
def compiled_for_single_steps(program):
    return make(program[0])


@pytest.fixture
def single(compiled_for_single_steps):
    """A filter that commits each step by itself, so that a run of few steps has several commits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numpyro_diffusion_da.inference.chunks.LONGEST", 1)
        yield compiled_for_single_steps


@pytest.mark.parametrize(
    "when",
    [
        *(
            pytest.param(when, marks=pytest.mark.slow)
            for when in ("within the values", "before the lines", "within a line")
        ),
        "before the state",
    ],
)
def test_a_run_that_died_goes_on(program, whole, single, tmp_path, monkeypatch, when):
    """The sixth step is the second of the second chain."""
    _, y = program
    saved = []
    save = storage.RunStore.save

    def dying(store, chain, first, *rest):
        saved.append(first)
        if len(saved) == 6 and when == "within the values":
            monkeypatch.setattr(storage, "_crc", _die)
        if len(saved) == 6 and when == "before the lines":
            monkeypatch.setattr(storage.os, "fsync", _die)
        if len(saved) == 6 and when in ("before the state", "within a line"):
            monkeypatch.setattr(storage, "_replace_arrays", _die)
        save(store, chain, first, *rest)

    monkeypatch.setattr(storage.RunStore, "save", dying)
    with pytest.raises(Killed):
        writing(single, tmp_path / "run").run(KEY, y)
    monkeypatch.undo()
    if when == "within a line":
        lines = tmp_path / "run/.run/chain1/steps.jsonl"
        lines.write_bytes(lines.read_bytes()[:-30])
    again = writing(single, tmp_path / "run")
    again.run(KEY, y)
    assert_same(whole.result, again.result)
    # Finished: nothing is computed any more, and another reader finds the same.
    monkeypatch.setattr(storage.RunStore, "save", lambda *args: pytest.fail("a step was made again"))
    read = writing(single, tmp_path / "run")
    read.run(KEY, y)
    assert_same(whole.result, read.result)


def _die(*args):
    raise Killed


def test_xarray_alone_opens_the_directory(program, whole, single, tmp_path):
    """During the run and after it, with the labels of the filter, lazily, and as the tree of the result."""
    _, y = program
    labeled = writing(single, tmp_path / "run.zarr")
    times = np.datetime64("2020-01-01", "ns") + np.arange(4) * np.timedelta64(6, "h")
    labeled.time, labeled.dims, labeled.coords = times, {"y": ["station"]}, {"station": ["Oslo", "Bergen"]}
    labeled.run(KEY, y)
    code = (
        "import sys, xarray; tree = xarray.open_datatree(sys.argv[1]); "
        "assert 'numpyro_diffusion_da' not in sys.modules and 'jax' not in sys.modules; "
        "print(float(tree['posterior/x'].sel(time='2020-01-01T12').sum()), *tree['observed_data/station'].values)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run.zarr"], capture_output=True, text=True, check=True
    )
    total, *stations = out.stdout.split()
    np.testing.assert_allclose(float(total), whole.result.posterior["x"][:, :, 2].sum(), rtol=1e-5)
    assert stations == ["Oslo", "Bergen"]
    assert labeled.to_arviz()["posterior"]["time"].values[0] == times[0]
    tree, expected = labeled.to_datatree(), whole.to_datatree(time=times, dims=labeled.dims, coords=labeled.coords)
    assert not tree["posterior/x"].variable._in_memory
    for name, group in expected.children.items():
        assert set(group.data_vars) == set(tree[name].data_vars)
        for variable in group.data_vars:
            np.testing.assert_array_equal(group[variable], tree[name][variable], err_msg=f"{name}/{variable}")
            assert group[variable].dims == tree[name][variable].dims


@pytest.mark.slow
def test_a_longer_series_goes_on_from_a_shorter(program, whole, tmp_path):
    """The longer one by a filter that shares nothing with the first, as in another process."""
    model, y = program
    writing(whole, tmp_path).run(KEY, y[:2])
    longer = make(model, directory=tmp_path)
    longer.run(KEY, y)
    assert_same(whole.result, longer.result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_particles": 9}, "holds a run with num_particles = 8"),
        ({"key": jax.random.key(4)}, "holds a run with seed"),
        ({"y": 1.0}, "step 0 in .* was run with other observations"),
        ({"keep": ["x"]}, "holds a run with keep = None"),
        ({"keep_observed": False}, "holds a run with keep_observed = True"),
        ({"error": 0.4}, r"another program: constant \d+ of the step, of shape \(1,\), has changed"),
    ],
)
def test_another_run_is_refused(small, program, kept_run, change, message):
    model, y = program
    settings = {name: value for name, value in change.items() if name.startswith(("num", "keep"))}
    if "error" in change:
        model = program_of(small, change["error"])
    with pytest.raises(ValueError, match=message):
        make(model, directory=kept_run, **settings).run(change.get("key", KEY), y[:2] + change.get("y", 0.0))


@pytest.mark.slow
def test_only_what_is_wanted_is_kept(program):
    model, y = program
    filter = make(model, ndda.Bootstrap, keep=["mean:of both"])
    filter.run(KEY, y)
    assert set(filter.result.posterior) == {"mean:of both"}
    assert filter.result.posterior["mean:of both"].shape == (2, 8, 4)
    assert set(filter.to_datatree()["posterior"].data_vars) == {"mean:of both"}
    filter.print_summary()
    bare = make(model, ndda.Bootstrap, keep_observed=False)
    bare.run(KEY, y)
    np.testing.assert_array_equal(bare.result.posterior["mean:of both"], filter.result.posterior["mean:of both"])
    assert set(bare.to_datatree().children) == {"posterior", "observed_data", "constant_data", "sample_stats"}
    bare.to_arviz()
    with pytest.raises(ValueError, match=r"keep names \['z'\]"):
        make(model, keep=["z"]).run(KEY, y)
    with pytest.raises(ValueError, match="keep='x'"):
        make(model, keep="x")


def test_reductions_some_steps_and_fewer_digits(program, whole, tmp_path):
    model, y = program
    Kept = ndda.inference.Kept
    keep = {
        "x": Kept(every=3, mantissa_bits=10, mean=True, std=True, quantiles=(0.1, 0.9)),
        "mean:of both": Kept(particles=False, mean=True),
    }
    filter = make(model, directory=tmp_path / "run.zarr", keep=keep)
    filter.run(KEY, y)
    tree, x = filter.to_datatree(), whole.result.posterior["x"]
    kept = tree["posterior/x"].values
    assert set(tree["posterior"].data_vars) == {"x"}
    assert np.isnan(kept[:, :, [0, 1]]).all()
    np.testing.assert_allclose(kept[:, :, [2, 3]], x[:, :, [2, 3]], rtol=2.0**-11)
    assert (kept[:, :, 2] != x[:, :, 2]).any()
    assert not list((tmp_path / "run.zarr/posterior/x/c").glob("0/0/0/9"))
    np.testing.assert_allclose(tree["posterior_mean/x"], x.mean(1), atol=1e-6)
    np.testing.assert_allclose(tree["posterior_std/x"], x.std(1, ddof=1), rtol=1e-5)
    quantiles = tree["posterior_quantile/x"]
    assert quantiles.dims[:3] == ("chain", "time", "quantile")
    np.testing.assert_allclose(quantiles.sel(quantile=0.9), np.quantile(x, 0.9, axis=1), atol=1e-6)
    np.testing.assert_allclose(
        filter.result.reduced["mean"]["mean:of both"], whole.result.posterior["mean:of both"].mean(1), atol=1e-6
    )
    filter.print_summary()
    # Steps that are not kept are not damage, and the run is known by what it keeps.
    filter.run(KEY, y)
    with pytest.raises(ValueError, match="holds a run with keep"):
        make(model, directory=tmp_path / "run.zarr").run(KEY, y)
    reduced = make(model, keep={"x": Kept(particles=False, mean=True)})
    reduced.run(KEY, y)
    assert reduced.result.posterior == {}
    np.testing.assert_allclose(reduced.to_datatree()["posterior_mean/x"], x.mean(1), atol=1e-6)
    reduced.print_summary()
    for wrong, message in (
        (lambda: make(model, keep={"x": Kept(every=2)}), "but no directory"),
        (lambda: make(model, keep={"x": "mean"}), r"keep\['x'\]"),
        (lambda: Kept(particles=False), "keeps nothing"),
        (lambda: Kept(quantiles=(0.9, 0.1)), "increasing numbers between 0 and 1"),
        (lambda: Kept(mantissa_bits=24), "give 1 to 23"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrong()


@pytest.fixture
def copied(kept_run, tmp_path):
    """A copy of the run of two steps, to be damaged."""
    return pathlib.Path(shutil.copytree(kept_run, tmp_path / "copied"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "a flipped bit of values": (
        "posterior/x/c/1/0/0/0",
        flip,
        r"steps, .* 0, are damaged in chain 1 .*posterior/x cannot",
    ),
    "values cut off": ("log_likelihood/y/c/1/0/0/0", truncate, r"damaged in chain 1 .*log_likelihood/y cannot"),
    "values deleted": ("posterior/x/c/1/0/0/0", pathlib.Path.unlink, "posterior/x is not what was written"),
    "a line deleted": (".run/chain1/steps.jsonl", pathlib.Path.unlink, "its line is missing"),
    "a flipped bit of a state": (".run/chain1/state-00000002.npz", flip, r"state-00000002.npz' is damaged"),
}


SLOW_DAMAGES = ("values cut off", "values deleted", "a line deleted")


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_DAMAGES else name for name in DAMAGES]
)
def test_what_is_damaged_is_named_and_made_again(program, whole, single, copied, damage):
    name, act, message = DAMAGES[damage]
    act(copied / name)
    again = writing(single, copied)
    with pytest.warns(UserWarning, match=message):
        again.run(KEY, program[1])
    assert_same(again.result, whole.result)


@pytest.mark.parametrize("name", [".run/run.json", ".run/program.json", ".run/layout.npz"])
def test_damaged_files_of_settings_are_named(program, whole, copied, name):
    truncate(copied / name)
    with pytest.raises(ValueError, match=f"{name}' is damaged"):
        writing(whole, copied).run(KEY, program[1])


@pytest.mark.parametrize(
    ("name", "steps"), [("zarr.json", 2), ("posterior/x/zarr.json", 4), ("sample_stats/time/c/0", 2)]
)
def test_damaged_metadata_and_coordinates_are_put_back(program, whole, copied, tmp_path, name, steps):
    """In a run that is whole, and in one that goes on: the directory is that of a run without damage."""
    writing(whole, tmp_path / "undamaged").run(KEY, program[1][:steps])
    truncate(copied / name)
    with pytest.warns(UserWarning, match=f"{name}' is damaged or missing, and written again"):
        writing(whole, copied).run(KEY, program[1][:steps])
    found, expected = (xarray.open_datatree(d, engine="zarr") for d in (copied, tmp_path / "undamaged"))
    xarray.testing.assert_identical(found, expected)


def test_values_and_states_of_another_chain_are_made_again(program, whole, copied):
    shutil.copy(copied / "posterior/x/c/0/0/0/0", copied / "posterior/x/c/1/0/0/0")
    shutil.copy(copied / ".run/chain0/state-00000002.npz", copied / ".run/chain1/state-00000002.npz")
    again = writing(whole, copied)
    with pytest.warns(UserWarning, match=r"belongs to another run, chain or step|is not what was written"):
        again.run(KEY, program[1])
    assert_same(again.result, whole.result)


def test_a_folder_of_something_else_is_refused(program, whole, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(ValueError, match="holds something that is no run of this library"):
        writing(whole, tmp_path).run(KEY, program[1])


@pytest.mark.slow
def test_a_full_disk_loses_nothing(program, whole, single, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_replace_arrays", _full)
    with pytest.raises(OSError, match=r"step 0 of chain 0 could not be written to .*No space left.* the run goes on"):
        writing(single, tmp_path / "run").run(KEY, program[1])
    monkeypatch.undo()
    again = writing(single, tmp_path / "run")
    again.run(KEY, program[1])
    assert_same(again.result, whole.result)


def _full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_can_be_watched(whole, kept_run, tmp_path):
    progress = ndda.inference.RunProgress.read(kept_run)
    assert (progress.chains, progress.steps, progress.done) == (2, 2, 4)
    np.testing.assert_allclose(progress.series("ess"), whole.result.sample_stats["ess"][:, :2], rtol=1e-6)
    expected = whole.result.background["y"].expected[1, 1].sum()
    ratio = (whole.result.departure("y")[1, 1] ** 2).sum() / expected
    np.testing.assert_allclose(progress.series("departure_ratio.y")[1][1], ratio, rtol=1e-5)
    shown = CliRunner().invoke(commands.app, ["watch", str(kept_run), "--figure", str(tmp_path / "run.png")])
    assert shown.exit_code == 0, shown.output
    assert re.search(r"^4 of 4 steps, [\d,]+ particles per second *$", shown.output, re.MULTILINE), shown.output
    assert shown.output.endswith("\n")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    refused = CliRunner().invoke(commands.app, ["watch", str(tmp_path)], env={"COLUMNS": "300"})
    assert refused.exit_code == 2
    assert "holds no run" in refused.output


KILLED = """
import sys, time
import jax, numpy as np
import numpyro_diffusion_da as ndda
sys.path.insert(0, sys.argv[2])
from test_storage import _module_level
y = np.sin(np.arange(300, dtype=np.float32))
run = ndda.Filter(ndda.Bootstrap(_module_level), num_particles=50, progress_bar=False, directory=sys.argv[1])
print("begins", flush=True)
run.run(jax.random.key(3), y)
"""


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path):
    """The process is killed again and again; a short last run finishes, with the particles of a run without kills."""
    y = np.sin(np.arange(300, dtype=np.float32))
    make_ = lambda directory: ndda.Filter(  # noqa: E731
        ndda.Bootstrap(_module_level), num_particles=50, progress_bar=False, directory=directory
    )
    lines = tmp_path / "run/.run/chain0/steps.jsonl"
    slowly = KILLED.replace("print(", "ndda.inference.chunks.LONGEST = 1; print(")  # each step is a commit
    command = [sys.executable, "-W", "ignore", "-c", slowly, str(tmp_path / "run"), str(pathlib.Path(__file__).parent)]
    for moment in np.random.default_rng(0).uniform(0.0, 0.2, 4):  # seconds after the first commit of a process
        before = lines.stat().st_size if lines.exists() else 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **OF_PROCESSES}) as process:
            while not (lines.exists() and lines.stat().st_size > before):
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(moment)
            assert process.poll() is None
            process.kill()
    again, fresh = make_(tmp_path / "run"), make_(None)
    again.run(KEY, y)
    fresh.run(KEY, y)
    assert_same(again.result, fresh.result)


def test_a_directory_has_one_owner(program, whole, copied):
    owner = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); "
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", owner, str(copied / ".run/lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="copied' is in use by another run"):
            writing(whole, copied).run(KEY, program[1])
        other.kill()  # a process that is killed leaves nothing behind
    writing(whole, copied).run(KEY, program[1])


@pytest.mark.slow
def test_what_is_not_kept_is_not_missed(tmp_path):
    y = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    settings = {"keep": ["mean:of both"], "keep_observed": False}
    filter = make(_module_level, directory=tmp_path, num_chains=1, **settings)
    filter.run(KEY, y[:2])
    filter.run(KEY, y)
    fresh = writing(filter, None)
    fresh.run(KEY, y)
    assert_same(filter.result, fresh.result)
    assert set(filter.result.posterior) == {"mean:of both"}
    assert filter.result.posterior_predictive == {}


@pytest.mark.slow
def test_numbers_of_any_library_are_settings(tmp_path):
    model, y = _module_level, np.zeros(1, np.float32)
    settings = {"num_particles": np.int64(8), "num_chains": 1, "directory": tmp_path, "progress_bar": False}
    for _ in range(2):
        ndda.Filter(ndda.Bootstrap(model, target_ess=np.float32(0.25)), **settings).run(KEY, y)
    plain = {**settings, "num_particles": 8}
    ndda.Filter(ndda.Bootstrap(model, target_ess=0.25), **plain).run(KEY, y)
    with pytest.raises(TypeError, match="whole number"):
        ndda.Filter(ndda.Bootstrap(model), num_particles=2.5)


@pytest.mark.slow
def test_a_carry_with_a_random_key_goes_on(tmp_path):
    def model(y):
        def step(carry, y_t):
            x, key = carry
            x = numpyro.sample("x", dist.Normal(x + 0.1 * jax.random.normal(key), 0.5))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            return (x, jax.random.split(key)[0]), None

        scan(step, (0.0, jax.random.key(1)), y)

    y = np.array([0.1, 0.2, 0.3], np.float32)
    filter = make(model, ndda.Bootstrap, directory=tmp_path, num_chains=1)
    filter.run(KEY, y[:2])
    filter.run(KEY, y)
    fresh = writing(filter, None)
    fresh.run(KEY, y)
    assert_same(filter.result, fresh.result)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_run_that_ends_early_leaves_its_own_steps_and_no_older_result(program, whole, monkeypatch, error):
    filter = writing(whole, None)
    filter._result = whole.result
    made = []

    def stop(records, *args):
        made.append(records)
        if len(made) == 2:
            raise error

    monkeypatch.setattr("numpyro_diffusion_da.inference.filter.check_records", stop)
    if error is KeyboardInterrupt:
        with pytest.warns(UserWarning, match="interrupted; `result` holds 1 of 4 steps"), pytest.raises(error):
            filter.run(KEY, program[1])
        np.testing.assert_array_equal(filter.result.posterior["x"], whole.result.posterior["x"][:1, :, :1])
    else:
        with pytest.raises(error):
            filter.run(KEY, program[1])
        with pytest.raises(RuntimeError, match="its last run failed"):
            _ = filter.result


@pytest.mark.slow
def test_a_filter_that_has_run_can_be_copied_and_pickled(program, whole):
    linear = ndda.Filter(ndda.Bootstrap(_module_level), num_particles=8, progress_bar=False)
    linear.run(KEY, np.zeros(2, np.float32))
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert_same(other.result, linear.result)
        other.run(KEY, np.zeros(2, np.float32))
        assert_same(other.result, linear.result)
    online = ndda.OnlineFilter(ndda.Bootstrap(_module_level), num_particles=8)
    state = online.init(KEY, np.zeros(1, np.float32))
    again = pickle.loads(pickle.dumps(online)).init(KEY, np.zeros(1, np.float32))
    jax.tree.map(np.testing.assert_array_equal, state, again)


def _module_level(y):
    def step(x, y_t):
        before, x = x, numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.deterministic("mean:of both", (x + before) / 2)
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def _computed(error=0.3, df=4.0, start=1.0, forcing=(0.0, 0.1), rho=0.5, power=1.0, mean=0.0, **filter):
    """Identity of a small run, in which each argument changes one thing that a few probes would not see."""
    forced = jnp.asarray(forcing)

    def model(y, late, bias):
        x0 = numpyro.sample("x0", dist.Normal(mean, start).expand([2]).to_event(1))
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))

        def step(x, t):
            x = numpyro.sample("x", dist.Normal(0.9 * x + forced[t] + level, 0.5).to_event(1))
            numpyro.sample("y", dist.StudentT(df, x + bias, jnp.where(t > 0, late, error)).to_event(1), obs=y[t])
            with handlers.scale(scale=power):
                numpyro.sample("z", dist.MultivariateNormal(x, jnp.array([[1.0, rho], [rho, 1.0]])), obs=jnp.ones(2))
            return x, None

        scan(step, x0, jnp.arange(2))

    late, bias, y = (filter.pop(name, default) for name, default in (("late", 0.3), ("bias", 0.0), ("y", 0.0)))
    conditioned = handlers.condition(model, {"level": jnp.asarray(filter.pop("level", 0.0))})
    run = ndda.Filter(ndda.Bootstrap(conditioned, **filter), num_particles=4, progress_bar=False)
    program = run._prepared((jnp.full((2, 2), y), jnp.asarray(late), bias), {})
    xs = jax.tree.map(lambda x: x[0], program.time_inputs())
    return run._identity(program, ndda.smc.bootstrap.init(jnp.zeros((4, 2))), xs)


def _last(key, weights, number):
    return jnp.full(number, jnp.argmax(weights))


def _first(key, weights, number):
    return jnp.full(number, jnp.argmin(weights))


_first.__name__ = "_last"

CHANGES = {
    "law of the initial state": ({"start": 2.0}, {}, "the initial state"),
    "its mean": ({"mean": 1.0}, {}, "the initial state"),
    "an error that matters later": ({"late": 0.5}, {}, "argument 'late'"),
    "a plain argument": ({"bias": 0.5}, {}, "argument 'bias'"),
    "observations taken by index": ({"y": 1.0}, {}, "argument 'y'"),
    "a conditioned value": ({"level": 0.5}, {}, "of the step"),
    "a forcing in the closure": ({"forcing": (0.0, 0.2)}, {}, "constant .* of the step"),
    "degrees of freedom": ({"df": 5.0}, {}, "of the step"),
    "a correlation of errors": ({"rho": 0.6}, {}, "of the step"),
    "a power of the likelihood": ({"power": 0.5}, {}, "of the step"),
    "another resampling of the same name": (
        {"resampling": _first},
        {"resampling": _last},
        "the operations of the step",
    ),
}


@pytest.fixture(scope="module")
def unchanged():
    return _computed()


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_known_by_what_it_computes(unchanged, change):
    new, old, where = CHANGES[change]
    before, after = _computed(**old) if old else unchanged, _computed(**new)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    assert any(re.search(where, name) for name in changed), changed


@pytest.mark.slow
def test_what_computes_the_same_has_one_identity(program, unchanged):
    """Also of a program that is made again, and of a filter that only now is traced."""
    assert _computed() == unchanged
    assert _computed(resampling=_last) == _computed(resampling=_last)

    def of_faapf():
        run = make(program[0], ndda.FAAPF, num_chains=1)
        prepared = run._prepared((program[1],), {})
        xs = jax.tree.map(lambda x: x[0], prepared.time_inputs())
        particles = (jnp.zeros((8, 4)), jnp.zeros((8, 4)))
        return run._identity(prepared, ndda.smc.fa_apf.init(particles), xs)

    assert of_faapf() == of_faapf()
