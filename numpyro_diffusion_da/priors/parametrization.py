"""What a network was trained to predict, turned into the denoiser D(z_s, s) = E[z | z_s].

The library noises as z_s = z + s e, e ~ N(0, C). Every Gaussian path z_t = alpha z + sigma e is the same process in
other coordinates: at the level s = sigma / alpha,

    z_t = alpha z_s,    sigma = alpha s.

So a parametrization is three things: alpha(s), the coordinates that the network expects (a `Path`); the number by which
it knows the level (a `NoiseIndex`, or the path's own time); and what its output says of z, given E[. | z_t] throughout:

    output                                 D
    z (x0; `Denoised`)                     output
    F of EDM (`Preconditioned`)            c_skip z_s + c_out F        Karras et al. 2022, arXiv 2206.00364, eq. 7
    e (`Epsilon`)                          (z_t - sigma e) / alpha     Ho et al. 2020, arXiv 2006.11239, eq. 15
    v = alpha e - sigma z (`VPrediction`)  alpha z_t - sigma v         Salimans & Ho 2022, arXiv 2202.00512, app. D
    grad log p(z_t) (`Score`)              (z_t + sigma^2 C score) / alpha    Song et al. 2021, arXiv 2011.13456
    u = dz_t/dt (`Velocity`)               z_t - t u                   Lipman et al. 2023, arXiv 2210.02747;
                                                                       Liu et al. 2023, arXiv 2209.03003

Dividing by alpha multiplies an error of e by s, and one of the score as much relative to its size: at the highest
levels, where means and covariances of a step are read off, the other four are the accurate ones.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.diffusion.noise import Noise

NetworkFunction = Callable[[Float[Array, "..."], Float[Array, ""]], Float[Array, "..."]]
"""(z_t, index) -> output, the conditioning already in it."""


# --- the number by which a network knows the level ------------------------------------------------------------------


class NoiseIndex(eqx.Module):
    """Noise level s -> what the network is told of it. Subclass it for a convention that is not here."""

    @property
    @abc.abstractmethod
    def limits(self) -> tuple[float, float] | None:
        """Lowest and highest s that the convention knows; None where only the one who trained it can say."""

    @abc.abstractmethod
    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """The index of the level s > 0."""


class Level(NoiseIndex):
    """s itself."""

    @property
    def limits(self) -> None:
        """Not known."""

    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """The level."""
        return noise_level


class LogLevel(NoiseIndex):
    """factor log s: 1/4 is EDM's c_noise, -2 the log signal-to-noise ratio.

    Args:
        factor: what log s is multiplied by.
    """

    factor: float = eqx.field(static=True, default=1.0)

    @property
    def limits(self) -> None:
        """Not known."""

    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """Factor log s."""
        return self.factor * jnp.log(noise_level)


class DiscreteTable(NoiseIndex):
    """The step 0, 1, ... of a DDPM with a finite table, interpolated linearly in log-SNR between its entries.

    An index between two steps suits a network that embeds it as a number. One that looks it up has to round it itself.

    Args:
        alphas_cumprod: alpha^2 of each step, shape (steps,), the first the least noisy.

    Raises:
        ValueError: not a strictly decreasing series within (0, 1). A last entry of exactly 0 (zero terminal SNR) is an
            infinite noise level: leave it out.
    """

    log_levels: Float[Array, " steps"]
    lowest: float = eqx.field(static=True)
    highest: float = eqx.field(static=True)

    def __init__(self, alphas_cumprod: ArrayLike) -> None:
        table = np.asarray(alphas_cumprod, dtype=np.float64)
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod has shape {table.shape}, expected two steps or more, (steps,).")
        if not (np.all((table > 0) & (table < 1)) and np.all(np.diff(table) < 0)):
            raise ValueError(
                "alphas_cumprod must fall strictly within (0, 1), from the least noisy step on (the cumulative product "
                f"of 1 - beta); it goes from {table[0]:.4g} to {table[-1]:.4g}. Leave a last entry of 0 out."
            )
        levels = np.sqrt((1.0 - table) / table)
        self.log_levels = jnp.asarray(np.log(levels))
        self.lowest, self.highest = float(levels[0]), float(levels[-1])

    @property
    def limits(self) -> tuple[float, float]:
        """Of the first and of the last step."""
        return self.lowest, self.highest

    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """A real number in [0, steps - 1]."""
        steps = jnp.arange(len(self.log_levels), dtype=self.log_levels.dtype)
        return jnp.interp(jnp.log(noise_level), self.log_levels, steps)


class LinearBeta(NoiseIndex):
    """The time t in (0, 1] of the variance preserving SDE with beta(t) = beta_min + t (beta_max - beta_min).

    alpha^2 = exp(-t^2 (beta_max - beta_min) / 2 - t beta_min) and s^2 = 1 / alpha^2 - 1, solved for t (Song et al.
    2021, eq. 32 and 33).

    Args:
        beta_min: beta(0).
        beta_max: beta(1).

    Raises:
        ValueError: not 0 < beta_min < beta_max.
    """

    beta_min: float = eqx.field(static=True, default=0.1)
    beta_max: float = eqx.field(static=True, default=20.0)

    def __check_init__(self) -> None:
        if not 0.0 < self.beta_min < self.beta_max:
            raise ValueError(f"LinearBeta got beta from {self.beta_min} to {self.beta_max}; give 0 < first < second.")

    @property
    def limits(self) -> tuple[float, float]:
        """From t = 1e-5, where Song et al. begin to train, to t = 1."""

        def level(t: float) -> float:
            return math.sqrt(math.expm1(0.5 * t**2 * (self.beta_max - self.beta_min) + t * self.beta_min))

        return level(1e-5), level(1.0)

    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """The time t."""
        # The root of the quadratic that does not cancel as t goes to 0.
        integral = jnp.log1p(noise_level**2)
        root = jnp.sqrt(self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * integral)
        return 2.0 * integral / (self.beta_min + root)


class Cosine(NoiseIndex):
    """The time t in (0, 1) with alpha = cos(pi t / 2), sigma = sin(pi t / 2), so s = tan(pi t / 2).

    Nichol & Dhariwal 2021 (arXiv 2102.09672) without their offset, as Salimans & Ho 2022 use it.
    """

    @property
    def limits(self) -> tuple[float, float]:
        """All levels."""
        return 0.0, math.inf

    def __call__(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """The time t."""
        return 2.0 / math.pi * jnp.arctan(noise_level)


# --- the coordinates that a network expects -------------------------------------------------------------------------


class Path(eqx.Module):
    """z_t = alpha z + sigma e at the level s = sigma / alpha."""

    @property
    @abc.abstractmethod
    def limits(self) -> tuple[float, float] | None:
        """Lowest and highest s of the path; None where only the one who trained the network can say."""

    @abc.abstractmethod
    def alpha(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """The factor that takes z_s to z_t = alpha z_s."""

    @abc.abstractmethod
    def index(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """What the network is told of the level."""


class VarianceExploding(Path):
    """alpha = 1: z_t = z_s.

    Args:
        noise_index: what the network is told; s itself by default.

    Raises:
        TypeError: not a `NoiseIndex`.
    """

    noise_index: NoiseIndex = Level()

    def __check_init__(self) -> None:
        require(self.noise_index, NoiseIndex, self, "noise_index", "Level()")

    @property
    def limits(self) -> tuple[float, float] | None:
        """Those of the index."""
        return self.noise_index.limits

    def alpha(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """1."""
        return jnp.ones_like(noise_level)

    def index(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """By the index given."""
        return self.noise_index(noise_level)


class VariancePreserving(Path):
    """alpha = 1 / sqrt(1 + s^2), so alpha^2 + sigma^2 = 1.

    Args:
        noise_index: what the network is told: `DiscreteTable`, `LinearBeta`, `Cosine`, ...

    Raises:
        TypeError: not a `NoiseIndex`.
    """

    noise_index: NoiseIndex

    def __check_init__(self) -> None:
        require(self.noise_index, NoiseIndex, self, "noise_index", "DiscreteTable(alphas_cumprod) or Cosine()")

    @property
    def limits(self) -> tuple[float, float] | None:
        """Those of the index."""
        return self.noise_index.limits

    def alpha(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """1 / sqrt(1 + s^2)."""
        return 1.0 / jnp.sqrt(1.0 + noise_level**2)

    def index(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """By the index given."""
        return self.noise_index(noise_level)


class FlowMatching(Path):
    """The straight path z_t = (1 - t) z + t e, with s = t / (1 - t), so t = s / (1 + s).

    Args:
        data_at: the network's time at which there is only data: 0, or 1 as Lipman et al. and Liu et al. count (their
            time is then 1 - t, and the path t data + (1 - t) noise; a sigma_min of Lipman et al. is taken as 0).

    Raises:
        ValueError: `data_at` is neither 0 nor 1.
    """

    data_at: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        if self.data_at not in (0, 1):
            raise ValueError(f"FlowMatching got data_at={self.data_at!r}; give 0 or 1, the time of pure data.")

    @property
    def limits(self) -> tuple[float, float]:
        """All levels."""
        return 0.0, math.inf

    def alpha(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """1 - t = 1 / (1 + s)."""
        return 1.0 / (1.0 + noise_level)

    def index(self, noise_level: Float[Array, ""]) -> Float[Array, ""]:
        """t, or 1 - t where data is at 1."""
        return (1.0 if self.data_at else noise_level) / (1.0 + noise_level)


# --- what a network's output says -----------------------------------------------------------------------------------


class Parametrization(eqx.Module):
    """A network's output -> D(z_s, s)."""

    @property
    @abc.abstractmethod
    def limits(self) -> tuple[float, float] | None:
        """Lowest and highest s that can be asked for; None where only the one who trained the network can say."""

    @abc.abstractmethod
    def __call__(
        self, network: NetworkFunction, z_s: Float[Array, ...], noise_level: Float[Array, ""], noise: Noise
    ) -> Float[Array, ...]:
        """D(z_s, s) by one call of `network(z_t, index)`; shape of the latent.

        Args:
            network: with its conditioning in it.
            z_s: z + s e.
            noise_level: s > 0.
            noise: of the forward process, for its covariance C.
        """


