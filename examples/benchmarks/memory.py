"""How much memory does a run take with N particles, and what does it cost to stream them?

Each row is a new process that runs a filter on a stand-in for an emulator: a state of random numbers on a ring with a
cheap transition, of which 20 numbers are observed. So reading and writing weigh as much as they can. The process says
its peak resident memory before the run, when everything is imported, and after it. Bootstrap and FAAPF read particles
row by row; the others also by columns, which are changed in all particles together.

    python examples/benchmarks/memory.py

`--series 300` runs a small state over many steps, and says the memory after a third of them and at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from report import json_file, print_table, write_json
from rich.console import Console

PROGRAM = """
import json, resource, sys, time
import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.inference import Kept, RunProgress

name, particles, numbers, steps, batch, streamed, directory = sys.argv[1:]
size = int(numbers)


def model(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.95 * x, 0.3).to_event(1))
        numpyro.sample("y", dist.Normal(x[:: size // 20][:20], 1.0).to_event(1), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(size), 1.0).to_event(1)), y)


places = np.arange(size)
taper = ndda.Taper(size / 40, ndda.Ring(size), {"y": places[:: size // 20][:20]}, state=places)
filters = {
    "Bootstrap": lambda: ndda.Bootstrap(model),
    "FAAPF": lambda: ndda.FAAPF(model),
    "FAAPF, moved": lambda: ndda.FAAPF(model, move=True),
    "FAAPF, moved, taper": lambda: ndda.FAAPF(model, taper=taper, block_radius=size / 512),
    "EnKF": lambda: ndda.EnKF(model, inflation=[ndda.RTPS(0.3)]),
    "LETKF": lambda: ndda.EnKF(model, update=ndda.smc.SquareRoot(), taper=taper),
}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


run = ndda.Filter(
    filters[name](),
    num_particles=int(particles),
    batch_size=int(batch),
    directory=directory,
    stream_particles=streamed == "True",
    keep={"x": Kept(particles=False, mean=True)},
    progress_bar=False,
)
jax.block_until_ready(jnp.zeros(3) + 1)
before = peak()
y = np.random.default_rng(0).normal(size=(int(steps), 20)).astype(np.float32)
run.run(jax.random.key(0), y)
notes = RunProgress.read(directory).notes[0]
print(json.dumps({
    "before, MB": before,
    "peak, MB": peak(),
    "a third, MB": notes[len(notes) // 3]["peak_memory"]["process"] / 2**20,
    "seconds": float(np.median([note["seconds"] for note in notes[1:]])),
}))
"""


FILTERS = ("Bootstrap", "FAAPF", "FAAPF, moved", "FAAPF, moved, taper", "EnKF", "LETKF")


def run(
    name: str, particles: int, numbers: int, steps: int, batch: int, streamed: bool, folder: Path | None
) -> dict[str, float]:
    """Memory and seconds of a run in a new process.

    Args:
        name: name of the filter.
        particles: number of particles.
        numbers: number of float32 numbers of a state.
        steps: number of steps.
        batch: number of particles moved at a time.
        streamed: whether particles are in files.
        folder: folder for the run; None for that of the system.
    """
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        arguments = [name, *map(str, (particles, numbers, steps, batch, streamed)), f"{directory}/run.zarr"]
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} with {particles} particles failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def main(
    filters: Annotated[list[str] | None, typer.Option(help=f"Filter; may be repeated [{', '.join(FILTERS)}].")] = None,
    particles: Annotated[list[int] | None, typer.Option(help="N; may be repeated [256, 1024, 4096].")] = None,
    kilobytes: Annotated[int, typer.Option(min=1, help="Size of a state.")] = 64,
    steps: Annotated[int, typer.Option(min=2, help="Number of steps.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Number of particles moved at a time.")] = 64,
    in_memory_up_to: Annotated[int, typer.Option(min=0, help="Largest N that is also run in memory.")] = 4096,
    series: Annotated[int, typer.Option(min=0, help="Steps of a run with states of 4 kB; 0 for none.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Folder for the directories of the runs.")] = None,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print peak memory and seconds a step, streamed and in memory."""
    console, rows, long = Console(), [], []
    for name in filters or FILTERS:
        for n in sorted(particles or [256, 1024, 4096]):
            row: dict[str, str | int | float | None] = {"filter": name, "N": n, "particles, MB": n * kilobytes / 1024}
            kinds = {"streamed": True} | ({"in memory": False} if n <= in_memory_up_to else {})
            for kind, streamed in kinds.items():
                found = run(name, n, 256 * kilobytes, steps, batch, streamed, folder)
                row |= {
                    f"{kind}, MB": found["peak, MB"],
                    f"{kind}, s": found["seconds"],
                    "before, MB": found["before, MB"],
                }
            row["ratio"] = row["streamed, s"] / row["in memory, s"] if "in memory, s" in row else None  # type: ignore[operator]
            rows.append(row)
        if series:
            found = run(name, 256, 1024, series, batch, True, folder)
            long.append(
                {"filter": name, "steps": series, "a third, MB": found["a third, MB"], "end, MB": found["peak, MB"]}
            )
    columns = (
        "filter",
        "N",
        "particles, MB",
        "before, MB",
        "streamed, MB",
        "in memory, MB",
        "streamed, s",
        "in memory, s",
    )
    formats = {name: ".2f" if name.endswith(", s") else "" for name in columns} | {"ratio": ".1f"}
    print_table(console, f"peak memory and seconds a step, states of {kilobytes} kB", rows, formats, default=".0f")
    if long:
        print_table(console, "peak memory of a long run, 256 states of 4 kB, streamed", long, default=".0f")
    write_json(out, {"kilobytes": kilobytes, "steps": steps, "batch": batch}, rows=rows, long=long)


if __name__ == "__main__":
    typer.run(main)
