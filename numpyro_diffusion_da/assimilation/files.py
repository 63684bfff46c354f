"""Files that are either complete or absent."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
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


def check_files(folder: pathlib.Path, names: Sequence[str] = (FACTS, FEEDBACK, CYCLES, ANALYSIS, STORE)) -> None:
    """Check that the files of a finished run can be opened, without reading what is in them.

    Args:
        folder: folder of the run.
        names: names of the files.

    Raises:
        ValueError: one cannot. The message names it.
    """
    import pandas

    def facts() -> None:
        if not {"times", "prior_checksum", "members"} <= json.loads((folder / FACTS).read_text()).keys():
            raise ValueError("it has not the facts of a run")

    def metadata(store: str) -> None:
        if (folder / store).is_dir():
            for file in (folder / store).glob("**/zarr.json"):
                json.loads(file.read_text())

    checks: dict[str, Callable[[], object]] = {
        FACTS: facts,
        FEEDBACK: lambda: pandas.read_parquet(folder / FEEDBACK, columns=["flag"]),
        CYCLES: lambda: pandas.read_csv(folder / CYCLES, usecols=["time"]),
        ANALYSIS: lambda: metadata(ANALYSIS),
        STORE: lambda: metadata(STORE),
    }
    for name in names:
        try:
            checks[name]()
        except (OSError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            mend = f"make the run again in another folder, from '{folder / CONFIGURATION}'"
            if name != STORE:
                mend = (
                    f"remove '{folder / FACTS}' and run ndda assimilate {folder / CONFIGURATION} again, which writes "
                    f"the outputs anew from {STORE}"
                )
            raise ValueError(f"'{folder / name}' is damaged or missing ({why}); {mend}.") from None