class PathParametrization(Parametrization):
    """One of an output on a path; see the module for the formulas."""

    path: eqx.AbstractVar[Path]

    def __check_init__(self) -> None:
        require(self.path, Path, self, "the path", "VariancePreserving(Cosine())")

    @property
    def limits(self) -> tuple[float, float] | None:
        """Those of the path."""
        return self.path.limits

    def __call__(
        self, network: NetworkFunction, z_s: Float[Array, ...], noise_level: Float[Array, ""], noise: Noise
    ) -> Float[Array, ...]:
        """D(z_s, s)."""
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
        """E[z | z_t] from the network's output at z_t = alpha z + sigma e."""


class Denoised(PathParametrization):
    """The network gives E[z | z_t]: a denoiser, x0-prediction, or an EDM network with its preconditioning in it.

    Args:
        path: the network's coordinates; z_s itself and s by default.
    """

    path: Path = VarianceExploding()

    def denoised(self, output: Array, z_t: Array, alpha: Array, sigma: Array, noise: Noise) -> Array:
        """The output."""
        return output


class Epsilon(PathParametrization):
    """The network gives E[e | z_t], the noise that was added (Ho et al. 2020).

    Args:
        path: the network's coordinates.
    """

    path: Path

    def denoised(self, output: Array, z_t: Array, alpha: Array, sigma: Array, noise: Noise) -> Array:
        """(z_t - sigma e) / alpha."""
        return (z_t - sigma * output) / alpha


