"""A run that dies goes on, and gives what it would have given."""

from __future__ import annotations

import copy
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
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


@pytest.mark.parametrize("when", ["before the outputs", "before the state", "after the state"])
def test_a_run_that_died_goes_on(program, whole, tmp_path, monkeypatch, when):
    _, y = program
    written = []
    replace_arrays = storage._replace_arrays

    def dying(path, arrays):
        written.append(path.name)
        # The sixth step is the second of the second chain.
        count = sum(name.startswith("step") for name in written)
        if count == 6 and path.name.startswith("step") and when == "before the outputs":
            raise Killed
        if count == 6 and path.name == "state.npz" and when == "before the state":
            raise Killed
        replace_arrays(path, arrays)
        if count == 6 and path.name == "state.npz" and when == "after the state":
            raise Killed

    monkeypatch.setattr(storage, "_replace_arrays", dying)
    with pytest.raises(Killed):
        writing(whole, tmp_path / "run").run(KEY, y)
    monkeypatch.undo()
    again = writing(whole, tmp_path / "run")
    again.run(KEY, y)
    assert_same(whole.result, again.result)
    # Finished: nothing is computed any more, and another reader finds the same.
    monkeypatch.setattr(storage, "_replace_arrays", lambda path, arrays: pytest.fail("a step was made again"))
    read = writing(whole, tmp_path / "run")
    read.run(KEY, y)
    assert_same(whole.result, read.result)


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


@pytest.fixture
def copied(kept_run, tmp_path):
    """A copy of the run of two steps, to be damaged."""
    return pathlib.Path(shutil.copytree(kept_run, tmp_path / "copied"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES = {
    "flipped": (flip, "is damaged"),  # the first, because the others leave no archive to flip a bit of
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "no archive": (lambda path: path.write_text("text"), "is damaged"),
    "deleted": (lambda path: path.unlink(), "is missing"),
}


def test_a_damaged_step_is_named_and_the_chain_is_computed_again_as_advised(program, whole, copied):
    """Each damage to the same directory: the next one writes over it or deletes it."""
    again = writing(whole, copied)
    for act, message in DAMAGES.values():
        act(copied / "chain1" / "step00000.npz")
        with pytest.raises(ValueError, match=rf"chain1/step00000.npz' {message}; delete the folder of the chain"):
            again.run(KEY, program[1])
    shutil.rmtree(copied / "chain1")
    again.run(KEY, program[1])
    assert_same(again.result, whole.result)


@pytest.mark.parametrize("name", ["run.json", "program.json", "chain0/state.npz"])
def test_other_damaged_files_are_named(program, whole, copied, name):
    (copied / name).write_bytes((copied / name).read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{name}' is damaged"):
        writing(whole, copied).run(KEY, program[1])


@pytest.mark.parametrize("name", ["step00000.npz", "state.npz"])
def test_files_of_another_chain_are_refused(program, whole, copied, name):
    shutil.copy(copied / "chain0" / name, copied / "chain1" / name)
    with pytest.raises(ValueError, match=f"chain1/{name}' belongs to another run, chain or step"):
        writing(whole, copied).run(KEY, program[1])


def test_a_directory_has_one_owner(program, whole, copied):
    owner = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); "
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", owner, str(copied / "lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="copied' is in use by another run"):
            writing(whole, copied).run(KEY, program[1])
        other.kill()  # a process that is killed leaves nothing behind
    writing(whole, copied).run(KEY, program[1])


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


def test_numbers_of_any_library_are_settings(tmp_path):
    model, y = _module_level, np.zeros(1, np.float32)
    settings = {"num_particles": np.int64(8), "num_chains": 1, "directory": tmp_path, "progress_bar": False}
    for _ in range(2):
        ndda.Filter(ndda.Bootstrap(model, target_ess=np.float32(0.25)), **settings).run(KEY, y)
    plain = {**settings, "num_particles": 8}
    ndda.Filter(ndda.Bootstrap(model, target_ess=0.25), **plain).run(KEY, y)
    with pytest.raises(TypeError, match="whole number"):
        ndda.Filter(ndda.Bootstrap(model), num_particles=2.5)


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

    def stop(*args):
        made.append(args)
        if len(made) == 3:
            raise error

    monkeypatch.setattr("numpyro_diffusion_da.inference.filter.check_record", stop)
    if error is KeyboardInterrupt:
        with pytest.warns(UserWarning, match="interrupted; `result` holds 2 of 4 steps"), pytest.raises(error):
            filter.run(KEY, program[1])
        np.testing.assert_array_equal(filter.result.posterior["x"], whole.result.posterior["x"][:1, :, :2])
    else:
        with pytest.raises(error):
            filter.run(KEY, program[1])
        with pytest.raises(RuntimeError, match="its last run failed"):
            _ = filter.result


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
