"""The likelihood of one step's observations, whitened.

Observations y = h(x) + N(0, R), of one or several sites, some of them missing, become one vector of unit-variance
residuals r(x) = R^{-1/2} (y - h(x)), zero where missing. In these coordinates R is the identity, every covariance
R + H V H^T becomes I + (R^{-1/2} H) V (R^{-1/2} H)^T, and a missing observation is a row of zeros: nothing else in the
library has to know about units, correlated errors or gaps.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_diffusion_da.observation.moment_matching import (
    LEAST_VARIANCE,
    PseudoObservations,
    pseudo_observations,
    tilted_moments,
)

LOG_TWO_PI = 1.8378770664093453
PROBES = 16
"""Directions that tell how far each observation's coordinate moves with the state; no network passes."""


class GaussianObservation(NamedTuple):
    """One observed site at a given state: mean, error and value, flattened.

    Attributes:
        mean: h(x), shape (m,), in the observation's unit.
        scale: standard deviations of the error, shape (m,), or a lower Cholesky factor of R, shape (m, m).
        value: y, shape (m,), in the observation's unit.
        observed: False where the value is missing, shape (m,).
        power: of the likelihood, p(y | x)^power (NumPyro's `handlers.scale`): shape (m,), or () with a factor.
    """

    mean: Float[Array, " m"]
    scale: Float[Array, " m"] | Float[Array, "m m"]
    value: Float[Array, " m"]
    observed: Bool[Array, " m"]
    power: Float[Array, ...] | float = 1.0


def whiten(observation: GaussianObservation) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """(R^{-1/2} (y - h) with zeros where missing, the terms of -1/2 log det(2 pi R) over what is observed)."""
    observed = observation.observed
    # A missing value may be NaN: it must be replaced before any arithmetic, or its gradient is NaN too.
    residual = jnp.where(observed, jnp.where(observed, observation.value, 0.0) - observation.mean, 0.0)
    power = observation.power
    if observation.scale.ndim == 1:
        scale = jnp.where(observed, observation.scale, 1.0)
        normalizers = jnp.where(observed, -jnp.log(scale) - 0.5 * LOG_TWO_PI, 0.0)
        return residual * jnp.sqrt(power) / scale, power * normalizers
    covariance = observation.scale @ observation.scale.T
    # Unit rows and columns in place of the missing ones: the Cholesky factor then is that of the observed block.
    both = observed[:, None] & observed[None, :]
    factor = jnp.linalg.cholesky(jnp.where(both, covariance, jnp.eye(len(residual), dtype=residual.dtype)))
    whitened = jsl.solve_triangular(factor, residual, lower=True)
    normalizers = -jnp.log(jnp.diagonal(factor)) - 0.5 * observed * LOG_TWO_PI
    return whitened * jnp.sqrt(power), power * normalizers


class GeneralObservation(NamedTuple):
    """One observed site of any distribution at a given state, whose elements are independent given the state.

    Attributes:
        parameters: the distribution's parameters for each element, unconstrained (the logarithm of a rate, ...),
            shape (m, p).
        log_prob: parameters, shape (m, p) -> log p(y_i) of each element, shape (m,); anything where missing.
        observed: False where the value is missing, shape (m,).
        components: the one component of the flattened state that each element looks at, shape (m,); None where it is
            another linear functional, or not known.
    """

    parameters: Float[Array, "m p"]
    log_prob: Callable[[Float[Array, "m p"]], Float[Array, " m"]]
    observed: Bool[Array, " m"]
    components: Int[np.ndarray, " m"] | None = None


