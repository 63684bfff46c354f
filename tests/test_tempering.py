"""Tempering of weights: tempered, or with tempered observation errors, against scipy's densities and each other."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.smc.resampling import systematic
from conftest import compilations
from numpyro.contrib.control_flow import scan
from scipy import stats

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.observation import GaussianLikelihood
from numpyro_diffusion_da.program import gaussian_observations
from numpyro_diffusion_da.results import advice
from numpyro_diffusion_da.smc import LocalAncestors, TemperableLogWeight, local_ancestors
from numpyro_diffusion_da.transition import DiffusionDynamics, GaussianDynamics

KEY = jax.random.key(0)
WEIGHT_TEMPERING, TEMPERING = ndda.smc.WeightTempering(), ndda.smc.LikelihoodTempering()


N, M, TARGET = 200, 8, 0.55  # of all selections, which then are compiled once


@functools.partial(jax.jit, static_argnums=0)
def select(tempering, weights, taper=None):
    """(log-weights, ancestors, alpha), with one key."""
    return tempering.select(KEY, weights, taper, systematic, TARGET)


def ess(log_weights) -> float:
    w = np.asarray(log_weights, np.float64)
    w = np.exp(w - w.max())
    return float(w.sum() ** 2 / (w**2).sum())


def curve(spread: float = 1.0) -> TemperableLogWeight:
    """Weights of N particles, M observations; errors that differ from particle to particle."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(N, M)), spread * rng.chisquare(1, size=(N, M)), rng.gamma(1.0, 3.0, size=(N, M))
    return TemperableLogWeight(*(x.astype(np.float32) for x in draws))


def exact_terms(weights: TemperableLogWeight, alpha: float) -> np.ndarray:
    """alpha log N(r; 0, I) integrated over N(0, variances), with the normaliser of R to the power of alpha."""
    n, s, v = (np.asarray(x, np.float64) for x in weights)
    whole = stats.norm.logpdf(np.sqrt(s), 0.0, np.sqrt(1 / alpha + v)) + 0.5 * np.log(2 * np.pi / alpha)
    return whole + alpha * n


@pytest.mark.parametrize("correlated", [False, True])
def test_moment_weights_have_the_errors_tempered(correlated):
    rng = np.random.default_rng(0)
    factor, mean = 0.7 * np.tril(rng.normal(size=(4, 4))), rng.normal(size=4)
    h, y = rng.normal(size=(3, 4)), np.array([0.3, np.nan, -1.0])
    root = np.tril(rng.normal(size=(3, 3))) + 2.0 * np.eye(3) if correlated else np.diag([0.3, 0.5, 0.7])
    step = GaussianDynamics(jnp.asarray(mean, jnp.float32), jnp.asarray(factor, jnp.float32))

    def observe(x):
        at = jnp.asarray(h, jnp.float32) @ x
        errors = jnp.asarray(root, jnp.float32)
        normal = dist.MultivariateNormal(at, scale_tril=errors) if correlated else dist.Normal(at, jnp.diagonal(errors))
        return gaussian_observations("y", normal, jnp.asarray(y, jnp.float32))

    likelihood = GaussianLikelihood(observe)

    @jax.jit
    def weigh():
        made = [ndda.Moment().temperable(step, likelihood), ndda.Moment()(step, likelihood)]
        return *made, ndda.Moment().temperable_pointwise(step, likelihood)

    (found, record), (plain, plain_record), (each, _) = jax.device_get(weigh())
    assert record.passes == plain_record.passes
    np.testing.assert_allclose(found.terms(1.0).sum(), plain, rtol=1e-5)
    seen = ~np.isnan(y)
    r, hvh = ((a @ a.T)[np.ix_(seen, seen)] for a in (root, h @ factor))
    for alpha in (1.0, 0.3, 1e-3):
        # N(y; h, R)^alpha is N(y; h, R / alpha) times a term of R and alpha alone.
        shared = 0.5 * (np.linalg.slogdet(2 * np.pi * r / alpha)[1] - alpha * np.linalg.slogdet(2 * np.pi * r)[1])
        exact = stats.multivariate_normal.logpdf(y[seen], (h @ mean)[seen], r / alpha + hvh) + shared
        np.testing.assert_allclose(found.terms(alpha).sum(), exact, rtol=2e-5, atol=1e-6)
        if not correlated:
            errors = np.diag(root) ** 2
            own = stats.norm.logpdf(y, h @ mean, np.sqrt(errors / alpha + np.sum((h @ factor) ** 2, axis=1)))
            own += 0.5 * np.log(2 * np.pi * errors / alpha) - 0.5 * alpha * np.log(2 * np.pi * errors)
            np.testing.assert_allclose(each.terms(alpha), np.where(seen, own, 0.0), rtol=2e-5, atol=1e-6)


