"""Guidance: the published alternatives where they are exact, levels without guidance, and what is really executed."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import BENCHMARKS, load_program
from test_gaussian_oracle import Problem
from test_path_weights import MEAN, assert_unbiased, draw, law, step_of

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import PriorDenoiser, RowSumSolve
from numpyro_diffusion_da.observation import GeneralLikelihood
from numpyro_diffusion_da.program import general_observation

LEVELS = (20.0, 1.0, 0.1)


@eqx.filter_jit
def _denoised(guidance, prior, h, factor, y, x, level, z):
    like = ndda.observation.GaussianLikelihood(
        lambda x: [ndda.observation.GaussianObservation(h @ x, factor, y, jnp.ones(len(y), bool))]
    )
    guided = guidance(PriorDenoiser(prior, prior.condition(x)), like)
    return guided(z, level, guided.init())


def denoised_by(guidance, problem, level, z):
    """(D_y(z, level), passes as a tuple, solver residual)."""
    given = (problem.h, np.linalg.cholesky(problem.r), problem.y, problem.x, level, z)
    value, memory = _denoised(guidance, problem.prior(), *(jnp.asarray(v) for v in given))
    return np.asarray(value), tuple(int(n) for n in memory.passes[:3]), float(memory.solver_residual)


def correction(guidance, problem, level, z):
    """D_y - D."""
    return denoised_by(guidance, problem, level, z)[0] - denoised_by(ndda.diffusion.Unguided(), problem, level, z)[0]


def exact(problem, level, z):
    """E[z | z_s, y] by conditioning the joint Gaussian of (z, z_s, y), with no use of a denoiser."""
    q, scale = problem.q, float(problem.prior().latent_scale)
    c = np.eye(len(q)) if problem.c is None else problem.c
    seen = np.concatenate([np.eye(len(q)) / scale, problem.h])
    noise = np.zeros((len(seen), len(seen)))
    noise[: len(q), : len(q)] = level**2 * c
    noise[len(q) :, len(q) :] = problem.r
    given = np.concatenate([z, problem.y - problem.h @ problem.mean])
    return q @ seen.T @ np.linalg.pinv(seen @ q @ seen.T + noise, rcond=1e-13, hermitian=True) @ given / scale


def isotropic(seed, correlated_noise):
    """Q = sigma^2 C."""
    problem = Problem.random(seed, False)
    c = problem.q if correlated_noise else np.eye(len(problem.x))
    return dataclasses.replace(problem, q=0.49 * c, c=c if correlated_noise else None)


@pytest.mark.parametrize("correlated_noise", [False, True])
@pytest.mark.parametrize(("guidance", "vjp"), [(ndda.diffusion.PiGDM, 1), (ndda.diffusion.JFPS, 0)])
def test_constant_variance_is_exact_where_the_variance_is_constant(guidance, vjp, correlated_noise):
    problem = isotropic(2, correlated_noise)
    z = np.random.default_rng(0).normal(size=len(problem.x))
    with jax.enable_x64(True):
        sigma_data = 0.7 / float(problem.prior().latent_scale)
        for level in LEVELS:
            chosen = guidance(sigma_data, ndda.diffusion.DirectSolve())
            value, passes, _ = denoised_by(chosen, problem, level, level * z)
            assert passes == (1, 0, vjp)
            np.testing.assert_allclose(value, exact(problem, level, level * z), atol=1e-9)
            wrong = denoised_by(guidance(3.0 * sigma_data, ndda.diffusion.DirectSolve()), problem, level, level * z)[0]
            assert level < 0.2 or np.abs(wrong - value).max() > 1e-2  # sigma_data matters, but for low noise


def test_sigma_data_of_each_component():
    """A diagonal Q that is not a multiple of the identity: exact with an array, not with a number."""
    problem = Problem.random(1, False)
    variances = np.linspace(0.2, 3.0, len(problem.x))
    problem = dataclasses.replace(problem, q=np.diag(variances))
    z = np.random.default_rng(0).normal(size=len(problem.x))
    with jax.enable_x64(True):
        sigma_data = np.sqrt(variances) / float(problem.prior().latent_scale)
        for guidance in (ndda.diffusion.PiGDM, ndda.diffusion.JFPS):
            given = guidance(sigma_data, ndda.diffusion.DirectSolve())
            np.testing.assert_allclose(denoised_by(given, problem, 1.0, z)[0], exact(problem, 1.0, z), atol=1e-9)
            one = guidance(solver=ndda.diffusion.DirectSolve())
            assert np.abs(denoised_by(one, problem, 1.0, z)[0] - exact(problem, 1.0, z)).max() > 1e-2


def test_tmpd_is_exact_for_a_diagonal_system():
    """Independent components, each seen by one observation at most."""
    problem = Problem.random(3, False)
    d = len(problem.x)
    h = np.eye(d)[::2] * np.linspace(-1.0, 2.0, len(np.eye(d)[::2]))[:, None]
    errors = np.linspace(0.1, 0.5, len(h))
    y = h @ problem.mean + 0.3
    problem = dataclasses.replace(problem, q=np.diag(np.linspace(0.2, 3.0, d)), h=h, r=np.diag(errors**2), y=y)
    z = np.random.default_rng(0).normal(size=d)
    with jax.enable_x64(True):
        for level in LEVELS:
            value, passes, residual = denoised_by(ndda.diffusion.TMPD(), problem, level, level * z)
            assert passes == (1, 0, 2)
            assert residual < 1e-12
            np.testing.assert_allclose(value, exact(problem, level, level * z), atol=1e-9)


def test_tmpd_divides_by_row_sums():
    """And not where the components are correlated: the answer is that of the diagonal matrix of row sums."""
    rng = np.random.default_rng(0)
    b = rng.normal(size=(5, 5))
    b = b @ b.T / 5
    rhs = rng.normal(size=5)
    with jax.enable_x64(True):
        system = jnp.asarray(np.eye(5) + b)
        solution, _ = RowSumSolve()(lambda v: (system @ v, 2.0 * v), jnp.asarray(rhs), ())
        sums = RowSumSolve().diagonal(lambda v: jnp.asarray(b) @ v, 5, jnp.float64)
    expected = rhs / np.maximum(1.0 + b.sum(1), 1.0)
    np.testing.assert_allclose(solution.answer, expected, rtol=1e-12)
    np.testing.assert_allclose(solution.image, 2 * expected, rtol=1e-12)
    np.testing.assert_allclose(sums, np.maximum(b.sum(1), 0.0), rtol=1e-12)
    residual = np.linalg.norm(rhs - (np.eye(5) + b) @ expected) / np.linalg.norm(rhs)
    np.testing.assert_allclose(solution.residual, residual, rtol=1e-12)


@pytest.mark.parametrize("singular", [False, True])
def test_dps_is_the_limit_of_inaccurate_observations(singular):
    """Its relative error falls as the spread over the error's variance: by 100 for an error 10 times as large."""
    problem = Problem.random(1, singular)
    z = np.random.default_rng(0).normal(size=len(problem.x))
    if singular:
        z = problem.prior().noise.factor @ z[: problem.prior().noise.factor.shape[1]]
    relative = []
    with jax.enable_x64(True):
        for tempering in (1e3, 1e5):
            weak = dataclasses.replace(problem, r=tempering * problem.r)
            z = np.asarray(z)
            true = exact(weak, 1.0, z) - denoised_by(ndda.diffusion.Unguided(), weak, 1.0, z)[0]
            assert denoised_by(ndda.diffusion.DPS(), weak, 1.0, z)[1] == (1, 0, 1)
            error = correction(ndda.diffusion.DPS(), weak, 1.0, z) - true
            relative.append(np.linalg.norm(error) / np.linalg.norm(true))
    assert relative[0] < 0.1
    np.testing.assert_allclose(relative[0] / relative[1], 100.0, rtol=0.1)


