r"""Probing: a covariance between many observations from few products with it, shared by an ensemble.

A transition gives products $V v$ with its covariance, and a network pass or two buys one of them. The ensemble needs
$H V H^T$ between observations that are near each other, averaged over the members, and V varies little from member to
member. So each member makes a few products, with vectors of its own, and the ensemble pools them.

The vectors are those of classes of observations, with random signs. The product $H V H^T v$ with the vector of a class
is the sum of the columns of its members. These are as far apart as possible, so that a taper separates them again
(probing; Tang & Saad 2012, Numer. Linear Algebra Appl. 19, 485). Vectors that have random signs everywhere would mix
each column with all the others.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from numpyro_diffusion_da.smc.localization import PlacedTaper

LEAST_POOLED, MOST_POOLED = 64, 256
"""Fewest and most products that an ensemble makes, where it has no more members than that. In between they are half as
many as there are observations near a place: members of a class are then further apart than the taper reaches."""


class Products(NamedTuple):
    """Products with the covariance of the observations around the prediction of one member.

    Attributes:
        vectors: the vectors v, shape (q, m).
        products: H V H^T v, shape (q, m).
        slopes: factor of each observation by which both sides of H V H^T are to be multiplied, shape (m,).
    """

    vectors: Float[Array, "q m"]
    products: Float[Array, "q m"]
    slopes: Float[Array, " m"]


def class_vectors(rng_key: PRNGKeyArray, n: int, m: int, taper: PlacedTaper | None) -> Float[Array, "n q m"]:
    """Vectors of all members that together find a covariance between near observations with little noise.

    Args:
        rng_key: random key of the signs.
        n: number of members N.
        m: number of observations.
        taper: positions of the observations; None for none.

    Returns:
        The q vectors of each member. q is at least one, and all together are as many as `LEAST_POOLED` and
        `MOST_POOLED` say, or one for each observation if that is less.
    """
    near = m if taper is None else taper.width()
    wanted = min(m, max(LEAST_POOLED, min(near // 2, MOST_POOLED)))
    each = -(-wanted // n)
    repeats = max(1, n * each // m)
    count = min(n * each // repeats, m)
    classes = np.arange(m) % count if taper is None else taper.classes(count)
    number = np.arange(n * each)
    of_vector = np.where(number < count * repeats, number % count, -1)
    signs = jax.random.rademacher(rng_key, (m,), float)
    vectors = jnp.where(of_vector[:, None] == classes[None], signs[None], 0.0)
    return vectors.reshape(n, each, m)


class Pooled(NamedTuple):
    """Mean over the members of the covariance H V H^T, as a product of two narrow arrays.

    Attributes:
        left: array a, shape (N q, m).
        right: array b, shape (N q, m); the covariance is a^T b, where columns are not mixed.
        mixed: whether some vectors contain several observations.
    """

    left: Float[Array, "r m"]
    right: Float[Array, "r m"]
    mixed: Bool[Array, ""]


def pool(made: Products, usable: Bool[Array, " n"]) -> Pooled:
    """Pool the products of the members; those of an observation that no usable member has in a vector are 0.

    Args:
        made: products of each member, leading axis N.
        usable: members to use.
    """
    m = made.slopes.shape[1]
    slopes = jnp.where(jnp.isfinite(made.slopes), made.slopes, 0.0)[:, None]
    fine = usable[:, None, None] & jnp.all(jnp.isfinite(made.products), axis=2, keepdims=True)
    vectors = jnp.where(fine, made.vectors, 0.0)
    counts = jnp.sum(vectors**2, axis=(0, 1), keepdims=True)
    left = jnp.where(fine, made.products, 0.0) * slopes
    right = vectors * slopes / jnp.where(counts > 0.0, counts, 1.0)
    return Pooled(left.reshape(-1, m), right.reshape(-1, m), jnp.any(jnp.sum(vectors != 0.0, axis=2) > 1))
