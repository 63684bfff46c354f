"""What does the analysis of a large local filter cost beside its network, before any network runs?

The grid has 181 x 360 places, and 80 000 observations are at random places of the sphere. The table has the processor
seconds of each part: the search of near observations, fixed and in the compiled step, the partition into blocks, and
selection and gluing of local ancestors with random log-likelihoods and states of a few channels. A grid with more
channels glues more values, and everything else is the same.

    python examples/benchmarks/large_local.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from report import json_file, print_table, write_json
from rich.console import Console

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.smc import LocalAncestors, PlacedTaper


def spent(fn: Callable[[], Any]) -> float:
    """Processor seconds of a function, on all cores together."""
    began = time.process_time()
    jax.block_until_ready(fn())
    return time.process_time() - began


def main(
    latitudes: Annotated[int, typer.Option(min=2, help="Rows of the grid, poles included.")] = 181,
    longitudes: Annotated[int, typer.Option(min=2, help="Columns of the grid.")] = 360,
    observations: Annotated[int, typer.Option(min=1, help="Number of observations.")] = 80_000,
    members: Annotated[int, typer.Option(min=2, help="Number of particles.")] = 64,
    channels: Annotated[int, typer.Option(min=1, help="Channels of a state.")] = 4,
    radius: Annotated[float, typer.Option(help="Half-width of the taper in km.")] = 300.0,
    block: Annotated[float, typer.Option(help="Radius of a block in km.")] = 250.0,
    most_near: Annotated[int, typer.Option(min=1, help="Room for observations near a block that moves.")] = 512,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print the processor seconds of each part."""
    rng = np.random.default_rng(0)
    rows, columns = np.linspace(-90.0, 90.0, latitudes), 360.0 / longitudes * np.arange(longitudes)
    points = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    places = np.stack(
        [np.rad2deg(np.arcsin(rng.uniform(-1.0, 1.0, observations))), rng.uniform(0.0, 360.0, observations)], axis=-1
    )
    radii, distance = np.full(observations, radius), ndda.GreatCircle()
    taper = PlacedTaper(radii, distance, points, places, most_near=most_near)
    found: list[dict[str, Any]] = []

    def add(part: str, fn: Callable[[], Any], each: str) -> None:
        found.append({"part": part, "CPU s": spent(fn), "": each})

    add(f"observations near each of {len(points)} places, fixed", taper.neighborhoods, "once")
    add(f"blocks of {block:g} km", lambda: taper.blocks(block), "once")
    local = LocalAncestors.at(taper, (latitudes, longitudes, channels), block)
    add(f"observations near each of {len(local.centers)} blocks, fixed", lambda: local.neighborhoods, "once")
    searched = jax.jit(lambda at: PlacedTaper(radii, distance, points, at, most_near=most_near).neighborhoods(points))
    moving = jnp.asarray(places, jnp.float32)
    jax.block_until_ready(searched(moving))
    add("observations near each place, in the step", lambda: searched(moving), "each step")
    predictive = jnp.asarray(rng.normal(size=(members, observations)), jnp.float32)
    select = jax.jit(lambda key, log_likelihood: local.select(key, log_likelihood, None, 0.5))
    key = jax.random.key(0)
    _, ancestors, _ = jax.block_until_ready(select(key, predictive))
    add("weights, tempering and ancestors of the blocks", lambda: select(key, predictive), "each step")
    states = jnp.zeros((members, latitudes, longitudes, channels))
    glue = jax.jit(local.glue)
    jax.block_until_ready(glue(states, ancestors))
    add(f"gluing of states with {channels} channels", lambda: glue(states, ancestors), "each step")
    title = f"{len(points)} places, {observations} observations, {members} particles, half-width {radius:g} km"
    print_table(Console(), title, found, default=".1f")
    sizes = {"places": len(points), "observations": observations, "members": members, "channels": channels}
    write_json(out, {**sizes, "radius": radius, "block": block}, rows=found)


if __name__ == "__main__":
    typer.run(main)
