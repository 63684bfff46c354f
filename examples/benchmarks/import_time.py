"""How long `import numpyro_diffusion_da` takes beside `import numpyro`: medians of runs taken in turn."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

MODULES = ("numpyro", "numpyro_diffusion_da")


def seconds(module: str) -> float:
    """Wall time of a fresh interpreter that imports the module."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, taken in turn.")] = 9,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print both medians and their ratio."""
    times: dict[str, list[float]] = {module: [] for module in MODULES}
    for module in MODULES:
        seconds(module)  # compiles the bytecode
    for _ in range(repeats):
        for module in MODULES:
            times[module].append(seconds(module))
    medians = {module: statistics.median(values) for module, values in times.items()}
    ratio = medians[MODULES[1]] / medians[MODULES[0]]
    table = Table("import", "median, s")
    for module, median in medians.items():
        table.add_row(module, f"{median:.2f}")
    table.add_row("ratio", f"{ratio:.2f}")
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps({"medians_s": medians, "ratio": ratio, "repeats": repeats}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
