"""Observations of any distribution: their Gaussian stand-ins, guidance and weights, against quadrature."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import stats

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import PriorDenoiser
from numpyro_diffusion_da.observation import GeneralLikelihood, GeneralObservation, moment_matching
from numpyro_diffusion_da.program import general_observation
from numpyro_diffusion_da.transition import GaussianDynamics

TWO = dist.Categorical(probs=jnp.array([0.5, 0.5]))
# What a value x of the state makes of an observation, and a value of it.
KINDS = {
    "Poisson": (lambda x: dist.Poisson(jnp.exp(x)), 20.0),
    "no count": (lambda x: dist.Poisson(jnp.exp(x)), 0.0),
    "StudentT, an outlier": (lambda x: dist.StudentT(3.0, x, 0.3), 6.0),
    "Bernoulli": (lambda x: dist.Bernoulli(logits=3.0 * x), 1.0),
    "VonMises": (lambda x: dist.VonMises(x, 4.0), 1.5),
    "of either sign": (
        lambda x: dist.MixtureSameFamily(TWO, dist.Normal(x[:, None] * jnp.array([[1.0, -1.0]]), 0.3)),
        1.0,
    ),
    "Normal or gross error": (lambda x: dist.Mixture(TWO, [dist.Normal(x, 0.2), dist.Normal(x, 3.0)]), 1.5),
    "RightCensored": (lambda x: dist.RightCensoredDistribution(dist.Normal(x, 0.3), jnp.ones(1)), 1.0),
    "volatility": (lambda x: dist.Normal(0.0, jnp.exp(0.5 * x)), 2.0),
    "NegativeBinomial2": (lambda x: dist.NegativeBinomial2(jnp.exp(x), 2.0), 5.0),
}


@pytest.fixture(autouse=True)
def mixtures_promote_ranks(request):
    """NumPyro's own mixtures do, inside."""
    mixture = any(name in request.node.name for name in ("sign", "gross", "Mixture"))
    with jax.numpy_rank_promotion("allow" if mixture else "raise"):
        yield


def likelihood_of(kind):
    fn, value = KINDS[kind]
    value = jnp.full(1, value)
    return GeneralLikelihood(lambda x: [general_observation("y", fn(x), value)])


def tilted_by_quadrature(likelihood, mean, variance):
    """(log normaliser, mean, variance) of p(y | x) N(x; mean, variance) for one x, in double precision."""
    x = mean + np.sqrt(variance) * np.linspace(-9, 9, 4001)
    logs = np.asarray(jax.vmap(lambda x: likelihood.log_prob(x[None]))(jnp.asarray(x, jnp.float32)), float)
    logs = logs + stats.norm(mean, np.sqrt(variance)).logpdf(x)
    weights = np.exp(logs - logs.max())
    log_normalizer = np.log(weights.sum() * (x[1] - x[0])) + logs.max()
    weights /= weights.sum()
    at = weights @ x
    return log_normalizer, at, weights @ (x - at) ** 2


# Guidance and weights know the others through their tilted moments alone.
GUIDED = ("Poisson", "StudentT, an outlier", "of either sign", "volatility")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in GUIDED])
def test_tilted_moments_are_those_of_quadrature(kind):
    """Under Gaussians from as wide as the state to far narrower than the likelihood."""
    likelihood, center, variance = likelihood_of(kind), np.array([0.2, 0.0, 0.5]), np.array([0.8, 0.26, 0.002])
    each = jax.vmap(lambda x: likelihood.log_prob(x[None]))
    tilted = jax.jit(lambda center, variance: moment_matching.tilted_moments(each, center, variance))
    got = tilted(*jnp.asarray([center, variance], jnp.float32))
    exact = np.array([tilted_by_quadrature(likelihood, *at) for at in zip(center, variance, strict=True)]).T
    np.testing.assert_allclose(got.log_normalizer, exact[0], atol=0.01)
    assert np.all(np.abs(got.mean - exact[1]) < 0.003 * np.sqrt(variance))
    np.testing.assert_allclose(got.variance, exact[2], rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k if k == "Poisson" else pytest.param(k, marks=pytest.mark.slow) for k in GUIDED])
