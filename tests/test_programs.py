"""Ordinary programs: carries of any type, handlers around the scan, discrete and several states, and data as given.

Right values come from a Kalman filter, a forward algorithm, or an equal program written in another way.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.program import StateSpaceModel, pointwise_log_likelihood

KEY = jax.random.key(0)
Y = np.array([0.3, -0.2, 0.5, 0.1, -0.4], np.float32)


def linear(init, a=0.9, noise=0.5):
    """Random walk x' = a x + noise e from `init`, observed with error 0.3."""

    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(a * x, noise))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            return x, None

        scan(step, init, y)

    return model


def kalman(y, a=0.9, noise=0.5, errors=(0.3,), m=0.0, p=0.0):
    """Log-evidence, and mean and variance at the last time; NaN is missing, columns of y are observations of a time."""
    total = 0.0
    for values in np.asarray(y, float).reshape(len(y), -1):
        m, p = a * m, a * a * p + noise**2
        for value, error in zip(values, errors, strict=True):
            if not np.isnan(value):
                s = p + error**2
                total += -0.5 * np.log(2 * np.pi * s) - 0.5 * (value - m) ** 2 / s
                m, p = m + p / s * (value - m), p * error**2 / s
    return total, m, p


def exact(model):
    """Filter whose weights and draws are exact for a linear-Gaussian program: its evidence has little noise."""
    return ndda.FAAPF(model, weight=ndda.Moment(), target_ess=0.0)


def filter_of(algorithm, n=64, keep_observed=False):
    return ndda.Filter(algorithm, num_particles=n, progress_bar=False, keep_observed=keep_observed)


def rerun(filter, *args):
    """Result of a filter that may have run before, and is then compiled."""
    filter.run(KEY, *args)
    return filter.result


def run(algorithm, *args, **settings):
    return rerun(filter_of(algorithm, **settings), *args)


def evidence(result):
    return float(result.sample_stats["log_evidence_increment"].sum())


# Series of 8 times, of which the last 3 are missing.
PADDED = np.concatenate([Y, np.full(3, np.nan, np.float32)])


@pytest.fixture(scope="module")
def exactly():
    """Compiled filter of the linear program, for `PADDED`; its weights and draws are exact."""
    return filter_of(exact(linear(0.0)), n=256)


@pytest.fixture(scope="module")
def simply():
    """Particles of the linear program, by a bootstrap filter of Y."""
    return run(ndda.Bootstrap(linear(0.0)), Y).posterior["x"]


# --- the type of a carry is what jax.lax.scan makes of it ---


@pytest.mark.parametrize("init", [0, np.float64(0.0)], ids=["int", "float64"])
def test_a_number_as_first_carry_takes_the_type_of_the_next(init):
    """Also in a free run, whose draws would stay whole numbers."""
    missing = np.full(20, np.nan, np.float32)
    y = np.concatenate([Y, missing])
    result = run(ndda.Bootstrap(linear(init)), y, n=1024)
    total, _, variance = kalman(y)
    assert evidence(result) == pytest.approx(total, abs=0.1)
    assert result.posterior["x"][0, :, -1].var() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("init", [jnp.zeros((), int), False, jnp.zeros((), jnp.float16)], ids=["int", "bool", "half"])
def test_a_first_carry_of_another_type_is_refused_as_numpyro_refuses_it(init):
    with pytest.raises(ValueError, match=r"carry of type \w+ and returns one of type float32.*jnp.asarray"):
        run(ndda.Bootstrap(linear(init)), Y)
    with pytest.raises(TypeError):
        handlers.seed(linear(init), KEY)(Y)


def test_what_is_no_number_is_refused_by_name():
    """JAX's own words name neither the carry nor the site."""

    def named(tag):
        def model(y):
            def step(carry, y_t):
                numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(carry[0], 1.0)), 1.0), obs=y_t)
                return carry, None

            scan(step, (0.0, tag), y)

        return model

    with pytest.raises(ValueError, match=r"the first carry\[1\] of the program's scan is 'a', which is no array"):
        StateSpaceModel(named("a"), (Y,))
    with pytest.raises(ValueError, match=r"the first carry\[1\] of the program's scan is an array of dates"):
        StateSpaceModel(named(np.datetime64("2020")), (Y,))
    with pytest.raises(ValueError, match="the observation of site 'y' is complex; give real numbers"):
        StateSpaceModel(named(0.0), (Y + 1j,))


