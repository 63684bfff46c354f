r"""Prior from the drift of a stochastic interpolant that starts from the last state.

An interpolant between the last state $x$ and the next one $x'$ is, for t from 0 to 1,

$$
X_t = \alpha(t) x + \beta(t) x' + \sigma(t) W_t, \qquad \alpha(0) = \beta(1) = 1, \quad
\alpha(1) = \beta(0) = \sigma(1) = 0,
$$

with a Wiener process W. A network learns its drift $b(X_t, t, x) = E[\dot X_t \mid X_t, x]$, where $\dot X_t =
\dot\alpha x + \dot\beta x' + \dot\sigma W_t$ (Chen et al. 2024, arXiv 2403.13724; FlowDAS, Chen et al. 2025, arXiv
2501.16642). Given x, the interpolant is a Gaussian noising of the next state:

$$
\frac{X_t - \alpha x}{\beta} = x' + s e, \qquad s = \frac{\sigma \sqrt t}{\beta}, \quad e \sim N(0, I).
$$

So the drift gives a denoiser by solving $b = \dot\alpha x + \dot\beta E[x'] + (\dot\sigma / \sigma) (X_t - \alpha x -
\beta E[x'])$ for $E[x' \mid X_t, x]$, and every sampler, guidance, weight and filter of a diffusion works with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from numpyro_diffusion_da.arguments import require, require_number
from numpyro_diffusion_da.diffusion.noise import Noise, WhiteNoise
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.priors.network import CALLABLE, NetworkConditioning, NetworkPrior

if TYPE_CHECKING:
    import numpyro.distributions as dist

Coefficient = Callable[[Float[Array, ""]], Float[Array, ""]]
"""Function of the time t in [0, 1], differentiable by JAX."""

EARLIEST, LATEST = 1e-6, 0.9996
"""Range of the times of an interpolant; outside, single precision has too few digits for its noise level."""

NODES = 4096
"""Number of times at which the noise level of an interpolant is tabulated, to find the time of a level."""


class Interpolant(eqx.Module):
    r"""Coefficients of an interpolant $X_t = \alpha x + \beta x' + \sigma W_t$.

    Args:
        alpha: coefficient of the last state; by default 1 - t.
        beta: coefficient of the next state; by default t.
        sigma: coefficient of the Wiener process; by default 1 - t.
        scale: factor of sigma, the standard deviation of the noise in the unit of the state.

    Raises:
        TypeError: a coefficient is not a function.
        ValueError: `scale` is not positive, a coefficient has the wrong value at t = 0 or 1, or the noise level does
            not decrease with time.
    """

    alpha: Coefficient = eqx.field(static=True, default=lambda t: 1.0 - t)
    beta: Coefficient = eqx.field(static=True, default=lambda t: t)
    sigma: Coefficient = eqx.field(static=True, default=lambda t: 1.0 - t)
    scale: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        require_number(self.scale, self, "scale", "give a positive number.", above=0.0)
        for name, at_start, at_end in (("alpha", 1.0, 0.0), ("beta", 0.0, 1.0), ("sigma", None, 0.0)):
            coefficient = getattr(self, name)
            require(coefficient, CALLABLE, self, name, "lambda t: 1.0 - t")
            for t, expected in ((0.0, at_start), (1.0, at_end)):
                got = float(coefficient(jnp.asarray(t)))
                if expected is not None and abs(got - expected) > 1e-5:
                    raise ValueError(
                        f"Interpolant got a coefficient {name} with {name}({t:g}) = {got:g}, expected {expected:g}: at "
                        "t = 0 an interpolant is the last state, and at t = 1 the next one."
                    )
        if not np.all(np.diff(self._table()[1]) < 0):
            raise ValueError(
                "the noise level sigma sqrt(t) / beta of this Interpolant does not decrease from t = 0 to t = 1; give "
                "coefficients for which it does, such as alpha = 1 - t, beta = t, sigma = 1 - t."
            )

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Times between 0 and 1, close to each other near both ends, and the logarithms of their noise levels."""
        with jax.ensure_compile_time_eval():
            # Closer to 1, 1 - t has too few digits in single precision.
            t = jax.nn.sigmoid(jnp.linspace(-14.0, 8.0, NODES))
            levels = self.scale * jax.vmap(self.sigma)(t) * jnp.sqrt(t) / jax.vmap(self.beta)(t)
        return np.asarray(t, float), np.log(np.asarray(levels, float))

    def level(self, t: float) -> float:
        """Noise level s = sigma sqrt(t) / beta at a time 0 < t < 1, in the unit of the state."""
        with jax.ensure_compile_time_eval():
            at = jnp.asarray(t)
            return float(self.scale * self.sigma(at) * jnp.sqrt(at) / self.beta(at))

    def time(self, level: Float[Array, ""]) -> Float[Array, ""]:
        """Time t at which the noise level is s.

        Args:
            level: noise level s > 0, in the unit of the state.
        """
        t, logs = self._table()
        # Interpolated in the logit of the time, in which its logarithm changes slowly at both ends.
        logit = jnp.asarray(np.log(t / (1.0 - t))[::-1].copy(), level.dtype)
        return jax.nn.sigmoid(jnp.interp(jnp.log(level), jnp.asarray(logs[::-1].copy(), level.dtype), logit))


