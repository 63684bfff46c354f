"""How much does a filter step with GenCast cost, with the published recipe and with the default of this library?

The network is tiny (13 x 24 points, 3 levels, mesh 2, width 32, 2 blocks) and random, so that it runs on a laptop. At
any size, the costs of recipes are in the ratio of their network passes. Every 4th point of 2 m temperature and
temperature is observed with an error of 0.1 K, as in the published experiment. Seconds are medians over the steps after
the first. Recipes alternate, so that other load on the machine affects all of them.

    python examples/benchmarks/gencast_cost.py --out gencast_cost.json
    python examples/benchmarks/gencast_cost.py --checkpoint a.npz --stats stats/ --data era5.nc --particles 16

To compare with the published code (github.com/ThomasSavary08/FA-APF), run that code on the same files.
"""

from __future__ import annotations

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
from report import json_file, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.fields import dataset_times
from numpyro_diffusion_da.inference import Compiled
from numpyro_diffusion_da.priors import write_synthetic_gencast
from numpyro_diffusion_da.program import TimeInputs


class Recipe(NamedTuple):
    """Sampler and guidance of a guided draw."""

    sampler: ndda.Sampler
    guidance: ndda.diffusion.Guidance


def published(products: int) -> Recipe:
    """Published recipe: 32 levels, Adams-Bashforth 3, two Langevin corrections per level, C = I, no warm start.

    The lowest level is 2e-5 as published, far below the training range of the network; only the cost matters here.

    Args:
        products: number of products per linear solve.
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
    "cheap recipe": Recipe(ndda.Sampler.cheap(), ndda.MMPS.cheap()),
}


class Problem(NamedTuple):
    """Observations of the first steps of a dataset, with the inputs of the filter."""

    prior: ndda.GenCastPrior
    frames: jax.Array
    observations: jax.Array
    forcings: Any

    @staticmethod
    def make(prior: ndda.GenCastPrior, data: xarray.Dataset, steps: int, error: float, seed: int) -> Problem:
        """Simulate observations of the frames after the first two, which are the initial state of all particles."""
        times = dataset_times(data)
        states = jnp.asarray(prior.frames(data, times[2 : 2 + steps]))
        exact = jax.vmap(lambda x: observed(prior, x))(states)
        noise = error * np.random.default_rng(seed).standard_normal(exact.shape)
        frames = jnp.asarray(prior.frames(data, times[:2]))
        return Problem(prior, frames, exact + jnp.asarray(noise, jnp.float32), prior.forcings(times[2 : 2 + steps]))

    def model(self, sampler: ndda.Sampler, error: float) -> Any:
        """State-space model with GenCast as transition."""

        def model(y: jax.Array, frames: jax.Array, forcings: Any) -> None:
            def step(carry: Any, at: Any) -> Any:
                y_t, forcings_t = at
                x = numpyro.sample("x", ndda.DiffusionTransition(self.prior, carry, forcings_t, sampler=sampler))
                numpyro.sample("y", dist.Normal(observed(self.prior, x), error).to_event(1), obs=y_t)
                return (carry[1], x), None

            scan(step, (frames[0], frames[1]), (y, forcings))

        return model


def observed(prior: ndda.GenCastPrior, x: jax.Array) -> jax.Array:
    """Every 4th point of 2 m temperature and of temperature at all levels, in K."""
    fields = [prior.layout.select(x, name)[::4, ::4].reshape(-1) for name in ("2m_temperature", "temperature")]
    return jnp.concatenate(fields)


def kernel_of(problem: Problem, recipe: Recipe, error: float, particles: int, batch_size: int | None) -> Any:
    """Prepare a filter: (first state, inputs of each step, step function, function that counts passes)."""
    model = problem.model(recipe.sampler, error)
    algorithm = ndda.FAAPF(model, guidance=recipe.guidance)
    arguments = (problem.observations, problem.frames, problem.forcings)
    program = ndda.program.StateSpaceModel(model, arguments)
    program.check(needs_dynamics=True)
    step = Compiled(
        lambda key, state, inputs, given: algorithm.kernel(program.at(given, {}), batch_size)(key, state, inputs)
    )
    one = program.initial(jax.random.key(0))
    state = ndda.smc.fa_apf.init(jax.tree.map(lambda x: jnp.repeat(x[None], particles, 0), one))
    xs = program.inputs()
    inputs = [
        TimeInputs(jnp.asarray(t), jax.tree.map(lambda x, t=t: x[t], xs)) for t in range(program.structure.length)
    ]
    return state, inputs, lambda key, state, at: step(key, state, at, arguments), algorithm.passes


def main(
    checkpoint: Annotated[Path | None, typer.Option(help="GenCast checkpoint; a tiny random one by default.")] = None,
    stats: Annotated[Path | None, typer.Option(help="Folder of the statistics of the checkpoint.")] = None,
    data: Annotated[Path | None, typer.Option(help="ERA5-like netCDF file with times 12 h apart.")] = None,
    attention: Annotated[str, typer.Option(help="Attention: mha or triblockdiag_mha.")] = "mha",
    particles: Annotated[int, typer.Option(help="Number of particles.")] = 8,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Particles to move at a time; all by default.")] = None,
    steps: Annotated[int, typer.Option(help="Filter steps; the first is not timed.")] = 4,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Measure and print the cost of a filter step."""
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
    rows = []
    for name in runs:
        median = float(np.median(seconds[name][1:]))
        rows.append(
            {
                "recipe": name,
                "passes": passes[name],
                "first_step_seconds": seconds[name][0],
                "step_seconds": median,
                "particle_seconds": median / particles,
                "particle_cpu_seconds": float(np.median(cpu[name][1:])) / particles,
                "pass_milliseconds": 1e3 * median / particles / passes[name],
            }
        )
    print_table(console, title, rows, default=".3g")
    write_json(
        out,
        {"particles": particles, "attention": attention, "batch_size": batch_size, "steps": steps},
        rows=rows,
    )


if __name__ == "__main__":
    typer.run(main)
