"""One step of the state, p(x' | c): its mean and covariance, a draw, and a draw given an observation.

The filters ask these four things of any transition. `DiffusionDynamics` answers from a diffusion prior, `GaussianDynamics` in
closed form.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.guidance import Guidance
from numpyro_diffusion_da.observation.likelihood import (
    Likelihood,
)


class DrawRecord(NamedTuple):
    """What a draw cost and how far it can be trusted.

    Attributes:
        passes: network passes made.
        solver_residual: largest relative residual of the guidance's linear solves; 0 where none was made.
    """

    passes: NetworkPasses
    solver_residual: Float[Array, ""]


class Moments(NamedTuple):
    """Mean and covariance of p(x' | c), the covariance as an operator.

    Attributes:
        mean: E[x' | c], shape of the state.
        covariance_product: v -> Cov[x' | c] v, state-shaped in and out.
        passes: network passes made so far.
        passes_per_product: network passes of one covariance product.
    """

    mean: Float[Array, ...]
    covariance_product: Callable[[Float[Array, ...]], Float[Array, ...]]
    passes: NetworkPasses
    passes_per_product: NetworkPasses


class Dynamics(eqx.Module):
    """p(x' | c) for one given c."""

    @abc.abstractmethod
    def moments(self, noise_level: float | None = None) -> Moments:
        """Mean and covariance of x'.

        Args:
            noise_level: where a diffusion's covariance is read off; None is its highest. Closed forms do not need it.
        """

    @abc.abstractmethod
    def tangents(self) -> Float[Array, "k ..."]:
        """Directions in which x' may vary, each component with its spread: what `Likelihood.coordinates` takes."""

    @abc.abstractmethod
    def draw(self, rng_key: PRNGKeyArray) -> tuple[Float[Array, ...], DrawRecord]:
        """A draw x' ~ p(x' | c)."""

    @abc.abstractmethod
    def conditional_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """A draw x' ~ p(x' | c, y), the optimal proposal. Closed forms do not need the guidance."""

    @abc.abstractmethod
    def weighted_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], Float[Array, ""], DrawRecord]:
        """(x', log w, record): a guided draw x' with density q, and log w = log p(y | x') + log p(x' | c) - log q(x').

        The mean of w is p(y | c), and that of w f(x') is p(y | c) E[f(x') | c, y], however good the guidance is.
        """
