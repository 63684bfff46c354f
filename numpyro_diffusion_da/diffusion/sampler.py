"""Reverse diffusion: one loop over noise levels, several steps.

The probability-flow ODE of a variance-exploding diffusion is dz/ds = (z - D(z, s)) / s. A `Step` takes z from one noise
level to the next; a `Churn` adds noise before a step, a `LangevinCorrector` moves z at a level after it; `Sampler` owns
the loop. None of them needs to know the noise covariance C beyond a draw e ~ N(0, C): with s^2 C grad log p = D - z all
three are already preconditioned by it.

After the last level the sample is D(z, s_min): an Euler step to zero noise, which no higher-order step may replace
because the derivative is not defined there.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.denoiser import Denoiser, Memory
from numpyro_diffusion_da.diffusion.noise import Noise
from numpyro_diffusion_da.diffusion.schedule import KarrasSchedule, Schedule

Evaluate = Callable[[Array, Array, Memory], tuple[Array, Memory]]
"""A denoiser's call: (z_s, noise level, memory) -> (denoised, memory)."""


class StepInputs(NamedTuple):
    """What a step is given.

    Attributes:
        rng_key: for a stochastic step.
        evaluate: the denoiser.
        noise: the prior's noise.
        z: the latent at noise level `start`.
        start: noise level to start from.
        stop: noise level to reach.
        constants: this step's slice of `Step.coefficients`.
    """

    rng_key: PRNGKeyArray
    evaluate: Evaluate
    noise: Noise
    z: Float[Array, ...]
    start: Float[Array, ""]
    stop: Float[Array, ""]
    constants: dict[str, Array]


class Step(eqx.Module):
    """How to get from one noise level to the next.

    `order` is the order of convergence in the number of levels; `evaluations` the denoiser calls of one step.
    """

    order: eqx.AbstractVar[int]
    evaluations: eqx.AbstractVar[int]

    def coefficients(self, start: np.ndarray, stop: np.ndarray) -> dict[str, np.ndarray]:
        """Per-step constants for steps from `start[i]` to `stop[i]`, both of shape (steps,); leading axis = steps."""
        return {}

    def init(self, z: Float[Array, ...]) -> PyTree:
        """What the step remembers of the levels before, at the first level."""
        return ()

    @abc.abstractmethod
    def __call__(self, at: StepInputs, history: PyTree, memory: Memory) -> tuple[Float[Array, ...], PyTree, Memory]:
        """Move `at.z` from noise level `at.start` to `at.stop`; returns (z, history, memory)."""


class StochasticStep(Step):
    """A step that adds noise: given the past, the next latent is N(mean, spread^2 C). One evaluation, at the start."""

    @property
    def noisy(self) -> bool:
        """Whether the spread is positive at every step."""
        return True

    @abc.abstractmethod
    def law(
        self, at: StepInputs, denoised: Float[Array, ...], history: PyTree
    ) -> tuple[Float[Array, ...], Float[Array, ""], PyTree]:
        """(mean, spread, history) of the next latent, `denoised` being the denoiser's value at `at.z`, `at.start`."""

    def __call__(self, at: StepInputs, history: PyTree, memory: Memory) -> tuple[Float[Array, ...], PyTree, Memory]:
        """One step; see `Step`."""
        denoised, memory = at.evaluate(at.z, at.start, memory)
        z, spread, history = self.law(at, denoised, history)
        if self.noisy:
            z = z + spread * at.noise.sample(at.rng_key, z.shape, z.dtype)
        return z, history, memory


