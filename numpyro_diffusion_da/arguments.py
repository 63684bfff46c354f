"""Argument checks whose message says what was got, what is expected and what to write instead."""

from __future__ import annotations

import math
import numbers
import reprlib
import types
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import jax
import numpy as np

MOST = 2**31 - 1
"""Largest count, because JAX counts in 32 bits."""


def require(value: Any, kind: type | tuple[type, ...], owner: Any, name: str, example: str) -> None:
    """Raise a TypeError if an argument is of the wrong kind.

    Args:
        value: the argument.
        kind: the accepted class or classes.
        owner: the object that got the argument, or the name of a function as a string.
        name: name of the argument.
        example: a correct argument for the message, as written in a program.

    Raises:
        TypeError: `value` is not an instance of `kind`. The message says what was got and what to write instead.
    """
    if isinstance(value, kind):
        return
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(k.__name__ for k in kinds)
    article = "an" if expected[0] in "AEIOU" else "a"
    raise TypeError(
        f"{_name(owner)} got {name}={shown(value, kinds)}; expected {article} {expected}: write {name}={example}."
    )


def require_count(value: Any, owner: Any, name: str, least: int = 1) -> None:
    """Raise an error if an argument is not a whole number, or is too small.

    Args:
        value: the argument.
        owner: the object that got the argument, or the name of a function as a string.
        name: name of the argument.
        least: the smallest number that is accepted.

    Raises:
        TypeError: `value` is not a whole number.
        ValueError: `value` is below `least`, or above 2^31 - 1.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{_name(owner)} got {name}={shown(value)}; give a whole number of {least} or more.")
    if int(value) < least:
        raise ValueError(f"{_name(owner)} got {name}={value}; give {least} or more.")
    if int(value) > MOST:
        raise ValueError(f"{_name(owner)} got {name}={shown(int(value))}; give {MOST} at most.")


def require_number(
    value: Any,
    owner: Any,
    name: str,
    advice: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    finite: bool = True,
) -> float:
    """Return an argument as a Python number, and raise an error if it is none or outside its range.

    A NumPy or JAX array without axes counts as a number. It becomes a Python number, because settings are compared and
    hashed, which arrays are not made for.

    Args:
        value: the argument.
        owner: the object that got the argument, or the name of a function as a string.
        name: name of the argument.
        advice: what to give, for the message.
        least: the smallest number that is accepted.
        above: the number must be larger than this one.
        most: the largest number that is accepted.
        below: the number must be smaller than this one.
        finite: whether infinite numbers are refused. NaN always is.

    Raises:
        TypeError: `value` is not a real number; True and False are not.
        ValueError: it is NaN or outside the range.
    """
    if not is_number(value):
        raise TypeError(f"{_name(owner)} got {name}={shown(value)}; {advice}")
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        number = math.nan
    inside = least <= number <= most and (above < number or above == -math.inf)
    if not inside or not (number < below or below == math.inf) or (finite and math.isinf(number)):
        raise ValueError(f"{_name(owner)} got {name}={shown(value)}; {advice}")
    return number


def numbers_by_name(value: Any, owner: Any, name: str, advice: str) -> float | dict[str, float]:
    """Return an argument that is a positive number, or a mapping from names of sites to positive numbers.

    Args:
        value: the argument; infinity is accepted.
        owner: the object that got the argument, or the name of a function as a string.
        name: name of the argument.
        advice: what to give, for the message.

    Raises:
        TypeError: a number or a name is of another kind.
        ValueError: a number is not positive, or the mapping is empty.
    """
    if not isinstance(value, Mapping):
        return require_number(value, owner, name, advice, above=0.0, finite=False)
    if not value or not all(isinstance(site, str) for site in value):
        raise (TypeError if value else ValueError)(f"{_name(owner)} got {name}={shown(value)}; {advice}")
    return {
        site: require_number(number, owner, f"{name}[{site!r}]", advice, above=0.0, finite=False)
        for site, number in value.items()
    }


def is_number(value: Any) -> bool:
    """Whether a value is one real number: of Python, NumPy or JAX, but neither True nor False."""
    if isinstance(value, (bool, np.bool_, np.ma.MaskedArray)):
        return False
    if isinstance(value, numbers.Real):
        return True
    if not isinstance(value, (np.ndarray, jax.Array)) or isinstance(value, jax.core.Tracer) or value.ndim > 0:
        return False
    return any(jax.dtypes.issubdtype(value.dtype, kind) for kind in (np.integer, np.floating))


def number(owner: str, name: str, advice: str, optional: bool = False, **limits: Any) -> Callable[[Any], float | None]:
    """Make the converter of a field that holds a number, see `require_number`.

    Args:
        owner: name of the class.
        name: name of the field.
        advice: what to give, for the message.
        optional: whether None is accepted.
        **limits: range of the number.
    """

    def converter(value: Any) -> float | None:
        return None if optional and value is None else require_number(value, owner, name, advice, **limits)

    return converter


def count(owner: str, name: str, least: int = 1, optional: bool = False) -> Callable[[Any], int | None]:
    """Make the converter of a field that holds a whole number, see `require_count`.

    Args:
        owner: name of the class.
        name: name of the field.
        least: the smallest number that is accepted.
        optional: whether None is accepted.
    """

    def converter(value: Any) -> int | None:
        if optional and value is None:
            return None
        require_count(value, owner, name, least)
        return int(value)

    return converter


def flag(owner: str, name: str) -> Callable[[Any], bool]:
    """Make the converter of a field that is True or False, see `require_flag`.

    Args:
        owner: name of the class.
        name: name of the field.
    """
    return lambda value: require_flag(value, owner, name)


def require_flag(value: Any, owner: Any, name: str) -> bool:
    """Return an argument that is True or False, and raise an error if it is something else.

    Args:
        value: the argument.
        owner: the object that got the argument, or the name of a function as a string.
        name: name of the argument.

    Raises:
        TypeError: `value` is neither True nor False.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{_name(owner)} got {name}={shown(value)}; give True or False.")
    return bool(value)


