"""Compiling a function whose closure holds large arrays.

A NumPyro program closes over its prior. Under plain `jax.jit` the prior's arrays, network parameters among them, become
constants of the compiled program: written into it, folded by the compiler, held twice. Here they are arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


class Compiled:
    """A function as `eqx.filter_jit` gives it, with every array that it closes over passed as an argument.

    It is traced once for each set of shapes, dtypes and static values of its arguments, and what it closes over is read
    at that time: a later change of the closure is not seen.

    Args:
        fn: takes and returns pytrees; leaves that are not arrays are static, and must be hashable.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._traced: dict[Any, Any] = {}
        self._run: Any = eqx.filter_jit(_call)

    def _converted(self, args: tuple[Any, ...]) -> Any:
        dynamic, static = eqx.partition(args, eqx.is_array)
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(lambda: dynamic))]
        leaves, structure = jax.tree.flatten(static)
        key = (jax.tree.structure(dynamic), tuple(shapes), structure, tuple(leaves))
        if key not in self._traced:
            self._traced[key] = eqx.filter_closure_convert(self._fn, *args)
        return self._traced[key]

    def __call__(self, *args: Any) -> Any:
        """`fn(*args)`."""
        return self._run(self._converted(args), args)

    def lower(self, *args: Any) -> Any:
        """The program before it is compiled, as `jax.jit(fn).lower` gives it."""
        return self._run.lower(self._converted(args), args)


def _call(converted: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return converted(*args)
