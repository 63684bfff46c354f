"""Search for near positions: on the host by a k-d tree, where a distance has embedded coordinates, else by all pairs.

The tree proposes pairs, and the distance itself decides. So both ways find the same pairs, with the same distances to
the last digit. Memory is that of the pairs found, and of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from numpyro_diffusion_da.smc.distances import Distance, Numbers

LARGEST_BATCH = 2**22
"""Largest number of distances computed at a time: 32 MB. With fewer pairs than that no tree is made."""

MOST_TIMES_LEAST = 16
"""Largest number of rows searched at a time with a tree, over the number that fits if all pairs are near."""

MARGIN = 1e-9
"""Relative margin for the rounding of embedded coordinates and of distances."""

PLACED_AT_A_TIME = 512
"""Number of positions that `far_apart` puts into classes before it makes a new tree."""


class Pairs(NamedTuple):
    """Pairs of near positions, ordered by their rows and then by their columns.

    Attributes:
        rows: index of the first position of each pair, shape (q,).
        columns: index of the second position, shape (q,).
        distances: distance between them, shape (q,).
    """

    rows: Int[np.ndarray, " q"]
    columns: Int[np.ndarray, " q"]
    distances: Float[np.ndarray, " q"]


def tree_of(coordinates: Float[Numbers, "n q"]) -> Any:
    """K-d tree of coordinates, a `scipy.spatial.cKDTree`. It also copes with many equal coordinates."""
    from scipy.spatial import cKDTree

    return cKDTree(coordinates, balanced_tree=False, compact_nodes=False)


def pairs_within(
    distance: Distance, a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "m k"], reach: Float[np.ndarray, " m"]
) -> Iterator[Pairs]:
    """Pairs of a position of `a` and one of `b` that are no further apart than a reach, in batches of rows.

    Args:
        distance: distance between positions.
        a: the first positions.
        b: the second positions.
        reach: largest distance from each position of `b`; pairs a rounding error further apart may be found too.
    """
    limit = reach * (1.0 + MARGIN)
    least = max(1, LARGEST_BATCH // max(1, len(b)))
    space: Any = None if len(a) <= least else distance.embedded(b)
    if space is None:
        for first in range(0, len(a), least):
            dense = np.asarray(distance(a[first : first + least], b))
            found = np.nonzero(dense <= limit)
            yield Pairs(found[0] + first, found[1], dense[found])
        return
    # Positions of one reach have a tree of their own, so that a wide reach of few costs nothing for the others.
    groups = [np.flatnonzero(reach == value) for value in np.unique(reach)]
    trees = [(group, tree_of(space[group]), float(limit[group[0]])) for group in groups]
    start, there, between = distance.prepared(a), distance.prepared(b), distance.between
    here: Any = distance.embedded(a)
    size = np.abs(space).max(initial=0.0)
    first, rows = 0, least
    while first < len(a):
        near = tree_of(here[first : first + rows])
        proposed = []
        for group, tree, furthest in trees:
            found = near.sparse_distance_matrix(tree, furthest + MARGIN * size, output_type="ndarray")
            proposed.append((first + found["i"]) * len(b) + group[found["j"]])
        # One number for each pair; sorted, they are in the order of rows and columns.
        i, j = np.divmod(np.sort(np.concatenate(proposed)), len(b))
        apart = between(start[i], there[j])
        keep = apart <= limit[j]
        yield Pairs(i[keep], j[keep], np.asarray(apart)[keep])
        # The next batch has fewer pairs than fit, unless the rows have many more neighbors from here on.
        first += rows
        rows = int(np.clip(LARGEST_BATCH // 4 * rows // max(1, len(i)), least, MOST_TIMES_LEAST * least))


def partition(
    distance: Distance, points: Float[np.ndarray, "p k"], radius: float
) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " p"]]:
    """Partition positions into parts no larger than a radius around their centers.

    The position that is furthest from all centers becomes the next center (Gonzalez 1985), until every one is within
    `radius` of a center. A new center can only take positions that are nearer to it than any is to its own center, so
    a tree leaves the others out.

    Args:
        distance: distance between positions.
        points: the positions.
        radius: largest distance of a position from its center.

    Returns:
        (indices of the centers among the positions, index of each position's center among these).
    """
    space: Any = distance.embedded(points) if len(points) ** 2 > LARGEST_BATCH else None
    apart = distance(points, points[:1])[:, 0]
    chosen, nearest = [0], np.zeros(len(points), np.int32)
    if space is not None:
        tree, prepared, between = tree_of(space), distance.prepared(points), distance.between
        margin = MARGIN * np.abs(space).max()
    while (furthest := apart.max()) > radius:
        chosen.append(int(apart.argmax()))
        center = slice(chosen[-1], chosen[-1] + 1)
        which: Any = slice(None)
        if space is None:
            here = distance(points, points[center])[:, 0]
        else:
            within = tree.query_ball_point(space[chosen[-1]], furthest * (1.0 + MARGIN) + margin)
            which = np.asarray(within, np.intp)
            here = between(prepared[which], prepared[center])
        nearer = here < apart[which]
        nearest[which] = np.where(nearer, np.int32(len(chosen) - 1), nearest[which])
        apart[which] = np.minimum(apart[which], here)
    return np.asarray(chosen), nearest


def far_apart(distance: Distance, positions: Float[np.ndarray, "m k"], count: int) -> Int[np.ndarray, " m"]:
    """Divide positions into classes whose members are far from each other.

    Positions are taken in a random order that is always the same. Each joins the class whose nearest member is furthest
    from it.

    With a tree each one is compared with the nearest of the earlier ones. These are usually enough to know the nearest
    member of every class; where they are not, it is compared with all earlier ones.

    Args:
        distance: distance between positions.
        positions: the positions.
        count: number of classes.

    Returns:
        Class of each position, from 0 to count - 1.
    """
    m = len(positions)
    found = np.empty(m, np.int32)
    order = np.random.default_rng(0).permutation(m)
    space: Any = distance.embedded(positions) if m**2 > LARGEST_BATCH else None
    if space is None:
        nearest = np.full((count, m), np.inf, np.float32)
        for j in order:
            found[j] = np.argmax(nearest[:, j])
            apart = distance(positions[j : j + 1], positions)[0]
            nearest[found[j]] = np.minimum(nearest[found[j]], apart)
        return found
    prepared, between = distance.prepared(positions), distance.between
    for start in range(0, m, PLACED_AT_A_TIME):
        batch, earlier = order[start : start + PLACED_AT_A_TIME], order[:start]
        nearest = np.full((len(batch), count), np.inf, np.float32)
        size = min(start, 3 * count)
        if size:
            reached, index = tree_of(space[earlier]).query(space[batch], k=np.arange(1, size + 1))
            others = earlier[index]
            apart = between(prepared[batch][:, None], prepared[others]).astype(np.float32)
            np.minimum.at(nearest, (np.arange(len(batch))[:, None], found[others]), apart)
        within = between(prepared[batch][:, None], prepared[batch][None]).astype(np.float32)
        for i, j in enumerate(batch):
            # What was left out is at least as far away as the last one that the tree found.
            if size < start and not nearest[i].max() < reached[i, -1] * (1.0 - 1e-6):
                np.minimum.at(nearest[i], found[earlier], between(prepared[j], prepared[earlier]).astype(np.float32))
            found[j] = np.argmax(nearest[i])
            nearest[i + 1 :, found[j]] = np.minimum(nearest[i + 1 :, found[j]], within[i, i + 1 :])
    return found
