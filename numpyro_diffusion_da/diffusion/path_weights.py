r"""Guided draw with its weight, which gives an unbiased estimate of p(y | c) from one run of a stochastic sampler.

**Steps.** An unguided step of the sampler goes from noise level s to $s' = s \sqrt q$ with
$z' \sim P = \mathcal N(\mu, \tau^2 C)$. A guided step Q is P conditioned on what y says about z'. Let r be the whitened
residual at the denoised state, H = -dr/dx, J = dD/dz_s, U = (u_1 .. u_k) directions in observation space, and
g_i = J^T S H^T u_i. Before the step, the components of r along U have the distribution N(0, M) with
M = U^T (I + s^2 H S J C S H^T) U. The step decides the part of them that z' has along the g_i:

$$
\rho = G (z' - \mu) + \text{rest}, \quad G_i = \gamma_i \langle g_i, \cdot \rangle, \quad
N = \tau^2 G C G^T, \quad \text{rest} \sim \mathcal N(0, M - N) .
$$

The guided step is Gaussian, and narrower than P if y is informative:

$$
Q(z') = P(z') \, \frac{\mathcal N(\rho;\, G (z' - \mu), M - N)}{\mathcal N(\rho;\, 0, M)} .
$$

The ratio of the densities therefore needs no inverse of C, which may be singular:

$$
\log \frac PQ = \log \mathcal N(\rho;\, 0, M) - \log \mathcal N(\rho;\, G (z' - \mu), M - N) .
$$

**Weight.** Let log w = log p(y | x) plus the sum of log P/Q over the steps. Then w is an unbiased estimate of p(y | c),
the evidence of the *discretized* emulator, whose distribution is the one that the sampler itself draws from. It is
unbiased for any directions, guidance, h and network, because rho, G and M are known before z' is drawn. The variance of
log w does depend on them.

**Choice of gamma and rho.** The reverse diffusion goes to s' with mean q z_s + (1 - q) D. If z is Gaussian with
Var(z | z_s) = s^2 j, it decides the part s^2 (1 - q) j^2 / (q + (1 - q) j) of that variance, and at the new level
dD(z', s')/dz' = j / (q + (1 - q) j). P does the same from its own mean, so

$$
\gamma_i^2 = \frac{s^2 (1 - q)}{\tau^2 (q + (1 - q) j_i)}, \quad
j_i = \frac{s^2 \langle g_i, C g_i \rangle}{\langle u_i, (M - I) u_i \rangle}, \quad
\rho_i = \langle u_i, r \rangle - \frac{\langle g_i, \mu - q z_s - (1 - q) D \rangle}{q + (1 - q) j_i} .
$$

Girsanov's weights have a Q as wide as P, with the guided denoiser in its mean. They are unbiased too, but vary more
(docs/method.md has both).

**Last step.** From the lowest level to zero, the guided and the unguided run both take the prior's own denoiser.
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
    """Run a sampler with guidance, and compute the log-density ratio of the unguided to the guided run.

    Args:
        rng_key: random key for the noise of the steps.
        sampler: sampler with noise at every step, without churn and without corrector.
        denoiser: guided denoiser that returns its directions.
        noise: noise of the prior.
        noise_range: (lowest, highest) noise level of the prior.
        z: starting point at the highest level, from `Sampler.initial`.

    Returns:
        (the denoised latent, of the shape of `z`; sum of log P/Q over the steps; guidance state after the last level).

    Raises:
        ValueError: the sampler has a step without noise, a churn or a corrector.
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
    # The last step is the same with and without guidance, so it adds nothing to the ratio.
    lowest = jnp.asarray(sampler.schedule.levels(noise_range)[-1], z.dtype)
    z, guidance_state = denoiser.base(z, lowest, guidance_state)
    return z, log_ratio, guidance_state


def informed_step(
    step: StochasticStep, at: StepInputs, denoised: Float[Array, ...], directions: GuidanceDirections, history: PyTree
) -> tuple[Float[Array, ...], PyTree, Float[Array, ""]]:
    """Take one guided step, in the notation of the module.

    Args:
        step: stochastic step that defines P.
        at: inputs of the step.
        denoised: unguided D(z_s, s) at the start of the step.
        directions: effect of the observations at the start of the step.
        history: history of the step.

    Returns:
        (z', of the shape of `at.z`; next history; log P/Q).
    """
    # P = N(mean, spread^2 C), and the mean of the reverse diffusion.
    mean, spread, history = step.law(at, denoised, history)
    noise, falls = at.noise, (at.stop / at.start) ** 2
    reverse = denoised + falls * (at.z - denoised)
    # j_i: variance of z given z_s along g_i, relative to s^2.
    gram = _gram(directions.pulled, noise)
    known = (jnp.diagonal(directions.covariance) - jnp.sum(directions.basis**2, axis=1)) / at.start**2
    j = jnp.clip(jnp.where(known > 0, jnp.diagonal(gram) / jnp.where(known > 0, known, 1.0), 1.0), 0.0, 1.0)
    # rho, gamma and G, and N, the covariance of the part of rho that the step decides.
    remains = falls + (1.0 - falls) * j
    rho = directions.residual - jnp.tensordot(directions.pulled, mean - reverse, mean.ndim) / remains
    gamma = at.start / spread * jnp.sqrt((1.0 - falls) / remains)
    g = gamma.reshape(-1, *(1,) * mean.ndim) * directions.pulled
    decided = spread**2 * gamma[:, None] * gram * gamma[None, :]
    # M - N, the covariance of the rest. For a true J it is at least R, which is 1 here; for a learned J, lift it to 1.
    values, vectors = jnp.linalg.eigh(_symmetric(directions.covariance - decided))
    values = jnp.maximum(values, 1.0)
    total = jnp.linalg.cholesky(_symmetric(decided) + vectors @ (values[:, None] * vectors.T))

    # Draw z' and the rest from their unguided joint distribution, then condition them on rho (Matheron's rule).
    noise_key, rest_key = jax.random.split(at.rng_key)
    white = spread * noise.sample(noise_key, mean.shape, mean.dtype)
    along = jnp.tensordot(g, white, white.ndim)
    rest = vectors @ (jnp.sqrt(values) * jax.random.normal(rest_key, rho.shape, rho.dtype))
    gain = jsl.cho_solve((total, True), rho - along - rest)
    z = mean + white + spread**2 * noise.covariance_product(jnp.tensordot(gain, g, 1))
    # log N(rho; 0, M) - log N(rho; G (z' - mu), M - N).
    before = jsl.solve_triangular(total, rho, lower=True)
    after = vectors.T @ (rho - along - decided @ gain)
    log_ratio = -0.5 * jnp.vdot(before, before) - jnp.sum(jnp.log(jnp.diagonal(total)))
    log_ratio += 0.5 * jnp.sum(after**2 / values) + 0.5 * jnp.sum(jnp.log(values))
    return z, history, log_ratio


def _gram(rows: Float[Array, "k ..."], noise: Noise) -> Float[Array, "k k"]:
    """Return the matrix of inner products `<row_i, C row_j>`, shape (k, k)."""
    images = jax.vmap(noise.covariance_product)(rows)
    return rows.reshape(len(rows), -1) @ images.reshape(len(rows), -1).T


def _symmetric(matrix: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Return the symmetric part of a square matrix."""
    return 0.5 * (matrix + matrix.T)
