"""A network as a prior: every parametrization against the exact Gaussian prior, frameworks, shapes, filters."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.observation import GaussianLikelihood, GaussianObservation
from numpyro_diffusion_da.priors import parametrization as par
from numpyro_diffusion_da.transition import DiffusionDynamics

pytestmark = pytest.mark.slow

D = 4
TRANSITION = 0.9 * np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
COVARIANCE = 0.3 * np.exp(-np.abs(np.arange(D)[:, None] - np.arange(D)) / 2)
OFFSET = np.array([1.0, -2.0, 0.5, 0.0])
CORRELATED = np.array([[1.0, 0.5, 0, 0], [0.5, 1.0, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 0.5]])
TABLE = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))  # the linear table of Ho et al. 2020
RANGE = (0.02, 80.0)
LEVELS = (0.02, 0.3, 1.0, 7.0, 80.0)

# Index -> (alpha, sigma), as the papers write them: the direction that the library has to invert.


def cosine(t):
    return jnp.cos(jnp.pi * t / 2), jnp.sin(jnp.pi * t / 2)


def linear_beta(t):
    log_alpha = -(t**2) * (20.0 - 0.1) / 4 - t * 0.1 / 2
    return jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))


def table(k):
    log_snr = jnp.interp(k, jnp.arange(1000.0), jnp.asarray(np.log(TABLE / (1 - TABLE))))
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def exploding(s):
    return jnp.ones_like(s), s


def exploding_log(c):
    return jnp.ones_like(c), jnp.exp(4 * c)


def edm(c):
    s = jnp.exp(4 * c)
    return 1 / jnp.sqrt(s**2 + 0.5**2), s / jnp.sqrt(s**2 + 0.5**2)


def straight(t):
    return 1 - t, t


def straight_from_noise(t):
    return t, 1 - t


# What the network gives, from the exact E[z | z_t], E[e | z_t] and score.


def edm_output(alpha, sigma, z, e, score, z_t):
    s = sigma / alpha
    skip, out = 0.25 / (s**2 + 0.25), 0.5 * s / jnp.sqrt(s**2 + 0.25)
    return (z - skip * z_t / alpha) / out


OUTPUTS = {
    "z": lambda alpha, sigma, z, e, score, z_t: z,
    "F": edm_output,
    "e": lambda alpha, sigma, z, e, score, z_t: e,
    "v": lambda alpha, sigma, z, e, score, z_t: alpha * e - sigma * z,
    "score": lambda alpha, sigma, z, e, score, z_t: score,
    "e - z": lambda alpha, sigma, z, e, score, z_t: e - z,
    "z - e": lambda alpha, sigma, z, e, score, z_t: z - e,
}

CASES = {
    "denoiser": (lambda: par.Denoised(), exploding, "z"),
    "denoiser, log level": (lambda: par.Denoised(par.VarianceExploding(par.LogLevel(0.25))), exploding_log, "z"),
    "x0, table": (lambda: par.Denoised(par.VariancePreserving(par.DiscreteTable(TABLE))), table, "z"),
    "EDM": (lambda: par.Preconditioned(0.5), edm, "F"),
    "epsilon, table": (lambda: par.Epsilon(par.VariancePreserving(par.DiscreteTable(TABLE))), table, "e"),
    "epsilon, linear beta": (lambda: par.Epsilon(par.VariancePreserving(par.LinearBeta())), linear_beta, "e"),
    "epsilon, exploding": (lambda: par.Epsilon(par.VarianceExploding()), exploding, "e"),
    "v, cosine": (lambda: par.VPrediction(par.VariancePreserving(par.Cosine())), cosine, "v"),
    "v, exploding": (lambda: par.VPrediction(par.VarianceExploding()), exploding, "v"),
    "score, linear beta": (lambda: par.Score(par.VariancePreserving(par.LinearBeta())), linear_beta, "score"),
    "score, exploding": (lambda: par.Score(par.VarianceExploding(par.Level())), exploding, "score"),
    "velocity": (lambda: par.Velocity(), straight, "e - z"),
    "velocity from noise": (lambda: par.Velocity(par.FlowMatching(data_at=1)), straight_from_noise, "z - e"),
    "epsilon, flow": (lambda: par.Epsilon(par.FlowMatching()), straight, "e"),
}


def network_of(gaussian, path, output, noise_covariance):
    """The exact network of N(0, P) latents: linear in z_t, from (parameters, z_t, index) alone."""
    latent = jnp.asarray(gaussian.covariance) / gaussian.latent_scale**2
    parameters = {"P": latent, "C": jnp.asarray(noise_covariance)}

    def network(parameters, z_t, index, conditioning):
        assert conditioning.shape == (D,)
        alpha, sigma = path(index)
        white = jnp.linalg.solve(alpha**2 * parameters["P"] + sigma**2 * parameters["C"], z_t)
        z, e = alpha * parameters["P"] @ white, sigma * parameters["C"] @ white
        return OUTPUTS[output](alpha, sigma, z, e, -white, z_t)

    return network, parameters


def exact_prior(noise_covariance=None):
    return ndda.GaussianPrior(TRANSITION, COVARIANCE, OFFSET, noise_covariance=noise_covariance, noise_range=RANGE)


def network_prior(case, noise_covariance=None):
    """The exact prior, as a network."""
    parametrization, path, output = CASES[case]
    gaussian = exact_prior(noise_covariance)
    network, parameters = network_of(
        gaussian, path, output, np.eye(D) if noise_covariance is None else noise_covariance
    )
    return ndda.DenoiserPrior(
        network,
        parametrization(),
        parameters=parameters,
        layout=D,
        condition=lambda x, inputs: gaussian.condition(x),
        location=lambda mean: mean,
        scale=gaussian.latent_scale,
        noise=gaussian.noise,
        noise_range=RANGE,
        climatology=gaussian.climatology(),
    )


def evaluated(fn, make):
    with jax.enable_x64(True):
        return np.asarray(jax.jit(fn)(make()))


@pytest.mark.parametrize("noise_covariance", [None, CORRELATED], ids=["white", "correlated"])
@pytest.mark.parametrize("case", CASES)
def test_denoises_as_the_exact_prior(case, noise_covariance):
    def denoised(prior):
        z = jax.random.normal(jax.random.key(0), (D,))
        conditioning = prior.condition(jnp.ones(D))
        return jnp.stack([prior.denoise((1 + s) * z, jnp.asarray(s), conditioning) for s in LEVELS])

    exact = evaluated(denoised, lambda: exact_prior(noise_covariance))
    ours = evaluated(denoised, lambda: network_prior(case, noise_covariance))
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


def draws_and_moments(prior):
    """Mean, a covariance product, a draw, and a guided draw of one step, stacked."""

    def observe(x):
        return [GaussianObservation(x[::2], jnp.full((2,), 0.4), jnp.array([0.7, -0.3]), jnp.ones(2, bool))]

    step = DiffusionDynamics(prior, prior.condition(jnp.ones(D)), ndda.Sampler())
    key, moments = jax.random.key(1), step.moments()
    guided, _ = step.conditional_draw(key, GaussianLikelihood(observe), ndda.MMPS())
    product = moments.covariance_product(jnp.arange(1.0, D + 1))
    return jnp.stack([moments.mean, product, step.draw(key)[0], guided])


@pytest.fixture(scope="module")
def exact_draws_and_moments():
    return evaluated(draws_and_moments, lambda: exact_prior(CORRELATED))


ONE_OF_EACH_OUTPUT = ["denoiser", "EDM", "epsilon, table", "v, cosine", "score, linear beta", "velocity from noise"]


@pytest.mark.parametrize("case", ONE_OF_EACH_OUTPUT)
def test_guided_draws_and_moments_are_those_of_the_exact_prior(case, exact_draws_and_moments):
    ours = evaluated(draws_and_moments, lambda: network_prior(case, CORRELATED))
    # The same key makes the same draw; what is left is rounding, which the highest level multiplies by its square.
    np.testing.assert_allclose(ours, exact_draws_and_moments, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_single_precision_is_near(case):
    gaussian, wrapped = exact_prior(), network_prior(case)
    z = jax.random.normal(jax.random.key(0), (D,))
    for s in LEVELS:
        exact, ours = (p.denoise((1 + s) * z, jnp.asarray(s), p.condition(jnp.ones(D))) for p in (gaussian, wrapped))
        # The price of predicting e or the score: rounding, and that of the index, is multiplied by s.
        amplified = isinstance(wrapped.parametrization, (par.Epsilon, par.Score))
        np.testing.assert_allclose(ours, exact, atol=2e-5 * (1 + s if amplified else 1))


def test_indices_invert_their_schedules():
    s = jnp.geomspace(0.02, 80.0, 40)
    for index, path in ((par.Cosine(), cosine), (par.LinearBeta(), linear_beta), (par.DiscreteTable(TABLE), table)):
        alpha, sigma = jax.vmap(path)(jax.vmap(index)(s))
        np.testing.assert_allclose(sigma / alpha, s, rtol=1e-3)
        np.testing.assert_allclose(alpha, jax.vmap(par.VariancePreserving(index).alpha)(s), rtol=1e-3)
    exact = par.DiscreteTable(TABLE)
    at = jax.vmap(exact)(jnp.sqrt(1 / TABLE[[0, 10, 999]] - 1))
    np.testing.assert_allclose(at, [0, 10, 999], atol=0.05)
    assert math.isclose(exact.limits[1], math.sqrt(1 / TABLE[-1] - 1))
    np.testing.assert_allclose(jax.vmap(par.LinearBeta())(jnp.asarray(par.LinearBeta().limits)), [1e-5, 1.0], rtol=1e-5)


# --- frameworks -----------------------------------------------------------------------------------------------------


def program(prior, error=0.5):
    def model(y):
        x0 = numpyro.sample("x0", prior.climatology())

        def step(x, y_t):
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
            numpyro.sample("y", dist.Normal(x[::2], error).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    return model


def climatology():
    return dist.Normal(jnp.zeros(D), 1.0).to_event(1)


def equinox_prior():
    mlp = eqx.nn.MLP(2 * D + 1, D, 8, 1, key=jax.random.key(0))

    class Net(eqx.Module):
        mlp: eqx.nn.MLP

        def __call__(self, z_t, t, x):
            return self.mlp(jnp.concatenate([z_t, t[None], x]))

    return ndda.DenoiserPrior(
        Net(mlp), par.Velocity(), layout=(D,), residual=True, scale=0.5, climatology=climatology()
    ), 2 * 2


def function_prior():
    parameters = {"w": 0.1 * np.ones((D, D), np.float32)}
    return ndda.DenoiserPrior(
        lambda p, z, s, x: jnp.tanh(p["w"] @ (z / (1 + s)) + x),
        parameters=parameters,
        noise_range=RANGE,
        layout=D,
        residual=True,
        climatology=climatology(),
    ), 1


def haiku_prior():
    hk = pytest.importorskip("haiku")

    def forward(z, t, x):
        return hk.nets.MLP([8, D])(jnp.concatenate([z, t[None], x]))

    net = hk.without_apply_rng(hk.transform(forward))
    parameters = net.init(jax.random.key(0), jnp.zeros(D), jnp.zeros(()), jnp.zeros(D))
    path = par.VariancePreserving(par.Cosine())
    return ndda.DenoiserPrior(
        net.apply, par.VPrediction(path), parameters=parameters, layout=D, climatology=climatology()
    ), 4


def flax_prior():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, z, t, x):
            return nn.Dense(D)(nn.tanh(nn.Dense(8)(jnp.concatenate([z, t[None], x]))))

    net = Net()
    parameters = net.init(jax.random.key(0), jnp.zeros(D), jnp.zeros(()), jnp.zeros(D))
    path = par.VariancePreserving(par.DiscreteTable(TABLE))
    return ndda.DenoiserPrior(
        net.apply, par.Epsilon(path), parameters=parameters, layout=D, residual=True, climatology=climatology()
    ), 4


@pytest.mark.parametrize("make", [equinox_prior, function_prior, haiku_prior, flax_prior])
def test_networks_of_any_framework_filter(make):
    with jax.numpy_rank_promotion("allow"):  # theirs: biases are added by rank promotion
        prior, arrays = make()
        leaves = jax.tree.leaves((prior.network, prior.parameters))
        assert len(leaves) == arrays
        assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(prior))
        x = jnp.ones((3, D))
        transition = ndda.DiffusionTransition(prior, x)
        eager = transition.sample(jax.random.key(0))
        assert eager.shape == (3, D)
        # The whole prior is an argument: its arrays are no constants.
        traced = jax.jit(lambda p, x: ndda.DiffusionTransition(p, x).sample(jax.random.key(0)))(prior, x)
        np.testing.assert_allclose(traced, eager, rtol=1e-3, atol=1e-3)
        y = np.zeros((2, D // 2), np.float32)
        filter = ndda.Filter(ndda.FAAPF(program(prior)), num_particles=8, progress_bar=False)
        filter.run(jax.random.key(0), y)
        assert np.all(np.isfinite(filter.result.posterior["x"]))
        assert filter.result.attributes["prior"] == "DenoiserPrior"
        assert filter.result.attributes["parametrization"] == type(prior.parametrization).__name__


def test_filters_as_the_exact_prior(small):
    _, y = small.simulate(1, 3)
    results = []
    for prior in (exact_prior(), network_prior("v, cosine")):
        filter = ndda.Filter(ndda.FAAPF(program(prior)), num_particles=16, progress_bar=False)
        filter.run(jax.random.key(0), y.astype(np.float32))
        results.append(filter.result.posterior["x"])
    # Nearly equal weights could choose another ancestor; at this size and key none do.
    np.testing.assert_allclose(results[1], results[0], atol=2e-2)


def test_a_second_step_of_a_filter_traces_nothing():
    calls = []

    def network(z_s, s, x):
        calls.append(s)
        return z_s / (1 + s**2)

    prior = ndda.DenoiserPrior(
        network, layout=D, residual=True, scale=0.5, noise_range=RANGE, climatology=climatology()
    )
    filter = ndda.Filter(ndda.FAAPF(program(prior)), num_particles=8, progress_bar=False)
    counts = []
    for steps in (2, 5):
        calls.clear()
        filter.run(jax.random.key(0), np.zeros((steps, D // 2), np.float32))
        counts.append(len(calls))
    # Another length is another program; its steps are one program, whatever their number.
    assert 0 < counts[1] <= counts[0]


# --- conditioning, location, scale ----------------------------------------------------------------------------------


def identity(z_s, s, given):
    return z_s


def make(**kwargs):
    return ndda.DenoiserPrior(**({"network": identity, "layout": (2, 3), "noise_range": RANGE} | kwargs))


def test_location_and_scale():
    x = jnp.arange(6.0).reshape(2, 3)
    default = make().condition(x)
    np.testing.assert_array_equal(default.location, np.zeros((2, 3)))
    assert default.scale == 1.0
    np.testing.assert_array_equal(default.given, x)
    np.testing.assert_array_equal(make(residual=True).condition(x).location, x)
    np.testing.assert_array_equal(make(residual=True).condition((0 * x, x)).location, x)
    per_channel = make(scale=np.array([1.0, 2.0, 3.0]), location=np.array([5.0, 6.0, 7.0])).condition(x)
    np.testing.assert_array_equal(per_channel.location[1], [5, 6, 7])
    np.testing.assert_array_equal((per_channel.scale * jnp.ones((2, 3)))[0], [1, 2, 3])
    prior = make(condition=lambda x, f: {"x": x, "f": f}, location=lambda c: c["x"] + c["f"], scale=lambda c: c["f"])
    at = prior.condition(x, jnp.asarray(2.0))
    np.testing.assert_array_equal(prior.location(at), x + 2)
    assert prior.scale(at) == 2.0
    assert prior.layout.dims == ("axis_0", "axis_1")


def test_two_states_and_inputs_in_a_transition():
    prior = make(condition=lambda frames, f: (jnp.stack(frames), f), residual=True)
    x = jnp.zeros((4, 2, 3))
    assert ndda.DiffusionTransition(prior, (x, x), jnp.zeros(4)).sample(jax.random.key(0)).shape == (4, 2, 3)


def test_half_precision_networks_keep_the_state_s_precision():
    prior = make(network=lambda z, s, c: z.astype(jnp.bfloat16))
    assert prior.denoise(jnp.ones((2, 3)), jnp.asarray(1.0), prior.condition(jnp.ones((2, 3)))).dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"network": 3}, TypeError, "DenoiserPrior got network=3; expected a Callable"),
        ({"condition": 3}, TypeError, "got condition=3; expected a Callable: write condition=lambda state, inputs"),
        ({"parametrization": "epsilon"}, TypeError, "parametrization='epsilon'; expected a Parametrization.*Velocity"),
        ({"parametrization": par.Velocity}, TypeError, "the class Velocity, without parentheses"),
        ({"noise": 1.0}, TypeError, r"noise=1.0; expected a Noise: write noise=ndda.diffusion.WhiteNoise\(\)"),
        ({"noise": ndda.diffusion.WhiteNoise}, TypeError, "the class WhiteNoise, without parentheses"),
        ({"layout": (2, "x")}, TypeError, "positive integers"),
        ({"layout": 40.0}, TypeError, r"DenoiserPrior got layout=40.0; expected a Layout.*write layout=\(40,\)"),
        ({"layout": ndda.Layout}, TypeError, "the class Layout, without parentheses"),
        ({"climatology": 1.0}, TypeError, "climatology=1.0; expected a Distribution: write climatology=dist.Normal"),
        ({"noise_range": 80.0}, TypeError, r"noise_range=80.0; expected a tuple.*write noise_range=\(0.02, 80.0\)"),
        ({"residual": True, "location": 1.0}, ValueError, "one of them"),
        ({"scale": np.ones(4)}, ValueError, r"scale has shape \(4,\)"),
        ({"location": np.ones((5, 2, 3))}, ValueError, "location has shape"),
        ({"noise_range": None}, ValueError, "give noise_range"),
        ({"noise_range": (1.0, 0.5)}, ValueError, "lowest < highest"),
        ({"noise_range": (0.02, 1.0, 80.0)}, ValueError, "noise_range has 3 values"),
        (
            {
                "parametrization": par.Epsilon(par.VariancePreserving(par.DiscreteTable(TABLE))),
                "noise_range": (1e-3, 80.0),
            },
            ValueError,
            "give levels within these limits",
        ),
        ({"climatology": dist.Normal(0.0, 1.0)}, ValueError, r"event shape \(\)"),
    ],
)
def test_mistakes_are_refused(change, error, match):
    with pytest.raises(error, match=match):
        make(**change)


def test_mistakes_of_a_parametrization_are_refused():
    with pytest.raises(TypeError, match="Epsilon got path='vp'; expected a Path: write path=VariancePreserving"):
        par.Epsilon("vp")
    with pytest.raises(TypeError, match="NoiseIndex"):
        par.VariancePreserving(TABLE)
    with pytest.raises(TypeError, match="FlowMatching"):
        par.Velocity(par.VariancePreserving(par.Cosine()))
    with pytest.raises(ValueError, match="give the time of pure data, 0 or 1"):
        par.FlowMatching(data_at=2)
    with pytest.raises(ValueError, match="positive number"):
        par.Preconditioned(0.0)
    with pytest.raises(ValueError, match="must decrease strictly"):
        par.DiscreteTable(TABLE[::-1])
    with pytest.raises(ValueError, match="without a last value of 0"):
        par.DiscreteTable([0.9, 0.5, 0.0])
    with pytest.raises(ValueError, match="give 0 < beta_min < beta_max"):
        par.LinearBeta(20.0, 0.1)


def test_mistakes_at_run_time_are_refused():
    x, s = jnp.ones((2, 3)), jnp.asarray(1.0)
    conditioning = make().condition(x)
    with pytest.raises(ValueError, match=r"output of shape \(1, 2, 3\)"):
        make(network=lambda z, s, c: z[None]).denoise(x, s, conditioning)
    with pytest.raises(TypeError, match="gave a tuple"):
        make(network=lambda z, s, c: (z, None)).denoise(x, s, conditioning)
    with pytest.raises(ValueError, match="describes states of shape"):
        make().condition(jnp.ones(3))
    with pytest.raises(ValueError, match=r"batch of states of shape \(5,\), but takes one state of shape"):
        make().condition(jnp.ones((5, 2, 3)))
    with pytest.raises(ValueError, match="no function that takes them"):
        make().condition(x, jnp.ones(()))
    with pytest.raises(ValueError, match="residual=True got a dict, but needs a state or a tuple of states"):
        make(residual=True).condition({"a": x})
    with pytest.raises(ValueError, match="location has shape"):
        make(location=lambda c: jnp.ones(4)).condition(x)
    with pytest.raises(NotImplementedError, match="no climatology"):
        make().climatology()
