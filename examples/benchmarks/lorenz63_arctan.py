"""How far from the optimum are filters on the Lorenz-63 that SDA, FlowDAS and SURGE report?

Rozet & Louppe (2023) made the setting, and FlowDAS (Chen et al. 2025, github.com/umjiayx/FlowDAS) and SURGE (Wei et al.
2026) compare methods on it. The script follows the code of FlowDAS. States are those of Lorenz-63 minus (0, 0, 25),
over (8, 9, 8.6). A step is one Runge-Kutta step of 0.025, plus noise of variance 0.025 in each component before the
scaling. At each step the arctangent of the first scaled component is observed, with an error of 0.25. A trajectory has
15 steps from a known state. 64 trajectories start after 1024 steps from a wide Gaussian.

Here each filter has the true transition, so there is nothing to train and no inflation to tune. A bootstrap filter with
many particles gives the optimum. RMSE is the root mean square over the steps and components of one trajectory, in
scaled units; NRMSE divides it by the root mean square of the truth, as FlowDAS does. "one draw" is the expected RMSE of
one particle instead of their mean.

    python examples/benchmarks/lorenz63_arctan.py --out lorenz63_arctan.json
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.contrib.control_flow import scan
from published_settings import Setting, lorenz63, moments
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.smc import particle_keys

STEP = 0.025
ERROR = 0.25
STEPS = 15
SPIN_UP = 1024
CENTER = np.array([0.0, 0.0, 25.0], np.float32)
SCALE = np.array([8.0, 9.0, 8.6], np.float32)
FIRST_COVARIANCE = np.array([[64.0, 50.0, 0.0], [50.0, 81.0, 0.0], [0.0, 0.0, 75.0]])
KNOWN = 1e-6
"""Standard deviation of a state that is known, near the last digit in single precision."""

ALGORITHMS: dict[str, Callable[..., ndda.filters.FilterAlgorithm]] = {
    "FA-APF": ndda.FAAPF,
    "FA-APF, moved": functools.partial(ndda.FAAPF, move=True),
    "EnKF": ndda.EnKF,
    "EnKF with V": functools.partial(ndda.EnKF, transition_covariance=True),
    "bootstrap": ndda.Bootstrap,
}
OPTIMUM = "optimum"


def transition(x: Float[Array, " 3"]) -> dist.Distribution:
    """Distribution of the next scaled state."""
    flow = Setting(lorenz63, STEP, 1, (), 0.0, 1, 0.0, 0, 0).flow
    return dist.Normal((flow(CENTER + SCALE * x) - CENTER) / SCALE, STEP**0.5 / SCALE).to_event(1)


def program(start: Float[Array, " 3"]) -> Callable[[Array], None]:
    """State-space model of the observations after a known state."""

    def model(y: Array) -> None:
        def step(x: Array, y_t: Array) -> tuple[Array, None]:
            x = numpyro.sample("x", transition(x))
            numpyro.sample("y", dist.Normal(jnp.arctan(x[:1]), ERROR).to_event(1), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(start, KNOWN).to_event(1)), y)

    return model


def simulate(rng_key: PRNGKeyArray) -> tuple[Array, Array, Array]:
    """Draw the known state, shape (3,), the states after it, shape (t, 3), and the observations, shape (t, 1)."""
    start_key, run_key, error_key = jax.random.split(rng_key, 3)
    first = dist.MultivariateNormal(CENTER, jnp.array(FIRST_COVARIANCE)).sample(start_key)

    def step(x: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        x = transition(x).sample(key)
        return x, x

    _, states = jax.lax.scan(step, (first - CENTER) / SCALE, jax.random.split(run_key, SPIN_UP + STEPS))
    start, states = states[SPIN_UP - 1], states[SPIN_UP:]
    return start, states, jnp.arctan(states[:, :1]) + ERROR * jax.random.normal(error_key, (STEPS, 1))


def row_of(name: str, particles: int, seed: int, trajectories: int) -> dict[str, Any]:
    """Scores of a filter on each trajectory."""
    truth_key, filter_key = jax.random.split(jax.random.key(seed))
    start, states, y = jax.vmap(simulate)(particle_keys(truth_key, trajectories))
    make = ALGORITHMS["bootstrap" if name == OPTIMUM else name]

    @jax.jit
    def run(given: tuple[PRNGKeyArray, Array, Array]) -> tuple[Array, Array]:
        key, start, y = given
        return moments(make(program(start)), particles, key, y)

    each = (particle_keys(filter_key, trajectories), start, y)
    mean, variance = jax.lax.map(run, each, batch_size=max(1, min(trajectories, 20_000 // particles)))
    squared = np.asarray((mean - states) ** 2)
    rmse = np.sqrt(squared.mean((1, 2)))
    return {
        "filter": name,
        "N": particles,
        "RMSE": rmse.tolist(),
        "NRMSE": (rmse / np.sqrt(np.mean(np.asarray(states) ** 2, axis=(1, 2)))).tolist(),
        "one draw": np.sqrt((squared + variance).mean((1, 2))).tolist(),
        "spread/skill": float(np.sqrt(np.mean(variance) / squared.mean())),
    }


COLUMNS = {
    "filter": "", "N": "", "RMSE": ".4f", "above the optimum, %": "+.1f", "NRMSE": ".4f", "one draw": ".4f",
    "spread/skill": ".2f",
}  # fmt: skip


def summarized(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table: means over trajectories, and differences of RMSE to the optimum on the same trajectories."""
    best = next((np.array(row["RMSE"]) for row in rows if row["filter"] == OPTIMUM), None)
    found = []
    for row in rows:
        shown = dict(row)
        for key in ("RMSE", "NRMSE", "one draw"):
            shown |= mean_and_error(key, row[key])
        if best is not None and row["filter"] != OPTIMUM:
            shown |= mean_and_error("above the optimum, %", 100 * (np.array(row["RMSE"]) - best) / best.mean())
        found.append(shown)
    return found


def main(
    particles: Annotated[list[int] | None, typer.Option(help="Particles; may be repeated; 64 and 256.", min=2)] = None,
    many: Annotated[int, typer.Option(help="Particles of the bootstrap filter for the optimum.", min=2)] = 100_000,
    trajectories: Annotated[int, typer.Option(help="Number of trajectories.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Seed of trajectories and filters.")] = 0,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the scores to.")] = None,
) -> None:
    """Print scores of filters with the true transition, and of the optimum."""
    console = Console(width=120)
    work = [(OPTIMUM, many)] + [(name, n) for n in particles or (64, 256) for name in ALGORITHMS]
    rows = []
    for name, n in track(work, "filtering", console=console, transient=True):
        rows.append(row_of(name, n, seed, trajectories))
        write_json(out, {"many": many, "trajectories": trajectories, "seed": seed}, rows=rows)
    print_table(console, f"{trajectories} trajectories, mean ± standard error over them", summarized(rows), COLUMNS)


if __name__ == "__main__":
    typer.run(main)
