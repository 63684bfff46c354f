"""Does a cheap recipe for the guided draws lose anything in the filter? Lorenz-96 through its learned emulator.

The sampler of a draw can be measured alone (`ring64.py`). Here it is asked what is left of its error after a filter
has cycled with it: stochastic Lorenz-96 (F = 8, step 0.1, noise variance 0.5), every second site observed with error
variance 0.1, localized ancestors with Moment weights. All recipes have the same truths, observations and keys, so that
differences are taken truth by truth. Nothing but the recipe differs, and none was chosen on these truths.

    python examples/benchmarks/filter_recipes.py --out recipes.json
"""

from __future__ import annotations

import dataclasses
import json
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


class Recipe(NamedTuple):
    """How a guided draw is made."""

    sampler: ndda.Sampler
    guidance: ndda.diffusion.Guidance


def products(number: int) -> ndda.MMPS:
    """Moment-matched guidance with so many products a level."""
    return ndda.MMPS(ndda.diffusion.KrylovSolve(number))


RECIPES = {
    "48 levels, 4 products": Recipe(ndda.Sampler(schedule=ndda.KarrasSchedule(48)), products(4)),
    "library default": Recipe(ndda.Sampler(), ndda.MMPS()),
    "13 levels to 0.04": Recipe(ndda.Sampler(schedule=ndda.KarrasSchedule(13, 20.0, 0.04)), ndda.MMPS()),
    "13 levels, 1 product at the ends": Recipe(
        ndda.Sampler(schedule=ndda.KarrasSchedule(13, 20.0, 0.04)),
        ndda.diffusion.Piecewise((products(1), products(2), products(1)), (40.0, 0.2)),
    ),
    "13 levels, 1 product": Recipe(ndda.Sampler(schedule=ndda.KarrasSchedule(13, 20.0, 0.04)), products(1)),
    "8 levels, 1 product": Recipe(ndda.Sampler(schedule=ndda.KarrasSchedule(8, 20.0, 0.04)), products(1)),
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


def scores_of(recipe: Recipe, experiment: TwinExperiment, *, sites: int, truths: int, particles: int, seed: int) -> Any:
    """Scores by truth, and the network passes of one particle and step."""
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
    found["passes"] = scores["passes"]
    return found


def mean_and_error(values: Any) -> tuple[float, float]:
    """Mean and its standard error over truths; NaN for one."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def main(
    only: Annotated[list[str] | None, typer.Option(help="Only this recipe beside the reference; repeatable.")] = None,
    sites: Annotated[int, typer.Option(min=21, help="Sites of the ring.")] = 40,
    truths: Annotated[int, typer.Option(min=1, help="Truths.")] = 4,
    particles: Annotated[int, typer.Option(min=2, help="Particles.")] = 64,
    cycles: Annotated[int, typer.Option(min=2, help="Cycles of each truth.")] = 120,
    spin_up: Annotated[int, typer.Option(min=0, help="Cycles that are not scored.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of truths and filters.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Scores of one filter with different recipes for its draws."""
    console = Console(width=130)
    if unknown := sorted(set(only or ()) - set(RECIPES)):
        raise typer.BadParameter(f"no recipe called {', '.join(unknown)}; there are {', '.join(RECIPES)}.")
    try:
        experiment = TwinExperiment(cycles=cycles, spin_up=spin_up)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    names = [name for name in RECIPES if not only or name in {REFERENCE, *only}]
    sizes = {"sites": sites, "truths": truths, "particles": particles, "seed": seed}
    found: dict[str, dict[str, Any]] = {}
    for name in track(names, "filtering", console=console, transient=True):
        found[name] = scores_of(RECIPES[name], experiment, **sizes)
        if out is not None:
            settings = {**sizes, "cycles": cycles, "spin_up": spin_up}
            written = {"version": ndda.__version__, "settings": settings, "by truth": found}
            out.write_text(json.dumps(written, indent=1) + "\n")
    title = f"Lorenz-96, {sites} sites, N = {particles}, {truths} truths of {cycles} cycles; % of the published recipe"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for column in ("recipe", "passes", "RMSE", "spread/skill", "CRPS", "CRPS, %"):
        table.add_column(column, no_wrap=True)
    reference = np.asarray(found[REFERENCE]["CRPS"])
    for name, scores in found.items():
        cells = [
            f"{mean:.4f} ± {error:.4f}"
            for mean, error in map(mean_and_error, (scores[k] for k in ("RMSE", "spread/skill", "CRPS")))
        ]
        mean, error = mean_and_error(100.0 * (np.asarray(scores["CRPS"]) / reference - 1.0))
        table.add_row(name, f"{scores['passes']:.0f}", *cells, f"{mean:+.2f} ± {error:.2f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
