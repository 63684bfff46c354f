"""`DiffusionTransition` under everything NumPyro does to a distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from monte_carlo import assert_mean
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import Predictive, log_likelihood

import numpyro_diffusion_da as ndda

KEY = jax.random.key(0)
FEW_LEVELS = ndda.Sampler(schedule=ndda.KarrasSchedule(3))


@pytest.fixture(scope="module")
def prior(small):
    return ndda.GaussianPrior(small.transition, small.covariance)


@pytest.mark.parametrize(("sample_shape", "batch_shape"), [((), ()), ((5,), ()), ((), (3,)), ((2, 1), (2, 3))])
def test_shapes(prior, batch_shape, sample_shape):
    transition = ndda.DiffusionTransition(prior, jnp.zeros((*batch_shape, 4)), sampler=FEW_LEVELS)
    assert transition.batch_shape == batch_shape
    assert transition.event_shape == (4,)
    expanded = transition.expand((6, *batch_shape))
    # Traced, which gives shapes, and not computed.
    mean = jax.eval_shape(lambda: transition.mean)
    draw, expanded_draw = jax.eval_shape(lambda key: [d.sample(key, sample_shape) for d in (transition, expanded)], KEY)
    assert mean.shape == (*batch_shape, 4)
    assert draw.shape == (*sample_shape, *batch_shape, 4)
    assert expanded_draw.shape == (*sample_shape, 6, *batch_shape, 4)


def test_batch_elements_are_their_own_transitions(prior):
    states = 3.0 * jax.random.normal(KEY, (3, 4))
    batched = ndda.DiffusionTransition(prior, states).mean
    singly = jnp.stack([ndda.DiffusionTransition(prior, x).mean for x in states])
    np.testing.assert_allclose(batched, singly, atol=1e-5)


def test_draws_have_the_transition_s_moments(prior, small):
    state, n = jnp.arange(4.0), 4000
    x = np.asarray(ndda.DiffusionTransition(prior, state).sample(KEY, (n,)))
    assert_mean(x, small.transition @ np.arange(4.0))


def test_pytree_round_trip_keeps_prior_and_sampler(prior):
    sampler = ndda.Sampler(ndda.diffusion.DDIM(), ndda.KarrasSchedule(4))
    transition = ndda.DiffusionTransition(prior, jnp.zeros(4), sampler=sampler)
    leaves, structure = jax.tree.flatten(transition)
    assert [x.shape for x in leaves] == [(4,)]  # no network parameters: scan would stack them over time
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert rebuilt.prior is prior
    assert rebuilt.sampler is sampler
    assert jax.tree.structure(ndda.DiffusionTransition(prior, jnp.ones(4), sampler=sampler)) == structure


def test_crosses_jit_and_vmap(prior):
    transition = ndda.DiffusionTransition(prior, jnp.ones((3, 4)))
    np.testing.assert_allclose(jax.jit(lambda d: d.mean)(transition), transition.mean, atol=1e-6)
    mapped = jax.vmap(lambda x: ndda.DiffusionTransition(prior, x).sample(KEY))(jnp.ones((3, 4)))
    assert mapped.shape == (3, 4)


@pytest.mark.slow
def test_jit_and_no_jit_agree(prior):
    transition = ndda.DiffusionTransition(prior, jnp.ones(4), sampler=FEW_LEVELS)
    with jax.disable_jit():
        plain = transition.sample(KEY)
    np.testing.assert_allclose(jax.jit(transition.sample)(KEY), plain, atol=1e-5)


def test_program_under_trace_predictive_condition_and_log_likelihood(small):
    model = small.diffusion_program()
    states, y = small.simulate(1, 5)
    trace = handlers.trace(handlers.seed(model, KEY)).get_trace(y)
    assert trace["x"]["value"].shape == (5, 4)
    assert trace["x"]["fn"].batch_shape == (5,)
    prior_draws = Predictive(model, num_samples=3)(KEY, y)
    assert prior_draws["x"].shape == (3, 5, 4)
    given = {"x": prior_draws["x"], "x0": prior_draws["x0"]}
    assert Predictive(model, posterior_samples=given)(KEY, y)["y"].shape == (3, 5, 2)
    assert log_likelihood(model, given, y)["y"].shape == (3, 5)
    conditioned = handlers.condition(model, {"x": jnp.asarray(states)})
    trace = handlers.trace(handlers.seed(conditioned, KEY)).get_trace(y)
    np.testing.assert_array_equal(trace["x"]["value"], np.asarray(states, np.float32))


def test_plate(prior):
    def model():
        with numpyro.plate("member", 3):
            return numpyro.sample("x", ndda.DiffusionTransition(prior, jnp.zeros(4)))

    assert handlers.seed(model, KEY)().shape == (3, 4)


def test_two_frame_state_of_a_pytree_travels_through_scan(prior):

    def step(carry, _):
        before, now = carry
        x = numpyro.sample("x", ndda.DiffusionTransition(prior, now))
        return (now, x), before.sum()

    with handlers.seed(rng_seed=0):
        (before, now), sums = scan(step, (jnp.zeros(4), jnp.ones(4)), None, length=3)
    assert before.shape == now.shape == (4,)
    assert sums.shape == (3,)


def test_log_prob_says_what_to_do_instead(prior):
    transition = ndda.DiffusionTransition(prior, jnp.zeros(4))
    with pytest.raises(NotImplementedError, match="Filter"):
        transition.log_prob(jnp.zeros(4))
    assert transition.mask(False).log_prob(jnp.zeros(4)) == 0.0


def test_wrong_input(prior):
    with pytest.raises(ValueError, match=r"shape \(5,\).*\(4,\)"):
        ndda.DiffusionTransition(prior, jnp.zeros(5))
    with pytest.raises(ValueError, match=r"batch shapes"):
        ndda.DiffusionTransition(prior, (jnp.zeros((2, 4)), jnp.zeros((3, 4))))
    with pytest.raises(TypeError, match="DiffusionPrior"):
        ndda.DiffusionTransition(lambda z: z, jnp.zeros(4))
    with pytest.raises(ValueError, match="inputs"):
        _ = ndda.DiffusionTransition(prior, jnp.zeros(4), inputs=jnp.zeros(1)).mean


@pytest.mark.slow
def test_conditioned_draws_move_towards_the_observation(prior):
    def observe(x):
        y = jnp.asarray([5.0])
        return [ndda.observation.GaussianObservation(x[:1], jnp.asarray([0.01]), y, jnp.asarray([True]))]

    guided = ndda.DiffusionTransition(prior, jnp.zeros((2, 4))).conditioned(
        ndda.observation.GaussianLikelihood(observe)
    )
    x, (record,) = guided.sample_with_intermediates(KEY, (3,))
    assert x.shape == (3, 2, 4)
    np.testing.assert_allclose(x[..., 0], 5.0, atol=0.1)
    # 16 levels, each a forward and, with a single observation, one vjp.
    np.testing.assert_array_equal(record.passes.forward, 16)
    np.testing.assert_array_equal(record.passes.vjp, 16)
    with pytest.raises(NotImplementedError, match="average samples"):
        _ = guided.mean


def test_climatology_is_stationary(prior, small):
    climate = prior.climatology()
    assert isinstance(climate, dist.MultivariateNormal)
    covariance = np.asarray(climate.covariance_matrix)
    ahead = small.transition @ covariance @ small.transition.T + small.covariance
    np.testing.assert_allclose(ahead, covariance, atol=1e-5)
    with pytest.raises(ValueError, match="spectral radius"):
        ndda.GaussianPrior(np.eye(2), np.eye(2)).climatology()