def test_guidance_and_moment_weight_are_exact_for_one_observation_of_a_gaussian(kind):
    """E[z | z_s, y] and p(y): the Gaussian that stands for the likelihood has its mean, whatever its shape."""
    q, likelihood = 0.8, likelihood_of(kind)
    prior = ndda.GaussianPrior(np.eye(1), q * np.eye(1))
    conditioning = prior.condition(jnp.array([0.2]))
    denoiser = ndda.MMPS()(PriorDenoiser(prior, conditioning), likelihood)
    levels, z_s = jnp.array([10.0, 0.7, 0.05]), jnp.array([[4.0], [-0.4], [0.3]])

    @jax.jit
    def answers():
        guided, memory = jax.vmap(lambda z, s: denoiser(z, s, denoiser.init()))(z_s, levels)
        step = GaussianDynamics(jnp.array([0.2]), jnp.array([np.sqrt(q)], jnp.float32))
        return (
            guided,
            jax.vmap(lambda z, s: prior.denoise(z, s, conditioning))(z_s, levels),
            memory.passes,
            (ndda.Moment()(step, likelihood)[0]),
        )

    guided, unguided, passes, log_weight = answers()
    assert [n[0] for n in passes] == [1, 0, 2, 0]  # a forward pass, the spread, and the system of one observation
    location, scale = float(prior.location(conditioning)[0]), np.sqrt(q)  # x = location + scale z, z of unit variance
    for i, level in enumerate(np.asarray(levels, float)):
        variance = q * level**2 / (1.0 + level**2)
        _, mean, _ = tilted_by_quadrature(likelihood, location + scale * float(unguided[i, 0]), variance)
        assert abs(location + scale * float(guided[i, 0]) - mean) < 0.003 * np.sqrt(variance), level
    np.testing.assert_allclose(log_weight, tilted_by_quadrature(likelihood, 0.2, q)[0], atol=0.01)


def test_expectation_propagation_of_correlated_counts():
    covariance, counts = np.array([[1.0, 0.8], [0.8, 1.0]]), np.array([3.0, 0.0])
    got = jax.jit(
        lambda b: moment_matching.expectation_propagation(
            lambda t: dist.Poisson(jnp.exp(t)).log_prob(jnp.asarray(counts)), b, jnp.ones(2, bool)
        )
    )(jnp.asarray(covariance))
    grid = np.linspace(-6, 6, 601)
    t = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    logs = stats.multivariate_normal(np.zeros(2), covariance).logpdf(t) + stats.poisson(np.exp(t)).logpmf(counts).sum(1)
    weights = np.exp(logs)
    np.testing.assert_allclose(got.log_evidence, np.log(weights.sum() * (grid[1] - grid[0]) ** 2), atol=5e-3)
    # The pseudo observations give the posterior's mean and variances.
    precision = np.asarray(got.pseudo.scale, float) ** -2
    posterior = np.linalg.inv(np.linalg.inv(covariance) + np.diag(precision))
    mean = weights @ t / weights.sum()
    np.testing.assert_allclose(posterior @ (precision * np.asarray(got.pseudo.value)), mean, atol=5e-3)
    np.testing.assert_allclose(np.diag(posterior), weights @ (t - mean) ** 2 / weights.sum(), rtol=0.01)


def test_expectation_propagation_is_exact_for_gaussians_and_leaves_out_what_is_missing():
    covariance = jnp.array([[1.0, 0.5, 0.2], [0.5, 2.0, 0.3], [0.2, 0.3, 1.0]])
    seen = jnp.array([True, True, False])
    y = jnp.array([1.0, -0.5, 7.0])
    got = jax.jit(
        lambda b: moment_matching.expectation_propagation(
            lambda t: jnp.where(seen, dist.Normal(t, 0.3).log_prob(y), 0.0), b, seen
        )
    )(covariance)
    exact = stats.multivariate_normal(np.zeros(2), np.asarray(covariance)[:2, :2] + 0.09 * np.eye(2)).logpdf(y[:2])
    np.testing.assert_allclose(got.log_evidence, exact, atol=1e-3)
    np.testing.assert_allclose(got.pseudo.value[:2], y[:2], atol=1e-3)
    np.testing.assert_allclose(got.pseudo.scale[:2], 0.3, atol=1e-3)


