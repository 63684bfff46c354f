r"""Density of a diffusion prior, from its probability-flow ODE.

The noised latent `z_s = z + s e` with `e ~ N(0, C)` has the same marginal distributions as the ODE
`dz/ds = (z - D(z, s)) / s`. Along the ODE, `d log p / ds = -(d - tr J) / s` with `J = dD/dz` and d the number of
components, for any C (Song et al. 2021, arXiv 2011.13456, eq. 13 and 39, in the form of Karras et al. 2022, eq. 1).
With t = log s, `q^2 = 1 + s^2` and w = z / q, it is integrated upwards from the lowest to the highest noise level T:

$$
\frac{dw}{dt} = \frac{z / q^2 - D}{q}, \qquad
\log p(z_0) = \log p(z_T) + d \log \frac{q_T}{q_0} + \int \left( \frac{d}{q^2} - \operatorname{tr} J \right) dt .
$$

The right-hand sides vanish at both ends, and everywhere for z ~ N(0, I). The ends are treated as follows.

- At s = 0 the flow is regular in s^2: `dz/d(s^2) = (z - D) / (2 s^2)`. One Euler step goes from z to
  `z + (z - D(z, s_0)) / 2` at the lowest level s_0, with log-determinant `(d - tr J) / 2`. Its error is of order
  `(s_0^2 / v)^2`, where v is the least variance of z. Without the step, the density at the lowest level would stand for
  that of z, with an error of order `s_0^2 / v`.
- At s = T the distribution of z_T is nearly Gaussian. For a Gaussian z ~ N(m, V), Tweedie's formula gives the exponent
  without V:

$$
\log p(z_T) = -\frac{(z_T - m)^T C^{-1} (z_T - D(z_T, T))}{2 T^2}
- \tfrac12 \log \det(2 \pi T^2 C) - \tfrac12 \operatorname{tr} J .
$$

This is exact except for two errors: m is taken to be D(0, T), with a relative error V / T^2, and the terms of second
and higher order in `log det(I - J) = -tr J - ...` are left out.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_diffusion_da.arguments import count, require, require_count, require_key
from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.prior import Conditioning, DiffusionPrior
from numpyro_diffusion_da.diffusion.schedule import level, range_of_levels


class Trace(eqx.Module):
    """Abstract computation of the trace of a linear map J that is known by its products."""

    @abc.abstractmethod
    def products(self, size: int) -> int:
        """Return how many products with J one trace takes, for a J of `size` rows."""

    @abc.abstractmethod
    def __call__(self, product: Callable[[Array], Array], like: Float[Array, ...], index: Int[Array, ""]) -> Array:
        """Compute tr J, exactly or as an estimate.

        Args:
            product: function v -> J v, of the shape of `like` in and out.
            like: array of the shape and dtype that J acts on; its values are not used.
            index: number of this trace within the run; an estimate may draw other probes for another number.

        Returns:
            A scalar.
        """


class ExactTrace(Trace):
    """Exact trace from one product for each component, for small states; all products are made at once."""

    def products(self, size: int) -> int:
        """Return `size`: one product for each component."""
        return size

    def __call__(self, product: Callable[[Array], Array], like: Float[Array, ...], index: Int[Array, ""]) -> Array:
        """Return the exact trace, the sum of e_i^T J e_i over the unit vectors e_i."""
        units = jnp.eye(like.size, dtype=like.dtype).reshape(like.size, *like.shape)
        return jnp.trace(jax.vmap(product)(units).reshape(like.size, like.size))


class Hutchinson(Trace):
    """Unbiased estimate of a trace for states of any size, the mean of v^T J v over random signs v (Hutchinson 1990).

    A log-density is linear in its traces, so it is an unbiased estimate of the one with `ExactTrace`. Its exponential
    is not unbiased. The probes v differ between noise levels, and are the same for every value and state. So the
    log-density is a fixed, smooth function of value and state, and errors partly cancel in differences.

    Args:
        rng_key: random key of the probes; a concrete key, not one made inside jit.
        probes: number of products with J at each noise level.

    Raises:
        ValueError: `probes` is less than 1.
    """

    rng_key: PRNGKeyArray
    probes: int = eqx.field(static=True, default=8, converter=count("Hutchinson", "probes"))

    def __check_init__(self) -> None:
        require_key(self.rng_key, self)

    def products(self, size: int) -> int:
        """Return `probes`, the number of products for a J of any size."""
        return self.probes

    def __call__(self, product: Callable[[Array], Array], like: Float[Array, ...], index: Int[Array, ""]) -> Array:
        """Return the mean of v^T J v over the probes v of this index."""
        key = jax.random.fold_in(self.rng_key, index)
        signs = jax.random.rademacher(key, (self.probes, *like.shape), like.dtype)
        return jnp.sum(signs * jax.vmap(product)(signs)) / self.probes


class ProbabilityFlow(eqx.Module):
    r"""Log-density log p(x' | c) from the probability-flow ODE, with one fourth-order Runge-Kutta step per noise level.

    The noise levels s are equally spaced in log s. With the latent z, its denoiser D and J = dD/dz, the density follows

    $$
    \frac{dz}{ds} = \frac{z - D(z, s)}{s}, \qquad \frac{d \log p}{ds} = -\frac{\dim z - \operatorname{tr} J}{s}
    $$

    (Song et al. 2021, arXiv 2011.13456, eq. 13 and 39). The integral of the trace takes one trace at each level, by the
    trapezoid rule, which converges fast because the integrand vanishes at both ends. Error and cost against the number
    of levels are tabulated in docs/method.md, "The density".

    The error grows if a direction of z has a standard deviation near or below the lowest level, which the diffusion
    cannot resolve. The result is the density of the flow, which samplers follow up to their own error.

    Args:
        num_levels: number of noise levels, at least 2.
        trace: `ExactTrace()`, or `Hutchinson(rng_key, probes)` for a large state.
        lowest: smallest noise level; None takes the prior's.
        highest: largest noise level; None takes the prior's.

    Raises:
        ValueError: there are fewer than two levels; or, when used, the range is not 0 < lowest < highest.
    """

    num_levels: int = eqx.field(static=True, default=24)
    trace: Trace = ExactTrace()
    lowest: float | None = eqx.field(static=True, default=None, converter=level("ProbabilityFlow", "lowest"))
    highest: float | None = eqx.field(static=True, default=None, converter=level("ProbabilityFlow", "highest"))

    def __check_init__(self) -> None:
        require_count(self.num_levels, self, "num_levels", least=2)
        require(self.trace, Trace, self, "trace", "ndda.diffusion.Hutchinson(jax.random.key(0), probes=4)")

    def levels(self, noise_range: tuple[float, float]) -> np.ndarray:
        """Return the noise levels, lowest first, shape (num_levels,), for a prior with this (lowest, highest) range."""
        lowest, highest = range_of_levels(self.lowest, self.highest, noise_range)
        return np.geomspace(lowest, highest, self.num_levels)

    def latent(
        self, prior: DiffusionPrior, conditioning: Conditioning, z: Float[Array, ...]
    ) -> tuple[Float[Array, ""], NetworkPasses]:
        """Return log p(z | c) of a latent, and the network passes made.

        Args:
            prior: diffusion prior.
            conditioning: return value of `prior.condition`.
            z: one latent, without batch axes.

        Returns:
            (log-density, a scalar; network passes, without those of the conditioning).

        Raises:
            NotImplementedError: the prior's noise has no inverse covariance.
        """
        levels = self.levels(prior.noise_range)
        lowest, highest = (jnp.asarray(s, z.dtype) for s in (levels[0], levels[-1]))
        size, width = z.size, float(np.log(levels[1] / levels[0]))
        # In double precision: the levels at the start, middle and end of each step, and the weights of the traces.
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
            # Runge-Kutta step of w. The first slope shares its evaluation with the trace.
            denoised, trace = traced(w * q[0], level[0], index)
            k1 = (w / q[0] - denoised) / q[0]
            k2 = slope(w + 0.5 * width * k1, level[1], q[1])
            k3 = slope(w + 0.5 * width * k2, level[1], q[1])
            k4 = slope(w + width * k3, level[2], q[2])
            w = w + width / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
            # Trapezoid rule for the trace. The trace at the lowest level also serves the Euler step from s = 0.
            integral = integral + weight * (size / q[0] ** 2 - trace) + jnp.where(index == 0, 0.5 * (size - trace), 0.0)
            return (w, integral), None

        # Euler step from s = 0 to the lowest level.
        start = z + 0.5 * (z - denoise(z, lowest))
        # Runge-Kutta steps up to the highest level.
        scales = np.sqrt(1.0 + levels**2)
        scanned = (nodes, np.sqrt(1.0 + nodes**2), weights[:-1])
        at = (*(jnp.asarray(v, z.dtype) for v in scanned), jnp.arange(self.num_levels - 1))
        (w, integral), _ = jax.lax.scan(step, (start / scales[0].item(), jnp.zeros((), z.dtype)), at)
        # Gaussian density at the highest level, up to its constant, with the last trace.
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
        """Return log p(x | c) of a state, and the network passes made.

        It is `log p(z | c) - sum log |S|` at `z = S^-1 (x - a)`, in the units of x.

        Args:
            prior: diffusion prior.
            conditioning: return value of `prior.condition`.
            x: one state, without batch axes.

        Returns:
            (log-density, a scalar; network passes, without those of the conditioning, which is given).

        Raises:
            NotImplementedError: the prior's noise has no inverse covariance.
            RuntimeError: a component of S is zero (equinox.error_if).
        """
        location = prior.location(conditioning)
        scale = jnp.broadcast_to(prior.scale(conditioning), x.shape)
        scale = eqx.error_if(
            scale,
            scale == 0.0,
            "a component of the prior's scale S is zero, so it is known without error and the state has no density; "
            "leave such components out of the prior's state.",
        )
        log_prob, passes = self.latent(prior, conditioning, (x - location) / scale)
        return log_prob - jnp.sum(jnp.log(jnp.abs(scale))), passes
