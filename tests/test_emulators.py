"""Emulators of other kinds against exact answers: interpolants from the last state, forecasts with a stated error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import FactorNoise, SphericalNoise, WhiteNoise
from numpyro_diffusion_da.observation import GaussianLikelihood, GaussianObservation
from numpyro_diffusion_da.priors import (
    DeterministicPrior,
    HarmonicNoise,
    Interpolant,
    InterpolantPrior,
    SphericalHarmonics,
)
from numpyro_diffusion_da.transition import DiffusionDynamics

D = 4
RNG = np.random.default_rng(0)
A = 0.9 * np.linalg.qr(RNG.normal(size=(D, D)))[0]
ROOT = 0.6 * np.eye(D) + 0.2 * RNG.normal(size=(D, D))
Q = ROOT @ ROOT.T
X = jnp.asarray([1.0, -0.5, 0.3, 2.0])

LINEAR = Interpolant(scale=0.7)
QUADRATIC = Interpolant(beta=lambda t: t**2, scale=0.7)  # that of FlowDAS


def exact_drift(interpolant: Interpolant):
    """Drift of an interpolant between x and x' ~ N(A x, Q), by conditioning of Gaussians at each time."""

    def drift(x_t, t, x):
        a, b, c = interpolant.alpha, interpolant.beta, interpolant.sigma
        wiener = (interpolant.scale * c(t)) ** 2 * t
        total = b(t) ** 2 * jnp.asarray(Q) + wiener * jnp.eye(D)
        mean = jnp.asarray(A) @ x
        off = jnp.linalg.solve(total, x_t - a(t) * x - b(t) * mean)
        expected = mean + b(t) * jnp.asarray(Q) @ off
        # E[sigma' W_t] with W_t = (x_t - alpha x - beta x') / sigma.
        noise = interpolant.scale**2 * c(t) * t * off
        return jax.grad(a)(t) * x + jax.grad(b)(t) * expected + jax.grad(c)(t) * noise

    return drift


@pytest.mark.parametrize("interpolant", [LINEAR, QUADRATIC])
def test_an_exact_drift_gives_the_exact_denoiser(interpolant):
    prior = InterpolantPrior(exact_drift(interpolant), interpolant, layout=D, scale=0.5)
    known = ndda.GaussianPrior(A, Q)
    ours, theirs = prior.condition(X), known.condition(X)
    z = jnp.asarray(np.random.default_rng(1).normal(size=D), jnp.float32)
    lowest, highest = prior.noise_range
    for level in np.geomspace(1.5 * lowest, 0.7 * highest, 6):
        state = X + 0.5 * z * level
        # The denoised state: location + scale * D(z_s, s), with the noised latent and the level in each prior's unit.
        mine = X + 0.5 * prior.denoise((state - X) / 0.5, jnp.asarray(level), ours)
        a, s = known.location(theirs), known.scale(theirs)
        other = a + s * known.denoise((state - a) / s, jnp.asarray(0.5 * level / float(jnp.mean(s))), theirs)
        np.testing.assert_allclose(mine, other, atol=3e-4 * (1 + level))


@pytest.mark.slow
def test_guided_draws_of_an_interpolant_have_the_posterior():
    prior = InterpolantPrior(exact_drift(LINEAR), LINEAR, layout=D, scale=0.5)
    error, y = jnp.full(2, 0.4), jnp.asarray([0.5, 1.0])
    likelihood = GaussianLikelihood(lambda x: [GaussianObservation(x[::2], error, y, jnp.ones(2, bool))])
    dynamics = DiffusionDynamics(prior, prior.condition(X), ndda.Sampler(schedule=ndda.KarrasSchedule(48)))
    keys = jax.random.split(jax.random.key(0), 4000)
    x = np.asarray(jax.jit(jax.vmap(lambda k: dynamics.conditional_draw(k, likelihood, ndda.MMPS())[0]))(keys))
    h, r = np.eye(D)[::2], 0.16 * np.eye(2)
    gain = Q @ h.T @ np.linalg.inv(h @ Q @ h.T + r)
    mean = A @ np.asarray(X)
    mean, covariance = mean + gain @ (np.asarray(y) - h @ mean), Q - gain @ h @ Q
    spread = np.sqrt(np.diagonal(covariance))
    np.testing.assert_allclose(x.mean(0) / spread, mean / spread, atol=0.08)
    np.testing.assert_allclose(np.cov(x.T) / np.outer(spread, spread), covariance / np.outer(spread, spread), atol=0.12)


