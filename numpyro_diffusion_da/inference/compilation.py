"""Compilation of functions that close over large arrays.

A NumPyro program closes over its prior. With plain `jax.jit` the arrays of the prior, such as network parameters,
become constants of the compiled program: it gets large and slow to compile, and the arrays are in memory twice.
`Compiled` passes them as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
from jax.interpreters import partial_eval

from numpyro_diffusion_da.inference.identity import same_operations


class HoldsCompiled:
    """Base class of objects that hold compiled functions, which only shallow copies share.

    Deep copies and pickles are made without them, and compile again when they are used.
    """

    without_compiled: ClassVar[Mapping[str, Any]] = {}
    """Values of the attributes that depend on what has been traced or compiled, in an object that has not."""

    def __copy__(self) -> Any:
        """Shallow copy, which shares the compiled functions."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """State for deep copies and pickles, without what has been traced or compiled."""
        return {**self.__dict__, **self.without_compiled}


class Compiled:
    """Compiled function, like that of `eqx.filter_jit`, to which all arrays in its closure are passed as arguments.

    The function is traced once for each combination of shapes, dtypes and static values of its arguments. Its closure
    is read at that time. Later changes of what it reads have an effect after `read_anew`.

    Args:
        fn: function of pytrees that returns a pytree. Leaves that are not arrays are static and must be hashable.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._traced: dict[Any, _Traced] = {}
        self._current: set[Any] = set()

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without what has been traced and compiled."""
        return {"_fn": self._fn}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the function, which is traced again at its next call."""
        self.__init__(state["_fn"])  # type: ignore[misc]

    def read_anew(self, fn: Callable[..., Any] | None = None) -> None:
        """Trace the function again at its next call, because what it reads from outside may have changed.

        If the operations are the same, nothing is compiled, and arrays in the closure have their new values.

        Args:
            fn: function that replaces the function; None keeps it.
        """
        self._fn = self._fn if fn is None else fn
        self._current.clear()

    @property
    def num_traced(self) -> int:
        """Number of combinations of shapes, dtypes and static values that the function is compiled for."""
        return len(self._traced)

    def _prepared(self, args: tuple[Any, ...]) -> tuple[_Traced, list[Any]]:
        """Trace of the function for arguments of these shapes, dtypes and static values, and their arrays."""
        dynamic, static = eqx.partition(args, eqx.is_array)
        arrays, form = jax.tree.flatten(dynamic)
        shapes = [(x.shape, _dtype(x)) for x in arrays]
        leaves, structure = jax.tree.flatten(static)
        key = (form, tuple(shapes), structure, tuple(leaves))
        if key in self._current:
            return self._traced[key], arrays
        new, before = _Traced(self._fn, args), self._traced.get(key)
        if new.belongs_to_a_trace:
            return new, arrays
        if before is not None and before.takes_over(new):
            new = before
        self._traced[key] = new
        self._current.add(key)
        return new, arrays

    def __call__(self, *args: Any) -> Any:
        """Return `fn(*args)`, compiled."""
        traced, arrays = self._prepared(args)
        return traced(arrays)

    def lower(self, *args: Any) -> Any:
        """Lower the function for these arguments without compiling it, as `jax.jit(fn).lower` does."""
        traced, arrays = self._prepared(args)
        return traced.lower(arrays)


def _dtype(x: Any) -> Any:
    """Type of an array as JAX takes it."""
    return x.dtype if isinstance(x, jax.Array) else jax.dtypes.canonicalize_dtype(x.dtype)


class _Traced:
    """Function traced for arguments of given shapes, dtypes and static values, and compiled at its first call.

    Args:
        fn: function of pytrees.
        args: arguments, as for a call.
    """

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        with jax.debug_key_reuse(False):  # a filter repeats some draws on purpose
            closed, out, self._static = eqx.filter_make_jaxpr(fn)(*args)
        self._out: Any = jax.tree.structure(out)
        # What no output depends on may differ between two traces of one function, and would be computed for nothing.
        kept, consts, inputs = partial_eval.dce_jaxpr_consts(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        self._jaxpr, self._inputs = kept, inputs
        values = [value for value, used in zip(closed.consts, consts, strict=True) if used]
        # NumPy arrays would be moved to the device at each call.
        self._consts = [v if isinstance(v, jax.core.Tracer) else jax.device_put(v) for v in values]
        types: list[Any] = [out.aval for out in kept.outvars]

        # A first state that comes from a Python number would have a weak type, and the next state none: the step would
        # be compiled for both.
        def without_weak_types(consts: list[Any], arrays: list[Any]) -> list[Any]:
            outs = zip(jax.core.eval_jaxpr(kept, consts, *arrays), types, strict=True)
            return [jax.lax.convert_element_type(x, t.dtype) if getattr(t, "weak_type", False) else x for x, t in outs]

        self._run = jax.jit(without_weak_types)

    @property
    def belongs_to_a_trace(self) -> bool:
        """Whether the function closes over a value of a JAX trace, so that it must not outlive this trace."""
        return any(isinstance(value, jax.core.Tracer) for value in self._consts)

    def takes_over(self, other: _Traced) -> bool:
        """Take the constants of a later trace if its operations are the same, and return whether they are."""
        same = (
            self._inputs == other._inputs
            and self._out == other._out
            and bool(eqx.tree_equal(self._static, other._static))
            and same_operations(self._jaxpr, other._jaxpr)
        )
        if same:
            self._consts = other._consts
        return same

    def _used(self, arrays: list[Any]) -> list[Any]:
        """Arrays of the arguments that an output depends on."""
        return [array for array, used in zip(arrays, self._inputs, strict=True) if used]

    def __call__(self, arrays: list[Any]) -> Any:
        """Compute the function of these arrays of its arguments."""
        given = self._consts, self._used(arrays)
        with jax.debug_key_reuse(False), jax.debug_nans(False):  # NaN marks what is missing
            found = self._run(*given)
        return eqx.combine(jax.tree.unflatten(self._out, found), self._static)

    def lower(self, arrays: list[Any]) -> Any:
        """Lower the function for these arrays of its arguments without compiling it."""
        return self._run.lower(self._consts, self._used(arrays))
