"""A progress bar over the steps of a filter, or the iterations of a chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def progress(show: bool, what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A function to call with how much was done and a note; a bar while `show`."""
    if not show:
        yield lambda done, note: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=total, note="compiling")
        yield lambda done, note: bar.update(task, advance=done, note=note)


@contextmanager
def step_progress(show: bool, total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function to call after each step of a filter with its statistics; a bar with ESS and tempering while `show`."""
    with progress(show, "filtering", total) as advance:

        def after(stats: dict[str, Any]) -> None:
            if show:
                ess, tempering = (float(np.median(stats[name])) for name in ("ess", "tempering"))
                advance(1, f"ESS {ess:.0f}  tempering {tempering:.2f}")

        yield after
