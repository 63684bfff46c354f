r"""Conversion of a network's output to the denoiser D(z_s, s) = E[z | z_s], for the usual parametrizations.

The library noises a latent as $z_s = z + s e$ with $e \sim N(0, C)$. Every Gaussian path $z_t = \alpha z + \sigma e$ is
the same process in other coordinates. At the noise level $s = \sigma / \alpha$,

$$z_t = \alpha z_s, \qquad \sigma = \alpha s.$$

A parametrization therefore consists of three parts: the factor $\alpha(s)$ of the coordinates that the network expects
(a `Path`), the number that tells the network the noise level (a `NoiseIndex`, or the time of the path), and the meaning
of the output. With $E[\cdot]$ the mean given $z_t$ (given $z_s$ for `Preconditioned`):

| output | class | denoiser D |
|---|---|---|
| $E[z]$, called $x_0$ | `Denoised` | output |
| $F$ of EDM | `Preconditioned` | $c_{skip} z_s + c_{out} F$ (Karras et al. 2022, arXiv 2206.00364, eq. 7) |
| $E[e]$ | `Epsilon` | $(z_t - \sigma e) / \alpha$ (Ho et al. 2020, arXiv 2006.11239, eq. 15) |
| $E[v]$, $v = \alpha e - \sigma z$ | `VPrediction` | $(\alpha z_t - \sigma v) / (\alpha^2 + \sigma^2)$ [1] |
| $\nabla \log p(z_t)$ | `Score` | $(z_t + \sigma^2 C \nabla \log p) / \alpha$ (Song et al. 2021, arXiv 2011.13456) |
| $E[u]$, $u = dz_t / dt$ | `Velocity` | $z_t - t u$ with data at $t = 0$ [2] |

- [1]: Salimans & Ho 2022, arXiv 2202.00512, appendix D, where $\alpha^2 + \sigma^2 = 1$.
- [2]: Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003.

The division by $\alpha$ multiplies an error of a predicted $e$ by $s$, and a relative error of a score in the same way.
The other four outputs are more accurate at the highest noise levels, where the library computes the mean and the
covariance of a step.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_diffusion_da.arguments import number, real_array, require, require_count, shown
from numpyro_diffusion_da.diffusion.noise import Noise

NetworkFunction = Callable[[Float[Array, "..."], Float[Array, ""]], Float[Array, "..."]]
"""Function (z_t, index) -> output, with its conditioning already bound."""


# --- the number that tells a network the noise level ----------------------------------------------------------------


class NoiseIndex(eqx.Module):
    """Base class of conventions for the number that tells a network the noise level s; subclass it for another one."""

    @property
    @abc.abstractmethod
    def limits(self) -> tuple[float, float] | None:
        """(lowest, highest) noise level of the convention; None if it has no limits of its own."""

    @abc.abstractmethod
    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Index of the noise level s > 0, as the network takes it."""


class Level(NoiseIndex):
    """Noise level s itself as the index."""

    @property
    def limits(self) -> None:
        """Limits of the noise level: None, because this convention has no limits of its own."""

    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Noise level s, unchanged."""
        return noise_level


class LogLevel(NoiseIndex):
    """Logarithm of the noise level, `factor * log(s)`, as the index.

    A factor of 1/4 gives EDM's c_noise, a factor of -2 the logarithm of the signal-to-noise ratio.

    Args:
        factor: factor of log(s).
    """

    factor: float = eqx.field(
        static=True, default=1.0, converter=number("LogLevel", "factor", "give a number that is not 0.")
    )

    def __check_init__(self) -> None:
        if self.factor == 0.0:
            raise ValueError("LogLevel got factor=0.0, which tells the network nothing; give a number that is not 0.")

    @property
    def limits(self) -> None:
        """Limits of the noise level: None, because this convention has no limits of its own."""

    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Index `factor * log(s)`."""
        return self.factor * jnp.log(noise_level)


