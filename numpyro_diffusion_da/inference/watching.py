"""What a run notes about each of its steps, for people who watch it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from numpyro_diffusion_da.inference.storage import STEPS, read_lines


def step_notes(records: dict[str, Any], seconds: float, num_particles: int) -> list[dict[str, Any]]:
    """Notes on consecutive steps of a chain.

    Args:
        records: records of the steps, as numpy arrays with a leading axis of time.
        seconds: seconds that each of them took.
        num_particles: number of particles N.

    Returns:
        For each step, as plain numbers: `time` (seconds since 1970), `seconds`, `particles_per_second`, `ess` and
        `tempering` (with localized resampling the medians over blocks), `log_evidence_increment`, the network passes
        per particle, `departure_ratio` (by observed site, the mean of (O - B)^2 over that of P + R; about 1 in a filter
        that is right, None without observations), and `peak_memory` in bytes, of the process
        (not on Windows) and of each device that tells it.
    """
    stats, now, memory = records["stats"], time.time(), peak_memory()
    count = len(records["nonfinite_weights"])

    def note(i: int) -> dict[str, Any]:
        ratios = {}
        for site, background in records.get("background", {}).items():
            observed = records["observations"][site]
            used = observed["observed"][i] & np.isfinite(background["mean"][i])
            squares = np.where(used, (observed["value"][i] - background["mean"][i]).astype(float) ** 2, 0.0)
            expected = np.where(used, background["variance"][i] + background["error_variance"][i], 0.0)
            ratios[site] = float(squares.sum() / expected.sum()) if used.any() and expected.sum() > 0 else None
        return {
            "time": round(now, 2),
            "seconds": float(seconds),
            "particles_per_second": num_particles / max(seconds, 1e-9),
            "ess": float(np.median(stats["ess"][i])),
            "tempering": float(np.median(stats["tempering"][i])),
            "log_evidence_increment": float(stats["log_evidence_increment"][i]),
            "passes": {name: float(values[i]) for name, values in records["passes"].items()},
            "departure_ratio": ratios,
            "peak_memory": memory,
        }

    return [note(i) for i in range(count)]


def peak_memory() -> dict[str, int]:
    """Peak memory of this process, and of each local device that tells it, in bytes."""
    found = {}
    if importlib.util.find_spec("resource") is not None:  # Windows has no such module
        import resource

        # The unit of ru_maxrss is a kilobyte on Linux, and a byte on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        found["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            found[str(device)] = int(stats["peak_bytes_in_use"])
    return found


@dataclasses.dataclass(frozen=True)
class RunProgress:
    """How far a run with a directory is, read from its files while it runs or after it.

    Attributes:
        directory: directory of the run.
        settings: settings of the run, by name.
        chains: number of chains.
        steps: number of steps of each chain.
        notes: for each chain that has begun, the notes on its steps so far, in their order; see `step_notes`.
        age: seconds since the last step was written.
    """

    directory: pathlib.Path
    settings: dict[str, Any]
    chains: int
    steps: int
    notes: list[list[dict[str, Any]]]
    age: float

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> RunProgress:
        """Read the progress of a run.

        Args:
            directory: directory of the run, the argument `directory` of a `Filter`.

        Raises:
            ValueError: the directory holds no run, or a run that has not finished its first step.
        """
        path = pathlib.Path(directory)
        own, array = path / ".run", path / "sample_stats" / "ess" / "zarr.json"
        if not own.is_dir():
            raise ValueError(
                f"{os.fspath(path)!r} holds no run; give the directory of a Filter(..., directory=...) that has begun."
            )
        try:
            shape = json.loads(array.read_text())["shape"]
            settings = dict(json.loads((own / "run.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"the run in {os.fspath(path)!r} has not finished its first step; wait for it.") from None
        notes = []
        for chain in range(int(shape[0])):
            lines = {line["step"]: line for line in read_lines(own / f"chain{chain}" / STEPS) if "time" in line}
            if lines:
                notes.append([lines[step] for step in sorted(lines)])
        last = max((line["time"] for lines in notes for line in lines), default=0.0)
        return cls(path, settings, int(shape[0]), int(shape[1]), notes, time.time() - last)

    @property
    def done(self) -> int:
        """Number of steps that have been made, over all chains."""
        return sum(len(lines) for lines in self.notes)

    @property
    def left(self) -> float:
        """Seconds that the other steps will take, at the median speed of the last 20 steps."""
        recent = [line["seconds"] for line in self.notes[-1][-20:]] if self.notes else [math.nan]
        return float(np.median(recent)) * (self.chains * self.steps - self.done)

    def series(self, name: str) -> list[np.ndarray]:
        """Numbers of one name over the steps, for each chain.

        Args:
            name: name of a number in the notes, such as "ess"; one inside another by a dot: "departure_ratio.y".

        Raises:
            KeyError: the notes have no such number.
        """
        found = []
        for lines in self.notes:
            values: list[Any] = lines
            for key in name.split(".", 1):
                values = [value[key] for value in values]
            found.append(np.array([np.nan if value is None else value for value in values], float))
        return found
