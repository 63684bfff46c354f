"""`Filter`: one loop, no recompilation, the same particles whatever the batching."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import compilations
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda

KEY = jax.random.key(0)
N = 15


def make(model, algorithm=ndda.FAAPF, num_chains=1, batch_size=None):
    return ndda.Filter(
        algorithm(model), num_particles=N, num_chains=num_chains, batch_size=batch_size, progress_bar=False
    )


@pytest.fixture(scope="module")
def program(small):
    _, y = small.simulate(3, 4)
    y[2, 0] = np.nan
    return small.diffusion_program(), y.astype(np.float32)


@pytest.fixture(scope="module")
def reference(program):
    model, y = program
    filter = make(model, num_chains=2)
    filter.run(KEY, y)
    return filter


@pytest.fixture(scope="module")
def compiled(reference):
    """The same filter with one chain, to be run again; what is compiled for a chain is compiled for each."""
    filter = copy.copy(reference)
    filter.num_chains = 1
    return filter


def test_shapes_and_diagnostics(reference):
    result = reference.result
    assert result.posterior["x"].shape == (2, N, 4, 4)
    assert result.posterior_predictive["y"].shape == (2, N, 4, 2)
    assert result.log_likelihood["y"].shape == (2, N, 4, 2)
    assert result.sample_stats["log_weights"].shape == (2, N, 4)
    assert result.sample_stats["ess"].shape == (2, 4)
    assert np.isnan(result.observed_data["y"][2, 0])
    assert not result.observed_mask["y"][2, 0]
    assert np.all(result.log_likelihood["y"][:, :, 2, 0] == 0)
    assert np.all((result.sample_stats["tempering"] > 0) & (result.sample_stats["tempering"] <= 1))
    # Dirac: one pass. Guided draw, 16 levels: one forward and, for two observations, at most two vjps each. Background:
    # one of each at up to 16 particles.
    assert np.all(result.network_passes["forward"] == 17 + 1)
    vjp = result.network_passes["vjp"]
    assert np.all((vjp >= 16 + 1) & (vjp <= 32 + 1) & (vjp == np.round(vjp)))  # shared by all particles of a batch
    assert np.all(vjp[:, 2] == 16 + 1)  # one observation is missing, and the other takes one product
    for needed in ("prior", "prior_checksum", "seed", "num_particles"):
        assert needed in result.attributes
    # Defaults are written out, so that a run can be repeated when they have changed.
    assert result.attributes["weight"] == "Dirac()"
    assert result.attributes["guidance"] == (
        "MMPS(solver=KrylovSolve(products=None, warm_start=True, tolerance=0.03, max_products=32), noise=None)"
    )
    assert result.attributes["sampler"].startswith("Sampler(step=UniPC(), schedule=GeometricSchedule(factor=1.75")
    assert 0 < result.attributes["sampler_variance_error"] < 0.03


def test_second_step_and_second_run_compile_nothing(program, compiled):
    model, y = program
    compiled.run(KEY, y)
    first = compiled.result.posterior["x"]
    with compilations() as found:
        compiled.run(KEY, y + 1.0)
    assert not found
    assert not np.allclose(first, compiled.result.posterior["x"])  # observations are arguments, not constants
    compiled_by_length = []
    for length in (1, 4):
        fresh = make(model, ndda.Bootstrap)
        with compilations() as found:
            fresh.run(KEY, y[:length])
        compiled_by_length.append(len(found))
    assert compiled_by_length[0] == compiled_by_length[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_does_not_change_the_particles(program, reference, batch_size):
    model, y = program
    filter = make(model, batch_size=batch_size)
    filter.run(KEY, y)
    np.testing.assert_allclose(filter.result.posterior["x"][0], reference.result.posterior["x"][0], atol=1e-4)
    np.testing.assert_array_equal(
        filter.result.sample_stats["ancestors"][0], reference.result.sample_stats["ancestors"][0]
    )


def test_same_key_same_result_and_chains_are_independent(program, reference, compiled):
    _, y = program
    compiled.run(KEY, y)
    # A chain does not depend on how many there are.
    np.testing.assert_array_equal(compiled.result.posterior["x"][0], reference.result.posterior["x"][0])
    assert not np.allclose(reference.result.posterior["x"][0], reference.result.posterior["x"][1])


@pytest.mark.slow  # test_smc asks the same of a kernel
def test_jit_and_no_jit_agree(program):
    model, y = program
    # Without jit every operation is dispatched by itself.
    few = {"sampler": ndda.Sampler(schedule=ndda.KarrasSchedule(2)), "guidance": ndda.MMPS.cheap()}
    jitted, plain = (make(model, lambda m: ndda.FAAPF(m, **few)) for _ in range(2))
    jitted.run(KEY, y[:1])
    with jax.disable_jit():
        plain.run(KEY, y[:1])
    np.testing.assert_allclose(plain.result.posterior["x"], jitted.result.posterior["x"], atol=1e-4)


def test_nothing_observed_is_a_forecast(program, compiled):
    _, y = program
    compiled.run(KEY, np.full_like(y, np.nan))
    stats = compiled.result.sample_stats
    np.testing.assert_array_equal(stats["ancestors"][0], np.arange(N)[:, None].repeat(4, 1))
    np.testing.assert_allclose(stats["log_evidence_increment"], 0.0, atol=1e-5)
    np.testing.assert_allclose(stats["ess"], N, rtol=1e-5)


def test_guided_without_weights_keeps_every_particle(program):
    model, y = program
    filter = make(model, lambda m: ndda.FAAPF(m, weight=ndda.Equal()))
    filter.run(KEY, y)
    np.testing.assert_array_equal(filter.result.sample_stats["distinct_ancestors"], N)
    assert np.all(filter.result.network_passes["forward"] == 16 + 2)  # of the background, which has no weights to use


@pytest.fixture(scope="module")
def closed_form(small):
    """The program in closed form, and observations."""

    def model(y):
        x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(4), 1.0).to_event(1))

        def step(x, y_t):
            x = numpyro.sample("x", dist.MultivariateNormal(small.transition @ x, small.covariance))
            numpyro.sample("y", dist.Normal(x[::2], small.error).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    return model, small.simulate(4, 3)[1]


@pytest.mark.slow
def test_one_particle(closed_form):
    """It has no variance, and weights, resampling and background cope."""
    model, y = closed_form
    filter = ndda.Filter(ndda.FAAPF(model), num_particles=1, progress_bar=False)
    filter.run(KEY, y)
    assert np.all(np.isfinite(filter.result.posterior["x"]))


@pytest.mark.slow
def test_closed_form_transition_uses_the_exact_weight(closed_form):
    model, y = closed_form
    filter = make(model)
    filter.run(KEY, y)
    explicit = make(model, lambda m: ndda.FAAPF(m, weight=ndda.Moment()))
    explicit.run(KEY, y)
    np.testing.assert_array_equal(filter.result.posterior["x"], explicit.result.posterior["x"])
    assert all(np.all(v == 0) for v in filter.result.network_passes.values())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"num_particles": 0}, "num_particles=0"), ({"num_particles": 8, "batch_size": -1}, "batch_size=-1")],
)
def test_wrong_numbers(program, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ndda.Filter(ndda.FAAPF(program[0]), **kwargs)


def test_wrong_settings(program):
    with pytest.raises(ValueError, match="target_ess"):
        ndda.FAAPF(program[0], target_ess=50)
    with pytest.raises(TypeError, match="FAAPF"):
        ndda.Filter(program[0], num_particles=8)
    with pytest.raises(RuntimeError, match="not run yet"):
        _ = make(program[0]).result


@pytest.mark.parametrize("algorithm", [ndda.Bootstrap, ndda.FAAPF, ndda.EnKF])
@pytest.mark.slow
def test_a_second_run_calls_the_program_a_few_times(algorithm):
    """Also of a program whose structure takes a third look, for its mean is not linear."""
    calls = []

    def model(y):
        calls.append(None)
        x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(3), 1.0).to_event(1))

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
            numpyro.sample("y", dist.Normal(jnp.abs(x[:2]), 0.5).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    filter = ndda.Filter(algorithm(model), num_particles=8, progress_bar=False)
    y = np.zeros((4, 2), np.float32)
    filter.run(jax.random.key(0), y)
    assert len(calls) <= 10
    calls.clear()
    filter.run(jax.random.key(1), y + 1.0)
    assert len(calls) <= 5  # to find its structure, and to trace the first particles and the step anew
    calls.clear()
    filter.run(jax.random.key(1), y[:3])  # another length: another structure
    assert filter.result.posterior["x"].shape == (1, 8, 3, 3)
