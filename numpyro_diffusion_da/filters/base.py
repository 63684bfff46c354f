"""The interface of a filter: a NumPyro program with settings, from which `Filter` gets a kernel.

Each filter builds the kernel of the `smc` module of its name and gives it the program's transition and likelihood. The
kernel's "observation" is a `TimeInputs`: the slice of the scan's inputs at one time.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import shown
from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.diffusion.steps import Step
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

Constructor = TypeVar("Constructor", bound=Callable[..., None])


class Proposal(NamedTuple):
    """Record of one new particle.

    Attributes:
        draw: network passes and solver residual of the draw.
        sites: values by group and site, see `StateSpaceModel.record`.
    """

    draw: DrawRecord
    sites: dict[str, dict[str, Array]]


class FilterAlgorithm(abc.ABC):
    """Interface of a filter: a NumPyro program with the settings of the filter.

    Attributes:
        model: the program.
    """

    model: Callable[..., Any]
    needs_gaussian: ClassVar[bool] = True
    """Whether the transition must be a diffusion or Gaussian, and the likelihood one that can guide."""
    needs_gaussian_errors: ClassVar[bool] = False
    """Whether all observed sites must be Gaussian."""
    target_ess: float = 0.0
    """Effective sample size that tempering aims at, as a fraction of the particles; 0 for no tempering."""
    sampler: Sampler | Step | None = None
    """Reverse diffusion of the filter's draws, a `Sampler`; None for the transition's own."""

    @abc.abstractmethod
    def kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> Kernel:
        """Build the kernel of the program.

        Args:
            program: the program at given arguments.
            batch_size: particles moved at a time; None moves all at once.

        Returns:
            (rng_key, state, TimeInputs) -> (State, Info), pure; `info.proposal` is a `Proposal` with a leading axis N.
        """

    @abc.abstractmethod
    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Settings of the filter in plain values, for the attributes of a result; defaults are resolved."""

    def has_evidence(self) -> bool:
        """Whether the filter estimates the evidence log p(y)."""
        return True

    def weight_bias_reasons(self, program: StateSpaceModel) -> list[str]:
        """Reasons why the weights are not exact, tempering left out; empty where they are exact."""
        return []

    def evidence_bias_reasons(self, program: StateSpaceModel) -> list[str]:
        """Reasons why exp(log-evidence) is a biased estimate of p(y); empty where it is unbiased."""
        tempered = f"weights are tempered (target_ess={self.target_ess:g})"
        return self.weight_bias_reasons(program) + ([tempered] if self.target_ess > 0 else [])

    def parents(self, program: StateSpaceModel, ancestors: Array, values: Array) -> Array:
        """Select each particle's ancestor value; `values` has leading axis N."""
        return values[ancestors]

    def forecasts(
        self, program: StateSpaceModel, batch_size: int | None = None
    ) -> Callable[[PRNGKeyArray, PyTree, TimeInputs], tuple[Array, DrawRecord]]:
        """Build the function that draws each particle's next state before it has seen the observation.

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
        """Build the function that records the sites of `forecasts`, predictive draws of the observations included.

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
        """Network passes of one step per particle, averaged over the particles."""
        total = info.proposal.draw.passes
        for record in (info.weighing, info.forecast):
            if record != ():
                total = jax.tree.map(jnp.add, total, record.passes)
        return jax.tree.map(lambda n: jnp.mean(n.astype(float)), total)


def check_algorithm(value: Any, owner: str, settings: str) -> None:
    """Refuse what is not a filter of a program.

    Args:
        value: the argument.
        owner: name of the class that got it.
        settings: its other arguments in a correct call, for the message.

    Raises:
        TypeError: `value` is not a `FilterAlgorithm`.
    """
    if not isinstance(value, FilterAlgorithm):
        raise TypeError(
            f"{owner} got {shown(value)}; expected a filter of your program: write "
            f"{owner}(ndda.FAAPF(model), {settings})."
        )


def takes_algorithm(settings: str) -> Callable[[Constructor], Constructor]:
    """Decorate a constructor whose first argument is a filter, so that a wrong one is refused before all else.

    A program in place of the filter is then named even where other arguments are missing.

    Args:
        settings: the other arguments in a correct call, for the message.
    """

    def decorate(init: Constructor) -> Constructor:
        @functools.wraps(init)
        def checked(self: Any, algorithm: Any, *args: Any, **kwargs: Any) -> None:
            check_algorithm(algorithm, type(self).__name__, settings)
            init(self, algorithm, *args, **kwargs)

        return cast(Constructor, checked)  # a type checker sees the constructor's own arguments

    return decorate
