"""Trained priors on disk: arrays in NAME.npz, and a data card in NAME.json with a checksum of both.

The checksum covers the whole card, because a card holds numbers too: the noise range, the grid and the variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.checksums import DAMAGE, arrays_checksum


def part(arrays: dict[str, Array], prefix: str) -> dict[str, Array]:
    """Arrays whose names start with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def write_stored(arrays: dict[str, np.ndarray], card: dict[str, Any], folder: Path, name: str) -> None:
    """Write the arrays of a prior to NAME.npz and its data card to NAME.json.

    Args:
        arrays: arrays by name.
        card: data card, a dictionary that JSON can hold. The checksum of arrays and card is added as "sha256".
        folder: folder of the two files; it is made if it does not exist.
        name: name of the prior, NAME above.

    Raises:
        TypeError: `folder` is not a `pathlib.Path`.
    """
    require(folder, Path, "write_stored", "folder", 'Path("my_emulator")')
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.npz").open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    card = {**card, "sha256": stored_checksum(arrays, card)}
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
        ValueError: a file is damaged, or the checksum of arrays and card is not the one in the card. The message names
            the file.
    """
    require(folder, (Path, Traversable), "read_stored", "folder", 'Path("my_emulator")')
    again = f"install the package again, or run {script}"
    for file in (f"{name}.json", f"{name}.npz"):
        if not folder.joinpath(file).is_file():
            raise FileNotFoundError(f"there is no {file} in '{folder}'; {again}.")
    try:
        card_text = folder.joinpath(f"{name}.json").read_text()
        card = json.loads(card_text)
        expected = card["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the data card '{folder.joinpath(f'{name}.json')}' is damaged ({_why(error)}); {again}."
        ) from None
    arrays = read_arrays(folder.joinpath(f"{name}.npz"), again)
    checksum = stored_checksum(arrays, card)
    if checksum != expected:
        raise ValueError(
            f"{name}.npz and {name}.json in '{folder}' have the checksum {checksum}, but the card says {expected}: one "
            f"of them is damaged or was edited, or the two belong to different priors; {again}."
        )
    return arrays, card_text


def read_arrays(file: Path | Traversable, again: str) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file.

    Args:
        file: the file.
        again: what to do if the file is damaged, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged. The message names it.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            return dict(stored)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file '{file}'; {again}.") from None
    except DAMAGE as error:
        raise ValueError(f"the file '{file}' is damaged ({_why(error)}); {again}.") from None


def stored_checksum(arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> str:
    """SHA-256 in hexadecimal over the arrays of a prior and its data card without the checksum itself."""
    # Once through JSON and back, so that the card is as it will be read.
    plain = json.loads(json.dumps({key: value for key, value in card.items() if key != "sha256"}))
    text = json.dumps(plain, sort_keys=True)
    return arrays_checksum({**arrays, "card": np.frombuffer(text.encode(), np.uint8)})


def _why(error: Exception) -> str:
    """First line of an error, after its class."""
    first = (str(error) or "no content").splitlines()[0]
    return f"{type(error).__name__}: {first}"
