"""Filters with a lag: earlier states that are selected and moved with the particles."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import test_kalman_move
from conftest import LinearGaussian
from monte_carlo import assert_mean, excess
from numpyro.contrib.control_flow import scan
from test_smoothing import exact, factors, program, program_with_increments

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.inference import storage
from numpyro_diffusion_da.smc import PlacedMove, WeightTempering

LAG, STEPS = 2, 6
MOVES = {share: ndda.KalmanMove(selection_share=share) for share in (0.0, None)}
GLOBAL = {
    "moved": ndda.FAAPF(program, weight=ndda.Moment(), move=MOVES[0.0], lag=LAG),
    "selected and moved": ndda.FAAPF(program, weight=ndda.Moment(), move=MOVES[None], lag=LAG),
    "EnKF": ndda.EnKF(program, lag=LAG),
}


@functools.cache
def run(name: str, seed: int) -> tuple[ndda.FilterResult, ndda.FilterResult, LinearGaussian, np.ndarray]:
    """(result of independent filters, smoothed result, model, observations)."""
    model = LinearGaussian.make(seed, 4)
    _, y = model.simulate(100 + seed, STEPS)
    filter_ = compiled(name)
    filter_.run(jax.random.key(seed), *map(jnp.asarray, (y, model.transition, *factors(model))))
    return filter_.result, filter_.smoothed(LAG), model, y


@functools.cache
def compiled(name: str) -> ndda.Filter:
    return ndda.Filter(GLOBAL[name], num_particles=256, num_chains=24, progress_bar=False, keep_observed=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed"),
    [("moved", 0), *(pytest.param(name, 0, marks=pytest.mark.slow) for name in list(GLOBAL)[1:])],
)
def test_moved_states_are_the_exact_fixed_lag_smoother(name: str, seed: int) -> None:
    """Means and covariances agree in the mean over filters, and means of the filter and of other lags do not."""
    result, smoothed, model, y = run(name, seed)
    mean, covariance = exact(model, y, LAG)
    spread = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
    departure = (smoothed.posterior["x"].astype(float) - mean) / spread  # (chain, draw, time, d)
    assert_mean(departure.mean(1), 0.0, noticed=0.15)
    products = np.einsum("cnti,cntj->ctij", departure, departure) / departure.shape[1]
    assert_mean(products, covariance / (spread[:, :, None] * spread[:, None, :]), noticed=0.2)
    before = slice(STEPS - LAG - 1)  # where another lag is another law
    for draws, lag in ((result.posterior["x"], LAG), *((smoothed.posterior["x"], lag) for lag in (LAG - 1, LAG + 1))):
        assert excess(draws[:, :, before].mean(1), exact(model, y, lag)[0][before]) > 1.5
    assert list(smoothed.posterior) == ["x"]
    assert (smoothed.attributes["smoothing"], smoothed.attributes["smoothing_lag"]) == ("fixed lag", LAG)
    np.testing.assert_array_equal(smoothed.posterior["x"][:, :, -1], result.posterior["x"][:, :, -1])


def test_earlier_states_move_by_the_regression_of_the_ancestor_and_leave_the_filter_as_it_is() -> None:
    """Linear functions of the ancestor stay these functions, and the test of Gaussianity does not see them."""
    c = jnp.where(jnp.arange(60)[:, None] % 2 == 0, 3.0, -3.0) + test_kalman_move.draw(60, 7)
    found = test_kalman_move.predicted(c)
    found = found._replace(log_weight=jnp.sum(found.log_weight, axis=1))
    move = PlacedMove(None, None, (0,), None, along=(1,))

    @jax.jit
    def moved(past: jax.Array) -> tuple:
        return move.select_and_move(test_kalman_move.KEYS, found, (c, past), None, 0.5, WeightTempering())

    _, ancestors, _, (x, past), record = moved(jnp.stack([2.0 * c + 1.0, c[:, ::-1]], axis=1))
    assert len(set(np.asarray(ancestors))) < 50
    assert float(record.moved_share) > 0.1
    np.testing.assert_allclose(past, np.stack([2 * x + 1, x[:, ::-1]], axis=1), atol=1e-4)
    _, ancestors_of_others, _, (of_others, _), other = moved(jnp.stack([jnp.sign(c), c**3], axis=1))
    np.testing.assert_array_equal(ancestors_of_others, ancestors)
    np.testing.assert_allclose(of_others, x, atol=1e-5)
    assert float(other.non_gaussianity) == pytest.approx(float(record.non_gaussianity), rel=1e-6)


@pytest.mark.slow
def test_without_a_move_the_states_are_those_of_the_genealogy() -> None:
    """Here with a lag beyond the first time."""
    y = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    filter_ = ndda.Filter(ndda.FAAPF(program_with_increments, lag=9), num_particles=32, progress_bar=False)
    filter_.run(jax.random.key(0), y)
    paths = filter_.smoothed()
    assert paths.attributes["smoothing"] == "genealogy"
    assert set(paths.posterior) == {"x", "increment"}
    np.testing.assert_array_equal(filter_.result.lagged, paths.posterior["x"])
    assert paths.lagged is None


# --- localized --------------------------------------------------------------------------------------------------------

TAPER = ndda.Taper(3.0, ndda.Ring(12), {"y": np.arange(0, 12, 2)}, state=np.arange(12))


def ring(y: jax.Array) -> None:
    """Two frames on a ring of 12, which a filter moves itself: the states one and two steps before."""

    def step(frames: tuple[jax.Array, jax.Array], y_t: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        before, now = frames
        numpyro.deterministic("two before", before)
        x = numpyro.sample("x", dist.Normal(0.9 * jnp.roll(now, 1) + 0.05 * before, 0.3).to_event(1))
        numpyro.sample("y", dist.Normal(x[::2], 0.3).to_event(1), obs=y_t)
        return (now, x), None

    start = numpyro.sample("x0", dist.Normal(jnp.zeros(12), 1.0).to_event(1))
    scan(step, (start, start), y)


LOCAL = {"moved": ndda.FAAPF(ring, taper=TAPER, lag=LAG), "EnKF": ndda.EnKF(ring, taper=TAPER, lag=LAG)}


@functools.cache
def truth() -> tuple[np.ndarray, np.ndarray]:
    """States (time, 12) and observations of the ring."""
    rng = np.random.default_rng(0)
    before = now = rng.normal(size=12)
    states = []
    for _ in range(8):
        before, now = now, 0.9 * np.roll(now, 1) + 0.05 * before + 0.3 * rng.normal(size=12)
        states.append(now)
    x = np.array(states)
    return x, (x[:, ::2] + 0.3 * rng.normal(size=(8, 6))).astype(np.float32)


@functools.cache
def local(name: str) -> ndda.Filter:
    """Filter of the ring that has run, in batches."""
    settings = {"num_particles": 40, "num_chains": 2, "batch_size": 16, "progress_bar": False, "keep_observed": False}
    filter_ = ndda.Filter(LOCAL[name], **settings)
    filter_.run(jax.random.key(1), truth()[1])
    return filter_


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("moved", marks=pytest.mark.slow), "EnKF"])
def test_localized_states_are_those_of_the_carry_and_nearer_to_the_truth(name: str) -> None:
    filter_, x = local(name), truth()[0][:-LAG]
    np.testing.assert_array_equal(filter_.smoothed(0).posterior["x"], filter_.result.posterior["x"])
    smoothed = filter_.to_datatree(lag=LAG)["posterior/x"].values
    np.testing.assert_allclose(smoothed[:, :, :-LAG], filter_.result.posterior["two before"][:, :, LAG:], atol=1e-5)
    draws = smoothed[:, :, :-LAG], filter_.result.posterior["x"][:, :, :-LAG]
    error, before = (np.sqrt(np.mean((d.mean(1) - x) ** 2, axis=(1, 2))) for d in draws)
    assert np.all(error < 0.92 * before)
    assert draws[0].std(1).mean() < 0.9 * draws[1].std(1).mean()
    assert 0.6 < draws[0].std(1).mean() / error.mean() < 1.4


@pytest.mark.slow
def test_one_time_after_another_gives_the_whole_run() -> None:
    _, y = truth()
    init_key, run_key = jax.random.split(jax.random.fold_in(jax.random.key(1), 0))
    online = ndda.OnlineFilter(LOCAL["EnKF"], num_particles=40, keep_steps=5)
    state = online.init(init_key, y[:1])
    for t in range(len(y)):
        state, info = online.step(jax.random.fold_in(run_key, t), state, y[t][None])
    whole = local("EnKF").result.lagged[:1]
    np.testing.assert_allclose(info.proposal.line[:, 0], whole[0, :, -1 - LAG], atol=1e-4)
    np.testing.assert_allclose(online.smoothed(LAG).posterior["x"], whole[:, :, -5:], atol=1e-4)


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on(tmp_path, monkeypatch) -> None:
    _, y = truth()
    filter_ = copy.copy(local("EnKF"))
    whole, filter_.directory = filter_.result.lagged, tmp_path / "run"
    monkeypatch.setattr("numpyro_diffusion_da.inference.chunks.LONGEST", 2)
    save = storage.RunStore.save

    def interrupting(store: storage.RunStore, chain: int, first: int, *rest: Any) -> None:
        if first >= 3:
            raise KeyboardInterrupt
        save(store, chain, first, *rest)

    monkeypatch.setattr(storage.RunStore, "save", interrupting)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="holds 3 of 8 steps"):
        filter_.run(jax.random.key(1), y)
    np.testing.assert_array_equal(filter_.smoothed(LAG).posterior["x"][:, :, :1], whole[:1, :, :1])
    np.testing.assert_array_equal(filter_.smoothed(LAG).posterior["x"][:, :, 2], filter_.result.posterior["x"][:, :, 2])
    # Before it makes a step, it does not know the earlier states of the last one.
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="holds 3 of 8 steps"):
        filter_.run(jax.random.key(1), y)
    assert filter_.result.lagged is None
    monkeypatch.setattr(storage.RunStore, "save", save)
    for _ in range(2):  # the second run reads all steps
        filter_.run(jax.random.key(1), y)
        np.testing.assert_array_equal(filter_.result.lagged, whole)
    with pytest.raises(ValueError, match=r"holds 8 steps, and the states of lag=2 after the last of them only; give"):
        filter_.run(jax.random.key(1), y[:5])


@pytest.mark.slow
def test_other_lags_are_refused_and_a_lag_of_zero_is_the_filter() -> None:
    filter_ = local("EnKF")
    result = filter_.result
    zero = filter_.smoothed(0)
    for name in ("x", "two before"):
        np.testing.assert_array_equal(zero.posterior[name], result.posterior[name])
    for lag in (1, 3, None):
        with pytest.raises(ValueError, match=r"EnKF selects no particles, .* kept the states of lag=2 only: ask for"):
            filter_.to_datatree(lag=lag)
    for again in (zero, filter_.smoothed(LAG)):
        with pytest.raises(ValueError, match="already smoothed"):
            ndda.results.fixed_lag(again, LAG)
    # A lag as long as the series gives trajectories.
    paths = ndda.results.trajectories(dataclasses.replace(result, attributes={**result.attributes, "lag": 7}))
    assert paths.attributes["smoothing"] == "ensemble smoother"
    assert "moved by all observations" in ndda.results.to_datatree(paths)["posterior"].attrs["description"]
    np.testing.assert_array_equal(paths.posterior["x"], result.lagged)
    with pytest.raises(ValueError, match="EnKF got lag=-1; give 0 or more"):
        ndda.EnKF(ring, lag=-1)
    with pytest.raises(TypeError, match=r"FAAPF got lag=1\.5"):
        ndda.FAAPF(ring, lag=1.5)
    left_out = ndda.Filter(ndda.EnKF(ring, lag=1), num_particles=4, keep=["two before"], progress_bar=False)
    with pytest.raises(ValueError, match=r"keep names \['two before'\], but the filter smooths 'x' with lag=1; add"):
        left_out.run(jax.random.key(0), jnp.zeros((2, 6)))
