"""Analysis updates of the ensemble Kalman filter: exact given the ensemble's covariances, with and without a taper."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.linalg
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.filters import placement
from numpyro_diffusion_da.smc import enkf, ensemble_update, init, probing

UPDATES = {"perturbed": ndda.smc.PerturbedObservations(), "square root": ndda.smc.SquareRoot()}
D = 6
SITES = np.arange(D)


def ensemble(n: int, m: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(members, H, y) of a linear observation y = H x + N(0, I)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) @ rng.normal(size=(D, D)) + 3.0
    return x.astype(np.float32), rng.normal(size=(m, D)), rng.normal(size=m)


def analysed(update, x, h, y, taper=None):
    """The kernel's analysis of members that the forecast leaves where they are; NaN in y is missing."""

    def residual(x, particle, y):
        return jnp.where(jnp.isnan(y), 0.0, jnp.nan_to_num(y) - h.astype(np.float32) @ x)

    kernel = enkf.build_kernel(
        lambda key, particle, y: (particle, ()),
        residual,
        lambda key, x, particle, y, record: (x, record),
        update=update,
        taper=taper,
    )
    state, info = jax.jit(kernel)(jax.random.key(1), init(jnp.asarray(x)), jnp.asarray(y, jnp.float32))
    np.testing.assert_array_equal(info.ancestors, np.arange(len(x)))
    assert float(state.log_evidence) == 0.0
    return np.asarray(state.particles, np.float64)


def kalman(mean, p, h, y, seen_through=None):
    """(mean, covariance) of a Kalman update, R = I; P H^T and H P H^T multiplied by two tapers where given."""
    state_taper, observation_taper = (1.0, 1.0) if seen_through is None else seen_through
    gain = np.linalg.solve(observation_taper * (h @ p @ h.T) + np.eye(len(h)), (state_taper * (p @ h.T)).T).T
    return mean + gain @ (y - h @ mean), p - gain @ h @ p


@pytest.mark.parametrize("m", [3, 30])
def test_square_root_is_exact(m):
    """Mean and covariance of the Kalman update with the ensemble's own; fewer and more values than members."""
    x, h, y = ensemble(12, m)
    got = analysed(ndda.smc.SquareRoot(), x, h, y)
    mean, covariance = kalman(x.mean(0), np.cov(x.T), h, y)
    scale = np.abs(np.cov(x.T)).max()
    np.testing.assert_allclose(got.mean(0), mean, atol=1e-3)
    np.testing.assert_allclose(np.cov(got.T), covariance, atol=2e-5 * scale)


def test_square_root_moves_the_members_least():
    """The symmetric root: T of the anomalies is the inverse root of I + Y Y^T / (N - 1)."""
    x, h, y = ensemble(8, 3)
    got = analysed(ndda.smc.SquareRoot(), x, h, y)
    before, after = x - x.mean(0), got - got.mean(0)
    predicted = before @ h.T
    root = np.linalg.inv(scipy.linalg.sqrtm(np.eye(8) + predicted @ predicted.T / 7).real)
    np.testing.assert_allclose(after, root @ before, atol=1e-4)


@pytest.mark.parametrize("name", UPDATES)
def test_a_taper_that_reaches_all_changes_nothing(name):
    x, h, y = ensemble(9, 4)
    wide = ndda.Taper(np.inf, ndda.Ring(D), {"y": SITES[:4]}, state=SITES).place((D,), {"y": ((4,), 1)})
    plain, tapered = (analysed(UPDATES[name], x, h, y, taper) for taper in (None, wide))
    np.testing.assert_allclose(tapered, plain, atol=1e-3)


def local(radius: float = 1.2) -> tuple[np.ndarray, np.ndarray, ndda.smc.localization.PlacedTaper]:
    """(H, tapers between state and observations, the taper) of every second site observed."""
    h = np.eye(D)[::2]
    taper = ndda.Taper(radius, ndda.Ring(D), {"y": SITES[::2]}, state=SITES).place((D,), {"y": ((3,), 1)})
    return h, taper.taper(taper.points), taper


