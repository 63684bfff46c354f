"""Localized ancestors against selections of whole particles, and against Kalman filters of independent sites."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.smc.resampling import systematic
from numpyro.contrib.control_flow import scan
from scipy import stats

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.inference import records
from numpyro_diffusion_da.observation import GaussianLikelihood, GeneralLikelihood
from numpyro_diffusion_da.program import gaussian_observations, general_observation
from numpyro_diffusion_da.smc import LocalAncestors, local_ancestors
from numpyro_diffusion_da.smc import base as smc_base
from numpyro_diffusion_da.transition import GaussianDynamics

SITES = 24


def local(radius: float, block_radius: float = 0.0, every: int = 1) -> LocalAncestors:
    taper = ndda.Taper(radius, ndda.Ring(SITES), {"y": np.arange(0, SITES, every)}, state=np.arange(SITES))
    placed = taper.place((SITES,), {"y": ((len(range(0, SITES, every)),), 1)})
    return LocalAncestors.at(placed, (SITES,), block_radius)


def test_places_are_kept():
    ancestors = jnp.array([3, 3, 3, 5, 7, 7, 0, 1])
    kept = np.asarray(local_ancestors.keep_places(ancestors))
    np.testing.assert_array_equal(np.bincount(kept, minlength=8), np.bincount(ancestors, minlength=8))
    np.testing.assert_array_equal(kept[[0, 1, 3, 5, 7]], [0, 1, 3, 5, 7])
    np.testing.assert_array_equal(kept[[2, 4, 6]], [3, 3, 7])
    np.testing.assert_array_equal(local_ancestors.keep_places(jnp.arange(8)), np.arange(8))


@pytest.mark.slow
def test_one_block_is_the_selection_of_whole_particles():
    logs = -np.square(np.random.default_rng(0).normal(size=(50, SITES))).astype(np.float32)
    key = jax.random.key(1)
    whole, alpha = smc_base.select(key, jnp.asarray(logs.sum(1)), systematic, 0.3)
    log_weights, ancestors, alphas = local(1e6, np.inf).select(key, jnp.asarray(logs), systematic, 0.3)
    np.testing.assert_allclose(log_weights[:, 0], logs.sum(1), rtol=1e-6)
    np.testing.assert_allclose(alphas, [alpha], rtol=1e-5)
    np.testing.assert_array_equal(ancestors, local_ancestors.keep_places(whole)[:, None])


@pytest.mark.slow
def test_a_block_selects_by_what_is_near_it():
    logs = -3.0 * np.square(np.random.default_rng(0).normal(size=(50, SITES))).astype(np.float32)
    key = jax.random.key(1)
    alone = local(0.4)  # a taper that reaches the site itself
    log_weights, ancestors, alphas = alone.select(key, jnp.asarray(logs), systematic, 0.3)
    np.testing.assert_array_equal(log_weights, logs)
    for site in (0, 7):
        whole, alpha = smc_base.select(key, jnp.asarray(logs[:, site]), systematic, 0.3)
        np.testing.assert_array_equal(ancestors[:, site], local_ancestors.keep_places(whole))
        np.testing.assert_allclose(alphas[site], alpha, rtol=1e-5)
    # What no observation reaches keeps its particles; an impossible observation far away changes nothing.
    sparse = local(1.0, every=12)
    impossible = np.zeros((50, 2), np.float32)
    impossible[:, 0] = logs[:, 0]
    impossible[:, 1] = -np.inf
    log_weights, ancestors, _ = sparse.select(key, jnp.asarray(impossible), systematic, 0.3)
    np.testing.assert_array_equal(ancestors[:, 5], np.arange(50))
    assert np.all(np.isfinite(log_weights[:, 0]))
    np.testing.assert_array_equal(ancestors[:, 12], np.arange(50))  # no weight is usable there


def test_states_are_glued_place_by_place():
    placed = ndda.Taper(1.0, ndda.Ring(4), {"y": [0]}, state=np.arange(4.0)).place((4, 2), {"y": ((1,), 1)})
    blocks = LocalAncestors.at(placed, (4, 2), 0.0, shared=(0,))  # dictionaries are in the order of their keys
    x = jnp.arange(3 * 8.0).reshape(3, 4, 2)
    ancestors = jnp.array([[0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 0, 2]])
    carry = {"state": x, "frames": jnp.stack([x, -x], 1), "clock": jnp.arange(3)}
    glued = blocks.glue(carry, ancestors)
    expected = np.asarray(x)[np.asarray(ancestors), np.arange(4)]
    np.testing.assert_array_equal(glued["state"], expected)
    np.testing.assert_array_equal(glued["frames"], np.stack([expected, -expected], 1))
    np.testing.assert_array_equal(glued["clock"], np.arange(3))
    with pytest.raises(ValueError, match=r"glue states of shape \(4, 2\), but a particle has an array of shape"):
        blocks.glue({"clock": jnp.arange(3), "factor": jnp.ones(3)}, ancestors)


def test_blocks_cover_the_state():
    placed = ndda.Taper(1.0, ndda.Ring(40), {"y": [0]}, state=np.arange(40)).place((40,), {"y": ((1,), 1)})
    for radius in (0.0, 1.0, 3.0, np.inf):
        blocks = placed.blocks(radius)
        apart = ndda.Ring(40)(placed.points, blocks.centers)
        np.testing.assert_allclose(apart[np.arange(40), blocks.of_point], apart.min(1))
        assert apart.min(1).max() <= radius
        assert len(np.unique(blocks.of_point)) == len(blocks.centers)
    assert [len(placed.blocks(radius).centers) for radius in (0.0, np.inf)] == [40, 1]


def test_heights_and_radii_by_site():
    grid = np.array([[0.0, 0.0, 6.9], [0.0, 0.0, 5.9], [0.0, 90.0, 6.9]])
    distance = ndda.smc.WithHeight(ndda.GreatCircle(), 1000.0)
    quarter = np.pi / 2 * 6371.0
    expected = [[0.0, 1000.0, quarter], [1000.0, 0.0, np.hypot(1000.0, quarter)]]
    np.testing.assert_allclose(distance(grid[:2], grid), expected, rtol=1e-6)
    taper = ndda.Taper({"a": 1000.0, "b": 500.0}, distance, {"a": grid[:1], "b": grid[:1]}, state=grid)
    placed = taper.place((3,), {"a": ((1,), 1), "b": ((1,), 1)})
    np.testing.assert_allclose(placed.taper(grid), [[1.0, 1.0], [5 / 24, 0.0], [0.0, 0.0]], atol=1e-9)
    with pytest.raises(ValueError, match=r"radii of \['a'\] and positions of \['a', 'b'\]"):
        ndda.Taper({"a": 1000.0}, distance, {"a": grid[:1], "b": grid[:1]}, state=grid)
    with pytest.raises(ValueError, match="then a height"):
        ndda.Taper(1.0, distance, {"a": [[1.0, 2.0]]}, state=grid)
    with pytest.raises(ValueError, match="scale=0"):
        ndda.smc.WithHeight(ndda.GreatCircle(), 0.0)


@pytest.mark.slow
def test_each_observation_by_itself():
    rng = np.random.default_rng(0)
    factor = 0.7 * np.tril(rng.normal(size=(4, 4)))
    covariance, mean = factor @ factor.T, rng.normal(size=4)
    step = GaussianDynamics(jnp.asarray(mean, jnp.float32), jnp.asarray(factor, jnp.float32))
    y, counts = jnp.array([0.3, jnp.nan, -1.0, 0.5]), jnp.array([2.0, 0.0])

    def observe(x):
        normal = gaussian_observations("y", dist.Normal(x, 0.4), y)
        return [general_observation("n", dist.Poisson(jnp.exp(x[:2])), counts), *normal]

    likelihood = GeneralLikelihood(observe)
    logs, record = ndda.Moment().pointwise(step, likelihood)
    spread = np.sqrt(np.diag(covariance))
    exact = stats.norm.logpdf(np.asarray(y), mean, np.sqrt(spread**2 + 0.16))
    grid = np.linspace(-9, 9, 4001)
    for i, count in enumerate(counts):
        rate = np.exp(mean[i] + spread[i] * grid)
        value = np.sum(stats.poisson.pmf(int(count), rate) * stats.norm.pdf(grid)) * (grid[1] - grid[0])
        np.testing.assert_allclose(logs[i], np.log(value), atol=2e-4)
    np.testing.assert_allclose(logs[2:], np.where(np.isnan(y), 0.0, exact), rtol=2e-5)
    np.testing.assert_allclose(record.forecast, mean, rtol=1e-6)
    dirac, _ = ndda.Dirac().pointwise(step, likelihood)
    np.testing.assert_allclose(dirac[:2], stats.poisson.logpmf(np.asarray(counts), np.exp(mean[:2])), rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(dirac), likelihood.log_prob(step.mean), rtol=1e-6)
    equal, _ = ndda.Equal().pointwise(step, likelihood)
    np.testing.assert_array_equal(equal, np.zeros(6))
    # One product with random signs has no error where the covariance is diagonal.
    plain = GaussianLikelihood(lambda x: gaussian_observations("y", dist.Normal(x, 0.4), jnp.ones(4)))
    free = GaussianDynamics(jnp.zeros(4), jnp.array([0.1, 0.5, 1.0, 2.0]))
    one = ndda.Moment(probes=1).pointwise(free, plain)[0]
    np.testing.assert_allclose(one, ndda.Moment().pointwise(free, plain)[0], rtol=1e-5)
    with pytest.raises(ValueError, match="give the filter a taper"):
        ndda.Moment(probes=1)(free, plain)
    with pytest.raises(ValueError, match="probes=0"):
        ndda.Moment(probes=0)


def independent_sites(seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(Kalman means, observations) of `SITES` independent AR(1) processes, all observed."""
    rng = np.random.default_rng(seed)
    x, means, y = rng.normal(size=SITES), [], []
    mean, variance = np.zeros(SITES), 1.0
    for _ in range(steps):
        x = 0.9 * x + 0.5 * rng.normal(size=SITES)
        y.append(x + 0.5 * rng.normal(size=SITES))
        mean, variance = 0.9 * mean, 0.81 * variance + 0.25
        gain = variance / (variance + 0.25)
        mean, variance = mean + gain * (y[-1] - mean), variance * (1 - gain)
        means.append(mean)
    return np.array(means), np.array(y, np.float32)


