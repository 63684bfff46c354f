"""A run that dies goes on, and gives what it would have given."""

from __future__ import annotations

import copy

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
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


def make(model, algorithm=ndda.FAAPF, **settings):
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
        ({"error": 0.4}, "another program: error of y has changed"),
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
