"""One step of the state, p(x' | c): its mean and covariance, a draw, and a draw given an observation.

The filters ask these four things of any transition. `DiffusionStep` answers from a diffusion prior, `GaussianStep` in
closed form.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.diffusion.denoiser import Denoiser, Memory, NetworkPasses, PriorDenoiser
from numpyro_diffusion_da.diffusion.guidance import Guidance, ObservingDenoiser
from numpyro_diffusion_da.diffusion.linear_solve import projected_solve
from numpyro_diffusion_da.diffusion.memory import backward_bytes
from numpyro_diffusion_da.diffusion.path_weights import weighted_path
from numpyro_diffusion_da.diffusion.prior import Conditioning, DiffusionPrior
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.observation.likelihood import (
    Coordinates,
    GaussianLikelihood,
    GeneralLikelihood,
    InflatableLogWeight,
    Likelihood,
    probe_signs,
    whiten,
)
from numpyro_diffusion_da.observation.moment_matching import (
    LEAST_VARIANCE,
    Evidence,
    PseudoObservations,
    expectation_propagation,
    tilted_moments,
    tilted_quantiles,
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


class OneStep(eqx.Module):
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


class DiffusionStep(OneStep):
    """The transition of a diffusion prior.

    Mean and covariance come from the largest noise level, where z_s says nothing about z: D -> E[z | c] (Savary et al.
    2026, arXiv 2605.20028, Theorem A.1), and, one order on, s^2 J C -> Cov[z | c].

    Args:
        prior: the diffusion prior.
        conditioning: what `prior.condition` gave.
        sampler: how to draw.
    """

    prior: DiffusionPrior
    conditioning: Conditioning
    sampler: Sampler

    def _to_state(self, z: Float[Array, ...]) -> Float[Array, ...]:
        return self.prior.location(self.conditioning) + self.prior.scale(self.conditioning) * z

    def moments(self, noise_level: float | None = None) -> Moments:
        """The mean a + S D(0, s) and products with S s^2 C J^T S: one forward pass, and one vjp a product."""
        prior, conditioning = self.prior, self.conditioning
        location, scale = prior.location(conditioning), prior.scale(conditioning)
        level = jnp.asarray(prior.noise_range[1] if noise_level is None else noise_level, location.dtype)
        # z_s = 0 is the centre of N(0, s^2 C): D's dependence on z_s, of order 1/s, then cancels to first order.
        denoised, pull = jax.vjp(lambda z: prior.denoise(z, level, conditioning), jnp.zeros_like(location))

        def covariance_product(v: Array) -> Array:
            return scale * level**2 * prior.noise.covariance_product(pull(scale * v)[0])

        passes = NetworkPasses.of(forward=1 + prior.conditioning_passes)
        return Moments(location + scale * denoised, covariance_product, passes, NetworkPasses.of(vjp=1))

    def tangents(self) -> Float[Array, "k ..."]:
        """S e with random signs e; no network pass."""
        location = self.prior.location(self.conditioning)
        spread = jnp.broadcast_to(self.prior.scale(self.conditioning), location.shape)
        return spread[None] * probe_signs(location.shape, location.dtype)

    def _start(self, rng_key: PRNGKeyArray) -> Array:
        prior = self.prior
        location = prior.location(self.conditioning)
        return self.sampler.initial(rng_key, prior.noise, prior.noise_range, location.shape, location.dtype)

    def _record(self, memory: Memory) -> DrawRecord:
        passes = memory.passes.plus(NetworkPasses.of(forward=self.prior.conditioning_passes))
        return DrawRecord(passes, memory.solver_residual)

    def _run(self, rng_key: PRNGKeyArray, denoiser: Denoiser) -> tuple[Array, DrawRecord]:
        start_key, loop_key = jax.random.split(rng_key)
        noise, noise_range = self.prior.noise, self.prior.noise_range
        z, memory = self.sampler(loop_key, denoiser, noise, noise_range, self._start(start_key))
        return self._to_state(z), self._record(memory)

    def draw(self, rng_key: PRNGKeyArray) -> tuple[Float[Array, ...], DrawRecord]:
        """Reverse diffusion with the prior's denoiser."""
        return self._run(rng_key, PriorDenoiser(self.prior, self.conditioning))

    def conditional_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """Reverse diffusion with the guided denoiser."""
        return self._run(rng_key, guidance(PriorDenoiser(self.prior, self.conditioning), likelihood))

    def weighted_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], Float[Array, ""], DrawRecord]:
        """Path weights (`path`): for the law that the sampler gives, at its number of levels.

        Raises:
            ValueError: the sampler is not stochastic at every step.
            TypeError: the guidance's denoiser is not an `ObservingDenoiser`.
        """
        denoiser = guidance(PriorDenoiser(self.prior, self.conditioning), likelihood)
        if not isinstance(denoiser, ObservingDenoiser):
            raise TypeError(
                f"path weights need a guidance that says what it has seen, and {type(guidance).__name__} gives a "
                f"{type(denoiser).__name__}, which is no ObservingDenoiser; use ndda.MMPS()."
            )
        start_key, loop_key = jax.random.split(rng_key)
        noise, noise_range = self.prior.noise, self.prior.noise_range
        z, log_ratio, memory = weighted_path(
            loop_key, self.sampler, denoiser, noise, noise_range, self._start(start_key)
        )
        x = self._to_state(z)
        return x, likelihood.log_prob(x) + log_ratio, self._record(memory)

    def working_bytes(self) -> int:
        """About what one `conditional_draw` needs: what the network's backward pass keeps, and some ten latents."""
        location = self.prior.location(self.conditioning)
        level = jnp.ones((), location.dtype)
        at = jax.ShapeDtypeStruct(location.shape, location.dtype)
        kept = backward_bytes(lambda z: self.prior.denoise(z, level, self.conditioning), at)
        return kept + 10 * location.size * location.dtype.itemsize


