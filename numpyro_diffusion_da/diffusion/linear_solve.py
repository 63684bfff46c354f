"""Matrix-free solvers of (I + B) v = r, which also report their convergence.

The matrix B is known by its products only, and should be symmetric and positive semi-definite. Moment-matched guidance
has such a system in whitened observation space, with $B = s^2 H S J C S H^T$. The solvers are written here, and not
taken from a general library, for three reasons:

- A product costs a pass through the network, and also returns `J^T S H^T v`. The answer of the guidance is a
  combination of these images. A solver that returns the combination saves a pass (`Solution.image`).
- The system at the next noise level is close to this one, so the last answer is a good first direction.
- J comes from a learned network, so B may be neither symmetric nor positive, and plain conjugate gradients then
  diverge.

To be safe in the last case, `DirectSolve` and `KrylovSolve` project the system on the directions they have seen,
symmetrize the small projected matrix, and do not believe eigenvalues below 1, the smallest that I + B can have: their
directions count less, and those with negative eigenvalues not at all (`projected_solve`). They then shorten an answer
that is farther from solving the system than none, unless it solves it in the directions seen (`shortening`). For a true
covariance neither changes anything: the answer is that of conjugate gradients. Both are needed, because the guidance is
the image of the answer, a product with B itself: a bounded answer would not bound it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from numpyro_diffusion_da.arguments import count, flag, number

Product = Callable[[Float[Array, " m"]], tuple[Float[Array, " m"], Float[Array, "..."]]]
"""Function v -> ((I + B) v, image g(v)) with a linear g; for guidance, g(v) = J^T S H^T v."""


class Directions(NamedTuple):
    """Directions that a solver has seen, orthonormal or zero, and the products with them.

    Attributes:
        basis: directions u_i, shape (k, m).
        columns: products (I + B) u_i, shape (k, m).
        images: images g(u_i), leading axis k.
    """

    basis: Float[Array, "k m"]
    columns: Float[Array, "k m"]
    images: Float[Array, "k ..."]


class Solution(NamedTuple):
    """Answer of a linear solver, with a measure of its error.

    Attributes:
        answer: v, shape (m,).
        image: g(v), obtained without a further product.
        residual: |r - (I + B) v| / |r|, from the products as they are; 0 if r = 0.
        products: number of products made.
        directions: directions that the solver has seen; None if it does not return them. Path weights need them.
    """

    answer: Float[Array, " m"]
    image: Float[Array, ...]
    residual: Float[Array, ""]
    products: Int[Array, ""]
    directions: Directions | None = None


class LinearSolver(eqx.Module):
    """Abstract solver of (I + B) v = r that uses products with I + B only."""

    @abc.abstractmethod
    def init(self, size: int, dtype: jnp.dtype) -> PyTree:
        """Return the warm start before the first system.

        Args:
            size: number of unknowns m.
            dtype: dtype of the unknowns.
        """

    @abc.abstractmethod
    def __call__(self, product: Product, rhs: Float[Array, " m"], warm_start: PyTree) -> tuple[Solution, PyTree]:
        """Solve one system.

        Args:
            product: function v -> ((I + B) v, g(v)).
            rhs: r, shape (m,).
            warm_start: warm start from the system before, or from `init`.

        Returns:
            (the solution, warm start for the next system).
        """

    def diagonal_products(self, size: int) -> int:
        """Return how many products `diagonal` makes for `size` rows; 1 by default."""
        return min(size, 1)

    def diagonal(self, product: Callable[[Array], Array], size: int, dtype: jnp.dtype) -> Float[Array, " m"]:
        """Estimate the diagonal of a positive semi-definite B, shape (m,).

        By default every entry is the mean of the diagonal, estimated from one product with random signs (Hutchinson
        1990). This suits rows in units that make their diagonal entries similar.

        Args:
            product: function v -> B v.
            size: number of rows m.
            dtype: dtype of the rows.
        """
        signs = jax.random.rademacher(jax.random.key(0), (size,), dtype)
        return jnp.full((size,), jnp.mean(signs * product(signs)))


def projected_solve(projected: Float[Array, "k k"], rhs: Float[Array, " k"]) -> Float[Array, " k"]:
    """Solve a projected system after symmetrizing it, without believing eigenvalues below 1.

    Eigenvalues a of 1 and more are inverted. Smaller ones contradict B being a covariance: 1/a becomes a, and 0 for
    negative ones, which continues the inverse at 1 and keeps B's image of the answer below the right-hand side.

    Args:
        projected: projection of I + B on k directions, shape (k, k).
        rhs: projection of r, shape (k,).

    Returns:
        Coefficients of the answer along the directions, shape (k,).
    """
    symmetric = 0.5 * (projected + projected.T)
    if len(rhs) == 1:
        return rhs * _inverse(symmetric[0])
    if len(rhs) == 2:  # the usual case of few products, where LAPACK takes a tenth of a whole step
        return _solve_of_two(symmetric, rhs)
    values, vectors = jnp.linalg.eigh(symmetric)
    return vectors @ ((vectors.T @ rhs) * _inverse(values))


def _inverse(eigenvalues: Float[Array, ...]) -> Float[Array, ...]:
    """Return the inverse of eigenvalues of 1 and more, and of smaller ones what is nearer to zero."""
    return jnp.where(eigenvalues >= 1.0, 1.0 / jnp.maximum(eigenvalues, 1.0), jnp.clip(eigenvalues, 0.0, 1.0))


def _solve_of_two(symmetric: Float[Array, "2 2"], rhs: Float[Array, " 2"]) -> Float[Array, " 2"]:
    """Solve a symmetric system of two unknowns, in closed form.

    With mean c of the eigenvalues and half their difference d, the matrix is c I + d E with E^2 = I. Any function f of
    it is then (f(c + d) + f(c - d)) / 2 I + (f(c + d) - f(c - d)) / 2 E.
    """
    center = 0.5 * (symmetric[0, 0] + symmetric[1, 1])
    half, beside = 0.5 * (symmetric[0, 0] - symmetric[1, 1]), symmetric[0, 1]
    size = jnp.maximum(jnp.abs(half), jnp.abs(beside))
    scale = jnp.where(size > 0, size, 1.0)  # the square of a large number overflows
    norm = jnp.sqrt(jnp.where(size > 0, (half / scale) ** 2 + (beside / scale) ** 2, 1.0))
    flipped = jnp.stack([half * rhs[0] + beside * rhs[1], beside * rhs[0] - half * rhs[1]]) / (scale * norm)
    low, high = _inverse(center - size * norm), _inverse(center + size * norm)
    return 0.5 * (high + low) * rhs + 0.5 * (high - low) * flipped


BELIEVED = 0.05
"""Residual in the directions of a projection, relative to |r|, up to which it is rounding: B is a covariance there."""


def shortening(
    rhs: Float[Array, " m"], product: Float[Array, " m"], basis: Float[Array, "k m"] | None = None
) -> Float[Array, ""]:
    """Return the factor of an answer v with which (I + B) v is no farther from r than nothing is.

    It is 1 for an answer that solves the system better than v = 0. Otherwise it is the factor, of 0 to 1, with which
    the residual is smallest. It is also 1 where the answer solves the system in the directions of the basis: after few
    products with a true covariance the residual may be large outside them, and the answer is the best all the same.

    Args:
        rhs: r, shape (m,).
        product: (I + B) v, shape (m,).
        basis: orthonormal or zero directions in which v was found; None for all.
    """
    # In units of the largest element, because the square of a large number overflows.
    unit = jnp.maximum(jnp.max(jnp.abs(rhs), initial=0.0), jnp.max(jnp.abs(product), initial=0.0))
    rhs, product = rhs / jnp.where(unit > 0, unit, 1.0), product / jnp.where(unit > 0, unit, 1.0)
    along, size = jnp.vdot(rhs, product), jnp.vdot(product, product)
    is_farther = size > 2.0 * along
    if basis is not None:
        is_farther &= jnp.linalg.norm(basis @ (rhs - product)) > BELIEVED * jnp.linalg.norm(rhs)
    return jnp.where(is_farther, jnp.clip(along / jnp.where(is_farther, size, 1.0), 0.0, 1.0), 1.0)


def relative_residual(rhs: Float[Array, " m"], image: Float[Array, " m"]) -> Float[Array, ""]:
    """Return |rhs - image| / |rhs|, and 0 for a zero right-hand side (nothing observed)."""
    size = jnp.linalg.norm(rhs)
    return jnp.where(size > 0, jnp.linalg.norm(rhs - image) / jnp.where(size > 0, size, 1.0), 0.0)


class DirectSolve(LinearSolver):
    """Dense solver that makes one product for each observation: exact, for few observations and for tests.

    It symmetrizes I + B and does not believe eigenvalues below 1, which changes nothing for a true covariance.
    """

    def init(self, size: int, dtype: jnp.dtype) -> PyTree:
        """Return an empty warm start, because a direct solve needs none."""
        return ()

    def __call__(self, product: Product, rhs: Float[Array, " m"], warm_start: PyTree) -> tuple[Solution, PyTree]:
        """Solve one system with m products, and return the solution with the unchanged warm start."""
        basis = jnp.eye(len(rhs), dtype=rhs.dtype)
        columns, images = jax.vmap(product)(basis)
        answer = projected_solve(columns.T, rhs)
        answer = shortening(rhs, answer @ columns) * answer
        solution = Solution(
            answer,
            jnp.tensordot(answer, images, 1),
            relative_residual(rhs, answer @ columns),
            jnp.asarray(len(rhs)),
            Directions(basis, columns, images),
        )
        return solution, warm_start

    def diagonal_products(self, size: int) -> int:
        """Return `size`: one product for each row."""
        return size

    def diagonal(self, product: Callable[[Array], Array], size: int, dtype: jnp.dtype) -> Float[Array, " m"]:
        """Return the exact diagonal of B, shape (m,), from one product for each row."""
        return jnp.diagonal(jax.vmap(product)(jnp.eye(size, dtype=dtype)))


class KrylovSolve(LinearSolver):
    r"""Galerkin solver on a basis of the last answer and then the residuals, stopped by the residual.

    From a zero start, and for a symmetric positive definite I + B, this is the method of conjugate gradients (in exact
    arithmetic).

    By default it makes as many products as the system needs: it stops if the root mean square of the residual outside
    the basis is at most `tolerance`, or 1e-5 of that of r, and never makes more products than there are unknowns. The
    residual is in units of the observation errors, so a far observation is solved as accurately as a near one. The part
    of the residual inside the basis is not counted, because for a non-symmetric B no further product removes it. The
    reported residual is then relative to |r| or, if that is larger, to the observation errors: a residual that is small
    against these needs no solve. Elements of r that are exactly 0 (missing observations) do not count.

    Under `jax.vmap` the solver makes products until every element of the batch has converged. An element that has
    converged keeps its answer, so a draw does not depend on its batch. `Solution.products` is the number made for the
    batch, which is what ran.

    `KrylovSolve(products=2)` makes two products at every level. With a warm start this loses little where observations
    are few, or weak (docs/method.md, the ring-64 table).

    Args:
        products: number of products per solve, hence of network passes; None for as many as the system needs.
        warm_start: whether the first direction is the answer at the noise level before. It is a direction only. A solve
            with `products=1` starts from the residual instead, because it has no other direction.
        tolerance: root mean square of the residual at which to stop, in units of the observation errors; for
            `products=None` only.
        max_products: largest number of products per solve for `products=None`; memory for as many latents is kept.

    Raises:
        ValueError: `products` or `max_products` is less than 1, or `tolerance` is not positive.
    """

    products: int | None = eqx.field(
        static=True, default=None, converter=count("KrylovSolve", "products", optional=True)
    )
    warm_start: bool = eqx.field(static=True, default=True, converter=flag("KrylovSolve", "warm_start"))
    tolerance: float = eqx.field(
        static=True, default=0.03, converter=number("KrylovSolve", "tolerance", "give a positive number.", above=0)
    )
    max_products: int = eqx.field(static=True, default=32, converter=count("KrylovSolve", "max_products"))

    def init(self, size: int, dtype: jnp.dtype) -> PyTree:
        """Return the first warm start: zeros in place of an answer at the noise level before."""
        return jnp.zeros((size,), dtype)

    def __call__(self, product: Product, rhs: Float[Array, " m"], warm_start: PyTree) -> tuple[Solution, PyTree]:
        """Solve one system, and return the solution with its answer as the next warm start."""
        m, k = len(rhs), min(self.max_products if self.products is None else self.products, len(rhs))
        # Arrays for the k directions and their products, filled row by row.
        image_shape = jax.eval_shape(product, rhs)[1]
        first = jnp.where(jnp.any(warm_start != 0), warm_start, rhs) if self.warm_start and k > 1 else rhs
        start = _Basis(
            jnp.asarray(0),
            jnp.zeros((k, m), rhs.dtype),
            jnp.zeros((k, m), rhs.dtype),
            jnp.zeros((k, *image_shape.shape), image_shape.dtype),
            jnp.zeros((k,), rhs.dtype),
            first,
            jnp.linalg.norm(rhs),
        )

        def extend(at: _Basis) -> _Basis:
            before = jnp.linalg.norm(at.direction)
            direction = _orthogonalized(at.direction, at.basis)
            size = jnp.linalg.norm(direction)
            # After convergence only rounding errors are left. A zero direction then leaves the answer unchanged.
            useful = size > 1e-6 * before
            direction = jnp.where(useful, direction / jnp.where(useful, size, 1.0), 0.0)
            # The one product of this iteration, which costs a network pass.
            column, image = product(direction)
            basis, columns = at.basis.at[at.made].set(direction), at.columns.at[at.made].set(column)
            # Solve on the basis. Rows not yet used are zero, and get the coefficient 0.
            coefficients = projected_solve(basis @ columns.T, basis @ rhs)
            # The next direction is the residual of the answer so far.
            residual = rhs - coefficients @ columns
            outside = jnp.linalg.norm(_orthogonalized(residual, basis))
            images = at.images.at[at.made].set(image)
            return _Basis(at.made + 1, basis, columns, images, coefficients, residual, outside)

        errors = jnp.sqrt(jnp.sum(rhs != 0).astype(rhs.dtype))
        if self.products is None:
            enough = jnp.maximum(self.tolerance * errors, 1e-5 * jnp.linalg.norm(rhs))
            # Under `vmap` the loop runs until all particles have converged, and leaves those that have as they are.
            end = jax.lax.while_loop(lambda at: (at.made < k) & (at.outside > enough), extend, start)
        else:
            end = jax.lax.fori_loop(0, k, lambda _, at: extend(at), start)
        # The image and the residual of the answer are combinations of products already made.
        factor = shortening(rhs, end.coefficients @ end.columns, end.basis)
        end = end._replace(coefficients=factor * end.coefficients)
        residual = relative_residual(rhs, end.coefficients @ end.columns)
        if self.products is None:
            size = jnp.linalg.norm(rhs)
            residual = residual * size / jnp.maximum(jnp.maximum(size, errors), 1.0)
        solution = Solution(
            end.coefficients @ end.basis,
            jnp.tensordot(end.coefficients, end.images, 1),
            residual,
            _largest_of_batch(end.made),
            Directions(end.basis, end.columns, end.images),
        )
        return solution, solution.answer


class _Basis(NamedTuple):
    """State of `KrylovSolve`: the directions so far and the answer on them.

    Attributes:
        made: number of directions, and so of products.
        basis: orthonormal directions, zero where not yet used, shape (k, m).
        columns: products with the directions, shape (k, m).
        images: images of the directions, leading axis k.
        coefficients: answer along the directions, shape (k,).
        direction: next direction, not yet orthogonal to the basis, shape (m,).
        outside: norm of the residual outside the basis.
    """

    made: Int[Array, ""]
    basis: Float[Array, "k m"]
    columns: Float[Array, "k m"]
    images: Float[Array, "k ..."]
    coefficients: Float[Array, " k"]
    direction: Float[Array, " m"]
    outside: Float[Array, ""]


@jax.custom_batching.custom_vmap
def _largest_of_batch(count: Int[Array, ""]) -> Int[Array, ""]:
    """Return the largest of the counts of a batch, for each element of the batch; the count itself without a batch."""
    return count


@_largest_of_batch.def_vmap
def _largest_over_axis(axis_size: int, in_batched: list[bool], count: Array) -> tuple[Array, bool]:
    """Reduce one batch axis of `_largest_of_batch`."""
    return _largest_of_batch(jnp.max(count, axis=0) if in_batched[0] else count), False


def _orthogonalized(direction: Float[Array, " m"], basis: Float[Array, "k m"]) -> Float[Array, " m"]:
    """Return the part of a direction that is orthogonal to the basis.

    Once is not enough for a non-symmetric B; twice is (Kahan).
    """
    for _ in range(2):
        direction = direction - (basis @ direction) @ basis
    return direction


class RowSumSolve(LinearSolver):
    """Solver that replaces B by the diagonal matrix of its row sums (Boys et al. 2023, arXiv 2310.06721).

    The answer is `v = r / max(1, (I + B) 1)`, elementwise, with 1 the vector of ones. It takes two products: one with
    the ones, and one with the answer, whose image the guidance needs. The answer is exact for a diagonal B, which is
    the case if the observations depend on independent components. The residual shows how far B is from diagonal.
    """

    def init(self, size: int, dtype: jnp.dtype) -> PyTree:
        """Return an empty warm start, because dividing by row sums needs none."""
        return ()

    def __call__(self, product: Product, rhs: Float[Array, " m"], warm_start: PyTree) -> tuple[Solution, PyTree]:
        """Divide by the row sums, with two products, and return the solution with the unchanged warm start."""
        sums, _ = product(jnp.ones_like(rhs))
        answer = rhs / jnp.maximum(sums, 1.0)
        column, image = product(answer)
        return Solution(answer, image, relative_residual(rhs, column), jnp.asarray(2)), warm_start

    def diagonal(self, product: Callable[[Array], Array], size: int, dtype: jnp.dtype) -> Float[Array, " m"]:
        """Return the row sums of B, shape (m,), with 0 in place of negative ones; one product."""
        return jnp.maximum(product(jnp.ones((size,), dtype)), 0.0)
