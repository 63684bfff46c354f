"""A run that dies goes on, and gives what it would have given."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def program(small):
    prior = ndda.GaussianPrior(small.transition, small.covariance)

    def model(y):
        x0 = numpyro.sample("x0", prior.climatology())

        def step(carry, y_t):
            before, x = carry
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
            numpyro.deterministic("mean:of both", (x + before).mean())
            numpyro.sample("y", dist.Normal(x[::2], small.error).to_event(1), obs=y_t)
            return (x, x), None

        scan(step, (x0, x0), y)

    return model, small.simulate(2, 4)[1].astype(np.float32)


def make(model, **settings):
    arguments = {"num_particles": 8, "num_chains": 2, "progress_bar": False, **settings}
    return ndda.ParticleFilter(ndda.FAAPF(model), **arguments)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.posterior, b.posterior)
    jax.tree.map(np.testing.assert_array_equal, a.sample_stats, b.sample_stats)
    jax.tree.map(np.testing.assert_array_equal, a.posterior_predictive, b.posterior_predictive)
    assert a.attributes == b.attributes


class Killed(BaseException):
    """As by the machine."""


@pytest.mark.parametrize("when", ["before the outputs", "before the state", "after the state"])
def test_a_run_that_died_goes_on(program, tmp_path, monkeypatch, when):
    model, y = program
    whole = make(model)
    whole.run(KEY, y)
    import numpyro_diffusion_da.storage as storage

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
        make(model, directory=tmp_path / "run").run(KEY, y)
    monkeypatch.undo()
    again = make(model, directory=tmp_path / "run")
    again.run(KEY, y)
    assert_same(whole.result, again.result)
    # Finished: nothing is computed any more, and another reader finds the same.
    monkeypatch.setattr(storage, "_replace_arrays", lambda path, arrays: pytest.fail("a step was made again"))
    read = make(model, directory=tmp_path / "run")
    read.run(KEY, y)
    assert_same(whole.result, read.result)


def test_a_longer_series_goes_on_from_a_shorter(program, tmp_path):
    model, y = program
    make(model, directory=tmp_path).run(KEY, y[:2])
    longer = make(model, directory=tmp_path)
    longer.run(KEY, y)
    whole = make(model)
    whole.run(KEY, y)
    assert_same(whole.result, longer.result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_particles": 9}, "holds a run with num_particles = 8"),
        ({"key": jax.random.key(4)}, "holds a run with seed"),
        ({"y": 1.0}, "step 0 in .* was made with other observations"),
        ({"keep": ["x"]}, "holds a run with keep = None"),
        ({"keep_observed": False}, "holds a run with keep_observed = True"),
        ({"error": 0.4}, "another program: error of y is not what it was"),
    ],
)
def test_another_run_is_refused(small, program, tmp_path, change, message):
    model, y = program
    if "error" in change:
        model = small.diffusion_program()
    make(model, directory=tmp_path).run(KEY, y[:2])
    settings = {name: value for name, value in change.items() if name.startswith(("num", "keep"))}
    if "error" in change:
        model = dataclasses.replace(small, error=change["error"]).diffusion_program()
    with pytest.raises(ValueError, match=message):
        make(model, directory=tmp_path, **settings).run(change.get("key", KEY), y[:2] + change.get("y", 0.0))


def test_only_what_is_wanted_is_kept(program):
    model, y = program
    filter = make(model, keep=["mean:of both"])
    filter.run(KEY, y)
    assert set(filter.result.posterior) == {"mean:of both"}
    assert filter.result.posterior["mean:of both"].shape == (2, 8, 4)
    assert set(filter.to_datatree()["posterior"].data_vars) == {"mean:of both"}
    filter.print_summary()
    bare = make(model, keep_observed=False)
    bare.run(KEY, y)
    np.testing.assert_array_equal(bare.result.posterior["mean:of both"], filter.result.posterior["mean:of both"])
    assert set(bare.to_datatree().children) == {"posterior", "observed_data", "constant_data", "sample_stats"}
    bare.to_arviz()
    with pytest.raises(ValueError, match=r"keep names \['z'\]"):
        make(model, keep=["z"]).run(KEY, y)
    with pytest.raises(ValueError, match="keep='x'"):
        make(model, keep="x")