def test_dps_step_size():
    """zeta replaces the length of the residual, and nothing else."""
    problem = Problem.random(1, False)
    z = np.random.default_rng(0).normal(size=len(problem.x))
    with jax.enable_x64(True):
        plain, scaled = (correction(ndda.diffusion.DPS(zeta), problem, 1.0, z) for zeta in (None, 0.3))
        prior = problem.prior()
        x = problem.mean + float(prior.latent_scale) * denoised_by(ndda.diffusion.Unguided(), problem, 1.0, z)[0]
        residual = np.linalg.norm(problem.likelihood().residual(jnp.asarray(x)))
    np.testing.assert_allclose(scaled, plain * 0.3 / residual, rtol=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match="zeta=0"):
        ndda.diffusion.DPS(0.0)
    with pytest.raises(ValueError, match="JFPS got sigma_data"):
        ndda.diffusion.JFPS(np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="one level fewer"):
        ndda.diffusion.Piecewise((ndda.MMPS(),), (1.0,))
    with pytest.raises(ValueError, match="highest first"):
        ndda.diffusion.Piecewise((ndda.MMPS(), ndda.MMPS(), ndda.MMPS()), (1.0, 2.0))
    problem = Problem.random(0, False)
    step = ndda.DiffusionTransition(
        problem.prior(), problem.x, sampler=ndda.Sampler(ndda.SDEDPMSolverPP2M())
    ).dynamics()
    for guidance in (
        ndda.diffusion.JFPS(),
        ndda.diffusion.Piecewise((ndda.MMPS(), ndda.diffusion.DPS()), (1.0,)),
        ndda.diffusion.TMPD(),
    ):
        with pytest.raises(TypeError, match="path weights need"):
            step.weighted_draw(jax.random.key(0), problem.likelihood(), guidance)