class GaussianStep(OneStep):
    """N(mean, F F^T): exact for a linear h, linearised at the mean for any other (as an extended Kalman filter).

    Args:
        mean: shape of the state.
        factor: standard deviations, shape of the state, or F, shape (size, size), over the flattened state.
    """

    mean: Float[Array, ...]
    factor: Float[Array, ...]

    def _apply(self, white: Array, transpose: bool = False) -> Array:
        if self.factor.shape == self.mean.shape:
            return self.factor * white
        factor = self.factor.T if transpose else self.factor
        return (factor @ white.reshape(-1)).reshape(self.mean.shape)

    def moments(self, noise_level: float | None = None) -> Moments:
        """The mean and products with F F^T; no network passes."""

        def covariance_product(v: Array) -> Array:
            return self._apply(self._apply(v, transpose=True))

        return Moments(self.mean, covariance_product, NetworkPasses.of(), NetworkPasses.of())

    def tangents(self) -> Float[Array, "k ..."]:
        """F e with random signs e."""
        return jax.vmap(self._apply)(probe_signs(self.mean.shape, self.mean.dtype))

    def draw(self, rng_key: PRNGKeyArray) -> tuple[Float[Array, ...], DrawRecord]:
        """Mean + F xi."""
        white = jax.random.normal(rng_key, self.mean.shape, self.mean.dtype)
        record = DrawRecord(NetworkPasses.of(), jnp.zeros((), self.mean.dtype))
        return self.mean + self._apply(white), record

    def conditional_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], DrawRecord]:
        """A draw of the prior moved by the gain of its own perturbed innovation (Matheron's rule).

        Observations that are not Gaussian are first those that expectation propagation puts in their place. Then each
        coordinate is moved to where its own tilted density has the same quantile (a Gaussian copula): exact where
        coordinates are independent, two modes included, and then made at once.
        """
        if not isinstance(likelihood, GeneralLikelihood):
            return self._matheron(rng_key, matched(self.moments(), self.tangents(), likelihood)[0])[:2]
        if self.factor.shape == self.mean.shape and likelihood.are_separate(self.mean):
            x, record = self.draw(rng_key)
            return x + self._towards_separate(x, likelihood), record
        found = _by_coordinates(self.moments(), self.tangents(), likelihood)
        x, record, _ = self._matheron(rng_key, found.local)
        return x + self._towards_tilted(x, found), record

    def _towards_separate(self, x: Float[Array, ...], likelihood: GeneralLikelihood) -> Float[Array, ...]:
        """What moves independent coordinates of an unguided draw to their posterior quantiles."""
        coordinates = likelihood.coordinates(self.mean, self.tangents())
        _, push = jax.linearize(coordinates, self.mean)
        transposed = jax.linear_transpose(push, self.mean)

        def covariance_product(v: Array) -> Array:
            return self.moments().covariance_product(transposed(v)[0])

        # The covariance of the coordinates is diagonal: its product with ones is the diagonal.
        variance = jnp.maximum(push(covariance_product(jnp.ones(coordinates.observed.shape, x.dtype))), LEAST_VARIANCE)
        t = coordinates(x)
        levels = jax.scipy.stats.norm.cdf(t / jnp.sqrt(variance))
        moved = tilted_quantiles(coordinates.log_prob, jnp.zeros_like(t), variance, levels)
        return covariance_product(jnp.where(coordinates.observed, moved - t, 0.0) / variance)

    def _towards_tilted(self, x: Float[Array, ...], found: _ByCoordinates) -> Float[Array, ...]:
        """What moves the coordinates of a draw to their tilted quantiles, and the state along with them."""
        coordinates, n = found.coordinates, len(found.coordinates.observed)
        t = coordinates(x)
        (mean, variance), (centre, without) = (
            (a[-n:], b[-n:]) for a, b in (found.evidence.marginal, found.evidence.cavity)
        )
        levels = jax.scipy.stats.norm.cdf((t - mean) / jnp.sqrt(variance))
        moved = tilted_quantiles(coordinates.log_prob, centre, without, levels)
        shift = jnp.where(coordinates.observed, moved - t, 0.0)
        # The regression of the state on the coordinates, given the Gaussian observations.
        known = found.between[:-n, :-n] + jnp.eye(len(found.between) - n, dtype=t.dtype)
        gain = jnp.linalg.solve(known, found.between[:-n, -n:])
        within = found.between[-n:, -n:] - found.between[-n:, :-n] @ gain
        within = within + 1e-6 * jnp.maximum(jnp.mean(jnp.diagonal(within)), LEAST_VARIANCE) * jnp.eye(n, dtype=t.dtype)
        weights = jnp.linalg.solve(within, shift)
        return self.moments().covariance_product(found.pull(jnp.concatenate([-gain @ weights, weights])))

    def weighted_draw(
        self, rng_key: PRNGKeyArray, likelihood: Likelihood, guidance: Guidance
    ) -> tuple[Float[Array, ...], Float[Array, ""], DrawRecord]:
        """The conditional draw, q. By Bayes' rule p(x) / q(x) = N(r; 0, I + H V H^T) / N(r - H (x - mean); 0, I).

        log w is log p(y | c), whatever x is, where y is Gaussian and linear in x.
        """
        local, _ = matched(self.moments(), self.tangents(), likelihood)
        x, record, ratio = self._matheron(rng_key, local)
        return x, likelihood.log_prob(x) + ratio, record

    def _matheron(
        self, rng_key: PRNGKeyArray, likelihood: GaussianLikelihood
    ) -> tuple[Array, DrawRecord, Float[Array, ""]]:
        """(x, its record, log p(x | c) - log q(x)) of the conditional draw."""
        draw_key, error_key = jax.random.split(rng_key)
        x, record = self.draw(draw_key)
        residual, covariance, pull = observed_covariance(self.moments(), likelihood)
        error = jax.random.normal(error_key, residual.shape, residual.dtype)
        innovation = residual - (jax.jvp(likelihood.residual, (self.mean,), (self.mean - x,))[1] + error)
        gain = projected_solve(covariance, innovation)
        left = innovation + error - (covariance @ gain - gain)  # the residual at the moved x, linearised at the mean
        values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.T))
        values = jnp.maximum(values, 1.0)  # as in the solve
        ratio = -0.5 * jnp.sum((vectors.T @ residual) ** 2 / values) - 0.5 * jnp.sum(jnp.log(values))
        moved = x + self.moments().covariance_product(pull(gain))
        return moved, record, ratio + 0.5 * jnp.vdot(left, left)