class DDIM(StochasticStep):
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12) in the variance-exploding form; first order.

    Args:
        eta: 0 is the deterministic sampler (the Euler step of the ODE), 1 the ancestral one.

    Raises:
        ValueError: eta outside [0, 1].
    """

    eta: float = eqx.field(static=True, default=0.0)
    order: int = eqx.field(static=True, default=1, init=False)
    evaluations: int = eqx.field(static=True, default=1, init=False)

    def __check_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"DDIM got eta={self.eta}; give a number from 0 (deterministic) to 1 (ancestral).")

    @property
    def noisy(self) -> bool:
        """With eta > 0."""
        return self.eta > 0.0

    def law(
        self, at: StepInputs, denoised: Float[Array, ...], history: PyTree
    ) -> tuple[Float[Array, ...], Float[Array, ""], PyTree]:
        """See `StochasticStep`."""
        start, stop = at.start, at.stop
        fresh = self.eta * stop * jnp.sqrt(jnp.maximum(1.0 - (stop / start) ** 2, 0.0))
        kept = jnp.sqrt(jnp.maximum(stop**2 - fresh**2, 0.0))
        return denoised + (kept / start) * (at.z - denoised), fresh, history


class AdamsBashforth(Step):
    """Explicit multistep of order 1 to 4 for dz/ds = (z - D) / s on the given, unequally spaced, levels.

    One evaluation a step. The first steps use the orders that their history allows.

    Args:
        order: 1 to 4; 1 is deterministic DDIM, 3 is what the published GenCast filter uses.

    Raises:
        ValueError: another order.
    """

    order: int = eqx.field(static=True, default=3)
    evaluations: int = eqx.field(static=True, default=1, init=False)

    def __check_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"AdamsBashforth got order={self.order}; give 1, 2, 3 or 4.")

    def coefficients(self, start: np.ndarray, stop: np.ndarray) -> dict[str, np.ndarray]:
        """Weights of the last `order` derivatives, newest first, shape (steps, order)."""
        weights = np.zeros((len(start), self.order))
        for i in range(len(start)):
            used = min(self.order, i + 1)
            # Nodes relative to the start and in units of the step: keeps the little linear system well conditioned.
            nodes = (start[i - np.arange(used)] - start[i]) / (stop[i] - start[i])
            powers = np.vander(nodes, used, increasing=True).T
            weights[i, :used] = (stop[i] - start[i]) * np.linalg.solve(powers, 1.0 / np.arange(1, used + 1))
        return {"weights": weights}

    def init(self, z: Float[Array, ...]) -> PyTree:
        """The last derivatives, newest first, shape (order, ...)."""
        return jnp.zeros((self.order, *z.shape), z.dtype)

    def __call__(self, at: StepInputs, history: PyTree, memory: Memory) -> tuple[Float[Array, ...], PyTree, Memory]:
        """One step; see `Step`."""
        z, start = at.z, at.start
        denoised, memory = at.evaluate(z, start, memory)
        history = jnp.concatenate([((z - denoised) / start)[None], history[:-1]])
        return z + jnp.tensordot(at.constants["weights"], history, 1), history, memory


class DPMSolverPP2M(Step):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2): second order, one evaluation a step."""

    order: int = eqx.field(static=True, default=2, init=False)
    evaluations: int = eqx.field(static=True, default=1, init=False)

    def coefficients(self, start: np.ndarray, stop: np.ndarray) -> dict[str, np.ndarray]:
        """Weight of the difference to the previous denoised value, 0 at the first step."""
        step = np.log(start) - np.log(stop)
        previous = np.concatenate([[np.inf], np.log(start[:-1]) - np.log(start[1:])])
        return {"extrapolation": 0.5 * step / previous}

    def init(self, z: Float[Array, ...]) -> PyTree:
        """The previous denoised value."""
        return jnp.zeros_like(z)

    def __call__(self, at: StepInputs, history: PyTree, memory: Memory) -> tuple[Float[Array, ...], PyTree, Memory]:
        """One step; see `Step`."""
        z, start, stop = at.z, at.start, at.stop
        denoised, memory = at.evaluate(z, start, memory)
        ahead = denoised + at.constants["extrapolation"] * (denoised - history)
        return ahead + (stop / start) * (z - ahead), denoised, memory


