"""Files that are either complete or absent."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

CONFIGURATION, FACTS, FEEDBACK, CYCLES = "run.toml", "run.json", "feedback.parquet", "cycles.csv"
ANALYSIS, BACKGROUND, STORE = "analysis.zarr", "background.zarr", "store.zarr"
"""Names in the folder of a run; STORE is the filter's directory."""


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a text file under another name, and rename it.

    Args:
        path: the file.
        text: its content.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Path beside a file or folder to write to, which takes its place when the block ends without an error.

    Args:
        path: the file or folder.

    Yields:
        Path to write to. Nothing is there.
    """
    part = path.with_name(f".{path.name}.part")
    _remove(part)
    yield part
    if path.is_dir():
        _remove(path)
    os.replace(part, path)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


GROUPS = {ANALYSIS: ("members", "mean", "spread"), STORE: ("sample_stats",)}
"""Zarr groups of each store of a finished run that are read."""


def check_files(folder: pathlib.Path, names: Sequence[str] | None = None) -> None:
    """Check that the files of a finished run can be opened, without reading what is in them.

    Args:
        folder: folder of the run.
        names: names of the files; by default those that each command needs, and the stores that are there.

    Raises:
        ValueError: one cannot. The message names it, and what mends it.
    """
    if names is None:
        names = (FACTS, FEEDBACK, CYCLES, *(name for name in GROUPS if (folder / name).exists()))
    for name in names:
        try:
            _open(folder, name)
        except (OSError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            what = f"is damaged ({why})" if (folder / name).exists() else "is missing"
            mend = f"make the run again in another folder, from '{folder / CONFIGURATION}'"
            if name != STORE:
                mend = (
                    f"remove '{folder / FACTS}' and run ndda assimilate {folder / CONFIGURATION} again, which writes "
                    f"the outputs anew from {STORE}"
                )
            raise ValueError(f"'{folder / name}' {what}; {mend}.") from None


def _open(folder: pathlib.Path, name: str) -> None:
    """Open a file of a finished run."""
    import pandas

    if name == FACTS:
        if not {"times", "prior_checksum", "members"} <= json.loads((folder / FACTS).read_text()).keys():
            raise ValueError("it has not the facts of a run")
    elif name == FEEDBACK:
        pandas.read_parquet(folder / FEEDBACK, columns=["flag"])
    elif name == CYCLES:
        pandas.read_csv(folder / CYCLES, usecols=["time"])
    else:
        for group in GROUPS[name]:
            if not (folder / name / group / "zarr.json").is_file():
                raise ValueError(f"it has no group {group}")
        for file in (folder / name).glob("**/zarr.json"):
            json.loads(file.read_text())
