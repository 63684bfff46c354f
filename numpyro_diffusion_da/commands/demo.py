"""`ndda demo`: the two twin experiments."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from numpyro_diffusion_da.commands.folders import output_folder


class Which(enum.Enum):
    """Systems that `ndda demo` can run."""

    LORENZ96 = "lorenz96"
    HELD_SUAREZ = "held_suarez"


DEFAULTS = {Which.LORENZ96: (256, 5, 60), Which.HELD_SUAREZ: (64, 1, 30)}
"""Default numbers of particles, truths and cycles for each system."""


def demo(
    which: Annotated[Which, typer.Argument(help="System to run.")] = Which.LORENZ96,
    out: Annotated[
        Path, typer.Option(help="Folder to write demo.nc, demo.json and figures to.", callback=output_folder)
    ] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of truths and filters.")] = 0,
    particles: Annotated[
        int | None, typer.Option(min=2, help="Particles of each filter [256; held_suarez 64].")
    ] = None,
    truths: Annotated[
        int | None, typer.Option(min=1, help="Different truths; standard errors are over truths [5; held_suarez 1].")
    ] = None,
    cycles: Annotated[
        int | None, typer.Option(min=2, help="Filter steps [60 of 0.1 time units; held_suarez 30 of 12 h].")
    ] = None,
    spin_up: Annotated[int, typer.Option(min=0, help="Filter steps at the start that are not scored.")] = 20,
) -> None:
    """Run a twin experiment: simulate observations of a known truth, and score filters against the truth.

    lorenz96: every second site of Lorenz-96 is observed; FA-APF and five controls.

    held_suarez: 200 stations observe global weather; FA-APF and six controls.

    Compiled programs are kept in the user's cache: a second demo begins sooner.
    """
    import numpyro_diffusion_da as ndda

    with contextlib.suppress(OSError):  # without a place for the cache everything is compiled
        ndda.inference.cache_compiled()
    default_particles, default_truths, default_cycles = DEFAULTS[which]
    run = {Which.LORENZ96: _lorenz96, Which.HELD_SUAREZ: _held_suarez}[which]
    run(
        out,
        seed,
        default_particles if particles is None else particles,
        default_truths if truths is None else truths,
        default_cycles if cycles is None else cycles,
        spin_up,
    )


@contextlib.contextmanager
def _filter_bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Progress bar over runs of filters; yields a function to call with the name of a filter for each run."""
    columns = (TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("filters", total=total)
        yield lambda name: bar.update(task, description=name, completed=bar.tasks[0].completed + 1)


def _lorenz96(out: Path, seed: int, particles: int, truths: int, cycles: int, spin_up: int) -> None:
    """Run the Lorenz-96 demo: print the table of scores, and write the scores, a netCDF file and a figure."""
    from xarray import DataTree

    import numpyro_diffusion_da as ndda
    from numpyro_diffusion_da.demos.lorenz96_demo import FILTERS, FREE, MAIN, TwinExperiment, run_twin, score_table
    from numpyro_diffusion_da.demos.lorenz96_figures import twin_figure

    console = Console()
    try:
        experiment = TwinExperiment(cycles=cycles, spin_up=spin_up)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(
        f"Stochastic Lorenz-96 (40 sites, F = 8), every second site observed with error variance "
        f"{experiment.error_variance}, {cycles} cycles of 0.1 time units, {particles} particles, {truths} truths."
    )
    started = time.perf_counter()
    with _filter_bar(console, len(FILTERS) * truths) as on_step:
        result = run_twin(
            experiment,
            ndda.load_prior("lorenz96"),
            ndda.load_prior("lorenz96_one_pass"),
            seed=seed,
            truths=truths,
            num_particles=particles,
            on_step=on_step,
        )
    console.print(score_table(result))
    console.print(
        "passes: network passes (forward, jvp and vjp) per particle and step + passes of the conditioning network. "
        "ESS: median effective sample size of the weights before tempering. temp.: median tempering exponent of the "
        "weights, 1 = none. FA-APF resamples whole particles; with moved ancestors it selects and moves site by site, "
        "and ESS and temp. are medians over sites too. The EnKF uses the true equations, so it needs no network and "
        "has no emulator error. One pass: the same filter as moved, with an emulator that makes the next state from "
        "noise in one pass."
    )
    out.mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "particles": particles, "truths": truths, "cycles": cycles, "spin_up": spin_up}
    (out / "demo.json").write_text(json.dumps({"settings": settings, "scores": result.summary()}, indent=1) + "\n")
    tree = ndda.results.to_datatree(result.runs[MAIN], dims={"y": ["observed_site"]})
    constants = tree["constant_data"].to_dataset()
    constants["x_true"] = (("time", "site"), result.states, {"long_name": "true state"})
    tree["constant_data"] = DataTree(constants)
    tree.to_netcdf(out / "demo.nc", engine="h5netcdf")
    twin_figure(experiment, result).savefig(out / "demo.png", dpi=130)
    better = result.mean(FREE, "rmse")[0] / result.mean(MAIN, "rmse")[0]
    console.print(
        f"The error of FA-APF with moved ancestors is {better:.1f} times smaller than the free ensemble's. "
        f"Took {time.perf_counter() - started:.0f} s. "
        f"Wrote the figure {out}/demo.png, {out}/demo.nc (for xarray.open_datatree and ArviZ) and {out}/demo.json."
    )


