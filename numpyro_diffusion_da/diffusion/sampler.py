r"""Samplers for reverse diffusion, with one loop over noise levels and a choice of steps.

The probability-flow ODE of a variance-exploding diffusion is

$$
\frac{dz}{ds} = \frac{z - D(z, s)}{s} .
$$

A `Step` takes z from one noise level to the next. A `Churn` adds noise before a step, and a `LangevinCorrector` moves z
at the level after it. `Sampler` owns the loop. All of them use the noise covariance C only through draws e ~ N(0, C).
Because `s^2 C grad log p = D - z`, all three are already preconditioned by it.

After the last level the sample is D(z, s_min), an Euler step to zero noise, or what the step's `finish` makes of the
last values of D.

**Start.** At the highest level T, z_T = E[z] + T e up to terms of order 1 / T, for the prior as for a posterior. A
deterministic sampler remembers where it starts: from T e alone it ends -E[z] / T standard deviations off, at any number
of levels. `Sampler.draw` therefore evaluates D(0, T), which is E[z], and starts at the second level from D(0, T) + s e.
This takes no more evaluations than a step from the first level to the second. A sampler whose steps replace all noise
forgets its start, and starts from T e.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import count, number, require
from numpyro_diffusion_da.diffusion.denoiser import Denoiser, GuidanceState, NetworkPasses
from numpyro_diffusion_da.diffusion.noise import Noise, WhiteNoise
from numpyro_diffusion_da.diffusion.schedule import GeometricSchedule, KarrasSchedule, Schedule
from numpyro_diffusion_da.diffusion.steps import (
    DDIM,
    DPMSolverPP2M,
    Evaluate,
    Step,
    StepInputs,
    StochasticStep,
    UniPC,
)

DEFAULT_VARIANCE_ERROR = 0.025
"""Bound on `Sampler().variance_error` for every range of noise levels of two decades or more."""


def _churn(name: str, finite: bool = True) -> Callable[[Any], float | None]:
    """Converter of a setting of `Churn`."""
    return number("Churn", name, "give a number that is not negative.", least=0, finite=finite)


class Churn(eqx.Module):
    r"""Noise added before each step (EDM, Karras et al. 2022, Algorithm 2), to raise the level s to (1 + gamma) s.

    Args:
        rate: sets $\gamma = \min(\mathrm{rate} / n, \sqrt 2 - 1)$ with n the number of levels (EDM's S_churn); GenCast
            uses 2.5.
        lowest: lowest noise level with churn (EDM's S_tmin); GenCast uses 0.75.
        highest: highest noise level with churn (EDM's S_tmax).
        noise_scale: factor on the added noise (EDM's S_noise); GenCast uses 1.05.

    Raises:
        TypeError: a setting is not a number.
        ValueError: a setting is negative or NaN.
    """

    rate: float = eqx.field(static=True, default=2.5, converter=_churn("rate"))
    lowest: float = eqx.field(static=True, default=0.75, converter=_churn("lowest"))
    highest: float = eqx.field(static=True, default=float("inf"), converter=_churn("highest", finite=False))
    noise_scale: float = eqx.field(static=True, default=1.05, converter=_churn("noise_scale"))

    def raised(self, levels: np.ndarray) -> np.ndarray:
        """Return the noise level from which each step starts after churning, shape of `levels`."""
        gamma = min(self.rate / len(levels), np.sqrt(2.0) - 1.0)
        inside = (levels >= self.lowest) & (levels <= self.highest)
        return np.where(inside, (1.0 + gamma) * levels, levels)


class LangevinCorrector(eqx.Module):
    r"""Langevin moves at a noise level, after the step that reached it (Song et al. 2021, arXiv 2011.13456).

    One move is

    $$
    z \leftarrow z + \tau (D(z, s) - z) + \sqrt{2 \tau} \, s \, e, \qquad e \sim N(0, C) .
    $$

    Because $D - z = s^2 C \nabla \log p$, it is preconditioned by s^2 C. The published GenCast filter makes two moves
    per level.

    Args:
        steps: number of moves per level; each costs one denoiser evaluation.
        tau: step size, in (0, 1).

    Raises:
        ValueError: `steps` is less than 1, or tau is outside (0, 1).
    """

    steps: int = eqx.field(static=True, default=2, converter=count("LangevinCorrector", "steps"))
    tau: float = eqx.field(
        static=True,
        default=0.3,
        converter=number("LangevinCorrector", "tau", "give a number between 0 and 1.", above=0, below=1),
    )

    def __call__(
        self,
        rng_key: PRNGKeyArray,
        evaluate: Evaluate,
        noise: Noise,
        z: Array,
        level: Array,
        guidance_state: GuidanceState,
    ) -> tuple[Array, GuidanceState]:
        """Make all moves at one level.

        Args:
            rng_key: random key of the moves at this level.
            evaluate: denoiser.
            noise: noise of the prior.
            z: latent at this noise level.
            level: noise level.
            guidance_state: guidance state before the moves.

        Returns:
            (the moved latent, of the shape of `z`; guidance state after the moves).
        """

        def move(i: Array, carry: tuple[Array, GuidanceState]) -> tuple[Array, GuidanceState]:
            z, guidance_state = carry
            denoised, guidance_state = evaluate(z, level, guidance_state)
            e = noise.sample(jax.random.fold_in(rng_key, i), z.shape, z.dtype)
            return z + self.tau * (denoised - z) + np.sqrt(2.0 * self.tau) * level * e, guidance_state

        return jax.lax.fori_loop(0, self.steps, move, (z, guidance_state))


class Sampler(eqx.Module):
    """Sampler that draws a latent by running a denoiser from the highest noise level to the lowest.

    With the default step and schedule, the variance of each mode of a Gaussian is right within 3 % if the mode's
    standard deviation is from twice the lowest noise level to a fifteenth of the highest. `variance_error` gives the
    error of any sampler. `Sampler.cheap()` is the earlier default. Its variances are up to 9 % too large, and up to
    26 % too small for modes near twice the lowest level.

    Args:
        step: step from one noise level to the next.
        schedule: noise levels; by default a geometric progression over the prior's own range, 16 levels from 80 to
            0.02.
        churn: noise added before each step, or None.
        corrector: Langevin moves after each step, or None.

    Raises:
        TypeError: an argument is of the wrong kind.
    """

    step: Step = UniPC()
    schedule: Schedule = GeometricSchedule()
    churn: Churn | None = None
    corrector: LangevinCorrector | None = None

    def __check_init__(self) -> None:
        require(self.step, Step, self, "step", "ndda.diffusion.Heun()")
        require(self.schedule, Schedule, self, "schedule", "ndda.KarrasSchedule(32)")
        if self.churn is not None:
            require(self.churn, Churn, self, "churn", "ndda.diffusion.Churn()")
        if self.corrector is not None:
            require(self.corrector, LangevinCorrector, self, "corrector", "ndda.diffusion.LangevinCorrector()")

    @staticmethod
    def cheap() -> Sampler:
        """Return the earlier default: DPM-Solver++(2M) on 16 levels in EDM's form with rho = 9, whatever the range."""
        return Sampler(DPMSolverPP2M(), KarrasSchedule(16, 9.0))

    def evaluations(self, noise_range: tuple[float, float]) -> int:
        """Return how many denoiser evaluations a call takes, for a prior with this (lowest, highest) noise range."""
        return (len(self.schedule.levels(noise_range)) - 1) * self._per_step() + 1

    def draw_evaluations(self, noise_range: tuple[float, float]) -> int:
        """Return how many denoiser evaluations `draw` takes, for a prior with this (lowest, highest) noise range."""
        saved = 0 if self.forgets_start else self._per_step() - 1
        return self.evaluations(noise_range) - saved

    def _per_step(self) -> int:
        """Return the denoiser evaluations of one step with its correction."""
        return self.step.evaluations + (self.corrector.steps if self.corrector is not None else 0)

    def _starts(self, levels: np.ndarray) -> np.ndarray:
        """Return the noise levels from which steps start: those of the schedule, raised by the churn."""
        return levels if self.churn is None else self.churn.raised(levels)

    @property
    def forgets_start(self) -> bool:
        """Whether each step replaces all noise, so that the draw does not depend on where the sampler starts."""
        return self.is_stochastic and not (isinstance(self.step, DDIM) and self.step.eta < 1.0)

    @property
    def is_stochastic(self) -> bool:
        """Whether the sampler's only moves are steps with noise, which path weights need."""
        only_steps = self.churn is None and self.corrector is None
        return only_steps and isinstance(self.step, StochasticStep) and self.step.noisy

    def stochastic_step(self) -> StochasticStep:
        """Return the step of a sampler whose only moves are steps with noise, which path weights need.

        Raises:
            ValueError: the sampler is deterministic, or has a churn or a corrector.
        """
        if not self.is_stochastic:
            moves = [self.step, *(m for m in (self.churn, self.corrector) if m is not None)]
            raise ValueError(
                "path weights need a sampler whose only moves are steps with noise, and got "
                f"{' with '.join(map(repr, moves))}; give ndda.Sampler(ndda.SDEDPMSolverPP2M()), or "
                "ndda.Sampler(ndda.diffusion.DDIM(eta=1.0))."
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
        """Draw the starting point of the loop, s_max e with e ~ N(0, C).

        Args:
            rng_key: random key of the draw.
            noise: noise of the prior.
            noise_range: (lowest, highest) noise level of the prior.
            shape: shape of the latent.
            dtype: dtype of the latent.
        """
        highest = float(self.schedule.levels(noise_range)[0])
        return highest * noise.sample(rng_key, shape, jnp.zeros((), dtype).dtype)

    def constants(self, noise_range: tuple[float, float], dtype: Any, first: int = 0) -> dict[str, Array]:
        """Return the static inputs of each step: its index, level, start, stop and coefficients.

        Args:
            noise_range: (lowest, highest) noise level of the prior.
            dtype: dtype of all values except the index.
            first: index of the first step.

        Returns:
            A dictionary of arrays whose leading axis is the step.
        """
        return _as_arrays(self._constants(noise_range, first), dtype)

    def _constants(self, noise_range: tuple[float, float], first: int) -> dict[str, np.ndarray]:
        """Return the static inputs of each step in double precision; see `constants`."""
        levels = self.schedule.levels(noise_range)
        start = self._starts(levels)[first:-1]
        stop = levels[first + 1 :]
        return {
            "index": first + np.arange(len(stop)),
            "level": levels[first:-1],
            "start": start,
            "stop": stop,
            **self.step.coefficients(start, stop),
        }

    def __call__(
        self,
        rng_key: PRNGKeyArray,
        denoiser: Denoiser,
        noise: Noise,
        noise_range: tuple[float, float],
        z: Float[Array, ...],
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """Run the denoiser from the highest noise level to the lowest, from a given starting point.

        Args:
            rng_key: random key for churn, corrector and stochastic steps; a deterministic sampler does not use it.
            denoiser: prior or guided denoiser.
            noise: noise of the prior.
            noise_range: (lowest, highest) noise level of the prior.
            z: starting point at the highest level, from `initial`.

        Returns:
            (the denoised latent, of the shape of `z`; guidance state after the last level).
        """
        if self._is_one_loop:
            return self._run_one_loop(rng_key, denoiser, noise, noise_range, z, around_mean=False)
        return self._run(rng_key, denoiser, noise, noise_range, z, denoiser.init(), 0)

    def draw(
        self,
        rng_key: PRNGKeyArray,
        denoiser: Denoiser,
        noise: Noise,
        noise_range: tuple[float, float],
        shape: tuple[int, ...],
        dtype: Any = float,
        start: Float[Array, ...] | None = None,
    ) -> tuple[Float[Array, ...], GuidanceState]:
        """Draw a latent: choose the starting point around the mean, and run the denoiser to the lowest noise level.

        Args:
            rng_key: random key of the draw.
            denoiser: prior or guided denoiser.
            noise: noise of the prior.
            noise_range: (lowest, highest) noise level of the prior.
            shape: shape of the latent.
            dtype: dtype of the latent.
            start: noise s_max e to start from; None draws it by `initial` with the first key of a split of `rng_key`.

        Returns:
            (the denoised latent; guidance state after the last level).
        """
        start_key, loop_key = jax.random.split(rng_key)
        z = self.initial(start_key, noise, noise_range, shape, dtype) if start is None else start
        if self.forgets_start:
            return self(loop_key, denoiser, noise, noise_range, z)
        highest, second, *others = self.schedule.levels(noise_range)
        if self._is_one_loop and others:
            return self._run_one_loop(loop_key, denoiser, noise, noise_range, z, around_mean=True)
        # At z_s = 0, the center of N(0, s^2 C), the dependence of D on z_s (of order 1/s) cancels to first order.
        mean, guidance_state = denoiser(jnp.zeros_like(z), jnp.asarray(highest, z.dtype), denoiser.init())
        return self._run(loop_key, denoiser, noise, noise_range, mean + (second / highest) * z, guidance_state, 1)

    def _run(
        self,
        rng_key: PRNGKeyArray,
        denoiser: Denoiser,
        noise: Noise,
        noise_range: tuple[float, float],
        z: Array,
        guidance_state: GuidanceState,
        first: int,
    ) -> tuple[Array, GuidanceState]:
        """Run the loop from the level with index `first` and this guidance state; see `__call__`."""

        def body(carry: tuple[Array, PyTree, GuidanceState], c: dict[str, Array]) -> tuple[Any, None]:
            z, history, guidance_state = carry
            # The keys depend on the index of the step only, so a change of one part leaves the others' noise as it is.
            churn_key, step_key, corrector_key = jax.random.split(jax.random.fold_in(rng_key, c["index"]), 3)
            # Churn: raise the level by adding noise.
            if self.churn is not None:
                added = jnp.sqrt(jnp.maximum(c["start"] ** 2 - c["level"] ** 2, 0.0))
                z = z + self.churn.noise_scale * added * noise.sample(churn_key, z.shape, z.dtype)
            # Step to the next level.
            given = StepInputs(step_key, denoiser, noise, z, c["start"], c["stop"], c)
            z, history, guidance_state = self.step(given, history, guidance_state)
            # Correct at the new level.
            if self.corrector is not None:
                z, guidance_state = self.corrector(corrector_key, denoiser, noise, z, c["stop"], guidance_state)
            return (z, history, guidance_state), None

        constants = self.constants(noise_range, z.dtype, first)
        history = self.step.init(z)
        if len(constants["index"]):  # with two levels no step may be left, and JAX without jit has no loop of none
            (z, history, guidance_state), _ = jax.lax.scan(body, (z, history, guidance_state), constants)
        # Last step, from the lowest level to zero noise.
        levels = self.schedule.levels(noise_range)
        started = self._starts(levels)[first:-1]
        denoised, guidance_state = denoiser(z, jnp.asarray(levels[-1], z.dtype), guidance_state)
        return self.step.finish(denoised, history, np.append(started, levels[-1])), guidance_state

    @property
    def _is_one_loop(self) -> bool:
        """Whether all evaluations of the denoiser can be those of one loop over the levels."""
        return self.step.evaluates_at_start and self.churn is None and self.corrector is None

    def _run_one_loop(
        self,
        rng_key: PRNGKeyArray,
        denoiser: Denoiser,
        noise: Noise,
        noise_range: tuple[float, float],
        start: Array,
        around_mean: bool,
    ) -> tuple[Array, GuidanceState]:
        """Run the loop as `draw` (`around_mean`) or `__call__` do, with one copy of the denoiser in the program.

        The evaluations for the starting point and at the lowest level are the first and the last iteration. A guided
        denoiser is most of what is compiled for a filter, and each further copy takes as long again.
        """
        levels = self.schedule.levels(noise_range)
        first = 1 if around_mean else 0
        # An iteration that takes no step has the constants of its neighbor, and its step is not used.
        rows = np.concatenate([np.zeros(first, int), np.arange(len(levels) - 1 - first), [-1]])
        kind = np.concatenate([np.zeros(first), np.ones(len(levels) - 1 - first), [2]])

        def body(
            carry: tuple[Array, PyTree, GuidanceState, Array], c: tuple[Array, Array, dict[str, Array]]
        ) -> tuple[Any, None]:
            z, history, guidance_state, _ = carry
            kind, level, constants = c
            denoised, guidance_state = denoiser(z, level, guidance_state)
            step_key = jax.random.split(jax.random.fold_in(rng_key, constants["index"]), 3)[1]

            # The step evaluates the denoiser where it has just been evaluated.
            def known(z: Array, level: Array, guidance_state: GuidanceState) -> tuple[Array, GuidanceState]:
                return denoised, guidance_state

            given = StepInputs(step_key, known, noise, z, constants["start"], constants["stop"], constants)
            moved, kept, _ = self.step(given, history, guidance_state)
            history = jax.tree.map(lambda new, old: jnp.where(kind == 1, new, old), kept, history)
            if around_mean:
                moved = jnp.where(kind == 0, denoised + float(levels[1] / levels[0]) * start, moved)
            return (moved, history, guidance_state, denoised), None

        # At z_s = 0, the center of N(0, s^2 C), the dependence of D on z_s (of order 1/s) cancels to first order.
        z = jnp.zeros_like(start) if around_mean else start
        carry = z, self.step.init(z), denoiser.init(), jnp.zeros_like(z)
        steps = {name: values[rows] for name, values in self._constants(noise_range, first).items()}
        over = jnp.asarray(kind, jnp.int32), jnp.asarray(levels, z.dtype), _as_arrays(steps, z.dtype)
        (_, history, guidance_state, denoised), _ = jax.lax.scan(body, carry, over)
        return self.step.finish(denoised, history, levels[first:]), guidance_state

    def variance_ratio(self, noise_range: tuple[float, float], variances: np.ndarray) -> np.ndarray:
        """Return the variance of draws divided by the right one, for modes of a Gaussian with these variances.

        It is computed for exact denoisers, and thus for exact solves of the guidance. The modes are those of the
        covariance of the latent, relative to the covariance C of the noise.

        Args:
            noise_range: (lowest, highest) noise level of the prior.
            variances: variances of the modes, shape (n,), in the unit of the latent.

        Raises:
            ValueError: the sampler has noise other than that of the start, so that its draws are no function of it.
        """
        if not self._has_function_of_start:
            raise ValueError(_NOT_OF_START)
        noise = _Ones([])

        def ratios(p: Array) -> Array:
            ends, _ = self.draw(jax.random.key(0), _Modes(p), noise, noise_range, p.shape, p.dtype)
            return ends**2 / p

        # Compiled ahead, so that it also gives numbers inside a JAX trace.
        p = np.asarray(variances, jax.dtypes.canonicalize_dtype(float))
        found = np.asarray(jax.jit(ratios).lower(jax.ShapeDtypeStruct(p.shape, p.dtype)).compile()(p))
        if len(noise.shapes) > 1:  # a part of the sampler draws noise that the checks above do not know of
            raise ValueError(_NOT_OF_START)
        return found

    def variance_error(
        self, noise_range: tuple[float, float], spreads: tuple[float, float] | None = None
    ) -> tuple[float, float, float] | None:
        """Return how far variances of draws are off at most, and for which standard deviations this holds.

        Args:
            noise_range: (lowest, highest) noise level of the prior.
            spreads: (smallest, largest) standard deviation of the modes, in the unit of the latent; None for those of
                `resolved`.

        Returns:
            (largest relative error of the variance of a mode of a Gaussian; the smallest and the largest standard
            deviation of the modes); None for a sampler that adds noise.
        """
        smallest, largest = self.resolved(noise_range) if spreads is None else spreads
        try:
            ratios = self.variance_ratio(noise_range, np.geomspace(smallest, largest, 25) ** 2)
        except ValueError:  # the sampler adds noise
            return None
        return float(np.max(np.abs(ratios - 1.0))), float(smallest), float(largest)

    def resolved(self, noise_range: tuple[float, float]) -> tuple[float, float]:
        """Return (smallest, largest) standard deviation of the modes for which the sampler's error is stated.

        They are twice the lowest noise level and a fifteenth of the highest, in the unit of the latent.

        Args:
            noise_range: (lowest, highest) noise level of the prior.
        """
        levels = self.schedule.levels(noise_range)
        return float(2.0 * levels[-1]), float(max(levels[0] / 15.0, 2.0 * levels[-1]))

    @property
    def _has_function_of_start(self) -> bool:
        """Whether a draw is a function of the starting noise."""
        noisy = isinstance(self.step, StochasticStep) and self.step.noisy
        return not noisy and self.churn is None and self.corrector is None


_NOT_OF_START = "variance_ratio needs a deterministic sampler, without churn, corrector or noisy steps."


def _as_arrays(static: dict[str, np.ndarray], dtype: Any) -> dict[str, Array]:
    """Return static inputs of steps as JAX arrays, the index as a whole number."""
    return {name: jnp.asarray(v, jnp.int32 if name == "index" else dtype) for name, v in static.items()}


class _Modes(Denoiser):
    """Denoiser of independent centered Gaussian modes under white noise.

    Attributes:
        variances: variances of the modes.
    """

    variances: Float[Array, " n"]

    def init(self) -> GuidanceState:
        """Return an empty guidance state."""
        return GuidanceState(NetworkPasses.of(), (), jnp.zeros(()))

    def __call__(
        self, z_s: Float[Array, " n"], noise_level: Float[Array, ""], guidance_state: GuidanceState
    ) -> tuple[Float[Array, " n"], GuidanceState]:
        """Return p / (p + s^2) z_s, with p the variances."""
        return self.variances / (self.variances + noise_level**2) * z_s, guidance_state


class _Ones(WhiteNoise):
    """Noise that is 1 everywhere, so that a draw is the factor by which a sampler multiplies its noise.

    Attributes:
        shapes: shapes of all draws so far.
    """

    shapes: list[tuple[int, ...]] = eqx.field(static=True)

    def sample(self, rng_key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = float) -> Float[Array, ...]:
        """Return an array of ones in place of the noise, and note its shape."""
        self.shapes.append(shape)
        return jnp.ones(shape, dtype)


def as_sampler(value: Sampler | Step, owner: Any) -> Sampler:
    """Return a sampler; a bare step becomes the sampler with that step and everything else at its default.

    Args:
        value: a sampler or a step.
        owner: the object that got it, for the message.

    Raises:
        TypeError: `value` is neither a sampler nor a step.
    """
    require(value, (Sampler, Step), owner, "sampler", "ndda.Sampler(ndda.diffusion.Heun(), ndda.KarrasSchedule(32))")
    return Sampler(value) if isinstance(value, Step) else value
