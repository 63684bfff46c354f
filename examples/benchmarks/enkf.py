"""What do a taper and the square root give an ensemble Kalman filter? Lorenz-96 with its true transition.

Stochastic Lorenz-96 (F = 8, step 0.1, noise variance 0.5), every second site observed with error variance 0.1; the
filter is told the true equations, so that its only errors are those of an ensemble and of a linear update. The settings
below were chosen on other truths than those reported (`--tune` prints that table).

    python examples/benchmarks/enkf.py --out enkf.json
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos.lorenz96_demo import TwinExperiment

UPDATES: dict[str, ndda.smc.EnsembleUpdate] = {
    "perturbed": ndda.smc.PerturbedObservations(),
    "square root": ndda.smc.SquareRoot(),
}
TUNING_SEED = 1


class Setting(NamedTuple):
    """How one filter is set: half-width of the taper in sites (None for none), and its two kinds of inflation."""

    radius: float | None
    factor: float = 1.0
    rtps: float = 0.0

    def inflation(self) -> tuple[ndda.smc.Inflation, ...]:
        """The filter's argument: a factor on the forecast, then relaxation of the analysis where there is any."""
        relaxation = (ndda.RTPS(self.rtps),) if self.rtps else ()
        return (ndda.ForecastMultiplicative(self.factor), *relaxation)


# By number of members and update: the lowest CRPS of `GRID` on two truths of `TUNING_SEED`, d = 40, for all d.
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
    """(N, update, setting) of the table: without a taper and with the chosen one, or all of the grid."""
    for n in members:
        for update in updates:
            for setting in GRID[n] if tune else [Setting(None), TUNED[n, update]]:
                yield n, update, setting


@functools.cache
def truth_of(experiment: TwinExperiment, sites: int, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(states, observations), the same for every filter."""
    climate = ndda.load_prior("lorenz96", num_sites=sites).climatology()
    return experiment.truth(jax.random.split(jax.random.fold_in(jax.random.key(seed), number))[0], climate)


def run(
    experiment: TwinExperiment, sites: int, members: int, update: str, setting: Setting, *, seed: int, truths: int
) -> dict[str, Any]:
    """One row: means over truths with their standard errors; truths on which the ensemble blew up are lost."""
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
        row[name] = float(values.mean()) if len(values) else None
        # One truth says nothing about its own error.
        row[f"{name} SE"] = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return row


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for name in ("d", "N", "update", "taper", "factor", "RTPS", "RMSE", "spread/skill", "CRPS", "lost"):
        table.add_column(name, no_wrap=True)
    for row in rows:

        def cell(name: str, row: dict[str, Any] = row) -> str:
            value, se = row[name], row[f"{name} SE"]
            return "-" if value is None else f"{value:.3f}" + ("" if se is None else f"±{se:.3f}".replace("±0.", "±."))

        table.add_row(
            str(row["d"]),
            str(row["members"]),
            row["update"],
            "none" if row["radius"] is None else f"{row['radius']:g}",
            f"{row['factor']:g}",
            f"{row['rtps']:g}",
            *(cell(name) for name in ("RMSE", "spread/skill", "CRPS")),
            str(row["lost"]),
        )
    console.print(table)


def main(
    out: Annotated[Path | None, typer.Option(help="Write the table to this JSON file.")] = None,
    sites: Annotated[list[int] | None, typer.Option(help="Number of sites d; may be repeated.")] = None,
    members: Annotated[list[int] | None, typer.Option(help="Members N, 32 or 256; may be repeated.")] = None,
    updates: Annotated[list[str] | None, typer.Option(help="Only this update; may be repeated.")] = None,
    truths: Annotated[int, typer.Option(help="Different truths.", min=1)] = 10,
    cycles: Annotated[int, typer.Option(help="Filter steps.", min=2)] = 120,
    spin_up: Annotated[int, typer.Option(help="First steps, not scored.", min=0)] = 30,
    seed: Annotated[int, typer.Option(help="Seed of truths and filters.")] = 1000,
    tune: Annotated[bool, typer.Option(help="The grid that the settings were chosen from, on other truths.")] = False,
) -> None:
    """Scores of the ensemble Kalman filters, with the taper and without."""
    members = list(members or GRID)
    if unknown := sorted(set(members) - set(GRID)):
        raise typer.BadParameter(f"nothing was chosen for {unknown} members; there are {sorted(GRID)}.")
    updates = list(updates or UPDATES)
    if unnamed := sorted(set(updates) - set(UPDATES)):
        raise typer.BadParameter(f"no update called {', '.join(unnamed)}; there are {', '.join(UPDATES)}.")
    seed = TUNING_SEED if tune else seed
    console = Console()
    experiment = TwinExperiment(cycles=cycles, spin_up=spin_up)
    work = [(d, *row) for d in sites or ([40] if tune else [40, 400]) for row in rows_of(members, updates, tune)]
    rows = [
        run(experiment, *row, seed=seed, truths=truths)
        for row in track(work, "filtering", console=console, transient=True)
    ]
    show(console, f"{truths} truths of {cycles} cycles, the first {spin_up} not scored, ± standard error", rows)
    if out is not None:
        settings = {"truths": truths, "cycles": cycles, "spin_up": spin_up, "seed": seed, "tune": tune}
        out.write_text(json.dumps({"version": ndda.__version__, "settings": settings, "rows": rows}, indent=2) + "\n")
        console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
