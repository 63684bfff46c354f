"""Draws of the default recipe: no trend with the distance of an observation, right variances, counted passes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from test_guidance import Counter

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import PriorDenoiser
from numpyro_diffusion_da.observation import GaussianLikelihood, GaussianObservation
from numpyro_diffusion_da.transition import DiffusionDynamics

BOUND = 0.025  # what a result states for the default sampler


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
    *[
        pytest.param(step, marks=pytest.mark.slow)
        for step in (
            ndda.DPMSolverPP2M(),
            ndda.diffusion.AdamsBashforth(3),
            ndda.diffusion.Heun(),
            ndda.diffusion.DDIM(),
        )
    ],
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
        yield pytest.param(
            q,
            noise,
            rng.normal(size=(3, 6)),
            errors,
            id=f"rank {axes.shape[1]}, seed {seed}",
            marks=[pytest.mark.slow] if seed else [],
        )


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
    error, smallest, largest = ndda.Sampler().variance_error(noise_range)
    assert 0.01 < error < BOUND < 0.03
    assert (smallest, largest) == pytest.approx((0.04, 80.0 / 15.0))
    cheap = ndda.Sampler.cheap()
    assert cheap.variance_error(noise_range)[0] == pytest.approx(0.255, abs=1e-3)
    assert 0.08 < cheap.variance_error(noise_range, (0.1, 5.0))[0] < 0.09
    assert ndda.Sampler(ndda.SDEDPMSolverPP2M()).variance_error(noise_range) is None
    q = np.diag([1.9, 0.09, 0.01])
    prior = ndda.GaussianPrior(np.zeros((3, 3)), q, noise_range=noise_range)
    _, drawn, _ = law_of_draws(prior, None, cheap, None, paths=5)
    ratios = cheap.variance_ratio(noise_range, np.diag(q) / float(prior.latent_scale) ** 2)
    np.testing.assert_allclose(np.diag(drawn) / np.diag(q), ratios, rtol=1e-4)


@pytest.mark.slow
def test_the_stated_bound_holds_for_every_range_of_two_decades():
    errors = [ndda.Sampler().variance_error((1.0, ratio))[0] for ratio in (100.0, 150.0, 300.0, 4000.0, 4e4, 1e6)]
    assert max(errors) < BOUND


def program_of(prior):
    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
            numpyro.sample("y", dist.Normal(x[:1], 1.0).to_event(1), obs=y_t)
            return x, None

        scan(step, jnp.zeros(2), y)

    return model


@pytest.mark.parametrize(
    ("deviation", "noise_range", "stated"),
    [
        # The deviation of the narrow mode relative to the other, range of levels: (lowest, highest error), modes named.
        (0.1, (0.02, 80.0), (BOUND, BOUND, None)),
        (0.01, (0.02, 80.0), (0.40, 0.42, "0.014 to 1.4, resolved 0.04 to 5.3")),
        (0.01, None, (BOUND, BOUND, None)),
        (0.1, (0.02, 10.0), (0.03, 0.1, "0.14 to 1.4, resolved 0.04 to 0.67")),
    ],
)
def test_a_result_says_which_modes_of_a_known_prior_are_not_resolved(deviation, noise_range, stated):
    """The error of modes that are outside the range of the bound is computed, and the modes are named."""
    prior = ndda.GaussianPrior(np.eye(2), np.diag([1.0, deviation**2]), noise_range=noise_range)
    model = program_of(prior)
    program = ndda.program.StateSpaceModel(model, (np.zeros((2, 1), np.float32),))
    found = ndda.Bootstrap(model).settings(program)
    least, most, modes = stated
    assert least <= found["sampler_variance_error"] <= most
    assert found.get("unresolved_modes") == modes


def test_products_are_as_many_as_needed_counted_and_independent_of_the_batch():
    """Callbacks in the network say what ran, alone and in a batch; in a batch, a draw stays what it is alone."""
    counter, sampler = Counter(), ndda.Sampler(schedule=ndda.KarrasSchedule(6))
    network = counter.network()
    # The network depends on the state, because a batch would evaluate a common first level once.
    prior = ndda.DenoiserPrior(lambda z, level, x: network(z + 0.1 * x, level, x), layout=4, noise_range=(0.02, 80.0))
    likelihood = observing(np.eye(4)[:3], np.array([0.5, 0.2, 0.1]), np.array([0.3, 5.0, -1.0]))

    @jax.jit
    def draw(key, x):
        return DiffusionDynamics(prior, prior.condition(x), sampler).conditional_draw(key, likelihood, ndda.MMPS())

    def ran():
        jax.effects_barrier()
        return counter.forward, counter.vjp

    keys, states = jax.random.split(jax.random.key(1), 3), jnp.arange(12.0).reshape(3, 4)
    alone = [draw(key, x) for key, x in zip(keys, states, strict=True)]
    forward, vjp = ran()
    assert (forward, vjp) == tuple(sum(int(getattr(r.passes, n)) for _, r in alone) for n in ("forward", "vjp"))
    assert 0 < vjp < 3 * 6 * 3
    together, record = jax.jit(jax.vmap(draw))(keys, states)
    np.testing.assert_allclose(together, jnp.stack([x for x, _ in alone]), rtol=1e-5, atol=1e-6)
    passes = record.passes
    # The products of a batch are those of the member that needs most at each level, for every member alike.
    assert len(set(np.asarray(passes.vjp).tolist())) == 1
    assert int(passes.vjp[0]) >= max(int(r.passes.vjp) for _, r in alone)
    assert ran() == (forward + int(passes.forward.sum()), vjp + int(passes.vjp.sum()))
