"""What a program may be, and what is said of one that cannot be filtered."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.program import StateSpaceModel, TimeInputs

Y = np.zeros((4, 2), np.float32)
KEY = jax.random.key(0)


def walk(x, scale=0.5):
    return dist.Normal(x, scale).to_event(1)


def initial():
    return numpyro.sample("x0", dist.Normal(jnp.zeros(3), 1.0).to_event(1))


def walking(x, y_t):
    """A random walk of which two values are observed: the body of a scan."""
    x = numpyro.sample("x", walk(x))
    numpyro.sample("y", walk(x[:2]), obs=y_t)
    return x, None


def run(model, *args, algorithm=ndda.FAAPF, **kwargs):
    filter = ndda.Filter(algorithm(model), num_particles=8, progress_bar=False)
    filter.run(KEY, *args, **kwargs)
    return filter.result


def test_no_scan():
    def model(y):
        x = initial()
        numpyro.sample("y", walk(x[:2]), obs=y[0])

    with pytest.raises(ValueError, match=r"'model' has no numpyro\.contrib\.control_flow\.scan"):
        run(model, Y)


def test_two_scans():
    def model(y):
        x, _ = scan(walking, initial(), y)

        def again(x, y_t):
            x = numpyro.sample("x2", walk(x))
            return x, None

        scan(again, x, y)

    with pytest.raises(ValueError, match=r"has 2 .*exactly one"):
        run(model, Y)


def test_two_latent_sites():
    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", walk(x))
            bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
            numpyro.sample("y", walk(x[:2] + bias), obs=y_t)
            return x, None

        scan(step, initial(), y)

    with pytest.raises(ValueError, match="'x', 'bias'"):
        run(model, Y)


def test_a_structure_that_does_not_fit_is_found_again():
    """The latent site of a second run may have another name or shape, with the same carry."""

    def program(name, shape):
        def model(y):
            def step(x, y_t):
                z = numpyro.sample(name, dist.Normal(jnp.zeros(shape), 1.0))
                numpyro.sample("y", dist.Normal(x + z.sum(), 1.0), obs=y_t)
                return x, None

            scan(step, 0.0, y)

        return model

    first = ndda.program.StateSpaceModel(program("x", (2,)), (np.zeros(3),)).structure
    for name, shape in (("z", (2,)), ("x", (3,))):
        found = ndda.program.StateSpaceModel(program(name, shape), (np.zeros(3),), like=first).structure
        assert (found.latent_name, found.state_shape) == (name, shape)


def test_no_latent_site_and_nothing_observed():
    def deterministic(y):
        def step(x, y_t):
            numpyro.sample("y", walk(x[:2]), obs=y_t)
            return x, None

        scan(step, initial(), y)

    with pytest.raises(ValueError, match="no latent site"):
        run(deterministic, Y)

    def unobserved(y):
        def step(x, y_t):
            return numpyro.sample("x", walk(x)), None

        scan(step, initial(), y)

    with pytest.raises(ValueError, match="nothing is observed"):
        run(unobserved, Y)


def with_global(y):
    error = numpyro.sample("error", dist.HalfNormal(1.0))

    def step(x, y_t):
        x = numpyro.sample("x", walk(x))
        numpyro.sample("y", walk(x[:2], error), obs=y_t)
        return x, None

    scan(step, initial(), y)


def test_unobserved_global_site_is_named():
    with pytest.raises(ValueError, match=r"'error'.*handlers\.condition"):
        run(with_global, Y)


def test_observation_of_the_initial_state():
    def model(y):
        x0 = initial()
        numpyro.sample("y0", walk(x0[:2]), obs=y[0])

        scan(walking, x0, y)

    with pytest.raises(ValueError, match="'y0' observes 'x0'"):
        run(model, Y)


def test_site_after_the_scan():
    def model(y):
        x, _ = scan(walking, initial(), y)
        numpyro.sample("last", walk(x[:2]), obs=y[0])

    with pytest.raises(ValueError, match="'last' after its scan"):
        run(model, Y)


def test_non_gaussian_likelihood_and_transition():
    def counts(y):
        def step(x, y_t):
            x = numpyro.sample("x", walk(x))
            numpyro.sample("n", dist.Poisson(jnp.exp(x[:2])).to_event(1), obs=y_t)
            return x, None

        scan(step, initial(), y)

    with pytest.raises(ValueError, match=r"'n' has the likelihood Poisson.*FAAPF"):
        run(counts, Y, algorithm=ndda.EnKF)

    def shares(y):
        def step(x, y_t):
            x = numpyro.sample("x", walk(x))
            numpyro.sample("share", dist.Dirichlet(jnp.exp(x[:2])), obs=y_t)
            return x, None

        scan(step, initial(), y)

    with pytest.raises(ValueError, match=r"'share' has the likelihood Dirichlet, whose elements are vectors"):
        run(shares, Y)

    def heavy_tails(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.StudentT(3.0, x, 1.0).to_event(1))
            numpyro.sample("y", walk(x[:2]), obs=y_t)
            return x, None

        scan(step, initial(), y)

    with pytest.raises(ValueError, match=r"'x' has the transition StudentT"):
        run(heavy_tails, Y)


def linear(y, temperature, size=3):
    def step(x, given):
        y_t, temperature_t = given
        x = numpyro.sample("x", walk(x))
        numpyro.sample("y", walk(x[:2]), obs=y_t)
        numpyro.sample("temperature", dist.Normal(x[2], 0.1), obs=temperature_t)
        return x[:size], None

    scan(step, initial(), (y, temperature))


def test_mismatched_shapes():
    with pytest.raises(ValueError, match=r"site 'y' observes an array of shape \(3,\).*\(2,\)[^\n]*$"):
        run(linear, np.zeros((4, 3)), np.zeros(4))
    with pytest.raises(ValueError, match=r"lengths \[4, 5\]"):
        run(linear, np.zeros((4, 2)), np.zeros(5))
    with pytest.raises(ValueError, match=r"carry of shapes \(3,\) and returns \(2,\)"):
        run(linear, np.zeros((4, 2)), np.zeros(4), size=2)

    def wrong_size(y):
        prior = ndda.GaussianPrior(np.eye(2), np.eye(2))

        def step(x, y_t):
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
            numpyro.sample("y", walk(x), obs=y_t)
            return x, None

        scan(step, initial(), y)

    with pytest.raises(ValueError, match=r"state has shape \(3,\).*\(2,\)"):
        run(wrong_size, Y)


def test_scaled_site_and_reversed_scan():
    def scaled(y):
        def step(x, y_t):
            with handlers.scale(scale=0.5):
                x = numpyro.sample("x", walk(x))
            numpyro.sample("y", walk(x[:2]), obs=y_t)
            return x, None

        scan(step, initial(), y)

    with pytest.raises(ValueError, match=r"'x' is under handlers\.scale"):
        run(scaled, Y)

    def backwards(y):
        scan(walking, initial(), y, reverse=True)

    with pytest.raises(ValueError, match="reverse=True"):
        run(backwards, Y)


ERRORS, STILL = np.full(4, 0.5, np.float32), np.zeros(4, np.float32)


@pytest.fixture(scope="module")
def with_errors():
    """A filter of a program whose drifts and observation errors vary with time."""

    def model(y, errors, drifts):
        def step(x, given):
            y_t, error, drift = given
            x = numpyro.sample("x", walk(x + drift))
            numpyro.sample("y", walk(x[:2], error), obs=y_t)
            return x, None

        scan(step, initial(), (y, errors, drifts))

    return ndda.Filter(ndda.FAAPF(model), num_particles=8, progress_bar=False)


@pytest.mark.parametrize("error", [0.0, -1.0, np.nan])
def test_observation_error_that_is_no_error(with_errors, error):
    errors = np.where(np.arange(4) == 2, error, ERRORS)
    with pytest.raises(ValueError, match="error of site 'y' at step 2"):
        with_errors.run(KEY, Y, errors, STILL)


def test_infinite_observation(with_errors):
    y = Y.copy()
    y[1, 0] = np.inf
    with pytest.raises(ValueError, match="'y' has an infinite observation at step 1"):
        with_errors.run(KEY, y, ERRORS, STILL)


def test_all_particles_non_finite_names_step_and_count(with_errors):
    with pytest.raises(FloatingPointError, match="all 8 weights are non-finite at step 2"):
        with_errors.run(KEY, Y, ERRORS, np.where(np.arange(4) == 2, np.nan, STILL))


@pytest.mark.slow
def test_several_sites_carry_pytree_and_deterministic():
    def model(y, temperature):
        def step(carry, given):
            y_t, temperature_t = given
            total = numpyro.deterministic("total", carry["x"].sum())
            x = numpyro.sample("x", walk(carry["x"]))
            numpyro.sample("y", walk(x[:2]), obs=y_t)
            numpyro.sample("temperature", dist.Normal(x[2] ** 2 + 0.0 * total, 0.1), obs=temperature_t)
            return {"x": x, "before": carry["x"]}, None

        x0 = initial()
        scan(step, {"x": x0, "before": x0}, (y, temperature))

    result = run(model, Y, np.full(4, 4.0, np.float32))
    assert result.posterior["total"].shape == (1, 8, 4)
    assert result.posterior_predictive["temperature"].shape == (1, 8, 4)
    assert set(result.log_likelihood) == {"y", "temperature"}
    # The non-linear observation x_2^2 = 4 is met by the draw.
    assert abs(np.median(np.abs(result.posterior["x"][0, :, -1, 2])) - 2.0) < 0.5


def test_global_sites_a_scan_by_length_and_masked_values():
    """One program, compiled once: a conditioned and a free global site, a scan by length, and masked values."""
    correlation = jnp.asarray([[1.0, 0.0], [0.4, 0.8]])

    def model(y, mask):
        error = numpyro.sample("error", dist.HalfNormal(1.0))
        width = numpyro.sample("width", dist.HalfNormal(1.0))  # only shapes the initial state
        x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(3), width).to_event(1))

        def step(carry, _):
            x, t = carry
            x = numpyro.sample("x", dist.MultivariateNormal(x, 0.1 * jnp.eye(3)))
            numpyro.sample("y", dist.MultivariateNormal(x[:2], scale_tril=error * correlation), obs=y[t])
            numpyro.sample("z", dist.Normal(x, 1.0).mask(mask[t]).to_event(1), obs=x * 0.0)
            return (x, t + 1), None

        scan(step, (x0, 0), None, length=4)

    args = (Y, np.array([[True, False, True]] * 4))
    conditioned = handlers.condition(model, {"error": 0.5})
    result = run(conditioned, *args, algorithm=ndda.Bootstrap)
    assert result.posterior["x"].shape == (1, 8, 4, 3)
    np.testing.assert_array_equal(result.observed_mask["z"], [[True, False, True]] * 4)
    assert result.log_likelihood["y"].shape == (1, 8, 4)
    assert np.all(result.log_likelihood["z"][..., 1] == 0)
    known = StateSpaceModel(handlers.condition(conditioned, {"x0": jnp.ones(3)}), args).initial(KEY)
    np.testing.assert_array_equal(known[0], np.ones(3))


def test_parts_agree_with_the_program(small):
    model = small.diffusion_program()
    _, y = small.simulate(0, 3)
    program = StateSpaceModel(model, (y,))
    assert (program.structure.latent_name, program.structure.observed_names, program.structure.length) == (
        "x",
        ("y",),
        3,
    )
    inputs = TimeInputs(jnp.asarray(1), jnp.asarray(y[1]))
    x = jnp.arange(4.0)
    expected = dist.Normal(x[::2], small.error).to_event(1).log_prob(y[1])
    np.testing.assert_allclose(program.likelihood(x, inputs).log_prob(x), expected, rtol=1e-5)
    np.testing.assert_allclose(
        program.transition(x, inputs).moments().mean, small.transition @ np.arange(4.0), atol=1e-3
    )
    np.testing.assert_array_equal(program.advance(x, jnp.zeros(4), inputs), x)
