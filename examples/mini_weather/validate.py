"""Measure the skill of the mini-weather emulator on the test runs.

    python examples/mini_weather/validate.py --data weather_data --emulator weather_emulator

The script prints a table and writes validation.json next to the emulator. All scores are weighted by area.

- One step: spread over error with the correction for finite ensembles, fair CRPS relative to the mean absolute error of
  persistence, and the error of the conditional mean relative to that of persistence.
- Forecasts: spread over error after `--forecast-days` days from the truth, and the correlation of errors between steps.
  A correlation of consecutive errors makes the spread of forecasts too small.
- Climate: mean, variance, and power by zonal wavenumber of `--runs` free runs of `--days` days from test states,
  compared with the truth. The same comparison between the two halves of the truth shows the sampling error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import data
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scoringrules
import typer
from rich.console import Console
from rich.table import Table

from numpyro_diffusion_da.diffusion import DPMSolverPP2M, KarrasSchedule, Sampler
from numpyro_diffusion_da.observation import channel_names
from numpyro_diffusion_da.priors import SphericalEmulator, read_spherical_emulator
from numpyro_diffusion_da.transition import DiffusionDynamics

NAME = "held_suarez"
WAVENUMBERS = 21
"""Number of zonal wavenumbers of the true system above 0."""
LAGS = (1, 2, 4)
"""Lags in steps for the correlation of errors."""
SCORES = ("spread_over_error", "forecast_spread_over_error", "crps_over_persistence", "mean_error_over_persistence")


def area_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area-weighted mean of each channel, from fields (..., latitude, longitude, channel)."""
    flat = values.reshape(-1, *values.shape[-3:]).astype(np.float64)
    return np.einsum("j,tjqc->c", weights, flat) / (len(flat) * flat.shape[2])


@eqx.filter_jit
def conditional_means(emulator: SphericalEmulator, states: jax.Array) -> jax.Array:
    """Conditional means of the next state, for each of the given states."""
    return jax.lax.map(lambda x: emulator.condition(x).mean, states)


def ensembles(member: Any, rng_key: jax.Array, states: np.ndarray, members: int) -> np.ndarray:
    """Run ensembles from each of the given states.

    Args:
        member: function (rng_key, state) -> state of one member.
        rng_key: key of the draws.
        states: initial states, shape (state, latitude, longitude, channel).
        members: number of members.

    Returns:
        Ensembles, shape (state, member, latitude, longitude, channel).
    """
    run = jax.jit(
        lambda k, x: jax.lax.map(
            lambda kx: jax.vmap(member, (0, None))(jax.random.split(kx[0], members), kx[1]), (k, x)
        )
    )
    return np.asarray(run(jax.random.split(rng_key, len(states)), jnp.asarray(states)))


