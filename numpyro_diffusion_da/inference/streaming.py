"""A step of a filter whose particles are not in memory: it is made in batches of rows that are read and written.

The step is traced with its operations on rows apart (`smc/rows.py`), and its equations are put in an order of stages.
Stage k is a pass over the particles and then the equations on whole arrays that need its results. A pass is one
compiled function of a batch of rows: all maps that need no result of this pass, one after the other, so that a row is
read once. A bootstrap filter takes one pass and a half, FA-APF two: one to weigh, one to draw.

An array of which every equation takes rows only is never in memory: it is a file, and its batches are read and written
by two threads while the batch between them is computed. Taking ancestors reads nothing. It gives the same file with
other indices, and a later pass reads each row that it needs once. What has a few bytes for each particle (weights,
ancestors, counts) is in memory. A step that needs more of all particles at once cannot be streamed, and is refused.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval
from jaxtyping import Array, PyTree

from numpyro_diffusion_da.inference.identity import same_operations
from numpyro_diffusion_da.inference.row_files import RowFile, StoredRows, bytes_of
from numpyro_diffusion_da.smc.rows import (
    is_key,
    map_columns_p,
    map_rows_p,
    mapped,
    rows_apart,
    sum_rows_p,
    take_rows_p,
    whole_rows_p,
)

IN_MEMORY = 64
"""Largest number of bytes of a row of an array of all particles that is held in memory."""

USABLE_WHOLE = 1024
"""Largest number of bytes of a row of an array of all particles that the step may compute with as a whole."""

Sink = Callable[[int, int, dict[int, np.ndarray]], None]
"""Function (first row, index after the last row, rows of each output by its number) that writes rows of outputs."""


class NotStreamable(ValueError):  # noqa: N818 - it is told to the user as any other ValueError
    """A step computes with more of all particles at once than memory is meant to hold."""


# --- the plan of a step -----------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Value with rows: those of a base, an input of the step or an output of a map, by indices.

    Attributes:
        base: variable of the base.
        indices: variables of indices, the first of which is used first.
    """

    base: Any
    indices: tuple[Any, ...] = ()


@dataclasses.dataclass
class _Map:
    """Map of a pass: `jaxpr` of one row, what rows share, and what has rows."""

    jaxpr: Any
    shared: list[Any]
    rows: list[_Rows]
    outputs: list[Any]


@dataclasses.dataclass
class _Sum:
    """Sum of a base over its rows."""

    base: Any
    output: Any


@dataclasses.dataclass
class _Pass:
    """Pass over n rows. `written` are the bases that are files, `held` those in memory, `emitted` those of outputs."""

    level: int
    n: int
    parts: list[_Map | _Sum] = dataclasses.field(default_factory=list)
    written: list[Any] = dataclasses.field(default_factory=list)
    held: list[Any] = dataclasses.field(default_factory=list)
    emitted: dict[int, Any] = dataclasses.field(default_factory=dict)
    function: Any = None


@dataclasses.dataclass
class _ColumnPass:
    """Map over columns: `jaxpr` of (shared, indices of some columns, these columns) -> new columns, what they have.

    `made` are its outputs with rows, and `of_columns` those that have columns only.
    """

    level: int
    number: int
    jaxpr: Any
    columns: int
    shared: list[Any]
    rows: list[_Rows]
    made: list[Any]
    of_columns: list[Any]
    function: Any = None

    @property
    def at_a_time(self) -> int:
        """Number of columns that are mapped at a time."""
        return int(self.jaxpr.invars[0].aval.shape[0])


@dataclasses.dataclass
class _Segment:
    """Equations on whole arrays, after the pass of the same level."""

    equations: list[Any] = dataclasses.field(default_factory=list)
    inputs: list[Any] = dataclasses.field(default_factory=list)
    outputs: list[Any] = dataclasses.field(default_factory=list)
    function: Any = None


