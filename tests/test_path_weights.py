"""Path weights and `GuidedPF`: unbiased for the discretized emulator, whose law is known for a Gaussian prior."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from monte_carlo import assert_mean

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.filters import PATH_SAMPLER
from numpyro_diffusion_da.results import evidence_bias_reasons
from numpyro_diffusion_da.transition import DiffusionDynamics, GaussianDynamics

COVARIANCE = np.array([[1.2, 0.5, 0.1], [0.5, 0.7, -0.2], [0.1, -0.2, 0.4]])
MEAN = np.array([0.5, -1.0, 2.0])
H = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, -1.0]])
Y, ERROR = np.array([1.6, -2.0]), 0.4

# The last direction has no variance, in the prior and in the noise.
_ONTO = np.eye(3) - np.ones((3, 3)) / 3
NOISES = {
    "white": (COVARIANCE, None),
    "C": (COVARIANCE, np.array([[1.0, 0.6, 0.0], [0.6, 2.0, 0.3], [0.0, 0.3, 0.5]])),
    "singular": (_ONTO @ COVARIANCE @ _ONTO, _ONTO @ np.diag([1.0, 2.0, 0.5]) @ _ONTO),
}


def likelihood(y=Y, seen=True) -> ndda.observation.GaussianLikelihood:
    """Two observations of three components."""
    observed = jnp.full(2, seen)
    return ndda.observation.GaussianLikelihood(
        lambda x: [
            ndda.observation.GaussianObservation(jnp.asarray(H) @ x, jnp.full(2, ERROR), jnp.asarray(y), observed)
        ]
    )


def log_evidence(mean: np.ndarray, covariance: np.ndarray) -> float:
    s = H @ covariance @ H.T + ERROR**2 * np.eye(2)
    r = Y - H @ mean
    return float(-0.5 * r @ np.linalg.solve(s, r) - 0.5 * np.linalg.slogdet(2 * np.pi * s)[1])


def step_of(sampler: ndda.Sampler, noise: str = "white") -> DiffusionDynamics:
    covariance, noise_covariance = NOISES[noise]
    prior = ndda.GaussianPrior(np.zeros((3, 3)), covariance, MEAN, noise_covariance)
    return DiffusionDynamics(prior, prior.condition(jnp.zeros(3)), sampler)


def law(prior: ndda.GaussianPrior, sampler: ndda.Sampler) -> np.ndarray:
    """Covariance of unguided draws, by the published recursions, mode by mode.

    z' = q z + (1 - q) (D + extrapolation) + s' (1 - q)^(1/2) e, q = (s'/s)^2, with the difference of the last two D's
    times half the ratio of steps in log s as the extrapolation of the second-order step.
    """
    levels = sampler.schedule.levels(prior.noise_range)
    extrapolate = isinstance(sampler.step, ndda.SDEDPMSolverPP2M)
    factors = []
    for variance in np.asarray(prior.variances, np.float64):
        moments = np.diag([levels[0] ** 2, 0.0])  # of (z, the last D)
        for i in range(len(levels) - 1):
            s, stop = levels[i], levels[i + 1]
            q, j = (stop / s) ** 2, variance / (variance + s**2)
            c = 0.5 * np.log(s / stop) / np.log(levels[i - 1] / s) if extrapolate and i > 0 else 0.0
            move = np.array([[q + (1 - q) * (1 + c) * j, -(1 - q) * c], [j, 0.0]])
            moments = move @ moments @ move.T + np.diag([stop**2 * (1 - q), 0.0])
        factors.append(moments[0, 0] * (variance / (variance + levels[-1] ** 2)) ** 2)
    modes = np.asarray(prior.latent_scale * prior.from_modes, np.float64)
    return (modes * np.array(factors)) @ modes.T


def draw(step, guidance, n, like=None):
    like = likelihood() if like is None else like
    keys = jax.random.split(jax.random.key(0), n)
    return jax.jit(jax.vmap(lambda key: step.weighted_draw(key, like, guidance)))(keys)


def assert_unbiased(x, log_weights, mean, covariance):
    """E w = p(y | c), and E w x = p(y | c) E[x | c, y]."""
    ratio = np.exp(np.asarray(log_weights, np.float64) - log_evidence(mean, covariance))
    s = H @ covariance @ H.T + ERROR**2 * np.eye(2)
    posterior = mean + np.linalg.solve(s, H @ covariance).T @ (Y - H @ mean)
    for estimate, exact in ((ratio[:, None], 1.0), (ratio[:, None] * np.asarray(x, np.float64), posterior)):
        assert_mean(estimate, exact, tolerance=1e-5)


DIRECT = ndda.MMPS(ndda.diffusion.DirectSolve())
AS_PUBLISHED = ndda.MMPS(ndda.diffusion.DirectSolve(), ndda.diffusion.WhiteNoise())
SECOND = ndda.Sampler(ndda.SDEDPMSolverPP2M(), ndda.KarrasSchedule(10, 20.0))
ANCESTRAL = ndda.Sampler(ndda.diffusion.DDIM(1.0))
CASES = [
    pytest.param("singular", SECOND, DIRECT, 0.8, id="singular C"),
    pytest.param(
        "C", ANCESTRAL, ndda.MMPS(ndda.diffusion.KrylovSolve(1)), 3.0, id="one product", marks=pytest.mark.slow
    ),
    pytest.param("C", SECOND, AS_PUBLISHED, 2.0, id="C = I", marks=pytest.mark.slow),
    pytest.param("C", PATH_SAMPLER, DIRECT, 0.2, id="default", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("noise", "sampler", "guidance", "spread"), CASES)
def test_path_weights_are_unbiased(noise, sampler, guidance, spread):
    """Whatever C, the sampler, and how well the draw is guided: for the law that the sampler has."""
    step, n = step_of(sampler, noise), 3000
    x, log_weights, record = draw(step, guidance, n)
    assert_unbiased(x, log_weights, MEAN, law(step.prior, sampler))
    assert np.std(log_weights) < spread
    levels = len(sampler.schedule.levels(step.prior.noise_range))
    products = getattr(guidance.solver, "products", 2)
    assert [int(v[0]) for v in record.passes] == [levels, 0, (levels - 1) * products, 0]


def test_nothing_observed_weighs_nothing():
    """All missing: log w is 0 to the last bit, and every particle stays in its place."""
    sampler = ndda.Sampler(ndda.diffusion.DDIM(1.0), ndda.KarrasSchedule(4))
    x, log_weights, _ = draw(step_of(sampler), DIRECT, 5, likelihood(np.full(2, np.nan), seen=False))
    np.testing.assert_array_equal(log_weights, 0.0)
    assert np.all(np.isfinite(x))


def test_gaussian_steps_weigh_exactly():
    """log w = log p(y | c), the same for every draw, where h is linear."""
    factor = np.linalg.cholesky(COVARIANCE)
    step = GaussianDynamics(jnp.asarray(MEAN), jnp.asarray(factor))
    x, log_weights, record = draw(step, DIRECT, 200)
    np.testing.assert_allclose(log_weights, log_evidence(MEAN, COVARIANCE), rtol=1e-4)
    s = H @ COVARIANCE @ H.T + ERROR**2 * np.eye(2)
    mean = MEAN + np.linalg.solve(s, H @ COVARIANCE).T @ (Y - H @ MEAN)
    assert np.all(np.abs(np.mean(x, 0) - mean) < 5 * np.std(x, 0) / np.sqrt(200))
    assert int(record.passes.total()[0]) == 0


def test_gaussian_steps_correct_a_linearization():
    """y = x + x^2 / 2 + N(0, 0.5^2) of x ~ N(0.3, 0.6^2), against quadrature."""
    step, y, error = GaussianDynamics(jnp.full(1, 0.3), jnp.full(1, 0.6)), 1.0, 0.5
    like = ndda.observation.GaussianLikelihood(
        lambda x: [
            ndda.observation.GaussianObservation(x + x**2 / 2, jnp.full(1, error), jnp.full(1, y), jnp.ones(1, bool))
        ]
    )
    _, log_weights, _ = draw(step, DIRECT, 20000, like)
    grid = np.linspace(-5, 5, 20001)
    density = np.exp(-0.5 * ((grid - 0.3) / 0.6) ** 2 - 0.5 * ((y - grid - grid**2 / 2) / error) ** 2)
    exact = density.sum() * (grid[1] - grid[0]) / (2 * np.pi * 0.6 * error)
    ratio = np.exp(np.asarray(log_weights, np.float64)) / exact
    assert ratio.std() > 0.05  # a weight that is not constant
    assert_mean(ratio, 1.0)


@pytest.mark.parametrize(
    "sampler",
    [
        ndda.Sampler(),
        ndda.Sampler(ndda.diffusion.DDIM(0.0)),
        ndda.Sampler(ndda.SDEDPMSolverPP2M(), churn=ndda.diffusion.Churn()),
        ndda.Sampler(ndda.diffusion.DDIM(1.0), corrector=ndda.diffusion.LangevinCorrector()),
    ],
    ids=["2M", "DDIM(0)", "churn", "corrector"],
)
def test_a_sampler_without_a_path_weight_is_refused(sampler, small):
    sentence = r"only moves are steps with noise, and got .*; give ndda.Sampler\(ndda.SDEDPMSolverPP2M\(\)\)"
    with pytest.raises(ValueError, match=sentence):
        ndda.GuidedPF(small.diffusion_program(), sampler=sampler)
    with pytest.raises(ValueError, match=sentence):
        step_of(sampler).weighted_draw(jax.random.key(0), likelihood(), DIRECT)


class Unguided(ndda.diffusion.Guidance):
    """Says nothing of what it sees."""

    def __call__(self, denoiser, likelihood):
        return denoiser


class Silent(ndda.diffusion.KrylovSolve):
    """Says nothing of its directions."""

    def __call__(self, product, rhs, warm_start):
        solution, warm_start = super().__call__(product, rhs, warm_start)
        return solution._replace(directions=None), warm_start


def test_what_guides_must_say_what_it_has_seen():
    with pytest.raises(TypeError, match="Unguided gives a PriorDenoiser, which is no ObservingDenoiser"):
        step_of(PATH_SAMPLER).weighted_draw(jax.random.key(0), likelihood(), Unguided())
    with pytest.raises(TypeError, match="Silent does not return the directions it has seen"):
        step_of(PATH_SAMPLER).weighted_draw(jax.random.key(0), likelihood(), ndda.MMPS(Silent()))


@pytest.mark.slow
def test_guided_pf_on_a_program(small):
    """Settings, diagnostics and evidence of a run; the transition's own sampler where it has noise."""
    _, y = small.simulate(0, 2)
    sampler = ndda.Sampler(ndda.diffusion.DDIM(1.0), ndda.KarrasSchedule(5))
    program, with_noise = small.diffusion_program(), small.diffusion_program(sampler)
    assert "SDEDPMSolverPP2M" in ndda.GuidedPF(program).settings(ndda.program.StateSpaceModel(program, (y,)))["sampler"]
    run = ndda.Filter(ndda.GuidedPF(with_noise), num_particles=16, progress_bar=False)
    run.run(jax.random.key(0), jnp.asarray(y, jnp.float32))
    result = run.result
    assert result.attributes["algorithm"] == "GuidedPF"
    assert "DDIM(eta=1.0" in result.attributes["sampler"]
    assert "DirectSolve" in result.attributes["guidance"]
    assert evidence_bias_reasons(result) == []
    assert np.all(np.isfinite(result.sample_stats["log_evidence_increment"]))
    # 5 forward and 8 vjp of the draw; the background, of 16 particles, takes two forward and one vjp of each.
    passes = {name: float(v.mean()) for name, v in result.network_passes.items()}
    assert passes == {"forward": 7, "jvp": 0, "vjp": 9, "conditioning": 0}
    assert run.smoothed().posterior["x"].shape == (1, 16, 2, 4)
