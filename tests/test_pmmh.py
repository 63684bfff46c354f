"""Particle-marginal Metropolis-Hastings: the kernel on a density with known noise, programs with exact posteriors."""

from __future__ import annotations

import warnings

import arviz as az
import cuthbert
import cuthbert.gaussian.kalman
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from conftest import BENCHMARKS, compilations, load_program
from monte_carlo import assert_mean
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.smc import pmmh

pytestmark = pytest.mark.slow  # each compiles filters of its own

KEY = jax.random.key(0)
Y = np.array([0.3, -0.2, 0.9, np.nan, 0.4, 1.1], np.float32)


def model(y):
    """A vector and a scalar parameter."""
    a = numpyro.sample("a", dist.Uniform(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(jnp.zeros(2), 0.3).to_event(1))
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(a * x, sigma[0]))
        numpyro.sample("y", dist.Normal(x, sigma[1]), obs=y_t)
        return x, None

    scan(step, x0, y)


@pytest.fixture(scope="module")
def inference():
    found = ndda.PMMH(
        ndda.Bootstrap(model), num_particles=16, num_warmup=60, num_samples=150, num_chains=2, progress_bar=False
    )
    found.run(KEY, Y)
    return found


# --- the kernel alone -------------------------------------------------------------------------------------------------


@jax.jit
def noisy_chains(keys):
    """Chains on N(1, 0.5^2) x N(0, 1) by a factor exp(s e - s^2 / 2) of mean 1 beside its density, warmed up."""
    noise = 1.2

    def log_evidence(key, theta):
        error = jax.random.normal(key)
        return -0.5 * (((theta[0] - 1.0) / 0.5) ** 2 + theta[1] ** 2) + noise * error - 0.5 * noise**2, error

    kernel = pmmh.build_kernel(lambda theta: jnp.zeros(()), log_evidence)
    ends, warm = jnp.asarray(pmmh.window_ends(400)), 400

    def chain(key):
        state = pmmh.init(key, jnp.array([3.0, 3.0]), lambda theta: jnp.zeros(()), log_evidence)

        def step(carry, n):
            state, adaptation = carry
            state, info = kernel(jax.random.fold_in(key, n), state, pmmh.proposal_factor(adaptation))
            adapted = pmmh.adapt(adaptation, state.position.parameters, info, ends[jnp.minimum(n, warm - 1)])
            adaptation = jax.tree.map(lambda new, old: jnp.where(n < warm, new, old), adapted, adaptation)
            return (state, adaptation), (state.position, info.is_accepted)

        (_, adaptation), (positions, accepted) = jax.lax.scan(
            step, (state, pmmh.start_adaptation(jnp.eye(2))), jnp.arange(4400)
        )
        return jax.tree.map(lambda x: x[warm:], (positions, accepted)), adaptation.covariance

    return jax.vmap(chain)(keys)


def test_chain_on_a_noisy_density_is_exact():
    (positions, accepted), covariance = jax.device_get(noisy_chains(jax.random.split(KEY, 32)))
    draws = positions.parameters.astype(float)
    for i, (mean, sd) in enumerate(((1.0, 0.5), (0.0, 1.0))):
        for values, exact in ((draws[:, :, i], mean), ((draws[:, :, i] - mean) ** 2, sd**2)):
            assert_mean(values.mean(1), exact)
    # At stationarity the errors of kept estimates are tilted by their own weight: N(s, 1) instead of N(0, 1).
    assert_mean(positions.record.mean(1), 1.2)
    # What was estimated for a point stays with it.
    same = ~accepted[:, 1:]
    assert np.all(np.diff(positions.log_evidence, axis=1)[same] == 0)
    np.testing.assert_allclose(np.median(covariance, 0), np.diag([0.25, 1.0]), atol=0.25)


def test_window_ends():
    assert np.flatnonzero(pmmh.window_ends(200)).tolist() == [11, 24, 49, 99, 199]
    assert not pmmh.window_ends(0).size


