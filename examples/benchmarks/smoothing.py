"""How accurate is smoothing? Compared with the Rauch-Tung-Striebel smoother.

The model is x' = A x + N(0, Q), where A is 0.95 times a random rotation and Q_ij = 0.25 exp(-|i - j| / 3). Every second
component is observed with error 0.5. The filter is FA-APF with exact weights and without tempering. The rows are the
particles of the filter (lag 0), several fixed lags, the whole genealogy, and backward simulation (`--draws`
trajectories, by default as many as particles). The last rows are two filters that move their earlier states themselves,
with a lag of `--moved-lag`: FA-APF that moves its ancestors and selects none, and the ensemble Kalman filter. The table
has means over seeds with standard errors (each seed has its own rotation, truth and observations):

- mean error: RMS over steps and components of (particle mean - RTS mean) / RTS standard deviation;
- variance ratio: mean over steps and components of particle variance / RTS variance;
- distinct lines: number of distinct particles among the draws, median over steps and at the first step.

With `--truths`, the script also smooths the Lorenz-96 twin experiment (FA-APF with the emulator and default settings,
that is tempered Dirac weights). There is no exact answer, so the second table has RMSE and spread of the particles and
distinct lines, over the steps after the first 20 and before the last 10.

    python examples/benchmarks/smoothing.py --truths 5 --out smoothing.json
"""

from __future__ import annotations

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
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_demo

ERROR = 0.5
LAGS = [0, 1, 2, 5, 10, 20]
TWIN_LAGS = [0, 1, 2, 3, 5, 10]
SPIN_UP, BEFORE_END = 20, 10
BACKWARD = "backward simulation"
MOVED = ("moved ancestors", "EnKF")
NAMES = ("mean error", "variance ratio", "distinct lines", "distinct lines at the first step")
TWIN_NAMES = ("RMSE", "spread/RMSE", "distinct lines")


def covariance(d: int) -> np.ndarray:
    """Covariance Q of the transition."""
    i = np.arange(d)
    return 0.25 * np.exp(-np.abs(i[:, None] - i[None]) / 3)


