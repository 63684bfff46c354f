"""Samplers: order of convergence, laws of the stochastic ones, counts, and what is refused."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from monte_carlo import assert_mean

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import PriorDenoiser, UniPC

COVARIANCE = np.array([[1.2, 0.5, 0.1], [0.5, 0.7, -0.2], [0.1, -0.2, 0.4]])
MEAN = np.array([0.5, -1.0, 2.0])


def gaussian(noise_covariance: np.ndarray | None = None) -> ndda.GaussianPrior:
    """N(MEAN, COVARIANCE): a posterior is one too, and its guided denoiser is this one (test_gaussian_oracle)."""
    return ndda.GaussianPrior(np.zeros((3, 3)), COVARIANCE, MEAN, noise_covariance)


def run(sampler: ndda.Sampler, prior: ndda.GaussianPrior, z: jax.Array, key: jax.Array):
    """(state, memory) from the starting latent z."""
    conditioning = prior.condition(jnp.zeros(3))
    denoiser = PriorDenoiser(prior, conditioning)
    z, memory = sampler(key, denoiser, prior.noise, prior.noise_range, z)
    return prior.location(conditioning) + prior.scale(conditioning) * z, memory


def flow_error(step: ndda.diffusion.Step, num_levels: int) -> float:
    """Distance of a deterministic sampler's map to the exact flow, over the norm of the exact one."""
    highest = 80.0
    sampler = ndda.Sampler(step, ndda.KarrasSchedule(num_levels, 7.0, 1e-4, highest))
    with jax.enable_x64(True):
        prior = gaussian()
        x = jax.jit(jax.vmap(lambda z: run(sampler, prior, z, jax.random.key(0))[0]))(highest * jnp.eye(3))
        scale = float(prior.latent_scale)
    columns = (np.asarray(x) - MEAN).T
    # The exact flow takes each principal component from sqrt(p + s_max^2) to sqrt(p).
    values, vectors = np.linalg.eigh(COVARIANCE)
    exact = vectors * np.sqrt(values / (values / scale**2 + highest**2)) * highest @ vectors.T
    return float(np.linalg.norm(columns - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(
    "step",
    [
        ndda.diffusion.DDIM(),
        ndda.DPMSolverPP2M(),
        ndda.diffusion.DPMSolverPP2S(),
        ndda.diffusion.Heun(),
        *[ndda.diffusion.AdamsBashforth(order) for order in (2, 3, 4)],
    ],
    ids=repr,
)
def test_error_falls_at_the_stated_order(step):
    """The last step, to zero noise, leaves an error of order (lowest level)^2: here 1e-8, below what is measured."""
    steps = (100, 200, 400)
    errors = np.array([flow_error(step, n + 1) for n in steps])
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert errors[-1] > 1e-7
    # A fit over four times the steps still sees the next order.
    assert abs(slope - step.order) < 0.1 + 0.05 * step.order
    assert errors[-1] < {1: 1e-2, 2: 3e-4, 3: 3e-5, 4: 3e-6}[step.order]


def test_the_error_of_unipc_falls_at_least_at_its_order():
    """On this problem it falls faster than the order, down to the error of the lowest level."""
    errors = np.array([flow_error(ndda.diffusion.UniPC(), n + 1) for n in (50, 100, 200)])
    assert np.all(errors[:-1] / errors[1:] > 2**3)
    assert np.all(errors < [4e-4, 2e-5, 3e-7])


def test_adams_bashforth_weights_integrate_polynomials():
    """Of degree below the order, exactly, on unequal steps."""
    levels = ndda.KarrasSchedule(8, 7.0, 1e-3, 80.0).levels((1.0, 2.0))
    start, stop = levels[:-1], levels[1:]
    for order in (1, 2, 3, 4):
        weights = ndda.diffusion.AdamsBashforth(order).coefficients(start, stop)["weights"]
        assert weights.shape == (7, order)
        for i in range(7):
            for degree in range(min(order, i + 1)):
                past = start[i - np.arange(min(order, i + 1))] ** degree
                integral = (stop[i] ** (degree + 1) - start[i] ** (degree + 1)) / (degree + 1)
                np.testing.assert_allclose(weights[i, : len(past)] @ past, integral, rtol=1e-9)


def test_first_orders_agree():
    """DDIM with eta = 0, Adams-Bashforth of order 1, and one step of each second-order method from zero history."""
    prior, z = gaussian(), 80.0 * jnp.ones(3)
    schedule = ndda.KarrasSchedule(6)
    ddim, _ = run(ndda.Sampler(ndda.diffusion.DDIM(), schedule), prior, z, jax.random.key(0))
    euler, _ = run(ndda.Sampler(ndda.diffusion.AdamsBashforth(1), schedule), prior, z, jax.random.key(0))
    np.testing.assert_allclose(ddim, euler, rtol=1e-5)
    two = ndda.KarrasSchedule(2)
    for step in (ndda.DPMSolverPP2M(), ndda.diffusion.AdamsBashforth(3)):
        first, _ = run(ndda.Sampler(step, two), prior, z, jax.random.key(0))
        expected, _ = run(ndda.Sampler(ndda.diffusion.DDIM(), two), prior, z, jax.random.key(0))
        np.testing.assert_allclose(first, expected, rtol=1e-5)


STOCHASTIC = {
    "ancestral": ndda.Sampler(ndda.diffusion.DDIM(1.0), ndda.KarrasSchedule(400, 7.0, 2e-3, 80.0)),
    "half": ndda.Sampler(ndda.diffusion.DDIM(0.5), ndda.KarrasSchedule(400, 7.0, 2e-3, 80.0)),
    "churn": ndda.Sampler(
        ndda.diffusion.Heun(),
        ndda.KarrasSchedule(60, 7.0, 2e-3, 80.0),
        churn=ndda.diffusion.Churn(10.0, lowest=0.05, noise_scale=1.0),
    ),
    "langevin": ndda.Sampler(
        ndda.diffusion.AdamsBashforth(2),
        ndda.KarrasSchedule(100, 7.0, 2e-3, 80.0),
        corrector=ndda.diffusion.LangevinCorrector(2, 0.05),
    ),
}


LAWS = [pytest.param(name, True, marks=pytest.mark.slow) for name in STOCHASTIC]


@pytest.mark.parametrize(
    ("name", "singular"),
    [("ancestral", False), *LAWS],
)
def test_stochastic_samplers_leave_the_right_law(name, singular):
    values, vectors = np.linalg.eigh(COVARIANCE)
    covariance = COVARIANCE
    noise_covariance = None
    if singular:
        # No variance along the first eigenvector, in the prior and in the noise.
        projector = np.eye(3) - np.outer(vectors[:, 0], vectors[:, 0])
        covariance = projector @ COVARIANCE @ projector
        noise_covariance = projector @ np.diag([1.0, 2.0, 0.5]) @ projector
    prior = ndda.GaussianPrior(np.zeros((3, 3)), covariance, MEAN, noise_covariance)
    sampler, n = STOCHASTIC[name], 4000

    def draw(key):
        start_key, loop_key = jax.random.split(key)
        start = sampler.initial(start_key, prior.noise, prior.noise_range, (3,))
        return run(sampler, prior, start, loop_key)[0], run(sampler, prior, start, jax.random.key(0))[0]

    x, repeated = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), n))
    x = np.asarray(x, np.float64)
    assert np.abs(x - np.asarray(repeated)).max() > 0.1  # it is stochastic
    if singular:
        assert np.abs((x - MEAN) @ vectors[:, 0]).max() < 1e-4
    # In the principal axes of what has variance: the mean, and the matrix of second moments, which is the identity.
    values, axes = np.linalg.eigh(covariance)
    axes, values = axes[:, values > 1e-9], values[values > 1e-9]
    white = (x - MEAN) @ axes / np.sqrt(values)
    assert_mean(white, 0.0)
    assert_mean(white[:, :, None] * white[:, None, :], np.eye(len(values)))


