"""Files that are either complete or absent."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

FACTS, FEEDBACK = "run.json", "feedback.parquet"
"""Names in the folder of a run that other runs read."""


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