def rauch_tung_striebel(
    a: np.ndarray, q: np.ndarray, initial: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means (time, d) and covariances (time, d, d) of p(x_k | y_{1:T}), with x_0 ~ N(0, initial)."""
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
    """Simulate from the stationary distribution: A, covariance of x_0, and observations (time, ...)."""
    q = covariance(d)
    a = 0.95 * np.linalg.qr(rng.normal(size=(d, d)))[0]
    initial = scipy.linalg.solve_discrete_lyapunov(a, q)
    x, root, y = np.linalg.cholesky(initial) @ rng.normal(size=d), np.linalg.cholesky(q), []
    for _ in range(steps):
        x = a @ x + root @ rng.normal(size=d)
        y.append(x[::2] + ERROR * rng.normal(size=(d + 1) // 2))
    return a, initial, np.array(y)


def program(d: int) -> Callable[..., None]:
    """State-space model; the matrix A is an argument, so that a new rotation does not compile again."""
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
    """Label of the row of a lag; None for the whole genealogy."""
    return {None: "genealogy", 0: "0: the filter"}.get(lag, str(lag))


def scores(result: ndda.FilterResult, means: np.ndarray, spreads: np.ndarray) -> list[float]:
    """Mean error, variance ratio, and distinct lines (median over steps, first step) of a smoothed run."""
    x, variance = result.posterior["x"][0].astype(float), np.diagonal(spreads, axis1=1, axis2=2)
    # States that were moved are all distinct.
    lines = result.sample_stats.get("distinct_lines", np.full((1, len(means)), len(x)))[0]
    error = np.sqrt(np.mean((x.mean(0) - means) ** 2 / variance))
    return [float(error), float(np.mean(x.var(0, ddof=1) / variance)), float(np.median(lines)), float(lines[0])]


def linear_gaussian(
    d: int, lags: list[int | None], seeds: int, steps: int, particles: int, draws: int, moved_lag: int, console: Console
) -> np.ndarray:
    """Scores of all experiments, shape (seed, row, name).

    Rows are lags, backward simulation if there are draws, and the filters of `MOVED` if there is a lag for them.
    """
    model = program(d)
    move = ndda.KalmanMove(selection_share=0.0)
    algorithms: list[Any] = [ndda.FAAPF(model, weight=ndda.Moment(), target_ess=0.0)]
    if moved_lag:
        algorithms += [ndda.FAAPF(model, move=move, lag=moved_lag), ndda.EnKF(model, lag=moved_lag)]
    filters = [ndda.Filter(algorithm, num_particles=particles, progress_bar=False) for algorithm in algorithms]
    filter_ = filters[0]
    found = []
    for seed in track(range(seeds), "linear-Gaussian", console=console, transient=True):
        a, initial, y = simulate(np.random.default_rng(seed), d, steps)
        for each in filters:
            each.run(jax.random.key(seed), *map(jnp.asarray, (y, a, np.linalg.cholesky(initial))))
        exact = rauch_tung_striebel(a, covariance(d), initial, y)
        smoothed = [filter_.smoothed(lag) for lag in lags]
        if draws:
            smoothed.append(filter_.backward_simulation(jax.random.key(seeds + seed), draws))
        smoothed += [each.smoothed(moved_lag) for each in filters[1:]]
        found.append([scores(result, *exact) for result in smoothed])
    return np.array(found)


def lorenz96(lags: list[int | None], truths: int, cycles: int, particles: int, console: Console) -> np.ndarray:
    """Scores on all truths, shape (truth, lag, name)."""
    prior = ndda.load_prior("lorenz96")
    twin = lorenz96_demo.TwinExperiment(cycles, SPIN_UP)

    def model(y: jax.Array) -> None:
        x0 = numpyro.sample("x0", prior.climatology())

        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x, sampler=ndda.Sampler.cheap()))
            error = twin.error_variance**0.5
            numpyro.sample("y", dist.Normal(x[:: twin.every], error).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    filter_ = ndda.Filter(ndda.FAAPF(model, guidance=ndda.MMPS.cheap()), num_particles=particles, progress_bar=False)
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


def rows_of(names: tuple[str, ...], labels: list[str], values: np.ndarray) -> list[dict[str, Any]]:
    """Rows of a table, means over experiments with standard errors, from values (experiment, label, name)."""
    rows = []
    for i, name_of_row in enumerate(labels):
        row: dict[str, Any] = {"lag": name_of_row}
        for j, name in enumerate(names):
            row |= mean_and_error(name, values[:, i, j])
        rows.append(row)
    return rows


def show(console: Console, title: str, names: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Print a table; counts of lines without decimals."""
    counts = [name for name in names if "lines" in name]
    columns = {"lag": ""} | {name: ".0f" if name in counts else ".2f" for name in names}
    print_table(console, title, rows, columns, without_error=counts)


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the tables to.")] = None,
    d: Annotated[int, typer.Option(help="Dimension of the state.", min=1)] = 4,
    lag: Annotated[list[int] | None, typer.Option(help="Fixed lag; may be repeated.", min=0)] = None,
    seeds: Annotated[int, typer.Option(help="Number of linear-Gaussian experiments.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Steps of each linear-Gaussian experiment.", min=2)] = 100,
    particles: Annotated[int, typer.Option(help="Particles in the linear-Gaussian experiments.", min=2)] = 512,
    draws: Annotated[
        int | None, typer.Option(help="Trajectories of backward simulation; 0 for none; by default N.", min=0)
    ] = None,
    moved_lag: Annotated[
        int, typer.Option(help="Lag of the filters that move earlier states; 0 for none.", min=0)
    ] = 20,
    truths: Annotated[int, typer.Option(help="Truths of the Lorenz-96 experiment; 0 to skip it.", min=0)] = 0,
    cycles: Annotated[int, typer.Option(help="Steps of the Lorenz-96 experiment.", min=SPIN_UP + BEFORE_END + 1)] = 60,
    twin_particles: Annotated[int, typer.Option(help="Particles in the Lorenz-96 experiment.", min=2)] = 256,
) -> None:
    """Print error, spread and distinct lines of smoothed particles."""
    console = Console()
    draws = particles if draws is None else draws
    settings = {"d": d, "seeds": seeds, "steps": steps, "particles": particles, "draws": draws, "moved_lag": moved_lag}
    lags: list[int | None] = [*(lag or LAGS), None]
    values = linear_gaussian(d, lags, seeds, steps, particles, draws, moved_lag, console)
    labels = [*map(label, lags), *([BACKWARD] if draws else [])]
    labels += [f"{name}, lag {moved_lag}" for name in MOVED if moved_lag]
    tables = {"rows": rows_of(NAMES, labels, values)}
    title = f"d = {d}, N = {particles}, {steps} steps, {seeds} seeds; mean ± standard error over seeds"
    show(console, title, NAMES, tables["rows"])
    if truths:
        settings |= {"truths": truths, "cycles": cycles, "twin_particles": twin_particles}
        lags = [*(lag or TWIN_LAGS), None]
        values = lorenz96(lags, truths, cycles, twin_particles, console)
        tables["lorenz96"] = rows_of(TWIN_NAMES, [*map(label, lags)], values)
        title = f"Lorenz-96, N = {twin_particles}, {cycles} cycles, {truths} truths; mean ± standard error over truths"
        show(console, title, TWIN_NAMES, tables["lorenz96"])
    write_json(out, settings, **tables)


if __name__ == "__main__":
    typer.run(main)
