"""Smoothing from a particle filter's genealogy, and by backward simulation, against the Rauch-Tung-Striebel smoother.

x' = A x + N(0, Q), A = 0.95 x a random rotation, Q_ij = 0.25 exp(-|i - j| / 3); every second component is observed with
error 0.5; FA-APF with exact weights and no tempering. For the filter's particles (lag 0), a few fixed lags, the whole
genealogy, and trajectories simulated backwards (--draws of them, by default as many as particles), means over seeds (a
new rotation, truth and observations each) with their standard errors:

- mean error: RMS over steps and components of (particle mean - RTS mean) / RTS standard deviation;
- variance ratio: particle variance / RTS variance, averaged the same way;
- distinct lines: different particles among the draws, the median over steps, and at the first step.

With --truths, also smoothing of the Lorenz-96 twin experiment (FA-APF on the emulator, default settings: Dirac weights,
tempered), where there is no exact answer but a truth: RMSE and spread of the particles, and distinct lines, over the
steps after 20 and before the last 10.

    python examples/benchmarks/smoothing.py --truths 5 --out smoothing.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.linalg
import typer
from numpyro.contrib.control_flow import scan
from rich.console import Console
from rich.progress import track
from rich.table import Table

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos.lorenz96_demo import TwinExperiment

ERROR = 0.5
LAGS = [0, 1, 2, 5, 10, 20]
TWIN_LAGS = [0, 1, 2, 3, 5, 10]
SPIN_UP, BEFORE_END = 20, 10
BACKWARD = "backward simulation"
NAMES = ("mean error", "variance ratio", "distinct lines", "distinct lines at the first step")
TWIN_NAMES = ("RMSE", "spread/RMSE", "distinct lines")


def covariance(d: int) -> np.ndarray:
    """Q."""
    i = np.arange(d)
    return 0.25 * np.exp(-np.abs(i[:, None] - i[None]) / 3)


def rauch_tung_striebel(
    a: np.ndarray, q: np.ndarray, initial: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means (time, d) and covariances (time, d, d) of p(x_k | y_{1:T}), from x_0 ~ N(0, initial)."""
    d = len(a)
    h = np.eye(d)[::2]
    mean, spread = np.zeros(d), initial
    filtered, forecasts = [], []
    for y_t in y:
        mean, spread = a @ mean, a @ spread @ a.T + q
        forecasts.append((mean, spread))
        gain = np.linalg.solve(h @ spread @ h.T + ERROR**2 * np.eye(len(h)), h @ spread).T
        mean, spread = mean + gain @ (y_t - h @ mean), spread - gain @ h @ spread
        filtered.append((mean, spread))
    smoothed = [filtered[-1]]
    for (mean, spread), (ahead, ahead_spread) in zip(filtered[-2::-1], forecasts[:0:-1], strict=True):
        gain = np.linalg.solve(ahead_spread, a @ spread).T
        later, later_spread = smoothed[-1]
        smoothed.append((mean + gain @ (later - ahead), spread + gain @ (later_spread - ahead_spread) @ gain.T))
    means, spreads = zip(*smoothed[::-1], strict=True)
    return np.array(means), np.array(spreads)


