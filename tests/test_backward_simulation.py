"""Backward simulation: its weights by hand, its paths, the exact smoother, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
import test_smoothing
from conftest import LinearGaussian
from numpyro.contrib.control_flow import scan
from test_smoothing import (
    assert_smoother,
    by_hand,
    error_in_sd,
    filtered,
    program_with_increments,
    rauch_tung_striebel,
)

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.inference import backward_simulation as backward
from numpyro_diffusion_da.program import StateSpaceModel

pytestmark = pytest.mark.slow  # each compiles filters of its own

N, DRAWS = 6, 3000


def filter_of(program, algorithm=ndda.FAAPF, **settings):
    return ndda.Filter(algorithm(program), **{"num_particles": N, "progress_bar": False, **settings})


def looking_back(y):
    """What is observed is the change since the last time."""
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x_prev, 0.5))
        numpyro.deterministic("increment", x - x_prev)
        numpyro.sample("y", dist.Normal(x - x_prev, 0.7), obs=y_t)
        return x, None

    scan(step, x0, y)


@pytest.fixture(scope="module")
def run():
    particle_filter = filter_of(looking_back, num_chains=2, keep_forecasts=True)
    particle_filter.run(jax.random.key(1), jnp.asarray([0.5, -0.4, 1.0, 0.2]))
    return particle_filter, particle_filter.backward_simulation(jax.random.key(2), DRAWS)


def test_links_have_the_weights_of_the_formula(run):
    """p(x' | x) p(y' | x', x), as what is observed depends on both; frequencies against them."""
    particle_filter, paths = run
    lines, ess = paths.sample_stats["filter_draw"], paths.sample_stats["backward_ess"]
    y = particle_filter.result.observed_data["y"]
    for chain in range(2):
        x = particle_filter.result.posterior["x"][chain].astype(float)
        assert np.bincount(lines[chain, :, -1], minlength=N).tolist() == [DRAWS // N] * N
        for k in range(3):
            for later in range(N):
                here = lines[chain, :, k + 1] == later
                change = x[later, k + 1] - x[:, k]
                weights = scipy.stats.norm.pdf(x[later, k + 1], 0.9 * x[:, k], 0.5)
                weights *= scipy.stats.norm.pdf(y[k + 1], change, 0.7)
                weights /= weights.sum()
                counts = np.bincount(lines[chain, here, k], minlength=N)
                se = np.sqrt(here.sum() * weights * (1 - weights))
                assert np.all(np.abs(counts - here.sum() * weights) < 5 * se + 1)
                np.testing.assert_allclose(ess[chain, here, k], 1 / np.sum(weights**2), rtol=1e-4)
        np.testing.assert_allclose(ess[chain, :, -1], N)


def test_what_is_derived_belongs_to_the_path(run):
    """Along the new links, not those of the filter; at the first time the filter's own."""
    particle_filter, paths = run
    x, increment, lines = paths.posterior["x"], paths.posterior["increment"], paths.sample_stats["filter_draw"]
    np.testing.assert_allclose(np.diff(x, axis=2), increment[:, :, 1:], atol=1e-6)
    result = particle_filter.result
    for got, of_filter in (
        (x, result.posterior["x"]),
        (increment[:, :, :1], result.posterior["increment"]),
        (paths.forecast, result.forecast),
    ):
        steps = got.shape[2]
        np.testing.assert_array_equal(got, np.take_along_axis(of_filter, lines, axis=1)[:, :, :steps])
    expected = scipy.stats.norm.logpdf(result.observed_data["y"], increment, 0.7)
    np.testing.assert_allclose(paths.log_likelihood["y"], expected, rtol=1e-4, atol=1e-5)
    error = paths.posterior_predictive["y"] - increment
    assert abs(error[:, :, 1:].std() / 0.7 - 1) < 0.05


def test_names_of_a_result(run):
    _, paths = run
    tree = ndda.results.to_datatree(paths)
    assert tree.attrs["smoothing"] == "backward simulation"
    assert "given all observations" in tree["posterior"].attrs["description"]
    assert tree["posterior/x"].sizes == {"chain": 2, "draw": DRAWS, "time": 4}
    for name in ("filter_draw", "backward_ess", "distinct_lines", "backward_passes_forward"):
        assert tree[f"sample_stats/{name}"].attrs["description"]
    assert not {"log_weights", "ancestors"} & set(tree["sample_stats"].data_vars)
    assert ndda.results.to_arviz(paths).attrs["smoothing"] == "backward simulation"
    with pytest.raises(ValueError, match="already smoothed"):
        ndda.results.trajectories(paths)


def test_neither_batches_nor_chains_change_a_draw(run):
    particle_filter, _ = run
    few, alone = (particle_filter.backward_simulation(jax.random.key(3), 4, batch_size=b) for b in (None, 5))
    for name in few.posterior:
        np.testing.assert_array_equal(few.posterior[name], alone.posterior[name])


def density_programs(d):
    """The same Gaussian transition through a diffusion's density, and in closed form."""
    model = LinearGaussian.make(0, d)
    prior = ndda.GaussianPrior(model.transition, model.covariance)
    a, q = jnp.asarray(model.transition), jnp.asarray(model.covariance)

    def diffusion(x):
        return ndda.DiffusionTransition(prior, x, density=ndda.diffusion.ProbabilityFlow(12))

    def closed(x):
        return dist.MultivariateNormal(a @ x, q)

    def program(transition, y):
        def step(x, y_t):
            x = numpyro.sample("x", transition(x))
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y_t)
            return x, None

        scan(step, jnp.zeros(d), y)

    return [StateSpaceModel(lambda y, of=of: program(of, y), (jnp.zeros((2, d)),)) for of in (diffusion, closed)]


@pytest.mark.slow
def test_the_density_of_a_diffusion_links_as_the_closed_form_does():
    diffusion, closed = density_programs(2)
    x, later = jax.random.normal(jax.random.key(0), (2, 8, 2))
    inputs = [diffusion.call(jax.random.key(0)).first_inputs()] * 2
    by_flow, exact = (
        jax.jit(lambda of=of: backward.select(of, jax.random.key(1), x, later, *inputs, 0))()
        for of in (diffusion, closed)
    )
    np.testing.assert_array_equal(by_flow.chosen, exact.chosen)
    np.testing.assert_allclose(by_flow.ess, exact.ess, rtol=2e-3)
    assert tuple(int(n) for n in by_flow.passes) == (8 * (4 * 11 + 3), 8 * 12 * 2, 0, 0)
    assert tuple(int(n) for n in exact.passes) == (0, 0, 0, 0)


@pytest.mark.slow
def test_paths_are_the_exact_smoother():
    """Means within standard errors over independent filters, and nearer than the genealogy's."""
    filtered.cache_clear()  # the filter may have run with another seed since
    result, model, y = filtered(0)
    mean, variance = rauch_tung_striebel(model, y)
    paths = test_smoothing.PARTICLE_FILTER.backward_simulation(jax.random.key(5), 64)
    assert_smoother(paths, mean, variance)
    # As many draws of the genealogy's have this error and more, by their coalescence.
    genealogy = ndda.results.trajectories(result)
    genealogy.posterior["x"] = genealogy.posterior["x"][:, ::8]
    assert error_in_sd(paths, mean, variance).mean() < error_in_sd(genealogy, mean, variance).mean()
    few = np.array([len(set(line)) for line in genealogy.sample_stats["filter_draw"][:, ::8, 0]])
    assert np.all(paths.sample_stats["distinct_lines"][:, 0] > few)


@pytest.mark.slow
def test_paths_of_moved_ancestors_are_the_exact_smoother():
    """Moved ancestors have no genealogy, but backward simulation needs the filter's particles alone."""
    move = ndda.KalmanMove(selection_share=0.0)
    algorithm = ndda.FAAPF(test_smoothing.program, weight=ndda.Moment(), move=move)
    particle_filter = ndda.Filter(algorithm, num_particles=256, num_chains=24, progress_bar=False)
    model = LinearGaussian.make(0, 4)
    _, y = model.simulate(100, test_smoothing.STEPS)
    particle_filter.run(jax.random.key(0), *map(jnp.asarray, (y, model.transition, *test_smoothing.factors(model))))
    mean, variance = rauch_tung_striebel(model, y)
    assert_smoother(particle_filter.backward_simulation(jax.random.key(5), 128), mean, variance)


@pytest.mark.slow
def test_an_ensemble_kalman_filter_can_be_linked():
    particle_filter = filter_of(program_with_increments, ndda.EnKF, num_particles=8)
    particle_filter.run(jax.random.key(0), jnp.zeros((3, 2)))
    paths = particle_filter.backward_simulation(jax.random.key(1), 5)
    x, increment = paths.posterior["x"], paths.posterior["increment"]
    np.testing.assert_allclose(np.diff(x, axis=2), increment[:, :, 1:], atol=1e-6)


def two_frames(y):
    def step(carry, y_t):
        x = numpyro.sample("x", dist.Normal(carry[1] + 0.1 * carry[0], 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y_t)
        return (carry[1], x), None

    scan(step, (jnp.zeros(2), jnp.zeros(2)), y)


def stretched(transition):
    def program(y):
        def step(x, y_t):
            x = numpyro.sample("x", transition(x))
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y_t)
            return 2.0 * x, None

        scan(step, jnp.zeros(2), y)

    return program


PRIOR = ndda.GaussianPrior(0.9 * np.eye(2), np.eye(2))


def masked(x):
    return dist.Normal(x, 1.0).to_event(1).mask(False)


@pytest.mark.parametrize(
    ("program", "kept", "num_draws", "sentence"),
    [
        (stretched(lambda x: dist.Normal(x, 1.0).to_event(1)), "x", 1, None),  # a function of the state may be carried
        (stretched(lambda x: ndda.DiffusionTransition(PRIOR, x)), "x", 1, "site 'x' has no density; give it one"),
        (two_frames, "x", 1, r"carry of 'two_frames' depends on the carry before it and not on 'x' alone \(two frames"),
        (stretched(masked), "x", 1, "'x' is masked, so its transition has no density; leave the mask out"),
        (two_frames, "norm", 1, "needs the particles of 'x', which this run did not keep"),
        (two_frames, "x", 0, "num_draws=0; give 1 or more"),
    ],
)
def test_what_is_refused(program, kept, num_draws, sentence):
    result = by_hand()
    result = dataclasses.replace(result, posterior={kept: result.posterior[kept]})
    raises = contextlib.nullcontext() if sentence is None else pytest.raises(ValueError, match=sentence)
    with raises:
        backward.check(StateSpaceModel(program, (jnp.zeros((2, 2)),)), result, num_draws)


def test_a_filter_that_has_not_run():
    with pytest.raises(RuntimeError, match="has not run"):
        filter_of(two_frames).backward_simulation(jax.random.key(0))


def test_too_few_particles_are_named():
    """A transition so sharp that no particle can have led to the next."""
    program = StateSpaceModel(stretched(lambda x: dist.Normal(x, 1e-30).to_event(1)), (jnp.zeros((2, 2)),))
    inputs = program.call(jax.random.key(0)).first_inputs()

    @jax.jit
    def step(key, x, later, *inputs):
        return backward.select(program, key, x[:, :2], later[:, :2] + 0.5, *inputs, 0)

    with pytest.raises(FloatingPointError, match=r"no particle of step 2 .* leading to step 3, for 3 of 3 traj"):
        backward.simulate(jax.random.key(0), by_hand(), lambda t: inputs, step, 3, lambda sites: sites)
