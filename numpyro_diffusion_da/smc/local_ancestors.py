r"""Localized resampling: each block of the state selects ancestors by the observations near it.

With many observations, global weights mostly select noise: one particle gets almost all weight, and it fits no region
well. In a local particle filter (Farchi & Bocquet 2018, Nonlin. Processes Geophys. 25, 765), each block $b$ of the
state has its own weights,

$$\log w_i^b = \sum_j \rho(d_{bj} / c) \, \log p(y_j | c_i).$$

Here $\rho$ is the taper, $d_{bj}$ the distance between block and observation, $c$ the half-width, and
$\log p(y_j | c_i)$ measures how well particle $i$ predicted observation $j$. Each block is tempered and resampled on
its own. The states from which the transition starts are then glued together from the ancestors of the blocks. Two
measures keep discontinuities between blocks small:

- All blocks share their random numbers, and a selected particle keeps its place. Neighboring blocks have similar
  weights, and therefore have the same ancestors in most places.
- States are glued before the transition, which then smooths the remaining discontinuities.

One block with a taper of 1 everywhere is the same as the global selection of `base.select`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from numpyro_diffusion_da.smc.base import Resampling, map_particles, num_particles
from numpyro_diffusion_da.smc.columns import Index, at_columns, by_place, from_places, map_columns
from numpyro_diffusion_da.smc.localization import Neighborhoods, PlacedTaper
from numpyro_diffusion_da.smc.sharding import Traffic, block_traffic, bytes_each, map_divided
from numpyro_diffusion_da.smc.tempering import Tempering, WeightTempering

LARGEST_BATCH = 2**24
"""Largest number of values held at a time while several blocks are weighed in parallel: 64 MB."""


def keep_places(ancestors: Int[Array, " n"]) -> Int[Array, " n"]:
    """Reorder ancestors so that every selected particle is its own ancestor.

    Each ancestor occurs as often as before. Further copies fill the places of unselected particles, in order.
    """
    n = len(ancestors)
    counts = jnp.bincount(ancestors, length=n)
    copies = jnp.repeat(jnp.arange(n), jnp.maximum(counts - 1, 0), total_repeat_length=n)
    free = counts == 0
    return jnp.where(free, copies[jnp.cumsum(free) - 1], jnp.arange(n))


@dataclasses.dataclass(frozen=True, eq=False)
class LocalAncestors:
    """Localized resampling of one model: its blocks and the observations near each of them.

    Attributes:
        taper: taper at the positions of the model's values.
        centers: positions of the centers of the b blocks, shape (b, k).
        block_of_point: index of the block of each of the p places of the state, shape (p,).
        state_shape: shape of one state; places run over its leading axes.
        shared: indices of the arrays of a particle, in the order of its leaves, that stay as they are: a clock that is
            the same for all particles, a counter, a random key.
    """

    taper: PlacedTaper
    centers: Float[np.ndarray, "b k"]
    block_of_point: Int[np.ndarray, " p"]
    state_shape: tuple[int, ...]
    shared: tuple[int, ...] = ()

    @staticmethod
    def at(
        taper: PlacedTaper, state_shape: tuple[int, ...], block_radius: float, shared: tuple[int, ...] = ()
    ) -> LocalAncestors:
        """Localized resampling with blocks around centers.

        Args:
            taper: taper at the positions of the model's values.
            state_shape: shape of one state.
            block_radius: largest distance of a place from the center of its block; 0 makes each place a block.
            shared: indices of the arrays of a particle that stay as they are.
        """
        blocks = taper.blocks(block_radius)
        return LocalAncestors(taper, blocks.centers, blocks.of_point, state_shape, shared)

    @property
    def neighborhoods(self) -> Neighborhoods:
        """Observations near each of the b blocks, with their taper."""
        return self.taper.neighborhoods(self.centers)

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
            rng_key: random key, shared by all blocks.
            predictive: log p(y_j | c_i), shape (N, m), 0 where missing, -inf where particle i cannot be selected; or a
                `TemperableLogWeight` with arrays of this shape, if `tempering` needs it.
            resampling_fn: resampling function from `blackjax.smc.resampling`; None for systematic resampling.
            target_ess: effective sample size that tempering aims at in each block, as a fraction of N; 0 for no
                tempering.
            tempering: kind of tempering, `WeightTempering()` or `LikelihoodTempering()`.

        Returns:
            (log-weights before tempering, ancestors, tempering exponent alpha) of each block. Without observations near
            a block, every particle is its own ancestor there.
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
        log_weights, ancestors, alpha = map_divided(of_block, inputs, min(batch, len(which)))
        return log_weights.T, ancestors.T, alpha

    def glue(self, particles: PyTree, ancestors: Int[Array, "n b"]) -> PyTree:
        """Glue new states together from the states of each block's ancestors.

        Args:
            particles: arrays with a leading axis of N, whose last axes are those of a state. The arrays that `shared`
                names are returned unchanged.
            ancestors: index of the ancestor of each particle in each block, shape (N, b).

        Raises:
            ValueError: another array does not end with the axes of a state.
        """
        places, size = len(self.block_of_point), len(self.state_shape)
        width = math.prod(self.state_shape) // places
        leaves, form = jax.tree.flatten(particles)
        glued = [i for i in range(len(leaves)) if i not in self.shared]
        for leaf in (leaves[i] for i in glued):
            if leaf.ndim <= size or leaf.shape[leaf.ndim - size :] != self.state_shape:
                raise ValueError(
                    f"localized resampling has to glue states of shape {self.state_shape}, but a particle has an array "
                    f"of shape {leaf.shape[1:]} without places of the state; leave it out of the particle, or name it "
                    "in `shared` if it is the same for all particles."
                )

        def of_places(parts: list[Array], index: Index) -> tuple[list[Array], tuple[()]]:
            chosen = ancestors[:, at_columns(self.block_of_point, index)][:, :, None]
            return [jnp.take_along_axis(part, chosen, axis=0) for part in parts], ()

        parts = [map_particles(lambda x: by_place(x, places, width))(leaves[i]) for i in glued]
        found = map_columns(of_places, parts)[0] if parts else []
        for i, part in zip(glued, found, strict=True):
            like = jax.ShapeDtypeStruct(leaves[i].shape[1:], leaves[i].dtype)
            leaves[i] = map_particles(lambda x, like=like: from_places(x, like, width))(part)
        return jax.tree.unflatten(form, leaves)

    def traffic(self, particles: PyTree, ancestors: Int[Array, "n b"]) -> Traffic | tuple[()]:
        """Bytes that `glue` needs from other devices; () without a mesh.

        Args:
            particles: particles as for `glue`.
            ancestors: index of the ancestor of each particle in each block, shape (N, b).
        """
        glued = [x for i, x in enumerate(jax.tree.leaves(particles)) if i not in self.shared]
        shares = np.bincount(self.block_of_point, minlength=ancestors.shape[1]) / len(self.block_of_point)
        return block_traffic(bytes_each(glued), ancestors, shares)
