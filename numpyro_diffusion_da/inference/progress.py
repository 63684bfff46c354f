"""Progress bar over the steps of a filter or the iterations of a chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def progress(show: bool, what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Context manager of a progress bar.

    Args:
        show: whether to show the bar.
        what: label of the bar.
        total: number of steps in total.

    Yields:
        Function (number of steps done since the last call, note) that moves the bar; it does nothing if the bar is not
        shown.
    """
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
def step_progress(show: bool, total: int) -> Iterator[Callable[[int, dict[str, Any] | None], None]]:
    """Context manager of a progress bar over the steps of a filter, with ESS and tempering exponent as its note.

    Args:
        show: whether to show the bar.
        total: number of steps in total.

    Yields:
        Function to call after some steps, which takes their number and their statistics with a leading axis of time;
        None for steps that were made before.
    """
    with progress(show, "filtering", total) as advance:

        def after(done: int, stats: dict[str, Any] | None) -> None:
            """Move the bar by some steps."""
            if show and stats is None:
                advance(done, "")
            elif show and stats is not None:
                ess, tempering = (float(np.median(stats[name][-1])) for name in ("ess", "tempering"))
                advance(done, f"ESS {ess:.0f}  tempering {tempering:.2f}")

        yield after
