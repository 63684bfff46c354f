"""Draws of the default recipe: no trend with the distance of an observation, right variances, counted passes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_guidance import Counter

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import PriorDenoiser
from numpyro_diffusion_da.observation import GaussianLikelihood, GaussianObservation
from numpyro_diffusion_da.transition import DiffusionDynamics

STATED = 0.025  # the bound that a result states for the default sampler


class GivenNoise(ndda.diffusion.Noise):
    """Noise whose draw is given, so that a draw of a sampler is a function of it."""

    draw: jax.Array
    noise: ndda.diffusion.Noise

    def sample(self, rng_key, shape, dtype=float):
        return self.draw

    def covariance_product(self, v):
        return self.noise.covariance_product(v)


def observing(h, errors, y):
    h, errors, y = jnp.asarray(h), jnp.asarray(errors), jnp.asarray(y)
    return GaussianLikelihood(lambda x: [GaussianObservation(h @ x, errors, y, jnp.ones(len(y), bool))])


def law_of_draws(prior, likelihood, sampler, guidance, paths):
    """Mean and covariance of draws, and passes: the linear part from a fit to the noise, which leaves no error of it.

    What is not linear (a solve that stops at another product) enters by its mean square.
    """
    conditioning = prior.condition(jnp.zeros(prior.layout.shape))
    base = PriorDenoiser(prior, conditioning)
    denoiser = base if guidance is None else guidance(base, likelihood)

    def draw(white):
        noise = GivenNoise(prior.from_modes @ white, prior.noise)
        z, state = sampler.draw(jax.random.key(0), denoiser, noise, prior.noise_range, prior.layout.shape)
        return prior.location(conditioning) + prior.scale(conditioning) * z, state.passes.total()

    rank = prior.from_modes.shape[1]
    white = np.random.default_rng(0).normal(size=(paths, rank))
    x, passes = jax.jit(jax.vmap(draw))(jnp.asarray(white))
    design = np.concatenate([np.ones((paths, 1)), white], 1)
    fit = np.linalg.lstsq(design, np.asarray(x), rcond=None)[0]
    rest = np.asarray(x) - design @ fit
    return fit[0], fit[1:].T @ fit[1:] + rest.T @ rest / paths, np.asarray(passes)


def posterior(q, h, errors, y):
    gain = q @ h.T @ np.linalg.inv(h @ q @ h.T + np.diag(errors**2))
    return gain @ y, q - gain @ h @ q


STEPS = [
    ndda.diffusion.UniPC(),
    ndda.DPMSolverPP2M(),
    ndda.diffusion.AdamsBashforth(3),
    ndda.diffusion.Heun(),
    ndda.diffusion.DDIM(),
]


@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_the_mean_has_no_trend_with_the_distance_of_the_observation(step):
    """N(0, 1) observed with error 0.5: from T e alone, y = 80 is missed by 0.84 posterior standard deviations."""
    prior, sd = ndda.GaussianPrior(np.eye(1), np.eye(1)), np.sqrt(0.2)
    denoisers = PriorDenoiser(prior, prior.condition(jnp.zeros(1)))

    @jax.jit
    def center(y):
        denoiser = ndda.MMPS()(denoisers, observing(np.eye(1), np.array([0.5]), y))
        noise = GivenNoise(jnp.zeros(1), prior.noise)
        z, _ = ndda.Sampler(step).draw(jax.random.key(0), denoiser, noise, prior.noise_range, (1,))
        return prior.latent_scale * z[0]

    with jax.enable_x64(True):
        for y in (5.0, -20.0, 80.0, 1000.0):
            assert abs(float(center(jnp.asarray([y]))) - 0.8 * y) < 1e-3 * sd


def test_an_unguided_draw_has_the_mean_of_its_prior():
    """A latent of mean 40: from T e alone, the draw is off by -40 / 80 standard deviations."""

    def denoise(z, level, conditioning):
        return (z + 40.0 * level**2) / (1.0 + level**2)

    prior = ndda.DenoiserPrior(
        lambda z, level, conditioning: denoise(z, level, conditioning), layout=1, noise_range=(0.02, 80.0)
    )
    base = PriorDenoiser(prior, prior.condition(jnp.zeros(1)))
    noise = GivenNoise(jnp.zeros(1), prior.noise)
    z, _ = ndda.Sampler().draw(jax.random.key(0), base, noise, prior.noise_range, (1,))
    assert abs(float(z[0]) - 40.0) < 0.01


def random_priors():
    """Priors with eigenvalues over three decades: (Q, C or None, H, errors)."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(6, 4))
        axes = np.linalg.qr(root)[0] @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
        noise = [root @ root.T / 4, axes @ axes.T, None, None][seed]
        if noise is None:
            axes = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        q = axes * np.geomspace(1.0, 1e-3, axes.shape[1]) @ axes.T
        errors = np.array([0.1, 0.3, 0.5]) if seed % 2 else np.array([0.05, 0.5, 2.0])
        yield pytest.param(q, noise, rng.normal(size=(3, 6)), errors, id=f"rank {axes.shape[1]}, seed {seed}")