def test_no_further_network_pass():
    prior = ndda.GaussianPrior(np.eye(4), np.eye(4))
    step = DiffusionDynamics(prior, prior.condition(jnp.zeros(4)), ndda.Sampler())
    likelihood = GaussianLikelihood(lambda x: gaussian_observations("y", dist.Normal(x[:2], 0.4), jnp.ones(2)))
    weights = (ndda.Dirac(), ndda.Moment(), ndda.Moment(noise_level=10.0))

    @jax.jit
    def weigh():
        whole = [(weight(step, likelihood), weight.temperable(step, likelihood)) for weight in weights]
        local = [(w.pointwise(step, likelihood), w.temperable_pointwise(step, likelihood)) for w in weights]
        return whole, local, ndda.Moment(probes=1).temperable_pointwise(step, likelihood)

    whole, local, (probed, probed_record) = jax.device_get(weigh())
    for ((logs, record), (found, temperable_record)), axis in [*((w, -1) for w in whole), *((w, None) for w in local)]:
        assert record.passes == temperable_record.passes
        terms = found.terms(1.0)
        np.testing.assert_allclose(terms if axis is None else terms.sum(axis), logs, rtol=1e-4)
    np.testing.assert_allclose(probed.variances, local[1][1][0].variances, rtol=1e-4)
    assert probed_record.passes.vjp == 1
    with pytest.raises(ValueError, match="leave probes out"):
        ndda.Moment(probes=1).temperable(step, likelihood)


@pytest.mark.parametrize("taper", [None, np.linspace(0.0, 1.0, M, dtype=np.float32)])
def test_without_spread_it_is_tempering(taper):
    weights = curve(20.0)._replace(variances=np.zeros((N, M), np.float32))
    logs = weights.terms(1.0) @ (np.ones(M, np.float32) if taper is None else taper)
    expected, found = select(WEIGHT_TEMPERING, logs), select(TEMPERING, weights, taper)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert 0.0 < expected[2] < 0.9
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-3)
    # Both find alpha to within that; it can move an ancestor that lies on an edge.
    assert np.mean(np.asarray(found[1]) == np.asarray(expected[1])) > 0.99


@pytest.mark.parametrize("spread", [1e-3, 3.0, 1e2, 1e5])
def test_it_hits_its_target(spread):
    weights = curve(spread)
    weights = weights._replace(log_normalizers=min(spread, 1.0) * weights.log_normalizers)
    log_weights, ancestors, alpha = select(TEMPERING, weights)
    at_one, at_alpha = (exact_terms(weights, a).sum(1) for a in (1.0, float(alpha)))
    np.testing.assert_allclose(log_weights, at_one, rtol=1e-4, atol=1e-3)
    if ess(at_one) >= TARGET * N:
        assert alpha == 1.0
    else:
        np.testing.assert_allclose(ess(at_alpha), TARGET * N, rtol=1e-2)
    # Ancestors are by the weights at alpha: systematic resampling is within one of each number.
    w = np.exp(at_alpha - at_alpha.max())
    counts = np.bincount(np.asarray(ancestors), minlength=N)
    assert np.all(np.abs(counts - N * w / w.sum()) < 1.02)


def test_an_ess_that_is_not_monotone():
    """Where V is large the weight falls at once and then hardly; where it is zero it falls steadily, and they cross."""
    weights = TemperableLogWeight(*np.zeros((3, N, M), np.float32))
    weights.squared_residuals[:, 0], weights.variances[:, 0] = np.repeat([[30.0, 1e5], [0.0, 1e5]], N // 2, axis=1)
    at = [ess(exact_terms(weights, alpha).sum(1)) for alpha in (1e-6, 0.05, 0.4, 1.0)]
    assert at[1] < TARGET * N < 190 < at[2]
    assert at[3] < TARGET * N < 190 < at[0]
    alpha = float(select(TEMPERING, weights)[2])
    assert 0.0 < alpha < 1.0
    assert ess(exact_terms(weights, alpha).sum(1)) >= TARGET * N * (1 - 1e-3)


def test_what_cannot_be_selected_is_not():
    weights = curve()
    dead = np.where(np.arange(N)[:, None] % 2, weights.squared_residuals, -np.inf)
    log_weights, ancestors, alpha = select(TEMPERING, weights._replace(squared_residuals=dead))
    assert np.all(np.isneginf(log_weights[::2]))
    assert np.all(np.asarray(ancestors) % 2 == 1)
    assert 0.0 < alpha < 1.0
    for value in (0.0, -np.inf):
        weights = TemperableLogWeight(*np.full((3, N, M), value, np.float32))
        _, ancestors, alpha = select(TEMPERING, weights)
        np.testing.assert_array_equal(ancestors, np.arange(N))
        assert alpha == 1.0


@pytest.mark.slow
def test_blocks_have_alphas_of_their_own():
    weights = curve(30.0)
    taper = ndda.Taper(2.0, ndda.Ring(M), {"y": np.arange(M)}, state=np.arange(M))
    placed = taper.place((M,), {"y": ((M,), 1)})
    each = LocalAncestors.at(placed, (M,), 0.0)
    log_weights, ancestors, alphas = each.select(KEY, jax.tree.map(jnp.asarray, weights), systematic, TARGET, TEMPERING)
    tapers = np.asarray(placed.taper(placed.points), np.float32)
    assert len(np.unique(alphas)) == M
    for block in (0, 5):
        alone = select(TEMPERING, weights, tapers[block])
        np.testing.assert_allclose(log_weights[:, block], alone[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(alphas[block], alone[2], rtol=1e-3)
        assert np.mean(np.asarray(ancestors[:, block]) == np.asarray(local_ancestors.keep_places(alone[1]))) > 0.95
        at_alpha = exact_terms(weights, float(alphas[block])) @ tapers[block]
        np.testing.assert_allclose(ess(at_alpha), TARGET * N, rtol=1e-2)


# --- programs ---------------------------------------------------------------------------------------------------------


def program(y, counts=None):
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(12), 2.0).to_event(1))

    def step(x, inputs):
        y_t, n_t = inputs
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=y_t)
        if n_t is not None:
            numpyro.sample("n", dist.Poisson(jnp.exp(x[0])), obs=n_t)
        return x, None

    scan(step, x0, (y, counts))


