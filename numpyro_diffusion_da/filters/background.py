r"""Background of a filter: mean and variance of its prediction of each observation, before it sees the observation.

Let $x'$ be the next state, and $M$ the number of particles used. Each filter records for every observed value

$$
B = \operatorname*{mean}_i E[y \mid x'_i], \qquad
P = \frac{M + 1}{M} \operatorname*{var}_i E[y \mid x'_i], \qquad
R = \operatorname*{mean}_i \operatorname{Var}[y \mid x'_i].
$$

If the filter is right, $E\,(O - B)^2 = P + R$ for the observation O. The factor (M + 1) / M adds the sampling error of
B to the unbiased variance over the particles.

A filter that draws the $x'_i$ without the observations (`Bootstrap`, `EnKF`) has them. `FAAPF` and `GuidedPF` draw them
with the observations, so they use the law of total variance instead. Let $m_i$ and $V_i$ be the mean and the covariance
of the transition from particle i, and $H_i$ the derivative of $E[y \mid x']$ at $m_i$. Then

$$
B = \operatorname*{mean}_i E[y \mid m_i], \qquad
P = \frac{M + 1}{M} \operatorname*{var}_i E[y \mid m_i] + \operatorname*{mean}_i \operatorname{diag}(H_i V_i H_i^T).
$$

This is exact if the mean of the observation is linear in the state and the error does not depend on it. Anything else
is linearized at $m_i$, as in an extended Kalman filter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.program.scan import ObservedSite, TimeInputs
from numpyro_diffusion_da.program.sites import has_mean_and_variance, mean_and_variance
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.base import map_particles, particle_keys, total_particles
from numpyro_diffusion_da.smc.rows import are_rows_apart, sum_rows
from numpyro_diffusion_da.smc.sharding import first, own, rows_at, whole
from numpyro_diffusion_da.transition.base import DrawRecord
from numpyro_diffusion_da.transition.gaussian import GaussianDynamics
from numpyro_diffusion_da.transition.predictive import observed_variances

MEANS = 64
"""Largest number of particles whose forecast mean is computed for the background alone, and of V in closed form."""

PROBED = 16
"""Largest number of particles at which an emulator makes a product with V for the background."""

PROBE_LEVEL = 10.0
"""Highest noise level at which a diffusion's V is computed: V is 1 % too small for a latent of unit variance.

