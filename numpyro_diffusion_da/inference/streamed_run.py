"""A run whose particles are in files: which filters it takes, and how its steps become a result."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.memory import device_memory, host_memory
from numpyro_diffusion_da.inference.devices import to_host
from numpyro_diffusion_da.inference.storage import Crcs, RunStore
from numpyro_diffusion_da.inference.stored_run import tree_of_steps
from numpyro_diffusion_da.inference.streaming import StreamedStep, is_large
from numpyro_diffusion_da.program.structure import Structure
from numpyro_diffusion_da.results.result import PER_PARTICLE

if TYPE_CHECKING:
    import xarray

BATCH_BYTES = 2**26
"""Number of bytes of a batch of particles, if the user gives no number of particles: 64 MB."""

OF_PARTICLES = ("posterior", "prior", "posterior_predictive", "log_likelihood", "lagged")
"""Groups of a result that hold values of particles only."""

PARTS_OF_PARTICLES = ("sites", "forecast", "lagged")
"""Parts of a record that hold values of particles only."""


def particle_bytes(structure: Structure) -> tuple[int, int]:
    """Bytes of the carry of a particle, and of its latent sites.

    Args:
        structure: structure of the program.
    """

    def size(shapes: PyTree) -> int:
        return sum(int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    return size(structure.shapes.carry), size(structure.shapes.state)


def fits_in_memory(structure: Structure, n: int) -> bool:
    """Whether the particles of a step, before and after it, take less than half of the memory of device and host.

    Args:
        structure: structure of the program.
        n: number of particles.
    """
    carry, state = particle_bytes(structure)
    return n * (2 * carry + state) < 0.5 * min(device_memory(), host_memory())


def rows_at_a_time(batch_size: int | None, batch: int | None, structure: Structure, n: int) -> int:
    """Number of particles that a streamed run reads, moves and writes at a time.

    Args:
        batch_size: argument of the user.
        batch: number of particles that memory lets move at a time; None for all.
        structure: structure of the program.
        n: number of particles.
    """
    most = n if batch is None else min(batch, n)
    return most if batch_size is not None else max(1, min(most, BATCH_BYTES // max(sum(particle_bytes(structure)), 1)))


class StreamedFilter:
    """First state and steps of a filter whose particles are in files.

    Args:
        start: function (state (), key, arguments of the program) -> (first state, ()).
        step: function (state, key of the chain, index of the step, inputs of all times, arguments of the program) ->
            (new state, record of the step).
        batch: number of particles at a time.
    """

    def __init__(self, start: Callable[..., Any], step: Callable[..., Any], batch: int) -> None:
        self.batch = batch
        self._start = StreamedStep(start, batch, lambda record: [])
        self._step = StreamedStep(step, batch, lambda record: jax.tree.leaves(_of_particles(record)))

    def read_anew(self, start: Callable[..., Any], step: Callable[..., Any]) -> None:
        """Trace other functions at the next call; what has the same operations is not compiled again."""
        self._start.read_anew(start)
        self._step.read_anew(step)

    def shapes(self, key: PRNGKeyArray, xs: PyTree, given: Any) -> tuple[PyTree, PyTree]:
        """Shapes and dtypes of the state, and of the record of a step.

        Raises:
            NotStreamable: a step computes with more of all particles at once than memory is meant to hold.
        """
        state, _ = self._start.prepare((), key, given)
        return state, self._step.prepare(state, key, np.asarray(0, np.int32), xs, given)[1]

    def first_state(self, folder: pathlib.Path, key: PRNGKeyArray, given: Any) -> PyTree:
        """Draw the first state into files of a folder."""
        return self._start(folder, None, (), key, given)[0]

    def step(
        self,
        folder: pathlib.Path,
        sink: Callable[[int, int, dict[int, np.ndarray]], None],
        state: PyTree,
        key: PRNGKeyArray,
        t: int,
        xs: PyTree,
        given: Any,
    ) -> tuple[PyTree, dict[str, Any]]:
        """Make a step of a chain: new particles into files, and what particles have to a sink.

        Args:
            folder: folder for the files of the new state.
            sink: function (first particle, last one + 1, rows by the number of their leaf) that writes what particles
                have.
            state: state before the step.
            key: random key of the chain's steps.
            t: index of the step.
            xs: inputs of all times.
            given: arguments of the program.

        Returns:
            (new state; record of the step, as numpy arrays, with None for what the sink has got).
        """
        forms = self._step.prepare(state, key, np.asarray(0, np.int32), xs, given)[0]
        count = len(jax.tree.leaves(forms))
        new, record = self._step(
            folder,
            lambda start, stop, rows: sink(start, stop, {i - count: x for i, x in rows.items()}),
            state,
            key,
            np.asarray(t, np.int32),
            xs,
            given,
        )
        return new, to_host(record)


def large_leaves(shapes: PyTree) -> list[bool]:
    """Whether each array of a state is in a file, from its shapes and dtypes."""
    return [is_large(x) for x in jax.tree.leaves(shapes)]


def _of_particles(record: Any) -> PyTree:
    """Parts of a record that hold values of particles only."""
    return {name: record[name] for name in PARTS_OF_PARTICLES if name in record} if record else {}


class StepTrees(NamedTuple):
    """Trees of a step whose particles come in batches.

    Attributes:
        structure: structure of the program.
        attributes: attributes of the result.
        record: shapes and dtypes of the record of a step.
        dims: names of the axes of sites after time.
        coords: coordinate values of dimensions.
    """

    structure: Structure
    attributes: dict[str, Any]
    record: PyTree
    dims: Mapping[str, Sequence[str]] | None
    coords: Mapping[str, Any] | None

    def of_particles(self, rows: Mapping[int, np.ndarray]) -> xarray.DataTree:
        """Tree of what some particles have.

        Args:
            rows: their values, by the number of the leaf of a record.
        """
        import xarray

        count = len(next(iter(rows.values())))
        leaves, form = jax.tree.flatten(self.record)
        values = [rows[i][None] if i in rows else np.zeros((1, *x.shape), x.dtype) for i, x in enumerate(leaves)]
        records = jax.tree.unflatten(form, values)
        records["stats"] = {name: x for name, x in records["stats"].items() if name not in PER_PARTICLE}
        attributes = {**self.attributes, "num_particles": count}
        tree = tree_of_steps(self.structure, attributes, records, self.dims, self.coords)
        groups = {name: tree[name].to_dataset() for name in OF_PARTICLES if name in tree.children}
        return xarray.DataTree.from_dict(groups)

    def template(self) -> xarray.DataTree:
        """Tree of a step of one particle, without values, for the names, dimensions and dtypes of everything."""
        return self._rest(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _without_rows(self.record)))

    def of_rest(self, record: dict[str, Any]) -> xarray.DataTree:
        """Tree of everything but what `of_particles` has.

        Args:
            record: record of the step.
        """
        import xarray

        tree = self._rest(_without_rows(record, self.record))
        groups = {name: node.to_dataset() for name, node in tree.children.items() if name not in OF_PARTICLES}
        stats = groups["sample_stats"]
        own = [name for name in record["stats"] if name in PER_PARTICLE]
        particles = {
            name: (stats[name].dims, np.moveaxis(record["stats"][name][None, None], 1, 2), stats[name].attrs)
            for name in own
        }
        groups["sample_stats"] = stats.drop_vars([*own, "draw"]).assign(particles)
        return xarray.DataTree.from_dict(groups)

    def _rest(self, record: dict[str, Any]) -> xarray.DataTree:
        """Tree of a record with one row for each particle's values, or with all of them where no state is kept."""
        draws = 1 if record["sites"]["posterior"] else int(self.attributes["num_particles"])
        record = dict(record)
        record["stats"] = {
            name: np.zeros((draws, *np.shape(x)[1:]), x.dtype) if name in PER_PARTICLE else x
            for name, x in record["stats"].items()
        }
        for name, part in _of_particles(record).items():
            record[name] = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), (draws, *x.shape[1:])), part)
        records = jax.tree.map(lambda x: np.asarray(x)[None], record)
        return tree_of_steps(self.structure, self.attributes, records, self.dims, self.coords)


