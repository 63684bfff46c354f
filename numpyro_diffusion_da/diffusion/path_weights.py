"""The guided draw with its weight: an unbiased estimate of p(y | c) from one run of a stochastic sampler.

Unguided, a step of such a sampler from level s to s' = s sqrt(q) is z' ~ P = N(mu, tau^2 C). Guided, it is P given what
y says. With r the whitened residual at the denoised state, H = -dr/dx, J = dD/dz_s and U = (u_1 .. u_k) in observation
space, let g_i = J^T S H^T u_i. Before the step <u_i, r> ~ N(0, M), with M = U^T (I + s^2 H S J C S H^T) U; the step
decides the part of it that z' has along g:

    rho = G (z' - mu) + rest,    G_i = gamma_i <g_i, .>,    N = tau^2 G C G^T,    rest ~ N(0, M - N).

The guided step is Q(z') = P(z') N(rho; G (z' - mu), M - N) / N(rho; 0, M): Gaussian, and narrower than P where y is
informative. So the ratio of the densities needs no inverse of C, which may be singular:

    log P/Q = log N(rho; 0, M) - log N(rho; G (z' - mu), M - N).

exp(log w) with log w = log p(y | x) + sum log P/Q over the steps is an unbiased estimate of p(y | c), the evidence of
the *discretized* emulator: of the sampler's own law, whatever directions, guidance, h and network are, for rho, G and M
are known before z' is drawn. How much log w varies does depend on them. The diffusion in reverse goes to s' with mean
q z_s + (1 - q) D, deciding, where z is Gaussian with Var(z | z_s) = s^2 j, the part s^2 (1 - q) j^2 / (q + (1 - q) j)
of that variance; and there dD(z', s')/dz' = j / (q + (1 - q) j). With P doing the same from a mean of its own,

    gamma_i^2 = s^2 (1 - q) / (tau^2 (q + (1 - q) j_i)),    j_i = s^2 <g_i, C g_i> / <u_i, (M - I) u_i>,
    rho_i = <u_i, r> - <g_i, mu - q z_s - (1 - q) D> / (q + (1 - q) j_i).

Girsanov's weights, where Q is as wide as P and has the guided denoiser in its mean, are unbiased too, but vary more
(docs/method.md has both).

The last step, from the lowest level to zero, is the prior's own denoiser in both runs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.denoiser import GuidanceState
from numpyro_diffusion_da.diffusion.guidance import GuidanceDirections, ObservingDenoiser
from numpyro_diffusion_da.diffusion.noise import Noise
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.diffusion.steps import StepInputs, StochasticStep


def weighted_path(
    rng_key: PRNGKeyArray,
    sampler: Sampler,
    denoiser: ObservingDenoiser,
    noise: Noise,
    noise_range: tuple[float, float],
    z: Float[Array, ...],
) -> tuple[Float[Array, ...], Float[Array, ""], GuidanceState]:
    """Run the sampler guided, and weigh the run against the unguided one.

    Args:
        rng_key: for the noise of the steps.
        sampler: with noise at every step, and neither churn nor corrector.
        denoiser: the guided denoiser.
        noise: the prior's noise.
        noise_range: the prior's (lowest, highest) noise level.
        z: the starting point at the highest level, see `Sampler.initial`.

    Returns:
        (the denoised latent, sum of log P/Q over the steps, the denoiser's guidance_state after the last level).

    Raises:
        ValueError: the sampler is deterministic somewhere, or moves other than by its step.
    """
    step = sampler.stochastic_step()

    def body(carry: Any, c: dict[str, Array]) -> tuple[Any, None]:
        z, history, guidance_state, log_ratio = carry
        denoised, directions, guidance_state = denoiser.directions(z, c["start"], guidance_state)
        key = jax.random.fold_in(rng_key, c["index"])
        at = StepInputs(key, denoiser, noise, z, c["start"], c["stop"], c)
        z, history, increment = informed_step(step, at, denoised, directions, history)
        return (z, history, guidance_state, log_ratio + increment), None

    start = (z, step.init(z), denoiser.init(), jnp.zeros((), z.dtype))
    (z, _, guidance_state, log_ratio), _ = jax.lax.scan(body, start, sampler.constants(noise_range, z.dtype))
    lowest = jnp.asarray(sampler.schedule.levels(noise_range)[-1], z.dtype)
    z, guidance_state = denoiser.base(z, lowest, guidance_state)
    return z, log_ratio, guidance_state


def informed_step(
    step: StochasticStep, at: StepInputs, denoised: Float[Array, ...], directions: GuidanceDirections, history: PyTree
) -> tuple[Float[Array, ...], PyTree, Float[Array, ""]]:
    """One step of P given the directions, in the module's notation; returns (z', history, log P/Q)."""
    mean, spread, history = step.law(at, denoised, history)
    noise, falls = at.noise, (at.stop / at.start) ** 2
    reverse = denoised + falls * (at.z - denoised)
    gram = _gram(directions.pulled, noise)
    known = (jnp.diagonal(directions.covariance) - jnp.sum(directions.basis**2, axis=1)) / at.start**2
    j = jnp.clip(jnp.where(known > 0, jnp.diagonal(gram) / jnp.where(known > 0, known, 1.0), 1.0), 0.0, 1.0)
    remains = falls + (1.0 - falls) * j
    rho = directions.residual - jnp.tensordot(directions.pulled, mean - reverse, mean.ndim) / remains
    gamma = at.start / spread * jnp.sqrt((1.0 - falls) / remains)
    g = gamma.reshape(-1, *(1,) * mean.ndim) * directions.pulled
    decided = spread**2 * gamma[:, None] * gram * gamma[None, :]
    # A covariance of what is left: at least that of R, 1 in these coordinates, whatever a learned J says.
    values, vectors = jnp.linalg.eigh(_symmetric(directions.covariance - decided))
    values = jnp.maximum(values, 1.0)
    total = jnp.linalg.cholesky(_symmetric(decided) + vectors @ (values[:, None] * vectors.T))

    noise_key, rest_key = jax.random.split(at.rng_key)
    white = spread * noise.sample(noise_key, mean.shape, mean.dtype)
    along = jnp.tensordot(g, white, white.ndim)
    rest = vectors @ (jnp.sqrt(values) * jax.random.normal(rest_key, rho.shape, rho.dtype))
    gain = jsl.cho_solve((total, True), rho - along - rest)
    z = mean + white + spread**2 * noise.covariance_product(jnp.tensordot(gain, g, 1))
    before = jsl.solve_triangular(total, rho, lower=True)
    after = vectors.T @ (rho - along - decided @ gain)
    log_ratio = -0.5 * jnp.vdot(before, before) - jnp.sum(jnp.log(jnp.diagonal(total)))
    log_ratio += 0.5 * jnp.sum(after**2 / values) + 0.5 * jnp.sum(jnp.log(values))
    return z, history, log_ratio


def _gram(rows: Float[Array, "k ..."], noise: Noise) -> Float[Array, "k k"]:
    """<row_i, C row_j>."""
    images = jax.vmap(noise.covariance_product)(rows)
    return rows.reshape(len(rows), -1) @ images.reshape(len(rows), -1).T


def _symmetric(matrix: Float[Array, "k k"]) -> Float[Array, "k k"]:
    return 0.5 * (matrix + matrix.T)
