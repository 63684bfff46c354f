r"""Guidance of a denoiser by observations, from E[z | z_s, c] to E[z | z_s, c, y], by moment matching.

This is moment-matching posterior sampling (Rozet et al. 2024, arXiv 2405.13712, Section 4), with the noise covariance
C. The state is `x = a + S D(z_s)`, r is its whitened residual, `H = -dr/dx` (so R = I), and `J = dD/dz_s`. The guided
denoiser D_y is

$$
(I + s^2 H S J C S H^T) v = r(x), \qquad D_y = D + s^2 C J^T S H^T v .
$$

It is exact for a Gaussian p(z | c) and a linear h. The published method takes C = I even if the noise is not white; see
`MMPS` for its `noise` argument.

An observation that is not Gaussian is replaced, at each noise level, by a Gaussian observation. The replacement has the
same effect on the observation's coordinate of N(x, S s^2 J C S). The modules `observation.likelihood` and
`observation.moment_matching` define both. The result is exact for a Gaussian p(z | c) and a linear h if the
observations depend on independent coordinates.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.diffusion.denoiser import Denoiser, GuidanceState, NetworkPasses, PriorDenoiser
from numpyro_diffusion_da.diffusion.linear_solve import KrylovSolve, LinearSolver, Product, Solution
from numpyro_diffusion_da.diffusion.noise import Noise
from numpyro_diffusion_da.observation.likelihood import Coordinates, Likelihood, probe_signs


class Guidance(eqx.Module):
    """Abstract guidance, which turns the denoiser of a prior into the denoiser of a posterior."""

    @abc.abstractmethod
    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """Build the denoiser of p(z | c, y).

        Args:
            denoiser: denoiser of the prior p(z | c).
            likelihood: likelihood of the step's observations y.

        Returns:
            Denoiser that computes E[z | z_s, c, y], or an approximation of it.
        """


class GuidanceDirections(NamedTuple):
    """Effect of the observations at one noise level, along k directions of whitened observation space.

    Path weights need it. The directions are u_i, r is the whitened residual at the denoised state, `H = -dr/dx`,
    `J = dD/dz_s`, S the prior's scale and C its noise covariance.

    Attributes:
        basis: directions u_i, orthonormal or zero, shape (k, m).
        residual: inner products `<u_i, r>`, shape (k,).
        covariance: inner products `<u_i, (I + s^2 H S J C S H^T) u_j>`, shape (k, k).
        pulled: products `J^T S H^T u_i`, each of the shape of the latent, leading axis k.
    """

    basis: Float[Array, "k m"]
    residual: Float[Array, " k"]
    covariance: Float[Array, "k k"]
    pulled: Float[Array, "k ..."]


class ObservingDenoiser(Denoiser):
    """Abstract posterior denoiser that also returns the directions along which it has seen the observations.

    Attributes:
        base: denoiser of the prior.
    """

    base: eqx.AbstractVar[PriorDenoiser]

    @abc.abstractmethod
    def directions(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceDirections, GuidanceState]:
        """Return the prior's denoised value, and separately the effect of the observations on it.

        Args:
            z_s: noised latent.
            noise_level: s, a positive scalar.
            guidance_state: guidance state after the noise level before.

        Returns:
            (the unguided D(z_s, s), of the shape of `z_s`; the directions; guidance state for the next noise level).
        """


class MMPS(Guidance):
    r"""Moment-matching posterior sampling (Rozet et al. 2024, arXiv 2405.13712, Section 4).

    At each noise level s the guided denoiser is

    $$
    D_y = D + s^2 C J^T S H^T v, \qquad (I + s^2 H S J C S H^T) v = r,
    $$

    where z_s is the noised latent, D = E[z | z_s, c] the denoiser for a conditioning c, r = R^{-1/2} (y - h(x)) the
    whitened residual of the observations y at the state x = a + S D, H = -dr/dx, J = dD/dz_s, S is the prior's scale
    and C its noise covariance. It is exact for a Gaussian p(z | c) and a linear h.

    Args:
        solver: solver of the linear system in observation space.
        noise: noise whose covariance C the guidance takes; None takes the prior's own, which is right.
            `MMPS(noise=WhiteNoise())` is the published method, C = I, for comparison. It is wrong if the prior's noise
            is not white (docs/method.md, the noise on the sphere). Samplers always draw the prior's noise.

    Raises:
        TypeError: an argument is of the wrong kind.
    """

    solver: LinearSolver = KrylovSolve()
    noise: Noise | None = None

    @staticmethod
    def cheap() -> MMPS:
        """Return the earlier default: two products of the solver at every noise level, whether or not they suffice."""
        return MMPS(KrylovSolve(products=2))

    def __check_init__(self) -> None:
        require(self.solver, LinearSolver, self, "solver", "ndda.diffusion.KrylovSolve(products=2)")
        if self.noise is not None:
            require(self.noise, Noise, self, "noise", "ndda.diffusion.WhiteNoise()")

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """Build the moment-matched denoiser of p(z | c, y)."""
        noise = denoiser.prior.noise if self.noise is None else self.noise
        return MMPSDenoiser(denoiser, likelihood, self.solver, noise)


class MMPSDenoiser(ObservingDenoiser):
    """Posterior denoiser by moment matching, built by `MMPS`.

    One call costs one forward pass, and one vjp for each product that the solver makes.

    Attributes:
        base: denoiser of the prior.
        likelihood: likelihood of the step's observations.
        solver: solver of the linear system.
        noise: noise whose covariance C the guidance takes.
    """

    base: PriorDenoiser
    likelihood: Likelihood
    solver: LinearSolver
    noise: Noise

    def init(self) -> GuidanceState:
        """Return a guidance state with no passes and the solver's first warm start."""
        return initial_guidance_state(self.base, self.likelihood, self.solver)

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """Return the guided D_y(z_s, s), of the shape of `z_s`, and the next guidance state."""
        # The solver combines the moved latents s^2 C J^T S H^T v, so that the answer needs no further product with C.
        denoised, solution, _, guidance_state = self._solve(z_s, noise_level, guidance_state, lambda _, moved: moved)
        return denoised + solution.image, guidance_state

    def directions(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceDirections, GuidanceState]:
        """Return the unguided D(z_s, s), the directions that the solver has seen, and the next guidance state.

        Raises:
            TypeError: the solver does not return its directions.
        """
        denoised, solution, residual, guidance_state = self._solve(
            z_s, noise_level, guidance_state, lambda pulled, _: pulled
        )
        if solution.directions is None:
            raise TypeError(
                f"{type(self.solver).__name__} does not return the directions it has seen, which path weights need; "
                "return Solution(..., directions=...) from it, or give ndda.MMPS another solver: "
                "ndda.diffusion.KrylovSolve() or ndda.diffusion.DirectSolve()."
            )
        basis, columns, images = solution.directions
        return denoised, GuidanceDirections(basis, basis @ residual, basis @ columns.T, images), guidance_state

    def _solve(
        self,
        z_s: Float[Array, ...],
        noise_level: Float[Array, ""],
        guidance_state: GuidanceState,
        image: Callable[[Array, Array], Array],
    ) -> tuple[Array, Solution, Array, GuidanceState]:
        """Solve the linear system at one noise level.

        Args:
            z_s: noised latent.
            noise_level: s, a positive scalar.
            guidance_state: guidance state after the noise level before.
            image: function (p, s^2 C p) -> image of v that the solution combines, with p = J^T S H^T v.

        Returns:
            (D; the solution v of the linear system; the residual r; the next guidance state).
        """
        denoised, pull = self.base.with_pullback(z_s, noise_level)

        # For a true denoiser J C is symmetric, so S J C S = S C J^T S: a product needs one vjp and no jvp.
        def covariance(w: Array) -> tuple[Array, Array]:
            pulled = pull(w)
            moved = noise_level**2 * self.noise.covariance_product(pulled)
            return moved, image(pulled, moved)

        solution, residual, products, guidance_state = solve_system(
            self.base, self.likelihood, self.solver, denoised, covariance, guidance_state
        )
        passes = NetworkPasses.of(forward=1)._replace(vjp=products)
        return denoised, solution, residual, guidance_state.plus(passes)


