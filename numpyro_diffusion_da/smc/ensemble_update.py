r"""Analysis updates of the ensemble Kalman filter: increments of the members from a forecast and its residuals.

Residuals are whitened, so that $R = I$. Let $X$, of shape (N, d), be the anomalies of the members, and $Y$, of shape
(N, m), the anomalies of the observations that they predict. The covariances of the ensemble are $X^T Y / (N - 1)$ and
$Y^T Y / (N - 1)$, and the Kalman gain is

$$K = X^T Y \, (Y^T Y + (N - 1) I)^{-1}.$$

An update returns the increment of each member. A taper $\rho$ enters each update in its own way. The columns of $X$ are
updated apart from each other, given $Y$. So they may be divided (`smc/columns.py`): on a mesh each device updates a
part of the state, of all members, and particles in files are read by columns.

With many observations, no array of all pairs of them is made: the system is then solved by conjugate gradients, and its
rows hold near observations only.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_diffusion_da.smc.base import particle_keys
from numpyro_diffusion_da.smc.columns import Index, at_columns
from numpyro_diffusion_da.smc.correlations import Correlation
from numpyro_diffusion_da.smc.factorizations import most_at_a_time
from numpyro_diffusion_da.smc.localization import PlacedTaper
from numpyro_diffusion_da.smc.probing import Products, pool

PointUpdate = Callable[[Float[Array, "n c"], Float[Array, "n k"], Float[Array, " k"], Int[Array, " k"]], Array]
"""Update of one point of the state from the observations near it.

