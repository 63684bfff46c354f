"""What is a filter worth in the mini weather? Three networks, several truths, the controls, and forecasts afterwards.

The truth is the stochastic Held-Suarez atmosphere of examples/mini_weather, every 12 hours for 15 days; filters see the
emulator that ships. Networks: stations, the swath of a satellite, means over blocks. Filters: the free ensemble, guided
particles with equal weights, the published FA-APF, its localized form, an ensemble Kalman filter with the emulator, and
with --true-model one with the true equations and the whole of their state (wants dinosaur-dycore). Scores are over the
last 5 days, in standard deviations of the climate: RMSE of the mean of all channels, of observed and of unobserved
ones, spread over error, CRPS. "forecast" is the RMSE of the emulator's 5-day forecast from the last ensemble.

Truths are of the test runs, settings were chosen on the validation run (--split validation). generate.py makes other
runs on another kind of processor, which rounds otherwise: its scores differ as those of other truths do.

    python examples/mini_weather/generate.py --out weather_data
    python examples/benchmarks/mini_weather.py --data weather_data --network stations --out mini_weather.json

Scores are written after every truth, and a run of the same command goes on from there. Every truth compiles its filters
anew: with JAX_COMPILATION_CACHE_DIR set they are compiled once.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos.held_suarez_demo import (
    FILTERS,
    NEAR_GROUND,
    SAMPLER,
    WeatherExperiment,
    area_weights,
    in_climate_units,
    run_weather_twin,
    summarize_run,
)
from numpyro_diffusion_da.demos.scores import mean_and_standard_error
from numpyro_diffusion_da.observation import BlockMeans, ObservingNetwork, Stations, Swath, fraction_of
from numpyro_diffusion_da.priors import SphericalEmulator
from numpyro_diffusion_da.transition import DiffusionDynamics

sys.path.insert(0, str(Path(__file__).parents[1] / "mini_weather"))
import data

TRUE_MODEL = "EnKF, true model"
FORECAST_STEPS = 10
TRUE_RADIUS, TRUE_RTPS = 2000.0, 0.5


class NetworkName(StrEnum):
    """The networks, by the names of the paper's experiments."""

    STATIONS = "stations"
    SWATH = "swath"
    BLOCKS = "blocks"


def network(name: NetworkName, prior: SphericalEmulator) -> ObservingNetwork:
    """With errors of a fifth of the climate's standard deviation, of the surface and of the lowest level."""
    errors = fraction_of(prior.state_scale, NEAR_GROUND, prior.layout, 0.2)
    match name:
        case NetworkName.STATIONS:
            return Stations(errors, count=200)
        case NetworkName.SWATH:
            return Swath(errors)
        case NetworkName.BLOCKS:
            return BlockMeans(errors)