class DiscreteTable(NoiseIndex):
    """Step number 0, 1, ... of a DDPM with a finite table of noise levels as the index.

    Between two steps the number is interpolated linearly in the logarithm of the signal-to-noise ratio. This suits a
    network that embeds the number. A network that looks the number up in a table has to round it.

    Args:
        alphas_cumprod: alpha^2 of each step, shape (steps,), beginning with the least noisy step.

    Attributes:
        log_levels: log(s) of each step, shape (steps,).
        lowest: noise level of the first step.
        highest: noise level of the last step.

    Raises:
        ValueError: the values are not strictly decreasing within (0, 1). A last value of exactly 0 (zero terminal SNR)
            is an infinite noise level and must be left out.
    """

    log_levels: Float[Array, " steps"]
    lowest: float = eqx.field(static=True)
    highest: float = eqx.field(static=True)

    def __init__(self, alphas_cumprod: ArrayLike) -> None:
        table = real_array(alphas_cumprod, self, "alphas_cumprod", "np.cumprod(1.0 - beta)")
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod has shape {table.shape}; give a vector of two or more steps.")
        if not (np.all((table > 0) & (table < 1)) and np.all(np.diff(table) < 0)):
            raise ValueError(
                f"alphas_cumprod goes from {table[0]:.4g} to {table[-1]:.4g}, but must decrease strictly within (0, 1) "
                "from the least noisy step on; give the cumulative product of 1 - beta without a last value of 0."
            )
        levels = np.sqrt((1.0 - table) / table)
        self.log_levels = jnp.asarray(np.log(levels))
        self.lowest, self.highest = float(levels[0]), float(levels[-1])

    @property
    def limits(self) -> tuple[float, float]:
        """(noise level of the first step, noise level of the last step)."""
        return self.lowest, self.highest

    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Step number, a real number in [0, steps - 1]."""
        steps = jnp.arange(len(self.log_levels), dtype=self.log_levels.dtype)
        return jnp.interp(jnp.log(noise_level), self.log_levels, steps)


def _beta(name: str) -> Callable[[float], float | None]:
    """Make the converter of one end of the range of beta."""
    return number("LinearBeta", name, "give 0 < beta_min < beta_max.", above=0)


class LinearBeta(NoiseIndex):
    r"""Time t in (0, 1] of the variance preserving SDE with a linear beta(t) as the index.

    The time solves (Song et al. 2021, eq. 32 and 33)

    $$\alpha^2 = \exp(-t^2 (\beta_{max} - \beta_{min}) / 2 - t \beta_{min}), \qquad s^2 = 1 / \alpha^2 - 1.$$

    Args:
        beta_min: value of beta at t = 0.
        beta_max: value of beta at t = 1.

    Raises:
        ValueError: 0 < beta_min < beta_max does not hold.
    """

    beta_min: float = eqx.field(static=True, default=0.1, converter=_beta("beta_min"))
    beta_max: float = eqx.field(static=True, default=20.0, converter=_beta("beta_max"))

    def __check_init__(self) -> None:
        if not 0.0 < self.beta_min < self.beta_max < math.inf:
            raise ValueError(
                f"LinearBeta got beta_min={self.beta_min} and beta_max={self.beta_max}; give 0 < beta_min < beta_max."
            )

    @property
    def limits(self) -> tuple[float, float]:
        """(noise level at t = 1e-5, the start of training of Song et al. 2021, and noise level at t = 1)."""

        def level(t: float) -> float:
            return math.sqrt(math.expm1(0.5 * t**2 * (self.beta_max - self.beta_min) + t * self.beta_min))

        return level(1e-5), level(1.0)

    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Time t of the SDE."""
        # This form of the quadratic's root has no cancellation as t goes to 0.
        integral = jnp.log1p(noise_level**2)
        root = jnp.sqrt(self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * integral)
        return 2.0 * integral / (self.beta_min + root)