def test_classes_with_missing_values_are_floating_point_numbers():
    """NumPyro takes the value of a categorical distribution as an index, and NaN makes data floating point."""
    logits = jnp.log(jnp.array([[0.2, 0.3, 0.5]] * 4))
    got = pointwise_log_likelihood(dist.Categorical(logits=logits), jnp.array([2.0, jnp.nan, 0.0, 1.5]))
    np.testing.assert_allclose(got, [np.log(0.5), 0.0, np.log(0.2), -np.inf], rtol=1e-6)


def test_an_array_of_a_carry_keeps_its_type():
    """A counter stays whole, a key stays a key, and a Python number beside them becomes real."""

    def model(y):
        def step(carry, y_t):
            x, count, key, clock = carry
            x = numpyro.sample("x", dist.Normal(0.9 * x + 0.01 * count + clock, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            return (x, count + 1, jax.random.split(key)[0], clock + 0.25), None

        scan(step, (0.0, 0, jax.random.key(3), 0), y)

    state, _ = _online(ndda.Bootstrap(model), Y[:1])
    x, count, key, clock = state.particles
    assert x.dtype == jnp.float32
    assert count.dtype == jnp.int32
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    np.testing.assert_array_equal(clock, 0.25)


def _online(algorithm, y):
    online = ndda.OnlineFilter(algorithm, num_particles=8)
    state = online.init(KEY, y)
    return online.step(KEY, state, y)


# --- handlers around the scan ---


def forecast(length):
    """The linear program without data, as NumPyro forecasts: the data come by `handlers.condition`."""

    def model():
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.3))
            return x, None

        scan(step, 0.0, None, length=length)

    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [ndda.Bootstrap, pytest.param(ndda.EnKF, marks=pytest.mark.slow)])
def test_conditioned_data_that_end_before_the_scan_are_missing_beyond(make):
    result = run(make(handlers.condition(forecast(8), {"y": jnp.asarray(Y)})), n=1024)
    padded = run(make(linear(0.0)), PADDED, n=1024)
    np.testing.assert_allclose(result.posterior["x"], padded.posterior["x"], atol=1e-5)
    assert result.observed_mask["y"].tolist() == [True] * 5 + [False] * 3
    assert np.isnan(result.observed_data["y"][5:]).all()
    if make is ndda.Bootstrap:
        assert evidence(result) == pytest.approx(kalman(Y)[0], abs=0.1)


def test_conditioned_data_of_more_times_than_the_scan_are_refused():
    with pytest.raises(ValueError, match=r"site 'y' gets 5 values.*3 times"):
        run(ndda.Bootstrap(handlers.condition(forecast(3), {"y": jnp.asarray(Y)})))


@pytest.mark.slow
def test_a_mask_around_the_scan_acts_on_its_observations():
    def masked(y):
        with handlers.mask(mask=False):
            linear(0.0)(y)

    assert evidence(run(ndda.Bootstrap(masked), Y)) == 0.0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (handlers.scale(linear(0.0), scale=0.25), "site 'x' is under handlers.scale"),
        (handlers.scope(linear(0.0), prefix="a"), "inside the handler scope"),
        (handlers.substitute(linear(0.0), {"x": jnp.asarray(Y)}), "site 'x' .* handlers.substitute"),
    ],
)
def test_a_handler_that_a_filter_cannot_apply_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        run(ndda.Bootstrap(model), Y)