def test_what_an_interpolant_refuses():
    with pytest.raises(ValueError, match=r"beta\(1\) = 2, expected 1"):
        Interpolant(beta=lambda t: 2.0 * t)
    with pytest.raises(ValueError, match="does not decrease"):
        Interpolant(beta=lambda t: t**0.25)
    with pytest.raises(ValueError, match="scale"):
        Interpolant(scale=0.0)
    with pytest.raises(ValueError, match=r"times=\(0.0, 1.0\)"):
        InterpolantPrior(exact_drift(LINEAR), LINEAR, layout=D, times=(0.0, 1.0))


def noises():
    harmonics = SphericalHarmonics(4, 8, num_scalars=1, num_winds=1)
    return {
        "white": (WhiteNoise(), (3, 2)),
        "factor": (FactorNoise(jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)), (3, 2)),
        "spherical": (SphericalNoise(5, 8), (5, 8, 2)),
        "harmonic": (HarmonicNoise(harmonics), (harmonics.num_latitudes, harmonics.num_longitudes, 3)),
    }


@pytest.mark.parametrize("kind", ["white", "factor", "spherical", "harmonic"])
def test_colored_noise_has_the_covariance(kind):
    """A A^T v = C v for random v, with A^T the transpose that JAX makes of `colored`."""
    noise, shape = noises()[kind]
    zero = jnp.zeros(noise.white_shape(shape))
    v = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    (pulled,) = jax.linear_transpose(lambda white: noise.colored(white, shape), zero)(v)
    np.testing.assert_allclose(noise.colored(pulled, shape), noise.covariance_product(v), atol=2e-5)


@pytest.mark.slow
def test_a_forecast_with_a_stated_error_is_the_gaussian_transition():
    """The same filter twice: a deterministic prior, and the Gaussian in closed form. One pass a particle and step."""
    root = jnp.asarray(ROOT, jnp.float32)
    prior = DeterministicPrior(
        lambda p, x: p @ x, parameters=jnp.asarray(A, jnp.float32), layout=D, scale=1.0, noise=FactorNoise(root)
    )

    def program(transition):
        def model(y):
            x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(D), 1.0).to_event(1))

            def step(x, y_t):
                x = numpyro.sample("x", transition(x))
                numpyro.sample("y", dist.Normal(x[::2], 0.5).to_event(1), obs=y_t)
                return x, None

            scan(step, x0, y)

        return model

    y = np.asarray(np.random.default_rng(1).normal(size=(3, 2)), np.float32)
    found = {}
    for name, transition in {
        "ours": lambda x: ndda.OnePassTransition(prior, x, iterations=1),
        "exact": lambda x: dist.MultivariateNormal(jnp.asarray(A, jnp.float32) @ x, jnp.asarray(Q, jnp.float32)),
    }.items():
        run = ndda.Filter(
            ndda.FAAPF(program(transition), weight=ndda.Moment(), target_ess=0.0),
            num_particles=1000,
            progress_bar=False,
        )
        run.run(jax.random.key(0), y)
        found[name] = run.to_datatree()
    ours, exact = found["ours"], found["exact"]
    np.testing.assert_allclose(ours["posterior/x"].mean("draw"), exact["posterior/x"].mean("draw"), atol=0.1)
    evidence = [tree["sample_stats/log_evidence_increment"].sum().item() for tree in (ours, exact)]
    assert abs(evidence[0] - evidence[1]) < 0.1
    # The weight and the draw run the forecast once each; guidance and products with V cost none.
    passes = {name: float(ours[f"sample_stats/network_passes_{name}"].mean()) for name in ("jvp", "vjp")}
    assert passes == {"jvp": 0.0, "vjp": 0.0}


def test_what_a_deterministic_prior_refuses():
    with pytest.raises(ValueError, match="give a factor with 4 rows"):
        DeterministicPrior(lambda x: x, layout=D, scale=1.0, noise=FactorNoise(jnp.ones((3, 2))))
    with pytest.raises(ValueError, match="expected the shape"):
        DeterministicPrior(lambda x: x[:2], layout=D, scale=1.0).condition(X)
    with pytest.raises(ValueError, match="negative scale"):
        DeterministicPrior(lambda x: x, layout=D, scale=-1.0)
