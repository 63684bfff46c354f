"""Bootstrap particle filter of a NumPyro program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import require_program
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.diffusion.steps import Step
from numpyro_diffusion_da.filters.base import FilterAlgorithm, Proposal
from numpyro_diffusion_da.filters.checks import check_resampling, set_sampler
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
    """Bootstrap particle filter of a program (`smc.bootstrap`): particles are drawn without guidance, then weighed.

    Args:
        model: NumPyro program with one `scan`, any transition that can be sampled, and any likelihood with a
            `log_prob`. NaN marks a missing value.
        target_ess: effective sample size to reach by tempering, as a fraction of the particles in [0, 1); 0, the
            default, for no tempering, because tempering biases the evidence.
        sampler: sampler of the draws of a diffusion, or a bare step such as `ndda.diffusion.DDIM()`; None for the
            transition's own.
        resampling: function of `blackjax.smc.resampling`; None for systematic resampling.

    Raises:
        TypeError: an argument is of the wrong kind; the message names it.
        ValueError: `target_ess` is outside [0, 1).
    """

    needs_gaussian: ClassVar[bool] = False

    model: Callable[..., Any]
    target_ess: float = 0.0
    sampler: Sampler | Step | None = None
    resampling: Resampling | None = None

    def __post_init__(self) -> None:
        require_program(self.model, "Bootstrap")
        check_target_ess(self.target_ess, "Bootstrap")
        set_sampler(self)
        check_resampling(self.resampling, "Bootstrap")

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> Kernel:
        """Build the bootstrap kernel of the program; `FilterAlgorithm.kernel` explains arguments and return value."""

        def propose(rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs) -> tuple[PyTree, Proposal]:
            draw_key, record_key = jax.random.split(rng_key)
            x, draw = program.draw(draw_key, carry, inputs, self.sampler)
            sites = program.record(record_key, x, carry, inputs)
            return program.advance(x, carry, inputs), Proposal(draw, sites)

        def log_likelihood(carry: PyTree, proposal: Proposal, inputs: TimeInputs) -> Array:
            return jnp.sum(jnp.stack([jnp.sum(v) for v in proposal.sites["log_likelihood"].values()]))

        return bootstrap.build_kernel(propose, log_likelihood, self.resampling, self.target_ess, batch_size)

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Settings of the filter as plain values, for the attributes of a result."""
        return {
            "algorithm": "Bootstrap",
            "target_ess": self.target_ess,
            "sampler": sampler_setting(self.sampler, program),
            "resampling": resampling_setting(self.resampling),
        }
