"""Guided particle filter of a NumPyro program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import require, require_program
from numpyro_diffusion_da.diffusion.guidance import MMPS, Guidance
from numpyro_diffusion_da.diffusion.linear_solve import DirectSolve
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.diffusion.schedule import KarrasSchedule
from numpyro_diffusion_da.diffusion.steps import SDEDPMSolverPP2M, Step
from numpyro_diffusion_da.filters.background import Screen, background_key, background_of_transition
from numpyro_diffusion_da.filters.base import ConditionedKernel, FilterAlgorithm, Proposal
from numpyro_diffusion_da.filters.checks import check_resampling, set_resample_below, set_sampler, set_target_ess
from numpyro_diffusion_da.filters.conditioning import with_conditioning
from numpyro_diffusion_da.filters.settings import in_full, resampling_setting, sampler_settings
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc import guided_pf
from numpyro_diffusion_da.smc.base import (
    Info,
    Kernel,
    Resampling,
    State,
    represented,
)
from numpyro_diffusion_da.smc.sharding import added

PATH_SAMPLER = Sampler(SDEDPMSolverPP2M(), KarrasSchedule(24, rho=20.0))
"""Default sampler of `GuidedPF` if the transition's own sampler does not add noise at every step."""


@dataclasses.dataclass(frozen=True, eq=False)
class GuidedPF(FilterAlgorithm):
    """Guided particle filter of a program (`smc.guided_pf`): particles are drawn with guidance, then weighed.

    Its evidence is unbiased. Each draw has a weight whose mean is p(y | c). With a diffusion these are path weights
    (`diffusion/path_weights.py`), and p is the distribution that the sampler draws from with its number of levels. With
    a transition in closed form the weights are exact.

    Args:
        model: NumPyro program with one `scan`, whose transition is a `DiffusionTransition`, `Normal` or
            `MultivariateNormal`. Observed sites may have any distribution of independent elements, or a
            `MultivariateNormal`. NaN marks a missing value.
        guidance: guidance of the draws by the observations. The default solves its linear systems exactly, which takes
            one network pass per observation at each noise level. With fewer products, as in
            `MMPS(KrylovSolve(products=4))`, the evidence remains unbiased but is noisier.
        sampler: sampler of the draws, or a bare step, with noise at every step; None for the transition's own if it has
            noise at every step, else for 24 levels of `SDEDPMSolverPP2M`.
        target_ess: effective sample size to reach by tempering, as a fraction of the particles in [0, 1); 0, the
            default, for no tempering, because tempering biases the evidence.
        resampling: function of `blackjax.smc.resampling`; None for systematic resampling.
        resample_below: fraction of the particles, from 0 to 1. Particles are resampled where their effective sample
            size is below it, and otherwise carry their weights on to the next step. The default 1 resamples at every
            step. Results hold equally weighted draws in any case.

    Raises:
        TypeError: an argument is of the wrong kind; the message names it.
        ValueError: `target_ess` is outside [0, 1); `resample_below` is outside [0, 1], or below 1 with a `target_ess`;
            or the sampler does not add noise at every step.
    """

    can_be_sharded: ClassVar[bool] = True

    model: Callable[..., Any]
    guidance: Guidance = dataclasses.field(default_factory=lambda: MMPS(DirectSolve()))
    sampler: Sampler | Step | None = None
    target_ess: float = 0.0
    resampling: Resampling | None = None
    resample_below: float = 1.0

    def __post_init__(self) -> None:
        require_program(self.model, "GuidedPF")
        require(self.guidance, Guidance, "GuidedPF", "guidance", "ndda.MMPS()")
        set_sampler(self)
        set_target_ess(self)
        set_resample_below(self)
        check_resampling(self.resampling, "GuidedPF")
        if isinstance(self.sampler, Sampler):
            self.sampler.stochastic_step()

    def _sampler(self, program: StateSpaceModel) -> Sampler:
        """Sampler of the draws, with its default filled in."""
        transition = program.structure.diffusion
        if self.sampler is None and transition is not None and transition.sampler.is_stochastic:
            return transition.sampler
        return self.sampler if isinstance(self.sampler, Sampler) else PATH_SAMPLER

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None, screen: Screen | None = None) -> Kernel:
        """Build the guided kernel of the program; `FilterAlgorithm.kernel` explains arguments and return value.

        The background is that of the transition (see `filters/background.py`). It costs network passes at some
        particles; with a `screen` it is made of unguided draws.
        """
        if screen is not None:
            return self.screened_by_draws(program, batch_size, screen)
        return self.holding_conditioning(program, batch_size)

    def conditioned_kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> ConditionedKernel:
        """Build the guided kernel for particles whose conditioning may be known; see `FilterAlgorithm`."""
        sampler = self._sampler(program)

        def propose(
            rng_key: PRNGKeyArray, particle: tuple[PyTree, PyTree | None], inputs: TimeInputs
        ) -> tuple[PyTree, Array, Proposal]:
            carry, conditioning = particle
            draw_key, record_key = jax.random.split(rng_key)
            dynamics = program.transition(carry, inputs, sampler, conditioning)
            x, log_weight, draw = dynamics.weighted_draw(draw_key, program.likelihood(carry, inputs), self.guidance)
            draw = with_conditioning(draw, program)
            sites = program.record(record_key, x, carry, inputs)
            return program.advance(x, carry, inputs), log_weight, Proposal(draw, sites)

        step = guided_pf.build_kernel(propose, self.resampling, self.target_ess, batch_size, self.resample_below)

        def kernel(
            rng_key: PRNGKeyArray, state: State, inputs: TimeInputs, conditioning: PyTree | None
        ) -> tuple[State, Info]:
            conditioned = state._replace(particles=(state.particles, conditioning))
            new, info = step(rng_key, conditioned, inputs)
            key = background_key(rng_key)
            (particles, given), moved = represented(jax.random.fold_in(key, 1), conditioned)
            background = background_of_transition(
                program, key, particles, inputs, conditioning=given, batch_size=batch_size
            )
            return new, info._replace(background=background, traffic=added(info.traffic, moved))

        return kernel

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Settings of the filter as plain values, for the attributes of a result."""
        return {
            "algorithm": "GuidedPF",
            "target_ess": self.target_ess,
            "guidance": in_full(self.guidance),
            **sampler_settings(self._sampler(program), program),
            "resampling": resampling_setting(self.resampling),
            "resample_below": self.resample_below,
        }
