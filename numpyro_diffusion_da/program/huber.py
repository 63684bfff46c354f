r"""Huber's distribution: Gaussian errors with exponential tails, for observations with a few gross errors.

With r = (y - loc) / scale and a threshold k,

$$
p(y) = \frac{e^{-\rho(r)}}{Z \, \mathrm{scale}}, \qquad
\rho(r) = \begin{cases} r^2 / 2 & |r| \le k \\ k |r| - k^2 / 2 & |r| > k, \end{cases} \qquad
Z = \sqrt{2 \pi} \, (2 \Phi(k) - 1) + \frac 2 k e^{-k^2 / 2} .
$$

This is the least favorable distribution among those in which a given share of the values comes from any distribution
and the rest is Gaussian (Huber 1964, Ann. Math. Stat. 35, 73). The influence of an observation does not grow further
once its error exceeds k scale. Weather centers use the distribution as variational quality control (Tavolato &
Isaksen 2015, Q. J. R. Meteorol. Soc. 141, 1514).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import promote_shapes, validate_sample

from numpyro_diffusion_da.arguments import shown
from numpyro_diffusion_da.program.arrays import number_array

ROOT_TWO_PI = 2.5066282746310002
"""Square root of 2 pi, the integral of exp(-r^2 / 2)."""


class Huber(Distribution):
    r"""Huber's distribution: Gaussian within `threshold` times `scale` of its center, exponential beyond.

    With r = (y - loc) / scale and k = threshold, the density is proportional to $e^{-r^2 / 2}$ for $|r| \le k$ and to
    $e^{-k |r| + k^2 / 2}$ beyond (Huber 1964, Ann. Math. Stat. 35, 73). An observation with a gross error then has
    little influence. The batch shape is the common shape of `loc`, `scale` and `threshold` after broadcasting.

    Args:
        loc: center, in the unit of the observation; it is the mean and the median.
        scale: standard deviation of the Gaussian core, in the unit of the observation; positive. The standard deviation
            of the whole distribution is larger.
        threshold: k, where the tails begin, in units of `scale`; positive. If all errors are Gaussian, 1.345 keeps 95 %
            of the efficiency of least squares. For large k the distribution tends to `Normal(loc, scale)`.
        validate_args: whether NumPyro checks the arguments and values; None for NumPyro's default.

    Raises:
        ValueError: an argument holds no numbers; or, with `validate_args`, a `scale` or `threshold` is not positive.
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
        given = {"loc": loc, "scale": scale, "threshold": threshold}
        checks = Distribution._validate_args if validate_args is None else validate_args
        for name, value in given.items():
            array = number_array(value, f"{name} of Huber")
            known = checks and name != "loc" and not isinstance(array, jax.core.Tracer)
            if known and not np.all(np.asarray(array) > 0):
                # The words of NumPyro, by which the line of a program is found.
                raise ValueError(
                    f"Huber distribution got invalid {name} parameter: {shown(value)}, which is not positive; give a "
                    f"{name} above zero."
                )
        self.loc, self.scale, self.threshold = promote_shapes(loc, scale, threshold)
        batch_shape = jax.lax.broadcast_shapes(jnp.shape(loc), jnp.shape(scale), jnp.shape(threshold))
        super().__init__(batch_shape=batch_shape, validate_args=validate_args)

    def _core(self) -> tuple[Array, Array]:
        """Integrals of exp(-rho(r)) over the core, |r| <= k, and over one tail, r > k."""
        k = jnp.asarray(self.threshold)
        return ROOT_TWO_PI * (1.0 - 2.0 * ndtr(-k)), jnp.exp(-0.5 * k**2) / k

    def sample(self, key: PRNGKeyArray | None, sample_shape: tuple[int, ...] = ()) -> Float[Array, ...]:
        """Draw values of shape sample_shape + batch_shape, exactly and differentiably in all parameters.

        A draw is a quantile of the lower half with a random sign.

        Args:
            key: random key.
            sample_shape: leading shape of the result.
        """
        assert key is not None
        side_key, key = jax.random.split(key)
        shape = self.shape(sample_shape)
        dtype = jnp.result_type(self.loc, self.scale, self.threshold, float)
        side = jax.random.rademacher(side_key, shape, dtype)
        level = jax.random.uniform(key, shape, dtype, jnp.finfo(dtype).tiny, 0.5)
        return self.loc - side * self.scale * self._lower_quantile(level)

    def _lower_quantile(self, level: Float[Array, ...]) -> Float[Array, ...]:
        """Quantile r of the distribution with loc = 0 and scale = 1, for probabilities 0 < level <= 1/2."""
        k = jnp.asarray(self.threshold)
        core, tail = self._core()
        mass = level * (core + 2.0 * tail)
        in_tail = mass < tail
        # Both branches get arguments for which they are defined, because otherwise the gradient would be NaN.
        outside = -k + jnp.log(jnp.where(in_tail, mass, tail) / tail) / k
        inside = ndtri(jnp.clip(ndtr(-k) + jnp.where(in_tail, 0.0, mass - tail) / ROOT_TWO_PI, ndtr(-k), 0.5))
        return jnp.where(in_tail, outside, inside)

    @validate_sample
    def log_prob(self, value: Float[Array, ...]) -> Float[Array, ...]:
        """Log-density -rho((value - loc) / scale) - log(Z scale) of a value, broadcast with the batch shape."""
        k = jnp.asarray(self.threshold)
        size = jnp.abs((value - self.loc) / self.scale)
        core, tail = self._core()
        inside = jnp.minimum(size, k)
        return -0.5 * inside**2 - k * (size - inside) - jnp.log(core + 2.0 * tail) - jnp.log(self.scale)

    def cdf(self, value: Float[Array, ...]) -> Float[Array, ...]:
        """Probability of values below `value`, broadcast with the batch shape."""
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
        """Quantile of probability q, 0 < q < 1, broadcast with the batch shape."""
        lower = self._lower_quantile(jnp.minimum(q, 1.0 - q))
        return self.loc + self.scale * jnp.where(q < 0.5, lower, -lower)

    @property
    def mean(self) -> Float[Array, ...]:
        """Mean of the distribution, `loc`, in the batch shape."""
        return jnp.broadcast_to(self.loc, self.batch_shape)

    @property
    def variance(self) -> Float[Array, ...]:
        """Variance in the batch shape, scale^2 (core + 4 exp(-k^2 / 2) (1 / k + 1 / k^3)) / Z.

        The core is sqrt(2 pi) (2 Phi(k) - 1). For k = 1.5 the variance is 1.31 scale^2.
        """
        k = jnp.asarray(self.threshold)
        core, tail = self._core()
        second = core + 4.0 * tail * (1.0 + 1.0 / k**2)
        return jnp.broadcast_to(self.scale**2 * second / (core + 2.0 * tail), self.batch_shape)