def program(y):
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(SITES), 1.0).to_event(1))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y_t)
        return x, None

    scan(step, x0, y)


def run(y, keep_forecasts=False, **settings) -> ndda.Filter:
    filter_ = ndda.Filter(
        ndda.FAAPF(program, **settings), num_particles=200, progress_bar=False, keep_forecasts=keep_forecasts
    )
    filter_.run(jax.random.key(0), y)
    return filter_


TAPER = ndda.Taper(0.4, ndda.Ring(SITES), {"y": np.arange(SITES)}, state=np.arange(SITES))


@pytest.mark.slow
def test_independent_sites_are_filtered_each_by_itself():
    """The error is that of a filter of one site with exact weights, however many sites there are."""
    means, y = independent_sites(0, 12)
    spread = np.sqrt(0.25 * (np.sqrt(1.0) - 0.0) * 0.5)  # of order: the Kalman spread, 0.35 to 0.4
    filter_ = run(y, taper=TAPER, keep_forecasts=True)
    result = filter_.result
    error = np.sqrt(np.mean(((result.posterior["x"][0].mean(0) - means) / spread) ** 2))
    # Of N = 200 equally weighted draws whose ancestors were selected: between 1/sqrt(200) and three times that.
    assert error < 3.0 / np.sqrt(200), error
    whole = run(y, target_ess=0.0).result
    assert np.sqrt(np.mean(((whole.posterior["x"][0].mean(0) - means) / spread) ** 2)) > 2.0 * error
    # Every particle came from the forecasts of its blocks' ancestors: their mean leads to its own by the gain.
    assert np.corrcoef(result.forecast[0, :, -1].reshape(-1), result.posterior["x"][0, :, -1].reshape(-1))[0, 1] > 0.6
    tree = filter_.to_datatree()
    sample_stats = tree["sample_stats"]
    assert sample_stats["ess"].dims == ("chain", "time", "block")
    assert sample_stats["ancestors"].dims == ("chain", "draw", "time", "block")
    assert tree.attrs["block_radius"] == 0.0
    np.testing.assert_array_equal(sample_stats["log_evidence_increment"], 0.0)
    with pytest.raises(ValueError, match="a parent for each block"):
        filter_.to_datatree(lag=2)
    filter_.print_summary()
    assert not filter_.algorithm.has_evidence()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="block_radius=-1"):
        ndda.FAAPF(program, taper=TAPER, block_radius=-1.0)
    with pytest.raises(ValueError, match="no taper"):
        ndda.FAAPF(program, block_radius=1.0)


@pytest.mark.slow
def test_weights_of_many_blocks_are_not_kept(monkeypatch, capsys):
    """All else is there: other statistics, the summary, and the reason why there are no lines to smooth."""
    monkeypatch.setattr(records, "MOST_OF_BLOCKS", 10)
    _, y = independent_sites(0, 2)
    filter_ = run(y, taper=TAPER, move=False)
    stats = filter_.result.sample_stats
    assert not {"log_weights", "ancestors"} & set(stats)
    for name in ("ess", "tempering", "distinct_ancestors", "log_weight_std"):
        assert stats[name].shape == (1, 2, SITES)
    filter_.print_summary()
    shown = capsys.readouterr().out
    assert f"localized, in {SITES} blocks" in shown
    assert "ESS before tempering" in shown
    with pytest.raises(ValueError, match="a parent for each block"):
        filter_.to_datatree(lag=1)
    assert filter_.to_datatree()["sample_stats"]["ess"].dims == ("chain", "time", "block")
