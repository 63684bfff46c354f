"""Localized ancestors: selection by what is observed nearby, block by block of the state.

Global weights over many observations select noise: the particle that fits best everywhere fits nowhere well, and one
particle is left. Here each block b of the state has weights of its own,

    log w_i^b = sum_j rho(distance(b, j) / c) log p(y_j | c_i),

with rho the Gaspari-Cohn taper and log p(y_j | c_i) how well particle i predicted observation j. Each block is tempered
and resampled by itself, and a new *conditioning* state is glued together from the blocks' ancestors (local particle
filters: Farchi & Bocquet 2018, Nonlin. Processes Geophys. 25, 765). Two things keep the seams small:

- all blocks share their random numbers, and a particle that is selected keeps its place: neighboring blocks, whose
  weights are alike, have the same ancestors in most places;
- states are glued *before* the transition, which then blends what the seams left.

One block, with a taper that is 1 everywhere, is the global selection of `base.select`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from numpyro_diffusion_da.smc.base import Resampling, num_particles
from numpyro_diffusion_da.smc.localization import Neighborhoods, PlacedTaper
from numpyro_diffusion_da.smc.tempering import Tempering, WeightTempering

LARGEST_BATCH = 2**24
"""Numbers held at a time while blocks are weighed one beside the other: 64 MB."""


def keep_places(ancestors: Int[Array, " n"]) -> Int[Array, " n"]:
    """The same ancestors, each as often, with every particle that is among them in its own place.

    The copies fill the places of those that are not, in order.
    """
    n = len(ancestors)
    counts = jnp.bincount(ancestors, length=n)
    copies = jnp.repeat(jnp.arange(n), jnp.maximum(counts - 1, 0), total_repeat_length=n)
    free = counts == 0
    return jnp.where(free, copies[jnp.cumsum(free) - 1], jnp.arange(n))


@dataclasses.dataclass(frozen=True, eq=False)
class LocalAncestors:
    """Where a model's blocks are, and which observations reach them.

    Attributes:
        neighborhoods: of the b blocks.
        block_of_point: the block of each of the p places of the state, shape (p,).
        state_shape: shape of one state; places run over its leading axes.
    """

    neighborhoods: Neighborhoods
    block_of_point: Int[np.ndarray, " p"]
    state_shape: tuple[int, ...]

    @staticmethod
    def at(taper: PlacedTaper, state_shape: tuple[int, ...], block_radius: float) -> LocalAncestors:
        """Blocks of places no further than `block_radius` from their center; 0 for a block a place."""
        blocks = taper.blocks(block_radius)
        return LocalAncestors(taper.neighborhoods(blocks.centers), blocks.of_point, state_shape)

    def select(
        self,
        rng_key: PRNGKeyArray,
        predictive: PyTree,
        resampling_fn: Resampling | None,
        target_ess: float,
        tempering: Tempering = WeightTempering(),
    ) -> tuple[Float[Array, "n b"], Int[Array, "n b"], Float[Array, " b"]]:
        """Weigh, temper and resample every block.

        Args:
            rng_key: one for all blocks.
            predictive: log p(y_j | c_i), shape (N, m), 0 where missing, -inf where particle i cannot be selected; or
                what else `tempering` asks for, arrays of that shape.
            resampling_fn: from `blackjax.smc.resampling`; systematic by default.
            target_ess: fraction of N that tempering aims at in each block; 0 for none.
            tempering: how.

        Returns:
            (log-weights before tempering, ancestors, alpha) of the blocks. A block that no observation reaches keeps
            its particles.
        """
        which, weights = (jnp.asarray(x) for x in self.neighborhoods)
        n, parts = num_particles(predictive), jax.tree.leaves(predictive)

        def of_block(inputs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            which, weights = inputs
            nearby = jax.tree.map(lambda x: x[:, which], predictive)
            log_weights, ancestors, alpha = tempering.select(rng_key, nearby, weights, resampling_fn, target_ess)
            return log_weights, keep_places(ancestors), alpha

        batch = max(1, LARGEST_BATCH // (n * (len(parts) * which.shape[1] + 8)))
        inputs = (which, weights.astype(parts[0].dtype))
        log_weights, ancestors, alpha = jax.lax.map(of_block, inputs, batch_size=min(batch, len(which)))
        return log_weights.T, ancestors.T, alpha

    def glue(self, particles: PyTree, ancestors: Int[Array, "n b"]) -> PyTree:
        """The particles' states put together from those of the blocks' ancestors.

        Args:
            particles: arrays with a leading axis of N, whose other axes end with those of a state. An array of integers
                or typed keys without them (a clock) stays in its place.
            ancestors: see `select`.

        Raises:
            ValueError: an array of real numbers that is no state.
        """
        of_point = ancestors[:, self.block_of_point]
        size = len(self.state_shape)

        def glued(leaf: Array) -> Array:
            lead = leaf.shape[1 : leaf.ndim - size]
            if leaf.ndim <= size or leaf.shape[leaf.ndim - size :] != self.state_shape:
                if jnp.issubdtype(leaf.dtype, jnp.inexact):
                    raise ValueError(
                        f"localized ancestors glue states of shape {self.state_shape}, and the scan's carry has an "
                        f"array of shape {leaf.shape[1:]}, which no place of the state belongs to; leave it out of "
                        "the carry, or the taper out of the filter."
                    )
                return leaf
            values = leaf.reshape(len(leaf), *lead, len(self.block_of_point), -1)
            index = of_point.reshape(len(leaf), *(1,) * len(lead), -1, 1)
            return jnp.take_along_axis(values, index, axis=0).reshape(leaf.shape)

        return jax.tree.map(glued, particles)