Pull = Callable[[Float[Array, " m"]], Array]
"""v -> H^T v."""


def observed_covariance(
    moments: Moments, likelihood: GaussianLikelihood
) -> tuple[Float[Array, " m"], Float[Array, "m m"], Pull]:
    """The whitened residual r at the mean, I + H V H^T there, and the map v -> H^T v. One product an observation."""
    residual, row, pull = _observed_product(moments, likelihood)
    return residual, jax.vmap(row)(jnp.eye(len(residual), dtype=residual.dtype)), pull


def _observed_product(
    moments: Moments, likelihood: GaussianLikelihood
) -> tuple[Float[Array, " m"], Callable[[Float[Array, " m"]], Float[Array, " m"]], Pull]:
    """The residual r at the mean, v -> (I + H V H^T) v, and v -> H^T v."""
    residual, push = jax.linearize(likelihood.residual, moments.mean)
    transposed = jax.linear_transpose(push, moments.mean)

    def pull(v: Array) -> Array:
        return -transposed(v)[0]  # H = -dr/dx

    def row(v: Array) -> Array:
        return v - push(moments.covariance_product(pull(v)))

    return residual, row, pull


def matched_pointwise(
    moments: Moments, tangents: Float[Array, "k ..."], likelihood: Likelihood, probes: int | None
) -> Float[Array, " m"]:
    """log of int p(y_j | x) N(x; m, V) dx of each observation by itself, site by site; 0 where missing.

    Args:
        moments: m and V.
        tangents: as `OneStep.tangents`.
        likelihood: of all observations.
        probes: products with random signs that estimate the diagonal of H V H^T (Bekas, Kokiopoulou & Saad 2007, Appl.
            Numer. Math. 57, 1214); None for one product an observation, and no error.
    """

    def widened(logs: Array, residual: Array, variance: Array) -> Array:
        return logs + 0.5 * residual**2 * variance / (1.0 + variance) - 0.5 * jnp.log1p(variance)

    if isinstance(likelihood, GaussianLikelihood):
        return widened(likelihood.pointwise(moments.mean), *_own_variances(moments, likelihood, probes))
    assert isinstance(likelihood, GeneralLikelihood)
    coordinates = likelihood.coordinates(moments.mean, tangents)
    n = len(coordinates.observed)
    unit = PseudoObservations(jnp.zeros(n, moments.mean.dtype), jnp.ones(n, moments.mean.dtype))
    _, variance = _own_variances(moments, likelihood.with_pseudo(coordinates, unit), probes)
    spread = jnp.maximum(variance[-n:], LEAST_VARIANCE)
    tilted = tilted_moments(coordinates.log_prob, jnp.zeros_like(spread), spread)
    general = jnp.split(tilted.log_normalizer, np.cumsum(coordinates.sizes)[:-1])
    gaussian, start = [], 0
    for r, normalizer in map(whiten, likelihood.gaussian(moments.mean)):
        gaussian.append(widened(normalizer - 0.5 * r**2, r, variance[start : start + len(r)]))
        start += len(r)
    return likelihood.in_order(moments.mean, [*gaussian, *general])


