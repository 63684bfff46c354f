"""The density of a diffusion prior, by its probability-flow ODE.

z_s = z + s e with e ~ N(0, C) has the same marginals as the ODE dz/ds = (z - D(z, s)) / s, along which d log p / ds =
-(d - tr J) / s, J = dD/dz, whatever C is (Song et al. 2021, arXiv 2011.13456, eq. 13 and 39, in the form of Karras et
al. 2022, eq. 1). Here, with t = log s, q^2 = 1 + s^2 and w = z / q, it is integrated upwards as

    dw/dt = (z / q^2 - D) / q,        log p(z_0) = log p(z_T) + d log(q_T / q_0) + int (d / q^2 - tr J) dt,

whose right-hand sides vanish at both ends, and everywhere for z ~ N(0, I). At the ends,

- s = 0: the flow is regular in s^2, dz/d(s^2) = (z - D) / (2 s^2); one Euler step, z_0 = z + (z - D(z, s_0)) / 2 with
  log-determinant (d - tr J) / 2, goes from z to the lowest level s_0. What is left is of order (s_0^2 / v)^2 where v is
  the least variance of z, instead of the s_0^2 / v of taking the density of z_{s_0} for that of z.
- s = T: z_T is all but Gaussian, and for a Gaussian z ~ N(m, V) Tweedie's formula gives its exponent without V,

      log p(z_T) = -1/2 (z_T - m)^T C^-1 (z_T - D(z_T, T)) / T^2 - 1/2 log det(2 pi T^2 C) - 1/2 tr J,

  exact but for m = D(0, T) (error V / T^2 of m) and the second order of log det(I - J) = -tr J - ...
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.prior import Conditioning, DiffusionPrior
from numpyro_diffusion_da.diffusion.schedule import range_of_levels


class Trace(eqx.Module):
    """tr J of a linear map, known by its products."""

    @abc.abstractmethod
    def products(self, size: int) -> int:
        """Products with J that one trace takes, for a J of `size` rows."""

    @abc.abstractmethod
    def __call__(self, product: Callable[[Array], Array], like: Float[Array, ...], index: Int[Array, ""]) -> Array:
        """The trace.

        Args:
            product: v -> J v, of the shape of `like` in and out.
            like: an array of the shape and dtype that J acts on; its values are not used.
            index: which trace of the run this is.
        """


class ExactTrace(Trace):
    """One product a component: exact, for small states. All products are made at once."""

    def products(self, size: int) -> int:
        """`size`."""
        return size

    def __call__(self, product: Callable[[Array], Array], like: Float[Array, ...], index: Int[Array, ""]) -> Array:
        """sum_i e_i^T J e_i."""
        units = jnp.eye(like.size, dtype=like.dtype).reshape(like.size, *like.shape)
        return jnp.trace(jax.vmap(product)(units).reshape(like.size, like.size))


class Hutchinson(Trace):
    """The mean of v^T J v over random signs v (Hutchinson 1990): unbiased, for states of any size.

    A log-density is linear in its traces, so it is unbiased too, for that with `ExactTrace`; its exponential is not.
    The probes differ from level to level, and are the same at every value and state: the log-density is a fixed,
    smooth function of both, and errors partly cancel in differences.

    Args:
        rng_key: of the probes; a concrete key, not one made inside jit.
        probes: products with J a level.

    Raises:
        ValueError: fewer than one probe.
    """

    rng_key: PRNGKeyArray
    probes: int = eqx.field(static=True, default=8)

    def __check_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"Hutchinson got probes={self.probes}; give at least 1.")

    def products(self, size: int) -> int:
        """`probes`."""
        return self.probes

    def __call__(self, product: Callable[[Array], Array], like: Float[Array, ...], index: Int[Array, ""]) -> Array:
        """The mean of v^T J v."""
        key = jax.random.fold_in(self.rng_key, index)
        signs = jax.random.rademacher(key, (self.probes, *like.shape), like.dtype)
        return jnp.sum(signs * jax.vmap(product)(signs)) / self.probes


class ProbabilityFlow(eqx.Module):
    """log p(x' | c) by the probability-flow ODE, a fourth-order Runge-Kutta step from each noise level to the next.

    Levels are equally spaced in log s. The integral of the trace takes one trace a level (the trapezoid rule, which
    converges fast where the integrand vanishes at both ends). Error and cost against the number of levels are tabulated
    in docs/method.md, "The density". The error grows where a direction of z has a standard deviation near or below the
    lowest level: the diffusion cannot resolve it there. What is computed is the density of the flow, which samplers
    follow up to their own error.

    Args:
        num_levels: noise levels, at least 2.
        trace: `ExactTrace()`, or `Hutchinson(rng_key, probes)` where the state is large.
        lowest: smallest noise level; None takes the prior's.
        highest: largest noise level; None takes the prior's.

    Raises:
        ValueError: fewer than two levels; or, when used, a range that is not 0 < lowest < highest.
    """

    num_levels: int = eqx.field(static=True, default=24)
    trace: Trace = ExactTrace()
    lowest: float | None = eqx.field(static=True, default=None)
    highest: float | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.num_levels < 2:
            raise ValueError(f"ProbabilityFlow got num_levels={self.num_levels}; give at least 2.")

    def levels(self, noise_range: tuple[float, float]) -> np.ndarray:
        """Noise levels, lowest first, shape (num_levels,)."""
        lowest, highest = range_of_levels(self.lowest, self.highest, noise_range)
        return np.geomspace(lowest, highest, self.num_levels)

    def latent(
        self, prior: DiffusionPrior, conditioning: Conditioning, z: Float[Array, ...]
    ) -> tuple[Float[Array, ""], NetworkPasses]:
        """log p(z | c) of the latent, and the network passes made (conditioning not counted).

        Raises:
            NotImplementedError: the prior's noise has no inverse covariance.
        """
        levels = self.levels(prior.noise_range)
        lowest, highest = (jnp.asarray(s, z.dtype) for s in (levels[0], levels[-1]))
        size, width = z.size, float(np.log(levels[1] / levels[0]))
        # In double precision: q of the level, of the middle of the step, and of its end; the end corrections' weights.
        nodes = np.stack([levels[:-1], np.sqrt(levels[:-1] * levels[1:]), levels[1:]], axis=1)
        weights = np.full(self.num_levels, width)
        weights[[0, -1]] *= 0.5

        def denoise(z: Array, level: Array) -> Array:
            return prior.denoise(z, level, conditioning)

        def slope(w: Array, level: Array, q: Array) -> Array:
            return (w / q - denoise(w * q, level)) / q

        def traced(z: Array, level: Array, index: Array) -> tuple[Array, Array]:
            denoised, product = jax.linearize(lambda z: denoise(z, level), z)
            return denoised, self.trace(product, z, index)

        def step(carry: tuple[Array, Array], at: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
            w, integral = carry
            level, q, weight, index = at
            denoised, trace = traced(w * q[0], level[0], index)
            k1 = (w / q[0] - denoised) / q[0]
            k2 = slope(w + 0.5 * width * k1, level[1], q[1])
            k3 = slope(w + 0.5 * width * k2, level[1], q[1])
            k4 = slope(w + width * k3, level[2], q[2])
            w = w + width / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
            # At the lowest level the same trace also serves the step from s = 0.
            integral = integral + weight * (size / q[0] ** 2 - trace) + jnp.where(index == 0, 0.5 * (size - trace), 0.0)
            return (w, integral), None

        start = z + 0.5 * (z - denoise(z, lowest))
        scales = np.sqrt(1.0 + levels**2)
        scanned = (nodes, np.sqrt(1.0 + nodes**2), weights[:-1])
        at = (*(jnp.asarray(v, z.dtype) for v in scanned), jnp.arange(self.num_levels - 1))
        (w, integral), _ = jax.lax.scan(step, (start / scales[0].item(), jnp.zeros((), z.dtype)), at)
        end = w * scales[-1].item()
        denoised, trace = traced(end, highest, jnp.asarray(self.num_levels - 1))
        integral = integral + weights[-1].item() * (size / scales[-1].item() ** 2 - trace)
        mean = denoise(jnp.zeros_like(z), highest)
        whitened, log_determinant = prior.noise.precision_product((end - denoised) / highest)
        exponent = jnp.vdot((end - mean) / highest, whitened)
        terminal = -0.5 * (exponent + log_determinant + trace)
        constant = np.log(scales[-1] / scales[0]) - np.log(levels[-1]) - 0.5 * np.log(2 * np.pi)
        forward = 4 * (self.num_levels - 1) + 3
        passes = NetworkPasses.of(forward=forward, jvp=self.num_levels * self.trace.products(size))
        return terminal + integral + size * float(constant), passes

    def __call__(
        self, prior: DiffusionPrior, conditioning: Conditioning, x: Float[Array, ...]
    ) -> tuple[Float[Array, ""], NetworkPasses]:
        """log p(x | c) = log p(z | c) - sum log |S|, z = S^-1 (x - a), and the network passes made.

        Args:
            prior: the diffusion prior.
            conditioning: what `prior.condition` gave.
            x: one state, without batch axes.

        Raises:
            NotImplementedError: the prior's noise has no inverse covariance.
            RuntimeError: a component of S is zero (equinox.error_if).
        """
        location = prior.location(conditioning)
        scale = jnp.broadcast_to(prior.scale(conditioning), x.shape)
        scale = eqx.error_if(
            scale,
            scale == 0.0,
            "a component of the prior's scale S is zero: it is known without error, and the state has no density; "
            "leave such components out of the prior's state.",
        )
        log_prob, passes = self.latent(prior, conditioning, (x - location) / scale)
        counted = passes.plus(NetworkPasses.of(forward=prior.conditioning_passes))
        return log_prob - jnp.sum(jnp.log(jnp.abs(scale))), counted