def state_of(base: PriorDenoiser, denoised: Float[Array, ...]) -> Float[Array, ...]:
    """Return the state a + S D of a denoised latent D, shape of the state."""
    return base.prior.location(base.conditioning) + base.prior.scale(base.conditioning) * denoised


def coordinates_near(base: PriorDenoiser, likelihood: Likelihood, x: Float[Array, ...]) -> Coordinates | None:
    """Return the coordinates of the observations that are not Gaussian, near the state x; None if all are Gaussian.

    Each component of the state is given the spread S. No network pass is made.
    """
    spread = jnp.broadcast_to(base.prior.scale(base.conditioning), x.shape)
    return likelihood.coordinates(x, spread[None] * probe_signs(x.shape, x.dtype))


def initial_guidance_state(base: PriorDenoiser, likelihood: Likelihood, solver: LinearSolver) -> GuidanceState:
    """Return a guidance state with no passes and the solver's first warm start.

    The warm start has as many unknowns as the likelihood has residuals.
    """
    location = base.prior.location(base.conditioning)
    residual = _residual_shape(likelihood, location)
    dtype = jnp.result_type(residual.dtype, location.dtype)  # observations may have another precision than the state
    return base.init()._replace(warm_start=solver.init(residual.shape[0], dtype), solver_residual=jnp.zeros((), dtype))


def num_residuals(likelihood: Likelihood, state: Float[Array, ...] | jax.ShapeDtypeStruct) -> int:
    """Count the residuals of a likelihood in which pseudo observations replace all observations that are not Gaussian.

    Args:
        likelihood: likelihood of the step's observations.
        state: a state, or its shape and dtype; nothing is computed.
    """
    return _residual_shape(likelihood, state).shape[0]