@pytest.mark.parametrize("batch", [2**24, 1])
def test_square_root_with_a_taper_is_a_kalman_update_at_each_site(batch, monkeypatch):
    """With the error variances over rho (Hunt et al. 2007), all sites at once or one after the other."""
    monkeypatch.setattr(ensemble_update, "LARGEST_BLOCK", batch)
    (x, _, _), (h, rho, taper) = ensemble(7, 1), local()
    y = np.array([0.5, np.nan, -1.0])
    got = analysed(ndda.smc.SquareRoot(), x, h, y, taper)
    for site in SITES:
        near = (rho[site] > 0) & ~np.isnan(y)
        root = np.sqrt(rho[site][near])
        mean, covariance = kalman(x.mean(0), np.cov(x.T), root[:, None] * h[near], root * y[near])
        np.testing.assert_allclose(got[:, site].mean(), mean[site], rtol=2e-4, atol=1e-4)
        np.testing.assert_allclose(got[:, site].var(ddof=1), covariance[site, site], rtol=2e-4)


def test_perturbed_observations_with_a_taper():
    """The mean's update is that of the gain whose covariances are multiplied by the taper."""
    (x, _, _), (h, rho, taper) = ensemble(7, 1), local(0.9)
    y, seen = np.array([0.5, np.nan, -1.0]), [0, 2]
    got = analysed(ndda.smc.PerturbedObservations(), x, h, y, taper)
    between = taper.between_observations()[np.ix_(seen, seen)]
    mean, _ = kalman(x.mean(0), np.cov(x.T), h[seen], y[seen], (rho[:, seen], between))
    np.testing.assert_allclose(got.mean(0), mean, rtol=2e-4, atol=1e-4)
    far = np.all(rho[:, seen] == 0, axis=1)
    assert far.any()
    np.testing.assert_allclose(got[:, far], x[:, far], atol=1e-6)


@pytest.mark.parametrize("name", UPDATES)
def test_nothing_observed_changes_nothing(name):
    (x, h, _), seen = ensemble(5, 2), np.full(2, np.nan)
    np.testing.assert_allclose(analysed(UPDATES[name], x, h, seen), x, atol=1e-5)


def test_settings_are_refused():
    for wrong, value in ((ndda.RTPS, -0.1), (ndda.RTPS, 1.5), (ndda.ForecastMultiplicative, 0.5)):
        with pytest.raises(ValueError, match=rf"{wrong.__name__} got \w+={value}; give"):
            wrong(value)


# --- of a program -----------------------------------------------------------------------------------------------------


def program(y):
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(D), 1.0).to_event(1))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x[::2], 0.5).to_event(1), obs=y_t)
        return x, None

    scan(step, x0, y)


def correlated(y):
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(D), 1.0).to_event(1))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
        numpyro.sample("y", dist.MultivariateNormal(x[::2], 0.25 * jnp.eye(3)), obs=y_t)
        return x, None

    scan(step, x0, y)


Y = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
INFLATION = (ndda.ForecastMultiplicative(1.05), ndda.RTPS(0.5))
TAPER = ndda.Taper(1.2, ndda.Ring(D), {"y": SITES[::2]}, state=SITES)


def test_a_program_with_a_taper():
    """The settings are in the attributes, and far from what is observed the analysis is the forecast."""
    only_first = np.where(np.arange(3) == 0, Y, np.nan).astype(np.float32)
    algorithm = ndda.EnKF(program, update=ndda.smc.SquareRoot(), taper=TAPER, inflation=INFLATION)
    online, states = ndda.OnlineFilter(algorithm, num_particles=12), []
    for y in (only_first, np.full_like(Y, np.nan)):
        start = online.init(jax.random.key(0), y[:1])
        states.append(online.step(jax.random.key(1), start, y[:1])[0].particles)
    moved = np.abs(states[0] - states[1]).max(0)
    assert np.all(moved[[5, 0, 1]] > 1e-3)
    np.testing.assert_allclose(moved[3], 0.0, atol=1e-5)
    settings = algorithm.settings(ndda.program.StateSpaceModel(program, (Y,)))
    assert settings["update"] == "SquareRoot()"
    assert settings["taper"] == repr(TAPER)
    assert settings["inflation"] == "ForecastMultiplicative(factor=1.05), RTPS(alpha=0.5)"


