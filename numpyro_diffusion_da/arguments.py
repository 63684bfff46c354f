"""Argument checks whose message says what was got, what is expected and what to write instead."""

from __future__ import annotations

import numbers
import reprlib
import types
from typing import Any


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
