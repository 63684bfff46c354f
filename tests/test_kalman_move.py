"""Moves of selected ancestors by an ensemble Kalman smoother step."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.smc import (
    Departure,
    KalmanMove,
    LocalAncestors,
    PlacedMove,
    Predicted,
    Products,
    WeightTempering,
    kalman_move,
    probing,
)

KEYS = jax.random.key(1), jax.random.key(2)
D, M = 4, 3
RNG = np.random.default_rng(0)
ROOT = np.tril(RNG.normal(size=(D, D))) + np.eye(D)
LOOK = RNG.normal(size=(M, D))  # g = LOOK c
SPREAD = np.array([[0.6, 0.3, 0.0], [0.3, 0.5, -0.2], [0.0, -0.2, 0.4]])  # H V H^T
ERROR = np.array([0.3, 0.2, 0.5])
Y = np.array([1.0, -0.5, 2.0])


def predicted(c: jax.Array, y: np.ndarray = Y, probes: bool = False) -> Predicted:
    """Prediction of particles c of a linear model, with exact weights of each observation by itself."""
    residual = jnp.where(jnp.isnan(y)[None], 0.0, jnp.nan_to_num(y)[None] - c @ LOOK.T)
    n, variance = len(c), ERROR + np.diagonal(SPREAD)
    spread = jnp.broadcast_to(SPREAD, (n, M, M))
    if probes:
        signs = jax.random.rademacher(jax.random.key(3), (n, 1, M), float)
        spread = Products(signs, signs @ jnp.asarray(SPREAD)[None], jnp.ones((n, M)))
    departure = Departure(residual, *(jnp.broadcast_to(x, (n, M)) for x in (ERROR, np.diagonal(SPREAD))), spread)
    return Predicted(-0.5 * residual**2 / variance[None], departure)


def kalman() -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of c given y, with p(y | c) = N(y; g, R + H V H^T)."""
    cov = ROOT @ ROOT.T
    gain = cov @ LOOK.T @ np.linalg.inv(LOOK @ cov @ LOOK.T + SPREAD + np.diag(ERROR))
    return gain @ Y, cov - gain @ LOOK @ cov


def moved(c: jax.Array, share: float | None = 0.0, **settings: object) -> tuple:
    """Result of a move without a taper, with weights of whole particles."""
    found = predicted(c, **settings)
    whole = found._replace(log_weight=jnp.sum(found.log_weight, axis=1))
    return select_and_move(WHOLE[share], whole, c)


WHOLE = {share: PlacedMove(None, None, (0,), share) for share in (0.0, None, 1.0)}
"""Moves without a taper, by selection's share."""


@functools.partial(jax.jit, static_argnums=0)
def select_and_move(move: PlacedMove, found: Predicted, c: jax.Array) -> tuple:
    """Result of a move, compiled once for each move and number of particles."""
    return move.select_and_move(KEYS, found, c, None, 0.5, WeightTempering())


def draw(n: int, seed: int | jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n, D)) @ ROOT.T


def test_a_gaussian_ensemble_gets_the_moments_of_the_kalman_filter() -> None:
    mean, cov = kalman()
    errors = {}
    for n in (200, 3200):
        found = np.asarray(jax.jit(lambda n=n: jax.lax.map(lambda seed: moved(draw(n, seed))[3], jnp.arange(8)))())
        scale = np.sqrt(np.diagonal(cov))
        errors[n] = (
            np.sqrt(np.mean([((x.mean(0) - mean) / scale) ** 2 for x in found])),
            np.sqrt(np.mean([((np.cov(x.T) - cov) / np.outer(scale, scale)) ** 2 for x in found])),
        )
    # Both errors fall as N^{-1/2}: by 4, with a margin for eight seeds.
    for few, many in zip(errors[200], errors[3200], strict=True):
        assert few < 0.25
        assert 2.5 < few / many < 6.5