def test_a_prior_gives_the_places_of_its_state():
    """By its layout; two sites, one of them with correlated errors at one place."""
    layout = ndda.Layout((D,), ("site",), (("site", tuple(10 * SITES)),))
    prior = ndda.DenoiserPrior(lambda z, s, x: z / (1 + s**2), layout=layout, scale=0.5, noise_range=(0.02, 80.0))

    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
            numpyro.sample("pair", dist.MultivariateNormal(x[3:5], jnp.eye(2)), obs=y_t[:2])
            numpyro.sample("y", dist.Normal(x[::2], 0.5).to_event(1), obs=y_t[2:])
            return x, None

        scan(step, jnp.zeros(D), y)

    taper = ndda.Taper(30.0, ndda.Ring(60), {"y": [0, 20, 40], "pair": [35]})
    placed = placement.place_taper(taper, ndda.program.StateSpaceModel(model, (np.zeros((2, 5)),)))
    np.testing.assert_array_equal(placed.points[:, 0], 10 * SITES)
    np.testing.assert_array_equal(placed.observations[:, 0], [35, 35, 0, 20, 40])


@pytest.mark.parametrize(
    ("model", "taper", "sentence"),
    [
        (program, ndda.Taper(1.2, ndda.Ring(D), {"z": [0]}, state=SITES), r"positions of \['z'\], .* \['y'\]"),
        (program, ndda.Taper(1.2, ndda.Ring(D), {"y": SITES[::2]}), r"give Taper\(\.\.\., state=...\)"),
        (correlated, TAPER, "site 'y' has correlated errors"),
    ],
)
def test_a_program_and_a_taper_that_do_not_fit(model, taper, sentence):
    with pytest.raises(ValueError, match=sentence):
        ndda.EnKF(model, taper=taper).kernel(ndda.program.StateSpaceModel(model, (Y,)))