@pytest.mark.parametrize(("where", "message"), [("body", r"numpyro.prng_key\(\)"), ("before", "outside any site")])
def test_randomness_outside_sites_is_refused(where, message):
    def model(y):
        noise = jax.random.normal(numpyro.prng_key()) if where == "before" else 0.0

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 0.5))
            more = jax.random.normal(numpyro.prng_key()) if where == "body" else noise
            numpyro.sample("y", dist.Normal(x + more, 0.3), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    with pytest.raises(ValueError, match=message):
        run(ndda.Bootstrap(model), Y)


# --- discrete states, several states, cond, factor ---

SWITCH = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
MEANS = np.array([-1.0, 1.0], np.float32)


def hidden_markov(y):
    def step(z, y_t):
        z = numpyro.sample("z", dist.Categorical(jnp.asarray(SWITCH)[z]))
        numpyro.sample("y", dist.Normal(jnp.asarray(MEANS)[z], 0.5), obs=y_t)
        return z, None

    scan(step, jnp.zeros((), jnp.int32), y)


def forward_algorithm(y):
    """Log-evidence of `hidden_markov`, and the probabilities of its classes at the last time."""
    belief, total = np.array([1.0, 0.0]), 0.0
    for value in np.asarray(y, float):
        joint = (belief @ SWITCH) * np.exp(-0.5 * ((value - MEANS) / 0.5) ** 2) / (0.5 * np.sqrt(2 * np.pi))
        total += np.log(joint.sum())
        belief = joint / joint.sum()
    return total, belief


def test_a_hidden_markov_model():
    y = np.array([-0.8, 0.2, 1.1, 0.9, 0.1], np.float32)
    result = run(ndda.Bootstrap(hidden_markov), y, n=2048)
    expected, belief = forward_algorithm(y)
    assert result.posterior["z"].dtype == np.int32
    assert evidence(result) == pytest.approx(expected, abs=0.1)
    assert result.posterior["z"][0, :, -1].mean() == pytest.approx(belief[1], abs=0.05)
    for make, message in ((ndda.FAAPF, "'z' has the transition Categorical"), (ndda.EnKF, "'z' is discrete")):
        with pytest.raises(ValueError, match=message):
            run(make(hidden_markov), y)


@pytest.mark.slow
def test_a_discrete_and_a_continuous_state():
    """A switching program: with noise that does not depend on the class, x is that of a Kalman filter."""

    def switching(y, noises):
        def step(carry, y_t):
            z, x = carry
            z = numpyro.sample("z", dist.Categorical(jnp.asarray(SWITCH)[z]))
            x = numpyro.sample("x", dist.Normal(0.9 * x, noises[z]))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            return (z, x), None

        scan(step, (jnp.zeros((), jnp.int32), 0.0), y)

    filter = filter_of(ndda.Bootstrap(switching), n=2048)
    result = rerun(filter, Y, jnp.array([0.5, 0.5]))
    total, mean, variance = kalman(Y)
    assert evidence(result) == pytest.approx(total, abs=0.1)
    assert result.posterior["x"][0, :, -1].mean() == pytest.approx(mean, abs=0.03)
    assert result.posterior["x"][0, :, -1].var() == pytest.approx(variance, rel=0.15)
    # With a quiet and a noisy class, the noisy one is likely after a jump.
    jump = np.array([0.0, 0.0, 0.0, 0.0, 3.0], np.float32)
    assert rerun(filter, jump, jnp.array([0.1, 2.0])).posterior["z"][0, :, -1].mean() > 0.95
    with pytest.raises(ValueError, match=r"latent sites 'z', 'x'.*Bootstrap"):
        run(ndda.FAAPF(switching), Y, jnp.array([0.5, 0.5]))


@pytest.mark.slow
def test_cond_without_latent_sites_runs(simply):
    def model(y):
        error = cond(jnp.asarray(True), lambda _: 0.3, lambda _: 3.0, None)

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(cond(x > 9.0, lambda x: -x, lambda x: 0.9 * x, x), 0.5))
            numpyro.sample("y", dist.Normal(x, error), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    np.testing.assert_allclose(run(ndda.Bootstrap(model), Y).posterior["x"], simply, atol=1e-6)


@pytest.mark.parametrize("where", ["body", "before"])
def test_cond_with_a_latent_site_is_named(where):
    def draw(name):
        return cond(
            jnp.asarray(True),
            lambda _: numpyro.sample(name, dist.Normal(0.0, 1.0)),
            lambda _: numpyro.sample(name, dist.Normal(1.0, 1.0)),
            None,
        )

    def model(y):
        def step(x, y_t):
            x = draw("x") if where == "body" else numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            return x, None

        scan(step, draw("x0") if where == "before" else 0.0, y)

    with pytest.raises(ValueError, match=f"site '{'x' if where == 'body' else 'x0'}' is inside .*cond"):
        run(ndda.Bootstrap(model), Y)


@pytest.mark.slow
def test_a_factor_is_a_term_of_the_likelihood():
    """The log-density of a Gaussian observation, written as a factor, gives the same posterior and evidence."""

    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            numpyro.factor("again", dist.Normal(x, 0.4).log_prob(0.2))
            return x, None

        scan(step, 0.0, y)

    result = run(exact(model), Y, n=256, keep_observed=True)
    total, mean, variance = kalman(np.stack([Y, np.full(5, 0.2)], axis=1), errors=(0.3, 0.4))
    assert evidence(result) == pytest.approx(total, abs=0.1)
    last = result.posterior["x"][0, :, -1]
    assert last.mean() == pytest.approx(mean, abs=0.05)
    assert last.var() == pytest.approx(variance, rel=0.25)
    assert set(result.observed_data) == {"y"}
    assert set(result.log_likelihood) == {"y", "again"}
    with pytest.raises(ValueError, match=r"'again' is a numpyro.factor"):
        run(ndda.EnKF(model), Y)
    taper = ndda.Taper(1.0, ndda.Euclidean(), {"y": [[0.0]]}, state=[[0.0]])
    with pytest.raises(ValueError, match=r"'again' is a numpyro.factor, which has no place"):
        run(ndda.FAAPF(model, taper=taper), Y)


def test_obs_mask_says_what_to_write():
    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t, obs_mask=y_t > 0)
            return x, None

        scan(step, 0.0, y)

    with pytest.raises(ValueError, match=r"site 'y' has obs_mask=.*\.mask\(m\).*NaN"):
        run(ndda.Bootstrap(model), Y)


