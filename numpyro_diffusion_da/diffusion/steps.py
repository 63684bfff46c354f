"""Steps of reverse diffusion, from one noise level to the next."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.denoiser import GuidanceState
from numpyro_diffusion_da.diffusion.noise import Noise

Evaluate = Callable[[Array, Array, GuidanceState], tuple[Array, GuidanceState]]
"""A denoiser's call: (z_s, noise level, guidance_state) -> (denoised, guidance_state)."""


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
    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """Move `at.z` from noise level `at.start` to `at.stop`; returns (z, history, guidance_state)."""


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

    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """One step; see `Step`."""
        denoised, guidance_state = at.evaluate(at.z, at.start, guidance_state)
        z, spread, history = self.law(at, denoised, history)
        if self.noisy:
            z = z + spread * at.noise.sample(at.rng_key, z.shape, z.dtype)
        return z, history, guidance_state


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

    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """One step; see `Step`."""
        z, start = at.z, at.start
        denoised, guidance_state = at.evaluate(z, start, guidance_state)
        history = jnp.concatenate([((z - denoised) / start)[None], history[:-1]])
        return z + jnp.tensordot(at.constants["weights"], history, 1), history, guidance_state


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

    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """One step; see `Step`."""
        z, start, stop = at.z, at.start, at.stop
        denoised, guidance_state = at.evaluate(z, start, guidance_state)
        ahead = denoised + at.constants["extrapolation"] * (denoised - history)
        return ahead + (stop / start) * (z - ahead), denoised, guidance_state


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

    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """One step; see `Step`."""
        z, start, stop = at.z, at.start, at.stop
        middle = jnp.sqrt(start * stop)
        denoised, guidance_state = at.evaluate(z, start, guidance_state)
        halfway = denoised + (middle / start) * (z - denoised)
        denoised, guidance_state = at.evaluate(halfway, middle, guidance_state)
        return denoised + (stop / start) * (z - denoised), history, guidance_state


class Heun(Step):
    """Heun's second-order step of EDM (Karras et al. 2022, Algorithm 1); two evaluations."""

    order: int = eqx.field(static=True, default=2, init=False)
    evaluations: int = eqx.field(static=True, default=2, init=False)

    def __call__(
        self, at: StepInputs, history: PyTree, guidance_state: GuidanceState
    ) -> tuple[Float[Array, ...], PyTree, GuidanceState]:
        """One step; see `Step`."""
        z, start, stop = at.z, at.start, at.stop
        denoised, guidance_state = at.evaluate(z, start, guidance_state)
        slope = (z - denoised) / start
        euler = z + (stop - start) * slope
        denoised, guidance_state = at.evaluate(euler, stop, guidance_state)
        return z + 0.5 * (stop - start) * (slope + (euler - denoised) / stop), history, guidance_state
