"""`Filter`: run any filter over a whole series of observations, in independent chains."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import require, require_count, require_flag, require_key, shown
from numpyro_diffusion_da.checksums import checksum
from numpyro_diffusion_da.filters.base import FilterAlgorithm, takes_algorithm
from numpyro_diffusion_da.inference import backward_simulation as backward
from numpyro_diffusion_da.inference.batching import batch_in_memory, check_batch_size, particles_at_a_time
from numpyro_diffusion_da.inference.chunks import Pace, run_chunk
from numpyro_diffusion_da.inference.compilation import Compiled
from numpyro_diffusion_da.inference.devices import agreed, to_host, usable_mesh
from numpyro_diffusion_da.inference.has_result import HasFilterResult
from numpyro_diffusion_da.inference.identity import computation, versions
from numpyro_diffusion_da.inference.keeping import Keep, Kept, kept_sites
from numpyro_diffusion_da.inference.progress import step_progress
from numpyro_diffusion_da.inference.records import (
    attributes_of,
    check_metadata_names,
    check_records,
    collect,
    head,
    join,
    record_step,
)
from numpyro_diffusion_da.inference.row_files import StoredRows
from numpyro_diffusion_da.inference.storage import RunStore, Span
from numpyro_diffusion_da.inference.stored_run import StoredResult, tree_of_steps
from numpyro_diffusion_da.inference.streamed_run import (
    StepTrees,
    StreamedFilter,
    fits_in_memory,
    large_leaves,
    make_step,
    rows_at_a_time,
)
from numpyro_diffusion_da.inference.streaming import NotStreamable
from numpyro_diffusion_da.inference.threads import lapack_on_one_thread
from numpyro_diffusion_da.inference.watching import step_notes
from numpyro_diffusion_da.program.arrays import argument_names
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.results.advice import far_value_advice, lost_advice, rejection_advice, tempering_advice
from numpyro_diffusion_da.results.axes import times
from numpyro_diffusion_da.results.background import departure_ratios
from numpyro_diffusion_da.results.result import FilterResult
from numpyro_diffusion_da.smc.base import State
from numpyro_diffusion_da.smc.mesh import on_mesh, started_on_mesh

if TYPE_CHECKING:
    from xarray import DataTree


class Filter(HasFilterResult):
    """Run of a filter over a NumPyro program, with the interface of `numpyro.infer.MCMC`.

    Call `run`, then read `result`, or convert it by `to_datatree` or `to_arviz`.

    Args:
        algorithm: filter of a program: `FAAPF(model)`, `GuidedPF(model)`, `Bootstrap(model)`, `EnKF(model)`, or one of
            them in a `GrossErrorCheck`.
        num_particles: number of particles N of each chain.
        num_chains: number of independent runs of the filter; they become the chains of the result.
        batch_size: number of particles moved at a time, which bounds the memory; None for as many as fit into half of
            the device's memory, and on a CPU for no more than its cores move fastest. The result does not depend on
            it.
        progress_bar: whether to show a progress bar over the steps.
        keep_forecasts: whether to keep the one-step forecast mean E[x' | c] of each particle's ancestor c, in
            `FilterResult.forecast` and in the group `prior` of a `DataTree`. The weights must compute it: `FAAPF` with
            `Dirac` or `Moment`.
        keep_observed: whether to keep, for every particle, a predictive draw and the log-likelihood of each
            observation (the groups `posterior_predictive` and `log_likelihood`). Their size is particles times
            observations.
        keep: names of the latent and deterministic sites whose particles are kept; None for all. A mapping from names
            to `ndda.inference.Kept` keeps reductions over particles, some steps, or fewer digits:
            ``keep={"x": Kept(particles=False, mean=True, std=True)}``. To keep parts of the state, record them with
            `numpyro.deterministic` and list only that here. A deterministic site that is
            the same for all particles, such as the places of observations, is always kept, once per time, in
            `FilterResult.metadata`.
        directory: directory of a Zarr group to which steps are written as soon as they are computed, such as
            "run.zarr". ``xarray.open_datatree("run.zarr")`` opens it lazily, during the run and after it, also on
            another machine and without this library; it is the tree of `to_datatree`. If a run is interrupted, run it
            again with the same key and arguments: it continues after the last step on disk, and gives the same result
            as a run without interruption. With a directory the steps are not held in memory. None writes nothing.
        time: coordinate of the time axis in the directory, and the default of `to_datatree` and `to_arviz`; see there.
        dims: names of the axes of sites after time, likewise.
        coords: coordinate values of dimensions, likewise.
        mesh: devices that share the particles, `jax.make_mesh((8,), ("particles",))`; None for one device. The devices
            may belong to several processes, each of which makes the same run (`jax.distributed`). The result does not
            depend on it, up to rounding (docs/scale.md).
        stream_particles: whether particles stay in files of the directory, and are read, moved and written in batches,
            so that memory holds a few batches and not all particles (docs/scale.md). None streams them if the run has
            a directory and they do not fit into half of the memory. The result does not depend on it, up to rounding.

    Raises:
        ValueError: `num_particles`, `num_chains` or `batch_size` is below 1, `keep` names no site, `mesh` has another
            axis than "particles", its devices cannot share the particles equally, or particles are to be streamed
            without a directory or with a mesh.
        TypeError: `algorithm` is not a filter, or a number is not a whole number.
    """

    without_compiled: ClassVar[Mapping[str, Any]] = {"_program": None, "_compiled": {}, "_streamed": None}

    @takes_algorithm("num_particles=256")
    def __init__(
        self,
        algorithm: FilterAlgorithm,
        *,
        num_particles: int,
        num_chains: int = 1,
        batch_size: int | None = None,
        progress_bar: bool = True,
        keep_forecasts: bool = False,
        keep_observed: bool = True,
        keep: Sequence[str] | Mapping[str, Kept] | None = None,
        directory: str | os.PathLike[str] | None = None,
        time: Any = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
        stream_particles: bool | None = None,
    ) -> None:
        require_count(num_particles, "Filter", "num_particles")
        require_count(num_chains, "Filter", "num_chains")
        check_batch_size(batch_size, "Filter")
        kept = kept_sites(keep)
        if kept is not None and directory is None and any(site.every > 1 for site in kept.values()):
            raise ValueError("Filter got a site to keep every few steps, but no directory; give both, or every=1.")
        if directory is not None:
            require(directory, (str, os.PathLike), "Filter", "directory", '"my_run"')
        mesh = usable_mesh(mesh, "Filter", algorithm, num_particles, directory)
        progress_bar = require_flag(progress_bar, "Filter", "progress_bar")
        keep_forecasts = require_flag(keep_forecasts, "Filter", "keep_forecasts")
        keep_observed = require_flag(keep_observed, "Filter", "keep_observed")
        if stream_particles is not None:
            stream_particles = require_flag(stream_particles, "Filter", "stream_particles")
        if stream_particles:
            _check_streaming(directory, mesh)
        self.stream_particles = stream_particles
        self.algorithm = algorithm
        self.num_particles = int(num_particles)
        self.num_chains = int(num_chains)
        self.batch_size = batch_size
        self.progress_bar = progress_bar
        self.keep_forecasts = keep_forecasts
        self.keep_observed = keep_observed
        self.keep = kept
        self.directory = directory
        self.time, self.dims, self.coords = time, dims, coords
        self.mesh = mesh
        self._result: FilterResult | None = None
        self._stored: StoredResult | None = None
        self._given: Any = None
        self._inputs: PyTree = None
        self._program: StateSpaceModel | None = None
        self._batch: int | None = None
        self._sizes: tuple[Any, ...] = ()  # what `_batch` follows from, apart from the structure of the program
        self._compiled: dict[str, Compiled] = {}
        self._streamed: StreamedFilter | None = None

    def run(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> None:
        """Filter the observations in the arguments of the program; `result` holds the result afterwards.

        The keys of chains, steps and particles are folded from `rng_key` by their indices, so neither `batch_size` nor
        `num_chains` changes a draw.

        Each run reads anew all that the program reads from outside its arguments: global variables, variables that it
        closes over, and attributes, of a prior for example. It gives what a new `Filter` gives. New arguments and new
        values of arrays compile nothing. A new Python number, function or shape compiles the step again, so give the
        program an argument for a number that changes often. All steps of one run use the values at its start.

        A run warns if the median tempering exponent alpha is below 0.1, if a gross-error check rejects more than a
        third of the observations, if an observation is impossibly far from its forecast, or if observations are farther
        from the forecasts than the filter expects.

        Args:
            rng_key: random key, from `jax.random.key`.
            *args: arguments of the program.
            **kwargs: keyword arguments of the program.

        Raises:
            ValueError: the filter cannot run the program; an observation error is not positive and finite, an
                observation is infinite, an observed value has no finite place, or the state is NaN where it is observed
                (the message names the site and the step); `keep` names an unknown site; the filter computes no
                forecasts for `keep_forecasts`; or `directory` holds another run.
            FloatingPointError: all weights or all particles of a step are non-finite; the message names the step.
        """
        require_key(rng_key, self)
        program = self._prepared(args, kwargs)
        given = (program.args, program.kwargs)
        attributes = self._attributes(program, rng_key)
        store = self._store(attributes)
        guided = self.algorithm.needs_gaussian and program.structure.emulator is not None
        taper = self.algorithm.moving_taper()
        sources = {} if taper is None else taper.moving
        self._result, self._stored = None, None  # a run that does not end must not leave the result of the one before
        length = program.structure.length
        template: dict[str, Any] = {"chains": self.num_chains, "steps": length}
        if store is not None:
            template["time"] = times(self.time, length)
            template["every"] = {name: site.every for name, site in (self.keep or {}).items()}
        chains: list[list[Any]] = []
        past: list[Any] = []
        with ExitStack() as stack:
            if store is not None:
                stack.enter_context(store)
            stack.enter_context(lapack_on_one_thread())
            advance = stack.enter_context(step_progress(self.progress_bar, self.num_chains * length))
            stack.enter_context(self._kept_if_interrupted(program, attributes, chains, past, store))
            for chain in range(self.num_chains):
                init_key, run_key = jax.random.split(jax.random.fold_in(rng_key, chain))
                initial, xs, trees = self._begin(init_key, given, attributes, template)
                spans = [Span(0, length)]
                if store is not None:
                    if chain == 0:  # all chains compute the same
                        host_xs = to_host(xs)
                        inputs = [checksum(_at_time(host_xs, t)) for t in range(length)]
                        store.check_computation(self._identity(program, initial, _at_time(host_xs, 0)))
                    spans = store.to_make(chain, inputs)
                    if self.algorithm.lag and (held := store.steps_done(chain)) > length:
                        raise ValueError(
                            f"{os.fspath(store.path)!r} holds {held} steps, and the states of "
                            f"lag={self.algorithm.lag} after the last of them only; give all {held} times, or another "
                            "directory."
                        )
                    advance(length - sum(span.stop - span.first for span in spans), None)
                chains.append([])
                past.append(None)
                if trees is not None:
                    assert store is not None

                    def ready(t: int, records: dict[str, Any], seconds: float) -> Mapping[str, Any]:
                        check_records(records, t, self.num_particles, guided, sources)
                        return step_notes(records, seconds, self.num_particles)[0]

                    keys = init_key, run_key
                    for records in self._streamed_steps(
                        store, chain, initial, spans, keys, xs, given, trees, template, inputs, ready
                    ):
                        advance(1, records["stats"])
                for span in spans if trees is None else ():
                    begin = initial if store is None else store.state(chain, span.first, initial)
                    for first, records, state, seconds in self._steps(run_key, begin, span, xs, given):
                        check_records(records, first, self.num_particles, guided, sources)
                        count = len(records["nonfinite_weights"])
                        if store is None:
                            chains[-1].append(records)
                        else:
                            tree = tree_of_steps(program.structure, attributes, records, self.dims, self.coords)
                            notes = step_notes(records, seconds, self.num_particles)
                            store.save(chain, first, tree, template, inputs[first : first + count], notes, state)
                        past[-1] = state.past
                        advance(count, records["stats"])
                if store is not None and trees is not None and self.algorithm.lag:
                    past[-1] = store.streamed_state(chain, length, initial, large_leaves(initial)).past
                elif store is not None and not spans and self.algorithm.lag:
                    past[-1] = store.state(chain, length, initial).past
                past[-1] = past[-1] if isinstance(past[-1], StoredRows) else to_host(past[-1])
        batch = self._batch if self._streamed is None else self._streamed.batch
        sizes = {"num_chains": self.num_chains, "batch_size": batch or self.num_particles}
        attributes = {**attributes, **sizes}
        if store is None:
            found = collect(program.structure, attributes, [join(records) for records in chains], self._past(past))
            self._result = found
        else:
            self._stored = StoredResult(
                store.path, program.structure, attributes, self._past(past), self.num_chains, length
            )
            found = self._stored.read(particles=False)
        self._given, self._inputs = given, xs
        advices = [advises(found) for advises in (rejection_advice, tempering_advice, far_value_advice)]
        for advice in (*advices, lost_advice(departure_ratios(found))):
            if advice is not None:
                warnings.warn(advice, stacklevel=2)

    def _steps(
        self, run_key: PRNGKeyArray, state: State, span: Span, xs: PyTree, given: Any
    ) -> Iterator[tuple[int, dict[str, Any], State, float]]:
        """Make the steps of a span, in chunks.

        Args:
            run_key: random key of the chain's steps.
            state: state before the span.
            span: steps to make.
            xs: inputs of the scan at all times.
            given: arguments of the program.

        Yields:
            (index of the first step of a chunk, records of its steps as numpy arrays, state after it, seconds of a
            step).
        """
        pace, first = Pace(), span.first
        while first < span.stop:
            count = agreed(pace.next(span.stop - first), self.mesh)
            at = np.asarray(first, np.int32), np.asarray(count, np.int32)
            state, records = self._compiled["steps"](run_key, state, *at, xs, given)
            buffers = to_host(records)
            seconds = pace.ended(most=len(buffers["nonfinite_weights"]))
            yield first, head(buffers, count), state, seconds
            first += count

    def _begin(
        self, init_key: PRNGKeyArray, given: Any, attributes: dict[str, Any], template: dict[str, Any]
    ) -> tuple[Any, PyTree, StepTrees | None]:
        """Draw the first state of a chain, or find the shapes of a streamed one.

        Args:
            init_key: random key of the first state.
            given: arguments of the program.
            attributes: attributes of the result.
            template: what `RunStore.save` takes; a streamed run adds its numbers of particles.

        Returns:
            (the first state, or its shapes and dtypes if particles are streamed; inputs of the scan at all times; trees
            of streamed steps, or None).

        Raises:
            ValueError: particles are to be streamed, and the filter needs all of them at once.
        """
        if self._streamed is None:
            return *self._compiled["start"](init_key, given), None
        assert self._program is not None
        xs = self._compiled["inputs"](given)
        try:
            initial, record = self._streamed.shapes(init_key, xs, given)
        except NotStreamable as error:
            name = type(self.algorithm).__name__
            raise ValueError(
                f"Filter cannot stream the particles of {name}, whose step needs too much of all particles at once: "
                f"{error}; give stream_particles=False, and fewer particles if they do not fit into memory."
            ) from None
        template |= {"draws": self.num_particles, "batch": self._streamed.batch}
        return initial, xs, StepTrees(self._program.structure, attributes, record, self.dims, self.coords)

    def _streamed_steps(
        self,
        store: RunStore,
        chain: int,
        shapes: Any,
        spans: Sequence[Span],
        keys: tuple[PRNGKeyArray, PRNGKeyArray],
        xs: PyTree,
        given: Any,
        trees: StepTrees,
        template: Mapping[str, Any],
        inputs: Sequence[str],
        ready: Callable[[int, dict[str, Any], float], Mapping[str, Any]],
    ) -> Iterator[dict[str, Any]]:
        """Make and write the steps of a chain whose particles are in files.

        Args:
            store: storage of the run.
            chain: index of the chain.
            shapes: shapes and dtypes of the state.
            spans: steps to make.
            keys: random keys of the first state, and of the steps.
            xs: inputs of the scan at all times.
            given: arguments of the program.
            trees: trees of the steps.
            template: what `RunStore.save` takes.
            inputs: checksum of the inputs of each step.
            ready: function (index of the step, its record, seconds) -> notes, which raises if the step has failed.

        Yields:
            Record of each step, without what particles have.
        """
        assert self._streamed is not None
        streamed = self._streamed
        if spans:
            store.prepare(trees.template(), template)
        for span in spans:
            if span.first:
                state = store.streamed_state(chain, span.first, shapes, large_leaves(shapes))
            else:
                state = streamed.first_state(store.new_rows(chain, "first"), keys[0], given)
            for t in range(span.first, span.stop):
                state, records = make_step(
                    streamed, store, trees, template, (chain, t), state, keys[1], xs, given, inputs[t], ready
                )
                yield records

    def _past(self, past: list[Any]) -> list[Any]:
        """States of a lag after the last step of each chain; empty for a filter without a lag."""
        return past if self.algorithm.lag else []

    def _identity(self, program: StateSpaceModel, state: State, inputs: TimeInputs) -> dict[str, str]:
        """Checksums of the computation of this run: its initial state, its step, and the arguments that they use.

        Args:
            program: state-space model of the program.
            state: state before the first step, for its shapes.
            inputs: inputs of a step, for their shapes.
        """
        names = argument_names(self.algorithm.model, program.args)
        given = {**dict(zip(names, program.args, strict=True)), **program.kwargs}
        arrays, fixed = eqx.partition(given, eqx.is_array)

        def at(arrays: dict[str, Any]) -> StateSpaceModel:
            whole = eqx.combine(arrays, fixed)
            return program.at(tuple(whole[name] for name in names), {name: whole[name] for name in program.kwargs})

        def start(key: PRNGKeyArray, arrays: dict[str, Any]) -> Any:
            return at(arrays).initial(key)

        def step(key: PRNGKeyArray, state: State, inputs: TimeInputs, arrays: dict[str, Any]) -> Any:
            new, info = self.algorithm.kernel(at(arrays), None)(key, state, inputs)
            return new, info.log_weights, info.proposal.sites

        key = jax.random.key(0)
        values = {f"argument '{name}'": shown(part) for name, part in fixed.items() if jax.tree.leaves(part)}
        return {
            **versions(),
            **values,
            **computation("the initial state", start, arrays, key),
            **computation("the step", step, arrays, key, state, inputs),
        }

    @contextmanager
    def _kept_if_interrupted(
        self,
        program: StateSpaceModel,
        attributes: dict[str, Any],
        chains: list[list[Any]],
        past: list[Any],
        store: RunStore | None,
    ) -> Iterator[None]:
        """Keep the steps of a run that is interrupted by Ctrl-C, and say which.

        Args:
            program: state-space model of the program.
            attributes: attributes of the result.
            chains: records of the steps made so far, of each chain that has begun.
            past: states of a lag after them.
            store: storage of the run, which has the steps if there is one.
        """
        try:
            yield
        except KeyboardInterrupt:
            length = program.structure.length
            if store is None:
                joined = [join(records) for records in chains if records]
                lengths = [len(records["nonfinite_weights"]) for records in joined]
            else:
                lengths = [min(store.steps_done(chain), length) for chain in range(self.num_chains)]
                lengths = [made for made in lengths if made]
            whole = [i for i, made in enumerate(lengths) if made == length] or ([0] if lengths else [])
            kept_attributes = {**attributes, "interrupted": "True"}
            ends = [to_host(past[i]) if i < len(past) else None for i in whole]
            ends = self._past([] if any(end is None for end in ends) else ends)
            if whole and store is None:
                self._result = collect(program.structure, kept_attributes, [joined[i] for i in whole], ends)
            elif whole and store is not None:
                self._stored = StoredResult(
                    store.path, program.structure, kept_attributes, ends, len(whole), lengths[whole[0]]
                )
            kept = f"{lengths[0]} of {length} steps of {len(whole)} of {self.num_chains} chains" if whole else "none"
            again = "" if store is None else " Run it again with the same key and arguments: it goes on."
            warnings.warn(f"this run was interrupted; `result` holds {kept}.{again}", stacklevel=5)
            raise

    def _prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StateSpaceModel:
        """Build the model of the program at these arguments, check it, and prepare the compiled functions.

        A second run of a program with the same structure skips the checks. It traces the program again, because what
        the program reads from outside its arguments may have changed, and compiles only what has other operations.
        """
        before = None if self._program is None else self._program.structure
        program = StateSpaceModel(self.algorithm.model, args, kwargs, like=before)
        is_new = not program.structure.same_as(before)
        if is_new:
            program.check(self.algorithm.needs_gaussian, self.algorithm.needs_gaussian_errors)
            if not self.algorithm.moves_carry and (carried := program.structure.parameters_in_carry):
                leaf, sites = next(iter(carried.items()))
                warnings.warn(
                    f"the scan of '{program.structure.name}' carries {sites} unchanged as carry{leaf}. This filter "
                    "only selects among the first values, so after some steps few distinct ones are left. Use the "
                    "value in the body as a variable of the program around it, and infer it with ndda.PMMH or "
                    "ndda.SMC2, or use ndda.EnKF, which moves it.",
                    stacklevel=3,
                )
            check_metadata_names(program.structure)
        emulator = program.structure.diffusion or program.structure.one_pass or ()
        sizes = (self.batch_size, self.num_particles, *emulator)
        if is_new or any(one is not other for one, other in zip(sizes, self._sizes, strict=True)):
            self._batch = particles_at_a_time(self.batch_size, self.num_particles, program, self.mesh)
            self._sizes = sizes
        self._program = program
        self._plan_streaming(program, is_new)
        functions = self._functions(program)
        if is_new or not self._compiled:
            self._compiled = {name: Compiled(fn) for name, fn in functions.items()}
        else:
            for name, fn in functions.items():
                self._compiled[name].read_anew(fn)
        return program

    def _plan_streaming(self, program: StateSpaceModel, is_new: bool) -> None:
        """Decide whether particles are streamed, and prepare it.

        Args:
            program: state-space model of the program.
            is_new: whether nothing of an earlier run can be used.
        """
        streams = self.stream_particles
        if streams is None:
            alone = self.directory is not None and self.mesh is None
            streams = alone and not fits_in_memory(program.structure, self.num_particles)
        if not streams:
            self._streamed = None
            return
        batch = rows_at_a_time(self.batch_size, self._batch, program.structure, self.num_particles)
        functions = self._streamed_functions(program)
        if is_new or self._streamed is None or self._streamed.batch != batch:
            self._streamed = StreamedFilter(*functions, batch)
        else:
            self._streamed.read_anew(*functions)

    def _streamed_functions(self, program: StateSpaceModel) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Functions of the first state and of a step, for `StreamedFilter`."""
        keep = self._keep

        def start(nothing: Any, rng_key: PRNGKeyArray, given: Any) -> tuple[State, tuple[()]]:
            return self.algorithm.initial_state(program.at(*given), rng_key, self.num_particles), ()

        def step(state: State, rng_key: PRNGKeyArray, t: Array, xs: PyTree, given: Any) -> tuple[State, dict[str, Any]]:
            at = program.at(*given)
            inputs = _at_time(xs, t)
            new, info = self.algorithm.kernel(at, None)(jax.random.fold_in(rng_key, t), state, inputs)
            return new, record_step(self.algorithm, at, keep, info, state.particles, new.particles, inputs)

        return start, step

    def _functions(self, program: StateSpaceModel) -> dict[str, Callable[..., Any]]:
        """Functions to compile: draw of initial particles, filter step, and backward simulation step."""
        batch_size, keep = self._batch, self._keep

        def start(rng_key: PRNGKeyArray, given: Any) -> tuple[State, PyTree]:
            at = program.at(*given)
            initial = functools.partial(self.algorithm.initial_state, at, n=self.num_particles)
            return started_on_mesh(initial, self.mesh)(rng_key), at.inputs()

        length = program.structure.length

        def steps(
            rng_key: PRNGKeyArray, state: State, first: Array, count: Array, xs: PyTree, given: Any
        ) -> tuple[State, dict[str, Any]]:
            at = program.at(*given)
            kernel = on_mesh(self.algorithm.kernel(at, batch_size), self.mesh)

            def step(t: Array, state: State) -> tuple[State, dict[str, Any]]:
                inputs = _at_time(xs, t)
                new, info = kernel(jax.random.fold_in(rng_key, t), state, inputs)
                return new, record_step(self.algorithm, at, keep, info, state.particles, new.particles, inputs)

            return run_chunk(step, state, first, count, length)

        def back(given: Any, *of_step: Any) -> backward.Selection:
            return backward.select(program.at(*given), *of_step)

        def inputs(given: Any) -> PyTree:
            return program.at(*given).inputs()

        return {"start": start, "inputs": inputs, "steps": steps, "back": back}

    @property
    def _keep(self) -> Keep:
        """Parts of the particles that the last prepared run keeps."""
        assert self._program is not None
        return Keep(self.keep, self.keep_observed, self.keep_forecasts, self._program.structure.metadata_names)

    def _store(self, attributes: dict[str, Any]) -> RunStore | None:
        """Storage of the run's steps; None if nothing is written."""
        if self.directory is None:
            return None
        kept = {name: getattr(self, name) for name in ("keep_observed", "keep_forecasts")}
        kept["keep"] = None if self.keep is None else {name: repr(site) for name, site in self.keep.items()}
        kept |= {"dims": _named(self.dims), "coords": _named(self.coords)}
        return RunStore(self.directory, {**attributes, **kept})

    def _attributes(self, program: StateSpaceModel, rng_key: PRNGKeyArray) -> dict[str, Any]:
        """Attributes of the result that are enough to repeat the run."""
        seed = {"seed": str(np.asarray(jax.random.key_data(rng_key)).tolist())}
        levels = {kept.quantiles for kept in (self.keep or {}).values() if kept.quantiles}
        quantiles = {"quantiles": levels.pop()} if levels else {}
        return {**attributes_of(self.algorithm, program, self.num_particles), **quantiles, **seed}

    def _stored_tree(self) -> DataTree | None:
        """Tree of the last run's directory, whose arrays are read when they are used; None without a directory."""
        return None if self._stored is None else self._stored.tree()

    @property
    def result(self) -> FilterResult:
        """Result of the last run, as numpy arrays: ``result.posterior[site]`` has the shape (chain, draw, time, ...).

        Raises:
            RuntimeError: `run` has not been called.
            MemoryError: the run has a directory, and its arrays do not fit into memory.
        """
        if self._result is None and self._stored is not None:
            self._result = self._stored.read()
        if self._result is None:
            raise RuntimeError(
                "this Filter has no result: it has not run yet, or its last run failed; call "
                ".run(jax.random.key(0), ...) first."
            )
        return self._result

    def backward_simulation(
        self, rng_key: PRNGKeyArray, num_draws: int = 100, *, batch_size: int | None = None
    ) -> FilterResult:
        """Draws of whole trajectories given all observations, from the last run and the density of the transition.

        Each draw is a path through the particles, ``posterior[site][chain, i]``. The density of the transition links
        the particles of consecutive times, not the genealogy. Paths that have met can part again, so fewer draws are
        copies. The filter may be any, for example an ensemble Kalman filter.

        Deterministic sites, log-likelihoods and predictive draws are computed along the paths; forecasts are those of
        the particles. Log-likelihoods include observations that a gross-error check rejected.
        `results.to_datatree` and `results.to_arviz` take the result.

        In `sample_stats`, `filter_draw`, shape (chain, draw, time), is the index of each draw among the particles of
        the filter, and `distinct_lines`, shape (chain, time), counts the distinct ones. `backward_ess`, shape (chain,
        draw, time), is the effective sample size of the weights from which a link was drawn.
        `backward_passes_forward`, `backward_passes_jvp` and `backward_passes_vjp`, each of shape (chain, time), are the
        network passes of a draw's densities at each step.

        Source: Godsill, Doucet & West 2004, J. Am. Stat. Assoc. 99, algorithm 1; see
        `inference/backward_simulation.py`.

        Args:
            rng_key: random key, from `jax.random.key`; another one than that of the run.
            num_draws: number of trajectories M of each chain. Each costs `num_particles` densities per step.
            batch_size: number of densities computed at a time, which bounds the memory; None for as many as fit into
                half of the device's memory. The result does not depend on it.

        Returns:
            Smoothed result with M draws in place of the N particles: ``posterior[site]`` has the shape (chain, M, time,
            ...).

        Raises:
            RuntimeError: `run` has not been called.
            ValueError: the transition has no density (a `DiffusionTransition` needs ``density=``), the carry depends on
                more than the latent site, the run did not keep the latent site, or a number is below 1.
            TypeError: `batch_size` is not a whole number.
            FloatingPointError: no particle of a step can have led to the particle of the next; the message names the
                step.
        """
        require_key(rng_key, "backward_simulation")
        result = self.result
        args, kwargs = self._given
        program = self._prepared(args, kwargs)
        backward.check(program, result, num_draws)
        check_batch_size(batch_size, "backward_simulation")
        size = result.posterior[program.structure.latent_name][0, 0, 0].size
        batch_size = batch_in_memory(
            batch_size, self.num_particles * num_draws, backward.bytes_of_density(program, size)
        )

        def step(*of_step: Any) -> backward.Selection:
            return self._compiled["back"](self._given, *of_step, batch_size)

        return backward.simulate(rng_key, result, lambda t: _at_time(self._inputs, t), step, num_draws, self._keep.of)


def _at_time(xs: PyTree, t: int | Array) -> TimeInputs:
    """Inputs of step t, from inputs of all times."""
    return TimeInputs(jnp.asarray(t), jax.tree.map(lambda x: x[t], xs))


def _check_streaming(directory: Any, mesh: Mesh | None) -> None:
    """Check that the particles of a run can be streamed.

    Args:
        directory: directory of the run.
        mesh: devices of the run.

    Raises:
        ValueError: they cannot; the message says why and what to do.
    """
    if directory is None:
        raise ValueError(
            'Filter got stream_particles=True and no directory, where particles are; give directory="run.zarr".'
        )
    if mesh is not None:
        raise ValueError(
            "Filter got stream_particles=True and a mesh, whose devices hold all particles together; give one of them."
        )


def _named(values: Mapping[str, Any] | None) -> str:
    """Text that identifies names or coordinates of axes."""
    given = {} if values is None else values
    return ", ".join(f"{name}: {np.asarray(given[name]).tolist()}" for name in sorted(given))