# --- data as people have them ---


def _as_given():
    import pandas as pd
    import xarray as xr

    holes = np.where(np.arange(5) == 2, np.nan, Y)
    return {
        "numpy": (holes, holes),
        "float64": (holes, holes.astype(float)),
        "pandas Series": (holes, pd.Series(holes)),
        "nullable Series": (holes, pd.Series([0.3, -0.2, None, 0.1, -0.4], dtype="Float64")),
        "DataArray": (holes, xr.DataArray(holes, dims="time")),
        "masked array": (holes, np.ma.masked_array(Y, np.arange(5) == 2)),
        "integers": (np.array([1, 0, -1, 2, 0], float), np.array([1, 0, -1, 2, 0])),
    }


@pytest.mark.parametrize("kind", list(_as_given()))
def test_an_array_of_any_type_becomes_one_of_numbers(kind):
    plain, given = _as_given()[kind]
    (converted,) = StateSpaceModel(linear(0.0), (given,)).args
    assert isinstance(converted, jax.Array)
    np.testing.assert_array_equal(converted, plain.astype(np.float32))


@pytest.mark.slow
def test_a_table_or_a_labeled_array_is_filtered_as_its_values():
    plain, series = _as_given()["pandas Series"]
    labeled = _as_given()["DataArray"][1]
    filter = filter_of(ndda.Bootstrap(linear(0.0)))
    expected = rerun(filter, plain).posterior["x"]
    np.testing.assert_array_equal(rerun(filter, series).posterior["x"], expected)
    by_closure = run(ndda.Bootstrap(lambda: linear(0.0)(labeled)))
    np.testing.assert_allclose(by_closure.posterior["x"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.array(["a", "b"]), r"argument 'y' of the program 'model' is an array of text"),
        (np.array(["2020-01-01"], "M8[D]"), r"argument 'y'.*array of dates"),
        (np.array([object()]), r"argument 'y'.*Python objects"),
        ([0.3, -0.2], r"inputs xs of the program's scan are a list of 2 numbers.*jnp.asarray\(xs\)"),
        (np.zeros(0, np.float32), r"0 times"),
        (np.zeros((5, 1), np.float32), r"'y' observes an array of shape \(1,\).*shape \(\)"),
    ],
)
def test_data_that_are_no_series_of_numbers_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        run(ndda.Bootstrap(linear(0.0)), given)


