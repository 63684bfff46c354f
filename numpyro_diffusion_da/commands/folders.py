"""Folders that commands write to, checked before anything is computed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import typer


def output_folder(path: Path) -> Path:
    """Check, before anything is computed, that a folder for output can be made and written to.

    Args:
        path: the folder, which need not exist.

    Returns:
        The folder.

    Raises:
        typer.BadParameter: `path` is a file, or the folder cannot be written to.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"'{existing}' is not a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        why = str(error) if isinstance(error, NotADirectoryError) else f"'{existing}': {error.strerror}"
        raise typer.BadParameter(f"cannot write to '{path}': {why}; give a folder that can be written to.") from error
    return path
