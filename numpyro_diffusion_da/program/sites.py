"""Conversion of the distributions of NumPyro sites to the transitions and observations of a filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.prior import Conditioning
from numpyro_diffusion_da.diffusion.sampler import Sampler, as_sampler
from numpyro_diffusion_da.diffusion.steps import Step
from numpyro_diffusion_da.observation.likelihood import GaussianObservation, GeneralObservation, whiten
from numpyro_diffusion_da.program.distribution import (
    ConditionedTransition,
    DiffusionTransition,
    EmulatorTransition,
    OnePassTransition,
)
from numpyro_diffusion_da.program.free_parameters import free_parameters
from numpyro_diffusion_da.transition.base import Dynamics
from numpyro_diffusion_da.transition.diffusion import DiffusionDynamics
from numpyro_diffusion_da.transition.gaussian import GaussianDynamics


def dynamics_of(
    name: str, fn: dist.Distribution, sampler: Sampler | Step | None = None, conditioning: Conditioning | None = None
) -> Dynamics:
    """Transition p(x' | c) that the distribution of a latent site describes.

    Args:
        name: name of the site, for messages.
        fn: distribution of the site; its shape is the shape of the state.
        sampler: sampler, or a bare step, that replaces the sampler of a `DiffusionTransition`; None keeps it.
        conditioning: conditioning of the prior, if it has been computed; None computes it.

    Returns:
        `DiffusionDynamics` of a `DiffusionTransition`, `OnePassDynamics` of a `OnePassTransition`, `GaussianDynamics`
        of any Gaussian distribution.

    Raises:
        ValueError: the distribution is neither the transition of an emulator nor Gaussian, or has batch axes.
        TypeError: `sampler` is neither a sampler nor a step.
    """
    if isinstance(fn, EmulatorTransition) and not isinstance(fn, ConditionedTransition):
        if fn.batch_shape != ():
            raise ValueError(
                f"site '{name}' is a {type(fn).__name__} with batch shape {fn.batch_shape}, but a filter step moves "
                "one state; give a state without batch axes."
            )
        dynamics = fn.dynamics(conditioning)
        if sampler is None or not isinstance(dynamics, DiffusionDynamics):
            return dynamics
        return DiffusionDynamics(dynamics.prior, dynamics.conditioning, as_sampler(sampler, name))
    parts = gaussian_parts(fn)
    if parts is None:
        raise ValueError(
            f"site '{name}' has the transition {type(unmasked(fn)[0]).__name__}; this filter needs a "
            "DiffusionTransition, OnePassTransition, Normal or MultivariateNormal (ndda.Bootstrap(model) and "
            "ndda.EnKF(model) take any transition)."
        )
    mean = jnp.concatenate([m for m, _ in parts]).reshape(fn.shape())
    if all(f.ndim == 1 for _, f in parts):
        return GaussianDynamics(mean, jnp.concatenate([f for _, f in parts]).reshape(fn.shape()))
    return GaussianDynamics(mean, jsl.block_diag(*[f if f.ndim == 2 else jnp.diag(f) for _, f in parts]))


def gaussian_parts(fn: dist.Distribution) -> list[tuple[Float[Array, " m"], Float[Array, ...]]] | None:
    """Mean and error of each independent part of a Gaussian distribution, flattened; None if it is not Gaussian.

    A `Normal` of any shape is one part. A `MultivariateNormal` has one part per event.

    Returns:
        (mean, shape (m,); standard deviations, shape (m,), or lower Cholesky factor of the covariance, shape (m, m)) of
        each part.
    """
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
    """Check that a transition has a density.

    Args:
        name: name of the site, for messages.
        fn: distribution of the site.

    Raises:
        ValueError: the distribution is a `DiffusionTransition` without `density`, or is masked.
    """
    base, mask = unmasked(fn)
    if mask is not True:
        raise ValueError(f"site '{name}' is masked, so its transition has no density; leave the mask out.")
    if isinstance(base, OnePassTransition):
        raise ValueError(
            f"the transition of site '{name}' has no density, because a OnePassTransition makes the state from noise; "
            "use a smoother without densities, such as a filter with lag=."
        )
    if isinstance(base, DiffusionTransition) and base.density is None:
        raise ValueError(
            f"the transition of site '{name}' has no density; give it one: "
            "DiffusionTransition(..., density=ndda.diffusion.ProbabilityFlow())."
        )


def log_density(name: str, fn: dist.Distribution, x: Array) -> tuple[Float[Array, ""], NetworkPasses]:
    """Log-density log p(x' | c) of a transition, and the network passes that it takes.

    Args:
        name: name of the site, for messages.
        fn: distribution of the site.
        x: x', in the shape of the state.

    Returns:
        (log p(x' | c), a scalar; network passes made).

    Raises:
        ValueError: the distribution has no density (see `check_density`) or is a `DiffusionTransition` with batch axes.
    """
    check_density(name, fn)
    if isinstance(fn, DiffusionTransition) and fn.density is not None:
        log_prob, passes = fn.density(fn.prior, fn.conditioning(), x)
        return log_prob, passes.plus(fn.conditioning_passes())
    return jnp.sum(fn.log_prob(x)), NetworkPasses.of()


def is_gaussian(fn: dist.Distribution) -> bool:
    """Whether a distribution is Gaussian; it may be masked, expanded, or have many elements."""
    return isinstance(unmasked(fn)[0], (dist.Normal, dist.MultivariateNormal))


def independent_errors(fn: dist.Distribution) -> Float[Array, ...]:
    """Standard deviations of a Gaussian distribution of independent elements; a scalar 0 for a `MultivariateNormal`.

    They show whether the errors change with the state. A full covariance is taken as constant, because one coordinate
    per element cannot express how it changes.
    """
    base, _ = unmasked(fn)
    return jnp.asarray(base.scale) if isinstance(base, dist.Normal) else jnp.zeros(())


def unmasked(fn: dist.Distribution) -> tuple[dist.Distribution, Bool[Array, ...] | bool]:
    """Distribution inside `to_event`, `expand` and `mask` wrappers, and the mask.

    Returns:
        (inner distribution; mask that broadcasts to the shape of the value, or True if there is none).
    """
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
    """Mask of a site in the shape of its value; False where `mask` leaves a value out."""
    return jnp.broadcast_to(unmasked(fn)[1], fn.shape())


def observation_error(fn: dist.Distribution) -> Float[Array, ...]:
    """Standard deviations of a Gaussian site in the shape of its value; NaN for any other distribution."""
    base, _ = unmasked(fn)
    if isinstance(base, dist.Normal):
        return jnp.broadcast_to(base.scale, fn.shape())
    if isinstance(base, dist.MultivariateNormal):
        return jnp.broadcast_to(jnp.linalg.norm(base.scale_tril, axis=-1), fn.shape())
    return jnp.full(fn.shape(), jnp.nan)


def non_positive_error(fn: dist.Distribution, value: Array) -> Bool[Array, ""]:
    """Whether the error of any observed value of a Gaussian site is zero, negative or not finite."""
    base, _ = unmasked(fn)
    if isinstance(base, dist.Normal):
        scale = jnp.broadcast_to(base.scale, fn.shape())
    elif isinstance(base, dist.MultivariateNormal):
        scale = jnp.broadcast_to(jnp.diagonal(base.scale_tril, axis1=-2, axis2=-1), fn.shape())
    else:
        return jnp.asarray(False)
    return jnp.any(observed_elements(fn, value) & ~((scale > 0) & jnp.isfinite(scale)))


def site_mean(fn: dist.Distribution) -> Float[Array, ...]:
    """Mean of a Gaussian site in the shape of its value; NaN for any other distribution."""
    parts = gaussian_parts(fn)
    if parts is None:
        return jnp.full(fn.shape(), jnp.nan)
    return jnp.concatenate([mean for mean, _ in parts]).reshape(fn.shape())


def mean_and_variance(name: str, fn: dist.Distribution) -> tuple[Float[Array, ...], Float[Array, ...]]:
    """Mean and variance of a site, each in the shape of its value; a variance may be infinite.

    Args:
        name: name of the site, for messages.
        fn: distribution of the site.

    Raises:
        ValueError: the distribution defines no mean and variance.
    """
    base, _ = unmasked(fn)
    try:
        moments = base.mean, base.variance
    except NotImplementedError:
        raise ValueError(
            f"site '{name}' has the distribution {type(base).__name__}, which defines no mean and variance, so its "
            "observations cannot be compared with a forecast; leave the site out of the check."
        ) from None
    mean, variance = (jnp.broadcast_to(moment, fn.shape()) for moment in moments)
    return mean, variance


def has_mean_and_variance(fn: dist.Distribution) -> bool:
    """Whether a site has values, and its distribution defines their mean and variance."""
    base, _ = unmasked(fn)
    try:
        shapes = jnp.shape(base.mean), jnp.shape(base.variance)
    except NotImplementedError:
        return False
    return 0 not in fn.shape() and all(len(shape) <= len(fn.shape()) for shape in shapes)


def values_per_error(fn: dist.Distribution) -> int:
    """Number of consecutive values of a site that share a correlated Gaussian error; 1 if errors are independent."""
    parts = gaussian_parts(fn)
    return 1 if parts is None or parts[0][1].ndim == 1 else int(parts[0][1].shape[-1])


def undefined_means(fn: dist.Distribution, value: Array) -> Int[Array, ""]:
    """Number of observed values of a Gaussian site whose mean is NaN; 0 for any other distribution."""
    if gaussian_parts(fn) is None:
        return jnp.asarray(0)
    return jnp.sum(observed_elements(fn, value) & jnp.isnan(site_mean(fn)))


def elementwise(power: Array | float, fn: dist.Distribution, events: int = 0) -> Float[Array, ...]:
    """Power of a likelihood, broadcast to the shape of a site's value without its last `events` axes.

    Args:
        power: power, which broadcasts to the batch shape.
        fn: distribution of the site.
        events: number of trailing event axes to leave out.
    """
    full = jnp.broadcast_to(jnp.asarray(power), fn.batch_shape)
    full = full.reshape(fn.batch_shape + (1,) * (fn.event_dim - events))
    return jnp.broadcast_to(full, fn.shape()[: len(fn.shape()) - events])


def gaussian_observations(
    name: str, fn: dist.Distribution, value: Array, power: Array | float = 1.0
) -> list[GaussianObservation]:
    """Convert an observed site to flattened Gaussian observations; NaN and masked values are missing.

    Args:
        name: name of the site, for messages.
        fn: distribution of the site.
        value: observed value, in the shape of the distribution; NaN where missing.
        power: exponent of the likelihood, as set by `handlers.scale`; broadcasts to the batch shape.

    Returns:
        One observation for a `Normal`, and one per event for a `MultivariateNormal`.

    Raises:
        ValueError: the site is not Gaussian.
    """
    parts = gaussian_parts(fn)
    if parts is None:
        raise ValueError(
            f"site '{name}' {_likelihood_of(fn)}; this filter needs Normal or MultivariateNormal observations (FAAPF "
            "and Bootstrap take other likelihoods)."
        )
    values = value.reshape(len(parts), -1)
    observed = observed_elements(fn, value).reshape(len(parts), -1)
    own = unmasked(fn)[0].event_dim
    powers = (
        elementwise(power, fn, own).reshape(len(parts), -1) if own == 0 else elementwise(power, fn, own).reshape(-1)
    )
    each = zip(parts, values, observed, powers, strict=True)
    return [GaussianObservation(m, f, v, o, p) for (m, f), v, o, p in each]


def _likelihood_of(fn: dist.Distribution) -> str:
    """Words for the likelihood of a site in a message."""
    return "is a numpyro.factor" if is_factor(fn) else f"has the likelihood {type(unmasked(fn)[0]).__name__}"


def general_observation(
    name: str, fn: dist.Distribution, value: Array, power: Array | float = 1.0
) -> GeneralObservation:
    """Convert an observed site with independent elements to one observation; NaN and masked values are missing.

    The distribution must keep its constructor's arguments as attributes, and one of them must be continuous.

    Args:
        name: name of the site, for messages.
        fn: distribution of the site.
        value: observed value, in the shape of the distribution; NaN where missing.
        power: exponent of the likelihood, as set by `handlers.scale`; broadcasts to the batch shape.

    Returns:
        The m flattened elements, with the unconstrained parameters of each and their log-likelihood.

    Raises:
        ValueError: the elements are vectors, the distribution does not keep its constructor's arguments as attributes,
            or none of its parameters is continuous.
    """
    base, _ = unmasked(fn)
    if isinstance(base, dist.Unit):
        # The log-factor itself is the parameter: a coordinate t along which the log-likelihood is t.
        shape = fn.batch_shape
        parameters = jnp.broadcast_to(base.log_factor, shape).reshape(-1, 1)
        powers = jnp.broadcast_to(jnp.asarray(power), shape).reshape(-1)
        observed = observed_elements(fn, value).reshape(-1)
        return GeneralObservation(parameters, lambda parameters: powers * parameters[:, 0], observed)
    if base.event_dim > 0:
        raise ValueError(
            f"site '{name}' has the likelihood {type(base).__name__}, whose elements are vectors; guidance needs a "
            "MultivariateNormal or independent elements (ndda.Bootstrap(model) takes any likelihood with a log_prob)."
        )
    shape = fn.shape()
    parameters, rebuild = free_parameters(name, base, shape)
    powers = elementwise(power, fn).reshape(-1)
    observed = observed_elements(fn, value).reshape(-1)
    filled = jnp.where(missing(value), base_point(base, value), value)

    def log_prob(parameters: Array) -> Array:
        return powers * log_prob_of(rebuild(parameters), filled).reshape(-1)

    return GeneralObservation(parameters, log_prob, observed, moments=_moments(fn, value, powers))


def predicted_observation(
    fn: dist.Distribution,
    value: Array,
    predictor: Float[Array, " m"],
    link: Callable[[Float[Array, " m"]], Float[Array, " m"]],
    components: Int[np.ndarray, " m"] | None,
    power: Array | float = 1.0,
) -> GeneralObservation:
    """Convert an observed site, each element of which depends on the state through one linear predictor.

    `observation.linear_predictor` finds the predictor and the link.

    Args:
        fn: distribution of the site.
        value: observed value, in the shape of the distribution; NaN where missing.
        predictor: linear predictor of each element at the state, shape (m,).
        link: function from the predictors to log p(y_i | x) of each element, shape (m,); 0 where missing.
        components: index of the component of the flattened state that each predictor is, shape (m,); None if
            predictors are other linear functions of the state.
        power: exponent of the likelihood, as set by `handlers.scale`; `link` includes it.

    Returns:
        The m flattened elements, with the predictor as the only parameter of each.
    """
    observed = observed_elements(fn, value).reshape(-1)
    moments = _moments(fn, value, elementwise(power, fn).reshape(-1))
    return GeneralObservation(
        predictor[:, None], lambda parameters: link(parameters[:, 0]), observed, components, moments
    )


def _moments(
    fn: dist.Distribution, value: Array, powers: Float[Array, " m"]
) -> tuple[Float[Array, " m"], Float[Array, " m"], Float[Array, " m"]] | None:
    """Value, mean and variance of each element of a site, as `GeneralObservation` has them."""
    if not has_mean_and_variance(fn):
        return None
    mean, variance = (moment.reshape(-1) for moment in mean_and_variance("", fn))
    return jnp.where(missing(value), 0, value).reshape(-1).astype(mean.dtype), mean, variance / powers


def is_factor(fn: dist.Distribution) -> bool:
    """Whether the distribution of a site is that of `numpyro.factor`, which observes nothing."""
    return isinstance(unmasked(fn)[0], dist.Unit)


def is_discrete(fn: dist.Distribution) -> bool:
    """Whether the values of a site are whole numbers, such as counts or classes."""
    support: Any = getattr(unmasked(fn)[0], "support", None)
    return bool(support is not None and support.is_discrete)


def has_own_errors(fn: dist.Distribution) -> bool:
    """Whether a distribution is a `Normal`, so that each element has an independent Gaussian error."""
    return isinstance(unmasked(fn)[0], dist.Normal)


def missing(value: Array) -> Bool[Array, ...]:
    """Mask of the NaN values of an array, in its shape; False for integers."""
    return jnp.isnan(value) if jnp.issubdtype(value.dtype, jnp.inexact) else jnp.zeros(value.shape, bool)


def observed_elements(fn: dist.Distribution, value: Array) -> Bool[Array, ...]:
    """Mask of the observed elements of a site, in the shape of its value; one element for `numpyro.factor`."""
    base, mask = unmasked(fn)
    if isinstance(base, dist.Unit):
        # The mask of a site has an axis for the event, and that of `numpyro.factor` has no values.
        of_elements = jnp.asarray(mask)
        return jnp.broadcast_to(of_elements[..., 0] if of_elements.ndim else of_elements, fn.batch_shape)
    return ~missing(value) & jnp.broadcast_to(mask, fn.shape())


def base_point(base: dist.Distribution, value: Array) -> Array:
    """Value in the support of a distribution, to replace missing values, for which `log_prob` would be NaN.

    Args:
        base: distribution without wrappers.
        value: array whose shape and dtype the result has.
    """
    support: Any = base.support
    point = support.feasible_like(value) if support is not None else jnp.zeros_like(value)
    return jnp.asarray(point, value.dtype)


def log_prob_of(base: dist.Distribution, value: Array) -> Float[Array, ...]:
    """Log-density of values; classes may be given as floating-point numbers, as data with NaN are.

    NumPyro uses the value of a categorical distribution as an index, which must be of integer type.

    Args:
        base: distribution without wrappers.
        value: values, NaN nowhere.
    """
    if not isinstance(base.support, dist.constraints.integer_interval) or not jnp.issubdtype(value.dtype, jnp.inexact):
        return base.log_prob(value)
    whole = jnp.round(value)
    return jnp.where(value == whole, base.log_prob(whole.astype(int)), -jnp.inf)


def pointwise_log_likelihood(fn: dist.Distribution, value: Array, power: Array | float = 1.0) -> Float[Array, ...]:
    """Log-likelihood power * log p(y | x) of each element of an observed site, or of each event; 0 where missing.

    Args:
        fn: distribution of the site.
        value: observed value, in the shape of the distribution; NaN where missing.
        power: exponent of the likelihood, as set by `handlers.scale`; broadcasts to the batch shape.

    Returns:
        Array of the shape of the value if its elements are independent, else of its shape without the event axes. An
        event of a `MultivariateNormal` with missing components gives the log-likelihood of the observed ones. An event
        of any other distribution counts only if all its components are observed.
    """
    base, _ = unmasked(fn)
    observed = observed_elements(fn, value)
    if isinstance(base, dist.Unit):
        return jnp.where(observed, jnp.asarray(power) * jnp.broadcast_to(base.log_factor, fn.batch_shape), 0.0)
    if isinstance(base, dist.MultivariateNormal):
        # Gaussian observations can leave out single components of an event.
        events = gaussian_observations("", fn, value, power)
        residuals, normalizers = zip(*map(whiten, events), strict=True)
        logs = [jnp.sum(n) - 0.5 * jnp.vdot(r, r) for r, n in zip(residuals, normalizers, strict=True)]
        return jnp.stack(logs).reshape(value.shape[:-1])
    filled = jnp.where(observed, value, base_point(base, value))
    if base.event_dim == 0:
        return jnp.where(observed, elementwise(power, fn) * log_prob_of(base, filled), 0.0)
    whole = jnp.all(observed, axis=tuple(range(-base.event_dim, 0)))
    return jnp.where(whole, elementwise(power, fn, base.event_dim) * base.log_prob(filled), 0.0)