def test_the_body_gets_jax_arrays(simply):
    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t.at[0].set(jnp.nan)[jnp.array(1)])
            return x, None

        scan(step, 0.0, y)

    result = run(ndda.Bootstrap(model), np.stack([Y + 9, Y], axis=1))
    np.testing.assert_array_equal(result.posterior["x"], simply)


def two_values(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=y_t)
        return x, None

    scan(step, jnp.zeros(2), y)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (2,), (5, 2, 1), (5, 3)])
def test_an_observation_is_never_broadcast(shape):
    with pytest.raises(ValueError, match=r"'y' observes an array of shape .* distribution has shape \(2,\)"):
        run(ndda.Bootstrap(two_values), np.zeros(shape, np.float32))


@pytest.mark.slow
def test_counts_stay_whole_numbers():
    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("n", dist.Poisson(jnp.exp(x)), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    counts = np.array([1, 0, 2, 1, 3])
    whole = run(ndda.Bootstrap(model), counts, keep_observed=True)
    assert whole.observed_data["n"].dtype.kind == "i"
    np.testing.assert_array_equal(whole.observed_data["n"], counts)
    filter = filter_of(ndda.Bootstrap(model))
    as_floats = rerun(filter, counts.astype(float))
    np.testing.assert_array_equal(as_floats.posterior["x"], whole.posterior["x"])
    assert as_floats.observed_data["n"].dtype.kind == "i"
    missing = rerun(filter, np.where(counts == 2, np.nan, counts))
    assert np.isnan(missing.observed_data["n"][2])


def with_error(y, error):
    def step(x, at):
        y_t, error_t = at
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, error_t), obs=y_t)
        return x, None

    scan(step, 0.0, (y, error))


@pytest.mark.slow
@pytest.mark.parametrize("make", [exact, ndda.EnKF])
def test_the_error_of_a_missing_value_does_not_matter(make, exactly):
    """Tables have NaN for both, also at the first time."""
    y = np.where(np.arange(8) % 3 == 0, np.nan, PADDED)
    error = np.where(np.isnan(y), np.nan, 0.3).astype(np.float32)
    result = run(make(with_error), y, error, n=256)
    expected = rerun(exactly if make is exact else filter_of(make(linear(0.0)), n=256), y)
    np.testing.assert_allclose(result.posterior["x"], expected.posterior["x"], atol=1e-5)


def test_the_error_of_an_observed_value_is_checked_at_every_step():
    filter = filter_of(ndda.Bootstrap(with_error))
    for step in (0, 2):
        error = np.where(np.arange(5) == step, np.nan, 0.3).astype(np.float32)
        with pytest.raises(ValueError, match=f"error of site 'y' at step {step}"):
            rerun(filter, Y, error)


def test_an_invalid_parameter_is_named_with_its_line():
    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, -0.3), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    with pytest.raises(
        ValueError, match=r'invalid scale.* of test_programs.py: numpyro.sample\("y", dist.Normal\(x, -0.3'
    ):
        run(ndda.Bootstrap(model), Y)


# --- one cause, one sentence ---


def carries_the_observation(y):
    def step(carry, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * carry[0], 0.5))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return (x, y_t), None

    scan(step, (0.0, 0.0), y)


def impossible_count(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("n", dist.Binomial(4, logits=x), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def parameters(y, init, mean):
    linear(init, mean)(y)


CAUSES = {
    carries_the_observation: [((np.array([0.1, np.nan, 0.2]),), r"at step 1.*carry\[1\].*an observation is missing")],
    impossible_count: [((np.array([1.0, 9.0]),), "at step 1, because the likelihood of site 'n' is zero")],
    parameters: [
        ((Y, jnp.zeros(()), jnp.asarray(jnp.nan)), "at step 0, because no draw of site 'x' is finite; check the param"),
        ((Y, jnp.asarray(jnp.nan), jnp.ones(())), "at step 0, because the initial state is not finite"),
    ],
}


@pytest.mark.parametrize("model", list(CAUSES), ids=lambda model: model.__name__)
def test_the_cause_of_a_failure_is_named_and_no_other(model):
    filter = filter_of(ndda.Bootstrap(model))
    for given, message in CAUSES[model]:
        with pytest.raises(FloatingPointError, match=message) as failure:
            rerun(filter, *given)
        assert "guidance" not in str(failure.value)