def make(**settings) -> ndda.Filter:
    return ndda.Filter(ndda.FAAPF(program, **settings), num_particles=50, progress_bar=False)


Y = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def tempered():
    filter_ = make()
    filter_.run(KEY, Y)
    return filter_


@pytest.mark.slow
def test_filters_with_either_tempering(tempered):
    inside = make(tempering=TEMPERING)
    inside.run(KEY, Y)
    with compilations() as found:
        inside.run(KEY, Y + 0.1)
        inside.run(KEY, Y)
    assert not found
    tempered.run(KEY, Y)
    first, second = tempered.result.sample_stats, inside.result.sample_stats
    # Before tempering the weights of the first step are the same, and so is what is said of the evidence.
    np.testing.assert_allclose(second["log_weights"][..., 0], first["log_weights"][..., 0], rtol=1e-4)
    for name in ("log_evidence_increment", "ess"):
        np.testing.assert_allclose(second[name][:, 0], first[name][:, 0], rtol=1e-3)
    assert 0.0 < second["tempering"][0, 0] < first["tempering"][0, 0] < 1.0
    assert inside.to_datatree().attrs["tempering"] == "LikelihoodTempering()"


def test_a_filter_of_local_ancestors_tempers_block_by_block():
    taper = ndda.Taper(1.0, ndda.Ring(12), {"y": np.arange(12)}, state=np.arange(12))
    local = ndda.FAAPF(program, tempering=TEMPERING, taper=taper)
    model = ndda.program.StateSpaceModel(program, (Y,))
    inputs = jax.tree.map(lambda x: x[0], model.time_inputs())
    state = ndda.smc.fa_apf.init(jnp.zeros((50, 12)))
    _, info = jax.eval_shape(local.kernel(model), KEY, state, inputs)  # traced, not computed
    assert (info.tempering.shape, info.log_weights.shape, info.ancestors.shape) == ((12,), (50, 12), (50, 12))


def test_refusals():
    counts = np.ones(3, np.float32)
    with pytest.raises(
        ValueError,
        match=r"likelihood of site 'n' cannot be tempered inside its weight: it is not Gaussian.*"
        r"WeightTempering\(\) in place of",
    ):
        make(tempering=TEMPERING).run(KEY, Y, counts)
    ndda.FAAPF(program, tempering=TEMPERING, weight=ndda.Equal()).kernel(
        ndda.program.StateSpaceModel(program, (Y, counts))
    )
    with pytest.raises(
        TypeError, match=r"FAAPF got tempering=1.05; expected a Tempering: write tempering=ndda.smc.WeightTempering\(\)"
    ):
        ndda.FAAPF(program, tempering=1.05)

    class Halved(ndda.transition.PredictiveWeight):
        def __call__(self, step, likelihood):
            log_weight, record = ndda.Moment()(step, likelihood)
            return 0.5 * log_weight, record

    with pytest.raises(TypeError, match="Halved weights are not defined for tempered observation errors"):
        make(weight=Halved(), tempering=TEMPERING).run(KEY, Y)


@pytest.mark.slow
def test_a_run_warns_of_strong_tempering(tempered, capsys):
    with pytest.warns(UserWarning, match=r"tempered to alpha = 0\.0.*FAAPF\(model, taper=ndda\.Taper.*more particles"):
        tempered.run(KEY, Y + 30.0)
    tempered.print_summary()
    assert "or take more particles" in " ".join(capsys.readouterr().out.split())
    for attributes, words in (
        ({"weight": "Dirac()"}, r"weight=ndda.Moment()"),
        ({"algorithm": "Bootstrap"}, "use ndda.FAAPF(model)"),
    ):
        result = dataclasses.replace(tempered.result, attributes={**tempered.result.attributes, **attributes})
        assert words in advice.tempering_advice(result)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tempered.run(KEY, np.full_like(Y, np.nan))
