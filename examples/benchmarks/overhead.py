"""What does a run take beside its network passes, and how does that grow with the particles?

A whole `Filter.run` of FA-APF with a shipped emulator, compiled before, is timed per particle and step. Beside it
stands the time of its network passes: the number of passes of each kind that the run counted, times the time of one
such pass for all particles in a loop that is compiled by itself. "ratio" is the first over the second, the median over
turns. The run counts tracing, checks, selection, the record of all sites, and what the result holds.

    python examples/benchmarks/overhead.py --emulator lorenz96
    python examples/benchmarks/overhead.py --emulator held_suarez --particles 64 --steps 4
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from jaxtyping import Array
from numpyro.contrib.control_flow import scan
from report import json_file, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda

ERROR = 10.0
"""Standard deviation of the observation error, so large that states of the climate are no surprise."""

PRODUCTS = 2
"""Products with the Jacobian at each noise level, that the cheap guidance makes."""

LOOP = 16
"""Noise levels in a loop that measures passes."""


def seen(x: Array) -> Array:
    """At most 100 values of a state, evenly spread."""
    return x.reshape(-1)[:: max(2, x.size // 100)]


def run_of(
    prior: ndda.DiffusionPrior, climate: dist.Distribution, particles: int, batch: int | None, steps: int
) -> Callable[[], ndda.FilterResult]:
    """Whole run of FA-APF, and its result."""

    def model(y: Array) -> None:
        def step(x: Array, y_t: Array) -> tuple[Array, None]:
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
            numpyro.sample("y", dist.Normal(seen(x), ERROR).to_event(1), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x0", climate), y)

    run = ndda.Filter(
        ndda.FAAPF(model, guidance=ndda.MMPS.cheap()),
        num_particles=particles,
        batch_size=batch,
        progress_bar=False,
        keep_observed=False,
    )
    y = np.asarray(jax.vmap(seen)(climate.sample(jax.random.key(3), (steps,))))

    def result() -> ndda.FilterResult:
        run.run(jax.random.key(0), y)
        return run.result

    return result


def loops_of_passes(prior: ndda.DiffusionPrior, x: Array, batch: int | None) -> Callable[[], dict[str, float]]:
    """Measurement of the seconds that one pass of each kind takes for all states, from compiled loops of passes.

    Args:
        prior: the emulator.
        x: states, leading axis of particles.
        batch: number of particles at a time; None for all.
    """
    lowest, highest = prior.noise_range
    levels = jnp.geomspace(highest, lowest, LOOP)
    conditioning = jax.jit(jax.vmap(prior.condition))(x)

    def forward(i: Array, z: Array, given: Any) -> Array:
        return z + 1e-6 * prior.denoise(z, levels[i], given)

    def forward_and_vjps(i: Array, z: Array, given: Any) -> Array:
        denoised, pull = jax.vjp(lambda z: prior.denoise(z, levels[i], given), z)
        found = jax.lax.fori_loop(0, PRODUCTS, lambda _, v: pull(v)[0], denoised)
        return z + 1e-6 * found

    def condition(i: Array, z: Array, given: Any) -> Array:
        found = prior.condition(z)
        return z + 1e-30 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(found))

    def loop(one: Callable[[Array, Array, Any], Array]) -> Callable[[], Any]:
        def looped(z: Array, given: Any) -> Array:
            return jax.lax.fori_loop(0, LOOP, lambda i, z: one(i, z, given), z)

        run = jax.jit(ndda.smc.base.map_particles(looped, batch)).lower(x, conditioning).compile()
        return lambda: run(x, conditioning)

    loops = {"forward": loop(forward), "with vjps": loop(forward_and_vjps), "conditioning": loop(condition)}

    def measure() -> dict[str, float]:
        found = {}
        for name, run in loops.items():
            jax.block_until_ready(run())  # memory and threads as in the middle of a run
            began = time.perf_counter()
            jax.block_until_ready(run())
            found[name] = (time.perf_counter() - began) / LOOP
        both = found.pop("with vjps")
        return {**found, "jvp": found["forward"], "vjp": (both - found["forward"]) / PRODUCTS}

    return measure


def main(
    emulator: Annotated[str, typer.Option(help="Shipped emulator: lorenz96 or held_suarez.")] = "lorenz96",
    particles: Annotated[
        list[int] | None, typer.Option(min=2, help="Particles; may be repeated [64, 256, 1024, 4096].")
    ] = None,
    batch: Annotated[int, typer.Option(min=0, help="Particles at a time; 0 for as many as memory allows.")] = 0,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a run.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Turns to take the median of.")] = 3,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print the time of a run and of its network passes, per particle and step."""
    prior = ndda.load_prior(emulator)
    climate = prior.climatology()
    console, rows = Console(), []
    sizes = {"emulator": emulator, "batch": batch, "steps": steps, "repeats": repeats}
    for n in track(particles or [64, 256, 1024, 4096], "timing", console=console, transient=True):
        run = run_of(prior, climate, n, batch or None, steps)
        at_a_time = batch or run().attributes["batch_size"]
        passes = {kind: float(values.mean()) for kind, values in run().network_passes.items()}
        x = climate.sample(jax.random.key(2), (n,))
        measure = loops_of_passes(prior, x, at_a_time if at_a_time < n else None)
        turns = []
        for _ in range(repeats):
            each = measure()
            began = time.perf_counter()
            run()
            turns.append((time.perf_counter() - began, steps * sum(passes[kind] * each[kind] for kind in each)))
        whole, network = 1e6 * np.median(np.array(turns), axis=0) / (n * steps)
        row: dict[str, Any] = {"N": n, "batch": at_a_time}
        row |= {kind: passes[kind] for kind in ("forward", "vjp", "conditioning")}
        row |= {"run, us": whole, "passes, us": network}
        rows.append(row | {"ratio": float(np.median([all_ / own for all_, own in turns]))})
        write_json(out, sizes, rows=rows)
    forms = {"forward": ".1f", "vjp": ".1f", "conditioning": ".1f", "run, us": ".0f", "passes, us": ".0f"}
    title = f"{emulator}: microseconds per particle and step"
    print_table(console, title, rows, {"N": "d", "batch": "d"} | forms | {"ratio": ".2f"})


if __name__ == "__main__":
    typer.run(main)
