"""Interface of one transition p(x' | c) of the state.

A filter needs from a transition its mean and covariance, a draw, a draw given an observation, and such a draw with its
weight. `DiffusionDynamics` computes them with a diffusion prior, `OnePassDynamics` with an emulator that makes a state
from noise in one pass, and `GaussianDynamics` in closed form.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.guidance import Guidance
from numpyro_diffusion_da.observation.likelihood import Likelihood


class DrawRecord(NamedTuple):
    """Cost of a draw, and a measure of its error.

    Attributes:
        passes: network passes made, with those of the conditioning if it was computed for this draw.
        solver_residual: largest relative residual of the guidance's linear solves; 0 if there were none.
    """

    passes: NetworkPasses
    solver_residual: Float[Array, ""]


class Moments(NamedTuple):
    """Mean and covariance of p(x' | c), the covariance as a product.

    Attributes:
        mean: E[x' | c], shape of the state.
        covariance_product: function v -> Cov[x' | c] v, of the shape of the state in and out.
        passes: network passes made so far.
        passes_per_product: network passes of one covariance product.
    """

    mean: Float[Array, ...]
    covariance_product: Callable[[Float[Array, ...]], Float[Array, ...]]
    passes: NetworkPasses
    passes_per_product: NetworkPasses


class Centering(NamedTuple):
    """Change of the random numbers of a draw that centers them over an ensemble.

    The numbers z of N members become (z - mean z) (N / (N - 1))^(1/2). Each of them has the same distribution as
    before, and their mean over the ensemble is 0, so that the mean of the draws has less sampling noise. The draws of
    different members are no longer independent.

    Attributes:
        mean: mean over the ensemble, in the form of `Dynamics.random_numbers`.
        factor: (N / (N - 1))^(1/2).
    """

    mean: PyTree
    factor: float

    @staticmethod
    def over(numbers: Callable[[PRNGKeyArray], PyTree], rng_keys: Key[Array, " n"]) -> Centering:
        """Centering of the random numbers of n members, 2 or more.

        The numbers are added one member after the other, so that they are never in memory together, and the result does
        not depend on batches.

        Args:
            numbers: function from the key of a member's draw to its numbers.
            rng_keys: keys of the members.
        """
        n = len(rng_keys)
        zeros = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), jax.eval_shape(numbers, rng_keys[0]))

        def add(total: PyTree, rng_key: PRNGKeyArray) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, numbers(rng_key)), None

        total, _ = jax.lax.scan(add, zeros, rng_keys)
        return Centering(jax.tree.map(lambda z: z / n, total), (n / (n - 1)) ** 0.5)

    def __call__(self, numbers: PyTree) -> PyTree:
        """Center the numbers of one member."""
        return jax.tree.map(lambda z, mean: (z - mean) * self.factor, numbers, self.mean)


def centered(numbers: PyTree, centering: Centering | None) -> PyTree:
    """Center the random numbers of a draw; None leaves them as they are."""
    return numbers if centering is None else centering(numbers)


class Dynamics(eqx.Module):
    """Abstract transition p(x' | c) of the state, for one given c.

    Methods count the network passes that they make themselves. Whoever computes the conditioning counts its passes.
    """

    @abc.abstractmethod
    def moments(self, noise_level: float | None = None) -> Moments:
        """Return the mean and covariance of x'.

        Args:
            noise_level: noise level at which a diffusion computes the covariance; None takes the highest. Closed forms
                ignore it.
        """

    @abc.abstractmethod
    def tangents(self) -> Float[Array, "k ..."]:
        """Return directions in which x' may vary, each component with its spread, leading axis k.

        `Likelihood.coordinates` takes them.
        """

    def tangent_passes(self) -> NetworkPasses:
        """Return the network passes of `tangents`; none by default."""
        return NetworkPasses.of()

    @abc.abstractmethod
    def random_numbers(self, rng_key: PRNGKeyArray, likelihood: Likelihood | None = None) -> PyTree:
        """Return the normal random numbers of a draw with this key, which `Centering` centers, without network passes.

        They are those that a diffusion starts from, or all of a closed form. None depends on c.

        Args:
            rng_key: random key of the draw.
            likelihood: likelihood of the step's observations, for a `conditional_draw`; None for a `draw`.
        """

    @abc.abstractmethod
    def draw(self, rng_key: PRNGKeyArray, centering: Centering | None = None) -> tuple[Float[Array, ...], DrawRecord]:
        """Draw x' ~ p(x' | c).

        Args:
            rng_key: random key.
            centering: change of the random numbers; None for none.

        Returns:
            (x', shape of the state; record of the draw).
        """

    @abc.abstractmethod
    def conditional_draw(
        self,
        rng_key: PRNGKeyArray,
        likelihood: Likelihood,
        guidance: Guidance,
        centering: Centering | None = None,
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """Draw x' ~ p(x' | c, y), the optimal proposal.

        Args:
            rng_key: random key.
            likelihood: likelihood of the step's observations y.
            guidance: guidance of a diffusion; closed forms ignore it.
            centering: change of the random numbers; None for none.

        Returns:
            (x', shape of the state; record of the draw).
        """

    @abc.abstractmethod
    def weighted_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], Float[Array, ""], DrawRecord]:
        """Draw x' from a guided density q, and return it with its log-weight.

        The log-weight is log w = log p(y | x') + log p(x' | c) - log q(x'). The mean of w is p(y | c), and the mean of
        w f(x') is p(y | c) E[f(x') | c, y], however good or bad the guidance is.

        Args:
            rng_key: random key.
            likelihood: likelihood of the step's observations y.
            guidance: guidance of a diffusion; closed forms ignore it.

        Returns:
            (x', shape of the state; log w, a scalar; record of the draw).
        """
