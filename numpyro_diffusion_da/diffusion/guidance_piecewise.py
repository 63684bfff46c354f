"""Guidance that depends on the noise level, to save network passes at levels that need little or no guidance.

The noise level comes from the sampler's loop and is the same for all particles. So `jax.lax.switch` on it stays a
branch under `jax.vmap` over particles, states and observations: only the guidance of the current level is executed, and
only its passes are counted. Under a `jax.vmap` over noise levels all branches would run; no sampler of this library
does that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from numpyro_diffusion_da.arguments import require, require_number
from numpyro_diffusion_da.diffusion.denoiser import Denoiser, GuidanceState, PriorDenoiser
from numpyro_diffusion_da.diffusion.guidance import Guidance, GuidanceDirections, ObservingDenoiser
from numpyro_diffusion_da.observation.likelihood import Likelihood


class Unguided(Guidance):
    """No guidance: the denoiser of the prior, at one forward pass per call.

    Use it for some levels of `Piecewise`. By itself it ignores the observations.
    """

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """Return the denoiser of the prior unchanged."""
        return denoiser


def _several(name: str, example: str) -> Callable[[Any], tuple[Any, ...]]:
    """Converter of a field of `Piecewise` that holds a tuple."""

    def converter(values: Any) -> tuple[Any, ...]:
        require(values, Sequence, "Piecewise", name, example)
        return tuple(values)

    return converter


class Piecewise(Guidance):
    """Guidance that uses another guidance in each range of noise levels.

    `Piecewise((Unguided(), MMPS(), Unguided()), (40.0, 0.05))` guides at noise levels from 40 down to 0.05 only.

    Args:
        guidance: one guidance for each range, from the highest noise levels to the lowest.
        levels: noise levels between the ranges, decreasing, one fewer than guidances. `guidance[0]` is used above
            `levels[0]`, `guidance[1]` from `levels[0]` down to just above `levels[1]`, and so on.

    Raises:
        ValueError: the numbers of guidances and levels do not match, or the levels are not positive and decreasing.
    """

    guidance: tuple[Guidance, ...] = eqx.field(
        converter=_several("guidance", "(ndda.diffusion.Unguided(), ndda.MMPS())")
    )
    levels: tuple[float, ...] = eqx.field(static=True, converter=_several("levels", "(40.0,)"))

    def __check_init__(self) -> None:
        for i, part in enumerate(self.guidance):
            require(part, Guidance, self, f"guidance[{i}]", "ndda.MMPS()")
        if len(self.guidance) != len(self.levels) + 1:
            raise ValueError(
                f"Piecewise got {len(self.guidance)} guidances and {len(self.levels)} levels between them; "
                "give one level fewer than guidances."
            )
        advice = "give positive levels, the highest first."
        for i, level in enumerate(self.levels):
            require_number(level, self, f"levels[{i}]", advice, above=0.0)
        if any(low >= high for high, low in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"Piecewise got levels={self.levels}; give positive levels, the highest first.")

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """Build the denoiser that chooses its guidance by the noise level.

        It is an `ObservingDenoiser`, usable for path weights, if every part is one or is unguided.
        """
        parts = tuple(guidance(denoiser, likelihood) for guidance in self.guidance)
        if all(isinstance(part, ObservingDenoiser | PriorDenoiser) for part in parts):
            return ObservingPiecewiseDenoiser(denoiser, parts, self.levels)
        return PiecewiseDenoiser(parts, self.levels)


def _structure(tree: PyTree) -> PyTree:
    """Return what identifies a warm start: its tree structure, and the shapes and dtypes of its arrays."""
    return jax.tree.structure(tree), [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]


def _slots(parts: Sequence[Denoiser]) -> tuple[list[int], list[PyTree], GuidanceState]:
    """Assign a slot for its warm start to each part.

    Parts with warm starts of the same structure share a slot, so that a part continues where the part before it
    stopped.

    Returns:
        (slot of each part, first warm start of each slot, guidance state with all first warm starts).
    """
    slots: list[int] = []
    starts: list[PyTree] = []
    residual = jnp.zeros(())
    for part in parts:
        guidance_state = part.init()
        if not isinstance(part, PriorDenoiser):
            residual = guidance_state.solver_residual
        alike = [i for i, start in enumerate(starts) if _structure(start) == _structure(guidance_state.warm_start)]
        slots.append(alike[0] if alike else len(starts))
        if not alike:
            starts.append(guidance_state.warm_start)
    return slots, starts, guidance_state._replace(warm_start=tuple(starts), solver_residual=residual)


def _choose(
    parts: Sequence[Denoiser],
    levels: Sequence[float],
    call: PyTree,
    z_s: Float[Array, ...],
    noise_level: Float[Array, ""],
    guidance_state: GuidanceState,
) -> PyTree:
    """Run the part that belongs to this noise level.

    Args:
        parts: one denoiser for each range of noise levels.
        levels: noise levels between the ranges.
        call: function (part, z_s, noise_level, guidance_state) -> (results, ..., guidance state after the call).
        z_s: noised latent.
        noise_level: s, a positive scalar.
        guidance_state: guidance state with the warm starts of all slots.

    Returns:
        The return value of `call`, its guidance state again with the warm starts of all slots.
    """
    slots, _, _ = _slots(parts)

    def branch(part: Denoiser, slot: int) -> PyTree:
        def run(operands: tuple[Array, Array, GuidanceState]) -> PyTree:
            z_s, noise_level, guidance_state = operands
            starts = list(guidance_state.warm_start)
            *results, after = call(part, z_s, noise_level, guidance_state._replace(warm_start=starts[slot]))
            starts[slot] = after.warm_start
            return (*results, after._replace(warm_start=tuple(starts)))

        return run

    index = sum((noise_level <= level).astype(jnp.int32) for level in levels)
    branches = [branch(part, slot) for part, slot in zip(parts, slots, strict=True)]
    if len(branches) == 1:
        return branches[0]((z_s, noise_level, guidance_state))
    return jax.lax.switch(index, branches, (z_s, noise_level, guidance_state))


def _denoise(
    part: Denoiser, z_s: Array, noise_level: Array, guidance_state: GuidanceState
) -> tuple[Array, GuidanceState]:
    """Call a part; this is the `call` of `_choose` for a plain denoised value."""
    return part(z_s, noise_level, guidance_state)


class PiecewiseDenoiser(Denoiser):
    """Posterior denoiser that chooses a part by the noise level, built by `Piecewise`.

    One call costs what the part of the level costs.

    Attributes:
        parts: one denoiser for each range of noise levels, from the highest to the lowest.
        levels: noise levels between the ranges, decreasing.
    """

    parts: tuple[Denoiser, ...]
    levels: tuple[float, ...] = eqx.field(static=True)

    def init(self) -> GuidanceState:
        """Return a guidance state with no passes and the first warm start of every part."""
        return _slots(self.parts)[2]

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """Return the denoised value of this level's part, of the shape of `z_s`, and the next guidance state."""
        return _choose(self.parts, self.levels, _denoise, z_s, noise_level, guidance_state)


