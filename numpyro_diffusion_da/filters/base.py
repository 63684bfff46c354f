"""From a NumPyro program to a filter kernel: what `Filter` runs.

Each class here takes a program and its own settings, and builds the kernel of the `smc` module of its name, giving it
the program's transition and likelihood. The kernels' "observation" is `TimeInputs`: the scan's slice at one time.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.base import (
    Info,
    Kernel,
    map_particles,
    num_particles,
    particle_keys,
)
from numpyro_diffusion_da.transition.base import DrawRecord


class Proposal(NamedTuple):
    """What a filter keeps of each new particle.

    Attributes:
        draw: network passes and solver residual of the draw.
        sites: values by group and site, see `StateSpaceModel.record`.
    """

    draw: DrawRecord
    sites: dict[str, dict[str, Array]]


class FilterAlgorithm(abc.ABC):
    """A program with the settings of one filter."""

    model: Callable[..., Any]
    needs_gaussian: ClassVar[bool] = True
    """Whether the transition must be a diffusion or Gaussian, and the likelihood one that can guide."""
    needs_gaussian_errors: ClassVar[bool] = False
    """Whether all observed sites must be Gaussian."""
    target_ess: float = 0.0
    """Effective sample size that tempering aims at, as a fraction of the particles; 0 for no tempering."""
    sampler: Sampler | None = None
    """Reverse diffusion of the filter's draws; None for the transition's own."""

    @abc.abstractmethod
    def kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> Kernel:
        """The program's kernel: (rng_key, state, TimeInputs) -> (State, Info), `info.proposal` being a `Proposal`."""

    @abc.abstractmethod
    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """The settings in plain values, defaults resolved for the program, for the attributes of a result."""

    def has_evidence(self) -> bool:
        """Whether the filter estimates log p(y) at all."""
        return True

    def weight_bias_reasons(self, program: StateSpaceModel) -> list[str]:
        """Why the weights are not exact, so that exp(log-evidence) is no unbiased estimate; tempering apart."""
        return []

    def evidence_bias_reasons(self, program: StateSpaceModel) -> list[str]:
        """Why exp(log-evidence) is no unbiased estimate of p(y); empty where it is one."""
        tempered = f"weights are tempered (target_ess={self.target_ess:g})"
        return self.weight_bias_reasons(program) + ([tempered] if self.target_ess > 0 else [])

    def parents(self, program: StateSpaceModel, ancestors: Array, values: Array) -> Array:
        """What particles come from, of values that each has, leading axis N."""
        return values[ancestors]

    def forecasts(
        self, program: StateSpaceModel, batch_size: int | None = None
    ) -> Callable[[PRNGKeyArray, PyTree, TimeInputs], tuple[Array, DrawRecord]]:
        """The next state as the filter takes it to be, one draw from each particle that has not seen the observation.

        Args:
            program: the program.
            batch_size: particles moved at a time; None moves all at once.

        Returns:
            (rng_key, particles, inputs) -> (N states, records of their draws), with a leading axis of N.
        """

        def forecasts(rng_key: PRNGKeyArray, particles: PyTree, inputs: TimeInputs) -> tuple[Array, DrawRecord]:
            draw = map_particles(lambda key, carry: program.draw(key, carry, inputs, self.sampler), batch_size)
            x, record = draw(particle_keys(rng_key, num_particles(particles)), particles)
            return self.inflate_forecast(x), record

        return forecasts

    def background(
        self, program: StateSpaceModel, batch_size: int | None = None
    ) -> Callable[[PRNGKeyArray, PyTree, TimeInputs], dict[str, dict[str, Array]]]:
        """What is seen in `forecasts`, observations with their errors among it.

        Args:
            program: the program.
            batch_size: particles moved at a time; None moves all at once.

        Returns:
            (rng_key, particles, inputs) -> `StateSpaceModel.record` of N forecasts, with a leading axis of N.
        """

        def background(rng_key: PRNGKeyArray, particles: PyTree, inputs: TimeInputs) -> dict[str, dict[str, Array]]:
            draw_key, record_key = jax.random.split(rng_key)
            record = map_particles(lambda key, x, carry: program.record(key, x, carry, inputs), batch_size)
            x, _ = self.forecasts(program, batch_size)(draw_key, particles, inputs)
            return record(particle_keys(record_key, num_particles(particles)), x, particles)

        return background

    def inflate_forecast(self, forecast: Array) -> Array:
        """Apply the inflation of the forecast that the update uses; none by default."""
        return forecast

    def passes(self, info: Info) -> NetworkPasses:
        """Network passes per particle of one step, averaged over particles."""
        total = info.proposal.draw.passes
        for record in (info.weighing, info.forecast):
            if record != ():
                total = jax.tree.map(jnp.add, total, record.passes)
        return jax.tree.map(lambda n: jnp.mean(n.astype(float)), total)
