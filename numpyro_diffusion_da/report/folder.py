"""Files of a run's folder, as a report reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


def read_feedback(folder: Path) -> pandas.DataFrame:
    """The table of feedback of a run.

    Raises:
        FileNotFoundError: the folder has none.
    """
    import pandas

    path = folder / "feedback.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no feedback.parquet; give the folder of a run of ndda assimilate.")
    return pandas.read_parquet(path)


def read_cycles(folder: Path) -> pandas.DataFrame | None:
    """The table of cycles of a run, None if there is none."""
    import pandas

    path = folder / "cycles.csv"
    return pandas.read_csv(path, parse_dates=["time"]) if path.is_file() else None


def read_facts(folder: Path) -> dict[str, Any]:
    """What a run says of itself, empty if it says nothing."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