def test_top_level_api():
    algorithm = pmmh.as_top_level_api(lambda t: -0.5 * t @ t, lambda key, t: (jnp.zeros(()), ()), jnp.eye(2))
    state, info = jax.jit(lambda key: algorithm.step(key, algorithm.init(jnp.ones(2), key)))(KEY)
    assert 0.0 <= info.acceptance_rate <= 1.0
    assert state.position.parameters.shape == (2,)


# --- a program --------------------------------------------------------------------------------------------------------


def test_draws_and_statistics(inference):
    samples = inference.get_samples()
    assert {name: v.shape for name, v in samples.items()} == {"a": (300,), "sigma": (300, 2)}
    assert inference.get_samples(group_by_chain=True)["sigma"].shape == (2, 150, 2)
    assert np.all((samples["a"] > 0) & (samples["a"] < 1))
    stats = inference.result.sample_stats
    stay = ~stats["is_accepted"][:, 1:]
    assert stay.any()
    assert not stay.all()
    assert np.all(np.diff(stats["log_evidence"], axis=1)[stay] == 0)
    moved = np.abs(np.diff(inference.result.posterior["a"], axis=1))
    assert np.all((moved > 0) == ~stay)
    attributes = inference.result.attributes
    assert attributes["evidence_bias_reasons"] == ""
    assert 0.0 < attributes["log_evidence_std"] < 3.0


def test_a_second_run_compiles_nothing_and_repeats(inference):
    before = inference.result
    with compilations() as compiled:
        inference.run(KEY, Y)
        assert not compiled
        for name, values in before.posterior.items():
            np.testing.assert_array_equal(inference.result.posterior[name], values)
        inference.run(KEY, Y + 1.0)
    assert not compiled
    assert np.any(inference.result.posterior["a"] != before.posterior["a"])


def test_arviz_reads_it(inference, tmp_path):
    data = inference.to_arviz(dims={"sigma": ["which"]}, coords={"which": ["state", "observation"]})
    table = az.summary(data)
    assert set(table.index) == {"a", "sigma[state]", "sigma[observation]"}
    assert np.isfinite(table["r_hat"].astype(float)).all()
    assert float(az.ess(data)["a"]) > 1
    tree = inference.to_datatree()
    assert tree["posterior"]["sigma"].dims == ("chain", "draw", "sigma_dim_0")
    assert tree["sample_stats"]["log_evidence"].dims == ("chain", "draw")
    tree.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "run.nc", engine="h5netcdf") as read:
        np.testing.assert_array_equal(read["posterior"]["a"], tree["posterior"]["a"])
    for wrong, sentence in (
        ({"dims": {"b": []}}, "dims has"),
        ({"dims": {"sigma": []}}, "names 0 axes"),
        ({"dims": {"sigma": ["draw"]}}, "cannot name an axis"),
        ({"coords": {"station": [1]}}, "coords has"),
    ):
        with pytest.raises(ValueError, match=sentence):
            inference.to_datatree(**wrong)


def test_summary(inference, capsys):
    inference.print_summary()
    text = capsys.readouterr().out
    for words in ("PMMH with Bootstrap on 'model'", "150 x 2", "acceptance", "sigma[1]", "1 to 1.7"):
        assert words in text


def test_wrong_use_is_refused():
    numbers = {"num_particles": 4, "num_warmup": 1, "num_samples": 1, "progress_bar": False}
    with pytest.raises(TypeError, match="PMMH got the function model"):
        ndda.PMMH(model, **numbers)
    with pytest.raises(ValueError, match="num_samples=0"):
        ndda.PMMH(ndda.Bootstrap(model), **{**numbers, "num_samples": 0})
    for algorithm in (ndda.EnKF(model), ndda.FAAPF(model, weight=ndda.Equal())):
        with pytest.raises(ValueError, match="estimates no evidence"):
            ndda.PMMH(algorithm, **numbers).run(KEY, Y)
    with pytest.raises(RuntimeError, match="has not run yet"):
        ndda.PMMH(ndda.Bootstrap(model), **numbers).get_samples()