At higher levels the errors of a learned Jacobian are larger than that: they are multiplied by the square of the level.
"""


class SiteBackground(NamedTuple):
    """Background of one observed site at one step; arrays have the shape of the site's value.

    Attributes:
        mean: B, the mean of the predicted observation.
        variance: P, the variance of the prediction without the observation error. It includes the sampling error of B.
        error_variance: R, the variance of the observation error.
        members: M, the number of particles that B is a mean over.
    """

    mean: Float[Array, ...]
    variance: Float[Array, ...]
    error_variance: Float[Array, ...]
    members: Int[Array, ""]


class BackgroundRecord(NamedTuple):
    """Record of the background at one step.

    Attributes:
        sites: background of each observed site whose distribution defines a mean and a variance, by name.
        passes: network passes made for the background alone, per particle of the filter.
    """

    sites: dict[str, SiteBackground]
    passes: NetworkPasses


class CheckRecord(NamedTuple):
    """Record of a gross-error check at one step.

    Attributes:
        rejected: for each checked site a mask in the shape of its value, True where an observation was rejected.
        passes: network passes of the check, per particle of the filter.
    """

    rejected: dict[str, Bool[Array, ...]]
    passes: NetworkPasses


class Screen(NamedTuple):
    """Check of the observations of a step against the background, before the filter uses them.

    Attributes:
        reject: function (background by site, observed sites) -> for each checked site a mask in the shape of its value,
            True where the observation is to be missing.
        members: largest number of particles drawn for the check, if the filter draws none without the observations.
    """

    reject: Callable[[Mapping[str, SiteBackground], Mapping[str, ObservedSite]], dict[str, Bool[Array, ...]]]
    members: int


def evenly_spread(n: int, members: int) -> np.ndarray:
    """Indices of at most `members` of n particles. Neighbors are often copies of one particle, so they are spread."""
    return np.arange(min(members, n)) * n // min(members, n)


class Drawn(NamedTuple):
    """Particle that holds its draw of the next state already.

    A filter gives it to a kernel of `smc` whose draw then takes what it holds. So the observations can be screened by
    these draws before the kernel uses them.

    Attributes:
        carry: carry of the particle before the step.
        x: draw of the next state without the observations.
        record: record of the draw.
        conditioning: conditioning of the carry; None if it is not held.
        past: earlier states of the particle, shape (L, ...); () without a lag.
    """

    carry: PyTree
    x: Float[Array, ...]
    record: DrawRecord
    conditioning: PyTree | None = None
    past: Any = ()


def no_passes() -> NetworkPasses:
    """Count of no network passes, as the averages over particles are."""
    return NetworkPasses(*(jnp.zeros(()) for _ in NetworkPasses._fields))


def background_key(rng_key: PRNGKeyArray) -> PRNGKeyArray:
    """Key of the background of a step: a sixth one, so that all draws are the same with and without a background."""
    return jax.random.split(rng_key, 6)[5]


def probe_level(program: StateSpaceModel) -> float | None:
    """Noise level at which a diffusion's covariance is computed by default; None if the transition is no diffusion.

    Args:
        program: state-space model at given arguments of the program.
    """
    diffusion = program.structure.diffusion
    return None if diffusion is None else min(PROBE_LEVEL, diffusion.prior.noise_range[1])


def per_particle(passes: NetworkPasses, n: int) -> NetworkPasses:
    """Network passes per particle of a filter with n particles, from the counts of those that were used.

    A whole number comes out whole: the compiler may multiply by 1 / n, and 15 times 1 / 15 is not 1.
    """

    def shared(count: Int[Array, " m"]) -> Float[Array, ""]:
        whole, rest = jnp.divmod(jnp.sum(count), n)
        return whole + rest / n

    return jax.tree.map(shared, passes)


def rejected_by(
    screen: Screen,
    program: StateSpaceModel,
    background: Mapping[str, SiteBackground],
    particles: PyTree,
    inputs: TimeInputs,
) -> dict[str, Bool[Array, ...]]:
    """Masks of the observations that a screen rejects, by site.

    Args:
        screen: check of the observations.
        program: state-space model at given arguments of the program.
        background: background of each observed site.
        particles: carries before the step, leading axis N.
        inputs: inputs of the time.
    """
    return screen.reject(background, program.sites(first(particles), inputs).observed)


def screened(
    screen: Screen | None,
    program: StateSpaceModel,
    sites: dict[str, SiteBackground],
    particles: PyTree,
    inputs: TimeInputs,
) -> tuple[StateSpaceModel, dict[str, PyTree]]:
    """Apply the screen of a filter that has the background before its update.

    Args:
        screen: check of the observations; None for none.
        program: state-space model at given arguments of the program.
        sites: background of each observed site.
        particles: carries before the step, leading axis N.
        inputs: inputs of the time.

    Returns:
        (the program without the observations that the screen rejects; fields of `Info` that say so).
    """
    record = {"background": BackgroundRecord(sites, no_passes())}
    if screen is None:
        return program, record
    rejected = rejected_by(screen, program, sites, particles, inputs)
    return program.without(rejected), {**record, "check": CheckRecord(rejected, no_passes())}


def background_of_draws(
    program: StateSpaceModel,
    x: Float[Array, "m ..."],
    particles: PyTree,
    inputs: TimeInputs,
    members: int,
    batch_size: int | None = None,
) -> dict[str, SiteBackground]:
    """Background of each observed site, from draws of the next state that have not seen the observations.

    Args:
        program: state-space model at given arguments of the program.
        x: draws, leading axis M; on a mesh this device's share of them.
        particles: carries that they were drawn from, leading axis M.
        inputs: inputs of the time.
        members: number M of draws on all devices.
        batch_size: number of particles used at a time; None for all at once.
    """
    seen = whole(map_particles(_site_moments(program, inputs), batch_size)(x, particles), members)
    return {name: _summarized(means, variances, members) for name, (means, variances) in seen.items()}


def background_of_transition(
    program: StateSpaceModel,
    rng_key: PRNGKeyArray,
    particles: PyTree,
    inputs: TimeInputs,
    *,
    forecast: Float[Array, "n ..."] | None = None,
    noise_level: float | None = None,
    conditioning: PyTree | None = None,
    batch_size: int | None = None,
) -> BackgroundRecord:
    """Background of each observed site, from the mean and the covariance of the transition.

    A diffusion makes one product with its covariance at each of at most `PROBED` particles, with random signs. It
    estimates the diagonal of H V H^T (Bekas, Kokiopoulou & Saad 2007, Appl. Numer. Math. 57, 1214).

    Args:
        program: state-space model at given arguments of the program.
        rng_key: random key of the signs.
        particles: carries before the step, leading axis N.
        inputs: inputs of the time.
        forecast: mean E[x' | c] of every particle, shape (N, *state), if the filter has computed it. None computes it:
            for all particles in closed form, for at most `MEANS` particles by an emulator.
        noise_level: noise level of a diffusion's covariance; None for the highest up to `PROBE_LEVEL`.
        conditioning: conditioning of every particle, leading axis N; None computes it where it is needed.
        batch_size: number of particles used at a time; None for all at once.
    """
    n, emulator = total_particles(particles), program.structure.emulator
    passes, members = no_passes(), n
    own_passes = program.conditioning_passes if conditioning is None else NetworkPasses.of()
    # Spread between the forecast means.
    means_of = particles
    if forecast is None:
        which = evenly_spread(n, n if emulator is None else MEANS)
        (means_of, given), members = rows_at((particles, conditioning), which), len(which)

        def mean(carry: PyTree, given: PyTree | None) -> tuple[Array, NetworkPasses]:
            moments = program.transition(carry, inputs, conditioning=given).moments()
            return moments.mean, moments.passes.plus(own_passes)

        forecast, made = map_particles(mean, batch_size)(means_of, given)
        passes = passes.plus(per_particle(whole(made, members), n))
    between = background_of_draws(program, forecast, means_of, inputs, members, batch_size)
    if not between:
        return BackgroundRecord({}, passes)

    # Mean spread of the transition around them.
    if noise_level is None:
        noise_level = probe_level(program)

    def within(key: PRNGKeyArray, carry: PyTree, given: PyTree | None) -> tuple[dict[str, Array], NetworkPasses]:
        dynamics = program.transition(carry, inputs, conditioning=given)
        moments = dynamics.moments(noise_level)

        def means(x: Array) -> dict[str, Array]:
            return {name: seen for name, (seen, _) in _site_moments(program, inputs)(x, carry).items()}

        exact = isinstance(dynamics, GaussianDynamics)
        variances, products = observed_variances(moments, means, key, exact)
        made = jax.tree.map(lambda count: count * products, moments.passes_per_product)
        return variances, moments.passes.plus(made).plus(own_passes)

    some = evenly_spread(n, MEANS if emulator is None else PROBED)
    keys = own(particle_keys(rng_key, len(some)))
    found = map_particles(within, batch_size)(keys, *rows_at((particles, conditioning), some))
    variances, made = whole(found, len(some))
    sites = {
        name: site._replace(variance=site.variance + _positive_mean(variances[name])) for name, site in between.items()
    }
    return BackgroundRecord(sites, passes.plus(per_particle(made, n)))


def _site_moments(
    program: StateSpaceModel, inputs: TimeInputs
) -> Callable[[Array, PyTree], dict[str, tuple[Array, Array]]]:
    """Build the function (x', carry) -> (E[y | x'], Var[y | x']) of each site that defines them, by name.

    Args:
        program: state-space model at given arguments of the program.
        inputs: inputs of the time.
    """

    def moments(x: Array, carry: PyTree) -> dict[str, tuple[Array, Array]]:
        sites = program.sites(carry, inputs, x).observed
        return {
            name: mean_and_variance(name, site.fn) for name, site in sites.items() if has_mean_and_variance(site.fn)
        }

    return moments


def _positive_mean(values: Float[Array, "m ..."]) -> Float[Array, ...]:
    """Mean over the finite members, or 0 if it is negative: a learned covariance may not be positive."""
    return jnp.maximum(_finite_mean(values, map_particles(jnp.isfinite)(values)), 0.0)


def _finite_mean(values: Float[Array, "m ..."], usable: Bool[Array, "m ..."]) -> Float[Array, ...]:
    """Mean over the usable members; NaN where there are none."""
    count = sum_rows(usable)
    total = sum_rows(map_particles(lambda used, value: jnp.where(used, value, 0.0))(usable, values))
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)


def _summarized(means: Float[Array, "m ..."], variances: Float[Array, "m ..."], members: int) -> SiteBackground:
    """Background of a site from E[y | x'] and Var[y | x'] of M members, each of shape (M, *value).

    Members that are not finite are left out. One member alone has no variance, which is NaN then.
    """

    def of_usable() -> tuple[Array, Array, Array, Array]:
        usable = map_particles(jnp.isfinite)(means)
        mean = _finite_mean(means, usable)
        squares = sum_rows(map_particles(lambda used, seen: jnp.where(used, (seen - mean) ** 2, 0.0))(usable, means))
        return sum_rows(usable), mean, squares, _finite_mean(variances, usable)

    def of_all(totals: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
        mean, error_variance = (total / members for total in totals)
        return jnp.full(mean.shape, members), mean, jnp.sum((means - mean[None]) ** 2, axis=0), error_variance

    if are_rows_apart():
        count, mean, squares, error_variance = of_usable()
    else:  # sums are finite if all members are, and need no mask, which takes several times as long
        totals = jnp.sum(means, axis=0), jnp.sum(variances, axis=0)
        finite = jnp.all(jnp.isfinite(jnp.stack(totals)))
        count, mean, squares, error_variance = jax.lax.cond(finite, of_all, lambda _: of_usable(), totals)
    unbiased = jnp.where(count > 1, squares / jnp.maximum(count - 1, 1), jnp.nan)
    return SiteBackground(
        mean=mean,
        variance=(1.0 + 1.0 / jnp.maximum(count, 1)) * unbiased,
        error_variance=error_variance,
        members=jnp.asarray(members),
    )