class VPrediction(PathParametrization):
    """The network gives E[v | z_t] with v = alpha e - sigma z (Salimans & Ho 2022).

    Args:
        path: the network's coordinates; variance preserving where v is used, but not necessarily.
    """

    path: Path

    def denoised(self, output: Array, z_t: Array, alpha: Array, sigma: Array, noise: Noise) -> Array:
        """(alpha z_t - sigma v) / (alpha^2 + sigma^2)."""
        return (alpha * z_t - sigma * output) / (alpha**2 + sigma**2)


class Score(PathParametrization):
    """The network gives the score, grad log p(z_t) with respect to z_t (Song et al. 2021).

    Args:
        path: the network's coordinates. A score with respect to z_s is one on `VarianceExploding`.
    """

    path: Path

    def denoised(self, output: Array, z_t: Array, alpha: Array, sigma: Array, noise: Noise) -> Array:
        """(z_t + sigma^2 C score) / alpha."""
        return (z_t + sigma**2 * noise.covariance_product(output)) / alpha


class Velocity(PathParametrization):
    """The network gives E[u | z_t], the velocity of the straight path in its own time (Lipman et al., Liu et al. 2023).

    u = e - z where data is at time 0, z - e where it is at time 1.

    Args:
        path: which end of the network's time is data.

    Raises:
        TypeError: another path than `FlowMatching`, along which the velocity is another.
    """

    path: FlowMatching = FlowMatching()

    def __check_init__(self) -> None:
        require(self.path, FlowMatching, self, "the path", "FlowMatching(data_at=1)")

    def denoised(self, output: Array, z_t: Array, alpha: Array, sigma: Array, noise: Noise) -> Array:
        """z_t - t (e - z)."""
        return z_t + (sigma if self.path.data_at else -sigma) * output


class Preconditioned(Parametrization):
    """The network is EDM's F, without its preconditioning (Karras et al. 2022, table 1).

        D = c_skip z_s + c_out F(c_in z_s, c_noise),    c_in = 1 / sqrt(s^2 + d^2),
        c_skip = d^2 c_in^2,    c_out = s d c_in,    c_noise = log(s) / 4.

    Args:
        sigma_data: d, the standard deviation of z that the network was trained with (EDM's images 0.5, GenCast 1).
        noise_index: what the network is told; c_noise by default.

    Raises:
        ValueError: `sigma_data` is not positive.
        TypeError: `noise_index` is not a `NoiseIndex`.
    """

    sigma_data: float = eqx.field(static=True)
    noise_index: NoiseIndex = LogLevel(0.25)

    def __check_init__(self) -> None:
        if not self.sigma_data > 0.0:
            raise ValueError(f"Preconditioned got sigma_data={self.sigma_data!r}; give a positive number.")
        require(self.noise_index, NoiseIndex, self, "noise_index", "LogLevel(0.25)")

    @property
    def limits(self) -> tuple[float, float] | None:
        """Those of the index."""
        return self.noise_index.limits

    def __call__(
        self, network: NetworkFunction, z_s: Float[Array, ...], noise_level: Float[Array, ""], noise: Noise
    ) -> Float[Array, ...]:
        """c_skip z_s + c_out F."""
        c_in = 1.0 / jnp.sqrt(noise_level**2 + self.sigma_data**2)
        output = network(c_in * z_s, self.noise_index(noise_level))
        return (self.sigma_data * c_in) ** 2 * z_s + noise_level * self.sigma_data * c_in * output
