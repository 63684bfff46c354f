"""Inflation: each by its definition, in the filters, and its amount found from innovations."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.filters import Proposal
from numpyro_diffusion_da.inference import spread_tuning as tuning
from numpyro_diffusion_da.results import Background
from numpyro_diffusion_da.smc import fa_apf
from numpyro_diffusion_da.smc import inflation as members

KEY = jax.random.key(0)


def ensembles(n: int = 30) -> tuple[jax.Array, jax.Array]:
    """(analysis, forecast) of states of shape (2, 3), with spreads that differ; one component of the analysis is one
    value in all members."""
    rng = np.random.default_rng(0)
    forecast = rng.normal(size=(n, 2, 3)) * [1.5, 0.7, 2.0] + 4.0
    analysis = 0.3 * forecast + 0.2 * rng.normal(size=(n, 2, 3)) + 1.0
    analysis[:, 0, 2] = 5.0
    return jnp.asarray(analysis, jnp.float32), jnp.asarray(forecast, jnp.float32)


def spread(x) -> np.ndarray:
    """In double precision: the spread of one value in all members is then 0."""
    return np.std(np.asarray(x, np.float64), axis=0)


def anomalies(x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x - x.mean(0)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_rtps_by_its_definition(alpha):
    analysis, forecast = ensembles()
    got = ndda.RTPS(alpha)(KEY, analysis, forecast)
    s_a, s_b = spread(analysis), spread(forecast)
    expected = np.where(s_a > 0, s_a + alpha * (s_b - s_a), 0.0)
    np.testing.assert_allclose(spread(got), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.mean(0), analysis.mean(0), rtol=1e-6)
    factor = np.divide(expected, s_a, out=np.ones_like(s_a), where=s_a > 0)
    np.testing.assert_allclose(anomalies(got), factor * anomalies(analysis), atol=1e-5)  # and no member changes places


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_rtpp_by_its_definition(alpha):
    analysis, forecast = ensembles()
    got = ndda.smc.RTPP(alpha)(KEY, analysis, forecast)
    np.testing.assert_allclose(
        anomalies(got), (1 - alpha) * anomalies(analysis) + alpha * anomalies(forecast), atol=1e-5
    )
    np.testing.assert_allclose(got.mean(0), analysis.mean(0), rtol=1e-6)


def test_multiplicative_by_its_definition():
    analysis, _ = ensembles()
    got = ndda.Multiplicative(1.3)(KEY, analysis, None)
    np.testing.assert_allclose(anomalies(got), 1.3 * anomalies(analysis), atol=1e-5)
    np.testing.assert_allclose(got.mean(0), analysis.mean(0), rtol=1e-6)


def test_jitter_has_its_size():
    """In each component, whatever the spread was, none included; the mean stays."""
    n, scale = 2000, np.array([0.5, 0.0, 2.0])
    x = jnp.full((n, 2, 3), 7.0)
    got = ndda.smc.Jitter(scale)(KEY, x, None)
    np.testing.assert_allclose(got.mean(0), 7.0, atol=1e-5)
    expected = np.broadcast_to(scale, (2, 3))
    assert np.all(np.abs(np.std(got, axis=0, ddof=1) - expected) <= 4 * expected / np.sqrt(2 * n) + 1e-6)
    np.testing.assert_allclose(np.corrcoef(got[:, :, 0].T)[0, 1], 0.0, atol=4 / np.sqrt(n))
    # The unbiased variance is scale^2 in the mean, for two members too.
    few = [np.var(ndda.smc.Jitter(1.0)(jax.random.key(i), jnp.zeros((2, 500)), None), axis=0, ddof=1) for i in range(4)]
    np.testing.assert_allclose(np.mean(few), 1.0, atol=4 * np.sqrt(2 / 2000))  # chi-square, one degree of freedom
    np.testing.assert_array_equal(ndda.smc.Jitter(1.0)(KEY, x[:1], None), x[:1])


def test_the_order_is_that_of_the_sequence():
    analysis, forecast = ensembles()
    rtps, twice = ndda.RTPS(0.5), ndda.Multiplicative(2.0)
    first, last = (members.inflated(order, KEY, analysis, forecast) for order in ((rtps, twice), (twice, rtps)))
    s_a, s_b = spread(analysis), spread(forecast)
    alive = s_a > 0
    np.testing.assert_allclose(spread(first)[alive], (s_a + s_b)[alive], rtol=1e-4)
    np.testing.assert_allclose(spread(last)[alive], (s_a + 0.5 * s_b)[alive], rtol=1e-4)
    np.testing.assert_array_equal(members.inflated((), KEY, analysis, None), analysis)
    two = members.inflated((ndda.smc.Jitter(1.0), ndda.smc.Jitter(1.0)), KEY, jnp.zeros((2000, 1)), None)
    np.testing.assert_allclose(np.var(two, ddof=1), 2.0, atol=4 * 2 * np.sqrt(2 / 2000))  # two draws, not one twice


def test_a_lost_member_counts_for_nothing():
    analysis, forecast = ensembles()
    lost = analysis.at[3, 1, 1].set(jnp.nan)
    others = np.arange(30) != 3
    for inflation in (ndda.RTPS(0.5), ndda.Multiplicative(1.5)):
        got = inflation(KEY, lost, forecast)
        np.testing.assert_allclose(got[others].mean(0), analysis[others].mean(0), rtol=1e-5)
        assert np.isfinite(got[others]).all()
    expected = 0.5 * (np.std(analysis[others], axis=0) + np.std(forecast, axis=0))[1]
    np.testing.assert_allclose(np.std(ndda.RTPS(0.5)(KEY, lost, forecast)[others], axis=0)[1], expected, rtol=1e-4)


def test_amounts_are_refused():
    for kind, name, wrong in (
        (ndda.RTPS, "alpha", (-0.1, 1.5)),
        (ndda.smc.RTPP, "alpha", (-0.1, 1.5)),
        (ndda.Multiplicative, "factor", (0.9, np.nan)),
        (ndda.smc.Jitter, "scale", (-1.0, np.array([1.0, -1.0]))),
    ):
        for value in wrong:
            with pytest.raises(ValueError, match=rf"{kind.__name__} got {name}=.*; give [01].0"):
                kind(value)
    with pytest.raises(ValueError, match=r"RTPS\(alpha=0.3\) needs members of the forecast"):
        ndda.RTPS(0.3)(KEY, jnp.ones((2, 1)), None)


# --- in the filters ---------------------------------------------------------------------------------------------------

D = 6
Y = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def program(y, memory=0.9, noise=0.5):
    """Independent AR(1) sites, the first of each two observed; its carry is a pair."""
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(D), 1.0).to_event(1))

    def step(carry, y_t):
        x, _ = carry
        new = numpyro.sample("x", dist.Normal(memory * x, noise).to_event(1))
        numpyro.sample("y", dist.Normal(new[::2], 0.5).to_event(1), obs=y_t)
        return (new, x), None

    scan(step, (x0, x0), y)


def run(algorithm, y=Y, n=40, **settings):
    filter_ = ndda.Filter(algorithm, num_particles=n, progress_bar=False, **settings)
    filter_.run(jax.random.key(1), y)
    return filter_.result


def stepped(algorithm, y=Y, n=40):
    """(carry, info) after one step."""
    online = ndda.OnlineFilter(algorithm, num_particles=n)
    state, info = online.step(jax.random.key(2), online.init(jax.random.key(1), y[:1]), y[:1])
    return state.particles, info


@pytest.mark.slow
def test_without_inflation_nothing_changes():
    """The filter is that of draw, record and advance in one function, up to rounding."""
    model = ndda.program.StateSpaceModel(program, (Y,))
    algorithm = ndda.FAAPF(program)

    def log_predictive(carry, inputs):
        return ndda.Moment()(model.transition(carry, inputs), model.likelihood(carry, inputs))

    def propose(rng_key, carry, inputs):
        draw_key, record_key = jax.random.split(rng_key)
        step = model.transition(carry, inputs)
        x, draw = step.conditional_draw(draw_key, model.likelihood(carry, inputs), algorithm.guidance)
        return model.advance(x, carry, inputs), Proposal(draw, model.record(record_key, x, carry, inputs))

    online = ndda.OnlineFilter(algorithm, num_particles=40)
    start = online.init(jax.random.key(1), Y[:1])
    inputs = jax.tree.map(lambda x: x[0], model.time_inputs())
    plain = fa_apf.build_kernel(log_predictive, propose, batch_size=7)
    results = [
        jax.jit(lambda key, state, kernel=kernel: kernel(key, state, inputs))(jax.random.key(2), start)
        for kernel in (plain, algorithm.kernel(model, 7))
    ]
    (state, info), (again, known) = results
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (state, info), (again, known._replace(background=())))
    assert results[1][1].forecast == ()


TAPER = ndda.Taper(0.4, ndda.Ring(D), {"y": np.arange(0, D, 2)}, state=np.arange(D))
FILTERS = {
    "FAAPF": ndda.FAAPF,
    "FAAPF, local": lambda model, **settings: ndda.FAAPF(model, taper=TAPER, **settings),
    "EnKF, local": lambda model, **settings: ndda.EnKF(model, update=ndda.smc.SquareRoot(), taper=TAPER, **settings),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("FAAPF") else []) for name in FILTERS]
)
def test_the_state_is_inflated_before_it_is_advanced(name):
    """Record and carry hold the inflated state; all else is what it was without inflation. RTPS relaxes to the spread
    of the predictive distribution, 0.81 + 0.25 of each component before anything is observed."""
    make, n = FILTERS[name], 1000
    (x, previous), info = stepped(make(program), n=n)
    (wide, same), wide_info = stepped(make(program, inflation=(ndda.Multiplicative(1.5),)), n=n)
    np.testing.assert_allclose(anomalies(wide), 1.5 * anomalies(x), atol=2e-5)
    np.testing.assert_allclose(wide.mean(0), x.mean(0), atol=1e-5)
    np.testing.assert_allclose(same, previous, atol=1e-5)  # moved ancestors differ by roundings
    np.testing.assert_array_equal(wide_info.ancestors, info.ancestors)
    np.testing.assert_array_equal(wide_info.proposal.sites["posterior"]["x"], wide)
    likelihood = dist.Normal(wide[:, ::2], 0.5).log_prob(Y[:1])
    np.testing.assert_allclose(wide_info.proposal.sites["log_likelihood"]["y"], likelihood, rtol=1e-4, atol=1e-5)
    assert wide_info.forecast == ()  # nothing is drawn that is not looked at

    (half, _), _ = stepped(make(program, inflation=(ndda.RTPS(0.5),)), n=n)
    s_a, s_b = spread(x), np.sqrt(0.81 + 0.25)
    assert np.all(s_a[::2] < 0.6)
    np.testing.assert_allclose(half.mean(0), x.mean(0), atol=1e-4)
    np.testing.assert_allclose(spread(half), s_a + 0.5 * (s_b - s_a), atol=0.5 * 4 * s_b / np.sqrt(2 * n))


@pytest.mark.slow
def test_forecasts_of_a_diffusion():
    """With nothing observed they are the analysis itself, and RTPS does nothing; their passes are counted."""
    emulator = ndda.GaussianPrior(0.9 * jnp.eye(D), 0.25 * jnp.eye(D))

    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", ndda.DiffusionTransition(emulator, x))
            numpyro.sample("y", dist.Normal(x[::2], 0.5).to_event(1), obs=y_t)
            return x, None

        scan(step, jnp.zeros(D), y)

    nothing = np.full_like(Y, np.nan)
    equal = ndda.Equal()
    plain, relaxing = (ndda.FAAPF(model, weight=equal, inflation=wide) for wide in ((), (ndda.RTPS(1.0),)))
    (x, info), (same, relaxed_info) = stepped(plain, nothing), stepped(relaxing, nothing)
    np.testing.assert_allclose(same, x, atol=1e-4)
    levels = ndda.DiffusionTransition(emulator, jnp.zeros(D)).sampler.draw_evaluations(emulator.noise_range)
    np.testing.assert_array_equal(relaxed_info.forecast.passes.forward, levels)
    # Those of the forecast. The mean that Dirac weights compute is computed for the background instead.
    assert relaxing.passes(relaxed_info).forward == plain.passes(info).forward + levels


@pytest.mark.slow
def test_a_factor_on_the_forecast_acts_before_the_update_wherever_it_stands():
    last = run(ndda.EnKF(program, inflation=(ndda.RTPS(0.3), ndda.ForecastMultiplicative(1.05))))
    first = run(ndda.EnKF(program, inflation=(ndda.ForecastMultiplicative(1.05), ndda.RTPS(0.3))))
    np.testing.assert_array_equal(last.posterior["x"], first.posterior["x"])
    without = run(ndda.EnKF(program, inflation=(ndda.RTPS(0.3),)))
    assert np.abs(without.posterior["x"] - first.posterior["x"]).max() > 1e-3


def test_a_result_says_what_was_inflated():
    model = ndda.program.StateSpaceModel(program, (Y,))
    algorithm = ndda.FAAPF(program, inflation=(ndda.RTPS(0.3), ndda.smc.Jitter(0.1)), target_ess=0.0)
    assert algorithm.settings(model)["inflation"] == "RTPS(alpha=0.3), Jitter(scale=0.1)"
    assert algorithm.evidence_bias_reasons(model) == [
        "the particles' spread is inflated: RTPS(alpha=0.3), Jitter(scale=0.1)"
    ]
    assert ndda.FAAPF(program, target_ess=0.0).evidence_bias_reasons(model) == []
    assert ndda.EnKF(program).settings(model)["inflation"] == "none"


def test_what_a_filter_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"FAAPF got inflation=RTPP\(alpha=0.3\), .* use ndda.RTPS"):
        ndda.FAAPF(program, inflation=(ndda.smc.RTPP(0.3),))
    for kind in (ndda.FAAPF, ndda.EnKF):
        with pytest.raises(TypeError, match=r"expected a sequence: write inflation=\(RTPS\(alpha=0.3\),\)"):
            kind(program, inflation=ndda.RTPS(0.3))
        with pytest.raises(TypeError, match=r"got 0.3 in the sequence `inflation`; give instances of ndda.RTPS"):
            kind(program, inflation=(0.3,))
    for missing, given in (("advance_fn", {}), ("forecast_fn", {"advance_fn": lambda *_: None})):
        with pytest.raises(ValueError, match=f"needs {missing}"):
            fa_apf.build_kernel(lambda *_: 0.0, lambda *_: None, inflation=(ndda.RTPS(0.3),), **given)


# --- the amount -------------------------------------------------------------------------------------------------------

SITES, MEMORY, ERROR = 8, 0.9, 0.5


def all_observed(noise):
    """Independent AR(1) sites, each observed, whose transition has errors of this size."""

    def model(y):
        x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(SITES), 1.0).to_event(1))

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(MEMORY * x, noise).to_event(1))
            numpyro.sample("y", dist.Normal(x, ERROR).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    return model


def truth_and_observations(seed, steps=200):
    """Errors of size 0.5 in the transition."""
    rng = np.random.default_rng(seed)
    x, states = rng.normal(size=SITES), []
    for _ in range(steps):
        x = MEMORY * x + 0.5 * rng.normal(size=SITES)
        states.append(x)
    truth = np.array(states)
    return truth, (truth + ERROR * rng.normal(size=truth.shape)).astype(np.float32)


def forecast_spread_skill(algorithm, noise, truth, y, n):
    """Of forecasts made here, from the particles of each step but the first 20."""
    particles = run(algorithm, y, n).posterior["x"][0, :, 20:-1]
    forecast = MEMORY * particles + noise * np.random.default_rng(0).normal(size=particles.shape)
    return ndda.diagnostics.spread_skill(forecast, truth[21:])


def exact_jitter() -> float:
    """What makes up for a noise of 0.25 where 0.5 is true: the forecast variance is that of the right filter then."""
    return np.sqrt((0.5**2 - 0.25**2) / MEMORY**2)


@pytest.mark.slow
def test_the_amount_that_makes_up_for_a_noise_given_too_small():
    """Within its own statistical error of the exact one; steps that were not tuned on have the right spread then."""
    truth, y = truth_and_observations(0)

    def make(amount):
        return ndda.FAAPF(all_observed(0.25), inflation=(ndda.smc.Jitter(amount),))

    found = ndda.inference.tune_spread(
        make, jax.random.key(0), y[:100], between=(0.0, 1.0), num_particles=100, discard=10
    )
    assert found.within_tolerance
    assert found.trail[0].ratio.value > 1.5
    assert (found.amount, found.ratio) in found.trail
    nearest = sorted(found.trail, key=lambda trial: abs(trial.amount - found.amount))[:2]
    slope = (nearest[0].ratio.value - nearest[1].ratio.value) / (nearest[0].amount - nearest[1].amount)
    allowed = (3 * found.ratio.standard_error + 0.05) / abs(slope)
    assert abs(found.amount - exact_jitter()) < allowed < 0.5 * exact_jitter()
    before, after = (
        forecast_spread_skill(make(amount), 0.25, truth[100:], y[100:], 100) for amount in (0.0, found.amount)
    )
    assert before < 0.65
    assert abs(after - 1.0) < 0.12


@pytest.mark.slow
def test_the_amount_for_few_members():
    """Eight members of an ensemble Kalman filter with the right model."""
    seed = 0
    truth, y = truth_and_observations(seed)

    def make(alpha):
        return ndda.EnKF(all_observed(0.5), inflation=(ndda.RTPS(alpha),))

    found = ndda.inference.tune_spread(
        make, jax.random.key(seed), y[:100], between=(0.0, 1.0), num_particles=8, discard=10
    )
    assert found.within_tolerance
    before, after = (forecast_spread_skill(make(a), 0.5, truth[100:], y[100:], 8) for a in (0.0, found.amount))
    assert before < 0.9
    assert abs(after - 1.0) < 0.12


@pytest.mark.slow
def test_runs_are_bounded():
    """The best amount is returned, marked as outside the tolerance. The factor on the forecast is an amount too."""
    _, y = truth_and_observations(0, 15)
    found = ndda.inference.tune_spread(
        lambda amount: ndda.EnKF(all_observed(0.1), inflation=(ndda.ForecastMultiplicative(amount),)),
        KEY,
        y,
        between=(1.0, 4.0),
        num_particles=20,
        tolerance=1e-9,
        max_runs=4,
    )
    assert [trial.amount for trial in found.trail[:3]] == [1.0, 4.0, 2.5]
    assert len(found.trail) == 4
    assert not found.within_tolerance
    assert abs(found.ratio.value - 1) == min(abs(trial.ratio.value - 1) for trial in found.trail)


@pytest.mark.slow
def test_units_of_observations_do_not_count():
    rng = np.random.default_rng(0)
    o, mean, p, r = (rng.uniform(size=(12, 4)) for _ in range(4))
    o[3, 1] = np.nan

    def ratio(**sites):
        columns = {name: [factor * x[:, of] for x in (o, mean)] for name, (of, factor) in sites.items()}
        errors = {name: [factor**2 * x[None, :, of] for x in (p, r)] for name, (of, factor) in sites.items()}
        background = {n: Background(columns[n][1][None], *errors[n], np.full((1, 12), 9)) for n in sites}
        observed = {n: columns[n][0] for n in sites}
        empty = {field.name: {} for field in dataclasses.fields(ndda.FilterResult)}
        return tuning._ratio(ndda.FilterResult(**{**empty, "observed_data": observed, "background": background}), 2, 1)

    one = ratio(y=(slice(None), 1.0))
    two = ratio(y=(slice(2), 1.0), z=(slice(2, None), 1e4))
    np.testing.assert_allclose(two, one, rtol=1e-9)
    assert np.isfinite(one).all()


@pytest.mark.slow
def test_what_cannot_be_tuned_is_refused():
    _, y = truth_and_observations(0, 15)

    def tune(y=y, between=(0.0, 1.0), **settings):
        def make(alpha):
            return ndda.FAAPF(all_observed(0.1), inflation=(ndda.RTPS(alpha),))

        return ndda.inference.tune_spread(make, KEY, y, between=between, num_particles=20, **settings)

    with pytest.raises(ValueError, match=r"times what is expected at 0 and .* times at 0.1, .*; allow more inflation"):
        tune(between=(0.0, 0.1))
    with pytest.raises(ValueError, match=r"RTPS got alpha=1.5"):
        tune(between=(0.0, 1.5))
    with pytest.raises(ValueError, match=r"between=\(1.0, 0.0\)"):
        tune(between=(1.0, 0.0))
    with pytest.raises(ValueError, match="max_runs=1"):
        tune(max_runs=1)
    with pytest.raises(ValueError, match="discard=15; the spin-up has 15 steps"):
        tune(discard=15)
    with pytest.raises(ValueError, match="nothing is observed after the first 5 steps"):
        tune(np.full_like(y, np.nan), discard=5)
