"""Trained priors on disk: arrays in NAME.npz, and a data card with their checksum in NAME.json."""

from __future__ import annotations

import json
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.checksums import arrays_checksum


def part(arrays: dict[str, Array], prefix: str) -> dict[str, Array]:
    """Arrays whose names start with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def write_stored(arrays: dict[str, np.ndarray], card: dict[str, Any], folder: Path, name: str) -> None:
    """Write the arrays of a prior to NAME.npz and its data card to NAME.json.

    Args:
        arrays: arrays by name.
        card: data card, a dictionary that JSON can hold. The checksum of the arrays is added as "sha256".
        folder: folder of the two files; it is made if it does not exist.
        name: name of the prior, NAME above.

    Raises:
        TypeError: `folder` is not a `pathlib.Path`.
    """
    require(folder, Path, "write_stored", "folder", 'Path("my_emulator")')
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.npz").open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    card = {**card, "sha256": arrays_checksum(arrays)}
    (folder / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")


def read_stored(folder: Path | Traversable, name: str, script: str) -> tuple[dict[str, np.ndarray], str]:
    """Read the files of a prior that `write_stored` wrote, and check the arrays against the card.

    Args:
        folder: folder of the two files.
        name: name of the prior.
        script: script that makes the files, for the error message.

    Returns:
        (arrays by name, text of the data card).

    Raises:
        TypeError: `folder` is a string or another object that is not a path.
        FileNotFoundError: the folder has no such files.
        ValueError: the checksum of the arrays is not the one in the card.
    """
    require(folder, (Path, Traversable), "read_stored", "folder", 'Path("my_emulator")')
    card_text = folder.joinpath(f"{name}.json").read_text()
    with folder.joinpath(f"{name}.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = dict(stored)
    checksum, expected = arrays_checksum(arrays), json.loads(card_text)["sha256"]
    if checksum != expected:
        raise ValueError(
            f"{name}.npz has the checksum {checksum}, but its card {name}.json says {expected}: the file is damaged, "
            f"or the two belong to different priors. Install the package again, or run {script}."
        )
    return arrays, card_text
