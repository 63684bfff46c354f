"""log p(x' | c) by the probability-flow ODE, against densities that are known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import BENCHMARKS, load_program
from monte_carlo import assert_mean
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import log_density

import numpyro_diffusion_da as ndda

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
FLOW = ndda.diffusion.ProbabilityFlow()
FEW = ndda.diffusion.ProbabilityFlow(8)


def exact(prior, state):
    """The transition of a `GaussianPrior`, in closed form."""
    mean = jnp.einsum("ij,...j->...i", prior.transition, state)
    return dist.MultivariateNormal(mean + jnp.broadcast_to(prior.offset, mean.shape), prior.covariance)


def draw(known, sample_shape=(), key=KEY):
    """Draws of a NumPyro distribution, which promotes ranks."""
    with jax.numpy_rank_promotion("allow"):
        return known.sample(key, sample_shape)


def truth(known, x):
    """Its log-density."""
    with jax.numpy_rank_promotion("allow"):
        return known.log_prob(x)


def gaussian(d, correlated=False):
    apart = np.abs(np.arange(d)[:, None] - np.arange(d))
    transition = 0.95 * np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0]
    deviations = 1.0 + np.arange(d)
    noise_covariance = np.exp(-apart / 2) * np.outer(deviations, deviations) if correlated else None
    return ndda.GaussianPrior(transition, 0.25 * np.exp(-apart / 3), np.arange(d), noise_covariance)


@pytest.fixture(scope="module")
def prior():
    return gaussian(4)


class Independent(ndda.DiffusionPrior):
    """N(second frame + inputs, (S sqrt(variance))^2), with a scale of its own for each component."""

    scales: jax.Array
    variance: float = eqx.field(static=True)
    noise: ndda.diffusion.Noise
    noise_range: tuple[float, float] = eqx.field(static=True)
    layout: ndda.Layout = eqx.field(static=True)
    conditioning_passes: int = eqx.field(static=True)

    def __init__(self, scales, variance=0.4, noise=None):
        self.scales, self.variance, self.noise_range = jnp.asarray(scales), variance, (2e-2, 80.0)
        self.noise = ndda.diffusion.WhiteNoise() if noise is None else noise
        self.layout, self.conditioning_passes = ndda.Layout(self.scales.shape, ("row", "column")), 1

    def condition(self, state, inputs=None):
        return state[1] + inputs

    def denoise(self, z_s, noise_level, conditioning):
        return self.variance / (self.variance + noise_level**2) * z_s

    def location(self, conditioning):
        return conditioning

    def scale(self, conditioning):
        return self.scales


@pytest.mark.parametrize(("d", "correlated"), [(3, False), (8, False), (4, True)])
def test_equals_the_gaussian_density(d, correlated):
    prior = gaussian(d, correlated)
    states = 3.0 * jax.random.normal(KEY, (50, d))
    x = draw(exact(prior, states), key=jax.random.key(1))
    value = ndda.DiffusionTransition(prior, states, density=FLOW).log_prob(x)
    np.testing.assert_allclose(value, truth(exact(prior, states), x), atol=5e-4)


def test_far_from_the_mode(prior):
    x = draw(exact(prior, jnp.zeros(4))) + 4.0
    value = ndda.DiffusionTransition(prior, jnp.zeros(4), density=FLOW).log_prob(x)
    np.testing.assert_allclose(value, truth(exact(prior, jnp.zeros(4)), x), rtol=1e-3)


def test_error_falls_at_fourth_order():
    with jax.enable_x64(True):
        prior = gaussian(8)
        x = draw(exact(prior, jnp.zeros(8)), (20,))
        expected = truth(exact(prior, jnp.zeros(8)), x)

        def error(num_levels):
            # From a level so low that the first step, of order (lowest^2 / v)^2, does not show.
            density = ndda.diffusion.ProbabilityFlow(num_levels, lowest=1e-3)
            transition = ndda.DiffusionTransition(prior, jnp.zeros(8), density=density)
            return float(jnp.sqrt(jnp.mean((transition.log_prob(x) - expected) ** 2)))

        assert error(41) < error(21) / 2**3.5
        assert error(41) < 1e-5


def test_two_modes_integrate_to_one():
    benchmark = load_program(BENCHMARKS / "density.py")
    modes = benchmark.TwoModes(np.array([0.9]), 0.05)
    x = jnp.linspace(-3.0, 3.0, 401)[:, None]
    value = ndda.DiffusionTransition(modes, jnp.zeros(1), density=ndda.diffusion.ProbabilityFlow(33)).log_prob(x)
    np.testing.assert_allclose(jnp.trapezoid(jnp.exp(value), x[:, 0]), 1.0, atol=1e-3)
    likely = np.abs(np.abs(np.asarray(x[:, 0])) - 0.9) < 0.7
    np.testing.assert_allclose(value[likely], truth(modes.exact(jnp.zeros(1)), x)[likely], atol=1e-2)


@pytest.mark.parametrize(("sample_shape", "batch_shape"), [((), ()), ((5,), ()), ((), (3,)), ((2, 1), (2, 3))])
def test_shapes(prior, sample_shape, batch_shape):
    states = jax.random.normal(KEY, (*batch_shape, 4))
    x = draw(exact(prior, states), sample_shape)
    value = ndda.DiffusionTransition(prior, states, density=FLOW).log_prob(x)
    assert value.shape == sample_shape + batch_shape
    np.testing.assert_allclose(value, truth(exact(prior, states), x), atol=5e-4)


def test_expanded_and_in_a_plate(prior):
    transition = ndda.DiffusionTransition(prior, jnp.ones(4), density=FEW)
    x = transition.expand((6,)).sample(KEY, (2,))
    value = transition.expand((6,)).log_prob(x)
    assert value.shape == (2, 6)

    def model():
        with numpyro.plate("member", 6):
            numpyro.sample("x", transition)

    np.testing.assert_allclose(log_density(model, (), {}, {"x": x[0]})[0], value[0].sum(), rtol=1e-5)


def test_one_value_under_many_states(prior):
    """A value with fewer axes than the batch broadcasts: what backward simulation asks for."""
    states, x = jax.random.normal(KEY, (2, 3, 4)), jnp.ones(4)
    value = ndda.DiffusionTransition(prior, states, density=FLOW).log_prob(x)
    assert value.shape == (2, 3)
    np.testing.assert_allclose(value, truth(exact(prior, states), jnp.broadcast_to(x, (2, 3, 4))), rtol=1e-4)


def test_jit_vmap_and_plain_python_agree(prior):
    states, x = jax.random.normal(KEY, (3, 4)), jnp.ones((3, 4))
    transition = ndda.DiffusionTransition(prior, states, density=FEW)
    batched = transition.log_prob(x)
    np.testing.assert_allclose(jax.jit(lambda d, v: d.log_prob(v))(transition, x), batched, rtol=1e-5)
    mapped = jax.vmap(lambda s, v: ndda.DiffusionTransition(prior, s, density=FEW).log_prob(v))(states, x)
    np.testing.assert_allclose(mapped, batched, rtol=1e-5)
    with jax.disable_jit():
        np.testing.assert_allclose(transition.log_prob(x), batched, rtol=1e-5)


def test_gradients_by_value_and_state(prior):
    def ours(x, state):
        return ndda.DiffusionTransition(prior, state, density=FLOW).log_prob(x)

    x, state = jnp.arange(4.0), jnp.ones(4)
    got = jax.jit(jax.grad(ours, (0, 1)))(x, state)
    expected = jax.grad(lambda x, state: truth(exact(prior, state), x), (0, 1))(x, state)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_scale_of_each_component_two_frames_and_inputs():
    scales = np.array([[0.1, 1.0, 5.0], [2.0, 0.5, -3.0]])
    independent = Independent(scales)
    frames = tuple(jax.random.normal(key, (2, 2, 3)) for key in jax.random.split(KEY))
    inputs = jnp.asarray([10.0, -10.0])
    known = dist.Normal(frames[1] + inputs[:, None, None], jnp.asarray(np.sqrt(0.4) * np.abs(scales))[None]).to_event(2)
    x = draw(known, (4,))
    transition = ndda.DiffusionTransition(independent, frames, inputs, density=FLOW)
    np.testing.assert_allclose(transition.log_prob(x), truth(known, x), atol=1e-3)
    _, passes = FLOW(independent, frames[1][0], x[0, 0])
    assert (int(passes.forward), int(passes.jvp), int(passes.vjp)) == (4 * 23 + 3, 24 * 6, 0)


def test_hutchinson_is_unbiased(prior):
    conditioning, x = prior.condition(jnp.zeros(4)), jnp.ones(4)

    def value(key, probes):
        return ndda.diffusion.ProbabilityFlow(8, ndda.diffusion.Hutchinson(key, probes))(prior, conditioning, x)[0]

    expected, passes = FEW(prior, conditioning, x)
    assert int(passes.jvp) == 8 * 4
    keys, spreads = jax.random.split(KEY, 400), []
    for probes in (1, 8):
        values = np.asarray(jax.jit(jax.vmap(lambda key, n=probes: value(key, n)))(keys), np.float64)
        spreads.append(values.std(ddof=1))
        assert_mean(values, expected)
    # Two independent estimates of a ratio of standard deviations, each known to 1 / sqrt(2 n).
    np.testing.assert_allclose(spreads[0] / spreads[1], np.sqrt(8), rtol=4 / np.sqrt(len(keys)))


def test_hutchinson_of_a_diagonal_jacobian_is_exact():
    independent, frame = Independent(np.ones((2, 3))), jnp.zeros((2, 3))
    x = jax.random.normal(KEY, (2, 3))
    signs = ndda.diffusion.ProbabilityFlow(8, ndda.diffusion.Hutchinson(KEY, 1))
    np.testing.assert_allclose(signs(independent, frame, x)[0], FEW(independent, frame, x)[0], rtol=1e-5)


def test_log_density_of_a_program(small):
    """The whole program: transitions inside a scan, and the same with a plain MultivariateNormal."""
    prior = ndda.GaussianPrior(small.transition, small.covariance)

    def program(transition):
        def model(y):
            x0 = numpyro.sample("x0", prior.climatology())

            def step(x, y_t):
                x = numpyro.sample("x", transition(x))
                numpyro.sample("y", dist.Normal(x[::2], small.error).to_event(1), obs=y_t)
                return x, None

            scan(step, x0, y)

        return model

    diffusion = program(lambda x: ndda.DiffusionTransition(prior, x, density=FLOW))
    closed = program(lambda x: exact(prior, x))
    states, y = small.simulate(3, 6)
    values = {"x0": jnp.zeros(4), "x": jnp.asarray(states, jnp.float32)}
    with jax.numpy_rank_promotion("allow"):  # MultivariateNormal needs it
        check_log_density(diffusion, closed, y, values)


def check_log_density(diffusion, closed, y, values):
    got = log_density(diffusion, (y,), {}, values)[0]
    np.testing.assert_allclose(got, log_density(closed, (y,), {}, values)[0], atol=2e-3)
    ours, theirs = (
        jax.grad(lambda x, model=model: log_density(model, (y,), {}, {**values, "x": x})[0])(values["x"])
        for model in (diffusion, closed)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-3)


def test_density_is_opt_in(prior):
    transition = ndda.DiffusionTransition(prior, jnp.zeros(4))
    with pytest.raises(NotImplementedError, match=r"Filter.*mask\(False\).*density=ndda.diffusion.ProbabilityFlow\(\)"):
        transition.log_prob(jnp.zeros(4))


def test_guided_transition_has_none(prior):
    def observe(x):
        return [ndda.observation.GaussianObservation(x[:1], jnp.ones(1), jnp.zeros(1), jnp.asarray([True]))]

    transition = ndda.DiffusionTransition(prior, jnp.zeros(4), density=FLOW)
    guided = transition.conditioned(ndda.observation.GaussianLikelihood(observe))
    with pytest.raises(NotImplementedError, match=r"a ConditionedTransition has no density(?!.*ProbabilityFlow)"):
        guided.log_prob(jnp.zeros(4))


def test_mask_asks_for_no_network_pass(prior):
    transition = ndda.DiffusionTransition(prior, jnp.zeros(4), density=FLOW).mask(False)
    assert transition.log_prob(jnp.ones(4)) == 0.0
    with handlers.seed(rng_seed=0), handlers.block():
        numpyro.sample("x", transition)


def test_refusals():
    ones = np.ones((4, 1))
    singular = ndda.GaussianPrior(0.5 * np.eye(4), ones @ ones.T, noise_covariance=ones @ ones.T)
    with pytest.raises(NotImplementedError, match="FactorNoise gives no inverse of its covariance"):
        ndda.DiffusionTransition(singular, jnp.zeros(4), density=FEW).log_prob(jnp.zeros(4))
    frames = (jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    known = ndda.DiffusionTransition(Independent(np.array([[1.0, 0.0]])), frames, jnp.zeros(()), density=FEW)
    with pytest.raises(RuntimeError, match="scale S is zero"):
        known.log_prob(jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="num_levels=1"):
        ndda.diffusion.ProbabilityFlow(1)
    with pytest.raises(ValueError, match="0 < lowest < highest"):
        ndda.diffusion.ProbabilityFlow(lowest=3.0).levels((0.02, 2.0))
    with pytest.raises(ValueError, match="probes=0"):
        ndda.diffusion.Hutchinson(KEY, 0)


def test_learned_emulator():
    """A network: no truth to compare with, but few levels agree with many, and signs with the whole trace."""
    prior = ndda.load_prior("lorenz96")
    state = jnp.asarray(prior.climatology().loc, jnp.float32)
    transition = ndda.DiffusionTransition(prior, state)
    x = transition.sample(KEY)

    def value(density):
        return float(ndda.DiffusionTransition(prior, state, density=density).log_prob(x))

    many = value(ndda.diffusion.ProbabilityFlow(48))
    np.testing.assert_allclose(value(ndda.diffusion.ProbabilityFlow(12)), many, atol=1e-3)
    np.testing.assert_allclose(
        value(ndda.diffusion.ProbabilityFlow(12, ndda.diffusion.Hutchinson(KEY, 4))), many, atol=0.05
    )
