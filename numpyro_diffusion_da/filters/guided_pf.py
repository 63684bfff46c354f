"""The guided particle filter of a NumPyro program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.guidance import MMPS, Guidance
from numpyro_diffusion_da.diffusion.linear_solve import DirectSolve
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.diffusion.schedule import KarrasSchedule
from numpyro_diffusion_da.diffusion.steps import SDEDPMSolverPP2M
from numpyro_diffusion_da.filters.base import FilterAlgorithm, Proposal
from numpyro_diffusion_da.filters.settings import in_full, resampling_setting, sampler_setting
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc import guided_pf
from numpyro_diffusion_da.smc.base import (
    Kernel,
    Resampling,
    check_target_ess,
)

PATH_SAMPLER = Sampler(SDEDPMSolverPP2M(), KarrasSchedule(24, rho=20.0))
"""What `GuidedPF` draws with where the transition's own sampler has not noise at every step."""


@dataclasses.dataclass(frozen=True, eq=False)
class GuidedPF(FilterAlgorithm):
    """The guided particle filter (`smc.guided_pf`): guided draws, weighed after the move; unbiased evidence.

    Each draw comes with a weight whose mean is p(y | c): for a diffusion by path weights (`path`), p being the law of
    the sampler at its number of levels; for a transition in closed form exactly.

    Args:
        model: as `FAAPF`.
        guidance: how the draw is guided. By default with exact solves, one network pass an observation at each noise
            level; fewer, as in `MMPS(KrylovSolve(products=4))`, leave the evidence unbiased, and its spread larger.
        sampler: reverse diffusion of the draw, with noise at every step. By default the transition's own where that has
            it, else 24 levels of `SDEDPMSolverPP2M`.
        target_ess: tempering, as in `FAAPF`; none by default, for it would bias the evidence.
        resampling: from `blackjax.smc.resampling`; systematic by default.

    Raises:
        ValueError: target_ess outside [0, 1), or a sampler that is not stochastic at every step.
    """

    model: Callable[..., Any]
    guidance: Guidance = dataclasses.field(default_factory=lambda: MMPS(DirectSolve()))
    sampler: Sampler | None = None
    target_ess: float = 0.0
    resampling: Resampling | None = None

    def __post_init__(self) -> None:
        check_target_ess(self.target_ess)
        if self.sampler is not None:
            self.sampler.stochastic_step()

    def _sampler(self, program: StateSpaceModel) -> Sampler:
        transition = program.diffusion()
        if self.sampler is None and transition is not None and transition.sampler.is_stochastic:
            return transition.sampler
        return PATH_SAMPLER if self.sampler is None else self.sampler

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> Kernel:
        """The guided kernel of the program."""
        sampler = self._sampler(program)

        def propose(rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs) -> tuple[PyTree, Array, Proposal]:
            draw_key, record_key = jax.random.split(rng_key)
            step = program.transition(carry, inputs, sampler)
            x, log_weight, draw = step.weighted_draw(draw_key, program.likelihood(carry, inputs), self.guidance)
            sites = program.record(record_key, x, carry, inputs)
            return program.advance(x, carry, inputs), log_weight, Proposal(draw, sites)

        return guided_pf.build_kernel(propose, self.resampling, self.target_ess, batch_size)

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Plain values."""
        return {
            "algorithm": "GuidedPF",
            "target_ess": self.target_ess,
            "guidance": in_full(self.guidance),
            "sampler": sampler_setting(self._sampler(program), program),
            "resampling": resampling_setting(self.resampling),
        }
