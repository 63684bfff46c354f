r"""Published guidance other than moment matching, written in the same notation to compare with it.

Every method here approximates p(z | z_s) by a Gaussian N(D, V). The methods differ in V, and in the matrix that maps
the solution v back to the latent. The state is `x = a + S D(z_s)`, r is its whitened residual, `H = -dr/dx` (so R = I),
`J = dD/dz_s`, and C is the covariance of the prior's noise:

$$
(I + H S V S H^T) v = r, \qquad D_y = D + s^2 C J^T S H^T v \quad \text{or} \quad D_y = D + V S H^T v .
$$

| guidance | V in the system | matrix before v | vjps per call |
|---|---|---|---|
| `MMPS` | s^2 J C | s^2 C J^T S H^T | products of the solver |
| `TMPD` | s^2 J C, with the row sums of H S V S H^T on the diagonal | s^2 C J^T S H^T | 2 |
| `PiGDM` | r_s^2 C | s^2 C J^T S H^T | 1 |
| `DPS` | 0 | s^2 C J^T S H^T | 1 |
| `JFPS` | r_s^2 C | V S H^T | 0 |

Here `r_s^2 = s^2 d^2 / (s^2 + d^2)`, and d is the standard deviation of the latent. The papers have C = I and d = 1.

For a Gaussian p(z | c) and a linear h, `PiGDM` and `JFPS` are exact if the covariance of p(z | c) is d^2 C. `TMPD` is
exact if H S V S H^T is diagonal. `DPS` is exact in the limit of observation errors that are large against the spread.

A likelihood that is not Gaussian is replaced by a Gaussian one as in `diffusion.guidance`, with the V of the method.
`DPS` takes its gradient instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_diffusion_da.arguments import number, real_array, require, shown
from numpyro_diffusion_da.diffusion.denoiser import Denoiser, GuidanceState, NetworkPasses, PriorDenoiser
from numpyro_diffusion_da.diffusion.guidance import (
    Guidance,
    MMPSDenoiser,
    initial_guidance_state,
    solve_system,
    state_of,
)
from numpyro_diffusion_da.diffusion.linear_solve import KrylovSolve, LinearSolver, RowSumSolve
from numpyro_diffusion_da.observation.likelihood import GaussianLikelihood, Likelihood


def _deviations(owner: str) -> Callable[[Any], Array]:
    """Converter of a field that holds positive standard deviations of the latent, which may be traced."""

    def converter(value: Any) -> Array:
        if isinstance(value, jax.core.Tracer):
            return value
        found = real_array(value, owner, "sigma_data", "1.0")
        if found.size == 0 or not np.all(found > 0.0):
            raise ValueError(f"{owner} got sigma_data={shown(value)}; give positive standard deviations of the latent.")
        return jnp.asarray(value)

    return converter


class DPS(Guidance):
    r"""Diffusion posterior sampling (Chung et al. 2022, arXiv 2209.14687): guidance by the likelihood at D.

    The method approximates p(y | z_s) by p(y | x) at the denoised state x = a + S D(z_s). The guided denoiser is

    $$
    D_y = D + s^2 C \nabla_{z_s} \log p(y \mid a + S D(z_s)) .
    $$

    One call costs one forward pass and one vjp. The method ignores the uncertainty of z given z_s. So the guidance is
    too strong if the observation errors are small against that uncertainty, and a sampler with few levels may then
    diverge.

    The paper's Algorithm 1 therefore replaces the factor 1 / error^2 by a step size zeta / |y - h|, at each of a
    thousand levels. A denoiser does not know the sampler's step, so `zeta` scales the score here:

    $$
    D_y = D + \zeta s^2 C J^T S H^T r / |r|,
    $$

    with r the whitened residual, H = -dr/dx and J = dD/dz_s.

    Args:
        zeta: positive factor that scales the score to zeta / |r|, with r in units of the observation errors, for
            Gaussian observations only; None takes the score of the likelihood as it is.

    Raises:
        ValueError: zeta is not positive.
    """

    zeta: float | None = eqx.field(
        static=True,
        default=None,
        converter=number(
            "DPS", "zeta", "give a positive number, or None for the likelihood's score.", optional=True, above=0
        ),
    )

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """Build the denoiser that is guided by the score of the likelihood at D.

        Raises:
            ValueError: zeta is given and the likelihood is not Gaussian, so there is no residual to scale.
        """
        if self.zeta is not None and not isinstance(likelihood, GaussianLikelihood):
            raise ValueError(f"DPS(zeta={self.zeta}) needs Gaussian observations; use ndda.diffusion.DPS() for others.")
        return DPSDenoiser(denoiser, likelihood, self.zeta)


class DPSDenoiser(Denoiser):
    """Posterior denoiser guided by the score of the likelihood, built by `DPS`.

    One call costs one forward pass and one vjp.

    Attributes:
        base: denoiser of the prior.
        likelihood: likelihood of the step's observations.
        zeta: scale of the score, or None.
    """

    base: PriorDenoiser
    likelihood: Likelihood
    zeta: float | None = eqx.field(static=True)

    def init(self) -> GuidanceState:
        """Return a guidance state with no passes and no warm start."""
        return self.base.init()

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """Return the guided D_y(z_s, s), of the shape of `z_s`, and the next guidance state."""
        prior = self.base.prior
        denoised, pull = self.base.with_pullback(z_s, noise_level)
        x = state_of(self.base, denoised)
        if isinstance(self.likelihood, GaussianLikelihood):
            residual, pull_residual = jax.vjp(self.likelihood.residual, x)
            size = jnp.linalg.norm(residual)
            weight = 1.0 if self.zeta is None else self.zeta / jnp.where(size > 0, size, 1.0)
            (score,) = pull_residual(-weight * residual)
        else:
            score = jax.grad(self.likelihood.log_prob)(x)
        pulled = pull(prior.scale(self.base.conditioning) * score)
        passes = NetworkPasses.of(forward=1, vjp=1)
        return denoised + noise_level**2 * prior.noise.covariance_product(pulled), guidance_state.plus(passes)


class TMPD(Guidance):
    """Tweedie moment projected diffusions (Boys et al. 2023, arXiv 2310.06721), in the variant with a diagonal matrix.

    This is `MMPS` with `H S s^2 J C S H^T` replaced by the diagonal matrix of its row sums. One call costs one forward
    pass and two vjps. A likelihood that is not Gaussian takes a third vjp, for the row sums of its coordinates.

    The row sums are those of the whitened system. The paper takes them in the units of y, which is the same if all
    observation errors are equal.
    """

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """Build the denoiser of p(z | c, y) with the projected moments."""
        return MMPSDenoiser(denoiser, likelihood, RowSumSolve(), denoiser.prior.noise)


class PiGDM(Guidance):
    r"""Pseudoinverse-guided diffusion (Song, Vahdat, Mardani & Kautz 2023, ICLR, openreview 9_gsMA8MRKQ).

    The guided denoiser is

    $$
    D_y = D + s^2 C J^T S H^T (I + r_s^2 H S C S H^T)^{-1} r, \qquad r_s^2 = \frac{s^2 d^2}{s^2 + d^2} .
    $$

    This is the paper's score for noisy linear observations, with h linearized at D. The paper's algorithm multiplies
    the score by a further, empirical weight, which is left out here. One call costs one forward pass and one vjp.

    Args:
        sigma_data: d, the standard deviation of the latent z relative to C: a number, or an array that broadcasts to
            the latent. For an array, V is r_s C r_s with r_s on the diagonal.
        solver: solver of the linear system; its products make no network pass.

    Raises:
        ValueError: sigma_data is not positive.
    """

    sigma_data: Float[Array, ...] = eqx.field(converter=_deviations("PiGDM"), default=1.0)
    solver: LinearSolver = KrylovSolve(products=8)

    def __check_init__(self) -> None:
        require(self.solver, LinearSolver, self, "solver", "ndda.diffusion.KrylovSolve(products=8)")

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """Build the denoiser that is guided with a constant variance, through the Jacobian of the network."""
        return ConstantVarianceDenoiser(denoiser, likelihood, self.solver, self.sigma_data, through_jacobian=True)


class JFPS(Guidance):
    r"""Jacobian-free posterior sampling, as `azula.guidance.jfps` of the azula library, which names no paper.

    The guided denoiser is the Kalman update of N(D, V):

    $$
    D_y = D + V S H^T (I + H S V S H^T)^{-1} r, \qquad V = (V_0^{-1} + s^{-2} C^{-1})^{-1}, \quad V_0 = d^2 C,
    $$

    where V_0 is the covariance of the latent. One call costs one forward pass and no derivative of the network. Use it
    for networks without a derivative, or with a backward pass that does not fit in memory. Here V_0 is diagonal
    relative to C; azula takes any covariance.

    Args:
        sigma_data: d, the standard deviation of the latent z relative to C: a number, or an array that broadcasts to
            the latent.
        solver: solver of the linear system; its products make no network pass.

    Raises:
        ValueError: sigma_data is not positive.
    """

    sigma_data: Float[Array, ...] = eqx.field(converter=_deviations("JFPS"), default=1.0)
    solver: LinearSolver = KrylovSolve(products=8)

    def __check_init__(self) -> None:
        require(self.solver, LinearSolver, self, "solver", "ndda.diffusion.KrylovSolve(products=8)")

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """Build the denoiser that is guided with a constant variance, without a Jacobian of the network."""
        return ConstantVarianceDenoiser(denoiser, likelihood, self.solver, self.sigma_data, through_jacobian=False)


class ConstantVarianceDenoiser(Denoiser):
    """Posterior denoiser with a constant variance of the latent, built by `PiGDM` and `JFPS`.

    One call costs one forward pass, and one vjp if it goes through the Jacobian.

    Attributes:
        base: denoiser of the prior.
        likelihood: likelihood of the step's observations.
        solver: solver of the linear system.
        sigma_data: standard deviation of the latent relative to C, a number or an array that broadcasts to the latent.
        through_jacobian: True for `PiGDM`, False for `JFPS`.
    """

    base: PriorDenoiser
    likelihood: Likelihood
    solver: LinearSolver
    sigma_data: Float[Array, ...]
    through_jacobian: bool = eqx.field(static=True)

    def init(self) -> GuidanceState:
        """Return a guidance state with no passes and the solver's first warm start."""
        return initial_guidance_state(self.base, self.likelihood, self.solver)

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """Return the guided D_y(z_s, s), of the shape of `z_s`, and the next guidance state."""
        prior = self.base.prior
        d = jnp.broadcast_to(self.sigma_data.astype(z_s.dtype), z_s.shape)
        spread = noise_level * d / jnp.sqrt(noise_level**2 + d**2)  # r_s, of z given z_s

        def times_variance(w: Array) -> Array:
            return spread * prior.noise.covariance_product(spread * w)

        if self.through_jacobian:
            denoised, pull = self.base.with_pullback(z_s, noise_level)
        else:
            denoised = prior.denoise(z_s, noise_level, self.base.conditioning)
        solution, _, _, guidance_state = solve_system(
            self.base, self.likelihood, self.solver, denoised, lambda w: (times_variance(w), w), guidance_state
        )
        if self.through_jacobian:
            correction = noise_level**2 * prior.noise.covariance_product(pull(solution.image))
        else:
            correction = times_variance(solution.image)
        passes = NetworkPasses.of(forward=1, vjp=int(self.through_jacobian))
        return denoised + correction, guidance_state.plus(passes)