def _without_rows(record: dict[str, Any], shapes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Record with shapes of one row in place of the values of particles."""
    shapes = record if shapes is None else shapes
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), _of_particles(shapes))
    return {**record, **one}


def make_step(
    filter: StreamedFilter,
    store: RunStore,
    trees: StepTrees,
    template: Mapping[str, Any],
    at: tuple[int, int],
    state: PyTree,
    key: PRNGKeyArray,
    xs: PyTree,
    given: Any,
    inputs: str,
    ready: Callable[[int, dict[str, Any], float], Mapping[str, Any]],
) -> tuple[PyTree, dict[str, Any]]:
    """Make a step of a chain, and write it.

    Args:
        filter: the filter.
        store: storage of the run.
        trees: trees of its steps.
        template: what `RunStore.save` takes.
        at: index of the chain, and of the step.
        state: state before the step.
        key: random key of the chain's steps.
        xs: inputs of all times.
        given: arguments of the program.
        inputs: checksum of the inputs of the step.
        ready: function (index of the step, its record with a leading axis of time, seconds) -> notes, which raises if
            the step has failed, so that it is not committed.

    Returns:
        (state after the step; its record with a leading axis of time, without what particles have).
    """
    chain, t = at
    began, crcs = time.perf_counter(), Crcs()
    folder = store.new_rows(chain, "next")

    def sink(start: int, stop: int, rows: dict[int, np.ndarray]) -> None:
        store.save_draws(chain, t, slice(start, stop), trees.of_particles(rows), template, crcs)

    with store.writing(chain, t, 1):
        new, record = filter.step(folder, sink, state, key, t, xs, given)
    own = {name: part for name, part in record.items() if name not in PARTS_OF_PARTICLES}
    records = jax.tree.map(lambda x: np.asarray(x)[None], own)
    notes = ready(t, records, time.perf_counter() - began)
    new = store.save_streamed(chain, t, trees.of_rest(record), template, inputs, notes, new, folder, crcs)
    return new, records
