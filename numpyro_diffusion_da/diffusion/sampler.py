"""Reverse diffusion: one loop over noise levels, several steps.

The probability-flow ODE of a variance-exploding diffusion is dz/ds = (z - D(z, s)) / s. A `Step` takes z from one noise
level to the next; a `Churn` adds noise before a step, a `LangevinCorrector` moves z at a level after it; `Sampler` owns
the loop. None of them needs to know the noise covariance C beyond a draw e ~ N(0, C): with s^2 C grad log p = D - z all
three are already preconditioned by it.

After the last level the sample is D(z, s_min): an Euler step to zero noise, which no higher-order step may replace
because the derivative is not defined there.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.denoiser import Denoiser, GuidanceState
from numpyro_diffusion_da.diffusion.noise import Noise
from numpyro_diffusion_da.diffusion.schedule import KarrasSchedule, Schedule
from numpyro_diffusion_da.diffusion.steps import (
    DPMSolverPP2M,
    Evaluate,
    Step,
    StepInputs,
    StochasticStep,
)


class Churn(eqx.Module):
    """Added noise before a step (EDM, Algorithm 2): raises the level to (1 + gamma) s.

    Args:
        rate: gamma = min(rate / number of levels, sqrt(2) - 1); GenCast uses 2.5.
        lowest: no churn below this noise level; GenCast uses 0.75.
        highest: no churn above this noise level.
        inflation: factor on the added noise; GenCast uses 1.05.

    Raises:
        ValueError: a negative rate or inflation.
    """

    rate: float = eqx.field(static=True, default=2.5)
    lowest: float = eqx.field(static=True, default=0.75)
    highest: float = eqx.field(static=True, default=float("inf"))
    inflation: float = eqx.field(static=True, default=1.05)

    def __check_init__(self) -> None:
        if self.rate < 0 or self.inflation < 0:
            raise ValueError(f"Churn got rate={self.rate}, inflation={self.inflation}; neither can be negative.")

    def raised(self, levels: np.ndarray) -> np.ndarray:
        """The noise level each step starts from after churning, shape of `levels`."""
        gamma = min(self.rate / len(levels), np.sqrt(2.0) - 1.0)
        inside = (levels >= self.lowest) & (levels <= self.highest)
        return np.where(inside, (1.0 + gamma) * levels, levels)


class LangevinCorrector(eqx.Module):
    """Langevin moves at a noise level, after the step that reached it (Song et al. 2021, arXiv 2011.13456).

    z <- z + tau (D(z, s) - z) + sqrt(2 tau) s e: since D - z = s^2 C grad log p and e ~ N(0, C), the move is
    preconditioned by s^2 C. The published GenCast filter makes two per level.

    Args:
        steps: moves per level, each one denoiser evaluation.
        tau: step size, in (0, 1).

    Raises:
        ValueError: no steps, or tau outside (0, 1).
    """

    steps: int = eqx.field(static=True, default=2)
    tau: float = eqx.field(static=True, default=0.3)

    def __check_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"LangevinCorrector got steps={self.steps}; give 1 or more, or leave the corrector out.")
        if not 0.0 < self.tau < 1.0:
            raise ValueError(f"LangevinCorrector got tau={self.tau}; give a number between 0 and 1.")

    def __call__(
        self,
        rng_key: PRNGKeyArray,
        evaluate: Evaluate,
        noise: Noise,
        z: Array,
        level: Array,
        guidance_state: GuidanceState,
    ) -> tuple[Array, GuidanceState]:
        """All moves at one level; returns (z, guidance_state)."""

        def move(i: Array, carry: tuple[Array, GuidanceState]) -> tuple[Array, GuidanceState]:
            z, guidance_state = carry
            denoised, guidance_state = evaluate(z, level, guidance_state)
            e = noise.sample(jax.random.fold_in(rng_key, i), z.shape, z.dtype)
            return z + self.tau * (denoised - z) + np.sqrt(2.0 * self.tau) * level * e, guidance_state

        return jax.lax.fori_loop(0, self.steps, move, (z, guidance_state))


class Sampler(eqx.Module):
    """Draws a latent by running a denoiser from the highest noise level to the lowest.

    Args:
        step: how to get from one level to the next.
        schedule: the noise levels; by default 16 of EDM's form over the prior's own range.
        churn: noise added before a step, or None.
        corrector: Langevin moves after a step, or None.
    """

    step: Step = DPMSolverPP2M()
    schedule: Schedule = KarrasSchedule()
    churn: Churn | None = None
    corrector: LangevinCorrector | None = None

    def evaluations(self, noise_range: tuple[float, float]) -> int:
        """Denoiser evaluations of one draw."""
        steps = len(self.schedule.levels(noise_range)) - 1
        moves = self.corrector.steps if self.corrector is not None else 0
        return steps * (self.step.evaluations + moves) + 1

    @property
    def is_stochastic(self) -> bool:
        """Whether its only moves are steps with noise, which is what path weights need."""
        only_steps = self.churn is None and self.corrector is None
        return only_steps and isinstance(self.step, StochasticStep) and self.step.noisy

    def stochastic_step(self) -> StochasticStep:
        """The step of a sampler whose every move is that step, with noise.

        Raises:
            ValueError: it is deterministic, or has a churn or a corrector; says what to give instead.
        """
        if not self.is_stochastic:
            moves = [self.step, *(m for m in (self.churn, self.corrector) if m is not None)]
            raise ValueError(
                "path weights need a sampler whose only moves are steps with noise, and got "
                f"{' with '.join(map(repr, moves))}; give ndda.Sampler(ndda.SDEDPMSolverPP2M()), or DDIM(eta=1.0)."
            )
        assert isinstance(self.step, StochasticStep)
        return self.step

    def initial(
        self,
        rng_key: PRNGKeyArray,
        noise: Noise,
        noise_range: tuple[float, float],
        shape: tuple[int, ...],
        dtype: Any = float,
    ) -> Float[Array, ...]:
        """The draw s_max e that the loop starts from."""
        highest = float(self.schedule.levels(noise_range)[0])
        return highest * noise.sample(rng_key, shape, jnp.zeros((), dtype).dtype)

    def constants(self, noise_range: tuple[float, float], dtype: Any) -> dict[str, Array]:
        """What each step is given: its index, start, stop and coefficients; leading axis = steps."""
        levels = self.schedule.levels(noise_range)
        start = self.churn.raised(levels)[:-1] if self.churn is not None else levels[:-1]
        stop = levels[1:]
        static = {
            "index": np.arange(len(stop)),
            "level": levels[:-1],
            "start": start,
            "stop": stop,
            **self.step.coefficients(start, stop),
        }
        return {name: jnp.asarray(v, jnp.int32 if name == "index" else dtype) for name, v in static.items()}

    def __call__(
        self,
        rng_key: PRNGKeyArray,
        denoiser: Denoiser,
        noise: Noise,
        noise_range: tuple[float, float],
        z: Float[Array, ...],
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """Run the loop.

        Args:
            rng_key: for churn, corrector and stochastic steps; a deterministic sampler never uses it.
            denoiser: prior or guided denoiser.
            noise: the prior's noise.
            noise_range: the prior's (lowest, highest) noise level.
            z: the starting point at the highest level, see `initial`.

        Returns:
            (the denoised latent, the denoiser's guidance_state after the last level).
        """

        def body(carry: tuple[Array, PyTree, GuidanceState], c: dict[str, Array]) -> tuple[Any, None]:
            z, history, guidance_state = carry
            churn_key, step_key, corrector_key = jax.random.split(jax.random.fold_in(rng_key, c["index"]), 3)
            if self.churn is not None:
                added = jnp.sqrt(jnp.maximum(c["start"] ** 2 - c["level"] ** 2, 0.0))
                z = z + self.churn.inflation * added * noise.sample(churn_key, z.shape, z.dtype)
            given = StepInputs(step_key, denoiser, noise, z, c["start"], c["stop"], c)
            z, history, guidance_state = self.step(given, history, guidance_state)
            if self.corrector is not None:
                z, guidance_state = self.corrector(corrector_key, denoiser, noise, z, c["stop"], guidance_state)
            return (z, history, guidance_state), None

        start = (z, self.step.init(z), denoiser.init())
        (z, _, guidance_state), _ = jax.lax.scan(body, start, self.constants(noise_range, z.dtype))
        return denoiser(z, jnp.asarray(self.schedule.levels(noise_range)[-1], z.dtype), guidance_state)
