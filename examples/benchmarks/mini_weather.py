"""How accurate are filters for the mini weather? Three observing networks, several truths, controls, and forecasts.

The truth is the stochastic Held-Suarez atmosphere of examples/mini_weather, every 12 hours for 15 days. Filters use the
emulator of the package. The networks are stations, the swath of a satellite, and means over blocks. The filters are the
free ensemble, guided particles with equal weights, the published FA-APF, local FA-APF, FA-APF with moved ancestors, and
ensemble Kalman filters with the emulator, with and without its covariance V. With `--true-model` there is also an
ensemble Kalman filter with the true equations and their whole state, which requires dinosaur-dycore.

Scores are averages over the last 5 days, in standard deviations of the climate: RMSE of the mean over all, observed and
unobserved channels, spread divided by RMSE, and CRPS. "forecast" is the RMSE of a 5-day forecast of the emulator from
the last ensemble. The JSON file also has the rank histograms of each truth, for observed and unobserved channels.

Truths come from the test runs; settings were chosen on the validation run (`--split validation`). On another kind of
processor, generate.py makes other runs, because rounding differs. Scores then differ like those of other truths.

    python examples/mini_weather/generate.py --out weather_data
    python examples/benchmarks/mini_weather.py --data weather_data --network stations --out mini_weather.json

The script writes scores after every truth, and continues from there if it runs again with the same options. It compiles
the filters for every truth; set JAX_COMPILATION_CACHE_DIR to compile them only once.
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
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import held_suarez_demo
from numpyro_diffusion_da.observation import BlockMeans, ObservingNetwork, Stations, Swath, fraction_of
from numpyro_diffusion_da.priors import SphericalEmulator
from numpyro_diffusion_da.transition import DiffusionDynamics

sys.path.insert(0, str(Path(__file__).parents[1] / "mini_weather"))
import data

TRUE_MODEL = "EnKF, true model"
FORECAST_STEPS = 10
TRUE_RADIUS, TRUE_RTPS = 2000.0, 0.5


class NetworkName(StrEnum):
    """Observing networks of the published experiments."""

    STATIONS = "stations"
    SWATH = "swath"
    BLOCKS = "blocks"


def network(name: NetworkName, prior: SphericalEmulator) -> ObservingNetwork:
    """Network that observes surface and lowest level, with errors of a fifth of the climate's standard deviation."""
    errors = fraction_of(prior.state_scale, held_suarez_demo.NEAR_GROUND, prior.layout, 0.2)
    match name:
        case NetworkName.STATIONS:
            return Stations(errors, count=200)
        case NetworkName.SWATH:
            return Swath(errors)
        case NetworkName.BLOCKS:
            return BlockMeans(errors)


