"""The command `ndda`."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    help="Filter observations through a pretrained diffusion emulator, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.nc, demo.json and demo.png.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of truths and filters.")] = 0,
    particles: Annotated[int, typer.Option(min=2, help="Particles of every filter.")] = 256,
    truths: Annotated[int, typer.Option(min=1, help="Different truths; the standard errors are over them.")] = 5,
    cycles: Annotated[int, typer.Option(min=2, help="Filter steps of 0.1 time units.")] = 60,
    spin_up: Annotated[int, typer.Option(min=0, help="First steps, which are not scored.")] = 20,
) -> None:
    """Lorenz-96, every second variable observed: FA-APF on a diffusion emulator, and five controls."""
    from xarray import DataTree

    from numpyro_diffusion_da import plots
    from numpyro_diffusion_da.convert import to_datatree
    from numpyro_diffusion_da.priors.emulator import load_prior
    from numpyro_diffusion_da.twin import FILTERS, FREE, MAIN, TwinExperiment, run_twin, score_table

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
    columns = (TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(FILTERS) * truths)
        result = run_twin(
            experiment,
            load_prior("lorenz96"),
            seed=seed,
            truths=truths,
            num_particles=particles,
            on_step=lambda name: bar.update(task, description=name, completed=bar.tasks[0].completed + 1),
        )
    console.print(score_table(result))
    console.print(
        "passes: network passes (forward + vjp) per particle and step. ESS: median, of the weights before inflation; "
        "infl.: median exponent on the weights, 1 = none. FA-APF selects whole particles, its local "
        "form site by site, where ESS and infl. are medians over sites too. The EnKF runs on the true equations: it "
        "has no network, and no emulator error."
    )
    out.mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "particles": particles, "truths": truths, "cycles": cycles, "spin_up": spin_up}
    (out / "demo.json").write_text(json.dumps({"settings": settings, "scores": result.summary()}, indent=1) + "\n")
    tree = to_datatree(result.runs[MAIN], dims={"y": ["observed_site"]})
    constants = tree["constant_data"].to_dataset()
    constants["x_true"] = (("time", "site"), result.states, {"long_name": "the truth that was observed"})
    tree["constant_data"] = DataTree(constants)
    tree.to_netcdf(out / "demo.nc", engine="h5netcdf")
    plots.twin_figure(experiment, result).savefig(out / "demo.png", dpi=130)
    better = result.mean(FREE, "rmse")[0] / result.mean(MAIN, "rmse")[0]
    console.print(
        f"The error of local FA-APF is {better:.1f} times smaller than the free ensemble's. "
        f"Took {time.perf_counter() - started:.0f} s. "
        f"Wrote {out}/demo.png (look at it), {out}/demo.nc (xarray.open_datatree; ArviZ reads it) and {out}/demo.json."
    )


@app.command()
def info() -> None:
    """Versions, devices and the priors that ship, with their data cards."""
    import jax

    from numpyro_diffusion_da.priors.emulator import SHIPPED, load_prior

    console = Console()
    table = Table("package", "version", header_style="bold")
    table.add_row("python", platform.python_version())
    for name in ("numpyro-diffusion-da", "jax", "numpyro", "blackjax", "xarray", "arviz", "weathernext"):
        try:
            table.add_row(name, version(name))
        except PackageNotFoundError:
            table.add_row(name, "not installed")
    console.print(table)
    console.print(f"devices: {', '.join(str(d) for d in jax.devices())}")
    for name in SHIPPED:
        console.print(f"[bold]{name}[/bold]")
        console.print_json(json.dumps(load_prior(name).card))
