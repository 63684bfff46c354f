"""Guidance: the published alternatives where they are exact, levels without guidance, and what is really executed."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from test_gaussian_oracle import Problem

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.denoiser import PriorDenoiser
from numpyro_diffusion_da.likelihood import GeneralLikelihood
from numpyro_diffusion_da.linear_solve import LinearSolver, RowSumSolve, Solution, relative_residual
from numpyro_diffusion_da.site import general_observation

LEVELS = (20.0, 1.0, 0.1)


def denoised_by(guidance, problem, level, z):
    """(D_y(z, level), passes as a tuple), in double precision."""
    prior = problem.prior()
    guided = guidance(PriorDenoiser(prior, prior.condition(problem.x)), problem.likelihood())
    value, memory = jax.jit(lambda z: guided(z, jnp.asarray(level), guided.init()))(jnp.asarray(z))
    return np.asarray(value), tuple(int(n) for n in memory.passes), float(memory.solver_residual)


def correction(guidance, problem, level, z):
    """D_y - D."""
    return denoised_by(guidance, problem, level, z)[0] - denoised_by(ndda.Unguided(), problem, level, z)[0]


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
@pytest.mark.parametrize(("guidance", "vjp"), [(ndda.PiGDM, 1), (ndda.JFPS, 0)])
def test_constant_variance_is_exact_where_the_variance_is_constant(guidance, vjp, correlated_noise):
    problem = isotropic(2, correlated_noise)
    z = np.random.default_rng(0).normal(size=len(problem.x))
    with jax.enable_x64(True):
        sigma_data = 0.7 / float(problem.prior().latent_scale)
        for level in LEVELS:
            chosen = guidance(sigma_data, ndda.DirectSolve())
            value, passes, _ = denoised_by(chosen, problem, level, level * z)
            assert passes == (1, 0, vjp)
            np.testing.assert_allclose(value, exact(problem, level, level * z), atol=1e-9)
            wrong = denoised_by(guidance(3.0 * sigma_data, ndda.DirectSolve()), problem, level, level * z)[0]
            assert level < 0.2 or np.abs(wrong - value).max() > 1e-2  # sigma_data matters, but for low noise


def test_sigma_data_of_each_component():
    """A diagonal Q that is not a multiple of the identity: exact with an array, not with a number."""
    problem = Problem.random(1, False)
    variances = np.linspace(0.2, 3.0, len(problem.x))
    problem = dataclasses.replace(problem, q=np.diag(variances))
    z = np.random.default_rng(0).normal(size=len(problem.x))
    with jax.enable_x64(True):
        sigma_data = np.sqrt(variances) / float(problem.prior().latent_scale)
        for guidance in (ndda.PiGDM, ndda.JFPS):
            given = guidance(sigma_data, ndda.DirectSolve())
            np.testing.assert_allclose(denoised_by(given, problem, 1.0, z)[0], exact(problem, 1.0, z), atol=1e-9)
            one = guidance(solver=ndda.DirectSolve())
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
            value, passes, residual = denoised_by(ndda.TMPD(), problem, level, level * z)
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
        for inflation in (1e3, 1e5):
            weak = dataclasses.replace(problem, r=inflation * problem.r)
            z = np.asarray(z)
            true = exact(weak, 1.0, z) - denoised_by(ndda.Unguided(), weak, 1.0, z)[0]
            assert denoised_by(ndda.DPS(), weak, 1.0, z)[1] == (1, 0, 1)
            error = correction(ndda.DPS(), weak, 1.0, z) - true
            relative.append(np.linalg.norm(error) / np.linalg.norm(true))
    assert relative[0] < 0.1
    np.testing.assert_allclose(relative[0] / relative[1], 100.0, rtol=0.1)


def test_dps_step_size():
    """zeta replaces the length of the residual, and nothing else."""
    problem = Problem.random(1, False)
    z = np.random.default_rng(0).normal(size=len(problem.x))
    with jax.enable_x64(True):
        plain, scaled = (correction(ndda.DPS(zeta), problem, 1.0, z) for zeta in (None, 0.3))
        prior = problem.prior()
        x = problem.mean + float(prior.latent_scale) * denoised_by(ndda.Unguided(), problem, 1.0, z)[0]
        residual = np.linalg.norm(problem.likelihood().residual(jnp.asarray(x)))
    np.testing.assert_allclose(scaled, plain * 0.3 / residual, rtol=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match="zeta=0"):
        ndda.DPS(0.0)
    with pytest.raises(ValueError, match="JFPS got sigma_data"):
        ndda.JFPS(np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="one level fewer"):
        ndda.Piecewise((ndda.MMPS(),), (1.0,))
    with pytest.raises(ValueError, match="highest first"):
        ndda.Piecewise((ndda.MMPS(), ndda.MMPS(), ndda.MMPS()), (1.0, 2.0))
    problem = Problem.random(0, False)
    step = ndda.DiffusionTransition(
        problem.prior(), problem.x, sampler=ndda.Sampler(ndda.SDEDPMSolverPP2M())
    ).only_step()
    for guidance in (ndda.JFPS(), ndda.Piecewise((ndda.MMPS(), ndda.DPS()), (1.0,)), ndda.TMPD()):
        with pytest.raises(TypeError, match="path weights need"):
            step.weighted_draw(jax.random.key(0), problem.likelihood(), guidance)


# --- a likelihood that is not Gaussian --------------------------------------------------------------------------------

COUNTS = np.array([3.0, 0.0, 8.0])


def counts():
    """Poisson counts of the first three components, whose logarithms are the rates."""
    return GeneralLikelihood(lambda x: [general_observation("y", dist.Poisson(jnp.exp(x[:3])), jnp.asarray(COUNTS))])


def of_counts(guidance, level, z, q=None):
    prior = ndda.GaussianPrior(np.zeros((4, 4)), np.eye(4) if q is None else q)
    guided = guidance(PriorDenoiser(prior, prior.condition(jnp.zeros(4))), counts())
    value, memory = jax.jit(lambda z: guided(z, jnp.asarray(level), guided.init()))(jnp.asarray(z))
    return np.asarray(value), tuple(int(n) for n in memory.passes)


def test_counts():
    """Independent components: all but DPS are exact, and agree with quadrature of the posterior; DPS is the gradient."""
    z, level = np.array([0.3, -0.5, 1.0, 0.2]), 0.8
    shrink, variance = 1 / (1 + level**2), level**2 / (1 + level**2)
    grid = np.linspace(-8.0, 8.0, 20_001)
    log_density = -0.5 * (grid - shrink * z[:3, None]) ** 2 / variance + COUNTS[:, None] * grid - np.exp(grid)
    weights = np.exp(log_density - log_density.max(1, keepdims=True))
    posterior = (weights @ grid) / weights.sum(1)
    with jax.enable_x64(True):
        for guidance, passes in (
            (ndda.MMPS(ndda.DirectSolve()), (1, 0, 6)),
            (ndda.TMPD(), (1, 0, 3)),
            (ndda.PiGDM(solver=ndda.DirectSolve()), (1, 0, 1)),
            (ndda.JFPS(solver=ndda.DirectSolve()), (1, 0, 0)),
        ):
            value, counted = of_counts(guidance, level, z)
            assert counted == passes
            np.testing.assert_allclose(value[:3], posterior, atol=2e-4)
            np.testing.assert_allclose(value[3], shrink * z[3], atol=1e-9)
        value, counted = of_counts(ndda.DPS(), level, z)
        with pytest.raises(ValueError, match="Gaussian observations"):
            of_counts(ndda.DPS(1.0), level, z)
    gradient = COUNTS - np.exp(shrink * z[:3])
    np.testing.assert_allclose(value[:3], shrink * z[:3] + level**2 * shrink * gradient, atol=1e-9)
    assert counted == (1, 0, 1)


# --- levels without guidance ------------------------------------------------------------------------------------------


class Counter:
    """How often a network was really evaluated and pulled back."""

    def __init__(self):
        self.forward = self.vjp = 0

    def network(self):
        """z / (1 + s^2), counted where it is executed; under vmap, once for each member."""

        def tick(name):
            jax.debug.callback(lambda: setattr(self, name, getattr(self, name) + 1))

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
    return ndda.GaussianLikelihood(
        lambda x: [
            ndda.GaussianObservation(x[:2], jnp.full(2, error), jnp.array([0.5, -1.0]), jnp.ones(2, bool)),
        ]
    )


@pytest.mark.parametrize("members", [1, 3])
def test_skipped_passes_are_not_executed(members):
    """Callbacks in the network say what ran: as counted, also under vmap over draws."""
    counter = Counter()
    prior = ndda.DenoiserPrior(counter.network(), layout=4)
    guidance = ndda.Piecewise((ndda.Unguided(), ndda.MMPS(), ndda.JFPS()), (10.0, 0.1))
    sampler = ndda.Sampler(schedule=ndda.KarrasSchedule(6))
    levels = sampler.schedule.levels(prior.noise_range)
    step = ndda.DiffusionTransition(prior, jnp.zeros(4), sampler=sampler).only_step()
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


def test_one_guidance_at_all_levels_is_itself():
    problem = Problem.random(0, False)
    z = np.random.default_rng(0).normal(size=len(problem.x))
    for guidance in (ndda.Piecewise((ndda.MMPS(),), ()), ndda.Piecewise((ndda.MMPS(), ndda.MMPS()), (1.0,))):
        step = ndda.DiffusionTransition(problem.prior(), problem.x).only_step()
        draws = [
            jax.jit(lambda key, g=g: step.conditional_draw(key, problem.likelihood(), g))(jax.random.key(0))
            for g in (guidance, ndda.MMPS())
        ]
        np.testing.assert_allclose(draws[0][0], draws[1][0], rtol=1e-5, atol=1e-5)  # the warm start goes on
        assert int(draws[0][1].passes.total()) == int(draws[1][1].passes.total())
    prior = problem.prior()
    parts = ndda.Piecewise((ndda.Unguided(), ndda.MMPS()), (1.0,))
    guided = parts(PriorDenoiser(prior, prior.condition(problem.x)), problem.likelihood())
    for level, same in ((1.01, ndda.Unguided()), (1.0, ndda.MMPS())):
        value, memory = guided(jnp.asarray(z, jnp.float32), jnp.asarray(level), guided.init())
        expected, passes, _ = denoised_by(same, problem, level, np.float32(z))
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
        assert tuple(int(n) for n in memory.passes) == passes


def test_path_weights_with_unguided_levels_are_unbiased():
    """Levels without guidance, with one and with two directions: the mean weight is p(y) of the discretised emulator."""
    problem = dataclasses.replace(Problem.random(1, False), r=0.5 * np.eye(len(Problem.random(1, False).y)))
    sampler = ndda.Sampler(ndda.SDEDPMSolverPP2M(), ndda.KarrasSchedule(24, 20.0))
    step = ndda.DiffusionTransition(problem.prior(), problem.x, sampler=sampler).only_step()
    pieces = (ndda.Unguided(), ndda.MMPS(ndda.DirectSolve()), ndda.MMPS(ndda.KrylovSolve(1)))
    guidance, likelihood = ndda.Piecewise(pieces, (10.0, 0.1)), problem.likelihood()
    keys = jax.random.split(jax.random.key(0), 4000)
    x, log_weight, record = jax.jit(jax.vmap(lambda key: step.weighted_draw(key, likelihood, guidance)))(keys)
    weight = np.exp(np.asarray(log_weight, np.float64) - problem.log_predictive())
    levels = sampler.schedule.levels(problem.prior().noise_range)[:-1]
    m = len(problem.y)
    expected = m * np.sum((levels <= 10.0) & (levels > 0.1)) + np.sum(levels <= 0.1)
    assert np.all(np.asarray(record.passes.vjp) == expected)
    assert abs(weight.mean() - 1.0) < 5 * weight.std() / np.sqrt(len(weight)) + 0.02  # 0.02: of the discretisation
    assert weight.std() < 2.0


def test_filter_takes_them(small):
    """As `FAAPF(guidance=...)`: another guidance, another number of passes."""
    _, y = small.simulate(0, 2)
    for guidance, passes in (
        (ndda.JFPS(), 16),
        (ndda.PiGDM(), 32),
        (ndda.Piecewise((ndda.Unguided(), ndda.MMPS()), (1.0,)), 16 + 2 * 7),
    ):
        program = small.diffusion_program()
        filtered = ndda.ParticleFilter(
            ndda.FAAPF(program, guidance=guidance, weight=ndda.Dirac()), num_particles=8, progress_bar=False
        )
        filtered.run(jax.random.key(0), jnp.asarray(y))
        spent = sum(
            np.asarray(filtered.result.sample_stats[name]).max()
            for name in ("passes_forward", "passes_vjp")
            if name in filtered.result.sample_stats
        )
        assert spent == passes + 1
