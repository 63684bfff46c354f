"""Make the data of the mini weather: a stochastic Held-Suarez atmosphere at T21, every 12 hours on pressure levels.

The dry atmosphere of Held & Suarez 1994 (Bull. Amer. Meteor. Soc. 75, 1825) by the spectral model `dinosaur`, on its
Gaussian grid of 64 x 32 points and 6 equidistant sigma layers, with fourth-order diffusion of the smallest scales, and
random increments of vorticity and temperature after every step, as forecasting models have them for what they do not
resolve: a coarse deterministic model knows its next 12 hours almost exactly, and weather does not.
Runs are independent: each begins at rest in radiative equilibrium with its own random pressure disturbance and its own
increments, and its spin-up is left out. The splits are made of different runs.

    pip install dinosaur-dycore
    python examples/mini_weather/generate.py --out weather_data

About 0.1 s of one core for a simulated day. Every shard holds `DAYS_PER_SHARD` days of all runs of a split, packed to
16 bits (`packing`), and the model's state at its end: call the script again and it goes on after the last shard, with
the same result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dinosaur
import jax
import jax.numpy as jnp
import numpy as np
from packing import packed

LAYERS = 6
LEVELS = (250, 500, 700, 850, 925)
"""Pressure levels in hPa."""
STEP_MINUTES = 90
HOURS = 12
"""Between two states kept."""
DIFFUSION_ORDER = 2
DIFFUSION_HOURS = 6.0
"""E-folding time of the smallest scale under diffusion by the Laplacian to the power of the order."""
WIND_INCREMENT = (0.42, 0.25)
"""Standard deviation in m/s of a component of wind, of all random increments of 12 hours together: in the uppermost
layer and in the lowest; linear between them."""
TEMPERATURE_INCREMENT = (0.14, 0.25)
"""K, likewise."""
INCREMENT_DEGREE = 12
"""The kinetic energy (and the variance of temperature) of the increments falls off as exp(-(degree / this)^2)."""
INCREMENT_LAYERS = 2.0
"""Their correlation falls off by 1/e over so many layers."""
DAYS_PER_SHARD = 50
SPIN_UP_SHARDS = 2
SEEDS = {"train": 0, "validation": 1, "test": 2}
"""Of the disturbances of each split's runs."""

CHANNELS = ("surface_pressure", *(f"{name}_{level}" for name in ("temperature", "u", "v") for level in LEVELS))
"""hPa, K, m/s, m/s."""


def atmosphere() -> tuple[Any, Any, Callable[[Any], Any], Callable[[jax.Array], Any], np.ndarray]:
    """(coordinates, physical constants, one model step, random key -> initial state, reference temperatures)."""
    units = dinosaur.scales.units
    coords = dinosaur.coordinate_systems.CoordinateSystem(
        dinosaur.spherical_harmonic.Grid.T21(), dinosaur.sigma_coordinates.SigmaCoordinates.equidistant(LAYERS)
    )
    grid, specs = coords.horizontal, dinosaur.primitive_equations.PrimitiveEquationsSpecs.from_si()
    at_rest, features = dinosaur.primitive_equations_states.isothermal_rest_atmosphere(
        coords=coords, physics_specs=specs, p0=1e5 * units.pascal, p1=5e3 * units.pascal
    )
    reference = features[dinosaur.xarray_utils.REF_TEMP_KEY]
    flat = dinosaur.primitive_equations.truncated_modal_orography(features[dinosaur.xarray_utils.OROGRAPHY], coords)
    forcing = dinosaur.held_suarez.HeldSuarezForcing(coords, specs, reference)
    equation = dinosaur.time_integration.compose_equations(
        [dinosaur.primitive_equations.PrimitiveEquations(reference, flat, coords, specs), forcing]
    )
    dt = specs.nondimensionalize(STEP_MINUTES * units.minute)
    diffusion = dinosaur.time_integration.horizontal_diffusion_step_filter(
        grid, dt, specs.nondimensionalize(DIFFUSION_HOURS * units.hour), DIFFUSION_ORDER
    )
    step = dinosaur.time_integration.imex_rk_sil3(equation, dt)

    def start(rng_key: jax.Array) -> Any:
        state = at_rest(rng_key)
        pressure = jnp.exp(grid.to_nodal(state.log_surface_pressure))
        temperature = forcing.equilibrium_temperature(pressure) - reference[:, None, None]
        return dataclasses.replace(state, temperature_variation=grid.to_modal(temperature))

    return coords, specs, dinosaur.time_integration.step_with_filters(step, [diffusion]), start, reference


