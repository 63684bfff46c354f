"""Search for near positions inside a compiled step, for positions that are known only there.

Positions are sorted into cubic cells of the space in which a distance embeds them. What is near a position lies in its
own cell or in one that touches it. A distance without embedded coordinates is compared with all positions. Either way
memory is that of the positions found, whose number has a bound that is fixed when the step is compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_diffusion_da.smc.distances import Distance, Numbers

CHUNK = 256
"""Number of candidates that are compared with a position at a time."""

LARGEST_BATCH = 2**19
"""Largest number of candidates held at a time."""

MOST_CELLS = 1000
"""Largest number of cells along an axis, so that the number of all cells fits into 32 bits."""

CELL_AXES = 3
"""Largest number of axes along which space is divided into cells."""

MARGIN = 1e-4
"""Relative margin for rounding in single precision."""


class Found(NamedTuple):
    """Positions near each of p positions, in no particular order.

    Attributes:
        which: their indices, shape (p, most); 0 in the padding.
        distances: their distances, shape (p, most); infinite in the padding.
        counts: number of them near each position, shape (p,). It may be above `most`; then some are left out.
    """

    which: Int[Array, "p most"]
    distances: Float[Array, "p most"]
    counts: Int[Array, " p"]


class Candidates(NamedTuple):
    """Positions to compare with each of p positions: a few runs of the positions in the order of their cells.

    Attributes:
        order: indices of the positions in this order, shape (m,).
        starts: start of each run, shape (p, runs).
        ends: number of candidates up to the end of each run, shape (p, runs).
    """

    order: Int[Array, " m"]
    starts: Int[Array, "p runs"]
    ends: Int[Array, "p runs"]


def near_each(
    distance: Distance,
    a: Float[Numbers, "p k"],
    b: Float[Array, "m k"],
    reach: Float[np.ndarray, " m"],
    exists: Bool[Array, " m"],
    most: int,
) -> Found:
    """Find the positions of `b` that are nearer to each position of `a` than a reach.

    Args:
        distance: distance between positions; it takes JAX arrays.
        a: the first positions, finite.
        b: the second positions, finite.
        reach: largest distance from each position of `b`.
        exists: False for positions of `b` that are near none.
        most: largest number of positions found near each position of `a`.
    """
    candidates = _in_cells(distance, a, b, float(reach.max()), exists)
    between: Callable[[Array, Array], Array]
    if candidates is None:
        runs = jnp.zeros((len(a), 1), int)
        candidates = Candidates(jnp.arange(len(b)), runs, runs + len(b))
        start, there = jnp.asarray(a), b

        def between(one: Array, several: Array) -> Array:
            return jnp.asarray(distance(one[None], several)[0])
    else:
        start, there = jnp.asarray(distance.prepared(a)), jnp.asarray(distance.prepared(b))

        def between(one: Array, several: Array) -> Array:
            return jnp.asarray(distance.between(one[None], several))

    limit = jnp.where(exists, jnp.asarray(reach, b.dtype), -1.0)

    def near_one(inputs: tuple[Array, Array, Array]) -> Found:
        one, starts, ends = inputs
        begins = ends - jnp.diff(ends, prepend=0)

        def compare(carry: tuple[Array, Found]) -> tuple[Array, Found]:
            first, found = carry
            slot = first + jnp.arange(CHUNK)
            run = jnp.minimum(jnp.sum(slot[:, None] >= ends[None], axis=1), len(ends) - 1)
            index = candidates.order[jnp.minimum(starts[run] + slot - begins[run], len(b) - 1)]
            apart = between(one, there[index])
            keep = (slot < ends[-1]) & (apart < limit[index])
            to = jnp.where(keep, found.counts + jnp.cumsum(keep) - 1, most)
            which = found.which.at[to].set(index, mode="drop")
            distances = found.distances.at[to].set(apart, mode="drop")
            return first + CHUNK, Found(which, distances, found.counts + jnp.sum(keep))

        none = Found(jnp.zeros(most, candidates.order.dtype), jnp.full(most, jnp.inf, b.dtype), jnp.zeros((), int))
        found: Found = jax.lax.while_loop(lambda carry: carry[0] < ends[-1], compare, (jnp.zeros((), int), none))[1]
        return found

    batch = min(len(a), max(1, LARGEST_BATCH // max(CHUNK, most)))
    found: Found = jax.lax.map(near_one, (start, candidates.starts, candidates.ends), batch_size=batch)
    return found


def _in_cells(
    distance: Distance, a: Float[Numbers, "p k"], b: Float[Array, "m k"], reach: float, exists: Bool[Array, " m"]
) -> Candidates | None:
    """Candidates in the cells around each position; None if the distance has no embedded coordinates."""
    here, there = distance.embedded(a), distance.embedded(b)
    if here is None or there is None:
        return None
    # A projection on some of the axes brings positions nearer to each other, never further apart.
    here, there = here[:, :CELL_AXES].astype(b.dtype), jnp.asarray(there)[:, :CELL_AXES]
    low = jnp.minimum(here.min(0), there.min(0))
    high = jnp.maximum(here.max(0), there.max(0))
    side = jnp.maximum((1.0 + MARGIN) * reach + MARGIN * (high - low).max() / MOST_CELLS, (high - low) / MOST_CELLS)
    size = jnp.floor((high - low) / side).astype(int) + 1

    def number(cell: Array) -> Array:
        found = cell[..., 0]
        for axis in range(1, cell.shape[-1]):
            found = found * size[axis] + cell[..., axis]
        return found

    key = number(jnp.floor((there - low[None]) / side[None]).astype(int))
    key = jnp.where(exists, key, jnp.iinfo(key.dtype).max)
    order = jnp.argsort(key)
    key = key[order]
    own = jnp.floor((here - low[None]) / side[None]).astype(int)
    # The cells next to each other along the last axis have consecutive numbers, and make one run.
    steps = np.array([*itertools.product((-1, 0, 1), repeat=own.shape[1] - 1)], int)
    rows = own[:, None, :-1] + steps[None]
    inside = jnp.all((rows >= 0) & (rows < size[None, None, :-1]), axis=-1)
    first, last = (
        number(jnp.concatenate([rows, jnp.broadcast_to(end[:, None, None], (*rows.shape[:2], 1))], axis=-1))
        for end in (jnp.maximum(own[:, -1] - 1, 0), jnp.minimum(own[:, -1] + 1, size[-1] - 1))
    )
    starts = jnp.searchsorted(key, first, side="left")
    lengths = jnp.where(inside, jnp.searchsorted(key, last, side="right") - starts, 0)
    return Candidates(order, starts, jnp.cumsum(lengths, axis=1))


def check_room(counts: Int[Array, " p"], most: int) -> Array:
    """Return 0, after a check on the host that no position has more near ones than there is room for.

    Args:
        counts: number of positions near each position.
        most: the room.

    Raises:
        ValueError: there are more. JAX raises it as the cause of its own error when the step's result is read.
    """

    def checked(largest: np.ndarray) -> np.ndarray:
        if (needed := int(np.max(largest))) > most:
            raise ValueError(
                f"{needed} observations are near one place, and the step has room for {most}; give "
                f"Taper(..., most_near={needed}) or more, or a smaller radius."
            )
        return np.zeros(np.shape(largest), np.float32)

    shape = jax.ShapeDtypeStruct((), np.float32)
    return jax.pure_callback(checked, shape, jnp.max(counts), vmap_method="broadcast_all")