def truths(folder: Path, split: str, count: int, length: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """States from the end of a shard on, and (run, shard) of that end: there the model's whole state is stored."""
    shards = list(data.shards(folder, split))
    runs = len(shards[0])
    places = [(i % runs, 1 + 2 * (i // runs)) for i in range(count)]
    if places[-1][1] + 1 >= len(shards):
        raise typer.BadParameter(f"{count} truths; the {len(shards)} shards of '{split}' have fewer.")
    found = [np.concatenate([shards[shard][run, -1:], shards[shard + 1][run, : length - 1]]) for run, shard in places]
    return np.stack(found), places


def scores_so_far(out: Path, settings: dict[str, Any], names: list[str]) -> dict[str, list[dict[str, float]]]:
    """By filter, one for each truth, of a run that was stopped; empty lists for a new one."""
    if not out.exists():
        return {name: [] for name in names}
    found = json.loads(out.read_text())
    if found["settings"] != settings or list(found["scores"]) != names:
        raise typer.BadParameter(
            f"{out} has scores of {found['settings']} and {', '.join(found['scores'])}; this run is of {settings} and "
            f"{', '.join(names)}. Give another --out, or remove it."
        )
    return found["scores"]


def main(
    data_folder: Annotated[Path, typer.Option("--data", help="Folder of generate.py.")] = Path("weather_data"),
    network_name: Annotated[NetworkName, typer.Option("--network")] = NetworkName.STATIONS,
    count: Annotated[int, typer.Option("--truths", min=1)] = 5,
    particles: Annotated[int, typer.Option(min=2)] = 256,
    cycles: Annotated[int, typer.Option(min=2)] = 30,
    target_ess: Annotated[float, typer.Option(help="Of the local FA-APF; 0.8 for 64 particles.")] = 0.5,
    only: Annotated[list[str] | None, typer.Option(help="Only this filter; may be repeated.")] = None,
    true_model: Annotated[bool, typer.Option(help="Also the Kalman filter with the true model.")] = False,
    split: Annotated[str, typer.Option(help="Runs the truths are of.")] = "test",
    out: Annotated[Path, typer.Option(help="Where the scores go, as JSON.")] = Path("mini_weather.json"),
) -> None:
    """Run, print and write."""
    prior = ndda.load_prior("held_suarez")
    experiment = WeatherExperiment(
        {"y": network(network_name, prior)}, cycles=cycles, spin_up=max(cycles - 10, 0), target_ess=target_ess
    )
    states, places = truths(data_folder, split, count, 1 + cycles + FORECAST_STEPS)

    @eqx.filter_jit
    def forecast(rng_key: jax.Array, ensemble: jax.Array) -> jax.Array:
        def member(key: jax.Array, x: jax.Array) -> jax.Array:
            def step(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
                return DiffusionDynamics(prior, prior.condition(x), SAMPLER).draw(key)[0], None

            return jax.lax.scan(step, x, jax.random.split(key, FORECAST_STEPS))[0]

        return jax.lax.map(
            lambda given: member(*given), (jax.random.split(rng_key, len(ensemble)), ensemble), batch_size=16
        )

    def forecast_error(rng_key: jax.Array, ensemble: np.ndarray, truth: np.ndarray) -> float:
        found = np.asarray(forecast(rng_key, jnp.asarray(ensemble)))
        scaled = (in_climate_units(v, prior) for v in (found, truth))
        by_channel = ndda.diagnostics.rmse(*scaled, axis=(1, 2), weights=area_weights(prior))
        return float(np.sqrt(np.mean(by_channel**2)))

    settings = {
        "network": network_name,
        "particles": particles,
        "cycles": cycles,
        "target_ess": target_ess,
        "split": split,
    }
    names = only or list(FILTERS)
    rows = scores_so_far(out, settings, [*names, *([TRUE_MODEL] if true_model else [])])
    true_filter = TrueModelFilter(data_folder, split, experiment, prior, particles) if true_model else None
    for i in track(range(len(rows[names[0]]), count), description="truths"):
        # One truth at a time, with the key of its number: which others are run does not matter.
        result = run_weather_twin(
            experiment, prior, states[i : i + 1, : cycles + 1], seed=i, num_particles=particles, only=names
        )
        runs = {name: result.runs[name][0] for name in names}
        if true_filter is not None:
            runs[TRUE_MODEL] = true_filter.run(i, places[i], states[i, : cycles + 1], result.observations)
            result = dataclasses.replace(result, runs={**result.runs, TRUE_MODEL: [runs[TRUE_MODEL]]})
        for name, run in runs.items():
            scores = {key: float(value[0]) for key, value in result.scores(name).items()}
            key = jax.random.fold_in(jax.random.key(100), i)
            rows[name].append(scores | {"forecast": forecast_error(key, run.last, states[i, -1])})
        # After every truth: a long run that is stopped has lost one.
        out.write_text(json.dumps({"settings": settings, "scores": rows}, indent=1) + "\n")
    table = Table(
        title=f"{network_name}, N = {particles}, {len(rows[names[0]])} truths of {cycles} cycles",
        box=None,
        header_style="bold",
    )
    table.add_column("filter")
    for key in rows[names[0]][0]:
        table.add_column(key, justify="right")
    for name, scores in rows.items():
        cells = []
        for key in scores[0]:
            mean, error = mean_and_standard_error(np.array([s[key] for s in scores]))
            spread = f" ± {error:.3f}" if len(scores) > 1 else ""
            cells.append(f"{mean:.0f}" if key == "passes" else f"{mean:.3f}{spread}")
        table.add_row(name, *cells)
    Console(width=160).print(table)


class TrueModelFilter:
    """The ensemble Kalman filter that is given the true equations and the whole of their state."""

    def __init__(
        self, folder: Path, split: str, experiment: WeatherExperiment, prior: SphericalEmulator, particles: int
    ) -> None:
        # Only here: dinosaur is needed for nothing else.
        import atmosphere as model
        import true_model

        self.atmosphere, self.experiment, self.prior = model.Atmosphere(), experiment, prior
        self.on_layout = true_model.on_layout
        archive, like = true_model.stored_states(folder, "train", self.atmosphere)
        archive = archive.reshape(-1, *archive.shape[2:])
        self.mean, self.archive = archive.mean(0), archive
        self.own, _ = true_model.stored_states(folder, split, self.atmosphere)
        networks = experiment.observing(prior)
        program = true_model.true_program(
            self.atmosphere, like, archive, networks, prior.layout, experiment.start_error
        )
        taper = dataclasses.replace(
            experiment.taper(prior, TRUE_RADIUS), state=true_model.positions(prior.layout, archive.shape[-1])
        )
        self.filter = ndda.Filter(
            ndda.EnKF(program, taper=taper, inflation=(ndda.RTPS(TRUE_RTPS),)),
            num_particles=particles,
            progress_bar=False,
        )

    def run(self, number: int, place: tuple[int, int], states: np.ndarray, y: dict[str, np.ndarray]) -> Any:
        """On one truth, whose whole state is that of (run, shard)."""
        guess_key, filter_key = jax.random.split(jax.random.fold_in(jax.random.key(200), number))
        other = self.archive[int(jax.random.randint(guess_key, (), 0, len(self.archive)))]
        first_guess = self.own[place] + self.experiment.start_error * (other - self.mean)
        self.filter.run(filter_key, jnp.asarray(first_guess), y)
        result = self.filter.result
        seen = jax.jit(lambda x: jax.lax.map(lambda x: self.on_layout(self.atmosphere, x, self.prior.layout), x))
        particles = np.asarray(result.posterior["x"])
        flat = np.asarray(seen(particles.reshape(-1, *particles.shape[3:])))
        posterior = {**result.posterior, "x": flat.reshape(*particles.shape[:3], *flat.shape[1:])}
        first = next(iter(self.experiment.observing(self.prior).values()))
        return summarize_run(
            dataclasses.replace(result, posterior=posterior), states[1:], self.prior, first, self.experiment.spin_up
        )


if __name__ == "__main__":
    typer.run(main)
