"""What does it save to keep the conditioning of all particles, instead of computing it again for each use?

One step of a filter is timed with a shipped emulator, and with the same emulator behind a wrapper that says that its
conditioning runs no network. The filter then computes it for each use. Both are compiled first and run in turns in one
process, with the same random numbers. "ratio" is the median over turns of the first time over the second, and "pass" is
the time of the conditioning network over that of one evaluation of the denoiser, each for all particles.

    python examples/benchmarks/conditioning_cost.py --emulator lorenz96 --out conditioning_cost.json
    python examples/benchmarks/conditioning_cost.py --emulator held_suarez --cpu-time
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
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

SAMPLER = ndda.Sampler(schedule=ndda.KarrasSchedule(8, rho=20.0, lowest=0.1))
"""Sampler of few levels, such as that of the weather demo: here the conditioning matters most."""


class SaidToBeFree(ndda.DiffusionPrior):
    """Emulator whose conditioning is said to run no network.

    Args:
        prior: the emulator.
    """

    prior: ndda.DiffusionPrior
    noise: ndda.diffusion.Noise
    noise_range: tuple[float, float] = eqx.field(static=True)
    layout: ndda.Layout = eqx.field(static=True)
    conditioning_passes: int = eqx.field(static=True)

    def condition(self, state: Any, inputs: Any = None) -> Any:
        """Conditioning of the emulator."""
        return self.prior.condition(state, inputs)

    def denoise(self, z_s: jax.Array, noise_level: jax.Array, conditioning: Any) -> jax.Array:
        """Denoiser of the emulator."""
        return self.prior.denoise(z_s, noise_level, conditioning)

    def location(self, conditioning: Any) -> jax.Array:
        """Location of the emulator."""
        return self.prior.location(conditioning)

    def scale(self, conditioning: Any) -> jax.Array:
        """Scale of the emulator."""
        return self.prior.scale(conditioning)


def filters_of(prior: ndda.DiffusionPrior, climate: dist.Distribution) -> dict[str, ndda.filters.FilterAlgorithm]:
    """Filters of a program with an emulator, of which every second value in the first axis of the state is observed."""

    def model(y: jax.Array) -> None:
        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x, sampler=SAMPLER))
            numpyro.sample("y", dist.Normal(seen(x), 1.0).to_event(1), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x0", climate), y)

    cheap = ndda.MMPS.cheap()
    return {
        "FA-APF": ndda.FAAPF(model, guidance=cheap),
        "FA-APF, RTPS": ndda.FAAPF(model, guidance=cheap, inflation=(ndda.smc.RTPS(0.3),)),
        "equal weights": ndda.FAAPF(model, guidance=cheap, weight=ndda.Equal()),
        "EnKF with V": ndda.EnKF(model, transition_covariance=True),
    }


def seen(x: jax.Array) -> jax.Array:
    """At most 100 values of a state, evenly spread."""
    return x.reshape(-1)[:: max(2, x.size // 100)]


def step_of(algorithm: ndda.filters.FilterAlgorithm, y: np.ndarray, particles: int) -> tuple[Callable[[], Any], Any]:
    """Compiled step of a filter, and its network passes per particle."""
    program = ndda.program.StateSpaceModel(algorithm.model, (y,))
    state = algorithm.initial_state(program, jax.random.key(0), particles)
    inputs = jax.tree.map(lambda x: x[0], program.time_inputs())
    given = jax.random.key(1), state, inputs
    step = jax.jit(algorithm.kernel(program)).lower(*given).compile()
    return lambda: step(*given), algorithm.passes(step(*given)[1])


def seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds of one call, by a clock."""
    began = clock()
    jax.block_until_ready(run())
    return clock() - began


def pass_ratio(prior: ndda.DiffusionPrior, x: jax.Array, repeats: int, clock: Callable[[], float]) -> float:
    """Time of the conditioning over that of one evaluation of the denoiser, for a batch of states."""
    level = jnp.ones(())
    condition = jax.jit(jax.vmap(prior.condition)).lower(x).compile()
    conditioning = condition(x)
    denoise = jax.jit(jax.vmap(lambda z, c: prior.denoise(z, level, c))).lower(x, conditioning).compile()
    calls = (lambda: condition(x), lambda: denoise(x, conditioning))
    for run in calls:
        run()
    pairs = [[seconds(run, clock) for run in calls] for _ in range(repeats)]
    return float(np.median([a / b for a, b in pairs]))


def main(
    emulator: Annotated[str, typer.Option(help="Shipped emulator: lorenz96 or held_suarez.")] = "lorenz96",
    particles: Annotated[int, typer.Option(min=2, help="Particles, or members, of each filter.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Turns to take the median of.")] = 9,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Time the process and not the clock, on a machine with other work.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="Row to run; may be repeated; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print the time of a step with the conditioning kept, over that with the conditioning computed for each use."""
    prior = ndda.load_prior(emulator)
    climate = prior.climatology()
    x = climate.sample(jax.random.key(2), (particles,))
    y = np.asarray(seen(x[0]) + 1.0)[None]
    free = SaidToBeFree(
        prior=prior, noise=prior.noise, noise_range=prior.noise_range, layout=prior.layout, conditioning_passes=0
    )
    kept, anew = filters_of(prior, climate), filters_of(free, climate)
    if unknown := sorted(set(only or ()) - set(kept)):
        raise typer.BadParameter(f"no row called {', '.join(unknown)}; give one of {', '.join(kept)}.")
    clock = time.process_time if cpu_time else time.perf_counter
    sizes = {"emulator": emulator, "particles": particles, "repeats": repeats, "cpu_time": cpu_time}
    console, rows = Console(), []
    passes = pass_ratio(prior, x, repeats, clock)
    for name in track(only or list(kept), "timing", console=console, transient=True):
        (run, made), (again, _) = (step_of(filters[name], y, particles) for filters in (kept, anew))
        pairs = np.array([(seconds(run, clock), seconds(again, clock)) for _ in range(repeats)])
        row: dict[str, Any] = {"filter": name, "passes": float(made.total()), "cond.": float(made.conditioning)}
        row |= {"kept, ms": 1e3 * np.median(pairs[:, 0]), "each use, ms": 1e3 * np.median(pairs[:, 1])}
        rows.append(row | {"ratio": float(np.median(pairs[:, 0] / pairs[:, 1]))})
        write_json(out, sizes | {"pass": passes}, rows=rows)
    title = f"{emulator}, N = {particles}; a conditioning pass takes {passes:.1f} denoiser passes"
    forms = {"passes": ".1f", "cond.": ".1f", "kept, ms": ".1f", "each use, ms": ".1f", "ratio": ".2f"}
    print_table(console, title, rows, {"filter": ""} | forms)


if __name__ == "__main__":
    typer.run(main)
