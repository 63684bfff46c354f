"""The exact case: a linear-Gaussian transition as a diffusion prior.

p(x' | x) = N(A x + b, Q). The latent is the innovation, x' = A x + b + S z with the scalar S = sqrt(mean variance), so
z | x ~ N(0, Q / S^2) and, for noise N(0, C),

    D(z_s, s) = Q_z (Q_z + s^2 C)^+ z_s.

Everything the library approximates is exact here: it is the oracle of the tests, the tutorial, and the benchmark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, ArrayLike, Float, PyTree

from numpyro_diffusion_da.diffusion.noise import FactorNoise, Noise, WhiteNoise, positive_semidefinite
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.fields.layout import Layout

if TYPE_CHECKING:
    import numpyro.distributions as dist


class GaussianPrior(DiffusionPrior):
    """N(A x + b, Q) with its exact denoiser.

    Args:
        transition: A, shape (d, d).
        covariance: Q, shape (d, d), symmetric positive semi-definite.
        offset: b, shape (d,); zero by default.
        noise_covariance: C of the diffusion's noise in the latent, shape (d, d), symmetric positive semi-definite and
            possibly singular; the identity by default. Its range must hold that of Q: variance in a direction that
            the noise never reaches could not be generated.
        noise_range: (lowest, highest) noise level, relative to a latent of unit mean variance.

    Raises:
        ValueError: shapes that do not match, a matrix that is no covariance, or a Q outside the range of C.
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
        noise_range: tuple[float, float] = (2e-2, 80.0),
    ) -> None:
        a = np.asarray(transition, dtype=np.float64)
        if a.ndim != 2 or a.shape[0] != a.shape[1]:
            raise ValueError(f"transition has shape {a.shape}, expected a square matrix (d, d).")
        d = len(a)
        b = np.zeros(d) if offset is None else np.asarray(offset, dtype=np.float64)
        if b.shape != (d,):
            raise ValueError(f"offset has shape {b.shape}, but transition is {a.shape}; give a vector of length {d}.")
        q = np.asarray(covariance, dtype=np.float64)
        positive_semidefinite(q, "covariance", d)
        latent_scale = float(np.sqrt(np.trace(q) / d)) or 1.0
        if noise_covariance is None:
            values, vectors = np.ones(d), np.eye(d)
        else:
            values, vectors = positive_semidefinite(np.asarray(noise_covariance), "noise_covariance", d)
            outside = q - vectors @ (vectors.T @ q)
            if np.abs(outside).max() > 1e-5 * max(np.abs(q).max(), 1e-30):
                raise ValueError(
                    f"covariance has variance outside the range of noise_covariance (rank {len(values)} of {d}), "
                    "which the diffusion could not generate; give a noise_covariance whose range holds it."
                )
        # Q_z and C diagonalised together: C = L L^T and Q_z = L diag(variances) L^T on the range of C.
        root, inverse_root = vectors * np.sqrt(values), vectors / np.sqrt(values)
        variances, rotation = np.linalg.eigh(inverse_root.T @ q @ inverse_root / latent_scale**2)
        self.transition, self.covariance, self.offset = jnp.asarray(a), jnp.asarray(q), jnp.asarray(b)
        self.latent_scale = jnp.asarray(latent_scale)
        self.variances = jnp.asarray(np.maximum(variances, 0.0))
        self.from_modes, self.to_modes = jnp.asarray(root @ rotation), jnp.asarray((inverse_root @ rotation).T)
        self.noise = WhiteNoise() if noise_covariance is None else FactorNoise(self.from_modes)
        self.noise_range = noise_range
        self.layout = Layout((d,), ("component",))
        self.conditioning_passes = 0

    def condition(self, state: PyTree, inputs: PyTree = None) -> Float[Array, " d"]:
        """The conditional mean A x + b.

        Raises:
            ValueError: inputs were given; this prior has none.
        """
        if inputs is not None:
            raise ValueError("GaussianPrior takes no inputs; put a known forcing into its offset.")
        return self.transition @ jnp.asarray(state) + self.offset

    def denoise(
        self, z_s: Float[Array, " d"], noise_level: Float[Array, ""], conditioning: Float[Array, " d"]
    ) -> Float[Array, " d"]:
        """Q_z (Q_z + s^2 C)^+ z_s."""
        shrink = self.variances / (self.variances + noise_level**2)
        return self.from_modes @ (shrink * (self.to_modes @ z_s))

    def location(self, conditioning: Float[Array, " d"]) -> Float[Array, " d"]:
        """A x + b."""
        return conditioning

    def scale(self, conditioning: Float[Array, " d"]) -> Float[Array, ""]:
        """sqrt(mean variance of Q), the same for every component."""
        return self.latent_scale

    def climatology(self) -> dist.Distribution:
        """The stationary distribution of x' = A x + b + N(0, Q).

        Raises:
            ValueError: the process has none, because A has an eigenvalue of modulus 1 or more.
        """
        import numpyro.distributions as dist

        a = np.asarray(self.transition, dtype=np.float64)
        radius = float(np.abs(np.linalg.eigvals(a)).max())
        if radius >= 1.0:
            raise ValueError(
                f"transition has spectral radius {radius:.3g}, so there is no stationary distribution; "
                "give x0 a distribution of your own."
            )
        mean = np.linalg.solve(np.eye(len(a)) - a, np.asarray(self.offset, dtype=np.float64))
        covariance = scipy.linalg.solve_discrete_lyapunov(a, np.asarray(self.covariance, dtype=np.float64))
        values, vectors = np.linalg.eigh(0.5 * (covariance + covariance.T))
        upper = np.linalg.qr((vectors * np.sqrt(np.maximum(values, 0.0))).T)[1]
        factor = upper.T * np.where(np.diag(upper) < 0, -1.0, 1.0)
        return dist.MultivariateNormal(jnp.asarray(mean), scale_tril=jnp.asarray(factor))