def random_increments(coords: Any, specs: Any) -> Callable[[jax.Array, Any], Any]:
    """(key, state) -> state with the increments of one model step: white in time, isotropic, without divergence."""
    units, grid = dinosaur.scales.units, coords.horizontal
    degree = np.asarray(grid.modal_axes[1], np.float64)
    spectrum = np.where(degree > 0, np.exp(-((degree / INCREMENT_DEGREE) ** 2)), 0.0)
    energy = spectrum / spectrum.sum()
    # A real harmonic of unit coefficient has the mean square 1 / (4 pi); a degree has 2 l + 1 of them.
    variance = 4.0 * np.pi * energy / (2 * degree + 1)
    per_step = (STEP_MINUTES / (60.0 * 12)) ** 0.5
    wind = specs.nondimensionalize(np.linspace(*WIND_INCREMENT, LAYERS) * units.meter / units.second)[:, None, None]
    kelvin = specs.nondimensionalize(np.linspace(*TEMPERATURE_INCREMENT, LAYERS) * units.degK)[:, None, None]
    # |k x grad psi|^2 has the mean l (l + 1) psi^2, of both components, and vorticity is l (l + 1) psi.
    vorticity = per_step * wind * np.sqrt(2.0 * variance * degree * (degree + 1)) * grid.mask / grid.radius
    temperature = per_step * kelvin * np.sqrt(variance) * grid.mask
    distance = np.abs(np.subtract.outer(np.arange(LAYERS), np.arange(LAYERS)))
    layers = np.linalg.cholesky(np.exp(-distance / INCREMENT_LAYERS))

    def add(rng_key: jax.Array, state: Any) -> Any:
        noise = jax.random.normal(rng_key, (2, LAYERS, *grid.modal_shape))
        noise = jnp.einsum("kj,vj...->vk...", jnp.asarray(layers, noise.dtype), noise)
        return dataclasses.replace(
            state,
            vorticity=state.vorticity + jnp.asarray(vorticity, noise.dtype) * noise[0],
            temperature_variation=state.temperature_variation + jnp.asarray(temperature, noise.dtype) * noise[1],
        )

    return add


def fields(state: Any, coords: Any, specs: Any, reference: np.ndarray) -> jax.Array:
    """A model state on the pressure levels, shape (latitude, longitude, channels), in the units of `CHANNELS`.

    Linear in the logarithm of pressure between the layers; beyond the outermost ones continued along the same line.
    """
    units, grid = dinosaur.scales.units, coords.horizontal
    pressure = jnp.exp(grid.to_nodal(state.log_surface_pressure))[0]
    pressure = pressure * float(specs.dimensionalize(1.0, units.pascal).magnitude) / 100.0
    temperature = grid.to_nodal(state.temperature_variation) + reference[:, None, None]
    temperature = temperature * float(specs.dimensionalize(1.0, units.degK).magnitude)
    speed = float(specs.dimensionalize(1.0, units.meter / units.second).magnitude)
    u, v = dinosaur.spherical_harmonic.vor_div_to_uv_nodal(grid, state.vorticity, state.divergence, clip=False)
    centers = jnp.log(jnp.asarray(coords.vertical.centers))
    columns = [pressure[None]]
    target = jnp.log(jnp.asarray(LEVELS)[:, None, None] / pressure[None])
    upper = jnp.clip(jnp.searchsorted(centers, target) - 1, 0, LAYERS - 2)
    weight = (target - centers[upper]) / (centers[upper + 1] - centers[upper])
    for profile in (temperature, speed * u, speed * v):
        above = jnp.take_along_axis(profile, upper, axis=0)
        below = jnp.take_along_axis(profile, upper + 1, axis=0)
        columns.append(above + weight * (below - above))
    return jnp.transpose(jnp.concatenate(columns), (2, 1, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("weather_data"))
    parser.add_argument("--days", type=int, default=1000, help="kept of each run")
    for split, runs in (("train", 8), ("validation", 1), ("test", 4)):
        parser.add_argument(f"--{split}-runs", type=int, default=runs, help="independent runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    coords, specs, step, start, reference = atmosphere()
    grid = coords.horizontal
    steps = HOURS * 60 // STEP_MINUTES

    add = random_increments(coords, specs)
    times = DAYS_PER_SHARD * 24 // HOURS

    def run(rng_key: jax.Array, state: Any, first: jax.Array) -> tuple[Any, jax.Array]:
        def kept(state: Any, time: jax.Array) -> tuple[Any, jax.Array]:
            def one(i: jax.Array, state: Any) -> Any:
                return add(jax.random.fold_in(rng_key, time * steps + i), step(state))

            state = jax.lax.fori_loop(0, steps, one, state)
            return state, fields(state, coords, specs, reference)

        return jax.lax.scan(kept, state, first + jnp.arange(times))

    run = jax.jit(jax.vmap(run, (0, 0, None)))
    description = {
        "latitude": np.rad2deg(grid.latitudes).tolist(),
        "longitude": np.rad2deg(grid.longitudes).tolist(),
        "levels": LEVELS,
        "channels": CHANNELS,
        "hours": HOURS,
        "model": {
            "dinosaur": dinosaur.__version__,
            "sigma_layers": LAYERS,
            "step_minutes": STEP_MINUTES,
            "random_increments": {
                "wind_m_s": WIND_INCREMENT,
                "temperature_K": TEMPERATURE_INCREMENT,
                "degree": INCREMENT_DEGREE,
                "layers": INCREMENT_LAYERS,
            },
            "diffusion": f"order {2 * DIFFUSION_ORDER}, {DIFFUSION_HOURS} h at the smallest scale",
        },
    }
    (options.out / "data.json").write_text(json.dumps(description, indent=2) + "\n")
    for split, seed in SEEDS.items():
        runs = getattr(options, f"{split}_runs")
        keys = jax.random.split(jax.random.key(seed), runs)
        state = jax.vmap(start)(keys)
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
                raise RuntimeError(f"{path.name} is not finite; take a shorter step than {STEP_MINUTES} minutes.")
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