# --- a likelihood that is not Gaussian --------------------------------------------------------------------------------

COUNTS = np.array([3.0, 0.0, 8.0])


def counts():
    """Poisson counts of the first three components, whose logarithms are the rates."""
    return GeneralLikelihood(lambda x: [general_observation("y", dist.Poisson(jnp.exp(x[:3])), jnp.asarray(COUNTS))])


def of_counts(guidance, level, z):
    prior = ndda.GaussianPrior(np.zeros((4, 4)), np.eye(4))
    guided = guidance(PriorDenoiser(prior, prior.condition(jnp.zeros(4))), counts())
    value, memory = jax.jit(lambda z: guided(z, jnp.asarray(level), guided.init()))(jnp.asarray(z))
    return np.asarray(value), tuple(int(n) for n in memory.passes[:3])


Z, LEVEL = np.array([0.3, -0.5, 1.0, 0.2]), 0.8
SHRINK = 1 / (1 + LEVEL**2)


@pytest.mark.parametrize(
    ("guidance", "passes"),
    [
        pytest.param(ndda.MMPS(ndda.diffusion.DirectSolve()), (1, 0, 6), id="MMPS", marks=pytest.mark.slow),
        pytest.param(ndda.diffusion.TMPD(), (1, 0, 3), id="TMPD"),
        pytest.param(
            ndda.diffusion.PiGDM(solver=ndda.diffusion.DirectSolve()), (1, 0, 1), id="PiGDM", marks=pytest.mark.slow
        ),
        pytest.param(ndda.diffusion.JFPS(solver=ndda.diffusion.DirectSolve()), (1, 0, 0), id="JFPS"),
    ],
)
def test_counts(guidance, passes):
    """Independent components: exact, by quadrature of the posterior."""
    grid, variance = np.linspace(-8.0, 8.0, 20_001), LEVEL**2 * SHRINK
    log_density = -0.5 * (grid - SHRINK * Z[:3, None]) ** 2 / variance + COUNTS[:, None] * grid - np.exp(grid)
    weights = np.exp(log_density - log_density.max(1, keepdims=True))
    with jax.enable_x64(True):
        value, counted = of_counts(guidance, LEVEL, Z)
    assert counted == passes
    np.testing.assert_allclose(value[:3], (weights @ grid) / weights.sum(1), atol=2e-4)
    np.testing.assert_allclose(value[3], SHRINK * Z[3], atol=1e-9)


def test_dps_of_counts_takes_the_gradient():
    with jax.enable_x64(True):
        value, counted = of_counts(ndda.diffusion.DPS(), LEVEL, Z)
        with pytest.raises(ValueError, match="Gaussian observations"):
            of_counts(ndda.diffusion.DPS(1.0), LEVEL, Z)
    gradient = np.append(COUNTS - np.exp(SHRINK * Z[:3]), 0.0)
    np.testing.assert_allclose(value, SHRINK * Z + LEVEL**2 * SHRINK * gradient, atol=1e-9)
    assert counted == (1, 0, 1)


