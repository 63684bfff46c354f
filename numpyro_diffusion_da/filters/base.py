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
from numpyro_diffusion_da.filters.background import (
    BackgroundRecord,
    CheckRecord,
    Screen,
    background_of_draws,
    evenly_spread,
    no_passes,
    per_particle,
    rejected_by,
)
from numpyro_diffusion_da.filters.conditioning import held_conditioning
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.base import (
    Info,
    Kernel,
    State,
    init,
    map_particles,
    particle_keys,
    total_particles,
)
from numpyro_diffusion_da.smc.localization import Taper
from numpyro_diffusion_da.smc.rows import take_rows
from numpyro_diffusion_da.smc.sharding import own, rows_at, whole
from numpyro_diffusion_da.transition.base import DrawRecord

ConditionedKernel = Callable[[PRNGKeyArray, State, TimeInputs, PyTree | None], tuple[State, Info]]
"""One step of a filter (rng_key, state, inputs, conditioning of the particles) -> (state, info). The conditioning has a
leading axis of N, or is None."""

Constructor = TypeVar("Constructor", bound=Callable[..., None])


class Proposal(NamedTuple):
    """Record of one new particle.

    Attributes:
        draw: network passes and solver residual of the draw.
        sites: values of the sites by group and site, see `StateSpaceModel.record`.
        line: states on the line of the particle: L earlier ones as this step has selected and moved them, and the new
            one, shape (L + 1, ...); () for a filter without a lag.
    """

    draw: DrawRecord
    sites: dict[str, dict[str, Array]]
    line: Any = ()


def line_of(past: Any, x: Array) -> Any:
    """Line of a new particle: the earlier states of its ancestor, and its own state x; () without a lag.

    Args:
        past: earlier states, shape (L, ...); () without a lag.
        x: state of the new particle.
    """
    return () if isinstance(past, tuple) else jnp.concatenate([past, x[None]])


def with_past(state: State, info: Info) -> State:
    """State after a step with the last L states on the line of each particle, if the filter has a lag.

    Args:
        state: state from a kernel of `smc`.
        info: diagnostics of the step.
    """
    line = info.proposal.line
    return state if isinstance(line, tuple) else state._replace(past=map_particles(lambda of_one: of_one[1:])(line))


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
    can_be_sharded: ClassVar[bool] = False
    """Whether the kernel takes its particles sharded over a mesh, by the functions of `smc.sharding`."""
    moves_carry: ClassVar[bool] = False
    """Whether an update moves the parameters in the carry, and not only the state."""
    target_ess: float = 0.0
    """Effective sample size to reach by tempering, as a fraction of the particles; 0 for no tempering."""
    resample_below: float = 1.0
    """Effective sample size, as a fraction of the particles, below which they are resampled; 1 for every step."""
    sampler: Sampler | Step | None = None
    """Sampler of the draws of a diffusion; None for the transition's own."""
    lag: int = 0
    """Number L of earlier states of each particle that the filter selects and moves with it; 0 for none."""

    @abc.abstractmethod
    def kernel(self, program: StateSpaceModel, batch_size: int | None = None, screen: Screen | None = None) -> Kernel:
        """Build the kernel of the program.

        Args:
            program: state-space model at given arguments of the program.
            batch_size: number of particles moved at a time; None moves all at once.
            screen: check of the observations against the background, before they are used; None for none.

        Returns:
            Pure function (rng_key, state, `TimeInputs`) -> (`State`, `Info`). `info.proposal` is a `Proposal` with a
            leading axis of N, `info.background` a `BackgroundRecord`, and `info.check` a `CheckRecord` if there is a
            `screen`.

        Raises:
            ValueError: the settings of the filter do not fit the program.
        """

    @abc.abstractmethod
    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Settings of the filter as plain values, for the attributes of a result; defaults are filled in.

        Args:
            program: state-space model at given arguments of the program.
        """

    def initial_state(self, program: StateSpaceModel, rng_key: PRNGKeyArray, n: int) -> State:
        """State before the first observation, with N particles drawn from the program's initial state.

        Args:
            program: state-space model at given arguments of the program.
            rng_key: random key; that of particle i is fold_in(rng_key, i).
            n: number of particles N.
        """
        keys = own(particle_keys(rng_key, n))
        state = init(map_particles(program.initial)(keys), self.resample_below)
        if self.lag == 0:
            return state
        like = program.structure.shapes.state[program.structure.latent_name]
        return state._replace(past=map_particles(lambda _: jnp.zeros((self.lag, *like.shape), like.dtype))(keys))

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
        return take_rows(values, ancestors)

    def conditioned_kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> ConditionedKernel:
        """Build the kernel of the program for particles whose conditioning may be known already.

        A filter that does not define it computes the conditioning where it is needed.

        Args:
            program: state-space model at given arguments of the program.
            batch_size: number of particles moved at a time; None moves all at once.

        Returns:
            Pure function as that of `kernel`, with one more argument: the conditioning of the particles, leading axis
            N, or None.
        """
        step = self.kernel(program, batch_size)
        return lambda rng_key, state, inputs, conditioning: step(rng_key, state, inputs)

    def holding_conditioning(self, program: StateSpaceModel, batch_size: int | None) -> Kernel:
        """Build a kernel that computes the conditioning of all particles first, where it pays, and runs the filter.

        Args:
            program: state-space model at given arguments of the program.
            batch_size: number of particles moved at a time; None moves all at once.
        """
        step = self.conditioned_kernel(program, batch_size)

        def kernel(rng_key: PRNGKeyArray, state: State, inputs: TimeInputs) -> tuple[State, Info]:
            return step(rng_key, state, inputs, held_conditioning(program, state.particles, inputs, batch_size))

        return kernel

    def screened_by_draws(self, program: StateSpaceModel, batch_size: int | None, screen: Screen) -> Kernel:
        """Build a kernel that draws some particles without the observations, to screen these, and then runs the filter.

        The draws are the background. For filters that draw particles with the observations only.

        Args:
            program: state-space model at given arguments of the program.
            batch_size: number of particles moved at a time; None moves all at once.
            screen: check of the observations.
        """
        draw = functools.partial(program.draw, sampler=self.sampler)

        def kernel(rng_key: PRNGKeyArray, state: State, inputs: TimeInputs) -> tuple[State, Info]:
            n = total_particles(state.particles)
            which = evenly_spread(n, screen.members)
            conditioning = held_conditioning(program, state.particles, inputs, batch_size)
            some, given = rows_at((state.particles, conditioning), which)
            # Kernels use up to four keys. A fifth one leaves their draws the same with and without a check.
            keys = own(particle_keys(jax.random.split(rng_key, 5)[4], len(which)))
            x, record = map_particles(
                lambda key, carry, given: draw(key, carry, inputs, conditioning=given), batch_size
            )(keys, some, given)
            sites = background_of_draws(program, x, some, inputs, len(which), batch_size)
            rejected = rejected_by(screen, program, sites, state.particles, inputs)
            step = self.conditioned_kernel(program.without(rejected), batch_size)
            new, info = step(rng_key, state, inputs, conditioning)
            check = CheckRecord(rejected, per_particle(whole(record.passes, len(which)), n))
            return new, info._replace(check=check, background=BackgroundRecord(sites, no_passes()))

        return kernel

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
        mean = per_particle(total, total.forward.size)
        for record in (info.background, info.check):
            if record != ():
                mean = mean.plus(record.passes)
        return mean


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
