"""What a filter step through a tiny GenCast costs: at the published recipe's settings, and at this library's default.

The network is tiny (13 x 24 points, 3 levels, mesh 2, width 32, 2 blocks) and random, so that a laptop can run it; the
ratio between recipes is that of their network passes at any size. Every 4th point of 2 m temperature and temperature is
observed with an error of 0.1 K, as in the published experiment. Seconds are medians over the steps after the first; the
recipes alternate, so that what else the machine does falls on all of them.

    python examples/benchmarks/gencast_cost.py --out gencast_cost.json
    python examples/benchmarks/gencast_cost.py --checkpoint a.npz --stats stats/ --data era5.nc --particles 16

To compare with the published code (github.com/ThomasSavary08/FA-APF), run it from its own repository on the same files.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
import xarray
from numpyro.contrib.control_flow import scan
from rich.console import Console
from rich.progress import track
from rich.table import Table

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.fields import dataset_times
from numpyro_diffusion_da.inference import Compiled
from numpyro_diffusion_da.priors import write_synthetic_gencast
from numpyro_diffusion_da.program import TimeInputs


class Recipe(NamedTuple):
    """A sampler with its guidance."""

    sampler: ndda.Sampler
    guidance: ndda.diffusion.Guidance


def published(products: int) -> Recipe:
    """32 levels, Adams-Bashforth 3, two Langevin corrections a level, C = I; `products` of the solver, from zero.

    The levels end at 2e-5 as published, far below what the network was trained on: this is about cost.
    """
    schedule = ndda.KarrasSchedule(32, rho=6.0, lowest=2e-5, highest=88.0)
    sampler = ndda.Sampler(
        ndda.diffusion.AdamsBashforth(3), schedule, corrector=ndda.diffusion.LangevinCorrector(2, tau=0.1)
    )
    solver = ndda.diffusion.KrylovSolve(products=products, warm_start=False)
    return Recipe(sampler, ndda.MMPS(solver, noise=ndda.diffusion.WhiteNoise()))


RECIPES = {
    "published settings, 6 products": published(6),
    "published settings, 4 products": published(4),
    "default": Recipe(ndda.Sampler(), ndda.MMPS()),
}


class Problem(NamedTuple):
    """Observations of the first steps of a dataset."""

    prior: ndda.GenCastPrior
    frames: jax.Array
    observations: jax.Array
    forcings: Any

    @staticmethod
    def make(prior: ndda.GenCastPrior, data: xarray.Dataset, steps: int, error: float, seed: int) -> Problem:
        """All particles begin with the first two frames."""
        times = dataset_times(data)
        states = jnp.asarray(prior.frames(data, times[2 : 2 + steps]))
        exact = jax.vmap(lambda x: observed(prior, x))(states)
        noise = error * np.random.default_rng(seed).standard_normal(exact.shape)
        frames = jnp.asarray(prior.frames(data, times[:2]))
        return Problem(prior, frames, exact + jnp.asarray(noise, jnp.float32), prior.forcings(times[2 : 2 + steps]))

    def model(self, sampler: ndda.Sampler, error: float) -> Any:
        """The program."""

        def model(y: jax.Array, frames: jax.Array, forcings: Any) -> None:
            def step(carry: Any, at: Any) -> Any:
                y_t, forcings_t = at
                x = numpyro.sample("x", ndda.DiffusionTransition(self.prior, carry, forcings_t, sampler=sampler))
                numpyro.sample("y", dist.Normal(observed(self.prior, x), error).to_event(1), obs=y_t)
                return (carry[1], x), None

            scan(step, (frames[0], frames[1]), (y, forcings))

        return model


def observed(prior: ndda.GenCastPrior, x: jax.Array) -> jax.Array:
    """Every 4th point of 2 m temperature and of temperature at all levels, K."""
    fields = [prior.layout.select(x, name)[::4, ::4].reshape(-1) for name in ("2m_temperature", "temperature")]
    return jnp.concatenate(fields)


def kernel_of(problem: Problem, recipe: Recipe, error: float, particles: int, batch_size: int) -> Any:
    """() -> (first state, inputs of each step, step function, passes of an info)."""
    model = problem.model(recipe.sampler, error)
    algorithm = ndda.FAAPF(model, guidance=recipe.guidance)
    arguments = (problem.observations, problem.frames, problem.forcings)
    program = ndda.program.StateSpaceModel(model, arguments)
    program.check(one_step=True)
    step = Compiled(
        lambda key, state, inputs, given: algorithm.kernel(program.at(given, {}), batch_size)(key, state, inputs)
    )
    one = program.initial(jax.random.key(0))
    state = ndda.smc.fa_apf.init(jax.tree.map(lambda x: jnp.repeat(x[None], particles, 0), one))
    xs = program.inputs()
    inputs = [TimeInputs(jnp.asarray(t), jax.tree.map(lambda x, t=t: x[t], xs)) for t in range(program.length)]
    return state, inputs, lambda key, state, at: step(key, state, at, arguments), algorithm.passes


def main(
    checkpoint: Annotated[Path | None, typer.Option(help="GenCast checkpoint; a random tiny one if left out.")] = None,
    stats: Annotated[Path | None, typer.Option(help="Directory of its statistics.")] = None,
    data: Annotated[Path | None, typer.Option(help="ERA5-like netCDF, 12 h apart.")] = None,
    attention: Annotated[str, typer.Option(help="mha or triblockdiag_mha.")] = "mha",
    particles: Annotated[int, typer.Option(help="Particles.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Particles moved at a time; 0 for all.")] = 0,
    steps: Annotated[int, typer.Option(help="Filter steps; the first is not timed.")] = 4,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Measure and print."""
    error, console = 0.1, Console()
    given = [path for path in (checkpoint, stats, data) if path is not None]
    if len(given) not in (0, 3):
        raise typer.BadParameter("give --checkpoint, --stats and --data together, or none of them.")
    with tempfile.TemporaryDirectory() as directory:
        if checkpoint is None or stats is None or data is None:
            checkpoint, stats, data = write_synthetic_gencast(
                directory, levels=(500, 850, 1000), mesh_size=2, num_heads=4, num_frames=2 + steps
            )
        with xarray.open_dataset(data, engine="h5netcdf") as file:
            dataset = file.load()
        prior = ndda.GenCastPrior.from_checkpoint(checkpoint, stats=stats, surface=dataset, attention=attention)
    steps = min(steps, dataset.sizes["time"] - 2)
    problem = Problem.make(prior, dataset, steps, error, seed=0)
    runs = {name: kernel_of(problem, recipe, error, particles, batch_size) for name, recipe in RECIPES.items()}
    states = {name: run[0] for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    passes: dict[str, float] = {}
    for t in track(range(steps), console=console, description="steps"):
        for name, (_, inputs, step, count) in runs.items():
            begin = time.perf_counter(), time.process_time()
            states[name], info = step(jax.random.fold_in(jax.random.key(1), t), states[name], inputs[t])
            jax.block_until_ready(states[name])
            seconds[name].append(time.perf_counter() - begin[0])
            cpu[name].append(time.process_time() - begin[1])
            passes[name] = float(count(info).total())
    title = f"{particles} particles, {attention}, batches of {batch_size or particles}, {jax.default_backend()}"
    table = Table(title=title)
    for column in ("recipe", "passes", "first step s", "step s", "per particle s", "CPU s", "ms a pass"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    rows = []
    for name in runs:
        median = float(np.median(seconds[name][1:]))
        row = {
            "recipe": name,
            "passes": passes[name],
            "first_step_seconds": seconds[name][0],
            "step_seconds": median,
            "particle_seconds": median / particles,
            "particle_cpu_seconds": float(np.median(cpu[name][1:])) / particles,
            "pass_milliseconds": 1e3 * median / particles / passes[name],
        }
        rows.append(row)
        cells = [f"{row[k]:.3g}" for k in list(row)[1:]]
        table.add_row(name, *cells)
    console.print(table)
    if out is not None:
        settings = {"particles": particles, "attention": attention, "batch_size": batch_size, "steps": steps}
        out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