# --- levels without guidance ------------------------------------------------------------------------------------------


class Counter:
    """How often a network was really evaluated and pulled back."""

    def __init__(self):
        self.forward = self.vjp = 0

    def network(self):
        """z / (1 + s^2), counted where it is executed; under vmap, once for each member."""

        def tick_forward(z, level):
            jax.debug.callback(lambda _: setattr(self, "forward", self.forward + 1), z[0])
            return z / (1 + level**2)

        @jax.custom_vjp
        def denoise(z, level):
            return tick_forward(z, level)

        def forward(z, level):
            return tick_forward(z, level), level

        def backward(level, cotangent):
            jax.debug.callback(lambda _: setattr(self, "vjp", self.vjp + 1), cotangent[0])
            return cotangent / (1 + level**2), jnp.zeros_like(level)

        denoise.defvjp(forward, backward)
        return lambda z, level, conditioning: denoise(z, level)


def observe_first_two(error):
    return ndda.observation.GaussianLikelihood(
        lambda x: [
            ndda.observation.GaussianObservation(x[:2], jnp.full(2, error), jnp.array([0.5, -1.0]), jnp.ones(2, bool)),
        ]
    )


def test_skipped_passes_are_not_executed():
    """Callbacks in the network say what ran: as counted, under vmap over draws."""
    members, counter = 3, Counter()
    prior = ndda.DenoiserPrior(counter.network(), layout=4, noise_range=(0.02, 80.0))
    guidance = ndda.diffusion.Piecewise(
        (ndda.diffusion.Unguided(), ndda.MMPS.cheap(), ndda.diffusion.JFPS()), (10.0, 0.1)
    )
    sampler = ndda.Sampler(schedule=ndda.KarrasSchedule(6))
    levels = sampler.schedule.levels(prior.noise_range)
    step = ndda.DiffusionTransition(prior, jnp.zeros(4), sampler=sampler).dynamics()
    likelihood = observe_first_two(0.5)

    def draw(key):
        return step.conditional_draw(key, likelihood, guidance)

    _, record = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), members))
    jax.effects_barrier()
    guided = int(np.sum((levels <= 10.0) & (levels > 0.1)))
    assert 0 < guided < 4
    assert np.all(np.asarray(record.passes.forward) == 6)
    assert np.all(np.asarray(record.passes.vjp) == 2 * guided)
    assert (counter.forward, counter.vjp) == (6 * members, 2 * guided * members)


def test_the_level_chooses():
    """A level belongs to the part below it."""
    problem, between = (
        Problem.random(0, False),
        ndda.diffusion.Piecewise((ndda.diffusion.Unguided(), ndda.MMPS()), (1.0,)),
    )
    z = np.random.default_rng(0).normal(size=len(problem.x))
    with jax.enable_x64(True):
        for level, same in ((1.01, ndda.diffusion.Unguided()), (1.0, ndda.MMPS())):
            value, passes, _ = denoised_by(between, problem, level, z)
            expected, those, _ = denoised_by(same, problem, level, z)
            np.testing.assert_allclose(value, expected, rtol=1e-12)
            assert passes == those


@pytest.mark.slow
def test_the_warm_start_goes_on():
    """Two equal parts are one guidance."""
    problem, sampler = Problem.random(0, False), ndda.Sampler(schedule=ndda.KarrasSchedule(6))
    step = ndda.DiffusionTransition(problem.prior(), problem.x, sampler=sampler).dynamics()
    cheap = ndda.MMPS.cheap()
    whole, parts = cheap, ndda.diffusion.Piecewise((cheap, cheap), (1.0,))
    (once, first), (twice, second) = jax.jit(
        lambda key: [step.conditional_draw(key, problem.likelihood(), guidance) for guidance in (whole, parts)]
    )(jax.random.key(0))
    np.testing.assert_allclose(once, twice, rtol=1e-5, atol=1e-5)
    assert int(first.passes.total()) == int(second.passes.total()) == 18


