"""How much memory and time does GenCast at full size need on this device, per network pass and per filter step?

The weights are random, in the published architecture: by default the 1 degree Mini model with 181 x 360 points, 84
channels, mesh 4, and 16 blocks of width 512. The cost equals that of the published checkpoint; the forecasts are
meaningless. The error of a precision is that of the output of the denoiser, relative to float32 in the same run.

    python examples/benchmarks/gencast_full_size.py --out gencast_full_size.json     # needs a GPU of about 80 GB
    python examples/benchmarks/gencast_full_size.py --tiny                           # on a laptop, in a minute
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
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

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.inference import Compiled
from numpyro_diffusion_da.priors import write_synthetic_gencast
from numpyro_diffusion_da.program import TimeInputs

MINI: dict[str, Any] = {
    "num_latitudes": 181,
    "levels": (50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 850, 925, 1000),
    "mesh_size": 4,
    "latent_size": 512,
    "num_layers": 16,
    "num_heads": 4,
    "attention_hops": 16,
}
TINY: dict[str, Any] = {"num_latitudes": 13, "levels": (500, 850), "mesh_size": 1, "latent_size": 32, "num_layers": 2}
PUBLISHED_PARTICLES = 256


def seconds(run: Any, repeats: int) -> tuple[float, float]:
    """Seconds of the first call, with compilation, and median of the `repeats` calls after it."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return times[0], float(np.median(times[1:]))


def peak_bytes() -> int | None:
    """Peak memory of the device so far, in bytes; None if the device does not report it."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


def flops(lowered: Any) -> float:
    """Number of floating-point operations as the compiler counts them before optimization."""
    cost = lowered.cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost).get("flops", float("nan")))


def passes(prior: ndda.GenCastPrior, conditioning: Any, z: jax.Array, repeats: int) -> dict[str, Any]:
    """Seconds, operations and memory of a forward pass, and of a forward pass with one backward pass."""
    arrays, static = eqx.partition(prior, eqx.is_array)

    def forward(arrays: Any, z: jax.Array) -> jax.Array:
        return eqx.combine(arrays, static).denoise(z, jnp.float32(1.0), conditioning)

    def backward(arrays: Any, z: jax.Array) -> jax.Array:
        given = eqx.combine(arrays, static)
        denoised, pull = jax.vjp(lambda v: given.denoise(v, jnp.float32(1.0), conditioning), z)
        return pull(denoised)[0]

    out: dict[str, Any] = {}
    for name, fn in (("forward", forward), ("forward_and_vjp", backward)):
        lowered = jax.jit(fn).lower(arrays, z)
        compiled = lowered.compile()
        _, median = seconds(lambda compiled=compiled: compiled(arrays, z), repeats)
        memory = compiled.memory_analysis()
        out[name] = {
            "seconds": median,
            "tflop": flops(lowered) / 1e12,
            "temporary_gib": None if memory is None else memory.temp_size_in_bytes / 2**30,
        }
        if name == "forward":
            out["denoised"] = np.asarray(compiled(arrays, z))
    return out


def stations(prior: ndda.GenCastPrior, number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of `number` random grid points that are observed."""
    rng = np.random.default_rng(seed)
    rows, columns = prior.layout.shape[:2]
    return rng.integers(1, rows - 1, number), rng.integers(0, columns, number)


