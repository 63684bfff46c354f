"""Do moved ancestors beat localized ensemble Kalman filters on the Kuramoto-Sivashinsky equation of EnFF?

EnFF, the ensemble flow filter (Transue et al. 2025, arXiv 2508.13313), compares filters that generate their analysis by
a flow or a diffusion with ensemble Kalman filters. This script has the largest of its Kuramoto-Sivashinsky settings,
u_t = -u u_x - u_xx - u_xxxx, as its code has it (github.com/Utah-Math-Data-Science/Data-Assimilation-Flow-Matching,
commit ad51a8b of June 2026):

- 1024 points on a circle of length 128 pi. Fourth-order exponential time differencing (Kassam & Trefethen 2005) with a
  step of 0.25, in single precision and without dealiasing. The shortest wave has no tendency at all, as in DAPPER, from
  which that code comes: noise in it stays until observations remove it.
- The truth starts from cos(x / 16) (1 + sin(x / 16)). After 600 steps it gets white noise with a standard deviation of
  1. Another 2000 steps later the experiment begins.
- The arctangent of every value is observed every 4 steps with an error of 0.1. The dynamics have no noise.
- 20 members start from the truth plus white noise with a standard deviation of 1.
- The score is the root mean square over the points of the error of the analysis mean, averaged over the last 50 of 1000
  observation times and over five truths that were not used for tuning.

What differs: EnFF also observes the state that the members start from. Runs are shorter here, and score the last 20 of
50 cycles. And a filter may assume model noise that the truth does not have, N(f(x), s^2) in each value. `FAAPF` needs
it, because its guided draws do not move without; for the others it is an additive inflation. The radius of the taper
(in points), s and a factor on the anomalies were chosen for each filter on another truth; `--tune --truths 1` prints
the table of that choice. Assumed, because only the code states it: the domain, the spin-up and the score; and that the
newest version of the code has the setting of the paper's tables.

    python examples/benchmarks/kuramoto_sivashinsky.py --out kuramoto_sivashinsky.json
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro.contrib.control_flow import scan
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda

POINTS = 1024
LENGTH = 128.0 * math.pi
STEP = 0.25
STEPS = 4
ERROR = 0.1
FIRST_SPREAD = 1.0
SPIN_UPS = (600, 2000)
"""Time steps before and after the truth gets white noise with `FIRST_SPREAD`."""
TUNING_SEED = 1
NO_NOISE = 1e-6
"""Standard deviation of the transition of filters without model noise, near the last digit in single precision."""


@functools.cache
def coefficients(points: int) -> dict[str, np.ndarray]:
    """Coefficients of the exponential time differencing for each wave of a real Fourier transform.

    They are combinations of phi_1(z) = (exp(z) - 1) / z and phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z at z = h L, with the
    time step h and the linear operator L. The mean over a circle around z avoids their cancellation near 0.
    """
    wave = 2.0 * np.pi * np.fft.rfftfreq(points, LENGTH / points)
    wave[-1] = 0.0
    z = STEP * (wave**2 - wave**4)

    def phis(z: np.ndarray) -> list[np.ndarray]:
        around = z[:, None] + np.exp(1j * np.pi * (np.arange(32) + 0.5) / 32)
        first = (np.exp(around) - 1.0) / around
        second = (first - 1.0) / around
        return [each.real.mean(1) for each in (first, second, (second - 0.5) / around)]

    one, two, three = phis(z)
    found = {
        "decay": np.exp(z),
        "half decay": np.exp(z / 2.0),
        "half": STEP / 2.0 * phis(z / 2.0)[0],
        "first": STEP * (one - 3.0 * two + 4.0 * three),
        "middle": STEP * (2.0 * two - 4.0 * three),
        "last": STEP * (4.0 * three - two),
    }
    return {name: each.astype(np.float32) for name, each in found.items()} | {
        "advection": (-0.5j * wave).astype(np.complex64)
    }


def flow(u: Float[Array, " d"], steps: int = STEPS) -> Float[Array, " d"]:
    """State after some time steps; by default at the next observation time."""
    c, points = coefficients(len(u)), len(u)

    def advected(v: Array) -> Array:
        return c["advection"] * jnp.fft.rfft(jnp.fft.irfft(v, points) ** 2)

    def step(_: int, v: Array) -> Array:
        here = advected(v)
        a = c["half decay"] * v + c["half"] * here
        at_a = advected(a)
        at_b = advected(c["half decay"] * v + c["half"] * at_a)
        at_end = advected(c["half decay"] * a + c["half"] * (2.0 * at_b - here))
        return c["decay"] * v + c["first"] * here + c["middle"] * (at_a + at_b) + c["last"] * at_end

    return jnp.fft.irfft(jax.lax.fori_loop(0, steps, step, jnp.fft.rfft(u)), points)


def model(y: Float[Array, "t d"], start: Float[Array, " d"], noise: ArrayLike) -> None:
    """State-space model of observations `y` after a state `start`, with model noise."""

    def step(x: Array, y_t: Array) -> tuple[Array, None]:
        x = numpyro.sample("x", dist.Normal(flow(x), noise).to_event(1))
        numpyro.sample("y", dist.Normal(jnp.arctan(x), ERROR).to_event(1), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(start, FIRST_SPREAD).to_event(1)), y)


@functools.partial(jax.jit, static_argnums=(1, 2))
def simulate(rng_key: PRNGKeyArray, points: int, cycles: int) -> tuple[Array, Array, Array]:
    """Draw the state before the first observation, shape (d,), the states and the observations, shape (cycles, d)."""
    wave_key, error_key = jax.random.split(rng_key)
    x = LENGTH / points * jnp.arange(1, points + 1)
    u = flow(jnp.cos(x / 16.0) * (1.0 + jnp.sin(x / 16.0)), SPIN_UPS[0])
    start = flow(u + FIRST_SPREAD * jax.random.normal(wave_key, (points,)), SPIN_UPS[1])

    def step(u: Array, _: None) -> tuple[Array, Array]:
        u = flow(u)
        return u, u

    states = jax.lax.scan(step, start, length=cycles)[1]
    return start, states, jnp.arctan(states) + ERROR * jax.random.normal(error_key, states.shape)


class Setting(NamedTuple):
    """Settings of a filter.

    Attributes:
        radius: half-width of the taper in points.
        noise: standard deviation s of the model noise; None for none.
        factor: factor on the anomalies of the forecast (`ForecastMultiplicative`), or for `FAAPF` on those of the
            analysis (`Multiplicative`).
    """

    radius: float
    noise: float | None = None
    factor: float = 1.0


# Lowest CRPS of `GRID` on one truth (`--tune --truths 1`). The square root and "EnKF with V" leave out noise, or a
# factor, that lowers it by less than 0.5 %.
TUNED: dict[str, Setting | None] = {
    "FA-APF, moved": Setting(24.0, 0.001, 1.02),
    "FA-APF, local": Setting(4.0, 0.03),
    "EnKF": Setting(32.0, 0.003),
    "EnKF with V": Setting(32.0, 0.003),
    "EnKF, square root": Setting(32.0),
    "free ensemble": None,
}
ENSEMBLE_GRID = [Setting(r) for r in (12.0, 16.0, 24.0, 32.0, 48.0)]
ENSEMBLE_GRID += [Setting(24.0, 0.001), Setting(24.0, 0.003), Setting(24.0, None, 1.02)]
GRID: dict[str, list[Setting]] = {
    "FA-APF, moved": [
        *[Setting(r, 0.003) for r in (8.0, 12.0, 16.0, 24.0, 32.0)],
        *[Setting(16.0, 0.001), Setting(16.0, 0.01), Setting(32.0, 0.001)],
        *[Setting(24.0, 0.001, 1.02), Setting(32.0, 0.001, 1.02), Setting(32.0, 0.003, 1.02)],
    ],
    "FA-APF, local": [Setting(4.0, 0.01), Setting(4.0, 0.03), Setting(4.0, 0.1), Setting(8.0, 0.1)],
    "EnKF": [*ENSEMBLE_GRID, Setting(32.0, 0.003), Setting(24.0, 0.003, 1.02), Setting(32.0, None, 1.04)],
    "EnKF with V": [
        *[Setting(r, 0.003) for r in (16.0, 24.0, 32.0)],
        *[Setting(24.0, 0.001), Setting(24.0, 0.003, 1.02), Setting(32.0, 0.003, 1.02)],
    ],
    "EnKF, square root": [*ENSEMBLE_GRID, Setting(32.0, 0.001), Setting(40.0)],
}


@functools.cache
def prepared(name: str, radius: float | None, factor: float, particles: int, points: int) -> ndda.Filter:
    """Filter of the given name; the same for every model noise, so that it is compiled once."""
    if radius is None:
        return ndda.Filter(ndda.Bootstrap(model), num_particles=particles, progress_bar=False, keep_observed=False)
    places = np.arange(points)
    taper = ndda.Taper(radius, ndda.Ring(points), {"y": places}, state=places)
    inflation = (ndda.ForecastMultiplicative(factor),)
    algorithm: ndda.filters.FilterAlgorithm
    if name.startswith("FA-APF"):
        # The covariance of the transition is diagonal, so one product with random signs finds its diagonal exactly.
        weight = ndda.Moment(probes=1)
        widened = () if factor == 1.0 else (ndda.Multiplicative(factor),)
        move = name == "FA-APF, moved"
        algorithm = ndda.FAAPF(model, weight=weight, taper=taper, inflation=widened, move=move)
    elif name == "EnKF, square root":
        algorithm = ndda.EnKF(model, taper=taper, inflation=inflation, update=ndda.smc.SquareRoot())
    else:
        given = name == "EnKF with V"
        algorithm = ndda.EnKF(model, taper=taper, inflation=inflation, transition_covariance=given)
    return ndda.Filter(algorithm, num_particles=particles, progress_bar=False, keep_observed=False)


def row_of(
    name: str, setting: Setting | None, *,
    seed: int, truths: int, particles: int, cycles: int, spin_up: int, points: int,
) -> dict[str, Any]:  # fmt: skip
    """Row of the table: means over truths with standard errors."""
    radius, noise, factor = (None, None, 1.0) if setting is None else setting
    run = prepared(name, radius, factor, particles, points)
    scores, lost = [], 0
    for number in range(truths):
        truth_key, filter_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        start, states, y = simulate(truth_key, points, cycles)
        given = jnp.full_like(y, jnp.nan) if setting is None else y
        try:
            run.run(filter_key, given, start, jnp.float32(NO_NOISE if noise is None else noise))
        except FloatingPointError:
            lost += 1
            continue
        x, truth = run.result.posterior["x"][0, :, spin_up:], np.asarray(states[spin_up:])
        scores.append(
            {
                # As EnFF has it: root mean square over the points at each time, and the mean over times.
                "RMSE": float(np.sqrt(np.mean((x.mean(0) - truth) ** 2, axis=-1)).mean()),
                "spread/skill": ndda.diagnostics.spread_skill(x, truth),
                "CRPS": ndda.diagnostics.crps(x, truth),
                "lambda": float(np.mean(run.result.sample_stats.get("selection_share", np.nan))),
            }
        )
    row: dict[str, Any] = {"filter": name, "lost": lost, "radius": radius, "noise": noise, "factor": factor}
    for key in ("RMSE", "spread/skill", "CRPS", "lambda"):
        row |= mean_and_error(key, [score[key] for score in scores])
    return row


COLUMNS = {
    "filter": "", "radius": "g", "noise": "g", "factor": "g", "RMSE": ".4f", "spread/skill": ".2f", "CRPS": ".5f",
    "lambda": ".2f", "lost": "",
}  # fmt: skip


def main(
    only: Annotated[list[str] | None, typer.Option(help="Filter to run; may be repeated; all by default.")] = None,
    truths: Annotated[int, typer.Option(min=1, help="Number of truths.")] = 4,
    particles: Annotated[int, typer.Option(min=2, help="Members of each filter.")] = 20,
    cycles: Annotated[int, typer.Option(min=1, help="Observation times of each truth.")] = 50,
    spin_up: Annotated[int, typer.Option(min=0, help="Observation times at the start that are not scored.")] = 30,
    points: Annotated[int, typer.Option(min=512, help="Points on the circle; EnFF also has 512.")] = POINTS,
    tune: Annotated[bool, typer.Option(help="Run the grid of settings on the tuning truths instead.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the truths reported.")] = 0,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print scores of localized filters on the Kuramoto-Sivashinsky equation."""
    console = Console(width=120)
    if unknown := sorted(set(only or ()) - set(TUNED)):
        raise typer.BadParameter(f"no filter called {', '.join(unknown)}; give one of {', '.join(TUNED)}.")
    if not spin_up < cycles:
        raise typer.BadParameter(f"a spin-up of {spin_up} of {cycles} cycles leaves none to score; give fewer.")
    names = [name for name in TUNED if name in (only or TUNED)]
    work: list[tuple[str, Setting | None]] = [(name, TUNED[name]) for name in names]
    if tune:
        work = [(name, setting) for name in names for setting in GRID.get(name, [])]
    sizes = {"truths": truths, "particles": particles, "cycles": cycles, "spin_up": spin_up, "points": points}
    rows = []
    for name, setting in track(work, "filtering", console=console, transient=True):
        rows.append(row_of(name, setting, seed=TUNING_SEED if tune else seed, **sizes))
        # Write after every row, so that an interrupted run keeps what it has.
        write_json(out, {**sizes, "tune": tune, "seed": seed}, rows=rows)
    title = f"{points} points, N = {particles}, {truths} truths of {cycles} cycles; mean ± standard error"
    print_table(console, title, rows, COLUMNS)


if __name__ == "__main__":
    typer.run(main)
