"""How long does it take from `run` to the first finished step, with and without a cache of compiled programs?

Each row is the median over new processes that run one step of the Lorenz-96 program, 20 of 40 sites observed. A process
without a cache traces and compiles the step. One with a filled cache traces it and reads what another has compiled.

    python examples/benchmarks/first_step.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from report import json_file, print_table, write_json
from rich.console import Console

PROGRAM = """
import sys, time
import jax, numpy as np, numpyro, numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
import numpyro_diffusion_da as ndda

name, particles, cache = sys.argv[1:]
if cache:
    ndda.inference.cache_compiled(cache)
prior = ndda.load_prior("lorenz96")


def model(y):
    def step(x, y_t):
        x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
        numpyro.sample("y", dist.Normal(x[::2], 0.5).to_event(1), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", prior.climatology()), y)


run = ndda.Filter(getattr(ndda, name)(model), num_particles=int(particles), progress_bar=False)
began = time.perf_counter()
run.run(jax.random.key(0), np.zeros((1, 20), np.float32))
print(time.perf_counter() - began)
"""


def seconds(name: str, particles: int, cache: str) -> float:
    """Seconds of the first step in a new process.

    Args:
        name: name of the filter.
        particles: number of particles.
        cache: directory of the cache; "" for none.
    """
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, name, str(particles), cache]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(
    filters: Annotated[list[str] | None, typer.Option(help="Filter; may be repeated [FAAPF, Bootstrap].")] = None,
    particles: Annotated[int, typer.Option(min=2, help="Number of particles.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="New processes for each number.")] = 3,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print the median seconds to the first finished step."""
    rows = []
    for name in filters or ["FAAPF", "Bootstrap"]:
        with tempfile.TemporaryDirectory() as cache:
            without = statistics.median(seconds(name, particles, "") for _ in range(repeats))
            seconds(name, particles, cache)  # fills the cache
            filled = statistics.median(seconds(name, particles, cache) for _ in range(repeats))
        rows.append({"filter": name, "no cache, s": without, "filled cache, s": filled})
    print_table(Console(), f"first step, {particles} particles, medians of {repeats} processes", rows, default=".1f")
    write_json(out, {"particles": particles, "repeats": repeats}, rows=rows)


if __name__ == "__main__":
    typer.run(main)