class Likelihood(eqx.Module):
    """log p(y | x) of the observations of one step, and what stands for it where a Gaussian is needed.

    Attributes:
        observe: x -> the observed sites at x.
    """

    observe: Callable[[Float[Array, ...]], Sequence[GaussianObservation | GeneralObservation]]

    @abc.abstractmethod
    def log_prob(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """log p(y | x) of all that is observed."""

    @abc.abstractmethod
    def pointwise(self, x: Float[Array, ...]) -> Float[Array, " m"]:
        """log p(y_j | x) of each observation, site by site in the program's order; 0 where missing.

        Their sum is `log_prob`. Where errors are correlated they are the terms of whitened residuals, each of which
        mixes the values of an event.
        """

    @abc.abstractmethod
    def coordinates(self, x: Float[Array, ...], tangents: Float[Array, "k ..."]) -> Coordinates | None:
        """What the observations that are not Gaussian look at, near x; None where all are Gaussian.

        Args:
            x: a state.
            tangents: independent directions from x, with the spread that each component has, leading axis k.
        """

    @abc.abstractmethod
    def around(self, coordinates: Coordinates | None, variances: Float[Array, " n"] | None) -> GaussianLikelihood:
        """The Gaussian likelihood with the same effect, where the n coordinates have mean 0 and these variances.

        Args:
            coordinates: from `coordinates`.
            variances: shape (n,); None where there are no coordinates.
        """


class GaussianLikelihood(Likelihood):
    """log p(y | x) for Gaussian errors and any differentiable h.

    Attributes:
        observe: x -> the observed sites at x. The error may depend on x; its derivative is ignored.
    """

    observe: Callable[[Float[Array, ...]], Sequence[GaussianObservation]]

    def residual(self, x: Float[Array, ...]) -> Float[Array, " m"]:
        """r(x) = R^{-1/2} (y - h(x)) of all sites, one after the other."""
        sites = [site._replace(scale=jax.lax.stop_gradient(site.scale)) for site in self.observe(x)]
        return jnp.concatenate([whiten(site)[0] for site in sites])

    def log_normalizers(self, x: Float[Array, ...]) -> Float[Array, " m"]:
        """The terms of -1/2 log det(2 pi R) over the observed values, R at x."""
        return jnp.concatenate([whiten(site)[1] for site in self.observe(x)])

    def log_normalizer(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """Their sum."""
        return jnp.sum(self.log_normalizers(x))

    def log_prob(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """log N(y; h(x), R)."""
        residual = self.residual(x)
        return self.log_normalizer(x) - 0.5 * jnp.vdot(residual, residual)

    def pointwise(self, x: Float[Array, ...]) -> Float[Array, " m"]:
        """The terms of log N(y; h(x), R)."""
        residuals, normalizers = zip(*map(whiten, self.observe(x)), strict=True)
        return jnp.concatenate(normalizers) - 0.5 * jnp.concatenate(residuals) ** 2

    def coordinates(self, x: Float[Array, ...], tangents: Float[Array, "k ..."]) -> None:
        """None: all is Gaussian."""
        return

    def around(self, coordinates: Coordinates | None, variances: Float[Array, " n"] | None) -> GaussianLikelihood:
        """Itself."""
        return self


class GeneralLikelihood(Likelihood):
    """log p(y | x) for sites of which some are not Gaussian.

    Attributes:
        observe: x -> the observed sites at x.
    """

    observe: Callable[[Float[Array, ...]], Sequence[GaussianObservation | GeneralObservation]]

    def gaussian(self, x: Float[Array, ...]) -> list[GaussianObservation]:
        """The Gaussian sites at x."""
        return [site for site in self.observe(x) if isinstance(site, GaussianObservation)]

    def general(self, x: Float[Array, ...]) -> list[GeneralObservation]:
        """The others."""
        return [site for site in self.observe(x) if isinstance(site, GeneralObservation)]

    def log_prob(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """The sum over all sites."""
        return jnp.sum(self.pointwise(x))

    def pointwise(self, x: Float[Array, ...]) -> Float[Array, " m"]:
        """Of all sites."""
        general = [jnp.where(s.observed, s.log_prob(s.parameters), 0.0) for s in self.general(x)]
        gaussian = [normalizer - 0.5 * r**2 for r, normalizer in map(whiten, self.gaussian(x))]
        return self.in_order(x, [*gaussian, *general])

    def are_separate(self, x: Float[Array, ...]) -> bool:
        """Whether every observation looks at one component of the state that no other looks at."""
        sites = self.observe(x)
        known = [s.components for s in sites if isinstance(s, GeneralObservation) and s.components is not None]
        components = np.concatenate(known) if known else np.zeros(0, int)
        return len(known) == len(sites) and len(np.unique(components)) == len(components)

    def in_order(self, x: Float[Array, ...], parts: Sequence[Float[Array, " m"]]) -> Float[Array, " m"]:
        """What is known of each site, those that are Gaussian first, in the order of all sites."""
        sites = self.observe(x)
        gaussian = iter(parts[: len(self.gaussian(x))])
        general = iter(parts[len(self.gaussian(x)) :])
        kinds = [isinstance(site, GaussianObservation) for site in sites]
        return jnp.concatenate([next(gaussian) if kind else next(general) for kind in kinds])

    def gaussian_log_normalizer(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """-1/2 log det(2 pi R) of the Gaussian sites."""
        return sum((jnp.sum(whiten(site)[1]) for site in self.gaussian(x)), jnp.zeros(()))

    def coordinates(self, x: Float[Array, ...], tangents: Float[Array, "k ..."]) -> Coordinates:
        """One coordinate an element: along the direction in which its parameters vary most under the tangents."""
        sites = self.general(x)
        _, push = jax.linearize(lambda x: [site.parameters for site in self.general(x)], x)
        moved = jax.vmap(push)(tangents)  # for each site (k, m, p)
        axes = [_main_axis(jnp.where(s.observed[:, None], u, 0.0)) for s, u in zip(sites, moved, strict=True)]
        return Coordinates(self.general, sites, axes)

    def around(self, coordinates: Coordinates | None, variances: Float[Array, " n"] | None) -> GaussianLikelihood:
        """Pseudo observations by moment matching for each site that is not Gaussian."""
        assert coordinates is not None
        assert variances is not None
        center = jnp.zeros_like(variances)
        variances = jnp.maximum(variances, LEAST_VARIANCE)
        tilted = tilted_moments(coordinates.log_prob, center, variances)
        return self.with_pseudo(coordinates, pseudo_observations(tilted, center, variances))

    def with_pseudo(self, coordinates: Coordinates, pseudo: PseudoObservations) -> GaussianLikelihood:
        """The Gaussian sites, and the given pseudo observations of the coordinates."""

        def observe(x: Array) -> list[GaussianObservation]:
            seen = GaussianObservation(coordinates(x), pseudo.scale, pseudo.value, coordinates.observed)
            return [*self.gaussian(x), seen]

        return GaussianLikelihood(observe)


def probe_signs(shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "k ..."]:
    """The signs that `Likelihood.coordinates` probes a state with, before each component is given its spread.

    Signs, not normals: an observation that looks at one component then has its spread without sampling error.
    """
    return jax.random.rademacher(jax.random.key(0), (PROBES, *shape), dtype)


class Coordinates:
    """One coordinate t_i(x) for each of n independent observations that are not Gaussian, zero at the center.

    Args:
        general: x -> the sites.
        sites: those at the center.
        axes: for each site the direction of t in parameter space, shape (m, p): t = 1 moves the parameters by it.
    """

    def __init__(
        self,
        general: Callable[[Array], list[GeneralObservation]],
        sites: list[GeneralObservation],
        axes: list[Float[Array, "m p"]],
    ) -> None:
        self._general, self._sites, self._axes = general, sites, axes
        self.sizes = [len(site.observed) for site in sites]
        looks = [jnp.sum(axis**2, axis=1) for axis in axes]
        self._units = [
            jnp.where(n[:, None] > 0, axis / jnp.where(n > 0, n, 1.0)[:, None], 0.0)
            for n, axis in zip(looks, axes, strict=True)
        ]
        self.observed = jnp.concatenate([s.observed & (n > 0) for s, n in zip(sites, looks, strict=True)])

    def __call__(self, x: Float[Array, ...]) -> Float[Array, " n"]:
        """t(x)."""
        return jnp.concatenate(
            [
                jnp.sum((now.parameters - site.parameters) * unit, axis=1)
                for now, site, unit in zip(self._general(x), self._sites, self._units, strict=True)
            ]
        )

    def log_prob(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        """log p(y_i | t_i); 0 where missing."""
        parts = jnp.split(t, np.cumsum(self.sizes)[:-1])
        return jnp.concatenate(
            [
                jnp.where(site.observed, site.log_prob(site.parameters + part[:, None] * axis), 0.0)
                for site, part, axis in zip(self._sites, parts, self._axes, strict=True)
            ]
        )


def _main_axis(moved: Float[Array, "k m p"]) -> Float[Array, "m p"]:
    """The direction of largest second moment of each element's k displacements, as long as its root."""
    if moved.shape[2] == 1:
        return jnp.sqrt(jnp.mean(moved**2, axis=0))
    values, vectors = jnp.linalg.eigh(jnp.einsum("kmp,kmq->mpq", moved, moved) / len(moved))
    return vectors[:, :, -1] * jnp.sqrt(jnp.maximum(values[:, -1:], 0.0))
