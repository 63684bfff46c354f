"""Does FA-APF on the learned Lorenz-96 emulator beat its controls? On truths that were not used to choose anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from numpyro_diffusion_da.demos.lorenz96_demo import FILTERS, TwinExperiment, run_twin, score_table
from numpyro_diffusion_da.priors import load_prior


def main(
    truths: Annotated[int, typer.Option(min=1, help="Different truths.")] = 10,
    cycles: Annotated[int, typer.Option(min=2, help="Filter steps.")] = 120,
    spin_up: Annotated[int, typer.Option(min=0, help="First steps, not scored.")] = 30,
    particles: Annotated[int, typer.Option(min=2, help="Particles or members of each filter.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of truths and filters.")] = 1000,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Run all filters on all truths and print their scores."""
    console = Console()
    with Progress(console=console) as bar:
        task = bar.add_task("", total=len(FILTERS) * truths)

        def on_step(name: str) -> None:
            bar.update(task, description=name, advance=1)

        result = run_twin(
            TwinExperiment(cycles=cycles, spin_up=spin_up),
            load_prior("lorenz96"),
            seed=seed,
            truths=truths,
            num_particles=particles,
            on_step=on_step,
        )
    console.print(score_table(result))
    if out is not None:
        settings = {"truths": truths, "cycles": cycles, "spin_up": spin_up, "particles": particles, "seed": seed}
        out.write_text(json.dumps({"settings": settings, "scores": result.summary()}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
