r"""Splitting of a function into a linear predictor and an elementwise link, from its jaxpr.

Most observations depend on the state through one linear functional each, followed by a nonlinear function: the modulus
of a component, a count whose log rate is a mean over a block, a retrieval that saturates. Such a function has the form

$$f_i(x) = \mathrm{link}_i(b_i(x)),$$

where $b$ is affine in $x$ and every $f_i$ has its own $b_i$. Statistics calls $b$ the linear predictor. It is Gaussian
if $x$ is Gaussian, however nonlinear the link is, and each $f_i$ can be integrated along its $b_i$ alone.

`find_linear_predictor` traces the function once and follows its operations. An operation that is linear in $x$ keeps
its result affine. An elementwise operation keeps the link to the last affine array. Any other operation (a sum of
squares, a loop) ends the search, and the result is None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Primitives that only call an inner jaxpr with their own inputs, and the parameter that holds it.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
# Operations that move or sum values: linear in one argument if the others do not depend on x.
LINEAR = frozenset({"reduce_sum", "dot_general", "concatenate", "pad", "cumsum", "rev", "transpose", "gather"})
# Operations that only choose or rearrange elements: each element of an elementwise result keeps its predictor.
MOVES = frozenset(
    {"slice", "dynamic_slice", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "rev", "transpose", "gather"}
)
SUMS = frozenset({"add", "sub", "add_any"})
SAME = frozenset({"neg", "copy", "copy_p", "convert_element_type", "stop_gradient", "reduce_precision"})
ELEMENTWISE = frozenset(
    {
        "abs", "sign", "exp", "exp2", "log", "log1p", "expm1", "sin", "cos", "tan", "sinh", "cosh", "tanh", "asin",
        "acos", "atan", "atan2", "asinh", "acosh", "atanh", "erf", "erfc", "erf_inv", "lgamma", "digamma", "logistic",
        "sqrt", "rsqrt", "cbrt", "square", "integer_pow", "pow", "max", "min", "mul", "div", "rem", "select_n", "eq",
        "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "is_finite", "floor", "ceil", "round", "clamp",
        "igamma", "igammac", "regularized_incomplete_beta", "bessel_i0e", "bessel_i1e", "nextafter",
        *SUMS, *SAME,
    }
)  # fmt: skip


class LinearPredictor(NamedTuple):
    """Function of the form f(x) = link(predictor(x)) with an affine predictor and an elementwise link.

    Attributes:
        predictor: affine function from x to b, shape (m,).
        link: function from b, shape (m,), to f, shape (m,). Element i of f depends on b_i alone.
        components: index of the element of the flattened x that b_i is, shape (m,). None if b is another affine
            function of x.
    """

    predictor: Callable[[Float[Array, ...]], Float[Array, " m"]]
    link: Callable[[Float[Array, " m"]], Float[Array, " m"]]
    components: Int[np.ndarray, " m"] | None


def find_linear_predictor(fn: Callable[[Array], Array], shape: tuple[int, ...]) -> LinearPredictor | None:
    """Find the linear predictor and the link of a function.

    Args:
        fn: function from x to values, shape (m,).
        shape: shape of x.

    Returns:
        The predictor and link, or None if the function was not found to have this form.
    """
    x = jax.ShapeDtypeStruct(shape, jnp.zeros(()).dtype)
    flat = _flatten(jax.make_jaxpr(fn)(x))
    found = _follow(flat)
    if found is None:
        return None
    base, index = found

    def predictor(x: Array) -> Array:
        return _evaluate(flat, {flat.argument: x}, base).reshape(-1)[index]

    size = flat.shapes[base]
    # For each element of the base, where it is in b. The others may have any value, because no result depends on them.
    place = np.zeros(int(np.prod(size)), int)
    place[index] = np.arange(len(index))
    in_order = np.array_equal(place, np.arange(len(index)))

    def link(b: Array) -> Array:
        # A quadrature calls this many times, so a base in the same order is not copied element by element.
        whole = (b if in_order else b[place]).reshape(size)
        return _evaluate(flat, {flat.argument: jnp.zeros(shape, b.dtype), base: whole}, flat.result)

    return LinearPredictor(predictor, link, index if base == flat.argument else None)


class _Equation(NamedTuple):
    primitive: Any
    params: dict[str, Any]
    inputs: list[Any]
    outputs: list[int]


class _Flat(NamedTuple):
    """Jaxpr with its calls inlined. Each value has a number; an input is such a number or a `_Constant`."""

    equations: list[_Equation]
    argument: int
    result: Any
    shapes: dict[int, tuple[int, ...]]


class _Constant(NamedTuple):
    value: Any


def _flatten(closed: Any) -> _Flat:
    equations: list[_Equation] = []
    shapes: dict[int, tuple[int, ...]] = {}

    def number(variable: Any) -> int:
        shapes[len(shapes)] = tuple(variable.aval.shape)
        return len(shapes) - 1

    def inline(jaxpr: Any, consts: Any, arguments: list[Any]) -> list[Any]:
        at: dict[Any, Any] = {v: _Constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}
        at.update(zip(jaxpr.invars, arguments, strict=True))

        def read(v: Any) -> Any:
            return _Constant(v.val) if hasattr(v, "val") else at[v]

        for equation in jaxpr.eqns:
            inputs = [read(v) for v in equation.invars]
            inner = equation.params.get(CALLS.get(equation.primitive.name, ""))
            if inner is not None:
                at.update(zip(equation.outvars, inline(inner.jaxpr, inner.consts, inputs), strict=True))
                continue
            outputs = [number(v) for v in equation.outvars]
            equations.append(_Equation(equation.primitive, equation.params, inputs, outputs))
            at.update(zip(equation.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    argument = number(closed.jaxpr.invars[0])
    (result,) = inline(closed.jaxpr, closed.consts, [argument])
    return _Flat(equations, argument, result, shapes)


class _Kind(NamedTuple):
    """How a value depends on x.

    Attributes:
        affine: whether the value is affine in x.
        base: number of the affine value of which this value is an elementwise function.
        places: for each element of the value, the index of the element of the flattened base that it depends on.
    """

    affine: bool
    base: int
    places: Int[np.ndarray, ...]


OTHER = "depends on x in another way"


def _follow(flat: _Flat) -> tuple[int, Int[np.ndarray, " m"]] | None:
    """Base of the result and each element's index in it; None unless each element has a base element of its own."""

    def own(value: int) -> _Kind:
        return _Kind(True, value, np.arange(int(np.prod(flat.shapes[value]))).reshape(flat.shapes[value]))

    kinds: dict[int, Any] = {flat.argument: own(flat.argument)}
    for equation in flat.equations:
        given = [kinds[i] for i in equation.inputs if not isinstance(i, _Constant) and i in kinds]
        if not given:
            continue
        for output in equation.outputs:
            kinds[output] = OTHER
        if OTHER in given:
            continue
        kind = _of_equation(equation, kinds, flat)
        if kind is not None:
            kinds[equation.outputs[0]] = own(equation.outputs[0]) if kind == "affine" else kind
    kind = None if isinstance(flat.result, _Constant) else kinds.get(flat.result)
    if kind is None or kind == OTHER:
        return None
    index = kind.places.reshape(-1)
    return (kind.base, index) if len(np.unique(index)) == len(index) else None