def _residual_shape(likelihood: Likelihood, state: Float[Array, ...] | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of the residuals that `num_residuals` counts."""

    def residual(x: Array) -> Array:
        coordinates = likelihood.coordinates(x, probe_signs(x.shape, x.dtype))
        variances = None if coordinates is None else jnp.ones(coordinates.observed.shape, x.dtype)
        return likelihood.around(coordinates, variances).residual(x)

    found: jax.ShapeDtypeStruct = jax.eval_shape(residual, state)
    return found


def linear_system(
    base: PriorDenoiser,
    likelihood: Likelihood,
    solver: LinearSolver,
    denoised: Float[Array, ...],
    covariance: Callable[[Array], tuple[Array, Array]],
) -> tuple[Float[Array, " m"], Product, int]:
    """Build the linear system of a guidance that approximates the latent as N(D, V) at one noise level.

    Args:
        base: denoiser of the prior.
        likelihood: likelihood of the step's observations.
        solver: solver whose `diagonal` estimates the variances of coordinates, if the likelihood is not Gaussian.
        denoised: D, shape of the latent.
        covariance: function w -> (V w, image of w), where the image is what the guidance needs for `w = S H^T v`.

    Returns:
        (the residual r, shape (m,); the product v -> ((I + H S V S H^T) v, image of S H^T v); the number of calls of
        `covariance` made so far).
    """
    scale = base.prior.scale(base.conditioning)
    x = state_of(base, denoised)

    def of_state(w: Array) -> tuple[Array, Array]:
        moved, image = covariance(scale * w)
        return scale * moved, image

    found = observed_system(likelihood, solver, x, coordinates_near(base, likelihood, x), of_state)
    return found.residual, found.product, found.calls


class ObservedSystem(NamedTuple):
    """Linear system (I + H V H^T) v = r of the observations near a state x, with V the covariance of the state.

    Attributes:
        residual: whitened residual r at x, shape (m,).
        product: function v -> ((I + H V H^T) v, image of H^T v).
        push: function from a direction of the state to its product with H = -dr/dx, shape (m,).
        calls: number of products with V made so far.
    """

    residual: Float[Array, " m"]
    product: Product
    push: Callable[[Float[Array, ...]], Float[Array, " m"]]
    calls: int


def observed_system(
    likelihood: Likelihood,
    solver: LinearSolver,
    x: Float[Array, ...],
    coordinates: Coordinates | None,
    covariance: Callable[[Array], tuple[Array, Array]],
) -> ObservedSystem:
    """Build the linear system of the observations near a state.

    Args:
        likelihood: likelihood of the step's observations.
        solver: solver whose `diagonal` estimates the variances of coordinates, if the likelihood is not Gaussian.
        x: state at which r and H are taken.
        coordinates: coordinates of the observations that are not Gaussian, with mean 0; None if all are Gaussian.
        covariance: function w -> (V w, image of w), where the image is what the caller needs for `w = H^T v`.
    """

    def seen_by(observe: Callable[[Array], Array]) -> tuple[Array, Product, Callable[[Array], Array]]:
        """Return observe(x), v -> (H V H^T v, image of H^T v) and v -> H v, with H the derivative of `observe`."""
        value, push = jax.linearize(observe, x)
        transposed = jax.linear_transpose(push, x)

        def product(v: Array) -> tuple[Array, Array]:
            moved, image = covariance(transposed(v)[0])
            return push(moved), image

        return value, product, push

    # Observations that are not Gaussian: estimate the variances of their coordinates, to replace them by Gaussian ones.
    variances, extra = None, 0
    if coordinates is not None:
        _, of_coordinates, _ = seen_by(coordinates)
        size = len(coordinates.observed)
        variances = solver.diagonal(lambda v: of_coordinates(v)[0], size, x.dtype)
        extra = solver.diagonal_products(size)
    local = likelihood.around(coordinates, variances)
    # H = -dr/dx, so it is the derivative of -r.
    negative_residual, product, push = seen_by(lambda x: -local.residual(x))

    def system(v: Array) -> tuple[Array, Array]:
        seen, image = product(v)
        return v + seen, image

    return ObservedSystem(-negative_residual, system, push, extra)


def solve_system(
    base: PriorDenoiser,
    likelihood: Likelihood,
    solver: LinearSolver,
    denoised: Float[Array, ...],
    covariance: Callable[[Array], tuple[Array, Array]],
    guidance_state: GuidanceState,
) -> tuple[Solution, Float[Array, " m"], Int[Array, ""], GuidanceState]:
    """Build the system of `linear_system` and solve it, from the warm start in the guidance state.

    Args:
        base: denoiser of the prior.
        likelihood: likelihood of the step's observations.
        solver: solver of the system.
        denoised: D, shape of the latent.
        covariance: function w -> (V w, image of w), as `linear_system` takes it.
        guidance_state: guidance state before this noise level.

    Returns:
        (the solution; the residual r, shape (m,); the number of calls of `covariance`; the guidance state with the next
        warm start and the largest solver residual). The caller counts the network passes.
    """
    residual, system, extra = linear_system(base, likelihood, solver, denoised, covariance)
    solution, warm_start = solver(system, residual, guidance_state.warm_start)
    guidance_state = guidance_state._replace(
        warm_start=warm_start,
        solver_residual=jnp.maximum(guidance_state.solver_residual, solution.residual),
    )
    return solution, residual, solution.products + extra, guidance_state
