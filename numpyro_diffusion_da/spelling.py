"""Arguments as messages spell them: those of Python, or the keys of a configuration that a user wrote in their place.

Messages about tables and files are made far below the configuration of a run, and name the argument that mends what is
wrong. `spelled` is that name: ``columns={'TEMP': 'observation'}`` for a program, and
``observations.columns = {"TEMP" = "observation"}`` for a user of `ndda assimilate`, who has no argument `columns`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Spelling(NamedTuple):
    """Spelling of arguments as keys.

    Attributes:
        keys: key by the name of an argument; "" if a configuration has none; None for the argument as it is.
        value: function from a value to its text.
    """

    keys: Mapping[str, str | None]
    value: Callable[[Any], str]


_current: contextvars.ContextVar[Spelling | None] = contextvars.ContextVar("spelling", default=None)


@contextlib.contextmanager
def spelled_as(spelling: Spelling) -> Iterator[None]:
    """Spell arguments as keys in the messages of everything that is called within.

    Args:
        spelling: the keys. Those of a surrounding `spelled_as` that it lacks stay.
    """
    around = _current.get()
    token = _current.set(spelling if around is None else Spelling({**around.keys, **spelling.keys}, spelling.value))
    try:
        yield
    finally:
        _current.reset(token)


def spelled(argument: str, value: Any = None, *, python: str | None = None) -> str:
    """Text that tells the user which argument to give.

    Args:
        argument: function and argument, as "read_table.columns".
        value: an example of the value; `...` in it stands for what the user knows.
        python: text for a program, if it is not the last part of `argument` with "=" and the value.

    Returns:
        "columns={'TEMP': ...}", or 'observations.columns = {TEMP = ...}' if keys are to be named. The text is empty if
        a configuration has no such key.
    """
    current = _current.get()
    key = None if current is None else current.keys.get(argument)
    if current is not None and key is not None:
        return key if value is None or not key else f"{key} = {current.value(value)}"
    if python is not None:
        return python
    name = argument.rpartition(".")[-1]
    return f"{name}=" if value is None else f"{name}={_python(value)}"


def _python(value: Any) -> str:
    """Value as a program has it."""
    if value is ...:
        return "..."
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_python(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        ends = "[]" if isinstance(value, list) else "()"
        return f"{ends[0]}{', '.join(map(_python, value))}{ends[1]}"
    return repr(value)
