"""Does a cheaper recipe for the guided draws make a filter less accurate? Lorenz-96 with its learned emulator.

`ring64.py` measures samplers alone. This benchmark measures how much of their error remains in a cycled filter. The
system is stochastic Lorenz-96 (F = 8, step 0.1, noise variance 0.5), with every second site observed with error
variance 0.1. The filter is local FA-APF with Moment weights. All recipes have the same truths, observations and keys,
and differences are computed truth by truth. No recipe was chosen on these truths.

    python examples/benchmarks/filter_recipes.py --out recipes.json
"""

from __future__ import annotations

import dataclasses
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


class Recipe(NamedTuple):
    """Sampler and guidance of a guided draw."""

    sampler: ndda.Sampler
    guidance: ndda.diffusion.Guidance


def products(number: int) -> ndda.MMPS:
    """Moment-matched guidance with `number` products per noise level."""
    return ndda.MMPS(ndda.diffusion.KrylovSolve(number))


RECIPES = {
    "48 levels, 4 products": Recipe(ndda.Sampler(ndda.DPMSolverPP2M(), ndda.KarrasSchedule(48)), products(4)),
    "cheap recipe": Recipe(ndda.Sampler.cheap(), ndda.MMPS.cheap()),
    "13 levels to 0.04": Recipe(
        ndda.Sampler(ndda.DPMSolverPP2M(), ndda.KarrasSchedule(13, 20.0, 0.04)), ndda.MMPS.cheap()
    ),
    "13 levels, 1 product at the ends": Recipe(
        ndda.Sampler(ndda.DPMSolverPP2M(), ndda.KarrasSchedule(13, 20.0, 0.04)),
        ndda.diffusion.Piecewise((products(1), products(2), products(1)), (40.0, 0.2)),
    ),
    "13 levels, 1 product": Recipe(
        ndda.Sampler(ndda.DPMSolverPP2M(), ndda.KarrasSchedule(13, 20.0, 0.04)), products(1)
    ),
    "8 levels, 1 product": Recipe(ndda.Sampler(ndda.DPMSolverPP2M(), ndda.KarrasSchedule(8, 20.0, 0.04)), products(1)),
    "published: Adams-Bashforth 3, 2 Langevin": Recipe(
        ndda.Sampler(
            ndda.diffusion.AdamsBashforth(3),
            ndda.KarrasSchedule(32, 6.0, 2e-5),
            corrector=ndda.diffusion.LangevinCorrector(2, 0.1),
        ),
        ndda.MMPS(ndda.diffusion.KrylovSolve(6, warm_start=False)),
    ),
}
REFERENCE = "published: Adams-Bashforth 3, 2 Langevin"


def scores_of(
    recipe: Recipe, experiment: lorenz96_demo.TwinExperiment, *, sites: int, truths: int, particles: int, seed: int
) -> Any:
    """Scores for each truth, and network passes per particle and step."""
    prior = ndda.load_prior("lorenz96", num_sites=sites)
    local = experiment.local_filter(experiment.emulator_program(prior), sites)
    algorithm = dataclasses.replace(local, sampler=recipe.sampler, guidance=recipe.guidance)
    run = ndda.Filter(algorithm, num_particles=particles, progress_bar=False, keep_observed=False)
    found: dict[str, Any] = {"CRPS": [], "RMSE": [], "spread/skill": []}
    for number in range(truths):
        truth_key, filter_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        states, y = experiment.truth(truth_key, prior.climatology())
        run.run(filter_key, y)
        scores = experiment.score(run.result, states)
        for name, key in {"CRPS": "crps", "RMSE": "rmse", "spread/skill": "spread_skill"}.items():
            found[name].append(scores[key])
    found |= {"passes": scores["passes"], "cond.": scores["conditioning"]}
    return found


def main(
    only: Annotated[list[str] | None, typer.Option(help="Recipe to compare; may be repeated; all by default.")] = None,
    sites: Annotated[int, typer.Option(min=21, help="Number of sites.")] = 40,
    truths: Annotated[int, typer.Option(min=1, help="Number of truths.")] = 4,
    particles: Annotated[int, typer.Option(min=2, help="Number of particles.")] = 64,
    cycles: Annotated[int, typer.Option(min=2, help="Filter steps on each truth.")] = 120,
    spin_up: Annotated[int, typer.Option(min=0, help="Filter steps at the start that are not scored.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of truths and filters.")] = 0,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the scores to.")] = None,
) -> None:
    """Print scores of one filter with different recipes for its draws."""
    console = Console(width=130)
    if unknown := sorted(set(only or ()) - set(RECIPES)):
        raise typer.BadParameter(f"no recipe called {', '.join(unknown)}; give one of {', '.join(RECIPES)}.")
    try:
        experiment = lorenz96_demo.TwinExperiment(cycles=cycles, spin_up=spin_up)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    names = [name for name in RECIPES if not only or name in {REFERENCE, *only}]
    sizes = {"sites": sites, "truths": truths, "particles": particles, "seed": seed}
    found: dict[str, dict[str, Any]] = {}
    for name in track(names, "filtering", console=console, transient=True):
        found[name] = scores_of(RECIPES[name], experiment, **sizes)
        # Write after every recipe, so that an interrupted run keeps what it has.
        write_json(out, {**sizes, "cycles": cycles, "spin_up": spin_up}, **{"by truth": found})
    rows: list[dict[str, Any]] = []
    for name, scores in found.items():
        row: dict[str, Any] = {"recipe": name, "passes": scores["passes"], "cond.": scores["cond."]}
        for score in ("RMSE", "spread/skill", "CRPS"):
            row |= mean_and_error(score, scores[score])
        ratio = np.asarray(scores["CRPS"]) / np.asarray(found[REFERENCE]["CRPS"])
        rows.append(row | mean_and_error("CRPS difference, %", 100.0 * (ratio - 1.0)))
    title = f"Lorenz-96, {sites} sites, N = {particles}, {truths} truths of {cycles} cycles; % of published recipe"
    columns = {"recipe": "", "passes": ".0f", "cond.": ".1f"}
    columns |= {"RMSE": "", "spread/skill": "", "CRPS": "", "CRPS difference, %": "+.2f"}
    print_table(console, title, rows, columns, default=".4f")


if __name__ == "__main__":
    typer.run(main)
