r"""Stochastic Lorenz-96 (Lorenz 1996, eq. 1), the true system of the Lorenz-96 emulator, in steps of 0.1 time units.

$$
\frac{dx_i}{dt} = (x_{i+1} - x_{i-2})\, x_{i-1} - x_i + F, \qquad x' = \mathrm{flow}_{0.1}(x) + N(0, 0.5 I),
$$

on a ring of sites, with F = 8, for which it is chaotic. All quantities are dimensionless. One time unit corresponds to
about five days of weather by Lorenz's comparison of error growth. The noise of each step is part of the system: it
gives the transition the spread that guidance requires.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

FORCING = 8.0
"""Forcing F."""

STEP = 0.1
"""Length of one step, in time units."""

SUBSTEPS = 2
"""Runge-Kutta steps per step. The difference to a converged flow is 0.13 % of the persistence error."""

NOISE_VARIANCE = 0.5
"""Variance of the Gaussian noise that each step adds to each site."""


def tendency(x: Float[Array, "*batch sites"]) -> Float[Array, "*batch sites"]:
    """Time derivative dx/dt per time unit; the last axis is the ring, of any number of sites."""
    return (jnp.roll(x, -1, -1) - jnp.roll(x, 2, -1)) * jnp.roll(x, 1, -1) - x + FORCING


def flow(x: Float[Array, "*batch sites"]) -> Float[Array, "*batch sites"]:
    """State after one step of 0.1 time units without noise, E[x' | x], by the classical Runge-Kutta scheme."""
    h = STEP / SUBSTEPS
    for _ in range(SUBSTEPS):
        k1 = tendency(x)
        k2 = tendency(x + 0.5 * h * k1)
        k3 = tendency(x + 0.5 * h * k2)
        k4 = tendency(x + h * k3)
        x = x + (h / 6.0) * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    return x


def draw(rng_key: PRNGKeyArray, x: Float[Array, "*batch sites"]) -> Float[Array, "*batch sites"]:
    """Draw the state after one step, x' ~ N(flow(x), 0.5 I)."""
    return flow(x) + NOISE_VARIANCE**0.5 * jax.random.normal(rng_key, x.shape, x.dtype)


def trajectory(rng_key: PRNGKeyArray, x: Float[Array, " sites"], steps: int) -> Float[Array, "steps sites"]:
    """Draw a trajectory: the states after each of `steps` steps from x."""

    def step(x: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        x = draw(key, x)
        return x, x

    return jax.lax.scan(step, x, jax.random.split(rng_key, steps))[1]