def simulate(rng: np.random.Generator, d: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A, covariance of x_0, observations (time, ...)): a truth from the stationary distribution."""
    q = covariance(d)
    a = 0.95 * np.linalg.qr(rng.normal(size=(d, d)))[0]
    initial = scipy.linalg.solve_discrete_lyapunov(a, q)
    x, root, y = np.linalg.cholesky(initial) @ rng.normal(size=d), np.linalg.cholesky(q), []
    for _ in range(steps):
        x = a @ x + root @ rng.normal(size=d)
        y.append(x[::2] + ERROR * rng.normal(size=(d + 1) // 2))
    return a, initial, np.array(y)


def program(d: int) -> Callable[..., None]:
    """The state-space model; the matrix A is an argument, so that a new rotation compiles nothing."""
    factor = jnp.asarray(np.linalg.cholesky(covariance(d)))

    def model(y: jax.Array, a: jax.Array, initial_factor: jax.Array) -> None:
        x0 = numpyro.sample("x0", dist.MultivariateNormal(jnp.zeros(d), scale_tril=initial_factor))

        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            x = numpyro.sample("x", dist.MultivariateNormal(a @ x, scale_tril=factor))
            numpyro.sample("y", dist.Normal(x[::2], ERROR).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    return model


def label(lag: int | None) -> str:
    """What a row is called."""
    return {None: "genealogy", 0: "0: the filter"}.get(lag, str(lag))


def scores(result: ndda.FilterResult, means: np.ndarray, spreads: np.ndarray) -> list[float]:
    """Mean error, variance ratio, distinct lines (median over steps, first step) of one smoothed run."""
    x, variance = result.posterior["x"][0].astype(float), np.diagonal(spreads, axis1=1, axis2=2)
    lines = result.sample_stats["distinct_lines"][0]
    error = np.sqrt(np.mean((x.mean(0) - means) ** 2 / variance))
    return [float(error), float(np.mean(x.var(0, ddof=1) / variance)), float(np.median(lines)), float(lines[0])]


def linear_gaussian(
    d: int, lags: list[int | None], seeds: int, steps: int, particles: int, draws: int, console: Console
) -> np.ndarray:
    """Scores of every experiment, shape (seed, lag, name); the last "lag" is backward simulation, if any draws."""
    algorithm = ndda.FAAPF(program(d), weight=ndda.Moment(), target_ess=0.0)
    filter_ = ndda.Filter(algorithm, num_particles=particles, progress_bar=False)
    found = []
    for seed in track(range(seeds), "linear-Gaussian", console=console, transient=True):
        a, initial, y = simulate(np.random.default_rng(seed), d, steps)
        filter_.run(jax.random.key(seed), *map(jnp.asarray, (y, a, np.linalg.cholesky(initial))))
        exact = rauch_tung_striebel(a, covariance(d), initial, y)
        smoothed = [filter_.smoothed(lag) for lag in lags]
        if draws:
            smoothed.append(filter_.backward_simulation(jax.random.key(seeds + seed), draws))
        found.append([scores(result, *exact) for result in smoothed])
    return np.array(found)


def lorenz96(lags: list[int | None], truths: int, cycles: int, particles: int, console: Console) -> np.ndarray:
    """Scores of every truth, shape (truth, lag, name)."""
    prior = ndda.load_prior("lorenz96")
    twin = TwinExperiment(cycles, SPIN_UP)

    def model(y: jax.Array) -> None:
        x0 = numpyro.sample("x0", prior.climatology())

        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
            error = twin.error_variance**0.5
            numpyro.sample("y", dist.Normal(x[:: twin.every], error).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    filter_ = ndda.Filter(ndda.FAAPF(model), num_particles=particles, progress_bar=False)
    scored = slice(SPIN_UP, cycles - BEFORE_END)
    found = []
    for truth in track(range(truths), "Lorenz-96", console=console, transient=True):
        truth_key, run_key = jax.random.split(jax.random.key(truth))
        x, y = twin.truth(truth_key, prior.climatology())
        filter_.run(run_key, jnp.asarray(y))
        rows = []
        for lag in lags:
            result = filter_.smoothed(lag)
            draws = result.posterior["x"][0][:, scored].astype(float)
            rmse = np.sqrt(np.mean((draws.mean(0) - x[scored]) ** 2))
            spread = np.sqrt(np.mean(draws.var(0, ddof=1)))
            rows.append([rmse, spread / rmse, np.median(result.sample_stats["distinct_lines"][0, scored])])
        found.append(rows)
    return np.array(found)


def report(
    console: Console, title: str, names: tuple[str, ...], labels: list[str], values: np.ndarray
) -> list[dict[str, Any]]:
    """Print the table of means, and give it with standard errors, from values of shape (experiment, label, name)."""
    # One experiment says nothing about its own error.
    errors = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
    table = Table(title=title)
    for name in ("lag", *names):
        table.add_column(name, justify="right")
    rows = []
    for i, name_of_row in enumerate(labels):
        row: dict[str, Any] = {"lag": name_of_row}
        cells = [name_of_row]
        for j, name in enumerate(names):
            mean = float(values[:, i, j].mean())
            row[name], row[f"{name} SE"] = mean, None if errors is None else float(errors[i, j])
            error = "" if errors is None else f" ± {errors[i, j]:.2f}"
            cells.append(f"{mean:.0f}" if "lines" in name else f"{mean:.2f}{error}")
        table.add_row(*cells)
        rows.append(row)
    console.print(table)
    return rows


def main(
    out: Annotated[Path | None, typer.Option(help="Write the tables to this JSON file.")] = None,
    d: Annotated[int, typer.Option(help="Dimension of the state.", min=1)] = 4,
    lag: Annotated[list[int] | None, typer.Option(help="A fixed lag; may be repeated.", min=0)] = None,
    seeds: Annotated[int, typer.Option(help="Linear-Gaussian experiments.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Steps of each of them.", min=2)] = 100,
    particles: Annotated[int, typer.Option(help="Particles N of each of them.", min=2)] = 512,
    draws: Annotated[
        int | None, typer.Option(help="Trajectories simulated backwards; 0 for none, by default N.", min=0)
    ] = None,
    truths: Annotated[int, typer.Option(help="Truths of the Lorenz-96 twin experiment.", min=0)] = 0,
    cycles: Annotated[int, typer.Option(help="Its steps.", min=SPIN_UP + BEFORE_END + 1)] = 60,
    twin_particles: Annotated[int, typer.Option(help="Its particles.", min=2)] = 256,
) -> None:
    """Error, spread and distinct lines of smoothed particles."""
    console = Console()
    draws = particles if draws is None else draws
    settings = {"d": d, "seeds": seeds, "steps": steps, "particles": particles, "draws": draws}
    lags: list[int | None] = [*(lag or LAGS), None]
    values = linear_gaussian(d, lags, seeds, steps, particles, draws, console)
    labels = [*map(label, lags), *([BACKWARD] if draws else [])]
    title = f"d = {d}, N = {particles}, {steps} steps, {seeds} seeds"
    tables: dict[str, Any] = {"rows": report(console, title, NAMES, labels, values)}
    if truths:
        settings |= {"truths": truths, "cycles": cycles, "twin_particles": twin_particles}
        lags = [*(lag or TWIN_LAGS), None]
        values = lorenz96(lags, truths, cycles, twin_particles, console)
        title = f"Lorenz-96, N = {twin_particles}, {cycles} cycles, {truths} truths"
        tables["lorenz96"] = report(console, title, TWIN_NAMES, [*map(label, lags)], values)
    if out is not None:
        out.write_text(json.dumps({"version": ndda.__version__, "settings": settings, **tables}, indent=2) + "\n")
        console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
