"""How much do a taper and the square-root update improve an ensemble Kalman filter? Lorenz-96, true transition.

The system is stochastic Lorenz-96 (F = 8, step 0.1, noise variance 0.5). Every second site is observed with error
variance 0.1. The filter has the true equations, so its only errors are those of a finite ensemble and of a linear
update. Settings were chosen on other truths than those reported; `--tune` prints the table of that choice.

    python examples/benchmarks/enkf.py --out enkf.json
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_demo

UPDATES: dict[str, ndda.smc.EnsembleUpdate] = {
    "perturbed": ndda.smc.PerturbedObservations(),
    "square root": ndda.smc.SquareRoot(),
}
TUNING_SEED = 1


class Setting(NamedTuple):
    """Half-width of the taper in sites (None for no taper), and amounts of the two kinds of inflation of a filter."""

    radius: float | None
    factor: float = 1.0
    rtps: float = 0.0

    def inflation(self) -> tuple[ndda.smc.Inflation, ...]:
        """Inflations of the filter: a factor on the forecast, and relaxation of the analysis if `rtps` is not 0."""
        relaxation = (ndda.RTPS(self.rtps),) if self.rtps else ()
        return (ndda.ForecastMultiplicative(self.factor), *relaxation)


# Lowest CRPS of `GRID` on two truths of `TUNING_SEED` with d = 40, by number of members and update; used for all d.
TUNED = {
    (32, "perturbed"): Setting(4.0, factor=1.05),
    (32, "square root"): Setting(2.5, factor=1.05),
    (256, "perturbed"): Setting(9.0, factor=1.02),
    (256, "square root"): Setting(4.0, factor=1.02),
}
GRID = {
    32: [Setting(r, factor=i) for r in (2.5, 4.0, 6.0) for i in (1.0, 1.05)]
    + [Setting(r, rtps=0.3) for r in (2.5, 4.0)],
    256: [Setting(r, factor=i) for r in (4.0, 6.0, 9.0) for i in (1.0, 1.02)],
}


def rows_of(members: list[int], updates: list[str], tune: bool) -> Iterator[tuple[int, str, Setting]]:
    """Rows of the table as (members, update, setting): no taper and the chosen taper, or the whole grid."""
    for n in members:
        for update in updates:
            for setting in GRID[n] if tune else [Setting(None), TUNED[n, update]]:
                yield n, update, setting


@functools.cache
def truth_of(
    experiment: lorenz96_demo.TwinExperiment, sites: int, seed: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """States and observations of a truth, the same for all filters."""
    climate = ndda.load_prior("lorenz96", num_sites=sites).climatology()
    return experiment.truth(jax.random.split(jax.random.fold_in(jax.random.key(seed), number))[0], climate)


def run(
    experiment: lorenz96_demo.TwinExperiment,
    sites: int,
    members: int,
    update: str,
    setting: Setting,
    *,
    seed: int,
    truths: int,
) -> dict[str, Any]:
    """Row of the table: means over truths with standard errors; truths on which the ensemble diverges are lost."""
    climate = ndda.load_prior("lorenz96", num_sites=sites).climatology()
    taper = None
    if setting.radius is not None:
        observed = {"y": np.arange(0, sites, experiment.every)}
        taper = ndda.Taper(setting.radius, ndda.Ring(sites), observed, state=np.arange(sites))
    filter_ = ndda.Filter(
        ndda.EnKF(
            experiment.true_program(climate),
            update=UPDATES[update],
            taper=taper,
            inflation=setting.inflation(),
        ),
        num_particles=members,
        progress_bar=False,
    )
    scores = []
    for number in range(truths):
        states, y = truth_of(experiment, sites, seed, number)
        try:
            filter_.run(jax.random.split(jax.random.fold_in(jax.random.key(seed), number))[1], y)
        except FloatingPointError:
            continue
        x, truth = filter_.result.posterior["x"][0, :, experiment.spin_up :], states[experiment.spin_up :]
        scores.append(
            [ndda.diagnostics.rmse(x, truth), ndda.diagnostics.spread_skill(x, truth), ndda.diagnostics.crps(x, truth)]
        )
    row: dict[str, Any] = {"d": sites, "members": members, "update": update, **setting._asdict()}
    row["lost"] = truths - len(scores)
    table = np.array(scores).reshape(-1, 3)
    for name, values in zip(("RMSE", "spread/skill", "CRPS"), table.T, strict=True):
        row |= mean_and_error(name, values)
    return row


COLUMNS = {
    "d": "", "members": "", "update": "", "radius": "g", "factor": "g", "rtps": "g",
    "RMSE": ".3f", "spread/skill": ".3f", "CRPS": ".3f", "lost": "",
}  # fmt: skip


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
    sites: Annotated[list[int] | None, typer.Option(help="Number of sites d; may be repeated.")] = None,
    members: Annotated[list[int] | None, typer.Option(help="Number of members, 32 or 256; may be repeated.")] = None,
    updates: Annotated[list[str] | None, typer.Option(help="Update to run; may be repeated; all by default.")] = None,
    truths: Annotated[int, typer.Option(help="Number of truths.", min=1)] = 10,
    cycles: Annotated[int, typer.Option(help="Filter steps on each truth.", min=2)] = 120,
    spin_up: Annotated[int, typer.Option(help="Filter steps at the start that are not scored.", min=0)] = 30,
    seed: Annotated[int, typer.Option(help="Seed of truths and filters.")] = 1000,
    tune: Annotated[bool, typer.Option(help="Run the grid of settings on the tuning truths instead.")] = False,
) -> None:
    """Print scores of ensemble Kalman filters with and without a taper."""
    members = list(members or GRID)
    if unknown := sorted(set(members) - set(GRID)):
        raise typer.BadParameter(f"no settings were chosen for {unknown} members; give one of {sorted(GRID)}.")
    updates = list(updates or UPDATES)
    if unnamed := sorted(set(updates) - set(UPDATES)):
        raise typer.BadParameter(f"no update called {', '.join(unnamed)}; give one of {', '.join(UPDATES)}.")
    seed = TUNING_SEED if tune else seed
    console = Console()
    experiment = lorenz96_demo.TwinExperiment(cycles=cycles, spin_up=spin_up)
    work = [(d, *row) for d in sites or ([40] if tune else [40, 400]) for row in rows_of(members, updates, tune)]
    rows = [
        run(experiment, *row, seed=seed, truths=truths)
        for row in track(work, "filtering", console=console, transient=True)
    ]
    title = f"{truths} truths of {cycles} cycles, the first {spin_up} not scored; mean ± standard error over truths"
    print_table(console, title, rows, COLUMNS)
    write_json(out, {"truths": truths, "cycles": cycles, "spin_up": spin_up, "seed": seed, "tune": tune}, rows=rows)


if __name__ == "__main__":
    typer.run(main)
