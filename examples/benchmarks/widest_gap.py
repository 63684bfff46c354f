"""Where is a particle filter furthest ahead of an ensemble Kalman filter? Both have the true transition.

The cases have features that a Kalman update cannot represent:

- lorenz63: all components of Lorenz-63 are observed with error variance 2, every 0.25 time units (a third of a turn;
  noise variance 0.04); the forecast ensemble bends around the attractor;
- lorenz63, x only: only the first component is observed;
- rain: max(x - 2, 0) of every site of Lorenz-96, error variance 0.1; values below the threshold are not observed;
- sparse modulus: abs(x) of every second site of Lorenz-96, error variance 0.1.

Lorenz-96 is that of `local_ancestors.py` (40 sites, step 0.1, noise variance 0.5), and the filters are localized. For
Lorenz-63, the settings of both filters have the lowest CRPS on other truths, as `--tune` prints. For Lorenz-96, they
are those of other cases and were not tuned.

    python examples/benchmarks/widest_gap.py --out widest_gap.json
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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

TUNING_SEED = 1
SITES = 40


def lorenz63(x: jax.Array, time: float = 0.25, step: float = 0.01) -> jax.Array:
    """State of Lorenz-63 (sigma = 10, rho = 28, beta = 8/3) after `time`, by fourth-order Runge-Kutta."""

    def slope(x: jax.Array) -> jax.Array:
        return jnp.stack([10.0 * (x[1] - x[0]), x[0] * (28.0 - x[2]) - x[1], x[0] * x[1] - 8.0 / 3.0 * x[2]])

    def move(_: int, x: jax.Array) -> jax.Array:
        k1 = slope(x)
        k2 = slope(x + 0.5 * step * k1)
        k3 = slope(x + 0.5 * step * k2)
        return x + step / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + slope(x + step * k3))

    return jax.lax.fori_loop(0, round(time / step), move, x)


class Case(NamedTuple):
    """State-space model x' = flow(x) + noise, y = h(x) + error.

    Attributes:
        flow: transition of the state without noise.
        noise_variance: variance of the noise.
        climate: mean and standard deviation of the first state.
        h: observed function of the state.
        error_variance: error variance of the observations.
        every: spacing of the observations on a ring of sites; None if the state is not a ring.
    """

    flow: Callable[[jax.Array], jax.Array]
    noise_variance: float
    climate: tuple[np.ndarray, np.ndarray]
    h: Callable[[jax.Array], jax.Array]
    error_variance: float
    every: int | None = None


OF_63 = (lorenz63, 0.04, (np.array([0.0, 0.0, 23.5]), np.array([7.9, 9.0, 8.6])))
OF_96 = (lorenz96.flow, lorenz96.NOISE_VARIANCE, (np.full(SITES, 2.3), np.full(SITES, 3.6)))
CASES = {
    "lorenz63": Case(*OF_63, lambda x: x, 2.0),
    "lorenz63, x only": Case(*OF_63, lambda x: x[:1], 2.0),
    "rain": Case(*OF_96, lambda x: jnp.maximum(x - 2.0, 0.0), 0.1, 1),
    "sparse modulus": Case(*OF_96, lambda x: jnp.abs(x[::2]), 0.1, 2),
}


class Setting(NamedTuple):
    """Settings of a filter.

    Attributes:
        amount: target ESS of the particle filter, or factor on the forecast of the Kalman filter.
        radius: half-width of the taper in sites; None for no taper.
    """

    amount: float
    radius: float | None = None


# Lorenz-63: lowest CRPS of `grid` on six truths of `TUNING_SEED` with 300 cycles each. "rain" and "sparse modulus": the
# settings of `local_ancestors.py` for the modulus of every site. Moved ancestors have the default target everywhere.
TUNED: dict[str, dict[str, Setting]] = {
    "FA-APF, Moment": {
        "lorenz63": Setting(0.05), "lorenz63, x only": Setting(0.0), "rain": Setting(0.1, 5.0),
        "sparse modulus": Setting(0.1, 5.0),
    },
    "FA-APF, moved": {
        "lorenz63": Setting(0.5), "lorenz63, x only": Setting(0.5), "rain": Setting(0.5, 5.0),
        "sparse modulus": Setting(0.5, 5.0),
    },
    "EnKF": {
        "lorenz63": Setting(1.0), "lorenz63, x only": Setting(1.02), "rain": Setting(1.0, 6.0),
        "sparse modulus": Setting(1.0, 6.0),
    },
}  # fmt: skip
CONTROLS = ("free ensemble", "bootstrap", "equal weights")


def grid(name: str, case: Case) -> list[Setting]:
    """Settings to try for a filter."""
    if case.every is None:
        amounts = {"FA-APF, Moment": (0.0, 0.05, 0.1, 0.2), "EnKF": (1.0, 1.02, 1.05, 1.1)}.get(name, (0.2, 0.5))
        return [Setting(amount) for amount in amounts]
    if name == "EnKF":
        return [Setting(amount, radius) for radius in (4.0, 6.0, 9.0) for amount in (1.0, 1.05)]
    return [Setting(0.1, 3.0), Setting(0.1, 5.0), Setting(0.2, 5.0), Setting(0.1, 8.0)]


def program(case: Case) -> Callable[[jax.Array], None]:
    """State-space model of a case as a NumPyro program."""

    def model(y: jax.Array) -> None:
        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            x = numpyro.sample("x", dist.Normal(case.flow(x), case.noise_variance**0.5).to_event(1))
            numpyro.sample("y", dist.Normal(case.h(x), case.error_variance**0.5).to_event(1), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(*map(jnp.asarray, case.climate)).to_event(1)), y)

    return model


def simulate(key: jax.Array, case: Case, cycles: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw states and observations, after 50 steps of spin-up."""
    start_key, run_key, error_key = jax.random.split(key, 3)
    mean, deviation = map(jnp.asarray, case.climate)

    def step(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = case.flow(x) + case.noise_variance**0.5 * jax.random.normal(key, x.shape)
        return x, x

    start = mean + deviation * jax.random.normal(start_key, mean.shape)
    states = jax.lax.scan(step, start, jax.random.split(run_key, 50 + cycles))[1][50:]
    seen = jax.vmap(case.h)(states)
    return np.asarray(states), np.asarray(seen + case.error_variance**0.5 * jax.random.normal(error_key, seen.shape))


def make(name: str, setting: Setting | None, case: Case) -> ndda.filters.FilterAlgorithm:
    """Filter of the given name."""
    model, taper = program(case), None
    if setting is not None and setting.radius is not None:
        assert case.every is not None
        at = np.arange(0, SITES, case.every)
        taper = ndda.Taper(setting.radius, ndda.Ring(SITES), {"y": at}, state=np.arange(SITES))
    if name == "EnKF":
        return ndda.EnKF(model, taper=taper, inflation=(ndda.ForecastMultiplicative(setting.amount),))
    if name == "equal weights":
        return ndda.FAAPF(model, weight=ndda.Equal())
    if name == "FA-APF, Moment":
        return ndda.FAAPF(model, weight=ndda.Moment(), taper=taper, target_ess=setting.amount, move=False)
    if name == "FA-APF, moved":
        return ndda.FAAPF(model, weight=ndda.Moment(), taper=taper, target_ess=setting.amount, move=True)
    return ndda.Bootstrap(model)


def row_of(
    name: str, setting: Setting | None, kind: str, *, seed: int, truths: int, particles: int, cycles: int, spin_up: int
) -> dict[str, Any]:
    """Scores of a filter for each truth; truths on which it diverges are lost."""
    case = CASES[kind]
    algorithm = make(name, setting, case)
    run = ndda.Filter(algorithm, num_particles=particles, progress_bar=False, keep_observed=False)
    row: dict[str, Any] = {"case": kind, "filter": name, "lost": 0, "CRPS": [], "RMSE": [], "spread/skill": []}
    row |= {"amount": None, "radius": None} if setting is None else setting._asdict()
    for number in range(truths):
        truth_key, filter_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        states, y = simulate(truth_key, case, cycles)
        try:
            run.run(filter_key, np.full_like(y, np.nan) if name == "free ensemble" else y)
        except FloatingPointError:
            row["lost"] += 1
            continue
        x, truth = run.result.posterior["x"][0, :, spin_up:], states[spin_up:]
        row["CRPS"].append(ndda.diagnostics.crps(x, truth))
        row["RMSE"].append(ndda.diagnostics.rmse(x, truth))
        row["spread/skill"].append(ndda.diagnostics.spread_skill(x, truth))
    return row


COLUMNS = {
    "case": "", "filter": "", "ESS or factor": "g", "radius": "g", "RMSE": ".3f", "spread/skill": ".2f",
    "CRPS": ".4f", "median CRPS": ".3f", "gap, %": "+.1f", "lost": "",
}  # fmt: skip


def summarized(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table: means over truths, and gap of the mean CRPS to that of the Kalman filter in the same case."""
    kalman = {row["case"]: np.mean(row["CRPS"]) for row in rows if row["filter"] == "EnKF" and row["CRPS"]}
    found = []
    for row in rows:
        shown = {**row, "ESS or factor": row["amount"]}
        for key in ("RMSE", "spread/skill", "CRPS"):
            shown |= mean_and_error(key, row[key])
        if row["CRPS"]:
            shown["median CRPS"] = float(np.median(row["CRPS"]))
            if row["case"] in kalman:
                shown["gap, %"] = float(100 * (shown["CRPS"] / kalman[row["case"]] - 1))
        found.append(shown)
    return found


def main(
    case: Annotated[list[str] | None, typer.Option(help="Case to run; may be repeated; all by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Filter to run; may be repeated; all by default.")] = None,
    truths: Annotated[int, typer.Option(min=1, help="Number of truths.")] = 10,
    particles: Annotated[int, typer.Option(min=2, help="Particles of each filter.")] = 256,
    cycles: Annotated[int, typer.Option(min=2, help="Filter steps on each truth.")] = 120,
    spin_up: Annotated[int, typer.Option(min=0, help="Filter steps at the start that are not scored.")] = 30,
    tune: Annotated[bool, typer.Option(help="Run the grid of settings on the tuning truths instead.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the truths reported.")] = 0,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the scores to.")] = None,
) -> None:
    """Print scores of particle filters and of an ensemble Kalman filter where its update is inadequate."""
    console = Console(width=140)
    names = [*TUNED, *CONTROLS]
    for given, known, what in ((case, list(CASES), "case"), (only, names, "filter")):
        if unknown := sorted(set(given or ()) - set(known)):
            raise typer.BadParameter(f"no {what} called {', '.join(unknown)}; give one of {', '.join(known)}.")
    if not spin_up < cycles:
        raise typer.BadParameter(f"a spin-up of {spin_up} of {cycles} cycles leaves none to score; give fewer.")
    work: list[tuple[str, str, Setting | None]] = []
    for kind in case or CASES:
        for name in names:
            if only and name not in only:
                continue
            if tune:
                work += [(kind, name, setting) for setting in (grid(name, CASES[kind]) if name in TUNED else [])]
            else:
                work.append((kind, name, TUNED[name][kind] if name in TUNED else None))
    sizes = {"truths": truths, "particles": particles, "cycles": cycles, "spin_up": spin_up}
    sizes["seed"] = TUNING_SEED if tune else seed
    rows = []
    for kind, name, setting in track(work, "filtering", console=console, transient=True):
        rows.append(row_of(name, setting, kind, **sizes))
        # Write after every row, so that an interrupted run keeps what it has.
        write_json(out, {**sizes, "tune": tune}, rows=rows)
    title = f"N = {particles}, {truths} truths of {cycles} cycles, true transition; mean ± standard error over truths"
    print_table(console, title, summarized(rows), COLUMNS, group="case")


if __name__ == "__main__":
    typer.run(main)
