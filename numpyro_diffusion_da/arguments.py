"""Checks of arguments where they are given: one sentence of what was got, what is expected, what to write instead."""

from __future__ import annotations

from typing import Any


def require(value: Any, kind: type | tuple[type, ...], owner: Any, name: str, example: str) -> None:
    """Refuse an argument of the wrong kind.

    Args:
        value: the argument.
        kind: the class or classes that it may be an instance of.
        owner: the object or the name of the callable that got it.
        name: the argument's name.
        example: what to write instead, as it stands in a program.

    Raises:
        TypeError: `value` is not an instance of `kind`; the sentence says what was got and what to write.
    """
    if isinstance(value, kind):
        return
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(k.__name__ for k in kinds)
    raise TypeError(f"{_name(owner)} got {name}={shown(value, kinds)}; expected a {expected}: write {name}={example}.")


def shown(value: Any, kinds: tuple[type, ...] = ()) -> str:
    """A value as a message shows it: a class as such, and whether its instance was meant."""
    if isinstance(value, type):
        meant = ", without parentheses" if issubclass(value, kinds or (object,)) else ""
        return f"the class {value.__name__}{meant}"
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def _name(owner: Any) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__
