r"""Whitened likelihood of the observations of one step.

The observations of a step belong to one or several sites, and some may be missing. With Gaussian errors,
$y = h(x) + \varepsilon$ and $\varepsilon \sim \mathcal N(0, R)$, they become one vector of residuals of unit variance,

$$r(x) = R^{-1/2} (y - h(x)),$$

which is zero where an observation is missing. In these coordinates $R$ is the identity, every covariance
$R + H V H^T$ becomes $I + (R^{-1/2} H) V (R^{-1/2} H)^T$, and a missing observation is a row of zeros. The rest of the
library therefore does not deal with units, correlated errors or missing values.
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
"""Number of random directions that measure how far each observation's coordinate moves with the state.

They need no network passes.
"""


class GaussianObservation(NamedTuple):
    """One observed site with Gaussian errors at a given state: mean, error and value, flattened.

    Attributes:
        mean: h(x), shape (m,), in the observation's unit.
        scale: standard deviations of the error, shape (m,), or a lower Cholesky factor of R, shape (m, m).
        value: y, shape (m,), in the observation's unit.
        observed: False where the value is missing, shape (m,).
        power: exponent of the likelihood, p(y | x)^power, as set by NumPyro's `handlers.scale`. Its shape is (m,), or
            () if `scale` is a Cholesky factor.
    """

    mean: Float[Array, " m"]
    scale: Float[Array, " m"] | Float[Array, "m m"]
    value: Float[Array, " m"]
    observed: Bool[Array, " m"]
    power: Float[Array, ...] | float = 1.0


def whiten(observation: GaussianObservation) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Whiten the observations of one Gaussian site: residuals in units of their errors, and terms of the normalizer.

    Returns:
        (whitened residual R^{-1/2} (y - h(x)), zero where missing; terms of -1/2 log det(2 pi R) over the observed
        values), each of shape (m,). The likelihood's power is included in both.
    """
    observed = observation.observed
    # A missing value may be NaN. It is replaced before any arithmetic, because otherwise its gradient would be NaN.
    residual = jnp.where(observed, jnp.where(observed, observation.value, 0.0) - observation.mean, 0.0)
    power = observation.power
    if observation.scale.ndim == 1:
        scale = jnp.where(observed, observation.scale, 1.0)
        normalizers = jnp.where(observed, -jnp.log(scale) - 0.5 * LOG_TWO_PI, 0.0)
        return residual * jnp.sqrt(power) / scale, power * normalizers
    covariance = observation.scale @ observation.scale.T
    # With unit rows and columns in place of missing values, the Cholesky factor is that of the observed block.
    both = observed[:, None] & observed[None, :]
    factor = jnp.linalg.cholesky(jnp.where(both, covariance, jnp.eye(len(residual), dtype=residual.dtype)))
    whitened = jsl.solve_triangular(factor, residual, lower=True)
    normalizers = -jnp.log(jnp.diagonal(factor)) - 0.5 * observed * LOG_TWO_PI
    return whitened * jnp.sqrt(power), power * normalizers


class GeneralObservation(NamedTuple):
    """One observed site of any distribution at a given state. Its elements are independent given the state.

    Attributes:
        parameters: unconstrained parameters of the distribution for each element (the logarithm of a rate, for
            example), shape (m, p).
        log_prob: function from parameters, shape (m, p), to log p(y_i) of each element, shape (m,). Its value is
            arbitrary where the observation is missing.
        observed: False where the value is missing, shape (m,).
        components: index of the single component of the flattened state that each element depends on, shape (m,). None
            if the elements depend on other linear functionals, or if this is not known.
        moments: value, mean and variance of each element at the state, each of shape (m,), the value arbitrary where
            missing; None if the distribution defines no mean and variance. A power divides the variance.
    """

    parameters: Float[Array, "m p"]
    log_prob: Callable[[Float[Array, "m p"]], Float[Array, " m"]]
    observed: Bool[Array, " m"]
    components: Int[np.ndarray, " m"] | None = None
    moments: tuple[Float[Array, " m"], Float[Array, " m"], Float[Array, " m"]] | None = None


