"""Guidance: from the prior's denoiser to the posterior's, E[z | z_s, c] -> E[z | z_s, c, y].

Moment-matching posterior sampling (Rozet et al. 2024, arXiv 2405.13712, Section 4), with the noise covariance C. With
x = a + S D(z_s), r the whitened residual, H = -dr/dx (so R = I) and J = dD/dz_s,

    (I + s^2 H S J C S H^T) v = r(x)
    D_y = D + s^2 C J^T S H^T v.

Exact for a Gaussian p(z | c) and a linear h. The published method takes C = I also where it is not: see `MMPS.noise`.

An observation of another distribution is replaced, at each noise level, by the Gaussian one that has the same effect on
its coordinate of N(x, S s^2 J C S) (`likelihood`, `moment_matching`): exact for a Gaussian p(z | c) where observations
look at independent coordinates, h linear.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_diffusion_da.diffusion.denoiser import Denoiser, GuidanceState, NetworkPasses, PriorDenoiser
from numpyro_diffusion_da.diffusion.linear_solve import KrylovSolve, LinearSolver, Product, Solution
from numpyro_diffusion_da.diffusion.noise import Noise
from numpyro_diffusion_da.observation.likelihood import Coordinates, Likelihood, probe_signs


class Guidance(eqx.Module):
    """Turns a prior denoiser into a posterior one."""

    @abc.abstractmethod
    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """The denoiser of p(z | c, y)."""


class GuidanceDirections(NamedTuple):
    """What y adds at one noise level, along k directions u_i of whitened observation space (see `path`).

    Attributes:
        basis: u_i, orthonormal or zero, shape (k, m).
        residual: <u_i, r>, shape (k,).
        covariance: <u_i, (I + s^2 H S J C S H^T) u_j>, shape (k, k).
        pulled: J^T S H^T u_i, leading axis k.
    """

    basis: Float[Array, "k m"]
    residual: Float[Array, " k"]
    covariance: Float[Array, "k k"]
    pulled: Float[Array, "k ..."]


class ObservingDenoiser(Denoiser):
    """A posterior denoiser that can also say what it has seen.

    Attributes:
        base: the prior's denoiser.
    """

    base: eqx.AbstractVar[PriorDenoiser]

    @abc.abstractmethod
    def directions(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceDirections, GuidanceState]:
        """(the *unguided* D(z_s, s), what y adds to it, guidance_state)."""


class MMPS(Guidance):
    """Moment-matching posterior sampling.

    Args:
        solver: how the linear system in observation space is solved at each noise level.
        noise: the noise whose covariance C the guidance takes; None takes the prior's own, which is right.
            `MMPS(noise=WhiteNoise())` is the published method, C = I, for comparison with it: wrong wherever the
            prior's noise is not white (docs/method.md, the noise on the sphere). Samplers always draw the prior's.
    """

    solver: LinearSolver = KrylovSolve()
    noise: Noise | None = None

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """The moment-matched posterior denoiser."""
        noise = denoiser.prior.noise if self.noise is None else self.noise
        return MMPSDenoiser(denoiser, likelihood, self.solver, noise)


class MMPSDenoiser(ObservingDenoiser):
    """See `MMPS`; costs one forward and the solver's products (one vjp each) a call."""

    base: PriorDenoiser
    likelihood: Likelihood
    solver: LinearSolver
    noise: Noise

    def init(self) -> GuidanceState:
        """No passes yet, and the solver's cold start."""
        return initial_guidance_state(self.base, self.likelihood, self.solver)

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """D_y(z_s, s)."""
        denoised, solution, _, guidance_state = self._solve(z_s, noise_level, guidance_state)
        return denoised + noise_level**2 * self.noise.covariance_product(solution.image), guidance_state

    def directions(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceDirections, GuidanceState]:
        """See `ObservingDenoiser`: along the directions that the solver has seen."""
        denoised, solution, residual, guidance_state = self._solve(z_s, noise_level, guidance_state)
        if solution.directions is None:
            raise TypeError(
                f"{type(self.solver).__name__} does not say which directions it has seen, and path weights need them; "
                "return Solution(..., directions=...), or use ndda.diffusion.DirectSolve() or ndda.diffusion.KrylovSolve()."
            )
        basis, columns, images = solution.directions
        return denoised, GuidanceDirections(basis, basis @ residual, basis @ columns.T, images), guidance_state

    def _solve(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Array, Solution, Array, GuidanceState]:
        """(D, the solution of the module's system, r, guidance_state)."""
        prior, conditioning = self.base.prior, self.base.conditioning
        denoised, pull_denoiser = jax.vjp(lambda z: prior.denoise(z, noise_level, conditioning), z_s)

        # J C is symmetric for a true denoiser, so S J C S = S C J^T S: one vjp a product, no jvp.
        def covariance(w: Array) -> tuple[Array, Array]:
            (pulled,) = pull_denoiser(w)
            return noise_level**2 * self.noise.covariance_product(pulled), pulled

        residual, system, extra = linear_system(self.base, self.likelihood, self.solver, denoised, covariance)
        solution, warm_start = self.solver(system, residual, guidance_state.warm_start)
        passes = NetworkPasses.of(forward=1)._replace(vjp=solution.products + extra)
        guidance_state = GuidanceState(
            guidance_state.passes.plus(passes),
            warm_start,
            jnp.maximum(guidance_state.solver_residual, solution.residual),
        )
        return denoised, solution, residual, guidance_state


