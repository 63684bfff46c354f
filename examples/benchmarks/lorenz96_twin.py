"""Is FA-APF with the learned Lorenz-96 emulator more accurate than its controls? No setting was chosen on these truths.

python examples/benchmarks/lorenz96_twin.py --out lorenz96_twin.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from report import json_file, write_json
from rich.console import Console
from rich.progress import Progress

from numpyro_diffusion_da.demos import lorenz96_demo
from numpyro_diffusion_da.priors import load_prior


def main(
    truths: Annotated[int, typer.Option(min=1, help="Number of truths.")] = 10,
    cycles: Annotated[int, typer.Option(min=2, help="Filter steps on each truth.")] = 120,
    spin_up: Annotated[int, typer.Option(min=0, help="Filter steps at the start that are not scored.")] = 30,
    particles: Annotated[int, typer.Option(min=2, help="Particles, or members, of each filter.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of truths and filters.")] = 1000,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the scores to.")] = None,
) -> None:
    """Run all filters on all truths and print their scores."""
    console = Console()
    with Progress(console=console) as bar:
        task = bar.add_task("", total=len(lorenz96_demo.FILTERS) * truths)

        def on_step(name: str) -> None:
            bar.update(task, description=name, advance=1)

        result = lorenz96_demo.run_twin(
            lorenz96_demo.TwinExperiment(cycles=cycles, spin_up=spin_up),
            load_prior("lorenz96"),
            load_prior("lorenz96_one_pass"),
            seed=seed,
            truths=truths,
            num_particles=particles,
            on_step=on_step,
        )
    console.print(lorenz96_demo.score_table(result))
    settings = {"truths": truths, "cycles": cycles, "spin_up": spin_up, "particles": particles, "seed": seed}
    write_json(out, settings, scores=result.summary())


if __name__ == "__main__":
    typer.run(main)