@pytest.mark.slow
def test_products_with_random_signs_are_pooled() -> None:
    """Without a taper their off-diagonal parts are left out; the diagonal is exact for the same V."""
    c = draw(400, 0)
    diagonal = np.diag(np.diagonal(SPREAD))
    found = predicted(c, probes=True)
    pooled = probing.pool(found.departure.spread, jnp.ones(400, bool))
    np.testing.assert_allclose(pooled.left.T @ pooled.right, SPREAD, atol=0.1)
    whole = found._replace(log_weight=jnp.zeros(400))
    x = select_and_move(WHOLE[0.0], whole, c)[3]
    exact = whole._replace(departure=whole.departure._replace(spread=jnp.broadcast_to(diagonal, (400, M, M))))
    again = select_and_move(WHOLE[0.0], exact, c)[3]
    # The pooled diagonal is sum_k V_jk s_k s_j over particles: equal up to the sampling error of the signs.
    np.testing.assert_allclose(x, again, atol=0.15)


def test_products_of_single_observations_are_exact_without_a_taper() -> None:
    """With at least as many particles as observations, no vector mixes two of them; one particle is undefined."""
    n = 2 * M + 1
    vectors = probing.class_vectors(jax.random.key(0), n, M, None)
    products = (vectors @ SPREAD).at[0].set(jnp.nan)
    slopes = jnp.broadcast_to(jnp.array([1.0, 2.0, 0.5]), (n, M))
    pooled = probing.pool(Products(vectors, products, slopes), jnp.ones(n, bool))
    assert not pooled.mixed
    found = np.asarray(pooled.left.T @ pooled.right)
    np.testing.assert_allclose(found, SPREAD * np.outer(slopes[0], slopes[0]), rtol=1e-5)


@pytest.mark.slow
def test_selection_that_uses_everything_leaves_no_move() -> None:
    c = draw(100, 1)
    found = predicted(c)
    whole = found._replace(log_weight=0.01 * jnp.sum(found.log_weight, axis=1))  # weak enough for alpha = 1
    move = WHOLE[1.0]
    _, ancestors, alpha, parents, record = select_and_move(move, whole, c)
    assert float(alpha) == 1.0
    np.testing.assert_allclose(parents, c[ancestors], atol=1e-5)
    assert float(record.moved_share) == 0.0


def test_selection_is_used_where_the_ensemble_is_not_gaussian() -> None:
    gaussian = float(moved(draw(400, 2), None)[4].selection_share)
    two = jnp.where(jnp.arange(400)[:, None] % 2 == 0, 3.0, -3.0) + 0.3 * draw(400, 2)
    both = float(moved(two, None)[4].selection_share)
    assert gaussian < 0.3
    assert both > 0.8


@pytest.mark.slow
def test_what_is_missing_or_undefined_does_not_matter() -> None:
    c = draw(100, 3)
    some = np.array([Y[0], np.nan, np.nan])
    x = moved(c, y=some)[3]
    found = predicted(c, y=some)
    garbage = found.departure._replace(error=found.departure.error.at[:, 1].set(jnp.nan).at[:, 2].set(1e9))
    whole = Predicted(jnp.sum(found.log_weight, axis=1), garbage)
    again = select_and_move(WHOLE[0.0], whole, c)[3]
    np.testing.assert_allclose(x, again, rtol=1e-6)
    land = c.at[:, 2].set(jnp.nan)  # no value there in any particle
    found = predicted(c)
    whole = found._replace(log_weight=jnp.sum(found.log_weight, axis=1))
    with_land = select_and_move(WHOLE[None], whole, land)[3]
    np.testing.assert_array_equal(jnp.isnan(with_land), jnp.isnan(land))


@pytest.mark.slow
def test_one_wide_block_is_the_move_without_a_taper() -> None:
    c = draw(100, 4)
    wide = ndda.Taper(1e6, ndda.Euclidean(), {"y": np.arange(M)}, state=np.arange(D)).place((D,), {"y": ((M,), 1)})
    local = LocalAncestors.at(wide, (D,), np.inf)
    found = predicted(c)
    whole = found._replace(log_weight=jnp.sum(found.log_weight, axis=1))
    for share in (0.0, None):
        near = select_and_move(PlacedMove(local, wide, (0,), share), found, c)
        far = select_and_move(WHOLE[share], whole, c)
        np.testing.assert_allclose(near[3], far[3], atol=2e-3)
        np.testing.assert_array_equal(near[1][:, 0], far[1])