def require_fraction(value: Any, owner: Any, name: str, advice: str) -> float:
    """Return an argument as a Python number, and raise an error if it is not one from 0 to below 1.

    Args:
        value: the argument.
        owner: the object that got the argument, or the name of a function as a string.
        name: name of the argument.
        advice: what to give, for the message.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is outside [0, 1).
    """
    return require_number(value, owner, name, advice, least=0.0, below=1.0)


def real_array(value: Any, owner: Any, name: str, example: str) -> np.ndarray:
    """Convert an argument to an array in double precision, of finite real numbers.

    Args:
        value: the argument.
        owner: the object that got the argument, or the name of a function as a string.
        name: name of the argument.
        example: a correct argument for the message, as written in a program.

    Raises:
        TypeError: the argument is not an array of real numbers.
        ValueError: a value is NaN or infinite.
    """
    array = _as_numpy(value)
    if isinstance(value, np.ma.MaskedArray) and np.ma.getmaskarray(value).any():
        raise ValueError(f"{_name(owner)} got {name} with masked values; give finite numbers.")
    if array.dtype.kind == "c":
        raise TypeError(f"{_name(owner)} got {name} with complex numbers; give real numbers, as in {name}={example}.")
    if array.dtype.kind in "SUmMO":
        got = f"values of type {array.dtype}" if isinstance(value, np.ndarray) else shown(value)
        raise TypeError(f"{_name(owner)} got {name}={got}; expected a ndarray of numbers: write {name}={example}.")
    array = array.astype(np.float64)
    if bad := int((~np.isfinite(array)).sum()):
        raise ValueError(
            f"{_name(owner)} got {name} with non-finite values, {bad} of {array.size}; give finite numbers."
        )
    return array


def _as_numpy(value: Any) -> np.ndarray:
    """NumPy array of a value; an array of one Python object if there is none, as for lists of different lengths."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        return np.asarray(None)


def real_values(value: Any, what: str) -> np.ndarray:
    """Convert an array of real numbers to double precision; NaN stays, and masked values become NaN.

    Args:
        value: anything that NumPy makes an array of.
        what: what the value is, for the message, such as "the truth".

    Raises:
        TypeError: the value is no array of real numbers.
    """
    array = _as_numpy(value)
    if array.dtype.kind != "b" and not any(jax.dtypes.issubdtype(array.dtype, k) for k in (np.integer, np.floating)):
        kinds = {"c": "complex numbers", "M": "dates", "m": "time differences", "U": "text", "S": "text"}
        is_array = isinstance(value, np.ndarray) or hasattr(value, "dtype")
        got = f"holds {kinds.get(array.dtype.kind, 'Python objects')}" if is_array else f"is {shown(value)}"
        raise TypeError(f"{what} {got}; give an array of real numbers, with NaN for what is missing.")
    values = array.astype(float)
    return np.where(np.ma.getmaskarray(value), np.nan, values) if isinstance(value, np.ma.MaskedArray) else values


def values_along_axis(values: Any, what: str) -> Any:
    """Coordinate values after a check that they are a sequence along one axis; an iterator becomes a list.

    Args:
        values: the values, of any kind.
        what: what the axis is called in the message.

    Raises:
        TypeError: the values are something else.
    """
    if isinstance(values, Iterator):
        values = list(values)
    try:
        along_one = not isinstance(values, (str, bytes, Mapping, Set)) and np.ndim(values) == 1
    except ValueError:  # lists of different lengths
        along_one = False
    if not along_one:
        raise TypeError(f"{what} got {shown(values)}; give a list of values, one for each index.")
    return values


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to another shape, without an axis more.

    Args:
        shape: shape of the array.
        to: shape that the result would have.
    """
    if len(shape) > len(to):
        return False
    return all(size in (1, other) for size, other in zip(shape[::-1], to[::-1], strict=False))


