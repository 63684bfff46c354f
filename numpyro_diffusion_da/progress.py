"""A progress bar over the steps of a filter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def step_progress(show: bool, total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function to call after each step with its statistics; a bar with ESS and inflation while `show`."""
    if not show:
        yield lambda stats: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("filtering"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("filtering", total=total, note="compiling")

        def advance(stats: dict[str, Any]) -> None:
            note = f"ESS {float(np.asarray(stats['ess'])):.0f}  inflation {float(np.asarray(stats['inflation'])):.2f}"
            bar.update(task, advance=1, note=note)

        yield advance
