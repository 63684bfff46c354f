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
    is read at that time, so later changes of the closure have no effect.

    Args:
        fn: function of pytrees that returns a pytree. Leaves that are not arrays are static and must be hashable.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._traced: dict[Any, Any] = {}
        self._run: Any = eqx.filter_jit(_call)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without what has been traced and compiled."""
        return {"_fn": self._fn}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the function, which is traced again at its next call."""
        self.__init__(state["_fn"])  # type: ignore[misc]

    def _converted(self, args: tuple[Any, ...]) -> Any:
        """Function with its closure made explicit, traced for arguments of these shapes, dtypes and static values."""
        dynamic, static = eqx.partition(args, eqx.is_array)
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(lambda: dynamic))]
        leaves, structure = jax.tree.flatten(static)
        key = (jax.tree.structure(dynamic), tuple(shapes), structure, tuple(leaves))
        if key not in self._traced:
            self._traced[key] = eqx.filter_closure_convert(self._fn, *args)
        return self._traced[key]

    def __call__(self, *args: Any) -> Any:
        """Return `fn(*args)`, compiled."""
        return self._run(self._converted(args), args)

    def lower(self, *args: Any) -> Any:
        """Lower the function for these arguments without compiling it, as `jax.jit(fn).lower` does."""
        return self._run.lower(self._converted(args), args)


def _call(converted: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call a converted function; `eqx.filter_jit` of this function passes its closure as an argument."""
    return converted(*args)
