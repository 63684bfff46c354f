"""Interface of a filter: a NumPyro program with settings, from which `Filter` gets a kernel.

Each filter builds the kernel of the `smc` module of the same name, and gives it the transition and the likelihood of
the program. The "observation" that the kernel takes is a `TimeInputs`, the inputs of the scan at one time.
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
from numpyro_diffusion_da.smc.localization import Taper
from numpyro_diffusion_da.transition.base import DrawRecord

Constructor = TypeVar("Constructor", bound=Callable[..., None])


class Proposal(NamedTuple):
    """Record of one new particle.

    Attributes:
        draw: network passes and solver residual of the draw.
        sites: values of the sites by group and site, see `StateSpaceModel.record`.
    """

    draw: DrawRecord
    sites: dict[str, dict[str, Array]]


class FilterAlgorithm(abc.ABC):
    """Interface of a filter: a NumPyro program with the settings of the filter.

    Attributes:
        model: NumPyro program with one scan over time.
    """

    model: Callable[..., Any]
    needs_gaussian: ClassVar[bool] = True
    """Whether the transition must be a diffusion or Gaussian, and the likelihood of a kind that can guide a draw."""
    needs_gaussian_errors: ClassVar[bool] = False
    """Whether all observed sites must be Gaussian."""
    target_ess: float = 0.0
    """Effective sample size to reach by tempering, as a fraction of the particles; 0 for no tempering."""
    sampler: Sampler | Step | None = None
    """Sampler of the draws of a diffusion; None for the transition's own."""

    @abc.abstractmethod
    def kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> Kernel:
        """Build the kernel of the program.

        Args:
            program: state-space model at given arguments of the program.
            batch_size: number of particles moved at a time; None moves all at once.

        Returns:
            Pure function (rng_key, state, `TimeInputs`) -> (`State`, `Info`). `info.proposal` is a `Proposal` with a
            leading axis of N.

        Raises:
            ValueError: the settings of the filter do not fit the program.
        """

    @abc.abstractmethod
    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Settings of the filter as plain values, for the attributes of a result; defaults are filled in.

        Args:
            program: state-space model at given arguments of the program.
        """

    def has_evidence(self) -> bool:
        """Whether the filter estimates the evidence log p(y)."""
        return True

    def weight_bias_reasons(self, program: StateSpaceModel) -> list[str]:
        """Reasons why the weights are not exact, apart from tempering; empty if they are exact.

        Args:
            program: state-space model at given arguments of the program.
        """
        return []

    def evidence_bias_reasons(self, program: StateSpaceModel) -> list[str]:
        """Reasons why exp(log-evidence) is a biased estimate of p(y); empty if it is unbiased.

        Args:
            program: state-space model at given arguments of the program.
        """
        tempered = f"weights are tempered (target_ess={self.target_ess:g})"
        return self.weight_bias_reasons(program) + ([tempered] if self.target_ess > 0 else [])

    def parents(self, program: StateSpaceModel, ancestors: Array, values: Array) -> Array:
        """Select the value of each new particle's ancestor.

        Args:
            program: state-space model at given arguments of the program.
            ancestors: index of each new particle's ancestor, shape (N,), or (N, b) for b blocks.
            values: values by the particle before resampling, leading axis N.
        """
        return values[ancestors]

    def forecasts(
        self, program: StateSpaceModel, batch_size: int | None = None
    ) -> Callable[[PRNGKeyArray, PyTree, TimeInputs], tuple[Array, DrawRecord]]:
        """Build the function that draws the next state of each particle without its observations.

        Args:
            program: state-space model at given arguments of the program.
            batch_size: number of particles moved at a time; None moves all at once.

        Returns:
            Function (rng_key, particles, inputs) -> (states, records of the draws), each with a leading axis of N.
        """

        def forecasts(rng_key: PRNGKeyArray, particles: PyTree, inputs: TimeInputs) -> tuple[Array, DrawRecord]:
            draw = map_particles(lambda key, carry: program.draw(key, carry, inputs, self.sampler), batch_size)
            x, record = draw(particle_keys(rng_key, num_particles(particles)), particles)
            return self.inflate_forecast(x), record

        return forecasts

    def background(
        self, program: StateSpaceModel, batch_size: int | None = None
    ) -> Callable[[PRNGKeyArray, PyTree, TimeInputs], dict[str, dict[str, Array]]]:
        """Build the function that records the sites at `forecasts`, with predictive draws of the observations.

        Args:
            program: state-space model at given arguments of the program.
            batch_size: number of particles moved at a time; None moves all at once.

        Returns:
            Function (rng_key, particles, inputs) -> values by group and site, with a leading axis of N; see
            `StateSpaceModel.record`.
        """

        def background(rng_key: PRNGKeyArray, particles: PyTree, inputs: TimeInputs) -> dict[str, dict[str, Array]]:
            draw_key, record_key = jax.random.split(rng_key)
            record = map_particles(lambda key, x, carry: program.record(key, x, carry, inputs), batch_size)
            x, _ = self.forecasts(program, batch_size)(draw_key, particles, inputs)
            return record(particle_keys(record_key, num_particles(particles)), x, particles)

        return background

    def inflate_forecast(self, forecast: Array) -> Array:
        """Apply the forecast inflation used by the update; by default, return the forecast unchanged.

        Args:
            forecast: states, shape (N, *state).
        """
        return forecast

    def moving_taper(self) -> Taper | None:
        """Taper of the filter if places of observations move; None otherwise."""
        taper: Taper | None = getattr(self, "taper", None)
        return taper if taper is not None and taper.moving else None

    def passes(self, info: Info) -> NetworkPasses:
        """Network passes of one step per particle, averaged over particles.

        Args:
            info: diagnostics of the step.
        """
        total = info.proposal.draw.passes
        for record in (info.weighing, info.forecast):
            if record != ():
                total = jax.tree.map(jnp.add, total, record.passes)
        return jax.tree.map(lambda n: jnp.mean(n.astype(float)), total)


def check_algorithm(value: Any, owner: str, settings: str) -> None:
    """Check that an argument is a filter of a program.

    Args:
        value: the argument.
        owner: name of the class that got the argument.
        settings: other arguments of a correct call, for the message.

    Raises:
        TypeError: `value` is not a `FilterAlgorithm`.
    """
    if not isinstance(value, FilterAlgorithm):
        raise TypeError(
            f"{owner} got {shown(value)}; expected a filter of your program: write "
            f"{owner}(ndda.FAAPF(model), {settings})."
        )


def takes_algorithm(settings: str) -> Callable[[Constructor], Constructor]:
    """Decorate a constructor whose first argument is a filter, to check that argument first.

    A user who gives the program in place of the filter then gets a message that says so, even if other arguments are
    missing.

    Args:
        settings: other arguments of a correct call, for the message.
    """

    def decorate(init: Constructor) -> Constructor:
        @functools.wraps(init)
        def checked(self: Any, algorithm: Any, *args: Any, **kwargs: Any) -> None:
            check_algorithm(algorithm, type(self).__name__, settings)
            init(self, algorithm, *args, **kwargs)

        return cast(Constructor, checked)  # a type checker sees the constructor's own arguments

    return decorate