def squared(y):
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x**2, sigma), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0)), y)


PRIOR = ndda.GaussianPrior(0.9 * np.eye(1), 0.25 * np.eye(1))


def through_a_diffusion(y):
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))

    def step(x, y_t):
        x = numpyro.sample("x", ndda.DiffusionTransition(PRIOR, x))
        numpyro.sample("y", dist.Normal(x[0], sigma), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", PRIOR.climatology()), y)


@pytest.mark.parametrize(
    ("algorithm", "reasons"),
    [
        (ndda.Bootstrap(squared), []),
        (ndda.Bootstrap(squared, target_ess=0.3), ["tempered"]),
        (ndda.GuidedPF(through_a_diffusion), []),
        (ndda.GuidedPF(model, target_ess=0.3), ["tempered"]),
        (ndda.FAAPF(model, target_ess=0.0), []),
        (ndda.FAAPF(model), ["tempered"]),
        (ndda.FAAPF(model, weight=ndda.Dirac(), target_ess=0.0), ["Dirac weights leave out the spread"]),
        (ndda.FAAPF(squared, target_ess=0.0), ["observations linear in the state only"]),
        (ndda.FAAPF(through_a_diffusion, weight=ndda.Moment()), ["Gaussian transitions only", "tempered"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_biased_evidence_warns(algorithm, reasons):
    from numpyro_diffusion_da.inference import evidence
    from numpyro_diffusion_da.program import GlobalParameters

    known = GlobalParameters(ndda.program.StateSpaceModel(algorithm.model, (Y,))).placeholder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bias_reasons = evidence.check_evidence(algorithm, known, "PMMH")
    assert len(bias_reasons) == len(reasons)
    assert len(caught) == bool(reasons)
    for reason in reasons:
        assert reason in str(caught[0].message)
    if reasons:
        assert "use ndda.GuidedPF(model)" in str(caught[0].message)


# --- against exact posteriors -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    return load_program(BENCHMARKS / "parameters.py")


def test_the_benchmarks_evidence_is_the_kalman_filters(benchmark):
    """Against cuthbert's, in two dimensions."""
    y = benchmark.simulate(0, 2, 5)
    u, a, sigma = benchmark.rotation(2), 0.7, 0.6
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        one = jnp.eye(2)
        forward = cuthbert.gaussian.kalman.build_filter(
            jnp.zeros(2),
            one,
            lambda _: (jnp.asarray(a * u), jnp.zeros(2), benchmark.NOISE * one),
            lambda y_t: (one, jnp.zeros(2), sigma * one, y_t),
        )
        states = cuthbert.filter(forward, jnp.asarray(y, float), forward.init_prepare())
    got = benchmark.kalman_log_evidence(y, np.asarray(a), np.asarray(sigma))
    np.testing.assert_allclose(got, states.log_normalizing_constant[-1], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PMMH, bootstrap", "SMC^2, bootstrap", "PMMH, FA-APF, Dirac + tempering"])
def test_posteriors_are_exact_where_the_evidence_is_unbiased(benchmark, name):
    """Means within Monte Carlo error of the exact ones, on a short series; the control is far off."""
    samples = 150 if "tempering" in name else 500  # a bias of twice the posterior's spread shows in few
    method = benchmark.methods(benchmark.program(1, False), 60, samples, 200)[name]
    found = benchmark.score(method, benchmark.simulate(1, 1, 30), 0)
    if "tempering" in name:
        assert found["bias sigma"] > 1.0
        return
    for parameter in ("a", "sigma"):
        assert abs(found[f"bias {parameter}"]) < 4 * max(found["expected"], 0.06)
        assert 0.7 < found[f"sd ratio {parameter}"] < 1.4
    assert abs(found.get("evidence error", 0.0)) < 1.0