(anomalies at the point, predicted anomalies of these observations, their taper, their indices) -> increments, (n, c).
"""

LARGEST_BLOCK = 2**24
"""Largest number of values held at a time while several points of the state are updated in parallel: 64 MB."""

MOST_DENSE = 2048
"""Number of observations up to which a system of equations for all of them is solved directly: a matrix of 16 MB."""

TOLERANCE = 1e-6
"""Relative residual at which conjugate gradients stop."""

MOST_ITERATIONS = 500
"""Largest number of iterations of conjugate gradients."""

LARGEST_GATHER = 2**22
"""Largest number of values held at a time in a product with sparse rows: 16 MB."""


ColumnUpdate = Callable[[Float[Array, "n d"], Index | None], Float[Array, "n d"]]
"""Increments of some columns: (anomalies of the members there, flattened; their places, None for all) -> increments."""


class EnsembleUpdate(eqx.Module):
    """Update that turns the members of a forecast into those of the analysis."""

    @abc.abstractmethod
    def __call__(
        self,
        rng_key: PRNGKeyArray,
        anomalies: Float[Array, "n d"],
        residual: Float[Array, "n m"],
        taper: PlacedTaper | None = None,
    ) -> Float[Array, "n d"]:
        """Compute the increment of each member.

        Args:
            rng_key: random key of the step.
            anomalies: members minus their mean, flattened; where columns are divided a part of the state.
            residual: whitened residual R^{-1/2} (y - h(x)) of each member, zero where missing.
            taper: localization at the positions of these values; None for no localization.
        """

    def prepared(
        self, rng_key: PRNGKeyArray, residual: Float[Array, "n m"], taper: PlacedTaper | None = None
    ) -> tuple[ColumnUpdate, Float[Array, ""]]:
        """Compute what all columns share, and how exact it is.

        An update overrides this if some of its work is the same for all columns, such as a linear solve; by default
        there is none.

        Args:
            rng_key: random key of the step.
            residual: whitened residual R^{-1/2} (y - h(x)) of each member, zero where missing.
            taper: localization at the positions of all values of the state; None for no localization.

        Returns:
            (function from anomalies of some columns and the indices of their places to their increments, relative
            residual of the linear solve; 0 if it is solved directly).
        """

        def increments(anomalies: Array, index: Index | None) -> Array:
            here = taper if taper is None or index is None else taper.at_places(index)
            return self(rng_key, anomalies, residual, here)

        return increments, jnp.zeros(())

    def check_correlation(self, correlation: Correlation) -> None:
        """Check that the update can use a taper with this correlation function; any is right by default.

        Raises:
            ValueError: the update needs another correlation function.
        """


class _Prepared(EnsembleUpdate):
    """Update that is defined by what it prepares."""

    def __call__(
        self,
        rng_key: PRNGKeyArray,
        anomalies: Float[Array, "n d"],
        residual: Float[Array, "n m"],
        taper: PlacedTaper | None = None,
    ) -> Float[Array, "n d"]:
        """Increments of the members; `EnsembleUpdate.__call__` explains the arguments."""
        return self.prepared(rng_key, residual, taper)[0](anomalies, None if taper is None else taper.part)

    @abc.abstractmethod
    def prepared(
        self, rng_key: PRNGKeyArray, residual: Float[Array, "n m"], taper: PlacedTaper | None = None
    ) -> tuple[ColumnUpdate, Float[Array, ""]]:
        """Compute what all columns share; see `EnsembleUpdate.prepared`."""


def kalman_coefficients(predicted: Float[Array, "n m"], right: Float[Array, "m c"]) -> Float[Array, "n c"]:
    r"""Compute $Y (Y^T Y + (N - 1) I)^{-1} r$ for columns r, in the smaller of the two spaces.

    For innovations r these are the coefficients of the members' anomalies in their increments, without a taper.

    Args:
        predicted: anomalies Y of the predicted observations, in units of their errors.
        right: the columns r.
    """
    n, m = predicted.shape
    if m <= n:
        return predicted @ _solved(predicted.T @ predicted, right, n)
    return _solved(predicted @ predicted.T, predicted @ right, n)


def kalman_increments(
    predicted: Float[Array, "n m"], right: Float[Array, "m c"]
) -> Callable[[Float[Array, "n d"]], Float[Array, "c d"]]:
    """Function from anomalies X of the members to increments: `kalman_coefficients` transposed, times X.

    With fewer observations than members it makes no array of all pairs of members.

    Args:
        predicted: anomalies of the predicted observations, in units of their errors.
        right: innovations as columns, one for each increment.
    """
    n, m = predicted.shape
    if m <= n:
        solved = _solved(predicted.T @ predicted, right, n)
        return lambda anomalies: solved.T @ (predicted.T @ anomalies)
    coefficients = kalman_coefficients(predicted, right)
    return lambda anomalies: coefficients.T @ anomalies


def _solved(gram: Float[Array, "k k"], right: Float[Array, "k c"], n: int) -> Float[Array, "k c"]:
    """Solve (G + (n - 1) I) z = r for columns r, with a gram matrix G."""
    # With observations much more accurate than the ensemble, rounding of the gram matrix exceeds N - 1, and it is not
    # positive definite any more. So the diagonal is at least this rounding.
    least = n - 1 + jnp.finfo(gram.dtype).eps * jnp.trace(gram)
    factor = jax.lax.linalg.cholesky(gram + least * jnp.eye(len(gram), dtype=gram.dtype), symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((factor, True), right)


class PerturbedObservations(_Prepared):
    r"""Stochastic update (Burgers, van Leeuwen & Evensen 1998): each member gets its own perturbed observations.

    The perturbations are centered, so that the update of the mean is exactly that of the Kalman gain. A taper
    multiplies the covariances (Houtekamer & Mitchell 2001):

    $$K = (\rho \circ X^T Y) \, (\rho \circ Y^T Y + (N - 1) I)^{-1}.$$

    With a taper the update solves a system of m equations, for m observations; without one, of the smaller of m and N.
    Above `MOST_DENSE` observations, with a taper, it is solved by conjugate gradients, and no matrix of m x m is made.
    """

    def check_correlation(self, correlation: Correlation) -> None:
        """Check that the correlation function is positive definite: tapered covariances must be covariances.

        Raises:
            ValueError: the correlation function is not positive definite.
        """
        if not correlation.is_positive_definite:
            raise ValueError(
                f"PerturbedObservations got a taper with correlation={correlation}, which is not positive "
                "definite, so that tapered covariances would not be covariances; give "
                "correlation=ndda.smc.GaspariCohn(), or update=ndda.smc.SquareRoot()."
            )

    def prepared(
        self, rng_key: PRNGKeyArray, residual: Float[Array, "n m"], taper: PlacedTaper | None = None
    ) -> tuple[ColumnUpdate, Float[Array, ""]]:
        """Solve for the residuals r_i + e_i with centered perturbations e_i, to which K is applied column by column.

        Raises:
            ValueError: the correlation of the taper is not positive definite.
        """
        if taper is not None:
            self.check_correlation(taper.correlation)
        n, m = residual.shape
        innovation = _perturbed(rng_key, residual)
        predicted = residual.mean(0, keepdims=True) - residual
        if taper is None:
            increments = kalman_increments(predicted, innovation.T)
            return lambda anomalies, _: increments(anomalies), jnp.zeros(())
        if m > MOST_DENSE:
            solved, error = _solved_sparse(predicted, predicted, n - 1.0, innovation.T, taper)
        else:
            covariance = taper.between_observations().astype(residual.dtype) * (predicted.T @ predicted)
            solved = jnp.linalg.solve(covariance + (n - 1) * jnp.eye(m), innovation.T)
            error = jnp.zeros(())

        def at_point(x: Array, nearby: Array, weights: Array, which: Array) -> Array:
            return solved[which].T @ (weights[:, None] * (nearby.T @ x))

        return _at_each_point(at_point, predicted, taper), error


class SquareRoot(_Prepared):
    r"""Deterministic update by the symmetric square root: the ETKF, or with a taper the LETKF.

    Mean and covariance become exactly those of a Kalman update with the ensemble's covariances (Bishop, Etherton &
    Majumdar 2001). The anomalies are multiplied by the symmetric root (Hunt, Kostelich & Szunyogh 2007, eq. 24)

    $$T = (I + Y Y^T / (N - 1))^{-1/2},$$

    which keeps their mean and moves the members least.

    With a taper (Hunt et al. 2007), each point of the state is updated on its own from the observations near it, whose
    error variances are divided by $\rho$. This solves one system for each point. Its size is the number of observations
    near the point or N, whichever is smaller.
    """

    def prepared(
        self, rng_key: PRNGKeyArray, residual: Float[Array, "n m"], taper: PlacedTaper | None = None
    ) -> tuple[ColumnUpdate, Float[Array, ""]]:
        """Decompose Y for the update of the mean, and (T - I) X. The random key is not used."""
        innovation = residual.mean(0)
        predicted = innovation[None] - residual
        if taper is None:
            increments = _square_root_increments(predicted, innovation)
            return lambda anomalies, _: increments(anomalies), jnp.zeros(())

        def at_point(x: Array, nearby: Array, weights: Array, which: Array) -> Array:
            root = jnp.sqrt(weights)
            return _square_root_increments(nearby * root[None], innovation[which] * root)(x)

        return _at_each_point(at_point, predicted, taper, factorizes=True), jnp.zeros(())


class TransitionSpread(NamedTuple):
    """Mean and covariance V of the transition from one particle, as an ensemble Kalman filter uses them.

    Attributes:
        mean: E[x' | c], shape of the state.
        residual: whitened residual R^{-1/2} (y - h(E[x' | c])), shape (m,); zero where missing.
        vectors: unit vectors, one for each observation, or those of `class_vectors`, v, shape (q, m).
        state_products: V H^T v, shape (q, *state).
        products: H V H^T v, shape (q, m).
    """

    mean: Float[Array, ...]
    residual: Float[Array, " m"]
    vectors: Float[Array, "q m"]
    state_products: Float[Array, "q ..."]
    products: Float[Array, "q m"]

    @property
    def is_exact(self) -> bool:
        """Whether the v are unit vectors, one for each observation."""
        return self.vectors.shape[-2] == self.vectors.shape[-1] > 1


SpreadUpdate = Callable[[Float[Array, "n d"], Float[Array, "r d"], Index | None], Float[Array, "n d"]]
"""Increments of some columns: (anomalies of the means there, products with V there, indices of the places)."""


def with_transition_spread(
    rng_key: PRNGKeyArray,
    residual: Float[Array, "n m"],
    spread: TransitionSpread,
    taper: PlacedTaper | None = None,
) -> tuple[SpreadUpdate, Float[Array, ""]]:
    r"""Prepare a stochastic update whose covariances are those of the means plus the transition's own.

    Let A and Y be the anomalies of the means $m_i = E[x' | c_i]$ and of $h(m_i)$, and V the mean covariance of the
    transition over the members. The gain is

    $$K = (\rho \circ A^T Y / (N - 1) + V H^T) \, (\rho \circ Y^T Y / (N - 1) + H V H^T + I)^{-1}.$$

    Only the covariance of the means is sampled. V that is pooled from products with the vectors of classes is mixed
    with that of distant observations, so the taper damps it too.

    Args:
        rng_key: random key of the perturbations.
        residual: whitened residual of each member, zero where missing.
        spread: spread of each member, leading axis N; its means and its products with V of the state are not used.
        taper: localization at the positions of all values of the state; None for none.

    Returns:
        (function from anomalies A of some columns, V H^T v of each member there, flattened with a leading axis of N q,
        and the indices of their places to the increments; relative residual of the linear solve). What V adds is zero
        for arrays that move along. Up to `MOST_DENSE` observations the solve is direct, and its residual is 0.
    """
    n, m = residual.shape
    innovation = _perturbed(rng_key, residual)
    predicted = spread.residual.mean(0, keepdims=True) - spread.residual
    made = pool(Products(spread.vectors, spread.products, jnp.ones((n, m))), jnp.ones(n, bool))
    error = jnp.zeros(())
    if m > MOST_DENSE:
        # Rows of two arrays whose products are the covariance, as its symmetric part.
        left = jnp.concatenate([predicted / (n - 1), 0.5 * made.left, 0.5 * made.right])
        right = jnp.concatenate([predicted, made.right, made.left])
        solved, error = _solved_sparse(left, right, 1.0, innovation.T, taper)
    else:
        between = made.left.T @ made.right
        between = 0.5 * (between + between.T)
        sampled = predicted.T @ predicted / (n - 1)
        if taper is not None:
            rho = jnp.asarray(taper.between_observations(), residual.dtype)
            sampled = rho * sampled
            between = between if spread.is_exact else rho * between
        solved = jnp.linalg.solve(sampled + between + jnp.eye(m), innovation.T)
    if taper is None:
        if m <= n:  # no array of all pairs of members

            def increments(means: Array, state: Array, index: Index | None) -> Array:
                return ((means.T @ predicted / (n - 1) + state.T @ made.right) @ solved).T

            return increments, error
        of_means, of_products = predicted @ solved / (n - 1), made.right @ solved
        return lambda means, state, _: (means.T @ of_means + state.T @ of_products).T, error

    def at_point(x: Array, nearby: Array, weights: Array, which: Array) -> Array:
        sampled, own = x[:n].T @ nearby / (n - 1), x[n:].T @ made.right[:, which]
        # A neighborhood is filled up with observations of weight 0.
        damped = (weights > 0.0).astype(x.dtype) if spread.is_exact else weights
        return ((weights[None] * sampled + damped[None] * own) @ solved[which]).T

    update = _at_each_point(at_point, predicted, taper)
    return lambda means, state, index: update(jnp.concatenate([means, state]), index), error


def _solved_sparse(
    left: Float[Array, "r m"],
    right: Float[Array, "r m"],
    diagonal: float,
    wanted: Float[Array, "m c"],
    taper: PlacedTaper | None,
) -> tuple[Float[Array, "m c"], Float[Array, ""]]:
    r"""Solve $(\rho \circ A^T B + \lambda I) z = b$ by conjugate gradients, without an array of all pairs.

    Args:
        left: array A; A^T B is symmetric.
        right: array B.
        diagonal: the number lambda.
        wanted: the columns b.
        taper: localization, whose correlation between observations is rho; None for none.

    Returns:
        (the columns z, |b - (...) z| / |b| over all columns; 0 if b is zero).
    """

    def in_batches(fn: Callable[[tuple[Array, ...]], Array], inputs: tuple[Array, ...], width: int) -> Array:
        batch = min(max(1, LARGEST_GATHER // width), len(inputs[0]))
        found: Array = jax.lax.map(fn, inputs, batch_size=batch)
        return found

    of_rows, of_columns = left.T, right.T
    if taper is None:

        def times(z: Array) -> Array:
            return of_rows @ (right @ z) + diagonal * z
    else:
        which, rho = (jnp.asarray(x) for x in taper.near_observations())
        k = which.shape[1]
        entries = in_batches(
            lambda row: row[0] * (of_columns[row[1]] @ row[2]), (rho.astype(left.dtype), which, of_rows), k * len(left)
        )

        def times(z: Array) -> Array:
            sums = in_batches(lambda row: row[0] @ z[row[1]], (entries, which), k * z.shape[1])
            return sums + diagonal * z

    # The correlation of an observation with itself is 1.
    own = diagonal + jnp.maximum(jnp.sum(left * right, axis=0), 0.0)[:, None]
    solved, _ = jax.scipy.sparse.linalg.cg(times, wanted, tol=TOLERANCE, maxiter=MOST_ITERATIONS, M=lambda z: z / own)
    size = jnp.linalg.norm(wanted)
    off = jnp.linalg.norm(wanted - times(solved))
    return solved, jnp.where(size > 0.0, off / jnp.where(size > 0.0, size, 1.0), 0.0)


def _perturbed(rng_key: PRNGKeyArray, residual: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Residuals with perturbations of the observations, centered over the members; zero where missing."""
    n, m = residual.shape
    observed = jnp.any(residual != 0.0, axis=0)  # a missing value has a zero residual in every member
    errors = jax.vmap(lambda key: jax.random.normal(key, (m,), residual.dtype))(particle_keys(rng_key, n))
    errors = errors - errors.mean(0, keepdims=True)
    return jnp.where(observed[None], residual + errors, 0.0)


def _square_root_increments(
    predicted: Float[Array, "n m"], innovation: Float[Array, " m"]
) -> Callable[[Float[Array, "n d"]], Float[Array, "n d"]]:
    """Increments of the square root update: the mean's by the Kalman gain, and (T - I) X.

    They are computed from the eigenvalues l of Y Y^T / (N - 1) or Y^T Y / (N - 1), whichever is smaller. T - I has the
    eigenvalues (1 + l)^{-1/2} - 1 = -l / (1 + l + (1 + l)^{1/2}). The second form loses no digits at small l and does
    not divide by l.

    Args:
        predicted: anomalies Y of the predicted observations.
        innovation: whitened residual of the mean.

    Returns:
        Function from anomalies X of the members to their increments.
    """
    n, m = predicted.shape
    root = (n - 1) ** 0.5
    scaled = predicted / root
    if m <= n:
        values, vectors = jnp.linalg.eigh(scaled.T @ scaled)
        values = jnp.maximum(values, 0.0)
        left = scaled @ vectors
        mean = (innovation @ vectors) / (1.0 + values)
        moved = root * left / (1.0 + values + jnp.sqrt(1.0 + values))[None]
        return lambda anomalies: (mean[None] - moved) @ (left.T @ anomalies / root)
    values, vectors = jnp.linalg.eigh(scaled @ scaled.T)
    values = jnp.maximum(values, 0.0)
    mean = (innovation @ scaled.T @ vectors) / (root * (1.0 + values))
    moved = vectors * (values / (1.0 + values + jnp.sqrt(1.0 + values)))[None]
    return lambda anomalies: (mean[None] - moved) @ (vectors.T @ anomalies)


def _at_each_point(
    update: PointUpdate, predicted: Float[Array, "n m"], taper: PlacedTaper, factorizes: bool = False
) -> ColumnUpdate:
    """Update of each point of the state from the observations near it, in batches that bound the memory.

    Args:
        update: update of one point.
        predicted: anomalies of the predicted observations.
        taper: localization at the positions of all points.
        factorizes: whether the update of a point factorizes a matrix.

    Returns:
        Function of anomalies of the n members at some points, flattened, and the indices of these points. It may take
        further rows if the update does.
    """
    near = taper.neighborhoods()

    def increments(anomalies: Array, index: Index | None) -> Array:
        which, weights = (at_columns(x, index) for x in near)
        (points, k), n = which.shape, len(anomalies)
        x = jnp.moveaxis(anomalies.reshape(n, points, -1), 1, 0)

        def at_point(inputs: tuple[Array, Array, Array]) -> Array:
            x, which, weights = inputs
            return update(x, predicted[:, which], weights, which)

        batch = LARGEST_BLOCK // (n * (2 * k + x.shape[2]) + min(n, k) ** 2)
        batch = min(batch, most_at_a_time(min(n, k), max(n, k))) if factorizes else batch
        inputs = (x, jnp.asarray(which), jnp.asarray(weights, anomalies.dtype))
        moved = jax.lax.map(at_point, inputs, batch_size=min(max(batch, 1), points))
        return jnp.moveaxis(moved, 0, 1).reshape(len(predicted), -1)

    return increments
