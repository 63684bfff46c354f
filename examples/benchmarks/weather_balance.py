"""Do moved ancestors keep the scales and the balance of winds? Mini weather, rotational and divergent power.

A Kalman move is a regression place by place, and selection place by place leaves seams. Both can put power into scales
and into the divergent wind where the truth has none. The script runs filters on the truth of the package, with 200
stations that observe surface and lowest level. It decomposes the winds at 250, 500 and 850 hPa into rotational and
divergent parts by total wavenumber (degree). Power relative to that of the truth is printed in three bands of degrees:
of the particles, and of the ancestors that their draws are conditioned on. The last column is the divergent share of
the power over the divergent share of the truth.

    python examples/benchmarks/weather_balance.py --particles 64 --out weather_balance.json
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from report import json_file, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import held_suarez_demo, held_suarez_truth

BANDS = {"degrees 1-6": (1, 7), "7-13": (7, 14), "14-21": (14, 22)}


def powers(states: np.ndarray, prior: ndda.priors.SphericalEmulator) -> np.ndarray:
    """Mean power of rotational and divergent wind by degree, shape (2, l), of states with any leading axes."""
    harmonics = prior.noise.harmonics

    def one(state: jax.Array) -> jax.Array:
        _, u, v = jnp.split(state, [harmonics.num_scalars, harmonics.num_scalars + harmonics.num_winds], axis=-1)
        return jnp.stack([jnp.sum(part**2, axis=(0, 1, 3)) for part in harmonics.of_winds(u, v)])

    flat = jnp.asarray(states.reshape(-1, *states.shape[-3:]))
    return np.asarray(jax.jit(lambda x: jnp.mean(jax.lax.map(one, x, batch_size=16), axis=0))(flat))


def row_of(name: str, what: str, power: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Row of the table: power in each band over that of the truth."""
    row: dict[str, Any] = {"filter": name, "state": what}
    for part, found, true in zip(("rotational", "divergent"), power, truth, strict=True):
        for band, (low, high) in BANDS.items():
            row[f"{part[:3]}. {band}"] = float(found[low:high].sum() / true[low:high].sum())
    shares = [p[1, 1:].sum() / p[:, 1:].sum() for p in (power, truth)]
    row["divergent share"] = float(shares[0] / shares[1])
    return row


def main(
    particles: Annotated[int, typer.Option(min=2, help="Particles, or members, of each filter.")] = 64,
    cycles: Annotated[int, typer.Option(min=2, help="Filter steps.")] = 30,
    spin_up: Annotated[int, typer.Option(min=1, help="Filter steps at the start that are not counted.")] = 20,
    only: Annotated[list[str] | None, typer.Option(help="Filter to run; may be repeated; four by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of observations and filters.")] = 0,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print rotational and divergent power of particles and ancestors relative to that of the truth."""
    if not spin_up < cycles:
        raise typer.BadParameter(f"a spin-up of {spin_up} of {cycles} cycles leaves none to count; give fewer.")
    prior = ndda.load_prior("held_suarez")
    experiment = held_suarez_demo.WeatherExperiment(cycles=cycles, spin_up=spin_up)
    states = held_suarez_truth.truth()[: cycles + 1]
    guess_key, error_key, filter_key = jax.random.split(jax.random.key(seed), 3)
    first_guess = experiment.first_guess(guess_key, prior, jnp.asarray(states[0]))
    y = experiment.observations(error_key, prior, states[1:])
    truth = powers(states[1 + spin_up :], prior)
    console = Console()
    filters = experiment.filters(prior)
    rows = []
    kalman = (held_suarez_demo.ENKF, held_suarez_demo.ENKF_V)
    names = only or [held_suarez_demo.LOCAL, held_suarez_demo.MAIN, *kalman]
    for name in track(names, "filtering", console=console, transient=True):
        # With a lag of 1, a filter keeps the states that its draws are conditioned on: selected and moved.
        run = ndda.Filter(
            dataclasses.replace(filters[name], lag=1), num_particles=particles, progress_bar=False, keep_observed=False
        )
        run.run(filter_key, first_guess, y)
        found = {"particles": run.result.posterior["x"][0, :, spin_up:]}
        if name not in kalman:  # an ensemble Kalman filter forecasts from its analysis itself
            found["ancestors"] = run.result.lagged[0, :, spin_up - 1 : -1]
        rows += [row_of(name, what, powers(x, prior), truth) for what, x in found.items()]
        write_json(out, {"particles": particles, "cycles": cycles, "spin_up": spin_up, "seed": seed}, rows=rows)
    title = f"power over that of the truth, N = {particles}, cycles {spin_up + 1} to {cycles}"
    print_table(console, title, rows, default=".2f", group="filter")


if __name__ == "__main__":
    typer.run(main)
