"""How long does the analysis take beside the draws? Seconds of one step of the weather filter, by observations.

One step of local FA-APF is run on the mini weather, with stations that observe surface and lowest level, four values
each. "draws" is the step with equal weights and no move: guided draws only. "selection" has local selection of
ancestors and no move, and "move" also moves them. What they take beyond the draws is the analysis. The EnKF with the
covariance V of the transition stands beside them; its step has unguided draws. Network passes per particle are those of
the step; those of a conditional draw that weights, move and EnKF add are the differences to the first row.

With many observations, give a smaller radius, as assimilation of dense data does, or larger blocks: each block solves
with the observations in its reach. Times are medians of several steps in one process, after compilation.

    python examples/benchmarks/analysis_cost.py --stations 200 --out analysis_cost.json
    python examples/benchmarks/analysis_cost.py --stations 5000 --radius 1000
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from report import json_file, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import held_suarez_demo, held_suarez_truth
from numpyro_diffusion_da.observation import Stations, fraction_of


def main(
    stations: Annotated[int, typer.Option(min=1, help="Number of stations; each observes four values.")] = 200,
    radius: Annotated[float, typer.Option(help="Half-width of the taper in kilometers.")] = 2500.0,
    block_radius: Annotated[float, typer.Option(help="Radius of blocks in kilometers; 0 makes each place one.")] = 0.0,
    particles: Annotated[int, typer.Option(min=2, help="Particles, or members, of each filter.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Steps to take the median of.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Row to run; may be repeated; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print seconds and network passes of one step of each filter."""
    prior = ndda.load_prior("held_suarez")
    errors = fraction_of(np.asarray(prior.state_scale), held_suarez_demo.NEAR_GROUND, prior.layout, 0.2)
    experiment = held_suarez_demo.WeatherExperiment({"stations": Stations(errors, count=stations)}, cycles=1, spin_up=0)
    states = held_suarez_truth.truth()[:2]
    guess_key, error_key, start_key, step_key = jax.random.split(jax.random.key(0), 4)
    first_guess = experiment.first_guess(guess_key, prior, jnp.asarray(states[0]))
    y = experiment.observations(error_key, prior, states[1:])
    model = experiment.program(prior.with_errors_times(held_suarez_demo.MOVED_ERRORS))
    taper = experiment.taper(prior, radius)
    cheap = ndda.MMPS.cheap()
    filters: dict[str, ndda.filters.FilterAlgorithm] = {
        "draws": ndda.FAAPF(model, weight=ndda.Equal(), guidance=cheap),
        "selection": ndda.FAAPF(
            model, weight=ndda.Dirac(), guidance=cheap, taper=taper, block_radius=block_radius, move=False
        ),
        "move": ndda.FAAPF(model, guidance=cheap, taper=taper, block_radius=block_radius),
        "EnKF with V": ndda.EnKF(model, taper=taper, transition_covariance=True),
    }
    if unknown := sorted(set(only or ()) - set(filters)):
        raise typer.BadParameter(f"no row called {', '.join(unknown)}; give one of {', '.join(filters)}.")
    program = ndda.program.StateSpaceModel(model, (first_guess, y), {})
    inputs = jax.tree.map(lambda x: x[0], program.time_inputs())
    sizes = {"stations": stations, "radius": radius, "block_radius": block_radius, "particles": particles}
    console, rows = Console(), []
    for name in track(only or list(filters), "timing", console=console, transient=True):
        program.check(filters[name].needs_gaussian, filters[name].needs_gaussian_errors)
        state = filters[name].initial_state(program, start_key, particles)
        step = jax.jit(filters[name].kernel(program, batch_size=16)).lower(step_key, state, inputs).compile()
        _, info = jax.block_until_ready(step(step_key, state, inputs))
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(step(step_key, state, inputs))
            seconds.append(time.perf_counter() - began)
        passes = {kind: float(count) for kind, count in filters[name].passes(info)._asdict().items()}
        rows.append({"filter": name, "seconds": float(np.median(seconds)), **passes})
        rows[-1]["over draws"] = rows[-1]["seconds"] / rows[0]["seconds"] if rows[0]["filter"] == "draws" else None
        write_json(out, sizes, rows=rows)
    title = f"{4 * stations} observations, N = {particles}, radius {radius:g} km, blocks {block_radius:g} km"
    columns = {
        "filter": "",
        "seconds": ".2f",
        "over draws": ".2f",
        **dict.fromkeys(("forward", "jvp", "vjp", "conditioning"), ".1f"),
    }
    print_table(console, title, rows, columns)


if __name__ == "__main__":
    typer.run(main)
