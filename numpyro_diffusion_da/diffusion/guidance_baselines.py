"""Published guidance other than moment matching, in the same notation, for comparison with it.

All of them take p(z | z_s) for a Gaussian N(D, V) and differ in V and in what stands before it. With x = a + S D(z_s),
r the whitened residual, H = -dr/dx (so R = I), J = dD/dz_s and C the covariance of the prior's noise,

    (I + H S V S H^T) v = r,        D_y = D + s^2 C J^T S H^T v    or    D_y = D + V S H^T v.

| guidance | V in the system | before v | vjp a call |
|---|---|---|---|
| `MMPS` | s^2 J C | s^2 C J^T S H^T | the solver's products |
| `TMPD` | s^2 J C, of H S V S H^T the row sums | s^2 C J^T S H^T | 2 |
| `PiGDM` | r_s^2 C | s^2 C J^T S H^T | 1 |
| `DPS` | 0 | s^2 C J^T S H^T | 1 |
| `JFPS` | r_s^2 C | V S H^T | 0 |

with r_s^2 = s^2 d^2 / (s^2 + d^2), d the standard deviation of the latent. The papers have C = I, d = 1. For a
Gaussian p(z | c) and a linear h, PiGDM and JFPS are exact where its covariance is d^2 C, TMPD where H S V S H^T is
diagonal, DPS where the observations' errors are large against their spread. A likelihood that is not Gaussian is
replaced as in `guidance`, with the V of the method; DPS takes its gradient.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_diffusion_da.diffusion.denoiser import Denoiser, GuidanceState, NetworkPasses, PriorDenoiser
from numpyro_diffusion_da.diffusion.guidance import (
    Guidance,
    MMPSDenoiser,
    initial_guidance_state,
    linear_system,
    state_of,
)
from numpyro_diffusion_da.diffusion.linear_solve import KrylovSolve, LinearSolver, RowSumSolve
from numpyro_diffusion_da.observation.likelihood import GaussianLikelihood, Likelihood


class DPS(Guidance):
    """Diffusion posterior sampling (Chung et al. 2022, arXiv 2209.14687): p(y | z_s) taken for p(y | x = a + S D(z_s)).

    D_y = D + s^2 C grad log p(y | a + S D(z_s)), the gradient in z_s: one forward pass and one vjp. What z_s leaves
    open is left out: the guidance is too strong wherever the errors of the observations are small against it, and a
    sampler with few levels may then diverge. The paper's Algorithm 1 therefore has a step of size zeta / |y - h| in
    the place of 1 / error^2, taken at each of a thousand levels. A denoiser does not know the step, so that `zeta` here
    scales the score: D_y = D + zeta s^2 C J^T S H^T r / |r|.

    Args:
        zeta: None takes the likelihood's own score; a number scales it to zeta / |r|, r in units of the errors, for
            Gaussian observations.

    Raises:
        ValueError: zeta is not positive.
    """

    zeta: float | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.zeta is not None and not self.zeta > 0.0:
            raise ValueError(f"DPS got zeta={self.zeta}; give a positive number, or None for the likelihood's score.")

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """The denoiser guided by the likelihood's score at D.

        Raises:
            ValueError: zeta with a likelihood that is not Gaussian, which has no residual.
        """
        if self.zeta is not None and not isinstance(likelihood, GaussianLikelihood):
            raise ValueError(f"DPS(zeta={self.zeta}) needs Gaussian observations; use ndda.diffusion.DPS() for others.")
        return DPSDenoiser(denoiser, likelihood, self.zeta)


class DPSDenoiser(Denoiser):
    """See `DPS`; costs one forward and one vjp a call."""

    base: PriorDenoiser
    likelihood: Likelihood
    zeta: float | None = eqx.field(static=True)

    def init(self) -> GuidanceState:
        """No passes yet."""
        return self.base.init()

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """D_y(z_s, s)."""
        prior, conditioning = self.base.prior, self.base.conditioning
        denoised, pull_denoiser = jax.vjp(lambda z: prior.denoise(z, noise_level, conditioning), z_s)
        x = state_of(self.base, denoised)
        if isinstance(self.likelihood, GaussianLikelihood):
            residual, pull_residual = jax.vjp(self.likelihood.residual, x)
            size = jnp.linalg.norm(residual)
            weight = 1.0 if self.zeta is None else self.zeta / jnp.where(size > 0, size, 1.0)
            (score,) = pull_residual(-weight * residual)
        else:
            score = jax.grad(self.likelihood.log_prob)(x)
        (pulled,) = pull_denoiser(prior.scale(conditioning) * score)
        guidance_state = guidance_state._replace(passes=guidance_state.passes.plus(NetworkPasses.of(forward=1, vjp=1)))
        return denoised + noise_level**2 * prior.noise.covariance_product(pulled), guidance_state


class TMPD(Guidance):
    """Tweedie moment projected diffusions (Boys et al. 2023, arXiv 2310.06721), the variant with a diagonal.

    `MMPS` with H S s^2 J C S H^T taken for the diagonal matrix of its row sums: one forward pass and two vjp. The row
    sums are those of the whitened system; the paper's, in the units of y, are the same where all errors are equal.
    For a likelihood that is not Gaussian a third vjp gives the row sums of its coordinates.
    """

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """The denoiser with the projected moments."""
        return MMPSDenoiser(denoiser, likelihood, RowSumSolve(), denoiser.prior.noise)


class PiGDM(Guidance):
    """Pseudoinverse-guided diffusion (Song, Vahdat, Mardani & Kautz 2023, ICLR, openreview 9_gsMA8MRKQ).

    D_y = D + s^2 C J^T S H^T (I + r_s^2 H S C S H^T)^{-1} r: the paper's score for noisy linear observations, here with
    h linearized at D. One forward pass and one vjp. The paper's algorithm then gives the score a further, empirical
    weight, which is left out.

    Args:
        sigma_data: d, the standard deviation of the latent z, relative to C: a number, or an array that broadcasts to
            the latent, V then being d_s C d_s with d_s = s d / (s^2 + d^2)^(1/2).
        solver: for the system, whose products pass through no network.

    Raises:
        ValueError: sigma_data is not positive.
    """

    sigma_data: Float[Array, ...] = eqx.field(converter=jnp.asarray, default=1.0)
    solver: LinearSolver = KrylovSolve(products=8)

    def __check_init__(self) -> None:
        check_positive(type(self).__name__, self.sigma_data)

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """The denoiser guided with a constant variance, through the Jacobian."""
        return ConstantVarianceDenoiser(denoiser, likelihood, self.solver, self.sigma_data, through_jacobian=True)


class JFPS(Guidance):
    """Jacobian-free posterior sampling: `azula.guidance.jfps` of the azula library, which names no paper.

    D_y = D + V S H^T (I + H S V S H^T)^{-1} r with V = (V_0^{-1} + s^{-2} C^{-1})^{-1}, V_0 = d^2 C the variance of the
    latent: the Kalman update of N(D, V). One forward pass, no derivative of the network: for networks that have none,
    or whose backward pass does not fit. Here V_0 is diagonal relative to C; azula takes any covariance.

    Args:
        sigma_data: d, as for `PiGDM`.
        solver: for the system, whose products pass through no network.

    Raises:
        ValueError: sigma_data is not positive.
    """

    sigma_data: Float[Array, ...] = eqx.field(converter=jnp.asarray, default=1.0)
    solver: LinearSolver = KrylovSolve(products=8)

    def __check_init__(self) -> None:
        check_positive(type(self).__name__, self.sigma_data)

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """The denoiser guided with a constant variance, without a Jacobian."""
        return ConstantVarianceDenoiser(denoiser, likelihood, self.solver, self.sigma_data, through_jacobian=False)


class ConstantVarianceDenoiser(Denoiser):
    """See `PiGDM` and `JFPS`; costs one forward a call, and one vjp where the Jacobian is used."""

    base: PriorDenoiser
    likelihood: Likelihood
    solver: LinearSolver
    sigma_data: Float[Array, ...]
    through_jacobian: bool = eqx.field(static=True)

    def init(self) -> GuidanceState:
        """No passes yet, and the solver's cold start."""
        return initial_guidance_state(self.base, self.likelihood, self.solver)

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """D_y(z_s, s)."""
        prior, conditioning = self.base.prior, self.base.conditioning
        d = jnp.broadcast_to(self.sigma_data.astype(z_s.dtype), z_s.shape)
        remains = noise_level * d / jnp.sqrt(noise_level**2 + d**2)

        def times_variance(w: Array) -> Array:
            return remains * prior.noise.covariance_product(remains * w)

        if self.through_jacobian:
            denoised, pull_denoiser = jax.vjp(lambda z: prior.denoise(z, noise_level, conditioning), z_s)
        else:
            denoised = prior.denoise(z_s, noise_level, conditioning)
        residual, system, _ = linear_system(
            self.base, self.likelihood, self.solver, denoised, lambda w: (times_variance(w), w)
        )
        solution, warm_start = self.solver(system, residual, guidance_state.warm_start)
        if self.through_jacobian:
            (pulled,) = pull_denoiser(solution.image)
            towards = noise_level**2 * prior.noise.covariance_product(pulled)
        else:
            towards = times_variance(solution.image)
        passes = guidance_state.passes.plus(NetworkPasses.of(forward=1, vjp=int(self.through_jacobian)))
        largest = jnp.maximum(guidance_state.solver_residual, solution.residual)
        return denoised + towards, GuidanceState(passes, warm_start, largest)


def check_positive(name: str, sigma_data: ArrayLike) -> None:
    """Refuse a standard deviation that is zero or negative, where its value is known."""
    if not isinstance(sigma_data, jax.core.Tracer) and not np.all(np.asarray(sigma_data) > 0.0):
        raise ValueError(f"{name} got sigma_data={sigma_data}; give positive standard deviations of the latent.")