def state_of(base: PriorDenoiser, denoised: Float[Array, ...]) -> Float[Array, ...]:
    """a + S D."""
    return base.prior.location(base.conditioning) + base.prior.scale(base.conditioning) * denoised


def coordinates_near(base: PriorDenoiser, likelihood: Likelihood, x: Float[Array, ...]) -> Coordinates | None:
    """What the observations that are not Gaussian look at near x, its components moving by S; no network pass."""
    spread = jnp.broadcast_to(base.prior.scale(base.conditioning), x.shape)
    return likelihood.coordinates(x, spread[None] * probe_signs(x.shape, x.dtype))


def initial_guidance_state(base: PriorDenoiser, likelihood: Likelihood, solver: LinearSolver) -> GuidanceState:
    """No passes yet, and the solver's cold start for as many unknowns as there are residuals."""
    location = base.prior.location(base.conditioning)

    def residual(x: Array) -> Array:
        coordinates = coordinates_near(base, likelihood, x)
        variances = None if coordinates is None else jnp.ones(coordinates.observed.shape, x.dtype)
        return likelihood.around(coordinates, variances).residual(x)

    size = jax.eval_shape(residual, location).shape[0]
    return base.init()._replace(
        warm_start=solver.init(size, location.dtype), solver_residual=jnp.zeros((), location.dtype)
    )


def linear_system(
    base: PriorDenoiser,
    likelihood: Likelihood,
    solver: LinearSolver,
    denoised: Float[Array, ...],
    covariance: Callable[[Array], tuple[Array, Array]],
) -> tuple[Float[Array, " m"], Product, int]:
    """The system of a guidance that takes the latent to be N(D, V) at a noise level.

    Args:
        base: the prior's denoiser.
        likelihood: of the step.
        solver: for the variances of coordinates, where the likelihood is not Gaussian.
        denoised: D.
        covariance: w -> (V w, what a product with the system brings for w = S H^T v).

    Returns:
        (r, v -> ((I + H S V S H^T) v, what it brings), calls of `covariance` made so far).
    """
    scale = base.prior.scale(base.conditioning)
    x = state_of(base, denoised)

    def seen_by(observe: Callable[[Array], Array]) -> tuple[Array, Product]:
        """Observe(x), and v -> (H S V S H^T v, what it brings), H its derivative."""
        value, push = jax.linearize(observe, x)
        transposed = jax.linear_transpose(push, x)

        def product(v: Array) -> tuple[Array, Array]:
            image, brought = covariance(scale * transposed(v)[0])
            return push(scale * image), brought

        return value, product

    coordinates = coordinates_near(base, likelihood, x)
    variances, extra = None, 0
    if coordinates is not None:
        _, of_coordinates = seen_by(coordinates)
        size = len(coordinates.observed)
        variances = solver.diagonal(lambda v: of_coordinates(v)[0], size, x.dtype)
        extra = solver.diagonal_products(size)
    local = likelihood.around(coordinates, variances)
    # In these residuals H = -dr/dx: what is seen of -r.
    towards, product = seen_by(lambda x: -local.residual(x))

    def system(v: Array) -> tuple[Array, Array]:
        image, brought = product(v)
        return v + image, brought

    return -towards, system, extra
