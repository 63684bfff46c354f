"""`ndda watch`: how far a run is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def watch(
    store: Annotated[Path, typer.Argument(help="Directory of a run: Filter(..., directory=STORE).")],
    figure: Annotated[
        Path | None, typer.Option(help="PNG file to draw the run to, anew every few seconds, or once with --once.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show the run as it is now, and end.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Watch a run as it goes: progress, time left, ESS, tempering, observations against the background, passes, memory.

    The run is another process, which this command does not disturb. It ends when the run has made all its steps.
    """
    from rich.live import Live

    import numpyro_diffusion_da as ndda
    from numpyro_diffusion_da.demos.run_figures import run_figure
    from numpyro_diffusion_da.demos.run_watching import run_panel

    def look() -> ndda.inference.RunProgress:
        try:
            return ndda.inference.RunProgress.read(store)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    console = Console()
    found = look()
    with Live(run_panel(found), console=console, auto_refresh=False) as live:
        while True:
            if figure is not None and found.done:
                run_figure(found).savefig(figure, dpi=130)
            if once or found.done >= found.chains * found.steps:
                break
            time.sleep(every)
            found = look()
            live.update(run_panel(found), refresh=True)
    if not console.is_terminal:
        console.print()  # only a terminal gets the end of the last line
    if figure is not None and found.done:
        console.print(f"Wrote the figure {figure}.")