def filter_step(
    prior: ndda.GenCastPrior, data: xarray.Dataset, particles: int, batch_size: int, observations: int
) -> dict[str, Any]:
    """Seconds per particle of a filter step after the first, and its network passes."""
    layout = prior.layout
    rows, columns = stations(prior, observations)
    start = data.time.values[1]
    times = start + np.arange(1, 4) * prior.TIME_STEP
    frames = jnp.asarray(prior.frames(data, [start - prior.TIME_STEP, start]))
    truth = layout.select(prior.frames(data, times), "2m_temperature")[:, rows, columns]

    def model(y: jax.Array, frames: jax.Array, forcings: Any) -> None:
        def step(carry: Any, at: Any) -> Any:
            y_t, forcings_t = at
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, carry, forcings_t, sampler=ndda.Sampler.cheap()))
            t2m = layout.select(x, "2m_temperature")[rows, columns]
            numpyro.sample("y", dist.Normal(t2m, 1.0).to_event(1), obs=y_t)
            return (carry[1], x), None

        scan(step, (frames[0], frames[1]), (y, forcings))

    # Two products a level, because the number of passes is then known before the run.
    algorithm = ndda.FAAPF(model, guidance=ndda.MMPS.cheap())
    program = ndda.program.StateSpaceModel(model, (truth, frames, prior.forcings(times)))
    kernel = Compiled(
        lambda key, state, inputs, given: algorithm.kernel(program.at(*given), batch_size)(key, state, inputs)
    )
    given = ((truth, frames, prior.forcings(times)), {})
    one = program.initial(jax.random.key(0))
    state = ndda.smc.fa_apf.init(jax.tree.map(lambda x: jnp.repeat(x[None], particles, 0), one))
    taken, info = [], None
    for t in range(len(times)):
        inputs = TimeInputs(jnp.asarray(t), jax.tree.map(lambda x, t=t: x[t], program.inputs()))
        begin = time.perf_counter()
        state, info = kernel(jax.random.fold_in(jax.random.key(1), t), state, inputs, given)
        jax.block_until_ready(state)
        taken.append(time.perf_counter() - begin)
    per_particle = float(np.median(taken[1:])) / particles
    return {
        "particles": particles,
        "batch_size": batch_size,
        "observations": observations,
        "first_step_seconds": taken[0],
        "seconds_per_particle": per_particle,
        "minutes_for_256": per_particle * PUBLISHED_PARTICLES / 60,
        "passes": {k: float(v) for k, v in algorithm.passes(info)._asdict().items()},
        "finite": bool(info.nonfinite_particles == 0),
    }


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the numbers to.")] = None,
    tiny: Annotated[bool, typer.Option(help="Use a tiny network, to try the script.")] = False,
    mesh: Annotated[int, typer.Option(help="Mesh size: 4 for the Mini model, 5 for the larger one.")] = 4,
    precisions: Annotated[str, typer.Option(help="Precisions, separated by commas.")] = (
        "float32,tensorfloat32,bfloat16"
    ),
    attention: Annotated[str, typer.Option(help="Attention; auto for the choice of the library.")] = "auto",
    particles: Annotated[int, typer.Option(help="Particles of the filter step.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Particles to move at a time.")] = 1,
    observations: Annotated[int, typer.Option(help="Number of stations of 2 m temperature.")] = 2000,
    repeats: Annotated[int, typer.Option(help="Timed calls of each pass; the median is reported.")] = 5,
    rematerialize: Annotated[bool, typer.Option(help="Recompute activations in the backward pass.")] = False,
    filter_with: Annotated[str, typer.Option(help="Precision of the filter step; none to skip it.")] = "bfloat16",
) -> None:
    """Measure and print the cost of network passes and of a filter step."""
    console = Console()
    size = TINY if tiny else {**MINI, "mesh_size": mesh}
    found: dict[str, Any] = {"device": str(jax.devices()[0].device_kind), "size": size, "rows": []}
    shown = []
    settings = {"attention": attention, "repeats": repeats, "tiny": tiny}

    with tempfile.TemporaryDirectory() as directory:
        begin = time.perf_counter()
        files = write_synthetic_gencast(directory, **size, num_frames=6)
        data = xarray.load_dataset(files.data, engine="h5netcdf")
        console.print(f"wrote a random checkpoint in {time.perf_counter() - begin:.0f} s")
        reference = None
        for precision in precisions.split(","):
            begin = time.perf_counter()
            prior = ndda.GenCastPrior.from_checkpoint(
                files.checkpoint,
                stats=files.stats,
                surface=data,
                precision=precision,
                attention=None if attention == "auto" else attention,
                memory_budget=0.0 if rematerialize else None,
            )
            opened = time.perf_counter() - begin
            frames = prior.frames(data, data.time.values[:2])
            forcings = jax.tree.map(lambda v: v[0], prior.forcings(data.time.values[2:3]))
            conditioning = prior.condition((jnp.asarray(frames[0]), jnp.asarray(frames[1])), forcings)
            z = prior.noise.sample(jax.random.key(0), prior.layout.shape, jnp.float32)
            row = {"precision": precision, "rematerialize": prior.rematerialize, "open_seconds": opened}
            row["backward_gib"] = prior.backward_bytes() / 2**30
            row |= passes(prior, conditioning, z, repeats)
            denoised = row.pop("denoised")
            reference = denoised if reference is None else reference
            row["relative_error"] = float(np.sqrt(np.mean((denoised - reference) ** 2) / np.mean(reference**2)))
            row["peak_gib"] = (peak_bytes() or 0) / 2**30
            found["rows"].append(row)
            write_json(out, settings, **found)
            one, both = row["forward"], row["forward_and_vjp"]
            shown.append(
                {
                    "precision": precision,
                    "forward, s": one["seconds"],
                    "TFLOP": one["tflop"],
                    "forward and vjp, s": both["seconds"],
                    "TFLOP of both": both["tflop"],
                    "GiB": both["temporary_gib"],
                    "relative error": row["relative_error"],
                }
            )
            console.print(row)
            if precision == filter_with:
                found["filter"] = filter_step(prior, data, particles, batch_size, observations)
                found["filter"]["precision"] = precision
                found["filter"]["peak_gib"] = (peak_bytes() or 0) / 2**30
                write_json(out, settings, **found)
                console.print(found["filter"])
        print_table(console, f"one pass, {found['device']}", shown, default=".3g")


if __name__ == "__main__":
    typer.run(main)
