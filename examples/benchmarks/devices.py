"""What moves between devices? Bytes that a step of a sharded filter moves, beside what no exchange can save.

The particles of stochastic Lorenz-96 (F = 8, 40 sites, step 0.1, noise variance 0.5, every second site observed with an
error variance of 0.1) are sharded over virtual devices of one processor (`Filter(..., mesh=...)`). "needed" counts the
ancestors that new particles have on a device which does not hold them: the bound. "moved" is what the collectives
carry, in particles of 160 bytes; "all" is what they would carry if every device got every particle. "slots kept" is
what would be needed if each selected particle kept its slot, as it does with a taper. "gathered" are the bytes of
everything else: weights, predicted observations, and for the EnKF the ensemble. Numbers are means over steps, summed
over devices.

    python examples/benchmarks/devices.py --out devices.json
    python examples/benchmarks/devices.py --filter FAAPF --particles 1024 --devices 8
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from numpyro.contrib.control_flow import scan
from report import json_file, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96

SITES, NOISE, ERROR = 40, 0.5, 0.1
PARTICLE = 4 * SITES
"""Bytes of one particle."""


def model(y: Any) -> None:
    """Stochastic Lorenz-96, observed at every second site."""

    def body(x: Any, y_t: Any) -> tuple[Any, None]:
        x = numpyro.sample("x", dist.Normal(lorenz96.flow(x), NOISE**0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x[::2], ERROR**0.5).to_event(1), obs=y_t)
        return x, None

    scan(body, numpyro.sample("x0", dist.Normal(jnp.zeros(SITES), 3.0).to_event(1)), y)


def taper() -> ndda.Taper:
    """Localization on the ring of sites."""
    places = np.arange(float(SITES))[:, None]
    return ndda.Taper(5.0, ndda.Ring(float(SITES)), {"y": places[::2]}, state=places)


FILTERS: dict[str, Callable[[], ndda.filters.FilterAlgorithm]] = {
    "FAAPF": lambda: ndda.FAAPF(model),
    "FAAPF, local": lambda: ndda.FAAPF(model, taper=taper(), move=False),
    "FAAPF, moved": lambda: ndda.FAAPF(model, taper=taper()),
    "EnKF": lambda: ndda.EnKF(model),
}


def observations(steps: int) -> np.ndarray:
    """Observations of one truth."""
    rng = np.random.default_rng(0)
    x, found = rng.normal(size=SITES) * 3.0, []
    for _ in range(steps):
        x = np.asarray(lorenz96.flow(jnp.asarray(x, jnp.float32))) + NOISE**0.5 * rng.normal(size=SITES)
        found.append(x[::2] + ERROR**0.5 * rng.normal(size=SITES // 2))
    return np.asarray(found, np.float32)


def needed_if_kept(ancestors: np.ndarray, devices: int) -> int:
    """Number of ancestors that devices lack, each once for each device, if selected particles kept their slots."""
    n = len(ancestors)
    share, counts = n // devices, np.bincount(ancestors, minlength=n)
    kept = np.arange(n)
    kept[counts == 0] = np.repeat(np.arange(n), np.maximum(counts - 1, 0))
    return sum(int(np.sum(np.unique(kept[d * share : (d + 1) * share]) // share != d)) for d in range(devices))


def row(name: str, particles: int, devices: int, y: np.ndarray) -> dict[str, Any]:
    """Traffic of one run."""
    mesh = jax.make_mesh((devices,), ("particles",), devices=jax.devices()[:devices])
    run = ndda.Filter(FILTERS[name](), num_particles=particles, mesh=mesh, keep_observed=False, progress_bar=False)
    run.run(jax.random.key(0), y)
    stats = run.result.sample_stats
    ancestors = stats["ancestors"][0].T  # by time
    kept = [needed_if_kept(of_step, devices) for of_step in ancestors] if ancestors.ndim == 2 else None
    moved, needed, gathered = (float(stats[f"bytes_{n}"].mean()) for n in ("moved", "needed", "gathered"))
    return {
        "filter": name,
        "N": particles,
        "devices": devices,
        "ESS / N": float(stats["ess"].mean()) / particles,
        "needed": needed / PARTICLE,
        "moved": moved / PARTICLE,
        "all": particles * (devices - 1),
        "slots kept": None if kept is None else float(np.mean(kept)),
        "gathered": gathered,
    }


def main(
    filter_: Annotated[list[str] | None, typer.Option("--filter", help="Filter to run; may be repeated.")] = None,
    particles: Annotated[list[int] | None, typer.Option(help="Number of particles; may be repeated.")] = None,
    devices: Annotated[list[int] | None, typer.Option(help="Number of devices, 1 to 8; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps.")] = 20,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print what moves between devices in a step."""
    names, numbers, meshes = filter_ or list(FILTERS), particles or [64, 256, 1024, 4096], devices or [2, 8]
    if unknown := sorted(set(names) - set(FILTERS)):
        raise typer.BadParameter(f"unknown filters {unknown}; give some of {sorted(FILTERS)}.")
    if (most := max(meshes)) > jax.device_count():
        raise typer.BadParameter(f"{most} devices asked for, and JAX has {jax.device_count()}; give at most that.")
    y, console = observations(steps), Console()
    cases = [(name, n, d) for name in names for d in meshes for n in numbers]
    rows = [row(*case, y) for case in track(cases, "runs", console=Console(stderr=True))]
    columns = {"filter": "", "devices": "", "N": "", "ESS / N": ".2f", "needed": ".1f", "moved": ".1f", "all": ""}
    columns |= {"slots kept": ".1f", "gathered": ".0f"}
    print_table(console, "Particles per step", rows, columns, group="filter")
    write_json(out, {"steps": steps}, rows=rows)


if __name__ == "__main__":
    typer.run(main)
