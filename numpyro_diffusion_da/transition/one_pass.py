r"""Transition of the state by an emulator that makes it from noise in one pass.

The next state is $x' = f(c, e)$ with $e \sim N(0, I)$, so a filter can guide the noise instead of the state. Let r be
the whitened residual of the observations, and $G = -dr/de$ at some $e_i$. The linearized posterior of e is the Gaussian

$$
q(e) = N\big(G^T (I + G G^T)^{-1} (r(e_i) + G e_i), \; (I + G^T G)^{-1}\big) .
$$

Products with G and its transpose are a jvp and a vjp of the network, and no product with a matrix of the size of the
state or the noise is needed. For an f and an observation operator that are linear, q is the posterior.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_diffusion_da.arguments import count
from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.guidance import MMPS, Guidance, ObservedSystem, num_residuals, observed_system
from numpyro_diffusion_da.diffusion.linear_solve import DirectSolve, KrylovSolve, LinearSolver
from numpyro_diffusion_da.diffusion.memory import backward_bytes
from numpyro_diffusion_da.diffusion.noise import standard_normal
from numpyro_diffusion_da.diffusion.prior import Conditioning, OnePassPrior
from numpyro_diffusion_da.observation.likelihood import GaussianLikelihood, Likelihood, probe_signs
from numpyro_diffusion_da.transition.base import Centering, DrawRecord, Dynamics, Moments, centered

SPREAD_PROBES = 4
"""Number of random directions of the noise that measure how far each component of the state moves."""


class _Linearized(NamedTuple):
    """Emulator and observations, linearized at one value of the noise.

    Attributes:
        system: linear system of the observations, whose images are G^T v, of the shape of the noise.
        slope: function from a direction of the noise to its product with G, shape (m,).
        jvps: jvps of the network that were made besides the products of the system.
    """

    system: ObservedSystem
    slope: Callable[[Float[Array, ...]], Float[Array, " m"]]
    jvps: int


class OnePassDynamics(Dynamics):
    """Transition p(x' | c) of the state by an emulator x' = f(c, e), e ~ N(0, I).

    Args:
        prior: the emulator.
        conditioning: return value of `prior.condition`.
        iterations: number of times that a guided draw linearizes the emulator. One is exact for an f and an observation
            operator that are linear; each further one starts where the one before ended (Gauss-Newton).
    """

    prior: OnePassPrior
    conditioning: Conditioning
    iterations: int = eqx.field(static=True, default=2, converter=count("OnePassDynamics", "iterations"))

    def _generate(self, noise: Float[Array, ...]) -> Float[Array, ...]:
        """Return the state f(c, e) that the emulator makes from a noise e."""
        return self.prior.generate(noise, self.conditioning)

    def _center(self) -> Float[Array, ...]:
        """Return the noise e = 0, around which the emulator is linearized for its moments."""
        return jnp.zeros(self.prior.noise_shape)

    def _at_center(self) -> tuple[Array, Callable[[Array], Array]]:
        """Return f(c, 0), and the product of a direction of the noise with J = df/de there."""
        return jax.linearize(self._generate, self._center())

    def _passes(self, forward: int = 0, jvp: int = 0, vjp: int = 0) -> NetworkPasses:
        """Count calls of the emulator in network passes."""
        calls = self.prior.generator_passes
        return NetworkPasses.of(forward=calls * forward, jvp=calls * jvp, vjp=calls * vjp)

    def moments(self, noise_level: float | None = None) -> Moments:
        """Return f(c, 0), and products with J J^T where J = df/de at e = 0; `noise_level` is ignored.

        They are mean and covariance for an f that is linear in e, and their linearization for any other. It costs one
        forward pass, and one vjp and one jvp per product.
        """
        mean, push = self._at_center()
        transposed = jax.linear_transpose(push, self._center())

        def covariance_product(v: Array) -> Array:
            return push(transposed(v)[0])

        return Moments(mean, covariance_product, self._passes(forward=1), self._passes(jvp=1, vjp=1))

    def tangents(self) -> Float[Array, "k ..."]:
        """Return random signs times the spread of each component, leading axis k; it costs `SPREAD_PROBES` jvps."""
        return self._tangents(*self._at_center())

    def _tangents(self, x: Float[Array, ...], push: Callable[[Array], Array]) -> Float[Array, "k ..."]:
        """Return random signs of the shape of x times the spread of each component under `push`, leading axis k."""
        moved = jax.vmap(push)(probe_signs(self.prior.noise_shape, x.dtype)[:SPREAD_PROBES])
        return jnp.sqrt(jnp.mean(moved**2, axis=0))[None] * probe_signs(x.shape, x.dtype)

    def tangent_passes(self) -> NetworkPasses:
        """Return the network passes of `tangents`; its forward pass is that of `moments`."""
        return self._passes(jvp=SPREAD_PROBES)

    def random_numbers(self, rng_key: PRNGKeyArray, likelihood: Likelihood | None = None) -> tuple[Array, ...]:
        """Return the noise e, and with a likelihood the errors of the perturbed observations, shape (m,)."""
        if likelihood is None:
            return (self._white(rng_key),)
        noise_key, error_key = jax.random.split(rng_key)
        m = num_residuals(likelihood, jax.eval_shape(self._generate, self._center()))
        return self._white(noise_key), jax.random.normal(error_key, (m,))

    def _white(self, rng_key: PRNGKeyArray) -> Float[Array, ...]:
        """Return white noise e."""
        return standard_normal(rng_key, self.prior.noise_shape, jnp.zeros(()).dtype)

    def draw(self, rng_key: PRNGKeyArray, centering: Centering | None = None) -> tuple[Float[Array, ...], DrawRecord]:
        """Draw x' = f(c, e), by one forward pass, and return it with its record."""
        (noise,) = centered(self.random_numbers(rng_key), centering)
        return self._generate(noise), DrawRecord(self._passes(forward=1), jnp.zeros(()))

    def conditional_draw(
        self,
        rng_key: PRNGKeyArray,
        likelihood: Likelihood,
        guidance: Guidance,
        centering: Centering | None = None,
    ) -> tuple[Float[Array, ...], DrawRecord]:
        r"""Draw x' = f(c, e) with a noise e that is guided by the observations.

        The noise is the minimum of $|e - \xi|^2 + |r(e) - \epsilon|^2$ for white $\xi$ and $\epsilon$, found by
        Gauss-Newton steps from $\xi$ (randomized maximum likelihood; Oliver, He & Reynolds 1996). It is a draw from the
        posterior for an f and an observation operator that are linear, and close to it where q changes slowly.

        Each step costs one forward pass, and a vjp and a jvp for each product of the solver; each step after the first
        costs one more jvp. The state costs one more forward pass.

        Args:
            rng_key: random key.
            likelihood: likelihood of the step's observations y.
            guidance: an `MMPS`, whose solver is used.
            centering: change of the random numbers; None for none.

        Returns:
            (x', shape of the state; record of the draw).

        Raises:
            TypeError: `guidance` is one that only a diffusion can have.
        """
        solver = solver_of(guidance)
        noise, error = centered(self.random_numbers(rng_key, likelihood), centering)
        at, made, largest = noise, self._passes(forward=1), jnp.zeros(())
        warm_start = solver.init(len(error), error.dtype)
        for iteration in range(self.iterations):
            near = self._linearized(at, likelihood, solver)
            departure = near.system.residual - error
            made = made.plus(self._passes(forward=1, jvp=near.jvps))
            if iteration > 0:
                departure = departure + near.slope(at - noise)
                made = made.plus(self._passes(jvp=1))
            solution, warm_start = solver(near.system.product, departure, warm_start)
            made = made.plus(self._products(solution.products + near.system.calls))
            at, largest = noise + solution.image, jnp.maximum(largest, solution.residual)
        return self._generate(at), DrawRecord(made, largest)

    def weighted_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], Float[Array, ""], DrawRecord]:
        r"""Draw e from the linearized posterior q, and return x' = f(c, e) with its log-weight.

        The log-weight is $\log w = \log p(y \mid f(c, e)) + \log N(e; 0, I) - \log q(e)$. Its density is exact, so the
        mean of w is p(y | c) for any f. A solver with few products gives a wider q that has seen the observations along
        its directions only. A `DirectSolve` takes one jvp for each element of the noise in place of its products, if
        the noise has fewer elements than there are observations.

        Args:
            rng_key: random key.
            likelihood: likelihood of the step's observations y.
            guidance: an `MMPS`, whose solver is used. It must return its directions.

        Returns:
            (x', shape of the state; log w, a scalar; record of the draw).

        Raises:
            TypeError: `guidance` is one that only a diffusion can have, or its solver does not return its directions.
        """
        solver = solver_of(guidance)
        white, error = self.random_numbers(rng_key, likelihood)
        at, made, largest = self._center(), self._passes(forward=1), jnp.zeros(())
        warm_start = solver.init(len(error), error.dtype)
        size = at.size
        for iteration in range(self.iterations):
            near = self._linearized(at, likelihood, solver)
            residual = near.system.residual
            made = made.plus(self._passes(forward=1, jvp=near.jvps))
            if iteration > 0:
                residual = residual + near.slope(at)  # the linearization at e = 0
                made = made.plus(self._passes(jvp=1))
            if isinstance(solver, DirectSolve) and size < len(error):
                units = jnp.eye(size, dtype=at.dtype).reshape(size, *at.shape)
                basis, upper = jnp.linalg.qr(jax.vmap(near.slope)(units).T)
                basis, images = basis.T, upper
                made = made.plus(self._passes(jvp=size)).plus(self._products(jnp.asarray(near.system.calls)))
            else:
                solution, warm_start = solver(near.system.product, residual, warm_start)
                if solution.directions is None:
                    raise TypeError(
                        f"{type(solver).__name__} does not return the directions it has seen, which the weight of a "
                        "draw needs; give ndda.MMPS another solver: ndda.diffusion.KrylovSolve() or "
                        "ndda.diffusion.DirectSolve()."
                    )
                basis, _, images = solution.directions
                made = made.plus(self._products(solution.products + near.system.calls))
                largest = jnp.maximum(largest, solution.residual)
            # G along the directions that were seen, and the residual at e = 0 along them.
            seen, along = images.reshape(len(images), size), basis @ residual
            factor = jnp.linalg.cholesky(jnp.eye(len(seen), dtype=seen.dtype) + seen @ seen.T)
            center = seen.T @ _solve(factor, along)
            at = center.reshape(at.shape)
        white = white.reshape(-1)
        drawn = white + seen.T @ _solve(factor, along - seen @ white - basis @ error)
        off = drawn - center
        log_ratio = 0.5 * (jnp.vdot(off, off) + jnp.sum((seen @ off) ** 2) - jnp.vdot(drawn, drawn))
        log_ratio = log_ratio - jnp.sum(jnp.log(jnp.diagonal(factor)))
        x = self._generate(drawn.reshape(at.shape))
        return x, likelihood.log_prob(x) + log_ratio, DrawRecord(made, largest)

    def _products(self, products: Int[Array, ""]) -> NetworkPasses:
        """Return the network passes of products with G G^T, each a vjp and a jvp."""
        calls = products * self.prior.generator_passes
        none = jnp.zeros_like(calls)
        return NetworkPasses(forward=none, jvp=calls, vjp=calls, conditioning=none)

    def _linearized(self, at: Float[Array, ...], likelihood: Likelihood, solver: LinearSolver) -> _Linearized:
        """Linearize the emulator and the observations at a value of the noise.

        Observations that are not Gaussian are replaced by the Gaussian ones that have the same effect on the linearized
        emulator without observations. Each component of the state is given the spread that it has there.
        """
        x, push = jax.linearize(self._generate, at)
        transposed = jax.linear_transpose(push, at)

        def covariance(w: Array) -> tuple[Array, Array]:
            image = transposed(w)[0]
            return push(image), image

        coordinates, jvps = None, 0
        if not isinstance(likelihood, GaussianLikelihood):
            coordinates = likelihood.coordinates(x - push(at), self._tangents(x, push))
            jvps = SPREAD_PROBES + 1
        system = observed_system(likelihood, solver, x, coordinates, covariance)
        return _Linearized(system, lambda direction: system.push(push(direction)), jvps)

    def working_bytes(self, observations: int = 0) -> int:
        """Estimate how many bytes one `conditional_draw` needs.

        The estimate is what the network's backward pass keeps, ten states, and what the default solver keeps: for each
        of its products a noise and two vectors in the space of the observations.

        Args:
            observations: number of observed values m.
        """
        center = self._center()
        at = jax.ShapeDtypeStruct(center.shape, center.dtype)
        state = jax.eval_shape(self._generate, at)
        products = min(KrylovSolve().max_products, observations)
        numbers = 10 * state.size + products * center.size + 2 * products * observations
        return backward_bytes(self._generate, at) + numbers * state.dtype.itemsize


def solver_of(guidance: Guidance) -> LinearSolver:
    """Return the solver of an `MMPS`, which is the guidance that an emulator of one pass can have.

    Raises:
        TypeError: `guidance` is another one, which changes the denoiser of a diffusion.
    """
    if not isinstance(guidance, MMPS) or guidance.noise is not None:
        raise TypeError(
            f"{guidance!r} guides the denoiser of a diffusion, and a OnePassTransition has none; use ndda.MMPS() or "
            "ndda.MMPS(solver), whose solver guides the noise of the pass."
        )
    return guidance.solver


def _solve(factor: Float[Array, "k k"], rhs: Float[Array, " k"]) -> Float[Array, " k"]:
    """Solve a linear system by the lower Cholesky factor of its matrix."""
    return jax.scipy.linalg.cho_solve((factor, True), rhs)