def require_noise_range(value: Any, owner: Any) -> None:
    """Raise an error if an argument is not a range of noise levels.

    Args:
        value: the argument `noise_range`.
        owner: the object that got the argument, or the name of a function as a string.

    Raises:
        TypeError: `value` is not a tuple.
        ValueError: `value` is not two levels with 0 < lowest < highest < infinity.
    """
    require(value, tuple, owner, "noise_range", "(0.02, 80.0)")
    numeric = all(isinstance(level, numbers.Real) and not isinstance(level, bool) for level in value)
    if len(value) != 2 or not numeric or not 0.0 < value[0] < value[1] < math.inf:
        raise ValueError(
            f"{_name(owner)} got noise_range={value}; give two levels, 0 < lowest < highest, as in (0.02, 80.0)."
        )


def require_key(value: Any, owner: Any, name: str = "rng_key") -> None:
    """Raise an error if an argument is not a single random key of JAX, of either style.

    Args:
        value: the argument.
        owner: the object that got the argument, or the name of a function as a string.
        name: name of the argument.

    Raises:
        TypeError: `value` is not a random key.
        ValueError: `value` holds several keys, or none.
    """
    advice = "give one random key, jax.random.key(0)"
    if isinstance(value, (jax.Array, np.ndarray)):
        new = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
        size = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
        if new or (value.dtype == np.uint32 and value.shape[-1:] == size):
            shape = value.shape if new else value.shape[:-1]
            if shape:
                raise ValueError(
                    f"{_name(owner)} got {name} with random keys of shape {shape}; {advice} (of several keys, keys[i])."
                )
            return
        got = f"an array of shape {value.shape} and type {value.dtype}"
    else:
        got = shown(value)
    raise TypeError(f"{_name(owner)} got {name}={got}; {advice}.")


def require_program(value: Any, owner: Any) -> None:
    """Raise a TypeError if an argument is not a NumPyro program, which is a function.

    Args:
        value: the argument.
        owner: the object that got the argument, or the name of a function as a string.

    Raises:
        TypeError: `value` cannot be called.
    """
    if not callable(value):
        hint = "; it looks like the result of a call: leave the call's parentheses out" if value is None else ""
        raise TypeError(
            f"{_name(owner)} got model={shown(value)}; expected a NumPyro program, the function itself: write "
            f"{_name(owner)}(model){hint}."
        )


def shown(value: Any, kinds: tuple[type, ...] = ()) -> str:
    """Text that describes a value in a message.

    Args:
        value: any value. A class is described as one, a long string without its middle, another value with a long
            repr by its type.
        kinds: classes that were expected. If `value` is one of these classes and not an instance, the text says that
            the parentheses are missing.
    """
    if isinstance(value, type):
        meant = ", without parentheses" if issubclass(value, kinds or (object,)) else ""
        return f"the class {value.__name__}{meant}"
    if isinstance(value, types.FunctionType):
        return f"the function {value.__name__}"
    if isinstance(value, jax.core.Tracer):
        return f"an array of shape {value.shape} and type {value.dtype}"
    text = repr(value)
    if "Tracer(" in text and not isinstance(value, str):  # a container of arrays of a trace
        return f"a {type(value).__name__}"
    if isinstance(value, str) and len(text) > 80:
        shorten = reprlib.Repr()
        shorten.maxstring = 80
        return shorten.repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def _name(owner: Any) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__
