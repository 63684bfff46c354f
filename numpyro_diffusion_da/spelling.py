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
        observation: function from site, step and index of an observed value to words for what the user gave; None if
            the user gave sites.
        step: function from the number of a step to words for it; None if the user knows steps by their numbers.
    """

    keys: Mapping[str, str | None]
    value: Callable[[Any], str]
    observation: Callable[[str, int, tuple[int, ...]], str] | None = None
    step: Callable[[int], str] | None = None


_current: contextvars.ContextVar[Spelling | None] = contextvars.ContextVar("spelling", default=None)


@contextlib.contextmanager
def spelled_as(spelling: Spelling) -> Iterator[None]:
    """Spell arguments as keys in the messages of everything that is called within.

    Args:
        spelling: the keys. What it lacks stays as a surrounding `spelled_as` has it.
    """
    around = _current.get()
    if around is not None:
        spelling = Spelling(
            {**around.keys, **spelling.keys},
            spelling.value,
            spelling.observation or around.observation,
            spelling.step or around.step,
        )
    token = _current.set(spelling)
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


def spelled_observation(site: str, step: int, index: tuple[int, ...]) -> str:
    """Words for an observed value: "site 'y[3]'", or the row of a table that the user gave.

    Args:
        site: name of the site.
        step: number of the step.
        index: index of the value in the site's value.
    """
    current = _current.get()
    if current is not None and current.observation is not None:
        return current.observation(site, step, index)
    place = f"[{', '.join(map(str, index))}]" if index else ""
    return f"site '{site}{place}'"


def spelled_step(step: int) -> str:
    """Words for a step of a filter: "step 3", or its time.

    Args:
        step: number of the step.
    """
    current = _current.get()
    return f"step {step}" if current is None or current.step is None else current.step(step)


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