@pytest.mark.parametrize(
    ("sampler", "count"),
    [
        (ndda.Sampler(), 16),
        (ndda.Sampler(ndda.diffusion.DPMSolverPP2S(), ndda.KarrasSchedule(5)), 9),
        (ndda.Sampler(ndda.diffusion.Heun(), ndda.KarrasSchedule(5), churn=ndda.diffusion.Churn()), 9),
        (
            ndda.Sampler(
                ndda.diffusion.AdamsBashforth(3), ndda.KarrasSchedule(5), corrector=ndda.diffusion.LangevinCorrector(2)
            ),
            13,
        ),
        (ndda.Sampler(ndda.diffusion.DDIM(0.3), ndda.KarrasSchedule(2)), 2),
    ],
    ids=["default", "2S", "Heun with churn", "published", "DDIM"],
)
def test_evaluations_are_the_counted_passes(sampler, count):
    prior = gaussian()
    _, memory = jax.jit(lambda key: run(sampler, prior, 80.0 * jnp.ones(3), key))(jax.random.key(0))
    assert sampler.evaluations(prior.noise_range) == count
    assert (int(memory.passes.forward), int(memory.passes.jvp), int(memory.passes.vjp)) == (count, 0, 0)
    assert int(memory.passes.total()) == count


class SeparateUniPC(UniPC):
    evaluates_at_start: ClassVar[bool] = False