class SDEDPMSolverPP2M(StochasticStep):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Section 5): the reverse SDE to (weak) second order.

    The stochastic DPM-Solver++(2M): DDIM(eta=1), with the denoised value extrapolated to the middle of the step.
    """

    order: int = eqx.field(static=True, default=2, init=False)
    evaluations: int = eqx.field(static=True, default=1, init=False)

    def coefficients(self, start: np.ndarray, stop: np.ndarray) -> dict[str, np.ndarray]:
        """As `DPMSolverPP2M`."""
        return DPMSolverPP2M().coefficients(start, stop)

    def init(self, z: Float[Array, ...]) -> PyTree:
        """The previous denoised value."""
        return jnp.zeros_like(z)

    def law(
        self, at: StepInputs, denoised: Float[Array, ...], history: PyTree
    ) -> tuple[Float[Array, ...], Float[Array, ""], PyTree]:
        """See `StochasticStep`."""
        falls = (at.stop / at.start) ** 2
        ahead = denoised + at.constants["extrapolation"] * (denoised - history)
        return ahead + falls * (at.z - ahead), at.stop * jnp.sqrt(1.0 - falls), denoised


class DPMSolverPP2S(Step):
    """DPM-Solver++(2S) (Lu et al. 2022, Algorithm 1) with the geometric midpoint: GenCast's own; two evaluations."""

    order: int = eqx.field(static=True, default=2, init=False)
    evaluations: int = eqx.field(static=True, default=2, init=False)

    def __call__(self, at: StepInputs, history: PyTree, memory: Memory) -> tuple[Float[Array, ...], PyTree, Memory]:
        """One step; see `Step`."""
        z, start, stop = at.z, at.start, at.stop
        middle = jnp.sqrt(start * stop)
        denoised, memory = at.evaluate(z, start, memory)
        halfway = denoised + (middle / start) * (z - denoised)
        denoised, memory = at.evaluate(halfway, middle, memory)
        return denoised + (stop / start) * (z - denoised), history, memory


class Heun(Step):
    """Heun's second-order step of EDM (Karras et al. 2022, Algorithm 1); two evaluations."""

    order: int = eqx.field(static=True, default=2, init=False)
    evaluations: int = eqx.field(static=True, default=2, init=False)

    def __call__(self, at: StepInputs, history: PyTree, memory: Memory) -> tuple[Float[Array, ...], PyTree, Memory]:
        """One step; see `Step`."""
        z, start, stop = at.z, at.start, at.stop
        denoised, memory = at.evaluate(z, start, memory)
        slope = (z - denoised) / start
        euler = z + (stop - start) * slope
        denoised, memory = at.evaluate(euler, stop, memory)
        return z + 0.5 * (stop - start) * (slope + (euler - denoised) / stop), history, memory


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
        self, rng_key: PRNGKeyArray, evaluate: Evaluate, noise: Noise, z: Array, level: Array, memory: Memory
    ) -> tuple[Array, Memory]:
        """All moves at one level; returns (z, memory)."""

        def move(i: Array, carry: tuple[Array, Memory]) -> tuple[Array, Memory]:
            z, memory = carry
            denoised, memory = evaluate(z, level, memory)
            e = noise.sample(jax.random.fold_in(rng_key, i), z.shape, z.dtype)
            return z + self.tau * (denoised - z) + np.sqrt(2.0 * self.tau) * level * e, memory

        return jax.lax.fori_loop(0, self.steps, move, (z, memory))


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
    ) -> tuple[Float[Array, ...], Memory]:
        """Run the loop.

        Args:
            rng_key: for churn, corrector and stochastic steps; a deterministic sampler never uses it.
            denoiser: prior or guided denoiser.
            noise: the prior's noise.
            noise_range: the prior's (lowest, highest) noise level.
            z: the starting point at the highest level, see `initial`.

        Returns:
            (the denoised latent, the denoiser's memory after the last level).
        """

        def body(carry: tuple[Array, PyTree, Memory], c: dict[str, Array]) -> tuple[Any, None]:
            z, history, memory = carry
            churn_key, step_key, corrector_key = jax.random.split(jax.random.fold_in(rng_key, c["index"]), 3)
            if self.churn is not None:
                added = jnp.sqrt(jnp.maximum(c["start"] ** 2 - c["level"] ** 2, 0.0))
                z = z + self.churn.inflation * added * noise.sample(churn_key, z.shape, z.dtype)
            given = StepInputs(step_key, denoiser, noise, z, c["start"], c["stop"], c)
            z, history, memory = self.step(given, history, memory)
            if self.corrector is not None:
                z, memory = self.corrector(corrector_key, denoiser, noise, z, c["stop"], memory)
            return (z, history, memory), None

        start = (z, self.step.init(z), denoiser.init())
        (z, _, memory), _ = jax.lax.scan(body, start, self.constants(noise_range, z.dtype))
        return denoiser(z, jnp.asarray(self.schedule.levels(noise_range)[-1], z.dtype), memory)
