"""Does a cheap recipe for the guided draws lose anything in the filter? Lorenz-96 through its learned emulator.

The sampler of a draw can be measured alone (`ring64.py`). Here it is asked what is left of its error after a filter
has cycled with it: stochastic Lorenz-96 (F = 8, step 0.1, noise variance 0.5), every second site observed with error
variance 0.1, localised ancestors with Moment weights. All recipes have the same truths, observations and keys, so that
differences are taken truth by truth. Nothing but the recipe differs, and none was chosen on these truths.

    python examples/benchmarks/filter_recipes.py --out recipes.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from numpyro.contrib.control_flow import scan
from rich.console import Console
from rich.progress import track
from rich.table import Table

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da import verification
from numpyro_diffusion_da.priors import lorenz96

ERROR_VARIANCE, EVERY, RADIUS, TARGET_ESS = 0.1, 2, 5.0, 0.1


class Recipe(NamedTuple):
    """How a guided draw is made."""

    sampler: ndda.Sampler
    guidance: ndda.Guidance


def products(number: int) -> ndda.MMPS:
    """Moment-matched guidance with so many products a level."""
    return ndda.MMPS(ndda.KrylovSolve(number))


RECIPES = {
    "48 levels, 4 products": Recipe(ndda.Sampler(schedule=ndda.KarrasSchedule(48)), products(4)),
    "library default": Recipe(ndda.Sampler(), ndda.MMPS()),
    "13 levels to 0.04": Recipe(ndda.Sampler(schedule=ndda.KarrasSchedule(13, 20.0, 0.04)), ndda.MMPS()),
    "13 levels, 1 product at the ends": Recipe(
        ndda.Sampler(schedule=ndda.KarrasSchedule(13, 20.0, 0.04)),
        ndda.Piecewise((products(1), products(2), products(1)), (40.0, 0.2)),
    ),
    "13 levels, 1 product": Recipe(ndda.Sampler(schedule=ndda.KarrasSchedule(13, 20.0, 0.04)), products(1)),
    "8 levels, 1 product": Recipe(ndda.Sampler(schedule=ndda.KarrasSchedule(8, 20.0, 0.04)), products(1)),
    "published: Adams-Bashforth 3, 2 Langevin": Recipe(
        ndda.Sampler(
            ndda.AdamsBashforth(3), ndda.KarrasSchedule(32, 6.0, 2e-5), corrector=ndda.LangevinCorrector(2, 0.1)
        ),
        ndda.MMPS(ndda.KrylovSolve(6, warm_start=False)),
    ),
}
REFERENCE = "published: Adams-Bashforth 3, 2 Langevin"


def program(sites: int, recipe: Recipe) -> Any:
    """The state-space model."""
    prior = ndda.load_prior("lorenz96", num_sites=sites)

    def model(y: jax.Array) -> None:
        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x, sampler=recipe.sampler))
            numpyro.sample("y", dist.Normal(x[::EVERY], ERROR_VARIANCE**0.5).to_event(1), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x0", prior.climatology()), y)

    return model


def simulate(key: jax.Array, sites: int, cycles: int) -> tuple[np.ndarray, np.ndarray]:
    """(states, observations) of the true equations after 50 steps of spin-up."""
    start_key, run_key, error_key = jax.random.split(key, 3)

    def step(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = lorenz96.draw(key, x)
        return x, x

    start = ndda.load_prior("lorenz96", num_sites=sites).climatology().sample(start_key)
    states = jax.lax.scan(step, start, jax.random.split(run_key, 50 + cycles))[1][50:]
    seen = states[:, ::EVERY]
    return np.asarray(states), np.asarray(seen + ERROR_VARIANCE**0.5 * jax.random.normal(error_key, seen.shape))


def scores_of(
    recipe: Recipe, *, sites: int, truths: int, particles: int, cycles: int, spin_up: int, seed: int
) -> dict[str, Any]:
    """Scores by truth, and the network passes of one particle and step."""
    taper = ndda.Taper(RADIUS, ndda.Ring(sites), {"y": np.arange(0, sites, EVERY)}, state=np.arange(sites))
    # The emulator's errors are nearly independent from site to site: one product with random signs has its variances.
    algorithm = ndda.FAAPF(
        program(sites, recipe),
        weight=ndda.Moment(noise_level=10.0, probes=1),
        taper=taper,
        target_ess=TARGET_ESS,
        guidance=recipe.guidance,
    )
    run = ndda.ParticleFilter(algorithm, num_particles=particles, progress_bar=False, keep_observed=False)
    found: dict[str, Any] = {"CRPS": [], "RMSE": [], "spread/skill": []}
    for number in range(truths):
        truth_key, filter_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        states, y = simulate(truth_key, sites, cycles)
        run.run(filter_key, y)
        x, truth = run.result.posterior["x"][0, :, spin_up:], states[spin_up:]
        found["CRPS"].append(verification.crps(x, truth))
        found["RMSE"].append(verification.rmse(x, truth))
        found["spread/skill"].append(verification.spread_skill(x, truth))
    found["passes"] = float(sum(v.mean() for v in run.result.network_passes.values()))
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
    if not spin_up < cycles:
        raise typer.BadParameter(f"spin-up of {spin_up} of {cycles} cycles leaves none to score.")
    names = [name for name in RECIPES if not only or name in {REFERENCE, *only}]
    sizes = {"sites": sites, "truths": truths, "particles": particles, "cycles": cycles, "spin_up": spin_up}
    found: dict[str, dict[str, Any]] = {}
    for name in track(names, "filtering", console=console, transient=True):
        found[name] = scores_of(RECIPES[name], **sizes, seed=seed)
        if out is not None:
            settings = {**sizes, "seed": seed}
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
