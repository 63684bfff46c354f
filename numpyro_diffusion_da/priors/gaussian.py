r"""Linear-Gaussian transition as a diffusion prior with an exact denoiser.

The transition is $p(x' | x) = N(A x + b, Q)$. The latent $z$ is the scaled residual of the mean:

$$x' = A x + b + S z, \qquad S^2 = \mathrm{tr}(Q) / d, \qquad z | x \sim N(0, Q_z), \quad Q_z = Q / S^2.$$

For noise $e \sim N(0, C)$ the denoiser of $z_s = z + s e$ is

$$D(z_s, s) = Q_z (Q_z + s^2 C)^+ z_s.$$

Posteriors and evidence are known in closed form for this prior. Tests, tutorial and benchmarks compare with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, ArrayLike, Float, PyTree

from numpyro_diffusion_da.arguments import real_array, require_noise_range
from numpyro_diffusion_da.diffusion.noise import FactorNoise, Noise, WhiteNoise, positive_semidefinite
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.fields.layout import Layout

if TYPE_CHECKING:
    import numpyro.distributions as dist


class GaussianPrior(DiffusionPrior):
    """Linear-Gaussian transition N(A x + b, Q) with its exact denoiser.

    Args:
        transition: matrix A, shape (d, d).
        covariance: covariance Q in the squared unit of the state, shape (d, d), symmetric positive semi-definite.
        offset: offset b in the unit of the state, shape (d,); zero by default.
        noise_covariance: covariance C of the diffusion noise in the latent, shape (d, d), symmetric positive
            semi-definite and possibly singular; the identity by default. The range of C must contain the range of Q,
            because the diffusion generates no variance outside the range of C.
        noise_range: (lowest, highest) noise level, relative to a latent of unit mean variance; None for 0.02 to 80, and
            wider if Q has modes, relative to C, with a standard deviation below 0.04 or above 5.3. Modes below 0.002
            are not resolved.

    Attributes:
        noise: diffusion noise N(0, C).
        layout: layout with one axis of d components.
        conditioning_passes: 0, because `condition` runs no network.
        latent_scale: scale S of the latent, the root of the mean variance, in the unit of the state.
        variances: variances of z along the modes that diagonalize Q_z and C together, shape (rank of C,).
        to_modes: matrix from z to the coefficients of the modes, shape (rank of C, d).
        from_modes: matrix from the coefficients of the modes to z, shape (d, rank of C).

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the shapes do not match, a value is not finite, a covariance is not symmetric positive
            semi-definite, Q has variance outside the range of C, or `noise_range` is not two increasing levels.
    """

    transition: Float[Array, "d d"]
    covariance: Float[Array, "d d"]
    offset: Float[Array, " d"]
    noise: Noise
    noise_range: tuple[float, float] = eqx.field(static=True)
    layout: Layout = eqx.field(static=True)
    conditioning_passes: int = eqx.field(static=True)
    latent_scale: Float[Array, ""]
    variances: Float[Array, " rank"]
    to_modes: Float[Array, "rank d"]
    from_modes: Float[Array, "d rank"]

    def __init__(
        self,
        transition: ArrayLike,
        covariance: ArrayLike,
        offset: ArrayLike | None = None,
        noise_covariance: ArrayLike | None = None,
        noise_range: tuple[float, float] | None = None,
    ) -> None:
        if noise_range is not None:
            require_noise_range(noise_range, self)
        a = real_array(transition, self, "transition", "0.9 * np.eye(3)")
        if a.ndim != 2 or a.shape[0] != a.shape[1] or a.size == 0:
            raise ValueError(f"transition has shape {a.shape}; give a square matrix of shape (d, d).")
        d = len(a)
        b = np.zeros(d) if offset is None else real_array(offset, self, "offset", "np.zeros(3)")
        if b.shape != (d,):
            raise ValueError(
                f"offset has shape {b.shape}, but transition has shape {a.shape}; give a vector of length {d}."
            )
        q = real_array(covariance, self, "covariance", "0.1 * np.eye(3)")
        positive_semidefinite(q, "covariance", d)
        latent_scale = float(np.sqrt(np.trace(q) / d)) or 1.0
        if noise_covariance is None:
            values, vectors = np.ones(d), np.eye(d)
        else:
            c = real_array(noise_covariance, self, "noise_covariance", "np.eye(3)")
            values, vectors = positive_semidefinite(c, "noise_covariance", d)
            outside = q - vectors @ (vectors.T @ q)
            if np.abs(outside).max() > 1e-5 * max(np.abs(q).max(), 1e-30):
                raise ValueError(
                    f"covariance has variance outside the range of noise_covariance (rank {len(values)} of {d}), "
                    "which the diffusion cannot generate; give a noise_covariance whose range contains the range of "
                    "covariance."
                )
        # Diagonalize Q_z and C together: C = L L^T and Q_z = L diag(variances) L^T on the range of C.
        root, inverse_root = vectors * np.sqrt(values), vectors / np.sqrt(values)
        variances, rotation = np.linalg.eigh(inverse_root.T @ q @ inverse_root / latent_scale**2)
        self.transition, self.covariance, self.offset = jnp.asarray(a), jnp.asarray(q), jnp.asarray(b)
        self.latent_scale = jnp.asarray(latent_scale)
        self.variances = jnp.asarray(np.maximum(variances, 0.0))
        self.from_modes, self.to_modes = jnp.asarray(root @ rotation), jnp.asarray((inverse_root @ rotation).T)
        self.noise = WhiteNoise() if noise_covariance is None else FactorNoise(self.from_modes)
        if noise_range is None:
            self.noise_range = _resolving(variances)
        else:
            self.noise_range = (float(noise_range[0]), float(noise_range[1]))
        self.layout = Layout((d,), ("component",))
        self.conditioning_passes = 0

    def condition(self, state: PyTree, inputs: PyTree = None) -> Float[Array, " d"]:
        """Conditional mean A x + b.

        Args:
            state: previous state x, shape (d,).
            inputs: None; this prior takes no inputs.

        Returns:
            Conditional mean in the unit of the state, shape (d,).

        Raises:
            ValueError: `inputs` is not None.
        """
        if inputs is not None:
            raise ValueError("GaussianPrior takes no inputs; add a known forcing to offset=.")
        return self.transition @ jnp.asarray(state) + self.offset

    def denoise(
        self, z_s: Float[Array, " d"], noise_level: Float[Array, ""], conditioning: Float[Array, " d"]
    ) -> Float[Array, " d"]:
        """Exact denoiser D(z_s, s) = Q_z (Q_z + s^2 C)^+ z_s.

        Args:
            z_s: noised latent, shape (d,).
            noise_level: noise level s > 0.
            conditioning: conditional mean from `condition`, which the denoiser does not depend on.

        Returns:
            Denoised latent E[z | z_s], shape (d,).
        """
        shrink = self.variances / (self.variances + noise_level**2)
        return self.from_modes @ (shrink * (self.to_modes @ z_s))

    def location(self, conditioning: Float[Array, " d"]) -> Float[Array, " d"]:
        """Conditional mean A x + b in the unit of the state, shape (d,)."""
        return conditioning

    def scale(self, conditioning: Float[Array, " d"]) -> Float[Array, ""]:
        """Root of the mean variance of Q, in the unit of the state, the same for every component."""
        return self.latent_scale

    def spreads(self) -> tuple[float, float] | None:
        """Return (smallest, largest) standard deviation of the modes of z, relative to C; None while JAX traces Q.

        Modes without variance do not count.
        """
        if isinstance(self.variances, jax.core.Tracer):
            return None
        return _spreads(np.asarray(self.variances, float))

    def climatology(self) -> dist.Distribution:
        """Stationary distribution of the process x' = A x + b + N(0, Q).

        Returns:
            NumPyro distribution of states, event shape (d,).

        Raises:
            ValueError: the process has no stationary distribution, because A has an eigenvalue of modulus 1 or more.
        """
        import numpyro.distributions as dist

        a = np.asarray(self.transition, dtype=np.float64)
        radius = float(np.abs(np.linalg.eigvals(a)).max())
        if radius >= 1.0:
            raise ValueError(
                f"transition has spectral radius {radius:.3g}, so the process has no stationary distribution; "
                "give x0 another distribution, for example dist.MultivariateNormal."
            )
        mean = np.linalg.solve(np.eye(len(a)) - a, np.asarray(self.offset, dtype=np.float64))
        covariance = scipy.linalg.solve_discrete_lyapunov(a, np.asarray(self.covariance, dtype=np.float64))
        values, vectors = np.linalg.eigh(0.5 * (covariance + covariance.T))
        upper = np.linalg.qr((vectors * np.sqrt(np.maximum(values, 0.0))).T)[1]
        factor = upper.T * np.where(np.diag(upper) < 0, -1.0, 1.0)
        return dist.MultivariateNormal(jnp.asarray(mean), scale_tril=jnp.asarray(factor))


def _spreads(variances: np.ndarray) -> tuple[float, float]:
    """Return (smallest, largest) standard deviation of modes with these variances, without those of no variance."""
    spread = np.sqrt(variances[variances > 1e-8 * np.max(variances, initial=1e-30)])
    return (float(spread.min()), float(spread.max())) if len(spread) else (1.0, 1.0)


def _resolving(variances: np.ndarray) -> tuple[float, float]:
    """Return the (lowest, highest) noise level at which the default sampler resolves modes with these variances."""
    narrowest, widest = _spreads(variances)
    return min(2e-2, max(0.5 * narrowest, 1e-3)), max(80.0, 15.0 * widest)
