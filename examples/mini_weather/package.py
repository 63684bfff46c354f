"""Copy the trained emulator into the package: weights, data card, and part of a test run for demonstrations.

    python examples/mini_weather/package.py --data weather_data --emulator weather_emulator

The data card is the card of train.py, with the measurements of validate.py added. The part of a test run is the first
`--states` states of the first run, packed to 16 bits.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import data
import numpy as np
import typer
from packing import packed

import numpyro_diffusion_da
from numpyro_diffusion_da.priors import read_stored, write_stored

NAME = "held_suarez"


def main(
    data_folder: Annotated[Path, typer.Option("--data", help="folder that generate.py wrote")] = Path("weather_data"),
    emulator_folder: Annotated[Path, typer.Option("--emulator", help="folder that train.py wrote")] = Path(
        "weather_emulator"
    ),
    out: Annotated[Path, typer.Option(help="folder in which the package looks for the emulator")] = Path(
        numpyro_diffusion_da.__file__
    ).parent
    / "data",
    states: Annotated[int, typer.Option(help="number of states of the test run, 12 hours apart")] = 61,
    split: Annotated[str, typer.Option(help="split of the data from which the states are taken")] = "test",
) -> None:
    """Copy the trained emulator and part of a test run into the package."""
    arrays, text = read_stored(emulator_folder, NAME, "train.py")
    card = {k: v for k, v in json.loads(text).items() if k != "sha256"}
    card["validation"] = json.loads((emulator_folder / "validation.json").read_text())
    card["versions"] = {"python": platform.python_version()} | {
        name: version(name) for name in ("jax", "equinox", "optax", "numpy", "scoringrules")
    }
    write_stored(arrays, card, out, NAME)
    truth = next(iter(data.shards(data_folder, split, 1)))[0, :states]
    with (out / f"{NAME}_truth.npz").open("wb") as file:
        np.savez_compressed(file, **packed(truth))
    for path in sorted(out.glob(f"{NAME}*")):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    typer.run(main)
