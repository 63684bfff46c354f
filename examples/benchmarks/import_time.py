"""How long does `import numpyro_diffusion_da` take, compared with `import numpyro`? Medians of alternating runs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from report import json_file, print_table, write_json
from rich.console import Console

MODULES = ("numpyro", "numpyro_diffusion_da")


def seconds(module: str) -> float:
    """Wall time in seconds of a new interpreter that imports the module."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each import, in alternation.")] = 9,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the medians to.")] = None,
) -> None:
    """Print the median import times and their ratio."""
    times: dict[str, list[float]] = {module: [] for module in MODULES}
    for module in MODULES:
        seconds(module)  # the first import compiles bytecode and is not timed
    for _ in range(repeats):
        for module in MODULES:
            times[module].append(seconds(module))
    medians = {module: statistics.median(values) for module, values in times.items()}
    ratio = medians[MODULES[1]] / medians[MODULES[0]]
    rows = [{"import": module, "median, s": median} for module, median in medians.items()]
    print_table(Console(), f"{repeats} runs each, ratio {ratio:.2f}", rows, default=".2f")
    write_json(out, {"repeats": repeats}, medians_s=medians, ratio=ratio)


if __name__ == "__main__":
    typer.run(main)
