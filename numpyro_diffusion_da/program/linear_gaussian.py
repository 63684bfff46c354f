r"""Matrices of a linear-Gaussian program, for the exact filters of other libraries.

A program whose means are affine in the state, and whose errors do not depend on the state, has the form

$$
x_0 \sim \mathcal N(m, P), \qquad x' = F x + c + \mathcal N(0, Q), \qquad y = H x' + d + \mathcal N(0, R) .
$$

For such a program a Kalman filter is exact. `LinearGaussian` finds the matrices by differentiating the program, so a
user writes the model once. `cuthbert.gaussian.kalman` takes the matrices in this form. This module does not import
cuthbert.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float
from numpyro import handlers

from numpyro_diffusion_da.observation.likelihood import GaussianObservation
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.sites import gaussian_observations, gaussian_parts
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.transition.gaussian import GaussianDynamics

TOLERANCE = 1e-3
"""Largest deviation from linearity, relative to the largest value compared; slightly above the errors of float32."""

DynamicsMatrices = tuple[Float[Array, "n n"], Float[Array, " n"], Float[Array, "n n"]]
ObservationMatrices = tuple[Float[Array, "m n"], Float[Array, " m"], Float[Array, "m m"], Float[Array, " m"]]


class LinearGaussian:
    r"""Matrices of a linear-Gaussian program, over the flattened latent site with n values.

    The program is $x_0 \sim \mathcal N(m, P)$, $x' = F x + c + \mathcal N(0, Q)$, $y = H x' + d + \mathcal N(0, R)$. A
    factor of a covariance is any L with L L^T equal to it. The covariance Q of a diffusion comes from its highest noise
    level s, and is too small by a relative error of (spread of z / s)^2; this is at most 0.001 for `GaussianPrior`.

    Args:
        program: state-space model, ``ndda.program.StateSpaceModel(model, (y,))``. Its scan must carry the value of the
            latent site and nothing else.

    Attributes:
        initial_mean: m, shape (n,).
        initial_factor: factor of P, shape (n, n).
        model_inputs: inputs of all times, with a leading axis of time. `dynamics` and `observation` take the inputs of
            one time.

    Raises:
        ValueError: the program is not linear and Gaussian, which is checked at the first time, or its scan carries more
            than the latent site. The message names the part.
    """

    initial_mean: Float[Array, " n"]
    initial_factor: Float[Array, "n n"]
    model_inputs: TimeInputs

    def __init__(self, program: StateSpaceModel) -> None:
        program.check(needs_dynamics=True, gaussian_errors=True)
        carry = program.call(jax.random.key(0)).init
        if not isinstance(carry, jax.Array):
            raise ValueError(
                f"the scan of '{program.structure.name}' carries {jax.tree.structure(carry)}, but a Kalman filter "
                "needs the value of the latent site alone; carry that, or filter the program with ndda.Filter."
            )
        self.program = program
        self._shape = carry.shape
        self._zero = jnp.zeros(carry.size, carry.dtype)
        self.initial_mean, self.initial_factor = self._initial()
        self.model_inputs = program.time_inputs()
        for name, (expected, got) in jax.device_get(jax.jit(self._identities)()).items():
            if not np.allclose(got, expected, rtol=0, atol=TOLERANCE * max(np.abs(expected).max(), 1e-30)):
                raise ValueError(
                    f"{name} is not that of a linear-Gaussian program, so no Kalman filter is exact for "
                    f"'{program.structure.name}'; filter it with ndda.Filter."
                )

    def dynamics(self, inputs: TimeInputs) -> DynamicsMatrices:
        """Matrices of the transition at one time.

        Args:
            inputs: inputs of the time.

        Returns:
            (F, shape (n, n); c, shape (n,); factor of Q, shape (n, n)).
        """
        mean, factor = self._moments(self._zero, inputs)
        return jax.jacfwd(lambda x: self._moments(x, inputs)[0])(self._zero), mean, factor

    def observation(self, inputs: TimeInputs) -> ObservationMatrices:
        """Matrices and values of the observations at one time, with the m values of all observed sites concatenated.

        Args:
            inputs: inputs of the time.

        Returns:
            (H, shape (m, n); d, shape (m,); factor of R, shape (m, m); y, shape (m,), NaN where missing).

        Raises:
            ValueError: an observed site is under `handlers.scale`.
        """
        parts = self._observed(self._zero, self._zero, inputs)
        value = jnp.concatenate([jnp.where(part.observed, part.value, jnp.nan) for part in parts])
        operator = jax.jacfwd(lambda x: _mean(self._observed(x, self._zero, inputs)))(self._zero)
        return operator, _mean(parts), _factor(parts), value

    def _moments(self, x: Array, inputs: TimeInputs) -> tuple[Array, Array]:
        """Mean, shape (n,), and covariance factor, shape (n, n), of x' given the flattened state x."""
        dynamics = self.program.transition(x.reshape(self._shape), inputs)
        if isinstance(dynamics, GaussianDynamics):
            diagonal = dynamics.factor.shape == dynamics.mean.shape
            return dynamics.mean.reshape(-1), jnp.diag(dynamics.factor.reshape(-1)) if diagonal else dynamics.factor
        # A diffusion only gives products with its covariance: one product per unit vector makes the matrix.
        moments = dynamics.moments()
        covariance = jax.vmap(lambda v: moments.covariance_product(v.reshape(self._shape)).reshape(-1))(
            jnp.eye(x.size, dtype=x.dtype)
        )
        # An eigendecomposition makes a factor also of a matrix that rounding has made slightly indefinite.
        values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.T))
        return moments.mean.reshape(-1), vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None]

    def _observed(self, x: Array, carry: Array, inputs: TimeInputs) -> list[GaussianObservation]:
        """Gaussian observations at the flattened state x and the flattened carry.

        Raises:
            ValueError: an observed site is under `handlers.scale`.
        """
        sites = self.program.sites(carry.reshape(self._shape), inputs, x.reshape(self._shape)).observed
        for name, site in sites.items():
            if not (isinstance(site.power, float) and site.power == 1.0):
                raise ValueError(
                    f"site '{name}' is under handlers.scale, but a Kalman filter cannot use a power of a "
                    "likelihood; remove handlers.scale."
                )
        return [part for name, site in sites.items() for part in gaussian_observations(name, site.fn, site.value)]

    def _identities(self) -> dict[str, tuple[Array, Array]]:
        """Pairs (expected, got) that are equal if the program is linear and Gaussian, by a name for messages.

        They compare the matrices, found at the zero state, with the program at one arbitrary state and carry.
        """
        call = self.program.call(jax.random.key(0))
        inputs = call.first_inputs()
        x, carry = jax.random.normal(jax.random.key(1), (2, *self._zero.shape), self._zero.dtype)
        matrix, offset, root = self.dynamics(inputs)
        mean, root_elsewhere = self._moments(x, inputs)
        operator, shift, error, _ = self.observation(inputs)
        elsewhere = self._observed(x, carry, inputs)
        advanced = self.program.advance(x.reshape(self._shape), carry.reshape(self._shape), inputs)
        latent = self.program.structure.latent_name
        return {
            f"the next carry of the scan, which must be the value of site '{latent}',": (x, advanced.reshape(-1)),
            f"the mean of site '{latent}'": (matrix @ x + offset, mean),
            f"the covariance of site '{latent}'": (root @ root.T, root_elsewhere @ root_elsewhere.T),
            "the mean of the observed sites": (operator @ x + shift, _mean(elsewhere)),
            "the error of the observed sites": (error, _factor(elsewhere)),
        }

    def _initial(self) -> tuple[Array, Array]:
        """Mean, shape (n,), and covariance factor, shape (n, n), of the first carry.

        Raises:
            ValueError: a site before the scan is not Gaussian, or the first carry is not a linear function of them.
        """
        key, size = jax.random.key(0), self._zero.size
        with handlers.trace() as trace:
            self.program.call(key)
        sites = {name: trace[name]["fn"] for name in self.program.structure.initial_names}
        parts = []
        for name, fn in sites.items():
            found = gaussian_parts(fn)
            if found is None:
                raise ValueError(
                    f"site '{name}' has the distribution {type(fn).__name__}, but a Kalman filter starts from a Normal "
                    "or a MultivariateNormal; give it one, or filter the program with ndda.Filter."
                )
            parts += found

        def carry(flat: Array) -> Array:
            values, start = {}, 0
            for name, fn in sites.items():
                values[name] = flat[start : start + int(np.prod(fn.shape()))].reshape(fn.shape())
                start += values[name].size
            with handlers.substitute(data=values):
                return self.program.call(key).init.reshape(-1)

        def moments() -> tuple[Array, Array, Array, Array]:
            if not parts:
                start = carry(jnp.zeros(0))
                return start, jnp.zeros((size, size)), start, start
            mean = jnp.concatenate([m for m, _ in parts])
            push = jax.jacfwd(carry)(mean)
            factor = push @ jsl.block_diag(*[f if f.ndim == 2 else jnp.diag(f) for _, f in parts])
            # The R of a QR factorization makes a square factor for any number of sites; zeros pad it if there are few.
            rows = jnp.concatenate([factor.T, jnp.zeros((size, size), factor.dtype)])
            start = carry(mean)
            return start, jnp.linalg.qr(rows, mode="r").T, start + push.sum(1), carry(mean + 1.0)

        mean, factor, expected, got = jax.jit(moments)()
        if not np.allclose(got, expected, atol=TOLERANCE):
            raise ValueError(
                f"the first carry of '{self.program.structure.name}' is not a linear function of the sites before its "
                "scan, so no Kalman filter is exact for it; filter it with ndda.Filter."
            )
        return mean, factor


def _mean(parts: list[GaussianObservation]) -> Array:
    """Means of all observations, concatenated, shape (m,)."""
    return jnp.concatenate([part.mean for part in parts])


def _factor(parts: list[GaussianObservation]) -> Array:
    """Factor of the error covariance of all observations, block diagonal, shape (m, m)."""
    return jsl.block_diag(*[part.scale if part.scale.ndim == 2 else jnp.diag(part.scale) for part in parts])