class _Plan:
    """Order of the equations of a traced step.

    Args:
        jaxpr: the step, without what no output depends on; its constants are inputs.
        rows_in: whether each input is in files.
        states: numbers of the outputs that become files for the next step, if their rows are large.
        emitted: numbers of the outputs whose rows are written by a sink.

    Raises:
        NotStreamable: the step computes with whole arrays of larger rows.
    """

    def __init__(self, jaxpr: Any, rows_in: Sequence[bool], states: set[int], emitted: set[int]) -> None:
        self.jaxpr = jaxpr
        self.inputs = [*jaxpr.constvars, *jaxpr.invars]
        self._level: dict[Any, int] = {}  # of each whole array, the stage that makes it
        self._rows: dict[Any, _Rows] = {}
        self._made: dict[Any, int] = {}  # of each base, the pass that makes it; 0 for an input
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._columns: list[_ColumnPass] = []
        self._by_columns: set[Any] = set()  # bases that passes over columns make
        self._segments: dict[int, _Segment] = {}
        self.whole: set[Any] = set()  # values with rows that an equation uses as a whole
        for v, has_rows in zip(self.inputs, rows_in, strict=True):
            if has_rows:
                self._rows[v], self._made[v] = _Rows(v), 0
            else:
                self._level[v] = 0
        for eqn in jaxpr.eqns:
            self._add(eqn)
        self.states, self.arrays = self._outputs(states, emitted)
        self._close()

    def _add(self, eqn: Any) -> None:
        """Put an equation of the step in the stage that can compute it first."""
        if eqn.primitive is take_rows_p and eqn.invars[0] in self._rows:
            x, at = eqn.invars
            rows = self._rows[x]
            self._as_whole(at, eqn)
            self._rows[eqn.outvars[0]] = rows._replace(indices=(*rows.indices, at))
        elif eqn.primitive is map_rows_p:
            self._add_map(eqn)
        elif eqn.primitive is map_columns_p:
            self._add_columns(eqn)
        elif eqn.primitive is sum_rows_p and eqn.invars[0] in self._rows:
            base = self._straight(self._rows[eqn.invars[0]], eqn.invars[0].aval)
            at = self._first_read(base)
            if self._is_in_no_pass(base):
                base = self._copied(_Rows(base), base.aval, at)
            self._pass(at, base.aval.shape[0]).parts.append(_Sum(base, eqn.outvars[0]))
            self._level[eqn.outvars[0]] = at
        else:
            largest = None if eqn.primitive is whole_rows_p else USABLE_WHOLE
            given = [v for v in eqn.invars if not isinstance(v, core.Literal)]
            level = max((self._as_whole(v, eqn, largest) for v in given), default=0)
            self._segment(level).equations.append(eqn)
            self._level.update(dict.fromkeys(eqn.outvars, level))

    def _add_map(self, eqn: Any) -> None:
        """Add a map to the first pass that can make it, and before the rows that it takes if that is the same."""
        count, n = eqn.params["shared"], eqn.params["n"]
        shared, given = eqn.invars[:count], eqn.invars[count:]
        least = max((self._as_whole(v, eqn) + 1 for v in shared if not isinstance(v, core.Literal)), default=1)
        rows = [self._rows.get(v, _Rows(v)) for v in given]
        common = {r.indices for r in rows}
        indices: tuple[Any, ...] = ()
        are_taken = len(common) == 1 and all(len(r.indices) == 1 and r.base in self._made for r in rows)
        if are_taken and all(r.base.aval.shape[0] == n for r in rows):
            indices = rows[0].indices  # f of taken rows is f of all rows, taken
            rows = [_Rows(r.base) for r in rows]
        for r in rows:
            if r.base not in self._made:  # a whole array
                least = max(least, self._level[r.base] + 1)
            elif r.indices:
                least = max(least, self._made[r.base] + 1, *(self._level[v] + 1 for v in r.indices))
            elif r.base.aval.shape[0] == n:
                least = max(least, self._first_read(r.base))
            else:
                least = max(least, self._made[r.base] + 1)
        self._pass(least, n).parts.append(_Map(eqn.params["jaxpr"], list(shared), rows, list(eqn.outvars)))
        jaxpr = eqn.params["jaxpr"]
        # What a map returns as it got it, or returns twice, is no new base.
        known = {v: self._rows[x] for v, x in zip(jaxpr.invars, given, strict=True) if x in self._rows}
        for v, inner in zip(eqn.outvars, jaxpr.outvars, strict=True):
            self._made[v] = least
            new = _Rows(v, indices)
            self._rows[v] = new if isinstance(inner, core.Literal) else known.setdefault(inner, new)

    def _add_columns(self, eqn: Any) -> None:
        """Add a map over columns, which needs all rows of what it is given."""
        count = eqn.params["shared"]
        shared, given = list(eqn.invars[:count]), eqn.invars[count:]
        level = max((self._as_whole(v, eqn) + 1 for v in shared if not isinstance(v, core.Literal)), default=1)
        rows = [self._rows.get(v, _Rows(v)) for v in given]
        for r in rows:
            of_base = self._made[r.base] if r.base in self._made else self._level[r.base]
            level = max(level, of_base + 1, *(self._level[v] + 1 for v in r.indices))
        made, of_columns = eqn.outvars[: eqn.params["rows"]], eqn.outvars[eqn.params["rows"] :]
        for v in made:
            self._made[v], self._rows[v] = level, _Rows(v)
        self._by_columns |= set(made)
        self._level.update(dict.fromkeys(of_columns, level))
        columns = eqn.params["columns"]
        number = len(self._columns)
        self._columns.append(_ColumnPass(level, number, eqn.params["jaxpr"], columns, shared, rows, made, of_columns))

    def _is_in_no_pass(self, base: Any) -> bool:
        """Whether no pass over rows makes a base: it is of the state before, or a pass over columns makes it."""
        return self._made[base] == 0 or base in self._by_columns

    def _first_read(self, base: Any) -> int:
        """First pass over as many rows that can use the rows of a base: that which makes it, or the next."""
        return self._made[base] + self._is_in_no_pass(base)

    def _straight(self, rows: _Rows, aval: Any) -> Any:
        """Base of rows without indices: that of a copy, if they have indices."""
        if not rows.indices:
            return rows.base
        level = max(self._made[rows.base], *(self._level[v] for v in rows.indices)) + 1
        return self._copied(rows, aval, level)

    def _copied(self, rows: _Rows, aval: Any, level: int) -> Any:
        """Base that a pass copies from other rows."""
        jaxpr = jax.make_jaxpr(lambda x: x)(jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)).jaxpr
        new = _Name(aval)
        self._made[new] = level
        self._pass(level, aval.shape[0]).parts.append(_Map(jaxpr, [], [rows], [new]))
        return new

    def _as_whole(self, v: Any, eqn: Any, largest: int | None = USABLE_WHOLE) -> int:
        """Use a value as a whole array, and return the stage after which it is there.

        Args:
            v: the value.
            eqn: equation that uses it.
            largest: largest number of bytes of a row; None for any.
        """
        if isinstance(v, core.Literal):
            return 0
        if v in self._rows:
            rows = self._rows[v]
            if largest is not None and v.aval.shape[0] > 1 and _row_bytes(v.aval) > largest:
                raise NotStreamable(f"it computes with an array of shape {v.aval.shape} by '{eqn.primitive.name}'")
            self.whole.add(v)
            # Indices that a segment makes are there after it.
            self._level[v] = max(self._made[rows.base], *(self._level[i] + 1 for i in rows.indices), 0)
        return self._level[v]

    def _outputs(self, states: set[int], emitted: set[int]) -> tuple[dict[int, _Rows], list[Any]]:
        """Outputs that are files for the next step by number; variables of all that are whole arrays."""
        arrays: list[Any] = []
        files: dict[int, _Rows] = {}
        waiting: list[tuple[int, Any]] = []
        for i, v in enumerate(self.jaxpr.outvars):
            if isinstance(v, core.Literal) or v not in self._rows:
                if i in emitted and not isinstance(v, core.Literal):
                    waiting.append((i, v))
                    continue
                if (i in states or i in emitted) and _row_bytes(v.aval) > USABLE_WHOLE:
                    raise NotStreamable(f"it makes an array of shape {v.aval.shape} of the new particles at once")
                arrays.append((i, v))
            elif i in emitted:
                waiting.append((i, v))
            elif i in states and is_large(v.aval):
                rows = self._rows[v]
                if self._made[rows.base] == 0:  # a file of the state before, which does not stay
                    rows = _Rows(self._copied(rows, v.aval, 1 + max((self._level[j] for j in rows.indices), default=0)))
                files[i] = rows
            else:
                self._as_whole(v, self.jaxpr.eqns[-1])
                arrays.append((i, v))
        # All rows of outputs are written together, by one pass.
        if waiting:
            last = 1
            for _, v in waiting:
                one = self._rows.get(v, _Rows(v))
                if one.base not in self._made:
                    last = max(last, self._level[v] + 1)
                else:
                    behind = bool(one.indices) or self._is_in_no_pass(one.base)
                    last = max(last, self._made[one.base] + behind, *(self._level[j] + 1 for j in one.indices))
            for i, v in waiting:
                one = self._rows.get(v, _Rows(v))
                copied = bool(one.indices) or self._made.get(one.base) != last
                base = self._copied(one, v.aval, last) if copied else one.base
                self._pass(last, v.aval.shape[0]).emitted[i] = base
        return files, arrays

    def _pass(self, level: int, n: int) -> _Pass:
        """Pass over n rows at a stage."""
        return self._passes.setdefault((level, n), _Pass(level, n))

    def _segment(self, level: int) -> _Segment:
        """Equations on whole arrays of a stage."""
        return self._segments.setdefault(level, _Segment())

    def _close(self) -> None:
        """Find what each stage hands on to later ones."""
        of_columns = [one.level for one in self._columns]
        self.levels = 1 + max([*self._segments, *(level for level, _ in self._passes), *of_columns], default=0)
        made_in: dict[Any, _Pass] = {}
        for one in self._passes.values():
            for part in one.parts:
                for v in part.outputs if isinstance(part, _Map) else ():
                    made_in[v] = one
        needed: dict[Any, None] = {}  # bases that a later pass reads, or that a file of the state is made of
        for one in self._passes.values():
            for part in one.parts:
                for rows in part.rows if isinstance(part, _Map) else ():
                    if rows.base in made_in and (rows.indices or made_in[rows.base] is not one):
                        needed[rows.base] = None
        for rows in (*self.states.values(), *(rows for one in self._columns for rows in one.rows)):
            needed[rows.base] = None
        in_memory: dict[Any, None] = {}
        for base in (self._rows[v].base for v in self.whole):
            if base in made_in:
                # A few rows may be taken from an array that is too large as a whole.
                (in_memory if _row_bytes(base.aval) <= USABLE_WHOLE else needed)[base] = None
        for v in needed:
            if v not in made_in:  # an array of the state before, a whole one, or one that a pass over columns makes
                continue
            if is_large(v.aval):
                made_in[v].written.append(v)
            else:
                in_memory[v] = None
        for v in in_memory:
            made_in[v].held.append(v)
        # Whole arrays that a segment makes and something else uses.
        used: set[Any] = {v for _, v in self.arrays if not isinstance(v, core.Literal)}
        for one in self._passes.values():
            for part in one.parts:
                if isinstance(part, _Map):
                    used.update(v for v in part.shared if not isinstance(v, core.Literal))
                    used.update(v for rows in part.rows for v in (rows.base, *rows.indices))
        for over in self._columns:
            used.update(v for v in over.shared if not isinstance(v, core.Literal))
            used.update(v for rows in over.rows for v in (rows.base, *rows.indices))
        for rows in self._rows.values():
            used.update(rows.indices)
        for segment in self._segments.values():
            taken = [v for eqn in segment.equations for v in eqn.invars if not isinstance(v, core.Literal)]
            own = {v for eqn in segment.equations for v in eqn.outvars}
            segment.inputs = [v for v in dict.fromkeys(taken) if v not in own]
            used.update(segment.inputs)
        for segment in self._segments.values():
            segment.outputs = [v for eqn in segment.equations for v in eqn.outvars if v in used]

    def stages(self) -> list[tuple[list[_Pass | _ColumnPass], _Segment | None]]:
        """Stages in their order: passes, and then equations on whole arrays."""
        passes: list[_Pass | _ColumnPass] = [*self._passes.values(), *self._columns]
        return [
            ([one for one in passes if one.level == level], self._segments.get(level)) for level in range(self.levels)
        ]

    def is_made_by_columns(self, base: Any) -> bool:
        """Whether a base is made by a pass over columns."""
        return base in self._by_columns

    def has_rows(self, base: Any) -> bool:
        """Whether a base is not a whole array."""
        return base in self._made

    def rows(self, v: Any) -> _Rows:
        """Base and indices of a value with rows."""
        return self._rows[v]


