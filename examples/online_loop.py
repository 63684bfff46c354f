"""Filter observations that arrive one by one, in a process that can be stopped and resumed at any step.

An instrument reports every second site of a Lorenz-96 truth, one time after another. `ndda.OnlineFilter` assimilates
each report as it arrives; the loop is yours, and the filter's state is a pytree of arrays. The program writes the state
to --out after every step. When you start it again, it reads the state and continues from there. The key of a step is
derived from the run's key and the step's number, so an interrupted run makes the same draws as an uninterrupted one:
the particles are equal bit for bit. The last line prints their checksum.

    python examples/online_loop.py --out run.npz --stop 12     # stops after 12 reports
    python examples/online_loop.py --out run.npz               # resumes with the 13th
    python examples/online_loop.py --out other.npz             # never stops: the same checksum

What to expect: the error falls from 3.6, the spread of the climatology, to about 1 within about ten reports. The spread
of the particles follows the error. Only the first step takes seconds, because it compiles.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from numpyro.contrib.control_flow import scan
from rich.console import Console

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96

ERROR = 0.3
prior = ndda.load_prior("lorenz96")


def model(y):
    x0 = numpyro.sample("x0", prior.climatology())

    def step(x, y_t):
        x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
        numpyro.sample("y", dist.Normal(x[::2], ERROR).to_event(1), obs=y_t)
        return x, None

    scan(step, x0, y)


def reports(seed, number):
    """Yield (step, truth, report) in order, as the instrument would; the same values for the same seed."""
    key = jax.random.key(seed)
    x = prior.climatology().sample(jax.random.fold_in(key, 0))
    for t in range(number):
        move_key, error_key = jax.random.split(jax.random.fold_in(key, t + 1))
        x = lorenz96.draw(move_key, x)
        yield t, np.asarray(x), x[::2] + ERROR * jax.random.normal(error_key, x[::2].shape)


def save(path, step, state):
    """Write the state atomically: a reader of the file finds either the old state or the new one."""
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, *jax.tree.leaves(state), step=step)
    os.replace(partial, path)


def load(path, like):
    """Read (step, state) from a file; `like` is a state with the same structure."""
    with np.load(path) as file:
        leaves = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(jax.tree.leaves(like)))]
        return int(file["step"]), jax.tree.unflatten(jax.tree.structure(like), leaves)


def main(
    out: Annotated[Path, typer.Option(help="File of the state (.npz).")] = Path("run.npz"),
    particles: Annotated[int, typer.Option(help="Particles.", min=2)] = 256,
    steps: Annotated[int, typer.Option(help="Number of reports in total.", min=1)] = 30,
    stop: Annotated[int | None, typer.Option(help="Stop after this many reports.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of truth, reports and filter.")] = 0,
) -> None:
    """Filter reports as they arrive; resume after the last report that was assimilated."""
    console = Console()
    filter = ndda.OnlineFilter(ndda.FAAPF(model), num_particles=particles)
    run_key, init_key = jax.random.split(jax.random.key(seed + 1))
    nothing_yet = jnp.full((1, prior.layout.size // 2), jnp.nan)
    done, state = 0, filter.init(init_key, nothing_yet)
    if out.exists():
        done, state = load(out, state)
        console.print(f"resuming after step {done} of {out}")
    for t, truth, y_t in reports(seed, min(steps, stop or steps)):
        if t < done:
            continue  # assimilated before
        state, info = filter.step(jax.random.fold_in(run_key, t), state, y_t[None])
        save(out, t + 1, state)
        x = np.asarray(info.proposal.sites["posterior"]["x"])
        error, spread = np.sqrt(np.mean((x.mean(0) - truth) ** 2)), np.sqrt(x.var(0, ddof=1).mean())
        console.print(f"step {t + 1:3}   error {error:.2f}   spread {spread:.2f}   tempering {info.tempering:.3f}")
    checksum = hashlib.sha256(np.asarray(state.particles).tobytes()).hexdigest()
    console.print(f"particles {checksum[:16]}")


if __name__ == "__main__":
    typer.run(main)
