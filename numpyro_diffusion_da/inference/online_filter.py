"""`OnlineFilter`: run any filter one time at a time, in a loop that the user writes."""

from __future__ import annotations

import collections
import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from numpyro_diffusion_da.arguments import require, require_count, require_key, shown
from numpyro_diffusion_da.checksums import named_leaves
from numpyro_diffusion_da.filters.base import FilterAlgorithm, takes_algorithm
from numpyro_diffusion_da.inference.batching import check_batch_size, particles_at_a_time
from numpyro_diffusion_da.inference.compilation import Compiled
from numpyro_diffusion_da.inference.devices import to_host, usable_mesh
from numpyro_diffusion_da.inference.has_result import HasFilterResult
from numpyro_diffusion_da.inference.keeping import Keep
from numpyro_diffusion_da.inference.records import (
    attributes_of,
    check_places,
    collect,
    record_step,
    unplaced_observations,
)
from numpyro_diffusion_da.program.arrays import argument_names, as_arguments
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.program.structure import name_of
from numpyro_diffusion_da.results.result import FilterResult
from numpyro_diffusion_da.smc.base import Info, State
from numpyro_diffusion_da.smc.mesh import on_mesh, started_on_mesh


class KeptStep(NamedTuple):
    """Record of one step, and its place among the steps.

    Attributes:
        number: number of the call, from 0.
        parent: number of the call that made the state before the step; None if it is not known.
        mark: array of the state after the step by which this state is recognized.
        record: record of the step as numpy arrays; None for the state that `init` made.
        past: earlier states of the particles after the step; None for a filter without a lag, and for all steps but
            the last one.
    """

    number: int
    parent: int | None
    mark: Array
    record: dict[str, Any] | None
    past: Any = None