class _Name:
    """Name of a base that is no variable of the traced step."""

    def __init__(self, aval: Any) -> None:
        self.aval = aval


def _row_bytes(aval: Any) -> int:
    """Number of bytes of a row."""
    return int(np.prod(aval.shape[1:], dtype=np.int64)) * aval.dtype.itemsize


# --- computing --------------------------------------------------------------------------------------------------------


class StreamedStep:
    """Function of a state and other arrays, whose particles are read and written in batches.

    Args:
        fn: function of pytrees (state, *others) -> (new state, outputs). `state` may be () for a function that makes
            the first state.
        batch: number of rows of a batch.
        emitted: function (outputs, as a pytree of numbers) -> numbers of those whose rows go to the sink.
    """

    def __init__(self, fn: Callable[..., Any], batch: int, emitted: Callable[[PyTree], list[int]]) -> None:
        self._fn, self._batch, self._emitted = fn, batch, emitted
        self._plan: _Plan | None = None
        self._shapes: Any = None
        self._used: list[bool] = []
        self._is_current = False
        self._consts: list[Any] = []

    def read_anew(self, fn: Callable[..., Any]) -> None:
        """Trace another function at the next call; nothing is compiled if its operations are the same."""
        self._fn, self._is_current = fn, False

    def prepare(self, state: PyTree, *others: PyTree) -> PyTree:
        """Trace the function, and plan its stages.

        Args:
            state: state, with arrays, `StoredRows` or shapes.
            *others: other arguments.

        Returns:
            Shapes and dtypes of the (new state, outputs).

        Raises:
            NotStreamable: it computes with more of all particles at once than memory is meant to hold.
        """
        if self._is_current:
            return self._shapes
        given = jax.tree.map(_shape, (state, *others))
        leaves, form = jax.tree.flatten(given)
        with rows_apart(self._batch), jax.debug_key_reuse(False):
            traced, shapes = jax.make_jaxpr(lambda *x: self._fn(*jax.tree.unflatten(form, x)), return_shape=True)(
                *leaves
            )
        kept, consts, inputs = partial_eval.dce_jaxpr_consts(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
        self._consts = [jax.device_put(v) for v, used in zip(traced.consts, consts, strict=True) if used]
        self._shapes, self._used = shapes, inputs
        if self._plan is None or not same_operations(self._plan.jaxpr, kept):
            count = len(jax.tree.leaves(given[0]))
            in_files = [i < count and is_large(x) for i, x in enumerate(leaves)]
            rows_in = [False] * len(kept.constvars) + [r for r, used in zip(in_files, inputs, strict=True) if used]
            numbers = jax.tree.unflatten(jax.tree.structure(shapes), range(len(jax.tree.leaves(shapes))))
            states = set(jax.tree.leaves(numbers[0]))
            self._plan = _Plan(kept, rows_in, states, set(self._emitted(numbers[1])))
        self._is_current = True
        return shapes

    def __call__(
        self, folder: pathlib.Path, sink: Sink | None, state: PyTree, *others: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Compute the function.

        Args:
            folder: folder for the files of the new state, and for rows that are needed in between.
            sink: function that writes rows of outputs; None if there are none.
            state: state, with arrays and `StoredRows`.
            *others: other arguments.

        Returns:
            (new state, with arrays and `StoredRows`; outputs, with None where a sink has got the rows).
        """
        shapes = self.prepare(state, *others)
        assert self._plan is not None
        leaves = [x for x, used in zip(jax.tree.leaves((state, *others)), self._used, strict=True) if used]
        found = _Run(self._plan, self._batch, folder, sink).outputs([*self._consts, *leaves])
        return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf."""
    if isinstance(x, StoredRows):
        n = x.file.n if x.indices is None else len(x.indices)
        return jax.ShapeDtypeStruct((n, *x.file.shape), x.file.dtype)
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype if is_key(x) else jax.dtypes.canonicalize_dtype(x.dtype))


def is_large(x: Any) -> bool:
    """Whether the rows of an array of particles are held in a file, from its shape and dtype."""
    return bool(x.shape) and not is_key(x) and _row_bytes(x) > IN_MEMORY


class _Run:
    """One computation of a planned step."""

    def __init__(self, plan: _Plan, batch: int, folder: pathlib.Path, sink: Sink | None) -> None:
        self.plan, self.batch, self.folder, self.sink = plan, batch, folder, sink
        self.values: dict[Any, Any] = {}  # whole arrays
        self.files: dict[Any, StoredRows] = {}  # bases in files
        self.held: dict[Any, Any] = {}  # bases in memory

    def outputs(self, given: list[Any]) -> list[Any]:
        """Outputs in their order; None for those whose rows a sink has got."""
        plan = self.plan
        for v, x in zip(plan.inputs, given, strict=True):
            if isinstance(x, StoredRows):
                self.files[v] = x
            else:
                self.values[v] = x
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            for passes, segment in plan.stages():
                for one in passes:
                    if isinstance(one, _ColumnPass):
                        self._make_columns(one, reader, writer)
                    else:
                        self._make_pass(one, reader, writer)
                if segment is not None:
                    self._compute(segment)
        found: list[Any] = [None] * len(plan.jaxpr.outvars)
        for i, v in plan.arrays:
            found[i] = jnp.asarray(v.val) if isinstance(v, core.Literal) else self._whole(v)
        for i, rows in plan.states.items():
            stored = self.files[rows.base]
            # Columns are written in another order than the bytes of the file.
            checksum = stored.file.checksum() if plan.is_made_by_columns(rows.base) else stored.checksum
            found[i] = dataclasses.replace(stored, indices=self._host_indices(rows.indices), checksum=checksum)
        return found

    def _whole(self, v: Any) -> Any:
        """Whole array of a value."""
        if v not in self.values:
            rows = self.plan.rows(v)
            at = self._host_indices(rows.indices)
            if rows.base in self.held:
                found = self.held[rows.base] if at is None else self.held[rows.base][at]
            else:
                found = self.files[rows.base].whole() if at is None else self.files[rows.base].read(at)
            self.values[v] = jnp.asarray(found)
        return self.values[v]

    def _host_indices(self, indices: tuple[Any, ...]) -> np.ndarray | None:
        """Indices of rows in their base; None for the rows as they are."""
        found: np.ndarray | None = None
        for v in indices:
            at = np.asarray(self._whole(v))
            found = at if found is None else found[at]
        return found

    def _compute(self, segment: _Segment) -> None:
        """Compute equations on whole arrays."""
        if segment.function is None:
            jaxpr = self.plan.jaxpr.replace(
                constvars=[],
                invars=segment.inputs,
                outvars=segment.outputs,
                eqns=segment.equations,
                debug_info=self.plan.jaxpr.debug_info.with_unknown_names(),
            )
            segment.function = jax.jit(lambda *x: jax.core.eval_jaxpr(jaxpr, [], *x))
        with jax.debug_key_reuse(False), jax.debug_nans(False):
            found = segment.function(*[self._whole(v) for v in segment.inputs])
        self.values.update(zip(segment.outputs, found, strict=True))

    def _make_pass(self, one: _Pass, reader: ThreadPoolExecutor, writer: ThreadPoolExecutor) -> None:
        """Make a pass: read a batch, compute with the one before, and write the one before that, at the same time."""
        if one.function is None:
            one.function = _Batch(one, self.plan)
        batch = min(self.batch, one.n)
        work: _Batch = one.function
        shared = [self._whole(v) for v in work.shared]
        small, large = self._sources(work)
        outputs: dict[Any, RowFile] = {}
        for v in one.written:
            path = self.folder / f"rows-{one.level}-{one.n}-{len(outputs)}"
            outputs[v] = RowFile(path, one.n, v.aval.shape[1:], np.dtype(v.aval.dtype))
        checksums = dict.fromkeys(outputs, 0)
        pieces: dict[Any, list[Any]] = {v: [] for v in one.held}
        sums = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in work.sums]

        def read(start: int) -> tuple[np.ndarray, list[Any]]:
            at = np.minimum(np.arange(start, start + batch), one.n - 1)
            return at, [jax.device_put(rows.read(at)) for rows in large]

        def write(start: int, found: list[Any]) -> None:
            count = min(batch, one.n - start)
            rows = {v: (x if is_key(x) else np.asarray(x))[:count] for v, x in zip(work.wanted, found, strict=True)}
            for v, file in outputs.items():
                file.write(start, rows[v])
                checksums[v] = zlib.crc32(bytes_of(rows[v]), checksums[v])
            for v, parts in pieces.items():
                parts.append(rows[v] if is_key(rows[v]) else rows[v].copy())
            if one.emitted and self.sink is not None:
                self.sink(start, start + count, {i: rows[v] for i, v in one.emitted.items()})

        def compute(start: int, taken: tuple[np.ndarray, list[Any]]) -> list[Any]:
            nonlocal sums
            at, rows = taken
            is_new = np.arange(start, start + batch) < one.n
            found, sums = work.function(shared, small, rows, at, is_new, sums)
            return found

        _overlapped(range(0, one.n, batch), read, compute, write, reader, writer)
        self.files |= {v: StoredRows(file, None, checksums[v]) for v, file in outputs.items()}
        self.held |= {v: (jnp if is_key(v.aval) else np).concatenate(parts) for v, parts in pieces.items()}
        self.values.update(zip(work.sums, sums, strict=True))

    def _make_columns(self, one: _ColumnPass, reader: ThreadPoolExecutor, writer: ThreadPoolExecutor) -> None:
        """Make a pass over columns: read some, compute with those before, and write those before, at the same time."""
        if one.function is None:
            one.function = jax.jit(lambda shared, *given: jax.core.eval_jaxpr(one.jaxpr, shared, *given))
        shared = [v.val if isinstance(v, core.Literal) else self._whole(v) for v in one.shared]
        size, columns = one.at_a_time, one.columns
        files: dict[Any, RowFile] = {}
        held: dict[Any, np.ndarray] = {v: np.empty(v.aval.shape, v.aval.dtype) for v in one.of_columns}
        for v in one.made:
            if is_large(v.aval):
                path = self.folder / f"columns-{one.number}-{len(files)}"
                files[v] = RowFile(path, v.aval.shape[0], v.aval.shape[1:], np.dtype(v.aval.dtype))
            else:
                held[v] = np.empty(v.aval.shape, v.aval.dtype)

        sources = [self._source(rows, rows.base in self.files) for rows in one.rows]

        def read(start: int) -> tuple[np.ndarray, list[Any]]:
            stop = min(start + size, columns)
            at = np.minimum(np.arange(start, start + size), columns - 1)
            found = []
            for source in sources:
                stored = isinstance(source, StoredRows)
                values = source.read_columns(start, stop) if stored else np.asarray(source)[:, start:stop]
                found.append(jax.device_put(values if stop - start == size else values[:, at - start]))
            return at.astype(np.int32), found

        def write(start: int, found: list[Any]) -> None:
            count = min(size, columns - start)
            for v, x in zip((*one.made, *one.of_columns), found, strict=True):
                if v in files:
                    files[v].write_columns(start, np.asarray(x)[:, :count])
                elif v in one.made:
                    held[v][:, start : start + count] = np.asarray(x)[:, :count]
                else:
                    held[v][start : start + count] = np.asarray(x)[:count]

        def compute(_: int, taken: tuple[np.ndarray, list[Any]]) -> list[Any]:
            at, parts = taken
            found: list[Any] = one.function(shared, at, *parts)
            return found

        _overlapped(range(0, columns, size), read, compute, write, reader, writer)
        self.files |= {v: StoredRows(file) for v, file in files.items()}
        self.held |= {v: held[v] for v in one.made if v in held}
        self.values.update({v: jnp.asarray(held[v]) for v in one.of_columns})

    def _sources(self, work: _Batch) -> tuple[list[Any], list[StoredRows]]:
        """Whole arrays of rows in memory, and rows in files, that the batches of a pass read."""
        small = [self._source(rows, False) for rows, in_file in work.reads.items() if not in_file]
        return small, [self._source(rows, True) for rows, in_file in work.reads.items() if in_file]

    def _source(self, rows: _Rows, in_file: bool) -> Any:
        """Rows that a pass reads: `StoredRows` in a file, or a whole array."""
        at = self._host_indices(rows.indices)
        if in_file:
            stored = self.files[rows.base]
            if at is None:
                return stored
            return dataclasses.replace(stored, indices=at if stored.indices is None else stored.indices[at])
        base = self.held[rows.base] if rows.base in self.held else self._whole(rows.base)
        return base if at is None else base[at]