@pytest.mark.slow
def test_leaving_out_missing_observations_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many observations near each block, and few of them present: nowhere, in one place, and everywhere."""
    d, m, n = 6, 130, 24
    rng = np.random.default_rng(1)
    taper = ndda.Taper(3.0, ndda.Ring(6), {"y": 6.0 * np.arange(m) / m}, state=np.arange(d)).place(
        (d,), {"y": ((m,), 1)}
    )
    c = jnp.asarray(rng.normal(size=(n, d)))
    look = rng.normal(size=(m, d)) / d
    signs = jnp.asarray(rng.choice([-1.0, 1.0], size=(n, 1, m)))
    move = PlacedMove(LocalAncestors.at(taper, (d,), 0.0), taper, (0,))
    patterns = [np.arange(m) < 9, np.zeros(m, bool), np.ones(m, bool), np.arange(m) % 2 == 0]
    residuals = [jnp.where(x[None], rng.normal(size=m)[None] - c @ look.T, 0.0) for x in patterns]

    def moved(residual: jax.Array) -> tuple:
        ones = jnp.ones((n, m))
        found = Predicted(-0.25 * residual**2, Departure(residual, ones, ones, Products(signs, 0.3 * signs, ones)))
        return move.select_and_move(KEYS, found, c, None, 0.5, WeightTempering())

    results = []
    for limit in (1, 10**9):
        monkeypatch.setattr(kalman_move, "WORTH_LEAVING_OUT", limit)
        compiled = jax.jit(lambda residual: moved(residual))  # a function of its own for each limit
        results.append([compiled(residual) for residual in residuals])
    for new, old in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(new, old, atol=2e-4)


def ring(y: jax.Array) -> None:
    """Two frames on a ring of 12: the second is the state."""

    def step(frames: tuple[jax.Array, jax.Array], y_t: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        before, now = frames
        x = numpyro.sample("x", dist.Normal(0.9 * jnp.roll(now, 1) + 0.05 * before, 0.3).to_event(1))
        numpyro.sample("y", dist.Normal(x[::2], 0.3).to_event(1), obs=y_t)
        return (now, x), None

    start = numpyro.sample("x0", dist.Normal(jnp.zeros(12), 1.0).to_event(1))
    scan(step, (start, start), y)


@pytest.mark.slow
def test_a_program_with_two_frames_moves_both() -> None:
    taper = ndda.Taper(3.0, ndda.Ring(12), {"y": np.arange(0, 12, 2)}, state=np.arange(12))
    y = jax.random.normal(jax.random.key(0), (4, 6))
    run = ndda.Filter(ndda.FAAPF(ring, taper=taper), num_particles=32, progress_bar=False)
    run.run(jax.random.key(1), y)
    stats = run.result.sample_stats
    assert stats["non_gaussianity"].shape == (1, 4, 12)
    assert stats["selection_share"].shape == (1, 4)
    assert 0.5 < stats["moved_share"].mean() <= 1.0
    assert run.result.attributes["move"].startswith("KalmanMove(")
    tree = run.to_datatree()
    assert tree["sample_stats"]["non_gaussianity"].dims == ("chain", "time", "block")
    with pytest.raises(ValueError, match="localized resampling a particle has a parent for each block"):
        run.smoothed()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"selection_share": 1.5}, "selection_share=1.5; give a number from 0"),
        ({"lowest": 1.0, "highest": (2.0, 0.0)}, "lowest=1.0 and highest=.*each lowest value must be below"),
        ({"lowest": float("nan")}, "NaN in lowest"),
        ({"radius": 0.0}, "radius=0.0; give a positive half-width"),
        ({"noise_level": -1.0}, "noise_level=-1.0"),
        ({"most_products": -1}, "most_products=-1"),
    ],
)
def test_wrong_settings_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KalmanMove(**wrong)


def test_a_radius_needs_a_taper() -> None:
    with pytest.raises(ValueError, match="no taper, which the radius needs"):
        ndda.FAAPF(ring, move=KalmanMove(radius=2.0))
    for wrong in ({"move": "yes"}, {"move": KalmanMove}):
        with pytest.raises(TypeError, match="move"):
            ndda.FAAPF(ring, **wrong)
    with pytest.raises(TypeError, match="selection_share=True; give a number"):
        KalmanMove(selection_share=True)


@pytest.mark.slow
def test_bounds_hold_for_moved_states_and_have_to_fit() -> None:
    c = draw(100, 5)
    found = predicted(c, np.array([9.0, -9.0, 9.0]))
    whole = found._replace(log_weight=jnp.sum(found.log_weight, axis=1))
    free = select_and_move(WHOLE[0.0], whole, c)[3]
    bounds = KalmanMove(lowest=[-np.inf, -1.0, -np.inf, -np.inf], highest=2.0).bounds((D,))
    held = select_and_move(PlacedMove(None, None, (0,), 0.0, bounds, (0,)), whole, c)[3]
    assert np.any(np.asarray(free) > 2.0)
    np.testing.assert_allclose(held, np.clip(free, [-np.inf, -1.0, -np.inf, -np.inf], 2.0))
    with pytest.raises(ValueError, match=r"3 values of lowest for a state of shape \(7, 4\); give one number, or 4"):
        KalmanMove(lowest=(0.0, 0.0, 0.0)).bounds((7, 4))


def test_an_observation_without_a_variance_selects_with_all_its_power() -> None:
    c = draw(100, 6)
    found = predicted(c)
    departure = found.departure._replace(
        error=found.departure.error.at[:, 1].set(jnp.inf), residual=found.departure.residual.at[:, 1].set(0.0)
    )
    weights = jnp.sum(0.02 * found.log_weight, axis=1)  # weak enough for alpha = 1
    _, _, alpha, _, record = select_and_move(WHOLE[None], Predicted(weights, departure), c)
    assert float(alpha) == 1.0
    assert float(record.moved_share) == 0.0
    one = found._replace(log_weight=weights, departure=departure)
    none = select_and_move(WHOLE[0.0], one, c)
    assert float(none[4].moved_share) == 1.0


@pytest.mark.slow
def test_equal_weights_leave_everything_to_the_move_and_no_genealogy_smooths_what_moved() -> None:
    run = ndda.Filter(ndda.FAAPF(ring, weight=ndda.Equal(), move=True), num_particles=16, progress_bar=False)
    run.run(jax.random.key(1), jnp.ones((2, 6)))
    np.testing.assert_array_equal(run.result.sample_stats["selection_share"], 0.0)
    np.testing.assert_array_equal(run.result.sample_stats["moved_share"], 1.0)
    with pytest.raises(ValueError, match="ancestors of this result were moved"):
        run.smoothed(1)
    assert "moved by a regression" in str(run.result.attributes["evidence_bias_reasons"])


LARGE = """
import jax, jax.numpy as jnp, numpy as np
import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.smc import Departure, LocalAncestors, PlacedMove, Predicted, Products, WeightTempering

d, n = 1024, 64
taper = ndda.Taper(48.0, ndda.Ring(d), {"y": np.arange(d)}, state=np.arange(d)).place((d,), {"y": ((d,), 1)})
move = PlacedMove(LocalAncestors.at(taper, (d,), 0.0), taper, (0,), 0.0)
c, ones = jax.random.normal(jax.random.key(0), (n, d)), jnp.ones((n, d))
signs = jax.random.rademacher(jax.random.key(1), (n, 1, d), float)
found = Predicted(-0.25 * c**2, Departure(-c, ones, ones, Products(signs, signs, ones)))
keys = jax.random.key(2), jax.random.key(3)
run = jax.jit(lambda found, c: move.select_and_move(keys, found, c, None, 0.5, WeightTempering())[3])
assert np.isfinite(run(found, c)).all()
"""


@pytest.mark.slow
def test_a_large_local_move_does_not_wait_for_itself():
    """Factorizations that share out their batches over threads can wait for each other forever on two cores."""
    subprocess.run([sys.executable, "-c", LARGE], check=True, timeout=300)
