"""Steps of reverse diffusion, each from one noise level to the next."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import count, number
from numpyro_diffusion_da.diffusion.denoiser import GuidanceState
from numpyro_diffusion_da.diffusion.noise import Noise

Evaluate = Callable[[Array, Array, GuidanceState], tuple[Array, GuidanceState]]
"""Type of a denoiser: (z_s, noise level, guidance state) -> (denoised value, guidance state)."""


class StepInputs(NamedTuple):
    """Inputs of one step.

    Attributes:
        rng_key: random key, for a stochastic step.
        evaluate: denoiser.
        noise: noise of the prior.
        z: latent at noise level `start`.
        start: noise level at the start of the step.
        stop: noise level at the end of the step.
        constants: values of `Step.coefficients` for this step.
    """

    rng_key: PRNGKeyArray
    evaluate: Evaluate
    noise: Noise
    z: Float[Array, ...]
    start: Float[Array, ""]
    stop: Float[Array, ""]
    constants: dict[str, Array]


class Step(eqx.Module):
    """Abstract step from one noise level to the next.

    Attributes:
        order: order of convergence in the number of levels.
        evaluations: denoiser evaluations per step.
        evaluates_at_start: whether the only evaluation of a step is that of `at.z` at `at.start`. A sampler then
            compiles the denoiser once for all its levels. False is always right.
    """

    order: eqx.AbstractVar[int]
    evaluations: eqx.AbstractVar[int]
    evaluates_at_start: ClassVar[bool] = False

    def coefficients(self, start: np.ndarray, stop: np.ndarray) -> dict[str, np.ndarray]:
        """Compute constants of every step in double precision; by default there are none.

        Args:
            start: noise levels at which the steps start, shape (steps,).
            stop: noise levels at which the steps end, shape (steps,).

        Returns:
            A dictionary of arrays whose leading axis is the step.
        """
        return {}

    def init(self, z: Float[Array, ...]) -> PyTree:
        """Return the history before the first step; by default it is empty.

        The history is what a multistep method keeps of the levels before.
        """
        return ()

    def finish(self, denoised: Float[Array, ...], history: PyTree, levels: np.ndarray) -> Float[Array, ...]:
        """Take the last step, from the lowest noise level to zero; by default this is the denoised value itself.

        Args:
            denoised: denoised value at the lowest level.
            history: history from the step before.
            levels: noise levels at which the steps started, and the lowest level, shape (steps + 1,).

        Returns:
            The sample, of the shape of `denoised`.
        """
        return denoised

    @abc.abstractmethod
    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """Move `at.z` from noise level `at.start` to `at.stop`.

        Args:
            at: inputs of this step.
            history: history from the step before, or from `init`.
            guidance_state: guidance state before this step.

        Returns:
            (latent at `at.stop`, of the shape of `at.z`; next history; guidance state after this step).
        """


class StochasticStep(Step):
    """Abstract step that adds noise, with one denoiser evaluation at its start.

    Given the past, the next latent has the distribution N(mean, spread^2 C).
    """

    evaluates_at_start: ClassVar[bool] = True

    @property
    def noisy(self) -> bool:
        """Whether the spread is positive at every step."""
        return True

    @abc.abstractmethod
    def law(
        self, at: StepInputs, denoised: Float[Array, ...], history: PyTree
    ) -> tuple[Float[Array, ...], Float[Array, ""], PyTree]:
        """Return the distribution N(mean, spread^2 C) of the next latent.

        Args:
            at: inputs of this step.
            denoised: denoised value at `at.z` and `at.start`.
            history: history from the step before, or from `init`.

        Returns:
            (mean, of the shape of `at.z`; spread, a scalar; next history).
        """

    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """Draw the latent at `at.stop`, and return it with the next history and guidance state."""
        denoised, guidance_state = at.evaluate(at.z, at.start, guidance_state)
        z, spread, history = self.law(at, denoised, history)
        if self.noisy:
            z = z + spread * at.noise.sample(at.rng_key, z.shape, z.dtype)
        return z, history, guidance_state


class DDIM(StochasticStep):
    """DDIM step (Song et al. 2021, arXiv 2010.02502, eq. 12) in the variance-exploding form, of first order.

    Args:
        eta: amount of noise; 0 is the deterministic sampler (the Euler step of the ODE), 1 the ancestral sampler.

    Raises:
        ValueError: eta is outside [0, 1].
    """

    eta: float = eqx.field(
        static=True,
        default=0.0,
        converter=number("DDIM", "eta", "give a number from 0 (deterministic) to 1 (ancestral).", least=0, most=1),
    )
    order: int = eqx.field(static=True, default=1, init=False)
    evaluations: int = eqx.field(static=True, default=1, init=False)

    @property
    def noisy(self) -> bool:
        """Whether eta > 0, so that every step adds noise."""
        return self.eta > 0.0

    def law(
        self, at: StepInputs, denoised: Float[Array, ...], history: PyTree
    ) -> tuple[Float[Array, ...], Float[Array, ""], PyTree]:
        """Return (mean, spread, history) of the next latent; the history stays empty."""
        start, stop = at.start, at.stop
        fresh = self.eta * stop * jnp.sqrt(jnp.maximum(1.0 - (stop / start) ** 2, 0.0))
        kept = jnp.sqrt(jnp.maximum(stop**2 - fresh**2, 0.0))
        return denoised + (kept / start) * (at.z - denoised), fresh, history


class AdamsBashforth(Step):
    """Explicit multistep method of order 1 to 4 for dz/ds = (z - D) / s, on the given, unequally spaced, noise levels.

    One step costs one denoiser evaluation. The first steps use the order that their history allows.

    Args:
        order: 1, 2, 3 or 4. Order 1 is deterministic DDIM; the published GenCast filter uses 3.

    Raises:
        ValueError: order is another number.
    """

    order: int = eqx.field(static=True, default=3, converter=count("AdamsBashforth", "order"))
    evaluations: int = eqx.field(static=True, default=1, init=False)
    evaluates_at_start: ClassVar[bool] = True

    def __check_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"AdamsBashforth got order={self.order}; give 1, 2, 3 or 4.")

    def coefficients(self, start: np.ndarray, stop: np.ndarray) -> dict[str, np.ndarray]:
        """Return the weights of the last `order` derivatives, newest first, shape (steps, order)."""
        weights = np.zeros((len(start), self.order))
        for i in range(len(start)):
            used = min(self.order, i + 1)
            # Nodes relative to the start and in units of the step, to keep the small linear system well conditioned.
            nodes = (start[i - np.arange(used)] - start[i]) / (stop[i] - start[i])
            powers = np.vander(nodes, used, increasing=True).T
            weights[i, :used] = (stop[i] - start[i]) * np.linalg.solve(powers, 1.0 / np.arange(1, used + 1))
        return {"weights": weights}

    def init(self, z: Float[Array, ...]) -> PyTree:
        """Return zeros in place of the last derivatives, newest first, shape (order, ...)."""
        return jnp.zeros((self.order, *z.shape), z.dtype)

    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """Move `at.z` to `at.stop`, and return it with the last derivatives and the next guidance state."""
        z, start = at.z, at.start
        denoised, guidance_state = at.evaluate(z, start, guidance_state)
        history = jnp.concatenate([((z - denoised) / start)[None], history[:-1]])
        return z + jnp.tensordot(at.constants["weights"], history, 1), history, guidance_state


class DPMSolverPP2M(Step):
    """DPM-Solver++(2M) step (Lu et al. 2022, arXiv 2211.01095, Algorithm 2), a multistep method of second order.

    One step costs one denoiser evaluation.
    """

    order: int = eqx.field(static=True, default=2, init=False)
    evaluations: int = eqx.field(static=True, default=1, init=False)
    evaluates_at_start: ClassVar[bool] = True

    def coefficients(self, start: np.ndarray, stop: np.ndarray) -> dict[str, np.ndarray]:
        """Return the weight of the difference from the previous denoised value, shape (steps,); 0 at the first step."""
        step = np.log(start) - np.log(stop)
        previous = np.concatenate([[np.inf], np.log(start[:-1]) - np.log(start[1:])])
        return {"extrapolation": 0.5 * step / previous}

    def init(self, z: Float[Array, ...]) -> PyTree:
        """Return zeros in place of the previous denoised value, of the shape of `z`."""
        return jnp.zeros_like(z)

    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """Move `at.z` to `at.stop`, and return it with the denoised value and the next guidance state."""
        z, start, stop = at.z, at.start, at.stop
        denoised, guidance_state = at.evaluate(z, start, guidance_state)
        ahead = denoised + at.constants["extrapolation"] * (denoised - history)
        return ahead + (stop / start) * (z - ahead), denoised, guidance_state


class SDEDPMSolverPP2M(StochasticStep):
    """SDE-DPM-Solver++(2M) step (Lu et al. 2022, arXiv 2211.01095, Section 5) for the reverse SDE.

    It is of second weak order, and the stochastic form of `DPMSolverPP2M`: a step of `DDIM(eta=1)` with the denoised
    value extrapolated to the middle of the step. One step costs one denoiser evaluation.
    """

    order: int = eqx.field(static=True, default=2, init=False)
    evaluations: int = eqx.field(static=True, default=1, init=False)

    def coefficients(self, start: np.ndarray, stop: np.ndarray) -> dict[str, np.ndarray]:
        """Return the weight of the difference from the previous denoised value, shape (steps,); 0 at the first step."""
        return DPMSolverPP2M().coefficients(start, stop)

    def init(self, z: Float[Array, ...]) -> PyTree:
        """Return zeros in place of the previous denoised value, of the shape of `z`."""
        return jnp.zeros_like(z)

    def law(
        self, at: StepInputs, denoised: Float[Array, ...], history: PyTree
    ) -> tuple[Float[Array, ...], Float[Array, ""], PyTree]:
        """Return (mean, spread, history) of the next latent; the history is the denoised value."""
        falls = (at.stop / at.start) ** 2
        ahead = denoised + at.constants["extrapolation"] * (denoised - history)
        return ahead + falls * (at.z - ahead), at.stop * jnp.sqrt(1.0 - falls), denoised


class UniPC(Step):
    r"""Predictor and corrector of third order that need one denoiser evaluation per step.

    This is a member of the family of UniPC (Zhao et al. 2023, arXiv 2302.04867). The probability-flow ODE is

    $$
    \frac{d (z / s)}{d (1 / s)} = D(z, s) .
    $$

    A step replaces D by a polynomial through its last three values, and integrates it exactly over 1 / s. After the
    next evaluation, the step is repeated with the polynomial that goes through the new value too. The polynomials are
    in $\log (s^2 + c^2)$, with c = 1.6 times the lowest level. Far above c this is log s, the variable of
    DPM-Solver++. Below c it is a function of s^2, as D is, so the last polynomial also gives D at zero noise: the last
    step is of the same order, where other samplers take D at the lowest level.

    A mode of a Gaussian with variance p gets the variance p with an error below 3 % if its standard deviation is from
    twice the lowest level to a fifteenth of the highest and consecutive levels have a ratio of at most 1.75
    (`GeometricSchedule`).
    """

    order: int = eqx.field(static=True, default=3, init=False)
    evaluations: int = eqx.field(static=True, default=1, init=False)
    evaluates_at_start: ClassVar[bool] = True

    def coefficients(self, start: np.ndarray, stop: np.ndarray) -> dict[str, np.ndarray]:
        """Return the weights of the last denoised values, newest first, shape (steps, 3).

        `predictor` is the average of D over the step, and `corrector` that of the step before. The corrector is zero
        at the first step, and where noise was added since.
        """
        predictor, corrector = np.zeros((len(start), 3)), np.zeros((len(start), 3))
        applies = np.zeros(len(start))
        lowest = stop[-1] if len(stop) else 1.0
        for i in range(len(start)):
            nodes = start[max(i - 2, 0) : i + 1][::-1]
            predictor[i, : len(nodes)] = _average_weights(nodes, start[i], stop[i], lowest)
            if i > 0 and start[i] == stop[i - 1]:
                corrector[i, : len(nodes)] = _average_weights(nodes, start[i - 1], stop[i - 1], lowest)
                applies[i] = 1.0 - stop[i - 1] / start[i - 1]
        return {"predictor": predictor, "corrector": corrector, "applies": applies}

    def init(self, z: Float[Array, ...]) -> PyTree:
        """Return zeros in place of the last two denoised values, and of the average of D in the last step."""
        return jnp.zeros((2, *z.shape), z.dtype), jnp.zeros_like(z)

    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """Correct `at.z`, move it to `at.stop`, and return it with the last values of D and the next guidance state."""
        earlier, assumed = history
        denoised, guidance_state = at.evaluate(at.z, at.start, guidance_state)
        values = jnp.concatenate([denoised[None], earlier])
        average = jnp.tensordot(at.constants["corrector"], values, 1)
        z = at.z + at.constants["applies"] * (average - assumed)
        ahead = jnp.tensordot(at.constants["predictor"], values, 1)
        return ahead + (at.stop / at.start) * (z - ahead), (values[:2], ahead), guidance_state

    def finish(self, denoised: Float[Array, ...], history: PyTree, levels: np.ndarray) -> Float[Array, ...]:
        """Return the polynomial through the last three denoised values, at zero noise."""
        nodes = levels[-3:][::-1]
        weights = np.zeros(3)
        weights[: len(nodes)] = _average_weights(nodes, levels[-1], 0.0, levels[-1])
        return jnp.tensordot(jnp.asarray(weights, denoised.dtype), jnp.concatenate([denoised[None], history[0]]), 1)


def _average_weights(nodes: np.ndarray, start: float, stop: float, lowest: float) -> np.ndarray:
    """Return the weights of values at `nodes` in the average of their polynomial over 1 / s, from start to stop.

    The polynomial is in log(s^2 + c^2) with c = 1.6 `lowest`. For stop = 0 the average is the value at zero noise.
    """

    def variable(s: np.ndarray) -> np.ndarray:
        return np.log((s**2 + (1.6 * lowest) ** 2) / (start**2 + (1.6 * lowest) ** 2))

    powers = np.arange(len(nodes))
    if stop == 0:
        right = variable(np.zeros(1)) ** powers
    else:
        # Gauss-Legendre quadrature in log s, with the weight 1 / s of the average.
        x, w = np.polynomial.legendre.leggauss(16)
        s = np.sqrt(start * stop) * (stop / start) ** (0.5 * x)
        right = variable(s)[None, :] ** powers[:, None] @ (w / s) / np.sum(w / s)
    return np.linalg.solve(variable(nodes)[None, :] ** powers[:, None], right)


class DPMSolverPP2S(Step):
    """DPM-Solver++(2S) step (Lu et al. 2022, arXiv 2211.01095, Algorithm 1) with the geometric midpoint.

    GenCast uses it. It is of second order. One step costs two denoiser evaluations.
    """

    order: int = eqx.field(static=True, default=2, init=False)
    evaluations: int = eqx.field(static=True, default=2, init=False)

    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """Move `at.z` to `at.stop`, and return it with the empty history and the next guidance state."""
        z, start, stop = at.z, at.start, at.stop
        middle = jnp.sqrt(start * stop)
        denoised, guidance_state = at.evaluate(z, start, guidance_state)
        halfway = denoised + (middle / start) * (z - denoised)
        denoised, guidance_state = at.evaluate(halfway, middle, guidance_state)
        return denoised + (stop / start) * (z - denoised), history, guidance_state


class Heun(Step):
    """Heun step of EDM (Karras et al. 2022, Algorithm 1), of second order.

    One step costs two denoiser evaluations.
    """

    order: int = eqx.field(static=True, default=2, init=False)
    evaluations: int = eqx.field(static=True, default=2, init=False)

    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """Move `at.z` to `at.stop`, and return it with the empty history and the next guidance state."""
        z, start, stop = at.z, at.start, at.stop
        denoised, guidance_state = at.evaluate(z, start, guidance_state)
        slope = (z - denoised) / start
        euler = z + (stop - start) * slope
        denoised, guidance_state = at.evaluate(euler, stop, guidance_state)
        return z + 0.5 * (stop - start) * (slope + (euler - denoised) / stop), history, guidance_state
