"""A function taken apart into an elementwise one of a linear predictor, read off its jaxpr.

Most observations look at the state through a linear functional each, and then through something that is not linear: the
modulus of a component, a count whose log rate is a mean over a block, a retrieval that saturates. Of

    f_i(x) = link_i(b_i(x)),    b affine in x, one b_i for each f_i,

b is what statistics calls the linear predictor. It is Gaussian where x is, however far from linear the link is, and
each f_i can be integrated along it by itself.

The function is traced once, and its operations are followed: one that is linear in x keeps its result affine, one that
acts element by element keeps the link to the last affine array. What is neither (a sum over squares, a loop) ends the
search, and `linear_predictor` says None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_diffusion_da.observation.dependence import CALLS

# Linear in one argument where the others do not depend on x; they move values or sum them.
LINEAR = frozenset({"reduce_sum", "dot_general", "concatenate", "pad", "cumsum", "rev", "transpose", "gather"})
# Linear too, and no more than a choice of elements: where an elementwise result goes, its predictor goes along.
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
    """f = link(predictor(x)), elementwise.

    Attributes:
        predictor: x -> b, affine, shape (m,).
        link: b, shape (m,) -> f, shape (m,); element i depends on b_i alone.
        components: the element of x, flattened, that is b_i but for a shift and a factor; None where there is none.
    """

    predictor: Callable[[Float[Array, ...]], Float[Array, " m"]]
    link: Callable[[Float[Array, " m"]], Float[Array, " m"]]
    components: Int[np.ndarray, " m"] | None


def find_linear_predictor(fn: Callable[[Array], Array], shape: tuple[int, ...]) -> LinearPredictor | None:
    """The predictor and link of a function, or None where it has none of this form.

    Args:
        fn: x -> values, shape (m,).
        shape: of x.
    """
    x = jax.ShapeDtypeStruct(shape, jnp.zeros(()).dtype)
    flat = _flatten(jax.make_jaxpr(fn)(x))
    found = _follow(flat)
    if found is None:
        return None
    base, index = found

    def predictor(x: Array) -> Array:
        return _evaluate(flat, {flat.argument: x}, base).reshape(-1)[index]

    def link(b: Array) -> Array:
        # The rest of the base is never looked at: no element of the result depends on it.
        size = flat.shapes[base]
        whole = jnp.zeros(int(np.prod(size)), b.dtype).at[index].set(b).reshape(size)
        return _evaluate(flat, {flat.argument: jnp.zeros(shape, b.dtype), base: whole}, flat.result)

    return LinearPredictor(predictor, link, index if base == flat.argument else None)


class _Equation(NamedTuple):
    primitive: Any
    params: dict[str, Any]
    inputs: list[Any]
    outputs: list[int]


class _Flat(NamedTuple):
    """A jaxpr without calls. Values have numbers; inputs are numbers, or `_Constant`s."""

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
    """What is known of a value that depends on x.

    Attributes:
        affine: whether it is affine in x.
        base: the affine value that it is an elementwise function of.
        places: for each of its elements that of the base, flattened, shape of the value.
    """

    affine: bool
    base: int
    places: Int[np.ndarray, ...]


OTHER = "depends on x in another way"


def _follow(flat: _Flat) -> tuple[int, Int[np.ndarray, " m"]] | None:
    """The base of the result and the place in it of each element; None where there is none of its own for each."""

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
    """The kind of an equation's one result: a `_Kind`, "affine" for a new base, or None for another dependence."""
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
    # The same element of the same base in every operand, at the shape of the result.
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
    """Where a choice of elements takes an index; None where it depends on values that are not known yet."""
    others = [i.value if isinstance(i, _Constant) else None for i in equation.inputs[1:]]
    if any(other is None or isinstance(other, jax.core.Tracer) for other in others):
        return None
    if equation.primitive.name == "gather" and "FILL" in str(equation.params.get("mode")).upper():
        return None  # an index out of bounds would count as an element
    with jax.ensure_compile_time_eval():
        index = equation.primitive.bind(jnp.asarray(kind.places, jnp.int32), *others, **equation.params)
    return _Kind(kind.affine, kind.base, np.asarray(index))


def _evaluate(flat: _Flat, known: dict[int, Array], wanted: Any) -> Array:
    """The value of that number, from those that are known; equations that it does not need are not looked at."""
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
