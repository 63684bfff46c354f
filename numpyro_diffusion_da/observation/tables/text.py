"""Tables of numbers as text that fits a console."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

WIDTH = 80
"""Largest number of characters of a line."""

HEADING = 9
"""Number of characters at which a heading goes on in another line; longer words stay whole."""


def columns_of(counts: pandas.DataFrame, width: int = WIDTH) -> str:
    """Table of whole numbers, with headings of several lines; what does not fit one table goes into another below it.

    Args:
        counts: the numbers, with names of rows and of columns.
        width: largest number of characters of a line.
    """
    names = [str(name) for name in counts.index]
    first = max(map(len, names))
    columns = []
    for heading in counts.columns:
        head = textwrap.wrap(str(heading), HEADING, break_long_words=False)
        cells = [str(int(value)) for value in counts[heading]]
        size = max(map(len, (*head, *cells)))
        columns.append((head, cells, size + 2))
    tables: list[list[tuple[list[str], list[str], int]]] = [[]]
    for column in columns:
        if tables[-1] and first + sum(size for *_, size in tables[-1]) + column[2] > width:
            tables.append([])
        tables[-1].append(column)
    found = []
    for table in tables:
        high = max(len(head) for head, *_ in table)
        lines = [[""] * (high - len(head)) + head + cells for head, cells, _ in table]
        for i, name in enumerate([""] * high + names):
            row = "".join(texts[i].rjust(size) for texts, (*_, size) in zip(lines, table, strict=True))
            found.append(f"{name:{first}}{row}".rstrip())
    return "\n".join(found)
