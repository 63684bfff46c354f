"""Matrix-free solves of (I + B) v = r, B = W^T-like and meant to be positive semi-definite, with their convergence.

This is the system of moment-matched guidance in whitened observation space: B = s^2 H S J C S H^T. Three things set it
apart from a textbook solve, which is why it is not left to a general library:

- a product costs a pass through the network, and brings J^T S H^T v, of which the answer needs a combination:
  a solver that returns that combination saves a pass (`Solution.image`);
- the system at the next noise level is close to this one: the last answer is a good first direction;
- J comes from a learned network, so B is neither symmetric nor positive. Plain conjugate gradients then diverge. All
  solvers here project on the directions they have seen, symmetrize the small matrix and lift its eigenvalues to at
  least 1, the smallest that I + B can have. For a true covariance nothing changes (the answer is that of conjugate
  gradients); otherwise the answer stays bounded by that of R alone. `Solution.residual` is taken with the *true*,
  unlifted products, so that a inflation is visible.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Product = Callable[[Float[Array, " m"]], tuple[Float[Array, " m"], Float[Array, "..."]]]
"""v -> ((I + B) v, g(v)), with g linear: for guidance g(v) = J^T S H^T v."""


class Directions(NamedTuple):
    """The directions that a solver has seen, orthonormal or zero, and what products made of them.

    Attributes:
        basis: u_i, shape (k, m).
        columns: (I + B) u_i, shape (k, m).
        images: g(u_i), leading axis k.
    """

    basis: Float[Array, "k m"]
    columns: Float[Array, "k m"]
    images: Float[Array, "k ..."]


class Solution(NamedTuple):
    """The answer and how far it can be trusted.

    Attributes:
        answer: v, shape (m,).
        image: g(v), at no further product.
        residual: |r - (I + B) v| / |r| with the unlifted products; 0 where r = 0.
        products: how many products were made.
        directions: what the solver has seen; None where it does not say, and then there are no path weights (`path`).
    """

    answer: Float[Array, " m"]
    image: Float[Array, ...]
    residual: Float[Array, ""]
    products: Int[Array, ""]
    directions: Directions | None = None


class LinearSolver(eqx.Module):
    """Solves (I + B) v = r from products with I + B."""

    @abc.abstractmethod
    def init(self, size: int, dtype: jnp.dtype) -> PyTree:
        """The warm start before the first system of `size` unknowns."""

    @abc.abstractmethod
    def __call__(self, product: Product, rhs: Float[Array, " m"], warm_start: PyTree) -> tuple[Solution, PyTree]:
        """Solve; returns (solution, warm start for the next system)."""

    def diagonal_products(self, size: int) -> int:
        """Products that `diagonal` makes, for `size` rows: one."""
        return min(size, 1)

    def diagonal(self, product: Callable[[Array], Array], size: int, dtype: jnp.dtype) -> Float[Array, " m"]:
        """The diagonal of a positive semi-definite B, known by its products.

        By default the mean of all of it, for every row, from one product with random signs (Hutchinson 1990): for rows
        in units that make them alike.
        """
        signs = jax.random.rademacher(jax.random.key(0), (size,), dtype)
        return jnp.full((size,), jnp.mean(signs * product(signs)))


def projected_solve(projected: Float[Array, "k k"], rhs: Float[Array, " k"]) -> Float[Array, " k"]:
    """Solve the projected system after symmetrizing it and lifting its eigenvalues to at least 1."""
    values, vectors = jnp.linalg.eigh(0.5 * (projected + projected.T))
    return vectors @ ((vectors.T @ rhs) / jnp.maximum(values, 1.0))


def relative_residual(rhs: Float[Array, " m"], image: Float[Array, " m"]) -> Float[Array, ""]:
    """|rhs - image| / |rhs|, 0 for a zero right-hand side (nothing observed)."""
    size = jnp.linalg.norm(rhs)
    return jnp.where(size > 0, jnp.linalg.norm(rhs - image) / jnp.where(size > 0, size, 1.0), 0.0)


class DirectSolve(LinearSolver):
    """Builds I + B by one product for each observation and solves it densely: exact, for small m and for tests."""

    def init(self, size: int, dtype: jnp.dtype) -> PyTree:
        """No warm start."""
        return ()

    def __call__(self, product: Product, rhs: Float[Array, " m"], warm_start: PyTree) -> tuple[Solution, PyTree]:
        """Solve with m products."""
        basis = jnp.eye(len(rhs), dtype=rhs.dtype)
        columns, images = jax.vmap(product)(basis)
        answer = projected_solve(columns.T, rhs)
        solution = Solution(
            answer,
            jnp.tensordot(answer, images, 1),
            relative_residual(rhs, answer @ columns),
            jnp.asarray(len(rhs)),
            Directions(basis, columns, images),
        )
        return solution, warm_start

    def diagonal_products(self, size: int) -> int:
        """One for each row."""
        return size

    def diagonal(self, product: Callable[[Array], Array], size: int, dtype: jnp.dtype) -> Float[Array, " m"]:
        """Every entry."""
        return jnp.diagonal(jax.vmap(product)(jnp.eye(size, dtype=dtype)))


class KrylovSolve(LinearSolver):
    """Galerkin projection on a growing basis: the last answer, then the residuals; a fixed number of products.

    From a zero start this is conjugate gradients (in exact arithmetic, for a symmetric positive system).

    Args:
        products: products, hence network passes, of one solve. Two, with a warm start, already lose little
            (docs/method.md, the ring-64 table).
        warm_start: begin with the answer of the noise level before. It is a direction only: with a single product
            there would be no other, so the residual is taken then.

    Raises:
        ValueError: products < 1.
    """

    products: int = eqx.field(static=True, default=2)
    warm_start: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        if self.products < 1:
            raise ValueError(f"KrylovSolve got products={self.products}; give 1 or more.")

    def init(self, size: int, dtype: jnp.dtype) -> PyTree:
        """The answer of the level before: zero."""
        return jnp.zeros((size,), dtype)

    def __call__(self, product: Product, rhs: Float[Array, " m"], warm_start: PyTree) -> tuple[Solution, PyTree]:
        """Solve with `products` products."""
        m, k = len(rhs), min(self.products, len(rhs))
        image_shape = jax.eval_shape(product, rhs)[1]
        basis = jnp.zeros((k, m), rhs.dtype)
        columns = jnp.zeros((k, m), rhs.dtype)
        images = jnp.zeros((k, *image_shape.shape), image_shape.dtype)
        first = jnp.where(jnp.any(warm_start != 0), warm_start, rhs) if self.warm_start and k > 1 else rhs

        def extend(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            basis, columns, images, coefficients = carry
            direction = jnp.where(i == 0, first, rhs - coefficients @ columns)
            before = jnp.linalg.norm(direction)
            for _ in range(2):  # twice is enough (Kahan): a non-symmetric B leaves a part along the basis
                direction = direction - (basis @ direction) @ basis
            size = jnp.linalg.norm(direction)
            # What is left after convergence is rounding: a zero direction then changes nothing.
            useful = size > 1e-6 * before
            direction = jnp.where(useful, direction / jnp.where(useful, size, 1.0), 0.0)
            column, image = product(direction)
            basis, columns, images = basis.at[i].set(direction), columns.at[i].set(column), images.at[i].set(image)
            # Unused rows of the basis are zero: their eigenvalues are lifted to 1 and meet a zero right-hand side.
            coefficients = projected_solve(basis @ columns.T, basis @ rhs)
            return basis, columns, images, coefficients

        basis, columns, images, coefficients = jax.lax.fori_loop(
            0, k, extend, (basis, columns, images, jnp.zeros((k,), rhs.dtype))
        )
        solution = Solution(
            coefficients @ basis,
            jnp.tensordot(coefficients, images, 1),
            relative_residual(rhs, coefficients @ columns),
            jnp.asarray(k),
            Directions(basis, columns, images),
        )
        return solution, solution.answer


class RowSumSolve(LinearSolver):
    """v = r / max(1, (I + B) 1): takes B for the diagonal matrix of its row sums (Boys et al. 2023, arXiv 2310.06721).

    Two products: that of the ones, and that of the answer, whose image guidance needs. Exact for a diagonal B, that is
    where observations look at independent components. The residual says how far from that B is.
    """

    def init(self, size: int, dtype: jnp.dtype) -> PyTree:
        """No warm start."""
        return ()

    def __call__(self, product: Product, rhs: Float[Array, " m"], warm_start: PyTree) -> tuple[Solution, PyTree]:
        """Divide, with two products."""
        sums, _ = product(jnp.ones_like(rhs))
        answer = rhs / jnp.maximum(sums, 1.0)
        column, image = product(answer)
        return Solution(answer, image, relative_residual(rhs, column), jnp.asarray(2)), warm_start

    def diagonal(self, product: Callable[[Array], Array], size: int, dtype: jnp.dtype) -> Float[Array, " m"]:
        """The row sums, where positive."""
        return jnp.maximum(product(jnp.ones((size,), dtype)), 0.0)
