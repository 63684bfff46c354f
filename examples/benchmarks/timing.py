"""Times of runs that are compared, in turns in one process; scripts in this folder import it as their neighbor."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Timing(NamedTuple):
    """Seconds of the runs of one program.

    Attributes:
        first: seconds of the first run, with what is compiled in it.
        later: seconds of each run after that.
        results: what each run after the first returned.
    """

    first: float
    later: list[float]
    results: list[Any]

    @property
    def median(self) -> float:
        """Median seconds of the runs after the first."""
        return float(np.median(self.later))


def in_turns(
    runs: Mapping[str, Callable[[int], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Run each program once, and then all of them in turns, so that other work on the machine slows all alike.

    Args:
        runs: functions from a seed to a result that is ready, by name.
        repeats: number of runs of each after the first one; at least 1.
        clock: function that gives the time in seconds, such as `time.process_time`.
    """
    timings = {}
    for name, run in runs.items():
        began = clock()
        run(0)
        timings[name] = Timing(clock() - began, [], [])
    for seed in range(1, repeats + 1):
        for name, run in runs.items():
            began = clock()
            found = run(seed)
            timings[name].later.append(clock() - began)
            timings[name].results.append(found)
    return timings


def require_peer(module: str, install: str) -> None:
    """End the script with a sentence if a package to compare with is missing.

    Args:
        module: name of the module to import.
        install: what to give to `pip install`.
    """
    if importlib.util.find_spec(module) is None:
        sys.exit(f"This script compares with {module}, which is not installed: pip install {install}")
