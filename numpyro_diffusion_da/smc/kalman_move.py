r"""Kalman move: an ensemble Kalman smoother step that moves selected ancestors under the predictive likelihood.

Selection alone takes a particle's ancestor as it is. With many observations no ancestor fits them all, and weights that
are tempered leave most of the observations unused. The Kalman move uses what selection leaves. Let c be what a particle
is conditioned on, $g_i = E[h(x') | c_i]$ its prediction of the observations, and

$$S = R + \operatorname*{mean}_i \operatorname{Cov}[h(x') \mid c_i]$$

the covariance of the observations around it. Selection uses the predictive likelihood $N(y; g, S)$ to the power
$\alpha$ (all of it if $\alpha = 1$), and the move uses the rest:

$$
c_i^* = c_i + P_{cg} \Big(P_{gg} + \frac{S}{1 - \alpha}\Big)^{-1} (y - g_i - e_i),
\qquad e_i \sim N\Big(0, \frac{S}{1 - \alpha}\Big),
$$

with the covariances $P$ of the selected ensemble. The guided draw $x' \sim p(x' | c^*, y)$ follows. As
$p(c, x' | y) = p(c | y) \, p(x' | c, y)$ with $p(c | y) \propto p(c) \, p(y | c)$, each observation is used once.

How much selection is needed is a matter of how far the ensemble is from Gaussian. A test of this gives selection the
share $\lambda$ of the power that its effective sample size allows. The test compares means $\mu$ and variances $v$ of c
under the weights, with their sampling variances $s$, to those of a Kalman step at the same power:

$$
D = \operatorname{mean} \frac12 \Big[\frac{(\mu_w - \mu_K)^2}{s_\mu} + \frac{(v_w - v_K)^2}{s_v}\Big],
\qquad \lambda = \max(0, 1 - 1 / D).
$$

The mean is over components and blocks. The share $\lambda$ minimizes $(1 - \lambda)^2 b^2 + \lambda^2 s$ for a squared
bias $b^2$ that is estimated by $(D - 1) s$ (positive-part James-Stein estimate).

With a taper each block of the state is selected and moved by the observations near it. An observation j with the taper
$\rho_j$ is used to the power $\rho_j$: its residual is multiplied by $\rho_j^{1/2}$ and gets independent noise of
variance $(1 - \rho_j) S_{jj}$ in addition to the scaled covariance. All blocks share the normals of the perturbations.

An observation without a variance (a Cauchy error, a `numpyro.factor`) can only select. Near it, selection uses all the
power that its effective sample size allows.

With a Gaussian ensemble, a linear prediction and $\lambda = 0$ the moved ensemble has the mean and covariance of
$p(c | y)$ as N grows. With $\lambda = \alpha = 1$ there is no move, and the filter is the FA-APF.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import numbers_by_name, require_count, require_number, shown
from numpyro_diffusion_da.smc.base import Resampling, map_particles, particle_keys, total_particles
from numpyro_diffusion_da.smc.columns import are_columns_divided, by_place, from_places, map_columns
from numpyro_diffusion_da.smc.ensemble_update import kalman_coefficients, kalman_increments
from numpyro_diffusion_da.smc.factorizations import most_at_a_time
from numpyro_diffusion_da.smc.local_ancestors import LARGEST_BATCH, LocalAncestors, keep_places
from numpyro_diffusion_da.smc.localization import PlacedTaper
from numpyro_diffusion_da.smc.probing import Products, pool
from numpyro_diffusion_da.smc.sharding import Traffic, own, take_ancestors, traffic_of, whole
from numpyro_diffusion_da.smc.tempering import Tempering

FEW_PRODUCTS = 4
"""Number of observed values up to which a diffusion makes a product with its covariance for each of them."""


MOST_BETWEEN = 2048
"""Number of observed values up to which the covariance of predictions is kept for all pairs of them."""


WORTH_LEAVING_OUT = 128
"""Number of observations near a block from which on the missing ones are left out of its solves."""


Terms = Callable[[Float[Array, "n c"]], tuple[Float[Array, " c"], Bool[Array, " c"]]]
"""Function from values of a block to the terms of D: (term of each value, whether it counts)."""


class Departure(NamedTuple):
    """Departure of the observations from the prediction of one particle, for m observed values.

    Attributes:
        residual: y - g with g = E[h(x') | c], shape (m,); 0 where missing.
        error: variance of the observation given the state, diagonal of R, shape (m,). An observation whose variance is
            not finite moves nothing.
        weight_spread: variance of h(x') given c that the weights take into account, shape (m,); 0 with Dirac weights.
        spread: Cov[h(x') | c], shape (m, m); or the `Products` of one particle with it, which the particles pool.
    """

    residual: Float[Array, " m"]
    error: Float[Array, " m"]
    weight_spread: Float[Array, " m"]
    spread: Any


class Predicted(NamedTuple):
    """Prediction of the observations by one particle: its log-weight, and its departure from them."""

    log_weight: Any
    departure: Departure


class MoveRecord(NamedTuple):
    """Record of the moves of one step.

    Attributes:
        non_gaussianity: D of each block, shape (b,), or () without blocks; 0 where no observation is near.
        selection_share: lambda, the share of its power that selection uses.
        moved_share: share of the observations near a block that the move uses, of the shape of D; 0 without any.
    """

    non_gaussianity: Float[Array, " b"] | Float[Array, ""]
    selection_share: Float[Array, ""]
    moved_share: Float[Array, " b"] | Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class KalmanMove:
    """Settings of the Kalman move of ancestors; see the module `smc.kalman_move`.

    Args:
        selection_share: share lambda, from 0 to 1, of the power that the effective sample size allows which selection
            uses; the move uses the rest. None finds it at each step by a test of how Gaussian the ensemble is. 0
            selects nothing, and is exact for Gaussian ensembles as N grows; observations without a variance are then
            used by the draws alone.
        radius: half-width of the taper by which observations move the state, in the unit of the distance; one number,
            or one for each observed site by its name. None takes that of the filter's taper, by which observations
            select. The move is less noisy than selection, so its taper may be wider.
        noise_level: noise level at which a diffusion's covariance V is computed, as for `Moment`; None takes 10, or the
            prior's highest level if that is lower. `Moment` weights have their own.
        most_products: number of observed values up to which each particle of a diffusion makes a product with V for
            each of them, which is exact. With more of them the particles share the products (`smc.probing`).
        lowest: lowest value of a moved state, as a regression knows no bounds: 0 for a humidity. A number, or one for
            each value of a place (the state's last axis); -inf for none. Values below it become this value.
        highest: highest value of a moved state, in the same form.

    Raises:
        ValueError: a number is out of its range.
        TypeError: a number is of the wrong type.
    """

    selection_share: float | None = None
    radius: float | Mapping[str, float] | None = None
    noise_level: float | None = None
    most_products: int = FEW_PRODUCTS
    lowest: float | Sequence[float] | None = None
    highest: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.selection_share is not None:
            advice = "give a number from 0 (no selection) to 1, or None for a share found at each step."
            share = require_number(self.selection_share, self, "selection_share", advice, least=0.0, most=1.0)
            object.__setattr__(self, "selection_share", share)
        if self.radius is not None:
            advice = "give a positive half-width, in the unit of the taper's distance."
            object.__setattr__(self, "radius", numbers_by_name(self.radius, self, "radius", advice))
        if self.noise_level is not None:
            level = require_number(self.noise_level, self, "noise_level", "give a positive number, or None.", above=0.0)
            object.__setattr__(self, "noise_level", level)
        require_count(self.most_products, self, "most_products", least=0)
        lowest, highest = (self._bound(name) for name in ("lowest", "highest"))
        if lowest is not None and highest is not None and not np.all(np.less(lowest, highest)):
            raise ValueError(
                f"KalmanMove got lowest={self.lowest} and highest={self.highest}; each lowest value must be below the "
                "highest one."
            )

    def _bound(self, name: str) -> np.ndarray | None:
        """Check one bound, and store it as a number or a tuple of numbers."""
        given = getattr(self, name)
        if given is None:
            return None
        advice = "give a number, or one number for each value of a place (the state's last axis)."
        values = np.asarray(given)
        if values.dtype.kind not in "iuf" or values.ndim > 1:
            raise TypeError(f"KalmanMove got {name}={shown(given)}; {advice}")
        if np.isnan(values).any():
            raise ValueError(f"KalmanMove got NaN in {name}={shown(given)}; {advice}")
        values = values.astype(float)
        object.__setattr__(self, name, values.item() if values.ndim == 0 else tuple(values.tolist()))
        return values

    def bounds(self, state_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
        """Lowest and highest values of a state, each of a shape that broadcasts to it; None without bounds.

        Args:
            state_shape: shape of one state.

        Raises:
            ValueError: a bound has another number of values than the state's last axis.
        """
        if self.lowest is None and self.highest is None:
            return None
        found = []
        for name, without in (("lowest", -np.inf), ("highest", np.inf)):
            values = np.asarray(without if getattr(self, name) is None else getattr(self, name), np.float32)
            if values.ndim == 1 and values.shape != state_shape[-1:]:
                raise ValueError(
                    f"KalmanMove got {len(values)} values of {name} for a state of shape {state_shape}; give one "
                    f"number, or {state_shape[-1] if state_shape else 1}."
                )
            found.append(values.reshape(*[1] * (len(state_shape) - 1), -1) if state_shape else values)
        return found[0], found[1]


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedMove:
    """Kalman move placed on one model: which arrays move, by which observations, and how much selection there is.

    Attributes:
        local: blocks of the state with the observations whose weights select their ancestors; None for one block.
        taper: taper of the move at the positions of the model's values; None without localization.
        carried: indices of the arrays of a particle, in the order of its leaves, that move. With a taper their last
            axes must be those of a state.
        selection_share: share lambda of its power that selection uses, from 0 (no selection) to 1; None finds it by the
            test of Gaussianity at each step.
        bounds: lowest and highest values of a state, of shapes that broadcast to it; None for none.
        bounded: indices of the moved arrays, among the leaves of a particle, that the bounds hold for. Their last axes
            are those of a state.
        along: indices of further arrays that move by the same regression, in the form of those in `carried`: earlier
            states. The test of Gaussianity leaves them out, so that they change nothing about the other arrays.
    """

    local: LocalAncestors | None
    taper: PlacedTaper | None
    carried: tuple[int, ...]
    selection_share: float | None = None
    bounds: tuple[np.ndarray, np.ndarray] | None = None
    bounded: tuple[int, ...] = ()
    along: tuple[int, ...] = ()

    def select_and_move(
        self,
        rng_keys: tuple[PRNGKeyArray, PRNGKeyArray],
        predicted: Predicted,
        particles: PyTree,
        resampling_fn: Resampling | None,
        target_ess: float,
        tempering: Tempering,
    ) -> tuple[Array, Array, Array, PyTree, MoveRecord]:
        """Select ancestors and move them.

        Args:
            rng_keys: random keys of the resampling and of the perturbed observations.
            predicted: prediction of each particle, leading axis N.
            particles: particles, leading axis N; on a mesh those of this device, and so the moved ones.
            resampling_fn: resampling function from `blackjax.smc.resampling`; None for systematic resampling.
            target_ess: effective sample size that tempering aims at, as a fraction of N; 0 for no tempering.
            tempering: kind of tempering.

        Returns:
            (log-weights before tempering, ancestors, tempering exponents of which selection uses its share, moved
            particles, record of the move), the first three as from `LocalAncestors.select`, or without blocks from
            `Tempering.select`.
        """
        weights, (residual, error, of_weight, spread) = predicted
        n, m = residual.shape
        usable = jnp.all(jnp.isfinite(residual), axis=1)
        residual = jnp.where(usable[:, None], residual, 0.0)
        observed = jnp.any(residual != 0.0, axis=0)  # a missing value has a residual of zero in every particle
        known = usable[:, None] & jnp.isfinite(error)
        selects_only = jnp.any(usable) & ~jnp.any(known, axis=0)
        error = _mean(error, known)
        observed = observed & (error > 0.0)
        scale = jnp.where(observed, jnp.sqrt(jnp.where(observed, error, 1.0)), 1.0)
        residual = jnp.where(observed[None], residual / scale[None], 0.0)
        weight_error = 1.0 + jnp.where(observed, jnp.maximum(_mean(of_weight, usable[:, None]), 0.0) / scale**2, 0.0)
        noise = jax.vmap(lambda key: jax.random.normal(key, (m,), residual.dtype))(particle_keys(rng_keys[1], n))
        noise = (noise - noise.mean(0, keepdims=True)) * (n / max(n - 1, 1)) ** 0.5
        blocks = _Blocks.of(self.local, self.taper, m, residual.dtype)
        present = observed
        for leaf in jax.tree.leaves(weights):
            if leaf.ndim == 2:  # weights of whole particles have no axis of observations, and no neighborhoods
                present = present | jnp.any(leaf != 0.0, axis=0)
        spread_between = _pooled(spread, usable, observed, scale, blocks.between)
        leaves, form = jax.tree.flatten(particles)
        moving = (*self.carried, *self.along)
        tested, moved = (_Values(blocks, [leaves[i] for i in which]) for which in (self.carried, moving))

        def weigh(block: Array, near: Near) -> tuple[tuple[Array, ...], Terms]:
            which, rho, _ = near
            nearby, taper = _near(weights, which, rho, blocks.whole)
            log_weights, alpha = tempering.exponent(nearby, taper, target_ess)
            tempered = tempering.tempered(nearby, taper, alpha)
            power = alpha * rho * observed[which]
            error = weight_error[which] / jnp.maximum(power, 1e-30)

            def terms(values: Array) -> tuple[Array, Array]:
                return _non_gaussianity(tempered, values, residual[:, which], error, power > 0)

            found = log_weights, alpha, jnp.any(power > 0), jnp.any((rho > 0) & selects_only[which])
            return found, terms

        (log_weights, alpha, seen, selects), d = tested.weighed(weigh, present)
        if self.selection_share is None:
            mean = jnp.sum(jnp.where(seen, d, 0.0)) / jnp.maximum(jnp.sum(seen), 1)
            share = jnp.maximum(0.0, 1.0 - 1.0 / jnp.maximum(mean, 1.0))
        else:
            share = jnp.asarray(self.selection_share, residual.dtype)
        used_alpha = share * alpha
        if self.selection_share != 0:
            used_alpha = jnp.where(selects, alpha, used_alpha)

        def select(block: Array, near: Near) -> Array:
            which, rho, _ = near
            nearby, taper = _near(weights, which, rho, blocks.whole)
            return keep_places(tempering.resample(rng_keys[0], nearby, taper, used_alpha[block], resampling_fn))

        ancestors = blocks.map(select, n, 0, present)

        def move(block: Array, near: Near) -> tuple[Array, Callable[[Array], Array]]:
            which, rho, wide = near
            keep = observed[which]
            power = jnp.where(keep, jnp.maximum(wide - used_alpha[block] * rho, 0.0), 0.0)
            of = ancestors[block]

            def moved(values: Array) -> Array:
                return _move(values[of], residual[of][:, which], noise[:, which], spread_between(which), power)

            total = jnp.sum(jnp.where(keep, wide, 0.0))
            return jnp.where(total > 0, jnp.sum(power) / jnp.where(total > 0, total, 1.0), 0.0), moved

        used, arrays = moved.moved(move, present)
        ancestors = ancestors.T
        if self.local is None:
            log_weights, alpha, ancestors = log_weights[0], alpha[0], ancestors[:, 0]
            d, used = d[0], used[0]
            parents = jax.tree.leaves(take_ancestors(particles, ancestors))
        else:
            log_weights = log_weights.T
            parents = jax.tree.leaves(self.local.glue(particles, ancestors))
        for i, array in zip(moving, arrays, strict=True):
            parents[i] = array
        if self.bounds is not None:
            for i in self.bounded:
                lowest, highest = (b.reshape(*[1] * (parents[i].ndim - 1 - b.ndim), *b.shape) for b in self.bounds)
                clipped = map_particles(lambda x, low=lowest, high=highest: jnp.clip(x, low, high))
                parents[i] = clipped(parents[i])
        return log_weights, ancestors, alpha, jax.tree.unflatten(form, parents), MoveRecord(d, share, used)

    def traffic(self, particles: PyTree, ancestors: Array) -> Traffic | tuple[()]:
        """Bytes of ancestors that the particles of a device need from other devices; () without a mesh.

        Without blocks the moved arrays travel by parts of the state, and only the others with their ancestors.

        Args:
            particles: particles as for `select_and_move`.
            ancestors: ancestors that it returned.
        """
        if self.local is not None:
            return self.local.traffic(particles, ancestors)
        moving = (*self.carried, *self.along)
        stay = [x for i, x in enumerate(jax.tree.leaves(particles)) if i not in moving]
        return traffic_of(stay, ancestors) if stay else ()


def _mean(values: Float[Array, "n m"], usable: Bool[Array, "n k"]) -> Float[Array, " m"]:
    """Mean over the usable values; 0 where there are none."""
    return jnp.sum(jnp.where(usable, values, 0.0), axis=0) / jnp.maximum(jnp.sum(usable, axis=0), 1)


def _pooled(
    spread: Any,
    usable: Bool[Array, " n"],
    observed: Bool[Array, " m"],
    scale: Float[Array, " m"],
    taper: Callable[[Array], Array | None],
) -> Callable[[Array], Array]:
    """Build the function from some observations to the mean of Cov[h(x') | c] between them, in units of R.

    Products that mix observations find their covariances only as far as a taper separates them. Without a taper, what
    is off the diagonal is then left out.

    Args:
        spread: spread of each particle as in `Departure`, leading axis N.
        usable: particles to use.
        observed: False where an observation is missing.
        scale: unit of each observation.
        taper: function from some observations to the taper between them; None for none.
    """
    m = len(scale)
    whole = None
    if isinstance(spread, Products):
        made = pool(spread._replace(slopes=spread.slopes / scale[None]), usable)
    else:
        finite = usable[:, None, None] & jnp.isfinite(spread)
        whole = jnp.sum(jnp.where(finite, spread, 0.0), axis=0) / jnp.maximum(jnp.sum(usable), 1)
        whole = whole / (scale[:, None] * scale[None, :])

    def pooled(which: Array) -> Array:
        left, right = made.left[:, which], made.right[:, which]
        between, found = taper(which), left.T @ right
        if between is None:
            between = jnp.where(made.mixed, jnp.eye(len(which), dtype=found.dtype), 1.0)
        return between * found

    if whole is None and m <= MOST_BETWEEN:  # neighborhoods overlap: one product of all pairs is cheaper than of each
        whole = pooled(jnp.arange(m))

    def between(which: Array) -> Array:
        found = pooled(which) if whole is None else whole[which][:, which]
        keep = observed[which]
        return jnp.where(keep[:, None] & keep[None, :], 0.5 * (found + found.T), 0.0)

    return between


class Near(NamedTuple):
    """Observations near a block.

    Attributes:
        which: their indices, shape (k,).
        rho: taper of the selection at them, shape (k,); 0 for those that only fill up.
        wide: taper of the move at them, shape (k,).
    """

    which: Int[Array, " k"]
    rho: Float[Array, " k"]
    wide: Float[Array, " k"]


def _counting(near: Near, present: Bool[Array, " m"]) -> Bool[Array, "... k"]:
    """Whether an observation is present and has a weight."""
    return present[near.which] & ((near.rho > 0) | (near.wide > 0))


def _leave_out(near: Near, present: Bool[Array, " m"], size: int) -> Near:
    """Leave out observations that do not count; at most `size` of them may do so."""
    here = _counting(near, present)
    to = jnp.where(here, jnp.cumsum(here) - 1, size)

    def filled(values: Array) -> Array:
        return jnp.zeros(size, values.dtype).at[to].set(values, mode="drop")

    return Near(*map(filled, near))


def _near(weights: PyTree, which: Array, rho: Array, whole: bool) -> tuple[PyTree, Array | None]:
    """Log-weights of the observations near a block with their taper; without a taper the log-weights as they are."""
    if whole:
        return weights, None
    return jax.tree.map(lambda x: x[:, which], weights), rho


def _non_gaussianity(
    tempered: Float[Array, " n"],
    c: Float[Array, "n c"],
    residual: Float[Array, "n k"],
    error: Float[Array, " k"],
    used: Bool[Array, " k"],
) -> tuple[Float[Array, " c"], Bool[Array, " c"]]:
    """Terms of the statistic D: weighted moments of c against those of a Kalman step with the same errors.

    D of a block is the mean over its values.

    Args:
        tempered: tempered log-weights.
        c: values of the block.
        residual: residuals of the observations near the block, in units of R.
        error: error variances of these observations at the power of the weights.
        used: whether an observation has a part in the weights.

    Returns:
        (term of each value, whether it counts).
    """
    n = len(c)
    w = jax.nn.softmax(tempered)[:, None]
    mean = jnp.sum(w * c, axis=0)
    squares = (c - mean[None]) ** 2
    variance = jnp.sum(w * squares, axis=0)
    of_mean = jnp.sum(w**2 * squares, axis=0)
    of_variance = jnp.sum(w**2 * (squares - variance[None]) ** 2, axis=0)
    # An observation that is not used has no covariance with anything.
    seen = jnp.where(used[None], residual, 0.0)
    white = seen / jnp.sqrt(jnp.where(used, error, 1.0))[None]
    z = white.mean(0, keepdims=True) - white
    anomalies = c - c.mean(0, keepdims=True)
    prior = jnp.sum(anomalies**2, axis=0) / (n - 1)
    gains = kalman_coefficients(z, jnp.concatenate([white.mean(0)[:, None], z.T @ anomalies], axis=1))
    kalman_mean = c.mean(0) + gains[:, 0] @ anomalies
    kalman_variance = prior - jnp.sum(anomalies * gains[:, 1:], axis=0) / (n - 1)
    terms = 0.5 * (
        (mean - kalman_mean) ** 2 / jnp.where(of_mean > 0, of_mean, jnp.inf)
        + (variance - kalman_variance) ** 2 / jnp.where(of_variance > 0, of_variance, jnp.inf)
    )
    return terms, jnp.isfinite(terms) & (of_mean > 0)


def _move(
    c: Float[Array, "n c"],
    residual: Float[Array, "n k"],
    noise: Float[Array, "n k"],
    between: Float[Array, "k k"],
    power: Float[Array, " k"],
) -> Float[Array, "n c"]:
    """Move the values of one block by the observations near it.

    Args:
        c: values of the block, of selected ancestors.
        residual: residuals of the observations near the block for the same ancestors, in units of R.
        noise: standard normals, centered over the particles.
        between: covariance of the predictions around the particles' own.
        power: power to which each observation is used, from 0 to 1.
    """
    root = jnp.sqrt(power)
    variances = jnp.diagonal(between)
    own = 1.0 + jnp.maximum(variances, 0.0)
    coupled = root[:, None] * (between - jnp.diag(variances)) * root[None, :]
    factor = jnp.diag(jnp.sqrt(own))
    for share in (0.5, 1.0):  # a covariance that was estimated by probes may not be positive definite
        better = jax.lax.linalg.cholesky(jnp.diag(own) + share * coupled, symmetrize_input=False)
        factor = jnp.where(jnp.all(jnp.isfinite(jnp.diagonal(better))), better, factor)
    white = jax.scipy.linalg.solve_triangular(factor, (residual * root[None]).T, lower=True).T
    z = white.mean(0, keepdims=True) - white
    return c + kalman_increments(z, (white - noise).T)(c - c.mean(0, keepdims=True))


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks of the state, the observations near each, and the places of each.

    Attributes:
        which: indices of the observations near each block, shape (b, k).
        rho: taper of the selection at these observations, shape (b, k).
        wide: taper of the move at these observations, shape (b, k).
        points: indices of the places in each block, padded by its first one, shape (b, q).
        slot: place of each point in its block, shape (p,).
        of_point: block of each point, shape (p,).
        state_size: number of axes of a state; 0 without blocks.
        whole: whether there is no localization.
        positions: taper with the positions of the observations; None without localization.
    """

    which: Any
    rho: Any
    wide: Any
    points: Int[np.ndarray, "b q"]
    slot: Int[np.ndarray, " p"]
    of_point: Int[np.ndarray, " p"]
    state_size: int
    whole: bool
    positions: PlacedTaper | None

    @staticmethod
    def of(local: LocalAncestors | None, taper: PlacedTaper | None, m: int, dtype: Any) -> _Blocks:
        """Blocks of a localized move, or one block, with tapers of a given type."""
        if local is None or taper is None:
            one = np.ones((1, m), dtype)
            zero = np.zeros(1, np.int32)
            return _Blocks(np.arange(m)[None], one, one, zero[None], zero, zero, 0, True, None)
        of_point = np.asarray(local.block_of_point)
        count = int(of_point.max()) + 1
        order = np.argsort(of_point, kind="stable")
        sizes = np.bincount(of_point, minlength=count)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        slot = np.empty(len(of_point), np.int32)
        slot[order] = np.arange(len(of_point)) - np.repeat(starts, sizes)
        points = np.tile(order[starts][:, None], (1, int(sizes.max())))
        points[of_point, slot] = np.arange(len(of_point))
        which, wide, rho = taper.neighborhoods_with(local.centers, local.taper)
        rho, wide = rho.astype(dtype), wide.astype(dtype)
        return _Blocks(which, rho, wide, points, slot, of_point, len(local.state_shape), False, taper)

    def map(self, fn: Callable[[Array, Near], Any], n: int, values: int, present: Bool[Array, " m"]) -> Any:
        """Map a function over all blocks, on a mesh divided over its devices.

        Args:
            fn: function of the index of a block and the observations near it.
            n: number of particles.
            values: number of values of one particle in a block that the function takes.
            present: False where an observation is missing.
        """
        count = len(self.which)
        if self.whole:
            return jax.tree.map(lambda x: x[None], self.of_whole(fn))
        return whole(self.map_some(lambda _, *args: fn(*args), own(jnp.arange(count)), n, values, present), count)

    def of_whole(self, fn: Callable[[Array, Near], Any]) -> Any:
        """Apply a function as that of `map` to the only block, if there is no localization."""
        only = jnp.zeros((), int)
        return fn(only, self.near(only))

    def map_some(
        self,
        fn: Callable[[Array, Array, Near], Any],
        some: Int[Array, " c"],
        n: int,
        values: int,
        present: Bool[Array, " m"],
    ) -> Any:
        """Map a function over some blocks, in batches that bound the memory.

        With many observations near each block, missing ones are left out, as far as all blocks of a batch allow it. A
        satellite sees a part of its places at a time.

        Args:
            fn: function of the place of a block among these, its index, and the observations near it.
            some: indices of the blocks.
            n: number of particles.
            values: number of values of one particle in a block that the function takes.
            present: False where an observation is missing.
        """
        b, k = len(some), self.which.shape[1]
        batch = LARGEST_BATCH // (n * (4 * k + 4 * values + 8) + 6 * k * k)
        batch = min(max(1, batch), most_at_a_time(k, n), b)
        if k < WORTH_LEAVING_OUT:
            return jax.lax.map(lambda at: fn(at, some[at], self.near(some[at])), jnp.arange(b), batch_size=batch)
        sizes = (k // 10, k // 3, k)

        def with_size(size: int) -> Callable[[Array], Any]:
            if size == k:
                return jax.vmap(lambda at: fn(at, some[at], self.near(some[at])))
            return jax.vmap(lambda at: fn(at, some[at], _leave_out(self.near(some[at]), present, size)))

        def batch_of(at: Array) -> Any:
            most = jnp.max(jnp.sum(_counting(self.near(some[at]), present), axis=1))
            return jax.lax.switch(jnp.searchsorted(jnp.asarray(sizes), most), [with_size(s) for s in sizes], at)

        # The last batch is filled up with the last block.
        batches = jnp.minimum(jnp.arange(-(-b // batch) * batch), b - 1).reshape(-1, batch)
        found = jax.lax.map(batch_of, batches)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:b], found)

    def near(self, block: Array) -> Near:
        """Observations near a block, or near several with a leading axis."""
        return Near(*(jnp.asarray(x)[block] for x in (self.which, self.rho, self.wide)))

    def between(self, which: Array) -> Array | None:
        """Taper between some observations; None without localization."""
        if self.positions is None:
            return None
        return self.positions.between_some(which)


class _Values:
    """Values of some arrays of all particles, by block, or without localization one by one.

    They are the columns of `smc/columns.py`: blocks are divided, or without localization the values of the one block.

    Args:
        blocks: the blocks.
        arrays: arrays of particles; on a mesh of those of this device.
    """

    def __init__(self, blocks: _Blocks, arrays: list[Array]) -> None:
        self._blocks = blocks
        self._n = total_particles(arrays)
        self._like = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays]
        self._arrays = arrays
        places = len(blocks.of_point)
        self._width = 1 if blocks.whole else math.prod(arrays[0].shape[arrays[0].ndim - blocks.state_size :]) // places
        each = [math.prod(x.shape) for x in self._like]
        self._each = each if blocks.whole else [size // places for size in each]
        self._sum = sum(self._each) * (1 if blocks.whole else blocks.points.shape[1])

    def weighed(
        self, weigh: Callable[[Array, Near], tuple[tuple[Array, ...], Terms]], present: Bool[Array, " m"]
    ) -> tuple[tuple[Array, ...], Float[Array, " b"]]:
        """Weigh all blocks, and test how far from Gaussian their values are.

        Args:
            weigh: function (index of a block, observations near it) -> (what it finds there; function from values of
                the block to their terms of D).
            present: False where an observation is missing.

        Returns:
            (what it finds in each block; D of each block), each with a leading axis of blocks.
        """

        def mean(terms: Array, valid: Array) -> Array:
            return jnp.sum(jnp.where(valid, terms, 0.0)) / jnp.maximum(jnp.sum(valid), 1)

        if self._blocks.whole:
            found, of = self._blocks.of_whole(weigh)
            _, terms = map_columns(lambda parts, _: ([], of(parts[0])), [self._joined()])
            return jax.tree.map(lambda x: x[None], (found, mean(*terms)))

        def of_block(values: Array, block: Array, near: Near) -> tuple[tuple[()], Any]:
            found, of = weigh(block, near)
            return (), (found, mean(*of(values)))

        _, found = self._map(of_block, present)
        return cast(tuple[tuple[Array, ...], Array], found)

    def moved(
        self, move: Callable[[Array, Near], tuple[Array, Callable[[Array], Array]]], present: Bool[Array, " m"]
    ) -> tuple[Float[Array, " b"], list[Array]]:
        """Move the values of all blocks.

        Args:
            move: function (index of a block, observations near it) -> (a number; function from values of the block to
                moved ones).
            present: False where an observation is missing.

        Returns:
            (the number of each block; the arrays with moved values).
        """
        blocks = self._blocks
        if blocks.whole:
            used, of = blocks.of_whole(move)
            (found,), _ = map_columns(lambda parts, _: ([of(parts[0])], ()), [self._joined()])
            return used[None], self._split(found)

        def of_block(values: Array, block: Array, near: Near) -> tuple[Array, Array]:
            used, of = move(block, near)
            return of(values), used

        found, used = self._map(of_block, present)
        return used, self._split(found)

    def _map(self, fn: Callable[[Array, Array, Near], tuple[Any, Any]], present: Bool[Array, " m"]) -> tuple[Any, Any]:
        """Map a function over blocks.

        Args:
            fn: function (values of the block, shape (N, values), its index, observations near it) -> (moved values or
                (), what the block has).
            present: False where an observation is missing.

        Returns:
            (moved values, shape (N, b, places, values), or (); what the blocks have, with a leading axis of blocks).
        """
        blocks, n = self._blocks, self._n

        def of_some(values_at: Callable[[Array], Array], some: Array) -> tuple[list[Array], Any]:
            def of_one(at: Array, block: Array, near: Near) -> tuple[Any, Any]:
                return fn(values_at(at).reshape(n, -1), block, near)

            moved, found = blocks.map_some(of_one, some, n, self._sum, present)
            if isinstance(moved, tuple):
                return [], found
            # A block is a column, which has its places one after the other.
            return [jnp.moveaxis(moved, 0, 1).reshape(n, len(some), blocks.points.shape[1], -1)], found

        if are_columns_divided():
            divided = map_particles(lambda x: x[blocks.points])(self._joined())
            moved, found = map_columns(
                lambda parts, some: of_some(lambda at: parts[0][:, at], jnp.asarray(some)), [divided]
            )
        else:  # places that fill up smaller blocks are not copied
            by_point, points = self._joined(), jnp.asarray(blocks.points)
            moved, found = of_some(lambda at: by_point[:, points[at]], jnp.arange(len(points)))
        return (moved[0] if moved else ()), found

    def _joined(self) -> Array:
        """Values of all arrays by place, shape (N, places, values); without localization all in a row, (N, values)."""

        def of_one(*arrays: Array) -> Array:
            if self._blocks.whole:
                return jnp.concatenate([x.reshape(-1) for x in arrays])
            places = len(self._blocks.of_point)
            return jnp.concatenate([by_place(x, places, self._width) for x in arrays], axis=1)

        joined: Array = map_particles(of_one)(*self._arrays)
        return joined

    def _split(self, moved: Array) -> list[Array]:
        """Arrays of all particles, of their joined values by block."""
        blocks, ends = self._blocks, np.cumsum(self._each)[:-1]

        def of_one(values: Array) -> list[Array]:
            if blocks.whole:
                parts = jnp.split(values, ends)
                return [x.reshape(like.shape).astype(like.dtype) for x, like in zip(parts, self._like, strict=True)]
            parts = jnp.split(values[blocks.of_point, blocks.slot], ends, axis=1)
            return [from_places(x, like, self._width) for x, like in zip(parts, self._like, strict=True)]

        found: list[Array] = map_particles(of_one)(moved)
        return found
