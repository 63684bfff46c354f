"""`OnlineFilter`: run any filter one time at a time, in a loop that the user writes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from numpyro_diffusion_da.arguments import require_count
from numpyro_diffusion_da.filters.base import FilterAlgorithm, takes_algorithm
from numpyro_diffusion_da.inference.batching import check_batch_size, particles_at_a_time
from numpyro_diffusion_da.inference.compilation import Compiled, HoldsCompiled
from numpyro_diffusion_da.inference.records import check_places, unplaced_observations
from numpyro_diffusion_da.program.arrays import as_arguments
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.program.structure import name_of
from numpyro_diffusion_da.smc.base import Info, State, init, particle_keys


class OnlineFilter(HoldsCompiled):
    """Filter over a NumPyro program with the interface of BlackJAX: ``init``, then ``step`` as observations arrive.

    The program gets one time at a time, as series of length 1, whereas `Filter` gives it the whole series. The state is
    a pytree of arrays, so it can be saved like any arrays, and another process can continue from it.

    Args:
        algorithm: filter of a program: `FAAPF(model)`, `GuidedPF(model)`, `Bootstrap(model)`, `EnKF(model)`, or one of
            them in a `GrossErrorCheck`.
        num_particles: number of particles N.
        batch_size: number of particles moved at a time, which bounds the memory; None for as many as fit into half of
            the device's memory.

    Raises:
        ValueError: `num_particles` or `batch_size` is below 1.
        TypeError: `algorithm` is not a filter, or a number is not a whole number.
    """

    @takes_algorithm("num_particles=256")
    def __init__(self, algorithm: FilterAlgorithm, *, num_particles: int, batch_size: int | None = None) -> None:
        require_count(num_particles, "OnlineFilter", "num_particles")
        check_batch_size(batch_size, "OnlineFilter")
        self.algorithm = algorithm
        self.num_particles = num_particles
        self.batch_size = batch_size
        self._compiled_init = Compiled(self._init)
        self._compiled_step = Compiled(self._step)

    def init(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> State:
        """Draw N particles of the program's initial state.

        What the program reads from outside its arguments (global variables, closures, attributes) is read anew here and
        at the first `step` after it. Give the program an argument for a value that changes between steps.

        Args:
            rng_key: random key, from `jax.random.key`.
            *args: arguments of the program at the first time, with series of length 1, as in `step`. Observations may
                be NaN.
            **kwargs: keyword arguments of the program.

        Returns:
            State before the first observation; the leading axis of its particles is N.

        Raises:
            ValueError: the filter cannot run the program, or series have another length than 1.
        """
        self._compiled_init.read_anew()
        self._compiled_step.read_anew()
        return self._compiled_init(rng_key, self._given(args, kwargs))

    def step(self, rng_key: PRNGKeyArray, state: State, *args: Any, **kwargs: Any) -> tuple[State, Info]:
        """Assimilate the observations of one time; a pure function that is compiled once.

        Args:
            rng_key: random key, a new one at each step; ``jax.random.fold_in(run_key, t)`` makes a run repeatable.
            state: state from `init` or from the last `step`.
            *args: arguments of the program, with series of length 1: ``y_t[None]``. NaN marks a missing value.
            **kwargs: keyword arguments of the program.

        Returns:
            (state, diagnostics of the step). The new particles of the latent site ``"x"`` are
            ``info.proposal.sites["posterior"]["x"]``, shape (N, ...). Non-finite values do not raise; they are counted
            in ``info.nonfinite_particles`` and ``info.nonfinite_weights``.

            If the taper of the filter takes places from the program, each step waits for its result to check them.

        Raises:
            ValueError: the filter cannot run the program, series have another length than 1, or an observed value has
                no finite place.
        """
        new, info, unplaced = self._compiled_step(rng_key, state, self._given(args, kwargs))
        taper = self.algorithm.moving_taper()
        if taper is not None and not any(isinstance(count, jax.core.Tracer) for count in unplaced.values()):
            check_places(jax.device_get(unplaced), taper.moving, None)
        return new, info

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of the program, (args, kwargs), with arrays and tables as JAX arrays."""
        return as_arguments(self.algorithm.model, args, kwargs, name_of(self.algorithm.model))

    def _at(self, given: Any) -> StateSpaceModel:
        """Build the model of the program at (args, kwargs), which may be tracers, and check it.

        It is built whenever a function is traced, because other shapes may come with another structure.

        Raises:
            ValueError: the filter cannot run the program, or the scan runs over more than one time.
        """
        args, kwargs = given
        program = StateSpaceModel(self.algorithm.model, args, kwargs)
        program.check(self.algorithm.needs_gaussian, self.algorithm.needs_gaussian_errors)
        if (length := program.structure.length) != 1:
            raise ValueError(
                f"the program scans over {length} times, but an OnlineFilter takes one time per call; give series of "
                "length 1, such as y_t[None], or run the whole series with ndda.Filter."
            )
        return program.at(program.args, program.kwargs)

    def _init(self, rng_key: PRNGKeyArray, given: Any) -> State:
        """Draw the initial particles; the function that `init` compiles."""
        return init(jax.vmap(self._at(given).initial)(particle_keys(rng_key, self.num_particles)))

    def _step(self, rng_key: PRNGKeyArray, state: State, given: Any) -> tuple[State, Info, dict[str, Array]]:
        """Run the kernel at one time, and count observed values without a place; the function that `step` compiles."""
        program = self._at(given)
        inputs = TimeInputs(jnp.asarray(0), jax.tree.map(lambda x: x[0], program.inputs()))
        batch_size = particles_at_a_time(self.batch_size, self.num_particles, program)
        first = jax.tree.map(lambda x: x[0], state.particles)
        unplaced = unplaced_observations(self.algorithm, program, first, inputs)
        return *self.algorithm.kernel(program, batch_size)(rng_key, state, inputs), unplaced