class InterpolantPrior(NetworkPrior, DiffusionPrior):
    """Diffusion prior from the drift network of a stochastic interpolant that starts from the last state.

    The latent is z = (x' - x) / S, with x the last state. All methods act on one state, without a batch dimension.

    Args:
        drift: function (X_t, t, conditioning) -> drift b, or (parameters, X_t, t, conditioning) -> drift if
            `parameters` are given. X_t and the drift have the shape and the unit of the state.
        interpolant: coefficients of the interpolant that the network was trained with.
        layout: a `Layout` of the state, or only the shape of the state.
        scale: S, a typical size of x' - x, one number in the unit of the state. It is the unit of the noise levels of a
            sampler, and changes nothing else.
        parameters: pytree of arrays, the first argument of the drift; None for a drift without this argument.
        condition: function (state, inputs) -> conditioning, which runs once per step. By default the conditioning is
            the state as the program passes it, and inputs are refused.
        times: (first, last) time that the network can be trusted at.
        climatology: NumPyro distribution of initial states, or None.
        conditioning_passes: number of network passes that `condition` makes.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the shapes do not match, `scale` is not positive, or `times` are out of order or out of range.
    """

    interpolant: Interpolant
    noise: Noise
    noise_range: tuple[float, float] = eqx.field(static=True)

    def __init__(
        self,
        drift: Callable[..., Any],
        interpolant: Interpolant,
        *,
        layout: Layout | int | Sequence[int],
        scale: float = 1.0,
        parameters: PyTree = None,
        condition: Callable[[PyTree, PyTree], PyTree] | None = None,
        times: tuple[float, float] = (1e-3, 1.0 - 1e-3),
        climatology: dist.Distribution | None = None,
        conditioning_passes: int = 0,
    ) -> None:
        require(drift, CALLABLE, self, "drift", "lambda x_t, t, state: state - x_t")
        require(interpolant, Interpolant, self, "interpolant", "ndda.priors.Interpolant()")
        scale = require_number(scale, self, "scale", "give one positive number.", above=0.0)
        require(times, (tuple, list), self, "times", "(0.001, 0.999)")
        if len(times) != 2 or not EARLIEST <= times[0] < times[1] <= LATEST:
            raise ValueError(
                f"InterpolantPrior got times={times}; give (first, last) with {EARLIEST} <= first < last <= {LATEST}."
            )
        super().__init__(
            drift,
            layout=layout,
            parameters=parameters,
            condition=condition,
            location=None,
            residual=True,
            scale=scale,
            climatology=climatology,
            conditioning_passes=conditioning_passes,
        )
        self.interpolant, self.noise = interpolant, WhiteNoise()
        self.noise_range = (interpolant.level(times[1]) / scale, interpolant.level(times[0]) / scale)

    def denoise(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], conditioning: NetworkConditioning
    ) -> Float[Array, ...]:
        """Denoiser D(z_s, s; c) = E[z | z_s, c], by one call of the drift network.

        Args:
            z_s: noised latent, shape of the state.
            noise_level: noise level s > 0, in units of the scale S.
            conditioning: result of `condition` for the previous state.

        Raises:
            TypeError: the output of the network is not one array.
            ValueError: the output of the network has another shape than the state.
        """
        x, unit = conditioning.location, conditioning.scale
        t = self.interpolant.time(jnp.asarray(noise_level, z_s.dtype) * unit)

        def with_slope(coefficient: Coefficient) -> tuple[Array, Array]:
            return jax.value_and_grad(coefficient)(t)

        alpha, alpha_slope = with_slope(self.interpolant.alpha)
        beta, beta_slope = with_slope(self.interpolant.beta)
        sigma, sigma_slope = with_slope(self.interpolant.sigma)
        # X_t - alpha x = beta (x + S z_s), because x' + s S e = x + S (z + s e).
        departed = beta * (x + unit * z_s)
        name = f"a state of shape {z_s.shape}"
        drift = self._run(alpha * x + departed, t, conditioning.given, name=name, expected=z_s.shape, dtype=z_s.dtype)
        growth = sigma_slope / sigma
        expected = (drift - alpha_slope * x - growth * departed) / (beta_slope - growth * beta)
        return (expected - x) / unit

    def location(self, conditioning: NetworkConditioning) -> Float[Array, ...]:
        """Last state, in its unit."""
        return conditioning.location

    def scale(self, conditioning: NetworkConditioning) -> Float[Array, ""]:
        """Scale S of the latent, in the unit of the state."""
        return conditioning.scale
