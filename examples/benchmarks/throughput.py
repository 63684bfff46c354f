"""Seconds of a bootstrap filter: this library, cuthbert, particles where it is installed, and a bare loop.

The model is linear and Gaussian, d values, all observed. Each row is the median over repeats of a whole run after the
first one, so nothing is compiled. `Filter.run` traces the program anew each time, checks it, and returns a result with
particles, weights, predictive draws and diagnostics. cuthbert's `filter` returns particles and weights. The package
`particles` keeps its history; it has a column if it is installed. The bare loop is a `lax.scan` of three lines that
keeps the particles: no filter can be faster by much.

    python examples/benchmarks/throughput.py
    python examples/benchmarks/throughput.py --particles 1000 --particles 10000 --cpu-time
"""

from __future__ import annotations

import importlib.util
import itertools
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
from timing import in_turns

import numpyro_diffusion_da as ndda

DECAY, SPREAD, ERROR = 0.9, 0.5, 0.3


def program(y: Array) -> None:
    """State-space model whose noise and errors are independent."""

    def step(x: Array, y_t: Array) -> tuple[Array, None]:
        x = numpyro.sample("x", dist.Normal(DECAY * x, SPREAD).to_event(1))
        numpyro.sample("y", dist.Normal(x, ERROR).to_event(1), obs=y_t)
        return x, None

    scan(step, jnp.zeros(y.shape[1]), y)


def of_this_library(n: int, y: np.ndarray) -> Callable[[int], Any]:
    """Whole run of `Filter`, for a seed."""
    run = ndda.Filter(ndda.Bootstrap(program), num_particles=n, progress_bar=False, keep_observed=False)

    def filtered(seed: int) -> Any:
        run.run(jax.random.key(seed), y)
        return run.result.posterior["x"]

    return filtered


def of_cuthbert(n: int, y: np.ndarray) -> Callable[[int], Any]:
    """Compiled bootstrap filter of cuthbert on the Feynman-Kac model of the same program, for a seed."""
    import cuthbert
    from cuthbert.smc import particle_filter
    from cuthbertlib.resampling import systematic

    parts = ndda.program.feynman_kac.bootstrap(ndda.program.StateSpaceModel(program, (y,)))
    functions = (parts.init_sample, parts.propagate_sample, parts.log_potential)
    built = particle_filter.build_filter(*functions, n, systematic.resampling)

    @jax.jit
    def run(key: Array) -> Any:
        init_key, run_key = jax.random.split(key)
        states = cuthbert.filter(built, parts.model_inputs, built.init_prepare(key=init_key), key=run_key)
        return states.particles, states.log_weights

    return lambda seed: jax.block_until_ready(run(jax.random.key(seed)))


def of_particles(n: int, y: np.ndarray) -> Callable[[int], Any]:
    """Whole run of the package `particles` with its history of particles, for a seed."""
    import particles
    from particles import distributions, state_space_models

    def law(mean: np.ndarray, spread: float) -> Any:
        if y.shape[1] == 1:
            return distributions.Normal(loc=mean, scale=spread)
        columns = np.atleast_2d(mean).T
        return distributions.IndepProd(*[distributions.Normal(loc=column, scale=spread) for column in columns])

    class LinearGaussian(state_space_models.StateSpaceModel):
        def PX0(self) -> Any:  # noqa: N802 (names of the package)
            return law(np.zeros((1, y.shape[1])) if y.shape[1] > 1 else np.zeros(()), SPREAD)

        def PX(self, t: int, xp: np.ndarray) -> Any:  # noqa: N802
            return law(DECAY * xp, SPREAD)

        def PY(self, t: int, xp: np.ndarray, x: np.ndarray) -> Any:  # noqa: N802
            return law(x, ERROR)

    data = list(y if y.shape[1] > 1 else y[:, 0])
    model = state_space_models.Bootstrap(ssm=LinearGaussian(), data=data)

    def filtered(seed: int) -> Any:
        np.random.seed(seed)  # noqa: NPY002 (the package draws from NumPy's global generator)
        run = particles.SMC(fk=model, N=n, resampling="systematic", store_history=True)
        run.run()
        return run.hist.X

    return filtered


def of_a_bare_loop(n: int, y: np.ndarray) -> Callable[[int], Any]:
    """Compiled loop that resamples, moves and weighs, for a seed."""
    from blackjax.smc.resampling import systematic

    def filtered(key: Array) -> Array:
        def step(carry: tuple[Array, Array], given: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
            (x, log_weights), (y_t, key) = carry, given
            resampling_key, noise_key = jax.random.split(key)
            x = x[systematic(resampling_key, jax.nn.softmax(log_weights), n)]
            x = DECAY * x + SPREAD * jax.random.normal(noise_key, x.shape)
            return (x, -0.5 * jnp.sum(((y_t - x) / ERROR) ** 2, axis=-1)), x

        first = jnp.zeros((n, y.shape[1])), jnp.zeros(n)
        return jax.lax.scan(step, first, (jnp.asarray(y), jax.random.split(key, len(y))))[1]

    run = jax.jit(filtered)
    return lambda seed: np.asarray(run(jax.random.key(seed)))


RUNS = {"this library": of_this_library, "cuthbert": of_cuthbert, "bare loop": of_a_bare_loop}
if importlib.util.find_spec("particles") is not None:
    RUNS["particles"] = of_particles


def without_result(run: Callable[[int], Any]) -> Callable[[int], None]:
    """Run that returns nothing, so that `in_turns` does not hold the particles of all runs."""

    def only(seed: int) -> None:
        run(seed)

    return only


def measure(n: int, d: int, steps: int, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of a run of each filter, in turns.

    Args:
        n: number of particles.
        d: number of values of the state.
        steps: number of steps.
        repeats: number of runs of each, after a first one that compiles.
        clock: function that gives the time in seconds.
    """
    y = np.sin(np.arange(steps)[:, None] + np.arange(d)).astype(np.float32)
    found = in_turns({name: without_result(make(n, y)) for name, make in RUNS.items()}, repeats, clock)
    return {name: timing.median for name, timing in found.items()}


def main(
    particles: Annotated[list[int] | None, typer.Option(min=2, help="Particles; may be repeated [1000].")] = None,
    dims: Annotated[list[int] | None, typer.Option(min=1, help="Values of the state; may be repeated [1, 20].")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Steps; may be repeated [100, 1000].")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each filter, in turns.")] = 5,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Time the process and not the clock, on a machine with other work.")
    ] = False,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print the median seconds of whole runs."""
    if "particles" not in RUNS:
        print("The package particles is not installed, and its column is left out: pip install particles")
    clock = time.process_time if cpu_time else time.perf_counter
    rows = []
    for d, n, length in itertools.product(dims or [1, 20], particles or [1000], steps or [100, 1000]):
        found = measure(n, d, length, repeats, clock)
        ours = found["this library"]
        seconds = {f"{name}, s": value for name, value in found.items()}
        ratios = {f"over {name}": ours / value for name, value in found.items() if name != "this library"}
        rows.append({"d": d, "N": n, "steps": length, **seconds, **ratios})
    print_table(Console(), f"bootstrap filters, medians of {repeats} runs", rows)
    write_json(out, {"repeats": repeats, "cpu_time": cpu_time}, rows=rows)


if __name__ == "__main__":
    typer.run(main)
