"""Storage of a run on disk: a Zarr group that is the result, from which an interrupted run continues.

    zarr.json, posterior/, sample_stats/, ...   groups of `results.to_datatree`, appended step by step
    .run/run.json                   settings of the run; a directory holds one run
    .run/program.json               checksums of the computation, its constants and its arguments, see `identity`
    .run/chain0/steps.jsonl         one line for each step: checksums of its inputs and values, and how it went
    .run/chain0/state-00000012.npz  particles after 12 steps; the last two states are kept
    .run/chain0/rows-00000012/      particles after 12 steps, if they are streamed; the npz file has their checksums
    .run/layout.npz                 metadata and coordinates of the group, written after all arrays have been made
    .run/lock                       held by the process that writes; the system releases it when the process ends

``xarray.open_datatree(directory, engine="zarr")`` opens the result lazily, while the run writes and after it, without
this library. Values of steps that are not made yet are NaN, -1 or False.

A chunk of steps is committed in this order: its values, its lines, the state after it. Each file is first written under
another name and then renamed, so it is either complete or absent, and lines that end in the middle are passed over. A
run that is interrupted between two of these repeats the steps with the same values, because the random key of a step
depends on its index alone.

Zarr reads a chunk that is missing as if it had never been written. So the lines hold a checksum of each value of each
step. When a run goes on, all values are compared with them; steps that differ are named and made again.
Metadata and coordinates do not change while a run writes: those that differ from the copy of them are put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock
import jax
import numpy as np
from jaxtyping import PyTree

from numpyro_diffusion_da.checksums import DAMAGE, checksum
from numpyro_diffusion_da.inference.row_files import RowFile, StoredRows

if TYPE_CHECKING:
    import xarray

LARGEST_CHUNK = 2**26
"""Largest number of bytes of a chunk of a Zarr array, if a value of one particle has fewer: 64 MB."""

USUAL_CHUNK = 2**20
"""Number of bytes below which a chunk holds several steps, so that a long run has few files: 1 MB."""

STEPS = "steps.jsonl"
"""Name of the file with a line for each step of a chain."""

MOST_STEPS = 256
"""Largest number of steps in a chunk of a Zarr array."""

STATES = 2
"""Number of last states that are kept, so that one damaged file costs no more than the last commit."""


Crcs = dict[str, dict[int, int]]
"""Checksum of each step, counted from the first, for each variable by "group/name"."""


class Span(NamedTuple):
    """Consecutive steps of a chain that a run has to make.

    Attributes:
        first: index of the first step.
        stop: index after the last step.
    """

    first: int
    stop: int


class RunStore:
    """Storage of one run in one directory.

    Args:
        directory: directory of the run; it is created if it does not exist.
        identity: settings that identify the run, as values that JSON can hold.

    A store is a context manager. Inside it, no other store can write into the directory.

    Raises:
        ValueError: the directory holds a run with other settings (the message names the first that differs) or
            something else, is in use by another run, or a file in it is damaged (the message names the file).
    """

    def __init__(self, directory: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = pathlib.Path(directory)
        if self.path.exists() and (
            not self.path.is_dir() or (not (self.path / ".run").is_dir() and any(self.path.iterdir()))
        ):
            raise ValueError(
                f"{os.fspath(self.path)!r} holds something that is no run of this library; give another directory, or "
                "empty this one."
            )
        self._own = self.path / ".run"
        self._own.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self._own / "lock")
        self._identity = json.loads(json.dumps(identity, default=_plain))
        self._made = self._own / "layout.npz"
        self._arrays: dict[str, Any] = {}
        self._is_prepared = False
        self._whole_states: dict[int, set[int]] = {}

    def __enter__(self) -> RunStore:
        """Take the directory, and compare the settings of the run in it with those of this run."""
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                f"{os.fspath(self.path)!r} is in use by another run; wait until that one ends, or give another "
                "directory."
            ) from None
        try:
            self._check_identity()
            self._put_back_layout()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the directory."""
        self._lock.release()

    def _check_identity(self) -> None:
        """Check that the run in the directory has the settings of this one; write them if it is the first.

        Raises:
            ValueError: a setting differs, or the file of the settings is damaged.
        """
        described, identity = self._own / "run.json", self._identity
        if not described.exists():
            _replace(described, json.dumps(identity, indent=1).encode())
            return
        found = _read_json(described)
        for name in sorted({*found, *identity}):
            if found.get(name) != identity.get(name):
                raise ValueError(
                    f"{os.fspath(self.path)!r} holds a run with {name} = {found.get(name)!r}, but this run has "
                    f"{identity.get(name)!r}; give another directory, or empty this one."
                )

    def _put_back_layout(self) -> None:
        """Write metadata and coordinates of the group again that are not as they were made.

        Warns:
            UserWarning: some are not; the message names the first.

        Raises:
            ValueError: the copy of them is missing or damaged.
        """
        if not self._made.exists() and not any(self._own.glob("chain*/*")):
            return  # nothing has been made yet
        try:
            files = _read_arrays(self._made)
        except ValueError as error:
            raise ValueError(f"{str(error)[:-1]}; {_AGAIN}.") from None
        if str(files.pop("belongs", None)) != self._mark(0, 0):
            raise ValueError(f"{os.fspath(self._made)!r} is damaged; {_AGAIN}.")
        damaged = [name for name, content in sorted(files.items()) if _bytes(self.path / name) != content.tobytes()]
        for name in damaged:
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, files[name].tobytes())
        if damaged:
            warnings.warn(
                f"{os.fspath(self.path / damaged[0])!r} is damaged or missing"
                f"{f', and {len(damaged) - 1} more' * (len(damaged) > 1)}, and written again.",
                stacklevel=4,
            )

    def _keep_layout(self, tree: xarray.DataTree) -> None:
        """Keep a copy of the metadata and coordinates of the group.

        Args:
            tree: tree of the result, whose data variables are values and no coordinates.
        """
        values = {(group, str(name), "c") for group, node in tree.children.items() for name in node.data_vars}
        paths = [path.relative_to(self.path) for path in sorted(self.path.rglob("*")) if path.is_file()]
        files = {
            path.as_posix(): np.frombuffer((self.path / path).read_bytes(), np.uint8)
            for path in paths
            if path.parts[0] != self._own.name and path.parts[:3] not in values
        }
        _replace_arrays(self._made, {**files, "belongs": np.asarray(self._mark(0, 0))})

    def check_computation(self, found: dict[str, str]) -> None:
        """Check that the computation is the one with which the run began; the first call stores it.

        Args:
            found: checksums by name, from `identity.computation`.

        Raises:
            ValueError: it is another one (the message names the first part that differs), or the file of the checksums
                is damaged.
        """
        path = self._own / "program.json"
        if not path.exists():
            _replace(path, json.dumps(found, indent=1).encode())
            return
        before = _read_json(path)
        # Versions and arguments come first: if one of them differs, the operations often do too.
        names = sorted(
            {*before, *found}, key=lambda name: (not name.startswith(("version", "the precision", "argument")), name)
        )
        for name in names:
            if before.get(name) != found.get(name):
                raise ValueError(
                    f"{os.fspath(self.path)!r} holds a run of another program: {name} has changed; "
                    "give another directory, or empty this one."
                )

    # --- what is there ------------------------------------------------------------------------------------------------

    def to_make(self, chain: int, inputs: Sequence[str]) -> list[Span]:
        """Steps of a chain that are not in the directory as this run would make them.

        Args:
            chain: index of the chain.
            inputs: checksum of the inputs of each step.

        Returns:
            Spans of steps. The state before each is in the directory, unless it is the initial state. Damaged steps
            come first.

        Warns:
            UserWarning: a step or a state is damaged or missing; the message names it.

        Raises:
            ValueError: a step was made with other inputs, or metadata of the group are damaged.
        """
        lines, states = self._lines(chain), self._states(chain)
        for t, line in sorted(lines.items()):
            if t < len(inputs) and line["inputs"] != inputs[t]:
                raise ValueError(
                    f"step {t} in {os.fspath(self.path)!r} was run with other observations or inputs than those "
                    "given now; give another directory, or empty this one."
                )
        done = min(max(states), len(inputs))
        spans = []
        if damaged := self._damaged_steps(chain, lines, done):
            first = max(step for step in states if step <= damaged[0])
            spans.append(Span(first, damaged[-1] + 1))
        if done < len(inputs):
            spans.append(Span(done, len(inputs)))
        return spans

    def steps_done(self, chain: int) -> int:
        """Number of steps of a chain that are in the directory, 0 if there are none."""
        return max(self._states(chain))

    def _lines(self, chain: int) -> dict[int, dict[str, Any]]:
        """Line of each step of a chain, the last one if there are several, without damaged ones."""
        return {
            line["step"]: line
            for line in read_lines(self._chain(chain) / STEPS)
            if line.get("belongs") == self._mark(chain, line["step"])
        }

    def _states(self, chain: int) -> set[int]:
        """Numbers of steps after which the state of a chain is in the directory; 0 is one of them.

        The files of a chain are read once: those that this store writes later are whole.

        Warns:
            UserWarning: a file is damaged; the message names it.
        """
        if chain in self._whole_states:
            return self._whole_states[chain]
        found = self._whole_states[chain] = {0}
        for path in sorted(self._chain(chain).glob("state-*.npz")):
            step = int(path.stem.removeprefix("state-"))
            try:
                self._read_state(path, chain, step)
            except ValueError as error:
                warnings.warn(f"{error} The run goes on from an earlier state.", stacklevel=5)
            else:
                found.add(step)
        return found

    def _damaged_steps(self, chain: int, lines: Mapping[int, dict[str, Any]], done: int) -> list[int]:
        """Indices of the steps whose values are not those that their lines say.

        Args:
            chain: index of the chain.
            lines: line of each step.
            done: number of steps that should be there.
        """
        damaged = {t: "its line is missing" for t in range(done) if t not in lines}
        for name in sorted({name for t in range(done) if t in lines for name in lines[t]["values"]}):
            array = self._array(name)
            for start in range(0, done, block := _times_of_chunk(array)):
                some = range(start, min(start + block, done))
                found: dict[int, int] = dict.fromkeys(some, 0)
                try:
                    for draws in _parts_of_draws(array):  # so that no more than a chunk is in memory
                        values = array[_region(array, chain, some.start, some.stop, draws)]
                        found = {t: _crc(_at(array, values, t - start), found[t]) for t in some}
                except DAMAGE:
                    damaged |= {t: f"{name} cannot be read" for t in some if t not in damaged}
                    # A part of a chunk is written by reading the chunk first, so one that cannot be read is replaced.
                    array[_region(array, chain, start, start + block)] = array.fill_value
                    continue
                for t in some:
                    if t in damaged or name not in lines[t]["values"]:  # steps that are not kept have no checksum
                        continue
                    if lines[t]["values"][name] != found[t]:
                        damaged[t] = f"{name} is not what was written"
        if damaged:
            steps = sorted(damaged)
            which = (
                f"step {steps[0]} is" if len(steps) == 1 else f"{len(steps)} steps, the first of them {steps[0]}, are"
            )
            warnings.warn(
                f"{which} damaged in chain {chain} of {os.fspath(self.path)!r} ({damaged[steps[0]]}) and made again.",
                stacklevel=5,
            )
        return sorted(damaged)

    def state(self, chain: int, step: int, like: PyTree) -> PyTree:
        """Read the state of a chain after some steps, in the structure of `like`.

        Args:
            chain: index of the chain.
            step: number of steps, the beginning of a span of `to_make`.
            like: a state of the same structure; the initial state, which is returned for 0 steps.
        """
        if step == 0:
            return like
        arrays = self._read_state(self._state(chain, step), chain, step)
        known, form = jax.tree.flatten(like)

        def leaf_of(i: int, leaf: Any) -> Any:
            if f"rows{i}" not in arrays:
                return _as(leaf, arrays[f"leaf{i}"])
            return _as(leaf, self._stored_rows(chain, step, i, arrays).whole())

        return jax.tree.unflatten(form, [leaf_of(i, leaf) for i, leaf in enumerate(known)])

    def streamed_state(self, chain: int, step: int, like: PyTree, large: Sequence[bool]) -> PyTree:
        """Read the state of a chain after some steps, whose particles stay in files.

        Args:
            chain: index of the chain.
            step: number of steps, the beginning of a span of `to_make`; 1 or more.
            like: shapes and dtypes of the state.
            large: whether each of its arrays is to be in a file; if it is not yet, it is written to one.
        """
        arrays = self._read_state(self._state(chain, step), chain, step)
        known, form = jax.tree.flatten(like)
        folder = self.new_rows(chain, "read")

        def leaf_of(i: int, leaf: Any) -> Any:
            if f"rows{i}" in arrays:
                return self._stored_rows(chain, step, i, arrays)
            values = arrays[f"leaf{i}"]
            if not large[i]:
                return _as(leaf, values)
            file = RowFile(folder / f"leaf{i}", len(values), values.shape[1:], values.dtype)
            file.write(0, values)
            return StoredRows(file)

        return jax.tree.unflatten(form, [leaf_of(i, leaf) for i, leaf in enumerate(known)])

    def _stored_rows(self, chain: int, step: int, i: int, arrays: Mapping[str, np.ndarray]) -> StoredRows:
        """Array number i of a state, whose rows are in a file."""
        shape, (name, dtype), crc = arrays[f"shape{i}"].tolist(), arrays[f"file{i}"].tolist(), int(arrays[f"rows{i}"])
        path = self._rows(chain, step) / name
        return StoredRows(RowFile(path, shape[0], tuple(shape[1:]), np.dtype(dtype)), arrays.get(f"at{i}"), crc)

    def new_rows(self, chain: int, name: str) -> pathlib.Path:
        """Empty folder for rows that are being made.

        Args:
            chain: index of the chain.
            name: name of the folder.
        """
        path = self._chain(chain) / f"{name}.part"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def _rows(self, chain: int, step: int) -> pathlib.Path:
        """Folder of the rows of a state."""
        return self._chain(chain) / f"rows-{step:08d}"

    def _read_state(self, path: pathlib.Path, chain: int, step: int) -> dict[str, np.ndarray]:
        """Read the arrays of a state, and check that this run wrote it for this chain and step.

        Raises:
            ValueError: the file is missing, damaged, or a copy of a file of another run, chain or step.
        """
        arrays = _read_arrays(path)
        if str(arrays.get("belongs")) != self._mark(chain, step):
            raise ValueError(f"{os.fspath(path)!r} belongs to another run, chain or step.")
        for name in arrays:
            if name.startswith("rows"):
                rows = self._stored_rows(chain, step, int(name.removeprefix("rows")), arrays)
                try:
                    is_whole = rows.file.checksum() == rows.checksum
                except OSError:
                    is_whole = False
                if not is_whole:
                    raise ValueError(f"{os.fspath(rows.file.path)!r} is missing or damaged.")
        return arrays

    # --- what is added ------------------------------------------------------------------------------------------------

    def save(
        self,
        chain: int,
        first: int,
        tree: xarray.DataTree,
        template: Mapping[str, Any],
        inputs: Sequence[str],
        notes: Sequence[Mapping[str, Any]],
        state: PyTree,
    ) -> None:
        """Write consecutive steps: their values, a line for each, and then the state after them.

        Args:
            chain: index of the chain.
            first: index of the first step.
            tree: result of these steps of this chain, from `results.to_datatree`.
            template: what else the result has: `chains` and `steps`, its numbers of both, `time`, its coordinate of
                time, and `every`, by site of which only every k-th step is kept.
            inputs: checksum of the inputs of each of these steps.
            notes: what else the line of each of these steps says.
            state: state of the filter after the steps, a pytree of arrays.

        Raises:
            OSError: it could not be written, because the disk is full for example.
        """
        with self.writing(chain, first, len(inputs)):
            self.prepare(tree, template)
            values = self._write(chain, first, len(inputs), tree, template)
            self._commit(chain, first, values, inputs, notes, state)

    def save_draws(
        self, chain: int, step: int, draws: slice, tree: xarray.DataTree, template: Mapping[str, Any], crcs: Crcs
    ) -> None:
        """Write what some particles have at one step; `save_streamed` writes the rest. Particles come in their order.

        Args:
            chain: index of the chain.
            step: index of the step.
            draws: which of the particles.
            tree: their result, from `results.to_datatree`, of groups that particles have only.
            template: see `save`.
            crcs: checksums of the particles before, to which these are added.
        """
        self._write(chain, step, 1, tree, template, draws, crcs)

    def save_streamed(
        self,
        chain: int,
        step: int,
        tree: xarray.DataTree,
        template: Mapping[str, Any],
        inputs: str,
        notes: Mapping[str, Any],
        state: PyTree,
        folder: pathlib.Path,
        crcs: Crcs,
    ) -> PyTree:
        """Write a step whose particles are streamed: what `save_draws` has not, a line, and then the state after it.

        Args:
            chain: index of the chain.
            step: index of the step.
            tree: the result without what particles have.
            template: see `save`.
            inputs: checksum of the inputs of the step.
            notes: what else its line says.
            state: state after the step, with arrays and `StoredRows`.
            folder: folder of the files of the state, from `new_rows`; what else is in it is deleted.
            crcs: checksums of what `save_draws` has written.

        Returns:
            The state, whose files have moved.

        Raises:
            OSError: it could not be written.
        """
        with self.writing(chain, step, 1):
            values = self._write(chain, step, 1, tree, template, crcs=crcs)
            own = {leaf.file.path for leaf in jax.tree.leaves(state) if isinstance(leaf, StoredRows)}
            for path in folder.iterdir():
                if path not in own:
                    path.unlink()
            for leaf in jax.tree.leaves(state):
                if isinstance(leaf, StoredRows):
                    leaf.file.sync()
            there = self._rows(chain, step + 1)
            shutil.rmtree(there, ignore_errors=True)
            os.replace(folder, there)

            def moved(leaf: Any) -> Any:
                if not isinstance(leaf, StoredRows):
                    return leaf
                return dataclasses.replace(leaf, file=dataclasses.replace(leaf.file, path=there / leaf.file.path.name))

            state = jax.tree.map(moved, state)
            self._commit(chain, step, values, [inputs], [notes], state)
            for path in self._chain(chain).glob("*.part"):  # what the step began from
                shutil.rmtree(path, ignore_errors=True)
        return state

    def _commit(
        self,
        chain: int,
        first: int,
        values: Crcs,
        inputs: Sequence[str],
        notes: Sequence[Mapping[str, Any]],
        state: PyTree,
    ) -> None:
        """Write the lines of steps whose values are written, and then the state after them; see `save`."""
        self._chain(chain).mkdir(exist_ok=True)
        lines = [
            {
                **{"step": first + i, "inputs": given, "belongs": self._mark(chain, first + i), **note},
                "values": {name: crcs[i] for name, crcs in values.items() if i in crcs},
            }
            for i, (given, note) in enumerate(zip(inputs, notes, strict=True))
        ]
        with open(self._chain(chain) / STEPS, "ab") as file:
            # The first line break ends a line that an interrupted commit has left.
            file.write(b"\n" + b"".join(json.dumps(line, default=_plain).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        done = first + len(inputs)
        arrays = {"belongs": np.asarray(self._mark(chain, done))}
        for i, leaf in enumerate(jax.tree.leaves(state)):
            arrays |= _of_leaf(i, leaf)
        _replace_arrays(self._state(chain, done), arrays)
        states = self._states(chain) | {done}
        for path in sorted(self._chain(chain).glob("state-*.npz"))[:-STATES]:
            step = int(path.stem.removeprefix("state-"))
            # A run that mends old steps goes on from the files of the state that it has just written.
            if step != done or not self._rows(chain, step).exists():
                states.discard(step)
                path.unlink()
                shutil.rmtree(self._rows(chain, step), ignore_errors=True)
        for path in self._chain(chain).glob("rows-*"):  # a state that was replaced by one in memory
            if not self._state(chain, int(path.name.removeprefix("rows-"))).exists():
                shutil.rmtree(path)
        self._whole_states[chain] = states

    @contextlib.contextmanager
    def writing(self, chain: int, first: int, count: int) -> Iterator[None]:
        """Context in which an error of the file system says which steps could not be written.

        Args:
            chain: index of the chain.
            first: index of the first step.
            count: number of steps.
        """
        try:
            yield
        except OSError as error:
            last = f"step {first}" if count == 1 else f"steps {first} to {first + count - 1}"
            raise OSError(
                error.errno,
                f"{last} of chain {chain} could not be written to {os.fspath(self.path)!r} "
                f"({error.strerror or error}); the steps before are kept. Make room, and run again with the same key "
                "and arguments: the run goes on",
            ) from error

    def prepare(self, tree: xarray.DataTree, template: Mapping[str, Any]) -> None:
        """Make the Zarr arrays of a result, or lengthen them, unless they are there.

        Args:
            tree: result of some steps of one chain.
            template: numbers of chains and steps, and the coordinate of time.
        """
        import zarr

        sizes = {"chain": template["chains"], "time": template["steps"], "draw": template.get("draws")}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        if self._is_prepared:
            return
        self._is_prepared = True
        if self._made.exists():
            self._lengthen(tree, template)
            return
        for part in self.path.iterdir():  # an interrupted beginning
            if part != self._own:
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        with _quiet():
            root = zarr.open_group(self.path, mode="a")
            root.attrs.update({str(name): value for name, value in tree.attrs.items()})
            for group, node in tree.children.items():
                dataset = node.to_dataset()
                self._write_coordinates(group, dataset, template)
                made = root.require_group(group)
                for name, variable in dataset.data_vars.items():
                    shape = tuple(sizes.get(str(d), n) for d, n in zip(variable.dims, variable.shape, strict=True))
                    dims = tuple(map(str, variable.dims))
                    chunks = _chunks(dims, shape, variable.dtype.itemsize, template.get("batch"))
                    made.create_array(
                        str(name),
                        shape=shape,
                        dtype=variable.dtype,
                        chunks=chunks,
                        fill_value=_fill(variable.dtype),
                        compressors=_codecs(),
                        dimension_names=[str(d) for d in variable.dims],
                        attributes=dict(variable.attrs),
                        config={"write_empty_chunks": True},
                    )
            zarr.consolidate_metadata(self.path)
        self._keep_layout(tree)

    def _write_coordinates(self, group: str, dataset: xarray.Dataset, template: Mapping[str, Any]) -> None:
        """Write the coordinates of a group at the whole lengths of chain and time, with the attributes of the group."""
        import xarray

        whole = {"chain": np.arange(template["chains"]), "time": template["time"]}
        if "draws" in template:
            whole["draw"] = np.arange(template["draws"])
        found = {
            str(name): (name, whole[str(name)] if name in whole else _text(values.values), values.attrs)
            for name, values in dataset.coords.items()
        }
        coordinates = xarray.Dataset(coords=found, attrs=dataset.attrs)
        coordinates.to_zarr(self.path, group=group, mode="a", consolidated=False, zarr_format=3)

    def _lengthen(self, tree: xarray.DataTree, template: Mapping[str, Any]) -> None:
        """Give all arrays as many steps as the run has, if it has more than before."""
        import xarray
        import zarr

        longer = False
        with _quiet():
            root = self._root()
            for group_name, group in root.groups():
                for name, array in group.arrays():
                    dims = array.metadata.dimension_names or ()
                    at = dims.index("time") if "time" in dims else None
                    if at is None or array.shape[at] >= template["steps"]:
                        continue
                    longer = True
                    if name == "time":
                        attributes = {k: v for k, v in array.attrs.items() if k not in ("units", "calendar", "dtype")}
                        shutil.rmtree(self.path / group_name / "time")
                        time = ("time", template["time"], attributes)
                        # Writing a dataset replaces the attributes of its group.
                        new = xarray.Dataset(coords={"time": time}, attrs=dict(group.attrs))
                        new.to_zarr(self.path, group=group_name, mode="a", consolidated=False, zarr_format=3)
                    else:
                        array.resize((*array.shape[:at], template["steps"], *array.shape[at + 1 :]))
            if longer:
                self._arrays.clear()
                zarr.consolidate_metadata(self.path)
                self._keep_layout(tree)

    def _root(self) -> Any:
        """Zarr group of the result.

        Raises:
            ValueError: its metadata are damaged. The message names the directory.
        """
        import zarr

        try:
            return zarr.open_group(self.path, mode="r+", use_consolidated=False)
        except DAMAGE as error:
            raise ValueError(f"{os.fspath(self.path / 'zarr.json')!r} is damaged ({error}); {_AGAIN}.") from None

    def _array(self, name: str) -> Any:
        """Zarr array of a variable, by "group/name".

        Raises:
            ValueError: its metadata are missing or damaged. The message names the file.
        """
        import zarr

        if name not in self._arrays:
            try:
                with _quiet():
                    found = zarr.open_array(self.path / name, mode="r+", config={"write_empty_chunks": True})
            except DAMAGE as error:
                raise ValueError(
                    f"{os.fspath(self.path / name / 'zarr.json')!r} is damaged ({error}); {_AGAIN}."
                ) from None
            self._arrays[name] = found
        return self._arrays[name]

    def _write(
        self,
        chain: int,
        first: int,
        count: int,
        tree: xarray.DataTree,
        template: Mapping[str, Any],
        draws: slice = slice(None),
        crcs: Crcs | None = None,
    ) -> Crcs:
        """Write the values of steps.

        Args:
            chain: index of the chain.
            first: index of the first step.
            count: number of steps.
            tree: their values.
            template: see `save`.
            draws: particles to which the values belong.
            crcs: checksums so far, to which those of the values are added; None for none.

        Returns:
            For each variable, by "group/name", the checksum of each step that is kept, counted from the first.
        """
        found = {} if crcs is None else crcs
        for group, node in tree.children.items():
            for name, variable in node.to_dataset().data_vars.items():
                path = f"{group}/{name}"
                array, values = self._array(path), np.ascontiguousarray(variable.values)
                every = template["every"].get(variable.attrs.get("site", name), 1) if group == "posterior" else 1
                if every == 1:
                    kept = list(range(count))
                    array[_region(array, chain, first, first + count, draws)] = values
                else:
                    kept = [
                        i for i in range(count) if (first + i + 1) % every == 0 or first + i + 1 == template["steps"]
                    ]
                    for i in kept:
                        at = _region(array, chain, first + i, first + i + 1, draws)
                        array[at] = np.expand_dims(_at(array, values, i), variable.dims.index("time"))
                before = found.get(path, {})
                found[path] = {i: _crc(_at(array, values, i), before.get(i, 0)) for i in kept}
        return found

    def _mark(self, chain: int, step: int) -> str:
        """Checksum of the run, chain and step that a file or line belongs to."""
        whose = json.dumps([self._identity, chain, step], sort_keys=True)
        return checksum({"whose": np.frombuffer(whose.encode(), np.uint8)})

    def _chain(self, chain: int) -> pathlib.Path:
        """Directory of a chain."""
        return self._own / f"chain{chain}"

    def _state(self, chain: int, step: int) -> pathlib.Path:
        """Path of the state of a chain after some steps."""
        return self._chain(chain) / f"state-{step:08d}.npz"


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read the lines of a file of steps, without those that are damaged or not yet whole; none if there is no file."""
    found = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("values"), dict):
            found.append(line)
    return found


_AGAIN = "empty the directory and run again"
"""What to do about damage that cannot be mended."""


def _chunks(dims: tuple[str, ...], shape: tuple[int, ...], itemsize: int, batch: int | None = None) -> tuple[int, ...]:
    """Shape of the chunks of an array: one chain; several steps if they are small; several members if not.

    Large arrays of a run that writes its particles in batches have chunks of no more than a batch.
    """
    chunks = dict(zip(dims, shape, strict=True)) | {"chain": 1, "time": 1}
    chunks = {dim: max(1, chunks[dim]) for dim in dims}
    size = itemsize * int(np.prod(list(chunks.values()), dtype=np.int64))
    if "time" in chunks:
        chunks["time"] = int(np.clip(USUAL_CHUNK // size, 1, min(MOST_STEPS, max(shape[dims.index("time")], 1))))
    if "draw" in chunks and size > LARGEST_CHUNK:
        chunks["draw"] = max(1, chunks["draw"] * LARGEST_CHUNK // size)
    if "draw" in chunks and batch is not None and size > USUAL_CHUNK:
        chunks["draw"] = min(chunks["draw"], batch)
    return tuple(chunks[dim] for dim in dims)


def _codecs() -> list[Any]:
    """Codecs of all arrays: fast compression, and a checksum of the chunk."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    return [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()]


def _text(values: np.ndarray) -> np.ndarray:
    """Values of a coordinate; texts as objects, because Zarr has no standard for texts of fixed length."""
    return values.astype(object) if values.dtype.kind == "U" else values


def _fill(dtype: np.dtype) -> Any:
    """Value of steps that are not made yet: NaN, -1, 0 if there are no negative numbers, or False."""
    return {"f": np.nan, "i": -1, "u": 0, "b": False, "c": np.nan}[dtype.kind]


def _is_kept(step: int, every: int, steps: int) -> bool:
    """Whether a step is one of every k-th, or the last."""
    return (step + 1) % every == 0 or step + 1 == steps


def _region(array: Any, chain: int, first: int, stop: int, draws: slice = slice(None)) -> tuple[slice, ...]:
    """Part of a Zarr array that holds some steps of a chain, of all particles or of some."""
    parts = {"chain": slice(chain, chain + 1), "time": slice(first, stop), "draw": draws}
    return tuple(parts.get(dim, slice(None)) for dim in array.metadata.dimension_names)


def _at(array: Any, values: np.ndarray, i: int) -> np.ndarray:
    """Values of one step, from those of several."""
    dims = array.metadata.dimension_names
    return np.take(values, i, dims.index("time")) if "time" in dims else values


def _times_of_chunk(array: Any) -> int:
    """Number of steps in a chunk of an array."""
    dims = array.metadata.dimension_names
    return int(array.chunks[dims.index("time")]) if "time" in dims else MOST_STEPS


def _parts_of_draws(array: Any) -> list[slice]:
    """Parts of the particles of an array, a chunk each; one part if it has no axis of particles."""
    dims = array.metadata.dimension_names
    if "draw" not in dims:
        return [slice(None)]
    size, count = array.shape[dims.index("draw")], array.chunks[dims.index("draw")]
    return [slice(start, min(start + count, size)) for start in range(0, size, count)]


def _crc(values: np.ndarray, before: int = 0) -> int:
    """Checksum of an array, or of the values before it and the array, which come one after the other."""
    return zlib.crc32(np.ascontiguousarray(values).tobytes(), before)


def _of_leaf(i: int, leaf: Any) -> dict[str, np.ndarray]:
    """Arrays of a file of a state that say what its array number i is."""
    if not isinstance(leaf, StoredRows):
        return {f"leaf{i}": _raw(leaf)}
    file = leaf.file
    found = {
        f"rows{i}": np.asarray(leaf.checksum),
        f"shape{i}": np.asarray([file.n, *file.shape]),
        f"file{i}": np.asarray([file.path.name, file.dtype.name]),
    }
    return found if leaf.indices is None else {**found, f"at{i}": leaf.indices}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of zarr about consolidated metadata, text, and the folder of the run in the group."""
    import zarr.errors

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        yield


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read all arrays of an npz file, by name.

    Raises:
        ValueError: the file is missing or damaged. The message names it.
    """
    try:
        # np.load leaves a damaged file open, so it gets an open one.
        with open(path, "rb") as opened, np.load(opened) as file:
            return dict(file)
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(path)!r} is missing.") from None
    except DAMAGE:
        raise ValueError(f"{os.fspath(path)!r} is damaged.") from None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON file that holds a dictionary.

    Raises:
        ValueError: the file is damaged. The message names it.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{os.fspath(path)!r} is damaged; {_AGAIN}.") from None


def _plain(value: Any) -> Any:
    """Convert a NumPy or JAX number to one that JSON can hold; text for anything else."""
    is_number = isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.ndim(value) == 0
    return value.item() if is_number else str(value)


def _raw(leaf: Any) -> np.ndarray:
    """Array of a leaf; a random key by its numbers."""
    return np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def _as(like: Any, raw: np.ndarray) -> Any:
    """Leaf of the kind of `like`, from an array that `_raw` made."""
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jax.numpy.asarray(raw), impl=_key_impl(like))
    return jax.numpy.asarray(raw)


def _key_impl(like: Any) -> Any:
    """Kind of the random keys of an array, or of a shape and dtype."""
    if isinstance(like, jax.Array):
        return jax.random.key_impl(like)
    known = ("threefry2x32", "rbg", "unsafe_rbg")
    return next(name for name in known if jax.random.key(0, impl=name).dtype == like.dtype)


def _bytes(path: pathlib.Path) -> bytes | None:
    """Content of a file; None if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _replace(path: pathlib.Path, content: bytes) -> None:
    """Write a file under another name, and then rename it, so that it is never incomplete."""
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_bytes(content)
    os.replace(beside, path)


def _replace_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to an npz file under another name, and then rename it, so that it is never incomplete."""
    beside = path.with_suffix(".part")
    with open(beside, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
