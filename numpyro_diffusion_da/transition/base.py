"""Interface of one transition p(x' | c) of the state.

A filter needs from a transition its mean and covariance, a draw, a draw given an observation, and such a draw with its
weight. `DiffusionDynamics` computes them with a diffusion prior, `GaussianDynamics` in closed form.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.guidance import Guidance
from numpyro_diffusion_da.observation.likelihood import Likelihood


class DrawRecord(NamedTuple):
    """Cost of a draw, and a measure of its error.

    Attributes:
        passes: network passes made.
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


class Dynamics(eqx.Module):
    """Abstract transition p(x' | c) of the state, for one given c."""

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

    @abc.abstractmethod
    def draw(self, rng_key: PRNGKeyArray) -> tuple[Float[Array, ...], DrawRecord]:
        """Draw x' ~ p(x' | c).

        Returns:
            (x', shape of the state; record of the draw).
        """

    @abc.abstractmethod
    def conditional_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """Draw x' ~ p(x' | c, y), the optimal proposal.

        Args:
            rng_key: random key.
            likelihood: likelihood of the step's observations y.
            guidance: guidance of a diffusion; closed forms ignore it.

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
