"""What the distribution of a NumPyro site means to a filter: a transition, or observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.observation.likelihood import GaussianObservation, GeneralObservation, whiten
from numpyro_diffusion_da.program.distribution import ConditionedTransition, DiffusionTransition
from numpyro_diffusion_da.program.free_parameters import free_parameters
from numpyro_diffusion_da.transition.base import Dynamics
from numpyro_diffusion_da.transition.diffusion import DiffusionDynamics
from numpyro_diffusion_da.transition.gaussian import GaussianDynamics


def dynamics_of(name: str, fn: dist.Distribution, sampler: Sampler | None = None) -> Dynamics:
    """The transition that a latent site's distribution stands for.

    Raises:
        ValueError: neither a `DiffusionTransition` nor Gaussian; the sentence names the site.
    """
    if isinstance(fn, DiffusionTransition) and not isinstance(fn, ConditionedTransition):
        if fn.batch_shape != ():
            raise ValueError(
                f"site '{name}' is a DiffusionTransition with the batch shape {fn.batch_shape}; "
                "a filter step moves one state."
            )
        step = fn.only_step()
        return step if sampler is None else DiffusionDynamics(step.prior, step.conditioning, sampler)
    parts = gaussian_parts(fn)
    if parts is None:
        raise ValueError(
            f"site '{name}' has the transition {type(unmasked(fn)[0]).__name__}; this filter needs a "
            "DiffusionTransition, Normal or MultivariateNormal (ndda.Bootstrap(model) takes any)."
        )
    mean = jnp.concatenate([m for m, _ in parts]).reshape(fn.shape())
    if all(f.ndim == 1 for _, f in parts):
        return GaussianDynamics(mean, jnp.concatenate([f for _, f in parts]).reshape(fn.shape()))
    return GaussianDynamics(mean, jsl.block_diag(*[f if f.ndim == 2 else jnp.diag(f) for _, f in parts]))


def gaussian_parts(fn: dist.Distribution) -> list[tuple[Float[Array, " m"], Float[Array, ...]]] | None:
    """(mean, standard deviations or Cholesky factor) of independent Gaussian parts, flattened; None if not Gaussian."""
    shape = fn.shape()
    base, mask = unmasked(fn)
    del mask
    if isinstance(base, dist.Normal):
        return [(jnp.broadcast_to(base.loc, shape).reshape(-1), jnp.broadcast_to(base.scale, shape).reshape(-1))]
    if isinstance(base, dist.MultivariateNormal):
        k = shape[-1]
        means = jnp.broadcast_to(base.loc, shape).reshape(-1, k)
        factors = jnp.broadcast_to(base.scale_tril, (*shape, k)).reshape(-1, k, k)
        return [(means[i], factors[i]) for i in range(len(means))]
    return None


def check_density(name: str, fn: dist.Distribution) -> None:
    """Refuse a transition whose density is not there.

    Raises:
        ValueError: a `DiffusionTransition` without `density`, or a masked site; the sentence says what to give.
    """
    base, mask = unmasked(fn)
    if mask is not True:
        raise ValueError(f"site '{name}' is masked, which takes its density away; leave the mask out.")
    if isinstance(base, DiffusionTransition) and base.density is None:
        raise ValueError(
            f"the transition of site '{name}' has no density; give it one, "
            "DiffusionTransition(..., density=ndda.diffusion.ProbabilityFlow())."
        )


def log_density(name: str, fn: dist.Distribution, x: Array) -> tuple[Float[Array, ""], NetworkPasses]:
    """log p(x' | c) of a transition with a density, and the network passes made.

    Raises:
        ValueError: see `check_density`, and `dynamics_of` for batches.
    """
    check_density(name, fn)
    if isinstance(fn, DiffusionTransition) and fn.density is not None:
        step = fn.only_step()
        return fn.density(step.prior, step.conditioning, x)
    return jnp.sum(fn.log_prob(x)), NetworkPasses.of()


def is_gaussian(fn: dist.Distribution) -> bool:
    """Whether a distribution is Gaussian, possibly masked, expanded or of many elements."""
    return isinstance(unmasked(fn)[0], (dist.Normal, dist.MultivariateNormal))


def independent_errors(fn: dist.Distribution) -> Float[Array, ...]:
    """The standard deviations of a Gaussian distribution, as far as one coordinate an element can say it.

    A covariance cannot: how it changes with the state is left out.
    """
    base, _ = unmasked(fn)
    return jnp.asarray(base.scale) if isinstance(base, dist.Normal) else jnp.zeros(())


def unmasked(fn: dist.Distribution) -> tuple[dist.Distribution, Bool[Array, ...] | bool]:
    """The distribution inside to_event, expand and mask wrappers, and the mask (broadcastable to the value)."""
    mask: Any = True
    while True:
        if isinstance(fn, dist.MaskedDistribution):
            own = jnp.asarray(fn._mask)
            own = own.reshape(own.shape + (1,) * fn.event_dim) if own.ndim else own
            mask, fn = jnp.logical_and(mask, own), fn.base_dist
        elif isinstance(fn, (dist.Independent, dist.ExpandedDistribution)):
            fn = fn.base_dist
        else:
            return fn, mask


def site_mask(fn: dist.Distribution) -> Bool[Array, ...]:
    """Where a site counts, at the shape of its value."""
    return jnp.broadcast_to(unmasked(fn)[1], fn.shape())


def observation_error(fn: dist.Distribution) -> Float[Array, ...]:
    """Standard deviations of a Gaussian site, at the shape of its value; NaN for another distribution."""
    base, _ = unmasked(fn)
    if isinstance(base, dist.Normal):
        return jnp.broadcast_to(base.scale, fn.shape())
    if isinstance(base, dist.MultivariateNormal):
        return jnp.broadcast_to(jnp.linalg.norm(base.scale_tril, axis=-1), fn.shape())
    return jnp.full(fn.shape(), jnp.nan)


def non_positive_error(fn: dist.Distribution) -> Bool[Array, ""]:
    """Whether a Gaussian site has a standard deviation that is zero, negative or not finite."""
    base, _ = unmasked(fn)
    if isinstance(base, dist.Normal):
        scale = jnp.asarray(base.scale)
    elif isinstance(base, dist.MultivariateNormal):
        scale = jnp.diagonal(base.scale_tril, axis1=-2, axis2=-1)
    else:
        return jnp.asarray(False)
    return ~jnp.all((scale > 0) & jnp.isfinite(scale))


def site_mean(fn: dist.Distribution) -> Float[Array, ...]:
    """Mean of a Gaussian site, at the shape of its value; NaN for another distribution."""
    parts = gaussian_parts(fn)
    if parts is None:
        return jnp.full(fn.shape(), jnp.nan)
    return jnp.concatenate([mean for mean, _ in parts]).reshape(fn.shape())


def mean_and_variance(name: str, fn: dist.Distribution) -> tuple[Float[Array, ...], Float[Array, ...]]:
    """Of any site, at the shape of its value; a variance may be infinite.

    Raises:
        ValueError: the distribution does not know them; the sentence names the site.
    """
    base, _ = unmasked(fn)
    try:
        moments = base.mean, base.variance
    except NotImplementedError:
        raise ValueError(
            f"site '{name}' has the distribution {type(base).__name__}, which has no mean and variance to compare an "
            "observation with."
        ) from None
    mean, variance = (jnp.broadcast_to(moment, fn.shape()) for moment in moments)
    return mean, variance


def values_per_error(fn: dist.Distribution) -> int:
    """How many consecutive values of a Gaussian site share a correlated error; 1 where each has its own."""
    parts = gaussian_parts(fn)
    return 1 if parts is None or parts[0][1].ndim == 1 else int(parts[0][1].shape[-1])


def undefined_means(fn: dist.Distribution, value: Array) -> Int[Array, ""]:
    """How many observed values a Gaussian site compares with NaN."""
    if gaussian_parts(fn) is None:
        return jnp.asarray(0)
    return jnp.sum(~jnp.isnan(value) & site_mask(fn) & jnp.isnan(site_mean(fn)))


def elementwise(power: Array | float, fn: dist.Distribution, events: int = 0) -> Float[Array, ...]:
    """A power of a likelihood, given for each element of a site's batch, at the shape of its values.

    Args:
        power: broadcasts with the batch shape.
        fn: the site's distribution.
        events: trailing axes of the value to leave out.
    """
    full = jnp.broadcast_to(jnp.asarray(power), fn.batch_shape)
    full = full.reshape(fn.batch_shape + (1,) * (fn.event_dim - events))
    return jnp.broadcast_to(full, fn.shape()[: len(fn.shape()) - events])


def gaussian_observations(
    name: str, fn: dist.Distribution, value: Array, power: Array | float = 1.0
) -> list[GaussianObservation]:
    """An observed site as flattened Gaussian observations; NaN and masked values are missing.

    Args:
        name: of the site.
        fn: its distribution.
        value: what is observed.
        power: of the likelihood, as `handlers.scale` gives it.

    Raises:
        ValueError: the site is not Gaussian.
    """
    parts = gaussian_parts(fn)
    if parts is None:
        raise ValueError(
            f"site '{name}' has the likelihood {type(unmasked(fn)[0]).__name__}; this filter needs Normal or "
            "MultivariateNormal observations (FAAPF and Bootstrap take others)."
        )
    values = value.reshape(len(parts), -1)
    observed = (~jnp.isnan(value) & site_mask(fn)).reshape(len(parts), -1)
    own = unmasked(fn)[0].event_dim
    powers = (
        elementwise(power, fn, own).reshape(len(parts), -1) if own == 0 else elementwise(power, fn, own).reshape(-1)
    )
    each = zip(parts, values, observed, powers, strict=True)
    return [GaussianObservation(m, f, v, o, p) for (m, f), v, o, p in each]


def general_observation(
    name: str, fn: dist.Distribution, value: Array, power: Array | float = 1.0
) -> GeneralObservation:
    """An observed site of any distribution with independent elements; NaN and masked values are missing.

    Arguments as `gaussian_observations`.

    Raises:
        ValueError: elements are vectors, which no single coordinate can stand for, or the distribution cannot be taken
            apart into its parameters.
    """
    base, mask = unmasked(fn)
    if base.event_dim > 0:
        raise ValueError(
            f"site '{name}' has the likelihood {type(base).__name__}, whose elements are vectors; guidance needs "
            "MultivariateNormal or independent elements (ndda.Bootstrap(model) takes any with a log_prob)."
        )
    shape = fn.shape()
    parameters, rebuild = free_parameters(name, base, shape)
    powers = elementwise(power, fn).reshape(-1)
    observed = (~missing(value) & jnp.broadcast_to(mask, shape)).reshape(-1)
    filled = jnp.where(missing(value), base_point(base, value), value)

    def log_prob(parameters: Array) -> Array:
        return powers * rebuild(parameters).log_prob(filled).reshape(-1)

    return GeneralObservation(parameters, log_prob, observed)


def predicted_observation(
    fn: dist.Distribution,
    value: Array,
    predictor: Float[Array, " m"],
    link: Callable[[Float[Array, " m"]], Float[Array, " m"]],
    components: Int[np.ndarray, " m"] | None,
) -> GeneralObservation:
    """An observed site that looks at the state through a linear predictor, one an element (`linear_predictor`).

    Args:
        fn: its distribution.
        value: what is observed.
        predictor: at the state.
        link: predictor -> log p(y_i | x), 0 where missing.
        components: see `GeneralObservation`.
    """
    observed = (~missing(value) & site_mask(fn)).reshape(-1)
    return GeneralObservation(predictor[:, None], lambda parameters: link(parameters[:, 0]), observed, components)


def has_own_errors(fn: dist.Distribution) -> bool:
    """Whether a Gaussian distribution's elements have errors of their own."""
    return isinstance(unmasked(fn)[0], dist.Normal)


def missing(value: Array) -> Bool[Array, ...]:
    """Where a value is NaN; integers have none."""
    return jnp.isnan(value) if jnp.issubdtype(value.dtype, jnp.inexact) else jnp.zeros(value.shape, bool)


def base_point(base: dist.Distribution, value: Array) -> Array:
    """A value in the support, in place of a missing one, whose log_prob would be NaN."""
    support: Any = base.support
    point = support.feasible_like(value) if support is not None else jnp.zeros_like(value)
    return jnp.asarray(point, value.dtype)


def pointwise_log_likelihood(fn: dist.Distribution, value: Array, power: Array | float = 1.0) -> Float[Array, ...]:
    """log p(y | x) times the power, elementwise where elements are independent, else per event; 0 where missing."""
    base, mask = unmasked(fn)
    observed = ~missing(value) & jnp.broadcast_to(mask, fn.shape())
    if isinstance(base, dist.MultivariateNormal):
        # By the Gaussian observations, which know how to leave single components of an event out.
        events = gaussian_observations("", fn, value, power)
        residuals, normalizers = zip(*map(whiten, events), strict=True)
        logs = [jnp.sum(n) - 0.5 * jnp.vdot(r, r) for r, n in zip(residuals, normalizers, strict=True)]
        return jnp.stack(logs).reshape(value.shape[:-1])
    filled = jnp.where(observed, value, base_point(base, value))
    if base.event_dim == 0:
        return jnp.where(observed, elementwise(power, fn) * base.log_prob(filled), 0.0)
    whole = jnp.all(observed, axis=tuple(range(-base.event_dim, 0)))
    return jnp.where(whole, elementwise(power, fn, base.event_dim) * base.log_prob(filled), 0.0)
