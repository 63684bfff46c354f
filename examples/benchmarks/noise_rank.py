"""How much do guidance, selection and moved ancestors do when the noise of a step has few directions?

An emulator of one pass whose noise e has k numbers, such as WeatherNext 2 with 32, reaches only k directions in a step.
The system is Lorenz-96 with d = 40 sites in steps of 0.1: x' = flow(x) + L e, where the columns of L are k orthogonal
directions that span the whole ring. Their variances add up to 4 for each k, as those of independent noise of variance
0.1. Every second site is observed with an error variance of 0.1. The truth and all filters have this same law, so there
is no model error. Each filter is a part of the one below it:

- guided draws: the draws use the observations, and no particle is selected;
- selection too: particles are selected by their predictive likelihood, tempered to an effective sample size of 0.2 N;
- local selection: each block of the ring selects its own ancestors;
- moved ancestors: the selected ancestors move by the covariance of the ensemble.

The ensemble Kalman filter with the same taper has no guidance. Tables give the RMSE of the mean and spread/skill, mean
± standard error over truths; "-" where the particles of a truth blew up.

It takes about four minutes of one core.

    python examples/benchmarks/noise_rank.py --out noise_rank.json
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from numpyro.contrib.control_flow import scan
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96

D, EVERY, NOISE_VARIANCE, ERROR_VARIANCE = 40, 2, 0.1, 0.1
OBSERVED = np.arange(0, D, EVERY)
TAPER = ndda.Taper(5.0, ndda.Ring(D), {"y": OBSERVED}, state=np.arange(D))

# L is an input of the step, so that one compiled filter runs with each L.
PRIOR = ndda.NoiseConditionedPrior(
    lambda e, given: lorenz96.flow(given[0]) + given[1] @ e,
    noise_shape=D,
    layout=D,
    condition=lambda x, noise_factor: (x, noise_factor),
)

FILTERS: dict[str, Callable[[Any], ndda.filters.FilterAlgorithm]] = {
    "guided draws": lambda model: ndda.FAAPF(model, weight=ndda.Equal()),
    "selection too": lambda model: ndda.FAAPF(model, weight=ndda.Moment()),
    "local selection": lambda model: ndda.FAAPF(model, weight=ndda.Moment(), taper=TAPER, move=False),
    "moved ancestors": lambda model: ndda.FAAPF(model, weight=ndda.Moment(), taper=TAPER),
    "ensemble Kalman": lambda model: ndda.EnKF(model, taper=TAPER),
}


def factor(rank: int) -> np.ndarray:
    """Matrix L of the noise, shape (D, D), whose columns after the first `rank` are zero."""
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    scale = np.where(np.arange(D) < rank, np.sqrt(NOISE_VARIANCE * D / rank), 0.0)
    return (directions * scale).astype(np.float32)


def model(y: jax.Array, start: jax.Array, noise_factor: jax.Array) -> None:
    """Program: Lorenz-96 with noise in the range of L, every second site observed."""
    x0 = numpyro.sample("x0", dist.Normal(start, 1.0).to_event(1))

    def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
        x = numpyro.sample("x", ndda.OnePassTransition(PRIOR, x, noise_factor, iterations=1))
        numpyro.sample("y", dist.Normal(x[OBSERVED], ERROR_VARIANCE**0.5).to_event(1), obs=y_t)
        return x, None

    scan(step, x0, y)


def twin(rank: int, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(Truth, observations, center of the first states) of one experiment."""
    rng = np.random.default_rng(seed)
    x, noise_factor = lorenz96.FORCING + rng.normal(size=D), factor(rank)
    truth = []
    for _ in range(50 + steps):
        x = np.asarray(lorenz96.flow(jnp.asarray(x, jnp.float32))) + noise_factor @ rng.normal(size=D)
        truth.append(x)
    states = np.asarray(truth[50:], np.float32)
    y = states[:, OBSERVED] + ERROR_VARIANCE**0.5 * rng.normal(size=(steps, len(OBSERVED)))
    return states, y.astype(np.float32), (truth[49] + rng.normal(size=D)).astype(np.float32)


def main(
    particles: Annotated[int, typer.Option(min=2, help="Number of particles.")] = 64,
    truths: Annotated[int, typer.Option(min=1, help="Number of truths.")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="Cycles of each truth.")] = 60,
    discard: Annotated[int, typer.Option(min=0, help="First cycles that are not scored.")] = 20,
    ranks: Annotated[
        str, typer.Option(help="Numbers of directions of the noise, separated by commas.")
    ] = "2,5,10,20,40",
    only: Annotated[list[str] | None, typer.Option(help="Names of the filters to run; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file of the results.")] = None,
) -> None:
    """Compare what parts of the filter do as the noise of a step loses directions."""
    warnings.simplefilter("ignore", UserWarning)  # some filters are controls that lose the truth, and say so
    names = only or list(FILTERS)
    if unknown := [name for name in names if name not in FILTERS]:
        raise typer.BadParameter(f"there is no filter called {unknown[0]}; give some of {', '.join(FILTERS)}.")
    wanted = [int(rank) for rank in ranks.split(",")]
    console, rows = Console(), []
    for name in track(names, console=console, description="filters"):
        run = ndda.Filter(FILTERS[name](model), num_particles=particles, progress_bar=False)
        rmse, ratio = {"filter": name}, {"filter": name}
        for rank in wanted:
            scores = []
            for seed in range(truths):
                truth, y, start = twin(rank, seed, steps)
                try:
                    run.run(jax.random.key(seed), y, start, factor(rank))
                except FloatingPointError:  # all particles have left the attractor
                    scores.append((np.nan, np.nan))
                    continue
                x = run.result.posterior["x"][0][:, discard:]
                error = np.sqrt(np.mean((x.mean(0) - truth[discard:]) ** 2))
                scores.append((error, np.sqrt(np.mean(x.var(0, ddof=1))) / error))
            rmse |= mean_and_error(f"k = {rank}", [score[0] for score in scores])
            ratio |= mean_and_error(f"k = {rank}", [score[1] for score in scores])
        rows.append((rmse, ratio))
    print_table(console, f"RMSE, N = {particles}", [row for row, _ in rows], default=".2f")
    print_table(console, "spread/skill", [row for _, row in rows], default=".2f")
    settings = {"particles": particles, "truths": truths, "steps": steps, "discard": discard, "ranks": wanted}
    write_json(out, settings, rmse=[row for row, _ in rows], spread_skill=[row for _, row in rows])


if __name__ == "__main__":
    typer.run(main)