def truths(folder: Path, split: str, count: int, length: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """States of each truth from the end of a shard, where whole states are stored, and (run, shard) of that end."""
    shards = list(data.shards(folder, split))
    runs = len(shards[0])
    places = [(i % runs, 1 + 2 * (i // runs)) for i in range(count)]
    if places[-1][1] + 1 >= len(shards):
        raise typer.BadParameter(
            f"{count} truths are more than the {len(shards)} shards of '{split}' contain; give fewer."
        )
    found = [np.concatenate([shards[shard][run, -1:], shards[shard + 1][run, : length - 1]]) for run, shard in places]
    return np.stack(found), places


def found_so_far(
    out: Path, settings: dict[str, Any], names: list[str]
) -> tuple[dict[str, list[dict[str, float]]], dict[str, list[dict[str, list[float]]]]]:
    """Scores and rank histograms of each filter, one entry per truth, from an interrupted run; empty for a new run."""
    if not out.exists():
        return {name: [] for name in names}, {name: [] for name in names}
    found = json.loads(out.read_text())
    if found["settings"] != settings or list(found["scores"]) != names:
        raise typer.BadParameter(
            f"{out} has scores for {found['settings']} and {', '.join(found['scores'])}, but this run has {settings} "
            f"and {', '.join(names)}; give another --out, or remove the file."
        )
    return found["scores"], found["ranks"]


def main(
    data_folder: Annotated[Path, typer.Option("--data", help="Folder that generate.py wrote.")] = Path("weather_data"),
    network_name: Annotated[NetworkName, typer.Option("--network", help="Observing network.")] = NetworkName.STATIONS,
    count: Annotated[int, typer.Option("--truths", min=1, help="Number of truths.")] = 5,
    particles: Annotated[int, typer.Option(min=2, help="Particles, or members, of each filter.")] = 256,
    cycles: Annotated[int, typer.Option(min=2, help="Filter steps on each truth.")] = 30,
    target_ess: Annotated[float, typer.Option(help="Target ESS of local FA-APF; use 0.8 for 64 particles.")] = 0.5,
    moved_errors: Annotated[
        float, typer.Option(help="Factor on the emulator's errors with moved ancestors.")
    ] = held_suarez_demo.MOVED_ERRORS,
    relaxation: Annotated[
        float, typer.Option(help="Amount of RTPS of the Kalman filters with the emulator.")
    ] = held_suarez_demo.RELAXATION,
    only: Annotated[list[str] | None, typer.Option(help="Filter to run; may be repeated; all by default.")] = None,
    true_model: Annotated[bool, typer.Option(help="Also run the Kalman filter with the true model.")] = False,
    split: Annotated[str, typer.Option(help="Runs that the truths come from.")] = "test",
    out: Annotated[Path, typer.Option(callback=json_file, help="JSON file to write the scores to.")] = Path(
        "mini_weather.json"
    ),
) -> None:
    """Print scores of filters on several truths with one observing network."""
    prior = ndda.load_prior("held_suarez")
    experiment = held_suarez_demo.WeatherExperiment(
        {"y": network(network_name, prior)},
        cycles=cycles,
        spin_up=max(cycles - 10, 0),
        target_ess=target_ess,
        moved_errors=moved_errors,
        relaxation=relaxation,
    )
    states, places = truths(data_folder, split, count, 1 + cycles + FORECAST_STEPS)

    @eqx.filter_jit
    def forecast(rng_key: jax.Array, ensemble: jax.Array) -> jax.Array:
        def member(key: jax.Array, x: jax.Array) -> jax.Array:
            def step(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
                return DiffusionDynamics(prior, prior.condition(x), held_suarez_demo.SAMPLER).draw(key)[0], None

            return jax.lax.scan(step, x, jax.random.split(key, FORECAST_STEPS))[0]

        return jax.lax.map(
            lambda given: member(*given), (jax.random.split(rng_key, len(ensemble)), ensemble), batch_size=16
        )

    def forecast_error(rng_key: jax.Array, ensemble: np.ndarray, truth: np.ndarray) -> float:
        found = np.asarray(forecast(rng_key, jnp.asarray(ensemble)))
        scaled = (held_suarez_demo.in_climate_units(v, prior) for v in (found, truth))
        by_channel = ndda.diagnostics.rmse(*scaled, axis=(1, 2), weights=held_suarez_demo.area_weights(prior))
        return float(np.sqrt(np.mean(by_channel**2)))

    settings = {
        "network": network_name,
        "particles": particles,
        "cycles": cycles,
        "target_ess": target_ess,
        "moved_errors": moved_errors,
        "relaxation": relaxation,
        "split": split,
    }
    names = only or list(held_suarez_demo.FILTERS)
    rows, ranks = found_so_far(out, settings, [*names, *([TRUE_MODEL] if true_model else [])])
    observed = experiment.observed_channels(prior)
    true_filter = TrueModelFilter(data_folder, split, experiment, prior, particles) if true_model else None
    for i in track(range(len(rows[names[0]]), count), description="truths"):
        # One truth at a time with its own key, so that scores do not depend on the number of truths.
        result = held_suarez_demo.run_weather_twin(
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
            ranks[name].append(
                {
                    part: result.rank_frequencies(name, channels)[1].tolist()
                    for part, channels in (("observed", observed), ("unobserved", ~observed))
                }
            )
        # Write after every truth, so that an interrupted run loses one truth at most.
        write_json(out, settings, scores=rows, ranks=ranks)
    shown = []
    for name, scores in rows.items():
        row: dict[str, Any] = {"filter": name}
        for key in scores[0]:
            row |= mean_and_error(key, [s[key] for s in scores])
        shown.append(row)
    title = f"{network_name}, N = {particles}, {len(rows[names[0]])} truths of {cycles} cycles; mean ± standard error"
    forms = {"passes": ".0f", "conditioning": ".1f"}
    columns = {"filter": ""} | {key: forms.get(key, ".3f") for key in rows[names[0]][0]}
    print_table(Console(), title, shown, columns, without_error=forms)


class TrueModelFilter:
    """Ensemble Kalman filter with the true equations and their whole state."""

    def __init__(
        self,
        folder: Path,
        split: str,
        experiment: held_suarez_demo.WeatherExperiment,
        prior: SphericalEmulator,
        particles: int,
    ) -> None:
        # These modules need dinosaur, which nothing else here requires.
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
        """Run on one truth, whose whole initial state is stored at `place` = (run, shard)."""
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
        return held_suarez_demo.summarize_run(
            dataclasses.replace(result, posterior=posterior), states[1:], self.prior, first, self.experiment.spin_up
        )


if __name__ == "__main__":
    typer.run(main)