def test_independent_components_need_no_expectation_propagation():
    """The weight is the sum over components, which propagation finds too, with eigenvalues in each of its rounds."""
    y, seen = jnp.array([0.9, -0.4, 1.3]), jnp.ones(3, bool)

    def weight(mean, components):
        def log_prob(parameters):
            return -0.5 * ((y - jnp.arctan(parameters[:, 0])) / 0.3) ** 2

        likelihood = GeneralLikelihood(lambda x: [GeneralObservation(x[:, None], log_prob, seen, components)])
        return ndda.Moment()(GaussianDynamics(mean, jnp.array([0.5, 1.0, 2.0])), likelihood)[0]

    mean = jnp.array([0.3, -1.0, 2.0])
    each, together = (lambda m: weight(m, np.arange(3))), (lambda m: weight(m, None))
    np.testing.assert_allclose(jax.jit(each)(mean), jax.jit(together)(mean), rtol=1e-4)
    assert "eigh" not in str(jax.make_jaxpr(each)(mean))
    assert "eigh" in str(jax.make_jaxpr(together)(mean))


def test_tilted_moments_far_out_narrow_and_impossible():
    def log_prob(t):
        return jnp.stack([-0.5 * ((20.0 - t[0]) / 0.1) ** 2, -0.5 * (t[1] / 1e-3) ** 2, jnp.nan])

    center, variance = jnp.zeros(3), jnp.ones(3)
    got = moment_matching.tilted_moments(log_prob, center, variance)
    np.testing.assert_allclose(got.mean, [20.0 / 1.01, 0.0, 0.0], atol=2e-3)
    np.testing.assert_allclose(got.variance[1], 1e-6, rtol=0.01)
    assert got.log_normalizer[2] == -jnp.inf
    pseudo = moment_matching.pseudo_observations(got, center, variance)
    assert jnp.all(jnp.isfinite(pseudo.value))  # an impossible observation says nothing
    assert pseudo.scale[2] > 10.0


