"""What does a taper need if observations move? A ring of sites, a linear Gaussian system, and new places at each step.

The state on the ring is advected by one site per step, damped, and gets noise that is correlated over a few sites. At
each step 8 random sites are observed. The filters are an ensemble Kalman filter and FA-APF

- without a taper,
- with a taper at the places of the first step, which is wrong at all other steps,
- with a taper at the places of each step, which the program names: `Taper(4.0, Ring(60), {"y": "y_place"})`,

and the exact Kalman filter.

    python examples/benchmarks/moving_observations.py --out moving.json
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

DAMPING = 0.95
NOISE = 0.5
RANGE = 3.0
ERROR = 0.5


class System(NamedTuple):
    """Linear Gaussian system x' = A x + N(0, Q) on a ring, of which a few sites are observed with an error.

    Attributes:
        transition: A, shape (sites, sites).
        covariance: Q, of the same shape.
    """

    transition: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def on_ring(sites: int) -> System:
        """System on a ring of a number of sites."""
        apart = ndda.Ring(sites)(np.arange(sites)[:, None], np.arange(sites)[:, None])
        return System(DAMPING * np.roll(np.eye(sites), 1, axis=0), NOISE**2 * np.exp(-apart / RANGE))

    def climate(self) -> np.ndarray:
        """Covariance of the stationary distribution; Q commutes with the shift of the ring."""
        return self.covariance / (1.0 - DAMPING**2)

    def simulate(self, seed: int, steps: int, observed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Simulate the states, shape (steps, sites), and the inputs of the program's scan."""
        rng = np.random.default_rng(seed)
        sites = len(self.transition)
        root = np.linalg.cholesky(self.covariance)
        x = np.linalg.cholesky(self.climate()) @ rng.normal(size=sites)
        states, places, values = [], [], []
        for _ in range(steps):
            x = self.transition @ x + root @ rng.normal(size=sites)
            place = rng.choice(sites, observed, replace=False)
            states.append(x)
            places.append(place)
            values.append(x[place] + ERROR * rng.normal(size=observed))
        return np.array(states), {"y": np.array(values, np.float32), "place": np.array(places, np.int32)}

    def program(self) -> Callable[..., None]:
        """NumPyro program of the system; its places are inputs of the scan, and the site "y_place" records them."""
        transition = jnp.asarray(self.transition, jnp.float32)
        covariance, climate = (jnp.asarray(c, jnp.float32) for c in (self.covariance, self.climate()))
        sites = len(self.transition)

        def model(inputs: dict[str, Any]) -> None:
            x0 = numpyro.sample("x0", dist.MultivariateNormal(jnp.zeros(sites), climate))

            def step(x: jax.Array, at: dict[str, jax.Array]) -> tuple[jax.Array, None]:
                x = numpyro.sample("x", dist.MultivariateNormal(transition @ x, covariance))
                place = numpyro.deterministic("y_place", at["place"])
                numpyro.sample("y", dist.Normal(x[place], ERROR).to_event(1), obs=at["y"])
                return x, None

            scan(step, x0, inputs)

        return model

    def kalman_means(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Means of the exact filter, shape (steps, sites)."""
        sites = len(self.transition)
        mean, spread, means = np.zeros(sites), self.climate(), []
        for value, place in zip(inputs["y"], inputs["place"], strict=True):
            mean, spread = self.transition @ mean, self.transition @ spread @ self.transition.T + self.covariance
            gain = np.linalg.solve(spread[np.ix_(place, place)] + ERROR**2 * np.eye(len(place)), spread[place]).T
            mean, spread = mean + gain @ (value - mean[place]), spread - gain @ spread[place]
            means.append(mean)
        return np.array(means)


EXACT = "exact Kalman filter"
FILTERS: dict[str, Callable[[Callable[..., None], ndda.Taper | None], Any]] = {
    "EnKF, square root": lambda model, taper: ndda.EnKF(model, update=ndda.smc.SquareRoot(), taper=taper),
    "EnKF, perturbed observations": lambda model, taper: ndda.EnKF(model, taper=taper),
    "FA-APF": lambda model, taper: ndda.FAAPF(model, taper=taper, move=False),
}
"""Filter by name, as a function of the program and its taper."""

PLACES = ("no taper", "first step's", "each step's")


def scores(states: np.ndarray, means: np.ndarray, spin_up: int) -> float:
    """RMSE of means after the spin-up, over steps and sites."""
    return float(np.sqrt(np.mean((means - states)[spin_up:] ** 2)))


def run(
    name: str, kind: str, *, sites: int, observed: int, radius: float, particles: int, truths: list[int], steps: int,
    spin_up: int,
) -> dict[str, Any]:  # fmt: skip
    """Row of the table: one filter with one kind of places, on several truths."""
    system = System.on_ring(sites)
    model, errors, spreads, run = system.program(), [], [], None
    for seed in truths:
        states, inputs = system.simulate(seed, steps, observed)
        if name == EXACT:
            errors.append(scores(states, system.kalman_means(inputs), spin_up))
            continue
        if run is None or kind == "first step's":
            places = {"first step's": inputs["place"][0], "each step's": "y_place"}.get(kind)
            taper = None
            if places is not None:
                taper = ndda.Taper(radius, ndda.Ring(sites), {"y": places}, state=np.arange(sites))
            run = ndda.Filter(
                FILTERS[name](model, taper), num_particles=particles, progress_bar=False, keep_observed=False
            )
        run.run(jax.random.key(seed), inputs)
        x = run.result.posterior["x"][0]
        errors.append(scores(states, x.mean(0), spin_up))
        spreads.append(float(np.sqrt(x[:, spin_up:].var(0, ddof=1).mean())) / errors[-1])
    return {
        "filter": name,
        "places": kind,
        **mean_and_error("RMSE", errors),
        **(mean_and_error("spread/skill", spreads) if spreads else {}),
    }


def main(
    sites: Annotated[int, typer.Option(min=2, help="Number of sites of the ring.")] = 60,
    observed: Annotated[int, typer.Option(min=1, help="Sites observed at each step.")] = 8,
    radius: Annotated[float, typer.Option(help="Half-width of the taper, in sites.")] = 4.0,
    particles: Annotated[int, typer.Option(min=2, help="Particles of each filter.")] = 64,
    truths: Annotated[int, typer.Option(min=1, help="Number of truths.")] = 8,
    steps: Annotated[int, typer.Option(min=2, help="Filter steps on each truth.")] = 200,
    spin_up: Annotated[int, typer.Option(min=0, help="Filter steps at the start that are not scored.")] = 20,
    only: Annotated[list[str] | None, typer.Option(help="Filter to run; may be repeated; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first truth.")] = 0,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print the errors of filters with places that are absent, fixed, or those of each step."""
    console = Console(width=120)
    if unknown := sorted(set(only or ()) - set(FILTERS)):
        raise typer.BadParameter(f"no filter called {', '.join(unknown)}; give one of {', '.join(FILTERS)}.")
    if not spin_up < steps:
        raise typer.BadParameter(f"a spin-up of {spin_up} of {steps} steps leaves none to score; give fewer.")
    sizes = {"sites": sites, "observed": observed, "radius": radius, "particles": particles, "steps": steps}
    work = [(EXACT, "-"), *((name, kind) for name in only or FILTERS for kind in PLACES)]
    rows: list[dict[str, Any]] = []
    for name, kind in track(work, "filtering", console=console, transient=True):
        rows.append(run(name, kind, **sizes, spin_up=spin_up, truths=[seed + i for i in range(truths)]))
        write_json(out, {**sizes, "spin_up": spin_up, "truths": truths, "seed": seed}, rows=rows)
    title = f"ring of {sites}, {observed} observations at new places, N = {particles}, {truths} truths; mean ± SE"
    print_table(console, title, rows, {"filter": "", "places": "", "RMSE": "", "spread/skill": ""}, group="filter")


if __name__ == "__main__":
    typer.run(main)
