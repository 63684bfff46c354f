"""`OnlineFilter`: one observation at a time, in a loop of the caller's own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from numpyro_diffusion_da.arguments import require_count
from numpyro_diffusion_da.filters.base import FilterAlgorithm, takes_algorithm
from numpyro_diffusion_da.inference.batching import check_batch_size, particles_at_a_time
from numpyro_diffusion_da.inference.compilation import Compiled
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.base import Info, State, init, particle_keys


class OnlineFilter:
    """A filter over a NumPyro program, as BlackJAX writes an algorithm: ``init``, then ``step`` as observations arrive.

    The program is given one time at a time: series of length 1 where `Filter` gives it the whole. `State` is a
    pytree of arrays: keep it in any way that keeps arrays, and go on from it in another process.

    Args:
        algorithm: `FAAPF(model)`, `Bootstrap(model)` or `EnKF(model)`.
        num_particles: particles N.
        batch_size: particles moved at a time; None for as many as half of the device's memory takes.

    Raises:
        ValueError: fewer than one particle, or a negative batch size.
    """

    @takes_algorithm("num_particles=256")
    def __init__(self, algorithm: FilterAlgorithm, *, num_particles: int, batch_size: int | None = None) -> None:
        require_count(num_particles, "OnlineFilter", "num_particles")
        check_batch_size(batch_size)
        self.algorithm = algorithm
        self.num_particles = num_particles
        self.batch_size = batch_size
        self._program: StateSpaceModel | None = None
        self._compiled_init = Compiled(self._init)
        self._compiled_step = Compiled(self._step)

    def init(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> State:
        """N draws of the program's initial state.

        Args:
            rng_key: from `jax.random.key`.
            *args: the program's arguments at the first time, as in `step`; observations may be NaN.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: a program that cannot be filtered.
        """
        return self._compiled_init(rng_key, self._checked(args, kwargs))

    def step(self, rng_key: PRNGKeyArray, state: State, *args: Any, **kwargs: Any) -> tuple[State, Info]:
        """Take in the observations of one time; compiled once, pure.

        Args:
            rng_key: another one at each step: ``jax.random.fold_in(run_key, t)`` makes a run repeatable.
            state: from `init` or the last `step`.
            *args: the program's arguments, their series of length 1: ``y_t[None]``. NaN is missing.
            **kwargs: its keyword arguments.

        Returns:
            (state, info). New particles of the latent site are in ``info.proposal.sites["posterior"]``; a failure
            shows in ``info.nonfinite_particles`` and ``info.nonfinite_weights``, and raises nothing.

        Raises:
            ValueError: a program that cannot be filtered, or series of another length.
        """
        return self._compiled_step(rng_key, state, self._checked(args, kwargs))

    def _checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._program is None:
            program = StateSpaceModel(self.algorithm.model, args, kwargs)
            program.check(self.algorithm.needs_gaussian, self.algorithm.needs_gaussian_errors)
            self._program = program
        return args, kwargs

    def _at(self, given: Any) -> StateSpaceModel:
        assert self._program is not None
        program = self._program.at(*given)
        length = program.call(jax.random.key(0)).length
        if length != 1:
            raise ValueError(
                f"the program scans over {length} times; an OnlineFilter takes one at a time: give series of length 1, "
                "as y_t[None] (Filter runs whole series)."
            )
        return program

    def _init(self, rng_key: PRNGKeyArray, given: Any) -> State:
        return init(jax.vmap(self._at(given).initial)(particle_keys(rng_key, self.num_particles)))

    def _step(self, rng_key: PRNGKeyArray, state: State, given: Any) -> tuple[State, Info]:
        program = self._at(given)
        inputs = TimeInputs(jnp.asarray(0), jax.tree.map(lambda x: x[0], program.inputs()))
        batch_size = particles_at_a_time(self.batch_size, self.num_particles, program)
        return self.algorithm.kernel(program, batch_size)(rng_key, state, inputs)