class Cosine(NoiseIndex):
    """Time t in (0, 1) of the cosine schedule as the index: alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    The noise level is s = tan(pi t / 2). This is the schedule of Nichol & Dhariwal 2021 (arXiv 2102.09672) without
    their offset, as Salimans & Ho 2022 (arXiv 2202.00512) use it.
    """

    @property
    def limits(self) -> tuple[float, float]:
        """(0, infinity): the convention covers all noise levels."""
        return 0.0, math.inf

    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Time t of the cosine schedule."""
        return 2.0 / math.pi * jnp.arctan(noise_level)


# --- the coordinates that a network expects -------------------------------------------------------------------------


class Path(eqx.Module):
    """Base class of Gaussian paths z_t = alpha z + sigma e, with the noise level s = sigma / alpha."""

    @property
    @abc.abstractmethod
    def limits(self) -> tuple[float, float] | None:
        """(lowest, highest) noise level of the path; None if it has no limits of its own."""

    @abc.abstractmethod
    def alpha(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Factor alpha of z_t = alpha z_s at the noise level s."""

    @abc.abstractmethod
    def index(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Number that tells the network the noise level s."""


class VarianceExploding(Path):
    """Path with alpha = 1, so that z_t = z_s.

    Args:
        noise_index: number that tells the network the noise level; s itself by default.

    Raises:
        TypeError: `noise_index` is not a `NoiseIndex`.
    """

    noise_index: NoiseIndex = Level()

    def __check_init__(self) -> None:
        require(self.noise_index, NoiseIndex, self, "noise_index", "Level()")

    @property
    def limits(self) -> tuple[float, float] | None:
        """(lowest, highest) noise level of the noise index; None if it has no limits."""
        return self.noise_index.limits

    def alpha(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Factor alpha of the clean state in the network's noisy input, which is 1 at every noise level."""
        return jnp.ones_like(noise_level)

    def index(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Number that tells the network the noise level s, from `noise_index`."""
        return self.noise_index(noise_level)


class VariancePreserving(Path):
    """Path with alpha = 1 / sqrt(1 + s^2), so that alpha^2 + sigma^2 = 1.

    Args:
        noise_index: number that tells the network the noise level: `DiscreteTable`, `LinearBeta`, `Cosine`, ...

    Raises:
        TypeError: `noise_index` is not a `NoiseIndex`.
    """

    noise_index: NoiseIndex

    def __check_init__(self) -> None:
        require(self.noise_index, NoiseIndex, self, "noise_index", "DiscreteTable(alphas_cumprod) or Cosine()")

    @property
    def limits(self) -> tuple[float, float] | None:
        """(lowest, highest) noise level of the noise index; None if it has no limits."""
        return self.noise_index.limits

    def alpha(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Factor alpha = 1 / sqrt(1 + s^2)."""
        return 1.0 / jnp.sqrt(1.0 + noise_level**2)

    def index(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Number that tells the network the noise level s, from `noise_index`."""
        return self.noise_index(noise_level)


class FlowMatching(Path):
    """Straight path z_t = (1 - t) z + t e, with the noise level s = t / (1 - t) and the time t = s / (1 + s).

    Args:
        data_at: time of pure data in the network's convention, 0 or 1. Use 1 for the convention of Lipman et al. 2023
            and Liu et al. 2023. The network's time is then 1 - t, and its path is time * data + (1 - time) * noise.
            The sigma_min of Lipman et al. is taken as 0.

    Raises:
        ValueError: `data_at` is neither 0 nor 1.
    """

    data_at: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        require_count(self.data_at, self, "data_at", least=0)
        if self.data_at > 1:
            raise ValueError(f"FlowMatching got data_at={shown(self.data_at)}; give the time of pure data, 0 or 1.")

    @property
    def limits(self) -> tuple[float, float]:
        """(0, infinity): the convention covers all noise levels."""
        return 0.0, math.inf

    def alpha(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Factor alpha = 1 - t = 1 / (1 + s)."""
        return 1.0 / (1.0 + noise_level)

    def index(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Time in the network's convention: t if data is at 0, and 1 - t if data is at 1."""
        return (1.0 if self.data_at else noise_level) / (1.0 + noise_level)


# --- the meaning of a network's output ------------------------------------------------------------------------------


class Parametrization(eqx.Module):
    """Base class of parametrizations, which turn the output of a network into the denoiser D(z_s, s)."""

    @property
    @abc.abstractmethod
    def limits(self) -> tuple[float, float] | None:
        """(lowest, highest) noise level of the parametrization; None if it has no limits of its own."""

    @abc.abstractmethod
    def __call__(
        self, network: NetworkFunction, z_s: Float[Array, ...], noise_level: Float[Array, ""], noise: Noise
    ) -> Float[Array, ...]:
        """Denoiser D(z_s, s) = E[z | z_s], by one call of the network.

        Args:
            network: function (z_t, index) -> output, with its conditioning already bound.
            z_s: noised latent z + s e.
            noise_level: noise level s > 0.
            noise: noise of the forward process, which gives the covariance C.

        Returns:
            Denoised latent, shape of the latent.
        """


class PathParametrization(Parametrization):
    """Base class of parametrizations by a path and the meaning of the output; the module states the formulas.

    Raises:
        TypeError: the path is not a `Path`.
    """

    path: eqx.AbstractVar[Path]

    def __check_init__(self) -> None:
        require(self.path, Path, self, "path", "VariancePreserving(Cosine())")

    @property
    def limits(self) -> tuple[float, float] | None:
        """(lowest, highest) noise level of the path; None if it has no limits."""
        return self.path.limits

    def __call__(
        self, network: NetworkFunction, z_s: Float[Array, ...], noise_level: Float[Array, ""], noise: Noise
    ) -> Float[Array, ...]:
        """Denoiser D(z_s, s) = E[z | z_s], by one call of the network at z_t = alpha z_s.

        Args:
            network: function (z_t, index) -> output, with its conditioning already bound.
            z_s: noised latent z + s e.
            noise_level: noise level s > 0.
            noise: noise of the forward process, which gives the covariance C.

        Returns:
            Denoised latent, shape of the latent.
        """
        alpha = self.path.alpha(noise_level)
        z_t = alpha * z_s
        output = network(z_t, self.path.index(noise_level))
        return self.denoised(output, z_t, alpha, alpha * noise_level, noise)

    @abc.abstractmethod
    def denoised(
        self,
        output: Float[Array, ...],
        z_t: Float[Array, ...],
        alpha: Float[Array, ""],
        sigma: Float[Array, ""],
        noise: Noise,
    ) -> Float[Array, ...]:
        """Denoised latent E[z | z_t] from the output of the network.

        Args:
            output: output of the network at z_t.
            z_t: noised latent alpha z + sigma e in the coordinates of the path.
            alpha: factor alpha of the path.
            sigma: factor sigma = alpha s of the path.
            noise: noise of the forward process, which gives the covariance C.

        Returns:
            Denoised latent, shape of the latent.
        """


class Denoised(PathParametrization):
    """Parametrization of a network that predicts E[z | z_t], such as an x0-prediction or a preconditioned EDM network.

    Args:
        path: coordinates of the network; by default the network takes z_s and s themselves.

    Raises:
        TypeError: the path is not a `Path`.
    """

    path: Path = VarianceExploding()

    def denoised(self, output: Array, z_t: Array, alpha: Array, sigma: Array, noise: Noise) -> Array:
        """Denoised latent E[z | z_t], which is the output itself."""
        return output


class Epsilon(PathParametrization):
    """Parametrization of a network that predicts the added noise E[e | z_t] (Ho et al. 2020).

    Args:
        path: coordinates of the network.

    Raises:
        TypeError: the path is not a `Path`.
    """

    path: Path

    def denoised(self, output: Array, z_t: Array, alpha: Array, sigma: Array, noise: Noise) -> Array:
        """Denoised latent (z_t - sigma e) / alpha from the predicted noise e."""
        return (z_t - sigma * output) / alpha


class VPrediction(PathParametrization):
    """Parametrization of a network that predicts E[v | z_t] with v = alpha e - sigma z (Salimans & Ho 2022).

    Args:
        path: coordinates of the network. Networks of this kind usually take a variance preserving path; any path works.

    Raises:
        TypeError: the path is not a `Path`.
    """

    path: Path

    def denoised(self, output: Array, z_t: Array, alpha: Array, sigma: Array, noise: Noise) -> Array:
        """Denoised latent (alpha z_t - sigma v) / (alpha^2 + sigma^2) from the predicted v."""
        return (alpha * z_t - sigma * output) / (alpha**2 + sigma**2)


class Score(PathParametrization):
    """Parametrization of a network that predicts the score, the gradient of log p(z_t) in z_t (Song et al. 2021).

    Args:
        path: coordinates of the network. Use `VarianceExploding` for a score with respect to z_s.

    Raises:
        TypeError: the path is not a `Path`.
    """

    path: Path

    def denoised(self, output: Array, z_t: Array, alpha: Array, sigma: Array, noise: Noise) -> Array:
        """Denoised latent (z_t + sigma^2 C score) / alpha from the predicted score."""
        return (z_t + sigma**2 * noise.covariance_product(output)) / alpha


class Velocity(PathParametrization):
    """Parametrization of a network that predicts the velocity E[u | z_t] of the straight path in the network's time.

    The velocity is u = e - z if data is at time 0, and u = z - e if data is at time 1 (Lipman et al. 2023, Liu et al.
    2023).

    Args:
        path: straight path, with data at time 0 by default.

    Raises:
        TypeError: the path is not a `FlowMatching` path; the velocity of other paths has another form.
    """

    path: FlowMatching = FlowMatching()

    def __check_init__(self) -> None:
        require(self.path, FlowMatching, self, "path", "FlowMatching(data_at=1)")

    def denoised(self, output: Array, z_t: Array, alpha: Array, sigma: Array, noise: Noise) -> Array:
        """Denoised latent z_t - t (e - z) from the predicted velocity."""
        return z_t + (sigma if self.path.data_at else -sigma) * output


class Preconditioned(Parametrization):
    r"""Parametrization of the network F of EDM, without the preconditioning of EDM (Karras et al. 2022, table 1).

    With $\sigma_d$ for `sigma_data`, the denoiser is

    $$D = c_{skip} z_s + c_{out} F(c_{in} z_s, c_{noise}), \qquad c_{noise} = \log(s) / 4,$$

    $$c_{in} = (s^2 + \sigma_d^2)^{-1/2}, \quad c_{skip} = \sigma_d^2 c_{in}^2, \quad c_{out} = s \sigma_d c_{in}.$$

    Args:
        sigma_data: standard deviation of z that the network was trained with, for example 0.5 for EDM's images and 1
            for GenCast.
        noise_index: number that tells the network the noise level; c_noise by default.

    Raises:
        ValueError: `sigma_data` is not positive.
        TypeError: `noise_index` is not a `NoiseIndex`.
    """

    sigma_data: float = eqx.field(
        static=True, converter=number("Preconditioned", "sigma_data", "give a positive number.", above=0)
    )
    noise_index: NoiseIndex = LogLevel(0.25)

    def __check_init__(self) -> None:
        require(self.noise_index, NoiseIndex, self, "noise_index", "LogLevel(0.25)")

    @property
    def limits(self) -> tuple[float, float] | None:
        """(lowest, highest) noise level of the noise index; None if it has no limits."""
        return self.noise_index.limits

    def __call__(
        self, network: NetworkFunction, z_s: Float[Array, ...], noise_level: Float[Array, ""], noise: Noise
    ) -> Float[Array, ...]:
        """Denoiser D(z_s, s) = c_skip z_s + c_out F, by one call of the network.

        Args:
            network: function (c_in z_s, index) -> F, with its conditioning already bound.
            z_s: noised latent z + s e.
            noise_level: noise level s > 0.
            noise: noise of the forward process, which this parametrization does not use.

        Returns:
            Denoised latent, shape of the latent.
        """
        c_in = 1.0 / jnp.sqrt(noise_level**2 + self.sigma_data**2)
        output = network(c_in * z_s, self.noise_index(noise_level))
        return (self.sigma_data * c_in) ** 2 * z_s + noise_level * self.sigma_data * c_in * output
