"""What does an emulator of one pass save, and what does it lose? Ring-64 and Lorenz-96 beside the diffusion.

1. Ring-64 (`ring64.py`): a Gaussian of 64 points, every fourth observed. The same Gaussian is a diffusion with its
   exact denoiser, and an emulator x' = L e. The error is the RMS distance of a guided draw to the exact draw from the
   same random numbers, in spreads of the posterior. The passes are those of one guided draw.
2. Lorenz-96, every second site observed (the case "linear" of `local_ancestors.py`): FA-APF with moved ancestors and
   the EnKF, with the learned diffusion, its learned one-pass twin, and the true transition. Settings are those of the
   demo for all. Seconds are those of a step in a run without compiling, the median over truths.

    python examples/benchmarks/one_pass.py --truths 4 --particles 64 --out one_pass.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from ring64 import Ring, exact_flow, path_error

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96
from numpyro_diffusion_da.diffusion import DirectSolve, KrylovSolve
from numpyro_diffusion_da.transition import OnePassDynamics

ERROR_VARIANCE, EVERY = 0.1, 2


def ring_rows(points: int, paths: int, reference: int) -> list[dict[str, Any]]:
    """Rows of table 1."""
    ring = Ring(points)
    exact = exact_flow(ring, paths, reference)
    rows = []
    for name, sampler, guidance in (
        ("diffusion, 16 levels, products as needed", ndda.Sampler(), ndda.MMPS()),
        ("diffusion, 16 levels, 2 products", ndda.Sampler(), ndda.MMPS.cheap()),
    ):
        error, state = path_error(ring, sampler, guidance, exact)
        rows.append({"draw": name, "passes": float(state.passes.total().mean()), "error": error})
    factor = jnp.asarray(np.linalg.cholesky(ring.prior_covariance), jnp.float32)
    prior = ndda.NoiseConditionedPrior(lambda e, x: factor @ e, noise_shape=points, layout=points)
    keys = jax.random.split(jax.random.key(3), paths)

    def draws(solver: ndda.diffusion.LinearSolver) -> tuple[jax.Array, jax.Array]:
        dynamics = OnePassDynamics(prior, prior.condition(jnp.zeros(points)), 1)
        guidance = ndda.MMPS(solver)
        x, record = jax.jit(jax.vmap(lambda key: dynamics.conditional_draw(key, ring.likelihood, guidance)))(keys)
        return x, record.passes.total()

    right, _ = draws(DirectSolve())
    for name, solver in (
        ("one pass, exact solve", DirectSolve()),
        ("one pass, products as needed", KrylovSolve()),
        *((f"one pass, {n} products", KrylovSolve(products=n)) for n in (8, 4, 2)),
    ):
        x, passes = draws(solver)
        error = float(jnp.sqrt(jnp.mean(jnp.sum((x - right) ** 2, axis=1)))) / ring.spread
        rows.append({"draw": name, "passes": float(passes.mean()), "error": error})
    return rows


def program(transition: Callable[[jax.Array], Any], start: dist.Distribution) -> Callable[[jax.Array], None]:
    """State-space model of Lorenz-96 with a transition of the caller's."""

    def model(y: jax.Array) -> None:
        x0 = numpyro.sample("x0", start)

        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            x = numpyro.sample("x", transition(x))
            numpyro.sample("y", dist.Normal(x[::EVERY], ERROR_VARIANCE**0.5).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    return model


TRANSITIONS = ("diffusion", "one pass", "true")
"""Transitions of table 2."""


def lorenz96_rows(
    only: Sequence[str],
    truths: int,
    particles: int,
    cycles: int,
    spin_up: int,
    iterations: int,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of table 2 for some of the transitions."""
    diffusion, one_pass = ndda.load_prior("lorenz96"), ndda.load_prior("lorenz96_one_pass")
    start, sites = diffusion.climatology(), diffusion.layout.size
    spread = lorenz96.NOISE_VARIANCE**0.5
    transitions = {
        "diffusion": lambda x: ndda.DiffusionTransition(diffusion, x, sampler=ndda.Sampler.cheap()),
        "one pass": lambda x: ndda.OnePassTransition(one_pass, x, iterations=iterations),
        "true": lambda x: dist.Normal(lorenz96.flow(x), spread).to_event(1),
    }
    taper = ndda.Taper(5.0, ndda.Ring(sites), {"y": np.arange(0, sites, EVERY)}, state=np.arange(sites))
    wide = ndda.Taper(9.0, ndda.Ring(sites), {"y": np.arange(0, sites, EVERY)}, state=np.arange(sites))
    rows = []
    for kind in only:
        model = program(transitions[kind], start)
        weight = ndda.Moment(noise_level=10.0 if kind == "diffusion" else None, probes=1)
        for name, algorithm in {
            "FA-APF, moved": ndda.FAAPF(model, weight=weight, guidance=ndda.MMPS.cheap(), taper=taper),
            "EnKF": ndda.EnKF(model, taper=wide, inflation=(ndda.ForecastMultiplicative(1.02),)),
        }.items():
            run = ndda.Filter(algorithm, num_particles=particles, progress_bar=False)
            scores: dict[str, list[float]] = {"RMSE": [], "spread/skill": [], "CRPS": [], "seconds": []}
            for number in range(truths):
                note(f"{kind}, {name}, truth {number + 1}")
                truth_key, error_key, run_key = jax.random.split(jax.random.fold_in(jax.random.key(0), number), 3)
                states = np.asarray(lorenz96.trajectory(truth_key, start.sample(truth_key), 50 + cycles))[50:]
                errors = jax.random.normal(error_key, states[:, ::EVERY].shape)
                y = states[:, ::EVERY] + ERROR_VARIANCE**0.5 * np.asarray(errors)
                if number == 0:
                    run.run(run_key, y[:2].repeat(cycles // 2, axis=0))  # compiles
                began = time.perf_counter()
                run.run(run_key, y)
                seconds = (time.perf_counter() - began) / cycles
                x, kept = run.result.posterior["x"][0, :, spin_up:], states[spin_up:]
                scores["RMSE"].append(ndda.diagnostics.rmse(x, kept))
                scores["spread/skill"].append(ndda.diagnostics.spread_skill(x, kept))
                scores["CRPS"].append(ndda.diagnostics.crps(x, kept))
                scores["seconds"].append(seconds)
            passes = run.result.mean_passes(spin_up)
            row: dict[str, Any] = {"transition": kind, "filter": name}
            row |= {"passes": passes.network, "cond.": passes.conditioning}
            for key in ("RMSE", "spread/skill", "CRPS"):
                row |= mean_and_error(key, scores[key])
            rows.append(row | {"ms a step": 1e3 * float(np.median(scores["seconds"]))})
    return rows


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="Transition of table 2 to run; may be repeated; all by default.")
    ] = None,
    truths: Annotated[int, typer.Option(help="Number of truths.", min=1)] = 4,
    particles: Annotated[int, typer.Option(help="Particles of each filter.", min=2)] = 64,
    cycles: Annotated[int, typer.Option(help="Filter steps on each truth.", min=2)] = 120,
    spin_up: Annotated[int, typer.Option(help="Filter steps at the start that are not scored.", min=0)] = 30,
    iterations: Annotated[int, typer.Option(help="Linearizations of a guided draw of one pass.", min=1)] = 2,
    points: Annotated[int, typer.Option(help="Points of the ring of table 1.", min=16)] = 64,
    paths: Annotated[int, typer.Option(help="Draws of table 1.", min=2)] = 256,
    reference: Annotated[int, typer.Option(help="Noise levels of the exact flow in table 1.", min=8)] = 128,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the tables to.")] = None,
) -> None:
    """Compare an emulator of one pass with a diffusion: errors, passes and seconds."""
    if not spin_up < cycles:
        raise typer.BadParameter(f"a spin-up of {spin_up} of {cycles} cycles leaves none to score; give fewer.")
    if unknown := sorted(set(only or ()) - set(TRANSITIONS)):
        raise typer.BadParameter(f"no transition called {', '.join(unknown)}; give one of {', '.join(TRANSITIONS)}.")
    console = Console(width=120)
    ring = ring_rows(points, paths, reference)
    print_table(console, f"guided draws on a ring of {points} points", ring, {"draw": "", "passes": ".0f", "error": ""})
    with console.status("running") as status:
        rows = lorenz96_rows(only or TRANSITIONS, truths, particles, cycles, spin_up, iterations, status.update)
    title = f"Lorenz-96, N = {particles}, {truths} truths of {cycles} cycles; mean ± standard error"
    formats = {
        "transition": "",
        "filter": "",
        "passes": ".1f",
        "cond.": ".1f",
        "RMSE": "",
        "spread/skill": "",
        "CRPS": ".4f",
    }
    print_table(console, title, rows, formats | {"ms a step": ".1f"}, group="transition")
    settings = {"truths": truths, "particles": particles, "cycles": cycles, "spin_up": spin_up, "points": points}
    write_json(out, settings | {"iterations": iterations, "paths": paths}, ring=ring, lorenz96=rows)


if __name__ == "__main__":
    typer.run(main)