class ObservingPiecewiseDenoiser(ObservingDenoiser):
    """Posterior denoiser that chooses a part by the noise level, and can be used for path weights.

    At an unguided level the observations have no effect, and the sampler's step is that of the prior.

    Attributes:
        base: denoiser of the prior.
        parts: one denoiser for each range of noise levels, from the highest to the lowest.
        levels: noise levels between the ranges, decreasing.
    """

    base: PriorDenoiser
    parts: tuple[Denoiser, ...]
    levels: tuple[float, ...] = eqx.field(static=True)

    def init(self) -> GuidanceState:
        """Return a guidance state with no passes and the first warm start of every part."""
        return _slots(self.parts)[2]

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """Return the denoised value of this level's part, of the shape of `z_s`, and the next guidance state."""
        return _choose(self.parts, self.levels, _denoise, z_s, noise_level, guidance_state)

    def directions(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceDirections, GuidanceState]:
        """Return the unguided D(z_s, s), the directions of this level's part, and the next guidance state.

        The number of directions is that of the part with the most. A part with fewer fills up with zeros.
        """
        slots, starts, _ = _slots(self.parts)
        seen: list[GuidanceDirections] = []
        for part, slot in zip(self.parts, slots, strict=True):
            if isinstance(part, ObservingDenoiser):
                given = guidance_state._replace(warm_start=starts[slot])
                seen.append(jax.eval_shape(part.directions, z_s, noise_level, given)[1])
        # Every branch of the switch must return arrays of the same shapes.
        widest = max((len(directions.basis) for directions in seen), default=0)
        unknowns = seen[0].basis.shape[1] if seen else 0

        def look(part: Denoiser, z_s: Array, noise_level: Array, guidance_state: GuidanceState) -> PyTree:
            if isinstance(part, ObservingDenoiser):
                denoised, directions, guidance_state = part.directions(z_s, noise_level, guidance_state)
            else:
                denoised, guidance_state = part(z_s, noise_level, guidance_state)
                directions = GuidanceDirections(
                    jnp.zeros((0, unknowns), z_s.dtype),
                    jnp.zeros((0,), z_s.dtype),
                    jnp.zeros((0, 0), z_s.dtype),
                    jnp.zeros((0, *z_s.shape), z_s.dtype),
                )
            return denoised, _widen(directions, widest), guidance_state

        return _choose(self.parts, self.levels, look, z_s, noise_level, guidance_state)


def _widen(directions: GuidanceDirections, k: int) -> GuidanceDirections:
    """Append zero directions, up to k of them."""
    more = k - len(directions.basis)

    def rows(x: Array, axes: int = 1) -> Array:
        return jnp.pad(x, [(0, more if axis < axes else 0) for axis in range(x.ndim)])

    return GuidanceDirections(
        rows(directions.basis), rows(directions.residual), rows(directions.covariance, 2), rows(directions.pulled)
    )