def _held_suarez(out: Path, seed: int, particles: int, truths: int, cycles: int, spin_up: int) -> None:
    """Run the Held-Suarez demo: print the table of scores, and write the scores, a netCDF file and figures."""
    import jax

    import numpyro_diffusion_da as ndda
    from numpyro_diffusion_da.demos import held_suarez_figures as plots_weather
    from numpyro_diffusion_da.demos import held_suarez_truth as held_suarez
    from numpyro_diffusion_da.demos.held_suarez_demo import (
        FILTERS,
        FREE,
        MAIN,
        NEAR_GROUND,
        WeatherExperiment,
        run_weather_twin,
        score_table,
        shortfalls,
        to_datatree,
    )

    console = Console()
    try:
        experiment = WeatherExperiment(cycles=cycles, spin_up=spin_up)
        prior, states = ndda.load_prior("held_suarez"), held_suarez.truth()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if len(states) < truths * cycles + 1:
        raise typer.BadParameter(
            f"{truths} truths of {cycles} cycles need more than the {len(states) - 1} true steps of the package; "
            "give fewer truths or cycles."
        )
    console.print(
        f"Dry atmosphere (Held-Suarez), 200 stations that observe {', '.join(NEAR_GROUND)} every 12 h, "
        f"{cycles} cycles, {particles} particles."
    )
    started = time.perf_counter()
    parts = [states[i * cycles : (i + 1) * cycles + 1] for i in range(truths)]
    on_two_cores = jax.default_backend() == "cpu" and (os.cpu_count() or 1) > 1
    with _filter_bar(console, len(FILTERS)) as on_done:
        result = run_weather_twin(
            experiment,
            prior,
            parts,
            seed=seed,
            num_particles=particles,
            processes=2 if on_two_cores else 1,
            on_done=on_done,
        )
    console.print(score_table(result))
    console.print(
        f"Scores are area-weighted, in standard deviations of the climate, from cycle {spin_up + 1} on. obs.: "
        "variables that the stations observe. unobs.: variables at the levels above. passes: network passes per "
        "particle and step + passes of the conditioning network."
    )
    for sentence in shortfalls(prior, result):
        console.print(f"[yellow]Known shortfall:[/yellow] {sentence}")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "particles": particles, "truths": truths, "cycles": cycles, "spin_up": spin_up}
    scores = result.summary()
    (out / "demo.json").write_text(json.dumps({"settings": settings, "scores": scores}, indent=1) + "\n")
    to_datatree(experiment, prior, result).to_netcdf(out / "demo.nc", engine="h5netcdf")
    figures = plots_weather.figures(experiment, prior, result)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=130)
    better = scores[FREE]["rmse"]["mean"] / scores[MAIN]["rmse"]["mean"]
    console.print(
        f"The error of moved FA-APF is {better:.1f} times smaller than the free ensemble's. "
        f"Took {time.perf_counter() - started:.0f} s. Wrote {out}/demo.nc (xarray.open_datatree), {out}/demo.json and "
        f"the figures {', '.join(f'{name}.png' for name in figures)}."
    )