@pytest.mark.slow
def test_path_weights_with_unguided_levels_are_unbiased():
    """Levels without guidance, with two directions and with one: for the law that the sampler has."""
    sampler = ndda.Sampler(ndda.SDEDPMSolverPP2M(), ndda.KarrasSchedule(10, 20.0))
    step = step_of(sampler, "C")
    pieces = (
        ndda.diffusion.Unguided(),
        ndda.MMPS(ndda.diffusion.DirectSolve()),
        ndda.MMPS(ndda.diffusion.KrylovSolve(1)),
    )
    x, log_weights, record = draw(step, ndda.diffusion.Piecewise(pieces, (10.0, 0.1)), 3000)
    assert_unbiased(x, log_weights, MEAN, law(step.prior, sampler))
    levels = sampler.schedule.levels(step.prior.noise_range)[:-1]
    expected = 2 * np.sum((levels <= 10.0) & (levels > 0.1)) + np.sum(levels <= 0.1)
    assert np.all(np.asarray(record.passes.vjp) == expected)
    assert np.std(log_weights) < 3.0


@pytest.mark.slow
def test_filter_takes_them(small):
    """As `FAAPF(guidance=...)`, with an array as its setting: another guidance, another number of passes."""
    _, y = small.simulate(0, 2)
    sampler = ndda.Sampler(schedule=ndda.KarrasSchedule(6))
    levels = sampler.schedule.levels((0.02, 80.0))
    guidance = ndda.diffusion.Piecewise(
        (ndda.diffusion.Unguided(), ndda.MMPS(), ndda.diffusion.JFPS(np.ones(4))), (10.0, 0.1)
    )
    filtered = ndda.Filter(
        ndda.FAAPF(small.diffusion_program(sampler), guidance=guidance, weight=ndda.Dirac()),
        num_particles=8,
        progress_bar=False,
    )
    filtered.run(jax.random.key(0), jnp.asarray(y))
    guided = int(np.sum((levels <= 10.0) & (levels > 0.1)))
    passes = filtered.result.network_passes
    np.testing.assert_allclose(passes["forward"], 6 + 1 + 1)  # the levels, the weight, the background
    np.testing.assert_allclose(passes["vjp"], 2 * guided + 1)


# --- the safeguard of the solve ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def safeguard():
    """The benchmark as a module."""
    return load_program(BENCHMARKS / "safeguard.py")


@pytest.mark.slow
def test_safeguard_bounds_a_network_with_random_weights(safeguard):
    """Plain conjugate gradients send draws far away; guarded ones fit the data, as far as such a network has any."""
    case = safeguard.Case(safeguard.random_network(1.0), jnp.zeros(safeguard.SITES), 0.1)
    of_system = case.systems()
    assert of_system["asymmetry"] > 0.5
    assert of_system["smallest eigenvalue"] < -100.0
    unguarded = case.draws(safeguard.ConjugateGradients(3), 8)
    guarded = case.draws(ndda.diffusion.KrylovSolve(3), 8)
    assert not unguarded["farthest"] < 100.0 * guarded["farthest"]
    assert guarded["farthest"] < 10.0
    assert guarded["misfit"] < 2.0
    assert guarded["solver residual"] > 0.9  # what the network's Jacobian does not allow shows


@pytest.mark.slow
def test_shipped_emulator_needs_no_safeguard(safeguard):
    """Its Jacobian is symmetric by its form, and positive: plain conjugate gradients give the same draws."""
    emulator = ndda.load_prior("lorenz96")
    case = safeguard.Case(emulator, emulator.climatology().sample(jax.random.key(0)), 0.1)
    of_system = case.systems()
    assert of_system["asymmetry"] < 1e-5
    assert of_system["smallest eigenvalue"] > -1e-3
    unguarded, guarded = (
        case.draws(solver, 8) for solver in (safeguard.ConjugateGradients(4), ndda.diffusion.KrylovSolve(4))
    )
    np.testing.assert_allclose(unguarded["misfit"], guarded["misfit"], rtol=1e-3)
    np.testing.assert_allclose(unguarded["farthest"], guarded["farthest"], rtol=1e-3)