def _own_variances(
    moments: Moments, likelihood: GaussianLikelihood, probes: int | None
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """The whitened residual r at the mean, and the diagonal of H V H^T there; probes as `matched_pointwise`."""
    residual, row, _ = _observed_product(moments, likelihood)
    if probes is None:
        found = jax.vmap(row, out_axes=1)(jnp.eye(len(residual), dtype=residual.dtype)).diagonal()
    else:
        signs = jax.random.rademacher(jax.random.key(0), (probes, len(residual)), residual.dtype)
        found = jnp.mean(signs * jax.vmap(row)(signs), axis=0)
    return residual, jnp.maximum(found - 1.0, 0.0)


def inflatable_pointwise(moments: Moments, likelihood: GaussianLikelihood, probes: int | None) -> InflatableLogWeight:
    """log of int p(y_j | x)^alpha N(x; m, V) dx of each observation by itself; arguments as `matched_pointwise`."""
    residual, variances = _own_variances(moments, likelihood, probes)
    return InflatableLogWeight(likelihood.log_normalizers(moments.mean), residual**2, variances)


def inflatable(moments: Moments, likelihood: GaussianLikelihood) -> InflatableLogWeight:
    """log of int p(y | x)^alpha N(x; m, V) dx, along the eigenvectors of H V H^T. One product an observation."""
    residual, covariance, _ = observed_covariance(moments, likelihood)
    values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.T))
    along = (vectors.T @ residual) ** 2
    return InflatableLogWeight(likelihood.log_normalizers(moments.mean), along, jnp.maximum(values - 1.0, 0.0))


