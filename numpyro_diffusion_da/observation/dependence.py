"""Which outputs of a function may depend on its first argument, read off its jaxpr: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

# Primitives that only call a program of their own, whose inputs are theirs; loops and branches are taken whole.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}


def depends_on_first(fn: Callable[..., PyTree], *shapes: PyTree) -> PyTree:
    """For each array that `fn` returns, whether it may depend on its first argument.

    Args:
        fn: takes and returns pytrees of arrays.
        shapes: its arguments, or `jax.ShapeDtypeStruct`s of them.

    Returns:
        `fn`'s result with a bool in place of each array.
    """
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*shapes)
    first = len(jax.tree.leaves(shapes[0]))
    tainted = _tainted(closed.jaxpr, [i < first for i in range(len(closed.jaxpr.invars))])
    return jax.tree.unflatten(jax.tree.structure(out), tainted)


def _tainted(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """For each output of a jaxpr, whether it depends on one of the inputs that are marked."""
    marked = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}
    for equation in jaxpr.eqns:
        given = [not hasattr(v, "val") and v in marked for v in equation.invars]
        if not any(given):
            continue
        inner = equation.params.get(CALLS.get(equation.primitive.name, ""))
        out = [True] * len(equation.outvars) if inner is None else _tainted(inner.jaxpr, given)
        marked.update(v for v, mark in zip(equation.outvars, out, strict=True) if mark)
    return [not hasattr(v, "val") and v in marked for v in jaxpr.outvars]