@pytest.mark.slow
def test_a_transition_without_noise_is_taken():
    """It is only sampled: `Delta` gives what a `Normal` of next to no spread gives."""
    y = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)

    def model_of(transition):
        def model(y):
            def step(x, y_t):
                x = numpyro.sample("x", transition(x))
                numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y_t)
                return x, None

            scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(2), 1.0).to_event(1)), y)

        return model

    found = []
    for transition in (lambda x: dist.Delta(0.9 * x).to_event(1), lambda x: dist.Normal(0.9 * x, 1e-6).to_event(1)):
        run = ndda.Filter(ndda.EnKF(model_of(transition)), num_particles=20, progress_bar=False)
        run.run(jax.random.key(0), y)
        found.append(run.result.posterior["x"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


@pytest.mark.parametrize("radius", [None, *(pytest.param(radius, marks=pytest.mark.slow) for radius in (1e6, 1.0))])
def test_the_covariance_of_the_transition_is_computed_and_not_sampled(radius):
    """All members start at one state, so nothing is sampled: ten of them have the mean of the Kalman filter."""
    d, error = 4, 0.5
    covariance = 0.6 ** np.abs(np.arange(d)[:, None] - np.arange(d)[None])
    y = np.array([[1.0, -2.0]], np.float32)

    def program(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.MultivariateNormal(0.9 * x, jnp.asarray(covariance)))
            numpyro.sample("y", dist.Normal(x[::2], error).to_event(1), obs=y_t)
            return x, None

        scan(step, jnp.ones(d), y)

    taper = None
    if radius is not None:
        taper = ndda.Taper(radius, ndda.Euclidean(), {"y": np.arange(0, d, 2)}, state=np.arange(d))
    algorithm = ndda.EnKF(program, taper=taper, transition_covariance=True)
    run = ndda.Filter(algorithm, num_particles=10, progress_bar=False)
    run.run(jax.random.key(0), y)
    h = np.eye(d)[::2]
    rows = h @ covariance
    # A known covariance needs no taper, so an observation moves what is near it by the whole of its covariance.
    near = np.ones((d, 2)) if radius != 1.0 else np.abs(np.arange(d)[:, None] - np.array([0, 2])[None]) < 2
    gain = (near * rows.T) @ np.linalg.inv(rows @ h.T + error**2 * np.eye(2))
    expected = 0.9 + gain @ (y[0] - 0.9)
    np.testing.assert_allclose(run.result.posterior["x"][0, :, 0].mean(0), expected, atol=2e-5)
    with pytest.raises(ValueError, match=r"this covariance is defined for update=ndda\.smc\.Perturbed"):
        ndda.EnKF(program, update=ndda.smc.SquareRoot(), transition_covariance=True)


@pytest.mark.parametrize(("m", "n"), [(600, 16), (120, 400)])  # fewer vectors than observations, and more
def test_products_of_classes_find_the_covariance_near_each_observation(m, n):
    """Vectors with random signs everywhere mix near and far covariances; those of classes do not."""
    at = np.arange(m)
    apart = np.minimum(np.abs(at[:, None] - at[None]), m - np.abs(at[:, None] - at[None]))
    covariance = np.exp(-0.5 * (apart / 3.0) ** 2)
    taper = ndda.Taper(20.0, ndda.Ring(m), {"y": at}, state=at).place((m,), {"y": ((m,), 1)})
    vectors = probing.class_vectors(jax.random.key(0), n, m, taper)
    counts = np.sum(np.asarray(vectors) ** 2, axis=(0, 1))
    np.testing.assert_allclose(counts, max(1, vectors.shape[0] * vectors.shape[1] // m), rtol=1e-6)
    rho = taper.between_observations()
    made = probing.Products(vectors, vectors @ covariance.astype(np.float32), jnp.ones((n, m)))
    pooled = probing.pool(made, jnp.ones(n, bool))
    found = np.asarray(pooled.left.T @ pooled.right)
    np.testing.assert_allclose(rho * found, rho * covariance, atol=2e-3)  # 0.9 with random signs everywhere


def test_members_of_a_class_are_far_from_each_other():
    taper = ndda.Taper(8.0, ndda.Ring(120), {"y": np.arange(120)}, state=np.arange(120))
    classes = taper.place((120,), {"y": ((120,), 1)}).classes(30)
    apart = np.abs(np.arange(120)[:, None] - np.arange(120)[None])
    apart = np.minimum(apart, 120 - apart) + 120 * np.eye(120)
    assert apart[classes[:, None] == classes[None]].min() >= 10  # some four members, 30 apart at best


def test_observations_much_more_accurate_than_the_ensemble_keep_their_digits():
    """In single precision, rounding of Y Y^T is then larger than the observation errors."""
    rng = np.random.default_rng(0)
    n, m, d = 64, 40, 8
    anomalies = rng.normal(size=(n, d))
    anomalies -= anomalies.mean(0)
    look = 1e3 * rng.normal(size=(d, m))
    predicted = anomalies @ look
    innovation = (rng.normal(size=d) - anomalies) @ look + rng.normal(size=(n, m))
    left, values, right = np.linalg.svd(predicted, full_matrices=False)
    exact = (left @ ((values / (values**2 + n - 1))[:, None] * (right @ innovation.T))).T @ anomalies
    single = (jnp.asarray(x, jnp.float32) for x in (predicted, innovation.T))
    found = np.asarray(ensemble_update.kalman_coefficients(*single)).T @ anomalies
    np.testing.assert_allclose(found, exact, atol=1e-3)


def two_kinds(m, moving, radius=1.5, state=40, room=60):
    """Taper of two sites of m values each, with different half-widths, at fixed places or at places of the step."""
    at = {"fine": np.linspace(0.0, 39.5, m), "wide": np.linspace(0.3, 39.8, m)}
    given = {name: f"{name}_place" for name in at} if moving else at
    taper = ndda.Taper(
        {"fine": radius, "wide": 2 * radius},
        ndda.Ring(40),
        given,
        state=np.linspace(0, 40, state, endpoint=False),
        most_near=room if moving else None,
    )
    places = {f"{name}_place": jnp.asarray(rows, jnp.float32) for name, rows in at.items()}
    return taper.place((state,), {name: ((m,), 1) for name in at}, places=places)


@pytest.mark.parametrize("moving", [False, True])
def test_observations_near_each_observation_are_those_of_all_pairs(moving):
    which, rho, between = jax.jit(
        lambda: (*two_kinds(30, moving).near_observations(), two_kinds(30, moving).between_observations())
    )()
    found = np.zeros(between.shape)
    np.add.at(found, (np.arange(60)[:, None], which), rho)
    np.testing.assert_allclose(found, between, atol=2e-6)


@pytest.mark.slow
def test_without_all_pairs_an_update_is_the_same(monkeypatch):
    """Conjugate gradients with rows of near observations, against the direct solve."""
    n, m, d = 12, 30, 40
    rng = np.random.default_rng(3)
    x, residual = (jnp.asarray(rng.normal(size=(n, size)), jnp.float32) for size in (d, 2 * m))
    residual = residual.at[:, 4].set(0.0)  # missing
    vectors = probing.class_vectors(jax.random.key(1), n, 2 * m, None)
    root = rng.normal(size=(2 * m, 2 * m)) / 10
    spread = ensemble_update.TransitionSpread(
        x, residual, vectors, jnp.asarray(rng.normal(size=(n, vectors.shape[1], d)), jnp.float32),
        jnp.asarray(vectors @ (root @ root.T), jnp.float32),
    )  # fmt: skip

    def updates():
        """Each compiled by itself: LAPACK's solves at the same time can wait for each other."""
        taper, key = two_kinds(m, moving=False), jax.random.key(0)
        products = spread.state_products.reshape(-1, d)

        def perturbed():
            increments, error = ndda.smc.PerturbedObservations().prepared(key, residual, taper)
            return increments(x, None), error

        def with_spread(taper):
            increments, error = ensemble_update.with_transition_spread(key, residual, spread, taper)
            return increments(x, products, None), error

        of = (perturbed, lambda: with_spread(taper), lambda: with_spread(None))
        return [jax.tree.map(np.asarray, jax.jit(update)()) for update in of]

    direct = updates()
    monkeypatch.setattr(ensemble_update, "MOST_DENSE", 1)
    monkeypatch.setattr(ensemble_update, "LARGEST_GATHER", 1000)
    for (dense, exact), (sparse, error) in zip(direct, updates(), strict=True):
        assert exact == 0.0
        assert error < 1e-5
        np.testing.assert_allclose(sparse, dense, atol=2e-5 * np.abs(dense).max())


@pytest.mark.slow
def test_the_residual_of_a_solve_that_stops_early_is_in_the_result(monkeypatch):
    monkeypatch.setattr(ensemble_update, "MOST_DENSE", 1)
    monkeypatch.setattr(ensemble_update, "MOST_ITERATIONS", 1)

    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0).to_event(1))
            numpyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=y_t)
            return x, None

        scan(step, jnp.zeros(D), y)

    taper = ndda.Taper(1.0, ndda.Ring(D), {"y": SITES}, state=SITES)
    run = ndda.Filter(ndda.EnKF(model, taper=taper), num_particles=9, progress_bar=False)
    run.run(jax.random.key(0), np.ones((2, D), np.float32))
    residual = run.result.sample_stats["solver_residual"]
    assert residual.shape == (1, 9, 2)
    assert np.all((residual > 1e-3) & (residual < 1.0))


def largest_array(jaxpr) -> int:
    """Bytes of the largest array that a program computes, loops and branches included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size * v.aval.dtype.itemsize for v in equation.outvars if hasattr(v.aval, "dtype")]
        sizes += [largest_array(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)]
    return max(sizes)


@pytest.mark.parametrize("moving", [False, True])
def test_many_observations_make_no_array_of_all_pairs(moving):
    n, m, d = 4, 2500, 200
    x, residual = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((n, 2 * m), jnp.float32)

    def run(x, residual):
        taper = two_kinds(m, moving, radius=0.05, state=d, room=100)
        increments, error = ndda.smc.PerturbedObservations().prepared(jax.random.key(0), residual, taper)
        return increments(x, None), error

    assert largest_array(jax.make_jaxpr(run)(x, residual).jaxpr) < (2 * m) ** 2 * 4 / 10


LARGE = """
import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist, numpyro_diffusion_da as ndda
from numpyro.contrib.control_flow import scan
size = 16384

def model(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.95 * x, 0.3).to_event(1))
        numpyro.sample("y", dist.Normal(x[at], 1.0).to_event(1), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(size), 1.0).to_event(1)), y)

at = np.arange(0, size, size // 20)[:20]
taper = ndda.Taper(size / 40, ndda.Ring(size), {"y": at}, state=np.arange(size))
algorithm = ndda.EnKF(model, update=ndda.smc.SquareRoot(), taper=taper)
run = ndda.Filter(algorithm, num_particles=256, progress_bar=False, keep_observed=False)
run.run(jax.random.key(0), np.ones((3, 20), np.float32))
assert np.isfinite(run.result.posterior["x"]).all()
"""


@pytest.mark.slow
def test_a_large_square_root_does_not_wait_for_itself():
    """Decompositions that share out their batches over threads can wait for each other forever on two cores."""
    subprocess.run([sys.executable, "-c", LARGE], check=True, timeout=300)