def matched(
    moments: Moments, tangents: Float[Array, "k ..."], likelihood: Likelihood
) -> tuple[GaussianLikelihood, Float[Array, ""]]:
    """The Gaussian likelihood with the same effect on N(m, V), and the log of int p(y | x) N(x; m, V) dx.

    A Gaussian likelihood is itself, and linearised at m; any other is taken by expectation propagation over the
    observations' coordinates. One product an observation.
    """
    if isinstance(likelihood, GaussianLikelihood):
        residual, covariance, _ = observed_covariance(moments, likelihood)
        values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.T))
        values = jnp.maximum(values, 1.0)  # R alone is the identity here; a learned V may fail to be positive
        exponent = jnp.sum(jnp.log(values)) + jnp.sum((vectors.T @ residual) ** 2 / values)
        return likelihood, likelihood.log_normalizer(moments.mean) - 0.5 * exponent
    assert isinstance(likelihood, GeneralLikelihood)
    found = _by_coordinates(moments, tangents, likelihood)
    log_evidence = found.evidence.log_evidence + likelihood.gaussian_log_normalizer(moments.mean)
    return found.local, log_evidence


class _ByCoordinates(NamedTuple):
    """What is known of observations by expectation propagation, the Gaussian ones first.

    Attributes:
        coordinates: of the n others.
        local: the Gaussian likelihood with the same effect.
        evidence: of all.
        between: covariance of the coordinates before they are observed, of all.
        pull: v -> H^T v, of all.
    """

    coordinates: Coordinates
    local: GaussianLikelihood
    evidence: Evidence
    between: Float[Array, "m m"]
    pull: Pull


def _by_coordinates(moments: Moments, tangents: Float[Array, "k ..."], likelihood: GeneralLikelihood) -> _ByCoordinates:
    coordinates = likelihood.coordinates(moments.mean, tangents)
    n = len(coordinates.observed)
    unit = PseudoObservations(jnp.zeros(n, moments.mean.dtype), jnp.ones(n, moments.mean.dtype))
    residual, covariance, pull = observed_covariance(moments, likelihood.with_pseudo(coordinates, unit))
    known = residual[:-n]

    # What is Gaussian is whitened: its coordinate is h(x) - h(m) over the error, its likelihood a unit Gaussian.
    def log_prob(t: Array) -> Array:
        return jnp.concatenate([-0.5 * (known - t[:-n]) ** 2, coordinates.log_prob(t[-n:])])

    values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.T))
    between = (vectors * jnp.maximum(values - 1.0, 0.0)[None]) @ vectors.T
    seen = jnp.concatenate([jnp.ones(len(known), bool), coordinates.observed])
    evidence = expectation_propagation(log_prob, between, seen)
    pseudo = PseudoObservations(evidence.pseudo.value[-n:], evidence.pseudo.scale[-n:])
    return _ByCoordinates(coordinates, likelihood.with_pseudo(coordinates, pseudo), evidence, between, pull)