DISTRIBUTIONS = [
    dist.Poisson(jnp.array([0.2, 1.3])),
    dist.StudentT(4.0, jnp.array([0.2, 1.3]), 0.5),
    dist.Bernoulli(probs=jnp.array([0.2, 0.7])),
    dist.Gamma(2.0, jnp.array([0.2, 1.3])),
    dist.Beta(jnp.array([0.2, 1.3]), 2.0),
    dist.ZeroInflatedPoisson(0.1, jnp.array([0.2, 1.3])),
    dist.TruncatedNormal(jnp.array([0.2, 1.3]), 1.0, low=0.0),
    dist.Categorical(logits=jnp.array([[0.2, 1.0, 0.0], [0.1, 0.3, 0.5]])),
    dist.OrderedLogistic(jnp.array([0.2, 1.3]), jnp.array([0.0, 1.0])),
    dist.Binomial(10, logits=jnp.array([0.2, 1.3])),
    dist.LogNormal(jnp.array([0.2, 1.3]), 1.0),
    dist.MixtureSameFamily(TWO, dist.Normal(jnp.array([[0.2, 1.3], [0.0, 1.0]]), 1.0)),
    dist.Mixture(TWO, [dist.Normal(jnp.array([0.2, 1.3]), 0.2), dist.Normal(jnp.array([0.2, 1.3]), 3.0)]),
    dist.RightCensoredDistribution(dist.Normal(jnp.array([0.2, 1.3]), 0.3), jnp.array([1.0, 0.0])),
    dist.VonMises(jnp.array([0.2, 1.3]), 4.0),
    dist.NegativeBinomial2(jnp.array([0.2, 1.3]), 2.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("fn", DISTRIBUTIONS, ids=lambda fn: type(fn).__name__)
def test_a_distribution_is_taken_apart_and_put_together(fn):
    value = jnp.asarray(fn.sample(jax.random.key(0)))
    site = general_observation("y", fn.to_event(1), value)
    np.testing.assert_allclose(site.log_prob(site.parameters), fn.log_prob(value), rtol=2e-5, atol=2e-6)


@pytest.mark.slow
def test_missing_counts_change_nothing_and_have_no_weight():
    some = GeneralLikelihood(lambda x: [general_observation("y", dist.Poisson(jnp.exp(x)), jnp.array([3.0]))])
    both = GeneralLikelihood(
        lambda x: [general_observation("y", dist.Poisson(jnp.exp(jnp.tile(x, 2))), jnp.array([3.0, jnp.nan]))]
    )
    x = jnp.array([0.4])
    np.testing.assert_allclose(some.log_prob(x), both.log_prob(x))
    prior = ndda.GaussianPrior(np.eye(1), np.eye(1))
    at = PriorDenoiser(prior, prior.condition(jnp.zeros(1)))
    solved = ndda.MMPS(ndda.diffusion.DirectSolve())
    answers = []
    for likelihood in (some, both):
        denoiser = solved(at, likelihood)
        answers.append(eqx.filter_jit(denoiser)(jnp.array([1.0]), jnp.asarray(1.0), denoiser.init())[0])
    np.testing.assert_allclose(*answers, rtol=1e-5)
    assert jnp.isfinite(jax.grad(lambda x: both.log_prob(x))(x)).all()


def test_a_rate_of_zero_and_a_class_without_its_arguments():
    rate = GeneralLikelihood(lambda x: [general_observation("y", dist.Poisson(jax.nn.relu(x)), jnp.array([0.0]))])
    step = GaussianDynamics(jnp.array([-1.0]), jnp.array([0.1]))
    draw = jax.jit(lambda key: step.conditional_draw(key, rate, ndda.MMPS())[0])
    assert jnp.isfinite(draw(jax.random.key(0))).all()

    class Hidden(dist.Distribution):
        def __init__(self, size):
            super().__init__(batch_shape=jnp.shape(size))

    with pytest.raises(ValueError, match=r"site 'y' has the likelihood Hidden, which does not keep.*'size'"):
        general_observation("y", Hidden(jnp.ones(1)), jnp.ones(1))


def test_user_made_observations_need_no_numpyro():
    """`GeneralObservation` is parameters and a function of them."""
    observed = GeneralLikelihood(
        lambda x: [GeneralObservation(x[:, None], lambda p: -jnp.exp(p[:, 0]), jnp.ones(1, bool))]
    )
    log_weight = jax.jit(lambda at: ndda.Moment()(GaussianDynamics(at, jnp.ones(1)), observed)[0])(jnp.zeros(1))
    np.testing.assert_allclose(log_weight, tilted_by_quadrature(observed, 0.0, 1.0)[0], atol=1e-3)


def counts_program(transition, covariance, kind):
    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.MultivariateNormal(jnp.asarray(transition) @ x, jnp.asarray(covariance)))
            numpyro.sample("y", kind(x).to_event(1), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(2), 1.0).to_event(1)), y)

    return model


@pytest.mark.slow
def test_filters_agree_with_a_very_large_bootstrap_filter():
    y = 4.0 + np.random.default_rng(0).integers(-2, 3, size=(8, 2)).astype(np.float32)
    covariance = 0.2 * np.array([[1, 0.5], [0.5, 1]], np.float32)
    model = counts_program(0.9 * np.eye(2, dtype=np.float32), covariance, lambda x: dist.Poisson(jnp.exp(1.0 + x)))

    def run(algorithm, n):
        filter = ndda.Filter(algorithm, num_particles=n, progress_bar=False, keep_observed=False)
        filter.run(jax.random.key(3), y)
        x = filter.result.posterior["x"][0]
        return x.mean(0), x.std(0), filter.result.sample_stats["log_evidence_increment"].sum()

    mean, spread, evidence = run(ndda.Bootstrap(model), 50_000)
    for algorithm in (ndda.FAAPF(model, target_ess=0.0), ndda.GuidedPF(model)):
        got = run(algorithm, 4000)
        assert np.sqrt(np.mean(((got[0] - mean) / spread) ** 2)) < 0.06, algorithm
        np.testing.assert_allclose(got[1] / spread, 1.0, atol=0.1)
        # FA-APF draws from the Gaussian that stands for the posterior and does not correct it; GuidedPF does.
        assert abs(got[2] - evidence) < (0.25 if isinstance(algorithm, ndda.FAAPF) else 0.15), algorithm