def _of_equation(equation: _Equation, kinds: dict[int, Any], flat: _Flat) -> Any:
    """Kind of an equation's only result: a `_Kind`, "affine" for a new base, or None for any other dependence."""
    name = equation.primitive.name
    varying = [i for i in equation.inputs if not isinstance(i, _Constant) and i in kinds]
    given = [kinds[i] for i in varying]
    first = given[0]
    shape = flat.shapes[equation.outputs[0]]
    all_affine = all(kind.affine for kind in given)
    if name in MOVES and len(given) == 1 and equation.inputs[0] == varying[0]:
        moved = _moved(equation, first)
        if moved is not None:
            return moved
    if name in LINEAR:
        data_first = name != "gather" or (equation.inputs[0] == varying[0] and len(varying) == 1)
        single = name != "dot_general" or len(varying) == 1
        return "affine" if all_affine and data_first and single else None
    if name not in ELEMENTWISE:
        return None
    # Whether all operands depend on the same elements of the same base, in the shape of the result.
    alike = all(
        kind.base == first.base and kind.places.shape == shape and np.array_equal(kind.places, first.places)
        for kind in given
    )
    scaled = name in ("mul", "div") and len(varying) == 1 and equation.inputs[0 if name == "div" else -1] in varying
    scaled = scaled or (name == "mul" and len(varying) == 1)
    fixed = name == "select_n" and equation.inputs[0] not in varying
    affine = all_affine and (name in SUMS or name in SAME or scaled or fixed)
    if alike:
        return _Kind(affine, first.base, first.places)
    return "affine" if affine else None


def _moved(equation: _Equation, kind: _Kind) -> _Kind | None:
    """Kind of the result of a choice of elements; None if the choice depends on values that are not known yet."""
    others = [i.value if isinstance(i, _Constant) else None for i in equation.inputs[1:]]
    if any(other is None or isinstance(other, jax.core.Tracer) for other in others):
        return None
    if equation.primitive.name == "gather" and "FILL" in str(equation.params.get("mode")).upper():
        return None  # the fill value for an index out of bounds would count as an element
    with jax.ensure_compile_time_eval():
        index = equation.primitive.bind(jnp.asarray(kind.places, jnp.int32), *others, **equation.params)
    return _Kind(kind.affine, kind.base, np.asarray(index))


def _evaluate(flat: _Flat, known: dict[int, Array], wanted: Any) -> Array:
    """Value of the number `wanted`, computed from known values; only the equations that it needs are evaluated."""
    if isinstance(wanted, _Constant):
        return wanted.value
    needed = {wanted}
    chosen = []
    for equation in reversed(flat.equations):
        outputs = set(equation.outputs)
        if outputs & needed and not outputs & set(known):
            needed |= {i for i in equation.inputs if not isinstance(i, _Constant)}
            chosen.append(equation)
    values = dict(known)
    for equation in reversed(chosen):
        inputs = [i.value if isinstance(i, _Constant) else values[i] for i in equation.inputs]
        out = equation.primitive.bind(*inputs, **equation.params)
        out = out if equation.primitive.multiple_results else [out]
        values.update(zip(equation.outputs, out, strict=True))
    return values[wanted]
