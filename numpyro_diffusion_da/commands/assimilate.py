"""`ndda assimilate` and what follows it: forecasts, scores and a report of the run."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

COMPILED = ".compiled"
"""Name of the folder of compiled programs in the folder of a run."""

EXHAUSTED = "RESOURCE_EXHAUSTED"
"""Beginning of the message of JAX's error if the memory of a device is full."""

Folder = Annotated[Path, typer.Argument(help="Folder of a run of `ndda assimilate`.", metavar="FOLDER")]


@contextlib.contextmanager
def _in_sentences(console: Console) -> Iterator[None]:
    """Say errors that a person can mend, and warnings, in one sentence each, in place of a traceback."""

    def show(message: Any, *where: Any, **more: Any) -> None:
        console.print(f"[yellow]Warning:[/yellow] {escape(str(message))}", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        except KeyboardInterrupt:
            console.print("Interrupted. The same command goes on after the last step that is on disk.", soft_wrap=True)
            raise typer.Exit(130) from None
        except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
            console.print(f"[red]Error:[/red] {escape(_sentence(error))}", soft_wrap=True)
            raise typer.Exit(2) from None
        except RuntimeError as error:  # JAX has no class of its own for the memory of a device
            if EXHAUSTED not in str(error):
                raise
            console.print(f"[red]Error:[/red] {escape(_sentence(MemoryError(error)))}", soft_wrap=True)
            raise typer.Exit(2) from None


def _sentence(error: Exception) -> str:
    """Sentence that says an error; those of the operating system have the name of a file and a few words."""
    said = (str(error).removeprefix(EXHAUSTED).strip(": ").splitlines() or [""])[0].rstrip(".")
    if isinstance(error, MemoryError):
        return (
            f"the memory does not suffice ({said or 'no more is said'}); take fewer particles, or a smaller batch_size."
        )
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:  # the library's own words
            return f"{error.strerror.rstrip('.')}."
        return (
            f"'{error.filename}' cannot be used ({error.strerror}); see that there is room, and that you may write it."
        )
    return str(error) or type(error).__name__


def _cache_compiled(folder: Path) -> None:
    """Keep compiled programs in the folder of a run, so that it goes on sooner, or where the environment says."""
    import numpyro_diffusion_da as ndda

    ndda.inference.cache_compiled(None if "JAX_COMPILATION_CACHE_DIR" in os.environ else folder / COMPILED)


def assimilate(
    configuration: Annotated[Path, typer.Argument(help="Configuration of the run, such as run.toml.")],
    check: Annotated[
        bool,
        typer.Option("--check", help="Read everything, place every row, say what the run will cost, and run nothing."),
    ] = False,
) -> None:
    """Assimilate tables of observations as a configuration says, and write the analyses into its folder.

    A run that was interrupted goes on when it is started again.

    docs/assimilate.md describes the configuration and the files that are written.
    """
    import numpyro_diffusion_da as ndda

    console = Console()
    with _in_sentences(console):
        config = ndda.assimilation.RunConfig.read(configuration)
        run = ndda.assimilation.prepare(config)
        console.print(escape(run.report()), soft_wrap=True)
        finished = ndda.assimilation.is_finished(run)  # refuses the folder of another run, or of something else
        if check:
            return
        if finished:
            console.print(f"This run has finished: its analyses are in {escape(str(run.folder))}.", soft_wrap=True)
            return
        ndda.assimilation.claim_folder(run)
        _cache_compiled(run.folder)
        done = ndda.assimilation.run_prepared(run)
        console.print(
            f"Wrote analysis.zarr, feedback.parquet and cycles.csv into {escape(str(done.folder))}. Figures and words: "
            f"ndda report {escape(str(done.folder))}",
            soft_wrap=True,
        )


def forecast(
    folder: Folder,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps.")] = None,
    until: Annotated[str | None, typer.Option(help="Time of the last step, such as 2026-01-05T00.")] = None,
) -> None:
    """Forecast from the last analysis of a run, and write forecast.zarr into its folder."""
    import numpyro_diffusion_da as ndda

    console = Console()
    with _in_sentences(console):
        _cache_compiled(ndda.assimilation.Run.open(folder).folder)
        path = ndda.assimilation.forecast(folder, steps=steps, until=until)
        console.print(f"Wrote {escape(str(path))}.", soft_wrap=True)


def verify(
    folder: Folder,
    against: Annotated[
        Path | None, typer.Option(help="NetCDF file or Zarr group with the truth, on a grid with the prior's points.")
    ] = None,
) -> None:
    """Score the analyses of a run, and its forecast, against a gridded truth and against withheld rows."""
    import numpyro_diffusion_da as ndda

    console = Console()
    with _in_sentences(console):
        scores = ndda.assimilation.verify(folder, against=against)
        for (against_what, what), some in scores.groupby(["against", "what"], sort=False):
            console.print(_scores(some, f"{what} against {against_what}"))
        suspects = ndda.report.Findings(ndda.assimilation.Run(folder).feedback()).suspects()
        if len(suspects):
            names = ", ".join(f'"{name}"' for name in suspects["station"].unique())
            why = "biased, noisy or often rejected; ndda report says which, and lists them in suspects.csv"
            console.print(f"Suspect stations: {escape(f'[{names}]')} are {why}.", soft_wrap=True)
        if left_out := int(scores.loc[scores["what"] == "analysis", "left_out"].sum()):
            console.print(f"{left_out} withheld rows are not scored: they are far from the background.", soft_wrap=True)
        console.print(f"Wrote {escape(str(folder / 'verification.csv'))}.", soft_wrap=True)


def _scores(scores: Any, title: str) -> Table:
    """Table of scores that fits 80 columns with the names of the weather models."""
    has_leads = bool(scores["lead_hours"].any())
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for name in ("variable", "hPa", "unit", *["hours"][:has_leads], "n", "RMSE", "spread", "ratio", "CRPS"):
        table.add_column(name, justify="left" if name in ("variable", "unit") else "right", overflow="fold")
    for row in scores.itertuples(index=False):
        level = "" if math.isnan(row.level) else f"{row.level:g}"
        numbers = (f"{score:.3g}" for score in (row.rmse, row.spread, row.spread_skill, row.crps))
        lead = [f"{row.lead_hours:g}"][:has_leads]
        table.add_row(escape(row.variable), level, escape(row.unit), *lead, str(row.count), *numbers)
    return table


def report(folder: Folder) -> None:
    """Write report.html into the folder of a run: what it found, in figures and words."""
    import numpyro_diffusion_da as ndda

    console = Console()
    with _in_sentences(console):
        ndda.assimilation.Run.open(folder)
        path = ndda.report.write_report(folder)
        console.print(f"Wrote {escape(str(path))}, and suspect stations into suspects.csv beside it.", soft_wrap=True)