def _overlapped(
    starts: range,
    read: Callable[[int], Any],
    compute: Callable[[int, Any], list[Any]],
    write: Callable[[int, list[Any]], None],
    reader: ThreadPoolExecutor,
    writer: ThreadPoolExecutor,
) -> None:
    """Read a batch, compute with the one before, and write the one before that, at the same time.

    Args:
        starts: where the batches begin.
        read: function of a start -> what is read.
        compute: function (start, what was read) -> what is to be written.
        write: function (start, what is to be written).
        reader: thread that reads.
        writer: thread that writes.
    """
    waiting: deque[Future[None]] = deque()
    coming = reader.submit(read, starts[0])
    for start in starts:
        taken = coming.result()
        if start != starts[-1]:
            coming = reader.submit(read, start + starts.step)
        with jax.debug_key_reuse(False), jax.debug_nans(False):
            found = compute(start, taken)
        del taken
        if waiting:
            waiting.popleft().result()
        waiting.append(writer.submit(write, start, found))
        del found
    while waiting:
        waiting.popleft().result()


class _Batch:
    """Compiled function of a batch of a pass.

    Attributes:
        shared: what all rows share.
        sums: values of the sums, in their order.
        wanted: bases that it returns.
        reads: rows that are read, and whether they are in a file.
        function: function (shared, rows in memory, batch of rows in files, indices of the rows of the batch, which of
            them are no repetitions, sums so far) -> (rows of each base, sums).
    """

    def __init__(self, one: _Pass, plan: _Plan) -> None:
        self._pass = one
        maps = [part for part in one.parts if isinstance(part, _Map)]
        self.sums = [part.output for part in one.parts if isinstance(part, _Sum)]
        self.wanted = list(dict.fromkeys([*one.written, *one.held, *one.emitted.values()]))
        self.shared = list(dict.fromkeys(v for m in maps for v in m.shared if not isinstance(v, core.Literal)))
        own = {v for m in maps for v in m.outputs}
        self.reads: dict[_Rows, bool] = {}
        for m in maps:
            for rows in m.rows:
                if rows.indices or rows.base not in own:
                    aval = rows.base.aval
                    self.reads[rows] = plan.has_rows(rows.base) and is_large(aval)
        self.function = jax.jit(self._compute)

    def _compute(
        self, shared: list[Any], small: list[Any], large: list[Any], at: Array, is_new: Array, sums: list[Array]
    ) -> tuple[list[Array], list[Array]]:
        one = self._pass
        common = dict(zip(self.shared, shared, strict=True))
        in_memory, in_files = iter(small), iter(large)
        given = {rows: next(in_files) if in_file else next(in_memory)[at] for rows, in_file in self.reads.items()}
        made: dict[Any, Any] = {}
        so_far, new = iter(sums), []
        for part in one.parts:
            if isinstance(part, _Map):
                shared_here = [v.val if isinstance(v, core.Literal) else common[v] for v in part.shared]
                rows = [made[r.base] if r not in given else given[r] for r in part.rows]
                made.update(zip(part.outputs, mapped(part.jaxpr, shared_here, rows, len(at)), strict=True))
            else:
                x = made[part.base]
                mask = is_new.reshape(-1, *[1] * (x.ndim - 1))
                total = next(so_far)
                new.append(total + jnp.sum(jnp.where(mask, x, 0), axis=0, dtype=total.dtype))
        return [made[v] for v in self.wanted], new
