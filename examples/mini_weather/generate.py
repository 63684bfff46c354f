"""Generate the data of the mini weather: a stochastic Held-Suarez atmosphere every 12 hours on pressure levels.

    pip install dinosaur-dycore
    python examples/mini_weather/generate.py --out weather_data

The module `atmosphere` describes the system. Runs are independent. Each run starts at rest in radiative equilibrium,
with its own random pressure disturbance and its own random increments. Its spin-up is not part of the data. The splits
consist of different runs.

A simulated day takes about 0.1 s on one core. Every shard contains `DAYS_PER_SHARD` days of all runs of a split, packed
to 16 bits (`packing`), and the state of the model at its end. If the script is called again, it continues after the
last shard with the same result. Rounding depends on the processor. On another kind of processor the runs differ after a
few weeks, with the same climate.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from atmosphere import DESCRIPTION, HOURS, Atmosphere
from packing import packed

LEVELS = (250, 500, 700, 850, 925)
"""Pressure levels of the data in hPa."""
DAYS_PER_SHARD = 50
SPIN_UP_SHARDS = 2
SEEDS = {"train": 0, "validation": 1, "test": 2}
"""Seeds of the runs of each split."""

CHANNELS = ("surface_pressure", *(f"{name}_{level}" for name in ("temperature", "u", "v") for level in LEVELS))
"""Channels of the data: surface pressure in hPa, temperature in K, u and v in m/s."""


def main() -> None:
    """Generate the shards that do not exist yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("weather_data"), help="folder of the data")
    parser.add_argument("--days", type=int, default=1000, help="days of each run after the spin-up")
    for split, runs in (("train", 8), ("validation", 1), ("test", 4)):
        parser.add_argument(
            f"--{split}-runs", type=int, default=runs, help=f"number of independent runs of the {split} split"
        )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    atmosphere = Atmosphere()
    times = DAYS_PER_SHARD * 24 // HOURS

    def run(rng_key: jax.Array, state: Any, first: jax.Array) -> tuple[Any, jax.Array]:
        def kept(state: Any, time: jax.Array) -> tuple[Any, jax.Array]:
            state = atmosphere.transition(rng_key, state, time)
            return state, atmosphere.on_levels(atmosphere.fields(state), LEVELS)

        return jax.lax.scan(kept, state, first + jnp.arange(times))

    run = jax.jit(jax.vmap(run, (0, 0, None)))
    description = {
        "latitude": np.rad2deg(atmosphere.grid.latitudes).tolist(),
        "longitude": np.rad2deg(atmosphere.grid.longitudes).tolist(),
        "levels": LEVELS,
        "channels": CHANNELS,
        "hours": HOURS,
        "model": DESCRIPTION,
    }
    (options.out / "data.json").write_text(json.dumps(description, indent=2) + "\n")
    for split, seed in SEEDS.items():
        runs = getattr(options, f"{split}_runs")
        keys = jax.random.split(jax.random.key(seed), runs)
        state = jax.vmap(atmosphere.start)(keys)
        structure = jax.tree.structure(state)
        for index in range(-SPIN_UP_SHARDS, -(-options.days // DAYS_PER_SHARD)):
            path = options.out / (f"{split}_{index:03d}.npz" if index >= 0 else f"spin_up_{split}_{-index}.npz")
            began = time.time()
            if path.exists():
                with np.load(path) as stored:
                    leaves = [jnp.asarray(stored[f"state_{i}"]) for i in range(structure.num_leaves)]
                state = jax.tree.unflatten(structure, leaves)
                continue
            state, values = run(keys, state, jnp.asarray((index + SPIN_UP_SHARDS) * times))
            values = np.asarray(values)
            if not np.all(np.isfinite(values)):
                raise RuntimeError(f"{path.name} has non-finite values; reduce STEP_MINUTES in atmosphere.py.")
            arrays = {f"state_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
            if index >= 0:
                arrays |= packed(values)
            unfinished = path.with_suffix(".part")
            with unfinished.open("wb") as file:
                np.savez_compressed(file, **arrays)
            unfinished.rename(path)
            print(f"{path.name}: {runs} x {DAYS_PER_SHARD} days in {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
