"""Huber's distribution: Gaussian errors with exponential tails, for observations of which a few are grossly wrong.

With r = (y - loc) / scale and a threshold k,

    p(y) = exp(-rho(r)) / (Z scale),    rho(r) = r^2 / 2 for |r| <= k, k |r| - k^2 / 2 beyond
    Z = sqrt(2 pi) (2 Phi(k) - 1) + (2 / k) exp(-k^2 / 2),

the least favorable of all distributions that are Gaussian but for a given share (Huber 1964, Ann. Math. Stat. 35, 73).
An observation further off than k scale pulls no harder than one at k scale; weather centers use it as variational
quality control (Tavolato & Isaksen 2015, Q. J. R. Meteorol. Soc. 141, 1514).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import promote_shapes, validate_sample

ROOT_TWO_PI = 2.5066282746310002


class Huber(Distribution):
    """Gaussian within `threshold` standard deviations of its center, exponential beyond: see `huber`.

    Args:
        loc: center, in the unit of the observation; mean and median.
        scale: standard deviation of the Gaussian that the core is of, in that unit. That of the distribution is larger.
        threshold: k, where the tails begin, in units of `scale`: 1.345 has 95 % of the efficiency of least squares if
            all errors are Gaussian; the larger, the nearer to `Normal(loc, scale)`.
    """

    arg_constraints = {  # noqa: RUF012 - as in NumPyro
        "loc": constraints.real,
        "scale": constraints.positive,
        "threshold": constraints.positive,
    }
    support = constraints.real
    reparametrized_params = ["loc", "scale", "threshold"]  # noqa: RUF012

    def __init__(
        self,
        loc: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
        threshold: ArrayLike = 1.5,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale, self.threshold = promote_shapes(loc, scale, threshold)
        batch_shape = jax.lax.broadcast_shapes(jnp.shape(loc), jnp.shape(scale), jnp.shape(threshold))
        super().__init__(batch_shape=batch_shape, validate_args=validate_args)

    def _core(self) -> tuple[Array, Array]:
        """(integral of exp(-rho) over the core, over one tail)."""
        k = jnp.asarray(self.threshold)
        return ROOT_TWO_PI * (1.0 - 2.0 * ndtr(-k)), jnp.exp(-0.5 * k**2) / k

    def sample(self, key: PRNGKeyArray | None, sample_shape: tuple[int, ...] = ()) -> Float[Array, ...]:
        """A side, and a quantile of the lower half: exact, tails included, and differentiable in all parameters."""
        assert key is not None
        side_key, key = jax.random.split(key)
        shape = self.shape(sample_shape)
        dtype = jnp.result_type(self.loc, self.scale, self.threshold, float)
        side = jax.random.rademacher(side_key, shape, dtype)
        level = jax.random.uniform(key, shape, dtype, jnp.finfo(dtype).tiny, 0.5)
        return self.loc - side * self.scale * self._lower_quantile(level)

    def _lower_quantile(self, level: Float[Array, ...]) -> Float[Array, ...]:
        """r with the given probability below it, 0 < level <= 1/2, of the standard distribution."""
        k = jnp.asarray(self.threshold)
        core, tail = self._core()
        mass = level * (core + 2.0 * tail)
        in_tail = mass < tail
        # Each branch is kept where it is defined, or the gradient of the other one is NaN.
        outside = -k + jnp.log(jnp.where(in_tail, mass, tail) / tail) / k
        inside = ndtri(jnp.clip(ndtr(-k) + jnp.where(in_tail, 0.0, mass - tail) / ROOT_TWO_PI, ndtr(-k), 0.5))
        return jnp.where(in_tail, outside, inside)

    @validate_sample
    def log_prob(self, value: Float[Array, ...]) -> Float[Array, ...]:
        """-rho((value - loc) / scale) - log(Z scale)."""
        k = jnp.asarray(self.threshold)
        size = jnp.abs((value - self.loc) / self.scale)
        core, tail = self._core()
        inside = jnp.minimum(size, k)
        return -0.5 * inside**2 - k * (size - inside) - jnp.log(core + 2.0 * tail) - jnp.log(self.scale)

    def cdf(self, value: Float[Array, ...]) -> Float[Array, ...]:
        """Probability of a smaller value."""
        k = jnp.asarray(self.threshold)
        r = (value - self.loc) / self.scale
        core, tail = self._core()
        size = jnp.abs(r)
        beyond = tail * jnp.exp(-k * jnp.maximum(size - k, 0.0)) + ROOT_TWO_PI * (
            ndtr(-jnp.minimum(size, k)) - ndtr(-k)
        )
        beyond = beyond / (core + 2.0 * tail)
        return jnp.where(r < 0, beyond, 1.0 - beyond)

    def icdf(self, q: Float[Array, ...]) -> Float[Array, ...]:
        """The value below which the probability is q."""
        lower = self._lower_quantile(jnp.minimum(q, 1.0 - q))
        return self.loc + self.scale * jnp.where(q < 0.5, lower, -lower)

    @property
    def mean(self) -> Float[Array, ...]:
        """The center."""
        return jnp.broadcast_to(self.loc, self.batch_shape)

    @property
    def variance(self) -> Float[Array, ...]:
        """scale^2 (core + 4 exp(-k^2 / 2) (1 / k + 1 / k^3)) / Z; 1.31 scale^2 for k = 1.5."""
        k = jnp.asarray(self.threshold)
        core, tail = self._core()
        second = core + 4.0 * tail * (1.0 + 1.0 / k**2)
        return jnp.broadcast_to(self.scale**2 * second / (core + 2.0 * tail), self.batch_shape)
