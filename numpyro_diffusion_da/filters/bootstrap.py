"""The bootstrap particle filter of a NumPyro program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.filters.base import FilterAlgorithm, Proposal
from numpyro_diffusion_da.filters.settings import resampling_setting, sampler_setting
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc import bootstrap
from numpyro_diffusion_da.smc.base import (
    Kernel,
    Resampling,
    check_target_ess,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Bootstrap(FilterAlgorithm):
    """The bootstrap particle filter (`smc.bootstrap`) on the same program: unguided draws, weighed afterwards.

    Args:
        model: as `FAAPF`, but with any transition that can be sampled and any likelihood with a log_prob.
        target_ess: tempering, as in `FAAPF`; none by default.
        sampler: reverse diffusion of the draw; by default the transition's own.
        resampling: from `blackjax.smc.resampling`; systematic by default.

    Raises:
        ValueError: target_ess outside [0, 1).
    """

    needs_gaussian: ClassVar[bool] = False

    model: Callable[..., Any]
    target_ess: float = 0.0
    sampler: Sampler | None = None
    resampling: Resampling | None = None

    def __post_init__(self) -> None:
        check_target_ess(self.target_ess)

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> Kernel:
        """The bootstrap kernel of the program."""

        def propose(rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs) -> tuple[PyTree, Proposal]:
            draw_key, record_key = jax.random.split(rng_key)
            x, draw = program.draw(draw_key, carry, inputs, self.sampler)
            sites = program.record(record_key, x, carry, inputs)
            return program.advance(x, carry, inputs), Proposal(draw, sites)

        def log_likelihood(carry: PyTree, proposal: Proposal, inputs: TimeInputs) -> Array:
            return jnp.sum(jnp.stack([jnp.sum(v) for v in proposal.sites["log_likelihood"].values()]))

        return bootstrap.build_kernel(propose, log_likelihood, self.resampling, self.target_ess, batch_size)

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Plain values."""
        return {
            "algorithm": "Bootstrap",
            "target_ess": self.target_ess,
            "sampler": sampler_setting(self.sampler, program),
            "resampling": resampling_setting(self.resampling),
        }
