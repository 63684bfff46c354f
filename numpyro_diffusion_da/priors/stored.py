"""Trained priors on disk: plain arrays beside a data card that holds their checksum."""

from __future__ import annotations

import json
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from numpyro_diffusion_da.checksums import arrays_checksum


def part(arrays: dict[str, Array], prefix: str) -> dict[str, Array]:
    """Those whose name begins with the prefix, named by the rest."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def write_stored(arrays: dict[str, np.ndarray], card: dict[str, Any], folder: Path, name: str) -> None:
    """Write NAME.npz and NAME.json, the card with the checksum of the arrays added, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.npz").open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    card = {**card, "sha256": arrays_checksum(arrays)}
    (folder / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")


def read_stored(folder: Path | Traversable, name: str, script: str) -> tuple[dict[str, np.ndarray], str]:
    """(arrays, text of the card) that `write_stored` wrote.

    Args:
        folder: where they are.
        name: of the prior.
        script: what makes them, for the message of the error.

    Raises:
        FileNotFoundError: the folder has no such files.
        ValueError: the arrays are not those that the card describes.
    """
    card_text = folder.joinpath(f"{name}.json").read_text()
    with folder.joinpath(f"{name}.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = dict(stored)
    checksum, expected = arrays_checksum(arrays), json.loads(card_text)["sha256"]
    if checksum != expected:
        raise ValueError(
            f"{name}.npz has the checksum {checksum}, but its card says {expected}: the file is damaged or not "
            f"the one described. Install the package again, or run {script}."
        )
    return arrays, card_text