class OnlineFilter(HasFilterResult):
    """Filter over a NumPyro program with the interface of BlackJAX: ``init``, then ``step`` as observations arrive.

    The program gets one time at a time, as series of length 1, whereas `Filter` gives it the whole series. The state is
    a pytree of arrays, so it can be saved like any arrays, and another process can continue from it.

    Args:
        algorithm: filter of a program: `FAAPF(model)`, `GuidedPF(model)`, `Bootstrap(model)`, `EnKF(model)`, or one of
            them in a `GrossErrorCheck`.
        num_particles: number of particles N.
        batch_size: number of particles moved at a time, which bounds the memory; None for as many as fit into half of
            the device's memory, and on a CPU for no more than its cores move fastest.
        keep_steps: number of last steps that `result`, `to_datatree`, `to_arviz` and `print_summary` hold; 0 keeps
            none, so that the memory does not grow.
        mesh: devices that share the particles, as for `Filter`; None for one device.

    Raises:
        ValueError: `num_particles` or `batch_size` is below 1, `keep_steps` is negative, `mesh` has another axis than
            "particles", or its devices cannot share the particles equally.
        TypeError: `algorithm` is not a filter, or a number is not a whole number.
    """

    @takes_algorithm("num_particles=256")
    def __init__(
        self,
        algorithm: FilterAlgorithm,
        *,
        num_particles: int,
        batch_size: int | None = None,
        keep_steps: int = 0,
        mesh: Mesh | None = None,
    ) -> None:
        require_count(num_particles, "OnlineFilter", "num_particles")
        require_count(keep_steps, "OnlineFilter", "keep_steps", least=0)
        check_batch_size(batch_size, "OnlineFilter")
        self.algorithm = algorithm
        self.num_particles = int(num_particles)
        self.batch_size = batch_size
        self.keep_steps = int(keep_steps)
        self.mesh = usable_mesh(mesh, "OnlineFilter", algorithm, num_particles)
        # The state from `init` takes a place too.
        self._kept: collections.deque[KeptStep] = collections.deque(maxlen=keep_steps + 1)
        self._calls = 0
        self._last_given: Any = None
        self._first_forms: dict[str, str] | None = None
        self._has_warned = False
        self._compiled_init = Compiled(self._init)
        self._compiled_step = Compiled(self._step)

    def __copy__(self) -> OnlineFilter:
        """Shallow copy, which shares the compiled functions and keeps steps of its own."""
        other: OnlineFilter = super().__copy__()
        other._kept = self._kept.copy()
        return other

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
        require_key(rng_key, self)
        self._compiled_init.read_anew()
        self._compiled_step.read_anew()
        state: State = self._compiled_init(rng_key, self._given(args, kwargs))
        self._keep(state, None, None)
        return state

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

            If the taper of the filter takes places from the program, or steps are kept, each step waits for its result.

        Warns:
            UserWarning: an argument has another shape than in the first step (once). Each new shape, and each new value
                that is not an array, compiles the step again.

        Raises:
            ValueError: the filter cannot run the program, `state` is that of another program or number of particles,
                series have another length than 1, or an observed value has no finite place.
        """
        require_key(rng_key, self)
        require(state, State, self, "state", "online.init(rng_key, y[:1])")
        given = self._given(args, kwargs)
        self._warn_of_another_form(given)
        new, info, unplaced, record = self._compiled_step(rng_key, state, given)
        taper = self.algorithm.moving_taper()
        if taper is not None and not any(isinstance(count, jax.core.Tracer) for count in unplaced.values()):
            check_places(to_host(unplaced), taper.moving, None)
        self._keep(new, state, {**record, "sites": info.proposal.sites})
        self._last_given = given if self.keep_steps else None
        return new, info

    def _keep(self, new: State, before: State | None, record: dict[str, Any] | None) -> None:
        """Keep the record of a step, if steps are kept.

        Args:
            new: state after the step, or from `init`.
            before: state before the step.
            record: record of the step; None for `init`.
        """
        if self.keep_steps == 0 or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((new, record))):
            return
        parent = None
        if before is not None and self._kept:
            # A state that was read from a file is that of the last call.
            made = [step.number for step in self._kept if step.mark is before.log_evidence]
            parent = made[-1] if made else self._kept[-1].number
        past = to_host(new.past) if self.algorithm.lag and record is not None else None
        if self._kept:  # only the last step keeps the earlier states, so that their number is bounded
            self._kept[-1] = self._kept[-1]._replace(past=None)
        self._kept.append(KeptStep(self._calls, parent, new.log_evidence, to_host(record), past))
        self._calls += 1

    @property
    def result(self) -> FilterResult:
        """Result of the last steps as numpy arrays: ``result.posterior[site]`` has the shape (1, draw, time, ...).

        It holds the last `keep_steps` steps that led to the state from the last call. Steps from the same state as a
        later one, such as a forecast beside an analysis, are left out.

        Raises:
            RuntimeError: no steps are kept, or none has been made.
            ValueError: observations or metadata of the kept steps differ in shape.
        """
        steps = {step.number: step for step in self._kept}
        line: list[dict[str, Any]] = []
        at = self._kept[-1] if self._kept else None
        while at is not None and at.record is not None:
            line.append(at.record)
            at = None if at.parent is None else steps.get(at.parent)
        records = line[: self.keep_steps][::-1]
        if not records:
            why = (
                "it keeps no steps; make it with ndda.OnlineFilter(..., keep_steps=100)"
                if self.keep_steps == 0
                else "it has made no step since init; call step first (steps inside jax.jit are not kept)"
            )
            raise RuntimeError(f"this OnlineFilter has no result: {why}.")
        _check_shapes(records)
        program = StateSpaceModel(self.algorithm.model, *self._last_given)
        sizes = {"num_chains": 1, "batch_size": self.batch_size or self.num_particles}
        attributes = attributes_of(self.algorithm, program, self.num_particles)
        series = jax.tree.map(lambda *v: np.stack(v), *records)
        past = [] if self._kept[-1].past is None else [self._kept[-1].past]
        return collect(program.structure, {**attributes, **sizes}, [series], past)

    def _warn_of_another_form(self, given: Any) -> None:
        """Warn once if an argument has another shape, type or static value than in the first step."""
        forms = _forms(argument_names(self.algorithm.model, given[0]), *given)
        if self._first_forms is None:
            self._first_forms = forms
        if self._has_warned or forms == self._first_forms:
            return
        self._has_warned = True
        for name in (*forms, *self._first_forms):
            got, first = forms.get(name, "missing"), self._first_forms.get(name, "missing")
            if got != first:
                warnings.warn(
                    f"argument {name} is {got}, and in the first step it was {first}; each new shape or plain value "
                    "compiles the step again, so pad series to a fixed size with NaN, and give numbers as arrays.",
                    stacklevel=3,
                )
                return

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
        initial = functools.partial(self.algorithm.initial_state, self._at(given), n=self.num_particles)
        return started_on_mesh(initial, self.mesh)(rng_key)

    def _check_state(self, state: State, expected: State) -> None:
        """Check that a state is one of this filter.

        Args:
            state: state before a step.
            expected: state as `init` makes it, or its shapes.

        Raises:
            ValueError: an array of the state is missing, too much, or of another shape.
        """
        got, wanted = (
            {name: f"an array of shape {jnp.shape(leaf)}" for name, leaf in named_leaves(tree).items()}
            for tree in (state, expected)
        )
        for name in (*wanted, *got):
            if got.get(name) != wanted.get(name):
                raise ValueError(
                    f"{type(self).__name__}.step got a state whose '{name}' is {got.get(name, 'missing')}, but for "
                    f"this program and {self.num_particles} particles it is {wanted.get(name, 'missing')}; give a "
                    "state from `init` or `step` of a filter of the same program and number of particles."
                )

    def _step(self, rng_key: PRNGKeyArray, state: State, given: Any) -> tuple[State, Info, dict[str, Array], Any]:
        """Run the kernel at one time; the function that `step` compiles.

        Returns:
            (state; diagnostics; numbers of observed values without a place; record of the step without its sites, empty
            if no steps are kept).

        Raises:
            ValueError: the state is that of another program or number of particles.
        """
        program = self._at(given)
        initial = functools.partial(self.algorithm.initial_state, program, n=self.num_particles)
        self._check_state(state, jax.eval_shape(initial, rng_key))
        inputs = TimeInputs(jnp.asarray(0), jax.tree.map(lambda x: x[0], program.inputs()))
        batch_size = particles_at_a_time(self.batch_size, self.num_particles, program, self.mesh)
        first = jax.tree.map(lambda x: x[0], state.particles)
        unplaced = unplaced_observations(self.algorithm, program, first, inputs)
        new, info = on_mesh(self.algorithm.kernel(program, batch_size), self.mesh)(rng_key, state, inputs)
        record: dict[str, Any] = {}
        if self.keep_steps > 0:
            keep = Keep(None, True, False, program.structure.metadata_names)
            record = record_step(self.algorithm, program, keep, info, state.particles, new.particles, inputs)
            del record["sites"]  # `info` holds them
        return new, info, unplaced, record


def _forms(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
    """Shape and type of each array among the arguments of a program, and each other value, in words, by name."""
    found = {}
    for name, value in (*zip(names, args, strict=True), *kwargs.items()):
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            is_array = isinstance(leaf, jax.Array)
            form = f"an array of shape {leaf.shape} ({leaf.dtype})" if is_array else shown(leaf)
            found[f"{name!r}{jax.tree_util.keystr(path)}"] = form
    return found


def _check_shapes(records: list[dict[str, Any]]) -> None:
    """Check that the records of several steps can be joined.

    Raises:
        ValueError: an observation or metadata has several shapes.
    """
    for part in ("observations", "metadata"):
        for name in {name: None for record in records for name in record.get(part, {})}:
            values = [record.get(part, {}).get(name) for record in records]
            shapes = [None if v is None else (v["value"] if part == "observations" else v).shape for v in values]
            other = next((shape for shape in shapes if shape != shapes[-1]), shapes[-1])
            if other != shapes[-1]:
                raise ValueError(
                    f"site '{name}' has shape {shapes[-1]} in the last step and {other} in an earlier one, so the kept "
                    "steps form no series; pad observations to a fixed size with NaN."
                )