@pytest.mark.parametrize(("q", "c", "h", "errors"), list(random_priors()))
def test_every_variance_of_the_default_is_within_three_percent(q, c, h, errors):
    """In every direction, the largest and the smallest generalized eigenvalue included."""
    y = np.array([1.0, -2.0, 0.5])
    mean, covariance = posterior(q, h, errors, y)
    values, vectors = np.linalg.eigh(covariance)
    white = vectors[:, values > 1e-9] / np.sqrt(values[values > 1e-9])
    with jax.enable_x64(True):
        prior = ndda.GaussianPrior(np.zeros((6, 6)), q, noise_covariance=c)
        found, drawn, passes = law_of_draws(prior, observing(h, errors, y), ndda.Sampler(), ndda.MMPS(), paths=200)
    ratios = np.linalg.eigvalsh(white.T @ drawn @ white)
    assert np.all(np.abs(ratios - 1.0) < 0.03), ratios
    assert np.all(np.abs(white.T @ (found - mean)) < 0.01)
    levels = ndda.Sampler().evaluations(prior.noise_range)
    assert np.all((passes > levels) & (passes <= 4 * levels))


def test_the_stated_error_is_that_of_unguided_draws():
    """`variance_error` bounds the error of a prior's own modes; the earlier default says what it leaves."""
    noise_range = (0.02, 80.0)
    assert ndda.Sampler().variance_error((0.05, 5.1))[0] < STATED
    error, smallest, largest = ndda.Sampler().variance_error(noise_range)
    assert error < STATED
    assert (smallest, largest) == pytest.approx((0.04, 80.0 / 15.0))
    assert ndda.Sampler.cheap().variance_error(noise_range)[0] > 0.08
    assert ndda.Sampler(ndda.SDEDPMSolverPP2M()).variance_error(noise_range) is None
    q = np.diag([1.9, 0.09, 0.01])
    with jax.enable_x64(True):
        prior = ndda.GaussianPrior(np.zeros((3, 3)), q, noise_range=noise_range)
        _, drawn, _ = law_of_draws(prior, None, ndda.Sampler.cheap(), None, paths=5)
        ratios = ndda.Sampler.cheap().variance_ratio(noise_range, np.diag(q) / float(prior.latent_scale) ** 2)
    np.testing.assert_allclose(np.diag(drawn) / np.diag(q), ratios, rtol=1e-4)


def test_products_are_as_many_as_needed_counted_and_independent_of_the_batch():
    """Callbacks in the network say what one draw ran; in a batch, a draw stays what it is alone."""
    counter = Counter()
    prior = ndda.DenoiserPrior(counter.network(), layout=4, noise_range=(0.02, 80.0))
    step = DiffusionDynamics(prior, prior.condition(jnp.zeros(4)), ndda.Sampler())
    likelihood = observing(np.eye(4)[:3], np.array([0.5, 0.2, 0.1]), np.array([0.3, 5.0, -1.0]))
    draw = jax.jit(lambda key: step.conditional_draw(key, likelihood, ndda.MMPS()))
    keys = jax.random.split(jax.random.key(1), 3)
    alone = [draw(key) for key in keys]
    jax.effects_barrier()
    assert counter.forward == sum(int(record.passes.forward) for _, record in alone)
    assert counter.vjp == sum(int(record.passes.vjp) for _, record in alone)
    assert 0 < counter.vjp < 3 * 16 * 3
    together, record = jax.jit(jax.vmap(lambda key: step.conditional_draw(key, likelihood, ndda.MMPS())))(keys)
    np.testing.assert_allclose(together, jnp.stack([x for x, _ in alone]), rtol=1e-5, atol=1e-6)
    assert np.asarray(record.passes.vjp).tolist() == [int(record.passes.vjp) for _, record in alone]
