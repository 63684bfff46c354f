"""Bootstrap particle filter of a NumPyro program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import require_program
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.diffusion.steps import Step
from numpyro_diffusion_da.filters.background import Drawn, Screen, background_key, background_of_draws, screened
from numpyro_diffusion_da.filters.base import FilterAlgorithm, Proposal
from numpyro_diffusion_da.filters.checks import check_resampling, set_resample_below, set_sampler, set_target_ess
from numpyro_diffusion_da.filters.settings import resampling_setting, sampler_settings
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc import bootstrap
from numpyro_diffusion_da.smc.base import (
    Info,
    Kernel,
    Resampling,
    State,
    map_particles,
    particle_keys,
    represented,
    total_particles,
)
from numpyro_diffusion_da.smc.sharding import added, own
from numpyro_diffusion_da.transition.base import DrawRecord


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
        resample_below: fraction of the particles, from 0 to 1. Particles are resampled where their effective sample
            size is below it, and otherwise carry their weights on to the next step. The default 1 resamples at every
            step. Results hold equally weighted draws in any case.

    Raises:
        TypeError: an argument is of the wrong kind; the message names it.
        ValueError: `target_ess` is outside [0, 1), `resample_below` is outside [0, 1], or weights are to be tempered
            and carried on.
    """

    can_be_sharded: ClassVar[bool] = True
    needs_gaussian: ClassVar[bool] = False

    model: Callable[..., Any]
    target_ess: float = 0.0
    sampler: Sampler | Step | None = None
    resampling: Resampling | None = None
    resample_below: float = 1.0

    def __post_init__(self) -> None:
        require_program(self.model, "Bootstrap")
        set_target_ess(self)
        set_resample_below(self)
        set_sampler(self)
        check_resampling(self.resampling, "Bootstrap")

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None, screen: Screen | None = None) -> Kernel:
        """Build the bootstrap kernel of the program; `FilterAlgorithm.kernel` explains arguments and return value.

        The background is made of the draws, before they are weighed.
        """

        def draw(rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs) -> tuple[Array, DrawRecord]:
            return program.draw(jax.random.split(rng_key)[0], carry, inputs, self.sampler)

        def propose(
            used: StateSpaceModel, rng_key: PRNGKeyArray, particle: Drawn, inputs: TimeInputs
        ) -> tuple[PyTree, Proposal]:
            sites = used.record(jax.random.split(rng_key)[1], particle.x, particle.carry, inputs)
            return used.advance(particle.x, particle.carry, inputs), Proposal(particle.record, sites)

        def log_likelihood(carry: PyTree, proposal: Proposal, inputs: TimeInputs) -> Array:
            return jnp.sum(jnp.stack([jnp.sum(v) for v in proposal.sites["log_likelihood"].values()]))

        def kernel(rng_key: PRNGKeyArray, state: State, inputs: TimeInputs) -> tuple[State, Info]:
            # The draws, with the keys that the kernel gives to `propose`.
            n = total_particles(state.particles)
            keys = own(particle_keys(jax.random.split(rng_key)[1], n))
            x, record = map_particles(lambda key, carry: draw(key, carry, inputs), batch_size)(keys, state.particles)
            drawn = state._replace(particles=(x, state.particles))
            (members, before), moved = represented(background_key(rng_key), drawn)
            sites = background_of_draws(program, members, before, inputs, n, batch_size)
            used, said = screened(screen, program, sites, state.particles, inputs)
            step = bootstrap.build_kernel(
                functools.partial(propose, used),
                log_likelihood,
                self.resampling,
                self.target_ess,
                batch_size,
                self.resample_below,
            )
            new, info = step(rng_key, state._replace(particles=Drawn(state.particles, x, record)), inputs)
            return new, info._replace(**said, traffic=added(info.traffic, moved))

        return kernel

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Settings of the filter as plain values, for the attributes of a result."""
        return {
            "algorithm": "Bootstrap",
            "target_ess": self.target_ess,
            **sampler_settings(self.sampler, program),
            "resampling": resampling_setting(self.resampling),
            "resample_below": self.resample_below,
        }
