"""Guidance that changes with the noise level: none where it is not needed, few products where few are enough.

The noise level is the loop's, the same for all particles: `jax.lax.switch` on it stays a branch under `jax.vmap`
over particles, states and observations: only the guidance of that level is executed, and only its passes are counted.
Under a `jax.vmap` over noise levels all branches would run; no sampler of this library does that.
"""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from numpyro_diffusion_da.diffusion.denoiser import Denoiser, GuidanceState, PriorDenoiser
from numpyro_diffusion_da.diffusion.guidance import Guidance, GuidanceDirections, ObservingDenoiser
from numpyro_diffusion_da.observation.likelihood import Likelihood


class Unguided(Guidance):
    """No guidance: the prior's denoiser, one forward pass. For levels of `Piecewise`; alone it ignores y."""

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """The denoiser itself."""
        return denoiser


class Piecewise(Guidance):
    """One guidance for each range of noise levels.

    `Piecewise((Unguided(), MMPS(), Unguided()), (40.0, 0.05))` guides from 40 down to 0.05 only.

    Args:
        guidance: from the highest levels to the lowest.
        levels: where one gives way to the next, decreasing, one fewer: noise levels above `levels[0]` have
            `guidance[0]`, those from it down to above `levels[1]` have `guidance[1]`, and so on.

    Raises:
        ValueError: numbers that do not match, or levels that are not positive and decreasing.
    """

    guidance: tuple[Guidance, ...] = eqx.field(converter=tuple)
    levels: tuple[float, ...] = eqx.field(static=True, converter=tuple)

    def __check_init__(self) -> None:
        if len(self.guidance) != len(self.levels) + 1:
            raise ValueError(
                f"Piecewise got {len(self.guidance)} guidances and {len(self.levels)} levels between them; "
                "give one level fewer than guidances."
            )
        if any(level <= 0 for level in self.levels) or any(
            low >= high for high, low in zip(self.levels, self.levels[1:], strict=False)
        ):
            raise ValueError(f"Piecewise got levels={self.levels}; give positive levels, the highest first.")

    def __call__(self, denoiser: PriorDenoiser, likelihood: Likelihood) -> Denoiser:
        """The denoiser that chooses by the noise level."""
        parts = tuple(guidance(denoiser, likelihood) for guidance in self.guidance)
        if all(isinstance(part, ObservingDenoiser | PriorDenoiser) for part in parts):
            return ObservingPiecewiseDenoiser(denoiser, parts, self.levels)
        return PiecewiseDenoiser(parts, self.levels)


def _structure(tree: PyTree) -> PyTree:
    return jax.tree.structure(tree), [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]


def _slots(parts: Sequence[Denoiser]) -> tuple[list[int], list[PyTree], GuidanceState]:
    """(which warm start each part has, the distinct warm starts, a guidance_state).

    Equal ones are shared, so that a part goes on where the one before it stopped.
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
    """`call(part, z_s, noise_level, guidance_state)`, whose last result is the guidance_state, for the part of this level."""
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
    return part(z_s, noise_level, guidance_state)


class PiecewiseDenoiser(Denoiser):
    """See `Piecewise`; costs what the guidance of the level costs."""

    parts: tuple[Denoiser, ...]
    levels: tuple[float, ...] = eqx.field(static=True)

    def init(self) -> GuidanceState:
        """No passes yet, and every part's cold start."""
        return _slots(self.parts)[2]

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """The denoised value of this level's guidance."""
        return _choose(self.parts, self.levels, _denoise, z_s, noise_level, guidance_state)


class ObservingPiecewiseDenoiser(ObservingDenoiser):
    """The same for path weights: at an unguided level nothing is seen of y, and the step is the prior's."""

    base: PriorDenoiser
    parts: tuple[Denoiser, ...]
    levels: tuple[float, ...] = eqx.field(static=True)

    def init(self) -> GuidanceState:
        """No passes yet, and every part's cold start."""
        return _slots(self.parts)[2]

    def __call__(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """The denoised value of this level's guidance."""
        return _choose(self.parts, self.levels, _denoise, z_s, noise_level, guidance_state)

    def directions(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], GuidanceDirections, GuidanceState]:
        """See `ObservingDenoiser`: with directions that are zero where a guidance has fewer than another."""
        slots, starts, _ = _slots(self.parts)
        seen: list[GuidanceDirections] = []
        for part, slot in zip(self.parts, slots, strict=True):
            if isinstance(part, ObservingDenoiser):
                given = guidance_state._replace(warm_start=starts[slot])
                seen.append(jax.eval_shape(part.directions, z_s, noise_level, given)[1])
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
    """With directions that are zero, up to k of them."""
    more = k - len(directions.basis)

    def rows(x: Array, axes: int = 1) -> Array:
        return jnp.pad(x, [(0, more if axis < axes else 0) for axis in range(x.ndim)])

    return GuidanceDirections(
        rows(directions.basis), rows(directions.residual), rows(directions.covariance, 2), rows(directions.pulled)
    )