class Likelihood(eqx.Module):
    """Log-likelihood log p(y | x) of the observations of one step, and its Gaussian approximation.

    Attributes:
        observe: function from x to the observed sites at x.
    """

    observe: Callable[[Float[Array, ...]], Sequence[GaussianObservation | GeneralObservation]]

    @abc.abstractmethod
    def log_prob(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """Log-likelihood log p(y | x) of all observed values."""

    @abc.abstractmethod
    def pointwise(self, x: Float[Array, ...]) -> Float[Array, " m"]:
        """Log-likelihood log p(y_j | x) of each observation, site by site in the program's order; 0 where missing.

        The terms sum to `log_prob`. If errors are correlated, a term belongs to one whitened residual, which mixes the
        values of an event.
        """

    @abc.abstractmethod
    def coordinates(self, x: Float[Array, ...], tangents: Float[Array, "k ..."]) -> Coordinates | None:
        """Coordinates that the non-Gaussian observations depend on near x; None if all observations are Gaussian.

        Args:
            x: state at which all coordinates are zero.
            tangents: independent random directions at x, scaled by the spread of each component, leading axis k.
        """

    @abc.abstractmethod
    def around(self, coordinates: Coordinates | None, variances: Float[Array, " n"] | None) -> GaussianLikelihood:
        """Gaussian likelihood with the same effect on the n coordinates, which have mean 0 and the given variances.

        Args:
            coordinates: result of the method `coordinates`.
            variances: variances of the coordinates, shape (n,); None if there are no coordinates.
        """


class GaussianLikelihood(Likelihood):
    """Log-likelihood log p(y | x) for Gaussian errors and any differentiable observation operator h.

    Attributes:
        observe: function from x to the observed sites at x. The error may depend on x; its derivative is ignored.
    """

    observe: Callable[[Float[Array, ...]], Sequence[GaussianObservation]]

    def residual(self, x: Float[Array, ...]) -> Float[Array, " m"]:
        """Whitened residuals r(x) = R^{-1/2} (y - h(x)) of all sites, concatenated; zero where missing."""
        sites = [site._replace(scale=jax.lax.stop_gradient(site.scale)) for site in self.observe(x)]
        return jnp.concatenate([whiten(site)[0] for site in sites])

    def log_normalizers(self, x: Float[Array, ...]) -> Float[Array, " m"]:
        """Terms of the log-normalizer -1/2 log det(2 pi R) over the observed values, with R at x; shape (m,)."""
        return jnp.concatenate([whiten(site)[1] for site in self.observe(x)])

    def log_normalizer(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """Sum of the log-normalizers over the observed values: -1/2 log det(2 pi R), with R at x."""
        return jnp.sum(self.log_normalizers(x))

    def log_prob(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """Log-likelihood log N(y; h(x), R) of all observed values."""
        residual = self.residual(x)
        return self.log_normalizer(x) - 0.5 * jnp.vdot(residual, residual)

    def pointwise(self, x: Float[Array, ...]) -> Float[Array, " m"]:
        """Terms of log N(y; h(x), R), one per observation, shape (m,); 0 where missing."""
        residuals, normalizers = zip(*map(whiten, self.observe(x)), strict=True)
        return jnp.concatenate(normalizers) - 0.5 * jnp.concatenate(residuals) ** 2

    def coordinates(self, x: Float[Array, ...], tangents: Float[Array, "k ..."]) -> None:
        """Return None, because all observations are Gaussian."""
        return

    def around(self, coordinates: Coordinates | None, variances: Float[Array, " n"] | None) -> GaussianLikelihood:
        """Return this likelihood, which is Gaussian already."""
        return self


class GeneralLikelihood(Likelihood):
    """Log-likelihood log p(y | x) for observed sites of which some are not Gaussian.

    Attributes:
        observe: function from x to the observed sites at x.
    """

    observe: Callable[[Float[Array, ...]], Sequence[GaussianObservation | GeneralObservation]]

    def gaussian(self, x: Float[Array, ...]) -> list[GaussianObservation]:
        """List of the Gaussian sites at x, in the program's order."""
        return [site for site in self.observe(x) if isinstance(site, GaussianObservation)]

    def general(self, x: Float[Array, ...]) -> list[GeneralObservation]:
        """List of the non-Gaussian sites at x, in the program's order."""
        return [site for site in self.observe(x) if isinstance(site, GeneralObservation)]

    def log_prob(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """Log-likelihood log p(y | x), summed over all sites."""
        return jnp.sum(self.pointwise(x))

    def pointwise(self, x: Float[Array, ...]) -> Float[Array, " m"]:
        """Log-likelihood log p(y_j | x) of each observation, in the program's order of sites; 0 where missing."""
        general = [jnp.where(s.observed, s.log_prob(s.parameters), 0.0) for s in self.general(x)]
        gaussian = [normalizer - 0.5 * r**2 for r, normalizer in map(whiten, self.gaussian(x))]
        return self.in_order(x, [*gaussian, *general])

    def are_separate(self, x: Float[Array, ...]) -> bool:
        """Whether each observation is known to depend on one component of the state that no other depends on.

        False if a site is Gaussian, because the components of a Gaussian site are not known.
        """
        sites = self.observe(x)
        known = [s.components for s in sites if isinstance(s, GeneralObservation) and s.components is not None]
        components = np.concatenate(known) if known else np.zeros(0, int)
        return len(known) == len(sites) and len(np.unique(components)) == len(components)

    def in_order(self, x: Float[Array, ...], parts: Sequence[Float[Array, " m"]]) -> Float[Array, " m"]:
        """Concatenate values of the sites in the program's order.

        Args:
            x: a state, which tells the order of Gaussian and other sites.
            parts: one array per site, first those of the Gaussian sites, then those of the others.
        """
        sites = self.observe(x)
        gaussian = iter(parts[: len(self.gaussian(x))])
        general = iter(parts[len(self.gaussian(x)) :])
        kinds = [isinstance(site, GaussianObservation) for site in sites]
        return jnp.concatenate([next(gaussian) if kind else next(general) for kind in kinds])

    def gaussian_log_normalizer(self, x: Float[Array, ...]) -> Float[Array, ""]:
        """Log-normalizer -1/2 log det(2 pi R) of the Gaussian sites, with R at x."""
        return sum((jnp.sum(whiten(site)[1]) for site in self.gaussian(x)), jnp.zeros(()))

    def coordinates(self, x: Float[Array, ...], tangents: Float[Array, "k ..."]) -> Coordinates:
        """One coordinate per element of the non-Gaussian sites, along which the element's parameters vary most.

        Args:
            x: state at which all coordinates are zero.
            tangents: independent random directions at x, scaled by the spread of each component, leading axis k.
        """
        sites = self.general(x)
        _, push = jax.linearize(lambda x: [site.parameters for site in self.general(x)], x)
        moved = jax.vmap(push)(tangents)  # one array (k, m, p) per site
        axes = [_main_axis(jnp.where(s.observed[:, None], u, 0.0)) for s, u in zip(sites, moved, strict=True)]
        return Coordinates(self.general, sites, axes)

    def around(self, coordinates: Coordinates | None, variances: Float[Array, " n"] | None) -> GaussianLikelihood:
        """Gaussian likelihood in which pseudo observations from moment matching replace the non-Gaussian sites."""
        assert coordinates is not None
        assert variances is not None
        center = jnp.zeros_like(variances)
        variances = jnp.maximum(variances, LEAST_VARIANCE)
        tilted = tilted_moments(coordinates.log_prob, center, variances)
        return self.with_pseudo(coordinates, pseudo_observations(tilted, center, variances))

    def with_pseudo(self, coordinates: Coordinates, pseudo: PseudoObservations) -> GaussianLikelihood:
        """Gaussian likelihood of the Gaussian sites and of given pseudo observations of the coordinates."""

        def observe(x: Array) -> list[GaussianObservation]:
            seen = GaussianObservation(coordinates(x), pseudo.scale, pseudo.value, coordinates.observed)
            return [*self.gaussian(x), seen]

        return GaussianLikelihood(observe)


def probe_signs(shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "k ..."]:
    """Random signs, shape (k, *shape), from which the tangents of `Likelihood.coordinates` are made.

    Multiplied by the spread of each component they are the tangents. Signs are used instead of normal draws because an
    observation of a single component then gets the spread of that component without sampling error.
    """
    return jax.random.rademacher(jax.random.key(0), (PROBES, *shape), dtype)


class Coordinates:
    """One coordinate t_i(x) for each of n independent non-Gaussian observations, zero at the center.

    Args:
        general: function from x to the non-Gaussian sites at x.
        sites: sites at the center.
        axes: for each site the direction of t in parameter space, shape (m, p). t = 1 moves the parameters by it.

    Attributes:
        sizes: number of elements of each site.
        observed: False where the value is missing or does not depend on the state, shape (n,).
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
        """Coordinates t(x) of the observations at a state, shape (n,)."""
        return jnp.concatenate(
            [
                jnp.sum((now.parameters - site.parameters) * unit, axis=1)
                for now, site, unit in zip(self._general(x), self._sites, self._units, strict=True)
            ]
        )

    def log_prob(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        """Log-likelihood log p(y_i | t_i) of each coordinate, shape (n,); 0 where missing."""
        parts = jnp.split(t, np.cumsum(self.sizes)[:-1])
        return jnp.concatenate(
            [
                jnp.where(site.observed, site.log_prob(site.parameters + part[:, None] * axis), 0.0)
                for site, part, axis in zip(self._sites, parts, self._axes, strict=True)
            ]
        )


def _main_axis(moved: Float[Array, "k m p"]) -> Float[Array, "m p"]:
    """Direction in which each element's k displacements are largest, with their root mean square as its length."""
    if moved.shape[2] == 1:
        return jnp.sqrt(jnp.mean(moved**2, axis=0))
    values, vectors = jnp.linalg.eigh(jnp.einsum("kmp,kmq->mpq", moved, moved) / len(moved))
    return vectors[:, :, -1] * jnp.sqrt(jnp.maximum(values[:, -1:], 0.0))
