"""Argument checks whose message says what was got, what is expected and what to write instead."""

from __future__ import annotations

import math
import numbers
import reprlib
import types
from typing import Any

import numpy as np


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
        ValueError: `value` is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{_name(owner)} got {name}={shown(value)}; give a whole number of {least} or more.")
    if value < least:
        raise ValueError(f"{_name(owner)} got {name}={value}; give {least} or more.")


def require_fraction(value: Any, owner: Any, name: str, advice: str) -> None:
    """Raise an error if an argument is not a number from 0 to below 1.

    Args:
        value: the argument.
        owner: the object that got the argument, or the name of a function as a string.
        name: name of the argument.
        advice: what to give, for the message.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is outside [0, 1).
    """
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{_name(owner)} got {name}={shown(value)}; {advice}")
    if not 0.0 <= float(value) < 1.0:
        raise ValueError(f"{_name(owner)} got {name}={value}; {advice}")


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
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.asarray(None)
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
    text = repr(value)
    if isinstance(value, str) and len(text) > 80:
        shorten = reprlib.Repr()
        shorten.maxstring = 80
        return shorten.repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def _name(owner: Any) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__