class SeparateDDIM(ndda.diffusion.DDIM):
    evaluates_at_start: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("step", "separate"), [(UniPC(), SeparateUniPC()), (ndda.diffusion.DDIM(0.5), SeparateDDIM(0.5))], ids=repr
)
def test_all_levels_share_one_copy_of_the_denoiser(step, separate, monkeypatch):
    """The loop makes the draws of a loop whose first and last evaluations are its own, to rounding, and counts them."""
    prior, made = gaussian(), []
    call = PriorDenoiser.__call__
    monkeypatch.setattr(PriorDenoiser, "__call__", lambda self, *given: made.append(0) or call(self, *given))

    def draws(step):
        made.clear()
        sampler, conditioning = ndda.Sampler(step, ndda.KarrasSchedule(6)), prior.condition(jnp.zeros(3))
        denoiser = PriorDenoiser(prior, conditioning)
        one = jax.vmap(lambda key: sampler.draw(key, denoiser, prior.noise, prior.noise_range, (3,)))
        z, memory = jax.jit(one)(jax.random.split(jax.random.key(4), 5))
        return z, memory.passes.forward, len(made)

    (z, forward, copies), (expected, counted, before) = draws(step), draws(separate)
    np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(forward, counted)
    assert (copies, before) == (1, 3)


def test_deterministic_sampler_ignores_its_key():
    prior, z = gaussian(), 80.0 * jnp.ones(3)
    draw = jax.jit(lambda key: run(ndda.Sampler(), prior, z, key)[0])
    np.testing.assert_array_equal(draw(jax.random.key(0)), draw(jax.random.key(1)))


def test_initial_noise():
    prior = gaussian()
    sampler = ndda.Sampler(schedule=ndda.KarrasSchedule(highest=50.0))
    key = jax.random.key(0)
    start = sampler.initial(key, prior.noise, prior.noise_range, (3,))
    np.testing.assert_allclose(start, 50.0 * prior.noise.sample(key, (3,), jnp.float32), rtol=1e-6)


def test_schedule():
    levels = ndda.KarrasSchedule(5, 7.0).levels((0.01, 80.0))
    assert levels.dtype == np.float64
    np.testing.assert_allclose(levels[[0, -1]], [80.0, 0.01])
    np.testing.assert_allclose(np.diff(levels ** (1 / 7), 2), 0.0, atol=1e-12)
    narrow = ndda.KarrasSchedule(3, lowest=0.5, highest=2.0).levels((0.01, 80.0))
    np.testing.assert_allclose(narrow[[0, -1]], [2.0, 0.5])


def test_churn_raises_levels_inside_its_range():
    levels = np.array([80.0, 10.0, 1.0, 0.5])
    raised = ndda.diffusion.Churn(rate=0.4, lowest=0.75, highest=20.0).raised(levels)
    np.testing.assert_allclose(raised, [80.0, 11.0, 1.1, 0.5])
    # Capped at sqrt(2) - 1, as in EDM.
    np.testing.assert_allclose(ndda.diffusion.Churn(rate=100.0).raised(levels)[0], 80.0 * np.sqrt(2.0))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ndda.diffusion.AdamsBashforth(5), "order=5; give 1, 2, 3 or 4"),
        (lambda: ndda.diffusion.AdamsBashforth(0), "order=0; give 1 or more"),
        (lambda: ndda.diffusion.DDIM(1.5), "eta=1.5; give a number from 0"),
        (lambda: ndda.diffusion.DDIM(-0.1), "eta=-0.1; give a number from 0"),
        (lambda: ndda.KarrasSchedule(1), "num_levels=1; give 2 or more"),
        (lambda: ndda.KarrasSchedule(rho=0.0), "rho=0.0; give a positive number"),
        (lambda: ndda.KarrasSchedule(lowest=90.0).levels((0.02, 80.0)), "from 80.0 down to 90.0: expected 0 < lowest"),
        (lambda: ndda.KarrasSchedule(lowest=-1.0).levels((0.02, 80.0)), "lowest=-1.0; give a positive noise level"),
        (lambda: ndda.diffusion.Churn(rate=-1.0), "rate=-1.0; give a number that is not negative"),
        (lambda: ndda.diffusion.Churn(noise_scale=-1.0), "noise_scale=-1.0; give a number that is not negative"),
        (lambda: ndda.diffusion.LangevinCorrector(0), "steps=0; give 1 or more"),
        (lambda: ndda.diffusion.LangevinCorrector(tau=1.0), "tau=1.0; give a number between 0 and 1"),
        (lambda: ndda.diffusion.LangevinCorrector(tau=0.0), "tau=0.0; give a number between 0 and 1"),
    ],
)
def test_what_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        make()