def spread_over_error(ensemble: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ratio of spread to error of the ensemble mean for each channel, with the correction for finite ensembles."""
    members = ensemble.shape[1]
    error = area_mean((ensemble.mean(axis=1) - truth) ** 2, weights)
    return np.sqrt((members + 1) / members * area_mean(ensemble.var(axis=1, ddof=1), weights) / error)


def one_step(emulator: SphericalEmulator, draw: Any, before: np.ndarray, after: np.ndarray, members: int) -> dict:
    """Scores of one step for each channel.

    Args:
        emulator: the emulator.
        draw: function (rng_key, state) -> next state.
        before: states of the truth.
        after: states of the truth one step later.
        members: number of ensemble members.
    """
    weights = emulator.noise.harmonics.weights
    ensemble = ensembles(draw, jax.random.key(1), before, members)
    crps = scoringrules.crps_ensemble(after, np.moveaxis(ensemble, 1, -1), estimator="fair")
    change = area_mean((before - after) ** 2, weights)
    mean = np.asarray(conditional_means(emulator, jnp.asarray(before)))
    return {
        "spread_over_error": spread_over_error(ensemble, after, weights),
        "crps_over_persistence": area_mean(crps, weights) / area_mean(np.abs(before - after), weights),
        "mean_error_over_persistence": np.sqrt(area_mean((mean - after) ** 2, weights) / change),
        "persistence_error": np.sqrt(change),
    }


def error_correlation(emulator: SphericalEmulator, truth: np.ndarray, starts: int, lag: int) -> np.ndarray:
    """Correlation of the conditional mean's errors at two times `lag` steps apart, for each channel."""
    weights = emulator.noise.harmonics.weights
    steps = truth.shape[1] - 1 - lag
    chosen = np.linspace(0, len(truth) * steps - 1, min(starts, len(truth) * steps)).astype(int)
    run, time = np.divmod(chosen, steps)
    first, second = (
        truth[run, t + 1] - np.asarray(conditional_means(emulator, jnp.asarray(truth[run, t])))
        for t in (time, time + lag)
    )
    sizes = area_mean(first**2, weights) * area_mean(second**2, weights)
    return area_mean(first * second, weights) / np.sqrt(sizes)


def forecast_spread_over_error(
    emulator: SphericalEmulator, draw: Any, truth: np.ndarray, starts: int, members: int, steps: int
) -> np.ndarray:
    """Ratio of spread to error for each channel, of forecasts over `steps` steps from states of the truth.

    Args:
        emulator: the emulator.
        draw: function (rng_key, state) -> next state.
        truth: states of the truth, shape (runs, times, latitude, longitude, channel).
        starts: number of forecasts.
        members: number of ensemble members.
        steps: number of steps.
    """
    first = truth[:, :-steps].reshape(-1, *truth.shape[2:])
    last = truth[:, steps:].reshape(-1, *truth.shape[2:])
    chosen = np.linspace(0, len(first) - 1, min(starts, len(first))).astype(int)

    def member(rng_key: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, key: (draw(key, x), None), x, jax.random.split(rng_key, steps))[0]

    ensemble = ensembles(member, jax.random.key(3), first[chosen], members)
    return spread_over_error(ensemble, last[chosen], emulator.noise.harmonics.weights)


def climate(emulator: SphericalEmulator, states: np.ndarray) -> dict[str, np.ndarray]:
    """Climate statistics of states of shape (runs, times, latitude, longitude, channel), for each channel.

    Returns:
        "mean" along each latitude, "variance", and "power" by zonal wavenumber.
    """
    weights = emulator.noise.harmonics.weights
    profile = states.astype(np.float64).mean(axis=(0, 1, 3))
    anomaly = states - profile[None, None, :, None]
    waves = np.abs(np.fft.rfft(states, axis=3)[:, :, :, 1 : WAVENUMBERS + 1]) ** 2
    return {
        "mean": profile,
        "variance": area_mean(anomaly**2, weights),
        "power": np.einsum("j,rtjmc->mc", weights, waves) / (states.shape[0] * states.shape[1]),
    }


def differences(
    found: dict[str, np.ndarray], truth: dict[str, np.ndarray], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Differences between two climates for each channel.

    Returns:
        Root-mean-square difference of "mean" in standard deviations, and relative differences of "variance" and of
        power. "power" is the largest difference over the lower three quarters of the wavenumbers, and
        "power_of_smallest_quarter" the largest difference over the others.
    """
    bias = np.sqrt(np.einsum("j,jc->c", weights, (found["mean"] - truth["mean"]) ** 2) / truth["variance"])
    power = found["power"] / truth["power"] - 1.0
    quarter = 3 * len(power) // 4
    return {
        "mean": bias,
        "variance": found["variance"] / truth["variance"] - 1.0,
        "power": power[np.abs(power[:quarter]).argmax(0), np.arange(power.shape[1])],
        "power_of_smallest_quarter": power[quarter + np.abs(power[quarter:]).argmax(0), np.arange(power.shape[1])],
    }


def main(
    data_folder: Annotated[Path, typer.Option("--data", help="folder that generate.py wrote")] = Path("weather_data"),
    emulator_folder: Annotated[Path, typer.Option("--emulator", help="folder that train.py wrote")] = Path(
        "weather_emulator"
    ),
    states: Annotated[int, typer.Option(help="number of states for the one-step scores")] = 64,
    members: Annotated[int, typer.Option(help="number of ensemble members")] = 16,
    forecasts: Annotated[int, typer.Option(help="number of ensemble forecasts")] = 32,
    forecast_days: Annotated[int, typer.Option(help="length of each forecast in days")] = 5,
    runs: Annotated[int, typer.Option(help="number of free runs")] = 8,
    days: Annotated[int, typer.Option(help="length of each free run in days")] = 100,
    levels: Annotated[int, typer.Option(help="number of noise levels of a draw")] = 40,
    split: Annotated[str, typer.Option(help="split of the data")] = "test",
) -> None:
    """Measure the skill of the emulator, print it and write it to a file."""
    emulator = read_spherical_emulator(emulator_folder, NAME)
    h, sampler = emulator.noise.harmonics, Sampler(DPMSolverPP2M(), KarrasSchedule(levels))
    truth = np.concatenate(list(data.shards(data_folder, split)), axis=1)

    def draw(rng_key: jax.Array, x: jax.Array) -> jax.Array:
        return DiffusionDynamics(emulator, emulator.condition(x), sampler).draw(rng_key)[0]

    flat_before = truth[:, :-1].reshape(-1, *truth.shape[2:])
    flat_after = truth[:, 1:].reshape(-1, *truth.shape[2:])
    chosen = np.linspace(0, len(flat_before) - 1, min(states, len(flat_before))).astype(int)
    scores = one_step(emulator, draw, flat_before[chosen], flat_after[chosen], members)
    scores["forecast_spread_over_error"] = forecast_spread_over_error(
        emulator, draw, truth, forecasts, members, 2 * forecast_days
    )
    for lag in LAGS:
        scores[f"error_correlation_{lag}"] = error_correlation(emulator, truth, states, lag)

    @eqx.filter_jit
    def run(rng_key: jax.Array, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = jax.vmap(draw)(jax.random.split(jax.random.fold_in(rng_key, i), len(x)), x)
            return x, x

        return jax.lax.scan(step, x, jnp.arange(2 * days))[1]

    starts = flat_before[np.linspace(0, len(flat_before) - 1, runs).astype(int)]
    free = np.moveaxis(np.asarray(run(jax.random.key(2), jnp.asarray(starts))), 1, 0)
    finite = bool(np.all(np.isfinite(free)))
    expected = climate(emulator, truth)
    half = truth.shape[1] // 2
    halves = climate(emulator, truth[:, :half]), climate(emulator, truth[:, half:])
    found = {
        "one_step": scores,
        "climate": differences(climate(emulator, free), expected, h.weights),
        "climate_of_halves_of_the_truth": differences(*halves, h.weights),
        "truth": {"mean_variance": expected["variance"]},
    }
    names = channel_names(emulator.layout)
    columns = ("CRPS/pers.", "mean/pers.", "mean (sd)", "variance", "power", "small scales")
    table = Table("", "spread/error", f"{forecast_days} days", *columns)
    for i, name in enumerate(names):
        one = [f"{scores[k][i]:.3f}" for k in SCORES]
        table.add_row(name, *one, *(f"{v[i]:+.2f}" for v in found["climate"].values()))
    Console(width=120).print(table)
    correlations = ", ".join(f"{scores[f'error_correlation_{lag}'].mean():.2f} ({lag})" for lag in LAGS)
    print(f"correlation of errors, mean over channels (lag in steps): {correlations}")
    print(f"all values of the free runs are finite: {finite}")
    written: dict[str, Any] = jax.tree.map(lambda v: [float(x) for x in np.ravel(v)], found)
    written |= {
        "channels": names,
        "finite": finite,
        "settings": {
            "states": len(chosen),
            "members": members,
            "forecasts": forecasts,
            "forecast_days": forecast_days,
            "runs": runs,
            "days": days,
            "levels": levels,
            "split": split,
        },
    }
    (emulator_folder / "validation.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
